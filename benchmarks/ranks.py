"""What heads of low rank want: landmarks, however chosen, or a short series of the exponential.

In NumPy and float64, without the engine: relative Frobenius error of the output, by the number of features.
Landmarks are keys drawn by randomly pivoted Cholesky (arXiv 2207.06503), uniformly, or likewise among keys
and queries together; the series has 1 + D features at order 1 and 1 + D + D (D + 1) / 2 at order 2. Heads of
the bundled model are causal: their last 1024 queries, and the keys before these.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
from heads import Heads, bundled, gaussian, minilm
from numpy.typing import NDArray
from report import show_table
from structure import WALKS, smooth

Array = NDArray[Any]
RANKS = (32, 64, 128, 256)
SAMPLE = 1024


def attend(weights: Array, value: Array) -> Array:
    return (weights @ value) / weights.sum(axis=1, keepdims=True)


def error(out: Array, exact: Array) -> float:
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))


def series(query: Array, key: Array, value: Array, order: int) -> Array:
    scores = query @ key.T
    return attend(1 + scores + (scores**2 / 2 if order > 1 else 0), value)


def pivots(points: Array, rank: int, rng: np.random.Generator) -> Array:
    """Indices, drawn one by one by what the ones before leave of exp(x.x)."""
    left = np.exp(np.sum(points**2, axis=1))
    factor, own, chosen = np.zeros((len(points), rank)), left.copy(), []
    for r in range(rank):
        left[left < 1e-6 * own] = 0
        if not left.any():
            break
        chosen.append(at := rng.choice(len(points), p=left / left.sum()))
        column = np.exp(points @ points[at]) - factor[:, :r] @ factor[at, :r]
        factor[:, r] = column / np.sqrt(column[at])
        left = np.maximum(left - factor[:, r] ** 2, 0)
    return np.array(chosen)


def landmarks(query: Array, key: Array, value: Array, way: str) -> Iterator[float]:
    """The error at each of RANKS; NaN beyond what the kernel holds."""
    rng = np.random.default_rng(0)
    balance = np.sqrt(np.linalg.norm(key) * np.sqrt(len(query)) / np.linalg.norm(query) / np.sqrt(len(key)))
    query, key = query * balance, key / balance
    exact = attend(np.exp(query @ key.T), value)
    pool = key[rng.permutation(len(key))[:SAMPLE]]
    if way == "keys and queries":
        pool = np.concatenate([pool[: SAMPLE // 2], query[rng.permutation(len(query))[: SAMPLE // 2]]])
    order = np.arange(max(RANKS)) if way == "uniform" else pivots(pool, max(RANKS), rng)
    for rank in RANKS:
        points = pool[order[:rank]]
        kernel = np.exp(points @ points.T)
        root = np.linalg.cholesky(kernel + 1e-8 * np.diag(np.diag(kernel)))
        of_keys, of_queries = (np.linalg.solve(root, np.exp(points @ x.T)) for x in (key, query))
        yield error((of_queries.T @ (of_keys @ value)) / (of_queries.T @ of_keys.sum(axis=1))[:, None], exact)


def heads(length: int) -> Iterator[Heads]:
    for sigma in (0.1, 0.3, 0.5, 1.0):
        yield gaussian(sigma, length, length)
    for walk in WALKS:
        yield smooth(length, *walk)
    yield from bundled(4096)
    try:
        yield from minilm(512)
    except ImportError as reason:
        print(reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=2048)
    rows = []
    for every in heads(parser.parse_args().length):
        for head in every.apart():
            q, k, v = (x[0, 0].astype(np.float64) for x in (head.query, head.key, head.value))
            if head.causal:
                q, k, v = q[-1024:], k[:-1024], v[:-1024]
            q, k = q / np.sqrt(q.shape[1]), k - k.mean(axis=0)
            spread = np.std(q @ k.T, axis=1).mean()
            exact = attend(np.exp(q @ k.T), v)
            told = [f"{error(series(q, k, v, order), exact):.0e}" for order in (1, 2)]
            for way in ("keys", "uniform", "keys and queries"):
                told.append(" ".join(f"{x:.0e}" for x in landmarks(q, k, v, way)))
            rows.append([head.name, f"{spread:.1f}", *told])
    by = " ".join(map(str, RANKS))
    header = ["head", "spread", "order 1", "order 2", f"{by} keys", "uniform keys", "keys and queries"]
    show_table("Errors of approximations of low rank", header, rows)


if __name__ == "__main__":
    main()
