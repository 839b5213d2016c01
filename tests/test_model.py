"""What holds for model.py, in its order: sizes, characters, positions, attention, model, files."""

import errno
import hashlib
import io
import math
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import posix_only
from torch import Tensor, nn
from torch.nn import functional as F

import model as model_module
from model import (
    GPT,
    Attention,
    CharTokenizer,
    GPTConfig,
    InputError,
    KVCache,
    TransformerBlock,
    find_device,
    load_model,
    read_text,
    sample,
    save_model,
    sinusoidal_encoding,
)

CHARACTERS = "abcdefghijk"  # the vocabulary of the small models


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(**sizes: Any) -> GPT:
    """Returns a model that computes in no time, always with the same weights."""
    small = {"vocab_size": 11, "context_length": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**small, **sizes})).eval()


def draw_parameters(module: nn.Module, std: float) -> None:
    """Draws all parameters, so that biases and norms matter too."""
    for p in module.parameters():
        nn.init.normal_(p, std=std, generator=seeded(3))


def random_ids(*shape: int, vocab_size: int = 11) -> Tensor:
    return torch.randint(vocab_size, shape, generator=seeded(1))


# 1 Configuration, 2 Text and ids, 3 Positions


def test_decode_inverts_encode_and_the_ids_are_positions_in_the_sorted_vocabulary():
    text = "A star.\r\n\t 中文科幻 👩‍🚀 e\u0301 \x00\ud800\U0010ffff"
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.tolist() == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("").dtype == torch.long


@pytest.mark.parametrize("channels", [1, 64])
def test_the_table_of_positions_is_the_papers(channels):
    table = sinusoidal_encoding(40, channels)
    assert table.shape == (40, channels)
    for t in range(40):
        for c in range(channels):
            pair = c // 2
            angle = t / 10000 ** (2 * pair / channels)
            expected = math.sin(angle) if c % 2 == 0 else math.cos(angle)
            assert table[t, c].item() == pytest.approx(expected, abs=1e-6)


# 4 Attention


def attention_one_query_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v, where a query gets the keys up to its own, and needs no mask."""
    D = q.size(-1)
    rows = []
    for t in range(q.size(-2)):
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, : t + 1]) / D**0.5
        exponentials = scores.exp()
        weights = exponentials / exponentials.sum(dim=-1, keepdim=True)
        rows.append(torch.einsum("bhs,bhsd->bhd", weights, v[:, :, : t + 1]))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("T", [1, 5, 9])
def test_formula_and_kernel_are_right_for_the_last_T_of_nine_characters(T, device):
    q, k, v = torch.randn(3, 2, 3, 9, 5, generator=seeded(2)).to(device)  # (B, H, S, D) each
    expected = attention_one_query_at_a_time(q, k, v)[:, :, 9 - T :]
    q = q[:, :, 9 - T :]
    torch.testing.assert_close(Attention().weights(q, k) @ v, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Attention()(q, k, v), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_reading_in_chunks_through_caches_is_reading_at_once_up_to_the_context():
    model, ids = small_model(), random_ids(3, 12)
    caches = [KVCache() for _ in model.blocks]
    pieces = [model(piece, caches=caches)[0] for piece in ids.split([2, 1, 3, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids)[0], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="13 characters do not fit a context of 12"):
        model(random_ids(3, 1), caches=caches)


# 5 The block


def test_a_block_is_torchs_encoder_layer_with_the_same_weights():
    block = TransformerBlock(GPTConfig(11, context_length=9, n_head=4, n_embd=32)).eval()
    draw_parameters(block, std=0.2)
    theirs = nn.TransformerEncoderLayer(
        d_model=32,
        nhead=4,
        dim_feedforward=4 * 32,
        dropout=0.0,
        activation=lambda x: F.gelu(x, approximate="tanh"),
        batch_first=True,
        norm_first=True,
    )
    theirs.norm1.load_state_dict(block.attention_norm.state_dict())
    theirs.self_attn.in_proj_weight.data.copy_(block.attention.qkv.weight.data)
    theirs.self_attn.in_proj_bias.data.copy_(block.attention.qkv.bias.data)
    theirs.self_attn.out_proj.load_state_dict(block.attention.output.state_dict())
    theirs.norm2.load_state_dict(block.feed_forward_norm.state_dict())
    theirs.linear1.load_state_dict(block.feed_forward.expand.state_dict())
    theirs.linear2.load_state_dict(block.feed_forward.contract.state_dict())

    x = torch.randn(3, 9, 32, generator=seeded(4))
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    torch.testing.assert_close(block(x), theirs(x, src_mask=mask), atol=1e-5, rtol=1e-5)


def test_dropout_changes_embeddings_attention_and_feed_forward_in_training_alone():
    model, ids = small_model(dropout=0.5), random_ids(2, 12)
    assert torch.equal(model(ids)[0], small_model(dropout=0.0)(ids)[0])
    model.dropout.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])

    x = torch.randn(2, 12, 16)
    for silent in ("attention.output", "feed_forward.contract"):
        block = small_model(dropout=0.5).blocks[1].train()
        for p in block.get_submodule(silent).parameters():
            nn.init.zeros_(p)  # this half adds nothing: what changes is the other half's
        assert not torch.equal(block(x), block(x))


# 6 The model

GPT_2_NAMES = {
    "token_embedding": "transformer.wte",
    "positions": "transformer.wpe.weight",
    "blocks": "transformer.h",
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.expand": "mlp.c_fc",
    "feed_forward.contract": "mlp.c_proj",
    "final_norm": "transformer.ln_f",
}


def test_the_function_is_gpt_2s():
    """Hugging Face's GPT-2 with the same weights, our positions and an untied output layer."""
    transformers = pytest.importorskip("transformers")
    ours = small_model(n_embd=32, n_head=4, context_length=24)
    draw_parameters(ours, std=0.1)  # so small that the epsilon of the norms matters
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=24, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()

    weights = {}
    for name, tensor in {**ours.state_dict(), "positions": ours.positions}.items():
        is_linear = name.startswith("blocks") and tensor.ndim == 2
        for our_name, their_name in GPT_2_NAMES.items():
            name = name.replace(our_name, their_name)
        weights[name] = tensor.T if is_linear else tensor  # theirs keeps these transposed
    theirs.load_state_dict(weights)

    ids = random_ids(3, 24)
    torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 5, 11])
