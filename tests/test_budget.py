"""The error budget where it is easily missed: samples that say little, exact rows that are not exact."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
from support import BF16, F16

import adaattn
from adaattn import _adaattn, linalg, rates

RATES = [50, 100, 100, 130, 180, 150, 220, 290, 400]  # every rung pays, at any size


@pytest.fixture(autouse=True)
def _every_rung_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_table", np.array([[rate, rate, 0] for rate in RATES], np.float64))


def heads(H: int, T: int, S: int, D: int, dtype: Any = np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, H, n, D)).astype(dtype) for n in (T, S, S)]


def errors(out: np.ndarray, arrays: list[np.ndarray], **options: Any) -> np.ndarray:
    return off(out, adaattn.reference.attention(*(x.astype(np.float64) for x in arrays), **options))


def off(out: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(out - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))


def test_one_row_that_sees_a_key() -> None:
    """It is what the choice goes by, however many others there are."""
    arrays = heads(4, 40, 1, 16)
    options = {"causal": "upper_left", "query_offset": -39}
    out = adaattn.attention(*arrays, tolerance=1e-6, **options)
    assert errors(out, arrays, **options).max() <= 1.1e-6


def test_rows_that_see_no_key_verify_nothing() -> None:
    arrays = heads(16, 200, 100, 16)
    mask = np.arange(200)[:, None] >= 196
    _, report = adaattn.attention(*arrays, attn_mask=mask, tolerance=0.9, return_report=True)
    assert (report.measured_error != 0).all()
    assert ((report.verified_rows > 0) == np.isfinite(report.measured_error)).all()


@pytest.mark.parametrize("T", [40, 200])
def test_doubles_too_small_for_floats(T: int) -> None:
    query, key, value = heads(2, T, 60, 16, np.float64)
    arrays = [query, key, value * 1e-60]
    out, report = adaattn.attention(*arrays, tolerance=1e-3, return_report=True)
    assert errors(out, arrays).max() <= 1e-3
    assert (report.precision_pv == "fp64").all() and not np.isinf(report.measured_error).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-22, 1e-21, 1e20, 1e30])
def test_outputs_whose_squares_no_float_holds(size: float, dtype: Any) -> None:
    """Rows are drawn by equal shares then."""
    q, k, v = heads(2, 256, 256, 24, dtype)
    v *= dtype(size)
    out, report = adaattn.attention(q, k, v, tolerance=1e-2, precision="bf16", return_report=True)
    assert (report.verified_rows == 8).all() and (report.error_limit <= 1e-2).all()
    true = errors(out / dtype(size), [q, k, v / dtype(size)])
    assert (report.measured_error > true / 3).all() and (report.measured_error < 3 * true + 1e-8).all()


@pytest.mark.parametrize("size", [1e19, 1e30])
def test_values_whose_squares_no_float_holds_are_not_predicted(size: float) -> None:
    q, k, v = heads(2, 512, 512, 64)
    _, report = adaattn.attention(q, k, v * np.float32(size), tolerance=1e-2, return_report=True)
    assert np.isnan(report.predicted_error).all() and (report.precision_pv == "fp32").all()


@pytest.mark.parametrize("precision", ["bf16", ("int8", "bf16"), "int8"])
def test_an_lse_that_is_off_where_outputs_are_not(precision: Any) -> None:
    """Values that are all alike forgive scores everything."""
    q, k, v = heads(1, 512, 512, 64)
    arrays = [12 * q, k, np.broadcast_to(v[:, :, :1], v.shape)]
    _, report = adaattn.attention(*arrays, tolerance=1e-2, precision=precision, return_report=True)
    assert report.measured_error.max() < 2e-3
    with pytest.raises(adaattn.NumericalError, match="an lse that is off by at most"):
        adaattn.attention(*arrays, tolerance=1e-2, precision=precision, return_lse=True)


def test_a_forced_rung_far_beyond_the_tolerance() -> None:
    """Eight rows suffice to be sure of a factor of ten thousand."""
    arrays = heads(2, 128, 128, 32)
    with pytest.raises(adaattn.NumericalError, match=r"head \(0, 0\)"):
        adaattn.attention(*arrays, precision="int8", tolerance=1e-6)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_exact_rows_beside_a_large_bias(offset: float) -> None:
    """Floats around the bias have few digits left; what is verified is computed in fp64 there."""
    arrays = heads(2, 128, 128, 32)
    mask = np.full((128, 128), offset, np.float32)
    out, report = adaattn.attention(
        *arrays, attn_mask=mask, tolerance=1e-3, precision="fp32", return_report=True
    )
    assert errors(out, arrays, attn_mask=mask).max() <= 1e-6
    assert report.measured_error.max() <= 1e-6


def test_exact_rows_of_large_scores() -> None:
    query, key, value = heads(2, 512, 512, 64)
    arrays = [query + 1, key + np.float32(3e4), value]
    out, report = adaattn.attention(*arrays, tolerance=1e-2, return_report=True)
    assert (report.measured_error <= 2 * errors(out, arrays)).all()


def test_many_heads_of_two_rungs() -> None:
    """They are sorted into launches in time that grows with their number, not with its square."""
    n = 30_000
    arrays = heads(n, 9, 2, 1)
    plan = adaattn.plan(*arrays, tolerance=1e-2)
    rungs = np.where(np.arange(n) % 2, "fp32", "int16")
    rungs[-1] = "fp64"

    def seconds(rungs: np.ndarray) -> float:
        mixed = dataclasses.replace(plan, precision_qk=rungs[None], precision_pv=rungs[None])
        start = time.process_time()  # other processes do not count
        adaattn.attention(*arrays, plan=mixed, verify=False)
        return time.process_time() - start

    assert seconds(rungs) < 3 * seconds(np.full(n, "int16")) + 0.3


class OnlyDLPack:
    """An array that offers nothing but the protocol."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_plans_and_reports_of_any_array() -> None:
    arrays = heads(2, 70, 70, 16)
    given = [OnlyDLPack(x) for x in arrays]
    plan = adaattn.plan(*given, tolerance=1e-2)
    out, report = adaattn.attention(*given, tolerance=1e-2, return_report=True)
    assert report.plan.sizes == plan.sizes == adaattn.plan(*arrays, tolerance=1e-2).sizes
    assert np.array_equal(adaattn.attention(*given, plan=plan), out)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("T", [1, 70])
