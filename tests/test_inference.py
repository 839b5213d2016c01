"""What inference.py does, as its user sees it."""

import os
import re
import signal
import subprocess

import pytest
from conftest import DAMAGES, Project, damaged

PROMPT = re.compile(r'^prompt = "(.*)"', re.MULTILINE)


def generate(trained: Project, *flags: object) -> str:
    return trained.run("inference.py", *flags).stdout


def start_endless_generation(trained: Project) -> subprocess.Popen:
    command = trained.command("inference.py", "--prompt=we", f"--max-new-tokens={10**6}")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# What is written


def test_it_continues_the_prompt_in_the_script_by_500_characters(trained):
    edited = trained.directory / "edited.py"
    source = (trained.directory / "inference.py").read_text(encoding="utf-8")
    (prompt,) = PROMPT.findall(source)
    edited.write_text(source.replace(prompt, "the ship"), encoding="utf-8")
    done = trained.run("edited.py")
    edited.unlink()

    assert done.stdout.startswith("the ship")
    assert done.stdout.endswith("\n")
    assert len(done.stdout) == len("the ship") + 500 + len("\n")
    assert set(done.stdout) <= set(trained.text)
    assert done.stderr == ""


@pytest.mark.parametrize("count", [0, 1, 17])
def test_it_writes_as_many_characters_as_asked_for(trained, count):
    text = generate(trained, "--prompt=the", f"--max-new-tokens={count}")
    assert text.startswith("the")
    assert len(text) == len("the") + count + len("\n")


def test_the_same_seed_gives_the_same_text(trained):
    flags = ["--prompt=a star", "--max-new-tokens=60"]
    text = generate(trained, *flags, "--seed=4")
    assert generate(trained, *flags, "--seed=4") == text
    assert generate(trained, *flags, "--seed=5") != text
    assert generate(trained, *flags) != text


def test_a_sample_does_not_depend_on_the_number_of_samples(trained):
    flags = ["--prompt=a star", "--max-new-tokens=60", "--seed=4"]
    one = generate(trained, *flags)
    three = generate(trained, *flags, "--num-samples=3")
    assert three.startswith(one)
    samples = three[: -len("\n")].split("\n\na star")
    assert len(samples) == 3
    assert len(set(samples)) == 3


@pytest.mark.parametrize("flag", ["--top-k=1", "--top-p=1e-9", "--temperature=1e-9"])
def test_a_single_candidate_is_the_likeliest(trained, flag):
    assert generate(trained, "--prompt=we", flag) == generate(
        trained, "--prompt=we", "--temperature=0"
    )


def test_a_text_ends_after_the_stop_text(trained):
    flags = ["--prompt=a", "--seed=1"]
    completion = generate(trained, *flags)[1:]
    stop = completion[40:42]
    end = completion.index(stop) + len(stop)
    assert generate(trained, *flags, "--stop", stop) == "a" + completion[:end] + "\n"


def test_every_sample_ends_after_the_stop_text(trained):
    flags = ["--prompt=we went far", "--seed=1", "--num-samples=3"]
    separator = "\n\nwe went far"
    samples = generate(trained, *flags).removesuffix("\n").split(separator)
    stopped_samples = generate(trained, *flags, "--stop=o").removesuffix("\n").split(separator)
    for sample, stopped_sample in zip(samples, stopped_samples, strict=True):
        completion = sample.removeprefix("we went far")
        stopped_completion = stopped_sample.removeprefix("we went far")
        assert stopped_completion == completion[: completion.index("o") + 1]


def test_an_empty_prompt_begins_after_a_line_break(trained):
    empty = generate(trained, "--prompt=", "--temperature=0")
    line_break = generate(trained, "--prompt=\n", "--temperature=0")
    assert "\n" + empty == line_break


def test_an_empty_prompt_works_with_a_model_that_knows_no_line_break(project):
    project.text_file.write_text(project.text.replace("\n", "") * 2, encoding="utf-8")
    project.train()
    text = generate(project, "--prompt=", "--max-new-tokens=20")
    assert len(text) == 20 + len("\n")


def test_a_prompt_longer_than_the_context_is_written_whole(trained):
    prompt = "the old moon " * 20
    assert generate(trained, f"--prompt={prompt}", "--max-new-tokens=5").startswith(prompt)


