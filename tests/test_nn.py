"""The modules against formulas written out, model files against their format, generation against reading."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adaattn
from adaattn import demo, nn, reference

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
    ],
)
def test_heads_that_do_not_fit(options: dict[str, int], message: str) -> None:
    with pytest.raises(adaattn.ArgumentError, match=message):
        nn.DenseAttention(16, **({"num_heads": 4} | options))


def test_dropout_in_training_only(x: Any) -> None:
    layer = nn.DenseAttention(16, 4, dropout=0.5, seed=0)
    assert not np.array_equal(layer(x), layer(x))
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))
    again = nn.DenseAttention(16, 4, dropout=0.5, seed=0)
    np.testing.assert_array_equal(again(x), nn.DenseAttention(16, 4, dropout=0.5, seed=0)(x))


def test_block_is_pre_norm_with_residuals(x: Any) -> None:
    block = nn.TransformerBlock(16, 4, ffn_dim=20, seed=0)
    between = x + block.attn(block.norm1(x))
    np.testing.assert_array_equal(block(x), between + block.mlp(block.norm2(between)))
    assert block.mlp.up.weight.shape == (20, 16)


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


def test_future_tokens_change_nothing(rng: np.random.Generator) -> None:
    model, tokens = small(), rng.integers(0, 50, (2, 12))
    changed = tokens.copy()
    changed[:, 7:] += 1
    changed %= 50
    np.testing.assert_allclose(model(tokens)[:, :7], model(changed)[:, :7], rtol=1e-5, atol=1e-6)
    assert not np.allclose(model(tokens)[:, 7:], model(changed)[:, 7:])


def test_generation_agrees_with_reading_again(rng: np.random.Generator) -> None:
    model, tokens = small().eval(), rng.integers(0, 50, (2, 5))
    generated = model.generate(tokens, 8)
    for _ in range(8):
        tokens = np.concatenate([tokens, model(tokens)[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(generated, tokens)
    np.testing.assert_array_equal(model.generate(tokens, 0), tokens)


@pytest.mark.parametrize("prompt", [[1, 2], np.zeros((1, 0), int), np.zeros((0, 2), int)], ids=str)
def test_prompts_that_are_refused(prompt: Any) -> None:
    with pytest.raises(adaattn.ShapeError, match=r"^prompt: expected shape \(B, T\) with B, T >= 1, got "):
        small().generate(prompt, 1)


# ---- model files


@pytest.fixture
def bundled() -> nn.Transformer:
    pytest.importorskip("safetensors")
    return nn.Transformer.load(MODEL)


def test_bundled_model(bundled: nn.Transformer) -> None:
    assert not bundled.training and bundled.num_parameters() == 3_279_104
    assert len(bundled.blocks) == 4 and bundled.blocks[0].attn.num_heads == 4


def test_bundled_model_on_its_first_bytes(bundled: nn.Transformer) -> None:
    text = np.frombuffer((demo.DATA / "sample.txt").read_bytes(), np.uint8)[:513]
    assert abs(demo.bits_per_byte(bundled(text[None, :-1])[0], text[1:]) - 1.706354) < 1e-4


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Function that writes the small model with a config, and gives its path."""
    numpy_io = pytest.importorskip("safetensors.numpy")
    config = {"vocab_size": 50, "num_layers": 2, "num_heads": 4, "embed_dim": 16, "activation": "gelu"}

    def save(metadata: bool = True, **changes: Any) -> Path:
        text = {"config": json.dumps(config | changes)} if metadata else None
        state = {key: value.astype(np.float16) for key, value in small().state_dict().items()}
        numpy_io.save_file(state, tmp_path / "model.safetensors", metadata=text)
        return tmp_path / "model.safetensors"

    return save


def test_file_of_a_model(saved: Any) -> None:
    model = nn.Transformer.load(saved())
    for key, value in small().state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[key], value.astype(np.float16))


def test_files_that_are_refused(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        adaattn.ArgumentError, match=r"^path: expected a file with config in its metadata, got .*model"
    ):
        nn.Transformer.load(saved(metadata=False))
    with pytest.raises(
        adaattn.ArgumentError, match=r"^path: expected a model with activation 'gelu', got 'relu'"
    ):
        nn.Transformer.load(saved(activation="relu"))
    with pytest.raises(adaattn.ArgumentError, match=r"^state: expected every parameter"):
        nn.Transformer.load(saved(num_layers=3))
    with pytest.raises(FileNotFoundError):
        nn.Transformer.load("nowhere.safetensors")
