"""The gradient of attention against the oracle, finite differences and torch; its bits, memory and errors."""

from __future__ import annotations

import gc
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import (
    BF16,
    CASES,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    SHAPES,
    Array,
    Options,
    Shape,
    backward_problem,
    finite,
    float_mask,
    in_new_process,
    largest,
    peak_memory,
    same_bits,
    score_size,
)

import adaattn
from adaattn import Gradients, _adaattn, reference

GRID = [name for name in CASES if "precision" not in name]
SAMPLE = ["plain", "causal", "softcap", "bias (1, H, T, 1)", "alibi (B, H)", "sinks", "all"]


def everything(options: Options) -> list[str]:
    """All that these options have gradients for."""
    names = ["query", "key", "value", *(x for x in ("sinks", "alibi_slopes") if options.get(x) is not None)]
    mask = options.get("attn_mask")
    return names if mask is None or mask.dtype == bool else [*names, "attn_mask"]


def row_norms(x: Array) -> Array:
    return np.sqrt(np.sum(finite(x) ** 2, axis=-1))


def check(arrays: list[Array], options: Options) -> Gradients:
    """Compare all gradients with the oracle's.

    Each is a sum of products of a weight, the difference of two products of grad_out with values, and a
    query or key; its rounding error is that of a weight times the sizes of the others.
    """
    grad_out, query, key, value, *_ = arrays
    needs = everything(options)
    before = [x.tobytes() for x in arrays]
    actual = adaattn.attention_backward(*arrays, needs=needs, **options)
    assert [x.tobytes() for x in arrays] == before
    exact = reference.attention_backward(*arrays, needs=needs, **options)
    unit = 2.0**-53 if query.dtype == F64 else 2.0**-24
    error = unit * (16 + 8 * score_size(query, key, options))
    if query.dtype in (F16, BF16):
        error += float(ml_dtypes.finfo(query.dtype).eps)  # of out
    scale = options.get("scale") or query.shape[-1] ** -0.5
    weight = row_norms(grad_out).sum() / (1 - options.get("dropout_p", 0.0))
    score = 2 * weight * np.max(row_norms(value))
    reach = query.shape[2] + key.shape[2] + largest(np.asarray(options.get("query_offset", 0)))
    sizes = Gradients(
        query=scale * score * np.max(row_norms(key)), key=scale * score * np.max(row_norms(query)),
        value=weight, attn_mask=score, sinks=score, alibi_slopes=score * reach,
    )  # fmt: skip
    for name, a, e, size in zip(Gradients._fields, actual, exact, sizes, strict=True):
        assert (a is None) == (e is None) == (name not in needs)
        if a is None:
            continue
        own = name in ("query", "key", "value")
        assert a.dtype == (query.dtype if own else F64 if query.dtype == F64 else F32) and a.shape == e.shape
        rounding = float(ml_dtypes.finfo(a.dtype).eps)
        tiny = float(ml_dtypes.finfo(a.dtype).smallest_subnormal)
        np.testing.assert_allclose(a.astype(F64), e, rtol=rounding, atol=error * size + tiny, err_msg=name)
    return actual


@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize(
    "shape, dtype", [*((shape, F64) for shape in SHAPES), *((shape, F32) for shape in SHAPES[4:7])], ids=str
)
def test_grid(shape: Shape, case: str, dtype: Any, rng: np.random.Generator) -> None:
    options = CASES[case](rng, shape)
    check(backward_problem(rng, shape, dtype, **options), options)