def test_reports_of_a_cache(dtype: str, T: int) -> None:
    query, key, value = heads(2, T, 100, 16)
    cache = adaattn.KVCache(1, 2, 16, dtype=dtype)
    cache.append(key, value)
    out, report = cache.attention(query, tolerance=1e-2, return_report=True)
    assert report.plan.sizes["S"] == 100 and report.plan.sizes["dtype"] == "float32"
    assert np.array_equal(cache.attention(query, plan=report.plan), out)


def test_what_is_no_plan_and_arrays_that_are_none() -> None:
    arrays = heads(1, 70, 70, 16)
    plan = adaattn.plan(*arrays, tolerance=1e-2)
    with pytest.raises(adaattn.DTypeError, match=r"plan: expected a Plan or None, got dict"):
        adaattn.attention(*arrays, plan={})
    with pytest.raises(adaattn.DTypeError, match=r"query: .*list"):
        adaattn.attention(arrays[0].tolist(), *arrays[1:], plan=plan)


@pytest.mark.parametrize("precision", ["bf16x3", "fp16", "int16", "bf16", "int8", ("int8", "bf16")], ids=str)
def test_dropout_of_scores_that_grow(precision: Any) -> None:
    """Sums follow the reference when it is raised, those of what is dropped too."""
    query, key, value = heads(2, 63, 233, 16)
    arrays = [query * np.float32(0.05), key, value]
    options = {"alibi_slopes": np.full(2, 1.0), "dropout_p": 0.1, "seed": 1}
    out = adaattn.attention(*arrays, precision=precision, **options)
    assert errors(out, arrays, **options).max() <= 3e-2


@pytest.mark.parametrize(("T", "share", "gain"), [(512, 0.05, 100), (1024, 0.02, 1000)])
def test_values_that_cancel_in_few_rows(T: int, share: float, gain: float) -> None:
    """Neither their queries nor their outputs tell these rows from others; the two keys' values do."""
    rng = np.random.default_rng(3)
    query, key, value = rng.standard_normal((3, 1, 24, T, 64), np.float32)
    axis = np.eye(64, dtype=np.float32)[0]
    key[:, :, 0], key[:, :, 1] = 12 * axis, 12 * axis + 0.3 * key[:, :, 1]
    value[:, :, 0], value[:, :, 1] = gain, -gain
    few = rng.random((1, 24, T)) < share
    query *= np.where(few, 0.25, 0.5)[..., None].astype(np.float32)
    query[..., 0] = np.where(few, 8, -2)
    arrays = [query, key, value]
    exact = adaattn.reference.attention(*arrays)
    for tolerance in (1e-2, 5e-2):
        assert off(adaattn.attention(*arrays, tolerance=tolerance), exact).max() <= tolerance


