"""The gradient of attention: signature, defaults and documentation. The work is done by the engine in C."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from . import _adaattn
from .api import _allocate, _as_kind_of, check_verify
from .rates import table as rate_table
from .stats import GradientReport, tolerance_of


class Gradients(NamedTuple):
    """What `attention_backward` returns; None where a gradient was not asked for."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any
    sinks: Any
    alibi_slopes: Any


def attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    *,
    attn_mask: Any = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    query_offset: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
    needs: Iterable[str] = ("query", "key", "value"),
    tolerance: float | None = None,
    policy: str | None = None,
    precision: str | tuple[str, str] = "auto",
    verify: bool | str = "auto",
    return_report: bool = False,
    num_threads: int | None = None,
) -> Any:
    """Gradients of a loss with respect to the inputs of `attention`, from that with respect to its output.

    Weights are computed again from queries, keys and lse, tile by tile: memory beyond inputs and gradients
    grows with T + S, not with T * S.

    Parameters
    ----------
    grad_out : array of shape (B, H, T, E), query's dtype
        Gradient of the loss with respect to ``out``. Any strides; read in place, like all arrays here.
    query, key, value : arrays as in `attention`
        On the CPU.
    out, lse : arrays of shapes (B, H, T, E) and (B, H, T)
        What ``attention(query, key, value, ..., return_lse=True)`` returned for the same arguments, exact or
        within a tolerance: query's dtype, and float32 (float64 for float64 arrays). Their errors pass into
        the gradients.
    attn_mask, causal, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset, scale, dropout_p, seed
        As in the call of `attention`. Dropout is replayed from the seed.
    needs : names among "query", "key", "value", "attn_mask", "sinks", "alibi_slopes"
        The gradients to compute. "attn_mask" needs a floating mask, "sinks" and "alibi_slopes" need theirs.
    num_threads : int, optional
        At most this many threads; the result is the same, bit for bit, for any number.

    Returns
    -------
    Gradients
        A named tuple of arrays of query's kind: ``query``, ``key``, ``value`` of their arrays' shapes and
        dtype; ``attn_mask``, ``sinks``, ``alibi_slopes`` of the arguments' shapes (summed over what they were
        broadcast along) and lse's dtype. None where not asked for.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        Naming the argument, what was expected and what came.
    DeviceError
        Arrays on a GPU.
    MemoryError
        No memory for the gradients or the scratch space.
    KeyboardInterrupt
        Ctrl-C during a call ends it within a fraction of a second.

    Notes
    -----
    The gradient is always that of exact attention, in the precision of the dtype, whatever tolerance the
    forward pass had: products in float32 (float64 for float64 arrays), gradients of half arrays rounded once.
    Where float32 overflows, float64 is used. What is hidden has no influence, NaN included: gradients of rows
    that see no key, and of keys that no row sees, are zero. A NaN or an infinity that takes part reaches the
    gradients as in plain arithmetic.

    Five products of a tile of 64 queries and 64 keys (FlashAttention-2, arXiv 2307.08691); tiles that share a
    sum are computed one after the other in an order that the sizes of one head fix.

    Examples
    --------
    >>> import numpy as np, adaattn
    >>> q, k, v, g = np.random.default_rng(0).standard_normal((4, 1, 8, 512, 64), dtype=np.float32)
    >>> out, lse = adaattn.attention(q, k, v, causal=True, return_lse=True)
    >>> grads = adaattn.attention_backward(g, q, k, v, out, lse, causal=True)
    >>> grads.query.shape
    (1, 8, 512, 64)
    """
    tolerance = tolerance_of(tolerance, policy)
    result = _adaattn.attention_backward(
        grad_out, query, key, value, out, lse, attn_mask, causal, window, softcap, alibi_slopes, sinks,
        kv_lengths, query_offset, scale, dropout_p, seed, needs, precision, tolerance, check_verify(verify),
        None if tolerance is None else rate_table(), return_report, num_threads, _allocate,
    )  # fmt: skip
    arrays, report = result if return_report else (result, None)
    if not isinstance(query, np.ndarray):
        arrays = (None if x is None else _as_kind_of(query, x) for x in arrays)
    gradients = Gradients(*arrays)
    return (gradients, GradientReport.of(tolerance, *report)) if report else gradients
