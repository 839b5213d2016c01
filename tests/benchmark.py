"""Measures this project in one run, mostly against simpler ways: `python tests/benchmark.py`.

Times vary from machine to machine and from minute to minute; the ratios say more.
"""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import GPT, Attention, CharTokenizer, GPTConfig, Linear
from train import Run, Settings


def fastest(*ways: Callable[[], object], rounds: int = 5) -> list[float]:
    """The shortest time of each way, in seconds; the ways take turns."""
    times = [[] for _ in ways]
    for _ in range(rounds):
        for way, taken in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def show(what: str, value: float, unit: str) -> None:
    """Prints a line of the table."""
    print(f"{what:60} {value:6.2f} {unit}", flush=True)


def compare(what: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 5) -> None:
    """Prints how many times as fast ours is."""
    a, b = fastest(ours, theirs, rounds=rounds)
    show(what, b / a, f"x   ({a * 1e3:.1f} ms against {b * 1e3:.1f} ms)")


def text_of(kind: str, length: int) -> str:
    """A text of so many characters: ASCII, or scripts mixed."""
    letters = "etaoin shrdlu\n"
    if kind == "mixed":
        letters += "жизнь αβγ 🪐" + "".join(map(chr, range(0x4E00, 0x5600)))
    return "".join(random.Random(0).choices(letters, k=2**20)) * (length >> 20)


def encoding() -> None:
    """Encoding a text against a dictionary and a loop over its characters."""
    for kind, length in (("ASCII", 200 << 20), ("mixed", 80 << 20)):
        text = text_of(kind, length)
        tokenizer = CharTokenizer.from_text(text)
        ids = {character: i for i, character in enumerate(tokenizer.characters)}
        short = text[: 4 << 20]
        (ours,) = fastest(lambda text=text, t=tokenizer: t.encode(text), rounds=2)
        (loop,) = fastest(lambda short=short, ids=ids: torch.tensor([ids[c] for c in short]), rounds=2)
        ratio = (loop / len(short)) / (ours / len(text))
        show(
            f"encode {kind}, {length >> 20} million characters, against a loop", ratio, f"x   ({ours:.2f} s)"
        )


def loading() -> None:
    """Loading a file of mixed scripts: time, and memory as seen from outside."""
    program = "import resource, sys, train; sys.argv[1:] and train.load_text(train.Path(sys.argv[1]))"
    program += "; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    piece, count = text_of("mixed", 1 << 20), 80
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text(piece, encoding="utf-8")
        path.write_bytes(path.read_bytes() * count)
        peaks, start = [], 0.0
        for arguments in ([], [str(path)]):
            start = time.perf_counter()
            command = [sys.executable, "-c", program, *arguments]
            done = subprocess.run(command, capture_output=True, check=True, cwd=sys.path[0])
            peaks.append(int(done.stdout) * (1 if sys.platform == "darwin" else 1024))
        each, took = (peaks[1] - peaks[0]) / (len(piece) * count), time.perf_counter() - start
    show("load a file of mixed scripts", each, f"bytes a character at the peak ({took:.1f} s)")


def training() -> None:
    """A step of training: precisions and optimizers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text(text_of("ASCII", 1 << 20))
        files = {"data": path, "model": Path(folder, "m.pth")}
        for sizes in ({}, {"n_layer": 6, "n_head": 6, "n_embd": 192, "batch_size": 32}):
            name = f"{sizes.get('n_layer', 4)} x {sizes.get('n_embd', 128)}"
            fp32, bf16, muon = (
                Run(Settings(**files, **sizes, precision=precision, optimizer=optimizer))
                for precision, optimizer in (("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "muon"))
            )
            compare(f"training step {name}: bf16 against fp32", bf16.take_step, fp32.take_step)
            compare(f"training step {name}: AdamW against Muon", fp32.take_step, muon.take_step)


def attention() -> None:
    """The fused kernel against the formula."""
    q, k, v = torch.randn(3, 24, 4, 128, 32)
    fused = Attention()
    compare(
        "attention: fused against explicit",
        lambda: fused(q, k, v),
        lambda: fused.explicit(q, k, v),
        rounds=20,
    )


def products() -> None:
    """A linear layer, whose work the cores share, against torch's."""
    layer, batch, row = Linear(384, 1536), torch.randn(12, 128, 384), torch.randn(1, 1, 384)

    def torchs(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, layer.weight, layer.bias)

    compare(
        "linear layer, a batch forward and backward: against torch's",
        lambda: layer(batch).sum().backward(),
        lambda: torchs(batch).sum().backward(),
        rounds=20,
    )
    with torch.inference_mode():
        compare("linear layer, one row: against torch's", lambda: layer(row), lambda: torchs(row), rounds=200)


@torch.inference_mode()
def recompute(model: GPT, ids: torch.Tensor, count: int) -> None:
    """Generation as it is without a cache."""
    for _ in range(count):
        logits, _ = model(ids[:, -model.config.context_length :])
        ids = torch.cat([ids, logits[:, -1].softmax(-1).multinomial(1)], dim=1)


def generating() -> None:
    """Generation with the cache: against recomputation, along the text, and in batches."""
    for sizes in ((64, 4, 4, 128), (256, 6, 6, 384)):
        model = GPT(GPTConfig(80, *sizes)).eval()
        prompt, name = torch.randint(80, (1, 31)), f"{sizes[1]} x {sizes[3]}"

        def write(rows: int = 1, count: int = 300, model: GPT = model, prompt: torch.Tensor = prompt) -> None:
            for _ in model.generate(prompt.expand(rows, -1), count):
                pass

        again = partial(recompute, model, prompt, 300)
        compare(f"generate {name}: cache against recomputation", write, again, rounds=2)
        one, sixteen, long = fastest(write, partial(write, 16), partial(write, count=2000), rounds=3)
        show(
            f"generate {name}: 16 samples against one", 16 * one / sixteen, f"x   ({300 / one:.0f}/s for one)"
        )
        show(f"generate {name}: each of 2,000 characters against 300", (one / 300) / (long / 2000), "x")


def main() -> None:
    """Runs all."""
    processor = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {processor}")
    loading()  # first: a child's peak begins at its parent's
    for part in (attention, products, generating, training, encoding):
        part()


if __name__ == "__main__":
    main()
