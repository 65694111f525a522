"""The ONNX operator Attention (opsets 23 to 25) as a function of NumPy arrays.

What its text leaves open is as in ONNX's reference implementation. ONNX itself is not needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import api
from ..errors import ArgumentError, ShapeError

_FLOAT, _FLOAT16, _DOUBLE, _BFLOAT16 = 1, 10, 11, 16  # TensorProto.DataType


class Outputs(NamedTuple):
    """Outputs of the operator but for ``qk_matmul_output``, which would be of size T * S."""

    Y: NDArray[Any]
    present_key: NDArray[Any]
    present_value: NDArray[Any]


def attention(
    Q: NDArray[Any],
    K: NDArray[Any],
    V: NDArray[Any],
    attn_mask: NDArray[Any] | None = None,
    past_key: NDArray[Any] | None = None,
    past_value: NDArray[Any] | None = None,
    nonpad_kv_seqlen: NDArray[Any] | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int | None = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    tolerance: float | None = None,
    policy: str | None = None,
    num_threads: int | None = None,
) -> Outputs:
    """Attention as ONNX defines it, exact or within an error budget.

    Parameters
    ----------
    Q, K, V : arrays of shape (B, H, T, D), (B, G, S, D) and (B, G, S, E)
        Or (B, T, H D), (B, S, G D) and (B, S, G E), with `q_num_heads` and `kv_num_heads`.
    attn_mask : array that broadcasts to (B, H, T, P + S), optional
        bool (True: takes part) or floating (added). Keys beyond its last dimension are hidden.
    past_key, past_value : arrays of shape (B, G, P, D) and (B, G, P, E), optional
        What comes before K and V.
    nonpad_kv_seqlen : (B,) ints, optional
        How many keys of each sequence are there, if `K` and `V` are whole caches.
    is_causal : int
        1: query i sees keys up to i + offset, which is P, ``nonpad_kv_seqlen - T``, or 0 without either.
    left_window_size, right_window_size : int
        How far a query sees from i + offset to the left and to the right; -1: without a limit (opset 25).
    scale : float, optional
        Default 1 / sqrt(D).
    softcap : float
        0: none.
    softmax_precision : int, optional
        A TensorProto.DataType: FLOAT, FLOAT16, BFLOAT16 or DOUBLE. The softmax is never less exact than fp32;
        DOUBLE computes all of the attention in fp64, unless a tolerance says what is enough.
    qk_matmul_output_mode : int, optional
        0 or None: that output is not computed.
    tolerance, policy, num_threads
        As in `adaattn.attention`.

    Returns
    -------
    Y : array of shape (B, H, T, E), or (B, T, H E)
    present_key, present_value : arrays of shape (B, G, P + S, D) and (B, G, P + S, E)

    Raises
    ------
    adaattn.Error
        As in `adaattn.attention`.
    """
    if qk_matmul_output_mode not in (0, None):
        raise ArgumentError(
            "qk_matmul_output_mode: expected 0 or None, since that output is never stored, got "
            f"{qk_matmul_output_mode!r}"
        )
    if (past_key is None) != (past_value is None):
        raise ArgumentError("past_key, past_value: expected both or none, got one of them")
    if past_key is not None and nonpad_kv_seqlen is not None:
        raise ArgumentError("nonpad_kv_seqlen: expected None beside past_key and past_value, got an array")
    if softmax_precision not in (None, _FLOAT, _FLOAT16, _DOUBLE, _BFLOAT16):
        raise ArgumentError(
            f"softmax_precision: expected {_FLOAT}, {_FLOAT16}, {_DOUBLE} or {_BFLOAT16}, "
            f"got {softmax_precision!r}"
        )
    query = _heads("Q", Q, "q_num_heads", q_num_heads)
    key = present_key = _joined(past_key, _heads("K", K, "kv_num_heads", kv_num_heads), "past_key")
    value = present_value = _joined(past_value, _heads("V", V, "kv_num_heads", kv_num_heads), "past_value")
    B, H, T, _ = query.shape
    if attn_mask is not None and attn_mask.ndim and attn_mask.shape[-1] < key.shape[2]:
        key, value = (x[:, :, : attn_mask.shape[-1]] for x in (key, value))
    offset: Any = 0 if past_key is None else past_key.shape[2]
    lengths = nonpad_kv_seqlen
    if nonpad_kv_seqlen is not None:
        offset = np.asarray(nonpad_kv_seqlen, np.int64) - T
        lengths = np.minimum(nonpad_kv_seqlen, key.shape[2])
    window = [None if size == -1 else size for size in (left_window_size, right_window_size)]
    exact = softmax_precision == _DOUBLE and tolerance is None and policy is None
    out = np.empty((B, T, H, value.shape[3]), query.dtype)
    api.attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        causal=bool(is_causal),
        window=None if window == [None, None] else (window[0], window[1]),
        softcap=softcap or None,
        kv_lengths=lengths,
        query_offset=offset,
        scale=scale,
        tolerance=tolerance,
        policy=policy,
        precision="fp64" if exact else "auto",
        num_threads=num_threads,
        out=out.transpose(0, 2, 1, 3),
    )
    Y: NDArray[Any] = out.reshape(B, T, -1) if Q.ndim == 3 else out.transpose(0, 2, 1, 3)
    return Outputs(Y, present_key, present_value)


def _heads(name: str, x: NDArray[Any], attribute: str, count: int | None) -> NDArray[Any]:
    """x as (B, heads, length, size), a view."""
    if x.ndim == 4:
        if count not in (None, x.shape[1]):
            raise ShapeError(f"{name}: expected {attribute}={count} heads, got shape {x.shape}")
        return x
    if x.ndim != 3:
        raise ShapeError(f"{name}: expected three or four dimensions, got shape {x.shape}")
    if count is None:
        raise ArgumentError(f"{attribute}: expected a number of heads beside three dimensions, got None")
    if count < 1 or x.shape[2] % count:
        raise ShapeError(
            f"{name}: expected a last size that {attribute}={count} divides, got shape {x.shape}"
        )
    heads: NDArray[Any] = x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)
    return heads


def _joined(past: NDArray[Any] | None, x: NDArray[Any], name: str) -> NDArray[Any]:
    """Past and new keys or values, one after the other."""
    if past is None:
        return x
    if (
        past.ndim != 4
        or past.shape[:2] != x.shape[:2]
        or past.shape[3] != x.shape[3]
        or past.dtype != x.dtype
    ):
        raise ShapeError(
            f"{name}: expected shape ({x.shape[0]}, {x.shape[1]}, P, {x.shape[3]}) and dtype {x.dtype}, "
            f"got {past.shape} and {past.dtype}"
        )
    return np.concatenate((past, x), axis=2)
