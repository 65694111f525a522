"""Gradients of the modules: by finite differences in float64, beside torch, and of training as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from adaattn import nn

F64 = np.float64
C = 12

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(C, 5, dtype=F64, seed=1),
    "linear without bias": lambda: nn.Linear(C, 5, bias=False, dtype=F64, seed=1),
    "layer norm": lambda: nn.LayerNorm(C, dtype=F64),
    "RMS norm": lambda: nn.RMSNorm(C, dtype=F64),
    **{
        f"feed-forward, {name}": lambda name=name: nn.FeedForward(C, 7, activation=name, dtype=F64, seed=1)
        for name in ("gelu", "gelu_tanh", "silu", "relu", "relu2", "swiglu")
    },
    "attention": lambda: nn.MultiHeadAttention(C, 2, dtype=F64, seed=1),
    "causal attention": lambda: nn.DenseAttention(C, 2, causal=True, bias=False, dtype=F64, seed=1),
    "rotary attention, grouped": lambda: nn.DenseAttention(
        C, 3, num_kv_heads=1, rotary_base=9.0, causal=True, dtype=F64, seed=1
    ),
    "attention with ALiBi": lambda: nn.DenseAttention(C, 3, alibi=True, dtype=F64, seed=1),
    "attention with dropout": lambda: nn.DenseAttention(C, 2, dropout=0.4, dtype=F64, seed=1),
    "attention within a budget": lambda: nn.AdaptivePrecisionAttention(
        C, 2, tolerance=1e-12, dtype=F64, seed=1
    ),
    "dropout": lambda: nn.Dropout(0.4, seed=1),
    "pre-norm block": lambda: nn.TransformerBlock(C, 2, ffn_dim=7, dtype=F64, dropout=0.2, seed=1),
    "post-norm block": lambda: nn.TransformerBlock(
        C, 2, ffn_dim=7, norm="layernorm", norm_position="post", dtype=F64, dropout=0.2, seed=1
    ),
}

MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "learned, post-norm, tied": {
        "positions": "learned",
        "norm": "layernorm",
        "norm_position": "post",
        "tied_embeddings": True,
        "activation": "gelu_tanh",
    },
    "encoder with ALiBi": {"positions": "alibi", "causal": False},
    "grouped swiglu, dropout": {"activation": "swiglu", "num_kv_heads": 1, "dropout": 0.3, "bias": False},
    "no positions": {"positions": "none", "activation": "relu2"},
}


def model_of(options: dict[str, Any], **more: Any) -> nn.Transformer:
    sizes = {"num_layers": 2, "num_heads": 2, "embed_dim": C, "ffn_dim": 14, "max_seq_len": 9, "seed": 2}
    return nn.Transformer(11, **(sizes | options | more))


def shaken(module: nn.Module, rng: np.random.Generator) -> nn.Module:
    """With biases and norms that are not all zeros and ones."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * rng.standard_normal(parameter.shape)
    return module


def check_gradients(module: nn.Module, loss: Callable[[], float], arrays: dict[str, Any], found: Any) -> None:
    """Of some entries of each array against central differences; dropout is the same in every call."""
    state, rng = module.random_state(), np.random.default_rng(7)
    for name, array in arrays.items():
        for at in rng.choice(array.size, min(array.size, 12), replace=False):
            values, index = [], np.unravel_index(at, array.shape)
            before = array[index]
            for step in (-1e-6, 1e-6):
                module.set_random_state(state)
                array[index] = before + step
                values.append(loss())
            array[index] = before
            difference = (values[1] - values[0]) / 2e-6
            assert found[name][index] == pytest.approx(difference, rel=1e-6, abs=1e-7), (name, index)


@pytest.mark.parametrize("name", MODULES)
def test_finite_differences(name: str, rng: np.random.Generator) -> None:
    module = shaken(MODULES[name](), rng)
    x = rng.standard_normal((2, 5, C))
    state = module.random_state()
    y = module(x)
    weights = rng.standard_normal(y.shape)
    grad = module.backward(weights)
    assert grad.shape == x.shape and grad.dtype == F64
    found = module.gradients() | {"x": grad}
    module.set_random_state(state)
    check_gradients(module, lambda: float((module(x) * weights).sum()), module.state_dict() | {"x": x}, found)


@pytest.mark.parametrize("name", MODELS)
def test_finite_differences_of_models(name: str, rng: np.random.Generator) -> None:
    model = shaken(model_of(MODELS[name], dtype=F64), rng)
    tokens, targets = rng.integers(0, 11, (2, 2, 7))
    lengths = None if model.config["causal"] else np.array([7, 4])
    if lengths is not None:
        targets[1, 4:] = -100
    state = model.random_state()

    def loss() -> float:
        return nn.cross_entropy(model(tokens, lengths=lengths), targets)[0]

    assert model.backward(nn.cross_entropy(model(tokens, lengths=lengths), targets)[1]) is None
    model.set_random_state(state)
    check_gradients(model, loss, model.state_dict(), model.gradients())


def test_embedding_gradient(rng: np.random.Generator) -> None:
    table, tokens = nn.Embedding(7, 3, dtype=F64, seed=0), np.array([[1, 6, 1], [0, 1, 4]])
    table(tokens)
    grad = rng.standard_normal((2, 3, 3))
    assert table.backward(grad) is None
    exact = np.zeros((7, 3))
    np.add.at(exact, tokens, grad)
    np.testing.assert_allclose(table.gradients()["weight"], exact, rtol=1e-12)
