"""The planner's rules by a table, plans as values, and calls within an error budget."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BF16, F16, F32, F64, Array, Shape, inputs, same_bits

import adaattn
from adaattn import _adaattn, rates
from adaattn._adaattn import CANDIDATES, RUNGS
from adaattn.views import margin_of

# Errors of normal entries, dear to cheap, and rates of a machine where each is faster than the last but two.
ERRORS = 1e-15, 3e-7, 4e-7, 5e-6, 1.5e-4, 4e-4, 3.5e-3, 1.1e-2, 1.4e-2, 3.7e-2, 5e-2
ERROR = dict(zip(CANDIDATES, ERRORS, strict=True))
SPEED = dict(zip(CANDIDATES, (50, 100, 100, 60, 180, 60, 220, 290, 400, 0, 0), strict=True))
PACK = dict(zip(CANDIDATES, (0, 0, 0, 1, 0.6, 0.5, 0.3, 0.4, 0.5, 0.5, 0.5), strict=True))
LONG, ELEMENTS = 2.0 * 1024 * 1024 * 128, 1024.0 * 128


class Head(NamedTuple):
    """What `_plan_head` takes, by default of a long finite head of size 64."""

    tolerance: float
    error: dict[str, float] = {}  # noqa: RUF012
    lse_error: dict[str, float] = {}  # noqa: RUF012
    speed: dict[str, float] = {}  # noqa: RUF012
    speed_128: dict[str, float] = {}  # noqa: RUF012
    pack: dict[str, float] = {}  # noqa: RUF012
    finite: bool = True
    margin: float = 1.0
    lse: bool = False
    max_precision: str = "auto"
    min_precision: str = "auto"
    operations: float = LONG
    elements: float = ELEMENTS
    D: int = 64
    plain: str = "fp32"

    def choice(self) -> str:
        tables = (ERROR, self.error), (dict.fromkeys(CANDIDATES, 0.0), self.lse_error)
        error, lse_error = ([(common | own)[c] for c in CANDIDATES] for common, own in tables)
        at_64, pack = SPEED | self.speed, PACK | self.pack
        at_128 = at_64 | self.speed_128
        index = _adaattn._plan_head(
            error,
            lse_error,
            [x for c in CANDIDATES for x in (at_64[c], at_128[c], pack[c])],
            self.finite,
            self.tolerance,
            self.margin,
            self.lse,
            RUNGS.index(self.max_precision),
            RUNGS.index(self.min_precision),
            self.operations,
            self.elements,
            self.D,
            CANDIDATES.index(self.plain),
        )
        return CANDIDATES[index]


RULES: dict[str, tuple[Head, str]] = {
    "the cheapest within the budget": (Head(2e-2), "int8"),
    "what is over the budget is out": (Head(1.3e-2), "int8/bf16"),
    "further down the budget": (Head(1e-2), "bf16"),
    "exactly the budget is within": (Head(1.4e-2), "int8"),
    "slower ones are passed over": (Head(1e-3), "int16"),
    "cheap means fast, not inexact": (Head(1, speed={"int16": 500}), "int16"),
    "of equals the more exact": (Head(1e-6), "fp32"),
    "fp64 where nothing else keeps it": (Head(1e-8), "fp64"),
    "the margin": (Head(2e-2, margin=1.5), "int8/bf16"),
    "a wider margin": (Head(2e-2, margin=3), "bf16"),
    "a margin below one, of a first look": (Head(2e-3, margin=1 / 8), "int8"),
    "an error of the lse that nobody asks for": (Head(2e-2, lse_error={"int8": 1}), "int8"),
    "an error of the lse that counts": (Head(2e-2, lse_error={"int8": 3e-2}, lse=True), "int8/bf16"),
    "the margin counts for the lse": (Head(4e-2, lse_error={"int8": 3e-2}, lse=True, margin=2), "int8/bf16"),
    "the lse need not beat rounding": (Head(5e-7, lse_error={"fp32": 9e-7}, lse=True), "fp32"),
    "the lse beyond rounding": (Head(5e-7, lse_error={"fp32": 2e-6, "bf16x6": 2e-6}, lse=True), "fp64"),
    "an error that is not known is none to keep": (Head(2e-2, error={"int8": np.nan}), "int8/bf16"),
    "an infinite error": (Head(2e-2, error={"int8": np.inf}), "int8/bf16"),
    "at least so exact": (Head(2e-2, min_precision="bf16"), "bf16"),
    "a pair is as exact as its worse half": (Head(2e-2, min_precision="int16"), "int16"),
    "at most so exact": (Head(1e-8, max_precision="fp32"), "fp32"),
    "at most so exact, none fits": (Head(1e-8, max_precision="bf16"), "bf16"),
    "one allowed that fits": (Head(5e-2, max_precision="bf16", min_precision="bf16"), "bf16"),
    "one allowed that does not": (Head(1e-9, max_precision="int8", min_precision="int8"), "int8"),
    "none fits: the dearest": (Head(1e-16), "fp64"),
    "not finite: plain arithmetic": (Head(2e-2, finite=False), "fp32"),
    "not finite, float64": (Head(2e-2, finite=False, plain="fp64"), "fp64"),
    "not finite and plain is not allowed": (Head(2e-2, finite=False, max_precision="bf16"), "bf16"),
    "few queries do not pay for packing": (Head(2e-2, operations=LONG / 128), "fp32"),
    "some queries pay for some packing": (Head(2e-2, operations=LONG / 8, pack={"int8": 8}), "int8/bf16"),
    "heads that share keys share packing": (Head(2e-2, operations=LONG / 128, elements=ELEMENTS / 8), "int8"),
    "rates at 64": (Head(2e-2, speed_128={"fp32": 900}), "int8"),
    "rates at 128": (Head(2e-2, speed_128={"fp32": 900}, D=128), "fp32"),
    "rates between them": (Head(2e-2, speed_128={"fp32": 900}, D=112), "fp32"),
    "rates between them, nearer to 64": (Head(2e-2, speed_128={"fp32": 900}, D=80), "int8"),
    "rates below 64 go on": (Head(2e-2, speed_128={"int8": 900}, speed={"fp32": 390}, D=32), "fp32"),
    "rates above 128 are those at 128": (Head(2e-2, speed_128={"fp32": 401}, D=256), "fp32"),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    head, expected = RULES[rule]
    assert head.choice() == expected


def test_every_candidate_can_win() -> None:
    assert {Head(1, speed={c: 1000}, pack={c: 0}).choice() for c in CANDIDATES} == set(CANDIDATES)


@pytest.mark.parametrize("limit", ["min_precision", "max_precision"])
@pytest.mark.parametrize("rung", [rung for rung in RUNGS if rung != "auto"])
def test_limits_follow_the_order_of_the_rungs(limit: str, rung: str) -> None:
    """Whatever is fast enough to win anywhere keeps within them."""
    for fast in CANDIDATES:
        choice = Head(1, speed={fast: 1000}, pack={fast: 0}, **{limit: rung}).choice()
        for part in choice.split("/"):
            if limit == "min_precision":
                assert RUNGS.index(part) <= RUNGS.index(rung)
            else:
                assert RUNGS.index(part) >= RUNGS.index(rung)


exponents = st.floats(-16, 1).map(lambda x: 10**x)
per_candidate = st.lists(exponents, min_size=len(CANDIDATES), max_size=len(CANDIDATES))
speeds = st.lists(st.floats(1, 1000), min_size=len(CANDIDATES), max_size=len(CANDIDATES))


@st.composite
def heads(draw: st.DrawFn) -> Head:
    def table(values: list[float]) -> dict[str, float]:
        return dict(zip(CANDIDATES, values, strict=True))

    return Head(
        draw(exponents),
        error=table(draw(per_candidate)),
        lse_error=table(draw(per_candidate)),
        speed=table(draw(speeds)),
        speed_128=table(draw(speeds)),
        margin=draw(st.sampled_from([1 / 8, 1, 1.5, 3])),
        lse=draw(st.booleans()),
        operations=draw(st.floats(1e3, 1e12)),
        elements=draw(st.floats(1e2, 1e8)),
        D=draw(st.integers(1, 300)),
    )


@given(heads())
def test_what_keeps_the_budget_is_chosen(head: Head) -> None:
    keeping = set()
    for c in CANDIDATES:
        limit = head.tolerance / (min(head.margin, 1.25) if c == head.plain else head.margin)
        if head.error[c] <= limit and (not head.lse or head.lse_error[c] <= max(limit, 1e-6)):
            keeping.add(c)
    assert head.choice() in (keeping or {"fp64"})


@given(heads(), exponents)
def test_a_smaller_tolerance_is_never_faster(head: Head, other: float) -> None:
    """It never gives a cheaper choice; among rates that go with errors, none with a larger error either."""

    def seconds(choice: str) -> float:
        small, large = 1 / head.speed[choice], 1 / head.speed_128[choice]
        each = large + (small - large) * (128 / min(max(head.D, 16), 128) - 1)
        return head.operations * max(each, 0.1 * large) + head.elements * PACK[choice]

    small, large = sorted((head.tolerance, other))
    strict, loose = (head._replace(tolerance=t).choice() for t in (small, large))
    limit = small / head.margin
    if head.error[strict] <= limit and (not head.lse or head.lse_error[strict] <= max(limit, 1e-6)):
        assert seconds(strict) >= 0.95 * seconds(loose) * (1 - 1e-12)  # less does not pay


@given(heads(), exponents)
def test_a_smaller_tolerance_never_has_a_larger_error(head: Head, other: float) -> None:
    """On a machine where what is faster is less exact, as are those that the rungs are made for."""
    by_error = sorted(CANDIDATES, key=lambda c: (head.error[c], CANDIDATES.index(c)))
    speed = dict(zip(by_error, sorted(head.speed.values()), strict=True))
    head = head._replace(speed=speed, speed_128=speed, pack=dict.fromkeys(CANDIDATES, 0.0), lse=False)
    strict, loose = (
        head._replace(tolerance=t, error=head.error | {"fp64": 0.0}).choice()
        for t in sorted((head.tolerance, other))
    )
    error = head.error | {"fp64": 0.0}
    assert error[strict] <= error[loose]


# ---- plans as values

SHAPE = Shape(2, 4, 2, 256, 300, 64, 48)


@pytest.fixture(autouse=True)
def fast_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where what is less exact is faster, whatever this one is."""
    table = [[SPEED[c], SPEED[c], PACK[c]] for c in CANDIDATES]
    monkeypatch.setattr(rates, "_table", np.array(table, np.float64))


