"""What holds for model.py, in its order: sizes, characters, positions, attention, model, files."""

import contextlib
import copy
import dataclasses
import errno
import hashlib
import io
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model as model_module
from model import (
    GPT,
    Attention,
    CharTokenizer,
    FeedForward,
    GPTConfig,
    KVCache,
    Linear,
    TransformerBlock,
    draw,
    keep_top_k,
    keep_top_p,
    load_model,
    sample,
    save_model,
    sinusoidal_encoding,
    user_path,
)

CHARACTERS = "abcdefghijk"  # the vocabulary of the small models
SMALL_SIZES = {
    "vocab_size": len(CHARACTERS),
    "context_length": 12,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
}
LARGEST_U = 1 - 2**-24  # the largest number that torch.rand can return


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_model(**sizes: Any) -> GPT:
    """Returns a model that computes in no time, always with the same weights."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL_SIZES, **sizes})).eval()


def model_with_large_weights(**sizes: Any) -> GPT:
    """Returns a model that is sure of what follows, so that a change of it changes its text."""
    model = small_model(**sizes)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=seeded(20))
    return model


def random_ids(*shape: int, vocab_size: int = len(CHARACTERS)) -> Tensor:
    return torch.randint(vocab_size, shape, generator=seeded(1))


# ----------------------------------------------------------------------------------------
# 1 Configuration
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL_SIZES)
@pytest.mark.parametrize("size", [0, -1, 1.5, "3", None, True, 10**12])
def test_an_invalid_size_is_refused_by_name(name, size):
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        GPTConfig(**{**SMALL_SIZES, name: size})


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match=r"n_embd \(128\) must be a multiple of n_head \(3\)"):
        GPTConfig(vocab_size=11, n_embd=128, n_head=3)


@pytest.mark.parametrize("dropout", [1.0, -0.1, math.nan])
def test_a_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout must be at least 0 and less than 1"):
        GPTConfig(vocab_size=11, dropout=dropout)


@pytest.mark.parametrize("vocab_size", [1, 74])
@pytest.mark.parametrize("n_layer", [1, 4])
@pytest.mark.parametrize("n_embd", [2, 48])
def test_the_parameter_count_is_that_of_the_model(vocab_size, n_layer, n_embd):
    model = small_model(vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd)
    real_count = sum(p.numel() for p in model.parameters())
    assert model.config.parameter_count == real_count


# ----------------------------------------------------------------------------------------
# 2 Text and ids
# ----------------------------------------------------------------------------------------

TEXTS = [
    "",
    "a",
    "A star.\r\nAn \t older star?\r\n",
    "中文科幻小说",
    "👩‍🚀 🪐!",
    "e\u0301 is not \u00e9",
    "\ud800 alone",
    "\x00\u2028\u0085\ufeff",
    "\U0010ffff",
]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode(text):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_vocabulary_holds_each_character_of_the_text_once_in_sorted_order(text):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert tokenizer.vocab_size == len(set(text))


def test_the_ids_are_positions_in_the_vocabulary_in_a_long_text_too():
    text = "".join(random.Random(0).choices("ab cd\nêé中🪐", k=2**20 + 3))
    tokenizer = CharTokenizer.from_text(text)
    id_of = {character: i for i, character in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text).tolist() == [id_of[character] for character in text]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(2**8, torch.uint8), (2**8 + 1, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)],
)
def test_the_ids_have_the_smallest_type_that_holds_them(size, dtype):
    first = 0x10000  # from here on, every number is a character
    characters = "".join(chr(first + i) for i in range(size))
    ids = CharTokenizer(characters).encode(characters)
    assert ids.dtype == dtype
    assert ids.tolist() == list(range(size))


@pytest.mark.parametrize("position", [0, 7, 2**18 + 1])
@pytest.mark.parametrize("unknown", ["b", "Ж", "🪐", "\ud800"])
def test_an_unknown_character_is_named_wherever_it_stands(unknown, position):
    with pytest.raises(ValueError, match=rf"\(U\+{ord(unknown):04X}\) is not in the vocabulary"):
        CharTokenizer("ac").encode("a" * position + unknown + "a")


@pytest.mark.parametrize("characters", ["ba", "aa", ["a", "c"], None, 5])
def test_a_vocabulary_that_is_not_sorted_characters_is_refused(characters):
    with pytest.raises(ValueError, match="different characters in sorted order"):
        CharTokenizer(characters)


# ----------------------------------------------------------------------------------------
# 3 Positions
# ----------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------
# 4 Attention
# ----------------------------------------------------------------------------------------

# T queries, those of the last T of S characters: all, one, or some of them.
QUERIES_AND_KEYS = [(1, 1), (2, 2), (1, 2), (1, 9), (2, 9), (5, 9), (8, 9), (9, 9), (7, 65)]


def random_queries_keys_values(S: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 3, S, 5, generator=seeded(2))  # (B, H, S, D) each
    return q, k, v


def attention_one_query_at_a_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt(D)) V, where a query gets the keys up to its own, and needs no mask."""
    D = q.size(-1)
    rows = []
    for t in range(q.size(-2)):
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, : t + 1]) / D**0.5
        exponentials = scores.exp()
        weights = exponentials / exponentials.sum(dim=-1, keepdim=True)
        rows.append(torch.einsum("bhs,bhsd->bhd", weights, v[:, :, : t + 1]))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize(("T", "S"), QUERIES_AND_KEYS)
