"""Attention modules whose rank follows the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import adaattn
from adaattn import nn, rates

Array = NDArray[Any]
T, C, H = 4096, 32, 2


@pytest.fixture(autouse=True)
def _same_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates by which smooth heads of this length are low rank, whatever machine this is."""
    speed = {"fp32": 100.0, "bf16": 120.0, "int8/bf16": 150.0, "int8": 150.0}
    rows = [(speed.get(rung, 20.0),) * 2 + (0.0, 1.0) for rung in rates.RUNGS]
    monkeypatch.setattr(rates, "_table", np.array(rows, np.float64))


@pytest.fixture
def smooth(rng: np.random.Generator) -> Array:
    """Tokens on a slow path through few dimensions, and noise that values have and scores hardly."""
    path = np.sin(np.linspace(0, 1, T)[:, None] * rng.uniform(10, 40, 3))
    x: Array = path @ rng.standard_normal((3, C)) + 0.02 * rng.standard_normal((T, C))
    return x[None].astype(np.float32)


def made(kind: Any = nn.AdaAttention, **options: Any) -> Any:
    return kind(C, H, **({"seed": 1, "collect_statistics": True} | options)).eval()


@pytest.mark.parametrize("kind", [nn.AdaAttention, nn.AdaptiveRankAttention])
@pytest.mark.parametrize("causal", [False, True])
def test_smooth_tokens_are_low_rank(smooth: Array, kind: Any, causal: bool) -> None:
    layer, exact = made(kind, causal=causal), nn.DenseAttention(C, H, causal=causal, seed=1).eval()
    out, wanted = layer(smooth), exact(smooth)
    assert np.linalg.norm(out - wanted) <= 1e-2 * np.linalg.norm(wanted)
    told, ranks = layer.get_statistics(), layer.get_rank_statistics()
    assert told.low_rank_ratio == ranks["low_rank_ratio"] == 1 and told.sparse_ratio == 0
    assert 1 <= told.mean_rank == ranks["mean_rank"] <= T / 4
    assert (ranks["call_count"], ranks["rank_ratio"], ranks["min_rank"]) == (1, 0.25, 1)
    assert np.isfinite(ranks["mean_entropy"])


def test_rank_alone_is_fp32(smooth: Array) -> None:
    layer = made(nn.AdaptiveRankAttention)
    layer(smooth)
    layer(np.random.default_rng(0).standard_normal(smooth.shape, np.float32) * 5)
    assert layer.get_precision_statistics()["precision_usage"].keys() == {"fp32"}
    assert layer.get_statistics().low_rank_ratio == 0.5
    with pytest.raises(TypeError, match="takes no max_precision"):
        nn.AdaptiveRankAttention(C, H, max_precision="fp64")


def test_bounds(smooth: Array) -> None:
    """Too few landmarks are none; at least so many go before the ratio."""
    free, few = made(), made(rank_ratio=2 / T)
    free(smooth), few(smooth)
    assert few.get_statistics().low_rank_ratio == 0
    rank = int(free.get_statistics().mean_rank)
    many = made(min_rank=rank + 9, rank_ratio=1e-9)
    many(smooth)
    assert rank < many.get_statistics().mean_rank <= rank + 9


def test_short_calls_and_caches_are_dense(smooth: Array) -> None:
    layer = made(causal=True, rank_ratio=0.01)
    cache = adaattn.KVCache(1, H, C // H)
    whole = layer(smooth[:, :20])
    parts = [layer(smooth[:, :15], cache), layer(smooth[:, 15:20], cache)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-2 * np.abs(whole).max())
    assert layer.get_statistics().low_rank_ratio == 0


def test_gradients_are_near(smooth: Array, rng: np.random.Generator) -> None:
    layer, exact = (kind(C, H, seed=1) for kind in (nn.AdaAttention, nn.DenseAttention))
    grad = rng.standard_normal(smooth.shape, np.float32)
    layer(smooth), exact(smooth)
    found, wanted = layer.backward(grad), exact.backward(grad)
    assert np.linalg.norm(found - wanted) <= 2e-2 * np.linalg.norm(wanted)


def weights_of(layer: Any, scale: float) -> Any:
    """Queries and keys are the input, times scale; a head sees its part of the coordinates."""
    layer.qkv.weight[:] = 0
    layer.qkv.weight[:C] = layer.qkv.weight[C : 2 * C] = scale * np.eye(C)
    layer.qkv.bias[:] = 0
    return layer


@pytest.mark.parametrize("method", ["entropy", "power", "random"])
def test_predicted_ranks(method: str) -> None:
    x = np.tile(np.eye(16, dtype=np.float32), (1, 1, 2))
    uniform = weights_of(made(method=method), 0).predict_optimal_rank(x)
    sharp = weights_of(made(method=method), 20).predict_optimal_rank(x)
    assert uniform.dtype == np.int64 and uniform.tolist() == [[1, 1]]
    assert sharp.tolist() == [[16, 16]]
    blocks = x[:, np.arange(64) % 5]
    assert (weights_of(made(method=method), 20).predict_optimal_rank(blocks) == 5).all()


def test_predicted_ranks_are_those_of_the_weights(rng: np.random.Generator) -> None:
    """Grouped keys, causal limits, ALiBi and rotary positions as in the attention itself."""
    x = rng.standard_normal((2, 50, C), np.float32)
    for options in ({"causal": True, "num_kv_heads": 1}, {"alibi": True}, {"rotary_base": 100.0}):
        layer = made(method="entropy", **options)
        layer.qkv.weight *= 3
        query, key, _, _ = layer._heads(x)
        eye = np.broadcast_to(np.eye(50, dtype=np.float32), (2, key.shape[1], 50, 50))
        weights = adaattn.attention(
            np.ascontiguousarray(query), np.ascontiguousarray(key), eye, **layer._options
        )
        wanted = np.ceil(adaattn.linalg.effective_rank(weights.astype(np.float64), "entropy"))
        assert (abs(layer.predict_optimal_rank(x) - wanted) <= 1).all()
        assert len(np.unique(wanted)) > 1


def test_energy_of_random_decompositions(rng: np.random.Generator) -> None:
    x = 2 * rng.standard_normal((1, 300, C), np.float32)
    ranks = [made(method="random", threshold=t).predict_optimal_rank(x) for t in (0.5, 0.9, 0.99)]
    assert (ranks[0] < ranks[1]).all() and (ranks[1] < ranks[2]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_ratio": 0}, "rank_ratio: expected a number above 0 and at most 1, got 0"),
        ({"rank_ratio": 1.5}, "rank_ratio: expected a number above 0 and at most 1, got 1.5"),
        ({"threshold": float("nan")}, "threshold: expected a number above 0 and at most 1, got nan"),
        ({"min_rank": 0}, "min_rank: expected at least 1, got 0"),
        ({"method": "svd"}, "method: expected one of 'entropy', 'power', 'random', got 'svd'"),
    ],
    ids=str,
)
def test_what_is_refused(options: Any, message: str) -> None:
    with pytest.raises(adaattn.ArgumentError, match=f"^{message}$"):
        made(**options)


def test_a_look_at_the_rank_before_backward_changes_no_gradient(rng: np.random.Generator) -> None:
    x, other = rng.standard_normal((2, 1, 9, C)).astype(np.float32)
    gradients = []
    for looks in (False, True):
        module = made().train()
        grad = np.ones_like(module(x))
        if looks:
            module.predict_optimal_rank(other)
        module.backward(grad)
        gradients.append(module.gradients())
    for name, gradient in gradients[0].items():
        np.testing.assert_array_equal(gradients[1][name], gradient, err_msg=name)
