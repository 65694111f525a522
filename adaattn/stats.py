"""What the library tells about its own work: plans before a call, reports after it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _adaattn
from .errors import ArgumentError, DTypeError
from .rates import RUNGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_N = len(_adaattn.CANDIDATES)
_SCALARS = _adaattn.HEAD_FIELDS[: -3 * _N]
_SIZES = ("B", "H", "G", "T", "S", "D", "E")
_DTYPES = ("float32", "float64", "float16", "bfloat16")

#: The policies: names for tolerances.
POLICIES: Mapping[str, float] = {"quality": 1e-5, "balanced": 1e-2, "speed": 5e-2}

_INDEX = {name: i for i, name in enumerate(_adaattn.RUNGS)}

PHASES = ("probe", "plan", "execute", "verify")


def tolerance_of(tolerance: Any, policy: Any) -> Any:
    """The tolerance that the two arguments stand for; the engine checks a number."""
    if policy is None:
        return tolerance
    expected = f"None or one of {', '.join(map(repr, POLICIES))}"
    if not isinstance(policy, str):
        raise DTypeError(f"policy: expected {expected}, got {type(policy).__name__}")
    if policy not in POLICIES:
        raise ArgumentError(f"policy: expected {expected}, got {policy!r}")
    if tolerance is not None:
        raise ArgumentError(f"policy: expected None beside tolerance={tolerance!r}, got {policy!r}")
    return POLICIES[policy]


def _columns(table: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The engine's table of heads by name; every NaN with the same bits."""
    table = np.where(np.isnan(table), np.nan, table)
    return {name: table[..., i].copy() for i, name in enumerate(_SCALARS)} | {
        name: table[..., len(_SCALARS) + i * _N :][..., :_N].copy()
        for i, name in enumerate(("candidate_error", "candidate_lse_error", "candidate_seconds"))
    }


def _names(indices: NDArray[np.float64]) -> NDArray[np.str_]:
    names: NDArray[np.str_] = np.array(_adaattn.RUNGS)[indices.astype(int)]
    return names


def _pairs(qk: NDArray[np.str_], pv: NDArray[np.str_]) -> NDArray[np.str_]:
    both: NDArray[np.str_] = np.where(qk == pv, qk, np.char.add(np.char.add(qk, "/"), pv))
    return both


def _structures(budget: NDArray[np.float64], rank: NDArray[Any]) -> NDArray[np.str_]:
    return np.where(rank > 0, "low_rank", np.where(budget > 0, "sparse", "dense"))


