"""Attention with an error budget: exact attention on the CPU, every number checked against float64."""

from . import errors, reference
from .api import attention, cpu_info, get_num_threads, merge, set_num_threads
from .cache import KVCache
from .errors import ArgumentError, DeviceError, DTypeError, Error, NumericalError, ShapeError

__version__: str = cpu_info()["version"]

__all__ = [
    "ArgumentError",
    "DTypeError",
    "DeviceError",
    "Error",
    "KVCache",
    "NumericalError",
    "ShapeError",
    "__version__",
    "attention",
    "cpu_info",
    "errors",
    "get_num_threads",
    "merge",
    "reference",
    "set_num_threads",
]
