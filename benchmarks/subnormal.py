"""Whether subnormal numbers slow attention down: time with them over time without, in turns, one thread.

A ratio of 1 is wanted: arithmetic on subnormal numbers takes many processors a hundred times as long, and
inputs that are nearly zero are common (padding, pruned weights, gated channels). NumPy's textbook formula is
there to show what the data does to code that doesn't care. A star: the rung cannot hold such heads, so that
they are computed at a wider one, at that one's speed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable

import numpy as np
from heads import Array, Heads, gaussian
from report import show_table

import adaattn
from adaattn.bench.peers import build_numpy
from adaattn.bench.timing import timer
from adaattn.rates import split

Make = Callable[[Array, Array, Array, np.random.Generator], None]


def some(x: Array, rng: np.random.Generator) -> None:
    """Half of the entries become subnormal, of all sizes from the least."""
    small = rng.random(x.shape) < 0.5
    bits = rng.integers(1, 1 << 23, np.count_nonzero(small), np.uint32)
    x[small] = bits.view(np.float32) * rng.choice(np.array([-1, 1], np.float32), len(bits))


def inputs(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    for x in (q, k, v):
        some(x, rng)


def weights(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    """The first key's score is 95 above the others', whose weights are near exp(-95) = 5.5e-42."""
    q *= 0.3
    q[..., 0] = 1
    k[..., 0] = 0
    k[..., 0, :] = 0
    k[..., 0, 0] = 95 * np.sqrt(np.float32(q.shape[-1]))


def products(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    """Values are normal, but their products with weights are not."""
    v *= 1e-37


CASES: dict[str, Make] = {
    "queries": lambda q, k, v, rng: some(q, rng),
    "keys": lambda q, k, v, rng: some(k, rng),
    "values": lambda q, k, v, rng: some(v, rng),
    "all three": inputs,
    "weights": weights,
    "products": products,
}


def call(name: str, heads: Heads) -> Callable[[], object]:
    arrays = [heads.query, heads.key, heads.value]
    if name == "NumPy":
        return build_numpy(arrays, False, 1)
    rung = name.removesuffix(", one query")
    return lambda: adaattn.attention(*arrays, precision=split(rung), num_threads=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--seconds", type=float, default=0.01, help="at least, behind a sample")
    args = parser.parse_args()

    gc.disable()
    rows = []
    for name in ("fp32", "fp32, one query", "int16", "bf16", "int8", "NumPy"):
        T, S = (1, 2048) if name.endswith("one query") else (512, 512)  # in the processor's caches
        variants = {"": gaussian(1, T, S, heads=2)}
        for case, make in CASES.items():
            heads = gaussian(1, T, S, heads=2)
            make(heads.query, heads.key, heads.value, np.random.default_rng(1))
            variants[case] = heads
        samples = {case: timer(call(name, heads)) for case, heads in variants.items()}
        calls = int(args.seconds / min(sample(2) for sample in samples.values())) + 1
        times: dict[str, list[float]] = {case: [] for case in samples}
        for turn in range(args.rounds):
            order = list(samples)
            for case in order[turn % len(order) :] + order[: turn % len(order)]:
                times[case].append(samples[case](calls))
        cells = [f"{1e3 * statistics.median(times['']):.2f} ms"]
        for case in CASES:
            ratio = statistics.median(a / b for a, b in zip(times[case], times[""], strict=True))
            cells.append(f"{ratio:.2f}{'*' * wider(name, variants[case])}")
        rows.append([name, *cells])
    show_table("time with subnormal numbers / without", ["", "without", *CASES], rows)


def wider(name: str, heads: Heads) -> bool:
    if name == "NumPy":
        return False
    rung = name.removesuffix(", one query")
    return bool(heads.attend(precision=split(rung), return_report=True)[1].retried.any())


if __name__ == "__main__":
    main()
