"""Entropy and rank, low-rank factors, softmax, masks and rounding: what one measures attention with.

Everything is batched: axes before those that a function works on stay. Arrays are float16, bfloat16
(`ml_dtypes`), float32 or float64, or what `numpy.asarray` makes one of them; computing and results are
float64 for float64, else float32. Inputs are not changed. Matrices are scaled by a power of two before they
are multiplied, so that no product overflows or vanishes; one with NaN or infinities gives NaN and leaves the
others of its batch alone.

All functions raise `ArgumentError`, `ShapeError` or `DTypeError`, naming the argument, what was expected and
what came. Sizes are at least 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ArgumentError, DTypeError, ShapeError

__all__ = [
    "attention_entropy",
    "causal_mask",
    "dequantize",
    "effective_rank",
    "log_sum_exp",
    "low_rank_approximation",
    "padding_mask",
    "power_iteration",
    "quantize",
    "randomized_svd",
    "rounding_error",
    "sliding_window_mask",
    "spectral_norm",
    "stable_softmax",
]

if TYPE_CHECKING:  # numpy.random takes longer to load than the package
    Seed = int | np.random.Generator | None

Axis = int | tuple[int, ...] | None
_Array = NDArray[Any]

_FLOATS = "float16", "bfloat16", "float32", "float64"

# Significant bits, exponent of the smallest subnormal, largest number.
_FORMATS = {
    "fp32": (24, -149, float.fromhex("0x1.fffffep127")),
    "fp16": (11, -24, 65504.0),
    "bf16": (8, -133, float.fromhex("0x1.fep127")),
}
_LARGEST_CODE = {"int8": 127, "fp8": 448}

# e4m3fn by code (Micikevicius et al. 2022, arXiv:2209.05433): a sign, 4 bits of exponent, 3 of significand;
# no infinities, NaN at 127 and 255.
_E4M3 = np.arange(128)
_E4M3 = np.ldexp(_E4M3 % 8 + 8.0 * (_E4M3 > 7), np.maximum(_E4M3 // 8, 1) - 10).astype(np.float32)
_E4M3[127] = np.nan
_E4M3 = np.concatenate([_E4M3, -_E4M3])


# ---- entropy and rank


def attention_entropy(weights: ArrayLike, axis: Axis = -1) -> _Array:
    """Shannon entropy of attention weights: -Σ p ln p in nats, where p = weights / Σ weights and 0 ln 0 = 0.

    Parameters
    ----------
    weights : array_like
        Numbers of at least 0. They need not sum to one, as rounded or dropped ones do not.
    axis : int, tuple of ints or None
        The keys: axis or axes to sum over; None is all.

    Returns
    -------
    ndarray
        `weights`' shape without `axis`: from 0 (one key takes all, or no key takes any) to ln of the number
        of keys (all take the same). NaN where weights are NaN or infinite.

    Raises
    ------
    ArgumentError
        A negative weight (scores, perhaps), or an axis that is not there.
    """
    weights = _floats("weights", weights)
    if (lowest := np.fmin.reduce(weights, axis=None)) < 0:
        raise ArgumentError(f"weights: expected numbers of at least 0, got {lowest:g}")
    return _entropy(weights, _axes(axis, weights.ndim))


def effective_rank(x: ArrayLike, method: str = "entropy", threshold: float | None = None) -> _Array:
    """How many dimensions a matrix fills, from its singular values σ₁ ≥ σ₂ ≥ …

    Parameters
    ----------
    x : array_like of shape (..., M, N)
    method : str
        - "entropy": exp of the entropy of σ / Σσ (Roy & Vetterli, EUSIPCO 2007).
        - "energy": the smallest r ≥ 1 with Σ_{i≤r} σᵢ² ≥ threshold · Σσ².
        - "count": the number of σ > threshold · σ₁, the numerical rank.
        - "stable": Σσ² / σ₁² (Rudelson & Vershynin, J. ACM 2007), with σ₁ from `power_iteration`: at most the
          rank, and above the true value by no more than that σ₁ is too small.
    threshold : float, optional
        From 0 to 1. Default 0.99 for "energy", max(M, N) · eps of the computing dtype for "count" as in
        `numpy.linalg.matrix_rank`; the other methods have none.

    Returns
    -------
    ndarray of shape (...)
        From 1 to min(M, N), and 0 for a matrix of zeros. Floats also where they count, so that NaN remains.

    Notes
    -----
    O(M N min(M, N)) operations per matrix; "stable" O(M N) per iteration.
    """
    x = _floats("x", x, ndim=2)
    _choice("method", method, "entropy", "energy", "count", "stable")
    if threshold is not None:
        if method not in ("energy", "count"):
            raise ArgumentError(f"threshold: expected None for method {method!r}, got {threshold!r}")
        threshold = _number("threshold", threshold, 0, 1, kind=float)
    unit, scale = _unit(x)
    if method == "stable":
        sigma = power_iteration(unit, seed=0)[0]
        rank = np.square(unit).sum((-2, -1)) / np.where(sigma > 0, sigma, 1) ** 2
    else:
        s = np.linalg.svd(unit, compute_uv=False)
        largest = s[..., :1]
        if method == "entropy":
            rank = np.exp(_entropy(s, (-1,))) * (s[..., 0] > 0)
        elif method == "energy":
            energy = np.square(s).cumsum(-1, dtype=np.float64)
            short = energy < (0.99 if threshold is None else threshold) * energy[..., -1:]
            rank = (1 + short.sum(-1, dtype=s.dtype)) * (s[..., 0] > 0)
        else:
            small = max(x.shape[-2:]) * np.finfo(s.dtype).eps if threshold is None else threshold
            rank = (s > small * largest).sum(-1, dtype=s.dtype)
    result: _Array = rank * (scale / scale)[..., 0, 0]
    return result


# ---- singular values and vectors


def randomized_svd(
    a: ArrayLike, rank: int, n_oversamples: int = 8, n_iter: int = 2, seed: Seed = None
) -> tuple[_Array, _Array, _Array]:
    """Leading singular values and vectors, from products with a random matrix: a ≈ U · diag(s) · Vt.

    Parameters
    ----------
    a : array_like of shape (..., M, N)
    rank : int
        R, from 1 to min(M, N).
    n_oversamples : int
        Random vectors beyond `rank`; with at least min(M, N) vectors in all the result is exact but for
        rounding.
    n_iter : int
        Subspace iterations: products with a·aᵀ. Each takes the error closer to that of the best
        approximation, the more so the slower σ decays.
    seed : int or numpy.random.Generator, optional
        The same one gives the same result; all matrices of a batch meet the same random matrix.

    Returns
    -------
    U, s, Vt : ndarrays of shape (..., M, R), (..., R) and (..., R, N)
        Orthonormal columns, singular values from large to small, orthonormal rows.

    Notes
    -----
    Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1. Orthonormalised after every
    iteration, so that small singular values survive; doing so between a and aᵀ as well gained nothing that
    could be measured: the columns of aᵀ·Q come graded. O(M N L) operations per product, of which there are
    2 · n_iter + 2, with L = rank + n_oversamples.
    """
    a = _floats("a", a, ndim=2)
    rank = _number("rank", rank, 1, min(a.shape[-2:]))
    vectors = min(rank + _number("n_oversamples", n_oversamples, 0), *a.shape[-2:])
    n_iter = _number("n_iter", n_iter, 0)
    unit, scale = _unit(a)
    transposed = np.swapaxes(unit, -2, -1)
    basis = np.linalg.qr(unit @ _normal(seed, a.shape[-1], vectors).astype(a.dtype))[0]
    for _ in range(n_iter):
        basis = np.linalg.qr(unit @ (transposed @ basis))[0]
    U, s, Vt = np.linalg.svd(np.swapaxes(basis, -2, -1) @ unit, full_matrices=False)
    valid = scale / scale
    return (basis @ U[..., :rank]) * valid, s[..., :rank] * scale[..., 0], Vt[..., :rank, :] * valid


def power_iteration(
    a: ArrayLike, n_iter: int = 100, tol: float = 1e-6, seed: Seed = None
) -> tuple[_Array, _Array, _Array]:
    """Largest singular value and its vectors, by repeated products with aᵀ·a.

    Parameters
    ----------
    a : array_like of shape (..., M, N)
    n_iter : int
        At most this many products.
    tol : float
        A matrix is done when ‖aᵀu - σv‖ ≤ tol · ‖aᵀu‖; some singular value then lies within tol · σ of σ.
    seed : int or numpy.random.Generator, optional
        Of the normal vector that all matrices of a batch start from.

    Returns
    -------
    sigma, u, v : ndarrays of shape (...), (..., M) and (..., N)
        σ = ‖a v‖, u = a v / σ and ‖v‖ = 1; a matrix of zeros has σ = 0 and u = 0.

    Notes
    -----
    σ is a lower bound of ‖a‖₂, but for rounding. From a random start the relative error of σ² is expected to
    be below 0.9 ln N / (k - 1) after k products whatever the spectrum is (Kuczyński & Woźniakowski, SIAM J.
    Matrix Anal. 1992), and falls like (σ₂/σ₁)^(4k). O(M N) operations per product.
    """
    a = _floats("a", a, ndim=2)
    n_iter, tol = _number("n_iter", n_iter, 0), _number("tol", tol, 0, kind=float)
    unit, scale = _unit(a)
    transposed = np.swapaxes(unit, -2, -1)
    start = _normal(seed, a.shape[-1], 1).astype(a.dtype)
    v, _ = _direction(np.broadcast_to(start, (*a.shape[:-2], *start.shape)))
    for _ in range(n_iter):
        u, sigma = _direction(unit @ v)
        product = transposed @ u
        further, size = _direction(product)
        done = _norm(product - sigma * v) <= tol * size
        if done.all():
            break
        v = np.where(done, v, further)  # what is done stays: no matrix depends on the others
    u, sigma = _direction(unit @ v)
    valid = scale / scale
    return (sigma * scale)[..., 0, 0], (u * valid)[..., 0], (v * valid)[..., 0]


def spectral_norm(a: ArrayLike) -> _Array:
    """‖a‖₂, the largest singular value, from all of them: (..., M, N) -> (...).

    O(M N min(M, N)) operations; `power_iteration` estimates it in fewer.
    """
    unit, scale = _unit(_floats("a", a, ndim=2))
    norm: _Array = np.linalg.svd(unit, compute_uv=False)[..., 0] * scale[..., 0, 0]
    return norm


def low_rank_approximation(a: ArrayLike, rank: int) -> _Array:
    """The nearest matrix of at most the given rank: Σ_{i≤rank} σᵢ uᵢ vᵢᵀ (Eckart & Young 1936).

    Nearest in the Frobenius norm, at a distance of sqrt(Σ_{i>rank} σᵢ²), and in the spectral norm, at
    σ_{rank+1}. O(M N min(M, N)) operations; factors alone, for fewer operations: `randomized_svd`.

    Parameters
    ----------
    a : array_like of shape (..., M, N)
    rank : int
        From 1 to min(M, N).

    Returns
    -------
    ndarray of shape (..., M, N)
    """
    a = _floats("a", a, ndim=2)
    rank = _number("rank", rank, 1, min(a.shape[-2:]))
    unit, scale = _unit(a)
    U, s, Vt = np.linalg.svd(unit, full_matrices=False)
    nearest: _Array = (U[..., :rank] * s[..., None, :rank]) @ Vt[..., :rank, :] * scale
    return nearest


# ---- softmax


@np.errstate(all="ignore")
def stable_softmax(x: ArrayLike, axis: Axis = -1) -> _Array:
    """exp(x) / Σ exp(x), computed from x - max x so that nothing overflows.

    Parameters
    ----------
    x : array_like
        -inf has no weight.
    axis : int, tuple of ints or None
        Axis or axes that sum to one; None is all.

    Returns
    -------
    ndarray of x's shape
        Zeros where all of a row is -inf, as in `adaattn.attention`; a row with NaN or +inf is NaN.
    """
    p, _, total = _exponentials(x, axis)
    p /= np.where(total == 0, 1, total)
    return p


@np.errstate(all="ignore")
def log_sum_exp(x: ArrayLike, axis: Axis = -1) -> _Array:
    """ln Σ exp(x), computed from x - max x so that nothing overflows.

    Parameters
    ----------
    x : array_like
    axis : int, tuple of ints or None
        Axis or axes to sum over; None is all.

    Returns
    -------
    ndarray
        x's shape without `axis`: -inf where all of a row is -inf, as in `adaattn.attention`; NaN for a row
        with NaN, else +inf for one with +inf.
    """
    _, top, total = _exponentials(x, axis)
    result = np.where(top == np.inf, top, top + np.log(total))
    return result.squeeze(_axes(axis, result.ndim))[()]


# ---- masks: True where a query may attend to a key


def causal_mask(T: int, S: int) -> NDArray[np.bool_]:
    """Query i sees key j where j ≤ i + S - T: ``causal=True`` of `adaattn.attention`, as a (T, S) mask.

    The last query sees all keys ("lower_right"); where T > S the first T - S see none.
    """
    return sliding_window_mask(T, S, None, 0)


def sliding_window_mask(T: int, S: int, left: int | None, right: int | None) -> NDArray[np.bool_]:
    """Query i sees keys i + S - T - left to i + S - T + right: ``window=(left, right)``, as a (T, S) mask.

    Parameters
    ----------
    T, S : int
        Numbers of queries and keys, at least 1.
    left, right : int or None
        At least 0; None leaves the side unbounded.
    """
    T, S = _number("T", T, 1), _number("S", S, 1)
    left, right = (
        T + S if side is None else _number(name, side, 0)  # no distance is as large as T + S
        for name, side in (("left", left), ("right", right))
    )
    distance = np.arange(S) - (np.arange(T) + S - T)[:, None]
    mask: NDArray[np.bool_] = (distance >= -left) & (distance <= right)
    return mask


def padding_mask(lengths: ArrayLike, S: int) -> NDArray[np.bool_]:
    """Every query of sequence b sees keys j < lengths[b]: ``kv_lengths=lengths``, as a (B, 1, 1, S) mask.

    Parameters
    ----------
    lengths : array_like of shape (B,)
        Integers from 0 to S.
    S : int
        Number of keys, at least 1.
    """
    S = _number("S", S, 1)
    lengths = _array("lengths", lengths)
    if lengths.dtype.kind not in "iu":
        raise DTypeError(f"lengths: expected integers, got {lengths.dtype}")
    if lengths.ndim != 1:
        raise ShapeError(f"lengths: expected shape (B,), got {lengths.shape}")
    if lengths.min() < 0 or lengths.max() > S:
        raise ArgumentError(
            f"lengths: expected integers from 0 to {S}, got {lengths.min()} to {lengths.max()}"
        )
    mask: NDArray[np.bool_] = np.arange(S) < lengths[:, None, None, None]
    return mask


# ---- rounding


def quantize(x: ArrayLike, dtype: str, axis: Axis = -1) -> tuple[_Array, _Array]:
    """8-bit codes and the scales that they count in: x ≈ scale · code, rounded to nearest, ties to even.

    Parameters
    ----------
    x : array_like
    dtype : "int8" or "fp8"
        Integers from -127 to 127, or e4m3fn numbers (4 significant bits, up to 448).
    axis : int, tuple of ints or None
        Axis or axes along which numbers share a scale; None is all.

    Returns
    -------
    codes : ndarray of x's shape
        int8, or uint8 with the bits of e4m3fn.
    scale : ndarray of x's shape with sizes of 1 along `axis`
        ``max |x|`` / 127, or / 448: the largest code is that of the largest number, and none saturates. At
        least the smallest normal number, also for zeros. A group that holds NaN or an infinity has codes of 0
        and the scale NaN, so that all of it comes back as NaN.

    Notes
    -----
    The error is at most scale / 2 for "int8", and for "fp8" at most ``|x| / 16``, or scale / 1024 where that
    is more. One operation per number and a search among 127 for "fp8".
    """
    x = _floats("x", x)
    _choice("dtype", dtype, *_LARGEST_CODE)
    limits, code = np.finfo(x.dtype), _LARGEST_CODE[dtype]
    largest = np.abs(x).max(_axes(axis, x.ndim), keepdims=True)
    scale = np.clip(largest / code, limits.tiny, np.nextafter(limits.max / code, limits.tiny))
    scale[~np.isfinite(largest)] = np.nan
    ratio = np.where(np.isnan(scale), 0, x / scale)
    if dtype == "int8":
        return np.rint(ratio).astype(np.int8), scale
    magnitude = np.searchsorted(_E4M3[:127], _round(np.abs(ratio), 4, -9))
    return (magnitude + 128 * np.signbit(ratio)).astype(np.uint8), scale


def dequantize(codes: ArrayLike, scale: ArrayLike) -> _Array:
    """scale · code, for what `quantize` made.

    Parameters
    ----------
    codes : array_like of int8 or uint8
        Integers, or the bits of e4m3fn numbers (127 and 255 are NaN).
    scale : array_like
        Of a shape that broadcasts to that of `codes`.

    Returns
    -------
    ndarray of `codes`' shape
    """
    codes, scale = _array("codes", codes), _floats("scale", scale, ndim=0)
    if codes.dtype not in (np.int8, np.uint8):
        raise DTypeError(f"codes: expected int8 or uint8, got {codes.dtype}")
    try:
        scale = np.broadcast_to(scale, codes.shape)
    except ValueError:
        expected = f"a shape that broadcasts to {codes.shape}"
        raise ShapeError(f"scale: expected {expected}, got {scale.shape}") from None
    result: _Array = scale * (_E4M3[codes] if codes.dtype == np.uint8 else codes.astype(scale.dtype))
    return result


@np.errstate(over="ignore", invalid="ignore")
def rounding_error(x: ArrayLike, dtype: str, axis: Axis = -1) -> _Array:
    """What rounding to a format costs: ‖round(x) - x‖ / ‖x‖ in Frobenius norms, (..., M, N) -> (...).

    Parameters
    ----------
    x : array_like of shape (..., M, N)
    dtype : "fp32", "fp16", "bf16", "fp8" or "int8"
        Rounding is to nearest, ties to even. The last two have the scales of `quantize`, the others none.
    axis : int, tuple of ints or None
        As in `quantize`.

    Returns
    -------
    ndarray of shape (...)
        0 for zeros, inf where a number is too large for the format, NaN where one is NaN or infinite.
    """
    x = _floats("x", x, ndim=2)
    _choice("dtype", dtype, *_FORMATS, "fp8", "int8")
    if dtype in _FORMATS:
        bits, smallest, largest = _FORMATS[dtype]
        rounded = _round(x, bits, smallest)
        rounded *= np.where(np.abs(rounded) > largest, x.dtype.type(np.inf), x.dtype.type(1))
    else:
        rounded = dequantize(*quantize(x, dtype, axis))
    unit, scale = _unit(x)
    error: _Array = _norm((rounded - x) / scale) / np.maximum(_norm(unit), 1)  # 1: the largest entry's share
    return error[..., 0, 0]


# ---- parts


def _entropy(weights: _Array, axes: tuple[int, ...]) -> _Array:
    top = weights.max(axes, keepdims=True)
    with np.errstate(invalid="ignore"):
        p = weights / np.where(top > 0, top, 1)
    p /= np.maximum(p.sum(axes, keepdims=True), 1)
    entropy: _Array = 0 - (p * np.log(np.where(p == 0, 1, p))).sum(axes)
    return entropy


def _exponentials(x: ArrayLike, axis: Axis) -> tuple[_Array, _Array, _Array]:
    """exp(x - top), top (0 for rows of -inf alone) and the sum; these two with sizes of 1 along `axis`."""
    x = _floats("x", x)
    axes = _axes(axis, x.ndim)
    top = x.max(axes, keepdims=True)
    top = np.where(top == -np.inf, 0, top)
    p = np.exp(x - top)
    return p, top, p.sum(axes, keepdims=True)


def _unit(a: _Array) -> tuple[_Array, _Array]:
    """Matrices over a power of two that takes their largest entry to [1, 2), and that power: (..., 1, 1).

    Zeros stay zeros. A matrix with NaN or infinities comes as zeros, and its power as NaN.
    """
    largest = np.abs(a).max(axis=(-2, -1), keepdims=True)
    scale = np.ldexp(np.ones_like(largest), np.frexp(largest)[1] - 1)
    scale[~np.isfinite(largest)] = np.nan
    return np.where(np.isnan(scale), 0, a / scale), scale


def _norm(a: _Array) -> _Array:
    norm: _Array = np.sqrt(np.square(a).sum((-2, -1), keepdims=True))
    return norm


def _direction(x: _Array) -> tuple[_Array, _Array]:
    """Columns (..., N, 1) over their norms, and these; zeros stay zeros."""
    norm = _norm(x)
    return x / np.where(norm > 0, norm, 1), norm


def _round(x: _Array, bits: int, smallest: int) -> _Array:
    """x to so many significant bits, and to multiples of 2^smallest: to nearest, ties to even."""
    step = np.ldexp(x.dtype.type(1), np.maximum(np.frexp(x)[1] - bits, smallest))
    rounded: _Array = np.rint(x / step) * step
    return rounded


def _normal(seed: Seed, *shape: int) -> _Array:
    try:
        return np.random.default_rng(seed).standard_normal(shape)
    except (TypeError, ValueError) as error:
        kind = DTypeError if isinstance(error, TypeError) else ArgumentError
        raise kind(f"seed: expected None, an int of at least 0 or a Generator, got {seed!r}") from None


# ---- arguments


def _array(name: str, x: Any) -> _Array:
    try:
        array = None if isinstance(x, np.ma.MaskedArray) else np.asarray(x)
    except ValueError:  # nested lists of different lengths
        array = None
    if array is None:
        raise DTypeError(f"{name}: expected a plain array, got {type(x).__name__}")
    if 0 in array.shape:
        raise ShapeError(f"{name}: expected sizes of at least 1, got shape {array.shape}")
    return array


def _floats(name: str, x: Any, ndim: int = 1) -> _Array:
    """As float64 if it is that, else as float32."""
    array = _array(name, x)
    if array.dtype.name not in _FLOATS:
        raise DTypeError(f"{name}: expected {_one_of(_FLOATS)}, got {array.dtype}")
    if array.ndim < ndim:
        expected = "shape (..., M, N)" if ndim == 2 else "at least 1 dimension"
        raise ShapeError(f"{name}: expected {expected}, got {array.shape}")
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def _number(name: str, value: Any, low: int, high: float = math.inf, kind: type = int) -> Any:
    a, other = ("an int", int) if kind is int else ("a number", (float, np.floating))
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, other)):
        raise DTypeError(f"{name}: expected {a}, got {type(value).__name__}")
    if not low <= value <= high:
        bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ArgumentError(f"{name}: expected {a} {bounds}, got {value}")
    return kind(value)


def _choice(name: str, value: Any, *names: str) -> None:
    expected = f"{name}: expected {_one_of(map(repr, names))}"
    if not isinstance(value, str):
        raise DTypeError(f"{expected}, got {type(value).__name__}")
    if value not in names:
        raise ArgumentError(f"{expected}, got {value!r}")


def _axes(axis: Any, ndim: int) -> tuple[int, ...]:
    given = range(ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(_number("axis", one, -ndim, ndim - 1) % ndim for one in given)
    if len(set(axes)) < len(axes):
        raise ArgumentError(f"axis: expected distinct axes, got {axis}")
    return axes


def _one_of(names: Any) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
