"""Sparse heads: values of blocks are left out within the budget, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import same_bits

import adaattn
from adaattn import _adaattn, rates
from adaattn.bench.heads import topics
from adaattn.linalg import stable_softmax

Array = NDArray[Any]

S = 2048  # from which on structure is looked for
D = 64

pytestmark = pytest.mark.skipif(
    not {"gauge_i8", "gauge_i16", "gauge_bf16"} & set(_adaattn.cpu_info()["kernels"]),
    reason="no kernels for it here",
)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of a machine where values cost nearly everything, so that whatever may stand in pays."""
    speed = {"fp32": 100.0, "int16": 210.0, "bf16": 220.0, "int8/bf16": 300.0, "int8": 420.0}
    rows = [(speed.get(rung, 50.0),) * 2 + (0.0, 0.1 if rung in speed else 1.0) for rung in rates.RUNGS]
    monkeypatch.setattr(rates, "_table", np.array(rows, np.float64))


def local(rng: np.random.Generator, heads: int = 1, kv_heads: int = 1, length: int = S) -> list[Array]:
    """Queries see keys near their own position: features turn with it, fast and slowly."""
    position = np.arange(length)[:, None] * np.geomspace(1, 1e-3, D // 2)
    turning = np.concatenate([np.cos(position), np.sin(position)], axis=1).astype(np.float32)
    q = 2.2 * turning + 0.4 * rng.standard_normal((1, heads, length, D), np.float32)
    k = 2.2 * turning + 0.4 * rng.standard_normal((1, kv_heads, length, D), np.float32)
    v = rng.standard_normal((1, kv_heads, length, D), np.float32)
    return [q.astype(np.float32), k.astype(np.float32), v]


def errors(out: Array, exact: Array) -> Array:
    off: Array = np.linalg.norm(out - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
    return off


def exactly(*arrays: Array, **options: Any) -> Array:
    result: Array = adaattn.attention(*arrays, precision="fp64", **options)
    return result


@pytest.mark.parametrize("tolerance", [1e-2, 5e-2])
@pytest.mark.parametrize("causal", [False, True])
def test_local_heads_leave_values_out(rng, causal, tolerance):
    arrays = local(rng, 4, 2)
    out, report = adaattn.attention(*arrays, causal=causal, tolerance=tolerance, return_report=True)
    assert (report.structure == "sparse").all() and not report.retried.any()
    assert (report.kept_fraction < 0.6).all() and (report.kept_fraction > 0).all()
    assert (errors(out, exactly(*arrays, causal=causal)) <= tolerance).all()
    assert (report.verified_rows >= 8).all() and (report.error_limit <= tolerance).all()


def test_estimates_tell_the_error(rng):
    """What is left out moves the output by about what was planned, not by far less."""
    arrays = local(rng, 4, 4)
    plan = adaattn.plan(*arrays, tolerance=5e-2)
    out = adaattn.attention(*arrays, plan=plan, verify=False)
    ratio = np.log(errors(out, exactly(*arrays)) / plan.predicted_error)
    assert ratio.mean() > -1.25 and ratio.max() < 1.25  # single heads reach -1.5 with AVX2's rungs


def test_kept_fraction_is_counted(rng):
    """It grows as the tolerance falls; what is left in the end are blocks whose weights round to zero."""
    arrays = local(rng)
    plan = adaattn.plan(*arrays, tolerance=5e-2)
    kept = []
    for factor in (1e30, 1, 1e-2, 1e-30):
        given = replace(plan, sparse_budget=plan.sparse_budget * factor)
        out, report = adaattn.attention(*arrays, plan=given, verify=False, return_report=True)
        kept.append(float(report.kept_fraction[0, 0]))
    assert kept[0] == 0 and 0.9 < kept[3] <= 1
    assert 0 < kept[1] < kept[2] < 1
    dense = adaattn.attention(*arrays, precision=(str(plan.precision_qk[0, 0]), str(plan.precision_pv[0, 0])))
    assert errors(out, dense)[0, 0] < 2e-2  # the same products in another order, references and scales


def test_all_stand_in(rng):
    """Then a block is its mean value, with the weight of its keys."""
    q, k, v = local(rng)
    plan = adaattn.plan(q, k, v, tolerance=5e-2)
    given = replace(plan, sparse_budget=plan.sparse_budget * 1e30)
    out = adaattn.attention(q, k, v, plan=given, verify=False)
    means = v.reshape(1, 1, -1, 64, D).mean(axis=3).repeat(64, axis=2)
    assert errors(out, exactly(q, k, means))[0, 0] < 2e-2


def test_all_alike(rng):
    """Where all values are the same nothing is lost by leaving them out."""
    q, k, v = local(rng)
    v[:] = v[:, :, :1]
    out, report = adaattn.attention(q, k, v, tolerance=1e-2, return_report=True)
    assert errors(out, exactly(q, k, v))[0, 0] < 5e-3
    assert report.structure[0, 0] == "dense" or report.kept_fraction[0, 0] < 0.2


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"causal": True, "window": (1000, None)},
    "lengths": {"kv_lengths": [S - 101], "causal": "upper_left"},
    "sinks": {"sinks": [0.5]},
    "scale": {"scale": 0.2, "causal": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(rng, name):
    arrays, options = local(rng), OPTIONS[name]
    out, report = adaattn.attention(*arrays, **options, tolerance=5e-2, return_report=True)
    assert report.structure[0, 0] == "sparse" and report.kept_fraction[0, 0] < 0.9
    assert errors(out, exactly(*arrays, **options))[0, 0] <= 5e-2


def test_lse_is_that_of_all_keys(rng):
    arrays = local(rng)
    given = {"causal": True, "return_lse": True}
    _, lse, report = adaattn.attention(*arrays, **given, tolerance=0.2, return_report=True)
    _, exact = adaattn.attention(*arrays, **given, precision="fp64")
    _, dense = adaattn.attention(*arrays, **given, precision=str(report.precision_qk[0, 0]))
    assert report.structure[0, 0] == "sparse"
    assert abs(lse - exact).max() < 2 * abs(dense - exact).max()


def test_boolean_mask(rng):
    """Blocks with a hidden key are computed; others may stand in."""
    arrays, mask = local(rng), np.ones((1, 1, S, S), bool)
    mask[..., 100:130] = False
    mask[:, :, 640:, 700] = False
    out, report = adaattn.attention(*arrays, attn_mask=mask, tolerance=2e-2, return_report=True)
    assert report.structure[0, 0] == "sparse" and report.kept_fraction[0, 0] < 0.9
    assert errors(out, exactly(*arrays, attn_mask=mask))[0, 0] <= 2e-2


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 30.0},
        {"alibi_slopes": [0.01]},
        {"attn_mask": np.zeros((1, 1, 1, S), np.float32)},
        {"dropout_p": 0.1, "seed": 1},
        {"structure": "dense"},
        {"max_precision": "fp32", "min_precision": "fp32"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_others_stay_dense(rng, options):
    arrays = local(rng)
    out, report = adaattn.attention(*arrays, **options, tolerance=2e-2, return_report=True)
    assert report.structure[0, 0] == "dense" and report.kept_fraction[0, 0] == 1
    options.pop("structure", 0), options.pop("max_precision", 0), options.pop("min_precision", 0)
    assert errors(out, exactly(*arrays, **options))[0, 0] <= 2e-2


def test_short_and_forced_heads_stay_dense(rng):
    short = [x[:, :, : S - 64] for x in local(rng)]
    for arrays, precision in ((short, "auto"), (local(rng), "int8")):
        _, report = adaattn.attention(*arrays, tolerance=5e-2, precision=precision, return_report=True)
        assert report.structure[0, 0] == "dense"


def diffuse(rng: np.random.Generator) -> list[Array]:
    q, k, v = (rng.standard_normal((1, 1, S, D), np.float32) for _ in range(3))
    return [0.05 * q, k, v]


@pytest.mark.parametrize("base", [local, diffuse])
@pytest.mark.parametrize("every", [S, 64, 1])
@pytest.mark.parametrize("tolerance", [1e-2, 5e-2])
def test_needles_are_kept(rng, base, every, tolerance):
    """Rows that see one key far away, with a large value, among others that do not: every so many rows."""
    q, k, v = base(rng)
    rows = np.arange(every - 1 if every < S else S // 3, S, every)
    targets = (rows * 7 + S // 2) % S
    goal = k[0, 0, targets]
    q[0, 0, rows] = goal * (25 * np.sqrt(D) / np.sum(goal * goal, axis=1, keepdims=True))
    v[0, 0, targets[:1]] *= 4
    out = adaattn.attention(q, k, v, tolerance=tolerance)
    exact = exactly(q, k, v)
    assert errors(out, exact)[0, 0] <= tolerance
    off = np.linalg.norm((out - exact)[0, 0, rows], axis=1) / np.linalg.norm(exact[0, 0, rows], axis=1)
    assert off.max() < 0.3, "a needle row was lost"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tolerance", [1e-2, 5e-2])
def test_blocks_are_passed_over_for_a_reason(rng, tolerance, causal):
    """Rows of one topic never see blocks of another, whose scores are not computed, but for single keys that
    lie there; some have large values."""
    heads = topics(2 * S, run=256)
    q, k, v = (x.copy() for x in (heads.query, heads.key, heads.value))
    rows = rng.choice(np.arange(S, 2 * S), 48, replace=False)
    keys = rng.choice(S, 48, replace=False)
    k[0, 0, keys] = 1.5 * q[0, 0, rows]  # and so for all rows of that topic
    v[0, 0, keys[::4]] *= 4
    options = {"tolerance": tolerance, "causal": causal, "structure": "sparse"}  # by name: never done again
    out, report = adaattn.attention(q, k, v, **options, return_report=True)
    exact = exactly(q, k, v, causal=causal)
    assert report.structure[0, 0] == "sparse" and report.kept_fraction[0, 0] < 0.5
    assert errors(out, exact)[0, 0] <= tolerance
    off = np.linalg.norm((out - exact)[0, 0, rows], axis=1) / np.linalg.norm(exact[0, 0, rows], axis=1)
    assert off.max() < 0.2, "a needle was passed over"


def hard() -> Iterator[Any]:
    from heads import adversarial, gaussian

    yield from (gaussian(sigma, S, S, causal=True) for sigma in (0.3, 1, 2, 4, 8))
    yield from adversarial(S, S)


@pytest.mark.parametrize("tolerance", [1e-2, 5e-2])
def test_promise_on_hard_heads(tolerance):
    pytest.importorskip("heads")
    sparse = 0
    for heads in hard():
        out, report = heads.attend(tolerance=tolerance, return_report=True)
        exact = heads.attend(precision="fp64")
        assert (errors(out, exact) <= tolerance).all(), heads.name
        sparse += int((report.structure == "sparse").sum())
    assert sparse > 0


def test_a_wrong_plan_is_caught(rng):
    """Heads that leave too much out are computed again, with all values."""
    arrays = local(rng, 2, 1)
    plan = adaattn.plan(*arrays, tolerance=2e-2)
    given = replace(plan, sparse_budget=plan.sparse_budget * [[1e4, 1]])
    out, report = adaattn.attention(*arrays, plan=given, return_report=True)
    assert report.retried.tolist() == [[True, False]]
    assert report.structure.tolist() == [["dense", "sparse"]] and report.kept_fraction[0, 0] == 1
    assert (report.precision_qk == plan.precision_qk).all()
    assert (errors(out, exactly(*arrays)) <= 2e-2).all()
    assert report.plan.structure.tolist() == report.structure.tolist()
    assert report.plan.sparse_budget[0, 0] == 0


def test_plans_carry_the_structure(rng):
    arrays = local(rng, 2, 2)
    out, report = adaattn.attention(*arrays, tolerance=2e-2, return_report=True)
    plan = adaattn.Plan.from_json(adaattn.plan(*arrays, tolerance=2e-2).to_json())
    again, told = adaattn.attention(*arrays, plan=plan, return_report=True)
    assert same_bits(again, out)
    assert (told.structure == "sparse").all() and same_bits(told.kept_fraction, report.kept_fraction)
    assert same_bits(report.plan.sparse_budget, plan.sparse_budget)


def test_reports_tell(rng):
    arrays = local(rng)
    _, report = adaattn.attention(*arrays, tolerance=2e-2, return_report=True)
    assert "sparse" in report.table() and '"structure": [["sparse"]]' in report.to_json()
    assert "sparse" in report.plan.explain() and "% of the blocks" in report.plan.explain()


@pytest.mark.parametrize("length", [S, S + 100, 3 * S])
def test_pictures_of_kept_blocks(rng, length):
    """Local heads keep what is near the diagonal; all of a picture's blocks are those that are counted."""
    arrays = local(rng, 2, 2, length=length)
    arrays[2][0, 1, 9, 3] = np.nan
    _, report = adaattn.attention(*arrays, tolerance=5e-2, causal=True, return_report=True)
    assert report.structure.tolist() == [["sparse", "dense"]]
    picture = report.kept_blocks
    assert picture.shape == (1, 2, 32, 32) and np.isnan(picture[0, 1]).all()
    visible = ~np.isnan(picture[0, 0])
    rows, columns = np.indices((32, 32))
    full = rows < 31 if length % 64 else rows < 32  # the last queries are no tile, and left as they are
    assert visible[full & (columns < rows - 1)].all() and not visible[columns > rows + 1].any()
    assert np.nanmin(picture[0, 0][rows == columns]) > 0.3
    assert np.nanmean(picture[0, 0][columns < rows - 16]) < 0.5 * np.nanmean(picture[0, 0][rows == columns])
    if length == S:  # a cell is a block
        assert np.nanmean(picture[0, 0]) == pytest.approx(report.kept_fraction[0, 0], abs=1e-6)
    same = adaattn.attention(*arrays, tolerance=5e-2, causal=True, return_report=True, num_threads=2)[1]
    assert same_bits(same.kept_blocks, picture)
    assert '"kept_blocks": [[[[' in report.to_json()


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_and_output_are_those_of_brute_force(rng, causal):
    """Those that move a tile least stand in; the output is that of their masses and mean values."""
    n = 16
    arrays = [x[:, :, : 64 * n] for x in local(rng)]
    out, report = by_name(*arrays, tolerance=0.2, causal=causal)
    q, k, v = (x[0, 0].astype(np.float64) for x in arrays)
    p = stable_softmax(np.where(np.tri(64 * n, dtype=bool) | (not causal), q @ k.T / 8, -np.inf))
    p = p.reshape(n, 64, n, 64).swapaxes(1, 2)  # tile, block, row, key
    values = v.reshape(n, 64, D)
    means = values.mean(axis=1)
    reach = np.linalg.norm(values - means[:, None], axis=2).max(axis=1)
    cost = reach**2 * np.sum((p - p.mean(axis=3, keepdims=True)) ** 2, axis=(2, 3))
    picture = report.kept_blocks[0, 0]
    seen = np.tri(n, dtype=bool) | (not causal)
    assert picture.shape == (n, n) and (np.isnan(picture) == ~seen).all()
    assert set(picture[seen]) == {0, 1} and not (causal and (np.diag(picture) == 0).any())
    for tile in range(n):
        plain = seen[tile] & ~(causal & (np.arange(n) == tile))
        stands, keeps = (cost[tile, plain & (picture[tile] == kept)] for kept in (0, 1))
        assert not stands.size or not keeps.size or stands.max() < 1.2 * keeps.min()
    each = np.where((picture == 0)[:, :, None, None], p.sum(axis=3)[..., None] * means[:, None], p @ values)
    expected = each.sum(axis=1).reshape(1, 1, -1, D)
    assert errors(expected, exactly(*arrays, causal=causal))[0, 0] > 0.04
    assert errors(out, expected)[0, 0] < 0.02


@pytest.mark.parametrize("places", [1, 2])
def test_scores_far_above_those_of_the_first_keys(rng, places):
    """Tiles whose scores a reference by the first keys cannot hold are sparse too; they see some places."""
    q, k, v = local(rng)
    q *= 3
    q[0, 0, 1::2] = np.roll(q[0, 0], S // 2 * (places - 1), axis=0)[1::2]
    scores = q[0, 0] @ k[0, 0].T / 8 * np.log2(np.e)
    assert np.mean(scores.max(axis=1) > scores[:, :64].max(axis=1) + 60) > 0.8
    out, report = adaattn.attention(q, k, v, tolerance=5e-2, return_report=True)
    picture = report.kept_blocks[0, 0]
    assert report.structure[0, 0] == "sparse" and not report.retried.any()
    assert picture.mean(axis=1).max() < 0.1 * places + 0.1  # and no NaN
    assert picture.mean() == pytest.approx(report.kept_fraction[0, 0], abs=1e-6)
    assert errors(out, exactly(q, k, v))[0, 0] <= 5e-2


def test_a_short_last_tile_is_counted(rng):
    q, k, v = local(rng)
    options = {"tolerance": 5e-2, "structure": "sparse", "return_report": True}
    report = adaattn.attention(q[:, :, : 64 + 40], k, v, **options)[1]
    picture = report.kept_blocks[0, 0]  # one row of two tiles, of which the second is dense
    assert picture.min() == 0.5 and picture.mean() < 0.6
    assert report.kept_fraction[0, 0] == pytest.approx(picture.mean(), abs=1e-6)


def test_pictures_of_heads_sent_back(rng):
    """There is none of what was computed again, nor where nothing is sparse, nor of short heads."""
    arrays = local(rng, 2, 1)
    plan = adaattn.plan(*arrays, tolerance=2e-2)
    given = replace(plan, sparse_budget=plan.sparse_budget * [[1e4, 1]])
    picture = adaattn.attention(*arrays, plan=given, return_report=True)[1].kept_blocks
    assert np.isnan(picture[0, 0]).all() and not np.isnan(picture[0, 1]).any()
    report = adaattn.attention(*arrays, tolerance=2e-2, structure="dense", return_report=True)[1]
    assert report.kept_blocks is None and '"kept_blocks": null' in report.to_json()
    short = by_name(*(x[:, :, :200] for x in arrays))[1].kept_blocks
    assert short.shape == (1, 2, 3, 3) and np.isnan(short).sum() <= np.isnan(short[:, :, -1]).sum()


def test_plot_of_kept_blocks(rng):
    pytest.importorskip("matplotlib")
    arrays = local(rng, 2, 2)
    report = adaattn.attention(*arrays, tolerance=5e-2, return_report=True)[1]
    figure = report.plot_blocks()
    drawn = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in drawn[:2]] == [
        f"{h}: {report.kept_fraction[0, h]:.0%}" for h in range(2)
    ]
    assert same_bits(np.asarray(drawn[1].images[0].get_array()), report.kept_blocks[0, 1])
    dense = adaattn.attention(*arrays, tolerance=5e-2, structure="dense", return_report=True)[1]
    assert dense.plot_blocks().axes[0].texts[0].get_text() == "no head is sparse"


def test_json_with_a_structure_of_its_own_is_refused(rng):
    text = adaattn.plan(*local(rng), tolerance=2e-2).to_json()
    assert '"structure": [["sparse"]]' in text
    with pytest.raises(adaattn.ArgumentError, match="structure"):
        adaattn.Plan.from_json(text.replace('"sparse"', '"dense"'))


def test_same_bits(rng):
    """For any number of threads, other heads and layouts."""
    q, k, v = local(rng, 4, 2)
    out, report = adaattn.attention(q, k, v, tolerance=5e-2, causal=True, return_report=True, num_threads=1)
    assert (report.structure == "sparse").all()
    assert same_bits(adaattn.attention(q, k, v, tolerance=5e-2, causal=True, num_threads=2), out)
    alone = adaattn.attention(q[:, 3:], k[:, 1:], v[:, 1:], tolerance=5e-2, causal=True)
    assert same_bits(alone, out[:, 3:])
    spread = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v)]
    assert same_bits(adaattn.attention(*spread, tolerance=5e-2, causal=True), out)


@pytest.mark.parametrize(("T", "length"), [(S + 37, S + 37), (S, S + 999), (S + 1, 3 * S - 1)])
def test_ragged_sizes(rng, T, length):
    q, k, v = local(rng, length=length)
    q = q[:, :, length - T :]
    out, report = adaattn.attention(q, k, v, tolerance=2e-2, causal=True, return_report=True)
    assert report.structure[0, 0] == "sparse"
    assert errors(out, exactly(q, k, v, causal=True))[0, 0] <= 2e-2


@pytest.mark.parametrize(("D_", "E"), [(32, 64), (128, 128), (40, 72)])
def test_head_sizes(rng, D_, E):
    q, k, _ = local(rng)
    q, k = (np.resize(x, (1, 1, S, D_)) if D_ > D else x[..., :D_].copy() for x in (q, k))
    v = rng.standard_normal((1, 1, S, E), np.float32)
    out = adaattn.attention(q, k, v, tolerance=2e-2)
    assert errors(out, exactly(q, k, v))[0, 0] <= 2e-2


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_sizes_of_values_do_not_matter(rng, size):
    q, k, v = local(rng)
    report = adaattn.attention(q, k, v, tolerance=2e-2, return_report=True)[1]
    out, told = adaattn.attention(q, k, v * np.float32(size), tolerance=2e-2, return_report=True)
    assert told.structure[0, 0] == "sparse"
    assert abs(told.kept_fraction[0, 0] - report.kept_fraction[0, 0]) < 0.05
    assert errors(out, exactly(q, k, v * np.float32(size)))[0, 0] <= 2e-2


def test_nan_stays_dense_and_is_passed_on(rng):
    q, k, v = local(rng, 2, 2)
    v[0, 1, 1000, 3] = np.nan
    out, report = adaattn.attention(q, k, v, tolerance=2e-2, return_report=True)
    assert report.structure.tolist() == [["sparse", "dense"]]
    assert np.isnan(out[0, 1, :, 3]).all() and np.isfinite(out[0, 0]).all()


def test_rates_decide(rng, monkeypatch):
    """Where leaving values out saves nothing, it is not done."""
    arrays = local(rng)
    table = rates.table().copy()
    table[:, 3] = 0.97
    monkeypatch.setattr(rates, "_table", table)
    assert adaattn.plan(*arrays, tolerance=5e-2).structure[0, 0] == "dense"


def by_name(*arrays: Array, tolerance: float = 5e-2, **options: Any) -> Any:
    return adaattn.attention(*arrays, tolerance=tolerance, structure="sparse", return_report=True, **options)


def test_sparse_by_name(rng, monkeypatch):
    """Whatever the rates say, within the budget, and no less than is right."""
    table = rates.table().copy()
    table[:, 3] = 1
    monkeypatch.setattr(rates, "_table", table)
    arrays = local(rng, 4, 2)
    assert (adaattn.plan(*arrays, tolerance=5e-2).structure == "dense").all()
    plan = adaattn.plan(*arrays, tolerance=5e-2, structure="sparse")
    out, report = by_name(*arrays, causal=True)
    assert (report.structure == "sparse").all() and not report.retried.any()
    assert (report.kept_fraction < 0.6).all() and (report.verified_rows >= 16).all()
    assert (errors(out, exactly(*arrays, causal=True)) <= 5e-2).all()
    assert (plan.structure == "sparse").all() and (plan.kept_fraction < 0.6).all()


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 100, 200, 513])
def test_sparse_by_name_at_any_length(rng, length):
    """Below a tile of queries there is nothing to leave out, and the report says so."""
    arrays = [x[:, :, :length] for x in local(rng)]
    out, report = by_name(*arrays, causal=True)
    assert errors(out, exactly(*arrays, causal=True))[0, 0] <= 5e-2
    assert (report.structure[0, 0] == "sparse") == (length >= 64) == (not report.retried[0, 0])
    assert (report.verified_rows[0, 0] > 0) == (length >= 64)
    if length > 500:
        assert report.kept_fraction[0, 0] < 1


