"""The CUDA kernels of the gradients compiled for the CPU by cuda/model.h, called like
`adaattn.attention_backward` on NumPy arrays."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from cuda_model import Array, _Array, _Params, parameters

from adaattn import Gradients

SOURCES = ["model.cc", "backward.cu", "backward_simt.cu", "backward_f16.cu", "backward_bf16.cu"]


class _Gradients(ctypes.Structure):
    """ada_cu_gradients of cuda/backward.h."""

    _fields_ = (
        ("p", _Params),
        ("grad_out", _Array),
        ("lse", _Array),
        ("results", _Array * 6),
        ("unfit", ctypes.c_void_p),
    )


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ada_cu_backward_workspace.restype = ctypes.c_size_t
    return library


def attention_backward(
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
    order: int = 1,
    **options: Any,
) -> tuple[Gradients, Array]:
    """The gradients, and which key heads were computed in float64."""
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
    unfit = np.full(key.shape[:2], 77, np.uint32)
    x.unfit = unfit.ctypes.data
    x.p.multiprocessors, x.p.capability, x.p.code = 3, 90, 90
    workspace = np.full(library.ada_cu_backward_workspace(ctypes.byref(x)) + 256, 255, np.uint8)
    x.p.workspace = workspace.ctypes.data + -workspace.ctypes.data % 256
    ctypes.c_uint64.in_dll(library, "ada_model_seed").value = order
    error = library.ada_cu_backward(ctypes.byref(x), None)
    assert error == 0, error
    return Gradients(*results), unfit
