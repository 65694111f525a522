"""The CUDA kernels of the gradients on the model of cuda/model.h, against the oracle; and faults that it must
see."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

import cuda_backward
import cuda_build
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
    Options,
    Shape,
    finite,
    inputs,
    largest,
    same_bits,
    score_size,
)

from adaattn import Gradients, reference

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

UNITS = {"fp64": 2.0**-53, "fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
RUNGS = [("fp64", F64), ("fp32", F32), ("fp16", F16), ("bf16", BF16)]
SMALL = Shape(2, 2, 1, 21, 50, 24, 16)
FIRST_SEED = int(os.environ.get("ADAATTN_MODEL_SEED", "1"))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_backward.load(cuda_build.whole(tmp_path_factory))


def problem(
    rng: np.random.Generator, shape: Shape, dtype: Any, options: Options, spread: float = 1.0
) -> list[Array]:
    """grad_out, query, key, value, out and lse, the last two the oracle's."""
    arrays = inputs(rng, shape, dtype, spread)
    grad_out = rng.standard_normal((*arrays[0].shape[:3], shape.E)).astype(dtype)
    out, lse = reference.attention(*arrays, return_lse=True, **options)
    return [grad_out, *arrays, out.astype(dtype), lse.astype(F64 if dtype == F64 else F32)]


def everything(options: Options) -> list[str]:
    """All that these options have gradients for."""
    names = ["query", "key", "value", *(x for x in ("sinks", "alibi_slopes") if options.get(x) is not None)]
    mask = options.get("attn_mask")
    return names if mask is None or mask.dtype == bool else [*names, "attn_mask"]


def row_norms(x: Array) -> Array:
    return np.sqrt(np.sum(finite(x) ** 2, axis=-1))


