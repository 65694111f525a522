"""Malformed calls, each with the type of its error and its sentence; no argument changes."""

from __future__ import annotations

import dataclasses
import functools
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


def case(error: type[Exception], argument: str, sentence: str, given: Any, /, **others: Any) -> Case:
    """A call with one argument (and what else it needs) replaced; `*` in the sentence stands for anything."""
    text = re.escape(f"{argument}: {sentence}").replace(r"\*", ".*")
    return argument, error, f"^{text}$", others | {argument: given}


dtype_error, shape_error, value_error = (
    functools.partial(case, error) for error in (DTypeError, ShapeError, ArgumentError)
)


def ones(*size: int, dtype: Any = F32) -> Any:
    return np.ones(size, dtype)


def arrays_of_wrong_kind() -> Iterator[Case]:
    class Unreadable:
        __dlpack__ = None

    no_arrays = [
        None,
        1,
        1.5,
        "query",
        b"bytes",
        [[[[1.0]]]],
        ((1.0,),),
        {},
        object(),
        range(4),
        np.float32(1),
    ]
    dtypes = ["i1", "i4", "i8", "u2", "u8", "c8", "c16", "O", "U3", "S2", "M8[s]", "m8[s]", "f4,f4"]
    if np.dtype(np.longdouble).itemsize > 8:
        dtypes.append("g")
    for name, size in SIZES.items():
        for value in no_arrays:
            yield dtype_error(name, f"expected an array (*), got *{type(value).__name__}", value)
        for dtype in dtypes:
            yield dtype_error(name, f"expected {FLOATS}, got {np.dtype(dtype)}", np.zeros(size, dtype))
        for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.int4):
            yield dtype_error(name, f"expected {FLOATS}, got {np.dtype(dtype)}", np.zeros(size, dtype))
        yield dtype_error(name, f"expected {FLOATS}, got bool", ones(*size, dtype=bool))
        yield dtype_error(name, "expected a plain array, got *MaskedArray", np.ma.ones(size, F32))
        yield dtype_error(name, "expected a plain array, got *matrix", ones(3, 3).view(np.matrix))
        yield value_error(name, "expected an array that can be read through DLPack, got *", Unreadable())
    for value in ("mask", 1, [[True]], np.ma.ones((T, S), bool)):
        yield dtype_error("attn_mask", "expected *, got *", value)
    for dtype in ("i1", "i8", "u1", "c8", "O", "U1"):
        sentence = f"expected {FLOATS} or bool, got {np.dtype(dtype)}"
        yield dtype_error("attn_mask", sentence, np.zeros((T, S), dtype))


def arrays_of_wrong_shape() -> Iterator[Case]:
    letters = {"query": "(B, H, T, D)", "key": "(B, G, S, D)", "value": "(B, G, S, E)"}
    for name, size in SIZES.items():
        for n in range(4):
            sentence = f"expected 4 dimensions {letters[name]}, got {n} with shape {size[:n]}"
            yield shape_error(name, sentence, ones(*size[:n]))
        yield shape_error(name, "expected at most 4 dimensions, got 5", ones(1, *size))
        for axis in range(4):
            empty = tuple(0 if i == axis else n for i, n in enumerate(size))
            sentence = f"expected sizes of at least 1 in {letters[name]}, got shape {empty}"
            yield shape_error(name, sentence, ones(*empty))
    yield shape_error("key", f"expected query's batch size 2, got shape (3, {G}, {S}, {D})", ones(3, G, S, D))
    yield shape_error("key", f"expected query's batch size 2, got shape (1, {G}, {S}, {D})", ones(1, G, S, D))
    yield shape_error("key", f"expected query's head size 8, got shape ({B}, {G}, {S}, 9)", ones(B, G, S, 9))
    for heads in (3, 5, 8):
        sentence = f"expected a number of heads that divides query's 4, got {heads}"
        yield shape_error("key", sentence, ones(B, heads, S, D))
    for size in ((1, G, S, E), (B, 1, S, E), (B, 4, S, E), (B, G, 1, E), (B, G, 6, E)):
        yield shape_error("value", f"expected shape (2, 2, 5, E) like key's, got {size}", ones(*size))
    for name in ("query", "value"):
        huge = np.broadcast_to(ones(1), (*SIZES[name][:3], 2**16 + 1))
        yield shape_error(name, f"expected a head size of at most 65536, got {2**16 + 1}", huge)
    for size in ((4,), (S, T), (T, S + 1), (2, T, S), (B, G, T, S), (0, S), (3, 1, 1, 1), (B, H, T, 2)):
        sentence = f"expected a shape that broadcasts to (2, 4, 3, 5), got {size}"
        yield shape_error("attn_mask", sentence, ones(*size, dtype=bool))
        yield shape_error("attn_mask", sentence, ones(*size))
    yield shape_error("attn_mask", "expected at most 4 dimensions, got 5", ones(1, B, H, T, S))


