import copy
import dataclasses
import math
import random
import resource
import signal
import zipfile

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model import (
    GPT,
    Attention,
    CharTokenizer,
    FeedForward,
    GPTConfig,
    Linear,
    TransformerBlock,
    load_model,
    sample,
    save_model,
    sinusoidal_encoding,
)

TEXT = "A star.\r\nAn \t older star?\r\n"
TEXTS = [
    "",
    "a",
    TEXT,
    "中文科幻小说",
    "👩‍🚀 🪐!",
    "e\u0301 is not \u00e9",
    "\ud800 alone",
    "\x00\u2028\u0085\ufeff",
    "\U0010ffff",
]


def make(**sizes) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            **{"vocab_size": 11, "context_length": 12, "n_layer": 2, "n_head": 2, "n_embd": 16, **sizes}
        )
    ).eval()


def some_ids(*shape: int, vocab_size: int = 11) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


# Sizes


@pytest.mark.parametrize("name", ["vocab_size", "context_length", "n_layer", "n_head", "n_embd"])
@pytest.mark.parametrize("size", [0, -1, 1.5, "3", None, True, 10**12])
def test_a_size_that_makes_no_model_is_refused_by_name(name, size):
    with pytest.raises(ValueError, match=name):
        GPTConfig(**{"vocab_size": 11, name: size})


@pytest.mark.parametrize(
    "change", [{"n_head": 3}, {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": math.nan}]
)
def test_sizes_that_do_not_go_together_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        GPTConfig(vocab_size=11, n_embd=128, **change)


# Characters


@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode(text):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.characters == "".join(sorted(set(text)))
    assert CharTokenizer.from_text(iter(text)).characters == tokenizer.characters


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)],
)
def test_ids_take_the_smallest_type_and_are_places_in_the_vocabulary(size, dtype):
    tokenizer = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + size))))
    ids = tokenizer.encode(tokenizer.characters)
    assert ids.dtype == dtype
    assert ids.tolist() == list(range(size))


def test_a_text_longer_than_a_piece_is_encoded_whole():
    text = "".join(random.Random(0).choices("ab cd\nêé中🪐", k=2**21 + 3))
    tokenizer = CharTokenizer.from_text(text)
    places = {character: i for i, character in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text).tolist() == [places[character] for character in text]


@pytest.mark.parametrize("unknown", ["b", "Ж", "🪐", "\ud800"])
def test_an_unknown_character_is_named(unknown):
    with pytest.raises(ValueError, match=f"U\\+{ord(unknown):04X}"):
        CharTokenizer("ac").encode("a" * 7 + unknown + "a")


@pytest.mark.parametrize("characters", ["ba", "aa", ["a", "c"], None])
def test_a_vocabulary_that_is_no_sorted_set_is_refused(characters):
    with pytest.raises((ValueError, TypeError)):
        CharTokenizer(characters)


# Positions


@pytest.mark.parametrize(("length", "width"), [(1, 1), (7, 2), (5, 9), (40, 64)])
def test_the_sinusoids_are_the_papers(length, width):
    table = sinusoidal_encoding(length, width)
    for t in range(length):
        for c in range(width):
            angle = t / 10000 ** (2 * (c // 2) / width)
            assert table[t, c].item() == pytest.approx(
                math.cos(angle) if c % 2 else math.sin(angle), abs=1e-6
            )


# Attention and blocks


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 7, 5), (1, 4, 33, 16)])
def test_explicit_attention_is_the_fused_kernels_and_torchs(shape):
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    explicit, weights = Attention().explicit(q, k, v)
    torch.testing.assert_close(explicit, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(explicit, Attention()(q, k, v))
    torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]))
    assert (weights >= 0).all() and (weights.triu(1) == 0).all()


