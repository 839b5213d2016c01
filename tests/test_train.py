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
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import SIZES, damage

from model import load_model
from train import Muon, Run, Settings, load_text, windows_of

LINE = re.compile(r"step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4}) \((\d+\.\d\d) bits/char\)")


def settings_of(workshop, **changes) -> Settings:
    sizes = {"context_length": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "batch_size": 12, "steps": 8}
    files = {"data": workshop.folder / "data/scifi.txt", "model": workshop.model}
    return Settings(**{**files, **sizes, "eval_interval": 3, "eval_windows": 5, "device": "cpu", **changes})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path)[0].state_dict()


def assert_same_weights(path: Path, other: Path) -> None:
    for (name, a), b in zip(weights(path).items(), weights(other).values(), strict=True):
        assert torch.equal(a, b), f"{name}: {(a - b).abs().max()}"


# Text


@pytest.mark.parametrize("text", ["a\r\nb\rc\n", "Ж中🪐 e\u0301\n", "\ufeff\ufeffa", "中" * 700_000 + "🪐"])
def test_a_text_is_read_as_it_is_but_for_a_first_byte_order_mark(tmp_path, text):
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    ids, tokenizer, _ = load_text(path)
    assert tokenizer.decode(ids) == text.removeprefix("\ufeff")


@pytest.mark.parametrize("before", [b"", b"abc", "中".encode() * 400_000, b"a" * 2**20])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe4\xb8", b"\xc0\x80", b"caf\xe9 "])
def test_what_is_not_utf8_is_refused_with_its_first_bad_byte(tmp_path, before, bad):
    path = tmp_path / "t.txt"
    path.write_bytes(before + bad)
    with pytest.raises(UnicodeDecodeError) as oracle:
        path.read_bytes().decode()
    position = oracle.value.start
    with pytest.raises(ValueError, match=rf"position {position}\b"):
        load_text(path)


def test_a_text_that_changes_while_it_is_read_is_read_in_one_of_its_states(tmp_path, monkeypatch):
    path, states, read = tmp_path / "t.txt", ["one and " * 400, "another " * 300], Path.read_bytes
    path.write_text(states[0])

    def read_bytes(self: Path) -> bytes:
        data = read(self)
        self.write_text(states[1])
        return data

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    for state in states:
        ids, tokenizer, digest = load_text(path)
        assert tokenizer.decode(ids) == state
        assert digest == hashlib.sha256(state.encode()).hexdigest()


def test_texts_have_the_same_digest_only_if_they_are_the_same(tmp_path):
    digests = set()
    for name, text in {"a": "one", "b": "one", "c": "eno"}.items():
        (tmp_path / name).write_text(text)
        digests.add(load_text(tmp_path / name)[2])
    assert len(digests) == 2


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_tail_is_held_out_and_too_short_a_text_is_refused_with_both_lengths(workshop, share):
    settings = settings_of(workshop, val_fraction=share)
    needed = None
    for length in range(0, 400):
        try:
            windows, eval_sets = windows_of(torch.arange(length), settings)
        except ValueError as error:
            found, needed = map(int, re.findall(r"(\d+) characters.*at least (\d+)", str(error))[0])
            assert found == length
            continue
        border = length - round(length * share)
        assert windows.tolist() == [[*range(i, i + 17)] for i in range(border - 16)]
        assert eval_sets["train"].max() < border <= eval_sets["val"].min()
    windows_of(torch.arange(needed), settings)