@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("tolerance", [1e-5, 1e-3])
def test_few_queries_that_fp32_cannot_serve(T: int, tolerance: float) -> None:
    query, key, value = heads(4, T, 400, 64)
    signs = np.where(np.arange(400) % 2, 1, -1)[:, None]
    for arrays in (
        [query, key + np.float32(1e5), value],
        [query * np.float32(1e-3), key, (1e-3 * value + 1e3 * signs).astype(np.float32)],
    ):
        out, report = adaattn.attention(*arrays, tolerance=tolerance, return_report=True)
        error = errors(out, arrays)
        assert error.max() <= tolerance
        assert (error <= 3 * report.predicted_error + 2.0**-24).all()  # of the output itself
    plain = adaattn.attention(query, key, value, tolerance=tolerance, return_report=True)[1]
    assert (plain.precision_qk == "fp32").all() and (plain.predicted_error < 1e-6).all()


def test_a_few_queries_bits_are_their_heads_own() -> None:
    """Where others of the call need fp64, or do not."""
    query, key, value = heads(4, 3, 200, 32)
    key[:, 1:3] += 1e5
    together = adaattn.attention(query, key, value, tolerance=1e-4)
    for h in range(4):
        alone = adaattn.attention(*(x[:, h : h + 1] for x in (query, key, value)), tolerance=1e-4)
        assert np.array_equal(alone[:, 0], together[:, h])
    plan = adaattn.plan(query, key, value, tolerance=1e-4)
    assert set(plan.precision_qk[0]) == {"fp32", "fp64"}
    assert np.array_equal(adaattn.attention(query, key, value, plan=plan), together)