def test_the_formula_is_right_for_queries_after_any_number_of_keys(T, S):
    q, k, v = random_queries_keys_values(S)
    result = Attention().weights(q[:, :, S - T :], k) @ v
    expected = attention_one_query_at_a_time(q, k, v)[:, :, S - T :]
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(("T", "S"), QUERIES_AND_KEYS)
def test_the_kernel_is_right_for_queries_after_any_number_of_keys(T, S):
    q, k, v = random_queries_keys_values(S)
    result = Attention()(q[:, :, S - T :], k, v)
    expected = attention_one_query_at_a_time(q, k, v)[:, :, S - T :]
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(("T", "S"), QUERIES_AND_KEYS)
def test_the_weights_of_a_query_sum_to_one_and_are_zero_for_later_keys(T, S):
    q, k, _ = random_queries_keys_values(S)
    weights = Attention().weights(q[:, :, S - T :], k)
    assert weights.shape == (2, 3, T, S)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, T))
    for t in range(T):
        position = S - T + t
        assert (weights[:, :, t, : position + 1] > 0).all()
        assert (weights[:, :, t, position + 1 :] == 0).all()


def random_chunks(length: int, seed: int) -> list[int]:
    """Divides a length into random numbers of at least 1."""
    rng = random.Random(seed)
    chunks = []
    while sum(chunks) < length:
        chunks.append(rng.randint(1, length - sum(chunks)))
    return chunks


def new_caches(model: GPT, batch_size: int) -> list[KVCache]:
    return [KVCache(model.config, batch_size, model.lm_head.weight) for _ in model.blocks]


