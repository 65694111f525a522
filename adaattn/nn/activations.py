"""Activations and their gradients, elementwise, in the dtype of their argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .module import Array

# Φ(-z) = exp(-z²/2) P(z / (z + 3)) for z >= 0, where P is a minimax fit (Lawson's algorithm) of degree 9 with
# relative error 8e-9 up to z = 14, where Φ leaves float32; a variable of this kind is from Shepherd and
# Laframboise 1981 (Math. Comp. 36). Coefficients of u^0 … u^4, and those of u^5 … u^9: products of a matrix,
# as a call of NumPy costs more than its arithmetic on a single token.
_TAIL = np.array(
    [
        [0.50000000113, -1.19682640364, 1.05315043562, -0.28691858334, -0.15903552938],
        [0.06304473757, 0.00764204080, 0.08555027955, -0.09408148094, 0.02748017028],
    ],
    np.float32,
)
_ZERO, _HALF, _THREE = (np.array(x, np.float32) for x in (0, -0.5, 3))
_MOST = np.array(30, np.float32)  # where Φ(-z) is 0 in float32

_BLOCK = 16384  # elements that stay in the second cache while a formula passes over them several times

_ERFC = np.frompyfunc(math.erfc, 1, 1)


def _by_blocks(formula: Callable[..., Array]) -> Callable[..., Array]:
    """The formula, applied to a few thousand elements at a time."""

    def blocked(*arrays: Array) -> Array:
        if arrays[0].size <= _BLOCK:
            return formula(*arrays)
        flat = [np.ascontiguousarray(x).reshape(-1) for x in arrays]
        out = np.empty_like(flat[0])
        for start in range(0, out.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            out[part] = formula(*(x[part] for x in flat))
        return out.reshape(arrays[0].shape)

    blocked.__doc__, blocked.__name__ = formula.__doc__, formula.__name__
    return blocked


def _tail(z: Array) -> Array:
    """Φ(-z) of float32 numbers from 0 to _MOST, to a few roundings."""
    flat = z.reshape(-1)
    powers = np.empty((5, flat.size), np.float32)
    one, u, u2, u3, u4 = powers
    one[...] = 1
    np.divide(flat, flat + _THREE, out=u)
    np.multiply(u, u, out=u2)
    np.multiply(u, u2, out=u3)
    np.multiply(u2, u2, out=u4)
    tail: Array
    tail, high = _TAIL @ powers
    high *= u4
    high *= u
    tail += high
    np.multiply(flat, flat, out=u)
    u *= _HALF
    np.exp(u, out=u)
    tail *= u
    return tail.reshape(z.shape)


@_by_blocks
def gelu(x: Array) -> Array:
    """x Φ(x), the exact GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    In float32 to a few roundings, in float64 by the standard library's erfc, which is slow.
    """
    if x.dtype == np.float64:
        exact: Array = x * _normal_cdf(x)
        return exact
    loss = np.minimum(np.abs(x), _MOST)
    loss *= _tail(loss)
    y: Array = np.maximum(x, _ZERO)
    y -= loss
    return y


def _normal_cdf(x: Array) -> Array:
    if x.dtype == np.float64:
        exact: Array = 0.5 * _ERFC(x * -(0.5**0.5)).astype(np.float64)
        return exact
    tail = _tail(np.minimum(np.abs(x), _MOST))
    return np.where(x < 0, tail, 1 - tail)


@_by_blocks
def _gelu_gradient(x: Array, grad: Array) -> Array:
    density: Array = np.exp(x * x * x.dtype.type(-0.5))
    density *= x * x.dtype.type((2 * math.pi) ** -0.5)
    density += _normal_cdf(x)
    density *= grad
    return density


_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def _inner_tanh(x: Array) -> Array:
    kind = x.dtype.type
    inner: Array = np.tanh(kind(_SLOPE) * x * (1 + kind(_CUBIC) * x * x))
    return inner


@_by_blocks
def gelu_tanh(x: Array) -> Array:
    """The GELU with Φ(x) replaced by (1 + tanh(sqrt(2 / π) (x + 0.044715 x³))) / 2; off by at most 5e-4."""
    half = x * x.dtype.type(0.5)
    y: Array = half * (1 + _inner_tanh(x))
    return y


@_by_blocks
def _gelu_tanh_gradient(x: Array, grad: Array) -> Array:
    kind, t = x.dtype.type, _inner_tanh(x)
    slope = kind(_SLOPE) * (1 + kind(3 * _CUBIC) * x * x)
    result: Array = grad * kind(0.5) * (1 + t + x * (1 - t * t) * slope)
    return result


def _sigmoid(x: Array) -> Array:
    half = x.dtype.type(0.5)
    result: Array = half + half * np.tanh(half * x)
    return result


@_by_blocks
def silu(x: Array) -> Array:
    """x · sigmoid(x), also called swish."""
    return x * _sigmoid(x)


@_by_blocks
def _silu_gradient(x: Array, grad: Array) -> Array:
    s = _sigmoid(x)
    result: Array = grad * (s + x * s * (1 - s))
    return result


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, 0)


def relu2(x: Array) -> Array:
    """max(x, 0)² (So et al. 2021, arXiv:2109.08668)."""
    result: Array = np.square(np.maximum(x, 0))
    return result


class Activation(NamedTuple):
    """A function, and the gradient of its argument from the argument and the gradient of its result."""

    function: Callable[[Array], Array]
    gradient: Callable[[Array, Array], Array]


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(gelu, _gelu_gradient),
    "gelu_tanh": Activation(gelu_tanh, _gelu_tanh_gradient),
    "silu": Activation(silu, _silu_gradient),
    "relu": Activation(relu, lambda x, grad: grad * (x > 0)),
    "relu2": Activation(relu2, lambda x, grad: 2 * grad * relu(x)),
}
