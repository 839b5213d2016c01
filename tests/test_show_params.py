"""What show_params.py does, as its user sees it."""

import os
import re
import statistics
import subprocess

import pytest
from conftest import DAMAGES, damaged

from model import load_model

NUMBER = r"-?\d+\.\d{4}"
ROW = re.compile(rf"^(\S+) +(\(.*\)) +([\d,]+) +({NUMBER}) +({NUMBER})$", re.MULTILINE)
TOTAL = re.compile(r"^total +([\d,]+)$", re.MULTILINE)
PAIR = re.compile(r"^([\w .]+): (.*)$", re.MULTILINE)


def integer(text: str) -> int:
    return int(text.replace(",", ""))


def test_it_shows_every_tensor_with_its_shape_and_count(trained):
    model, _, _ = load_model(trained.model)
    rows = ROW.findall(trained.run("show_params.py").stdout)
    shown = [(name, shape, integer(count)) for name, shape, count, _, _ in rows]
    expected = [(name, str(tuple(p.shape)), p.numel()) for name, p in model.named_parameters()]
    assert shown == expected


def test_it_shows_the_mean_and_the_standard_deviation_of_every_tensor(trained):
    model, _, _ = load_model(trained.model)
    for name, _, _, mean, std in ROW.findall(trained.run("show_params.py").stdout):
        values = model.get_parameter(name).flatten().tolist()
        assert float(mean) == pytest.approx(statistics.fmean(values), abs=6e-5), name
        assert float(std) == pytest.approx(statistics.pstdev(values), abs=6e-5), name


def test_it_says_what_every_kind_of_tensor_does(trained):
    output = trained.run("show_params.py").stdout
    meanings = dict(PAIR.findall(output))
    for name, *_ in ROW.findall(output):
        assert [ending for ending in meanings if name.endswith(ending)], name


def test_it_shows_the_known_characters(trained):
    meanings = dict(PAIR.findall(trained.run("show_params.py").stdout))
    shown = meanings["known characters"].split(" ")
    names = {"\n": "\\n", " ": "space"}
    assert shown == [names.get(character, character) for character in sorted(set(trained.text))]


def test_it_shows_the_total_the_sizes_and_what_was_saved_with_the_model(trained):
    model, _, metadata = load_model(trained.model)
    output = trained.run("show_params.py").stdout
    (total,) = TOTAL.findall(output)
    shown = dict(PAIR.findall(output))
    assert integer(total) == sum(p.numel() for p in model.parameters())
    assert int(shown["n_embd"]) == 16
    assert int(shown["vocab_size"]) == model.config.vocab_size
    assert int(shown["step"]) == metadata["step"]
    assert float(shown["val_loss"]) == pytest.approx(metadata["val_loss"], abs=1e-6)


@pytest.mark.parametrize("file", ["model", "checkpoint"])
def test_its_lines_fit_100_columns(trained, file):
    lines = trained.run("show_params.py", "--model", getattr(trained, file)).stdout.splitlines()
    assert max(map(len, lines)) <= 100


def test_a_reader_that_leaves_ends_it_quietly(trained):
    command = trained.command("show_params.py")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error(trained):
    with open("/dev/full", "w") as full:
        command = trained.command("show_params.py")
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert re.fullmatch("error: .*No space.*\n", done.stderr)


def test_closed_standard_output_is_no_error(trained):
    done = trained.run_with_closed("1", "show_params.py")
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_wrong_flag_is_an_error_with_status_2(trained):
    assert "--nonsense" in trained.run("show_params.py", "--nonsense", status=2).stderr


def test_a_missing_model_is_an_error_that_says_how_to_make_one(trained, tmp_path):
    done = trained.run("show_params.py", "--model", tmp_path / "m.pth", status=1)
    assert "m.pth" in done.stderr
    assert "python train.py" in done.stderr


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_an_error_that_names_it(trained, tmp_path, damage):
    path = tmp_path / "it's a 模型.pth"
    path.write_bytes(damaged(trained.model.read_bytes(), damage))
    assert str(path) in trained.run("show_params.py", "--model", path, status=1).stderr


def test_a_directory_in_place_of_a_model_is_an_error_that_names_it(trained, tmp_path):
    assert str(tmp_path) in trained.run("show_params.py", "--model", tmp_path, status=1).stderr