def mixed_dtypes() -> Iterator[Case]:
    for name in ("key", "value"):
        for dtype in (F64, F16, BF16):
            other = ones(*SIZES[name], dtype=dtype)
            yield dtype_error(name, f"expected query's dtype float32, got {dtype}", other)
    others = {"query": ones(*SIZES["query"], dtype=BF16)}
    yield dtype_error("key", "expected query's dtype bfloat16, got float32", ones(*SIZES["key"]), **others)


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
                yield value_error("attn_mask", sentence, mask, out=out, **others)


def numbers() -> Iterator[Case]:
    no_numbers = ["x", None, [], [1.0, 2.0], 1j, {}, True, object(), np.array("x"), np.ones(2)]
    for name in ("softcap", "scale"):
        for value in (np.nan, np.inf, -np.inf, 0, 0.0, -1.0, np.float32(-2)):
            yield value_error(name, f"expected a finite number above 0, got {float(value):g}", value)
        for value in no_numbers:
            if value is not None:
                yield dtype_error(name, f"expected a number, got *{type(value).__name__}", value)
    for value in (1.5, -0.1, np.nan, np.inf, -np.inf):
        sentence = f"expected a number from 0 to 1, got {float(value):g}"
        yield value_error("dropout_p", sentence, value, seed=1)
    for value in no_numbers:
        yield dtype_error("dropout_p", f"expected a number, got *{type(value).__name__}", value, seed=1)
    yield value_error("scale", "expected *, got *", 10**400)


def names() -> Iterator[Case]:
    expected = "expected a bool, 'lower_right' or 'upper_left', got "
    for value in ("left", "", "UPPER_LEFT", "upper-left", "True"):
        yield value_error("causal", expected + repr(value), value)
    for value in (None, 1, 0, 1.0, [], np.array([True, False])):
        yield dtype_error("causal", expected + "*" + type(value).__name__, value)
    expected = (
        "expected 'auto', 'fp64', 'fp32', 'bf16x6', 'bf16x3', 'fp16', 'int16', 'bf16', 'int8', 'fp8' or "
        "a pair of rungs (scores, values), got "
    )
    for value in ("float32", "", "FP32", "int4", "bf16x2", "FP8", "int8 ", "int8,bf16"):
        yield value_error("precision", expected + repr(value), value)
        for pair in ((value, "fp32"), ("fp32", value)):
            yield value_error("precision", expected + repr(value), pair)
    for pair in (("auto", "fp32"), ("int8", "auto"), ("auto", "auto")):
        yield value_error("precision", expected + "'auto'", pair)
    for value in (None, 32, F32, True, ["int8", "bf16"], {"int8": "bf16"}):
        yield dtype_error("precision", expected + "*" + type(value).__name__, value)
        yield dtype_error("precision", expected + "*" + type(value).__name__, ("fp32", value))
        yield dtype_error("precision", expected + "*" + type(value).__name__, (value, "fp32"))
    yield dtype_error("precision", expected + "tuple", (("int8", "bf16"), "fp32"))
    for value in ((), ("int8",), ("int8",) * 3):
        yield value_error("precision", expected + repr(value), value)
    on_cpu = "expected a rung that CPUs compute, got 'fp8', which takes a GPU of compute capability 8.9 "
    on_cpu += "or more"
    for value in ("fp8", ("fp8", "bf16"), ("int8", "fp8")):
        yield value_error("precision", on_cpu, value)
    for name in ("min_precision", "max_precision"):
        yield value_error(name, on_cpu, "fp8", tolerance=0.1)
    on_gpu = dataclasses.replace(PLAN, precision_pv=np.full((B, H), "fp8"))
    yield value_error("plan", on_cpu, on_gpu)
    for pair in (("fp64", "int8"), ("fp32", "fp64")):
        yield value_error("precision", f"expected 'fp64' for both products or none, got {pair}", pair)


