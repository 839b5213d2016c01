"""A GPT-2 style, character-level language model, from scratch. Read it from top to bottom.

The model reads a text and gives, at each position, a score to every character that could come
next. To write, draw a character at random, weighted by these scores, append it, and read again:
such a model is called autoregressive.

Inside, each character is a vector of C numbers. Each block changes the vectors twice: attention
adds what a vector takes from itself and those before it, and feed-forward adds what it computes
from each vector alone. A last layer turns each vector into the scores.

The architecture is GPT-2's: the decoder of "Attention Is All You Need", without the encoder and
the cross-attention to it, and with the norms in front (pre-norm). Without dropout, the function
differs from GPT-2's in two things: positions are encoded by fixed sines and cosines instead of
learned vectors, and the output layer has weights of its own.

Papers, as cited below:

    [Vaswani]  Vaswani et al., 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762
    [GPT-1]    Radford et al., 2018, "Improving Language Understanding by Generative Pre-Training"
    [GPT-2]    Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"

Sizes, as in the comments at the end of lines:

    B  batch: texts computed side by side      H  attention heads
    T  time: characters of each text           D  channels of a head, C / H
    C  channels: numbers for each character    V  vocabulary: different characters
    S  source: these T characters and those read before them, whose keys and values are cached
"""

import hashlib
import io
import math
import os
import pickle
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- 1 Configuration -------------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model. Raises InputError if the channels cannot be divided among the heads."""

    vocab_size: int
    context_length: int = 128  # the characters that the model sees at once
    n_layer: int = 3  # blocks
    n_head: int = 4  # attention heads in each block
    n_embd: int = 128  # channels
    dropout: float = 0.0  # the probability that an activation is set to zero in training

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head != 0:
            raise InputError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")


# ---- 2 Text and ids --------------------------------------------------------------------


class CharTokenizer:
    """Maps characters to ids and back. The id of a character is its position in the vocabulary."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.vocab_size = len(characters)
        self.id_of = {character: i for i, character in enumerate(characters)}

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Builds the vocabulary from all characters that occur in a text, in sorted order."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tensor:
        """Returns the ids, `(len(text),)`. Raises InputError if a character is unknown."""
        unknown = sorted(set(text) - self.id_of.keys())
        if unknown:
            raise InputError(
                f"the character {unknown[0]!r} is not in the vocabulary of the model, "
                "which show_params.py lists"
            )
        return torch.tensor([self.id_of[character] for character in text], dtype=torch.long)

    def decode(self, ids: Tensor) -> str:
        """Returns the text of ids, `(T,)`."""
        return "".join(self.characters[i] for i in ids.tolist())


def visible(character: str) -> str:
    """Returns a printable name for a character, such as "\\n" for a line break."""
    return "space" if character == " " else repr(character)[1:-1]


# ---- 3 Positions -----------------------------------------------------------------------


def sinusoidal_encoding(context_length: int, n_embd: int) -> Tensor:
    """Returns a table with a vector for each position, `(T, C)`, [Vaswani] section 3.5:

        PE(t, 2i)     = sin(t / 10000^(2i / C))
        PE(t, 2i + 1) = cos(t / 10000^(2i / C))

    Attention adds up vectors, and a sum is the same in any order. So each character's vector
    gets a second one added that depends on its position alone.

    Each pair of channels is the position of the tip of a clock's hand. The first hand makes one
    turn in 2 pi = 6.3 characters; each later hand is slower, and the last takes up to 62,832. Fast
    hands tell neighbors apart, slow ones distant positions.

    Why a sine and a cosine? Together they make a step of k characters a rotation of each hand
    by a fixed angle: sin(a + b) is cos(b) sin(a) + sin(b) cos(a). A rotation is a linear
    function, the same at every position, so a linear layer can learn it. `Attention`
    has an example.
    """
    position = torch.arange(context_length)[:, None]  # (T, 1)
    channel = torch.arange(0, n_embd, 2, dtype=torch.double)  # (C / 2,): 0, 2, 4, ...
    angle = position * 10000.0 ** (-channel / n_embd)  # (T, C / 2)
    pairs = torch.stack([angle.sin(), angle.cos()], dim=-1)  # (T, C / 2, 2)
    return pairs.flatten(1)[:, :n_embd].float()  # (T, C), also for an odd C


