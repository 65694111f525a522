"""Low rank: landmarks stand for all keys within the budget, and what they do not span is computed exactly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import same_bits

import adaattn
from adaattn import _adaattn, rates

Array = NDArray[Any]

S = 2048  # from which on structure is looked for
D = 64


@pytest.fixture(autouse=True)
def _same_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates by which smooth heads of this length are low rank, whatever machine this is; no sparse ones."""
    set_rates(monkeypatch, 100.0)


def set_rates(monkeypatch: pytest.MonkeyPatch, fp32: float, int8: float = 150.0) -> None:
    speed = {"fp32": fp32, "bf16": 120.0, "int8/bf16": int8, "int8": int8}
    rows = [(speed.get(rung, 20.0),) * 2 + (0.0, 1.0) for rung in rates.RUNGS]
    monkeypatch.setattr(rates, "_table", np.array(rows, np.float64))


def smooth(
    rng: np.random.Generator,
    dims: int = 3,
    sigma: float = 0.7,
    length: int = S,
    queries: int | None = None,
    heads: int = 1,
    kv_heads: int = 1,
    size: int = D,
) -> list[Array]:
    """Keys and queries from one slow path through few dimensions."""
    time = np.linspace(0, 1, length)[:, None]
    path = np.sin(time * rng.uniform(10, 40, dims) + rng.uniform(0, 6, dims))
    basis = np.linalg.qr(rng.standard_normal((size, dims)))[0].T
    at = rng.integers(0, length, queries or length)
    q = np.stack([(path[at] + 0.2 * rng.standard_normal((len(at), dims))) @ basis for _ in range(heads)])
    k = np.stack([path * rng.uniform(0.8, 1.2) @ basis for _ in range(kv_heads)])
    q *= sigma * np.sqrt(size) / (np.std(q[0, :200] @ k[0].T) or 1)
    k += rng.standard_normal(size)  # a mean costs nothing
    v = rng.standard_normal((kv_heads, length, size))
    return [x[None].astype(np.float32) for x in (q, k, v)]


