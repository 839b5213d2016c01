"""Trains the model on a text, and shows how it learns.

    python train.py                          train, on a GPU if there is one
    python train.py --resume                 continue a run that was interrupted
    torchrun --nproc-per-node 4 train.py     train with four processes that share each batch

Each field of `Settings` is also a flag: `batch_size` is `--batch-size`.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import io
import math
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

# Threads that wait for each other try for a moment, and then sleep. Without this, GNU's OpenMP lets
# them try for long, and beside another busy program a step takes ten times as long and more.
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
    limits = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Settings:
    """All that a run depends on. Raises InputError if a value is out of range.

    The losses in the comments are those of the validation part, in nats: lower is better.
    """

    # Files
    data: Path = setting(BOOKS if BOOKS.exists() else SAMPLE, "the text to learn from, in UTF-8")
    model: Path = setting(MODEL_PATH, "the file for the best model")
    resume: bool = setting(
        False, "continue from the checkpoint beside the model, on the machine that made it"
    )

    # The amount of work
    steps: int = setting(1000, "steps of the optimizer", minimum=1)
    batch_size: int = setting(16, "windows of text in each step", minimum=1)
    accumulate: int = setting(1, "split each batch into this many parts, to save memory", minimum=1)

    # The model. A larger one learns more from each character, but reads fewer in the same time.
    context_length: int = setting(128, "characters in a window", minimum=1)
    n_layer: int = setting(3, "blocks", minimum=1)
    n_head: int = setting(4, "attention heads in each block", minimum=1)
    n_embd: int = setting(128, "channels", minimum=1)
    # On the sample (1,600 steps of 16 windows of 64), 0.1 raised the loss from 1.444 to 1.500.
    dropout: float = setting(
        0.0, "the probability that an activation is dropped in training", minimum=0, maximum=0.99
    )

    # The optimizer of the blocks' matrices. AdamW trains the rest in any case.
    optimizer: str = setting("muon", "for the blocks' matrices", choices=("muon", "adamw"))
    # The best of several from 0.006 to 0.03, for Muon and for AdamW beside it.
    learning_rate: float = setting(0.014, "the highest rate; for adamw try 0.007", minimum=0)
    # Muon averages about 10 gradients. The first averages hold fewer and are noisier, but its steps
    # would be just as large: so the rate begins low.
    warmup_steps: int = setting(20, "steps in which the learning rate rises", minimum=0)
    # On the sample 0.4 gave 1.442, 0.3 gave 1.450; on the books they differ by less than 0.003.
    weight_decay: float = setting(0.4, "how strongly the matrices are pulled to zero", minimum=0)
    # The norm falls from 1.3 to about 0.5 in 100 steps: only an unusual batch is clipped.
    grad_clip: float = setting(1.0, "the norm to which a larger gradient is reduced", minimum=1e-9)

    eval_interval: int = setting(
        100, "steps between evaluations, each with a checkpoint", minimum=1
    )
    val_fraction: float = setting(
        0.1, "the share of the text held out, its end", minimum=0.001, maximum=0.999
    )

    # The machine
    seed: int = setting(1, "makes a run repeatable")
    device: str = setting("auto", "cpu, cuda or mps; auto is a GPU if there is one")
    precision: str = setting(
        "auto",
        "of matrix products; auto is bf16 where it is fast, else fp32, with TF32 on a GPU",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = setting(False, "compile the model first, worthwhile on a GPU")
    tracker: str = setting(
        "auto",
        "what draws the charts; auto is aim if it is installed, else tensorboard",
        choices=("auto", "aim", "tensorboard", "none"),
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            minimum, maximum = f.metadata["minimum"], f.metadata["maximum"]
            if isinstance(value, int | float) and not minimum <= value <= maximum:
                raise InputError(
                    f"{flag_name(f.name)} must be from {minimum:g} to {maximum:g}, not {value}"
                )

    def beside_model(self, ending: str) -> Path:
        """Returns models/model-scifi.csv for models/model-scifi.pth and ".csv"."""
        return self.model.parent / (self.model.name.removesuffix(".pth") + ending)

    @property
    def checkpoint(self) -> Path:
        """The file that `resume` needs."""
        return self.beside_model(".train.pth")


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


# ----------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------


def split_text(ids: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Splits a text into the part to learn from and the part to validate on, its end.

    The validation part is one piece, and not windows from anywhere: the model would have learned
    the characters around them, and often the same names and sentences.

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
    starts = range(0, len(ids) - context_length, stride)[:count]
    return torch.stack([ids[start : start + context_length + 1] for start in starts])


# ----------------------------------------------------------------------------------------
# Trainer
# ----------------------------------------------------------------------------------------


class Trainer:
    """A model, its optimizers and the text, in process `rank` of `world` processes.

    Raises OSError if a file cannot be read or written, InputError if a file or a setting is
    wrong.
    """

    def __init__(self, settings: Settings, rank: int = 0, world: int = 1) -> None:
        self.settings = settings
        self.rank = rank
        self.world = world
        self.device = find_device(settings.device)
        self.precision = choose_precision(settings, self.device)
        # Inside this context, matrix products are computed in bfloat16 if that is the precision.
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )

        # The windows that this process computes at once
        shares = world * settings.accumulate
        if settings.batch_size % shares != 0:
            raise InputError(
                f"--batch-size {settings.batch_size} must be a multiple of "
                f"{world} (processes) x {settings.accumulate} (--accumulate)"
            )
        self.micro_batch_size = settings.batch_size // shares

        # The text
        text = read_text(settings.data)
        self.tokenizer = CharTokenizer.from_text(text)
        self.train_ids, self.val_ids = split_text(self.tokenizer.encode(text), settings)
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
        self.grad_norm = torch.zeros(())  # of the last step
        self.best_val_loss = math.inf
        self.log: list[dict[str, float]] = []  # a row for each evaluation

        # What a resumed run must have in common with the run that it continues
        self.fixed_settings = {
            "text": hashlib.sha256(text.encode()).hexdigest(),
            **asdict(config),
            "optimizer": settings.optimizer,
            "val_fraction": settings.val_fraction,
        }
        if rank == 0:
            check_outputs(settings)
        self.is_resumed = settings.resume and settings.checkpoint.exists()
        if self.is_resumed:
            self.load_checkpoint()

    # The randomness of a step depends on the seed and the step alone, so a resumed run draws
    # what the uninterrupted one would have drawn.

    def make_seed(self, *numbers: int) -> int:
        """Makes a seed of 32 bits, as torch's CPU generator uses, from the run's and these."""
        digest = hashlib.sha256(repr((self.settings.seed, *numbers)).encode()).hexdigest()
        return int(digest[:8], 16)

    def get_batch(self) -> Tensor:
        """Draws the windows of this process, `(B, T + 1)`, each anywhere in the training part."""
        generator = torch.Generator().manual_seed(self.make_seed(self.step))
        window = self.settings.context_length + 1
        places = len(self.train_ids) - window + 1
        starts = torch.randint(places, (self.settings.batch_size,), generator=generator)
        own_starts = starts.chunk(self.world)[self.rank].tolist()
        rows = torch.stack([self.train_ids[start : start + window] for start in own_starts])
        return rows.to(self.device)

    def train_step(self) -> Tensor:
        """Does one step. Returns the loss as a tensor: reading its value waits for the device."""
        self.model.train()
        batch = self.get_batch()
        torch.manual_seed(self.make_seed(self.step, self.rank))  # for dropout

        # Compute the gradients. Those of all parts of the batch add up.
        total_loss = torch.zeros((), device=self.device)
        for rows in batch.split(self.micro_batch_size):
            with self.autocast:
                # The target of each character is the one after it: T predictions a window.
                _, loss = self.compiled_model(rows[:, :-1], rows[:, 1:])
            loss = loss / self.settings.accumulate
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
        learning_rate = self.learning_rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            with self.autocast:  # Muon has products
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total_loss

    def average_gradients(self) -> None:
        """Gives all processes the mean of their gradients, so that their weights stay equal."""
        for p in self.model.parameters():
            dist.all_reduce(p.grad)  # the sum
            p.grad /= self.world

    def learning_rate(self, step: int) -> float:
        """The rate of a step, the first of which is step 0.

        It rises while the optimizers' averages fill, then falls in a straight line to zero:
        with ever smaller steps the noise of the batches averages out.
        """
        settings = self.settings
        warmup = min(1, (step + 1) / (settings.warmup_steps + 1))
        return settings.learning_rate * warmup * (1 - step / settings.steps)

    def is_finished(self) -> bool:
        return self.step >= self.settings.steps

    def evaluation_is_due(self) -> bool:
        """True in process 0 at every `eval_interval` steps and at the end, once."""
        if self.rank != 0 or (self.log and self.log[-1]["step"] == self.step):
            return False
        return self.step % self.settings.eval_interval == 0 or self.is_finished()

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
                with self.autocast:
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
            "learning_rate": self.learning_rate(self.step - 1),  # of the last step
            "gradient_norm": self.grad_norm.item(),
        }
        self.log.append(row)
        return row

    def save(self) -> None:
        """Saves what `resume` needs, and the model if its validation loss is the lowest so far.

        Raises InputError if a file cannot be written.
        """
        try:
            self.save_files()
        except OSError as error:
            raise InputError(f"step {self.step} cannot be saved: {error}") from error

    def save_files(self) -> None:
        settings = self.settings
        val_loss = self.log[-1]["val_loss"]
        if val_loss < self.best_val_loss:
            if self.best_val_loss == math.inf and not self.is_resumed:
                # The first model of a new run. The checkpoint of an earlier run does not fit it.
                settings.checkpoint.unlink(missing_ok=True)
            self.best_val_loss = val_loss
            save_model(
                settings.model, self.model, self.tokenizer, step=self.step, val_loss=val_loss
            )
        save_model(
            settings.checkpoint,
            self.model,
            self.tokenizer,
            fixed_settings=self.fixed_settings,
            step=self.step,
            best_val_loss=self.best_val_loss,
            log=self.log,
            optimizers=[optimizer.state_dict()["state"] for optimizer in self.optimizers],
        )

    def load_checkpoint(self) -> None:
        """Continues from the checkpoint. Raises InputError if it is of another run."""
        path = self.settings.checkpoint
        content = load_content(path)
        saved = content["metadata"]
        for name, value in self.fixed_settings.items():
            was = saved["fixed_settings"].get(name)
            if was != value:
                was = "another" if name == "text" else was
                raise InputError(
                    f"{path} is of a run whose {name} was {was}: use the same, or start a new run "
                    "without --resume"
                )

        self.model.load_state_dict(content["weights"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            load_optimizer(optimizer, state)
        self.step = saved["step"]
        self.log = saved["log"]
        if self.settings.model.exists():  # else the next model is the best
            self.best_val_loss = saved["best_val_loss"]


# ----------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------


def train(trainer: Trainer, losses_to_beat: list[float]) -> None:
    """Trains until the last step. Only process 0 evaluates, saves and prints."""
    settings = trainer.settings
    charts = Charts(trainer)
    bar = tqdm(
        total=settings.steps,
        initial=trainer.step,
        unit="step",
        dynamic_ncols=True,
        disable=True if trainer.rank > 0 else None,  # None: unless standard error is a terminal
    )
    with bar:
        while True:
            if trainer.evaluation_is_due():
                row = trainer.evaluate()
                if trainer.step > 0:  # an untrained model must not replace a trained one
                    trainer.save()
                    save_curves(trainer, losses_to_beat)
                passage = write_passage(trainer.model, trainer, 100)
                with bar.external_write_mode():
                    print(describe_row(row), flush=True)
                print_notice(f"    {' '.join(passage.split())}")
                charts.add(row, passage)

            if trainer.is_finished():
                break
            trainer.train_step()
            bar.update()
    charts.close()


def describe_row(row: dict[str, float]) -> str:
    bits = row["val_loss"] / math.log(2)
    return (
        f"step {row['step']}: train loss {row['train_loss']:.4f}, "
        f"val loss {row['val_loss']:.4f} ({bits:.2f} bits/char)"
    )


def print_notice(message: str) -> None:
    """Prints a line on standard error, above the progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


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
    for _ in range(5):
        x2 = x @ x.mT  # (N, rows, rows)
        x = a * x + (b * x2 + c * x2 @ x2) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: for the matrices inside a network.

    A gradient is dominated by a few directions, so that plain momentum hardly moves a matrix in
    the others. Orthogonalizing the momentum makes the update equally large in all of them.

    From Jordan, 2024, https://kellerjordan.github.io/posts/muon, with the scale of Liu et al.,
    2025, section 2.2, https://arxiv.org/abs/2502.16982, and an idea of Li et al., 2025
    (NorMuon), https://arxiv.org/abs/2510.05491. `torch.optim.Muon` takes 40 times as long on a CPU
    that does not compute in bfloat16.

    Each group of parameters has `lr`, `momentum`, `weight_decay`, and `stacked`: the number of
    matrices that are stacked one above the other in each parameter, such as those for queries,
    keys and values. Each of them is orthogonalized alone.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        defaults = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.0, "stacked": 1}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.move(p, group)

    def move(self, p: Tensor, group: dict[str, Any]) -> None:
        # Average the gradients, and look one step ahead (Nesterov).
        if "average" not in self.state[p]:
            self.state[p]["average"] = p.grad.clone()
        average = self.state[p]["average"]
        average.lerp_(p.grad, 1 - group["momentum"])  # momentum * average + (1 - momentum) * grad
        update = p.grad.lerp(average, group["momentum"])

        # Separate the stacked matrices. Of a tall one take the transpose: then x x^T is the smaller
        # product, and in both layers of feed-forward a column belongs to a hidden channel. A view
        # shares its numbers with p.
        matrices = p.view(group["stacked"], -1, p.size(1))  # (N, rows, columns)
        x = update.view_as(matrices)
        if matrices.size(1) > matrices.size(2):
            matrices, x = matrices.mT, x.mT

        x = orthogonalize(x)

        # Make all columns equally long, so that no channel moves faster than others. NorMuon does
        # the same for the rows of each matrix, the outputs of its layer, with running averages.
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)

        # Elements of a typical size of 0.2, as in AdamW's updates, so that one learning rate suits
        # matrices of all shapes and both optimizers (Liu et al.). In a column of length 1 the
        # typical size is 1 / sqrt(rows).
        scale = 0.2 * math.sqrt(x.size(1))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        matrices.sub_(x, alpha=group["lr"] * scale)


