"""PyTorch: its own attention function and module with an error budget, gradients included.

    python examples/torch_drop_in.py

Tensors are read and written in place. Times are medians of calls that take turns on torch's threads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    sys.exit("torch_drop_in.py needs PyTorch: pip install 'adaattn[torch]'")

from adaattn.integrations.torch import AdaAttention, scaled_dot_product_attention

ROUNDS = 7


def median_ms(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(of_name)[ROUNDS // 2] for name, of_name in times.items()}


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest relative error of a head (of all of it where there are no heads)."""
    dims = (-2, -1)
    return float(((x - exact).norm(dim=dims) / exact.norm(dim=dims)).max())


def the_function() -> None:
    print("torch.nn.functional.scaled_dot_product_attention, (1, 8, 2048, 64), causal:")
    query, key, value = torch.randn(3, 1, 8, 2048, 64)
    exact = F.scaled_dot_product_attention(*(x.double() for x in (query, key, value)), is_causal=True)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "torch": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True),
        "adaattn": lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
    }
    for tolerance in (1e-2, 5e-2):
        calls[f"  tolerance {tolerance:g}"] = lambda t=tolerance: scaled_dot_product_attention(
            query, key, value, is_causal=True, tolerance=t
        )
    for name, ms in median_ms(calls).items():
        print(f"  {name:<18}{ms:6.1f} ms   error {error(calls[name](), exact):.1e}")


def gradients() -> None:
    print("\nGradients of the sum of the squared output, beside torch's in float64:")
    tensors = torch.randn(3, 1, 4, 512, 64, dtype=torch.float64)

    def of(attention: Callable, dtype: torch.dtype, **options: float) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        attention(*leaves, is_causal=True, **options).square().sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    right = of(F.scaled_dot_product_attention, torch.float64)
    for name, options in (("exact", {}), ("tolerance 1e-2", {"tolerance": 1e-2})):
        found = of(scaled_dot_product_attention, torch.float32, **options)
        told = (
            f"{what} {error(x, y):.1e}"
            for what, x, y in zip(("query", "key", "value"), found, right, strict=True)
        )
        print(f"  {name:<16}" + ", ".join(told))


def the_module() -> None:
    print("\nAdaAttention in place of torch.nn.MultiheadAttention, inside torch's own encoder layer:")
    layer = torch.nn.TransformerEncoderLayer(256, 8, dim_feedforward=512, dropout=0.0, batch_first=True)
    x = torch.randn(2, 512, 256)
    before = layer(x).detach()
    ours = AdaAttention(256, 8, batch_first=True, tolerance=1e-2)
    ours.load_state_dict(layer.self_attn.state_dict())  # the same parameters by the same names
    layer.self_attn = ours
    after = layer(x)
    after.square().mean().backward()
    change = float((after.detach() - before).norm() / before.norm())
    print(f"  the layer's output changed by {change:.1e},", end=" ")
    print(f"gradients reach its {sum(p.grad is not None for p in layer.parameters())} parameters")


if __name__ == "__main__":
    torch.manual_seed(0)
    the_function()
    gradients()
    the_module()
