"""Continues a prompt with the trained model, or shows how the model reads a text.

    python inference.py                        continue the prompt below
    python inference.py --interactive          continue one prompt after another
    python inference.py --score "It was dark"  show how likely each character is
    python inference.py --attention FILE.png   draw what each head looks at in the prompt

Standard output gets the result and nothing else.
"""

import argparse
import math
import os
import sys
import unicodedata
from pathlib import Path

import torch
from torch import Tensor

from model import (
    GPT,
    MODEL_PATH,
    CharTokenizer,
    InputError,
    find_device,
    load_model,
    use_utf8,
    visible,
)

prompt = "The machine stood in the middle of the"  # edit this


def main() -> None:
    use_utf8()
    args = parse_arguments()
    try:
        device = find_device(args.device)
        model, tokenizer, _ = load_model(args.model, device)
        text = args.prompt if args.score is None else args.score
        if args.attention is not None:
            draw_attention(model, tokenizer, text, args.attention)
        if args.score is not None:
            show_score(model, tokenizer, text)
        elif args.interactive:
            complete_lines(model, tokenizer, args)
        elif args.attention is None:
            complete(model, tokenizer, text, args)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports an end by Ctrl-C
    except BrokenPipeError:  # for example from head, which reads only the beginning
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except InputError as error:
        sys.exit(f"error: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python inference.py [--FLAG VALUE ...]",
        description="Continues a prompt with the trained model, or shows how it reads a text.",
        epilog="Write a VALUE that begins with - after an equals sign: --prompt=--Come!",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, default=MODEL_PATH, help="the file that train.py has saved")
    add("--prompt", default=prompt, help="what the text begins with")
    add("--max-new-tokens", type=int, default=500, help="characters to add")
    add("--temperature", type=float, default=0.8, help="0: the likeliest; higher: more varied")
    add("--top-k", type=int, help="draw only from the k likeliest characters")
    add("--top-p", type=float, help="draw only from the likeliest that together reach p")
    add("--stop", help="end a text once it ends with this")
    add("--seed", type=int, help="makes the texts the same each time")
    add("--num-samples", type=int, default=1, help="texts to write, with a blank line between")
    add("--device", default="auto", help="cpu, cuda or mps; auto is a GPU if there is one")
    add("--attention", type=Path, metavar="FILE.png", help="draw what each head looks at")
    add_exclusive = parser.add_mutually_exclusive_group().add_argument
    add_exclusive("--interactive", action="store_true", help="continue each line of standard input")
    add_exclusive("--score", metavar="TEXT", help="show how likely each character of TEXT is")

    args = parser.parse_args()
    if args.max_new_tokens < 0:
        parser.error("--max-new-tokens must be at least 0")
    if not (args.temperature == 0 or args.temperature >= 1e-9):  # also if it is nan
        parser.error("--temperature must be 0 or at least 1e-9")
    if args.top_k is not None and args.top_k < 1:
        parser.error("--top-k must be at least 1")
    if args.top_p is not None and not 1e-9 <= args.top_p <= 1:
        parser.error("--top-p must be at least 1e-9 and at most 1")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.error("--seed must be at least 0 and less than 2^63")
    if args.num_samples < 1:
        parser.error("--num-samples must be at least 1")
    return args


def encode(model: GPT, tokenizer: CharTokenizer, text: str) -> Tensor:
    """Returns the ids, `(T,)`, on the model's device. Raises InputError for unknown characters."""
    text = unicodedata.normalize("NFC", text)  # composed letters, as `read_text` makes them
    return tokenizer.encode(text).to(model.lm_head.weight.device)


# ---- Generating ------------------------------------------------------------------------


def complete(model: GPT, tokenizer: CharTokenizer, text: str, args: argparse.Namespace) -> None:
    """Prints the continuations of a text while they are generated."""
    # The model has to read something. In most texts the first known character is the line break.
    ids = encode(model, tokenizer, text or tokenizer.characters[0])  # (T,)
    if args.seed is not None:
        torch.manual_seed(args.seed)

    for i in range(args.num_samples):
        if i > 0:
            print()
        print(text, end="", flush=True)
        continuation = ""
        new_ids = model.generate(
            ids[None], args.max_new_tokens, args.temperature, args.top_k, args.top_p
        )
        for next_id in new_ids:  # (1,)
            character = tokenizer.decode(next_id)
            print(character, end="", flush=True)
            continuation += character
            if args.stop and continuation.endswith(args.stop):
                break
        print()