@pytest.mark.parametrize("length", [34, 36, 66, 160, 162, 164, 1000])
def test_the_windows_of_an_evaluation_are_spread_over_their_part_and_not_over_each_other(workshop, length):
    settings = settings_of(workshop, val_fraction=0.5)
    for rows in windows_of(torch.arange(length), settings)[1].values():
        assert rows.shape == (min(5, (length // 2 - 1) // 16), 17)
        assert all(row == [*range(row[0], row[0] + 17)] for row in rows.tolist())
        starts = rows[:, 0].tolist()
        assert all(b - a >= 16 for a, b in pairwise(starts))
        assert starts[-1] - starts[0] >= 0.7 * (length // 2) - 32


# Optimizers


def muon(params: list[torch.Tensor], weight_decay: float, lr: float) -> Muon:
    return Muon([{"params": params, "weight_decay": weight_decay, "lr": lr}], {"momentum": 0.95})


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (64, 16), (16, 64), (5, 7)])
def test_muon_moves_a_matrix_alike_in_all_directions(shape):
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.zeros(shape))
    matrix.grad = torch.randn(shape)
    muon([matrix], 0.0, 1.0).step()
    parts = matrix.detach().chunk(3 if shape[0] == 3 * shape[1] else 1)
    for part, gradient in zip(parts, matrix.grad.chunk(len(parts)), strict=True):
        moved = -part / (0.2 * math.sqrt(max(part.shape)))
        singular = torch.linalg.svdvals(moved)
        assert singular.min() > 0.3 and singular.max() < 1.5
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(moved.flatten(), (u @ v).flatten(), dim=0) > 0.9
        each = (moved if part.size(0) > part.size(1) else moved.mT).norm(dim=1)  # on the longer side
        torch.testing.assert_close(each, torch.full_like(each, math.sqrt(min(part.shape) / max(part.shape))))


def test_muon_averages_gradients_and_looks_ahead():
    torch.manual_seed(0)
    first, second = torch.randn(2, 16, 16)
    matrix = torch.nn.Parameter(torch.zeros(16, 16))
    optimizer = muon([matrix], 0.0, 1.0)
    for matrix.grad in (first, second):
        before = matrix.detach().clone()
        optimizer.step()
    average = 0.95 * first + 0.05 * second
    u, _, v = torch.linalg.svd(0.95 * average + 0.05 * second)
    moved = (before - matrix.detach()).flatten()
    assert torch.nn.functional.cosine_similarity(moved, (u @ v).flatten(), dim=0) > 0.9


def test_muon_decays_a_matrix_that_no_gradient_moves():
    matrix = torch.nn.Parameter(torch.ones(4, 6))
    matrix.grad = torch.zeros(4, 6)
    muon([matrix], weight_decay=0.5, lr=0.1).step()
    torch.testing.assert_close(matrix.detach(), torch.full((4, 6), 0.95))


def test_muon_treats_matrices_together_as_it_would_one_by_one():
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(8, 24)) for _ in range(3)] + [
        torch.nn.Parameter(torch.randn(24, 8))
    ]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [muon(together, 0.1, 0.01), *[muon([p], 0.1, 0.01) for p in alone]]
    for _ in range(3):
        for a, b in zip(together, alone, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_parameter_has_one_optimizer_and_only_the_blocks_matrices_decay(workshop, optimizer):
    run = Run(settings_of(workshop, optimizer=optimizer, weight_decay=0.1))
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, run.model.parameters()))
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in run.model.named_parameters() if id(p) in decaying}
    assert names == {n for n, p in run.model.named_parameters() if n.startswith("blocks.") and p.dim() == 2}


@pytest.mark.parametrize(("optimizer", "share"), [("muon", 1.0), ("adamw", 0.1)])
def test_the_learning_rate_rises_and_falls_to_zero(workshop, optimizer, share):
    run = Run(settings_of(workshop, steps=100, warmup_steps=10, optimizer=optimizer))
    rates = []
    for run.step in range(101):
        rates.append(run.learning_rate())
    assert rates[-1] == 0 and 0.8 < max(rates) / (share * run.settings.learning_rate) <= 1
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))


# Runs


