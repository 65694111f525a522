"""Arrays of other libraries through DLPack: torch tensors in, torch tensors out, no copies."""

from __future__ import annotations

import ctypes
import sys
import types
from typing import Any

import numpy as np
import pytest
from support import CASES, Array, Shape, in_new_process, inputs, peak_memory, read_only, same_bits

import adaattn

torch = pytest.importorskip("torch")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPE = Shape(2, 4, 2, 70, 130, 32, 24)


def tensors(rng: np.random.Generator, dtype: Any = torch.float32, shape: Shape = SHAPE) -> list[Any]:
    return [torch.from_numpy(x).to(dtype) for x in inputs(rng, shape)]


def array(tensor: Any) -> Any:
    """A NumPy view of a tensor, of ml_dtypes' bfloat16 where it is one."""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_tensors_in_tensors_out(case: str, dtype: Any, rng: np.random.Generator) -> None:
    query, key, value = tensors(rng, dtype)
    options = CASES[case](rng, SHAPE)
    expected = adaattn.attention(*map(array, (query, key, value)), return_lse=True, **options)
    for name in ("attn_mask", "alibi_slopes", "sinks", "kv_lengths", "query_offset", "seed"):
        if isinstance(options.get(name), np.ndarray) and "bfloat16" not in str(options[name].dtype):
            options[name] = torch.from_numpy(options[name])
    out, lse = adaattn.attention(query, key, value, return_lse=True, **options)
    assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert same_bits((array(out), array(lse)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bfloat16_mask(dtype: Any, rng: np.random.Generator) -> None:
    arrays = tensors(rng, dtype)
    mask = torch.randn(70, 130).bfloat16()
    assert same_bits(
        array(adaattn.attention(*arrays, attn_mask=mask)),
        array(adaattn.attention(*arrays, attn_mask=mask.float())),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype: Any, rng: np.random.Generator) -> None:
    wide = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(rng, dtype)]
    wide[1] = wide[1][:, :1].expand(-1, 2, -1, -1)
    plain = adaattn.attention(*(x.contiguous() for x in wide))
    assert torch.equal(adaattn.attention(*wide), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_written_in_place(dtype: Any, rng: np.random.Generator) -> None:
    arrays = tensors(rng, dtype)
    expected = adaattn.attention(*arrays)
    for out in (torch.zeros_like(expected), torch.zeros(*expected.shape[:3], 48, dtype=dtype)[..., ::2]):
        place = out.data_ptr()
        assert adaattn.attention(*arrays, out=out) is out
        assert out.data_ptr() == place and torch.equal(out, expected)


def test_kinds_of_arrays_may_mix(rng: np.random.Generator) -> None:
    """The result is of query's kind."""
    query, key, value = tensors(rng)
    expected = adaattn.attention(query, key, value)
    assert torch.equal(adaattn.attention(query, key.numpy(), value), expected)
    out = adaattn.attention(query.numpy(), key, value)
    assert isinstance(out, np.ndarray) and same_bits(out, expected.numpy())


def test_merge(rng: np.random.Generator) -> None:
    side = adaattn.attention(*tensors(rng), return_lse=True)
    merged = adaattn.merge(*side, *side)
    expected = adaattn.merge(*map(array, side), *map(array, side))
    assert all(isinstance(x, torch.Tensor) for x in merged)
    assert same_bits(tuple(map(array, merged)), expected)


def test_numpy_is_not_asked_to_copy(rng: np.random.Generator) -> None:
    """A tensor may come from an object that knows nothing but the protocol."""

    class Opaque:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def __dlpack__(self, **options: Any) -> Any:
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.tensor.__dlpack_device__()

    arrays = tensors(rng)
    out = adaattn.attention(arrays[0].numpy(), *map(Opaque, arrays[1:]))
    assert same_bits(out, adaattn.attention(*arrays).numpy())


class Standard:
    """A query that knows only DLPack, as it was before version 1, and perhaps its library's namespace."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class Namespaced(Standard):
    def __array_namespace__(self) -> Any:
        return types.SimpleNamespace(asarray=Namespaced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_of_other_libraries(dtype: Any, rng: np.random.Generator) -> None:
    """Results are NumPy arrays, or what the namespace of query's library makes of them."""
    arrays = tensors(rng, dtype)
    expected = tuple(map(array, adaattn.attention(*arrays, return_lse=True)))
    plain = adaattn.attention(*map(Standard, arrays), return_lse=True)
    assert all(isinstance(x, np.ndarray) for x in plain) and same_bits(plain, expected)
    named = adaattn.attention(*map(Namespaced, arrays), return_lse=True)
    assert all(type(x) is Namespaced for x in named) and same_bits(tuple(x.array for x in named), expected)
    out = np.empty_like(expected[0])
    assert adaattn.attention(*map(Namespaced, arrays), out=out) is out and same_bits(out, expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_are_not_aligned(dtype: Any, rng: np.random.Generator) -> None:
    arrays = tensors(rng, dtype)
    shifted = [shift(x) for x in arrays]
    assert all(x.data_ptr() % x.element_size() for x in shifted)
    assert torch.equal(adaattn.attention(*shifted), adaattn.attention(*arrays))
    with pytest.raises(adaattn.ArgumentError, match=r"^out: expected .*aligned.*, got an unaligned"):
        adaattn.attention(*arrays, out=shift(adaattn.attention(*arrays)))


def shift(tensor: Any) -> Any:
    """The same values one byte off their natural alignment."""
    memory = bytearray(b" ") + bytearray(array(tensor).tobytes())
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).reshape(tensor.shape)


def test_read_only_out(rng: np.random.Generator) -> None:
    class ReadOnly(Standard):
        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**options)

    arrays = inputs(rng, SHAPE)
    out = ReadOnly(read_only(adaattn.attention(*arrays)))
    with pytest.raises(
        adaattn.ArgumentError, match=r"^out: expected writable memory, got a read-only tensor"
    ):
        adaattn.attention(*arrays, out=out)


@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask"])
def test_tensors_without_elements(which: str, rng: np.random.Generator) -> None:
    arguments = dict(zip(("query", "key", "value"), tensors(rng), strict=True))
    with pytest.raises(adaattn.ShapeError, match=rf"^{which}: expected "):
        adaattn.attention(**(arguments | {which: torch.zeros(2, 4, 0, 32)}))


def test_result_outlives_the_call_and_its_memory_is_freed(rng: np.random.Generator) -> None:
    out = adaattn.attention(*tensors(rng))
    expected = out.clone()
    for _ in range(20):
        adaattn.attention(*tensors(rng))
    assert torch.equal(out, expected)
    out += 1
    assert not torch.equal(out, expected)


def test_references_are_given_back(rng: np.random.Generator) -> None:
    arrays = tensors(rng)
    before = [sys.getrefcount(x) for x in arrays]
    for _ in range(30):
        adaattn.attention(*arrays)
        with pytest.raises(adaattn.Error):
            adaattn.attention(*arrays, softcap=-1.0)
    assert [sys.getrefcount(x) for x in arrays] == before


def _peak_growth() -> int:
    arrays = [torch.zeros(1, 1, n, 64) for n in (16, 65_536, 65_536)]
    out = torch.zeros(1, 1, 16, 64)
    adaattn.attention(*(x[:, :, :16] for x in arrays), out=out)
    before = peak_memory()
    adaattn.attention(*arrays, out=out)
    return peak_memory() - before


def test_keys_are_not_copied() -> None:
    """16 MB of keys and as many of values pass without memory for either."""
    assert in_new_process(_peak_growth) < 8 * 2**20


@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask", "out"])
def test_gradients_are_refused(which: str, rng: np.random.Generator) -> None:
    """No gradient is computed here, so a tensor that asks for one would lose it silently."""
    query, key, value = tensors(rng)
    arguments = {"query": query, "key": key, "value": value, "attn_mask": torch.zeros(70, 130)}
    arguments["out"] = torch.zeros(2, 4, 70, 24)
    arguments[which].requires_grad_()
    with pytest.raises(adaattn.ArgumentError, match=rf"^{which}: expected .*, got .*require.* grad.*detach"):
        adaattn.attention(**arguments)


class Exporter:
    """An array whose capsule names another device, or whose export raises what is given."""

    def __init__(self, array: Array, device: int | Exception) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        if isinstance(self.device, Exception):
            raise self.device
        capsule = self.array.__dlpack__()
        get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
        get_pointer.argtypes, get_pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
        device_type = get_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
        ctypes.c_int32.from_address(device_type).value = self.device
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self.device if isinstance(self.device, int) else 1), 0


