"""How fast each rung of the precision ladder is on this machine: as `calibrate` measured, else built in.

A rate is for scores and values together, in units of 1e9 floating-point operations (2 * T * S * (D + E)) per
second of one core, with all operands packed. Packing a key and its value costs time of its own, per element.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _adaattn

#: What a planner may choose from on a CPU, dear to cheap. int8 with bf16 values is a rung of its own: its
#: error lies between its parts'. On a GPU those in fp8 follow.
RUNGS: tuple[str, ...] = tuple(rung for rung in _adaattn.CANDIDATES if "fp8" not in rung)

HEAD_SIZES = (64, 128)
SIZE = 1024  # queries and keys that rungs are compared with

# By the most capable instruction set: GFLOP/s for head sizes 64 and 128, and nanoseconds to pack an element,
# as measured on machines of the kind; bf16 and int8/bf16 of avx512bf16 and all of amx: on prototypes of the
# kernels.
_DEFAULTS: dict[str, dict[str, tuple[float, float, float]]] = {
    "amx": {
        "fp64": (65, 70, 0), "fp32": (150, 150, 0), "bf16x6": (320, 350, 1.0), "bf16x3": (630, 630, 0.8),
        "int16": (230, 270, 0.6), "fp16": (370, 400, 1.0), "bf16": (1400, 1550, 0.3),
        "int8/bf16": (1400, 1800, 0.4), "int8": (1500, 2000, 0.5),
    },
    "avx512bf16": {
        "fp64": (52, 54, 0), "fp32": (109, 112, 0), "bf16x6": (109, 112, 0), "bf16x3": (60, 72, 1.0),
        "int16": (185, 200, 0.35), "fp16": (60, 72, 0.7), "bf16": (224, 224, 0.35),
        "int8/bf16": (292, 294, 0.35), "int8": (420, 425, 0.35),
    },
    "avx512vnni": {
        "fp64": (62, 66, 0), "fp32": (135, 140, 0), "bf16x6": (135, 140, 0), "bf16x3": (70, 88, 1.0),
        "int16": (220, 250, 0.6), "fp16": (70, 88, 0.5), "bf16": (70, 88, 0.5),
        "int8/bf16": (95, 135, 0.5), "int8": (455, 485, 0.6),
    },
    "avx2": {
        "fp64": (29, 30, 0), "fp32": (79, 81, 0), "bf16x6": (79, 81, 0), "bf16x3": (54, 66, 1.6),
        "int16": (116, 128, 0.9), "fp16": (55, 67, 1.1), "bf16": (50, 63, 1.3),
        "int8/bf16": (62, 76, 1.1), "int8": (98, 108, 1.0),
    },
    "scalar": {
        "fp64": (5, 5, 0), "fp32": (8, 8, 0), "bf16x6": (8, 8, 0), "bf16x3": (7, 7, 1.0),
        "int16": (3, 3, 1.0), "fp16": (7, 7, 1.0), "bf16": (7, 7, 1.0),
        "int8/bf16": (4, 4, 1.0), "int8": (3, 3, 1.0),
    },
}  # fmt: skip

# The same of whole GPUs, by compute capability; a later chip goes by the newest one that is older. 9.0 was
# measured on an H100, but for fp64 and fp8; the others are what kernels of the kind reach elsewhere. Arrays
# in the rung's own format are not packed. fp8 is predicted (cuda/NOTES.md): tensor cores of 8.9 multiply it
# as fast as int8; on 9.0 the instruction becomes conversions and two products of fp16, slower than bf16.
_GPU_DEFAULTS: dict[tuple[int, int], dict[str, tuple[float, float, float]]] = {
    (8, 0): {
        "fp64": (2e3, 2e3, 0), "fp32": (3.5e4, 4.5e4, 0.012), "fp16": (1.4e5, 1.6e5, 0.012),
        "bf16": (1.4e5, 1.6e5, 0.012), "int8/bf16": (1.4e5, 1.8e5, 0.012),
    },
    (8, 9): {
        "fp64": (6e2, 6e2, 0), "fp32": (2.5e4, 3e4, 0.02), "fp16": (1e5, 1.2e5, 0.02),
        "bf16": (1e5, 1.2e5, 0.02), "int8/bf16": (1.1e5, 1.4e5, 0.02),
        "int8/fp8": (1.4e5, 1.8e5, 0.03), "fp8": (1.4e5, 1.8e5, 0.03),
    },
    (9, 0): {
        "fp64": (3e3, 3e3, 0), "fp32": (9.5e4, 1.05e5, 0.008), "fp16": (3.35e5, 3.5e5, 0.008),
        "bf16": (3.35e5, 3.5e5, 0.008), "int8/bf16": (2.95e5, 3.55e5, 0.008),
        "int8/fp8": (1.8e5, 2e5, 0.012), "fp8": (1.4e5, 1.5e5, 0.012),
    },
}  # fmt: skip

# Share of a dense head's time on a GPU that finding and walking the lists of its blocks takes where all of
# them are left out: predicted (cuda/NOTES.md), not measured.
_GPU_SPARSE = {"fp32": 0.03, "fp16": 0.06, "bf16": 0.06}

# Share of the products' time that is left of a head where all blocks of keys stand in for their values, as
# measured on machines of the kind; elsewhere heads are dense unless `calibrate` has measured.
_SPARSE: dict[str, dict[str, float]] = {
    "avx512bf16": {"int16": 0.75, "bf16": 0.6, "int8/bf16": 0.49, "int8": 0.76},
    "avx512vnni": {"int16": 0.75, "int8": 0.77},
    "avx2": {"int16": 0.69},
}

_table: NDArray[np.float64] | None = None  # what calls within a budget go by, once it has been read


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


def _defaults(kind: str | None = None) -> NDArray[np.float64]:
    """Of machines of a kind; None: of this one's."""
    used = _adaattn.cpu_info()["isa_used"]
    kind = kind or next((isa for isa in _DEFAULTS if isa in used), "scalar")
    sparse = _SPARSE.get(kind, {})
    return np.array([(*_DEFAULTS[kind][rung], sparse.get(rung, 1)) for rung in RUNGS], np.float64)


