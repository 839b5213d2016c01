"""What inference.py does, as its user sees it."""

import ast
import io
import math
import os
import random
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import DAMAGES, Project, damaged

import inference
from inference import longest_copied, read_logits
from model import GPT, CharTokenizer, GPTConfig, load_model, save_model

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


@pytest.mark.parametrize("flag", ["--prompt=we", "--score=we"])
def test_closed_standard_output_is_no_error(trained, flag):
    done = trained.run_with_closed("1", "inference.py", flag)
    assert done.returncode == 0
    assert done.stderr == ""


# --interactive


def give_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_each_line_is_continued_as_without_the_flag(trained, monkeypatch, line_end):
    flags = ["--max-new-tokens=30", "--seed=3"]
    prompts = ["the ship", "", "moons"]
    give_input(monkeypatch, "".join(prompt + line_end for prompt in prompts).encode())
    alone = [generate(trained, f"--prompt={prompt}", *flags) for prompt in prompts]
    assert generate(trained, "--interactive", *flags) == "".join(alone)


def test_an_unknown_character_does_not_end_the_session(trained, monkeypatch):
    give_input(monkeypatch, "the #\nthe ship\nЖ\n".encode() + b"\xff\nwe")
    done = trained.run("inference.py", "--interactive", "--max-new-tokens=5")
    assert re.fullmatch("the ship.{5}\nwe.{5}\n", done.stdout, re.DOTALL)
    assert len(re.findall("^error: the character .* which is: .* a d e", done.stderr, re.M)) == 3


def test_ctrl_c_stops_a_text_and_the_end_of_input_ends_the_session(trained):
    command = trained.command("inference.py", "--interactive", f"--max-new-tokens={10**6}")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdin.write(b"we went\nthe star\n")
        process.stdin.close()
        output = process.stdout.read(50)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            output += process.stdout.read(500)
        output += process.stdout.read()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert output.startswith(b"we went")
    assert b"\nthe star" in output


# --score


def score(trained: Project, text: str, *flags: object) -> list[str]:
    return trained.run("inference.py", f"--score={text}", *flags).stdout.splitlines()


def test_a_score_is_the_loss_of_the_model(trained):
    text = "the ship went"
    model, tokenizer, _ = load_model(trained.model)
    ids = tokenizer.encode(text).long()
    with torch.no_grad():
        logits, loss = model(ids[None, :-1], ids[None, 1:])
    probs = logits[0].softmax(dim=-1)

    header, *rows, following, total = score(trained, text)
    assert header.split() == ["character", "probability", "bits", "likeliest"]
    for row, character, p, distribution in zip(
        rows, text[1:], probs[range(12), ids[1:]], probs, strict=True
    ):
        shown, percent, bits, likeliest = re.split(" {2,}", row, maxsplit=3)
        assert shown == (character if character != " " else "space")
        assert float(percent.rstrip("%")) == pytest.approx(100 * p.item(), abs=0.01)
        assert float(bits) == pytest.approx(-math.log2(p), abs=0.01)
        best = tokenizer.decode(distribution.topk(3).indices)
        assert [name.split(" ")[0] for name in likeliest.split("  ")] == [
            "space" if character == " " else character.replace("\n", "\\n") for character in best
        ]
    assert following.startswith("next: ")
    nats = loss.item()
    assert total == (
        f"loss {nats:.3f} nats, {nats / math.log(2):.2f} bits/char, "
        f"perplexity {math.exp(nats):.2f} over 12 characters"
    )