def test_no_character_sees_a_later_one(position):
    model, ids = small_model(), random_ids(2, 12)
    changed_ids = ids.clone()
    changed_ids[:, position] = (ids[:, position] + 1) % 11
    before, after = model(ids)[0], model(changed_ids)[0]
    torch.testing.assert_close(before[:, :position], after[:, :position], atol=1e-6, rtol=0)
    assert not torch.equal(before[:, position], after[:, position])


@torch.no_grad()
def test_to_a_new_model_all_characters_are_about_equally_likely():
    model = small_model(vocab_size=90, n_embd=128, context_length=64)
    ids = random_ids(8, 65, vocab_size=90)
    _, loss = model(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(90), rel=0.05)


def test_each_layer_begins_with_its_size_and_those_before_a_sum_smaller_with_depth():
    model = GPT(GPTConfig(vocab_size=100, n_layer=8))
    sizes = {"token_embedding": 1.0, "qkv": 0.02, "expand": 0.02, "lm_head": 0.02}
    sizes |= {"output": 0.02 / 4, "contract": 0.02 / 4}
    for name, p in model.named_parameters():
        if p.dim() == 2:
            layer = name.split(".")[-2]
            assert p.std().item() == pytest.approx(sizes[layer], rel=0.1), name


@torch.no_grad()
def test_the_loss_is_the_mean_of_minus_log_probability():
    model, ids, targets = small_model(), random_ids(2, 5), random_ids(2, 5).flip(1)
    logits, loss = model(ids, targets)
    probabilities = logits.softmax(dim=-1).gather(2, targets[:, :, None])
    torch.testing.assert_close(loss, -probabilities.log().mean())
    assert model(ids)[1] is None


def test_it_learns_one_batch_by_heart_with_all_its_parameters(device):
    model = small_model(n_embd=32).to(device).train()
    ids = random_ids(4, 13).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        _, loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert all(p.grad.any() for p in model.parameters())


def test_the_parameters_have_the_names_and_shapes_that_saved_models_rely_on():
    V, C = 11, 16
    model = small_model(n_layer=1)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert shapes == {
        "token_embedding.weight": (V, C),
        "blocks.0.attention_norm.weight": (C,),
        "blocks.0.attention_norm.bias": (C,),
        "blocks.0.attention.qkv.weight": (3 * C, C),
        "blocks.0.attention.qkv.bias": (3 * C,),
        "blocks.0.attention.output.weight": (C, C),
        "blocks.0.attention.output.bias": (C,),
        "blocks.0.feed_forward_norm.weight": (C,),
        "blocks.0.feed_forward_norm.bias": (C,),
        "blocks.0.feed_forward.expand.weight": (4 * C, C),
        "blocks.0.feed_forward.expand.bias": (4 * C,),
        "blocks.0.feed_forward.contract.weight": (C, 4 * C),
        "blocks.0.feed_forward.contract.bias": (C,),
        "final_norm.weight": (C,),
        "final_norm.bias": (C,),
        "lm_head.weight": (V, C),
    }
    assert model.count_parameters() == sum(math.prod(shape) for shape in shapes.values())


