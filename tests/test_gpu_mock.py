"""The way of a call to the CUDA backend and back, without a GPU: a backend of the CPU's memory
(gpu_mock.c) in a process of its own, and tensors that say that they lie on CUDA device 0."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cuda_build
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from support import (
    BF16,
    CASES,
    DTYPES,
    F32,
    F64,
    Array,
    Shape,
    backward_problem,
    in_new_process,
    inputs,
    same_bits,
)

import adaattn
from adaattn import rates, reference

SHAPE = Shape(2, 4, 2, 70, 130, 32, 24)


def build_mock(cc: str, to: Path, *flags: str) -> Path:
    sources = [
        ROOT / "tests/gpu_mock.c",
        *(ROOT / "csrc").glob("*.c"),
        *(ROOT / "csrc/kernels").glob("*_scalar.c"),
    ]
    command = [
        cc,
        "-std=c11",
        "-O1",
        "-D_GNU_SOURCE",
        "-shared",
        "-fPIC",
        "-Wl,-Bsymbolic",
        "-pthread",
        *flags,
    ]
    subprocess.run([*command, "-o", to, *sources, "-lm", "-ldl"], check=True)
    return to


@pytest.fixture(scope="session")
def mock(cc: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_mock(cc, tmp_path_factory.mktemp("mock") / "mock.so"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    return str(cuda_build.whole(tmp_path_factory))


@pytest.fixture(params=["mock", "model"])
def backend(request: pytest.FixtureRequest) -> str:
    """Either one."""
    path: str = request.getfixturevalue(request.param)
    return path


class Fake:
    """A tensor of NumPy's memory that says it lies on a GPU."""

    device = 0

    def __init__(self, array: Array, device: int = 0) -> None:
        self.array, self.device, self.streams = array, device, []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        self.streams.append(stream)
        bits = self.array.view(np.int16) if self.array.dtype == BF16 else self.array
        capsule = bits.__dlpack__()
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.argtypes, get_pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
        at = get_pointer(capsule, b"dltensor")
        ctypes.c_int32.from_address(at + 8).value = 2
        ctypes.c_int32.from_address(at + 12).value = self.device
        if self.array.dtype == BF16:
            ctypes.c_uint8.from_address(at + 20).value = 4
        return capsule

    def __array_namespace__(self) -> Any:
        return types.SimpleNamespace(from_dlpack=Fake.taken)

    @staticmethod
    def taken(array: Any) -> Fake:
        """A copy of what the capsule of another object holds."""
        assert array.__dlpack_device__() == (2, 0)
        capsule = array.__dlpack__(stream=7)
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.argtypes, get_pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
        data = ctypes.c_void_p.from_address(get_pointer(capsule, b"dltensor")).value
        dtype = np.dtype(getattr(ml_dtypes, array.dtype, array.dtype))
        size = dtype.itemsize * int(np.prod(array.shape))
        return Fake(np.frombuffer(ctypes.string_at(data, size), dtype).reshape(array.shape))


def library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["ADAATTN_CUDA_PLUGIN"])


def value(name: str) -> int:
    return ctypes.c_int.in_dll(library(), f"mock_{name}").value


def set_value(name: str, x: int) -> None:
    ctypes.c_int.in_dll(library(), f"mock_{name}").value = x


def arguments(dtype: Any = F32, shape: Shape = SHAPE) -> list[Array]:
    return inputs(np.random.default_rng(0), shape, dtype)


def fakes(arrays: list[Array]) -> list[Any]:
    return [Fake(x) for x in arrays]


def run(function: Callable[..., Any], mock: str, *more: Any) -> Any:
    return in_new_process(function, *more, ADAATTN_CUDA_PLUGIN=mock)


# What a code of the runtime becomes.
KINDS: Mapping[int, type[Exception]] = {700: adaattn.DeviceError, 2: MemoryError}


def fail_each(call: Callable[[], Any], kinds: Mapping[int, type[Exception]] = KINDS) -> int:
    """Lets each call of a backend's function, or of the runtime, fail once; returns how many there are."""
    for _ in range(2):  # finds the devices and what is made once
        call()
    set_value("calls", 0)
    call()
    total = value("calls")
    for n in range(total):
        for code, kind in kinds.items():
            set_value("code", code)
            set_value("fail_after", n)
            try:
                call()
            except kind as error:
                assert f"error {code} of the CUDA runtime: injected" in str(error)
            else:  # what is freed in the end has nobody to tell
                failed = ctypes.c_char_p.in_dll(library(), "mock_failed").value
                assert failed in (b"release", b"cudaGetDevice"), failed
            assert value("fail_after") == -1 and value("live") == 0, (n, code, value("live"))
    return total


# ---- arrays


def _arrays() -> None:
    for dtype in DTYPES:
        arrays = arguments(dtype)
        precision = {F64: "fp64", F32: "fp32"}.get(dtype, "fp16" if dtype == np.float16 else "bf16")
        for case in ("plain", "causal", "bias (T, S)", "mask (B, 1, T, S)", "lengths", "all"):
            options = CASES[case](np.random.default_rng(1), SHAPE)
            expected = adaattn.attention(*arrays, return_lse=True, precision=precision, **options)
            there = dict(options)
            if isinstance(there.get("attn_mask"), np.ndarray):
                there["attn_mask"] = Fake(there["attn_mask"])
            got = adaattn.attention(*fakes(arrays), return_lse=True, **there)
            assert all(isinstance(x, Fake) for x in got)
            exact = reference.attention(*arrays, return_lse=True, **options)
            for x, on_cpu, right in zip(got, expected, exact, strict=True):
                assert x.array.dtype == on_cpu.dtype and x.array.shape == on_cpu.shape
                np.testing.assert_allclose(x.array.astype(F64), right, atol=0.05)
            staged = adaattn.attention(*arrays, return_lse=True, device="cuda", **options)
            assert same_bits(staged, tuple(x.array for x in got))
    assert value("live") == 0


def test_arrays(backend: str) -> None:
    run(_arrays, backend)


def _layouts() -> None:
    arrays = arguments()
    expected = adaattn.attention(*fakes(arrays)).array
    turned = [x[:, :, ::-1, ::-1].copy()[:, :, ::-1, ::-1] for x in arrays]
    assert same_bits(adaattn.attention(*turned, device="cuda:1"), expected)
    wide = np.full((2, 4, 70, 48), 77, F32)
    back = wide[:, :, ::-1, ::2]
    assert adaattn.attention(*arrays, out=back, device="cuda") is back
    assert same_bits(back.copy(), expected) and (wide[..., 1::2] == 77).all()
    out = Fake(np.zeros_like(expected))
    assert adaattn.attention(*fakes(arrays), out=out) is out and same_bits(out.array, expected)
    one = np.broadcast_to(arrays[1][:, :1], arrays[1].shape)
    assert same_bits(
        adaattn.attention(arrays[0], one, arrays[2], device="cuda"),
        adaattn.attention(*fakes([arrays[0], one.copy(), arrays[2]])).array,
    )
    lengths, offset = Host(np.array([7, 99])), Host(np.array([1, 2]))
    assert same_bits(
        adaattn.attention(*fakes(arrays), kv_lengths=lengths, query_offset=offset).array,
        adaattn.attention(*fakes(arrays), kv_lengths=[7, 99], query_offset=[1, 2]).array,
    )


class Host(Fake):
    """A vector of the GPU as torch has it."""

    def cpu(self) -> Array:
        return self.array


def test_layouts(backend: str) -> None:
    run(_layouts, backend)


def _streams() -> None:
    """A library that says nothing of its streams is worked for on the legacy stream, and waited for."""
    arrays = fakes(arguments())
    adaattn.attention(*arrays)
    assert [x.streams for x in arrays] == [[1], [1], [1]]
    assert ctypes.c_size_t.in_dll(library(), "mock_stream").value == 1 and value("waits") == 1
    adaattn.attention(*arguments(), device="cuda")
    assert ctypes.c_size_t.in_dll(library(), "mock_stream").value == 2


def test_streams(mock: str) -> None:
    run(_streams, mock)


