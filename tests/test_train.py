"""What train.py promises: its parts, and the program as its user sees it."""

import csv
import dataclasses
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import DAMAGES, SMALL_RUN, Project, damaged
from torch.nn import functional as F

import train
from model import CharTokenizer, load_model, read_text
from train import (
    LossLog,
    Muon,
    Settings,
    StopSignal,
    Tracking,
    Trainer,
    attention_image,
    attention_weights,
    cpu_has_fast_bf16,
    evaluation_windows,
    loss_by_context,
    make_tracker,
    ngram_losses,
    orthogonalize,
    path_to_remember,
    run_name,
    split_text,
)

EVALUATION = re.compile(
    r"step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4}) \((\d+\.\d\d) bits/char\)"
    r"(?:, [\d:]+ left)?"
)


def small_settings(project: Project, **changes: object) -> Settings:
    settings = {
        "data": project.text_file,
        "model": project.model,
        "context_length": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "batch_size": 12,
        "steps": 8,
        "eval_interval": 3,
        "eval_windows": 5,
        "device": "cpu",
    }
    return Settings(**{**settings, **changes})


def take_steps(trainer: Trainer, last_step: int) -> None:
    while trainer.step < last_step:
        trainer.train_step()


def saved_weights(path: Path) -> dict[str, torch.Tensor]:
    model, _, _ = load_model(path)
    return model.state_dict()


def assert_same_weights(path: Path, other: Path) -> None:
    weights, others = saved_weights(path), saved_weights(other)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def evaluations(output: str) -> list[tuple[int, float, float, float]]:
    """The step, both losses and the bits per character of each evaluation."""
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    matches = [EVALUATION.fullmatch(line) for line in lines]
    return [(int(m[1]), float(m[2]), float(m[3]), float(m[4])) for m in matches]


def without_time_left(output: str) -> str:
    return re.sub(r", [\d:]+ left", "", output)


# Settings


@pytest.mark.parametrize("name", ["batch_size", "learning_rate", "val_fraction", "seed"])
def test_a_setting_out_of_range_is_refused_by_its_flag(name):
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        Settings(**{name: -1})


# Text


TEXTS = ["a\r\nb\rc\n", "Ж中🪐 e\u0301\n", "\ufeff\ufeffa", "中" * 700_000 + "🪐"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_as_it_is_but_for_a_byte_order_mark_at_its_beginning(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode("utf-8"))
    assert read_text(path)[0] == text.removeprefix("\ufeff")


@pytest.mark.parametrize("before", [b"", b"abc", "中".encode() * 400_000])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe4\xb8", b"\xc0\x80", b"caf\xe9 "])
def test_a_file_that_is_not_utf_8_is_refused_with_its_first_bad_byte(tmp_path, before, bad):
    path = tmp_path / "text.txt"
    path.write_bytes(before + bad)
    with pytest.raises(UnicodeDecodeError) as expected:
        (before + bad).decode("utf-8")
    position = expected.value.start
    with pytest.raises(ValueError, match=rf"text\.txt is not UTF-8.*position {position}\b"):
        read_text(path)


def test_a_text_that_changes_while_it_is_read_is_read_in_one_of_its_states(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    before, after = "one and " * 400, "another " * 300
    path.write_text(before)
    original_read_bytes = Path.read_bytes

    def read_bytes_and_change(self: Path) -> bytes:
        data = original_read_bytes(self)
        self.write_text(after)
        return data

    monkeypatch.setattr(Path, "read_bytes", read_bytes_and_change)
    assert read_text(path) == (before, hashlib.sha256(before.encode()).hexdigest())
    assert read_text(path) == (after, hashlib.sha256(after.encode()).hexdigest())


@pytest.mark.parametrize("val_fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("length", [200, 399, 1000])
def test_the_end_of_a_text_is_held_out(project, val_fraction, length):
    settings = small_settings(project, val_fraction=val_fraction)
    train_ids, val_ids = split_text(torch.arange(length), settings)
    assert len(val_ids) == round(length * val_fraction)
    assert torch.cat([train_ids, val_ids]).tolist() == list(range(length))


@pytest.mark.parametrize("val_fraction", [0.1, 0.5, 0.9])
def test_a_text_is_refused_if_and_only_if_a_part_is_shorter_than_a_window(project, val_fraction):
    settings = small_settings(project, val_fraction=val_fraction)
    for length in range(400):
        val_length = round(length * val_fraction)
        is_long_enough = min(val_length, length - val_length) >= 17
        if is_long_enough:
            split_text(torch.arange(length), settings)
        else:
            with pytest.raises(ValueError, match=rf"\b{length} characters"):
                split_text(torch.arange(length), settings)


@pytest.mark.parametrize("val_fraction", [0.1, 0.5, 0.9])
def test_the_length_that_the_error_asks_for_is_enough(project, val_fraction):
    settings = small_settings(project, val_fraction=val_fraction)
    with pytest.raises(ValueError, match="at least") as error:
        split_text(torch.arange(20), settings)
    needed = int(re.search(r"at least (\d+)", str(error.value))[1])
    split_text(torch.arange(needed), settings)


@pytest.mark.parametrize("length", [17, 18, 33, 80, 81, 82, 500])
def test_evaluation_windows_are_spread_over_the_text_and_do_not_overlap(length):
    windows = evaluation_windows(torch.arange(length), context_length=16, count=5)
    starts = windows[:, 0].tolist()
    assert len(windows) == min(5, (length - 1) // 16)
    for start, window in zip(starts, windows.tolist(), strict=True):
        assert window == list(range(start, start + 17))
    for start, next_start in pairwise(starts):
        assert next_start - start >= 16
    assert starts[-1] - starts[0] >= 0.7 * length - 32


# N-grams


def witten_bell(training: str, vocabulary: str, history: str | None, character: str) -> float:
    """The probability of a character after a history, by its definition."""
    if history is None:
        return 1 / len(vocabulary)
    rest = history[1:] if history else None
    shorter = witten_bell(training, vocabulary, rest, character)
    followers = [
        training[i + len(history)]
        for i in range(len(training) - len(history))
        if training[i : i + len(history)] == history
    ]
    if not followers:
        return shorter
    kinds = len(set(followers))
    return (followers.count(character) + kinds * shorter) / (len(followers) + kinds)


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        ("the ship went far into the old night", "then it went"),
        ("ab", "ba"),
        ("aaaa", "aa"),
        ("中文字母中文母字", "字中文Ж"),
    ],
)
def test_the_losses_to_beat_are_those_of_counting(training, validation):
    tokenizer = CharTokenizer.from_text(training + validation)
    whole = training + validation
    expected = [math.log(tokenizer.vocab_size)]
    for n in (1, 2, 3):
        losses = []
        for i in range(len(training), len(whole)):
            history = whole[i - n + 1 : i]
            p = witten_bell(training, tokenizer.characters, history, whole[i])
            losses.append(-math.log(p))
        expected.append(sum(losses) / len(losses))
    ids = tokenizer.encode(training), tokenizer.encode(validation)
    assert ngram_losses(*ids, tokenizer.vocab_size) == pytest.approx(expected, rel=1e-9)


def test_the_unigram_loss_is_the_cross_entropy_of_the_counts(project):
    tokenizer = CharTokenizer.from_text(project.text)
    training, validation = project.text[:2000], project.text[2000:]
    counts = Counter(training)
    kinds, vocab_size = len(counts), tokenizer.vocab_size
    losses = []
    for character in validation:
        p = (counts[character] + kinds / vocab_size) / (len(training) + kinds)
        losses.append(-math.log(p))
    _, unigram, _, _ = ngram_losses(
        tokenizer.encode(training), tokenizer.encode(validation), vocab_size
    )
    assert unigram == pytest.approx(sum(losses) / len(losses), rel=1e-9)


# Optimizers


def muon_for(matrices: list[torch.Tensor], **options: float) -> Muon:
    return Muon([{"params": matrices, "momentum": 0.95, "weight_decay": 0.0, **options}])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (5, 7), (1, 9)])
