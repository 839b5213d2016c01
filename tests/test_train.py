"""What train.py promises: its parts, and the program as its user sees it."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import SMALL_RUN, Project, posix_only
from torch.nn import functional as F

import train
from model import InputError, load_content, load_model
from train import (
    Muon,
    Settings,
    Trainer,
    evaluation_windows,
    loss_by_context,
    ngram_losses,
    orthogonalize,
    split_text,
)

EVALUATION = re.compile(
    r"step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4}) \((\d+\.\d\d) bits/char\)"
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
        "device": "cpu",
    }
    return Settings(**{**settings, **changes})


def resume(settings: Settings) -> Trainer:
    trainer = Trainer(settings)
    train.resume(trainer)
    return trainer


def take_steps(trainer: Trainer, last_step: int) -> None:
    while trainer.step < last_step:
        trainer.train_step()


def evaluate_and_save(trainer: Trainer) -> None:
    trainer.log.append(trainer.evaluate())
    train.save(trainer)


def evaluations(output: str) -> list[tuple[int, float, float, float]]:
    """The step, both losses and the bits per character of each evaluation."""
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    matches = [EVALUATION.fullmatch(line) for line in lines]
    return [(int(m[1]), float(m[2]), float(m[3]), float(m[4])) for m in matches]


def assert_equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight.cpu(), others[name].cpu()), name


def assert_same_weights(path: Path, other: Path) -> None:
    assert_equal(load_content(path)["weights"], load_content(other)["weights"])


# Text


def test_the_end_of_a_text_is_held_out_if_both_parts_have_a_window(project):
    settings = small_settings(project, val_fraction=0.2)
    for length in range(200):
        val_length = round(length * 0.2)
        if min(val_length, length - val_length) >= 17:
            train_ids, val_ids = split_text(torch.arange(length), settings)
            assert len(val_ids) == val_length
            assert torch.cat([train_ids, val_ids]).tolist() == list(range(length))
        else:
            with pytest.raises(InputError, match=f"it has {length} characters"):
                split_text(torch.arange(length), settings)


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


# Counting


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
    ("training", "windows"),
    [
        ("the ship went far into the old night and the moon", ["then it went", "far the m"]),
        ("ab", ["ba"]),
        ("aaaa", ["aaaaaaa"]),
        ("中文字母中文母字中文字母", ["字中文字Ж", "中文字"]),
    ],
)
def test_the_losses_to_beat_are_those_of_counting(training, windows):
    vocabulary = "".join(sorted(set(training + "".join(windows))))
    expected = {"uniform": math.log(len(vocabulary))}
    for before, name in enumerate(["unigram", "bigram", "trigram", "4-gram", "5-gram"]):
        losses = []
        for window in windows:
            for i in range(1, len(window)):
                history = window[max(0, i - before) : i]
                losses.append(-math.log(witten_bell(training, vocabulary, history, window[i])))
        expected[name] = sum(losses) / len(losses)
    assert ngram_losses(training, windows, len(vocabulary)) == pytest.approx(expected)


# Optimizers


SHAPES = [(16, 16), (64, 16), (16, 64), (5, 7)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalizing_sets_large_and_small_singular_values_to_about_1(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    singular_values = torch.logspace(-2.4, 0, min(shape))
    matrices = 100 * (u * singular_values) @ v
    assert singular_values.min() < singular_values.norm() / 200
    results = orthogonalize(matrices)
    assert torch.linalg.svdvals(results).min() > 0.67
    assert torch.linalg.svdvals(results).max() < 1.21
    for result, nearest in zip(results, u @ v, strict=True):
        assert F.cosine_similarity(result.flatten(), nearest.flatten(), dim=0) > 0.9


def reference_muon(matrix: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """One matrix after steps with the rate 0.1, the momentum 0.95 and the weight decay 0.5."""
    average = gradients[0]
    for gradient in gradients:
        average = 0.95 * average + 0.05 * gradient
        direction = 0.95 * average + 0.05 * gradient
        wide = direction.T if direction.size(0) > direction.size(1) else direction
        change = orthogonalize(wide[None])[0]
        change = change / change.norm(dim=0)
        change = 0.2 * math.sqrt(change.size(0)) * change
        change = change if wide is direction else change.T
        matrix = matrix - 0.1 * 0.5 * matrix - 0.1 * change
    return matrix


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_moves_each_matrix_of_its_parameters_by_the_definition(shape):
    torch.manual_seed(0)
    rows, columns = shape
    params = [torch.nn.Parameter(torch.randn(3 * rows, columns)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    gradients = torch.randn(4, 2, 3 * rows, columns)  # of four steps
    group = {"params": params, "stacked": 3, "lr": 0.1, "momentum": 0.95, "weight_decay": 0.5}
    optimizer = Muon([group])
    for gradients_of_step in gradients:
        for p, gradient in zip(params, gradients_of_step, strict=True):
            p.grad = gradient.clone()
        optimizer.step()

    for i, p in enumerate(params):
        for part in range(3):
            own = slice(part * rows, (part + 1) * rows)
            expected = reference_muon(before[i][own], list(gradients[:, i, own]))
            torch.testing.assert_close(p.detach()[own], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_parameter_has_one_optimizer_and_only_matrices_of_blocks_decay(project, optimizer):
    trainer = Trainer(small_settings(project, optimizer=optimizer, weight_decay=0.1))
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    owned = [id(p) for group in groups for p in group["params"]]
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    stacked = {id(p) for group in groups if group.get("stacked") == 3 for p in group["params"]}
    assert sorted(owned) == sorted(id(p) for p in trainer.model.parameters())
    for name, p in trainer.model.named_parameters():
        assert (id(p) in decaying) == (name.startswith("blocks.") and p.dim() == 2), name
        assert (id(p) in stacked) == name.endswith("qkv.weight"), name


def test_the_learning_rate_rises_and_then_falls_to_zero(project):
    settings = small_settings(project, steps=100, warmup_steps=10, learning_rate=0.003)
    rates = [Trainer(settings).get_learning_rate(step) for step in range(101)]
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0.8 < max(rates) / 0.003 <= 1
    assert rates[-1] == 0


# Trainer


def test_gradients_are_scaled_down_to_the_limit_of_their_norm(project):
    limited, free = [Trainer(small_settings(project, grad_clip=limit)) for limit in (0.001, 1e9)]
    norms = []
    for trainer in (limited, free):
        trainer.train_step()
        averages = [state["momentum_buffer"] for state in trainer.optimizers[0].state.values()]
        norms.append(math.hypot(*[average.norm().item() for average in averages]))
    assert 0 < norms[0] <= 0.001 < norms[1]


def test_the_parts_of_a_batch_add_up_to_the_batch(project):
    whole, three_parts = [Trainer(small_settings(project, accumulate=n)) for n in (1, 3)]
    for _ in range(4):
        loss = whole.train_step()
        torch.testing.assert_close(three_parts.train_step(), loss, atol=1e-5, rtol=0)
    for p, other in zip(whole.model.parameters(), three_parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, other, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("length", [17, 33, 40, 200])
def test_an_epoch_reads_each_character_once_and_begins_anywhere(project, length):
    trainer = Trainer(small_settings(project, batch_size=5, steps=400))
    trainer.train_ids = torch.arange(length)
    trainer.window_starts = trainer.draw_windows()
    starts = []
    for trainer.step in range(400):
        for window in trainer.get_batch().tolist():
            assert window == list(range(window[0], window[0] + 17))
            starts.append(window[0])

    count = max(1, (length - 1) // 16 - 1)
    epochs = [starts[i : i + count] for i in range(0, len(starts) - count + 1, count)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + 16 * count, 16))
    assert {min(epoch) for epoch in epochs} == set(range(length - 16 * count))
    if count > 1:
        assert any(epoch != sorted(epoch) for epoch in epochs)
        assert len({tuple(start - min(epoch) for start in epoch) for epoch in epochs}) > 1


def test_processes_share_a_batch(project):
    whole = Trainer(small_settings(project)).get_batch()
    shares = [Trainer(small_settings(project), rank, world=3).get_batch() for rank in range(3)]
    assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_resumed_twice_equals_one_that_was_not_interrupted(
    project, optimizer, precision, device
):
    if device == "mps" and precision == "bf16":
        pytest.skip("bf16 is refused on mps")
    changes = {"optimizer": optimizer, "precision": precision, "dropout": 0.2, "device": device}
    settings = small_settings(project, **changes)
    uninterrupted = Trainer(settings)
    take_steps(uninterrupted, 7)

    for last_step in (2, 3, 7):
        trainer = Trainer(settings) if last_step == 2 else resume(settings)
        take_steps(trainer, last_step)
        evaluate_and_save(trainer)

    saved = load_content(settings.checkpoint)
    assert_equal(saved["weights"], uninterrupted.model.state_dict())


def test_another_seed_is_another_run(project):
    first_losses = [
        Trainer(small_settings(project, seed=seed)).train_step() for seed in (1, 1, 2**40 + 1)
    ]
    assert first_losses[0] == first_losses[1]
    assert first_losses[0] != first_losses[2]


def test_an_evaluation_is_the_mean_loss_of_its_windows_and_changes_nothing(project):
    settings = small_settings(project, dropout=0.3, batch_size=3, precision="fp32")
    evaluated, plain = Trainer(settings), Trainer(settings)
    row = evaluated.evaluate()
    for part, ids in (("train", evaluated.train_ids), ("val", evaluated.val_ids)):
        windows = evaluation_windows(ids, 16, train.EVAL_WINDOWS)
        expected = [evaluated.model(w[None, :-1], w[None, 1:])[1].item() for w in windows]
        assert row[f"{part}_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert evaluated.train_step() == plain.train_step()


class StepReport:
    """Keeps the steps of the evaluations."""

    def __init__(self) -> None:
        self.steps = []

    def add(self, row: dict[str, float]) -> None:
        self.steps.append(row["step"])


def test_evaluations_come_at_their_interval_and_at_the_end_once(project):
    report = StepReport()
    train.train(Trainer(small_settings(project, steps=8, eval_interval=3)), report)
    assert report.steps == [0, 3, 6, 8]
    report = StepReport()
    train.train(resume(small_settings(project, steps=10, eval_interval=3)), report)
    assert report.steps == [9, 10]


def test_compile_trains_the_compiled_model(project, monkeypatch):
    steps = []

    def compile_model(model: torch.nn.Module) -> Callable:
        def compiled_model(*args: torch.Tensor) -> object:
            steps.append(args)
            return model(*args)

        return compiled_model

    monkeypatch.setattr(torch, "compile", compile_model)
    Trainer(small_settings(project, compile=True)).train_step()
    assert len(steps) == 1


def test_products_are_in_bf16_and_attention_and_weights_in_fp32_on_a_cpu(project):
    trainer = Trainer(small_settings(project, precision="bf16"))
    types = {}

    def keep_type(name: str) -> Callable:
        def hook(module: object, inputs: tuple, output: torch.Tensor) -> None:
            types[name] = output.dtype

        return hook

    attention = trainer.model.blocks[0].attention
    attention.qkv.register_forward_hook(keep_type("qkv"))
    attention.scaled_dot_product.register_forward_hook(keep_type("attention"))
    trainer.train_step()
    assert types == {"qkv": torch.bfloat16, "attention": torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


PROCESSORS = [({}, "fp32"), ({"avx512_bf16": False}, "fp32"), ({"avx512_bf16": True}, "bf16")]


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="torch is older than 2.12")
@pytest.mark.parametrize(("processor", "precision"), PROCESSORS)
def test_auto_takes_bf16_where_the_processor_is_fast_in_it(
    project, monkeypatch, processor, precision
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert Trainer(small_settings(project, n_embd=128)).precision == precision
    assert Trainer(small_settings(project)).precision == "fp32"


def test_bf16_is_refused_on_mps(project):
    with pytest.raises(InputError, match="use fp32"):
        train.choose_precision(small_settings(project, precision="bf16"), torch.device("mps"))


# Resuming


def save_first_checkpoint(project: Project) -> None:
    trainer = Trainer(small_settings(project))
    take_steps(trainer, 3)
    evaluate_and_save(trainer)


def test_a_resumed_run_has_the_settings_of_the_run_but_for_those_that_are_given(project):
    project.train("--dropout=0.1", "--weight-decay=0.7")
    done = project.run("train.py", "--resume", "--steps=9")
    assert "7,360 parameters" in done.stderr
    assert [step for step, *_ in evaluations(done.stdout)] == [9]
    settings = load_content(project.checkpoint)["metadata"]["settings"]
    assert settings["dropout"] == 0.1
    assert settings["weight_decay"] == 0.7
    assert settings["steps"] == 9


def test_a_run_is_resumed_with_another_weight_decay(project):
    save_first_checkpoint(project)
    resumed = resume(small_settings(project, weight_decay=0.7))
    assert resumed.optimizers[0].param_groups[0]["weight_decay"] == 0.7


def test_a_run_is_not_resumed_with_another_model_or_text_or_version_of_the_code(project):
    project.train()
    for flag in ("--n-layer=1", "--seed=2"):
        name = flag.split("=")[0]
        done = project.train("--resume", flag, status=2)
        assert re.search(rf"{name} must stay . in a resumed run", done.stderr)
    project.text_file.write_text(project.text[::-1], encoding="utf-8")
    assert "from a run on another text" in project.train("--resume", status=1).stderr
    project.model.rename(project.checkpoint)  # has no settings
    assert "another version of train.py" in project.train("--resume", status=1).stderr


def test_a_run_whose_model_was_moved_saves_no_worse_one(project):
    project.train()
    project.model.rename(project.directory / "moved.pth")
    project.train("--resume")  # has nothing to do
    project.train("--resume", "--steps=9", "--learning-rate=30")
    assert not project.model.exists()


def fail_to_save(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Lets a call of save_model fail, the first being call 0."""
    save_model = train.save_model
    calls = []

    def save_or_fail(*args: object, **metadata: object) -> None:
        calls.append(args)
        if len(calls) == call + 1:
            raise InputError("no space left")
        save_model(*args, **metadata)

    monkeypatch.setattr(train, "save_model", save_or_fail)


