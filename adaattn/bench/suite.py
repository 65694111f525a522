"""The suite: what is measured, in which order, and how a row comes about.

Contenders and the machine's ceilings take turns on each case (`timing`), so ratios compare times of the same
rounds. All cases are gone through more than once, each time for a block of rounds: blocks of a case lie
apart in time as two runs do, and tell what `changes` takes for noise. Errors are those of the worst head
against float64 on up to 64 rows.
"""

from __future__ import annotations

import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

from .. import api, linalg
from ..nn.stats import rungs
from ..rates import RUNGS, split
from ..stats import Report
from .contenders import CONFIGURATIONS, LABELS, build, obstacles, options_of, unfit
from .heads import Array, Heads, bundled, errors, gaussian, many, minilm, smooth, topics
from .memory import MemoryMeter
from .peers import oracle, sample_rows, taken_rows
from .results import Block, Head, Point, Row, Run, Spectrum, known
from .roofline import UNITS, WORK, Roofline
from .timing import Runner, quartiles, ratios, take_turns, timer

SECTIONS = ("shapes", "sweep", "real", "spectra", "front")
KINDS = ("gaussian", "sparse", "smooth")
TOLERANCE = 1e-2
_FRONT_TOLERANCES = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 1e-1)

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Scope:
    """How much is measured."""

    shapes: tuple[tuple[int, int, int, int], ...]  # batch, tokens, channels, heads
    kinds: tuple[str, ...]
    sweep: tuple[int, ...]  # tokens
    bytes: int  # that the bundled model reads
    tokens: tuple[int, ...]  # that MiniLM reads
    blocks: int  # times that all cases with contenders are gone through
    rounds: int  # in each block
    sample: float  # seconds, at least, behind one sample
    case: float  # seconds that the rounds of a block may take before the last begins
    quick: bool = False


_SHAPES = ((4, 256, 256, 4), (4, 512, 256, 4), (4, 512, 512, 8))
FULL = Scope(_SHAPES, KINDS, tuple(128 << i for i in range(9)), 2048, (128, 512), 2, 6, 0.03, 3.0)
QUICK = Scope(_SHAPES, ("gaussian",), (128, 512, 2048), 1024, (), 2, 2, 0.006, 0.25, quick=True)


@dataclass(frozen=True)
class Case:
    section: str
    label: str
    make: Callable[[], Heads]


