"""Measures what the README and the comments say about speed and memory, in one run.

    python tests/benchmark.py
    OMP_NUM_THREADS=1 python tests/benchmark.py     the same with one thread

Each line compares two ways of computing the same; the number says how many times as fast the
first is. Times differ between machines and from minute to minute; the ratios say more.
"""

import copy
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import GPT, Attention, CharTokenizer, GPTConfig, Linear, read_text  # noqa: E402
from train import Settings, Trainer  # noqa: E402

MILLION = 2**20  # characters
LABEL_WIDTH = 64

# ----------------------------------------------------------------------------------------
# Measuring and printing
# ----------------------------------------------------------------------------------------


def shortest_times(*ways: Callable[[], object], rounds: int) -> list[float]:
    """Returns the shortest time of each way, in seconds.

    The ways take turns, so that a slow minute of the machine meets all of them. What disturbs
    a measurement makes it longer, never shorter.
    """
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, times_of_way in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            times_of_way.append(time.perf_counter() - start)
    return [min(times_of_way) for times_of_way in times]


def print_row(label: str, value: float, rest: str) -> None:
    print(f"{label:{LABEL_WIDTH}} {value:6.2f} {rest}", flush=True)


def compare(
    label: str, first: Callable[[], object], second: Callable[[], object], rounds: int
) -> None:
    """Prints how many times as fast the first way is."""
    first_time, second_time = shortest_times(first, second, rounds=rounds)
    times = f"({first_time * 1e3:.3g} ms against {second_time * 1e3:.3g} ms)"
    print_row(label, second_time / first_time, f"x   {times}")


# ----------------------------------------------------------------------------------------
# What is measured
# ----------------------------------------------------------------------------------------


def random_piece(kind: str) -> str:
    """Returns a text of a million characters, "ASCII" or "mixed" scripts."""
    characters = "etaoin shrdlu\n"
    if kind == "mixed":
        chinese = "".join(chr(code_point) for code_point in range(0x4E00, 0x5600))
        characters += "жизнь αβγ 🪐" + chinese
    return "".join(random.Random(0).choices(characters, k=MILLION))