def test_a_checkpoint_can_be_used_as_a_model(trained):
    flags = ["--prompt=we", "--max-new-tokens=9"]
    assert len(generate(trained, "--model", trained.checkpoint, *flags)) == 12


# How it is written


def test_text_appears_while_it_is_generated(trained):
    with start_endless_generation(trained) as process:
        assert len(process.stdout.read(300)) == 300
        process.kill()


def test_a_reader_that_leaves_ends_it_quietly(trained):
    with start_endless_generation(trained) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_ctrl_c_ends_it_quietly(trained):
    with start_endless_generation(trained) as process:
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""


def test_the_output_is_utf_8_whatever_the_locale(project):
    project.text_file.write_text("Ж中🪐" * 300, encoding="utf-8")
    project.train()
    command = project.command("inference.py", "--prompt=中", "--temperature=0")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert set(done.stdout.decode("utf-8")) <= set("Ж中🪐\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error(trained):
    with open("/dev/full", "w") as full:
        command = trained.command("inference.py", "--prompt=we")
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert re.fullmatch("error: .*No space.*\n", done.stderr)


def test_closed_standard_output_is_no_error(trained):
    command = " ".join(["exec", *trained.command("inference.py", "--prompt=we"), ">&-"])
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


# Mistakes


UNKNOWN = [("we # go", "U+0023"), ("Ж", "U+0416"), ("我们", "U+6211"), ("🪐", "U+1FA90")]


@pytest.mark.parametrize("flag", ["--prompt", "--stop"])
@pytest.mark.parametrize(("text", "code_point"), UNKNOWN)
def test_a_character_that_the_model_does_not_know_is_named(trained, flag, text, code_point):
    error = trained.run("inference.py", "--prompt=we", flag, text, status=1).stderr
    assert code_point in error


def test_flags_may_be_spelled_with_underscores(trained):
    flags = ["--prompt=a_b", "--max_new_tokens=9", "--top_k=3"]
    error = trained.run("inference.py", *flags, status=1).stderr
    assert "'_'" in error  # of the prompt, which is left as it is


WRONG_VALUES = {
    "--max-new-tokens": ["", "many", "nan", "-1", "1.5", "1e3", "9" * 30],
    "--top-k": ["", "many", "nan", "-1", "0", "1.5", "1e3", "9" * 30],
    "--seed": ["", "many", "nan", "-1", "1.5", "1e3", "9" * 30],
    "--num-samples": ["", "many", "nan", "-1", "0", "1.5", "1e3", "9" * 30],
    "--temperature": ["", "hot", "nan", "inf", "-1", "1,5"],
    "--top-p": ["", "hot", "nan", "inf", "-1", "1,5", "0", "1.1"],
    "--device": ["", "toaster", "cuda:99"],
    "--stop": [""],
}
WRONG_PAIRS = [(flag, value) for flag, values in WRONG_VALUES.items() for value in values]


@pytest.mark.parametrize(("flag", "value"), WRONG_PAIRS)
def test_a_wrong_value_is_an_error_with_status_2_that_names_the_flag(trained, flag, value):
    assert flag in trained.run("inference.py", f"{flag}={value}", status=2).stderr


@pytest.mark.parametrize("argument", ["--nonsense", "stray", "--seed"])
def test_a_wrong_argument_is_an_error_with_status_2_that_names_it(trained, argument):
    assert argument in trained.run("inference.py", argument, status=2).stderr


def test_a_missing_model_is_an_error_that_says_how_to_make_one(trained, tmp_path):
    done = trained.run("inference.py", "--model", tmp_path / "m.pth", status=1)
    assert "m.pth" in done.stderr
    assert "python train.py" in done.stderr


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_an_error_that_names_it(trained, tmp_path, damage):
    path = tmp_path / "it's a 模型.pth"
    path.write_bytes(damaged(trained.model.read_bytes(), damage))
    assert str(path) in trained.run("inference.py", "--model", path, status=1).stderr


def test_a_directory_in_place_of_a_model_is_an_error_that_names_it(trained, tmp_path):
    assert str(tmp_path) in trained.run("inference.py", "--model", tmp_path, status=1).stderr
