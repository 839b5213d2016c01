"""The commands and the Python blocks of README.md, run as they stand there."""

import contextlib
import importlib.util
import io
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT, Project

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
BASH_BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

# A run of the default model that takes seconds, on the CPU of every machine.
SHORT_RUN = ["--steps=4", "--batch-size=4", "--device=cpu", "--tracker=none"]
# What the tests cannot run: it changes the machine, needs the network, or waits for a browser.
NOT_RUN = ("python3 -m venv", "source", "pip install", "git", "aim up", "tensorboard")


def commands() -> list[str]:
    """Every command in a block or in the text that can be run, in order, each once."""
    lines = []
    for block in BASH_BLOCKS:
        lines += block.replace("\\\n", "").splitlines()
    scripts = r"(?:python (?:bin/)?\w+\.py|bash bin/\w+\.sh|torchrun)"
    lines += re.findall(rf"`({scripts}[^`\n]*)`", README)
    lines = [" ".join(shlex.split(line, comments=True)) and line for line in lines]
    return [line for line in dict.fromkeys(lines) if line and not line.startswith(NOT_RUN)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the sample as its text, and a model of the default sizes."""
    project = Project(tmp_path_factory.mktemp("readme"))
    sample = (ROOT / "data/sample.txt").read_text(encoding="utf-8")
    for path in (project.text_file, project.directory / "data/sample.txt"):
        path.write_text(sample[-80_000:], encoding="utf-8")  # counting takes less time
    project.run("train.py", *SHORT_RUN)
    return project


def parse_download(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets bin/download.py parse its flags; downloading needs the network."""
    spec = importlib.util.spec_from_file_location("download", ROOT / "bin/download.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", words)
    script.parse_arguments()


@pytest.mark.parametrize("command", commands())
def test_every_command_runs(project, monkeypatch, command):
    command = command.replace("FILE.png", "picture.png").replace("FILE", "data/sample.txt")
    words = shlex.split(command, comments=True)
    if words[:2] == ["bash", "bin/concatenate.sh"]:
        assert len(words) <= 3
    elif words[0] == "torchrun":
        assert "train.py" in words
    elif words[1] == "bin/download.py":
        parse_download(words[1:], monkeypatch)
    elif words[1] == "train.py":
        flags = [*words[2:], *SHORT_RUN, "--n-embd=48", "--context-length=32"]
        if "--resume" in words:
            flags = [*words[2:], *SHORT_RUN]
        if "--model" not in words and "--resume" not in words:
            flags.append(f"--model={project.directory / 'models/command.pth'}")
        project.run("train.py", *[flag for flag in flags if flag != "--compile"])
    else:
        assert words[1] in ("inference.py", "show_params.py"), command
        monkeypatch.setattr(sys, "stdin", io.StringIO("The moon\n"))
        flags = ["--device=cpu"] if words[1] == "inference.py" else []
        project.run(words[1], *words[2:], *flags)


def test_the_python_blocks_run_in_their_order(project, monkeypatch):
    monkeypatch.chdir(project.directory)
    threads = torch.get_num_threads()
    namespace = {}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for block in PYTHON_BLOCKS:
            exec(compile(block, "README.md", "exec"), namespace)
    assert len(PYTHON_BLOCKS) >= 6
    assert torch.get_num_threads() == threads
    # The numbers of attention by hand, which do not depend on the model.
    assert "[0.2483, 0.2483, 0.5035]" in output.getvalue()


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http|#)([^)]+)\)", README))
def test_every_link_to_a_file_leads_to_one(target):
    assert (ROOT / target).exists()
