"""Trains the model on a text, and shows how it learns. Each setting is also a flag: `steps` is `--steps`."""

import argparse
import codecs
import hashlib
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, CharTokenizer, GPTConfig, load_model, save_model

ROOT = Path(__file__).resolve().parent
FASTEST = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def setting(default: Any, help: str, low: float = -math.inf, high: float = 1e9, **flag: Any) -> Any:
    """A field of the settings: its default, its line of help, the numbers that it admits."""
    flag = {"default": default, "help": help, **flag}
    return field(default=default, metadata={"flag": flag, "range": (low, high)})


@dataclass(frozen=True)
class Settings:
    """What a run depends on. Raises ValueError for a number out of its range."""

    data: Path = setting(ROOT / "data/scifi.txt", "the text to learn, UTF-8")
    model: Path = setting(ROOT / "models/model-scifi.pth", "the file for the best model")
    resume: bool = setting(False, "go on from the last checkpoint beside the model")
    steps: int = setting(1000, "steps of the optimizer", 1)
    batch_size: int = setting(24, "windows of text in a step", 1)
    accumulate: int = setting(1, "parts that a batch is computed in, one after the other, to save memory", 1)
    context_length: int = setting(128, "characters in a window", 1, 2**16)
    n_layer: int = setting(4, "blocks", 1)
    n_head: int = setting(4, "attention heads in a block", 1)
    n_embd: int = setting(128, "channels", 1)
    dropout: float = setting(0.0, "share of activations dropped, against overfitting a small text", 0, 0.99)
    optimizer: str = setting("muon", "what moves the blocks' matrices", choices=("muon", "adamw"))
    learning_rate: float = setting(0.01, "the highest; adamw alone takes a tenth of it", 0)
    warmup_steps: int = setting(20, "steps in which the learning rate rises", 0)
    weight_decay: float = setting(0.0, "pull of the blocks' matrices toward zero", 0)
    grad_clip: float = setting(1.0, "the length to which longer gradients are cut", 1e-9)
    eval_interval: int = setting(100, "steps from one evaluation and checkpoint to the next", 1)
    eval_windows: int = setting(400, "windows that an evaluation reads of either part", 1)
    val_fraction: float = setting(0.1, "share of the text, its tail, held out for validation", 1e-9, 1 - 1e-9)
    seed: int = setting(1, "decides all that is random", 0, 2**63)
    device: str = setting(FASTEST, "cpu, cuda or mps")
    precision: str = setting("auto", "auto is bf16 where that is faster", choices=("auto", "fp32", "bf16"))
    compile: bool = setting(False, "compile the model first; pays on a GPU")
    aim: bool = setting(True, "track the run with aim")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), f.metadata["range"]
            if isinstance(value, int | float) and not low <= value <= high:
                flag = "--" + f.name.replace("_", "-")
                raise ValueError(f"{flag} is {value}, but must be from {low:g} to {high:g}")


def load_text(path: Path) -> tuple[Tensor, CharTokenizer, str]:
    """The ids, `(characters,)`, vocabulary and digest of a text. Raises OSError, ValueError if not UTF-8."""
    data = path.read_bytes()

    def parts() -> Iterator[str]:  # as one str it would take up to 4 bytes a character
        return codecs.iterdecode((data[i : i + 2**20] for i in range(0, len(data), 2**20)), "utf-8-sig")

    try:
        tokenizer = CharTokenizer.from_text(parts())
    except UnicodeDecodeError:
        try:
            data.decode()
        except UnicodeDecodeError as error:  # this one knows where
            bad = f"byte {data[error.start]:#04x} at position {error.start}"
            raise ValueError(f"{path} is not UTF-8 text ({bad}): convert it first") from None
    digest, ids = hashlib.sha256(data).hexdigest(), [tokenizer.encode(part) for part in parts()]
    data = b""  # no longer needed when the ids are there twice
    return torch.cat([tokenizer.encode(""), *ids]), tokenizer, digest