class Exchange(ctypes.Structure):
    """DLPack's exchange of C functions, as far as it is used."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("others", ctypes.c_void_p * 4),
        ("view", ctypes.c_void_p),
        ("current_stream", ctypes.c_void_p),
    )


class Quick(Fake):
    """A tensor of a library that has them."""

    current = 0x70


def _view(array: Any, to: int) -> int:
    """Fills the DLTensor from that of a capsule, which outlives the call."""
    array.capsule = Fake.__dlpack__(array)
    at = ctypes.pythonapi.PyCapsule_GetPointer(array.capsule, b"dltensor")
    ctypes.memmove(to, at, 48)
    return 0


def _current_stream(kind: int, device: int, to: Any) -> int:
    to[0] = Quick.current
    return 0


def _exchange() -> Any:
    """What Quick and its like speak, and what must live as long."""
    view = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(_view)
    pointer = ctypes.POINTER(ctypes.c_size_t)
    stream = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int32, pointer)(_current_stream)
    functions = (ctypes.cast(f, ctypes.c_void_p) for f in (view, stream))
    exchange = Exchange((1, 3), (0,) * 4, *functions)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.argtypes, new_capsule.restype = (
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        ctypes.py_object,
    )
    Quick.__dlpack_c_exchange_api__ = new_capsule(ctypes.addressof(exchange), b"dlpack_exchange_api", None)
    return exchange, view, stream


def _quick() -> None:
    kept = _exchange()
    arrays = arguments(BF16)
    expected = adaattn.attention(*fakes(arrays)).array
    quick = [Quick(x) for x in arrays]
    out = Quick(np.zeros_like(expected))
    assert adaattn.attention(*quick, out=out) is out and same_bits(out.array, expected)
    assert ctypes.c_size_t.in_dll(library(), "mock_stream").value == 0x70
    assert all(set(x.streams) == {None} for x in quick)  # the capsules above; no export was asked for
    mixed = [quick[0], Fake(arrays[1]), quick[2]]
    assert same_bits(adaattn.attention(*mixed, out=out).array, expected)
    assert mixed[1].streams == [0x70]  # ordered by its owner
    with pytest.raises(
        adaattn.DeviceError, match=r"^key: expected memory of CUDA device 0 like query's, got .* 1:0"
    ):
        adaattn.attention(quick[0], arrays[1], quick[2])
    with pytest.raises(
        adaattn.DeviceError, match=r"^query: expected memory of the CPU.* finds 2\), got .* 2:7"
    ):
        adaattn.attention(*(Quick(x, 7) for x in arrays))
    assert kept


def test_quick_exchange(mock: str) -> None:
    run(_quick, mock)


def _places() -> None:
    query, key, values = arguments()
    for name, arrays in {
        "key": (Fake(query), key, Fake(values)),
        "value": (Fake(query), Fake(key), Fake(values, 1)),
    }.items():
        with pytest.raises(
            adaattn.DeviceError, match=rf"^{name}: expected memory of CUDA device 0 like query's"
        ):
            adaattn.attention(*arrays)
    with pytest.raises(adaattn.DeviceError, match=r"^key: expected memory of the CPU, got .* 2:0"):
        adaattn.attention(query, Fake(key), values)
    with pytest.raises(
        adaattn.DeviceError, match=r"^query: expected memory of the CPU.* finds 2\), got .* 2:5"
    ):
        adaattn.attention(Fake(query, 5), Fake(key, 5), Fake(values, 5))
    with pytest.raises(adaattn.DeviceError, match=r"^device: expected 'cuda:0', where query lies"):
        adaattn.attention(*fakes([query, key, values]), device="cuda:1")
    with pytest.raises(adaattn.DeviceError, match=r"^out: expected memory of CUDA device 0"):
        adaattn.attention(*fakes([query, key, values]), out=np.zeros((2, 4, 70, 24), F32))
    with pytest.raises(adaattn.ArgumentError, match=r"^precision: expected rungs that the GPU computes"):
        adaattn.attention(*fakes([query, key, values]), precision="int16")
    with pytest.raises(adaattn.ArgumentError, match=r"^attn_mask: expected finite numbers or -inf"):
        adaattn.attention(*fakes([query, key, values]), attn_mask=Fake(np.full((70, 130), np.nan, F32)))
    cache = adaattn.KVCache(2, 2, 32, 24, capacity=8)
    cache.append(key[:, :, :3], values[:, :, :3])
    with pytest.raises(adaattn.DeviceError, match=r"^key: expected an array on the GPU, got a cache"):
        cache.attention(Fake(query))
    assert value("live") == 0


def test_places(backend: str) -> None:
    run(_places, backend)


# ---- gradients


def _gradients() -> None:
    shape = Shape(2, 4, 2, 30, 70, 24, 16)
    for dtype in DTYPES:
        unit = {F64: 1e-12, F32: 1e-5, BF16: 0.06}.get(dtype, 0.01)
        for case in (
            "plain",
            "causal",
            "bias (B, H, T, S)",
            "bias (1, H, T, 1)",
            "alibi (B, H)",
            "sinks",
            "all",
        ):
            options = CASES[case](np.random.default_rng(1), shape)
            arrays = backward_problem(np.random.default_rng(2), shape, dtype, **options)
            needs = ["query", "key", "value", *(x for x in ("sinks", "alibi_slopes") if x in options)]
            needs += ["attn_mask"] if "attn_mask" in options else []
            there = {name: Fake(x) if name == "attn_mask" else x for name, x in options.items()}
            got = adaattn.attention_backward(*fakes(arrays), needs=needs, **there)
            exact = reference.attention_backward(*arrays, needs=needs, **options)
            on_cpu = adaattn.attention_backward(*arrays, needs=needs, **options)
            for name, x, right, like in zip(got._fields, got, exact, on_cpu, strict=True):
                assert (x is None) == (name not in needs)
                if x is None:
                    continue
                assert isinstance(x, Fake) and x.array.dtype == like.dtype and x.array.shape == like.shape
                error = np.linalg.norm(x.array.astype(F64) - right)
                size = np.linalg.norm(right) + np.linalg.norm(exact.value)  # some gradients are zeros
                assert error <= unit * size, (dtype, case, name, error)
    assert value("live") == 0


def test_gradients(backend: str) -> None:
    run(_gradients, backend)


def _gradient_reports() -> None:
    """They name the rungs and the key heads that theirs does not hold; without one, nothing is waited for."""
    for dtype, rung in {F32: "fp32", F64: "fp64", BF16: "bf16", np.dtype(np.float16): "fp16"}.items():
        arrays = backward_problem(np.random.default_rng(2), Shape(1, 4, 2, 20, 30, 8, 8), dtype)
        there = fakes(arrays)
        found, report = adaattn.attention_backward(*there, return_report=True)
        assert (report.precision_scores == rung).all() and not report.retried.any()
        set_value("waits", 0)
        again = adaattn.attention_backward(*there)
        assert value("waits") == 1  # for a library that orders nothing
        assert all(same_bits(x.array, y.array) for x, y in zip(found[:3], again[:3], strict=True))
    arrays = [x.astype(F32) for x in arrays]
    for precision in ("fp32", "fp64"):
        report = adaattn.attention_backward(*fakes(arrays), precision=precision, return_report=True)[1]
        assert (report.precision_scores == precision).all()


def test_gradient_reports(backend: str) -> None:
    run(_gradient_reports, backend)


def _unfit_gradients() -> None:
    arrays = backward_problem(np.random.default_rng(2), Shape(1, 4, 2, 20, 30, 8, 8))
    arrays[0][0, 3, 5, 2] = np.nan
    found, report = adaattn.attention_backward(*fakes(arrays), return_report=True)
    assert report.retried.tolist() == [[False, True]] and report.precision_sums.tolist() == [["fp32", "fp64"]]
    exact = reference.attention_backward(*arrays)
    for x, right in zip(found[:3], exact[:3], strict=True):
        np.testing.assert_array_equal(np.isnan(x.array), np.isnan(right))


def test_key_heads_that_the_rung_does_not_hold(model: str) -> None:
    run(_unfit_gradients, model)


def _flat_gradients() -> None:
    """Sums of equal terms over many rows round no more than sums of few."""
    shape = Shape(1, 2, 1, 8192, 16, 8, 8)
    query, key = np.zeros((1, 2, 8192, 8), F32), np.zeros((1, 1, 16, 8), F32)
    value = np.random.default_rng(0).standard_normal((1, 1, 16, 8)).astype(F32)
    grad = np.full((1, 2, 8192, 8), 0.1, F32)
    out, lse = adaattn.attention(query, key, value, return_lse=True)
    right = float(np.float32(0.1)) * shape.T * shape.H / shape.S
    for options in ({}, {"tolerance": 1e-3}):
        arrays = fakes([grad, query, key, value, out, lse])
        gradients = adaattn.attention_backward(*arrays, needs=("value",), **options)
        assert np.abs(gradients.value.array / right - 1).max() < 1e-5


def test_flat_gradients(model: str) -> None:
    run(_flat_gradients, model)


def _gradient_errors() -> None:
    arrays = backward_problem(np.random.default_rng(2), Shape(1, 2, 1, 5, 9, 8, 8))
    with pytest.raises(adaattn.ArgumentError, match=r"^precision: .* on a GPU, got \('int16', 'bf16'\)"):
        adaattn.attention_backward(*fakes(arrays), precision=("int16", "bf16"))
    with pytest.raises(
        adaattn.DeviceError, match=r"^grad_out: expected memory of CUDA device 0 like query's"
    ):
        adaattn.attention_backward(arrays[0], *fakes(arrays[1:]))
    with pytest.raises(adaattn.DeviceError, match=r"^lse: expected memory of CUDA device 0 like query's"):
        adaattn.attention_backward(*fakes(arrays[:5]), arrays[5])
    wide = backward_problem(np.random.default_rng(2), Shape(1, 1, 1, 2, 3, 260, 4))
    with pytest.raises(adaattn.ShapeError, match=r"^query, value: expected head sizes of at most 256"):
        adaattn.attention_backward(*fakes(wide))
    assert value("live") == 0


def test_gradient_errors(backend: str) -> None:
    run(_gradient_errors, backend)


def _no_verification() -> None:
    arrays = backward_problem(np.random.default_rng(2), Shape(1, 2, 1, 5, 9, 8, 8))
    with pytest.raises(
        adaattn.ArgumentError, match=r"^tolerance: expected None, as this backend .* got 0\.01"
    ):
        adaattn.attention_backward(*fakes(arrays), tolerance=1e-2)


def test_a_backend_that_does_not_verify_gradients(mock: str) -> None:
    run(_no_verification, mock)


def _gradient_error(arrays: list[Array], found: Any, **options: Any) -> list[Array]:
    """Relative ones of each head, off what is exact from the inputs on."""
    exact = reference.attention_backward(*(x.astype(F64) for x in arrays[:4]), **options)
    return [
        np.linalg.norm(x.array.astype(F64) - right, axis=(2, 3)) / np.linalg.norm(right, axis=(2, 3))
        for x, right in zip(found[:3], exact[:3], strict=True)
    ]


def _gradient_budgets() -> None:
    """Half arrays keep to their own format where that holds the tolerance, as far as anyone can know; what is
    told of a gradient is true."""
    shape = Shape(1, 4, 2, 80, 130, 24, 16)
    for dtype, rung, unit in ((BF16, "bf16", 2.0**-9), (np.dtype(np.float16), "fp16", 2.0**-12)):
        for options in ({"causal": True}, {"softcap": 3.0, "dropout_p": 0.1, "seed": 1}):
            arrays = backward_problem(np.random.default_rng(2), shape, dtype, **options)
            for tolerance, chosen in ((64 * unit, rung), (unit, "fp32")):
                found, report = adaattn.attention_backward(
                    *fakes(arrays), tolerance=tolerance, return_report=True, **options
                )
                assert (report.precision_scores == chosen).all() and report.tolerance == tolerance
                assert (report.verified_rows == (8 if chosen == rung else 4)).all()
                assert (np.isnan(report.predicted_error) == (chosen == "fp32")).all()
                true = _gradient_error(arrays, found, **options)
                for name, error in zip(("query", "key", "value"), true, strict=True):
                    assert (error <= tolerance + unit).all()
                    limit = getattr(report, f"{name}_limit")
                    assert (limit <= tolerance + unit).all()
                    if chosen == rung:
                        assert (limit >= error).all() and (getattr(report, f"{name}_error") > error / 2).all()
                        assert (getattr(report, f"{name}_error") < 2 * error).all()
            found, report = adaattn.attention_backward(
                *fakes(arrays), tolerance=1.0, verify=False, return_report=True, **options
            )
            assert (report.precision_sums == rung).all() and np.isnan(report.query_error).all()
    for dtype, rung in ((F32, "fp32"), (F64, "fp64")):
        arrays = backward_problem(np.random.default_rng(2), shape, dtype, sinks=np.zeros(4))
        found, report = adaattn.attention_backward(
            *fakes(arrays), tolerance=1e-5, return_report=True, sinks=np.zeros(4)
        )
        assert (report.precision_scores == rung).all() and (report.key_limit < 1e-5).all()
        assert not report.retried.any() and (report.verified_rows == 4).all()
    set_value("waits", 0)
    adaattn.attention_backward(*fakes(arrays), tolerance=1e-2, verify=False, sinks=np.zeros(4))
    assert value("waits") == 1  # for a library that orders nothing
    slopes = {"alibi_slopes": np.full(4, 0.1), "needs": ["query", "alibi_slopes"]}
    arrays = backward_problem(np.random.default_rng(2), shape, BF16, alibi_slopes=slopes["alibi_slopes"])
    report = adaattn.attention_backward(*fakes(arrays), tolerance=0.5, return_report=True, **slopes)[1]
    assert (report.precision_scores == "fp32").all() and np.isnan(report.key_error).all()
    few = [x[:, :, :63] if x.shape[1] == 4 else x for x in arrays]
    report = adaattn.attention_backward(*fakes(few), tolerance=2e-2, return_report=True)[1]
    assert (report.precision_scores == "bf16").all() and not report.verified_rows.any()
    assert value("live") == 0


def test_gradient_budgets(model: str) -> None:
    run(_gradient_budgets, model)


def _wrong_forward_passes() -> None:
    """A head whose lse or out is wrong gets others of its own, in fp32, then in fp64; others stay."""
    shape = Shape(2, 2, 1, 65, 70, 8, 12)
    for case in ("causal", "bias (B, H, T, S)", "lengths, causal", "all"):
        options = CASES[case](np.random.default_rng(1), shape)
        there = {name: Fake(x) if name == "attn_mask" else x for name, x in options.items()}
        for dtype, which, tolerance, rung in (
            (BF16, 5, 2e-2, "fp32"),
            (F32, 4, 1e-3, "fp32"),
            (F32, 5, 1e-9, "fp64"),
        ):
            if dtype == F32 and case != "all":
                continue
            arrays = backward_problem(np.random.default_rng(2), shape, dtype, **options)
            right, report = adaattn.attention_backward(
                *fakes(arrays), tolerance=tolerance, return_report=True, **there
            )
            if tolerance > 1e-4:
                assert not report.retried.any()
            noise = np.random.default_rng(3).standard_normal(arrays[5].shape)
            noise[1] = 0
            arrays[which] = (
                arrays[4] * (1 + noise[..., None].astype(F32)).astype(dtype)
                if which == 4
                else arrays[5] + noise.astype(F32)
            )
            found, report = adaattn.attention_backward(
                *fakes(arrays), tolerance=tolerance, return_report=True, **there
            )
            again = report.retried
            assert again[0].all() and (report.precision_sums[again] == rung).all(), case
            if tolerance > 1e-4:
                assert not again[1]
                for x, y in zip(found[:3], right[:3], strict=True):
                    assert same_bits(x.array[1], y.array[1])
            rounding = 2.0**-9 if dtype == BF16 else 2.0**-24
            for error in _gradient_error(arrays, found, **options):
                assert (error <= tolerance + rounding).all(), (case, dtype, error)
    with pytest.raises(
        adaattn.NumericalError,
        match=r"^precision: expected gradients with a relative error .* \('fp32', 'fp32'\)",
    ):
        adaattn.attention_backward(*fakes(arrays), tolerance=1e-3, precision="fp32", **there)
    assert value("live") == 0


def test_wrong_forward_passes_are_made_up_for(model: str) -> None:
    run(_wrong_forward_passes, model)


def _budgets_of_odd_numbers() -> None:
    """Sizes whose squares no float holds, what is hidden, and what is no number."""
    for dtype, size in ((F32, 1e20), (F32, 1e-20), (F64, 1e60), (F64, 1e-60)):
        arrays = backward_problem(np.random.default_rng(2), Shape(1, 2, 1, 70, 60, 8, 8), dtype)
        arrays[0] *= dtype.type(size)
        report = adaattn.attention_backward(*fakes(arrays), tolerance=1e-2, return_report=True)[1]
        for x in (report.query_error, report.query_limit, report.key_limit, report.value_limit):
            assert ((x > 0) & (x < 1e-5)).all()
    mask = np.arange(70)[:, None] % 3 > 0
    arrays = backward_problem(np.random.default_rng(2), Shape(1, 2, 1, 70, 60, 8, 8), attn_mask=mask)
    right, told = adaattn.attention_backward(
        *fakes(arrays), tolerance=1e-2, precision="fp64", return_report=True, attn_mask=Fake(mask)
    )
    arrays[0][:, :, ::3], arrays[1][:, :, ::3] = np.nan, np.inf
    found, report = adaattn.attention_backward(
        *fakes(arrays), tolerance=1e-2, precision="fp64", return_report=True, attn_mask=Fake(mask)
    )
    assert all(same_bits(x.array, y.array) for x, y in zip(found[:3], right[:3], strict=True))
    assert (report.query_error == told.query_error).all() and (report.key_error == told.key_error).all()
    arrays = backward_problem(np.random.default_rng(2), Shape(1, 4, 2, 70, 60, 8, 8), BF16)
    arrays[0][0, 3, 5, 2] = np.nan
    found, report = adaattn.attention_backward(*fakes(arrays), tolerance=2e-2, return_report=True)
    assert report.retried.tolist() == [[False, True]] and report.precision_sums.tolist() == [["bf16", "fp64"]]
    assert np.isnan(report.key_error).tolist() == [[False, True]]
    assert np.isnan(found.key.array[0, 1]).any() and np.isfinite(found.key.array[0, 0].astype(F32)).all()


def test_budgets_of_odd_numbers(model: str) -> None:
    run(_budgets_of_odd_numbers, model)


def _each_gradient_failure(report: bool, tolerance: float | None = None) -> int:
    options = {"sinks": [0.5, 1.0], "attn_mask": np.zeros((70, 66), F32)}
    arrays = backward_problem(np.random.default_rng(2), Shape(1, 2, 1, 70, 66, 16, 16), **options)
    options |= {"attn_mask": Fake(options["attn_mask"]), "needs": ["query", "sinks", "attn_mask"]}
    if tolerance:  # and once more
        options = {"tolerance": tolerance}
        arrays = backward_problem(np.random.default_rng(2), Shape(1, 1, 1, 64, 9, 4, 4))
        arrays[5] += np.random.default_rng(3).standard_normal(arrays[5].shape).astype(F32)
    kinds = {700: adaattn.DeviceError} if tolerance else KINDS
    return fail_each(
        lambda: adaattn.attention_backward(*fakes(arrays), return_report=report, **options), kinds
    )


@pytest.mark.parametrize("report", [False, True])
def test_every_failure_of_gradients_surfaces_once(report: bool, backend: str) -> None:
    assert run(_each_gradient_failure, backend, report) > 4


def test_every_failure_of_verified_gradients_surfaces_once(model: str) -> None:
    assert run(_each_gradient_failure, model, True, 1e-3) > 40


# ---- budgets


def _relative(out: Any, exact: Array) -> float:
    error = np.linalg.norm(out.array.astype(F64) - exact, axis=(2, 3))
    return float((error / np.linalg.norm(exact, axis=(2, 3))).max())


def slow_fp32() -> None:
    """Looking for something cheaper pays in problems of this file's sizes."""
    rates._GPU_DEFAULTS[9, 0]["fp32"] = (1e4, 1e4, 0)