def test_orthogonalizing_sets_all_singular_values_to_about_1(shape):
    torch.manual_seed(0)
    matrices = 100 * torch.randn(3, *shape)
    for matrix, result in zip(matrices, orthogonalize(matrices), strict=True):
        singular_values = torch.linalg.svdvals(result)
        assert singular_values.min() > 0.3
        assert singular_values.max() < 1.3
        assert cosine(result, nearest_orthogonal(matrix)) > 0.9


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (5, 7)])
def test_muon_moves_a_matrix_equally_in_all_directions(shape):
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.zeros(shape))
    matrix.grad = torch.randn(shape)
    muon_for([matrix], lr=1.0).step()
    assert cosine(-matrix.detach(), nearest_orthogonal(matrix.grad)) > 0.9


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (5, 7)])
def test_the_elements_of_muons_update_have_a_typical_size_of_a_fifth_of_the_rate(shape):
    matrix = torch.nn.Parameter(torch.zeros(shape))
    matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    muon_for([matrix], lr=0.5).step()
    longer_side = 0 if shape[0] > shape[1] else 1
    sizes = matrix.detach().square().mean(dim=1 - longer_side).sqrt()
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.2 * 0.5))


def test_muon_averages_gradients_and_looks_one_step_ahead():
    first, second = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    matrix = torch.nn.Parameter(torch.zeros(16, 16))
    optimizer = muon_for([matrix], lr=1.0)
    matrix.grad = first
    optimizer.step()
    before = matrix.detach().clone()
    matrix.grad = second
    optimizer.step()

    average = 0.95 * first + 0.05 * second
    look_ahead = 0.95 * average + 0.05 * second
    assert cosine(before - matrix.detach(), nearest_orthogonal(look_ahead)) > 0.9


def test_muon_decays_a_matrix_whose_gradient_is_zero():
    matrix = torch.nn.Parameter(torch.ones(4, 6))
    matrix.grad = torch.zeros(4, 6)
    muon_for([matrix], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), torch.full((4, 6), 0.95))


def assert_same_updates(
    together: list[torch.Tensor], optimizer: Muon, alone: list[torch.Tensor], others: list[Muon]
) -> None:
    """Takes three steps of both ways with the same gradients."""
    for _ in range(3):
        for a, b in zip(together, alone, strict=True):
            b.grad = torch.randn_like(b)
            a.grad = b.grad.clone()
        optimizer.step()
        for other in others:
            other.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.detach(), b.detach())


def test_muon_moves_many_matrices_as_it_would_each_one_alone():
    torch.manual_seed(0)
    shapes = [(8, 24), (8, 24), (24, 8), (8, 8)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizers = [muon_for([p], **options) for p in alone]
    assert_same_updates(together, muon_for(together, **options), alone, optimizers)


def test_muon_moves_the_parts_of_a_parameter_as_it_would_separate_matrices():
    torch.manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(24, 8))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(3)]
    optimizer, separate = muon_for([whole], lr=0.01, stacked=3), muon_for(parts, lr=0.01)
    for _ in range(3):
        whole.grad = torch.randn(24, 8)
        for part, gradient in zip(parts, whole.grad.chunk(3), strict=True):
            part.grad = gradient.clone()
        optimizer.step()
        separate.step()
    torch.testing.assert_close(whole.detach(), torch.cat([part.detach() for part in parts]))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_parameter_has_one_optimizer(project, optimizer):
    trainer = Trainer(small_settings(project, optimizer=optimizer))
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in trainer.model.parameters())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weight_decay_acts_on_the_matrices_of_the_blocks_alone(project, optimizer):
    trainer = Trainer(small_settings(project, optimizer=optimizer, weight_decay=0.1))
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, p in trainer.model.named_parameters():
        is_matrix_of_block = name.startswith("blocks.") and p.dim() == 2
        assert (id(p) in decaying) == is_matrix_of_block, name


def test_muon_splits_exactly_queries_keys_and_values(project):
    trainer = Trainer(small_settings(project))
    muon = trainer.optimizers[0]
    split = {id(p) for group in muon.param_groups if group["stacked"] == 3 for p in group["params"]}
    assert split == {id(block.attention.qkv.weight) for block in trainer.model.blocks}


