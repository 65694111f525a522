"""What choosing before computing costs: the planner's choice against the best one in hindsight.

On real heads. The best is the fastest rung whose true error keeps the tolerance. Times of rungs are measured
here, or those that a table of rates gives; a head that verification sends up pays for both rungs. Probing and
verifying are not part of it: see budget.py.

With --structures on long heads, real and built: the best is the fastest of every rung dense, every rung that
may be sparse, within the budget that planning leaves it, and of 16 to 256 landmarks those that leave few rows
to be computed exactly; all are measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from heads import Array, Heads, errors
from instruments import (
    COLORS,
    RATES,
    REAL,
    add_parts,
    draw,
    part_of,
    read_json,
    save,
    share,
    use_rates,
    verdict,
    write_json,
)
from report import show_table
from structure import SETS
from structure import TOLERANCES as LOOSE

import adaattn
import adaattn.rates as machine
from adaattn.rates import RUNGS, split

TOLERANCES = (1e-5, 1e-4, 1e-3, 1e-2, 5e-2)
WANTED = 1.1
WANTED_STRUCTURES = 1.15
RANKS = (16, 32, 64, 128, 256)


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


def structures(name: str, head: Heads, rounds: int) -> Iterator[Choice]:
    """Of one long head, at each tolerance, with the names of what computes it: "bf16", "bf16 sparse"."""
    exact = head.attend(precision="fp64")
    dense = {rung: partial(head.attend, precision=split(rung), num_threads=1) for rung in RUNGS}
    for tolerance in LOOSE:
        plan = head.attend(adaattn.plan, tolerance=tolerance)
        report = head.attend(tolerance=tolerance, return_report=True)[-1]
        calls = dense | dict(low_rank_calls(head, tolerance)) | dict(sparse_calls(head, tolerance))
        first, final = label(plan), label(report)
        for label_of, made in ((first, plan), (final, report.plan)):
            calls[label_of] = partial(head.attend, plan=made, verify=False, num_threads=1)
        seconds = least_seconds(calls, {first, final}, exact, tolerance, rounds)
        best = min((who for who in seconds if who != first or first == final), key=seconds.__getitem__)
        spent = seconds[final] + (seconds[first] if first != final else 0)
        yield Choice(name, head.name, tolerance, first, final, best, spent, seconds[best])


def label(report: Any) -> str:
    """Of a report's or a plan's head."""
    structure, rung = str(report.structure[0, 0]), str(report.rungs[0, 0])
    if structure == "low_rank":
        return f"{int(report.rank[0, 0])} landmarks"
    return rung if structure == "dense" else f"{rung} {structure}"


def sparse_calls(head: Heads, tolerance: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each rung that may be sparse; the pair has the budget of its more exact part."""
    for rung in ("int16", "bf16", "int8"):
        made = head.attend(
            adaattn.plan, tolerance=tolerance, structure="sparse", min_precision=rung, max_precision=rung
        )
        if made.structure[0, 0] != "sparse":
            continue
        yield f"{rung} sparse", partial(head.attend, plan=made, verify=False, num_threads=1)
        if rung == "bf16":
            pair = replace(made, precision_qk=np.full((1, 1), "int8"))
            yield "int8/bf16 sparse", partial(head.attend, plan=pair, verify=False, num_threads=1)


