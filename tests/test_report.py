"""What a call tells about its own work."""

from __future__ import annotations

import contextlib
import gc
import json
import pickle
import sys
import time
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support import F32, F64, Shape, inputs, same_bits

import adaattn

SHAPE = Shape(2, 4, 2, 70, 130, 16, 24)


def test_order_of_results(rng: np.random.Generator) -> None:
    arrays = inputs(rng, SHAPE)
    out, lse = adaattn.attention(*arrays, return_lse=True)
    assert isinstance(out, np.ndarray)
    with_report = adaattn.attention(*arrays, return_report=True)
    with_both = adaattn.attention(*arrays, return_lse=True, return_report=True)
    assert isinstance(with_report, tuple) and isinstance(with_both, tuple)
    assert same_bits(with_report[:-1], (out,)) and same_bits(with_both[:-1], (out, lse))
    assert isinstance(with_report[-1], adaattn.Report) and isinstance(with_both[-1], adaattn.Report)
    given = np.empty_like(out)
    assert adaattn.attention(*arrays, return_report=True, out=given)[0] is given


def test_kind_of_array() -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 2, 3, 4)
    out, lse, report = adaattn.attention(x, x, x, return_lse=True, return_report=True)
    assert isinstance(out, torch.Tensor) and isinstance(lse, torch.Tensor)
    assert isinstance(report.precision_qk, np.ndarray)


@pytest.mark.parametrize(
    ("precision", "dtype", "rungs"),
    [
        ("auto", F32, ("fp32", "fp32")),
        ("auto", F64, ("fp64", "fp64")),
        ("fp32", F64, ("fp32", "fp32")),
        ("bf16x6", F32, ("bf16x6", "bf16x6")),
        (("int8", "bf16"), F32, ("int8", "bf16")),
    ],
    ids=str,
)
def test_rungs(precision: object, dtype: type, rungs: tuple[str, str], rng: np.random.Generator) -> None:
    _, report = adaattn.attention(*inputs(rng, SHAPE, dtype), precision=precision, return_report=True)
    for name, expected in zip(("precision_qk", "precision_pv", "retried"), (*rungs, False), strict=True):
        assert getattr(report, name).shape == (SHAPE.B, SHAPE.H)
        assert (getattr(report, name) == expected).all()
    qk, pv = rungs
    assert (report.rungs == (qk if qk == pv else f"{qk}/{pv}")).all()
    assert report.rungs.shape == (SHAPE.B, SHAPE.H)


def test_one_head_goes_up(rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, SHAPE)
    query[1, 2] = 1e30
    _, report = adaattn.attention(query, key, value, precision=("int8", "bf16"), return_report=True)
    expected = np.zeros((2, 4), bool)
    expected[1, 2] = True
    assert same_bits(report.retried, expected)
    assert (report.precision_qk == np.where(expected, "fp32", "int8")).all()
    assert (report.precision_pv == np.where(expected, "fp32", "bf16")).all()


def test_scale_beyond_fp32(rng: np.random.Generator) -> None:
    """All heads of the call go up to fp64."""
    arrays = inputs(rng, SHAPE)
    _, report = adaattn.attention(*arrays, scale=1e-60, precision="int8", return_report=True)
    assert report.retried.all() and (report.precision_qk == "fp64").all()
    _, report = adaattn.attention(*arrays, scale=1e-60, return_report=True)
    assert not report.retried.any() and (report.precision_pv == "fp64").all()


def test_is_a_frozen_record_that_pickles(rng: np.random.Generator) -> None:
    _, report = adaattn.attention(*inputs(rng, SHAPE), precision="int8", return_report=True)
    with pytest.raises(FrozenInstanceError):
        report.retried = None
    assert_same(pickle.loads(pickle.dumps(report)), report)
    _, report = adaattn.attention(*inputs(rng, SHAPE), tolerance=1e-3, return_report=True)
    again = pickle.loads(pickle.dumps(report))
    assert_same(again, report)
    assert_same(again.plan, report.plan)


def assert_same(a: Any, b: Any) -> None:
    """Two reports, or two plans, alike in every bit."""
    assert type(a) is type(b)
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert type(x) is type(y)
        if isinstance(x, np.ndarray):
            assert same_bits(x, y)
        elif not isinstance(x, adaattn.Plan):
            assert x == y


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


def test_table(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "rich")
    query, key, value = inputs(rng, SHAPE)
    value[0, 1] = 1e30
    _, report = adaattn.attention(query, key, value, precision=("int16", "int8"), return_report=True)
    lines = [line.split() for line in report.table().splitlines()]
    assert lines[0] == ["batch", "head", "precision", "retried"]
    assert lines[1:3] == [["0", "0", "int16/int8"], ["0", "1", "int16/int8"]]
    assert lines[3:5] == [["0", "2", "fp32", "yes"], ["0", "3", "fp32", "yes"]]
    assert lines[-1][:2] == ["execute", lines[-1][1]] and lines[-1][-1] == "GFLOP"
    assert len(lines) == 1 + SHAPE.B * SHAPE.H + 1


def measured(rng: np.random.Generator, **options: Any) -> adaattn.Report:
    """Of six heads, verified where a cheaper rung pays."""
    arrays = rng.standard_normal((3, 1, 6, 256, 64), dtype=F32)
    return adaattn.attention(*arrays, **{"tolerance": 1e-2} | options, return_report=True)[1]


