"""Masked rows, NaN, infinities, and numbers at both ends of the formats."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import BF16, DTYPES, F16, F32, F64, Array, Shape, assert_near, check, inputs, same_bits

import adaattn
from adaattn import reference

pytestmark = [pytest.mark.isa_sample, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

NAN, INF = np.nan, np.inf
SHAPE = Shape(2, 2, 2, 70, 130, 16, 16)
ONE_QUERY = Shape(2, 2, 2, 1, 1030, 16, 16)

# Options that leave some rows, or all, without a key.
EMPTYING: list[dict[str, Any]] = [
    {"attn_mask": np.zeros((1, 1), bool)},
    {"attn_mask": np.full((1, 1), -INF)},
    {"attn_mask": np.arange(70)[:, None] % 3 > 0},
    {"attn_mask": np.where(np.arange(70)[:, None] % 3 > 0, 0.0, -INF)},
    {"kv_lengths": np.array([0, 20])},
    {"window": (0, 0), "query_offset": 100},
    {"causal": True, "query_offset": -40},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", EMPTYING, ids=lambda o: " ".join(o))
def test_rows_without_keys(options: dict[str, Any], dtype: Any, rng: np.random.Generator) -> None:
    arrays = inputs(rng, SHAPE, dtype)
    out, lse = check(*arrays, **options)
    empty = lse == -INF
    assert empty.any() and not out[empty].any()
    sinks = np.array([0.5, -2.0])
    out, lse = check(*arrays, sinks=sinks, **options)
    assert not out[empty].any()
    assert same_bits(lse[empty], np.broadcast_to(sinks[:, None], lse.shape)[empty].astype(lse.dtype))


@pytest.mark.parametrize("dropout", [{}, {"dropout_p": 0.999, "seed": 0}], ids=["", "dropout"])
@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (4, 4)}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, ONE_QUERY], ids=str)
def test_one_special_value(
    shape: Shape, dtype: Any, which: int, options: Any, special: float, dropout: Any, rng: np.random.Generator
) -> None:
    arrays = inputs(rng, shape, dtype)
    arrays[which][0, 1, -1 if which == 0 else -3, 5] = special
    out, _ = check(*arrays, **options, **dropout)
    assert np.isfinite(out[1]).all() and np.isfinite(out[:, 0]).all()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"num_threads": 2}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, ONE_QUERY], ids=str)
def test_special_values_meet(shape: Shape, dtype: Any, options: Any, rng: np.random.Generator) -> None:
    """In a column of V: NaN gives NaN, an infinity itself, both signs NaN; other columns stay finite."""
    query, key, value = inputs(rng, shape, dtype)
    value[0, 0, 3, 0], value[0, 0, 4, 1], value[0, 0, 5, 2] = NAN, INF, -INF
    value[0, 0, [6, 90], 3] = INF, -INF
    value[0, 0, [7, 8], 4] = INF, NAN
    out, _ = check(query, key, value, **options)
    np.testing.assert_array_equal(out[0, 0, -1, :5].astype(F64), [NAN, INF, -INF, NAN, NAN])
    assert np.isfinite(out[0, 0, :, 5:]).all()


def test_weight_zero_still_shows_a_special_value(rng: np.random.Generator) -> None:
    """A key whose weight underflows is attended to: its NaN is not lost."""
    query, key, value = inputs(rng, SHAPE)
    query[...], key[...] = 1, 100
    key[:, :, 9] = -100
    value[:, :, 9, 0], value[:, :, 9, 1] = NAN, INF
    out, _ = check(query, key, value)
    assert np.isnan(out[..., 0]).all() and (out[..., 1] == INF).all() and np.isfinite(out[..., 2:]).all()


@pytest.mark.parametrize(
    "hide",
    [
        {"attn_mask": np.arange(130) < 100},
        {"attn_mask": np.where(np.arange(130) < 100, 0, -INF)},
        {"kv_lengths": np.array([100, 100])},
        {"window": (None, 0), "query_offset": 30},
        {"causal": True, "query_offset": 30},
    ],
    ids=lambda o: " ".join(o),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_masked_away_leaks_nowhere(hide: Any, dtype: Any, rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, SHAPE, dtype)
    clean = adaattn.attention(query, key, value, return_lse=True, **hide)
    key[:, :, 100::2], key[:, :, 101::2] = NAN, INF
    value[:, :, 100::2], value[:, :, 101::2] = -INF, NAN
    assert same_bits(adaattn.attention(query, key, value, return_lse=True, **hide), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_infinity(dtype: Any, rng: np.random.Generator) -> None:
    """-inf by arithmetic weighs nothing, unless a row has nothing else; then, as with +inf, it is NaN."""
    query, key, value = inputs(rng, Shape(1, 1, 1, 3, 70, 2, 4), dtype)
    query[0, 0] = [[1, 1], [-1, 1], [1, 0.5]]
    key[..., 0] = -INF
    key[0, 0, :, 1] = 1
    out, lse = check(query, key, value)
    assert np.isnan(out).all() and np.isnan(lse).all()
    key[0, 0, 40, 0] = 0
    out, lse = check(query, key, value)
    assert same_bits(out[0, 0, 0], value[0, 0, 40]) and np.isnan(out[0, 0, 1]).all()
    assert same_bits(out[0, 0, 2], value[0, 0, 40])


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("T", [1, 5, 70])
def test_scores_that_overflow(dtype: Any, T: int, rng: np.random.Generator) -> None:
    """1e30 in queries and keys: scores of 1e60 have no place in fp32, and their softmax is one key."""
    query, key, value = inputs(rng, Shape(2, 2, 1, T, 150, 8, 8), dtype)
    small = adaattn.attention(query[1:], key[1:], value[1:])
    query[0] *= np.asarray(1e30, dtype)
    key[0] *= np.asarray(1e30, dtype)
    out, lse = adaattn.attention(query, key, value, return_lse=True)
    exact, exact_lse = reference.attention(query, key, value, return_lse=True)
    assert_near(out, exact, 1e-6, float(2.0**-8 if dtype == BF16 else 2.0**-23))
    with np.errstate(over="ignore"):
        assert_near(lse, exact_lse.astype(lse.dtype).astype(F64), 0, 1e-6)
    assert same_bits(out[1:], small)


@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scores_that_cancel(dtype: Any, T: int, rng: np.random.Generator) -> None:
    """Products of 1e40 cancel exactly, in float64 and in any order, and leave scores of zero."""
    query, key, value = inputs(rng, Shape(1, 1, 1, T, 150, 8, 8), dtype)
    query[...], key[..., 2:] = 0, 0
    query[..., :2] = 1e20
    key[..., 0] *= np.asarray(1e20, dtype)
    key[..., 1] = -key[..., 0]
    out, lse = adaattn.attention(query, key, value, return_lse=True)
    assert_near(out, np.broadcast_to(value.astype(F64).mean(axis=2, keepdims=True), out.shape), 1e-6, 2.0**-8)
    assert_near(lse, np.full(lse.shape, np.log(150)), 0, 1e-6)


@pytest.mark.parametrize("T", [1, 5, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_near_the_largest(dtype: Any, T: int, rng: np.random.Generator) -> None:
    """A mean cannot overflow, though the sum of the values would."""
    query, key, value = inputs(rng, Shape(1, 2, 1, T, 300, 8, 8), dtype)
    top = float(ml_dtypes.finfo(dtype).max)
    value[...] = rng.choice([0.5, 1.0], value.shape) * top * 0.98
    out = adaattn.attention(query, key, value)
    assert_near(out, reference.attention(query, key, value), top * 1e-5, float(ml_dtypes.finfo(dtype).eps))


@pytest.mark.parametrize("scale", [0.25, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: Any, scale: float, rng: np.random.Generator) -> None:
    """Ascending scores far beyond the range of exp: the maximum moves with every block."""
    query, key, value = inputs(rng, Shape(1, 1, 1, 70, 400, 4, 8), dtype)
    query[...], key[...] = 1, np.arange(400)[:, None] / 16
    check(query, key, value, scale=scale)
    check(query, key[:, :, ::-1], value, scale=scale)


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_values(dtype: Any, T: int, rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, Shape(1, 1, 1, T, 150, 8, 8), dtype)
    unit, counts = float(ml_dtypes.finfo(dtype).smallest_subnormal), rng.integers(50, 100, value.shape)
    value[...] = unit * counts
    out = adaattn.attention(query, key, value).astype(F64) / unit
    assert_near(out, reference.attention(query, key, counts), 8 if dtype in (F32, F64) else 0.51, 0)


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_subnormal_scores(dtype: Any, T: int, rng: np.random.Generator) -> None:
    """Queries below the normal range count: the scale makes ordinary scores of them."""
    query, key, value = inputs(rng, Shape(1, 1, 1, T, 150, 8, 8), dtype)
    info = ml_dtypes.finfo(dtype)
    query[...] = float(info.smallest_subnormal) * rng.integers(-100, 100, query.shape)
    key *= np.asarray(64, dtype)
    scale = 0.01 / float(info.smallest_subnormal) / 64
    assert not (np.abs(query) >= info.smallest_normal).any()
    out = adaattn.attention(query, key, value, scale=scale)
    assert_near(out, reference.attention(query, key, value, scale=scale), 4e-6, float(info.eps) / 2)


@pytest.mark.parametrize("softcap", [1e-3, 30.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_at_both_ends(dtype: Any, softcap: float, rng: np.random.Generator) -> None:
    for spread in (1e-3, 1.0, 100.0):
        check(*inputs(rng, SHAPE, dtype, spread), softcap=softcap)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_half_results_round_to_nearest_even(dtype: Any) -> None:
    """Means of two values that lie half way between neighbours, and one fp32 step to either side."""
    query, key = (np.zeros((1, 1, n, 1), dtype) for n in (1, 2))
    pairs: Array = np.arange(1, 2, 2.0**-7).astype(dtype)
    pairs = np.stack([pairs[:-1], pairs[1:]])
    out = adaattn.attention(query, key, pairs[None, None])
    assert same_bits(out[0, 0, 0], pairs.astype(F64).mean(axis=0).astype(dtype))


def assert_as_oracle(query: Array, key: Array, value: Array, **options: Any) -> None:
    """Relative Frobenius error of out at fp32's level, with NaN and infinities where the oracle has them."""
    out = adaattn.attention(query, key, value, **options).astype(F64)
    options.pop("precision", None)
    exact = reference.attention(query, key, value, **options)
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(exact))
    finite = np.isfinite(exact)
    scale = max(np.abs(exact[finite]).max(initial=0), 1e-300)
    assert np.linalg.norm((out[finite] - exact[finite]) / scale) <= 4e-6 * np.linalg.norm(
        exact[finite] / scale
    )