def logits_in_chunks(model: GPT, ids: Tensor, chunks: list[int], caches: list[KVCache]) -> Tensor:
    pieces = [model(piece, caches=caches)[0] for piece in ids.split(chunks, dim=1)]
    return torch.cat(pieces, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "chunks", [[12], [1] * 12, [11, 1], [1, 11], [5, 7], *(random_chunks(12, s) for s in range(5))]
)
def test_reading_in_chunks_through_caches_is_reading_at_once(chunks):
    model, ids = small_model(), random_ids(3, 12)
    in_chunks = logits_in_chunks(model, ids, chunks, new_caches(model, batch_size=3))
    torch.testing.assert_close(in_chunks, model(ids)[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_reset_cache_is_as_good_as_a_new_one():
    model, ids = small_model(), random_ids(3, 12)
    caches = new_caches(model, batch_size=3)
    logits_in_chunks(model, ids.flip(1), [12], caches)
    for cache in caches:
        cache.reset()
    in_chunks = logits_in_chunks(model, ids, [4, 8], caches)
    torch.testing.assert_close(in_chunks, model(ids)[0], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_more_characters_than_the_context_are_refused_after_cached_ones_too():
    model = small_model()
    caches = new_caches(model, batch_size=1)
    model(random_ids(1, 9), caches=caches)
    with pytest.raises(ValueError, match="13 characters do not fit a context of 12"):
        model(random_ids(1, 4), caches=caches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_cache_has_the_type_and_the_device_of_the_weights(dtype, device):
    weights = torch.empty(1, dtype=dtype, device=device)
    cache = KVCache(GPTConfig(**SMALL_SIZES), 2, weights)
    for kept in (cache.keys, cache.values):
        assert kept.dtype == dtype
        assert kept.device == weights.device


# ----------------------------------------------------------------------------------------
# 5 The block
# ----------------------------------------------------------------------------------------


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


def test_dropout_changes_nothing_outside_training():
    with_dropout, without = small_model(dropout=0.5), small_model(dropout=0.0)
    ids = random_ids(2, 12)
    assert torch.equal(with_dropout(ids)[0], without(ids)[0])


def test_dropout_changes_each_result_in_training():
    model = small_model(dropout=0.5).train()
    ids = random_ids(2, 12)
    assert not torch.equal(model(ids)[0], model(ids)[0])


# ----------------------------------------------------------------------------------------
# 6 The model
# ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
def test_no_character_sees_a_later_one(seed):
    rng = random.Random(seed)
    T = rng.randint(2, 24)
    V = rng.randint(2, 50)
    n_head = rng.choice([1, 2, 4])
    model = small_model(
        vocab_size=V,
        context_length=T,
        n_layer=rng.randint(1, 3),
        n_head=n_head,
        n_embd=n_head * rng.choice([4, 6, 8]),
    )
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


def test_without_targets_there_is_no_loss():
    _, loss = small_model()(random_ids(2, 5))
    assert loss is None


def test_it_learns_one_batch_by_heart():
    model = small_model(n_embd=32).train()
    ids = random_ids(4, 13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        _, loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_the_parameters_have_the_names_and_shapes_that_saved_models_rely_on():
    V, C = 11, 16
    shapes = {name: tuple(p.shape) for name, p in small_model(n_layer=1).state_dict().items()}
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


def test_more_characters_than_the_context_are_refused():
    with pytest.raises(ValueError, match="13 characters do not fit a context of 12"):
        small_model()(random_ids(1, 13))


def test_the_model_compiles_into_one_graph():
    model, ids = small_model(context_length=64), random_ids(4, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, ids)[1], model(ids, ids)[1])


def test_one_compiled_graph_serves_any_length():
    graphs = []

    def keep_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    layers = FeedForward(GPTConfig(11, n_embd=64))
    compiled = torch.compile(layers, backend=keep_graph, dynamic=True)
    for length in (60, 16, 4, 2):
        x = torch.randn(1, length, 64)
        torch.testing.assert_close(compiled(x), layers(x))
    assert len(graphs) == 1


# Generation


def generated(model: GPT, ids: Tensor, count: int, seed: int = 9, **limits: Any) -> Tensor:
    """Returns the new ids, `(B, count)`."""
    new_ids = model.generate(ids, count, **limits, generator=seeded(seed))
    return torch.stack(list(new_ids), dim=1)


@torch.no_grad()
def generated_without_a_cache(
    model: GPT,
    ids: Tensor,
    count: int,
    seed: int = 9,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """What generation must equal: the whole window is read again for each character."""
    context_length = model.config.context_length
    seeds = torch.randint(2**62, (len(ids),), generator=seeded(seed))
    generators = [seeded(seed_of_row) for seed_of_row in seeds.tolist()]
    window = ids[:, -context_length:]
    new_ids = []
    for _ in range(count):
        u = torch.tensor([torch.rand((), generator=generator) for generator in generators])
        logits, _ = model(window)
        new_ids.append(sample(logits[:, -1], u, temperature, top_k, top_p))
        window = torch.cat([window, new_ids[-1][:, None]], dim=1)
        if window.size(1) > context_length:
            window = window[:, -math.ceil(context_length / 2) :]
    return torch.stack(new_ids, dim=1)


@pytest.mark.parametrize(
    "limits",
    [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 4, "top_p": 0.9}],
)
@pytest.mark.parametrize(
    ("context_length", "prompt_length", "batch_size"),
    [(40, 3, 1), (40, 10, 5), (12, 12, 2), (12, 30, 1), (7, 1, 3), (1, 1, 2)],
)
def test_generation_equals_reading_everything_again(
    context_length, prompt_length, batch_size, limits
):
    model = small_model(context_length=context_length)
    ids = random_ids(batch_size, prompt_length)
    expected = generated_without_a_cache(model, ids, 30, **limits)
    assert torch.equal(generated(model, ids, 30, **limits), expected)


def test_generation_beyond_256_characters_equals_reading_everything_again():
    model, ids = small_model(context_length=40), random_ids(2, 3)
    expected = generated_without_a_cache(model, ids, 600)
    assert torch.equal(generated(model, ids, 600), expected)


def test_a_long_text_never_repeats_its_random_numbers():
    model, ids = small_model(), random_ids(1, 3)
    nn.init.zeros_(model.lm_head.weight)  # each character shows the random number that drew it
    text = generated(model, ids, 1024)[0]
    for first in range(0, 768, 256):
        assert not torch.equal(text[first : first + 256], text[first + 256 : first + 512])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_generation_works_with_weights_of_another_type(dtype):
    model = small_model().to(dtype)
    ids = generated(model, random_ids(2, 3), 30)
    assert ids.shape == (2, 30)
    assert ids.max() < model.config.vocab_size


def test_a_text_depends_on_the_seed_and_its_place_alone():
    model, ids = small_model(), random_ids(1, 4)
    six = generated(model, ids.expand(6, -1), 25)
    two = generated(model, ids.expand(2, -1), 25)
    assert torch.equal(six[:2], two)


def test_the_texts_of_a_batch_differ():
    texts = generated(small_model(), random_ids(1, 4).expand(6, -1), 25)
    assert len(texts.unique(dim=0)) == 6


def test_another_seed_makes_another_text():
    model, ids = small_model(), random_ids(1, 4)
    assert not torch.equal(generated(model, ids, 25, seed=1), generated(model, ids, 25, seed=2))


def test_no_new_characters_are_none():
    assert list(small_model().generate(random_ids(1, 4), 0)) == []


class Doubled(nn.Module):
    """A layer around another, whose weight it uses without calling it, as adapters do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x @ (2 * self.layer.weight.t())


def with_assigned_weights(model: GPT) -> GPT:
    negative = {name: -p for name, p in model.state_dict().items()}
    model.load_state_dict(negative, assign=True)
    return model


def with_one_block_less(model: GPT) -> GPT:
    model.blocks = model.blocks[1:]
    return model


def with_another_bias(model: GPT) -> GPT:
    model.final_norm.bias = nn.Parameter(torch.arange(16.0))
    return model


def with_one_step_of_training(model: GPT) -> GPT:
    _, loss = model(random_ids(2, 12), random_ids(2, 12).flip(0))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=100.0).step()
    return model


def with_a_wrapped_layer(model: GPT) -> GPT:
    model.blocks[0].attention.qkv = Doubled(model.blocks[0].attention.qkv)
    return model


def with_a_wrapped_output_layer(model: GPT) -> GPT:
    model.lm_head = Doubled(model.lm_head)
    return model


def with_a_patched_forward(model: GPT) -> GPT:
    model.blocks[0].feed_forward.expand.forward = lambda x: 9 * x.repeat(1, 1, 4)
    return model


def with_a_hook_that_changes_the_output(model: GPT) -> GPT:
    def amplify(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return 99 * output

    model.blocks[1].attention.scaled_dot_product.register_forward_hook(amplify)
    return model


def as_a_copy_with_other_weights(model: GPT) -> GPT:
    model = copy.deepcopy(model)
    nn.init.normal_(model.lm_head.weight, generator=seeded(6))
    return model


@pytest.mark.parametrize(
    "changed",
    [
        with_assigned_weights,
        with_one_block_less,
        with_another_bias,
        with_one_step_of_training,
        with_a_wrapped_layer,
        with_a_wrapped_output_layer,
        with_a_patched_forward,
        with_a_hook_that_changes_the_output,
        as_a_copy_with_other_weights,
    ],
)
def test_generation_runs_the_modules_as_they_are_now(changed):
    model, ids = model_with_large_weights(), random_ids(1, 4)
    before = generated(model, ids, 60)
    model = changed(model)
    after = generated(model, ids, 60)
    assert torch.equal(after, generated_without_a_cache(model, ids, 60))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_the_hooks_of_every_module_are_called_for_each_character(register):
    model = small_model()
    name_of = {module: name for name, module in model.named_modules()}
    del name_of[model.blocks]  # a list, which is not called
    called = []

    def note_call(module: nn.Module, *_: Any) -> None:
        called.append(name_of[module])

    for module in name_of:
        getattr(module, register)(note_call)
    generated(model, random_ids(1, 4), 3)
    assert sorted(called) == sorted(3 * list(name_of.values()))


def test_a_hook_can_look_at_its_block_during_generation():
    model, counts = small_model(), []
    model.blocks[0].register_forward_hook(lambda block, *_: counts.append(len(block.state_dict())))
    generated(model, random_ids(1, 4), 3)
    assert counts == [12, 12, 12]


# ----------------------------------------------------------------------------------------
# 7 Sampling
# ----------------------------------------------------------------------------------------


def kept_ids(logits: Tensor) -> list[list[int]]:
    """Returns the ids in each row that can still be drawn."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def chi_square(counts: Tensor, probabilities: list[float]) -> float:
    total = int(counts.sum())
    terms = []
    for count, probability in zip(counts.tolist(), probabilities, strict=True):
        expected = total * probability
        terms.append((count - expected) ** 2 / expected)
    return sum(terms)


CHI_SQUARE_LIMIT = 18.47  # with 4 degrees of freedom, exceeded once in a thousand times


def test_draw_follows_the_probabilities():
    probabilities = [0.5, 0.02, 0.3, 0.1, 0.08]
    u = torch.rand(20_000, generator=seeded(5))
    drawn = draw(torch.tensor(probabilities).expand(len(u), -1), u)
    assert chi_square(drawn.bincount(minlength=5), probabilities) < CHI_SQUARE_LIMIT


def test_sample_follows_the_softmax_of_the_scores_divided_by_the_temperature():
    logits, temperature = [0.5, -1.0, 2.0, 0.0, -3.0], 0.7
    exponentials = [math.exp(score / temperature) for score in logits]
    probabilities = [e / sum(exponentials) for e in exponentials]
    u = torch.rand(20_000, generator=seeded(5))
    drawn = sample(torch.tensor(logits).expand(len(u), -1), u, temperature, None, None)
    assert chi_square(drawn.bincount(minlength=5), probabilities) < CHI_SQUARE_LIMIT


def drawn_by_walking(probabilities: list[float], u: float) -> int:
    """Walks along the pieces of a line until u is passed."""
    left = u * sum(probabilities)
    for i, probability in enumerate(probabilities):
        if left < probability:
            return i
        left -= probability
    raise AssertionError("u is less than 1")


@pytest.mark.parametrize("seed", range(20))
def test_draw_takes_the_piece_in_which_u_lies(seed):
    rng = random.Random(seed)
    probabilities = torch.rand(rng.randint(1, 30), generator=seeded(seed))
    probabilities = probabilities / probabilities.sum()
    u = torch.rand(200, generator=seeded(seed + 100))
    drawn = draw(probabilities.expand(200, -1), u)
    exact_probabilities = probabilities.double().tolist()
    assert drawn.tolist() == [drawn_by_walking(exact_probabilities, x) for x in u.tolist()]


@pytest.mark.parametrize("u", [0.0, 0.3, LARGEST_U])
def test_draw_never_takes_what_has_no_probability(u):
    probabilities = torch.tensor([[0.0, 0.4, 0.0, 0.0, 0.6, 0.0]])
    assert draw(probabilities, torch.tensor([u])).item() in (1, 4)


def test_draw_with_the_largest_u_takes_the_last_that_has_a_probability():
    logits = torch.randn(2000, 70, generator=seeded(7))
    logits[:, 60:] = -math.inf
    drawn = draw(logits.softmax(dim=-1), torch.full((2000,), LARGEST_U))
    assert drawn.max() == 59
    assert drawn.min() > 50  # what comes after it has together less than 2^-24


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_keep_top_k_keeps_k_scores_of_which_none_is_below_a_dropped_one(k):
    logits = torch.randn(50, 11, generator=seeded(8))
    kept = keep_top_k(logits, k)
    for row, ids in zip(logits, kept_ids(kept), strict=True):
        dropped = [row[i] for i in range(11) if i not in ids]
        assert len(ids) == k
        assert min(row[ids]) >= max(dropped, default=-math.inf)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_keep_top_k_keeps_exactly_k_of_equal_scores(k):
    logits = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]])
    (ids,) = kept_ids(keep_top_k(logits, k))
    assert len(ids) == k


@pytest.mark.parametrize("filtered", [lambda x: keep_top_k(x, 3), lambda x: keep_top_p(x, 0.8)])
def test_what_is_kept_has_the_score_it_had(filtered):
    logits = torch.randn(50, 11, generator=seeded(8))
    kept = filtered(logits)
    is_kept = kept.isfinite()
    assert torch.equal(kept[is_kept], logits[is_kept])
    assert (kept[~is_kept] == -math.inf).all()


@pytest.mark.parametrize("k", [11, 12, 1000])
def test_keep_top_k_of_all_or_more_changes_nothing(k):
    logits = torch.randn(50, 11, generator=seeded(8))
    assert torch.equal(keep_top_k(logits, k), logits)


@pytest.mark.parametrize("p", [1.0, 1.5])
def test_keep_top_p_of_everything_changes_nothing(p):
    logits = torch.randn(50, 11, generator=seeded(8)) * 30
    assert torch.equal(keep_top_p(logits, p), logits)


def likeliest_that_reach(logits: list[float], p: float) -> list[int]:
    """Adds one character after the other, the likeliest first, until they have p together."""
    total = sum(math.exp(score) for score in logits)
    by_likelihood = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept, reached = [], 0.0
    for i in by_likelihood:
        if reached >= p and kept:
            break
        kept.append(i)
        reached += math.exp(logits[i]) / total
    return kept


@pytest.mark.parametrize("p", [0.0, 1e-50, 0.1, 0.5, 0.8, 0.95, 0.999])
def test_keep_top_p_keeps_the_likeliest_that_together_reach_p(p):
    logits = 2 * torch.randn(50, 11, generator=seeded(10))
    for row, ids in zip(logits.tolist(), kept_ids(keep_top_p(logits, p)), strict=True):
        assert ids == sorted(likeliest_that_reach(row, p))


def test_keep_top_p_keeps_no_more_of_equal_scores_than_are_needed():
    (ids,) = kept_ids(keep_top_p(torch.zeros(1, 8), 0.5))
    assert len(ids) == 4


def sampled_by_the_rule(
    logits: list[float], u: float, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """The rule in words: the k likeliest, of them the likeliest that reach p, of them one by u."""
    by_likelihood = sorted(range(len(logits)), key=lambda i: -logits[i])
    candidates = sorted(by_likelihood[: top_k or len(logits)])
    scores = [logits[i] / temperature for i in candidates]
    if top_p is not None and top_p < 1:
        kept = sorted(likeliest_that_reach(scores, top_p))
        candidates = [candidates[i] for i in kept]
        scores = [scores[i] for i in kept]
    exponentials = [math.exp(score) for score in scores]
    probabilities = [e / sum(exponentials) for e in exponentials]
    return candidates[drawn_by_walking(probabilities, u)]


@pytest.mark.parametrize("seed", range(40))
def test_sample_follows_the_rule(seed):
    rng = random.Random(seed)
    logits = [rng.gauss(0, 2) for _ in range(rng.randint(1, 12))]
    u = rng.random()
    temperature = rng.uniform(0.2, 3)
    top_k = rng.choice([None, 1, 2, 5, 50])
    top_p = rng.choice([None, 0.1, 0.6, 0.95, 1.0])
    drawn = sample(torch.tensor([logits]), torch.tensor([u]), temperature, top_k, top_p)
    assert drawn.item() == sampled_by_the_rule(logits, u, temperature, top_k, top_p)


def test_the_largest_u_draws_one_of_the_characters_that_are_kept():
    logits = torch.randn(200, 70, generator=seeded(11))
    drawn = sample(logits, torch.full((200,), LARGEST_U), 1.0, top_k=3, top_p=0.9)
    assert (drawn[:, None] == logits.topk(3).indices).any(dim=1).all()


@pytest.mark.parametrize(
    "limits",
    [
        {"temperature": 0, "top_k": None, "top_p": None},
        {"temperature": 1e-40, "top_k": None, "top_p": None},
        {"temperature": 1.0, "top_k": 1, "top_p": None},
        {"temperature": 5.0, "top_k": 1, "top_p": 0.5},
        {"temperature": 1.0, "top_k": None, "top_p": 1e-50},
    ],
)
def test_where_one_candidate_is_left_it_is_the_likeliest(limits):
    logits = torch.randn(64, 20, generator=seeded(12))
    u = torch.rand(64, generator=seeded(13))
    assert torch.equal(sample(logits, u, **limits), logits.argmax(dim=-1))


# ----------------------------------------------------------------------------------------
# 8 Files
# ----------------------------------------------------------------------------------------

DIGEST_LENGTH = 64  # hexadecimal digits
REFUSAL = r"m\.pth is damaged or is not a model of this code: "


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
def model() -> GPT:
    return small_model()


@pytest.fixture
def path(tmp_path: Path, model: GPT) -> Path:
    """A file with a small model, in a directory of its own."""
    path = tmp_path / "new" / "m.pth"
    save_small_model(path, model, step=7, val_loss=1.5)
    return path


@pytest.fixture
def tiny_path(tmp_path: Path) -> Path:
    """A file so small that each of its bytes can be changed in turn."""
    path = tmp_path / "tiny" / "m.pth"
    save_small_model(path, small_model(n_layer=1, n_head=1, n_embd=2))
    return path


def test_a_loaded_model_is_the_saved_one(path, model):
    loaded, tokenizer, metadata = load_model(path)
    assert have_equal_weights(loaded, model)
    assert loaded.config == model.config
    assert tokenizer.characters == CHARACTERS
    assert metadata == {"step": 7, "val_loss": 1.5}


def test_a_loaded_model_computes_what_the_saved_one_does(path, model):
    loaded, _, _ = load_model(path)
    assert torch.equal(loaded(random_ids(2, 12))[0], model(random_ids(2, 12))[0])


def test_a_loaded_model_is_not_in_training(path):
    loaded, _, _ = load_model(path)
    assert not loaded.training


def test_saving_leaves_one_file(path):
    assert names_in(path.parent) == ["m.pth"]


def test_torch_alone_can_read_a_model_file(path, model):
    content = torch.load(path, weights_only=True)
    assert content["config"] == dataclasses.asdict(model.config)
    assert content["weights"].keys() == model.state_dict().keys()


def test_a_model_file_ends_with_the_digest_of_all_bytes_before(path):
    data = path.read_bytes()
    body, digest = data[:-DIGEST_LENGTH], data[-DIGEST_LENGTH:]
    assert digest.decode() == hashlib.sha256(body).hexdigest()


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        load_model(tmp_path / "missing.pth")


# Files of earlier versions


def content_of(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def write_without_digest(path: Path, content: Any) -> None:
    torch.save(content, path)


def write_with_digest(path: Path, content: Any) -> None:
    """Writes what `save_model` would write if this were its content."""
    archive = io.BytesIO()
    torch.save(content, archive)
    without_comment_length = archive.getvalue()[:-2]
    body = without_comment_length + DIGEST_LENGTH.to_bytes(2, "little")
    path.write_bytes(body + hashlib.sha256(body).hexdigest().encode())


def content_of_an_earlier_version(path: Path) -> dict[str, Any]:
    content = content_of(path)
    content["facts"] = content.pop("metadata")
    return content


def test_a_model_of_an_earlier_version_loads_with_its_metadata(path, model):
    write_without_digest(path, content_of_an_earlier_version(path))
    loaded, tokenizer, metadata = load_model(path)
    assert have_equal_weights(loaded, model)
    assert loaded.config == model.config
    assert tokenizer.characters == CHARACTERS
    assert metadata == {"step": 7, "val_loss": 1.5}


def test_a_loaded_model_of_an_earlier_version_is_saved_as_one_of_this(path):
    write_without_digest(path, content_of_an_earlier_version(path))
    loaded, tokenizer, metadata = load_model(path)
    save_model(path, loaded, tokenizer, **metadata)
    assert "facts" not in content_of(path)
    assert load_model(path)[2] == metadata


# Damage


def test_content_of_this_version_without_a_digest_is_refused(path):
    write_without_digest(path, content_of(path))
    with pytest.raises(ValueError, match=REFUSAL + "its digest is wrong"):
        load_model(path)


def test_a_file_with_the_digest_of_another_file_is_refused(path, model):
    other = path.with_name("other.pth")
    save_small_model(other, model, step=8, val_loss=1.5)
    digest_of_other = other.read_bytes()[-DIGEST_LENGTH:]
    path.write_bytes(path.read_bytes()[:-DIGEST_LENGTH] + digest_of_other)
    with pytest.raises(ValueError, match=REFUSAL + "its digest is wrong"):
        load_model(path)


def test_a_file_with_one_changed_byte_is_refused_wherever_it_is(tiny_path):
    whole, rng = tiny_path.read_bytes(), random.Random(0)
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= rng.randrange(1, 256)
        tiny_path.write_bytes(damaged)
        with pytest.raises(ValueError, match=REFUSAL):
            load_model(tiny_path)


def test_a_file_cut_short_is_refused_wherever_it_is_cut(tiny_path):
    whole = tiny_path.read_bytes()
    lengths = [*range(0, len(whole), 50), *range(len(whole) - 200, len(whole))]
    for length in lengths:
        tiny_path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=REFUSAL):
            load_model(tiny_path)


@pytest.mark.parametrize("added", [b"\0", b"0" * 64, bytes(10_000)])
def test_a_file_with_bytes_at_its_end_is_refused(path, added):
    path.write_bytes(path.read_bytes() + added)
    with pytest.raises(ValueError, match=REFUSAL):
        load_model(path)


def test_random_damage_of_an_earlier_versions_file_raises_nothing_but_the_refusal(tiny_path):
    write_without_digest(tiny_path, content_of_an_earlier_version(tiny_path))
    whole, rng = tiny_path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        tiny_path.write_bytes(damaged)
        try:
            load_model(tiny_path)
        except ValueError as error:
            assert "m.pth is damaged or is not a model of this code: " in str(error)
            refused += 1
    assert refused > 500  # the others changed what nobody reads


@pytest.mark.parametrize(
    "data",
    [b"", b"no model", b"PK\x03\x04", bytes(5000), random.Random(0).randbytes(5000)],
    ids=["empty", "text", "start of an archive", "zeros", "noise"],
)
def test_a_file_of_something_else_is_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=REFUSAL):
        load_model(path)


def test_a_refusal_is_one_line(path):
    write_with_digest(path, {"weights": {}, "config": {"a\nb": 1}, "metadata": {}})
    with pytest.raises(ValueError, match=REFUSAL) as refusal:
        load_model(path)
    assert "\n" not in str(refusal.value)


def test_running_out_of_memory_is_not_called_damage(path, monkeypatch):
    def run_out_of_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("torch.load", run_out_of_memory)
    with pytest.raises(MemoryError):
        load_model(path)


# Crafted files: with a right digest, but with content that does not fit itself


class CodeThatMustNotRun:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return exec, ("raise SystemExit('code of the file was run')",)


def with_config(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, "config": {**content["config"], **changes}}


def with_part(name: str, part: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, name: part}


def without_part(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {key: part for key, part in content.items() if key != name}


def with_output_weight(
    changed: Callable[[Tensor], Any],
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(content: dict[str, Any]) -> dict[str, Any]:
        weights = content["weights"]
        return {
            **content,
            "weights": {**weights, "lm_head.weight": changed(weights["lm_head.weight"])},
        }

    return change


def with_one_weight_more(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "weights": {**content["weights"], "extra": torch.zeros(3)}}


def with_one_weight_less(content: dict[str, Any]) -> dict[str, Any]:
    weights = dict(content["weights"])
    del weights["lm_head.weight"]
    return {**content, "weights": weights}


def with_one_weight_under_another_name(content: dict[str, Any]) -> dict[str, Any]:
    weights = dict(content["weights"])
    weights["head.weight"] = weights.pop("lm_head.weight")
    return {**content, "weights": weights}


MISFITS = {
    "heads that do not divide": with_config(n_head=3),
    "too many blocks": with_config(n_layer=10**6),
    "too many channels": with_config(n_embd=2**20),
    "a context too long": with_config(context_length=10**9),
    "a size that is no number": with_config(n_layer="2"),
    "an unknown size": with_config(color=1),
    "no sizes": with_part("config", None),
    "a list of sizes": with_part("config", [11, 12, 2, 2, 16]),
    "a vocabulary too small": with_part("vocabulary", CHARACTERS[:-1]),
    "a vocabulary in another order": with_part("vocabulary", CHARACTERS[::-1]),
    "a vocabulary that is no text": with_part("vocabulary", list(CHARACTERS)),
    "one weight more": with_one_weight_more,
    "one weight less": with_one_weight_less,
    "one weight under another name": with_one_weight_under_another_name,
    "a transposed weight": with_output_weight(lambda weight: weight.t()),
    "a weight of another shape": with_output_weight(lambda weight: weight.view(16, 11)),
    "a weight of 64 bits": with_output_weight(lambda weight: weight.double()),
    "an expanded weight": with_output_weight(lambda _: torch.zeros(1, 1).expand(11, 16)),
    "a sparse weight": with_output_weight(lambda weight: weight.to_sparse()),
    "a weight without numbers": with_output_weight(lambda weight: weight.to("meta")),
    "a weight that is no tensor": with_output_weight(lambda _: 5),
    "a weight that is not finite": with_output_weight(lambda weight: weight * math.nan),
    "code": with_part("weights", CodeThatMustNotRun()),
    "code in the metadata": with_part("metadata", {"step": CodeThatMustNotRun()}),
    "no weights": without_part("weights"),
    "no vocabulary": without_part("vocabulary"),
    "no metadata": without_part("metadata"),
    "metadata that are no dictionary": with_part("metadata", 5),
    "nothing": lambda content: {},
    "a list": lambda content: [content],
    "a tensor": lambda content: torch.zeros(3),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_content_that_does_not_fit_itself_is_refused(path, misfit):
    write_with_digest(path, MISFITS[misfit](content_of(path)))
    with pytest.raises(ValueError, match=REFUSAL):
        load_model(path)


def test_unchanged_content_with_a_digest_is_accepted(path, model):
    write_with_digest(path, content_of(path))
    assert have_equal_weights(load_model(path)[0], model)


def test_an_archive_that_would_unpack_to_more_than_the_file_is_refused(path):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, bytes(10**6) if "/data/" in name else content)
    with pytest.raises(ValueError, match=REFUSAL + "its content is larger than the file"):
        load_model(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_hides_its_unpacked_size_takes_no_memory(path, method):
    unpacked_size, claimed_size = 50 * 2**20, 100
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", bytes(unpacked_size))
    data = path.read_bytes()
    real, claimed = (size.to_bytes(4, "little") for size in (unpacked_size, claimed_size))
    path.write_bytes(data.replace(real, claimed))

    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=REFUSAL):
            load_model(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < unpacked_size / 5


def test_a_small_file_whose_blocks_share_their_weights_is_no_large_model(path, model):
    n_layer = 100
    content = content_of(path)
    weights = content["weights"]
    for name, weight in model.blocks[0].state_dict().items():
        for i in range(n_layer):
            weights[f"blocks.{i}.{name}"] = weight
    large = with_config(n_layer=n_layer)(content)
    write_with_digest(path, large)
    assert path.stat().st_size < 4 * GPTConfig(**large["config"]).parameter_count
    with pytest.raises(ValueError, match=REFUSAL):
        load_model(path)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_too_little_memory_is_not_called_damage(path, monkeypatch, error):
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as raised:
        load_model(path)
    assert raised.value is error

    path.write_bytes(path.read_bytes()[:-1] + b"?")  # another digest
    with pytest.raises(ValueError, match=REFUSAL):
        load_model(path)


def test_the_home_folder_can_be_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/m.pth") == tmp_path / "m.pth"
    assert user_path("~nobody-of-that-name/m.pth") == Path("~nobody-of-that-name/m.pth")
    assert user_path("models/~m.pth") == Path("models/~m.pth")


def test_a_path_may_be_a_string(path):
    model = small_model(n_layer=1, n_embd=4)
    save_small_model(str(path), model)
    loaded, _, _ = load_model(str(path))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_model_with_a_tied_output_layer_can_be_saved_and_loaded(path):
    model = small_model(n_layer=1, n_embd=4, vocab_size=300)
    model.lm_head.weight = model.token_embedding.weight
    tokenizer = CharTokenizer("".join(map(chr, range(300, 600))))
    save_model(path, model, tokenizer)
    loaded, _, _ = load_model(path)
    assert torch.equal(loaded.lm_head.weight, loaded.token_embedding.weight)


# Failures while saving


@contextlib.contextmanager
def no_space_for_files_over_a_kilobyte() -> Iterator[None]:
    """As full as a test can make a disk.

    Not a fixture: pytest would write its progress, which can go to a file, before the end of it.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path, model):
    before = path.read_bytes()
    with (
        no_space_for_files_over_a_kilobyte(),
        pytest.raises(OSError, match=r"too large: .*m\.pth'$"),
    ):
        save_small_model(path, model, step=8)
    assert path.read_bytes() == before
    assert names_in(path.parent) == ["m.pth"]


def test_metadata_that_cannot_be_saved_leave_the_old_file_and_nothing_else(path, model):
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_small_model(path, model, function=lambda: None)
    assert path.read_bytes() == before
    assert names_in(path.parent) == ["m.pth"]


def test_a_parent_that_is_a_file_is_an_os_error(path, model):
    with pytest.raises(OSError, match=r"m\.pth"):
        save_small_model(path / "m.pth", model)


class BlockedReplace:
    """Fails as on Windows while a reader has the file open, so many times, then works."""

    def __init__(self, failures: float) -> None:
        self.failures_left = failures
        self.replace = os.replace

    def __call__(self, source: Path, target: Path) -> None:
        if self.failures_left > 0:
            self.failures_left -= 1
            raise PermissionError(errno.EACCES, "Access is denied", str(target))
        self.replace(source, target)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each pause, none of which is made."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def test_a_file_that_is_blocked_for_a_moment_is_replaced_later(path, model, monkeypatch, pauses):
    monkeypatch.setattr(os, "replace", BlockedReplace(failures=2))
    save_small_model(path, model, step=8)
    assert load_model(path)[2] == {"step": 8}
    assert names_in(path.parent) == ["m.pth"]
    assert len(pauses) == 2


def test_a_file_that_stays_blocked_is_an_os_error_that_names_the_kept_file(
    path, model, monkeypatch, pauses
):
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", BlockedReplace(failures=math.inf))
    with pytest.raises(PermissionError) as failure:
        save_small_model(path, model, step=8)

    (kept,) = path.parent.glob("m.pth.*.part")
    assert str(kept) in str(failure.value)
    assert failure.value.filename == str(path)
    assert load_model(kept)[2] == {"step": 8}
    assert path.read_bytes() == before
    assert 1 <= sum(pauses) <= 5


def test_a_directory_in_the_place_of_the_file_is_not_waited_for(tmp_path, model, pauses):
    directory = tmp_path / "m.pth"
    directory.mkdir()
    with pytest.raises(IsADirectoryError):
        save_small_model(directory, model)
    assert pauses == []


# Several writers at once


def model_of_writer(number: int) -> GPT:
    """Returns a model each of whose weights tells who has saved it."""
    model = small_model()
    for p in model.parameters():
        nn.init.constant_(p, number)
    return model


def save_again_and_again(path: Path, number: int, times: int) -> None:
    model = model_of_writer(number)
    for _ in range(times):
        save_small_model(path, model, writer=number)


def check_file_is_whole_and_of_one_writer(path: Path) -> None:
    loaded, _, metadata = load_model(path)
    assert have_equal_weights(loaded, model_of_writer(metadata["writer"]))


def check_every_reading_while_alive(
    path: Path, writers: list[threading.Thread] | list[multiprocessing.Process]
) -> None:
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            check_file_is_whole_and_of_one_writer(path)


def test_threads_that_save_at_the_same_time_leave_a_whole_file_of_one_of_them(tmp_path):
    path = tmp_path / "m.pth"
    writers = [
        threading.Thread(target=save_again_and_again, args=(path, number, 30))
        for number in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    check_file_is_whole_and_of_one_writer(path)
    assert names_in(tmp_path) == ["m.pth"]


def test_at_every_moment_of_two_processes_saving_the_path_holds_a_whole_file(tmp_path):
    path = tmp_path / "m.pth"
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=save_again_and_again, args=(path, number, 100))
        for number in range(2)
    ]
    for writer in writers:
        writer.start()
    check_every_reading_while_alive(path, writers)
    assert [writer.exitcode for writer in writers] == [0, 0]
    check_file_is_whole_and_of_one_writer(path)
    assert names_in(tmp_path) == ["m.pth"]


# ----------------------------------------------------------------------------------------
# 9 Speed on a CPU
# ----------------------------------------------------------------------------------------

# What is before the last dimension: no row, one, few, many; some that threads cannot divide.
ROWS = [(), (0,), (3, 0), (1,), (1, 1), (5, 1), (2, 16), (33,), (2, 3, 44), (4, 64), (257,), (258,)]
SIZES = [(256, 768), (512, 257), (16, 48)]  # large; large, but prime; small


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(model_module, "TORCH_DIVIDES_WELL", False)  # as on any processor
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def new_layer(in_features: int, out_features: int, bias: bool = True) -> Linear:
    layer = Linear(in_features, out_features, bias)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.1, generator=seeded(14))
    return layer


def torchs_linear(layer: Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def gradients_of(y: Tensor, layer: Linear, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_what_torchs_does(threads, rows, in_features, out_features, bias):
    layer = new_layer(in_features, out_features, bias)
    x = torch.randn(*rows, in_features, generator=seeded(15))
    with torch.no_grad():
        result = layer(x)
    torch.testing.assert_close(result, torchs_linear(layer, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_has_the_gradients_of_torchs(threads, rows, bias):
    layer = new_layer(256, 768, bias)
    x = torch.randn(*rows, 256, generator=seeded(15), requires_grad=True)
    gradients = gradients_of(layer(x), layer, x)
    expected = gradients_of(torchs_linear(layer, x), layer, x)
    torch.testing.assert_close(gradients, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_layer_accepts_input_and_weights_that_are_not_contiguous(threads, rows, with_gradients):
    layer = new_layer(256, 768)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    x = torch.randn(256, 2 * rows, generator=seeded(16)).t()[::2]  # (rows, 256)
    assert not x.is_contiguous()
    assert not layer.weight.is_contiguous()
    with torch.set_grad_enabled(with_gradients):
        result = layer(x)
    torch.testing.assert_close(result, torchs_linear(layer, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 33, 256])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_layer_follows_autocast(threads, rows, with_gradients):
    layer = new_layer(256, 768)
    x = torch.randn(rows, 256, generator=seeded(17))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(with_gradients):
        result, expected = layer(x), torchs_linear(layer, x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 256])
def test_a_layer_computes_in_the_type_of_its_weights(threads, dtype, rows):
    layer = new_layer(256, 768).to(dtype)
    x = torch.randn(rows, 256, generator=seeded(18)).to(dtype)
    with torch.no_grad():
        result = layer(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, torchs_linear(layer, x), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("rows", [1, 256])
def test_a_layer_refuses_input_of_another_width_as_torchs_does(threads, rows):
    layer = new_layer(256, 768)
    with pytest.raises(RuntimeError), torch.no_grad():
        layer(torch.zeros(rows, 128))
