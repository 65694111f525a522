"""Matrix products on a GPU: by cuBLAS, from the cheapest numbers that keep an error budget."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import _adaattn
from .api import _allocate, _as_kind_of
from .errors import ArgumentError, DeviceError, ShapeError
from .gpu import capability_for, device_of, open_blas

#: What a product may be computed from, cheap to dear.
LADDER = _adaattn.GPU_PRODUCTS

# Relative errors of products whose terms have no preference, from rounding both operands; of tf32 as if its
# digits were cut off. Each is verified.
_ERRORS = {"fp8": 3.5e-2, "bf16": 2.1e-3, "fp16": 2.7e-4, "tf32": 7.9e-4, "fp32": 1e-6, "fp64": 1e-14}
_MARGIN = 1.25

# TFLOP/s of each, and TB/s of memory, by compute capability; a later chip goes by the newest that is older.
# None of them is measured here: they are what the makers' libraries reach elsewhere. 0: there is none; for
# chips from 11.0 on the backend has code of sm_80 alone, which makes no e4m3.
_RATES: dict[tuple[int, int], dict[str, float]] = {
    (0, 0): {"fp8": 0, "bf16": 0, "fp16": 0, "tf32": 0, "fp32": 10, "fp64": 0.2, "memory": 0.5},
    (8, 0): {"fp8": 0, "bf16": 240, "fp16": 240, "tf32": 120, "fp32": 18, "fp64": 2, "memory": 1.5},
    (8, 9): {"fp8": 280, "bf16": 140, "fp16": 140, "tf32": 70, "fp32": 50, "fp64": 0.5, "memory": 0.9},
    (9, 0): {"fp8": 1200, "bf16": 700, "fp16": 700, "tf32": 380, "fp32": 45, "fp64": 4, "memory": 3},
    (11, 0): {"fp8": 0, "bf16": 300, "fp16": 300, "tf32": 150, "fp32": 60, "fp64": 1, "memory": 1.5},
}
# Bytes of an operand's element that are read and written before the product, by its own size.
_CONVERTED = {"fp8": {4: 9, 2: 5}, "bf16": {4: 6, 2: 0}, "fp16": {4: 10, 2: 0}}
_LAUNCH = 4e-6  # seconds of a conversion that has nothing to do


def _products_of(dtype: str) -> tuple[str, ...]:
    """What arrays of a dtype may be multiplied from."""
    if dtype == "float32":
        return LADDER
    return ("fp64",) if dtype == "float64" else ("fp8", "bf16" if dtype == "bfloat16" else "fp16", "fp64")


def _seconds(product: str, size: int, M: int, N: int, K: int, rates: dict[str, float]) -> float:
    """Predicted; infinite where there is no such product."""
    if not rates[product]:
        return math.inf
    touched = _CONVERTED.get(product, {}).get(size, 0)
    converting = touched * K * (M + N) / (1e12 * rates["memory"]) + _LAUNCH if touched else 0.0
    return converting + 2e-12 * M * N * K / rates[product]


def first_product(
    dtype: str, M: int, N: int, K: int, tolerance: float | None, capability: tuple[int, int]
) -> str:
    """The fastest one that is predicted to keep the tolerance; exact for the dtype without one."""
    products = _products_of(dtype)
    exact = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}.get(dtype, "fp16")
    if tolerance is None:
        return exact
    known = _RATES[max(chip for chip in _RATES if chip <= capability)]
    own = 0.0 if dtype in ("bfloat16", "float16") else _ERRORS[exact]
    size = {"float32": 4, "float64": 8}.get(dtype, 2)
    keep = [p for p in products if (own if p == exact else _ERRORS[p]) * _MARGIN <= tolerance and p != "fp64"]
    return min(keep or [exact], key=lambda product: _seconds(product, size, M, N, K, known))


def linear_on_gpu(
    x: Any, weight: Any, bias: Any, tolerance: float | None, precision: str, measure: bool
) -> tuple[Any, str, float]:
    """`adaattn.linear` of arrays on a GPU: the result, the product that it comes from and its measured error
    (NaN: it was not measured)."""
    if not len(x.shape) or len(weight.shape) != 2 or weight.shape[1] != x.shape[-1] or 0 in weight.shape:
        wanted = x.shape[-1] if len(x.shape) else "K"
        raise ShapeError(
            f"weight: expected shape (N, {wanted}) with N, K >= 1 beside x of shape {tuple(x.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    N, K = map(int, weight.shape)
    if bias is not None and tuple(bias.shape) != (N,):
        raise ShapeError(f"bias: expected shape ({N},), got {tuple(bias.shape)}")
    dtype = str(x.dtype).removeprefix("torch.")
    flat = x.reshape(-1, K)
    M = int(flat.shape[0])
    if precision == "auto":
        product = first_product(dtype, M, N, K, tolerance, capability_for(x, None) or (0, 0))
    elif precision in (names := _products_of(dtype)):
        product = precision
    else:
        choices = ", ".join(map(repr, names))
        raise ArgumentError(
            f"precision: expected 'auto' or one of {choices} on a GPU, for {dtype}, got {precision!r}"
        )
    measure = measure or tolerance is not None
    drawn = np.random.default_rng(0).permutation(N)[:16] if measure else ()
    features = tuple(int(n) for n in drawn)
    row = None if bias is None else bias.reshape(1, N)
    for candidate in LADDER[LADDER.index(product) :]:
        if candidate not in _products_of(dtype):
            continue
        if M and (candidate != "fp64" or dtype == "float64"):
            open_blas(device_of(x) or 0)
        done = _adaattn._gpu_linear(flat, weight, row, LADDER.index(candidate), features, _allocate)
        if done is None and precision != "auto":
            raise DeviceError(
                f"precision: expected a product that this GPU and cuBLAS have, got {precision!r}"
            )
        if done is None:
            continue
        y, error = done
        if tolerance is None or candidate == "fp64" or error <= tolerance:
            break
    else:
        raise DeviceError(f"x: expected a dtype of which this GPU and cuBLAS have products, got {dtype}")
    return _as_kind_of(x, y).reshape(*map(int, x.shape[:-1]), N), candidate, error
