"""The ONNX operator: every attribute and layout against ONNX's own reference implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import bool_mask, float_mask

import adaattn
from adaattn.integrations.onnx import attention

onnx = pytest.importorskip("onnx")
reference = pytest.importorskip("onnx.reference")

B, H, G, T, S, P, D, E = 2, 4, 2, 5, 9, 6, 8, 12
INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")


def model(inputs: dict[str, Any], attributes: dict[str, Any], opset: int) -> Any:
    """A model of one node."""
    names = [name if name in inputs else "" for name in INPUTS[: 7 if opset > 23 else 6]]
    while not names[-1]:
        names.pop()
    cache = "nonpad_kv_seqlen" not in inputs
    outputs = ["Y", "present_key", "present_value"] if cache else ["Y"]
    node = onnx.helper.make_node("Attention", names, outputs, **attributes)
    value = onnx.helper.make_tensor_value_info
    kind = onnx.helper.np_dtype_to_tensor_dtype
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [value(name, kind(x.dtype), x.shape) for name, x in inputs.items()],
        [value(name, kind(inputs["Q"].dtype), None) for name in outputs],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def compare(inputs: dict[str, Any], attributes: dict[str, Any], expected: list[Any]) -> None:
    found = attention(**inputs, **attributes)
    for ours, theirs in zip(found, expected, strict=False):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def arrays(rng: np.random.Generator, flat: bool, dtype: Any = np.float32) -> dict[str, Any]:
    q, k, v = (
        rng.standard_normal((B, n, heads, size)).astype(dtype)
        for n, heads, size in ((T, H, D), (S, G, D), (S, G, E))
    )
    if flat:
        return {"Q": q.reshape(B, T, -1), "K": k.reshape(B, S, -1), "V": v.reshape(B, S, -1)}
    return {name: x.transpose(0, 2, 1, 3).copy() for name, x in (("Q", q), ("K", k), ("V", v))}


def past(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "past_key": rng.standard_normal((B, G, P, D), np.float32),
        "past_value": rng.standard_normal((B, G, P, E), np.float32),
    }


# further inputs, attributes and the first opset that has them
CASES: dict[str, Any] = {
    "plain": lambda rng: ({}, {}, 23),
    "causal": lambda rng: ({}, {"is_causal": 1}, 23),
    "scale and softcap": lambda rng: ({}, {"scale": 0.7, "softcap": 1.5}, 23),
    "bool mask": lambda rng: ({"attn_mask": bool_mask(rng, B, 1, T, S)}, {}, 23),
    "mask of heads": lambda rng: ({"attn_mask": bool_mask(rng, H, T, S)}, {"is_causal": 1}, 23),
    "float mask": lambda rng: ({"attn_mask": float_mask(rng, T, S)}, {"softcap": 2.0}, 23),
    "float mask, causal": lambda rng: ({"attn_mask": float_mask(rng, B, H, T, S)}, {"is_causal": 1}, 23),
    "empty rows": lambda rng: ({"attn_mask": np.arange(T)[:, None] * np.ones(S, int) > 1}, {}, 23),
    "past": lambda rng: (past(rng), {}, 23),
    "past, causal": lambda rng: (past(rng), {"is_causal": 1}, 23),
    "past, mask": lambda rng: (past(rng) | {"attn_mask": bool_mask(rng, T, P + S)}, {"is_causal": 1}, 23),
    "softmax in double": lambda rng: ({}, {"softmax_precision": 11}, 23),
    "short mask": lambda rng: ({"attn_mask": bool_mask(rng, B, 1, T, S - 2)}, {}, 24),
    "short float mask": lambda rng: (past(rng) | {"attn_mask": float_mask(rng, T, S)}, {"is_causal": 1}, 24),
    "lengths": lambda rng: ({"nonpad_kv_seqlen": np.array([S, 7])}, {}, 24),
    "lengths, causal": lambda rng: ({"nonpad_kv_seqlen": np.array([S, 7])}, {"is_causal": 1}, 24),
    "fewer keys than queries": lambda rng: ({"nonpad_kv_seqlen": np.array([3, 6])}, {"is_causal": 1}, 24),
    "lengths, short mask": lambda rng: (
        {"nonpad_kv_seqlen": np.array([5, 7]), "attn_mask": bool_mask(rng, T, 7)},
        {"is_causal": 1},
        24,
    ),
    "window": lambda rng: ({}, {"left_window_size": 2, "right_window_size": 1}, 25),
    "window, past": lambda rng: (past(rng), {"left_window_size": 3, "is_causal": 1}, 25),
    "window, lengths": lambda rng: ({"nonpad_kv_seqlen": np.array([S, 6])}, {"right_window_size": 0}, 25),
}


@pytest.mark.parametrize("flat", [False, True], ids=["4D", "3D"])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case: str, flat: bool, rng: np.random.Generator) -> None:
    further, attributes, first = CASES[case](rng)
    inputs = arrays(rng, flat) | further
    if flat:
        attributes = attributes | {"q_num_heads": H, "kv_num_heads": G}
    for opset in range(first, min(onnx.defs.onnx_opset_version(), 25) + 1):
        evaluator = reference.ReferenceEvaluator(model(inputs, attributes, opset))
        compare(inputs, attributes, evaluator.run(None, inputs))


@pytest.mark.parametrize("case", [case for case in CASES if "short" not in case])
def test_against_onnxruntime(case: str, rng: np.random.Generator) -> None:
    """Its CPU provider takes no mask that is shorter than the keys."""
    runtime = pytest.importorskip("onnxruntime")
    further, attributes, first = CASES[case](rng)
    inputs = arrays(rng, False) | further
    try:
        session = runtime.InferenceSession(
            model(inputs, attributes, first).SerializeToString(), providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        pytest.skip(f"this onnxruntime has no such operator: {error}")
    compare(inputs, attributes, session.run(None, inputs))


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_dtypes(dtype: Any, rng: np.random.Generator) -> None:
    inputs = arrays(rng, False, dtype)
    exact = adaattn.reference.attention(*inputs.values(), causal="upper_left")
    found = attention(**inputs, is_causal=1).Y
    assert found.dtype == dtype
    np.testing.assert_allclose(found, exact, atol=4 * np.finfo(dtype).eps)


def test_a_tolerance_is_kept(rng: np.random.Generator) -> None:
    query, key, value = (rng.standard_normal((1, 2, 256, 32), np.float32) for _ in range(3))
    exact = adaattn.reference.attention(query, key, value)
    found = attention(query, key, value, policy="speed").Y
    assert np.linalg.norm(found - exact) <= 5e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qk_matmul_output_mode": 3}, adaattn.ArgumentError, "qk_matmul_output_mode: expected 0 or None"),
        (
            {"past_key": np.zeros((B, G, P, D), np.float32)},
            adaattn.ArgumentError,
            "past_value: expected both",
        ),
        ({"softmax_precision": 7}, adaattn.ArgumentError, "softmax_precision: expected "),
        ({"q_num_heads": 3}, adaattn.ShapeError, "Q: expected q_num_heads=3"),
        ({"Q": np.zeros((B, T, H * D), np.float32)}, adaattn.ArgumentError, "q_num_heads: expected a number"),
        ({"Q": np.zeros((B, T, 7), np.float32), "q_num_heads": H}, adaattn.ShapeError, "Q: expected a last"),
        ({"Q": np.zeros((T, D), np.float32)}, adaattn.ShapeError, "Q: expected three or four dimensions"),
        (
            {
                "past_key": np.zeros((B, H, P, D), np.float32),
                "past_value": np.zeros((B, G, P, E), np.float32),
            },
            adaattn.ShapeError,
            r"past_key: expected shape \(2, 2, P, 8\)",
        ),
    ],
)
def test_refused(change: dict[str, Any], error: Any, message: str, rng: np.random.Generator) -> None:
    with pytest.raises(error, match=message):
        attention(**(arrays(rng, False) | change))


def test_lengths_beside_a_past_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(adaattn.ArgumentError, match="nonpad_kv_seqlen: expected None beside"):
        attention(**arrays(rng, False), **past(rng), nonpad_kv_seqlen=np.array([3, 4]))
