"""What leaving values out gains: the planner's choice against its own dense one, and torch's fp32 attention.

Heads are called one by one; the two structures and torch take turns, and a ratio compares the least times.
Errors are those against fp64. sparsity.py has the study behind the rule. Long runs can be cut: --part, then
--join. --split tells instead where the time of sparse heads goes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from heads import Heads, bundled, errors, gaussian
from instruments import RATES, add_parts, part_of, read_json, use_rates, verdict, write_json
from report import show_table

from adaattn.bench.heads import topics, walk
from adaattn.bench.peers import build_torch
from adaattn.bench.timing import plural

TOLERANCES = (1e-2, 5e-2)
PEAKED = 6  # of the 16 heads: those that keep least at the larger tolerance
#: Times as fast as dense: in all, and for the peaked heads.
WANTED = {
    ("bytelm 8192", 1e-2): 1.25, ("bytelm 8192", 5e-2): 1.8, ("bytelm 16384", 1e-2): 1.4,
    ("bytelm 16384", 5e-2): 2.3, ("built sparse 16384", 1e-2): 4.0, ("built low rank 16384", 1e-2): 3.0,
    ("gaussian 1.5, 16384", 1e-2): 1 / 1.03, ("gaussian 1.5, 16384", 5e-2): 1 / 1.03,
    ("gaussian 1.5, 16384, full", 1e-2): 1 / 1.03, ("gaussian 1.5, 16384, full", 5e-2): 1 / 1.03,
}  # fmt: skip


def needles(length: int) -> Heads:
    """Local rows, of which every 64th sees one key far away instead."""
    heads = next(bundled(length))
    q, k = heads.query[:, :1].copy(), heads.key[:, :1]
    rows = np.arange(length // 2 + 5, length, 64)
    goals = k[0, 0, rows * 7 % (length // 2)]
    q[0, 0, rows] = goals * (25 * np.sqrt(q.shape[3]) / np.sum(goals * goals, axis=1, keepdims=True))
    return Heads(f"needles {length}", q, k, heads.value[:, :1], heads.options)


def smooth(length: int, dims: int, spread: float, *, causal: bool = False) -> Heads:
    heads = walk(length, dims=dims, spread=spread, seed=dims)
    return replace(heads, name=f"{heads.name}, causal", options={"causal": True}) if causal else heads


WALKS = ((2, 1.0), (4, 0.5), (4, 1.0), (8, 0.3), (8, 0.5))


SETS: dict[str, Callable[[], Iterator[Heads]]] = {
    "bytelm 4096": lambda: bundled(4096),
    "bytelm 8192": lambda: bundled(8192),
    "bytelm 16384": lambda: bundled(16384),
    "built sparse 16384": lambda: iter([topics(16384)]),
    "built low rank 4096": lambda: (smooth(4096, *each) for each in WALKS),
    "built low rank 16384": lambda: (smooth(16384, *each) for each in WALKS),
    "built low rank 16384, causal": lambda: (smooth(16384, *each, causal=True) for each in WALKS),
    "needles 8192": lambda: iter([needles(8192)]),
    "gaussian 1.5, 4096": lambda: iter([gaussian(1.5, 4096, 4096, causal=True)]),
    "gaussian 1.5, 16384": lambda: iter([gaussian(1.5, 16384, 16384, causal=True)]),
    "gaussian 1.5, 16384, full": lambda: iter([gaussian(1.5, 16384, 16384)]),
    "gaussian 0.3, 16384, full": lambda: iter([gaussian(0.3, 16384, 16384)]),
}


@dataclass
class Case:
    """One head, tolerance and number of threads."""

    set: str
    head: str
    tolerance: float
    threads: int
    seconds: dict[str, float] = field(default_factory=dict)
    structure: str = ""
    rungs: dict[str, str] = field(default_factory=dict)
    kept: float = 1
    rank: int = 0
    error: float = 0  # over the tolerance, as are the next two
    predicted: float = 0
    limit: float = 0
    retried: bool = False


def measure(name: str, head: Heads, threads: int, rounds: int, exact: Any) -> list[Case]:
    """At each tolerance."""
    cases = [Case(name, head.name, t, threads) for t in TOLERANCES]
    calls: list[tuple[Case, str, Callable[[], Any]]] = []
    for case in cases:
        for structure in ("auto", "dense"):
            options = {"tolerance": case.tolerance, "structure": structure, "return_report": True}
            calls.append((case, structure, partial(head.attend, num_threads=threads, **options)))
    with suppress(ImportError):
        arrays = [np.ascontiguousarray(x) for x in (head.query, head.key, head.value)]
        calls.append((cases[0], "torch", build_torch(arrays, head.causal, threads)))
    for _ in range(rounds):
        for case, who, call in calls:
            start = time.perf_counter()
            result = call()
            spent = time.perf_counter() - start
            case.seconds[who] = min(spent, case.seconds.get(who, spent))
            if who != "torch":
                note(case, who, *result, exact)
    for case in cases:
        case.seconds |= {who: spent for who, spent in cases[0].seconds.items() if who == "torch"}
    return cases


def note(case: Case, who: str, out: Any, report: Any, exact: Any) -> None:
    """What one call tells."""
    case.rungs[who] = str(report.rungs[0, 0])
    if who != "auto":
        return
    case.structure, case.kept = str(report.structure[0, 0]), float(report.kept_fraction[0, 0])
    case.rank = int(report.rank[0, 0])
    case.error = float(errors(out, exact)[0, 0]) / case.tolerance
    case.predicted = float(report.predicted_error[0, 0]) / case.tolerance
    case.limit = float(report.error_limit[0, 0]) / case.tolerance
    case.retried = bool(report.retried[0, 0])


@dataclass
class Split:
    """Milliseconds of one sparse head."""

    head: str
    tolerance: float
    rung: str
    kept: float
    dense: float  # the planner's dense choice, planned and verified
    looking: float  # probe and plan
    scores: float  # with gauging them, packing and stand-ins: all blocks stand in
    values: float  # of the blocks that are kept
    verifying: float
    everything: float  # were all blocks kept


def split(head: Heads, tolerance: float, rounds: int) -> Split | None:
    """None for heads that are not sparse."""
    _, report = head.attend(tolerance=tolerance, num_threads=1, return_report=True)
    plan = report.plan
    if report.structure[0, 0] != "sparse":
        return None
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, factor in (("some", 1.0), ("none", 1e12), ("all", 1e-12)):
            given = replace(plan, sparse_budget=plan.sparse_budget * factor)
            told = head.attend(plan=given, verify=False, num_threads=1, return_report=True)[1]
            times.setdefault(name, []).append(told.seconds["execute"])
        told = head.attend(tolerance=tolerance, num_threads=1, return_report=True)[1]
        for name in ("probe", "plan", "verify"):
            times.setdefault(name, []).append(told.seconds[name])
        told = head.attend(tolerance=tolerance, structure="dense", num_threads=1, return_report=True)[1]
        times.setdefault("dense", []).append(sum(told.seconds.values()))
    least = {name: 1e3 * min(samples) for name, samples in times.items()}
    return Split(
        head=head.name,
        tolerance=tolerance,
        rung=str(report.rungs[0, 0]),
        kept=float(report.kept_fraction[0, 0]),
        dense=least["dense"],
        looking=least["probe"] + least["plan"],
        scores=least["none"],
        values=max(least["some"] - least["none"], 0),
        verifying=least["verify"],
        everything=least["all"],
    )


def show_splits(splits: list[Split]) -> None:
    """Shares of the dense time, and the gain as it is, without looking and verifying, and where blocks are
    free."""
    names = "looking", "scores", "values", "verifying"
    rows = []
    for t in TOLERANCES:
        of = [one for one in splits if one.tolerance == t]
        for one in [*of, None] if of else []:
            some = of if one is None else [one]
            dense = sum(x.dense for x in some)
            parts = {name: sum(getattr(x, name) for x in some) for name in names}
            rows.append(
                [
                    "all" if one is None else one.head,
                    f"{t:g}",
                    "" if one is None else one.rung,
                    f"{np.mean([x.kept for x in some]):.2f}",
                    *(f"{parts[name] / dense:.2f}" for name in names),
                    f"{sum(x.everything for x in some) / dense:.2f}",
                    f"{dense / sum(parts.values()):.2f}",
                    f"{dense / (parts['scores'] + parts['values']):.2f}",
                    f"{dense / parts['scores']:.2f}",
                ]
            )
    header = ["head", "t", "rung", "kept", "look", "scores", "values", "verify"]
    header += ["all kept", "gain", "executed", "no values"]
    show_table("Where the time of sparse heads goes, over that of dense ones", header, rows)


def peaked(cases: list[Case]) -> set[str]:
    """Names of the heads that keep least."""
    largest = [one for one in cases if one.tolerance == max(TOLERANCES)]
    return {one.head for one in sorted(largest, key=lambda one: one.kept)[:PEAKED]}


def row(label: str, cases: list[Case], wanted: float = float("nan")) -> list[str]:
    total = {who: sum(one.seconds[who] for one in cases) for who in cases[0].seconds}
    over = {who: seconds / total["auto"] for who, seconds in total.items()}
    sparse, ranks = (
        [one for one in cases if one.structure == structure] for structure in ("sparse", "low_rank")
    )
    return [
        label,
        f"{cases[0].tolerance:g}",
        f"{len(sparse)}/{len(cases)}",
        f"{np.mean([one.kept for one in cases]):.2f}",
        f"{len(ranks)}/{len(cases)}",
        f"{np.mean([one.rank for one in ranks]):.0f}" if ranks else "",
        f"{1e3 * total['auto']:.1f}",
        f"{over['dense']:.2f}",
        "" if np.isnan(wanted) else f"{wanted:.2f} {verdict(over['dense'], wanted)}",
        f"{over['torch']:.2f}" if "torch" in over else "",
        f"{max(one.error for one in cases):.2f}",
        f"{sum(one.retried for one in cases)}",
        f"{min(one.seconds['dense'] / one.seconds['auto'] for one in cases):.2f}",
    ]


def show(cases: list[Case], threads: int) -> None:
    """Those of so many threads."""
    rows = []
    for name in dict.fromkeys(one.set for one in cases):
        own = [one for one in cases if one.set == name]
        least = peaked(own) if len({one.head for one in own}) > PEAKED else set()
        for t in TOLERANCES:
            of = [one for one in own if one.tolerance == t]
            rows.append(row(name, of, WANTED.get((name, t), float("nan"))))
            if least:
                few = [one for one in of if one.head in least]
                rows.append(row(f"  its {PEAKED} peaked heads", few, 3.0 if t == max(TOLERANCES) else np.nan))
    header = [
        "heads",
        "t",
        "sparse",
        "kept",
        "low rank",
        "rank",
        "ms",
        "x dense",
        "wanted",
        "x torch",
        "error/t",
        "again",
        "least",
    ]
    show_table(f"Structure against dense at the same tolerance, {plural(threads)}", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), metavar="SET")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rates", choices=RATES, default="machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_parts(parser)
    parser.add_argument("--split", action="store_true", help="where the time of sparse heads goes")
    args = parser.parse_args()

    use_rates(args.rates)
    cases = [Case(**one) for path in args.join or () for one in read_json(path, "cases")]
    splits: list[Split | None] = []
    for name in () if args.join else args.sets:
        for head in part_of([head for some in SETS[name]() for head in some.apart()], args.part):
            print(head.name, file=sys.stderr, flush=True)
            if args.split:
                splits += [split(head, t, args.rounds) for t in TOLERANCES]
                continue
            exact = head.attend(precision="fp64")
            for threads in args.threads:
                cases += measure(name, head, threads, args.rounds, exact)
    if args.split:
        show_splits([one for one in splits if one])
        return
    for threads in sorted({one.threads for one in cases}):
        show([one for one in cases if one.threads == threads], threads)
    if args.json:
        write_json(args.json, cases=[vars(one) for one in cases])


if __name__ == "__main__":
    main()
