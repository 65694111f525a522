"""Same arguments, same bits: whatever the threads, the neighbours in the batch, the place in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import (
    BF16,
    CASES,
    DTYPES,
    F32,
    LAYOUTS,
    SHAPES,
    Array,
    Options,
    OptionsOf,
    Shape,
    bool_mask,
    inputs,
    same_bits,
)

import adaattn

pytestmark = pytest.mark.isa_sample

BATCH = Shape(3, 4, 2, 150, 200, 40, 48)
LONG = Shape(2, 2, 1, 1, 9000, 64, 64)
WIDE = [BATCH, LONG, Shape(1, 8, 8, 3, 2500, 24, 8)]


def attention(arrays: list[Array], **options: Any) -> tuple[Array, Array]:
    return adaattn.attention(*arrays, return_lse=True, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", ["plain", "causal", "window", "bias (B, H, T, S)", "mask (B, 1, T, S)", "all"]
)
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_threads(shape: Shape, case: str, dtype: Any, rng: np.random.Generator) -> None:
    arrays, options = inputs(rng, shape, dtype), CASES[case](rng, shape)
    results = [attention(arrays, **options, num_threads=n) for n in (1, 2, 3, 8, 1)]
    assert all(same_bits(result, results[0]) for result in results)


def part(options: Options, b: slice, h: slice, H: int) -> Options:
    """The options as they concern some sequences and heads of a batch."""
    picked = dict(options)
    for name, x in options.items():
        if name == "attn_mask":
            picked[name] = x[b, h] if x.shape[1] == H else x[b]
        elif name in ("kv_lengths", "query_offset", "seed"):
            picked[name] = x[b]
        elif name == "sinks" or (name == "alibi_slopes" and x.ndim == 1):
            picked[name] = x[h]
        elif name == "alibi_slopes":
            picked[name] = x[b, h]
    return picked


BATCHED = [
    "plain",
    "causal",
    "mask (B, 1, T, S)",
    "bias (B, H, T, S)",
    "lengths",
    "offsets",
    "dropout, seeds",
    "sinks",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*BATCHED, "alibi (B, H)"])
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_alone_or_in_a_batch(shape: Shape, case: str, dtype: Any, rng: np.random.Generator) -> None:
    arrays, options = inputs(rng, shape, dtype), CASES[case](rng, shape)
    if case == "offsets" and shape.B == 1:
        options["query_offset"] = rng.integers(0, shape.S, 1)
    together = attention(arrays, **options)
    group = shape.H // shape.G
    for b in range(shape.B):
        one = slice(b, b + 1)
        alone = attention([x[one] for x in arrays], **part(options, one, slice(None), shape.H))
        assert same_bits(alone, tuple(x[one] for x in together))
        for g in range(shape.G if "seed" not in options else 0):
            heads = slice(g * group, (g + 1) * group)
            picked = [x[one, heads if i == 0 else slice(g, g + 1)] for i, x in enumerate(arrays)]
            alone = attention(picked, **part(options, one, heads, shape.H))
            assert same_bits(alone, tuple(x[one, heads] for x in together))


@pytest.mark.parametrize("special", [1e30, np.nan, np.inf])
def test_neighbours_that_overflow(special: float, rng: np.random.Generator) -> None:
    arrays = inputs(rng, BATCH)
    before = attention(arrays)
    for x in arrays:
        x[1, 0] *= special
    with np.errstate(all="ignore"):
        after = attention(arrays)
    for a, b in zip(before, after, strict=True):
        assert same_bits(a[[0, 2]], b[[0, 2]]) and same_bits(a[:, 2:], b[:, 2:])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options_of", [CASES["plain"], CASES["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("shape", [*SHAPES, LONG], ids=str)
def test_layouts(
    shape: Shape,
    options_of: OptionsOf,
    dtype: Any,
    layout: Callable[[Array], Array],
    rng: np.random.Generator,
) -> None:
    arrays, options = inputs(rng, shape, dtype), options_of(rng, shape)
    expected = attention(arrays, **options)
    for i in range(3):
        views = [layout(x) if i == j else x for j, x in enumerate(arrays)]
        assert same_bits(attention(views, **options), expected)
    views = {name: layout(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    assert same_bits(attention([layout(x) for x in arrays], **views), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("shape", [BATCH, LONG], ids=str)
def test_zero_strides(shape: Shape, axis: int, dtype: Any, rng: np.random.Generator) -> None:
    arrays = inputs(rng, shape, dtype)
    views = [np.broadcast_to(x.take([0], axis), x.shape) for x in arrays]
    assert same_bits(attention(views), attention([x.copy() for x in views]))
    size = shape.B, shape.H, shape.T, shape.S
    mask = np.broadcast_to(bool_mask(rng, *size).take([0], axis), size)
    assert same_bits(attention(arrays, attn_mask=mask), attention(arrays, attn_mask=mask.copy()))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_inputs_that_share_memory(dtype: Any, rng: np.random.Generator) -> None:
    base = inputs(rng, Shape(2, 6, 6, 90, 90, 32, 32), dtype)[0]
    views = [base[:, :2], base[:, 1:3], base[:, 4:]]
    assert same_bits(attention(views, causal=True), attention([x.copy() for x in views], causal=True))
    assert same_bits(attention([base] * 3), attention([base.copy() for _ in range(3)]))


@pytest.mark.parametrize("offset", range(0, 64, 4))
def test_every_alignment(offset: int, rng: np.random.Generator) -> None:
    for shape in (SHAPES[5], LONG):
        arrays = inputs(rng, shape)
        moved = [
            np.frombuffer(b" " * offset + x.tobytes(), np.uint8)[offset:].view(x.dtype).reshape(x.shape)
            for x in arrays
        ]
        assert same_bits(attention(moved), attention(arrays))


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_again(shape: Shape, rng: np.random.Generator) -> None:
    """Repeated calls, with others between them that leave other numbers in the scratch memory."""
    arrays, options = inputs(rng, shape), CASES["all"](rng, shape)
    first = attention(arrays, **options)
    for other in SHAPES:
        attention(inputs(rng, other, spread=100))
        assert same_bits(attention(arrays, **options), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_asking_for_lse_changes_nothing(dtype: Any, rng: np.random.Generator) -> None:
    for shape in WIDE:
        arrays = inputs(rng, shape, dtype)
        assert same_bits(attention(arrays)[0], adaattn.attention(*arrays))


@pytest.mark.parametrize("options", [{"attn_mask": np.ones((1, 1), bool)}, {"window": (9000, 9000)}], ids=str)
def test_options_that_hide_nothing_change_nothing(options: Any, rng: np.random.Generator) -> None:
    for shape in WIDE:
        arrays = inputs(rng, shape)
        assert same_bits(attention(arrays, **options), attention(arrays))
