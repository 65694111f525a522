"""Who is compared: shapes and inputs, one callable per library, the float64 oracle, the machine's ceilings.

A peer gets NumPy arrays once, brings them into the layout and type that suit its library, and returns a
callable that does nothing but the attention.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import adaattn
from adaattn.rates import split

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


def make_inputs(shape: Shape) -> dict[str, list[Array]]:
    """Query, key and value for each dtype, all rounded from the same standard normal float32 numbers."""
    rng = np.random.default_rng(0)
    rows = (shape.heads, shape.queries), *2 * [(shape.kv_heads, shape.keys)]
    sizes = [(shape.batch, *row, shape.head_size) for row in rows]
    arrays = [rng.standard_normal(size, np.float32) for size in sizes]
    inputs: dict[str, list[Array]] = {"fp32": arrays, "fp16": [x.astype(np.float16) for x in arrays]}
    if find_spec("ml_dtypes"):
        import ml_dtypes

        inputs["bf16"] = [x.astype(ml_dtypes.bfloat16) for x in arrays]
    return inputs


def sample_rows(shape: Shape, count: int = 64) -> Array:
    return np.unique(np.linspace(0, shape.queries - 1, count).astype(int))


def oracle(inputs: list[Array], rows: Array, causal: bool) -> Array:
    """Float64 attention for some of the query rows: (B, H, len(rows), D)."""
    query, key, value = inputs
    out = np.empty((*query.shape[:2], len(rows), query.shape[3]))
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


def relative_error(out: Any, rows: Array, exact: Array) -> float:
    """Frobenius, over the rows of `exact`."""
    if hasattr(out, "float"):  # a torch tensor, perhaps of a type that NumPy lacks
        out = out.float().numpy()
    if out.ndim == 3:  # (B, T, H * D)
        out = out.reshape(*out.shape[:2], *exact.shape[1::2]).swapaxes(1, 2)
    return float(np.linalg.norm(out[:, :, rows].astype(np.float64) - exact) / np.linalg.norm(exact))


def build_adaattn(
    inputs: list[Array], causal: bool, threads: int, precision: str | tuple[str, str] = "auto"
) -> Call:
    query, key, value = inputs
    return lambda: adaattn.attention(
        query, key, value, causal=causal, num_threads=threads, precision=precision
    )


def build_torch(inputs: list[Array], causal: bool, threads: int) -> Call:
    """Queries that share keys become rows of one head: several times as fast as its `enable_gqa`."""
    import torch

    def tensor(x: Array) -> torch.Tensor:
        bf16 = x.dtype.name == "bfloat16"
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if bf16 else torch.from_numpy(x)

    torch.set_grad_enabled(False)
    torch.set_num_threads(threads)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    query, key, value = map(tensor, inputs)
    if query.shape[1] != key.shape[1]:
        assert query.shape[2] == 1
        rows = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
        return lambda: sdpa(rows, key, value).view(query.shape)
    return lambda: sdpa(query, key, value, is_causal=causal)


def build_onnxruntime(inputs: list[Array], causal: bool, threads: int) -> Call:
    """The faster operator: Attention, (B, H, T, D), for one query, else MultiHeadAttention, (B, T, H * D)."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    feeds = dict(zip("qkv", inputs, strict=True))
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
    query, key, value = inputs
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


PEERS = [
    Peer("adaattn", "fp32", build_adaattn, ()),
    Peer("torch", "fp32", build_torch, ("torch",)),
    Peer("onnxruntime", "fp32", build_onnxruntime, ("onnxruntime", "onnx")),
    Peer("numpy", "fp32", build_numpy, ()),
    Peer("adaattn", "bf16", build_adaattn, ("ml_dtypes",)),
    Peer("torch", "bf16", build_torch, ("torch", "ml_dtypes")),
    Peer("adaattn", "fp16", build_adaattn, ()),
    Peer("torch", "fp16", build_torch, ("torch",)),
]


def rung(name: str, dtype: str = "fp32") -> Peer:
    """AdaAttn with its precision forced; "int8/bf16" is a pair."""
    precision = split(name)

    def build(inputs: list[Array], causal: bool, threads: int) -> Call:
        return build_adaattn(inputs, causal, threads, precision)

    return Peer(name, dtype, build, ("ml_dtypes",) if dtype == "bf16" else ())


RUNGS = [
    *(peer for peer in PEERS if peer.name == "torch" or (peer.name, peer.dtype) == ("adaattn", "fp32")),
    *(rung(name) for name in adaattn.cpu_info()["rates"]["offered"] if name != "fp32"),
    rung("bf16", "bf16"),
    rung("int8", "bf16"),
]


def cache(dtype: str) -> Peer:
    """A KVCache of this dtype, asked for one query at a time, in fp32."""

    def build(inputs: list[Array], causal: bool, threads: int) -> Call:
        query, key, value = inputs
        B, G, S, D = key.shape
        kept = adaattn.KVCache(B, G, D, capacity=S, dtype=dtype)
        kept.append(key, value)
        return lambda: kept.attention(query, num_threads=threads)

    return Peer("cache", dtype, build, (), "fp32")


CACHES = [
    *(peer for peer in PEERS if peer.name == "torch" and peer.dtype != "fp16"),
    *map(cache, ("fp32", "bf16", "int8")),
]
# Bytes of a number among keys and values; int8's pages of 64 tokens have a mean in bf16.
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1 + 2 / 64}

UNITS = {"FMA peak": 0, "VNNI peak": 1, "BF16 peak": 2}
# The shares of a rung's operations that its units run, each at a fraction of that unit's peak.
WORK = {
    "int8": {"VNNI peak": 1.0},
    "int16": {"VNNI peak": 2.0},
    "bf16": {"BF16 peak": 1.0},
    "int8/bf16": {"VNNI peak": 0.5, "BF16 peak": 0.5},
}


class Roofline:
    """The machine's ceilings (`roofline.c`), compiled here. Raises OSError where that is impossible."""

    def __init__(self) -> None:
        source = Path(__file__).with_name("roofline.c")
        compiler = os.environ.get("CC", "cc")
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder, "roofline.so"))
            flags = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread"]
            command = [compiler, *flags, str(source), "-o", target]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise OSError(f"{compiler} failed: {result.stderr.strip()}")
            library = ctypes.CDLL(target)
        self._peak, self._read = library.roofline_peak, library.roofline_read
        self._peak.restype = self._read.restype = ctypes.c_double
        self._peak.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
        self._read.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2 + [ctypes.c_int] * 2

    def compute_seconds(self, unit: str, flops: int, threads: int, seconds: float) -> float:
        """Time that `flops` take at the peak rate of a unit, which is measured over `seconds`; inf: none."""
        rate = float(self._peak(UNITS[unit], threads, seconds))
        return flops / rate if rate > 0 else math.inf

    def read_seconds(self, key: Array, value: Array, ahead: int, threads: int, passes: int) -> float:
        """Time to read both arrays with prefetch `ahead` bytes ahead (0: none), mean of `passes`."""
        return float(self._read(key.ctypes.data, value.ctypes.data, key.nbytes, ahead, threads, passes))