def test_sparse_by_name_that_misses_is_an_error(rng):
    """No rung whose blocks may stand in is as exact as that."""
    arrays = local(rng, 2, 1)
    with pytest.raises(
        adaattn.NumericalError,
        match=r"structure: expected a relative error of at most 1e-06 .* of the blocks",
    ):
        by_name(*arrays, tolerance=1e-6)
    out, report = by_name(*arrays, tolerance=1e-6, verify=False)
    assert (report.structure == "sparse").all() and (report.kept_fraction > 0.5).all()
    assert (errors(out, exactly(*arrays)) < 2e-2).all()


def test_sparse_by_name_keeps_to_the_limits_of_precision(rng):
    arrays = local(rng)
    for rung in sparse_rungs():
        report = by_name(*arrays, min_precision=rung, max_precision=rung)[1]
        assert report.structure[0, 0] == "sparse"
        assert report.precision_qk[0, 0] == report.precision_pv[0, 0] == rung
    report = by_name(*arrays, min_precision="fp32")[1]  # where nothing may stand in
    assert report.structure[0, 0] == "dense" and report.retried[0, 0]


def sparse_rungs() -> list[str]:
    kernels = _adaattn.cpu_info()["kernels"]
    gauges = {"int16": "gauge_i16", "bf16": "gauge_bf16", "int8": "gauge_i8"}
    return [name for name, gauge in gauges.items() if gauge in kernels]


