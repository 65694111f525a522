"""The meaning of every option: the table of cases on every shape and dtype against the oracle, then what can
be said without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import (
    BF16,
    CASES,
    DTYPES,
    F16,
    F32,
    F64,
    SHAPES,
    Array,
    OptionsOf,
    Shape,
    check,
    inputs,
    same_bits,
)

import adaattn

pytestmark = pytest.mark.isa_sample


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options_of", CASES.values(), ids=CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_case(shape: Shape, options_of: OptionsOf, dtype: Any, rng: np.random.Generator) -> None:
    check(*inputs(rng, shape, dtype), **options_of(rng, shape))


def weights(rng: np.random.Generator, T: int, S: int, H: int = 1, B: int = 1, **options: Any) -> Array:
    """The probabilities themselves, (B, H, T, S): attention over values that are the unit matrix."""
    query, key, _ = inputs(rng, Shape(B, H, H, T, S, 8, 1), F64)
    unit = np.broadcast_to(np.eye(S), (B, H, S, S))
    return adaattn.attention(query, key, unit, **options)


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({"causal": True}, 0, 1),
        ({"causal": "upper_left"}, 0, 0),
        ({"causal": True, "query_offset": 4}, 0, 4),
        ({"window": (1, 1)}, 0, 2),
        ({"window": (0, 2), "causal": "upper_left"}, 0, 0),
        ({"window": (0, None), "query_offset": 5}, 5, 9),
        ({"kv_lengths": np.array([6])}, 0, 5),
        ({"kv_lengths": np.array([1]), "causal": True}, 0, 0),
    ],
    ids=str,
)
def test_keys_seen_by_the_first_query(options: Any, first: int, last: int, rng: np.random.Generator) -> None:
    seen = np.flatnonzero(weights(rng, 9, 10, **options)[0, 0, 0])
    assert (seen[0], seen[-1], len(seen)) == (first, last, last - first + 1)


@pytest.mark.parametrize("causal", [True, "lower_right"])
def test_more_queries_than_keys(causal: Any, rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, Shape(1, 1, 1, 70, 3, 8, 8))
    out, lse = adaattn.attention(query, key, value, causal=causal, return_lse=True)
    assert not out[:, :, :67].any() and (lse[:, :, :67] == -np.inf).all()
    assert same_bits(out[0, 0, 67], value[0, 0, 0])


def test_window_reaches_beyond_every_integer(rng: np.random.Generator) -> None:
    arrays = inputs(rng, Shape(1, 1, 1, 20, 20, 8, 8))
    huge = adaattn.attention(*arrays, window=(2**63 - 1, 2**63 - 1))
    assert same_bits(huge, adaattn.attention(*arrays))


def test_names_of_causal_are_synonyms(rng: np.random.Generator) -> None:
    arrays = inputs(rng, Shape(1, 1, 1, 20, 30, 8, 8))
    assert same_bits(
        adaattn.attention(*arrays, causal=True), adaattn.attention(*arrays, causal="lower_right")
    )
    assert same_bits(adaattn.attention(*arrays), adaattn.attention(*arrays, causal=False))


def test_right_padded_prefill(rng: np.random.Generator) -> None:
    """Lengths do not move the diagonal: the rows before the padding are those of the sequence alone."""
    query, key, value = inputs(rng, Shape(2, 2, 2, 40, 40, 16, 16))
    lengths = np.array([40, 13])
    out = adaattn.attention(query, key, value, causal=True, kv_lengths=lengths)
    alone = adaattn.attention(*(x[1:, :, :13] for x in (query, key, value)), causal=True)
    np.testing.assert_allclose(out[1:, :, :13], alone, rtol=1e-5, atol=1e-6)


def test_grouped_heads_share_keys(rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, Shape(2, 6, 2, 30, 40, 16, 16))
    grouped = adaattn.attention(query, key, value)
    repeated = adaattn.attention(query, key.repeat(3, axis=1), value.repeat(3, axis=1))
    assert same_bits(grouped, repeated)


def test_alibi_is_symmetric_around_the_query(rng: np.random.Generator) -> None:
    ones = np.ones((1, 1, 9, 4))
    p = adaattn.attention(ones, ones, np.eye(9)[None, None], alibi_slopes=np.array([0.5]))[0, 0]
    distance = np.abs(np.arange(9)[:, None] - np.arange(9))
    np.testing.assert_allclose(p / p.diagonal()[:, None], np.exp(-0.5 * distance), rtol=1e-12)


def test_sink_takes_mass_and_gives_no_value(rng: np.random.Generator) -> None:
    arrays = inputs(rng, Shape(1, 2, 2, 10, 12, 8, 8), F64)
    sinks = np.array([-1.0, 2.0])
    out, lse = adaattn.attention(*arrays, return_lse=True)
    with_sink, lse_with_sink = adaattn.attention(*arrays, sinks=sinks, softcap=None, return_lse=True)
    np.testing.assert_allclose(lse_with_sink, np.logaddexp(lse, sinks[:, None]), rtol=1e-13)
    np.testing.assert_allclose(with_sink, out * np.exp(lse - lse_with_sink)[..., None], rtol=1e-12)


class TestDropout:
    """Probabilities read through unit values; T and S span several tiles."""

    T, S = 70, 150

    def weights(self, **options: Any) -> Array:
        return weights(np.random.default_rng(0), self.T, self.S, 2, 3, **options)

    @pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
    def test_share_and_scale(self, p: float) -> None:
        full, dropped = self.weights(), self.weights(dropout_p=p, seed=1)
        kept = dropped != 0
        assert abs(kept.mean() - (1 - p)) < 4 * np.sqrt(p * (1 - p) / kept.size)
        np.testing.assert_allclose(dropped[kept], full[kept] / (1 - p), rtol=1e-12)

    def test_none_at_zero(self) -> None:
        assert same_bits(self.weights(), self.weights(dropout_p=0.0, seed=3))

    def test_pattern_depends_on_sequence_head_and_seed(self) -> None:
        kept = self.weights(dropout_p=0.5, seed=1) != 0
        patterns = {kept[b, h].tobytes() for b in range(3) for h in range(2)}
        patterns.add((self.weights(dropout_p=0.5, seed=2) != 0)[0, 0].tobytes())
        assert len(patterns) == 7

    def test_seeds_of_sequences_are_not_mixed(self) -> None:
        kept = self.weights(dropout_p=0.5, seed=np.array([5, 6, 5])) != 0
        assert same_bits(kept[0], kept[2]) and not same_bits(kept[0], kept[1])

    @pytest.mark.parametrize("alias", [5 - 2**64, 5 + 2**64])
    def test_seeds_are_taken_modulo_2_to_64(self, alias: int) -> None:
        assert same_bits(self.weights(dropout_p=0.5, seed=5), self.weights(dropout_p=0.5, seed=alias))

    def test_pattern_does_not_depend_on_what_is_visible(self) -> None:
        kept = self.weights(dropout_p=0.5, seed=1) != 0
        windowed = self.weights(dropout_p=0.5, seed=1, window=(20, 10))
        visible = self.weights(window=(20, 10)) != 0
        assert same_bits(windowed != 0, kept & visible)

    def test_lse_is_that_of_all_probabilities(self, rng: np.random.Generator) -> None:
        arrays = inputs(rng, SHAPES[4])
        _, lse = adaattn.attention(*arrays, return_lse=True)
        _, dropped = adaattn.attention(*arrays, return_lse=True, dropout_p=0.5, seed=1)
        assert same_bits(lse, dropped)


class TestOut:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x,
            lambda x: x[:, :, ::-1, ::-1],
            lambda x: np.repeat(np.zeros_like(x), 2, axis=3)[..., ::2],
            lambda x: np.zeros_like(x.swapaxes(1, 2), order="C").swapaxes(1, 2),
            np.asfortranarray,
        ],
        ids=["contiguous", "reversed", "gapped", "(B, T, H, E)", "fortran"],
    )
    def test_written_in_place(self, view: Any, dtype: Any, rng: np.random.Generator) -> None:
        arrays = inputs(rng, SHAPES[5], dtype)
        expected = adaattn.attention(*arrays, causal=True)
        out = view(np.zeros_like(expected))
        assert adaattn.attention(*arrays, causal=True, out=out) is out
        assert same_bits(out, expected)

    def test_with_lse(self, rng: np.random.Generator) -> None:
        arrays = inputs(rng, SHAPES[5])
        expected = adaattn.attention(*arrays, return_lse=True)
        out = np.full_like(expected[0], np.nan)
        result = adaattn.attention(*arrays, return_lse=True, out=out)
        assert result[0] is out and same_bits(result, expected)

    def test_nothing_around_it_is_touched(self, rng: np.random.Generator) -> None:
        arrays = inputs(rng, SHAPES[5])
        B, H, _, T, _, _, E = SHAPES[5]
        frame = np.full((B + 2, H + 2, T + 2, E + 2), 5, F32)
        adaattn.attention(*arrays, out=frame[1:-1, 1:-1, 1:-1, 1:-1])
        frame[1:-1, 1:-1, 1:-1, 1:-1] = 5
        assert (frame == 5).all()


class TestMerge:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cut", [1, 50, 99])
    def test_two_sets_of_keys(self, dtype: Any, cut: int, rng: np.random.Generator) -> None:
        query, key, value = inputs(rng, Shape(2, 4, 2, 30, 100, 16, 24), dtype)
        sinks = np.array([0.5, -1.0, 2.0, 0.0])
        whole = adaattn.attention(query, key, value, sinks=sinks, return_lse=True)
        near = adaattn.attention(query, key[:, :, :cut], value[:, :, :cut], sinks=sinks, return_lse=True)
        far = adaattn.attention(query, key[:, :, cut:], value[:, :, cut:], return_lse=True)
        for merged in (adaattn.merge(*near, *far), adaattn.merge(*far, *near)):
            eps = {F64: 1e-14, F32: 2e-6, F16: 3e-3, BF16: 2e-2}[np.dtype(dtype)]
            assert [x.dtype for x in merged] == [x.dtype for x in whole]
            np.testing.assert_allclose(merged[0].astype(F64), whole[0].astype(F64), rtol=eps, atol=eps)
            np.testing.assert_allclose(merged[1], whole[1], rtol=min(eps, 1e-6), atol=min(eps, 1e-6))

    def test_a_side_without_keys_changes_nothing(self, rng: np.random.Generator) -> None:
        side = adaattn.attention(*inputs(rng, SHAPES[4]), return_lse=True)
        empty = np.zeros_like(side[0]), np.full_like(side[1], -np.inf)
        assert same_bits(adaattn.merge(*side, *empty), side)
        assert same_bits(adaattn.merge(*empty, *side), side)
        assert same_bits(adaattn.merge(*empty, *empty), empty)

    def test_far_apart(self) -> None:
        """One side outweighs the other beyond the range of exp."""
        one, two = np.ones((1, 1, 1, 4), F32), np.full((1, 1, 1, 4), 2, F32)
        high, low = np.full((1, 1, 1), 300, F32), np.full((1, 1, 1), -300, F32)
        assert same_bits(adaattn.merge(one, high, two, low), (one, high))

    def test_inputs_stay_and_views_are_read(self, rng: np.random.Generator) -> None:
        side = adaattn.attention(*inputs(rng, SHAPES[5]), return_lse=True)
        flipped = tuple(x[:, :, ::-1].copy()[:, :, ::-1] for x in side)
        copies = [x.copy() for x in side]
        assert same_bits(adaattn.merge(*flipped, *flipped), adaattn.merge(*side, *side))
        assert same_bits(side, tuple(copies))


class TestThreads:
    @pytest.fixture(autouse=True)
    def restore(self) -> Any:
        before = adaattn.get_num_threads()
        yield
        adaattn.set_num_threads(before)

    def test_set_and_get(self) -> None:
        adaattn.set_num_threads(3)
        assert adaattn.get_num_threads() == 3
        assert adaattn.cpu_info()["num_threads"] == 3


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_precision_is_what_computes(precision: str, rng: np.random.Generator) -> None:
    """fp64 rounds once, at the end; fp32 shows its own rounding whatever the arrays hold."""
    arrays = inputs(rng, Shape(1, 2, 2, 100, 300, 64, 64), F64 if precision == "fp32" else F32, spread=3)
    out = adaattn.attention(*arrays, precision=precision)
    exact = adaattn.reference.attention(*arrays)
    error = np.abs(out - exact).max() / np.abs(exact).max()
    if precision == "fp32":
        assert 1e-9 < error < 1e-4
    else:
        assert same_bits(out, exact.astype(F32))


@pytest.mark.parametrize("shape", SHAPES[4:6], ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_half_dtypes_accumulate_in_fp32(shape: Shape, dtype: Any, rng: np.random.Generator) -> None:
    """Nothing but the result is rounded: the bits are those of fp32 arrays of the same values, rounded."""
    arrays = inputs(rng, shape, dtype)
    wide = adaattn.attention(*(x.astype(F32) for x in arrays), causal=True)
    assert same_bits(adaattn.attention(*arrays, causal=True), wide.astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("options", [{}, {"tolerance": 1e-2}, {"causal": True, "sinks": [1.0, 2.0]}], ids=str)
def test_everything_dropped(dtype: Any, options: dict[str, Any]) -> None:
    """As torch has it: zeros, and the lse of what was dropped."""
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 2, 130, 8)).astype(dtype)
    out, lse = adaattn.attention(query, key, value, dropout_p=1, seed=3, return_lse=True, **options)
    assert not out.any() and np.array_equal(
        lse, adaattn.attention(query, key, value, return_lse=True, dropout_p=0.5, seed=3, **options)[1]
    )
    assert not adaattn.reference.attention(query, key, value, dropout_p=1, seed=3, **options).any()
    options.pop("tolerance", None)
    gradients = adaattn.attention_backward(
        np.ones_like(out), query, key, value, out, lse, dropout_p=1, seed=3, **options
    )
    assert not any(x.any() for x in gradients if x is not None)
    single = adaattn.attention(query[:, :, :1], key, value, dropout_p=1.0, seed=[3])
    assert not single.any()
