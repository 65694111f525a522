"""Modules of a small Transformer: NumPy arrays in and out, parameters as NumPy arrays, float32 by default.

A module's array attributes are its parameters and its module attributes (or lists of them) its children; the
dotted paths to the parameters are the keys of `state_dict`. Matrix products are NumPy's BLAS, attention is
`adaattn.attention`. Sources: Su et al. 2021 (arXiv:2104.09864) for rotary positions, Touvron et al. 2023
(arXiv:2302.13971) for pre-norm blocks with RMSNorm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import api
from .errors import ArgumentError, DTypeError, ShapeError
from .nn_stats import AttentionStatistics, Tally
from .rates import RUNGS
from .stats import POLICIES, Plan, Report, tolerance_of

if TYPE_CHECKING:
    from typing_extensions import Self

Seed = int | np.random.Generator | None
_Array = NDArray[Any]


class Module:
    """Base of all modules; `training` says whether dropout is applied."""

    training = True

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Direct children with their paths, in the order of their creation."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", module) for i, module in enumerate(value))

    def train(self, mode: bool = True) -> Self:
        """Switch the module and its children to training (with False: to evaluation); returns the module."""
        self.training = mode
        for _, child in self.named_children():
            child.train(mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation: no dropout."""
        return self.train(False)

    def state_dict(self) -> dict[str, _Array]:
        """Parameters by dotted path: the arrays themselves, not copies."""
        state = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        for name, child in self.named_children():
            state |= {f"{name}.{key}": value for key, value in child.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Copy `state` into the parameters, cast to their dtype; nothing is changed when it does not fit.

        Raises
        ------
        ArgumentError
            When a parameter's key is missing or a key names no parameter.
        ShapeError
            When an array's shape is not its parameter's.
        """
        own = self.state_dict()
        if missing := own.keys() - state.keys():
            raise ArgumentError(
                f"state: expected every parameter of the module, got none for {_join(missing)}"
            )
        if foreign := state.keys() - own.keys():
            raise ArgumentError(f"state: expected only parameters of the module, got {_join(foreign)}")
        for key, parameter in own.items():
            if (shape := np.shape(state[key])) != parameter.shape:
                raise ShapeError(f"state: expected {key} of shape {parameter.shape}, got {shape}")
        for key, parameter in own.items():
            parameter[...] = state[key]

    def parameters(self) -> list[_Array]:
        """The parameters, in the order of `state_dict`."""
        return list(self.state_dict().values())

    def num_parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(parameter.size for parameter in self.parameters())


def _join(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


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
        uniform: _Array = np.random.default_rng(seed).random(shape, kind.type)  # type: ignore[arg-type]
        self.weight: _Array = kind.type(in_features**-0.5) * (2 * uniform - 1)
        self.bias = np.zeros(out_features, kind) if bias else None

    def __call__(self, x: _Array) -> _Array:
        y: _Array = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Embedding(Module):
    """Rows of weight (num_embeddings, embed_dim) by token id, drawn from the standard normal distribution."""

    def __init__(self, num_embeddings: int, embed_dim: int, *, seed: Seed = None) -> None:
        self.weight = np.random.default_rng(seed).standard_normal((num_embeddings, embed_dim), np.float32)

    def __call__(self, tokens: ArrayLike) -> _Array:
        tokens, count = np.asarray(tokens), len(self.weight)
        if tokens.dtype.kind not in "iu":
            raise DTypeError(f"tokens: expected integers, got {tokens.dtype}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= count):
            raise ArgumentError(
                f"tokens: expected ids from 0 to {count - 1}, got {tokens.min()} to {tokens.max()}"
            )
        embedded: _Array = self.weight[tokens]
        return embedded


class RMSNorm(Module):
    """x / sqrt(mean(x²) + eps) · weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, embed_dim: int, *, eps: float = 2.0**-23) -> None:
        self.weight = np.ones(embed_dim, np.float32)
        self.eps = eps

    def __call__(self, x: _Array) -> _Array:
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
        y: _Array = x / np.sqrt(mean_square + np.float32(self.eps)) * self.weight
        return y


