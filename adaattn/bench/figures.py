"""The suite's figures, light and dark, as SVG and PNG, for a width of about 830 pixels; needs matplotlib.

Colours are Okabe and Ito's, which people with any kind of colour vision tell apart, lightened on dark ground;
every colour goes with a marker of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..rates import RUNGS
from .contenders import CONFIGURATIONS, LABELS
from .results import Point, Row, Run, Spectrum, way_text

WIDTH = 8.3  # inches, 100 pixels each; PNGs have twice as many, for dense screens
_MARKERS = {
    "dense": "o", "structure": "s", "precision": "^", "both": "D", "torch": "x", "onnxruntime": "+",
    "numpy": "*",
}  # fmt: skip


@dataclass(frozen=True)
class Theme:
    name: str
    ground: str
    text: str
    grid: str
    accent: str
    colors: Mapping[str, str]


THEMES = (
    Theme(
        "light", "#ffffff", "#1f2328", "#d8dee4", "#000000",
        {"dense": "#0072B2", "structure": "#C98A00", "precision": "#009E73", "both": "#D55E00",
         "torch": "#57606a", "onnxruntime": "#B8558C", "numpy": "#8c959f"},
    ),
    Theme(
        "dark", "#0d1117", "#e6edf3", "#2a313a", "#ffffff",
        {"dense": "#56B4E9", "structure": "#F0C040", "precision": "#2FD0A0", "both": "#FF8A4C",
         "torch": "#b1bac4", "onnxruntime": "#E6A0C8", "numpy": "#7d8590"},
    ),
)  # fmt: skip


def check() -> None:
    """Raises ImportError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "matplotlib: expected this package to draw, got none; run `pip install adaattn[plots]`"
        ) from None