def test_parts_of_a_batch_add_up_to_the_batch(workshop):
    runs = [Run(settings_of(workshop, accumulate=parts)) for parts in (1, 3, 12)]
    for _ in range(4):
        losses, norms = zip(*[run.take_step() for run in runs], strict=True)
        torch.testing.assert_close(torch.stack(losses), losses[0].expand(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.stack(norms), norms[0].expand(3), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_resumed_again_and_again_equals_one_that_was_not_interrupted(workshop, optimizer, precision):
    settings = settings_of(workshop, optimizer=optimizer, precision=precision, dropout=0.2)
    whole = Run(settings)
    while whole.step < 7:
        whole.take_step()
    for stop in (2, 3, 7):
        part = Run(dataclasses.replace(settings, resume=stop > 2))
        while part.step < stop:
            part.take_step()
        part.save()
    saved = weights(part.checkpoint)
    assert all(torch.equal(saved[name], p) for name, p in whole.model.state_dict().items())


def test_another_seed_is_another_run(workshop):
    a, b, c = (Run(settings_of(workshop, seed=seed)).take_step()[0] for seed in (1, 1, 2**40 + 1))
    assert a == b != c


def test_the_evaluation_is_the_mean_over_the_fixed_windows_and_leaves_no_trace(workshop):
    run = Run(settings_of(workshop, dropout=0.3, batch_size=3))
    run.take_step()
    found = run.evaluate()
    assert run.evaluate() == found
    for name, rows in run.eval_sets.items():
        losses = [run.model(row[None, :-1], row[None, 1:])[1].item() for row in rows]
        assert found[name] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 1},
        {"n_embd": 32},
        {"context_length": 8},
        {"dropout": 0.5},
        {"optimizer": "adamw"},
        {"weight_decay": 0.5},
        {"val_fraction": 0.2},
        {"eval_windows": 3},
    ],
)
def test_resuming_with_what_is_fixed_for_a_run_changed_is_refused_by_name(workshop, change):
    Run(settings_of(workshop)).save()
    with pytest.raises(ValueError, match=next(iter(change))):
        Run(settings_of(workshop, resume=True, **change))


def test_models_beside_each_other_have_checkpoints_of_their_own(workshop):
    folder = workshop.model.parent
    names = {Run(settings_of(workshop, model=folder / name)).checkpoint.name for name in ("a.1", "a.2", "a")}
    assert names == {"a.1.train.pth", "a.2.train.pth", "a.train.pth"}


def test_resuming_on_another_text_is_refused_and_other_steps_are_not(workshop):
    Run(settings_of(workshop)).save()
    Run(settings_of(workshop, resume=True, steps=20, eval_interval=1, learning_rate=0.1))
    (workshop.folder / "data/scifi.txt").write_text(workshop.text[::-1])
    with pytest.raises(ValueError, match="'text':"):
        Run(settings_of(workshop, resume=True))


# The program


def test_a_run_prints_its_losses_and_saves_the_best_model(workshop):
    done = workshop.train("--steps", 40, "--eval-interval", 10)
    steps, train_losses, val_losses, bits = zip(
        *[map(float, LINE.fullmatch(x).groups()) for x in done.stdout.splitlines()], strict=True
    )
    assert steps == (0, 10, 20, 30, 40) and "aim" not in done.stderr
    assert train_losses[-1] < train_losses[0] - 0.5
    assert all(abs(nats / math.log(2) - b) < 0.006 for nats, b in zip(val_losses, bits, strict=True))
    _, tokenizer, facts = load_model(workshop.model)
    assert facts == {
        "step": 10 * val_losses.index(min(val_losses)),
        "val_loss": pytest.approx(min(val_losses), abs=1e-4),
    }
    assert tokenizer.characters == "".join(sorted(set(workshop.text)))
    assert "char/s" in done.stderr and "loss=" in done.stderr
    assert sorted(p.name for p in workshop.model.parent.iterdir()) == [
        "model-scifi.pth",
        "model-scifi.train.pth",
    ]


def test_two_runs_print_the_same(workshop):
    assert workshop.train("--dropout", 0.1).stdout == workshop.train("--dropout", 0.1).stdout


