"""What changed between two saved runs beyond noise.

Times of two runs differ because the machine does, so where both runs have torch on a case, the change of the
ratio to torch's time of the same rounds counts; elsewhere that of the time itself. Where the times of peers,
the middle one of the case's and of all, contradict that beyond noise, the least change that is seen counts:
torch's own hitches must not pass for ours. A change is more than noise if it exceeds three standard errors
and 3 %. The error of a median follows from the quartiles of its
rounds; on top comes what runs differ by without reason: how far the ratios of onnxruntime and NumPy, which
did not change, lie apart, or without those 3 % (10 % of times themselves).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError
from .contenders import CONFIGURATIONS, LABELS
from .results import Row, Run
from .tables import scientific

SIGMAS = 3
LEAST = 0.03
_UNEXPLAINED, _UNEXPLAINED_TIMES = 0.03, 0.1


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
    by_torch = "torch" in steady
    controls = [
        math.log(_factor(old, new, by_torch))
        for old, new in both
        if new.name in steady and new.name != "torch" and _has_torch(old, new)
    ]
    unexplained = _spread(controls) if by_torch and len(controls) >= 5 else None
    peers: dict[tuple[Any, ...], list[float]] = {}
    for old, new in both:
        if new.name in steady:
            peers.setdefault(new.key[:-1], []).append(new.seconds / old.seconds)
    drift = statistics.median(x for own in peers.values() for x in own) if peers else 1.0
    changes = []
    for old, new in ours:
        machine = drift, statistics.median(peers.get(new.key[:-1], [drift]))
        changes.append(_change(old, new, by_torch, unexplained, machine))
    return Comparison(changes, list(_notes(before, after, steady, both)))


def _same_version(before: Run, after: Run, name: str) -> bool:
    return before.versions.get(name) == after.versions.get(name) is not None


def _has_torch(old: Row, new: Row) -> bool:
    return bool(old.over_torch and new.over_torch)


def _factor(old: Row, new: Row, by_torch: bool) -> float:
    if by_torch and old.over_torch and new.over_torch:
        return old.over_torch / new.over_torch
    return new.seconds / old.seconds


def _change(
    old: Row, new: Row, by_torch: bool, unexplained: float | None, machine: Sequence[float]
) -> Change:
    """`machine`: how many times as long peers take that did not change."""
    ratios = by_torch and _has_torch(old, new)
    factor = _factor(old, new, by_torch)
    if ratios:
        seen = [factor, *(new.seconds / old.seconds / x for x in machine)]
        scatter = SIGMAS * math.hypot(*(_deviation(row, False) for row in (old, new)), _UNEXPLAINED_TIMES)
        if any(abs(math.log(factor / x)) > scatter for x in seen):
            least = min(seen, key=lambda x: abs(math.log(x)))
            factor = least if max(seen) < 1 or min(seen) > 1 else 1.0
    default = _UNEXPLAINED if ratios else _UNEXPLAINED_TIMES
    between = unexplained if ratios and unexplained is not None else default
    deviation = math.hypot(_deviation(old, ratios), _deviation(new, ratios), between)
    chosen = "" if old.rungs == new.rungs else f"{_listed(old.rungs)} -> {_listed(new.rungs)}"
    off = new.error > 2 * old.error or old.error > 2 * new.error
    moved = abs((new.memory or 0) - (old.memory or 0))
    known = old.memory is not None and new.memory is not None
    return Change(
        row=new,
        factor=factor,
        noise=math.exp(max(SIGMAS * deviation, math.log1p(LEAST))),
        choices=chosen,
        error=f"error {scientific(old.error)} -> {scientific(new.error)}" if off else "",
        memory=f"{(old.memory or 0) / 1e6:.1f} -> {(new.memory or 0) / 1e6:.1f} MB"
        if known and moved > max(1e6, 0.2 * (old.memory or 0))
        else "",
        broken=new.broken and not old.broken,
    )


def _listed(rungs: dict[str, int]) -> str:
    return ", ".join(f"{n} {rung}" for rung, n in rungs.items()) or "nothing"


def _deviation(row: Row, ratios: bool) -> float:
    """Standard error of the logarithm of a median, from quartiles as if rounds were normal."""
    low, high = (row.over_torch_q1, row.over_torch_q3) if ratios else (row.seconds_q1, row.seconds_q3)
    assert low and high
    return 1.2533 * math.log(high / low) / 1.349 / math.sqrt(len(row.samples))


def _spread(values: Sequence[float]) -> float:
    """Standard deviation of normal values around zero, by their median distance."""
    return 1.4826 * statistics.median(abs(x) for x in values)


def _notes(before: Run, after: Run, steady: list[str], both: list[tuple[Row, Row]]) -> list[str]:
    notes = []
    for name in ("cpu", "isa", "rates", "offered"):
        old, new = (run.machine.get(name) for run in (before, after))
        if old != new:
            notes.append(f"{name}: {old} -> {new}")
    for name in sorted(before.versions.keys() | after.versions.keys()):
        old, new = before.versions.get(name, "none"), after.versions.get(name, "none")
        if old != new:
            notes.append(f"{name}: {old} -> {new}")
    torch = [new.seconds / old.seconds for old, new in both if new.name == "torch"]
    if "torch" in steady and torch:
        notes.append(f"torch itself takes {statistics.median(torch):.2f} times as long, which is left out")
    else:
        notes.append("no torch of one version in both runs: times themselves are compared")
    for label, run, other in (("only before", before, after), ("only now", after, before)):
        missing = {row.key for row in run.rows} - {row.key for row in other.rows}
        if missing:
            notes.append(f"{label}: {len(missing)} rows")
    return notes
