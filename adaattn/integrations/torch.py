"""Attention of PyTorch tensors: torch's own function, within an error budget, as a custom operator.

A call that needs no gradient and is not traced goes straight to the engine, since an operator in Python
costs 10 µs. Every other one goes through `adaattn::attention`, or `adaattn::attention_lse` where gradients
will be asked for: those need the lse, whose error a tolerance counts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..api import check_verify
from ..errors import ArgumentError, DTypeError, ShapeError
from ..stats import tolerance_of
from .torch_operators import compute

_AUTO = "auto"
_DEVICES = ("cpu", "cuda")


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
    """Torch's function of this name, with an error budget and `adaattn.attention`'s options.

    Tensors are read and written in place, on the CPU or a CUDA GPU. Works under `torch.compile` and
    `torch.export`, under autocast, and is differentiable; a tolerance is that of the gradients, too.

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
    is_causal : bool, "upper_left" or "lower_right"
        True is "upper_left": query i sees keys up to i, also beside a mask. "lower_right": up to S - T + i.
    scale : float, optional
        Default 1 / sqrt(D); above 0.
    enable_gqa : bool
        Whether several query heads may share a head of keys and values.
    tolerance, policy, window, softcap, alibi_slopes, sinks, kv_lengths, query_offset
        As in `adaattn.attention`, for four-dimensional tensors; vectors may be tensors.
    precision, min_precision, max_precision, structure, verify
        As in `adaattn.attention`.
    return_lse : bool
        Also return the logarithm of each row's sum of exponentials, (..., H, T); it has no gradient.
    num_threads : int, optional
        At most this many threads; default ``torch.get_num_threads()``.

    Returns
    -------
    out : Tensor of shape (..., H, T, E)
        In query's dtype, laid out in memory as (..., T, H, E), as torch's own kernels do.

    Raises
    ------
    adaattn.Error
        As in `adaattn.attention`; also for a mask with NaN or +inf, which torch makes NaN of, and for
        tensors with tangents or inside the transforms of `torch.func`, which there are no rules for.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(query, key, value, attn_mask, alibi_slopes, sinks)
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise ArgumentError(
            "query, key, value: expected plain tensors, got those of torch.func.vmap, grad or another of its "
            "transforms; a leading dimension and torch.autograd.grad do the same"
        )
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
    if needs_grad or is_traced(query):
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


# ---- tensors as torch's function takes them


def _refuse_tangents(*tensors: Any) -> None:
    """Neither the engine nor an operator without an autograd formula minds tangents: they would be lost."""
    for x in tensors:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise ArgumentError(
                "query, key, value, ...: expected tensors without tangents, got some of forward-mode "
                "differentiation"
            )


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
    return x.expand(*batch, *x.shape[-3:]).reshape(math.prod(batch), *x.shape[-3:])


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