def errors(out: Array, exact: Array) -> Array:
    off: Array = np.linalg.norm(out - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
    return off


def exactly(*arrays: Array, **options: Any) -> Any:
    return adaattn.attention(*arrays, precision="fp64", **options)


def low_rank(*arrays: Array, tolerance: float = 1e-2, **options: Any) -> Any:
    return adaattn.attention(
        *arrays, tolerance=tolerance, structure="low_rank", return_report=True, **options
    )


@pytest.mark.parametrize("tolerance", [1e-2, 5e-2])
@pytest.mark.parametrize("causal", [False, True])
def test_smooth_heads(rng, causal, tolerance):
    arrays = smooth(rng, length=2 * S if causal else S, heads=4, kv_heads=2)
    options = {"causal": causal, "return_lse": True}
    out, lse, report = adaattn.attention(*arrays, **options, tolerance=tolerance, return_report=True)
    exact, exact_lse = exactly(*arrays, **options)
    assert (report.structure == "low_rank").all() and not report.retried.any()
    assert (report.precision_qk == "fp32").all() and (report.precision_pv == "fp32").all()
    assert ((report.rank > 0) & (report.rank < 200)).all()
    assert (errors(out, exact) <= tolerance).all() and (abs(lse - exact_lse) <= tolerance).all()
    assert (report.verified_rows >= 16).all() and (report.error_limit <= tolerance).all()


def test_predictions_tell_the_error(rng):
    arrays = smooth(rng, heads=4, kv_heads=4)
    plan = adaattn.plan(*arrays, tolerance=5e-2)
    out = adaattn.attention(*arrays, plan=plan, verify=False)
    assert (abs(np.log(errors(out, exactly(*arrays)) / plan.predicted_error)) < 1).all()


def test_as_exact_as_dense_with_all_keys(rng):
    """As many landmarks as keys, of a kernel whose condition is that of fp32: nothing is lost."""
    q, k, v = (rng.standard_normal((1, 2, 96, 16), np.float32) for _ in range(3))
    q *= 0.6
    centred = k - k.mean(axis=2, keepdims=True)
    size = np.sum(centred**2, axis=(2, 3)) / np.sum(q**2, axis=(2, 3))
    kernel = np.exp(centred @ np.swapaxes(centred, 2, 3) / 4 / np.sqrt(size)[..., None, None])
    assert (np.linalg.cond(kernel) <= 1e4).all()
    out, report = low_rank(q, k, v, min_rank=96)
    assert (report.rank == 96).all() and (report.structure == "low_rank").all()
    assert (errors(out, exactly(q, k, v)) <= 1e-4).all()


@pytest.mark.parametrize("causal", [False, True])
def test_more_landmarks_are_no_worse(rng, causal):
    arrays = smooth(rng, 4, 1.0, 1024)
    exact, before = exactly(*arrays, causal=causal), np.inf
    for rank in (8, 16, 32, 64, 128, 256):
        out, report = low_rank(
            *arrays, tolerance=1e-9, max_rank=rank, min_rank=rank, verify=False, causal=causal
        )
        assert report.structure[0, 0] == "low_rank" and report.rank[0, 0] <= rank
        error = errors(out, exact)[0, 0]
        assert error < 1.3 * before + 1e-4
        before = error
    assert before < 1e-3


SIZES = [
    (1, 1),
    (1, 5),
    (3, 1),
    (2, 2),
    (8, 40),
    (9, 63),
    (63, 64),
    (65, 65),
    (64, 300),
    (300, 17),
    (130, 1100),
]


@pytest.mark.parametrize("causal", [False, True, "upper_left"])
@pytest.mark.parametrize(("T", "keys"), SIZES)
def test_sizes(rng, T, keys, causal):
    q, k, v = smooth(rng, 2, 0.5, keys, T, heads=2, size=7)
    v = v[..., :5]
    options = {"causal": causal, "return_lse": True}
    out, lse, report = low_rank(q, k, v, **options)
    exact, exact_lse = exactly(q, k, v, **options)
    seen = np.isfinite(exact_lse)
    assert np.linalg.norm(out - exact) <= 1e-2 * np.linalg.norm(exact)
    assert (lse[~seen] == -np.inf).all() and (abs(lse[seen] - exact_lse[seen]) <= 1e-2).all()
    assert ((report.structure == "low_rank") | report.retried).all()
    assert (report.rank <= keys).all()


OPTIONS: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": [0.5, 6.0]},
    "scale": {"scale": 0.2},
    "lengths": {"kv_lengths": [1500, 700]},
    "lengths, causal": {"kv_lengths": [1500, 700], "causal": "upper_left", "sinks": [0.5, 2]},
    "offset": {"causal": True, "query_offset": [1000, 300]},
    "right window": {"window": (None, 300)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(rng, name):
    arrays = [np.concatenate([x, x[:, :, ::-1]]) for x in smooth(rng, queries=1100, heads=2)]
    options = OPTIONS[name] | {"return_lse": True}
    out, lse, report = low_rank(*arrays, **options)
    exact, exact_lse = exactly(*arrays, **options)
    assert (report.structure == "low_rank").all() and not report.retried.any()
    assert (errors(out, exact) <= 1e-2).all() and (abs(lse - exact_lse) <= 1e-2).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_arrays_and_strides(rng, dtype):
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float16
    arrays = [x.transpose(0, 2, 1, 3).astype(kind).transpose(0, 2, 1, 3) for x in smooth(rng, heads=2)]
    out, report = low_rank(*arrays)
    assert (report.structure == "low_rank").all()
    exact = exactly(*[x.astype(np.float32) for x in arrays])
    assert (errors(out.astype(np.float32), exact) <= 1e-2 + 2**-8).all()


def needles(rng: np.random.Generator, arrays: list[Array], count: int, score: float = 14) -> Array:
    """Turns queries to one key each, far beyond what landmarks span; their rows."""
    q, k, _ = arrays
    rows, keys = rng.choice(q.shape[2], count, replace=False), rng.integers(0, k.shape[2], count)
    goals = k[0, 0, keys] - k[0, 0].mean(axis=0)
    goals += 0.3 * rng.standard_normal(goals.shape, np.float32)
    k[0, 0, keys] = goals + k[0, 0].mean(axis=0)
    q[0, 0, rows] = goals * (score * np.sqrt(D) / np.sum(goals * goals, axis=1, keepdims=True))
    return rows


@pytest.mark.parametrize("score", [9, 14])  # within the kernel's range, and beyond
@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_needles_are_found(rng, causal, count, score):
    """Rows that no sample saw are computed exactly, since their residuals are."""
    arrays = smooth(rng)
    rows = needles(rng, arrays, count, score)
    plan = adaattn.plan(*arrays, tolerance=1e-2, causal=causal)
    if plan.structure[0, 0] != "low_rank":
        plan = adaattn.plan(*arrays, tolerance=1e-2, causal=causal, structure="low_rank")
    out, report = adaattn.attention(*arrays, causal=causal, plan=plan, verify=False, return_report=True)
    exact = exactly(*arrays, causal=causal)
    off = np.linalg.norm(out - exact, axis=3)[0, 0, rows] / np.linalg.norm(exact, axis=3)[0, 0, rows]
    assert (off < 0.1).all()
    assert errors(out, exact)[0, 0] <= 1e-2
    assert report.structure[0, 0] == "low_rank"


DEGENERATE = ["equal", "rank one", "duplicates", "huge", "tiny", "no queries", "no values", "one outlier"]


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("structure", ["auto", "low_rank"])
def test_degenerate_keys(rng, structure, name):
    q, k, v = smooth(rng)
    if name == "equal":
        k[:] = k[:, :, :1]
    elif name == "rank one":
        k[:] = rng.uniform(-0.1, 0.1, (S, 1)).astype(np.float32) * k[:, :, :1]
    elif name == "duplicates":
        k[:] = k[:, :, rng.integers(0, 20, S)]
    elif name == "huge":
        k *= 1e15
    elif name == "tiny":
        k *= 1e-20
    elif name == "no queries":
        q[:] = 0
    elif name == "no values":
        v[:] = 0
    else:
        k[0, 0, 7] *= 1e4
    out, report = adaattn.attention(q, k, v, tolerance=1e-2, structure=structure, return_report=True)
    exact = exactly(q, k, v)
    assert np.linalg.norm(out - exact) <= 1e-2 * np.linalg.norm(exact)
    if name in ("huge", "one outlier"):
        assert report.structure[0, 0] == "dense" and report.rank[0, 0] == 0
    elif structure == "low_rank":
        assert report.structure[0, 0] == "low_rank"


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_passed_on(rng, which, bad):
    arrays = smooth(rng)
    arrays[["query", "key", "value"].index(which)][0, 0, 100, 3] = bad
    out, report = low_rank(*arrays)
    with np.errstate(invalid="ignore"):
        exact = exactly(*arrays)
    assert (np.isnan(out) == np.isnan(exact)).all() and np.isnan(out).any() | np.isinf(out).any()
    assert report.structure[0, 0] == "dense" and report.retried[0, 0]


@pytest.mark.parametrize("causal", [False, True])
def test_same_bits(rng, causal):
    """For any number of threads, and whatever other heads there are."""
    arrays = smooth(rng, heads=4, kv_heads=2)
    options: dict[str, Any] = {
        "tolerance": 1e-2,
        "causal": causal,
        "return_lse": True,
        "structure": "low_rank",
    }
    first = adaattn.attention(*arrays, **options, num_threads=1)
    for threads in (2, 3):
        assert same_bits(adaattn.attention(*arrays, **options, num_threads=threads), first)
    q, k, v = (x.repeat(2, axis=0) for x in arrays)
    assert same_bits(adaattn.attention(q, k, v, **options)[0][1:], first[0])
    alone = adaattn.attention(q[:1, 2:3], k[:1, 1:], v[:1, 1:], **options)
    assert same_bits(alone, (first[0][:, 2:3], first[1][:, 2:3]))


def test_verification_sends_heads_back(rng):
    arrays = smooth(rng)
    plan = adaattn.plan(*arrays, tolerance=1e-2)
    few = replace(plan, rank=np.array([[3]]), rank_gain=np.zeros((1, 1)), rank_limit=np.full((1, 1), np.inf))
    out, report = adaattn.attention(*arrays, plan=few, return_report=True)
    assert report.structure[0, 0] == "dense" and report.retried[0, 0] and report.rank[0, 0] == 0
    assert report.plan.rank[0, 0] == 0
    assert errors(out, exactly(*arrays))[0, 0] <= 1e-2
    out = adaattn.attention(*arrays, plan=few, verify=False)
    assert errors(out, exactly(*arrays))[0, 0] > 1e-2


def test_forced_is_never_replaced(rng):
    q, k, v = (rng.standard_normal((1, 1, 512, D), np.float32) for _ in range(3))
    q *= np.float32(0.3)
    with pytest.raises(adaattn.NumericalError, match=r"structure: .* head \(0, 0\) from 16 landmarks"):
        low_rank(q, k, v, max_rank=16)
    _, report = low_rank(q, k, v, max_rank=16, tolerance=2.0)
    assert report.structure[0, 0] == "low_rank" and report.rank[0, 0] == 16


def test_a_missed_lse_is_an_error(rng):
    """Where it was asked for: the output alone would have been kept."""
    q, k, v = rng.standard_normal((3, 1, 1, S, D), dtype=np.float32) * np.float32(
        [[[[[0.6]]]], [[[[0.6]]]], [[[[1]]]]]
    )
    v += 2
    low_rank(q, k, v)
    with pytest.raises(adaattn.NumericalError, match=r"structure: expected an lse .*0\.01.*head \(0, 0\)"):
        low_rank(q, k, v, return_lse=True)


def test_plans_carry_it(rng):
    arrays = smooth(rng, heads=2)
    out, report = adaattn.attention(*arrays, tolerance=1e-2, return_report=True)
    plan = adaattn.plan(*arrays, tolerance=1e-2)
    assert same_bits(plan.rank, report.rank)
    again = adaattn.Plan.from_json(plan.to_json())
    told, second = adaattn.attention(*arrays, plan=again, return_report=True)
    assert same_bits(told, out) and same_bits(second.rank, plan.rank)
    assert f"{plan.rank[0, 0]} landmarks" in plan.explain() and "low_rank" in report.table()
    out, report = adaattn.attention(*arrays, plan=plan, softcap=3.0, return_report=True)
    assert (report.structure == "dense").all() and report.retried.all()
    assert (errors(out, exactly(*arrays, softcap=3.0)) <= 1e-2).all()


RULED_OUT: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 5.0},
    "alibi_slopes": {"alibi_slopes": [0.1]},
    "attn_mask": {"attn_mask": np.ones((S, S), bool)},
    "a floating attn_mask": {"attn_mask": np.zeros((1, S), np.float32)},
    "dropout_p": {"dropout_p": 0.1, "seed": 1},
    "window[0]": {"window": (100, None)},
}


