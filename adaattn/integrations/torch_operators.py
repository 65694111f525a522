"""The operators that PyTorch knows attention by, and the engine's call behind them."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _adaattn, api
from ..backward import attention_backward, budget_of
from ..errors import ArgumentError

_NUMPY = frozenset((torch.float32, torch.float64, torch.float16, torch.bool, torch.int64, torch.int32))
_BF16 = importlib.import_module("ml_dtypes").bfloat16 if importlib.util.find_spec("ml_dtypes") else None


def openmp() -> Any:
    """The OpenMP that torch runs on, where there is one to be found (on Linux), with GNU's names."""
    try:
        folder = Path(torch.__file__).parent
        return ctypes.CDLL(str(folder / "lib/libtorch_cpu.so"), os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None


def _borrow_threads(library: Any) -> None:
    """Let the engine run on the threads of torch's OpenMP.

    They spin for milliseconds after each of torch's operations, in case there is more to do; threads of the
    engine's own would share the cores with them meanwhile.
    """
    if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_get_max_threads"):
        functions = (library.GOMP_parallel, library.omp_get_max_threads)
        _adaattn._lend_team(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))


_borrow_threads(openmp())


def compute(
    query: Any,
    key: Any,
    value: Any,
    *,
    return_lse: bool = False,
    return_report: bool = False,
    num_threads: int | None = None,
    **options: Any,
) -> Any:
    """`adaattn.attention` of four-dimensional tensors: no gradient, nothing traced, torch's threads.

    On the CPU the engine gets NumPy's view of the memory, which takes a quarter of the time of DLPack.
    """
    out = _out_like(query, value)
    if not (out.numel() and value.shape[2]):
        return _nothing(out, return_lse)
    _read(options)
    results = api.attention(
        _array(query),
        _array(key),
        _array(value),
        **options,
        return_lse=return_lse,
        return_report=return_report,
        out=_array(out),
        num_threads=torch.get_num_threads() if num_threads is None else num_threads,
    )
    if not (return_lse or return_report):
        return out
    _, *rest = results
    if return_lse:
        rest[0] = _as_tensor(rest[0])
    return out, *rest


def _read(options: dict[str, Any]) -> None:
    """Tensors among the options as the engine takes them."""
    for name in _TENSORS:
        x = options.get(name)
        if x is not None and isinstance(x, Tensor):
            options[name] = int(x) if name == "seed" else _array(x)


def _out_like(query: Any, value: Any) -> Any:
    """(B, H, T, E), in memory (B, T, H, E): what follows attention wants the heads side by side."""
    B, H, T, _ = query.shape
    E = value.shape[3]
    return query.new_empty_strided((B, H, T, E), (T * H * E, E, H * E, 1))


def _nothing(out: Any, return_lse: bool) -> Any:
    """The result where some size is zero: torch's zeros."""
    out.zero_()
    return (out, _lse_like(out).fill_(-torch.inf)) if return_lse else out


def _lse_like(out: Any) -> Any:
    dtype = torch.float64 if out.dtype is torch.float64 else torch.float32
    return out.new_empty(out.shape[:3], dtype=dtype)


def _array(x: Any) -> Any:
    """What the engine takes: NumPy's view of a tensor where there is one."""
    if x.requires_grad:
        x = x.detach()
    if not x.is_cpu:
        return x
    if x.dtype in _NUMPY:
        return x.numpy()
    return x.view(torch.int16).numpy().view(_BF16) if _BF16 and x.dtype is torch.bfloat16 else x


def _as_tensor(x: Any) -> Any:
    """What the engine made of arrays or tensors."""
    if isinstance(x, Tensor):
        return x
    return torch.from_numpy(x.view("int16")).view(torch.bfloat16) if x.dtype == _BF16 else torch.from_numpy(x)


# ---- operators

_TENSORS = ("attn_mask", "alibi_slopes", "sinks", "kv_lengths", "query_offset", "seed")
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, "
    + "".join(f"Tensor? {name}, " for name in _TENSORS)
    + "str causal, SymInt? left, SymInt? right, float? softcap, float? scale, float dropout_p, "
    "float? tolerance, str precision_qk, str precision_pv, str min_precision, str max_precision, "
    "str structure, bool? verify, int? num_threads"
)


