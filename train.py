"""Trains the model on a text, and shows how it learns.

    python train.py                          train, on a GPU if there is one
    python train.py --resume                 continue a run that was interrupted
    torchrun --nproc-per-node 4 train.py     train with four processes that share each batch

Each field of `Settings` is also a flag: `batch_size` is `--batch-size`. Results go to standard
output, everything else to standard error.

To see how the model learns, read model.py first, which defines the sizes B, T, C and V, and then
this file down to `make_optimizers`. What follows measures, reports, saves and starts the run.
"""

import argparse
import hashlib
import importlib.util
import io
import math
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

# Threads of GNU's OpenMP wait for each other in a busy loop. Let them sleep after a short while:
# otherwise, on a busy machine, a step takes more than ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model import (
    GPT,
    MODEL_PATH,
    ROOT,
    CharTokenizer,
    GPTConfig,
    InputError,
    find_device,
    load_content,
    load_model,
    read_text,
    save_model,
    use_utf8,
    write_file,
)

BOOKS = ROOT / "data/scifi.txt"
SAMPLE = ROOT / "data/sample.txt"

Row = dict[str, float]  # an entry of the log: a step, and the losses of its evaluation

# ---- Settings --------------------------------------------------------------------------


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Makes a field of `Settings`.

    `limits` may hold a `minimum`, a `maximum` or `choices`, and `fixed=True` for a value that a
    resumed run must keep.
    """
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class Settings:
    """All that a run depends on."""

    # Files
    data: Path = setting(BOOKS if BOOKS.exists() else SAMPLE, "the text to learn from, in UTF-8")
    model: Path = setting(MODEL_PATH, "the file for the best model, NAME.pth")
    resume: bool = setting(False, "continue a run, with its settings")

    # The amount of work
    steps: int = setting(750, "steps of the optimizer", minimum=1)
    batch_size: int = setting(16, "windows of text in each step", minimum=1, fixed=True)
    accumulate: int = setting(1, "micro-batches per step (gradient accumulation)", minimum=1)

    # The model. A larger one learns more from each character, but reads fewer in the same time.
    context_length: int = setting(
        GPTConfig.context_length, "characters in a window", minimum=1, fixed=True
    )
    n_layer: int = setting(GPTConfig.n_layer, "blocks", minimum=1, fixed=True)
    n_head: int = setting(GPTConfig.n_head, "attention heads in a block", minimum=1, fixed=True)
    n_embd: int = setting(GPTConfig.n_embd, "channels", minimum=1, fixed=True)
    dropout: float = setting(0.0, "share of activations dropped", minimum=0, maximum=0.99)

    # The optimizer of the blocks' matrices. AdamW always trains everything else.
    optimizer: str = setting(
        "muon", "for the blocks' matrices", choices=("muon", "adamw"), fixed=True
    )
    learning_rate: float = setting(0.02, "the peak learning rate; for adamw try 0.007", minimum=0)
    warmup_steps: int = setting(20, "steps in which the learning rate rises", minimum=0)
    weight_decay: float = setting(0.4, "how strongly the matrices are pulled to zero", minimum=0)
    # The norm falls from 1.3 to about 0.5 in 100 steps: then only an unusual batch is clipped.
    grad_clip: float = setting(1.0, "larger gradients are scaled down to this norm", minimum=1e-9)

    eval_interval: int = setting(100, "steps between evaluations and checkpoints", minimum=1)
    val_fraction: float = setting(0.1, "share of text held out", minimum=0, maximum=1, fixed=True)

    # The machine
    seed: int = setting(1, "makes a run repeatable", fixed=True)
    device: str = setting("auto", "cpu, cuda or mps; auto is a GPU if there is one")
    precision: str = setting(
        "auto",
        "number format of matrix products; auto is bf16 where that is fast",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = setting(False, "compile the model first: faster on a GPU, after a minute")
    tracker: str = setting(
        "auto",
        "what draws the charts; auto is aim if it is installed, else tensorboard",
        choices=("auto", "aim", "tensorboard", "none"),
    )

    @property
    def checkpoint(self) -> Path:
        return self.model.with_suffix(".train.pth")

    @property
    def picture(self) -> Path:
        return self.model.with_suffix(".png")

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings for a file or a tracker, which cannot hold a Path."""
        return {**vars(self), "data": str(self.data.resolve()), "model": str(self.model)}


