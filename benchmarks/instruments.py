"""What the instruments of the error budget share: tables of rates, sets of heads, how results are kept."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from heads import Array, Heads, bundled, minilm

import adaattn
import adaattn.rates as machine

T = TypeVar("T")
POLICIES = adaattn.POLICIES

#: All heads of two real models.
REAL: dict[str, Callable[[], Iterator[Heads]]] = {
    "MiniLM, 128 tokens": lambda: minilm(128),
    "MiniLM, 512 tokens": lambda: minilm(512),
    "bytelm, 512 bytes": lambda: bundled(512),
    "bytelm, 2048 bytes": lambda: bundled(2048),
    "bytelm, 4096 bytes": lambda: bundled(4096),
}
#: This machine's table of rates, or a built-in one: every rung runs everywhere, so all get chosen somewhere.
#: "calibrated": this machine's, measured on the spot.
RATES = ("machine", "calibrated", *machine._DEFAULTS)
# Okabe and Ito's colours, for as many kinds of marks.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
MARKERS = "xov^sD*P+"


def use_rates(name: str) -> Array:
    """Plan by this table from now on; returns it."""
    machine._table = None
    if name == "calibrated":
        machine._table = _calibrated()
    elif name != "machine":
        machine._table = machine._defaults(name)
    return machine.table()


@cache
def _calibrated() -> Array:
    found = adaattn.calibrate(save=False)
    rows = [
        [*found["gflops"][rung].values(), found["pack_ns"][rung], found["sparse"][rung]]
        for rung in machine.RUNGS
    ]
    return np.array(rows, np.float64)


def share(part: Any) -> float:
    """Of True; NaN of nothing."""
    part = np.asarray(list(part), bool)
    return float(part.mean()) if part.size else float("nan")


def geometric_mean(x: Any) -> float:
    return float(np.exp(np.mean(np.log(list(x)))))


def verdict(value: float, limit: float, *, most: bool = False) -> str:
    """Whether a figure is at least (at most) what is wanted."""
    if np.isnan(value):
        return "not measured"
    return "reached" if (value <= limit if most else value >= limit) else "MISSED"


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Options that cut a long run: --part measures a share of it, --join shows what --json kept of some."""
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="K/N", help="every N-th, from the K-th on"
    )
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="measure nothing; show these")


def _part(text: str) -> tuple[int, int]:
    first, step = map(int, text.split("/"))
    if not 1 <= first <= step:
        raise argparse.ArgumentTypeError(f"expected K/N with 1 <= K <= N, got {text}")
    return first, step


def part_of(members: Iterable[T], part: tuple[int, int]) -> Iterator[T]:
    first, step = part
    return islice(members, first - 1, None, step)


def read_json(path: Path, part: str) -> list[dict[str, Any]]:
    """One of the parts that `write_json` was given."""
    found: list[dict[str, Any]] = json.loads(path.read_text())[part]
    return found


def write_json(path: Path, **parts: Any) -> None:
    document = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "cpu": adaattn.cpu_info(),
        **parts,
    }
    path.write_text(json.dumps(document, indent=1, default=lambda x: x.tolist()) + "\n")


def draw(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, Sequence[Any]]:
    """An empty figure and its axes in a row, which `Figure.subplots` makes with these options."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    rcParams["svg.hashsalt"] = "adaattn"  # the same drawing gives the same file
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white", dpi=100)
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def save(figure: Any, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png")
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
