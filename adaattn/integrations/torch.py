"""Attention of PyTorch tensors: torch's own function, within an error budget, as a custom operator.

A call that needs no gradient and is not traced goes straight to the engine, since an operator written in Python
costs 10 µs; every other one goes through `adaattn::attention`, or `adaattn::attention_lse` where gradients will be
asked for, since those need the lse and a tolerance counts its error.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import api
from ..errors import ArgumentError, DTypeError, ShapeError
from ..stats import tolerance_of

_AUTO = "auto"
_DEVICES = ("cpu", "cuda")
_NUMPY = frozenset((torch.float32, torch.float64, torch.float16, torch.bool, torch.int64, torch.int32))
_BF16 = importlib.import_module("ml_dtypes").bfloat16 if importlib.util.find_spec("ml_dtypes") else None


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool | str = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    tolerance: float | None = None,
    policy: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    query_offset: Any = None,
    precision: str | tuple[str, str] = _AUTO,
    min_precision: str = _AUTO,
    max_precision: str = _AUTO,
    structure: str = _AUTO,
    verify: bool | str = _AUTO,
    return_lse: bool = False,
    num_threads: int | None = None,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`, with an error budget and `adaattn.attention`'s options.

    Tensors are read and written in place, on the CPU or a CUDA GPU. Works under `torch.compile` and
    `torch.export`, under autocast, and is differentiable.

    Parameters
    ----------
    query : Tensor of shape (..., H, T, D)
        float32, float64, float16 or bfloat16; any number of leading dimensions, which broadcast.
    key, value : Tensors of shape (..., H, S, D) and (..., H, S, E)
        With `enable_gqa` their numbers of heads may be divisors of H.
    attn_mask : Tensor that broadcasts to (..., H, T, S), optional
        bool (True: takes part) or floating (added to the scores). A row that nothing takes part in gives
        zeros, as torch's does.
    dropout_p : float
        Applied whether or not anything is in training; the seed is drawn from torch's generator of the CPU.
    is_causal : bool or "lower_right"
        True: query i sees keys up to i (upper left), also beside a mask. "lower_right": up to S - T + i.
    scale : float, optional
        Default 1 / sqrt(D); above 0.
    enable_gqa : bool
        Whether several query heads may share a head of keys and values.
    tolerance, policy, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset
        As in `adaattn.attention`, for four-dimensional tensors; vectors may be tensors.
    precision, min_precision, max_precision, structure, verify
        As in `adaattn.attention`.
    return_lse : bool
        Also return the logarithm of each row's sum of exponentials, (..., H, T), for which there is no gradient.
    num_threads : int, optional
        At most this many threads; default ``torch.get_num_threads()``.

    Returns
    -------
    out : Tensor of shape (..., H, T, E)
        In query's dtype, laid out in memory as (..., T, H, E), as torch's own kernels do.

    Raises
    ------
    adaattn.Error
        As in `adaattn.attention`; also for a mask with NaN or +inf, which torch makes NaN of.
    """
    if query.dim() == key.dim() == value.dim() == 4 and _fit(query.shape, key.shape, value.shape, enable_gqa):
        batch = None
    else:
        query, key, value, attn_mask, batch = _flatten(query, key, value, attn_mask, enable_gqa)
    device = query.device.type
    if device in _DEVICES and torch.is_autocast_enabled(device):
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    causal = is_causal if isinstance(is_causal, str) else "upper_left" if is_causal else ""
    if policy is not None:
        tolerance = tolerance_of(tolerance, policy)
    needs_grad = torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (attn_mask is not None and attn_mask.requires_grad)
        or (alibi_slopes is not None and getattr(alibi_slopes, "requires_grad", False))
        or (sinks is not None and getattr(sinks, "requires_grad", False))
    )
    if needs_grad or _is_traced(query):
        left, right = window or (None, None)
        qk, pv = (precision, precision) if isinstance(precision, str) else precision
        vectors = (alibi_slopes, sinks, kv_lengths, query_offset)
        arguments = (
            query, key, value, attn_mask, *map(_tensor, vectors), seed, causal, left, right, softcap, scale,
            dropout_p, tolerance, qk, pv, min_precision, max_precision, structure, _flag(verify), num_threads,
        )  # fmt: skip
        if needs_grad or return_lse:
            out, lse = torch.ops.adaattn.attention_lse(*arguments)
        else:
            out, lse = torch.ops.adaattn.attention(*arguments), None
    else:
        results = compute(
            query, key, value, attn_mask=attn_mask, causal=causal or False, window=window, softcap=softcap,
            alibi_slopes=alibi_slopes, sinks=sinks, kv_lengths=kv_lengths, query_offset=query_offset,
            scale=scale, dropout_p=dropout_p, seed=seed, tolerance=tolerance, precision=precision,
            min_precision=min_precision, max_precision=max_precision, structure=structure, verify=verify,
            return_lse=return_lse, num_threads=num_threads,
        )  # fmt: skip
        out, lse = results if return_lse else (results, None)
    if batch is not None:
        out, lse = _unflatten(out, batch), None if lse is None else _unflatten(lse, batch)
    return (out, lse) if return_lse else out


