"""What inference.py does, as its user sees it."""

import io
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import Project, posix_only

from inference import attention_weights, read_logits
from model import GPT, GPTConfig, load_model

PROMPT = re.compile(r'^prompt = "(.*)"', re.MULTILINE)
MANY = f"--max-new-tokens={10**6}"


def generate(trained: Project, *flags: object) -> str:
    return trained.run("inference.py", "--device=cpu", *flags).stdout


def start(trained: Project, *flags: object) -> subprocess.Popen:
    command = trained.command("inference.py", "--device=cpu", *flags)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def random_model(context_length: int) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, context_length, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


# What is written


def test_it_continues_the_prompt_in_the_script_by_500_characters(trained):
    edited = trained.directory / "edited.py"
    source = (trained.directory / "inference.py").read_text(encoding="utf-8")
    (prompt,) = PROMPT.findall(source)
    edited.write_text(source.replace(prompt, "the ship"), encoding="utf-8")
    done = trained.run("edited.py", "--device=cpu")
    edited.unlink()

    assert done.stdout.startswith("the ship")
    assert done.stdout.endswith("\n")
    assert len(done.stdout) == len("the ship") + 500 + len("\n")
    assert set(done.stdout) <= set(trained.text)
    assert done.stderr == ""


def test_the_same_seed_gives_the_same_text(trained):
    flags = ["--prompt=a star", "--max-new-tokens=60"]
    text = generate(trained, *flags, "--seed=4")
    assert generate(trained, *flags, "--seed=4") == text
    assert generate(trained, *flags, "--seed=5") != text
    assert generate(trained, *flags) != text


@pytest.mark.parametrize("flag", ["--top-k=1", "--top-p=1e-9", "--temperature=1e-9"])
def test_a_single_candidate_is_the_likeliest(trained, flag):
    likeliest = generate(trained, "--prompt=we", "--temperature=0")
    assert generate(trained, "--prompt=we", flag) == likeliest


def test_every_sample_ends_after_the_stop_text(trained):
    flags = ["--prompt=we went far", "--seed=1", "--num-samples=3"]
    separator = "\n\nwe went far"
    samples = generate(trained, *flags).removesuffix("\n").split(separator)
    stopped_samples = generate(trained, *flags, "--stop=o").removesuffix("\n").split(separator)
    assert len(set(samples)) == len(stopped_samples) == 3
    for sample, stopped_sample in zip(samples, stopped_samples, strict=True):
        completion = sample.removeprefix("we went far")
        stopped_completion = stopped_sample.removeprefix("we went far")
        assert stopped_completion == completion[: completion.index("o") + 1]


def test_an_empty_prompt_begins_after_a_line_break(trained):
    empty = generate(trained, "--prompt=", "--temperature=0")
    line_break = generate(trained, "--prompt=\n", "--temperature=0")
    assert "\n" + empty == line_break


def test_a_prompt_longer_than_the_context_is_written_whole(trained):
    prompt = "the old moon " * 20
    text = generate(trained, f"--prompt={prompt}", "--max-new-tokens=5")
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + 5 + len("\n")


def test_a_prompt_with_decomposed_letters_is_composed_like_the_text(project):
    project.text_file.write_text("e\u0301t\u00e9 " * 300, encoding="utf-8")
    project.train()
    assert len(generate(project, "--prompt=e\u0301te\u0301", "--max-new-tokens=9")) == 5 + 9 + 1
    assert len(score(project, "e\u0301te\u0301")) == 5  # a header, t, é, what is next, the loss


# How it is written


def test_text_appears_while_it_is_generated(trained):
    with start(trained, "--prompt=we", MANY) as process:
        assert len(process.stdout.read(300)) == 300
        process.kill()


@posix_only
def test_a_reader_that_leaves_ends_it_quietly(trained):
    with start(trained, "--prompt=we", MANY) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_output_is_utf_8_whatever_the_locale(project):
    project.text_file.write_text("Ж中🪐" * 300, encoding="utf-8")
    project.train()
    command = project.command("inference.py", "--prompt=中", "--temperature=0", "--device=cpu")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert set(done.stdout.decode("utf-8").strip()) <= set("Ж中🪐")


# --interactive


def test_each_line_is_continued_as_without_the_flag(trained, monkeypatch):
    flags = ["--max-new-tokens=30", "--seed=3"]
    prompts = ["the ship", "", "moons"]
    alone = [generate(trained, f"--prompt={prompt}", *flags) for prompt in prompts]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{prompt}\n" for prompt in prompts)))
    assert generate(trained, "--interactive", *flags) == "".join(alone)


