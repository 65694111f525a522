"""Loss, optimiser, clipping and schedule; training that resumes to the same bits, and outlives a kill."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import adaattn
from adaattn import nn
from adaattn.nn import files

EXAMPLE = ROOT / "examples" / "train_bytes.py"
PATH = {"PYTHONPATH": str(Path(adaattn.__file__).parents[1])}


def small(**options: Any) -> nn.Transformer:
    sizes = {"num_layers": 2, "num_heads": 4, "embed_dim": 16, "dropout": 0.2, "seed": 3}
    return nn.Transformer(30, **(sizes | options))


def step(model: nn.Transformer, optimizer: nn.AdamW, number: int) -> float:
    tokens = np.random.default_rng(number).integers(0, 30, (4, 13))
    loss, grad = nn.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    model.zero_grad()
    model.backward(grad)
    nn.clip_grad_norm(model, 1.0)
    optimizer.step()
    return loss


# ---- loss


def test_cross_entropy(rng: np.random.Generator) -> None:
    logits, targets = 5 * rng.standard_normal((2, 4, 7)), rng.integers(0, 7, (2, 4))
    targets[0, 1] = targets[1, 3] = -100
    loss, grad = nn.cross_entropy(logits, targets)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counts = targets >= 0
    chosen = np.take_along_axis(p, np.maximum(targets, 0)[..., None], -1)[..., 0]
    assert loss == pytest.approx(-np.log(chosen[counts]).mean(), rel=1e-12)
    exact = (p - np.eye(7)[np.maximum(targets, 0)]) * counts[..., None] / 6
    np.testing.assert_allclose(grad, exact, atol=1e-14)
    assert nn.cross_entropy(logits.astype(np.float32), targets)[1].dtype == np.float32
    other = np.where(counts, targets, 3)
    assert nn.cross_entropy(logits, other, ignore_index=3)[0] == pytest.approx(
        -np.log(chosen[other != 3]).mean(), rel=1e-12
    )


def test_cross_entropy_of_extremes() -> None:
    loss, grad = nn.cross_entropy(np.array([[1e4, -1e4]], np.float32), [1])
    assert loss == 2e4 and grad.tolist() == [[1, -1]]
    loss, grad = nn.cross_entropy(np.ones((2, 3)), [-100, -100])
    assert math.isnan(loss) and not grad.any()
    assert math.isnan(nn.cross_entropy(np.array([[np.nan, 1]]), [0])[0])
    with pytest.raises(
        adaattn.ArgumentError, match=r"^targets: expected -100 or ids from 0 to 2, got 0 to 3$"
    ):
        nn.cross_entropy(np.ones((2, 3)), [0, 3])
    with pytest.raises(adaattn.ShapeError, match=r"^targets: expected shape \(2,\), got \(3,\)$"):
        nn.cross_entropy(np.ones((2, 3)), [0, 1, 2])
    with pytest.raises(adaattn.DTypeError, match=r"^targets: expected integers, got float64$"):
        nn.cross_entropy(np.ones((2, 3)), [0.0, 1.0])


# ---- steps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adamw_beside_torch(dtype: Any, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    layer = nn.Linear(5, 3, dtype=dtype, seed=0)
    ours = nn.AdamW(layer, 0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    weight, bias = (torch.nn.Parameter(torch.from_numpy(x.copy())) for x in layer.parameters())
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, 0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    for i in range(6):
        ours.lr = theirs.param_groups[0]["lr"] = theirs.param_groups[1]["lr"] = 0.1 / (1 + i)
        for parameter, name in ((weight, "weight"), (bias, "bias")):
            gradient = rng.standard_normal(parameter.shape).astype(dtype)
            layer.gradients()[name][...] = gradient
            parameter.grad = torch.from_numpy(gradient.copy())
        ours.step()
        theirs.step()
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(layer.weight, weight.detach().numpy(), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(layer.bias, bias.detach().numpy(), rtol=rtol, atol=rtol)


def test_adamw_state() -> None:
    layer, other = nn.Linear(2, 3, seed=0), nn.Linear(2, 4, seed=0)
    with pytest.raises(
        adaattn.ShapeError, match=r"^state: expected mean.weight of shape \(3, 2\), got \(4, 2\)"
    ):
        nn.AdamW(layer).load_state_dict(nn.AdamW(other).state_dict())
    with pytest.raises(adaattn.ArgumentError, match=r"^state: .*'mean.bias'"):
        nn.AdamW(layer).load_state_dict(nn.AdamW(nn.Linear(2, 3, bias=False)).state_dict())
    with pytest.raises(adaattn.ArgumentError, match=r"^betas: expected numbers from 0 to below 1"):
        nn.AdamW(layer, betas=(0.9, 1.0))


def test_clipping(rng: np.random.Generator) -> None:
    block = nn.TransformerBlock(8, 2, seed=0)
    for gradient in block.gradients().values():
        gradient[...] = rng.standard_normal(gradient.shape)
    before = {name: x.copy() for name, x in block.gradients().items()}
    norm = math.sqrt(sum(float((x.astype(float) ** 2).sum()) for x in before.values()))
    assert nn.clip_grad_norm(block, 2 * norm) == pytest.approx(norm, rel=1e-6)
    assert all((x == before[name]).all() for name, x in block.gradients().items())
    assert nn.clip_grad_norm(block, 0.5) == pytest.approx(norm, rel=1e-6)
    assert nn.clip_grad_norm(block, 1.0) == pytest.approx(0.5, rel=1e-6)
    np.testing.assert_allclose(
        block.gradients()["mlp.up.bias"], before["mlp.up.bias"] * 0.5 / norm, rtol=1e-5
    )
    block.gradients()["norm1.weight"][0] = np.nan
    assert math.isnan(nn.clip_grad_norm(block, 1.0)) and np.isnan(block.gradients()["mlp.up.bias"]).all()
    with pytest.raises(adaattn.ArgumentError, match=r"^max_norm: expected a finite number above 0, got 0$"):
        nn.clip_grad_norm(block, 0)


def test_schedule() -> None:
    rates = [nn.cosine_schedule(i, total=14, peak=2.0, warmup=4, floor=0.5) for i in range(17)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[9] == pytest.approx(1.25) and rates[14:] == [0.5] * 3
    assert all(a > b for a, b in pairwise(rates[4:15]))
    assert nn.cosine_schedule(0, total=0, peak=1.0) == 1.0
    with pytest.raises(adaattn.ArgumentError, match=r"^warmup: expected 0 <= warmup <= total"):
        nn.cosine_schedule(0, total=3, peak=1.0, warmup=4)


# ---- training


def test_backward_needs_a_call_in_training() -> None:
    model, tokens = small(), np.ones((1, 4), int)
    grad = np.ones((1, 4, 30), np.float32)
    with pytest.raises(adaattn.ArgumentError, match=r"^backward: expected a call in training before it"):
        model.backward(grad)
    model(tokens)
    model.backward(grad)
    with pytest.raises(adaattn.ArgumentError, match=r"^backward: expected a call in training before it"):
        model.backward(grad)
    model(tokens)
    model.eval()
    with pytest.raises(adaattn.ArgumentError, match=r"^backward: expected a call in training before it"):
        model.backward(grad)
    model(tokens)
    with pytest.raises(adaattn.ArgumentError, match=r"^backward: expected a call in training before it"):
        model.backward(grad)


def test_gradients_add_up_until_they_are_zeroed(rng: np.random.Generator) -> None:
    model, tokens = small(dropout=0.0), rng.integers(0, 30, (2, 6))
    assert model.gradients().keys() == model.state_dict().keys()
    assert not any(x.any() for x in model.gradients().values())
    grad = rng.standard_normal((2, 6, 30)).astype(np.float32)
    model(tokens)
    model.backward(grad)
    once = {name: x.copy() for name, x in model.gradients().items()}
    model(tokens)
    model.backward(grad)
    for name, x in model.gradients().items():
        np.testing.assert_allclose(x, 2 * once[name], rtol=1e-6)
    model.zero_grad()
    assert not any(x.any() for x in model.gradients().values())


@pytest.mark.parametrize("options", [{}, {"policy": "balanced"}, {"positions": "alibi", "norm": "layernorm"}])
def test_a_sequence_is_learned_by_heart(options: dict[str, Any]) -> None:
    model = small(dropout=0.0, **options)
    optimizer, tokens = nn.AdamW(model, 0.01), np.random.default_rng(1).integers(0, 30, (2, 25))
    for _ in range(60):
        loss, grad = nn.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        model.zero_grad()
        model.backward(grad)
        optimizer.step()
    assert loss < 0.1
    written = model.generate(tokens[:, :4], 21)
    np.testing.assert_array_equal(written, tokens)


def test_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """With dropout, whose generator goes on as well."""
    one = small()
    optimizer = nn.AdamW(one, 0.01)
    losses = [step(one, optimizer, i) for i in range(4)]
    nn.save_checkpoint(tmp_path / "run", one, optimizer, {"losses": losses})
    losses += [step(one, optimizer, i) for i in range(4, 8)]

    two = small(seed=99)
    fresh = nn.AdamW(two, 0.01)
    kept = nn.load_checkpoint(tmp_path / "run", two, fresh)["losses"]
    assert kept == losses[:4]
    assert [step(two, fresh, i) for i in range(4, 8)] == losses[4:]
    for name, parameter in one.state_dict().items():
        np.testing.assert_array_equal(two.state_dict()[name], parameter)


# ---- the example


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_bytes(bytes(range(32, 127)) * 40)
    return tmp_path / "text"


def command(text: Path, out: Path, steps: int, *more: str) -> list[str]:
    sizes = {"text": text, "out": out, "steps": steps, "layers": 1, "heads": 2, "dim": 16, "batch": 2}
    sizes |= {"length": 16, "every": 4, "dropout": 0.1, "write": 8, "warmup": 2}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    return [sys.executable, str(EXAMPLE), *options, *more]


def final(out: Path, name: str = "exact") -> dict[str, Any]:
    return files.read(out / f"{name}.safetensors")[0]


@pytest.mark.skipif(not EXAMPLE.exists(), reason="needs a checkout")
def test_a_killed_run_loses_at_most_one_interval(text: Path, tmp_path: Path) -> None:
    """Killed at whatever point, it continues from its last checkpoint and ends in the same bits."""
    whole, killed, environment, total = tmp_path / "whole", tmp_path / "killed", os.environ | PATH, 300
    subprocess.run(command(text, whole, total), env=environment, check=True, capture_output=True)
    checkpoint, reached = killed / "exact.checkpoint.safetensors", [0]
    for _ in range(2):
        run = subprocess.Popen(command(text, killed, total), env=environment, stdout=subprocess.PIPE)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        end = time.monotonic() + 60
        while time.monotonic() < end and run.poll() is None:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
                break
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        steps = len(json.loads(files.read(checkpoint)[1]["extra"])["losses"])
        assert steps % 4 == 0 and reached[-1] < steps < total
        reached.append(steps)
    checkpoint.with_name(checkpoint.name + ".tmp").write_bytes(b"half a checkpoint")
    subprocess.run(command(text, killed, total), env=environment, check=True, capture_output=True)
    for name, parameter in final(whole).items():
        np.testing.assert_array_equal(final(killed)[name], parameter)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="needs a checkout")
@pytest.mark.usefixtures("every_rung_pays")
def test_exact_and_adaptive_training_side_by_side(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("train_bytes", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_bytes"] = module
    spec.loader.exec_module(module)
    options = {"policy": "speed", "lr": 0.01, "batch": 1, "length": 512, "dim": 64, "heads": 4, "dropout": 0}
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    arguments = command(text, tmp_path / "out", 30, "--compare", *more)[2:]
    assert module.main(arguments) == 0
    out = capsys.readouterr().out
    told = json.loads(out[out.index("{") :])
    assert told["runs"].keys() == {"exact", "adaptive", "exact, another seed"}
    first = module.batch(module.read_text(text), 2, 16, 0, 0)
    assert first[0].shape == (2, 16) and (first[0][:, 1:] == first[1][:, :-1]).all()
    for name, run in told["runs"].items():
        assert run["held_out_bits_per_byte"] < 6 < math.log2(256), name
    assert told["runs"]["exact"]["rungs"] == {"fp32": 1} and "fp32" not in told["runs"]["adaptive"]["rungs"]
    assert 0 < abs(told["adaptive_minus_exact"]) < 0.1
    assert (tmp_path / "out" / "exact.safetensors").exists()
    model = nn.Transformer.load(tmp_path / "out" / "adaptive.safetensors")
    assert model.config["embed_dim"] == 64