# ---- the engine


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

    On the CPU the engine gets NumPy's view of the memory, which takes a tenth of the time that DLPack takes.
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
        num_threads=num_threads or torch.get_num_threads(),
    )
    if not (return_lse or return_report):
        return out
    _, *rest = results
    if return_lse:
        rest[0] = torch.as_tensor(rest[0])
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


# ---- tensors as torch's function takes them


def _fit(query: Any, key: Any, value: Any, enable_gqa: bool) -> bool:
    """Whether these shapes are as the engine wants them."""
    G = key[1]
    return (
        query[0] == key[0] == value[0]
        and value[1] == G
        and (query[1] == G or G == 1 or (enable_gqa and G > 0 and query[1] % G == 0))
    )


def _flatten(query: Any, key: Any, value: Any, attn_mask: Any, enable_gqa: bool) -> tuple[Any, ...]:
    """Views of four dimensions, the mask for them, and the leading sizes of the result, () without heads."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ShapeError(f"{name}: expected at least two dimensions, got shape {tuple(x.shape)}")
    rank = max(x.dim() for x in (query, key, value))
    query, key, value = (x[(None,) * (max(rank, 3) - x.dim())] for x in (query, key, value))
    shapes = [tuple(x.shape) for x in (query, key, value)]
    H, *heads = (shape[-3] for shape in shapes)
    if enable_gqa:
        if any(G == 0 or H % G for G in heads):
            raise ShapeError(f"key, value: expected numbers of heads that divide {H}, got {heads}")
        if heads[0] != heads[1]:
            key, value = (x.repeat_interleave(H // x.shape[-3], dim=-3) for x in (key, value))
    else:
        H = max(H, *heads) if 0 not in (H, *heads) else 0
        if any(shape[-3] not in (1, H) for shape in shapes):
            raise ShapeError(
                f"key, value: expected as many heads as query, or enable_gqa, got shapes {shapes[1]} and "
                f"{shapes[2]} beside {shapes[0]}"
            )
        query = query.expand(*query.shape[:-3], H, *query.shape[-2:])
        if heads[0] != heads[1]:
            key, value = (x.expand(*x.shape[:-3], H, *x.shape[-2:]) for x in (key, value))
    try:
        batch = torch.broadcast_shapes(*(shape[:-3] for shape in shapes))
    except RuntimeError:
        raise ShapeError(f"key, value: expected leading sizes that broadcast, got shapes {shapes}") from None
    query, key, value = (_merge(x, batch) for x in (query, key, value))
    if attn_mask is not None and attn_mask.dim() > 3:
        if attn_mask.dim() > rank:
            raise ShapeError(
                f"attn_mask: expected at most {rank} dimensions, got shape {tuple(attn_mask.shape)}"
            )
        attn_mask = _merge(attn_mask, batch)
    return query, key, value, attn_mask, (*batch, H) if rank > 2 else ()


def _merge(x: Any, batch: Any) -> Any:
    """x (..., a, b, c) as (product of batch, a, b, c)."""
    return x.expand(*batch, *x.shape[-3:]).reshape(-1 if batch else 1, *x.shape[-3:])


def _unflatten(x: Any, batch: Any) -> Any:
    """(B, H, ...) with its first two dimensions as they came."""
    if len(batch) == 2:
        return x
    return x.unflatten(0, batch[:-1]) if batch[1:] else x[0] if batch else x[0, 0]


def _autocast(*tensors: Any) -> Any:
    """Tensors in autocast's dtype, as torch's function is cast: all floating ones but float64."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.float16, torch.bfloat16)
    return (x.to(dtype) if x is not None and x.dtype in eligible else x for x in tensors)


