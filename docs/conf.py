"""Sphinx: `sphinx-build -W --keep-going docs docs/_build` builds the documentation, after
`pip install ".[docs]"`. Code in the pages is run by tests/test_docs.py.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

import adaattn

project = "AdaAttn"
author = "the AdaAttn developers"
project_copyright = f"2026, {author}"
release = version = adaattn.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",  # for its role alone
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "jupyter_execute"]
default_role = "autolink"
# Sphinx reads what lies below this folder alone.
HERE = Path(__file__).parent
(HERE / "notebooks").mkdir(exist_ok=True)
for notebook in HERE.parent.glob("examples/*.ipynb"):
    shutil.copy(notebook, HERE / "notebooks")
nb_execution_mode = "off"  # notebooks are committed executed
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say more than types of arrays can
autodoc_mock_imports = [name for name in ("torch", "transformers") if find_spec(name) is None]
numpydoc_show_class_members = False

html_math_renderer = "mathml"  # below
html_theme = "furo"
html_title = f"AdaAttn {release}"
html_extra_path = ["../llms.txt"]
html_static_path = ["_static"]
html_css_files = ["extra.css"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app: Any) -> None:
    """Formulas become MathML, which needs no script and nobody's server."""

    def inline(translator: Any, node: Any) -> None:
        translator.body.append(convert(node.astext()))
        raise SkipNode

    def block(translator: Any, node: Any) -> None:
        translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
        raise SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