# Numbers that fp32 cannot hold on the way to results that it can; the sizes take both ways of the engine.
BEYOND_FP32: dict[str, tuple[float, float, float, dict[str, Any]]] = {
    "alibi below the lowest float": (1, 1, 1, {"alibi_slopes": [1e38], "query_offset": 10}),
    "alibi of far away": (1, 1, 1, {"alibi_slopes": [0.5], "query_offset": 10**6}),
    "a large mask everywhere": (1, 1, 1, {"attn_mask": np.full((1, 1), -1e9, F32)}),
    "a tiny scale": (1e23, 1e23, 1, {"scale": 1e-46}),
    "a huge cap": (1, 1, 1, {"softcap": 1.5e308}),
    "a sink that takes nearly all": (1, 1, 1e25, {"sinks": [110.0]}),
}


@pytest.mark.parametrize("T", [3, 9])
@pytest.mark.parametrize("case", BEYOND_FP32)
def test_options_beyond_fp32(case: str, T: int, rng: np.random.Generator) -> None:
    *factors, options = BEYOND_FP32[case]
    arrays = inputs(rng, Shape(1, 1, 1, T, 9, 8, 8), F32)
    assert_as_oracle(*(x * np.float32(f) for x, f in zip(arrays, factors, strict=True)), **options)


