"""Trains the model on a text, and shows how it learns.

    python train.py                          train, on a GPU if there is one
    python train.py --resume                 continue a run that was interrupted
    torchrun --nproc-per-node 4 train.py     train with four processes that share each batch

Each field of `Settings` is also a flag: `batch_size` is `--batch-size`.
"""

import argparse
import contextlib
import csv
import gc
import hashlib
import io
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import (
    GPT,
    MODEL_PATH,
    ROOT,
    CharTokenizer,
    GPTConfig,
    InputError,
    cpu_capabilities,
    default_device,
    is_intel,
    is_out_of_memory,
    load_model,
    prepare_output,
    read_text,
    save_model,
    user_path,
    with_hyphens,
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
    maximum: float = 1e9,
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
    data: Path = setting(BOOKS, "the text to learn from, in UTF-8")
    model: Path = setting(MODEL_PATH, "the file for the best model")
    resume: bool = setting(False, "continue from the last checkpoint, which is beside the model")

    # The amount of work. The defaults take about four minutes on four cores.
    steps: int = setting(1400, "steps of the optimizer", 1)
    batch_size: int = setting(24, "windows of text in each step", 1)
    accumulate: int = setting(1, "split each batch into this many parts, to save memory", 1)

    # The model. A larger one learns more from each character, but reads fewer in the same time.
    context_length: int = setting(128, "characters in a window")
    n_layer: int = setting(4, "blocks")
    n_head: int = setting(4, "attention heads in each block")
    n_embd: int = setting(128, "channels")
    # On the sample (1,600 steps of 16 windows of 64), 0.1 raised the loss from 1.444 to 1.500.
    dropout: float = setting(0.0, "the probability that an activation is dropped in training")

    # The optimizer. After 400 steps on the sample: 1.464 with Muon, 2.117 with AdamW.
    optimizer: str = setting(
        "muon", "the optimizer of the blocks' matrices", choices=("muon", "adamw")
    )
    # The best of several from 0.006 to 0.03, for Muon and for AdamW beside it. Where AdamW moves
    # the matrices too, a tenth of it is usual.
    learning_rate: float = setting(0.014, "the highest rate; --optimizer adamw uses a tenth", 0)
    # Muon averages about 10 gradients. The first averages hold fewer and are noisier, but its steps
    # would be just as large: so the rate begins low.
    warmup_steps: int = setting(20, "steps in which the learning rate rises", 0)
    # On the sample 0.4 gave 1.442, 0.3 gave 1.450; on the books they differ by less than 0.003.
    weight_decay: float = setting(0.4, "how strongly the matrices are pulled toward zero", 0)
    # The norm falls from 1.3 to about 0.5 in 100 steps: only an unusual batch is clipped.
    grad_clip: float = setting(1.0, "the norm to which a larger gradient is reduced", 1e-9)

    # Evaluation takes time from training: with 400 windows it took a tenth of the run.
    eval_interval: int = setting(100, "steps between evaluations, each with a checkpoint", 1)
    eval_windows: int = setting(160, "windows for evaluating each part of the text", 1)
    val_fraction: float = setting(0.1, "the share of the text held out, its end", 0.001, 0.999)

    # The machine
    seed: int = setting(1, "makes a run repeatable", 0, 2**63)
    device: str = setting(default_device(), "cpu, cuda or mps")
    precision: str = setting(
        "auto",
        "for matrix products; auto is bf16 where it is fast, else fp32, with TF32 on a GPU",
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
        if self.model.name == "" or self.model.is_dir():
            raise InputError(f"--model {self.model} must be a file, not a directory")
        self.model_config(vocab_size=1)  # raises InputError for an invalid size
        if self.batch_size % self.accumulate != 0:
            raise InputError(
                f"--batch-size ({self.batch_size}) must be a multiple of "
                f"--accumulate ({self.accumulate})"
            )
        if self.device.startswith("mps") and self.precision == "bf16":
            # In bfloat16 its attention lets a character use later ones (pytorch issue 195910).
            raise InputError("--precision bf16 gives wrong results with --device mps: use fp32")

    def model_config(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(
            vocab_size=vocab_size,
            context_length=self.context_length,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            dropout=self.dropout,
        )

    @property
    def checkpoint(self) -> Path:
        """The file that `resume` needs: models/model-scifi.train.pth for models/model-scifi.pth."""
        return self.beside_model(".train.pth")

    @property
    def loss_log(self) -> Path:
        """The file with a row for each evaluation: models/model-scifi.csv."""
        return self.beside_model(".csv")

    def beside_model(self, ending: str) -> Path:
        return self.model.with_name(self.model.name.removesuffix(".pth") + ending)

    @property
    def characters_per_step(self) -> int:
        return self.batch_size * self.context_length


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


# ----------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------


def split_text(ids: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Splits a text into the part to learn from and the part to validate on, its end.

    Each part must have a window and the character that follows it; else raises InputError.
    """
    val_length = round(len(ids) * settings.val_fraction)
    window = settings.context_length + 1
    if min(val_length, len(ids) - val_length) < window:
        smaller_fraction = min(settings.val_fraction, 1 - settings.val_fraction)
        needed = math.ceil((window + 1) / smaller_fraction)
        raise InputError(
            f"{settings.data} has {len(ids)} characters; these settings need at least {needed}"
        )
    return ids[:-val_length], ids[-val_length:]


def evaluation_windows(ids: Tensor, context_length: int, count: int) -> Tensor:
    """Returns up to `count` windows, `(N, T + 1)`, evenly spread over the text.

    No character is predicted twice.
    """
    stride = max(context_length, (len(ids) - context_length - 1) // count)
    starts = range(0, len(ids) - context_length, stride)[:count]
    return torch.stack([ids[start : start + context_length + 1].long() for start in starts])


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
        polynomial = torch.baddbmm(x2, x2, x2, beta=b, alpha=c)  # b x^2 + c x^4
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b x^2 + c x^4) x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: for the matrices inside a network.

    A gradient is dominated by a few directions, so that plain momentum hardly moves a matrix in
    the others. Orthogonalizing the momentum makes the update equally large in all of them.

    From Jordan, 2024, https://kellerjordan.github.io/posts/muon, with the scale of Liu et al.,
    2025, section 2.2, https://arxiv.org/abs/2502.16982, and an idea of Li et al., 2025
    (NorMuon), https://arxiv.org/abs/2510.05491. `torch.optim.Muon` is about as fast where the
    processor computes in bfloat16, and takes 40 times as long on a CPU that does not.

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
            matrices = []
            updates = []
            for p in group["params"]:
                update = self.momentum_update(p, group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                matrices += p.chunk(group["stacked"])  # views: to change them is to change p
                updates += update.chunk(group["stacked"])
            # One product of many matrices is faster than many products.
            for matrix_batch, update_batch in batches_of_one_shape(matrices, updates):
                self.apply_updates(matrix_batch, update_batch, group["lr"])

    def momentum_update(self, p: Tensor, momentum: float) -> Tensor:
        """Averages the gradients, and looks one step ahead (Nesterov).

        `a.lerp(b, momentum)` is `momentum * b + (1 - momentum) * a`.
        """
        average = self.state[p].get("average", p.grad)  # at first, the first gradient
        average = p.grad.lerp(average, momentum)
        self.state[p]["average"] = average
        return p.grad.lerp(average, momentum)

    def apply_updates(self, matrices: list[Tensor], updates: list[Tensor], lr: float) -> None:
        """Moves matrices of one shape, none of which has more rows than columns."""
        x = orthogonalize(torch.stack(updates))  # (N, rows, columns)

        # Make all columns equally long, so that no channel moves faster than others. In the
        # feed-forward layers a column holds the weights of one of the 4 C hidden channels. NorMuon
        # does the same for the rows of each matrix, the outputs of its layer, with running
        # averages.
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)

        # Elements of a typical size of 0.2, as in AdamW's updates, so that one learning rate
        # suits matrices of all shapes (Liu et al.). In a column of length 1 the typical size is
        # 1 / sqrt(rows).
        scale = 0.2 * math.sqrt(x.size(1))
        for matrix, change in zip(matrices, x, strict=True):
            matrix.sub_(change, alpha=scale * lr)


def batches_of_one_shape(
    matrices: list[Tensor], updates: list[Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Groups matrices and their updates by shape; no matrix has more rows than columns.

    Those that have more are transposed: then x x^T is the smaller product, and in both layers of
    feed-forward a column belongs to a hidden channel.
    """
    batches: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = {}
    for matrix, update in zip(matrices, updates, strict=True):
        if matrix.size(0) > matrix.size(1):
            matrix, update = matrix.mT, update.mT
        batch = batches.setdefault(matrix.shape, ([], []))
        batch[0].append(matrix)
        batch[1].append(update)
    return list(batches.values())


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
    qkv, others = [], []
    for block in model.blocks:
        qkv.append(block.attention.qkv.weight)
        others.append(block.attention.output.weight)  # of the block, not of the model
        others.append(block.feed_forward.expand.weight)
        others.append(block.feed_forward.contract.weight)
    ids_of_matrices = {id(p) for p in qkv + others}
    rest = [p for p in model.parameters() if id(p) not in ids_of_matrices]

    decay = settings.weight_decay
    adamw_groups = [{"params": rest, "weight_decay": 0.0}]
    if settings.optimizer == "adamw":
        adamw_groups.append({"params": qkv + others, "weight_decay": decay})
    # Shorter memories than AdamW's usual 0.9 and 0.999: a run has few steps.
    adamw = torch.optim.AdamW(adamw_groups, betas=(0.8, 0.99), fused=True)
    if settings.optimizer == "adamw":
        return [adamw]

    queries_keys_values = {"params": qkv, "weight_decay": decay, "stacked": 3}
    muon = Muon([queries_keys_values, {"params": others, "weight_decay": decay}])
    return [muon, adamw]


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
        self.micro_batch_size = self.share_batch()
        self.device = use_device(settings)
        self.use_precision(choose_precision(settings, self.device))

        self.load_text()
        torch.manual_seed(self.seed())
        self.model = GPT(settings.model_config(self.tokenizer.vocab_size)).to(self.device)
        self.optimizers = make_optimizers(self.model, settings)

        self.step = 0  # steps done
        self.last_evaluation = -1  # the step of the last evaluation
        self.best_val_loss = math.inf
        self.best_step = 0  # the step of the best validation loss
        self.loss = torch.zeros(())  # of the last step
        self.grad_norm = torch.zeros(())
        self.tracked_runs: dict[str, str] = {}  # how each tracker finds this run again
        self.fixed_settings = self.make_fixed_settings()

        if settings.resume and settings.checkpoint.exists():
            self.load_checkpoint()
        self.parallel_model = self.make_parallel_model()  # of one process, the model itself
        if rank == 0:
            check_directory_is_writable(settings.model.parent)

    def share_batch(self) -> int:
        """Returns the number of windows that this process computes at once."""
        shares = self.world * self.settings.accumulate
        if self.settings.batch_size % shares != 0:
            raise InputError(
                f"--batch-size {self.settings.batch_size} must be a multiple of "
                f"{self.world} processes x {self.settings.accumulate} (--accumulate)"
            )
        return self.settings.batch_size // shares

    def use_precision(self, precision: str) -> None:
        """Computes matrix products in "fp32" or "bf16"; the weights are kept in 32 bits."""
        self.precision = precision
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=precision == "bf16"
        )

    def load_text(self) -> None:
        text, self.text_digest = read_text(self.settings.data)
        self.tokenizer = CharTokenizer.from_text(text)
        ids = self.tokenizer.encode(text)  # (characters,)
        self.characters = len(ids)
        self.train_ids, self.val_ids = split_text(ids, self.settings)
        context_length, count = self.settings.context_length, self.settings.eval_windows
        self.eval_windows = {
            "train": evaluation_windows(self.train_ids, context_length, count),
            "val": evaluation_windows(self.val_ids, context_length, count),
        }

    def make_fixed_settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that it continues.

        These are the sizes and the dropout, the text, what the losses measure, and what the saved
        state of the optimizers fits. The rest may change.
        """
        return {
            **asdict(self.model.config),
            "text": self.text_digest,
            "optimizer": self.settings.optimizer,
            "weight_decay": self.settings.weight_decay,
            "val_fraction": self.settings.val_fraction,
            "eval_windows": self.settings.eval_windows,
        }

    def make_parallel_model(self) -> Any:
        """Wraps the model so that processes average their gradients, and compiles it."""
        model = self.model
        if self.world > 1:
            self.check_processes_are_at_one_step()
            model = DistributedDataParallel(model)
            # Do not send the only buffer, the table of positions, before each step: it never
            # changes. (The argument of this name is deprecated, and its successor is new.)
            model.broadcast_buffers = False
        if self.settings.compile:
            model = torch.compile(model)
        return model

    def check_processes_are_at_one_step(self) -> None:
        steps = [0] * self.world
        dist.all_gather_object(steps, self.step)
        if len(set(steps)) > 1:
            raise InputError(
                f"the processes are at steps {steps}: all must see the same directory of --model"
            )

    # The randomness of a step depends on the seed and the step alone, so a resumed run draws
    # what the uninterrupted one would have drawn.

    def seed(self, *numbers: int) -> int:
        """Makes one seed of the run's seed and these numbers.

        Seeds in sequence could give related streams, and torch's CPU generator uses 32 bits of
        a seed: a hash makes 32 bits that depend on all of the input.
        """
        digest = hashlib.sha256(repr((self.settings.seed, *numbers)).encode()).hexdigest()
        return int(digest[:8], 16)

    def get_batch(self) -> Tensor:
        """Draws the windows of this process, `(B, T + 1)`, each anywhere in the training part."""
        generator = torch.Generator().manual_seed(self.seed(self.step))
        window = self.settings.context_length + 1
        places = len(self.train_ids) - window + 1
        starts = torch.randint(places, (self.settings.batch_size,), generator=generator)
        own_starts = starts.chunk(self.world)[self.rank].tolist()
        rows = torch.stack([self.train_ids[start : start + window] for start in own_starts]).long()
        if self.device.type == "cuda":
            return rows.pin_memory().to(self.device, non_blocking=True)  # copied while it computes
        return rows.to(self.device)

    def train_step(self) -> Tensor:
        """Does one step. Returns the loss as a tensor: reading its value waits for the device."""
        self.model.train()
        batch = self.get_batch()
        torch.manual_seed(self.seed(self.step, self.rank))  # for dropout, different in each process

        # The gradients of all parts of the batch add up.
        micro_batches = batch.split(self.micro_batch_size)
        losses = []
        for i, rows in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            with self.averaging_gradients(is_last):
                with self.autocast:
                    # The target of each character is the one after it: T predictions a window.
                    _, loss = self.parallel_model(rows[:, :-1], rows[:, 1:])
                loss = loss / len(micro_batches)
                loss.backward()
            losses.append(loss.detach())
        self.loss = torch.stack(losses).sum()

        # Reduce a gradient that is unusually large (Pascanu et al., 2013, section 3.2,
        # https://arxiv.org/abs/1211.5063). Both optimizers limit the size of a step, but such a
        # gradient would dominate their averages for many steps.
        self.grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.settings.grad_clip
        )

        # Muon's steps are scaled to the size of AdamW's, so that one rate serves both.
        learning_rate = self.learning_rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            # Autocast lets Muon multiply its matrices in bfloat16; AdamW has no products.
            with self.autocast:
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return self.loss

    def averaging_gradients(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Lets several processes average their gradients once a step, after its last part.

        Before that, each adds up its own. With one process this does nothing.
        """
        if self.world == 1 or is_last:
            return contextlib.nullcontext()
        return self.parallel_model.no_sync()

    def learning_rate(self, step: int) -> float:
        """The rate of a step, the first of which is step 0.

        It rises while the optimizers' averages fill, then falls in a straight line to zero:
        with ever smaller steps the noise of the batches averages out.
        """
        settings = self.settings
        highest = settings.learning_rate
        if settings.optimizer == "adamw":
            highest = 0.1 * highest
        warmup = min(1, (step + 1) / (settings.warmup_steps + 1))
        return highest * warmup * (1 - step / settings.steps)

    def is_finished(self) -> bool:
        return self.step >= self.settings.steps

    def evaluation_is_due(self) -> bool:
        """True in process 0 at every `eval_interval` steps and at the end, once."""
        if self.rank != 0 or self.step == self.last_evaluation:
            return False
        return self.step % self.settings.eval_interval == 0 or self.is_finished()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Computes the mean loss, in nats, of fixed windows of both parts of the text.

        Raises InputError if training has diverged.
        """
        self.check_loss_is_finite()
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
            raise InputError(
                f"step {self.step}: the validation loss is {losses['val']}; lower --learning-rate"
            )
        self.last_evaluation = self.step
        return losses

    def check_loss_is_finite(self) -> None:
        if not math.isfinite(self.loss + self.grad_norm):
            raise InputError(
                f"step {self.step}: the loss is {self.loss:.4g} and the norm of the gradient is "
                f"{self.grad_norm:.4g}; lower --learning-rate"
            )

    def save_if_best(self, val_loss: float) -> None:
        """Saves the model if its loss is the lowest so far."""
        if val_loss < self.best_val_loss:
            self.best_val_loss = val_loss
            self.best_step = self.step
            save_model(
                self.settings.model,
                self.model,
                self.tokenizer,
                step=self.step,
                val_loss=val_loss,
                text=path_to_remember(self.settings.data),
                text_digest=self.text_digest,
            )

    def save_checkpoint(self) -> None:
        """Saves what `load_checkpoint` needs."""
        self.check_loss_is_finite()
        save_model(
            self.settings.checkpoint,
            self.model,
            self.tokenizer,
            fixed_settings=self.fixed_settings,
            precision=self.precision,
            step=self.step,
            last_evaluation=self.last_evaluation,
            best_val_loss=self.best_val_loss,
            best_step=self.best_step,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            tracked_runs=self.tracked_runs,
        )

    def load_checkpoint(self) -> None:
        """Continues from the checkpoint. Raises InputError if it is of another run."""
        path = self.settings.checkpoint
        model, _, metadata = load_model(path)
        if "optimizers" not in metadata:
            raise InputError(f"{path} is a model and not a checkpoint")
        if "fixed_settings" not in metadata:
            raise InputError(f"{path} was saved by an earlier version: start without --resume")
        saved = metadata["fixed_settings"]
        if saved != self.fixed_settings:
            changed = {
                name: saved.get(name)
                for name, value in self.fixed_settings.items()
                if saved.get(name) != value
            }
            raise InputError(f"{path} was made with {changed}: use the same, or another --model")

        self.model.load_state_dict(model.state_dict())
        for optimizer, state in zip(self.optimizers, metadata["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if self.settings.precision == "auto":
            # Settings refuses a precision that does not suit the device.
            self.settings = replace(self.settings, precision=metadata["precision"])
            self.use_precision(self.settings.precision)
        self.step = metadata["step"]
        self.last_evaluation = metadata["last_evaluation"]
        self.best_val_loss = metadata["best_val_loss"]
        self.best_step = metadata["best_step"]
        self.tracked_runs = metadata["tracked_runs"]


def use_device(settings: Settings) -> torch.device:
    """Returns this process's device. Of several processes on a machine, each uses its own GPU."""
    device = torch.device(settings.device)
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", device.index or 0))
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        # TF32 rounds the factors of a product to 10 bits after the point, which is faster.
        tf32_or_full = "highest" if settings.precision == "fp32" else "high"
        torch.set_float32_matmul_precision(tf32_or_full)
    return device


def choose_precision(settings: Settings, device: torch.device) -> str:
    """Returns "bf16" where it is asked for or fast, else "fp32"."""
    if settings.precision != "auto":
        return settings.precision
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # Where matrices are small, converting between fp32 and bf16 takes longer than bf16 saves.
        is_fast = cpu_has_fast_bf16(cpu_capabilities()) and settings.n_embd >= 128
    else:
        is_fast = False
    return "bf16" if is_fast else "fp32"


def cpu_has_fast_bf16(processor: dict[str, Any]) -> bool:
    """True if the processor computes products faster in bfloat16 than in 32 bits.

    With AMX it does. With AVX-512 alone it depends on the maker: one machine took 0.6 times as
    long for a training step, but on an Intel Xeon with AVX-512 FP16 products ran at half speed.
    """
    if is_intel(processor):
        return processor.get("amx_bf16", False)
    return processor.get("avx512_bf16", False)


def path_to_remember(path: Path) -> str:
    """Returns a path in the project, or of a file elsewhere its name alone: models are shared."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def check_directory_is_writable(directory: Path) -> None:
    """Raises OSError now, rather than at the first evaluation."""
    directory.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()


# ----------------------------------------------------------------------------------------
# What counting can do, and what the model has learned
# ----------------------------------------------------------------------------------------

MAX_COUNTED = 2_000_000  # characters; more would take longer and change the losses little


def ngram_losses(train_ids: Tensor, val_ids: Tensor, vocab_size: int) -> list[float]:
    """Returns the losses, in nats, of what counting alone can do: the losses to beat.

    Every character of the validation part is predicted from nothing (uniform), from how often
    it occurs in the training part (unigram), and from how often it follows the character before
    it (bigram) or the two before it (trigram) there.

    Where a history is rare, Witten-Bell smoothing relies more on the shorter history
    (Witten and Bell, 1991; Chen and Goodman, 1998, section 2.5). With n(h c), how often the
    character c follows the history h, n(h), how often any does, and k(h), how many different
    characters do:

        p(c | h) = (n(h c) + k(h) p(c | h without its first character)) / (n(h) + k(h))
    """
    V = vocab_size
    text = torch.cat([train_ids[-2:], val_ids])  # the first characters have histories too
    probs = torch.full((len(val_ids),), 1 / V, dtype=torch.double)
    losses = [math.log(V)]
    for n in (1, 2, 3):
        ngrams, ngram_counts = ngram_codes(train_ids, n, V).unique(return_counts=True)

        # Division by V takes the last character of an n-gram away: its history is left. Each
        # different n-gram of a history is one more character that can follow it.
        histories, history_index, follower_kinds = (ngrams // V).unique_consecutive(
            return_inverse=True, return_counts=True
        )
        history_counts = torch.zeros_like(histories).index_add_(0, history_index, ngram_counts)

        codes = ngram_codes(text[3 - n :], n, V)  # the n-gram that ends with each character
        count = look_up(codes, ngrams, ngram_counts)  # n(h c)
        total = look_up(codes // V, histories, history_counts)  # n(h)
        kinds = look_up(codes // V, histories, follower_kinds)  # k(h)
        smoothed = (count + kinds * probs) / (total + kinds)
        probs = torch.where(total > 0, smoothed, probs)
        losses.append(-probs.log().mean().item())
    return losses


def ngram_codes(ids: Tensor, n: int, vocab_size: int) -> Tensor:
    """Returns a number for each n characters in a row: their ids as digits of base V."""
    count = len(ids) - n + 1
    codes = torch.zeros(count, dtype=torch.long)
    for i in range(n):
        codes = codes * vocab_size + ids[i : i + count]
    return codes


def look_up(wanted: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Returns the value of each wanted key, or 0. The keys are in ascending order."""
    if len(keys) == 0:
        return torch.zeros_like(wanted)
    places = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, values[places], 0)


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


def write_passage(trainer: Trainer, model: GPT, length: int) -> str:
    """Returns a text of the model, always with the same first character and the same draws."""
    first = trainer.eval_windows["val"][:1, :1].to(trainer.device)  # (1, 1)
    generator = torch.Generator().manual_seed(1)
    new_ids = list(model.generate(first, length - 1, 0.8, generator=generator))
    return trainer.tokenizer.decode(torch.cat([first[0], *new_ids]))


@torch.no_grad()
def attention_weights(model: GPT, ids: Tensor) -> list[Tensor]:
    """Returns the attention weights of each block, `(H, T, T)`, for a text of ids, `(T,)`."""
    weights = []

    def keep_weights(attention: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        q, k, _ = inputs
        weights.append(attention.weights(q, k)[0])

    hooks = [
        block.attention.scaled_dot_product.register_forward_hook(keep_weights)
        for block in model.blocks
    ]
    model(ids[None])
    for hook in hooks:
        hook.remove()
    return weights


def attention_image(weights: Tensor) -> Tensor:
    """Draws attention weights, `(H, T, T)`, side by side, with a white line after each head."""
    visible = weights.sqrt()  # so that small weights can be seen
    heads = F.pad(visible, (0, 1), value=1.0)  # (H, T, T + 1)
    return enlarge(torch.cat(list(heads), dim=1))  # (T, H (T + 1))


def enlarge(image: Tensor) -> Tensor:
    """Makes an image, `(height, width)`, about 400 pixels high by repeating its pixels."""
    zoom = math.ceil(384 / image.size(0))
    return image.repeat_interleave(zoom, dim=0).repeat_interleave(zoom, dim=1).cpu()


# ----------------------------------------------------------------------------------------
# Trackers
# ----------------------------------------------------------------------------------------


class AimTracker:
    """Shows runs with aim, https://aimstack.io. Its files are in `.aim`."""

    name = "aim"
    install_with = "pip install aim (for Python 3.11 and 3.12)"
    open_with = "aim up"
    directory = ".aim"

    def __init__(self) -> None:
        import aim

        self.aim = aim
        self.run: Any = None

    def open(self, name: str, identity: str | None, settings: dict[str, Any], step: int) -> str:
        """Opens a run, a new one if it has no identity yet. Returns its identity."""
        options = {"system_tracking_interval": None, "capture_terminal_logs": False}
        self.run = self.aim.Run(identity, repo=ROOT, **options)
        if identity is None:
            self.run.name = name
        self.run["hparams"] = settings
        return self.run.hash

    def add_numbers(self, numbers: dict[str, float], step: int, part: str | None = None) -> None:
        """Adds numbers to charts; `part` is "train" or "val", which are drawn in one chart."""
        context = {} if part is None else {"subset": part}
        self.run.track(numbers, step=step, context=context)

    def add_text(self, name: str, text: str, step: int) -> None:
        self.run.track(self.aim.Text(text), name=name, step=step)

    def add_image(self, name: str, image: Tensor, caption: str, step: int) -> None:
        """Adds an image, `(height, width)`, from 0, black, to 1, white."""
        self.run.track(self.aim.Image(image, caption=caption), name=name, step=step)

    def close(self) -> None:
        if self.run is not None:
            self.run.close()


class TensorBoardTracker:
    """Shows runs with TensorBoard, through `torch.utils.tensorboard`. Its files are in `runs`."""

    name = "tensorboard"
    install_with = "pip install tensorboard"
    open_with = "tensorboard --logdir runs"
    directory = "runs"

    def __init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.make_writer = SummaryWriter
        self.writers: dict[str, Any] = {}

    def open(self, name: str, identity: str | None, settings: dict[str, Any], step: int) -> str:
        """Opens a run, a new one if it has no identity yet. Returns its identity."""
        identity = identity or re.sub(r"[^\w=.-]+", "_", name)
        # Drop what a killed run wrote after its checkpoint. Two writers let the losses of both
        # parts appear in one chart.
        for part in ("train", "val"):
            directory = ROOT / "runs" / identity / part
            self.writers[part] = self.make_writer(directory, purge_step=step)
        rows = [f"| {setting} | {value} |" for setting, value in settings.items()]
        self.add_text("settings", "\n".join(["| setting | value |", "| --- | --- |", *rows]), step)
        return identity

    def add_numbers(self, numbers: dict[str, float], step: int, part: str | None = None) -> None:
        """Adds numbers to charts; `part` is "train" or "val", which are drawn in one chart."""
        writer = self.writers[part or "train"]
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def add_text(self, name: str, text: str, step: int) -> None:
        self.writers["train"].add_text(name, text, step)

    def add_image(self, name: str, image: Tensor, caption: str, step: int) -> None:
        """Adds an image, `(height, width)`, from 0, black, to 1, white."""
        self.writers["train"].add_image(name, image, step, dataformats="HW")
        self.add_text(f"{name} (caption)", caption, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


TRACKERS = {"aim": AimTracker, "tensorboard": TensorBoardTracker}


def make_tracker(name: str) -> AimTracker | TensorBoardTracker | None:
    """Returns the tracker of that name; for "auto" the first that can be imported, or None.

    Raises InputError if the named tracker cannot be imported.
    """
    if name == "none":
        return None
    for candidate, tracker in TRACKERS.items():
        if name not in ("auto", candidate):
            continue
        try:
            return tracker()
        except Exception as error:  # a broken installation can raise anything
            if name != "auto":
                reason = describe(error)
                advice = f"install it with {tracker.install_with}, or use --tracker none"
                raise InputError(f"--tracker {name} cannot be used ({reason}): {advice}") from error
    return None


class Tracking:
    """Sends evaluations to a tracker, if there is one. Its failures never end training."""

    def __init__(self, tracker: AimTracker | TensorBoardTracker | None) -> None:
        self.tracker = tracker
        self.is_open = False
        self.reported: set[str] = set()  # failures, each of which is reported once

    def track(self, trainer: Trainer, losses: dict[str, float], speed: float) -> None:
        """Tracks an evaluation. `speed` is in characters per second."""
        if self.tracker is None:
            return
        with self.failures_reported():
            self.open(trainer)
            self.track_numbers(trainer, losses, speed)
            self.tracker.add_text(
                "passage", write_passage(trainer, trainer.model, 100), trainer.step
            )
            if trainer.step == 0:
                table = enlarge(trainer.model.positions / 2 + 0.5)
                self.tracker.add_image("positions", table, "each row is a position", trainer.step)
            is_fourth = trainer.step % (4 * trainer.settings.eval_interval) == 0
            if is_fourth and not trainer.is_finished():
                self.track_attention(trainer, trainer.model, f"step {trainer.step}")

    def track_best(self, trainer: Trainer, best: GPT) -> None:
        """Tracks the attention weights of the best model, at the end of the run."""
        if self.tracker is None:
            return
        with self.failures_reported():
            self.open(trainer)
            self.track_attention(trainer, best, f"the best model, of step {trainer.best_step}")

    @contextlib.contextmanager
    def failures_reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.report(error)
            self.close()

    def open(self, trainer: Trainer) -> None:
        if self.is_open:
            return
        settings = {
            **{name: str(value) for name, value in asdict(trainer.settings).items()},
            **trainer.fixed_settings,
            "characters": trainer.characters,
            "parameters": trainer.model.config.parameter_count,
            "precision": trainer.precision,
            "torch": str(torch.__version__),
        }
        name = run_name(trainer.settings)
        identity = trainer.tracked_runs.get(self.tracker.name)
        try:
            identity = self.tracker.open(name, identity, settings, trainer.step)
        except Exception as error:
            if identity is None:
                raise
            self.report(error, "the run is not found: a new one is started")
            identity = self.tracker.open(name, None, settings, trainer.step)
        trainer.tracked_runs[self.tracker.name] = identity
        self.is_open = True

    def track_numbers(self, trainer: Trainer, losses: dict[str, float], speed: float) -> None:
        for part, loss in losses.items():
            numbers = {"loss": loss, "bits_per_character": loss / math.log(2)}
            self.tracker.add_numbers(numbers, trainer.step, part)
        if trainer.step > 0:
            numbers = {
                "learning_rate": trainer.learning_rate(trainer.step - 1),
                "gradient_norm": trainer.grad_norm.item(),
                "characters_per_second": speed,
            }
            self.tracker.add_numbers(numbers, trainer.step)

    def track_attention(self, trainer: Trainer, model: GPT, source: str) -> None:
        # Few characters, so that their squares can be told apart.
        length = min(32, trainer.settings.context_length)
        window = trainer.eval_windows["val"][0, :length].to(trainer.device)  # (T,)
        text = trainer.tokenizer.decode(window)
        for i, weights in enumerate(attention_weights(model, window)):
            caption = (
                f"{source}, block {i}, one square for each head. Row t is how much character t "
                f"takes from each character up to itself, from black (nothing) to white (all), "
                f"as square roots. Text: {text!r}"
            )
            self.tracker.add_image(
                f"attention {i}", attention_image(weights), caption, trainer.step
            )

    def report(self, error: Exception, consequence: str = "tried again later") -> None:
        message = f"tracking with {self.tracker.name} failed ({describe(error)}): {consequence}"
        if message not in self.reported:
            self.reported.add(message)
            advice = f"If it fails again, delete {self.tracker.directory}, or use --tracker none."
            print_notice(f"{message}. Training continues. {advice}")

    def close(self) -> None:
        self.is_open = False
        if self.tracker is not None:
            with contextlib.suppress(Exception):  # what failed may fail to close, too
                self.tracker.close()


def run_name(settings: Settings) -> str:
    """Names a run by what differs from the defaults, and by its start."""
    start = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    not_named = ("model", "resume", "device", "tracker")
    differences = []
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value != f.default and f.name not in not_named:
            differences.append(f"{f.name}={value.stem if isinstance(value, Path) else value}")
    return " ".join([*(differences or ["defaults"]), start])


# ----------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------

LOSS_INTERVAL = 10  # steps between readings of the loss of a batch


def train(trainer: Trainer, tracking: Tracking) -> int:
    """Trains until the last step or until a signal. Returns the number of the signal, or 0."""
    stop_signal = StopSignal(trainer.world)
    loss_log = LossLog(trainer)
    with Progress(trainer) as progress:
        while True:
            if trainer.evaluation_is_due():
                speed = progress.speed()
                losses = trainer.evaluate()
                progress.print_losses(losses, speed)
                loss_log.add(trainer, losses, speed)
                tracking.track(trainer, losses, speed)
                if trainer.step > 0:  # an untrained model must not replace a trained one
                    trainer.save_if_best(losses["val"])
                    trainer.save_checkpoint()
                progress.restart_clock()

            if trainer.is_finished():
                return 0
            signal_number = stop_signal.agreed_number()
            if signal_number != 0:
                return stop(trainer, signal_number)

            trainer.train_step()
            if trainer.step % LOSS_INTERVAL == 0:  # a GPU has to finish its work first
                trainer.check_loss_is_finite()
            progress.update()


def stop(trainer: Trainer, number: int) -> int:
    if trainer.rank == 0 and trainer.step > 0:
        trainer.save_checkpoint()
        print_notice(f"stopped at step {trainer.step}: add --resume to the command to continue")
    return number


class StopSignal:
    """Records Ctrl-C and requests to terminate, so that a step ends before the process does.

    A second signal of the same kind ends it at once.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.received = 0  # the number of the signal that this process has received, or 0
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def agreed_number(self) -> int:
        """Returns the number of the signal that any process has received, or 0.

        All processes get the same number, so they stop after the same step. A signal that arrives
        while they communicate counts after the next step.
        """
        highest = torch.tensor(self.received)
        if self.world > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)


class Progress:
    """The progress bar, if standard error is a terminal, and a line for each evaluation."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.characters_per_step = trainer.settings.characters_per_step
        self.bar = tqdm(
            total=trainer.settings.steps * self.characters_per_step,
            initial=trainer.step * self.characters_per_step,
            unit="char",
            unit_scale=True,
            dynamic_ncols=True,
            disable=True if trainer.rank != 0 else None,  # None: unless it is a terminal
        )
        self.restart_clock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def restart_clock(self) -> None:
        self.start_step = self.trainer.step
        self.start_time = time.perf_counter()

    def speed(self) -> float:
        """The characters per second since the clock was started."""
        steps = self.trainer.step - self.start_step
        return steps * self.characters_per_step / (time.perf_counter() - self.start_time)

    def update(self) -> None:
        """Moves the bar by a step."""
        self.bar.update(self.characters_per_step)
        if not self.bar.disable and self.trainer.step % LOSS_INTERVAL == 0:
            self.bar.set_postfix(loss=f"{self.trainer.loss:.3f}", refresh=False)

    def print_losses(self, losses: dict[str, float], speed: float) -> None:
        """Prints an evaluation, and in a log file, which has no bar, the time left."""
        step, val_loss = self.trainer.step, losses["val"]
        line = f"step {step}: train loss {losses['train']:.4f}, val loss {val_loss:.4f}"
        line += f" ({val_loss / math.log(2):.2f} bits/char)"
        steps_left = self.trainer.settings.steps - step
        if self.bar.disable and steps_left > 0 and speed > 0:
            seconds = steps_left * self.characters_per_step / speed
            line += f", {tqdm.format_interval(seconds)} left"
        with self.bar.external_write_mode():
            print(line, flush=True)


class LossLog:
    """A CSV file beside the model with a row for each evaluation, which any program can plot.

    Raises InputError if the file of that name is something else.
    """

    columns = ("step", "train_loss", "val_loss", "learning_rate", "characters_per_second")

    def __init__(self, trainer: Trainer) -> None:
        self.path = trainer.settings.loss_log
        self.rows: list[list[str]] = []
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8-sig", errors="replace")
            try:
                rows = list(csv.reader(io.StringIO(text)))
            except csv.Error:
                rows = []
            if not rows or tuple(rows[0]) != self.columns:
                raise InputError(f"{self.path} is not a log of losses: move it, or change --model")
            if trainer.step > 0:  # a resumed run: drop the rows logged after its checkpoint
                numbered = [row for row in rows[1:] if row and row[0].isdecimal()]
                self.rows = [row for row in numbered if int(row[0]) <= trainer.step]

    def add(self, trainer: Trainer, losses: dict[str, float], speed: float) -> None:
        row = [
            str(trainer.step),
            f"{losses['train']:.5f}",
            f"{losses['val']:.5f}",
            f"{trainer.learning_rate(trainer.step - 1):.6g}",
            f"{speed:.0f}",
        ]
        self.rows.append(row)
        if trainer.step > 0:  # its log must not replace that of a trained model
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
            write_file(self.path, text.getvalue().encode())


def print_notice(message: str) -> None:
    """Prints a line on standard error, above the progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


# ----------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------


def main() -> None:
    prepare_output()
    settings, tracker = parse_arguments()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save

    rank = 0
    world = 1
    store = None  # what the processes share, if torchrun has started several
    try:
        if "WORLD_SIZE" in os.environ:  # started by torchrun
            rank, world, store = join_processes(settings)
        status = run(settings, Tracking(tracker), rank, world)
    except (OSError, InputError, RuntimeError, MemoryError) as error:
        status = 1
        if store is None or is_first_to_fail(store):
            report_error(error, settings, world)
    # By now nothing refers to the model any more, neither a variable nor a traceback.
    if store is not None:
        leave_processes()
    sys.exit(status)


def parse_arguments() -> tuple[Settings, AimTracker | TensorBoardTracker | None]:
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
            kind = user_path if f.type is Path else f.type
            parser.add_argument(
                flag_name(f.name), type=kind, default=f.default, choices=choices, help=help
            )
    given = [with_hyphens(argument) for argument in sys.argv[1:]]
    if any(argument.partition("=")[0] == "--no-aim" for argument in given):
        parser.error("--no-aim has become --tracker none")
    arguments = parser.parse_args(given)
    try:
        settings = Settings(**vars(arguments))
        check_device(settings)
        is_main_process = os.environ.get("RANK", "0") == "0"
        tracker = make_tracker(settings.tracker) if is_main_process else None
    except InputError as error:
        parser.error(str(error))
    return settings, tracker


def check_device(settings: Settings) -> None:
    """Raises InputError if the device cannot be used."""
    if settings.device.startswith("mps") and "WORLD_SIZE" in os.environ:
        raise InputError("several processes cannot train with --device mps: use --device cpu")
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {settings.device}: torch finds no GPU here; try cpu")
    try:
        device = use_device(settings)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {settings.device} cannot be used here: try cpu") from error


def run(settings: Settings, tracking: Tracking, rank: int, world: int) -> int:
    """Trains as the settings say. Returns the exit status."""
    if settings.data == BOOKS and not BOOKS.exists() and SAMPLE.exists():
        settings = replace(settings, data=SAMPLE)
        if rank == 0:
            print_notice(
                "training on data/sample.txt, since there is no data/scifi.txt: for real books run "
                "python bin/download.py, then bash bin/concatenate.sh"
            )
    starts_anew = not (settings.resume and settings.checkpoint.exists())
    if rank == 0 and starts_anew and settings.model.exists():
        warn_of_replacement(settings.model)

    trainer = Trainer(settings, rank, world)
    if rank == 0:
        describe_start(trainer, tracking)
    if trainer.is_finished() and not trainer.evaluation_is_due():
        if rank == 0:
            print_notice(
                f"already at step {trainer.step} of {settings.steps}: raise --steps to train longer"
            )
        return 0
    if rank == 0 and trainer.step == 0:
        print_losses_to_beat(trainer)
    stopped_by = train(trainer, tracking)
    if rank == 0 and not stopped_by:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # everything is saved
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        describe_end(trainer, tracking)
    tracking.close()
    return 128 + stopped_by if stopped_by else 0  # as a shell reports an end by a signal


def warn_of_replacement(path: Path) -> None:
    try:
        _, _, metadata = load_model(path)
        details = f" (step {metadata['step']}, validation loss {metadata['val_loss']:.4f})"
    except (OSError, InputError, KeyError):
        details = ""
    print_notice(f"this run will replace {path}{details}: name another --model to keep it")


def describe_start(trainer: Trainer, tracking: Tracking) -> None:
    settings = trainer.settings
    if settings.resume and trainer.step == 0 and not settings.checkpoint.exists():
        print_notice(f"there is no checkpoint {settings.checkpoint}: starting at step 0")
    if trainer.step > 0:
        print_notice(f"continuing at step {trainer.step} of {settings.steps}")
    charts = "no tracker"
    if tracking.tracker is not None:
        charts = (
            f"tracked with {tracking.tracker.name}, to be opened with: {open_command(tracking)}"
        )
    print_notice(
        f"{trainer.model.config.parameter_count:,} parameters, {trainer.characters:,} characters, "
        f"{trainer.device} in {trainer.precision}, {charts}"
    )


def open_command(tracking: Tracking) -> str:
    """The command that shows the charts, which has to be run in the project's directory."""
    command = tracking.tracker.open_with
    return command if Path.cwd() == ROOT else f"cd {ROOT} && {command}"


def print_losses_to_beat(trainer: Trainer) -> None:
    train_ids, val_ids = trainer.train_ids[-MAX_COUNTED:], trainer.val_ids[:MAX_COUNTED]
    losses = ngram_losses(train_ids, val_ids, trainer.tokenizer.vocab_size)
    names = ("uniform", "unigram", "bigram", "trigram")
    figures = ", ".join(f"{name} {loss:.3f}" for name, loss in zip(names, losses, strict=True))
    part = ""
    if trainer.characters > len(train_ids) + len(val_ids):
        part = f", from {MAX_COUNTED:,} characters of each part"
    print(f"to beat: {figures} (nats/char on the validation text{part})", flush=True)


CONTEXT_WINDOWS = 1000  # for the losses by context


def describe_end(trainer: Trainer, tracking: Tracking) -> None:
    """Shows what the best model has learned, and says what comes next."""
    settings = trainer.settings
    best, _, _ = load_model(settings.model, trainer.device)
    windows = evaluation_windows(trainer.val_ids, settings.context_length, CONTEXT_WINDOWS)
    losses = loss_by_context(best, windows)
    if losses:  # none with a context of one character
        figures = ", ".join(f"{k}: {loss:.2f}" for k, loss in losses.items())
        print(f"by context: {figures}", flush=True)
    print_notice(f"a passage by the best model:\n{write_passage(trainer, best, 200)}\n")
    tracking.track_best(trainer, best)

    print_notice(
        f"{settings.model} is the model of step {trainer.best_step}, "
        f"with the lowest validation loss, {trainer.best_val_loss:.4f}"
    )
    model_flag = (
        "" if settings.model == MODEL_PATH else f" --model {shlex.quote(str(settings.model))}"
    )
    print_notice(
        f"next: python inference.py{model_flag}, or python show_params.py{model_flag}; "
        "to train longer, add --resume and raise --steps"
    )


def report_error(error: Exception, settings: Settings, world: int) -> None:
    """Prints one line about a wrong input or a failing machine; raises the error if it is a bug."""
    if is_out_of_memory(error):
        message = "out of memory: raise --accumulate, or lower --batch-size or --context-length"
    elif isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError | InputError):
        message = str(error)
    elif world > 1 or settings.compile:  # another process is gone, or there is no compiler
        message = str(error).partition("\n")[0]
    else:
        raise error
    print_notice(f"error: {message}")


def describe(error: Exception) -> str:
    """Returns the type and the reason in one line; some errors have no reason."""
    reason = " ".join(str(error).split())
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


# Several processes, started by torchrun


def join_processes(settings: Settings) -> tuple[int, int, dist.Store]:
    """Joins the others. Returns this process's number, how many there are, and a common store."""
    try:
        store, rank, world = next(dist.rendezvous("env://"))
    except ValueError as error:  # a variable that torchrun sets is missing
        raise InputError(str(error)) from error
    backend = "cpu:gloo,cuda:nccl" if settings.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return rank, world, store


def is_first_to_fail(store: dist.Store) -> bool:
    """True in the first process that asks: when one fails, the others do too, but say less."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return store.add(f"failures in attempt {attempt}", 1) == 1


def leave_processes() -> None:
    """Ends the communication, after everything that uses it is gone.

    The wrapper of the model keeps the communication's threads alive, and reference cycles keep
    the wrapper alive. A thread that still runs when Python ends can abort the process.
    """
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
