"""Heads to measure errors on: those of the package's benchmark suite, and ones that are made to be hard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from adaattn.bench.heads import Array, Heads, bundled, errors, gaussian, minilm

__all__ = ["HARD", "SIGMAS", "Array", "Heads", "adversarial", "bundled", "errors", "gaussian", "minilm"]

#: Standard deviations of scores: from diffuse rows to nearly one-hot ones.
SIGMAS = (0.3, 0.5, 1.0, 2.0, 4.0, 8.0)


def adversarial(T: int = 512, S: int = 512, D: int = 64, *, seed: int = 0) -> Iterator[Heads]:
    """Heads that break what is careless, one at a time: T, S >= 8 and D >= 4.

    Each case draws from a stream of its own, so it stays the same when others come and go.
    """
    for name, make in HARD.items():
        rng = np.random.default_rng([seed, *name.encode()])
        q, k, v = (rng.standard_normal((n, D), np.float32) for n in (T, S, S))
        make(q, k, v, rng)
        yield Heads(name, q[None, None], k[None, None], v[None, None])


def _outlier_key_channel(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    k[:, 1] *= 20


def _outlier_channels(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    k[:, 1] *= 20
    q[:, 2] *= 20


def _common_mean(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    k += 30 * rng.standard_normal(k.shape[1], np.float32)


def _extreme_row(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    q[len(q) // 3] *= 1000


def _hard_rows(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    q[rng.choice(len(q), -(-len(q) // 100), replace=False)] *= 30


def _one_hot(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    """The chosen key's score is 3 above the logarithm of the number of others: it has 95 % of the mass."""
    _point(q, k, rng.integers(0, len(k), len(q)))


def _duplicates(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    k[:] = k[rng.integers(0, -(-len(k) // 16), len(k))]


def _range_of_keys(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    v *= 10 ** rng.uniform(-6, 6, (len(v), 1)).astype(np.float32)


def _range_of_channels(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    v *= np.geomspace(1e-6, 1e6, v.shape[1], dtype=np.float32)


def _heavy_tails(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    for x in (q, k, v):
        x[:] = rng.standard_t(2, x.shape)


def _cancellation(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    """Keys come twice, with values that differ in sign and in the third digit, far apart in memory."""
    order, half = rng.permutation(len(k)), len(k) // 2
    a, b = order[:half], order[half : 2 * half]
    k[b] = k[a]
    v[b] = -v[a] * (1 + np.float32(1e-3) * v[b])
    v[order[2 * half :]] = 0


def _tie(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    """Two different keys share the mass of every row evenly, until rounding tips the balance."""
    u, w = rng.standard_normal((2, q.shape[1]), np.float32)
    w -= u * (u @ w) / (u @ u)
    q -= np.outer(q @ w, w) / (w @ w)
    q *= 0.3
    q += u
    middle = u * _height(k) / (u @ u)
    k[len(k) // 3], k[2 * len(k) // 3] = middle + 10 * w, middle - 10 * w


def _needle(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    """One row sees one key, with a value as large as four; the others see all keys alike."""
    q *= 0.1
    row, column = len(q) // 3, len(k) // 2
    _point(q[row : row + 1], k, np.array([column]), above=12)
    v[column] *= 4


def _height(k: Array, above: float = 3) -> Any:
    """q·k of a score that is `above` over the logarithm of the number of keys."""
    return np.float32((np.log(len(k)) + above) * np.sqrt(k.shape[1]))


def _point(q: Array, k: Array, targets: Array, above: float = 3) -> None:
    """Turn each query to one key, and keep a little noise."""
    chosen = k[targets]
    q *= 0.1
    q += chosen * _height(k, above) / np.sum(chosen * chosen, axis=1, keepdims=True)


#: Names of the hard cases, and what makes them of normal q (T, D), k and v (S, D), in place.
HARD: dict[str, Callable[[Array, Array, Array, np.random.Generator], None]] = {
    "outlier channel of keys": _outlier_key_channel,
    "outlier channels of keys and queries": _outlier_channels,
    "keys with a common mean": _common_mean,
    "a query of extreme norm": _extreme_row,
    "one percent of hard rows": _hard_rows,
    "nearly one-hot rows": _one_hot,
    "duplicated keys": _duplicates,
    "range of values over keys": _range_of_keys,
    "range of values over channels": _range_of_channels,
    "heavy tails": _heavy_tails,
    "values that cancel": _cancellation,
    "two keys that tie": _tie,
    "a needle among diffuse rows": _needle,
}
