"""What choosing before computing costs: the planner's choice against the best one in hindsight.

On real heads. The best is the fastest rung whose true error keeps the tolerance. Times of rungs are measured
here, or those that a table of rates gives; a head that verification sends up pays for both rungs. Probing and
verifying are not part of it: see budget.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from heads import Array, Heads, errors
from instruments import COLORS, RATES, REAL, draw, save, share, use_rates, verdict, write_json
from report import show_table

import adaattn
import adaattn.rates as machine
from adaattn.rates import RUNGS, split

TOLERANCES = (1e-5, 1e-4, 1e-3, 1e-2, 5e-2)
WANTED = 1.1


@dataclass
class Choice:
    """The planner's for one head, and the best."""

    set: str
    head: str
    tolerance: float
    first: str
    final: str
    best: str
    seconds: float
    least: float

    @property
    def regret(self) -> float:
        return self.seconds / self.least


def measured_seconds(heads: Heads, rounds: int) -> Array:
    """Of each rung, for one head on one core; the rungs take turns. Rungs of equal rates are one."""
    samples: dict[str, list[float]] = {rung: [] for rung in RUNGS}
    for _ in range(rounds):
        for rung, times in samples.items():
            start = time.perf_counter()
            heads.attend(precision=split(rung), num_threads=1)
            times.append(time.perf_counter() - start)
    count = heads.query.shape[0] * heads.query.shape[1]
    seconds = np.array([min(times) / count for times in samples.values()])
    table = machine.table()
    return np.array([seconds[(table == rates).all(axis=1)].min() for rates in table])


def choices(name: str, heads: Heads, rounds: int) -> list[Choice]:
    """rounds: of measuring times; 0: go by the table of rates."""
    exact = heads.exact()
    error = np.stack([errors(heads.attend(precision=split(rung)), exact) for rung in RUNGS], axis=-1)
    error[..., 0] = 0  # fp64, but for the rounding of the output
    measured = measured_seconds(heads, rounds) if rounds else None
    found = []
    for tolerance in TOLERANCES:
        plan = heads.attend(adaattn.plan, tolerance=tolerance)
        report = heads.attend(tolerance=tolerance, return_report=True)[-1]
        seconds = plan.candidate_seconds if measured is None else np.broadcast_to(measured, error.shape)
        first, final = plan.rungs, report.rungs
        for i, at in enumerate(np.ndindex(first.shape)):
            times: dict[str, Any] = dict(zip(RUNGS, seconds[at].tolist(), strict=True))
            keeping = [rung for rung, e in zip(RUNGS, error[at], strict=True) if e <= tolerance]
            best = min(keeping, key=times.__getitem__)
            spent = times[final[at]] + (times[first[at]] if first[at] != final[at] else 0)
            chosen = str(first[at]), str(final[at])
            found.append(Choice(name, heads.names[i], tolerance, *chosen, best, spent, times[best]))
    return found


def row(found: list[Choice]) -> list[str]:
    regrets = np.array([x.regret for x in found])
    mean = float(regrets.mean())
    pairs = Counter(f"{x.final} for {x.best}" for x in found if x.final != x.best)
    common = ", ".join(f"{pair} {n / len(found):.0%}" for pair, n in pairs.most_common(3))
    right = f"{share(x.final == x.best for x in found):.0%}"
    return [f"{mean:.2f}", verdict(mean, WANTED, most=True), f"{regrets.max():.2f}", right, common]


def show(found: list[Choice], rates: str, how: str) -> None:
    rows = []
    for name, tolerance in product(dict.fromkeys(x.set for x in found), TOLERANCES):
        rows.append(
            [name, f"{tolerance:g}", *row([x for x in found if (x.set, x.tolerance) == (name, tolerance)])]
        )
    for tolerance in TOLERANCES:
        rows.append(["all", f"{tolerance:g}", *row([x for x in found if x.tolerance == tolerance])])
    rows.append(["all", "all", *row(found)])
    header = [
        "set",
        "tolerance",
        "mean",
        f"<= {WANTED}",
        "most",
        "same rung",
        "most often chosen for the best",
    ]
    show_table(f"time over that of the best choice; rates: {rates}, times: {how}", header, rows)


def plot(folder: Path, found: list[Choice], rates: str) -> None:
    figure, (axis,) = draw(8, 4.6)
    for i, tolerance in enumerate(TOLERANCES):
        regrets = sorted(x.regret for x in found if x.tolerance == tolerance)
        axis.plot(np.linspace(0, 1, len(regrets)), regrets, color=COLORS[i], label=f"{tolerance:g}")
    axis.axhline(WANTED, color="black", linewidth=0.8, linestyle="--")
    axis.set(xlabel="share of heads", ylabel="time over that of the best choice")
    axis.legend(title="tolerance", frameon=False)
    axis.grid(alpha=0.3)
    figure.suptitle(f"The planner's choice against the best in hindsight, rates: {rates}", fontsize=12)
    save(figure, folder, f"regret-{rates}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", choices=RATES, default="machine", metavar="TABLE", help=", ".join(RATES))
    help_times = "where rungs' times come from; default: measured for this machine's rates, else the table"
    parser.add_argument("--times", choices=["measured", "table"], help=help_times)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of measuring times")
    parser.add_argument("--sets", nargs="+", choices=list(REAL), default=list(REAL), metavar="SET")
    parser.add_argument("--quick", action="store_true", help="heads of at most 512 keys, 3 rounds")
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="measure nothing; show these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every head")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="regret-TABLE.png and .svg")
    args = parser.parse_args()

    use_rates(args.rates)
    how = args.times or ("measured" if args.rates in ("machine", "calibrated") else "table")
    rounds = (3 if args.quick else args.rounds) if how == "measured" else 0
    found: list[Choice] = []
    for file in args.join or ():
        kept = json.loads(file.read_text())
        how = kept["times"]
        found += [Choice(**choice) for choice in kept["choices"]]
    for name in args.sets if not args.join else ():
        if args.quick and not name.endswith(("128 tokens", "512 tokens", "512 bytes")):
            continue
        print(name, file=sys.stderr, flush=True)
        try:
            for heads in REAL[name]():
                found += choices(name, heads, rounds)
        except ImportError as why:
            print(f"left out: {name} ({why})")
    show(found, args.rates, how)
    if args.json:
        write_json(args.json, rates=args.rates, times=how, choices=[vars(x) for x in found])
    if args.plot and found:
        plot(args.plot, found, args.rates)


if __name__ == "__main__":
    main()
