"""What the tests of several scripts share."""

import contextlib
import io
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Two threads, here and in the scripts that the tests start: the losses depend on it, slightly.
THREADS = 2
os.environ["OMP_NUM_THREADS"] = str(THREADS)
torch.set_num_threads(THREADS)

SCRIPTS = ("model.py", "train.py", "inference.py", "show_params.py")
WORDS = "the ship a star we went far into night and light of old moons 'Come!' she said; slowly."

# A model that trains in a second.
SMALL_RUN = [
    "--context-length=16",
    "--n-layer=2",
    "--n-head=2",
    "--n-embd=16",
    "--batch-size=4",
    "--steps=6",
    "--eval-interval=3",
]


class Project:
    """A copy of the scripts with a text, in a directory of its own, used by commands."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.working_directory = directory
        self.text_file = directory / "data/scifi.txt"
        self.model = directory / "models/model-scifi.pth"
        self.checkpoint = directory / "models/model-scifi.train.pth"

        for name in SCRIPTS:
            shutil.copy(ROOT / name, directory)
        self.model.parent.mkdir()
        self.text_file.parent.mkdir()
        words = random.Random(0).choices(WORDS.split(), k=600)
        self.text = " ".join(words) + "\n"
        self.text_file.write_text(self.text, encoding="utf-8")

    def command(self, script: str, *flags: object) -> list[str]:
        return [sys.executable, str(self.directory / script), *map(str, flags)]

    def run(self, script: str, *flags: object, status: int = 0) -> subprocess.CompletedProcess:
        """Runs a script in this process, which saves the time of importing torch again.

        Fails if the exit status is another than `status`. With status 1 or 2, there must be one
        error message, and no traceback.
        """
        command = self.command(script, *flags)[1:]
        with (
            pytest.MonkeyPatch.context() as patch,
            restored_state(),
            captured_output() as (stdout, stderr),
        ):
            patch.setattr(sys, "argv", command)
            patch.setattr(sys, "path", [str(self.directory), *sys.path])
            patch.delitem(sys.modules, "model", raising=False)  # the script imports its own copy
            patch.chdir(self.working_directory)
            code = exit_code_of(command[0], stderr)

        done = subprocess.CompletedProcess(
            command, code, stdout.buffer.getvalue().decode(), stderr.buffer.getvalue().decode()
        )
        assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
        if status in (1, 2):
            assert len(re.findall(r"\berror: ", done.stderr)) == 1, done.stderr
            assert "Traceback" not in done.stderr
        return done

    def run_with_closed(
        self, stream: str, script: str, *flags: object
    ) -> subprocess.CompletedProcess:
        """Runs a script whose standard output ("1") or standard error ("2") is closed."""
        command = " ".join(["exec", *self.command(script, *flags), f"{stream}>&-"])
        return subprocess.run(command, shell=True, capture_output=True, text=True)

    def train(self, *flags: object, status: int = 0) -> subprocess.CompletedProcess:
        """Trains the small model, without a tracker."""
        return self.run("train.py", "--tracker=none", *SMALL_RUN, *flags, status=status)


def exit_code_of(script: str, stderr: io.TextIOWrapper) -> int:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):  # Python would print it, and exit with 1
            print(end.code, file=stderr)
            return 1
        return end.code or 0
    return 0


@contextlib.contextmanager
def captured_output():
    """Replaces standard output and standard error by files in memory that know their bytes."""
    stdout, stderr = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        yield stdout, stderr


@contextlib.contextmanager
def restored_state():
    """Restores what a script changes in its process: signal handlers and torch's threads."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(THREADS)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a trained model, which no test may change."""
    project = Project(tmp_path_factory.mktemp("trained"))
    project.train()
    return project


DAMAGES = ["empty", "text", "cut short", "noise", "flipped bit"]


def damaged(data: bytes, damage: str) -> bytes:
    """Returns what is left of a file's content after one of the damages."""
    middle = len(data) // 2
    if damage == "empty":
        return b""
    if damage == "text":
        return b"no model"
    if damage == "cut short":
        return data[:middle]
    if damage == "noise":
        return random.Random(0).randbytes(5000)
    assert damage == "flipped bit"
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
