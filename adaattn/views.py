"""Reports and plans for people: text, HTML and figures. Nothing here is imported before it is asked for."""

from __future__ import annotations

import html as _html
import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _adaattn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .stats import Plan, Report


def margin_of(plan: Plan, at: tuple[int, ...]) -> float:
    """Between a predicted error and the tolerance (csrc/attend.c): 3 for one from statistics alone or that is
    not verified; from exact rows 1.25 and the reach of as many rows as may verify the head; a tenth more from
    a glance."""
    T = plan.sizes["T"]
    glanced = is_glanced(plan, at) and not plan.lse
    if T < 64 or not (plan.profiled_rows[at] or glanced):
        return 3.0
    rows = next((n for n, most in ((8, 1024), (12, 2048), (16, 4096), (24, 8192)) if most > T), 32)
    return float((1.1 if glanced else 1) * 1.25 * math.sqrt(1 + 3.8 * math.sqrt(1.2 / rows)))


def is_glanced(plan: Plan, at: tuple[int, ...]) -> bool:
    """Whether the head is a small one, of which few rows were looked at: these say nothing of int8."""
    if "int8" not in plan.candidates:
        return False
    c = plan.candidates.index("int8")
    int8 = np.isnan(plan.candidate_error[at][c]) and not np.isnan(plan.candidate_seconds[at][c])
    return bool(int8 and plan.finite[at] and not np.isnan(plan.candidate_error[at][0]))


def error_text(x: float) -> str:
    """Two digits and an exponent: 6.1e-3."""
    if not math.isfinite(x):
        return "" if math.isnan(x) else "inf"
    if x == 0:
        return "0"
    mantissa, _, exponent = f"{x:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def time_text(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-5 else ("µs", 1e6)
    value = f"{seconds * factor:.2g}"
    return f"{float(value):.0f} {unit}" if "e" in value else f"{value} {unit}"


# ---- table


def _cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header, and a row for each head."""

    def errors(array: Any) -> list[str]:
        return [error_text(float(x)) for x in array.flat]

    def numbers(array: Any) -> list[str]:
        return ["" if np.isnan(x) else f"{x:.3g}" for x in array.flat]

    r = report
    heads = list(np.ndindex(r.retried.shape))
    columns: dict[str, list[str]] = {
        "batch": [str(b) if r.retried.shape[0] > 1 else "" for b, _ in heads],
        "head": [str(h) for _, h in heads],
        "precision": [str(rung) for rung in r.rungs.flat],
        "structure": [str(x) for x in r.structure.flat] if (r.structure != "dense").any() else [],
        "rank": [str(x) if x else "" for x in r.rank.flat],
        "kept": numbers(r.kept_fraction) if (r.kept_fraction != 1).any() else [],
        "predicted": errors(r.predicted_error),
        "measured": errors(r.measured_error),
        "limit": errors(r.error_limit),
        "rows": [str(x) if x else "" for x in r.verified_rows.flat],
        "bound": errors(r.error_bound),
        "stored": [] if r.stored_error is None else errors(r.stored_error),
        "retried": ["yes" if x else "" for x in r.retried.flat],
        "entropy": numbers(r.entropy),
        "score std": numbers(r.score_std),
    }
    said = {name: cells for name, cells in columns.items() if any(cells)}
    return list(said), [list(row) for row in zip(*said.values(), strict=True)]


def _summary(report: Report) -> str:
    times = {phase: seconds for phase, seconds in report.seconds.items() if seconds > 0}
    parts = ", ".join(f"{phase} {time_text(seconds)}" for phase, seconds in times.items())
    total = f"{time_text(sum(times.values()))} ({parts})" if len(times) > 1 else parts
    promised = "" if report.plan is None else f"tolerance {error_text(report.plan.tolerance)}; "
    return f"{promised}{total}; {report.flops / 1e9:.3g} GFLOP"


def table(report: Report) -> str:
    header, rows = _cells(report)
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (header, *rows)]
        return "\n".join([*lines, _summary(report)])
    view = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for row in rows:
        view.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=1000, color_system=None, force_terminal=False, force_jupyter=False).print(view)
    return "\n".join([*(line.rstrip() for line in text.getvalue().splitlines()), _summary(report)])


def html(report: Report) -> str:
    header, rows = _cells(report)

    def line(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    caption = f"<caption>{_html.escape(_summary(report))}</caption>"
    return f"<table>{caption}\n<thead>{line('th', header)}</thead>\n<tbody>\n{body}\n</tbody></table>"


# ---- plot


def empty_figure(**options: Any) -> Figure:
    """A figure of matplotlib that notebooks show as it is, whether or not pyplot is there."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            png = io.BytesIO()
            self.savefig(png, format="png")
            return png.getvalue()

    return Shown(layout="constrained", **options)


