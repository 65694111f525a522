"""Modules of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .. import api
from ..errors import ArgumentError, ShapeError
from ..rates import RUNGS
from ..stats import POLICIES, Plan, Report, tolerance_of
from .layers import Linear
from .module import Array, Module, Seed
from .stats import AttentionStatistics, Tally


def rotary(x: Array, base: float = 10_000.0, offset: int = 0) -> Array:
    """Rotate (B, H, T, D) by position, counted from `offset`; coordinates j and j + D/2 form a pair.

    Pair j turns by position · base^(-2j/D). Angles are float64, the result has x's dtype.
    """
    T, (half, odd) = x.shape[2], divmod(x.shape[3], 2)
    if odd:
        raise ArgumentError(f"x: expected an even head size, got {x.shape[3]}")
    angle = np.arange(offset, offset + T)[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class DenseAttention(Module):
    """Multi-head attention, exact, with grouped keys and values: (B, T, C) -> (B, T, C).

    The rows of `qkv.weight` are queries, keys and values, each by head and then by coordinate; all attention
    modules have the same parameters, so `load_state_dict` moves them between modules. Results have NumPy's
    common type of `x` and the parameters. `attend` computes the attention: `adaattn.attention`, unless
    replaced by a function of the same signature.

    Statistics are collected while `collect_statistics`, an option and an attribute, is True; they come from
    the reports of the calls. Otherwise no report is made.

    Parameters
    ----------
    embed_dim, num_heads : int
        C and H; the head size is C / H.
    num_kv_heads : int, optional
        G, a divisor of H; default H.
    causal : bool
        Whether a position attends to itself and the past only.
    dropout : float
        Share of the probabilities dropped in training, with seeds from the module's own generator.
    bias : bool
        Whether the two projections have one.
    dtype : dtype
        Of the parameters: float32 or float64.
    rotary_base : float, optional
        Base of rotary positions; None: no positions.
    collect_statistics : bool
        Whether calls count in `get_statistics`.
    seed : int or numpy.random.Generator, optional
        Source of the initial weights and of dropout's seeds.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
        rotary_base: float | None = None,
        collect_statistics: bool = False,
        seed: Seed = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if count < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {count}")
        if embed_dim % num_heads:
            raise ArgumentError(f"embed_dim: expected a multiple of the {num_heads} heads, got {embed_dim}")
        if num_heads % num_kv_heads:
            raise ArgumentError(f"num_kv_heads: expected a divisor of {num_heads} heads, got {num_kv_heads}")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, embed_dim // num_heads
        self.causal, self.dropout, self.rotary_base = causal, dropout, rotary_base
        self.collect_statistics, self._tally = collect_statistics, Tally()
        self._rng = np.random.default_rng(seed)
        rows = (num_heads + 2 * num_kv_heads) * self.head_size
        self.qkv = Linear(embed_dim, rows, bias=bias, dtype=dtype, seed=self._rng)
        self.out = Linear(embed_dim, embed_dim, bias=bias, dtype=dtype, seed=self._rng)
        self.attend: Callable[..., Any] = api.attention

    def __call__(self, x: Array, cache: Cache | None = None) -> Array:
        embed_dim = self.num_heads * self.head_size
        if x.ndim != 3 or x.shape[2] != embed_dim:
            raise ShapeError(f"x: expected shape (B, T, {embed_dim}), got {x.shape}")
        B, T, C = x.shape
        heads = self.qkv(x).reshape(B, T, -1, self.head_size).transpose(0, 2, 1, 3)
        query, key, value = np.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=1)
        if self.rotary_base is not None:
            offset = 0 if cache is None else cache.length
            query, key = rotary(query, self.rotary_base, offset), rotary(key, self.rotary_base, offset)
        if cache is not None:
            key, value = cache.append(key, value)
        options: dict[str, Any] = {"causal": self.causal}
        if self.training and self.dropout:
            options |= {"dropout_p": self.dropout, "seed": int(self._rng.integers(2**63))}
        heads = self._attend(query, key, value, options)
        return self.out(heads.transpose(0, 2, 1, 3).reshape(B, T, C))

    def _attend(self, query: Array, key: Array, value: Array, options: dict[str, Any]) -> Array:
        if not self.collect_statistics:
            out: Array = self.attend(query, key, value, **options)
            return out
        out, report = self.attend(query, key, value, **options, return_report=True)
        self._tally.add(report, planned=False)
        return out

    def get_statistics(self) -> AttentionStatistics:
        """What the calls collected since the last reset were computed with.

        Raises
        ------
        ArgumentError
            `collect_statistics` is off and nothing was collected.
        """
        if not self.collect_statistics and not self._tally.calls:
            raise ArgumentError("collect_statistics: expected True before the calls to be told of, got False")
        return self._tally.summary()

    def get_precision_statistics(self) -> dict[str, Any]:
        """Rungs of the collected calls, and of the machine.

        Returns
        -------
        dict
            ``call_count``, ``precision_usage`` (rung to number of heads computed with it) and
            ``hardware_support`` (rung to whether this machine offers it: whether it is faster here than every
            more exact one).

        Raises
        ------
        ArgumentError
            As `get_statistics`.
        """
        offered = api.cpu_info()["rates"]["offered"]
        return {
            "call_count": self.get_statistics().call_count,
            "precision_usage": dict(self._tally.heads),
            "hardware_support": {rung: rung in offered for rung in RUNGS},
        }

    def reset_statistics(self) -> None:
        """Forget the calls collected so far."""
        self._tally = Tally()