def make_optimizers(model: GPT, settings: Settings) -> list[torch.optim.Optimizer]:
    """Makes Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all.

    AdamW averages the gradients of each weight, and divides the average by the typical size of
    that weight's past gradients (Adam: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980). The
    W stands for decoupled weight decay, which is not divided by that size (Loshchilov and Hutter,
    2019, https://arxiv.org/abs/1711.05101).

    The embedding and the output layer of the model are matrices too, but each of their rows
    belongs to one character. In the embedding, the gradient of a character that is not in the
    batch is 0. Muon would enlarge what is left of it in the average; AdamW lets the row rest. For
    the output layer AdamW is better in practice (Jordan).

    Weight decay acts on the matrices of the blocks alone. Norms and biases are few, and an
    embedding should not shrink because its character is rare.
    """
    qkv = [block.attention.qkv.weight for block in model.blocks]
    others = []
    for block in model.blocks:
        others.append(block.attention.output.weight)
        others.append(block.feed_forward.expand.weight)
        others.append(block.feed_forward.contract.weight)
    is_matrix = {id(p) for p in qkv + others}
    rest = [p for p in model.parameters() if id(p) not in is_matrix]

    decay = settings.weight_decay
    groups = [{"params": rest, "weight_decay": 0.0}]
    if settings.optimizer == "adamw":
        groups.append({"params": qkv + others, "weight_decay": decay})
    # Shorter memories than AdamW's usual 0.9 and 0.999: a run has few steps.
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.99), fused=True)
    if settings.optimizer == "adamw":
        return [adamw]

    muon = Muon(
        [
            {"params": qkv, "weight_decay": decay, "stacked": 3},  # queries, keys and values
            {"params": others, "weight_decay": decay},
        ]
    )
    return [muon, adamw]