# ---- The loop --------------------------------------------------------------------------


def train(trainer: "Trainer", report: "Report | None") -> None:
    """Trains until the last step.

    Process 0 alone has a report, evaluates and saves. The others wait for it in their next step.
    """
    last_step = trainer.settings.steps
    disable = None if report else True  # None: tqdm shows the bar on a terminal only
    with tqdm(total=last_step, initial=trainer.step, unit="step", disable=disable) as bar:
        if report and trainer.step == 0:
            # The untrained model is not saved: it would replace one that is trained.
            report.add(trainer.evaluate())

        while trainer.step < last_step:
            loss = trainer.train_step()
            bar.update()
            if trainer.step % 10 == 0:  # not always: reading the loss waits for a GPU
                bar.set_postfix(loss=f"{loss.item():.2f}")
            is_due = trainer.step % trainer.settings.eval_interval == 0
            if report and (is_due or trainer.step == last_step):
                row = trainer.evaluate()
                trainer.log.append(row)
                save(trainer)
                report.add(row)


# ---- Text ------------------------------------------------------------------------------


def split_text(ids: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Splits a text into the part to learn from and the part to validate on, its end.

    The validation part is one piece. Windows drawn from all over the text would stand next to
    what the model has learned from, and share its names and phrases: their loss would be too low.

    Raises InputError if a part has not even one window.
    """
    val_length = round(len(ids) * settings.val_fraction)
    window = settings.context_length + 1  # with the character that follows
    if min(val_length, len(ids) - val_length) < window:
        raise InputError(
            f"{settings.data} is too short: it has {len(ids)} characters, and {val_length} of them "
            f"are held out; each part needs at least {window}"
        )
    return ids[:-val_length], ids[-val_length:]


EVAL_WINDOWS = 160  # of each part; with 400, evaluation took a tenth of the run


def evaluation_windows(ids: Tensor, context_length: int, count: int) -> Tensor:
    """Returns up to `count` windows, `(N, T + 1)`, evenly spread over the text.

    Each has one character more than the context, the target of the last one. No character is
    predicted twice.
    """
    stride = max(context_length, (len(ids) - context_length - 1) // count)
    # `unfold` returns the windows that start every `stride` characters, without a copy.
    return ids.unfold(0, context_length + 1, stride)[:count]


# ---- Trainer ---------------------------------------------------------------------------


class Trainer:
    """Holds the model, its optimizers and the text, and does one step of training at a time.

    With torchrun each of `world` processes has one; `rank` is the number of this process. Raises
    InputError if the text, the device or the settings cannot be used.
    """

    def __init__(self, settings: Settings, rank: int = 0, world: int = 1) -> None:
        self.settings = settings
        self.rank = rank
        self.world = world

        # The machine
        self.device = find_device(settings.device)
        self.precision = choose_precision(settings, self.device)
        is_bf16 = self.precision == "bf16"
        # `with self.autocast:` computes matrix products in bfloat16, if that is the precision.
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16)
        # The windows that this process computes at once
        micro_batches = world * settings.accumulate  # in a step, of all processes
        if settings.batch_size % micro_batches > 0:
            raise InputError(
                f"--batch-size {settings.batch_size} must be a multiple of {micro_batches}: "
                "processes x --accumulate"
            )
        self.micro_batch_size = settings.batch_size // micro_batches

        # The text
        text = read_text(settings.data)
        self.text_digest = hashlib.sha256(text.encode()).hexdigest()
        self.tokenizer = CharTokenizer.from_text(text)
        self.train_ids, self.val_ids = split_text(self.tokenizer.encode(text), settings)
        self.window_starts = self.draw_windows()

        # The model
        torch.manual_seed(self.make_seed())  # all processes begin with the same weights
        config = GPTConfig(
            vocab_size=self.tokenizer.vocab_size,
            context_length=settings.context_length,
            n_layer=settings.n_layer,
            n_head=settings.n_head,
            n_embd=settings.n_embd,
            dropout=settings.dropout,
        )
        self.model = GPT(config).to(self.device)
        self.compiled_model = torch.compile(self.model) if settings.compile else self.model
        self.optimizers = make_optimizers(self.model, settings)

        # The state of the run
        self.step = 0  # steps done
        self.log: list[Row] = []  # a row for each evaluation after a step

    def make_seed(self, *numbers: int) -> int:
        """Derives a seed from the run's seed and other numbers, such as the step.

        Every draw depends only on the seed, the epoch or the step, and the process: a resumed run
        draws what the uninterrupted one would have drawn.
        """
        numbers = (self.settings.seed, *numbers)
        digest = hashlib.sha256(repr(numbers).encode()).hexdigest()
        return int(digest[:8], 16)

    def draw_windows(self) -> Tensor:
        """Returns the positions in the text where the windows of each step start, `(steps, B)`.

        Each epoch cuts the training part into windows and reads each of them once, in random order.
        On the sample, the validation loss is 0.018 lower than with windows from random places.
        """
        T = self.settings.context_length
        inputs = len(self.train_ids) - 1  # the last character is only a target
        # One window fewer than fits, so that the first can start at a random offset.
        count = max(1, inputs // T - 1)  # windows in an epoch
        spare = inputs - count * T  # characters

        steps, B = self.settings.steps, self.settings.batch_size
        starts = []
        for epoch in range(math.ceil(steps * B / count)):
            generator = torch.Generator().manual_seed(self.make_seed(epoch))
            offset = torch.randint(spare + 1, (1,), generator=generator)
            starts.append(offset + T * torch.randperm(count, generator=generator))
        starts_of_run = torch.cat(starts)[: steps * B]  # the last epoch may be cut short
        return starts_of_run.view(steps, B)

    def get_batch(self) -> Tensor:
        """Returns the windows of this step that this process computes, `(B / world, T + 1)`."""
        starts = self.window_starts[self.step]  # (B,)
        own_starts = starts.chunk(self.world)[self.rank]  # the share of this process
        # windows[i] is the window that starts at character i.
        windows = self.train_ids.unfold(0, self.settings.context_length + 1, 1)  # (N, T + 1)
        return windows[own_starts].to(self.device)

    def train_step(self) -> Tensor:
        """Does one step. Returns this process's loss as a tensor: reading it waits for a GPU."""
        self.model.train()
        batch = self.get_batch()
        torch.manual_seed(self.make_seed(self.step, self.rank))  # for dropout

        # Compute the gradients. `backward` adds those of each micro-batch to `p.grad`.
        total_loss = torch.zeros((), device=self.device)
        for micro_batch in batch.split(self.micro_batch_size):  # (b, T + 1)
            # The target of each character is the one after it: T predictions a window.
            inputs, targets = micro_batch[:, :-1], micro_batch[:, 1:]
            with self.autocast:
                _, loss = self.compiled_model(inputs, targets)
            loss = loss / self.settings.accumulate  # so that the sum is the mean of the batch
            loss.backward()
            total_loss += loss.detach()

        # Give all processes the mean of their gradients, so that their weights stay equal.
        if self.world > 1:
            for p in self.model.parameters():
                dist.all_reduce(p.grad)  # the sum
                p.grad /= self.world

        # Reduce a gradient that is unusually large (Pascanu et al., 2013, section 3.2,
        # https://arxiv.org/abs/1211.5063). Both optimizers limit the size of a step, but such a
        # gradient would dominate their averages for many steps.
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)

        # Move the weights.
        learning_rate = self.get_learning_rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            with self.autocast:  # Muon computes matrix products too
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total_loss

    def get_learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step, counting from 0.

        It begins low: Muon's update is equally large however noisy its average of gradients is,
        and the first averages are the noisiest. It falls linearly to nearly zero over the run: with
        ever smaller steps, the noise of the batches averages out.
        """
        settings = self.settings
        warmup = min(1, (step + 1) / (settings.warmup_steps + 1))
        return settings.learning_rate * warmup * (1 - step / settings.steps)

    def evaluate(self) -> Row:
        """Returns the mean losses, in nats, of fixed windows of both parts.

        Raises FloatingPointError if training has diverged.
        """
        row: Row = {"step": self.step}
        for part, ids in (("train", self.train_ids), ("val", self.val_ids)):
            row[f"{part}_loss"] = self.losses_by_position(ids, EVAL_WINDOWS).mean().item()
        if not math.isfinite(row["val_loss"]):
            raise FloatingPointError(f"loss diverged at step {self.step}: lower --learning-rate")
        return row

    @torch.no_grad()
    def losses_by_position(self, ids: Tensor, count: int) -> Tensor:
        """Returns the mean loss of the predictions at each position of `count` windows, `(T,)`."""
        windows = evaluation_windows(ids, self.settings.context_length, count)
        self.model.eval()
        losses = []  # (b, T) each
        for micro_batch in windows.to(self.device).split(self.micro_batch_size):  # (b, T + 1)
            inputs, targets = micro_batch[:, :-1], micro_batch[:, 1:]
            with self.autocast:  # not compiled_model, which would be compiled for each shape
                logits, _ = self.model(inputs)  # (b, T, V)
                scores = logits.mT  # (b, V, T): cross_entropy wants the classes second
                losses.append(F.cross_entropy(scores, targets, reduction="none"))
        return torch.cat(losses).mean(dim=0)


# ---- Optimizers ------------------------------------------------------------------------


def orthogonalize(matrices: Tensor) -> Tensor:
    """Brings the singular values of each matrix, `(N, rows, columns)`, close to 1.

    A singular value is the factor by which a matrix stretches one direction. If the matrix is
    U S V^T, the result is close to U V^T: the same directions, all about equally strong.

    The exact decomposition would be slow. Each of these five Newton-Schulz steps computes a
    polynomial of the matrix, a x + b x^3 + c x^5, where x^3 stands for x x^T x. It leaves U and V
    as they are, and turns each singular value s into a s + b s^3 + c s^5. With Jordan's
    coefficients (see `Muon`), 0.1 becomes 0.34, then 0.99, 0.71, 1.11 and 0.71. All values of at
    least 1/500 of the matrix's norm end between 0.68 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)  # all singular values at most 1
    x = x.contiguous()  # faster
    # The trainer calls this within its autocast: the products are in bfloat16 if the model's are.
    for _ in range(5):
        gram = x @ x.mT  # (N, rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b gram + c gram^2) x
    return x


