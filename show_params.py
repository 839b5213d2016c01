"""Shows what a trained model is made of: every parameter tensor, the total, its sizes, when it was saved."""

import argparse
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from model import GPT, load_model


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"error: {message}\n")


def show(model: GPT, facts: dict[str, Any]) -> None:
    """Prints the table."""
    tensors = [(name, tuple(p.shape), p.numel()) for name, p in model.named_parameters()]
    wide = max(len(name) for name, _, _ in tensors)
    print(f"{'parameter':{wide}}  {'shape':>14}  {'count':>12}")
    for name, shape, count in tensors:
        print(f"{name:{wide}}  {shape!s:>14}  {count:12,}")
    print(f"{'total':{wide}}  {'':14}  {sum(count for _, _, count in tensors):12,}")
    print()
    for name, value in {**asdict(model.config), **facts}.items():
        if isinstance(value, int | float):  # a checkpoint holds more, for --resume
            print(f"{name:{wide}}  {value:.10g}")
    print(end="", flush=True)  # a full disk is found out here


def main() -> None:
    """Shows what the command line asks for."""
    parser = _Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    trained = Path(__file__).resolve().parent / "models/model-scifi.pth"
    parser.add_argument("--model", type=Path, default=trained, help="what train.py has saved")
    args = parser.parse_args()
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGINT), signal.SIG_DFL)  # a reader may stop early
    try:
        model, _, facts = load_model(args.model)
        show(model, facts)
    except FileNotFoundError:
        sys.exit(f"error: there is no model {args.model}: train one with python train.py")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
