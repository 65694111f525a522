"""KVCache against the oracle on what it stores, and against a plain model of its operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from support import BF16, F16, F32, F64, Array, Options, assert_near, largest, same_bits, score_size

import adaattn
from adaattn import ArgumentError, DTypeError, KVCache, ShapeError, reference

pytestmark = pytest.mark.isa_sample

KINDS = {"fp32": F32, "fp16": F16, "bf16": BF16, "int8": None}
PAGE = 64


def tokens(rng: np.random.Generator, cache_sizes: tuple[int, int, int, int], n: int) -> tuple[Array, Array]:
    """Keys and values around means of their own, so that centring matters."""
    B, G, D, E = cache_sizes
    key = rng.standard_normal((B, G, n, D)) + 2 * rng.standard_normal((G, 1, D))
    value = rng.standard_normal((B, G, n, E)) + 3 * rng.standard_normal((G, 1, E))
    return key.astype(F32), value.astype(F32)


def codes(data: Array, values: bool, width: int) -> Array:
    """The numbers of pages, (B, G, tokens, width), one by one from where they lie."""
    B, G, tokens, padded = data.shape
    pages = data.reshape(B, G, tokens // PAGE, PAGE * padded)
    result = np.empty((B, G, tokens // PAGE, PAGE, width), F64)
    for lane in range(width if values else PAGE):
        first = lane // 32 * 32
        wide = min((padded if values else PAGE) - first, 32)
        for i in range(PAGE if values else width):
            at = first * (PAGE if values else padded) + 4 * (i // 4 * wide + lane - first) + i % 4
            result[..., i if values else lane, lane if values else i] = pages[..., at] - 128.0
    return result.reshape(B, G, tokens, width)


def content(cache: KVCache) -> tuple[Array, Array]:
    """What a cache holds, decoded here: (B, G, S, D) and (B, G, S, E) in float64."""
    sides = []
    for kind, data, *pages in (cache._key, cache._value):
        S = max(1, int(cache.lengths.max()))
        x = (data.view(ml_dtypes.bfloat16) if kind == "bf16" else data)[:, :, :S].astype(F64)
        if kind.startswith("int8"):
            scale, mean, open_, number = pages[:4]
            x = codes(data, kind == "int8 values", mean.shape[3])[:, :, :S]
            x *= np.repeat(scale.astype(F64), PAGE, axis=2)[:, :, :S, None]
            x += np.repeat(mean.view(ml_dtypes.bfloat16).astype(F64), PAGE, axis=2)[:, :, :S]
            for b, length in enumerate(cache.lengths):
                assert number[b] == length // PAGE
                x[b, :, length // PAGE * PAGE : length] = open_[b, :, : length % PAGE]
        sides.append(x)
    return sides[0], sides[1]


def check(cache: KVCache, query: Array, **options: Any) -> None:
    """The cache's attention against the oracle on its content, within the rounding of the computation."""
    key, value = content(cache)
    out, lse = cache.attention(query, **options, return_lse=True)
    assert out.dtype == query.dtype and lse.dtype == (F64 if query.dtype == F64 else F32)
    options = {"causal": True} | options
    placed = {"kv_lengths": cache.lengths, "query_offset": cache.lengths - query.shape[2]}
    exact, exact_lse = reference.attention(query, key, value, **options, **placed, return_lse=True)
    unit = 2.0**-53 if query.dtype == F64 else 2.0**-24
    # Codes and mean of a page are multiplied apart: each is at most twice as large as a token.
    error = unit * (16 + 4 * score_size(query, key, options | placed)) * (3 if cache.dtype == "int8" else 1)
    rounding = float(ml_dtypes.finfo(query.dtype).eps) / 2
    kept = 1 - options.get("dropout_p", 0.0)
    assert_near(out, exact, error * largest(value) / kept, rounding)
    assert_near(lse, exact_lse, error, float(np.finfo(lse.dtype).eps))


def filled(
    rng: np.random.Generator, dtype: str, lengths: list[int], G: int = 2, D: int = 40, E: int = 24
) -> tuple[KVCache, Array, Array]:
    cache = KVCache(len(lengths), G, D, E, dtype=dtype)
    key, value = tokens(rng, (len(lengths), G, D, E), max(lengths))
    cache.append(key, value, lengths)
    return cache, key, value


# ---- what is stored


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("given", [F32, F16, BF16, F64], ids=str)
def test_floats_are_rounded_once(given: Any, dtype: str, rng: np.random.Generator) -> None:
    cache = KVCache(2, 3, 300, 5, dtype=dtype)
    key, value = (x.astype(given) for x in tokens(rng, (2, 3, 300, 5), 70))
    cache.append(key, value)
    # float64 goes to the half formats by way of float32, as everywhere in the library.
    for x, kept in zip((key, value), content(cache), strict=True):
        np.testing.assert_array_equal(kept, x.astype(F32).astype(KINDS[dtype]).astype(F64))