def _budgets() -> None:
    slow_fp32()
    rng = np.random.default_rng(5)
    rounding = {F64: 1e-16, F32: 6e-8, np.dtype(np.float16): 2.5e-4, BF16: 2e-3}
    chosen = set()
    for T, S in ((200, 1000), (30, 500), (3, 700), (1000, 1000)):
        shape = Shape(1, 1, 1, T, S, 64, 64)
        masks = {"attn_mask": rng.random((T, S)) < 0.7}
        for dtype in DTYPES:
            for options in ({}, {"causal": True}, {"dropout_p": 0.1, "seed": 3}, masks):
                if T == 1000 and (options or dtype not in (F32, BF16)):
                    continue
                arrays = arguments(dtype, shape)
                exact = reference.attention(*arrays, **options)
                there = {name: Fake(x) if name == "attn_mask" else x for name, x in options.items()}
                for tolerance in (1e-6, 2e-2):
                    out, _, report = adaattn.attention(
                        *fakes(arrays), tolerance=tolerance, return_lse=True, return_report=True, **there
                    )
                    assert _relative(out, exact) <= tolerance + rounding[dtype]
                    assert (report.verified_rows > 0).all() == (T >= 64)
                    chosen |= {(dtype.name, str(x)) for x in report.precision_qk.flat}
                    again = adaattn.attention(*fakes(arrays), plan=report.plan, **there)
                    if not report.retried.any():
                        assert same_bits(again.array, out.array)
    assert {("float32", "fp32"), ("float32", "fp16"), ("bfloat16", "fp32"), ("bfloat16", "bf16")} <= chosen
    assert all(rung in ("fp64", "fp32", "fp16", "bf16", "int8") for _, rung in chosen)
    assert value("live") == 0


