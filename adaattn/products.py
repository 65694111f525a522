"""Matrix products within an error budget: rows times a weight, which may be kept in 8 and in 16 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _adaattn
from .codes import code_places
from .errors import ArgumentError, DeviceError, DTypeError, ShapeError
from .gpu import device_of
from .linalg import power_iteration
from .stats import tolerance_of

_Array = NDArray[Any]

_LANES = _DEPTH = 256  # as in csrc/linear.h
_LOW = 256  # what a one in the high byte of a code stands for in ones of the low byte
_MOST = 127 * _LOW  # the largest code, which the high byte alone has exactly

#: What a row may be computed with, cheap to dear.
LADDER = ("int8", "int16", "fp32", "fp64")
_INT8, _INT16, _FP32, _FP64 = range(4)

# Up to so many rows the engine takes less time than BLAS, from int8, int16 and fp32: it reads the weight once
# and packs nothing. With two bytes for an element products soon take longer than reading it.
_MOST_ROWS = 64, 2, 32


class PackedWeight:
    """A weight and its codes of 8 and 16 bits, for `linear` with few rows, such as in generation.

    A code is 16 bits, whose high byte alone is the 8-bit one; 256 inputs of a feature share a scale. Both
    bytes lie apart, so that a product in 8 bits reads one for each element. They take half of the weight's
    memory, beside the weight, which rows that need it are computed from: it must not be changed afterwards.

    Parameters
    ----------
    weight : float32 array of shape (N, K)
        N features of K inputs; kept, not copied, if it is C-contiguous. One with NaN or infinities has no
        codes that could be used.

    Attributes
    ----------
    weight : ndarray of shape (N, K)
    errors : dict
        "int8" and "int16" to the relative error, in the Frobenius norm, of the weight as they have it.
    nbytes : int
        Of the codes and what belongs to them.
    """

    def __init__(self, weight: Any) -> None:
        if device_of(weight) is not None:
            raise DeviceError(
                "weight: expected an array of the CPU, got one of a GPU: linear takes that as it is"
            )
        weight = np.asarray(weight)
        if weight.dtype != np.float32:
            raise DTypeError(f"weight: expected float32, got {weight.dtype}")
        if weight.ndim != 2 or not weight.size:
            raise ShapeError(f"weight: expected shape (N, K) with N, K >= 1, got {weight.shape}")
        self.weight: _Array = np.ascontiguousarray(weight)
        N, K = weight.shape
        finite = bool(np.isfinite(weight).all())
        scale, codes, left = _codes(self.weight if finite else np.zeros_like(weight))
        squares = np.square(self.weight, dtype=np.float64)
        size = float(squares.sum())
        # Rounding in fp32, of what a row is made of and of sums that grow along it, three times over.
        left2 = np.tile(2.0**-48 * (16 + K / _chains()) * squares.sum(axis=0), (3, 1))
        self.errors: dict[str, float] = {}
        for rung in (_INT8, _INT16):
            lost = float(np.square(left[rung], dtype=np.float64).sum())
            self.errors[LADDER[rung]] = math.sqrt(lost / size) if size else 0.0
            left2[rung] += _column_squares(left[rung])
        if not finite:
            self.errors, left2[:2] = dict.fromkeys(self.errors, math.inf), math.nan
        self.nbytes = scale.nbytes + codes.nbytes + left2.nbytes
        self._parts = N, K, size, self.weight, scale, left2, codes[0], codes[1]

    def __repr__(self) -> str:
        N, K = self.weight.shape
        return f"PackedWeight({N} x {K}, {', '.join(f'{k} {v:.1e}' for k, v in self.errors.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, (self.weight,)

    def _first(self, rows: int, tolerance: float | None) -> int:
        """The cheapest rung that would keep the tolerance on inputs of no preference, and pays here."""
        if tolerance is None or not _codes_pay():
            return _FP32
        if self.errors["int8"] <= tolerance and rows <= _MOST_ROWS[_INT8]:
            return _INT8
        return _INT16 if self.errors["int16"] <= tolerance and rows <= _MOST_ROWS[_INT16] else _FP32


def few_rows(
    x: _Array, weight: _Array, bias: _Array | None, packed: PackedWeight | None, tolerance: float | None
) -> _Array | None:
    """`linear` for modules, which know their arrays: None where BLAS should do it."""
    if x.dtype != np.float32 or weight.dtype != np.float32:
        return None
    rows = x.size // (x.shape[-1] or 1)
    first = _FP32 if packed is None else packed._first(rows, tolerance)
    if rows > _MOST_ROWS[first] or (packed is None and not weight.flags.c_contiguous):
        return None
    parts = _plain(weight) if packed is None else packed._parts
    return _by_engine(x, parts, bias, tolerance, first)[0]


def _by_engine(
    x: _Array,
    parts: tuple[Any, ...],
    bias: _Array | None,
    tolerance: float | None,
    first: int,
    report: bool = False,
    num_threads: int | None = None,
) -> tuple[_Array, Any]:
    """The engine's product, of x with any number of axes, and what it tells of rows if a report is wanted."""
    flat = x if x.ndim <= 4 else x.reshape(-1, x.shape[-1])
    bias = None if bias is None else np.ascontiguousarray(bias)
    y = _adaattn.linear(parts, flat, bias, tolerance, first, report, num_threads)
    y, told = y if report else (y, ())
    return y if x.ndim <= 4 else y.reshape(*x.shape[:-1], y.shape[-1]), told


