"""Malformed calls: each with the type of its error and its sentence. Nothing is computed and no argument changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import BF16, F16, F32, F64, read_only

import adaattn
from adaattn import ArgumentError, DTypeError, ShapeError

B, H, G, T, S, D, E = 2, 4, 2, 3, 5, 8, 6
SIZES = {"query": (B, H, T, D), "key": (B, G, S, D), "value": (B, G, S, E)}
FLOATS = "float32, float64, float16 or bfloat16"

Case = tuple[str, type[Exception], str, dict[str, Any]]


def case(argument: str, error: type[Exception], sentence: str, given: Any, /, **others: Any) -> Case:
    """A call with one argument (and what else is needed) replaced; `*` in the sentence stands for anything."""
    text = re.escape(f"{argument}: {sentence}").replace(r"\*", ".*")
    return argument, error, f"^{text}$", others | {argument: given}


def ones(*size: int, dtype: Any = F32) -> Any:
    return np.ones(size, dtype)


def arrays_of_wrong_kind() -> Iterator[Case]:
    class Unreadable:
        __dlpack__ = None

    no_arrays = [None, 1, 1.5, "query", b"bytes", [[[[1.0]]]], ((1.0,),), {}, object(), range(4), np.float32(1), F32]
    dtypes = ["i1", "i4", "i8", "u2", "u8", "c8", "c16", "O", "U3", "S2", "M8[s]", "m8[s]", "f4,f4"]
    if np.dtype(np.longdouble).itemsize > 8:
        dtypes.append("g")
    for name, size in SIZES.items():
        for value in no_arrays:
            yield case(name, DTypeError, f"expected an array (*), got *{type(value).__name__}", value)
        for dtype in dtypes:
            yield case(name, DTypeError, f"expected {FLOATS}, got {np.dtype(dtype)}", np.zeros(size, dtype))
        for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.int4):
            yield case(name, DTypeError, f"expected {FLOATS}, got {np.dtype(dtype)}", np.zeros(size, dtype))
        yield case(name, DTypeError, f"expected {FLOATS}, got bool", ones(*size, dtype=bool))
        yield case(name, DTypeError, "expected a plain array, got *MaskedArray", np.ma.ones(size, F32))
        yield case(name, DTypeError, "expected a plain array, got *matrix", ones(3, 3).view(np.matrix))
        yield case(name, ArgumentError, "expected an array that can be read through DLPack, got *", Unreadable())
    for value in ("mask", 1, [[True]], np.ma.ones((T, S), bool)):
        yield case("attn_mask", DTypeError, "expected *, got *", value)
    for dtype in ("i1", "i8", "u1", "c8", "O", "U1"):
        sentence = f"expected {FLOATS} or bool, got {np.dtype(dtype)}"
        yield case("attn_mask", DTypeError, sentence, np.zeros((T, S), dtype))


def arrays_of_wrong_shape() -> Iterator[Case]:
    letters = {"query": "(B, H, T, D)", "key": "(B, G, S, D)", "value": "(B, G, S, E)"}
    for name, size in SIZES.items():
        for n in range(4):
            sentence = f"expected 4 dimensions {letters[name]}, got {n} with shape {size[:n]}"
            yield case(name, ShapeError, sentence, ones(*size[:n]))
        yield case(name, ShapeError, "expected at most 4 dimensions, got 5", ones(1, *size))
        for axis in range(4):
            empty = tuple(0 if i == axis else n for i, n in enumerate(size))
            sentence = f"expected sizes of at least 1 in {letters[name]}, got shape {empty}"
            yield case(name, ShapeError, sentence, ones(*empty))
    yield case("key", ShapeError, f"expected query's batch size 2, got shape (3, {G}, {S}, {D})", ones(3, G, S, D))
    yield case("key", ShapeError, f"expected query's batch size 2, got shape (1, {G}, {S}, {D})", ones(1, G, S, D))
    yield case("key", ShapeError, f"expected query's head size 8, got shape ({B}, {G}, {S}, 9)", ones(B, G, S, 9))
    for heads in (3, 5, 8):
        sentence = f"expected a number of heads that divides query's 4, got {heads}"
        yield case("key", ShapeError, sentence, ones(B, heads, S, D))
    for size in ((1, G, S, E), (B, 1, S, E), (B, 4, S, E), (B, G, 1, E), (B, G, 6, E)):
        yield case("value", ShapeError, f"expected shape (2, 2, 5, E) like key's, got {size}", ones(*size))
    for n, name in ((D, "query"), (E, "value")):
        huge = np.broadcast_to(ones(1), (*SIZES[name][:3], 2**16 + 1))
        yield case(name, ShapeError, f"expected a head size of at most 65536, got {2**16 + 1}", huge)
        assert n
    for size in ((4,), (S, T), (T, S + 1), (2, T, S), (B, G, T, S), (0, S), (3, 1, 1, 1), (B, H, T, 2)):
        sentence = f"expected a shape that broadcasts to (2, 4, 3, 5), got {size}"
        yield case("attn_mask", ShapeError, sentence, ones(*size, dtype=bool))
        yield case("attn_mask", ShapeError, sentence, ones(*size))
    yield case("attn_mask", ShapeError, "expected at most 4 dimensions, got 5", ones(1, B, H, T, S))


def mixed_dtypes() -> Iterator[Case]:
    for name in ("key", "value"):
        for dtype in (F64, F16, BF16):
            yield case(name, DTypeError, f"expected query's dtype float32, got {dtype}", ones(*SIZES[name], dtype=dtype))
    yield case("key", DTypeError, "expected query's dtype bfloat16, got float32", ones(*SIZES["key"]),
               query=ones(*SIZES["query"], dtype=BF16))  # fmt: skip


def masks_of_wrong_value() -> Iterator[Case]:
    """Wherever they stand, also where no query looks; out is not written before they are found."""
    sentence = "expected finite numbers or -inf, got NaN or +inf"
    hiding: list[dict[str, Any]] = [{}, {"causal": True}, {"kv_lengths": [2, 0]}, {"window": (0, 0)}]
    for value in (np.nan, np.inf):
        for dtype in (F64, F32, F16, BF16):
            mask = np.zeros((T, S), dtype)
            mask[0, S - 1] = value
            for others in hiding:
                out = np.zeros((B, H, T, E), F32)
                yield case("attn_mask", ArgumentError, sentence, mask, out=out, **others)


def numbers() -> Iterator[Case]:
    no_numbers = ["x", None, [], [1.0, 2.0], 1j, {}, True, object()]
    for name in ("softcap", "scale"):
        for value in (np.nan, np.inf, -np.inf, 0, 0.0, -1.0, np.float32(-2)):
            yield case(name, ArgumentError, f"expected a finite number above 0, got {float(value):g}", value)
        for value in no_numbers:
            if value is not None:
                yield case(name, DTypeError, f"expected a number, got {type(value).__name__}", value)
    for value in (1, 1.0, 1.5, -0.1, np.nan, np.inf, -np.inf):
        sentence = f"expected a number from 0 to below 1, got {float(value):g}"
        yield case("dropout_p", ArgumentError, sentence, value, seed=1)
    for value in no_numbers:
        yield case("dropout_p", DTypeError, f"expected a number, got {type(value).__name__}", value, seed=1)
    yield case("scale", ArgumentError, "expected *, got *", 10**400)


def names() -> Iterator[Case]:
    expected = "expected a bool, 'lower_right' or 'upper_left', got "
    for value in ("left", "", "UPPER_LEFT", "upper-left", "True"):
        yield case("causal", ArgumentError, expected + repr(value), value)
    for value in (None, 1, 0, 1.0, [], np.array([True, False])):
        yield case("causal", DTypeError, expected + "*" + type(value).__name__, value)
    expected = "expected 'auto', 'fp32' or 'fp64', got "
    for value in ("float32", "", "FP32", "bf16", "int8"):
        yield case("precision", ArgumentError, expected + repr(value), value)
    for value in (None, 32, F32, ("fp32", "fp32"), True):
        yield case("precision", DTypeError, expected + "*" + type(value).__name__, value)


def windows() -> Iterator[Case]:
    pair = "expected None or a pair (left, right) of integers or None, got "
    for value in ((), (1,), (1, 2, 3), [1]):
        yield case("window", ArgumentError, pair + repr(value), value)
    for value in (5, "ab", 1.5, {1, 2}, True):
        yield case("window", DTypeError, pair + type(value).__name__, value)
    for side in ("1", 1.0, [1], True, object()):
        yield case("window", DTypeError, pair + type(side).__name__, (side, 1))
        yield case("window", DTypeError, pair + type(side).__name__, (None, side))
    for value in ((-1, 0), (0, -1), (None, -5), [-7, None], (-(2**70), 1)):
        yield case("window", ArgumentError, "expected integers of at least 0 or None, got -*", value)


def vectors() -> Iterator[Case]:
    for name in ("kv_lengths", "query_offset", "seed"):
        for value in ("ab", b"xy", 1.5, [1.0, 2.0], ones(B), [True, False], True, object(), {}, [[1], [1, 2]], 1j):
            yield case(name, DTypeError, "expected integers, got *", value, dropout_p=0.5)
    for name in ("alibi_slopes", "sinks"):
        for value in ("abcd", [1j] * H, [True] * H, object(), {}, ["1"] * H, [[1], [1, 2]]):
            yield case(name, DTypeError, "expected numbers, got *", value)
    for value in (1.0, [1.0], [1.0] * 5, ones(1, H), ones(H, 1)):
        yield case("sinks", ShapeError, f"expected shape (4,), got {np.shape(value)}", value)
    for value in (1.0, [1.0], [1.0] * 5, ones(1, H), ones(H, B), ones(B, 1), ones(3, H)):
        sentence = f"expected shape (4,) or (2, 4), got {np.shape(value)}"
        yield case("alibi_slopes", ShapeError, sentence, value)
    for name in ("kv_lengths", "query_offset", "seed", "alibi_slopes", "sinks"):
        yield case(name, ShapeError, "expected at most 2 dimensions, got 3", ones(1, 1, 1, dtype=int), dropout_p=0.5)
    for value in (3, [1], [1, 2, 3], ones(1, B, dtype=int), ones(0, dtype=int)):
        yield case("kv_lengths", ShapeError, f"expected shape (2,), got {np.shape(value)}", value)
    for name in ("query_offset", "seed"):
        for value in ([1], [1, 2, 3], ones(1, B, dtype=int)):
            sentence = f"expected an int or shape (2,), got {np.shape(value)}"
            yield case(name, ShapeError, sentence, value, dropout_p=0.5)
    for value in ([-1, 2], [2, 6], np.array([2**40, 1]), [0, -(2**63)]):
        yield case("kv_lengths", ArgumentError, "expected integers from 0 to 5, got *", value)
    for value in (2**41, -(2**41), [0, 2**62], np.array([-(2**62), 0])):
        yield case("query_offset", ArgumentError, "expected integers from -* to *, got *", value)
    yield case("query_offset", ArgumentError, "expected *, got *", 2**70)
    for value in (np.nan, np.inf, -np.inf):
        yield case("alibi_slopes", ArgumentError, f"expected finite numbers, got {value}", [1, 1, value, 1])
        yield case("alibi_slopes", ArgumentError, f"expected finite numbers, got {value}", np.full((B, H), value))
    for value in (np.nan, np.inf):
        yield case("sinks", ArgumentError, f"expected finite numbers or -inf, got {value}", [value, 1, 1, 1])
    yield case("seed", ArgumentError, "expected an int or 2 ints since dropout_p is 0.5, got None", None, dropout_p=0.5)


def outputs() -> Iterator[Case]:
    def out(dtype: Any = F32) -> Any:
        return np.zeros((B, H, T, E), dtype)

    for value in (1, "out", [[[[1.0]]]], object()):
        yield case("out", DTypeError, f"expected an array (*), got {type(value).__name__}", value)
    for dtype in (F64, F16, BF16):
        yield case("out", DTypeError, f"expected query's dtype float32, got {dtype}", out(dtype))
    for dtype in ("i4", "c8", "O"):
        yield case("out", DTypeError, f"expected {FLOATS}, got {np.dtype(dtype)}", out(dtype))
    for size in ((B, H, T, E + 1), (B, H, T), (H, T, E), (1, B, H, T, E)[1:3], (B, T, H, E), (1, H, T, E), ()):
        yield case("out", ShapeError, f"expected shape (2, 4, 3, 6), got {size}", ones(*size))
    yield case("out", DTypeError, "expected a plain array, got *MaskedArray", np.ma.zeros((B, H, T, E), F32))
    yield case("out", ArgumentError, "expected writable*, got a read-only array", read_only(out()))
    misaligned = np.zeros(out().nbytes + 1, np.uint8)[1:].view(F32).reshape(out().shape)
    yield case("out", ArgumentError, "expected *aligned memory, got an unaligned*", misaligned)
    yield case("out", ArgumentError, "expected *, got *byte-swapped*", out(">f4"))
    for axis in range(4):
        repeated = np.lib.stride_tricks.as_strided(
            out(), strides=[0 if i == axis else step for i, step in enumerate(out().strides)]
        )
        yield case("out", ArgumentError, "expected elements with a place in memory each, got *overlap", repeated)
    sliding = np.lib.stride_tricks.as_strided(np.zeros(1000, F32), (B, H, T, E), (400, 100, 4, 4))
    yield case("out", ArgumentError, "expected elements with a place in memory each, got *overlap", sliding)
    for name in ("query", "key", "value", "attn_mask"):
        memory = np.zeros(1000, F32)
        size = SIZES.get(name, (B, H, T, S))
        one = memory[: np.prod(size)].reshape(size)
        for start in (0, np.prod(size) - 1):
            other = memory[start : start + B * H * T * E].reshape(B, H, T, E)
            sentence = f"expected memory apart from the inputs, got memory that overlaps {name}"
            yield case("out", ArgumentError, sentence, other, **{name: one})


def other_arguments() -> Iterator[Case]:
    for value in (0, -1, -(2**70)):
        yield case("num_threads", ArgumentError, "expected an int of at least 1, got -*" if value else
                   "expected an int of at least 1, got 0", value)  # fmt: skip
    for value in (1.0, "2", [1], True, object()):
        yield case("num_threads", DTypeError, f"expected an int or None, got {type(value).__name__}", value)


TABLES = [arrays_of_wrong_kind, arrays_of_wrong_shape, mixed_dtypes, masks_of_wrong_value, numbers, names, windows, vectors,
          outputs, other_arguments]  # fmt: skip
CASES = [entry for table in TABLES for entry in table()]


def arguments(**changes: Any) -> dict[str, Any]:
    return {name: ones(*size) for name, size in SIZES.items()} | changes


def snapshot(values: dict[str, Any]) -> dict[str, Any]:
    return {name: x.tobytes() if isinstance(x, np.ndarray) else repr(x) for name, x in values.items()}


def test_there_are_enough() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize(("argument", "error", "pattern", "changes"), CASES, ids=[entry[0] for entry in CASES])
def test_malformed_call(argument: str, error: type[Exception], pattern: str, changes: dict[str, Any]) -> None:
    given = arguments(**changes)
    before = snapshot(given)
    with pytest.raises(error, match=pattern) as caught:
        adaattn.attention(**given)
    assert type(caught.value) is error and isinstance(caught.value, adaattn.Error)
    assert "\n" not in str(caught.value)
    assert snapshot(given) == before


def test_the_call_that_they_are_made_of() -> None:
    out = np.zeros((B, H, T, E), F32)
    assert (adaattn.attention(**arguments(out=out)) == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adaattn.attention(), "missing 3 required positional arguments"),
        (lambda: adaattn.attention(*arguments().values(), None), "positional argument"),
        (lambda: adaattn.attention(**arguments(), tolerance=0.1), "unexpected keyword argument 'tolerance'"),
        (lambda: adaattn.merge(1, 2, 3), "missing 1 required positional argument"),
    ],
)
def test_calls_that_do_not_fit_the_signature(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


# ---- other functions

SIDE: dict[str, Any] = {f"{name}_{side}": ones(*size) for side in "ab" for name, size in
                        (("out", (B, H, T, E)), ("lse", (B, H, T)))}  # fmt: skip


def merges() -> Iterator[Case]:
    for name, good in SIDE.items():
        for value in (None, [1.0], "x"):
            yield case(name, DTypeError, f"expected an array (*), got {type(value).__name__}", value)
        for dtype in ("i4", "c8"):
            yield case(name, DTypeError, f"expected {FLOATS}, got {np.dtype(dtype)}", good.astype(dtype))
        yield case(name, DTypeError, "expected a floating dtype, got bool", good.astype(bool))
        n = good.ndim
        yield case(name, ShapeError, f"expected {n} dimensions *, got shape {good.shape[1:]}", good[0])
        if name != "out_a":
            sentence = f"expected the leading shape of out_a (2, 4, 3, 6), got (1, {', '.join(map(str, good.shape[1:]))})"
            yield case(name, ShapeError, sentence, good[:1])
    yield case("out_b", ShapeError, "expected the leading shape of out_a (2, 4, 3, 6), got (2, 4, 3, 7)", ones(B, H, T, 7))
    yield case("out_b", DTypeError, "expected out_a's dtype float32, got float16", ones(B, H, T, E, dtype=F16))
    yield case("lse_b", DTypeError, "expected lse_a's dtype float32, got float64", ones(B, H, T, dtype=F64))
    yield case("lse_a", DTypeError, "expected float32 for outputs of dtype float32, got float64", ones(B, H, T, dtype=F64),
               lse_b=ones(B, H, T, dtype=F64))  # fmt: skip


MERGES = list(merges())


@pytest.mark.parametrize(("argument", "error", "pattern", "changes"), MERGES, ids=[entry[0] for entry in MERGES])
def test_malformed_merge(argument: str, error: type[Exception], pattern: str, changes: dict[str, Any]) -> None:
    given = SIDE | changes
    before = snapshot(given)
    with pytest.raises(error, match=pattern):
        adaattn.merge(**given)
    assert snapshot(given) == before


@pytest.mark.parametrize("value", [0, -1, -(2**80)])
def test_thread_counts_that_are_refused(value: int) -> None:
    with pytest.raises(ArgumentError, match=rf"^n: expected an int of at least 1, got {value}$"):
        adaattn.set_num_threads(value)


@pytest.mark.parametrize("value", [1.5, "2", True, [1]])
def test_thread_counts_of_wrong_type(value: Any) -> None:
    with pytest.raises(DTypeError, match=rf"^n: expected an int or None, got {type(value).__name__}$"):
        adaattn.set_num_threads(value)


def test_families_of_errors() -> None:
    assert issubclass(ArgumentError, ValueError) and issubclass(ShapeError, ArgumentError)
    assert issubclass(DTypeError, TypeError) and issubclass(adaattn.DeviceError, RuntimeError)
    assert issubclass(adaattn.NumericalError, ArithmeticError)
