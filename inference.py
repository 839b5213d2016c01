"""Continues a prompt with the trained model. Standard output gets the text and nothing else."""

import argparse
import itertools
import math
import signal
import sys
from pathlib import Path

import torch

from model import (
    GPT,
    MODEL_PATH,
    CharTokenizer,
    default_device,
    is_out_of_memory,
    load_model,
    with_hyphens,
)

prompt = "The machine stood in the middle of the"  # edit this

LARGEST_INTEGER = 2**31
LARGEST_SEED = 2**63


def main() -> None:
    args = parse_arguments()
    end_quietly_on_signals()
    if sys.stdout is not None:  # it can be closed
        # A console that has no character for something shows a question mark.
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        model, tokenizer, _ = load_model(args.model, args.device)
        use_one_thread_for_little_work(model, args.num_samples)
        write(model, tokenizer, args)
    except FileNotFoundError:
        sys.exit(f"error: there is no model {args.model}: train one with python train.py")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit("error: out of memory: lower --num-samples or --max-new-tokens")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python inference.py [--FLAG VALUE ...]",
        description="Continues a prompt with the trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, default=MODEL_PATH, help="the file that train.py has saved")
    add("--prompt", default=prompt, help="what the text begins with")
    add("--max-new-tokens", type=int, default=500, help="characters to add")
    add("--temperature", type=float, default=0.8, help="0: the likeliest; higher: more varied")
    add("--top-k", type=int, help="draw only from the k likeliest characters")
    add("--top-p", type=float, help="draw only from the likeliest that together reach p")
    add("--stop", help="end a text after this has been written")
    add("--seed", type=int, help="makes the text the same each time")
    add("--num-samples", type=int, default=1, help="texts to write, with a blank line between")
    add("--device", default=default_device(), help="cpu, cuda or mps")
    args = parser.parse_args([with_hyphens(argument) for argument in sys.argv[1:]])
    try:
        check_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError if a value is out of range or the device cannot be used."""
    check(0 <= args.max_new_tokens < LARGEST_INTEGER, "--max-new-tokens must be 0 or more")
    check(0 <= args.temperature < math.inf, "--temperature must be 0 or more")
    check(args.top_k is None or 1 <= args.top_k < LARGEST_INTEGER, "--top-k must be 1 or more")
    check(args.top_p is None or 0 < args.top_p <= 1, "--top-p must be above 0 and at most 1")
    check(args.stop != "", "--stop must not be empty")
    check(args.seed is None or 0 <= args.seed < LARGEST_SEED, "--seed must be from 0 to 2^63 - 1")
    check(1 <= args.num_samples < 2**16, "--num-samples must be from 1 to 65535")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here: try cpu") from error


def check(is_valid: bool, message: str) -> None:
    if not is_valid:
        raise ValueError(message)


def end_quietly_on_signals() -> None:
    """Ends without a traceback on Ctrl-C, or when the reader of the output has seen enough."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def use_one_thread_for_little_work(model: GPT, num_samples: int) -> None:
    """With a small model, threads wait for each other longer than they compute."""
    if model.config.n_embd * num_samples < 256:
        torch.set_num_threads(1)


class Completion:
    """A text that grows, up to and including the stop text."""

    def __init__(self, stop: str | None) -> None:
        self.stop = stop
        self.characters: list[str] = []
        self.is_finished = False

    def add(self, text: str) -> str:
        """Adds the characters up to the stop text. Returns those that were added."""
        count_before = len(self.characters)
        for character in text:
            if self.is_finished:
                break
            self.characters.append(character)
            self.is_finished = self.stop is not None and self.ends_with(self.stop)
        return "".join(self.characters[count_before:])

    def ends_with(self, text: str) -> bool:
        return "".join(self.characters[-len(text) :]) == text


def write(model: GPT, tokenizer: CharTokenizer, args: argparse.Namespace) -> None:
    """Prints the first text while it is generated, then the others, which grow at the same time.

    Raises ValueError if the model does not know a character of the prompt or of the stop text.
    """
    device = model.lm_head.weight.device
    start = tokenizer.encode(args.prompt or first_character(tokenizer)).long().to(device)  # (T,)
    tokenizer.encode(args.stop or "")
    generator = torch.Generator()
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
    limits = (args.temperature, args.top_k, args.top_p)
    prompts = start.expand(args.num_samples, -1)  # (B, T)
    new_ids = model.generate(prompts, args.max_new_tokens, *limits, generator)  # (B,) each time

    completions = [Completion(args.stop) for _ in prompts]
    steps_at_once = 1 if device.type == "cpu" else 16  # a GPU is not stopped for each character
    print(args.prompt, end="", flush=True)
    while steps := list(itertools.islice(new_ids, steps_at_once)):
        for completion, ids in zip(completions, torch.stack(steps, dim=1), strict=True):
            added = completion.add(tokenizer.decode(ids))
            if completion is completions[0]:
                print(added, end="", flush=True)
        if all(completion.is_finished for completion in completions):
            break
    print()

    for completion in completions[1:]:
        print()
        print(args.prompt + "".join(completion.characters))


def first_character(tokenizer: CharTokenizer) -> str:
    """What an empty prompt begins with, without being printed: the model has to read something."""
    return "\n" if "\n" in tokenizer.characters else tokenizer.characters[0]


if __name__ == "__main__":
    main()
