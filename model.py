"""A GPT-2 style, character-level language model, from scratch. Read it from top to bottom.

The architecture is GPT-2's (Radford et al., 2019, section 2.3): the decoder of "Attention Is All You Need"
(Vaswani et al., 2017, here [V]), with no encoder and the norms in front. Two things differ from GPT-2: the
positions are the fixed sinusoids of [V], not learned, and the output layer has weights of its own.
Sizes: B batch, T time (characters), C channels (n_embd), H heads, D = C / H head dimension, V vocabulary.
"""

import copy
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model. Raises ValueError if they are invalid."""

    vocab_size: int
    context_length: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, size in list(asdict(self).items())[:-1]:  # all but the dropout
            if type(size) is not int or not 1 <= size <= (2**16 if name == "context_length" else 2**21):
                raise ValueError(f"{name} is {size!r}: not a whole number of a possible size")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must be from 0 up to, not including, 1")


class CharTokenizer:
    """The vocabulary: the different characters of a text, sorted. A character's place in it is its id."""

    def __init__(self, characters: str) -> None:
        if type(characters) is not str or list(characters) != sorted(set(characters)):
            raise ValueError("a vocabulary must be different characters in sorted order")
        self.characters, self.vocab_size = characters, (n := len(characters))
        self.dtype = torch.uint8 if n <= 2**8 else torch.int16 if n <= 2**15 else torch.int32
        self.id_of = torch.full((0x110000,), -1, dtype=torch.int32)  # by code point; -1 is unknown
        self.id_of[[*map(ord, characters)]] = torch.arange(self.vocab_size, dtype=torch.int32)

    @staticmethod
    def code_points(text: str) -> Iterator[Tensor]:
        """The code points of the characters, in pieces that stay in the processor's cache."""
        for start in range(0, len(text), 2**18):
            utf32 = text[start : start + 2**18].encode("utf-32", "surrogatepass")
            yield torch.frombuffer(bytearray(utf32), dtype=torch.int32)[1:].long()  # [0] is a byte order mark

    @classmethod
    def from_text(cls, text: str | Iterable[str]) -> "CharTokenizer":
        """The vocabulary of a text, given whole or in parts."""
        seen = torch.zeros(0x110000, dtype=torch.bool)
        for part in [text] if isinstance(text, str) else text:
            for codes in cls.code_points(part):
                counts = codes.bincount()
                seen[: len(counts)] |= counts > 0
        return cls("".join(map(chr, seen.nonzero().flatten().tolist())))

    def encode(self, text: str) -> Tensor:
        """The ids, `(len(text),)`, in the smallest type that fits. ValueError names an unknown character."""
        ids = [torch.empty(0, dtype=self.dtype)]
        for codes in self.code_points(text):
            found = self.id_of.take(codes)
            if found.min() < 0:
                unknown = chr(int(codes[found < 0][0]))
                raise ValueError(f"the character {unknown!r} (U+{ord(unknown):04X}) is not in the vocabulary")
            ids.append(found.to(self.dtype))
        return torch.cat(ids)

    def decode(self, ids: Tensor | list[int]) -> str:
        """The text of ids, `(T,)`; the inverse of `encode`."""
        return "".join([self.characters[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids)])


def sinusoidal_encoding(context_length: int, n_embd: int) -> Tensor:
    """The fixed table of positions, `(T, C)`: PE(t, 2i) = sin(t / 10000^(2i/C)), PE(t, 2i+1) = cos(same).

    Each pair of channels is a clock hand, slower than the pair before ([V] section 3.5). An odd C works too.
    """
    position = torch.arange(context_length, device="cpu")[:, None]  # (T, 1); even under torch.device("meta")
    frequency = 10000.0 ** (-torch.arange(0, n_embd, 2, device="cpu").double() / n_embd)  # (C / 2,)
    angle = position * frequency  # (T, C / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :n_embd].float()  # (T, C)


class Linear(nn.Linear):
    """y = x W^T + b, as nn.Linear, but on a CPU S cores share the rows of x or, if few, those of W."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, T, in_features)` to `(B, T, out_features)`. Little or uneven work is left to torch."""
        (B, T, C), N = x.shape, self.out_features
        S = torch.get_num_threads() if x.is_cpu and not torch.compiler.is_compiling() else 1
        if S > 1 and B * T >= 256 and B * T % S == 0 and not torch.is_autocast_enabled("cpu"):
            weight = self.weight.t().expand(S, C, N)  # (S, C, N)
            return torch.baddbmm(self.bias, x.reshape(S, -1, C), weight).view(B, T, N)
        if S > 1 and B * T <= 32 and C * N >= 2**17 and N % S == 0 and not torch.is_grad_enabled():
            weight = self.weight.view(S, -1, C).transpose(1, 2)  # (S, C, N / S)
            x = x.reshape(1, -1, C).expand(S, -1, C)  # (S, B T, C)
            return torch.baddbmm(self.bias.view(S, 1, -1), x, weight).transpose(0, 1).reshape(B, T, N)
        return F.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V, with nothing taken from later characters, [V] section 3.2.1."""

    def explicit(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The formula step by step: what `forward` gives, `(B, H, T, D)`, and the weights, `(B, H, T, T)`."""
        T, D = q.shape[-2:]
        scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, T); sums of D products grow like sqrt(D)
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(diagonal=1)  # (T, T)
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # row t: what t takes from each
        return weights @ v, weights

    def forward(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
        """The same as one fused kernel, `(B, H, T, D)`. A single query is the newest: it may use all keys."""
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.size(-2) > 1)


