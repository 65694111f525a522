"""Options, profiles and fixtures of the suite; what test files import from each other lives in support.py.

`--full` is the slow tier: every row against float64, large hypothesis budgets, builds of the package.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

# Of a machine with every unit, by rung.
GFLOPS = {"fp64": 50, "fp32": 100, "bf16x6": 100, "bf16x3": 60, "int16": 180, "fp16": 60, "bf16": 220}
GFLOPS |= {"int8/bf16": 290, "int8": 400}

# `python -m pytest` puts the checkout first on the path; it is meant where it holds an engine.
if not any((ROOT / "adaattn").glob("_adaattn*.so")):
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]

hypothesis.settings.register_profile(
    "fast",
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "full", hypothesis.settings.get_profile("fast"), max_examples=20_000, derandomize=False, print_blob=True
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the slow tier as well")
    parser.addoption("--every", type=int, default=1, metavar="N", help="run one test in N of those selected")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa_sample: also run under every narrower ADAATTN_ISA")
    config.addinivalue_line("markers", "slow: run with --full only")
    hypothesis.settings.load_profile("full" if config.getoption("--full") else "fast")
    from adaattn import rates

    if rates.cache_file().exists():  # what `calibrate` measured on this machine is not for tests
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ["XDG_CACHE_HOME"] = folder.name


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = items[:: config.getoption("--every")]
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="needs --full"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def cc() -> str:
    """The C compiler; tests that need one are skipped where there is none."""
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return found or pytest.skip("no C compiler")


@pytest.fixture
def every_rung_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of a machine where cheaper rungs are so much faster that looking at small heads pays as well."""
    from adaattn import rates

    dear = "fp64", "fp32", "bf16x6"
    speed = [GFLOPS[rung] * (1 if rung in dear else 100) for rung in rates.RUNGS]
    rows = np.array([(x, x, 0.0) for x in speed])
    monkeypatch.setattr(rates, "_table", rows)