# ----------------------------------------------------------------------------------------
# What counting can do, and what the model has learned
# ----------------------------------------------------------------------------------------

LONGEST_NGRAM = 5
MAX_COUNTED = 1_000_000  # characters of the training part; more would take too long
MAX_PREDICTED = 100_000  # characters of the validation part


def ngram_losses(train_text: str, val_text: str, vocab_size: int) -> list[float]:
    """Returns the losses, in nats, of what counting alone can do: the losses to beat.

    Every character of the validation part is predicted from nothing; from how often it occurs in
    the training part; from how often it follows the character before it there; the two before it;
    and so on, to four. These predictions are called uniform, unigram, bigram, trigram, ...

    Where a history is rare, Witten-Bell smoothing relies more on the shorter history
    (Witten and Bell, 1991; Chen and Goodman, 1998, section 2.5). With n(h c), how often the
    character c follows the history h, n(h), how often any does, and k(h), how many different
    characters do:

        p(c | h) = (n(h c) + k(h) p(c | h without its first character)) / (n(h) + k(h))
    """
    text = train_text[-LONGEST_NGRAM:] + val_text  # the first characters have histories too
    first = len(text) - len(val_text)
    probs = [1 / vocab_size] * len(val_text)
    losses = [math.log(vocab_size)]
    for n in range(1, LONGEST_NGRAM + 1):
        counts = Counter(train_text[i : i + n] for i in range(len(train_text) - n + 1))
        history_counts = Counter()
        follower_kinds = Counter()
        for ngram, count in counts.items():
            history_counts[ngram[:-1]] += count
            follower_kinds[ngram[:-1]] += 1

        for i in range(len(val_text)):
            end = first + i + 1
            ngram = text[max(0, end - n) : end]
            total = history_counts[ngram[:-1]]
            kinds = follower_kinds[ngram[:-1]]
            if total > 0:
                probs[i] = (counts[ngram] + kinds * probs[i]) / (total + kinds)
        losses.append(-sum(map(math.log, probs)) / len(probs))
    return losses