def split(ids: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The part to learn from, and its tail, held out. Raises ValueError if one is too short for a window."""
    window, share = settings.context_length + 1, settings.val_fraction
    tail = round(len(ids) * share)
    if min(tail, len(ids) - tail) < window:
        needed = math.ceil((window + 1) / min(share, 1 - share))
        raise ValueError(f"{settings.data} has {len(ids)} characters; these settings need at least {needed}")
    return ids[:-tail], ids[-tail:]


def fixed_windows(ids: Tensor, settings: Settings) -> Tensor:
    """The windows of each evaluation, evenly spread, none over another: `(N, T + 1)`."""
    side_by_side = ids.unfold(0, settings.context_length + 1, settings.context_length)
    last, count = len(side_by_side) - 1, min(len(side_by_side), settings.eval_windows)
    return side_by_side[torch.linspace(0, last, count, dtype=torch.float64).long()].long()


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers, of 32 bits, which is all that torch's CPU generator heeds."""
    return random.Random(repr(numbers)).getrandbits(32)


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal: a matrix moves in all directions alike (Jordan, 2024).

    torch.optim.Muon works in bfloat16, matrix by matrix, which takes a CPU without it 40 times as long as
    this: matrices of a shape together, in their own type. Queries, keys and values count as three.
    """

    def __init__(
        self, params: list[Tensor], weight_decay: float, lr: float = 0.01, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moves the matrices once."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for matrix in group["params"]:
                if not self.state[matrix]:
                    self.state[matrix]["average"] = torch.zeros_like(matrix)
                average = self.state[matrix]["average"].lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"])  # Nesterov's look ahead
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                count = 3 if matrix.size(0) == 3 * matrix.size(1) else 1
                for pair in zip(matrix.chunk(count), update.chunk(count), strict=True):
                    part, x = pair if pair[0].size(0) <= pair[0].size(1) else (pair[0].mT, pair[1].mT)  # wide
                    alike.setdefault(x.shape, []).append((part, x))
            for shape, pairs in alike.items():
                x = torch.stack([x for _, x in pairs])  # (N, rows, columns)
                x /= x.norm(dim=(1, 2), keepdim=True) + 1e-7
                for _ in range(5):  # Newton-Schulz, with Jordan's coefficients: all singular values near 1
                    gram = x @ x.mT
                    gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
                    x = torch.baddbmm(x, gram, x, beta=3.4445)
                size = 0.2 * math.sqrt(shape[1])  # as large as an update of AdamW (Liu et al., 2025)
                for (part, _), change in zip(pairs, x, strict=True):
                    part.sub_(change, alpha=size * group["lr"])


def make_optimizers(model: GPT, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices and AdamW for the rest, or AdamW for all. Only those matrices decay."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = [Muon(matrices, settings.weight_decay)] if settings.optimizer == "muon" else []
    groups = [{"params": rest, "weight_decay": 0.0}]
    groups += [] if muon else [{"params": matrices, "weight_decay": settings.weight_decay}]
    return [*muon, torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)]


def learning_rate(step: int, settings: Settings) -> float:
    """Up while the optimizers' averages fill, then down to zero, so that the batches' noise averages out."""
    highest = settings.learning_rate * (1.0 if settings.optimizer == "muon" else 0.1)
    return highest * min(1, (step + 1) / (settings.warmup_steps + 1)) * (1 - step / settings.steps)


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """The precision of matrix products: bf16 where it is faster or asked for, else fp32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # older torches cannot tell what a CPU has
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        fast = device.type == "cpu" and cpu.get("avx512_bf16", False) and settings.n_embd >= 128
    use = settings.precision == "bf16" or (settings.precision == "auto" and fast)
    return torch.autocast(device.type, torch.bfloat16, enabled=use)


class Run:
    """The text, the model, the optimizers, and how far they are: in the process `rank` of `world`.

    Raises OSError for files and ValueError for texts, settings and checkpoints that cannot be used.
    """

    def __init__(self, settings: Settings, rank: int = 0, world: int = 1) -> None:
        self.settings, self.rank, self.world = settings, rank, world
        if settings.batch_size % (world * settings.accumulate):
            parts = f"{world} processes x {settings.accumulate} parts"
            raise ValueError(f"--batch-size {settings.batch_size} does not divide by {parts}")
        self.device = torch.device(settings.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")  # TF32
        self.precision = autocast(settings, self.device)
        ids, self.tokenizer, digest = load_text(settings.data)
        learn, held_out = split(ids, settings)
        self.windows = learn.unfold(0, settings.context_length + 1, 1)  # (all, T + 1), without a copy
        self.looks = {"train": fixed_windows(learn, settings), "val": fixed_windows(held_out, settings)}
        sizes = {name: getattr(settings, name) for name in ("context_length", "n_layer", "n_head", "n_embd")}
        config = GPTConfig(self.tokenizer.vocab_size, **sizes, dropout=settings.dropout)
        self.fixed = {**asdict(config), "optimizer": settings.optimizer, "text": digest}
        self.step, self.best, self.aim_hash = 0, math.inf, None
        self.checkpoint = settings.model.with_suffix(".train.pth")
        torch.manual_seed(mixed_seed(settings.seed))
        resumed = settings.resume and self.checkpoint.exists()
        self.model, states = self.restore() if resumed else (GPT(config).to(self.device), [])
        self.model.train()
        self.optimizers = make_optimizers(self.model, settings)
        for optimizer, state in zip(self.optimizers, states, strict=resumed):
            optimizer.load_state_dict(state)
        self.forward = torch.compile(self.model) if settings.compile else self.model
        if world > 1:
            self.forward = DistributedDataParallel(self.forward)
        if rank == 0:
            if settings.resume and not resumed:
                print(f"there is no checkpoint {self.checkpoint}: starting anew", file=sys.stderr)
            settings.model.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=settings.model.parent).close()  # fails now, not after an hour

    def restore(self) -> tuple[GPT, list[dict]]:
        """The checkpoint's model and optimizers' states. Raises ValueError if its run was another."""
        model, _, facts = load_model(self.checkpoint, self.device)
        before = {**facts, **asdict(model.config)}
        for name, now in self.fixed.items():
            if (then := before.get(name)) != now:
                raise ValueError(f"{self.checkpoint} was trained with {name} {then}, not {now}")
        self.step, self.best, self.aim_hash = facts["step"], facts["best"], facts["aim"]
        return model, facts["optimizers"]

    def save(self) -> None:
        """Writes what `restore` needs."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        facts = {name: self.fixed[name] for name in ("optimizer", "text")}  # the sizes are the model's own
        facts |= {"step": self.step, "best": self.best, "aim": self.aim_hash, "optimizers": states}
        save_model(self.checkpoint, self.model, self.tokenizer, **facts)

    def take_step(self) -> tuple[Tensor, Tensor]:
        """Moves the weights once. Returns the loss and the gradient's length, on the device, not waited for.

        What is random depends on the seed and the step alone, so that no step needs to know those before it.
        """
        settings = self.settings
        torch.manual_seed(mixed_seed(settings.seed, self.step))
        starts = torch.randint(len(self.windows), (settings.batch_size,))
        if self.world > 1:  # each process takes its slice of the same batch, with its own dropout
            torch.manual_seed(mixed_seed(settings.seed, self.step, self.rank))
        rows = self.windows[starts.chunk(self.world)[self.rank]].long()
        rows = rows.pin_memory() if self.device.type == "cuda" else rows
        parts = rows.to(self.device, non_blocking=True).chunk(settings.accumulate)  # each (B, T + 1)
        losses = []
        for i, part in enumerate(parts, 1):
            alone = self.world > 1 and i < len(parts)  # the processes add up their gradients at the last part
            with self.forward.no_sync() if alone else nullcontext():
                with self.precision:
                    loss = self.forward(part[:, :-1], part[:, 1:])[1] / len(parts)
                loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, settings)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return torch.stack(losses).sum(), norm

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss on the fixed windows of both parts, in nats. Saves the model if it is the best."""
        self.model.eval()
        loss = {}
        for name, rows in self.looks.items():
            total = torch.zeros((), device=self.device)
            for part in rows.to(self.device).split(self.settings.batch_size):
                with self.precision:
                    total += self.model(part[:, :-1], part[:, 1:])[1] * len(part)
            loss[name] = total.item() / len(rows)
        self.model.train()
        if self.step > 0 and loss["val"] < self.best:
            self.best = loss["val"]
            save_model(self.settings.model, self.model, self.tokenizer, step=self.step, val_loss=self.best)
        return loss


class Tracker:
    """Shows a run in `aim up`. Without aim it does nothing, and says so."""

    def __init__(self, run: Run) -> None:
        self.run, self.aim, settings = run, None, run.settings
        try:
            if not settings.aim:
                raise ImportError("--no-aim")
            import aim

            quiet = {"system_tracking_interval": None, "capture_terminal_logs": False}
            self.aim = aim.Run(run.aim_hash, repo=str(ROOT), experiment="gpt", **quiet)
            self.aim.name = f"{settings.data.stem} {settings.n_layer}x{settings.n_embd} {settings.optimizer}"
            facts = {"parameters": sum(p.numel() for p in run.model.parameters()), "text": settings.data.name}
            facts |= {"characters": len(run.windows), "vocabulary": run.tokenizer.vocab_size}
            facts |= {"torch": str(torch.__version__), "device": str(run.device)}
            plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
            self.aim["hparams"], self.aim["run"] = plain, facts
            run.aim_hash = self.aim.hash
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Goes on without aim: training does not depend on it, whatever is wrong with it."""
        self.aim = None
        tqdm.write(f"losses are not tracked with aim: {' '.join(str(error).split())}", file=sys.stderr)

    def track(self, loss: dict[str, float], **numbers: float) -> None:
        """Adds an evaluation: losses, told apart by their context, numbers, a passage, at times pictures."""
        if not self.aim:
            return
        from aim import Text

        model, step, steps = self.run.model, self.run.step, self.run.settings.steps
        for subset, nats in loss.items():
            for name, value in (("loss", nats), ("bits_per_character", nats / math.log(2))):
                self.aim.track(value, name=name, step=step, context={"subset": subset})
        numbers["learning_rate"] = learning_rate(step, self.run.settings)
        for name, value in numbers.items() if step else ():  # there is none of them before the first step
            self.aim.track(value, name=name, step=step)
        model.eval()
        window = self.run.looks["val"][0].to(self.run.device)  # (T + 1,)
        new = model.generate(window[None, :1], 300, 0.8, generator=torch.Generator().manual_seed(1))
        passage = self.run.tokenizer.decode(torch.cat([window[:1], *new]))
        self.aim.track(Text(passage), name="passage", step=step)
        if step == 0:
            self.picture("positions", model.positions / 2 + 0.5, "a row a position, a column a channel")
        if 4 * step // steps > 4 * (step - self.run.settings.eval_interval) // steps:  # five times a run
            seen: list[Tensor] = []  # how each block's heads read the window, (H, T, T)
            heads = [block.attention.attention for block in model.blocks]
            hooks = [
                h.register_forward_hook(lambda h, x, _: seen.append(h.explicit(*x[:3])[1][0])) for h in heads
            ]
            with torch.no_grad():
                model(window[None, :-1])
            for i, (hook, weights) in enumerate(zip(hooks, seen, strict=True)):
                hook.remove()
                row = torch.cat([*weights.sqrt()], dim=1)  # (T, H T)
                self.picture("attention", row, f"block {i}, a square a head", block=i)
        model.train()

    def picture(self, name: str, values: Tensor, caption: str, **context: int) -> None:
        """Adds a picture of values from 0, black, to 1, white, `(rows, columns)`, enlarged to be seen."""
        from aim import Image

        zoom = math.ceil(384 / len(values))
        pixels = values.kron(torch.ones(zoom, zoom, device=values.device))
        self.aim.track(Image(pixels, caption=caption), name=name, step=self.run.step, context=context)


def agree(value: int) -> int:
    """The largest of the processes' values, so that all of them stop at the same step."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def train(run: Run) -> int:
    """The loop. Returns the signal that ended it early, or 0. Raises ValueError if the loss is no number."""
    settings, first, began, caught = run.settings, run.rank == 0, run.step, []
    chars = settings.batch_size * settings.context_length  # in a step

    def catch(number: int, _: Any) -> None:  # the step is finished first; a second signal ends it at once
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    look = {"unit": "char", "unit_scale": True, "mininterval": 0.5, "disable": not first}
    tracker = Tracker(run) if first else None
    losses, norm, drawn, since, clock = [], torch.zeros(()), False, run.step, time.perf_counter()
    done = False
    with tqdm(total=settings.steps * chars, initial=run.step * chars, dynamic_ncols=True, **look) as bar:
        while not done:
            ended_by = agree(max(caught, default=0))
            done = ended_by > 0 or run.step >= settings.steps
            due = run.step > began and (run.step % settings.eval_interval == 0 or run.step == settings.steps)
            if losses and (drawn or due or done):  # to look at the losses is to wait for the device
                values = torch.stack(losses).tolist()
                for step, value in enumerate(values, run.step - len(values)):
                    if not math.isfinite(value):
                        raise ValueError(f"the loss of step {step} is {value}; lower --learning-rate")
                bar.set_postfix(loss=f"{sum(values) / len(values):.3f}", refresh=False)
                losses = []
            if first and (due or run.step == 0):
                speed = (run.step - since) * chars / (time.perf_counter() - clock)
                loss = run.evaluate()
                val = f"val loss {loss['val']:.4f} ({loss['val'] / math.log(2):.2f} bits/char)"
                with bar.external_write_mode():
                    print(f"step {run.step}: train loss {loss['train']:.4f}, {val}", flush=True)
                try:
                    tracker.track(loss, gradient_norm=norm.item(), characters_per_second=speed)
                except Exception as error:
                    tracker.give_up(error)
            if first and (due or done) and run.step > began:
                run.save()
                since, clock = run.step, time.perf_counter()
            if not done:
                loss, norm = run.take_step()
                losses.append(loss)
                drawn = bar.update(chars)
    if first and tracker.aim:
        with suppress(Exception):
            tracker.aim.close()
    return ended_by


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"error: {message}\n")


