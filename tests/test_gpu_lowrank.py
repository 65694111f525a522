"""Low rank on a GPU without one: samples are taken and landmarks attended to on the model of cuda/model.h."""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_build
import numpy as np
import pytest
from support import BF16, F16, F32, F64, Array, same_bits
from test_gpu_mock import Fake, fail_each, fakes, library, mock, model, run, value
from test_lowrank import needles, smooth

import adaattn
from adaattn import rates, reference

assert model and mock  # fixtures


def low_rank(*arrays: Array, tolerance: float = 1e-2, **options: Any) -> Any:
    asked = {"tolerance": tolerance, "structure": "low_rank", "return_lse": True, "return_report": True}
    out, lse, report = adaattn.attention(*fakes(list(arrays)), **asked, **options)
    return out.array, lse.array, report


def relative(out: Array, exact: Array) -> float:
    return float(np.linalg.norm(out.astype(F64) - exact) / np.linalg.norm(exact))


def order_of_threads(seed: int) -> None:
    ctypes.c_uint64.in_dll(library(), "ada_model_seed").value = seed


def check(arrays: list[Array], most: float, tolerance: float = 1e-2, **options: Any) -> Any:
    """All heads have landmarks, and are right."""
    exact, exact_lse = reference.attention(*arrays, return_lse=True, **options)
    out, lse, report = low_rank(*arrays, tolerance=tolerance, **options)
    assert (report.structure == "low_rank").all() and (report.rank > 0).all()
    assert not report.retried.any() and (report.verified_rows >= min(arrays[0].shape[2], 16)).all()
    assert relative(out, exact) <= most, (relative(out, exact), options)
    np.testing.assert_allclose(lse, exact_lse, atol=most)
    return report


def hidden(arrays: list[Array], at: int) -> list[Array]:
    """Nothing but NaN behind some keys."""
    query, key, value = (x.copy() for x in arrays)
    key[:, :, at:], value[:, :, at:] = np.nan, np.nan
    return [query, key, value]


def _right() -> None:
    rng = np.random.default_rng(0)
    wide = smooth(rng, length=1300, queries=150, heads=4, kv_heads=2, size=24)
    wide[2] = rng.standard_normal((1, 2, 1300, 70)).astype(F32)
    batches = [np.concatenate([x, x[::-1, :, ::-1]]) for x in wide]
    check(batches, 2e-3, kv_lengths=np.array([1300, 700]))
    check(hidden(wide, 1290), 2e-3, kv_lengths=np.array([1290]), sinks=np.linspace(-1, 3, 4))
    check(wide, 2e-3, causal=True)
    check(wide, 2e-3, window=(None, 300), query_offset=400)
    check([x[:, :, :200] for x in wide], 2e-3, causal=True)  # no whole bin
    many = smooth(rng, dims=4, sigma=1.2, length=700, queries=140, size=40)
    report = check(many, 1e-4, tolerance=3e-4)
    assert report.rank.item() > 64
    check(many, 1e-4, tolerance=3e-4, causal=True)
    for dtype, most in ((BF16, 4e-3), (F16, 2e-3)):
        check([x.astype(dtype) for x in wide], most, causal=True)
    strided = [np.ascontiguousarray(x.transpose(3, 2, 0, 1)).transpose(2, 3, 1, 0) for x in wide]
    check(strided, 2e-3)
    assert value("live") == 0


def test_heads_with_landmarks(model: str) -> None:
    run(_right, model)


def _sizes() -> None:
    rng = np.random.default_rng(1)
    for T, S, D, E in ((1, 1, 1, 1), (1, 70, 3, 5), (7, 5, 8, 8), (65, 257, 17, 129), (64, 256, 33, 200)):
        arrays = [(0.3 * rng.standard_normal((1, 1, n, d))).astype(F32) for n, d in ((T, D), (S, D), (S, E))]
        for causal in (False, True, "upper_left"):
            exact, exact_lse = reference.attention(*arrays, causal=causal, return_lse=True)
            out, lse, report = low_rank(*arrays, causal=causal, min_rank=S)
            # All keys are landmarks: what fp32 leaves of them.
            assert relative(out, exact) < 1e-5, (T, S, causal)
            np.testing.assert_allclose(lse, exact_lse, atol=1e-5)
            assert report.rank.item() > 0 or report.retried.item()


def test_every_size(model: str) -> None:
    run(_sizes, model)


