"""Continues a prompt with the trained model, or shows how the model reads a text.

    python inference.py                        continue the prompt below
    python inference.py --interactive          continue one prompt after another
    python inference.py --score "It was dark"  show how likely each character is

Standard output gets the result and nothing else.
"""

import argparse
import io
import itertools
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from model import (
    GPT,
    MODEL_PATH,
    ROOT,
    CharTokenizer,
    InputError,
    default_device,
    is_out_of_memory,
    load_model,
    prepare_output,
    read_text,
    user_path,
    visible,
    with_hyphens,
)

prompt = "The machine stood in the middle of the"  # edit this

LARGEST_INTEGER = 2**31
LARGEST_SEED = 2**63
REMEMBERED = Path()  # --check-copied without a FILE
USAGE = """python inference.py [--FLAG VALUE ...]
       write a VALUE that begins with - after an equals sign: --prompt=--Come!"""


def main() -> None:
    prepare_output()
    args = parse_arguments()
    end_quietly_on_signals()
    try:
        model, tokenizer, metadata = load_model(args.model, args.device)
        tokenizer.encode(args.stop or "")  # raises InputError if a character is unknown
        use_one_thread_for_little_work(model, args.num_samples)
        training_text = None
        if args.check_copied is not None:
            training_text = find_training_text(args, metadata)

        if args.score is not None:
            text = standard_input().read() if args.score == "-" else args.score
            show_score(model, tokenizer, text)
        elif args.interactive:
            complete_lines(model, tokenizer, args, training_text)
        else:
            complete(model, tokenizer, args.prompt, args, training_text)
    except FileNotFoundError:
        sys.exit(f"error: there is no model {args.model}: train one with python train.py")
    except (OSError, InputError) as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(
            "error: out of memory: lower --num-samples or --max-new-tokens, or score a shorter text"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description="Continues a prompt with the trained model, or shows how it reads a text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=user_path, default=MODEL_PATH, help="the file that train.py has saved")
    add("--prompt", default=prompt, help="what the text begins with")
    add("--max-new-tokens", type=int, default=500, help="characters to add")
    add("--temperature", type=float, default=0.8, help="0: the likeliest; higher: more varied")
    add("--top-k", type=int, help="draw only from the k likeliest characters")
    add("--top-p", type=float, help="draw only from the likeliest that together reach p")
    add("--stop", help="end a text after this has been written")
    add("--seed", type=int, help="makes the text the same each time")
    add("--num-samples", type=int, default=1, help="texts to write, with a blank line between")
    add("--device", default=default_device(), help="cpu, cuda or mps")
    add(
        "--check-copied",
        type=user_path,
        nargs="?",
        const=REMEMBERED,
        metavar="FILE",
        help="say how much of the text occurs in the training text, FILE if it has been moved",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--interactive", action="store_true", help="continue each line of standard input"
    )
    modes.add_argument(
        "--score",
        metavar="TEXT",
        help="show how likely each character of TEXT is; -: of standard input",
    )
    args = parser.parse_args([with_hyphens(argument) for argument in sys.argv[1:]])
    try:
        check_arguments(args)
    except InputError as error:
        parser.error(str(error))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raises InputError if a value is out of range or the device cannot be used."""
    check(0 <= args.max_new_tokens < LARGEST_INTEGER, "--max-new-tokens must be 0 or more")
    check(0 <= args.temperature < math.inf, "--temperature must be 0 or more")
    check(args.top_k is None or 1 <= args.top_k < LARGEST_INTEGER, "--top-k must be 1 or more")
    check(args.top_p is None or 0 < args.top_p <= 1, "--top-p must be above 0 and at most 1")
    check(args.stop != "", "--stop must not be empty")
    check(args.seed is None or 0 <= args.seed < LARGEST_SEED, "--seed must be from 0 to 2^63 - 1")
    check(1 <= args.num_samples < 2**16, "--num-samples must be from 1 to 65535")
    if args.score is not None:
        check(args.check_copied is None, "--check-copied needs a generated text, not --score")
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device} cannot be used here: try cpu") from error


def check(is_valid: bool, message: str) -> None:
    if not is_valid:
        raise InputError(message)


def end_quietly_on_signals() -> None:
    """Ends without a traceback on Ctrl-C, or when the reader of the output has seen enough."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def use_one_thread_for_little_work(model: GPT, num_samples: int) -> None:
    """With a small model, threads gain little, and lose much beside another program."""
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

    @property
    def text(self) -> str:
        return "".join(self.characters)


def complete(
    model: GPT,
    tokenizer: CharTokenizer,
    beginning: str,
    args: argparse.Namespace,
    training_text: str | None,
) -> None:
    """Prints the first text while it is generated, then the others, which grow at the same time.

    Raises InputError if the model does not know a character of the prompt.
    """
    device = model.lm_head.weight.device
    start = tokenizer.encode(beginning or first_character(tokenizer)).long().to(device)  # (T,)
    generator = torch.Generator()
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)
    prompts = start.expand(args.num_samples, -1)  # (B, T)
    new_ids = model.generate(
        prompts, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator
    )  # yields (B,), the next character of each text

    completions = [Completion(args.stop) for _ in prompts]
    # Reading a result makes the CPU wait for the GPU: there, 16 steps are read at once.
    steps_at_once = 1 if device.type == "cpu" else 16
    print(beginning, end="", flush=True)
    while steps := list(itertools.islice(new_ids, steps_at_once)):
        for completion, ids in zip(completions, torch.stack(steps, dim=1), strict=True):
            added = completion.add(tokenizer.decode(ids))
            if completion is completions[0]:
                print(added, end="", flush=True)
        if all(completion.is_finished for completion in completions):
            break
    print(flush=True)

    for completion in completions[1:]:
        print()
        print(beginning + completion.text, flush=True)
    if training_text is not None:
        report_copied([completion.text for completion in completions], training_text)


