"""PyTorch: function and module against torch's own, the operators under torch's checks."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support import in_new_process

import adaattn

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from adaattn.integrations import torch_operators  # noqa: E402
from adaattn.integrations.torch import AdaAttention, scaled_dot_product_attention  # noqa: E402

DTYPES = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
B, H, G, T, S, D, E = 2, 4, 2, 5, 9, 8, 6


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def normal(*shapes: Any, dtype: Any = torch.float32) -> list[Any]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def grouped(dtype: Any = torch.float32) -> list[Any]:
    return normal((B, H, T, D), (B, G, S, D), (B, G, S, E), dtype=dtype)


# ---- against torch's function

# shapes of query, key and value, and options; functions make tensors
SHAPES: dict[str, Any] = {
    "two dimensions": ((T, D), (S, D), (S, E), {}),
    "three dimensions": ((H, T, D), (H, S, D), (H, S, E), {"is_causal": True}),
    "three and a mask": ((H, T, D), (H, S, D), (H, S, E), {"attn_mask": lambda: torch.randn(H, T, S)}),
    "five dimensions": ((2, 3, H, T, D), (2, 3, H, S, D), (2, 3, H, S, E), {}),
    "five and a mask": (
        (2, 3, H, T, D),
        (2, 3, H, S, D),
        (2, 3, H, S, E),
        {"attn_mask": lambda: torch.randn(2, 1, H, T, S)},
    ),
    "batches that broadcast": ((B, H, T, D), (1, H, S, D), (B, H, S, E), {}),
    "query without a batch": ((H, T, D), (B, H, S, D), (B, H, S, E), {}),
    "keys without heads": ((B, H, T, D), (S, D), (S, E), {}),
    "one head of keys": ((B, H, T, D), (B, 1, S, D), (B, 1, S, E), {}),
    "one head of values": ((B, H, T, D), (B, H, S, D), (B, 1, S, E), {}),
    "one head of queries": ((B, 1, T, D), (B, H, S, D), (B, H, S, E), {}),
    "groups": ((B, H, T, D), (B, G, S, D), (B, G, S, E), {"enable_gqa": True}),
    "groups, three dimensions": ((H, T, D), (G, S, D), (G, S, E), {"enable_gqa": True}),
    "groups of two sizes": ((B, 6, T, D), (B, 2, S, D), (B, 3, S, E), {"enable_gqa": True}),
    "mask that broadcasts": (
        (B, H, T, D),
        (B, H, S, D),
        (B, H, S, E),
        {"attn_mask": lambda: torch.rand(B, 1, 1, S) < 0.7},
    ),
    "mask and causal": (  # refused by torch where E is not D
        (B, H, T, D),
        (B, H, S, D),
        (B, H, S, D),
        {"attn_mask": lambda: torch.rand(T, S) < 0.7, "is_causal": True},
    ),
    "rows that see nothing": (
        (B, H, T, D),
        (B, H, S, D),
        (B, H, S, E),
        {"attn_mask": lambda: torch.arange(T)[:, None].expand(T, S) > 1},
    ),
    "causal, more queries": ((B, H, S, D), (B, H, T, D), (B, H, T, E), {"is_causal": True}),
    "scale": ((B, H, T, D), (B, H, S, D), (B, H, S, E), {"scale": 0.3}),
    "no queries": ((B, H, 0, D), (B, H, S, D), (B, H, S, E), {}),
    "no keys": ((B, H, T, D), (B, H, 0, D), (B, H, 0, E), {}),
    "no batch": ((0, H, T, D), (0, H, S, D), (0, H, S, E), {}),
    "no values": ((B, H, T, D), (B, H, S, D), (B, H, S, 0), {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_as_torch(case: str, dtype: Any) -> None:
    *shapes, options = SHAPES[case]
    arrays = normal(*shapes, dtype=dtype)
    options = {name: x() if callable(x) else x for name, x in options.items()}
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options["attn_mask"] = mask.to(dtype)
    expected = F.scaled_dot_product_attention(*arrays, **options)
    found = scaled_dot_product_attention(*arrays, **options)
    assert found.shape == expected.shape and found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=DTYPES[dtype], rtol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_every_option(dtype: Any) -> None:
    """The operator and the way around it pass all of them on: same bits as `adaattn.attention`."""
    arrays = grouped(dtype)
    options = {
        "attn_mask": torch.randn(B, 1, T, S).to(dtype),
        "scale": 0.3,
        "window": (3, None),
        "softcap": 2.0,
        "alibi_slopes": torch.rand(H),
        "sinks": torch.randn(H),
        "kv_lengths": torch.tensor([S, 7]),
        "query_offset": torch.tensor([3, 2]),
        "tolerance": 1e-3,
        "precision": ("bf16", "fp32") if dtype == torch.float32 else "auto",
        "max_precision": "auto" if dtype == torch.float32 else "fp64",
        "verify": False,
    }
    expected = adaattn.attention(*arrays, **options, causal="lower_right", return_lse=True)
    options |= {"is_causal": "lower_right", "return_lse": True, "enable_gqa": True}
    plain = scaled_dot_product_attention(*arrays, **options)
    operator = scaled_dot_product_attention(arrays[0].requires_grad_(), *arrays[1:], **options)
    for found in (plain, operator):
        assert all(torch.equal(x.detach(), y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("verify", ["auto", True, False])
def test_the_operator_tells_true_from_auto(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which differ for small heads: in the forward pass and in the backward pass."""
    seen: list[Any] = []

    def recorded(call: Any) -> Any:
        return lambda *arrays, **options: (
            seen.append(options.get("verify", "auto")),
            call(*arrays, **options),
        )[1]

    monkeypatch.setattr(torch_operators.api, "attention", recorded(adaattn.attention))
    monkeypatch.setattr(torch_operators, "attention_backward", recorded(adaattn.attention_backward))
    x = torch.randn(1, 2, 70, 8, requires_grad=True)
    scaled_dot_product_attention(x, x, x, tolerance=1e-2, verify=verify).sum().backward()
    assert seen == [verify, verify]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_gradients_are_exact_on_a_gpu(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a tolerance that allows nothing cheaper: half tensors would be computed in their own format."""
    seen: list[Any] = []

    def recorded(*arrays: Any, **options: Any) -> Any:
        seen.append((options.get("precision"), options.get("tolerance")))
        return adaattn.attention_backward(*arrays, **options)

    monkeypatch.setattr(torch_operators, "attention_backward", recorded)
    x = torch.randn(1, 2, 70, 8, dtype=dtype, requires_grad=True)
    for least in ("fp32", "auto"):
        options = {"tolerance": 1e-2, "min_precision": least}
        scaled_dot_product_attention(x, x, x, **options).sum().backward()
    exact = "fp32" if dtype in (torch.float16, torch.bfloat16) else "auto"
    assert seen == [(exact, None), (None, 1e-2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_is_shared(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine reads and writes the tensors themselves, with as many threads as torch has."""
    seen: list[Any] = []

    def record(*arrays: Any, out: Any, num_threads: int, **options: Any) -> Any:
        seen.extend((*arrays, options["attn_mask"], out))
        assert num_threads == 3
        return out

    monkeypatch.setattr(torch_operators.api, "attention", record)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        arrays = [*grouped(dtype), torch.randn(T, S).to(dtype)]
        out = scaled_dot_product_attention(*arrays, enable_gqa=True)
    finally:
        torch.set_num_threads(before)
    for tensor, array in zip((*arrays, out), seen, strict=True):
        assert array.__array_interface__["data"][0] == tensor.data_ptr()
        assert array.dtype == (ml_dtypes.bfloat16 if dtype == torch.bfloat16 else str(dtype).split(".")[1])


def test_bfloat16_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = grouped(torch.bfloat16)
    expected = scaled_dot_product_attention(*arrays, enable_gqa=True)
    monkeypatch.setattr(torch_operators, "_BF16", None)
    assert torch.equal(scaled_dot_product_attention(*arrays, enable_gqa=True), expected)


def test_autocast() -> None:
    query, key, value = normal((B, H, T, D), (B, H, S, D), (B, H, S, E))
    mask = torch.randn(T, S)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scaled_dot_product_attention(query, key.bfloat16(), value, mask)
        wide = scaled_dot_product_attention(*(x.double() for x in (query, key, value)))
    assert found.dtype == torch.bfloat16 and wide.dtype == torch.float64
    arrays = (x.bfloat16() for x in (query, key, value, mask))
    assert torch.equal(found, scaled_dot_product_attention(*arrays))


def test_a_policy_is_its_tolerance() -> None:
    arrays = normal((1, 2, 256, 32), (1, 2, 256, 32), (1, 2, 256, 32))
    assert torch.equal(
        scaled_dot_product_attention(*arrays, policy="speed"),
        scaled_dot_product_attention(*arrays, tolerance=5e-2),
    )
    exact = adaattn.reference.attention(*arrays)
    error = np.linalg.norm(scaled_dot_product_attention(*arrays, policy="speed").numpy() - exact)
    assert error <= 5e-2 * np.linalg.norm(exact)


def test_dropout_draws_from_torch() -> None:
    query, key, value = normal((B, H, T, D), (B, H, S, D), (B, H, S, E))
    torch.manual_seed(1)
    found = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    again = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(1)
    seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64))
    assert torch.equal(found, adaattn.attention(query, key, value, dropout_p=0.5, seed=seed))
    assert not torch.equal(found, again)


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (((D,), (S, D), (S, E)), {}, adaattn.ShapeError, "^query: expected at least two dimensions"),
        (((B, H, T, D), (B, G, S, D), (B, G, S, E)), {}, adaattn.ShapeError, "or enable_gqa, got shapes"),
        (
            ((B, 3, T, D), (B, G, S, D), (B, G, S, E)),
            {"enable_gqa": True},
            adaattn.ShapeError,
            r"that divide 3, got \[2, 2\]",
        ),
        (((2, H, T, D), (3, H, S, D), (3, H, S, E)), {}, adaattn.ShapeError, "leading sizes that broadcast"),
        (((B, H, T, D), (B, H, S, 4), (B, H, S, E)), {}, adaattn.ShapeError, "^key: expected"),
        (((B, H, T, D), (B, H, S, D), (B, H, S, E)), {"scale": -1.0}, adaattn.ArgumentError, "^scale: "),
        (
            ((B, H, T, D), (B, H, S, D), (B, H, S, E)),
            {"num_threads": 0},
            adaattn.ArgumentError,
            "^num_threads: ",
        ),
        (
            ((B, H, T, D), (B, H, S, D), (B, H, S, E)),
            {"policy": "speed", "tolerance": 0.1},
            adaattn.ArgumentError,
            "^policy: expected None beside",
        ),
    ],
)
def test_refused(shapes: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*normal(*shapes), **options)


