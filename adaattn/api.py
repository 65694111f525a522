"""The public functions: signatures, defaults and documentation. The work is done by the engine in C."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _adaattn
from .errors import ArgumentError
from .rates import rates
from .rates import table as rate_table
from .stats import Plan, Report, sizes_of, tolerance_of


def attention(
    query: Any,
    key: Any,
    value: Any,
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
    tolerance: float | None = None,
    policy: str | None = None,
    precision: str | tuple[str, str] = "auto",
    min_precision: str = "auto",
    max_precision: str = "auto",
    plan: Plan | None = None,
    verify: bool | str = "auto",
    return_lse: bool = False,
    return_report: bool = False,
    out: Any = None,
    num_threads: int | None = None,
) -> Any:
    """Scaled dot-product attention, softmax(scale * query @ key.T) @ value, exact or within an error budget.

    One score passes through, in this order: ``scale * q·k``, softcap, ALiBi, float mask; then boolean mask,
    causal limit, window and lengths hide keys; then the softmax over the visible keys and the sink. Memory
    beyond inputs and output does not grow with T * S.

    Parameters
    ----------
    query : array of shape (B, H, T, D)
        float32, float16, bfloat16 (``ml_dtypes``) or float64: a NumPy array or anything on the CPU that
        speaks DLPack, such as a torch tensor. Any strides; read in place.
    key, value : arrays of shape (B, G, S, D) and (B, G, S, E), query's dtype
        H is a multiple of G (grouped-query and multi-query attention).
    attn_mask : array that broadcasts to (B, H, T, S), optional
        bool (True: may attend) or floating (added to the scores; -inf hides).
    causal : bool, "lower_right" or "upper_left"
        Query i stands at position ``query_offset + i`` and sees no key after it. True is "lower_right".
    window : (left, right), optional
        Query i sees keys from position - left to position + right; None leaves a side unbounded.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``.
    alibi_slopes : (H,) or (B, H), optional
        Adds ``-slope * |position - j|`` to the score of key j (Press et al., arXiv 2108.12409).
    sinks : (H,), optional
        A further logit per head that takes mass and gives no value.
    kv_lengths : (B,) ints, optional
        Keys from this index on are hidden.
    query_offset : int or (B,) ints, optional
        Position of the first query; default S - T, or 0 for "upper_left".
    scale : float, optional
        Default 1 / sqrt(D).
    dropout_p : float
        Probability with which a normalised weight is zeroed; kept ones are divided by 1 - dropout_p.
    seed : int or (B,) ints
        Needed where dropout_p > 0: the mask is a function of seed, head, query and key alone.
    precision : "auto", the name of a rung, or a pair of rungs (scores, values)
        What the two products are computed from; see the table in the notes. "auto" is "fp64" for float64
        arrays, else "fp32".
    return_lse : bool
        Also return the logarithm of each row's sum of exponentials.
    return_report : bool
        Also return what each head was computed with.
    out : array of shape (B, H, T, E), optional
        Written and returned; it must not overlap an input. Its contents are undefined if the call is
        interrupted.
    num_threads : int, optional
        At most this many threads; the result is the same, bit for bit, for any number.

    Returns
    -------
    out : array of shape (B, H, T, E), query's dtype and kind of array
    lse : array of shape (B, H, T), float32 (float64 for float64 inputs)
        Natural logarithm; only with ``return_lse``. -inf (or the sink) where a row sees no key; its output is
        0.
    report : Report
        Only with ``return_report``; comes last.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, DeviceError
        Naming the argument, what was expected and what came.
    MemoryError
        No memory for the output or the scratch space.
    KeyboardInterrupt
        Ctrl-C during a call ends it within a fraction of a second.

    Notes
    -----
    Tiles with an online softmax (Milakov & Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).
    NaN and infinities pass as in plain arithmetic, but never out of what is hidden.

    The rungs of `precision`, dear to cheap, and the output's error relative to float64 for normal entries
    (D = 64, Frobenius norms). Scores that spread more cost more: errors grow with their standard deviation.

    ==================  ==================================================================  =======
    rung                products of                                                         error
    ==================  ==================================================================  =======
    "fp64"              doubles; for both products or none                                  1e-15
    "fp32"              floats                                                              3e-7
    "bf16x6", "bf16x3"  bfloat16 pieces that add up to 24 or 16 bits of a float             4e-7, 5e-6
    "int16"             integers of 13 to 16 bits; a scale per 64 keys, query or channel    1.5e-4
    "fp16"              inputs rounded to float16                                           4e-4
    "bf16"              inputs and weights rounded to bfloat16                              3.5e-3
    "int8"              8-bit integers, scaled likewise; with "bf16" values: 1.1e-2         1.4e-2
    ==================  ==================================================================  =======

    Sums are in fp32, or exact integers that become fp32 every 256 keys. Keys lose their mean before they are
    rounded to integers or bfloat16, so a bias of all keys costs nothing. Every rung gives these errors on
    every machine: where its unit is missing, rounded numbers are multiplied in fp32. A head that its rung
    cannot hold (NaN, infinities, numbers beyond the format) is computed in fp32, and rows that overflow fp32
    in fp64; other heads keep their bits.

    Examples
    --------
    >>> import numpy as np, adaattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 128, 64), dtype=np.float32)
    >>> adaattn.attention(q, k, v, causal=True).shape
    (1, 8, 128, 64)
    """
    choices = None
    if plan is not None:
        _refuse_beside_plan(tolerance, policy, precision, min_precision, max_precision)
        choices = plan.choices_for(query, key, value)
        tolerance = plan.tolerance
    else:
        tolerance = tolerance_of(tolerance, policy)
    if not isinstance(verify, bool) and verify != "auto":
        raise ArgumentError(f"verify: expected True, False or 'auto', got {verify!r}")
    rates = None if tolerance is None else rate_table()
    result = _adaattn.attention(
        query, key, value, attn_mask, causal, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset,
        scale, dropout_p, seed, precision, tolerance, min_precision, max_precision, verify, rates, choices, False,
        return_lse, return_report, out, num_threads, _allocate,
    )  # fmt: skip
    if return_report:
        *arrays, (heads, seconds, operations) = result
        kept = arrays if isinstance(query, np.ndarray) else _as_kind_of(query, tuple(arrays), out)
        made = plan or (None if tolerance is None else Plan.of(heads, sizes_of(query, key, value), tolerance))
        return (*kept, Report.of(heads, seconds, operations, made))
    return result if isinstance(query, np.ndarray) else _as_kind_of(query, result, out)


def plan(
    query: Any,
    key: Any,
    value: Any,
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
    tolerance: float | None = None,
    policy: str | None = None,
    min_precision: str = "auto",
    max_precision: str = "auto",
    return_lse: bool = False,
    num_threads: int | None = None,
) -> Plan:
    """What `attention` would choose for these arguments: looks at the arrays and computes no attention.

    Parameters
    ----------
    query, key, value, attn_mask, ... : as in `attention`
    tolerance, policy : one of them is needed
    return_lse : bool
        Whether the lse will be asked for: its error counts then too.

    Returns
    -------
    Plan
        For `attention(..., plan=...)` and for reading: `Plan.explain`.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, DeviceError
        Naming the argument, what was expected and what came.
    """
    tolerance = tolerance_of(tolerance, policy)
    if tolerance is None:
        raise ArgumentError("tolerance: expected a number, or a policy, got None")
    heads, _, _ = _adaattn.attention(
        query, key, value, attn_mask, causal, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset,
        scale, dropout_p, seed, "auto", tolerance, min_precision, max_precision, False, rate_table(), None, True,
        return_lse, False, None, num_threads, _allocate,
    )  # fmt: skip
    return Plan.of(heads, sizes_of(query, key, value), tolerance)


def _refuse_beside_plan(tolerance: Any, policy: Any, *precisions: Any) -> None:
    """A plan carries its tolerance and choices."""
    given = {"tolerance": tolerance, "policy": policy}
    given |= {name: None if p == "auto" else p for name, p in zip(("precision", "min_precision", "max_precision"), precisions, strict=True)}
    for name, argument in given.items():
        if argument is not None:
            raise ArgumentError(f"{name}: expected nothing beside a plan, which carries it, got {argument!r}")


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> Any:
    """Attention over the union of two disjoint sets of keys, from the results over each.

    Parameters
    ----------
    out_a, out_b : arrays of shape (B, H, T, E)
        Outputs of `attention` for the same queries, of one dtype.
    lse_a, lse_b : arrays of shape (B, H, T)
        Their ``lse``: float32, or float64 for float64 outputs. At most one side may carry the sink.

    Returns
    -------
    out, lse : arrays of the same shapes and dtypes

    Raises
    ------
    ShapeError, DTypeError
        Naming the argument, what was expected and what came.
    """
    result = _adaattn.merge(out_a, lse_a, out_b, lse_b, _allocate)
    return result if isinstance(out_a, np.ndarray) else _as_kind_of(out_a, result)


def cpu_info() -> dict[str, Any]:
    """The processor's instruction sets, the kernel chosen for each slot, threads and build.

    Returns
    -------
    dict
        ``version``, ``cpu``, ``isa_detected``, ``isa_denied`` (what the CPU has and the operating system
        does not grant) and ``isa_used`` (names of instruction-set bundles; the environment variable
        ADAATTN_ISA narrows the latter), ``kernels`` (slot to instruction set), ``num_threads``,
        ``cpu_count``, ``rates`` (``source``: "measured" by `calibrate`, or "default"; ``gflops``: rung to
        head size to 1e9 floating-point operations per second of one core; ``offered``: the rungs that are
        faster than every more exact one) and ``build`` (``compiler``, ``isa``, ``emulated``: sets that a
        build for tests replaces by other instructions, ``left_out``: what the compiler could not build and
        why).
    """
    return {**_adaattn.cpu_info(), "rates": rates()}


def get_num_threads() -> int:
    """Threads that a call uses unless it says otherwise.

    By default ADAATTN_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs that the affinity mask and the
    cgroup's quota allow.
    """
    return _adaattn.get_num_threads()


def set_num_threads(n: int | None) -> None:
    """Set the number of threads that a call uses unless it says otherwise; None returns to the default.

    Raises
    ------
    ArgumentError
        n is below 1.
    """
    _adaattn.set_num_threads(n)


def _allocate(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """An uninitialised array of like's kind: torch makes its own, others get NumPy's and convert it in the
    end."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if dtype == "bfloat16":
        import ml_dtypes

        return np.empty(shape, ml_dtypes.bfloat16)
    return np.empty(shape, dtype)


def _as_kind_of(like: Any, result: Any, out: Any = None) -> Any:
    """NumPy results (but for the caller's out) as arrays of like's library, if that follows the array API
    standard."""
    if isinstance(result, tuple):
        return tuple(_as_kind_of(like, array, out) for array in result)
    if result is out or not isinstance(result, np.ndarray) or not hasattr(like, "__array_namespace__"):
        return result
    return like.__array_namespace__().asarray(result)
