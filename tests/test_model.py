"""What holds for model.py, in its order: sizes, characters, positions, attention, model, files."""

import errno
import hashlib
import io
import math
import os
import pickle
import random
import threading
import unicodedata
from collections.abc import Callable
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
    causal_mask,
    find_device,
    keep_top_k,
    keep_top_p,
    load_model,
    read_text,
    sample,
    save_model,
    sinusoidal_encoding,
)

CHARACTERS = "abcdefghijk"  # the vocabulary of the small models
SMALL_SIZES = {
    "vocab_size": len(CHARACTERS),
    "context_length": 12,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(**sizes: Any) -> GPT:
    """Returns a model that computes in no time, always with the same weights."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL_SIZES, **sizes})).eval()


def random_ids(*shape: int, vocab_size: int = len(CHARACTERS)) -> Tensor:
    return torch.randint(vocab_size, shape, generator=seeded(1))


# 1 Configuration


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(InputError, match=r"n_embd \(128\) must be a multiple of n_head \(3\)"):
        GPTConfig(vocab_size=11, n_embd=128, n_head=3)


# 2 Text and ids


@pytest.mark.parametrize(
    "text", ["", "A star.\r\n\t", "中文科幻小说", "👩‍🚀 🪐!", "\x00\ud800\U0010ffff"]
)
def test_decode_inverts_encode_and_the_ids_are_positions_in_the_sorted_vocabulary(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == torch.long
    assert ids.tolist() == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("unknown", ["b", "Ж", "🪐", "\ud800"])
def test_an_unknown_character_is_named_with_the_vocabulary(unknown):
    with pytest.raises(InputError) as error:
        CharTokenizer("ac").encode("aac" + unknown)
    assert str(error.value).startswith(f"the character {unknown!r} is not in the vocabulary")
    assert str(error.value).endswith("which is: a c")


# 3 Positions


@pytest.mark.parametrize(("length", "channels"), [(1, 1), (7, 2), (5, 9), (40, 64)])
def test_the_table_of_positions_is_the_papers(length, channels):
    table = sinusoidal_encoding(length, channels)
    assert table.shape == (length, channels)
    for t in range(length):
        for c in range(channels):
            pair = c // 2
            angle = t / 10000 ** (2 * pair / channels)
            expected = math.sin(angle) if c % 2 == 0 else math.cos(angle)
            assert table[t, c].item() == pytest.approx(expected, abs=1e-6)


def test_a_query_turned_back_by_three_characters_finds_the_third_to_last():
    table = sinusoidal_encoding(40, 64)  # what the docstring says about queries and keys
    for t in range(3, 40):
        assert (table @ table[t - 3]).argmax() == t - 3


# 4 Attention

# T queries, those of the last T of S characters: all, one, or some of them.
QUERIES_AND_KEYS = [(1, 1), (2, 2), (1, 9), (5, 9), (9, 9), (7, 65)]


def random_queries_keys_values(S: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 3, S, 5, generator=seeded(2))  # (B, H, S, D) each
    return q, k, v


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


def test_the_mask_is_the_one_in_its_docstring():
    assert causal_mask(3, 3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(2, 3).int().tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(("T", "S"), QUERIES_AND_KEYS)
def test_the_formula_is_right_for_queries_after_any_number_of_keys(T, S):
    q, k, v = random_queries_keys_values(S)
    weights = Attention().weights(q[:, :, S - T :], k)
    expected = attention_one_query_at_a_time(q, k, v)[:, :, S - T :]
    torch.testing.assert_close(weights @ v, expected)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, T))


@pytest.mark.parametrize(("T", "S"), QUERIES_AND_KEYS)
def test_the_kernel_is_right_for_queries_after_any_number_of_keys(T, S, device):
    q, k, v = random_queries_keys_values(S)
    result = Attention()(q[:, :, S - T :].to(device), k.to(device), v.to(device)).cpu()
    expected = attention_one_query_at_a_time(q, k, v)[:, :, S - T :]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [11, 1], [1, 11], [5, 7], [2, 1, 3, 6]])
def test_reading_in_chunks_through_caches_is_reading_at_once(chunks):
    model, ids = small_model(), random_ids(3, 12)
    caches = [KVCache() for _ in model.blocks]
    pieces = [model(piece, caches=caches)[0] for piece in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids)[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_more_characters_than_the_context_are_refused_after_cached_ones_too():
    model = small_model()
    with pytest.raises(ValueError, match="13 characters do not fit a context of 12"):
        model(random_ids(1, 13))
    caches = [KVCache() for _ in model.blocks]
    model(random_ids(1, 9), caches=caches)
    with pytest.raises(ValueError, match="13 characters do not fit a context of 12"):
        model(random_ids(1, 4), caches=caches)


# 5 The block


def torchs_layer_with_the_weights_of(block: TransformerBlock) -> nn.TransformerEncoderLayer:
    C = block.attention.output.in_features
    layer = nn.TransformerEncoderLayer(
        d_model=C,
        nhead=block.attention.n_head,
        dim_feedforward=4 * C,
        dropout=0.0,
        activation=lambda x: F.gelu(x, approximate="tanh"),
        batch_first=True,
        norm_first=True,
    )
    layer.norm1.load_state_dict(block.attention_norm.state_dict())
    layer.self_attn.in_proj_weight.data.copy_(block.attention.qkv.weight.data)
    layer.self_attn.in_proj_bias.data.copy_(block.attention.qkv.bias.data)
    layer.self_attn.out_proj.load_state_dict(block.attention.output.state_dict())
    layer.norm2.load_state_dict(block.feed_forward_norm.state_dict())
    layer.linear1.load_state_dict(block.feed_forward.expand.state_dict())
    layer.linear2.load_state_dict(block.feed_forward.contract.state_dict())
    return layer.eval()


def test_a_block_is_torchs_encoder_layer_with_the_same_weights():
    block = TransformerBlock(GPTConfig(11, context_length=9, n_head=4, n_embd=32)).eval()
    for p in block.parameters():
        nn.init.normal_(p, std=0.2, generator=seeded(3))  # biases and norms that matter
    theirs = torchs_layer_with_the_weights_of(block)
    x = torch.randn(3, 9, 32, generator=seeded(4))
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    expected = theirs(x, src_mask=mask, is_causal=True)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_dropout_changes_each_result_in_training_and_none_outside():
    with_dropout, without = small_model(dropout=0.5), small_model(dropout=0.0)
    ids = random_ids(2, 12)
    assert torch.equal(with_dropout(ids)[0], without(ids)[0])
    with_dropout.train()
    assert not torch.equal(with_dropout(ids)[0], with_dropout(ids)[0])


# 6 The model


def test_the_function_is_gpt_2s():
    """Hugging Face's GPT-2 with the same weights, our positions and an untied output layer."""
    transformers = pytest.importorskip("transformers")
    ours = small_model(n_embd=32, n_head=4, context_length=24)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3, generator=seeded(5))
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=24, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()

    weights = {
        "transformer.wte.weight": ours.token_embedding.weight,
        "transformer.wpe.weight": ours.positions,
        "transformer.ln_f.weight": ours.final_norm.weight,
        "transformer.ln_f.bias": ours.final_norm.bias,
        "lm_head.weight": ours.lm_head.weight,
    }
    their_names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.expand": "mlp.c_fc",
        "feed_forward.contract": "mlp.c_proj",
    }
    for i in range(2):
        for name, their_name in their_names.items():
            layer = ours.blocks[i].get_submodule(name)
            is_linear = isinstance(layer, nn.Linear)
            # Theirs keeps the weights of a linear layer transposed.
            weight = layer.weight.T if is_linear else layer.weight
            weights[f"transformer.h.{i}.{their_name}.weight"] = weight
            weights[f"transformer.h.{i}.{their_name}.bias"] = layer.bias
    theirs.load_state_dict(weights)

    ids = random_ids(3, 24)
    torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_no_character_sees_a_later_one(seed):
    rng = random.Random(seed)
    T = rng.randint(2, 24)
    V = rng.randint(2, 50)
    model = small_model(vocab_size=V, context_length=T)
    ids = random_ids(2, T, vocab_size=V)
    position = rng.randrange(T)
    changed_ids = ids.clone()
    changed_ids[:, position] = (ids[:, position] + rng.randrange(1, V)) % V

    before, after = model(ids)[0], model(changed_ids)[0]
    torch.testing.assert_close(before[:, :position], after[:, :position], atol=1e-6, rtol=0)
    assert not torch.equal(before[:, position], after[:, position])


