"""`adaattn demo`: a bundled byte-level language model reads a text and writes on, all attention being ours.

Both its quality (bits per byte) and each layer's attention are checked: the former against the figure that
float64 gives, the latter against the oracle, on the queries, keys and values that the model made of the text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import api, reference
from .nn import Transformer

DATA = Path(__file__).with_name("data")
LENGTH = 4096
EXPECTED_BITS_PER_BYTE = 1.208149  # float64 NumPy from the same float16 weights
BITS_TOLERANCE = 1e-3
PROMPT = b'def read_lines(path):\n    """Return the lines of the file at *path*."""\n    with open('
NEW_BYTES = 64
RUNS = 3  # of each contender, alternating; the median counts

_Array = NDArray[Any]


def run(progress: Callable[[str], None] = lambda step: None) -> dict[str, Any]:
    """Read, measure, check and continue; `progress` is told each step.

    Returns
    -------
    dict
        Of JSON types: `bits_per_byte` and what was expected, `passed`, `layers` (seconds of our attention and
        of NumPy's, the ratio, relative Frobenius error against float64 of the layer and of its worst head),
        the text written, and the seconds that reading and writing took.
    """
    progress("Loading the model")
    model = Transformer.load(DATA / "bytelm.safetensors")
    text = np.frombuffer((DATA / "sample.txt").read_bytes(), np.uint8)[: LENGTH + 1]
    calls: list[tuple[_Array, ...]] = []

    def record(query: _Array, key: _Array, value: _Array, **options: Any) -> _Array:
        out: _Array = api.attention(query, key, value, **options)
        calls.append((query, key, value, out))
        return out

    progress(f"Reading {LENGTH:,} bytes")
    for block in model.blocks:
        block.attn.attend = record
    start = time.perf_counter()
    logits = model(text[None, :-1])[0]
    read_seconds = time.perf_counter() - start
    for block in model.blocks:
        block.attn.attend = api.attention

    layers = []
    for layer, (query, key, value, out) in enumerate(calls):
        progress(f"Measuring layer {layer + 1} of {len(calls)}")
        layers.append({"layer": layer} | compare(query, key, value, out))

    progress(f"Writing {NEW_BYTES} bytes")
    start = time.perf_counter()
    tokens = model.generate(np.frombuffer(PROMPT, np.uint8)[None], NEW_BYTES)[0]
    write_seconds = time.perf_counter() - start

    bits = bits_per_byte(logits, text[1:])
    return {
        "bytes": LENGTH,
        "bits_per_byte": bits,
        "expected_bits_per_byte": EXPECTED_BITS_PER_BYTE,
        "passed": abs(bits - EXPECTED_BITS_PER_BYTE) <= BITS_TOLERANCE,
        "read_seconds": read_seconds,
        "layers": layers,
        "prompt": PROMPT.decode(),
        "new_bytes": NEW_BYTES,
        "continuation": tokens[len(PROMPT) :].astype(np.uint8).tobytes().decode(errors="backslashreplace"),
        "write_seconds": write_seconds,
    }


def bits_per_byte(logits: _Array, targets: _Array) -> float:
    """Mean cross-entropy in bits of logits (T, V) against targets (T,)."""
    logits = logits.astype(np.float64)
    top = logits.max(axis=1)
    log_total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return float(np.mean(log_total - logits[np.arange(len(targets)), targets]) / np.log(2))


def compare(query: _Array, key: _Array, value: _Array, out: _Array) -> dict[str, float]:
    """Time causal attention by the engine and by NumPy, and measure the error of the engine's `out`."""
    ours, numpys = [], []
    for _ in range(RUNS):
        ours.append(_seconds(lambda: api.attention(query, key, value, causal=True)))
        numpys.append(_seconds(lambda: numpy_attention(query, key, value)))
    exact = reference.attention(query, key, value, causal=True)
    norms = [np.sqrt(np.sum(x**2, axis=(0, 2, 3))) for x in (out - exact, exact)]  # of each head
    return {
        "seconds": median(ours),
        "numpy_seconds": median(numpys),
        "speedup": median(numpys) / median(ours),
        "error": float(np.linalg.norm(norms[0]) / np.linalg.norm(norms[1])),
        "worst_head_error": float(np.max(norms[0] / norms[1])),
    }


def numpy_attention(query: _Array, key: _Array, value: _Array) -> _Array:
    """Causal softmax attention as one writes it in NumPy, head by head: (B, H, T, D) -> (B, H, T, E)."""
    B, H, T, D = query.shape
    future = np.triu(np.ones((T, T), bool), k=1)
    out = np.empty_like(value)
    for b, h in np.ndindex(B, H):
        p = query[b, h] @ key[b, h].T
        p *= D**-0.5
        p[future] = -np.inf
        p -= p.max(axis=1, keepdims=True)
        np.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
        out[b, h] = p @ value[b, h]
    return out


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