OPTIONS: dict[str, dict[str, Any]] = {
    "ALiBi": {"alibi_slopes": np.linspace(0.1, 0.5, 8)},
    "a float mask": {"attn_mask": np.random.default_rng(1).standard_normal((32, 400)).astype(np.float32) * 3},
    "one key in ten": {"attn_mask": np.random.default_rng(1).random((32, 400)) < 0.1},
    "dropout": {"dropout_p": 0.5, "seed": 3},
    "sinks": {"sinks": np.full(8, 4.0)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("T", [12, 32])
def test_predictions_of_queries_that_are_not_verified(name: str, T: int) -> None:
    query, key, value = heads(8, 32, 400, 8)
    options = {k: v[:T] if k == "attn_mask" else v for k, v in OPTIONS[name].items()}
    for scale in (0.3, 1, 2):
        arrays = [np.ascontiguousarray(query[:, :, :T]) * np.float32(scale), key, value]
        for tolerance in (1e-3, 3e-3, 1e-2, 5e-2):
            out = adaattn.attention(*arrays, tolerance=tolerance, **options)
            assert errors(out, arrays, **options).max() <= tolerance


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("how", [{"precision": "int8"}, {"precision": "bf16"}, {"tolerance": 1e-2}], ids=str)
def test_queries_that_a_mask_hides_change_nothing(garbage: float, how: dict[str, Any]) -> None:
    query, key, value = heads(2, 128, 128, 64)
    hidden = np.arange(128) >= 100
    other = query.copy()
    other[:, :, hidden] = garbage
    for mask in (~hidden[:, None], np.where(hidden, -np.inf, 0.0).astype(np.float32)[:, None]):
        expected = adaattn.attention(query, key, value, attn_mask=mask, **how)
        assert np.array_equal(adaattn.attention(other, key, value, attn_mask=mask, **how), expected)


def test_a_plan_is_the_heads_own() -> None:
    """Whoever shares its keys, and however short the other sequences are."""
    query, key, value = heads(8, 32, 300, 64)
    grouped = adaattn.plan(query, key[:, ::8], value[:, ::8], tolerance=1e-2)
    alone = adaattn.plan(query[:, :1], key[:, :1], value[:, :1], tolerance=1e-2)
    assert np.array_equal(grouped.candidate_seconds[0, 0], alone.candidate_seconds[0, 0])
    assert grouped.precision_qk[0, 0] == alone.precision_qk[0, 0]
    pair = [np.concatenate([x, x]) for x in heads(1, 64, 600, 64)]
    ragged = adaattn.attention(*pair, kv_lengths=np.array([1, 600]), tolerance=1e-2)
    single = adaattn.attention(*(x[1:] for x in pair), kv_lengths=np.array([600]), tolerance=1e-2)
    assert np.array_equal(ragged[1], single[0])


def test_rows_that_see_no_key_are_not_profiled() -> None:
    arrays = heads(8, 200, 200, 64)
    mask = np.arange(200)[:, None] >= 196
    out, report = adaattn.attention(*arrays, attn_mask=mask, tolerance=1.2e-2, return_report=True)
    error = errors(out, arrays, attn_mask=mask)
    assert (error <= 1.25 * report.predicted_error).all() and (report.plan.profiled_rows == 4).all()


def test_rows_are_drawn_for_every_head() -> None:
    """Not the same positions in all of them."""
    rng = np.random.default_rng(0)
    drawn = {tuple(r for r, _ in adaattn._adaattn._sample_rows(rng.random(500), 4, 1)) for _ in range(20)}
    assert len(drawn) == 20


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_long_queries_on_a_cache_are_verified(dtype: str) -> None:
    query, key, value = heads(2, 128, 300, 32)
    cache = adaattn.KVCache(1, 2, 32, dtype=dtype)
    cache.append(key, value)
    _, report = cache.attention(query, tolerance=1e-3, return_report=True)
    assert (report.verified_rows > 0).all() and (report.measured_error < 1e-6).all()


def test_some_heads_are_given_more_rows_before_they_go_up() -> None:
    """They would fail by the limits of the first ones, and hold by those of all."""
    query, key, value = heads(64, 600, 400, 8)
    _, report = adaattn.attention(query * np.float32(2), key, value, tolerance=1e-2, return_report=True)
    more = report.verified_rows > 8
    assert more.any() and not (report.retried & more).all()


def test_options_do_not_take_fp64_away() -> None:
    """Between 9 and 63 queries a mask leaves nothing to guess by but that fp32 will not do."""
    query, key, value = heads(1, 32, 256, 64)
    arrays = [query * np.float32(8), key * np.float32(8), value * np.float32(0.3) + value[:, :, :1]]
    for options in ({}, {"attn_mask": np.ones((32, 256), bool)}, {"alibi_slopes": np.zeros(1)}):
        out, report = adaattn.attention(*arrays, tolerance=2e-6, return_report=True, **options)
        assert errors(out, arrays, **options).max() <= 2e-6
        assert (report.precision_qk == "fp64").all()


def test_keys_with_a_bias_at_quality() -> None:
    """fp32 misses on half of these heads, which nobody looks at before they are computed."""
    rng = np.random.default_rng(100)
    query, key, value = rng.standard_normal((3, 1, 64, 128, 64), np.float32)
    key[..., :4] += (150 * rng.standard_normal((1, 64, 1, 4))).astype(np.float32)
    arrays = [2 * query, key, value]
    missed = errors(adaattn.attention(*arrays), arrays) > 1e-5
    assert missed.sum() > 20
    out, report = adaattn.attention(*arrays, policy="quality", return_report=True)
    assert (errors(out, arrays) <= 1.1e-5).all()  # 2 of 1,536 such heads are above 1e-5
    assert (report.verified_rows > 0).all()


def pairs_that_cancel(T: int, S: int) -> list[np.ndarray]:
    """Keys in pairs almost alike, whose values are opposite."""
    query, key, value = heads(1, T, S, 64)
    half = key[:, :, 1::2].shape[2]
    key[:, :, 1::2] = key[:, :, ::2][:, :, :half] * (1 + 1e-4 * key[:, :, 1::2])
    value[:, :, 1::2] = -value[:, :, ::2][:, :, :half]
    return [query, key, value]


@pytest.mark.parametrize("T", [4, 32, 64])
@pytest.mark.parametrize("tolerance", [1e-5, 1e-3])
def test_outputs_smaller_than_statistics_say(T: int, tolerance: float) -> None:
    arrays = pairs_that_cancel(T, 256)
    exact = errors(adaattn.attention(*arrays, tolerance=tolerance), arrays)
    planned = adaattn.attention(*arrays, plan=adaattn.plan(*arrays, tolerance=tolerance))
    assert exact.max() <= tolerance and errors(planned, arrays).max() <= tolerance


def test_a_plan_for_few_queries_on_other_data() -> None:
    query, key, value = heads(2, 4, 200, 64)
    plan = adaattn.plan(query, key, value, tolerance=1e-5)
    arrays = [query, key + np.float32(3e4), value]
    assert errors(adaattn.attention(*arrays, plan=plan), arrays).max() <= 1e-5


def test_what_a_window_leaves_is_looked_at() -> None:
    query, key, value = pairs_that_cancel(1, 8192)
    arrays = [query * np.float32(0.1), key, value]
    options = {"causal": True, "window": (127, 0)}
    out = adaattn.attention(*arrays, tolerance=1e-5, **options)
    assert errors(out, arrays, **options).max() <= 1e-5


def test_a_cached_sequence_beside_a_longer_one() -> None:
    query, key, value = heads(2, 1, 200, 64)
    key[:, :, 128:] += 3e4
    alone, both = adaattn.KVCache(1, 2, 64), adaattn.KVCache(2, 2, 64)
    alone.append(key, value)
    long = np.random.default_rng(1).standard_normal((2, 2, 2, 8000, 64)).astype(np.float32)
    long[0, 0, :, :200], long[1, 0, :, :200] = key[0], value[0]
    both.append(*long, [200, 8000])
    expected = alone.attention(query, tolerance=1e-5)
    assert np.array_equal(both.attention(np.concatenate([query] * 2), tolerance=1e-5)[:1], expected)


@pytest.mark.parametrize("T", [1, 32])
def test_biases_that_take_the_digits_of_scores(T: int) -> None:
    arrays = heads(1, T, 256, 64)
    mask = (np.random.default_rng(1).standard_normal((T, 256)) - 600).astype(np.float32)
    for options in ({"attn_mask": mask}, {"alibi_slopes": np.ones(1), "query_offset": 656}):
        out = adaattn.attention(*arrays, tolerance=1e-5, **options)
        assert errors(out, arrays, **options).max() <= 1e-5


def test_lse_of_few_queries_that_see_one_key() -> None:
    """There is nothing to miss in the output."""
    query, key, value = heads(1, 4, 1, 64)
    query[..., 32:] = query[..., :32]
    key += np.where(np.arange(64) < 32, 1000, -1000).astype(np.float32)
    _, lse = adaattn.attention(query, key, value, tolerance=1e-5, return_lse=True)
    arrays = [x.astype(np.float64) for x in (query, key, value)]
    exact = adaattn.reference.attention(*arrays, return_lse=True)[1]
    assert (np.abs(lse - exact) <= np.maximum(1e-5, 4 * 2.0**-24 * np.abs(exact))).all()


def test_tiny_doubles_that_are_right() -> None:
    query, key, value = heads(1, 128, 128, 64, np.float64)
    arrays = [query, key, value * 1e-60]
    out, report = adaattn.attention(*arrays, precision="fp64", tolerance=1e-3, return_report=True)
    assert errors(out, arrays).max() <= 1e-14 and report.measured_error.max() <= 1e-14


def test_a_mixed_plan_of_few_queries() -> None:
    """What takes all heads in one pass does not write over those of another rung."""
    query, key, value = heads(2, 4, 200, 64)
    key[:, 1] *= 1e37
    out, report = adaattn.attention(query, key, value, precision="bf16", tolerance=1e-1, return_report=True)
    assert report.precision_qk.tolist() == [["bf16", "fp32"]]
    assert np.array_equal(adaattn.attention(query, key, value, plan=report.plan), out)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_few_queries_of_half_arrays_wherever_they_lie(dtype: Any) -> None:
    arrays = [x.astype(dtype) for x in heads(4, 5, 130, 128)]
    strided = [np.ascontiguousarray(x.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0) for x in arrays]
    assert np.array_equal(adaattn.attention(*strided), adaattn.attention(*arrays))


def test_a_plan_knows_how_far_its_heads_are_from_the_tolerance() -> None:
    arrays = heads(4, 2048, 256, 64)
    plan = adaattn.plan(*arrays, tolerance=1e-2, min_precision="int16")
    _, report = adaattn.attention(*arrays, plan=plan, return_report=True)
    assert (report.precision_qk == "int16").all() and (report.verified_rows == 8).all()
    unknown = dataclasses.replace(plan, predicted_error=np.full((1, 4), np.nan))
    _, report = adaattn.attention(*arrays, plan=unknown, return_report=True)
    assert (report.verified_rows == 16).all()


@pytest.mark.parametrize("sizes", [(64, 64), (100, 333), (256, 256)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_small_heads_in_fp32_are_predicted(sizes: tuple[int, int], causal: bool, sigma: float) -> None:
    """By rows that are looked at when the head is done; True verifies them all the same."""
    T, S = sizes
    rng = np.random.default_rng(T)
    query, key, value = (rng.standard_normal((2, 3, n, 32), np.float32) for n in (T, S, S))
    call = {"causal": causal, "tolerance": 1e-5, "max_precision": "fp32", "min_precision": "fp32"}
    out, report = adaattn.attention(sigma * query, key, value, **call, return_report=True)
    exact = adaattn.reference.attention(sigma * query, key, value, causal=causal)
    true = np.linalg.norm(out - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
    assert (report.verified_rows == 0).all() and np.isnan(report.measured_error).all()
    assert (report.precision_qk == "fp32").all() and not report.retried.any()
    assert (true / 3 <= report.predicted_error).all() and (report.predicted_error <= 4 * true).all()
    _, report = adaattn.attention(sigma * query, key, value, **call, verify=True, return_report=True)
    assert (report.verified_rows > 0).all() and (report.error_limit <= 1e-5).all()


def test_larger_heads_in_fp32_are_verified() -> None:
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 2, 257, 32), np.float32)
    _, report = adaattn.attention(query, key, value, policy="quality", return_report=True)
    assert (report.precision_qk == "fp32").all() and (report.verified_rows > 0).all()


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("row", range(33, 41))
def test_a_row_unlike_the_others_is_not_predicted(which: str, row: int) -> None:
    """Whether or not it is one of those that are looked at."""
    arrays = dict(
        zip(
            ("query", "key", "value"),
            np.random.default_rng(row).standard_normal((3, 1, 1, 100, 32), np.float32),
            strict=True,
        )
    )
    arrays[which][0, 0, row] *= 1000
    out, report = adaattn.attention(**arrays, tolerance=1e-5, return_report=True)
    exact = adaattn.reference.attention(**arrays)
    assert np.linalg.norm(out - exact) <= 1e-5 * np.linalg.norm(exact)
    if report.verified_rows[0, 0] == 0:  # one of them: its share of the error is in the prediction
        assert np.linalg.norm(out - exact) <= 4 * report.predicted_error[0, 0] * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "options", [{"attn_mask": np.ones((100, 100), bool)}, {"alibi_slopes": np.full(1, 0.1)}]
)
def test_heads_with_other_weights_are_verified(options: dict[str, Any]) -> None:
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 1, 100, 32), np.float32)
    _, report = adaattn.attention(query, key, value, tolerance=1e-2, **options, return_report=True)
    assert (report.verified_rows > 0).all()