def test_the_model_compiles_into_one_graph():
    model, ids = small_model(), random_ids(4, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):  # the way with the most branches
        torch.testing.assert_close(compiled(ids, ids)[1], model(ids, ids)[1])


# 7 Generation


def generated(model: GPT, ids: Tensor, seed: int, **limits: Any) -> Tensor:
    """Returns 60 new ids of each text, `(B, 60)`."""
    return torch.stack([*model.generate(ids, 60, **limits, generator=seeded(seed))], dim=1)


@torch.no_grad()
def generated_without_a_cache(model: GPT, ids: Tensor, seed: int, **limits: Any) -> Tensor:
    """What generation must equal: the whole window is read again for each character."""
    context_length = model.config.context_length
    generator = seeded(seed)
    window = ids[:, -context_length:]
    new_ids = []
    for _ in range(60):
        logits, _ = model(window)
        new_ids.append(sample(logits[:, -1], **limits, generator=generator))
        window = torch.cat([window, new_ids[-1][:, None]], dim=1)
        if window.size(1) > context_length:
            window = window[:, -math.ceil(context_length / 2) :]
    return torch.stack(new_ids, dim=1)


@pytest.mark.parametrize(("context_length", "prompt_length"), [(40, 3), (12, 30), (7, 7), (1, 1)])
def test_generation_equals_reading_everything_again(context_length, prompt_length, device):
    model = small_model(context_length=context_length).to(device)
    ids = random_ids(3, prompt_length).to(device)
    limits = {"temperature": 1.5, "top_k": 9, "top_p": 0.9}
    expected = generated_without_a_cache(model, ids, 9, **limits)
    assert torch.equal(generated(model, ids, 9, **limits), expected)


def test_the_seed_decides_the_texts_and_the_texts_of_a_batch_differ():
    model, ids = small_model(), random_ids(1, 4).expand(6, -1)
    texts = generated(model, ids, seed=1)
    assert torch.equal(generated(model, ids, seed=1), texts)
    assert not torch.equal(generated(model, ids, seed=2), texts)
    assert len(texts.unique(dim=0)) == 6


def probabilities_of(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    """The softmax at this temperature of the likeliest characters within the limits."""
    scores = [math.exp(score / temperature) for score in logits]
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
    total = sum(scores[i] for i in ranked)
    kept = []
    for i in ranked:
        if top_p is None or sum(scores[j] for j in kept) < top_p * total:
            kept.append(i)
    total = sum(scores[i] for i in kept)
    return [score / total if i in kept else 0.0 for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (0.7, None, None),
        (1.5, 3, None),
        (1.5, 99, None),
        (2.0, None, 0.68),  # the likeliest two have 0.686 together
        (2.0, None, 0.69),
        (3.0, 4, 0.62),  # of the likeliest four, two have 0.65 together, and of all five 0.60
    ],
)
def test_sample_draws_by_the_probabilities_of_what_the_limits_keep(temperature, top_k, top_p):
    logits = [0.5, -1.0, 2.0, 0.0, -3.0]
    expected = probabilities_of(logits, temperature, top_k, top_p)
    rows = torch.tensor(logits).expand(20_000, -1)
    drawn = sample(rows, temperature, top_k, top_p, generator=seeded(5))
    chi_square = 0.0
    for count, p in zip(drawn.bincount(minlength=5).tolist(), expected, strict=True):
        assert (count > 0) == (p > 0)
        if p > 0:
            chi_square += (count - 20_000 * p) ** 2 / (20_000 * p)
    assert chi_square < 18.47  # exceeded once in a thousand times with 4 degrees of freedom


@pytest.mark.parametrize(
    "limits",
    [
        {"temperature": 0},
        {"temperature": 1e-9},
        {"temperature": 5.0, "top_k": 1},
        {"temperature": 5.0, "top_p": 1e-6},
    ],
)
def test_where_one_candidate_is_left_it_is_the_likeliest_of_each_text(limits):
    logits = torch.randn(64, 20, generator=seeded(12))
    assert torch.equal(sample(logits, **limits), logits.argmax(dim=-1))


# 8 Files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a small model, in a directory of its own."""
    path = tmp_path / "new" / "m.pth"
    save_model(path, small_model(), CharTokenizer(CHARACTERS), step=7, val_loss=1.5)
    return path


