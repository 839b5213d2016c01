import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

SENTENCE = "the ship a star we went far into night and light of old moons 'Come!' she said; slowly."
SIZES = "--context-length 16 --n-layer 2 --n-head 2 --n-embd 16 --batch-size 4 --steps 6 --eval-interval 3"


class Workshop:
    """A copy of the scripts in a folder of its own, used as a user does: by commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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

    def run(self, *words: object, status: int = 0, **options) -> subprocess.CompletedProcess:
        """Runs a script to its end and holds it to its exit status; a failure is one line."""
        options = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 120, **options}
        done = subprocess.run(self.command(*words), **options)
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        if status in (1, 2):
            assert [line[:7] for line in done.stderr.splitlines()] == ["error: "], done.stderr
        return done

    def train(self, *flags: object, **options) -> subprocess.CompletedProcess:
        return self.run("train.py", "--no-aim", *SIZES.split(), *flags, **options)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A workshop with a trained model, which no test may change."""
    workshop = Workshop(tmp_path_factory.mktemp("trained"))
    workshop.train()
    return workshop


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts under test see two threads, and warnings of theirs are errors there."""
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "2")