def use_torchs_linear(model: nn.Module) -> None:
    """Makes each Linear of a model an nn.Linear with the same weights."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear


def with_torchs_linear(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    use_torchs_linear(model)
    return model


# Text


def measure_loading() -> None:
    """Compares the peak memory of two processes, one of which reads and encodes a file."""
    millions = 80
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "text.txt")
        piece = random_piece("mixed").encode()
        with open(path, "wb") as file:
            for _ in range(millions):
                file.write(piece)
        before = peak_memory_of_a_process("import only", path)
        start = time.perf_counter()
        after = peak_memory_of_a_process("load", path)
        seconds = time.perf_counter() - start
    label = "loading a file of mixed scripts, peak memory"
    print_row(
        label, (after - before) / (millions * MILLION), f"bytes a character ({seconds:.1f} s)"
    )


def peak_memory_of_a_process(task: str, path: Path) -> int:
    """Runs this file in a process of its own. Returns the bytes of memory that it took at most."""
    command = [sys.executable, __file__, task, str(path)]
    done = subprocess.run(command, capture_output=True, check=True)
    return int(done.stdout)


def print_peak_memory(task: str, path: Path) -> None:
    """What such a process does."""
    import resource  # not on Windows

    if task == "load":
        text, _ = read_text(path)
        CharTokenizer.from_text(text).encode(text)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    print(peak * unit)


def measure_encoding() -> None:
    """Compares encoding with a dictionary and a loop, which get a part of the text."""
    for kind, millions in (("ASCII", 200), ("mixed", 80)):
        piece = random_piece(kind)
        text, part = millions * piece, 4 * piece
        tokenizer = CharTokenizer.from_text(part)
        time_of_text, time_of_part = encoding_times(tokenizer, text, part)
        ratio = (time_of_part / len(part)) / (time_of_text / len(text))
        label = f"encoding {millions} million characters, {kind}: against a loop"
        print_row(label, ratio, f"x   ({time_of_text:.2f} s)")


def encoding_times(tokenizer: CharTokenizer, text: str, part: str) -> list[float]:
    id_of = {character: i for i, character in enumerate(tokenizer.characters)}

    def encode_with_a_loop() -> Tensor:
        return torch.tensor([id_of[character] for character in part])

    return shortest_times(lambda: tokenizer.encode(text), encode_with_a_loop, rounds=2)


# Attention and linear layers


def measure_attention() -> None:
    attention = Attention()
    q, k, v = torch.randn(3, 24, 4, 128, 32)  # (B, H, T, D) each
    compare(
        "attention, 24 x 4 heads x 128 x 32: kernel against formula",
        lambda: attention(q, k, v),
        lambda: attention.weights(q, k) @ v,
        rounds=20,
    )


@mock.patch("model.TORCH_DIVIDES_WELL", False)  # measure it on any processor
def measure_many_rows() -> None:
    """Compares a layer forward and backward, as in training."""
    for batch_size, context_length, channels in ((24, 128, 128), (32, 128, 192), (12, 128, 384)):
        x = torch.randn(batch_size, context_length, channels, requires_grad=True)
        layer = Linear(channels, 4 * channels)
        torchs_layer = with_torchs_linear(layer)
        compare(
            f"layer {channels} to {4 * channels}, {batch_size * context_length} rows, "
            "with gradients: against nn.Linear",
            lambda layer=layer, x=x: layer(x).sum().backward(),
            lambda layer=torchs_layer, x=x: layer(x).sum().backward(),
            rounds=40,
        )


@mock.patch("model.TORCH_DIVIDES_WELL", False)
@torch.inference_mode()
def measure_few_rows() -> None:
    """Compares a layer without gradients, as in generation."""
    for rows in (1, 16):
        x = torch.randn(rows, 1, 384)
        layer = Linear(384, 1536)
        torchs_layer = with_torchs_linear(layer)
        compare(
            f"layer 384 to 1536, {rows} rows: against nn.Linear",
            lambda layer=layer, x=x: layer(x),
            lambda layer=torchs_layer, x=x: layer(x),
            rounds=500,
        )


# Training

SHAPES = {
    "4 x 128": {},  # the default
    "6 x 192": {"n_layer": 6, "n_head": 6, "n_embd": 192, "batch_size": 32},
}


def measure_training_steps() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "text.txt")
        path.write_text(random_piece("ASCII"), encoding="utf-8")
        for shape, sizes in SHAPES.items():
            compare_training_steps(shape, path, sizes)


def compare_training_steps(shape: str, path: Path, sizes: dict[str, int]) -> None:
    """Compares whole steps: data, forward, backward and optimizers."""

    def new_trainer(precision: str, optimizer: str) -> Trainer:
        settings = Settings(
            data=path,
            model=path.with_name("model.pth"),
            device="cpu",
            tracker="none",
            precision=precision,
            optimizer=optimizer,
            **sizes,
        )
        return Trainer(settings)

    muon = new_trainer("fp32", "muon")
    torchs_linear = new_trainer("fp32", "muon")
    use_torchs_linear(torchs_linear.model)
    compare(
        f"training step {shape}, fp32: Linear against nn.Linear",
        muon.train_step,
        torchs_linear.train_step,
        rounds=12,
    )
    compare(
        f"training step {shape}: bf16 against fp32",
        new_trainer("bf16", "muon").train_step,
        muon.train_step,
        rounds=6,
    )
    compare(
        f"training step {shape}, fp32: AdamW against Muon",
        new_trainer("fp32", "adamw").train_step,
        muon.train_step,
        rounds=6,
    )


# Generation


def write(model: GPT, prompt: Tensor, count: int) -> None:
    for _ in model.generate(prompt, count):
        pass


@torch.inference_mode()
def write_without_a_cache(model: GPT, prompt: Tensor, count: int) -> None:
    """Reads everything again for each character."""
    ids = prompt
    for _ in range(count):
        logits, _ = model(ids[:, -model.config.context_length :])
        next_ids = logits[:, -1].softmax(dim=-1).multinomial(1)  # (B, 1)
        ids = torch.cat([ids, next_ids], dim=1)


def measure_generation() -> None:
    compare_generation("4 x 128", context_length=64, n_layer=4, n_head=4, n_embd=128)
    compare_generation("6 x 384", context_length=256, n_layer=6, n_head=6, n_embd=384)


def compare_generation(shape: str, **sizes: Any) -> None:
    model = GPT(GPTConfig(vocab_size=80, **sizes)).eval()
    torchs_linear = with_torchs_linear(model)
    prompt = torch.randint(80, (1, 31))
    prompts = prompt.expand(16, -1)

    compare(
        f"generating {shape}: Linear against nn.Linear",
        lambda: write(model, prompt, 300),
        lambda: write(torchs_linear, prompt, 300),
        rounds=5,
    )
    compare(
        f"generating {shape}, 16 texts: Linear against nn.Linear",
        lambda: write(model, prompts, 100),
        lambda: write(torchs_linear, prompts, 100),
        rounds=5,
    )
    compare(
        f"generating {shape}: with the cache against without",
        lambda: write(model, prompt, 300),
        lambda: write_without_a_cache(model, prompt, 300),
        rounds=2,
    )

    one_text, sixteen_texts, long_text = shortest_times(
        lambda: write(model, prompt, 300),
        lambda: write(model, prompts, 300),
        lambda: write(model, prompt, 2000),
        rounds=3,
    )
    per_second = 300 / one_text
    label = f"generating {shape}: 16 texts at once against one after the other"
    print_row(label, 16 * one_text / sixteen_texts, f"x   (one: {per_second:.0f} a second)")
    label = f"generating {shape}: each of 2,000 characters against each of 300"
    print_row(label, (one_text / 300) / (long_text / 2000), "x")


def main() -> None:
    if len(sys.argv) == 3:  # started by peak_memory_of_a_process
        print_peak_memory(sys.argv[1], Path(sys.argv[2]))
        return

    instructions = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {instructions}, {torch.get_num_threads()} threads")
    measure_loading()  # first: a process's peak begins at that of the process that starts it
    measure_attention()
    measure_many_rows()
    measure_few_rows()
    measure_training_steps()
    measure_generation()
    measure_encoding()


if __name__ == "__main__":
    main()
