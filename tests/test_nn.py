"""The modules against formulas written out, and what they tell of their attention."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import adaattn
from adaattn import demo, nn, rates, reference

MODEL = demo.DATA / "bytelm.safetensors"


@pytest.fixture
def x(rng: np.random.Generator) -> Any:
    return rng.standard_normal((2, 9, 16)).astype(np.float32)


def small(**options: Any) -> nn.Transformer:
    return nn.Transformer(50, num_layers=2, num_heads=4, embed_dim=16, **({"seed": 3} | options))


# ---- single modules


def test_linear(x: Any, rng: np.random.Generator) -> None:
    layer = nn.Linear(16, 5, seed=1)
    layer.bias[...] = rng.standard_normal(5)
    assert layer(x).dtype == np.float32 and np.abs(layer.weight).max() <= 0.25
    np.testing.assert_allclose(
        layer(x), np.einsum("bti,oi->bto", x, layer.weight) + layer.bias, rtol=1e-5, atol=1e-6
    )
    assert nn.Linear(16, 5, bias=False).bias is None


def test_embedding() -> None:
    table = nn.Embedding(7, 3, seed=0)
    np.testing.assert_array_equal(table([[1, 6], [0, 1]])[0, 1], table.weight[6])
    with pytest.raises(adaattn.ArgumentError, match=r"^tokens: expected ids from 0 to 6, got -1 to 2"):
        table([2, -1])
    with pytest.raises(adaattn.ArgumentError, match=r"^tokens: expected ids from 0 to 6, got 0 to 7"):
        table([0, 7])
    with pytest.raises(adaattn.DTypeError, match=r"^tokens: expected integers, got float64"):
        table([0.5])


def test_rms_norm(x: Any) -> None:
    norm = nn.RMSNorm(16, eps=1e-3)
    norm.weight[...] = np.arange(16)
    exact = x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-3) * np.arange(16)
    np.testing.assert_allclose(norm(x), exact, rtol=1e-6)
    assert not nn.RMSNorm(16)(np.zeros_like(x)).any()


def test_gelu_is_the_exact_one() -> None:
    x = np.concatenate([np.linspace(-20, 20, 4001), [1e-30, -1e-30, 0.0, 1e18]]).astype(np.float32)
    exact = np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    rounding = 2.0**-24 * (8 + np.minimum(x * x, 400))  # of exp(-x² / 2)
    assert (np.abs(nn.gelu(x) - exact) <= rounding * np.abs(exact) + 1e-37).all()


def test_layer_norm(x: Any) -> None:
    norm = nn.LayerNorm(16, eps=1e-3)
    norm.weight[...], norm.bias[...] = np.arange(16), 3
    wide = x.astype(float)
    exact = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(norm(x), exact * np.arange(16) + 3, rtol=1e-5, atol=1e-6)


def test_norms_of_a_single_row_in_evaluation(x: Any) -> None:
    """One token takes a shorter way."""
    for norm in (
        nn.RMSNorm(16, eps=1e-3).eval(),
        nn.LayerNorm(16).eval(),
        nn.RMSNorm(16, dtype=float).eval(),
    ):
        norm.weight[...] = np.arange(16)
        np.testing.assert_allclose(norm(x[:1, 3:4]), norm(x)[:1, 3:4], rtol=1e-6, atol=1e-6)
        assert norm(x[:1, 3:4]).dtype == norm(x).dtype


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu", "relu2"])
def test_activations(activation: str, x: Any) -> None:
    z = 3 * x.astype(float)
    phi = np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))
    exact = {
        "gelu": z * phi(z),
        "gelu_tanh": z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
        "silu": z / (1 + np.exp(-z)),
        "relu": np.where(z > 0, z, 0),
        "relu2": np.where(z > 0, z * z, 0),
    }[activation]
    function = getattr(nn, activation)
    np.testing.assert_allclose(function(z), exact, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(function(3 * x), exact, rtol=1e-5, atol=1e-6)
    many = np.resize(3 * x, (70, 300))
    np.testing.assert_array_equal(function(many).ravel()[: x.size], function(3 * x).ravel())


def test_feed_forward(x: Any) -> None:
    plain, gated = nn.FeedForward(16, seed=0), nn.FeedForward(16, activation="swiglu", seed=0)
    np.testing.assert_array_equal(plain(x), plain.down(nn.gelu(plain.up(x))))
    np.testing.assert_array_equal(gated(x), gated.down(nn.silu(gated.gate(x)) * gated.up(x)))
    assert plain.up.weight.shape == (64, 16) and gated.gate.weight.shape == gated.up.weight.shape == (48, 16)


def test_dropout_keeps_the_mean() -> None:
    drop = nn.Dropout(0.25, seed=0)
    y = drop(np.ones((200, 300), np.float32))
    assert set(np.unique(y)) == {0, np.float32(4 / 3)} and abs(y.mean() - 1) < 0.01
    np.testing.assert_array_equal(drop.backward(np.ones_like(y)), y)
    np.testing.assert_array_equal(drop.eval()(y), y)


def test_alibi_slopes() -> None:
    np.testing.assert_allclose(nn.alibi_slopes(4), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    np.testing.assert_allclose(nn.alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
    assert nn.alibi_slopes(1).tolist() == [2.0**-8]


@pytest.mark.filterwarnings("error")
def test_activations_at_infinity() -> None:
    x = np.array([np.inf, 3e38, -3e38, -np.inf, np.nan], np.float32)
    for kind in (np.float32, np.float64):
        assert str(nn.gelu(x[:3].astype(kind)) + 0) == str(np.array([np.inf, x[1], 0], kind))
    assert str(nn.gelu(x) + 0) == str(np.array([np.inf, x[1], 0, 0, np.nan], np.float32))


def test_rotary(rng: np.random.Generator) -> None:
    """Pairs turn as complex numbers do; a product of two rotated vectors depends on their distance alone."""
    x = rng.standard_normal((1, 1, 6, 8))
    turned = nn.rotary(x, 100.0, offset=3)
    pairs = x[..., :4] + 1j * x[..., 4:]
    exact = pairs * np.exp(1j * np.outer(np.arange(3, 9), 100.0 ** (-np.arange(4) / 4)))
    np.testing.assert_allclose(turned, np.concatenate([exact.real, exact.imag], -1), rtol=1e-12)
    q, k = rng.standard_normal((2, 1, 1, 1, 8))
    products = [(nn.rotary(q, offset=5 + i) * nn.rotary(k, offset=2 + i)).sum() for i in (0, 70)]
    assert math.isclose(*products, rel_tol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_attention_module(num_kv_heads: int | None, causal: bool, x: Any) -> None:
    layer = nn.DenseAttention(16, 4, num_kv_heads=num_kv_heads, causal=causal, rotary_base=50.0, seed=0)
    heads = layer.qkv(x).reshape(2, 9, -1, 4).transpose(0, 2, 1, 3)
    G = num_kv_heads or 4
    query, key, value = heads[:, :4], heads[:, 4 : 4 + G], heads[:, 4 + G :]
    attended = reference.attention(nn.rotary(query, 50.0), nn.rotary(key, 50.0), value, causal=causal)
    exact = layer.out(attended.transpose(0, 2, 1, 3).reshape(2, 9, 16))
    np.testing.assert_allclose(layer(x), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"^embed_dim: expected a multiple of the 3 heads, got 16$"),
        ({"num_kv_heads": 3}, r"^num_kv_heads: expected a divisor of 4 heads, got 3$"),
        ({"num_heads": 0}, r"^num_heads: expected at least 1, got 0$"),
        ({"num_kv_heads": 0}, r"^num_kv_heads: expected at least 1, got 0$"),
        ({"dropout": 1.5}, r"^dropout: expected a number from 0 to 1, got 1.5$"),
        (
            {"num_heads": 16, "rotary_base": 1e4},
            r"^rotary_base: expected None with an odd head size, got 10000$",
        ),
    ],
)
def test_heads_that_do_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(adaattn.ArgumentError, match=message):
        nn.DenseAttention(16, **({"num_heads": 4} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, r"^num_layers: expected at least 1, got 0$"),
        ({"max_seq_len": 0}, r"^max_seq_len: expected at least 1, got 0$"),
        ({"dropout": -0.1}, r"^dropout: expected a number from 0 to 1, got -0.1$"),
        ({"norm": "batchnorm"}, r"^norm: expected one of 'rmsnorm', 'layernorm', got 'batchnorm'$"),
        ({"norm_position": "mid"}, r"^norm_position: expected one of 'pre', 'post', got 'mid'$"),
        ({"positions": "sine"}, r"^positions: expected one of 'rotary', 'learned', .* got 'sine'$"),
        ({"activation": "elu"}, r"^activation: expected one of 'gelu', .*, 'swiglu', got 'elu'$"),
    ],
)
def test_models_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(adaattn.ArgumentError, match=message):
        nn.Transformer(50, **options)


def test_dropout_in_training_only(x: Any) -> None:
    layer = nn.DenseAttention(16, 4, dropout=0.5, seed=0)
    assert not np.array_equal(layer(x), layer(x))
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))
    again = nn.DenseAttention(16, 4, dropout=0.5, seed=0)
    np.testing.assert_array_equal(again(x), nn.DenseAttention(16, 4, dropout=0.5, seed=0)(x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_of_parameters_and_results(dtype: type, x: Any) -> None:
    layer = nn.DenseAttention(16, 4, dtype=dtype, seed=0)
    assert {parameter.dtype for parameter in layer.parameters()} == {np.dtype(dtype)}
    assert layer(x).dtype == dtype and layer(x.astype(float)).dtype == np.float64


def test_dtypes_that_are_refused() -> None:
    for make in (nn.DenseAttention, nn.AdaptivePrecisionAttention):
        with pytest.raises(adaattn.DTypeError, match=r"^dtype: expected float32 or float64, got int8$"):
            make(16, 4, dtype=np.int8)


@pytest.mark.parametrize("shape", [(2, 9, 8), (9, 16), (1, 2, 9, 16)])
def test_inputs_that_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(adaattn.ShapeError, match=r"^x: expected shape \(B, T, 16\), got \("):
        nn.DenseAttention(16, 4)(np.ones(shape, np.float32))


def test_block_is_pre_norm_with_residuals(x: Any) -> None:
    block = nn.TransformerBlock(16, 4, ffn_dim=20, seed=0)
    between = x + block.attn(block.norm1(x))
    np.testing.assert_array_equal(block(x), between + block.mlp(block.norm2(between)))
    assert block.mlp.up.weight.shape == (20, 16)


# ---- attention within a budget


@pytest.fixture
def long(rng: np.random.Generator) -> Any:
    """Heads long enough to be looked at and verified."""
    return rng.standard_normal((2, 320, 64), dtype=np.float32)


def adaptive(**options: Any) -> nn.AdaptivePrecisionAttention:
    return nn.AdaptivePrecisionAttention(64, 4, **({"seed": 5} | options)).eval()


def watch(layer: nn.MultiHeadAttention) -> list[Any]:
    """The options of the calls to come, and what they returned."""
    calls = []

    def attend(*arrays: Any, **options: Any) -> Any:
        result = adaattn.attention(*arrays, **options)
        calls.append((options, result))
        return result

    layer.attend = attend
    return calls


@pytest.mark.usefixtures("every_rung_pays")
def test_weights_move_between_attention_modules(long: Any) -> None:
    """In both directions, and with what the budget allows between the results."""
    dense, cheap = nn.DenseAttention(64, 4, seed=1), adaptive(policy="speed", seed=2)
    assert dense.state_dict().keys() == cheap.state_dict().keys()
    assert dense.num_parameters() == cheap.num_parameters() == 4 * (64 * 64 + 64)
    cheap.load_state_dict(dense.state_dict())
    exact = dense(long)
    assert 1e-4 < np.linalg.norm(cheap(long) - exact) / np.linalg.norm(exact) < 5e-2
    other = nn.DenseAttention(64, 4, seed=3)
    other.load_state_dict(cheap.state_dict())
    np.testing.assert_array_equal(other(long), exact)
    for change in ({"extra": 1}, {"qkv.weight": np.ones(3)}):
        with pytest.raises(adaattn.ArgumentError, match=f"^state: .*{next(iter(change))}"):
            cheap.load_state_dict(dense.state_dict() | change)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-2), ({"policy": "quality"}, 1e-5), ({"policy": "speed"}, 5e-2), ({"tolerance": 0.003}, 0.003)],
    ids=str,
)
def test_budgets(options: Any, tolerance: float, long: Any) -> None:
    """Every call passes on the budget, and asks for no report that nobody reads."""
    layer = adaptive(causal=True, **options)
    calls = watch(layer)
    layer(long)
    limits = {"min_precision": "auto", "max_precision": "auto"}
    assert layer.tolerance == tolerance
    assert [options for options, _ in calls] == [{"causal": True, "tolerance": tolerance, **limits}]


@pytest.mark.usefixtures("every_rung_pays")
def test_limits_of_precision(long: Any) -> None:
    free, dear = adaptive(collect_statistics=True), adaptive(collect_statistics=True, min_precision="bf16x3")
    for layer in (free, dear):
        layer(long)
    assert dear.get_statistics().precision_distribution.keys() <= {"fp64", "fp32", "bf16x6", "bf16x3"}
    assert free.get_statistics().precision_distribution.keys() & {"bf16", "int8/bf16", "int8"}
    cheap = adaptive(collect_statistics=True, policy="quality", max_precision="bf16")
    cheap(long)
    assert cheap.get_statistics().precision_distribution.keys() <= {"bf16", "int8/bf16", "int8"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"policy": "fast"},
            adaattn.ArgumentError,
            "policy: expected None or one of 'quality', .*, got 'fast'",
        ),
        ({"policy": "speed", "tolerance": 0.1}, adaattn.ArgumentError, "policy: expected None beside .*"),
        ({"tolerance": 0}, adaattn.ArgumentError, "tolerance: expected a finite number above 0, got 0"),
        ({"tolerance": "1"}, adaattn.DTypeError, "tolerance: expected a number, got str"),
        ({"min_precision": "int7"}, adaattn.ArgumentError, "min_precision: expected .*, got 'int7'"),
        ({"max_precision": "int7"}, adaattn.ArgumentError, "max_precision: expected .*, got 'int7'"),
        ({"replan_every": 0}, adaattn.ArgumentError, "replan_every: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_budgets_that_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        adaptive(**options)


@pytest.mark.usefixtures("every_rung_pays")
def test_another_policy(long: Any) -> None:
    layer = adaptive(policy="quality", replan_every=9)
    calls = watch(layer)
    layer(long)
    layer.set_precision_policy("speed")
    layer(long)
    assert layer.tolerance == calls[1][0]["tolerance"] == 5e-2
    with pytest.raises(adaattn.ArgumentError, match=r"^policy: expected None or one of .*, got 'fast'$"):
        layer.set_precision_policy("fast")
    layer.set_precision_policy(None)
    assert layer.tolerance == 1e-2


# ---- plans that serve several calls


@pytest.fixture
def planner(every_rung_pays: None) -> Any:
    """A module that plans every third call, its calls, and a function that says which of them planned."""
    layer = adaptive(replan_every=3)
    calls = watch(layer)
    return layer, calls, lambda: [int("plan" not in options) for options, _ in calls]


def test_a_plan_serves_so_many_calls(planner: Any, long: Any) -> None:
    layer, calls, planned = planner
    results = [layer(long) for _ in range(7)]
    assert planned() == [1, 0, 0, 1, 0, 0, 1]
    assert calls[1][0] == {"causal": False, "plan": calls[0][1][1].plan, "return_report": True}
    assert all((report.verified_rows > 0).all() for _, (_, report) in calls)
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_a_plan_ends_with_the_sizes(planner: Any, long: Any) -> None:
    layer, _, planned = planner
    for x in (long, long, long[:, :100], long[:, :100], long[:1], long[:1].astype(float)):
        layer(x)
    assert planned() == [1, 0, 1, 0, 1, 1]


def test_a_plan_ends_with_a_retry(planner: Any, long: Any) -> None:
    layer, calls, planned = planner
    for factor in (1, 3, 3):
        layer(np.float32(factor) * long)
    assert [bool(report.retried.any()) for _, (_, report) in calls[:2]] == [False, True]
    assert planned() == [1, 0, 1]


def test_a_plan_ends_with_a_measured_error(planner: Any, long: Any) -> None:
    layer, _, planned = planner
    layer(long)
    attend = layer.attend

    def spoilt(*arrays: Any, **options: Any) -> Any:
        out, report = attend(*arrays, **options)
        errors = report.measured_error.copy()
        errors[0] = np.nan
        errors[1, 1] = 0.011
        return out, dataclasses.replace(report, measured_error=errors)

    layer.attend = spoilt
    for _ in range(3):
        layer(long)
    assert planned() == [1, 0, 1, 1]


@pytest.mark.parametrize("collect_statistics", [False, True])
def test_without_a_number_every_call_plans(collect_statistics: bool, long: Any) -> None:
    layer = adaptive(collect_statistics=collect_statistics)
    calls = watch(layer)
    for _ in range(3):
        layer(long)
    assert all("plan" not in options for options, _ in calls)


# ---- statistics


@pytest.mark.usefixtures("every_rung_pays")
def test_statistics_are_those_of_the_reports(long: Any) -> None:
    layer = adaptive(collect_statistics=True, replan_every=2)
    calls = watch(layer)
    for factor in (1, 3, 3):
        layer(np.float32(factor) * long)
    reports = [report for _, (_, report) in calls]
    told, retried = layer.get_statistics(), sum(int(report.retried.sum()) for report in reports)
    assert retried > 0
    assert (told.call_count, told.plan_count, told.retried) == (3, 2, retried)
    rungs = {rates.split(rung): rung for rung in rates.RUNGS}
    names = []
    for report in reports:
        for qk, pv in zip(report.precision_qk.flat, report.precision_pv.flat, strict=True):
            names.append(rungs[qk if qk == pv else (qk, pv)])
    assert told.precision_distribution == {name: names.count(name) / 24 for name in names}
    assert len(told.precision_distribution) > 1 and math.isclose(sum(told.precision_distribution.values()), 1)
    assert told.measured_error == max(report.measured_error.max() for report in reports)
    assert told.mean_entropy == pytest.approx(np.nanmean([report.entropy for report in reports]))
    assert told.seconds == {phase: sum(r.seconds[phase] for r in reports) for phase in reports[0].seconds}
    layer.reset_statistics()
    assert layer.get_statistics().call_count == 0 and layer.get_statistics().precision_distribution == {}


def test_statistics_are_a_frozen_record() -> None:
    told = nn.DenseAttention(16, 4, collect_statistics=True).get_statistics()
    assert isinstance(told, nn.AttentionStatistics) and told.call_count == 0
    assert math.isnan(told.mean_entropy) and math.isnan(told.measured_error)
    with pytest.raises(dataclasses.FrozenInstanceError):
        told.call_count = 1


def test_statistics_of_exact_attention(x: Any) -> None:
    layer = nn.DenseAttention(16, 4, collect_statistics=True)
    layer(x)
    told = layer.get_statistics()
    assert told.precision_distribution == {"fp32": 1} and told.plan_count == 0
    assert math.isnan(told.measured_error) and told.seconds["execute"] > 0


def test_statistics_that_nobody_collected(x: Any) -> None:
    """No report is made; asking is an error, and what was collected before stays."""
    layer = nn.DenseAttention(16, 4).eval()
    calls = watch(layer)
    layer(x)
    assert calls[0][0] == {"causal": False}
    for ask in (layer.get_statistics, layer.get_precision_statistics):
        with pytest.raises(
            adaattn.ArgumentError, match=r"^collect_statistics: expected True before .* got False$"
        ):
            ask()
    layer.collect_statistics = True
    layer(x)
    layer.collect_statistics = False
    layer(x)
    assert layer.get_statistics().call_count == 1


@pytest.mark.usefixtures("every_rung_pays")
def test_precision_statistics(long: Any) -> None:
    layer = adaptive(collect_statistics=True)
    layer(long)
    told, shares = layer.get_precision_statistics(), layer.get_statistics().precision_distribution
    offered = adaattn.cpu_info()["rates"]["offered"]
    assert told.keys() == {"call_count", "precision_usage", "hardware_support"}
    assert told["call_count"] == 1 and sum(told["precision_usage"].values()) == 8
    assert {rung: n / 8 for rung, n in told["precision_usage"].items()} == shares
    assert told["hardware_support"] == {rung: rung in offered for rung in rates.RUNGS}


# ---- parameters


def test_train_and_eval_reach_every_module() -> None:
    model = small()
    assert model.eval() is model and not model.blocks[1].attn.qkv.training
    assert model.train() is model and model.blocks[1].attn.qkv.training


def test_parameters_count() -> None:
    model = small()
    block = 16 * 48 + 48 + 16 * 16 + 16 + 2 * (16 * 64) + 64 + 16 + 2 * 16
    assert model.num_parameters() == 50 * 16 * 2 + 2 * block + 16
    assert sum(p.size for p in model.parameters()) == model.num_parameters()


@pytest.mark.parametrize("tied_embeddings", [False, True])
def test_logits_start_small(tied_embeddings: bool, rng: np.random.Generator) -> None:
    model = nn.Transformer(50, num_layers=1, tied_embeddings=tied_embeddings, seed=0)
    assert 0.3 < model(rng.integers(0, 50, (2, 20))).std() < 1.5


def test_state_moves_between_models() -> None:
    tokens = np.arange(10)[None] % 50
    one, two = small(seed=1), small(seed=2)
    assert not np.array_equal(one(tokens), two(tokens))
    two.load_state_dict({key: value.copy() for key, value in one.state_dict().items()})
    np.testing.assert_array_equal(one(tokens), two(tokens))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda s: s.pop("norm.weight"),
            adaattn.ArgumentError,
            "state: expected every .*, got none for norm.weight",
        ),
        (lambda s: s.update(a=1, b=2), adaattn.ArgumentError, "state: expected only .*, got a, b"),
        (
            lambda s: s.update({"norm.weight": np.ones(3)}),
            adaattn.ShapeError,
            r"state: expected norm.weight of shape \(16,\), got \(3,\)",
        ),
    ],
)
def test_state_that_does_not_fit(change: Any, error: type[Exception], message: str) -> None:
    model = small()
    before = {key: value.copy() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    change(state)
    with pytest.raises(error, match=f"^{message}$"):
        model.load_state_dict(state)
    assert all(np.array_equal(value, before[key]) for key, value in model.state_dict().items())


# ---- the language model


@pytest.mark.parametrize("positions", ["rotary", "learned", "alibi", "none"])
def test_an_encoder_sees_both_sides_but_no_padding(positions: str, rng: np.random.Generator) -> None:
    model, tokens = small(causal=False, positions=positions).eval(), rng.integers(0, 50, (3, 12))
    lengths = np.array([12, 5, 1])
    logits = model(tokens, lengths=lengths)
    for row, length, found in zip(tokens, lengths, logits, strict=True):
        alone = model(row[None, :length])[0]
        np.testing.assert_allclose(found[:length], alone, rtol=1e-4, atol=1e-5)
    changed = tokens.copy()
    changed[0, 11] = (changed[0, 11] + 1) % 50
    assert not np.allclose(model(changed, lengths=lengths)[0, 0], logits[0, 0], atol=1e-4)


def test_future_tokens_change_nothing(rng: np.random.Generator) -> None:
    model, tokens = small(), rng.integers(0, 50, (2, 12))
    changed = tokens.copy()
    changed[:, 7:] += 1
    changed %= 50
    np.testing.assert_allclose(model(tokens)[:, :7], model(changed)[:, :7], rtol=1e-5, atol=1e-6)
    assert not np.allclose(model(tokens)[:, 7:], model(changed)[:, 7:])


@pytest.mark.usefixtures("every_rung_pays")
def test_model_within_a_budget(rng: np.random.Generator) -> None:
    """Every layer keeps it and tells of it; the weights are those of the exact model, and it generates."""
    tokens, exact = rng.integers(0, 50, (2, 512)), small().eval()
    model = small(policy="speed", collect_statistics=True).eval()
    logits = model(tokens)
    assert model.state_dict().keys() == exact.state_dict().keys()
    assert 0 < np.linalg.norm(logits - exact(tokens)) / np.linalg.norm(logits) < 5e-2
    told = model.per_layer_statistics()
    assert [layer.call_count for layer in told] == [1, 1]
    assert all(0 < layer.measured_error < 5e-2 for layer in told)
    assert all(layer.precision_distribution.keys() - {"fp64", "fp32"} for layer in told)
    assert model.generate(tokens[:, :5], 3).shape == (2, 8)
    assert [layer.call_count for layer in model.per_layer_statistics()] == [4, 4]
    assert small(tolerance=0.5).blocks[1].attn.tolerance == 0.5
    with pytest.raises(adaattn.ArgumentError, match=r"^collect_statistics: "):
        small().per_layer_statistics()


def test_model_in_float64(rng: np.random.Generator) -> None:
    model = small(dtype=np.float64).eval()
    assert model(rng.integers(0, 50, (1, 4))).dtype == np.float64
    assert model.generate(np.array([[1, 2]]), 2).shape == (1, 4)


# ---- the bundled model


@pytest.fixture
def bundled() -> nn.Transformer:
    return nn.Transformer.load(MODEL)


def test_bundled_model(bundled: nn.Transformer) -> None:
    assert not bundled.training and bundled.num_parameters() == 3_279_104
    assert len(bundled.blocks) == 4 and bundled.blocks[0].attn.num_heads == 4
    assert type(bundled.blocks[0].attn) is nn.DenseAttention
    cheap = nn.Transformer.load(MODEL, policy="speed", replan_every=2)
    assert [block.attn.tolerance for block in cheap.blocks] == [5e-2] * 4 and not cheap.training


def test_bundled_model_on_its_first_bytes(bundled: nn.Transformer) -> None:
    text = np.frombuffer((demo.DATA / "sample.txt").read_bytes(), np.uint8)[:513]
    assert abs(demo.bits_per_byte(bundled(text[None, :-1])[0], text, 512) - 1.706354) < 1e-4


# ---- a whole model's statistics


@pytest.fixture
def told(rng: np.random.Generator) -> Any:
    """Statistics of a model whose second layer is called more often than its first."""
    model = small(tolerance=0.5, collect_statistics=True).eval()
    model(rng.integers(0, 50, (2, 320)))
    model.blocks[1].attn(rng.standard_normal((1, 300, 16)).astype(np.float32))
    return model.statistics()


def test_statistics_of_a_model(told: nn.ModelStatistics) -> None:
    assert [layer.call_count for layer in told.layers.values()] == [1, 2] and told.total.call_count == 3
    assert told.total.measured_error == max(layer.measured_error for layer in told.layers.values())
    heads = [8, 12]
    for name, share in told.total.precision_distribution.items():
        parts = [layer.precision_distribution.get(name, 0) for layer in told.layers.values()]
        assert share == pytest.approx(np.dot(parts, heads) / 20)
    assert told.total.sparse_ratio == told.total.low_rank_ratio == 0
    assert math.isnan(told.total.mean_rank)
    for phase, seconds in told.total.seconds.items():
        assert seconds == pytest.approx(sum(layer.seconds[phase] for layer in told.layers.values()))


def test_structures_count(told: nn.ModelStatistics, long: Any) -> None:
    """Whatever reports say: heads of low rank and sparse ones, and the rank of the former."""
    layer = nn.DenseAttention(64, 4, collect_statistics=True).eval()
    attend = layer.attend

    def structured(*arrays: Any, **options: Any) -> Any:
        out, report = attend(*arrays, **options)
        structure = np.array([["dense", "sparse", "low_rank", "low_rank"]] * 2)
        rank = np.where(structure == "low_rank", [10, 10, 10, 30], 0)
        return out, dataclasses.replace(report, structure=structure, rank=rank)

    layer.attend = structured
    layer(long)
    statistics = layer.get_statistics()
    assert (statistics.sparse_ratio, statistics.low_rank_ratio, statistics.mean_rank) == (0.25, 0.5, 20)


def test_views_of_statistics(told: nn.ModelStatistics) -> None:
    header, *lines = told.table().splitlines()
    assert header.split()[:3] == ["layer", "calls", "precision"]
    assert [line.split()[:2] for line in lines] == [["0", "1"], ["1", "2"], ["all", "3"]]
    assert all("%" in line and "s" in line for line in lines)
    plain = json.loads(told.to_json())
    assert {name: layer["call_count"] for name, layer in plain["layers"].items()} == {"0": 1, "1": 2}
    assert plain["total"]["mean_rank"] is None and plain["total"]["seconds"]["execute"] > 0
    infinite = dataclasses.replace(told, total=dataclasses.replace(told.total, measured_error=math.inf))
    assert json.loads(infinite.to_json())["total"]["measured_error"] == "Infinity"


def test_figure_of_statistics(told: nn.ModelStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figure = told.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    precision, seconds = figure.axes
    heights = [sum(bar[i].get_height() for bar in precision.containers) for i in range(2)]
    assert heights == pytest.approx([1, 1])
    for axes in (precision, seconds):
        for below, above in pairwise(axes.containers):
            assert all(
                b.get_y() == pytest.approx(a.get_y() + a.get_height())
                for a, b in zip(below, above, strict=True)
            )
    total = sum(bar.get_height() for bars in seconds.containers for bar in bars)
    assert total == pytest.approx(1e3 * sum(told.total.seconds.values()))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^ModelStatistics.plot needs matplotlib: "):
        told.plot()


def test_a_model_forgets_its_statistics() -> None:
    model = small(collect_statistics=True).eval()
    model.generate(np.array([[1, 2, 3]]), 4)
    assert [layer.call_count for layer in model.per_layer_statistics()] == [4, 4]
    model.reset_statistics()
    assert model.statistics().total.call_count == 0
    assert math.isnan(model.statistics().total.sparse_ratio)


def test_everything_dropped() -> None:
    drop, x = nn.Dropout(1.0, seed=0), np.ones((2, 3), np.float32)
    assert not drop(x).any() and not drop.backward(x).any()
    attend = nn.DenseAttention(8, 2, dropout=1, bias=False, seed=0)
    x = np.ones((1, 5, 8), np.float32)
    assert not attend(x).any() and not attend.backward(x).any()