def test_a_block_is_torchs_encoder_layer_with_the_same_weights():
    config = GPTConfig(11, context_length=9, n_head=4, n_embd=32)
    block = TransformerBlock(config).eval()
    theirs = nn.TransformerEncoderLayer(
        32,
        4,
        128,
        dropout=0.0,
        activation=lambda x: F.gelu(x, approximate="tanh"),
        batch_first=True,
        norm_first=True,
    ).eval()
    attention, feed_forward = block.attention, block.feed_forward
    pairs = [
        (theirs.norm1, block.attention_norm),
        (theirs.norm2, block.feed_forward_norm),
        (theirs.self_attn.out_proj, attention.output),
        (theirs.linear1, feed_forward.expand),
        (theirs.linear2, feed_forward.contract),
    ]
    for to, source in pairs:
        to.load_state_dict(source.state_dict())
    theirs.self_attn.in_proj_weight.data.copy_(attention.qkv.weight.data)
    theirs.self_attn.in_proj_bias.data.copy_(attention.qkv.bias.data)
    x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(3))
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    torch.testing.assert_close(block(x), theirs(x, src_mask=mask, is_causal=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (2, 16), (3, 11), (4, 64), (1, 258), (1, 257)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_layer_computes_what_torchs_does_however_its_work_is_shared(shape, threads):
    layer, before = Linear(256, 768), torch.get_num_threads()
    nn.init.normal_(layer.bias)
    x = torch.randn(*shape, 256, requires_grad=True)
    torch.set_num_threads(threads)
    try:
        ours, theirs = layer(x), F.linear(x, layer.weight, layer.bias)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), theirs, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    wanted = [x, layer.weight, layer.bias]
    gradients = [torch.autograd.grad(y.square().sum(), wanted) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


def test_the_model_compiles_into_one_graph():
    model, ids = make(context_length=64), some_ids(4, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, ids)[1], model(ids, ids)[1])


def test_one_compiled_graph_serves_any_length():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    layers = FeedForward(GPTConfig(11, n_embd=64))
    compiled = torch.compile(layers, backend=count, dynamic=True)
    for length in (60, 16, 4, 2):
        x = torch.randn(1, length, 64)
        torch.testing.assert_close(compiled(x), layers(x))
    assert len(graphs) == 1


def test_dropout_acts_in_training_alone():
    model = make(dropout=0.5)
    ids = some_ids(1, 12)
    assert torch.equal(model(ids)[0], model(ids)[0])
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])


# The model


@pytest.mark.parametrize("seed", range(8))
def test_no_character_sees_a_later_one(seed):
    rng = random.Random(seed)
    n_head = rng.choice([1, 2, 4])
    T = rng.randint(2, 24)
    model = make(
        vocab_size=rng.randint(2, 50),
        context_length=T,
        n_layer=rng.randint(1, 3),
        n_head=n_head,
        n_embd=n_head * rng.choice([2, 6, 8]),
    )
    V = model.config.vocab_size
    ids = some_ids(2, T, vocab_size=V)
    at = rng.randrange(T)
    changed = ids.clone()
    changed[:, at] = (ids[:, at] + rng.randrange(1, V)) % V
    before, after = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :at], after[:, :at], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, at], after[:, at])


@pytest.mark.parametrize("V", [2, 90, 8000])
def test_a_new_model_finds_all_characters_alike(V):
    model = make(vocab_size=V, n_embd=128, context_length=64)
    ids = some_ids(8, 65, vocab_size=V)
    assert model(ids[:, :-1], ids[:, 1:])[1].item() == pytest.approx(math.log(V), rel=0.05)


def test_the_loss_is_the_mean_of_minus_log_probability():
    model = make()
    ids, targets = some_ids(2, 5), some_ids(2, 5).flip(1)
    logits, loss = model(ids, targets)
    expected = [-math.log(logits[b, t].softmax(0)[targets[b, t]].item()) for b in range(2) for t in range(5)]
    assert loss.item() == pytest.approx(sum(expected) / 10, rel=1e-5)
    assert model(ids)[1] is None


