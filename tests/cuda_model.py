"""The CUDA kernels compiled for the CPU by cuda/model.h, called like `adaattn.attention` on NumPy arrays."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SOURCES = [
    "model.cc",
    "launch.cu",
    "k0.cu",
    "k1_f16.cu",
    "k1_bf16.cu",
    "k1_split.cu",
    "k1_bytes.cu",
    "k1_fp8.cu",
    "k1_listed.cu",
    "lists.cu",
    "combine.cu",
    "few.cu",
]
DTYPES = [np.dtype(x) for x in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.bool_)]
RUNGS = ["fp64", "fp32", "split", "fp16", "bf16", "int8", "int8/fp8", "fp8"]
UNBOUNDED = 2**63 - 1
Array = np.ndarray[Any, Any]


class _Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]


class _Params(ctypes.Structure):
    """ada_cu_params of cuda/params.h."""

    _fields_ = [
        *((name, _Array) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_int32) for name in ("dtype", "rung", *"BHGTSDE", "mask_dtype")),
        ("mask", _Array),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("window_left", "window_right", "offset")),
        ("query_offset", ctypes.c_void_p),
        ("kv_lengths", ctypes.c_void_p),
        ("query_offset_stride", ctypes.c_int64),
        ("kv_lengths_stride", ctypes.c_int64),
        ("alibi_slopes", ctypes.c_void_p),
        ("alibi_stride", ctypes.c_int64 * 2),
        ("sinks", ctypes.c_void_p),
        ("sinks_stride", ctypes.c_int64),
        ("dropout_p", ctypes.c_double),
        ("drop_below", ctypes.c_uint64),
        ("seed", ctypes.c_void_p),
        ("seed_stride", ctypes.c_int64),
        ("one_seed", ctypes.c_int32),
        ("n_heads", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("heads", "lse", "workspace")),
        *((name, ctypes.c_int32) for name in ("multiprocessors", "capability", "code")),
        ("raised", ctypes.c_void_p),
        ("lists", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("kept_dtype", ctypes.c_int32),
        ("places", ctypes.c_int64 * 12),
    ]


class _Lists(ctypes.Structure):
    """ada_lists_args of cuda/lists.h."""

    _fields_ = [
        ("p", _Params),
        ("heads", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("n", "rows", "tiles", "looked", "blocks")),
        *((name, ctypes.c_void_p) for name in ("lists", "counts", "centres")),
        ("chunks", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("figures", "values")),
    ]


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ada_cu_workspace.restype = ctypes.c_size_t
    return library


def parameters(
    query: Array,
    key: Array,
    value: Array,
    alive: list[Array],
    *,
    rung: str,
    attn_mask: Array | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    kv_lengths: Array | None = None,
    query_offset: Array | int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Any = None,
) -> Any:
    """What both directions take; what it points to is kept in `alive`."""
    (B, H, T, D), (_, G, S, E) = query.shape, value.shape
    p = _Params(B=B, H=H, G=G, T=T, S=S, D=D, E=E, dtype=DTYPES.index(query.dtype), rung=RUNGS.index(rung))

    def at(x: Any) -> int:
        alive.append(x)
        return int(x.ctypes.data)

    def array(x: Array) -> _Array:
        return _Array(at(x), (ctypes.c_int64 * 4)(*x.strides))

    p.query, p.key, p.value = array(query), array(key), array(value)
    if attn_mask is not None:
        p.mask = array(np.broadcast_to(attn_mask, (B, H, T, S)))
        p.mask_dtype = DTYPES.index(attn_mask.dtype)
    p.scale, p.softcap = D**-0.5 if scale is None else scale, softcap or 0
    left, right = window or (None, None)
    p.window_left = UNBOUNDED if left is None else left
    p.window_right = 0 if causal else UNBOUNDED if right is None else right
    p.offset = 0 if causal == "upper_left" else S - T
    if query_offset is not None:
        p.query_offset = at(np.broadcast_to(np.asarray(query_offset, np.int64), B).copy())
        p.query_offset_stride = 1
    if kv_lengths is not None:
        p.kv_lengths, p.kv_lengths_stride = at(np.asarray(kv_lengths, np.int64).copy()), 1
    if alibi_slopes is not None:
        p.alibi_slopes = at(np.array(np.broadcast_to(alibi_slopes, (B, H)), np.float64, order="C"))
        p.alibi_stride[0], p.alibi_stride[1] = H, 1
    if sinks is not None:
        p.sinks, p.sinks_stride = at(np.asarray(sinks, np.float64).copy()), 1
    if dropout_p:
        many = np.ndim(seed) > 0
        p.seed = at(np.array([int(x) % 2**64 for x in (seed if many else [seed])], np.uint64))
        p.seed_stride, p.one_seed = int(many), int(not many)
        p.dropout_p, p.drop_below = dropout_p, int(dropout_p * 2**32)
    return p


def attention(
    library: ctypes.CDLL,
    query: Array,
    key: Array,
    value: Array,
    *,
    rung: str,
    order: int = 1,
    heads: Array | None = None,
    pairs: Array | None = None,
    lists: list[list[list[int]]] | None = None,
    thin: tuple[float, float, float] | None = None,
    looked: int | None = None,
    capability: int = 90,
    code: int | None = None,
    **options: Any,
) -> tuple[Array, Array, int]:
    """out, lse and the number of heads with rows that the rung cannot hold; of pairs: their rows in float64.

    order draws the order of the threads and the delays of copies. lists: of each head and tile of queries,
    the blocks of keys; thin: they are made, by what may be left out (absolute, relative, most of a sum), and
    take the place of lse, for as many tiles as are looked at.
    """
    (B, H, T, D), (_, G, S, E) = query.shape, value.shape
    alive: list[Array] = []

    def at(x: Any) -> int:
        alive.append(x)
        return int(x.ctypes.data)

    p = parameters(query, key, value, alive, rung=rung, **options)
    out = np.full((B, H, T, E), 77, query.dtype)
    lse = np.full((B, H, T), 77, np.float64 if query.dtype == np.float64 else np.float32)
    p.out, p.lse = _Array(at(out), (ctypes.c_int64 * 4)(*out.strides)), at(lse)
    if heads is not None:
        p.heads, p.n_heads = at(np.asarray(heads, np.int32).copy()), len(heads)
    raised = np.zeros((B, H), np.uint32)
    p.multiprocessors, p.capability, p.code, p.raised = 3, capability, code or capability, at(raised)
    ctypes.c_uint64.in_dll(library, "ada_model_seed").value = order

    if pairs is not None:
        o, exact_lse = np.full((len(pairs), E), 77.0), np.full(len(pairs), 77.0)
        error = library.ada_cu_exact_rows(
            ctypes.byref(p),
            ctypes.c_void_p(at(np.asarray(pairs, np.int32).copy())),
            len(pairs),
            ctypes.c_void_p(at(o)),
            ctypes.c_void_p(at(exact_lse)),
            None,
        )
        assert error == 0, error
        return o, exact_lse, 0
    rows, blocks = library.ada_cu_list_rows(ctypes.byref(p)), -(-S // 64)
    n_heads = B * H if heads is None else len(heads)
    if lists is not None or thin is not None:
        tiles = -(-T // rows)
        listed = np.full((n_heads, tiles, 1 + blocks), 77, np.int32)
        if lists is not None:
            for n, tile in np.ndindex(n_heads, tiles):
                own = lists[n][tile]
                listed[n, tile, : 1 + len(own)] = [len(own), *own]
        p.lists = at(listed)
    if thin is not None:
        own = np.zeros(n_heads, [("head", np.int32), ("thin", np.float32, 3)])
        own["head"], own["thin"] = np.arange(B * H) if heads is None else heads, thin
        args = _Lists(p, at(own), n_heads, rows, tiles, looked or tiles, blocks)
        counts = np.full((n_heads, args.looked, 3), 77, np.int32)
        args.counts, args.lists = at(counts), None if looked else at(listed)
        args.chunks = -(-D // 8)
        space = np.full(B * G * blocks * args.chunks * 16 + 16, 255, np.uint8)
        args.centres = at(space) + -space.ctypes.data % 16
        values = np.full((B * G, 2), np.nan, np.float32)
        args.figures, args.values = at(np.full((B * G, blocks, 5), np.nan, np.float32)), at(values)
        error = library.ada_lists_run(ctypes.byref(args), None)
        assert error == 0, error
        return listed, counts, 0
    workspace = np.full(library.ada_cu_workspace(ctypes.byref(p)) + 256, 255, np.uint8)
    p.workspace = at(workspace) + -workspace.ctypes.data % 256
    error = library.ada_cu_attend(ctypes.byref(p), None)
    assert error == 0, error
    return out, lse, int(raised.sum())
