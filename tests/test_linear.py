"""`adaattn.linear` and packed weights beside float64, from the sizes and numbers that break such things."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from support import in_new_process

import adaattn
from adaattn import PackedWeight, linear, nn

Array = NDArray[Any]

SIZES = [(1, 1), (3, 5), (16, 4), (17, 257), (256, 256), (300, 515), (515, 1030)]
# What a rung may be off by on normal numbers, and what it is off by at least where there are many of them.
ERRORS = {"int8": (1.6e-2, 4e-3), "int16": (6e-5, 1.5e-5), "fp32": (1e-6, 3e-8), "fp64": (0, 0)}


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def codes_pay() -> bool:
    """Elsewhere fp32 is faster, and chosen."""
    return bool(adaattn.cpu_info()["kernels"]["code_products"] == "avx512vnni")


def exact(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y: Array = x.astype(np.float64) @ weight.T.astype(np.float64)
    return y if bias is None else y + bias.astype(np.float64)


def error(y: Array, truth: Array) -> Array:
    """Of each row, without what rounding to float32 leaves."""
    wrong = np.linalg.norm(np.where(y == truth.astype(np.float32), 0, y - truth), axis=-1)
    return np.divide(wrong, np.linalg.norm(truth, axis=-1), out=np.zeros_like(wrong), where=wrong > 0)


@pytest.mark.isa_sample
@pytest.mark.parametrize("rung", ERRORS)
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_rungs_by_name(N: int, K: int, rung: str) -> None:
    weight, most, least = PackedWeight(normal(N, K)), *ERRORS[rung]
    for rows in (1, 2, 3, 4, 7):
        x = normal(rows, K)
        y, report = linear(x, weight, precision=rung, return_report=True)
        worst = error(y, exact(x, weight.weight)).max()
        assert worst <= most * (1 if min(N, K) > 1 else 4)
        assert min(N, K) < 16 or worst >= least
        assert (report.precision == rung).all() and report.precision.shape == (rows,)
        assert np.isnan(report.measured_error)
        if rung != "fp64":
            assert worst <= 1.05 * report.predicted_error.max()
            assert N < 16 or K < 16 or worst >= 0.05 * report.predicted_error.max()


@pytest.mark.parametrize("tolerance", [None, 5e-2, 1e-2, 1e-4, 1e-5, 1e-6, 1e-8])
@pytest.mark.parametrize(
    "shape", [(), (1,), (2,), (5,), (2, 3), (1, 2, 1, 2), (1, 1, 2, 1, 3), (0,), (33,), (100,)]
)
def test_a_tolerance_is_kept(shape: tuple[int, ...], tolerance: float | None) -> None:
    weight, x, bias = normal(300, 515), normal(*shape, 515), normal(300)
    truth = exact(x, weight, bias)
    for given in (weight, PackedWeight(weight)):
        y, report = linear(x, given, bias, tolerance=tolerance, return_report=True)
        assert y.shape == (*shape, 300) and y.dtype == np.float32
        assert report.precision.shape == report.predicted_error.shape == shape
        assert (error(y, truth) <= (1e-6 if tolerance is None else tolerance)).all()
        assert np.array_equal(y, linear(x, given, bias, tolerance=tolerance))


def test_what_is_chosen() -> None:
    vnni = codes_pay()
    weight = PackedWeight(normal(300, 515))
    assert 5e-3 < weight.errors["int8"] < 9e-3 and 2e-5 < weight.errors["int16"] < 4e-5
    assert weight.nbytes < 0.55 * weight.weight.nbytes
    for rows, tolerance, rung in [
        (1, 1e-2, "int8"), (64, 1e-2, "int8"), (65, 1e-2, "fp32"), (1, 5e-3, "int16"), (2, 1e-4, "int16"),
        (3, 1e-4, "fp32"), (1, 1e-5, "fp32"), (1, None, "fp32"), (1, 1e-8, "fp64"), (40, 1e-8, "fp64"),
    ]:  # fmt: skip
        _, report = linear(normal(rows, 515), weight, tolerance=tolerance, return_report=True)
        expected = rung if vnni or rung == "fp64" else "fp32"
        assert set(report.precision.tolist()) == {expected}, (rows, tolerance)
    same = linear(normal(1, 515), weight, policy="balanced")
    assert np.array_equal(same, linear(normal(1, 515), weight, tolerance=1e-2))


@pytest.mark.isa_sample
def test_rows_whose_terms_cancel_go_up() -> None:
    weight, tolerance = normal(200, 300), 1e-2
    plain = normal(6, 300)
    # Nearly within the null space of the weight, ever more so.
    turn = np.linalg.svd(weight.astype(np.float64))[2]
    hidden = plain @ turn[200:].T @ turn[200:]
    sizes = np.array([1e-1, 3e-2, 1e-5, 1e-7])
    x = np.concatenate([plain[:2], (hidden[2:] + sizes[:, None] * plain[2:])]).astype(np.float32)
    y, report = linear(x, PackedWeight(weight), tolerance=tolerance, return_report=True)
    assert (error(y, exact(x, weight)) <= tolerance).all()
    assert (report.predicted_error <= tolerance).all()
    if codes_pay():
        assert report.precision.tolist()[:4] == ["int8", "int8", "int16", "int16"]
    assert report.precision[-1] == "fp64"
    for rows in (1, 40):  # without codes, by the engine and by BLAS
        y, report = linear(np.tile(x[-1:], (rows, 1)), weight, tolerance=tolerance, return_report=True)
        assert (error(y, exact(x[-1:], weight)) <= tolerance).all()
        assert (report.precision == "fp64").all() and report.measured_error <= tolerance


@pytest.mark.parametrize("level", [63.5, 100.3, 3.49])
def test_errors_of_a_weight_that_depend_on_each_other(level: float) -> None:
    """Half of the inputs have one weight, between two codes: their errors add up instead of cancelling."""
    weight = normal(128, 256)
    weight[:, ::2], weight[:, 1] = level / 127, 1
    weight[:, 3::2] *= 0.2
    x = np.zeros((1, 256), np.float32)
    x[:, ::2] = 1
    packed = PackedWeight(np.clip(weight, -1, 1))
    y, report = linear(x, packed, precision="int8", return_report=True)
    worst = error(y, exact(x, packed.weight)).max()
    assert worst <= report.predicted_error.max()
    within = linear(x, packed, tolerance=1e-3)
    assert (error(within, exact(x, packed.weight)) <= 1e-3).all()


@pytest.mark.isa_sample
@pytest.mark.parametrize("rows", [4, 40])
def test_nan_and_infinities_stay_in_their_rows(rows: int) -> None:
    weight, x = normal(40, 60), normal(rows, 60)
    clean = linear(x, PackedWeight(weight), tolerance=2e-2)
    x[1, 5], x[2, 7] = np.nan, np.inf
    y, report = linear(x, PackedWeight(weight), tolerance=2e-2, return_report=True)
    assert np.isnan(y[1]).all() and np.array_equal(y[2], np.where(weight[:, 7] > 0, np.inf, -np.inf))
    others = [0, *range(3, rows)]
    assert np.array_equal(y[others], clean[others])
    assert np.isfinite(report.predicted_error[others]).all() or not (rows == 4 or codes_pay())
    weight[3, 4] = np.nan
    packed = PackedWeight(weight)
    assert packed.errors == {"int8": np.inf, "int16": np.inf}
    y = linear(normal(2, 60), packed, tolerance=1e-2)
    assert np.isnan(y[:, 3]).all() and np.isfinite(np.delete(y, 3, axis=1)).all()


@pytest.mark.isa_sample
@pytest.mark.parametrize("size", [1e-44, 1e-36, 1e-30, 1e-22, 1e22, 1e30, 1e36])
@pytest.mark.parametrize("of", ["x", "weight", "one feature"])
def test_sizes_of_numbers(size: float, of: str) -> None:
    weight, x = normal(40, 60), normal(5, 60)
    if of == "x":
        x *= np.float32(size)
    else:
        weight[7 if of == "one feature" else slice(None)] *= np.float32(size)
    truth = exact(x, weight)
    y = linear(x, PackedWeight(weight), tolerance=1e-2)
    represented = np.linalg.norm(truth, axis=-1) > 1e-36  # below there are no digits to keep it with
    assert (error(y, truth) <= 1e-2)[represented].all()
    assert np.isfinite(y).all()


def test_zeros() -> None:
    bias = normal(20)
    for weight in (PackedWeight(np.zeros((20, 30), np.float32)), PackedWeight(normal(20, 30))):
        for precision in ERRORS:
            y = linear(np.zeros((2, 30), np.float32), weight, bias, precision=precision)
            assert np.array_equal(y, np.stack([bias, bias]))
    y, report = linear(np.zeros((2, 30), np.float32), weight, tolerance=1e-2, return_report=True)
    assert not y.any() and not report.predicted_error.any()


@pytest.mark.isa_sample
@pytest.mark.parametrize("precision", ERRORS)
def test_same_bits(precision: str) -> None:
    weight, x, bias = PackedWeight(normal(1000, 515)), normal(7, 515), normal(1000)
    y = linear(x, weight, bias, precision=precision, num_threads=1)
    for threads in (2, 3):
        assert np.array_equal(y, linear(x, weight, bias, precision=precision, num_threads=threads))
    alone = [linear(row, weight, bias, precision=precision) for row in x]
    assert np.array_equal(y, alone)
    spread = np.zeros((7, 2, 1030), np.float32)[:, ::-1, ::-2]
    spread[:, 0] = x
    assert np.array_equal(y, linear(spread[:, 0], weight, bias, precision=precision))
    climbed = linear(x, weight, bias, tolerance=1e-2 if precision == "int8" else 1e-4)
    assert np.array_equal(climbed[:2], linear(x[:2], weight, bias, tolerance=1e-2)) or precision != "int8"


@pytest.mark.parametrize("rows", [2, 100])
def test_a_bias_of_any_strides(rows: int) -> None:
    weight, x, bias = normal(30, 40), normal(rows, 40), normal(30)
    strided = np.repeat(bias, 3)[::3]
    for given in (weight, PackedWeight(weight)):
        expected = linear(x, given, bias, tolerance=1e-2)
        assert np.array_equal(linear(x, given, strided, tolerance=1e-2), expected)
    layer = nn.Linear(40, 30, seed=0)
    layer.bias = bias
    expected = layer(x)
    layer.bias = strided
    assert np.array_equal(layer(x), expected)


def test_dtypes() -> None:
    weight, x, bias = normal(30, 40), normal(3, 40), normal(30)
    for dtype, eps in ((np.float16, 2.0**-11), (ml_dtypes.bfloat16, 2.0**-8)):
        half, kept = x.astype(dtype), weight.astype(dtype)
        truth = exact(half, kept, bias.astype(dtype))
        y = linear(half, kept, bias.astype(dtype))
        assert y.dtype == dtype and (error(y.astype(np.float32), truth) <= eps).all()
        y = linear(half, PackedWeight(weight), bias, tolerance=1e-2)
        assert (
            y.dtype == dtype and (error(y.astype(np.float32), exact(half, weight, bias)) <= 1e-2 + eps).all()
        )
    y, report = linear(x.astype(np.float64), weight.astype(np.float64), return_report=True)
    assert y.dtype == np.float64 and np.allclose(y, exact(x, weight), rtol=1e-13)
    assert (report.precision == "fp64").all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.ones((2, 3), np.float32)}, adaattn.ShapeError, r"x: expected shape .*, got \(2, 3\)"),
        ({"x": np.float32(1)}, adaattn.ShapeError, r"x: expected shape \(..., 4\), got \(\)"),
        ({"x": np.ones((2, 4), int)}, adaattn.DTypeError, "x: expected float32, .* got int64"),
        ({"x": np.ones((2, 4))}, adaattn.DTypeError, "weight: expected an array of float64, like x"),
        ({"weight": np.ones(4, np.float32)}, adaattn.ShapeError, "weight: expected shape"),
        ({"weight": np.ones((0, 4), np.float32)}, adaattn.ShapeError, "weight: expected shape"),
        ({"bias": np.ones(4, np.float32)}, adaattn.ShapeError, r"bias: expected shape \(3,\), got \(4,\)"),
        ({"bias": np.ones(3)}, adaattn.DTypeError, "bias: expected an array of float32, like x, got float64"),
        ({"bias": [1.0, 2, 3]}, adaattn.DTypeError, "bias: expected an array of float32, like x, got list"),
        ({"tolerance": 0}, adaattn.ArgumentError, "tolerance: expected a finite number above 0, got 0"),
        ({"tolerance": np.nan}, adaattn.ArgumentError, "tolerance: expected a finite number"),
        ({"tolerance": 1e-2, "policy": "speed"}, adaattn.ArgumentError, "policy: expected None beside tol"),
        ({"policy": "fast"}, adaattn.ArgumentError, "policy: expected None or one of"),
        ({"precision": "bf16"}, adaattn.ArgumentError, "precision: expected 'auto' or one of"),
        ({"precision": "int8", "tolerance": 1}, adaattn.ArgumentError, "tolerance: expected None beside"),
        ({"num_threads": 0}, adaattn.ArgumentError, "num_threads: expected at least 1, got 0"),
        ({"num_threads": 1.5}, adaattn.DTypeError, "num_threads: expected an int or None, got float"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_are_refused(changes: Any, error: type[Exception], message: str) -> None:
    arguments = {"x": np.ones((2, 4), np.float32), "weight": np.ones((3, 4), np.float32)} | changes
    with pytest.raises(error, match=f"^{message}"):
        linear(**arguments)


def test_weights_that_are_refused() -> None:
    for weight, kind in ((np.ones((2, 2)), adaattn.DTypeError), (normal(4), adaattn.ShapeError)):
        with pytest.raises(kind, match=r"^weight: expected"):
            PackedWeight(weight)


def _no_memory() -> str:
    weight, x = PackedWeight(normal(30, 40)), normal(2, 40)
    adaattn._adaattn._alloc_fail_after(0)
    try:
        linear(x, weight, tolerance=1e-2)
    except MemoryError as error:
        return str(error)
    return ""


def test_no_memory() -> None:
    assert in_new_process(_no_memory).startswith("linear: no memory for")


def test_copies_of_a_packed_weight() -> None:
    weight, x = PackedWeight(normal(30, 40)), normal(2, 40)
    y = linear(x, weight, tolerance=1e-2)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert np.array_equal(y, linear(x, other, tolerance=1e-2)) and repr(other) == repr(weight)


# ---- in modules


def model(**options: Any) -> nn.Transformer:
    sizes: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "embed_dim": 32, "max_seq_len": 64, "seed": 3}
    return nn.Transformer(64, **sizes | options).eval()


@pytest.mark.parametrize(
    "options", [{}, {"tied_embeddings": True}, {"activation": "swiglu", "num_kv_heads": 1}], ids=str
)
def test_a_packed_model(options: Any) -> None:
    plain, packed = model(**options), model(**options).pack(2e-2)
    tokens = np.arange(10)[None]
    truth = plain(tokens)
    for within, least in ((packed(tokens), 1e-6), (packed.pack(policy="quality")(tokens), 0)):
        assert (least if codes_pay() else 0) <= error(within, truth).max() <= 5e-2
    packed.pack(policy="balanced")
    assert packed.generate(tokens, 20).shape == (1, 30)
    assert np.array_equal(packed.unpack()(tokens), truth)


def test_packed_parameters_do_not_change_unseen() -> None:
    layer, x = nn.Linear(40, 30, seed=0).pack(policy="balanced"), normal(2, 40)
    y, weight = layer(x), layer.weight
    assert (error(y, exact(x, weight)) <= 1e-2).all()
    assert codes_pay() != np.array_equal(y, layer.unpack()(x))
    layer.pack(policy="balanced")
    with pytest.raises(ValueError, match="read-only"):
        weight += 1
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    layer.weight = 2 * weight
    assert np.allclose(layer(x), 2 * exact(x, weight), rtol=1e-4, atol=1e-5), "another array is not packed"
    layer.weight = weight
    assert np.array_equal(layer(x), y)
    for other in (copied, pickled):
        other.weight += 1
        assert np.allclose(other(x), exact(x, weight + 1), rtol=1e-4, atol=1e-5)
    layer.load_state_dict({"weight": weight + 1, "bias": np.zeros(30)})
    assert np.allclose(layer(x), exact(x, layer.weight), rtol=1e-4, atol=1e-5)
    layer.pack(policy="balanced").train()
    layer.weight += 1
    layer(x)
    layer.backward(np.ones((2, 30), np.float32))


def test_packed_weights_wherever_they_lie(tmp_path: Any) -> None:
    x, given = normal(2, 40), normal(30, 40)
    kept = np.memmap(tmp_path / "weight", np.float32, "w+", shape=(30, 40))
    kept[...] = given
    expected = linear(x, PackedWeight(given), tolerance=1e-2)
    for weight in (np.asfortranarray(given), np.repeat(given, 2, axis=1)[:, ::2], kept):
        layer = nn.Linear(40, 30, bias=False, seed=0)
        layer.weight = weight
        layer.pack(1e-2)
        assert np.array_equal(layer(x), expected) and not weight.flags.writeable
        assert np.allclose(layer.unpack()(x), exact(x, given), rtol=1e-4, atol=1e-5)
        assert weight.flags.writeable


def test_any_number_of_axes() -> None:
    layer, x = nn.Linear(40, 30, seed=0), normal(2, 40)
    for within in (layer, layer.pack(policy="balanced")):
        y = within(x)
        assert np.array_equal(within(x.reshape(1, 2, 1, 1, 1, 40)), y.reshape(1, 2, 1, 1, 1, 30))
    with pytest.raises(adaattn.ShapeError, match=r"^x: expected .*\(..., 40\)"):
        layer(np.zeros((2, 0), np.float32))


def test_models_that_cannot_be_packed() -> None:
    for arguments in ({}, {"tolerance": 0.0}, {"tolerance": np.inf}):
        with pytest.raises(adaattn.ArgumentError, match=r"^tolerance: expected a finite number above 0, got"):
            model().pack(**arguments)
    layers = model()
    layers.head = nn.Linear(32, 64, dtype=np.float64)
    with pytest.raises(adaattn.DTypeError, match=r"^weight: expected float32, got float64"):
        layers.pack(policy="balanced")
    layers.blocks[0].mlp.up.weight += 1


def test_float64_inputs_of_a_packed_layer() -> None:
    layer, x = nn.Linear(40, 30, seed=0).pack(policy="balanced"), normal(2, 40).astype(np.float64)
    assert np.allclose(layer(x), exact(x, layer.weight), rtol=1e-12)