def problem(rng: np.random.Generator, shape: Shape = SHAPE, dtype: Any = F32) -> list[Array]:
    """Heads of different spread, so that they want different rungs."""
    query, key, value = inputs(rng, shape, dtype)
    spread = np.geomspace(0.3, 6, shape.H)[:, None, None]
    return [(query.astype(F32) * spread).astype(dtype), key, value]


def true_errors(out: Array, arrays: list[Array], **options: Any) -> Array:
    exact = adaattn.reference.attention(*arrays, **options)
    norms = (np.sqrt(np.sum(np.square(x), axis=(2, 3))) for x in (out.astype(F64) - exact, exact))
    return np.divide(*norms)


def assert_same(a: Any, b: Any) -> None:
    """Two plans alike in every bit."""
    assert type(a) is type(b) is adaattn.Plan
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert type(x) is type(y)
        assert same_bits(x, y) if isinstance(x, np.ndarray) else x == y


def plans(rng: np.random.Generator) -> Iterator[adaattn.Plan]:
    arrays = problem(rng)
    yield adaattn.plan(*arrays, tolerance=1e-2)
    yield adaattn.plan(*arrays, policy="speed", return_lse=True, min_precision="bf16", max_precision="fp32")
    yield adaattn.attention(*arrays, tolerance=1e-3, return_report=True)[-1].plan
    yield adaattn.attention(*arrays, tolerance=0.5, precision=("fp32", "int8"), return_report=True)[-1].plan
    arrays[2][0, 0, 0, 0] = np.nan
    arrays[2][1, 0] = 0
    yield adaattn.plan(*arrays, tolerance=np.float32(1e-2))
    yield adaattn.plan(*problem(rng, Shape(1, 2, 1, 3, 5, 8, 8), F16), tolerance=1)