@pytest.mark.parametrize("call", [0, 1])
def test_a_new_run_never_leaves_the_checkpoint_of_another_beside_its_model(
    project, monkeypatch, call
):
    project.train("--n-layer=1")
    trainer = Trainer(small_settings(project))
    take_steps(trainer, 3)
    fail_to_save(monkeypatch, call)
    with pytest.raises(InputError, match="no space left"):
        evaluate_and_save(trainer)
    assert load_model(project.model)[0].config.n_layer == 1 + call
    assert not project.checkpoint.exists()


def test_a_resumed_run_keeps_its_checkpoint_until_there_is_a_new_one(project, monkeypatch):
    save_first_checkpoint(project)
    trainer = resume(small_settings(project))
    take_steps(trainer, 6)
    fail_to_save(monkeypatch, call=1)
    with pytest.raises(InputError, match="no space left"):
        evaluate_and_save(trainer)
    assert load_content(project.checkpoint)["metadata"]["step"] == 3


# The program


def test_a_run_prints_falling_losses_and_saves_the_best_model_and_a_checkpoint(project):
    done = project.train("--steps=40", "--eval-interval=10")
    lines = evaluations(done.stdout)
    assert [step for step, *_ in lines] == [0, 10, 20, 30, 40]
    assert lines[-1][1] < lines[0][1] - 0.5
    for _, _, val_loss, bits in lines:
        assert bits == pytest.approx(val_loss / math.log(2), abs=0.006)

    best_step, _, best_val_loss, _ = min(lines, key=lambda line: line[2])
    _, tokenizer, metadata = load_model(project.model)
    assert metadata["step"] == best_step
    assert metadata["val_loss"] == pytest.approx(best_val_loss, abs=1e-4)
    assert tokenizer.characters == "".join(sorted(set(project.text)))
    files = sorted(path.name for path in project.model.parent.iterdir())
    assert files == ["model-scifi.png", "model-scifi.pth", "model-scifi.train.pth"]


