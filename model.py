"""A GPT-2 style, character-level language model, from scratch. Read it from top to bottom.

The model reads a text and gives, at each position, a score to every character that could come
next. To write, draw a character by these scores, append it, and read again.

Inside, each character is a vector of C numbers. Blocks change the vectors: attention lets each
gather from the earlier ones, feed-forward transforms each alone. A last layer turns each vector
into the scores.

The architecture is GPT-2's: the decoder of "Attention Is All You Need", without the encoder and
the attention to it, and with the norms moved to the front. The function differs from GPT-2's in
two things: positions are encoded by fixed sines and cosines instead of learned vectors, and the
output layer has weights of its own. In training, the embedding begins larger, and there is no
dropout on attention weights.

Papers, as cited below:

    [V]     Vaswani et al., 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762
    [GPT-1] Radford et al., 2018, "Improving Language Understanding by Generative Pre-Training"
    [GPT-2] Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"

Sizes, as in the comments at the end of lines:

    B  batch: texts computed side by side      H  attention heads
    T  time: characters of each text           D  channels of a head, C / H
    C  channels: numbers for each character    V  vocabulary: different characters
    S  source: characters that T characters can look at; more than T where some were read before
"""

import hashlib
import io
import math
import os
import re
import secrets
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------------------
# 1 Configuration
# ----------------------------------------------------------------------------------------


class InputError(ValueError):
    """A wrong setting, text or file. The scripts print the message, without a traceback."""


