"""The CUDA kernels' source on the model of cuda/model.h, against the oracle; and faults that it must see."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

import cuda_build
import cuda_model
import ml_dtypes
import numpy as np
import pytest
from support import (
    BF16,
    CASES,
    F16,
    F32,
    F64,
    Array,
    Shape,
    assert_near,
    inputs,
    largest,
    same_bits,
    score_size,
)

from adaattn import reference

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

UNITS = {
    "fp64": 2.0**-53,
    "fp32": 2.0**-24,
    "split": 2.0**-24,
    "int8": 2.0**-8,
    "int8/fp8": 2.0**-8,
    "fp8": 2.0**-6,  # of a few among many products
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
}
FORMATS = {"fp16": F16, "bf16": BF16}
TILED = ("split", "fp16", "bf16", "int8", "fp8")
RUNGS = [
    ("fp64", F32),
    ("fp32", F16),
    ("split", F32),
    ("fp16", F16),
    ("bf16", BF16),
    ("bf16", F32),
    ("int8", F16),
    ("int8/fp8", F16),
    ("fp8", F32),
]
MANY = Shape(2, 2, 1, 40, 100, 24, 16)
FEW = Shape(2, 2, 1, 5, 300, 24, 40)
FIRST_SEED = int(os.environ.get("ADAATTN_MODEL_SEED", "1"))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_model.load(cuda_build.whole(tmp_path_factory))


def check(
    kernels: ctypes.CDLL,
    rung: str,
    query: Array,
    key: Array,
    value: Array,
    *,
    again: int | None = 0,
    **options: Any,
) -> tuple[Array, Array]:
    """Compare with the oracle; again: of how many heads rows may be left to float64 (None: any number).

    A fault of the kernels that makes NaN would be mended by these rows: their number is part of the result.
    """
    out, lse, count = cuda_model.attention(kernels, query, key, value, rung=rung, **options)
    for name in ("order", "capability", "code"):
        options.pop(name, None)
    exact, exact_lse = reference.attention(query, key, value, return_lse=True, **options)
    unit, size = UNITS[rung], score_size(query, key, options)
    converted = rung in FORMATS and query.dtype != FORMATS[rung]
    score = (2.0**-24 if rung in FORMATS else unit) * (16 + 4 * size) + (2 * unit * size if converted else 0)
    error = (
        score
        + (1.5 * 2.0**-4 if "fp8" in rung else 0)
        + (2 * unit if rung in FORMATS else 0)
        + (unit if converted else 0)
    )
    kept = 1 - options.get("dropout_p", 0.0)
    tiny = float(ml_dtypes.finfo(query.dtype).smallest_subnormal)
    assert_near(out, exact, error * largest(value) / kept + tiny, float(ml_dtypes.finfo(query.dtype).eps) / 2)
    assert_near(lse, exact_lse, score, float(np.finfo(lse.dtype).eps))
    assert again is None or count == again
    return out, lse


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.startswith(("precision", "two threads"))]
)
def test_options(case: str, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for rung, dtype in RUNGS:
        for shape in (MANY, FEW) if rung in ("split", "fp16") else (MANY,):
            # In float, scores that a bias swallows are not what the bias says.
            again = None if "lowest" in case else 0
            check(kernels, rung, *inputs(rng, shape, dtype), again=again, **CASES[case](rng, shape))


def test_every_head_size(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for D in range(1, 257):
        E = D * 89 % 256 + 1
        shape = Shape(1, 1, 1, 3 if D % 2 else 17, 30, D, E)
        rung = TILED[D // 2 % 3]
        check(kernels, rung, *inputs(rng, shape, FORMATS.get(rung, F32), 0.5), causal=bool(D % 3), order=D)


@pytest.mark.parametrize("D", [16, 32, 64, 128, 256])
def test_ragged_tiles_in_any_order(D: int, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Several tiles of queries and keys, their sizes around the tiles', under other orders of the threads."""
    for seed in range(4):
        T, S = (int(x) for x in rng.integers(100, 300, 2))
        shape = Shape(1, 2, 1, T, S, D, D)
        arrays = inputs(rng, shape, BF16)
        window = (None, (70, 30))[seed % 2]
        options = {"causal": seed < 2, "window": window, "order": FIRST_SEED + seed}
        check(kernels, "bf16", *arrays, **options)
        check(kernels, "bf16", *arrays, capability=80, **options)
        check(kernels, "split", *(x.astype(F32) for x in arrays), **options)


