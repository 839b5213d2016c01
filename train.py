"""Trains the model on a text, and shows how it learns. Each setting is also a flag: `steps` is `--steps`."""

import argparse
import codecs
import hashlib
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from model import GPT, CharTokenizer, GPTConfig, load_model, save_model

ROOT = Path(__file__).resolve().parent
FASTEST = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def setting(default: Any, help: str, low: float = -math.inf, high: float = 1e9, **flag: Any) -> Any:
    """A field of the settings: its default, its line of help, the numbers that it admits."""
    return field(default=default, metadata={"flag": {"help": help, **flag}, "range": (low, high)})


@dataclass(frozen=True)
class Settings:
    """What a run depends on. Raises ValueError for a number out of its range."""

    data: Path = setting(ROOT / "data/scifi.txt", "the text to learn, UTF-8")
    model: Path = setting(ROOT / "models/model-scifi.pth", "the file for the best model")
    resume: bool = setting(False, "go on from the last checkpoint beside the model")
    steps: int = setting(1400, "steps of the optimizer", 1)
    batch_size: int = setting(24, "windows of text in a step", 1)
    accumulate: int = setting(1, "parts that a batch is computed in, one after the other, to save memory", 1)
    context_length: int = setting(128, "characters in a window", 1, 2**16)
    n_layer: int = setting(4, "blocks", 1)
    n_head: int = setting(4, "attention heads in a block", 1)
    n_embd: int = setting(128, "channels", 1)
    dropout: float = setting(0.0, "share of activations dropped, against overfitting a small text", 0, 0.99)
    optimizer: str = setting("muon", "what moves the blocks' matrices", choices=("muon", "adamw"))
    learning_rate: float = setting(0.014, "the highest; --optimizer adamw takes a tenth of it", 0)
    warmup_steps: int = setting(20, "steps in which the learning rate rises", 0)
    weight_decay: float = setting(0.4, "pull of the blocks' matrices toward zero", 0)
    grad_clip: float = setting(1.0, "the norm to which larger gradients are cut", 1e-9)
    eval_interval: int = setting(100, "steps from one evaluation and checkpoint to the next", 1)
    eval_windows: int = setting(160, "windows that an evaluation reads of either part", 1)
    val_fraction: float = setting(0.1, "share of the text, its tail, held out for validation", 0.001, 0.999)
    seed: int = setting(1, "decides all that is random", 0, 2**63)
    device: str = setting(FASTEST, "cpu, cuda or mps")
    precision: str = setting("auto", "auto is bf16 where that is faster", choices=("auto", "fp32", "bf16"))
    compile: bool = setting(False, "compile the model first; pays on a GPU")
    aim: bool = setting(True, "track the run with aim")

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), f.metadata["range"]
            if isinstance(value, int | float) and not low <= value <= high:
                raise ValueError(f"--{f.name} must be {low:g} to {high:g}, not {value}".replace("_", "-"))
        for whole, part in (("n_embd", "n_head"), ("batch_size", "accumulate")):
            if (a := getattr(self, whole)) % (b := getattr(self, part)):
                raise ValueError(f"--{whole} {a} is no multiple of --{part} {b}".replace("_", "-"))


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
            raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first") from None
    digest, ids = hashlib.sha256(data).hexdigest(), [tokenizer.encode(part) for part in parts()]
    data = b""  # no longer needed when torch.cat holds the ids twice
    return torch.cat([tokenizer.encode(""), *ids]), tokenizer, digest


def windows_of(ids: Tensor, settings: Settings) -> tuple[Tensor, dict[str, Tensor]]:
    """All windows before the tail, `(N, T + 1)`, and a few of both to evaluate. ValueError if too short."""
    T, share, count = settings.context_length, settings.val_fraction, settings.eval_windows
    tail = round(len(ids) * share)
    if min(tail, len(ids) - tail) < T + 1:
        needed = math.ceil((T + 2) / min(share, 1 - share))
        raise ValueError(f"{settings.data} has {len(ids)} characters; these settings need at least {needed}")
    eval_sets = {}
    for name, part in {"train": ids[:-tail], "val": ids[-tail:]}.items():
        stride = max(T, (len(part) - T - 1) // count)  # evenly spread, none over another
        eval_sets[name] = part.unfold(0, T + 1, stride)[:count].long()
    return ids[:-tail].unfold(0, T + 1, 1), eval_sets  # the first without a copy


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan, 2024). On a CPU without bfloat16 40 times as fast as torch's."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Moves the matrices once."""
        for group in self.param_groups:
            alike: dict[torch.Size, list] = {}  # all matrices of a shape with their updates, made wide
            for p in group["params"]:
                state, momentum = self.state[p], group["momentum"]
                average = state["average"] = p.grad.lerp(state.get("average", p.grad), momentum)
                update = p.grad.lerp(average, momentum)  # Nesterov's look ahead
                p.mul_(1 - group["lr"] * group["weight_decay"])
                count = 3 if p.size(0) == 3 * p.size(1) else 1  # queries, keys, values
                for matrix, x in zip(p.chunk(count), update.chunk(count), strict=True):
                    if matrix.size(0) > matrix.size(1):
                        matrix, x = matrix.mT, x.mT
                    alike.setdefault(x.shape, []).append((matrix, x))
            for shape, pairs in alike.items():
                x = torch.stack([x for _, x in pairs])  # (N, rows, columns)
                x /= x.norm(dim=(1, 2), keepdim=True) + 1e-7
                for _ in range(5):  # Newton-Schulz, with Jordan's coefficients: all singular values near 1
                    gram = x @ x.mT
                    gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
                    x = torch.baddbmm(x, gram, x, beta=3.4445)
                x /= x.norm(dim=1, keepdim=True) + 1e-7  # columns alike, an idea of NorMuon (Li et al., 2025)
                rate = 0.2 * math.sqrt(shape[0]) * group["lr"]  # as large as AdamW's (Liu et al., 2025)
                for (matrix, _), change in zip(pairs, x, strict=True):
                    matrix.sub_(change, alpha=rate)


