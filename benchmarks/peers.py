"""Who is compared: inputs, and peers by dtype, rung and cache, built of the package's own benchmark suite."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

import adaattn
from adaattn.bench.peers import (
    Array,
    Call,
    Peer,
    Shape,
    build_adaattn,
    build_numpy,
    build_onnxruntime,
    build_torch,
)
from adaattn.rates import split


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
