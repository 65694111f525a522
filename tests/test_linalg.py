"""adaattn.linalg against numpy.linalg, ml_dtypes, brute force and attention's own options."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support import BF16, DTYPES, F16, F32, F64, Array, assert_near, inputs, same_bits
from support import Shape as Problem

import adaattn
from adaattn import ArgumentError, DTypeError, ShapeError, linalg

E4M3 = ml_dtypes.float8_e4m3fn
METHODS = ("entropy", "energy", "count", "stable")


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def unit(dtype: Any) -> float:
    """Rounding of what is computed in for arrays of this dtype."""
    return float(np.finfo(np.result_type(dtype, F32)).eps)


def with_spectrum(rng: np.random.Generator, M: int, N: int, s: Any) -> Array:
    U, V = (np.linalg.qr(rng.standard_normal((size, len(s))))[0] for size in (M, N))
    a: Array = (U * s) @ V.T
    return a


def matrices(rng: np.random.Generator) -> dict[str, Array]:
    return {
        "wide": rng.standard_normal((5, 9)),
        "tall": rng.standard_normal((40, 6)),
        "one": np.array([[-3.0]]),
        "row": rng.standard_normal((1, 7)),
        "column": rng.standard_normal((7, 1)),
        "rank one": np.outer(rng.standard_normal(8), rng.standard_normal(5)),
        "zeros": np.zeros((4, 6)),
        "duplicates": np.repeat(rng.standard_normal((3, 6)), 2, axis=0),
        "identity": np.eye(6),
        "huge": 1e30 * rng.standard_normal((6, 5)),
        "small": 1e-30 * rng.standard_normal((6, 5)),
        "graded": with_spectrum(rng, 12, 10, 10.0 ** -np.arange(10)),
    }


EVERY_MATRIX = pytest.mark.parametrize("name", matrices(np.random.default_rng(0)))
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def matrix(name: str, rng: np.random.Generator, dtype: Any) -> tuple[Array, Array]:
    """In the dtype (within its range), and what that rounded it to in float64."""
    a = matrices(rng)[name]
    if dtype == F16:
        a = np.clip(a, -6e4, 6e4)
    a = a.astype(dtype)
    return a, a.astype(F64)


# ---- singular values and vectors


@EVERY_DTYPE
@EVERY_MATRIX
def test_randomized_svd_with_every_vector_is_the_svd(name: str, dtype: Any, rng: Any) -> None:
    a, exact = matrix(name, rng, dtype)
    size = min(a.shape)
    U, s, Vt = linalg.randomized_svd(a, size, seed=1)
    tolerance = 50 * unit(dtype)
    norm = np.linalg.norm(exact, 2)
    assert U.dtype == s.dtype == Vt.dtype == np.result_type(dtype, F32)
    np.testing.assert_allclose(U.T @ U, np.eye(size), atol=tolerance)
    np.testing.assert_allclose(Vt @ Vt.T, np.eye(size), atol=tolerance)
    np.testing.assert_allclose(s, np.linalg.svd(exact)[1], rtol=0, atol=tolerance * norm)
    np.testing.assert_allclose(U.astype(F64) * s @ Vt, exact, rtol=0, atol=tolerance * norm)


def test_randomized_svd_finds_the_leading_part(rng: Any) -> None:
    """Errors near the best possible, the more so with more iterations, where singular values fall slowly."""
    spectrum = 1 / np.sqrt(np.arange(1, 81))
    a = with_spectrum(rng, 120, 90, spectrum)
    excess = []
    for n_iter in (0, 2, 6):
        U, s, Vt = linalg.randomized_svd(a, 10, n_iter=n_iter, seed=0)
        assert (U.shape, s.shape, Vt.shape) == ((120, 10), (10,), (10, 90))
        assert (np.diff(s) <= 0).all() and (s <= spectrum[:10] * (1 + 1e-12)).all()
        excess.append(np.linalg.norm(a - U * s @ Vt) / np.linalg.norm(spectrum[10:]) - 1)
    assert 0.2 > excess[0] > 4 * excess[1] > 16 * excess[2] > 0
    U, s, Vt = linalg.randomized_svd(a, 10, n_oversamples=60, n_iter=4, seed=0)
    np.testing.assert_allclose(s, spectrum[:10], rtol=1e-8)


def test_randomized_svd_of_low_rank_is_exact_without_iterations(rng: Any) -> None:
    a = with_spectrum(rng, 60, 50, np.array([3.0, 2.0, 1.0]))
    U, s, Vt = linalg.randomized_svd(a, 3, n_oversamples=0, n_iter=0, seed=5)
    np.testing.assert_allclose(U * s @ Vt, a, atol=1e-12)


def test_small_singular_values_survive_iterations(rng: Any) -> None:
    """Those below the square root of rounding drown in a·aᵀ unless every product is orthonormalised."""
    spectrum = np.append(10.0 ** -np.arange(10), np.full(30, 3e-10))
    s = linalg.randomized_svd(with_spectrum(rng, 40, 40, spectrum), 10, n_oversamples=0, n_iter=4, seed=0)[1]
    np.testing.assert_allclose(s, spectrum[:10], rtol=1e-6)


@EVERY_DTYPE
@EVERY_MATRIX
def test_power_iteration(name: str, dtype: Any, rng: Any) -> None:
    a, exact = matrix(name, rng, dtype)
    sigma, u, v = linalg.power_iteration(a, n_iter=1000, seed=2)
    norm = np.linalg.norm(exact, 2)
    assert sigma.dtype == u.dtype == v.dtype == np.result_type(dtype, F32)
    assert (u.shape, v.shape) == (a.shape[:1], a.shape[1:])
    np.testing.assert_allclose(sigma, norm, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(v), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(u), norm > 0, rtol=1e-5)
    np.testing.assert_allclose(exact @ v, sigma * u.astype(F64), rtol=0, atol=1e-5 * norm)
    np.testing.assert_allclose(exact.T @ u, sigma * v.astype(F64), rtol=0, atol=2e-5 * norm)


def test_power_iteration_counts_and_tolerances(rng: Any) -> None:
    """Never above the norm, closer with more products, and no more of them than the tolerance needs."""
    a = with_spectrum(rng, 30, 20, np.array([1.0, 0.9, 0.8, 0.1]))
    sigmas = [linalg.power_iteration(a, n_iter=n, tol=0, seed=0)[0] for n in range(0, 60, 6)]
    assert (np.diff(sigmas) > 0).all() and 0.5 > 1 - sigmas[1] > 1 - sigmas[-1] > 0
    start = np.random.default_rng(0).standard_normal(20)
    for n, direction in ((0, start), (1, a.T @ (a @ start))):
        v = linalg.power_iteration(a, n_iter=n, seed=0)[2]
        np.testing.assert_allclose(v, direction / np.linalg.norm(direction), rtol=1e-12)
    exact = linalg.power_iteration(a, n_iter=500, tol=0, seed=0)
    for tol in (1e-2, 1e-6):
        sigma, u, v = linalg.power_iteration(a, n_iter=500, tol=tol, seed=0)
        assert tol**3 < np.linalg.norm(a.T @ u - sigma * v) <= tol and sigma < exact[0]


@EVERY_DTYPE
@EVERY_MATRIX
def test_spectral_norm_and_low_rank(name: str, dtype: Any, rng: Any) -> None:
    a, exact = matrix(name, rng, dtype)
    tolerance = 50 * unit(dtype)
    s = np.linalg.svd(exact)[1]
    np.testing.assert_allclose(linalg.spectral_norm(a), s[0], rtol=tolerance)
    for rank in range(1, len(s) + 1):
        nearest = linalg.low_rank_approximation(a, rank)
        assert nearest.dtype == np.result_type(dtype, F32)
        distance = np.linalg.norm(exact - nearest) / (s[0] or 1)
        assert abs(distance - np.linalg.norm(s[rank:]) / (s[0] or 1)) <= tolerance
        assert np.linalg.matrix_rank(nearest, rtol=tolerance) <= rank


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("end", ["max", "smallest_subnormal"])
def test_no_norm_is_too_large_or_too_small(end: str, dtype: Any) -> None:
    """Numbers whose squares overflow or vanish."""
    info = np.finfo(dtype)
    size = float(info.max) / 64 if end == "max" else 8 * float(info.smallest_subnormal)
    signs = np.array([[1, 1, 1], [1, -1, 1], [1, 1, 1], [1, 1, 1]])
    a = (size * signs).astype(dtype)
    s = np.linalg.svd(signs)[1][:2]
    error: Any = {"rtol": 1e-5} if end == "max" else {"rtol": 0, "atol": float(info.smallest_subnormal)}
    np.testing.assert_allclose(linalg.spectral_norm(a), size * s[0], **error)
    np.testing.assert_allclose(linalg.power_iteration(a, seed=0)[0], size * s[0], **error)
    np.testing.assert_allclose(linalg.randomized_svd(a, 2, seed=0)[1], size * s, **error)
    np.testing.assert_allclose(linalg.low_rank_approximation(a, 2), a, **error)
    for method in METHODS:
        rank = linalg.effective_rank(a, method)
        np.testing.assert_allclose(rank, linalg.effective_rank(signs.astype(F64), method), rtol=1e-5)


def functions_of_matrices() -> dict[str, Callable[[Any], Any]]:
    return {
        "randomized_svd": lambda a: linalg.randomized_svd(a, 2, n_oversamples=1, seed=3),
        "power_iteration": lambda a: linalg.power_iteration(a, seed=3),
        "spectral_norm": linalg.spectral_norm,
        "low_rank_approximation": lambda a: linalg.low_rank_approximation(a, 2),
        "rounding_error": lambda a: linalg.rounding_error(a, "bf16"),
        "rounding_error, int8": lambda a: linalg.rounding_error(a, "int8"),
        "rounding_error, fp8": lambda a: linalg.rounding_error(a, "fp8", axis=(-2, -1)),
    } | {
        f"effective_rank, {method}": lambda a, method=method: linalg.effective_rank(a, method)
        for method in METHODS
    }


EVERY_FUNCTION = pytest.mark.parametrize("name", functions_of_matrices())


def parts(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@EVERY_DTYPE
@EVERY_FUNCTION
def test_batches_are_loops(name: str, dtype: Any, rng: Any) -> None:
    """The same bits, whatever else is in the batch; nothing is written to."""
    function = functions_of_matrices()[name]
    batch = rng.standard_normal((2, 3, 7, 5)).astype(dtype)
    batch[0, 1] = np.outer(rng.standard_normal(7), np.ones(5))
    batch[1, 0] = 0
    batch[1, 1] *= 100
    before = batch.tobytes()
    result = parts(function(batch))
    assert batch.tobytes() == before
    for index in np.ndindex(2, 3):
        for whole, alone in zip(result, parts(function(batch[index])), strict=True):
            assert same_bits(np.asarray(whole[index]), np.asarray(alone))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@EVERY_FUNCTION
def test_nan_stays_in_its_matrix(name: str, value: float, rng: Any) -> None:
    function = functions_of_matrices()[name]
    batch = rng.standard_normal((3, 6, 6))
    clean = parts(function(batch))
    batch[1, 2, 3] = value
    for after, before in zip(parts(function(batch)), clean, strict=True):
        assert np.isnan(after[1]).all()
        assert same_bits(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(
    "function", [linalg.power_iteration, lambda a, **o: linalg.randomized_svd(a, 2, **o)]
)
def test_seeds(function: Any, rng: Any) -> None:
    a = rng.standard_normal((30, 40))
    options = {"n_iter": 1}
    first = function(a, seed=7, **options)
    assert same_bits(first, function(a, seed=7, **options))
    assert same_bits(first, function(a, seed=np.random.default_rng(7), **options))
    assert not same_bits(first, function(a, seed=8, **options))
    assert not same_bits(function(a, **options), function(a, **options))


# ---- entropy and rank


def test_entropy_by_hand() -> None:
    weights = np.array([[0.5, 0.5, 0.0], [1, 0, 0], [0, 0, 0], [0.25, 0.5, 0.25]])
    expected = [math.log(2), 0, 0, 1.5 * math.log(2)]
    np.testing.assert_allclose(linalg.attention_entropy(weights), expected, rtol=1e-15)
    np.testing.assert_allclose(linalg.attention_entropy(8 * weights.T, axis=0), expected, rtol=1e-15)
    np.testing.assert_allclose(linalg.attention_entropy(1e308 * weights), expected, rtol=1e-15)
    np.testing.assert_allclose(linalg.attention_entropy(np.ones((3, 4)), axis=None), math.log(12))
    np.testing.assert_allclose(linalg.attention_entropy(np.ones((3, 2, 4)), axis=(0, -1)), [math.log(12)] * 2)
    assert not np.signbit(linalg.attention_entropy(weights)).any()
    for value in (np.nan, np.inf):
        weights[1, 1] = value
        np.testing.assert_array_equal(
            np.isnan(linalg.attention_entropy(weights)), [False, True, False, False]
        )


@EVERY_DTYPE
def test_entropy_of_rounded_weights(dtype: Any, rng: Any) -> None:
    """They do not sum to one; what counts is what they stand for."""
    exact = linalg.stable_softmax(rng.standard_normal((2, 3, 70, 90)))
    weights = exact.astype(dtype)
    entropy = linalg.attention_entropy(weights)
    assert entropy.shape == (2, 3, 70) and entropy.dtype == np.result_type(dtype, F32)
    assert linalg.attention_entropy(weights * weights.dtype.type(4)).tolist() == entropy.tolist()
    error = np.abs(entropy + (exact * np.log(exact)).sum(-1)).max()
    assert error <= 0.3 * float(ml_dtypes.finfo(dtype).eps) + 16 * unit(dtype)


UNIT_INTERVAL = st.floats(0, 1, width=32)


@given(hnp.arrays(F32, hnp.array_shapes(max_dims=2, max_side=9), elements=UNIT_INTERVAL))
def test_bounds_of_the_entropy(weights: Array) -> None:
    entropy = linalg.attention_entropy(weights)
    n = weights.shape[-1]
    assert (entropy >= 0).all() and (entropy <= math.log(n) + 1e-6).all()
    p = weights.astype(F64) / np.maximum(weights.sum(-1, dtype=F64, keepdims=True), 1e-300)
    exact = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    np.testing.assert_allclose(entropy, exact, atol=1e-5)


def test_ranks_by_hand(rng: Any) -> None:
    s = np.array([4.0, 2.0, 1.0, 1.0])
    a = with_spectrum(rng, 9, 7, s)
    assert linalg.effective_rank(a) == pytest.approx(2 ** (0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3))
    assert linalg.effective_rank(a, "stable") == pytest.approx(22 / 16)
    for threshold, rank in (
        (0.5, 1),
        (16 / 22 - 1e-9, 1),
        (16 / 22 + 1e-9, 2),
        (0.9, 2),
        (0.92, 3),
        (0.96, 4),
    ):
        assert linalg.effective_rank(a, "energy", threshold=threshold) == rank
    for threshold, rank in ((0.6, 1), (0.4, 2), (0.2, 4), (1, 0)):
        assert linalg.effective_rank(a, "count", threshold=threshold) == rank
    assert linalg.effective_rank(a, "count") == np.linalg.matrix_rank(a) == 4
    assert linalg.effective_rank(a, "energy") == 4
    assert linalg.effective_rank(np.eye(4), "energy", threshold=0.5) == 2
    assert linalg.effective_rank(with_spectrum(rng, 9, 7, np.array([10, 1, 0.5])), "energy") == 2


@pytest.mark.parametrize("method", METHODS)
@EVERY_DTYPE
def test_ranks_of_plain_matrices(method: str, dtype: Any) -> None:
    """Identity, uniform weights, zeros."""
    for size in (1, 2, 17):
        rank = linalg.effective_rank(np.eye(size, size + 3).astype(dtype), method)
        assert rank == pytest.approx(size, rel=1e-5) and rank.dtype == np.result_type(dtype, F32)
        np.testing.assert_allclose(linalg.effective_rank(np.ones((size, 5), dtype), method), 1, rtol=1e-4)
    assert linalg.effective_rank(np.zeros((2, 3, 4), dtype), method).tolist() == [0, 0]


@given(
    hnp.arrays(F64, hnp.array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.floats(-1e3, 1e3)),
    st.sampled_from(METHODS),
)
def test_bounds_of_the_rank(a: Array, method: str) -> None:
    rank = linalg.effective_rank(a, method)
    some = (a != 0).any(axis=(-2, -1))
    assert (rank >= some * (1 - 1e-9)).all() and (rank <= some * min(a.shape[-2:]) * (1 + 1e-5)).all()
    np.testing.assert_allclose(linalg.effective_rank(4 * a, method), rank, rtol=1e-9)


# ---- softmax


@EVERY_DTYPE
@pytest.mark.parametrize("axis", [-1, 0, (0, 2), None], ids=str)
def test_softmax(dtype: Any, axis: Any, rng: Any) -> None:
    x = (30 * rng.standard_normal((3, 4, 5))).astype(dtype)
    e = np.exp(x.astype(F64))
    total = e.sum(axis, keepdims=True)
    before = x.tobytes()
    p, lse = linalg.stable_softmax(x, axis), linalg.log_sum_exp(x, axis)
    assert x.tobytes() == before
    assert p.dtype == lse.dtype == np.result_type(dtype, F32)
    np.testing.assert_allclose(p, e / total, rtol=1e-4 if unit(dtype) > 1e-10 else 1e-12, atol=1e-35)
    np.testing.assert_allclose(lse, np.log(total).squeeze(axis), rtol=4 * unit(dtype), atol=1e-5)


def test_softmax_of_what_is_not_finite() -> None:
    inf, nan = np.inf, np.nan
    x = np.array([[-inf, -inf], [0, -inf], [inf, 1], [inf, inf], [nan, -inf], [inf, nan], [3e38, -3e38]], F32)
    expected = [[0, 0], [1, 0], [nan, nan], [nan, nan], [nan, nan], [nan, nan], [1, 0]]
    np.testing.assert_array_equal(linalg.stable_softmax(x), np.array(expected, F32))
    lse = np.array([-inf, 0, inf, inf, nan, nan, 3e38], F32)
    np.testing.assert_array_equal(linalg.log_sum_exp(x), lse)


@given(
    hnp.arrays(
        F32, hnp.array_shapes(max_dims=2, max_side=7), elements=st.floats(max_value=2.0**127, width=32)
    ),
)
def test_softmax_sums_to_one(x: Array) -> None:
    """Or to zero, where no key is visible; a shift changes nothing."""
    p, lse = linalg.stable_softmax(x), linalg.log_sum_exp(x)
    rows = np.isnan(x).any(-1)
    hidden = (x == -np.inf).all(-1)
    assert (np.isnan(p).all(-1) == rows).all() and (np.isnan(lse) == rows).all()
    np.testing.assert_allclose(p.sum(-1)[~rows], ~hidden[~rows], rtol=1e-6)
    assert (p[~rows] >= 0).all() and (lse[~rows] == -np.inf).tolist() == hidden[~rows].tolist()
    assert (lse[~rows] >= x.max(-1)[~rows]).all()


def test_softmax_and_lse_are_attentions(rng: Any) -> None:
    query, key, value = inputs(rng, Problem(1, 2, 2, 6, 4, 8, 8), F64)
    mask = linalg.causal_mask(6, 4)
    out, lse = adaattn.attention(query, key, value, causal=True, scale=1.0, return_lse=True)
    scores = np.where(mask, query @ key.swapaxes(-2, -1), -np.inf)
    assert_near(linalg.stable_softmax(scores) @ value, out, 1e-13, 1e-13)
    assert_near(linalg.log_sum_exp(scores), lse, 1e-13, 1e-13)


# ---- masks

SIZES = st.integers(1, 12)
SIDES = st.none() | st.integers(0, 14) | st.just(2**80)


@given(SIZES, SIZES, SIDES, SIDES)
def test_windows_by_brute_force(T: int, S: int, left: int | None, right: int | None) -> None:
    mask = linalg.sliding_window_mask(T, S, left, right)
    assert mask.dtype == bool and mask.shape == (T, S)
    for i, j in np.ndindex(T, S):
        position = i + S - T
        low, high = (
            (position - left if left is not None else 0),
            (position + right if right is not None else S),
        )
        assert mask[i, j] == (low <= j <= high)


def test_causal_by_brute_force() -> None:
    for T, S in np.ndindex(6, 6):
        rows = [[j <= i + S - T for j in range(S + 1)] for i in range(T + 1)]
        assert linalg.causal_mask(T + 1, S + 1).tolist() == rows


def test_padding_by_brute_force() -> None:
    mask = linalg.padding_mask([0, 2, 5], 5)
    assert mask.dtype == bool and mask.shape == (3, 1, 1, 5)
    assert mask[:, 0, 0].tolist() == [[j < n for j in range(5)] for n in (0, 2, 5)]
    for dtype in (np.int8, np.uint64):
        assert (linalg.padding_mask(np.array([0, 2, 5], dtype), 5) == mask).all()


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 9), (9, 1), (5, 12), (12, 5), (70, 70)])
def test_masks_are_attentions_options(T: int, S: int, rng: Any) -> None:
    query, key, value = inputs(rng, Problem(3, 2, 1, T, S, 8, 8), F64)
    lengths = [S, S // 2, 0]
    pairs: list[tuple[Array, dict[str, Any]]] = [
        (linalg.causal_mask(T, S), {"causal": True}),
        (linalg.padding_mask(lengths, S), {"kv_lengths": lengths}),
        (linalg.causal_mask(T, S) & linalg.padding_mask(lengths, S), {"causal": True, "kv_lengths": lengths}),
    ]
    for window in ((0, 0), (3, 1), (2, None), (None, 2), (None, None), (2**70, 0)):
        pairs.append((linalg.sliding_window_mask(T, S, *window), {"window": window}))
    for mask, options in pairs:
        masked = adaattn.attention(query, key, value, attn_mask=mask, return_lse=True)
        direct = adaattn.attention(query, key, value, **options, return_lse=True)
        for actual, expected in zip(masked, direct, strict=True):
            assert_near(actual, expected, 1e-14, 1e-14)


# ---- rounding


def test_every_code_of_e4m3() -> None:
    """256 codes decode as in ml_dtypes; those of numbers encode to themselves, with their sign."""
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(E4M3).astype(F32)
    np.testing.assert_array_equal(linalg.dequantize(codes, np.float32(1)), values)
    finite = ~np.isnan(values)
    again, scale = linalg.quantize(values[finite], "fp8")
    assert scale.tolist() == [1] and (again == codes[finite]).all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_fp8_rounds_like_ml_dtypes(dtype: Any, rng: Any) -> None:
    """On float32 numbers; ml_dtypes rounds others twice."""
    values = np.arange(127, dtype=np.uint8).view(E4M3).astype(F64)
    ties = (values[1:] + values[:-1]) / 2
    some = [448 * rng.random(5000), 2.0 ** rng.uniform(-14, 8.8, 5000)]
    x = np.concatenate([values, ties, *some]).astype(F32).astype(dtype)
    codes, scale = linalg.quantize(np.concatenate([x, -x]), "fp8")
    assert codes.dtype == np.uint8 and scale.tolist() == [1]
    np.testing.assert_array_equal(codes, np.concatenate([x, -x]).astype(E4M3).view(np.uint8))
    ties = ties.astype(dtype)
    near = np.concatenate([np.nextafter(ties, dtype.type(0)), np.nextafter(ties, dtype.type(999)), [448]])
    codes, _ = linalg.quantize(near.astype(dtype), "fp8")
    assert codes.tolist() == [*range(126), *range(1, 127), 126]


@EVERY_DTYPE
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("axis", [-1, 0, (-2, -1), None], ids=str)
def test_scales(dtype: Any, kind: str, axis: Any, rng: Any) -> None:
    x = (rng.standard_normal((3, 4, 5)) * rng.uniform(1e-4, 1e4, (3, 4, 1))).astype(dtype)
    wide = x.astype(F64)
    codes, scale = linalg.quantize(x, kind, axis)
    largest = np.abs(wide).max(axis, keepdims=True)
    assert codes.shape == x.shape and scale.shape == largest.shape
    assert codes.dtype == {"int8": np.int8, "fp8": np.uint8}[kind] and scale.dtype == np.result_type(
        dtype, F32
    )
    top = {"int8": 127, "fp8": 448}[kind]
    np.testing.assert_allclose(scale, largest / top, rtol=unit(dtype))
    back = linalg.dequantize(codes, scale)
    assert back.dtype == scale.dtype
    half_step = scale / 2 if kind == "int8" else np.maximum(np.abs(wide) / 16, scale / 1024)
    assert (np.abs(back - wide) <= half_step * (1 + 1e-4)).all()
    at_top = np.abs(wide) == largest
    np.testing.assert_allclose(back[at_top], wide[at_top], rtol=4 * unit(dtype))
    assert (np.abs(codes.astype(int)[at_top]) if kind == "int8" else codes[at_top] % 128).tolist() == [
        {"int8": 127, "fp8": 126}[kind]
    ] * at_top.sum()


@given(
    hnp.arrays(F32, hnp.array_shapes(max_dims=2, max_side=6), elements=st.floats(allow_nan=False, width=32)),
    st.sampled_from(["int8", "fp8"]),
)
def test_error_of_codes_is_at_most_half_a_step(x: Array, kind: str) -> None:
    """For all floats, subnormal and the largest ones included; infinities make their group NaN."""
    codes, scale = linalg.quantize(x, kind)
    back = linalg.dequantize(codes, scale)
    bad = np.isinf(x).any(-1)
    assert (np.isnan(back).all(-1) == bad).all() and np.isfinite(back[~bad]).all()
    wide, scale = x[~bad].astype(F64), scale[~bad].astype(F64)
    half_step = scale / 2 if kind == "int8" else np.maximum(np.abs(wide) / 16, scale / 1024)
    assert (np.abs(back[~bad] - wide) <= half_step * (1 + 1e-4)).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_codes_of_zeros_and_nan(kind: str) -> None:
    x = np.array([[0.0, 0], [1, np.nan], [np.inf, 1], [2, 1]])
    codes, scale = linalg.quantize(x, kind)
    assert np.isnan(scale[:, 0]).tolist() == [False, True, True, False] and scale[0] > 0
    assert not codes[:3].any()
    back = linalg.dequantize(codes, scale)
    assert back[0].tolist() == [0, 0] and np.isnan(back[1:3]).all()
    np.testing.assert_allclose(back[3], x[3], rtol=1 / 16)


ROUNDED = {"fp32": F32, "fp16": F16, "bf16": BF16}


@pytest.mark.parametrize("name", ROUNDED)
@EVERY_DTYPE
def test_rounding_error_of_formats(name: str, dtype: Any, rng: Any) -> None:
    """As rounded by NumPy and ml_dtypes, subnormal numbers and ties included."""
    x = np.concatenate(
        [
            rng.standard_normal((1, 20, 30)),
            1 + rng.integers(-512, 512, (1, 20, 30)) / 512,
            1e-7 * rng.standard_normal((1, 20, 30)),
            1e-39 * rng.standard_normal((1, 20, 30)),
            1e-42 * rng.standard_normal((1, 20, 30)),
        ]
    ).astype(dtype)
    wide = x.astype(F64)
    rounded = x.astype(F32).astype(ROUNDED[name]).astype(F64)
    if name == "fp16":
        rounded = x.astype(F16).astype(F64)
    norm = np.linalg.norm(wide * 2.0**100, axis=(-2, -1))
    exact = np.linalg.norm((rounded - wide) * 2.0**100, axis=(-2, -1)) / np.where(norm == 0, 1, norm)
    error = linalg.rounding_error(x, name)
    assert error.shape == (5,) and error.dtype == np.result_type(dtype, F32)
    np.testing.assert_allclose(error, exact, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounding_error_of_codes(kind: str, rng: Any) -> None:
    x = rng.standard_normal((2, 30, 40))
    for axis in (-1, -2, (-2, -1)):
        back = linalg.dequantize(*linalg.quantize(x, kind, axis))
        exact = np.linalg.norm(back - x, axis=(-2, -1)) / np.linalg.norm(x, axis=(-2, -1))
        np.testing.assert_allclose(linalg.rounding_error(x, kind, axis), exact, rtol=1e-12)
        assert (exact > 1e-3).all()
    assert same_bits(linalg.rounding_error(x, kind), linalg.rounding_error(x, kind, -1))


def test_rounding_error_beyond_formats() -> None:
    assert linalg.rounding_error(np.array([[65519.0, 1]]), "fp16") < 1e-3
    assert linalg.rounding_error(np.array([[-65520.0, 1]]), "fp16") == np.inf
    assert linalg.rounding_error(np.array([[3.39e38]], F32), "bf16") < 1e-2
    for x in (np.array([[3.4e38]], F32), np.array([[-3.4e38]], F64)):
        assert linalg.rounding_error(x, "bf16") == np.inf
    assert linalg.rounding_error(np.array([[1e300]]), "fp32") == np.inf
    for name in (*ROUNDED, "int8", "fp8"):
        assert linalg.rounding_error(np.zeros((2, 2)), name) == 0
        assert np.isnan(linalg.rounding_error(np.array([[np.inf, 1]]), name))
        if name in ("fp16", "bf16"):
            assert linalg.rounding_error(np.array([[1e-200]]), name) == 1


# ---- arguments

X = np.ones((3, 4))
FLOATS = "float16, bfloat16, float32 or float64"
WRONG: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (DTypeError, f"x: expected {FLOATS}, got int64", lambda: linalg.stable_softmax([1, 2])),
    (DTypeError, f"x: expected {FLOATS}, got complex128", lambda: linalg.log_sum_exp([1j])),
    (DTypeError, f"a: expected {FLOATS}, got bool", lambda: linalg.spectral_norm(np.ones((2, 2), bool))),
    (DTypeError, f"a: expected {FLOATS}, got object", lambda: linalg.power_iteration({})),  # type: ignore[arg-type]
    (
        DTypeError,
        f"x: expected {FLOATS}, got {np.dtype(E4M3)}",
        lambda: linalg.quantize(X.astype(E4M3), "fp8"),
    ),
    (
        DTypeError,
        "x: expected a plain array, got MaskedArray",
        lambda: linalg.effective_rank(np.ma.ones((2, 2))),
    ),
    (
        DTypeError,
        "weights: expected a plain array, got list",
        lambda: linalg.attention_entropy([[1.0], [1.0, 2.0]]),
    ),
    (ShapeError, "x: expected at least 1 dimension, got ()", lambda: linalg.stable_softmax(1.0)),
    (
        ShapeError,
        "a: expected shape (..., M, N), got (3,)",
        lambda: linalg.low_rank_approximation(X[:, 0], 1),
    ),
    (ShapeError, "x: expected shape (..., M, N), got (3,)", lambda: linalg.rounding_error(X[:, 0], "fp16")),
    (
        ShapeError,
        "a: expected sizes of at least 1, got shape (3, 0)",
        lambda: linalg.randomized_svd(X[:, :0], 1),
    ),
    (
        ArgumentError,
        "weights: expected numbers of at least 0, got -0.5",
        lambda: linalg.attention_entropy([1.0, -0.5, np.nan]),
    ),
    (ArgumentError, "axis: expected an int from -2 to 1, got 2", lambda: linalg.stable_softmax(X, 2)),
    (
        ArgumentError,
        "axis: expected an int from -2 to 1, got -3",
        lambda: linalg.quantize(X, "int8", (0, -3)),
    ),
    (ArgumentError, "axis: expected distinct axes, got (1, -1)", lambda: linalg.log_sum_exp(X, (1, -1))),
    (
        DTypeError,
        "axis: expected an int, got str",
        lambda: linalg.attention_entropy(X, "keys"),  # type: ignore[arg-type]
    ),
    (ArgumentError, "rank: expected an int from 1 to 3, got 4", lambda: linalg.randomized_svd(X, 4)),
    (ArgumentError, "rank: expected an int from 1 to 3, got 0", lambda: linalg.low_rank_approximation(X, 0)),
    (
        DTypeError,
        "rank: expected an int, got float",
        lambda: linalg.randomized_svd(X, 1.0),  # type: ignore[arg-type]
    ),
    (DTypeError, "rank: expected an int, got bool", lambda: linalg.low_rank_approximation(X, True)),
    (
        ArgumentError,
        "n_oversamples: expected an int of at least 0, got -1",
        lambda: linalg.randomized_svd(X, 1, n_oversamples=-1),
    ),
    (
        ArgumentError,
        "n_iter: expected an int of at least 0, got -1",
        lambda: linalg.randomized_svd(X, 1, n_iter=-1),
    ),
    (ArgumentError, "n_iter: expected an int of at least 0, got -2", lambda: linalg.power_iteration(X, -2)),
    (
        ArgumentError,
        "tol: expected a number of at least 0, got nan",
        lambda: linalg.power_iteration(X, tol=np.nan),
    ),
    (
        ArgumentError,
        "seed: expected None, an int of at least 0 or a Generator, got -1",
        lambda: linalg.power_iteration(X, seed=-1),
    ),
    (
        DTypeError,
        "seed: expected None, an int of at least 0 or a Generator, got 0.5",
        lambda: linalg.randomized_svd(X, 1, seed=0.5),  # type: ignore[arg-type]
    ),
    (
        ArgumentError,
        "method: expected 'entropy', 'energy', 'count' or 'stable', got 'power'",
        lambda: linalg.effective_rank(X, "power"),
    ),
    (
        DTypeError,
        "method: expected 'entropy', 'energy', 'count' or 'stable', got int",
        lambda: linalg.effective_rank(X, 1),  # type: ignore[arg-type]
    ),
    (
        ArgumentError,
        "threshold: expected None for method 'entropy', got 0.5",
        lambda: linalg.effective_rank(X, threshold=0.5),
    ),
    (
        ArgumentError,
        "threshold: expected a number from 0 to 1, got 1.5",
        lambda: linalg.effective_rank(X, "energy", 1.5),
    ),
    (ArgumentError, "T: expected an int of at least 1, got 0", lambda: linalg.causal_mask(0, 3)),
    (ArgumentError, "S: expected an int of at least 1, got -1", lambda: linalg.causal_mask(2, -1)),
    (DTypeError, "S: expected an int, got float", lambda: linalg.padding_mask([1], 2.0)),  # type: ignore[arg-type]
    (
        ArgumentError,
        "left: expected an int of at least 0, got -1",
        lambda: linalg.sliding_window_mask(2, 3, -1, None),
    ),
    (
        ArgumentError,
        "right: expected an int of at least 0, got -2",
        lambda: linalg.sliding_window_mask(2, 3, None, -2),
    ),
    (DTypeError, "lengths: expected integers, got float64", lambda: linalg.padding_mask([1.0], 3)),
    (ShapeError, "lengths: expected shape (B,), got ()", lambda: linalg.padding_mask(2, 3)),
    (
        ArgumentError,
        "lengths: expected integers from 0 to 3, got 1 to 4",
        lambda: linalg.padding_mask([1, 4], 3),
    ),
    (
        ArgumentError,
        "lengths: expected integers from 0 to 3, got -1 to 2",
        lambda: linalg.padding_mask([2, -1], 3),
    ),
    (ArgumentError, "dtype: expected 'int8' or 'fp8', got 'int4'", lambda: linalg.quantize(X, "int4")),
    (
        DTypeError,
        "dtype: expected 'fp32', 'fp16', 'bf16', 'fp8' or 'int8', got type",
        lambda: linalg.rounding_error(X, np.float16),  # type: ignore[arg-type]
    ),
    (
        DTypeError,
        "codes: expected int8 or uint8, got int64",
        lambda: linalg.dequantize([[1]], [1.0]),
    ),
    (
        ShapeError,
        "scale: expected a shape that broadcasts to (2, 3), got (2,)",
        lambda: linalg.dequantize(np.zeros((2, 3), np.int8), np.ones(2)),
    ),
    (
        ShapeError,
        "scale: expected a shape that broadcasts to (3,), got (2, 1)",
        lambda: linalg.dequantize(np.zeros(3, np.int8), np.ones((2, 1))),
    ),
]


@pytest.mark.parametrize(("kind", "message", "call"), WRONG, ids=[message for _, message, _ in WRONG])
def test_errors(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind and str(caught.value) == message


def test_public_names() -> None:
    assert adaattn.linalg is linalg
    functions = [getattr(linalg, name) for name in linalg.__all__]
    assert len(functions) == 14 and all(function.__doc__ for function in functions)


def test_other_layouts_and_byte_orders(rng: Any) -> None:
    a = rng.standard_normal((6, 8)).astype(F32)
    for same in (np.asfortranarray(a), a[::-1, ::-1].copy()[::-1, ::-1], a.astype(">f4"), a.tolist()):
        np.testing.assert_allclose(linalg.spectral_norm(same), np.linalg.norm(a, 2), rtol=1e-5)
        np.testing.assert_allclose(linalg.stable_softmax(same), linalg.stable_softmax(a), rtol=1e-5)
        assert linalg.stable_softmax(same).dtype.isnative
