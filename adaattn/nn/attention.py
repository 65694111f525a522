"""Modules of attention: projections, positions and statistics around `adaattn.attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import api
from ..backward import attention_backward, budget_of
from ..cache import KVCache
from ..errors import ArgumentError
from ..rates import RUNGS
from ..stats import POLICIES, Plan, Report, tolerance_of
from .layers import Linear, check_features
from .module import Array, Module, Seed, at_least_one, check_dropout
from .positions import alibi_slopes, factors, turn
from .stats import AttentionStatistics, Tally


class MultiHeadAttention(Module):
    """Multi-head attention with grouped keys and values: (B, T, C) -> (B, T, C).

    The rows of `qkv.weight` are queries, keys and values, each by head and then by coordinate; all attention
    modules have the same parameters, so `load_state_dict` moves them between modules. Results have NumPy's
    common type of `x` and the parameters. `attend` computes the attention without a cache:
    `adaattn.attention`, unless replaced by a function of the same signature.

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
        Base of rotary positions; None: none.
    alibi : bool
        Whether scores fall with the distance, by the usual slopes.
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
        alibi: bool = False,
        collect_statistics: bool = False,
        seed: Seed = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        at_least_one(embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads)
        check_dropout(dropout)
        if embed_dim % num_heads:
            raise ArgumentError(f"embed_dim: expected a multiple of the {num_heads} heads, got {embed_dim}")
        if num_heads % num_kv_heads:
            raise ArgumentError(f"num_kv_heads: expected a divisor of {num_heads} heads, got {num_kv_heads}")
        if rotary_base is not None and embed_dim // num_heads % 2:
            raise ArgumentError(f"rotary_base: expected None with an odd head size, got {rotary_base:g}")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, embed_dim // num_heads
        self.causal, self.dropout, self.rotary_base = causal, dropout, rotary_base
        self._options: dict[str, Any] = {"causal": causal}
        if alibi:
            self._options["alibi_slopes"] = alibi_slopes(num_heads)
        self.collect_statistics, self._tally = collect_statistics, Tally()
        self._rng = np.random.default_rng(seed)
        rows = (num_heads + 2 * num_kv_heads) * self.head_size
        self.qkv = Linear(embed_dim, rows, bias=bias, dtype=dtype, seed=self._rng)
        self.out = Linear(embed_dim, embed_dim, bias=bias, dtype=dtype, seed=self._rng)
        self.attend: Callable[..., Any] = api.attention

    def __call__(self, x: Array, cache: KVCache | None = None, lengths: ArrayLike | None = None) -> Array:
        """The attention of `x` to itself, or to what `cache` holds and itself, which is appended.

        Parameters
        ----------
        x : (B, T, C) array
        cache : KVCache, optional
            Of B sequences, G heads and the module's head size; in evaluation only. Only a causal module is
            the same with and without one.
        lengths : (B,) ints, optional
            How many of the T positions, the first ones, count; what comes out at the others has no meaning.
            Not beside a cache that holds something.

        Raises
        ------
        ShapeError, ArgumentError
            Naming the argument, what was expected and what came.
        """
        held = None if cache is None else cache.lengths
        continued = held is not None and held.any()
        if cache is not None and self.training:
            raise ArgumentError("cache: expected None in training, got a KVCache")
        if continued and lengths is not None:
            raise ArgumentError("lengths: expected None beside a cache that holds tokens, got some")
        query, key, value, turned = self._heads(x, held)
        options = self._options
        if cache is not None:
            cache.append(key, value, lengths)
        if cache is not None and continued:
            attended = self._attend_cached(cache, query, options)
        else:
            if lengths is not None:
                options = options | {"kv_lengths": lengths}
            if self.training:
                if self.dropout:
                    options = options | {"dropout_p": self.dropout, "seed": int(self._rng.integers(2**63))}
                attended, lse = self._attend(query, key, value, options | {"return_lse": True})
                self._saved = query, key, value, attended, lse, options, turned
            else:
                attended = self._attend(query, key, value, options)
        return self.out(attended.transpose(0, 2, 1, 3).reshape(x.shape))

    def _heads(self, x: Array, held: Array | None = None) -> tuple[Array, Array, Array, Any]:
        """Queries (B, H, T, D), keys and values (B, G, T, D) behind what is held, and how they turned."""
        B, T, C = x.shape if x.ndim == 3 else (0, 0, 0)
        H, G, D = self.num_heads, self.num_kv_heads, self.head_size
        if C != H * D:
            check_features(x, H * D)
        heads, turned = self.qkv(x).reshape(B, T, H + 2 * G, D), None
        if self.rotary_base is not None:
            turned = factors(D, self.rotary_base, heads.dtype, token_positions(held, T))
            turn(heads[:, :, : H + G], *turned)
        heads = heads.transpose(0, 2, 1, 3)
        return heads[:, :H], heads[:, H : H + G], heads[:, H + G :], turned

    def backward(self, grad_out: Array) -> Array:
        query, key, value, attended, lse, options, turned = self._recall()
        B, H, T, D = query.shape
        G = key.shape[1]
        grad = self.out.backward(grad_out).reshape(B, T, H, D).transpose(0, 2, 1, 3)
        found = attention_backward(
            grad, query, key, value, attended, lse, **options, **self._gradient_budget()
        )
        heads = np.empty((B, T, H + 2 * G, D), query.dtype)
        by_head = heads.transpose(0, 2, 1, 3)
        by_head[:, :H], by_head[:, H : H + G], by_head[:, H + G :] = found.query, found.key, found.value
        if turned is not None:
            cos, sin = turned
            turn(heads[:, :, : H + G], cos, -sin)
        return self.qkv.backward(heads.reshape(B, T, -1))

    def _gradient_budget(self) -> dict[str, Any]:
        """What `backward` passes to `attention_backward` beside the options of the call."""
        return {}

    def _attend(self, query: Array, key: Array, value: Array, options: dict[str, Any]) -> Any:
        """`attend`'s result for the options, by the module's own choice of precision and structure."""
        return self._collect(self.attend, (query, key, value), options)

    def _attend_cached(self, cache: KVCache, query: Array, options: dict[str, Any]) -> Any:
        """As `_attend`, over what the cache holds."""
        return self._collect(cache.attention, (query,), options)

    def _collect(self, attend: Callable[..., Any], arrays: tuple[Array, ...], options: dict[str, Any]) -> Any:
        """The call's result; with a report, which the statistics count, where they are collected."""
        if not self.collect_statistics:
            return attend(*arrays, **options)
        *result, report = attend(*arrays, **options, return_report=True)
        self._tally.add(report, planned=report.plan is not None)
        return result[0] if len(result) == 1 else tuple(result)

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


