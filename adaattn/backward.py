"""The gradient of attention: signature, defaults and documentation. The work is done by the engine in C."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from . import _adaattn
from .api import _allocate, _as_kind_of, check_verify
from .rates import table as rate_table
from .stats import GradientReport, tolerance_of

#: The rungs of a gradient below the exact one: scores and gradients of weights, sums over queries and keys.
NARROW = ("int16", "bf16")


def budget_of(
    tolerance: Any, min_precision: Any = "auto", verify: Any = "auto", exact: str = "auto"
) -> dict[str, Any]:
    """Options of `attention_backward` for those of `attention`: where nothing cheaper is allowed, exact ones,
    which are of this precision."""
    rungs = _adaattn.RUNGS
    allowed = min_precision == "auto" or rungs.index(min_precision) >= max(map(rungs.index, NARROW))
    return {"tolerance": tolerance, "verify": verify} if allowed else {"precision": exact}


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
        On the CPU or, all of a call, on one CUDA GPU.
    out, lse : arrays of shapes (B, H, T, E) and (B, H, T)
        What ``attention(query, key, value, ..., return_lse=True)`` returned for the same arguments, exact or
        within a tolerance: query's dtype, and float32 (float64 for float64 arrays). Their errors pass into
        the gradients; with a tolerance they count in it.
    attn_mask, causal, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset, scale, dropout_p, seed
        As in the call of `attention`. Dropout is replayed from the seed.
    needs : names among "query", "key", "value", "attn_mask", "sinks", "alibi_slopes"
        The gradients to compute. "attn_mask" needs a floating mask, "sinks" and "alibi_slopes" need theirs.
    tolerance : float, optional
        Relative error that may be made: for every head ``norm(gradient - exact) <= tolerance * norm(exact)``
        (Frobenius) for the gradients of its query, key and value, those of exact attention. Default: exact
        for the dtype.
    policy : "quality", "balanced" or "speed", optional
        Names for tolerances 1e-5, 1e-2 and 5e-2.
    precision : str or pair of str
        "auto" chooses for every key head; "fp32" and "fp64", or ("int16", "bf16") for scores and gradients of
        weights, and for sums over queries and keys, are computed by name; verified with a tolerance, and
        never replaced by another.
    verify : bool or "auto"
        Whether rows of each gradient are compared with exact ones; False leaves a promise to its prediction.
    return_report : bool
        Also return a `GradientReport`.
    num_threads : int, optional
        At most this many threads; the result is the same, bit for bit, for any number.

    Returns
    -------
    Gradients
        A named tuple of arrays of query's kind: ``query``, ``key``, ``value`` of their arrays' shapes and
        dtype; ``attn_mask``, ``sinks``, ``alibi_slopes`` of the arguments' shapes (summed over what they were
        broadcast along) and lse's dtype. None where not asked for. With a report, the pair of both.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        Naming the argument, what was expected and what came.
    DeviceError
        Arrays on several devices, or on a GPU that cannot be used.
    NumericalError
        A precision by name misses the tolerance beyond doubt.
    MemoryError
        No memory for the gradients or the scratch space.
    KeyboardInterrupt
        Ctrl-C during a call ends it within a fraction of a second.

    Notes
    -----
    Without a tolerance products are in float32 (float64 for float64 arrays), whatever the forward pass was,
    and gradients of half arrays are rounded once. Where float32 overflows, float64 is used. What is hidden
    has no influence, NaN included: gradients of rows that see no key, and of keys that no row sees, are zero.
    A NaN or an infinity that takes part reaches the gradients as in plain arithmetic.

    Within a tolerance of about 8e-3 and more, key heads take scores and gradients of weights from 16-bit
    integers and sums over queries and keys from bf16, on processors where both are faster than float32; their
    usual errors are 2.5e-3, and up to 6e-3 for queries. Keys and values lose their means before they are
    rounded, as neither weights nor gradients of scores change by that. From 64 queries on, rows of the
    queries' gradient, drawn with known probabilities, are compared with ones that are computed from the
    inputs alone, and keys and values likewise with the given lse and output, whose own errors, known from the
    rows, come on top. Where an upper limit (built for misses with a probability of 1e-3) lies above the
    tolerance, the key head is computed again in float32, from an lse and an output of its own, and then in
    float64. Gradients of masks and sinks are computed exactly, from the lse and output that are given; a
    gradient of slopes keeps the whole call exact. The gradient is dense, whatever the forward pass left out.

    On a GPU half arrays are multiplied in their own format, others as without a tolerance on the CPU; the
    call returns before the work is done, unless it is verified or there is a report, and does not look for
    NaN in a mask. Within a tolerance half arrays keep to their format where its usual error (bf16: 4e-3,
    fp16: 5e-4) leaves room, and the rest is as above, but for 16-bit integers, which are refused. Not run on
    a GPU yet.

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
