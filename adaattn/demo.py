"""`adaattn demo`: a bundled byte-level language model reads a text and writes on, all attention being ours.

Its quality (bits per byte) is checked against the figure that float64 gives. Each layer's attention, exact
and within every policy's error budget, is timed and checked against the oracle, on the queries, keys and
values that the model made of the text.
"""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import api, reference
from .errors import ArgumentError
from .nn import Transformer
from .nn.stats import rungs
from .stats import POLICIES, Report

DATA = Path(__file__).with_name("data")
#: Of the standard library: read one after the other where sample.txt is too short.
LIBRARY_FILES = ("argparse.py", "difflib.py", "typing.py")
LENGTH = 4096
COMPARED = 2048  # of them are what contenders compute
EXPECTED_BITS_PER_BYTE = 1.208149  # float64 NumPy from the same float16 weights
BITS_TOLERANCE = 1e-3
PROMPT = b'def read_lines(path):\n    """Return the lines of the file at *path*."""\n    with open('
NEW_BYTES = 64
RUNS = 3  # of each contender, alternating; the median counts
MOST_ROWS = 256  # of a layer that are compared with float64
MOST_NUMPY = 4096  # bytes that NumPy, whose weights grow with their square, takes part with

_Array = NDArray[Any]
_Progress = Callable[[str, float], None]


class Layer(NamedTuple):
    """What a layer's attention is given, and what some rows of its output are."""

    arrays: tuple[_Array, ...]  # query, key, value
    rows: slice
    exact: _Array  # float64, of `rows`