def _rows() -> None:
    """Rows that no sample saw are computed exactly, since their residuals are."""
    rng = np.random.default_rng(2)
    for score in (9, 14):  # within the kernel's range, and beyond
        for causal in (False, True):
            arrays = smooth(rng, length=1500, queries=1500)
            rows = needles(rng, arrays, 20, score)
            exact = reference.attention(*arrays, causal=causal)
            plan = adaattn.plan(*fakes(arrays), tolerance=1e-2, causal=causal, structure="low_rank")
            out, report = adaattn.attention(
                *fakes(arrays), causal=causal, plan=plan, verify=False, return_report=True
            )
            assert report.structure.item() == "low_rank" and not report.retried.item()
            off = np.linalg.norm(out.array - exact, axis=3)[0, 0, rows]
            assert (off < 0.1 * np.linalg.norm(exact, axis=3)[0, 0, rows]).all()
            assert relative(out.array, exact) < 1e-2


def test_rows_that_landmarks_do_not_span(model: str) -> None:
    run(_rows, model)


def _outliers() -> None:
    """Keys apart from all others, which some rows look at, are in the sample whatever their places."""
    rng = np.random.default_rng(3)
    for S, count in ((8192, 10), (3000, 24)):
        query, key, value = smooth(rng, length=S, queries=600)
        mean = key[0, 0].mean(axis=0)
        centred = key[0, 0] - mean
        radius, span = (
            np.linalg.norm(centred, axis=1).max(),
            np.linalg.svd(centred, full_matrices=False)[2][:3],
        )
        ways = rng.standard_normal((count, 64))
        ways = np.linalg.qr((ways - ways @ span.T @ span).T)[0].T
        key[0, 0, rng.choice(S, count, replace=False)] = mean + 1.1 * radius * ways
        query[0, 0, ::20] += (48 / (1.1 * radius)) * ways[np.arange(30) % count]
        arrays = [query, key, value]
        plan = adaattn.plan(*fakes(arrays), tolerance=1e-2, structure="low_rank")
        out, report = adaattn.attention(*fakes(arrays), plan=plan, verify=False, return_report=True)
        assert report.structure.item() == "low_rank" and not report.retried.item()
        assert relative(out.array, reference.attention(*arrays)) < 5e-3
        few = replace(plan, rank=np.full_like(plan.rank, 8), rank_limit=np.full_like(plan.rank_limit, np.inf))
        out, report = adaattn.attention(*fakes(arrays), plan=few, return_report=True)
        assert report.retried.item() and relative(out.array, reference.attention(*arrays)) < 1e-2


def test_keys_apart_from_others(model: str) -> None:
    run(_outliers, model)


def _beyond() -> None:
    """Heads whose numbers, or whose rows, do not allow landmarks are dense; nothing is hidden."""
    rng = np.random.default_rng(3)
    good = smooth(rng, length=1100, queries=200, heads=2, kv_heads=2, size=16)
    for which in range(3):
        for bad in (np.nan, np.inf):
            arrays = [x.copy() for x in good]
            arrays[which][0, 1, 30, 3] = bad
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exact = reference.attention(*arrays)
            out, _, report = low_rank(*arrays)
            assert report.rank[0, 0] > 0 and not report.retried[0, 0]
            assert same_bits(np.isnan(out), np.isnan(exact))
            assert (np.isfinite(exact) == np.isfinite(out)).all()
            there = np.isfinite(exact)
            assert relative(out[there], exact[there]) < 1e-2
    far = [x.copy() for x in good]
    far[1][0, 1, 7] *= 1e4
    _, _, report = low_rank(*far)
    assert report.rank[0, 0] > 0 and report.rank[0, 1] == 0 and report.retried.tolist() == [[False, True]]
    # Half of its rows look elsewhere: too many to be computed one by one.
    plan = adaattn.plan(*fakes(good), tolerance=1e-2, structure="low_rank")
    apart = [x.copy() for x in good]
    apart[0][0, 1, ::2] *= 30
    out, report = adaattn.attention(*fakes(apart), plan=plan, return_report=True)
    assert report.structure.tolist() == [["low_rank", "dense"]]
    assert report.retried.tolist() == [[False, True]]
    assert relative(out.array, reference.attention(*apart)) < 1e-2
    assert value("live") == 0


def test_heads_that_allow_none(model: str) -> None:
    run(_beyond, model)