def test_json_and_pickles_hold_every_bit(rng: np.random.Generator) -> None:
    seen = list(plans(rng))
    assert not all(np.isfinite(plan.candidate_error).all() for plan in seen)
    for plan in seen:
        assert_same(adaattn.Plan.from_json(plan.to_json()), plan)
        assert_same(pickle.loads(pickle.dumps(plan)), plan)


def test_fields_of_a_plan(rng: np.random.Generator) -> None:
    plan = adaattn.plan(*problem(rng), tolerance=1e-2, return_lse=True)
    assert plan.sizes == SHAPE._asdict() | {"dtype": "float32"}
    assert (plan.tolerance, plan.lse, plan.forced) == (1e-2, True, False)
    assert plan.candidates == rates.RUNGS and plan.candidate_error.shape == (2, 4, len(rates.RUNGS))
    assert plan.finite.all() and not plan.retried.any()
    for at in np.ndindex(2, 4):
        name = "/".join(dict.fromkeys((plan.precision_qk[at], plan.precision_pv[at])))
        c = CANDIDATES.index(name)
        assert plan.predicted_error[at] == plan.candidate_error[at][c]
        # The choice is the pure planner's on what the plan says.
        head = Head(
            1e-2,
            error=dict(zip(rates.RUNGS, plan.candidate_error[at], strict=True)),
            lse_error=dict(zip(rates.RUNGS, plan.candidate_lse_error[at], strict=True)),
            margin=margin_of(plan, at),
            lse=True,
            operations=2.0 * SHAPE.T * SHAPE.S * (SHAPE.D + SHAPE.E),
            # Whoever else shares them; and queries and outputs, as far as rows are short.
            elements=(SHAPE.S + (1 - SHAPE.S / 1024) * SHAPE.T) * (SHAPE.D + SHAPE.E),
        )
        assert head.choice() == name
        seconds = 1e-9 * (head.operations / SPEED[name] + head.elements * PACK[name])
        assert abs(plan.candidate_seconds[at][c] / seconds - 1) < 1e-9


