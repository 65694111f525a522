"""The figure of `adaattn demo --plot`; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ArgumentError
from .rates import RUNGS


def check(path: str) -> None:
    """Refuse, before any work, what `draw` could not write.

    Raises
    ------
    ImportError
        Without matplotlib.
    ArgumentError
        The name's ending is no format that matplotlib writes.
    FileNotFoundError
        There is no such folder.
    """
    formats = _figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in formats:
        raise ArgumentError(f"--plot: expected a name that ends in one of {', '.join(formats)}, got {path!r}")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"--plot: expected a folder that exists, got {str(Path(path).parent)!r}")


def draw(result: Mapping[str, Any], path: str) -> None:
    """Time, errors and every head's rung of each policy, from `demo.run`'s result, into a file."""
    figure, policies = _figure(), result["policies"]
    figure.suptitle(
        f"Attention of the bundled model, exact and within budgets, {result['compared_bytes']:,} bytes"
    )
    above, below = figure.subfigures(2, 1)
    times, errors = above.subplots(1, 2)
    _draw_times(times, policies)
    _draw_errors(errors, policies)
    budgets = [policy for policy in policies if policy["tolerance"] is not None]
    for axes, policy in zip(below.subplots(1, len(budgets)), budgets, strict=True):
        _draw_rungs(axes, policy)
    figure.savefig(path)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "matplotlib: expected this package to draw, got none; run `pip install adaattn[plots]`"
        ) from None
    return Figure(figsize=(9, 6.5), layout="constrained")


def _draw_times(axes: Any, policies: list[dict[str, Any]]) -> None:
    names = [policy["policy"] for policy in policies]
    bars = axes.bar(names, [1e3 * policy["seconds"] for policy in policies], color="tab:blue")
    axes.bar_label(bars, [f"{policy['speedup']:.2f}" for policy in policies])
    axes.set(title="Time in attention, and speed over exact", ylabel="ms, with planning and verifying")
    axes.margins(y=0.12)


def _draw_errors(axes: Any, policies: list[dict[str, Any]]) -> None:
    for at, policy in enumerate(policies):
        if policy["tolerance"] is not None:
            axes.plot(at, policy["tolerance"], "_", color="tab:red", markersize=28, markeredgewidth=2)
        axes.plot(at, policy["worst_head_error"], "o", color="tab:blue")
    axes.plot([], [], "_", color="tab:red", label="promised")
    axes.plot([], [], "o", color="tab:blue", label="measured")
    axes.set_xticks(range(len(policies)), [policy["policy"] for policy in policies])
    axes.set(yscale="log", title="Largest relative error of a head", xlim=(-0.5, len(policies) - 0.5))
    axes.legend()


def _draw_rungs(axes: Any, policy: Mapping[str, Any]) -> None:
    names = policy["rungs"]
    places = [[RUNGS.index(rung) for rung in layer] for layer in names]
    axes.imshow(places, cmap="YlGnBu", vmin=-1, vmax=len(RUNGS), aspect="auto")
    for layer, row in enumerate(names):
        for head, rung in enumerate(row):
            dark = 2 * places[layer][head] > len(RUNGS)
            axes.text(
                head, layer, rung, ha="center", va="center", color="white" if dark else "black", fontsize=7
            )
    axes.set_xticks(range(len(names[0])))
    axes.set_yticks(range(len(names)))
    axes.set(title=f"{policy['policy']}: rungs", xlabel="head", ylabel="layer")
