"""Gradients within a tolerance: their errors, what is verified, done again and told, and who passes it on."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from support import (
    BF16,
    CASES,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    Array,
    Options,
    Shape,
    backward_problem,
    finite,
    in_new_process,
    inputs,
    peak_memory,
    same_bits,
)

import adaattn
from adaattn import GradientReport, Gradients, _adaattn, rates, reference

sys.path.append(str(ROOT / "benchmarks"))
import heads as library

NARROW = ("int16", "bf16")
GRID = [name for name in CASES if "precision" not in name]
TOO_LARGE = ("bias lowest", "bias lowest float16")  # for float32: these are computed in float64
RIGHT_FROM_THE_START = ("mask of zeros", "sinks, no key", "bias lowest float16")  # whatever the lse
SHAPE = Shape(2, 4, 2, 130, 200, 24, 40)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of a machine where the rung pays, so slow that it does for short heads; it runs anywhere."""
    table = np.array([rates._DEFAULTS["avx512bf16"][rung] for rung in rates.RUNGS]) * [0.01, 0.01, 1]
    monkeypatch.setattr(rates, "_table", table)


def exact_gradients(
    arrays: list[Array], options: Options, needs: Any = ("query", "key", "value")
) -> Gradients:
    """Of attention that is exact from the inputs on."""
    grad_out, *qkv = (x.astype(F64) for x in arrays[:4])
    return reference.attention_backward(grad_out, *qkv, needs=needs, **options)


def errors(actual: Any, exact: Any) -> list[Array]:
    return [library.errors(finite(a), e) for a, e in zip(actual[:3], exact[:3], strict=True)]


@pytest.mark.isa_sample
@pytest.mark.parametrize("case", GRID)
def test_every_option(case: str, rng: np.random.Generator) -> None:
    """The rung by name, on every head with every option."""
    options = CASES[case](rng, SHAPE)
    arrays = backward_problem(rng, SHAPE, **options)
    needs = ["query", "key", "value", *(["sinks"] if options.get("sinks") is not None else [])]
    before = [x.tobytes() for x in arrays]
    actual, report = adaattn.attention_backward(
        *arrays, needs=needs, precision=NARROW, return_report=True, **options
    )
    assert [x.tobytes() for x in arrays] == before
    if case not in TOO_LARGE:
        assert (report.precision_scores == "int16").all() and (report.precision_sums == "bf16").all()
    least = 1e-4 * np.linalg.norm(arrays[0])  # gradients of zero are off by rounding
    for a, e in zip(actual[:3], exact_gradients(arrays, options, needs)[:3], strict=True):
        error, norm = (np.linalg.norm(x, axis=(2, 3)) for x in (a - e, e))
        assert (error <= 1e-2 * norm + least).all()
    exact = adaattn.attention_backward(*arrays, needs=needs, **options)
    assert case in TOO_LARGE or not exact.value.any() or not same_bits(actual.value, exact.value)
    if "sinks" in needs:
        assert same_bits(actual.sinks, exact.sinks)