def parse() -> Settings:
    """Makes the settings from the command line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Settings):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), **kind, **f.metadata["flag"])
    try:
        settings = Settings(**vars(parser.parse_args()))
        torch.empty(0, device=settings.device)
        return settings
    except ValueError as error:
        parser.error(str(error))
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device cannot be used: {str(error).splitlines()[0]}")


def main() -> None:
    """Trains as the command line says."""
    settings, store, rank, world = parse(), None, 0, 1
    try:
        if "WORLD_SIZE" in os.environ:  # torchrun
            store, rank, world = next(dist.rendezvous("env://"))
            dist.init_process_group(store=store, rank=rank, world_size=world)
        if settings.data == Settings.data and not settings.data.exists():
            settings = replace(settings, data=ROOT / "data/sample.txt")
            if rank == 0:
                both = "python bin/download.py, then bash bin/concatenate.sh"
                print(f"training on data/sample.txt; real books come with {both}", file=sys.stderr)
        ended_by = train(run := Run(settings, rank, world))
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        message = str(error)
        if not isinstance(error, OSError | ValueError):
            if "memory" not in repr(error).lower():
                raise  # a mistake of ours
            message = "out of memory: lower --batch-size, --context-length or --n-embd, or use --accumulate"
        # Of several processes that fail, one says so.
        if store is None or store.add("errors" + os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), 1) == 1:
            print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    if ended_by:
        if rank == 0:
            print(f"stopped at step {run.step}; python train.py --resume goes on from there", file=sys.stderr)
        sys.exit(128 + ended_by)


if __name__ == "__main__":
    main()
