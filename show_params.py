"""Shows what a trained model consists of: every parameter tensor and its meaning."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model import GPT, MODEL_PATH, CharTokenizer, InputError, load_model, use_utf8, visible

# What each kind of tensor does, by the end of its name.
MEANINGS = {
    "token_embedding.weight": "a vector for each character",
    "norm.weight": "scales each channel of a vector after it was normalized",
    "norm.bias": "shifts each channel of a vector after it was normalized",
    "attention.qkv.weight": "computes a query, a key and a value from each vector",
    "attention.qkv.bias": "is added to the queries, keys and values",
    "attention.output.weight": "mixes what the heads found",
    "attention.output.bias": "is added to the mixture",
    "feed_forward.expand.weight": "detects 4 C patterns in each vector of C channels",
    "feed_forward.expand.bias": "sets how easily each pattern is detected",
    "feed_forward.contract.weight": "turns the patterns found into a change of the vector",
    "feed_forward.contract.bias": "is added to the change",
    "lm_head.weight": "compares a vector with each character: the scores of what comes next",
}


def main() -> None:
    use_utf8()
    parser = argparse.ArgumentParser(
        usage="python show_params.py [--model FILE]",
        description="Shows the parameters of a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, default=MODEL_PATH, help="the file that train.py has saved"
    )
    args = parser.parse_args()
    try:
        model, tokenizer, metadata = load_model(args.model)
        show_parameters(model)
        show_meanings(model)
        show_settings(model, tokenizer, metadata)
    except BrokenPipeError:  # for example from head, which reads only the beginning
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except InputError as error:
        sys.exit(f"error: {error}")


def show_parameters(model: GPT) -> None:
    parameters = dict(model.named_parameters())
    width = max(len(name) for name in parameters)
    print(f"{'parameter':{width}}  {'shape':>14}  {'count':>12}  {'mean':>8}  {'std':>8}")
    for name, p in parameters.items():
        mean, std = p.mean().item(), p.std(correction=0).item()  # 0: divide by n, not n - 1
        print(f"{name:{width}}  {tuple(p.shape)!s:>14}  {p.numel():12,}  {mean:8.4f}  {std:8.4f}")
    print(f"{'total':{width}}  {'':14}  {model.count_parameters():12,}")


def show_meanings(model: GPT) -> None:
    names = [name for name, _ in model.named_parameters()]
    print()
    for ending, meaning in MEANINGS.items():
        if any(name.endswith(ending) for name in names):
            print(f"{ending}: {meaning}")


def show_settings(model: GPT, tokenizer: CharTokenizer, metadata: dict[str, Any]) -> None:
    print()
    for name, value in asdict(model.config).items():
        print(f"{name}: {value}")
    print(f"step: {metadata.get('step')}")
    print("known characters:", *map(visible, tokenizer.characters))


if __name__ == "__main__":
    main()
