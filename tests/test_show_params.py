import os
import re
import shlex
import subprocess

import pytest

from model import load_model


def test_it_shows_every_tensor_the_total_and_the_facts(trained):
    model, _, facts = load_model(trained.model)
    table, _, about = trained.run("show_params.py").stdout.partition("total")
    rows = re.findall(r"^(\S+) +(\(.*\)) +([\d,]+)$", table, re.M)
    tensors = dict(model.named_parameters())
    assert [name for name, _, _ in rows] == list(tensors)
    for name, shape, count in rows:
        assert (shape, int(count.replace(",", ""))) == (
            str(tuple(tensors[name].shape)),
            tensors[name].numel(),
        )
    numbers = re.findall(r"[\w,.]+", about)
    assert numbers[0].replace(",", "") == str(sum(p.numel() for p in tensors.values()))
    shown = dict(zip(numbers[1::2], map(float, numbers[2::2]), strict=True))
    assert shown["n_embd"] == 16 and shown["vocab_size"] == model.config.vocab_size
    assert shown["step"] == facts["step"] and abs(shown["val_loss"] - facts["val_loss"]) < 1e-6


def test_it_is_readable_at_100_columns_and_for_a_checkpoint_too(trained):
    for path in (trained.model, trained.checkpoint):
        assert max(map(len, trained.run("show_params.py", "--model", path).stdout.splitlines())) <= 100


def test_a_reader_that_leaves_ends_it_quietly(trained):
    with subprocess.Popen(
        trained.command("show_params.py"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_wrong_flag_is_one_line_and_status_2(trained):
    assert "--nonsense" in trained.run("show_params.py", "--nonsense", status=2).stderr


WRITERS = pytest.mark.parametrize("words", [["show_params.py"], ["inference.py", "--prompt", "we"]])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the full device, which macOS has not")
@WRITERS
def test_output_that_cannot_be_written_is_one_line(trained, words):
    command = shlex.join(trained.command(*words))
    full = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True)
    assert full.returncode == 1 and re.fullmatch("error: .*No space.*\n", full.stderr)


@WRITERS
def test_output_that_is_closed_is_quiet(trained, words):
    command = shlex.join(trained.command(*words))
    closed = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True)
    assert closed.returncode == 0 and closed.stderr == ""