def broken() -> Iterator[tuple[str, Any]]:
    good = adaattn.plan(*problem(np.random.default_rng(0)), tolerance=1e-2).to_json()

    def changed(**changes: Any) -> str:
        return json.dumps(json.loads(good) | changes)

    heads, rungs = [[False] * 4] * 2, [["fp32"] * 4] * 2
    texts = [
        "",
        "{",
        "[]",
        "null",
        "1",
        '"plan"',
        "{}",
        good[:-1],
        good + good,
        good.replace("0.01", "1e999"),
    ]
    yield from ((text[:20] or "empty", text) for text in texts)
    yield "deep", "[" * 100_000
    sizes = json.loads(good)["sizes"]
    for name, values in {
        "sizes": [
            None,
            {},
            [],
            sizes | {"B": 3},
            sizes | {"T": 0},
            sizes | {"S": 1.5},
            sizes | {"dtype": "int8"},
        ],
        "tolerance": [None, 0.0, -1.0, "1e-2", True, "Infinity"],
        "min_precision": ["int4", None, 1, []],
        "max_precision": ["FP32"],
        "forced": [0, None],
        "lse": ["true"],
        "candidates": [None, [], [1], ["fp32"]],
        "retried": [heads[0], heads[:1], [[0] * 4] * 2, [[None] * 4] * 2, True],
        "finite": [[[False] * 3] * 2],
        "precision_qk": [[["auto"] * 4] * 2, [["int4"] * 4] * 2, [["fp64"] * 4] * 2, rungs[0], [[1] * 4] * 2],
        "precision_pv": [[["fp32"] * 4, ["int8/bf16"] * 4], "fp32"],
        "profiled_rows": [[[0.5] * 4] * 2, [[2**70] * 4] * 2, [[True] * 4] * 2],
        "predicted_error": [[["x"] * 4] * 2, [[False] * 4] * 2, [1.0] * 8, None],
        "candidate_error": [[[[None] * 8] * 4] * 2, []],
        "more": [1],
    }.items():
        yield from ((f"{name}: {value}"[:40], changed(**{name: value})) for value in values)
    for name in json.loads(good):
        yield f"no {name}", json.dumps({key: x for key, x in json.loads(good).items() if key != name})


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in broken()])
def test_json_of_no_plan(text: str) -> None:
    with pytest.raises(adaattn.ArgumentError, match=r"^text: expected the JSON of a plan, got "):
        adaattn.Plan.from_json(text)


@pytest.mark.parametrize("text", [None, b"{}", {}, 1])
def test_json_is_text(text: Any) -> None:
    with pytest.raises(adaattn.DTypeError, match=rf"^text: expected a str, got {type(text).__name__}$"):
        adaattn.Plan.from_json(text)


# ---- explain