@pytest.mark.parametrize("device", [2, 4, 7, 8, 10, 13, 14, 99])
@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask", "out"])
def test_unsupported_devices(which: str, device: int, rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, SHAPE)
    arguments = {"query": query, "key": key, "value": value, which: Exporter(query, device)}
    with pytest.raises(adaattn.DeviceError, match=rf"^{which}: expected .*CPU.*, got .*{device}"):
        adaattn.attention(**arguments)


def test_meta_tensors_are_refused(rng: np.random.Generator) -> None:
    query, key, value = tensors(rng)
    with pytest.raises(adaattn.Error, match=r"^key: expected .*, got "):
        adaattn.attention(query, key.to("meta"), value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes(dtype: Any, rng: np.random.Generator) -> None:
    query, key, value = tensors(rng)
    with pytest.raises(adaattn.Error, match=r"^value: expected .*, got "):
        adaattn.attention(query, key, value.to(dtype))


@pytest.mark.parametrize("error", [BufferError("broken"), RuntimeError("broken")], ids=repr)
def test_export_that_fails(error: Exception, rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, SHAPE)
    with pytest.raises(adaattn.ArgumentError, match=r"^value: expected .*, got Exporter: broken") as caught:
        adaattn.attention(query, key, Exporter(value, error))
    assert caught.value.__cause__ is error


def test_export_without_memory(rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, SHAPE)
    with pytest.raises(MemoryError):
        adaattn.attention(query, key, Exporter(value, MemoryError()))
