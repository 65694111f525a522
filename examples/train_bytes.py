"""Trains the reference model on bytes: by default the sources of the standard library of the running Python.

    python examples/train_bytes.py                      # exact attention
    python examples/train_bytes.py --policy balanced    # attention within an error budget
    python examples/train_bytes.py --compare            # both, and the noise between seeds

FOLDER (`--out`) gets a checkpoint for each run, which the same command continues from, to the same bits; a
run that is killed loses what came after its last checkpoint, at most `--every` steps. At the end come the
model, its bits per byte on text that it was not trained on, a picture of the loss (with matplotlib) and a
sample of its writing. With rich there is a progress bar.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaattn import nn

Text = NDArray[np.uint8]
HELD_OUT = 0.05  # of the text, at its end
MOST_CHECKED = 64  # sequences of it that are read


@dataclass
class Run:
    """A model in training; `losses` has one for each step so far."""

    name: str
    model: nn.Transformer
    optimizer: nn.AdamW
    seed: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.checkpoint.safetensors"

    def save(self, folder: Path) -> None:
        extra = {"losses": self.losses, "seconds": self.seconds}
        nn.save_checkpoint(self.path(folder), self.model, self.optimizer, extra)

    def resume(self, folder: Path) -> None:
        if self.path(folder).exists():
            extra = nn.load_checkpoint(self.path(folder), self.model, self.optimizer)
            self.losses, self.seconds = extra["losses"], extra["seconds"]


def read_text(path: Path | None) -> Text:
    """A file's bytes, or those of the standard library's modules, in the order of their names."""
    if path is not None:
        return np.fromfile(path, np.uint8)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return np.frombuffer(b"".join(source.read_bytes() for source in sources), np.uint8)


def batch(text: Text, size: int, length: int, seed: int, step: int) -> tuple[Text, Text]:
    """Tokens and targets (size, length), a function of seed and step: there is nothing to remember."""
    starts = np.random.default_rng([seed, step]).integers(0, len(text) - length, size)
    rows = text[starts[:, None] + np.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


def train_step(run: Run, tokens: Text, targets: Text, lr: float) -> float:
    model, optimizer = run.model, run.optimizer
    loss, grad = nn.cross_entropy(model(tokens), targets)
    model.zero_grad()
    model.backward(grad)
    nn.clip_grad_norm(model, 1.0)
    optimizer.lr = lr
    optimizer.step()
    return loss


def bits_per_byte(model: nn.Transformer, text: Text, length: int) -> float:
    """On sequences of `length` from the start of the text, one after the other."""
    model.eval()
    count = min(max(1, (len(text) - 1) // length), MOST_CHECKED)
    model.reset_statistics()  # so that they tell of these sequences
    losses = []
    for start in range(0, count * length, length):
        row = text[start : start + length + 1]
        losses.append(nn.cross_entropy(model(row[None, :-1]), row[None, 1:])[0])
    model.train()
    return float(np.mean(losses) / np.log(2))


@contextmanager
def progress(name: str, losses: list[float], total: int) -> Iterator[Callable[[int, float], None]]:
    """A function that shows the steps done and the loss: a bar with rich, else a line now and then."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        said = time.monotonic()

        def line(step: int, loss: float) -> None:
            nonlocal said
            if time.monotonic() - said > 10 or step == total:
                said = time.monotonic()
                print(f"{name}: step {step} of {total}, loss {loss:.3f}", file=sys.stderr)

        yield line
        return
    columns = "[bold]{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as bar:
        task = bar.add_task(
            name, total=total, completed=len(losses), loss=losses[-1] if losses else float("nan")
        )
        yield lambda step, loss: bar.update(task, completed=step, loss=loss)


def train(run: Run, text: Text, folder: Path, options: argparse.Namespace) -> None:
    """From the last checkpoint, if there is one, to the last step."""
    run.resume(folder)
    with progress(run.name, run.losses, options.steps) as show:
        for step in range(len(run.losses), options.steps):
            start = time.perf_counter()
            tokens, targets = batch(text, options.batch, options.length, run.seed, step)
            lr = nn.cosine_schedule(
                step, total=options.steps, peak=options.lr, warmup=options.warmup, floor=0.1 * options.lr
            )
            run.losses.append(train_step(run, tokens, targets, lr))
            run.seconds += time.perf_counter() - start
            show(step + 1, run.losses[-1])
            if (step + 1) % options.every == 0 or step + 1 == options.steps:
                run.save(folder)


