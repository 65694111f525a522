"""The documentation: its code runs, its plain text is current, and Sphinx builds it without warnings."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import adaattn

PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(
    r"^(?:<!-- (?P<not_run>not run: .+) -->\n)?```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
NEEDS = {"docs/howto/torch.md": "torch", "docs/howto/transformers.md": "transformers", "README.md": "torch"}


def run_page(path: Path) -> None:
    """Runs the blocks of Python one after the other; those with prompts must print what they say."""
    text = path.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": path.stem}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.FAIL_FAST)
    for fence in FENCE.finditer(text):
        if fence["not_run"]:
            continue
        line = text.count("\n", 0, fence.start("code"))
        if fence["code"].startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(fence["code"], names, path.name, str(path), line)
            messages: list[str] = []
            assert runner.run(test, out=messages.append, clear_globs=False).failed == 0, "".join(messages)
            names = test.globs
        else:
            exec(compile("\n" * line + fence["code"], path, "exec"), names)


@pytest.mark.parametrize("page", [*(str(page.relative_to(ROOT)) for page in PAGES), "README.md"])
def test_code_of_a_page_runs(page: str) -> None:
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    run_page(ROOT / page)


@pytest.mark.parametrize(
    ("block", "message"), [("1 / 0", "division by zero"), (">>> 1 + 1\n3", "Expected:\n *3\n")]
)
def test_code_that_fails_is_seen(block: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"Text.\n\n```python\n{block}\n```\n")
    with pytest.raises((ZeroDivisionError, AssertionError), match=message):
        run_page(tmp_path / "page.md")


def modules() -> Iterator[str]:
    for module in pkgutil.walk_packages(adaattn.__path__, "adaattn."):
        if not module.name.endswith(("__main__", "_adaattn")):
            yield module.name


@pytest.mark.parametrize("name", ["adaattn", *modules()])
def test_examples_of_docstrings(name: str) -> None:
    for framework in ("torch", "transformers"):
        if name.startswith(f"adaattn.integrations.{framework}"):
            pytest.importorskip(framework)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0


def test_plain_text_is_current() -> None:
    script = [sys.executable, ROOT / "docs" / "plain_text.py", "--check"]
    done = subprocess.run(script, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_documentation_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    for package in ("furo", "latex2mathml", "myst_nb", "numpydoc", "sphinx_copybutton"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", ROOT / "docs", tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the package that is tested here
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page, anchor in (("attention", "adaattn.attention"), ("nn", "adaattn.nn.Transformer.generate")):
        text = (tmp_path / "reference" / f"{page}.html").read_text(encoding="utf-8")
        assert f'id="{anchor}"' in text