def test_tiles_of_many_heads(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Each is computed, whatever order they come in."""
    arrays = inputs(rng, Shape(2, 9, 3, 270, 150, 16, 16), F16)
    for options in ({"causal": True}, {}, {"causal": True, "softcap": 5.0}):
        check(kernels, "fp16", *arrays, **options)


@pytest.mark.parametrize("rung", [rung for rung in TILED if rung != "fp8"])  # which has tests below
def test_splits_of_the_keys(rung: str, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    shapes = (
        Shape(1, 8, 2, 1, 1100, 64, 64),
        Shape(2, 3, 3, 16, 833, 128, 40),
        Shape(1, 6, 1, 9, 600, 256, 8),
        Shape(1, 1, 1, 1, 9001, 16, 16),
    )
    for order, shape in enumerate(shapes):
        arrays = inputs(rng, shape, FORMATS.get(rung, F32))
        lengths = rng.integers(0, shape.S, shape.B)
        for options in ({"causal": True}, {"kv_lengths": lengths}, {"window": (20, 5)}, {"softcap": 9.0}):
            check(kernels, rung, *arrays, order=order, **options)


def test_few_queries_on_floats(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Read as they are, whatever the size: of one to sixteen rows that share keys, and where they are not
    aligned the other way."""
    for order, (D, E) in enumerate(((1, 3), (31, 64), (64, 65), (100, 128), (130, 256))):
        for H, G, T in ((1, 1, 1), (2, 2, 1), (6, 2, 5), (4, 1, 4)):
            arrays = inputs(rng, Shape(2, H, G, T, 270 + 2 * D, D, E), F32)
            lengths = np.array([arrays[1].shape[2], 100])
            for x in (arrays, [guarded(x) for x in arrays]):
                check(kernels, "split", *x, order=order, causal=True, kv_lengths=lengths)


@pytest.mark.parametrize(("rung", "dtype"), RUNGS, ids=str)
def test_a_head_depends_on_itself_alone(
    rung: str, dtype: Any, kernels: ctypes.CDLL, rng: np.random.Generator
) -> None:
    """Bit for bit: neither on the batch, nor on the heads that are listed with it."""
    for shape in (Shape(2, 4, 2, 40, 100, 24, 16), Shape(2, 4, 2, 3, 600, 24, 40)):
        arrays = inputs(rng, shape, dtype, 3.0)
        whole = cuda_model.attention(kernels, *arrays, rung=rung, causal=True)[:2]
        for b in range(2):
            alone = cuda_model.attention(kernels, *(x[b : b + 1] for x in arrays), rung=rung, causal=True)[:2]
            assert same_bits(alone, tuple(x[b : b + 1] for x in whole))
        for heads in ([3], [0, 1, 2, 6]):
            out, lse, _ = cuda_model.attention(
                kernels, *arrays, rung=rung, causal=True, heads=np.array(heads)
            )
            listed = np.isin(np.arange(8), heads).reshape(2, 4)
            assert same_bits((out[listed], lse[listed]), (whole[0][listed], whole[1][listed]))
            assert (out[~listed] == 77).all() and (lse[~listed] == 77).all()


def test_the_order_of_threads_changes_no_bit(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for shape in (MANY, FEW):
        arrays = inputs(rng, shape, F16)
        runs = [
            cuda_model.attention(kernels, *arrays, rung="fp16", causal=True, order=order)[:2]
            for order in range(1, 6)
        ]
        assert all(same_bits(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
@pytest.mark.parametrize("rung", ["fp64", "fp32", *TILED])
def test_every_dtype(rung: str, dtype: Any, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for shape in (MANY, FEW):
        check(kernels, rung, *inputs(rng, shape, dtype), causal=True)


def guarded(x: Array) -> Array:
    """The same values with NaN in front of, between and behind all rows, these aligned to 16 bytes."""
    B, H, T, D = x.shape
    per = 16 // x.itemsize
    wide = np.full((B, H, T + 2, -(-D // per) * per + per), np.nan, x.dtype)
    space = np.full(wide.nbytes + 16, 255, np.uint8)
    at = -space.ctypes.data % 16
    to = space[at : at + wide.nbytes].view(x.dtype).reshape(wide.shape)
    to[...] = wide
    view = to[:, :, 1 : T + 1, :D]
    view[...] = x
    return view


@pytest.mark.parametrize("rung", ["fp64", "fp32", *TILED])
def test_nothing_is_read_beside_the_arrays(rung: str, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for shape in (MANY, FEW, Shape(1, 1, 1, 20, 30, 3, 250), Shape(1, 2, 1, 2, 30, 3, 250)):
        arrays = [guarded(x) for x in inputs(rng, shape, FORMATS.get(rung, F32))]
        check(kernels, rung, *arrays, causal=True)
        check(
            kernels,
            rung,
            *(x.swapaxes(1, 2).copy().swapaxes(1, 2)[:, :, ::-1] for x in arrays),
            window=(9, 9),
        )


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_exact_rows(dtype: Any, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for case in ("plain", "causal", "bias float64", "all"):
        for shape in (MANY, Shape(1, 1, 1, 33, 129, 256, 200)):
            arrays = inputs(rng, shape, dtype)
            options = CASES[case](rng, shape)
            heads = rng.integers(0, shape.B * shape.H, 9)
            pairs = np.stack([heads, rng.integers(0, shape.T, 9)], axis=1)
            o, lse, _ = cuda_model.attention(kernels, *arrays, rung="fp64", pairs=pairs, **options)
            exact, exact_lse = reference.attention(*arrays, return_lse=True, **options)
            at = (*np.divmod(pairs[:, 0], shape.H), pairs[:, 1])
            np.testing.assert_allclose(o, exact[at], rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(lse, exact_lse[at], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize(("rung", "dtype"), RUNGS, ids=str)
def test_one_special_value(
    rung: str,
    dtype: Any,
    which: int,
    special: float,
    shape: Shape,
    kernels: ctypes.CDLL,
    rng: np.random.Generator,
) -> None:
    """It is seen by whom it should be, and by nobody else, whatever tile it stands in."""
    arrays = inputs(rng, shape, dtype)
    arrays[which][0, -1, -2 if which == 0 else -5, 3] = special
    for options in ({}, {"causal": True, "sinks": np.ones(2)}, {"softcap": 3.0, "dropout_p": 0.5, "seed": 1}):
        out, _ = check(kernels, rung, *arrays, again=None, **options)
        assert np.isfinite(out[1].astype(F64)).all()


@pytest.mark.parametrize(("rung", "dtype"), RUNGS, ids=str)
def test_what_is_hidden_may_hold_anything(
    rung: str, dtype: Any, kernels: ctypes.CDLL, rng: np.random.Generator
) -> None:
    for shape in (MANY, FEW):
        query, key, value = inputs(rng, shape, dtype)
        lengths = np.array([shape.S - 9, shape.S // 2])
        for b in range(2):
            key[b, :, lengths[b] :], value[b, :, lengths[b] :] = np.nan, np.inf
        check(kernels, rung, query, key, value, kv_lengths=lengths)
        mask = np.ones((shape.T, shape.S), bool)
        mask[:, ::7] = False
        key[:, :, ::7], value[:, :, ::7] = np.inf, np.nan
        check(kernels, rung, query, key, value, kv_lengths=lengths, attn_mask=mask, again=None)


@pytest.mark.parametrize(("rung", "dtype"), RUNGS, ids=str)
def test_rows_without_keys(rung: str, dtype: Any, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for shape in (MANY, FEW):
        arrays = inputs(rng, shape, dtype)
        rows = np.arange(shape.T)[:, None] % 3 > 0
        for options in (
            {"attn_mask": rows},
            {"attn_mask": np.where(rows, 0.0, -np.inf)},
            {"kv_lengths": np.array([0, 20])},
            {"causal": True, "query_offset": -3},
            {"window": (0, 0), "query_offset": shape.S + 9},
        ):
            out, lse = check(kernels, rung, *arrays, **options)
            assert (lse == -np.inf).any() and not out[lse == -np.inf].any()
            check(kernels, rung, *arrays, sinks=np.array([0.5, 9]), **options)


def test_scores_far_beyond_the_format(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """References rise again and again, and what overflows a half is computed in float64."""
    for shape in (MANY, FEW):
        query, key, value = inputs(rng, shape, F32, 3.0)
        key *= np.linspace(0.1, 5, shape.S, dtype=F32)[:, None]
        check(kernels, "fp16", query.astype(F16), key.astype(F16), value.astype(F16))
        check(kernels, "bf16", query.astype(BF16), key.astype(BF16), value.astype(BF16))
        check(kernels, "split", query, key, value)
        value[0, 0, 4] = 1e6
        check(kernels, "split", query, key, value)
        assert cuda_model.attention(kernels, query, key, value, rung="fp16")[2] == shape.H // shape.G
        out, _, _ = cuda_model.attention(kernels, query, key, value, rung="fp16")
        exact = reference.attention(query, key, value)
        np.testing.assert_allclose(out[0, :2], exact[0, :2], rtol=1e-5)


# ---- fp8


def frobenius(x: Array, exact: Array) -> float:
    return float(np.linalg.norm(x.astype(F64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(("rung", "most"), [("int8/fp8", 4.4e-2), ("fp8", 6.2e-2)])
def test_errors_of_fp8(rung: str, most: float, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Of normal entries, whatever bias keys have and whatever the values' sizes, on tiles of all widths."""
    for D, E, T in ((1, 32, 17), (32, 48, 40), (64, 64, 3), (96, 128, 70), (128, 31, 9), (256, 250, 5)):
        query, key, value = inputs(rng, Shape(1, 2, 1, T, 400, D, E), F32)
        key += rng.standard_normal((1, 1, 1, D)).astype(F32) * 5
        value *= np.float32(10.0) ** rng.integers(-30, 30)
        for options in ({}, {"causal": True, "softcap": 4.0}, {"sinks": np.array([1.0, -2])}):
            out, lse, _ = cuda_model.attention(kernels, query, key, value, rung=rung, **options)
            exact, exact_lse = reference.attention(query, key, value, return_lse=True, **options)
            assert frobenius(out, exact) < most
            assert np.abs(lse - exact_lse).max() < 2 * most


def test_one_value_is_exact_in_fp8(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Where keys that share a value are all of a row, the rounding of their weights cancels."""
    for T in (40, 3):
        query, key = np.zeros((1, 1, T, 32), F32), np.zeros((1, 1, 300, 32), F32)
        query[..., 0], key[..., 0] = 1, -16
        key[0, 0, [5, 200], 0] = 0, np.log(25 / 16)  # a weight that e4m3 does not have
        value = 2.0 ** rng.integers(-3, 3, (1, 1, 300, 32)).astype(F32)
        value[:, :, 5] = value[:, :, 200]
        out, _, again = cuda_model.attention(kernels, query, key, value, rung="int8/fp8", scale=1.0)
        assert again == 0
        np.testing.assert_allclose(out, np.broadcast_to(value[:, :, 200:201], out.shape), rtol=2e-3)


def test_tiles_of_fp8_are_added_in_float(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Of 4096 equal weights, where the tensor cores would cut off the last digits of each product."""
    add_many_tiles(kernels, rng)


def add_many_tiles(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    query, key = np.zeros((1, 1, 17, 32), F32), np.zeros((1, 1, 4096, 32), F32)
    value = 128 + 16 * rng.integers(0, 8, (1, 1, 4096, 32)).astype(F32)
    out, lse, _ = cuda_model.attention(kernels, query, key, value, rung="fp8")
    np.testing.assert_allclose(out, np.broadcast_to(value.mean(axis=2, keepdims=True), out.shape), rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(4096), rtol=1e-6)


@pytest.mark.parametrize(
    ("capability", "code"), [(80, 80), (86, 80), (89, 80), (89, 89), (90, 90), (100, 80), (120, 80)]
)
def test_code_that_computes_fp8(capability: int, code: int, kernels: ctypes.CDLL) -> None:
    """What was compiled for the chip, not what it could run."""
    x, chip = np.ones((1, 1, 1, 8), F32), {"capability": capability, "code": code}
    if code >= 89:
        cuda_model.attention(kernels, x, x, x, rung="fp8", **chip)
    else:
        with pytest.raises(AssertionError, match="801"):
            cuda_model.attention(kernels, x, x, x, rung="fp8", **chip)


# ---- lists of blocks of keys

LISTED = [("split", F32), ("fp16", F16), ("bf16", BF16)]


def shown_by(lists: list[list[list[int]]], shape: Shape, rows: int) -> Array:
    """What tiles of so many queries see of the blocks on their lists, as a mask."""
    mask = np.zeros((shape.B * shape.H, shape.T, shape.S), bool)
    for n, of_head in enumerate(lists):
        for tile, blocks in enumerate(of_head):
            for block in blocks:
                mask[n, tile * rows : (tile + 1) * rows, 64 * block : 64 * block + 64] = True
    return mask.reshape(shape.B, shape.H, shape.T, shape.S)


def listed_rows(rung: str) -> int:
    return 64 if rung == "split" else 128


@pytest.mark.parametrize(("rung", "dtype"), LISTED, ids=str)
def test_lists_are_walked(rung: str, dtype: Any, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Any lists, in any order of the threads: what is not on them is not there."""
    rows = listed_rows(rung)
    for order, shape in enumerate((Shape(1, 2, 1, 150, 330, 24, 40), Shape(2, 2, 2, 70, 200, 96, 72))):
        tiles, blocks = -(-shape.T // rows), -(-shape.S // 64)
        for options in ({"causal": True}, {"kv_lengths": np.array([shape.S - 70] * shape.B)}):
            # What no row of a tile sees is not listed; the first block is, for all others.
            lists = [
                [
                    [j for j in range(blocks) if j * 64 <= (shape.S - 71, tile * rows + shape.S - shape.T)[
                        "causal" in options] and (rng.random() < 0.5 or j == 0)]
                    for tile in range(tiles)
                ]
                for _ in range(shape.B * shape.H)
            ]  # fmt: skip
            arrays = [guarded(x) for x in inputs(rng, shape, dtype)]
            mask = shown_by(lists, shape, rows)
            out, lse, again = cuda_model.attention(
                kernels, *arrays, rung=rung, lists=lists, order=order, **options
            )
            exact, exact_lse = reference.attention(*arrays, attn_mask=mask, return_lse=True, **options)
            unit = UNITS[rung]
            score = 2.0**-24 * (16 + 4 * score_size(*arrays[:2], options))
            weight = 2 * unit if rung in FORMATS else 0
            assert again == 0
            assert_near(
                out, exact, (score + weight) * largest(arrays[2]), float(ml_dtypes.finfo(dtype).eps) / 2
            )
            assert_near(lse, exact_lse, score, 2.0**-22)
    whole = [[list(range(blocks))] * tiles] * (shape.B * shape.H)
    plain = cuda_model.attention(kernels, *arrays, rung=rung, capability=80)[:2]
    if rung != "split":  # the same tiles of keys
        assert same_bits(cuda_model.attention(kernels, *arrays, rung=rung, lists=whole)[:2], plain)
    one = cuda_model.attention(kernels, *arrays, rung=rung, lists=whole[1:2], heads=np.array([1]))
    np.testing.assert_allclose(one[0][0, 1].astype(F64), plain[0][0, 1].astype(F64), atol=8 * UNITS[rung])
    assert (one[0][0, 0] == 77).all() and (one[0][1] == 77).all()


@pytest.mark.parametrize(("rung", "dtype"), LISTED, ids=str)
def test_rows_whose_lists_are_empty(
    rung: str, dtype: Any, kernels: ctypes.CDLL, rng: np.random.Generator
) -> None:
    """They have no key by their spans, or else are computed in float64 as if there were no lists."""
    shape = Shape(1, 1, 1, 70, 130, 16, 16)
    arrays = inputs(rng, shape, dtype)
    none = [[[]] * -(-shape.T // listed_rows(rung))]
    out, lse, again = cuda_model.attention(kernels, *arrays, rung=rung, lists=none, kv_lengths=np.array([0]))
    assert not out.any() and (lse == -np.inf).all() and again == 0
    out, _, again = cuda_model.attention(kernels, *arrays, rung=rung, lists=none)
    exact = reference.attention(*arrays)
    assert again == 1 and abs(out.astype(F64) - exact).max() < 2 * float(ml_dtypes.finfo(dtype).eps)


def topical(rng: np.random.Generator, shape: Shape, dtype: Any) -> list[Array]:
    """Blocks of keys on one of four topics; tiles of 128 queries look at two, 16 queries at a time."""
    topics = 4 * rng.standard_normal((4, shape.D))
    t = np.arange(shape.T)
    of_queries = 2 * (t // 128 % 2) + t // 16 % 2
    of_keys = rng.permutation(-(-shape.S // 64)).repeat(64)[: shape.S] % 4
    query = topics[of_queries] + 0.1 * rng.standard_normal((shape.B, shape.H, shape.T, shape.D))
    key = topics[of_keys] + 0.1 * rng.standard_normal((shape.B, shape.G, shape.S, shape.D))
    value = rng.standard_normal((shape.B, shape.G, shape.S, shape.E))
    return [x.astype(dtype) for x in (query, key, value)]


def left_out(arrays: list[Array], listed: Array, rows: int, options: dict[str, Any]) -> Array:
    """The weight of what is not on the lists, of every row."""
    B, H, T, S = (*arrays[0].shape[:3], arrays[1].shape[2])
    lists = [[list(x[1 : 1 + x[0]]) for x in of_head] for of_head in listed]
    shown = shown_by(lists, Shape(B, H, 1, T, S, 1, 1), rows)
    one = np.ones((*arrays[1].shape[:3], 1))
    lse = reference.attention(*arrays[:2], one, return_lse=True, **options)[1]
    part = reference.attention(*arrays[:2], one, return_lse=True, attn_mask=shown, **options)[1]
    return 1 - np.exp(np.where(lse > -np.inf, part - lse, 0))


MAKE = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (450, None)},
    "lengths": {"kv_lengths": np.array([433]), "query_offset": 200, "causal": True},
    "negative": {"scale": -0.3},
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("rung", "dtype"), [*LISTED, ("split", F64)], ids=str)
def test_lists_leave_out_what_may_be(
    rung: str, dtype: Any, name: str, kernels: ctypes.CDLL, rng: np.random.Generator
) -> None:
    shape, options = Shape(1, 2, 1, 200, 700, 40, 16), MAKE[name]
    arrays = topical(rng, shape, dtype)
    listed, counts, _ = cuda_model.attention(kernels, *arrays, rung=rung, thin=(0.0, 1e-3, 1e-3), **options)
    assert (listed[..., 0] == counts[..., 0]).all() and (
        counts[..., 0] < counts[..., 2] - counts[..., 1]
    ).any()
    for own in listed.reshape(-1, listed.shape[-1]):
        assert (np.diff(own[1 : 1 + own[0]]) > 0).all() and (own[1 + own[0] :] == 77).all()
    for order in (1, 2):
        again = cuda_model.attention(
            kernels, *arrays, rung=rung, thin=(0.0, 1e-3, 1e-3), order=order, **options
        )
        assert same_bits(again[:2], (listed, counts))
    lost = left_out(arrays, listed, listed_rows(rung), options)
    assert (lost <= 1e-3 * np.sqrt(shape.E) / 2).all()
    looked = cuda_model.attention(kernels, *arrays, rung=rung, thin=(0.0, 1e-3, 1e-3), looked=1, **options)
    tile = 2 % counts.shape[1]
    assert (looked[1][:, 0] == counts[:, tile]).all() and (looked[0] == 77).all()
    none = cuda_model.attention(kernels, *arrays, rung=rung, thin=(0.0, 0.0, 1e-3), **options)
    assert (none[1][..., 0] == none[1][..., 2] - none[1][..., 1]).all()


def test_what_no_bound_holds_for_stays(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """One key that some row sees, and numbers that are none."""
    shape = Shape(1, 1, 1, 128, 512, 32, 32)
    arrays = topical(rng, shape, F32)
    thin = {"rung": "bf16", "thin": (0.0, 1e-3, 1e-3)}
    listed = cuda_model.attention(kernels, *arrays, **thin)[0][0, 0]
    without = next(j for j in range(8) if j not in listed[1 : 1 + listed[0]])
    for which, x in ((1, np.nan), (2, np.nan), (2, np.inf), (1, None)):
        other = [a.copy() for a in arrays]
        other[which][0, 0, 64 * without + 5] = arrays[0][0, 0, 3] if x is None else x
        kept = cuda_model.attention(kernels, *other, **thin)[0][0, 0]
        assert without in kept[1 : 1 + kept[0]]
    for x in (np.nan, np.inf):
        other = [a.copy() for a in arrays]
        other[0][0, 0, 7, 3] = x
        kept = cuda_model.attention(kernels, *other, **thin)[0][0, 0]
        assert kept[0] == 8


def check_what_may_be_left_out(kernels: ctypes.CDLL, order: int = 1) -> None:
    """Blocks without radius, each 1.44 octaves below the one before it: bounds are what weights are."""
    query, key = np.zeros((1, 1, 64, 16)), np.zeros((1, 1, 1900, 16))
    query[..., 0] = 4
    key[..., 0] = 8 - 0.25 * (np.arange(1900) // 64)
    value = np.ones((1, 1, 1900, 4))
    value[:, :, :950] *= 3
    arrays = [x.astype(BF16) for x in (query, key, value)]
    rms = np.sqrt((value**2).sum(-1).mean())
    for thin, share in (((0.5, 0, 1), 0.5 / 12), ((0, 0.1, 1), 0.1 * rms / 12), ((1, 1, 1e-4), 1e-4)):
        listed, counts, _ = cuda_model.attention(
            kernels, *arrays, rung="bf16", thin=thin, order=order, scale=1.0
        )
        kept = -np.log2(share / 30) / np.log2(np.e)  # the rows see 30 blocks
        assert abs(kept % 1 - 0.5) < 0.4
        # The last block is not whole, and always there.
        assert list(listed[0, 0, 1 : 1 + listed[0, 0, 0]]) == [*range(int(kept) + 1), 29]
        assert counts[0, 0].tolist() == [int(kept) + 2, 0, 30]


def test_what_may_be_left_out(kernels: ctypes.CDLL) -> None:
    check_what_may_be_left_out(kernels)


# What one mistake in a kernel's text looks like: file, text that stands there once, what replaces it, and the
# translation unit that has to be compiled again.
FAULTS = {
    "copies are not waited for": ("k1.cuh", "ada_copy_wait<0>(); /* this", "/* this", "k1_bf16.cu"),
    "queries still arrive at the end": (
        "k1.cuh",
        "ada_copy_wait<0>(); /* the queries",
        "/* the queries",
        "k1_bf16.cu",
    ),
    "no barrier behind the wait": ("k1.cuh", "ada_sync(); /* all have", "/* all have", "k1_bf16.cu"),
    "values go to the other stage": (
        "k1_tiling.cuh",
        "v_to = shared + (uint32_t)(X::V_AT + turn %",
        "v_to = shared + (uint32_t)(X::V_AT + (turn + 1) %",
        "k1_bf16.cu",
    ),
    "swizzle by addition": ("k1_tiling.cuh", "(place ^ (uint32_t)(", "(place + (uint32_t)(", "k1_bf16.cu"),
    "one key too many": ("k1.cuh", "8 * n + c < end ?", "8 * n + c <= end ?", "k1_bf16.cu"),
    "one key too few": ("k1.cuh", "8 * n + c >= lowest &&", "8 * n + c > lowest &&", "k1_bf16.cu"),
    "a tile too many is plain": (
        "k1.cuh",
        "plain_end = low.end / X::BN",
        "plain_end = low.end / X::BN + 1",
        "k1_bf16.cu",
    ),
    "outputs keep their old reference": ("k1.cuh", "rows.o[mr][n][2 * half] *= by;", "", "k1_bf16.cu"),
    "sums keep their old reference": ("k1.cuh", "rows.l[mr][half] *= by;", "", "k1_bf16.cu"),
    "half of a row's sum": ("k1.cuh", "l += ada_shuffle_xor(l, 2);", "", "k1_bf16.cu"),
    "the wrong half of a key": ("k1.cuh", "q[0][mr], k[0], k[2]", "q[0][mr], k[0], k[1]", "k1_bf16.cu"),
    "values are not transposed": (
        "k1.cuh",
        "ada_load_transposed(v, ada_along",
        "ada_load_matrices(v, ada_along",
        "k1_bf16.cu",
    ),
    "weights of the wrong rows": (
        "k1.cuh",
        "&s[mr][j / 8 + i / 2][i % 2 * 2]",
        "&s[mr][j / 8 + i / 2][i / 2 * 2]",
        "k1_bf16.cu",
    ),
    "hidden values are not zeros": ("k1_tiling.cuh", "i >= lowest && i < end ? n : 0", "n", "k1_bf16.cu"),
    "warps merge at different references": (
        "k1.cuh",
        "end[0] == m ? 1 : ada_exp2(end[0] - m)",
        "1",
        "k1_bf16.cu",
    ),
    "splits merge at different references": ("combine.cu", "end[1] * weights[n]", "end[1]", "combine.cu"),
    "splits merge before all weights lie": (
        "combine.cu",
        "/ 32] = saw; ada_sync();",
        "/ 32] = saw;",
        "combine.cu",
    ),
    "half of a score": ("k0.cuh", "lanes < LANES;", "lanes < LANES / 2;", "k0.cu"),
    "half of a score of few": ("few.cu", "lanes < LANES; lanes", "lanes < LANES / 4; lanes", "few.cu"),
    "one key too many of few": ("few.cu", "j < spans[r].end;", "j <= spans[r].end;", "few.cu"),
    "outputs of few keep their old reference": ("few.cu", "o[r][c] *= by[r];", ";", "few.cu"),
    "sums of few keep their old reference": ("few.cu", "fmaf(l[r], by[r], sum)", "l[r] + sum", "few.cu"),
    "parts overlap": ("few.cu", "all.end < part_end ? all.end : part_end", "all.end", "few.cu"),
    "groups of few merge at different references": (
        "few.cu",
        "end_of[0] == most ? 1 : ada_exp2(end_of[0] - most)",
        "1",
        "few.cu",
    ),
    "groups merge without a barrier": ("k0.cuh", "= own; } ada_sync();", "= own; }", "k0.cu"),
    "the block before that on the list": (
        "k1.cuh",
        "list[1 + turn / PER]",
        "list[turn / PER]",
        "k1_listed.cu",
    ),
    "half of a block twice": ("k1.cuh", "* PER + turn % PER", "* PER", "k1_listed.cu"),
    "the list of another tile": (
        "k1.cuh",
        "w.unit * a.tiles + w.tile)",
        "w.unit * a.tiles + a.tiles - 1 - w.tile)",
        "k1_listed.cu",
    ),
    "a list without its end": (
        "k1.cuh",
        "end = list[0] * (ADA_LIST_BLOCK / X::BN)",
        "end = list[0] * (ADA_LIST_BLOCK / X::BN) - 1",
        "k1_listed.cu",
    ),
    "stages by the tile's number": (
        "k1.cuh",
        "stage = (uint32_t)(turn % 2",
        "stage = (uint32_t)(n / 2 % 2",
        "k1_listed.cu",
    ),
    "bounds without radius": ("lists.cu", "score + r.norm * f.reach + slack", "score + slack", "lists.cu"),
    "blocks seen in part are left out": (
        "lists.cu",
        "high <= r.span.end && f.reach",
        "f.reach",
        "lists.cu",
    ),
    "values that are none are left out": (
        "lists.cu",
        "larger(finite ? apart2 : ADA_INF, reach2)",
        "larger(apart2, reach2)",
        "lists.cu",
    ),
    "each thread lists from its own end": (
        "lists.cu",
        "before += i < thread ?",
        "before += i <= thread ?",
        "lists.cu",
    ),
    "rows of one warp alone": (
        "lists.cu",
        "ada_place<typename X::QK>(16 * warp +",
        "ada_place<typename X::QK>(",
        "lists.cu",
    ),
    "each block has the whole share": ("lists.cu", "/ (float)(end - begin)", "", "lists.cu"),
    "outputs lie half as far apart": (
        "lists.cu",
        "moves / (2 * values.most)",
        "moves / values.most",
        "lists.cu",
    ),
    "floors in natural units": (
        "lists.cu",
        "const float octaves = (float)(p.scale * ADA_LOG2E);",
        "const float octaves = 3 * (float)(p.scale * ADA_LOG2E);",
        "lists.cu",
    ),
}
FP8_FAULTS = {
    "keys of columns in their own order": (
        "pack.cuh",
        "key - k + k % 8 / 2 * 4 + k / 8 * 2 + k % 2",
        "key",
        "launch.cu",
    ),
    "columns of keys that are not there": ("pack.cuh", "if (key < keys)", "if (key < 64)", "launch.cu"),
    "columns before all have read the largest": (
        "pack.cuh",
        "ada_sync(); /* all have read",
        "/* all have read",
        "launch.cu",
    ),
    "infinities become the largest number": (
        "pack.cuh",
        "fabsf(x) < ADA_INF ? x * factor : ADA_NAN",
        "x * factor",
        "launch.cu",
    ),
    "columns of another tile": (
        "k1_tiling.cuh",
        "(first / ADA_UNIT_ROWS) * E *",
        "(first / ADA_UNIT_ROWS) * X::WIDTH *",
        "k1_fp8.cu",
    ),
    "the wrong half of a column": (
        "k1_fp8.cuh",
        "weights[mr][j], v[0], v[2]",
        "weights[mr][j], v[0], v[1]",
        "k1_fp8.cu",
    ),
    "weights beyond the largest number": ("k1_tiling.cuh", "ADA_FP8_LAG 0.75f", "ADA_FP8_LAG 8", "k1_fp8.cu"),
    "rounded sums keep their old reference": ("k1.cuh", "rows.rounded[mr][half] *= by;", "", "k1_fp8.cu"),
    "outputs are divided by what was not rounded": (
        "k1_fp8.cuh",
        "rounded > 0 ? rows.l[mr][half] / rounded : 1",
        "1",
        "k1_fp8.cu",
    ),
    "sums of tiles stay in the tensor cores": (
        "k1_fp8.cuh",
        "ada_multiply_e4m3(sum[mr][0], weights",
        "ada_multiply_e4m3(*(float(*)[4])rows.o[mr][e / 8], weights",
        "k1_fp8.cu",
    ),
    "dropped weights leave the sum": (
        "k1_fp8.cuh",
        "if (a.p.drop_below) {",
        "if (a.p.drop_below) { rows.rounded[0][0] = rows.rounded[0][1] = rows.l[0][0];",
        "k1_fp8.cu",
    ),
    "all tiles have the first one's unit": (
        "k1.cuh",
        "X::FP8 ? a.v.units[units + n * X::BN / ADA_UNIT_ROWS]",
        "X::FP8 ? a.v.units[units]",
        "k1_fp8.cu",
    ),
    "the lse forgets the weights' octaves": (
        "k1.cuh",
        "rows.m[mr][half] * factor - X::BELOW, rows.l",
        "rows.m[mr][half] * factor, rows.l",
        "k1_fp8.cu",
    ),
}


# Of one width, without optimisation: they compile sooner.
FLAGS = ("-DADA_K1_WIDTHS(X)=X(32)", "-O0")


@pytest.fixture(scope="session")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    others = ("k1_f16.cu", "k1_split.cu", "k1_bytes.cu")
    return cuda_build.faultless(tmp_path_factory, cuda_model.SOURCES, *FLAGS, empty=others)


def find_faults(kernels: ctypes.CDLL) -> None:
    """Raises where the kernels are wrong: a few problems, each under several orders of the threads."""
    for order in range(1, 4):
        rng = np.random.default_rng(order)
        arrays = [guarded(x) for x in inputs(rng, Shape(1, 2, 1, 40, 200, 32, 32), BF16, 2.0)]
        arrays[1][:, :, 190:], arrays[2][:, :, 190:] = np.nan, np.nan
        lengths = {"kv_lengths": np.array([190])}
        check(kernels, "bf16", *arrays, order=order, causal=True, **lengths)
        check(kernels, "bf16", *arrays, order=order, window=(30, 20), **lengths)
        few = inputs(rng, Shape(1, 2, 1, 9, 600, 32, 32), BF16, 2.0)
        check(kernels, "bf16", *few, order=order, causal=True)
        check(kernels, "bf16", *few, order=order, kv_lengths=np.array([9]))
        check(kernels, "fp64", *arrays, order=order, **lengths)
        find_faults_of_lists(kernels, order)


def find_faults_of_lists(kernels: ctypes.CDLL, order: int) -> None:
    """The same of lists: walked, and made where something must not be left out."""
    check_what_may_be_left_out(kernels, order)
    rng = np.random.default_rng(order)
    shape = Shape(1, 1, 1, 140, 520, 32, 16)
    arrays = [guarded(x) for x in inputs(rng, shape, BF16, 2.0)]
    lists = [[[1, 2, 4, 7], [0, 3, 6]]]
    out = cuda_model.attention(kernels, *arrays, rung="bf16", lists=lists, order=order)[0].astype(F64)
    exact = reference.attention(*arrays, attn_mask=shown_by(lists, shape, 128))
    np.testing.assert_allclose(out, exact, atol=0.06)

    looked_at = topical(rng, shape, BF16)
    looked_at[1][0, 0, 325] = looked_at[0][0, 0, 3]  # by one row
    none = [x.copy() for x in looked_at]
    none[2][0, 0, 260, 3] = np.nan
    later = [looked_at[0][:, :, :60], looked_at[1].copy(), looked_at[2]]
    later[1][0, 0, 508:512] = 40 * looked_at[0][0, 0, 20]  # in a block that all rows see in part: not these
    causal = {"causal": True}
    for arrays, options in (
        (looked_at, {}),
        (looked_at, causal),
        (none, {}),
        (later, causal | {"query_offset": 448}),
    ):
        listed, counts, _ = cuda_model.attention(
            kernels, *arrays, rung="bf16", thin=(0.0, 1e-3, 1e-3), order=order, **options
        )
        assert (left_out(arrays, listed, 128, options) < 1e-3).all()
        assert (counts[..., 0] < 8).any()
        if arrays is none:
            assert all(4 in own[1 : 1 + own[0]] for own in listed[0])

        floats = inputs(rng, Shape(1, 4, 1, 3, 600, 32, 32), F32, 2.0)
        check(kernels, "split", *floats, order=order, causal=True)
        check(kernels, "split", *floats, order=order, kv_lengths=np.array([9]))


def find_fp8_faults(kernels: ctypes.CDLL) -> None:
    """The same of fp8."""
    for order in range(1, 3):
        rng = np.random.default_rng(order)
        query, key, value = (guarded(x) for x in inputs(rng, Shape(1, 2, 1, 40, 200, 32, 24), F32, 2.0))
        key *= np.linspace(0.1, 2, 200, dtype=F32)[:, None]
        value *= np.float32(4) ** (np.arange(200) // 64)[:, None].astype(F32)
        for options in ({"kv_lengths": np.array([190])}, {"causal": True, "dropout_p": 0.5, "seed": 1}):
            arrays = query, key, value
            out, lse, again = cuda_model.attention(kernels, *arrays, rung="int8/fp8", order=order, **options)
            exact, exact_lse = reference.attention(*arrays, return_lse=True, **options)
            assert again == 0 and frobenius(out, exact) < 4.4e-2
            assert np.abs(lse - exact_lse).max() < 0.3
        few = query[:, :, :3]
        out, _, again = cuda_model.attention(kernels, few, key, value, rung="fp8", order=order)
        assert again == 0 and frobenius(out, reference.attention(few, key, value)) < 0.2
        value[0, 0, 70, 3] = np.inf
        assert cuda_model.attention(kernels, query, key, value, rung="int8/fp8", order=order)[2] == 2
    add_many_tiles(kernels, rng)
    test_one_value_is_exact_in_fp8(kernels, rng)


def test_nothing_is_found_without_a_fault(faultless: Path) -> None:
    kernels = cuda_model.load(cuda_build.link(faultless.glob("*.o"), faultless))
    find_faults(kernels)
    find_fp8_faults(kernels)


@pytest.mark.parametrize("fault", cuda_build.some(FAULTS | FP8_FAULTS, 3))
def test_faults_are_found(fault: str, faultless: Path, tmp_path: Path) -> None:
    find = find_fp8_faults if fault in FP8_FAULTS else find_faults
    library = cuda_build.with_mistake(tmp_path, faultless, *(FAULTS | FP8_FAULTS)[fault], *FLAGS)
    with pytest.raises(AssertionError):
        find(cuda_model.load(library))
