"""cuda/ compiled for the CPU by cuda/model.h: all of it once for a run of tests, and with mistakes in it."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "cuda"


def compile_sources(
    names: Iterable[str], folder: Path, *flags: str, cuda: Path = CUDA, empty: tuple[str, ...] = ()
) -> None:
    """Objects of the sources; those that are empty have no instances of K1."""
    compiler = ["g++", "-std=c++17", "-fPIC", "-w", "-DADA_CUDA_MODEL", f"-I{cuda}"]
    compiler += ["-include", str(ROOT / "tests/gpu_runtime.h"), *flags]

    def compile_one(name: str) -> None:
        none = ["-UADA_K1_WIDTHS", "-DADA_K1_WIDTHS(X)="] if name in empty else []
        source, made = str(cuda / name), str(folder / f"{Path(name).stem}.o")
        subprocess.run([*compiler, *none, "-x", "c++", "-c", source, "-o", made], check=True)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, names))


def faultless(
    factory: pytest.TempPathFactory, names: Iterable[str], *flags: str, empty: tuple[str, ...] = ()
) -> Path:
    """A folder of the sources' objects, for with_mistake."""
    folder = factory.mktemp("faultless")
    compile_sources(names, folder, *flags, empty=empty)
    return folder


def link(objects: Iterable[Path], folder: Path) -> Path:
    library = folder / "model.so"
    subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-o", library], check=True)
    return library


def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The backend, its runtime that of gpu_runtime.h, and its objects beside it; all workers share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda-model"
    folder.mkdir(exist_ok=True)
    library = folder / "model.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            sources = sorted(CUDA.glob("*.cu"), key=lambda path: path.stat().st_size)
            compile_sources(["model.cc", *(path.name for path in sources)], folder, "-O1")
            link(sorted(folder.glob("*.o")), folder)
    return library


def with_mistake(
    folder: Path, objects: Path, file: str, old: str, new: str, source: str, *flags: str
) -> Path:
    """A library of the objects in a folder, but for a source that is compiled from a text with a mistake:
    what stands once in a file, however it is broken into lines, is replaced."""
    shutil.copytree(CUDA, folder / "cuda")
    (folder / "csrc").symlink_to(ROOT / "csrc")
    text, count = re.subn(
        r"\s+".join(map(re.escape, old.split())),
        new.replace("\\", "\\\\"),
        (folder / "cuda" / file).read_text(),
    )
    assert count == 1, old
    (folder / "cuda" / file).write_text(text)
    compile_sources([source], folder, *flags, cuda=folder / "cuda")
    stem = Path(source).stem
    return link([*(path for path in objects.glob("*.o") if path.stem != stem), folder / f"{stem}.o"], folder)


def some(mistakes: Mapping[str, Any], step: int) -> list[Any]:
    """Every step-th of them; the others are for --full."""
    return [
        mistake if i % step == 0 else pytest.param(mistake, marks=pytest.mark.slow)
        for i, mistake in enumerate(mistakes)
    ]
