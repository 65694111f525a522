"""calibrate, cpu_info()["rates"] and the file between them."""

import json
import os

import numpy as np
import pytest

import adaattn
from adaattn import calibration, rates


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and nothing kept from it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "_table", None)
    return tmp_path


def test_defaults_are_built_in():
    info = adaattn.cpu_info()["rates"]
    assert info["source"] == "default"
    assert set(info["gflops"]) == set(rates.RUNGS)
    assert set(info["pack_ns"]) == set(rates.RUNGS)
    assert info["offered"][:2] == ["fp64", "fp32"]
    assert not rates.cache_file().exists()


def test_calibrate_measures_and_saves():
    result = adaattn.calibrate(seconds=0.01)
    assert result["source"] == "measured"
    assert all(rate > 0 for by_size in result["gflops"].values() for rate in by_size.values())
    assert all(0 <= pack < 1e3 for pack in result["pack_ns"].values())
    assert all(0 < left <= 1 for left in result["sparse"].values())
    may = {name.removeprefix("gauge_") for name in adaattn.cpu_info()["kernels"] if name.startswith("gauge_")}
    sparse = {rung for rung in rates.RUNGS if calibration.SparseRun(rung).runs_sparse()}
    assert {rung.rpartition("/")[2].replace("int", "i") for rung in sparse} == may
    left = {rung: result["sparse"][rung] for rung in rates.RUNGS}
    assert all(left[rung] == 1 for rung in rates.RUNGS if rung not in sparse)
    # Each by itself may be measured in bad company.
    assert not sparse or min(left[rung] for rung in sparse) < 1
    assert adaattn.cpu_info()["rates"] == result
    assert os.listdir(rates.cache_file().parent) == [rates.cache_file().name]


def test_calibrate_without_saving():
    before = rates.table()
    adaattn.calibrate(seconds=0.01, save=False)
    assert adaattn.cpu_info()["rates"]["source"] == "default"
    assert rates.table() is before


def test_calls_go_by_what_was_measured(monkeypatch):
    """At once, and in later processes."""
    rates.table()
    result = adaattn.calibrate(seconds=0.01)
    expected = [
        [*result["gflops"][rung].values(), result["pack_ns"][rung], result["sparse"][rung]]
        for rung in rates.RUNGS
    ]
    assert (rates.table() == expected).all()
    monkeypatch.setattr(rates, "_table", None)
    assert (rates.table() == expected).all()


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), "fast", None])
def test_rates_that_make_no_sense_do_not_count(rate):
    adaattn.calibrate(seconds=0.01)
    saved = json.loads(rates.cache_file().read_text())
    saved["gflops"]["bf16"]["64"] = rate
    rates.cache_file().write_text(json.dumps(saved))
    assert adaattn.cpu_info()["rates"]["source"] == "default"


@pytest.mark.parametrize("key", ["version", "cpu", "microcode", "isa"])
def test_another_machines_rates_do_not_count(key):
    adaattn.calibrate(seconds=0.01)
    saved = json.loads(rates.cache_file().read_text())
    saved["machine"][key] = "another"
    rates.cache_file().write_text(json.dumps(saved))
    assert adaattn.cpu_info()["rates"]["source"] == "default"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": 1}', '{"gflops"'])
def test_a_broken_file_does_not_count(text):
    rates.cache_file().parent.mkdir()
    rates.cache_file().write_text(text)
    assert adaattn.cpu_info()["rates"]["source"] == "default"


def offered(**rows):
    """Of rungs that are all as fast as fp64, but for some."""
    return rates._offered(np.array([rows.get(rung, (100.0, 100.0, 0.0)) for rung in rates.RUNGS]))


def test_slower_than_a_more_exact_one_is_not_offered():
    assert offered() == ["fp64"]
    assert offered(int16=(180, 180, 0), bf16=(150, 185, 0)) == ["fp64", "int16"]
    assert offered(int16=(180, 180, 0), bf16=(150, 195, 0)) == ["fp64", "int16", "bf16"]


def test_packing_counts_for_what_is_offered():
    """At 1024 queries: 10 ns for each of 2 * 1024 operations halve a rate of 205."""
    assert offered(int8=(205, 205, 9)) == ["fp64", "int8"]
    assert offered(int8=(205, 205, 10)) == ["fp64"]


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "3", None])
def test_seconds_must_be_positive(seconds):
    with pytest.raises(adaattn.ArgumentError, match=r"seconds: expected a number above 0, got"):
        adaattn.calibrate(seconds=seconds)