@pytest.mark.parametrize(
    "shape", [(1, 1, 64, 64, 2, 1), (2, 1, 257, 63, 130, 16), (3, 3, 65, 700, 17, 33)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_dtypes(dtype: Any, shape: Any, rng: np.random.Generator) -> None:
    H, G, *sizes = shape
    arrays = backward_problem(rng, Shape(1, H, G, *sizes), dtype)
    actual = adaattn.attention_backward(*arrays, precision=NARROW)
    rounding = {F16: 2e-3, BF16: 1e-2}.get(dtype, 0)
    for name, a, error in zip(
        Gradients._fields, actual, errors(actual, exact_gradients(arrays, {})), strict=False
    ):
        assert a.dtype == dtype
        assert (error <= 1e-2 + rounding).all(), name


def all_heads() -> Iterator[library.Heads]:
    for sigma in library.SIGMAS:
        yield library.gaussian(sigma, 200, 256, 32, heads=2, kv_heads=1)
        yield library.gaussian(sigma, 192, 192, 48, causal=True)
    yield from (next(layer.apart()) for layer in library.bundled(512))
    yield from library.adversarial(192, 192, 64)


@pytest.mark.parametrize("forward", [None, 1e-2])
def test_every_head_keeps_the_promise(forward: Any, rng: np.random.Generator) -> None:
    """Whatever the forward pass was within."""
    chosen, retried = set(), 0
    for heads in all_heads():
        grad_out = rng.standard_normal((*heads.query.shape[:3], heads.value.shape[3]), F32)
        arrays = [grad_out, heads.query, heads.key, heads.value]
        arrays += heads.attend(return_lse=True, tolerance=forward)
        exact = exact_gradients(arrays, heads.options)
        for tolerance in (1e-3, 1e-2, 5e-2):
            actual, report = adaattn.attention_backward(
                *arrays, tolerance=tolerance, return_report=True, **heads.options
            )
            for name, error in zip(("query", "key", "value"), errors(actual, exact), strict=True):
                assert (error <= tolerance + 2.0**-24).all(), (heads.name, tolerance, name, error)
                measured, limit = (getattr(report, f"{name}_{x}") for x in ("error", "limit"))
                assert (measured <= limit).all() and (limit <= tolerance + 2.0**-24).all(), heads.name
            chosen |= {(tolerance, str(x)) for x in report.precision_scores.flat}
            retried += int(report.retried.sum())
    assert {(1e-2, "int16"), (5e-2, "int16"), (1e-3, "fp32")} <= chosen and (1e-3, "int16") not in chosen
    assert retried > 0


def test_measured_errors_are_true(rng: np.random.Generator) -> None:
    """Estimates from few rows, on heads whose rows are alike."""
    arrays = backward_problem(rng, Shape(1, 8, 4, 512, 512, 32, 32))
    actual, report = adaattn.attention_backward(*arrays, tolerance=1e-2, return_report=True)
    true = errors(actual, exact_gradients(arrays, {}))
    for name, error in zip(("query", "key", "value"), true, strict=True):
        ratio = getattr(report, f"{name}_error") / error
        assert ratio.min() > 0.7 and ratio.max() < 1.4 and 0.85 < ratio.mean() < 1.15, name
        assert (getattr(report, f"{name}_limit") >= error).all()
    assert (report.verified_rows == 8).all()


# ---- what misses


@pytest.fixture
def fault() -> Iterator[Callable[[float], None]]:
    yield _adaattn._narrow_fault
    _adaattn._narrow_fault(1)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_wrong_kernel_is_noticed(
    dtype: Any, fault: Callable[[float], None], rng: np.random.Generator
) -> None:
    arrays = backward_problem(rng, SHAPE, dtype=dtype)
    fault(1.03)
    actual, report = adaattn.attention_backward(*arrays, tolerance=1e-2, return_report=True)
    assert report.retried.all() and (report.precision_scores == ("fp32" if dtype == F32 else "fp64")).all()
    assert all((error < 1e-5).all() for error in errors(actual, exact_gradients(arrays, {})))
    unverified, report = adaattn.attention_backward(*arrays, tolerance=1e-2, verify=False, return_report=True)
    assert all((error > 2e-2).all() for error in errors(unverified, exact_gradients(arrays, {})))
    assert np.isnan(report.query_error).all() and not report.verified_rows.any()
    with pytest.raises(
        adaattn.NumericalError, match=r"^precision: expected gradients with a relative error of"
    ):
        adaattn.attention_backward(*arrays, tolerance=1e-2, precision=NARROW)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("which", ["out", "lse"])
def test_a_wrong_forward_pass_is_made_up_for(which: str, dtype: Any, rng: np.random.Generator) -> None:
    """What is given counts in the budget; where it takes too much of it, both are computed again."""
    arrays = backward_problem(rng, SHAPE, dtype=dtype, sinks=np.zeros(4))
    noise = rng.standard_normal(arrays[5].shape).astype(dtype)
    if which == "out":
        arrays[4] = arrays[4] * (1 + noise[..., None])
    else:
        arrays[5] = arrays[5] + noise / 10
    options: Options = {"sinks": np.zeros(4)}
    exact = exact_gradients(arrays, options)
    plain = adaattn.attention_backward(*arrays, **options)
    assert (errors(plain, exact)[1] > 2e-2).all()
    for tolerance, precise in ((1e-2, False), (1e-5, False), (1e-9, True)):
        actual, report = adaattn.attention_backward(
            *arrays, tolerance=tolerance, return_report=True, **options
        )
        assert report.retried.all()
        assert (report.precision_scores == ("fp64" if precise or dtype == F64 else "fp32")).all()
        assert all((error <= tolerance + 2.0**-24).all() for error in errors(actual, exact))


@pytest.mark.isa_sample
@pytest.mark.parametrize("tolerance", [1e-2, 1e-9])
@pytest.mark.parametrize("case", GRID)
def test_rows_of_its_own_with_every_option(case: str, tolerance: float, rng: np.random.Generator) -> None:
    """A head whose lse is wrong gets another one, in fp32 and in fp64, from rows that options reach too."""
    options = CASES[case](rng, SHAPE)
    arrays = backward_problem(rng, SHAPE, **options)
    exact = exact_gradients(arrays, options)
    arrays[5] = arrays[5] + rng.standard_normal(arrays[5].shape).astype(F32) / 2
    actual, report = adaattn.attention_backward(*arrays, tolerance=tolerance, return_report=True, **options)
    assert report.retried.any() or case in RIGHT_FROM_THE_START
    least = 1e-6 * np.linalg.norm(arrays[0])
    for a, e in zip(actual[:3], exact[:3], strict=True):
        error, norm = (np.linalg.norm(x, axis=(2, 3)) for x in (a - e, e))
        assert (error <= max(tolerance, 1e-6) * norm + least).all()


@pytest.mark.parametrize("dtype, tolerance", [(F16, 3e-4), (BF16, 1e-3)], ids=str)
def test_rounded_results_leave_no_doubt(dtype: Any, tolerance: float, rng: np.random.Generator) -> None:
    """The forward pass left nothing, and another rounding of the same gradients would not help."""
    arrays = backward_problem(rng, SHAPE, dtype)
    _, report = adaattn.attention_backward(*arrays, tolerance=tolerance, return_report=True)
    assert (report.verified_rows == 4).all() and not report.retried.any()


@pytest.mark.parametrize("dtype, size", [(F32, 1e20), (F32, 1e-20), (F64, 1e60), (F64, 1e-60)], ids=str)
def test_gradients_whose_squares_no_float_holds(dtype: Any, size: float, rng: np.random.Generator) -> None:
    """They are compared all the same, and what the forward pass left is made up for."""
    arrays = backward_problem(rng, SHAPE, dtype=dtype)
    arrays[0] *= dtype.type(size)
    _, report = adaattn.attention_backward(*arrays, tolerance=1e-2, precision="fp64", return_report=True)
    assert (report.verified_rows == 4).all()
    for x in (report.query_error, report.query_limit, report.key_limit, report.value_limit):
        assert ((x > 0) & (x < 1e-5)).all()
    arrays[4] *= 1 + rng.standard_normal((*arrays[4].shape[:3], 1)).astype(dtype)
    actual, report = adaattn.attention_backward(*arrays, tolerance=1e-2, return_report=True)
    assert report.retried.all()
    arrays[0] /= dtype.type(size)
    scaled = [x / dtype.type(size) for x in actual[:3]]
    assert all((error < 1e-2).all() for error in errors(scaled, exact_gradients(arrays, {})))


def test_numbers_that_the_rung_does_not_hold(rng: np.random.Generator) -> None:
    """They are computed as without a tolerance, and the report says so."""
    arrays = backward_problem(rng, SHAPE)
    for x, size in ((1, 1e-30), (0, 1e-30), (3, 1e20)):
        changed = list(arrays)
        changed[x] = changed[x] * F32.type(size)
        changed[4:] = adaattn.attention(*changed[1:4], return_lse=True)
        actual, report = adaattn.attention_backward(*changed, precision=NARROW, return_report=True)
        assert report.retried.all() and (report.precision_scores != "int16").all()
        assert all(map(same_bits, actual[:3], adaattn.attention_backward(*changed)[:3]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan(rng: np.random.Generator) -> None:
    """In the head where it takes part, and nowhere else; what is hidden has no part."""
    arrays = backward_problem(rng, SHAPE)
    arrays[2][0, 1, 7, 3] = np.nan
    arrays[4:] = adaattn.attention(*arrays[1:4], return_lse=True)
    actual = adaattn.attention_backward(*arrays, tolerance=1e-2)
    assert np.isnan(actual.query[0, 2:]).any() and np.isfinite(actual.query[0, :2]).all()
    assert np.isfinite(actual.key[1]).all() and np.isnan(actual.key[0, 1]).any()
    options: Options = {"kv_lengths": np.array([7, 200])}
    hidden = adaattn.attention_backward(
        *arrays[:4], *adaattn.attention(*arrays[1:4], return_lse=True, **options), tolerance=1e-2, **options
    )
    assert all(np.isfinite(x).all() for x in hidden[:3])


def test_small_gradients(rng: np.random.Generator) -> None:
    """Their size has no part in it, down to where a float does not hold their squares."""
    arrays = backward_problem(rng, SHAPE)
    expected, told = adaattn.attention_backward(*arrays, tolerance=1e-2, return_report=True)
    arrays[0] = arrays[0] * F32.type(2.0**-55)
    actual, report = adaattn.attention_backward(*arrays, tolerance=1e-2, return_report=True)
    assert all(same_bits(a, e * F32.type(2.0**-55)) for a, e in zip(actual[:3], expected[:3], strict=True))
    assert not report.retried.any() and not told.retried.any()


# ---- bits


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30, 1e4], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"kv_lengths": np.array([150, 90])},
        {"attn_mask": np.arange(200) % 3 > 0},
        {"attn_mask": np.where(np.arange(130)[:, None] % 3 > 0, 0.0, -np.inf), "sinks": np.zeros(4)},
        {"causal": True, "query_offset": -40},
    ],
    ids=lambda options: " ".join(options),
)
def test_what_is_hidden_changes_no_bit(garbage: float, options: Options, rng: np.random.Generator) -> None:
    """Keys that no query sees, and queries that see none."""
    arrays = backward_problem(rng, SHAPE, **options)
    budget: Options = {"tolerance": 1e-2, "precision": NARROW, "return_report": True}
    expected, told = adaattn.attention_backward(*arrays, **budget, **options)
    weights = reference.attention_backward(np.ones_like(arrays[0]), *arrays[1:], **options)
    unseen = ~weights.value.any(axis=(1, 3))  # (B, S)
    blind = ~np.abs(arrays[4]).any(axis=-1)  # (B, H, T)
    assert unseen.any() or blind.any()
    for x in arrays[2:4]:
        x[np.broadcast_to(unseen[:, None], x.shape[:3])] = garbage
    for x in arrays[:2]:
        x[blind] = garbage
    actual, report = adaattn.attention_backward(*arrays, **budget, **options)
    assert (report.precision_scores == "int16").all()
    assert all(map(same_bits, actual[:3], expected[:3]))
    assert (report.query_error == told.query_error).all() and (report.key_error == told.key_error).all()