def test_a_loaded_model_is_the_saved_one_ready_to_generate(path, device):
    model = small_model()
    loaded, tokenizer, metadata = load_model(path, device)
    assert next(loaded.parameters()).device.type == device
    torch.testing.assert_close(loaded.cpu().state_dict(), model.state_dict(), atol=0, rtol=0)
    assert loaded.config == model.config
    assert not loaded.training
    assert tokenizer.characters == CHARACTERS
    assert metadata == {"step": 7, "val_loss": 1.5}
    assert list(path.parent.iterdir()) == [path]


# Set in the environment for a longer search: 200,000 changes take some minutes.
CHANGES = int(os.environ.get("CHANGES", "2000"))


def randomly_damaged(data: bytes, rng: random.Random) -> bytes:
    """Changes, removes or adds bytes at a random place."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 1, 1, 8, 1000]))
    kind = rng.choice(["change", "cut", "remove", "add"])
    if kind == "change":
        changed = bytes((byte + rng.randrange(1, 256)) % 256 for byte in data[start:end])
        return data[:start] + changed + data[end:]
    if kind == "cut":
        return data[:start]
    if kind == "remove":
        return data[:start] + data[end:]
    return data[:start] + rng.randbytes(end - start) + data[start:]


def test_a_damaged_file_is_refused_whatever_the_damage(path):
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(CHANGES):
        path.write_bytes(randomly_damaged(whole, rng))
        with pytest.raises(InputError, match=r"m\.pth is damaged, or is not a model"):
            load_model(path)


class CodeThatMustNotRun:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return exec, ("raise SystemExit('code of the file was run')",)


def test_code_of_a_file_is_never_run(path):
    buffer = io.BytesIO()
    torch.save(CodeThatMustNotRun(), buffer)
    archive = buffer.getvalue()
    path.write_bytes(archive + hashlib.sha256(archive).digest())
    with pytest.raises(InputError, match=r"m\.pth is not a model of this project$"):
        load_model(path)


def test_a_model_of_an_edited_model_py_is_refused_with_what_is_missing(path, monkeypatch):
    class Edited(GPT):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__(config)
            self.extra = nn.Linear(1, 1)

    monkeypatch.setattr(model_module, "GPT", Edited)
    with pytest.raises(InputError, match=r"trained with another model\.py.*extra\.weight"):
        load_model(path)


def test_a_model_with_another_configuration_is_refused(path):
    @dataclass(frozen=True)
    class EditedConfig(GPTConfig):
        n_experts: int = 8

    edited = small_model()
    edited.config = EditedConfig(vocab_size=11)
    save_model(path, edited, CharTokenizer(CHARACTERS))
    with pytest.raises(InputError, match=r"trained with another model\.py: .*'n_experts': 8"):
        load_model(path)


def test_a_model_saved_on_a_gpu_loads_on_a_machine_without_one(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        save_model(path, small_model(), CharTokenizer(CHARACTERS))
    model, _, _ = load_model(path)
    assert model.lm_head.weight.device.type == "cpu"


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=r"m\.pth cannot be written: no space left"):
        save_model(path, small_model(), CharTokenizer("another"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@posix_only  # Windows refuses to replace a file while it is read
def test_at_every_moment_of_saving_the_path_holds_a_whole_file(path):
    def save_again_and_again() -> None:
        for step in range(50):
            save_model(path, small_model(), CharTokenizer(CHARACTERS), step=step)

    writer = threading.Thread(target=save_again_and_again)
    writer.start()
    while writer.is_alive():
        load_model(path)  # raises InputError if it is not whole
    writer.join()


def test_a_text_is_read_with_plain_line_breaks_and_composed_letters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffa\r\nb\rc\nЖ中🪐 e\u0301".encode())
    assert read_text(path) == "a\nb\nc\nЖ中🪐 \u00e9"


@pytest.mark.parametrize("name", ["toaster", "meta"])  # meta is there, and computes nothing
def test_a_named_device_that_does_not_work_is_refused(name):
    with pytest.raises(InputError, match=f"--device {name} cannot be used here"):
        find_device(name)


@pytest.mark.parametrize("accelerator", [None, torch.device("meta")])
def test_auto_is_the_cpu_without_an_accelerator_that_works(monkeypatch, accelerator):
    def find_accelerator(check_available: bool) -> torch.device | None:
        return accelerator

    monkeypatch.setattr(torch.accelerator, "current_accelerator", find_accelerator)
    assert find_device("auto") == torch.device("cpu")