def windows() -> Iterator[Case]:
    pair = "expected None or a pair (left, right) of integers or None, got "
    for value in ((), (1,), (1, 2, 3), [1]):
        yield value_error("window", pair + repr(value), value)
    for value in (5, "ab", 1.5, {1, 2}, True):
        yield dtype_error("window", pair + type(value).__name__, value)
    for side in ("1", 1.0, [1], True, object()):
        yield dtype_error("window", pair + type(side).__name__, (side, 1))
        yield dtype_error("window", pair + type(side).__name__, (None, side))
    for value in ((-1, 0), (0, -1), (None, -5), [-7, None], (-(2**70), 1)):
        yield value_error("window", "expected integers of at least 0 or None, got -*", value)


def vectors() -> Iterator[Case]:
    no_integers = [
        "ab",
        b"xy",
        1.5,
        [1.0, 2.0],
        ones(B),
        [True, False],
        True,
        object(),
        {},
        [[1], [1, 2]],
        1j,
    ]
    for name in ("kv_lengths", "query_offset", "seed"):
        for value in no_integers:
            yield dtype_error(name, "expected integers, got *", value, dropout_p=0.5)
    for name in ("alibi_slopes", "sinks"):
        for value in ("abcd", [1j] * H, [True] * H, object(), {}, ["1"] * H, [[1], [1, 2]]):
            yield dtype_error(name, "expected numbers, got *", value)
    for value in (1.0, [1.0], [1.0] * 5, ones(1, H), ones(H, 1)):
        yield shape_error("sinks", f"expected shape (4,), got {np.shape(value)}", value)
    for value in (1.0, [1.0], [1.0] * 5, ones(1, H), ones(H, B), ones(B, 1), ones(3, H)):
        sentence = f"expected shape (4,) or (2, 4), got {np.shape(value)}"
        yield shape_error("alibi_slopes", sentence, value)
    for name in ("kv_lengths", "query_offset", "seed", "alibi_slopes", "sinks"):
        cube = ones(1, 1, 1, dtype=int)
        yield shape_error(name, "expected at most 2 dimensions, got 3", cube, dropout_p=0.5)
    for value in (3, [1], [1, 2, 3], ones(1, B, dtype=int), ones(0, dtype=int)):
        yield shape_error("kv_lengths", f"expected shape (2,), got {np.shape(value)}", value)
    for name in ("query_offset", "seed"):
        for value in ([1], [1, 2, 3], ones(1, B, dtype=int)):
            sentence = f"expected an int or shape (2,), got {np.shape(value)}"
            yield shape_error(name, sentence, value, dropout_p=0.5)
    for value in ([-1, 2], [2, 6], np.array([2**40, 1]), [0, -(2**63)]):
        yield value_error("kv_lengths", "expected integers from 0 to 5, got *", value)
    for value in (2**41, -(2**41), [0, 2**62], np.array([-(2**62), 0])):
        yield value_error("query_offset", "expected integers from -* to *, got *", value)
    yield value_error("query_offset", "expected *, got *", 2**70)
    for name in ("kv_lengths", "query_offset"):
        yield value_error(name, "expected integers *, got *", np.full(B, 2**63 + 1, np.uint64))
    for value in (np.nan, np.inf, -np.inf):
        yield value_error("alibi_slopes", f"expected finite numbers, got {value}", [1, 1, value, 1])
        yield value_error("alibi_slopes", f"expected finite numbers, got {value}", np.full((B, H), value))
    for value in (np.nan, np.inf):
        yield value_error("sinks", f"expected finite numbers or -inf, got {value}", [value, 1, 1, 1])
    sentence = "expected an int or 2 ints since dropout_p is 0.5, got None"
    yield value_error("seed", sentence, None, dropout_p=0.5)