def one(**changes: Any) -> adaattn.Plan:
    """A plan of one head, int8/bf16 within 1e-2, of errors and times that are easy to read."""
    plan = adaattn.plan(*inputs(np.random.default_rng(0), Shape(1, 1, 1, 64, 64, 8, 8)), tolerance=1e-2)
    error = np.array([[[1e-15, 3e-7, 4e-7, 5e-6, 1e-4, 4e-4, 3e-3, 4.1e-3, 1.9e-2]]])
    seconds = 1e-4 * np.array([[[20, 10, 10, 16, 8, 15, 5, 4, 3.0]]])
    made = replace(
        plan,
        precision_qk=np.array([["int8"]]),
        precision_pv=np.array([["bf16"]]),
        predicted_error=np.array([[4.1e-3]]),
        candidates=rates.RUNGS,
        candidate_error=error,
        candidate_seconds=seconds,
        profiled_rows=np.array([[4]]),
    )
    return replace(made, **changes)


IN_BF16 = {
    "precision_qk": np.array([["bf16"]]),
    "precision_pv": np.array([["bf16"]]),
    "predicted_error": np.array([[3e-3]]),
}
LSE_ERROR = np.array([[[0, 0, 0, 0, 0, 0, 2e-3, 3e-2, 4e-2]]])
REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "within": ({}, "int8/bf16: 0.4 ms, error 4.1e-3 <= 1e-2 / 2; int8 would be 0.3 ms but 1.9e-2"),
    "guessed": (
        IN_BF16 | {"profiled_rows": np.array([[0]])},
        "bf16: 0.5 ms, error 3e-3 <= 1e-2 / 3; int8/bf16 would be 0.4 ms but 4.1e-3; "
        "int8 would be 0.3 ms but 1.9e-2",
    ),
    "lse": (
        IN_BF16 | {"lse": True, "candidate_lse_error": LSE_ERROR},
        "bf16: 0.5 ms, error 3e-3 <= 1e-2 / 2, lse 2e-3; "
        "int8/bf16 would be 0.4 ms but its lse is off by 3e-2; int8 would be 0.3 ms but 1.9e-2",
    ),
    "not allowed": (
        IN_BF16 | {"min_precision": "bf16"},
        "bf16: 0.5 ms, error 3e-3 <= 1e-2 / 2; int8/bf16 would be 0.4 ms but is not allowed; "
        "int8 would be 0.3 ms but is not allowed",
    ),
    "none fits": (
        IN_BF16 | {"max_precision": "bf16", "tolerance": 1e-3},
        "bf16: 0.5 ms, error 3e-3 > 1e-3 / 2; nothing that is allowed is more exact",
    ),
    "nothing is faster": (
        {"candidate_seconds": np.array([[[2e-3] * 7 + [1e-3, 5.0]]])},
        "int8/bf16: 1 ms, error 4.1e-3 <= 1e-2 / 2; nothing is faster",
    ),
    "forced": ({"forced": True}, "int8/bf16: 0.4 ms, error 4.1e-3; forced"),
    "retried": (
        {"retried": np.array([[True]])},
        "int8/bf16: 0.4 ms, error 4.1e-3; a cheaper one was tried and failed",
    ),
    "not finite": (
        {"finite": np.array([[False]])},
        "int8/bf16: 0.4 ms, error 4.1e-3; NaN or infinities take part, which plain arithmetic passes on",
    ),
    "not looked at": (
        {"candidate_error": np.full((1, 1, 9), np.nan)},
        "int8/bf16: 0.4 ms, error 4.1e-3; nothing was looked at, since there is nothing to gain or to choose",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_explain(case: str) -> None:
    changes, reason = REASONS[case]
    header, line, *candidates = one(**changes).explain().splitlines()
    assert header.startswith("float32, B=1, H=1, G=1, T=64, S=64, D=8, E=8; tolerance ")
    assert line == f"head (0, 0): {reason}"
    if case == "within":
        names = [x.split()[0] for x in candidates]
        assert names == list(rates.RUNGS)
        assert candidates[-1].split() == ["int8", "0.3", "ms,", "error", "1.9e-2"]


def test_explain_what_was_planned(rng: np.random.Generator) -> None:
    for plan in plans(rng):
        lines = plan.explain().splitlines()
        heads = [line for line in lines if line.startswith("head ")]
        assert len(heads) == plan.retried.size
        for line, qk in zip(heads, plan.precision_qk.flat, strict=True):
            assert line.partition("): ")[2].startswith(qk)


# ---- calls within a budget


def test_heads_get_rungs_of_their_own(rng: np.random.Generator) -> None:
    arrays = problem(rng)
    for tolerance in (1e-5, 1e-3, 1e-2, 5e-2):
        out, report = adaattn.attention(*arrays, tolerance=tolerance, return_report=True)
        errors = true_errors(out, arrays)
        assert (errors <= tolerance).all()
        assert (report.verified_rows > 0).all() and (report.error_limit <= tolerance + 2**-24).all()
        few = report.precision_qk == "fp32"  # the plain rung is verified by few rows
        assert (abs(np.log(report.measured_error / errors)) < np.where(few, 1.25, 1)).all()
        if tolerance == 1e-2:
            assert len(set(zip(report.precision_qk.flat, report.precision_pv.flat, strict=True))) > 1


@pytest.mark.parametrize("tolerance", [1e-4, 1e-2, 5e-2])
@pytest.mark.parametrize("options", [{}, {"causal": True, "return_lse": True}], ids=str)
def test_a_plan_gives_the_bits_of_the_call_that_made_it(
    tolerance: float, options: dict[str, Any], rng: np.random.Generator
) -> None:
    arrays = problem(rng)
    *expected, report = adaattn.attention(*arrays, tolerance=tolerance, **options, return_report=True)
    for verify in (True, False):
        *again, other = adaattn.attention(
            *arrays, plan=report.plan, verify=verify, **options, return_report=True
        )
        once = ~other.retried  # other rows are drawn where nobody looked: they may doubt what these did not
        assert once.all() or (verify and once.any())
        assert same_bits(tuple(x[once] for x in again), tuple(x[once] for x in expected))
        assert other.plan is report.plan or not once.all()
        assert (other.precision_qk == report.precision_qk)[once].all()
    made = adaattn.plan(
        *arrays, tolerance=tolerance, return_lse="return_lse" in options, causal="causal" in options
    )
    if not report.retried.any():
        unseen = np.isnan(made.candidate_error).all(axis=-1) | (made.precision_qk == "fp32")
        # The call looked at these afterwards.
        predicted = np.where(unseen, report.plan.predicted_error, made.predicted_error)
        assert_same(replace(made, predicted_error=predicted), report.plan)


def test_a_plans_predictions_are_reported_where_nothing_was_looked_at(rng: np.random.Generator) -> None:
    arrays = problem(rng)
    plan = adaattn.plan(*arrays, tolerance=1e-2)
    _, report = adaattn.attention(*arrays, plan=plan, verify=False, return_report=True)
    assert same_bits(report.predicted_error, plan.predicted_error)
    assert report.seconds["probe"] < 1e-3 and (report.verified_rows == 0).all()


def test_a_plan_for_other_numbers_is_verified(rng: np.random.Generator) -> None:
    """Heads that the choices do not suit are computed again, and the report's plan has what was computed."""
    arrays = problem(rng)
    plan = adaattn.plan(*(0.01 * x for x in arrays), tolerance=1e-2)
    out, report = adaattn.attention(*arrays, plan=plan, return_report=True)
    assert report.retried.any() and (true_errors(out, arrays) <= 1e-2).all()
    assert (report.plan.precision_qk == report.precision_qk).all()
    assert same_bits(report.plan.retried, report.retried) and report.plan.tolerance == 1e-2
    again, other = adaattn.attention(*arrays, plan=report.plan, return_report=True)
    assert same_bits(again, out) and not other.retried.any()


@pytest.mark.parametrize(("policy", "tolerance"), [("quality", 1e-5), ("balanced", 1e-2), ("speed", 5e-2)])
def test_policies_are_names_of_tolerances(policy: str, tolerance: float, rng: np.random.Generator) -> None:
    arrays = problem(rng)
    expected, report = adaattn.attention(*arrays, tolerance=tolerance, return_report=True)
    assert same_bits(adaattn.attention(*arrays, policy=policy), expected)
    assert_same(adaattn.plan(*arrays, policy=policy), adaattn.plan(*arrays, tolerance=tolerance))
    assert report.plan.tolerance == tolerance


@pytest.mark.parametrize("T", [3, 40, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_for_any_number_of_threads(T: int, causal: bool, rng: np.random.Generator) -> None:
    arrays = problem(rng, SHAPE._replace(T=T))
    options = {"tolerance": 1e-2, "causal": causal, "return_lse": True}
    one, two = (adaattn.attention(*arrays, num_threads=n, **options, return_report=True) for n in (1, 2))
    assert same_bits(one[:2], two[:2])
    assert_same(one[2].plan, two[2].plan)
    assert same_bits(one[2].measured_error, two[2].measured_error)


@pytest.mark.parametrize("T", [3, 40, 256])
def test_a_head_alone_has_the_bits_that_it_has_among_others(T: int, rng: np.random.Generator) -> None:
    arrays = problem(rng, SHAPE._replace(T=T))
    out, report = adaattn.attention(*arrays, tolerance=1e-2, return_report=True)
    for b in range(SHAPE.B):
        alone, own = adaattn.attention(*(x[b : b + 1] for x in arrays), tolerance=1e-2, return_report=True)
        assert same_bits(alone, out[b : b + 1])
        assert same_bits(own.precision_qk, report.precision_qk[b : b + 1])


def test_a_head_without_its_group(rng: np.random.Generator) -> None:
    """With keys of its own, since those who share keys share the cost of packing."""
    arrays = problem(rng, SHAPE._replace(G=SHAPE.H))
    out = adaattn.attention(*arrays, tolerance=1e-2)
    for b, h in np.ndindex(SHAPE.B, SHAPE.H):
        head = [x[b : b + 1, h : h + 1] for x in arrays]
        assert same_bits(adaattn.attention(*head, tolerance=1e-2), out[b : b + 1, h : h + 1])


def test_other_heads_do_not_matter(rng: np.random.Generator) -> None:
    arrays = problem(rng)
    out = adaattn.attention(*arrays, tolerance=1e-2)
    arrays[0][1, 2:] = 1e30
    arrays[2][1, 1, 5] = np.nan
    assert same_bits(adaattn.attention(*arrays, tolerance=1e-2)[0], out[0])
    assert same_bits(adaattn.attention(*arrays, tolerance=1e-2)[1, :2], out[1, :2])


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("int8", 1e-3), (("int8", "bf16"), 1e-4), ("bf16", 1e-5)], ids=str
)
def test_a_precision_by_name_that_misses(precision: Any, tolerance: float, rng: np.random.Generator) -> None:
    arrays = problem(rng)
    pair = precision if isinstance(precision, tuple) else (precision, precision)
    sentence = rf"^precision: expected a relative error of at most {tolerance:g} in every head, got about "
    sentence += rf"\S+ in head \(\d, \d\) from {pair}$".replace("('", r"\('").replace("')", r"'\)")
    with pytest.raises(adaattn.NumericalError, match=sentence):
        adaattn.attention(*arrays, precision=precision, tolerance=tolerance)
    adaattn.attention(*arrays, precision=precision, tolerance=tolerance, verify=False)
    _, report = adaattn.attention(*arrays, precision=precision, tolerance=0.5, return_report=True)
    assert (report.precision_qk == pair[0]).all() and (report.precision_pv == pair[1]).all()
    assert (report.verified_rows > 0).all() and report.plan.forced


def test_the_head_that_misses_is_named(rng: np.random.Generator) -> None:
    """Only one of them does."""
    query, key, value = inputs(rng, SHAPE)
    query *= 0.01
    query[1, 3] *= 200
    with pytest.raises(adaattn.NumericalError, match=r"in head \(1, 3\) from \('int8', 'bf16'\)"):
        adaattn.attention(query, key, value, precision=("int8", "bf16"), tolerance=4e-3)


def test_without_verification(rng: np.random.Generator) -> None:
    arrays = problem(rng)
    _, report = adaattn.attention(*arrays, tolerance=1e-2, verify=False, return_report=True)
    assert np.isnan(report.measured_error).all() and np.isnan(report.error_limit).all()
    assert (report.verified_rows == 0).all() and np.isfinite(report.predicted_error).all()
    assert not report.retried.any() and report.seconds["verify"] < 1e-3


@pytest.mark.parametrize("T", [1, 2, 8, 9, 16, 63])
def test_few_queries_are_predicted(T: int, rng: np.random.Generator) -> None:
    for tolerance in (1e-6, 1e-5, 1e-3, 1e-2, 5e-2):
        arrays = problem(rng, SHAPE._replace(T=T))
        out, report = adaattn.attention(*arrays, tolerance=tolerance, return_report=True)
        assert (report.verified_rows == 0).all() and np.isnan(report.measured_error).all()
        assert (report.predicted_error <= tolerance).all()
        assert (true_errors(out, arrays) <= tolerance).all()


def test_64_queries_are_verified(rng: np.random.Generator) -> None:
    arrays = problem(rng, SHAPE._replace(T=64))
    _, report = adaattn.attention(*arrays, tolerance=1e-2, verify=True, return_report=True)
    assert (report.verified_rows > 0).all()


@pytest.mark.parametrize("tolerance", [1e-6, 1e-5, 1e-3, 1e-2, 5e-2])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_lse_is_within_the_tolerance(tolerance: float, dtype: Any, rng: np.random.Generator) -> None:
    arrays = problem(rng, dtype=dtype)
    out, lse = adaattn.attention(*arrays, tolerance=tolerance, return_lse=True)
    exact = adaattn.reference.attention(*arrays, return_lse=True)[1]
    assert lse.dtype == dtype and (true_errors(out, arrays) <= tolerance).all()
    assert (abs(lse - exact) <= np.maximum(tolerance, 2**-22 * np.maximum(1, abs(exact)))).all()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("tolerance", [1e-5, 1e-2, 5e-2])
def test_half_outputs(dtype: Any, tolerance: float, rng: np.random.Generator) -> None:
    """The rounding of the output comes on top."""
    arrays = problem(rng, dtype=dtype)
    out, report = adaattn.attention(*arrays, tolerance=tolerance, return_report=True)
    rounding = 2**-11 if dtype == F16 else 2**-8
    assert out.dtype == dtype and (true_errors(out, arrays) <= tolerance + rounding).all()
    assert not report.retried.all() and (report.verified_rows > 0).all()


@pytest.mark.parametrize("tolerance", [1e-3, 5e-2])
@pytest.mark.parametrize("T", [5, 40, 100])
def test_tensors(tolerance: float, T: int, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    arrays = problem(rng, SHAPE._replace(T=T))
    tensors = [torch.from_numpy(x) for x in arrays]
    expected = adaattn.attention(*arrays, tolerance=tolerance, return_lse=True, return_report=True)
    result = adaattn.attention(*tensors, tolerance=tolerance, return_lse=True, return_report=True)
    assert all(isinstance(x, torch.Tensor) for x in result[:2])
    assert same_bits(tuple(x.numpy() for x in result[:2]), expected[:2])
    plan = adaattn.plan(*tensors, tolerance=tolerance, return_lse=True)
    assert_same(plan, adaattn.plan(*arrays, tolerance=tolerance, return_lse=True))
    assert same_bits(adaattn.attention(*tensors, plan=plan).numpy(), expected[0])


def test_bfloat16_tensors(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x).to(torch.bfloat16) for x in problem(rng)]
    plan = adaattn.plan(*tensors, tolerance=1e-2)
    assert plan.sizes["dtype"] == "bfloat16"
    assert adaattn.attention(*tensors, plan=plan).dtype == torch.bfloat16


def test_limits_of_the_choice(rng: np.random.Generator) -> None:
    arrays = problem(rng)
    _, report = adaattn.attention(*arrays, tolerance=5e-2, min_precision="bf16x3", return_report=True)
    assert set(report.precision_qk.flat) <= {"fp32", "bf16x6", "bf16x3"}
    out, report = adaattn.attention(*arrays, tolerance=1e-5, max_precision="int16", return_report=True)
    assert set(report.precision_qk.flat) <= {"int16", "bf16", "int8"}
    assert (report.measured_error > 1e-5).all() and (true_errors(out, arrays) > 1e-5).all()


def test_nan_is_left_to_plain_arithmetic(rng: np.random.Generator) -> None:
    arrays = problem(rng)
    plain = adaattn.attention(*arrays)
    arrays[2][1, 0, 7, 3] = np.nan
    out, report = adaattn.attention(*arrays, tolerance=1e-2, return_report=True)
    assert np.isnan(out[1, :2, :, 3]).all() and np.isnan(out).sum() == 2 * SHAPE.T
    assert (report.precision_qk[1, :2] == "fp32").all() and (report.verified_rows[1, :2] == 0).all()
    assert np.isnan(report.measured_error[1, :2]).all() and (report.verified_rows[1, 2:] > 0).all()
    assert same_bits(np.delete(out[1, 0], 3, -1), np.delete(plain[1, 0], 3, -1))


def test_zeros_are_exact(rng: np.random.Generator) -> None:
    query, key, value = problem(rng)
    out, report = adaattn.attention(query, key, np.zeros_like(value), tolerance=1e-2, return_report=True)
    assert not out.any() and not report.retried.any()
    out = adaattn.attention(query, key, value, tolerance=1e-2, kv_lengths=[0, SHAPE.S])
    assert not out[0].any() and out[1].any()
