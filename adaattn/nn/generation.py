"""One token after another: drawing them from logits, and the loop around the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ArgumentError, DTypeError, NumericalError, ShapeError
from .module import Array, Seed, integer

if TYPE_CHECKING:
    from .transformer import Transformer

Tokens = NDArray[np.intp]


class Sampler:
    """Draws tokens from logits; see `Transformer.generate`."""

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None, seed: Seed) -> None:
        self.temperature = _number("temperature", temperature)
        self.top_k = None if top_k is None else integer("top_k", top_k, 1)
        self.top_p = None if top_p is None else _number("top_p", top_p)
        if not 0 <= self.temperature < math.inf:
            raise ArgumentError(f"temperature: expected a finite number of at least 0, got {temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p: expected a number above 0 and up to 1, got {top_p}")
        self._rng = np.random.default_rng(seed)
        self._rngs: list[np.random.Generator] = []

    def __call__(self, logits: Array) -> Tokens:
        """One token for each row of (B, V), a row's from its own generator."""
        best = logits.max(axis=-1, keepdims=True)
        if not np.isfinite(best).all():
            raise NumericalError(f"logits: expected finite numbers, got a largest one of {best.ravel()}")
        if not self.temperature:
            likeliest: Tokens = logits.argmax(axis=-1)
            return likeliest
        if not self._rngs:
            seeds = self._rng.integers(2**63, size=len(logits))
            self._rngs = [np.random.default_rng(seed) for seed in seeds]
        order = np.argsort(-logits, axis=-1, kind="stable")[:, : self.top_k]
        below = (np.take_along_axis(logits, order, 1) - best).astype(np.float64)
        with np.errstate(over="ignore"):
            sums = np.exp(below / self.temperature).cumsum(axis=-1)
        drawn = np.empty(len(logits), np.intp)
        for row, (rng, ids, mass) in enumerate(zip(self._rngs, order, sums, strict=True)):
            # The token that reaches top_p is the last one that counts.
            count = len(ids) if self.top_p is None else int(np.searchsorted(mass, self.top_p * mass[-1])) + 1
            at = np.searchsorted(mass[:count], rng.random() * mass[count - 1], side="right")
            drawn[row] = ids[min(int(at), count - 1)]
        return drawn


def generate(
    model: Transformer,
    prompt: ArrayLike | Sequence[ArrayLike],
    max_new_tokens: int,
    choose: Callable[[Array], Tokens],
    stop_tokens: Sequence[int],
    on_tokens: Callable[[Tokens], object] | None,
    cache: dict[str, Any] | None,
) -> Tokens | list[Tokens]:
    """The loop of `Transformer.generate`; `cache` holds options of `KVCache`, None does without."""
    new = integer("max_new_tokens", max_new_tokens, 0)
    tokens, ends = _padded(prompt, new)
    B, longest = len(tokens), int(ends.max())
    rows, ended, stops = np.arange(B), np.zeros(B, bool), _stops(stop_tokens)
    was_training, last = model.training, np.empty(0, np.intp)
    model.eval()
    try:
        caches = None if cache is None or not new else model.caches(B, longest + new, **cache)
        for step in range(new):
            if caches is not None and step:
                hidden = model.hidden(last[:, None], caches)
            else:
                ragged = None if (ends == ends[0]).all() else ends
                hidden = model.hidden(tokens[:, : int(ends.max())], caches, lengths=ragged)
                hidden = hidden[rows, ends - 1][:, None]
            last = choose(model.project(hidden)[:, 0])
            tokens[rows, ends] = last
            ends += ~ended
            if on_tokens is not None:
                on_tokens(np.where(ended, -1, last))
            if stops.size:
                ended |= np.isin(last, stops)
                if ended.all():
                    break
                if ended.any():  # the next token of one that has ended takes the place of its last one
                    for held in caches or ():
                        held.truncate(held.lengths - ended)
    finally:
        model.train(was_training)
    if isinstance(prompt, np.ndarray) and not stops.size:
        return tokens
    return [row[:n] for row, n in zip(tokens, ends, strict=True)]


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DTypeError(f"{name}: expected a number, got {value!r}") from None


def _stops(tokens: Sequence[int]) -> Tokens:
    found = np.asarray(tokens)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise DTypeError(f"stop_tokens: expected a sequence of ints, got {tokens!r}")
    return found.astype(np.intp)


def _padded(prompt: ArrayLike | Sequence[ArrayLike], new: int) -> tuple[Tokens, Tokens]:
    """Prompts side by side with room for new tokens, (B, T + new), and their lengths."""
    expected = "prompt: expected shape (B, T) with B, T >= 1, or sequences of at least one token each"
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 2 or not prompt.size:
            raise ShapeError(f"{expected}, got {prompt.shape}")
        sequences = list(prompt)
    else:
        sequences = [np.asarray(sequence) for sequence in prompt]  # type: ignore[union-attr]
        shapes = [sequence.shape for sequence in sequences]
        if not shapes or any(len(shape) != 1 or shape[0] < 1 for shape in shapes):
            raise ShapeError(f"{expected}, got {shapes}")
    for sequence in sequences:
        if sequence.dtype.kind not in "iu":
            raise DTypeError(f"prompt: expected integers, got {sequence.dtype}")
    lengths = np.array([len(sequence) for sequence in sequences], np.intp)
    tokens = np.zeros((len(sequences), int(lengths.max()) + new), np.intp)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens, lengths