# ---- gradients


def gradients(attention: Any, arrays: list[Any], options: dict[str, Any]) -> list[Any]:
    """Of a fixed combination of the outputs, by all arrays and a floating mask."""
    leaves = [x.detach().clone().requires_grad_() for x in arrays]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        leaves.append(mask.detach().clone().requires_grad_())
        options = options | {"attn_mask": leaves[-1]}
    out = attention(*leaves[:3], **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad(out, leaves, weights.to(out.dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES)
def test_gradients_as_torch(case: str, dtype: Any) -> None:
    """Both against float64, of which torch may be as far as it is."""
    *shapes, options = SHAPES[case]
    arrays = normal(*shapes, dtype=dtype)
    options = {name: x() if callable(x) else x for name, x in options.items()}
    mask, wide = options.get("attn_mask"), options
    if mask is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.to(dtype)}
        wide = options | {"attn_mask": mask.to(dtype).double()}
    expected = gradients(F.scaled_dot_product_attention, [x.double() for x in arrays], wide)
    found = gradients(scaled_dot_product_attention, arrays, options)
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert all(x.dtype == dtype for x in found[:3])
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, atol=4 * DTYPES[dtype], rtol=4 * DTYPES[dtype])


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradients_of_every_option(dropout_p: float) -> None:
    """Finite differences along random directions, by mask, sinks and slopes as well."""
    arrays = [
        x.requires_grad_()
        for x in (*grouped(torch.float64), *normal((B, 1, T, S), (H,), dtype=torch.float64))
    ]
    slopes = torch.rand(H, dtype=torch.float64, requires_grad=True)

    def attend(query: Any, key: Any, value: Any, mask: Any, sinks: Any, slopes: Any) -> Any:
        torch.manual_seed(2)
        return scaled_dot_product_attention(
            query, key, value, mask, dropout_p, "lower_right", 0.7, True, sinks=sinks, alibi_slopes=slopes,
            window=(4, None), softcap=2.0, kv_lengths=torch.tensor([S, 7]), query_offset=torch.tensor([4, 2]),
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, (*arrays, slopes), fast_mode=True)


