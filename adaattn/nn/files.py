"""Arrays in safetensors files: 8 bytes of header length, a JSON header, the arrays' bytes one after another.

Files that are written replace older ones at once (a new file is renamed), so that whoever is stopped in
between leaves the older one. They hold the SHA-256 of the arrays' bytes, which is checked where there is one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, DTypeError
from .module import Array

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?", "U8": "u1", "I8": "i1",
    "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
}  # fmt: skip
_NAMES = {np.dtype(kind): name for name, kind in _DTYPES.items() if name != "BF16"}
_DIGEST = "sha256"


def write(path: str | os.PathLike[str], arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays by name and strings by name."""
    path, digest, start = Path(path), hashlib.sha256(), 0
    entries: dict[str, Any] = {}
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # each aligned to its size
    parts = []
    for name in order:
        array = np.ascontiguousarray(arrays[name])
        if array.dtype not in _NAMES:
            raise DTypeError(f"{name}: expected a dtype of safetensors, got {array.dtype}")
        parts.append(array.data.cast("B") if array.size else b"")
        digest.update(parts[-1])
        span = [start, start + array.nbytes]
        entries[name] = {"dtype": _NAMES[array.dtype], "shape": arrays[name].shape, "data_offsets": span}
        start += array.nbytes
    about = {"format": "np", **metadata, _DIGEST: digest.hexdigest()}
    header = json.dumps({"__metadata__": about, **entries}).encode()
    header += b" " * (-len(header) % 8)
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays and strings by name; bfloat16 comes as float32.

    Raises
    ------
    ArgumentError
        The file is not what the format says, is cut off, or its bytes are not those that were written.
    """
    data = np.fromfile(path, np.uint8)

    def refuse(what: str) -> ArgumentError:
        return ArgumentError(f"path: expected a whole safetensors file, got {os.fspath(path)} with {what}")

    if len(data) < 8:
        raise refuse(f"{len(data)} bytes")
    size = int.from_bytes(data[:8].tobytes(), "little")
    if size > len(data) - 8:
        raise refuse(f"a header of {size} bytes in {len(data)}")
    try:
        header = json.loads(data[8 : 8 + size].tobytes())
        metadata = header.pop("__metadata__", {})
        entries = {
            name: (
                str(entry["dtype"]),
                tuple(map(int, entry["shape"])),
                tuple(map(int, entry["data_offsets"])),
            )
            for name, entry in header.items()
        }
        texts = {str(name): str(text) for name, text in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise refuse("a header that cannot be read") from None
    data, end = data[8 + size :], 0
    arrays = {}
    for name, (kind, shape, span) in sorted(entries.items(), key=lambda item: item[1][2]):
        if kind not in _DTYPES:
            raise refuse(f"{name} of dtype {kind}")
        count, dtype = math.prod(shape), np.dtype(_DTYPES[kind])
        if min(shape, default=0) < 0 or span != (end, end + count * dtype.itemsize):
            raise refuse(f"{name} of shape {shape} in bytes {span}")
        end = span[1]
        if end > len(data):
            raise refuse(f"{len(data)} of the {end} bytes up to the end of {name}")
        try:
            array = data[span[0] : end].view(dtype).reshape(shape)
        except ValueError:  # more axes, or longer ones, than arrays have
            raise refuse(f"{name} of shape {shape}") from None
        arrays[name] = (array.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else array
    if end < len(data):
        raise refuse(f"{len(data) - end} bytes behind its last array")
    if _DIGEST in texts and hashlib.sha256(data.data).hexdigest() != texts.pop(_DIGEST):
        raise refuse("bytes that are not those that were written")
    return arrays, texts


def config_of(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The model's options in a file's metadata."""
    try:
        config = json.loads(metadata["config"])
    except (KeyError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ArgumentError(f"path: expected a file with config in its metadata, got {os.fspath(path)}")
    return config
