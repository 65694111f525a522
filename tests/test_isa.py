"""The kernels behind the fastest: a sample of the suite under every ADAATTN_ISA that this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import in_new_process

import adaattn

ISAS = ["scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"]


def _kernels() -> dict[str, str]:
    return adaattn.cpu_info()["kernels"]


def _best(kernels: dict[str, str]) -> int:
    return max(map(ISAS.index, kernels.values()))


def machine_isas() -> list[str]:
    """The instruction sets up to the best that a kernel is chosen from where nothing narrows the choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ADAATTN_ISA", raising=False)
        return ISAS[: 1 + _best(in_new_process(_kernels))]


@pytest.fixture(scope="module", name="machine_isas")
def machine_isas_fixture() -> list[str]:
    return machine_isas()


@pytest.mark.parametrize("isa", ISAS)
def test_choice_of_kernels(isa: str, machine_isas: list[str]) -> None:
    kernels = in_new_process(_kernels, ADAATTN_ISA=isa)
    assert kernels.keys() <= in_new_process(_kernels, ADAATTN_ISA=ISAS[-1]).keys()
    assert ISAS[_best(kernels)] == (isa if isa in machine_isas else machine_isas[-1])
    assert kernels["scores_f32"] == min(ISAS[_best(kernels)], "avx512", key=ISAS.index)


@pytest.mark.parametrize("isa", ISAS)
def test_sample_of_the_suite(isa: str, machine_isas: list[str]) -> None:
    if isa not in machine_isas:
        pytest.skip("not on this machine")
    if ISAS[_best(_kernels())] == isa:
        pytest.skip("what the suite runs under anyhow")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "isa_sample", "-p", "no:cacheprovider"]
    command += ["--every", "2"]  # tests/full.sh runs all of them
    folder = Path(__file__).parent
    done = subprocess.run(
        [*command, folder],
        env=os.environ | {"ADAATTN_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    print(f"ADAATTN_ISA={isa}: {done.stdout.splitlines()[-1]}")


@pytest.mark.parametrize("name", ["zen4", "", "AVX2"])
def test_unknown_name(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import adaattn"],
        env=os.environ | {"ADAATTN_ISA": name, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    names = "'scalar', 'avx2', 'avx512', 'avx512vnni', 'avx512bf16' or 'amx'"
    assert f"ArgumentError: ADAATTN_ISA: expected {names}, got '{name}'" in done.stderr