@torch.no_grad()
@pytest.mark.parametrize("V", [2, 90, 8000])
def test_to_a_new_model_all_characters_are_about_equally_likely(V):
    model = small_model(vocab_size=V, n_embd=128, context_length=64)
    ids = random_ids(8, 65, vocab_size=V)
    _, loss = model(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(V), rel=0.05)


@torch.no_grad()
def test_the_loss_is_the_mean_of_minus_log_probability():
    model = small_model()
    ids, targets = random_ids(2, 5), random_ids(2, 5).flip(1)
    logits, loss = model(ids, targets)
    losses = []
    for b in range(2):
        for t in range(5):
            probability = logits[b, t].softmax(dim=0)[targets[b, t]].item()
            losses.append(-math.log(probability))
    assert loss.item() == pytest.approx(sum(losses) / 10, rel=1e-5)
    assert model(ids)[1] is None


def test_it_learns_one_batch_by_heart(device):
    model = small_model(n_embd=32).to(device).train()
    ids = random_ids(4, 13).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        _, loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


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


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_model_compiles_into_one_graph(precision):
    model, ids = small_model(context_length=64), random_ids(4, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        torch.testing.assert_close(compiled(ids, ids)[1], model(ids, ids)[1])


# 7 Generation


def generated(model: GPT, ids: Tensor, count: int, seed: int = 9, **limits: Any) -> Tensor:
    """Returns the new ids, `(B, count)`."""
    new_ids = model.generate(ids, count, **limits, generator=seeded(seed))
    return torch.stack(list(new_ids), dim=1)


@torch.no_grad()
def generated_without_a_cache(model: GPT, ids: Tensor, count: int, **limits: Any) -> Tensor:
    """What generation must equal: the whole window is read again for each character."""
    context_length = model.config.context_length
    generator = seeded(9)
    window = ids[:, -context_length:]
    new_ids = []
    for _ in range(count):
        logits, _ = model(window)
        new_ids.append(sample(logits[:, -1], **limits, generator=generator))
        window = torch.cat([window, new_ids[-1][:, None]], dim=1)
        if window.size(1) > context_length:
            window = window[:, -math.ceil(context_length / 2) :]
    return torch.stack(new_ids, dim=1)


@pytest.mark.parametrize("limits", [{"temperature": 0}, {"temperature": 1.5, "top_k": 4}])
@pytest.mark.parametrize(
    ("context_length", "prompt_length", "batch_size"),
    [(40, 3, 1), (12, 12, 2), (12, 30, 5), (7, 1, 3), (1, 1, 2)],
)
def test_generation_equals_reading_everything_again(
    context_length, prompt_length, batch_size, limits, device
):
    model = small_model(context_length=context_length).to(device)
    ids = random_ids(batch_size, prompt_length).to(device)
    expected = generated_without_a_cache(model, ids, 60, **limits)
    assert torch.equal(generated(model, ids, 60, **limits), expected)


def test_the_seed_decides_the_texts_and_the_texts_of_a_batch_differ():
    model, ids = small_model(), random_ids(1, 4).expand(6, -1)
    texts = generated(model, ids, 25, seed=1)
    assert torch.equal(generated(model, ids, 25, seed=1), texts)
    assert not torch.equal(generated(model, ids, 25, seed=2), texts)
    assert len(texts.unique(dim=0)) == 6


def test_generation_runs_the_modules_as_they_are_now():
    model, ids = small_model(), random_ids(1, 4)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=seeded(20))  # sure of what follows
    before = generated(model, ids, 60)
    model.blocks[1].attention.register_forward_hook(lambda module, inputs, output: 9 * output)
    after = generated(model, ids, 60)
    assert torch.equal(after, generated_without_a_cache(model, ids, 60))
    assert not torch.equal(after, before)