class DenseAttention(MultiHeadAttention):
    """Exact multi-head attention: `MultiHeadAttention` by the name that sets it apart from the others."""


class AdaptivePrecisionAttention(MultiHeadAttention):
    """Attention in the cheapest precision that keeps an error budget, chosen for every head and verified.

    Parameters, inputs and outputs are `MultiHeadAttention`'s. Every call plans by itself, so that its result
    depends on its input alone, unless `replan_every` is given: then a plan serves that many calls in a row.

    Parameters
    ----------
    embed_dim, num_heads : int
        C and H; the head size is C / H.
    policy : "quality", "balanced" or "speed", optional
        Name of a tolerance: 1e-5, 1e-2, 5e-2.
    tolerance : float, optional
        Largest relative error of a head's output and, in training, of its gradients; with neither it nor a
        policy: "balanced".
    min_precision, max_precision : str
        The cheapest and the dearest rung that may be chosen, as in `adaattn.attention`.
    replan_every : int, optional
        A plan serves this many calls of the same sizes, the first of which made it; each is verified, and its
        report read. A new plan is made when they are over, when sizes change, and after a call that measured
        an error above the tolerance or had to retry a head. Decoding, with growing keys, plans every call.
        Plans do not carry `max_precision`: a head that is retried under an earlier one may go above it.
    **options
        `MultiHeadAttention`'s.
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

    def _attend(self, query: Array, key: Array, value: Array, options: dict[str, Any]) -> Any:
        arrays = query, key, value
        if self._replan_every is None:
            return self._collect(self.attend, arrays, options | self._budget(key.shape[2]))
        sizes = query.shape, key.shape, value.shape, query.dtype, "return_lse" in options
        plan = self._plan if sizes == self._plan_sizes else None
        budget = self._budget(key.shape[2]) if plan is None else {"plan": plan}
        *result, report = self.attend(*arrays, **options, **budget, return_report=True)
        if self.collect_statistics:
            self._tally.add(report, planned=plan is None)
        self._plan_calls = 1 if plan is None else self._plan_calls + 1
        self._plan, self._plan_sizes = self._kept_plan(report), sizes
        return result[0] if len(result) == 1 else tuple(result)

    def _attend_cached(self, cache: KVCache, query: Array, options: dict[str, Any]) -> Any:
        return self._collect(cache.attention, (query,), options | self._budget())

    def _budget(self, keys: int | None = None) -> dict[str, Any]:
        """Of a call over so many keys; None: over a cache's."""
        return {"tolerance": self._tolerance, **self._limits}

    def _gradient_budget(self) -> dict[str, Any]:
        return budget_of(self._tolerance, self._limits["min_precision"])

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
) -> MultiHeadAttention:
    """An adaptive module where there is a budget, else an exact one."""
    if policy is None and tolerance is None:
        return DenseAttention(embed_dim, num_heads, **options)
    return AdaptivePrecisionAttention(embed_dim, num_heads, policy=policy, tolerance=tolerance, **options)


def token_positions(held: Array | None, T: int) -> Any:
    """Of T tokens behind those that are held: a slice where all sequences hold as many, else (B, T)."""
    if held is None:
        return slice(0, T)
    first = int(held[0])
    if held.size == 1 or (held == first).all():
        return slice(first, first + T)
    return held[:, None] + np.arange(T)