class Race(NamedTuple):
    """A layer's attention by several contenders: seconds (medians), outputs and reports."""

    layer: Layer
    seconds: dict[str, float]
    out: dict[str, _Array]
    report: dict[str, Report]

    def errors(self, name: str) -> tuple[float, float]:
        """Relative Frobenius error against float64 of the layer and of its worst head, on its exact rows."""
        exact = self.layer.exact
        off = self.out[name][:, :, self.layer.rows] - exact
        worst = np.linalg.norm(off, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
        return float(np.linalg.norm(off) / np.linalg.norm(exact)), float(worst.max())


def run(progress: _Progress = lambda step, done: None, length: int | None = None) -> dict[str, Any]:
    """Read, measure, check and continue; `progress` is told each step, and the share that is done.

    Parameters
    ----------
    progress : callable
    length : int, optional
        Bytes to read, all of which contenders compute; by default LENGTH and COMPARED.

    Returns
    -------
    dict
        Of JSON types: `bits_per_byte` and what was expected (None of a length of one's own), the seconds that
        reading took; over the first `compared_bytes`, with errors against float64 on `checked_rows` of a
        head's rows: `layers` (of `describe_layer`) and `policies` (of `describe_policy`, and bits per byte);
        `offered`, the rungs that pay on this machine; the text written and the seconds it took; `failures`,
        in sentences, and `passed`: whether there are none.
    """
    progress("Loading the model", 0.0)
    model = Transformer.load(DATA / "bytelm.safetensors")
    compared = min(COMPARED, LENGTH) if length is None else length
    expected = EXPECTED_BITS_PER_BYTE if length is None else None
    length = LENGTH if length is None else length
    text = sources(length, 1)
    progress(f"Reading {length:,} bytes", 0.1)
    logits, calls, read_seconds = read(model, text[:-1])

    races = []
    for i, call in enumerate(calls):
        progress(f"Measuring layer {i + 1} of {len(calls)}", 0.2 + 0.4 * i / len(calls))
        races.append(race(with_exact_rows([x[:, :, :compared] for x in call])))
    policies = [describe_policy("exact", races) | {"bits_per_byte": bits_per_byte(logits, text, compared)}]
    for i, name in enumerate(POLICIES):
        progress(f"Reading {compared:,} bytes within the budget of '{name}'", 0.6 + 0.3 * i / len(POLICIES))
        cheap = Transformer.load(DATA / "bytelm.safetensors", policy=name)
        bits = bits_per_byte(cheap(text[None, :compared])[0], text, compared)
        policies.append(describe_policy(name, races) | {"bits_per_byte": bits})

    progress(f"Writing {NEW_BYTES} bytes", 0.9)
    start = time.perf_counter()
    tokens = model.generate(np.frombuffer(PROMPT, np.uint8)[None], NEW_BYTES)[0]
    write_seconds = time.perf_counter() - start

    bits = bits_per_byte(logits, text, length)
    failures = list_failures(bits, expected, policies)
    return {
        "bytes": length,
        "bits_per_byte": bits,
        "expected_bits_per_byte": expected,
        "passed": not failures,
        "failures": failures,
        "read_seconds": read_seconds,
        "compared_bytes": compared,
        "checked_rows": races[0].layer.exact.shape[2],
        "layers": [{"layer": i} | describe_layer(of_layer) for i, of_layer in enumerate(races)],
        "offered": api.cpu_info()["rates"]["offered"],
        "policies": policies,
        "prompt": PROMPT.decode(),
        "new_bytes": NEW_BYTES,
        "continuation": tokens[len(PROMPT) :].astype(np.uint8).tobytes().decode(errors="backslashreplace"),
        "write_seconds": write_seconds,
    }


def sources(length: int, more: int = 0) -> _Array:
    """So many bytes of Python, and `more` that follow them: of sample.txt or, beyond its 4,737, of the
    library of the Python that runs.

    Raises
    ------
    ArgumentError
        There are not so many, or none are asked for.
    """
    text = (DATA / "sample.txt").read_bytes()
    if not 1 <= length <= len(text) - more:
        library = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join((library / name).read_bytes() for name in LIBRARY_FILES)
    if not 1 <= length <= len(text) - more:
        raise ArgumentError(
            f"length: expected 1 to {len(text) - more}, which {', '.join(LIBRARY_FILES)} have, got {length}"
        )
    return np.frombuffer(text, np.uint8)[: length + more]


def read(model: Transformer, text: _Array) -> tuple[_Array, list[tuple[_Array, ...]], float]:
    """Logits of `text`; query, key and value of each layer's attention; seconds."""
    calls: list[tuple[_Array, ...]] = []

    def record(query: _Array, key: _Array, value: _Array, **options: Any) -> Any:
        calls.append((query, key, value))
        return api.attention(query, key, value, **options)

    for block in model.blocks:
        block.attn.attend = record
    start = time.perf_counter()
    logits = model(text[None])[0]
    seconds = time.perf_counter() - start
    for block in model.blocks:
        block.attn.attend = api.attention
    return logits, calls, seconds


def bits_per_byte(logits: _Array, text: _Array, length: int) -> float:
    """Mean cross-entropy in bits of the first `length` logits (T, V), each for the next byte of `text`."""
    logits = logits[:length].astype(np.float64)
    top = logits.max(axis=1)
    log_total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return float(np.mean(log_total - logits[np.arange(length), text[1 : length + 1]]) / np.log(2))


def with_exact_rows(arrays: Sequence[_Array]) -> Layer:
    """A layer's queries, keys and values, and rows at equal distances of their attention by the oracle."""
    query, key, value = arrays
    T = query.shape[2]
    step = max(1, T // MOST_ROWS)
    rows = slice(step // 2, None, step)
    visible = np.arange(T)[rows, None] >= np.arange(T)
    return Layer(
        (query, key, value), rows, reference.attention(query[:, :, rows], key, value, attn_mask=visible)
    )


def race(layer: Layer) -> Race:
    """Causal attention by NumPy, exact, and within each policy's budget, taking turns.

    NumPy computes one head; its time is taken times their number. It has none (NaN) beyond MOST_NUMPY bytes.
    """
    query, key, value = layer.arrays
    one_head = query[:, :1], key[:, :1], value[:, :1]
    times: dict[str, list[float]] = {name: [] for name in ("numpy", "exact", *POLICIES)}
    out, report = {}, {}
    for _ in range(RUNS):
        few = query.shape[2] <= MOST_NUMPY
        one = _seconds(lambda: numpy_attention(*one_head)) if few else math.nan
        times["numpy"].append(query.shape[1] * one)
        for name in ("exact", *POLICIES):
            policy = None if name == "exact" else name
            start = time.perf_counter()
            out[name], report[name] = api.attention(
                query, key, value, causal=True, policy=policy, return_report=True
            )
            times[name].append(time.perf_counter() - start)
    return Race(layer, {name: median(seconds) for name, seconds in times.items()}, out, report)


def describe_layer(of_layer: Race) -> dict[str, float | None]:
    """Seconds of exact attention and of NumPy's, their ratio, and errors of the former against float64; None
    where NumPy took no part."""
    ours, numpys = of_layer.seconds["exact"], of_layer.seconds["numpy"]
    error, worst = of_layer.errors("exact")
    return {
        "seconds": ours,
        "numpy_seconds": None if math.isnan(numpys) else numpys,
        "speedup": None if math.isnan(numpys) else numpys / ours,
        "error": error,
        "worst_head_error": worst,
    }


def describe_policy(name: str, races: list[Race]) -> dict[str, Any]:
    """One contender in all layers.

    Returns
    -------
    dict
        `policy`; `tolerance`, None for "exact"; `seconds` of all layers' attention, planning and verification
        included, and the `speedup` over exact; `worst_head_error` against float64; `measured_error`, the
        largest that verification measured, None where it measured none; `retried` heads; of each head of each
        layer `rungs`, `structures`, `kept` (share of the blocks) and `ranks`.
    """
    reports = [of_layer.report[name] for of_layer in races]
    measured = float(np.fmax.reduce([report.measured_error for report in reports], axis=None))
    seconds = sum(of_layer.seconds[name] for of_layer in races)
    return {
        "policy": name,
        "tolerance": POLICIES.get(name),
        "seconds": seconds,
        "speedup": sum(of_layer.seconds["exact"] for of_layer in races) / seconds,
        "worst_head_error": max(of_layer.errors(name)[1] for of_layer in races),
        "measured_error": None if math.isnan(measured) else measured,
        "retried": sum(int(report.retried.sum()) for report in reports),
        "rungs": [rungs(report) for report in reports],
        "structures": [report.structure.ravel().tolist() for report in reports],
        "kept": [report.kept_fraction.ravel().tolist() for report in reports],
        "ranks": [report.rank.ravel().tolist() for report in reports],
    }


def list_failures(bits: float, expected: float | None, policies: list[dict[str, Any]]) -> list[str]:
    """What is not as it should be, in sentences."""
    failures = []
    if expected is not None and abs(bits - expected) > BITS_TOLERANCE:
        failures.append(f"expected {expected} bits per byte, got {bits:.6f}")
    for policy in policies:
        tolerance, error = policy["tolerance"], policy["worst_head_error"]
        if tolerance is not None and error > tolerance:
            failures.append(
                f"{policy['policy']}: expected errors of at most {tolerance:g}, got {error:.3g} in a head"
            )
    return failures


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
