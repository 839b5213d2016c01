"""Measures speed and prints ratios, all from one run.

    python tests/benchmark.py
    OMP_NUM_THREADS=1 python tests/benchmark.py     the same with one thread

Times differ between machines and from minute to minute; the ratios say more.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import GPT, sample
from train import SAMPLE, Settings, Trainer

FOLDER = tempfile.TemporaryDirectory()
MODEL = Path(FOLDER.name) / "benchmark.pth"

SIZES = {
    "default sizes": {},
    "6 x 192": {"n_layer": 6, "n_head": 6, "n_embd": 192, "batch_size": 32},
}


def median_times(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median time of each way, in seconds, after a first call that is not counted.

    The ways take turns, so that a slow minute of the machine meets all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(title: str, ways: dict[str, Callable[[], object]], rounds: int) -> None:
    """Prints the time of each way, and how many times as fast the first way is."""
    times = median_times(ways, rounds)
    first = next(iter(times.values()))
    print(title)
    for name, seconds in times.items():
        print(f"    {name:24} {seconds * 1000:9.1f} ms {seconds / first:6.2f}", flush=True)


# Training


def make_step(**settings: object) -> Callable[[], object]:
    trainer = Trainer(Settings(data=SAMPLE, model=MODEL, **settings))

    def step() -> float:
        return trainer.train_step().item()  # waits for a GPU

    return step


def compare_steps(title: str, sizes: dict[str, int]) -> None:
    ways = {
        "fp32, Muon": make_step(precision="fp32", **sizes),
        "fp32, AdamW": make_step(precision="fp32", optimizer="adamw", **sizes),
        "bf16, Muon": make_step(precision="bf16", **sizes),
        "bf16, Muon, compiled": make_step(precision="bf16", compile=True, **sizes),
    }
    compare(f"a training step, {title}", ways, rounds=15)


# Generation


@torch.no_grad()
def generate_without_a_cache(model: GPT, ids: Tensor, count: int) -> None:
    for _ in range(count):
        logits, _ = model(ids[:, -model.config.context_length :])
        ids = torch.cat([ids, sample(logits[:, -1])[:, None]], dim=1)


def compare_generation(title: str, sizes: dict[str, int]) -> None:
    trainer = Trainer(Settings(data=SAMPLE, model=MODEL, **sizes))
    model = trainer.model.eval()
    one = trainer.val_ids[None, :31].to(trainer.device)
    ways = {
        "1 text": lambda: list(model.generate(one, 500)),
        "1 text without a cache": lambda: generate_without_a_cache(model, one, 500),
        "16 texts at once": lambda: list(model.generate(one.expand(16, -1), 500)),
    }
    compare(f"500 characters, {title}", ways, rounds=3)


# Starting


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)


def compare_starts() -> None:
    short_run = ["--steps=1", "--tracker=none", f"--model={MODEL}", f"--data={SAMPLE}"]
    run("train.py", *short_run)
    ways = {
        "import torch": lambda: run("-c", "import torch"),
        "inference.py": lambda: run("inference.py", f"--model={MODEL}"),
        "show_params.py": lambda: run("show_params.py", f"--model={MODEL}"),
        "train.py, one step": lambda: run("train.py", *short_run),
    }
    compare("a whole process", ways, rounds=3)


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    for title, sizes in SIZES.items():
        compare_steps(title, sizes)
        compare_generation(title, sizes)
    compare_starts()