# Larger sizes are mistakes or come from a damaged file: refused before memory is taken.
MAX_SIZE = 2**21
MAX_CONTEXT_LENGTH = 2**16


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model. Raises InputError if a size is invalid or two do not fit together."""

    vocab_size: int
    context_length: int = 128  # the characters that the model sees at once
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads in each block
    n_embd: int = 128  # channels
    dropout: float = 0.0  # the probability that an activation is set to zero in training

    def __post_init__(self) -> None:
        self.check_size("vocab_size", MAX_SIZE)
        self.check_size("context_length", MAX_CONTEXT_LENGTH)
        self.check_size("n_layer", MAX_SIZE)
        self.check_size("n_head", MAX_SIZE)
        self.check_size("n_embd", MAX_SIZE)

        if self.n_embd % self.n_head != 0:
            raise InputError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and less than 1, not {self.dropout}")

    def check_size(self, name: str, maximum: int) -> None:
        size = getattr(self, name)
        if type(size) is not int or not 1 <= size <= maximum:
            raise InputError(f"{name} must be a whole number from 1 to {maximum}, not {size!r}")

    @property
    def parameter_count(self) -> int:
        """The number of parameters of a model of these sizes."""
        V, C, L = self.vocab_size, self.n_embd, self.n_layer
        embedding_and_output = 2 * V * C
        block = 12 * C * C + 13 * C  # 4 C^2 in attention, 8 C^2 in feed-forward; biases and norms
        final_norm = 2 * C
        return embedding_and_output + L * block + final_norm


# ----------------------------------------------------------------------------------------
# 2 Text and ids
# ----------------------------------------------------------------------------------------

CODE_POINTS = sys.maxunicode + 1  # Unicode numbers its characters from 0 to sys.maxunicode
PIECE = 2**18  # characters encoded at once: enough to be fast, few enough to need little memory


class CharTokenizer:
    """Maps characters to ids and back. The id of a character is its position in the vocabulary.

    Raises InputError if the vocabulary is not a string of different characters in sorted order.
    """

    def __init__(self, characters: str) -> None:
        if type(characters) is not str or list(characters) != sorted(set(characters)):
            raise InputError("a vocabulary must consist of different characters in sorted order")
        self.characters = characters
        self.vocab_size = len(characters)

        # The smallest integer type that holds every id: a long text takes one byte a character.
        if self.vocab_size <= 2**8:
            self.dtype = torch.uint8
        elif self.vocab_size <= 2**15:
            self.dtype = torch.int16
        else:
            self.dtype = torch.int32

        # A table from code points to ids. A dictionary would do, but this encodes a text with one
        # indexing operation, about 50 times as fast.
        self.id_of_code_point = torch.full((CODE_POINTS,), -1, dtype=torch.int32)  # -1: unknown
        self.id_of_code_point[code_points(characters)] = torch.arange(
            self.vocab_size, dtype=torch.int32
        )

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Builds the vocabulary from all characters that occur in a text."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tensor:
        """Returns the ids, `(len(text),)`, as small integers; the model needs them as `.long()`.

        Raises InputError if a character is unknown.
        """
        ids = torch.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), PIECE):
            codes = code_points(text[start : start + PIECE])
            piece = self.id_of_code_point[codes]
            if piece.min() < 0:
                unknown = chr(int(codes[piece < 0][0]))
                raise InputError(
                    f"the character {unknown!r} (U+{ord(unknown):04X}) is not in the vocabulary, "
                    f"which is: {self.describe()}"
                )
            ids[start : start + PIECE] = piece
        return ids

    def decode(self, ids: Tensor) -> str:
        """Returns the text of ids, `(T,)`."""
        return "".join(self.characters[i] for i in ids.tolist())

    def describe(self) -> str:
        """Returns up to 100 characters of the vocabulary, with spaces between them."""
        shown = " ".join(visible(character) for character in self.characters[:100])
        if self.vocab_size <= 100:
            return shown
        return f"{shown} ... ({self.vocab_size:,} characters)"


def visible(character: str) -> str:
    """Returns a text that stands for a character, such as "\\n" for a line break."""
    return "space" if character == " " else repr(character)[1:-1]


def code_points(text: str) -> Tensor:
    """Returns `ord` of each character, `(len(text),)`."""
    # Four bytes a character, after a byte order mark. An argument of a command that is not valid
    # UTF-8 has characters that UTF-32 refuses. "surrogatepass" lets them through, so that
    # CharTokenizer.encode can report them as unknown.
    utf32 = text.encode("utf-32", "surrogatepass")
    return torch.frombuffer(bytearray(utf32), dtype=torch.int32)[1:].long()


# ----------------------------------------------------------------------------------------
# 3 Positions
# ----------------------------------------------------------------------------------------


def sinusoidal_encoding(context_length: int, n_embd: int) -> Tensor:
    """Returns a table with a vector for each position, `(T, C)`, [V] section 3.5:

        PE(t, 2i)     = sin(t / 10000^(2i / C))
        PE(t, 2i + 1) = cos(t / 10000^(2i / C))

    Attention adds up vectors, and a sum is the same in any order. So each character's vector
    gets a second one added that depends on its position alone.

    Each pair of channels is the hand of a clock. The first turns once in 2 pi characters, each
    following one more slowly, the last once in almost 2 pi 10000. Fast hands tell neighbors
    apart, slow ones distant positions. The number 10000 is [V]'s: large enough that no two
    positions of any usual context look the same.

    Why a sine and a cosine? Together they make a step of k characters a rotation of each hand
    by a fixed angle, a linear function that is the same at every position: sin(a + b) is
    cos(b) sin(a) + sin(b) cos(a). So a linear layer can learn "three characters back". With the
    sine alone there is no such function.
    """
    position = torch.arange(context_length)[:, None]  # (T, 1)
    channel = torch.arange(0, n_embd, 2, dtype=torch.double)  # (C / 2,): 0, 2, 4, ...
    angle = position * 10000.0 ** (-channel / n_embd)  # (T, C / 2)
    pairs = torch.stack([angle.sin(), angle.cos()], dim=-1)  # (T, C / 2, 2)
    return pairs.flatten(1)[:, :n_embd].float()  # (T, C), also for an odd C


# ----------------------------------------------------------------------------------------
# 4 Attention
# ----------------------------------------------------------------------------------------


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """Returns `(T, S)`, True where a query may use a key, for the last T characters of S.

    The last query belongs to the last character and may use every key; the query before it may
    use all keys but the last, and so on. For T = S = 3:

        1 0 0
        1 1 0
        1 1 1

    In training, each position predicts the character after it, all at once, and that character
    is in the input too, one place later. Without a mask the model would learn to copy it, and
    would fail in generation, where it does not exist yet.
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