@pytest.mark.parametrize(
    ("keys", "D", "tolerance", "looks"),
    [(64, 64, 5e-2, False), (128, 32, 1e-3, False), (128, 32, 1e-2, True), (512, 32, 1e-2, True)],
)
def test_looking_that_only_the_best_heads_repay_is_left_out(
    keys: int, D: int, tolerance: float, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1e-3 int16 would be faster, but by less than a glance costs."""
    monkeypatch.setattr(rates, "_table", rates._defaults("avx512bf16"))
    arrays = np.random.default_rng(0).standard_normal((3, 1, 2, keys, D), np.float32)
    plan = adaattn.plan(*arrays, tolerance=tolerance)
    assert np.isnan(plan.candidate_error).all() != looks
    assert looks or (plan.rungs == "fp32").all()
    assert looks or "nothing was looked at" in plan.explain()


@pytest.fixture
def narrow_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine on which bf16 and int8 are much faster than fp32; every rung runs everywhere."""
    monkeypatch.setattr(rates, "_table", rates._defaults("avx512bf16"))


@pytest.mark.usefixtures("narrow_rates")
@pytest.mark.parametrize("sizes", [(128, 128), (100, 300), (256, 256), (1500, 40)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sigma", "tolerance"), [(0.3, 1e-2), (1.0, 5e-2), (2.0, 5e-2)])
def test_small_heads_are_glanced_at_and_compared(
    sizes: tuple[int, int], causal: bool, sigma: float, tolerance: float
) -> None:
    T, S = sizes
    rng = np.random.default_rng(T)
    query, key, value = (rng.standard_normal((2, 4, n, 32), np.float32) for n in (T, S, S))
    query *= np.float32(sigma)
    call = {"causal": causal, "tolerance": tolerance}
    out, report = adaattn.attention(query, key, value, **call, return_report=True)
    exact = adaattn.reference.attention(query, key, value, causal=causal)
    true = off(out, exact)
    assert (true <= tolerance).all() and (report.plan.profiled_rows == 0).all()
    if not causal:  # half the operations
        cheap = np.isin(report.precision_pv, ("bf16", "int16"))
        assert cheap.mean() > 0.5 and (report.precision_pv != "int8").all()
        assert ((report.verified_rows >= 1) & (report.verified_rows <= 8))[cheap].all()
        assert (true / 2 <= report.predicted_error)[cheap].all()
        assert (report.predicted_error <= 3 * true)[cheap].all()
        assert ((true / 3 <= report.measured_error) & (report.measured_error <= 3 * true))[cheap].all()
    again, trusted = adaattn.attention(query, key, value, **call, verify=False, return_report=True)
    assert (trusted.verified_rows == 0).all()
    assert report.retried.any() or (np.array_equal(again, out) and (trusted.rungs == report.rungs).all())


@pytest.mark.usefixtures("narrow_rates")
def test_small_heads_that_are_computed_wrong_are_found_out() -> None:
    """As if outputs of cheaper rungs were a tenth too large."""
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 4, 128, 32), np.float32)
    exact = adaattn.reference.attention(query, key, value)
    _adaattn._narrow_fault(1.1)
    try:
        out, report = adaattn.attention(query, key, value, tolerance=5e-2, return_report=True)
    finally:
        _adaattn._narrow_fault(1.0)
    true = off(out, exact)
    assert report.retried.all() and (report.rungs == "fp32").all() and (true <= 5e-2).all()


@pytest.mark.usefixtures("narrow_rates")
def test_keys_that_all_look_at_are_no_surprise() -> None:
    """Two keys of usual size in the direction of all queries, with values that cancel: no statistic of some
    rows tells of them."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, 8, 128, 32), np.float32)
    query = 0.5 * query + 1
    key[:, :, [20, 71]] = 1.4
    value[:, :, 71] = -value[:, :, 20] * np.float32(1.05)
    exact = adaattn.reference.attention(query, key, value)
    for tolerance in (3e-3, 1e-2, 5e-2):
        out = adaattn.attention(query, key, value, tolerance=tolerance)
        true = off(out, exact)
        assert (true <= tolerance).all()


@pytest.mark.usefixtures("narrow_rates")
@pytest.mark.parametrize("tolerance", [1e-2, 5e-2])
def test_small_heads_follow_a_plan_bit_for_bit(tolerance: float) -> None:
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 4, 128, 32), np.float32)
    plan = adaattn.plan(query, key, value, tolerance=tolerance)
    assert (plan.rungs != "fp32").any()
    # Rungs that save less than a glance costs, and int8, of which it says nothing.
    assert np.isnan(plan.candidate_error[..., [2, 3, 4, 5, 8]]).all()
    out, report = adaattn.attention(query, key, value, tolerance=tolerance, return_report=True)
    again, planned = adaattn.attention(query, key, value, plan=plan, return_report=True)
    assert np.array_equal(again, out) and (planned.rungs == report.rungs).all()
    assert (planned.verified_rows[planned.rungs != "fp32"] >= 4).all()  # it may be one for other arrays
    for threads in (2, 64):  # heads as a whole, and tile by tile
        assert np.array_equal(
            adaattn.attention(query, key, value, tolerance=tolerance, num_threads=threads), out
        )


@pytest.mark.usefixtures("narrow_rates")
@pytest.mark.parametrize("own", [0.6, 1.0])
def test_predictions_of_small_heads_follow_their_outputs(own: float) -> None:
    """Queries look at a key of their own: fewer keys count than scores at random would have it."""
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 8, 128, 32), np.float32)
    query = 0.5 * query + np.float32(own) * key
    out, report = adaattn.attention(query, key, value, tolerance=1e-2, return_report=True)
    true = off(out, adaattn.reference.attention(query, key, value))
    assert (report.rungs != "fp32").all()
    assert ((0.75 * true < report.predicted_error) & (report.predicted_error < 1.75 * true)).all()


@pytest.mark.usefixtures("narrow_rates")
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_small_heads_that_a_glance_does_not_speak_for_stay_in_fp32(which: str) -> None:
    """A row that it does not fall on is far larger."""
    rng = np.random.default_rng(0)
    arrays = {x: rng.standard_normal((1, 4, 128, 32), np.float32) for x in ("query", "key", "value")}
    arrays[which][:, ::2, 77] *= 30
    plan = adaattn.plan(**arrays, tolerance=5e-2)
    assert ((plan.rungs == "fp32") == [True, False, True, False]).all()


@pytest.mark.usefixtures("narrow_rates")
def test_an_lse_of_small_heads_asks_for_a_wider_margin() -> None:
    """As few rows are compared with it."""
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 8, 128, 32), np.float32)
    rungs = [
        adaattn.plan(0.3 * query, key, value, tolerance=7.5e-3, return_lse=lse).rungs for lse in (False, True)
    ]
    assert (rungs[0] != "fp32").all() and (rungs[1] == "fp32").all()


@pytest.mark.usefixtures("narrow_rates")
def test_small_heads_of_zeros() -> None:
    """Nothing of them is off, and nothing is predicted to be: 0 / 0 is not."""
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 4, 128, 32), np.float32)
    value[:, 2] = 0
    out, report = adaattn.attention(query, key, value, tolerance=5e-2, return_report=True)
    assert (report.rungs != "fp32").all() and (out[:, 2] == 0).all()
    assert report.predicted_error[0, 2] == report.measured_error[0, 2] == 0


def test_many_threads_for_one_head() -> None:
    """Any of them may be the one that is told of it."""
    arrays = np.random.default_rng(0).standard_normal((3, 1, 1, 1024, 64), np.float32)
    call = {"tolerance": 1e-3, "min_precision": "fp32"}
    out = adaattn.attention(*arrays, **call, num_threads=1)
    for _ in range(50):
        assert np.array_equal(adaattn.attention(*arrays, **call, num_threads=64), out)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int16", ("int8", "bf16"), "int8"], ids=str)
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_small_heads_as_a_whole_have_the_bits_of_their_tiles(precision: Any, groups: int) -> None:
    """Also where some of them do not fit their rung, by a key or a value."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 6, 130, 40), np.float32)
    key, value = rng.standard_normal((2, 2, groups, 190, 40), np.float32)
    key[1, 0, 5, 3] = value[0, -1, 7, 1] = np.inf
    call = {"precision": precision, "causal": True, "return_lse": True, "return_report": True}
    with np.errstate(invalid="ignore"):
        whole, lse, told = adaattn.attention(query, key, value, **call, num_threads=1)
        tiles, lse_too, told_too = adaattn.attention(query, key, value, **call, num_threads=64)
    assert np.array_equal(whole, tiles, equal_nan=True) and np.array_equal(lse, lse_too, equal_nan=True)
    assert (told.retried == told_too.retried).all()
    assert told.retried.sum() == (0 if precision == "fp32" else 2 * 6 // groups)


def test_entropy_at_three_scales(rng: np.random.Generator) -> None:
    """Keys that repeat after 64 and one query: a row, its blocks and its window follow by hand."""
    T, D, periods = 2048, 16, 32
    key = np.tile(rng.standard_normal((64, D)), (periods, 1)).astype(np.float32)[None, None]
    query = np.broadcast_to(rng.standard_normal(D).astype(np.float32), (1, 1, T, D))
    value = rng.standard_normal(key.shape).astype(np.float32)
    scores = key[0, 0, :64].astype(np.float64) @ query[0, 0, 0] / np.sqrt(D)
    own = float(linalg.attention_entropy(linalg.stable_softmax(scores)))
    for options in ({}, {"causal": True, "query_offset": 64 * periods}):
        _, report = adaattn.attention(
            query, key, value, tolerance=1e-2, verify=True, return_report=True, **options
        )
        found = [
            x[0, 0] for x in (report.entropy, report.block_entropy, report.local_entropy, report.entropy_std)
        ]
        expected = own + np.log(periods), np.log(periods), own, 0
        np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("T", [1, 5, 30, 63])
def test_few_queries_are_verified_where_that_is_asked_for(T: int, rng: np.random.Generator) -> None:
    query, key, value = (rng.standard_normal((1, 3, n, 32)).astype(np.float32) for n in (T, 300, 300))
    out, report = adaattn.attention(
        query, key, value, tolerance=5e-2, precision="int8", verify=True, return_report=True
    )
    exact = adaattn.reference.attention(*(x.astype(np.float64) for x in (query, key, value)))
    truth = np.linalg.norm(out - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
    assert (report.verified_rows == min(T, 32)).all()
    np.testing.assert_allclose(report.measured_error, truth, rtol=3e-2 if T <= 32 else 1)
    with pytest.raises(
        adaattn.NumericalError, match=r"precision: expected a relative error of at most 0.0001"
    ):
        adaattn.attention(query, key, value, tolerance=1e-4, precision="int8", verify=True)
