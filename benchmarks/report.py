"""What a comparison says: tables, the project's targets, JSON, CSV, figures. Colours are Okabe and Ito's."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from measure import READING, Comparison, Contestant

import adaattn
from adaattn.bench.timing import plural

LABELS = {"adaattn": "AdaAttn", "torch": "torch SDPA", "onnxruntime": "onnxruntime", "numpy": "NumPy"}
COLORS = {"adaattn": "#0072B2", "torch": "#D55E00", "onnxruntime": "#009E73", "numpy": "#CC79A7"}


PEER_SECTIONS = ("prefill", "decode", "small")  # those in which every peer takes part

# Rung, dtype of the arrays, times torch in that dtype, share of the units' peak. Set for AVX-512 with BF16.
RUNG_TARGETS = [
    ("bf16", "fp32", 2.6, 0.92),
    ("int8/bf16", "fp32", 3.2, 0.88),
    ("int8", "fp32", 4.3, 0.80),
    ("int16", "fp32", 2.3, 0.0),
    ("bf16", "bf16", 2.6, 0.0),
]


@dataclass(frozen=True)
class Target:
    name: str
    wanted: str
    measured: str
    reached: bool | None  # None: not measured


def targets(run: Comparison, thread_counts: Sequence[int]) -> list[Target]:
    """List what the project set itself at fp32 beside what this run measured; the worst shape counts."""
    found: list[Target] = []

    def check(name: str, form: str, bound: float, values: Iterable[float | None], fold: Any = min) -> None:
        known = [value for value in values if value is not None and not math.isnan(value)]
        value = fold(known) if known else math.nan
        reached = (value <= bound if fold is max else value >= bound) if known else None
        wanted = ("<= " if fold is max else ">= ") + form.format(bound)
        found.append(Target(name, wanted, form.format(value) if known else "not measured", reached))

    def speedups(results: Iterable[Contestant]) -> list[float]:
        return [one.speedup[1] for one in results if one.speedup]

    for n in thread_counts:
        on, prefill, decode = plural(n), run.pick("prefill", n), run.pick("decode", n)
        ratios = speedups(prefill)
        check(f"prefill, {on}: torch/AdaAttn, mean", "{:.3f}", 1.3, ratios, statistics.geometric_mean)
        check(f"prefill, {on}: torch/AdaAttn, least", "{:.3f}", 1.0, ratios)
        long = [one for one in prefill if one.shape.keys >= 2048]
        if n == 1:
            full = [one.share for one in long if not one.shape.causal]
            check(f"S >= 2048, full, {on}: of FMA peak", "{:.1%}", 0.92, full)
            long = [one for one in long if one.shape.causal]
        case = "S >= 2048, causal" if n == 1 else "S >= 2048"
        check(f"{case}, {on}: of FMA peak", "{:.1%}", 0.85, [one.share for one in long])
        check(f"prefill, {on}: error/torch's", "{:.3f}", 1.5, [one.error_ratio for one in prefill], max)
        check(f"decode, {on}: of read bandwidth", "{:.1%}", 0.93, [one.share for one in decode])
        check(f"decode, {on}: torch/AdaAttn, least", "{:.3f}", 2.4, speedups(decode))
        check(f"small, {on}: torch/AdaAttn, least", "{:.3f}", 1.0, speedups(run.pick("small", n)))
        for name, dtype, bound, share in RUNG_TARGETS:
            rungs = run.pick("rungs", n, name, dtype)
            mean = statistics.geometric_mean
            check(
                f"{name} of {dtype} arrays, {on}: torch/AdaAttn, mean", "{:.2f}", bound, speedups(rungs), mean
            )
            full = [one.share for one in rungs if one.shape.keys >= 2048 and not one.shape.causal]
            if share and n == 1:
                check(
                    f"{name} of {dtype} arrays, S >= 2048, full, {on}: of its units' peak",
                    "{:.1%}",
                    share,
                    full,
                )
    extras = run.extras
    beyond_numpy = extras.get("import_seconds", math.nan) - extras.get("numpy_import_seconds", math.nan)
    check("two threads over one, S = 4096", "{:.3f}", 1.9, [extras.get("two_threads_speedup")])
    check("memory per thread, MB", "{:.2f}", 2.0, [extras.get("memory_per_thread", math.nan) / 1e6], max)
    check("import beyond NumPy's, ms", "{:.1f}", 20.0, [1e3 * beyond_numpy], max)
    return found


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, by rich where it is installed."""
    print()
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (header, *rows)]
        print(title, *lines, sep="\n")
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def show_section(run: Comparison, section: str, threads: int) -> None:
    reading = section in READING

    def cells(one: Contestant) -> list[str]:
        speedup = "{1:.2f} ({0:.2f}-{2:.2f})".format(*one.speedup) if one.speedup else ""
        return [
            str(one.shape),
            f"{one.name} {one.dtype}",
            f"{one.seconds * 1e3:.3f} ms" if one.seconds > 1e-4 else f"{one.seconds * 1e6:.2f} us",
            speedup if one.name != "torch" else "",
            *([f"{over:.2f}" if (over := one.speedup_over_bf16) else ""] if section == "cache" else []),
            f"{one.gflops / one.intensity if reading else one.gflops:.1f}",
            f"{one.share:.1%}" if one.share else "",
            f"{one.error:.1e}" if one.error else "",
            f"{one.error_ratio:.2f}" if one.error_ratio else "",
        ]

    rows = [cells(one) for one in run.results if (one.section, one.threads) == (section, threads)]
    rate = "GB/s" if reading else "GFLOP/s"
    ratios = ["torch fp32/this", "torch bf16/this"] if section == "cache" else ["torch/this"]
    header = ["B,H,S,D", "", "time", *ratios, rate, "of ceiling", "error", "error/torch"]
    show_table(f"{section}, {plural(threads)}", header, rows)
    means = [
        f"{name} {dtype} {mean:.2f}"
        for name, dtype in dict.fromkeys(
            (one.name, one.dtype) for one in run.results if one.section == section
        )
        if name != "torch" and (mean := mean_speedup(run, section, threads, name, dtype))
    ]
    if means:
        print(f"geometric mean of torch/this, {plural(threads)}: {', '.join(means)}")