def low_rank_calls(head: Heads, tolerance: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Without those that know no limit of residuals: nothing is promised of rows that they do not span."""
    for rank in RANKS:
        options = {"structure": "low_rank", "min_rank": rank, "max_rank": rank}
        made = head.attend(adaattn.plan, tolerance=tolerance, **options)
        if made.structure[0, 0] == "low_rank" and np.isfinite(made.rank_limit[0, 0]):
            yield label(made), partial(head.attend, plan=made, verify=False, num_threads=1)


def least_seconds(
    calls: dict[str, Callable[[], Any]], wanted: set[str], exact: Array, tolerance: float, rounds: int
) -> dict[str, float]:
    """Of those that keep the tolerance and are not far slower than others, and of the wanted ones."""
    once: dict[str, float] = {}
    for who, call in calls.items():
        start = time.perf_counter()
        out = call()
        spent = time.perf_counter() - start
        if who in wanted or errors(out, exact)[0, 0] <= tolerance:
            once[who] = spent
    near = {who for who, spent in once.items() if spent < 1.5 * min(once.values())} | wanted
    samples: dict[str, list[float]] = {who: [] for who in once if who in near}
    for _ in range(rounds):
        for who, own in samples.items():
            start = time.perf_counter()
            calls[who]()
            own.append(time.perf_counter() - start)
    return {who: min(own) for who, own in samples.items()}


def row(found: list[Choice], wanted: float = WANTED) -> list[str]:
    regrets = np.array([x.regret for x in found])
    mean = float(regrets.mean())
    pairs = Counter(f"{x.final} for {x.best}" for x in found if x.final != x.best)
    common = ", ".join(f"{pair} {n / len(found):.0%}" for pair, n in pairs.most_common(3))
    right = f"{share(x.final == x.best for x in found):.0%}"
    return [f"{mean:.2f}", verdict(mean, wanted, most=True), f"{regrets.max():.2f}", right, common]


def show(found: list[Choice], rates: str, how: str, wanted: float = WANTED) -> None:
    rows = []
    tolerances = sorted({x.tolerance for x in found})
    for name, tolerance in product(dict.fromkeys(x.set for x in found), tolerances):
        own = [x for x in found if (x.set, x.tolerance) == (name, tolerance)]
        rows.append([name, f"{tolerance:g}", *row(own, wanted)])
    for tolerance in tolerances:
        rows.append(["all", f"{tolerance:g}", *row([x for x in found if x.tolerance == tolerance], wanted)])
    rows.append(["all", "all", *row(found, wanted)])
    header = [
        "set",
        "tolerance",
        "mean",
        f"<= {wanted}",
        "most",
        "same choice",
        "most often chosen for the best",
    ]
    show_table(f"time over that of the best choice; rates: {rates}, times: {how}", header, rows)


def plot(folder: Path, found: list[Choice], rates: str, wanted: float = WANTED) -> None:
    figure, (axis,) = draw(8, 4.6)
    for i, tolerance in enumerate(sorted({x.tolerance for x in found})):
        regrets = sorted(x.regret for x in found if x.tolerance == tolerance)
        axis.plot(np.linspace(0, 1, len(regrets)), regrets, color=COLORS[i], label=f"{tolerance:g}")
    axis.axhline(wanted, color="black", linewidth=0.8, linestyle="--")
    axis.set(xlabel="share of heads", ylabel="time over that of the best choice")
    axis.legend(title="tolerance", frameon=False)
    axis.grid(alpha=0.3)
    figure.suptitle(f"The planner's choice against the best in hindsight, rates: {rates}", fontsize=12)
    save(figure, folder, f"regret-{rates}")


def measure_rungs(names: list[str], part: tuple[int, int], rounds: int) -> Iterator[Choice]:
    """rounds: as of `choices`."""
    for name in names:
        print(name, file=sys.stderr, flush=True)
        try:
            for heads in part_of(REAL[name](), part):
                yield from choices(name, heads, rounds)
        except ImportError as why:
            print(f"left out: {name} ({why})")


def measure_structures(names: list[str], part: tuple[int, int], rounds: int) -> Iterator[Choice]:
    for name in names:
        for head in part_of([head for some in SETS[name]() for head in some.apart()], part):
            print(head.name, file=sys.stderr, flush=True)
            yield from structures(name, head, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", choices=RATES, default="machine", metavar="TABLE", help=", ".join(RATES))
    help_times = "where rungs' times come from; default: measured for this machine's rates, else the table"
    parser.add_argument("--times", choices=["measured", "table"], help=help_times)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of measuring times")
    parser.add_argument("--structures", action="store_true", help="long heads, over rungs and structures")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="of the real heads, or of structure.py's")
    add_parts(parser)
    parser.add_argument("--quick", action="store_true", help="heads of at most 512 keys, 3 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every head")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="regret-TABLE.png and .svg")
    args = parser.parse_args()

    known, wanted = (SETS, WANTED_STRUCTURES) if args.structures else (REAL, WANTED)
    names = args.sets or list(known)
    if unknown := set(names) - set(known):
        parser.error(f"--sets: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    use_rates(args.rates)
    by_rates = args.times or ("measured" if args.rates in ("machine", "calibrated") else "table")
    how = "measured" if args.structures else by_rates
    rounds = 3 if args.quick else args.rounds
    if args.join:
        found = [Choice(**x) for path in args.join for x in read_json(path, "choices")]
    elif args.structures:
        found = list(measure_structures(names, args.part, rounds))
    else:
        if args.quick:
            names = [x for x in names if x.endswith(("128 tokens", "512 tokens", "512 bytes"))]
        found = list(measure_rungs(names, args.part, rounds if how == "measured" else 0))
    show(found, args.rates, how, wanted)
    if args.json:
        write_json(args.json, rates=args.rates, times=how, choices=[vars(x) for x in found])
    if args.plot and found:
        plot(args.plot, found, args.rates, wanted)


if __name__ == "__main__":
    main()