class Run:
    """A model that learns a text, in process `rank` of `world`. OSError, ValueError: bad files, settings."""

    def __init__(self, settings: Settings, rank: int = 0, world: int = 1) -> None:
        self.settings, self.rank, self.world = settings, rank, world
        self.part, left = divmod(settings.batch_size, world * settings.accumulate)  # rows computed at once
        if left:
            raise ValueError(f"--batch-size must be a multiple of {world} processes x {settings.accumulate}")
        self.device = torch.device(settings.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.device.index or 0)))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32
        self.precision = self.autocast()
        ids, self.tokenizer, digest = load_text(settings.data)
        self.characters, (self.windows, self.eval_sets) = len(ids), windows_of(ids, settings)
        sizes = {f.name: getattr(settings, f.name) for f in fields(GPTConfig)[1:]}
        config = GPTConfig(self.tokenizer.vocab_size, **sizes)
        same = ("optimizer", "weight_decay", "val_fraction", "eval_windows")
        self.fixed = {**asdict(config), "text": digest, **{name: getattr(settings, name) for name in same}}
        self.seed_all()
        self.model = GPT(config).to(self.device)
        self.optimizers = self.make_optimizers()
        self.step, self.best, self.aim, self.aim_hash = 0, math.inf, None if settings.aim else False, None
        self.checkpoint = settings.model.with_name(settings.model.name.removesuffix(".pth") + ".train.pth")
        if settings.resume and self.checkpoint.exists():
            self.restore()
        elif settings.resume and rank == 0:
            print(f"there is no checkpoint {self.checkpoint}: starting anew", file=sys.stderr)
        self.forward = torch.compile(self.model) if settings.compile else self.model
        if world > 1:
            self.forward = torch.nn.parallel.DistributedDataParallel(self.forward)
            dist.all_gather_object(steps := [0] * world, self.step)
            if len(set(steps)) > 1:
                raise ValueError(f"the processes are at steps {steps}: let all see the folder of --model")
        if rank == 0:
            settings.model.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=settings.model.parent).close()  # fails now, not after an hour

    def autocast(self) -> torch.autocast:
        """The precision of matrix products: bf16 where it is faster or asked for, else fp32."""
        cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older torches cannot tell
        fast = self.device.type == "cpu" and cpu.get("avx512_bf16", False) and self.settings.n_embd >= 128
        fast |= self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        enabled = self.settings.precision == "bf16" or (self.settings.precision == "auto" and fast)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the blocks' matrices, which alone decay, and AdamW for the rest, or AdamW for all."""
        matrices = [p for p in self.model.blocks.parameters() if p.dim() == 2]
        rest = [p for p in self.model.parameters() if all(p is not matrix for matrix in matrices)]
        groups = [{"params": rest}, {"params": matrices, "weight_decay": self.settings.weight_decay}]
        muon = [Muon([groups.pop()], {"momentum": 0.9})] if self.settings.optimizer == "muon" else []
        return [*muon, torch.optim.AdamW(groups, betas=(0.8, 0.99), weight_decay=0.0, fused=True)]

    def learning_rate(self) -> float:
        """Up while the optimizers' averages fill, then down to zero: small steps average out the noise."""
        settings, step = self.settings, self.step
        highest = settings.learning_rate * (1.0 if settings.optimizer == "muon" else 0.1)
        return highest * min(1, (step + 1) / (settings.warmup_steps + 1)) * (1 - step / settings.steps)

    def seed_all(self, *numbers: int) -> None:
        """Makes what is random depend on the seed and these numbers alone, not on the steps before."""
        digest = hashlib.sha256(repr((self.settings.seed, *numbers)).encode()).hexdigest()
        torch.manual_seed(int(digest[:8], 16))  # 32 bits: torch's CPU generator heeds no more

    def restore(self) -> None:
        """Goes on from the checkpoint. Raises ValueError if its run was another."""
        model, _, facts = load_model(self.checkpoint)
        if (before := facts.get("fixed", {})) != self.fixed:
            other = dict(before.items() - self.fixed.items()) or "no settings: it is a model, no checkpoint"
            raise ValueError(f"{self.checkpoint} was made with {other}")
        self.model.load_state_dict(model.state_dict())
        for optimizer, state in zip(self.optimizers, facts["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.best, self.aim_hash = facts["step"], facts["best"], facts["aim"]

    def save(self) -> None:
        """Writes what `restore` needs."""
        facts = {"fixed": self.fixed, "step": self.step, "best": self.best, "aim": self.aim_hash}
        facts["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save_model(self.checkpoint, self.model, self.tokenizer, **facts)

    def take_step(self) -> tuple[Tensor, Tensor]:
        """Moves the weights once. Returns the loss and the gradient's norm, on the device, not awaited."""
        settings, losses = self.settings, []
        self.model.train()
        self.seed_all(self.step)
        starts = torch.randint(len(self.windows), (settings.batch_size,))
        self.seed_all(self.step, self.rank)  # each process's own dropout, on its slice of the same batch
        rows = self.windows[starts.chunk(self.world)[self.rank]].long()
        rows = rows.pin_memory() if self.device.type == "cuda" else rows
        rows = rows.to(self.device, non_blocking=self.device.type == "cuda")
        for part in rows.split(self.part):  # (B, T + 1)
            with self.precision:
                loss = self.forward(part[:, :-1], part[:, 1:])[1] / settings.accumulate
            loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return torch.stack(losses).sum(), norm

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The mean loss on the fixed windows of both parts, in nats. Saves the model if it is the best."""
        loss = {}
        self.model.eval()
        for name, rows in self.eval_sets.items():
            parts = rows.to(self.device).split(self.part)
            with self.precision:
                sums = [self.model(part[:, :-1], part[:, 1:])[1] * len(part) for part in parts]
            loss[name] = torch.stack(sums).sum().item() / len(rows)
        if not math.isfinite(loss["val"]):
            raise ValueError(f"step {self.step}: validation loss {loss['val']}; lower --learning-rate")
        if self.step > 0 and loss["val"] < self.best:
            self.best = loss["val"]
            save_model(self.settings.model, self.model, self.tokenizer, step=self.step, val_loss=self.best)
        return loss

    @torch.no_grad()
    def media(self) -> Iterator[tuple[str, Any, dict[str, int]]]:
        """What there is to see, each with its name and context: a passage written, and at times pictures."""
        from aim import Image, Text

        def picture(values: Tensor, caption: str) -> Image:  # (rows, columns), from 0, black, to 1, white
            zoom = math.ceil(384 / len(values))
            return Image(values.kron(torch.ones(zoom, zoom, device=values.device)), caption=caption)

        window, seen = self.eval_sets["val"][0].to(self.device), []  # (T + 1,)
        new = self.model.generate(window[None, :1], 100, 0.8, generator=torch.Generator().manual_seed(1))
        yield "passage", Text(self.tokenizer.decode(torch.cat([window[:1], *new]))), {}
        if self.step == 0:
            yield "positions", picture(self.model.positions / 2 + 0.5, "a row a position"), {}
        if self.step % (4 * self.settings.eval_interval) == 0:
            for block, module in enumerate(self.model.blocks):
                attention = module.attention.attention
                with attention.register_forward_hook(lambda a, qkv, _: seen.append(a.explicit(*qkv[:3])[1])):
                    self.model(window[None, :-1])
                heads = torch.cat([*seen.pop()[0].sqrt()], dim=1)  # (T, H T)
                yield "attention", picture(heads, f"block {block}, a square a head"), {"block": block}

    def open_aim(self) -> Any:
        """The run in aim that shows this one. Raises whatever is wrong with aim."""
        settings = self.settings
        import aim

        shown = aim.Run(self.aim_hash, repo=ROOT, system_tracking_interval=None, capture_terminal_logs=False)
        shown.name = f"{settings.data.stem} {settings.n_layer}x{settings.n_embd} {settings.optimizer}"
        facts = {**asdict(settings), **self.fixed, "device": self.device, "torch": torch.__version__}
        facts |= {"characters": self.characters, "parameters": sum(map(torch.numel, self.model.parameters()))}
        shown["hparams"] = {name: v if isinstance(v, int | float) else str(v) for name, v in facts.items()}
        self.aim_hash = shown.hash
        return shown

    def track(self, loss: dict[str, float], numbers: dict[str, float]) -> None:
        """Shows an evaluation in `aim up`. If aim fails, training goes on without it, and a line says so."""
        try:
            self.aim = self.aim or self.open_aim()
            self.aim.track(numbers, step=self.step)
            for subset, nats in loss.items():
                both = {"loss": nats, "bits_per_character": nats / math.log(2)}
                self.aim.track(both, step=self.step, context={"subset": subset})
            for name, value, context in self.media():
                self.aim.track(value, name=name, step=self.step, context=context)
        except Exception as error:
            self.aim = False
            tqdm.write(f"losses are not tracked with aim: {' '.join(str(error).split())}", file=sys.stderr)


def train(run: Run) -> int:
    """The loop. Returns the signal that ended it early, or 0. Raises ValueError if the loss is no number."""
    settings, first, began, caught = run.settings, run.rank == 0, run.step, []

    def catch(number: int, _: Any) -> None:  # the step is finished first; a second signal ends it at once
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    chars = settings.batch_size * settings.context_length  # in a step
    style = {"unit": "char", "unit_scale": True, "mininterval": 0.5, "dynamic_ncols": True}
    loss = norm = torch.zeros(())
    drawn, done, since, clock = False, False, run.step, time.perf_counter()
    with tqdm(total=settings.steps * chars, initial=run.step * chars, disable=not first, **style) as bar:
        while not done:
            ended_by = torch.tensor(max(caught, default=0))
            if run.world > 1:  # all stop at the same step
                dist.all_reduce(ended_by, dist.ReduceOp.MAX)
            moved, done = run.step > began, bool(ended_by) or run.step >= settings.steps
            due = run.step % settings.eval_interval == 0 or run.step == settings.steps
            if moved and (drawn or due or done):  # to look at the loss is to wait for the device
                if not math.isfinite(loss + norm):
                    raise ValueError(f"step {run.step}: loss {loss}, gradient {norm}; lower --learning-rate")
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if first and due and (moved or run.step == 0):
                numbers = {"learning_rate": run.learning_rate(), "gradient_norm": norm.item()}
                numbers["characters_per_second"] = (run.step - since) * chars / (time.perf_counter() - clock)
                mean = run.evaluate()
                val = f"val loss {mean['val']:.4f} ({mean['val'] / math.log(2):.2f} bits/char)"
                with bar.external_write_mode():
                    print(f"step {run.step}: train loss {mean['train']:.4f}, {val}", flush=True)
                if run.aim is not False:  # as it is with --no-aim, and once aim has failed
                    run.track(mean, numbers if moved else {})
            if first and moved and (due or done):
                run.save()
                since, clock = run.step, time.perf_counter()
            if not done:
                loss, norm = run.take_step()
                drawn = bar.update(chars)
    if first and ended_by and moved and run.step < settings.steps:
        print(f"stopped at step {run.step}: the same command with --resume goes on", file=sys.stderr)
    return int(ended_by)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, without the usage
        self.exit(2, f"error: {message}\n")


def main() -> None:
    """Trains as the command line says."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while there is nothing to save, Ctrl-C ends it quietly
    parser = _Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Settings):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind, **f.metadata["flag"])
    try:
        settings = Settings(**vars(parser.parse_args()))
        torch.zeros(1, device=settings.device).item()
    except (ValueError, RuntimeError, AssertionError) as error:
        known = isinstance(error, ValueError)  # else torch has no such device
        parser.error(str(error) if known else f"no --device {settings.device} to be used here: try cpu")
    sample, store, rank, world = ROOT / "data/sample.txt", None, 0, 1
    try:
        if "WORLD_SIZE" in os.environ:  # torchrun
            store, rank, world = next(dist.rendezvous("env://"))
            backend = "cpu:gloo,cuda:nccl" if settings.device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        if settings.data == Settings.data and not settings.data.exists() and sample.exists():
            settings = replace(settings, data=sample)
            if rank == 0:
                both = "python bin/download.py, then bash bin/concatenate.sh"
                print(f"training on data/sample.txt; real books come with {both}", file=sys.stderr)
        ended_by = train(Run(settings, rank, world))
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        message = str(error).partition("\n")[0]
        if not isinstance(error, OSError | ValueError):
            if any(words in repr(error) for words in ("MemoryError", "out of memory", "allocate memory")):
                message = "out of memory: raise --accumulate or lower --batch-size, --context-length"
            elif store is None and not settings.compile:  # else another process is gone, or a compiler
                raise  # a mistake of ours
        if store is None or store.add("errors" + os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), 1) == 1:
            print(f"error: {message}", file=sys.stderr)  # of several processes, the first that fails
        sys.exit(1)
    sys.exit(128 + ended_by if ended_by else 0)


if __name__ == "__main__":
    main()
