"""What attention modules tell about their calls: tallies of reports, and their summaries."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..stats import PHASES, Report, jsonable
from ..views import COLOURS, empty_figure, error_text, time_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    sparse_ratio, low_rank_ratio : float
        Share of the heads of all calls that had the structure; NaN without a call.
    mean_rank : float
        Landmarks, mean over the heads of low rank; NaN without any.
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
    sparse_ratio: float
    low_rank_ratio: float
    mean_rank: float
    mean_entropy: float
    measured_error: float
    retried: int
    seconds: dict[str, float]


class Tally:
    """Sums over reports."""

    def __init__(self) -> None:
        self.calls = self.plans = self.retried = self.profiled = self.ranks = 0
        self.heads: Counter[str] = Counter()
        self.structures: Counter[str] = Counter()
        self.entropy, self.error = 0.0, math.nan
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def add(self, report: Report, planned: bool) -> None:
        """Count a call; `planned` says whether it made its plan itself."""
        self.calls += 1
        self.plans += planned
        self.heads.update(rungs(report))
        self.structures.update(map(str, report.structure.flat))
        self.ranks += int(report.rank.sum())
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
        heads = self.heads.total()
        low_rank = self.structures["low_rank"]
        return AttentionStatistics(
            call_count=self.calls,
            plan_count=self.plans,
            precision_distribution={name: n / heads for name, n in self.heads.items()},
            sparse_ratio=self.structures["sparse"] / heads if heads else math.nan,
            low_rank_ratio=low_rank / heads if heads else math.nan,
            mean_rank=self.ranks / low_rank if low_rank else math.nan,
            mean_entropy=self.entropy / self.profiled if self.profiled else math.nan,
            measured_error=self.error,
            retried=self.retried,
            seconds=dict(self.seconds),
        )


@dataclass(frozen=True)
class ModelStatistics:
    """The calls of a model's attention: of each layer, and together.

    Attributes
    ----------
    layers : dict
        Name of each layer to its `AttentionStatistics`.
    total : AttentionStatistics
        Of all layers' calls as if one module had made them.
    """

    layers: dict[str, AttentionStatistics]
    total: AttentionStatistics

    def table(self) -> str:
        """A line for each layer and one for the whole; what is not known is left empty."""
        header = "layer", "calls", "precision", "sparse", "low rank", "entropy", "measured", "retried", "time"
        rows = [
            header,
            *((name, *_cells(told)) for name, told in (*self.layers.items(), ("all", self.total))),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def to_json(self) -> str:
        """All of it, as strict JSON: NaN is null, infinity the string "Infinity"."""
        return json.dumps(jsonable(asdict(self)), allow_nan=False)

    def plot(self) -> Figure:
        """Each layer's rungs as shares of its heads, and its time by phase.

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        try:
            figure = empty_figure(figsize=(max(6.0, 2 + 0.5 * len(self.layers)), 6))
        except ImportError as error:
            raise ImportError("ModelStatistics.plot needs matplotlib: pip install adaattn[plots]") from error
        precision, time = figure.subplots(2, 1, sharex=True)
        layers = self.layers.values()
        shares = [layer.precision_distribution for layer in layers]
        milliseconds = [{name: 1e3 * s for name, s in layer.seconds.items()} for layer in layers]
        for axes, bars in ((precision, shares), (time, milliseconds)):
            names = list(dict.fromkeys(name for bar in bars for name, height in bar.items() if height))
            bottom = np.zeros(len(bars))
            for name in names:
                heights = np.array([bar.get(name, 0.0) for bar in bars])
                axes.bar(np.arange(len(bars)), heights, bottom=bottom, label=name, color=COLOURS.get(name))
                bottom += heights
            if names:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)
        precision.set(ylabel="share of the heads")
        time.set(ylabel="milliseconds", xlabel="layer")
        time.set_xticks(range(len(layers)), list(self.layers))
        return figure


def _cells(told: AttentionStatistics) -> tuple[str, ...]:
    def share(ratio: float) -> str:
        return "" if math.isnan(ratio) or not ratio else f"{ratio:.0%}"

    often = sorted(told.precision_distribution.items(), key=lambda item: -item[1])
    return (
        str(told.call_count),
        ", ".join(f"{name} {part:.0%}" for name, part in often),
        share(told.sparse_ratio),
        share(told.low_rank_ratio),
        "" if math.isnan(told.mean_entropy) else f"{told.mean_entropy:.3g}",
        error_text(told.measured_error),
        str(told.retried or ""),
        time_text(sum(told.seconds.values())),
    )


def rungs(report: Report) -> list[str]:
    """Names of the rungs of one head after another."""
    return [str(rung) for rung in report.rungs.flat]