class Attention(nn.Module):
    """Scaled dot-product attention, softmax(Q K^T / sqrt(D)) V, [V] section 3.2.1; V: the values.

    Each character asks a question, its query. Each character up to it offers a key, which says
    what it has, and a value, which is what it gives. All three are vectors of D numbers, which
    learned linear layers compute from the character's vector. The larger the dot product of a
    query and a key, the more of the value is taken.
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
        # to one key, and its gradient would vanish ([V] section 3.2.1, footnote 4).
        scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, S)

        # No character may use what comes after it: exp(-inf) is a weight of 0.
        mask = causal_mask(T, S, q.device)  # (T, S)
        scores = scores.masked_fill(~mask, -math.inf)  # (B, H, T, S)

        return scores.softmax(dim=-1)  # (B, H, T, S)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Computes `weights(q, k) @ v`, `(B, H, T, D)`, with one function of torch.

        It is faster than `weights`, which the model does not call, and never holds all weights.
        """
        T, S = q.size(-2), k.size(-2)
        if T == 1:  # the last character may use every key
            return fused_attention(q, k, v)
        if T == S:  # nothing was read before
            return fused_attention(q, k, v, is_causal=True)
        # is_causal would align the mask with the first key instead of the last.
        return fused_attention(q, k, v, attn_mask=causal_mask(T, S, q.device))


class KVCache:
    """The keys and values of all characters that one block has read. Only generation uses it.

    Because of the mask they depend only on a character and those before it, so they never
    change. With a cache a new character costs the work for one position, with attention to all
    before it; without one, the work for all positions. Queries are not kept: each is used once,
    by its own character.
    """

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor) -> None:
        head_size = config.n_embd // config.n_head
        shape = (batch_size, config.n_head, config.context_length, head_size)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # the characters read so far

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values of T characters, `(B, H, T, D)`; returns those of all so far."""
        start = self.length
        self.length += k.size(2)
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reset(self) -> None:
        """Forgets all characters."""
        self.length = 0


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each free to look for something else, [V] section 3.2.2."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        # Queries, keys and values in one product. Linear computes what nn.Linear computes;
        # section 9 explains why it has a class of its own.
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)
        self.scaled_dot_product = Attention()
        self.output = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Lets each character gather from itself and those before it, x `(B, T, C)`."""
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head

        # Compute H queries, H keys and H values from each vector.
        qkv = self.qkv(x)  # (B, T, 3 C)
        qkv = qkv.view(B, T, 3 * H, D)  # each vector cut into 3 H vectors of D numbers
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(k, v)  # those of all characters so far

        x = self.scaled_dot_product(q, k, v)  # (B, H, T, D)

        # Put the heads side by side again, and mix what they have found.
        x = x.transpose(1, 2).reshape(B, T, C)  # from (B, T, H, D)
        return self.output(x)


# ----------------------------------------------------------------------------------------
# 5 The block
# ----------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """Two linear layers with a nonlinearity between them, on each character alone, [V] section 3.3.

    Attention adds up values, which are linear functions of the vectors; here each vector is
    transformed by a function that is not linear. Without the nonlinearity the two layers would
    be a single linear function. GELU is a smooth max(0, x); the tanh form is GPT-2's.

    Between the layers a vector is four times as wide: each of the 4 C channels can detect a
    pattern, and the second layer turns the patterns found into a change of the vector. Wider
    detects more and costs more; four times is the choice of [V] and GPT-2.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expand = Linear(config.n_embd, 4 * config.n_embd)
        self.contract = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = self.expand(x)  # (B, T, 4 C)
        x = F.gelu(x, approximate="tanh")
        return self.contract(x)


