"""Trains the model on a text, and shows how it learns.

    python train.py                          train, on a GPU if there is one
    python train.py --resume                 continue a run that was interrupted
    torchrun --nproc-per-node 4 train.py     train with four processes that share each batch

Each field of `Settings` is also a flag: `batch_size` is `--batch-size`. Results go to standard
output, everything else to standard error.
"""

import argparse
import csv
import hashlib
import importlib.util
import io
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

# Threads of GNU's OpenMP spin while they wait for each other. Let them sleep after a short spin:
# otherwise, on a busy machine, a step takes more than ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported

import torch
import torch.distributed as dist
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

# ----------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------


def setting(
    default: Any,
    help: str,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A field of the settings, with its line of help and the values that it accepts."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """All that a run depends on."""

    # Files
    data: Path = setting(BOOKS if BOOKS.exists() else SAMPLE, "the text to learn from, in UTF-8")
    model: Path = setting(MODEL_PATH, "the file for the best model")
    resume: bool = setting(False, "continue from the checkpoint beside the model")

    # The amount of work
    steps: int = setting(750, "steps of the optimizer", minimum=1)
    batch_size: int = setting(16, "windows of text in each step", minimum=1)
    accumulate: int = setting(1, "micro-batches per step (gradient accumulation)", minimum=1)

    # The model. A larger one learns more from each character, but reads fewer in the same time.
    context_length: int = setting(GPTConfig.context_length, "characters in a window", minimum=1)
    n_layer: int = setting(GPTConfig.n_layer, "blocks", minimum=1)
    n_head: int = setting(GPTConfig.n_head, "attention heads in each block", minimum=1)
    n_embd: int = setting(GPTConfig.n_embd, "channels", minimum=1)
    dropout: float = setting(0.0, "share of activations dropped", minimum=0, maximum=0.99)

    # The optimizer of the blocks' matrices. AdamW trains the rest in any case.
    optimizer: str = setting("muon", "for the blocks' matrices", choices=("muon", "adamw"))
    learning_rate: float = setting(0.02, "the peak learning rate; for adamw try 0.007", minimum=0)
    # Muon's update is equally large however noisy its average of gradients is. The first averages
    # are the noisiest, so the rate begins low.
    warmup_steps: int = setting(20, "steps in which the learning rate rises", minimum=0)
    weight_decay: float = setting(0.4, "how strongly the matrices are pulled to zero", minimum=0)
    # The norm falls from 1.3 to about 0.5 in 100 steps: later, only an unusual batch is clipped.
    grad_clip: float = setting(1.0, "larger gradients are scaled down to this norm", minimum=1e-9)

    eval_interval: int = setting(100, "steps between evaluations and checkpoints", minimum=1)
    val_fraction: float = setting(0.1, "share of the text held out", minimum=0.001, maximum=0.999)

    # The machine
    seed: int = setting(1, "makes a run repeatable")
    device: str = setting("auto", "cpu, cuda or mps; auto is a GPU if there is one")
    precision: str = setting(
        "auto",
        "of matrix products; auto is bf16 where that is fast, else fp32",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = setting(False, "compile the model first, worthwhile on a GPU")
    tracker: str = setting(
        "auto",
        "what draws the charts; auto is aim if it is installed, else tensorboard",
        choices=("auto", "aim", "tensorboard", "none"),
    )

    def beside_model(self, ending: str) -> Path:
        """Returns models/model-scifi.csv for models/model-scifi.pth and ".csv"."""
        return self.model.parent / (self.model.name.removesuffix(".pth") + ending)

    def as_text(self) -> dict[str, str]:
        return {name: str(value) for name, value in asdict(self).items()}

    @property
    def checkpoint(self) -> Path:
        """The file that `resume` needs."""
        return self.beside_model(".train.pth")


# ----------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------


def split_text(ids: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Splits a text into the part to learn from and the part to validate on, its end.

    The validation part is one piece. Windows drawn from all over the text would adjoin what the
    model has learned from, and share its names and phrases: their loss would be too low.

    Each part must have a window and the character that follows it; else raises InputError.
    """
    val_length = round(len(ids) * settings.val_fraction)
    window = settings.context_length + 1
    if min(val_length, len(ids) - val_length) < window:
        raise InputError(
            f"{settings.data} is too short: it has {len(ids)} characters, and both the part to "
            f"learn from and the {settings.val_fraction:.1%} held out must have {window}"
        )
    return ids[:-val_length], ids[-val_length:]


EVAL_WINDOWS = 160  # of each part; with 400, evaluation took a tenth of the run


def evaluation_windows(ids: Tensor, context_length: int, count: int) -> Tensor:
    """Returns up to `count` windows, `(N, T + 1)`, evenly spread over the text.

    No character is predicted twice.
    """
    stride = max(context_length, (len(ids) - context_length - 1) // count)
    starts = torch.arange(0, len(ids) - context_length, stride)[:count]
    return windows_at(starts, ids, context_length)


def windows_at(starts: Tensor, ids: Tensor, context_length: int) -> Tensor:
    """Returns the windows that start there, `(N, T + 1)`, with the character after each."""
    return ids[starts[:, None] + torch.arange(context_length + 1)]  # of (N, 1) + (T + 1,)


# ----------------------------------------------------------------------------------------
# Trainer
# ----------------------------------------------------------------------------------------


class Trainer:
    """Holds the model, its optimizers and the text, and does one step of training at a time.

    With torchrun there is one in each process: `rank` is this process's number, `world` how many
    there are. Raises InputError if the text cannot be used, or if settings do not fit together.
    """

    def __init__(self, settings: Settings, rank: int = 0, world: int = 1) -> None:
        self.settings = settings
        self.rank = rank
        self.world = world

        # The machine
        self.device = find_device(settings.device)
        self.precision = choose_precision(settings, self.device)
        # Inside this context, matrix products are computed in bfloat16 if that is the precision.
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
        # The micro-batch: the windows that this process computes at once
        self.micro_batch_size, remainder = divmod(settings.batch_size, world * settings.accumulate)
        if remainder > 0:
            raise InputError(
                f"--batch-size {settings.batch_size} must be a multiple of "
                f"{world} (processes) x {settings.accumulate} (--accumulate)"
            )

        # The text
        text = read_text(settings.data)
        self.text_digest = hashlib.sha256(text.encode()).hexdigest()
        self.tokenizer = CharTokenizer.from_text(text)
        self.train_ids, self.val_ids = split_text(self.tokenizer.encode(text), settings)
        self.window_starts = self.draw_windows()
        T = settings.context_length
        self.eval_windows = {
            "train": evaluation_windows(self.train_ids, T, EVAL_WINDOWS),
            "val": evaluation_windows(self.val_ids, T, EVAL_WINDOWS),
        }

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
        self.saved_step = 0  # that of this run's checkpoint
        self.grad_norm = torch.zeros(())  # of the last step
        self.log: list[dict[str, float]] = []  # a row for each evaluation

    # All randomness depends on the seed, the step and the process alone, so a resumed run draws
    # what the uninterrupted one would have drawn.

    def make_seed(self, *numbers: int) -> int:
        """Derives a 32-bit seed from the run's seed and these numbers."""
        digest = hashlib.sha256(repr((self.settings.seed, *numbers)).encode()).hexdigest()
        return int(digest[:8], 16)

    def draw_windows(self) -> Tensor:
        """Returns where the windows of all steps start, one after another.

        Each epoch cuts the training part into windows and reads each of them once, in random order.
        On the sample, the validation loss is 0.018 lower than with windows from random places.
        """
        # One window fewer than fits, so that the first can start at a random offset.
        T = self.settings.context_length
        count = max(1, (len(self.train_ids) - 1) // T - 1)  # windows in an epoch
        spare = len(self.train_ids) - 1 - count * T  # characters

        epochs = math.ceil(self.settings.steps * self.settings.batch_size / count)
        starts = []
        for epoch in range(epochs):
            generator = torch.Generator().manual_seed(self.make_seed(epoch))
            offset = torch.randint(spare + 1, (1,), generator=generator)
            starts.append(offset + T * torch.randperm(count, generator=generator))
        return torch.cat(starts)

    def get_batch(self) -> Tensor:
        """Returns the windows of this step that this process computes, `(B, T + 1)`."""
        batch_size = self.settings.batch_size
        starts = self.window_starts[self.step * batch_size :][:batch_size]
        own_starts = starts.chunk(self.world)[self.rank]  # (B,)
        windows = windows_at(own_starts, self.train_ids, self.settings.context_length)
        return windows.to(self.device)

    def train_step(self) -> Tensor:
        """Does one step. Returns this process's loss as a tensor: reading it waits for a GPU."""
        self.model.train()
        batch = self.get_batch()
        torch.manual_seed(self.make_seed(self.step, self.rank))  # for dropout

        # Compute the gradients. `backward` adds those of each micro-batch to `p.grad`.
        total_loss = torch.zeros((), device=self.device)
        for rows in batch.split(self.micro_batch_size):
            with self.autocast:
                # The target of each character is the one after it: T predictions a window.
                _, loss = self.compiled_model(rows[:, :-1], rows[:, 1:])
            loss = loss / self.settings.accumulate  # so that the sum is the mean of the batch
            loss.backward()
            total_loss += loss.detach()
        if self.world > 1:
            self.average_gradients()

        # Reduce a gradient that is unusually large (Pascanu et al., 2013, section 3.2,
        # https://arxiv.org/abs/1211.5063). Both optimizers limit the size of a step, but such a
        # gradient would dominate their averages for many steps.
        self.grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.settings.grad_clip
        )

        # Move the weights.
        learning_rate = self.get_learning_rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            with self.autocast:
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total_loss

    def average_gradients(self) -> None:
        """Gives all processes the mean of their gradients, so that their weights stay equal."""
        for p in self.model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)  # the sum
                p.grad /= self.world

    def get_learning_rate(self, step: int) -> float:
        """Returns the rate of a step, the first of which is step 0.

        It rises while the optimizers' averages fill, and falls linearly to nearly zero over the
        run: with ever smaller steps, the noise of the batches averages out.
        """
        settings = self.settings
        warmup = min(1, (step + 1) / (settings.warmup_steps + 1))
        return settings.learning_rate * warmup * (1 - step / settings.steps)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Computes the mean losses, in nats, of fixed windows of both parts of the text.

        Adds a row to the log, and returns it. Raises FloatingPointError if training has diverged.
        """
        self.model.eval()
        losses = {}
        for part, windows in self.eval_windows.items():
            total = torch.zeros((), device=self.device)
            for rows in windows.to(self.device).split(self.micro_batch_size):
                with self.autocast:  # not compiled_model, which would be compiled for each shape
                    _, loss = self.model(rows[:, :-1], rows[:, 1:])
                total += loss * len(rows)
            losses[part] = total.item() / len(windows)

        if not math.isfinite(losses["val"]):
            raise FloatingPointError(
                f"step {self.step}: the validation loss is {losses['val']}; lower --learning-rate"
            )
        row = {
            "step": self.step,
            "train_loss": losses["train"],
            "val_loss": losses["val"],
            "learning_rate": self.get_learning_rate(self.step - 1),  # of the last step
            "gradient_norm": self.grad_norm.item(),
        }
        self.log.append(row)
        return row


# ----------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------


def train(trainer: Trainer, report: "Report | None") -> None:
    """Trains until the last step. Only process 0 has a report: it alone evaluates and saves."""
    settings = trainer.settings
    if report and trainer.step == 0:
        report.add(trainer.evaluate())  # not saved: it must not replace a trained model

    while trainer.step < settings.steps:
        loss = trainer.train_step()
        if report:
            report.add_step(loss)
            if trainer.step % settings.eval_interval == 0 or trainer.step == settings.steps:
                row = trainer.evaluate()
                save(trainer)
                report.add(row)


# ----------------------------------------------------------------------------------------
# Optimizers
# ----------------------------------------------------------------------------------------


def orthogonalize(matrices: Tensor) -> Tensor:
    """Brings the singular values of each matrix, `(N, rows, columns)`, close to 1.

    A singular value is the factor by which a matrix stretches one direction. If the matrix is
    U S V^T, the result is close to U V^T: the same directions, all about equally strong.

    The exact decomposition would be slow. Each of these five Newton-Schulz steps computes an odd
    polynomial of the matrix, a x + b x^3 + c x^5, where x^3 stands for x x^T x. It leaves U and V
    as they are, and turns each singular value s into a s + b s^3 + c s^5. The coefficients are
    Jordan's (see `Muon`). They lift small values fast: those of at least 1/500 of the matrix's
    norm end between 0.68 and 1.2.
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
    """Momentum, orthogonalized: for the matrices inside a network.

    A gradient is dominated by a few directions, so that plain momentum hardly moves a matrix in
    the others. Orthogonalizing the momentum makes the update equally large in all of them.

    From Jordan, 2024, https://kellerjordan.github.io/posts/muon, with the scale of Liu et al.,
    2025, section 2.2, https://arxiv.org/abs/2502.16982, and an idea of Li et al., 2025
    (NorMuon), https://arxiv.org/abs/2510.05491. `torch.optim.Muon` takes 40 times as long on a CPU
    that does not compute in bfloat16.

    Each group has parameters of one shape, which are computed side by side, and `lr`, `momentum`,
    `weight_decay`, and `stacked`: the number of matrices that are stacked one above the other in
    each parameter, such as those for queries, keys and values. Each is orthogonalized alone.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        defaults = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.0, "stacked": 1}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, group)

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        # Average the gradients, and look one step ahead (Nesterov).
        momentum = group["momentum"]
        directions = []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = p.grad.clone()
            average = self.state[p]["momentum_buffer"]
            average.lerp_(p.grad, 1 - momentum)  # momentum * average + (1 - momentum) * gradient
            directions.append(p.grad.lerp(average, momentum))

        # Take the matrices of all parameters side by side, and transpose tall ones, so that all are
        # wide or square: x x^T is then the smaller product.
        rows, columns = params[0].shape
        x = torch.stack(directions).view(-1, rows // group["stacked"], columns)
        is_tall = x.size(1) > x.size(2)
        if is_tall:
            x = x.mT

        x = orthogonalize(x)

        # Give every column norm 1. In feed-forward a column is now a hidden channel, in `expand`,
        # transposed, as in `contract`: no channel moves faster than another. (NorMuon does this for
        # the rows of each matrix, the outputs of its layer, with running averages.)
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)

        # An element of such a column is about 1 / sqrt(rows). Scale it to 0.2, about the size of
        # AdamW's updates (Liu et al.): one learning rate then suits matrices of all shapes.
        x = x * (0.2 * math.sqrt(x.size(1)))

        if is_tall:
            x = x.mT
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

    The trainer sets the learning rate at each step.
    """
    matrices: dict[str, list[Tensor]] = {}  # those of all blocks, by name
    others = []
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and p.dim() == 2:
            _, _, name_in_block = name.split(".", 2)  # such as attention.qkv.weight
            matrices.setdefault(name_in_block, []).append(p)
        else:
            others.append(p)
    matrix_groups = [
        {
            "params": params,
            "weight_decay": settings.weight_decay,
            "stacked": 3 if name == "attention.qkv.weight" else 1,  # queries, keys and values
        }
        for name, params in matrices.items()
    ]
    adamw_groups = [{"params": others, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if settings.optimizer == "muon":
        optimizers.append(Muon(matrix_groups))
    else:
        adamw_groups += matrix_groups
    # Shorter memories than AdamW's usual 0.9 and 0.999: a run has few steps.
    optimizers.append(torch.optim.AdamW(adamw_groups, betas=(0.8, 0.99), fused=True))
    return optimizers


# ----------------------------------------------------------------------------------------
# That is how the model learns. What follows measures, reports, saves and starts the run.
#
# What counting can do, and what the model has learned
# ----------------------------------------------------------------------------------------

NGRAMS = {1: "unigram", 2: "bigram", 3: "trigram", 4: "4-gram", 5: "5-gram"}
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
    """
    # For each character to predict: up to four characters before it, and the character itself
    examples = [
        window[max(0, i + 1 - len(NGRAMS)) : i + 1]
        for window in windows
        for i in range(1, len(window))
    ]
    probs = [1 / vocab_size] * len(examples)
    losses = {"uniform": math.log(vocab_size)}
    for n, name in NGRAMS.items():
        counts = Counter(train_text[i : i + n] for i in range(len(train_text) - n + 1))
        n_h = Counter()
        k_h = Counter()
        for ngram, count in counts.items():
            n_h[ngram[:-1]] += count
            k_h[ngram[:-1]] += 1

        for i, example in enumerate(examples):
            ngram = example[-n:]
            h = ngram[:-1]
            if n_h[h] > 0:  # 0 if the history is new, or too short
                # probs[i] is still that of the shorter history.
                probs[i] = (counts[ngram] + k_h[h] * probs[i]) / (n_h[h] + k_h[h])
        losses[name] = -sum(map(math.log, probs)) / len(probs)
    return losses


CONTEXT_WINDOWS = 1000  # for the losses by context


@torch.no_grad()
def loss_by_context(model: GPT, windows: Tensor) -> dict[int, float]:
    """Returns the mean loss by the amount of context: {1: ..., 2: ..., 4: ...}.

    Entry k is the mean over the characters that have k to 2 k - 1 characters before them in their
    window, of windows `(N, T + 1)`. It shows what a longer context is worth.
    """
    losses = []  # (batch, T) each
    for rows in windows.to(model.lm_head.weight.device).split(32):
        logits, _ = model(rows[:, :-1])  # (batch, T, V)
        losses.append(F.cross_entropy(logits.mT, rows[:, 1:], reduction="none"))
    by_position = torch.cat(losses).mean(dim=0)  # (T,): with 1, 2, ..., T characters before

    powers = [2**i for i in range(20) if 2**i < max(2, model.config.context_length)]
    return {k: by_position[k - 1 : 2 * k - 1].mean().item() for k in powers}


def write_passage(model: GPT, trainer: Trainer, length: int) -> str:
    """Returns a text written by a model, always from the same first character and seed."""
    first = trainer.eval_windows["val"][:1, :1].to(trainer.device)  # (1, 1)
    generator = torch.Generator().manual_seed(1)
    model.eval()
    new_ids = list(model.generate(first, length - 1, temperature=0.8, generator=generator))
    return trainer.tokenizer.decode(torch.cat([first[0], *new_ids]))


# ----------------------------------------------------------------------------------------
# Reports
# ----------------------------------------------------------------------------------------

PICTURE_TITLE = "Losses of train.py"
CSV_COLUMNS = ("step", "train_loss", "val_loss", "learning_rate", "gradient_norm")


def draw_losses(log: list[dict[str, float]], losses_to_beat: dict[str, float]) -> bytes:
    """Draws both losses by step, and what counting achieves. Returns the content of a PNG file."""
    from matplotlib.figure import Figure  # imported here: it is slow to import

    rows = log[1:]  # without step 0, whose loss is far above
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per character)")
    axes.plot(steps, [row["train_loss"] for row in rows], ".-", label="training part")
    axes.plot(steps, [row["val_loss"] for row in rows], ".-", label="validation part")
    for name, loss in losses_to_beat.items():
        if name not in ("uniform", "unigram"):  # these are far above, too
            axes.axhline(loss, color="gray", linestyle="--")
            axes.text(steps[-1], loss, name, color="gray", ha="right", va="bottom")
    axes.legend(loc="lower left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Title": PICTURE_TITLE})
    return buffer.getvalue()


class AimWriter:
    """Shows a run with aim, https://aimstack.io, by the methods of TensorBoard's SummaryWriter."""

    def __init__(self, run_name: str, settings: dict[str, str]) -> None:
        import aim

        self.make_text = aim.Text
        self.run = aim.Run(repo=ROOT, system_tracking_interval=None, capture_terminal_logs=False)
        self.run.name = run_name
        self.run["hparams"] = settings

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.run.track(value, name, step=step)

    def add_text(self, name: str, text: str, step: int) -> None:
        self.run.track(self.make_text(text), name, step=step)

    def close(self) -> None:
        self.run.close()


COMMANDS = {"aim": "aim up", "tensorboard": "tensorboard --logdir runs"}  # that show the charts


def choose_tracker(name: str) -> str:
    """Returns the name of the tracker; for "auto" the first that is installed, or "none"."""
    if name != "auto":
        return name
    installed = [tracker for tracker in COMMANDS if importlib.util.find_spec(tracker)]
    return installed[0] if installed else "none"


def open_tracker(name: str, settings: Settings) -> Any:
    """Returns an AimWriter or a SummaryWriter. Their files are in `.aim` and `runs`."""
    run_name = " ".join([f"{datetime.now():%Y-%m-%d %H:%M:%S}", *sys.argv[1:]])
    if name == "aim":
        return AimWriter(run_name, settings.as_text())

    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(ROOT / "runs" / re.sub(r"[^\w=.-]+", "_", run_name))
    writer.add_text("settings", str(settings.as_text()))
    return writer


class Report:
    """Shows how a run goes: a progress bar, printed losses, curves in files, and a tracker.

    A failure of the curves or the tracker is one line, and does not stop training.
    """

    def __init__(self, trainer: Trainer) -> None:
        settings = trainer.settings
        self.trainer = trainer
        self.saves_curves = True
        self.tracker = None
        self.tracker_name = choose_tracker(settings.tracker)
        self.describe_start()
        self.losses_to_beat = self.count_ngrams()
        if self.tracker_name != "none":
            self.tracker = self.attempt(open_tracker, self.tracker_name, settings)
        for row in trainer.log:  # a resumed run is drawn from its beginning
            self.track(row)
        self.bar = tqdm(
            total=settings.steps,
            initial=trainer.step,
            unit="step",
            dynamic_ncols=True,
            disable=None,  # disabled unless standard error is a terminal
        )

    def describe_start(self) -> None:
        trainer = self.trainer
        settings = trainer.settings
        if settings.data == SAMPLE:
            print_notice(
                "for real books run: python bin/download.py, then bash bin/concatenate.sh, "
                "then this"
            )
        if trainer.step > 0:
            print_notice(f"continuing at step {trainer.step} of {settings.steps}")
        elif settings.resume:
            print_notice(f"there is no checkpoint {settings.checkpoint}: starting at step 0")
        if trainer.step == 0 and (settings.model.exists() or settings.checkpoint.exists()):
            print_notice(
                f"this run will replace {settings.model} and its checkpoint: name another --model "
                "to keep them"
            )
        characters = len(trainer.train_ids) + len(trainer.val_ids)
        print_notice(
            f"{settings.data}: {characters:,} characters; {trainer.model.count_parameters():,} "
            f"parameters; {trainer.device} in {trainer.precision}; "
            f"charts: {COMMANDS.get(self.tracker_name, 'none')}"
        )

    def count_ngrams(self) -> dict[str, float]:
        tokenizer = self.trainer.tokenizer
        train_text = tokenizer.decode(self.trainer.train_ids[-MAX_COUNTED:])
        windows = [tokenizer.decode(window) for window in self.trainer.eval_windows["val"]]
        losses = ngram_losses(train_text, windows, tokenizer.vocab_size)
        figures = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        print(f"to beat: {figures} (counted in {len(train_text):,} characters)")
        return losses

    def add_step(self, loss: Tensor) -> None:
        self.bar.update()
        if not self.bar.disable and self.trainer.step % 10 == 0:
            self.bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)

    def add(self, row: dict[str, float]) -> None:
        """Reports an evaluation."""
        bits = row["val_loss"] / math.log(2)
        passage = write_passage(self.trainer.model, self.trainer, 100)
        tqdm.write(
            f"step {row['step']}: train loss {row['train_loss']:.4f}, "
            f"val loss {row['val_loss']:.4f} ({bits:.2f} bits/char)"
        )
        print_notice(f"    {' '.join(passage.split())}")
        if row["step"] > 0 and self.saves_curves:
            self.save_curves()
        self.track(row, passage)

    def save_curves(self) -> None:
        """Writes the log and its picture beside the model."""
        log = self.trainer.log
        table = io.StringIO()
        writer = csv.DictWriter(table, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
        settings = self.trainer.settings
        try:
            write_file(settings.beside_model(".csv"), table.getvalue().encode())
            write_file(settings.beside_model(".png"), draw_losses(log, self.losses_to_beat))
        except (InputError, ImportError) as error:
            print_notice(f"the curves cannot be saved ({error}); training goes on without them")
            self.saves_curves = False

    def track(self, row: dict[str, float], passage: str | None = None) -> None:
        for name, value in row.items():
            if name != "step" and self.tracker is not None:
                self.attempt(self.tracker.add_scalar, name, value, row["step"])
        if passage is not None and self.tracker is not None:
            self.attempt(self.tracker.add_text, "passage", passage, row["step"])

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of the tracker. If it fails, training goes on without charts."""
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:  # a tracker can raise anything
            self.tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print_notice(f"{self.tracker_name} failed ({reason}); training goes on without charts")

    def close(self) -> None:
        self.bar.close()
        if self.tracker is not None:
            self.attempt(self.tracker.close)

    def end(self) -> None:
        """Shows what the best model has learned, and says what comes next."""
        trainer = self.trainer
        settings = trainer.settings
        if not settings.model.exists():  # the run was finished before, and its model was moved
            return
        best, _, saved = load_model(settings.model, trainer.device)
        windows = evaluation_windows(trainer.val_ids, settings.context_length, CONTEXT_WINDOWS)
        losses = loss_by_context(best, windows)
        figures = ", ".join(f"{k}: {loss:.2f}" for k, loss in losses.items())
        print(f"by context: {figures}")
        print_notice(f"a passage by the saved model:\n{write_passage(best, trainer, 200)}\n")

        curves = f"; {settings.beside_model('.png')} shows the losses" if self.saves_curves else ""
        print_notice(
            f"{settings.model} is the model of step {saved['step']}, with a validation loss of "
            f"{saved['val_loss']:.4f}{curves}"
        )
        model_flag = "" if settings.model == MODEL_PATH else f' --model "{settings.model}"'
        print_notice(
            f"next: python inference.py{model_flag}, or python show_params.py{model_flag}; "
            "to train longer, add --resume and raise --steps"
        )


def print_notice(message: str) -> None:
    """Prints a line on standard error, above the progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


# ----------------------------------------------------------------------------------------
# Saving and resuming
# ----------------------------------------------------------------------------------------


def save(trainer: Trainer) -> None:
    """Saves the model if its validation loss is the lowest so far, and what `resume` needs.

    Raises InputError if a file cannot be written.
    """
    settings = trainer.settings
    if trainer.saved_step == 0:
        # If the run is killed between the two files, --resume must not find the checkpoint of an
        # earlier run beside the model of this one.
        try:
            settings.checkpoint.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{settings.checkpoint} cannot be replaced: {error}") from error

    val_loss = trainer.log[-1]["val_loss"]
    is_best = val_loss == min(row["val_loss"] for row in trainer.log if row["step"] > 0)
    if is_best or not settings.model.exists():
        save_model(
            settings.model, trainer.model, trainer.tokenizer, step=trainer.step, val_loss=val_loss
        )
    save_model(
        settings.checkpoint,
        trainer.model,
        trainer.tokenizer,
        text_digest=trainer.text_digest,
        settings=settings.as_text(),
        step=trainer.step,
        log=trainer.log,
        optimizers=[optimizer.state_dict()["state"] for optimizer in trainer.optimizers],
    )
    trainer.saved_step = trainer.step


# What a resumed run must have in common with the run that it continues
FIXED = ("context_length", "n_layer", "n_head", "n_embd", "optimizer", "val_fraction")


def resume(trainer: Trainer) -> None:
    """Continues from the checkpoint.

    Raises InputError if it is of a run with another text, or with other values of the settings in
    `FIXED`.
    """
    path = trainer.settings.checkpoint
    model, _, saved = load_model(path)
    advice = "use the same, or start a new run without --resume"
    if saved.get("text_digest") != trainer.text_digest:
        raise InputError(f"{path} is of a run with another text: {advice}")
    if saved["step"] > trainer.settings.steps:
        raise InputError(f"{path} is of step {saved['step']}: raise --steps")
    for name, value in trainer.settings.as_text().items():
        saved_value = saved["settings"].get(name, value)
        if value == saved_value or name == "resume":
            continue
        if name in FIXED:
            raise InputError(f"{path} is of a run with {flag_name(name)} {saved_value}: {advice}")
        if trainer.rank == 0:
            print_notice(f"{flag_name(name)} was {saved_value}, and is {value} from here on")

    trainer.model.load_state_dict(model.state_dict())
    for optimizer, state in zip(trainer.optimizers, saved["optimizers"], strict=True):
        groups = optimizer.state_dict()["param_groups"]  # from the current settings
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    trainer.step = saved["step"]
    trainer.saved_step = saved["step"]
    trainer.log = saved["log"]


def check_outputs(settings: Settings) -> None:
    """Raises InputError now if the files of the run could not be written later.

    Only files that an earlier run has written are replaced.
    """
    if settings.model.name.endswith(".train.pth"):
        raise InputError(f"--model {settings.model}: .train.pth is the ending of a checkpoint")
    try:
        for path in (settings.model, settings.checkpoint):
            if path.exists():
                load_content(path)  # raises InputError if it is another file
        for ending, content in ((".csv", ",".join(CSV_COLUMNS)), (".png", PICTURE_TITLE)):
            path = settings.beside_model(ending)
            if path.exists() and content.encode() not in path.read_bytes():
                raise InputError(f"{path} was not written by train.py: move it, or change --model")

        # Write a test file, so that a read-only folder or too long a name is an error now.
        test_file = settings.beside_model(f".train.pth.{os.getpid()}.test")
        write_file(test_file, b"")
        test_file.unlink()
    except OSError as error:
        raise InputError(f"--model {settings.model}: {error}") from error


# ----------------------------------------------------------------------------------------
# The machine
# ----------------------------------------------------------------------------------------


def choose_precision(settings: Settings, device: torch.device) -> str:
    """Returns the precision of matrix products, "fp32" or "bf16".

    Raises InputError for bf16 on mps, where the causal mask of attention is wrong in bfloat16
    (https://github.com/pytorch/pytorch/issues/195910).
    """
    if settings.precision == "bf16" and device.type == "mps":
        raise InputError("--precision bf16 gives wrong results with --device mps: use fp32")
    if settings.precision != "auto":
        return settings.precision

    is_fast = False
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # from torch 2.12 on
        # Intel's processors are fast in bfloat16 only with AMX. Where matrices are small, the
        # conversions take longer than the faster products save.
        processor = torch.cpu.get_capabilities()
        is_intel = "Intel" in processor.get("cpu_name", "")
        instructions = "amx_bf16" if is_intel else "avx512_bf16"
        is_fast = processor.get(instructions, False) and settings.n_embd >= 128
    return "bf16" if is_fast else "fp32"


def join_processes(settings: Settings) -> tuple[int, int]:
    """Joins the processes that torchrun has started. Returns this one's rank and their number."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    if settings.device in ("auto", "cuda") and torch.cuda.is_available():
        gpu = int(os.environ["LOCAL_RANK"])  # each process has its own
        if gpu >= torch.cuda.device_count():
            raise InputError("there are fewer GPUs than processes: lower --nproc-per-node")
        torch.cuda.set_device(gpu)
    return dist.get_rank(), dist.get_world_size()


# ----------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------


def main() -> None:
    use_utf8()
    settings = parse_arguments()
    try:
        run(settings)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports an end by Ctrl-C
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory: raise --accumulate, or take a smaller batch or model")
    except (InputError, FloatingPointError, BrokenPipeError) as error:
        sys.exit(f"error: {error}")


def parse_arguments() -> Settings:
    parser = argparse.ArgumentParser(
        usage="python train.py [--FLAG VALUE ...]",
        description="Trains the model on a text, and shows how it learns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in fields(Settings):
        help, choices = f.metadata["help"], f.metadata["choices"]
        if f.type is bool:
            parser.add_argument(flag_name(f.name), action="store_true", help=help)
        else:
            parser.add_argument(
                flag_name(f.name), type=f.type, default=f.default, choices=choices, help=help
            )
    arguments = parser.parse_args()
    for f in fields(Settings):
        value = getattr(arguments, f.name)
        minimum, maximum = f.metadata["minimum"], f.metadata["maximum"]
        if isinstance(value, int | float) and not minimum <= value <= maximum:
            upper_limit = f" and at most {maximum:g}" if maximum < math.inf else ""
            parser.error(f"{flag_name(f.name)} must be at least {minimum:g}{upper_limit}")
    return Settings(**vars(arguments))


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def run(settings: Settings) -> None:
    rank, world = join_processes(settings)
    is_main = rank == 0
    if is_main:
        check_outputs(settings)
    trainer = Trainer(settings, rank, world)
    if settings.resume and settings.checkpoint.exists():
        resume(trainer)

    report = Report(trainer) if is_main else None
    try:
        train(trainer, report)
    except KeyboardInterrupt:
        if report and trainer.saved_step > 0:
            advice = f"the same command with --resume continues from step {trainer.saved_step}"
            print_notice(f"stopped; {advice}")
        elif report:
            print_notice("stopped; nothing of this run is saved yet")
        raise
    finally:
        if report:
            report.close()
    if report:
        report.end()

    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # a thread of the process group may still run, and would abort sys.exit


if __name__ == "__main__":
    main()
