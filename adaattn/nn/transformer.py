"""Blocks and the language model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError, ShapeError
from .attention import Cache, attention
from .layers import Embedding, FeedForward, Linear, RMSNorm
from .module import Array, Module, Seed
from .stats import AttentionStatistics


class TransformerBlock(Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): (B, T, C) -> (B, T, C).

    `attn` is an `AdaptivePrecisionAttention` where the further options, which are its, hold a policy or a
    tolerance, and else a `DenseAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        ffn_dim: int | None = None,
        norm_eps: float = 2.0**-23,
        bias: bool = True,
        seed: Seed = None,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.norm1 = RMSNorm(embed_dim, eps=norm_eps)
        self.attn = attention(embed_dim, num_heads, bias=bias, seed=rng, **options)
        self.norm2 = RMSNorm(embed_dim, eps=norm_eps)
        self.mlp = FeedForward(embed_dim, ffn_dim, bias=bias, seed=rng)

    def __call__(self, x: Array, cache: Cache | None = None) -> Array:
        x = x + self.attn(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


# What the config of a model file chooses, and what it may only confirm.
_CHOSEN = ("vocab_size", "num_layers", "num_heads", "embed_dim", "ffn_dim", "bias", "rotary_base", "norm_eps")
_CONFIRMED = {
    "norm": "rmsnorm",
    "activation": "gelu",
    "positions": "rotary",
    "rotary_style": "half",
    "tied_embeddings": False,
    "causal": True,
}


class Transformer(Module):
    """Causal language model with rotary positions: token ids (B, T) -> logits (B, T, vocab_size).

    The logits at a position are the next token's; the output projection has its own weight and no bias.
    Further options are `TransformerBlock`'s: with a policy or a tolerance, attention of every layer keeps it.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        num_layers: int = 4,
        num_heads: int = 8,
        embed_dim: int = 256,
        rotary_base: float = 10_000.0,
        norm_eps: float = 2.0**-23,
        seed: Seed = None,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.embed = Embedding(vocab_size, embed_dim, seed=rng)
        self.blocks = [
            TransformerBlock(
                embed_dim,
                num_heads,
                causal=True,
                rotary_base=rotary_base,
                norm_eps=norm_eps,
                seed=rng,
                **options,
            )
            for _ in range(num_layers)
        ]
        self.norm = RMSNorm(embed_dim, eps=norm_eps)
        self.head = Linear(embed_dim, vocab_size, bias=False, seed=rng)

    def __call__(self, tokens: ArrayLike, caches: Sequence[Cache | None] | None = None) -> Array:
        x = self.embed(tokens)
        caches = [None] * len(self.blocks) if caches is None else caches
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        return self.head(self.norm(x))

    def generate(self, prompt: ArrayLike, max_new_tokens: int) -> NDArray[np.intp]:
        """Continue `prompt`, token ids (B, T) with T >= 1, by the likeliest token each time.

        Returns (B, T + max_new_tokens). Keys and values are kept: a new token costs one position's work.
        """
        prompt = np.asarray(prompt)
        if prompt.ndim != 2 or not prompt.size:
            raise ShapeError(f"prompt: expected shape (B, T) with B, T >= 1, got {prompt.shape}")
        B, T = prompt.shape
        caches = [Cache(block.attn, B, T + max_new_tokens) for block in self.blocks]
        tokens = np.concatenate([prompt, np.zeros((B, max_new_tokens), np.intp)], axis=1)
        start = 0
        for end in range(T, T + max_new_tokens):
            tokens[:, end] = self(tokens[:, start:end], caches)[:, -1].argmax(axis=-1)
            start = end
        return tokens

    def per_layer_statistics(self) -> list[AttentionStatistics]:
        """`get_statistics` of each layer's attention; needs the option `collect_statistics=True`."""
        return [block.attn.get_statistics() for block in self.blocks]

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> Transformer:
        """Read a model, in evaluation mode, from a safetensors file with its options as JSON under `config`.

        Further options are those of attention, such as `policy`.

        Raises
        ------
        ImportError
            Without the safetensors package.
        ArgumentError
            When the file has no config, asks for what `Transformer` is not, or its weights do not fit.
        """
        try:
            from safetensors import safe_open
        except ImportError:
            raise ImportError(
                "safetensors: expected this package to read models, got none; run `pip install adaattn[demo]`"
            ) from None
        with safe_open(path, "numpy") as file:
            metadata, keys = file.metadata() or {}, file.keys()
            state = {key: file.get_tensor(key) for key in keys}
        if "config" not in metadata:
            raise ArgumentError(f"path: expected a file with config in its metadata, got {os.fspath(path)}")
        config = json.loads(metadata["config"])
        for name, value in _CONFIRMED.items():
            if config.get(name, value) != value:
                raise ArgumentError(f"path: expected a model with {name} {value!r}, got {config[name]!r}")
        model = cls(**{name: config[name] for name in _CHOSEN if name in config}, **options)
        model.load_state_dict(state)
        return model.eval()