@torch.no_grad()
def loss_by_context(model: GPT, windows: Tensor) -> dict[int, float]:
    """Returns the mean loss by the amount of context: {1: ..., 2: ..., 4: ...}.

    The entry for k is the mean over windows, `(N, T + 1)`, and over their characters with k to
    2 k - 1 characters before them, so it shows how much a longer context helps. The loss of a
    single character has a standard deviation of about 1.8 nats, and the mean for k one of about
    1.8 / sqrt(N k).
    """
    losses = []  # (batch, T) each
    for rows in windows.to(model.lm_head.weight.device).split(32):
        logits, _ = model(rows[:, :-1])  # (batch, T, V)
        losses.append(F.cross_entropy(logits.mT, rows[:, 1:], reduction="none"))
    by_position = torch.cat(losses).mean(dim=0)  # (T,): with 1, 2, ..., T characters before

    powers = [2**i for i in range(20) if 2**i < model.config.context_length]
    return {k: by_position[k - 1 : 2 * k - 1].mean().item() for k in powers}


def write_passage(model: GPT, trainer: Trainer, length: int) -> str:
    """Returns a text of the model, always with the same first character and the same draws."""
    first = trainer.eval_windows["val"][:1, :1].to(trainer.device)  # (1, 1)
    generator = torch.Generator().manual_seed(1)
    model.eval()
    new_ids = list(model.generate(first, length - 1, temperature=0.8, generator=generator))
    return trainer.tokenizer.decode(torch.cat([first[0], *new_ids]))