def _bits() -> None:
    """A head depends on itself alone, whatever the order of threads; plans carry its rank; staged or not."""
    rng = np.random.default_rng(4)
    arrays = smooth(rng, length=1100, queries=130, heads=3, kv_heads=3, size=16)
    for causal in (False, True):
        out, lse, report = low_rank(*arrays, causal=causal)
        for seed in (5, 6):
            order_of_threads(seed)
            assert same_bits(low_rank(*arrays, causal=causal)[:2], (out, lse))
        alone = low_rank(*(x[:, 1:2] for x in arrays), causal=causal)
        assert same_bits(alone[0], out[:, 1:2]) and same_bits(alone[1], lse[:, 1:2])
        again = adaattn.attention(*fakes(arrays), plan=report.plan, causal=causal, verify=False)
        assert same_bits(again.array, out)
        staged = adaattn.attention(*arrays, device="cuda", plan=report.plan, causal=causal)
        assert same_bits(staged, out)
        bounded = low_rank(*arrays, causal=causal, min_rank=48, max_rank=48)[2]
        assert (bounded.rank == 48).all()


def test_same_bits(model: str) -> None:
    run(_bits, model)


def _where_it_pays() -> None:
    """Head by head: one has few dimensions, the other as many as there are; and not on faster rungs."""
    rng = np.random.default_rng(5)
    rates._GPU_DEFAULTS[9, 0] |= dict.fromkeys(rates._GPU_DEFAULTS[9, 0], (0.0, 0.0, 0))
    rates._GPU_DEFAULTS[9, 0]["fp32"] = (1.0, 1.0, 0)
    arrays = smooth(rng, length=2048, queries=2048, heads=2, kv_heads=2, size=16)
    for x in arrays[:2]:
        x[:, 1] = rng.standard_normal(x[:, 1].shape)
    asked = {"tolerance": 1e-2, "return_report": True}
    for dtype in (F32, F16):
        rates._GPU_DEFAULTS[9, 0]["fp16"] = (0.0, 0.0, 0) if dtype == F32 else (1.0, 1.0, 0)
        own = [x.astype(dtype) for x in arrays]
        out, report = adaattn.attention(*fakes(own), **asked)
        assert report.structure.tolist() == [["low_rank", "dense"]], report.structure
        assert not report.retried.any() and relative(out.array, reference.attention(*own)) < 1e-2
        for threads in (1, 2):
            alone = [x[:, :1] for x in own]
            assert adaattn.plan(*fakes(alone), tolerance=1e-2, num_threads=threads).rank == report.rank[0, 0]
    heavy = [x.copy() for x in arrays]
    heavy[2][0, 0, 1301] *= 100  # a key that few samples would have
    assert "low_rank" not in adaattn.plan(*fakes(heavy), tolerance=1e-2).structure
    rates._GPU_DEFAULTS[9, 0] |= {"fp32": (1e5, 1e5, 0), "fp16": (1e5, 1e5, 0)}
    for dtype in (F32, F16):
        own = [x.astype(dtype) for x in arrays]
        assert "low_rank" not in adaattn.plan(*fakes(own), tolerance=1e-2).structure


def test_where_it_pays(model: str) -> None:
    run(_where_it_pays, model)


def _sent_back() -> None:
    """What a plan says of other arrays is held against outputs."""
    rng = np.random.default_rng(6)
    arrays = smooth(rng, length=1100, queries=200, size=16)
    plan = adaattn.plan(*fakes(arrays), tolerance=1e-2, structure="low_rank")
    few = replace(plan, rank=np.full_like(plan.rank, 3), rank_limit=np.full_like(plan.rank_limit, np.inf))
    out, report = adaattn.attention(*fakes(arrays), plan=few, return_report=True)
    assert report.structure.item() == "dense" and report.retried.item()
    assert relative(out.array, reference.attention(*arrays)) < 1e-2


def test_verification_sends_heads_back(model: str) -> None:
    run(_sent_back, model)


def _refused() -> None:
    arrays = [np.zeros((1, 1, 70, 16), F32)] * 3
    for options, what in (
        ({"softcap": 3.0}, "softcap"),
        ({"attn_mask": Fake(np.ones((70, 70), bool))}, "attn_mask on a GPU"),
        ({"window": (5, None)}, r"window\[0\]"),
    ):
        with pytest.raises(adaattn.ArgumentError, match=f"^structure: .* beside {what}, got 'low_rank'"):
            low_rank(*arrays, **options)
    doubles = [x.astype(F64) for x in arrays]
    with pytest.raises(adaattn.ArgumentError, match=r"^structure: .* beside float64 arrays"):
        low_rank(*doubles)


