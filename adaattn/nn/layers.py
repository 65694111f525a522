"""Layers that are not attention."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..errors import ArgumentError, DTypeError, ShapeError
from ..products import few_rows
from .activations import ACTIVATIONS, silu
from .module import Array, Module, Packed, Seed, check_dropout, float_type, one_of


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
        kind, shape = float_type(dtype), (out_features, in_features)
        uniform: Array = np.random.default_rng(seed).random(shape, kind.type)
        self.weight: Array = kind.type(in_features**-0.5) * (2 * uniform - 1)
        self.bias = np.zeros(out_features, kind) if bias else None

    def __call__(self, x: Array) -> Array:
        if self.training:
            self._saved = x
        return project(x, self.weight, self.bias, self._packed)

    def _product(self) -> Array:
        return self.weight

    def backward(self, grad_out: Array) -> Array:
        x = self._recall()
        if self.bias is not None:
            gradient = self._gradient("bias")
            gradient += grad_out.reshape(-1, len(self.weight)).sum(axis=0)
        return project_backward(x, self.weight, grad_out, self._gradient("weight"))


def project(x: Array, weight: Array, bias: Array | None = None, packed: Packed | None = None) -> Array:
    """x Wᵀ + b over the last axis, within a tolerance where the weight is packed."""
    kept, tolerance = None, None
    if packed is not None and packed.weight is weight:
        kept, tolerance = packed.kept, packed.tolerance
    few = few_rows(x, weight, bias, kept, tolerance)
    if few is not None:
        return few
    y: Array = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], len(weight))


def project_backward(x: Array, weight: Array, grad_out: Array, weight_gradient: Array) -> Array:
    """Gradient of `project`'s x; that of its weight is added."""
    rows = grad_out.reshape(-1, len(weight))
    weight_gradient += rows.T @ x.reshape(-1, x.shape[-1])
    grad: Array = rows @ weight
    return grad.reshape(x.shape)