# ---- 4 Attention -----------------------------------------------------------------------


class Attention(nn.Module):
    """Scaled dot-product attention, softmax(q k^T / sqrt(D)) v, [Vaswani] section 3.2.1.

    Each character asks a question, its query. Each character up to it offers a key, which says
    what it has, and a value, which is what it gives. All three are vectors of D numbers, which
    learned linear layers compute from the character's vector. The larger the dot product of a
    query and a key, the more of the value is taken.

    For example, to look three characters back: a query can hold its own position with each hand of
    `sinusoidal_encoding` turned back by three characters, and a key its position as it is. Each
    pair of hands adds the cosine of the angle between them to the dot product, which is largest
    for the character three places back, where all these angles are 0.
    """

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Computes how much of each value each query takes, the formula step by step.

        The queries `(B, H, T, D)` are those of the last T of S characters, the keys `(B, H, S,
        D)` those of all. The weights, `(B, H, T, S)`, of each query sum to 1.
        """
        T, S, D = q.size(-2), k.size(-2), q.size(-1)

        # How well does each key fit each query? A score is a sum of D products. If their factors
        # are independent, with mean 0 and variance 1, the sum has a standard deviation of sqrt(D);
        # the division brings it back to 1. With large scores the softmax would give all the weight
        # to one key, and its gradient would vanish ([Vaswani] section 3.2.1, footnote 4).
        scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, S)

        # No character may use what comes after it: exp(-inf) is a weight of 0.
        mask = causal_mask(T, S, q.device)  # (T, S)
        scores = scores.masked_fill(~mask, -math.inf)  # (B, H, T, S)

        return scores.softmax(dim=-1)  # (B, H, T, S)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Computes `weights(q, k) @ v`, `(B, H, T, D)`, with one function of torch.

        The model calls this, since it is faster and takes less memory. `weights` is there to be
        read, and for looking at the weights of a trained model.
        """
        if q.is_cpu and torch.is_autocast_enabled("cpu"):
            # On a CPU the gradient of this function takes 2 to 7 times as long in bfloat16.
            with torch.autocast("cpu", enabled=False):
                return self.forward(q.float(), k.float(), v.float())

        T, S = q.size(-2), k.size(-2)
        if T == S:  # nothing was read before
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # Here is_causal=True would let the first query use the first key alone.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(T, S, q.device))


