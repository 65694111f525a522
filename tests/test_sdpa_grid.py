"""The grid of PyTorch's own tests of scaled_dot_product_attention, under FlashAttention's rule: against
float64, our error is at most twice that of a plain implementation in the same precision, and (as there) twice
the fp32 rounding of adding 0.3.

Plain is torch's math backend: half dtypes are computed in fp32 and rounded once. Both references are made for
a sample of the queries, another one in every configuration; with --full for all.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import adaattn

torch = pytest.importorskip("torch")

ROWS = 267
MASKS = ["none", "causal", "2D", "4D"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def math_backend() -> Iterator[None]:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        yield


@lru_cache(maxsize=1)
def tensors(B: int, H: int, S: int, D: int) -> list[Any]:
    generator = torch.Generator().manual_seed(S * D + B + H)
    return [torch.randn(B, H, S, D, generator=generator) for _ in range(3)]


@lru_cache(maxsize=2)
def mask_of(kind: str, B: int, H: int, S: int) -> Any:
    """2D masks hide keys, 4D masks are added to the scores."""
    generator = torch.Generator().manual_seed(S)
    if kind == "2D":
        return (torch.rand(S, S, generator=generator) < 0.8) | torch.eye(S, dtype=torch.bool)
    return torch.randn(B, H, S, S, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("D", [8, 16, 64, 72, 80, 96, 111, 128, 256])
@pytest.mark.parametrize("S", [267, 1030])
@pytest.mark.parametrize("H", [1, 3])
@pytest.mark.parametrize("B", [2, 12])
def test_configuration(
    B: int, H: int, S: int, D: int, mask: str, dtype: Any, request: pytest.FixtureRequest
) -> None:
    query, key, value = (x.to(dtype) for x in tensors(B, H, S, D))
    options: dict[str, Any] = {"causal": mask == "causal"}
    if mask in ("2D", "4D"):
        options["attn_mask"] = mask_of(mask, B, H, S)
        if mask == "4D":
            options["attn_mask"] = options["attn_mask"].to(dtype)
    out = adaattn.attention(query, key, value, **options)
    assert out.dtype == dtype and out.shape == (B, H, S, D) and out.isfinite().all()

    rows = torch.arange(S)
    if not request.config.getoption("--full"):
        rng = np.random.default_rng(zlib.crc32(request.node.name.encode()))
        rows = torch.from_numpy(np.sort(rng.choice(S, ROWS, replace=False)))
    sees = torch.ones(S, S, dtype=torch.bool).tril() if mask == "causal" else options.get("attn_mask")
    sees = None if sees is None else sees[..., rows, :]
    exact, plain = (plain_attention(query[:, :, rows], key, value, sees, t) for t in (torch.float64, dtype))
    ours_error, plain_error = (x.double() - exact for x in (out[:, :, rows], plain))
    ours_max, plain_max, rounding = map(
        largest, (ours_error, plain_error, exact.float() + 0.3 - 0.3 - exact.float())
    )
    assert ours_max <= 2 * plain_max + 2 * rounding
    assert ours_error.norm().item() <= 2 * plain_error.norm().item()


def largest(x: Any) -> float:
    return x.abs().max().item()


def plain_attention(query: Any, key: Any, value: Any, mask: Any, dtype: Any) -> Any:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    arrays = (x.to(dtype) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*arrays, attn_mask=mask)