class TransformerBlock(nn.Module):
    """Attention between the characters, then feed-forward on each, [GPT-2] section 2.3.

    Each of the two adds its result to x. Through these sums, the residual connections,
    gradients have a direct path to every layer, and a block has to learn only what to change.

    A LayerNorm gives each vector mean 0 and variance 1, then a learned scale and shift, so that
    attention and feed-forward see inputs of one size, however large x has grown. It is applied
    to their inputs and not to x, which runs from the embedding to the last norm through
    additions alone. In [V] the norms come after the sums: then the gradients of the last layers
    are large at the beginning, and training needs a long warm-up (Xiong et al., 2020, section
    3, https://arxiv.org/abs/2002.04745).

    Dropout sets random activations to zero in training and enlarges the others to make up for
    it, so that the model cannot rely on any single one ([V] section 5.4). It can help where a
    model reads a small text so often that it memorizes it; with the default settings it does
    not.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        attended = self.attention(self.attention_norm(x), cache)
        x = x + F.dropout(attended, self.dropout, self.training)

        change = self.feed_forward(self.feed_forward_norm(x))
        x = x + F.dropout(change, self.dropout, self.training)
        return x


# ----------------------------------------------------------------------------------------
# 6 The model
# ----------------------------------------------------------------------------------------


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
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        # In training x comes to grow with every block: the last norm brings it to one size again.
        self.final_norm = nn.LayerNorm(C)
        # The scores of the characters. GPT-2 ties this layer to the embedding: both use one tensor
        # of weights. That saves V C parameters, tens of millions with GPT-2's vocabulary but about
        # 1 % here, and the two should begin with weights of a different magnitude, standard
        # deviations of 1 and 0.02: see init_weights.
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
        self, ids: Tensor, targets: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Computes a score for each character that could follow each position.

        Args:
            ids: `(B, T)`, texts, or with `caches` their next T characters.
            targets: `(B, T)`, the characters that really follow, if the loss is wanted.
            caches: one for each block, with what has been read before.

        Returns:
            The scores, called logits, `(B, T, V)`. A softmax turns them into probabilities. The
            loss in nats, units of the natural logarithm: the mean of -log p(target). It is 0 if
            every target was certain, and ln V if all characters were equally likely. None
            without targets.

        Raises:
            ValueError: if there are more characters than fit the context.
        """
        T = ids.size(1)
        start = caches[0].length if caches else 0
        if start + T > self.config.context_length:
            raise ValueError(
                f"{start + T} characters do not fit a context of {self.config.context_length}"
            )

        # What each character is, plus where it stands. The sum keeps both: with the default sizes
        # the vectors of all positions lie almost in a subspace of C / 5 dimensions, which the
        # embedding learns to use less than the others.
        x = self.token_embedding(ids) + self.positions[start : start + T]  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)

        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)  # (B, T, C)

        x = self.final_norm(x)  # (B, T, C)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None

        # Each of the B T positions is one example for a classifier with V classes. The softmax and
        # -log of the target's probability are computed together, for accuracy.
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

        `temperature`, `top_k` and `top_p` are those of `sample`. `generator`, on the CPU, draws a
        seed for each text, so that a text does not depend on how many are written beside it.

        The caches change only the speed: as long as everything fits the context, the texts are
        the same as without them.
        """
        context_length = self.config.context_length
        seeds = torch.randint(2**62, (ids.size(0),), generator=generator)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        caches = [KVCache(self.config, ids.size(0), self.positions) for _ in self.blocks]
        window = ids[:, -context_length:]  # (B, T), the characters that the model sees

        for _ in range(max_new_tokens):
            # Read what is unread: the prompt at first, then one character at a time.
            unread = window[:, caches[0].length :]
            logits, _ = self(unread, caches=caches)
            scores = logits[:, -1]  # (B, V), of what follows the last character

            # Draw the next character of each text.
            u = torch.stack([torch.rand((), generator=g) for g in generators])
            next_ids = sample(scores, u.to(ids.device), temperature, top_k, top_p)  # (B,)
            yield next_ids
            window = torch.cat([window, next_ids[:, None]], dim=1)

            # When the context is full, forget the older half, and read the newer half again
            # from position 0. If only one character were dropped, the position of every other
            # would change, and all would have to be read again for each new character.
            if window.size(1) > context_length:
                window = window[:, -((context_length + 1) // 2) :]
                for cache in caches:
                    cache.reset()


def init_linear(layer: nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)


# ----------------------------------------------------------------------------------------
# 7 Sampling
# ----------------------------------------------------------------------------------------

GREEDY_TEMPERATURE = 1e-5  # up to here, the likeliest character has practically all probability


def sample(
    logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Draws the next character of each text.

    Args:
        logits: `(B, V)`, the scores of the characters.
        u: `(B,)`, random numbers from 0 to less than 1, which decide the draw.
        temperature: divides the scores. Two characters whose scores differ by 1 are 2.7 to 1 at
            a temperature of 1, 7.4 to 1 at 0.5 and 1.6 to 1 at 2. At 0 the likeliest is taken.
        top_k: if given, only the k likeliest characters are drawn.
        top_p: if given, only the likeliest characters that together have this probability, at
            this temperature, are drawn.

    Returns:
        The ids, `(B,)`.
    """
    if temperature <= GREEDY_TEMPERATURE:
        return logits.argmax(dim=-1)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    logits = logits / temperature
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return draw(logits.softmax(dim=-1), u)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets all but the k highest scores of each text to -inf, a probability of 0."""
    if k < 1:
        raise ValueError(f"top_k must be at least 1, not {k}")
    highest, ids = logits.topk(min(k, logits.size(-1)), dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, ids, highest)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Sets all scores to -inf but those of the likeliest characters that together reach p.

    This is nucleus sampling, Holtzman et al., 2020, section 3.1,
    https://arxiv.org/abs/1904.09751. It keeps few characters where the model is certain and
    many where it is not.
    """
    if p >= 1:
        return logits
    ranked, ids = logits.sort(dim=-1, descending=True, stable=True)  # (B, V)
    probs = ranked.softmax(dim=-1)
    likelier = probs.cumsum(dim=-1) - probs  # the total probability of all likelier characters
    unlikely = likelier >= p
    unlikely[:, 0] = False  # the likeliest always stays, with p = 0 too
    ranked = ranked.masked_fill(unlikely, -math.inf)
    return torch.empty_like(logits).scatter(-1, ids, ranked)  # in the order of the ids again


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """Draws an id for each row of probabilities, `(B, V)`, by inverse transform sampling.

    Laid end to end, the probabilities of a row divide a line of length 1 into V pieces. The id
    is that of the piece in which the point u, `(B,)`, lies: the number of pieces that end
    before it. With 0.5, 0.3 and 0.2 the pieces end at 0.5, 0.8 and 1; u = 0.6 gives id 1.
    (`torch.multinomial` would draw for all texts from one generator.)
    """
    ends = probs.cumsum(dim=-1)  # (B, V)
    point = u[:, None] * ends[:, -1:]  # (B, 1); rounding can make the line's end differ from 1
    return (ends <= point).sum(dim=-1)  # (B,)