# ----------------------------------------------------------------------------------------
# Curves and charts
# ----------------------------------------------------------------------------------------

LOG_COLUMNS = ("step", "train_loss", "val_loss", "learning_rate", "gradient_norm")
PICTURE_TITLE = "Losses of train.py"


def save_curves(trainer: Trainer, losses_to_beat: list[float]) -> None:
    """Writes the log and its picture beside the model. Training goes on if that fails."""
    try:
        text = io.StringIO()
        writer = csv.DictWriter(text, LOG_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(trainer.log)
        write_file(trainer.settings.beside_model(".csv"), text.getvalue().encode())
        picture = draw_losses(trainer.log, losses_to_beat)
        write_file(trainer.settings.beside_model(".png"), picture)
    except (OSError, ImportError) as error:
        print_notice(f"the curves could not be saved ({error}); training continues")


def draw_losses(log: list[dict[str, float]], losses_to_beat: list[float]) -> bytes:
    """Draws both losses by step, and what counting achieves. Returns the content of a PNG file."""
    from matplotlib.figure import Figure  # here, since it takes time

    rows = log[1:]  # from the first steps on: the loss at step 0 is far above
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per character)")
    axes.plot(steps, [row["train_loss"] for row in rows], ".-", label="training part")
    axes.plot(steps, [row["val_loss"] for row in rows], ".-", label="validation part")
    for before, loss in enumerate(losses_to_beat[2:], start=1):  # the others are far above, too
        axes.axhline(loss, color="gray", linestyle="--")
        label = f"counting, given {before} before"
        axes.text(steps[-1], loss, label, color="gray", ha="right", va="bottom")
    axes.legend(loc="lower left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Title": PICTURE_TITLE})
    return buffer.getvalue()


