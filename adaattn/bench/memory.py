"""Memory that one call takes beyond its inputs and output, measured in a process that did nothing before.

A process imports the libraries once and forks for each request, before any of them has started threads: what
an earlier call left behind counts nowhere. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from .contenders import build
from .heads import Heads

# Not `-m`, which would prefer a checkout in the present folder to the package that this one is of.
_COMMAND = f"import sys; sys.path[:] = filter(None, sys.path); from {__name__} import _serve; _serve()"


class MemoryMeter:
    """The process; `measure` asks it. Raises OSError where memory cannot be measured."""

    def __init__(self, libraries: Sequence[str]) -> None:
        if not os.path.exists("/proc/self/clear_refs"):
            raise OSError("/proc/self/clear_refs does not exist")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *libraries],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def measure(self, name: str, heads: Heads, tolerance: float, threads: int) -> int | None:
        """Bytes at the peak of a call of this contender; None if it failed."""
        assert self._process.stdin and self._process.stdout
        pickle.dump((name, heads, tolerance, threads), self._process.stdin, pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()
        found: int | None = pickle.load(self._process.stdout)
        return found

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        with suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def _measure(name: str, heads: Heads, tolerance: float, threads: int) -> int:
    call = build(name, heads, tolerance, threads)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM") - before
    del kept
    B, H, T, _ = heads.query.shape
    out_bytes: int = 4 * B * H * T * heads.value.shape[3]
    return max(0, peak - out_bytes)


def _serve() -> None:
    for library in sys.argv[1:]:
        import_module(library)
    while True:
        try:
            request: Any = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        reader, writer = os.pipe()
        if os.fork() == 0:
            with suppress(BaseException):
                os.write(writer, str(_measure(*request)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as answer:
            found = answer.read()
        os.wait()
        pickle.dump(int(found) if found else None, sys.stdout.buffer)
        sys.stdout.buffer.flush()