def _chosen(column: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """The fields of a plan that say what its heads are computed with."""
    numbers = ("predicted_error", "rank_gain", "rank_limit", "kept_fraction", "sparse_budget", "sparse_joint")
    return {name: column[name] for name in numbers} | {
        "precision_qk": _names(column["precision_qk"]),
        "precision_pv": _names(column["precision_pv"]),
        "structure": _structures(column["sparse_budget"], column["rank"]),
        "rank": column["rank"].astype(np.int64),
        "retried": column["retried"].astype(bool),
    }


@dataclass(frozen=True, eq=False)
class Plan:
    """What a call will do, head by head: made by `adaattn.plan`, or part of a report. It pickles.

    Attributes
    ----------
    sizes : dict
        B, H, G, T, S, D, E and the dtype of the problem that it is for.
    tolerance : float
        The relative error of a head that it keeps.
    min_precision, max_precision : str
        What the choice was limited to; "auto": not at all.
    forced : bool
        The caller named the precision.
    lse : bool
        The error of the lse counted too.
    ruled_out : tuple of (str or None)
        What of the call does not go with sparse heads, and with low rank.
    precision_qk, precision_pv : (B, H) array of str
        Rungs of the scores and of the values.
    predicted_error : (B, H) array
        Relative Frobenius error of the output; NaN where it is not known. Of heads that nothing was looked at
        it is what such heads show, in a report's plan what some rows said when the head was computed.
    structure : (B, H) array of str
        "sparse" where the values of some blocks of keys are left out, "low_rank" where landmarks stand for
        all keys, else "dense".
    rank : (B, H) array of int
        Landmarks; 0: none.
    rank_gain, rank_limit : (B, H) arrays
        What the residual of a query's kernel beside its squared sum of weights is worth in estimated squared
        error of its row, in units of what a row may have; and the residual above which a row is computed
        exactly.
    kept_fraction : (B, H) array
        Share of the visible blocks that are computed; predicted.
    sparse_budget, sparse_joint : (B, H) arrays
        Mean square that a row's estimated error may have by what is left out, 0 where dense; and how far the
        errors of blocks add up in the estimate: 0 as independent ones do, 1 in full. On a GPU the former is
        the square of what any row may be off by.
    retried : (B, H) array of bool
        A first choice had failed when this was made by a call.
    finite : (B, H) array of bool
        False where NaN or infinities take part, or nothing was looked at.
    profiled_rows : (B, H) array of int
        Exact rows behind the prediction; 0: statistics of the arrays alone.
    candidates : tuple of str
        What could have been chosen, dear to cheap.
    candidate_error, candidate_lse_error, candidate_seconds : (B, H, len(candidates)) arrays
        Predicted error of the output, largest error of the lse, and time of one core, of each.
    """

    sizes: dict[str, Any]
    tolerance: float
    min_precision: str
    max_precision: str
    forced: bool
    lse: bool
    ruled_out: tuple[str | None, str | None]
    precision_qk: NDArray[np.str_]
    precision_pv: NDArray[np.str_]
    predicted_error: NDArray[np.float64]
    structure: NDArray[np.str_]
    rank: NDArray[np.int64]
    rank_gain: NDArray[np.float64]
    rank_limit: NDArray[np.float64]
    kept_fraction: NDArray[np.float64]
    sparse_budget: NDArray[np.float64]
    sparse_joint: NDArray[np.float64]
    retried: NDArray[np.bool_]
    finite: NDArray[np.bool_]
    profiled_rows: NDArray[np.int64]
    candidates: tuple[str, ...]
    candidate_error: NDArray[np.float64]
    candidate_lse_error: NDArray[np.float64]
    candidate_seconds: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        table: NDArray[np.float64],
        sizes: Sequence[Any],
        tolerance: float,
        ruled_out: tuple[str | None, str | None],
        *,
        min_precision: str,
        max_precision: str,
        forced: bool,
        lse: bool,
    ) -> Plan:
        """From the engine's table of heads and sizes."""
        column = _columns(table)
        # Those of GPUs come last.
        n = _N if np.isfinite(column["candidate_seconds"][..., len(RUNGS) :]).any() else len(RUNGS)
        error, lse_error, seconds = (
            column[f"candidate_{name}"][..., :n].copy() for name in ("error", "lse_error", "seconds")
        )
        return cls(
            sizes=dict(zip((*_SIZES, "dtype"), sizes, strict=True)),
            tolerance=float(tolerance),
            min_precision=min_precision,
            max_precision=max_precision,
            forced=forced,
            lse=lse,
            ruled_out=ruled_out,
            **_chosen(column),
            finite=column["finite"].astype(bool),
            profiled_rows=column["profiled_rows"].astype(np.int64),
            candidates=_adaattn.CANDIDATES[:n],
            candidate_error=error,
            candidate_lse_error=np.where(np.isnan(error), np.nan, lse_error),
            candidate_seconds=seconds,
        )

    def choices(self) -> tuple[tuple[Any, ...], NDArray[np.float64]]:
        """Sizes and, of all heads, indices of the scores' and the values' rungs, predicted errors, sparse
        budgets and joints, kept fractions, ranks, their gains and limits, as the engine takes them."""
        numbers = np.concatenate(
            (
                [_INDEX[rung] for rung in self.precision_qk.ravel().tolist()],
                [_INDEX[rung] for rung in self.precision_pv.ravel().tolist()],
                self.predicted_error,
                self.sparse_budget,
                self.sparse_joint,
                self.kept_fraction,
                self.rank,
                self.rank_gain,
                self.rank_limit,
            ),
            axis=None,
            dtype=np.float64,
        )
        return tuple(self.sizes.values()), numbers

    @property
    def rungs(self) -> NDArray[np.str_]:
        """(B, H): the rung of both products, by its name in `candidates`: "bf16", "int8/bf16"."""
        return _pairs(self.precision_qk, self.precision_pv)

    def explain(self) -> str:
        """For each head the choice and why it won; then the candidates with predicted time and error."""
        from . import views

        return views.explain(self)

    def to_json(self) -> str:
        """Strict JSON that `from_json` reads: NaN is null, infinity the string "Infinity"."""
        return json.dumps(jsonable(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote, the same in every bit.

        Raises
        ------
        DTypeError
            ``text`` is not a str.
        ArgumentError
            It is not the JSON of a plan.
        """
        if not isinstance(text, str):
            raise DTypeError(f"text: expected a str, got {type(text).__name__}")
        try:
            return cls(**_plan_fields(json.loads(text)))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ArgumentError(f"text: expected the JSON of a plan, got something else: {reason}") from None


@dataclass(frozen=True, eq=False)
class Report:
    """What each head of a call was computed with, and how exact that was. It pickles.

    Attributes
    ----------
    precision_qk, precision_pv : (B, H) array of str
        Rungs of the scores and of the values.
    structure : (B, H) array of str
        "sparse" where the values of some blocks of keys were left out, or a `KVCache` was read in part,
        "low_rank" where landmarks stood for all keys, else "dense".
    rank : (B, H) array of int
        Landmarks; 0: none.
    kept_fraction : (B, H) array
        Share of the visible blocks that were computed, or of the bytes that a `KVCache` read; 1 where dense.
    predicted_error : (B, H) array
        Relative Frobenius error of the output that was predicted; NaN without a tolerance.
    measured_error : (B, H) array
        The same, estimated from exact rows that the choice had not seen; NaN where no row was verified.
    error_limit : (B, H) array
        Upper limit of the estimate, built to be exceeded with a probability of 1e-3. That holds where rows
        are alike; where the scores spread much (`score_std` above 2 or so) it is exceeded more often.
    verified_rows : (B, H) array of int
        Rows behind it.
    error_bound : (B, H) array
        Of the relative Frobenius error, where it is certified: by a `KVCache` that read a part of its
        numbers. NaN elsewhere.
    retried : (B, H) array of bool
        A first choice could not hold the head's numbers or failed verification; a wider one took its place.
    entropy, entropy_std : (B, H) array
        Nats: of a row's weights, mean over rows with two or more visible keys, and its spread between rows;
        NaN where no row was profiled.
    block_entropy : (B, H) array
        Nats: of the mass of blocks of 64 keys; what is missing to the entropy lies within them.
    local_entropy : (B, H) array
        Nats: of the weights of the 64 keys nearest to the row's own place, among themselves; mean over rows
        in which these weigh anything.
    score_std : (B, H) array
        Standard deviation of a row's scores.
    seconds : dict
        By phase: probe, plan, execute, verify; together the whole call.
    flops : float
        Operations of both products over the visible keys.
    plan : Plan or None
        What can be passed to a later call; None without a tolerance.
    kept_blocks : (B, H, rows, columns) array or None
        A picture of each sparse head, of up to 32 parts of its queries and of its keys: the share of a part's
        visible blocks of 64 by 64 that was computed. NaN where nothing is visible, for the last queries where
        these are not 64, and for other heads; None where no head was sparse. `plot_blocks` draws it.
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
    local_entropy: NDArray[np.float64]
    score_std: NDArray[np.float64]
    seconds: dict[str, float]
    flops: float
    plan: Plan | None
    kept_blocks: NDArray[np.float32] | None = None
    stored_error: NDArray[np.float64] | None = None

    @classmethod
    def of(
        cls,
        table: NDArray[np.float64],
        seconds: Sequence[float],
        flops: float,
        *,
        made: Plan | None = None,
        given: Plan | None = None,
        picture: NDArray[np.float32] | None = None,
    ) -> Report:
        """From the engine's table of heads, with the plan that the call made or was given."""
        column = _columns(table)
        chosen, bound = _chosen(column), column["error_bound"]
        qk, pv, structure = (chosen[name] for name in ("precision_qk", "precision_pv", "structure"))
        if given is not None:
            predicted = chosen["predicted_error"]
            kept = (qk == given.precision_qk) & (pv == given.precision_pv) & (structure == given.structure)
            chosen["predicted_error"] = np.where(np.isnan(predicted) & kept, given.predicted_error, predicted)
            made = given if kept.all() else replace(given, **chosen)
        return cls(
            precision_qk=qk,
            precision_pv=pv,
            structure=np.where(~np.isnan(bound) & (column["kept_fraction"] < 1), "sparse", structure),
            rank=chosen["rank"],
            kept_fraction=chosen["kept_fraction"],
            predicted_error=chosen["predicted_error"],
            measured_error=column["measured_error"],
            error_limit=column["error_limit"],
            verified_rows=column["verified_rows"].astype(np.int64),
            error_bound=bound,
            retried=chosen["retried"],
            entropy=column["entropy"],
            entropy_std=column["entropy_std"],
            block_entropy=column["block_entropy"],
            local_entropy=column["local_entropy"],
            score_std=column["score_std"],
            seconds=dict(zip(PHASES, seconds, strict=True)),
            flops=flops,
            plan=made,
            kept_blocks=picture,
        )

    @property
    def rungs(self) -> NDArray[np.str_]:
        """(B, H): the rung of both products: "bf16", or "int8/bf16" for scores in int8 and values in bf16."""
        return _pairs(self.precision_qk, self.precision_pv)

    def table(self) -> str:
        """A line for each head; columns that say nothing about any head are left out.

        A table of ``rich`` where that is installed, else aligned columns.
        """
        from . import views

        return views.table(self)

    def to_json(self) -> str:
        """Strict JSON: NaN is null, infinity the string "Infinity"; arrays are nested lists."""
        return json.dumps(jsonable(self), allow_nan=False)

    def plot(self) -> Figure:
        """A matplotlib figure: the rung of each head, and its promised, predicted and measured error.

        Raises
        ------
        ImportError
            matplotlib is not installed: ``pip install adaattn[plots]``.
        """
        from . import views

        return views.plot(self)

    def plot_blocks(self) -> Figure:
        """A matplotlib figure: which blocks each sparse head kept, queries downward, keys to the right.

        Raises
        ------
        ImportError
            matplotlib is not installed: ``pip install adaattn[plots]``.
        """
        from . import views

        return views.plot_blocks(self)

    def _repr_html_(self) -> str:
        from . import views

        return views.html(self)


# ---- JSON


def jsonable(x: Any) -> Any:
    """x in what strict JSON has: NaN is None, infinity a string."""
    if isinstance(x, (Plan, Report)):
        return {f.name: jsonable(getattr(x, f.name)) for f in fields(x)}
    if isinstance(x, dict):
        return {name: jsonable(value) for name, value in x.items()}
    if isinstance(x, np.ndarray):
        return jsonable(x.tolist())
    if isinstance(x, (list, tuple)):
        return [jsonable(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"
    return x


_INFINITIES = {None: math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plan_fields(saved: Any) -> dict[str, Any]:
    """What `jsonable` made of a plan, checked and turned back; raises ValueError, KeyError or TypeError."""
    if not isinstance(saved, dict):
        raise ValueError("no object")
    names = [f.name for f in fields(Plan)]
    if unknown := saved.keys() - set(names):
        raise ValueError(f"{min(unknown)!r} is no field of a plan")
    result: dict[str, Any] = {name: saved[name] for name in names}
    sizes = result["sizes"] = {name: saved["sizes"][name] for name in (*_SIZES, "dtype")}
    if (
        not all(type(sizes[name]) is int and sizes[name] > 0 for name in _SIZES)
        or sizes["dtype"] not in _DTYPES
    ):
        raise ValueError(f"sizes {sizes}")
    if not (type(result["tolerance"]) is float and 0 < result["tolerance"] < math.inf):
        raise ValueError(f"tolerance {result['tolerance']!r}")
    for name in ("min_precision", "max_precision"):
        if result[name] not in _adaattn.RUNGS:
            raise ValueError(f"{name} {result[name]!r}")
    for name in ("forced", "lse"):
        if type(result[name]) is not bool:
            raise ValueError(f"{name} {result[name]!r}")
    ruled_out = result["ruled_out"] = tuple(result["ruled_out"])
    if len(ruled_out) != 2 or not all(isinstance(what, (str, type(None))) for what in ruled_out):
        raise ValueError(f"ruled_out {ruled_out}")
    candidates = result["candidates"] = tuple(result["candidates"])
    if not all(isinstance(name, str) for name in candidates):
        raise ValueError(f"candidates {candidates}")
    heads = sizes["B"], sizes["H"]
    for name, kind in (
        *((name, str) for name in ("precision_qk", "precision_pv", "structure")),
        *((name, bool) for name in ("retried", "finite")),
        *((name, int) for name in ("profiled_rows", "rank")),
        *(
            (name, float)
            for name in (
                "predicted_error",
                "kept_fraction",
                "sparse_budget",
                "sparse_joint",
                "rank_gain",
                "rank_limit",
            )
        ),
    ):
        result[name] = _array(saved, name, heads, kind)
    for name in ("candidate_error", "candidate_lse_error", "candidate_seconds"):
        result[name] = _array(saved, name, (*heads, len(candidates)), float)
    qk, pv = result["precision_qk"], result["precision_pv"]
    known = [rung for rung in _adaattn.RUNGS if rung != "auto"]
    if not (np.isin(qk, known) & np.isin(pv, known) & ((qk == "fp64") == (pv == "fp64"))).all():
        raise ValueError("a precision that is no rung")
    structure = _structures(result["sparse_budget"], result["rank"])
    if (result["structure"] != structure).any():
        raise ValueError("a structure that its budget and rank do not have")
    result["structure"] = structure
    return result


def _array(saved: dict[str, Any], name: str, shape: tuple[int, ...], kind: type) -> NDArray[Any]:
    """A nested list of the given shape, all of one kind; floats may be null and infinities."""

    def flat(x: Any, depth: int) -> list[Any]:
        if depth == len(shape):
            x = _INFINITIES.get(x, x) if kind is float and isinstance(x, (str, type(None))) else x
            if type(x) is not kind:
                raise ValueError(f"{name} with {x!r}")
            return [x]
        if not isinstance(x, list) or len(x) != shape[depth]:
            raise ValueError(f"{name} of another shape than {shape}")
        return [item for part in x for item in flat(part, depth + 1)]

    values = flat(saved[name], 0)
    if kind is str:
        return np.array([*values, *_adaattn.RUNGS])[: len(values)].reshape(shape)
    return np.array(values, {bool: np.bool_, int: np.int64, float: np.float64}[kind]).reshape(shape)


@dataclass(frozen=True, eq=False)
class GradientReport:
    """What `attention_backward` tells of a call: arrays of key heads (B, G), and of query heads (B, H).

    Attributes
    ----------
    tolerance : float or None
        What was promised.
    precision_scores, precision_sums : (B, G) arrays of str
        Rungs of the scores and the gradients of weights, and of the sums over queries and keys.
    retried : (B, G) array of bool
        A first choice missed the tolerance, or could not hold the head's numbers, and was done again.
    predicted_error : (B, G) array
        NaN where the gradient is exact for the dtype.
    query_error, query_limit : (B, H) arrays
        Relative error of a head's dQ, estimated from sampled rows, and its upper limit. NaN: not verified.
    key_error, key_limit, value_error, value_limit : (B, G) arrays
        The same of dK and dV.
    verified_rows : (B, H) array of int
        Queries whose rows of dQ were compared.
    seconds : dict
        "execute" and "verify".
    """

    tolerance: float | None
    precision_scores: NDArray[np.str_]
    precision_sums: NDArray[np.str_]
    retried: NDArray[np.bool_]
    predicted_error: NDArray[np.float64]
    query_error: NDArray[np.float64]
    query_limit: NDArray[np.float64]
    key_error: NDArray[np.float64]
    key_limit: NDArray[np.float64]
    value_error: NDArray[np.float64]
    value_limit: NDArray[np.float64]
    verified_rows: NDArray[np.int64]
    seconds: dict[str, float]

    @classmethod
    def of(
        cls, tolerance: Any, heads: NDArray[np.float64], queries: NDArray[np.float64], seconds: Any
    ) -> GradientReport:
        """From the engine's tables."""
        heads, queries = (np.where(np.isnan(x), np.nan, x) for x in (heads, queries))
        scores, sums, retried, predicted, *errors = np.moveaxis(heads, -1, 0).copy()
        key, value, key_limit, value_limit = errors
        query, limit, rows = np.moveaxis(queries, -1, 0).copy()
        return cls(
            tolerance=None if tolerance is None else float(tolerance),
            precision_scores=_names(scores),
            precision_sums=_names(sums),
            retried=retried.astype(bool),
            predicted_error=predicted,
            query_error=query,
            query_limit=limit,
            key_error=key,
            key_limit=key_limit,
            value_error=value,
            value_limit=value_limit,
            verified_rows=rows.astype(np.int64),
            seconds=dict(zip(("execute", "verify"), seconds, strict=True)),
        )