class AimTracker:
    """Shows runs with aim, https://aimstack.io. Its files are in `.aim`."""

    open_with = "aim up"

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        import aim

        self.make_text = aim.Text
        self.run = aim.Run(repo=ROOT, system_tracking_interval=None, capture_terminal_logs=False)
        self.run.name = name
        self.run["hparams"] = settings

    def add(self, row: dict[str, float], passage: str | None = None) -> None:
        step = row["step"]
        for part in ("train", "val"):  # in one chart
            self.run.track(row[f"{part}_loss"], "loss", step=step, context={"subset": part})
        for name in ("learning_rate", "gradient_norm"):
            self.run.track(row[name], name, step=step)
        if passage is not None:
            self.run.track(self.make_text(passage), "passage", step=step)

    def close(self) -> None:
        self.run.close()


class TensorBoardTracker:
    """Shows runs with TensorBoard, through `torch.utils.tensorboard`. Its files are in `runs`."""

    open_with = "tensorboard --logdir runs"

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = ROOT / "runs" / re.sub(r"[^\w=.-]+", "_", name)
        self.writers = {part: SummaryWriter(directory / part) for part in ("train", "val")}
        rows = [f"| {setting} | {value} |" for setting, value in settings.items()]
        table = "\n".join(["| setting | value |", "| --- | --- |", *rows])
        self.writers["train"].add_text("settings", table)

    def add(self, row: dict[str, float], passage: str | None = None) -> None:
        step = row["step"]
        for part, writer in self.writers.items():  # two writers, for one chart
            writer.add_scalar("loss", row[f"{part}_loss"], step)
        writer = self.writers["train"]
        for name in ("learning_rate", "gradient_norm"):
            writer.add_scalar(name, row[name], step)
        if passage is not None:
            writer.add_text("passage", passage, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


TRACKERS = {"aim": AimTracker, "tensorboard": TensorBoardTracker}


def choose_tracker(name: str) -> str:
    """Returns the name of the tracker; for "auto" the first that is installed, or "none"."""
    if name != "auto":
        return name
    installed = [candidate for candidate in TRACKERS if importlib.util.find_spec(candidate)]
    return installed[0] if installed else "none"


class Charts:
    """Sends evaluations to the tracker. The first failure ends tracking, and not training."""

    def __init__(self, trainer: Trainer) -> None:
        self.name = choose_tracker(trainer.settings.tracker)
        self.tracker = None
        if trainer.rank > 0 or self.name == "none":
            return
        settings = {name: str(value) for name, value in asdict(trainer.settings).items()}
        with self.failure_reported():
            self.tracker = TRACKERS[self.name](run_name(trainer.settings), settings)
            for row in trainer.log:  # a resumed run is drawn from its beginning
                self.tracker.add(row)

    def add(self, row: dict[str, float], passage: str) -> None:
        if self.tracker is not None:
            with self.failure_reported():
                self.tracker.add(row, passage)

    def close(self) -> None:
        if self.tracker is not None:
            with self.failure_reported():
                self.tracker.close()

    @contextlib.contextmanager
    def failure_reported(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # a tracker can raise anything
            self.tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print_notice(f"{self.name} failed ({reason}); training continues without charts")


def run_name(settings: Settings) -> str:
    """Names a run by its start, and by what differs from the defaults."""
    start = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    differences = []
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value != f.default and f.name not in ("device", "tracker"):
            differences.append(f"{f.name}={value.stem if isinstance(value, Path) else value}")
    return " ".join([start, *differences])


# ----------------------------------------------------------------------------------------
# The machine and the files
# ----------------------------------------------------------------------------------------


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, Any]) -> None:
    """Takes the averages of a saved optimizer, and none of its settings.

    Raises InputError if they do not fit the parameters.
    """
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": settings})
    for p, averages in optimizer.state.items():
        for name, average in averages.items():
            if average.dim() > 0 and average.shape != p.shape:
                raise InputError("the optimizer in the checkpoint does not fit the model")
            averages[name] = average.contiguous()