def outputs() -> Iterator[Case]:
    def out(dtype: Any = F32) -> Any:
        return np.zeros((B, H, T, E), dtype)

    for value in (1, "out", [[[[1.0]]]], object()):
        yield dtype_error("out", f"expected an array (*), got {type(value).__name__}", value)
    for dtype in (F64, F16, BF16):
        yield dtype_error("out", f"expected query's dtype float32, got {dtype}", out(dtype))
    for dtype in ("i4", "c8", "O"):
        yield dtype_error("out", f"expected {FLOATS}, got {np.dtype(dtype)}", out(dtype))
    for size in ((B, H, T, E + 1), (B, H, T), (H, T, E), (B, H), (B, T, H, E), (1, H, T, E), ()):
        yield shape_error("out", f"expected shape (2, 4, 3, 6), got {size}", ones(*size))
    yield dtype_error("out", "expected a plain array, got *MaskedArray", np.ma.zeros((B, H, T, E), F32))
    yield value_error("out", "expected writable*, got a read-only array", read_only(out()))
    misaligned = np.zeros(out().nbytes + 1, np.uint8)[1:].view(F32).reshape(out().shape)
    yield value_error("out", "expected *aligned memory, got an unaligned*", misaligned)
    yield value_error("out", "expected *, got *byte-swapped*", out(">f4"))
    for axis in range(4):
        strides = [0 if i == axis else step for i, step in enumerate(out().strides)]
        repeated = np.lib.stride_tricks.as_strided(out(), strides=strides)
        yield value_error("out", "expected elements with a place in memory each, got *overlap", repeated)
    sliding = np.lib.stride_tricks.as_strided(np.zeros(1000, F32), (B, H, T, E), (400, 100, 4, 4))
    yield value_error("out", "expected elements with a place in memory each, got *overlap", sliding)
    for name in ("query", "key", "value", "attn_mask"):
        memory, size = np.zeros(1000, F32), SIZES.get(name, (B, H, T, S))
        one = memory[: np.prod(size)].reshape(size)
        for start in (0, np.prod(size) - 1):
            other = memory[start : start + B * H * T * E].reshape(B, H, T, E)
            sentence = (
                f"expected memory apart from the inputs, got a range of memory that overlaps that of {name}"
            )
            yield value_error("out", sentence, other, **{name: one})


def other_arguments() -> Iterator[Case]:
    for value in (0, -1, -(2**63)):
        yield value_error("num_threads", f"expected an int of at least 1, got {value}", value)
    yield value_error("num_threads", "expected an int of at least 1, got -*", -(2**70))
    for value in (1.0, "2", [1], True, object()):
        yield dtype_error("num_threads", f"expected an int or None, got {type(value).__name__}", value)
    for name in ("return_lse", "return_report"):
        yield dtype_error(name, "expected a bool, got *ndarray", np.ones(2))


def budgets() -> Iterator[Case]:
    for value in (0, 0.0, -1e-2, np.nan, np.inf, -np.inf, np.float32(-1)):
        yield value_error("tolerance", f"expected a finite number above 0, got {float(value):g}", value)
    for value in ("1e-2", "balanced", [], [1e-2], 1j, {}, True, object()):
        yield dtype_error("tolerance", f"expected a number, got {type(value).__name__}", value)
    yield value_error("tolerance", "expected a number, got *", 10**400)
    yield dtype_error("query", "expected an array (*), got type", np.ndarray, tolerance=0.1)
    sentence = "expected 'auto' beside a precision by name, got array(*)"
    yield value_error("structure", sentence, np.ones(2), precision="int8", tolerance=0.1)
    expected = "expected None or one of 'quality', 'balanced', 'speed', got "
    for value in ("fast", "", "Quality", "none"):
        yield value_error("policy", expected + repr(value), value)
    for value in (1, 1e-2, True, ["speed"], object()):
        yield dtype_error("policy", expected + type(value).__name__, value)
    yield value_error("policy", "expected None beside tolerance=0.1, got 'speed'", "speed", tolerance=0.1)
    for value in ("", "True", "never", "AUTO"):
        yield value_error("verify", f"expected True, False or 'auto', got {value!r}", value)
    for value in (None, 1, 0, 1.0, [], np.True_):
        yield dtype_error("verify", f"expected True, False or 'auto', got {type(value).__name__}", value)
    rungs = "expected 'auto', 'fp64', 'fp32', 'bf16x6', 'bf16x3', 'fp16', 'int16', 'bf16', 'int8' or 'fp8'"
    rungs += ", got "
    for name, other in (("min_precision", "max_precision"), ("max_precision", "min_precision")):
        for value in ("float32", "", "INT8", "int8/bf16"):
            yield value_error(name, rungs + repr(value), value, tolerance=0.1)
        for value in (None, 8, True, ("int8", "bf16"), np.array(["int8"])):
            yield dtype_error(name, rungs + "*" + type(value).__name__, value, tolerance=0.1)
        yield value_error(name, "expected 'auto' without a tolerance, got 'bf16'", "bf16")
        yield value_error(name, "expected 'auto' without a tolerance, got 'bf16'", "bf16", precision="int8")
        sentence = "expected 'auto' beside a precision by name, got 'bf16'"
        yield value_error(name, sentence, "bf16", precision="int8", policy="speed")
        sentence = "expected nothing beside a plan, which carries it, got 'fp32'"
        yield value_error(name, sentence, "fp32", plan=PLAN)
        limits = "expected a rung at least as exact as min_precision='fp32', got 'int8'"
        if other == "min_precision":
            yield value_error(name, limits, "int8", min_precision="fp32", tolerance=0.1)