def complete_lines(model: GPT, tokenizer: CharTokenizer, args: argparse.Namespace) -> None:
    """Continues each line of standard input. Ctrl-C stops a text, the end of input the session."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
            complete(model, tokenizer, line.rstrip("\r"), args)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        except InputError as error:  # an unknown character
            print(f"error: {error}", file=sys.stderr)


# ---- Looking inside --------------------------------------------------------------------


def show_score(model: GPT, tokenizer: CharTokenizer, text: str) -> None:
    """Prints how likely the model finds each character of a text but the first."""
    ids = encode(model, tokenizer, text)  # (T,)
    if len(ids) < 2:
        raise InputError("--score needs at least two characters: the first is only read")
    log_probs = read_logits(model, ids).log_softmax(dim=-1)  # (T, V)

    print("character  probability   bits  likeliest")
    losses = []
    for t, character in enumerate(tokenizer.decode(ids[1:])):
        predicted = log_probs[t]  # (V,), for character t + 1
        loss = -predicted[ids[t + 1]].item()  # in nats
        losses.append(loss)
        name = visible(character)
        probability = math.exp(-loss)
        bits = loss / math.log(2)
        best = likeliest(tokenizer, predicted, 3)
        print(f"{name:<9}  {probability:11.2%}  {bits:5.2f}  {best}")
    print(f"next: {likeliest(tokenizer, log_probs[-1], 5)}")

    loss = sum(losses) / len(losses)
    bits = loss / math.log(2)
    # The model is as uncertain as in a choice among this many equally likely characters.
    perplexity = math.exp(loss)
    print(
        f"loss {loss:.3f} nats, {bits:.2f} bits/char, "
        f"perplexity {perplexity:.2f} over {len(losses)} characters"
    )


@torch.no_grad()
def read_logits(model: GPT, ids: Tensor) -> Tensor:
    """Computes the scores of what follows each character of a text, `(T,)` to `(T, V)`.

    A text longer than the context is read in windows that overlap by half: with a context of 8,
    the characters 0 to 7, then 4 to 11, of which 8 to 11 are new, and so on.
    """
    context_length = model.config.context_length
    step = max(1, context_length // 2)
    logits, _ = model(ids[None, :context_length])
    parts = [logits[0]]
    for start in range(step, len(ids) - context_length + step, step):
        window = ids[None, start : start + context_length]  # the last one may be shorter
        logits, _ = model(window)
        parts.append(logits[0, context_length - step :])  # of the characters not read before
    return torch.cat(parts)


def likeliest(tokenizer: CharTokenizer, log_probs: Tensor, count: int) -> str:
    """Returns the likeliest characters with their probabilities, given the logarithms, `(V,)`."""
    probs, ids = log_probs.exp().topk(min(count, tokenizer.vocab_size))
    pairs = zip(tokenizer.decode(ids), probs.tolist(), strict=True)
    return "  ".join(f"{visible(character)} {prob:.0%}" for character, prob in pairs)


LONGEST_PICTURE = 40  # characters that can still be told apart


@torch.no_grad()
def attention_weights(model: GPT, ids: Tensor) -> list[Tensor]:
    """Returns the attention weights of each block, `(H, T, T)`, for a text of ids, `(T,)`."""
    weights = []

    def keep_weights(attention, inputs, output) -> None:
        q, k, _ = inputs
        weights.append(attention.weights(q, k)[0])

    hooks = [
        block.attention.scaled_dot_product.register_forward_hook(keep_weights)
        for block in model.blocks
    ]
    model(ids[None])
    for hook in hooks:
        hook.remove()
    return weights


def draw_attention(model: GPT, tokenizer: CharTokenizer, text: str, path: Path) -> None:
    """Draws the attention weights for a text: a row for each block, a column for each head."""
    from matplotlib.figure import Figure  # imported here: it is slow to import

    ids = encode(model, tokenizer, text)
    longest = min(LONGEST_PICTURE, model.config.context_length)
    if not 1 <= len(ids) <= longest:
        raise InputError(f"--attention draws 1 to {longest} characters, and not {len(ids)}")
    characters = ["␣" if c == " " else visible(c) for c in tokenizer.decode(ids)]
    places = range(len(ids))

    weights = attention_weights(model, ids)
    rows = len(weights)
    columns = model.config.n_head
    figure = Figure(figsize=(4 * columns, 4 * rows + 1), layout="constrained")
    figure.suptitle("Row by row: what a character takes from each (white: nothing, dark: all)")
    for block, heads in enumerate(weights):
        for head, square in enumerate(heads):
            axes = figure.add_subplot(rows, columns, block * columns + head + 1)
            axes.imshow(square.cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"block {block}, head {head}")
            axes.set_xticks(places, characters, fontsize=7)
            axes.set_yticks(places, characters, fontsize=7)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: an ending that stands for no picture
        raise InputError(f"--attention {path}: {error}") from error


if __name__ == "__main__":
    main()