@pytest.mark.parametrize("T", [3, 9])
def test_double_values_beyond_fp32(T: int, rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, Shape(1, 1, 1, T, 70, 8, 8), F64)
    value[0, 0, 3, 0] = 1e300
    assert_as_oracle(query, key, value, precision="fp32")


@pytest.mark.parametrize("T", [3, 9])
@pytest.mark.parametrize("sink", [-INF, 0.5])
def test_only_scores_of_minus_infinity(sink: float, T: int, rng: np.random.Generator) -> None:
    """0 / 0 is NaN unless a sink takes the mass; a sink of -inf is none."""
    query, key, value = inputs(rng, Shape(1, 1, 1, T, 9, 8, 8), F32)
    query[...], key[...] = 1, -INF
    out = adaattn.attention(query, key, value, sinks=[sink])
    assert np.isnan(out).all() if sink == -INF else not out.any()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["", "softcap"])
@pytest.mark.parametrize("T", [5, 64])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_bad_row_changes_no_other(options: Any, T: int, dtype: Any, rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, Shape(1, 1, 1, T, 64, 8, 8), dtype)
    options = options | {"causal": True, "query_offset": 0}
    clean = adaattn.attention(query, key, value, return_lse=True, **options)
    query[:, :, -1], key[:, :, T - 2] = NAN, INF
    spoilt = adaattn.attention(query, key, value, return_lse=True, **options)
    for a, b in zip(clean, spoilt, strict=True):
        assert same_bits(a[:, :, : T - 2], b[:, :, : T - 2])
        assert np.isnan(b[:, :, -1]).all()


@pytest.mark.parametrize("T", [3, 9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["", "softcap"])
def test_hidden_in_the_middle_changes_no_bit(
    options: Any, bias: bool, T: int, rng: np.random.Generator
) -> None:
    query, key, value = inputs(rng, Shape(1, 1, 1, T, 64, 8, 8), F32)
    seen = np.arange(64) % 7 > 0
    mask = np.where(seen, 0, -INF).astype(F32) if bias else seen
    clean = adaattn.attention(query, key, value, attn_mask=mask, return_lse=True, **options)
    key[:, :, ~seen], value[:, :, ~seen] = NAN, INF
    assert same_bits(adaattn.attention(query, key, value, attn_mask=mask, return_lse=True, **options), clean)