def save(run: Run, folder: Path) -> list[Path]:
    """Every figure that the run has data for, in both themes, as NAME-THEME.svg and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, theme, figure in drawn(run):
        for suffix in ("svg", "png"):
            path = folder / f"{name}-{theme.name}.{suffix}"
            _write(figure, theme, path, suffix)
            written.append(path)
    return written


def drawn(run: Run) -> Iterator[tuple[str, Theme, Any]]:
    """Name, theme and figure, one after the other."""
    for name, (_, has_data, draw) in FIGURES.items():
        if has_data(run):
            for theme in THEMES:
                with _style(theme):
                    figure = draw(run, theme)
                yield name, theme, figure


def write_svg(figure: Any, theme: Theme, file: Any) -> None:
    _write(figure, theme, file, "svg")


def _write(figure: Any, theme: Theme, file: Any, suffix: str) -> None:
    with _style(theme):
        options: dict[str, Any] = {"metadata": {"Date": None}} if suffix == "svg" else {"dpi": 200}
        figure.savefig(file, format=suffix, facecolor=theme.ground, **options)


@contextmanager
def _style(theme: Theme) -> Iterator[None]:
    from matplotlib import rc_context

    names = (
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
    )
    style: dict[str, Any] = {name: theme.text for name in names} | {
        "axes.facecolor": theme.ground,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "figure.facecolor": theme.ground,
        "figure.titlesize": 12,
        "font.size": 10.5,
        "grid.color": theme.grid,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5.5,
        "svg.hashsalt": "adaattn",  # the same drawing gives the same file
    }
    with rc_context(style):  # type: ignore[arg-type]  # its names are literals
        yield


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained", dpi=100)


def _names(rows: Sequence[Row]) -> list[str]:
    """Contenders of these rows in their usual order."""
    return [name for name in LABELS if any(row.name == name for row in rows)]


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))))


def _kinds(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.heads for row in rows))


# ---- bars: the four configurations on the three shapes


def _draw_configurations(run: Run, theme: Theme) -> Any:
    rows = [row for row in run.pick("shapes") if row.over_torch is not None and row.name != "torch"]
    kinds, names = _kinds(rows), _names(rows)
    cases = list(dict.fromkeys((row.heads, row.case) for row in rows))
    figure = _figure(1.7 + 0.13 * len(cases) * (len(names) + 1))
    axes = figure.subplots()
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        at = {(row.heads, row.case): row.over_torch for row in rows if row.name == name}
        shown = [(y, float(at[case] or 1)) for y, case in enumerate(cases) if case in at]
        places = [y + (i - (len(names) - 1) / 2) * width for y, _ in shown]
        values = [x for _, x in shown]
        bars = axes.barh(
            places, [x - 1 for x in values], width * 0.92, 1, color=theme.colors[name], label=LABELS[name]
        )
        axes.bar_label(bars, [f"{x:.2f}" for x in values], fontsize=8.5, padding=3)
    axes.axvline(1, color=theme.text, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.margins(x=0.12, y=0.02)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(False, axis="y")
    axes.set_yticks(
        range(len(cases)), [case if len(kinds) == 1 else f"{kind}\n{case}" for kind, case in cases]
    )
    axes.invert_yaxis()
    axes.set_xlabel("torch's time / this time")
    figure.suptitle(
        f"Speed over torch, fp32 arrays of shape (B,H,S,D), tolerance {run.tolerance:g}"
        + (f": {kinds[0]} heads" if len(kinds) == 1 else "")
    )
    _legend(figure, axes)
    return figure


# ---- time against length


def _draw_sweep(run: Run, theme: Theme) -> Any:
    rows = run.pick("sweep")
    kinds = _kinds(rows)
    reference = "torch" if any(row.name == "torch" for row in rows) else "dense"
    figure = _figure(6.4)
    grid = figure.subplots(2, len(kinds), sharex=True, sharey="row", squeeze=False, height_ratios=[1.15, 1])
    for column, kind in enumerate(kinds):
        above, below = grid[:, column]
        for name in _names(rows):
            line = sorted((r.shape[3], r) for r in rows if r.heads == kind and r.name == name)
            style: dict[str, Any] = {
                "color": theme.colors[name],
                "marker": _MARKERS[name],
                "label": LABELS[name],
            }
            if name not in CONFIGURATIONS:
                style |= {"linewidth": 1, "linestyle": "--"}
            above.plot([S for S, _ in line], [1e3 * row.seconds for _, row in line], **style)
            ratios = [row.over_torch if reference == "torch" else row.over_dense for _, row in line]
            if name != reference:
                below.plot([S for S, _ in line], ratios, **style)
        below.axhline(1, color=theme.text, linewidth=1)
        above.set(
            xscale="log", yscale="log", title=f"{kind} heads" + (", causal" if kind == "sparse" else "")
        )
        below.set_xlabel("tokens")
        below.set_xscale("log", base=2)
        below.set_yscale("log", base=2)
        lengths = sorted({row.shape[3] for row in rows})
        below.set_xticks(lengths[:: 1 if len(kinds) == 1 else 2], minor=False)
        below.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
        below.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_major_formatter("{x:g}")
        below.minorticks_off()
    grid[0, 0].set_ylabel("ms")
    grid[1, 0].set_ylabel(f"times as fast as {LABELS[reference]}")
    B, H, _, _, D = rows[0].shape
    figure.suptitle(f"Time against length: (B, H, D) = ({B}, {H}, {D}), tolerance {run.tolerance:g}")
    _legend(figure, grid[0, 0])
    return figure


# ---- error against time


def _draw_front(run: Run, theme: Theme) -> Any:
    figure = _figure(5.2)
    axes = figure.subplots()
    points = [point for point in run.front if point.error > 0]
    dense = [point for point in points if not point.planned and point.tolerance is None]
    others = _distinct([p for p in points if not p.planned and p.tolerance is not None])
    planned = [point for point in points if point.planned]
    front = _pareto([*dense, *others])
    axes.step(
        [p.error for p in front], [1e3 * p.seconds for p in front], where="post", color=theme.grid,
        linewidth=6, solid_capstyle="round", zorder=1, label="Pareto front",
    )  # fmt: skip
    for marker, color, label, own in (
        ("o", "dense", "a rung by name", dense),
        ("s", "structure", "a rung with structure", others),
    ):
        if own:
            x, y = [p.error for p in own], [1e3 * p.seconds for p in own]
            axes.plot(x, y, marker, color=theme.colors[color], label=label, zorder=3)
    axes.plot(
        [p.error for p in planned], [1e3 * p.seconds for p in planned], "o", color=theme.colors["both"],
        markersize=13, markeredgewidth=1.8, fillstyle="none", linestyle="none", zorder=2,
        label="the planner's choices",
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="relative error against float64", ylabel="ms")
    axes.margins(x=0.1, y=0.16)
    _plain_ticks(axes.yaxis)
    _name_points(axes, [*dense, *others], planned, theme)
    figure.suptitle(
        f"Error against time of every rung: one head of {run.front[0].heads}\n"
        "(choices with planning and verifying)"
    )
    _legend(figure, axes)
    return figure


def _name_points(axes: Any, points: Sequence[Point], circled: Sequence[Point], theme: Theme) -> None:
    """A name at each point where it is in nobody's way; one text for those that lie on each other."""
    groups: list[tuple[Point, list[str]]] = []
    for point in points:
        name = way_text(point.name, point.structure)
        for other, names in groups:
            near = abs(math.log(point.error / other.error)) < 0.25
            if near and abs(math.log(point.seconds / other.seconds)) < 0.06:
                names += [name] if name not in names else []
                break
        else:
            groups.append((point, [name]))
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()

    def place(point: Point) -> tuple[float, float]:
        """In points of the page, as far as the layout is known by now."""
        x = math.log(point.error / left) / math.log(right / left)
        y = math.log(1e3 * point.seconds / low) / math.log(high / low)
        return 530 * x, 290 * y

    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in map(place, points)]
    taken += [(x - 8, y - 8, x + 8, y + 8) for x, y in map(place, circled)]
    for point, names in groups:
        text = ", ".join(names)
        x, y = place(point)
        for dx, dy, align in _PLACES:
            start = x + dx - {"center": 0.5, "left": 0.0, "right": 1.0}[align] * 4.9 * len(text)
            box = start, y + dy - 1, start + 4.9 * len(text), y + dy + 8
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        axes.annotate(
            text, (point.error, 1e3 * point.seconds), (dx, dy), ha=align, textcoords="offset points",
            fontsize=8.5, color=theme.text,
        )  # fmt: skip


