"""The benchmark suite: what it measures, keeps, shows and compares."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adaattn
from adaattn import cli
from adaattn.bench import changes, contenders, figures, heads, page, results, suite, timing
from adaattn.bench.results import Block, Head, Row, Run
from adaattn.nn import files

TINY = suite.Scope(
    shapes=((1, 128, 64, 2),), kinds=("gaussian", "smooth"), sweep=(64, 256), bytes=192, tokens=(), blocks=2,
    rounds=1, sample=1e-5, case=0.02,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All sections on tiny sizes, with heads of a file."""
    path = tmp_path_factory.mktemp("heads") / "own.npz"
    rng = np.random.default_rng(0)
    np.savez(path, q=rng.standard_normal((1, 4, 96, 16)), k=rng.standard_normal((1, 2, 160, 16)),
             v=rng.standard_normal((1, 2, 160, 24)))  # fmt: skip
    steps: list[tuple[str, float]] = []
    found = suite.run(
        TINY,
        threads=1,
        given=[heads.from_file(str(path))],
        progress=lambda step, done: steps.append((step, done)),
    )
    assert [done for _, done in steps] == sorted(done for _, done in steps) and steps[-1][1] == 1
    return found


# ---- what is measured


def test_every_contender_takes_part(run: Run) -> None:
    present = [name for name in contenders.LABELS if name not in run.left_out]
    assert {"dense", "structure", "precision", "both", "numpy"} <= set(present)
    for kind in TINY.kinds:
        shapes = [row for row in run.pick("shapes") if row.heads == kind]
        assert [row.name for row in shapes] == present
        assert all(row.shape == [1, 2, 128, 128, 32] for row in shapes)
        assert [row.shape[3] for row in run.pick("sweep", "both") if row.heads == kind] == [64, 256]
    assert [row.heads for row in run.pick("real", "both")] == [
        "own", *(f"bytelm 192, layer {i}" for i in range(4))
    ]  # fmt: skip


def test_rows_agree_with_themselves(run: Run) -> None:
    for row in run.rows:
        B, H, T, S, D = row.shape
        assert row.seconds_q1 <= row.seconds <= row.seconds_q3
        assert [block.seconds for block in row.blocks] == row.samples and len(row.samples) == 2
        assert ("ceilings" in run.left_out) or all(block.peak_seconds > 0 for block in row.blocks)
        E = 24 if row.heads == "own" else D
        pairs = T * (T + 1) // 2 if row.causal else T * S
        assert row.tflops * row.seconds * 1e12 == pytest.approx(2 * B * H * pairs * (D + E))
        assert 0 < row.error < 1 and row.threads == 1
        assert (row.promised is None) == (row.name not in ("structure", "precision", "both"))
        assert len(row.choices) == (B * H if row.name in contenders.CONFIGURATIONS else 0)
        assert row.over_torch is None or row.over_torch_q1 <= row.over_torch <= row.over_torch_q3
        if row.name == "dense":
            assert row.over_dense == 1 and row.rungs == {"fp32": B * H}


def test_configurations_are_what_they_say(run: Run) -> None:
    """Structure alone stays in fp32, precision alone is dense, and promises are kept."""
    assert run.broken == []
    for row in run.rows:
        rungs, structures = ({getattr(head, name) for head in row.choices} for name in ("rung", "structure"))
        if row.name == "structure":
            assert rungs == {"fp32"}
        if row.name == "precision":
            assert structures == {"dense"}
    if "bf16" in adaattn.cpu_info()["rates"]["offered"]:
        assert any(head.rung != "fp32" for row in run.pick("sweep", "both") for head in row.choices)


def test_ceilings_and_memory(run: Run) -> None:
    if "ceilings" in run.left_out or "memory" in run.left_out:
        pytest.skip("no compiler or no /proc")
    assert run.ceilings["FMA peak"] > 1 and run.ceilings["read"] > 0.1
    rows = run.pick("sweep")
    assert [row.name for row in rows if row.memory is None] == []
    assert all(row.peak_share > 0 for row in rows)
    assert all(row.unit_share == pytest.approx(row.peak_share) for row in rows if row.name == "dense")
    assert max(row.memory for row in rows if row.name == "dense") < 8e6


