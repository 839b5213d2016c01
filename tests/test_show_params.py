"""What show_params.py prints."""

import re
import statistics
import subprocess

import pytest

from model import load_model

NUMBER = r"-?\d+\.\d{4}"
ROW = re.compile(rf"^(\S+) +(\(.*\)) +([\d,]+) +({NUMBER}) +({NUMBER})$", re.MULTILINE)
TOTAL = re.compile(r"^total +([\d,]+)$", re.MULTILINE)
PAIR = re.compile(r"^([\w .]+): (.*)$", re.MULTILINE)


def integer(text: str) -> int:
    return int(text.replace(",", ""))


def test_it_shows_every_tensor_with_its_shape_count_mean_and_standard_deviation(trained):
    model, _, _ = load_model(trained.model)
    output = trained.run("show_params.py").stdout
    rows = ROW.findall(output)
    assert [name for name, *_ in rows] == [name for name, _ in model.named_parameters()]
    for name, shape, count, mean, std in rows:
        p = model.get_parameter(name)
        values = p.flatten().tolist()
        assert (shape, integer(count)) == (str(tuple(p.shape)), p.numel())
        assert float(mean) == pytest.approx(statistics.fmean(values), abs=6e-5), name
        assert float(std) == pytest.approx(statistics.pstdev(values), abs=6e-5), name
    (total,) = TOTAL.findall(output)
    assert integer(total) == sum(p.numel() for p in model.parameters())
    assert max(map(len, output.splitlines())) <= 100


def test_it_says_what_every_kind_of_tensor_does(trained):
    output = trained.run("show_params.py").stdout
    meanings = dict(PAIR.findall(output))
    for name, *_ in ROW.findall(output):
        assert [ending for ending in meanings if name.endswith(ending)], name


@pytest.mark.parametrize("file", ["model", "checkpoint"])
def test_it_shows_the_sizes_the_step_and_the_known_characters(trained, file):
    output = trained.run("show_params.py", "--model", getattr(trained, file)).stdout
    shown = dict(PAIR.findall(output))
    assert int(shown["n_embd"]) == 16
    assert int(shown["vocab_size"]) == len(set(trained.text))
    assert int(shown["step"]) == 6
    names = {"\n": "\\n", " ": "space"}
    characters = [names.get(character, character) for character in sorted(set(trained.text))]
    assert shown["known characters"].split(" ") == characters


def test_a_reader_that_leaves_ends_it_without_a_traceback(trained):
    command = trained.command("show_params.py")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("flag", "status", "reason"),
    [
        ("--nonsense", 2, "--nonsense"),
        ("--model=none.pth", 1, "there is no none.pth: to train a model, run python train.py"),
        ("--model=train.py", 1, "train.py is damaged, or is not a model of this project"),
        ("--model=.", 1, ". cannot be read"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(trained, flag, status, reason):
    assert reason in trained.run("show_params.py", flag, status=status).stderr