def _is_traced(query: Any) -> bool:
    """Whether something else than plain eager tensors is at work: a compiler, a dispatch mode, a subclass."""
    return (
        torch.compiler.is_compiling()
        or type(query) not in (Tensor, torch.nn.Parameter)
        or query.device.type not in _DEVICES
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _tensor(x: Any) -> Any:
    return None if x is None else torch.as_tensor(x)


def _flag(verify: Any) -> bool:
    if isinstance(verify, str) and verify == _AUTO:
        return True
    if not isinstance(verify, bool):
        raise DTypeError(f"verify: expected True, False or 'auto', got {verify!r}")
    return verify


# ---- operators

_TENSORS = ("attn_mask", "alibi_slopes", "sinks", "kv_lengths", "query_offset", "seed")
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, "
    + "".join(f"Tensor? {name}, " for name in _TENSORS)
    + "str causal, SymInt? left, SymInt? right, float? softcap, float? scale, float dropout_p, float? tolerance, "
    "str precision_qk, str precision_pv, str min_precision, str max_precision, str structure, bool verify, "
    "int? num_threads"
)


def _options(tensors: Any, others: Any) -> dict[str, Any]:
    """Options of `adaattn.attention` for an operator's arguments behind value."""
    causal, left, right, softcap, scale, dropout_p, tolerance, qk, pv, least, most, structure, verify, n = others
    options = dict(zip(_TENSORS, tensors, strict=True)) | {
        "causal": causal or False,
        "window": None if left is right is None else (left, right),
        "softcap": softcap,
        "scale": scale,
        "dropout_p": dropout_p,
        "tolerance": tolerance,
        "precision": qk if qk == pv else (qk, pv),
        "num_threads": n,
    }
    given = {"min_precision": least, "max_precision": most, "structure": structure}
    return options | given | ({} if verify else {"verify": False})


def _attention(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    return compute(query, key, value, **_options(rest[: len(_TENSORS)], rest[len(_TENSORS) :]))


def _attention_lse(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    options = _options(rest[: len(_TENSORS)], rest[len(_TENSORS) :])
    return compute(query, key, value, return_lse=True, **options)


def _fake(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    return _out_like(query, value)


def _fake_lse(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    out = _fake(query, key, value)
    return out, _lse_like(out)


_GRADIENTS = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")


def _backward(grad_out: Any, out: Any, lse: Any, needs: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
    options = _options(rest[: len(_TENSORS)], rest[len(_TENSORS) :])
    inputs = {"query": query, "key": key, "value": value} | options
    wanted = [name for name, need in zip(_GRADIENTS, needs, strict=True) if need]
    if not (out.numel() and key.shape[2]):
        return [torch.zeros(inputs[name].shape, dtype=inputs[name].dtype) for name in wanted]
    for name in ("tolerance", "precision", "min_precision", "max_precision", "structure", "verify"):
        options.pop(name, None)  # the gradient is that of exact attention
    _read(options)
    options["num_threads"] = options["num_threads"] or torch.get_num_threads()
    arrays = (_array(x) for x in (grad_out, query, key, value, out, lse))
    gradients = api.attention_backward(*arrays, needs=wanted, **options)
    return [torch.as_tensor(getattr(gradients, name)).to(inputs[name].dtype) for name in wanted]


def _fake_backward(grad_out: Any, out: Any, lse: Any, needs: Any, *inputs: Any) -> Any:
    arrays = (*inputs[:4], inputs[4], inputs[5])
    return [x.new_empty(x.shape) for x, need in zip(arrays, needs, strict=True) if need]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    tensors = inputs[: 3 + len(_TENSORS)]
    ctx.save_for_backward(*tensors, *output)
    ctx.others = inputs[len(tensors) :]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
    *tensors, out, lse = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[: len(_GRADIENTS)])
    found = iter(
        torch.ops.adaattn.attention_backward(grad_out, out, lse, needs, *tensors, *ctx.others)
    )
    nothing = [None] * (len(tensors) - len(_GRADIENTS) + len(ctx.others))
    return (*(next(found) if need else None for need in needs), *nothing)


def _operator(name: str, function: Any, fake: Any, schema: str) -> Any:
    operator = torch.library.custom_op(f"adaattn::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


_operator("attention", _attention, _fake, f"({_ARGUMENTS}) -> Tensor")
_operator("attention_lse", _attention_lse, _fake_lse, f"({_ARGUMENTS}) -> (Tensor, Tensor)").register_autograd(
    _gradients, setup_context=_save
)
_operator(
    "attention_backward",
    _backward,
    _fake_backward,
    f"(Tensor grad_out, Tensor out, Tensor lse, bool[] needs, {_ARGUMENTS}) -> Tensor[]",
)