_Box = tuple[float, float, float, float]  # left, low, right, high
_PLACES = (
    (0, 8, "center"), (0, -15, "center"), (9, -3, "left"), (-9, -3, "right"), (7, 8, "left"),
    (-7, 8, "right"), (7, -14, "left"), (-7, -14, "right"), (12, -3, "left"), (-12, -3, "right"),
    (11, 10, "left"), (-11, 10, "right"), (0, 20, "center"), (0, -27, "center"), (-9, -27, "right"),
    (11, -20, "left"), (-11, -20, "right"),
)  # fmt: skip


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _plain_ticks(axis: Any) -> None:
    """Numbers as they are: more in each decade, the fewer decades there are."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1, 1.5, 2, 3, 5, 7) if decades < 1.3 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _distinct(points: Sequence[Point]) -> list[Point]:
    """One of those that are the same to the eye."""
    found: dict[tuple[str, str, str], Point] = {}
    for point in points:
        found.setdefault((point.name, point.structure, f"{point.error:.1e}"), point)
    return list(found.values())


def _pareto(points: Sequence[Point]) -> list[Point]:
    """Those that none is both faster and more exact than, from exact to fast."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.error, p.seconds)):
        if not front or point.seconds < front[-1].seconds:
            front.append(point)
    return front


# ---- choices of layers and heads