def chi_square(counts: Tensor, probabilities: list[float]) -> float:
    total = int(counts.sum())
    terms = []
    for count, probability in zip(counts.tolist(), probabilities, strict=True):
        expected = total * probability
        terms.append((count - expected) ** 2 / expected)
    return sum(terms)


def test_sample_follows_the_softmax_of_the_scores_divided_by_the_temperature():
    logits, temperature = [0.5, -1.0, 2.0, 0.0, -3.0], 0.7
    exponentials = [math.exp(score / temperature) for score in logits]
    probabilities = [e / sum(exponentials) for e in exponentials]
    drawn = sample(torch.tensor(logits).expand(20_000, -1), temperature, generator=seeded(5))
    # With 4 degrees of freedom, 18.47 is exceeded once in a thousand times.
    assert chi_square(drawn.bincount(minlength=5), probabilities) < 18.47


def kept_ids(logits: Tensor) -> list[list[int]]:
    """Returns the ids in each row that can still be drawn."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def likeliest_that_reach(logits: list[float], p: float) -> list[int]:
    """Adds one character after the other, the likeliest first, until they have p together."""
    total = sum(math.exp(score) for score in logits)
    by_likelihood = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept, reached = [], 0.0
    for i in by_likelihood:
        if reached >= p:
            break
        kept.append(i)
        reached += math.exp(logits[i]) / total
    return kept


@pytest.mark.parametrize("k", [1, 5, 11, 1000])
def test_keep_top_k_keeps_the_k_highest_scores(k):
    logits = torch.randn(50, 11, generator=seeded(8))
    kept = keep_top_k(logits, k)
    for row, ids in zip(logits.tolist(), kept_ids(kept), strict=True):
        assert ids == sorted(sorted(range(11), key=lambda i: -row[i])[:k])
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.95, 0.999])
def test_keep_top_p_keeps_the_likeliest_that_together_reach_p(p):
    logits = 2 * torch.randn(50, 11, generator=seeded(10))
    kept = keep_top_p(logits, p)
    for row, ids in zip(logits.tolist(), kept_ids(kept), strict=True):
        assert ids == sorted(likeliest_that_reach(row, p))
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


@pytest.mark.parametrize(
    "limits",
    [
        {"temperature": 0},
        {"temperature": 1e-9},
        {"temperature": 5.0, "top_k": 1},
        {"temperature": 5.0, "top_p": 1e-6},
    ],
)
def test_where_one_candidate_is_left_it_is_the_likeliest(limits):
    logits = torch.randn(64, 20, generator=seeded(12))
    assert torch.equal(sample(logits, **limits), logits.argmax(dim=-1))


# 8 Files


def save_small_model(path: Path, model: GPT, **metadata: Any) -> None:
    save_model(path, model, CharTokenizer(CHARACTERS), **metadata)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def have_equal_weights(a: GPT, b: GPT) -> bool:
    a_weights, b_weights = a.state_dict(), b.state_dict()
    return a_weights.keys() == b_weights.keys() and all(
        torch.equal(a_weights[name], b_weights[name]) for name in a_weights
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a small model, in a directory of its own."""
    path = tmp_path / "new" / "m.pth"
    save_small_model(path, small_model(), step=7, val_loss=1.5)
    return path