@pytest.mark.parametrize("what", RULED_OUT)
def test_rules(rng, what):
    arrays, options = smooth(rng), RULED_OUT[what]
    with pytest.raises(adaattn.ArgumentError) as caught:
        low_rank(*arrays, **options)
    assert str(caught.value) == f"structure: expected 'auto' or 'dense' beside {what}, got 'low_rank'"
    plan = adaattn.plan(*arrays, **options, tolerance=1e-2)
    assert plan.structure[0, 0] == "dense" and plan.ruled_out[1] == what
    assert f"low rank by {what}" in plan.explain().splitlines()[1]


def test_doubles_are_ruled_out(rng):
    arrays = [x.astype(np.float64) for x in smooth(rng)]
    assert adaattn.plan(*arrays, tolerance=1e-2).ruled_out == (None, "float64 arrays")


@pytest.mark.parametrize(
    ("fp32", "int8", "structure"),
    [(100.0, 150.0, "low_rank"), (300.0, 400.0, "low_rank"), (3.0, 150.0, "dense"), (1.0, 400.0, "dense")],
)
def test_choice_follows_rates(rng, monkeypatch, fp32, int8, structure):
    set_rates(monkeypatch, fp32, int8)
    plan = adaattn.plan(*smooth(rng), tolerance=1e-2)
    assert plan.structure[0, 0] == structure


