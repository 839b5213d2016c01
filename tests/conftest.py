import io
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
THREADS = 2  # of torch, here and in the scripts
os.environ["OMP_NUM_THREADS"] = str(THREADS)
torch.set_num_threads(THREADS)

SENTENCE = "the ship a star we went far into night and light of old moons 'Come!' she said; slowly."
SIZES = ["--context-length=16", "--n-layer=2", "--n-head=2", "--n-embd=16", "--batch-size=4"]
SIZES += ["--steps=6", "--eval-interval=3"]


class Workshop:
    """A copy of the scripts in a folder of its own, used as a user does: by commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.cwd = folder
        for name in ("model.py", "train.py", "inference.py", "show_params.py"):
            shutil.copy(ROOT / name, folder)
        (folder / "data").mkdir()
        (folder / "models").mkdir()
        self.model, self.checkpoint = (
            folder / "models/model-scifi.pth",
            folder / "models/model-scifi.train.pth",
        )
        self.text = " ".join(random.Random(0).choices(SENTENCE.split(), k=600)) + "\n"
        (folder / "data/scifi.txt").write_text(self.text, encoding="utf-8")

    def command(self, *words: object) -> list[str]:
        script, *flags = map(str, words)
        return [sys.executable, str(self.folder / script), *flags]

    def run(self, *words: object, status: int = 0) -> subprocess.CompletedProcess:
        """Runs a script to its end, in this process to be quick, and holds it to its exit status."""
        script, *flags = map(str, words)
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        handlers = {
            number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
        }
        code: object = 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", [script, *flags])
            patch.chdir(self.cwd)
            try:
                runpy.run_path(str(self.folder / script), run_name="__main__")
            except SystemExit as end:
                code = end.code
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(THREADS)
        printed, said = (stream.buffer.getvalue().decode() for stream in (out, err))
        if isinstance(code, str):
            code, said = 1, said + code + "\n"
        assert (code or 0) == status, f"{words}: {code}\n{printed}\n{said}"
        if status in (1, 2):
            assert [line[:7] for line in said.splitlines()] == ["error: "], said
        return subprocess.CompletedProcess(words, status, printed, said)

    def train(self, *flags: object, status: int = 0) -> subprocess.CompletedProcess:
        return self.run("train.py", "--no-aim", *SIZES, *flags, status=status)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop with a trained model, which no test may change."""
    workshop = Workshop(tmp_path_factory.mktemp("trained"))
    workshop.train()
    return workshop


def damage(kind: str, whole: bytes, path: Path) -> None:
    """Puts a damaged file there: what is left of a whole one, or something else."""
    contents = {
        "of a model": whole,
        "empty": b"",
        "text": b"no model",
        "cut short": whole[: len(whole) // 2],
        "noise": random.Random(0).randbytes(5000),
        "flipped": whole[: len(whole) // 2]
        + bytes([whole[len(whole) // 2] ^ 255])
        + whole[len(whole) // 2 + 1 :],
    }
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(contents[kind])
