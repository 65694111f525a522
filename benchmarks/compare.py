"""AdaAttn against torch, onnxruntime and NumPy, as ratios within one run.

`peers.py` says who is compared, `measure.py` how, `report.py` what came out. All get the same numbers on
equally many threads; libraries that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from measure import Budget, Comparison
from peers import Shape
from report import plot, show_section, show_targets, targets, write_csv, write_json

FULL = Budget(rounds=15, sample=0.035, others=0.5, processes=10)
QUICK = Budget(rounds=3, sample=0.01, others=0.01, processes=3)
SECTIONS = {
    "prefill": [
        Shape(1, 4, 512, 512, 64),
        Shape(4, 4, 512, 512, 64),
        Shape(1, 4, 2048, 2048, 64, causal=True),
        Shape(1, 2, 4096, 4096, 64),
        Shape(1, 2, 4096, 4096, 128),
        Shape(1, 1, 8192, 8192, 128, causal=True),
        Shape(2, 12, 128, 128, 32),
    ],
    "rungs": [],
    "decode": [Shape(1, 8, 1, 2048 << i, 128) for i in range(6)],
    "cache": [Shape(1, 8 * group, 1, keys, 128, group=group) for group in (1, 4) for keys in (8192, 32768)],
    "small": [Shape(1, 8, 64, 64, 64), Shape(1, 1, 1, 16, 32)],
}

SECTIONS["rungs"] = SECTIONS["prefill"]


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Draw a bar on a terminal where rich is installed, otherwise print a line to stderr for each step."""
    with suppress(ImportError):
        from rich.console import Console
        from rich.progress import Progress

        if sys.stderr.isatty():
            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("", total=total)
                yield lambda text: bar.update(task, advance=1, description=text)
            return
    yield lambda text: print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--shapes", choices=[*SECTIONS, "all"], default="all")
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: fewer rounds, every other length of decode"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, with every sample")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row for each measurement")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="speedups and roofline, .png and .svg")
    args = parser.parse_args()

    run = Comparison(QUICK if args.quick else FULL)
    cases = {name: shapes for name, shapes in SECTIONS.items() if args.shapes in (name, "all")}
    if args.quick:
        cases |= {name: cases[name][::2] for name in ("decode", "cache") if name in cases}
    gc.disable()
    with progress(sum(map(len, cases.values())) * len(args.threads)) as step:
        for section, shapes in cases.items():
            for shape in shapes:
                for text in run.measure(section, shape, args.threads):
                    step(text)
                gc.collect()
        if args.shapes == "all":
            for text in run.measure_extras():
                step(text)

    for section in cases:
        for threads in args.threads:
            show_section(run, section, threads)
    found = targets(run, args.threads)
    show_targets(found)
    for name, why in run.left_out.items():
        print(f"left out: {name} ({why})")
    if args.json:
        write_json(args.json, run, found)
    if args.csv:
        write_csv(args.csv, run)
    if args.plot:
        plot(args.plot, run, args.threads)


if __name__ == "__main__":
    main()
