"""The command `adaattn`, also `python -m adaattn`: results on stdout, progress and errors on stderr.

Exit codes: 0 success, 1 an error or a failed check, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
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
        if name != "bench":  # which keeps it in a file
            command.add_argument("--json", action="store_true", help="print the result as JSON")
    commands.choices["demo"].add_argument(
        "--plot", metavar="FILE", help="draw the result as well; needs matplotlib"
    )
    commands.choices["demo"].add_argument(
        "--length",
        type=int,
        metavar="N",
        help="read and compare N bytes; from 2,048 on heads may be sparse or of low rank",
    )
    _add_bench(commands.choices["bench"])
    _add_profile(commands.choices["profile"])
    words = sys.argv[1:] if argv is None else list(argv)
    end = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:end])
    arguments.rest = words[end + 1 :]
    if arguments.rest and arguments.command != "profile":
        parser.error(f"unrecognized arguments: {' '.join(arguments.rest)}")
    try:
        status = _COMMANDS[arguments.command][0](arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has read enough; nothing is to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Error, ImportError, OSError) as error:
        print(f"adaattn {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _info(arguments: argparse.Namespace) -> int:
    from . import cpu_info, gpu_info

    gpu = gpu_info()
    if not arguments.json:
        gpu["devices"] = {f"cuda:{i}": device for i, device in enumerate(gpu["devices"])}
    info = cpu_info() | {"gpu": gpu}
    print(json.dumps(info, indent=2) if arguments.json else "\n".join(_outline(info)))
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from .calibration import calibrate
    from .rates import HEAD_SIZES, cache_file

    with _progress() as progress:
        progress("Measuring every rung", None)
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
        result = demo.run(progress, arguments.length)
    if arguments.plot is not None:
        figures.draw(result, arguments.plot)
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        _print_demo(result)
    for failure in result["failures"]:
        print(f"adaattn demo: {failure}", file=sys.stderr)
    return 0 if result["passed"] else 1


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quick", action="store_true", help="under 30 seconds: short heads, few rounds")
    command.add_argument(
        "--sections", nargs="+", metavar="NAME", help="some of: shapes, sweep, real, spectra, front"
    )
    command.add_argument(
        "--kinds", nargs="+", metavar="NAME", help="made heads, some of: gaussian, sparse, smooth"
    )
    command.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", help="tokens of the sweep; default 128 to 32768"
    )
    command.add_argument("--heads", nargs="+", metavar="FILE", help="your own: .npz or .safetensors")
    command.add_argument("--causal", action="store_true", help="the heads of --heads are causal")
    command.add_argument("--tolerance", type=float, metavar="T", help="of the adaptive ones; default 0.01")
    command.add_argument("--threads", type=int, metavar="N", help="for everyone")
    command.add_argument("--json", metavar="FILE", help="keep everything, with every sample")
    command.add_argument("--csv", metavar="FILE", help="a line for each measurement")
    command.add_argument("--html", metavar="FILE", help="a page with figures and tables; needs matplotlib")
    command.add_argument("--plot", metavar="DIR", help="figures as SVG and PNG; needs matplotlib")
    command.add_argument("--load", nargs="+", metavar="JSON", help="show saved runs instead of measuring")
    command.add_argument(
        "--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="what changed between two saved runs"
    )


def _add_profile(command: argparse.ArgumentParser) -> None:
    command.usage = "adaattn profile [options] MODEL_OR_SCRIPT [-- what the script is given]"
    command.add_argument("subject", metavar="MODEL_OR_SCRIPT", help="a folder of transformers, or a .py file")
    command.add_argument(
        "--tolerances", type=float, nargs="+", metavar="T", help="to try; default 0.001 0.01 0.05"
    )
    command.add_argument("--text", metavar="FILE", help="what the model reads; default: some English")
    command.add_argument("--tokens", type=int, default=512, metavar="N", help="at most; default 512")


def _profile(arguments: argparse.Namespace) -> int:
    from .bench import profile

    with _progress() as progress:
        found = profile.profile(
            arguments.subject,
            arguments.rest,
            tolerances=arguments.tolerances or profile.TOLERANCES,
            tokens=arguments.tokens,
            text=arguments.text,
            progress=progress,
        )
    if arguments.json:
        print(found.to_json())
        return 0
    for table in profile.tables(found):
        print(f"\n{table.title}")
        _print_table(table.header, table.rows)
    print(f"\n{profile.summary(found)}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import command

    if arguments.compare:
        comparison = command.compare(*arguments.compare)
        _print_table(*comparison.table())
        print("\n".join(comparison.notes))
        return 1 if comparison.worse else 0
    with _progress() as progress:
        run = command.run(arguments, progress)
    for table in command.tables(run):
        print(f"\n{table.title}")
        _print_table(table.header, table.rows)
    for name, why in run.left_out.items():
        print(f"left out: {name} ({why})")
    for row in run.broken:
        print(
            f"adaattn bench: {row.heads} {row.case}, {row.name}: expected an error of at most "
            f"{row.promised:g}, got {row.error:.3g}",
            file=sys.stderr,
        )
    return 1 if run.broken else 0


_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "info": (_info, "Show CPU features, the kernel chosen for each slot, threads, build options and GPUs."),
    "calibrate": (_calibrate, "Measure how fast each rung of the precision ladder is here, and keep it."),
    "bench": (
        _bench,
        "Compare exact and adaptive attention with other libraries on this machine.",
    ),
    "demo": (
        _demo,
        "Run the bundled language model, time its attention, exact and within error budgets, and check it.",
    ),
    "profile": (
        _profile,
        "Run a model or a script, and tell which of its heads could be cheaper, and what that saves.",
    ),
}


def _print_demo(result: Mapping[str, Any]) -> None:
    expected = result["expected_bits_per_byte"]
    print(
        f"Read {result['bytes']:,} bytes in {result['read_seconds']:.2f} s at {result['bits_per_byte']:.6f} "
        f"bits per byte{'' if expected is None else f' (expected {expected:.6f})'}.\n"
    )
    alone = result["layers"][0]["speedup"] is None  # NumPy took no part
    beside = "" if alone else ", ours and NumPy (one\nhead, times their number)"
    print(
        f"Attention of each layer on the first {result['compared_bytes']:,} bytes{beside}; relative\n"
        f"error of ours against float64 on {result['checked_rows']} rows:"
    )
    peers = () if alone else ("NumPy, ms", "ratio")
    _print_table(
        ("layer", "ours, ms", *peers, "error", "worst head"),
        [
            (
                str(layer["layer"]),
                f"{1e3 * layer['seconds']:.1f}",
                *(() if alone else (f"{1e3 * layer['numpy_seconds']:.1f}", f"{layer['speedup']:.1f}")),
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
    structures = {name for policy in budgets for layer in policy["structures"] for name in layer}
    told = ["percent: of the blocks that sparse heads keep."] if "sparse" in structures else []
    told += ["R: landmarks of heads of low rank."] if "low_rank" in structures else []
    print("\n" + " ".join(["Rungs of each layer's heads, in order.", *told, _offer(result["offered"])]))
    columns = [_rung_cells(_named(policy)) for policy in budgets]
    layers = map(str, range(len(result["layers"])))
    _print_table(
        ("layer", *(policy["policy"] for policy in budgets)), list(zip(layers, *columns, strict=True))
    )


def _named(policy: Mapping[str, Any]) -> list[list[str]]:
    """A name for how each head of each layer was computed: "bf16", "int8:23%", "fp32:R48"."""
    fields = (policy[name] for name in ("rungs", "structures", "kept", "ranks"))
    marks = {"sparse": lambda kept, rank: f":{kept:.0%}", "low_rank": lambda kept, rank: f":R{rank}"}
    return [
        [
            rung + (marks[structure](kept, rank) if structure in marks else "")
            for rung, structure, kept, rank in zip(*layer, strict=True)
        ]
        for layer in zip(*fields, strict=True)
    ]


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
def _progress() -> Iterator[Callable[[str, float | None], None]]:
    """Give a function that shows a step and the share that is done, None where nobody knows: a bar of rich,
    or a plain one, on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step, done: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        width = 24

        def show(step: str, done: float | None) -> None:
            filled = round(width * (done or 0))
            bar = "#" * filled + "." * (width - filled)
            share = "    " if done is None else f"{done:4.0%}"
            print(f"\r[{bar}] {share} {step[:48]:<48}", end="", file=sys.stderr, flush=True)

        yield show
        print(file=sys.stderr)
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda step, done: progress.update(
            task, description=step, completed=done, total=None if done is None else 1.0
        )


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