def test_heads_without_structure_are_dense(rng):
    q, k, v = (rng.standard_normal((1, 1, S, D), np.float32) for _ in range(3))
    for sigma in (0.3, 1.5, 4):
        assert adaattn.plan(q * np.float32(sigma), k, v, tolerance=1e-2).structure[0, 0] == "dense"
    short = smooth(rng, length=S - 1)
    assert adaattn.plan(*short, tolerance=1e-2).structure[0, 0] == "dense"


def test_bounds_of_ranks(rng):
    arrays = smooth(rng, 6)
    free = int(adaattn.plan(*arrays, tolerance=1e-2).rank[0, 0])
    assert adaattn.plan(*arrays, tolerance=1e-2, max_rank=free // 2).structure[0, 0] == "dense"
    assert adaattn.plan(*arrays, tolerance=1e-2, min_rank=free + 20).rank[0, 0] >= free + 20
    with pytest.raises(adaattn.ArgumentError, match="max_rank: expected at least min_rank=9, got 8"):
        adaattn.plan(*arrays, tolerance=1e-2, min_rank=9, max_rank=8)
    for name, value in (("min_rank", 0), ("max_rank", -3)):
        with pytest.raises(adaattn.ArgumentError, match=f"{name}: expected an int of at least 1"):
            adaattn.attention(*arrays, tolerance=1e-2, **{name: value})
    with pytest.raises(adaattn.DTypeError, match="max_rank"):
        adaattn.attention(*arrays, tolerance=1e-2, max_rank=1.5)
    with pytest.raises(adaattn.ArgumentError, match="max_rank: expected None without a tolerance"):
        adaattn.attention(*arrays, max_rank=4)
    with pytest.raises(adaattn.ArgumentError, match="min_rank: expected None beside a precision by name"):
        adaattn.attention(*arrays, tolerance=1e-2, precision="fp32", min_rank=4)


def test_no_memory(rng):
    """Every allocation fails once, in threads of which none keeps memory of earlier calls."""
    arrays = smooth(rng, length=300)

    def call(n: int) -> bool:
        _adaattn._alloc_fail_after(n)
        try:
            return bool(low_rank(*arrays)[1].structure[0, 0] == "low_rank")
        except MemoryError:
            return False
        finally:
            _adaattn._alloc_fail_after(-1)

    worked = []
    for n in range(8):
        with ThreadPoolExecutor(1) as fresh:
            worked.append(fresh.submit(call, n).result())
    assert worked[:3] == [False] * 3 and worked[-1] and worked == sorted(worked)


def test_promise(rng):
    """Structured heads of many kinds, with and without rows and keys that are not like the others."""
    low = 0
    for _ in range(24):
        dims, causal = int(rng.integers(1, 8)), bool(rng.random() < 0.4)
        arrays = smooth(rng, dims, float(rng.uniform(0.1, 1.6)), queries=S + int(rng.integers(0, 200)))
        if rng.random() < 0.4:
            needles(rng, arrays, int(rng.integers(1, 9)))
        if rng.random() < 0.3:
            arrays[2] += rng.standard_normal(D, np.float32)
        if rng.random() < 0.3:
            arrays[1] += np.float32(rng.choice([0.02, 0.1])) * rng.standard_normal(
                arrays[1].shape, np.float32
            )
        tolerance = float(rng.choice([3e-3, 1e-2, 5e-2]))
        options = {"causal": causal, "return_lse": True}
        out, lse, report = adaattn.attention(*arrays, **options, tolerance=tolerance, return_report=True)
        exact, exact_lse = exactly(*arrays, **options)
        seen = np.isfinite(exact_lse)
        assert errors(out, exact)[0, 0] <= tolerance
        assert (abs(lse[seen] - exact_lse[seen]) <= tolerance).all()
        low += int(report.structure[0, 0] == "low_rank")
    assert low >= 12