def _draw_choices(run: Run, theme: Theme) -> Any:
    rows = [row for row in run.pick("real", "both") if row.choices]
    sets: dict[str, list[Row]] = {}
    for row in rows:
        sets.setdefault(row.heads.rpartition(", layer ")[0] or row.heads, []).append(row)
    rungs = [rung for rung in RUNGS if any(rung == head.rung for row in rows for head in row.choices)]
    heights = [0.42 * len(layers) + 0.75 for layers in sets.values()]
    figure = _figure(1.3 + sum(heights))
    panels = figure.subplots(len(sets), 1, squeeze=False, height_ratios=heights)[:, 0]
    import matplotlib
    from matplotlib.patches import Patch

    scale = matplotlib.colormaps["cividis"]
    colors = {rung: scale(0.05 + 0.9 * i / max(1, len(rungs) - 1)) for i, rung in enumerate(rungs)}
    structures = False
    for axes, (name, layers) in zip(panels, sets.items(), strict=True):
        for y, row in enumerate(layers):
            for x, head in enumerate(row.choices):
                color = colors[head.rung]
                ink = "black" if np.dot(color[:3], (0.3, 0.59, 0.11)) > 0.5 else "white"
                axes.add_patch(
                    matplotlib.patches.Rectangle(
                        (x - 0.47, y - 0.44), 0.94, 0.88, facecolor=color, edgecolor=theme.grid, linewidth=0.5
                    )
                )
                text = head.rung
                if head.structure != "dense":
                    structures = True
                    text += f"\nrank {head.rank}" if head.rank else f"\n{head.structure} {head.kept:.0%}"
                axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=7.5, linespacing=1.15)
        H = max(len(row.choices) for row in layers)
        axes.set(xlim=(-0.5, H - 0.5), ylim=(len(layers) - 0.5, -0.5), ylabel="layer", title=name)
        axes.set_xticks(range(H))
        labels = [row.heads.rpartition(", layer ")[2] if len(layers) > 1 else "" for row in layers]
        axes.set_yticks(range(len(layers)), labels)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    panels[-1].set_xlabel("head")
    shown = "; per cent: blocks of keys that are kept" if structures else ""
    figure.suptitle(f"What the planner chose, tolerance {run.tolerance:g}{shown}")
    patches = [Patch(color=colors[rung], label=rung) for rung in rungs]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(8, len(patches)))
    return figure


# ---- roofline


def _draw_roofline(run: Run, theme: Theme) -> Any:
    figure = _figure(5.2)
    axes = figure.subplots()
    rows = [row for section in ("shapes", "sweep") for row in run.pick(section)]
    names = [name for name in _names(rows) if name not in ("numpy", "onnxruntime")]
    bandwidth = run.ceilings["read"]
    found = [(row, _intensity(row)) for row in rows if row.name in names]
    right = 2 * max(x for _, x in found)
    units = {"FMA peak": "fp32", "BF16 peak": "bf16", "VNNI peak": "int8"}
    for unit, label in units.items():
        if unit in run.ceilings:
            peak = run.ceilings[unit]
            left = peak / bandwidth
            axes.plot([left, right], [peak, peak], color=theme.text, linewidth=1.2)
            axes.annotate(
                f"{label}: {peak:.0f}",
                (left, peak),
                (12, 3),
                textcoords="offset points",
                fontsize=9,
            )
    top = max(run.ceilings.get(unit, 0) for unit in units)
    start = min(row.tflops * 1e3 for row, _ in found) / 2
    axes.plot([start / bandwidth, top / bandwidth], [start, top], color=theme.text, linewidth=1.2)
    axes.annotate(
        f"memory: {bandwidth:.0f} GB/s", (start / bandwidth, start), (12, 0), textcoords="offset points",
        fontsize=9,
    )  # fmt: skip
    for name in names:
        own = [(x, 1e3 * row.tflops) for row, x in found if row.name == name]
        axes.plot(
            [x for x, _ in own], [y for _, y in own], _MARKERS[name], color=theme.colors[name],
            label=LABELS[name], linestyle="none", markersize=5,
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte of query, key, value and output",
        ylabel="GFLOP/s of dense attention",
    )  # fmt: skip
    axes.xaxis.set_major_formatter("{x:g}")
    _plain_ticks(axes.yaxis)
    figure.suptitle("Roofline: peaks of the units and of memory, measured in this run")
    _legend(figure, axes)
    return figure


