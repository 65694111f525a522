"""The command `adaattn`, also `python -m adaattn`: results on stdout, progress and errors on stderr.

Exit codes: 0 success, 1 an error or a failed check, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .errors import Error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code."""
    parser = argparse.ArgumentParser(prog="adaattn", description="Attention with an error budget.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (_, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    commands.choices["demo"].add_argument(
        "--plot", metavar="FILE", help="draw the result as well; needs matplotlib"
    )
    arguments = parser.parse_args(argv)
    try:
        return _COMMANDS[arguments.command][0](arguments)
    except (Error, ImportError, OSError) as error:
        print(f"adaattn {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _info(arguments: argparse.Namespace) -> int:
    from . import cpu_info

    info = cpu_info()
    print(json.dumps(info, indent=2) if arguments.json else "\n".join(_outline(info)))
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from .rates import HEAD_SIZES, cache_file, calibrate

    with _progress() as progress:
        progress("Measuring every rung")
        result = calibrate()
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    _print_table(
        ("rung", *(f"GFLOP/s, D = {d}" for d in HEAD_SIZES), "packing, ns", "offered"),
        [
            (
                rung,
                *(f"{by_size[d]:.0f}" for d in HEAD_SIZES),
                f"{result['pack_ns'][rung]:.2f}",
                "yes" if rung in result["offered"] else "no",
            )
            for rung, by_size in result["gflops"].items()
        ],
    )
    print(
        "\nOne core, float32 arrays. Rates are those of packed operands, packing is per element.\n"
        f"Offered are the rungs that are faster than every more exact one. Kept in {cache_file()}."
    )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from . import demo

    if arguments.plot is not None:
        from . import figures

        figures.check(arguments.plot)
    with _progress() as progress:
        result = demo.run(progress)
    if arguments.plot is not None:
        figures.draw(result, arguments.plot)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        _print_demo(result)
    for failure in result["failures"]:
        print(f"adaattn demo: {failure}", file=sys.stderr)
    return 0 if result["passed"] else 1


_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "info": (_info, "Show CPU features, the kernel chosen for each slot, threads and build options."),
    "calibrate": (_calibrate, "Measure how fast each rung of the precision ladder is here, and keep it."),
    "demo": (
        _demo,
        "Run the bundled language model, time its attention, exact and within error budgets, and check it.",
    ),
}


def _print_demo(result: Mapping[str, Any]) -> None:
    print(
        f"Read {result['bytes']:,} bytes in {result['read_seconds']:.2f} s at {result['bits_per_byte']:.6f} "
        f"bits per byte (expected {result['expected_bits_per_byte']:.6f}).\n"
    )
    print(
        f"Attention of each layer on the first {result['compared_bytes']:,} bytes, ours and NumPy (one\n"
        f"head, times their number); relative error of ours against float64 on {result['checked_rows']} rows:"
    )
    _print_table(
        ("layer", "ours, ms", "NumPy, ms", "ratio", "error", "worst head"),
        [
            (
                str(layer["layer"]),
                f"{1e3 * layer['seconds']:.1f}",
                f"{1e3 * layer['numpy_seconds']:.1f}",
                f"{layer['speedup']:.1f}",
                f"{layer['error']:.1e}",
                f"{layer['worst_head_error']:.1e}",
            )
            for layer in result["layers"]
        ],
    )
    _print_policies(result)
    last = result["prompt"].splitlines()[-1].strip()
    print(f"\nWrote {result['new_bytes']} bytes after '{last}' in {result['write_seconds']:.2f} s:\n")
    print(result["prompt"] + result["continuation"])


def _print_policies(result: Mapping[str, Any]) -> None:
    policies = result["policies"]
    print(
        "\nExact and within error budgets, on the same bytes: attention of all layers, with planning and\n"
        "verifying; largest relative error of a head, promised and measured; heads that were done again:"
    )
    _print_table(
        ("policy", "attention, ms", "ratio", "bits per byte", "promised", "measured", "retried"),
        [
            (
                policy["policy"],
                f"{1e3 * policy['seconds']:.1f}",
                f"{policy['speedup']:.2f}",
                f"{policy['bits_per_byte']:.6f}",
                "" if policy["tolerance"] is None else f"{policy['tolerance']:.0e}",
                f"{policy['worst_head_error']:.1e}",
                str(policy["retried"]),
            )
            for policy in policies
        ],
    )
    budgets = [policy for policy in policies if policy["tolerance"] is not None]
    print(f"\nRungs of each layer's heads, in order. {_offer(result['offered'])}")
    columns = [_rung_cells(policy["rungs"]) for policy in budgets]
    layers = map(str, range(len(result["layers"])))
    _print_table(
        ("layer", *(policy["policy"] for policy in budgets)), list(zip(layers, *columns, strict=True))
    )


def _rung_cells(layers: Sequence[Sequence[str]]) -> list[str]:
    """A line of rungs for each layer, head below head."""
    width = max(len(rung) for rungs in layers for rung in rungs)
    return [" ".join(rung.ljust(width) for rung in rungs) for rungs in layers]


def _offer(offered: Sequence[str]) -> str:
    """What a budget has to choose from, in a sentence."""
    cheaper = [rung for rung in offered if rung not in ("fp64", "fp32")]
    if not cheaper:
        return "No rung is clearly faster than fp32 on this machine, so there is little to gain."
    return f"Faster than fp32 on this machine: {', '.join(cheaper)}."


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal that has rich, aligned columns anywhere else."""
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table()
            for name in header:
                table.add_column(name, justify="right")
            for row in rows:
                table.add_row(*row)
            Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Give a function that shows the current step on a terminal, and nothing where stderr is not one."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    try:
        from rich.console import Console
    except ImportError:
        yield lambda step: print(step, file=sys.stderr)
        return
    with Console(stderr=True).status("") as status:
        yield status.update


def _outline(info: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Lines "name  value" of a nested dict, each level two spaces deeper."""
    width = max(map(len, info), default=0)
    for name, value in info.items():
        if isinstance(value, Mapping) and any(isinstance(key, str) for key in value):
            yield f"{indent}{name}"
            yield from _outline(value, indent + "  ")
        else:
            yield f"{indent}{name:<{width}}  {_cell(value)}"


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{number:.0f} (D = {size})" for size, number in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value)
