"""The CUDA kernels of the gradients compiled for the CPU by cuda/model.h, called like
`adaattn.attention_backward` on NumPy arrays."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from cuda_model import Array, _Array, _Params, parameters

from adaattn import Gradients

#: Numbers that are told of a query, before its exact gradient and the one that is there.
TRUTHS = [
    "lse",
    "delta",
    "query2",
    "grad2",
    "weight2",
    "slope2",
    "score2",
    "both",
    "given_lse",
    "given_delta",
]

SOURCES = ["model.cc", "backward.cu", "backward_rows.cu", "backward_simt.cu"]
SOURCES += ["backward_f16.cu", "backward_bf16.cu"]


class _Gradients(ctypes.Structure):
    """ada_cu_gradients of cuda/backward.h."""

    _fields_ = (
        ("p", _Params),
        ("grad_out", _Array),
        ("lse", _Array),
        ("results", _Array * 6),
        ("unfit", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("again", ctypes.c_void_p),
    )


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("backward_workspace", "known_bytes", "check_bytes"):
        getattr(library, f"ada_cu_{name}").restype = ctypes.c_size_t
    library.ada_cu_check_size.restype = ctypes.c_int64
    return library


def _aligned(size: int, fill: int = 255) -> Array:
    memory = np.full(size + 256, fill, np.uint8)
    return memory[-memory.ctypes.data % 256 :][:size]


def _arguments(
    library: ctypes.CDLL,
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    lse: Array,
    *,
    rung: str,
    needs: Any = ("query", "key", "value"),
    **options: Any,
) -> tuple[_Gradients, Gradients, list[Array]]:
    """What the kernels are told, results, and what has to stay alive."""
    alive: list[Array] = []

    def array(x: Array) -> _Array:
        alive.append(x)
        return _Array(x.ctypes.data, (ctypes.c_int64 * 4)(*x.strides))

    x = _Gradients(parameters(query, key, value, alive, rung=rung, **options))
    x.grad_out, x.lse, x.p.out = array(grad_out), array(lse), array(out)
    mask = options.get("attn_mask")
    (B, H, T, _), S = query.shape, key.shape[2]
    shapes = [
        query.shape,
        key.shape,
        value.shape,
        np.shape(mask),
        (H,),
        np.shape(options.get("alibi_slopes")),
    ]
    results: list[Array | None] = []
    for i, (name, shape) in enumerate(zip(Gradients._fields, shapes, strict=True)):
        result = np.full(shape, 77, query.dtype if i < 3 else lse.dtype) if name in needs else None
        results.append(result)
        if result is None:
            continue
        x.results[i] = array(result)
        if name == "attn_mask":
            wide = np.broadcast_to(result, (B, H, T, S))
            strides = [n if size > 1 else 0 for n, size in zip(wide.strides, wide.shape, strict=True)]
            x.results[i] = _Array(result.ctypes.data, (ctypes.c_int64 * 4)(*strides))
        if name == "alibi_slopes":
            x.results[i].stride[0] = H if result.ndim == 2 else 0
    x.p.multiprocessors, x.p.capability, x.p.code = 3, 90, 90
    workspace = _aligned(library.ada_cu_backward_workspace(ctypes.byref(x)))
    alive.append(workspace)
    x.p.workspace = workspace.ctypes.data
    return x, Gradients(*results), alive


def _run(library: ctypes.CDLL, x: _Gradients, shape: tuple[int, ...], order: int) -> Array:
    unfit = np.full(shape, 77, np.uint32)
    x.unfit = unfit.ctypes.data
    ctypes.c_uint64.in_dll(library, "ada_model_seed").value = order
    error = library.ada_cu_backward(ctypes.byref(x), None)
    assert error == 0, error
    return unfit


def attention_backward(
    library: ctypes.CDLL, *arrays: Array, order: int = 1, **options: Any
) -> tuple[Gradients, Array]:
    """The gradients, and which key heads were computed in float64."""
    x, results, alive = _arguments(library, *arrays, **options)
    unfit = _run(library, x, arrays[2].shape[:2], order)
    alive.clear()
    return results, unfit


class Verification:
    """A run whose rows are kept: what is told of them, and key heads once more."""

    def __init__(self, library: ctypes.CDLL, *arrays: Array, order: int = 1, **options: Any) -> None:
        self.library, self.order, self.shapes = library, order, [x.shape for x in arrays]
        self.x, self.results, self.alive = _arguments(library, *arrays, **options)
        self.known = _aligned(library.ada_cu_known_bytes(ctypes.byref(self.x.p)))
        self.x.rows = self.known.ctypes.data
        self.unfit = _run(library, self.x, self.shapes[2][:2], order)

    def again(self, heads: Array, f64: bool) -> Array:
        """Heads that are not 0 once more, from rows of their own."""
        states = np.where(heads, np.uint32(f64), np.uint32(2))
        self.x.again, self.x.p.rung = states.ctypes.data, 0 if f64 else 1
        return _run(self.library, self.x, states.shape, self.order)

    def rows(self, keys: bool, rows: list[tuple[int, list[int]]]) -> list[list[Array]]:
        """Of up to four rows of a head: queries of b * H + h, or keys of b * G + g."""
        groups = np.array([[head, len(r), *r, *[0] * (4 - len(r))] for head, r in rows], np.int32)
        p, shared = ctypes.byref(self.x.p), ctypes.byref(self.x)
        of_group = self.library.ada_cu_check_bytes(p, ctypes.c_bool(keys))
        partials, n = _aligned(of_group * len(rows)), self.library.ada_cu_check_size(p, ctypes.c_bool(keys))
        to = np.full((len(rows), 4, n // 4), np.nan)
        error = self.library.ada_cu_check_rows(
            shared, ctypes.c_bool(keys), ctypes.c_void_p(groups.ctypes.data),
            ctypes.c_int64(len(rows)), ctypes.c_void_p(partials.ctypes.data),
            ctypes.c_void_p(to.ctypes.data), None,
        )  # fmt: skip
        assert error == 0, error
        return [[to[i, j] for j in range(len(r))] for i, (_, r) in enumerate(rows)]

    def norms(self) -> tuple[Array, Array]:
        (B, H, T, _), (_, G, S, _) = self.shapes[1:3]
        queries, keys = np.full((B, H, T, 4), np.nan), np.full((B, G, S, 3), np.nan)
        to = [ctypes.c_void_p(x.ctypes.data) for x in (queries, keys)]
        error = self.library.ada_cu_gradient_norms(ctypes.byref(self.x), *to, None)
        assert error == 0, error
        return queries, keys