class Muon(torch.optim.Optimizer):
    """Moves a matrix equally far in all directions: for the matrices inside a network.

    Momentum is an average of the past gradients, in which their noise cancels. It is dominated by
    a few directions, so that a step along it hardly moves the matrix in the others.
    Orthogonalizing it makes all directions equally strong.

    From Jordan, 2024, https://kellerjordan.github.io/posts/muon, with the scale of Liu et al.,
    2025, section 2.2, https://arxiv.org/abs/2502.16982, and columns of equal norm, after Li et
    al., 2025 (NorMuon), https://arxiv.org/abs/2510.05491. `torch.optim.Muon` takes 40 times as
    long on a CPU that does not compute in bfloat16.

    The parameters of a group have one shape, and are computed side by side. Each holds `stacked`
    matrices, one above the other: 3 for queries, keys and values. Each of these is orthogonalized
    alone.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        # `Trainer.train_step` sets the learning rate, lr, before each step.
        defaults = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.0, "stacked": 1}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, group)

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        # The direction is the average of the gradients, with the newest one counted once more
        # (Nesterov's momentum).
        momentum = group["momentum"]
        directions = []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = p.grad.clone()  # so far, one gradient
            average = self.state[p]["momentum_buffer"]
            average.lerp_(p.grad, 1 - momentum)  # momentum * average + (1 - momentum) * gradient
            directions.append(p.grad.lerp(average, momentum))

        # Take the matrices of all parameters side by side, and transpose tall ones, so that all are
        # wide or square: x x^T is then the smaller product.
        rows, columns = params[0].shape
        x = torch.stack(directions)  # (params, rows, columns)
        x = x.view(-1, rows // group["stacked"], columns)  # (params x stacked, ...)
        is_tall = x.size(1) > x.size(2)
        if is_tall:
            x = x.mT

        x = orthogonalize(x)

        # Give every column norm 1, so that no channel moves faster than another. A column belongs
        # to an input channel, and in the tall matrix of feed-forward, now transposed, to an output
        # channel. (NorMuon does this for the rows of each matrix, with running averages.)
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)

        # An element of such a column is about 1 / sqrt(rows). Scale it to 0.2, about the size of
        # AdamW's updates (Liu et al.): one learning rate then suits matrices of all shapes.
        x = x * (0.2 * math.sqrt(x.size(1)))

        if is_tall:
            x = x.mT
        # Weight decay makes each weight a little smaller. Then the weights move.
        for p, change in zip(params, x.reshape(-1, rows, columns), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(change, alpha=group["lr"])


def make_optimizers(model: GPT, settings: Settings) -> list[torch.optim.Optimizer]:
    """Makes Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all.

    AdamW averages the gradients of each weight, and divides the average by the root mean square
    of that weight's past gradients (Adam: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980).
    The W stands for weight decay that is applied to the weights directly, outside this division
    (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101).

    The embedding and the output layer are matrices too, but each of their rows belongs to one
    character, and in practice AdamW is better for them (Jordan).

    Weight decay acts on the matrices of the blocks alone. Norms and biases are too few to need it.
    The vector of a rare character would shrink at every step, and learn only in the few where the
    character occurs.
    """
    matrices: dict[str, list[Tensor]] = {}  # those of all blocks, by name
    others = []
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and p.dim() == 2:
            name_in_block = name.split(".", 2)[2]  # such as attention.qkv.weight
            matrices.setdefault(name_in_block, []).append(p)
        else:
            others.append(p)

    groups = []
    for name, params in matrices.items():
        stacked = 3 if name == "attention.qkv.weight" else 1  # queries, keys and values
        group = {"params": params, "stacked": stacked, "weight_decay": settings.weight_decay}
        groups.append(group)

    betas = (0.8, 0.99)  # shorter memories than the usual 0.9 and 0.999: a run has few steps
    if settings.optimizer == "muon":
        for_matrices = Muon(groups)
    else:
        for_matrices = torch.optim.AdamW(groups, betas=betas, fused=True)  # ignores `stacked`
    for_others = torch.optim.AdamW(others, betas=betas, weight_decay=0.0, fused=True)
    return [for_matrices, for_others]


# That is how the model learns. The rest is not needed to understand it.

# ---- What counting can do, and what the model has learned ------------------------------

NGRAMS = ("uniform", "unigram", "bigram", "trigram", "4-gram", "5-gram")
MAX_COUNTED = 1_000_000  # characters of the training part; more would take too long


def ngram_losses(train_text: str, windows: list[str], vocab_size: int) -> dict[str, float]:
    """Returns the losses, in nats, of n-gram models, which only count: the losses to beat.

    Every character of the windows but the first is predicted from nothing ("uniform"); from how
    often it occurs in the training text ("unigram"); from how often it follows the character
    before it there ("bigram"); and so on, up to the four before it.

    Where a history is rare, Witten-Bell smoothing relies more on the shorter history
    (Witten and Bell, 1991; Chen and Goodman, 1998, section 2.5). Let n(h c) be how often the
    character c follows the history h, n(h) how often any character does, and k(h) the number of
    different characters that do:

        p(c | h) = (n(h c) + k(h) p(c | h without its first character)) / (n(h) + k(h))

    If "th" is followed 10 times, by 3 different characters and 8 times by "e", p(e | th) is
    (8 + 3 p(e | h)) / (10 + 3).
    """
    counts = Counter()  # n(h c), for histories of all lengths
    for n in range(1, len(NGRAMS)):
        counts.update(train_text[i : i + n] for i in range(len(train_text) - n + 1))
    n_h = Counter()
    k_h = Counter()
    for ngram, count in counts.items():
        h = ngram[:-1]
        n_h[h] += count
        k_h[h] += 1

    def p(ngram: str) -> float:
        """Returns p(c | h), where `ngram` is h and then c.

        For an empty `ngram`, this is the probability of any character: all are equally likely.
        """
        if not ngram:
            return 1 / vocab_size
        h = ngram[:-1]
        shorter = p(ngram[1:])
        if n_h[h] == 0:  # a history that never occurs in the training text
            return shorter
        return (counts[ngram] + k_h[h] * shorter) / (n_h[h] + k_h[h])

    losses = {}
    for n, name in enumerate(NGRAMS):
        logs = []
        for window in windows:
            for end in range(2, len(window) + 1):
                ngram = window[max(0, end - n) : end]  # a character, and n - 1 before it
                logs.append(math.log(p(ngram)))
        losses[name] = -sum(logs) / len(logs)
    return losses


def print_losses_to_beat(trainer: Trainer) -> dict[str, float]:
    """Prints and returns what counting achieves on the windows of the validation loss."""
    tokenizer = trainer.tokenizer
    train_text = tokenizer.decode(trainer.train_ids[-MAX_COUNTED:])
    windows = evaluation_windows(trainer.val_ids, trainer.settings.context_length, EVAL_WINDOWS)
    texts = [tokenizer.decode(window) for window in windows]
    losses = ngram_losses(train_text, texts, tokenizer.vocab_size)
    figures = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    print(f"to beat: {figures} (counted in {len(train_text):,} characters)")
    return losses


CONTEXT_WINDOWS = 1000  # for the losses by context


def loss_by_context(by_position: Tensor) -> dict[int, float]:
    """Returns the mean loss by the length of the context, {1: ..., 2: ..., 4: ...}.

    Entry k covers the characters with k to 2 k - 1 others before them in their window. It shows
    what a longer context is worth.
    """
    losses = {}
    k = 1
    while k < max(2, len(by_position)):  # the last position alone is too small a sample
        losses[k] = by_position[k - 1 : 2 * k - 1].mean().item()
        k *= 2
    return losses


def write_passage(trainer: Trainer) -> str:
    """Returns 100 characters: the first of the validation part, then 99 by the model."""
    first = trainer.val_ids[None, :1].to(trainer.device)  # (1, 1)
    generator = torch.Generator().manual_seed(1)
    trainer.model.eval()
    new_ids = list(trainer.model.generate(first, 99, temperature=0.8, generator=generator))
    return trainer.tokenizer.decode(torch.cat([first[0], *new_ids]))


PICTURE_TITLE = "Losses of train.py"  # in the file, to tell it from other pictures


def draw_losses(trainer: Trainer, losses_to_beat: dict[str, float]) -> None:
    """Draws both losses by step, and what counting achieves, into a file beside the model."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per character)")
    steps = [row["step"] for row in trainer.log]
    for part in ("train", "val"):
        losses = [row[f"{part}_loss"] for row in trainer.log]
        axes.plot(steps, losses, ".-", label=f"{part} loss")
    for name in NGRAMS[2:]:  # the others are far above
        loss = losses_to_beat[name]
        axes.axhline(loss, color="gray", linestyle="--")
        axes.text(steps[-1], loss, name, ha="right", va="bottom")
    axes.legend(loc="lower left")

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Title": PICTURE_TITLE})
    write_file(trainer.settings.picture, buffer.getvalue())