# ----------------------------------------------------------------------------------------
# This is the whole model. The rest is not needed to understand it.
#
# 8 Files, and what the scripts share
# ----------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
MODEL_PATH = ROOT / "models/model-scifi.pth"
DIGEST_LENGTH = 64  # hexadecimal digits of SHA-256
REPLACE_ATTEMPTS = 20  # a tenth of a second apart


def save_model(path: Path | str, model: GPT, tokenizer: CharTokenizer, **metadata: Any) -> None:
    """Writes a model and metadata, such as the step, to a file, with `write_file`."""
    content = {
        "weights": model.state_dict(),
        "config": asdict(model.config),
        "vocabulary": tokenizer.characters,
        "metadata": metadata,
    }
    archive = io.BytesIO()
    torch.save(content, archive)
    write_file(Path(path), with_digest(archive.getvalue()))


def with_digest(archive: bytes) -> bytes:
    """Appends the SHA-256 of an archive to it. Readers of zip archives see it as a comment."""
    body = archive[:-2] + DIGEST_LENGTH.to_bytes(2, "little")  # the length of the comment
    return body + hashlib.sha256(body).hexdigest().encode()


def write_file(path: Path, data: bytes) -> None:
    """Writes a file: all of it, or nothing.

    It is written under a temporary name and then renamed, so that at every moment the path holds
    a whole file, the previous one or the new one, even if the machine loses power or two
    processes write at the same time. Raises OSError if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # each writer's own name
    try:
        write_durably(temporary, data)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    replace(temporary, path)


def write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # returns when the data is on the disk


def replace(temporary: Path, path: Path) -> None:
    """Renames a file. Tries for two seconds, since on Windows a reader of `path` blocks it."""
    for attempt in range(1, REPLACE_ATTEMPTS + 1):
        try:
            os.replace(temporary, path)
            break
        except OSError as error:
            if not isinstance(error, PermissionError) or attempt == REPLACE_ATTEMPTS:
                reason = f"{error.strerror}; what was to be written is in {temporary}"
                raise OSError(error.errno, reason, str(path)) from error
            time.sleep(0.1)

    if os.name == "posix":  # make the new name durable too; Windows cannot open directories
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_model(
    path: Path | str, device: torch.device | str = "cpu"
) -> tuple[GPT, CharTokenizer, dict[str, Any]]:
    """Reads what `save_model` wrote: the model, ready to generate, its tokenizer and the metadata.

    Code in the file is never run. Raises OSError if the file cannot be read, InputError if it
    is damaged or is not a model.
    """
    data = Path(path).read_bytes()
    is_intact = has_right_digest(data)
    try:
        check_archive(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if "facts" in content:  # what files held before they had metadata and a digest
            content["metadata"] = content.pop("facts")
        elif not is_intact:
            raise ValueError("its digest is wrong")
        config = GPTConfig(**content["config"])
        tokenizer = CharTokenizer(content["vocabulary"])
        weights = content["weights"]
        check_weights(weights)
        check_sizes(config, tokenizer, weights, len(data))
        model = GPT(config)
        model.load_state_dict(weights)
        metadata = dict(content["metadata"])
    except Exception as error:  # damage can cause almost any exception
        if is_intact and is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path} is damaged or is not a model of this code: {reason}") from error
    return model.to(device).eval(), tokenizer, metadata


def has_right_digest(data: bytes) -> bool:
    """True if the file ends with the digest of all bytes before.

    The checksums of its members do not suffice: Python and PyTorch can find different members in
    an archive whose directory is damaged.
    """
    body, digest = data[:-DIGEST_LENGTH], data[-DIGEST_LENGTH:]
    return hashlib.sha256(body).hexdigest().encode() == digest


def check_archive(data: bytes) -> None:
    """Each member must have its checksum, and all together must not be larger than the file.

    PyTorch checks neither. A compressed member could unpack to any size.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > len(data):
            raise ValueError("its content is larger than the file")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its content is compressed")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")


