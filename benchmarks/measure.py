"""What a comparison measures: peers and the machine's ceilings take turns on each shape.

The first ceiling is the yardstick: FMA peak for prefill, reading K and V with prefetch for decode.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peers import CACHES, ITEM_BYTES, PEERS, RUNGS, Array, Shape, make_inputs

from adaattn.bench.peers import build_adaattn, oracle, relative_error, sample_rows
from adaattn.bench.roofline import UNITS, WORK, Roofline
from adaattn.bench.timing import Quartiles, Runner, plural, ratio, take_turns, timer

READING = ("decode", "cache")  # sections whose ceiling is the bandwidth of reading
SCALING = Shape(1, 2, 4096, 4096, 64)
IMPORT = """
import importlib, sys, time
start = time.perf_counter()
importlib.import_module(sys.argv[1])
print(time.perf_counter() - start)
"""
MEMORY = """
import re, sys
import numpy, adaattn

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

threads, queries = map(int, sys.argv[1:])
query, out = numpy.ones((2, 1, 1, queries, 64), numpy.float32)
key, value = numpy.ones((2, 1, 1, 8192, 64), numpy.float32)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
adaattn.attention(query, key, value, out=out, num_threads=threads)
print((status("VmHWM") - before) / threads)
"""


@dataclass(frozen=True)
class Budget:
    rounds: int
    sample: float  # seconds, at least, behind one sample
    others: float  # seconds for each peer but AdaAttn and torch at fp32
    processes: int  # fresh ones, to time an import


@dataclass
class Contestant(Runner):
    """A peer or a ceiling, on one shape."""

    section: str = field(kw_only=True)
    shape: Shape = field(kw_only=True)
    dtype: str = field(kw_only=True)
    error: float | None = None  # relative Frobenius, against float64
    torch: Contestant | None = None  # torch in the same dtype; for caches in fp32
    torch_bf16: Contestant | None = None
    yardstick: Contestant | None = None
    units: dict[str, Contestant] = field(default_factory=dict)  # ceilings of the narrow products

    @property
    def gflops(self) -> float:
        return self.shape.flops / self.seconds / 1e9

    @property
    def traffic(self) -> float:
        return self.shape.traffic(ITEM_BYTES.get(self.dtype, 4))

    @property
    def intensity(self) -> float:
        """Operations per byte of query, key, value and output."""
        return self.shape.flops / self.traffic

    @property
    def speedup(self) -> Quartiles | None:
        """Torch's time over this one's."""
        return ratio(self.torch, self) if self.torch else None

    @property
    def speedup_over_bf16(self) -> float | None:
        return ratio(self.torch_bf16, self)[1] if self.torch_bf16 else None

    @property
    def share(self) -> float | None:
        """Of the section's ceiling; where that is reading, half the bytes are worth half the time."""
        if self.name in WORK:
            return self.unit_share
        if not self.yardstick:
            return None
        worth = self.traffic / self.yardstick.traffic if self.section in READING else 1.0
        return worth * ratio(self.yardstick, self)[1]

    @property
    def unit_share(self) -> float | None:
        """Of the time that a rung's products take at its units' peaks."""
        parts = WORK[self.name]
        if not all(unit in self.units for unit in parts):
            return None
        return sum(part * ratio(self.units[unit], self)[1] for unit, part in parts.items())

    @property
    def error_ratio(self) -> float | None:
        if not (self.error and self.torch and self.torch.error) or self.torch.dtype != self.dtype:
            return None
        return self.error / self.torch.error

    def row(self) -> dict[str, Any]:
        """Every figure, as CSV and JSON give them."""
        q1, median, q3 = self.speedup or (None,) * 3
        return {
            "section": self.section,
            "shape": str(self.shape),
            "threads": self.threads,
            "name": self.name,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "speedup": median,
            "speedup_q1": q1,
            "speedup_q3": q3,
            "speedup_over_bf16": self.speedup_over_bf16,
            "gflops": self.gflops,
            "intensity": self.intensity,
            "share": self.share,
            "error": self.error,
            "error_ratio": self.error_ratio,
            "calls": self.calls,
            "rounds": len(self.samples),
        }