def _load() -> tuple[str, NDArray[np.float64]]:
    """Where the rates in force come from, and they: a rung's (gflops for each head size, pack_ns, sparse)."""
    try:
        saved = json.loads(cache_file().read_text(encoding="utf-8"))
        if saved["machine"] == _machine():
            rows = [
                [float(saved["gflops"][rung][str(d)]) for d in HEAD_SIZES]
                + [float(saved[name][rung]) for name in ("pack_ns", "sparse")]
                for rung in RUNGS
            ]
            table = np.array(rows, np.float64)
            if np.isfinite(table).all() and (table[:, [0, 1, 3]] > 0).all() and (table[:, 2] >= 0).all():
                return "measured", table
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        pass  # no file, or not one of ours
    return "default", _defaults()


def table() -> NDArray[np.float64]:
    """The rates in force as the engine's planner takes them; read once."""
    global _table
    if _table is None:
        _table = _load()[1]
    return _table


def gpu_table(capability: tuple[int, int]) -> NDArray[np.float64]:
    """Rates of a GPU as the engine's planner takes them; 0: there is no kernel."""
    known = max((chip for chip in _GPU_DEFAULTS if chip <= capability), default=min(_GPU_DEFAULTS))
    rates = _GPU_DEFAULTS[known]
    rows = [(*rates.get(rung, (0, 0, 0)), _GPU_SPARSE.get(rung, 1)) for rung in _adaattn.CANDIDATES]
    return np.array(rows, np.float64)


def rates() -> dict[str, Any]:
    """The rates in force.

    Returns
    -------
    dict
        ``source`` ("measured" or "default"), ``gflops`` (rung to head size to rate), ``pack_ns`` (rung to
        nanoseconds that packing an element of a key or value takes), ``sparse`` (rung to the share of its
        time that is left where a head needs no values but those of stand-ins; 1: never chosen) and
        ``offered``: the rungs that are faster than every more exact one, by more than measurements scatter.
    """
    return described(*_load())


def described(source: str, rows: NDArray[np.float64]) -> dict[str, Any]:
    """Such rates as `rates` gives them."""
    gflops = {
        rung: dict(zip(HEAD_SIZES, map(float, row), strict=False))
        for rung, row in zip(RUNGS, rows, strict=True)
    }
    pack_ns, sparse = ({rung: float(row[i]) for rung, row in zip(RUNGS, rows, strict=True)} for i in (2, 3))
    return {
        "source": source,
        "gflops": gflops,
        "pack_ns": pack_ns,
        "sparse": sparse,
        "offered": _offered(rows),
    }


def _offered(rows: NDArray[np.float64]) -> list[str]:
    speeds = 1 / (1 / rows[:, :2] + rows[:, 2:3] / (2 * SIZE))  # with packing, at T = S = SIZE
    offered: list[int] = []
    for i in range(len(RUNGS)):
        if not offered or (speeds[i] > 1.05 * speeds[offered].max(axis=0)).any():
            offered.append(i)
    return [RUNGS[i] for i in offered]


def keep(rows: NDArray[np.float64]) -> None:
    """Write what `calibrate` has measured to this machine's file, and go by it from now on."""
    global _table
    found = described("measured", rows)
    kept = {name: found[name] for name in ("gflops", "pack_ns", "sparse")}
    _write(cache_file(), json.dumps({"machine": _machine(), **kept}, indent=1))
    _table = rows


def _write(path: Path, text: str) -> None:
    """Replaces the file at once, so that no reader sees half of it."""
    import tempfile  # and what it loads take a tenth of the time of `import adaattn`

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)
