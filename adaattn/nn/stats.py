"""What attention modules tell about their calls: a tally of reports, and its summary."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..stats import PHASES, Report


@dataclass(frozen=True)
class AttentionStatistics:
    """The calls of an attention module since statistics were last reset.

    Attributes
    ----------
    call_count : int
        Calls that were collected.
    plan_count : int
        How many of them made a plan; none where the module is exact, fewer than all with `replan_every`.
    precision_distribution : dict
        Rung to share of the heads of all calls; "int8/bf16" is scores in int8 and values in bf16.
    mean_entropy : float
        Nats: of a row's weights, mean over heads that were profiled; NaN without any.
    measured_error : float
        Largest relative error of a head that verification measured; NaN where no row was verified.
    retried : int
        Heads whose first choice was replaced by a wider one.
    seconds : dict
        By phase (probe, plan, execute, verify), summed; together the time in attention.
    """

    call_count: int
    plan_count: int
    precision_distribution: dict[str, float]
    mean_entropy: float
    measured_error: float
    retried: int
    seconds: dict[str, float]


class Tally:
    """Sums over reports."""

    def __init__(self) -> None:
        self.calls = self.plans = self.retried = self.profiled = 0
        self.heads: Counter[str] = Counter()
        self.entropy, self.error = 0.0, math.nan
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def add(self, report: Report, planned: bool) -> None:
        """Count a call; `planned` says whether it made its plan itself."""
        self.calls += 1
        self.plans += planned
        self.heads.update(rungs(report))
        self.retried += int(report.retried.sum())
        self.profiled += int(np.isfinite(report.entropy).sum())
        self.entropy += float(np.nansum(report.entropy))
        self.error = float(np.fmax(self.error, np.fmax.reduce(report.measured_error, axis=None)))
        for phase, seconds in report.seconds.items():
            self.seconds[phase] += seconds

    def merge(self, other: Tally) -> None:
        """Count another tally's calls as well."""
        for name, x in vars(other).items():
            mine = getattr(self, name)
            if isinstance(x, dict):
                for key, value in x.items():
                    mine[key] = mine.get(key, 0) + value
            else:
                setattr(self, name, float(np.fmax(mine, x)) if name == "error" else mine + x)

    def summary(self) -> AttentionStatistics:
        """The sums as they stand."""
        return AttentionStatistics(
            call_count=self.calls,
            plan_count=self.plans,
            precision_distribution={name: n / self.heads.total() for name, n in self.heads.items()},
            mean_entropy=self.entropy / self.profiled if self.profiled else math.nan,
            measured_error=self.error,
            retried=self.retried,
            seconds=dict(self.seconds),
        )


def rungs(report: Report) -> list[str]:
    """Names of the rungs of one head after another: that of both products, or "scores/values"."""
    pairs = zip(report.precision_qk.flat, report.precision_pv.flat, strict=True)
    return [str(scores) if scores == values else f"{scores}/{values}" for scores, values in pairs]