@pytest.mark.usefixtures("every_rung_pays")
def test_table_with_a_tolerance(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "rich")
    report = replace(measured(rng), entropy=np.full((1, 6), np.nan))
    lines = [line.split() for line in report.table().splitlines()]
    assert lines[0][:6] == ["head", "precision", "predicted", "measured", "limit", "rows"]
    assert not {"batch", "structure", "rank", "kept", "bound", "entropy"} & set(lines[0])
    assert lines[1][0] == "0" and lines[1][1] == report.precision_qk[0, 0]
    assert abs(float(lines[1][3]) / report.measured_error[0, 0] - 1) < 0.05
    assert lines[1][5] == str(report.verified_rows[0, 0])
    assert "tolerance 1e-2;" in report.table().splitlines()[-1]
    assert max(map(len, report.table().splitlines()[:-1])) < 100


def test_table_shows_what_is_not_plain(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "rich")
    structure, rank, kept = np.full((1, 6), "dense"), np.zeros((1, 6), int), np.ones((1, 6))
    structure[0, 1], rank[0, 1], kept[0, 2] = "low_r", 32, 0.25
    report = replace(measured(rng), structure=structure, rank=rank, kept_fraction=kept)
    header, *rows = report.table().splitlines()
    assert {"structure", "rank", "kept"} <= set(header.split())
    assert rows[1].split()[2:5] == ["low_r", "32", "1"] and "0.25" in rows[2].split()


@pytest.mark.parametrize("notebook", [False, True])
def test_table_of_rich(notebook: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: notebook)  # there, rich would show it by itself
    report = measured(rng)
    lines = report.table().splitlines()
    assert len(lines) == 1 + 1 + 6 + 1 and set(lines[1]) <= {"\u2500", " "}
    assert lines[0].split()[:3] == ["head", "precision", "predicted"]
    assert "\x1b" not in report.table()


def strict(text: str) -> Any:
    """JSON without NaN and infinities, which Python's parser takes too."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_json(rng: np.random.Generator) -> None:
    limit = np.array([[np.inf, np.nan, -np.inf, 1e-3, 0, 1]])
    report = replace(measured(rng), error_limit=limit)
    read = strict(report.to_json())
    assert read.keys() == {field.name for field in fields(report)}
    assert read["error_limit"] == [["Infinity", None, "-Infinity", 1e-3, 0, 1]]
    assert read["precision_qk"] == report.precision_qk.tolist()
    assert read["retried"] == report.retried.tolist() and read["seconds"] == report.seconds
    assert report.plan is not None and read["plan"] == strict(report.plan.to_json())
    assert strict(replace(report, plan=None).to_json())["plan"] is None


def test_html(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "rich")
    report = replace(measured(rng), structure=np.full((1, 6), "<&>"))
    text = report._repr_html_()
    assert text.count("<tr>") == text.count("</tr>") == 1 + 6
    assert "<td>&lt;&amp;&gt;</td>" in text and "<td>0</td>" in text
    ElementTree.fromstring(text)


@pytest.mark.usefixtures("every_rung_pays")
@pytest.mark.parametrize(
    "options", [{}, {"tolerance": None}, {"tolerance": None, "precision": "int8"}], ids=str
)
def test_plot(options: dict[str, Any], rng: np.random.Generator, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = measured(rng, **options)
    figure = report.plot()
    figure.savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5_000
    assert figure._repr_png_().startswith(b"\x89PNG")  # what notebooks show
    rungs, errors = figure.axes
    (image,) = rungs.images
    names = [text.get_text() for text in rungs.get_legend().get_texts()]
    assert [names[i] for i in np.asarray(image.get_array()).ravel()] == report.precision_qk.ravel().tolist()
    labels = errors.get_legend_handles_labels()[1]
    if report.plan is None:
        assert labels == [] and errors.texts
    else:
        assert labels == ["promised", "predicted", "measured", "up to its limit"]
        lines = {line.get_label(): line.get_ydata() for line in errors.lines}
        assert set(lines["promised"]) == {report.plan.tolerance}
        assert (lines["measured"] == report.measured_error.ravel()).all()
        assert errors.get_yscale() == "log"


def test_plot_without_matplotlib(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "matplotlib", "matplotlib.colors", "matplotlib.figure", "matplotlib.patches")
    with pytest.raises(ImportError, match=r"^Report.plot needs matplotlib: pip install adaattn\[plots\]$"):
        measured(rng).plot()


def test_phases_are_the_whole_call(rng: np.random.Generator) -> None:
    start = time.perf_counter()
    report = measured(rng)
    assert 0 < sum(report.seconds.values()) < time.perf_counter() - start
    assert list(report.seconds) == ["probe", "plan", "execute", "verify"]


def test_references_are_given_back(rng: np.random.Generator) -> None:
    arrays = inputs(rng, SHAPE)

    def count() -> int:
        before = sys.getallocatedblocks()
        for _ in range(200):
            adaattn.attention(*arrays, return_lse=True, return_report=True, precision="bf16", causal=True)
            plan = adaattn.attention(*arrays, tolerance=1e-2, return_report=True)[1].plan
            adaattn.attention(*arrays, plan=plan)
            with contextlib.suppress(adaattn.ArgumentError):
                adaattn.attention(*(x[:, :, :64] for x in arrays), plan=plan)
        gc.collect()
        return sys.getallocatedblocks() - before

    # A lost reference is lost in every round; what the interpreter keeps for reuse grows in some.
    count()
    assert min(count() for _ in range(4)) < 100