def test_it_learns_one_batch_by_heart():
    model = make(n_embd=32).train()
    ids = some_ids(4, 13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize(("V", "L", "C"), [(11, 2, 16), (74, 4, 128)])
def test_the_parameters_are_those_of_the_closed_formula(V, L, C):
    model = make(vocab_size=V, n_layer=L, n_embd=C)
    assert sum(p.numel() for p in model.parameters()) == 2 * V * C + L * (12 * C * C + 13 * C) + 2 * C


def test_the_parameters_have_the_names_that_tools_rely_on():
    linear = ["attention.qkv", "attention.output", "feed_forward.expand", "feed_forward.contract"]
    block = [
        f"blocks.0.{part}.{kind}"
        for part in ["attention_norm", "feed_forward_norm", *linear]
        for kind in ("weight", "bias")
    ]
    ends = ["token_embedding.weight", "final_norm.weight", "final_norm.bias", "lm_head.weight"]
    assert sorted(make(n_layer=1).state_dict()) == sorted(block + ends)
    assert isinstance(make().blocks[0].feed_forward, FeedForward)


def test_more_characters_than_the_context_are_refused():
    with pytest.raises(ValueError, match="13 characters"):
        make()(some_ids(1, 13))


# Sampling


def test_sampled_frequencies_are_the_models_probabilities():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, -3.0])
    n, temperature = 20_000, 0.7
    u = torch.rand(n, generator=torch.Generator().manual_seed(5))
    drawn = sample(logits.expand(n, -1), u, temperature, None, None).bincount(minlength=5)
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    expected = [n * w / sum(weights) for w in weights]
    chi_square = sum((d - e) ** 2 / e for d, e in zip(drawn.tolist(), expected, strict=True))
    assert chi_square < 18.47  # of 4 degrees of freedom, exceeded once in a thousand


