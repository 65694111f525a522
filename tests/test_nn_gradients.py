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


# ---- beside torch


def torch_logits(torch: Any, config: dict[str, Any], state: dict[str, Any], tokens: Any, lengths: Any) -> Any:
    """The model by torch's functions, from its config and its parameters as tensors."""
    functional = torch.nn.functional
    B, T = tokens.shape
    embed_dim, H = config["embed_dim"], config["num_heads"]
    G, D = config["num_kv_heads"] or H, embed_dim // H
    at, dtype = torch.arange(T), state["embed.weight"].dtype

    def norm(x: Any, path: str) -> Any:
        if config["norm"] == "layernorm":
            return functional.layer_norm(x, (embed_dim,), state[f"{path}.weight"], state[f"{path}.bias"])
        return functional.rms_norm(x, (embed_dim,), state[f"{path}.weight"], eps=2.0**-23)

    def linear(x: Any, path: str) -> Any:
        return functional.linear(x, state[f"{path}.weight"], state.get(f"{path}.bias"))

    def turned(x: Any) -> Any:
        if config["positions"] != "rotary":
            return x
        half = D // 2
        angle = torch.outer(at.double(), 10_000.0 ** (-torch.arange(half).double() / half))
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return torch.cat(
            [x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1
        )

    bias = torch.zeros(B, H, T, T, dtype=dtype)
    if config["positions"] == "alibi":
        slopes = torch.tensor([2.0 ** (-8 * (h + 1) / H) for h in range(H)], dtype=dtype)
        bias = bias - slopes[:, None, None] * (at[:, None] - at).abs()
    if config["causal"]:
        bias = bias.masked_fill(at[:, None] < at, -torch.inf)
    if lengths is not None:
        bias = bias.masked_fill(at >= torch.as_tensor(lengths)[:, None, None, None], -torch.inf)

    def attention(x: Any, path: str) -> Any:
        heads = linear(x, f"{path}.qkv").view(B, T, H + 2 * G, D).transpose(1, 2)
        query, key, value = turned(heads[:, :H]), turned(heads[:, H : H + G]), heads[:, H + G :]
        key, value = (x.repeat_interleave(H // G, dim=1) for x in (key, value))
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return linear(out.transpose(1, 2).reshape(B, T, embed_dim), f"{path}.out")

    def mlp(x: Any, path: str) -> Any:
        activation = config["activation"]
        if activation == "swiglu":
            return linear(
                functional.silu(linear(x, f"{path}.gate")) * linear(x, f"{path}.up"), f"{path}.down"
            )
        function = {
            "gelu": functional.gelu,
            "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
            "relu2": lambda y: functional.relu(y) ** 2,
        }[activation]
        return linear(function(linear(x, f"{path}.up")), f"{path}.down")

    x = functional.embedding(tokens, state["embed.weight"])
    if config["positions"] == "learned":
        x = x + state["positions.weight"][:T]
    for i in range(config["num_layers"]):
        path = f"blocks.{i}"
        if config["norm_position"] == "pre":
            x = x + attention(norm(x, f"{path}.norm1"), f"{path}.attn")
            x = x + mlp(norm(x, f"{path}.norm2"), f"{path}.mlp")
        else:
            x = norm(x + attention(x, f"{path}.attn"), f"{path}.norm1")
            x = norm(x + mlp(x, f"{path}.mlp"), f"{path}.norm2")
    if config["norm_position"] == "pre":
        x = norm(x, "norm")
    return functional.linear(x, state["embed.weight" if config["tied_embeddings"] else "head.weight"])


@pytest.mark.parametrize("dtype", [np.float32, F64])
@pytest.mark.parametrize("name", MODELS)
def test_models_beside_torch(name: str, dtype: Any, rng: np.random.Generator) -> None:
    """Logits and the gradient of every parameter."""
    torch = pytest.importorskip("torch")
    model = shaken(model_of(MODELS[name], dtype=dtype, dropout=0.0), rng)
    tokens, targets = rng.integers(0, 11, (2, 3, 9))
    lengths = None if model.config["causal"] else np.array([9, 4, 1])
    if lengths is not None:
        targets[np.arange(9) >= lengths[:, None]] = -100
    state = {key: torch.from_numpy(x.copy()).requires_grad_() for key, x in model.state_dict().items()}
    theirs = torch_logits(torch, model.config, state, torch.from_numpy(tokens), lengths)
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), torch.from_numpy(targets).flatten())
    loss.backward()

    logits = model(tokens, lengths=lengths)
    ours, grad = nn.cross_entropy(logits, targets)
    model.backward(grad)
    near = 3e-6 if dtype == np.float32 else 1e-12
    counted = targets != -100
    assert ours == pytest.approx(loss.item(), rel=near)
    np.testing.assert_allclose(logits[counted], theirs.detach().numpy()[counted], rtol=10 * near, atol=near)
    for key, gradient in model.gradients().items():
        exact = state[key].grad.numpy()
        assert np.abs(gradient - exact).max() <= 10 * near * max(np.abs(exact).max(), 1e-3), key