def test_an_unknown_character_does_not_end_the_session(trained, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the #\nthe ship\nЖ\nwe"))
    done = trained.run("inference.py", "--interactive", "--max-new-tokens=5", "--device=cpu")
    assert re.fullmatch("the ship.{5}\nwe.{5}\n", done.stdout, re.DOTALL)
    assert len(re.findall("^error: the character .* which is: .* a d e", done.stderr, re.M)) == 2


@posix_only
def test_ctrl_c_stops_a_text_and_the_end_of_input_ends_the_session(trained):
    with start(trained, "--interactive", MANY) as process:
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


@posix_only
def test_ctrl_c_ends_it_quietly(trained):
    with start(trained, "--prompt=we", MANY) as process:
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == 130


# --score


def score(trained: Project, text: str) -> list[str]:
    return generate(trained, f"--score={text}").splitlines()


def test_a_score_is_the_loss_of_the_model(trained):
    text = "the ship went"
    model, tokenizer, _ = load_model(trained.model)
    ids = tokenizer.encode(text)
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
@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 31])
def test_every_character_is_read_with_at_least_half_a_context(context_length, length):
    model = random_model(context_length)
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


# --attention


@torch.no_grad()
def test_the_weights_of_the_picture_are_those_of_a_plain_loop():
    model = random_model(context_length=9)
    ids = torch.randint(11, (7,), generator=torch.Generator().manual_seed(0))
    x = (model.token_embedding(ids) + model.positions[:7])[None]  # (1, T, C)
    for block, weights in zip(model.blocks, attention_weights(model, ids), strict=True):
        assert weights.shape == (2, 7, 7)
        q, k, _ = block.attention.qkv(block.attention_norm(x))[0].split(16, dim=-1)  # (T, C)
        for head in range(2):
            for t in range(7):
                channels = range(8 * head, 8 * head + 8)
                scores = [sum(q[t, c] * k[s, c] for c in channels) / 8**0.5 for s in range(t + 1)]
                exponentials = torch.tensor(scores).exp()
                expected = [*(exponentials / exponentials.sum()).tolist(), *[0] * (6 - t)]
                assert weights[head, t].tolist() == pytest.approx(expected, abs=1e-5)
        x = block(x)
    assert len(attention_weights(model, ids)) == 2  # and no hooks are left


@pytest.mark.parametrize("flags", [["--score=we went\n"], ["--prompt=we"]])
def test_attention_is_drawn_for_the_text_or_the_prompt(trained, tmp_path, flags):
    path = tmp_path / "attention.png"
    output = generate(trained, *flags, f"--attention={path}")
    assert output == ("" if flags == ["--prompt=we"] else generate(trained, *flags))
    assert path.read_bytes().startswith(b"\x89PNG")


# Mistakes


@pytest.mark.parametrize(
    "flag",
    [
        "--max-new-tokens=-1",
        "--temperature=-1",
        "--temperature=nan",
        "--top-k=0",
        "--top-p=0",
        "--top-p=1.5",
        "--num-samples=0",
        "--seed=x",
        "--interactive --score=we",
        "--nonsense",
    ],
)
def test_a_wrong_flag_is_an_error_with_status_2_that_names_it(trained, flag):
    error = trained.run("inference.py", *flag.split(), status=2).stderr
    assert re.split("[= ]", flag)[0] in error


WRONG_INPUT = [
    (["--model=none.pth"], "there is no none.pth: to train a model, run python train.py"),
    (["--model=."], "error: . cannot be read"),
    (["--model=train.py"], "not a model of this project"),
    (["--device=toaster"], "--device toaster"),
    (["--prompt=the #"], "'#' is not in the vocabulary of the model, which is: "),
    (["--score=a"], "at least two characters"),
    (["--score=a#"], "'#'"),
    (["--attention=a.png", f"--score={'we ' * 20}"], "draws 1 to 16 characters, and not 60"),
    (["--attention=none/a.png", "--prompt=we"], "none/a.png"),
    (["--attention=a.txt", "--prompt=we"], "txt"),
]


@pytest.mark.parametrize(("flags", "reason"), WRONG_INPUT)
def test_wrong_input_is_one_line_with_status_1_that_names_it(trained, flags, reason):
    assert reason in trained.run("inference.py", *flags, status=1).stderr
