"""What tells attention where a token stands: rotary positions and the slopes of ALiBi."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArgumentError
from .module import Array


def rotary(x: Array, base: float = 10_000.0, offset: int = 0) -> Array:
    """Rotate (B, H, T, D) by position, counted from `offset`; coordinates j and j + D/2 form a pair.

    Pair j turns by position · base^(-2j/D) (Su et al. 2021, arXiv:2104.09864). Angles are float64, the result
    has x's dtype.
    """
    if x.shape[3] % 2:
        raise ArgumentError(f"x: expected an even head size, got {x.shape[3]}")
    turned = x.swapaxes(1, 2).copy()
    turn(turned, *_waves(x.shape[3] // 2, base, x.dtype, np.arange(offset, offset + x.shape[2])))
    result: Array = turned.swapaxes(1, 2)
    return result


def turn(heads: Array, cos: Array, sin: Array) -> None:
    """Rotate (B, T, H, D), in place, by `factors`; with -sin back."""
    pairs = heads.reshape(*heads.shape[:3], 2, -1)  # a view, as it splits an axis
    swapped = pairs[..., ::-1, :] * sin
    pairs *= cos
    pairs += swapped


def factors(
    head_size: int, base: float, dtype: np.dtype[Any], positions: NDArray[np.integer] | slice
) -> tuple[Array, Array]:
    """Cosines and signed sines for `turn` at positions (B, T) from 0 on, or at a slice of them."""
    last = positions.stop if isinstance(positions, slice) else int(positions.max(initial=0)) + 1
    cos, sin = _table(head_size // 2, base, dtype, 1 << (last - 1).bit_length())
    return cos[positions], sin[positions]


@lru_cache(maxsize=8)
def _table(half: int, base: float, dtype: np.dtype[Any], count: int) -> tuple[Array, Array]:
    return _waves(half, base, dtype, np.arange(count))


def _waves(
    half: int, base: float, dtype: np.dtype[Any], positions: NDArray[np.integer]
) -> tuple[Array, Array]:
    """(T, 1, 1, half) and, for the two halves of a head, (T, 1, 2, half)."""
    angle = positions[:, None, None, None] * base ** (-np.arange(half) / half)
    sin = np.sin(angle)
    return np.cos(angle).astype(dtype), np.concatenate([-sin, sin], axis=2).astype(dtype)


def alibi_slopes(num_heads: int) -> NDArray[np.float64]:
    """2^(-8 h / H) for h = 1 … H; between powers of two those of the next lower one, then every other one of
    the next higher (Press et al. 2021, arXiv:2108.12409)."""
    whole = 1 << (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * np.arange(1, whole + 1) / whole)
    if whole == num_heads:
        return slopes
    between = 2.0 ** (-4 * np.arange(1, 2 * whole, 2) / whole)
    return np.concatenate([slopes, between[: num_heads - whole]])
