"""Who is compared: shapes, one callable per library, the float64 oracle.

A peer gets NumPy arrays once, brings them into the layout and type that suit its library, and returns a
callable that does nothing but the attention.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from .. import api

Array = np.ndarray[Any, Any]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Queries (B, H, T, D) against keys and values (B, G, S, D)."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_size: int
    causal: bool = False
    group: int = 1  # H / G

    def __str__(self) -> str:
        length = f"{self.keys}" if self.queries == self.keys else f"{self.queries}:{self.keys}"
        heads = f"{self.heads}" if self.group == 1 else f"{self.heads}:{self.kv_heads}"
        return f"{self.batch},{heads},{length},{self.head_size}{' causal' if self.causal else ''}"

    @property
    def kv_heads(self) -> int:
        return self.heads // self.group

    @property
    def flops(self) -> int:
        """A multiplication and an addition in each of the two products, per visible pair and channel."""
        hidden = self.queries * (self.queries - 1) // 2 if self.causal else 0
        return 4 * self.batch * self.heads * (self.queries * self.keys - hidden) * self.head_size

    def traffic(self, itemsize: float) -> float:
        """Bytes that have to move in any case: query, key, value and output once."""
        rows = self.heads * self.queries + self.kv_heads * self.keys
        return 2 * self.batch * rows * self.head_size * itemsize


def sample_rows(queries: int, count: int = 64) -> Array:
    return np.unique(np.linspace(0, queries - 1, count).astype(int))


def oracle(inputs: list[Array], rows: Array, causal: bool) -> Array:
    """Float64 attention for some of the query rows: (B, H, len(rows), D)."""
    query, key, value = inputs
    out = np.empty((*query.shape[:2], len(rows), value.shape[3]))
    hidden = np.arange(key.shape[2]) > rows[:, None] + key.shape[2] - query.shape[2]
    group = query.shape[1] // key.shape[1]
    for b, h in np.ndindex(*query.shape[:2]):
        g = h // group
        q, k, v = (x.astype(np.float64) for x in (query[b, h, rows], key[b, g], value[b, g]))
        scores = q @ k.T / np.sqrt(q.shape[1])
        if causal:
            scores[hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[b, h] = weights @ v / weights.sum(axis=1, keepdims=True)
    return out


def taken_rows(out: Any, rows: Array, exact: Array) -> Array:
    """What a peer returned, at the rows and in the layout of `exact`, in float64."""
    if hasattr(out, "float"):  # a torch tensor, perhaps of a type that NumPy lacks
        out = out.float().numpy()
    if out.ndim == 3:  # (B, T, H * D)
        out = out.reshape(*out.shape[:2], *exact.shape[1::2]).swapaxes(1, 2)
    taken: Array = out[:, :, rows].astype(np.float64)
    return taken


def relative_error(out: Any, rows: Array, exact: Array) -> float:
    """Frobenius, over the rows of `exact`."""
    return float(np.linalg.norm(taken_rows(out, rows, exact) - exact) / np.linalg.norm(exact))


def build_adaattn(
    inputs: list[Array], causal: bool, threads: int, precision: str | tuple[str, str] = "auto"
) -> Call:
    query, key, value = inputs
    return lambda: api.attention(query, key, value, causal=causal, num_threads=threads, precision=precision)


def build_torch(inputs: list[Array], causal: bool, threads: int) -> Call:
    """Queries that share keys become rows of one head: several times as fast as its `enable_gqa`."""
    import torch

    def tensor(x: Array) -> torch.Tensor:
        bf16 = x.dtype.name == "bfloat16"
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if bf16 else torch.from_numpy(x)

    torch.set_num_threads(threads)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    query, key, value = map(tensor, inputs)
    if query.shape[1] != key.shape[1]:
        if query.shape[2] > 1:
            return lambda: sdpa(query, key, value, is_causal=causal, enable_gqa=True)
        rows = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
        return lambda: sdpa(rows, key, value).view(query.shape)
    return lambda: sdpa(query, key, value, is_causal=causal)


def _ungrouped(inputs: list[Array]) -> list[Array]:
    """With a key head for each query head, where there are many queries."""
    query, *rest = inputs
    group = query.shape[1] // rest[0].shape[1]
    return [query, *(x.repeat(group, axis=1) if group > 1 and query.shape[2] > 1 else x for x in rest)]


def build_onnxruntime(inputs: list[Array], causal: bool, threads: int) -> Call:
    """The faster operator: Attention, (B, H, T, D), for one query, else MultiHeadAttention, (B, T, H * D)."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    feeds = dict(zip("qkv", _ungrouped(inputs), strict=True))
    attributes: dict[str, Any] = {"is_causal": int(causal)}
    operator, rank = "Attention", 4
    if inputs[0].shape[2] > 1:
        feeds = {n: x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1) for n, x in feeds.items()}
        attributes = {
            "domain": "com.microsoft",
            "num_heads": inputs[0].shape[1],
            "unidirectional": int(causal),
        }
        operator, rank = "MultiHeadAttention", 3
    node = helper.make_node(operator, list(feeds), ["out"], **attributes)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * rank) for n in (*feeds, "out")]
    graph = helper.make_graph([node], "attention", ends[:3], ends[3:])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)[0]


def build_numpy(inputs: list[Array], causal: bool, threads: int) -> Call:
    """The textbook formula, its products by BLAS."""
    query, key, value = _ungrouped(inputs)
    scale = np.float32(query.shape[3] ** -0.5)
    hidden = np.triu(np.ones((query.shape[2], key.shape[2]), bool), 1) if causal else None
    set_blas_threads(threads)

    def call() -> Any:
        weights = query * scale @ key.swapaxes(2, 3)
        if hidden is not None:
            np.copyto(weights, -np.inf, where=hidden)
        weights -= weights.max(axis=3, keepdims=True)
        np.exp(weights, out=weights)
        return weights @ value / weights.sum(axis=3, keepdims=True)

    return call


def set_blas_threads(threads: int) -> bool:
    """Set the threads of NumPy's own BLAS; False if there is no known way to."""
    library = ctypes.CDLL(np.linalg._umath_linalg.__file__)  # also finds names in what it is linked with
    for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("", "")):
        function = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
        if function:
            function(threads)
            return True
    return False


@dataclass(frozen=True)
class Peer:
    name: str
    dtype: str
    build: Callable[[list[Array], bool, int], Call]  # (inputs, causal, threads)
    needs: tuple[str, ...]
    given: str | None = None  # dtype of the inputs, where it is another

    @property
    def inputs(self) -> str:
        return self.given or self.dtype

    def obstacle(self) -> str | None:
        """Why it can't run here."""
        missing = [module for module in self.needs if find_spec(module) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        if self.name == "numpy" and not set_blas_threads(1):
            return "no known way to set the threads of its BLAS"
        return None