def check(
    kernels: ctypes.CDLL,
    rung: str,
    arrays: list[Array],
    options: Options,
    *,
    unfit: int | None = 0,
    **more: Any,
) -> Gradients:
    """Compare with the oracle; unfit: how many key heads float64 may have to compute (None: any number).

    It would mend what a fault makes NaN. Errors are bounded in Frobenius norms, by the rounding of a weight
    times the norm of what it is multiplied with; those of sums over rows one by one.
    """
    grad_out, query, key, value, *_ = arrays
    needs = more.pop("needs", everything(options))
    actual, again = cuda_backward.attention_backward(
        kernels, *arrays, rung=rung, needs=needs, **options, **more
    )
    exact = reference.attention_backward(*arrays, needs=needs, **options)
    unit = UNITS[rung]
    error = min(unit, 2.0**-24) * (16 + 8 * score_size(query, key, options))
    error += unit if rung in ("fp16", "bf16") else 0
    error += (
        UNITS["fp16" if query.dtype == F16 else "bf16"] / 2 if query.dtype in (F16, BF16) else 0
    )  # of out
    scale = options.get("scale") or query.shape[-1] ** -0.5
    rows = row_norms(grad_out) / (1 - options.get("dropout_p", 0.0))
    reach = query.shape[2] + key.shape[2] + largest(np.asarray(options.get("query_offset", 0)))
    for name, a, e in zip(Gradients._fields, actual, exact, strict=True):
        if a is None:
            continue
        by_score = 2 * float(np.max(row_norms(value)))
        whole = float(np.linalg.norm(rows))
        size = {
            "query": scale * by_score * np.max(row_norms(key)) * whole,
            "key": scale * by_score * np.max(row_norms(query)) * whole,
            "value": whole,
            "attn_mask": by_score * whole * (rows.size * key.shape[2] / e.size) ** 0.5,
            "sinks": by_score * rows.sum(),
            "alibi_slopes": by_score * rows.sum() * reach,
        }[name]
        epsilon = float(ml_dtypes.finfo(a.dtype).eps)
        tiny = float(ml_dtypes.finfo(a.dtype).smallest_subnormal) * e.size**0.5
        good, a = np.isfinite(e), a.astype(F64)
        np.testing.assert_array_equal(a[~good], e[~good], err_msg=name)
        found = float(np.linalg.norm((a - e)[good]))
        allowed = error * size + epsilon * np.linalg.norm(e[good]) + tiny
        assert found <= allowed, (name, found, allowed)
    assert unfit is None or rung == "fp64" or int(again.sum()) == unfit
    return actual


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.startswith(("precision", "two threads"))]
)
def test_options(case: str, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for rung, dtype in RUNGS:
        options = CASES[case](rng, SMALL)
        unfit = None if "lowest" in case else 0
        check(kernels, rung, problem(rng, SMALL, dtype, options), options, unfit=unfit)


@pytest.mark.parametrize("rung", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_rungs_of_other_dtypes(rung: str, dtype: Any, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Any dtype on plain arithmetic; tiles are for arrays of their own."""
    if rung in ("fp32", {F16: "fp16", BF16: "bf16"}.get(dtype)):
        check(kernels, rung, problem(rng, SMALL, dtype, {"causal": True}), {"causal": True})
        check(kernels, "fp64", problem(rng, SMALL, dtype, {"causal": True}), {"causal": True})


@pytest.mark.parametrize("D", [64, 128, 256])
def test_ragged_tiles_in_any_order(D: int, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Several tiles of queries and keys under other orders of the threads."""
    for seed in range(3):
        T, S = (int(x) for x in rng.integers(130, 300, 2)) if D < 256 else (int(rng.integers(20, 90)), 70)
        options = [{"causal": True}, {"window": (70, 30)}, {}][seed]
        arrays = problem(rng, Shape(1, 2, 1, T, S, D, D), BF16, options)
        check(kernels, "bf16", arrays, options, order=FIRST_SEED + seed)
    arrays = problem(rng, Shape(1, 1, 1, 130, 100, D, D), F32, {"causal": True})
    check(kernels, "fp32", arrays, {"causal": True}, order=FIRST_SEED)


def test_every_eighth_head_size(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for n, D in enumerate([1, 2, 3, 7, 8, 16, 31, 33, 63, 65, 72, 100, 127, 129, 160, 192, 255, 256]):
        E = D * 89 % 256 + 1
        shape = Shape(1, 1, 1, 17 if n % 2 else 3, 20, D, E)
        for rung, dtype in (RUNGS[1 + n % 3], ("fp64", F32) if n % 4 == 0 else RUNGS[3]):
            check(kernels, rung, problem(rng, shape, dtype, {}, 0.5), {}, order=n + 1)


@pytest.mark.parametrize(
    "needs", [["query"], ["key"], ["value"], ["sinks"], ["attn_mask", "alibi_slopes"]], ids=str
)
def test_only_what_is_wanted(needs: list[str], kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for shape in (SMALL, Shape(1, 2, 1, 9, 20, 200, 8)):
        options = CASES["all"](rng, shape)
        for rung, dtype in RUNGS:
            got = check(kernels, rung, problem(rng, shape, dtype, options), options, needs=needs)
            assert [name for name, x in got._asdict().items() if x is not None] == sorted(
                needs, key=Gradients._fields.index
            )


def test_bits(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """A key head's depend neither on the order of threads nor on the batch."""
    options = {"causal": True, "softcap": 4.0}
    for rung, dtype in RUNGS[1:]:
        arrays = problem(rng, Shape(2, 4, 2, 40, 90, 24, 16), dtype, options)
        whole, _ = cuda_backward.attention_backward(kernels, *arrays, rung=rung, **options)
        for order in range(2, 5):
            other, _ = cuda_backward.attention_backward(kernels, *arrays, rung=rung, order=order, **options)
            assert same_bits(other[:3], whole[:3])
        one = [x[1:, -1:] if x.shape[1] == 2 else x[1:, 2:] for x in arrays]
        alone, _ = cuda_backward.attention_backward(kernels, *one, rung=rung, **options)
        assert same_bits(alone.query, whole.query[1:, 2:]) and same_bits(alone.key, whole.key[1:, 1:])
        assert same_bits(alone.value, whole.value[1:, 1:])


def turned(x: Array) -> Array:
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def test_layouts(kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Strides of any kind; NaN stands beside the arrays, and nothing of it is read."""
    for rung, dtype in RUNGS:
        arrays = problem(rng, SMALL, dtype, {})
        plain, _ = cuda_backward.attention_backward(kernels, *arrays, rung=rung)
        for layout in (
            guarded,
            turned,
            lambda x: np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1],
            np.asfortranarray,
        ):
            other, unfit = cuda_backward.attention_backward(kernels, *map(layout, arrays), rung=rung)
            assert same_bits(other[:3], plain[:3]) and (rung == "fp64" or not unfit.any())
        wide = [np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, dtype)[..., ::2] for x in arrays[:5]]
        for to, x in zip(wide, arrays, strict=False):
            to[...] = x
        other, _ = cuda_backward.attention_backward(kernels, *wide, arrays[5], rung=rung)
        assert same_bits(other[:3], plain[:3])


def guarded(x: Array) -> Array:
    """The same values with NaN in front of, between and behind all rows, these aligned to 16 bytes."""
    if x.ndim == 3:
        wide = np.full((*x.shape[:2], x.shape[2] + 2), np.nan, x.dtype)
        wide[..., 1:-1] = x
        return wide[..., 1:-1]
    per = 16 // x.itemsize
    wide = np.full((*x.shape[:2], x.shape[2] + 2, -(-x.shape[3] // per) * per + per), np.nan, x.dtype)
    space = np.full(wide.nbytes + 16, 255, np.uint8)
    to = space[-space.ctypes.data % 16 :][: wide.nbytes].view(x.dtype).reshape(wide.shape)
    to[...] = wide
    view = to[:, :, 1:-1, : x.shape[3]]
    view[...] = x
    return view


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["grad_out", "query", "key", "value"])
@pytest.mark.parametrize(("rung", "dtype"), RUNGS, ids=str)
def test_special_values(
    rung: str, dtype: Any, which: int, kernels: ctypes.CDLL, rng: np.random.Generator
) -> None:
    """They are seen by whom they should be, and by nobody else; their key head is computed in float64."""
    for special in (np.nan, np.inf):
        for options in ({"causal": True}, {"softcap": 3.0, "dropout_p": 0.5, "seed": 1}):
            arrays = problem(rng, SMALL, dtype, options)
            arrays[which][0, -1, -2, 3] = special
            arrays[4:] = (
                x.astype(like.dtype)
                for x, like in zip(
                    reference.attention(*arrays[1:4], return_lse=True, **options), arrays[4:], strict=True
                )
            )
            actual, unfit = cuda_backward.attention_backward(kernels, *arrays, rung=rung, **options)
            exact = reference.attention_backward(*arrays, **options)
            assert rung == "fp64" or unfit.tolist() == [[1], [0]]
            for a, e in zip(actual[:3], exact[:3], strict=True):
                a = a.astype(F64)
                np.testing.assert_array_equal(np.isnan(a), np.isnan(e))
                good = np.isfinite(e)
                np.testing.assert_allclose(
                    a[good], e[good], atol=30 * UNITS[rung] * largest(e), rtol=30 * UNITS[rung]
                )


@pytest.mark.parametrize(("rung", "dtype"), RUNGS, ids=str)
def test_what_is_hidden_may_hold_anything(
    rung: str, dtype: Any, kernels: ctypes.CDLL, rng: np.random.Generator
) -> None:
    options: Options = {"kv_lengths": np.array([41, 13])}
    arrays = problem(rng, SMALL, dtype, options)
    for b, n in enumerate(options["kv_lengths"]):
        arrays[2][b, :, n:], arrays[3][b, :, n:] = np.nan, np.inf
    got = check(kernels, rung, arrays, options)
    assert not got.key[0, :, 41:].any() and not got.value[1, :, 13:].any()
    options["attn_mask"] = np.arange(50) % 7 > 0
    arrays = problem(rng, SMALL, dtype, options)
    arrays[2][:, :, ::7], arrays[3][:, :, ::7] = np.inf, np.nan
    check(kernels, rung, arrays, options, unfit=None)
    rows = {"attn_mask": np.arange(21)[:, None] % 3 > 0}
    arrays = problem(rng, SMALL, dtype, rows)
    arrays[0][:, :, ::3], arrays[1][:, :, ::3] = np.nan, np.inf
    got = check(kernels, rung, arrays, rows, unfit=None)
    assert not got.query[:, :, ::3].any()


@pytest.mark.parametrize("rung", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("size", [100.0, 3e3])
def test_scores_that_swallow_the_digits_of_the_lse(
    size: float, rung: str, kernels: ctypes.CDLL, rng: np.random.Generator
) -> None:
    """Weights are exact there, from the inputs alone: one key has it all."""
    dtype = {"fp32": F32, "fp16": F16, "bf16": BF16}[rung]
    arrays = inputs(rng, Shape(1, 1, 1, 40, 40, 16, 16), dtype)
    arrays[:2] = (x * dtype.type(size**0.5 * 4) for x in arrays[:2])
    out, lse = reference.attention(*arrays, return_lse=True)
    arrays = [rng.standard_normal(out.shape).astype(dtype), *arrays, out.astype(dtype), lse.astype(F32)]
    actual, unfit = cuda_backward.attention_backward(kernels, *arrays, rung=rung)
    exact = reference.attention_backward(*arrays)
    assert unfit.all()
    for a, e in zip(actual[:3], exact[:3], strict=True):
        assert np.linalg.norm(a.astype(F64) - e) <= 2 * UNITS[rung] * np.linalg.norm(exact.value) + 2 * UNITS[
            rung
        ] * np.linalg.norm(e)


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_a_loss_of_any_scale_in_fp16(size: float, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """dS is scaled: it neither overflows nor vanishes where grad_out does not."""
    arrays = problem(rng, Shape(1, 2, 1, 60, 200, 32, 32), F16, {})
    arrays[0] = (arrays[0].astype(F32) * size).astype(F16)
    actual, unfit = cuda_backward.attention_backward(kernels, *arrays, rung="fp16")
    exact = reference.attention_backward(*arrays)
    assert not unfit.any()
    for a, e in zip(actual[:3], exact[:3], strict=True):
        tiny = 2.0**-25 * e.size**0.5
        assert np.linalg.norm(a.astype(F64) - e) <= 2.0**-9 * np.linalg.norm(e) + tiny


# ---- verification


def truths(arrays: list[Array], options: Options) -> tuple[dict[str, Array], Array, Array]:
    """What is told of every query, from dense weights; dK and dV by the out and the lse that are given."""
    grad_out, query, key, value, out, given = (x.astype(F64) for x in arrays)
    per, S = query.shape[1] // key.shape[1], key.shape[2]
    eye = np.broadcast_to(np.eye(S), (*key.shape[:2], S, S))
    plain = {name: x for name, x in options.items() if name not in ("dropout_p", "seed")}
    weights, lse = reference.attention(query, key, eye, return_lse=True, **plain)
    kept = reference.attention(query, key, eye, **options)
    seen = weights > 0
    key, value = (np.repeat(x, per, axis=1) for x in (key, value))
    scale = options.get("scale") or query.shape[-1] ** -0.5
    dots, gradients = (x @ y.swapaxes(-1, -2) for x, y in ((query, key), (grad_out, value)))
    gradients = np.where(seen, gradients * kept, 0) / np.where(seen, weights, 1)
    cap = options.get("softcap")
    slopes = weights * (1 - np.tanh(dots * scale / cap) ** 2) if cap else weights
    delta = (weights * gradients).sum(-1)
    scores = slopes * (gradients - delta[..., None])
    off = np.exp(np.where(seen.any(-1), lse - given, 0))[..., None]
    by_given = off * slopes * (gradients - (grad_out * out).sum(-1)[..., None])
    of_keys = [by_given.swapaxes(-1, -2) @ query * scale, (off * kept).swapaxes(-1, -2) @ grad_out]
    dk, dv = (x.reshape(*x.shape[:1], -1, per, *x.shape[2:]).sum(2) for x in of_keys)
    told = {
        "lse": lse / np.log(2),
        "delta": delta,
        "query2": scale**2 * (query**2).sum(-1),
        "grad2": (grad_out**2).sum(-1),
        "weight2": (weights**2).sum(-1),
        "slope2": (slopes**2).sum(-1),
        "score2": (scores**2).sum(-1),
        "both": (scores * slopes).sum(-1),
    }
    return told, dk, dv


def check_rows(
    kernels: ctypes.CDLL, arrays: list[Array], options: Options, rung: str, order: int = 1
) -> None:
    """Rows of queries and keys, and the norms of all, against the oracle."""
    run = cuda_backward.Verification(kernels, *arrays, rung=rung, order=order, **options)
    (B, H, T, D), (_, G, S, _) = arrays[1].shape, arrays[2].shape
    (told, dk, dv), rng = truths(arrays, options), np.random.default_rng(order)
    exact_out, exact_lse = reference.attention(
        *(x.astype(F64) for x in arrays[1:4]), return_lse=True, **options
    )
    exact = reference.attention_backward(
        *(x.astype(F64) for x in arrays[:4]), exact_out, exact_lse, **options
    )
    close: Options = {"rtol": 1e-9, "atol": 1e-11}
    wanted = [(int(x), np.unique(rng.integers(0, T, 4)).tolist()) for x in range(B * H)]
    wanted[-1] = (B * H - 1, [T - 1])
    for (head, rows), found in zip(wanted, run.rows(False, wanted), strict=True):
        b, h = divmod(head, H)
        for t, x in zip(rows, found, strict=True):
            for name, of_row in told.items():
                np.testing.assert_allclose(
                    x[cuda_backward.TRUTHS.index(name)], of_row[b, h, t], err_msg=name, **close
                )
            np.testing.assert_allclose(x[8] * np.log(2), arrays[5][b, h, t], rtol=1e-6, atol=1e-6)
            out = arrays[4][b, h, t].astype(F64)
            np.testing.assert_allclose(x[9], (arrays[0][b, h, t].astype(F64) * out).sum(), **close)
            np.testing.assert_allclose(x[10 : 10 + D], exact.query[b, h, t], **close)
            assert (x[10 + D :] == run.results.query[b, h, t]).all()
    wanted = [(int(x), np.unique(rng.integers(0, S, 4)).tolist()) for x in range(B * G)]
    for (head, rows), found in zip(wanted, run.rows(True, wanted), strict=True):
        b, g = divmod(head, G)
        for j, x in zip(rows, found, strict=True):
            both = np.concatenate([dk[b, g, j], dv[b, g, j]])
            np.testing.assert_allclose(x[: both.size], both, **close)
            both = np.concatenate([run.results.key[b, g, j], run.results.value[b, g, j]])
            assert (x[both.size :] == both).all()
    queries, keys = run.norms()
    norms = [(x.astype(F64) ** 2).sum(-1) for x in (arrays[0], arrays[1], arrays[4], *run.results[:3])]
    np.testing.assert_allclose(queries[..., 0], norms[0], **close)
    np.testing.assert_allclose(queries[..., 1], norms[0] * norms[1] * norms[2], **close)
    np.testing.assert_allclose(queries[..., 2], norms[3], **close)
    np.testing.assert_allclose(keys[..., :2], np.stack(norms[4:], -1), **close)
    without = {name: x for name, x in options.items() if name not in ("dropout_p", "seed", "sinks")}
    eye = np.broadcast_to(np.eye(S), (B, G, S, S))
    weights = reference.attention(*(x.astype(F64) for x in arrays[1:3]), eye, **without) > 0
    assert (queries[..., 3] == weights.any(-1)).all()
    assert (keys[..., 2] == weights.any(2).reshape(B, G, H // G, S).any(2)).all()


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if not case.startswith(("precision", "two threads")) and "lowest" not in case],
)
def test_rows_to_verify(case: str, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    options = CASES[case](rng, SMALL)
    check_rows(kernels, problem(rng, SMALL, F32, options), options, "fp32")


@pytest.mark.parametrize("dtype", [F64, F16, BF16], ids=str)
def test_rows_to_verify_of_parts(dtype: Any, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Longer than a part, of queries and keys, any head size and layout."""
    rung = {F64: "fp64", F16: "fp16", BF16: "bf16"}[dtype]
    for n, options in enumerate(({"causal": True}, {"softcap": 2.0, "sinks": np.array([0.5])})):
        shape = [Shape(1, 2, 1, 260, 270, 9, 33), Shape(1, 1, 1, 70, 257, 130, 1)][n]
        arrays = [guarded(x) for x in problem(rng, shape, dtype, options)]
        if dtype == F64:  # of rows of their own
            options = dict(options)
            arrays[4:] = reference.attention(*arrays[1:4], return_lse=True, **options)
        check_rows(kernels, arrays, options, rung, order=n + 1)


@pytest.mark.parametrize("f64", [False, True])
def test_key_heads_once_more(f64: bool, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    check_again(kernels, rng, f64, "bf16", BF16)


def check_again(kernels: ctypes.CDLL, rng: np.random.Generator, f64: bool, rung: str, dtype: Any) -> None:
    """Those that are asked for, from an lse and an out of their own; no bit of the others changes."""
    arrays = problem(rng, Shape(2, 4, 2, 40, 50, 24, 16), dtype, {"causal": True})
    spoilt = [*arrays[:4], arrays[4] * arrays[4].dtype.type(2), arrays[5] + F32.type(0.3)]
    run = cuda_backward.Verification(kernels, *spoilt, rung=rung, causal=True)
    before, known = [x.copy() for x in run.results[:3]], run.known.copy()
    again = run.again(np.array([[0, 1], [1, 0]]), f64)
    assert again.tolist() == [[2, f64], [f64, 2]]
    wide = [x.astype(F64) for x in arrays[:4]]
    wide += reference.attention(*wide[1:], return_lse=True, causal=True)
    exact = reference.attention_backward(*wide, causal=True)
    for now, then, right in zip(run.results[:3], before, exact[:3], strict=True):
        per = now.shape[1] // 2
        for b, g in np.ndindex(2, 2):
            heads = (b, slice(g * per, (g + 1) * per))
            if b == g:
                assert same_bits(now[heads], then[heads])
            else:
                error = np.linalg.norm(now[heads].astype(F64) - right[heads])
                assert error <= 3e-3 * np.linalg.norm(right[heads])
    size = run.known.size // 8  # of a query head
    changed = [not (run.known[i * size :][:size] == known[i * size :][:size]).all() for i in range(8)]
    assert changed == [False, False, True, True, True, True, False, False]
    for head, rows in ((2, [39]), (5, [0, 17])):
        for x in run.rows(False, [(head, rows)])[0]:
            np.testing.assert_allclose(x[8:10], x[:2], rtol=1e-12, atol=1e-13)
    before, known = run.results.key[1, 0].copy(), run.known.copy()
    run.again(np.array([[1, 0], [0, 0]]), f64)
    assert same_bits(run.results.key[1, 0], before) and (run.known[2 * size :] == known[2 * size :]).all()


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_verification_of_what_is_no_number(
    special: float, kernels: ctypes.CDLL, rng: np.random.Generator
) -> None:
    """It reaches rows that see it, and what is hidden reaches none."""
    options: Options = {"attn_mask": np.arange(21)[:, None] + np.arange(50) > 3}
    arrays = problem(rng, SMALL, F32, options)
    arrays[0][1, 1, 5, 0] = special
    run = cuda_backward.Verification(kernels, *arrays, rung="fp32", **options)
    bad, good = run.rows(False, [(3, [4, 5])])[0]
    assert not np.isnan(bad[:34]).any() and np.isnan(good[10:34]).all()
    arrays = problem(rng, SMALL, F32, {"kv_lengths": np.array([30, 30])})
    arrays[2][:, :, 30:] = arrays[3][:, :, 30:] = special
    run = cuda_backward.Verification(kernels, *arrays, rung="fp32", kv_lengths=np.array([30, 30]))
    assert all(np.isfinite(x).all() for rows in run.rows(False, [(3, [4, 5])]) for x in rows)
    assert not run.rows(True, [(0, [30, 49])])[0][0].any()


# What one mistake in a kernel's text looks like: file, text that stands there once, what replaces it, and the
# translation unit that has to be compiled again.
TILED, SIMT = ("backward_tiled.cuh", "backward_f16.cu"), ("backward_simt.cuh", "backward_simt.cu")
ROWS = ("backward_rows.cu", "backward_rows.cu")
FAULTS = {
    "copies are not waited for": (TILED, "ada_copy_wait<0>(); /* this", "/* this"),
    "what stays still arrives at the end": (TILED, "ada_copy_wait<0>(); /* what stays", "/* what stays"),
    "no barrier behind the wait": (TILED, "ada_sync(); /* all have", "/* all have"),
    "rows go to the other stage": (
        TILED,
        "(uint32_t)(n % 2 * X::ROWS_STAGE), a,",
        "(uint32_t)((n + 1) % 2 * X::ROWS_STAGE), a,",
    ),
    "keys that nobody sees are not zeros": (
        TILED,
        "a.k, w.b, w.g, first, keys,",
        "a.k, w.b, w.g, first, p.S,",
    ),
    "the first head's queries alone": (TILED, "h = w.h + n / each; ada_back_copy", "h = w.h; ada_back_copy"),
    "no delta": (TILED, "y = x * (y - of.delta);", "y = x * y;"),
    "weights instead of their gradients": (
        TILED,
        "ada_add_values<X>(of_scores, g,",
        "ada_add_values<X>(of_scores, s,",
    ),
    "hidden weights count": (TILED, "x = visible ? x : 0, y = visible ? y : 0;", "y = visible ? y : 0;"),
    "a key too many": (
        ("backward.cuh", "backward_f16.cu"),
        "j - i <= r.highest && j < r.keys;",
        "j - i <= r.highest + 1 && j < r.keys;",
    ),
    "a tile too many is plain": (
        ("backward.cuh", "backward_f16.cu"),
        "keys - 1 - i <= r.highest &&",
        "keys - 2 - i <= r.highest &&",
    ),
    "squares are multiplied before they lie there": (
        SIMT,
        "d, width); ada_sync(); ADA_UNROLL_BY(4)",
        "d, width); ADA_UNROLL_BY(4)",
    ),
    "hidden pairs are added": (SIMT, "X::CAREFUL && !ada_seen<X>()[n * X::TILE + key]", "false"),
    "sums of rows keep their old reference": (SIMT, "l *= by, delta *= by;", "l *= by;"),
    "parts are added as if they had one reference": (
        ROWS,
        "const double by = exp2(part[PART_M] - m);",
        "const double by = 1;",
    ),
    "rows of a group are weighed before all have them": (
        ROWS,
        "is_one ? c : c - p.D) * from.stride[3], p.dtype) : 0; } ada_sync();",
        "is_one ? c : c - p.D) * from.stride[3], p.dtype) : 0; }",
    ),
    "one sum for all that see a key": (ROWS, "if (any >> r & 1) sums[r] +=", "if (any) sums[r] +="),
    "the first head's queries alone, in rows": (ROWS, "(p.H / p.G) + split / a.parts", "(p.H / p.G)"),
    "the last lanes' share is lost": (
        ROWS,
        "ADA_UNROLL for (int lanes = 1; lanes < SHARE; lanes *= 2) { sums",
        "ADA_UNROLL for (int lanes = 1; lanes < SHARE / 2; lanes *= 2) { sums",
    ),
    "the softcap's slope is left out": (ROWS, "g = w * (g - row.delta) * bend;", "g = w * (g - row.delta);"),
    "a key that a later head sees is not seen": (
        ROWS,
        "h < (g + 1) * per && !seen; h++",
        "h < g * per + 1 && !seen; h++",
    ),
    "key heads that are done are computed again": (
        ("backward.cu", "backward.cu"),
        "if (a.unfit[group] == ADA_BACK_DONE) return;",
        "",
    ),
    "rows keep the lse that was given": (
        ("backward_simt.cuh", "backward_simt.cu"),
        "!(a.own && by == ADA_BACK_RUNG)",
        "true",
    ),
    "half of a row's delta": (
        ("backward.cu", "backward.cu"),
        "lanes < 32; lanes *= 2) { sum",
        "lanes < 16; lanes *= 2) { sum",
    ),
}


# Of one width, without optimisation: they compile sooner.
FLAGS = ("-DADA_BACK_WIDTHS(X)=X(64)", "-O0")


@pytest.fixture(scope="session")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_build.faultless(tmp_path_factory, cuda_backward.SOURCES, *FLAGS)


def find_faults(kernels: ctypes.CDLL) -> None:
    """Raises where the kernels are wrong: a few problems, each under several orders of the threads."""
    for order in range(1, 4):
        rng = np.random.default_rng(order)
        for options in (
            {"causal": True, "kv_lengths": np.array([145])},
            {"window": (30, 20), "query_offset": 40},
        ):
            arrays = [guarded(x) for x in problem(rng, Shape(1, 2, 1, 70, 160, 32, 32), F16, options)]
            if "kv_lengths" in options:
                arrays[2][:, :, 145:], arrays[3][:, :, 145:] = np.nan, np.nan
            check(kernels, "fp16", arrays, options, order=order)
    edge = {
        "causal": True,
        "query_offset": 126,
    }  # hides the last key of a tile from one query, which is like it
    arrays = problem(rng, Shape(1, 1, 1, 70, 160, 32, 32), F16, edge)
    arrays[1][0, 0, 0] = arrays[2][0, 0, 127]
    arrays[4:] = (
        x.astype(y.dtype)
        for x, y in zip(reference.attention(*arrays[1:4], return_lse=True, **edge), arrays[4:], strict=True)
    )
    check(kernels, "fp16", arrays, edge)
    rows = {"softcap": 2.0, "attn_mask": np.arange(580).reshape(2, 1, 290) % 7 > 2}
    check_rows(kernels, problem(rng, Shape(1, 2, 1, 70, 290, 12, 8), F32, rows), rows, "fp32")
    check_again(kernels, rng, False, "fp32", F32)
    nothing = {"kv_lengths": np.array([0])}
    check(kernels, "fp16", problem(rng, Shape(1, 2, 1, 5, 9, 32, 32), F16, nothing), nothing)
    check(kernels, "fp32", problem(rng, Shape(1, 1, 1, 9, 20, 32, 32), F32, {}), {})
    arrays = problem(rng, Shape(1, 1, 1, 20, 40, 32, 32), F32, {"causal": True})
    arrays[0][:, :, 0] = np.inf
    check(kernels, "fp64", arrays, {"causal": True})


def test_nothing_is_found_without_a_fault(faultless: Path) -> None:
    find_faults(cuda_backward.load(cuda_build.link(faultless.glob("*.o"), faultless)))


@pytest.mark.parametrize("fault", cuda_build.some(FAULTS, 3))
def test_faults_are_found(fault: str, faultless: Path, tmp_path: Path) -> None:
    (file, source), old, new = FAULTS[fault]
    library = cuda_build.with_mistake(tmp_path, faultless, file, old, new, source, *FLAGS)
    with pytest.raises(AssertionError):
        find_faults(cuda_backward.load(library))
