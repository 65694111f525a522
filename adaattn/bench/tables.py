"""A run as tables of text, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .contenders import LABELS
from .results import Row, Run, way_text

TITLES = {
    "shapes": "Shapes of made heads",
    "sweep": "Lengths from short to long",
    "real": "Layers of real models",
}


CASE = ["heads", "B,H,S,D"]  # the first columns of tables of cases, empty where they are those above


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]


def tables(run: Run) -> Iterator[Table]:
    """One for each section that was measured."""
    header = [
        *CASE, "contender", "time", "x torch", "x dense", "quartiles", "TFLOP/s", "of fp32 peak",
        "of own units", "planning", "memory", "rungs", "promised", "verified", "error",
    ]  # fmt: skip
    for section, title in TITLES.items():
        rows = []
        case = None
        for row in run.pick(section):
            first = [row.heads, row.case] if (row.heads, row.case) != case else ["", ""]
            case = row.heads, row.case
            rows.append([*first, *_cells(row)])
        if rows:
            yield Table(title, header, rows)
    if run.front:
        points = sorted(run.front, key=lambda point: (point.planned, point.seconds))
        yield Table(
            f"All rungs on one head: {run.front[0].heads}",
            ["rung", "structure", "tolerance", "chosen", "time", "error"],
            [
                [
                    p.name, p.structure, scientific(p.tolerance), "yes" if p.planned else "",
                    duration(p.seconds), scientific(p.error),
                ]
                for p in points
            ],
        )  # fmt: skip
    if run.spectra:
        yield Table(
            "Single heads: entropy, effective rank of some rows, and what the planner made of it",
            ["head", "keys", "entropy", "rank", "of rows", "rung", "time", "dense", "x dense"],
            [
                [s.heads, str(s.keys), f"{s.entropy:.2f}", f"{s.rank:.1f}", str(s.rows),
                 way_text(s.rung, s.structure), duration(s.seconds),
                 duration(s.dense_seconds), f"{s.dense_seconds / s.seconds:.2f}"]
                for s in run.spectra
            ],
        )  # fmt: skip


def _cells(row: Row) -> list[str]:
    rungs = ", ".join(rung if len(row.rungs) == 1 else f"{n} {rung}" for rung, n in row.rungs.items())
    again = sum(head.retried for head in row.choices)
    return [
        LABELS[row.name],
        duration(row.seconds),
        times(row.over_torch),
        times(row.over_dense),
        f"{duration(row.seconds_q1)} - {duration(row.seconds_q3)}",
        f"{row.tflops:.3f}",
        share(row.peak_share),
        share(row.unit_share),
        share(row.planning),
        "" if row.memory is None else f"{row.memory / 1e6:.1f} MB",
        f"{rungs}, {again} again" if again and row.name != "dense" else rungs,
        scientific(row.promised),
        scientific(row.measured),
        scientific(row.error),
    ]


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} us"


def scientific(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def times(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def share(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"
