"""The float64 oracle: attention and its gradient in plain NumPy, with the signatures and the semantics of
`adaattn.attention` and `adaattn.attention_backward`.

Every other path of the library is tested against this file, so it favours being plainly right over being
fast: one head at a time, `ROWS` queries at a time, the order of operations read from top to bottom. It is
independent of the engine and validates nothing. Results stay in float64 whatever the inputs' dtype is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .backward import Gradients

ROWS = 512  # queries per step: scores take ROWS x S doubles, whatever T is

_Array = NDArray[Any]


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    attn_mask: ArrayLike | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    query_offset: ArrayLike | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | ArrayLike | None = None,
    tolerance: float | None = None,
    policy: str | None = None,
    precision: str | tuple[str, str] = "auto",
    min_precision: str = "auto",
    max_precision: str = "auto",
    plan: Any = None,
    verify: bool | str = "auto",
    return_lse: bool = False,
    return_report: bool = False,
    out: _Array | None = None,
    num_threads: int | None = None,
) -> Any:
    """Attention in float64; see `adaattn.attention` for the meaning of the arguments.

    Parameters
    ----------
    query, key, value : array_like
        (B, H, T, D), (B, G, S, D) and (B, G, S, E), of any dtype that converts to float64.
    out : ndarray, optional
        (B, H, T, E), filled with the result cast to its dtype.
    tolerance, policy, precision, min_precision, max_precision, plan, verify, return_report, num_threads
        Taken for the signature's sake; they have no influence.

    Returns
    -------
    out : ndarray of float64, (B, H, T, E)
        Not rounded to the inputs' dtype, also where the argument `out` was given.
    lse : ndarray of float64, (B, H, T)
        Natural logarithm of the softmax's denominator; only with ``return_lse=True``.
    """
    (B, H, T, _), E = np.shape(query), np.shape(value)[-1]
    result, lse = np.empty((B, H, T, E)), np.empty((B, H, T))
    with np.errstate(all="ignore"):
        for x in _steps(
            query, key, value, attn_mask, causal, window, softcap, alibi_slopes, sinks, kv_lengths,
            query_offset, scale, dropout_p, seed,
        ):  # fmt: skip
            lse[x.b, x.h, x.rows] = x.lse
            result[x.b, x.h, x.rows] = weigh(x.p if x.keep is None else x.p * x.keep, x.visible, x.v)
        if out is not None:
            out[...] = result
    return (result, lse) if return_lse else result


def attention_backward(
    grad_out: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    *,
    attn_mask: ArrayLike | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: ArrayLike | None = None,
    query_offset: ArrayLike | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | ArrayLike | None = None,
    needs: Iterable[str] = ("query", "key", "value"),
    num_threads: int | None = None,
) -> Gradients:
    """Gradients in float64; see `adaattn.attention_backward` for the meaning of the arguments.

    Parameters
    ----------
    out, lse, num_threads
        Taken for the signature's sake; they have no influence: weights and sums are those of the inputs.

    Returns
    -------
    Gradients
        Of float64 arrays, None where not asked for.
    """
    grad_out, query, key, value = (np.asarray(x) for x in (grad_out, query, key, value))
    (B, H, T, D), (_, G, S, E) = query.shape, value.shape
    factor = 1 / np.sqrt(D) if scale is None else scale
    sink = np.broadcast_to(-np.inf if sinks is None else np.asarray(sinks, np.float64), H)
    needs = set(needs)
    dq, dk, dv = np.zeros((B, H, T, D)), np.zeros((B, G, S, D)), np.zeros((B, G, S, E))
    bias = np.zeros((B, H, T, S) if "attn_mask" in needs else (1, 1, 1, 1))
    sink_parts, slope_parts = np.zeros((B, H)), np.zeros((B, H))
    with np.errstate(all="ignore"):
        for x in _steps(
            query, key, value, attn_mask, causal, window, softcap, alibi_slopes, sinks, kv_lengths,
            query_offset, scale, dropout_p, seed,
        ):  # fmt: skip
            b, h, g, rows = x.b, x.h, x.h * G // H, x.rows
            go = grad_out[b, h, rows].astype(np.float64)
            dp = np.where(x.visible, go @ x.v.T, 0)
            if x.keep is not None:
                dp *= x.keep
            delta = (x.p * dp).sum(axis=1)
            ds = np.where(x.visible, x.p * (dp - delta[:, None]), 0)
            if sink[h] > -np.inf:
                sink_parts[b, h] -= np.exp(sink[h] - x.lse) @ delta
            slope_parts[b, h] -= (ds * np.abs(x.distance)).sum()
            if "attn_mask" in needs:
                bias[b, h, rows, x.keys] = ds
            if softcap is not None:
                ds = ds * (1 - np.square(x.capped / softcap))
            dq[b, h, rows] = factor * _add_up(ds, x.k, x.visible)
            dk[b, g, x.keys] += factor * _add_up(ds.T, x.q, x.visible.T)
            weights = x.p if x.keep is None else x.p * x.keep
            dv[b, g, x.keys] += _add_up(weights.T, go, x.visible.T)
    per_sequence = alibi_slopes is not None and np.ndim(alibi_slopes) == 2
    slopes = slope_parts if per_sequence else slope_parts.sum(axis=0)
    results = {
        "query": dq, "key": dk, "value": dv, "sinks": sink_parts.sum(axis=0), "alibi_slopes": slopes,
        "attn_mask": _shrink(bias, np.shape(np.asarray(attn_mask))) if "attn_mask" in needs else None,
    }  # fmt: skip
    return Gradients(*(results[name] if name in needs else None for name in Gradients._fields))


class _Step(NamedTuple):
    """Some rows of one head against the keys that any of them sees."""

    b: int
    h: int
    rows: _Array
    keys: slice
    q: _Array
    k: _Array
    v: _Array
    visible: _Array  # (rows, keys), like the following
    distance: _Array  # of each key after its query's position
    capped: _Array  # scores behind the softcap
    p: _Array
    keep: _Array | None  # what dropout multiplies p with
    lse: _Array


def _steps(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    attn_mask: ArrayLike | None,
    causal: bool | str,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    alibi_slopes: ArrayLike | None,
    sinks: ArrayLike | None,
    kv_lengths: ArrayLike | None,
    query_offset: ArrayLike | None,
    scale: float | None,
    dropout_p: float,
    seed: Any,
) -> Iterator[_Step]:
    query, key, value = np.asarray(query), np.asarray(key), np.asarray(value)
    (B, H, T, D), (_, G, S, _) = query.shape, value.shape
    scale = 1 / np.sqrt(D) if scale is None else scale
    if query_offset is None:
        query_offset = 0 if causal == "upper_left" else S - T
    offset = np.broadcast_to(np.asarray(query_offset, np.int64), B)
    lengths = np.broadcast_to(S if kv_lengths is None else kv_lengths, B)
    slopes = None if alibi_slopes is None else np.broadcast_to(alibi_slopes, (B, H)).astype(np.float64)
    sink = np.broadcast_to(-np.inf if sinks is None else np.asarray(sinks, np.float64), H)
    mask = None if attn_mask is None else np.broadcast_to(np.asarray(attn_mask), (B, H, T, S))
    seeds = sequence_seeds(seed, B) if dropout_p > 0 else None
    for b, h, start in np.ndindex(B, H, -(-T // ROWS)):
        rows = np.arange(start * ROWS, min((start + 1) * ROWS, T))
        distance = np.arange(S) - (rows + offset[b])[:, None]
        bias = None if mask is None else _widen(mask[b, h, rows])
        visible = visible_keys(distance, lengths[b], bool(causal), window, bias)
        keys = _span(visible)
        visible, bias = visible[:, keys], None if bias is None else bias[:, keys]
        columns, g, distance = np.arange(S)[keys], h * G // H, distance[:, keys]
        q, k, v = (x.astype(np.float64) for x in (query[b, h, rows], key[b, g, keys], value[b, g, keys]))

        penalty = None if slopes is None else slopes[b, h] * np.abs(distance)
        capped = scores(q, k, scale, softcap)
        p, lse = softmax(biased(capped, penalty, bias), visible, sink[h])
        keep = None
        if seeds is not None:
            keep = dropout_keep(seeds[b], h, rows, columns, dropout_p) / ((1 - dropout_p) or 1)
        yield _Step(b, h, rows, keys, q, k, v, visible, distance, capped, p, keep, lse)


def visible_keys(
    distance: _Array,
    length: int,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    mask: _Array | None,
) -> _Array:
    """Which keys each query may attend to, given how far they stand after it: (rows, S)."""
    visible: _Array = np.broadcast_to(np.arange(distance.shape[1]) < length, distance.shape).copy()
    left, right = window or (None, None)
    if causal:
        visible &= distance <= 0
    if left is not None:
        visible &= -distance <= left
    if right is not None:
        visible &= distance <= right
    if mask is not None:
        visible &= mask if mask.dtype == bool else mask != -np.inf
    return visible


def scores(q: _Array, k: _Array, scale: float, softcap: float | None) -> _Array:
    """Scores of q (rows, D) against k (S, D), in the order that the interface fixes: (rows, S)."""
    s: _Array = q @ k.T
    s *= scale
    return s if softcap is None else softcap * np.tanh(s / softcap)


def biased(s: _Array, penalty: _Array | None, mask: _Array | None) -> _Array:
    """What comes on top of the scores."""
    if penalty is not None:
        s = s - penalty
    if mask is not None and mask.dtype != bool:
        s = s + mask
    return s


def softmax(s: _Array, visible: _Array, sink: float) -> tuple[_Array, _Array]:
    """Probabilities (rows, S) of the visible keys beside a sink (-inf: none), and the denominator's log.

    Rows that see no key get zeros and the sink. +inf, NaN, or nothing but -inf among what a row sees makes it
    NaN; a finite sink beside nothing but -inf takes all the mass, as arithmetic has it.
    """
    s = np.where(visible, s, -np.inf)
    top = s.max(axis=1, initial=sink)
    p = np.exp(np.subtract(s, top[:, None], out=s))
    total = p.sum(axis=1) + np.exp(sink - top)
    p /= total[:, None]
    lse = top + np.log(total)
    empty = ~visible.any(axis=1)
    p[empty], lse[empty] = 0, sink
    return p, lse


def weigh(p: _Array, visible: _Array, v: _Array) -> _Array:
    """p @ v, where NaN and infinities in v reach their columns of the rows that see them and nothing else."""
    out = p @ np.where(np.isfinite(v), v, 0)
    if not np.isfinite(v).all():
        reach = visible.astype(np.float64)
        nan, up, down = (reach @ kind > 0 for kind in (np.isnan(v), v == np.inf, v == -np.inf))
        out += np.select([nan | (up & down), up, down], [np.nan, np.inf, -np.inf], 0.0)
    return out


def _add_up(w: _Array, x: _Array, visible: _Array) -> _Array:
    """w @ x, where pairs that do not see each other add nothing, not even NaN."""
    if np.isfinite(x).all() and np.isfinite(w).all():
        product: _Array = w @ x
        return product
    sums = np.zeros((len(w), x.shape[1]))
    for i, see in enumerate(visible):
        sums[i] = (w[i, see, None] * x[see]).sum(axis=0)
    return sums


def _shrink(x: _Array, shape: tuple[int, ...]) -> _Array:
    """Sums over what an array of this shape was broadcast along."""
    wide = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(i for i, size in enumerate(wide) if size != x.shape[i])
    sums: _Array = x.sum(axis=axes, keepdims=True)
    return sums.reshape(shape)


def sequence_seeds(seed: Any, B: int) -> _Array:
    """One 64-bit seed per sequence: given ones modulo 2^64, or a scalar mixed with the batch index."""
    if np.ndim(seed) > 0:
        return np.array([int(x) % 2**64 for x in seed], np.uint64)
    seeds: _Array = mix64(np.uint64(int(seed) % 2**64) ^ mix64(np.arange(B, dtype=np.uint64)))
    return seeds


def dropout_keep(seed: np.uint64, head: int, rows: _Array, keys: _Array, dropout_p: float) -> _Array:
    """Which probabilities dropout keeps, for absolute query and key indices: (rows, keys).

    Counter-based: a row's 64 bits (splitmix64) key two rounds of murmur3's 32-bit finaliser over the key
    index, so any tile can be replayed on its own.
    """
    row = mix64(mix64(seed + np.uint64(head)) + rows.astype(np.uint64))[:, None]
    low, high = row.astype(np.uint32), (row >> np.uint64(32)).astype(np.uint32)
    bits = _fmix32(_fmix32(keys.astype(np.uint32) * np.uint32(0x9E3779B1) + low) ^ high)
    keep: _Array = bits >= np.uint64(dropout_p * 2**32)
    return keep


def mix64(x: Any) -> Any:
    """splitmix64, modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _fmix32(x: Any) -> Any:
    """murmur3's finaliser, modulo 2^32."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _widen(mask: _Array) -> _Array:
    """A bool or float64 mask; float16's lowest value becomes float32's: -65504 would not swallow a score."""
    if mask.dtype == bool:
        return mask
    wide = mask.astype(np.float64)
    if mask.dtype == np.float16:
        wide[wide == np.finfo(np.float16).min] = np.finfo(np.float32).min
    return wide


def _span(visible: _Array) -> slice:
    """From the first to the last key that any of the rows sees: those outside need no work."""
    columns = np.flatnonzero(visible.any(axis=0))
    return slice(columns[0], columns[-1] + 1) if columns.size else slice(0)