@pytest.mark.parametrize("context_length", [1, 2, 5, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 30, 31])
def test_every_character_is_read_with_at_least_half_a_context(context_length, length):
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, context_length, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(11, (length,))
    logits = read_logits(model, ids)
    assert logits.shape == (length, 11)
    for i in range(length):
        fewest = min(i + 1, (context_length + 1) // 2)
        candidates = []
        for count in range(fewest, min(i + 1, context_length) + 1):
            with torch.no_grad():
                candidates.append(model(ids[None, i + 1 - count : i + 1])[0][0, -1])
        assert any(torch.allclose(logits[i], c, atol=1e-5) for c in candidates), i
    with torch.no_grad():
        expected, _ = model(ids[None, :context_length])
    torch.testing.assert_close(logits[:context_length], expected[0], atol=1e-4, rtol=1e-4)


def test_a_text_can_be_scored_from_standard_input(trained, monkeypatch):
    give_input(monkeypatch, b"the ship")
    assert score(trained, "-") == score(trained, "the ship")


def test_a_score_has_colors_on_a_terminal_alone(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert inference.colored("a", 9) == "a"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    colors = [inference.colored("a", bits) for bits in (0.5, 2, 9)]
    assert len(set(colors)) == 3
    assert {re.sub(r"\033\[\d+m", "", color) for color in colors} == {"a"}
    monkeypatch.setenv("NO_COLOR", "1")
    assert inference.colored("a", 9) == "a"


def test_a_byte_order_mark_on_standard_input_is_left_out(trained, monkeypatch):
    give_input(monkeypatch, b"\xef\xbb\xbfthe ship")
    assert score(trained, "-") == score(trained, "the ship")


@pytest.mark.parametrize("text", ["", "a", "a#", "#a"])
def test_a_text_that_cannot_be_scored_is_an_error(trained, text):
    trained.run("inference.py", f"--score={text}", status=1)


@pytest.mark.parametrize("other", ["--interactive", "--check-copied"])
def test_scoring_excludes_generating(trained, other):
    assert "not" in trained.run("inference.py", "--score=we", other, status=2).stderr


# --check-copied


def longest_by_trying_all(text: str, training_text: str) -> int:
    parts = [text[i:j] for i in range(len(text) + 1) for j in range(i, len(text) + 1)]
    return max(len(part) for part in parts if part in training_text)


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_copied_stretch_is_found(seed):
    draw = random.Random(seed)
    training_text = "".join(draw.choices("abc", k=draw.randrange(60)))
    text = "".join(draw.choices("abcd", k=draw.randrange(20)))
    found = longest_copied(text, training_text)
    assert found in text
    assert found in training_text
    assert len(found) == longest_by_trying_all(text, training_text)


def test_a_copied_text_is_found_whole():
    training_text = "".join(random.Random(1).choices("abcdefgh ", k=5000))
    assert (
        longest_copied("#" + training_text[700:900] + "#", training_text) == training_text[700:900]
    )


def copied(done: subprocess.CompletedProcess) -> str:
    line = re.fullmatch(r"longest copied stretch: (\d+) characters: (.*)\n", done.stderr)
    text = ast.literal_eval(line[2])
    assert len(text) == int(line[1])
    return text


def test_a_generated_text_is_compared_with_the_training_text(trained):
    flags = ["--prompt=the", "--seed=2", "--max-new-tokens=80", "--check-copied"]
    done = trained.run("inference.py", *flags)
    completion = done.stdout.removesuffix("\n").removeprefix("the")
    assert copied(done) == longest_copied(completion, trained.text)


def test_of_several_texts_the_longest_copied_stretch_is_shown(trained):
    flags = ["--prompt=the", "--seed=2", "--max-new-tokens=80"]
    texts = generate(trained, *flags, "--num-samples=3").removesuffix("\n").split("\n\nthe")
    done = trained.run("inference.py", *flags, "--num-samples=3", "--check-copied")
    texts[0] = texts[0].removeprefix("the")
    assert len(copied(done)) == max(len(longest_copied(text, trained.text)) for text in texts)


def test_a_training_text_that_is_missing_or_changed_must_be_named(project, tmp_path):
    project.train()
    moved = tmp_path / "moved.txt"
    project.text_file.rename(moved)
    flags = ["--max-new-tokens=9", "--prompt=we"]
    assert "FILE" in project.run("inference.py", *flags, "--check-copied", status=1).stderr
    project.text_file.write_text(project.text + "more", encoding="utf-8")
    assert "FILE" in project.run("inference.py", *flags, "--check-copied", status=1).stderr
    copied(project.run("inference.py", *flags, f"--check-copied={moved}"))


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_training_text_that_cannot_be_read_is_an_error_that_names_it(trained, tmp_path, name):
    path = tmp_path / name
    done = trained.run("inference.py", "--prompt=we", f"--check-copied={path}", status=1)
    assert str(path) in done.stderr


def test_the_text_of_a_model_that_remembers_none_must_be_named(trained, tmp_path):
    model = GPT(GPTConfig(vocab_size=3, context_length=4, n_layer=1, n_head=1, n_embd=4))
    path = tmp_path / "m.pth"
    save_model(path, model, CharTokenizer("abc"))
    flags = ["--model", path, "--prompt=a", "--check-copied"]
    assert "FILE" in trained.run("inference.py", *flags, status=1).stderr


# Mistakes


UNKNOWN = [("we # go", "U+0023"), ("Ж", "U+0416"), ("我们", "U+6211"), ("🪐", "U+1FA90")]


@pytest.mark.parametrize("flag", ["--prompt", "--stop"])
@pytest.mark.parametrize(("text", "code_point"), UNKNOWN)
def test_a_character_that_the_model_does_not_know_is_named(trained, flag, text, code_point):
    error = trained.run("inference.py", "--prompt=we", flag, text, status=1).stderr
    assert code_point in error
    assert "space ! ' . ; C a d e f" in error


def test_flags_may_be_spelled_with_underscores(trained):
    flags = ["--prompt=a_b", "--max_new_tokens=9", "--top_k", "3"]
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


def test_a_value_that_begins_with_a_hyphen_is_explained(trained):
    assert "--prompt=--Come!" in trained.run("inference.py", "--prompt", "--Come!", status=2).stderr


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
