"""Every rung of the precision ladder: its class of error under every option, and what it must not change."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaattn

# Two to three times the relative Frobenius error measured on standard normal heads; pairs: (scores, values).
LIMITS: dict[str | tuple[str, str], float] = {
    "fp32": 1.5e-6,
    "bf16x6": 1.5e-6,
    "bf16x3": 2e-5,
    "fp16": 1.2e-3,
    "int16": 5e-4,
    "bf16": 1e-2,
    "int8": 3e-2,
    ("int8", "bf16"): 2.5e-2,
    ("bf16", "int8"): 2.5e-2,
    ("int16", "int8"): 2.5e-2,
    ("fp32", "int8"): 2.5e-2,
    ("int8", "fp32"): 2.5e-2,
}
RUNGS = pytest.mark.parametrize("precision", LIMITS, ids=lambda p: p if isinstance(p, str) else "-".join(p))
NARROW = ["bf16x3", "fp16", "int16", "bf16", "int8", ("int8", "bf16")]

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (40, 9)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": np.array([0.03, 0.2, 0.5, 0.01])},
    "sinks": {"sinks": np.array([0.5, -1.0, 3.0, 0.0])},
    "lengths": {"kv_lengths": [150, 33]},
    "dropout": {"dropout_p": 0.2, "seed": 7},
    "all": {
        "causal": True,
        "softcap": 3.0,
        "sinks": np.zeros(4),
        "kv_lengths": [190, 100],
        "window": (120, None),
    },
}


def heads(B: int, H: int, G: int, T: int, S: int, D: int, E: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = [(B, H, T, D), (B, G, S, D), (B, G, S, E)]
    return [rng.standard_normal(size, np.float32) for size in sizes]


def errors(out: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Relative Frobenius, per head."""
    difference = out.astype(np.float64) - exact
    return np.linalg.norm(difference, axis=(2, 3)) / np.maximum(np.linalg.norm(exact, axis=(2, 3)), 1e-30)


@RUNGS
@pytest.mark.parametrize("option", OPTIONS)
def test_error_class(precision: Any, option: str) -> None:
    q, k, v = heads(2, 4, 2, 150, 200, 48, 40)
    out, lse = adaattn.attention(q, k, v, precision=precision, return_lse=True, **OPTIONS[option])
    exact, exact_lse = adaattn.reference.attention(q, k, v, return_lse=True, **OPTIONS[option])
    assert errors(out, exact).max() <= LIMITS[precision]
    seen = np.isfinite(exact_lse)
    assert np.array_equal(np.isfinite(lse), seen)
    # A score is off by about the rung's error times its size, up to five here.
    assert np.abs(lse - exact_lse)[seen].max() <= 5 * LIMITS[precision]


@RUNGS
@pytest.mark.parametrize("kind", ["bool", "float", "per head"])
def test_masks(precision: Any, kind: str) -> None:
    q, k, v = heads(1, 4, 2, 70, 300, 32, 32)
    rng = np.random.default_rng(1)
    keep = rng.random((4, 70, 300) if kind == "per head" else (70, 300)) < 0.7
    keep[..., :64, 128:192] = False
    mask = (
        np.where(keep, rng.standard_normal(keep.shape), -np.inf).astype(np.float32)
        if kind == "float"
        else keep
    )
    out = adaattn.attention(q, k, v, attn_mask=mask, precision=precision)
    assert errors(out, adaattn.reference.attention(q, k, v, attn_mask=mask)).max() <= LIMITS[precision]


@RUNGS
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 1),
        (1, 1, 1, 64, 64, 3),
        (2, 2, 17, 63, 5, 130),
        (3, 1, 65, 257, 33, 16),
        (2, 1, 130, 129, 128, 64),
    ],
)
def test_sizes(precision: Any, sizes: tuple[int, ...]) -> None:
    H, G, T, S, D, E = sizes
    q, k, v = heads(1, H * G, G, T, S, D, E)
    out = adaattn.attention(q, k, v, precision=precision)
    # Few coordinates do not average their rounding.
    assert errors(out, adaattn.reference.attention(q, k, v)).max() <= 3 * LIMITS[precision]


@RUNGS
def test_fully_fused_strips(precision: Any) -> None:
    q, k, v = heads(1, 2, 1, 128, 1024, 64, 64)
    out = adaattn.attention(q, k, v, precision=precision)
    assert errors(out, adaattn.reference.attention(q, k, v)).max() <= LIMITS[precision]