def test_the_lse_has_no_gradient() -> None:
    arrays = [x.requires_grad_() for x in grouped()]
    out, lse = scaled_dot_product_attention(*arrays, enable_gqa=True, return_lse=True)
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("name", ["attention", "attention_lse", "attention_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_pass_torchs_checks(name: str, dtype: Any) -> None:
    inputs = [*grouped(dtype), torch.randn(B, 1, T, S), torch.rand(H), torch.randn(H)]
    options = ("lower_right", 3, None, 2.0, 0.3, 0.0, 1e-3, *("auto",) * 5, True, 1)
    vectors = (torch.tensor([S, 7]), torch.tensor([3, 2]), None)
    operator = getattr(torch.ops.adaattn, name).default
    if name == "attention_backward":
        out, lse = torch.ops.adaattn.attention_lse(*inputs, *vectors, *options)
        arguments = (torch.randn_like(out), out, lse, [True] * 6, *inputs, *vectors, *options)
    else:
        differentiable = name == "attention_lse"
        arguments = (*(x.requires_grad_(differentiable) for x in inputs), *vectors, *options)
    torch.library.opcheck(operator, arguments)


def test_compiled_training() -> None:
    def loss(query: Any, key: Any, value: Any) -> Any:
        return attend(query, key, value).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    arrays = [x.requires_grad_() for x in grouped()]
    expected, found = (torch.autograd.grad(function(*arrays), arrays) for function in (loss, compiled))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


# ---- threads


def _on_torchs_threads() -> tuple[bool, bool, list[int]]:
    """Same bits as one thread's; whether the engine has own threads; exit codes of two children of
    fork(), the second of a signal's handler in the midst of a job, which it then finishes."""
    query = np.random.default_rng(0).standard_normal((1, 4, 3000, 64), np.float32)
    expected = adaattn.attention(query, query, query, num_threads=1)
    torch.set_num_threads(4)
    same = [np.array_equal(adaattn.attention(query, query, query, num_threads=4), expected)]
    names = [Path(task, "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    children: list[int] = []

    def compute() -> None:
        same.append(np.array_equal(adaattn.attention(query, query, query, num_threads=4), expected))
        if children and children[-1] == 0:
            os._exit(0 if all(same) else 1)

    children.append(os.fork())
    compute()
    signal.signal(signal.SIGALRM, lambda *_: children.append(os.fork()))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while len(children) < 2:
        compute()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return all(same), any(name.startswith("adaattn-") for name in names), codes


@pytest.mark.skipif(not hasattr(torch_operators.openmp(), "GOMP_parallel"), reason="torch has no such OpenMP")
def test_the_engine_runs_on_torchs_threads() -> None:
    assert in_new_process(_on_torchs_threads) == (True, False, [0, 0])


def _interrupted() -> float:
    """Seconds that each of two threads computes from Ctrl-C to its exception."""
    torch.set_num_threads(2)
    row = np.zeros((1, 1, 1, 64), np.float32)
    arrays = [np.broadcast_to(row, (1, 1, 400_000, 64)) for _ in range(3)]
    sent: list[float] = []
    threading.Timer(
        0.5, lambda: (sent.append(time.process_time()), os.kill(os.getpid(), signal.SIGINT))
    ).start()
    try:
        adaattn.attention(*arrays, num_threads=2)
    except KeyboardInterrupt:
        return (time.process_time() - sent[0]) / min(2, len(os.sched_getaffinity(0)))
    raise AssertionError("the call ended by itself")


def test_ctrl_c() -> None:
    assert in_new_process(_interrupted) < 1.0


# ---- compilers


def attend(query: Any, key: Any, value: Any) -> Any:
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True, window=(3, None), tolerance=1e-3
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (T, T + 1):
        arrays = normal((B, H, length, D), (B, G, S, D), (B, G, S, E))
        assert torch.equal(compiled(*arrays), attend(*arrays))


def test_compiled_dropout() -> None:
    arrays = normal((B, H, T, D), (B, H, S, D), (B, H, S, E))
    compiled = torch.compile(
        lambda *x: scaled_dot_product_attention(*x, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(compiled(*arrays), compiled(*arrays))


def test_export() -> None:
    class Module(torch.nn.Module):  # type: ignore[misc]
        def forward(self, query: Any, key: Any, value: Any) -> Any:
            return attend(query, key, value)

    t, s = torch.export.Dim("t"), torch.export.Dim("s")
    shapes = {"query": {2: t}, "key": {2: s}, "value": {2: s}}
    program = torch.export.export(Module(), tuple(grouped()), dynamic_shapes=shapes)
    assert "adaattn.attention" in str(program.graph)
    arrays = normal((B, H, 7, D), (B, G, 11, D), (B, G, 11, E))
    assert torch.equal(program.module()(*arrays), attend(*arrays))


def test_meta() -> None:
    arrays = [x.to("meta") for x in grouped()]
    assert scaled_dot_product_attention(*arrays, enable_gqa=True).shape == (B, H, T, E)


# ---- the module


def modules(**options: Any) -> tuple[Any, Any]:
    theirs = torch.nn.MultiheadAttention(16, 4, **options).eval()
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    ours = AdaAttention(16, 4, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


# T, S -> masks; True hides
MASKS: dict[str, Any] = {
    "none": lambda: {},
    "end": lambda: {"key_padding_mask": torch.arange(S).expand(3, S) >= torch.tensor([[S], [4], [7]])},
    "start": lambda: {"key_padding_mask": torch.arange(S).expand(3, S) < torch.tensor([[0], [4], [2]])},
    "mask": lambda: {"attn_mask": _some(S, S)},
    "mask of heads": lambda: {"attn_mask": _some(12, S, S)},
    "bias": lambda: {"attn_mask": torch.randn(S, S)},
    "both": lambda: {"attn_mask": _some(12, S, S), "key_padding_mask": _some(3, S) & False},
    "both biases": lambda: {"attn_mask": torch.randn(S, S), "key_padding_mask": torch.randn(3, S)},
    "bias and end": lambda: {
        "attn_mask": torch.randn(S, S),
        "key_padding_mask": torch.arange(S).expand(3, S) >= torch.tensor([[S], [4], [7]]),
    },
    "causal": lambda: {"attn_mask": torch.ones(S, S, dtype=torch.bool).triu(1), "is_causal": True},
    "causal, end": lambda: {
        "attn_mask": torch.ones(S, S, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.arange(S).expand(3, S) >= torch.tensor([[S], [4], [7]]),
        "is_causal": True,
    },
}


def _some(*size: int) -> Any:
    hidden = torch.rand(size) < 0.3
    hidden[..., 0] = False
    return hidden


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"batch_first": False},
        {"bias": False, "kdim": 10, "vdim": 12},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "batch_first": True},
    ],
    ids=str,
)
def test_module_as_torch(options: dict[str, Any], masks: str) -> None:
    theirs, ours = modules(**options)
    query, key, value = normal((3, S, 16), (3, S, theirs.kdim), (3, S, theirs.vdim))
    if not options.get("batch_first"):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    hidden = MASKS[masks]()
    adds = "add_bias_kv" in options or "add_zero_attn" in options
    for shared, weights, average in itertools.product((False, True), (False, True), (False, True)):
        if (shared and "kdim" in options) or (adds and masks == "causal" and not weights):
            continue  # torch takes the hint and hides what the module adds, but only then
        inputs = (query,) * 3 if shared else (query, key, value)
        further = {"need_weights": weights, "average_attn_weights": average}
        expected, found = (module(*inputs, **hidden, **further) for module in (theirs, ours))
        torch.testing.assert_close(found[0], expected[0], atol=3e-6, rtol=0)
        assert weights or found[1] is None
        if weights:
            torch.testing.assert_close(found[1], expected[1], atol=1e-6, rtol=0)


def test_module_without_batch() -> None:
    theirs, ours = modules()
    inputs = normal((T, 16), (S, 16), (S, 16))
    padding = torch.arange(S) >= 6
    expected, found = (module(*inputs, key_padding_mask=padding) for module in (theirs, ours))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=0)


def test_module_keeps_rows_without_keys() -> None:
    _, ours = modules(batch_first=True)
    (x,) = normal((1, T, 16))
    out, weights = ours(x, x, x, key_padding_mask=torch.ones(1, T, dtype=torch.bool))
    assert torch.equal(weights, torch.zeros(1, T, T))
    assert torch.equal(out, ours.out_proj.bias.expand(1, T, 16))


def test_encoder_layer_does_not_pass_the_module_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation torch's layer fuses what it takes for its own module."""
    layer = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
    theirs, (x,) = layer.self_attn, normal((3, T, 16))
    ours = AdaAttention(16, 4, batch_first=True, policy="quality").eval()
    ours.load_state_dict(theirs.state_dict())
    calls: list[Any] = []
    original = torch_operators.api.attention
    monkeypatch.setattr(
        torch_operators.api,
        "attention",
        lambda *arrays, **options: calls.append(options) or original(*arrays, **options),
    )
    with torch.no_grad():
        expected = layer(x)
        layer.self_attn = ours
        found = layer(x)
    assert [call["tolerance"] for call in calls] == [1e-5]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_module_trains_as_torch() -> None:
    theirs, ours = (module.train() for module in modules(batch_first=True))
    (x,) = normal((3, T, 16))
    for module in (theirs, ours):
        module(x, x, x, need_weights=False)[0].square().sum().backward()
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("further", "error", "message"),
    [
        ({"is_causal": True}, adaattn.ArgumentError, "^attn_mask: expected the mask that is_causal"),
        ({"attn_mask": torch.zeros(T, S + 1)}, adaattn.ShapeError, r"^attn_mask: expected shape \(5, 9\) or"),
        (
            {"key_padding_mask": torch.zeros(3, T)},
            adaattn.ShapeError,
            r"^key_padding_mask: expected shape \(3, 9\)",
        ),
        (
            {"attn_mask": torch.zeros(T, S, dtype=torch.int64)},
            adaattn.DTypeError,
            "^attn_mask: expected bool",
        ),
    ],
)
def test_module_refuses(further: dict[str, Any], error: Any, message: str) -> None:
    ours = AdaAttention(16, 4, batch_first=True)
    with pytest.raises(error, match=message):
        ours(*normal((3, T, 16), (3, S, 16), (3, S, 16)), **further)


@pytest.mark.parametrize("shape", [(1, B, H, 0, D), (0, B, H, T, D), (1, B, 0, T, D)])
def test_zero_sizes_in_five_dimensions(shape: tuple[int, ...]) -> None:
    query, key, value = normal(shape, (*shape[:3], S, D), (*shape[:3], S, E))
    expected = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(scaled_dot_product_attention(query, key, value), expected)


def test_tangents_of_forward_mode_are_refused() -> None:
    """Nothing that computes here would notice them: the derivative would be zero."""
    query, key, value = normal((B, H, T, D), (B, H, S, D), (B, H, S, E))
    with pytest.raises(adaattn.ArgumentError, match="expected tensors without tangents"):
        torch.func.jvp(lambda x: scaled_dot_product_attention(x, key, value), (query,), (query,))
    with torch.autograd.forward_ad.dual_level():
        scaled_dot_product_attention(query, key, value)
        dual = torch.autograd.forward_ad.make_dual(value, value)
        with pytest.raises(adaattn.ArgumentError, match="expected tensors without tangents"):
            scaled_dot_product_attention(query, key, dual)


def test_transforms_of_torch_func_are_refused() -> None:
    x = torch.randn(3, 1, 2, 4, 8)

    def loss(x: Any) -> Any:
        return scaled_dot_product_attention(x, x, x).sum()

    for call in (torch.func.vmap(loss), torch.func.grad(lambda x: loss(x[0]))):
        with pytest.raises(adaattn.ArgumentError, match=r"^query, key, value: expected plain tensors, got"):
            call(x)


def test_everything_dropped() -> None:
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    ours = scaled_dot_product_attention(x, x, x, dropout_p=1.0)
    theirs = torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=1.0)
    assert torch.equal(ours, theirs) and not ours.any()
    ours.sum().backward()
    assert not x.grad.any()


def test_gradients_on_a_gpu_without_one() -> None:
    """What is traced lies where its input does. Autograd itself takes a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key = (torch.empty(1, h, 5, 8, device="cuda", dtype=torch.bfloat16) for h in (2, 1))
        sinks = torch.empty(2)
        rest = (None, None, sinks, None, None, None, "", None, None, None, None, 0.0, 5e-2)
        rest += ("auto", "auto", "auto", "auto", "auto", None, None)
        out, lse = torch.ops.adaattn.attention_lse(query, key, key, *rest)
        needs = [True, True, False, False, False, True]
        found = torch.ops.adaattn.attention_backward(out, out, lse, needs, query, key, key, *rest)
        assert [(x.device.type, x.dtype, x.shape) for x in found] == [
            ("cuda", torch.bfloat16, query.shape),
            ("cuda", torch.bfloat16, key.shape),
            ("cpu", torch.float32, sinks.shape),
        ]
        assert scaled_dot_product_attention(query, key, key, policy="speed").shape == query.shape
