"""The public functions: signatures, defaults and documentation. The work is done by the engine in C."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import _adaattn
from .errors import ArgumentError, DTypeError
from .gpu import DeviceArray, capability_for, device_of
from .rates import gpu_table, rates
from .rates import table as rate_table
from .stats import Plan, Report, tolerance_of


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
    structure: str = "auto",
    min_rank: int | None = None,
    max_rank: int | None = None,
    plan: Plan | None = None,
    verify: bool | str = "auto",
    return_lse: bool = False,
    return_report: bool = False,
    out: Any = None,
    num_threads: int | None = None,
    device: str | None = None,
) -> Any:
    """Scaled dot-product attention, softmax(scale * query @ key.T) @ value, exact or within an error budget.

    One score passes through, in this order: ``scale * q·k``, softcap, ALiBi, float mask; then boolean mask,
    causal limit, window and lengths hide keys; then the softmax over the visible keys and the sink. Memory
    beyond inputs and output does not grow with T * S.

    Parameters
    ----------
    query : array of shape (B, H, T, D)
        float32, float16, bfloat16 (``ml_dtypes``) or float64: a NumPy array or anything that speaks DLPack,
        such as a torch tensor, on the CPU or on a CUDA GPU. Any strides; read in place.
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
        Probability with which a normalised weight is zeroed; kept ones are divided by 1 - dropout_p. At 1 all
        are, and the output is zero.
    seed : int or (B,) ints
        Needed where dropout_p > 0: the mask is a function of seed, head, query and key alone.
    tolerance : float, optional
        What each head's output may be off by, relative to its size: ``norm(out - exact) <= tolerance *
        norm(exact)`` for every (batch, head), Frobenius norms over (T, E), where *exact* is float64 attention
        on the given inputs. The cheapest rung that keeps it is chosen for each head by itself; see the notes
        for what the promise is worth. None: the most exact rung for the dtype.
    policy : "quality", "balanced" or "speed", optional
        A name for a tolerance: 1e-5, 1e-2 and 5e-2.
    precision : "auto", the name of a rung, or a pair of rungs (scores, values)
        What the two products are computed from; see the table in the notes. "auto" is what keeps the
        tolerance and without one "fp64" for float64 arrays, else "fp32". A rung by name wins over the
        planner: it is verified if there is a tolerance, and never replaced by another one for missing it.
    min_precision : "auto" or the name of a rung
        The least exact rung that a tolerance may choose, for scores and for values.
    max_precision : "auto" or the name of a rung
        The most exact rung that it may choose. A head that none of the allowed rungs keeps within the
        tolerance is computed on the most exact of them, and the report shows by how much it misses.
    structure : "auto", "dense", "sparse" or "low_rank"
        Whether a tolerance may leave something out of long heads (from 2,048 queries and keys on) where that
        is faster. Sparse heads: blocks of 64 keys count as one key of their mean value for queries to which
        it makes little difference. Heads of low rank: few landmarks stand for all keys. "dense" leaves
        nothing out. "sparse" and "low_rank" by name win over the planner, at any length: they are verified,
        and replaced (``retried``) only where the head's numbers do not allow them, or where there are fewer
        than 64 queries or keys for "sparse". On a GPU what sparse heads leave out is not computed at all. See
        the notes.
    min_rank, max_rank : int, optional
        Least and most landmarks of a head of low rank; the least rank that keeps the tolerance is taken. By
        default from 1 to 512, as many as keys at most.
    plan : Plan, optional
        Made by `plan` or taken from a report: its tolerance and choices instead of new ones, for arrays of
        the same sizes and dtype; other arguments of this group than `verify` must be left alone. The choices
        are verified and replaced like new ones.
    verify : "auto" or bool
        Whether rows of each head are compared with exact ones, where there is a tolerance, and a head that
        may miss it is computed again on a more exact rung. "auto" and True do so, "auto" not for small heads
        and, on the CPU, fewer than 64 queries (see the notes); False trusts the predictions.
    return_lse : bool
        Also return the logarithm of each row's sum of exponentials. Within a tolerance its entries are off by
        at most the larger of the tolerance (absolute) and the rounding of fp32, which is checked for the rows
        that verify the head; heads may need a more exact rung for that.
    return_report : bool
        Also return what each head was computed with, and the errors that were predicted and measured.
    out : array of shape (B, H, T, E), optional
        Written and returned; it must not overlap an input. Its contents are undefined if the call is
        interrupted.
    num_threads : int, optional
        At most this many threads; the result is the same, bit for bit, for any number.
    device : "cuda" or "cuda:N", optional
        Computes NumPy arrays on that GPU: they are copied there and back. Other arrays are computed where
        they lie.

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
    ShapeError
        Sizes that do not fit each other.
    DTypeError
        An argument of the wrong type, or arrays of a dtype that is not taken.
    ArgumentError
        A value that makes no sense, or arguments that exclude each other: a policy beside a tolerance, a plan
        for other sizes or beside what it carries, `min_precision` or `max_precision` without a tolerance, a
        structure by name beside an option that does not go with it, or sparse heads on a CPU without AVX2.
    DeviceError
        Arrays that do not all lie on the CPU or on one GPU, or a GPU that cannot be used (`gpu_info` says
        why). All four name the argument, what was expected and what came. Also what the CUDA runtime
        reports: the call, its code and text.
    NumericalError
        A precision or a structure by name misses the tolerance beyond doubt: the lower limit of a head's
        measured error lies above it. The error names the head; `out` is then undefined.
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
    "fp8"               8-bit floats (e4m3), on GPUs only; with scores in "int8": 3.8e-2    5.3e-2
    ==================  ==================================================================  =======

    Sums are in fp32, or exact integers that become fp32 every 256 keys. Keys lose their mean before they are
    rounded for "int16", "bf16" and "int8", where a bias of all keys costs nothing; "fp16", "bf16x3" and
    "fp32" do feel a mean that is large beside the keys' spread. Every rung gives these errors on every
    machine: where its unit is missing, rounded numbers are multiplied in fp32. A head that its rung cannot
    hold (NaN, infinities, numbers beyond the format) is computed in fp32, and rows that overflow fp32 in
    fp64; other heads keep their bits.

    From 2,048 queries and keys on a head may be sparse. Its scores are computed on its rung; then, for
    every 64 queries, those blocks of 64 keys stand in for their values that change these rows least: a block
    counts as its mean value, with the weight that its keys have together. How far that moves a row follows
    from its own weights and from how far the block's values lie apart, times what profiled rows say of such
    estimates, so a row that looks at one key which nobody else sees keeps that key's block. Only blocks of
    which centre and radius show that no key can have any weight (together a fiftieth of what a row may be off
    by) are passed over without scores. Rows to verify are drawn by their estimates too. Blocks where
    something is hidden are never left out, and with softcap, ALiBi, dropout, a float mask or a precision by
    name nothing is. The lse is that of all keys.

    Such a long head may instead be of low rank, where its scores are those of few dimensions and spread
    little. The exponential kernel of queries and centred keys is projected onto landmarks, keys that randomly
    pivoted Cholesky draws from a sample of 1,024 (arXiv 2207.06503, 2410.03969), with a fixed seed; sums over
    keys then take O(R) for a query, in fp32. Under a causal limit these sums are kept at every 256 keys, and
    a query goes on from the last of them key by key. The least rank is taken at which sampled queries and
    keys are within the budget and that is faster. What the projection loses is computed for every row, as the
    residual of the query's own kernel; a row with much of it, one that looks where no landmark lies, is
    computed exactly, and so is the head where these are many. Residuals bound what each weight is off by, but
    by far more than it is: how they scale to errors comes from the sample, so ``error_bound`` stays NaN. Rows
    to verify are drawn by these estimates too. Landmarks do not go with softcap, ALiBi, masks, dropout, a
    window on the left or float64 arrays (`Plan.ruled_out`).

    What a tolerance promises is statistical. Errors are predicted from statistics of the head and a few exact
    rows. Then, from 64 query rows on, other rows, drawn with known probabilities, are compared with exact
    ones (float64, or fp32 where that is fine enough), and a head whose upper limit of the error lies above
    the tolerance is computed again, in fp32 and then in fp64. The limit is built for misses with a
    probability of 1e-3 per head; where a few rows carry most of a head's error it holds less often. With
    fewer than 64 query rows checking would cost as much as computing: the error is predicted, not
    verified (``verified_rows`` is 0) unless `verify=True` asks for it, and may reach a third of the
    tolerance. So it is for heads of at most 65,536 scores (256 queries on 256 keys) that are computed in
    fp32, where rows of them and the size of all their numbers predict at most a third of the tolerance,
    but not with masks, ALiBi or dropout: one exact row would take more than 2 % of their time;
    `verify=True` takes it. Such heads on cheaper rungs are compared with few rows, at once.
    Up to 8 queries, and those on a `KVCache`, wait for memory, not for arithmetic
    (a long cache may be read in part, which its notes tell of): else they
    are computed in fp32, or in fp64 where statistics of some keys and the output's size say that fp32 would
    not do. A head with NaN or infinities cannot be verified. For float16 and bfloat16 arrays the rounding of
    the output itself comes on top. What a head is computed with depends on that head, its options and the
    machine's rates (`cpu_info`, `calibrate`) alone, never on threads or other heads.

    On a GPU all arrays lie on query's device; vectors (slopes, sinks, lengths, offsets, seeds) may lie
    anywhere and are read by the host. Work goes to the stream that query's library works on, and the result
    is that library's. The rungs are "fp64", "fp32", "fp16", "bf16" and, for scores, "int8" with "bf16" values
    ("fp16" for float16 arrays), and on chips of capability 8.9, 9.0 and 10 "fp8" for values or both, which
    has not run on a GPU yet; head sizes go up to 256. Without a tolerance float16 and bfloat16 arrays are
    multiplied as they are, with weights rounded to their format, as is usual on GPUs; "fp32" by name does not
    round weights. Rows that a rung cannot hold are done again in fp64 (``retried`` in the report). Budgets
    are planned from a part of the keys and a few queries, or for half arrays without looking, and no rows are
    profiled. Sparse heads there (up to head sizes of 128, without masks) leave out blocks of keys for 128
    queries, 64 in fp32, where centres and radii bound all scores so far that the blocks cannot matter; what
    that may move outputs by in all is held against the outputs, and a head where it is too much becomes dense
    (not run on a GPU yet). A call with a tolerance, a float mask or a report waits for the GPU;
    `verify=False`, with a plan if there is a tolerance, does not, and can be captured in a CUDA graph: a
    float mask is not checked then. Ctrl-C does not end work on a GPU.

    Examples
    --------
    >>> import numpy as np, adaattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 128, 64), dtype=np.float32)
    >>> adaattn.attention(q, k, v, causal=True).shape
    (1, 8, 128, 64)
    """
    rates = choices = None
    no_budget = tolerance is None and policy is None and plan is None  # by identity: small calls take 2 µs
    no_limits = min_precision is _AUTO and max_precision is _AUTO and structure is _AUTO
    no_limits = no_limits and min_rank is None and max_rank is None
    if not (no_budget and no_limits and verify is _AUTO):
        tolerance, choices = _budget(
            tolerance,
            policy,
            plan,
            precision,
            {"min_precision": min_precision, "max_precision": max_precision, "structure": structure},
            {"min_rank": min_rank, "max_rank": max_rank},
            verify,
        )
        rates = None if tolerance is None else _rates_for(query, device)
    result = _adaattn.attention(
        query, key, value, attn_mask, causal, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset,
        scale, dropout_p, seed, precision, tolerance, min_precision, max_precision, structure, min_rank,
        max_rank, verify, rates, choices, False, return_lse, return_report, out, num_threads, _allocate,
        device,
    )  # fmt: skip
    if return_report:
        *arrays, (heads, seconds, operations, sizes, ruled_out, picture) = result
        kept = arrays if isinstance(query, np.ndarray) else _as_kind_of(query, tuple(arrays), out)
        made = None
        if plan is None and tolerance is not None:
            made = Plan.of(
                heads,
                sizes,
                tolerance,
                ruled_out,
                min_precision=min_precision,
                max_precision=max_precision,
                forced=_given(precision),
                lse=bool(return_lse),
            )
        return (*kept, Report.of(heads, seconds, operations, made=made, given=plan, picture=picture))
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
    structure: str = "auto",
    min_rank: int | None = None,
    max_rank: int | None = None,
    return_lse: bool = False,
    num_threads: int | None = None,
    device: str | None = None,
) -> Plan:
    """What `attention` would choose for these arguments: looks at the arrays and computes no attention.

    Parameters
    ----------
    query, key, value, attn_mask, ... : as in `attention`
    tolerance, policy, min_precision, max_precision, structure, min_rank, max_rank
        As in `attention`; one of the first two is needed.
    return_lse : bool
        Whether the lse will be asked for: its error counts then too.
    num_threads : int, optional
        At most this many threads.
    device : "cuda" or "cuda:N", optional
        As in `attention`.

    Returns
    -------
    Plan
        For `attention(..., plan=...)` and for reading: `Plan.explain`. It is what the same call of
        `attention` would start from; that may replace choices which fail verification.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, DeviceError
        Naming the argument, what was expected and what came, as in `attention`.
    MemoryError
        No memory for the scratch space.
    KeyboardInterrupt
        Ctrl-C during a call ends it within a fraction of a second.

    Examples
    --------
    >>> import numpy as np, adaattn
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 512, 64), dtype=np.float32)
    >>> plan = adaattn.plan(q, k, v, tolerance=1e-2)
    >>> out = adaattn.attention(q, k, v, plan=plan)
    """
    tolerance = tolerance_of(tolerance, policy)
    if tolerance is None:
        raise ArgumentError("tolerance: expected a number, or a policy, got None")
    heads, _, _, sizes, ruled_out, _ = _adaattn.attention(
        query, key, value, attn_mask, causal, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset,
        scale, dropout_p, seed, "auto", tolerance, min_precision, max_precision, structure, min_rank,
        max_rank, False, _rates_for(query, device), None, True, return_lse, False, None, num_threads,
        _allocate, device,
    )  # fmt: skip
    return Plan.of(
        heads,
        sizes,
        tolerance,
        ruled_out,
        min_precision=min_precision,
        max_precision=max_precision,
        forced=False,
        lse=bool(return_lse),
    )


_AUTO = "auto"


def _budget(
    tolerance: Any,
    policy: Any,
    plan: Any,
    precision: Any,
    limits: dict[str, Any],
    ranks: dict[str, Any],
    verify: Any,
) -> tuple[Any, Any]:
    """The tolerance and the choices of a plan, of arguments that go together."""
    choices = None
    if plan is not None:
        if not isinstance(plan, Plan):
            raise DTypeError(f"plan: expected a Plan or None, got {_type(plan)}")
        given = {"tolerance": tolerance, "policy": policy, "precision": precision} | limits | ranks
        _refuse("nothing beside a plan, which carries it", given)
        tolerance, choices = plan.tolerance, plan.choices()
    elif tolerance is None and policy is None:
        _refuse("'auto' without a tolerance", limits)
        _refuse("None without a tolerance", ranks)
    else:
        tolerance = tolerance_of(tolerance, policy)
        if _given(precision):
            structure = limits["structure"]
            if isinstance(structure, str) and structure == "dense":
                del limits["structure"]
            _refuse("'auto' beside a precision by name", limits)
            _refuse("None beside a precision by name", ranks)
    check_verify(verify)
    return tolerance, choices


def check_verify(verify: Any) -> Any:
    """True, False or "auto", which is True to the engine."""
    if not isinstance(verify, bool) and not (isinstance(verify, str) and verify == _AUTO):
        kind, got = (ArgumentError, repr(verify)) if isinstance(verify, str) else (DTypeError, _type(verify))
        raise kind(f"verify: expected True, False or 'auto', got {got}")
    return verify


def _rates_for(query: Any, device: Any) -> Any:
    """The rates to plan by, of the GPU or the CPU that the call works on."""
    capability = capability_for(query, device)
    return rate_table() if capability is None else gpu_table(capability)


def _given(precision: Any) -> bool:
    """Anything but "auto"; whether it makes sense is the engine's to say."""
    return not (isinstance(precision, str) and precision == "auto")


