"""Builds and runs the C programs of tests/c, plain and under the sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

ISA_FLAGS = {"scalar": ["-O3"], "avx2": ["-O3", "-mavx2", "-mfma", "-mf16c"]}
ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS["avx512vnni"] = [*ISA_FLAGS["avx512"], "-mavx512vnni", "-mavx512vbmi"]
ISA_FLAGS["avx512bf16"] = ISA_FLAGS["amx"] = ISA_FLAGS["avx512vnni"]  # emulated: their sources run anywhere
EMULATE = ["-DADAATTN_EMULATE_AMX=1", "-DADAATTN_EMULATE_BF16=1"]
WARNINGS = ["-std=c11", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc'}", *EMULATE]
SANITIZERS = {
    "plain": [],
    "address,undefined": [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-O1",  # what the checks look at is the same, and compilers take a fifth of the time
    ],
    "thread": ["-fsanitize=thread"],
}
KERNELS = sorted((ROOT / "csrc" / "kernels").glob("*.c"))

# Each program with the sources it is linked to; the one that checks the pool includes the pool.
PROGRAMS = {
    "check_kernels": [ROOT / "csrc" / "cpu.c", *KERNELS],
    "test_parallel": [ROOT / "csrc" / "cpu.c"],
}

Run = Callable[..., subprocess.CompletedProcess[str]]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="session")
def isas(cc: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The instruction sets that the compiler can build."""
    empty = tmp_path_factory.mktemp("probe") / "probe.c"
    empty.write_text("#if defined __x86_64__\n#include <immintrin.h>\n#endif\nint probe;\n")
    x86 = platform.machine() in ("x86_64", "AMD64")
    command = [cc, "-c", empty, "-o", empty.with_suffix(".o")]
    return [
        isa
        for isa, flags in ISA_FLAGS.items()
        if isa == "scalar"
        or (x86 and subprocess.run([*command, *flags], capture_output=True).returncode == 0)
    ]


@pytest.fixture(scope="session")
def build(cc: str, isas: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that compiles a program of tests/c; it keeps the object files, one for each set of flags."""
    objects: dict[tuple[Path, str], Path] = {}
    defines = [f"-DADA_BUILD_{isa.upper()}=1" for isa in isas if isa != "scalar"]

    def compiled(source: Path, variant: str, extra: tuple[str, ...]) -> Path:
        isa = source.stem.rpartition("_")[2] if source in KERNELS else "scalar"
        name = (source, variant + "".join(extra))
        if name not in objects:
            objects[name] = tmp_path_factory.mktemp("objects") / f"{source.stem}.o"
            flags = [*WARNINGS, *ISA_FLAGS[isa], *defines, *SANITIZERS[variant], *extra]
            run(cc, *flags, "-c", source, "-o", objects[name])
        return objects[name]

    def program(name: str, variant: str, *extra: str) -> Path:
        sources = [ROOT / "tests" / "c" / f"{name}.c", *PROGRAMS[name]]
        usable = [s for s in sources if s not in KERNELS or s.stem.rpartition("_")[2] in isas]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for its own compiler
            linked = list(pool.map(lambda source: compiled(source, variant, extra), usable))
        binary = linked[0].with_name(f"{name}-{variant.replace(',', '-')}")
        run(cc, "-pthread", *SANITIZERS[variant], *linked, "-lm", "-o", binary)
        return binary

    return program


def fixed_addresses() -> list[str]:
    """Older ThreadSanitizers find their shadow memory taken where addresses are random over many bits."""
    return (
        ["setarch", "-R"] if shutil.which("setarch") and os.access("/proc/self/personality", os.R_OK) else []
    )


@pytest.mark.parametrize("variant", ["plain", "address,undefined"])
def test_kernels(variant: str, build: Callable[..., Path]) -> None:
    run(build("check_kernels", variant))


@pytest.mark.parametrize("extra", [(), ("-DADA_NO_FUTEX",)], ids=["futex", "portable"])
@pytest.mark.parametrize("variant", SANITIZERS)
def test_thread_pool(variant: str, extra: tuple[str, ...], build: Callable[..., Path]) -> None:
    binary = build("test_parallel", variant, *extra)
    run(*(fixed_addresses() if variant == "thread" else []), binary)