def _plain(weight: _Array) -> tuple[Any, ...]:
    """What `PackedWeight` keeps, of a weight without codes."""
    return *weight.shape, 0.0, weight, None, None, None, None


def _codes(weight: _Array) -> tuple[_Array, _Array, _Array]:
    """Scales, the two planes of codes in the order of csrc/linear.h, and what each leaves out."""
    N, K = weight.shape
    width, lanes, groups = -(-K // 4) * 4, -(-N // 16) * 16, -(-K // _DEPTH)
    scale = np.zeros((groups, lanes), np.float32)
    codes = np.full((2, lanes * width), 128, np.uint8)  # which stands for 0
    left = np.empty((2, N, K), np.float32)
    for first in range(0, N, _LANES):
        rows, block = slice(first, min(first + _LANES, N)), min(_LANES, lanes - first)
        for group, start in enumerate(range(0, K, _DEPTH)):
            inputs = slice(start, min(start + _DEPTH, K))
            part = weight[rows, inputs].astype(np.float64)
            scale[group, rows] = np.abs(part).max(axis=1) * (_LOW / _MOST)
            unit = scale[group, rows, None].astype(np.float64)
            code = np.divide(_LOW * part, unit, out=np.zeros_like(part), where=unit > 0)
            code = np.rint(code).clip(-_MOST, _MOST).astype(np.int32)
            high = (code + _LOW // 2) // _LOW
            left[0, rows, inputs] = part - unit * high
            left[1, rows, inputs] = part - unit / _LOW * code
            n = min(_DEPTH, width - start)
            places = first * width + start * block + code_places(block, n)
            for plane, byte in enumerate((high, code - _LOW * high)):
                padded = np.full((block, n), 128, np.uint8)
                padded[: byte.shape[0], : byte.shape[1]] = byte + 128
                codes[plane, places] = padded
    return scale, codes, left


def _column_squares(left: _Array) -> _Array:
    """Squared norms of columns of an error, of which those of products are made: x² times them, as far as
    the error's elements do not depend on each other. Where its largest singular value says that they do, that
    bounds what any x may meet."""
    N, K = left.shape
    squares: _Array = np.square(left, dtype=np.float64).sum(axis=0)
    random = float(squares.sum()) * (N**-0.5 + K**-0.5) ** 2  # of the largest one, if they do not
    largest = 1.21 * float(power_iteration(left, n_iter=20, seed=0)[0]) ** 2
    if largest > 4 * random:
        return np.full(K, largest)
    squares *= (1 + 2.2 / N**0.5) ** 2  # three standard deviations of a sum over N features
    return squares


@cache
def _chains() -> int:
    """How many sums the engine's fp32 makes of a product."""
    return 1 if _adaattn.cpu_info()["kernels"]["row_scores_f32"] == "scalar" else 16


@cache
def _codes_pay() -> bool:
    """Whether products of codes are as fast as their bytes can be read; without VNNI fp32 is faster."""
    return bool(_adaattn.cpu_info()["kernels"]["code_products"] == "avx512vnni")


@dataclass(frozen=True, eq=False)
class LinearReport:
    """What a product was computed with.

    Attributes
    ----------
    precision : ndarray of str, of x's shape without its last axis
        "int8" and "int16" (the weight's elements; x enters with 23 bits), "fp32" or "fp64", of each row; on a
        GPU "fp8", "bf16", "fp16", "tf32", "fp32" or "fp64" of all.
    predicted_error : ndarray of float64, of the same shape
        Relative error of each row of the output, with a margin of three standard deviations over features;
        NaN where it was not predicted.
    measured_error : float
        Relative error of the whole output, measured on up to 16 features; NaN where each row's was predicted.
    """

    precision: NDArray[np.str_]
    predicted_error: NDArray[np.float64]
    measured_error: float


def linear(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    tolerance: float | None = None,
    policy: str | None = None,
    precision: str = "auto",
    return_report: bool = False,
    num_threads: int | None = None,
) -> Any:
    """x Wᵀ + b over the last axis, exact or within an error budget.

    Few rows take as long as the weight takes to be read. They are computed by the engine, each by itself:
    with a `PackedWeight` and a tolerance from its codes of 8 bits (up to 64 rows) or 16 (up to two), if the
    weight as these have it lies within the tolerance, else in fp32 (up to 32). A row whose predicted error
    does not, since its terms cancel, or that has NaN or infinities, goes up the ladder: int8, int16, fp32,
    fp64. More rows are NumPy's BLAS in fp32, or in fp64 where the error measured on some features exceeds the
    tolerance.

    Parameters
    ----------
    x : array of shape (..., K)
        float32, float16, bfloat16 (computed in float32, and rounded at the end) or float64 (computed in
        float64, whatever the tolerance).
    weight : array of shape (N, K) or PackedWeight
        Of x's dtype, or float32 beside half-precision x. An array has no codes: pack what is used again.
    bias : array of shape (N,), optional
        Of weight's dtype.
    tolerance : float, optional
        Largest relative error of a row of the output, or of the whole where BLAS computes it or the weight is
        an array, in the Euclidean norm; None: fp32.
    policy : "quality", "balanced" or "speed", optional
        Name of a tolerance: 1e-5, 1e-2, 5e-2.
    precision : "auto", "int8", "int16", "fp32" or "fp64"
        A rung by name is where rows start; without a tolerance they stay there, but for those with NaN,
        infinities, and numbers of which none lies between 2^-100 and 2^100. On a GPU "auto", "fp8", "bf16",
        "fp16", "tf32", "fp32" or "fp64".
    return_report : bool
        Also return a `LinearReport`.
    num_threads : int, optional
        Of the engine; default `get_num_threads()`. BLAS has threads of its own.

    Returns
    -------
    array of shape (..., N)
        In x's dtype; on a GPU of x's library. From the engine: the same bits for any number of threads, and
        for a row whatever rows are beside it, as long as their number chooses the same rung to start from.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError
        Naming the argument, what was expected and what came.
    DeviceError
        Arrays that do not lie on one device, or a GPU without cuBLAS or without the product by name.

    Notes
    -----
    Arrays on a GPU, all of one dtype, are multiplied by cuBLAS (cublasLt of CUDA 12 or 13: the process's own,
    of NVIDIA's wheels or the system's), on the stream of their library: exactly for their dtype (fp32 without
    tf32), or within a tolerance from e4m3 with a power of two for each array, bf16, fp16, tf32 or fp32,
    whichever is predicted to be fastest. The host then waits for the error of the whole, measured on 16
    features, and goes up that ladder where it exceeds the tolerance, in the end to fp64 by a kernel of ours.
    That path is tested without a GPU, and was not run on one yet.

    Examples
    --------
    >>> import numpy as np, adaattn
    >>> weight = adaattn.PackedWeight(np.ones((3, 4), np.float32))
    >>> adaattn.linear(np.ones((1, 4), np.float32), weight, policy="balanced")
    array([[4., 4., 4.]], dtype=float32)
    """
    if policy is not None:
        tolerance = tolerance_of(tolerance, policy)
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ArgumentError(f"tolerance: expected a finite number above 0, got {tolerance!r}")
    packed = weight if isinstance(weight, PackedWeight) else None
    if device_of(x) is not None:
        return _on_gpu(x, weight, bias, tolerance, precision, return_report)
    weight = np.asarray(weight) if packed is None else packed.weight
    x = np.asarray(x)
    given = x.dtype
    if given.itemsize == 2 and given.kind in "fV":  # of kind V is bfloat16
        x = x.astype(np.float32)
        weight, bias = (None if a is None else np.asarray(a, np.float32) for a in (weight, bias))
    _check(x, weight, bias)
    rows, measured = x.size // x.shape[-1], math.nan
    if precision == "auto":
        first = _FP32 if packed is None else packed._first(rows, tolerance)
    else:
        first = _by_name(precision, tolerance)
        packed = PackedWeight(weight) if packed is None and first < _FP32 else packed
    if x.dtype == np.float32 and (first < _FP32 or rows <= _MOST_ROWS[_FP32]):
        parts = _plain(np.ascontiguousarray(weight)) if packed is None else packed._parts
        y, told = _by_engine(x, parts, bias, tolerance, first, return_report, num_threads)
    else:
        packed = None
        y, told = _by_blas(x, weight, bias, first), [_FP64 if x.dtype == np.float64 else first, math.nan]
    if packed is None and tolerance is not None and x.dtype == np.float32:
        measured = _measured(x, weight, bias, y)
        if measured > tolerance:
            y = _by_blas(x, weight, bias, _FP64)
            measured, told = _measured(x, weight, bias, y), [_FP64, math.nan]
    y = y if y.dtype == given else y.astype(given)
    if not return_report:
        return y
    table = np.broadcast_to(told, (rows, 2)).reshape(*x.shape[:-1], 2)
    return y, LinearReport(np.array(LADDER)[table[..., 0].astype(int)], table[..., 1].copy(), measured)


def _on_gpu(
    x: Any, weight: Any, bias: Any, tolerance: float | None, precision: str, return_report: bool
) -> Any:
    from .gpu_products import linear_on_gpu

    for name, a in (("weight", weight), ("bias", bias)):
        if a is not None and device_of(a) is None:
            packed = "a PackedWeight of the CPU: pass the weight itself, moved to the GPU"
            got = packed if isinstance(a, PackedWeight) else f"{type(a).__name__} of the CPU"
            raise DeviceError(f"{name}: expected an array of the GPU that x lies on, got {got}")
    if tolerance is not None and precision != "auto":
        raise ArgumentError(f"tolerance: expected None beside precision={precision!r}, got {tolerance!r}")
    y, product, measured = linear_on_gpu(x, weight, bias, tolerance, precision, return_report)
    if not return_report:
        return y
    rows = tuple(map(int, x.shape[:-1]))
    return y, LinearReport(np.full(rows, product), np.full(rows, np.nan), measured)


def _by_name(precision: str, tolerance: float | None) -> int:
    if precision not in LADDER:
        choices = ", ".join(map(repr, LADDER))
        raise ArgumentError(f"precision: expected 'auto' or one of {choices}, got {precision!r}")
    if tolerance is not None:
        raise ArgumentError(f"tolerance: expected None beside precision={precision!r}, got {tolerance!r}")
    return LADDER.index(precision)


def _check(x: _Array, weight: _Array, bias: Any) -> None:
    if x.dtype not in (np.float32, np.float64):
        raise DTypeError(f"x: expected float32, float64, float16 or bfloat16, got {x.dtype}")
    if weight.ndim != 2 or not weight.size:
        raise ShapeError(f"weight: expected shape (N, K) with N, K >= 1, got {weight.shape}")
    N, K = weight.shape
    if not x.ndim or x.shape[-1] != K:
        raise ShapeError(f"x: expected shape (..., {K}), got {x.shape}")
    for name, a in (("weight", weight), ("bias", bias)):
        kind = None if a is None else getattr(a, "dtype", type(a).__name__)
        if a is not None and kind != x.dtype:
            raise DTypeError(f"{name}: expected an array of {x.dtype}, like x, got {kind}")
    if bias is not None and bias.shape != (N,):
        raise ShapeError(f"bias: expected shape ({N},), got {bias.shape}")


def _by_blas(x: _Array, weight: _Array, bias: _Array | None, rung: int) -> _Array:
    kind = np.float64 if rung == _FP64 else x.dtype
    flat = x.reshape(-1, x.shape[-1]).astype(kind, copy=False)
    y: _Array = flat @ weight.T.astype(kind, copy=False)
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], len(weight)).astype(x.dtype, copy=False)


@np.errstate(all="ignore")
def _measured(x: _Array, weight: _Array, bias: _Array | None, y: _Array) -> float:
    """Relative error of y, from up to 16 of its features in float64."""
    N, K = weight.shape
    at = np.random.default_rng(0).permutation(N)[:16]
    exact = x.reshape(-1, K).astype(np.float64) @ weight[at].T.astype(np.float64)
    if bias is not None:
        exact += bias[at]
    # The output's own rounding is no error of the product.
    wrong = np.linalg.norm(y.reshape(-1, N)[:, at] - exact.astype(y.dtype).astype(np.float64))
    return float(wrong / np.linalg.norm(exact)) if wrong else 0.0
