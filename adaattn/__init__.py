"""Attention with an error budget: the cheapest way to keep it, planned, verified and reported per head."""

from . import _adaattn, errors, linalg, reference
from .api import attention, cpu_info, get_num_threads, merge, plan, set_num_threads
from .backward import Gradients, attention_backward
from .cache import KVCache
from .calibration import calibrate
from .errors import ArgumentError, DeviceError, DTypeError, Error, NumericalError, ShapeError
from .gpu import gpu_info
from .products import LinearReport, PackedWeight, linear
from .stats import POLICIES, GradientReport, Plan, Report

__version__: str = _adaattn.cpu_info()["version"]

__all__ = [
    "POLICIES",
    "ArgumentError",
    "DTypeError",
    "DeviceError",
    "Error",
    "GradientReport",
    "Gradients",
    "KVCache",
    "LinearReport",
    "NumericalError",
    "PackedWeight",
    "Plan",
    "Report",
    "ShapeError",
    "__version__",
    "attention",
    "attention_backward",
    "calibrate",
    "cpu_info",
    "errors",
    "get_num_threads",
    "gpu_info",
    "linalg",
    "linear",
    "merge",
    "plan",
    "reference",
    "set_num_threads",
]
