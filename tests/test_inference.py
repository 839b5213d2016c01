import os
import re
import signal
import subprocess

import pytest
from conftest import damage

from model import load_model


def infer(trained, *flags):
    return trained.run("inference.py", *flags).stdout


def test_it_writes_the_prompt_of_the_script_and_500_characters_of_the_models_own(trained):
    (prompt,) = re.findall(r'^prompt = "(.*)"', (trained.folder / "inference.py").read_text(), re.M)
    known = load_model(trained.model)[1].characters
    edited = trained.folder / "edited.py"
    edited.write_text((trained.folder / "inference.py").read_text().replace(prompt, "the ship"))
    done = trained.run("edited.py")
    edited.unlink()
    assert done.stdout.startswith("the ship") and done.stdout.endswith("\n") and done.stderr == ""
    assert len(done.stdout) == len("the ship") + 500 + 1
    assert set(done.stdout) <= set(known)


def test_a_seed_makes_it_repeatable_and_samples_do_not_depend_on_each_other(trained):
    one = infer(trained, "--prompt", "a star", "--seed", 4, "--max-new-tokens", 60)
    assert one == infer(trained, "--prompt", "a star", "--seed", 4, "--max-new-tokens", 60)
    assert one != infer(trained, "--prompt", "a star", "--seed", 5, "--max-new-tokens", 60)
    assert one != infer(trained, "--prompt", "a star", "--max-new-tokens", 60)
    many = infer(trained, "--prompt", "a star", "--seed", 4, "--max-new-tokens", 60, "--num-samples", 3)
    assert many.startswith(one + "\na star") and len(many) == 3 * len(one) + 2


def test_greedy_is_the_same_as_one_candidate_and_needs_no_seed(trained):
    greedy = infer(trained, "--prompt", "we", "--temperature", 0)
    assert (
        greedy
        == infer(trained, "--prompt", "we", "--top-k", 1)
        == infer(trained, "--prompt", "we", "--top-p", 1e-9)
    )


def test_a_text_ends_where_the_stop_text_is_written(trained):
    whole = infer(trained, "--prompt", "a", "--seed", 1)
    stop = whole[40:42]
    stopped = infer(trained, "--prompt", "a", "--seed", 1, "--stop", stop)
    assert stopped == whole[: whole.index(stop, 1) + 2] + "\n"


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_new_characters(trained, tokens):
    text = infer(trained, "--prompt", "the", "--max-new-tokens", tokens)
    assert text.startswith("the") and len(text) == 3 + tokens + 1


def test_no_prompt_begins_with_a_new_line_and_a_long_one_is_kept_whole(trained):
    empty = infer(trained, "--prompt", "", "--temperature", 0)
    assert len(empty) == 501 and "\n" + empty == infer(trained, "--prompt", "\n", "--temperature", 0)
    long = "the old moon " * 20
    assert infer(trained, "--prompt", long, "--max-new-tokens", 5).startswith(long)


def test_a_checkpoint_for_resuming_can_be_read_too(trained):
    assert len(infer(trained, "--model", trained.checkpoint, "--prompt", "we", "--max-new-tokens", 9)) == 12


def test_text_appears_as_it_is_generated(trained):
    with subprocess.Popen(
        trained.command("inference.py", "--prompt", "we", "--max-new-tokens", 10**6), stdout=subprocess.PIPE
    ) as process:
        assert len(process.stdout.read(300)) == 300  # long before the million
        process.kill()


def test_a_reader_that_leaves_and_ctrl_c_end_it_quietly(trained):
    for leave in (lambda p: p.stdout.close(), lambda p: p.send_signal(signal.SIGINT)):
        with subprocess.Popen(
            trained.command("inference.py", "--prompt", "we", "--max-new-tokens", 10**6),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            process.stdout.read(10)
            leave(process)
            assert process.stderr.read() == b""


def test_the_character_set_of_the_terminal_does_not_matter(trained):
    flags = ["--prompt", "we", "--seed", 1]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        trained.command("inference.py", *flags), capture_output=True, env=ascii_only, check=True
    )
    assert done.stdout.decode() == infer(trained, *flags)


@pytest.mark.parametrize(
    ("prompt", "name"), [("we # go", "#"), ("Ж", "U+0416"), ("我们", "U+6211"), ("🪐", "U+1FA90")]
)
def test_an_unknown_character_is_named(trained, prompt, name):
    assert name in trained.run("inference.py", "--prompt", prompt, status=1).stderr


WRONG = [["--nonsense"], ["stray"], ["--stop", ""], ["--top-p", "0"], ["--top-p", "1.1"], ["--top-k", "0"]]
WRONG += [
    ["--device", "toaster"],
    ["--device", "cuda:99"],
    ["--device", ""],
    ["--num-samples", "0"],
    ["--seed"],
]
for flag in ("--max-new-tokens", "--top-k", "--seed", "--num-samples"):
    WRONG += [[flag, value] for value in ("", "many", "nan", "-1", "1.5", "1e3", "9" * 30)]
for flag in ("--temperature", "--top-p"):
    WRONG += [[flag, value] for value in ("", "hot", "nan", "inf", "-1", "1,5")]


@pytest.mark.parametrize("flags", WRONG, ids=" ".join)
def test_a_wrong_flag_is_one_line_and_status_2(trained, flags):
    assert flags[0] in trained.run("inference.py", *flags, status=2).stderr


@pytest.mark.parametrize("script", ["inference.py", "show_params.py"])
@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut short", "noise", "flipped"])
def test_what_is_no_model_is_one_line_that_names_it(trained, tmp_path, script, kind):
    path = tmp_path / "it's a 模型.pth"
    damage(kind, trained.model.read_bytes(), path)
    error = trained.run(script, "--model", path, status=1).stderr
    assert "it's a 模型.pth" in error
    assert kind != "missing" or "python train.py" in error
