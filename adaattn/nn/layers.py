"""Layers that are not attention."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..errors import ArgumentError, DTypeError
from .module import Array, Module, Seed


class Linear(Module):
    """y = x Wᵀ + b with weight (out_features, in_features), drawn uniformly from ±1/sqrt(in_features).

    `dtype` is that of the parameters: float32 or float64.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
        seed: Seed = None,
    ) -> None:
        if (kind := np.dtype(dtype)) not in (np.float32, np.float64):
            raise DTypeError(f"dtype: expected float32 or float64, got {kind}")
        shape = out_features, in_features
        uniform: Array = np.random.default_rng(seed).random(shape, kind.type)  # type: ignore[arg-type]
        self.weight: Array = kind.type(in_features**-0.5) * (2 * uniform - 1)
        self.bias = np.zeros(out_features, kind) if bias else None

    def __call__(self, x: Array) -> Array:
        y: Array = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Embedding(Module):
    """Rows of weight (num_embeddings, embed_dim) by token id, drawn from the standard normal distribution."""

    def __init__(self, num_embeddings: int, embed_dim: int, *, seed: Seed = None) -> None:
        self.weight = np.random.default_rng(seed).standard_normal((num_embeddings, embed_dim), np.float32)

    def __call__(self, tokens: ArrayLike) -> Array:
        tokens, count = np.asarray(tokens), len(self.weight)
        if tokens.dtype.kind not in "iu":
            raise DTypeError(f"tokens: expected integers, got {tokens.dtype}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= count):
            raise ArgumentError(
                f"tokens: expected ids from 0 to {count - 1}, got {tokens.min()} to {tokens.max()}"
            )
        embedded: Array = self.weight[tokens]
        return embedded


class RMSNorm(Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, embed_dim: int, *, eps: float = 2.0**-23) -> None:
        self.weight = np.ones(embed_dim, np.float32)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
        y: Array = x / np.sqrt(mean_square + np.float32(self.eps)) * self.weight
        return y


# Φ(-z) = exp(-z²/2) P(z / (z + 3)) for z >= 0, where P is a minimax fit (Lawson's algorithm) of degree 9 with
# relative error 8e-9 up to z = 14, where Φ leaves float32; a variable of this kind is from Shepherd and
# Laframboise 1981 (Math. Comp. 36).
_TAIL = (
    0.02748017028, -0.09408148094, 0.08555027955, 0.00764204080, 0.06304473757,
    -0.15903552938, -0.28691858334, 1.05315043562, -1.19682640364, 0.50000000113,
)  # fmt: skip


def gelu(x: Array) -> Array:
    """x Φ(x), the exact GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415), to a few roundings of float32.

    Φ comes from the complementary error function, as 1 + erf would cancel for negative x.
    """
    u = np.abs(x)
    u /= u + 3
    tail = np.full_like(u, _TAIL[0])
    for coefficient in _TAIL[1:]:
        tail *= u
        tail += np.float32(coefficient)
    tail *= np.exp(np.float32(-0.5) * x * x)
    return x * np.where(x < 0, tail, 1 - tail)


class FeedForward(Module):
    """down(gelu(up(x))), with `ffn_dim` features between; default 4 · embed_dim."""

    def __init__(
        self, embed_dim: int, ffn_dim: int | None = None, *, bias: bool = True, seed: Seed = None
    ) -> None:
        rng = np.random.default_rng(seed)
        ffn_dim = 4 * embed_dim if ffn_dim is None else ffn_dim
        self.up = Linear(embed_dim, ffn_dim, bias=bias, seed=rng)
        self.down = Linear(ffn_dim, embed_dim, bias=bias, seed=rng)

    def __call__(self, x: Array) -> Array:
        return self.down(gelu(self.up(x)))