def test_pages_of_int8(rng: np.random.Generator) -> None:
    cache, key, value = filled(rng, "int8", [200, 64, 63])
    for side, x, kept in zip((cache._key, cache._value), (key, value), content(cache), strict=True):
        for b, length in enumerate([200, 64, 63]):
            full = length // PAGE * PAGE
            np.testing.assert_array_equal(kept[b, :, full:length], x[b, :, full:length])
            for page in range(length // PAGE):
                rows = slice(page * PAGE, (page + 1) * PAGE)
                centre = x[b, :, rows].astype(F64).mean(axis=1, keepdims=True).astype(BF16).astype(F64)
                spread = np.abs(x[b, :, rows] - centre).max(axis=(1, 2))
                np.testing.assert_allclose(side[2][b, :, page], spread / 127, rtol=1e-6)
                error = np.abs(kept[b, :, rows] - x[b, :, rows])
                assert (error <= spread[:, None, None] / 254 * (1 + 1e-5)).all()
                numbers = codes(side[1], side[0] == "int8 values", x.shape[3])
                assert np.abs(numbers[b, :, rows]).max() == 127


@pytest.mark.parametrize("value", [0.0, 3.25, -1e-45, 3e38], ids=str)
def test_pages_of_one_number(value: float, rng: np.random.Generator) -> None:
    cache = KVCache(1, 1, 16, dtype="int8")
    x = np.full((1, 1, 64, 16), value, F32)
    x[0, 0, :, 1:] *= rng.choice([-1, 1], (64, 15))
    cache.append(x, x)
    kept = content(cache)[0]
    assert np.isfinite(kept).all()
    assert np.abs(kept - x).max() <= 2 * abs(value) / 254 * (1 + 1e-5) + 2e-45
    assert np.isfinite(cache.attention(x[:, :, :1])).all()


def test_memory() -> None:
    B, G, D, E = 2, 3, 128, 64
    for dtype, width in {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}.items():
        cache = KVCache(B, G, D, E, capacity=1000, dtype=dtype)
        assert cache.capacity == 1024
        pages = 16 * (2 * (D + E) + 2 * 4) + PAGE * 4 * (D + E) if dtype == "int8" else 0
        numbers = 2 * 8 * B if dtype == "int8" else 0
        figures = 4 * (10 + 1024 // 512) * (2 * (D + E) + 2)
        assert cache.nbytes == B * G * (1024 * width * (D + E) + pages + figures) + numbers


@pytest.mark.parametrize("dtype", KINDS)
def test_tokens_begin_with_a_cache_line(dtype: str) -> None:
    cache = KVCache(2, 1, 48, dtype=dtype)
    grow = partial(cache.append, *np.ones((2, 2, 1, 70, 48), F32))
    for change in (lambda: None, grow, partial(cache.reorder, [1])):
        change()
        assert all(side[1].ctypes.data % 64 == 0 for side in (cache._key, cache._value))


def test_growth_keeps_everything(rng: np.random.Generator) -> None:
    for dtype in KINDS:
        cache, _, _ = filled(rng, dtype, [63, 20])
        assert cache.capacity == 64
        before = content(cache)
        for n, capacity in ((1, 64), (1, 128), (70, 256), (800, 1024)):
            old = cache.lengths
            cache.append(*tokens(rng, (2, 2, 40, 24), n), lengths=[n, n // 2])
            assert cache.capacity == capacity
            for x, y in zip(before, content(cache), strict=True):
                np.testing.assert_array_equal(x[1, :, :20], y[1, :, :20] if dtype != "int8" else x[1, :, :20])
                if dtype != "int8":
                    np.testing.assert_array_equal(x[0, :, : old[0]], y[0, :, : old[0]])
            before = content(cache)
            check(cache, rng.standard_normal((2, 4, 3, 40)).astype(F32))
        assert cache.lengths.tolist() == [63 + 872, 20 + 435]


@pytest.mark.parametrize("dtype", KINDS)
def test_one_by_one_or_at_once(dtype: str, rng: np.random.Generator) -> None:
    cache, key, value = filled(rng, dtype, [150, 150])
    single = KVCache(2, 2, 40, 24, dtype=dtype)
    for i in range(150):
        single.append(key[:, :, i : i + 1], value[:, :, i : i + 1])
    assert all(map(same_bits, content(single), content(cache)))
    query = rng.standard_normal((2, 2, 1, 40)).astype(F32)
    assert same_bits(single.attention(query), cache.attention(query))


# ---- attention


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("given", [F32, F16, BF16, F64], ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_groups_and_dtypes(group: int, given: Any, dtype: str, rng: np.random.Generator) -> None:
    cache, _, _ = filled(rng, dtype, [330, 64, 1])
    for T in (1, 3):
        check(cache, rng.standard_normal((3, 2 * group, T, 40)).astype(given))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("sizes", [(128, 128), (64, 64), (32, 96), (17, 33), (300, 1)], ids=str)
def test_head_sizes(sizes: tuple[int, int], dtype: str, rng: np.random.Generator) -> None:
    D, E = sizes
    cache, _, _ = filled(rng, dtype, [700, 131], G=1, D=D, E=E)
    for H in (1, 4, 6):
        check(cache, rng.standard_normal((2, H, 2, D)).astype(F32))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("T", [*range(1, 18), 40, 70])
def test_numbers_of_queries(T: int, dtype: str, rng: np.random.Generator) -> None:
    cache, _, _ = filled(rng, dtype, [200, 129, 5])
    check(cache, rng.standard_normal((3, 4, T, 40)).astype(F32))


OPTIONS: dict[str, Callable[..., Options]] = {
    "not causal": lambda rng, B, H, T, S: {"causal": False},
    "lower right": lambda rng, B, H, T, S: {"causal": "lower_right"},
    "bool mask": lambda rng, B, H, T, S: {"attn_mask": rng.random((B, 1, T, S)) < 0.6},
    "bool mask, heads": lambda rng, B, H, T, S: {"attn_mask": rng.random((H, T, S)) < 0.6},
    "float mask": lambda rng, B, H, T, S: {
        "attn_mask": np.where(
            rng.random((B, H, T, S)) < 0.3, -np.inf, rng.standard_normal((B, H, T, S))
        ).astype(F32)
    },
    "softcap": lambda rng, B, H, T, S: {"softcap": 2.0},
    "alibi": lambda rng, B, H, T, S: {"alibi_slopes": rng.random(H)},
    "sinks": lambda rng, B, H, T, S: {"sinks": 3 * rng.standard_normal(H)},
    "window": lambda rng, B, H, T, S: {"window": (70, None)},
    "small window": lambda rng, B, H, T, S: {"window": (5, 0)},
    "scale": lambda rng, B, H, T, S: {"scale": 0.3},
    "dropout": lambda rng, B, H, T, S: {"dropout_p": 0.4, "seed": 7},
    "fp64": lambda rng, B, H, T, S: {"precision": "fp64"},
}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("T", [1, 5, 20])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, T: int, dtype: str, rng: np.random.Generator) -> None:
    cache, _, _ = filled(rng, dtype, [300, 131, 64])
    options = OPTIONS[option](rng, 3, 4, T, 300)
    check(cache, rng.standard_normal((3, 4, T, 40)).astype(F32), **options)


@pytest.mark.parametrize("dtype", KINDS)
def test_no_tokens(dtype: str, rng: np.random.Generator) -> None:
    cache = KVCache(2, 1, 8, dtype=dtype)
    query = rng.standard_normal((2, 2, 3, 8)).astype(F32)
    out, lse = cache.attention(query, return_lse=True)
    assert (out == 0).all() and (lse == -np.inf).all()
    cache.append(*tokens(rng, (2, 1, 8, 8), 2), lengths=[2, 0])
    check(cache, query)
    assert (cache.attention(query)[1] == 0).all()


@pytest.mark.parametrize("dtype", KINDS)
def test_what_is_forgotten_or_never_counted_leaks_nowhere(dtype: str, rng: np.random.Generator) -> None:
    cache, key, value = filled(rng, dtype, [100, 90])
    query = rng.standard_normal((2, 2, 2, 40)).astype(F32)
    before = cache.attention(query)
    for x in (key, value):
        x[...] = 1e4 if dtype == "int8" else np.nan
    cache.append(key[:, :, :20], value[:, :, :20])
    cache.truncate([100, 90])
    assert same_bits(cache.attention(query), before)
    cache.append(key * np.nan, value * np.nan, [0, 0])
    assert same_bits(cache.attention(query), before)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_nan_and_infinities_pass(dtype: str, rng: np.random.Generator) -> None:
    cache, key, value = filled(rng, dtype, [100, 100])
    key, value = key[:, :, :1].copy(), value[:, :, :1].copy()
    key[0, 0, 0, 3], value[1, 1, 0, 2] = np.nan, np.inf
    cache.append(key, value)
    out = cache.attention(rng.standard_normal((2, 2, 1, 40)).astype(F32))
    assert np.isnan(out[0, 0]).all() and np.isfinite(out[0, 1]).all() and np.isfinite(out[1, 0]).all()
    assert (np.flatnonzero(np.isinf(out[1, 1, 0])) == [2]).all() and not np.isnan(out[1, 1]).any()


def test_scores_beyond_float(rng: np.random.Generator) -> None:
    for dtype in ("fp32", "bf16", "int8"):
        cache = KVCache(1, 1, 16, dtype=dtype)
        key, value = tokens(rng, (1, 1, 16, 16), 130)
        cache.append(key * F32.type(1e30), value)
        assert np.isfinite(cache.attention(np.full((1, 1, 2, 16), 1e30, F32))).all()


# ---- same bits


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("T", [1, 6, 20])
def test_threads_and_neighbours(T: int, dtype: str, rng: np.random.Generator) -> None:
    lengths = [9100, 600, 70]
    cache, key, value = filled(rng, dtype, lengths, G=1, D=64, E=64)
    query = rng.standard_normal((3, 4, T, 64)).astype(F32)
    out = cache.attention(query)
    assert all(same_bits(cache.attention(query, num_threads=n), out) for n in (1, 2, 5))
    for b, n in enumerate(lengths):
        alone = KVCache(1, 1, 64, dtype=dtype)
        alone.append(key[b : b + 1, :, :n], value[b : b + 1, :, :n])
        assert same_bits(alone.attention(query[b : b + 1]), out[b : b + 1])
        for h in range(4):  # and whatever other queries go over the keys along with it
            one = query[b : b + 1, h : h + 1]
            assert same_bits(alone.attention(one), out[b : b + 1, h : h + 1])


def test_fp32_is_attention_on_the_arrays(rng: np.random.Generator) -> None:
    cache, key, value = filled(rng, "fp32", [300, 300])
    query = rng.standard_normal((2, 2, 5, 40)).astype(F32)
    assert same_bits(cache.attention(query), adaattn.attention(query, key, value, causal=True))


# ---- truncate and reorder


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("kept", [0, 1, 63, 64, 100, 128, 190, 199, 200])
def test_truncate(kept: int, dtype: str, rng: np.random.Generator) -> None:
    cache, key, value = filled(rng, dtype, [200, 200, 200])
    before = content(cache)
    cache.truncate([kept, 200, min(kept, 10)])
    assert cache.lengths.tolist() == [kept, 200, min(kept, 10)]
    for x, y in zip(before, content(cache), strict=True):
        np.testing.assert_allclose(y[0, :, :kept], x[0, :, :kept], rtol=1e-7, atol=1e-9)
        np.testing.assert_array_equal(y[1], x[1])
    query = rng.standard_normal((3, 4, 2, 40)).astype(F32)
    check(cache, query)
    cache.append(key[:, :, :70], value[:, :, :70])
    check(cache, query)
    cache.truncate(0)
    assert cache.lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("indices", [[0, 0, 2], [2, 1, 0, 1, 1], [1], np.array([1, 0], np.uint8)], ids=str)
def test_reorder(indices: Any, dtype: str, rng: np.random.Generator) -> None:
    cache, _, _ = filled(rng, dtype, [200, 70, 130])
    before = [*content(cache), cache.lengths]
    cache.reorder(indices)
    n = int(cache.lengths.max())
    for x, y in zip(before[:2], content(cache), strict=True):
        np.testing.assert_array_equal(y, x[indices][:, :, :n])
    assert (cache.lengths == before[2][indices]).all()
    B = len(indices)
    key, value = tokens(rng, (B, 2, 40, 24), 60)
    cache.append(key, value)  # copies go their own ways
    check(cache, rng.standard_normal((B, 2, 3, 40)).astype(F32))


def test_lengths_are_a_copy(rng: np.random.Generator) -> None:
    cache, _, _ = filled(rng, "int8", [100, 20])
    cache.lengths[:] = 7
    assert cache.lengths.tolist() == [100, 20]


class Model:
    """What a cache should hold, and how often storing may have moved it."""

    def __init__(self, B: int) -> None:
        self.key: list[Array] = [np.zeros((2, 0, 16))] * B
        self.value: list[Array] = [np.zeros((2, 0, 8))] * B
        self.closings = 1


@hypothesis.given(
    dtype=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 2**32),
    steps=st.lists(st.sampled_from(["append", "append", "token", "truncate", "reorder"]), max_size=12),
)
def test_random_operations(dtype: str, seed: int, steps: list[str]) -> None:
    rng = np.random.default_rng(seed)
    B = int(rng.integers(1, 4))
    cache, model = KVCache(B, 2, 16, 8, dtype=dtype), Model(B)
    for step in steps:
        if step in ("append", "token"):
            n = 1 if step == "token" else int(rng.integers(1, 150))
            key, value = (rng.uniform(-2, 2, (B, 2, n, width)).astype(F32) for width in (16, 8))
            counts = rng.integers(0, n + 1, B)
            cache.append(key, value, counts)
            for b, count in enumerate(counts):
                model.key[b] = np.concatenate([model.key[b], key[b, :, :count]], axis=1)
                model.value[b] = np.concatenate([model.value[b], value[b, :, :count]], axis=1)
        elif step == "truncate":
            kept = rng.integers(0, cache.lengths + 1)
            cache.truncate(kept)
            model.key = [x[:, :n] for x, n in zip(model.key, kept, strict=True)]
            model.value = [x[:, :n] for x, n in zip(model.value, kept, strict=True)]
            model.closings += 1
        else:
            chosen = rng.integers(0, B, int(rng.integers(1, 4)))
            cache.reorder(chosen)
            model.key, model.value = ([side[i] for i in chosen] for side in (model.key, model.value))
            B = len(chosen)
        assert cache.lengths.tolist() == [x.shape[1] for x in model.key]
    step_size = {"fp32": 0, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 4 / 254 * model.closings * 1.05}[dtype]
    for kept, side in zip(content(cache), (model.key, model.value), strict=True):
        for b, x in enumerate(side):
            np.testing.assert_allclose(kept[b, :, : x.shape[1]], x, rtol=0, atol=step_size * 2)
    check(cache, rng.standard_normal((B, 4, int(rng.integers(1, 17)), 16)).astype(F32))


# ---- other arrays


def test_torch(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    for dtype in KINDS:
        for kind in (torch.float32, torch.bfloat16, torch.float16):
            cache, plain = KVCache(2, 2, 40, 24, dtype=dtype), KVCache(2, 2, 40, 24, dtype=dtype)
            key, value = (torch.from_numpy(x).to(kind) for x in tokens(rng, (2, 2, 40, 24), 130))
            cache.append(key.transpose(2, 3).contiguous().transpose(2, 3), value, torch.tensor([130, 80]))
            plain.append(key.float().numpy(), value.float().numpy(), [130, 80])
            assert all(map(same_bits, content(cache), content(plain)))
            query = torch.from_numpy(rng.standard_normal((2, 4, 3, 40)).astype(F32)).to(kind)
            out, lse = cache.attention(query, return_lse=True)
            assert isinstance(out, torch.Tensor) and out.dtype == kind and lse.dtype == torch.float32
            expected = plain.attention(query.float().numpy())
            assert torch.equal(out, torch.from_numpy(expected).to(kind))


def test_out(rng: np.random.Generator) -> None:
    cache, _, _ = filled(rng, "int8", [130, 80])
    query = rng.standard_normal((2, 4, 3, 40)).astype(F32)
    out = np.empty((2, 4, 3, 24), F32)
    assert cache.attention(query, out=out) is out
    assert same_bits(out, cache.attention(query))


# ---- the choice of the dtype


@pytest.mark.parametrize(
    ("tolerance", "chosen"),
    [
        (None, "fp32"),
        (1e-6, "fp32"),
        (1e-3, "fp16"),
        (7e-3, "fp16"),
        (8e-3, "bf16"),
        (0.03, "int8"),
        (1, "int8"),
    ],
)
def test_auto(tolerance: float | None, chosen: str) -> None:
    cache = KVCache(1, 1, 8, dtype="auto", tolerance=tolerance)
    assert cache.dtype == chosen and cache.tolerance == tolerance
    assert KVCache(1, 1, 8, dtype=chosen, tolerance=tolerance).dtype == chosen


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 8e-3), ("int8", 3e-2)])
def test_predictions_hold_for_normal_data(dtype: str, limit: float, rng: np.random.Generator) -> None:
    key, value = (rng.standard_normal((1, 2, 512, 64)).astype(F32) for _ in range(2))
    query = rng.standard_normal((1, 8, 8, 64)).astype(F32)
    cache = KVCache(1, 2, 64, dtype=dtype)
    cache.append(key, value)
    exact = reference.attention(query, key, value, causal=True)
    error = np.linalg.norm(cache.attention(query) - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
    assert error.max() <= limit


# ---- errors


def refuses(error: type[Exception], message: str, function: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        function(*args, **options)
    assert type(caught.value) is error


@pytest.mark.parametrize("name", ["batch", "kv_heads", "head_size", "value_size", "capacity"])
def test_sizes(name: str) -> None:
    good = {"batch": 1, "kv_heads": 1, "head_size": 8}
    for value in (0, -1):
        refuses(
            ArgumentError,
            f"^{name}: expected an int of at least 1, got {value}",
            KVCache,
            **good | {name: value},
        )
    wrong: Any
    for wrong in (1.5, "1", True, [1]):
        refuses(DTypeError, f"^{name}: expected an int, got ", KVCache, **good | {name: wrong})


def test_dtypes_and_tolerances() -> None:
    refuses(ArgumentError, "^dtype: expected 'auto', .* got 'int4'$", KVCache, 1, 1, 8, dtype="int4")
    refuses(DTypeError, "^dtype: expected a string, got type$", KVCache, 1, 1, 8, dtype=np.float32)
    for value in (0.0, -1, np.inf, np.nan):
        refuses(
            ArgumentError, "^tolerance: expected a finite", KVCache, 1, 1, 8, dtype="auto", tolerance=value
        )
    for wrong in ("1", True, [1]):
        refuses(DTypeError, "^tolerance: expected a number", KVCache, 1, 1, 8, tolerance=wrong)
    refuses(ArgumentError, "^dtype: expected one that", KVCache, 1, 1, 8, dtype="int8", tolerance=1e-3)


@pytest.fixture(name="cache", params=KINDS)
def cache_fixture(request: pytest.FixtureRequest, rng: np.random.Generator) -> KVCache:
    return filled(rng, request.param, [100, 40])[0]


def test_append_refuses_and_changes_nothing(cache: KVCache) -> None:
    before, lengths = content(cache), cache.lengths
    key, value = np.ones((2, 2, 5, 40), F32), np.ones((2, 2, 5, 24), F32)

    def bad(error: type[Exception], message: str, *args: Any) -> None:
        refuses(error, message, cache.append, *args)
        assert (cache.lengths == lengths).all() and all(map(same_bits, content(cache), before))

    shapes = [(2, 2, 40), (1, 2, 5, 40), (2, 1, 5, 40), (2, 2, 5, 39), (2, 2, 0, 40)]
    for shape in shapes:
        bad(ShapeError, r"^key: expected shape \(2, 2, N, 40\), got \(", np.ones(shape, F32), value)
    for shape in [(2, 2, 24), (1, 2, 5, 24), (2, 2, 5, 40), (2, 2, 4, 24)]:
        bad(ShapeError, r"^value: expected shape \(2, 2, 5, 24\), got \(", key, np.ones(shape, F32))
    for wrong in (None, [1.0], "x"):
        bad(DTypeError, "^key: expected an array", wrong, value)
        bad(DTypeError, "^value: expected an array", key, wrong)
    for dtype in (bool, np.int8, np.complex64):
        bad(
            DTypeError, "^key: expected float32, float64, float16 or bfloat16, got ", key.astype(dtype), value
        )
    bad(ShapeError, r"^lengths: expected an int or shape \(2,\), got \(3,\)$", key, value, [1, 2, 3])
    bad(ArgumentError, "^lengths: expected an int from 0 to 5, got 6$", key, value, [1, 6])
    bad(ArgumentError, "^lengths: expected an int from 0 to 5, got -1$", key, value, [-1, 5])
    bad(DTypeError, "^lengths: expected integers, got float64$", key, value, [1.0, 2.0])
    bad(DTypeError, "^lengths: expected integers, got bool$", key, value, [True, False])
    wide = value.astype(F64)
    wide[1, 1, 4, 23] = 1e300
    bad(ArgumentError, r"^value: expected numbers that \w+ can hold, got 1e\+300$", key, wide)
    cache.append(key, wide, [5, 4])  # what does not count is not looked at


def test_numbers_beyond_the_dtype(rng: np.random.Generator) -> None:
    for dtype, most, kind in (("fp16", 65504.0, "float16"), ("bf16", 3.3895e38, "bfloat16")):
        cache = KVCache(1, 1, 4, dtype=dtype)
        x = np.full((1, 1, 1, 4), most, F32)
        cache.append(x, x)
        assert np.isfinite(content(cache)[0]).all()
        beyond = x * F32.type(1.003)
        refuses(ArgumentError, f"^key: expected numbers that {kind} can hold", cache.append, beyond, x)
        refuses(ArgumentError, f"^value: expected numbers that {kind} can hold", cache.append, x, beyond)
        assert cache.lengths.tolist() == [1]


@pytest.mark.parametrize("given", [F32, F16, F64], ids=str)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_int8_refuses_what_would_spoil_a_page(special: float, given: Any) -> None:
    cache = KVCache(1, 1, 4, dtype="int8")
    good = np.ones((1, 1, 70, 4), given)
    bad = good.copy()
    bad[0, 0, 69, 3] = special
    message = "expected finite numbers for a cache of int8, got "
    refuses(ArgumentError, f"^key: {message}", cache.append, bad, good)
    refuses(ArgumentError, f"^value: {message}", cache.append, good, bad)
    assert cache.lengths.tolist() == [0] and (content(cache)[0] == 0).all()


def test_attention_refuses(cache: KVCache) -> None:
    query = np.ones((2, 4, 3, 40), F32)
    for name in ("key", "value", "kv_lengths", "query_offset"):
        message = f"^{name}: expected none since the cache sets it, got list$"
        refuses(ArgumentError, message, cache.attention, query, **{name: [1, 2]})
    refuses(
        ArgumentError,
        "^causal: expected a bool or 'lower_right' since the cache",
        cache.attention,
        query,
        causal="upper_left",
    )
    refuses(TypeError, "unexpected keyword argument 'sparse'", cache.attention, query, sparse=True)
    for shape in [(1, 4, 3, 40), (2, 3, 3, 40), (2, 4, 3, 41), (4, 3, 40), (2, 4, 0, 40)]:
        message = r"^query: expected shape \(2, a multiple of 2, T, 40\), got "
        refuses(ShapeError, message, cache.attention, np.ones(shape, F32))
    for wrong in (None, [1.0], 3, np.ndarray):
        refuses(DTypeError, "^query: expected an array", cache.attention, wrong)
    refuses(DTypeError, "^causal: expected a bool", cache.attention, query, causal=np.ones(2))
    refuses(DTypeError, "^query: expected float32", cache.attention, query.astype(np.int32))
    refuses(ShapeError, "^attn_mask: expected", cache.attention, query, attn_mask=np.ones((3, 99), bool))
    refuses(ArgumentError, "^softcap: expected", cache.attention, query, softcap=-1.0)
    long = KVCache(2, 2, 40)
    long.append(*np.ones((2, 2, 2, 2048, 40), F32))
    for name in ("precision", "structure"):  # where what they are tells whether to make codes
        refuses(DTypeError, f"^{name}: expected ", long.attention, query, tolerance=0.1, **{name: np.ones(2)})


def test_truncate_and_reorder_refuse(cache: KVCache) -> None:
    refuses(ArgumentError, "^lengths: expected an int from 0 to 40, got 41$", cache.truncate, [100, 41])
    refuses(ArgumentError, "^lengths: expected an int from 0 to 100, got -1$", cache.truncate, -1)
    refuses(ShapeError, r"^lengths: expected an int or shape \(2,\), got \(1,\)$", cache.truncate, [3])
    refuses(DTypeError, "^lengths: expected integers, got float64$", cache.truncate, 1.5)
    refuses(DTypeError, "^lengths: expected integers, got object$", cache.truncate, None)
    for indices in ([2], [-1, 0]):
        refuses(ArgumentError, "^indices: expected ints from 0 to 1, got ", cache.reorder, indices)
    refuses(ShapeError, r"^indices: expected one dimension of at least 1, got shape \(\)$", cache.reorder, 0)
    refuses(ShapeError, "^indices: expected one dimension", cache.reorder, np.zeros((0,), int))
    refuses(DTypeError, "^indices: expected integers, got float64$", cache.reorder, [0.0])
    assert cache.lengths.tolist() == [100, 40]


def test_public_attention_takes_no_mixture_and_no_tuple(rng: np.random.Generator) -> None:
    query, key, value = np.ones((3, 1, 1, 4, 8), F32)
    refuses(DTypeError, "^key: expected query's dtype", adaattn.attention, query, key.astype(BF16), value)
    refuses(DTypeError, "^key: expected an array", adaattn.attention, query, (key,), (value,))


def test_out_of_memory(rng: np.random.Generator) -> None:
    cache, _, _ = filled(rng, "int8", [100, 40])
    query = rng.standard_normal((2, 4, 1, 40)).astype(F32)
    expected = cache.attention(query)
    with pytest.raises((MemoryError, ValueError)):
        cache._grow(2**50)
    assert cache.capacity == 128 and same_bits(cache.attention(query), expected)


def figured(length: int) -> tuple[int, Array]:
    """The last figures of so many tokens, and whose they are: cache.h."""
    if length < 64:
        return int(np.log2(length)), np.arange(2 ** int(np.log2(length)))
    if length < 512:
        pages = min(length // 64, 4)
        return 5 + pages, np.arange(64 * pages)
    ends = 512 * np.arange(1, length // 512 + 1)[:, None]
    return 9 + length // 512, np.concatenate([np.arange(256), (ends + np.arange(-64, 0)).ravel()])


@pytest.mark.parametrize("dtype", KINDS)
def test_figures_of_the_tokens(dtype: str) -> None:
    """Mean and variance of what came, whatever the pieces were that it came in."""
    rng = np.random.default_rng(7)
    D, E = 70, 24
    stream = tokens(rng, (1, 2, D, E), 1100)
    cache, once = KVCache(1, 2, D, E, dtype=dtype), KVCache(1, 2, D, E, dtype=dtype, capacity=1100)
    once.append(*stream)
    for n in (1, 1, 3, 40, 19, 1, 70, 300, 100, 565):
        first = int(cache.lengths[0])
        cache.append(*(x[:, :, first : first + n] for x in stream))
        at, rows = figured(first + n)
        for side, x in zip((cache._key, cache._value), stream, strict=True):
            width = x.shape[3]
            kept = x if KINDS[dtype] is None else x.astype(KINDS[dtype]).astype(F32)
            chosen, found = kept[:, :, rows].astype(F64), side[6][:, :, at]
            np.testing.assert_allclose(found[..., :width], chosen.mean(axis=2), atol=2e-5)
            np.testing.assert_allclose(found[..., width:-1], chosen.var(axis=2), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found[..., -1], chosen.var(axis=2).sum(axis=-1), rtol=1e-4)
    for a, b in zip((cache._key, cache._value), (once._key, once._value), strict=True):
        assert same_bits(a[6][:, :, : at + 1], b[6][:, :, : at + 1])


@pytest.mark.parametrize("dtype", KINDS)
def test_figures_after_truncate_and_reorder(dtype: str) -> None:
    rng = np.random.default_rng(8)
    first, second = tokens(rng, (2, 2, 40, 24), 700), tokens(rng, (2, 2, 40, 24), 600)
    cache = KVCache(2, 2, 40, 24, dtype=dtype)
    cache.append(*first)
    cache.truncate([500, 30])
    cache.reorder([1, 0])
    cache.append(*second, lengths=[600, 37])
    kept = [
        (first[side][1 - b, :, :length], second[side][b])
        for side in (0, 1)
        for b, length in enumerate((30, 500))
    ]
    atol = 0.02 if dtype == "int8" else 1e-4  # pages that are opened again are rounded
    for i, pieces in enumerate(kept):
        b, stored = i % 2, (cache._key, cache._value)[i // 2]
        at, rows = figured(int(cache.lengths[b]))
        x = np.concatenate(pieces, axis=1)
        x = x if KINDS[dtype] is None else x.astype(KINDS[dtype])
        chosen, found = x[:, rows].astype(F64), stored[6][b, :, at]
        np.testing.assert_allclose(found[:, : x.shape[2]], chosen.mean(axis=1), atol=atol)
        np.testing.assert_allclose(found[:, x.shape[2] : -1], chosen.var(axis=1), rtol=atol, atol=atol)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("length", [1, 2, 63, 200, 1000, 4000])
@pytest.mark.parametrize("T", [1, 12])
def test_a_step_knows_its_tokens(dtype: str, length: int, T: int) -> None:
    """What is predicted of a step from figures is what looking at the tokens says."""
    rng = np.random.default_rng(length)
    cache = KVCache(1, 2, 64, 48, dtype=dtype)
    cache.append(*tokens(rng, (1, 2, 64, 48), length))
    query = rng.standard_normal((1, 6, T, 64)).astype(F32)
    options = {"tolerance": 1e-4, "return_report": True}
    report = cache.attention(query, **options)[1]
    seen = np.ones((1, 1, 1, length), bool)  # masks are looked at, and what they leave
    looked = cache.attention(query, attn_mask=seen, **options)[1]
    for name in ("predicted_error", "score_std"):
        known, expected = getattr(report, name), getattr(looked, name)
        assert ((known <= 1.5 * expected) & (expected <= 1.5 * known)).all(), (name, known, expected)
    assert np.array_equal(report.precision_qk, looked.precision_qk)


def test_a_window_does_not_go_by_what_it_hides() -> None:
    """Old tokens, which a window hides, are a thousand times larger than those that it leaves."""
    rng = np.random.default_rng(9)
    key, value = tokens(rng, (1, 1, 64, 64), 640)
    key[:, :, :320] *= 1000
    cache = KVCache(1, 1, 64)
    cache.append(key, value)
    query = rng.standard_normal((1, 1, 1, 64)).astype(F32)
    budget: Options = {"tolerance": 1e-4, "return_report": True}
    rungs = [cache.attention(query, **budget, **x)[1].precision_qk for x in ({}, {"window": (127, 0)})]
    assert [rung.item() for rung in rungs] == ["fp64", "fp32"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("centre", [0.0, 3.0])
@pytest.mark.parametrize("T", [1, 70])
def test_stored_error(dtype: str, centre: float, T: int) -> None:
    """The prediction is within three times of what storing costs."""
    rng = np.random.default_rng(3)
    cache = KVCache(2, 2, 64, 48, dtype=dtype)
    key = (rng.standard_normal((2, 2, 500, 64)) + centre * rng.standard_normal((2, 1, 64))).astype(F32)
    value = (rng.standard_normal((2, 2, 500, 48)) + centre).astype(F32)
    cache.append(key, value, lengths=[500, 270])
    query = rng.standard_normal((2, 6, T, 64)).astype(F32)
    out, lse, report = cache.attention(query, causal=False, return_lse=True, return_report=True)
    exact = reference.attention(query, key, value, kv_lengths=cache.lengths)
    error = np.linalg.norm(out - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
    assert lse.shape == query.shape[:3] and report.stored_error.shape == (2, 6)
    ratio = report.stored_error / error
    assert ratio.min() > 1 / 3 and ratio.max() < 3, ratio


def test_stored_error_where_storing_costs_nothing() -> None:
    rng = np.random.default_rng(4)
    key, value = rng.standard_normal((2, 1, 1, 30, 8)).astype(F32)
    query = rng.standard_normal((1, 2, 1, 8)).astype(F32)
    for dtype in ("fp32", "int8"):  # a page that is open is kept in fp32
        cache = KVCache(1, 1, 8, dtype=dtype)
        assert np.array_equal(cache.attention(query, return_report=True)[1].stored_error, [[0, 0]])
        cache.append(key, value)
        assert np.array_equal(cache.attention(query, return_report=True)[1].stored_error, [[0, 0]])
    assert adaattn.attention(query, key, value, return_report=True)[1].stored_error is None


@pytest.mark.parametrize("kind", [F16, BF16, F64])
def test_stored_error_of_other_queries(kind: Any) -> None:
    rng = np.random.default_rng(5)
    cache = KVCache(1, 1, 8, dtype="bf16", tolerance=1e-2)
    cache.append(*rng.standard_normal((2, 1, 1, 30, 8)).astype(F32))
    query = rng.standard_normal((1, 2, 1, 8)).astype(kind)
    report = cache.attention(query, return_report=True)[1]
    assert (report.stored_error > 0).all() and (report.stored_error < 1e-2).all()
    assert "stored" in report.table()


def test_every_so_many_calls_are_verified(rng: np.random.Generator) -> None:
    cache = KVCache(2, 2, 32, dtype="int8", verify_every=3)
    cache.append(*tokens(rng, (2, 2, 32, 32), 200))
    queries = rng.standard_normal((9, 2, 4, 2, 32)).astype(F32)
    rows = []
    for i, query in enumerate(queries):
        options = {5: {"verify": False}, 6: {"verify": True}}.get(i, {})
        cache.attention(query)  # exact calls do not count
        out, report = cache.attention(query, tolerance=1e-2, **options, return_report=True)
        rows.append(report.verified_rows.max())
        assert (report.verified_rows == rows[-1]).all()
        assert np.isnan(report.measured_error).all() == (rows[-1] == 0)
        if rows[-1]:
            placed = {"kv_lengths": cache.lengths, "query_offset": cache.lengths - 2, "causal": True}
            exact = reference.attention(query.astype(F64), *content(cache), **placed)
            truth = np.linalg.norm(out - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
            np.testing.assert_allclose(report.measured_error, truth, rtol=1e-3)
            assert (truth <= report.error_limit + 1e-14).all()  # as exact as both oracles are
    assert rows == [0, 0, 2, 0, 0, 0, 2, 0, 2]
    assert cache.verify_every == 3 and KVCache(1, 1, 8).verify_every is None


@pytest.mark.parametrize("T", [1, 8, 40])
def test_a_verified_step_finds_what_nobody_saw(T: int) -> None:
    """Two huge keys that tie, in a block that predictions do not look at: scores lose digits in fp32."""
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 1, 1, 10 * PAGE, 64)).astype(F32)
    query = rng.standard_normal((1, 1, T, 64)).astype(F32)
    key[:, :, 300:302] = 2e3 * query[:, :, :1] + rng.standard_normal((1, 1, 2, 64)) * [[0.3], [0.5]]
    errors = []
    for every in (None, 1):
        cache = KVCache(1, 1, 64, verify_every=every)
        cache.append(key, value)
        out, report = cache.attention(query, tolerance=1e-5, causal=False, return_report=True)
        exact = reference.attention(query.astype(F64), key.astype(F64), value.astype(F64))
        errors.append(float(np.linalg.norm(out - exact) / np.linalg.norm(exact)))
        assert report.retried.all() == (every == 1)
        assert report.verified_rows.max() == (min(T, 32) if every else 0)
    assert errors[0] > 1e-5 >= errors[1]


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_prediction_reads_the_values_of_its_pages(rng: np.random.Generator, dtype: str) -> None:
    """Those that the window leaves to queries, not the ones before it."""
    key, value = rng.standard_normal((2, 1, 2, 20 * PAGE, 64)).astype(F32)
    value[:, :, : 16 * PAGE] *= 1e4
    cache = KVCache(1, 2, 64, dtype=dtype)
    cache.append(key, value)
    query = rng.standard_normal((1, 2, 70, 64)).astype(F32)
    options = {"tolerance": 1e-4, "precision": "fp32", "window": (100, 0), "return_report": True}
    _, report = cache.attention(query, **options)
    assert (report.verified_rows > 0).all()
    np.testing.assert_allclose(report.predicted_error, report.measured_error, rtol=0.6)


def test_verify_every_is_a_number_of_calls() -> None:
    with pytest.raises(DTypeError, match=r"verify_every: expected an int, got str"):
        KVCache(1, 1, 8, verify_every="3")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"verify_every: expected an int of at least 1, got 0"):
        KVCache(1, 1, 8, verify_every=0)
