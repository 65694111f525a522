"""What a call tells about its own work."""

from __future__ import annotations

import pickle
import sys
from dataclasses import FrozenInstanceError, fields

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
    again = pickle.loads(pickle.dumps(report))
    for field in fields(report):
        assert same_bits(getattr(again, field.name), getattr(report, field.name))


def test_table(rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, SHAPE)
    value[0, 1] = 1e30
    _, report = adaattn.attention(query, key, value, precision=("int16", "int8"), return_report=True)
    lines = [line.split() for line in report.table().splitlines()]
    assert lines[0] == ["batch", "head", "precision_qk", "precision_pv", "retried"]
    assert lines[1:3] == [["0", "0", "int16", "int8"], ["0", "1", "int16", "int8"]]
    assert lines[3:5] == [["0", "2", "fp32", "fp32", "yes"], ["0", "3", "fp32", "fp32", "yes"]]
    assert len(lines) == 1 + SHAPE.B * SHAPE.H


def test_references_are_given_back(rng: np.random.Generator) -> None:
    arrays = inputs(rng, SHAPE)

    def count() -> int:
        before = sys.getallocatedblocks()
        for _ in range(200):
            adaattn.attention(*arrays, return_lse=True, return_report=True, precision="bf16", causal=True)
        return sys.getallocatedblocks() - before

    count()
    assert count() < 100
