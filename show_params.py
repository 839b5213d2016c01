"""Shows what a trained model consists of: every parameter tensor, their total, and its settings."""

import argparse
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model import GPT, MODEL_PATH, load_model


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python show_params.py [--model FILE]",
        description="Shows the parameters of a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, default=MODEL_PATH, help="the file that train.py has saved"
    )
    args = parser.parse_args()
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader of the output may stop early
    try:
        model, _, metadata = load_model(args.model)
        show(model, metadata)
    except FileNotFoundError:
        sys.exit(f"error: there is no model {args.model}: train one with python train.py")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def show(model: GPT, metadata: dict[str, Any]) -> None:
    parameters = dict(model.named_parameters())
    width = max(len(name) for name in parameters)

    print(f"{'parameter':{width}}  {'shape':>14}  {'count':>12}")
    for name, p in parameters.items():
        print(f"{name:{width}}  {tuple(p.shape)!s:>14}  {p.numel():12,}")
    print(f"{'total':{width}}  {'':14}  {model.config.parameter_count:12,}")

    print()
    for name, value in {**asdict(model.config), **metadata}.items():
        if isinstance(value, int | float):  # a checkpoint has more, for --resume
            print(f"{name:{width}}  {value:.10g}")
    print(end="", flush=True)  # raises OSError now if the disk is full


if __name__ == "__main__":
    main()
