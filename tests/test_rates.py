"""calibrate, cpu_info()["rates"] and the file between them."""

import json
import os

import pytest

import adaattn
from adaattn import rates


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_defaults_are_built_in():
    info = adaattn.cpu_info()["rates"]
    assert info["source"] == "default"
    assert set(info["gflops"]) == set(rates.RUNGS)
    assert info["offered"][0] == "fp32"
    assert not rates.cache_file().exists()


def test_calibrate_measures_and_saves():
    result = adaattn.calibrate(seconds=0.01)
    assert result["source"] == "measured"
    assert all(rate > 0 for by_size in result["gflops"].values() for rate in by_size.values())
    assert adaattn.cpu_info()["rates"] == result
    assert os.listdir(rates.cache_file().parent) == [rates.cache_file().name]


def test_calibrate_without_saving():
    adaattn.calibrate(seconds=0.01, save=False)
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


def test_slower_than_a_more_exact_one_is_not_offered():
    flat = {rung: dict.fromkeys(rates.HEAD_SIZES, 100.0) for rung in rates.RUNGS}
    assert rates._offered(flat) == ["fp32"]
    faster = {**flat, "int16": dict.fromkeys(rates.HEAD_SIZES, 180.0), "bf16": {64: 150.0, 128: 185.0}}
    assert rates._offered(faster) == ["fp32", "int16"]


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "3", None])
def test_seconds_must_be_positive(seconds):
    with pytest.raises(adaattn.ArgumentError, match=r"seconds: expected a number above 0, got"):
        adaattn.calibrate(seconds=seconds)