def new_run(name: str, options: argparse.Namespace, seed: int, **attention: Any) -> Run:
    model = nn.Transformer(
        256,
        num_layers=options.layers,
        num_heads=options.heads,
        embed_dim=options.dim,
        dropout=options.dropout,
        seed=seed,
        collect_statistics=True,
        **attention,
    )
    return Run(name, model, nn.AdamW(model, betas=(0.9, 0.95), weight_decay=0.1), seed)


def plot(runs: list[Run], path: Path) -> bool:
    """Each run's loss, in bits per byte, smoothed; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run, style in zip(runs, ("-", "--", ":"), strict=False):
        bits = np.asarray(run.losses) / np.log(2)
        width = max(1, len(bits) // 50)
        smooth = np.convolve(bits, np.ones(width) / width, "valid")
        (curve,) = axes.plot(np.arange(width, len(bits) + 1), smooth, style, label=run.name)
        axes.plot(np.arange(1, len(bits) + 1), bits, color=curve.get_color(), alpha=0.15, linewidth=0.5)
    axes.set(xlabel="step", ylabel="bits per byte (training)")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return True


def finish(runs: list[Run], text: Text, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Checks, the picture, the models; returns what is printed."""
    told: dict[str, Any] = {"steps": options.steps, "runs": {}}
    for run in runs:
        run.model.save(folder / f"{run.name}.safetensors")
        tail = run.losses[-max(1, len(run.losses) // 10) :]
        bits = bits_per_byte(run.model, text, options.length)
        rungs = run.model.statistics().total.precision_distribution
        told["runs"][run.name] = {
            "training_bits_per_byte": float(np.mean(tail) / np.log(2)),
            "held_out_bits_per_byte": bits,
            "rungs": {name: round(share, 3) for name, share in rungs.items()},
            "seconds": run.seconds,
        }
    if options.compare:
        exact, *others = (told["runs"][run.name]["held_out_bits_per_byte"] for run in runs)
        told["adaptive_minus_exact"], told["other_seed_minus_exact"] = (bits - exact for bits in others)
    if plot(runs, folder / "loss.png"):
        told["picture"] = str(folder / "loss.png")
    prompt = np.frombuffer(b"def ", np.uint8)[None]
    written = runs[0].model.generate(prompt, options.write, 0.7, seed=options.seed)[0]
    told["sample"] = written.astype(np.uint8).tobytes().decode(errors="backslashreplace")
    return told


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, help="file to learn; default: the standard library's sources")
    parser.add_argument("--out", type=Path, default=Path("train_bytes"), help="folder for results")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--length", type=int, default=512, help="bytes per sequence")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=None, help="steps; default a twentieth of all")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument(
        "--policy", choices=("quality", "balanced", "speed"), help="error budget of attention"
    )
    parser.add_argument("--compare", action="store_true", help="exact, adaptive, and exact from another seed")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=int, default=200, help="bytes of the sample")
    options = parser.parse_args(arguments)
    if options.warmup is None:
        options.warmup = options.steps // 20
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    text = read_text(options.text)
    held_out = max(int(HELD_OUT * len(text)), options.length + 1)
    if len(text) - held_out <= options.length:
        print(f"text: expected more than {options.length + held_out} bytes, got {len(text)}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    policy, seed = options.policy, options.seed
    if options.compare:
        runs = [
            new_run("exact", options, seed),
            new_run("adaptive", options, seed, policy=policy or "balanced"),
            new_run("exact, another seed", options, seed + 1),
        ]
    else:
        runs = [new_run(policy or "exact", options, seed, policy=policy)]
    for run in runs:
        train(run, text[:-held_out], options.out, options)
    print(json.dumps(finish(runs, text[-held_out:], options.out, options), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