#: Of Okabe and Ito, which the colour-blind tell apart too; brown is any other pair.
COLOURS = {
    "fp64": "black", "fp32": "#0072B2", "bf16x6": "#999999", "bf16x3": "#CC79A7", "int16": "#009E73",
    "fp16": "#F0E442", "bf16": "#E69F00", "int8/bf16": "#56B4E9", "int8": "#D55E00",
}  # fmt: skip


def plot(report: Report) -> Figure:
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("Report.plot needs matplotlib: pip install adaattn[plots]") from error

    B, H = report.retried.shape
    order = {rung: i for i, rung in enumerate(_adaattn.RUNGS)}

    def exactness(rung: str) -> tuple[int, int]:
        qk, _, pv = rung.partition("/")
        return order[qk] + order[pv or qk], order[qk]

    used = sorted(set(report.rungs.flat), key=exactness)
    colours = [COLOURS.get(rung, "tab:brown") for rung in used]
    grid = np.array([used.index(rung) for rung in report.rungs.flat]).reshape(B, H)

    figure = empty_figure(figsize=(max(8.0, min(16.0, 2.5 + 0.25 * B * H)), 4.2 + 0.25 * min(B, 16)))
    rungs, errors = figure.subplots(2, 1, height_ratios=[0.6 + 0.25 * min(B, 16), 3])
    limits = {"vmin": -0.5, "vmax": len(used) - 0.5}
    rungs.imshow(grid, cmap=ListedColormap(colours), aspect="auto", interpolation="nearest", **limits)
    rungs.set(xlabel="head", ylabel="batch")
    for axis, n in ((rungs.xaxis, H), (rungs.yaxis, B)):
        axis.set_ticks(range(0, n, -(-n // 16)))
    keys = [Patch(color=colour, label=rung) for colour, rung in zip(colours, used, strict=True)]
    rungs.legend(
        handles=keys, loc="lower left", bbox_to_anchor=(0, 1), ncols=max(len(keys), 1), frameon=False
    )

    at = np.arange(B * H)
    if report.plan is not None:
        errors.axhline(report.plan.tolerance, color="tab:red", label="promised")
    shown = {"predicted": ("o", "tab:blue"), "measured": ("x", "black")}
    for name, (marker, colour) in shown.items():
        y = getattr(report, f"{name}_error").ravel()
        seen = np.isfinite(y) & (y > 0)
        if seen.any():
            errors.plot(at[seen], y[seen], marker, color=colour, label=name, fillstyle="none")
    low, high = report.measured_error.ravel(), report.error_limit.ravel()
    seen = np.isfinite(high) & (low > 0)
    if seen.any():
        errors.vlines(at[seen], low[seen], high[seen], color="0.6", label="up to its limit")
    if errors.get_legend_handles_labels()[0]:
        errors.set_yscale("log")
        errors.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    else:
        errors.text(0.5, 0.5, "no tolerance, no errors known", ha="center", transform=errors.transAxes)
    errors.set(
        xlabel="head" if B == 1 else "batch * H + head", ylabel="relative error", xlim=(-0.5, B * H - 0.5)
    )
    errors.xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_blocks(report: Report) -> Figure:
    blocks, shape = report.kept_blocks, report.structure.shape
    sparse = [at for at in np.ndindex(shape) if report.structure[at] == "sparse"]
    pictures = {} if blocks is None else {at: blocks[at] for at in sparse}
    columns = min(8, max(len(pictures), 1))
    rows = -(-len(pictures) // columns) or 1
    try:
        figure = empty_figure(figsize=(1.5 * columns + 1.5, 1.7 * rows + 0.6))
    except ImportError as error:
        raise ImportError("Report.plot_blocks needs matplotlib: pip install adaattn[plots]") from error
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    if not pictures:
        axes[0, 0].text(0.5, 0.5, "no head is sparse", ha="center", transform=axes[0, 0].transAxes)
        return figure
    for axis, (at, picture) in zip(axes.flat, pictures.items(), strict=False):
        axis.set_axis_on()
        image = axis.imshow(picture, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{at[1] if shape[0] == 1 else at}: {report.kept_fraction[at]:.0%}")
    figure.colorbar(image, ax=axes, label="share of the blocks kept")
    figure.supxlabel("keys")
    figure.supylabel("queries")
    return figure


# ---- plans


def explain(plan: Plan) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in plan.sizes.items() if name != "dtype")
    lines = [
        f"{plan.sizes['dtype']}, {sizes}; tolerance {error_text(plan.tolerance)}; predicted times of one core"
    ]
    names = zip(("sparse", "low rank"), plan.ruled_out, strict=True)
    if ruled_out := [f"{name} by {what}" for name, what in names if what]:
        lines.append(f"ruled out: {', '.join(ruled_out)}")
    for at, rung in zip(np.ndindex(plan.retried.shape), plan.rungs.flat, strict=True):
        lines.append(f"head {at}: {_reason(plan, at, str(rung))}")
        lines.extend(f"    {line}" for line in _candidates(plan, at))
    return "\n".join(lines)


def _candidates(plan: Plan, at: tuple[int, ...]) -> Iterator[str]:
    for c, name in enumerate(plan.candidates):
        error, lse = plan.candidate_error[at][c], plan.candidate_lse_error[at][c]
        if not math.isnan(error):
            also = f", lse {error_text(lse)}" if plan.lse else ""
            yield f"{name:<9}  {time_text(plan.candidate_seconds[at][c]):>7}, error {error_text(error)}{also}"


def _allowed(plan: Plan, candidate: str) -> bool:
    index = {rung: i for i, rung in enumerate(_adaattn.RUNGS)}
    dearest = index.get(plan.max_precision, 0)
    cheapest = index.get(plan.min_precision, 0) or len(index)
    return all(dearest <= index.get(rung, -1) <= cheapest for rung in candidate.split("/"))


def _reason(plan: Plan, at: tuple[int, ...], name: str) -> str:
    """The chosen one, and what stood against the others."""
    c = plan.candidates.index(name) if name in plan.candidates else -1
    error = float(plan.predicted_error[at])
    known = [] if c < 0 else [time_text(float(plan.candidate_seconds[at][c]))]
    known += [] if math.isnan(error) else [f"error {error_text(error)}"]
    says = f"{name}: {', '.join(filter(None, known))}" if any(known) else name
    if plan.forced:
        return f"{says}; forced"
    if plan.retried[at]:
        return f"{says}; a cheaper one was tried and failed"
    if plan.structure[at] == "sparse":
        kept = f"{name}: sparse, {float(plan.kept_fraction[at]):.0%} of the blocks, error {error_text(error)}"
        return f"{kept}; dense: {known[0]}" if c >= 0 else kept
    if plan.structure[at] == "low_rank":
        return f"{name}: {int(plan.rank[at])} landmarks, error {error_text(error)}"
    if np.isnan(plan.candidate_error[at]).all():  # few queries, a cache, or a scale beyond fp32
        return f"{says}; nothing was looked at, since there is nothing to gain or to choose"
    if not plan.finite[at]:
        return f"{says}; NaN or infinities take part, which plain arithmetic passes on"
    if c < 0:
        return says
    margin = margin_of(plan, at)
    plain = "fp64" if plan.sizes["dtype"] == "float64" else "fp32"
    offered = ~np.isnan(plan.candidate_error[at])
    own = min(margin, 1.25) if name == plain and offered[2:].any() else margin  # is a choice
    limit, promised = plan.tolerance / margin, f"{error_text(plan.tolerance)} / {own:.2g}"
    lse_limit = max(limit, 1e-6)
    lse_of = plan.candidate_lse_error[at]
    if error > plan.tolerance / own:
        return f"{says} > {promised}; nothing that is allowed is more exact"
    says += f" <= {promised}"
    if plan.lse:
        if lse_of[c] > max(plan.tolerance / own, 1e-6):
            return f"{says}, but lse {error_text(lse_of[c])}; nothing that is allowed is more exact"
        says += f", lse {error_text(lse_of[c])}"
    others = []
    for i in np.argsort(plan.candidate_seconds[at], kind="stable")[::-1]:
        saves = plan.candidate_seconds[at][i] < 0.95 * plan.candidate_seconds[at][c]  # less would be scatter
        if not (saves and offered[i]):
            continue
        would = f"{plan.candidates[i]} would be {time_text(plan.candidate_seconds[at][i])}"
        if not _allowed(plan, plan.candidates[i]):
            others.append(f"{would} but is not allowed")
        elif not plan.candidate_error[at][i] <= limit:
            others.append(f"{would} but {error_text(plan.candidate_error[at][i])}")
        elif plan.lse and lse_of[i] > lse_limit:
            others.append(f"{would} but its lse is off by {error_text(lse_of[i])}")
    return "; ".join([says, *(others or ["nothing is faster"])])