class Embedding(Module):
    """Rows of weight (num_embeddings, embed_dim) by token id, drawn from the normal distribution.

    `scale` is the standard deviation, `dtype` that of the parameters: float32 or float64.
    """

    def __init__(
        self,
        num_embeddings: int,
        embed_dim: int,
        *,
        scale: float = 1.0,
        dtype: DTypeLike = np.float32,
        seed: Seed = None,
    ) -> None:
        shape, kind = (num_embeddings, embed_dim), float_type(dtype)
        self.weight: Array = np.random.default_rng(seed).standard_normal(shape, kind.type)
        self.weight *= kind.type(scale)

    def __call__(self, tokens: ArrayLike) -> Array:
        tokens, count = np.asarray(tokens), len(self.weight)
        if tokens.dtype.kind not in "iu":
            raise DTypeError(f"tokens: expected integers, got {tokens.dtype}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= count):
            raise ArgumentError(
                f"tokens: expected ids from 0 to {count - 1}, got {tokens.min()} to {tokens.max()}"
            )
        if self.training:
            self._saved = tokens
        embedded: Array = self.weight[tokens]
        return embedded

    def backward(self, grad_out: Array) -> None:
        """Adds to the weight's gradient; tokens have none."""
        tokens = self._recall().reshape(-1)
        order = np.argsort(tokens, kind="stable")
        rows, starts = np.unique(tokens[order], return_index=True)
        if rows.size:
            sums = np.add.reduceat(grad_out.reshape(tokens.size, -1)[order], starts, axis=0)
            self._gradient("weight")[rows] += sums


class RMSNorm(Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, embed_dim: int, *, eps: float = 2.0**-23, dtype: DTypeLike = np.float32) -> None:
        self.weight = np.ones(embed_dim, float_type(dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        if not self.training and x.size == x.shape[-1]:  # one row: fewer calls
            row = x.reshape(-1)
            x = x * (row.dot(row) / row.size + self.eps) ** -0.5
        else:
            mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
            root = np.sqrt(mean_square + x.dtype.type(self.eps))
            if self.training:
                self._saved = x, root
            x = x / root
        y: Array = x * self.weight
        return y

    def backward(self, grad_out: Array) -> Array:
        x, root = self._recall()
        x = x / root
        gradient = self._gradient("weight")
        gradient += np.sum((grad_out * x).reshape(-1, x.shape[-1]), axis=0)
        grad: Array = grad_out * self.weight
        grad -= x * np.mean(grad * x, axis=-1, keepdims=True)
        grad /= root
        return grad


class LayerNorm(Module):
    """(x - mean(x)) / sqrt(var(x) + eps) · weight + bias over the last axis (Ba et al. 2016,
    arXiv:1607.06450)."""

    def __init__(self, embed_dim: int, *, eps: float = 1e-5, dtype: DTypeLike = np.float32) -> None:
        self.weight = np.ones(embed_dim, float_type(dtype))
        self.bias = np.zeros(embed_dim, self.weight.dtype)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        x = x - x.mean(axis=-1, keepdims=True)
        root = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + x.dtype.type(self.eps))
        x /= root
        if self.training:
            self._saved = x, root
        y: Array = x * self.weight + self.bias
        return y

    def backward(self, grad_out: Array) -> Array:
        x, root = self._recall()
        for name, product in (("weight", grad_out * x), ("bias", grad_out)):
            gradient = self._gradient(name)
            gradient += product.reshape(-1, x.shape[-1]).sum(axis=0)
        grad: Array = grad_out * self.weight
        grad -= grad.mean(axis=-1, keepdims=True) + x * np.mean(grad * x, axis=-1, keepdims=True)
        grad /= root
        return grad


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class Dropout(Module):
    """In training zeroes numbers with probability `p` and divides the others by 1 - p; draws of its own."""

    def __init__(self, p: float, *, seed: Seed = None) -> None:
        check_dropout(p)
        self.p = p
        self._rng = np.random.default_rng(seed)

    def __call__(self, x: Array) -> Array:
        if not (self.training and self.p):
            return x
        kept = self._rng.random(x.shape, np.float32) >= self.p
        self._saved = factor = kept * x.dtype.type(1 / ((1 - self.p) or 1))
        y: Array = x * factor
        return y

    def backward(self, grad_out: Array) -> Array:
        if not self.p:
            return grad_out
        grad: Array = grad_out * self._recall()
        return grad


class FeedForward(Module):
    """down(activation(up(x))), or with "swiglu" down(silu(gate(x)) · up(x)) (Shazeer 2020,
    arXiv:2002.05202).

    Parameters
    ----------
    embed_dim : int
        Features of inputs and outputs.
    ffn_dim : int, optional
        Features between; default 4 · embed_dim, with "swiglu" 8/3 of embed_dim, up to the next multiple of 8.
    activation : "gelu", "gelu_tanh", "silu", "relu", "relu2" or "swiglu"
        The exact GELU, its approximation by tanh, x · sigmoid(x), max(x, 0), its square, or gated.
    bias : bool
        Whether the projections have one.
    dtype : dtype
        Of the parameters: float32 or float64.
    seed : int or numpy.random.Generator, optional
        Source of the initial weights.
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        dtype: DTypeLike = np.float32,
        seed: Seed = None,
    ) -> None:
        one_of("activation", activation, (*ACTIVATIONS, "swiglu"))
        rng, gated = np.random.default_rng(seed), activation == "swiglu"
        if ffn_dim is None:
            ffn_dim = -(-8 * embed_dim // 24) * 8 if gated else 4 * embed_dim
        self.activation = "silu" if gated else activation
        self.up = Linear(embed_dim, ffn_dim, bias=bias, dtype=dtype, seed=rng)
        if gated:
            self.gate = Linear(embed_dim, ffn_dim, bias=bias, dtype=dtype, seed=rng)
        self.down = Linear(ffn_dim, embed_dim, bias=bias, dtype=dtype, seed=rng)
        self.gated = gated

    def __call__(self, x: Array) -> Array:
        up, gate = self.up(x), self.gate(x) if self.gated else None
        if self.training:
            self._saved = up, gate
        if gate is None:
            return self.down(ACTIVATIONS[self.activation].function(up))
        return self.down(silu(gate) * up)

    def backward(self, grad_out: Array) -> Array:
        up, gate = self._recall()
        grad, gradient = self.down.backward(grad_out), ACTIVATIONS[self.activation].gradient
        if gate is None:
            return self.up.backward(gradient(up, grad))
        return self.up.backward(grad * silu(gate)) + self.gate.backward(gradient(gate, grad * up))


def check_features(x: Array, embed_dim: int) -> None:
    """Refuse what is not (B, T, embed_dim)."""
    if x.ndim != 3 or x.shape[2] != embed_dim:
        raise ShapeError(f"x: expected shape (B, T, {embed_dim}), got {x.shape}")
