"""The block that a model repeats: attention and a feed-forward network, with norms and residuals."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..cache import KVCache
from .attention import attention
from .layers import NORMS, Dropout, FeedForward, LayerNorm, RMSNorm
from .module import Array, Module, Seed, one_of


class TransformerBlock(Module):
    """Attention and a feed-forward network, each with a norm and a residual: (B, T, C) -> (B, T, C).

    "pre" is x + attn(norm1(x)), then x + mlp(norm2(x)); "post" is norm1(x + attn(x)), then norm2(x + mlp(x)).
    `attn` is an `AdaptivePrecisionAttention` where the further options, which are its, hold a policy or a
    tolerance, and else a `DenseAttention`.

    Parameters
    ----------
    embed_dim, num_heads : int
        C and H.
    ffn_dim, activation
        Of `FeedForward`.
    norm : "rmsnorm" or "layernorm"
    norm_position : "pre" or "post"
    norm_eps : float, optional
        Default 2^-23 for "rmsnorm" and 1e-5 for "layernorm".
    bias : bool
        Whether projections have one.
    dropout : float
        Share of attention's probabilities, and of the numbers that each branch adds, dropped in training.
    dtype : dtype
        Of the parameters: float32 or float64.
    seed : int or numpy.random.Generator, optional
        Source of the initial weights and of dropout.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        ffn_dim: int | None = None,
        activation: str = "gelu",
        norm: str = "rmsnorm",
        norm_position: str = "pre",
        norm_eps: float | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        dtype: DTypeLike = np.float32,
        seed: Seed = None,
        **options: Any,
    ) -> None:
        one_of("norm_position", norm_position, ("pre", "post"))
        rng = np.random.default_rng(seed)
        common: dict[str, Any] = {"bias": bias, "dtype": dtype, "seed": rng}
        self.norm_position = norm_position
        self.norm1 = make_norm(norm, embed_dim, norm_eps, dtype)
        self.attn = attention(embed_dim, num_heads, dropout=dropout, **common, **options)
        self.norm2 = make_norm(norm, embed_dim, norm_eps, dtype)
        self.mlp = FeedForward(embed_dim, ffn_dim, activation=activation, **common)
        self.drop1, self.drop2 = (Dropout(dropout, seed=rng) for _ in range(2))

    def __call__(self, x: Array, cache: KVCache | None = None, lengths: ArrayLike | None = None) -> Array:
        """`cache` and `lengths` are those of attention."""
        if self.norm_position == "pre":
            x = x + self.drop1(self.attn(self.norm1(x), cache, lengths))
            return x + self.drop2(self.mlp(self.norm2(x)))
        x = self.norm1(x + self.drop1(self.attn(x, cache, lengths)))
        return self.norm2(x + self.drop2(self.mlp(x)))

    def backward(self, grad_out: Array) -> Array:
        def mlp(grad: Array) -> Array:
            return self.mlp.backward(self.drop2.backward(grad))

        def attn(grad: Array) -> Array:
            return self.attn.backward(self.drop1.backward(grad))

        if self.norm_position == "pre":
            grad = grad_out + self.norm2.backward(mlp(grad_out))
            return grad + self.norm1.backward(attn(grad))
        grad = self.norm2.backward(grad_out)
        grad = self.norm1.backward(grad + mlp(grad))
        return grad + attn(grad)


def make_norm(kind: str, embed_dim: int, eps: float | None, dtype: DTypeLike) -> RMSNorm | LayerNorm:
    """The norm of that name; None: its own eps."""
    one_of("norm", kind, NORMS)
    return NORMS[kind](embed_dim, dtype=dtype, **({} if eps is None else {"eps": eps}))