def test_a_run_says_what_it_trains_what_to_beat_what_it_learned_and_what_comes_next(project):
    path = Path("models/it's (1).pth")
    done = project.train("--model", path)
    model, _, metadata = load_model(project.directory / path)
    assert f"{project.text_file}: {len(project.text):,} characters" in done.stderr
    assert f"{model.count_parameters():,} parameters; cpu in fp32; charts: none" in done.stderr
    assert f"is the model of step {metadata['step']}" in done.stderr
    assert f'python inference.py --model "{path}"' in done.stderr

    lines = done.stdout.splitlines()
    trainer = Trainer(small_settings(project))
    decode = trainer.tokenizer.decode
    windows = evaluation_windows(trainer.val_ids, 16, train.EVAL_WINDOWS)
    texts = [decode(window) for window in windows]
    losses = ngram_losses(decode(trainer.train_ids), texts, trainer.tokenizer.vocab_size)
    figures = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    assert lines[0] == f"to beat: {figures} (counted in {len(trainer.train_ids):,} characters)"
    assert re.fullmatch(r"by context: 1: \d+\.\d\d, 2: .*, 8: \d+\.\d\d", lines[-1])


def test_a_log_file_has_whole_lines_and_no_progress_bar(project):
    done = project.train()
    assert "\r" not in done.stdout + done.stderr