@pytest.mark.parametrize("case", ["plain", "causal", "bias (T, S)", "dropout"])
def test_threads_and_batches(case: str, rng: np.random.Generator) -> None:
    shape = Shape(2, 4, 2, 600, 330, 24, 16)
    options = CASES[case](rng, shape)
    arrays = backward_problem(rng, shape, **options)
    results = [
        adaattn.attention_backward(*arrays, tolerance=1e-2, **options, num_threads=n) for n in (1, 2, 3, 8)
    ]
    assert all(all(map(same_bits, result[:3], results[0][:3])) for result in results)
    if case in ("plain", "causal"):
        alone = adaattn.attention_backward(*(x[1:] for x in arrays), tolerance=1e-2, **options)
        assert all(same_bits(a[1:], b) for a, b in zip(results[0][:3], alone[:3], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout: Callable[[Array], Array], rng: np.random.Generator) -> None:
    arrays = backward_problem(rng, SHAPE)
    expected = adaattn.attention_backward(*arrays, tolerance=1e-2)
    assert all(
        map(same_bits, adaattn.attention_backward(*map(layout, arrays), tolerance=1e-2)[:3], expected[:3])
    )


def test_each_gradient_by_itself(rng: np.random.Generator) -> None:
    arrays = backward_problem(rng, SHAPE)
    together = adaattn.attention_backward(*arrays, tolerance=1e-2)
    for i, name in enumerate(("query", "key", "value")):
        alone, report = adaattn.attention_backward(*arrays, needs=[name], tolerance=1e-2, return_report=True)
        assert same_bits(alone[i], together[i])
        known = [not np.isnan(getattr(report, f"{x}_error")).any() for x in ("query", "key", "value")]
        assert known == [x == name for x in ("query", "key", "value")]


# ---- plans and reports


def test_policies_are_tolerances(rng: np.random.Generator) -> None:
    arrays = backward_problem(rng, SHAPE)
    for policy, tolerance in (("quality", 1e-5), ("balanced", 1e-2), ("speed", 5e-2)):
        a = adaattn.attention_backward(*arrays, policy=policy)
        b, report = adaattn.attention_backward(*arrays, tolerance=tolerance, return_report=True)
        assert all(map(same_bits, a[:3], b[:3]))
        assert report.tolerance == tolerance and set(report.seconds) == {"execute", "verify"}
        again = pickle.loads(pickle.dumps(report))
        assert isinstance(again, GradientReport) and (again.query_error == report.query_error).all()


def test_a_gradient_of_a_mask_is_no_verification(rng: np.random.Generator) -> None:
    arrays, mask = backward_problem(rng, SHAPE), np.zeros((130, 200), F32)
    options: Options = {"attn_mask": mask, "needs": ["query", "attn_mask"], "return_report": True}
    _, report = adaattn.attention_backward(*arrays, **options)
    assert report.seconds["verify"] < 0.1 * report.seconds["execute"]


def test_where_it_is_exact(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Few queries, strict tolerances, gradients of slopes, and machines on which nothing is faster."""

    def rungs(arrays: list[Array], **options: Any) -> set[str]:
        _, report = adaattn.attention_backward(*arrays, return_report=True, **options)
        return {*report.precision_scores.flat, *report.precision_sums.flat}

    arrays, slopes = backward_problem(rng, SHAPE), {"alibi_slopes": np.full(4, 0.1)}
    assert rungs(arrays, tolerance=1e-2) == {"int16", "bf16"}
    assert rungs(arrays) == rungs(arrays, tolerance=5e-3) == {"fp32"}
    assert rungs(backward_problem(rng, SHAPE._replace(T=63)), tolerance=1e-2) == {"fp32"}
    alibi = backward_problem(rng, SHAPE, **slopes)
    assert rungs(alibi, tolerance=1e-2, **slopes) == {"int16", "bf16"}
    assert rungs(alibi, tolerance=1e-2, needs=["query", "alibi_slopes"], **slopes) == {"fp32"}
    for kind in ("avx2", "avx512vnni", "scalar"):
        table = np.array([rates._DEFAULTS[kind][rung] for rung in rates.RUNGS]) * [0.01, 0.01, 1]
        monkeypatch.setattr(rates, "_table", table)
        assert rungs(arrays, tolerance=1e-2) == {"fp32"}
    table = np.array([rates._DEFAULTS["avx512bf16"][rung] for rung in rates.RUNGS])
    monkeypatch.setattr(rates, "_table", table)
    assert rungs(arrays, tolerance=1e-2) == {"fp32"}  # saves less than it costs
    assert rungs(backward_problem(rng, Shape(1, 1, 1, 1024, 1024, 64, 64)), tolerance=1e-2) == {
        "int16",
        "bf16",
    }


def test_fp64_by_name(rng: np.random.Generator) -> None:
    arrays = backward_problem(rng, SHAPE)
    actual, report = adaattn.attention_backward(*arrays, precision="fp64", return_report=True)
    assert (report.precision_scores == "fp64").all() and not report.retried.any()
    assert all((error < 3e-7).all() for error in errors(actual, exact_gradients(arrays, {})))


# ---- memory


def test_failing_allocations(rng: np.random.Generator) -> None:
    arrays = backward_problem(rng, SHAPE)
    expected = adaattn.attention_backward(*arrays, tolerance=1e-2)

    def call(n: int) -> Any:
        _adaattn._alloc_fail_after(n)
        try:
            return adaattn.attention_backward(*arrays, tolerance=1e-2)
        except MemoryError as error:
            assert re.search("no memory for [0-9]+ bytes", str(error))
            return None
        finally:
            _adaattn._alloc_fail_after(-1)

    failed = 0
    while (result := call(failed)) is None:
        failed += 1
    assert failed >= 2 and all(map(same_bits, result[:3], expected[:3]))


def _peak(T: int) -> int:
    arrays = backward_problem(np.random.default_rng(0), Shape(1, 1, 1, T, T, 16, 16))
    before = peak_memory()
    adaattn.attention_backward(*arrays, precision=NARROW, tolerance=1e-2)
    return peak_memory() - before


def test_memory_grows_with_the_length() -> None:
    """Scores of this head would take 256 MB."""
    assert in_new_process(_peak, 8192) < 40 << 20


# ---- errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tolerance": 0}, "ArgumentError: tolerance: expected a finite number above 0, got 0"),
        ({"tolerance": "1"}, "DTypeError: tolerance: expected a number, got str"),
        (
            {"policy": "best"},
            "ArgumentError: policy: expected None or one of 'quality', 'balanced', 'speed', got 'best'",
        ),
        (
            {"policy": "speed", "tolerance": 1e-2},
            "ArgumentError: policy: expected None beside tolerance=0.01, got 'speed'",
        ),
        ({"verify": 1}, "DTypeError: verify: expected True, False or 'auto', got int"),
        ({"return_report": np.ones(2)}, "DTypeError: return_report: expected a bool, got numpy.ndarray"),
        (
            {"precision": "bf16"},
            "ArgumentError: precision: expected 'auto', 'fp32', 'fp64' or ('int16', 'bf16') for the gradient "
            "of float32 arrays, got ('bf16', 'bf16')",
        ),
        (
            {"precision": NARROW, "needs": ["alibi_slopes"], "alibi_slopes": np.ones(4)},
            "ArgumentError: precision: expected 'auto', 'fp32' or 'fp64' beside needs of 'alibi_slopes', got "
            "('int16', 'bf16')",
        ),
    ],
)
def test_errors(changes: Options, message: str, rng: np.random.Generator) -> None:
    with pytest.raises(adaattn.Error) as caught:
        adaattn.attention_backward(*backward_problem(rng, SHAPE), **changes)
    assert f"{type(caught.value).__name__}: {caught.value}" == message


def test_no_fp32_of_doubles(rng: np.random.Generator) -> None:
    with pytest.raises(
        adaattn.ArgumentError, match=r"expected 'auto', 'fp64' or \('int16', 'bf16'\) for the"
    ):
        adaattn.attention_backward(*backward_problem(rng, SHAPE, dtype=F64), precision="fp32")


# ---- who passes it on


def test_torch(rng: np.random.Generator) -> None:
    """A call's tolerance is its gradient's, unless nothing below fp32 is allowed."""
    torch = pytest.importorskip("torch")
    from adaattn.integrations.torch import scaled_dot_product_attention

    grad_out, *qkv = (torch.from_numpy(x) for x in backward_problem(rng, SHAPE._replace(G=4))[:4])
    leaves = [x.requires_grad_() for x in qkv]
    for options, budget in (
        ({}, {}),
        ({"tolerance": 1e-2}, {"tolerance": 1e-2}),
        ({"policy": "balanced", "verify": False}, {"tolerance": 1e-2, "verify": False}),
        ({"tolerance": 1e-2, "min_precision": "fp32"}, {}),
        ({"precision": "bf16"}, {}),
    ):
        out, lse = scaled_dot_product_attention(*leaves, return_lse=True, **options)
        actual = torch.autograd.grad(out, leaves, grad_out)
        arrays = [x.detach().contiguous().numpy() for x in (grad_out, *leaves, out, lse)]
        expected = adaattn.attention_backward(*arrays, **budget)
        assert all(same_bits(a.numpy(), e) for a, e in zip(actual, expected[:3], strict=True)), options


def test_torch_has_no_second_derivatives(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    from adaattn.integrations.torch import scaled_dot_product_attention

    leaves = [torch.from_numpy(x).requires_grad_() for x in inputs(rng, SHAPE._replace(G=4), F32)]
    out = scaled_dot_product_attention(*leaves)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(adaattn.ArgumentError, match="expected first derivatives alone, got a second one"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "options, budget", [({}, {"tolerance": 1e-2}), ({"min_precision": "fp32"}, {})], ids=str
)
def test_modules(options: Options, budget: Options, rng: np.random.Generator) -> None:
    """An adaptive module's tolerance is its gradient's too."""
    module = adaattn.nn.AdaptivePrecisionAttention(32, 2, policy="balanced", seed=0, **options)
    x, grad = rng.standard_normal((2, 1, 130, 32)).astype(F32)
    calls: list[Options] = []
    original = adaattn.nn.attention.attention_backward

    def spy(*arrays: Any, **given: Any) -> Any:
        calls.append(given)
        return original(*arrays, **given)

    module.train()
    module(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["adaattn.nn.attention"], "attention_backward", spy)
        module.backward(grad)
    assert [{k: v for k, v in given.items() if k == "tolerance"} for given in calls] == [budget]