def rotary(x: _Array, base: float = 10_000.0, offset: int = 0) -> _Array:
    """Rotate (B, H, T, D) by position, counted from `offset`; coordinates j and j + D/2 form a pair.

    Pair j turns by position · base^(-2j/D). Angles are float64, the result has x's dtype.
    """
    T, (half, odd) = x.shape[2], divmod(x.shape[3], 2)
    if odd:
        raise ArgumentError(f"x: expected an even head size, got {x.shape[3]}")
    angle = np.arange(offset, offset + T)[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class DenseAttention(Module):
    """Multi-head attention, exact, with grouped keys and values: (B, T, C) -> (B, T, C).

    The rows of `qkv.weight` are queries, keys and values, each by head and then by coordinate; all attention
    modules have the same parameters, so `load_state_dict` moves them between modules. Results have NumPy's
    common type of `x` and the parameters. `attend` computes the attention: `adaattn.attention`, unless
    replaced by a function of the same signature.

    Statistics are collected while `collect_statistics`, an option and an attribute, is True; they come from
    the reports of the calls. Otherwise no report is made.

    Parameters
    ----------
    embed_dim, num_heads : int
        C and H; the head size is C / H.
    num_kv_heads : int, optional
        G, a divisor of H; default H.
    causal : bool
        Whether a position attends to itself and the past only.
    dropout : float
        Share of the probabilities dropped in training, with seeds from the module's own generator.
    bias : bool
        Whether the two projections have one.
    dtype : dtype
        Of the parameters: float32 or float64.
    rotary_base : float, optional
        Base of rotary positions; None: no positions.
    collect_statistics : bool
        Whether calls count in `get_statistics`.
    seed : int or numpy.random.Generator, optional
        Source of the initial weights and of dropout's seeds.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
        rotary_base: float | None = None,
        collect_statistics: bool = False,
        seed: Seed = None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, count in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if count < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {count}")
        if embed_dim % num_heads:
            raise ArgumentError(f"embed_dim: expected a multiple of the {num_heads} heads, got {embed_dim}")
        if num_heads % num_kv_heads:
            raise ArgumentError(f"num_kv_heads: expected a divisor of {num_heads} heads, got {num_kv_heads}")
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, embed_dim // num_heads
        self.causal, self.dropout, self.rotary_base = causal, dropout, rotary_base
        self.collect_statistics, self._tally = collect_statistics, Tally()
        self._rng = np.random.default_rng(seed)
        rows = (num_heads + 2 * num_kv_heads) * self.head_size
        self.qkv = Linear(embed_dim, rows, bias=bias, dtype=dtype, seed=self._rng)
        self.out = Linear(embed_dim, embed_dim, bias=bias, dtype=dtype, seed=self._rng)
        self.attend: Callable[..., Any] = api.attention

    def __call__(self, x: _Array, cache: _Cache | None = None) -> _Array:
        embed_dim = self.num_heads * self.head_size
        if x.ndim != 3 or x.shape[2] != embed_dim:
            raise ShapeError(f"x: expected shape (B, T, {embed_dim}), got {x.shape}")
        B, T, C = x.shape
        heads = self.qkv(x).reshape(B, T, -1, self.head_size).transpose(0, 2, 1, 3)
        query, key, value = np.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=1)
        if self.rotary_base is not None:
            offset = 0 if cache is None else cache.length
            query, key = rotary(query, self.rotary_base, offset), rotary(key, self.rotary_base, offset)
        if cache is not None:
            key, value = cache.append(key, value)
        options: dict[str, Any] = {"causal": self.causal}
        if self.training and self.dropout:
            options |= {"dropout_p": self.dropout, "seed": int(self._rng.integers(2**63))}
        heads = self._attend(query, key, value, options)
        return self.out(heads.transpose(0, 2, 1, 3).reshape(B, T, C))

    def _attend(self, query: _Array, key: _Array, value: _Array, options: dict[str, Any]) -> _Array:
        if not self.collect_statistics:
            out: _Array = self.attend(query, key, value, **options)
            return out
        out, report = self.attend(query, key, value, **options, return_report=True)
        self._tally.add(report, planned=False)
        return out

    def get_statistics(self) -> AttentionStatistics:
        """What the calls collected since the last reset were computed with.

        Raises
        ------
        ArgumentError
            `collect_statistics` is off and nothing was collected.
        """
        if not self.collect_statistics and not self._tally.calls:
            raise ArgumentError("collect_statistics: expected True before the calls to be told of, got False")
        return self._tally.summary()

    def get_precision_statistics(self) -> dict[str, Any]:
        """Rungs of the collected calls, and of the machine.

        Returns
        -------
        dict
            ``call_count``, ``precision_usage`` (rung to number of heads computed with it) and
            ``hardware_support`` (rung to whether this machine offers it: whether it is faster here than every
            more exact one).

        Raises
        ------
        ArgumentError
            As `get_statistics`.
        """
        offered = api.cpu_info()["rates"]["offered"]
        return {
            "call_count": self.get_statistics().call_count,
            "precision_usage": dict(self._tally.heads),
            "hardware_support": {rung: rung in offered for rung in RUNGS},
        }

    def reset_statistics(self) -> None:
        """Forget the calls collected so far."""
        self._tally = Tally()


class AdaptivePrecisionAttention(DenseAttention):
    """Attention in the cheapest precision that keeps an error budget, chosen for every head and verified.

    Parameters, inputs and outputs are `DenseAttention`'s. Every call plans by itself, so that its result
    depends on its input alone, unless `replan_every` is given: then a plan serves that many calls in a row.

    Parameters
    ----------
    embed_dim, num_heads : int
        C and H; the head size is C / H.
    policy : "quality", "balanced" or "speed", optional
        Name of a tolerance: 1e-5, 1e-2, 5e-2.
    tolerance : float, optional
        Largest relative error of a head's output; with neither it nor a policy: "balanced".
    min_precision, max_precision : str
        The cheapest and the dearest rung that may be chosen, as in `adaattn.attention`.
    replan_every : int, optional
        A plan serves this many calls of the same sizes, the first of which made it; each is verified, and its
        report read. A new plan is made when they are over, when sizes change, and after a call that measured
        an error above the tolerance or had to retry a head. Decoding, with growing keys, plans every call.
        Plans do not carry `max_precision`: a head that is retried under an earlier one may go above it.
    **options
        `DenseAttention`'s.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        policy: str | None = None,
        tolerance: float | None = None,
        min_precision: str = "auto",
        max_precision: str = "auto",
        replan_every: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        if replan_every is not None and replan_every < 1:
            raise ArgumentError(f"replan_every: expected at least 1, got {replan_every}")
        self._replan_every = replan_every
        self._limits: dict[str, Any] = {"min_precision": min_precision, "max_precision": max_precision}
        self._set_tolerance(tolerance_of(tolerance, policy))

    @property
    def tolerance(self) -> float:
        """Largest relative error of a head's output."""
        return self._tolerance

    def set_precision_policy(self, policy: str | None) -> None:
        """Take the tolerance that `policy` names ("quality", "balanced" or "speed"); None: "balanced"."""
        self._set_tolerance(tolerance_of(None, policy))

    def _set_tolerance(self, tolerance: float | None) -> None:
        tolerance = POLICIES["balanced"] if tolerance is None else tolerance
        anything = np.ones((1, 1, 1, 1), np.float32)
        api.plan(anything, anything, anything, tolerance=tolerance, **self._limits)  # refuses what is wrong
        self._tolerance: float = tolerance
        self._plan: Plan | None = None
        self._plan_sizes: Any = None
        self._plan_calls = 0

    def _attend(self, query: _Array, key: _Array, value: _Array, options: dict[str, Any]) -> _Array:
        budget: dict[str, Any] = {"tolerance": self._tolerance, **self._limits}
        if self._replan_every is None and not self.collect_statistics:
            out: _Array = self.attend(query, key, value, **options, **budget)
            return out
        sizes = query.shape, key.shape, value.shape, query.dtype
        plan = self._plan if sizes == self._plan_sizes else None
        if plan is not None:
            budget = {"plan": plan}
        out, report = self.attend(query, key, value, **options, **budget, return_report=True)
        if self.collect_statistics:
            self._tally.add(report, planned=plan is None)
        if self._replan_every is not None:
            self._plan_calls = 1 if plan is None else self._plan_calls + 1
            self._plan, self._plan_sizes = self._kept_plan(report), sizes
        return out

    def _kept_plan(self, report: Report) -> Plan | None:
        """The call's plan, if it may serve another one."""
        missed = report.retried.any() or (report.measured_error > self._tolerance).any()
        return None if missed or self._plan_calls == self._replan_every else report.plan


def _attention(
    embed_dim: int,
    num_heads: int,
    *,
    policy: str | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> DenseAttention:
    """An adaptive module where there is a budget, else an exact one."""
    if policy is None and tolerance is None:
        return DenseAttention(embed_dim, num_heads, **options)
    return AdaptivePrecisionAttention(embed_dim, num_heads, policy=policy, tolerance=tolerance, **options)


class _Cache:
    """One layer's past keys and values, filled from the front of arrays of fixed capacity."""

    def __init__(self, attention: DenseAttention, batch: int, capacity: int) -> None:
        shape = (batch, attention.num_kv_heads, capacity, attention.head_size)
        dtype = attention.qkv.weight.dtype
        self.key, self.value = np.empty(shape, dtype), np.empty(shape, dtype)
        self.length = 0

    def append(self, key: _Array, value: _Array) -> tuple[_Array, _Array]:
        """Add (B, G, T, D) at the end; returns views of all that is held."""
        start, self.length = self.length, self.length + key.shape[2]
        self.key[:, :, start : self.length], self.value[:, :, start : self.length] = key, value
        return self.key[:, :, : self.length], self.value[:, :, : self.length]


# Φ(-z) = exp(-z²/2) P(z / (z + 3)) for z >= 0, where P is a minimax fit (Lawson's algorithm) of degree 9 with
# relative error 8e-9 up to z = 14, where Φ leaves float32; a variable of this kind is from Shepherd and
# Laframboise 1981 (Math. Comp. 36).
_TAIL = (
    0.02748017028, -0.09408148094, 0.08555027955, 0.00764204080, 0.06304473757,
    -0.15903552938, -0.28691858334, 1.05315043562, -1.19682640364, 0.50000000113,
)  # fmt: skip


def gelu(x: _Array) -> _Array:
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

    def __call__(self, x: _Array) -> _Array:
        return self.down(gelu(self.up(x)))


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
        self.attn = _attention(embed_dim, num_heads, bias=bias, seed=rng, **options)
        self.norm2 = RMSNorm(embed_dim, eps=norm_eps)
        self.mlp = FeedForward(embed_dim, ffn_dim, bias=bias, seed=rng)

    def __call__(self, x: _Array, cache: _Cache | None = None) -> _Array:
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

    def __call__(self, tokens: ArrayLike, caches: Sequence[_Cache | None] | None = None) -> _Array:
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
        caches = [_Cache(block.attn, B, T + max_new_tokens) for block in self.blocks]
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
