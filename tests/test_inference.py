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
from torch import nn

from inference import attention_weights, prompt, read_logits
from model import GPT, CharTokenizer, GPTConfig, load_model, save_model, visible

ENDLESS = f"--max-new-tokens={10**6}"


def generate(project: Project, *flags: object) -> str:
    return project.run("inference.py", "--device=cpu", *flags).stdout


def start(project: Project, *flags: object) -> subprocess.Popen:
    command = project.command("inference.py", "--device=cpu", *flags)
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def random_model(context_length: int, vocab_size: int = 11) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, context_length, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


# What is written


def test_it_continues_the_prompt_in_the_script_by_500_characters(project):
    project.train()
    project.edit("inference.py", f'\nprompt = "{prompt}"', '\nprompt = "the ship"')
    done = project.run("inference.py", "--device=cpu")
    assert re.fullmatch("the ship.{500}\n", done.stdout, re.DOTALL)
    assert set(done.stdout) <= set(project.text)
    assert done.stderr == ""


def test_the_same_seed_gives_the_same_text(trained):
    flags = ["--prompt=a star", "--max-new-tokens=40"]
    text = generate(trained, *flags, "--seed=0")
    assert generate(trained, *flags, "--seed=0") == text
    assert generate(trained, *flags, "--seed=5") != text
    assert generate(trained, *flags) != generate(trained, *flags)


@pytest.mark.parametrize("flag", ["--top-k=1", "--top-p=1e-9", "--temperature=1e-9"])
def test_a_single_candidate_is_the_likeliest(trained, flag):
    flags = ["--prompt=we", "--max-new-tokens=40"]
    assert generate(trained, *flags, flag) == generate(trained, *flags, "--temperature=0")


def test_every_sample_is_another_text_that_ends_after_the_stop_text(trained):
    flags = ["--prompt=we went far", "--seed=1"]
    text = generate(trained, *flags).removeprefix("we went far")
    stop = text[50:52]
    flags += [f"--stop={stop}", "--num-samples=3"]
    samples = generate(trained, *flags).removesuffix("\n").split("\n\nwe went far")
    assert samples[0] == "we went far" + text[: text.index(stop) + 2]
    assert len(set(samples)) == 3
    for sample in samples[1:]:
        assert sample.find(stop, len("we went far")) in (-1, len(sample) - 2)


def test_an_empty_prompt_begins_after_a_line_break(trained):
    flags = ["--temperature=0", "--max-new-tokens=40"]
    assert "\n" + generate(trained, "--prompt=", *flags) == generate(trained, "--prompt=\n", *flags)


def test_decomposed_letters_are_composed_as_in_the_text_that_was_learned(project):
    save_model(project.model, random_model(16, vocab_size=2), CharTokenizer("t\u00e9"))
    generate(project, "--prompt=e\u0301te\u0301", "--max-new-tokens=1")
    assert "over 2 characters" in generate(project, "--score=e\u0301te\u0301")


# How it is written


@posix_only
def test_text_appears_at_once_and_a_reader_that_leaves_ends_it_quietly(trained):
    with start(trained, "--prompt=we", ENDLESS) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_input_and_output_are_utf_8_whatever_the_locale(project):
    save_model(project.model, random_model(16, vocab_size=3), CharTokenizer("Ж中🪐"))
    command = project.command("inference.py", "--interactive", "--device=cpu")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    output = subprocess.check_output(command, env=environment, input="中\n".encode())
    assert set(output.decode("utf-8").strip()) == set("Ж中🪐")


# --interactive