def test_budgets(mock: str) -> None:
    run(_budgets, mock)


def _budgets_of_kernels() -> None:
    """The kernels' own way through a budget, and twice the same one."""
    for dtype, tolerances in {F32: (1e-6, 1e-3), BF16: (1e-6, 1e-4, 1e-2), F64: (1e-3,)}.items():
        for shape in (Shape(2, 2, 1, 100, 300, 40, 32), Shape(1, 2, 2, 5, 300, 64, 24)):
            arrays = arguments(dtype, shape)
            for options in (
                {"causal": True},
                {"softcap": 3.0, "sinks": [0.5, -1], "kv_lengths": [200] * shape.B},
            ):
                exact = reference.attention(*arrays, **options)
                for tolerance in tolerances:
                    options |= {"tolerance": tolerance, "return_lse": True, "return_report": True}
                    out, _, report = adaattn.attention(*fakes(arrays), **options)
                    assert _relative(out, exact) <= tolerance + (2e-3 if dtype == BF16 else 1e-7)
                    assert (report.verified_rows > 0).all() == (shape.T >= 64)
                    assert not report.retried.any()
                    assert same_bits(adaattn.attention(*fakes(arrays), **options)[0].array, out.array)
                    options = {name: x for name, x in options.items() if not name.startswith(("ret", "tol"))}
    assert value("live") == 0


def test_budgets_of_kernels(model: str) -> None:
    run(_budgets_of_kernels, model)


def _fp8() -> None:
    """By name, and as a loose tolerance chooses it where it is fast; a head that it does not do goes up."""
    rng = np.random.default_rng(3)
    assert all("fp8" in device["rungs"] for device in adaattn.gpu_info()["devices"])
    for dtype in DTYPES:
        for shape in (Shape(1, 2, 1, 70, 200, 40, 24), Shape(1, 2, 1, 3, 200, 40, 24)):
            arrays = inputs(rng, shape, dtype)
            exact = reference.attention(*arrays, causal=True)
            for precision, most in (("fp8", 7e-2), (("int8", "fp8"), 5e-2)):
                out, report = adaattn.attention(
                    *fakes(arrays), causal=True, precision=precision, return_report=True
                )
                assert _relative(out, exact) < most
                assert set(report.rungs.flat) == {"fp8" if precision == "fp8" else "int8/fp8"}
    rates._GPU_DEFAULTS[9, 0] |= {"int8/fp8": (1e6, 1e6, 0), "fp8": (1e6, 1e6, 0)}
    rates._GPU_DEFAULTS[9, 0]["fp32"] = (500, 500, 0)
    query, key, values = inputs(rng, Shape(1, 3, 3, 200, 1000, 64, 64), F32)
    key[0, 2, 1::2], values[0, 2, 1::2] = key[0, 2, ::2], -1.03 * values[0, 2, ::2]  # which nearly cancels
    exact = reference.attention(query, key, values)
    options = {"tolerance": 0.13, "return_report": True}
    out, report = adaattn.attention(*fakes([query, key, values]), **options)
    assert _relative(out, exact) <= 0.13 and (report.verified_rows > 0).all()
    assert report.rungs[0, :2].tolist() == ["int8/fp8"] * 2 and "fp8" not in report.rungs[0, 2]
    assert report.retried.tolist() == [[False, False, True]]
    assert "int8/fp8" in report.plan.explain()
    assert ((report.measured_error[0, :2] > 2e-2) & (report.measured_error[0, :2] < 5e-2)).all()
    again = adaattn.attention(*fakes([query, key, values]), plan=report.plan, verify=False)
    assert same_bits(again.array, out.array)
    strict = adaattn.attention(*fakes([query, key, values]), **options | {"tolerance": 2e-2})[1]
    assert not np.isin(strict.precision_pv, ["fp8"]).any()
    limited = adaattn.plan(*fakes([query, key, values]), max_precision="fp8", tolerance=0.13)
    assert (limited.rungs == "fp8").all()
    assert value("live") == 0


def test_fp8(model: str) -> None:
    run(_fp8, model)


def _figures() -> None:
    """What the device says of keys and queries becomes the guess that the CPU makes of arrays."""
    arrays = arguments(F32, Shape(1, 2, 1, 60, 500, 64, 40))
    arrays[1] += np.float32(0.3)
    for options in ({}, {"causal": True, "window": (70, 0)}, {"kv_lengths": [123], "softcap": 2.0}):
        options |= {"tolerance": 1e-8, "return_lse": True}  # so fine that no rows are profiled
        on_cpu, there = adaattn.plan(*arrays, **options), adaattn.plan(*fakes(arrays), **options)
        for name in ("fp64", "fp32"):
            c = on_cpu.candidates.index(name)
            for error in ("candidate_error", "candidate_lse_error"):
                x, y = (getattr(plan, error)[..., c] for plan in (on_cpu, there))
                np.testing.assert_allclose(x, y, rtol=1e-3)
    there = adaattn.plan(*fakes(arrays), tolerance=1e-4, return_lse=True)
    c = there.candidates.index("int16")
    assert np.isnan(there.candidate_error[..., c]).all() and np.isnan(there.candidate_seconds[..., c]).all()
    assert not np.isnan(there.candidate_error[..., there.candidates.index("fp16")]).any()


def test_figures(backend: str) -> None:
    run(_figures, backend)


def _wrong_outputs() -> None:
    """Rungs below fp32 that err more than they should are found out, and heads done again higher up."""
    slow_fp32()
    arrays = arguments(F32, Shape(1, 1, 1, 1000, 1000, 64, 64))
    exact = reference.attention(*arrays)
    options = {"tolerance": 1e-2, "return_report": True}
    out, report = adaattn.attention(*fakes(arrays), **options)
    assert (report.precision_qk == "fp16").all() and not report.retried.any()
    ctypes.c_double.in_dll(library(), "mock_fault").value = 1.05
    out, report = adaattn.attention(*fakes(arrays), **options)
    assert (report.precision_qk == "fp32").all() and report.retried.all() and _relative(out, exact) < 1e-6
    trusting, report = adaattn.attention(*fakes(arrays), verify=False, **options)
    assert _relative(trusting, exact) > 0.04 and (report.verified_rows == 0).all()
    with pytest.raises(
        adaattn.NumericalError, match=r"^precision: expected a relative error of at most 0.01"
    ):
        adaattn.attention(*fakes(arrays), precision="fp16", tolerance=1e-2)


def test_wrong_outputs_are_found_out(mock: str) -> None:
    run(_wrong_outputs, mock)


