"""GPUs: where the CUDA backend lies, what it finds, and on which stream the owner of an array works."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import _adaattn
from .errors import ArgumentError, DeviceError, DTypeError, Error

_LIBRARY = "libadaattn_cuda.so"
_CUDA, _MANAGED = 2, 13  # DLPack's types of device
_LEGACY, _PER_THREAD = 1, 2  # streams that every process has, as DLPack and the runtime number them


def backend() -> Path | None:
    """The file of the CUDA backend: ADAATTN_CUDA_PLUGIN, or beside the engine, or of the wheel for it."""
    if path := os.environ.get("ADAATTN_CUDA_PLUGIN"):
        return Path(path)
    folders = [Path(_adaattn.__file__).parent]
    if (spec := importlib.util.find_spec("adaattn_cuda")) is not None:
        folders += map(Path, spec.submodule_search_locations or ())
    return next((folder / _LIBRARY for folder in folders if (folder / _LIBRARY).exists()), None)


def _describe() -> tuple[str, int, int, list[tuple[str, int, int, int, int, int]]]:
    """What the backend says; DeviceError where there is none or it does not work."""
    path = backend()
    if path is None:
        raise DeviceError(
            "no CUDA backend is installed (build adaattn with ADAATTN_CUDA=1, or install adaattn-cuda)"
        )
    _adaattn._gpu_load(path)
    return _adaattn._gpu_describe()


def _version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _nothing(driver: int) -> str:
    return "the CUDA runtime finds no device" if driver else "there is no NVIDIA driver"


def gpu_info() -> dict[str, Any]:
    """The GPUs that calls may run on, or why there are none.

    Returns
    -------
    dict
        ``available`` (bool), ``reason`` (why not, else None), ``backend`` (file of the CUDA backend),
        ``version`` (its own), ``driver`` and ``runtime`` (CUDA versions that the driver supports and the
        backend was built with) and ``devices``: for each ``name``, ``capability`` (such as "9.0"),
        ``multiprocessors``, ``memory_bytes`` and ``rungs`` that it computes, dear to cheap. Values that are
        not known are None.

    Notes
    -----
    Of the backend, exact attention, its rungs but fp8, and budgets have run on a GPU (an H100). Its
    gradients, caches, matrix products, sparse heads and fp8 were tested on a model of the machine only.
    """
    info: dict[str, Any] = dict.fromkeys(("available", "reason", "backend", "version", "driver", "runtime"))
    info |= {"available": False, "devices": []}
    path = backend()
    info["backend"] = None if path is None else str(path)
    try:
        info["version"], driver, runtime, devices = _describe()
    except DeviceError as error:
        return info | {"reason": str(error)}
    info |= {"driver": _version(driver), "runtime": _version(runtime)}
    for name, major, minor, multiprocessors, memory, rungs in devices:
        info["devices"].append(
            {
                "name": name,
                "capability": f"{major}.{minor}",
                "multiprocessors": multiprocessors,
                "memory_bytes": memory,
                "rungs": [rung for i, rung in enumerate(_adaattn.RUNGS) if rungs >> i & 1],
            }
        )
    return info | ({"available": True} if devices else {"reason": _nothing(driver)})


def _ordinal_of(device: Any) -> int:
    """The device that an argument names."""
    expected = "None, 'cuda' or 'cuda:N'"
    if not isinstance(device, str):
        raise DTypeError(f"device: expected {expected}, got {type(device).__name__}")
    name, _, ordinal = device.partition(":")
    if name != "cuda" or not (ordinal.isdecimal() or device == name):
        raise ArgumentError(f"device: expected {expected}, got {device!r}")
    return int(ordinal or 0)


def _stream_of(array: Any, ordinal: int) -> tuple[int, bool]:
    """The stream on which the owner of an array works now, and whether it must be waited for, because the
    owner orders nothing behind it."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(array, torch.Tensor):
        return torch.cuda.current_stream(ordinal).cuda_stream or _LEGACY, False
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy.cuda.get_current_stream().ptr or _LEGACY, False
    return _LEGACY, True


def owner_of_stream(array: Any) -> Any:
    """What must not go away as long as the stream is used on which the owner of an array works now: streams
    of other libraries than CuPy live for ever."""
    cupy = sys.modules.get("cupy")
    return cupy.cuda.get_current_stream() if cupy and isinstance(array, cupy.ndarray) else None