def make_kind(kind: str, batch: int, heads: int, tokens: int, head_size: int) -> Heads:
    """Gaussian heads, or heads with structure: one topic in many, or everything slowly varying."""
    makers: dict[str, Callable[[int], Heads]] = {
        "gaussian": lambda seed: gaussian(1, tokens, tokens, head_size, seed=seed),
        "sparse": lambda seed: topics(
            tokens, head_size, count=min(32, head_size), run=max(16, tokens // 32), strength=1.5, seed=seed
        ),
        "smooth": lambda seed: smooth(tokens, head_size, seed=seed),
    }
    return many(makers[kind], batch, heads)


def real_sets(scope: Scope, left_out: dict[str, str]) -> Iterator[Heads]:
    """The layers of the real models that can be had."""
    yield from bundled(scope.bytes)
    for tokens in scope.tokens:
        try:
            yield from minilm(tokens)
        except ImportError as why:
            left_out["MiniLM"] = str(why)


def list_cases(
    scope: Scope, sections: Sequence[str], given: Sequence[Heads], left_out: dict[str, str]
) -> list[Case]:
    """In the order in which they are measured; real heads are computed here."""
    cases = []
    if "shapes" in sections:
        for kind in scope.kinds:
            for B, S, channels, H in scope.shapes:
                make = partial(make_kind, kind, B, H, S, channels // H)
                cases.append(Case("shapes", kind, make))
    if "sweep" in sections:
        for kind in scope.kinds:
            cases += [Case("sweep", kind, partial(make_kind, kind, 1, 2, S, 64)) for S in scope.sweep]
    if "real" in sections or "spectra" in sections:
        layers = [*given, *real_sets(scope, left_out)]
        if "real" in sections:
            cases += [Case("real", heads.name, partial(_same, heads)) for heads in layers]
        if "spectra" in sections:
            S = scope.bytes
            built = [make_kind(kind, 1, 1, S, 64) for kind in ("sparse", "smooth")]
            built += [gaussian(sigma, S, S) for sigma in (0.5, 1, 2, 4)]
            cases += [Case("spectra", heads.name, partial(_same, heads)) for heads in (*built, *layers)]
    if "front" in sections:
        heads = given[0] if given else list(bundled(scope.bytes))[1]
        cases.append(Case("front", heads.name, partial(_same, next(heads.apart()))))
    return cases


def _same(heads: Heads) -> Heads:
    return heads


def run(
    scope: Scope = FULL,
    *,
    sections: Sequence[str] = SECTIONS,
    tolerance: float = TOLERANCE,
    threads: int | None = None,
    given: Sequence[Heads] = (),
    progress: Progress = lambda text, done: None,
) -> Run:
    """Measure.

    Parameters
    ----------
    scope : Scope
        How much: `FULL`, `QUICK`, or one of one's own.
    sections : names among `SECTIONS`
        "shapes" and "sweep" of made heads, "real" layers of models, "spectra" of single heads, and the
        "front" of all rungs on one head.
    tolerance : float
        What the adaptive configurations keep.
    threads : int, optional
        For everyone; default as in `adaattn.attention`.
    given : heads of one's own
        Measured before the real ones, and first choice for the front.
    progress : function
        Told what is measured, and the share that is done.
    """
    left_out = obstacles()
    meter = ceilings = None
    try:
        ceilings = Roofline()
    except OSError as why:
        left_out["ceilings"] = str(why)
    try:
        meter = MemoryMeter([name for name in ("torch", "onnxruntime") if name not in left_out])
    except OSError as why:
        left_out["memory"] = str(why)
    threads = threads or api.get_num_threads()
    found = Run(
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        _machine(),
        _versions(),
        threads,
        tolerance,
        scope.quick,
        {} if ceilings is None else _ceilings(ceilings, threads),
        left_out,
    )
    suite = _Suite(found, scope, ceilings, meter)
    collecting = gc.isenabled()
    gc.disable()
    try:
        cases = list_cases(scope, sections, given, left_out)
        again = [case for case in cases if case.section not in ("spectra", "front")]
        steps = cases + again * (scope.blocks - 1)
        for i, case in enumerate(steps):
            heads = case.make()
            progress(f"{case.section}: {case.label}, {heads.key.shape[2]} keys", i / len(steps))
            suite.measure(case, heads)
        progress("done", 1.0)
    finally:
        if collecting:
            gc.enable()
        if meter is not None:
            meter.close()
    return found


def _machine() -> dict[str, Any]:
    info = api.cpu_info()
    return {
        "cpu": info["cpu"],
        "cpu_count": info["cpu_count"],
        "isa": info["isa_used"],
        "rates": info["rates"]["source"],
        "offered": info["rates"]["offered"],
        "platform": platform.platform(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("adaattn", "numpy", "torch", "onnxruntime"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"adaattn": api.cpu_info()["version"]}


def _ceilings(roofline: Roofline, threads: int) -> dict[str, float]:
    """GFLOP/s of each unit, and GB/s of reading 128 MB; best of five."""
    found = {}
    for unit in UNITS:
        seconds = min(roofline.compute_seconds(unit, 1e9, threads, 0.02) for _ in range(5))
        if math.isfinite(seconds):
            found[unit] = 1 / seconds
    key, value = np.ones((2, 1 << 24), np.float32)
    seconds = min(roofline.read_seconds(key, value, 1024, threads, 2) for _ in range(5))
    return found | {"read": 2 * key.nbytes / seconds / 1e9}


@dataclass(frozen=True)
class _Contender:
    """One that takes turns, its first output, and a report if it is AdaAttn's."""

    runner: Runner
    out: Any
    report: Report | None


@dataclass
class _Rounds:
    """All rounds of a row so far: with each other contender and unit, its time over the row's."""

    row: Row
    operations: int
    calls: int  # behind each sample
    over: dict[str, list[float]] = field(default_factory=dict)

    def add(self, runner: Runner, others: Mapping[str, Runner]) -> None:
        """A block more, and the row's numbers again, from all blocks."""
        row = self.row
        for name, other in others.items():
            self.over.setdefault(name, []).extend(ratios(other, runner))
        peak = others.get("FMA peak")
        row.blocks.append(Block(min(runner.samples), min(peak.samples) if peak else None))
        row.samples += runner.samples
        row.seconds_q1, row.seconds, row.seconds_q3 = quartiles(row.samples)
        row.tflops = self.operations / row.seconds / 1e12
        found = {name: quartiles(values) for name, values in self.over.items()}
        row.over_dense = found["dense"][1]
        if "torch" in found:
            row.over_torch_q1, row.over_torch, row.over_torch_q3 = found["torch"]
        if "FMA peak" in found:
            row.peak_share = found["FMA peak"][1]
            row.unit_share = _unit_share(row, {name: values[1] for name, values in found.items()})


@dataclass
class _Suite:
    """A run in the making."""

    found: Run
    scope: Scope
    roofline: Roofline | None
    meter: MemoryMeter | None
    rounds: dict[tuple[Case, str], _Rounds] = field(default_factory=dict)

    def measure(self, case: Case, heads: Heads) -> None:
        if case.section == "spectra":
            self.found.spectra += map(self.spectrum, heads.apart())
        elif case.section == "front":
            self.found.front += self.front(case, heads)
        else:
            self.measure_rows(case, heads)

    # ---- cases with all contenders

    def measure_rows(self, case: Case, heads: Heads) -> None:
        """A block of rounds: the first makes the case's rows, others add to them."""
        names = [name for name in LABELS if name not in self.found.left_out and not unfit(name, heads)]
        earlier = {name: self.rounds[case, name] for name in names if (case, name) in self.rounds}
        made = {name: self.prepare(name, heads, earlier.get(name)) for name in names}
        units = self.units(heads)
        runners = [*units.values(), *(one.runner for one in made.values())]
        take_turns(runners, self.scope.rounds, self.scope.case)
        for name, unit in units.items():  # the best of the run
            rate = _operations(heads) / unit.seconds / 1e9
            self.found.ceilings[name] = max(self.found.ceilings[name], rate)
        others = units | {name: made[name].runner for name in ("torch", "dense") if name in made}
        if not earlier:
            rows = {name: _row(case, heads, one.runner) for name, one in made.items()}
            self.describe(rows, heads, made)
            self.found.rows += rows.values()
            self.rounds |= {
                (case, name): _Rounds(row, _operations(heads), made[name].runner.calls)
                for name, row in rows.items()
            }
        for name, one in made.items():
            self.rounds[case, name].add(one.runner, others)

    def describe(self, rows: Mapping[str, Row], heads: Heads, made: Mapping[str, _Contender]) -> None:
        """What does not change from block to block: errors, choices, memory."""
        sample = sample_rows(heads.query.shape[2])
        exact = oracle([heads.query, heads.key, heads.value], sample, heads.causal)
        for name, row in rows.items():
            one = made[name]
            row.error = float(errors(taken_rows(one.out, sample, exact), exact).max())
            if (report := one.report) is not None:
                if one.runner.seconds < 0.1:  # the first call found nothing in caches
                    options = options_of(name, self.found.tolerance)
                    report = heads.attend(num_threads=row.threads, return_report=True, **options)[1]
                _describe(row, report, self.found.tolerance)
            if self.meter is not None and one.runner.seconds < 5:
                row.memory = self.meter.measure(name, heads, self.found.tolerance, row.threads)

    def prepare(self, name: str, heads: Heads, earlier: _Rounds | None = None) -> _Contender:
        """One that is ready to take turns: without a first call where it had rounds before."""
        call = build(name, heads, self.found.tolerance, self.found.threads)
        runner = Runner(name, timer(call), self.found.threads)
        if name not in CONFIGURATIONS and name != "torch":
            runner.limit = max(0.1, self.scope.case / 4)
        if earlier is not None:
            runner.calls = earlier.calls
            return _Contender(runner, None, None)
        report = None
        start = time.perf_counter()
        if name in CONFIGURATIONS:
            options = options_of(name, self.found.tolerance)
            out, report = heads.attend(num_threads=self.found.threads, return_report=True, **options)
        else:
            out = call()
        runner.calibrate(self.scope.sample, time.perf_counter() - start)
        return _Contender(runner, out, report)

    def units(self, heads: Heads) -> dict[str, Runner]:
        """The machine's ceilings, which take turns with the contenders."""
        if self.roofline is None:
            return {}
        compute, flops, threads = self.roofline.compute_seconds, _operations(heads), self.found.threads
        seconds = min(0.1, max(0.005, flops / 2e12))  # longer where there are fewer rounds

        def runner(unit: str) -> Runner:
            return Runner(unit, lambda _: compute(unit, flops, threads, seconds), threads)

        return {unit: runner(unit) for unit in UNITS if unit in self.found.ceilings}

    # ---- single heads

    def spectrum(self, head: Heads) -> Spectrum:
        """Entropy and rank of up to 256 rows, and the time of both structure and precision beside dense."""
        runners = [self.prepare(name, head).runner for name in ("dense", "both")]
        take_turns(runners, self.scope.rounds * self.scope.blocks, self.scope.case * self.scope.blocks / 4)
        dense, both = runners
        weights = _weights(head, sample_rows(head.query.shape[2], 256))
        options = options_of("both", self.found.tolerance)
        choice = _choices(head.attend(num_threads=self.found.threads, return_report=True, **options)[1])[0]
        return Spectrum(
            head.name,
            head.key.shape[2],
            float(np.mean(linalg.attention_entropy(weights))),
            float(linalg.effective_rank(weights)),
            len(weights),
            choice.rung,
            choice.structure,
            both.seconds,
            dense.seconds,
        )

    def front(self, case: Case, head: Heads) -> list[Point]:
        """Every rung by name; what rungs with structure there are; the planner's choices."""
        rows = sample_rows(head.query.shape[2], 256)
        exact = oracle([head.query, head.key, head.value], rows, head.causal)
        ways: list[tuple[Point, dict[str, Any]]] = []

        def way(name: str, options: dict[str, Any], planned: bool, tolerance: float | None) -> None:
            out, report = head.attend(return_report=True, num_threads=self.found.threads, **options)
            choice = _choices(report)[0]
            if planned or choice.structure != "dense" or tolerance is None:
                error = float(errors(taken_rows(out, rows, exact), exact).max())
                point = Point(case.label, name, choice.structure, planned, tolerance, 0.0, error)
                ways.append((replace(point, name=choice.rung) if planned else point, options))

        for rung in RUNGS:
            way(rung, {"precision": split(rung)}, False, None)
            if "/" not in rung:  # limits are rungs of one name
                for t in _FRONT_TOLERANCES:
                    limits = {"min_precision": rung, "max_precision": rung}
                    way(rung, {"tolerance": t, "verify": False, **limits}, False, t)
        for t in _FRONT_TOLERANCES:
            way("", {"tolerance": t}, True, t)
        runners = [
            Runner(point.name, timer(partial(head.attend, num_threads=self.found.threads, **options)))
            for point, options in ways
        ]
        for runner in runners:
            runner.calibrate(self.scope.sample / 3)
        take_turns(runners, self.scope.rounds * self.scope.blocks, self.scope.case * self.scope.blocks)
        return [replace(way[0], seconds=one.seconds) for way, one in zip(ways, runners, strict=True)]


def _operations(heads: Heads) -> int:
    """A multiplication and an addition in each of the two products, per visible pair and channel."""
    B, H, T, D = heads.query.shape
    S, E = heads.key.shape[2], heads.value.shape[3]
    pairs = int(np.clip(np.arange(S - T + 1, S + 1), 0, S).sum()) if heads.causal else T * S
    return int(2 * B * H * pairs * (D + E))


def _row(case: Case, heads: Heads, runner: Runner) -> Row:
    """Without rounds so far."""
    B, H, T, D = heads.query.shape
    shape = [B, H, T, heads.key.shape[2], D]
    return Row(
        case.section, case.label, shape, heads.causal, runner.threads, runner.name,
        seconds=math.nan, seconds_q1=math.nan, seconds_q3=math.nan, tflops=math.nan, error=math.nan,
    )  # fmt: skip


def _describe(row: Row, report: Report, tolerance: float) -> None:
    """What the choices were, what they cost to make, and what was promised and measured."""
    row.choices = _choices(report)
    if row.name != "dense":
        row.promised = tolerance
        row.planning = 1 - report.seconds["execute"] / sum(report.seconds.values())
        row.measured = max((head.measured for head in row.choices if head.measured is not None), default=None)


def _choices(report: Report) -> list[Head]:
    found = []
    for at, rung in zip(np.ndindex(report.retried.shape), rungs(report), strict=True):
        found.append(
            Head(
                rung,
                str(report.structure[at]),
                int(report.rank[at]),
                float(report.kept_fraction[at]),
                known(report.predicted_error[at]),
                known(report.measured_error[at]),
                known(report.error_limit[at]),
                known(report.entropy[at]),
                known(report.score_std[at]),
                bool(report.retried[at]),
            )
        )
    return found


def _unit_share(row: Row, over: Mapping[str, float]) -> float | None:
    """Of its time, what its rungs' units need at their peak; None where a head is on a rung without one."""
    shares = []
    for head in row.choices:
        work = {"FMA peak": 1.0} if head.rung == "fp32" else WORK.get(head.rung, {})
        if not work or head.structure not in ("dense", "sparse") or not work.keys() <= over.keys():
            return None
        done = (1 + head.kept) / 2  # all scores, and the values that are kept
        shares.append(done * sum(part * over[unit] for unit, part in work.items()))
    return statistics.mean(shares) if shares else None


def _weights(head: Heads, rows: Array) -> Array:
    """Attention weights of some rows of a single head, in float64: (rows, S)."""
    T, S = head.query.shape[2], head.key.shape[2]
    q, k = head.query[0, 0, rows].astype(np.float64), head.key[0, 0].astype(np.float64)
    scores = q @ k.T / math.sqrt(q.shape[1])
    if head.causal:
        scores[np.arange(S) > rows[:, None] + S - T] = -np.inf
    weights: Array = linalg.stable_softmax(scores)
    return weights
