"""Whether `tolerance` keeps its promise: the true error of each head against float64, for many heads.

Beside the promise itself, for output and lse: how well errors are predicted and measured, how often a head
is done again, and which rungs are chosen. Nothing is timed. The choice depends on a table of rates: by
default this machine's, but every rung runs everywhere, so the table of another machine shows what happens
there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from heads import SIGMAS, Array, Heads, adversarial, errors, gaussian
from instruments import (
    COLORS,
    MARKERS,
    RATES,
    REAL,
    draw,
    save,
    share,
    use_rates,
    verdict,
    write_json,
)
from report import show_table

import adaattn

TOLERANCES = (1e-5, 1e-4, 1e-3, 1e-2, 5e-2)
# Heads of each Gaussian set, by length.
LENGTHS = {64: 8, 128: 8, 256: 8, 512: 8, 1024: 4, 2048: 2}
#: What an fp32 output may be off by its own rounding; errors are not compared below it.
ROUNDING = 2.0**-24


def random_heads(lengths: dict[int, int]) -> Iterator[Heads]:
    for n, heads in lengths.items():
        for causal in (False, True):
            for sigma in SIGMAS:
                yield gaussian(sigma, n, n, heads=heads, causal=causal, seed=n)
    for T, S in ((64, 1024), (100, 300)):
        for sigma in SIGMAS:
            yield gaussian(sigma, T, S, heads=2, causal=True, seed=T)


Sets = dict[str, Callable[[], Iterator[Heads]]]
SETS: Sets = {
    "Gaussian": lambda: random_heads(LENGTHS),
    **REAL,
    "adversarial": lambda: (
        heads for n in (64, 512, 1024) for seed in range(4) for heads in adversarial(n, n, seed=seed)
    ),
}
QUICK: Sets = {
    "Gaussian": lambda: random_heads({64: 1, 512: 1}),
    **{name: REAL[name] for name in ("MiniLM, 128 tokens", "bytelm, 512 bytes")},
    "adversarial": lambda: adversarial(512, 512),
}


@dataclass
class Pair:
    """One head at one tolerance, planned by one table of rates."""

    set: str
    head: str
    queries: int
    keys: int
    rates: str
    tolerance: float
    with_lse: bool  # asked for the lse too: the choice keeps both promises
    rung: str
    true: float
    predicted: float
    measured: float
    limit: float
    rows: int  # verified
    retried: bool
    lse: float  # largest error of the lse
    lse_allowed: float

    @property
    def keeps(self) -> bool:
        return self.true <= self.tolerance + ROUNDING

    @property
    def keeps_lse(self) -> bool:
        return self.lse <= self.lse_allowed

    def off(self, estimate: float) -> float:
        """An estimate over the truth."""
        return max(estimate, ROUNDING) / max(self.true, ROUNDING)

    def row(self) -> list[str]:
        name = f"{self.head} ({self.queries}:{self.keys})"
        figures = (self.true, self.predicted, self.measured, self.limit, self.lse, self.lse_allowed)
        return [name, f"{self.tolerance:g}", self.rung, *(f"{x:.2e}" for x in figures), "yes" * self.retried]


def attend(heads: Heads, exact: tuple[Array, Array], tolerance: float, lse: bool) -> list[tuple[Any, ...]]:
    """What Pair has from `rung` on, for each head."""
    out, *more, report = heads.attend(tolerance=tolerance, return_lse=lse, return_report=True)
    true = errors(out, exact[0])
    off = allowed = np.zeros(true.shape)
    if lse:
        wanted = np.where(np.isfinite(exact[1]), exact[1], 0)
        off = np.abs(np.where(np.isfinite(exact[1]), more[0], 0) - wanted).max(axis=2)
        # The scores behind an lse are about as large: four roundings of that size.
        allowed = np.maximum(tolerance, 4 * ROUNDING * np.maximum(1, np.abs(wanted).max(axis=2)))
    columns = (report.rungs, true, report.predicted_error, report.measured_error, report.error_limit)
    columns += (report.verified_rows, report.retried, off, allowed)
    return list(zip(*(x.ravel().tolist() for x in columns), strict=True))


def measure(sets: Sets, rates: list[str], left_out: dict[str, str]) -> list[Pair]:
    found: list[Pair] = []
    for name, make in sets.items():
        start = time.perf_counter()
        try:
            for heads in make():
                exact = heads.attend(adaattn.reference.attention, return_lse=True)
                sizes = heads.query.shape[2], heads.key.shape[2]
                for table, tolerance, lse in product(rates, TOLERANCES, (False, True)):
                    use_rates(table)
                    rows = zip(heads.names, attend(heads, exact, tolerance, lse), strict=True)
                    found += [Pair(name, head, *sizes, table, tolerance, lse, *row) for head, row in rows]
        except ImportError as why:
            left_out[name] = str(why)
        finally:
            use_rates("machine")
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def summary(found: list[Pair]) -> list[list[str]]:
    """A line for each thing that is wanted."""
    plain, both = ([x for x in found if x.with_lse == lse] for lse in (False, True))
    real = [x for x in found if x.set in REAL]
    known = [1 / 3 <= x.off(x.predicted) <= 3 for x in found if not np.isnan(x.predicted)]
    verified = [x for x in found if x.rows > 0]
    # Exact rows are as much finer than the tolerance: what lies below is not told from nothing.
    told = [x for x in verified if 20 * x.true >= x.tolerance]
    long, long_told = (
        [0.5 <= x.off(x.measured) <= 2 for x in some if x.queries >= 512] for some in (verified, told)
    )
    lines = [
        ("promise kept", [x.keeps for x in plain], 1.0, False),
        ("... lse asked for: output", [x.keeps for x in both], 1.0, False),
        ("... lse asked for: lse", [x.keeps_lse for x in both], 1.0, False),
        ("predicted within 3x", known, 0.95, False),
        ("measured within 2x, T >= 512", long, 0.99, False),
        ("... errors above tolerance / 20", long_told, 0.99, False),
        ("... limit below the truth", [x.limit < x.true - ROUNDING for x in told], 1e-3, True),
        ("retried, real heads", [x.retried for x in real], 0.03, True),
    ]
    return [
        [
            what,
            f"{share(part):.2%}",
            f"{'<=' if most else '>='} {limit:.1%}",
            verdict(share(part), limit, most=most),
            str(len(part)),
        ]
        for what, part, limit, most in lines
    ]


COLUMNS = ["head (T:S)", "tolerance", "rung", "true", "predicted", "measured", "limit"]
COLUMNS += ["lse", "lse allowed", "retried"]


def show(found: list[Pair], rates: str) -> None:
    show_table(f"rates: {rates}", ["", "share", "wanted", "", "of"], summary(found))
    rungs = sorted({x.rung for x in found}, key=lambda rung: -sum(x.rung == rung for x in found))
    rows = []
    for name, tolerance in product(dict.fromkeys(x.set for x in found), TOLERANCES):
        mine = [x for x in found if x.set == name and x.tolerance == tolerance]
        counts = Counter(x.rung for x in mine)
        off = [x.off(x.predicted) for x in mine if not np.isnan(x.predicted)]
        spread = " ".join(f"{x:.2g}" for x in np.quantile(off, (0.05, 0.5, 0.95))) if off else ""
        shares = [f"{share(getattr(x, what) for x in mine):.1%}" for what in ("keeps", "retried")]
        used = [f"{counts[rung] / len(mine):.0%}" if counts[rung] else "" for rung in rungs]
        rows.append([name, f"{tolerance:g}", *shares, spread, *used])
    header = ["set", "tolerance", "kept", "retried", "predicted/true: 5, 50, 95 %", *rungs]
    show_table("lse asked for or not", header, rows)
    for what, misses in (
        ("output", [x for x in found if not x.keeps]),
        ("lse", [x for x in found if not x.keeps_lse]),
    ):
        show_table(f"broken promises, {what}: {len(misses)}", COLUMNS, [x.row() for x in misses])


def plot(folder: Path, found: list[Pair], rates: str) -> None:
    figure, axes = draw(11, 4.8, 2)
    names = list(dict.fromkeys(x.set for x in found))
    for axis, what, factor in ((axes[0], "predicted", 3), (axes[1], "measured", 2)):
        for i, name in enumerate(names):
            mine = [x for x in found if x.set == name and getattr(x, what) >= 0]
            y = [x.off(getattr(x, what)) for x in mine]
            label = name if what == "predicted" else None
            axis.scatter([max(x.true, ROUNDING) for x in mine], y, s=8, linewidths=0.6, color=COLORS[i],
                         marker=MARKERS[i], label=label, alpha=0.6)  # fmt: skip
        for line in (1 / factor, 1, factor):
            axis.axhline(line, color="black", linewidth=0.8, linestyle="-" if line == 1 else "--")
        axis.set(xscale="log", yscale="log", xlabel="true error", ylabel=f"{what} error over the true one")
        axis.grid(alpha=0.3)
    figure.suptitle(f"Errors of heads within a budget, rates: {rates}", fontsize=12)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, markerscale=2, fontsize=10)
    save(figure, folder, f"promise-{rates}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    tables = f"any of {', '.join(RATES)}"
    parser.add_argument(
        "--rates", nargs="+", choices=RATES, default=["machine"], metavar="TABLE", help=tables
    )
    parser.add_argument("--sets", nargs="+", choices=list(SETS), metavar="SET")
    parser.add_argument("--quick", action="store_true", help="a tenth of the heads, short ones")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every head")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="promise-TABLE.png and .svg")
    args = parser.parse_args()

    sets = QUICK if args.quick else SETS
    left_out: dict[str, str] = {}
    sets = {name: make for name, make in sets.items() if name in (args.sets or sets)}
    found = measure(sets, args.rates, left_out)
    for rates in args.rates:
        mine = [x for x in found if x.rates == rates]
        show(mine, rates)
        if args.plot and mine:
            plot(args.plot, mine, rates)
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})")
    if args.json:
        write_json(args.json, left_out=left_out, pairs=[vars(x) for x in found])
    if not all(x.keeps and x.keeps_lse for x in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