def causal_mask(T: int, S: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns `(T, S)`, True where a query may use a key, for the last T characters of S.

    In training T = S, as on the left: the first character may use only itself, the last one all. On
    the right, the first of three characters was read before. (In generation, T = 1 after the
    prompt.)

        T = S = 3           T = 2, S = 3

          1 0 0
          1 1 0                 1 1 0
          1 1 1                 1 1 1

    In training, each position predicts the character after it, all at once, and that character
    is in the input too, one place later. Without a mask the model would learn to copy it, and
    would fail in generation, where it does not exist yet.
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each free to look for something else, [Vaswani] section 3.2.2.

    One attention gives each character one mixture of the values. With several heads it can, for
    example, take one value from the last character and another from the last space. Every head
    reads all C channels, and makes D = C / H new ones. Heads differ only in their weights, which
    begin at random; training drives them apart.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values
        self.scaled_dot_product = Attention()
        self.output = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Lets each character gather from itself and those before it, x `(B, T, C)`."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head

        # Compute the queries, keys and values of all heads in one product, and cut the result. With
        # C = 4 and H = 2, the 12 numbers of each character are
        #
        #     q q  q q    k k  k k    v v  v v
        #     head 0, 1   head 0, 1   head 0, 1
        #
        # The heads become a dimension of their own, so that they are computed side by side, as if
        # they were different texts.
        qkv = self.qkv(x)  # (B, T, 3 C)
        qkv = qkv.view(B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # from (3, B, H, T, D): (B, H, T, D) each
        if cache is not None:  # only in generation
            k, v = cache.append(k, v)  # (B, H, S, D) each: those of all characters so far

        x = self.scaled_dot_product(q, k, v)  # (B, H, T, D)

        # Put the heads side by side again, and mix what they have found.
        x = x.transpose(1, 2).reshape(B, T, C)  # from (B, T, H, D)
        return self.output(x)


# ---- 5 Feed-forward and the block ------------------------------------------------------


class FeedForward(nn.Module):
    """Two linear layers with a nonlinearity between, on each character alone.

    [Vaswani] section 3.3. Attention adds up values, which are linear functions of the vectors;
    here each vector is transformed by a function that is not linear. Without the nonlinearity the
    two layers would be a single linear function. GELU is a smooth max(0, x); the tanh form is
    GPT-2's.

    Between the layers a vector is four times as wide: each of the 4 C channels can detect a
    pattern, and the second layer turns the patterns found into a change of the vector. Wider
    detects more and costs more; four times is the choice of [Vaswani] and GPT-2.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.contract = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = self.expand(x)  # (B, T, 4 C)
        x = F.gelu(x, approximate="tanh")
        return self.contract(x)


class TransformerBlock(nn.Module):
    """Attention between the characters, then feed-forward on each, [GPT-2] section 2.3.

    Each of the two adds its result to x, the residual stream. Through these sums, the residual
    connections, gradients have a direct path to every layer, and a block has to learn only what to
    change.

    A LayerNorm gives each vector mean 0 and variance 1, then a learned scale and shift, so that
    attention and feed-forward see inputs of one size, however large x has grown. It stands in front
    of them, and not after the sums as in [Vaswani], so that the direct path has nothing but sums on
    it: then training is stable without a long warm-up (Xiong et al., 2020,
    https://arxiv.org/abs/2002.04745).

    Dropout sets random activations to zero in training and enlarges the others to make up for
    it, so that the model cannot rely on any single one ([Vaswani] section 5.4). It can help where
    a model reads a small text so often that it memorizes it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cache: "KVCache | None" = None
    ) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


# ---- 6 The model -----------------------------------------------------------------------


class GPT(nn.Module):
    """The model: embeddings, blocks, a final norm and a linear layer to the vocabulary."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        V, C = config.vocab_size, config.n_embd
        self.config = config
        # A table with a learned vector for each id: a token, the unit of text, is a character here.
        self.token_embedding = nn.Embedding(V, C)
        positions = sinusoidal_encoding(config.context_length, C)
        self.register_buffer("positions", positions, persistent=False)  # a constant, not saved
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        # In a trained model x grows from block to block: this norm brings it back to the same size.
        self.final_norm = nn.LayerNorm(C)
        # The scores of the characters. GPT-2 ties this layer to the embedding: both use one tensor
        # of weights. That saves V C parameters, tens of millions with GPT-2's vocabulary but 1.5 %
        # of all here, and the two should begin with weights of a different size: see init_weights.
        self.lm_head = nn.Linear(C, V, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the weights. A norm begins as torch makes it: scale 1 and shift 0."""
        # About as large as the sines and cosines that are added, so that neither hides the other.
        nn.init.normal_(self.token_embedding.weight, std=1.0)

        # The rest begin with 0.02, as in [GPT-1] section 4.1. The results of 2 n_layer layers are
        # added to x, and variances add: so these layers begin smaller by a factor of
        # sqrt(2 n_layer), and at first x hardly grows with depth ([GPT-2] section 2.3).
        std = 0.02
        std_before_sum = std / math.sqrt(2 * self.config.n_layer)
        for block in self.blocks:
            init_linear(block.attention.qkv, std)
            init_linear(block.attention.output, std_before_sum)
            init_linear(block.feed_forward.expand, std)
            init_linear(block.feed_forward.contract, std_before_sum)

        # So small that all characters are about equally likely at first: a loss of about ln V.
        nn.init.normal_(self.lm_head.weight, std=std)

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, caches: "list[KVCache] | None" = None
    ) -> tuple[Tensor, Tensor | None]:
        """Computes a score for each character that could follow each position.

        Args:
            ids: `(B, T)`, texts, or with `caches` their next T characters.
            targets: `(B, T)`, the characters that really follow, if the loss is wanted.
            caches: one for each block, with what has been read before. Only `generate` passes them.

        Returns:
            The scores, called logits, `(B, T, V)`. A softmax turns them into probabilities. The
            loss is the cross-entropy in nats, units of the natural logarithm: the mean of
            -log p(target). It is 0 if the model gave every target a probability of 1, and ln V if
            all characters were equally likely. None without targets.

        Raises:
            ValueError: if there are more characters than fit the context.
        """
        T = ids.size(1)
        start = caches[0].length if caches else 0
        if start + T > self.config.context_length:
            raise ValueError(
                f"{start + T} characters do not fit a context of {self.config.context_length}"
            )

        # Add what each character is and where it stands. The sum does not mix them up: within the
        # context, positions differ in some of the channels only, and the embedding can learn to
        # use the rest.
        x = self.token_embedding(ids) + self.positions[start : start + T]  # (B, T, C)
        x = self.dropout(x)

        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            x = block(x, cache)  # (B, T, C)

        x = self.final_norm(x)  # (B, T, C)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None

        # Each of the B T positions is one example for a classifier with V classes. The softmax and
        # -log of the target's probability are computed together, which is more accurate.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.inference_mode()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continues texts, ids `(B, T)` with T at least 1: yields the next ids, `(B,)`, one by one.

        In its simplest form, generation reads all characters again to get the next one:

            logits, _ = model(ids[:, -context_length:])  # (B, T, V)
            next_ids = sample(logits[:, -1])  # (B,)
            ids = torch.cat([ids, next_ids[:, None]], dim=1)  # (B, T + 1)

        Until the context is full, this method does the same, but the blocks remember what they have
        computed of the earlier characters (see `KVCache`), so that only the new one has to be read.

        `temperature`, `top_k`, `top_p` and `generator` are those of `sample`.
        """
        context_length = self.config.context_length
        caches = [KVCache() for _ in self.blocks]
        window = ids[:, -context_length:]  # (B, T), the characters that the model sees

        for _ in range(max_new_tokens):
            # Read what is unread: the prompt at first, then one character at a time.
            unread = window[:, caches[0].length :]
            logits, _ = self(unread, caches=caches)
            next_ids = sample(logits[:, -1], temperature, top_k, top_p, generator)  # (B,)
            yield next_ids
            window = torch.cat([window, next_ids[:, None]], dim=1)

            # When the context is full, forget the older half, and read the newer half again
            # from position 0. If only one character were dropped, the position of every other
            # would change, and all would have to be read again for each new character.
            if window.size(1) > context_length:
                half = math.ceil(context_length / 2)
                window = window[:, -half:]
                caches = [KVCache() for _ in self.blocks]

    def count_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def init_linear(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)


# ---- 7 Generation ----------------------------------------------------------------------


class KVCache:
    """The keys and values of all characters that one block has read.

    Because of the mask they depend only on a character and those before it, so they never
    change. Queries are not kept: each is used once, by its own character.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None  # (B, H, S, D)
        self.values: Tensor | None = None  # (B, H, S, D)
        self.length = 0  # S, the characters read so far

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values of T characters, `(B, H, T, D)`; returns those of all so far."""
        if self.length > 0:
            k = torch.cat([self.keys, k], dim=2)
            v = torch.cat([self.values, v], dim=2)
        self.keys = k
        self.values = v
        self.length = k.size(2)
        return k, v


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws the next character of each text. Returns its id, `(B,)`.

    Args:
        logits: `(B, V)`, the scores of the characters.
        temperature: divides the scores. Two characters whose scores differ by 1 have odds of 2.7
            to 1 at a temperature of 1, 7.4 to 1 at 0.5 and 1.6 to 1 at 2. At 0 the likeliest is
            taken.
        top_k: if given, only the k likeliest characters are drawn.
        top_p: if given, only the likeliest characters that together have this probability, at
            this temperature, are drawn.
        generator: makes the draws repeatable. It is on the CPU, whatever the model's device.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)

    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)

    probs = logits.softmax(dim=-1)  # (B, V)
    ids = torch.multinomial(probs.float().cpu(), num_samples=1, generator=generator)  # (B, 1)
    return ids[:, 0].to(logits.device)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets the scores below the k-th highest of each text to -inf, a probability of 0."""
    highest, _ = logits.topk(min(k, logits.size(-1)))  # (B, k), in descending order
    return logits.masked_fill(logits < highest[:, -1:], -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Sets all scores to -inf but those of the likeliest characters that together reach p.

    This is nucleus sampling, Holtzman et al., 2020, section 3.1,
    https://arxiv.org/abs/1904.09751. It keeps few characters where the model is certain and
    many where it is not.

    If the probabilities, in descending order, are 0.5, 0.3 and 0.2, the characters before each
    have 0, 0.5 and 0.8 together: with p = 0.6 the third is dropped.
    """
    ranked, ids = logits.sort(dim=-1, descending=True)  # (B, V)
    probs = ranked.softmax(dim=-1)
    probs_before = probs.cumsum(dim=-1) - probs  # the sum without the character itself
    ranked = ranked.masked_fill(probs_before >= p, -math.inf)
    return torch.empty_like(logits).scatter(-1, ids, ranked)  # in the order of the ids again


# This is the whole model. The rest is not needed to understand it.

# ---- 8 Files, and what the scripts share -----------------------------------------------

ROOT = Path(__file__).resolve().parent
MODEL_PATH = ROOT / "models/model-scifi.pth"
DIGEST_LENGTH = 32  # bytes of SHA-256


class InputError(ValueError):
    """An error in what the user gave: a setting, a text or a file.

    The scripts print the message, without a traceback.
    """


def save_model(path: Path | str, model: GPT, tokenizer: CharTokenizer, **metadata: Any) -> None:
    """Writes a model and metadata, such as the step, to a file.

    The file is what `torch.save` writes, and after it the SHA-256 of that. Raises InputError if
    it cannot be written.
    """
    content = {
        "weights": model.state_dict(),
        "config": asdict(model.config),
        "vocabulary": tokenizer.characters,
        "metadata": metadata,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getvalue()
    write_file(Path(path), archive + hashlib.sha256(archive).digest())


def write_file(path: Path, data: bytes) -> None:
    """Writes a file: all of it, or nothing.

    It is written under a temporary name and then renamed, so that at every moment the path holds
    a whole file, the previous one or the new one. Raises InputError if it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # the data must be on the disk before it gets its name
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def load_content(path: Path | str) -> dict[str, Any]:
    """Reads a file that `save_model` wrote, without making a model of it.

    Code in the file is never run. Raises InputError if the file cannot be read, is damaged, or is
    not a model.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"there is no {path}: to train a model, run python train.py") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    archive, digest = data[:-DIGEST_LENGTH], data[-DIGEST_LENGTH:]
    if hashlib.sha256(archive).digest() != digest:
        raise InputError(f"{path} is damaged, or is not a model of this project")
    try:
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is not a model of this project") from error


def load_model(
    path: Path | str, device: torch.device | str = "cpu"
) -> tuple[GPT, CharTokenizer, dict[str, Any]]:
    """Reads what `save_model` wrote: the model, ready to generate, its tokenizer and the metadata.

    Raises InputError if the file cannot be read, is damaged, or is not a model of this model.py.
    """
    content = load_content(path)
    tokenizer = CharTokenizer(content["vocabulary"])
    config = content["config"]
    if config.keys() != {field.name for field in fields(GPTConfig)}:
        raise InputError(f"{path} was trained with another model.py: its configuration is {config}")
    model = GPT(GPTConfig(**config))
    try:
        model.load_state_dict(content["weights"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} was trained with another model.py: {reason}") from error
    return model.to(device).eval(), tokenizer, content["metadata"]


def read_text(path: Path) -> str:
    """Reads a text in UTF-8, with "\\n" for each line break and composed letters (Unicode's NFC).

    Raises InputError if the file cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # without a byte order mark
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): convert it first") from error
    return unicodedata.normalize("NFC", text)


def find_device(name: str) -> torch.device:
    """Returns the device of that name; for "auto" an accelerator that works, or else the CPU.

    Raises InputError if a named device does not work.
    """
    wanted = name
    if name == "auto":
        wanted = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        x = torch.ones(2, 2, device=wanted)
        (x @ x).sum().item()  # waits for the result
    except Exception as error:  # each kind of device has its own
        if name == "auto":
            return torch.device("cpu")
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device {name} cannot be used here: {reason}") from error
    return x.device


def use_utf8() -> None:
    """Makes input and output UTF-8, also in a file on Windows, and writes each line at once."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has streams of another kind
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
