"""What a user installs: imports, types, sizes, the command line, builds."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from support import in_new_process

import adaattn
from adaattn import calibration, cli, rates
from adaattn import demo as module

PACKAGE = Path(adaattn.__file__).parent

USAGE = """
import numpy as np
from numpy.typing import NDArray
import adaattn

x: NDArray[np.float32] = np.ones((1, 2, 3, 4), np.float32)
out = adaattn.attention(x, x, x, causal="upper_left", window=(3, None), softcap=2.0, dropout_p=0.1, seed=[1])
out, lse = adaattn.attention(x, x, x, attn_mask=x[0, 0, :, :3], return_lse=True)
out, lse = adaattn.merge(out, lse, out, lse)
adaattn.set_num_threads(adaattn.get_num_threads())
kernels: dict[str, str] = adaattn.cpu_info()["kernels"]
oracle = adaattn.reference.attention(x, x, x)
out = adaattn.attention(x, x, x, attn_mask=adaattn.linalg.causal_mask(3, 3))
rank = adaattn.linalg.effective_rank(oracle, "energy", threshold=0.9)
try:
    adaattn.attention(x, x, x, scale=-1.0)
except adaattn.ArgumentError as error:
    print(error)
"""


def python(*arguments: object, cwd: Path = Path(__file__).parent) -> str:
    """Output of a fresh interpreter, which imports the package that is tested here, installed or not."""
    path = {"PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)} if PACKAGE.parent == ROOT else {}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- import


def _modules_of_import() -> set[str]:
    code = "import sys, numpy; before = set(sys.modules); import adaattn; print(*(set(sys.modules) - before))"
    return {name.partition(".")[0] for name in python("-c", code).split()}


def test_import_loads_numpy_and_the_standard_library_only() -> None:
    assert _modules_of_import() - set(sys.stdlib_module_names) - {"numpy"} == {"adaattn"}


def test_import_takes_little_longer_than_numpys(tmp_path: Path) -> None:
    """At most 0.3 of NumPy's (20 ms where that takes 67), both in computing time, which other processes leave
    alone, in one of up to 30 processes that find compiled bytecode."""
    code = (
        "from time import process_time as now; start = now(); import numpy; middle = now(); import adaattn; "
        "print((now() - middle) / (middle - start))"
    )
    path = {"PYTHONPATH": str(ROOT)} if PACKAGE.parent == ROOT else {}
    environment = os.environ | path | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def share() -> float:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return float(done.stdout)

    share()  # compiles
    shares: list[float] = []
    while len(shares) < 30 and not (shares and shares[-1] <= 0.3):
        shares.append(share())
    assert min(shares) <= 0.3, shares


def test_everything_public_has_a_docstring() -> None:
    public = [getattr(adaattn, name) for name in adaattn.__all__]
    assert all(x.__doc__ for x in public if callable(x))


def test_version() -> None:
    """The header of the engine has it; what repeats it agrees."""
    version = adaattn.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert adaattn.cpu_info()["version"] == version
    if PACKAGE.parent != ROOT:
        assert importlib.metadata.version("adaattn") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\d.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_licence() -> None:
    """One, wherever it is named."""
    assert (ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License\n")
    for name in ("pyproject.toml", "cuda/pyproject.toml"):
        assert '\nlicense = "BSD-3-Clause"\n' in (ROOT / name).read_text()
    assert "\nlicense: BSD-3-Clause\n" in (ROOT / "CITATION.cff").read_text()


def test_extras() -> None:
    """Those that messages and documentation name are there."""
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", text.partition("\n[")[0], re.MULTILINE))
    named = set()
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"):
        for names in re.findall(r'(?:adaattn|"\.)\[([\w,]+)\]', path.read_text(encoding="utf-8")):
            named |= set(names.split(","))
    assert named <= extras >= {"torch", "transformers", "plots", "cuda", "demo", "test", "docs"}


def test_what_wheels_are_tested_with() -> None:
    """cibuildwheel installs what the test file that it runs, and what this imports of tests/, asks for."""
    text = (ROOT / "pyproject.toml").read_text().partition("[tool.cibuildwheel]")[2]
    required = set(re.findall(r"\w+", re.search(r"^test-requires = \[(.+)\]$", text, re.MULTILINE)[1]))
    (run,) = re.findall(r"\{project\}/tests/(\w+)\.py", text)
    found, files = set(), {run, "conftest"}
    while files:
        imports = re.findall(
            r"^(?:import|from) (\w+)", (ROOT / "tests" / f"{files.pop()}.py").read_text(), re.MULTILINE
        )
        files |= {name for name in imports if (ROOT / "tests" / f"{name}.py").exists()} - found
        found |= set(imports)
    local = {path.stem for path in (ROOT / "tests").glob("*.py")}
    assert found - set(sys.stdlib_module_names) - local - {"adaattn", "numpy"} == required


# ---- types


MYPY = "-m", "mypy", "--strict", "--ignore-missing-imports", "--cache-dir"


def test_usage_is_typed(tmp_path: Path) -> None:
    usage = tmp_path / "usage.py"
    usage.write_text(USAGE)
    python(*MYPY, tmp_path, usage)
    python(usage)


def test_sources_are_typed(tmp_path: Path) -> None:
    python(*MYPY, tmp_path, ROOT / "adaattn")


def test_stub_is_complete() -> None:
    python("-m", "mypy.stubtest", "adaattn._adaattn")


# ---- sizes


def test_sizes(tmp_path: Path) -> None:
    """The engine under 3 MB and the packed package, model included, under 10 MB."""
    (engine,) = PACKAGE.glob("_adaattn*.so")
    assert engine.stat().st_size < 3e6
    with zipfile.ZipFile(tmp_path / "package.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in PACKAGE.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path)
    assert (tmp_path / "package.zip").stat().st_size < 10e6


@pytest.mark.slow
def test_builds_and_installs(tmp_path: Path) -> None:
    """A wheel made from the sdist alone, which needs no compiler, and an editable install of it, each in an
    environment of its own; the sdist has all files of the repository that are not its host's."""
    python("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", cwd=ROOT)
    (sdist,) = tmp_path.glob("adaattn-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    if shutil.which("git") and (ROOT / ".git").exists():
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        missing = [name for name in tracked.stdout.split("\n") if not (source / name).exists()]
        assert [name for name in missing if not name.startswith((".git", ".ci/"))] == []
    python("-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("adaattn-*.whl")
    assert wheel.stat().st_size < 10e6
    check = (
        "import adaattn, numpy; x = numpy.ones((1, 1, 2, 4)); assert (adaattn.attention(x, x, x) == 1).all()"
    )
    outside = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    for name, what in (("wheel", [wheel]), ("editable", ["--editable", source])):
        python("-m", "venv", tmp_path / name)
        for arguments in (["-m", "pip", "install", *what], ["-c", check]):
            command = [tmp_path / name / "bin" / "python", *arguments]
            subprocess.run(command, check=True, cwd=tmp_path, env=outside)
    bare = {"PATH": str(tmp_path / "wheel" / "bin"), "HOME": str(tmp_path)}
    assert not any(shutil.which(name, path=bare["PATH"]) for name in ("cc", "gcc", "clang", "nvcc"))
    demo = subprocess.run(
        ["adaattn", "demo", "--json"], env=bare, cwd=tmp_path, capture_output=True, text=True
    )
    assert demo.returncode == 0 and json.loads(demo.stdout)["passed"] is True, demo.stderr


@pytest.mark.slow
def test_builds_scalar_kernels_alone(cc: str, tmp_path: Path) -> None:
    """As for another processor: the build warns, and the engine says what it was built without."""
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nfor x in "$@"; do [ "$x" != -mavx2 ] || exit 1; done\nexec {cc} "$@"\n')
    compiler.chmod(0o755)
    shutil.copytree(PACKAGE, tmp_path / "adaattn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    folders = "--build-lib", tmp_path, "--build-temp", tmp_path / "build"
    command = [sys.executable, "setup.py", "build_ext", *folders]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CC": str(compiler)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "only scalar kernels are built" in done.stderr
    check = (
        "import adaattn, numpy; x = numpy.ones((1, 1, 2, 4)); assert (adaattn.attention(x, x, x) == 1).all();"
        "info = adaattn.cpu_info(); assert set(info['kernels'].values()) <= {'scalar', None}, info;"
        "assert info['build']['isa'] == [] and 'avx2' in info['build']['left_out'], info"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", check], check=True, cwd=tmp_path, env=environment)


# ---- command line


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    info = json.loads(python("-m", "adaattn", "info", "--json"))
    assert info.pop("gpu") == adaattn.gpu_info()
    assert info == json.loads(json.dumps(adaattn.cpu_info()))
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(slot in text for slot in info["kernels"]) and "\ngpu\n" in text


def test_whoever_reads_may_stop() -> None:
    command = [sys.executable, "-m", "adaattn", "info"]
    path = {"PYTHONPATH": str(ROOT)} if PACKAGE.parent == ROOT else {}
    here, pipe = Path(__file__).parent, subprocess.PIPE
    with subprocess.Popen(command, cwd=here, env=os.environ | path, stdout=pipe, stderr=pipe) as run:
        assert run.stdout and run.stderr
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 1


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    return json.loads(python("-m", "adaattn", "demo", "--json"))


def test_demo_reads_the_text(demo: dict[str, Any]) -> None:
    assert demo["bytes"] == 4096 and demo["passed"] is True
    assert abs(demo["bits_per_byte"] - 1.208149) < 1e-3
    assert demo["continuation"].startswith('path) as f:\n        """Return the file at the file')
    assert len(demo["continuation"].encode()) == 64


def test_demo_measures_every_layer(demo: dict[str, Any]) -> None:
    assert [layer["layer"] for layer in demo["layers"]] == [0, 1, 2, 3]
    for layer in demo["layers"]:
        assert layer["seconds"] > 0 and layer["numpy_seconds"] > 0
        assert 0 < layer["error"] <= layer["worst_head_error"] < 2e-6


def test_demo_compares_budgets(demo: dict[str, Any]) -> None:
    """Errors are within what was promised, each head has its rung, and quality follows the promise."""
    assert demo["failures"] == [] and demo["compared_bytes"] == 2048 and demo["checked_rows"] == 256
    assert demo["offered"] == adaattn.cpu_info()["rates"]["offered"]
    exact = demo["policies"][0]
    assert exact["tolerance"] is None and exact["measured_error"] is None and exact["speedup"] == 1
    assert exact["seconds"] == pytest.approx(sum(layer["seconds"] for layer in demo["layers"]))
    assert abs(exact["bits_per_byte"] - 1.290197) < 1e-4
    budgets = {"quality": 1e-5, "balanced": 1e-2, "speed": 5e-2}
    assert {policy["policy"]: policy["tolerance"] for policy in demo["policies"][1:]} == budgets
    for policy in demo["policies"][1:]:
        assert 0 < policy["worst_head_error"] <= policy["tolerance"] >= policy["measured_error"] > 0
        assert abs(policy["bits_per_byte"] - exact["bits_per_byte"]) <= policy["tolerance"]
        assert policy["seconds"] > 0 and policy["retried"] >= 0
        assert [len(layer) for layer in policy["rungs"]] == [4] * 4
        assert {rung for layer in policy["rungs"] for rung in layer} <= set(rates.RUNGS)


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LENGTH", 64)
    monkeypatch.setattr(module, "NEW_BYTES", 9)
    monkeypatch.setattr(module, "BITS_TOLERANCE", 5)


@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.usefixtures("short_demo")
def test_demo_for_people(
    terminal: bool, rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress and a table on a terminal, with rich or without; plain text elsewhere."""
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
    assert cli.main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert "64 bytes" in out and "path) as" in out and out.count("e-") >= 4
    assert all(policy in out for policy in ("exact", "quality", "balanced", "speed"))
    assert rich or ("Loading" in err) == terminal


def _offering(monkeypatch: pytest.MonkeyPatch, *gflops: float) -> None:
    """Rates of a machine on which the rungs are this fast."""
    rows = np.array([(rate, rate, 0.0, 1.0) for rate in gflops])
    monkeypatch.setattr(rates, "_load", lambda: ("measured", rows))
    monkeypatch.setattr(rates, "_table", rows)


@pytest.mark.usefixtures("short_demo")
def test_demo_of_a_length_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it is compared, more than sample.txt has included, without NumPy where that is much, and with
    the structure of every head."""
    monkeypatch.setattr(module, "MOST_NUMPY", 2048)
    monkeypatch.setattr(module, "RUNS", 1)
    assert cli.main(["demo", "--length", "5000", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == result["compared_bytes"] == 5000 and result["expected_bits_per_byte"] is None
    assert result["layers"][0]["speedup"] is None and 0.5 < result["bits_per_byte"] < 2
    for policy in result["policies"]:
        for layer in range(4):
            structures = policy["structures"][layer]
            assert len(structures) == 4 and set(structures) <= {"dense", "sparse", "low_rank"}
            assert [kept < 1 for kept in policy["kept"][layer]] == [name == "sparse" for name in structures]
    cli._print_demo(result)
    text = capsys.readouterr().out
    sparse = any("sparse" in layer for policy in result["policies"] for layer in policy["structures"])
    assert "NumPy" not in text and ("%" in text) == sparse
    for length in ("0", "10000000"):
        assert cli.main(["demo", "--length", length]) == 1
        assert "length: expected 1 to" in capsys.readouterr().err


@pytest.mark.usefixtures("short_demo")
def test_demo_on_two_machines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rungs are those that were computed with, and where nothing is faster than fp32 the table says so."""
    monkeypatch.setattr(module, "LENGTH", 256)
    _offering(monkeypatch, *[100.0] * len(rates.RUNGS))
    assert cli.main(["demo"]) == 0
    alone = capsys.readouterr().out
    assert "No rung is clearly faster than fp32 on this machine" in alone and "int8" not in alone
    _offering(monkeypatch, *(4.0**i for i in range(len(rates.RUNGS))))
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "Faster than fp32 on this machine: bf16x6, " in out
    lines = [line.split() for line in out.splitlines()]
    at = lines.index(["layer", "quality", "balanced", "speed"])
    assert [lines[at + 1 + layer][0] for layer in range(4)] == ["0", "1", "2", "3"]
    layers = lines[at + 1 : at + 5]
    assert all(len(line) == 1 + 3 * 4 and any("int8" in rung for rung in line[9:]) for line in layers)


@pytest.mark.usefixtures("short_demo")
def test_demo_that_breaks_a_promise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = adaattn.attention

    def worse(*arrays: Any, **options: Any) -> Any:
        result = attention(*arrays, **options)
        if options.get("policy") == "balanced" and options.get("return_report"):
            result[0][:, 2] *= 1.0625
        return result

    monkeypatch.setattr(module.api, "attention", worse)
    assert cli.main(["demo", "--json"]) == 1
    out, err = capsys.readouterr()
    assert "balanced: expected errors of at most 0.01, got 0.0625 in a head" in err
    assert json.loads(out)["failures"] == [err.strip().removeprefix("adaattn demo: ")]


@pytest.mark.parametrize("name", ["demo.png", "demo.svg"])
@pytest.mark.usefixtures("short_demo")
def test_figure_of_the_demo(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["demo", "--json", "--plot", str(tmp_path / name)]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    start = (tmp_path / name).read_bytes()[:5]
    assert start == {"demo.png": b"\x89PNG\r", "demo.svg": b"<?xml"}[name]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("demo", "--plot: expected a name that ends in one of .*png.*, got '.*demo'"),
        ("demo.nothing", "--plot: expected a name that ends in one of .*png.*, got '.*demo.nothing'"),
        ("nowhere/demo.png", "--plot: expected a folder that exists, got '.*nowhere'"),
    ],
)
def test_figures_that_are_refused_before_any_work(
    path: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(module, "run", lambda progress: pytest.fail("it ran"))
    assert cli.main(["demo", "--plot", str(tmp_path / path)]) == 1
    assert re.search(f"^adaattn demo: {message}$", capsys.readouterr().err.strip())


def test_figure_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(module, "run", lambda progress: pytest.fail("it ran"))
    assert cli.main(["demo", "--plot", "demo.png"]) == 1
    assert "pip install adaattn[plots]" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_calibrate(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "_table", None)
    measure = calibration.calibrate
    monkeypatch.setattr(calibration, "calibrate", lambda: measure(seconds=0.01))
    assert cli.main(["calibrate", "--json"] if as_json else ["calibrate"]) == 0
    out, told = capsys.readouterr().out, adaattn.cpu_info()["rates"]
    assert told["source"] == "measured"
    if as_json:
        assert json.loads(out) == json.loads(json.dumps(told))
        return
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1 : 1 + len(rates.RUNGS)]}
    for rung in rates.RUNGS:
        numbers = (*told["gflops"][rung].values(), told["pack_ns"][rung])
        assert [float(cell) for cell in rows[rung][:3]] == pytest.approx(numbers, rel=0.1, abs=0.51)
        assert rows[rung][3] == ("yes" if rung in told["offered"] else "no")
    assert str(rates.cache_file()) in out


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["info", "--unknown"]], ids=str)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: adaattn" in capsys.readouterr().err


@pytest.mark.usefixtures("short_demo")
def test_demo_that_fails_its_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "BITS_TOLERANCE", 0)
    assert cli.main(["demo", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["passed"] is False and "bits per byte" in err


def test_demo_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Transformer, "load", lambda path: signal.raise_signal(signal.SIGINT))
    assert cli.main(["demo"]) == 130


def _loaded_twice() -> bool:
    """A second copy of the extension module beside the first: nothing is shared but the thread pool."""
    import importlib

    first = sys.modules.pop("adaattn._adaattn")
    second = importlib.import_module("adaattn._adaattn")
    x = np.ones((1, 1, 2, 4), np.float32)
    return second is not first and bool((adaattn.attention(x, x, x) == 1).all())


def test_extension_can_be_loaded_twice() -> None:
    assert in_new_process(_loaded_twice)
