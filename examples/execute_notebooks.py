"""Executes notebooks from scratch, in place, and keeps nothing of the run but its results.

    pip install ".[test]"
    python examples/execute_notebooks.py                              # all of this folder
    python examples/execute_notebooks.py examples/quick_start.ipynb

Commit notebooks as this leaves them: no times of execution, no version of the interpreter, no paths.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, timeout: int = 300) -> Any:
    """The notebook, executed by a kernel of this interpreter, in its own folder; `timeout` is that of a cell
    and of the kernel's start.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=timeout,
        startup_timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    # The progress bars of transformers ask for widgets, which say nothing in a file.
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"})
    notebook.metadata = METADATA
    return notebook


def figures(notebook: Any) -> list[int]:
    """How many pictures each code cell has."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells]


def main() -> None:
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(FOLDER.glob("*.ipynb")):
        print(path.name, file=sys.stderr)
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main()
