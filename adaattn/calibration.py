"""Measuring how fast each rung of the precision ladder is on this machine."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from .api import attention, plan
from .errors import ArgumentError
from .rates import HEAD_SIZES, RUNGS, SIZE, described, keep, split

_FEW = 64  # queries of the shorter run


def calibrate(*, seconds: float = 4.0, save: bool = True) -> dict[str, Any]:
    """Measure how fast each rung is on this machine, on one core, and keep the result for later calls.

    The rungs take turns, so that a change of the clock meets all of them; the medians count. The file in the
    user's cache folder is valid for this version of the library, this processor, its microcode and the
    instruction sets in use.

    Parameters
    ----------
    seconds : float
        About how long to measure.
    save : bool
        Whether to write the file and go by it from now on.

    Returns
    -------
    dict
        As ``cpu_info()["rates"]``: ``source``, ``gflops``, ``pack_ns``, ``sparse`` and ``offered``.

    Raises
    ------
    ArgumentError
        ``seconds`` is not a positive number.
    OSError
        The cache folder cannot be written.
    """
    if not (isinstance(seconds, (int, float)) and 0 < seconds < float("inf")):
        raise ArgumentError(f"seconds: expected a number above 0, got {seconds!r}")
    runs = [(rung, d, queries) for rung in RUNGS for d in HEAD_SIZES for queries in (SIZE, _FEW)]
    times: dict[tuple[str, int, int], list[float]] = {run: [] for run in runs}
    arrays = {d: np.random.default_rng(d).standard_normal((4, 1, 1, SIZE, d), np.float32) for d in HEAD_SIZES}
    parts = {rung: SparseRun(rung) for rung in RUNGS}
    parts = {rung: part for rung, part in parts.items() if part.runs_sparse()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[runs[0]]) < 3:
        for (rung, d, queries), samples in times.items():
            query, key, value, out = arrays[d]
            query, out = query[:, :, :queries], out[:, :, :queries]
            start = time.perf_counter()
            attention(query, key, value, precision=split(rung), out=out, num_threads=1)
            samples.append(time.perf_counter() - start)
        for part in parts.values():
            part.measure()
    rows = []
    for rung in RUNGS:
        row, packing = [], []
        for d in HEAD_SIZES:
            long, short = (float(np.median(times[rung, d, queries])) for queries in (SIZE, _FEW))
            share = _FEW / SIZE  # of the long run's products in the short one; the rest of it is packing
            pack = max(0.0, (short - share * long) / (1 - share))
            row.append(4e-9 * SIZE * SIZE * d / max(long - pack, 0.1 * long))
            packing.append(1e9 * pack / (2 * SIZE * d))
        rows.append([*row, float(np.mean(packing)), parts[rung].share() if rung in parts else 1.0])
    measured = np.array(rows)
    if save:
        keep(measured)
    return described("measured", measured)


class SparseRun:
    """A rung on long keys: dense, and with all blocks standing in, each with few and with more queries."""

    def __init__(self, rung: str) -> None:
        names = split(rung)
        scores, values = (names, names) if isinstance(names, str) else names
        query, key, value = np.random.default_rng(0).standard_normal((3, 1, 1, 4 * SIZE, 64), np.float32)
        self.calls: list[tuple[Any, ...]] = []
        for queries in (_FEW, 8 * _FEW):
            arrays = query[:, :, :queries], key, value
            made = plan(*arrays, tolerance=0.5)
            dense = replace(made, precision_qk=np.full((1, 1), scores), precision_pv=np.full((1, 1), values))
            sparse = replace(dense, structure=np.full((1, 1), "sparse"), sparse_budget=np.full((1, 1), 1e30))
            self.calls += [(*arrays, dense), (*arrays, sparse)]
        self.times: list[list[float]] = [[] for _ in self.calls]

    def runs_sparse(self) -> bool:
        *arrays, sparse = self.calls[1]
        structure = attention(*arrays, plan=sparse, verify=False, return_report=True)[1].structure
        return bool(structure[0, 0] == "sparse")

    def measure(self) -> None:
        for (*arrays, made), samples in zip(self.calls, self.times, strict=True):
            start = time.perf_counter()
            attention(*arrays, plan=made, verify=False, num_threads=1)
            samples.append(time.perf_counter() - start)

    def share(self) -> float:
        """Of the time that more queries take; what does not depend on their number counts nowhere."""
        few, few_sparse, more, more_sparse = map(np.median, self.times)
        return float(min(max((more_sparse - few_sparse) / max(more - few, 1e-9), 0.1), 1.0))