@pytest.mark.parametrize(("optimizer", "share"), [("muon", 1.0), ("adamw", 0.1)])
def test_the_learning_rate_rises_and_then_falls_to_zero(project, optimizer, share):
    settings = small_settings(project, steps=100, warmup_steps=10, optimizer=optimizer)
    trainer = Trainer(settings)
    rates = [trainer.learning_rate(step) for step in range(101)]
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0.8 < max(rates) / (share * settings.learning_rate) <= 1
    assert rates[-1] == 0


# Trainer


def test_the_parts_of_a_batch_add_up_to_the_batch(project):
    whole, three_parts, twelve_parts = [
        Trainer(small_settings(project, accumulate=parts)) for parts in (1, 3, 12)
    ]
    for _ in range(4):
        loss = whole.train_step()
        for trainer in (three_parts, twelve_parts):
            torch.testing.assert_close(trainer.train_step(), loss, atol=1e-5, rtol=0)
            torch.testing.assert_close(trainer.grad_norm, whole.grad_norm, atol=1e-4, rtol=1e-4)


def test_a_batch_is_windows_of_the_training_part_that_cover_all_of_it(project):
    trainer = Trainer(small_settings(project, batch_size=2000))
    trainer.train_ids = torch.arange(40)
    starts = set()
    for row in trainer.get_batch().tolist():
        assert row == list(range(row[0], row[0] + 17))
        starts.add(row[0])
    assert starts == set(range(40 - 16))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_resumed_twice_equals_one_that_was_not_interrupted(project, optimizer, precision):
    settings = small_settings(project, optimizer=optimizer, precision=precision, dropout=0.2)
    uninterrupted = Trainer(settings)
    take_steps(uninterrupted, 7)

    for last_step in (2, 3, 7):
        trainer = Trainer(dataclasses.replace(settings, resume=last_step > 2))
        take_steps(trainer, last_step)
        trainer.save_checkpoint()

    weights = saved_weights(settings.checkpoint)
    for name, weight in uninterrupted.model.state_dict().items():
        assert torch.equal(weights[name], weight), name


def test_another_seed_is_another_run(project):
    first_losses = [
        Trainer(small_settings(project, seed=seed)).train_step() for seed in (1, 1, 2**40 + 1)
    ]
    assert first_losses[0] == first_losses[1]
    assert first_losses[0] != first_losses[2]


def test_an_evaluation_is_the_mean_loss_of_its_windows(project):
    trainer = Trainer(small_settings(project, dropout=0.3, batch_size=3, precision="fp32"))
    trainer.train_step()
    losses = trainer.evaluate()
    assert losses.keys() == {"train", "val"}
    for part, windows in trainer.eval_windows.items():
        expected = [trainer.model(row[None, :-1], row[None, 1:])[1].item() for row in windows]
        assert losses[part] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_an_evaluation_changes_nothing(project):
    evaluated, plain = [Trainer(small_settings(project, dropout=0.3)) for _ in range(2)]
    assert evaluated.evaluate() == evaluated.evaluate()
    assert evaluated.train_step() == plain.train_step()


def test_evaluations_are_due_at_their_interval_and_at_the_end_once(project):
    trainer = Trainer(small_settings(project, steps=8, eval_interval=3))
    due = []
    for step in range(9):
        trainer.step = step
        if trainer.evaluation_is_due():
            due.append(step)
            trainer.evaluate()
        assert not trainer.evaluation_is_due()
    assert due == [0, 3, 6, 8]


FIXED = {
    "n_layer": 1,
    "n_embd": 32,
    "context_length": 8,
    "dropout": 0.5,
    "optimizer": "adamw",
    "weight_decay": 0.5,
    "val_fraction": 0.2,
    "eval_windows": 3,
}


@pytest.mark.parametrize(("name", "value"), FIXED.items())
def test_resuming_with_another_value_of_a_fixed_setting_is_refused_by_name(project, name, value):
    Trainer(small_settings(project)).save_checkpoint()
    with pytest.raises(ValueError, match=rf"made with {{'{name}':"):
        Trainer(small_settings(project, resume=True, **{name: value}))


def test_resuming_on_another_text_is_refused(project):
    Trainer(small_settings(project)).save_checkpoint()
    project.text_file.write_text(project.text[::-1], encoding="utf-8")
    with pytest.raises(ValueError, match=r"made with {'text':"):
        Trainer(small_settings(project, resume=True))


def test_resuming_with_other_values_of_what_is_not_fixed_is_possible(project):
    Trainer(small_settings(project)).save_checkpoint()
    changes = {"steps": 20, "eval_interval": 1, "learning_rate": 0.1}
    Trainer(small_settings(project, resume=True, **changes))


def test_a_model_cannot_be_resumed_as_a_checkpoint(project):
    trainer = Trainer(small_settings(project))
    trainer.train_step()
    trainer.save_if_best(1.0)
    project.model.rename(project.checkpoint)
    with pytest.raises(ValueError, match="not a checkpoint"):
        Trainer(small_settings(project, resume=True))


def test_models_in_one_directory_have_checkpoints_of_their_own(project):
    names = ("a.1", "a.2", "a", "b.pth")
    checkpoints = [
        small_settings(project, model=project.directory / name).checkpoint.name for name in names
    ]
    assert checkpoints == ["a.1.train.pth", "a.2.train.pth", "a.train.pth", "b.train.pth"]


# The program


def test_a_run_prints_an_evaluation_a_line_with_falling_losses(project):
    done = project.train("--steps=40", "--eval-interval=10")
    lines = evaluations(done.stdout)
    assert [step for step, *_ in lines] == [0, 10, 20, 30, 40]
    assert lines[-1][1] < lines[0][1] - 0.5
    for _, _, val_loss, bits in lines:
        assert bits == pytest.approx(val_loss / math.log(2), abs=0.006)


