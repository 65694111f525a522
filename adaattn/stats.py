"""What the library tells about its own work: plans before a call, reports after it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _adaattn
from .errors import ArgumentError

_N = len(_adaattn.CANDIDATES)
_SCALARS = _adaattn.HEAD_FIELDS[: -2 * _N]

#: Names for tolerances.
POLICIES: Mapping[str, float] = {"quality": 1e-5, "balanced": 1e-2, "speed": 5e-2}

PHASES = ("probe", "plan", "execute", "verify")


def tolerance_of(tolerance: float | None, policy: str | None) -> float | None:
    """The tolerance that the two arguments stand for."""
    if policy is None:
        return tolerance
    if tolerance is not None:
        raise ArgumentError(f"policy: expected None beside tolerance={tolerance!r}, got {policy!r}")
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ArgumentError(f"policy: expected one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
    return POLICIES[policy]


def sizes_of(query: Any, key: Any, value: Any) -> dict[str, Any]:
    """Sizes and dtype of a problem; the engine has validated them, or will."""
    (B, H, T, D), (G, S, E) = query.shape, (*key.shape[1:3], value.shape[3])
    sizes = {"B": B, "H": H, "G": G, "T": T, "S": S, "D": D, "E": E}
    return {**{name: int(size) for name, size in sizes.items()}, "dtype": str(query.dtype).rpartition(".")[2]}


def _names(indices: NDArray[np.float64]) -> NDArray[np.str_]:
    return np.array(_adaattn.RUNGS)[indices.astype(int)]


@dataclass(frozen=True, eq=False)
class Plan:
    """What a call will do, head by head: made by `adaattn.plan`, or part of a report.

    Attributes
    ----------
    sizes : dict
        B, H, G, T, S, D, E and the dtype of the problem that it is for.
    tolerance : float
        The relative error of a head that it keeps.
    precision_qk, precision_pv : (B, H) array of str
        Rungs of the scores and of the values.
    predicted_error : (B, H) array
        Relative Frobenius error of the output; NaN where it is not known.
    candidates : tuple of str
        What could have been chosen, dear to cheap.
    candidate_error, candidate_seconds : (B, H, len(candidates)) arrays
        Predicted error, and time of one core, of each.
    profiled_rows : (B, H) array of int
        Exact rows behind the prediction; 0: statistics of the arrays alone.
    """

    sizes: dict[str, Any]
    tolerance: float
    precision_qk: NDArray[np.str_]
    precision_pv: NDArray[np.str_]
    predicted_error: NDArray[np.float64]
    candidates: tuple[str, ...]
    candidate_error: NDArray[np.float64]
    candidate_seconds: NDArray[np.float64]
    profiled_rows: NDArray[np.int64]

    @classmethod
    def of(cls, table: NDArray[np.float64], sizes: dict[str, Any], tolerance: float) -> Plan:
        """From the engine's table of heads."""
        column = {name: table[..., i] for i, name in enumerate(_SCALARS)}
        return cls(
            sizes,
            tolerance,
            _names(column["precision_qk"]),
            _names(column["precision_pv"]),
            column["predicted_error"].copy(),
            _adaattn.CANDIDATES,
            table[..., -2 * _N : -_N].copy(),
            table[..., -_N:].copy(),
            column["profiled_rows"].astype(np.int64),
        )

    def choices_for(self, query: Any, key: Any, value: Any) -> list[int]:
        """Indices of the rungs, (scores, values) of head after head, as the engine takes them.

        Raises
        ------
        ArgumentError
            The plan is for arrays of other sizes or dtype.
        """
        sizes = sizes_of(query, key, value)
        if sizes != self.sizes:
            wanted, came = (", ".join(f"{name}={x}" for name, x in s.items()) for s in (sizes, self.sizes))
            raise ArgumentError(f"plan: expected one for {wanted}, got one for {came}")
        index = {name: i for i, name in enumerate(_adaattn.RUNGS)}
        pairs = zip(self.precision_qk.flat, self.precision_pv.flat, strict=True)
        return [index[rung] for pair in pairs for rung in pair]


