"""The language model, or encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..cache import KVCache
from ..errors import ArgumentError, ShapeError
from . import files, generation
from .attention import token_positions
from .block import TransformerBlock, make_norm
from .layers import (
    Dropout,
    Embedding,
    Linear,
    project,
    project_backward,
)
from .module import Array, Module, Seed, at_least_one, float_type, one_of
from .stats import AttentionStatistics, ModelStatistics, Tally

_ABOUT = "head_size", "rotary_style", "max_trained_length"  # in configs, besides options

POSITIONS = ("rotary", "learned", "alibi", "none")


class Transformer(Module):
    """Language model, or encoder where it is not causal: token ids (B, T) -> logits (B, T, vocab_size).

    The logits at a position are the next token's (without `causal`: its own). The defaults are the reference
    model: with a vocabulary of 256 it has 3.3 million parameters. Further options are those of attention,
    such as `collect_statistics`; with a policy or a tolerance every layer keeps it.

    Parameters
    ----------
    vocab_size : int
        Token ids are 0 to vocab_size - 1.
    num_layers, num_heads, embed_dim : int
        Blocks, heads and features.
    max_seq_len : int
        Positions of the table where they are learned; the other kinds take any length.
    num_kv_heads : int, optional
        Heads of keys and values (grouped-query attention); default num_heads.
    ffn_dim, activation, norm, norm_position, norm_eps, bias, dropout, dtype
        Of `TransformerBlock`. After "pre" blocks comes one more norm, and dropout applies to the sum of the
        embeddings too.
    causal : bool
        Whether a position sees itself and the past only (decoder), or all (encoder).
    positions : "rotary", "learned", "alibi" or "none"
        What tells the model where a token stands.
    rotary_base : float
        Of rotary positions.
    tied_embeddings : bool
        Whether the output projection's weight is the embedding's; else it has its own. It has no bias.
    seed : int or numpy.random.Generator, optional
        Source of the initial weights and of dropout.

    Attributes
    ----------
    config : dict
        The options above that a model file keeps, of JSON types.

    Examples
    --------
    >>> from adaattn import nn
    >>> model = nn.Transformer(256, seed=0)
    >>> logits = model([[72, 105]])
    >>> loss, grad = nn.cross_entropy(logits, [[105, 33]])
    >>> model.backward(grad)
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        num_layers: int = 4,
        num_heads: int = 8,
        embed_dim: int = 256,
        max_seq_len: int = 512,
        num_kv_heads: int | None = None,
        ffn_dim: int | None = None,
        activation: str = "gelu",
        norm: str = "rmsnorm",
        norm_position: str = "pre",
        norm_eps: float | None = None,
        causal: bool = True,
        positions: str = "rotary",
        rotary_base: float = 10_000.0,
        tied_embeddings: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        dtype: DTypeLike = np.float32,
        seed: Seed = None,
        **options: Any,
    ) -> None:
        one_of("positions", positions, POSITIONS)
        at_least_one(vocab_size=vocab_size, num_layers=num_layers, max_seq_len=max_seq_len)
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "embed_dim": embed_dim,
            "max_seq_len": max_seq_len,
            "num_kv_heads": num_kv_heads,
            "ffn_dim": ffn_dim,
            "activation": activation,
            "norm": norm,
            "norm_position": norm_position,
            "norm_eps": norm_eps,
            "causal": causal,
            "positions": positions,
            "rotary_base": rotary_base,
            "tied_embeddings": tied_embeddings,
            "bias": bias,
            "dropout": dropout,
            "dtype": float_type(dtype).name,
        }
        rng = np.random.default_rng(seed)
        scale = embed_dim**-0.5 if tied_embeddings else 1.0  # logits of unit variance
        self.embed = Embedding(vocab_size, embed_dim, scale=scale, dtype=dtype, seed=rng)
        if positions == "learned":
            self.positions = Embedding(max_seq_len, embed_dim, scale=scale / 2, dtype=dtype, seed=rng)
        options |= {"rotary_base": rotary_base} if positions == "rotary" else {"alibi": positions == "alibi"}
        self.blocks = [
            TransformerBlock(
                embed_dim,
                num_heads,
                num_kv_heads=num_kv_heads,
                ffn_dim=ffn_dim,
                activation=activation,
                norm=norm,
                norm_position=norm_position,
                norm_eps=norm_eps,
                causal=causal,
                bias=bias,
                dropout=dropout,
                dtype=dtype,
                seed=rng,
                **options,
            )
            for _ in range(num_layers)
        ]
        self.norm = make_norm(norm, embed_dim, norm_eps, dtype) if norm_position == "pre" else None
        self.head = None
        if not tied_embeddings:
            self.head = Linear(embed_dim, vocab_size, bias=False, dtype=dtype, seed=rng)
        self.drop = Dropout(dropout, seed=rng)
        self._gather()

    def __call__(
        self,
        tokens: ArrayLike,
        caches: Sequence[KVCache] | None = None,
        *,
        lengths: ArrayLike | None = None,
    ) -> Array:
        """Logits of token ids (B, T).

        Parameters
        ----------
        tokens : (B, T) ints
        caches : of `caches`, optional
            What came before `tokens`, which are appended.
        lengths : (B,) ints, optional
            How many of the T tokens, the first ones, count; logits at the others have no meaning.
        """
        return self.project(self.hidden(tokens, caches, lengths=lengths))

    def hidden(
        self,
        tokens: ArrayLike,
        caches: Sequence[KVCache] | None = None,
        *,
        lengths: ArrayLike | None = None,
    ) -> Array:
        """What the blocks make of the tokens, (B, T, C), of which `project` makes logits."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2:
            raise ShapeError(f"tokens: expected shape (B, T), got {tokens.shape}")
        x = self.embed(tokens)
        if self.config["positions"] == "learned":
            x = x + self._learned(tokens.shape[1], caches)
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], lengths)
        return x if self.norm is None else self.norm(x)

    def project(self, hidden: Array) -> Array:
        """Logits of what `hidden` returned, or of some positions of it."""
        if self.head is not None:
            return self.head(hidden)
        if self.training:
            self._saved = hidden
        return project(hidden, self.embed.weight, None, self._packed)

    def _product(self) -> Array | None:
        return self.embed.weight if self.head is None else None

    def _learned(self, T: int, caches: Sequence[KVCache] | None) -> Array:
        at = token_positions(None if caches is None else caches[0].lengths, T)
        at = np.arange(at.start, at.stop) if isinstance(at, slice) else at
        last, room = int(at.max(initial=0)), self.config["max_seq_len"]
        if last >= room:
            raise ArgumentError(f"tokens: expected at most {room}, the learned positions, got {last + 1}")
        return self.positions(at)

    def backward(self, grad_out: Array) -> None:
        """Adds the gradients of all parameters, from that of the logits; tokens have none."""
        if self.head is not None:
            grad = self.head.backward(grad_out)
        else:
            weight = self.embed.weight
            grad = project_backward(self._recall(), weight, grad_out, self.embed._gradient("weight"))
        if self.norm is not None:
            grad = self.norm.backward(grad)
        for block in reversed(self.blocks):
            grad = block.backward(grad)
        grad = self.drop.backward(grad)
        if self.config["positions"] == "learned":
            self.positions.backward(grad.sum(axis=0))
        self.embed.backward(grad)

    def caches(
        self, batch: int, capacity: int, *, dtype: str = "fp32", tolerance: float | None = None
    ) -> list[KVCache]:
        """An empty `KVCache` for each layer, with room for `capacity` tokens of each sequence at first."""
        heads = [(block.attn.num_kv_heads, block.attn.head_size) for block in self.blocks]
        options: dict[str, Any] = {"capacity": capacity, "dtype": dtype, "tolerance": tolerance}
        return [KVCache(batch, G, D, **options) for G, D in heads]

    def generate(
        self,
        prompt: ArrayLike | Sequence[ArrayLike],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: Seed = None,
        *,
        stop_tokens: Sequence[int] = (),
        on_tokens: Callable[[NDArray[np.intp]], object] | None = None,
        cache: str | None = "fp32",
        cache_tolerance: float | None = None,
    ) -> NDArray[np.intp] | list[NDArray[np.intp]]:
        """Continue prompts, each by one token after the other, in evaluation mode.

        Keys and values are kept: a new token costs one position's work.

        Parameters
        ----------
        prompt : (B, T) ints, or B sequences of ints of different lengths
            At least one token each.
        max_new_tokens : int
            How many are added, at most.
        temperature : float
            Logits are divided by it before one is drawn; 0 takes the likeliest token.
        top_k : int, optional
            Only so many of the likeliest tokens may be drawn.
        top_p : float, optional
            Only the likeliest tokens that together have this probability, or just above, may be drawn.
        seed : int or numpy.random.Generator, optional
            Of what is drawn; each sequence has a generator of its own, whose seed it draws.
        stop_tokens : sequence of int
            A sequence ends with the first of these.
        on_tokens : callable, optional
            Called with the (B,) tokens of each step as soon as they are known; -1 for sequences that ended.
        cache : "fp32", "fp16", "bf16", "int8", "auto" or None
            What keys and values are kept in, see `KVCache`; None keeps none and reads all again each time.
        cache_tolerance : float, optional
            Relative error that keeping them may cost.

        Returns
        -------
        (B, T + max_new_tokens) array of ints, or list of arrays
            Prompt and new tokens. A list where prompts came as a list or there are stop tokens: sequences
            then differ in length.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError
            Naming the argument, what was expected and what came.
        NumericalError
            The model's logits are not finite.
        """
        choose = generation.Sampler(temperature, top_k, top_p, seed)
        kept = None if cache is None else {"dtype": cache, "tolerance": cache_tolerance}
        if not self.config["causal"]:
            raise ArgumentError("causal: expected a causal model to generate with, got an encoder")
        return generation.generate(self, prompt, max_new_tokens, choose, stop_tokens, on_tokens, kept)

    def per_layer_statistics(self) -> list[AttentionStatistics]:
        """`get_statistics` of each layer's attention; needs the option `collect_statistics=True`."""
        return [block.attn.get_statistics() for block in self.blocks]

    def statistics(self) -> ModelStatistics:
        """Those of all layers, and of the model as a whole, with `table()`, `to_json()` and `plot()`."""
        total = Tally()
        for block in self.blocks:
            total.merge(block.attn._tally)
        layers = {str(i): layer for i, layer in enumerate(self.per_layer_statistics())}
        return ModelStatistics(layers, total.summary())

    def reset_statistics(self) -> None:
        """Forget the calls that were collected in all layers."""
        for block in self.blocks:
            block.attn.reset_statistics()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the parameters and `config` as a safetensors file, which replaces an older one at once.

        Options of attention, such as a policy, are not kept; `load` takes them.
        """
        files.write(path, self.state_dict(), {"config": json.dumps(self.config)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> Transformer:
        """Read a model, in evaluation mode, from a safetensors file with its options as JSON under `config`.

        Further options are those of attention, such as `policy`, or
        replace those of the file, as `dtype` does.

        Raises
        ------
        ArgumentError
            When the file is damaged, has no config, asks for what `Transformer` is not, or its weights do not
            fit.
        """
        state, metadata = files.read(path)
        model = cls.from_config(files.config_of(path, metadata), **options)
        model.load_state_dict(state)
        return model.eval()

    @classmethod
    def from_config(cls, config: dict[str, Any], **options: Any) -> Transformer:
        """A new model with the options of `config`; further ones are `load`'s."""
        config = dict(config)
        about = {name: config.pop(name) for name in _ABOUT if name in config}
        if (style := about.get("rotary_style", "half")) != "half":
            raise ArgumentError(f"config: expected rotary_style 'half', got {style!r}")
        try:
            model = cls(**config | options)
        except TypeError as error:
            raise ArgumentError(f"config: expected the options of Transformer, got {config}") from error
        size = model.blocks[0].attn.head_size
        if (asked := about.get("head_size", size)) != size:
            raise ArgumentError(f"config: expected head_size {size}, got {asked}")
        return model