def plans() -> Iterator[Case]:
    for value in ("balanced", 1e-2, [], {}, object(), adaattn.Plan, PLAN.to_json()):
        yield dtype_error("plan", f"expected a Plan or None, got {type(value).__name__}", value)
    sentence = "expected nothing beside a plan, which carries it, got "
    for name, value in (("tolerance", 1e-2), ("policy", "speed"), ("precision", "fp32")):
        yield value_error(name, sentence + repr(value), value, plan=PLAN)
    yield value_error("precision", sentence + "('int8', 'bf16')", ("int8", "bf16"), plan=PLAN)
    sizes = (
        f"expected one for (B, H, G, T, S, D, E, dtype) = {(B, H, G, T, S, D, E, 'float32')}, got one for "
    )
    for shape in (
        (1, H, G, T, S, D, E),
        (B, 2, G, T, S, D, E),
        (B, H, G, T + 1, S, D, E),
        (B, H, G, T, S, D, 9),
    ):
        yield value_error("plan", sizes + repr((*shape, "float32")), plan_for(*shape))
    yield value_error("plan", sizes + "*'float64')", plan_for(B, H, G, T, S, D, E, dtype=F64))
    # What is wrong with the arrays comes first.
    yield dtype_error("query", "expected an array (*), got list", [1.0], plan=PLAN)
    yield dtype_error("key", "expected an array (*), got NoneType", None, plan=PLAN)
    yield dtype_error("query", f"expected {FLOATS}, got int64", ones(B, H, T, D, dtype=int), plan=PLAN)
    yield dtype_error(
        "value", "expected query's dtype float32, got float64", ones(B, G, S, E, dtype=F64), plan=PLAN
    )
    shape = (G, S, E)
    sentence = f"expected 4 dimensions (B, G, S, E), got 3 with shape {shape}"
    yield shape_error("value", sentence, ones(*shape), plan=PLAN)
    yield shape_error(
        "key", f"expected query's head size 8, got shape {(B, G, S, 9)}", ones(B, G, S, 9), plan=PLAN
    )


def plan_for(*shape: int, dtype: Any = F32) -> adaattn.Plan:
    b, h, g, t, s, d, e = shape
    sizes = (b, h, t, d), (b, g, s, d), (b, g, s, e)
    return adaattn.plan(*(ones(*size, dtype=dtype) for size in sizes), tolerance=1e-2)


PLAN = plan_for(B, H, G, T, S, D, E)
TABLES = (arrays_of_wrong_kind, arrays_of_wrong_shape, mixed_dtypes, masks_of_wrong_value, numbers, names)
TABLES += (windows, vectors, outputs, other_arguments, budgets, plans)
CASES = [entry for table in TABLES for entry in table()]


def arguments(**changes: Any) -> dict[str, Any]:
    return {name: ones(*size) for name, size in SIZES.items()} | changes


def snapshot(values: dict[str, Any]) -> dict[str, Any]:
    return {name: x.tobytes() if isinstance(x, np.ndarray) else repr(x) for name, x in values.items()}


