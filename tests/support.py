"""What the test files share: problems, the table of options, memory layouts, fresh processes, and `check`:
the comparison of the engine with the oracle under one bound of the rounding error."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import adaattn
from adaattn import reference

Array = NDArray[Any]
Options = dict[str, Any]

F64, F32, F16, BF16 = DTYPES = [
    np.dtype(scalar) for scalar in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
]


PATIENCE = 120.0


class Shape(NamedTuple):
    """Dimensions of a problem, in the letters that the whole project uses."""

    B: int
    H: int
    G: int
    T: int
    S: int
    D: int
    E: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


SHAPES = [
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(2, 4, 2, 5, 7, 8, 8),
    Shape(1, 2, 1, 1, 300, 64, 64),
    Shape(2, 3, 3, 2, 1030, 16, 24),
    Shape(1, 3, 3, 64, 64, 16, 16),
    Shape(2, 2, 1, 65, 130, 17, 33),
    Shape(1, 2, 2, 130, 65, 40, 8),
    Shape(1, 4, 1, 3, 257, 32, 31),
    Shape(1, 1, 1, 200, 193, 111, 5),
    Shape(1, 1, 1, 33, 129, 256, 256),
]


def inputs(rng: np.random.Generator, shape: Shape, dtype: Any = F32, spread: float = 1.0) -> list[Array]:
    """Query, key and value with normal entries of the given standard deviation."""
    B, H, G, T, S, D, E = shape
    sizes = (B, H, T, D), (B, G, S, D), (B, G, S, E)
    return [(spread * rng.standard_normal(size)).astype(dtype) for size in sizes]


def backward_problem(rng: np.random.Generator, shape: Shape, dtype: Any = F32, **options: Any) -> list[Array]:
    """grad_out, query, key, value, out and lse."""
    arrays = inputs(rng, shape, dtype)
    grad_out = rng.standard_normal((*arrays[0].shape[:3], shape.E)).astype(dtype)
    return [grad_out, *arrays, *adaattn.attention(*arrays, return_lse=True, **options)]


def float_mask(rng: np.random.Generator, *size: int) -> Array:
    """Normal entries, a third of them -inf."""
    return np.where(rng.random(size) < 1 / 3, -np.inf, rng.standard_normal(size)).astype(np.float32)


def bool_mask(rng: np.random.Generator, *size: int) -> Array:
    return rng.random(size) < 2 / 3


def lowest_mask(rng: np.random.Generator, *size: int) -> Array:
    """Zeros and finfo.min; some rows have nothing else."""
    rows = rng.random((*size[:-1], 1)) < 0.2
    return np.where(rows | (rng.random(size) < 0.5), np.finfo(np.float32).min, 0).astype(np.float32)


OptionsOf = Callable[[np.random.Generator, Shape], Options]

# Every option of attention() by itself, and some that meet; each is tried on every shape and dtype.
CASES: dict[str, OptionsOf] = {
    "plain": lambda rng, s: {},
    "causal": lambda rng, s: {"causal": True},
    "causal lower right": lambda rng, s: {"causal": "lower_right"},
    "causal upper left": lambda rng, s: {"causal": "upper_left"},
    "window": lambda rng, s: {"window": (3, 2)},
    "window left": lambda rng, s: {"window": (70, None)},
    "window right": lambda rng, s: {"window": (None, 1)},
    "window of one": lambda rng, s: {"window": (0, 0)},
    "window unbounded": lambda rng, s: {"window": (None, None)},
    "window, causal": lambda rng, s: {"window": (5, 0), "causal": True},
    "window, upper left": lambda rng, s: {"window": (66, 66), "causal": "upper_left"},
    "softcap": lambda rng, s: {"softcap": 0.7},
    "scale": lambda rng, s: {"scale": 0.3},
    "mask ()": lambda rng, s: {"attn_mask": np.array(True)},
    "mask (S)": lambda rng, s: {"attn_mask": bool_mask(rng, s.S)},
    "mask (T, 1)": lambda rng, s: {"attn_mask": bool_mask(rng, s.T, 1)},
    "mask (T, S)": lambda rng, s: {"attn_mask": bool_mask(rng, s.T, s.S)},
    "mask (H, 1, S)": lambda rng, s: {"attn_mask": bool_mask(rng, s.H, 1, s.S)},
    "mask (B, 1, T, S)": lambda rng, s: {"attn_mask": bool_mask(rng, s.B, 1, s.T, s.S)},
    "mask (B, H, T, S)": lambda rng, s: {"attn_mask": bool_mask(rng, s.B, s.H, s.T, s.S)},
    "mask of ones": lambda rng, s: {"attn_mask": np.ones((s.T, s.S), bool)},
    "mask of zeros": lambda rng, s: {"attn_mask": np.zeros((s.T, s.S), bool)},
    "bias (S)": lambda rng, s: {"attn_mask": float_mask(rng, s.S)},
    "bias (T, S)": lambda rng, s: {"attn_mask": float_mask(rng, s.T, s.S)},
    "bias (1, H, T, 1)": lambda rng, s: {"attn_mask": float_mask(rng, 1, s.H, s.T, 1)},
    "bias (B, H, T, S)": lambda rng, s: {"attn_mask": float_mask(rng, s.B, s.H, s.T, s.S)},
    "bias float64": lambda rng, s: {"attn_mask": float_mask(rng, s.T, s.S).astype(F64)},
    "bias float16": lambda rng, s: {"attn_mask": float_mask(rng, s.T, s.S).astype(F16)},
    "bias bfloat16": lambda rng, s: {"attn_mask": float_mask(rng, s.T, s.S).astype(BF16)},
    "bias lowest": lambda rng, s: {"attn_mask": lowest_mask(rng, s.B, 1, s.T, s.S)},
    "bias lowest float16": lambda rng, s: {"attn_mask": np.full((s.T, s.S), np.finfo(F16).min, F16)},
    "alibi (H)": lambda rng, s: {"alibi_slopes": rng.random(s.H)},
    "alibi (B, H)": lambda rng, s: {"alibi_slopes": rng.random((s.B, s.H)), "causal": True},
    "sinks": lambda rng, s: {"sinks": 3 * rng.standard_normal(s.H)},
    "sinks, no key": lambda rng, s: {"sinks": rng.standard_normal(s.H), "kv_lengths": np.zeros(s.B, int)},
    "sinks of -inf": lambda rng, s: {"sinks": np.full(s.H, -np.inf)},
    "lengths": lambda rng, s: {"kv_lengths": rng.integers(0, s.S + 1, s.B)},
    "lengths, causal": lambda rng, s: {"kv_lengths": rng.integers(0, s.S + 1, s.B), "causal": True},
    "offset": lambda rng, s: {"query_offset": 2, "causal": True},
    "offset before the keys": lambda rng, s: {"query_offset": -3, "causal": True},
    "offset behind the keys": lambda rng, s: {"query_offset": s.S + 4, "window": (6, None)},
    "offsets": lambda rng, s: {"query_offset": rng.integers(0, s.S, s.B), "window": (9, 1)},
    "dropout": lambda rng, s: {"dropout_p": 0.4, "seed": 123456789012345},
    "dropout, seeds": lambda rng, s: {"dropout_p": 0.1, "seed": rng.integers(0, 2**63, s.B)},
    "dropout, unsigned seeds": lambda rng, s: {
        "dropout_p": 0.5,
        "seed": rng.integers(2**63, 2**64, s.B, np.uint64),
    },
    "dropout, negative seed": lambda rng, s: {"dropout_p": 0.9, "seed": -5},
    "precision fp32": lambda rng, s: {"precision": "fp32"},
    "precision fp64": lambda rng, s: {"precision": "fp64", "causal": True},
    "two threads": lambda rng, s: {"num_threads": 2, "causal": True},
    "all": lambda rng, s: {
        "attn_mask": float_mask(rng, s.B, 1, s.T, s.S),
        "causal": True,
        "window": (100, 3),
        "softcap": 5.0,
        "alibi_slopes": rng.random(s.H),
        "sinks": rng.standard_normal(s.H),
        "kv_lengths": rng.integers(s.S // 2, s.S + 1, s.B),
        "query_offset": rng.integers(0, s.S, s.B),
        "scale": 0.5,
        "dropout_p": 0.2,
        "seed": 7,
    },
}


def gapped(x: Array) -> Array:
    """The same values with other elements between them on every axis."""
    wide = np.full([2 * size for size in x.shape], 77, x.dtype)
    view = wide[(..., *(slice(1, None, 2) for _ in x.shape))]
    view[...] = x
    return view


def misaligned(x: Array) -> Array:
    """The same values one byte off their natural alignment."""
    view = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


def reversed_axes(x: Array) -> Array:
    """The same values at negative strides."""
    back = (..., *(slice(None, None, -1),) * x.ndim)
    return x[back].copy()[back]


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "batch, position, head": lambda x: (
        np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2) if x.ndim > 2 else x
    ),
    "last axis first": np.asfortranarray,
    "gapped": gapped,
    "misaligned": misaligned,
    "negative strides": reversed_axes,
    "read-only": read_only,
}


def check(query: Array, key: Array, value: Array, **options: Any) -> tuple[Array, Array]:
    """Compare the engine's out and lse with the oracle's, and the arguments after the call with those before.

    Weights err by the rounding of the scores, out by that of the weights and its own, each counted in units
    of the format that computes. A score's size is bounded by the norms of its query and key and its bias.
    """
    arrays = [query, key, value, *(x for x in options.values() if isinstance(x, np.ndarray))]
    before = [x.tobytes() for x in arrays]
    out, lse = adaattn.attention(query, key, value, return_lse=True, **options)
    assert [x.tobytes() for x in arrays] == before
    wide = query.dtype == F64
    assert (out.dtype, lse.dtype) == (query.dtype, F64 if wide else F32)
    exact, exact_lse = reference.attention(query, key, value, return_lse=True, **options)

    precision = options.get("precision", "auto")
    unit = 2.0**-53 if precision == "fp64" or (wide and precision == "auto") else 2.0**-24
    error = unit * (16 + 4 * score_size(query, key, options))
    kept = 1 - options.get("dropout_p", 0.0)
    rounding = float(ml_dtypes.finfo(query.dtype).eps) / 2
    tiny = float(ml_dtypes.finfo(query.dtype).smallest_subnormal)
    assert_near(out, exact, error * largest(value) / kept + tiny, rounding)
    assert_near(lse, exact_lse, error, float(np.finfo(lse.dtype).eps))
    return out, lse


def assert_near(actual: Array, exact: Array, absolute: float, relative: float) -> None:
    """NaN and infinities must be where they are in `exact`."""
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(actual.astype(F64), exact, rtol=relative, atol=absolute)


def score_size(query: Array, key: Array, options: Options) -> float:
    """Bound of the magnitude of the parts that make up a score."""
    scale = options.get("scale") or query.shape[-1] ** -0.5
    norms = [np.sqrt(np.max(np.sum(finite(x) ** 2, axis=-1))) for x in (query, key)]
    size = abs(scale) * norms[0] * norms[1]
    if (mask := options.get("attn_mask")) is not None and mask.dtype != bool:
        mask = finite(mask)
        size += largest(np.where(mask < -60_000, 0, mask))
    if (slopes := options.get("alibi_slopes")) is not None:
        T, S = query.shape[2], key.shape[2]
        size += largest(slopes) * (T + S + largest(np.asarray(options.get("query_offset", 0))))
    return float(size)


def finite(x: Array) -> Array:
    x = x.astype(F64)
    return np.where(np.isfinite(x), x, 0)


def largest(x: Array) -> float:
    return float(np.max(np.abs(finite(x)), initial=0))


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays, or tuples of them, agree in every bit, NaN's included."""
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def in_new_process(function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """Result of a call in a fresh interpreter, whose environment has the given variables besides ours."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_result, args=(sender, function, arguments))
    with mock.patch.dict(os.environ, environment):
        process.start()
    sender.close()
    try:
        assert receiver.poll(PATIENCE), f"no result within {PATIENCE} s"
        result, error = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert error is None, error
    return result


def _send_result(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send((function(*arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def peak_memory() -> int:
    """Bytes of resident memory that this process has had at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