def test_spectra_and_front(run: Run) -> None:
    names = {one.heads for one in run.spectra}
    assert {"own, head 3", "bytelm 192, layer 3, head 0", "gaussian 2", "built smooth"} <= names
    for one in run.spectra:
        assert 0 <= one.entropy <= math.log(one.keys) and 1 <= one.rank <= one.rows
        assert one.seconds > 0 < one.dense_seconds
    smooth, sharp = (
        next(s for s in run.spectra if s.heads == name) for name in ("built smooth", "gaussian 4")
    )
    assert smooth.rank < 20 < sharp.rank and smooth.entropy > sharp.entropy
    by_name = [point for point in run.front if point.tolerance is None]
    assert [point.name for point in by_name] == list(adaattn.rates.RUNGS)
    planned = [point for point in run.front if point.planned]
    assert len(planned) == 8 and all(point.error <= point.tolerance for point in planned)


def test_memory_is_seen() -> None:
    """NumPy keeps all weights of a head at once, dense attention does not."""
    from adaattn.bench.memory import MemoryMeter

    try:
        meter = MemoryMeter(())
    except OSError as why:
        pytest.skip(str(why))
    made = heads.gaussian(1, 2048, 2048, heads=1)
    numpys, ours = (meter.measure(name, made, 1e-2, 1) for name in ("numpy", "dense"))
    broken = meter.measure("nobody", made, 1e-2, 1)
    meter.close()
    assert numpys > 2048 * 2048 * 4 > 4 * ours and broken is None


def test_turns_rotate_and_end() -> None:
    order: list[str] = []

    def runner(name: str, seconds: float, limit: float = math.inf) -> timing.Runner:
        return timing.Runner(name, lambda calls: order.append(name) or seconds, limit=limit)

    a, b, c = runner("a", 2.0), runner("b", 1.0), runner("c", 4.0, limit=7)
    timing.take_turns([a, b, c], 3)
    assert "".join(order) == "abcbcaab"
    assert timing.ratio(a, b) == (2, 2, 2) and len(c.samples) == 2
    timing.take_turns([b], 5, budget=0)
    assert len(b.samples) == 4


# ---- heads of files


def test_heads_of_files(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float16)
    files.write(tmp_path / "a.safetensors", {"query": x, "key": x, "value": x}, {})
    found = heads.from_file(str(tmp_path / "a.safetensors"), causal=True)
    assert found.name == "a" and found.query.shape == (1, 3, 5, 4) and found.query.dtype == np.float32
    assert found.options == {"causal": True} and (found.query[0] == x).all()


def bad_files(folder: Path) -> dict[str, str]:
    """Name of a bad file to what is said about it."""
    x = np.ones((1, 2, 8, 4), np.float32)
    np.savez(folder / "names.npz", a=x)
    np.savez(folder / "kind.npz", q=x.astype(int), k=x, v=x)
    np.savez(folder / "rank.npz", q=x[None], k=x, v=x)
    np.savez(folder / "sizes.npz", q=x, k=x[..., :3], v=x)
    np.savez(folder / "groups.npz", q=x, k=np.ones((1, 3, 8, 4)), v=np.ones((1, 3, 8, 4)))
    (folder / "text.npz").write_text("text")
    (folder / "text.safetensors").write_text("text")
    (folder / "other.txt").write_text("text")
    return {
        "names.npz": "expected arrays query, key and value in .*, got a",
        "kind.npz": "expected query to be floating",
        "rank.npz": "of 2 to 4 dimensions, got float32 of shape",
        "sizes.npz": r"got \(1, 2, 8, 4\), \(1, 2, 8, 3\)",
        "groups.npz": "H a multiple of G",
        "text.npz": "expected an .npz file",
        "text.safetensors": "expected a whole safetensors file, got .*text.safetensors",
        "other.txt": "expected a name that ends in .npz or .safetensors",
    }


def test_bad_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(adaattn.ArgumentError, match=f"--heads: .*{message}"):
            heads.from_file(str(tmp_path / name))
    for name in ("none.npz", "none.safetensors"):
        assert cli.main(["bench", "--heads", str(tmp_path / name)]) == 1
        assert name in capsys.readouterr().err


# ---- files and pictures