def choose_precision(settings: Settings, device: torch.device) -> str:
    """Returns "bf16" where it is asked for or fast, else "fp32", the precision of products."""
    if device.type == "mps":
        # In bfloat16 its attention lets a character use later ones (pytorch issue 195910).
        if settings.precision == "bf16":
            raise InputError("--precision bf16 gives wrong results with --device mps: use fp32")
        return "fp32"
    if settings.precision != "auto":
        return settings.precision

    if device.type == "cuda":
        # In what remains in 32 bits, TF32 rounds the factors of a product to 10 bits, for speed.
        torch.set_float32_matmul_precision("high")
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Where matrices are small, converting to bf16 and back takes longer than it saves.
        is_fast = cpu_is_fast_in_bf16() and settings.n_embd >= 128
    return "bf16" if is_fast else "fp32"


def cpu_is_fast_in_bf16() -> bool:
    """True if the processor has AMX, or is not Intel's and has AVX-512 bfloat16.

    On an Intel processor without AMX, training took 1.5 times as long in bfloat16.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # torch is older than 2.12
        return False
    processor = torch.cpu.get_capabilities()
    if "Intel" in processor.get("cpu_name", ""):
        return processor.get("amx_bf16", False)
    return processor.get("avx512_bf16", False)


def check_outputs(settings: Settings) -> None:
    """Raises InputError or OSError now if the files of the run could not be written later.

    Only files that an earlier run has written are replaced.
    """
    for path in (settings.model, settings.checkpoint):
        if path.exists():
            try:
                is_checkpoint = "optimizers" in load_content(path)["metadata"]
            except InputError as error:
                raise InputError(f"{error}: move it, or name another --model") from error
            if is_checkpoint != (path == settings.checkpoint):
                found = "a checkpoint" if is_checkpoint else "a model and not a checkpoint"
                raise InputError(f"{path} is {found}: move it, or name another --model")
    marks = {".csv": ",".join(LOG_COLUMNS), ".png": PICTURE_TITLE}
    for ending, mark in marks.items():
        path = settings.beside_model(ending)
        if path.exists() and mark.encode() not in path.read_bytes():
            raise InputError(f"{path} was not written by train.py: move it, or change --model")

    # A file with the longest of the names shows whether there can be files.
    trial = settings.beside_model(f".train.pth.{os.getpid()}.trial")
    write_file(trial, b"")
    trial.unlink()


# ----------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------


def main() -> None:
    use_utf8()
    settings = parse_arguments()
    try:
        run(settings)
        if dist.is_initialized():
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # a thread of the process group may still run, and would abort sys.exit
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports an end by Ctrl-C
    except MemoryError:
        sys.exit(f"error: {settings.data} does not fit into memory")
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory: raise --accumulate, or lower --batch-size")
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
    try:
        return Settings(**vars(arguments))
    except InputError as error:
        parser.error(str(error))


def run(settings: Settings) -> None:
    rank = 0
    world = 1
    if dist.is_torchelastic_launched():  # by torchrun
        dist.init_process_group()
        rank, world = dist.get_rank(), dist.get_world_size()
        if settings.device in ("auto", "cuda") and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # each process has its own GPU

    try:
        trainer = Trainer(settings, rank, world)
    except OSError as error:  # a file that cannot be read or written
        raise InputError(str(error)) from error
    losses_to_beat = []
    if rank == 0:
        describe_start(trainer)
        losses_to_beat = print_losses_to_beat(trainer)
    try:
        train(trainer, losses_to_beat)
    except KeyboardInterrupt:
        saved_step = trainer.log[-1]["step"] if trainer.log else 0
        if saved_step > 0:
            print_notice(f"stopped; add --resume to continue from step {saved_step}")
        else:
            print_notice("stopped before the first evaluation: nothing of this run is saved")
        raise
    if rank == 0:
        describe_end(trainer)


def describe_start(trainer: Trainer) -> None:
    settings = trainer.settings
    if settings.data == SAMPLE:
        print_notice(
            "for real books run: python bin/download.py, then bash bin/concatenate.sh, then this"
        )
    if trainer.step > 0:
        print_notice(f"continuing at step {trainer.step} of {settings.steps}")
    elif settings.resume:
        print_notice(f"there is no checkpoint {settings.checkpoint}: starting at step 0")
    if trainer.step == 0 and settings.model.exists():
        print_notice(f"this run will replace {settings.model}: name another --model to keep it")

    charts = "no charts"
    tracker = choose_tracker(settings.tracker)
    if tracker != "none":
        directory = "" if Path.cwd() == ROOT else f"cd {shlex.quote(str(ROOT))} && "
        charts = f"charts: {directory}{TRACKERS[tracker].open_with}"
    characters = len(trainer.train_ids) + len(trainer.val_ids)
    print_notice(
        f"{settings.data}: {characters:,} characters; {trainer.model.count_parameters():,} "
        f"parameters; {trainer.device} in {trainer.precision}; {charts}"
    )


def print_losses_to_beat(trainer: Trainer) -> list[float]:
    train_ids, val_ids = trainer.train_ids[-MAX_COUNTED:], trainer.val_ids[:MAX_PREDICTED]
    decode = trainer.tokenizer.decode
    losses = ngram_losses(decode(train_ids), decode(val_ids), trainer.tokenizer.vocab_size)
    names = ["uniform", "counting", "given 1 before", "2 before", "3 before", "4 before"]
    figures = ", ".join(f"{name} {loss:.3f}" for name, loss in zip(names, losses, strict=True))
    part = ""
    if len(train_ids) < len(trainer.train_ids) or len(val_ids) < len(trainer.val_ids):
        part = f", from {len(train_ids):,} characters, on {len(val_ids):,}"
    print(f"to beat: {figures} (nats/char{part})", flush=True)
    return losses


CONTEXT_WINDOWS = 1000  # for the losses by context


def describe_end(trainer: Trainer) -> None:
    """Shows what the best model has learned, and says what comes next."""
    settings = trainer.settings
    if not settings.model.exists():  # the run was finished before, and its model was moved
        return
    best, _, saved = load_model(settings.model, trainer.device)
    windows = evaluation_windows(trainer.val_ids, settings.context_length, CONTEXT_WINDOWS)
    losses = loss_by_context(best, windows)
    figures = ", ".join(f"{k}: {loss:.2f}" for k, loss in losses.items())
    print(f"by context: {figures}", flush=True)
    print_notice(f"a passage by the best model:\n{write_passage(best, trainer, 200)}\n")

    print_notice(
        f"{settings.model} is the model of step {saved['step']}, with the lowest validation loss, "
        f"{saved['val_loss']:.4f}; {settings.beside_model('.png')} shows the losses"
    )
    model_flag = ""
    if settings.model != MODEL_PATH:
        model_flag = f" --model {shlex.quote(str(settings.model))}"
    print_notice(
        f"next: python inference.py{model_flag}, or python show_params.py{model_flag}; "
        "to train longer, add --resume and raise --steps"
    )


if __name__ == "__main__":
    main()