def first_character(tokenizer: CharTokenizer) -> str:
    """What an empty prompt begins with, without being printed: the model has to read something."""
    return "\n" if "\n" in tokenizer.characters else tokenizer.characters[0]


def standard_input() -> TextIO:
    """Returns standard input as UTF-8; what is not UTF-8 becomes characters that are unknown."""
    if sys.stdin is None:
        raise InputError("standard input is closed")
    # utf-8-sig leaves out a byte order mark, and only \n ends a line.
    return io.TextIOWrapper(sys.stdin.buffer, "utf-8-sig", "surrogateescape", newline="\n")


# --interactive


def complete_lines(
    model: GPT, tokenizer: CharTokenizer, args: argparse.Namespace, training_text: str | None
) -> None:
    """Continues each line of standard input. Ctrl-C stops a text, the end of input the session."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # raises KeyboardInterrupt
    lines = standard_input()
    while True:
        try:
            if lines.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = lines.readline()
            if not line:
                return
            complete(model, tokenizer, line.rstrip("\r\n"), args, training_text)
        except KeyboardInterrupt:
            print(flush=True)
        except InputError as error:  # an unknown character
            print(f"error: {error}", file=sys.stderr)


# --score


def show_score(model: GPT, tokenizer: CharTokenizer, text: str) -> None:
    """Prints how likely the model finds each character of a text but the first.

    Raises InputError if the text is shorter than two characters or one of them is unknown.
    """
    if len(text) < 2:
        raise InputError("--score needs at least two characters: the first is only read")
    ids = tokenizer.encode(text).long().to(model.lm_head.weight.device)  # (T,)
    log_probs = read_logits(model, ids).log_softmax(dim=-1)  # (T, V)
    # Row t holds the probabilities of character t + 1.
    losses = -log_probs[:-1].gather(1, ids[1:, None]).flatten()  # (T - 1,), in nats

    print("character  probability   bits  likeliest")
    for character, loss, row in zip(text[1:], losses.tolist(), log_probs[:-1], strict=True):
        bits = loss / math.log(2)
        shown = colored(f"{visible(character):<9}", bits)
        print(f"{shown}  {math.exp(-loss):11.2%}  {bits:5.2f}  {likeliest(tokenizer, row, 3)}")
    print(f"next: {likeliest(tokenizer, log_probs[-1], 5)}")

    loss = losses.mean()
    # Perplexity, exp(loss): as uncertain as between so many characters that are equally likely.
    print(
        f"loss {loss:.3f} nats, {loss / math.log(2):.2f} bits/char, "
        f"perplexity {loss.exp():.2f} over {len(losses)} characters",
        flush=True,
    )


@torch.no_grad()
def read_logits(model: GPT, ids: Tensor) -> Tensor:
    """Computes the scores of what follows each character of a text, `(T,)` to `(T, V)`.

    A text that is longer than the context is read in windows that overlap by half, so that the
    model sees at least half a context before each character. With a context of 8 these are the
    characters 0 to 7, then 4 to 11, of which 8 to 11 are new, and so on.
    """
    context_length = model.config.context_length
    step = max(1, context_length // 2)
    logits, _ = model(ids[None, :context_length])
    parts = [logits[0]]
    for end in range(context_length + step, len(ids) + step, step):
        window = ids[None, end - context_length : end]  # the last one may be shorter
        logits, _ = model(window)
        parts.append(logits[0, context_length - step :])  # of the characters not read before
    return torch.cat(parts)


def likeliest(tokenizer: CharTokenizer, log_probs: Tensor, count: int) -> str:
    """Returns the likeliest characters with their probabilities, given the logarithms, `(V,)`."""
    count = min(count, tokenizer.vocab_size)
    probs, ids = log_probs.exp().topk(count)
    pairs = zip(tokenizer.decode(ids), probs.tolist(), strict=True)
    return "  ".join(f"{visible(character)} {prob:.0%}" for character, prob in pairs)


GREEN, YELLOW, RED = 32, 33, 31  # of terminals: https://en.wikipedia.org/wiki/ANSI_escape_code


def colored(text: str, bits: float) -> str:
    """Colors a text on a terminal by how surprising it is."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    if not is_terminal or os.environ.get("NO_COLOR"):  # https://no-color.org
        return text
    color = GREEN
    if bits >= 1:
        color = YELLOW
    if bits >= 4:
        color = RED
    return f"\033[{color}m{text}\033[0m"