def check_weights(weights: dict[str, Tensor]) -> None:
    """The weights must be ordinary tensors of finite 32-bit numbers."""
    for name, weight in weights.items():
        if weight.dtype != torch.float32 or not weight.is_contiguous():
            raise ValueError(f"{name} is not an ordinary tensor of 32-bit numbers")
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


def check_sizes(
    config: GPTConfig, tokenizer: CharTokenizer, weights: dict[str, Tensor], file_size: int
) -> None:
    """The file must hold as much as a model of its sizes needs, before memory is taken for one."""
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError("its vocabulary has another size than its model")
    if sum(weight.numel() for weight in weights.values()) != config.parameter_count:
        raise ValueError("its weights are not as many as its sizes say")
    # Names can share a tensor, as with a tied output layer: a file may be down to half as large.
    if 4 * config.parameter_count > 2 * file_size:
        raise ValueError("it is smaller than its weights")


def read_text(path: Path) -> tuple[str, str]:
    """Reads a text and the SHA-256 of its bytes.

    Raises OSError if the file cannot be read, InputError if it is not UTF-8.
    """
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): convert it first") from error
    return text.removeprefix("\ufeff"), digest  # without a byte order mark


def user_path(argument: str) -> Path:
    """Returns the path that an argument names; a shell leaves the ~ in --model=~/m.pth."""
    return Path(os.path.expanduser(argument))


