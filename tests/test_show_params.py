"""What show_params.py prints."""

import re
import subprocess

import pytest

from model import load_model


@pytest.fixture
def output(trained) -> str:
    return trained.run("show_params.py").stdout


def test_it_shows_every_tensor_with_its_shape_count_mean_and_standard_deviation(trained, output):
    model, _, _ = load_model(trained.model)
    rows = []
    for name, p in model.named_parameters():
        mean = p.mean().item()
        std = (p - mean).square().mean().sqrt().item()
        rows.append([name, str(tuple(p.shape)), f"{p.numel():,}", f"{mean:.4f}", f"{std:.4f}"])

    header, *lines = output.partition("\n\n")[0].splitlines()
    assert [re.split(" {2,}", line) for line in lines[:-1]] == rows
    assert header.split() == ["parameter", "shape", "count", "mean", "std"]
    assert lines[-1].split() == ["total", f"{model.count_parameters():,}"]
    assert max(map(len, output.splitlines())) <= 100


def test_it_says_what_every_kind_of_tensor_does(trained, output):
    endings = re.findall(r"^(\S+\.\S+): ", output, re.MULTILINE)
    model, _, _ = load_model(trained.model)
    for name, _ in model.named_parameters():
        assert name.endswith(tuple(endings)), name


@pytest.mark.parametrize("file", ["model", "checkpoint"])
def test_it_shows_the_sizes_the_step_and_the_known_characters(trained, file):
    output = trained.run("show_params.py", "--model", getattr(trained, file)).stdout
    characters = " ".join(sorted(set(trained.text) - {"\n", " "}))
    for line in ("n_embd: 16", "step: 6", f"known characters: \\n space {characters}"):
        assert line in output.splitlines()


def test_a_reader_that_leaves_ends_it_quietly(trained):
    command = trained.command("show_params.py")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


WRONG_FILES = {
    "none.pth": "there is no none.pth: to train a model, run python train.py",
    "train.py": "train.py is damaged, or is not a model of this project",
    ".": ". cannot be read",
}


@pytest.mark.parametrize("file", WRONG_FILES)
def test_a_wrong_file_is_one_line_that_names_it(trained, file):
    assert WRONG_FILES[file] in trained.run("show_params.py", f"--model={file}", status=1).stderr
