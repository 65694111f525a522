"""`adaattn.linear` on a GPU without one: the backend on the model of cuda/model.h, and cuBLAS by loops
(fake_cublaslt.c), in processes of their own."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_build
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from support import BF16, F16, F32, F64, Array, in_new_process
from test_gpu_mock import Fake, model, set_value, value

import adaattn
from adaattn import gpu, gpu_products

assert model  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

UNITS = {
    "fp8": 2.0**-4,
    "bf16": 2.0**-8,
    "fp16": 2.0**-11,
    "tf32": 2.0**-10,
    "fp32": 2.0**-22,
    "fp64": 2.0**-50,
}


class Tensor(Fake):
    """One with what linear asks its library for."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> str:
        return str(self.array.dtype)

    def reshape(self, *shape: int) -> Tensor:
        return Tensor(self.array.reshape(shape))

    def __array_namespace__(self) -> Any:
        import types

        return types.SimpleNamespace(from_dlpack=lambda x: Tensor(Fake.taken(x).array))


def build_blas(cc: str, to: Path, *flags: str) -> str:
    source = ROOT / "tests/fake_cublaslt.c"
    subprocess.run([cc, "-std=c11", "-O2", *flags, "-shared", "-fPIC", "-o", to, source, "-lm"], check=True)
    return str(to)


@pytest.fixture(scope="session")
def blas(cc: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_blas(cc, tmp_path_factory.mktemp("blas") / "libcublasLt.so.13")


def run(function: Callable[..., Any], model: str, blas: str, *more: Any) -> Any:
    return in_new_process(function, *more, ADAATTN_CUDA_PLUGIN=model, ADAATTN_CUBLASLT=blas)


def fake() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["ADAATTN_CUBLASLT"])


def of_fake(name: str) -> int:
    return ctypes.c_int.in_dll(fake(), f"fake_{name}").value


def set_fake(name: str, x: int) -> None:
    ctypes.c_int.in_dll(fake(), f"fake_{name}").value = x


def arrays(M: int, N: int, K: int, dtype: Any = F32, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(n).astype(dtype) for n in ((M, K), (N, K), (N,)))  # type: ignore[return-value]