class AdaptivePrecisionAttention(DenseAttention):
    """Attention in the cheapest precision that keeps an error budget, chosen for every head and verified.

    Parameters, inputs and outputs are `DenseAttention`'s. Every call plans by itself, so that its result
    depends on its input alone, unless `replan_every` is given: then a plan serves that many calls in a row.

    Parameters
    ----------
    embed_dim, num_heads : int
        C and H; the head size is C / H.
    policy : "quality", "balanced" or "speed", optional
        Name of a tolerance: 1e-5, 1e-2, 5e-2.
    tolerance : float, optional
        Largest relative error of a head's output; with neither it nor a policy: "balanced".
    min_precision, max_precision : str
        The cheapest and the dearest rung that may be chosen, as in `adaattn.attention`.
    replan_every : int, optional
        A plan serves this many calls of the same sizes, the first of which made it; each is verified, and its
        report read. A new plan is made when they are over, when sizes change, and after a call that measured
        an error above the tolerance or had to retry a head. Decoding, with growing keys, plans every call.
        Plans do not carry `max_precision`: a head that is retried under an earlier one may go above it.
    **options
        `DenseAttention`'s.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        policy: str | None = None,
        tolerance: float | None = None,
        min_precision: str = "auto",
        max_precision: str = "auto",
        replan_every: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        if replan_every is not None and replan_every < 1:
            raise ArgumentError(f"replan_every: expected at least 1, got {replan_every}")
        self._replan_every = replan_every
        self._limits: dict[str, Any] = {"min_precision": min_precision, "max_precision": max_precision}
        self._set_tolerance(tolerance_of(tolerance, policy))

    @property
    def tolerance(self) -> float:
        """Largest relative error of a head's output."""
        return self._tolerance

    def set_precision_policy(self, policy: str | None) -> None:
        """Take the tolerance that `policy` names ("quality", "balanced" or "speed"); None: "balanced"."""
        self._set_tolerance(tolerance_of(None, policy))

    def _set_tolerance(self, tolerance: float | None) -> None:
        tolerance = POLICIES["balanced"] if tolerance is None else tolerance
        anything = np.ones((1, 1, 1, 1), np.float32)
        api.plan(anything, anything, anything, tolerance=tolerance, **self._limits)  # refuses what is wrong
        self._tolerance: float = tolerance
        self._plan: Plan | None = None
        self._plan_sizes: Any = None
        self._plan_calls = 0

    def _attend(self, query: Array, key: Array, value: Array, options: dict[str, Any]) -> Array:
        budget: dict[str, Any] = {"tolerance": self._tolerance, **self._limits}
        if self._replan_every is None and not self.collect_statistics:
            out: Array = self.attend(query, key, value, **options, **budget)
            return out
        sizes = query.shape, key.shape, value.shape, query.dtype
        plan = self._plan if sizes == self._plan_sizes else None
        if plan is not None:
            budget = {"plan": plan}
        out, report = self.attend(query, key, value, **options, **budget, return_report=True)
        if self.collect_statistics:
            self._tally.add(report, planned=plan is None)
        if self._replan_every is not None:
            self._plan_calls = 1 if plan is None else self._plan_calls + 1
            self._plan, self._plan_sizes = self._kept_plan(report), sizes
        return out

    def _kept_plan(self, report: Report) -> Plan | None:
        """The call's plan, if it may serve another one."""
        missed = report.retried.any() or (report.measured_error > self._tolerance).any()
        return None if missed or self._plan_calls == self._replan_every else report.plan


def attention(
    embed_dim: int,
    num_heads: int,
    *,
    policy: str | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> DenseAttention:
    """An adaptive module where there is a budget, else an exact one."""
    if policy is None and tolerance is None:
        return DenseAttention(embed_dim, num_heads, **options)
    return AdaptivePrecisionAttention(embed_dim, num_heads, policy=policy, tolerance=tolerance, **options)


class Cache:
    """One layer's past keys and values, filled from the front of arrays of fixed capacity."""

    def __init__(self, attention: DenseAttention, batch: int, capacity: int) -> None:
        shape = (batch, attention.num_kv_heads, capacity, attention.head_size)
        dtype = attention.qkv.weight.dtype
        self.key, self.value = np.empty(shape, dtype), np.empty(shape, dtype)
        self.length = 0

    def append(self, key: Array, value: Array) -> tuple[Array, Array]:
        """Add (B, G, T, D) at the end; returns views of all that is held."""
        start, self.length = self.length, self.length + key.shape[2]
        self.key[:, :, start : self.length], self.value[:, :, start : self.length] = key, value
        return self.key[:, :, : self.length], self.value[:, :, : self.length]