class KVCache:
    """The keys and values of one block, `(2, B, H, context_length, D)`. No later character changes them."""

    def __init__(self, config: GPTConfig, batch_size: int, device: torch.device) -> None:
        shape = (2, batch_size, config.n_head, config.context_length, config.n_embd // config.n_head)
        self.kv, self.length = torch.empty(shape, device=device), 0

    def append(self, kv: Tensor) -> tuple[Tensor, ...]:
        """Adds new characters' keys and values, `(2, B, H, T, D)`; returns those of all so far."""
        start, self.length = self.length, self.length + kv.size(3)
        self.kv.narrow(3, start, kv.size(3)).copy_(kv)
        return self.kv.narrow(3, 0, self.length).unbind()


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each on D channels computed from all C, [V] section 3.2.2."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention, self.n_head, self.dropout = Attention(), config.n_head, config.dropout
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values: one matrix product
        self.output = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Lets each character gather from those up to it, `(B, T, C)` in and out."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, k, v = qkv.unbind() if cache is None else (qkv[0], *cache.append(qkv[1:]))  # (B, H, T, D) each
        x = self.attention(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.output(x.transpose(1, 2).reshape(B, T, C))  # the heads side by side again


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between, on each character alone, [V] section 3.3."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expand = Linear(config.n_embd, 4 * config.n_embd)
        self.contract = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms each vector, `(B, T, C)` in and out. GELU, a smooth max(0, x), in GPT-2's tanh form."""
        return self.contract(F.gelu(self.expand(x), approximate="tanh"))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward: each behind a norm, which evens the sizes, and added to x: a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd)
        self.feed_forward = FeedForward(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Refines each character's vector, `(B, T, C)` in and out."""
        x = x + torch.dropout(self.attention(self.attention_norm(x), cache), self.dropout, self.training)
        return x + torch.dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)


def sample(logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Draws the next character of each row, `(B,)`, from logits, `(B, V)`; `u`, `(B,)` in [0, 1), decides.

    Logits are divided by the temperature; 0 takes the likeliest. Only the `top_k` likeliest count, and of
    those only the likeliest that together reach `top_p` (Holtzman et al., 2020).
    """
    if temperature < 1e-5:  # too small to divide by
        return logits.argmax(dim=-1)
    probs = (logits / temperature).softmax(dim=-1)  # (B, V)
    if top_k is not None or top_p is not None:
        ids = logits.argsort(dim=-1, descending=True, stable=True)  # (B, V), the likeliest first
        ranked = probs.gather(1, ids)
        ranked[:, top_k or ids.size(1) :] = 0
        if top_p is not None and top_p < 1:  # until the likelier ones reach it
            ranked[:, 1:] *= ranked.cumsum(dim=-1)[:, :-1] < top_p * ranked.sum(dim=-1, keepdim=True)
        probs = probs.scatter(1, ids, ranked)
    line = probs.cumsum(dim=-1)  # (B, V): laid end to end, the probabilities make a line
    return torch.searchsorted(line, u[:, None] * line[:, -1:], right=True)[:, 0]  # whose part u of it meets


def quick(module: nn.Module) -> Any:
    """A copy for generation with the same tensors: parts are plain attributes, called past empty hooks."""
    twin, parts = copy.copy(module), {name: quick(part) for name, part in module._modules.items()}
    calls = {n: p.forward for n, p in parts.items() if not (p._forward_pre_hooks or p._forward_hooks)}
    simple = type(module) in (TransformerBlock, MultiHeadAttention, FeedForward)  # they only call their parts
    vars(twin).update(parts | twin._parameters | (calls if simple else {}), _modules=parts)  # found at once
    return twin


class GPT(nn.Module):
    """The model: embeddings, blocks, a final norm and a linear layer to the vocabulary."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, V, C = config, config.vocab_size, config.n_embd
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)  # filled below
        self.register_buffer("positions", sinusoidal_encoding(config.context_length, C), persistent=False)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(C)
        self.lm_head = nn.Linear(C, V, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2 and not p.is_meta:  # as GPT-2: smaller where the result is added to x
                adds = name.endswith(("output.weight", "contract.weight"))
                std = 0.02 / math.sqrt(2 * config.n_layer) if adds else 0.02
                nn.init.normal_(p, std=1.0 if p is self.token_embedding.weight else std)  # like sinusoids

    def hidden(self, ids: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """The vectors, `(B, T, C)`, of characters, `(B, T)`: a text, or one more after those in caches."""
        start, T = caches[0].length if caches else 0, ids.size(1)
        if start + T > self.config.context_length:
            raise ValueError(f"{start + T} characters do not fit the context of {self.config.context_length}")
        x = self.token_embedding(ids) + self.positions[start : start + T]  # what it is and where it stands
        x = torch.dropout(x, self.config.dropout, self.training)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)  # (B, T, C)
        return self.final_norm(x)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The logits, scores before the softmax, `(B, T, V)`, of what follows ids, `(B, T)`; and the loss."""
        logits = self.lm_head(self.hidden(ids))  # (B, T, V)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # nats
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
        """Continues texts, ids `(B, T)`, T at least 1: yields new ids, `(B,)`, as they are drawn by `sample`.

        When the context is full, its newer half is read again, at new positions, and the older forgotten: a
        character's cost does not grow. The generator seeds each row's noise: no row depends on another.
        """
        context_length = self.config.context_length
        seeds = torch.randint(2**62, (ids.size(0),), generator=generator).tolist()
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        caches = [KVCache(self.config, ids.size(0), ids.device) for _ in self.blocks]
        window = list(ids[:, -context_length:].unbind(dim=1))  # what the model sees, T x (B,)
        model = quick(self)
        for step in range(max_new_tokens):
            unread = torch.stack(window[caches[0].length :], dim=1)  # (B, T): the prompt, then one by one
            logits = model.lm_head(model.hidden(unread, caches)[:, -1])  # (B, V)
            if step % 256 == 0:
                noise = torch.stack([torch.rand(256, generator=stream) for stream in streams]).to(ids.device)
            window.append(sample(logits, noise[:, step % 256], temperature, top_k, top_p))  # (B,)
            yield window[-1]
            if len(window) > context_length:
                window = window[-((context_length + 1) // 2) :]
                for cache in caches:
                    cache.length = 0


def save_model(path: Path, model: GPT, tokenizer: CharTokenizer, **facts: Any) -> None:
    """Writes all that generation needs, and facts such as the step, whole or not at all. Raises OSError."""
    others = {"config": asdict(model.config), "vocabulary": tokenizer.characters, "facts": facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY) if os.name == "posix" else None  # Windows opens no folders
    beside = path.with_name(path.name + ".part")  # to be flushed and moved into place
    try:
        if folder is not None:
            import fcntl

            fcntl.flock(folder, fcntl.LOCK_EX)  # of two runs, one writes after the other
        with open(beside, "wb") as file:
            torch.save({"weights": model.state_dict(), **others}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        if folder is not None:
            os.fsync(folder)
    except (OSError, RuntimeError) as error:  # torch's writer hides the first in the second
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError):
            raise OSError(reason.errno, reason.strerror, str(path)) from None
        raise
    finally:
        beside.unlink(missing_ok=True)
        if folder is not None:
            os.close(folder)


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[GPT, CharTokenizer, dict[str, Any]]:
    """Reads what `save_model` wrote: the model, ready to generate, its tokenizer and the facts.

    Runs no code of the file, takes little more memory than its size. OSError, or ValueError if damaged.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:  # torch does not look at the checksums
                if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                    raise ValueError("it unpacks to more than its size")
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
            config, tokenizer = GPTConfig(**content["config"]), CharTokenizer(content["vocabulary"])
            weights, facts = dict(content["weights"]), dict(content["facts"])
            fit = tokenizer.vocab_size == config.vocab_size and len(weights) == 12 * config.n_layer + 4
            if not fit or 12 * config.n_embd**2 > path.stat().st_size:  # 12 tensors, one 3 C x C of 4 bytes
                raise ValueError("its parts do not fit each other")
            with torch.device("meta"):  # shapes without memory: the file's tensors become the weights
                model = GPT(config)
            model.load_state_dict(weights, assign=True)
            for p in weights.values():
                if p.dtype != torch.float32 or not p.is_contiguous() or not p.isfinite().all():
                    raise ValueError("its weights are not finite, plain 32-bit numbers")
        except Exception as error:  # damage makes the readers raise almost anything
            raise ValueError(f"{path} is damaged or no model: {str(error)[:100]!r}") from error
    return model.to(device).eval(), tokenizer, facts
