"""What a cache's attention within a tolerance reads, how long that takes beside reading all, and how far its
bounds lie above the errors: one query after the other on the bundled model's caches.

Also what bounds of the scores over a page, without reading codes, would have to read: the box that holds the
page's keys, and the ball around their mean (Quest, arXiv 2406.10774). They certify nothing on these heads,
and knowing all scores exactly would not suffice either, where pages that are not read count for nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from heads import Array, Heads, bundled, errors
from instruments import verdict
from report import show_table

import adaattn

TOLERANCES = (1e-2, 2e-2, 5e-2)
WANTED = {1e-2: 0.5, 5e-2: 0.3}  # bytes read, of all
PAGE = adaattn.cache.PAGE


def queries_of(heads: Heads, n: int) -> Iterator[Array]:
    """The last query and others before it, each at the end of the cache."""
    for i in range(n):
        last = heads.query.shape[2] - 1 - 64 * i
        yield np.ascontiguousarray(heads.query[:, :, last : last + 1])


def median_times(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds, of calls that take turns after a first one, which makes the codes."""
    for call in calls:
        call()
    times = [[0.0] * rounds for _ in calls]
    for turn in range(rounds):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own[turn] = time.perf_counter() - start
    return [float(np.median(own)) for own in times]


def share_to_read(query: Array, key: Array, value: Array, tolerance: float) -> dict[str, float]:
    """Of a head's pages, in order of a bound of their scores, until what is left may move nothing; one query
    (D,), scaled."""
    pages = key.reshape(-1, PAGE, key.shape[1])
    scores = pages @ query
    mean = pages.mean(axis=1)
    radius = np.linalg.norm(pages - mean[:, None], axis=2).max(axis=1)
    box = np.maximum(pages.max(axis=1) * query, pages.min(axis=1) * query).sum(axis=1)
    top = scores.max()
    mass = np.exp(scores - top).sum(axis=1)
    bounds = {
        "box": PAGE * np.exp(box - top),
        "ball": PAGE * np.exp(mean @ query + radius * np.linalg.norm(query) - top),
        "exact scores": mass,
    }
    weights = np.exp(scores - top).reshape(-1) / mass.sum()
    size = np.linalg.norm(weights @ value)
    largest = np.linalg.norm(value, axis=1).reshape(-1, PAGE).max(axis=1)
    shares = {}
    for name, bound in bounds.items():
        order = np.argsort(-bound)
        read = np.concatenate([[0], np.cumsum(mass[order])])
        left = np.concatenate([np.cumsum(bound[order][::-1])[::-1], [0]])
        values = np.concatenate([np.maximum.accumulate(largest[order][::-1])[::-1], [0]])
        moved = left / (read + left) * (size + values) / size
        shares[name] = float(np.argmax(moved <= tolerance)) / len(order)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="tokens of the cache")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    rows, geometry = [], []
    found = {t: [] for t in TOLERANCES}
    for heads in bundled(arguments.length):
        cache = adaattn.KVCache(1, heads.key.shape[1], heads.key.shape[3], capacity=arguments.length)
        cache.append(heads.key, heads.value)
        for query in queries_of(heads, arguments.queries):
            exact = adaattn.reference.attention(query, heads.key, heads.value)

            calls = [
                partial(cache.attention, query, tolerance=t, num_threads=arguments.threads)
                for t in (None, *TOLERANCES)
            ]
            times = median_times(calls, arguments.rounds)
            for t, seconds in zip(TOLERANCES, times[1:], strict=True):
                out, report = cache.attention(query, tolerance=t, return_report=True)
                error = errors(out, exact) / t
                found[t].append((report.kept_fraction, seconds / times[0], report.error_bound / t, error))
            for h in range(query.shape[1]):
                q = query[0, h, 0].astype(np.float64) * query.shape[3] ** -0.5
                head = heads.key[0, h].astype(np.float64), heads.value[0, h].astype(np.float64)
                geometry += [share_to_read(q, *head, t) for t in WANTED]
    for t, cases in found.items():
        read, ratio, bound, error = (np.array([case[i] for case in cases]) for i in range(4))
        rows.append(
            [
                f"{t:g}",
                f"{read.mean():.3f} ({read.mean(axis=0).max():.2f})",
                verdict(read.mean(), WANTED[t], most=True) if t in WANTED else "",
                f"{ratio.mean():.2f}",
                f"{bound.mean():.2f} ({bound.max():.2f})",
                f"{error.mean():.3f} ({error.max():.3f})",
            ]
        )
    names = ["tolerance", "bytes read (worst head)", "wanted", "time / exact"]
    names += ["bound / t (most)", "error / t (most)"]
    show_table(f"bytelm {arguments.length}, fp32 cache, {arguments.threads} threads", names, rows)
    rows = [
        [f"{t:g}", *(f"{np.mean([g[name] for g in geometry[i :: len(WANTED)]]):.3f}" for name in geometry[0])]
        for i, t in enumerate(WANTED)
    ]
    show_table("Share of pages to read by bounds of their scores", ["tolerance", *geometry[0]], rows)


if __name__ == "__main__":
    main()
