"""What `adaattn bench` does with its arguments, before anything is printed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import ArgumentError
from . import suite
from .changes import Comparison
from .changes import compare as compare_runs
from .heads import from_file
from .results import Run, load, merge, save_csv, save_json
from .tables import tables

__all__ = ["compare", "run", "tables"]


def run(arguments: argparse.Namespace, progress: suite.Progress) -> Run:
    """Measure, or load, and write what was asked for."""
    _check(arguments)
    if arguments.load:
        found = merge([load(path) for path in arguments.load])
    else:
        scope = suite.QUICK if arguments.quick else suite.FULL
        if arguments.kinds:
            scope = replace(scope, kinds=tuple(arguments.kinds))
        if arguments.lengths:
            scope = replace(scope, sweep=tuple(arguments.lengths))
        found = suite.run(
            scope,
            sections=arguments.sections or suite.SECTIONS,
            tolerance=suite.TOLERANCE if arguments.tolerance is None else arguments.tolerance,
            threads=arguments.threads,
            given=[from_file(path, arguments.causal) for path in arguments.heads or ()],
            progress=progress,
        )
    if arguments.json:
        save_json(found, Path(arguments.json))
    if arguments.csv:
        save_csv(found, Path(arguments.csv))
    if arguments.plot:
        from . import figures

        figures.save(found, Path(arguments.plot))
    if arguments.html:
        from . import page

        page.save(found, Path(arguments.html))
    return found


def compare(before: str, after: str) -> Comparison:
    return compare_runs(load(before), load(after))


def _check(arguments: argparse.Namespace) -> None:
    """Refuse before any work what would fail after it.

    Raises
    ------
    ArgumentError
        A name that is none, or a number that makes no sense.
    ImportError
        Figures without matplotlib.
    FileNotFoundError
        A file in a folder that does not exist.
    """
    _names("--sections", arguments.sections, suite.SECTIONS)
    _names("--kinds", arguments.kinds, suite.KINDS)
    if arguments.tolerance is not None and not 0 < arguments.tolerance < 1:
        raise ArgumentError(f"--tolerance: expected a number between 0 and 1, got {arguments.tolerance:g}")
    if arguments.threads is not None and arguments.threads < 1:
        raise ArgumentError(f"--threads: expected at least 1, got {arguments.threads}")
    if any(length < 1 for length in arguments.lengths or ()):
        raise ArgumentError(f"--lengths: expected at least 1, got {min(arguments.lengths)}")
    if arguments.causal and not arguments.heads:
        raise ArgumentError("--causal: expected --heads beside it, got none")
    if arguments.plot or arguments.html:
        from . import figures

        figures.check()
    for name in ("json", "csv", "html"):
        path = getattr(arguments, name)
        if path is not None and not Path(path).parent.is_dir():
            raise FileNotFoundError(
                f"--{name}: expected a folder that exists, got {str(Path(path).parent)!r}"
            )


def _names(argument: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in given or ():
        if name not in known:
            raise ArgumentError(f"{argument}: expected names among {', '.join(known)}, got {name!r}")