def _beyond_the_rung() -> None:
    """A report says of which heads rows had to be done in fp64."""
    arrays = arguments(F32, Shape(1, 2, 2, 20, 30, 8, 8))
    arrays[0][:, 1] *= np.float32(1e20)
    arrays[1][:, 1] *= np.float32(1e20)
    exact = reference.attention(*arrays)
    out, report = adaattn.attention(*fakes(arrays), precision="fp16", return_report=True)
    assert (report.precision_qk == "fp16").all() and report.retried.tolist() == [[False, True]]
    assert _relative(out, exact) < 1e-3


def test_rows_beyond_the_rung(backend: str) -> None:
    run(_beyond_the_rung, backend)


# ---- sparse heads


def topical(shape: Shape, dtype: Any = F32, noise: float = 0.1) -> list[Array]:
    """Runs of 64 keys on one of four topics, and queries that look at their own."""
    rng = np.random.default_rng(3)
    topics = 4 * rng.standard_normal((4, shape.D))
    arrays = []
    for heads, length in ((shape.H, shape.T), (shape.G, shape.S)):
        apart = noise * rng.standard_normal((shape.B, heads, length, shape.D))
        arrays.append((topics[np.arange(length) // 64 % 4] + apart).astype(dtype))
    return [*arrays, rng.standard_normal((shape.B, shape.G, shape.S, shape.E)).astype(dtype)]


def _sparse_heads() -> None:
    shape = Shape(1, 2, 1, 300, 768, 32, 24)
    for dtype in (F32, BF16, np.dtype(np.float16), F64):
        arrays = topical(shape, dtype)
        for options in ({}, {"causal": True}, {"sinks": [0.5, 1.0], "kv_lengths": [700]})[
            : 3 if dtype == BF16 else 1
        ]:
            exact, exact_lse = reference.attention(*arrays, return_lse=True, **options)
            asked = {"structure": "sparse", "tolerance": 1e-2, "return_lse": True, "return_report": True}
            out, lse, report = adaattn.attention(*fakes(arrays), **asked, **options)
            assert (report.structure == "sparse").all() and not report.retried.any()
            assert (report.kept_fraction < 0.6).all() and (report.verified_rows >= 16).all()
            assert _relative(out, exact) <= 1e-2 and abs(lse.array - exact_lse).max() < 5e-3
            low_rank = "float64 arrays" if dtype == F64 else None
            assert (report.error_limit <= 1e-2).all() and report.plan.ruled_out == (None, low_rank)
            seen = report.kept_blocks[~np.isnan(report.kept_blocks)]
            assert {0, 1} <= set(seen) and abs(seen.mean() - report.kept_fraction.mean()) < 0.1
            for again in (
                adaattn.attention(*fakes(arrays), **asked, **options)[0],
                adaattn.attention(*fakes(arrays), plan=report.plan, **options),
                adaattn.attention(*fakes(arrays), plan=report.plan, verify=False, **options),
            ):
                assert same_bits(again.array, out.array)
            planned = adaattn.plan(*fakes(arrays), structure="sparse", tolerance=1e-2, **options)
            assert (
                abs(planned.kept_fraction - report.kept_fraction) < 1e-6
            ).all()  # all tiles were looked at
    assert value("live") == 0


def test_sparse_heads(model: str) -> None:
    run(_sparse_heads, model)


def _sparse_where_it_pays() -> None:
    """Head by head: one leaves blocks out, of a Gaussian one none can be."""
    rates._GPU_DEFAULTS[9, 0] |= {"fp32": (1.0, 1.0, 0), "fp16": (0.0, 0.0, 0), "bf16": (0.0, 0.0, 0)}
    rates._GPU_DEFAULTS[9, 0] |= dict.fromkeys(("int8/bf16", "int8/fp8", "fp8"), (0.0, 0.0, 0))
    arrays = topical(Shape(1, 2, 2, 2048, 2048, 16, 8))
    rng = np.random.default_rng(1)
    for x in arrays[:2]:
        x[:, 1] = rng.standard_normal(x[:, 1].shape)
    exact = reference.attention(*arrays)
    out, report = adaattn.attention(*fakes(arrays), tolerance=1e-2, return_report=True)
    assert report.structure.tolist() == [["sparse", "dense"]] and not report.retried.any()
    assert report.kept_fraction[0, 0] < 0.3 and report.kept_fraction[0, 1] == 1
    assert _relative(out, exact) < 1e-4
    assert (adaattn.plan(*fakes(arrays), tolerance=1e-2, structure="dense").structure == "dense").all()
    rates._GPU_DEFAULTS[9, 0]["fp32"] = (1e5, 1e5, 0)  # looking would cost more than it may save
    set_value("calls", 0)
    adaattn.plan(*fakes(arrays), tolerance=1e-2)
    few = value("calls")
    rates._GPU_DEFAULTS[9, 0]["fp32"] = (1.0, 1.0, 0)
    adaattn.plan(*fakes(arrays), tolerance=1e-2)
    assert value("calls") > 2 * few + 4


def test_sparse_where_it_pays(model: str) -> None:
    run(_sparse_where_it_pays, model)


def _sparse_some_heads_at_a_time() -> dict[str, Any]:
    """What comes of heads whose lists are together longer than what a launch may have."""
    results = {}
    for dtype in (F32, BF16):
        arrays = topical(Shape(2, 3, 1, 300, 768, 16, 24), dtype)
        asked = {"structure": "sparse", "tolerance": 1e-2, "return_lse": True, "return_report": True}
        out, lse, report = adaattn.attention(*fakes(arrays), **asked)
        there = report.structure, report.kept_fraction, report.kept_blocks, report.retried
        results[dtype.name] = (out.array.astype(F32), lse.array, *there)
        assert _relative(out, reference.attention(*arrays)) <= 1e-2
    assert value("live") == 0
    return results


def test_sparse_heads_whose_lists_are_long(model: str, tmp_path: Path) -> None:
    """A head's are of 260 bytes in fp32 (5 tiles of up to 12 blocks) and of 156 in bf16 (3)."""

    def within(most: int) -> dict[str, Any]:
        (folder := tmp_path / str(most)).mkdir()
        mistake = ("thin.cu", "(int64_t)2 << 30", str(most), "thin.cu", "-O0")
        library = cuda_build.with_mistake(folder, Path(model).parent, *mistake)
        found: dict[str, Any] = run(_sparse_some_heads_at_a_time, str(library))
        return found

    whole, some, fewer = run(_sparse_some_heads_at_a_time, model), within(700), within(259)
    same = [(some["float32"], whole["float32"])]
    same += [(found["bfloat16"], whole["bfloat16"]) for found in (some, fewer)]
    for found, expected in same:
        assert (found[2] == "sparse").all()
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)
    assert (fewer["float32"][2] == "dense").all() and fewer["float32"][5].all()  # not even one head's fits


def _bounds_are_held_against_outputs() -> None:
    """What a plan leaves out may be too much for other values, or for outputs that nearly cancel."""
    shape = Shape(1, 1, 1, 256, 768, 16, 8)
    arrays = topical(shape)
    plan = adaattn.plan(*fakes(arrays), structure="sparse", tolerance=1e-2)
    _, report = adaattn.attention(*fakes(arrays), plan=plan, return_report=True)
    assert report.structure.item() == "sparse" and not report.retried.any()
    small = [*arrays[:2], arrays[2] * np.float32(1e-4)]
    cancelling = topical(shape, noise=0.001)
    cancelling[2][:, :, 1::2] = -cancelling[2][:, :, ::2]
    for other in (small, cancelling):
        out, report = adaattn.attention(*fakes(other), plan=plan, return_report=True)
        assert (
            report.structure.item() == "dense" and report.retried.all() and report.kept_fraction.item() == 1
        )
        assert _relative(out, reference.attention(*other)) < 1e-2
    _, report = adaattn.attention(*fakes(small), structure="sparse", tolerance=1e-2, return_report=True)
    assert report.structure.item() == "sparse" and report.error_limit.item() < 1e-2
    # By name it stays, and its limit says what may be missed.
    _, report = adaattn.attention(*fakes(cancelling), structure="sparse", tolerance=1e-2, return_report=True)
    assert report.structure.item() == "sparse" and report.error_limit.item() > 1e-2


def test_bounds_are_held_against_outputs(model: str) -> None:
    run(_bounds_are_held_against_outputs, model)


def _not_sparse() -> None:
    """Where no kernel leaves anything out: an error by the problem's options, else dense."""
    arrays = topical(Shape(1, 1, 1, 70, 130, 16, 16))
    wide = topical(Shape(1, 1, 1, 70, 130, 160, 16))
    mask = Fake(np.ones((70, 130), bool))
    for inputs_, options, what in (
        (arrays, {"attn_mask": mask}, "attn_mask on a GPU"),
        (arrays, {"softcap": 3.0}, "softcap"),
        (wide, {}, "head sizes above 128 on a GPU"),
    ):
        with pytest.raises(
            adaattn.ArgumentError, match=f"^structure: expected .* beside {what}, got 'sparse'"
        ):
            adaattn.attention(*fakes(inputs_), structure="sparse", tolerance=1e-2, **options)
    for query in (arrays[0][:, :, :60], arrays[0][:, :, :5]):
        asked = {"structure": "sparse", "tolerance": 1e-2, "return_report": True}
        _, report = adaattn.attention(*fakes([query, *arrays[1:]]), **asked)
        assert report.structure.item() == "dense" and report.retried.item()


def test_not_sparse(backend: str) -> None:
    run(_not_sparse, backend)


def _no_kernel() -> None:
    asked = {"structure": "sparse", "tolerance": 1e-2, "return_report": True}
    _, report = adaattn.attention(*fakes(topical(Shape(1, 1, 1, 70, 130, 16, 16))), **asked)
    assert report.structure.item() == "dense" and report.retried.item()


def test_sparse_by_name_without_a_kernel(mock: str) -> None:
    run(_no_kernel, mock)


def _quiet_plan() -> None:
    """A plan that is trusted puts work on the stream and waits for nothing but the library's own want."""
    arrays = fakes(arguments(F32, Shape(1, 2, 1, 2000, 2000, 64, 64)))
    plan = adaattn.plan(*arrays, tolerance=1e-2)
    set_value("calls", 0)
    set_value("waits", 0)
    adaattn.attention(*arrays, plan=plan, verify=False)
    # Memory for the output, opening, executing, the library's wait, two orders of streams, and freeing.
    assert value("waits") == 1 and value("calls") == 7, value("calls")


def test_a_plan_that_is_trusted_waits_for_nothing(mock: str) -> None:
    run(_quiet_plan, mock)


# ---- errors of the runtime


def _each_failure(options: dict[str, Any], staged: bool) -> int:
    arrays = arguments(F32, Shape(1, 2, 1, 70, 66, 16, 16))
    there = {"device": "cuda"} if staged else {}
    return fail_each(lambda: adaattn.attention(*(arrays if staged else fakes(arrays)), **there, **options))


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_lse": True, "return_report": True},
        {"tolerance": 2e-2},
        {"tolerance": 1e-9},
        {"tolerance": 2e-2, "structure": "sparse", "return_report": True},
    ],
    ids=str,
)
def test_every_failure_surfaces_once_and_nothing_leaks(
    options: dict[str, Any], staged: bool, backend: str
) -> None:
    assert run(_each_failure, backend, options, staged) > 4


