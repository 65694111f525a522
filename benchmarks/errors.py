"""What every rung of the precision ladder costs in accuracy: per head, against float64.

The error is relative, ‖out − exact‖_F / ‖exact‖_F, on Gaussian heads and on all heads of two real models
(`heads.py`). No timing: the figures depend on the rungs, and hardly on the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from heads import SIGMAS, Array, Heads, bundled, errors, gaussian, minilm
from instruments import draw, save, write_json
from report import show_table

import adaattn
from adaattn.rates import RUNGS, split

LIMITS = {"quality": 1e-5, "balanced": 1e-2, "speed": 5e-2}  # the policies' tolerances
HEADER = ["rung", "least", "median", "most", "lse, most", *(f"<= {x:g}" for x in LIMITS.values()), "retried"]
SETS: dict[str, Callable[[], Iterator[Heads]]] = {
    "Gaussian": lambda: (gaussian(sigma, heads=4) for sigma in SIGMAS),
    "MiniLM, 128 tokens": lambda: minilm(128),
    "MiniLM, 512 tokens": lambda: minilm(512),
    "bytelm, 512 bytes": lambda: bundled(512),
    "bytelm, 4096 bytes": lambda: bundled(4096),
}
COLORS = dict(zip(SETS, ("#000000", "#56B4E9", "#0072B2", "#E69F00", "#D55E00"), strict=True))
MARKERS = dict(zip(SETS, "xovsD", strict=True))


@dataclass
class Errors:
    """Of one rung on one set: an entry for each head."""

    set: str
    rung: str
    heads: list[str]
    error: Array
    lse: Array  # largest absolute error of the logarithm of the sum of exponentials
    retried: Array  # computed at a wider rung, since this one cannot hold the head

    def row(self) -> list[str]:
        least, middle, most = np.quantile(self.error, (0, 0.5, 1))
        shares = [f"{np.mean(self.error <= limit):.0%}" for limit in LIMITS.values()]
        retried = str(np.sum(self.retried)) if self.retried.any() else ""
        return [self.rung, *(f"{x:.1e}" for x in (least, middle, most, self.lse.max())), *shares, retried]


def measure(name: str) -> tuple[list[Errors], str]:
    """All rungs on one set, and what the rows look like of the head that int8 serves worst."""
    parts: dict[str, list[tuple[Array, ...]]] = {rung: [] for rung in RUNGS}
    names: list[str] = []
    most, note = 0.0, ""
    for heads in SETS[name]():
        names += heads.names
        exact, exact_lse = heads.attend(adaattn.reference.attention, return_lse=True)
        for rung in RUNGS:
            out, lse, report = heads.attend(precision=split(rung), return_lse=True, return_report=True)
            error = errors(out, exact)
            parts[rung].append((error, np.abs(lse - exact_lse).max(axis=2), report.retried))
            if rung == "int8" and error.max() > most:
                most = float(error.max())
                b, h = divmod(int(error.argmax()), error.shape[1])
                note = explain(heads, b, h, out, exact)
    found = []
    for rung, calls in parts.items():
        columns = (np.concatenate([x.ravel() for x in column]) for column in zip(*calls, strict=True))
        found.append(Errors(name, rung, names, *columns))
    return found, f"int8 is worst on {note}, {most:.1e}"


def explain(heads: Heads, b: int, h: int, out: Array, exact: Array) -> str:
    """A head's name and rows: all of them (medians), and the tenth that have most of its error."""
    squares = np.sum((out[b, h] - exact[b, h]) ** 2, axis=1)
    worst = np.argsort(squares)[-max(1, len(squares) // 10) :]
    entropy, largest = weights(heads, b, h)

    def rows(which: Any) -> str:
        return f"entropy {np.median(entropy[which]):.2f}, largest weight {np.median(largest[which]):.2f}"

    name = heads.names[b * heads.query.shape[1] + h]
    share = squares[worst].sum() / squares.sum()
    return f"{name} (rows: {rows(...)}; the tenth with {share:.0%} of the error: {rows(worst)})"


def weights(heads: Heads, b: int, h: int) -> tuple[Array, Array]:
    """Of each row of a head with no option but causal: entropy over that of equal weights, largest weight."""
    q, k = heads.query[b, h].astype(float), heads.key[b, h * heads.key.shape[1] // heads.query.shape[1]]
    s = q @ k.T.astype(float) / np.sqrt(q.shape[1])
    if heads.options.get("causal"):
        s[np.triu(np.ones(s.shape, bool), 1 + s.shape[1] - s.shape[0])] = -np.inf
    s -= s.max(axis=1, keepdims=True)
    p = np.exp(s)
    total = p.sum(axis=1)
    entropy = np.log(total) - np.sum(p * np.where(p > 0, s, 0), axis=1) / total
    return entropy / np.log(np.maximum(np.isfinite(s).sum(axis=1), 2)), 1 / total


def plot(folder: Path, found: list[Errors]) -> None:
    """A mark for each head: rungs side by side, sets by colour and marker."""
    figure, (axis,) = draw(8, 4.6)
    names = list(dict.fromkeys(one.set for one in found))
    width = 0.8 / len(names)
    for name, limit in LIMITS.items():
        axis.axhline(limit, color="black", linewidth=0.8, linestyle="--")
        axis.text(-0.45, 1.15 * limit, f"{name}, {limit:g}", fontsize=9)
    for one in found:
        i = names.index(one.set)
        center = RUNGS.index(one.rung) + (i - (len(names) - 1) / 2) * width
        x = center + np.linspace(-0.35, 0.35, len(one.error)) * width
        label = f"{one.set} ({len(one.heads)})" if one.rung == RUNGS[0] else None
        color = COLORS[one.set]
        axis.scatter(x, one.error, s=9, linewidths=0.7, color=color, marker=MARKERS[one.set], label=label)
    axis.set_yscale("log")
    axis.set_xticks(range(len(RUNGS)), RUNGS)
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_ylabel("relative error of a head's output")
    figure.suptitle("Error of each rung against float64, a mark for each head", fontsize=12)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, markerscale=2, fontsize=10)
    save(figure, folder, "errors")


def show_sigmas(found: list[Errors]) -> None:
    """Medians of the Gaussian heads by the standard deviation of their scores."""
    medians = {one.rung: np.median(one.error.reshape(len(SIGMAS), -1), axis=1) for one in found}
    rows = [[rung, *(f"{x:.1e}" for x in row)] for rung, row in medians.items()]
    show_table("Gaussian: median by the scores' standard deviation", ["rung", *map(str, SIGMAS)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), metavar="SET")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, with every head")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="errors.png and errors.svg")
    args = parser.parse_args()

    found: list[Errors] = []
    notes: list[str] = []
    left_out: dict[str, str] = {}
    for name in args.sets:
        print(name, file=sys.stderr, flush=True)
        try:
            measured, said = measure(name)
        except ImportError as why:
            left_out[name] = str(why)
            continue
        found += measured
        notes.append(said)
    for name in dict.fromkeys(one.set for one in found):
        rows = [one for one in found if one.set == name]
        show_table(f"{name}: {len(rows[0].heads)} heads", HEADER, [one.row() for one in rows])
    if "Gaussian" in args.sets:
        show_sigmas([one for one in found if one.set == "Gaussian"])
    print(*notes, sep="\n")
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})")
    if args.json:
        measurements = [vars(one) for one in found]
        write_json(args.json, left_out=left_out, notes=notes, measurements=measurements)
    if args.plot and found:
        plot(args.plot, found)


if __name__ == "__main__":
    main()
