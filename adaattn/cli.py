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
    arguments = parser.parse_args(argv)
    try:
        return _COMMANDS[arguments.command][0](arguments.json)
    except (Error, ImportError, OSError) as error:
        print(f"adaattn {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _info(as_json: bool) -> int:
    from . import cpu_info

    info = cpu_info()
    print(json.dumps(info, indent=2) if as_json else "\n".join(_outline(info)))
    return 0


def _calibrate(as_json: bool) -> int:
    from .rates import HEAD_SIZES, cache_file, calibrate

    result = calibrate()
    if as_json:
        print(json.dumps(result, indent=2))
        return 0
    _print_table(
        ("rung", *(f"GFLOP/s, D = {d}" for d in HEAD_SIZES), "offered"),
        [
            (rung, *(f"{by_size[d]:.0f}" for d in HEAD_SIZES), "yes" if rung in result["offered"] else "no")
            for rung, by_size in result["gflops"].items()
        ],
    )
    print(f"\nOne core, float32 arrays, packing included. Kept in {cache_file()}.")
    return 0


def _demo(as_json: bool) -> int:
    from . import demo

    with _progress() as progress:
        result = demo.run(progress)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print_demo(result)
    if not result["passed"]:
        print("adaattn demo: the bits per byte are not those expected", file=sys.stderr)
    return 0 if result["passed"] else 1


_COMMANDS: dict[str, tuple[Callable[[bool], int], str]] = {
    "info": (_info, "Show CPU features, the kernel chosen for each slot, threads and build options."),
    "calibrate": (_calibrate, "Measure how fast each rung of the precision ladder is here, and keep it."),
    "demo": (_demo, "Run the bundled language model, time its attention and check it against float64."),
}


def _print_demo(result: Mapping[str, Any]) -> None:
    print(
        f"Read {result['bytes']:,} bytes in {result['read_seconds']:.2f} s at {result['bits_per_byte']:.6f} "
        f"bits per byte (expected {result['expected_bits_per_byte']:.6f}).\n"
    )
    print("Attention of each layer, ours and plain NumPy; relative error of ours against float64:")
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
    last = result["prompt"].splitlines()[-1].strip()
    print(f"\nWrote {result['new_bytes']} bytes after '{last}' in {result['write_seconds']:.2f} s:\n")
    print(result["prompt"] + result["continuation"])


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