@RUNGS
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(precision: Any, dtype: str) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    q, k, v = (x.astype(dtype) for x in heads(1, 2, 2, 96, 160, 64, 64))
    out = adaattn.attention(q, k, v, precision=precision)
    rounding = {8: 0, 2: 4e-3 if dtype != "float16" else 5e-4}[np.dtype(dtype).itemsize]
    exact = adaattn.reference.attention(*(x.astype(np.float64) for x in (q, k, v)))
    assert out.dtype == dtype
    assert errors(out, exact).max() <= LIMITS[precision] + rounding


@RUNGS
def test_same_bits(precision: Any) -> None:
    q, k, v = heads(3, 4, 2, 130, 300, 40, 40)
    out = adaattn.attention(q, k, v, precision=precision, num_threads=1, causal=True)
    assert np.array_equal(out, adaattn.attention(q, k, v, precision=precision, num_threads=3, causal=True))
    alone = adaattn.attention(q[1:2], k[1:2], v[1:2], precision=precision, causal=True)
    assert np.array_equal(out[1:2], alone)
    strided = (np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v))
    assert np.array_equal(out, adaattn.attention(*strided, precision=precision, causal=True))


@RUNGS
@pytest.mark.parametrize("S", [200, 900])  # heads that one worker computes whole, and others
def test_who_computes_a_head_changes_no_bit(precision: Any, S: int) -> None:
    q, k, v = heads(1, 14, 7, 130, S, 80, 80)
    q[0, 5, 100] *= 1e30  # beyond all but fp32
    out, report = adaattn.attention(q, k, v, precision=precision, num_threads=1, return_report=True)
    for threads in (2, 3, 8):
        again, other = adaattn.attention(
            q, k, v, precision=precision, num_threads=threads, return_report=True
        )
        assert np.array_equal(out, again, equal_nan=True)
        assert np.array_equal(report.retried, other.retried)
    with_lse = adaattn.attention(q, k, v, precision=precision, return_lse=True)[0]
    assert np.array_equal(out, with_lse, equal_nan=True)


@pytest.mark.parametrize("precision", ["bf16", "int16", "int8", ("int8", "bf16")])
def test_a_common_offset_of_the_keys_costs_nothing(precision: Any) -> None:
    q, k, v = heads(1, 2, 2, 100, 256, 64, 64)
    k += 30 * np.random.default_rng(1).standard_normal(64).astype(np.float32)
    out = adaattn.attention(q, k, v, precision=precision)
    assert errors(out, adaattn.reference.attention(q, k, v)).max() <= LIMITS[precision]


@pytest.mark.parametrize("precision", ["bf16", "int16", "int8"])
def test_padding_does_not_coarsen_the_scale(precision: str) -> None:
    q, k, v = heads(1, 1, 1, 64, 256, 64, 64)
    k += 1000
    lengths = np.array([70])  # the second block has six keys
    out = adaattn.attention(q, k, v, precision=precision, kv_lengths=lengths)
    exact = adaattn.reference.attention(q, k, v, kv_lengths=lengths)
    assert errors(out, exact).max() <= LIMITS[precision]


@RUNGS
@pytest.mark.parametrize("bad", [1e4, 1e30, np.nan, np.inf])
def test_hidden_keys_change_no_bit(precision: Any, bad: float) -> None:
    q, k, v = heads(1, 2, 1, 80, 200, 32, 32)
    lengths, keep = np.array([150]), np.arange(200) < 150
    for option in ({"kv_lengths": lengths}, {"attn_mask": keep}, {"attn_mask": np.where(keep, 0, -np.inf)}):
        clean = adaattn.attention(q, k, v, precision=precision, **option)
        dirty_k, dirty_v = k.copy(), v.copy()
        dirty_k[:, :, 150:] = dirty_v[:, :, 150:] = bad
        assert np.array_equal(clean, adaattn.attention(q, dirty_k, dirty_v, precision=precision, **option))


@pytest.mark.parametrize("precision", NARROW, ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [1e30, 1e-35, 1e-42, np.nan, np.inf])
def test_heads_beyond_the_rung_go_up_alone(precision: Any, which: int, bad: float) -> None:
    arrays = heads(1, 3, 3, 70, 140, 16, 16)
    clean = adaattn.attention(*arrays, precision=precision)
    if abs(bad) < 1:
        arrays[which][0, 1] *= bad
    else:
        arrays[which][0, 1, 5, 3] = bad
    out, report = adaattn.attention(*arrays, precision=precision, return_report=True)
    assert report.retried.tolist() == [[False, True, False]]
    assert report.precision_qk[0, 1] == report.precision_pv[0, 1] == "fp32"
    assert np.array_equal(out[:, [0, 2]], clean[:, [0, 2]])
    assert np.array_equal(out[:, 1], adaattn.attention(*arrays)[:, 1], equal_nan=True)