# --check-copied


def find_training_text(args: argparse.Namespace, metadata: dict[str, Any]) -> str:
    """Reads the file that is named, or the one that the model remembers, if it is unchanged."""
    advice = "name it with --check-copied FILE"
    if args.check_copied is not REMEMBERED:
        if not args.check_copied.exists():
            raise InputError(f"there is no file {args.check_copied}: {advice}")
        text, _ = read_text(args.check_copied)
        return text
    if "text" not in metadata or "text_digest" not in metadata:
        raise InputError(f"{args.model} does not say which text it has learned from: {advice}")
    path = ROOT / metadata["text"]
    if not path.exists():
        raise InputError(f"the training text {path} is not found: {advice}")
    text, digest = read_text(path)
    if digest != metadata["text_digest"]:
        raise InputError(f"{path} is not what the model has learned from: {advice}")
    return text


def report_copied(texts: list[str], training_text: str) -> None:
    longest = max((longest_copied(text, training_text) for text in texts), key=len)
    print(f"longest copied stretch: {len(longest)} characters: {longest!r}", file=sys.stderr)


def longest_copied(text: str, training_text: str) -> str:
    """Returns the longest part of a text that occurs in the training text, the first of several."""
    longest = ""
    for start in range(len(text)):
        end = start + len(longest) + 1  # only something longer is of interest
        while end <= len(text) and text[start:end] in training_text:
            longest = text[start:end]
            end += 1
    return longest


if __name__ == "__main__":
    main()
