"""Attention on a long cache within a tolerance: a part is read, and what it may be off by is bounded."""

from __future__ import annotations

import threading
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from support import F32, F64, Array, same_bits

import adaattn
from adaattn import KVCache, reference

pytestmark = pytest.mark.isa_sample

S = 2176 + 37  # some pages, and one that is open


def made(key: Array, value: Array, lengths: Any = None) -> KVCache:
    cache = KVCache(key.shape[0], key.shape[1], key.shape[3], value.shape[3])
    cache.append(key, value, lengths)
    return cache


def peaked(rng: np.random.Generator, B: int, G: int, D: int, E: int, n: int = S) -> tuple[Array, Array]:
    """Keys of which a few matter to a query of ones, in pages of their own."""
    key, value = rng.standard_normal((B, G, n, D), F32), rng.standard_normal((B, G, n, E), F32)
    key[:, :, n // 2 : n // 2 + 40] += 1.5
    return key, value


def errors(cache: KVCache, query: Array, **options: Any) -> tuple[Array, Any, Array, Array]:
    """Output and report, relative errors of the heads, and errors of the lse, against the oracle."""
    out, lse, report = cache.attention(query, **options, return_lse=True, return_report=True)
    for name in ("tolerance", "num_threads"):
        options.pop(name, None)
    T, n = query.shape[2], int(cache.lengths.max())
    exact, exact_lse = reference.attention(
        query,
        cache._key[1][:, :, :n],
        cache._value[1][:, :, :n],
        **{"causal": True} | options,
        kv_lengths=cache.lengths,
        query_offset=cache.lengths - T,
        return_lse=True,
    )
    norm = np.linalg.norm(exact, axis=(2, 3))
    error = np.linalg.norm(out.astype(F64) - exact, axis=(2, 3))
    with np.errstate(invalid="ignore"):
        off = np.abs(np.where(lse == exact_lse, 0, lse - exact_lse))
    return out, report, np.divide(error, norm, out=np.where(error > 0, np.inf, 0.0), where=norm > 0), off


def test_codes_and_their_norms(rng: np.random.Generator) -> None:
    """What stands for a page, decoded here, is as near as its norms say."""
    D, E = 37, 24
    key, value = peaked(rng, 2, 2, D, E)
    key *= np.geomspace(1e-3, 1e3, D, dtype=F32)
    cache = made(key, value, [S, 2100])
    cache.attention(np.ones((2, 2, 1, D), F32), tolerance=1e-2)
    assert cache._codes is not None
    for side, (x, codes) in enumerate(zip((key, value), cache._codes, strict=True)):
        width = x.shape[3]
        np.testing.assert_array_equal(codes.coded, [34, 32])
        for b, g, page in ((0, 0, 0), (0, 1, 33), (1, 0, 31)):
            exact = x[b, g, page * 64 : page * 64 + 64].astype(F64)
            centre, scale = codes.centre[b, g, page].astype(F64), codes.scale[b, g, page].astype(F64)
            planes = []
            for plane in (codes.code, codes.fine):
                steps = plane[b, g, page].astype(F64) - 128
                lanes = steps.size // 64 if side else 64
                numbers, rows = steps.size // lanes, []
                for first in range(0, lanes, 32):  # chunks of lanes
                    wide = min(lanes - first, 32)
                    chunk = steps[first * numbers : (first + wide) * numbers].reshape(-1, wide, 4)
                    rows.append(chunk.transpose(1, 0, 2).reshape(wide, numbers))
                steps = np.concatenate(rows)  # (lanes, numbers)
                planes.append((steps.T if side else steps)[:, :width])
            norms = codes.norms[b, g, page]
            coarse = centre + planes[0] * scale
            fine = coarse + planes[1] * scale / 254
            for i, y in enumerate((coarse, fine)):
                rest = np.linalg.norm(exact - y, 2)
                assert rest <= norms[i] <= 1.75 * rest + 1e-30
                longest = np.linalg.norm(exact - y, axis=1).max()
                assert longest <= norms[2 + i] <= 1.01 * longest
            assert (np.abs(exact - fine) <= scale / 254 / 2 * 1.001 + 1e-6 * np.abs(exact)).all()
            assert np.linalg.norm(exact - centre, 2) <= norms[4] <= 1.75 * np.linalg.norm(exact - centre, 2)
            assert np.linalg.norm(exact, axis=1).max() <= norms[5]
            np.testing.assert_allclose(centre, exact.mean(axis=0), rtol=1e-5, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("tolerance", [8e-3, 2e-2, 5e-2])
def test_a_part_is_read_and_the_bound_holds(tolerance: float, rng: np.random.Generator) -> None:
    key, value = peaked(rng, 1, 2, 64, 64)
    cache = made(key, value)
    query = np.ones((1, 4, 1, 64), F32) + 0.1 * rng.standard_normal((1, 4, 1, 64), F32)
    out, report, error, lse = errors(cache, query, tolerance=tolerance)
    assert (error <= report.error_bound).all() and (report.error_bound <= tolerance).all()
    assert (lse <= tolerance).all()
    assert (report.structure == "sparse").all() and (report.verified_rows == 0).all()
    assert (report.kept_fraction < 0.3).all() and (report.kept_fraction > 0.1).all()
    for threads in (1, 2, 5):
        again = cache.attention(query, tolerance=tolerance, num_threads=threads, return_lse=True)[0]
        assert same_bits(again, out)


OPTIONS: dict[str, Any] = {
    "window": st.sampled_from([None, (1500, None), (70, 3), (2000, 1000)]),
    "softcap": st.sampled_from([None, 3.0, 30.0]),
    "causal": st.booleans(),
    "scale": st.sampled_from([None, 0.5]),
}


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 2, 3, 3, 40, 40))),
    seed=st.integers(0, 2**32 - 1),
    tolerance=st.sampled_from([8e-3, 1e-2, 2e-2, 5e-2, 0.3]),
    kind=st.sampled_from(["normal", "tails", "twins", "cancel", "shifted", "range", "zero", "tie"]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    more=st.sets(st.sampled_from(["slopes", "sinks", "mask", "bias"])),
    options=st.fixed_dictionaries(OPTIONS),
)
def test_bounds_are_never_exceeded(
    sizes: tuple[int, ...],
    seed: int,
    tolerance: float,
    kind: str,
    spread: float,
    more: set[str],
    options: dict[str, Any],
) -> None:
    rng = np.random.default_rng(seed)
    B, G, group, T, D, E = sizes
    H = G * group
    key, value = rng.standard_normal((B, G, S, D), F32), rng.standard_normal((B, G, S, E), F32)
    query = spread * rng.standard_normal((B, H, T, D), F32)
    if kind == "tails":
        key, value = (rng.standard_t(1.5, x.shape).astype(F32) for x in (key, value))
    elif kind == "twins":
        key[:] = key[:, :, rng.integers(0, 9, S)]
    elif kind == "cancel":
        value[:, :, 1::2] = -value[:, :, :-1:2]
        key[:, :, 1::2] = key[:, :, :-1:2]
    elif kind == "shifted":
        key += 100 * rng.standard_normal(D).astype(F32)
        value += 30
    elif kind == "range":
        value *= 10 ** rng.uniform(-6, 6, (S, 1)).astype(F32)
    elif kind == "zero":
        value[:, :, : S // 2] = 0
        key[:, :, ::3] = 0
    elif kind == "tie":
        key[:, :, S // 3], key[:, :, S // 2] = query[:, ::group, 0], query[:, ::group, 0] * 1.0001
    if "slopes" in more:
        options["alibi_slopes"] = rng.uniform(0, 0.02, H)
    if "sinks" in more:
        options["sinks"] = rng.standard_normal(H) * 3
    lengths = rng.integers(2112, S + 1, B)
    lengths[0] = S
    cache = made(key, value, lengths)
    if "mask" in more:
        options["attn_mask"] = rng.random((1, 1, T, S)) < 0.7
    elif "bias" in more:
        options["attn_mask"] = rng.standard_normal((B, 1, T, S), F32)
    out, report, error, lse = errors(cache, query, tolerance=tolerance, **options)
    known = ~np.isnan(report.error_bound)
    assert (error[known] <= report.error_bound[known]).all()
    assert (report.error_bound[known] <= tolerance).all()
    assert (lse[known] <= tolerance).all()
    # The others are computed as if there were no codes.
    options |= {"structure": "dense", "return_report": True}
    dense, told = cache.attention(query, tolerance=tolerance, **options)
    assert same_bits(out[~known], dense[~known])
    np.testing.assert_array_equal(report.precision_qk[~known], told.precision_qk[~known])


def test_a_head_depends_on_itself_alone(rng: np.random.Generator) -> None:
    key, value = peaked(rng, 3, 2, 16, 16)
    key[1, 0] *= 30
    lengths = [S, 2150, 2300 - 100]
    query = 2 + 0.1 * rng.standard_normal((3, 4, 2, 16), F32)
    out, report = made(key, value, lengths).attention(query, tolerance=2e-2, return_report=True)
    known = ~np.isnan(report.error_bound)
    assert known.any() and not known.all()
    for b, n in enumerate(lengths):
        alone = made(key[b : b + 1], value[b : b + 1], [n])
        one, told = alone.attention(query[b : b + 1], tolerance=2e-2, return_report=True)
        assert same_bits(one, out[b : b + 1])
        np.testing.assert_array_equal(told.error_bound[0], report.error_bound[b])
        np.testing.assert_array_equal(told.kept_fraction[0], report.kept_fraction[b])


def test_codes_follow_the_tokens(rng: np.random.Generator) -> None:
    """Appending, growing, truncating and reordering leave the cache as one that was filled at once."""
    key, value = peaked(rng, 2, 1, 16, 8, 2 * S)
    key[:, :, 500:540] += 1.5
    query = 2 + 0.1 * rng.standard_normal((2, 2, 1, 16), F32)

    def answer(cache: KVCache, q: Array = query) -> Any:
        return cache.attention(q, tolerance=2e-2, return_lse=True)

    cache = made(key[:, :, :2048], value[:, :, :2048])
    answer(cache)
    for n in (2048, 2100, 2600):  # the last one grows it
        cache.append(key[:, :, cache.lengths[0] : n + 64], value[:, :, cache.lengths[0] : n + 64])
        expected = answer(made(key[:, :, : n + 64], value[:, :, : n + 64]))
        assert all(map(same_bits, answer(cache), expected))
    cache.truncate([2200, 2100])
    cache.append(key[:, :, 3000:3200], value[:, :, 3000:3200])
    other = made(key[:, :, :2200], value[:, :, :2200], [2200, 2100])
    other.append(key[:, :, 3000:3200], value[:, :, 3000:3200])
    assert all(map(same_bits, answer(cache), answer(other)))
    cache.reorder([1, 1, 0])
    chosen = answer(cache, query[[1, 1, 0]])
    assert all(same_bits(x, y[[1, 1, 0]]) for x, y in zip(chosen, answer(other), strict=True))
    report = other.attention(query, tolerance=2e-2, return_report=True)[1]
    assert (report.error_bound <= 2e-2).all()
    before = cache.lengths.copy()
    cache.append(key[[1, 1, 0], :, :100], value[[1, 1, 0], :, :100])
    other.append(key[:, :, :100], value[:, :, :100])
    assert (cache.lengths == before + 100).all()
    both = zip(answer(cache, query[[1, 1, 0]]), answer(other), strict=True)
    assert all(same_bits(x, y[[1, 1, 0]]) for x, y in both)


def test_codes_are_counted_and_made_on_demand(rng: np.random.Generator) -> None:
    key, value = peaked(rng, 1, 1, 64, 64)
    cache = made(key, value)
    plain = cache.nbytes
    cache.attention(key[:, :, :1])
    cache.attention(key[:, :, :1], tolerance=7e-3)
    cache.attention(key[:, :, :1], precision="fp32", tolerance=1e-2)
    assert cache.nbytes == plain
    cache.attention(key[:, :, :1], tolerance=1e-2)
    assert 1.5 * plain < cache.nbytes < 1.6 * plain
    for dtype in ("bf16", "fp16", "int8"):
        narrow = KVCache(1, 1, 64, dtype=dtype)
        narrow.append(key, value)
        report = narrow.attention(key[:, :, :1], tolerance=5e-2, return_report=True)[1]
        assert np.isnan(report.error_bound).all() and (report.structure == "dense").all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_has_no_codes_is_computed_without(bad: float, rng: np.random.Generator) -> None:
    key, value = peaked(rng, 1, 2, 16, 16)
    query = 2 + 0.1 * rng.standard_normal((1, 2, 1, 16), F32)
    expected = made(key, value).attention(query, tolerance=2e-2)
    value[0, 1, 700, 3] = bad
    cache = made(key, value)
    out, report = cache.attention(query, tolerance=2e-2, return_report=True)
    np.testing.assert_array_equal(np.isnan(report.error_bound), [[False, True]])
    assert cache._codes is not None and np.isinf(cache._codes[1].norms[0, 1, 700 // 64]).all()
    assert same_bits(out[:, :1], expected[:, :1])
    plain = adaattn.attention(query, key, value, causal=True, tolerance=2e-2)
    np.testing.assert_allclose(out[:, 1], plain[:, 1], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("token", [700, S - 3], ids=["coded", "open page"])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_what_is_not_finite_is_never_hidden(
    where: str, token: int, bad: float, rng: np.random.Generator
) -> None:
    """It has no bound, and the outputs that it reaches are those of a call without codes."""
    key, value = peaked(rng, 1, 2, 16, 16)
    query = 2 + 0.1 * rng.standard_normal((1, 4, 1, 16), F32)
    {"query": query[0, 2, 0], "key": key[0, 1, token], "value": value[0, 1, token]}[where][3] = bad
    cache = made(key, value)
    out, lse, report = cache.attention(query, tolerance=2e-2, return_lse=True, return_report=True)
    dense = cache.attention(query, tolerance=2e-2, return_lse=True, structure="dense")
    np.testing.assert_array_equal(np.isnan(report.error_bound), [[False, False, True, True]])
    assert same_bits(out[:, 2:], dense[0][:, 2:]) and same_bits(lse[:, 2:], dense[1][:, 2:])
    assert np.isfinite(out[:, :2]).all() and not np.isfinite(out[:, 2]).all()


def test_values_beyond_what_codes_hold(rng: np.random.Generator) -> None:
    """In the open page: the distance of centres from an output that they make is not lost."""
    key, value = peaked(rng, 1, 1, 16, 16)
    value = (1e12 * (1 + 0.1 * value)).astype(F32)
    key[0, 0, -1], value[0, 0, -1] = 1.5, 1e30
    _, report, error, _ = errors(made(key, value), np.ones((1, 1, 1, 16), F32), tolerance=5e-2)
    assert np.isnan(report.error_bound) or error <= report.error_bound


def test_no_memory(rng: np.random.Generator) -> None:
    key, value = peaked(rng, 1, 1, 16, 16)
    cache, raised = made(key, value), []

    def call() -> None:
        adaattn._adaattn._alloc_fail_after(0)
        try:
            cache.attention(key[:, :, :8], tolerance=1e-2)
        except MemoryError as error:
            raised.append(str(error))
        finally:
            adaattn._adaattn._alloc_fail_after(-1)

    for _ in range(2):  # while codes are made, and where they are read; a new thread has no memory yet
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        cache.attention(key[:, :, :8], tolerance=1e-2)
    assert len(raised) == 2 and all("scratch" in message for message in raised)
    assert np.isfinite(cache.attention(key[:, :, :8], tolerance=1e-2)).all()
