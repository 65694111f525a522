"""The CUDA kernels of the gradients on the model of cuda/model.h, against the oracle; and faults that it must
see."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import re
import shutil
from typing import Any

import cuda_backward
import ml_dtypes
import numpy as np
import pytest
from cuda_model import CUDA
from support import (
    BF16,
    CASES,
    F16,
    F32,
    F64,
    Array,
    Options,
    Shape,
    finite,
    inputs,
    largest,
    same_bits,
    score_size,
)

from adaattn import Gradients, reference

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

UNITS = {"fp64": 2.0**-53, "fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
RUNGS = [("fp64", F64), ("fp32", F32), ("fp16", F16), ("bf16", BF16)]
SMALL = Shape(2, 2, 1, 21, 50, 24, 16)
FIRST_SEED = int(os.environ.get("ADAATTN_MODEL_SEED", "1"))


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return cuda_backward.build(tmp_path_factory.mktemp("cuda_backward"))


def problem(
    rng: np.random.Generator, shape: Shape, dtype: Any, options: Options, spread: float = 1.0
) -> list[Array]:
    """grad_out, query, key, value, out and lse, the last two the oracle's."""
    arrays = inputs(rng, shape, dtype, spread)
    grad_out = rng.standard_normal((*arrays[0].shape[:3], shape.E)).astype(dtype)
    out, lse = reference.attention(*arrays, return_lse=True, **options)
    return [grad_out, *arrays, out.astype(dtype), lse.astype(F64 if dtype == F64 else F32)]


def everything(options: Options) -> list[str]:
    """All that these options have gradients for."""
    names = ["query", "key", "value", *(x for x in ("sinks", "alibi_slopes") if options.get(x) is not None)]
    mask = options.get("attn_mask")
    return names if mask is None or mask.dtype == bool else [*names, "attn_mask"]


def row_norms(x: Array) -> Array:
    return np.sqrt(np.sum(finite(x) ** 2, axis=-1))


def check(
    kernels: ctypes.CDLL,
    rung: str,
    arrays: list[Array],
    options: Options,
    *,
    unfit: int | None = 0,
    **more: Any,
) -> Gradients:
    """Compare with the oracle; unfit: of how many key heads float64 may have to compute (None: any number), as
    it would mend what a fault makes NaN.

    The bound is that of test_backward.py: rounding of a weight times the sizes of what it is multiplied with.
    """
    grad_out, query, key, value, *_ = arrays
    needs = more.pop("needs", everything(options))
    actual, again = cuda_backward.attention_backward(
        kernels, *arrays, rung=rung, needs=needs, **options, **more
    )
    exact = reference.attention_backward(*arrays, needs=needs, **options)
    unit = UNITS[rung]
    error = min(unit, 2.0**-24) * (16 + 8 * score_size(query, key, options))
    if query.dtype in (F16, BF16):
        error += 2 * UNITS["fp16" if query.dtype == F16 else "bf16"]  # of out
    if rung in ("fp16", "bf16"):
        error += 2 * unit
    scale = options.get("scale") or query.shape[-1] ** -0.5
    weight = row_norms(grad_out).sum() / (1 - options.get("dropout_p", 0.0))
    score = 2 * weight * np.max(row_norms(value))
    reach = query.shape[2] + key.shape[2] + largest(np.asarray(options.get("query_offset", 0)))
    sizes = Gradients(
        query=scale * score * np.max(row_norms(key)), key=scale * score * np.max(row_norms(query)),
        value=weight, attn_mask=score, sinks=score, alibi_slopes=score * reach,
    )  # fmt: skip
    for name, a, e, size in zip(Gradients._fields, actual, exact, sizes, strict=True):
        if a is None:
            continue
        rounding = float(ml_dtypes.finfo(a.dtype).eps)
        tiny = float(ml_dtypes.finfo(a.dtype).smallest_subnormal)
        np.testing.assert_allclose(a.astype(F64), e, rtol=rounding, atol=error * size + tiny, err_msg=name)
        if unit > 2.0**-24 and not options:  # far closer than that, where nothing cancels
            assert np.linalg.norm(a.astype(F64) - e) <= 3 * unit * np.linalg.norm(e), name
    assert unfit is None or rung == "fp64" or int(again.sum()) == unfit
    return actual


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.startswith(("precision", "two threads"))]
)
def test_options(case: str, kernels: ctypes.CDLL, rng: np.random.Generator) -> None:
    for rung, dtype in RUNGS:
        options = CASES[case](rng, SMALL)
        unfit = None if "lowest" in case else 0
        check(kernels, rung, problem(rng, SMALL, dtype, options), options, unfit=unfit)
