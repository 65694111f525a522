"""What changed between two saved runs beyond noise.

Times of two runs differ because the machine does, and other work can only make them longer: the shortest of
each block of rounds counts, beside those of others in the same block: of the multiply-add peak, and of peers
of the same version, which did not change. A change is the least that is seen beside any of them, and none
where they contradict each other. Between two blocks of a run all other cases are measured, so they differ as
runs do: a row's standard error follows from how far its own blocks lie apart, or those of the middle row,
whichever is more. A change is more than noise if it exceeds four standard errors and 3 %. Where there is
nothing to compare with, times themselves count, and runs are taken to differ by 10 % without reason.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from .contenders import CONFIGURATIONS, LABELS
from .results import Row, Run
from .tables import scientific

SIGMAS = 4
LEAST = 0.03
_UNEXPLAINED = 0.1
_RESTLESS = 0.1
_Yardsticks = dict[str, list[float]]  # what times are compared beside: logarithms of seconds, by block


@dataclass(frozen=True)
class Change:
    """One row of both runs: how many times as long it takes now, and up to which factor that may be noise."""

    row: Row
    factor: float
    noise: float
    choices: str  # what is chosen otherwise, in words
    error: str
    memory: str
    broken: bool  # keeps its promise no more

    @property
    def verdict(self) -> str:
        if abs(math.log(self.factor)) <= math.log(self.noise):
            return ""
        return "slower" if self.factor > 1 else "faster"

    @property
    def worth_telling(self) -> bool:
        return bool(self.verdict or self.choices or self.error or self.memory or self.broken)


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    notes: list[str]

    @property
    def worse(self) -> bool:
        return any(change.verdict == "slower" or change.broken for change in self.changes)

    def table(self) -> tuple[list[str], list[list[str]]]:
        header = ["section", "heads", "B,H,S,D", "contender", "time x", "noise x", "", "what else"]
        rows = []
        for change in self.changes:
            if change.worth_telling:
                row = change.row
                what = [change.choices, change.error, change.memory]
                what += ["BREAKS ITS PROMISE"] if change.broken else []
                rows.append(
                    [row.section, row.heads, row.case, LABELS[row.name], f"{change.factor:.2f}",
                     f"{change.noise:.2f}", change.verdict, "; ".join(filter(None, what))]
                )  # fmt: skip
        return header, rows


def compare(before: Run, after: Run) -> Comparison:
    """Every row of AdaAttn that both runs have.

    Raises
    ------
    ArgumentError
        They have none in common, or their tolerances differ.
    """
    if before.tolerance != after.tolerance:
        raise ArgumentError(
            f"--compare: expected runs with one tolerance, got {before.tolerance:g} and {after.tolerance:g}"
        )
    olds, news = ({row.key: row for row in run.rows} for run in (before, after))
    both = [(olds[key], row) for key, row in news.items() if key in olds]
    ours = [(old, new) for old, new in both if new.name in CONFIGURATIONS]
    if not ours:
        raise ArgumentError("--compare: expected runs with a case in common, got none")
    steady = [name for name in ("torch", "onnxruntime", "numpy") if _same_version(before, after, name)]
    beside = [_yardsticks(run, steady) for run in (before, after)]
    least = [_least_deviation(*one) for one in zip((before, after), beside, strict=True)]
    changes = []
    for rows in ours:
        yardsticks = [one[row.key[:-1]] for row, one in zip(rows, beside, strict=True)]
        within = [
            max(low, _deviation(row, own)) / math.sqrt(len(row.blocks))
            for row, own, low in zip(rows, yardsticks, least, strict=True)
        ]
        changes.append(_change(*rows, *_moved(rows, yardsticks), math.hypot(*within)))
    notes = list(_notes(before, after, steady))
    for name, deviation in zip(("before", "after"), least, strict=True):
        if deviation > _RESTLESS:
            notes.append(f"{name}: blocks of the run lie {deviation:.0%} apart; was there other work?")
    return Comparison(changes, notes)


def _yardsticks(run: Run, steady: Sequence[str]) -> dict[tuple[Any, ...], _Yardsticks]:
    """Those of each case, the peak first."""
    found: dict[tuple[Any, ...], _Yardsticks] = {}
    for row in run.rows:
        own = found.setdefault(row.key[:-1], {})
        if all(block.peak_seconds for block in row.blocks):
            own.setdefault("peak", [math.log(block.peak_seconds or 0) for block in row.blocks])
        if row.name in steady:
            own[row.name] = _logs(row)
    return found


def _logs(row: Row) -> list[float]:
    return [math.log(block.seconds) for block in row.blocks]


def _beside(row: Row, yardstick: Sequence[float]) -> list[float]:
    return [own - other for own, other in zip(_logs(row), yardstick, strict=False)]


def _moved(rows: Sequence[Row], yardsticks: Sequence[_Yardsticks]) -> tuple[float, float]:
    """By how much, as a logarithm, and what of it may be without reason."""
    common = [name for name in yardsticks[0] if name in yardsticks[1]]
    if not common:
        old, new = (statistics.mean(_logs(row)) for row in rows)
        return new - old, _UNEXPLAINED
    seen = []
    for name in common:
        old, new = (
            statistics.mean(_beside(row, own[name])) for row, own in zip(rows, yardsticks, strict=True)
        )
        seen.append(new - old)
    return (min(seen, key=abs) if min(seen) > 0 or max(seen) < 0 else 0.0), 0.0


def _deviation(row: Row, yardsticks: _Yardsticks) -> float:
    """Of the row's blocks beside the first yardstick; 0 for a single one."""
    logs = next((_beside(row, one) for one in yardsticks.values()), _logs(row))
    return statistics.stdev(logs) if len(logs) > 1 else 0.0


