"""How fast each rung of the precision ladder is on this machine: measured by `calibrate`, else built in.

A rate is for scores and values together, in units of 1e9 floating-point operations (2 * T * S * (D + E)) per
second of one core, packing included.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import _adaattn

#: Dear to cheap. int8 with bf16 values is a rung of its own: its error lies between its parts'.
RUNGS: tuple[str, ...] = ("fp32", "bf16x6", "bf16x3", "int16", "fp16", "bf16", "int8/bf16", "int8")

HEAD_SIZES = (64, 128)

# By the most capable instruction set, for head sizes 64 and 128, as measured on machines of the kind; bf16
# and int8/bf16 of avx512bf16 and all of amx: on prototypes of the kernels.
_DEFAULTS: dict[str, dict[str, tuple[float, float]]] = {
    "amx": {
        "fp32": (150, 150), "bf16x6": (300, 330), "bf16x3": (600, 600), "int16": (210, 250),
        "fp16": (350, 380), "bf16": (1200, 1400), "int8/bf16": (1200, 1600), "int8": (1300, 1800),
    },
    "avx512bf16": {
        "fp32": (109, 112), "bf16x6": (109, 112), "bf16x3": (55, 70), "int16": (170, 190),
        "fp16": (55, 70), "bf16": (220, 222), "int8/bf16": (282, 288), "int8": (395, 408),
    },
    "avx512vnni": {
        "fp32": (135, 140), "bf16x6": (135, 140), "bf16x3": (65, 85), "int16": (205, 240),
        "fp16": (65, 85), "bf16": (65, 85), "int8/bf16": (90, 130), "int8": (405, 460),
    },
    "avx2": {
        "fp32": (78, 80), "bf16x6": (78, 80), "bf16x3": (53, 62), "int16": (105, 118),
        "fp16": (54, 64), "bf16": (50, 60), "int8/bf16": (61, 72), "int8": (90, 100),
    },
    "scalar": {
        "fp32": (8, 8), "bf16x6": (8, 8), "bf16x3": (7, 7), "int16": (3, 3),
        "fp16": (7, 7), "bf16": (7, 7), "int8/bf16": (4, 4), "int8": (3, 3),
    },
}  # fmt: skip


def split(rung: str) -> str | tuple[str, str]:
    """The ``precision`` argument that a rung's name stands for: "int8/bf16" is the pair ("int8", "bf16")."""
    scores, _, values = rung.partition("/")
    return (scores, values) if values else scores


def _microcode() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("microcode")), "")
    except OSError:
        return ""


def _machine() -> dict[str, str]:
    """What a measurement is valid for."""
    info = _adaattn.cpu_info()
    isa = ",".join(info["isa_used"]) or "scalar"
    return {"version": info["version"], "cpu": info["cpu"], "microcode": _microcode(), "isa": isa}


def cache_file() -> Path:
    """Where the rates of this machine are kept: in $XDG_CACHE_HOME, else the platform's cache folder."""
    home = Path.home()
    default = home / "Library" / "Caches" if platform.system() == "Darwin" else home / ".cache"
    isa = _machine()["isa"].rpartition(",")[2]
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "adaattn" / f"rates-{isa}.json"


def _defaults() -> dict[str, dict[int, float]]:
    used = _adaattn.cpu_info()["isa_used"]
    best = next((isa for isa in _DEFAULTS if isa in used), "scalar")
    return {rung: dict(zip(HEAD_SIZES, pair, strict=True)) for rung, pair in _DEFAULTS[best].items()}


def rates() -> dict[str, Any]:
    """The rates in force.

    Returns
    -------
    dict
        ``source`` ("measured" or "default"), ``gflops`` (rung to head size to rate) and ``offered``: the
        rungs that are faster than every more exact one, by more than measurements scatter.
    """
    source, gflops = "default", _defaults()
    try:
        saved = json.loads(cache_file().read_text(encoding="utf-8"))
        if saved["machine"] == _machine():
            measured = {rung: {d: float(saved["gflops"][rung][str(d)]) for d in HEAD_SIZES} for rung in RUNGS}
            source, gflops = "measured", measured
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        pass  # no file, or not one of ours
    return {"source": source, "gflops": gflops, "offered": _offered(gflops)}


def _offered(gflops: dict[str, dict[int, float]]) -> list[str]:
    offered: list[str] = []
    for rung in RUNGS:
        if not offered or any(
            gflops[rung][d] > 1.05 * max(gflops[better][d] for better in offered) for d in HEAD_SIZES
        ):
            offered.append(rung)
    return offered


def calibrate(*, seconds: float = 3.0, save: bool = True) -> dict[str, Any]:
    """Measure how fast each rung is on this machine, on one core, and keep the result for later processes.

    The rungs take turns, so that a change of the clock meets all of them; the medians count. The file in the
    user's cache folder is valid for this version of the library, this processor, its microcode and the
    instruction sets in use.

    Parameters
    ----------
    seconds : float
        About how long to measure.
    save : bool
        Whether to write the file.

    Returns
    -------
    dict
        As ``cpu_info()["rates"]``: ``source``, ``gflops`` and ``offered``.

    Raises
    ------
    ArgumentError
        ``seconds`` is not a positive number.
    OSError
        The cache folder cannot be written.
    """
    from .api import attention
    from .errors import ArgumentError

    if not (isinstance(seconds, (int, float)) and 0 < seconds < float("inf")):
        raise ArgumentError(f"seconds: expected a number above 0, got {seconds!r}")
    size = 1024
    times: dict[tuple[str, int], list[float]] = {(rung, d): [] for rung in RUNGS for d in HEAD_SIZES}
    arrays = {d: np.random.default_rng(d).standard_normal((4, 1, 1, size, d), np.float32) for d in HEAD_SIZES}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[RUNGS[0], HEAD_SIZES[0]]) < 3:
        for (rung, d), samples in times.items():
            query, key, value, out = arrays[d]
            start = time.perf_counter()
            attention(query, key, value, precision=split(rung), out=out, num_threads=1)
            samples.append(time.perf_counter() - start)
    gflops = {
        rung: {d: 4e-9 * size * size * d / statistics.median(times[rung, d]) for d in HEAD_SIZES}
        for rung in RUNGS
    }
    if save:
        _write(cache_file(), json.dumps({"machine": _machine(), "gflops": gflops}, indent=1))
    return {"source": "measured", "gflops": gflops, "offered": _offered(gflops)}


def _write(path: Path, text: str) -> None:
    """Replaces the file at once, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)