def test_queries_whose_squares_no_float_holds() -> None:
    """Their 16-bit integers have no norm to stay within: the sums of products would wrap around."""
    q, k, v = heads(1, 2, 2, 70, 140, 64, 64)
    q, k = np.sign(q), np.sign(k)
    k[:, :, :70] = q
    q *= np.float32(2.0**-75)
    out, report = adaattn.attention(q, k, v, precision="int16", scale=2.0**72, return_report=True)
    assert (report.precision_qk == "fp32").all() and report.retried.all()
    assert errors(out, adaattn.reference.attention(q, k, v, scale=2.0**72)).max() <= 1.5e-6


@pytest.mark.parametrize("precision", NARROW, ids=str)
def test_growing_scores(precision: Any) -> None:
    """Scores far above those of the first keys: the reference follows."""
    q, k, v = heads(1, 1, 1, 64, 512, 32, 32)
    k *= np.geomspace(1, 60, 512, dtype=np.float32)[:, None]
    out = adaattn.attention(q, k, v, precision=precision)
    exact = adaattn.reference.attention(q, k, v)
    assert errors(out, exact).max() <= 0.3  # peaked rows: a rounded score moves whole weights
    q, k = np.sign(q), np.sign(k) * np.geomspace(1, 64, 512).astype(int).astype(np.float32)[:, None]
    if precision in ("fp16", "bf16x3"):  # exact there
        out, exact = adaattn.attention(q, k, v, precision=precision), adaattn.reference.attention(q, k, v)
        assert errors(out, exact).max() <= 20 * LIMITS[precision]


@RUNGS
def test_rows_without_keys_and_zero_inputs(precision: Any) -> None:
    q, k, v = heads(1, 2, 2, 70, 130, 16, 8)
    mask = np.ones((70, 130), bool)
    mask[3] = False
    out, lse = adaattn.attention(q, k, v, attn_mask=mask, precision=precision, return_lse=True)
    assert not out[:, :, 3].any() and np.isneginf(lse[:, :, 3]).all()
    assert not adaattn.attention(q, k, np.zeros_like(v), precision=precision).any()
    mean = adaattn.attention(np.zeros_like(q), k, v, precision=precision)
    limit = LIMITS[precision] * np.linalg.norm(v) / np.sqrt(v.size)
    np.testing.assert_allclose(mean, np.broadcast_to(v.mean(2, keepdims=True), mean.shape), atol=limit)


def test_report() -> None:
    q, k, v = heads(2, 2, 1, 20, 30, 8, 8)
    out, lse, report = adaattn.attention(
        q, k, v, precision=("int8", "bf16"), return_lse=True, return_report=True
    )
    assert out.shape == (2, 2, 20, 8) and lse.shape == (2, 2, 20)
    assert (report.precision_qk == "int8").all() and (report.precision_pv == "bf16").all()
    assert not report.retried.any() and report.precision_qk.shape == (2, 2)
    copy = pickle.loads(pickle.dumps(report))
    assert (copy.precision_pv == report.precision_pv).all()
    assert "int8" in str(report.table())


@settings(max_examples=60, deadline=None)
@given(
    precision=st.sampled_from(list(LIMITS)),
    sizes=st.tuples(*[st.integers(1, n) for n in (2, 2, 2, 140, 330, 70, 70)]),
    causal=st.booleans(),
    length=st.integers(0, 400),
    seed=st.integers(0, 99),
)
def test_fuzz(precision: Any, sizes: tuple[int, ...], causal: bool, length: int, seed: int) -> None:
    B, group, G, T, S, D, E = sizes
    q, k, v = heads(B, group * G, G, T, S, D, E, seed)
    options = {"causal": causal, "kv_lengths": np.full(B, min(length, S))}
    out = adaattn.attention(q, k, v, precision=precision, **options)
    exact = adaattn.reference.attention(q, k, v, **options)
    assert np.isfinite(out).all()
    # Against values of one: heads of one row and few coordinates have no norm to speak of.
    assert np.abs(out - exact).max() <= 12 * LIMITS[precision] * max(1.0, np.abs(v).max())