def _intensity(row: Row) -> float:
    B, H, T, S, D = row.shape
    return 1e12 * row.tflops * row.seconds / (8 * B * H * (T + S) * D)


# ---- entropy, rank, time


def _draw_spectra(run: Run, theme: Theme) -> Any:
    figure = _figure(5.4)
    axes = figure.subplots()
    groups: dict[str, list[Spectrum]] = {}
    for one in run.spectra:
        groups.setdefault(one.heads.split(",")[0].split(" ")[0], []).append(one)
    most = max(0.1, *(abs(math.log2(one.dense_seconds / one.seconds)) for one in run.spectra))
    shown = None
    for marker, (name, ones) in zip("osD^vP*X" * 9, groups.items(), strict=False):
        shown = axes.scatter(
            [one.entropy / math.log(one.keys) for one in ones],
            [one.rank / one.rows for one in ones],
            c=[math.log2(one.dense_seconds / one.seconds) for one in ones],
            marker=marker, s=46, cmap="PuOr_r", vmin=-most, vmax=most, edgecolors=theme.text, linewidths=0.6,
            label=name, zorder=3,
        )  # fmt: skip
    axes.set(
        xlabel="entropy of a row's weights / ln(number of keys)",
        ylabel="effective rank / number of rows",
        xlim=(-0.02, 1.02),
    )
    bar = figure.colorbar(shown, ax=axes, pad=0.02)
    ticks = [x for x in (0.25, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12, 16) if abs(math.log2(x)) <= most]
    bar.set_ticks([math.log2(x) for x in ticks], labels=[f"{x:g}" for x in ticks])
    bar.set_label("times as fast as dense, exact")
    bar.outline.set_visible(False)
    figure.suptitle(f"Single heads: entropy against rank against time, tolerance {run.tolerance:g}")
    _legend(figure, axes)
    for handle in figure.legends[0].legend_handles:
        handle.set_array(None)
        handle.set_facecolor(theme.grid)
        handle.set_edgecolor(theme.text)
    return figure


#: Name of a figure to what it shows, whether a run has it, and how it is drawn.
FIGURES: dict[str, tuple[str, Callable[[Run], bool], Callable[[Run, Theme], Any]]] = {
    "configurations": (
        "The four configurations, onnxruntime and NumPy: how many times as fast as torch.",
        lambda run: any(row.over_torch for row in run.pick("shapes")),
        _draw_configurations,
    ),
    "sweep": (
        "Time against the number of tokens, and the ratio of times in the same rounds.",
        lambda run: bool(run.pick("sweep")),
        _draw_sweep,
    ),
    "front": (
        "Every rung and structure on one head, and what the planner chose for eight tolerances.",
        lambda run: bool(run.front),
        _draw_front,
    ),
    "choices": (
        "What each head of real models was computed with.",
        lambda run: any(row.choices for row in run.pick("real", "both")),
        _draw_choices,
    ),
    "roofline": (
        "Rates beside the machine's ceilings. Operations are those of dense attention, so a cheaper "
        "computation may lie above a peak.",
        lambda run: bool("FMA peak" in run.ceilings and (run.pick("shapes") or run.pick("sweep"))),
        _draw_roofline,
    ),
    "spectra": (
        "How diffuse a head's rows are, how many of them are different, and what the choice gained.",
        lambda run: bool(run.spectra),
        _draw_spectra,
    ),
}
