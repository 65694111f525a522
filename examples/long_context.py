"""Long contexts: memory that does not grow with their square, sparse heads, and a cache for decoding.

    python examples/long_context.py
    python examples/long_context.py --length 32768

The heads are those of the first two layers of the language model that comes with the package, reading the
standard library's sources.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import adaattn
from adaattn import demo, nn

ROWS = 64  # of a head, the last ones, that are compared with float64 for the error of the worst head


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def peak_mb() -> float:
    """Of this process on Linux; getrusage counts what the process that started it took, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def long_heads(length: int) -> list[tuple[np.ndarray, ...]]:
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("a*.py"))
    text = np.frombuffer(b"".join(source.read_bytes() for source in sources)[:length], np.uint8)
    model = nn.Transformer.load(demo.DATA / "bytelm.safetensors")
    model.blocks = model.blocks[:2]
    _, calls, _ = demo.read(model, text)
    return [tuple(np.ascontiguousarray(x) for x in call) for call in calls]


def errors(out: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(out - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))


def prefill(layers: list[tuple[np.ndarray, ...]]) -> None:
    H, T = layers[0][0].shape[1:3]
    print(f"Attention over {T:,} tokens, {H} heads; their weights would fill {4 * H * T**2 / 2**20:,.0f} MB")
    for layer, (query, key, value) in enumerate(layers):
        exact = adaattn.reference.attention(query[:, :, -ROWS:], key, value, causal=True)
        base = None
        for tolerance in (None, 1e-2, 5e-2):
            (out, report), seconds = timed(
                lambda q=query, k=key, v=value, t=tolerance: adaattn.attention(
                    q, k, v, causal=True, tolerance=t, return_report=True
                )
            )
            base = base or seconds
            name = "exact" if tolerance is None else f"within {tolerance:g}"
            kept = ", ".join(f"{share:.0%}" for share in report.kept_fraction[0])
            print(f"  layer {layer}, {name:<12} {seconds:6.2f} s, {base / seconds:.1f} x", end="")
            print(f"   worst head {errors(out[:, :, -ROWS:], exact).max():.1e}   blocks kept {kept}")
    print(f"  most memory that this process held, Python and model included: {peak_mb():,.0f} MB")


def decode(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
    print(f"\nDecoding: one query after {key.shape[2]:,} tokens, by what the cache keeps them in")
    one = query[:, :, -1:]
    exact = adaattn.reference.attention(one, key, value)
    for dtype in ("fp32", "bf16", "int8"):
        cache = adaattn.KVCache(1, key.shape[1], key.shape[3], capacity=key.shape[2], dtype=dtype)
        cache.append(key, value)
        cache.attention(one)
        out, seconds = timed(lambda cache=cache: [cache.attention(one) for _ in range(20)][-1])
        per_token = cache.nbytes / cache.capacity
        print(f"  {dtype:<5} {per_token:6,.0f} bytes per token   {1e3 * seconds / 20:6.2f} ms", end="")
        print(f"   worst head {errors(out, exact).max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=8192, help="tokens, which are bytes here")
    layers = long_heads(parser.parse_args().length)
    prefill(layers)
    decode(*layers[1])


if __name__ == "__main__":
    main()