def test_two_runs_print_the_same(project):
    first, second = [project.train("--dropout=0.1") for _ in range(2)]
    assert first.stdout == second.stdout
    assert first.stderr == second.stderr  # with the passages


def test_without_books_it_trains_on_the_sample_and_names_it(project):
    project.text_file.rename(project.directory / "data/sample.txt")
    assert "data/sample.txt: " in project.train().stderr


def test_a_chinese_text_with_thousands_of_characters_is_learned(project):
    text = "".join(chr(0x4E00 + i * i % 8000) for i in range(9000))
    novel = project.directory / "data/小说 'a'.txt"
    novel.write_text(text, encoding="utf-8")
    model = project.directory / "models/小.pth"
    project.train("--data", novel, "--model", model)
    done = project.run("inference.py", "--model", model, "--prompt=一丁", "--seed=1")
    assert len(done.stdout) == len("一丁") + 500 + len("\n")
    assert set(done.stdout) - {"\n"} < set(text)


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
    by_position = trainer.losses_by_position(trainer.val_ids, 7)
    assert loss_by_context(by_position) == pytest.approx(expected, rel=1e-5)


def test_a_text_of_one_distinct_character_and_a_context_of_one_work(project):
    project.text_file.write_text("a" * 500, encoding="utf-8")
    done = project.train("--context-length=1")
    assert len(evaluations(done.stdout)) == 3
    assert "by context: 1: 0.00" in done.stdout