@pytest.mark.isa_sample
@pytest.mark.parametrize("case", SAMPLE)
@pytest.mark.parametrize("shape", [SHAPES[5], Shape(1, 2, 1, 70, 90, 130, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample(shape: Shape, case: str, dtype: Any, rng: np.random.Generator) -> None:
    options = CASES[case](rng, shape)
    check(backward_problem(rng, shape, dtype, **options), options)


@pytest.mark.parametrize("T, S", [(1, 1), (63, 64), (64, 63), (65, 129), (257, 256), (600, 130), (40, 700)])
@pytest.mark.parametrize("D, E", [(1, 1), (15, 17), (16, 64), (65, 3), (129, 48)])
def test_sizes(T: int, S: int, D: int, E: int, rng: np.random.Generator) -> None:
    """Parts of queries and keys in every proportion."""
    options: Options = {"causal": T <= S, "sinks": rng.standard_normal(2)}
    check(backward_problem(rng, Shape(1, 2, 1, T, S, D, E), F64, **options), options)


# ---- finite differences


@pytest.mark.parametrize(
    "case", ["plain", "all", "sinks", "alibi (B, H)", "bias (B, H, T, S)", "softcap", "dropout"]
)
def test_finite_differences(case: str, rng: np.random.Generator) -> None:
    """The slope of the loss along random directions, by differences of fourth order."""
    shape = Shape(2, 4, 2, 9, 70, 5, 6)
    options = CASES[case](rng, shape)
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"].astype(F64)
    arrays = backward_problem(rng, shape, F64, **options)
    grad_out, query, key, value, *_ = arrays
    needs = everything(options)
    gradients = adaattn.attention_backward(*arrays, needs=needs, **options)._asdict()
    given = {"query": query, "key": key, "value": value} | {
        name: options[name] for name in needs if name in options
    }
    for name, x in given.items():
        direction = rng.standard_normal(x.shape)

        def loss(step: float, name: str = name, x: Array = x, direction: Array = direction) -> float:
            moved = options | given | {name: x + step * direction}
            return float(np.sum(grad_out * adaattn.attention(**moved)))

        h = 1e-3
        slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
        expected = float(np.sum(gradients[name] * direction))
        assert abs(slope - expected) <= 1e-6 * max(1, abs(expected)), name


# ---- torch


@pytest.mark.parametrize("shape", [(2, 2, 257, 64), (1, 2, 600, 40), (1, 1, 500, 128)], ids=str)
@pytest.mark.parametrize("case", ["plain", "causal", "bias"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_error_against_torch(shape: Any, case: str, dtype: str) -> None:
    """At most twice the error of torch's gradient in the same precision, both against float64."""
    torch = pytest.importorskip("torch")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    generator = torch.Generator().manual_seed(1)
    grad_out, *inputs = torch.randn(4, *shape, generator=generator).to(getattr(torch, dtype))
    mask = torch.randn(shape[2], shape[2], generator=generator) if case == "bias" else None

    def gradients(dtype: Any) -> Any:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        bias = None if mask is None else mask.to(dtype)
        out = sdpa(*leaves, attn_mask=bias, is_causal=case == "causal")
        return torch.autograd.grad(out, leaves, grad_out.to(dtype))

    options = {"causal": case == "causal", "attn_mask": mask}
    out, lse = adaattn.attention(*inputs, return_lse=True, **options)
    ours = adaattn.attention_backward(grad_out, *inputs, out, lse, **options)[:3]
    for mine, plain, exact in zip(ours, gradients(grad_out.dtype), gradients(torch.float64), strict=True):
        assert mine.dtype == grad_out.dtype
        assert (mine.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


def test_tensors(rng: np.random.Generator) -> None:
    """Tensors in, tensors out, with the bits of arrays."""
    torch = pytest.importorskip("torch")
    options = {"sinks": rng.standard_normal(4), "attn_mask": float_mask(rng, 65, 130)}
    arrays = backward_problem(rng, SHAPES[5]._replace(H=4, G=2), **options)
    needs = everything(options)
    expected = adaattn.attention_backward(*arrays, needs=needs, **options)
    tensors = [torch.from_numpy(x) for x in arrays]
    options["attn_mask"] = torch.from_numpy(options["attn_mask"])
    actual = adaattn.attention_backward(*tensors, needs=needs, **options)
    assert all(
        (a is None) if e is None else same_bits(a.numpy(), e) for a, e in zip(actual, expected, strict=True)
    )


# ---- bits


@pytest.mark.isa_sample
@pytest.mark.parametrize("case", ["causal", "bias (T, S)", "all"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_threads(case: str, dtype: Any, rng: np.random.Generator) -> None:
    shape = Shape(2, 4, 2, 600, 330, 24, 16)
    options = CASES[case](rng, shape)
    arrays, needs = backward_problem(rng, shape, dtype, **options), everything(options)
    results = [
        adaattn.attention_backward(*arrays, needs=needs, **options, num_threads=n) for n in (1, 2, 3, 8)
    ]
    assert all(same(result, results[0]) for result in results)


def same(a: Gradients, b: Gradients) -> bool:
    return all((x is y) if x is None or y is None else same_bits(x, y) for x, y in zip(a, b, strict=True))


def test_alone_or_in_a_batch(rng: np.random.Generator) -> None:
    shape = Shape(3, 4, 2, 300, 330, 24, 16)
    options: Options = {
        "kv_lengths": np.array([330, 200, 7]), "sinks": rng.standard_normal(4), "causal": True,
        "alibi_slopes": rng.random((3, 4)), "attn_mask": float_mask(rng, 3, 4, 300, 330),
        "dropout_p": 0.1, "seed": np.arange(3),
    }  # fmt: skip
    arrays, needs = backward_problem(rng, shape, **options), everything(options)
    batch = adaattn.attention_backward(*arrays, needs=needs, **options)
    part = {
        name: x[1:2] if isinstance(x, np.ndarray) and name != "sinks" else x for name, x in options.items()
    }
    alone = adaattn.attention_backward(*(x[1:2] for x in arrays), needs=needs, **part)
    for name in ("query", "key", "value", "alibi_slopes", "attn_mask"):
        assert same_bits(getattr(batch, name)[1:2], getattr(alone, name)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout: Callable[[Array], Array], dtype: Any, rng: np.random.Generator) -> None:
    options: Options = {"attn_mask": float_mask(rng, 65, 130), "sinks": rng.standard_normal(2)}
    arrays, needs = backward_problem(rng, SHAPES[5], dtype, **options), everything(options)
    expected = adaattn.attention_backward(*arrays, needs=needs, **options)
    options["attn_mask"] = layout(options["attn_mask"])
    assert same(adaattn.attention_backward(*map(layout, arrays), needs=needs, **options), expected)


def test_each_gradient_by_itself(rng: np.random.Generator) -> None:
    options: Options = {
        "attn_mask": float_mask(rng, 65, 130), "alibi_slopes": rng.random(2), "sinks": rng.random(2),
        "softcap": 3.0,
    }  # fmt: skip
    arrays = backward_problem(rng, SHAPES[5], **options)
    together = adaattn.attention_backward(*arrays, needs=everything(options), **options)
    for i, name in enumerate(Gradients._fields):
        alone = adaattn.attention_backward(*arrays, needs=iter([name]), **options)
        assert [x is not None for x in alone] == [j == i for j in range(6)]
        assert same_bits(alone[i], together[i])
    assert adaattn.attention_backward(*arrays, needs=(), **options) == (None,) * 6


# ---- masked rows, NaN, overflow

EMPTYING: list[Options] = [
    {"attn_mask": np.zeros((1, 1), bool)},
    {"attn_mask": np.where(np.arange(70)[:, None] % 3 > 0, 0.0, -np.inf)},
    {"kv_lengths": np.array([0, 20])},
    {"causal": True, "query_offset": -40},
]


@pytest.mark.parametrize("sinks", [None, np.array([0.5, -2.0])], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("options", EMPTYING, ids=lambda o: " ".join(o))
def test_rows_without_keys(options: Options, dtype: Any, sinks: Any, rng: np.random.Generator) -> None:
    """Their queries have no gradient, and what stands there leaks nowhere, nor from keys that nobody sees."""
    arrays = backward_problem(rng, Shape(2, 2, 2, 70, 130, 16, 16), dtype, **options)
    empty = arrays[5] == -np.inf
    assert empty.any()
    _, unseen = np.nonzero(
        np.isclose(reference.attention_backward(*arrays, **options).value[:, 0], 0).all(-1)
    )
    if sinks is not None:
        options = options | {"sinks": sinks}
        arrays[4:] = adaattn.attention(*arrays[1:4], return_lse=True, **options)
    expected = check(arrays, options)
    assert not expected.query[empty].any()
    for x in arrays[:2]:
        x[empty] = np.nan
    for x in arrays[2:4] if "kv_lengths" in options else []:
        x[0], x[1, :, 20:] = np.nan, np.inf
        assert len(unseen) > 130
    actual = adaattn.attention_backward(*arrays, needs=everything(options), **options)
    for a, e in zip(actual, expected, strict=True):
        if a is not None:
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["grad_out", "query", "key", "value"])
def test_nan_that_nothing_sees(which: int, rng: np.random.Generator) -> None:
    """Neither in the engine nor in the oracle, which has no key at all to add up."""
    options: Options = {"attn_mask": np.zeros((5, 7), bool)}
    arrays = backward_problem(rng, Shape(1, 2, 1, 5, 7, 8, 8), **options)
    arrays[which][...] = np.nan
    for gradients in (adaattn.attention_backward, reference.attention_backward):
        assert not any(x.any() for x in gradients(*arrays, **options)[:3])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window": (4, 4)}, {"softcap": 3.0}, {"dropout_p": 0.9, "seed": 1}],
    ids=str,
)
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["grad_out", "query", "key", "value"])
@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
def test_one_nan(dtype: Any, which: int, options: Options, rng: np.random.Generator) -> None:
    """It makes NaN what plain arithmetic does, and nothing else, in other heads least of all."""
    arrays = backward_problem(rng, Shape(2, 2, 2, 70, 130, 16, 16), dtype)
    arrays[which][0, 1, -1 if which < 2 else -3, 5] = np.nan
    arrays[4:] = adaattn.attention(*arrays[1:4], return_lse=True, **options)
    actual = adaattn.attention_backward(*arrays, **options)
    exact = reference.attention_backward(*arrays, **options)
    for a, e in zip(actual[:3], exact[:3], strict=True):
        assert (np.isnan(a) == np.isnan(e)).all()
        assert np.isfinite(a[1]).all() and np.isfinite(a[0, 0]).all()
        np.testing.assert_allclose(a.astype(F64), e, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "sizes",
    [(1e30, 1e-30, 1, 1), (1e10, 1e10, 1, 1), (1, 1, 1e30, 1e10), (1, 1e-30, 1, 1e35), (1, 1e20, 1, 1e25)],
    ids=str,
)
def test_overflow(sizes: Any, rng: np.random.Generator) -> None:
    """float32 arrays whose products are beyond float32, where the gradients are not."""
    arrays = backward_problem(rng, Shape(1, 2, 1, 70, 90, 16, 16), F64)[:4]
    for x, size in zip((*arrays[1:], arrays[0]), sizes, strict=True):
        x *= size
    arrays = [x.astype(F32) for x in arrays]
    out, lse = adaattn.attention(*arrays[1:], return_lse=True, scale=1e-20)
    actual = adaattn.attention_backward(*arrays, out, lse, scale=1e-20)
    exact = reference.attention_backward(*arrays, scale=1e-20)
    with np.errstate(over="ignore"):
        for a, e in zip(actual[:3], exact[:3], strict=True):
            size = np.abs(e).max()
            np.testing.assert_allclose(a / size, np.float32(e) / size, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("lowest", [np.finfo(np.float32).min, -1e30, -1e5, 1e4])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_bias_beyond_the_scores(dtype: Any, lowest: float, rng: np.random.Generator) -> None:
    """Rows with the same large bias everywhere, in which the lse cannot say how many keys there are."""
    shape = Shape(1, 2, 1, 70, 90, 16, 16)
    mask = np.where(np.arange(70)[:, None] % 4 == 0, lowest, float_mask(rng, 70, 90)).astype(np.float32)
    mask[4, 20:] = -np.inf
    options: Options = {"attn_mask": mask}
    arrays = backward_problem(rng, shape, dtype, **options)
    actual = adaattn.attention_backward(*arrays, needs=everything(options), **options)
    exact = reference.attention_backward(*arrays, needs=everything(options), **options)
    error = {F64: 1e-9, F32: 1e-4, BF16: 3e-2}[dtype]
    for a, e in zip(actual, exact, strict=True):
        if a is not None:
            assert np.linalg.norm(a.astype(F64) - e) <= error * np.linalg.norm(e)


# ---- memory


def test_failing_allocations(rng: np.random.Generator) -> None:
    options: Options = {"attn_mask": float_mask(rng, 300, 330)}
    arrays, needs = (
        backward_problem(rng, Shape(1, 2, 1, 300, 330, 24, 16), BF16, **options),
        ["query", "attn_mask"],
    )
    expected = adaattn.attention_backward(*arrays, needs=needs, **options)

    def call(n: int) -> Gradients | None:
        _adaattn._alloc_fail_after(n)
        try:
            return adaattn.attention_backward(*arrays, needs=needs, **options)
        except MemoryError as error:
            assert re.search("no memory for [0-9]+ bytes", str(error))
            return None
        finally:
            _adaattn._alloc_fail_after(-1)

    results = []
    for n in range(4):
        with ThreadPoolExecutor(1) as thread:  # of its own, which has no memory kept from calls before
            results.append(thread.submit(call, n).result())
    assert results[:2] == [None, None] and same(results[2], expected) and same(results[3], expected)


def _peak(T: int) -> int:
    arrays = backward_problem(np.random.default_rng(0), Shape(1, 1, 1, T, T, 16, 16))
    before = peak_memory()
    adaattn.attention_backward(*arrays)
    return peak_memory() - before


def test_memory_grows_with_the_length() -> None:
    """Scores of this head would take 1 GB."""
    assert in_new_process(_peak, 16384) < 40 << 20


def _growth(calls: int) -> int:
    rng = np.random.default_rng(0)
    options: Options = {"attn_mask": float_mask(rng, 65, 130), "sinks": rng.random(2)}
    arrays = backward_problem(rng, SHAPES[5], **options)
    wrong = [*arrays[:5], arrays[5][..., :-1]]
    sizes = []
    for i in range(calls):
        adaattn.attention_backward(*arrays, needs=everything(options), **options)
        with pytest.raises(adaattn.ShapeError):
            adaattn.attention_backward(*wrong, **options)
        with pytest.raises(adaattn.ArgumentError):
            adaattn.attention_backward(*arrays, needs=["query", "keys"], **options)
        if i in (calls // 2, calls - 1):
            gc.collect()
            sizes.append(peak_memory())
    return sizes[1] - sizes[0]


def test_no_leak() -> None:
    """A lost reference to one array would cost 60 KB a call, 12 MB in half of them; pages may be of 2 MB."""
    assert in_new_process(_growth, 400) < 6 << 20


# ---- errors


def wrong_argument(**changes: Any) -> str:
    rng = np.random.default_rng(0)
    names = ["grad_out", "query", "key", "value", "out", "lse"]
    arguments = dict(zip(names, backward_problem(rng, Shape(2, 4, 2, 5, 7, 8, 6)), strict=True)) | changes
    with pytest.raises(adaattn.ArgumentError) as caught:
        adaattn.attention_backward(**arguments)
    return f"{type(caught.value).__name__}: {caught.value}"


ZEROS = np.zeros((2, 4, 5, 6), np.float32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grad_out": ZEROS[:1]}, "ShapeError: grad_out: expected shape (2, 4, 5, 6), got (1, 4, 5, 6)"),
        ({"grad_out": ZEROS[0]}, "ShapeError: grad_out: expected shape (2, 4, 5, 6), got (4, 5, 6)"),
        ({"out": ZEROS[..., :5]}, "ShapeError: out: expected shape (2, 4, 5, 6), got (2, 4, 5, 5)"),
        ({"lse": ZEROS}, "ShapeError: lse: expected shape (2, 4, 5), got (2, 4, 5, 6)"),
        ({"lse": ZEROS[..., :4, 0]}, "ShapeError: lse: expected shape (2, 4, 5), got (2, 4, 4)"),
        ({"query": ZEROS[..., :7]}, "ShapeError: key: expected query's head size 6, got shape (2, 2, 7, 8)"),
        ({"sinks": [1.0]}, "ShapeError: sinks: expected shape (4,), got (1,)"),
        ({"needs": ["sinks"]}, "ArgumentError: needs: expected 'sinks' only with sinks, got None"),
        (
            {"needs": ["alibi_slopes"]},
            "ArgumentError: needs: expected 'alibi_slopes' only with alibi_slopes, got None",
        ),
        (
            {"needs": ["attn_mask"]},
            "ArgumentError: needs: expected 'attn_mask' only with a floating attn_mask, got None",
        ),
        (
            {"needs": ["attn_mask"], "attn_mask": np.ones(7, bool)},
            "ArgumentError: needs: expected 'attn_mask' only with a floating attn_mask, got a bool one",
        ),
        (
            {"needs": ["keys"]},
            "ArgumentError: needs: expected names among 'query', 'key', 'value', 'attn_mask', 'sinks' and "
            "'alibi_slopes', got 'keys'",
        ),
        (
            {"attn_mask": np.full(7, np.nan, np.float32)},
            "ArgumentError: attn_mask: expected finite numbers or -inf, got NaN or +inf",
        ),
        (
            {"dropout_p": 0.5},
            "ArgumentError: seed: expected an int or 2 ints since dropout_p is 0.5, got None",
        ),
        ({"num_threads": 0}, "ArgumentError: num_threads: expected an int of at least 1, got 0"),
    ],
)  # fmt: skip
def test_errors(changes: Options, message: str) -> None:
    assert wrong_argument(**changes) == message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grad_out": ZEROS.astype(F64)}, "grad_out: expected query's dtype float32, got float64"),
        (
            {"grad_out": ZEROS.astype(int)},
            "grad_out: expected float32, float64, float16 or bfloat16, got int64",
        ),
        ({"grad_out": ZEROS.tolist()}, "grad_out: expected "),
        ({"out": ZEROS.astype(F16)}, "out: expected query's dtype float32, got float16"),
        ({"lse": ZEROS[..., 0].astype(F64)}, "lse: expected for query's dtype float32, got float64"),
        ({"needs": "query"}, "needs: expected names among "),
        ({"needs": None}, "needs: expected names among "),
        ({"needs": [1]}, "needs: expected names among "),
    ],
)
def test_wrong_types(changes: Options, message: str) -> None:
    rng = np.random.default_rng(0)
    names = ["grad_out", "query", "key", "value", "out", "lse"]
    arguments = dict(zip(names, backward_problem(rng, Shape(2, 4, 2, 5, 7, 8, 6)), strict=True)) | changes
    with pytest.raises(adaattn.DTypeError, match="^" + re.escape(message)):
        adaattn.attention_backward(**arguments)


@pytest.mark.parametrize("name", ["plan", "structure", "device"])
def test_what_the_gradient_does_not_take(name: str, rng: np.random.Generator) -> None:
    with pytest.raises(TypeError, match=name):
        adaattn.attention_backward(*backward_problem(rng, SHAPES[1]), **{name: None})


def test_interrupt() -> None:
    """A signal whose handler raises ends a call that would take minutes."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    one = np.ones((1, 1, 1, 1), np.float32)
    arrays = [np.broadcast_to(one, (1, 8, 50_000, 16)) for _ in range(5)]
    lse = np.broadcast_to(one[0], (1, 8, 50_000))
    before = signal.signal(signal.SIGALRM, stop)
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeoutError):
            adaattn.attention_backward(*arrays, lse, num_threads=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [100.0, 3e3, 1e10])
def test_scores_that_swallow_the_digits_of_the_lse(dtype: Any, size: float, rng: np.random.Generator) -> None:
    """Weights are exact there: one key has it all. An lse of a million holds no weight to better than 6 %."""
    query, key, value, grad = rng.standard_normal((4, 1, 1, 70, 16)).astype(dtype)
    query, key = query * dtype(size), key * dtype(size)
    out, lse = adaattn.attention(query, key, value, return_lse=True)
    gradients = adaattn.attention_backward(grad, query, key, value, out, lse)
    scores = query.astype(np.float64) @ key.astype(np.float64).swapaxes(2, 3) / 4
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = weights.swapaxes(2, 3) @ grad
    assert np.linalg.norm(gradients.value - expected) <= 1e-6 * np.linalg.norm(expected)
    assert np.isfinite(gradients.query).all()
    assert np.isfinite(gradients.key).all()