def fresh(script: str, *arguments: object) -> float:
    """The number that a script prints in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Comparison:
    """Everything that one run measures, and what it had to leave out, with reasons."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.results: list[Contestant] = []
        self.extras: dict[str, float] = {}
        self.left_out = {
            f"{peer.name} {peer.dtype}": why for peer in (*PEERS, *RUNGS, *CACHES) if (why := peer.obstacle())
        }
        self.roofline: Roofline | None = None
        try:
            self.roofline = Roofline()
        except OSError as why:
            self.left_out["ceilings"] = str(why)

    def pick(
        self, section: str, threads: int, name: str = "adaattn", dtype: str = "fp32"
    ) -> list[Contestant]:
        """Results of one peer in one dtype, in the order of the shapes."""
        wanted = section, threads, name, dtype
        return [one for one in self.results if (one.section, one.threads, one.name, one.dtype) == wanted]

    def measure(self, section: str, shape: Shape, thread_counts: Sequence[int]) -> Iterator[str]:
        """Measure a shape; says what is done after each thread count."""
        inputs = make_inputs(shape)
        rows = sample_rows(shape.queries)
        exact = {dtype: oracle(arrays, rows, shape.causal) for dtype, arrays in inputs.items()}
        for threads in thread_counts:
            ceilings, peers = self.ceilings(section, shape, threads, inputs["fp32"]), []
            yardsticks = {one.dtype: one for one in reversed(ceilings)}
            units = {one.name: one for one in ceilings}
            torch: dict[str, Contestant] = {}
            for peer in {"rungs": RUNGS, "cache": CACHES}.get(section, PEERS):
                if f"{peer.name} {peer.dtype}" in self.left_out:
                    continue
                call = peer.build(inputs[peer.inputs], shape.causal, threads)
                start = time.perf_counter()
                out = call()
                first = time.perf_counter() - start
                error = relative_error(out, rows, exact[peer.inputs])
                yardstick = yardsticks.get(peer.dtype, yardsticks.get(""))
                one = Contestant(
                    peer.name, timer(call), threads, section=section, shape=shape, dtype=peer.dtype,
                    error=error, yardstick=yardstick, units=units,
                )  # fmt: skip
                main = peer.dtype == "fp32" and peer.name in ("adaattn", "torch")
                if section not in ("rungs", "cache") and not main:
                    one.limit = self.budget.others
                if peer.name == "torch":
                    torch[peer.dtype] = one
                one.calibrate(self.budget.sample, first)
                peers.append(one)
            for one in peers:
                one.torch = torch.get("fp32" if section == "cache" else one.dtype)
                one.torch_bf16 = torch.get("bf16") if section == "cache" else None
            take_turns(ceilings + peers, self.budget.rounds)
            self.results += ceilings + peers
            yield f"{section} {shape}, {plural(threads)}"

    def ceilings(self, section: str, shape: Shape, threads: int, inputs: list[Array]) -> list[Contestant]:
        """List what bounds the section's times; the first of a dtype, or without one, is the yardstick."""
        if self.roofline is None or section == "small":
            return []
        compute, read = self.roofline.compute_seconds, self.roofline.read_seconds
        _, key, value = inputs

        def ceiling(name: str, sample: Callable[[int], float], dtype: str = "") -> Contestant:
            return Contestant(name, sample, threads, section=section, shape=shape, dtype=dtype)

        def peak(unit: str) -> Contestant:
            return ceiling(unit, lambda _: compute(unit, shape.flops, threads, self.budget.sample))

        if section == "rungs":
            return [peak(unit) for unit in UNITS if math.isfinite(compute(unit, 1, 1, 0.001))]
        if section == "prefill":
            return [peak("FMA peak")]
        if section == "cache":  # as many bytes for each dtype as it has to read
            reads = []
            for dtype in ("fp32", "bf16", "int8"):
                size = math.ceil(key.size * ITEM_BYTES[dtype] / 4)
                k, v = key.reshape(-1)[:size], value.reshape(-1)[:size]
                reads.append(ceiling("read, prefetch", partial(read, k, v, 1024, threads), dtype))
            return self.calibrated(reads)
        reads = [
            ceiling("read, prefetch", lambda passes: read(key, value, 1024, threads, passes)),
            ceiling("read", lambda passes: read(key, value, 0, threads, passes)),
        ]
        return self.calibrated(reads)

    def calibrated(self, contestants: list[Contestant]) -> list[Contestant]:
        for one in contestants:
            one.calibrate(self.budget.sample)
        return contestants

    def measure_extras(self) -> Iterator[str]:
        """Measure scaling, memory and import time of AdaAttn alone; says what is done."""
        inputs = make_inputs(SCALING)["fp32"]

        def contestant(threads: int) -> Contestant:
            sample = timer(build_adaattn(inputs, SCALING.causal, threads))
            one = Contestant("adaattn", sample, threads, section="scaling", shape=SCALING, dtype="fp32")
            one.calibrate(self.budget.sample)
            return one

        if (os.cpu_count() or 1) > 1:
            one, two = contestant(1), contestant(2)
            take_turns([one, two], self.budget.rounds)
            self.extras["two_threads_speedup"] = ratio(one, two)[1]
        yield f"two threads against one, {SCALING}"
        try:
            memory = [fresh(MEMORY, threads, queries) for threads in (1, 2) for queries in (8192, 1)]
            self.extras["memory_per_thread"] = max(memory)
        except subprocess.CalledProcessError as why:
            self.left_out["memory"] = why.stderr.strip().splitlines()[-1]
        yield "memory"
        times = [[fresh(IMPORT, name) for name in ("adaattn", "numpy")] for _ in range(self.budget.processes)]
        ours, numpys = (statistics.median(column) for column in zip(*times, strict=True))
        self.extras |= {"import_seconds": ours, "numpy_import_seconds": numpys}
        yield "import"