def prepare_output() -> None:
    """Makes standard output UTF-8, and lets both outputs be closed."""
    if sys.stdout is not None:
        # UTF-8 lacks half surrogate pairs, which an argument can contain: they are printed as "?".
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def cpu_capabilities() -> dict[str, Any]:
    """Returns what torch knows about the processor; older versions of torch know nothing."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def is_intel(processor: dict[str, Any]) -> bool:
    return "Intel" in processor.get("cpu_name", "")


def default_device() -> str:
    """Returns the accelerator of this machine, such as "cuda" or "mps", or else "cpu"."""
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def with_hyphens(argument: str) -> str:
    """Accepts a flag such as --batch_size for --batch-size. A value after = is left as it is."""
    return re.sub(r"^--\w[\w-]*(?=$|=)", lambda flag: flag[0].replace("_", "-"), argument)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU, torch raises a RuntimeError with one of these messages.
    messages = ("allocate memory", "bad_alloc")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in messages)


# ----------------------------------------------------------------------------------------
# 9 Speed on a CPU
# ----------------------------------------------------------------------------------------

# On an Intel Xeon, PyTorch divided a product among the cores well by itself: there, what `Linear`
# does made generation with 6 layers of 384 channels take 1.15 times as long.
TORCH_DIVIDES_WELL = is_intel(cpu_capabilities())
MANY_ROWS = 256  # from here on, dividing the rows gains more than it costs
FEW_ROWS = 32  # up to here, reading the weights takes most of the time
LARGE_WEIGHT = 2**17  # elements; smaller weights stay in each core's own cache


class Linear(nn.Linear):
    """nn.Linear, with its product divided among the cores of a CPU where torch divides it badly.

    The result is the same, up to rounding. The gain depends on the machine; `tests/benchmark.py`
    compares with nn.Linear:

    - Many rows, as in training: 1.2 to 1.4 times as fast on four cores of an AMD EPYC with AVX2.
    - Few rows and a large weight, as in generation with 6 layers of 384 channels: 1.5 times as
      fast on another machine, two cores with AVX-512.
    """

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if TORCH_DIVIDES_WELL or not x.is_cpu or torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)

        cores = torch.get_num_threads()
        if cores > 1:
            rows = x.numel() // self.in_features
            if self.can_divide_rows(rows, cores):
                return self.divide_rows(x, cores)
            if self.can_divide_weight(rows, cores):
                return self.divide_weight(x, cores)
        return F.linear(x, self.weight, self.bias)

    def can_divide_rows(self, rows: int, cores: int) -> bool:
        if rows < MANY_ROWS or rows % cores != 0:
            return False
        return self.bias is not None and not torch.is_autocast_enabled("cpu")

    def can_divide_weight(self, rows: int, cores: int) -> bool:
        if rows > FEW_ROWS or self.weight.numel() < LARGE_WEIGHT or self.out_features % cores != 0:
            return False
        return self.bias is not None and not torch.is_grad_enabled()

    def divide_rows(self, x: Tensor, cores: int) -> Tensor:
        """Each core multiplies its share of the rows by the whole weight."""
        rows = x.reshape(cores, -1, self.in_features)  # (cores, rows / cores, in)
        weight = self.weight.t().expand(cores, -1, -1)  # (cores, in, out)
        y = torch.baddbmm(self.bias, rows, weight)  # (cores, rows / cores, out)
        return y.view(*x.shape[:-1], self.out_features)

    def divide_weight(self, x: Tensor, cores: int) -> Tensor:
        """Each core multiplies all rows by its share of the weight."""
        rows = x.reshape(1, -1, self.in_features).expand(cores, -1, -1)  # (cores, rows, in)
        weight = self.weight.view(cores, -1, self.in_features).mT  # (cores, in, out / cores)
        bias = self.bias.view(cores, 1, -1)  # (cores, 1, out / cores)
        y = torch.baddbmm(bias, rows, weight)  # (cores, rows, out / cores)
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """F.scaled_dot_product_attention, always in 32 bits on a CPU.

    There its backward pass takes 3 to 7 times as long in bfloat16.
    """
    if not (q.is_cpu and torch.is_autocast_enabled("cpu")):
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
