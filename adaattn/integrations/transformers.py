"""Attention of Hugging Face transformers: a name for ``attn_implementation`` that keeps an error budget.

A model asks for its mask once and hands it to every layer. Where the pattern is known (causal, a window,
padding) it gets a `Visibility`, a tensor that knows the pattern and makes its entries only if somebody looks
at them: the engine skips what is hidden, and nothing of size T * S exists. Other patterns are the masks of
sdpa.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from ..errors import ArgumentError
from ..nn.stats import ModelStatistics, Tally
from .torch import combined, hidden_keys, is_traced, options_of_calls, scaled_dot_product_attention
from .torch_operators import compute

_tallies: WeakKeyDictionary[Any, Tally] = WeakKeyDictionary()  # modules with attention to what they computed
_registered: set[str] = set()


def register(
    name: str = "adaattn",
    *,
    collect_statistics: bool = False,
    **budget: Any,
) -> None:
    """Make attention available to models as ``attn_implementation=name``; again with one name: new options.

    Encoders and decoders, padding on either side, grouped queries, sliding windows, softcap, sinks, position
    biases, dynamic and static caches. Attention weights (``output_attentions``) do not exist.

    Parameters
    ----------
    name : str
        What models are told; several may be registered, with options of their own.
    tolerance, policy, precision, min_precision, max_precision, structure, verify, num_threads
        As in `adaattn.integrations.torch.scaled_dot_product_attention`, for every call.
    collect_statistics : bool
        Whether calls count in `statistics`, which costs some 50 to 100 µs each. Those that need gradients,
        drop out or are compiled never count.

    Raises
    ------
    ArgumentError
        The name belongs to an implementation of transformers' own, or the tolerance makes no sense.

    Examples
    --------
    >>> import transformers, adaattn.integrations.transformers as integration
    >>> integration.register(policy="balanced", collect_statistics=True)
    >>> config = transformers.BertConfig(num_hidden_layers=1)
    >>> model = transformers.AutoModel.from_config(config, attn_implementation="adaattn")
    """
    if name not in _registered and (
        name == "eager"
        or name in AttentionInterface().valid_keys()
        or name in AttentionMaskInterface().valid_keys()
    ):
        raise ArgumentError(f"name: expected one that is free, got {name!r}, which transformers has already")
    options = options_of_calls(**budget)

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        return _attention(module, query, key, value, attention_mask, options, collect_statistics, **arguments)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _mask)
    _registered.add(name)


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    options: dict[str, Any],
    collect: bool,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    output_attentions: bool | None = False,
    **ignored: Any,
) -> tuple[Any, None]:
    """transformers' contract: (B, H, T, D), (B, G, S, D), (B, G, S, E) to (B, T, H, E) and no weights."""
    if output_attentions:
        raise ArgumentError(
            "output_attentions: expected False, since weights are never stored, got True; "
            "use attn_implementation='eager'"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    seen = _visible(attention_mask, query, key, bool(is_causal), sliding_window)
    if position_bias is not None:
        seen["attn_mask"] = combined(seen.get("attn_mask"), position_bias)
    if s_aux is not None:
        s_aux = s_aux.reshape(-1)
    tensors = (query, key, value, s_aux, position_bias)
    plain = not (
        dropout
        or is_traced(query)
        or torch.is_autocast_enabled(query.device.type)
        or query.shape[0] != key.shape[0]
        or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))
    )
    if plain:
        out = compute(
            query,
            key,
            value,
            **seen,
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
            return_report=collect,
            **options,
        )
        if collect and isinstance(out, tuple):
            out, report = out
            _tallies.setdefault(module, Tally()).add(report, planned=report.plan is not None)
    else:
        seen["is_causal"] = seen.pop("causal")
        out = scaled_dot_product_attention(
            query, key, value, **seen, dropout_p=dropout, scale=scaling, enable_gqa=True, softcap=softcap,
            sinks=s_aux, **options,
        )  # fmt: skip
    return out.transpose(1, 2), None


