"""What a run of the suite found: its fields, and how they are kept as JSON and CSV."""

from __future__ import annotations

import csv
import json
import math
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import ArgumentError
from .timing import plural

FORMAT = "adaattn-bench-2"


def known(x: Any) -> float | None:
    """A number, None where it is not finite."""
    return float(x) if math.isfinite(x) else None


def way_text(rung: str, structure: str) -> str:
    """How a head was computed: "bf16", "bf16 sparse"."""
    return rung if structure == "dense" else f"{rung} {structure}"


def shape_text(shape: Sequence[int]) -> str:
    """Of B, H, T, S, D: T and S once where they are equal."""
    B, H, T, S, D = shape
    return f"{B},{H},{T if T == S else f'{T}:{S}'},{D}"


@dataclass
class Head:
    """What one head was computed with, and how exact that was; None: not known."""

    rung: str
    structure: str
    rank: int
    kept: float
    predicted: float | None
    measured: float | None
    limit: float | None
    entropy: float | None
    score_std: float | None
    retried: bool


@dataclass
class Block:
    """Of rounds that followed each other the shortest time per call, and that of the fp32 peak."""

    seconds: float
    peak_seconds: float | None


@dataclass
class Row:
    """One contender on one case.

    `seconds` is the median, between quartiles; `over_torch` and `over_dense` are how many times as fast as
    those it was in the same rounds; `tflops` counts the operations of dense attention; `peak_share` is its
    rate over that of fp32 multiply-adds, `unit_share` the time that its rungs' units need at their peak over
    its own; `planning` the share of the call that is not execution; `memory` bytes beyond inputs and output;
    `promised` the tolerance, `measured` the largest error that verification measured, `error` that of the
    worst head against float64 on some rows. `samples` are seconds per call, one for each round, and `blocks`
    the best of those that followed each other: between two blocks the suite does all other cases.
    """

    section: str
    heads: str
    shape: list[int]  # B, H, T, S, D
    causal: bool
    threads: int
    name: str
    seconds: float
    seconds_q1: float
    seconds_q3: float
    tflops: float
    error: float
    over_torch: float | None = None
    over_torch_q1: float | None = None
    over_torch_q3: float | None = None
    over_dense: float | None = None
    peak_share: float | None = None
    unit_share: float | None = None
    planning: float | None = None
    memory: int | None = None
    promised: float | None = None
    measured: float | None = None
    choices: list[Head] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    @property
    def key(self) -> tuple[Any, ...]:
        """What it has in common with the same measurement of another run."""
        return (self.section, self.heads, *self.shape, self.causal, self.threads, self.name)

    @property
    def case(self) -> str:
        return f"{shape_text(self.shape)}{' causal' if self.causal else ''}"

    @property
    def rungs(self) -> dict[str, int]:
        """How many heads were computed in which way."""
        found: dict[str, int] = {}
        for head in self.choices:
            name = way_text(head.rung, head.structure)
            found[name] = found.get(name, 0) + 1
        return found

    @property
    def broken(self) -> bool:
        """Whether its worst head is further off than was promised."""
        return self.promised is not None and not self.error <= self.promised


@dataclass
class Point:
    """One way to compute the head of the front: `name` a rung, or the planner's choice for `tolerance`."""

    heads: str
    name: str
    structure: str
    planned: bool
    tolerance: float | None
    seconds: float
    error: float


@dataclass
class Spectrum:
    """A head by itself: how diffuse its rows are, the effective rank of some of them, and its times."""

    heads: str
    keys: int
    entropy: float
    rank: float
    rows: int
    rung: str
    structure: str
    seconds: float
    dense_seconds: float


@dataclass
class Run:
    """Everything that one run found, and what it had to leave out, with reasons."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    threads: int
    tolerance: float
    quick: bool
    ceilings: dict[str, float]
    left_out: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    front: list[Point] = field(default_factory=list)
    spectra: list[Spectrum] = field(default_factory=list)

    def pick(self, section: str, name: str | None = None) -> list[Row]:
        return [row for row in self.rows if row.section == section and name in (None, row.name)]

    @property
    def broken(self) -> list[Row]:
        return [row for row in self.rows if row.broken]

    @property
    def title(self) -> str:
        return f"{self.machine['cpu']}, {plural(self.threads)}, {self.date[:10]}"


def save_json(run: Run, path: Path) -> None:
    document = {"format": FORMAT, **asdict(run)}
    path.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def save_csv(run: Run, path: Path) -> None:
    """A line for each row; how many heads took which rung stands in one cell."""
    names = [f.name for f in fields(Row) if f.name not in ("choices", "samples", "blocks")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "rungs", "rounds"])
        for row in run.rows:
            values = ["" if (x := getattr(row, name)) is None else x for name in names]
            values[names.index("shape")] = " ".join(map(str, row.shape))
            rungs = ", ".join(f"{n} x {rung}" for rung, n in row.rungs.items())
            writer.writerow([*values, rungs, len(row.samples)])


def load(path: str) -> Run:
    """A run that `save_json` wrote.

    Raises
    ------
    OSError
        The file cannot be read.
    ArgumentError
        It holds something else.
    """
    text = Path(path).read_bytes()
    try:
        document = json.loads(text)
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ValueError(f"no format {FORMAT!r}")
        run: Run = _restore(Run, document, "run")
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{path}: expected what `adaattn bench --json` writes, got {error}") from None
    return run


def merge(runs: Sequence[Run]) -> Run:
    """Several runs as one: of what was measured more than once the last counts, of ceilings the highest."""
    last = runs[-1]
    rows = {row.key: row for run in runs for row in run.rows}
    front = {(p.heads, p.name, p.structure, p.planned, p.tolerance): p for run in runs for p in run.front}
    spectra = {s.heads: s for run in runs for s in run.spectra}
    return Run(
        last.date, last.machine, last.versions, last.threads, last.tolerance, any(run.quick for run in runs),
        {name: max(run.ceilings.get(name, 0.0) for run in runs) for run in runs for name in run.ceilings},
        last.left_out, list(rows.values()), list(front.values()), list(spectra.values()),
    )  # fmt: skip


def _finite(x: Any) -> Any:
    """NaN as null, infinity as the largest number there is: strict JSON has neither."""
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else math.copysign(1.7976931348623157e308, x)
    return x


def _restore(kind: Any, x: Any, name: str) -> Any:
    """x as an object of a type hint; raises ValueError where it is none."""
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        hints = get_type_hints(kind)
        if not isinstance(x, dict) or x.keys() != hints.keys():
            raise ValueError(f"{name} without the fields {', '.join(hints)}")
        return kind(**{key: _restore(hint, x[key], f"{name}.{key}") for key, hint in hints.items()})
    if isinstance(kind, types.UnionType):
        return None if x is None else _restore(get_args(kind)[0], x, name)
    if get_origin(kind) is list and isinstance(x, list):
        return [_restore(get_args(kind)[0], part, f"{name}[{i}]") for i, part in enumerate(x)]
    if get_origin(kind) is dict and isinstance(x, dict):
        return {key: _restore(get_args(kind)[1], part, f"{name}[{key!r}]") for key, part in x.items()}
    if kind is Any or type(x) is kind:
        return x
    if kind is float and type(x) is int:
        return float(x)
    if kind is float and x is None:
        return math.nan
    raise ValueError(f"{name} = {x!r}")
