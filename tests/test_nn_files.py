"""Model files and checkpoints: round trips, damage, and what a killed training run leaves."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adaattn
from adaattn import nn
from adaattn.nn import files

TOKENS = np.arange(24).reshape(2, 12) % 50

FAMILIES: dict[str, dict[str, Any]] = {
    "reference": {},
    "learned, post-norm, tied": {
        "positions": "learned",
        "norm": "layernorm",
        "norm_position": "post",
        "norm_eps": 1e-6,
        "tied_embeddings": True,
    },
    "llama": {"activation": "swiglu", "num_kv_heads": 2, "bias": False, "rotary_base": 5e5},
    "encoder": {"positions": "alibi", "causal": False, "dropout": 0.1},
    "no positions, float64": {"positions": "none", "activation": "relu2", "dtype": np.float64},
}


def small(**options: Any) -> nn.Transformer:
    sizes = {"num_layers": 2, "num_heads": 4, "embed_dim": 16, "max_seq_len": 12, "seed": 3}
    return nn.Transformer(50, **(sizes | options))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    model = small(**FAMILIES[family]).eval()
    for parameter in model.parameters():
        parameter += 0.25  # biases and norms are not what they start as
    model.save(tmp_path / "model.safetensors")
    again = nn.Transformer.load(tmp_path / "model.safetensors")
    assert not again.training and again.config == model.config
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    assert again(TOKENS).dtype == model.config["dtype"]
    assert os.listdir(tmp_path) == ["model.safetensors"]
    cheap = nn.Transformer.load(tmp_path / "model.safetensors", policy="speed", dtype=np.float64)
    assert cheap.blocks[1].attn.tolerance == 5e-2 and cheap(TOKENS).dtype == np.float64


def test_the_safetensors_package_reads_what_is_written_and_writes_what_is_read(tmp_path: Path) -> None:
    numpy_io = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    small().save(path)
    theirs = numpy_io.load_file(path)
    assert theirs.keys() == small().state_dict().keys()
    for name, parameter in small().state_dict().items():
        np.testing.assert_array_equal(theirs[name], parameter)
    halves = {name: x.astype(np.float16) for name, x in small().state_dict().items()}
    numpy_io.save_file(halves, path, metadata={"config": json.dumps(small().config)})
    for name, parameter in nn.Transformer.load(path).state_dict().items():
        np.testing.assert_array_equal(parameter, halves[name])
    numpy_io.save_file({"x": np.ones((2, 0, 3)), "y": np.array(3, np.uint8), "z": np.arange(3)}, path)
    arrays, metadata = files.read(path)
    assert {name: x.shape for name, x in arrays.items()} == {"x": (2, 0, 3), "y": (), "z": (3,)}
    assert metadata == {} and arrays["z"].tolist() == [0, 1, 2]


def test_bfloat16_is_read_as_float32(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    numpy_io = pytest.importorskip("safetensors.numpy")
    x = np.array([1.0, -2.5, np.inf, 1e-30], ml_dtypes.bfloat16)
    (tmp_path / "x").write_bytes(numpy_io.save({"x": x}))
    read = files.read(tmp_path / "x")[0]["x"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, x.astype(np.float32))


def test_arrays_of_every_layout_and_dtype(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {
        "transposed": rng.standard_normal((3, 4)).T,
        "every other": np.arange(10, dtype=np.int16)[::2],
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((2, 0), np.float32),
        "bool": np.array([True, False]),
    }
    files.write(tmp_path / "x", arrays, {"told": "you"})
    read, metadata = files.read(tmp_path / "x")
    assert metadata == {"format": "np", "told": "you"}
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    with pytest.raises(adaattn.DTypeError, match=r"^x: expected a dtype of safetensors, got complex128$"):
        files.write(tmp_path / "y", {"x": np.ones(2, complex)}, {})
    assert os.listdir(tmp_path) == ["x"]


def test_files_cut_off_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    small().save(path)
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(adaattn.ArgumentError, match=r"^path: expected a whole safetensors file, got .*"):
            nn.Transformer.load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(adaattn.ArgumentError, match=r" with 1 bytes behind its last array$"):
        nn.Transformer.load(path)


def test_a_flipped_bit_anywhere(tmp_path: Path, rng: np.random.Generator) -> None:
    """In the arrays it is the digest that tells; in the header, if it can be read, the digest or a name."""
    path = tmp_path / "model.safetensors"
    small().save(path)
    whole = path.read_bytes()
    for at in (0, 3, 9, 40, len(whole) - 1, *rng.integers(8, len(whole), 40).tolist()):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(7))
        path.write_bytes(damaged)
        try:
            again = nn.Transformer.load(path)
        except adaattn.ArgumentError:
            continue
        header = 8 + int.from_bytes(whole[:8], "little")
        assert at < header, "the arrays are guarded"
        for name, parameter in small().state_dict().items():
            np.testing.assert_array_equal(again.state_dict()[name], parameter)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}, "x of dtype F8"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, r"x of shape \(2,\) in bytes \(0, 4\)"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, r"x of shape \(1,\) in bytes \(4, 8\)"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, r"x of shape \(-1,\)"),
        ({"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}, "8 of the 36 bytes up to the end of x"),
        ({"dtype": "F32", "shape": [1]}, "a header that cannot be read"),
        ([], "a header that cannot be read"),
        ({"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 8]}, "a header that cannot be read"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "x of dtype"),
        ({"dtype": "F32", "shape": [1] * 70 + [2], "data_offsets": [0, 8]}, "x of shape"),
        ({"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}, "x of shape"),
    ],
    ids=str,
)
def test_headers_that_lie(entry: Any, message: str, tmp_path: Path) -> None:
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(adaattn.ArgumentError, match=f" with {message}"):
        files.read(tmp_path / "x")


def test_a_header_nested_too_deep(tmp_path: Path) -> None:
    header = b"[" * 100_000
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(adaattn.ArgumentError, match="a header that cannot be read"):
        files.read(tmp_path / "x")


def test_configs_that_are_refused(tmp_path: Path) -> None:
    def load(metadata: dict[str, str]) -> None:
        files.write(tmp_path / "x", small().state_dict(), metadata)
        nn.Transformer.load(tmp_path / "x")

    for metadata in ({}, {"config": "{"}, {"config": "[]"}):
        with pytest.raises(
            adaattn.ArgumentError, match=r"^path: expected a file with config in its metadata"
        ):
            load(metadata)
    refused = {
        "activation": ("elu", r"^activation: expected one of 'gelu', .* got 'elu'$"),
        "rotary_style": ("pairs", r"^config: expected rotary_style 'half', got 'pairs'$"),
        "head_size": (5, r"^config: expected head_size 4, got 5$"),
        "experts": (8, r"^config: expected the options of Transformer, got .*experts"),
        "num_layers": (3, r"^state: expected every parameter of the module, got none for blocks\.2\.attn"),
        "vocab_size": (51, r"^state: expected embed\.weight of shape \(51, 16\), got \(50, 16\)$"),
    }
    for name, (value, message) in refused.items():
        with pytest.raises(adaattn.ArgumentError, match=message):
            load({"config": json.dumps(small().config | {name: value})})
    with pytest.raises(FileNotFoundError):
        nn.Transformer.load("nowhere.safetensors")


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    small().save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        small(seed=9).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_checkpoints_of_other_models_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "run", small()
    nn.save_checkpoint(path, model, nn.AdamW(model))
    other = small(num_kv_heads=2)
    with pytest.raises(adaattn.ArgumentError, match=re.escape("config, got another ['num_kv_heads']")):
        nn.load_checkpoint(path, other, nn.AdamW(other))
    model.save(path)
    with pytest.raises(adaattn.ArgumentError, match=r"^path: expected a checkpoint, got .*run$"):
        nn.load_checkpoint(path, model, nn.AdamW(model))
