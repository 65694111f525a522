"""The machine's ceilings: peaks of its units, and the rate at which memory is read (`roofline.c`)."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

UNITS = {"FMA peak": 0, "VNNI peak": 1, "BF16 peak": 2}
#: The shares of a rung's operations that its units run, each at a fraction of that unit's peak.
WORK = {
    "int8": {"VNNI peak": 1.0},
    "int16": {"VNNI peak": 2.0},
    "bf16": {"BF16 peak": 1.0},
    "int8/bf16": {"VNNI peak": 0.5, "BF16 peak": 0.5},
}


class Roofline:
    """The ceilings, compiled on the spot. Raises OSError where that is impossible."""

    def __init__(self) -> None:
        source = Path(__file__).with_name("roofline.c")
        compiler = os.environ.get("CC", "cc")
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder, "roofline.so"))
            flags = ["-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread"]
            command = [*compiler.split(), *flags, str(source), "-o", target]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise OSError(f"{compiler} failed: {result.stderr.strip()}")
            library = ctypes.CDLL(target)
        self._peak, self._read = library.roofline_peak, library.roofline_read
        self._peak.restype = self._read.restype = ctypes.c_double
        self._peak.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
        self._read.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2 + [ctypes.c_int] * 2

    def compute_seconds(self, unit: str, flops: float, threads: int, seconds: float) -> float:
        """Time that `flops` take at the peak rate of a unit, which is measured over `seconds`; inf: none."""
        rate = float(self._peak(UNITS[unit], threads, seconds))
        return flops / rate if rate > 0 else math.inf

    def read_seconds(
        self, key: NDArray[Any], value: NDArray[Any], ahead: int, threads: int, passes: int
    ) -> float:
        """Time to read both arrays with prefetch `ahead` bytes ahead (0: none), mean of `passes`."""
        return float(self._read(key.ctypes.data, value.ctypes.data, key.nbytes, ahead, threads, passes))