def _options(rest: Any) -> dict[str, Any]:
    """Options of `adaattn.attention` for an operator's arguments behind value."""
    tensors, others = rest[: len(_TENSORS)], rest[len(_TENSORS) :]
    causal, left, right, softcap, scale, dropout_p, tolerance, qk, pv, least, most, structure, verify, n = (
        others
    )
    return dict(zip(_TENSORS, tensors, strict=True)) | {
        "causal": causal or False,
        "window": None if left is right is None else (left, right),
        "softcap": softcap,
        "scale": scale,
        "dropout_p": dropout_p,
        "tolerance": tolerance,
        "precision": qk if qk == pv else (qk, pv),
        "min_precision": least,
        "max_precision": most,
        "structure": structure,
        "verify": "auto" if verify is None else verify,
        "num_threads": n,
    }


def _attention(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    return compute(query, key, value, **_options(rest))


def _attention_lse(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    return compute(query, key, value, return_lse=True, **_options(rest))


def _fake(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    return _out_like(query, value)


def _fake_lse(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    out = _fake(query, key, value)
    return out, _lse_like(out)


_GRADIENTS = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")


def _backward(
    grad_out: Any, out: Any, lse: Any, needs: Any, query: Any, key: Any, value: Any, *rest: Any
) -> Any:
    options = _options(rest)
    inputs = {"query": query, "key": key, "value": value} | options
    wanted = [name for name, need in zip(_GRADIENTS, needs, strict=True) if need]
    if not (out.numel() and key.shape[2]):
        return [torch.zeros_like(inputs[name], memory_format=torch.contiguous_format) for name in wanted]
    for name in ("precision", "max_precision", "structure"):  # of the forward pass alone
        options.pop(name)
    # Exact gradients of half tensors are computed in their own format on a GPU.
    exact = "fp32" if query.dtype in (torch.float16, torch.bfloat16) else "auto"
    tolerance, min_precision, verify = (options.pop(x) for x in ("tolerance", "min_precision", "verify"))
    options |= budget_of(tolerance, min_precision, verify, exact)
    _read(options)
    if options["num_threads"] is None:
        options["num_threads"] = torch.get_num_threads()
    arrays = (_array(x) for x in (grad_out, query, key, value, out, lse))
    gradients = attention_backward(*arrays, needs=wanted, **options)
    return [
        _as_tensor(getattr(gradients, name)).to(inputs[name].device, inputs[name].dtype) for name in wanted
    ]


def _fake_backward(grad_out: Any, out: Any, lse: Any, needs: Any, *inputs: Any) -> Any:
    arrays = inputs[: len(_GRADIENTS)]
    return [x.new_empty(x.shape) for x, need in zip(arrays, needs, strict=True) if need]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    tensors = inputs[: 3 + len(_TENSORS)]
    ctx.save_for_backward(*tensors, *output)
    ctx.others = inputs[len(tensors) :]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
    *tensors, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[: len(_GRADIENTS)])
    found = iter(torch.ops.adaattn.attention_backward(grad_out, out, lse, needs, *tensors, *ctx.others))
    nothing = [None] * (len(tensors) - len(_GRADIENTS) + len(ctx.others))
    return (*(next(found) if need else None for need in needs), *nothing)


def _refuse_second(ctx: Any, grads: Any) -> Any:
    raise ArgumentError(
        "query, key, value, ...: expected first derivatives alone, got a second one: the gradient of "
        "attention has none of its own"
    )


def _operator(name: str, function: Any, fake: Any, schema: str) -> Any:
    operator = torch.library.custom_op(f"adaattn::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


_operator("attention", _attention, _fake, f"({_ARGUMENTS}) -> Tensor")
_operator(
    "attention_lse", _attention_lse, _fake_lse, f"({_ARGUMENTS}) -> (Tensor, Tensor)"
).register_autograd(_gradients, setup_context=_save)
_operator(
    "attention_backward",
    _backward,
    _fake_backward,
    f"(Tensor grad_out, Tensor out, Tensor lse, bool[] needs, {_ARGUMENTS}) -> Tensor[]",
).register_autograd(_refuse_second)
