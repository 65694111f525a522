"""Random problems with any options, layouts, NaN and infinities against the oracle."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
from hypothesis import given, note
from hypothesis import strategies as st
from support import BF16, DTYPES, F16, F32, F64, LAYOUTS, Array, Options, Shape, check, inputs, same_bits

import adaattn
from adaattn import rates

SIZES = st.integers(1, 20) | st.sampled_from([31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 260])
HEAD_SIZES = st.integers(1, 20) | st.sampled_from([31, 32, 33, 48, 63, 64, 65, 72, 100, 128])
SPECIAL = [np.nan, np.inf, -np.inf, -0.0]
MASK_DTYPES = st.sampled_from([np.dtype(bool), F64, F32, F16, BF16])
LAYOUT_NAMES = st.sampled_from(["plain", *LAYOUTS])
INT_DTYPES = st.sampled_from(["i1", "u1", "i2", "i4", "u4", "i8", "u8"])


def draw_layout(draw: Any, x: Array) -> Array:
    name = draw(LAYOUT_NAMES)
    return x if name == "plain" else LAYOUTS[name](x)


def draw_mask(draw: Any, rng: np.random.Generator, s: Shape) -> Array:
    size = [n if draw(st.booleans()) else 1 for n in (s.B, s.H, s.T, s.S)][draw(st.integers(0, 4)) :]
    dtype, hidden = draw(MASK_DTYPES), draw(st.sampled_from([0, 0.3, 0.97, 1]))
    seen = np.asarray(rng.random(size) >= hidden)
    if dtype.kind == "b":
        return seen
    low = draw(st.sampled_from([-np.inf, float(np.finfo(np.float32).min)])) if dtype != F16 else -np.inf
    return np.asarray(np.where(seen, rng.standard_normal(size), low), dtype)


def draw_options(draw: Any, rng: np.random.Generator, s: Shape) -> Options:
    """Each option is given with a probability of about one in four."""
    reach = st.none() | st.integers(0, s.S + s.T)
    integers = draw(INT_DTYPES)
    top = min(s.S, 127)
    strategies: dict[str, Any] = {
        "attn_mask": lambda: draw_layout(draw, draw_mask(draw, rng, s)),
        "causal": lambda: draw(st.sampled_from([False, True, "lower_right", "upper_left"])),
        "window": lambda: (draw(reach), draw(reach)),
        "softcap": lambda: draw(st.sampled_from([0.5, 5.0, 50.0])),
        "alibi_slopes": lambda: rng.random((s.B, s.H) if draw(st.booleans()) else s.H).astype(
            draw(st.sampled_from("fd"))
        ),
        "sinks": lambda: rng.normal(0, 2, s.H).astype(draw(st.sampled_from("fd"))),
        "kv_lengths": lambda: rng.integers(0, top + 1, s.B).astype(integers),
        "query_offset": lambda: (
            draw(st.integers(-5, s.S + 5)) if draw(st.booleans()) else rng.integers(0, top + 1, s.B)
        ),
        "scale": lambda: draw(st.sampled_from([1e-3, 0.2, 1.0])),
        "dropout_p": lambda: draw(st.sampled_from([0.01, 0.5, 0.99])),
        "precision": lambda: draw(st.sampled_from(["auto", "fp32", "fp64"])),
        "num_threads": lambda: draw(st.integers(1, 3)),
    }
    names = draw(st.lists(st.sampled_from(sorted(strategies)), unique=True, max_size=5))
    options = {name: strategies[name]() for name in names}
    if "dropout_p" in options:
        options["seed"] = (
            draw(st.integers(-(2**63), 2**64)) if draw(st.booleans()) else rng.integers(0, 2**62, s.B)
        )
    return options


def draw_shape(draw: Any) -> Shape:
    G = draw(st.integers(1, 3))
    heads = G * draw(st.integers(1, 3))
    return Shape(draw(st.integers(1, 3)), heads, G, *map(draw, (SIZES, SIZES, HEAD_SIZES, HEAD_SIZES)))


@given(st.data())
def test_against_the_oracle(data: st.DataObject) -> None:
    draw = data.draw
    s = draw_shape(draw)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrays = inputs(rng, s, draw(st.sampled_from(DTYPES)), draw(st.sampled_from([0.1, 1.0, 4.0])))
    for array in arrays:
        if draw(st.integers(0, 7)) == 7:
            array[rng.random(array.shape) < 1.5 / array.size] = draw(st.sampled_from(SPECIAL))
    options = draw_options(draw, rng, s)
    note(f"{s}, {arrays[0].dtype}, {options}")
    with np.errstate(all="ignore"):
        check(*(draw_layout(draw, x) for x in arrays), **options)


# Rates that leave every rung a chance, at any size.
RATES = np.array([[x, x, 0] for x in (5, 10, 10, 1300, 1800, 1500, 2200, 2900, 4000)], np.float64)
ROUNDING = {F64: 2.0**-53, F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}


@given(st.data())
def test_within_a_budget(data: st.DataObject) -> None:
    """Every head keeps it, to the same bits for any threads and layout, alone and by a plan."""
    draw = data.draw
    s = draw_shape(draw)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype, tolerance = draw(st.sampled_from(DTYPES)), draw(st.floats(-6, -1).map(lambda x: 10.0**x))
    query, key, value = inputs(rng, s, dtype, draw(st.sampled_from([0.1, 1.0, 4.0])))
    for array in (key, value):  # a bias, as keys have, or values far from zero
        bias = rng.normal(0, draw(st.sampled_from([0, 1, 100])), (*array.shape[:2], 1, array.shape[-1]))
        array += bias.astype(dtype)
    options = draw_options(draw, rng, s)
    lse = draw(st.booleans())
    for name in ("precision", "num_threads"):
        options.pop(name, None)
    note(f"{s}, {dtype}, {tolerance}, {options}")
    arrays = query, key, value
    with np.errstate(all="ignore"), mock.patch.object(rates, "_table", RATES):
        exact = adaattn.reference.attention(*(x.astype(np.float64) for x in arrays), **options)
        budget = options | {"return_lse": lse}
        plan = adaattn.plan(*arrays, tolerance=tolerance, **budget)
        *out, report = adaattn.attention(*arrays, tolerance=tolerance, return_report=True, **budget)
        again = adaattn.attention(
            *map(np.asfortranarray, arrays), tolerance=tolerance, num_threads=1, **budget
        )
        *planned, followed = adaattn.attention(*arrays, plan=plan, return_report=True, **budget)
    assert same_bits(tuple(out), again if lse else (again,))
    once = ~(report.retried | followed.retried)
    assert same_bits(tuple(x[once] for x in planned), tuple(x[once] for x in out))
    norm = np.linalg.norm(exact, axis=(2, 3))
    error = np.linalg.norm(out[0].astype(np.float64) - exact, axis=(2, 3))
    least = float(np.finfo(dtype if dtype != BF16 else np.float32).tiny)  # smaller outputs have fewer digits
    allowed = (tolerance if s.T < 64 else 2 * tolerance) + ROUNDING[dtype]  # a miss by chance is a small one
    assert (error <= allowed * norm + least * np.sqrt(s.T * s.E)).all(), report.table()