def test_every_failure_of_fp8_surfaces_once(model: str) -> None:
    assert run(_each_failure, model, {"precision": "fp8", "return_report": True}, False) > 4


# ---- backends that cannot be used


def _info() -> dict[str, Any]:
    return adaattn.gpu_info()


def _refused(pattern: str) -> None:
    for _ in range(2):
        info = adaattn.gpu_info()
        assert not info["available"] and info["devices"] == []
        import re

        assert re.search(pattern, info["reason"]), info["reason"]
        with pytest.raises(adaattn.DeviceError, match=rf"^device: expected memory of the CPU, .*{pattern}"):
            adaattn.attention(*arguments(), device="cuda")
        with pytest.raises(adaattn.DeviceError, match=rf"^query: expected memory of the CPU, .*{pattern}"):
            adaattn.attention(*fakes(arguments()))


def test_info(mock: str) -> None:
    info = run(_info, mock)
    assert info["available"] and info["reason"] is None and info["backend"] == mock
    assert (info["driver"], info["runtime"], info["version"]) == ("13.1", "13.0", "mock")
    assert info["devices"][1] == {
        "name": "mock 1",
        "capability": "9.0",
        "multiprocessors": 1,
        "memory_bytes": 1 << 20,
        "rungs": ["fp64", "fp32", "fp16", "bf16"],
    }


def test_wrong_abi(cc: str, tmp_path: Path) -> None:
    run(_refused, str(build_mock(cc, tmp_path / "old.so", "-DMOCK_ABI=999")), "expected ABI .* got ABI 999")


def test_missing_symbol(cc: str, tmp_path: Path) -> None:
    other = build_mock(cc, tmp_path / "other.so", "-DMOCK_WITHOUT_SYMBOL")
    run(_refused, str(other), "expected a CUDA backend, got a library without the symbol ada_cuda_plugin")


def test_corrupt_file(tmp_path: Path) -> None:
    (tmp_path / "corrupt.so").write_bytes(b"\x7fELF" + bytes(100))
    run(_refused, str(tmp_path / "corrupt.so"), "the CUDA backend cannot be opened: .*corrupt.so")


def test_missing_file(tmp_path: Path) -> None:
    run(_refused, str(tmp_path / "missing.so"), "the CUDA backend cannot be opened: .*missing.so")


def _no_devices() -> None:
    set_value("devices", 0)
    _refused("the CUDA runtime finds no device")


def test_no_device(mock: str) -> None:
    run(_no_devices, mock)


def test_import_opens_nothing(tmp_path: Path) -> None:
    """Nor do calls on the CPU."""
    run(_cpu_only, str(tmp_path / "missing.so"))


def _cpu_only() -> None:
    adaattn.attention(*arguments())
    with open("/proc/self/maps", encoding="ascii") as maps:
        assert "libcuda" not in maps.read()


# ---- caches and merging