def brute_force(
    logits: list[float], u: float, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    """The rule in words: of the k likeliest those before which less than p is reached; of their line, u."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    weights = [math.exp(logits[i] / temperature) for i in order]
    shares = [w / sum(weights) for w in weights]
    kept = sorted((order[i], shares[i]) for i in range(len(order)) if sum(shares[:i]) < (top_p or 1))
    point = u * sum(share for _, share in kept)
    return next(kept[i][0] for i in range(len(kept)) if sum(share for _, share in kept[: i + 1]) > point)


@pytest.mark.parametrize("seed", range(40))
def test_sampling_is_the_rule_in_words(seed):
    rng = random.Random(seed)
    logits = [rng.gauss(0, 2) for _ in range(rng.randint(1, 12))]
    limits = rng.uniform(0.2, 3), rng.choice([None, 1, 2, 5, 50]), rng.choice([None, 0.1, 0.6, 0.95, 1.0])
    u = rng.random()
    assert sample(torch.tensor([logits]), torch.tensor([u]), *limits).item() == brute_force(
        logits, u, *limits
    )


def test_the_highest_noise_still_draws_a_character_that_counts():
    u = torch.full((1,), 1 - 2**-24)
    for seed in range(200):
        logits = torch.randn(1, 70, generator=torch.Generator().manual_seed(seed))
        assert sample(logits, u, 1.0, 3, 0.9).item() in logits[0].topk(3).indices


@pytest.mark.parametrize(
    "limits", [(1.0, 1, None), (5.0, 1, 0.5), (0, None, None), (1.0, None, 1e-50), (1e-40, None, None)]
)
def test_one_candidate_is_the_likeliest(limits):
    logits, u = torch.randn(64, 20), torch.rand(64)
    assert torch.equal(sample(logits, u, *limits), logits.argmax(-1))


@pytest.mark.parametrize("limits", [(1.0, 20, None), (1.0, None, 1.0), (1.0, 99, 1.0)])
def test_limits_that_keep_all_change_nothing(limits):
    logits, u = torch.randn(64, 20), torch.rand(64)
    assert torch.equal(sample(logits, u, *limits), sample(logits, u, 1.0, None, None))


# Generation


def recompute(model: GPT, ids: torch.Tensor, noise: torch.Tensor, *limits) -> torch.Tensor:
    """What generation must equal: each character from the whole window, without a cache."""
    context = model.config.context_length
    window, new = ids[:, -context:], []
    for u in noise:
        new.append(sample(model(window)[0][:, -1], u, *limits))
        window = torch.cat([window, new[-1][:, None]], dim=1)
        if window.size(1) > context:
            window = window[:, -math.ceil(context / 2) :]
    return torch.stack(new, dim=1)


def noise_of(seed: int, rows: int, steps: int) -> torch.Tensor:
    seeds = torch.randint(2**62, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds], dim=1)


@pytest.mark.parametrize("limits", [(0.0, None, None), (1.0, None, None), (1.5, 4, 0.9)])
@pytest.mark.parametrize(
    ("context", "prompt", "rows"), [(40, 3, 1), (40, 10, 5), (12, 12, 2), (12, 30, 1), (7, 1, 3), (1, 1, 2)]
)
def test_cached_generation_equals_recomputation(context, prompt, rows, limits):
    model = make(context_length=context)
    ids = some_ids(rows, prompt)
    new = torch.stack([*model.generate(ids, 30, *limits, torch.Generator().manual_seed(9))], dim=1)
    with torch.inference_mode():
        assert torch.equal(new, recompute(model, ids, noise_of(9, rows, 30), *limits))


def test_a_row_depends_on_its_seed_and_place_alone():
    model = make()
    ids = some_ids(1, 4)
    many = torch.stack(
        [*model.generate(ids.expand(6, -1), 25, generator=torch.Generator().manual_seed(3))], dim=1
    )
    few = torch.stack(
        [*model.generate(ids.expand(2, -1), 25, generator=torch.Generator().manual_seed(3))], dim=1
    )
    assert torch.equal(many[:2], few)
    assert len({tuple(row) for row in many.tolist()}) == 6


def assigned(model: GPT) -> GPT:
    model.load_state_dict({name: -p for name, p in model.state_dict().items()}, assign=True)
    return model


def replaced(model: GPT) -> GPT:
    model.blocks, model.final_norm.bias = model.blocks[1:], nn.Parameter(torch.arange(16.0))
    return model


def trained_once(model: GPT) -> GPT:
    model(some_ids(2, 12), some_ids(2, 12))[1].backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return model


class Doubled(nn.Module):
    """A layer around another, whose weight it uses without calling it, as adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (2 * self.base.weight.t())


def wrapped(model: GPT) -> GPT:
    model.blocks[0].attention.qkv = Doubled(model.blocks[0].attention.qkv)
    return model


def patched(model: GPT) -> GPT:
    model.blocks[0].feed_forward.expand.forward = lambda x: x.repeat(1, 1, 4)
    return model


@pytest.mark.parametrize("change", [assigned, replaced, trained_once, wrapped, patched, copy.deepcopy])
def test_generation_uses_the_model_as_it_is_now(change):
    model, ids = make(), some_ids(1, 4)
    before = torch.cat([*model.generate(ids, 8, temperature=0)])
    model = change(model)
    nn.init.normal_(model.lm_head.weight)
    after = torch.cat([*model.generate(ids, 8, temperature=0)])
    whole = torch.cat([ids, after[None]], dim=1)
    assert torch.equal(model(whole[:, :-1])[0][0, 3:].argmax(-1), after)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_generation(register):
    model, seen = make(), []
    called = [(name, part) for name, part in model.named_modules() if name not in ("", "blocks")]
    for name, part in called:
        getattr(part, register)(lambda *_, name=name: seen.append(name))
    before = [[*vars(part)] for _, part in called]
    assert len([*model.generate(some_ids(1, 4), 3)]) == 3
    assert sorted(seen) == sorted(3 * [name for name, _ in called])
    assert [[*vars(part)] for _, part in called] == before


def test_a_hook_can_look_at_its_block_during_generation():
    model, seen = make(), []
    model.blocks[0].register_forward_hook(lambda block, *_: seen.append(len(block.state_dict())))
    assert len([*model.generate(some_ids(1, 4), 3)]) == 3
    assert seen == [12, 12, 12]


def test_no_new_characters_is_none():
    assert [*make().generate(some_ids(1, 4), 0)] == []


# Files


@pytest.fixture
def saved(tmp_path):
    model = make()
    tokenizer = CharTokenizer("abcdefghijk")
    save_model(tmp_path / "new" / "m.pth", model, tokenizer, step=7, val_loss=1.5)
    return tmp_path / "new" / "m.pth", model


def test_a_loaded_model_is_the_saved_one(saved):
    path, model = saved
    loaded, tokenizer, facts = load_model(path)
    assert torch.equal(loaded(some_ids(2, 12))[0], model(some_ids(2, 12))[0])
    assert (loaded.config, tokenizer.characters, facts) == (
        model.config,
        "abcdefghijk",
        {"step": 7, "val_loss": 1.5},
    )
    assert not loaded.training
    assert torch.load(path, weights_only=True)["config"] == dataclasses.asdict(model.config)
    assert [p.name for p in path.parent.iterdir()] == ["m.pth"]


def same(a: GPT, b: GPT) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_a_file_cut_short_is_refused_wherever_it_is_cut(saved):
    path, _ = saved
    whole = path.read_bytes()
    for hundredth in range(100):
        path.write_bytes(whole[: len(whole) * hundredth // 100])
        with pytest.raises(ValueError, match=r"m\.pth is damaged"):
            load_model(path)


def test_a_flipped_byte_is_refused_or_harmless(saved):
    path, model = saved
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(load_model(path)[0], model)
        except ValueError as error:
            refused += "m.pth is damaged" in str(error)
    assert refused > 200  # all but those in the padding between the tensors


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


def spoil(**changes):
    def change(content):
        for key, value in changes.items():
            content[key] = value(content[key])

    return change


@pytest.mark.parametrize(
    "change",
    [
        spoil(config=lambda c: {**c, "n_head": 3}),
        spoil(config=lambda c: {**c, "n_layer": 10**6}),
        spoil(config=lambda c: {**c, "n_embd": 2**20}),
        spoil(config=lambda c: {**c, "context_length": 10**9}),
        spoil(config=lambda c: {**c, "color": 1}),
        spoil(config=lambda _: None),
        spoil(vocabulary=lambda v: v[:-1]),
        spoil(vocabulary=lambda v: v[::-1]),
        spoil(weights=lambda w: {**w, "extra": w["lm_head.weight"]}),
        spoil(weights=lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}),
        spoil(weights=lambda w: {**w, "lm_head.weight": w["lm_head.weight"].t()}),
        spoil(weights=lambda w: {**w, "lm_head.weight": w["lm_head.weight"].double()}),
        spoil(weights=lambda w: {**w, "lm_head.weight": torch.zeros(1, 1).expand(11, 16)}),
        spoil(weights=lambda w: {**w, "lm_head.weight": 5}),
        spoil(weights=lambda w: {**w, "lm_head.weight": w["lm_head.weight"] * math.nan}),
        spoil(weights=lambda _: Bomb()),
        lambda content: content.clear(),
    ],
)
def test_a_file_that_does_not_fit_itself_is_refused(saved, change):
    path, _ = saved
    content = torch.load(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"m\.pth is damaged or no model"):
        load_model(path)


def test_a_file_that_would_unpack_to_more_than_its_size_is_refused(saved):
    path, _ = saved
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in members.items():
            new.writestr(name, content if "/data/" not in name else bytes(10**6))
    with pytest.raises(ValueError, match="more than its size"):
        load_model(path)


def test_a_full_disk_is_an_os_error_and_leaves_the_old_file_and_nothing_else(saved):
    path, model = saved
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # as full as a test can make it
    try:
        with pytest.raises(OSError, match=r"too large: .*m\.pth"):
            save_model(path, model, CharTokenizer("abcdefghijk"), step=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["m.pth"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved):
    path, model = saved
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"pickle|local object"):
        save_model(path, model, CharTokenizer("abcdefghijk"), fact=lambda: None)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["m.pth"]
