"""Builds libadaattn_cuda.so with nvcc: `python cuda/build.py FOLDER`, or from setup.py.

Environment: ADAATTN_CUDA_ARCH=90a restricts the architectures (names of nvcc, commas between), MAX_JOBS the
compilers that run at once. What ptxas says of kernels that it had to cripple (warnings C75xx) or that spill
registers is an error, or only told where the architectures are restricted, as they are during development.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "libadaattn_cuda.so"
# What each chip runs: Ampere, Ada, Hopper with its own instructions, Blackwell; PTX for what comes later.
ARCHITECTURES = ("80", "89", "90a", "100")
PTX = "80"
FLAGS = ["-std=c++17", "-O3", "--cudart", "static", "--expt-relaxed-constexpr"]
FLAGS += ["-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


class CudaBuildError(Exception):
    """The library cannot be built; the message says why."""


def find_nvcc() -> Path | None:
    """By $CUDACXX, $CUDA_HOME, PATH, the usual place, then in NVIDIA's wheels."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        candidates.insert(1, f"{home}/bin/nvcc")
    for folder in sys.path:
        candidates += map(str, Path(folder, "nvidia").glob("*/bin/nvcc"))
    return next((Path(path) for path in candidates if path and os.access(path, os.X_OK)), None)


def _code(nvcc: Path) -> list[str]:
    """For code of every chip that is asked for and known to the compiler, and PTX unless some are picked."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = {name.removeprefix("sm_") for name in listed.split()}
    picked = os.environ.get("ADAATTN_CUDA_ARCH")
    names = picked.split(",") if picked else [name for name in ARCHITECTURES if name in known]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    if not picked:
        flags.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
    told = subprocess.run([nvcc, "--help"], capture_output=True, text=True).stdout
    if "--compress-mode" in told:  # a fifth of the size
        flags.append("--compress-mode=size")
    return flags


def _complaints(text: str) -> list[str]:
    """Lines that say that a kernel is not what its source says. C7519 is about code that is never used."""
    found, function = [], ""
    for line in text.splitlines():
        if match := re.search(r"Function properties for (\S+)", line):
            function = match[1]
        if re.search(r"[1-9]\d* bytes spill", line):
            found.append(f"{function}: {line.strip()}")
        elif re.search(r"\bC75\d\d\b", line) and "C7519" not in line:
            found.append(line)
    return found


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CudaBuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build(to: Path, objects: Path) -> Path:
    """Compiles what has changed into `objects` and links the library into `to`."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise CudaBuildError(
            "no nvcc: not $CUDACXX, in $CUDA_HOME/bin, on PATH, in /usr/local/cuda/bin or in NVIDIA's wheels"
        )
    flags = [*FLAGS, *_code(nvcc)]
    if os.environ.get("ADAATTN_WERROR") == "1":
        flags += ["-Werror", "all-warnings"]
    headers = [*HERE.glob("*.h"), *HERE.glob("*.cuh"), *HERE.parent.glob("csrc/adaattn.h"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in [*headers, *HERE.parent.glob("csrc/*.def")])
    objects = objects / ("cuda-" + (os.environ.get("ADAATTN_CUDA_ARCH") or "all").replace(",", "-"))
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> tuple[Path, list[str]]:
        made, log = objects / f"{source.stem}.o", objects / f"{source.stem}.log"
        if not (made.exists() and made.stat().st_mtime > max(newest, source.stat().st_mtime)):
            log.write_text(_run([str(nvcc), *flags, "-c", str(source), "-o", str(made)]))
        return made, _complaints(log.read_text())

    # Short ones first: they are instances of kernels in headers, which take longest.
    sources = sorted(HERE.glob("*.cu"), key=lambda path: path.stat().st_size)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        results = list(pool.map(compile_one, sources))
    to.mkdir(parents=True, exist_ok=True)
    library = to / LIBRARY
    # Beside the driver and the C library, all that is needed is inside, and nothing but the table gets out.
    top = nvcc.parent.parent
    link = [str(nvcc), "-shared", "--cudart", "static", "-Xlinker", "--exclude-libs,ALL"]
    _run([*link, f"-L{top}/lib", *map(str, (made for made, _ in results)), "-o", str(library)])
    if complaints := [line for _, lines in results for line in lines]:
        told = "ptxas:\n" + "\n".join(complaints)
        if not os.environ.get("ADAATTN_CUDA_ARCH") or os.environ.get("ADAATTN_WERROR") == "1":
            raise CudaBuildError(told)
        print(told, file=sys.stderr)
    return library


if __name__ == "__main__":
    try:
        print(build(Path(sys.argv[1]), Path("build")))
    except CudaBuildError as error:
        raise SystemExit(f"error: {error}") from None