def test_without_books_it_learns_the_sample_and_names_the_commands(workshop, tmp_path):
    (workshop.folder / "data/scifi.txt").rename(workshop.folder / "data/sample.txt")
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    workshop.cwd = elsewhere
    done = workshop.train()
    assert "python bin/download.py" in done.stderr and "bash bin/concatenate.sh" in done.stderr
    assert workshop.model.exists() and not any(elsewhere.iterdir())


def test_chinese_with_thousands_of_characters_is_learned(workshop):
    novel = workshop.folder / "data/小说 'a'.txt"
    novel.write_text("".join(chr(0x4E00 + i * i % 8000) for i in range(9000)), encoding="utf-8")
    workshop.train("--data", novel, "--model", workshop.folder / "models/小.pth")
    done = workshop.run(
        "inference.py", "--model", workshop.folder / "models/小.pth", "--prompt", "一丁", "--seed", 1
    )
    assert len(done.stdout) == 503 and set(done.stdout) - {"\n"} < set(novel.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(workshop, number, status):
    flags = ["--no-aim", *SIZES, "--steps", 3000, "--eval-interval", 20]
    process = subprocess.Popen(
        workshop.command("train.py", *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    stopped = load_model(workshop.checkpoint)[2]["step"]
    assert process.returncode == status and "Traceback" not in err
    assert f"stopped at step {stopped}: the same command with --resume goes on" in err
    assert LINE.match(lines[-1]).group(1) == "40" and stopped >= 40
    resumed = workshop.run("train.py", *flags, "--resume", "--steps", stopped + 20)
    assert int(LINE.match(resumed.stdout).group(1)) > stopped


def test_killed_at_random_moments_it_goes_on_to_the_same_end(workshop):
    flags = ["--steps", 60, "--eval-interval", 5, "--dropout", 0.1]
    undisturbed = workshop.folder / "models/undisturbed.pth"
    workshop.train(*flags, "--model", undisturbed)
    for delay in (0.0, 0.13, 0.29):
        command = workshop.command("train.py", "--no-aim", *SIZES, *flags, "--resume")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        for path in (workshop.model, workshop.checkpoint):
            assert not path.exists() or load_model(path)
    workshop.train(*flags, "--resume")
    assert_same_weights(workshop.checkpoint, undisturbed.with_suffix(".train.pth"))
    assert_same_weights(workshop.model, undisturbed)


def test_without_a_checkpoint_resuming_starts_anew_and_says_so(workshop):
    assert "starting anew" in workshop.train("--resume").stderr


def test_a_diverged_run_stops_and_leaves_the_best_model(workshop):
    workshop.train()
    before = workshop.model.read_bytes(), workshop.checkpoint.read_bytes()
    flags = ["--optimizer", "adamw", "--learning-rate", 1e9, "--steps", 50, "--eval-interval", 50]
    with pytest.raises(AssertionError, match=r"error: step \d+: loss .* lower --learning-rate"):
        workshop.train(*flags)
    assert (workshop.model.read_bytes(), workshop.checkpoint.read_bytes()) == before


def test_an_update_that_ruins_the_model_is_not_saved(workshop):
    workshop.train()
    before = workshop.model.read_bytes(), workshop.checkpoint.read_bytes()
    flags = ["--resume", "--steps=9", "--eval-interval=1", "--learning-rate=1e9", "--grad-clip=1e9"]
    with pytest.raises(AssertionError, match=r"error: step \d+: .* lower --learning-rate"):
        workshop.train(*flags)
    assert (workshop.model.read_bytes(), workshop.checkpoint.read_bytes()) == before


def torchrun(workshop, processes: int, *flags: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    command += workshop.command("train.py", "--no-aim", *SIZES, *flags)[1:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_of_several_processes_one_says_what_is_wrong(workshop):
    done = torchrun(workshop, 2, "--batch-size=5")
    assert done.returncode == 1
    assert re.findall("^error: .*", done.stderr, re.M) == [
        "error: --batch-size must be a multiple of 2 processes x 1"
    ]
    assert 'train.py", line' not in done.stderr


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_several_processes_learn_as_one(workshop, processes):
    flags = ["--batch-size=12", "--warmup-steps=0", f"--model={workshop.folder / 'models/many.pth'}"]
    alone = workshop.train(*flags).stdout
    together = torchrun(workshop, processes, *flags)
    assert together.returncode == 0, together.stderr
    numbers = [[float(x) for x in re.findall(r"\d+\.\d+", text)] for text in (alone, together.stdout)]
    assert len(numbers[0]) == 9 and numbers[1] == pytest.approx(numbers[0], abs=2e-3)


# Aim


def train_with_aim(workshop, *flags) -> subprocess.CompletedProcess:
    command = workshop.command("train.py", *SIZES, *flags)
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=workshop.folder)


def test_a_broken_aim_is_said_in_a_line_and_training_runs_the_same(workshop):
    (workshop.folder / "aim.py").write_text("raise RuntimeError('broken')")
    done = train_with_aim(workshop)
    assert "losses are not tracked with aim: broken" in done.stderr
    assert done.stdout == workshop.train().stdout


def test_aim_that_fails_in_the_middle_does_not_end_training(workshop):
    (workshop.folder / "aim.py").write_text(
        "class Run(dict):\n    hash = 'a'\n    def __init__(self, *_, **__): ...\n"
        "    def track(self, *_, **__): raise OSError('no space for this')\nText = Image = None\n"
    )
    done = train_with_aim(workshop)
    assert done.stderr.count("losses are not tracked with aim: no space for this") == 1
    assert done.stdout == workshop.train().stdout


@pytest.mark.filterwarnings("ignore")  # aim's own
def test_aim_gets_all_there_is_to_see_and_a_resumed_run_goes_on_in_it(workshop):
    Repo = pytest.importorskip("aim").Repo  # there is none for Windows and Python 3.13
    from aim.storage.context import Context

    lines = train_with_aim(workshop).stdout + train_with_aim(workshop, "--resume", "--steps=12").stdout
    aim = [str(Path(sys.executable).with_name("aim")), "storage", "--repo", str(workshop.folder)]
    subprocess.run([*aim, "reindex"], input=b"y", capture_output=True, check=True)  # as aim up does
    (run,) = Repo(str(workshop.folder)).iter_runs()
    metrics = {(metric.name, metric.context.to_dict().get("subset")): metric for metric in run.metrics()}
    alone = {(name, None) for name in ("learning_rate", "gradient_norm", "characters_per_second")}
    both = {(name, subset) for name in ("loss", "bits_per_character") for subset in ("train", "val")}
    assert set(metrics) == alone | both
    printed = [tuple(map(float, LINE.fullmatch(line).groups())) for line in lines.splitlines()]
    for column, subset in ((1, "train"), (2, "val")):
        steps, (losses, *_) = metrics["loss", subset].data.numpy()
        tracked = sorted(zip(steps.tolist(), losses.tolist(), strict=True))
        assert [step for step, _ in tracked] == [0, 3, 6, 9, 12]
        assert [loss for _, loss in tracked] == pytest.approx([line[column] for line in printed], abs=1e-4)
    assert run["hparams"]["n_embd"] == 16 and run["hparams"]["vocab_size"] == len(set(workshop.text))
    passages = run.get_text_sequence("passage", Context({})).data.numpy()[1][0]
    assert [len(text.data) for text in passages] == [101] * 5
    (positions,) = run.get_image_sequence("positions", Context({})).data.numpy()[1][0]
    assert positions.size == (384, 384)  # 16 positions by 16 channels, enlarged
    for block in range(2):
        pictures = run.get_image_sequence("attention", Context({"block": block})).data.numpy()[1][0]
        assert len(pictures) >= 2
        for picture in pictures:  # a square for each of 2 heads
            pixels = torch.tensor([*picture.to_pil_image().resize((32, 16), 0).tobytes()]).view(16, 2, 16)
            for head in pixels.unbind(1):
                assert torch.equal(head, head.tril()) and head[0, 0] == 255


# Mistakes

LITTLE_MEMORY = """
import resource, runpy, sys, train
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, resource.RLIM_INFINITY))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and RLIMIT_AS kept, unlike macOS")
@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["train.py", "--no-aim", *SIZES, "--batch-size=1000000"], "--batch-size"),
        (["inference.py", "--prompt=we", "--num-samples=65535", "--max-new-tokens=1000"], "--num-samples"),
    ],
)
def test_out_of_memory_is_one_line_that_names_what_to_lower(trained, tmp_path, words, advice):
    if words[0] == "train.py":
        words = [*words, f"--model={tmp_path / 'm.pth'}"]
    command = [sys.executable, "-c", LITTLE_MEMORY, *words]
    done = subprocess.run(command, cwd=trained.folder, capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("error: out of memory") and advice in last


def test_without_a_compiler_compile_is_answered_with_one_line(trained, tmp_path):
    nothing = {"PATH": str(tmp_path), "CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = trained.command("train.py", "--no-aim", "--compile", *SIZES, f"--model={tmp_path / 'm.pth'}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **nothing})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "compiler" in done.stderr.splitlines()[-1]


WRONG = [["--nonsense"], ["stray"], ["--device", "toaster"], ["--device", "cuda:99"], ["--device", ""]]
WRONG += [["--precision", "fp7"], ["--precision", ""], ["--optimizer", "sgd"], ["--no-aim=yes"], ["--data"]]
WRONG += [["--n-head", "3"], ["--n-embd", "130"], ["--batch-size", "5", "--accumulate", "2"]]
for f in dataclasses.fields(Settings):
    flag = "--" + f.name.replace("_", "-")
    if f.type in (int, float):
        WRONG += [[flag, value] for value in ("", "many", "nan", "-1", "1,5", "1e99", "9" * 30)]
    if f.metadata["range"][0] > 0:
        WRONG += [[flag, "0"]]
    if f.type is int:
        WRONG += [[flag, "1.5"], [flag, "1e3"]]


@pytest.mark.parametrize("flags", WRONG, ids=" ".join)
def test_a_wrong_flag_is_one_line_and_status_2(trained, flags):
    assert flags[0].partition("=")[0] in trained.run("train.py", *flags, status=2).stderr


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        (b"", [], "0 characters"),
        (b"a", [], "1 characters"),
        (b"short text", [], "10 characters"),
        (b"ab \xff" * 500, [], "0xff in position 3"),
        (None, ["--data", "missing.txt"], "missing.txt"),
        (None, ["--data", "memory.txt"], "memory.txt"),
        (None, ["--data", "."], "directory"),
        (None, ["--model", "train.py/m.pth"], "train.py"),
        (None, ["--model", "/proc/m.pth"], "/proc"),
        (b"\xff\xfea\x00b\x00" * 200, [], "not UTF-8"),
        (b"\x00" * 5, [], "5 characters"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line_and_status_1(workshop, text, flags, says):
    if text is not None:
        (workshop.folder / "data/scifi.txt").write_bytes(text)
    assert says in workshop.train(*flags, status=1).stderr
    assert not any(workshop.model.parent.iterdir())


def test_without_any_text_the_error_names_the_one_that_is_missing(workshop):
    shutil.rmtree(workshop.folder / "data")
    assert "scifi.txt" in workshop.train(status=1).stderr


@pytest.mark.parametrize("kind", ["folder", "empty", "text", "cut short", "noise", "flipped", "of a model"])
def test_a_checkpoint_that_cannot_be_resumed_is_one_line_that_names_it(trained, tmp_path, kind):
    model = tmp_path / "m.pth"
    whole = (trained.model if kind == "of a model" else trained.checkpoint).read_bytes()
    damage(kind, whole, model.with_suffix(".train.pth"))
    assert "m.train.pth" in trained.train("--resume", "--model", model, status=1).stderr
    assert not model.exists()