def _least_deviation(run: Run, yardsticks: dict[tuple[Any, ...], _Yardsticks]) -> float:
    """That of the middle one of AdaAttn's rows, as if blocks were normal."""
    ours = [row for row in run.rows if row.name in CONFIGURATIONS]
    return 1.4826 * statistics.median(_deviation(row, yardsticks[row.key[:-1]]) for row in ours)


def _same_version(before: Run, after: Run, name: str) -> bool:
    return before.versions.get(name) == after.versions.get(name) is not None


def _change(old: Row, new: Row, moved: float, unexplained: float, deviation: float) -> Change:
    chosen = "" if old.rungs == new.rungs else f"{_listed(old.rungs)} -> {_listed(new.rungs)}"
    off = new.error > 2 * old.error or old.error > 2 * new.error
    grown = abs((new.memory or 0) - (old.memory or 0))
    known = old.memory is not None and new.memory is not None
    return Change(
        row=new,
        factor=math.exp(moved),
        noise=math.exp(max(SIGMAS * math.hypot(deviation, unexplained), math.log1p(LEAST))),
        choices=chosen,
        error=f"error {scientific(old.error)} -> {scientific(new.error)}" if off else "",
        memory=f"{(old.memory or 0) / 1e6:.1f} -> {(new.memory or 0) / 1e6:.1f} MB"
        if known and grown > max(1e6, 0.2 * (old.memory or 0))
        else "",
        broken=new.broken and not old.broken,
    )


def _listed(rungs: dict[str, int]) -> str:
    return ", ".join(f"{n} {rung}" for rung, n in rungs.items()) or "nothing"


def _notes(before: Run, after: Run, steady: Sequence[str]) -> Iterator[str]:
    for name in ("cpu", "isa", "rates", "offered"):
        old, new = (run.machine.get(name) for run in (before, after))
        if old != new:
            yield f"{name}: {old} -> {new}"
    for name in sorted(before.versions.keys() | after.versions.keys()):
        old, new = before.versions.get(name, "none"), after.versions.get(name, "none")
        if old != new:
            yield f"{name}: {old} -> {new}"
    peaks = ["the multiply-add peak"] if "FMA peak" in before.ceilings.keys() & after.ceilings.keys() else []
    others = ", ".join([*peaks, *steady])
    yield f"times count beside {others}" if others else "times themselves count: no peer is of one version"
    for label, run, other in (("only before", before, after), ("only now", after, before)):
        missing = {row.key for row in run.rows} - {row.key for row in other.rows}
        if missing:
            yield f"{label}: {len(missing)} rows"