@pytest.mark.parametrize("flags", [[], ["--optimizer=adamw"]])
def test_a_run_that_diverges_stops_and_keeps_the_files_of_its_last_evaluation(project, flags):
    project.train(*flags)
    before = project.model.read_bytes(), project.checkpoint.read_bytes()
    more = ["--resume", "--steps=20", "--learning-rate=1e30"]
    done = project.train(*flags, *more, status=1)
    assert re.search("error: loss diverged at step 9: lower --learning-rate", done.stderr)
    assert (project.model.read_bytes(), project.checkpoint.read_bytes()) == before


# Interruptions


KILLS = int(os.environ.get("KILLS", "4"))  # set in the environment for a longer search


def test_a_run_killed_at_random_moments_resumes_to_the_same_end(project):
    flags = ["--steps=60", "--eval-interval=5", "--dropout=0.1"]
    undisturbed = project.directory / "models/undisturbed.pth"
    project.train(*flags, "--model", undisturbed)

    def resume_flag() -> list[str]:
        return ["--resume"] if project.checkpoint.exists() else []

    rng = random.Random()
    for _ in range(KILLS):
        with project.start_training(*flags, *resume_flag()) as process:
            process.stdout.readline()
            time.sleep(0.4 * rng.random())
            process.kill()
        for path in (project.model, project.checkpoint):
            if path.exists():
                load_model(path)  # raises InputError if it is not whole

    project.train(*flags, *resume_flag())
    checkpoints = project.checkpoint, undisturbed.with_suffix(".train.pth")
    assert_same_weights(*checkpoints)
    assert_same_weights(project.model, undisturbed)
    logs = [load_content(path)["metadata"]["log"] for path in checkpoints]
    assert logs[0] == logs[1]


def close_terminal(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGHUP)


def close_standard_output(process: subprocess.Popen) -> None:
    process.stdout.close()


def press_ctrl_c(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGINT)


