"""Writes llms.txt, the public interface as plain text: `python docs/plain_text.py`; `--check` only compares.

Read from the sources, so that frameworks need not be installed.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "llms.txt"

# Names of a module in the order of the text; None: those of its __all__, or all public ones it defines.
MODULES: dict[str, list[str] | None] = {
    "adaattn": None,
    "adaattn.reference": ["attention", "attention_backward"],
    "adaattn.linalg": None,
    "adaattn.nn": None,
    "adaattn.integrations.torch": ["scaled_dot_product_attention", "AdaAttention"],
    "adaattn.integrations.transformers": ["register", "statistics", "reset_statistics"],
    "adaattn.integrations.onnx": ["attention", "Outputs"],
}
INTERNAL = {"Plan.of", "Plan.choices", "Report.of", "GradientReport.of"}
Definition = ast.FunctionDef | ast.ClassDef


@cache
def source(module: str) -> tuple[ast.Module, bool]:
    """The module's tree, and whether it is a package."""
    path = ROOT.joinpath(*module.split("."))
    package = path.is_dir()
    path = path / "__init__.py" if package else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")), package


def public(module: str) -> list[str]:
    tree, _ = source(module)
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return [x.name for x in tree.body if isinstance(x, Definition) and not x.name.startswith("_")]


def find(module: str, name: str) -> Definition | None:
    """Where a name is defined, followed through imports; None for what is no function or class."""
    tree, package = source(module)
    constants = {
        ast.unparse(node.targets[0]): node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            for x in ast.walk(node):
                if isinstance(x, ast.arguments):
                    x.defaults, x.kw_defaults = (
                        [constants.get(ast.unparse(value), value) if value else None for value in values]
                        for values in (x.defaults, x.kw_defaults)
                    )
            return node
        if isinstance(node, ast.ImportFrom) and node.module and name in (x.name for x in node.names):
            parts = module.split(".")
            return find(".".join((*parts[: len(parts) + package - node.level], node.module)), name)
    return None


def signature(node: ast.FunctionDef, method: bool) -> str:
    """Arguments and defaults without types, which docstrings give."""
    arguments = node.args
    for x in ast.walk(arguments):
        if isinstance(x, ast.arg):
            x.annotation = None
    text = ast.unparse(arguments)
    return "(" + (text.partition(",")[2].strip() if method else text) + ")"


def described(name: str, node: Definition, level: int = 2) -> Iterator[str]:
    documentation = ast.get_docstring(node)
    if isinstance(node, ast.FunctionDef):
        of_class = level > 2
        decorators = [ast.unparse(x) for x in node.decorator_list]
        static = "staticmethod" in decorators
        title = name if "property" in decorators else name + signature(node, of_class and not static)
    else:
        first = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
        title = f"class {name}" + (signature(first[0], True) if first else "")
    yield f"{'#' * level} {title}\n\n{documentation}\n"
    if isinstance(node, ast.ClassDef):
        for member in node.body:
            if not isinstance(member, ast.FunctionDef) or not ast.get_docstring(member):
                continue
            path = f"{node.name}.{member.name}"
            if path not in INTERNAL and (not member.name.startswith("_") or member.name == "__call__"):
                yield from described(path, member, level + 1)


def text() -> str:
    parts = ["# AdaAttn: the public interface\n"]
    parts.append("Written from the docstrings by docs/plain_text.py. Guides and explanations are in docs/.\n")
    for module, names in MODULES.items():
        parts.append(f"# {module}\n\n{ast.get_docstring(source(module)[0])}\n")
        for name in names or public(module):
            if (node := find(module, name)) is not None:
                parts += described(f"{module}.{name}", node)
    return "\n".join(parts)


def main() -> int:
    new = text()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(new, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != new:
        print("llms.txt: expected the text of the docstrings; run docs/plain_text.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
