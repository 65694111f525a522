"""The promise of a tolerance: on Gaussian, real and adversarial heads, and where a kernel is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import adaattn
from adaattn import _adaattn, rates

sys.path.append(str(ROOT / "benchmarks"))
import heads as library

TOLERANCES = (1e-5, 1e-4, 1e-3, 1e-2, 5e-2)
OUTPUT = 2.0**-24  # rounding of a float32 output


@pytest.fixture(autouse=True, params=["avx512bf16", "amx"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rates of a machine on which every rung may pay; the rungs themselves run anywhere."""
    table = np.array([rates._DEFAULTS[request.param][rung] for rung in rates.RUNGS])
    monkeypatch.setattr(rates, "_table", table)
    return str(request.param)


def all_heads() -> Iterator[library.Heads]:
    for sigma in library.SIGMAS:
        yield library.gaussian(sigma, 256, 256, 32, heads=2)
        yield library.gaussian(sigma, 200, 330, 48, heads=2, causal=True)
    yield from library.bundled(512)
    for size in (96, 512):
        yield from library.adversarial(size, size, 64)


@pytest.fixture(scope="module")
def exact_heads() -> list[tuple[library.Heads, Any, Any]]:
    return [(heads, *heads.exact(return_lse=True)) for heads in all_heads()]


@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_every_head_keeps_it(tolerance: float, exact_heads: list[tuple[library.Heads, Any, Any]]) -> None:
    rungs = set()
    for heads, exact, _ in exact_heads:
        out, report = heads.attend(tolerance=tolerance, return_report=True)
        error = library.errors(out, exact)
        assert (error <= tolerance + OUTPUT).all(), (heads.name, error, report.table())
        known = report.verified_rows > 0
        assert (np.isnan(report.measured_error) == ~known).all()
        assert (report.measured_error[known] <= report.error_limit[known]).all()
        rungs |= set(report.precision_qk.flat)
    assert "fp32" in rungs if tolerance == 1e-5 else len(rungs) > 1


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2, 5e-2])
def test_lse_keeps_it(tolerance: float, exact_heads: list[tuple[library.Heads, Any, Any]]) -> None:
    for heads, exact, exact_lse in exact_heads:
        out, lse = heads.attend(tolerance=tolerance, return_lse=True)
        assert (library.errors(out, exact) <= tolerance + OUTPUT).all()
        assert (np.abs(lse - exact_lse) <= np.maximum(tolerance, 4e-7 * np.abs(exact_lse))).all(), heads.name


@pytest.mark.parametrize("factor", [1.05, 0.0])
def test_a_wrong_kernel_is_caught(factor: float) -> None:
    heads = library.gaussian(1.0, 512, 512, 64, heads=3)
    exact = heads.exact()
    first = heads.attend(tolerance=1e-2, return_report=True)[1]
    assert (first.precision_qk != "fp32").all() and not first.retried.any()
    _adaattn._narrow_fault(factor)
    try:
        out, report = heads.attend(tolerance=1e-2, return_report=True)
        with pytest.raises(adaattn.NumericalError, match=r"of at most 0\.01 in every head"):
            heads.attend(tolerance=1e-2, precision="bf16")
    finally:
        _adaattn._narrow_fault(1.0)
    assert report.retried.all() and (report.precision_qk == "fp32").all()
    assert (library.errors(out, exact) <= 1e-2).all()


def test_heads_in_fp32_are_predicted_and_measured() -> None:
    """Their own errors lie in few rows; statistics alone, or four rows, say little of them."""
    predicted: list[float] = []
    measured: list[float] = []
    some = [
        library.gaussian(x, 512, 512, heads=4, causal=causal)
        for x in library.SIGMAS
        for causal in (False, True)
    ]
    for heads in (*some, *library.bundled(512)):
        out, report = heads.attend(tolerance=1e-5, min_precision="fp32", return_report=True)
        plain = report.precision_qk == "fp32"
        true = library.errors(out, heads.exact())[plain]
        assert (report.verified_rows[plain] >= 8).all()
        assert (report.error_limit >= 1.2 * report.predicted_error)[plain].all()
        predicted += (report.predicted_error[plain] / true).tolist()
        measured += (report.measured_error[plain] / true).tolist()
    for off, factor, least in ((predicted, 3, 0.98), (measured, 2, 0.95)):
        assert len(off) > 50 and np.mean(np.abs(np.log(off)) < np.log(factor)) >= least, sorted(off)


def test_rows_that_say_too_little_are_drawn_again() -> None:
    heads = next(h for h in library.adversarial(512, 512, 64) if "hard rows" in h.name)
    out, report = heads.attend(tolerance=1e-5, min_precision="fp32", return_report=True)
    assert (report.precision_qk == "fp32").all() and not report.retried.any()
    assert (2 * report.measured_error < report.predicted_error).all() and (report.verified_rows == 16).all()
    true = library.errors(out, heads.exact())
    assert (report.measured_error > true / 2).all() and (report.error_limit > true).all()


def test_what_rows_do_not_weigh_is_not_predicted_by() -> None:
    """Sinks leave a part of a row's weights to its keys; a mask hides values, whatever they are."""
    heads = library.gaussian(1, 512, 512, heads=4)
    padded = np.arange(512) < 300
    value = heads.value * np.where(padded, 1, 1e6).astype(np.float32)[:, None]
    some = {"sinks": np.array([-np.inf, 0, 10, 18])}, {"attn_mask": padded[None]}
    for options in (*some, {"attn_mask": np.where(padded, 0, -np.inf).astype(np.float32)[None]}):
        arrays = heads.query, heads.key, heads.value if "sinks" in options else value
        out, report = adaattn.attention(
            *arrays, tolerance=1e-4, min_precision="fp32", return_report=True, **options
        )
        exact = adaattn.attention(*(x.astype(np.float64) for x in arrays), **options)
        off = report.predicted_error / library.errors(out, exact)
        assert (report.precision_qk == "fp32").all() and not report.retried.any(), report.table()
        assert (np.abs(np.log(off)) < np.log(3)).all(), off


def test_values_that_cancel_go_to_fp64() -> None:
    heads = next(h for h in library.adversarial(256, 256, 64) if "cancel" in h.name)
    out, report = heads.attend(tolerance=1e-5, return_report=True)
    assert (report.precision_qk == "fp64").all()
    assert (library.errors(out, heads.exact()) <= 1e-5).all()
