"""Fair timing: everyone takes a turn in every round, and a ratio compares times of the same round.

So whatever disturbs the machine disturbs all alike. Who goes first rotates.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

Quartiles = tuple[float, float, float]


@dataclass
class Runner:
    """One that takes turns; `sample(calls)` gives its seconds per call."""

    name: str
    sample: Callable[[int], float] = field(repr=False)
    threads: int = 1
    limit: float = math.inf  # seconds, after which it sits out
    calls: int = 1  # behind each sample
    samples: list[float] = field(default_factory=list)

    def calibrate(self, seconds: float, first: float = 0.0) -> None:
        """Choose how many calls make a sample of this long: one if the first call took far longer."""
        if first < 4 * seconds:
            once = self.sample(1)
            self.calls = math.ceil(seconds / (once if once > 1e-3 else self.sample(10)))

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


def timer(call: Callable[[], Any]) -> Callable[[int], float]:
    def sample(calls: int) -> float:
        if calls > 1:
            call()  # finds caches and threads as between calls in a row
        start = time.perf_counter()
        for _ in repeat(None, calls):
            call()
        return (time.perf_counter() - start) / calls

    return sample


def settle() -> None:
    """Wait for this process's other threads: those of OpenMP, OpenBLAS and onnxruntime spin on after work."""
    for _ in range(200):
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.002:
            return


def take_turns(runners: Sequence[Runner], rounds: int, budget: float = math.inf) -> None:
    """Fill the samples: so many rounds, or as many as begin within `budget` seconds, at least one.

    Who sits out doesn't come back, so equal indices are the same round.
    """
    end = time.perf_counter() + budget
    for turn in range(rounds):
        if turn and time.perf_counter() > end:
            return
        first = turn % len(runners)
        for one in (*runners[first:], *runners[:first]):
            if sum(one.samples) * one.calls < one.limit:
                if any(other.threads > 1 for other in runners):
                    settle()
                one.samples.append(one.sample(one.calls))


def quartiles(values: Sequence[float]) -> Quartiles:
    if len(values) == 1:
        return (values[0],) * 3
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def ratios(a: Runner, b: Runner) -> list[float]:
    """a's time over b's in each round."""
    return [x / y for x, y in zip(a.samples, b.samples, strict=False)]


def ratio(a: Runner, b: Runner) -> Quartiles:
    """Quartiles of a's time over b's."""
    return quartiles(ratios(a, b))


def plural(threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"