class Sized(Fake):
    """A tensor that says its shape, as a cache wants it."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)


CACHES = ["fp32", "fp16", "bf16", "int8"]


def _twins(dtype: str, B: int = 2, D: int = 24, E: int = 40, **options: Any) -> tuple[Any, Any]:
    """A cache of the CPU and one of the GPU."""
    return tuple(
        adaattn.KVCache(B, 2, D, E, dtype=dtype, **options, **there) for there in ({}, {"device": "cuda"})
    )


def _appended(twins: tuple[Any, Any], rng: Any, n: int, lengths: Any = None, given: Any = F32) -> None:
    sizes = [(len(twins[0].lengths), 2, n, width) for width in twins[0]._widths]
    arrays = [(rng.standard_normal(size) + 0.5).astype(given) for size in sizes]
    twins[0].append(*arrays, lengths)
    twins[1].append(*(Sized(x) for x in arrays), lengths)


def _held(cache: Any) -> list[Array]:
    """What a cache of the CPU holds, padded with zeros."""
    sides = []
    for side in (cache._key, cache._value):
        x = np.zeros((len(cache.lengths), 2, max(1, cache.lengths.max()), side[6].shape[3] // 2), F32)
        for b, length in enumerate(cache.lengths):
            if length:
                exact = cache.dtype == "fp32"
                x[b, :, :length] = side[1][b, :, :length] if exact else cache._decode(side, b)[0]
        sides.append(x)
    return sides


def _agree(twins: tuple[Any, Any], rng: Any, T: int, H: int = 4, given: Any = F32, **options: Any) -> None:
    """Both hold the same and answer alike, each as well as its dtype allows."""
    cpu, gpu = twins
    assert (cpu.lengths == gpu.lengths).all()
    query = (rng.standard_normal((len(cpu.lengths), H, T, cpu._widths[0])) * 1.5).astype(given)
    there = {name: Fake(x) if name == "attn_mask" else x for name, x in options.items()}
    held = _held(cpu)
    for x, y in zip(held, gpu._pages.read(Sized(query), gpu.lengths), strict=False):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 if cpu.dtype == "int8" else 0)
    out, lse = gpu.attention(Sized(query), return_lse=True, **there)
    assert isinstance(out, Fake) and out.array.dtype == given
    places = {"kv_lengths": cpu.lengths, "query_offset": cpu.lengths - T}
    exact, exact_lse = reference.attention(
        query, *held, return_lse=True, **{"causal": True} | options, **places
    )
    rounding = 2 * float(ml_dtypes.finfo(given).eps)
    few = T * H // 2 <= 16 and given != F64
    coarse = 3e-5 if given in (F32, F64) or few else 4 * rounding
    np.testing.assert_allclose(out.array.astype(F64), exact, rtol=rounding, atol=coarse, equal_nan=True)
    np.testing.assert_allclose(lse.array, exact_lse, rtol=1e-6, atol=3e-5)


def _caches(dtype: str) -> None:
    rng = np.random.default_rng(5)
    twins = _twins(dtype)
    _agree(twins, rng, 2)
    for n, lengths in ((70, None), (1, None), (60, [60, 3]), (64, [0, 64]), (1, [1, 0]), (150, None)):
        _appended(twins, rng, n, lengths)
        _agree(twins, rng, 1)
    _agree(twins, rng, 3, H=8)
    _agree(twins, rng, 20)
    for given in DTYPES:
        _agree(twins, rng, 1, H=2, given=given)
    _agree(twins, rng, 4, given=BF16)
    S = int(twins[0].lengths.max())
    for options in (
        {"softcap": 4.0, "sinks": [0.3, -1.0, 2.0, 0.0]},
        {"window": (70, 0), "alibi_slopes": [0.1, 0.2, 0.0, 0.4]},
        {"attn_mask": rng.random((2, 1, 3, S)) < 0.7, "dropout_p": 0.2, "seed": 4},
        {"attn_mask": rng.standard_normal((3, S)).astype(F32), "causal": False, "scale": 0.3},
    ):
        _agree(twins, rng, 3, **options)
    assert twins[1].capacity >= S and twins[1].nbytes > 0
    # What is cut off comes back to the pool, and what comes instead is read.
    size = twins[1].nbytes
    for kept in ([256, 100], [256, 64], [64, 63], [3, 0]):
        for cache in twins:
            cache.truncate(kept)
        _agree(twins, rng, 2)
        _appended(twins, rng, 5)
        _agree(twins, rng, 1)
    assert twins[1].nbytes == size
    # Copies share pages until one of them is written to.
    _appended(twins, rng, 100, [100, 90])
    for chosen in ([0, 0, 1], [2, 1, 0, 2], [3, 3]):
        for cache in twins:
            cache.reorder(chosen)
        _agree(twins, rng, 1)
        _appended(twins, rng, 40, [40 - 9 * b for b in range(len(chosen))])
        _agree(twins, rng, 2)
        for cache in twins:
            cache.truncate(cache.lengths - [70 - b for b in range(len(chosen))])
        _agree(twins, rng, 1)
        _appended(twins, rng, 66)
        _agree(twins, rng, 1)
    del twins, cache
    assert value("live") == 0


@pytest.mark.parametrize("dtype", CACHES)
def test_caches(dtype: str, model: str) -> None:
    run(_caches, model, dtype)


def _cache_sizes() -> None:
    rng = np.random.default_rng(2)
    for D, E in ((1, 7), (64, 64), (65, 128), (130, 256)):
        for dtype in CACHES:
            twins = _twins(dtype, 1, D, E, capacity=200)
            _appended(twins, rng, 131)
            _agree(twins, rng, 1)
            _agree(twins, rng, 1, H=2)


def test_cache_sizes(model: str) -> None:
    run(_cache_sizes, model)


def _cache_reports() -> None:
    rng = np.random.default_rng(3)
    for dtype in CACHES:
        twins = _twins(dtype, 2, 32, 32)
        _appended(twins, rng, 200, [200, 150])
        for T, options in ((2, {}), (70, {"tolerance": 2e-2}), (3, {"tolerance": 1e-4})):
            query = rng.standard_normal((2, 4, T, 32)).astype(F32)
            on_cpu, there = (
                c.attention(q, return_report=True, **options)
                for c, q in zip(twins, (query, Sized(query)), strict=True)
            )
            np.testing.assert_allclose(on_cpu[1].stored_error, there[1].stored_error, rtol=1e-5)
            assert vars(on_cpu[1]).keys() == vars(there[1]).keys()
            assert ((there[1].verified_rows > 0).all()) == (T == 70)
            assert _relative(there[0], on_cpu[0].astype(F64)) <= options.get("tolerance", 1e-6) * 1.5
            assert options or (there[1].precision_qk == "fp32").all()
        with pytest.raises(adaattn.ArgumentError, match=r"^precision: expected rungs that the GPU"):
            twins[1].attention(Sized(query), precision="int16")


def test_cache_reports(model: str) -> None:
    run(_cache_reports, model)


def _cache_specials() -> None:
    """Numbers that are none reach whom they should, and what a page has lost or not got yet nobody."""
    rng = np.random.default_rng(4)
    for dtype in CACHES:
        twins = _twins(dtype, 1, 16, 16)
        arrays = [rng.standard_normal((1, 2, 130, 16)).astype(F32) for _ in range(2)]
        query = rng.standard_normal((1, 4, 1, 16)).astype(F32)
        gpu = twins[1]
        arrays[1][0, 1, 129] = np.inf  # in the open page
        gpu.append(*map(Sized, arrays))
        out = gpu.attention(Sized(query)).array
        assert np.isfinite(out[0, :2]).all() and (out[0, 2:] == np.inf).all()
        gpu.truncate(129)
        assert np.isfinite(gpu.attention(Sized(query)).array).all()
        gpu.append(*(Sized(x[:, :, :1]) for x in arrays))
        assert np.isfinite(gpu.attention(Sized(query)).array).all()
        arrays[0][0, 0, 5, 3] = np.nan
        gpu.append(*(Sized(x[:, :, :70]) for x in arrays))
        out = gpu.attention(Sized(query)).array
        assert np.isnan(out[0, :2]).all() and np.isfinite(out[0, 2:]).all()
        hidden = np.ones((1, 200), bool)
        hidden[:, 128:192] = False
        assert np.isfinite(gpu.attention(Sized(query), attn_mask=Fake(hidden)).array).all()
        if dtype == "fp16":
            gpu.append(*(Sized(np.full((1, 2, 1, 16), x, F32)) for x in (0.0, 7e4)))
            assert (gpu.attention(Sized(query)).array[0, 2:] == np.inf).all()


def test_cache_specials(model: str) -> None:
    run(_cache_specials, model)


def _cache_refusals() -> None:
    rng = np.random.default_rng(4)
    cpu, gpu = _twins("fp32", 1, 16, 16)
    key = rng.standard_normal((1, 2, 3, 16)).astype(F32)
    for name, arrays in {"key": (key, Sized(key)), "value": (Sized(key), key)}.items():
        with pytest.raises(adaattn.DeviceError, match=rf"^{name}: expected an array on CUDA device 0, wh"):
            gpu.append(*arrays)
    with pytest.raises(adaattn.DeviceError, match=r"^key: expected .*, got Fake on device 1$"):
        gpu.append(Fake(key, 1), Fake(key, 1))
    with pytest.raises(adaattn.DeviceError, match=r"^query: expected an array on CUDA device 0, wh"):
        gpu.attention(key)
    with pytest.raises(adaattn.ShapeError, match=r"^value: expected shape \(1, 2, 3, 16\), got \(1, 2, 2"):
        gpu.append(Sized(key), Sized(key[:, :, :2]))
    with pytest.raises(adaattn.DTypeError, match=r"^key: expected float32, .*, got bool"):
        gpu.append(Sized(key > 0), Sized(key))
    with pytest.raises(adaattn.ArgumentError, match=r"^lengths: expected an int from 0 to 3, got 4"):
        gpu.append(Sized(key), Sized(key), 4)
    assert gpu.lengths[0] == 0
    with pytest.raises(adaattn.DeviceError, match=r"^key: expected memory of the CPU"):
        cpu.append(Sized(key), Sized(key))
    with pytest.raises(adaattn.ArgumentError, match=r"^value_size: expected at most 256 on a GPU, got 257"):
        adaattn.KVCache(1, 1, 8, 257, device="cuda")
    with pytest.raises(adaattn.ArgumentError, match=r"^device: expected None, 'cuda' or 'cuda:N', got 'cpu'"):
        adaattn.KVCache(1, 1, 8, device="cpu")
    with pytest.raises(adaattn.DeviceError, match=r"^device: expected one of 2 .*, got 'cuda:2'"):
        adaattn.KVCache(1, 1, 8, device="cuda:2")
    assert repr(gpu) == "KVCache(1, 2, 16, 16, capacity=64, dtype='fp32', device='cuda:0')"


def test_cache_refusals(model: str) -> None:
    run(_cache_refusals, model)


def _no_caches() -> None:
    with pytest.raises(adaattn.DeviceError, match=r"^device: .* backend mock keeps no caches"):
        adaattn.KVCache(1, 1, 8, device="cuda")


def test_backends_without_caches(mock: str) -> None:
    run(_no_caches, mock)


def _cache_failures(dtype: str) -> int:
    """Each call of the runtime fails once, and then the same step works as if nothing had been."""
    rng = np.random.default_rng(6)
    tokens = [Sized(rng.standard_normal((2, 2, 70, 16)).astype(F32)) for _ in range(2)]
    query, many = (Sized(rng.standard_normal((2, 4, n, 16)).astype(BF16)) for n in (2, 20))

    def steps(cache: Any) -> list[Callable[[], Any]]:
        return [
            lambda: cache.append(*tokens),
            lambda: cache.reorder([0, 0]),
            lambda: cache.append(*tokens, [9, 60]),
            lambda: cache.truncate([75, 62]),
            lambda: cache.attention(query).array,
            lambda: cache.attention(many).array,
            lambda: cache.append(*tokens),
            lambda: cache.attention(query).array,
        ]

    def results(fail_after: int = -1, code: int = 700) -> tuple[list[Any], bool]:
        cache, found, failed = adaattn.KVCache(2, 2, 16, dtype=dtype, device="cuda"), [], False
        set_value("calls", 0)
        set_value("code", code)
        set_value("fail_after", fail_after)
        for step in steps(cache):
            try:
                result = step()
            except (adaattn.DeviceError, MemoryError) as error:
                assert not failed and f"error {code} of the CUDA runtime: injected" in str(error)
                assert isinstance(error, MemoryError) == (code == 2)
                failed = True
                result = step()
            if result is not None:
                found.append(result)
        return found, failed

    results()
    expected = results()[0]
    total, surfaced = value("calls"), 0
    for n in range(0, total, 5):
        found, failed = results(n, (700, 2)[n % 2])
        surfaced += failed
        assert value("fail_after") == -1 and same_bits(tuple(found), tuple(expected)), n
    assert surfaced > total / 12 and value("live") == 0
    return total


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_failures_leave_a_cache_as_it_was(dtype: str, model: str) -> None:
    assert run(_cache_failures, model, dtype) > 30


def _quiet_steps() -> None:
    """A step of generation puts a few launches on the stream."""
    cache = adaattn.KVCache(2, 2, 16, dtype="int8", device="cuda")
    token = Sized(arguments(F32, Shape(2, 4, 2, 1, 1, 16, 16))[1])
    query = Sized(arguments(F32, Shape(2, 4, 2, 1, 1, 16, 16))[0])
    for _ in range(3):
        cache.append(token, token)
        cache.attention(query)
    chunks = len(cache._pages._pool)
    set_value("waits", 0)
    cache.append(token, token)
    cache.attention(query)
    # The library of these tensors knows no stream, so that each call waits at its end.
    assert value("waits") == 2 and len(cache._pages._pool) == chunks


def test_steps_wait_for_nothing(model: str) -> None:
    run(_quiet_steps, model)


class Streamed(Quick, Sized):
    pass


def _cache_streams(dtype: str) -> None:
    """What comes on another stream waits for the one before, unless a graph is captured; so does who gets the
    memory next."""
    kept = _exchange()
    orders = (ctypes.c_int * 128).in_dll(library(), "mock_order")

    def on(stream: int, function: Callable[..., Any], *more: Any, **options: Any) -> list[tuple[int, int]]:
        Quick.current = stream
        before = value("orders")
        function(*more, **options)
        return [(orders[2 * i % 128], orders[2 * i % 128 + 1]) for i in range(before, value("orders"))]

    cache = adaattn.KVCache(2, 2, 16, dtype=dtype, device="cuda")
    rng = np.random.default_rng(6)
    many, one = (Streamed(rng.standard_normal((2, 2, n, 16)).astype(F32)) for n in (100, 1))
    query, out = (Streamed(x) for x in np.zeros((2, 2, 4, 1, 16), F32))
    attend = {"out": out}
    assert on(0x70, cache.append, many, many) == []
    assert on(0x70, cache.attention, query, **attend) == []
    assert on(0x80, cache.attention, query, **attend) == [(0x70, 0x80)]
    assert on(0x80, cache.append, one, one) == []
    assert on(0x70, cache.append, one, one) == [(0x80, 0x70)]
    set_value("captured", 0x90)
    assert on(0x90, cache.attention, query, **attend) == []
    assert on(0x80, cache.attention, query, **attend) == [(0x70, 0x80)]  # of what was done, not captured
    set_value("captured", 0x80)
    assert on(0x70, cache.attention, query, **attend) == []  # who was last cannot be waited for yet
    assert on(0x70, cache.attention, query, **attend) == []
    set_value("captured", 0)
    assert on(0x80, cache.append, one, one) == [(0x70, 0x80)]
    set_value("captured", 0x80)
    assert on(0x70, cache.attention, query, **attend) == []
    set_value("captured", 0)
    assert on(0x90, cache.attention, query, **attend) == [(0x80, 0x90), (0x70, 0x90)]
    assert on(0x80, cache.attention, query, **attend) == [(0x90, 0x80)]
    # Other tables and pools: memory of 0x80 comes to those of 0x70, whose old table goes back there.
    assert on(0x90, cache.append, many, many) == [(0x80, 0x90), (0x90, 0x70)]
    assert on(0x90, cache.reorder, [1, 0]) == []
    assert on(0x90, cache.attention, query, **attend) == []
    reopened = on(0x70, cache.truncate, 70)
    # The array of these pages is on the legacy stream, as its library is no other's.
    assert reopened == ([(0x90, 1)] if dtype == "int8" else [])
    assert on(0x90, cache.attention, query, **attend) == ([(1, 0x90)] if dtype == "int8" else [])
    set_value("fail_after", 1)  # the capture of the one is asked for, that of the other fails
    with pytest.raises(adaattn.DeviceError, match="injected"):
        on(0x80, cache.attention, query, **attend)
    assert on(0x80, cache.attention, query, **attend) == [(0x90, 0x80)]

    assert on(0x80, cache.reorder, [0, 0, 1]) == [(0x80, 0x90)]  # that table is no longer there
    reopened = on(0x80, cache.truncate, 60)  # int8: into new memory
    assert reopened == ([(0x80, 1)] if dtype == "int8" else [])

    def drop() -> None:
        nonlocal cache
        del cache

    last = 1 if dtype == "int8" else 0x80
    assert set(on(0x90, drop)) == {(last, 0x70), (last, 0x90)} and value("live") == 0 and kept


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_cache_on_several_streams(dtype: str, model: str) -> None:
    run(_cache_streams, model, dtype)


def _merging() -> None:
    rng = np.random.default_rng(7)
    for dtype in DTYPES:
        query, key, values = arguments(dtype, Shape(2, 4, 2, 7, 90, 24, 40))
        parts = [
            adaattn.attention(query, key[:, :, at], values[:, :, at], return_lse=True)
            for at in (slice(0, 50), slice(50, 90))
        ]
        parts[1][1][0, 1, 2] = -np.inf
        parts[1][0][0, 1, 2] = np.nan
        for part in parts:
            part[1][1, 2, 3] = -np.inf
        parts[0][0][1, 0, 0, :2] = np.nan
        parts[0][1][1, 3] += rng.standard_normal(7).astype(parts[0][1].dtype) * 30
        expected = adaattn.merge(*parts[0], *parts[1])
        got = adaattn.merge(*fakes([*parts[0], *parts[1]]))
        for x, y in zip(expected, got, strict=True):
            assert isinstance(y, Fake) and x.dtype == y.array.dtype
            eps = float(ml_dtypes.finfo(x.dtype).eps)
            np.testing.assert_allclose(
                x.astype(F64), y.array.astype(F64), rtol=2 * eps, atol=1e-30, equal_nan=True
            )
        turned = [x[:, ::-1].copy()[:, ::-1] for x in parts[0]]
        assert same_bits(adaattn.merge(*fakes([*turned, *parts[1]]))[0].array, got[0].array)
    with pytest.raises(adaattn.DeviceError, match=r"^out_b: expected memory of CUDA device 0"):
        adaattn.merge(*fakes(list(parts[0])), *parts[1])
    for n in range(3):
        set_value("fail_after", n)
        try:
            adaattn.merge(*fakes([*parts[0], *parts[1]]))
        except adaattn.DeviceError as error:
            assert "injected" in str(error)
        set_value("fail_after", -1)
    assert value("live") == 0


def test_merging(backend: str) -> None:
    run(_merging, backend)


# What one mistake looks like, as in test_cuda_model.py; several sources are compiled again.
STORE_FAULTS = {
    "the page before": ("pages.cuh", "(open ? 0 : 1 + page)", "(open ? 0 : page)", "few.cu"),
    "a full page is open": ("pages.cuh", "page < s.keys /", "page + 1 < s.keys /", "few.cu"),
    "a scale of one": ("few.cu", "rows.scale = ada_page_scale(page)", "rows.scale = 1", "few.cu"),
    "a stale open page": ("store.cu", "ADA_CU_PAGE < all /", "ADA_CU_PAGE <= all /", "store.cu"),
    "rows of the wrong tokens": ("store.cu", "+ row - a.length[w.at];", "+ row;", "store.cu"),
    "NaN is forgotten": ("store.cu", "if (!finite) largest", "if (false) largest", "store.cu"),
    "another page is opened again": ("store.cu", "a.length[w.at], INT32_MAX", "0, INT32_MAX", "store.cu"),
    "half of a page is copied": ("store.cu", "a.words = bytes / 16", "a.words = bytes / 32", "store.cu"),
    "shares are not shares": ("store.cu", "weight[i] /= mass;", ";", "store.cu"),
    "keys for values": ("k0.cuh", "kept(v, p, sequence, g, 1,", "kept(v, p, sequence, g, 0,", "combine.cu"),
}


def _find_store_faults() -> None:
    _merging()
    rng = np.random.default_rng(8)
    for dtype in ("int8", "bf16"):
        twins = _twins(dtype, 2, 16, 16)
        for step in (200, 50, 33):
            _appended(twins, rng, step, [step, step - 20])
            _agree(twins, rng, 2)
        for cache in twins:
            cache.truncate([140, 70])
        _agree(twins, rng, 1)
        for cache in twins:
            cache.reorder([0, 0])
        _appended(twins, rng, 10, [10, 3])
        _agree(twins, rng, 1)
    _cache_specials()


def test_copies_that_touch_each_others_pages_come_one_after_the_other() -> None:
    """As when an append failed between two times that sequences were ordered anew."""
    from adaattn.pages import _independent

    assert _independent([(1, 9, False), (2, 9, False), (3, 8, False)]) == 3
    assert _independent([(1, 9, False), (2, 1, False)]) == 1  # reads what was written
    assert _independent([(1, 9, False), (9, 8, False)]) == 1  # writes what was read
    assert _independent([(1, 9, False), (1, 8, False)]) == 1


def test_nothing_is_found_without_a_fault(model: str) -> None:
    run(_find_store_faults, model)


@pytest.mark.parametrize("fault", cuda_build.some(STORE_FAULTS, 3))
def test_store_faults_are_found(fault: str, model: str, tmp_path: Path) -> None:
    library = cuda_build.with_mistake(tmp_path, Path(model).parent, *STORE_FAULTS[fault], "-O1")
    with pytest.raises(AssertionError, match="AssertionError"):
        run(_find_store_faults, str(library))
