"""How well the error model predicts: predicted against true error of every candidate, for many heads.

A prediction rests on profiles of a few exact rows, or, where those would not pay, on statistics of the arrays
alone: a guess. Both are looked at. The figure to read is the true error over the predicted one: its geometric
mean is what a candidate's prediction should be multiplied by, its spread what no constant mends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from heads import SIGMAS, Heads, adversarial, errors, gaussian
from instruments import COLORS, MARKERS, REAL, draw, geometric_mean, save, share, use_rates, write_json
from report import show_table

import adaattn
from adaattn.rates import RUNGS, split

#: fp64's error is below the rounding of an fp32 output, so it is not seen.
CANDIDATES = RUNGS[1:]
#: Tables of rates by which rows are looked at always, where there are enough, and never.
KINDS = {"profiled": "avx512bf16", "guessed": "scalar"}
SMALL = (24, 48)  # queries and keys, too few to look at any

Sets = dict[str, Callable[[], Iterator[Heads]]]
SETS: Sets = {
    "Gaussian": lambda: (
        gaussian(sigma, n, n, D, heads=4, causal=causal, seed=n + D)
        for n, D, causal, sigma in product((128, 512, 1024), (64, 128), (False, True), SIGMAS)
    ),
    "Gaussian, short": lambda: (
        gaussian(sigma, n, n, heads=8, causal=causal, seed=n)
        for n, causal, sigma in product(SMALL, (False, True), SIGMAS)
    ),
    **REAL,
    "adversarial": lambda: (
        heads for n in (128, 512) for seed in range(2) for heads in adversarial(n, n, seed=seed)
    ),
}
QUICK: Sets = {
    "Gaussian": lambda: (gaussian(sigma, heads=2) for sigma in SIGMAS),
    "Gaussian, short": lambda: (gaussian(sigma, 48, 48, heads=2) for sigma in SIGMAS),
    **{name: REAL[name] for name in ("MiniLM, 128 tokens", "bytelm, 512 bytes")},
}


@dataclass
class Prediction:
    """Of one candidate for one head."""

    set: str
    head: str
    queries: int
    kind: str
    rung: str
    predicted: float
    true: float

    @property
    def ratio(self) -> float:
        return self.true / self.predicted


def measure(sets: Sets, left_out: dict[str, str]) -> list[Prediction]:
    """Candidates that the engine replaces, since they cannot hold a head, are left out."""
    found: list[Prediction] = []
    for name, make in sets.items():
        print(name, file=sys.stderr, flush=True)
        try:
            for heads in make():
                found += of_heads(name, heads)
        except ImportError as why:
            left_out[name] = str(why)
    use_rates("machine")
    return found


def of_heads(name: str, heads: Heads) -> Iterator[Prediction]:
    exact = heads.exact()
    plans = {}
    for kind, table in KINDS.items():
        use_rates(table)
        plans[kind] = heads.attend(adaattn.plan, tolerance=1.0)
    for rung in CANDIDATES:
        out, report = heads.attend(precision=split(rung), return_report=True)
        true = errors(out, exact)
        for kind, plan in plans.items():
            predicted = plan.candidate_error[..., plan.candidates.index(rung)]
            wanted = ~report.retried & (true > 0) & (predicted > 0)
            wanted &= (plan.profiled_rows > 0) == (kind == "profiled")
            for i, at in enumerate(np.ndindex(true.shape)):
                if wanted[at]:
                    yield Prediction(
                        name,
                        heads.names[i],
                        heads.query.shape[2],
                        kind,
                        rung,
                        float(predicted[at]),
                        float(true[at]),
                    )


def figures(found: list[Prediction]) -> list[str]:
    """Factor, spread (a factor as well: one standard deviation), quantiles, share within three times."""
    if not found:
        return [""] * 5
    ratios = np.array([x.ratio for x in found])
    low, high = np.quantile(ratios, (0.05, 0.95))
    within = share((ratios >= 1 / 3) & (ratios <= 3))
    spread = np.exp(np.log(ratios).std())
    return [
        str(len(found)),
        f"{geometric_mean(ratios):.2f}",
        f"{spread:.2f}",
        f"{low:.2f} {high:.2f}",
        f"{within:.0%}",
    ]


def show(found: list[Prediction]) -> None:
    header = ["rung", "heads", "true/predicted", "spread", "5 %, 95 %", "within 3x"]
    names = list(dict.fromkeys(x.set for x in found))
    groups = {
        "Gaussian": [x for x in found if x.set.startswith("Gaussian")],
        "real": [x for x in found if x.set in REAL],
        "adversarial": [x for x in found if x.set == "adversarial"],
    }
    for kind, (group, part) in product(KINDS, groups.items()):
        mine = [x for x in part if x.kind == kind]
        rows = [[rung, *figures([x for x in mine if x.rung == rung])] for rung in CANDIDATES]
        if mine:
            show_table(f"{kind}, {group} heads", header, rows)
    for kind in KINDS:
        rows = []
        for rung in CANDIDATES:
            cells = []
            for name in names:
                ratios = [x.ratio for x in found if (x.kind, x.rung, x.set) == (kind, rung, name)]
                cells.append(f"{geometric_mean(ratios):.2f}" if ratios else "")
            rows.append([rung, *cells])
        show_table(f"{kind}: true over predicted, geometric mean", ["rung", *names], rows)
        rows = []
        for rung in CANDIDATES:
            cells = []
            for sigma in SIGMAS:
                ratios = [
                    x.ratio
                    for x in found
                    if (x.kind, x.rung) == (kind, rung) and x.head.split(",")[0] == f"gaussian {sigma:g}"
                ]
                cells.append(f"{geometric_mean(ratios):.2f}" if ratios else "")
            rows.append([rung, *cells])
        show_table(f"{kind}: the same by score deviation, Gaussian heads", ["rung", *map(str, SIGMAS)], rows)


def show_worst(found: list[Prediction], count: int) -> None:
    """Those whose error is most above what was predicted: they break promises."""
    worst = sorted(found, key=lambda x: -x.ratio)[:count]
    rows = [
        [f"{x.head} ({x.queries})", x.kind, x.rung, f"{x.true:.2e}", f"{x.predicted:.2e}", f"{x.ratio:.1f}"]
        for x in worst
    ]
    show_table("most above its prediction", ["head (T)", "kind", "rung", "true", "predicted", ""], rows)


def plot(folder: Path, found: list[Prediction]) -> None:
    figure, axes = draw(11, 5.2, 2)
    for axis, kind in zip(axes, KINDS, strict=True):
        for i, rung in enumerate(CANDIDATES):
            mine = [x for x in found if x.kind == kind and x.rung == rung]
            label = rung if kind == "profiled" else None
            x, y = ([getattr(one, what) for one in mine] for what in ("predicted", "true"))
            axis.scatter(
                x, y, s=7, linewidths=0.6, color=COLORS[i], marker=MARKERS[i], label=label, alpha=0.6
            )
        ends = np.array([min(x.predicted for x in found), max(x.predicted for x in found)])
        for factor in (1 / 3, 1, 3):
            style = "-" if factor == 1 else "--"
            axis.plot(ends, factor * ends, color="black", linewidth=0.8, linestyle=style)
        axis.set(xscale="log", yscale="log", xlabel="predicted error", ylabel="true error", title=kind)
        axis.grid(alpha=0.3)
    figure.suptitle("Predicted and true error of every candidate, a mark for each head", fontsize=12)
    figure.legend(loc="outside lower center", ncols=8, frameon=False, markerscale=2, fontsize=10)
    save(figure, folder, "error_model")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), metavar="SET")
    parser.add_argument("--quick", action="store_true", help="a few heads of each kind")
    parser.add_argument("--worst", type=int, default=20, metavar="N", help="how many heads to name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every head")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="error_model.png and .svg")
    args = parser.parse_args()

    sets = QUICK if args.quick else SETS
    left_out: dict[str, str] = {}
    found = measure({name: make for name, make in sets.items() if name in (args.sets or sets)}, left_out)
    show(found)
    show_worst(found, args.worst)
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})")
    if args.json:
        write_json(args.json, left_out=left_out, predictions=[vars(x) for x in found])
    if args.plot and found:
        plot(args.plot, found)


if __name__ == "__main__":
    main()
