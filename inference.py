"""Continues a prompt with the trained model. Standard output gets the text and nothing else."""

import argparse
import itertools
import math
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch

from model import GPT, CharTokenizer, load_model

prompt = "The machine stood in the middle of the"  # edit this


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"error: {message}\n")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    trained = Path(__file__).resolve().parent / "models/model-scifi.pth"
    parser.add_argument("--model", type=Path, default=trained, help="what train.py has saved")
    parser.add_argument("--prompt", default=prompt, help="what the text begins with")
    parser.add_argument("--max-new-tokens", type=int, default=500, help="characters to add")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest; higher is wilder"
    )
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest characters alone")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest that together reach p")
    parser.add_argument("--stop", help="end a text once this has been written")
    parser.add_argument("--seed", type=int, help="makes the text the same each time")
    parser.add_argument("--num-samples", type=int, default=1, help="texts to write, a blank line between")
    fastest = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser.add_argument("--device", default=fastest, help="cpu, cuda or mps")
    args = parser.parse_args()
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    for flag, value, valid, range_ in (
        ("--max-new-tokens", args.max_new_tokens, 0 <= args.max_new_tokens < 2**31, "0 or more"),
        ("--temperature", args.temperature, 0 <= args.temperature < math.inf, "0 or more"),
        ("--top-k", args.top_k, args.top_k is None or 1 <= args.top_k < 2**31, "1 or more"),
        ("--top-p", args.top_p, args.top_p is None or 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("--stop", args.stop, args.stop != "", "a text"),
        ("--seed", args.seed, args.seed is None or 0 <= args.seed < 2**63, "0 or more, of at most 63 bits"),
        ("--num-samples", args.num_samples, 1 <= args.num_samples < 2**16, "1 or more"),
    ):
        if not valid:
            parser.error(f"{flag} is {value!r}, but must be {range_}")
    return args


def write(model: GPT, tokenizer: CharTokenizer, args: argparse.Namespace) -> None:
    """Shows the first text as it is generated; the others, which grow beside it, follow.

    Raises ValueError for a character in the prompt that the model does not know.
    """
    device = model.lm_head.weight.device
    start = tokenizer.encode(args.prompt or "\n").long().to(device)  # (T,); an empty prompt reads a new line
    generator = torch.Generator()
    generator.seed() if args.seed is None else generator.manual_seed(args.seed)
    prompts = start.expand(args.num_samples, -1)  # (B, T)
    new = model.generate(prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator)
    at_once = 1 if device.type == "cpu" else 16  # a GPU runs ahead of what is shown

    texts: list[list[str]] = [[args.prompt] for _ in prompts]
    growing = set(range(args.num_samples))
    print(args.prompt, end="", flush=True)
    while growing and (drawn := list(itertools.islice(new, at_once))):
        for i, ids in enumerate(torch.stack(drawn, dim=1).tolist()):
            for character in tokenizer.decode(ids):
                if i not in growing:
                    break
                texts[i].append(character)
                if args.stop and "".join(texts[i][-len(args.stop) :]).endswith(args.stop):
                    growing.remove(i)
                if i == 0:
                    print(character, end="", flush=True)
    print()
    for text in texts[1:]:
        print("\n" + "".join(text))


def main() -> None:
    """Writes what the command line asks for."""
    args = parse()
    for number in (signal.SIGINT, getattr(signal, "SIGPIPE", signal.SIGINT)):  # Windows has no SIGPIPE
        signal.signal(number, signal.SIG_DFL)  # Ctrl-C, or a reader that has seen enough, ends it quietly
    if sys.stdout:
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        model, tokenizer, _ = load_model(args.model, args.device)
        if model.config.n_embd * args.num_samples < 256:
            torch.set_num_threads(1)  # so little work waits longer for other threads than for its sums
        write(model, tokenizer, args)
    except FileNotFoundError:
        sys.exit(f"error: there is no model {args.model}: train one with python train.py")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if not any(words in repr(error) for words in ("MemoryError", "out of memory", "allocate memory")):
            raise  # a mistake of ours
        sys.exit("error: out of memory: lower --num-samples or --max-new-tokens")


if __name__ == "__main__":
    main()
