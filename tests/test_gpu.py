"""The CUDA backend on a real GPU, against float64. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import BF16, CASES, DTYPES, F16, F32, F64, SHAPES, Array, Shape, inputs, largest, score_size

import adaattn
from adaattn import reference
from adaattn.bench.heads import topics, walk

INFO = adaattn.gpu_info()
if not INFO["available"]:
    pytest.skip(f"no GPU: {INFO['reason']}", allow_module_level=True)
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch without CUDA", allow_module_level=True)

RUNGS = INFO["devices"][0]["rungs"]
TORCH = {F64: torch.float64, F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
ROUNDING = {F64: 2.0**-53, F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}

SMALL = [SHAPES[1], SHAPES[5], SHAPES[6]]
LONG = [
    Shape(1, 2, 1, 300, 500, 128, 128),
    Shape(1, 2, 1, 257, 640, 64, 64),
    Shape(1, 8, 1, 1, 5000, 128, 128),
    Shape(2, 8, 2, 4, 1111, 64, 64),
]


@pytest.fixture
def rng() -> np.random.Generator:
    """As conftest.py has it, which benchmarks/gpu.py does without."""
    return np.random.default_rng(0)


def to_gpu(x: Any) -> Any:
    """A tensor on the GPU; other things, and small vectors, as they are."""
    if not isinstance(x, np.ndarray) or x.dtype.kind in "iu":
        return x
    return torch.from_numpy(x.astype(F32) if x.dtype == BF16 else x).cuda().to(TORCH.get(x.dtype))


def to_cpu(x: Any) -> Array:
    """As float64; exact for every dtype."""
    found: Array = x.double().cpu().numpy()
    return found


def relative(out: Any, exact: Array) -> float:
    """Largest relative Frobenius error of a head."""
    error = np.linalg.norm(to_cpu(out) - exact, axis=(2, 3))
    return float((error / np.maximum(np.linalg.norm(exact, axis=(2, 3)), 1e-300)).max())


def exact_on_gpu(query: Any, key: Any, value: Any, causal: bool = False) -> Any:
    """Attention in float64 by torch, for sizes that take NumPy too long."""
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64, device=q.device)
    T, S = q.shape[2], k.shape[2]
    for i in range(0, T, 1024):
        scores = q[:, :, i : i + 1024] @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if causal:
            rows = torch.arange(i, min(i + 1024, T), device=q.device)[:, None] + S - T
            scores.masked_fill_(torch.arange(S, device=q.device) > rows, -torch.inf)
        out[:, :, i : i + 1024] = scores.softmax(-1) @ v
    return out


# ---- options, shapes, dtypes


def check(arrays: list[Array], **options: Any) -> None:
    """out and lse against the oracle: scores err by the rounding of fp32, weights by that of the format that
    multiplies them, out by its own."""
    dtype = arrays[0].dtype
    exact, exact_lse = reference.attention(*arrays, return_lse=True, **options)
    there = {name: to_gpu(x) for name, x in options.items() if name != "num_threads"}
    out, lse = adaattn.attention(*map(to_gpu, arrays), return_lse=True, **there)
    assert out.is_cuda and out.dtype == TORCH[dtype]
    double = options.get("precision") == "fp64" or (dtype == F64 and "precision" not in options)
    single = options.get("precision") == "fp32" or dtype in (F32, F64)
    score = (2.0**-53 if double else 2.0**-22) * (16 + 4 * score_size(arrays[0], arrays[1], options))
    weight = 0 if double or single else 2 * ROUNDING[dtype]
    kept = 1 - options.get("dropout_p", 0.0)
    absolute = (score + weight) * largest(arrays[2]) / kept + 1e-7 * (dtype == F16)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_allclose(to_cpu(out), exact, rtol=ROUNDING[dtype], atol=absolute)
        np.testing.assert_allclose(to_cpu(lse), exact_lse, rtol=2.0**-22, atol=score)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_options(case: str, dtype: Any, rng: np.random.Generator) -> None:
    for shape in SMALL:
        check(inputs(rng, shape, dtype), **CASES[case](rng, shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG], ids=str)
def test_shapes(shape: Shape, dtype: Any, rng: np.random.Generator) -> None:
    for case in ("plain", "causal", "window", "lengths", "bias (T, S)"):
        check(inputs(rng, shape, dtype), **CASES[case](rng, shape))


@pytest.mark.parametrize(
    "D", [1, 2, 3, 7, 8, 15, 16, 24, 31, 32, 33, 48, 63, 72, 80, 96, 100, 127, 160, 192, 255]
)
def test_head_sizes(D: int, rng: np.random.Generator) -> None:
    for dtype in DTYPES:
        check(inputs(rng, Shape(1, 2, 1, 70, 90, D, D), dtype), causal=True)
        check(inputs(rng, Shape(1, 2, 1, 70, 90, D, 257 - D if D > 1 else 3), dtype))


# Relative Frobenius errors of normal entries, with room for luck.
CLASSES = {
    ("fp64", "fp64"): 1e-14,
    ("fp32", "fp32"): 1e-6,
    ("fp16", "fp16"): 1e-3,
    ("bf16", "bf16"): 8e-3,
    ("int8", "bf16"): 3e-2,
    ("int8", "fp16"): 3e-2,
    ("int8", "fp8"): 6e-2,
    ("fp8", "fp8"): 8e-2,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rungs", CLASSES, ids="/".join)
def test_rungs(rungs: tuple[str, str], dtype: Any, rng: np.random.Generator) -> None:
    if not set(rungs) <= set(RUNGS):
        pytest.skip(f"this device computes {RUNGS}")
    for shape in (Shape(2, 4, 2, 130, 300, 64, 64), Shape(1, 2, 1, 260, 515, 128, 96)):
        arrays = inputs(rng, shape, dtype)
        exact = reference.attention(*arrays, causal=True)
        try:
            out, report = adaattn.attention(
                *map(to_gpu, arrays), causal=True, precision=rungs, return_report=True
            )
        except adaattn.ArgumentError as error:
            assert "rungs that the GPU computes" in str(error) and (dtype == F64 or rungs[0] == "int8")
            continue
        assert (report.precision_qk == rungs[0]).all() and (report.precision_pv == rungs[1]).all()
        assert relative(out, exact) < CLASSES[rungs] + ROUNDING[dtype]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_long(dtype: Any, D: int, causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 4096, D, device="cuda").to(TORCH[dtype]) for h in (4, 2, 2))
    exact = exact_on_gpu(query, key, value, causal).cpu().numpy()
    limit = {F32: 1e-6, F16: 4e-4, BF16: 4e-3}[dtype]
    assert relative(adaattn.attention(query, key, value, causal=causal), exact) < limit
    assert relative(adaattn.attention(query[:, :, -1:], key, value), exact[:, :, -1:]) < limit


# ---- budgets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tolerance", [1e-6, 1e-4, 3e-3, 1e-2, 5e-2])
def test_budgets_are_kept(tolerance: float, dtype: Any) -> None:
    torch.manual_seed(1)
    for B, H, G, T, S, D in [(1, 4, 2, 2048, 2048, 128), (2, 2, 2, 300, 1000, 64), (1, 2, 1, 20, 3000, 64)]:
        for spread in (1.0, 3.0):
            shapes = (B, H, T, D), (B, G, S, D), (B, G, S, D)
            query, key, value = (torch.randn(shape, device="cuda").to(TORCH[dtype]) for shape in shapes)
            query *= spread
            for causal in (False, True):
                exact = exact_on_gpu(query, key, value, causal).cpu().numpy()
                out, _, report = adaattn.attention(
                    query, key, value, causal=causal, tolerance=tolerance, return_lse=True, return_report=True
                )
                assert relative(out, exact) <= tolerance + ROUNDING[dtype]
                assert (report.verified_rows > 0).all() == (T >= 64)
                assert set(report.precision_qk.flat) <= set(RUNGS)
                again = adaattn.attention(
                    query, key, value, causal=causal, tolerance=tolerance, return_lse=True
                )
                assert torch.equal(out, again[0])


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_loose_budget_is_used(dtype: Any) -> None:
    torch.manual_seed(1)
    arrays = [torch.randn(1, 4, 8192, 64, device="cuda").to(TORCH[dtype]) for _ in range(3)]
    report = adaattn.attention(*arrays, tolerance=3e-2, return_report=True)[1]
    assert not np.isin(report.precision_qk, ["fp64", "fp32"]).any() and not report.retried.any()
    assert (report.measured_error < 3e-2).all() and (report.measured_error > 1e-5).all()


def test_guesses_are_the_cpus(rng: np.random.Generator) -> None:
    """The device's figures of keys and queries say what the engine's own say."""
    arrays = inputs(rng, Shape(2, 4, 2, 1500, 1500, 80, 72), F32)
    arrays[0] *= np.float32(1.5)
    arrays[1] += np.float32(0.3)
    for options in ({}, {"causal": True, "window": (700, 0)}, {"kv_lengths": [1500, 1234], "softcap": 2.0}):
        options |= {"tolerance": 1e-8, "return_lse": True}  # so fine that no rows are profiled
        on_cpu = adaattn.plan(*arrays, **options)
        there = adaattn.plan(*map(to_gpu, arrays), **options)
        for name in ("fp32", "fp64"):
            c = on_cpu.candidates.index(name)
            for error in ("candidate_error", "candidate_lse_error"):
                x, y = (getattr(plan, error)[..., c] for plan in (on_cpu, there))
                # Of all rows there, and of some here.
                np.testing.assert_allclose(x, y, rtol=1e-3 if error == "candidate_error" else 1)


# ---- sparse heads


def topical(S: int, D: int, heads: int = 2) -> list[Array]:
    """Runs of 512 keys on one of a few topics, float32."""
    made = [topics(S, D, count=8, seed=seed) for seed in range(heads)]
    return [np.concatenate([getattr(x, name) for x in made], 1) for name in ("query", "key", "value")]


def check_structure(structure: str, arrays: list[Any], dtype: Any, options: dict[str, Any]) -> Any:
    """All heads have it by name, and are right; so are plans of it."""
    asked = {"structure": structure, "tolerance": 1e-2, "return_report": True, "return_lse": True}
    out, lse, report = adaattn.attention(*arrays, **asked, **options)
    assert (report.structure == structure).all() and not report.retried.any()
    assert (report.error_limit <= 1e-2 + ROUNDING[dtype]).all() and (report.verified_rows > 0).all()
    exact, exact_lse = adaattn.attention(*arrays, precision="fp64", return_lse=True, **options)
    assert relative(out, to_cpu(exact)) <= 1e-2 + ROUNDING[dtype]
    assert float((lse - exact_lse).abs().max()) <= 1e-2
    for verify in (True, False):
        again = adaattn.attention(*arrays, plan=report.plan, verify=verify, **options)
        assert torch.equal(again, out)
    return report


@pytest.mark.parametrize("D", [40, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_heads(dtype: Any, D: int) -> None:
    arrays = [to_gpu(x.astype(dtype)) for x in topical(4096, D)]
    for options in ({"causal": True}, {}, {"window": (3000, 0), "causal": True}, {"kv_lengths": [4000]}):
        report = check_structure("sparse", arrays, dtype, options)
        assert (report.kept_fraction < 0.6).all()


def test_sparse_heads_are_chosen() -> None:
    """Head by head, where they pay."""
    arrays = [to_gpu(x) for x in topical(32768, 64, 8)]
    arrays[0][:, 3], arrays[1][:, 3] = torch.randn_like(arrays[0][:, :2]).unbind(1)
    report = adaattn.attention(*arrays, causal=True, tolerance=1e-2, return_report=True)[1]
    expected = np.where(np.arange(8) == 3, "dense", "sparse")
    assert (report.structure[0] == expected).all() and not report.retried.any()
    assert report.kept_fraction[0, 3] == 1 and np.delete(report.kept_fraction[0], 3).max() < 0.3


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_what_sparse_heads_must_not_leave_out(dtype: Any) -> None:
    """One key that one row looks at, and NaN that no row looks at."""
    query, key, value = (to_gpu(x.astype(dtype)) for x in topical(2048, 64, 1))
    key[0, 0, 700] = 2 * query[0, 0, 5]
    value[0, 0, 700] *= 1000
    asked = {"structure": "sparse", "tolerance": 1e-2}
    exact = to_cpu(adaattn.attention(query, key, value, precision="fp64"))
    assert relative(adaattn.attention(query, key, value, **asked), exact) <= 1e-2 + ROUNDING[dtype]
    value[0, 0, 1500, 3] = torch.nan
    out = adaattn.attention(query, key, value, structure="sparse", tolerance=1e-2, verify=False)
    assert out[..., 3].isnan().all() and not out[..., 4:].isnan().any()


def test_sparse_plans_are_captured() -> None:
    arrays = [to_gpu(x.astype(F32)).to(torch.bfloat16) for x in topical(2048, 64)]
    plan = adaattn.plan(*arrays, causal=True, structure="sparse", tolerance=1e-2)
    assert (plan.structure == "sparse").all()
    out = torch.empty_like(arrays[0])
    adaattn.attention(*arrays, causal=True, plan=plan, verify=False, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adaattn.attention(*arrays, causal=True, plan=plan, verify=False, out=out)
    arrays[0].copy_(arrays[0].flip(1))  # other queries, for which other blocks count
    expected = adaattn.attention(*arrays, causal=True, plan=plan, verify=False)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


# ---- heads of low rank


@pytest.mark.parametrize("D", [40, 64, 128])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_heads_of_low_rank(dtype: Any, D: int) -> None:
    made = [walk(4096, D, seed=seed) for seed in range(2)]
    arrays = [
        to_gpu(np.concatenate([getattr(x, name) for x in made], 1).astype(dtype))
        for name in ("query", "key", "value")
    ]
    for options in ({}, {"causal": True}, {"kv_lengths": [4000]}, {"sinks": [0.5, 1.0]}):
        check_structure("low_rank", arrays, dtype, options)


def test_rows_that_landmarks_do_not_span() -> None:
    """Some queries look at one key each, far beyond the others."""
    heads = walk(4096)
    query, key, value = (to_gpu(x) for x in (heads.query, heads.key, heads.value))
    key[0, 0, 700] += 3 * torch.randn_like(key[0, 0, 700])
    query[0, 0, 5] = 4 * (key[0, 0, 700] - key.mean(2)[0, 0])
    exact = to_cpu(adaattn.attention(query, key, value, precision="fp64"))
    plan = adaattn.plan(query, key, value, structure="low_rank", tolerance=1e-2)
    out, report = adaattn.attention(query, key, value, plan=plan, verify=False, return_report=True)
    assert report.structure.item() == "low_rank"
    assert relative(out, exact) <= 1e-2 and relative(out[:, :, 5], exact[:, :, 5]) <= 1e-2


def test_plans_are_quiet() -> None:
    """A plan that is trusted waits for nothing."""
    torch.manual_seed(1)
    arrays = [torch.randn(1, 4, 2048, 64, device="cuda") for _ in range(3)]
    plan = adaattn.plan(*arrays, tolerance=1e-2)
    expected = adaattn.attention(*arrays, plan=plan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        out = adaattn.attention(*arrays, plan=plan, verify=False)
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(out, expected)


# ---- numbers that are none


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinities(dtype: Any, rng: np.random.Generator) -> None:
    """They go where float64 has them, and nowhere else."""
    shape = Shape(1, 2, 1, 100, 150, 32, 32)
    for which in range(3):
        for x in (np.nan, np.inf, -np.inf):
            arrays = inputs(rng, shape, dtype)
            arrays[which][0, 0, 20, 3] = x
            with np.errstate(invalid="ignore"):
                exact = reference.attention(*arrays, causal=True)
            out = to_cpu(adaattn.attention(*map(to_gpu, arrays), causal=True))
            assert (np.isnan(out) == np.isnan(exact)).all() and (np.isinf(out) == np.isinf(exact)).all()
            good = np.isfinite(exact)
            np.testing.assert_allclose(out[good], exact[good], atol=8 * ROUNDING[dtype] * largest(arrays[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_hidden_changes_no_bit(dtype: Any, rng: np.random.Generator) -> None:
    shape = Shape(1, 2, 1, 100, 150, 64, 64)
    arrays = inputs(rng, shape, dtype)
    expected = adaattn.attention(*map(to_gpu, arrays), kv_lengths=np.array([90]))
    arrays[1][:, :, 90:] = np.nan
    arrays[2][:, :, 90:] = np.inf
    assert torch.equal(adaattn.attention(*map(to_gpu, arrays), kv_lengths=np.array([90])), expected)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scores_beyond_fp32(dtype: Any, rng: np.random.Generator) -> None:
    arrays = inputs(rng, Shape(1, 1, 1, 70, 80, 16, 16), dtype)
    arrays[0] *= np.asarray(1e25, dtype)
    arrays[1] *= np.asarray(1e25, dtype)
    exact = reference.attention(*arrays)
    assert np.isfinite(exact).all()
    assert relative(adaattn.attention(*map(to_gpu, arrays)), exact) < 1e-6 + ROUNDING[dtype]


# ---- gradients


def everything(options: dict[str, Any]) -> list[str]:
    """All that these options have gradients for."""
    names = ["query", "key", "value", *(x for x in ("sinks", "alibi_slopes") if options.get(x) is not None)]
    mask = options.get("attn_mask")
    return names if mask is None or mask.dtype == bool else [*names, "attn_mask"]


def check_gradients(arrays: list[Array], grad_out: Array, **options: Any) -> Any:
    """Against the oracle, in Frobenius norms; what is nothing but rounding is compared with what cancels."""
    dtype = arrays[0].dtype
    needs = everything(options)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = reference.attention_backward(grad_out, *arrays, needs=needs, **options)
    there = {name: to_gpu(x) for name, x in options.items()}
    out, lse = adaattn.attention(*map(to_gpu, arrays), return_lse=True, **there)
    found = adaattn.attention_backward(*map(to_gpu, [grad_out, *arrays]), out, lse, needs=needs, **there)
    unit = 2.0**-50 if dtype == F64 else 2.0**-21 if dtype == F32 else 2 * ROUNDING[dtype]
    unit *= 1 + (0.1 if dtype in (F16, BF16) else 0.5) * score_size(arrays[0], arrays[1], options)
    norms = [np.sqrt((x.astype(F64) ** 2).sum(axis=-1)) for x in (*arrays, grad_out)]
    scale = options.get("scale") or arrays[0].shape[-1] ** -0.5
    rows = norms[3] / (1 - options.get("dropout_p", 0.0))
    by_score, whole = 2 * norms[2].max(), np.linalg.norm(rows)
    offset = np.abs(np.asarray(options.get("query_offset", 0))).max()
    for name, x, e in zip(found._fields, found, exact, strict=True):
        assert (x is None) == (name not in needs)
        if x is None:
            continue
        own = name in ("query", "key", "value")
        assert x.is_cuda and x.dtype == (TORCH[dtype] if own else TORCH[F64 if dtype == F64 else F32])
        size = {
            "query": scale * by_score * norms[1].max() * whole,
            "key": scale * by_score * norms[0].max() * whole,
            "value": whole,
            "attn_mask": by_score * whole * (rows.size * arrays[1].shape[2] / e.size) ** 0.5,
            "sinks": by_score * rows.sum(),
            "alibi_slopes": by_score * rows.sum() * (arrays[0].shape[2] + arrays[1].shape[2] + offset),
        }[name]
        assert (
            np.linalg.norm(to_cpu(x) - e) <= unit * size + 2 * ROUNDING[dtype] * np.linalg.norm(e) + 1e-30
        ), name
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.startswith(("precision", "two threads"))]
)
def test_gradients(case: str, dtype: Any, rng: np.random.Generator) -> None:
    for shape in (*SMALL, Shape(1, 4, 2, 140, 210, 64, 64)):
        arrays = inputs(rng, shape, dtype)
        grad_out = rng.standard_normal((*arrays[0].shape[:3], shape.E)).astype(dtype)
        check_gradients(arrays, grad_out, **CASES[case](rng, shape))


@pytest.mark.parametrize("D", [1, 7, 16, 33, 64, 72, 100, 128, 160, 200, 256])
def test_gradients_of_head_sizes(D: int, rng: np.random.Generator) -> None:
    for dtype in DTYPES:
        shape = Shape(1, 2, 1, 150, 170, D, 257 - D if D > 1 else 3)
        arrays = inputs(rng, shape, dtype)
        grad_out = rng.standard_normal((*arrays[0].shape[:3], shape.E)).astype(dtype)
        check_gradients(arrays, grad_out, causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_long_gradients(dtype: Any, D: int, causal: bool) -> None:
    """At most twice torch's own error in that dtype, both against its float64; twice with the same bits."""
    torch.manual_seed(0)
    arrays = [torch.randn(1, h, 1500, D, device="cuda").to(TORCH[dtype]) for h in (4, 2, 2)]
    grad_out = torch.randn(1, 4, 1500, D, device="cuda").to(TORCH[dtype])

    def by_torch(kind: Any) -> Any:
        leaves = [x.to(kind).requires_grad_() for x in arrays]
        wide = [leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])]
        out = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=causal)
        return torch.autograd.grad(out, leaves, grad_out.to(kind))

    out, lse = adaattn.attention(*arrays, causal=causal, return_lse=True)
    ours, again = (
        adaattn.attention_backward(grad_out, *arrays, out, lse, causal=causal)[:3] for _ in range(2)
    )
    for x, y, own, right in zip(ours, again, by_torch(TORCH[dtype]), by_torch(torch.float64), strict=True):
        assert torch.equal(x, y)
        limit = max(2 * float((own.double() - right).norm()), 1e-6 * float(right.norm()))
        assert float((x.double() - right).norm()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_what_is_no_number(dtype: Any, rng: np.random.Generator) -> None:
    """A key head with a NaN is computed in float64, pair by pair; others keep their bits."""
    shape = Shape(2, 2, 1, 40, 50, 32, 32)
    arrays = inputs(rng, shape, dtype)
    grad_out = rng.standard_normal((*arrays[0].shape[:3], shape.E)).astype(dtype)
    for which in range(4):
        spoilt = [x.copy() for x in (grad_out, *arrays)]
        spoilt[which][0, 0, 20, 3] = np.nan
        with np.errstate(invalid="ignore"):
            exact = reference.attention_backward(*spoilt, causal=True)
        there = [to_gpu(x) for x in spoilt]
        out, lse = adaattn.attention(*there[1:], causal=True, return_lse=True)
        found, report = adaattn.attention_backward(*there, out, lse, causal=True, return_report=True)
        assert report.retried.tolist() == ([[False], [False]] if dtype == F64 else [[True], [False]])
        for x, right in zip(found[:3], exact[:3], strict=True):
            assert (np.isnan(to_cpu(x)) == np.isnan(right)).all()


def gradient_errors(found: Any, exact: Any) -> list[Array]:
    """Relative ones of each head."""
    pairs = [(to_cpu(x).astype(F64), right) for x, right in zip(found[:3], exact[:3], strict=True)]
    return [np.linalg.norm(x - right, axis=(2, 3)) / np.linalg.norm(right, axis=(2, 3)) for x, right in pairs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", ["plain", "causal", "bias (B, H, T, S)", "mask (H, 1, S)", "dropout", "lengths, causal", "all"]
)
def test_gradients_within_a_tolerance(case: str, dtype: Any, rng: np.random.Generator) -> None:
    """Right by the report and the oracle, and also behind a forward pass that was wrong in one sequence."""
    shape = Shape(2, 4, 2, 300, 330, 64, 72)
    options = CASES[case](rng, shape)
    arrays = inputs(rng, shape, dtype)
    grad_out = rng.standard_normal((*arrays[0].shape[:3], shape.E)).astype(dtype)
    exact = reference.attention_backward(*(x.astype(F64) for x in (grad_out, *arrays)), **options)
    there = {name: to_gpu(x) for name, x in options.items()}
    moved = [to_gpu(x) for x in (grad_out, *arrays)]
    out, lse = adaattn.attention(*moved[1:], return_lse=True, **there)
    own = {F16: "fp16", BF16: "bf16", F32: "fp32", F64: "fp64"}[dtype]
    found, report = adaattn.attention_backward(*moved, out, lse, tolerance=3e-2, return_report=True, **there)
    assert (report.precision_scores == own).all() and (report.verified_rows > 0).all()
    assert not report.retried.any()
    for name, error in zip(("query", "key", "value"), gradient_errors(found, exact), strict=True):
        assert (error <= 3e-2).all() and (getattr(report, f"{name}_limit") <= 3e-2 + ROUNDING[dtype]).all()
        if dtype in (F16, BF16):
            measured = getattr(report, f"{name}_error")
            assert (measured < 3 * error).all() and (measured > error / 3).all()
    lse[0] += 0.3 * torch.randn_like(lse[0])
    for tolerance, rung in ((3e-2, "fp32"), *([(1e-9, "fp64")] if dtype == F32 else [])):
        found, report = adaattn.attention_backward(
            *moved, out, lse, tolerance=tolerance, return_report=True, **there
        )
        # fp64 computes from the inputs alone: nothing that was given counts.
        assert report.retried[0].all() == (dtype != F64)
        assert dtype == F64 or (report.precision_sums[0] == rung).all()
        assert tolerance < 1e-2 or not report.retried[1].any()
        for error in gradient_errors(found, exact):
            assert (error <= tolerance + max(ROUNDING[dtype], 2.0**-24)).all()


def test_a_tolerance_of_autograd() -> None:
    from adaattn.integrations.torch import scaled_dot_product_attention

    torch.manual_seed(0)
    leaves = [torch.randn(1, 4, 700, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    grad = torch.randn(1, 4, 700, 64, device="cuda").bfloat16()
    out = scaled_dot_product_attention(*leaves, is_causal=True, tolerance=2e-2)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    right = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    ours, theirs = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(right, wide, grad.double())
    for x, y in zip(ours, theirs, strict=True):
        error = (x.double() - y).norm(dim=(2, 3)) / y.norm(dim=(2, 3))
        assert float(error.max()) <= 2e-2 + ROUNDING[BF16]


def test_autograd_against_torch() -> None:
    """In float64 the gradients of torch's own function, with masks and biases that want one too."""
    from adaattn.integrations.torch import scaled_dot_product_attention

    torch.manual_seed(0)
    kind = {"device": "cuda", "dtype": torch.float64}
    leaves = [torch.randn(2, 3, n, 24, **kind, requires_grad=True) for n in (50, 70, 70)]
    bias = torch.randn(3, 50, 70, **kind, requires_grad=True)
    for options in ({}, {"is_causal": True}, {"attn_mask": bias}):
        wanted = [*leaves, bias] if "attn_mask" in options else leaves
        ours, theirs = (
            torch.autograd.grad(f(*leaves, **options).square().sum(), wanted)
            for f in (scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention)
        )
        for x, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, right, rtol=1e-9, atol=1e-10)
    sinks = torch.zeros(3, device="cuda", requires_grad=True)
    scaled_dot_product_attention(*leaves, sinks=sinks).square().sum().backward()
    assert sinks.grad is not None and sinks.grad.is_cuda and bool(sinks.grad.abs().min() > 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool) -> None:
    from adaattn.integrations.torch import scaled_dot_product_attention

    torch.manual_seed(0)
    leaves = [torch.randn(1, 4, 256, 64, device="cuda", requires_grad=True) for _ in range(3)]
    function: Any = scaled_dot_product_attention
    if compiled:
        pytest.importorskip("triton")
        function = torch.compile(function, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        out = function(*leaves, is_causal=True)
    assert out.dtype == torch.bfloat16
    ours = torch.autograd.grad(out.float().square().sum(), leaves)
    wide = [x.double() for x in leaves]
    right = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
    for x, y in zip(ours, torch.autograd.grad(right.square().sum(), leaves), strict=True):
        assert x.dtype == torch.float32 and (x - y).norm() < 2e-2 * y.norm()


@pytest.mark.parametrize("budget", [{}, {"tolerance": 3e-2, "verify": False}], ids=str)
def test_graph_capture_of_gradients(budget: dict[str, Any]) -> None:
    torch.manual_seed(0)
    arrays = [torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    out, lse = adaattn.attention(*arrays[1:], return_lse=True)
    adaattn.attention_backward(*arrays, out, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = adaattn.attention_backward(*arrays, out, lse, **budget)
    arrays[0].copy_(torch.randn_like(arrays[0]))
    expected = adaattn.attention_backward(*arrays, out, lse, **budget)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(captured[:3], expected[:3], strict=True))


# ---- the same bits


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("T", [1, 200])
def test_a_head_depends_on_itself_alone(dtype: Any, T: int, rng: np.random.Generator) -> None:
    arrays = [to_gpu(x) for x in inputs(rng, Shape(3, 4, 2, T, 700, 64, 64), dtype)]
    whole = adaattn.attention(*arrays)
    assert torch.equal(whole, adaattn.attention(*arrays))
    assert torch.equal(whole[1:2], adaattn.attention(*(x[1:2] for x in arrays)))
    alone = adaattn.attention(arrays[0][:, 3:], arrays[1][:, 1:], arrays[2][:, 1:])
    assert torch.equal(whole[:, 3:], alone)


# ---- arrays and streams


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype: Any, rng: np.random.Generator) -> None:
    arrays = [to_gpu(x) for x in inputs(rng, Shape(2, 4, 4, 70, 130, 32, 32), dtype)]
    plain = adaattn.attention(*arrays)
    wide = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays]
    assert torch.equal(adaattn.attention(*wide), plain)
    kind = {"dtype": arrays[0].dtype, "device": "cuda"}
    gapped = [torch.zeros(*x.shape[:3], 2 * x.shape[3], **kind)[..., ::2] for x in arrays]
    for to, x in zip(gapped, arrays, strict=True):
        to.copy_(x)
    assert torch.equal(adaattn.attention(*gapped), plain)
    shifted = [torch.zeros(x.numel() + 1, **kind)[1:].view(x.shape) for x in arrays]
    for to, x in zip(shifted, arrays, strict=True):
        to.copy_(x)
    assert torch.equal(adaattn.attention(*shifted), plain)
    one = arrays[1][:, :1].expand(-1, 4, -1, -1), arrays[2][:, :1].expand(-1, 4, -1, -1)
    assert torch.equal(
        adaattn.attention(arrays[0], *one), adaattn.attention(arrays[0], *(x.contiguous() for x in one))
    )
    for out in (
        torch.zeros_like(plain),
        torch.zeros(2, 4, 70, 64, **kind)[..., ::2],
    ):
        assert adaattn.attention(*arrays, out=out) is out and torch.equal(out, plain)


def test_work_is_ordered_on_the_owners_stream() -> None:
    """Inputs that are written late on a stream are read after that, and the call does not wait for them."""
    torch.manual_seed(0)
    made = [torch.randn(1, 4, 512, 64, device="cuda") for _ in range(3)]
    expected = adaattn.attention(*made)
    late = [torch.zeros_like(x) for x in made]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for to, x in zip(late, made, strict=True):
            to.copy_(x)
        out = adaattn.attention(*late)
        assert not stream.query()
        copy = out.clone()
    stream.synchronize()
    assert torch.equal(copy, expected)


def test_graph_capture() -> None:
    torch.manual_seed(0)
    arrays = [torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    slopes = [0.1, 0.2, 0.3, 0.4]
    out = torch.empty_like(arrays[0])
    adaattn.attention(*arrays, alibi_slopes=slopes, kv_lengths=[200], out=out, verify=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adaattn.attention(*arrays, alibi_slopes=slopes, kv_lengths=[200], out=out, verify=False)
    for x in arrays:
        x.copy_(torch.randn_like(x))
    expected = adaattn.attention(*arrays, alibi_slopes=slopes, kv_lengths=[200])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_on_request(dtype: Any, rng: np.random.Generator) -> None:
    shape = Shape(2, 4, 2, 70, 130, 32, 24)
    arrays = inputs(rng, shape, dtype)
    mask = rng.random((2, 1, 70, 130)) < 0.7
    out, lse = adaattn.attention(*arrays, attn_mask=mask, return_lse=True, device="cuda")
    there = adaattn.attention(*map(to_gpu, arrays), attn_mask=to_gpu(mask), return_lse=True)
    assert isinstance(out, np.ndarray) and out.dtype == dtype
    assert (out.astype(F64) == to_cpu(there[0])).all() and (lse == to_cpu(there[1])).all()
    turned = [x[:, :, ::-1] for x in arrays]
    wide = np.zeros((2, 4, 70, 48), dtype)
    result = adaattn.attention(*turned, device="cuda:0", out=wide[..., ::2])
    expected = adaattn.attention(*(to_gpu(np.ascontiguousarray(x)) for x in turned))
    assert (result.astype(F64) == to_cpu(expected)).all() and not wide[..., 1::2].any()


def test_cupy(rng: np.random.Generator) -> None:
    cupy = pytest.importorskip("cupy")
    arrays = [cupy.asarray(x) for x in inputs(rng, SMALL[1])]
    exact = reference.attention(*(cupy.asnumpy(x) for x in arrays))
    with cupy.cuda.Stream():
        out, lse = adaattn.attention(*arrays, return_lse=True)
        assert isinstance(out, cupy.ndarray) and isinstance(lse, cupy.ndarray)
        np.testing.assert_allclose(cupy.asnumpy(out), exact, atol=1e-5)


def test_jax(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("jax without CUDA")
    arrays = [jax.numpy.asarray(x) for x in inputs(rng, SMALL[1])]
    exact = reference.attention(*map(np.asarray, arrays))
    out, lse = adaattn.attention(*arrays, return_lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    np.testing.assert_allclose(np.asarray(out), exact, atol=1e-5)


# ---- errors


def test_arrays_on_other_devices(rng: np.random.Generator) -> None:
    arrays = inputs(rng, SMALL[0])
    query, key, value = map(to_gpu, arrays)
    with pytest.raises(adaattn.DeviceError, match=r"^key: expected memory of CUDA device 0 .*, got .* 1:0"):
        adaattn.attention(query, key.cpu(), value)
    with pytest.raises(adaattn.DeviceError, match=r"^value: expected memory of CUDA device 0 .*, got .* 1:0"):
        adaattn.attention(query, key, arrays[2])
    with pytest.raises(adaattn.DeviceError, match=r"^key: expected memory of the CPU, got .* 2:0"):
        adaattn.attention(query.cpu(), key, value)
    with pytest.raises(adaattn.DeviceError, match=r"^out: expected memory of CUDA device 0 .*, got .* 1:0"):
        adaattn.attention(query, key, value, out=torch.zeros(query.shape))
    with pytest.raises(adaattn.DeviceError, match=r"^device: expected memory of the CPU, .*, got 'cuda:99'"):
        adaattn.attention(*arrays, device="cuda:99")


@pytest.mark.parametrize("which", ["query", "key", "value", "attn_mask", "out"])
def test_what_wants_a_gradient_is_refused(which: str, rng: np.random.Generator) -> None:
    """`adaattn.integrations.torch` is what autograd knows of."""
    query, key, value = (to_gpu(x) for x in inputs(rng, SMALL[1]))
    arguments = {"query": query, "key": key, "value": value}
    arguments |= {
        "attn_mask": torch.zeros(65, 130, device="cuda"),
        "out": adaattn.attention(query, key, value),
    }
    arguments[which].requires_grad_()
    with pytest.raises(adaattn.ArgumentError, match=rf"^{which}: expected .*, got .*require.* grad.*detach"):
        adaattn.attention(**arguments)


def test_masks_that_hold_no_numbers(rng: np.random.Generator) -> None:
    query, key, value = (to_gpu(x) for x in inputs(rng, SMALL[1]))
    mask = torch.zeros(65, 130, device="cuda")
    mask[3, 4] = torch.nan
    with pytest.raises(adaattn.ArgumentError, match=r"^attn_mask: expected finite numbers or -inf"):
        adaattn.attention(query, key, value, attn_mask=mask)


def test_repeated_elements_are_sent_once() -> None:
    x = np.broadcast_to(np.float32(1), (1, 1, 1, 64))
    long = np.broadcast_to(np.float32(1), (1, 1, 1 << 20, 64))
    assert (adaattn.attention(x, long, long, device="cuda") == 1).all()


def test_vectors_may_lie_on_the_gpu(rng: np.random.Generator) -> None:
    arrays = [to_gpu(x) for x in inputs(rng, SMALL[1])]
    vectors = {
        "kv_lengths": np.array([70, 90]),
        "sinks": np.array([0.5, -1.0]),
        "query_offset": np.array([3, 80]),
    }
    expected = adaattn.attention(*arrays, **vectors)
    there = {name: torch.from_numpy(x).cuda() for name, x in vectors.items()}
    assert torch.equal(adaattn.attention(*arrays, **there), expected)


# ---- matrix products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 33, 50), (128, 256, 512), (3, 4096, 1000)], ids=str)
def test_linear(sizes: tuple[int, int, int], dtype: Any, rng: np.random.Generator) -> None:
    from adaattn.gpu_products import _ERRORS, _products_of

    M, N, K = sizes
    x, weight, bias = (to_gpu(rng.standard_normal(n).astype(dtype)) for n in ((M, K), (N, K), (N,)))
    right = x.double() @ weight.double().T + bias.double()
    terms = x.double().abs() @ weight.double().abs().T + 1
    for product in _products_of(str(np.dtype(dtype))):
        try:
            y, report = adaattn.linear(x, weight, bias, precision=product, return_report=True)
        except adaattn.DeviceError as error:
            assert product == "fp8" and "a product that this GPU and cuBLAS have" in str(error)
            continue
        own = product in ("fp16", "bf16") and dtype != F32
        bound = 8 * (1e-6 if own else _ERRORS[product]) + 2 * ROUNDING[dtype]
        assert y.is_cuda and y.dtype == x.dtype and ((y.double() - right).abs() <= bound * terms).all()
        assert report.measured_error <= bound
    y, report = adaattn.linear(x, weight, bias, tolerance=1e-3, return_report=True)
    assert report.measured_error <= 1e-3
    assert float((y.double() - right).norm() / right.norm()) <= 2e-3 + 2 * ROUNDING[dtype]


def test_linear_of_views_and_on_a_stream(rng: np.random.Generator) -> None:
    x = torch.randn(2, 30, 64, device="cuda")[:, ::2, 3:35]
    weight, bias = torch.randn(32, 41, device="cuda").T, torch.randn(82, device="cuda")[::2]
    odd = torch.randn(42, device="cuda")[1:]  # at no multiple of 16 bytes
    right = x.double() @ weight.double().T
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        for product, error in (("fp32", 1e-5), ("tf32", 1e-2), ("fp16", 1e-2), ("fp64", 1e-6)):
            for b in (bias, odd):
                y = adaattn.linear(x, weight, b, precision=product)
                assert y.shape == (2, 15, 41)
                assert float((y.double() - b.double() - right).norm() / right.norm()) < error


def test_graph_capture_of_linear() -> None:
    x, weight = torch.randn(64, 256, device="cuda"), torch.randn(128, 256, device="cuda")
    for product in ("fp32", "bf16", "fp16"):
        adaattn.linear(x, weight, precision=product)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = adaattn.linear(x, weight, precision=product)
        x.copy_(torch.randn_like(x))
        expected = adaattn.linear(x, weight, precision=product)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected), product


# ---- few queries, caches, merging


def test_few_queries_read_floats(rng: np.random.Generator) -> None:
    for H, G, T, S, D in (
        (8, 8, 1, 5000, 128),
        (8, 2, 1, 9000, 64),
        (4, 1, 4, 700, 256),
        (2, 2, 16, 300, 40),
    ):
        arrays = inputs(rng, Shape(2, H, G, T, S, D, D), F32)
        exact = reference.attention(*arrays, causal=True, kv_lengths=[S, S // 2])
        out = adaattn.attention(*map(to_gpu, arrays), causal=True, kv_lengths=[S, S // 2])
        assert relative(out, exact) < 1e-6


@pytest.mark.parametrize("given", [F32, BF16], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_caches(dtype: str, given: Any, rng: np.random.Generator) -> None:
    """Like the CPU's, through everything that a cache does."""
    sizes = (3, 2, 128, 96)
    cpu = adaattn.KVCache(*sizes, dtype=dtype)
    gpu = adaattn.KVCache(*sizes, dtype=dtype, device="cuda")

    def append(n: int, lengths: Any = None) -> None:
        batch = len(cpu.lengths)
        tokens = [rng.standard_normal((batch, 2, n, width)).astype(given) for width in sizes[2:]]
        cpu.append(*tokens, lengths)
        gpu.append(*map(to_gpu, tokens), lengths)

    def agree() -> None:
        for T, H in ((1, 2), (1, 8), (5, 4), (40, 4)):
            query = rng.standard_normal((len(cpu.lengths), H, T, 128)).astype(given)
            expected, expected_lse = cpu.attention(query, return_lse=True)
            out, lse = gpu.attention(to_gpu(query), return_lse=True)
            assert out.is_cuda and out.dtype == TORCH[given]
            assert relative(out, expected.astype(F64)) < 5e-6 + 2 * ROUNDING[given] * (given != F32)
            np.testing.assert_allclose(to_cpu(lse), expected_lse, rtol=1e-5, atol=1e-4)

    append(200, [200, 64, 7])
    agree()
    for _ in range(3):
        append(1)
    agree()
    append(300)
    for cache in (cpu, gpu):
        cache.truncate([450, 130, 3])
    agree()
    for cache in (cpu, gpu):
        cache.reorder([0, 0, 1, 2])
    append(90, [90, 1, 64, 20])
    agree()
    query = rng.standard_normal((4, 4, 70, 128)).astype(given)
    out, report = gpu.attention(to_gpu(query), tolerance=2e-2, return_report=True)
    exact, on_cpu = cpu.attention(query, return_report=True)
    assert relative(out, exact.astype(F64)) < 2e-2 + 2 * ROUNDING[given]
    np.testing.assert_allclose(report.stored_error, on_cpu.stored_error, rtol=1e-4)


def test_steps_of_generation_are_quiet() -> None:
    """They wait for nothing, and their memory is torch's."""
    cache = adaattn.KVCache(2, 2, 64, dtype="int8", device="cuda", capacity=512)
    tokens = [torch.randn(2, 2, 63, 64, device="cuda") for _ in range(2)]
    query = torch.randn(2, 8, 1, 64, device="cuda")
    before = torch.cuda.memory_allocated()
    cache.append(*tokens)
    assert torch.cuda.memory_allocated() - before >= cache.nbytes
    expected = cache.attention(query)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for i in range(3):
            cache.append(*(x[:, :, i : i + 1] for x in tokens))
            cache.attention(query)
        cache.truncate(63)
        out = cache.attention(query)
        assert not stream.query()
    stream.synchronize()
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)  # the first 63 are now in int8


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_cache_on_several_streams(dtype: str) -> None:
    """What is slow on one stream is done when another one reads it, and memory comes back after it."""
    tokens = [torch.randn(2, 2, 200, 64, device="cuda") for _ in range(2)]
    query = torch.randn(2, 8, 1, 64, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for slow in (False, True):
        cache = adaattn.KVCache(2, 2, 64, dtype=dtype, device="cuda", capacity=256)
        outs = []
        torch.cuda.synchronize()
        for turn, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if slow:
                    torch.cuda._sleep(100_000_000)
                cache.append(*(x[:, :, turn * 64 : turn * 64 + 70] for x in tokens))
                outs.append(cache.attention(query))
        assert not slow or not streams[-1].query()
        nbytes = cache.nbytes
        del cache
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.full((nbytes // 4,), torch.nan, device="cuda")
        torch.cuda.synchronize()
        results.append(outs)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging(dtype: Any, rng: np.random.Generator) -> None:
    query, key, value = inputs(rng, Shape(2, 4, 2, 33, 300, 64, 48), dtype)
    parts = [
        adaattn.attention(
            *map(to_gpu, (query, key[:, :, at], value[:, :, at])), return_lse=True, precision="fp64"
        )
        for at in (slice(0, 120), slice(120, 300))
    ]
    out, lse = adaattn.merge(*parts[0], *parts[1])
    exact, exact_lse = reference.attention(query, key, value, return_lse=True)
    assert out.is_cuda and relative(out, exact) < 3 * ROUNDING[dtype]
    np.testing.assert_allclose(to_cpu(lse), exact_lse, rtol=1e-6)
