"""What the tests of several scripts share."""

import contextlib
import io
import os
import random
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

from model import find_device

# Two threads, here and in the scripts that the tests start: the losses depend on it, slightly.
os.environ["OMP_NUM_THREADS"] = "2"
torch.set_num_threads(2)

# A shell starts background jobs with Ctrl-C ignored, and the scripts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = "the ship a star we went far into night and light of old moons 'Come!' she said; slowly."

# A model that trains in a second, on the CPU of every machine.
SMALL_RUN = [
    "--context-length=16",
    "--n-layer=2",
    "--n-head=2",
    "--n-embd=16",
    "--batch-size=4",
    "--steps=6",
    "--eval-interval=3",
    "--device=cpu",
    "--tracker=none",
]

# On Windows there are no such signals, no torchrun, and no bash but with Git.
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")


class Project:
    """A copy of the scripts with a text, in a directory of its own, used by commands."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.text_file = directory / "data/scifi.txt"
        self.model = directory / "models/model-scifi.pth"
        self.checkpoint = directory / "models/model-scifi.train.pth"

        for script in ROOT.glob("*.py"):
            shutil.copy(script, directory)
        self.model.parent.mkdir()
        self.text_file.parent.mkdir()
        words = random.Random(0).choices(WORDS.split(), k=600)
        self.text = " ".join(words) + "\n"
        self.text_file.write_text(self.text, encoding="utf-8")

    def edit(self, script: str, old: str, new: str) -> None:
        """Replaces a piece of a script, as its user would."""
        path = self.directory / script
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def command(self, script: str, *flags: object) -> list[str]:
        return [sys.executable, str(self.directory / script), *map(str, flags)]

    def run(self, script: str, *flags: object, status: int = 0) -> subprocess.CompletedProcess:
        """Runs a script in this process, which saves the time of importing torch again.

        Fails if the exit status is another than `status`. With status 1 or 2, there must be one
        error message, and no traceback.
        """
        command = self.command(script, *flags)[1:]
        stdout = io.StringIO()  # as in a notebook, not a file of the system
        stderr = io.StringIO()
        code = 0
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            patch.setattr(sys, "argv", command)
            patch.setattr(sys, "path", [str(self.directory), *sys.path])
            patch.delitem(sys.modules, "model", raising=False)  # the script imports its own copy
            patch.chdir(self.directory)
            try:
                runpy.run_path(command[0], run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
                if isinstance(code, str):  # Python would print it, and exit with 1
                    print(code, file=sys.stderr)
                    code = 1

        done = subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())
        assert code == status, f"{command}\n{done.stdout}\n{done.stderr}"
        if status in (1, 2):
            assert done.stderr.count("error: ") == 1, done.stderr
        return done

    def train(self, *flags: object, status: int = 0) -> subprocess.CompletedProcess:
        """Trains the small model, without a tracker."""
        return self.run("train.py", *SMALL_RUN, *flags, status=status)

    def start_training(self, *flags: object) -> subprocess.Popen:
        """Trains the small model in a process of its own."""
        command = self.command("train.py", *SMALL_RUN, *flags)
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a trained model, which no test may change."""
    project = Project(tmp_path_factory.mktemp("trained"))
    project.train()
    return project


@pytest.fixture(params=sorted({"cpu", find_device("auto").type}))
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and the accelerator of this machine if it has one that works."""
    return request.param