def test_each_line_is_continued_as_without_the_flag_or_answered_by_an_error(trained, monkeypatch):
    flags = ["--max-new-tokens=30", "--seed=3", "--device=cpu"]
    alone = [generate(trained, f"--prompt={line}", *flags) for line in ("the ship", "", "moons")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the ship\r\n\nthe #\nmoons"))
    done = trained.run("inference.py", "--interactive", *flags)
    assert done.stdout == "".join(alone)
    assert re.fullmatch("error: the character '#' is not in the vocabulary.*\n", done.stderr)


@posix_only
def test_ctrl_c_stops_a_text_and_the_end_of_input_ends_the_session(trained):
    with start(trained, "--interactive", ENDLESS) as process:
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
    with start(trained, "--prompt=we", ENDLESS) as process:
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == 130


# --score


@torch.no_grad()
def test_a_score_is_the_loss_of_the_model(trained):
    text = "the ship went"
    model, tokenizer, _ = load_model(trained.model)
    ids = tokenizer.encode(text)
    logits, loss = model(ids[None, :-1], ids[None, 1:])
    _, *rows, following, total = generate(trained, f"--score={text}").splitlines()

    for i, row in enumerate(rows):
        distribution = logits[0, i].softmax(dim=-1)
        p = distribution[ids[i + 1]].item()
        best = [tokenizer.characters[j] for j in distribution.topk(3).indices]
        shown, percent, bits, *likeliest = re.split(" {2,}", row)
        assert shown == text[i + 1].replace(" ", "space")
        assert float(percent.rstrip("%")) == pytest.approx(100 * p, abs=0.01)
        assert float(bits) == pytest.approx(-math.log2(p), abs=0.01)
        assert [name.split(" ")[0].replace("space", " ") for name in likeliest] == best
    assert len(rows) == len(text) - 1
    last = model(ids[None])[0][0, -1]
    names = [name.split(" ")[0] for name in following.removeprefix("next: ").split("  ")]
    assert names == [visible(tokenizer.characters[j]) for j in last.topk(5).indices]
    nats = loss.item()
    assert total == (
        f"loss {nats:.3f} nats, {nats / math.log(2):.2f} bits/char, "
        f"perplexity {math.exp(nats):.2f} over 12 characters"
    )


@torch.no_grad()
@pytest.mark.parametrize("context_length", [1, 5, 8])
@pytest.mark.parametrize("length", [8, 31])
def test_every_character_is_read_with_at_least_half_a_context(context_length, length):
    model = random_model(context_length)
    ids = torch.randint(11, (length,))
    logits = read_logits(model, ids)
    assert logits.shape == (length, 11)
    for end in range(1, length + 1):
        least = min(end, math.ceil(context_length / 2))
        most = min(end, context_length)
        candidates = [model(ids[None, end - n : end])[0][0, -1] for n in range(least, most + 1)]
        assert any(torch.allclose(logits[end - 1], c, atol=1e-5) for c in candidates), end


# --attention


@torch.no_grad()
def test_the_weights_of_the_picture_are_those_of_torchs_attention():
    model = random_model(context_length=9)
    ids = torch.randint(11, (7,))
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    x = (model.token_embedding(ids) + model.positions[:7])[None]  # (1, T, C)
    for block, weights in zip(model.blocks, attention_weights(model, ids), strict=True):
        theirs = nn.MultiheadAttention(embed_dim=16, num_heads=2, batch_first=True)
        theirs.in_proj_weight.copy_(block.attention.qkv.weight)
        theirs.in_proj_bias.copy_(block.attention.qkv.bias)
        h = block.attention_norm(x)
        _, expected = theirs(h, h, h, attn_mask=mask, average_attn_weights=False)
        torch.testing.assert_close(weights, expected[0], atol=1e-5, rtol=1e-5)
        x = block(x)
    assert len(attention_weights(model, ids)) == 2  # and no hooks are left


@pytest.mark.parametrize("flags", [["--score=we went\n"], ["--prompt=we"]])
def test_attention_is_drawn_for_the_text_or_the_prompt(trained, tmp_path, flags):
    path = tmp_path / "attention.png"
    output = generate(trained, *flags, f"--attention={path}")
    assert output == ("" if flags == ["--prompt=we"] else generate(trained, *flags))
    assert path.read_bytes().startswith(b"\x89PNG")


# Mistakes

WRONG_FLAGS = [
    *["--temperature=nan", "--temperature=1e-40", "--top-k=0", "--top-p=0", "--top-p=1.5"],
    *["--num-samples=0", "--max-new-tokens=-1", "--seed=-1", f"--seed={2**63}"],
]


@pytest.mark.parametrize("flag", WRONG_FLAGS)
def test_a_wrong_flag_is_an_error_with_status_2_that_names_it(trained, flag):
    assert flag.partition("=")[0] in trained.run("inference.py", flag, status=2).stderr


WRONG_INPUT = {
    "--model=none.pth": "there is no none.pth",
    "--device=toaster": "--device toaster",
    "--prompt=the #": "'#' is not in the vocabulary of the model, which show_params.py lists",
    "--score=a": "at least two characters",
    "--attention=a.png --score=weweweweweweweweweweweee": "draws 1 to 16 characters, and not 24",
    "--attention=a.png --prompt=": "draws 1 to 16 characters, and not 0",
    "--attention=none/a.png --score=we": "none/a.png",
    "--attention=a.txt --score=we": "txt",
}


@pytest.mark.parametrize("flags", WRONG_INPUT)
def test_wrong_input_is_one_line_with_status_1_that_names_it(trained, flags):
    done = trained.run("inference.py", *re.split(" (?=--)", flags), status=1)
    assert WRONG_INPUT[flags] in done.stderr