@posix_only
@pytest.mark.parametrize("interrupt", [close_terminal, close_standard_output, press_ctrl_c])
def test_an_interrupted_run_leaves_the_checkpoint_of_its_last_evaluation(project, interrupt):
    process = project.start_training("--steps=3000", "--eval-interval=20")
    with process.stdout as stdout, process.stderr as stderr:
        for _ in range(4):  # what to beat, steps 0, 20 and 40
            stdout.readline()
        interrupt(process)
        process.wait(timeout=60)
        errors = stderr.read()
    assert "Traceback" not in errors
    if interrupt is press_ctrl_c:
        assert process.returncode == 130
        assert re.search("same command with --resume continues from the last evaluation\n$", errors)

    saved = load_content(project.checkpoint)
    assert saved["metadata"]["step"] >= 40
    trainer = Trainer(small_settings(project, steps=3000, batch_size=4))
    take_steps(trainer, saved["metadata"]["step"])
    assert_equal(saved["weights"], trainer.model.state_dict())


def test_a_run_without_a_checkpoint_is_not_resumed(project):
    assert f"there is no {project.checkpoint}" in project.train("--resume", status=1).stderr


# Several processes


def torchrun(project: Project, processes: int, *flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *project.command("train.py")[1:]]
    return subprocess.run(
        [*command, *SMALL_RUN, *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=project.directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@posix_only
def test_two_processes_learn_what_one_does(project):
    flags = ["--batch-size=12", "--accumulate=2", "--warmup-steps=0", "--precision=fp32"]
    alone = evaluations(project.train(*flags, "--model=alone.pth", "--steps=9").stdout)
    first = torchrun(project, 2, *flags, "--steps=9", "--model=together.pth")
    assert first.returncode == 0, first.stderr
    together = evaluations(first.stdout)
    assert len(together) == len(alone) == 4
    for line, expected in zip(together, alone, strict=True):
        assert line == pytest.approx(expected, abs=5e-3)


@posix_only
def test_two_processes_that_are_killed_resume_to_the_same_end(project):
    flags = [*SMALL_RUN, "--steps=9"]
    whole = torchrun(project, 2, *flags, f"--model={project.directory / 'whole.pth'}")
    assert whole.returncode == 0, whole.stderr
    shorter = project.directory / "parts.pth"
    is_last = "if report and (is_due or trainer.step == last_step):"
    die = "if trainer.step == 5: os.kill(os.getpid(), 9)\n            "
    project.edit("train.py", is_last, die + is_last)
    assert torchrun(project, 2, *flags, f"--model={shorter}").returncode != 0
    project.edit("train.py", die, "")
    assert load_content(project.directory / "parts.train.pth")["metadata"]["step"] == 3
    resumed = torchrun(project, 2, *flags, f"--model={shorter}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(
        project.directory / "parts.train.pth", project.directory / "whole.train.pth"
    )


def test_half_an_environment_of_torchrun_is_ignored(project, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert len(evaluations(project.train().stdout)) == 3


# The picture and the trackers


def test_a_picture_that_cannot_be_written_does_not_end_training(project, monkeypatch, capsys):
    def fail(path: Path, data: bytes) -> None:
        raise InputError(f"{path} cannot be written: it is open in another program")

    monkeypatch.setattr(train, "write_file", fail)
    monkeypatch.setattr(train, "check_outputs", lambda settings: None)  # writes a file
    train.run(small_settings(project, tracker="none"))
    assert "in another program; training goes on" in capsys.readouterr().err
    assert load_model(project.checkpoint)[2]["step"] == 8


class RecordingTracker:
    """A tracker that keeps what it gets, and fails where it is told to."""

    def __init__(self, fails_in: str, error: type[BaseException]) -> None:
        self.fails_in = fails_in
        self.error = error
        self.calls = []

    def record(self, method: str, name: str = "", step: int = 0) -> None:
        self.calls.append((method, name, step))
        if method == self.fails_in:
            raise self.error("no\nspace")

    def open(self, name: str, settings: Settings) -> "RecordingTracker":
        self.record("open", name)
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.record("add_scalar", name, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self.record("add_text", name, step)

    def close(self) -> None:
        self.record("close")


def run_with_recorder(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    is_resumed: bool = False,
    fails_in: str = "",
    error: type[BaseException] = OSError,
) -> list[tuple[str, str, int]]:
    """Returns what a run sends to its tracker: methods, names and steps."""
    tracker = RecordingTracker(fails_in, error)
    monkeypatch.setattr(train, "make_tracker", tracker.open)
    train.run(small_settings(project, tracker="aim", resume=is_resumed, steps=9))
    return tracker.calls


def test_a_resumed_run_is_drawn_from_its_first_evaluation(project, monkeypatch):
    project.train("--batch-size=12", "--steps=6")
    calls = run_with_recorder(project, monkeypatch, is_resumed=True)
    assert [step for _, name, step in calls if name == "val_loss"] == [3, 6, 9]
    assert [step for method, _, step in calls if method == "add_text"] == [9]
    assert calls[-1][0] == "close"


@pytest.mark.parametrize("error", [OSError, SystemExit])
@pytest.mark.parametrize("method", ["open", "add_scalar", "add_text", "close"])
def test_a_tracker_that_fails_is_one_line_and_training_ends_with_its_model(
    project, monkeypatch, capsys, method, error
):
    run_with_recorder(project, monkeypatch, fails_in=method, error=error)
    notice = f"aim failed ({error.__name__}: no space); training goes on without charts"
    assert capsys.readouterr().err.splitlines().count(notice) == 1
    assert load_content(project.checkpoint)["metadata"]["step"] == 9


@pytest.mark.parametrize("name", ["aim", "tensorboard"])
def test_a_tracker_that_cannot_be_imported_is_one_line(project, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "aim", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = project.train(f"--tracker={name}")
    assert f"{name} failed (ModuleNotFoundError" in done.stderr
    assert project.model.exists()


def test_auto_takes_the_first_tracker_that_is_installed(monkeypatch):
    for installed, expected in [
        ({"aim", "tensorboard"}, "aim"),
        ({"tensorboard"}, "tensorboard"),
        (set(), "none"),
    ]:
        monkeypatch.setattr(train.importlib.util, "find_spec", installed.__contains__)
        assert train.choose_tracker("auto") == expected


def train_with_tracker(project: Project, tracker: str, *flags: str) -> str:
    """Trains in a process of its own, whose trackers write into the project."""
    with project.start_training(f"--tracker={tracker}", *flags) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "failed" not in stderr
    return stdout


@pytest.mark.filterwarnings("ignore")  # aim's own
def test_aim_shows_both_losses_of_a_run(project):
    aim = pytest.importorskip("aim")
    from aim.storage.context import Context

    lines = evaluations(train_with_tracker(project, "aim"))
    command = str(Path(sys.executable).with_name("aim"))
    reindex = [command, "storage", "--repo", str(project.directory), "reindex"]
    subprocess.run(reindex, input=b"y", capture_output=True, check=True)  # as aim up does
    (run,) = aim.Repo(str(project.directory)).iter_runs()
    metrics = {metric.name: metric for metric in run.metrics()}
    assert set(metrics) == {"train_loss", "val_loss"}
    for column, name in ((1, "train_loss"), (2, "val_loss")):
        steps, (losses, *_) = metrics[name].data.numpy()
        assert steps.tolist() == [0, 3, 6]
        assert losses.tolist() == pytest.approx([line[column] for line in lines], abs=1e-4)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:]{8} .*--n-layer=2 .*", run.name)
    assert run["hparams"]["n_layer"] == 2
    passages = run.get_text_sequence("passage", Context({})).data.numpy()[1][0]
    assert [len(passage.data) for passage in passages] == [100] * 3


def test_tensorboard_shows_both_losses_of_a_run(project):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = evaluations(train_with_tracker(project, "tensorboard"))
    (run,) = (project.directory / "runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    assert set(events.Tags()["scalars"]) == {"train_loss", "val_loss"}
    for column, name in ((1, "train_loss"), (2, "val_loss")):
        losses = events.Scalars(name)
        assert [event.step for event in losses] == [0, 3, 6]
        expected = [line[column] for line in lines]
        assert [event.value for event in losses] == pytest.approx(expected, abs=1e-4)
    assert "passage/text_summary" in events.Tags()["tensors"]


# Wrong input

WRONG_FLAGS = [
    *[f"--{name}=0" for name in ("steps", "batch-size", "accumulate", "context-length")],
    *[f"--{name}=0" for name in ("n-layer", "n-head", "n-embd", "eval-interval", "grad-clip")],
    *[f"--{name}=-1" for name in ("learning-rate", "warmup-steps", "weight-decay", "dropout")],
    *[f"--{name}=nan" for name in ("learning-rate", "weight-decay", "dropout", "val-fraction")],
    *["--dropout=1", "--val-fraction=1.1"],
    *["--steps=many", "--seed=1.5", "--precision=fp7", "--optimizer=sgd", "--tracker=wandb"],
    *["--nonsense", "stray", "--data", "--model=.", "--model=data/scifi.txt"],
    *["--model=models/model.train.pth"],
]


@pytest.mark.parametrize("flag", WRONG_FLAGS)
def test_a_wrong_flag_is_an_error_with_status_2_that_names_it(trained, flag):
    assert flag.partition("=")[0] in trained.run("train.py", flag, status=2).stderr


WRONG_SETTINGS = [
    ("--n-head=3", "n_head (3)"),
    ("--val-fraction=1", "too short"),
    ("--accumulate=3", "--accumulate"),
    ("--device=toaster", "--device toaster"),
    ("--data=missing.txt", "missing.txt"),
    ("--data=bin/..", "cannot be read"),
    ("--model=train.py/m.pth", "train.py"),
    (f"--model={'m' * 245}.pth", "mmm"),
]


@pytest.mark.parametrize(("flag", "reason"), WRONG_SETTINGS)
def test_what_cannot_be_used_is_found_before_training(project, flag, reason):
    done = project.train(flag, status=1)
    assert reason in done.stderr
    assert done.stdout == ""
    assert not any(project.model.parent.iterdir())


WRONG_TEXTS = {
    "empty": (b"", "it has 0 characters"),
    "one character": (b"a", "it has 1 characters"),
    "bad byte": (b"ab \xff" * 500, "0xff in position 3"),
}


@pytest.mark.parametrize(("text", "reason"), WRONG_TEXTS.values(), ids=WRONG_TEXTS.keys())
def test_a_text_that_cannot_be_learned_is_an_error_that_names_it(project, text, reason):
    project.text_file.write_bytes(text)
    error = project.train(status=1).stderr
    assert str(project.text_file) in error
    assert reason in error


@pytest.mark.parametrize("ending", [".pth", ".train.pth", ".png"])
def test_a_file_that_is_not_of_a_run_is_never_replaced(project, ending):
    path = project.directory / f"models/mine{ending}"
    path.write_text("my own notes", encoding="utf-8")
    assert str(path) in project.train(f"--model={path.parent / 'mine.pth'}", status=1).stderr
    assert path.read_text(encoding="utf-8") == "my own notes"


def test_a_model_of_another_model_py_can_be_replaced(project):
    project.train()
    project.edit("model.py", "4 * config.n_embd", "2 * config.n_embd")
    project.train()
    bias = load_content(project.model)["weights"]["blocks.0.feed_forward.expand.bias"]
    assert bias.shape == (32,)


# Mistakes in edited code


MISTAKES = [
    ("B, T, C = x.shape", "B, T = x.shape", "ValueError: too many values to unpack"),
    (".view(B, T, 3, H, D)", ".view(B, T, 2, H, D)", "RuntimeError: shape "),
]


@pytest.mark.parametrize(("right", "wrong", "error"), MISTAKES)
@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_a_mistake_in_edited_code_shows_its_traceback(project, flags, right, wrong, error):
    project.edit("model.py", right, wrong)
    with project.start_training(*flags) as process:
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 1
    assert 'model.py", line' in stderr
    assert error in stderr


@posix_only
def test_a_mistake_in_edited_code_shows_its_traceback_in_several_processes(project):
    project.edit("model.py", "B, T, C = x.shape", "B, T = x.shape")
    done = torchrun(project, 2)
    assert done.returncode != 0
    assert 'model.py", line' in done.stderr
    assert "too many values to unpack" in done.stderr


def test_a_file_that_edited_code_does_not_find_shows_its_traceback(project):
    project.edit("train.py", "batch = self.get_batch()", 'batch = open("none.json")')
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        project.train()