def is_traced(query: Any) -> bool:
    """Whether something else than plain eager tensors is at work: a compiler, a dispatch mode, a subclass."""
    return (
        torch.compiler.is_compiling()
        or type(query) not in (Tensor, torch.nn.Parameter)
        or query.device.type not in _DEVICES
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _tensor(x: Any) -> Any:
    return None if x is None else torch.as_tensor(x)


def _flag(verify: Any) -> bool | None:
    """The operator's: None for "auto"."""
    return None if isinstance(check_verify(verify), str) else verify


def options_of_calls(
    *,
    tolerance: float | None = None,
    policy: str | None = None,
    precision: str | tuple[str, str] = _AUTO,
    min_precision: str = _AUTO,
    max_precision: str = _AUTO,
    structure: str = _AUTO,
    verify: bool | str = _AUTO,
    num_threads: int | None = None,
) -> dict[str, Any]:
    """Those options of `scaled_dot_product_attention` that do not change what is computed, for many calls."""
    return {
        "tolerance": tolerance_of(tolerance, policy),
        "precision": precision,
        "min_precision": min_precision,
        "max_precision": max_precision,
        "structure": structure,
        "verify": verify,
        "num_threads": num_threads,
    }


# ---- the module


class AdaAttention(torch.nn.MultiheadAttention):  # type: ignore[misc]
    """`torch.nn.MultiheadAttention` within an error budget: same parameters, state dict, inputs and outputs.

    A row that sees no key gives zeros, and weights of zero, where torch's gives NaN if weights are asked for.
    In training, weights are those before dropout.

    Parameters
    ----------
    embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        As in `torch.nn.MultiheadAttention`.
    tolerance, policy, precision, min_precision, max_precision, structure, verify, num_threads
        As in `scaled_dot_product_attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        **budget: Any,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.options = options_of_calls(**budget)

    def _reset_parameters(self) -> None:
        """Torch's, the last step of its __init__; then what keeps `torch.nn.TransformerEncoderLayer` from its
        fused layer, which would pass `forward` by."""
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        """As torch's: masks are True where attention is *not* allowed, or are added to the scores.

        With `need_weights`, torch's default, exact weights are computed as well, in time and memory of T * S.
        """
        if query.is_nested:
            raise ArgumentError(
                "query: expected a dense tensor, got a nested one; make torch.nn.TransformerEncoder with "
                "enable_nested_tensor=False"
            )
        if is_causal and attn_mask is None:
            raise ArgumentError("attn_mask: expected the mask that is_causal tells of, got None")
        batched, shared = query.dim() == 3, query is key and key is value
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        B, S = key.shape[:2]
        query, key, value = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x in self._project(query, key, value, shared)
        )
        added = key.shape[2] - S
        causal = is_causal and not added
        seen = self._visible(None if causal else attn_mask, key_padding_mask, (B, query.shape[2], S), added)
        out = scaled_dot_product_attention(
            query, key, value, **seen, is_causal=causal, dropout_p=self.dropout if self.training else 0.0,
            **self.options,
        )  # fmt: skip
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        weights = _weights(query, key, causal, **seen)
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return out, weights if batched else weights[0]

    def _project(self, query: Any, key: Any, value: Any, shared: bool) -> Any:
        """Queries, keys and values (B, n, C), with the keys and values that the module adds."""
        if shared and self.in_proj_weight is not None:
            query, key, value = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            query, key, value = map(F.linear, (query, key, value), weights, biases)
        if self.bias_k is not None:
            key, value = (
                torch.cat((x, bias.expand(len(x), 1, -1)), dim=1)
                for x, bias in ((key, self.bias_k), (value, self.bias_v))
            )
        if self.add_zero_attn:
            key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
        return query, key, value

    def _visible(
        self, attn_mask: Any, padding: Any, sizes: tuple[int, int, int], added: int
    ) -> dict[str, Any]:
        """Options for torch's two masks, over (B, T, S) and the keys that the module adds."""
        B, T, S = sizes
        for name, mask, shapes in (
            ("attn_mask", attn_mask, [(T, S), (B * self.num_heads, T, S)]),
            ("key_padding_mask", padding, [(B, S)]),
        ):
            if mask is None:
                continue
            if tuple(mask.shape) not in shapes:
                raise ShapeError(
                    f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}"
                )
            if mask.dtype is not torch.bool and not mask.is_floating_point():
                raise DTypeError(f"{name}: expected bool or a floating dtype, got {mask.dtype}")
        attn_mask, padding = (
            None if mask is None else _positive(F.pad(mask, (0, added))) for mask in (attn_mask, padding)
        )
        if padding is not None and padding.dtype is torch.bool and attn_mask is None:
            return hidden_keys(padding)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (B, self.num_heads))
        if padding is not None:
            padding = padding[:, None, None, :]
        return {"attn_mask": padding if attn_mask is None else combined(attn_mask, padding)}


def _positive(mask: Any) -> Any:
    """A mask of `torch.nn.MultiheadAttention` as one of its function: True takes part."""
    return ~mask if mask.dtype is torch.bool else mask


def combined(mask: Any, other: Any) -> Any:
    """Both of two masks, bool (True: takes part) or floating; None hides nothing."""
    if mask is None or other is None:
        return other if mask is None else mask
    if mask.dtype is torch.bool and other.dtype is torch.bool:
        return mask & other
    if mask.dtype is torch.bool or other.dtype is torch.bool:
        keep, bias = (mask, other) if mask.dtype is torch.bool else (other, mask)
        return torch.where(keep, bias, -torch.inf)
    return mask + other


def hidden_keys(keep: Any) -> dict[str, Any]:
    """Options that hide the keys of which keep (B, S) says False: lengths where those end each sequence."""
    if not torch.compiler.is_compiling():
        S = keep.shape[1]
        lengths = keep.sum(dim=-1)
        if bool((lengths == S).all()):
            return {}
        if bool((keep == (torch.arange(S, device=keep.device) < lengths[:, None])).all()):
            return {"kv_lengths": lengths}
    return {"attn_mask": keep[:, None, None, :]}


def _weights(query: Any, key: Any, causal: bool, attn_mask: Any = None, kv_lengths: Any = None) -> Any:
    """Weights (B, H, T, S) of exact attention; zeros for a row that sees no key."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    T, S = scores.shape[-2:]
    at = torch.arange(S, device=scores.device)
    mask = attn_mask
    if kv_lengths is not None:
        mask = combined(mask, (at < kv_lengths[:, None])[:, None, None, :])
    if causal:
        mask = combined(mask, at <= at[:T, None])
    if mask is None:
        return scores.softmax(dim=-1)
    bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype is torch.bool else mask
    empty = bias.isneginf().all(dim=-1, keepdim=True)
    weights = (scores + bias).masked_fill(empty, 0.0).softmax(dim=-1)
    return weights.masked_fill(empty, 0.0)