def test_a_loaded_model_is_the_saved_one_ready_to_generate(path, device):
    model = small_model()
    loaded, tokenizer, metadata = load_model(path, device)
    assert next(loaded.parameters()).device.type == device
    assert have_equal_weights(loaded.cpu(), model)
    assert loaded.config == model.config
    assert not loaded.training
    assert tokenizer.characters == CHARACTERS
    assert metadata == {"step": 7, "val_loss": 1.5}
    assert names_in(path.parent) == ["m.pth"]


def test_torch_alone_can_read_a_model_file(path):
    content = torch.load(path, weights_only=True)
    assert content["weights"].keys() == small_model().state_dict().keys()


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


@pytest.mark.parametrize("content", [CodeThatMustNotRun(), nn.Linear(2, 2)])
@pytest.mark.parametrize("with_digest", [True, False])
def test_a_file_of_another_program_is_refused_and_its_code_never_run(path, content, with_digest):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getvalue()
    digest = hashlib.sha256(archive).digest() if with_digest else b""
    path.write_bytes(archive + digest)
    with pytest.raises(InputError, match=r"m\.pth is .*not a model of this project$"):
        load_model(path)


def test_a_model_of_an_edited_model_py_is_refused_with_what_is_missing(path, monkeypatch):
    class Edited(GPT):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__(config)
            self.extra = nn.Linear(1, 1)

    monkeypatch.setattr(model_module, "GPT", Edited)
    with pytest.raises(InputError, match=r"trained with another model\.py[\s\S]*extra\.weight"):
        load_model(path)


def test_a_model_saved_on_a_gpu_loads_on_a_machine_without_one(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        save_small_model(path, small_model())
    model, _, _ = load_model(path)
    assert model.lm_head.weight.device.type == "cpu"


def test_what_cannot_be_saved_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_small_model(path, small_model(), function=lambda: None)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="cannot be written: no space left"):
        save_small_model(path, small_model())
    assert path.read_bytes() == before
    assert names_in(path.parent) == ["m.pth"]


@posix_only  # Windows refuses to replace a file while it is read
def test_at_every_moment_of_saving_the_path_holds_a_whole_file(path):
    def save_again_and_again() -> None:
        for step in range(50):
            save_small_model(path, small_model(), step=step)

    writer = threading.Thread(target=save_again_and_again)
    writer.start()
    while writer.is_alive():
        load_model(path)  # raises InputError if it is not whole
    writer.join()


def test_a_text_is_read_with_plain_line_breaks_and_composed_letters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffa\r\nb\rc\nЖ中🪐 e\u0301".encode())
    assert read_text(path) == "a\nb\nc\nЖ中🪐 \u00e9"
    assert unicodedata.is_normalized("NFC", read_text(path))


def test_a_file_that_is_not_utf_8_is_refused_with_its_first_bad_byte(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"caf\xe9 noir")
    with pytest.raises(InputError, match=r"text\.txt is not UTF-8.*position 3\b"):
        read_text(path)


@pytest.mark.parametrize("name", ["toaster", "cuda:99", "", "meta"])
def test_a_named_device_that_does_not_work_is_refused(name):
    with pytest.raises(InputError, match=f"--device {name} cannot be used here"):
        find_device(name)


@pytest.mark.parametrize(
    ("accelerator", "expected"), [(None, "cpu"), ("meta", "cpu"), ("cpu", "cpu")]
)
def test_auto_takes_an_accelerator_only_if_it_works(monkeypatch, accelerator, expected):
    found = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert find_device("auto") == torch.device(expected)