def _visible(mask: Any, query: Any, key: Any, is_causal: bool, sliding_window: int | None) -> dict[str, Any]:
    """Options for what queries may attend to."""
    if isinstance(mask, Visibility):
        if mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2]):
            return dict(mask.options)
        mask = mask.entries()
    causal: bool | str = False
    window = None
    if mask is None:
        # As sdpa reads it: the diagonal starts at the first key, but for a single query at the last one.
        causal = "upper_left" if is_causal and query.shape[2] > 1 else False
        if sliding_window is not None:
            window = (sliding_window - 1, 0 if is_causal else sliding_window - 1)
    return {"attn_mask": mask, "causal": causal, "window": window}


# ---- masks


class Visibility(Tensor):  # type: ignore[misc]
    """A boolean mask (B, 1, T, S) as options of the engine; any operation sees its entries."""

    options: dict[str, Any]
    make: Callable[[], Any]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], device: Any, options: dict[str, Any], make: Callable[[], Any]
    ) -> Any:
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        self.options, self.make = options, make
        return self

    def entries(self) -> Any:
        """The mask as a plain tensor."""
        return self.make()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(cls, cls.entries, (args, kwargs or {}))
        return function(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Any = None,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **arguments: Any,
) -> Any:
    """transformers' contract: which keys kv_offset + j queries q_offset + i see, or None as for sdpa."""

    def make(skip: bool = False) -> Any:
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=skip and allow_is_causal_skip,
            allow_is_bidirectional_skip=skip and allow_is_bidirectional_skip,
            use_vmap=use_vmap, device=device, **arguments,
        )  # fmt: skip

    may_skip = (allow_is_causal_skip or allow_is_bidirectional_skip) and not use_vmap and q_length > 1
    pattern = _pattern(mask_function) if may_skip and not torch.compiler.is_compiling() else None
    if pattern is None:
        return make(skip=True)
    causal, left, right = pattern
    options: dict[str, Any] = {"causal": "lower_right" if causal else False}
    options["window"] = None if left is right is None else (left, right)
    options["query_offset"] = int(q_offset) - kv_offset
    if attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        options |= hidden_keys(padding[:, kv_offset : kv_offset + kv_length])
    if len(options) == 3 and not causal and options["window"] is None:
        return None
    return Visibility((batch_size, 1, q_length, kv_length), device, options, make)


def _pattern(function: Any) -> tuple[bool, int | None, int | None] | None:
    """(causal, left, right) for a mask function of transformers' own, else None."""
    if function is masking_utils.causal_mask_function:
        return True, None, None
    if function is masking_utils.bidirectional_mask_function:
        return False, None, None
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    name = function.__qualname__
    cells = inspect.getclosurevars(function).nonlocals
    window = cells.get("sliding_window")
    if name == "and_masks.<locals>.and_mask":
        parts = [_pattern(part) for part in cells["mask_functions"]]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        lefts = [left for _, left, _ in known if left is not None]
        rights = [right for _, _, right in known if right is not None]
        return any(part[0] for part in known), min(lefts, default=None), min(rights, default=None)
    if isinstance(window, int) and name == "sliding_window_overlay.<locals>.inner_mask":
        return False, window - 1, None
    if isinstance(window, int) and name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        return False, window, window
    return None


# ---- statistics


def statistics(model: Any) -> ModelStatistics:
    """Statistics of every layer of a model, and of all of them together, if `register` was told to collect.

    Parameters
    ----------
    model : torch.nn.Module
        A model of transformers, or a part of one.

    Returns
    -------
    adaattn.nn.ModelStatistics
        Its layers by the names that the modules have in the model.

    Raises
    ------
    ArgumentError
        No call of its layers was collected.
    """
    found = {name: _tallies[module] for name, module in model.named_modules() if module in _tallies}
    if not found:
        raise ArgumentError(
            "model: expected calls with an attn_implementation of `register` and collect_statistics, got none"
        )
    total = Tally()
    for tally in found.values():
        total.merge(tally)
    return ModelStatistics({name: tally.summary() for name, tally in found.items()}, total.summary())


def reset_statistics(model: Any) -> None:
    """Forget the calls that a model's layers collected so far."""
    for module in model.modules():
        _tallies.pop(module, None)