def test_rules(mock: str) -> None:
    run(_refused, mock)


def _each_failure() -> int:
    arrays = smooth(np.random.default_rng(7), length=300, queries=100, size=16)
    needles(np.random.default_rng(8), arrays, 3)
    assert low_rank(*arrays)[2].rank.item() > 0
    return fail_each(lambda: low_rank(*arrays))


def test_every_failure_surfaces_once_and_nothing_leaks(model: str) -> None:
    assert run(_each_failure, model) > 40


# ---- seeded faults

FAULTS = {
    "keys are not centred": ("landmarks.cu", "p.key, b, g, j + i, d) - mean[d]", "p.key, b, g, j + i, d)"),
    "near keys are not centred": (
        "landmarks.cu",
        "p.key, s.b, g, j + i, d) - mean[d]",
        "p.key, s.b, g, j + i, d)",
    ),
    "the first chunk counts as all": ("landmarks.cu", "slot, factors, out);", "0, factors, out);"),
    "chunks are not added": ("landmarks.cu", "sum += x[k];", "sum = x[k];"),
    "factors are overwritten before others need them": (
        "landmarks.cu",
        "int l0 = (R - 1) / TILE * TILE; l0 >= 0; l0 -= TILE",
        "int l0 = 0; l0 < R; l0 += TILE",
    ),
    "slices are overwritten while they are read": (
        "landmarks.cu",
        "ada_sync(); /* what stood there has been read */",
        "",
    ),
    "keys behind a row's last": ("landmarks.cu", "j + i < rows[row].end", "j + i < end"),
    "residuals do not matter": ("landmarks.cu", "rest > head.limit", "false"),
    "a block's tiles do not wait for each other": (
        "landmarks.cu",
        "ada_sync(); /* what is known of its rows has been read */",
        "",
    ),
    "masses of the far keys alone": ("landmarks.cu", "rows[thread].mass = mass", "rows[thread].mass = far"),
    "a tile of landmarks too few": (
        "landmarks.cu",
        "l0 + TILE < R ? l0 + TILE : R, [&](int k, int l)",
        "l0 < R ? l0 : R, [&](int k, int l)",
    ),
    "the mean is a sum": ("sample.cu", "sum / (float)(x.head.end - x.head.first)", "sum"),
    "the nearest keys for the furthest": (
        "sample.cu",
        "apart2[j] > apart2[i] ||",
        "apart2[j] < apart2[i] ||",
    ),
    "a chunk's furthest key alone": (
        "sample.cu",
        "FAR_KEYS + taken[own.chunk]++",
        "FAR_KEYS + taken[own.chunk]",
    ),
    "values of the first key": (
        "sample.cu",
        "key_row(a, p.value, head, key)",
        "key_row(a, p.value, head, 0)",
    ),
}


def _wrong() -> None:
    """Raises where something is wrong, under several orders of the threads."""
    for seed in (1, 2):
        order_of_threads(seed)
        rng = np.random.default_rng(seed)
        arrays = smooth(rng, length=900, queries=150, heads=2, size=24)
        arrays[2] *= np.linspace(0.1, 3, 900, dtype=F32)[:, None]
        report = check(hidden(arrays, 890), 2e-3, kv_lengths=np.array([890]))
        # The forecast is that of the same rows and keys, over outputs of other rows.
        cpu = adaattn.plan(*arrays, tolerance=1e-2, structure="low_rank", kv_lengths=np.array([890]))
        np.testing.assert_allclose(report.predicted_error, cpu.predicted_error, rtol=0.35)
        check(arrays, 2e-3, causal=True)
        many = smooth(rng, dims=4, sigma=1.2, length=600, queries=140, size=40)
        check(many, 1e-4, tolerance=3e-4)
    _rows()
    _outliers()


def test_nothing_is_found_without_a_fault(model: str) -> None:
    run(_wrong, model)


@pytest.mark.parametrize("fault", cuda_build.some(FAULTS, 3))
def test_faults_are_found(fault: str, model: str, tmp_path: Path) -> None:
    file, old, new = FAULTS[fault]
    wrong = cuda_build.with_mistake(tmp_path, Path(model).parent, file, old, new, file, "-O1")
    with pytest.raises(AssertionError):
        run(_wrong, str(wrong))