def mean_speedup(run: Comparison, section: str, threads: int, name: str, dtype: str) -> float | None:
    """Geometric mean over the shapes of torch's time in the same dtype over this one's."""
    speedups = [one.speedup[1] for one in run.pick(section, threads, name, dtype) if one.speedup]
    return statistics.geometric_mean(speedups) if speedups else None


def show_targets(found: Sequence[Target]) -> None:
    verdicts = {True: "reached", False: "NOT REACHED", None: ""}
    rows = [[target.name, target.wanted, target.measured, verdicts[target.reached]] for target in found]
    show_table("targets", ["", "wanted", "measured", ""], rows)


def write_json(path: Path, run: Comparison, found: Sequence[Target]) -> None:
    versions = {}
    for name in ("adaattn", "numpy", "torch", "onnxruntime"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    document = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "load_average": os.getloadavg(),
        "versions": {"python": platform.python_version(), **versions},
        "cpu": adaattn.cpu_info(),
        "budget": asdict(run.budget),
        "left_out": run.left_out,
        "targets": [asdict(target) for target in found],
        "extras": run.extras,
        "measurements": [one.row() | {"samples": one.samples} for one in run.results],
    }
    path.write_text(json.dumps(document, indent=1, default=str) + "\n")


def write_csv(path: Path, run: Comparison) -> None:
    rows = [one.row() for one in run.results]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(folder: Path, run: Comparison, thread_counts: Sequence[int]) -> None:
    """Draw the speed-ups as bars, and the roofline, each as PNG and SVG."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {}
    if any(one.speedup for one in run.results if one.section in PEER_SECTIONS):
        drawings["speedups"] = draw_speedups
    if any(one.section in ("prefill", "decode") for one in run.results):
        drawings["roofline"] = draw_roofline
    for name, draw in drawings.items():
        figure = Figure(layout="constrained", facecolor="white", dpi=100)
        draw(figure, run, thread_counts)
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{name}.{suffix}")


def draw_speedups(figure: Any, run: Comparison, thread_counts: Sequence[int]) -> None:
    compared = [one for one in run.results if one.section in PEER_SECTIONS]
    cases = list(dict.fromkeys((one.section, one.shape) for one in compared))
    sections = dict.fromkeys(section for section, _ in cases)
    names = [name for name in LABELS if name != "torch" and any(one.name == name for one in run.results)]
    figure.set_size_inches(8, 1.6 + 0.45 * len(cases))
    axes = figure.subplots(1, len(thread_counts), sharey=True, squeeze=False)[0]
    for axis, threads in zip(axes, thread_counts, strict=True):
        for i, name in enumerate(names):
            at = [row + (i - (len(names) - 1) / 2) * 0.8 / len(names) for row in range(len(cases))]
            speedups = [one.speedup[1] for s in sections for one in run.pick(s, threads, name) if one.speedup]
            widths = [speedup - 1 for speedup in speedups]
            bars = axis.barh(at, widths, 0.8 / len(names), 1, color=COLORS[name], label=LABELS[name])
            if name == "adaattn":
                axis.bar_label(bars, [f"{speedup:.2f}" for speedup in speedups], fontsize=9, padding=2)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.margins(x=0.15)
        axis.set_xlabel(f"torch's time / this time, {plural(threads)}")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_yticks(range(len(cases)), [f"{section} {shape}" for section, shape in cases])
    axes[0].invert_yaxis()
    figure.suptitle("Speed over torch SDPA, fp32 (B,H,S,D; T:S where they differ)", fontsize=12)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def draw_roofline(figure: Any, run: Comparison, thread_counts: Sequence[int]) -> None:
    figure.set_size_inches(8, 0.6 + 3.8 * len(thread_counts))
    axes = figure.subplots(len(thread_counts), 1, sharex=True, squeeze=False)[:, 0]
    for axis, threads in zip(axes, thread_counts, strict=True):
        ceiling = ceilings(run, threads)
        if ceiling:
            peak, bandwidth = ceiling
            x = [0.25, peak / bandwidth, 2048]
            label = f"measured: {peak:.0f} GFLOP/s, {bandwidth:.0f} GB/s"
            axis.plot(x, [min(peak, bandwidth * i) for i in x], color="black", label=label)
        for peer, marker in (("adaattn", "o"), ("torch", "x")):
            points = [one for section in ("prefill", "decode") for one in run.pick(section, threads, peer)]
            x, y = [one.intensity for one in points], [one.gflops for one in points]
            axis.scatter(x, y, marker=marker, color=COLORS[peer], label=f"{LABELS[peer]}, fp32", zorder=3)
        axis.set(xscale="log", yscale="log", title=plural(threads), ylabel="GFLOP/s")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", frameon=False)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[-1].set_xlabel("operations per byte of query, key, value and output")


def ceilings(run: Comparison, threads: int) -> tuple[float, float] | None:
    """Peak GFLOP/s of FMA, and GB/s at which the longest keys and values are read."""
    ours = [one for one in run.results if one.threads == threads]
    peaks = [one.gflops for one in ours if one.name == "FMA peak"]
    reads = [one for one in ours if one.section == "decode" and one.name.startswith("read")]
    if not peaks or not reads:
        return None
    longest = max(one.shape.keys for one in reads)
    rates = [one.gflops / one.intensity for one in reads if one.shape.keys == longest]
    return statistics.median(peaks), max(rates)
