"""The oracle against PyTorch in float64, and against a second implementation: one query, one key at a time,
in Python's own floats and integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support import CASES, F64, SHAPES, Array, OptionsOf, Shape, inputs

from adaattn import reference

MASK64 = 2**64 - 1


def mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK64
    return x ^ x >> 31


def fmix32(h: int) -> int:
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ h >> 16


def is_kept(seed: Any, b: int, h: int, i: int, j: int, p: float) -> bool:
    own = int(seed[b]) & MASK64 if np.ndim(seed) else mix64((int(seed) & MASK64) ^ mix64(b))
    row = mix64((mix64((own + h) & MASK64) + i) & MASK64)
    bits = fmix32(fmix32((j * 0x9E3779B1 + row) & 0xFFFFFFFF) ^ row >> 32)
    return bits >= math.floor(p * 2**32)


def naive(query: Array, key: Array, value: Array, **options: Any) -> tuple[Array, Array]:
    B, H, T, D = query.shape
    G, S, E = value.shape[1:]
    out, lse = np.zeros((B, H, T, E)), np.zeros((B, H, T))
    mask = np.broadcast_to(options.get("attn_mask", True), (B, H, T, S))
    lowest = np.finfo(np.float16).min if mask.dtype == np.float16 else None  # must swallow any score
    left, right = options.get("window", (None, None))
    causal, p, softcap = options.get("causal"), options.get("dropout_p", 0.0), options.get("softcap")
    lengths = options.get("kv_lengths", [S] * B)
    offsets = np.broadcast_to(options.get("query_offset", 0 if causal == "upper_left" else S - T), B)
    slopes = np.broadcast_to(options.get("alibi_slopes", 0.0), (B, H))
    sinks = options.get("sinks", [-math.inf] * H)
    scale = options.get("scale", 1 / math.sqrt(D))
    for b, h, i in np.ndindex(B, H, T):
        position, seen = i + int(offsets[b]), {}
        for j in range(int(lengths[b])):
            if causal and j > position:
                continue
            if (left is not None and j < position - left) or (right is not None and j > position + right):
                continue
            bias = mask[b, h, i, j]
            if bias == (False if mask.dtype == bool else -math.inf):
                continue
            s = scale * math.fsum(
                x * y for x, y in zip(query[b, h, i], key[b, h // (H // G), j], strict=True)
            )
            s = softcap * math.tanh(s / softcap) if softcap else s
            s -= slopes[b, h] * abs(position - j)
            if mask.dtype != bool:
                s += float(np.finfo(np.float32).min) if bias == lowest else float(bias)
            seen[j] = s
        top = max([*seen.values(), sinks[h]])
        if top == -math.inf:
            lse[b, h, i] = top
            continue
        total = math.fsum(math.exp(s - top) for s in [*seen.values(), sinks[h]])
        lse[b, h, i] = top + math.log(total)
        for j, s in seen.items():
            if not p or is_kept(options["seed"], b, h, i, j, p):
                out[b, h, i] += math.exp(s - top) / total / (1 - p) * value[b, h // (H // G), j]
    return out, lse


@pytest.mark.parametrize("options_of", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "shape", [SHAPES[1], Shape(2, 6, 3, 9, 5, 3, 4), Shape(1, 2, 1, 6, 90, 4, 3)], ids=str
)
def test_against_one_key_at_a_time(shape: Shape, options_of: OptionsOf, rng: np.random.Generator) -> None:
    arrays, options = inputs(rng, shape, F64), options_of(rng, shape)
    expected = naive(*arrays, **{k: v for k, v in options.items() if k not in ("precision", "num_threads")})
    for ours, theirs in zip(reference.attention(*arrays, return_lse=True, **options), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_against_torch(shape: Shape, mask: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    arrays, options = inputs(rng, shape, F64), {}
    if mask in ("bool", "float"):
        array = rng.random((shape.B, 1, shape.T, shape.S))
        array[..., 0] = 1  # torch has no law for rows without keys
        options = {"attn_mask": array > 0.5 if mask == "bool" else array}
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.from_numpy, arrays),
        enable_gqa=True,
        is_causal=mask == "causal",
        **{name: torch.from_numpy(x) for name, x in options.items()},
    )
    ours = reference.attention(*arrays, causal="upper_left" if mask == "causal" else False, **options)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-13)


def test_mixers() -> None:
    """splitmix64's first outputs for seed 1234567, and murmur3's finaliser, as published."""
    seed = np.array([1234567], np.uint64)
    assert reference.mix64(seed).tolist() == [6457827717110365317]
    assert mix64(1234567) == 6457827717110365317
    assert fmix32(1) == 0x514E28B7
    assert fmix32(0) == 0


def test_rows_are_done_in_steps(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = inputs(rng, SHAPES[5], F64)
    options = CASES["all"](rng, SHAPES[5])
    whole = reference.attention(*arrays, **options)
    monkeypatch.setattr(reference, "ROWS", 7)
    np.testing.assert_allclose(reference.attention(*arrays, **options), whole, rtol=1e-13, atol=1e-15)


def test_out_is_filled_and_the_result_not_rounded(rng: np.random.Generator) -> None:
    arrays = inputs(rng, SHAPES[4])
    out = np.empty(arrays[0].shape, np.float32)
    result = reference.attention(*arrays, out=out)
    assert result.dtype == F64
    np.testing.assert_array_equal(out, result.astype(np.float32))


def test_plain_sequences_are_taken() -> None:
    query = [[[[1.0, 0.0]]]]
    np.testing.assert_array_equal(reference.attention(query, query, [[[[3.0]]]]), [[[[3.0]]]])