def test_a_run_saves_the_model_of_the_lowest_validation_loss_and_a_checkpoint(project):
    lines = evaluations(project.train("--steps=40", "--eval-interval=10").stdout)
    best_step, _, best_val_loss, _ = min(lines, key=lambda line: line[2])
    _, tokenizer, metadata = load_model(project.model)
    assert metadata["step"] == best_step
    assert metadata["val_loss"] == pytest.approx(best_val_loss, abs=1e-4)
    assert tokenizer.characters == "".join(sorted(set(project.text)))
    files = sorted(path.name for path in project.model.parent.iterdir())
    assert files == ["model-scifi.csv", "model-scifi.pth", "model-scifi.train.pth"]


def test_a_run_says_what_it_trains_and_what_it_has_saved(project):
    notices = project.train().stderr
    model, _, metadata = load_model(project.model)
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters:,} parameters, {len(project.text):,} characters" in notices
    assert f"model of step {metadata['step']}" in notices
    assert "python inference.py" in notices


def test_a_log_file_has_whole_lines_and_no_progress_bar(project):
    done = project.train()
    assert "\r" not in done.stdout + done.stderr
    assert len(evaluations(done.stdout)) == 3


def test_a_run_that_replaces_a_model_says_so(project):
    assert "will replace" not in project.train().stderr
    assert f"will replace {project.model} (step 6" in project.train().stderr


def test_a_run_that_is_finished_already_says_so(project):
    project.train()
    done = project.train("--resume")
    assert done.stdout == ""
    assert "already at step 6 of 6" in done.stderr
    assert "--steps" in done.stderr


def test_two_runs_print_the_same(project):
    first, second = [project.train("--dropout=0.1").stdout for _ in range(2)]
    assert without_time_left(first) == without_time_left(second)


def test_flags_may_be_spelled_with_underscores(project):
    project.train("--batch_size=8", "--eval_interval", 2)


def test_without_books_it_trains_on_the_sample_and_names_the_commands(project):
    project.text_file.rename(project.directory / "data/sample.txt")
    notices = project.train().stderr
    assert "data/sample.txt" in notices
    assert "python bin/download.py" in notices
    assert "bash bin/concatenate.sh" in notices
    assert project.model.exists()


def test_it_can_be_run_from_another_directory(project, tmp_path):
    project.working_directory = tmp_path / "else where"
    project.working_directory.mkdir()
    project.train()
    assert project.model.exists()
    assert not any(project.working_directory.iterdir())


def test_a_chinese_text_with_thousands_of_characters_is_learned(project):
    text = "".join(chr(0x4E00 + i * i % 8000) for i in range(9000))
    novel = project.directory / "data/小说 'a'.txt"
    novel.write_text(text, encoding="utf-8")
    model = project.directory / "models/小.pth"
    project.train("--data", novel, "--model", model)
    done = project.run("inference.py", "--model", model, "--prompt=一丁", "--seed=1")
    assert len(done.stdout) == len("一丁") + 500 + len("\n")
    assert set(done.stdout) - {"\n"} < set(text)


# Stopping and resuming


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves_a_checkpoint(project, number, status):
    flags = ["--tracker=none", *SMALL_RUN, "--steps=3000", "--eval-interval=20"]
    process = subprocess.Popen(
        project.command("train.py", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = [process.stdout.readline() for _ in range(4)][1:]  # steps 0, 20 and 40
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)

    _, _, metadata = load_model(project.checkpoint)
    assert process.returncode == status
    assert lines[-1].startswith("step 40:")
    assert metadata["step"] >= 40
    assert f"stopped at step {metadata['step']}" in stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr

    last_step = metadata["step"] + 20
    resumed = project.run("train.py", *flags, "--resume", f"--steps={last_step}")
    steps = [step for step, *_ in evaluations(resumed.stdout)]
    assert min(steps) > metadata["step"]
    assert max(steps) == last_step


def test_a_run_killed_at_any_moment_resumes_to_the_same_end(project):
    flags = ["--steps=60", "--eval-interval=5", "--dropout=0.1"]
    undisturbed = project.directory / "models/undisturbed.pth"
    project.train(*flags, "--model", undisturbed)

    command = project.command("train.py", "--tracker=none", *SMALL_RUN, *flags, "--resume")
    for delay in (0.0, 0.13, 0.29):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        for path in (project.model, project.checkpoint):
            if path.exists():
                load_model(path)  # raises ValueError if it is not whole

    project.train(*flags, "--resume")
    assert_same_weights(project.checkpoint, undisturbed.with_suffix(".train.pth"))
    assert_same_weights(project.model, undisturbed)


def test_without_a_checkpoint_resuming_starts_at_step_0_and_says_so(project):
    assert "starting at step 0" in project.train("--resume").stderr


DIVERGING = {
    "in its loss": ["--optimizer=adamw", "--steps=50", "--eval-interval=50"],
    "in its last update": ["--resume", "--steps=9", "--eval-interval=1", "--grad-clip=1e9"],
}


@pytest.mark.parametrize("flags", DIVERGING.values(), ids=DIVERGING.keys())
def test_a_run_that_diverges_stops_and_leaves_both_files_as_they_were(project, flags):
    project.train()
    before = project.model.read_bytes(), project.checkpoint.read_bytes()
    done = project.train("--learning-rate=1e9", *flags, status=1)
    assert re.search(r"error: step \d+: .*lower --learning-rate", done.stderr)
    assert (project.model.read_bytes(), project.checkpoint.read_bytes()) == before


# Several processes


def start_processes(project: Project, processes: int, *flags: str) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = project.command("train.py", "--tracker=none", *SMALL_RUN, *flags)[1:]
    command = [*torchrun, "--nproc-per-node", str(processes), *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def run_processes(project: Project, processes: int, *flags: str) -> tuple[int, str, str]:
    """Returns the exit status, standard output and standard error of several processes."""
    with start_processes(project, processes, *flags) as process:
        stdout, stderr = process.communicate(timeout=240)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_several_processes_learn_what_one_does(project, processes):
    flags = ["--batch-size=12", "--warmup-steps=0", f"--model={project.directory / 'm.pth'}"]
    alone = evaluations(project.train(*flags).stdout)
    status, stdout, stderr = run_processes(project, processes, *flags)
    assert status == 0, stderr
    together = evaluations(stdout)
    assert len(together) == len(alone)
    for line, expected in zip(together, alone, strict=True):
        assert line == pytest.approx(expected, abs=5e-3)


def test_a_mistake_is_reported_by_one_of_several_processes(project):
    status, _, stderr = run_processes(project, 2, "--batch-size=5")
    errors = re.findall("^error: .*", stderr, re.MULTILINE)
    assert status == 1
    assert errors == ["error: --batch-size 5 must be a multiple of 2 processes x 1 (--accumulate)"]
    assert 'train.py", line' not in stderr


def test_several_processes_stop_together_at_a_signal(project):
    with start_processes(project, 2, "--steps=100000", "--eval-interval=20") as process:
        for _ in range(3):  # the losses to beat, steps 0 and 20
            process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    _, _, metadata = load_model(project.checkpoint)
    assert process.returncode != 0
    assert f"stopped at step {metadata['step']}" in stderr
    assert "terminate called" not in stderr


def test_a_signal_that_arrives_while_processes_communicate_is_not_lost(monkeypatch):
    signals = StopSignal(world=2)

    def communicate(tensor: torch.Tensor, operation: object) -> None:
        if signals.received == 0:
            signals.receive(signal.SIGTERM, None)  # after this process has sent its number

    monkeypatch.setattr(dist, "all_reduce", communicate)
    assert signals.agreed_number() == 0
    assert signals.agreed_number() == signal.SIGTERM


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_are_averaged_once_a_step(project, one_process_group, monkeypatch):
    monkeypatch.setattr(Trainer, "check_processes_are_at_one_step", lambda trainer: None)
    trainer = Trainer(small_settings(project, accumulate=3), rank=0, world=2)
    all_reduces = []

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        all_reduces.append(trainer.step)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    trainer.parallel_model.register_comm_hook(None, count)
    assert not trainer.parallel_model.will_sync_module_buffers()
    take_steps(trainer, 3)
    assert Counter(all_reduces) == {0: 1, 1: 1, 2: 1}


def test_a_model_is_wrapped_for_processes_before_it_is_compiled(
    project, one_process_group, monkeypatch
):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model))
    monkeypatch.setattr(Trainer, "check_processes_are_at_one_step", lambda trainer: None)
    Trainer(small_settings(project, compile=True), rank=0, world=2)
    (model,) = compiled
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)