def exact(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y: Array = x.astype(F64) @ weight.astype(F64).T
    return y if bias is None else y + bias.astype(F64)


def off(y: Array, right: Array) -> float:
    return float(np.linalg.norm(y.astype(F64) - right) / np.linalg.norm(right))


def linear(x: Array, weight: Array, bias: Array | None = None, **options: Any) -> tuple[Array, Any]:
    y, report = adaattn.linear(
        Tensor(x), Tensor(weight), None if bias is None else Tensor(bias), return_report=True, **options
    )
    assert isinstance(y, Tensor) and y.dtype == str(x.dtype)
    return y.array, report


def _products() -> None:
    """Every product of every dtype, sizes that fit nothing, and with and without a bias."""
    for dtype in (F32, F64, F16, BF16):
        eps = float(ml_dtypes.finfo(dtype).eps)
        for (M, N, K), product in itertools.product(
            [(1, 1, 1), (3, 5, 7), (17, 33, 50), (40, 64, 32)],
            gpu_products._products_of(str(np.dtype(dtype))),
        ):
            x, weight, bias = arrays(M, N, K, dtype)
            for b in (None, bias):
                y, report = linear(x, weight, b, precision=product)
                assert y.shape == (M, N) and (report.precision == product).all()
                terms = np.abs(x.astype(F64)) @ np.abs(weight.astype(F64)).T + 1
                own = product in ("bf16", "fp16") and dtype != F32
                bound = (3 * (2.0**-22 if own else UNITS[product]) + eps) * terms
                assert (np.abs(y.astype(F64) - exact(x, weight, b)) <= bound).all(), (dtype, product, M, N, K)
                assert report.measured_error <= 3 * UNITS[product]
    assert value("live") == 0 and of_fake("live") == 0 and of_fake("handles") == 1


def _layouts() -> None:
    """Operands are taken where they lie if cuBLAS can, and nothing beside them is read."""
    x, weight, bias = arrays(6, 10, 24)
    right = exact(x, weight, bias)
    wide = np.full((12, 60), np.nan, F32)
    wide[::2, 1:49:2] = x
    padded = np.full((10, 27), np.nan, F32)
    padded[:, 1:25] = weight
    flipped = np.ascontiguousarray(weight[:, ::-1])[:, ::-1]
    spread = np.full(20, np.nan, F32)
    spread[::2] = bias
    odd = np.concatenate([bias[:1], bias])[1:]  # at no multiple of 16 bytes
    for a, b, c in itertools.product(
        (x, wide[::2, 1:49:2], np.asfortranarray(x)),
        (weight, padded[:, 1:25], flipped),
        (bias, spread[::2], odd),
    ):
        for product in ("fp8", "bf16", "fp16", "fp32", "fp64"):
            y, _ = linear(a, b, c, precision=product)
            assert off(y, right) < UNITS[product] + 1e-7
    row = np.lib.stride_tricks.as_strided(x, x.shape, (0, 4))
    assert off(linear(row, weight)[0], exact(row, weight)) < 1e-6
    assert linear(x[0], weight)[0].shape == (10,)
    assert linear(x.reshape(2, 3, 24), weight)[0].shape == (2, 3, 10)
    assert linear(x[:0], weight)[0].shape == (0, 10)


def _budgets() -> None:
    """The fastest product that keeps the tolerance, and dearer ones where it does not."""
    x, weight, bias = arrays(64, 48, 4096)
    for tolerance in (5e-2, 1e-2, 1e-3, 1e-5, 1e-9):
        y, report = linear(x, weight, bias, tolerance=tolerance)
        assert off(y, exact(x, weight, bias)) <= 1.2 * tolerance + 1e-7
        assert report.measured_error <= tolerance
        assert report.predicted_error.shape == (64,) and np.isnan(report.predicted_error).all()
    assert gpu_products.first_product("float32", 8192, 8192, 8192, 5e-2, (9, 0)) == "fp8"
    assert gpu_products.first_product("float32", 8192, 8192, 8192, 1e-2, (9, 0)) == "bf16"
    assert gpu_products.first_product("float32", 8192, 8192, 8192, 1e-2, (7, 5)) == "fp32"
    assert gpu_products.first_product("float32", 8192, 8192, 8192, 1e-3, (8, 0)) == "fp16"
    assert gpu_products.first_product("float32", 1, 8192, 8192, 5e-2, (9, 0)) == "tf32"
    assert gpu_products.first_product("bfloat16", 8192, 8192, 8192, 1e-2, (9, 0)) == "bf16"
    assert gpu_products.first_product("float64", 8192, 8192, 8192, 1e-2, (9, 0)) == "fp64"
    # Terms that cancel: rounding operands loses what is left.
    x[:, 2048:], weight[:, 2048:] = x[:, :2048], -weight[:, :2048] * np.float32(1.001)
    y, report = linear(x, weight, tolerance=1e-2)
    assert off(y, exact(x, weight)) <= 1.2e-2 and set(report.precision) <= {"fp16", "tf32", "fp32"}
    ctypes.c_double.in_dll(fake(), "fake_fault").value = 1.01
    y, report = linear(x, weight, tolerance=1e-3)
    assert off(y, exact(x, weight)) < 1e-7 and set(report.precision) == {"fp64"}
    quiet = value("waits")
    adaattn.linear(Tensor(x), Tensor(weight))
    assert value("waits") <= quiet + 1  # for the fake, whose owner orders nothing


def _scales() -> None:
    """fp8 and fp16 take numbers of any size, and say what they cannot hold."""
    for size in (1e-30, 1e-6, 1e6, 1e15):
        x, weight, bias = arrays(20, 16, 40)
        for product in ("fp8", "fp16"):
            y, _ = linear(x * np.float32(size), weight, bias * np.float32(size), precision=product)
            assert off(y, size * exact(x, weight, bias)) < UNITS[product]
    x, weight, _ = arrays(20, 16, 40)
    assert not linear(0 * x, weight, precision="fp8")[0].any()
    for special in (np.nan, np.inf, -np.inf):
        x[3, 7] = special
        right = exact(x, weight)
        for product in ("fp8", "bf16", "fp16", "tf32", "fp32", "fp64"):
            y, report = linear(x, weight, precision=product)
            assert not np.isfinite(y[3]).any() and np.isfinite(np.delete(y, 3, 0)).all()
            assert product == "fp8" or np.array_equal(y[3], right[3], equal_nan=True)
            assert np.isfinite(report.measured_error)


def _errors() -> None:
    x, weight, bias = (Tensor(a) for a in arrays(4, 6, 8))

    def expect(error: type, text: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match=re.escape(text)):
            adaattn.linear(*arguments, **options)

    expect(adaattn.ShapeError, "weight: expected shape (N, 8) with N, K >= 1", x, Tensor(weight.array[:, :7]))
    expect(adaattn.ShapeError, "bias: expected shape (6,), got (5,)", x, weight, Tensor(bias.array[:5]))
    wide = Tensor(weight.array.astype(F64))
    expect(adaattn.DTypeError, "weight: expected float32, like x, got float64", x, wide)
    expect(adaattn.DeviceError, "weight: expected an array of the GPU", x, weight.array)
    expect(
        adaattn.DeviceError,
        "got a PackedWeight of the CPU: pass the weight itself, moved to",
        x,
        adaattn.PackedWeight(weight.array),
    )
    expect(adaattn.DeviceError, "on DLPack device 2:1", x, _on_second(weight))
    expect(adaattn.ArgumentError, "precision: expected 'auto' or one of 'fp8',", x, weight, precision="int8")
    expect(adaattn.ArgumentError, "tolerance: expected None beside", x, weight, precision="fp8", tolerance=1)
    half = [Tensor(a.array.astype(F16)) for a in (x, weight)]
    expect(adaattn.ArgumentError, "for float16, got 'bf16'", *half, precision="bf16")
    with pytest.raises(adaattn.DeviceError, match="weight: expected an array of the CPU"):
        adaattn.PackedWeight(weight)
    ctypes.c_bool.in_dll(fake(), "fake_without_fp8").value = True
    expect(
        adaattn.DeviceError, "a product that this GPU and cuBLAS have, got 'fp8'", x, weight, precision="fp8"
    )
    assert value("live") == 0 and of_fake("live") == 0


def _on_second(x: Tensor) -> Tensor:
    there = Tensor(x.array)
    there.device = 1
    return there


def _every_failure() -> None:
    """Of the runtime and of cuBLAS, at each call: it surfaces once, and nothing leaks."""
    x, weight, bias = (Tensor(a) for a in arrays(4, 6, 8))
    for product in ("fp8", "fp16", "tf32", "fp64"):
        adaattn.linear(x, weight, bias, precision=product, return_report=True)
        for arm in (set_value, set_fake):
            for n in itertools.count():
                arm("fail_after", n)
                try:
                    adaattn.linear(x, weight, bias, precision=product, return_report=True)
                    break
                except adaattn.DeviceError as error:
                    assert "injected" in str(error)
                finally:
                    arm("fail_after", -1)
                assert value("live") == 0 and of_fake("live") == 0, (product, n)
            assert n > 3 or product == "fp64"
    set_fake("status", 3)
    set_fake("fail_after", 0)
    with pytest.raises(MemoryError, match="cublasLt"):
        adaattn.linear(x, weight, precision="fp32")


@pytest.mark.parametrize(
    "function",
    [_products, _layouts, _budgets, _scales, _errors, _every_failure],
    ids=lambda f: f.__name__[1:],
)
def test_linear(function: Callable[[], None], model: str, blas: str) -> None:
    run(function, model, blas)


# ---- cuBLAS that is not there, or another


def _refused(text: str) -> None:
    x, weight, _ = (Tensor(a) for a in arrays(2, 3, 4))
    with pytest.raises(adaattn.DeviceError, match=text):
        adaattn.linear(x, weight)
    y = adaattn.linear(x, weight, precision="fp64")  # takes none
    assert off(y.array, exact(x.array, weight.array)) < 1e-7
    assert adaattn.attention(*(Fake(np.ones((1, 1, 4, 4), F32)) for _ in range(3))).array.all()
    assert value("live") == 0


def test_no_library(model: str, tmp_path: Path) -> None:
    run(
        _refused,
        model,
        str(tmp_path / "none.so"),
        "cuBLAS: expected libcublasLt.so of version 12 or 13 .*none.so",
    )


def test_another_library(cc: str, model: str, tmp_path: Path) -> None:
    old = build_blas(cc, tmp_path / "old.so", "-DFAKE_VERSION=110000")
    run(_refused, model, old, "expected version 120000 or later, got 110000")
    shutil.copy(model, tmp_path / "other.so")
    run(_refused, model, str(tmp_path / "other.so"), "undefined symbol: cublasLtGetVersion")


def _found(wheels: str) -> None:
    import sys

    sys.path.append(wheels)
    del os.environ["ADAATTN_CUBLASLT"]
    candidates = list(gpu._blas_candidates())
    assert candidates[0] is None and candidates[-2:] == ["libcublasLt.so.13", "libcublasLt.so.12"]
    assert f"{wheels}/nvidia/cu13/lib/libcublasLt.so.13" in candidates
    x, weight, _ = (Tensor(a) for a in arrays(2, 3, 4))
    assert off(adaattn.linear(x, weight).array, exact(x.array, weight.array)) < 1e-6


def test_library_of_a_wheel(model: str, blas: str, tmp_path: Path) -> None:
    folder = tmp_path / "nvidia/cu13/lib"
    folder.mkdir(parents=True)
    shutil.copy(blas, folder / "libcublasLt.so.13")
    run(_found, model, blas, str(tmp_path))


def _broken(wheels: str) -> None:
    import sys

    sys.path.append(wheels)
    del os.environ["ADAATTN_CUBLASLT"]
    x, weight, _ = (Tensor(a) for a in arrays(2, 3, 4))
    with pytest.raises(adaattn.DeviceError) as caught:
        adaattn.linear(x, weight)
    assert "got none that works (this process: " in str(caught.value)
    assert f"; {wheels}/nvidia/cu13/lib/libcublasLt.so.13: cublasLtCreate: status 1 of" in str(caught.value)
    assert "; libcublasLt.so.12: dlopen: " in str(caught.value)
    shutil.copy(wheels + "/works.so", wheels + "/nvidia/cu13/lib/libcublasLt.so.12")  # comes after that
    assert off(adaattn.linear(x, weight).array, exact(x.array, weight.array)) < 1e-6


def test_a_library_that_makes_no_handle_is_passed_over(
    cc: str, model: str, blas: str, tmp_path: Path
) -> None:
    folder = tmp_path / "nvidia/cu13/lib"
    folder.mkdir(parents=True)
    build_blas(cc, folder / "libcublasLt.so.13", "-DFAKE_BROKEN=1")
    shutil.copy(blas, tmp_path / "works.so")
    run(_broken, model, blas, str(tmp_path))


def _captured() -> None:
    """What was multiplied once needs nothing of cuBLAS that a capture of a CUDA graph forbids."""

    def aligned(x: Array) -> Array:
        memory = np.empty(x.nbytes + 256, np.uint8)
        memory = memory[-memory.ctypes.data % 256 :][: x.nbytes]
        memory[:] = x.reshape(-1).view(np.uint8)
        return memory.view(x.dtype).reshape(x.shape)

    def multiply(M: int) -> float:
        x, weight, bias = map(aligned, arrays(M, 6, 8, seed=M))
        return off(linear(x, weight, bias, precision="fp32")[0], exact(x, weight, bias))

    multiply(4)
    for M in range(100, 611):  # as many as are kept, with the first one
        multiply(M)
    ctypes.c_bool.in_dll(fake(), "fake_capturing").value = True
    for M in (4, 100, 610):
        assert multiply(M) < 1e-6
    with pytest.raises(adaattn.DeviceError, match="cublasLtMatmulAlgoGetHeuristic: status 14 of cuBLAS"):
        multiply(5)
    ctypes.c_bool.in_dll(fake(), "fake_capturing").value = False
    multiply(5)  # takes the place of the first
    ctypes.c_bool.in_dll(fake(), "fake_capturing").value = True
    assert multiply(5) < 1e-6 and multiply(100) < 1e-6
    with pytest.raises(adaattn.DeviceError, match="status 14"):
        multiply(4)


def test_products_in_captured_graphs(model: str, blas: str) -> None:
    run(_captured, model, blas)


def _threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, weight, _ = arrays(4, 6, 8)
    with ThreadPoolExecutor(4) as pool:  # nothing of this runs a kernel of the model, which has one machine
        for y in pool.map(lambda _: adaattn.linear(Tensor(x), Tensor(weight)), range(40)):
            assert off(y.array, exact(x, weight)) < 1e-6
    assert of_fake("products") == 40 and of_fake("handles") == 1 and of_fake("meetings") == 0


def test_threads_take_turns(model: str, blas: str) -> None:
    run(_threads, model, blas)


# ---- faults that these tests see: text that stands in cuda/linear.cu once, and what replaces it

FAULTS = {
    "rows as far apart as they are long": (
        "*to = {a->data, rows == 1 ? width : row / size};",
        "*to = {a->data, width};",
    ),
    "strides of elements are forgotten": (
        "(width == 1 || a->stride[1] == size) && apart",
        "apart",
    ),
    "a row goes on behind its end": (
        "const bool there = row < a.rows && at < a.width;",
        "const bool there = row < a.rows;",
    ),
    "alpha knows one scale only": (
        "ldexpf(1, -x - weight), a.beta}",
        "ldexpf(1, -x), a.beta}",
    ),
    "infinities become 448": (
        "fabsf(x) < ADA_INF ? x : ADA_NAN",
        "x",
    ),
    "a bias for nobody": (
        "adds ? 1.0f : 0.0f",
        "0.0f",
    ),
    "pointers are said to be aligned": (
        "(uint32_t)alignment_of(pointers[i]);",
        "256;",
    ),
    "a bias where it lies": (
        "&l->bias, out_type, 1, 16,",
        "&l->bias, out_type, 1, 1,",
    ),
    "a tile's depth is cut": (
        "for (int k = 0; k < DEPTH; k++)",
        "for (int k = 1; k < DEPTH; k++)",
    ),
    "half of a row is compared": (
        "for (int lanes = 1; lanes < 32; lanes *= 2) sum[f]",
        "for (int lanes = 1; lanes < 16; lanes *= 2) sum[f]",
    ),
    "padded features stay": (
        "if (!apart) return 0;",
        "return 0;",
    ),
}


def _wrong() -> None:
    """Raises where a product is."""
    _scales()
    _layouts()
    for shape in ((3, 5, 7), (40, 33, 50)):
        x, weight, bias = arrays(*shape)
        for product in ("fp8", "fp32", "fp64"):
            y, report = linear(x, weight, bias, precision=product)
            assert off(y, exact(x, weight, bias)) < UNITS[product] + 1e-7
            assert report.measured_error < UNITS[product]


@pytest.mark.parametrize("fault", cuda_build.some(FAULTS, 3))
def test_faults_are_found(fault: str, model: str, blas: str, tmp_path: Path) -> None:
    old, new = FAULTS[fault]
    objects = Path(model).parent
    library = cuda_build.with_mistake(tmp_path, objects, "linear.cu", old, new, "linear.cu", "-O0")
    with pytest.raises(AssertionError):
        run(_wrong, str(library), blas)