def _refuse(expected: str, arguments: dict[str, Any]) -> None:
    for name, argument in arguments.items():
        if argument is not None and _given(argument):
            raise ArgumentError(f"{name}: expected {expected}, got {argument!r}")


def _type(x: Any) -> str:
    return type(x).__name__


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> Any:
    """Attention over the union of two disjoint sets of keys, from the results over each.

    Parameters
    ----------
    out_a, out_b : arrays of shape (B, H, T, E)
        Outputs of `attention` for the same queries, of one dtype, on the CPU or on one GPU, where nothing is
        waited for.
    lse_a, lse_b : arrays of shape (B, H, T)
        Their ``lse``: float32, or float64 for float64 outputs. At most one side may carry the sink.

    Returns
    -------
    out, lse : arrays of the same shapes and dtypes

    Raises
    ------
    ShapeError, DTypeError, DeviceError
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
    """An uninitialised array of the kind of like: torch and CuPy make it, others get one of NumPy, or memory
    of their GPU, and convert it in the end."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(like, cupy.ndarray):
        with like.device:
            return cupy.empty(shape, like.dtype if dtype == "bfloat16" else dtype)
    device = device_of(like)
    if device is not None:
        return DeviceArray(shape, dtype, device)
    if dtype == "bfloat16":
        import ml_dtypes

        return np.empty(shape, ml_dtypes.bfloat16)
    return np.empty(shape, dtype)


def _as_kind_of(like: Any, result: Any, out: Any = None) -> Any:
    """Results that like's library did not make (but for the caller's out) as its own, if it follows the array
    API standard."""
    if isinstance(result, tuple):
        return tuple(_as_kind_of(like, array, out) for array in result)
    ours = isinstance(result, (np.ndarray, DeviceArray))
    if result is out or not ours or not hasattr(like, "__array_namespace__"):
        return result
    namespace = like.__array_namespace__()
    return namespace.asarray(result) if isinstance(result, np.ndarray) else namespace.from_dlpack(result)