def test_there_are_enough() -> None:
    assert len(CASES) >= 200


def check(call: Any, entry: Case, given: dict[str, Any]) -> None:
    _, error, pattern, changes = entry
    given = given | changes
    before = snapshot(given)
    with pytest.raises(error, match=pattern) as caught:
        call(**given)
    assert type(caught.value) is error
    assert snapshot(given) == before


@pytest.mark.parametrize("entry", CASES, ids=lambda entry: entry[0])
def test_malformed_call(entry: Case) -> None:
    check(adaattn.attention, entry, arguments())


# adaattn.plan takes the same arguments, but for these.
NOT_OF_PLAN = {"precision", "plan", "verify", "out", "return_report"}


@pytest.mark.parametrize(
    "entry",
    [entry for entry in CASES if not NOT_OF_PLAN & {entry[0], *entry[3]} and "without" not in entry[2]],
    ids=lambda entry: entry[0],
)
def test_malformed_plan(entry: Case) -> None:
    budget = {} if {"tolerance", "policy"} & entry[3].keys() else {"tolerance": 1e-2}
    check(adaattn.plan, entry, arguments(**budget))


def test_a_plan_needs_a_tolerance() -> None:
    with pytest.raises(ArgumentError, match=r"^tolerance: expected a number, or a policy, got None$"):
        adaattn.plan(**arguments())


def test_the_call_that_they_are_made_of() -> None:
    out = np.zeros((B, H, T, E), F32)
    assert (adaattn.attention(**arguments(out=out)) == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adaattn.attention(), "missing 3 required positional arguments"),
        (lambda: adaattn.attention(*arguments().values(), None), "positional argument"),
        (lambda: adaattn.attention(**arguments(), toleranc=0.1), "unexpected keyword argument 'toleranc'"),
        (lambda: adaattn.merge(1, 2, 3), "missing 1 required positional argument"),
    ],
)
def test_calls_that_do_not_fit_the_signature(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


# ---- other functions

SIDE: dict[str, Any] = {
    name: ones(B, H, T, E) if name.startswith("out") else ones(B, H, T)
    for name in ("out_a", "lse_a", "out_b", "lse_b")
}


def merges() -> Iterator[Case]:
    like = {"out_b": "out_a", "lse_a": "out_a", "lse_b": "lse_a"}
    for name, good in SIDE.items():
        for value in (None, [1.0], "x"):
            yield dtype_error(name, f"expected an array (*), got {type(value).__name__}", value)
        for dtype in ("i4", "c8"):
            yield dtype_error(name, f"expected {FLOATS}, got {np.dtype(dtype)}", good.astype(dtype))
        sizes = f"expected {good.ndim} dimensions with the sizes of {like.get(name)} {good.shape}, got shape"
        if name == "out_a":
            yield dtype_error(name, f"expected {FLOATS}, got bool", good.astype(bool))
            yield shape_error(name, "expected 4 dimensions (B, H, T, E), got 3 with shape (4, 3, 6)", good[0])
            yield shape_error(
                name, "expected sizes of at least 1 in (B, H, T, E), got shape (2, 4, 0, 6)", good[:, :, :0]
            )
        else:
            yield dtype_error(name, "expected *float32*, got bool", good.astype(bool))
            yield shape_error(name, f"{sizes} {good.shape[1:]}", good[0])
            yield shape_error(name, f"{sizes} {good[:1].shape}", good[:1])
    out_shape = SIDE["out_a"].shape
    sizes = f"expected 4 dimensions with the sizes of out_a {out_shape}, got shape (2, 4, 3, 7)"
    yield shape_error("out_b", sizes, ones(B, H, T, 7))
    half, wide = ones(B, H, T, E, dtype=F16), ones(B, H, T, dtype=F64)
    yield dtype_error("out_b", "expected out_a's dtype float32, got float16", half)
    yield dtype_error("lse_b", "expected lse_a's dtype float32, got float64", wide)
    sentence = "expected float32 for outputs of dtype float32, got float64"
    yield dtype_error("lse_a", sentence, wide, lse_b=wide)


@pytest.mark.parametrize("entry", list(merges()), ids=lambda entry: entry[0])
def test_malformed_merge(entry: Case) -> None:
    check(adaattn.merge, entry, SIDE)


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
