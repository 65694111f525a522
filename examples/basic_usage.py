"""The first five minutes: exact attention, an error budget, the promise checked, a plan and a cache.

    python examples/basic_usage.py

Needs NumPy alone; with `rich` the report is a prettier table.
"""

from __future__ import annotations

import numpy as np

import adaattn


def head_errors(out: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Relative error of each head, (B, H): what `tolerance` is about."""
    return np.linalg.norm(out - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))


def main() -> None:
    # Four query heads share two heads of keys and values. They look at more and more keys at once: the first
    # query heads are multiplied by 4 and 2, so that their scores spread and few keys take all the weight.
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 4, 1024, 64), dtype=np.float32)  # (batch, heads, queries, head size)
    key = rng.standard_normal((1, 2, 1024, 64), dtype=np.float32)
    value = rng.standard_normal((1, 2, 1024, 64), dtype=np.float32)
    query *= np.float32([4, 2, 1, 0.5])[:, None, None]

    print("Exact attention, beside float64 in plain NumPy:")
    exact = adaattn.reference.attention(query, key, value, causal=True)
    out = adaattn.attention(query, key, value, causal=True)
    print(f"  largest relative error of a head: {head_errors(out, exact).max():.1e}\n")

    print("Within an error budget of 3 %, with a report of what each head was computed with:")
    out, report = adaattn.attention(query, key, value, causal=True, tolerance=3e-2, return_report=True)
    print(report.table(), "\n")

    print("The promise, checked in full; the report's `measured` comes from a few rows:")
    for head, error in enumerate(head_errors(out, exact)[0]):
        print(f"  head {head}: {error:.1e} of 3.0e-02 used")

    print("\nWhy the first head got what it got, and what else there was:")
    print("\n".join(f"  {line}" for line in report.plan.explain().splitlines()[1:11]))

    print("\nThe plan serves further calls of the same sizes; they are verified like the first:")
    again, report = adaattn.attention(query, key, value, causal=True, plan=report.plan, return_report=True)
    print(f"  the same bits: {np.array_equal(out, again)}; heads done again: {report.retried.sum()}")

    print("\nDecoding: keys and values in a cache, here as bytes, and one new query:")
    cache = adaattn.KVCache(batch=1, kv_heads=2, head_size=64, dtype="int8")
    cache.append(key, value)
    one = cache.attention(query[:, :, -1:])
    print(f"  {cache.nbytes:,} bytes instead of {key.nbytes + value.nbytes:,};", end=" ")
    print(f"largest error of a head: {head_errors(one, exact[:, :, -1:]).max():.1e}")


if __name__ == "__main__":
    main()