def _blas_candidates() -> Iterator[str | None]:
    """Where cuBLAS may be, in order: a file that is asked for, or the process's own (None), of NVIDIA's
    wheels, and what the system's loader finds."""
    if path := os.environ.get("ADAATTN_CUBLASLT"):
        yield path
        return
    yield None
    for folder in sys.path:
        yield from map(str, sorted(Path(folder, "nvidia").glob("*/lib/libcublasLt.so.1[23]"), reverse=True))
    yield from ("libcublasLt.so.13", "libcublasLt.so.12")


def open_blas(device: int) -> None:
    """Open cuBLAS, which matrix products take, on a device.

    Raises
    ------
    DeviceError
        There is none that works, or no GPU.
    """
    if device in _blas_is_open_on:
        return
    _devices()
    tried = []
    for path in _blas_candidates():
        try:
            _adaattn._gpu_open_blas(path, device)
            _blas_is_open_on.add(device)
            return
        except DeviceError as error:
            tried.append(f"{path or 'this process'}: {error}")
    raise DeviceError(
        "cuBLAS: expected libcublasLt.so of version 12 or 13 in this process, in NVIDIA's wheels (pip "
        f"install nvidia-cublas) or where the system's loader looks, got none that works ({'; '.join(tried)})"
    )


_blas_is_open_on: set[int] = set()


class DeviceArray:
    """A result on a GPU for a library that makes no memory for others: it takes this through DLPack."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: int) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        nbytes = math.prod(shape) * {"float64": 8, "float32": 4}.get(dtype, 2)
        self._memory = _adaattn._gpu_allocate(device, _LEGACY, nbytes)

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self.device

    def __dlpack__(
        self, *, stream: int | None = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        if stream != -1:
            _adaattn._gpu_order(self.device, _LEGACY, stream or _LEGACY)
        return _adaattn._gpu_export(self._memory, self.device, self.shape, self.dtype)


def device_of(array: Any) -> int | None:
    """The GPU that an array lies on; None for one that does not."""
    speaks = hasattr(array, "__dlpack_device__") and not isinstance(array, type)
    kind, device = array.__dlpack_device__() if speaks else (None, None)
    return device if kind in (_CUDA, _MANAGED) else None


def to_host(array: Any) -> Any:
    """A copy on the CPU of a small array of a GPU."""
    for method in ("cpu", "get"):  # torch's and CuPy's
        if hasattr(array, method):
            return getattr(array, method)()
    return np.asarray(array)


_capabilities: list[tuple[int, int]] = []  # of the devices that were found once


def _devices() -> list[tuple[int, int]]:
    """Capabilities of the devices; DeviceError where there are none."""
    if not _capabilities:
        _, driver, _, devices = _describe()
        if not devices:
            raise DeviceError(_nothing(driver))
        _capabilities.extend((major, minor) for _, major, minor, *_ in devices)
    return _capabilities


def capability_for(query: Any, device: Any) -> tuple[int, int] | None:
    """Of the GPU that a call works on; None for the CPU, and where the call will say what is wrong."""
    if device is None and (isinstance(query, np.ndarray) or device_of(query) is None):
        return None
    try:
        return _devices()[_ordinal_of(device) if device is not None else device_of(query) or 0]
    except (Error, IndexError):
        return None


def place(query: Any, ordinal: int | None, device: Any) -> tuple[int, int, bool]:
    """Device, stream and whether to wait, for a query on device `ordinal` or, where that is None, of the CPU.

    Raises
    ------
    DeviceError
        There is no such device, or no usable GPU at all.
    """
    asked = None if device is None else _ordinal_of(device)
    if ordinal is not None and asked not in (None, ordinal):
        raise DeviceError(f"device: expected 'cuda:{ordinal}', where query lies, or None, got {device!r}")
    if ordinal is None and not isinstance(query, np.ndarray):
        raise DeviceError(
            f"device: expected None for arrays that are not NumPy's, got {device!r}: move them there first"
        )
    at = ordinal if ordinal is not None else asked
    assert at is not None
    try:
        if not at < len(_devices()):
            raise DeviceError(f"the CUDA runtime finds {len(_devices())}")
    except DeviceError as error:
        name, got = "device", repr(device)
        if ordinal is not None:
            name, got = "query", "a tensor on DLPack device {}:{}".format(*query.__dlpack_device__())
        raise DeviceError(
            f"{name}: expected memory of the CPU, since no such GPU can be used ({error}), got {got}"
        ) from None
    return (at, *((_PER_THREAD, False) if ordinal is None else _stream_of(query, at)))