# ---- Reports ---------------------------------------------------------------------------

# The commands that show the charts
COMMANDS = {"aim": "aim up", "tensorboard": "tensorboard --logdir runs"}


class Report:
    """Prints each evaluation, draws the losses beside the model, and sends them to a tracker.

    A picture that cannot be written, or a tracker that fails, does not end training.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.tracker = None
        self.tracker_name = choose_tracker(trainer.settings.tracker)

        characters = len(trainer.train_ids) + len(trainer.val_ids)
        parameters = trainer.model.count_parameters()
        charts = COMMANDS.get(self.tracker_name, "none")
        print_notice(
            f"{trainer.settings.data}: {characters:,} characters; {parameters:,} parameters; "
            f"{trainer.device} in {trainer.precision}; charts: {charts}; "
            f"starting at step {trainer.step} of {trainer.settings.steps}"
        )
        self.losses_to_beat = print_losses_to_beat(trainer)

    def add(self, row: Row) -> None:
        # First the picture: a Ctrl-C while matplotlib draws can be lost, and a user who reads the
        # printed line may well press it.
        if self.trainer.log:
            try:
                draw_losses(self.trainer, self.losses_to_beat)
            except InputError as error:  # for example, another program has the file open
                print_notice(f"{error}; training goes on")
        bits = row["val_loss"] / math.log(2)
        tqdm.write(
            f"step {row['step']}: train loss {row['train_loss']:.4f}, "
            f"val loss {row['val_loss']:.4f} ({bits:.2f} bits/char)"
        )
        passage = write_passage(self.trainer)
        print_notice(f"    {' '.join(passage.split())}")
        self.track(row, passage)

    def track(self, row: Row, passage: str) -> None:
        """Sends an evaluation, and if it is the first of a resumed run, those before it too."""
        if self.tracker_name == "none":
            return
        try:
            rows = [row]
            if self.tracker is None:
                self.tracker = make_tracker(self.tracker_name, self.trainer.settings)
                rows = self.trainer.log or [row]
            for unsent in rows:
                self.tracker.add_scalar("train_loss", unsent["train_loss"], unsent["step"])
                self.tracker.add_scalar("val_loss", unsent["val_loss"], unsent["step"])
            self.tracker.add_text("passage", passage, row["step"])
            if row["step"] == self.trainer.settings.steps:
                self.tracker.close()
        except (Exception, SystemExit) as error:  # a tracker can raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print_notice(f"{self.tracker_name} failed ({reason}); training goes on without charts")
            self.tracker_name = "none"

    def print_end(self) -> None:
        """Says what the best model has learned, and what comes next."""
        trainer = self.trainer
        path = trainer.settings.model
        if not path.exists():  # it was moved before the run was resumed
            return
        # Training is over: measure the best model, which need not be the last.
        trainer.model, _, row = load_model(path, trainer.device)
        losses = loss_by_context(trainer.losses_by_position(trainer.val_ids, CONTEXT_WINDOWS))
        figures = ", ".join(f"{k}: {loss:.2f}" for k, loss in losses.items())
        print(f"by context: {figures}")

        flag = "" if path == MODEL_PATH else f' --model "{path}"'
        print_notice(
            f"{path} is the model of step {row['step']}, with a validation loss of "
            f"{row['val_loss']:.4f}\n"
            f"next: python inference.py{flag}, or python show_params.py{flag}"
        )


def print_notice(message: str) -> None:
    tqdm.write(message, file=sys.stderr)  # above the progress bar, if there is one


def choose_tracker(name: str) -> str:
    """Returns the name of the tracker; for "auto" the first that is installed, or "none"."""
    if name != "auto":
        return name
    installed = [tracker for tracker in COMMANDS if importlib.util.find_spec(tracker)]
    return installed[0] if installed else "none"


def make_tracker(name: str, settings: Settings) -> Any:
    """Returns an AimWriter or a SummaryWriter. Their files are in `.aim` and `runs`."""
    run_name = " ".join([f"{datetime.now():%Y-%m-%d %H:%M:%S}", *sys.argv[1:]])
    if name == "aim":
        return AimWriter(run_name, settings)

    from torch.utils.tensorboard import SummaryWriter

    folder = re.sub(r"[^\w=.-]+", "_", run_name)[:200]
    return SummaryWriter(ROOT / "runs" / folder, flush_secs=1)  # a stopped run does not close it


class AimWriter:
    """Gives aim, https://aimstack.io, the methods of TensorBoard's SummaryWriter."""

    def __init__(self, run_name: str, settings: Settings) -> None:
        import aim

        self.make_text = aim.Text
        self.run = aim.Run(repo=ROOT, system_tracking_interval=None, capture_terminal_logs=False)
        self.run.name = run_name
        self.run["hparams"] = settings.as_dict()

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.run.track(value, name, step=step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self.run.track(self.make_text(text), name, step=step)

    def close(self) -> None:
        self.run.close()


# ---- Saving and resuming ---------------------------------------------------------------


def check_outputs(settings: Settings) -> None:
    """Raises InputError if a file cannot be written, or is not one that train.py wrote."""
    # Write a file, so that a read-only folder or too long a name is an error now.
    probe = settings.checkpoint.with_suffix(f".{os.getpid()}.tmp")
    write_file(probe, b"")
    probe.unlink()

    for path in (settings.model, settings.checkpoint):
        if path.exists():
            load_content(path)  # raises InputError if it is another file
    picture = settings.picture
    if picture.is_file() and PICTURE_TITLE.encode() not in picture.read_bytes():
        raise InputError(f"{picture} was not written by train.py: move it, or change --model")


def save(trainer: Trainer) -> None:
    """Saves the model if its validation loss is the lowest so far, and what `resume` needs."""
    settings = trainer.settings
    if len(trainer.log) == 1:
        # If a new run is killed between the two files, --resume must not find the checkpoint of an
        # earlier run beside the model of this one.
        settings.checkpoint.unlink(missing_ok=True)

    row = trainer.log[-1]
    lowest = min(earlier["val_loss"] for earlier in trainer.log)
    if row["val_loss"] == lowest:
        save_model(settings.model, trainer.model, trainer.tokenizer, **row)
    save_model(
        settings.checkpoint,
        trainer.model,
        trainer.tokenizer,
        text_digest=trainer.text_digest,
        settings=settings.as_dict(),
        step=trainer.step,
        log=trainer.log,
        optimizers=[optimizer.state_dict()["state"] for optimizer in trainer.optimizers],
    )


def resume(trainer: Trainer) -> None:
    """Continues from the checkpoint. Raises InputError if its run was on another text."""
    path = trainer.settings.checkpoint
    model, _, saved = load_model(path)
    if saved["text_digest"] != trainer.text_digest:
        raise InputError(f"{path} comes from a run on another text: leave out --resume")

    trainer.model.load_state_dict(model.state_dict())
    for optimizer, state in zip(trainer.optimizers, saved["optimizers"], strict=True):
        # The rest, such as the weight decay, is from the current settings.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    trainer.step = saved["step"]
    trainer.log = saved["log"]


# ---- The command line and the machine --------------------------------------------------


def main() -> None:
    use_utf8()
    try:
        run(parse_arguments())
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports an end by Ctrl-C
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory: raise --accumulate, or use a smaller batch or model")
    except (InputError, FloatingPointError, BrokenPipeError) as error:
        sys.exit(f"error: {error}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="python train.py [--FLAG VALUE ...]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in fields(Settings):
        flag = flag_name(f.name)
        help = f.metadata["help"]
        choices = f.metadata.get("choices")
        if f.type is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=f.default, help=help)
        else:
            parser.add_argument(flag, type=f.type, default=f.default, choices=choices, help=help)
    return parser


def parse_arguments() -> Settings:
    """Returns the settings. With --resume, those of the run are the defaults."""
    parser = make_parser()
    arguments = parser.parse_args()
    file_name = arguments.model.name
    if not file_name.endswith(".pth") or file_name.endswith(".train.pth"):
        parser.error(f"--model {arguments.model} must end with .pth, and not with .train.pth")

    saved = {}
    if arguments.resume:
        checkpoint = Settings(model=arguments.model).checkpoint
        saved = load_content(checkpoint)["metadata"].get("settings", {})
        if saved.keys() != vars(arguments).keys():
            raise InputError(f"{checkpoint} was made by another version of train.py")
        saved["model"] = arguments.model
        parser.set_defaults(**saved)  # for the flags that are not given now
        arguments = parser.parse_args()

    for f in fields(Settings):
        flag = flag_name(f.name)
        value = getattr(arguments, f.name)
        minimum = f.metadata.get("minimum", -math.inf)
        maximum = f.metadata.get("maximum", math.inf)
        if f.type in (int, float) and not minimum <= value <= maximum:
            upper_limit = f" and at most {maximum:g}" if maximum < math.inf else ""
            parser.error(f"{flag} must be at least {minimum:g}{upper_limit}")
        if f.metadata.get("fixed") and value != saved.get(f.name, value):
            parser.error(f"{flag} must stay {saved[f.name]} in a resumed run")
    return Settings(**vars(arguments))


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def run(settings: Settings) -> None:
    rank, world = join_processes(settings)
    if rank == 0:
        check_outputs(settings)
    trainer = Trainer(settings, rank, world)
    if settings.resume:
        resume(trainer)

    report = Report(trainer) if rank == 0 else None
    try:
        train(trainer, report)
    except KeyboardInterrupt:
        advice = "nothing of this run is saved yet"
        if trainer.log and settings.checkpoint.exists():
            advice = "the same command with --resume continues from the last evaluation"
        if report:
            print_notice(f"stopped; {advice}")
        raise
    if report:
        report.print_end()

    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # a thread of the process group may still run, and could make sys.exit abort


def join_processes(settings: Settings) -> tuple[int, int]:
    """Joins the processes of torchrun. Returns the rank of this one, and their number."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    if settings.device in ("auto", "cuda") and torch.cuda.is_available():
        gpu = int(os.environ["LOCAL_RANK"])  # each process has its own
        if gpu >= torch.cuda.device_count():
            raise InputError("there are fewer GPUs than processes: lower --nproc-per-node")
        torch.cuda.set_device(gpu)
    return dist.get_rank(), dist.get_world_size()


def choose_precision(settings: Settings, device: torch.device) -> str:
    """Returns the precision of matrix products, "fp32" or "bf16".

    Raises InputError for bf16 on mps.
    """
    if settings.precision == "bf16" and device.type == "mps":
        # The causal mask is wrong there: https://github.com/pytorch/pytorch/issues/195910
        raise InputError("--precision bf16 gives wrong results with --device mps: use fp32")
    if settings.precision != "auto":
        return settings.precision

    is_fast = False
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # from torch 2.12 on
        # Where matrices are small, the conversions take longer than the faster products save.
        processor = torch.cpu.get_capabilities()
        is_fast = processor.get("avx512_bf16", False) and settings.n_embd >= 128
    return "bf16" if is_fast else "fp32"


if __name__ == "__main__":
    main()