def test_sparse_by_name_of_what_is_not_finite(rng):
    q, k, v = local(rng, 2, 2)
    v[0, 1, 1000, 3] = np.nan
    out, report = by_name(q, k, v)
    assert report.structure.tolist() == [["sparse", "dense"]] and report.retried.tolist() == [[False, True]]
    assert np.isnan(out[0, 1, :, 3]).all() and np.isfinite(out[0, 0]).all()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"alibi_slopes": [0.01]}, "alibi_slopes"),
        ({"attn_mask": np.zeros((1, 1, 1, S), np.float32)}, "a floating attn_mask"),
        ({"dropout_p": 0.1, "seed": 1}, "dropout_p"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_sparse_by_name_is_refused(rng, options, what):
    expected = f"structure: expected 'auto' or 'dense' beside {what}, got 'sparse'"
    with pytest.raises(adaattn.ArgumentError, match=expected):
        by_name(*local(rng), **options)


def test_bad_structure(rng):
    arrays = [x[:, :, :16] for x in local(rng)]
    expected = "structure: expected 'auto', 'dense', 'sparse' or 'low_rank', got"
    with pytest.raises(adaattn.ArgumentError, match=expected):
        adaattn.attention(*arrays, tolerance=1e-2, structure="thin")
    with pytest.raises(adaattn.DTypeError, match="structure"):
        adaattn.attention(*arrays, tolerance=1e-2, structure=3)
    with pytest.raises(adaattn.ArgumentError, match="structure: expected 'auto' without a tolerance"):
        adaattn.attention(*arrays, structure="dense")