# The precision


PROCESSORS = [
    ({}, False),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
    ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
    ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, False),
]


@pytest.mark.parametrize(("processor", "is_fast"), PROCESSORS)
def test_auto_takes_bf16_where_the_processor_is_fast_in_it(
    project, monkeypatch, processor, is_fast
):
    assert cpu_has_fast_bf16(processor) == is_fast
    monkeypatch.setattr(train, "cpu_capabilities", lambda: processor)
    large = Trainer(small_settings(project, n_embd=128))
    small = Trainer(small_settings(project))
    assert large.precision == ("bf16" if is_fast else "fp32")
    assert small.precision == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_keeps_its_precision_unless_told_otherwise(project, precision):
    trainer = Trainer(small_settings(project, precision=precision))
    take_steps(trainer, 2)
    trainer.save_checkpoint()
    assert Trainer(small_settings(project, resume=True)).precision == precision
    other = "bf16" if precision == "fp32" else "fp32"
    resumed = Trainer(small_settings(project, resume=True, precision=other))
    assert resumed.precision == other


def test_products_are_in_bf16_and_attention_and_weights_in_fp32(project):
    trainer = Trainer(small_settings(project, precision="bf16"))
    types = {}

    def keep_types(name: str):
        def hook(module: object, inputs: tuple, output: torch.Tensor) -> None:
            types[name] = output.dtype

        return hook

    attention = trainer.model.blocks[0].attention
    attention.qkv.register_forward_hook(keep_types("qkv"))
    attention.scaled_dot_product.register_forward_hook(keep_types("attention"))
    trainer.train_step()
    assert types == {"qkv": torch.bfloat16, "attention": torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_bf16_is_refused_on_mps(trained):
    flags = ["--device=mps", "--precision=bf16"]
    assert "use fp32" in trained.run("train.py", *flags, status=2).stderr


def test_a_bf16_checkpoint_is_not_continued_in_bf16_on_mps(project):
    settings = small_settings(project, resume=True)
    with pytest.raises(ValueError, match="use fp32"):
        dataclasses.replace(settings, device="mps", precision="bf16")


def test_several_processes_are_refused_on_mps(trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--device cpu" in trained.run("train.py", "--device=mps", status=2).stderr


# What the model has learned


def test_the_losses_by_context_are_means_over_windows_and_positions(project):
    trainer = Trainer(small_settings(project, context_length=11))
    model = trainer.model.eval()
    windows = evaluation_windows(trainer.val_ids, 11, 7)
    losses = {}  # by the number of characters before
    for row in windows:
        for count in range(1, 12):
            logits, _ = model(row[None, :count])
            loss = F.cross_entropy(logits[0, -1], row[count]).item()
            losses.setdefault(count, []).append(loss)
    expected = {}
    for k in (1, 2, 4, 8):
        values = [loss for count in range(k, min(2 * k, 12)) for loss in losses[count]]
        expected[k] = sum(values) / len(values)
    assert loss_by_context(model, windows) == pytest.approx(expected, rel=1e-5)


def test_a_run_shows_the_losses_to_beat_what_context_is_worth_and_a_passage(project):
    done = project.train()
    lines = done.stdout.splitlines()
    figure = r"\d+\.\d{3}"
    assert re.fullmatch(
        rf"to beat: uniform {figure}, unigram {figure}, bigram {figure}, trigram {figure} "
        r"\(nats/char on the validation text\)",
        lines[0],
    )
    assert re.fullmatch(
        r"by context: 1: \d+\.\d\d, 2: \d+\.\d\d, 4: \d+\.\d\d, 8: \d+\.\d\d", lines[-1]
    )
    _, passage = done.stderr.split("a passage by the best model:\n")
    passage, _ = passage.split(f"\n\n{project.model}")
    assert len(passage) == 200


def test_the_model_remembers_the_text_that_it_has_learned_from(project):
    project.train()
    _, _, metadata = load_model(project.model)
    assert metadata["text"] == "data/scifi.txt"
    assert metadata["text_digest"] == hashlib.sha256(project.text.encode()).hexdigest()


def test_of_a_text_elsewhere_only_the_name_is_remembered(tmp_path):
    assert path_to_remember(tmp_path / "private.txt") == "private.txt"


def test_closed_standard_error_is_no_error(project):
    done = project.run_with_closed("2", "train.py", "--tracker=none", *SMALL_RUN)
    assert done.returncode == 0
    assert len(evaluations(done.stdout)) == 3


@pytest.mark.parametrize("name", ["", ".", "..", "models"])
def test_a_directory_cannot_be_the_model(project, name):
    assert "--model" in project.train(f"--model={name}", status=2).stderr


def test_a_resumed_run_without_a_checkpoint_says_what_it_replaces(project):
    project.train()
    project.checkpoint.unlink()
    assert f"this run will replace {project.model}" in project.train("--resume").stderr


# The log of the losses


def logged(project: Project) -> list[list[str]]:
    with open(project.directory / "models/model-scifi.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_the_log_has_a_row_for_each_evaluation(project):
    printed = evaluations(project.train().stdout)
    header, *rows = logged(project)
    assert header == ["step", "train_loss", "val_loss", "learning_rate", "characters_per_second"]
    for row, (step, train_loss, val_loss, _) in zip(rows, printed, strict=True):
        assert int(row[0]) == step
        assert float(row[1]) == pytest.approx(train_loss, abs=1e-4)
        assert float(row[2]) == pytest.approx(val_loss, abs=1e-4)
    trainer = Trainer(small_settings(project, steps=6))
    rates = [0.0, trainer.learning_rate(2), trainer.learning_rate(5)]  # those of the last steps
    assert [float(row[3]) for row in rows] == pytest.approx(rates, rel=1e-5)


def test_a_resumed_run_continues_its_log(project):
    project.train("--steps=12")
    whole = logged(project)
    trainer = Trainer(small_settings(project, steps=12, batch_size=4))
    take_steps(trainer, 6)
    trainer.step = 6
    log = LossLog(trainer)
    assert [row[0] for row in log.rows] == ["0", "3", "6"]  # without what came after
    log.add(trainer, {"train": 1.0, "val": 2.0}, 3.0)
    assert logged(project)[:4] == whole[:4]
    assert logged(project)[4][:3] == ["6", "1.00000", "2.00000"]


def test_a_file_that_is_no_log_is_not_overwritten(project):
    path = project.directory / "models/model-scifi.csv"
    for content in ("", "a,b\n1,2\n", "x" * 200_000):
        path.write_text(content, encoding="utf-8")
        assert str(path) in project.train(status=1).stderr
        assert path.read_text(encoding="utf-8") == content


# Trackers


class RecordingTracker:
    """A tracker that keeps what it gets, and fails where it is told to."""

    name = "recording"
    directory = ".recording"

    def __init__(self) -> None:
        self.failures: dict[str, Exception] = {}  # by the name of the method
        self.opened: list[str | None] = []
        self.calls: list[tuple[str, str, int]] = []

    def fail_if_told_to(self, method: str) -> None:
        if method in self.failures:
            raise self.failures[method]

    def open(self, name: str, identity: str | None, settings: dict, step: int) -> str:
        self.opened.append(identity)
        self.fail_if_told_to("open")
        return identity or "new"

    def add_numbers(self, numbers: dict[str, float], step: int, part: str | None = None) -> None:
        self.fail_if_told_to("add_numbers")
        self.calls += [("number", name, step) for name in numbers]

    def add_text(self, name: str, text: str, step: int) -> None:
        self.fail_if_told_to("add_text")
        self.calls.append(("text", name, step))

    def add_image(self, name: str, image: torch.Tensor, caption: str, step: int) -> None:
        self.calls.append(("image", name, step))

    def close(self) -> None:
        self.fail_if_told_to("close")


def track_evaluations(trainer: Trainer, tracking: Tracking, count: int) -> None:
    for _ in range(count):
        trainer.train_step()
        tracking.track(trainer, trainer.evaluate(), speed=100.0)


def test_an_evaluation_is_tracked_whole(project):
    tracker = RecordingTracker()
    track_evaluations(Trainer(small_settings(project)), Tracking(tracker), 1)
    names = {name for _, name, _ in tracker.calls}
    numbers = {"loss", "bits_per_character", "learning_rate", "gradient_norm"}
    assert names == {*numbers, "characters_per_second", "passage"}


@pytest.mark.parametrize("method", ["open", "add_numbers", "add_text", "close"])
def test_a_failing_tracker_does_not_end_training_and_is_tried_again(project, method, capsys):
    tracker = RecordingTracker()
    tracker.failures = {method: OSError("no space"), "add_text": OSError("no space")}
    trainer, tracking = Trainer(small_settings(project)), Tracking(tracker)
    track_evaluations(trainer, tracking, 2)
    tracker.failures = {}
    track_evaluations(trainer, tracking, 1)
    assert ("text", "passage", 3) in tracker.calls


def test_each_failure_of_a_tracker_is_reported_once(project, capsys):
    tracker = RecordingTracker()
    trainer, tracking = Trainer(small_settings(project)), Tracking(tracker)
    tracker.failures = {"add_text": OSError("no space")}
    track_evaluations(trainer, tracking, 2)
    tracker.failures = {"add_text": RuntimeError()}
    track_evaluations(trainer, tracking, 2)
    notices = capsys.readouterr().err.splitlines()
    assert len(notices) == 2
    assert "OSError: no space" in notices[0]
    assert "RuntimeError" in notices[1]
    assert all("--tracker none" in notice for notice in notices)


def test_a_resumed_run_continues_in_its_tracker(project):
    trainer = Trainer(small_settings(project))
    tracker = RecordingTracker()
    track_evaluations(trainer, Tracking(tracker), 1)
    trainer.save_checkpoint()
    resumed = Trainer(small_settings(project, resume=True))
    track_evaluations(resumed, Tracking(tracker), 1)
    assert tracker.opened == [None, "new"]


def test_a_run_that_is_gone_from_its_tracker_is_started_anew_there(project, capsys):
    trainer = Trainer(small_settings(project))
    trainer.tracked_runs["recording"] = "deleted"

    class ForgetfulTracker(RecordingTracker):
        def open(self, name: str, identity: str | None, settings: dict, step: int) -> str:
            if identity == "deleted":
                raise RuntimeError("Cannot find Run")
            return super().open(name, identity, settings, step)

    tracker = ForgetfulTracker()
    track_evaluations(trainer, Tracking(tracker), 1)
    assert trainer.tracked_runs["recording"] == "new"
    assert tracker.calls
    assert "a new one is started" in capsys.readouterr().err


def test_auto_takes_aim_else_tensorboard_else_no_tracker(monkeypatch):
    made = []

    def tracker_class(name: str, is_installed: bool):
        def make() -> str:
            made.append(name)
            if not is_installed:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return name

        make.install_with = f"pip install {name}"
        return make

    for aim, tensorboard, expected in [
        (True, True, "aim"),
        (False, True, "tensorboard"),
        (False, False, None),
    ]:
        classes = {
            "aim": tracker_class("aim", aim),
            "tensorboard": tracker_class("tensorboard", tensorboard),
        }
        monkeypatch.setattr(train, "TRACKERS", classes)
        assert make_tracker("auto") == expected
    assert make_tracker("none") is None


@pytest.mark.parametrize("name", ["aim", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_an_error_that_says_what_to_install(
    trained, monkeypatch, name
):
    monkeypatch.setitem(sys.modules, "aim", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    error = trained.run("train.py", f"--tracker={name}", status=2).stderr
    assert f"pip install {name}" in error


def test_a_run_is_named_by_what_differs_from_the_defaults():
    assert re.match(r"defaults \d{4}-\d\d-\d\d", run_name(Settings()))
    settings = Settings(n_head=1, steps=400, data=Path("mine.txt"), tracker="none")
    assert run_name(settings).startswith("data=mine steps=400 n_head=1 ")


def test_attention_images_show_the_weights_of_each_head(project):
    trainer = Trainer(small_settings(project))
    ids = trainer.eval_windows["val"][0, :8]
    for weights in attention_weights(trainer.model, ids):
        assert weights.shape == (2, 8, 8)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 8))
        image = attention_image(weights)
        zoom = image.size(0) // 8
        pixels = image[::zoom, ::zoom]
        for i, head in enumerate(weights):
            square = pixels[:, 9 * i : 9 * i + 8]
            torch.testing.assert_close(square, head.sqrt())
            assert torch.equal(square, square.tril())


def test_looking_at_attention_leaves_no_hooks(project):
    trainer = Trainer(small_settings(project))
    ids = trainer.eval_windows["val"][0, :8]
    first, second = [attention_weights(trainer.model, ids) for _ in range(2)]
    assert len(first) == len(second) == 2


def train_with_tracker(project: Project, tracker: str, *flags: str) -> str:
    """Trains in a process of its own, whose trackers write into the project."""
    command = project.command("train.py", f"--tracker={tracker}", *SMALL_RUN, *flags)
    done = subprocess.run(command, capture_output=True, text=True, cwd=project.directory)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    return done.stdout


BOTH_PARTS = {(name, part) for name in ("loss", "bits_per_character") for part in ("train", "val")}
ONE_PART = {"learning_rate", "gradient_norm", "characters_per_second"}


@pytest.mark.filterwarnings("ignore")  # aim's own
def test_aim_shows_a_run_and_its_resumption_as_one_run(project):
    aim = pytest.importorskip("aim")
    from aim.storage.context import Context

    output = train_with_tracker(project, "aim")
    output += train_with_tracker(project, "aim", "--resume", "--steps=12")
    aim_command = str(Path(sys.executable).with_name("aim"))
    reindex = [aim_command, "storage", "--repo", str(project.directory), "reindex"]
    subprocess.run(reindex, input=b"y", capture_output=True, check=True)  # as aim up does
    (run,) = aim.Repo(str(project.directory)).iter_runs()

    metrics = {
        (metric.name, metric.context.to_dict().get("subset")): metric for metric in run.metrics()
    }
    assert set(metrics) == BOTH_PARTS | {(name, None) for name in ONE_PART}
    lines = evaluations(output)
    for column, part in ((1, "train"), (2, "val")):
        steps, (losses, *_) = metrics["loss", part].data.numpy()
        tracked = dict(zip(steps.tolist(), losses.tolist(), strict=True))
        assert sorted(tracked) == [0, 3, 6, 9, 12]
        for line in lines:
            assert tracked[line[0]] == pytest.approx(line[column], abs=1e-4)

    assert "n_layer=2" in run.name
    assert run["hparams"]["vocab_size"] == len(set(project.text))
    passages = run.get_text_sequence("passage", Context({})).data.numpy()[1][0]
    assert [len(passage.data) for passage in passages] == [100] * 5
    for name, count in (("positions", 1), ("attention 0", 3), ("attention 1", 3)):
        images = run.get_image_sequence(name, Context({})).data.numpy()[1][0]
        assert len(images) == count


def test_tensorboard_shows_a_run_and_its_resumption_as_one_run(project):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = train_with_tracker(project, "tensorboard")
    output += train_with_tracker(project, "tensorboard", "--resume", "--steps=12")
    (run,) = (project.directory / "runs").iterdir()
    events = {part: EventAccumulator(str(run / part)).Reload() for part in ("train", "val")}

    lines = evaluations(output)
    for column, part in ((1, "train"), (2, "val")):
        tracked = {event.step: event.value for event in events[part].Scalars("loss")}
        assert sorted(tracked) == [0, 3, 6, 9, 12]
        for line in lines:
            assert tracked[line[0]] == pytest.approx(line[column], abs=1e-4)
    assert set(events["val"].Tags()["scalars"]) == {"loss", "bits_per_character"}
    assert set(events["train"].Tags()["scalars"]) == {"loss", "bits_per_character", *ONE_PART}
    assert set(events["train"].Tags()["images"]) == {"positions", "attention 0", "attention 1"}
    texts = events["train"].Tags()["tensors"]
    assert {"settings/text_summary", "passage/text_summary"} <= set(texts)


def test_tensorboard_forgets_what_was_written_after_the_checkpoint(project):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_with_tracker(project, "tensorboard")
    at_step_6 = project.checkpoint.read_bytes()
    train_with_tracker(project, "tensorboard", "--resume", "--steps=9")
    project.checkpoint.write_bytes(at_step_6)  # as if it had been killed before step 9
    train_with_tracker(project, "tensorboard", "--resume", "--steps=9")
    (run,) = (project.directory / "runs").iterdir()
    losses = EventAccumulator(str(run / "val")).Reload().Scalars("loss")
    assert [event.step for event in losses] == [0, 3, 6, 9]


# Mistakes


WRONG_NUMBERS = ["", "many", "nan", "-1", "1,5", "1e99", "9" * 30]
NUMBER_FIELDS = [f for f in dataclasses.fields(Settings) if f.type in (int, float)]
WRONG_PAIRS = [(f.name, value) for f in NUMBER_FIELDS for value in WRONG_NUMBERS]
WRONG_PAIRS += [(f.name, value) for f in NUMBER_FIELDS if f.type is int for value in ("1.5", "1e3")]
WRONG_PAIRS += [(f.name, "0") for f in NUMBER_FIELDS if f.metadata["minimum"] > 0]
WRONG_PAIRS += [(name, "0") for name in ("context_length", "n_layer", "n_head", "n_embd")]
WRONG_PAIRS += [
    ("device", "toaster"),
    ("device", "cuda:99"),
    ("device", ""),
    ("precision", "fp7"),
    ("optimizer", "sgd"),
    ("tracker", "wandb"),
    ("n_head", "3"),
    ("n_embd", "130"),
    ("accumulate", "5"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_PAIRS)
def test_a_wrong_value_is_an_error_with_status_2_that_names_it(trained, name, value):
    flag = "--" + name.replace("_", "-")
    error = trained.run("train.py", f"{flag}={value}", status=2).stderr
    assert flag in error or name in error


@pytest.mark.parametrize("argument", ["--nonsense", "stray", "--data"])
def test_a_wrong_argument_is_an_error_with_status_2_that_names_it(trained, argument):
    assert argument in trained.run("train.py", argument, status=2).stderr


WRONG_TEXTS = {
    "empty": (b"", "0 characters"),
    "one character": (b"a", "1 characters"),
    "short": (b"short text", "10 characters"),
    "NUL": (b"\x00" * 5, "5 characters"),
    "bad byte": (b"ab \xff" * 500, "0xff in position 3"),
    "UTF-16": (b"\xff\xfea\x00b\x00" * 200, "not UTF-8"),
}


@pytest.mark.parametrize(("text", "reason"), WRONG_TEXTS.values(), ids=WRONG_TEXTS.keys())
def test_a_text_that_cannot_be_learned_is_an_error(project, text, reason):
    project.text_file.write_bytes(text)
    assert reason in project.train(status=1).stderr
    assert not any(project.model.parent.iterdir())


WRONG_FILES = [
    ("--data=missing.txt", "missing.txt"),
    ("--data=memory.txt", "memory.txt"),  # "memory" does not make it an out-of-memory error
    ("--data=.", "directory"),
    ("--model=train.py/m.pth", "train.py"),
    ("--model=/proc/m.pth", "/proc"),
]


@pytest.mark.parametrize(("flag", "reason"), WRONG_FILES)
def test_a_file_that_cannot_be_used_is_an_error_that_names_it(project, flag, reason):
    assert reason in project.train(flag, status=1).stderr
    assert not any(project.model.parent.iterdir())


def test_without_any_text_the_error_names_the_one_that_is_missing(project):
    shutil.rmtree(project.text_file.parent)
    assert "scifi.txt" in project.train(status=1).stderr


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_an_error_that_names_it(trained, tmp_path, damage):
    model = tmp_path / "m.pth"
    checkpoint = tmp_path / "m.train.pth"
    checkpoint.write_bytes(damaged(trained.checkpoint.read_bytes(), damage))
    error = trained.train("--resume", "--model", model, status=1).stderr
    assert str(checkpoint) in error
    assert not model.exists()


# Runs a script with little memory left.
WITH_LITTLE_MEMORY = """
import resource, runpy, sys, torch, tqdm
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HUNGRY = {
    "train.py": ["--tracker=none", *SMALL_RUN, "--batch-size=1000000", "--model=m.pth"],
    "inference.py": ["--prompt=we", "--num-samples=65535", "--max-new-tokens=1000"],
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc and keeps RLIMIT_AS")
@pytest.mark.parametrize(
    ("script", "advice"), [("train.py", "--batch-size"), ("inference.py", "--num-samples")]
)
def test_too_little_memory_is_an_error_that_says_what_to_lower(trained, script, advice):
    command = [sys.executable, "-c", WITH_LITTLE_MEMORY, script, *HUNGRY[script]]
    done = subprocess.run(
        command, cwd=trained.directory, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("error: out of memory")
    assert advice in last_line
    assert "Traceback" not in done.stderr


def test_compiling_without_a_compiler_is_an_error_that_says_so(trained, tmp_path):
    environment = {
        **os.environ,
        "PATH": str(tmp_path),
        "CXX": "no-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    flags = ["--tracker=none", *SMALL_RUN, "--compile", f"--model={tmp_path / 'm.pth'}"]
    command = trained.command("train.py", *flags)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    assert "compiler" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "flags"),
    [("train.py", ["--tracker=none", *SMALL_RUN]), ("inference.py", ["--prompt=we"])],
)
def test_a_mistake_in_the_code_is_not_reported_as_wrong_input(project, script, flags):
    project.train()
    code = project.directory / "model.py"
    broken = code.read_text().replace("B, T, C = x.shape", "B, T = x.shape")
    assert broken != code.read_text()
    code.write_text(broken)
    with pytest.raises(ValueError, match="too many values to unpack"):  # Python's own error
        project.run(script, *flags)