def test_heads_of_the_bundled_model_of_any_length() -> None:
    assert next(heads.bundled(1)).query.shape == (1, 4, 1, 64)
    for length in (0, 10**7):
        with pytest.raises(adaattn.ArgumentError, match=f"^length: expected 1 to .*, got {length}$"):
            next(heads.bundled(length))


def test_json_is_the_run(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    results.save_json(run, path)
    assert json.loads(path.read_text())["format"] == "adaattn-bench-2"
    assert asdict(results.load(str(path))) == asdict(run)
    assert asdict(results.merge([run, run])) == asdict(run)
    faster = replace(run, ceilings={name: 2 * x for name, x in run.ceilings.items()})
    assert results.merge([faster, run]).ceilings == faster.ceilings


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda document: [document], "no format"),
        (lambda document: document | {"format": "other"}, "no format"),
        (lambda document: document | {"more": 1}, "run without the fields date, machine"),
        (lambda document: document | {"threads": "2"}, "run.threads = '2'"),
        (lambda document: document | {"rows": [document["rows"][0] | {"seconds": []}]}, r"rows\[0\].seconds"),
        (lambda document: document | {"front": {}}, "run.front = {}"),
    ],
)
def test_spoilt_json_is_refused(run: Run, spoil: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    results.save_json(run, path)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(adaattn.ArgumentError, match=message):
        results.load(str(path))
    path.write_text("no json")
    with pytest.raises(adaattn.ArgumentError, match="expected what `adaattn bench --json` writes"):
        results.load(str(path))


def test_csv_has_every_row(run: Run, tmp_path: Path) -> None:
    results.save_csv(run, tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(run.rows)
    for line, row in zip(lines, run.rows, strict=True):
        assert float(line["seconds"]) == row.seconds and line["name"] == row.name
        assert line["shape"] == " ".join(map(str, row.shape)) and int(line["rounds"]) == len(row.samples)
        assert line["promised"] == ("" if row.promised is None else str(row.promised))
        assert ("fp32" in line["rungs"]) == ("fp32" in " ".join(row.rungs))


def test_figures_and_page(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure as SVG and PNG; the page holds them in both themes and every row, and needs nothing."""
    pytest.importorskip("matplotlib")
    themes = figures.THEMES
    monkeypatch.setattr(figures, "THEMES", themes[1:])  # the page has both
    paths = figures.save(run, tmp_path / "new")
    monkeypatch.setattr(figures, "THEMES", themes)
    expected = {name for name, (_, has_data, _) in figures.FIGURES.items() if has_data(run)}
    assert expected >= {"sweep", "front", "choices", "spectra"}
    assert {path.name for path in paths} == {
        f"{name}-dark.{suffix}" for name in expected for suffix in ("svg", "png")
    }  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in paths)
    text = page.render(run)
    assert text.count("<picture>") == len(expected) and 'name="viewport"' in text
    assert text.count("data:image/svg+xml") == 2 * len(expected)
    assert not re.findall(r'(?:src|srcset|href)="(?!data:)', text) and "http" not in text.split("<h1>")[1]
    assert text.count("<tr") - text.count("<th colspan") == sum(1 + len(t.rows) for t in page.tables(run))
    assert text.count("<th colspan") == len(run.rows) / len({row.name for row in run.rows})


def test_page_escapes(run: Run) -> None:
    pytest.importorskip("matplotlib")
    named = replace(run, rows=[replace(run.rows[0], heads="<b>&")], front=[], spectra=[])
    assert "&lt;b&gt;&amp;" in page.render(named)


# ---- the command


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "QUICK", replace(TINY, kinds=("gaussian", "smooth"), quick=True))


@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.usefixtures("tiny")
def test_command(
    rich: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables on stdout, a bar on a terminal's stderr, files as asked for, and the same from a saved run."""
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    saved, sheet = tmp_path / "run.json", tmp_path / "run.csv"
    arguments = ["bench", "--quick", "--sections", "shapes", "sweep", "front", "--kinds", "gaussian"]
    arguments += ["--lengths", "96", "--threads", "1", "--tolerance", "0.05"]
    assert cli.main([*arguments, "--json", str(saved), "--csv", str(sheet)]) == 0
    printed = capsys.readouterr()
    assert "Shapes of made heads" in printed.out and "adaptive precision" in printed.out
    # rich draws ten times a second: a step may pass between two pictures
    assert ("100%" if rich else "front: bytelm 192, layer 1") in printed.err
    assert ("[####" in printed.err) is not rich
    found = results.load(str(saved))
    assert sheet.exists() and found.tolerance == 0.05 and found.quick
    assert {row.heads for row in found.rows} == {"gaussian"}
    assert {row.shape[3] for row in found.pick("sweep")} == {96}
    assert cli.main(["bench", "--load", str(saved)]) == 0
    assert capsys.readouterr().out == printed.out
    assert cli.main(["bench", "--compare", str(saved), str(saved)]) == 0
    assert "slower" not in capsys.readouterr().out


def test_command_tells_of_a_broken_promise(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = replace(run.pick("shapes", "both")[0], error=0.5)
    results.save_json(replace(run, rows=[row]), tmp_path / "run.json")
    assert cli.main(["bench", "--load", str(tmp_path / "run.json")]) == 1
    assert "expected an error of at most 0.01, got 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "shape"], "--sections: expected names among shapes, sweep, real, spectra, front"),
        (["--kinds", "other"], "--kinds: expected names among gaussian, sparse, smooth, got 'other'"),
        (["--tolerance", "0"], "--tolerance: expected a number between 0 and 1, got 0"),
        (["--tolerance", "nan"], "--tolerance: expected a number between 0 and 1, got nan"),
        (["--lengths", "64", "0"], "--lengths: expected at least 1, got 0"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--causal"], "--causal: expected --heads beside it, got none"),
        (["--json", "/no/such/folder/x.json"], "--json: expected a folder that exists"),
        (["--load", "/no/such/file"], "No such file"),
        (["--compare", "/no/such/file", "/no/such/file"], "No such file"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for arguments in (["--plot", "x"], ["--html", "x.html"]):
        assert cli.main(["bench", *arguments]) == 1
        assert "run `pip install adaattn[plots]`" in capsys.readouterr().err


# ---- profiles

SCRIPT = """
import sys
import numpy as np, adaattn
from adaattn import nn

print(*sys.argv[1:])
model = nn.Transformer(256, num_layers=2, num_heads=2, embed_dim=64)
for length in (64, 128, 96):
    model(np.ones((1, length), int))
x = np.random.default_rng(0).standard_normal((1, 2, 512, 64), np.float32)
adaattn.attention(x, x, x, causal=True, num_threads=1)
adaattn.attention(x[:, :, :8], x, x)
x[:] = np.nan
"""


def test_profile_of_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its largest call of each module and line, copied; what it prints and what it is given are its own."""
    script = tmp_path / "own.py"
    script.write_text(SCRIPT)
    before = adaattn.attention, adaattn.api.attention
    command = ["profile", str(script), "--json", "--tolerances", "1e-2", "0.3", "--", "--json", "x"]
    assert cli.main(command) == 0
    assert (adaattn.attention, adaattn.api.attention) == before
    arguments, _, printed = capsys.readouterr().out.partition("\n")
    assert arguments == "--json x"
    found = json.loads(printed)
    assert found["few"] == 1 and found["foreign"] == 0 and found["subject"] == str(script)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert list(layers) == ["DenseAttention", "DenseAttention (1)", "own.py:11"]
    assert [layer["calls"] for layer in layers.values()] == [3, 3, 1]
    assert [layer["shape"][2] for layer in layers.values()] == [128, 128, 512]
    for layer in layers.values():
        assert [one["tolerance"] for one in layer["within"]] == [0.01, 0.3]
        assert layer["seconds"] > 0 and layer["dtype"] == "float32"
        for one in layer["within"]:
            assert one["seconds"] > 0 < one["speedup"] and len(one["heads"]) == layer["shape"][1]
            for head in one["heads"]:
                assert head["measured"] is None or head["measured"] <= one["tolerance"]
                assert head["cheaper"] == (head["rung"] not in ("fp32", "fp64"))
                assert head["saves"] is None or head["saves"] < 1
    if "int8" in adaattn.cpu_info()["rates"]["offered"]:
        loose = layers["own.py:11"]["within"][1]["heads"]
        assert all(head["rung"] == "int8" and head["saves"] > 0.2 for head in loose)


def test_profile_of_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch's own modules are named by their place in the model, and torch is left as it was."""
    torch = pytest.importorskip("torch")
    script = tmp_path / "own.py"
    script.write_text(
        "import torch\n"
        "layer = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True)\n"
        "model = torch.nn.TransformerEncoder(layer, 2).eval()\n"
        "with torch.inference_mode():\n"
        "    model(torch.randn(1, 80, 32))\n"
    )
    before = torch.nn.functional.scaled_dot_product_attention
    assert cli.main(["profile", str(script), "--tolerances", "0.05"]) == 0
    assert torch.nn.functional.scaled_dot_product_attention is before
    assert torch.backends.mha.get_fastpath_enabled()
    printed = capsys.readouterr().out
    assert "layers.0.self_attn" in printed and "layers.1.self_attn" in printed
    assert "1,2,80,16" in printed and "cheaper at 0.05" in printed
    # Where nothing is faster than fp32, as on plain kernels, no rung is listed.
    assert ("of the largest calls" in printed) != ("on this machine: nothing" in printed)


def test_profile_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a tokenizer reads random tokens, as many as it may."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=72,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    assert cli.main(["profile", str(tmp_path / "model"), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["name"] for layer in layers] == [f"encoder.layer.{i}.attention.self" for i in range(2)]
    assert all(layer["shape"] == [1, 2, 72, 72, 16] and layer["calls"] == 1 for layer in layers)
    assert cli.main(["profile", str(tmp_path / "model"), "--text", str(tmp_path / "model/config.json")]) == 1
    assert "--text: expected a tokenizer in" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["profile", str(tmp_path / "empty")]) == 1
    assert "expected a model of transformers" in capsys.readouterr().err


def test_profile_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet, failing = tmp_path / "quiet.py", tmp_path / "failing.py"
    quiet.write_text("")
    failing.write_text("raise SystemExit(3)")
    for arguments, message in (
        (["nowhere.py"], "expected a Python script or a model's folder"),
        ([str(quiet)], "got 0 calls with fewer and 0 on a GPU"),
        ([str(failing)], "expected exit code 0, got 3"),
        ([str(quiet), "--tolerances", "0"], "tolerance"),
        ([str(quiet), "--tokens", "0"], "--tokens: expected at least 9, got 0"),
    ):
        assert cli.main(["profile", *arguments]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["info", "--", "more"])


# ---- comparisons


def made(
    factors: dict[str, float] | None = None, *, scatter: float = 0.01, drift: float = 1.0, seed: int = 0,
    torch: bool = True, peak: bool = True,
) -> Run:  # fmt: skip
    """A run of six shapes whose true times are known, but for what the machine did: blocks of the same row
    differ by `scatter`, and whole blocks by 20 %."""
    rng = random.Random(seed)
    true = {"dense": 2.0, "both": 1.0, "onnxruntime": 3.0, "numpy": 6.0, "torch": 2.5, "peak": 1.0}
    rows = []
    for case in range(6):
        paces = [drift * math.exp(rng.gauss(0, 0.2)) for _ in range(2)]
        seconds = {}
        for name, x in true.items():
            x *= (factors or {}).get(name, 1)
            seconds[name] = [x * pace * math.exp(rng.gauss(0, scatter)) for pace in paces]
        peaks = seconds.pop("peak")
        if not torch:
            del seconds["torch"]
        for name, own in seconds.items():
            shape = [1, 1, 64 + case, 64, 64]
            row = Row("shapes", "gaussian", shape, False, 2, name, own[0], own[0], own[0], 1.0, 1e-3)
            row.blocks = [Block(x, y if peak else None) for x, y in zip(own, peaks, strict=True)]
            if name == "both":
                row.promised, row.memory = 1e-2, 4_000_000
                row.choices = [Head("bf16", "dense", 0, 1.0, None, None, None, None, None, False)]
            rows.append(row)
    machine = {"cpu": "one", "isa": [], "rates": "default", "offered": []}
    versions = {"adaattn": "1", "numpy": "1", "onnxruntime": "1"} | ({"torch": "1"} if torch else {})
    ceilings = {"FMA peak": 1.0} if peak else {}
    return Run("2000-01-01", machine, versions, 2, 0.01, False, ceilings, {}, rows)


def verdicts(before: Run, after: Run) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for change in changes.compare(before, after).changes:
        found.setdefault(change.row.name, set()).add(change.verdict)
    return found


@pytest.mark.parametrize("against", [{}, {"peak": False}], ids=["peak", "torch"])
def test_noise_is_no_change(against: dict[str, bool]) -> None:
    """Rows that scatter by 5 % from block to block, on a machine that is half as fast today, are the same."""
    before = made(scatter=0.05, **against)
    for seed in range(1, 300):
        after = made(scatter=0.05, drift=2.0, seed=seed, **against)
        assert not any(change.verdict for change in changes.compare(before, after).changes), seed


@pytest.mark.parametrize("against", [{}, {"peak": False}], ids=["peak", "torch"])
def test_a_change_is_seen(against: dict[str, bool]) -> None:
    def after(factor: float) -> Run:
        return made({"both": factor}, drift=0.7, seed=1, **against)

    before = made(**against)
    assert verdicts(before, after(1.15)) == {"dense": {""}, "both": {"slower"}}
    assert verdicts(before, after(0.85)) == {"dense": {""}, "both": {"faster"}}
    assert changes.compare(before, after(1.15)).worse
    assert not changes.compare(before, after(0.85)).worse
    for change in changes.compare(before, after(1.15)).changes:
        assert change.factor == pytest.approx(1.15 if change.row.name == "both" else 1, rel=0.05)


def test_what_scatters_more_must_change_more() -> None:
    """Where the run's blocks lie apart, or the row's own."""
    assert verdicts(made(scatter=0.1), made({"both": 1.15}, scatter=0.1, seed=1))["both"] == {""}
    restless = made({"both": 1.15}, seed=1)
    row = restless.pick("shapes", "both")[0]
    row.blocks[0].seconds *= 1.2
    row.blocks[1].seconds /= 1.2
    found = [c.verdict for c in changes.compare(made(), restless).changes if c.row.name == "both"]
    assert found == ["", *["slower"] * 5]


@pytest.mark.parametrize("peer", ["torch", "onnxruntime", "numpy", "peak"])
def test_peers_that_did_not_change_have_a_say(peer: str) -> None:
    """Whether they seem to have become slower, as ours has, or faster while ours has become slower."""
    for factor in (1.2, 50.0):
        assert verdicts(made(), made({"both": 1.15, peer: factor}, seed=1))["both"] == {""}
    assert verdicts(made(), made({peer: 50.0}, seed=1)) == {"dense": {""}, "both": {""}}


def test_other_work_is_told() -> None:
    assert not any("other work" in note for note in changes.compare(made(), made(seed=1)).notes)
    notes = changes.compare(made(), made(scatter=0.3, seed=1)).notes
    assert [note.split(":")[0] for note in notes if "other work" in note] == ["after"]


def test_times_count_where_nothing_else_does() -> None:
    before, after = made(torch=False, peak=False), made({"both": 20.0}, torch=False, peak=False, seed=1)
    assert any("beside onnxruntime, numpy" in note for note in changes.compare(before, after).notes)
    before.versions = {}
    assert any("times themselves" in note for note in changes.compare(before, after).notes)
    assert verdicts(before, after) == {"dense": {""}, "both": {"slower"}}


def test_other_changes_are_told() -> None:
    before, after = made(), made(seed=1)
    row = after.pick("shapes", "both")[0]
    row.choices[0].rung, row.memory, row.error = "int8", 9_000_000, 2e-2
    after.machine["cpu"], after.versions["numpy"] = "other", "2"
    comparison = changes.compare(before, after)
    (line,) = comparison.table()[1]
    assert line[3] == "both" and line[6] == "" and comparison.worse
    assert line[7] == "1 bf16 -> 1 int8; error 1.0e-03 -> 2.0e-02; 4.0 -> 9.0 MB; BREAKS ITS PROMISE"
    assert {"cpu: one -> other", "numpy: 1 -> 2"} <= set(comparison.notes)
    del after.rows[:5]
    assert "only before: 5 rows" in changes.compare(before, after).notes


def test_runs_that_cannot_be_compared() -> None:
    with pytest.raises(adaattn.ArgumentError, match="with one tolerance, got 0"):
        changes.compare(made(), replace(made(), tolerance=0.05))
    with pytest.raises(adaattn.ArgumentError, match="a case in common"):
        changes.compare(made(), replace(made(), rows=[]))
