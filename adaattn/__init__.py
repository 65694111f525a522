"""Attention with an error budget: exact attention on the CPU, every number checked against float64."""

from . import _adaattn, errors, reference
from .api import attention, cpu_info, get_num_threads, merge, set_num_threads
from .cache import KVCache
from .errors import ArgumentError, DeviceError, DTypeError, Error, NumericalError, ShapeError
from .rates import calibrate
from .stats import Report

__version__: str = _adaattn.cpu_info()["version"]

__all__ = [
    "ArgumentError",
    "DTypeError",
    "DeviceError",
    "Error",
    "KVCache",
    "NumericalError",
    "Report",
    "ShapeError",
    "__version__",
    "attention",
    "calibrate",
    "cpu_info",
    "errors",
    "get_num_threads",
    "merge",
    "reference",
    "set_num_threads",
]
