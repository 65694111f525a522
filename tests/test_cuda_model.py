"""The CUDA kernels' source on the model of cuda/model.h, against the oracle; and faults that it must see."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import re
import shutil
from typing import Any

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
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
}
FORMATS = {"fp16": F16, "bf16": BF16}
TILED = ("split", "fp16", "bf16", "int8")
RUNGS = [
    ("fp64", F32),
    ("fp32", F16),
    ("split", F32),
    ("fp16", F16),
    ("bf16", BF16),
    ("bf16", F32),
    ("int8", F16),
]
MANY = Shape(2, 2, 1, 40, 100, 24, 16)
FEW = Shape(2, 2, 1, 5, 300, 24, 40)
FIRST_SEED = int(os.environ.get("ADAATTN_MODEL_SEED", "1"))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_model.build(tmp_path_factory.mktemp("cuda"))


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
    for name in ("order", "capability"):
        options.pop(name, None)
    exact, exact_lse = reference.attention(query, key, value, return_lse=True, **options)
    unit, size = UNITS[rung], score_size(query, key, options)
    converted = rung in FORMATS and query.dtype != FORMATS[rung]
    score = (2.0**-24 if rung in FORMATS else unit) * (16 + 4 * size) + (2 * unit * size if converted else 0)
    error = score + (2 * unit if rung in FORMATS else 0) + (unit if converted else 0)
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


@pytest.mark.parametrize("rung", TILED)
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
        "k1.cuh",
        "X::V_AT + tile % 2 * X::V_STAGE",
        "X::V_AT + (tile + 1) % 2 * X::V_STAGE",
        "k1_bf16.cu",
    ),
    "swizzle by addition": ("k1.cuh", "(place ^ (uint32_t)(", "(place + (uint32_t)(", "k1_bf16.cu"),
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
    "hidden values are not zeros": ("k1.cuh", "i >= lowest && i < end ? n : 0", "n", "k1_bf16.cu"),
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
}


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """The kernels with each fault; "": with none. Of one width, without optimisation: they compile sooner."""
    flags = ["-DADA_K1_WIDTHS(X)=X(32)", "-O0"]
    base = tmp_path_factory.mktemp("faultless")
    others = ("k1_f16.cu", "k1_split.cu", "k1_bytes.cu")
    libraries = {"": cuda_model.build(base, *flags, empty=others)}

    def build(fault: str) -> ctypes.CDLL:
        file, old, new, source = FAULTS[fault]
        folder = tmp_path_factory.mktemp("faulty")
        shutil.copytree(cuda_model.CUDA, folder / "cuda")
        (folder / "csrc").symlink_to(cuda_model.CUDA.parent / "csrc")
        text = (folder / "cuda" / file).read_text()
        pattern = r"\s+".join(map(re.escape, old.split(" ")))
        text, count = re.subn(pattern, new.replace("\\", "\\\\"), text)
        assert count == 1, fault
        (folder / "cuda" / file).write_text(text)
        return cuda_model.build(folder, *flags, cuda=folder / "cuda", sources=[source], objects=base)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        libraries.update(zip(FAULTS, pool.map(build, FAULTS), strict=True))
    return libraries


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
        floats = inputs(rng, Shape(1, 4, 1, 3, 600, 32, 32), F32, 2.0)
        check(kernels, "split", *floats, order=order, causal=True)
        check(kernels, "split", *floats, order=order, kv_lengths=np.array([9]))


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_faults_are_found(fault: str, faulty: dict[str, ctypes.CDLL]) -> None:
    if not fault:
        find_faults(faulty[fault])
        return
    with pytest.raises(AssertionError):
        find_faults(faulty[fault])