@dataclass(frozen=True, eq=False)
class Report:
    """What each head of a call was computed with, and how exact that was.

    Attributes
    ----------
    precision_qk, precision_pv : (B, H) array of str
        Rungs of the scores and of the values.
    structure : (B, H) array of str
        "dense".
    rank : (B, H) array of int
        Landmarks; 0: none.
    kept_fraction : (B, H) array
        Share of the visible blocks that were computed; 1 where dense.
    predicted_error : (B, H) array
        Relative Frobenius error of the output that the plan predicted; NaN without a tolerance.
    measured_error : (B, H) array
        The same, estimated from exact rows that the choice had not seen; NaN where no row was verified.
    error_limit : (B, H) array
        Upper limit of the estimate, exceeded with a probability of 1e-3.
    verified_rows : (B, H) array of int
        Rows behind it.
    error_bound : (B, H) array
        NaN: no choice is certified by a bound.
    retried : (B, H) array of bool
        A first choice could not hold the head's numbers or failed verification, and a wider one took its place.
    entropy, entropy_std : (B, H) array
        Nats: of a row's weights, mean over rows with two or more visible keys, and its spread between rows;
        NaN where no row was profiled.
    block_entropy : (B, H) array
        Nats: of the mass of blocks of 64 keys; what is missing to the entropy lies within them.
    score_std : (B, H) array
        Standard deviation of a row's scores.
    seconds : dict
        By phase: probe, plan, execute, verify; together the whole call.
    flops : float
        Operations of both products over the visible keys.
    plan : Plan or None
        What can be passed to a later call; None without a tolerance.
    stored_error : (B, H) array or None
        From a `KVCache`: the relative error of the output that keeping keys and values in its dtype is
        predicted to have cost, as if what was appended had been more exact. None elsewhere.
    """

    precision_qk: NDArray[np.str_]
    precision_pv: NDArray[np.str_]
    structure: NDArray[np.str_]
    rank: NDArray[np.int64]
    kept_fraction: NDArray[np.float64]
    predicted_error: NDArray[np.float64]
    measured_error: NDArray[np.float64]
    error_limit: NDArray[np.float64]
    verified_rows: NDArray[np.int64]
    error_bound: NDArray[np.float64]
    retried: NDArray[np.bool_]
    entropy: NDArray[np.float64]
    entropy_std: NDArray[np.float64]
    block_entropy: NDArray[np.float64]
    score_std: NDArray[np.float64]
    seconds: dict[str, float]
    flops: float
    plan: Plan | None
    stored_error: NDArray[np.float64] | None = None

    @classmethod
    def of(
        cls, table: NDArray[np.float64], seconds: Sequence[float], flops: float, plan: Plan | None
    ) -> Report:
        """From the engine's table of heads."""
        column = {name: table[..., i].copy() for i, name in enumerate(_SCALARS)}
        shape = table.shape[:2]
        return cls(
            precision_qk=_names(column["precision_qk"]),
            precision_pv=_names(column["precision_pv"]),
            structure=np.full(shape, "dense"),
            rank=np.zeros(shape, np.int64),
            kept_fraction=np.ones(shape),
            predicted_error=column["predicted_error"],
            measured_error=column["measured_error"],
            error_limit=column["error_limit"],
            verified_rows=column["verified_rows"].astype(np.int64),
            error_bound=np.full(shape, np.nan),
            retried=column["retried"].astype(bool),
            entropy=column["entropy"],
            entropy_std=column["entropy_std"],
            block_entropy=column["block_entropy"],
            score_std=column["score_std"],
            seconds=dict(zip(PHASES, seconds, strict=True)),
            flops=flops,
            plan=plan,
        )

    def table(self) -> str:
        """A line for each head, a column for each field."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), np.ndarray)}
        lines = [("batch", "head", *columns)]
        for at in np.ndindex(self.retried.shape):
            lines.append((*map(str, at), *(_cell(column[at]) for column in columns.values())))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cell(x: Any) -> str:
    if isinstance(x, np.bool_):
        return "yes" if x else ""
    if isinstance(x, np.floating):
        return "" if math.isnan(x) else f"{x:.3g}"
    return str(x)
