"""What a tolerance costs and what it gains: probe, plan and verification as a share of a call, and speed.

Everyone takes a turn in every round, and a ratio compares times of the same round: the three policies, a plan
that is used again, the exact default, and torch's attention at fp32, on Gaussian and on real heads. Nobody
who is timed makes a report; shares come from calls besides. Long runs can be cut: --part, then --join.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from compare import SECTIONS
from heads import Heads
from instruments import (
    COLORS,
    POLICIES,
    RATES,
    REAL,
    add_parts,
    draw,
    geometric_mean,
    part_of,
    read_json,
    save,
    use_rates,
    verdict,
    write_json,
)
from peers import Shape, make_inputs
from report import show_table

from adaattn.bench.peers import build_torch
from adaattn.bench.timing import plural, settle

SIGMAS = (1, 2)
SIZES = {512: 0.15, 2048: 0.05, 4096: 0.05}  # to the share that probe, plan and verification may take
REUSED = 0.03  # the same with a plan that was made before
TURN = 0.03  # seconds, at least
OVERHEAD = [Shape(1, 4, n, n, 64) for n in SIZES]
REUSE = "balanced, plan="


def gaussian_cases(shapes: list[Shape]) -> Iterator[tuple[str, Heads]]:
    for shape in shapes:
        query, key, value = make_inputs(shape)["fp32"]
        options = {"causal": True} if shape.causal else {}
        for sigma in SIGMAS:
            yield str(shape), Heads(f"gaussian {sigma}", sigma * query, key, value, options)


def real_cases() -> Iterator[tuple[str, Heads]]:
    for name, make in REAL.items():
        try:
            for heads in make():
                yield name, heads
        except ImportError as why:
            print(f"left out: {name} ({why})")


@dataclass
class Runner:
    """One of those who take turns on a case."""

    group: str  # Gaussian, real, overhead
    case: str
    head: str
    keys: int
    threads: int
    name: str
    call: Callable[..., Any] | None = field(default=None, repr=False)
    tells: bool = False  # has a report
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # of probe, plan and verification
    rungs: list[str] = field(default_factory=list)

    def turn(self) -> None:
        """Calls for a while; the mean counts. Then once with a report."""
        assert self.call is not None
        start = time.perf_counter()
        calls = 0
        while calls == 0 or time.perf_counter() - start < TURN:
            self.call()
            calls += 1
        self.seconds.append((time.perf_counter() - start) / calls)
        if self.tells:
            report = self.call(return_report=True)[-1]
            self.shares.append(1 - report.seconds["execute"] / sum(report.seconds.values()))
            self.rungs = sorted(set(report.rungs.flat))

    def over(self, other: Runner) -> float:
        """How many times as fast as another, in the median round."""
        return statistics.median(y / x for x, y in zip(self.seconds, other.seconds, strict=True))


def runners(group: str, case: str, heads: Heads, threads: int) -> list[Runner]:
    causal = bool(heads.options.get("causal"))
    calls: dict[str, Callable[..., Any]] = {
        name: partial(heads.attend, policy=name, num_threads=threads) for name in POLICIES
    }
    plan = heads.attend(policy="balanced", return_report=True)[-1].plan
    calls[REUSE] = partial(heads.attend, plan=plan, num_threads=threads)
    calls["exact"] = partial(heads.attend, num_threads=threads)
    with suppress(ImportError):
        calls["torch"] = build_torch([heads.query, heads.key, heads.value], causal, threads)
    keys = heads.key.shape[2]
    return [
        Runner(group, case, heads.name, keys, threads, name, call, name in (*POLICIES, REUSE))
        for name, call in calls.items()
    ]


def measure(
    cases: dict[str, Iterator[tuple[str, Heads]]], thread_counts: list[int], rounds: int
) -> list[list[Runner]]:
    found = []
    for group, members in cases.items():
        for case, heads in members:
            for threads in thread_counts:
                turns = runners(group, case, heads, threads)
                for one in turns:
                    if one.call:
                        one.call()
                for i in range(rounds):
                    for one in (*turns[i % len(turns) :], *turns[: i % len(turns)]):
                        if threads > 1:
                            settle()
                        one.turn()
                found.append(turns)
                for one in turns:
                    one.call = None
            print(f"{group}: {case}, {heads.name}", file=sys.stderr, flush=True)
    return found


def joined(files: list[Path]) -> list[list[Runner]]:
    """The runs that --json kept, by case again."""
    found: dict[tuple[Any, ...], list[Runner]] = {}
    for file in files:
        for run in read_json(file, "runs"):
            one = Runner(**run)
            found.setdefault((file, one.group, one.case, one.head, one.threads), []).append(one)
    return list(found.values())


def show_shares(found: list[list[Runner]], threads: int) -> None:
    rows = []
    for turns in found:
        for one in turns:
            if one.group == "overhead" and one.threads == threads and one.shares:
                limit = REUSED if one.name == REUSE else SIZES[one.keys]
                share = statistics.median(one.shares)
                judged = verdict(share, limit, most=True)
                wanted = [f"{share:.1%}", f"<= {limit:.0%}", judged, " ".join(one.rungs)]
                rows.append(
                    [one.case, one.head, one.name, f"{1e3 * statistics.median(one.seconds):.1f}", *wanted]
                )
    header = ["shape", "", "policy", "ms", "share", "wanted", "", "rungs"]
    show_table(f"probe, plan and verification as a share of the call, {plural(threads)}", header, rows)


def show_speeds(found: list[list[Runner]], group: str, threads: int) -> None:
    """Times as fast as torch and as the exact default: a line for each case, and geometric means."""
    lines: dict[tuple[str, str], list[list[Runner]]] = {}
    for turns in found:
        if turns[0].group == group and turns[0].threads == threads:
            where = turns[0].head if group == "Gaussian" else ""
            lines.setdefault((turns[0].case, where), []).append(turns)
    if not lines:
        return
    lines["geometric mean", ""] = [turns for several in lines.values() for turns in several]
    rows = []
    for (case, where), several in lines.items():
        row = [case, where]
        for other in ("torch", "exact"):
            for name in (*POLICIES, REUSE, "exact")[: None if other == "torch" else -1]:
                pairs = [{one.name: one for one in turns} for turns in several]
                ratios = [pair[name].over(pair[other]) for pair in pairs if other in pair]
                row.append(f"{geometric_mean(ratios):.2f}" if ratios else "")
        for name in (*POLICIES, REUSE):
            shares = [x for turns in several for one in turns if one.name == name for x in one.shares]
            row.append(f"{statistics.median(shares):.0%}")
        rows.append(row)
    # Over torch, over the exact default, and what probe, plan and verification take.
    initials = ["Q", "B", "S", "plan"]
    header = ["heads", "", *(f"{x}/torch" for x in (*initials, "exact"))]
    header += [f"{x}/ex." for x in initials] + [f"{x} %" for x in initials]
    show_table(
        f"{group}: times as fast, and share of probe, plan and verification, {plural(threads)}", header, rows
    )


def plot(folder: Path, found: list[list[Runner]]) -> None:
    """Times as fast as torch: a mark for each call."""
    figure, axes = draw(11, 4.8, 2)
    for axis, other in zip(axes, ("torch", "exact"), strict=True):
        names = [*POLICIES, REUSE]
        for i, name in enumerate(names):
            pairs = [{one.name: one for one in turns} for turns in found if turns[0].group != "overhead"]
            ratios = sorted(pair[name].over(pair[other]) for pair in pairs if other in pair)
            x = [i + 0.7 * (j / max(len(ratios) - 1, 1) - 0.5) for j in range(len(ratios))]
            axis.scatter(x, ratios, s=9, color=COLORS[i])
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(yscale="log", ylabel=f"times as fast as {other}")
        axis.set_xticks(range(len(names)), names)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle("Speed within a budget, a mark for each call", fontsize=12)
    save(figure, folder, "budget")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--rates", choices=RATES, default="machine", metavar="TABLE")
    parser.add_argument("--groups", nargs="+", choices=["overhead", "Gaussian", "real"], metavar="GROUP")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--quick", action="store_true", help="short heads and three rounds")
    add_parts(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, with every sample")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="budget.png and .svg")
    args = parser.parse_args()

    use_rates(args.rates)
    shapes, real = SECTIONS["prefill"], real_cases()
    if args.quick:
        shapes = [shape for shape in shapes if shape.keys <= 512]
        real = ((name, heads) for name, heads in real_cases() if heads.key.shape[2] <= 512)
    cases = {
        "overhead": gaussian_cases(OVERHEAD),
        "Gaussian": gaussian_cases(shapes),
        "real": real,
    }
    cases = {name: part_of(cases[name], args.part) for name in cases if name in (args.groups or cases)}
    gc.disable()
    found = joined(args.join) if args.join else measure(cases, args.threads, 3 if args.quick else args.rounds)
    for threads in sorted({turns[0].threads for turns in found}):
        if any(turns[0].group == "overhead" for turns in found):
            show_shares(found, threads)
        for group in ("Gaussian", "real"):
            show_speeds(found, group, threads)
    if args.json:
        kept = [vars(one) for turns in found for one in turns]
        write_json(args.json, rates=args.rates, runs=kept)
    if args.plot:
        plot(args.plot, found)


if __name__ == "__main__":
    main()
