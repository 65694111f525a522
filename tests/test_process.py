"""The engine within its process: fork, threads, signals, floating point, memory, failing allocations.

Functions whose names begin with an underscore run in a fresh process, see `support.in_new_process`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
import itertools
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import (
    BF16,
    CASES,
    DTYPES,
    F32,
    F64,
    SHAPES,
    Array,
    Shape,
    float_mask,
    in_new_process,
    inputs,
    peak_memory,
    same_bits,
)

import adaattn
from adaattn import _adaattn, api, rates

CASE = Shape(2, 4, 2, 150, 200, 32, 32)
ONE_QUERY = Shape(1, 2, 1, 1, 9000, 64, 64)


def endless(T: int, S: int, dtype: Any = F32, E: int = 64) -> list[Array]:
    """Arrays of no memory to speak of that keep any machine busy."""
    one = np.ones((1, 1, 1, 1), dtype)
    return [np.broadcast_to(one, size) for size in ((1, 8, T, 64), (1, 8, S, 64), (1, 8, S, E))]


def some_calls(num_threads: int = 3) -> list[Any]:
    rng = np.random.default_rng(1)
    shapes = [CASE, ONE_QUERY, *SHAPES]
    return [
        adaattn.attention(*inputs(rng, s), return_lse=True, num_threads=num_threads, **CASES[case](rng, s))
        for s, case in itertools.product(shapes, ("plain", "all"))
    ]


# ---- fork


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("depth", [1, 2])
def test_fork_in_parent_and_child(depth: int) -> None:
    expected = some_calls()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = [pool.apply_async(fork_again, (depth - 1,)) for _ in range(4)]
        assert all(map(same_bits, some_calls(), expected))
        for result in results:
            assert all(map(same_bits, result.get(60), expected))
    assert all(map(same_bits, some_calls(), expected))


def fork_again(depth: int) -> list[Any]:
    """What a child computes; its own child, if it is to have one, must agree."""
    mine = some_calls()
    if depth:
        if (child := os.fork()) == 0:
            compare_and_exit(mine)
        assert os.waitpid(child, 0)[1] == 0
    return mine


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_while_threads_compute() -> None:
    stop, expected = threading.Event(), some_calls()

    def busy() -> None:
        while not stop.is_set():
            adaattn.attention(*inputs(np.random.default_rng(0), CASE), num_threads=2)

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(busy) for _ in range(2)]
        try:
            for _ in range(8):
                child = multiprocessing.get_context("fork").Process(target=compare_and_exit, args=(expected,))
                child.start()
                child.join(60)
                assert child.exitcode == 0
        finally:
            stop.set()
        for thread in running:
            thread.result(60)


def compare_and_exit(expected: list[Any]) -> None:
    os._exit(0 if all(map(same_bits, some_calls(), expected)) else 1)


# ---- threads


def test_many_python_threads_at_once() -> None:
    def compute(i: int) -> tuple[Array, Array]:
        rng = np.random.default_rng(i)
        shape = [CASE, ONE_QUERY, *SHAPES][i % 12]
        arrays, options = inputs(rng, shape), CASES["all" if i % 2 else "plain"](rng, shape)
        return adaattn.attention(*arrays, return_lse=True, num_threads=1 + i % 4, **options)

    expected = [compute(i) for i in range(96)]
    with ThreadPoolExecutor(16) as pool:
        assert all(map(same_bits, pool.map(compute, range(96)), expected))


def test_gil_is_released() -> None:
    """Another Python thread goes on counting during a call."""
    done = threading.Event()

    def call() -> None:
        adaattn.attention(*(x[:, :2, :6000] for x in endless(8000, 8000)), num_threads=1)
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    ticks = 0
    while not done.is_set():
        time.sleep(1e-3)
        ticks += 1
    thread.join()
    assert ticks >= 10


@pytest.mark.skipif(getattr(sys, "_is_gil_enabled", lambda: True)(), reason="needs a free-threaded Python")
def test_free_threaded_build_stays_free() -> None:
    assert not sys._is_gil_enabled()


def _default_threads() -> int:
    return adaattn.get_num_threads()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ADAATTN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"ADAATTN_NUM_THREADS": "zero", "OMP_NUM_THREADS": "4"}, 4),
    ],
    ids=str,
)
def test_number_of_threads_from_the_environment(environment: dict[str, str], expected: int) -> None:
    assert in_new_process(_default_threads, **environment) == expected


def test_number_of_threads_from_the_affinity_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADAATTN_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    cpus = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cpus)})
        assert in_new_process(_default_threads) == 1
    finally:
        os.sched_setaffinity(0, cpus)


# ---- signals


def _interrupted_after(threads: int, T: int, S: int, dtype: str) -> tuple[float, bool]:
    """Seconds that each thread computes from SIGINT to KeyboardInterrupt, and whether the engine works
    afterwards."""
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    expected = some_calls()
    arrays = endless(T, S, np.dtype(dtype))
    threading.Timer(0.5, interrupt).start()
    try:
        adaattn.attention(*arrays, num_threads=threads)
    except KeyboardInterrupt:
        seconds = (time.process_time() - sent[0]) / min(threads, len(os.sched_getaffinity(0)))
        return seconds, all(map(same_bits, some_calls(), expected))
    raise AssertionError("the call ended by itself")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("T", "S"), [(400_000, 400_000), (1, 1_000_000_000), (2_000_000, 20_000)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ctrl_c(threads: int, T: int, S: int, dtype: str) -> None:
    """By the time that it computes, as it may wait for what else runs on the machine; the best of three."""
    delay = np.inf
    for _ in range(3):
        seconds, works = in_new_process(_interrupted_after, threads, T, S, dtype)
        assert works
        delay = min(delay, seconds)
        if delay < 0.2:
            return
    raise AssertionError(f"KeyboardInterrupt came {delay:.3f} s of computing after the signal")


def _call_under_handler() -> None:
    def handler(signum: int, frame: Any) -> None:
        raise LookupError("mine")

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(LookupError, match="mine"):
        adaattn.attention(*endless(400_000, 400_000))


def test_handler_that_raises_something_else() -> None:
    in_new_process(_call_under_handler)


def test_handler_that_returns_lets_the_call_finish() -> None:
    calls: list[int] = []
    arrays = inputs(np.random.default_rng(0), Shape(1, 4, 4, 3000, 3000, 64, 64))
    expected = adaattn.attention(*arrays)
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        assert same_bits(adaattn.attention(*arrays), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls


# ---- floating-point environment

FLUSH, ROUND_UP, FLAGS, DEFAULT = 0x8040, 0x4000, 0x3F, 0x1F80

CSR_SOURCE = """
unsigned get_csr(void) { return __builtin_ia32_stmxcsr(); }
void set_csr(unsigned value) { __builtin_ia32_ldmxcsr(value); }
"""


@pytest.fixture(scope="module")
def csr(cc: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    if platform.machine() != "x86_64":
        pytest.skip("MXCSR is a register of x86")
    folder = tmp_path_factory.mktemp("csr")
    (folder / "csr.c").write_text(CSR_SOURCE)
    subprocess.run([cc, "-shared", "-fPIC", "-O2", "csr.c", "-o", "csr.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "csr.so"))
    yield library
    library.set_csr(DEFAULT)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "control", [DEFAULT, DEFAULT | FLUSH, DEFAULT | ROUND_UP, DEFAULT | FLUSH | FLAGS], ids=hex
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [CASE, ONE_QUERY], ids=str)
def test_mxcsr_stays_and_changes_nothing(
    shape: Shape, dtype: Any, control: int, threads: int, csr: ctypes.CDLL, rng: np.random.Generator
) -> None:
    arrays, options = inputs(rng, shape, dtype), CASES["all"](rng, shape)
    arrays[2] *= np.asarray(1e-6 if dtype == np.float16 else 1e-38, dtype)
    expected = adaattn.attention(*arrays, return_lse=True, num_threads=threads, **options)
    csr.set_csr(control)
    result = adaattn.attention(*arrays, return_lse=True, num_threads=threads, **options)
    after = csr.get_csr()
    csr.set_csr(DEFAULT)
    assert after & ~FLAGS == control & ~FLAGS
    assert same_bits(result, expected)


def test_mxcsr_after_an_error(csr: ctypes.CDLL) -> None:
    csr.set_csr(DEFAULT | FLUSH)
    with contextlib.suppress(adaattn.Error):
        adaattn.attention(*inputs(np.random.default_rng(0), CASE), softcap=-1.0)
    after = csr.get_csr()
    csr.set_csr(DEFAULT)
    assert after & ~FLAGS == DEFAULT | FLUSH


# ---- memory


def calls_of_all_kinds() -> list[Callable[[], Any]]:
    """Small calls through every path, and others that fail."""
    rng = np.random.default_rng(0)
    shapes = [SHAPES[1], SHAPES[2], SHAPES[5]]
    cases = [
        (inputs(rng, s, dtype), options(rng, s))
        for s in shapes
        for dtype in DTYPES
        for options in CASES.values()
    ]
    calls: list[Callable[[], Any]] = [
        lambda a=arrays, o=options: adaattn.attention(*a, return_lse=True, **o) for arrays, options in cases
    ]
    arrays = inputs(rng, SHAPES[1])
    side = adaattn.attention(*arrays, return_lse=True)
    out = np.empty_like(side[0])
    calls += [
        lambda: adaattn.merge(*side, *side),
        lambda: adaattn.attention(*arrays, out=out),
        adaattn.cpu_info,
    ]
    bad: list[dict[str, Any]] = [
        {"attn_mask": np.ones(3, bool)},
        {"attn_mask": np.full((1, 7), np.nan)},
        {"alibi_slopes": np.ones(9)},
        {"sinks": [1, 2, "x"]},
        {"kv_lengths": np.array([99, 99])},
        {"query_offset": 1.5},
        {"seed": object()},
        {"window": (1, -1)},
        {"window": 5},
        {"causal": "left"},
        {"scale": np.nan},
        {"dropout_p": 2.0},
        {"precision": "float16"},
        {"out": np.empty((1, 2))},
        {"out": arrays[0]},
        {"num_threads": 0},
        {"unknown": 1},
        {"key": arrays[1][0]},
        {"value": arrays[2].astype(F64)},
        {"query": "query"},
    ]
    named = dict(zip(("query", "key", "value"), arrays, strict=True))
    return calls + [lambda o=options: refused(**(named | o)) for options in bad]


def refused(**arguments: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        adaattn.attention(**arguments)


def _growth(rounds: int) -> tuple[int, int]:
    """Python's memory blocks and bytes of resident memory that so many rounds gain after a warm-up: the least
    of four times, as a leak shows in each, and what interpreter and allocator keep for reuse in some."""
    calls = calls_of_all_kinds()

    def measure() -> tuple[int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return sys.getallocatedblocks(), pages * resource.getpagesize()

    for call in calls[-30:] * 200:  # those that fail: CPython keeps something of a few hundred exceptions
        call()
    marks = []
    for turns in (3, *[rounds] * 4):
        for _ in range(turns):
            for call in calls:
                call()
        marks.append(measure())
    gained = [(b - a, y - x) for (a, x), (b, y) in itertools.pairwise(marks)]
    return min(blocks for blocks, _ in gained), min(size for _, size in gained)


def test_nothing_leaks() -> None:
    blocks, size = in_new_process(_growth, 3)
    assert blocks < 30 and size < 2**20


def test_references_are_given_back(rng: np.random.Generator) -> None:
    s = SHAPES[1]
    arguments: dict[str, Any] = dict(zip(("query", "key", "value"), inputs(rng, s), strict=True))
    arguments |= CASES["all"](rng, s) | {"out": np.empty((s.B, s.H, s.T, s.E), F32), "dropout_p": 0.25}
    objects = [*arguments.values(), None, True, False, F32, np.ndarray]
    bad = {
        "query": 1,
        "attn_mask": "x",
        "window": (1, -1),
        "seed": "x",
        "out": arguments["key"],
        "sinks": np.ones(77),
    }

    def calls() -> None:
        adaattn.attention(**arguments, return_lse=True)
        for name, value in bad.items():
            refused(**(arguments | {name: value}))

    def moved() -> list[int]:
        before = [sys.getrefcount(x) for x in objects]
        for _ in range(50):
            calls()
        gc.collect()
        return [abs(sys.getrefcount(x) - count) for x, count in zip(objects, before, strict=True)]

    # A reference too many or too few is one in every call; those of None and dtypes change by themselves too.
    calls()
    assert all(min(counts) < 25 for counts in zip(*(moved() for _ in range(3)), strict=True))


def _peak_beyond_output(T: int, S: int, threads: int, options: dict[str, Any]) -> int:
    """Bytes by which resident memory peaks above inputs and output; the scores alone would take 4 T S."""
    rng = np.random.default_rng(0)
    arrays = inputs(rng, Shape(1, 2, 1, T, S, 64, 64))
    adaattn.attention(*(x[:, :, :64] for x in arrays), num_threads=threads)
    out = np.zeros_like(arrays[0])

    before = peak_memory()
    adaattn.attention(*arrays, out=out, num_threads=threads, **options)
    return peak_memory() - before


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("T", "S"), [(4096, 4096), (1, 300_000), (4, 100_000)])
def test_no_buffer_of_all_scores(T: int, S: int, threads: int) -> None:
    for options in ({}, {"causal": True, "softcap": 3.0}):
        assert in_new_process(_peak_beyond_output, T, S, threads, options) < threads * 2 * 2**20


# ---- failing allocations


def attempt(call: Callable[[], Any]) -> Any:
    """What a call gives in a thread of its own, which has no memory kept from calls before."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("case", ["plain", "all", "bias float16"])
@pytest.mark.parametrize("shape", [CASE, ONE_QUERY, SHAPES[5], Shape(1, 2, 2, 3, 5000, 16, 16)], ids=str)
def test_engine_allocations_that_fail(shape: Shape, case: str, dtype: Any, rng: np.random.Generator) -> None:
    arrays, options = inputs(rng, shape, dtype), CASES[case](rng, shape)
    assert_memory_errors(lambda: adaattn.attention(*arrays, return_lse=True, **options))


def test_engine_allocations_that_fail_beyond_fp32(rng: np.random.Generator) -> None:
    """A head that is computed again in fp64 needs more memory; so do arrays that are not aligned."""
    arrays = [np.asfortranarray(1e30 * x) for x in inputs(rng, CASE)]
    assert_memory_errors(lambda: adaattn.attention(*arrays))
    shifted = [np.frombuffer(b" " + x.tobytes(), np.uint8)[1:].view(F32).reshape(x.shape) for x in arrays]
    assert_memory_errors(lambda: adaattn.attention(*shifted))


def planned(arrays: list[Array], rung: str, **structure: Any) -> Callable[[], Any]:
    """A call by a plan that has all heads on a rung, and of a structure."""
    plan = adaattn.plan(*arrays, tolerance=0.5)
    given = {"precision_qk": rung, "precision_pv": rung} | structure
    plan = replace(plan, **{name: np.full(plan.rank.shape, value) for name, value in given.items()})
    return lambda: adaattn.attention(*arrays, plan=plan, return_lse=True)


def call_on_a_cache(rng: np.random.Generator) -> Callable[[], Any]:
    """Codes are made, and one of two key heads has none that do."""
    key, value = rng.standard_normal((2, 1, 2, 2200, 16), F32)
    key[:, :, 700:720] += 2
    value[0, 1, 3, 3] = np.nan
    query = np.ones((1, 4, 1, 16), F32)

    def call() -> Any:
        cache = adaattn.KVCache(1, 2, 16)
        cache.append(key, value)
        out, report = cache.attention(query, tolerance=2e-2, return_report=True)
        return out, report.error_bound

    return call


def backward_twice(rng: np.random.Generator) -> Callable[[], Any]:
    """A key head whose gradient float does not hold is computed in double after the others."""
    arrays = inputs(rng, Shape(1, 2, 2, 150, 200, 16, 24))
    arrays[0][0, 1, 0] = np.inf
    side = adaattn.attention(*arrays, return_lse=True)
    return lambda: tuple(adaattn.attention_backward(side[0], *arrays, *side)[:3])


# What takes memory in more than one place, and in at least how many.
PATHS: dict[str, tuple[int, Callable[[np.random.Generator, list[Array]], Callable[[], Any]]]] = {
    "budget": (2, lambda rng, x: lambda: adaattn.attention(*x, tolerance=1e-2, return_lse=True)),
    "plan": (1, lambda rng, x: lambda: adaattn.plan(*x, tolerance=1e-2).predicted_error),
    "retried": (3, lambda rng, x: planned([y * np.float32(1e2) for y in x], "int8")),
    "sparse": (2, lambda rng, x: planned(x, "int8", structure="sparse", sparse_budget=1e30)),
    "low rank": (3, lambda rng, x: lambda: adaattn.attention(*x, tolerance=0.9, structure="low_rank")),
    "not of low rank": (3, lambda rng, x: planned(x, "fp32", structure="low_rank", rank=3, rank_limit=-1.0)),
    "a float mask": (
        2,
        lambda rng, x: functools.partial(adaattn.attention, *x, attn_mask=float_mask(rng, 200)),
    ),
    "merge": (
        1,
        lambda rng, x: functools.partial(adaattn.merge, *adaattn.attention(*x, return_lse=True) * 2),
    ),
    "cache": (5, lambda rng, x: call_on_a_cache(rng)),
    "backward": (1, lambda rng, x: backward_twice(rng)),
}


@pytest.mark.parametrize("path", PATHS)
def test_allocations_that_fail_on_every_path(path: str, rng: np.random.Generator) -> None:
    least, call_of = PATHS[path]
    assert assert_memory_errors(call_of(rng, inputs(rng, CASE))) >= least


def assert_memory_errors(call: Callable[[], Any]) -> int:
    """MemoryError when the first allocation fails, then the second and so on, until none is left to fail; how
    many there are."""
    expected = attempt(call)

    def failing(n: int) -> Any:
        _adaattn._alloc_fail_after(n)
        try:
            return call()
        except MemoryError:
            return None
        finally:
            _adaattn._alloc_fail_after(-1)

    for n in range(100):
        if (result := attempt(lambda n=n: failing(n))) is not None:
            assert n > 0 and same_bits(result, expected)
            return n
    raise AssertionError("allocations never end")


def test_results_too_large_for_memory() -> None:
    with pytest.raises(MemoryError):
        adaattn.attention(*endless(2**48, 16))
    with pytest.raises(MemoryError):
        adaattn.attention(*endless(2**48, 16), return_lse=True)


def engine_call(*arrays: Array, **options: Any) -> Callable[[], Any]:
    """A call without a Python frame: where allocating the frame fails, CPython itself loses the exception."""
    given = {name: p.default for name, p in inspect.signature(adaattn.attention).parameters.items()}
    given |= dict(zip(("query", "key", "value"), arrays, strict=True)) | options
    given |= {"rates": None if given["tolerance"] is None else rates.table(), "choices": given["plan"]}
    given |= {"plan_only": False, "allocate": api._allocate}
    names = inspect.signature(_adaattn.attention).parameters
    return functools.partial(_adaattn.attention, *(given[name] for name in names))


def backward_call(arrays: list[Array], side: Any, **options: Any) -> Callable[[], Any]:
    given = {name: p.default for name, p in inspect.signature(adaattn.attention_backward).parameters.items()}
    given |= dict(zip(("query", "key", "value", "out", "lse"), (*arrays, *side), strict=True)) | options
    given |= {"grad_out": side[0], "needs": ("query", "attn_mask", "sinks"), "allocate": api._allocate}
    given |= {"rates": None if given["tolerance"] is None else rates.table()}
    names = inspect.signature(_adaattn.attention_backward).parameters
    return functools.partial(_adaattn.attention_backward, *(given[name] for name in names))


def _python_allocations_that_fail(which: int) -> tuple[int, set[str]]:
    """Fail each of Python's allocations in turn; how many calls raised MemoryError, and what others did."""
    import _testcapi

    rng = np.random.default_rng(0)
    arrays, options = inputs(rng, SHAPES[1]), CASES["all"](rng, SHAPES[1])
    other = inputs(rng, SHAPES[0])
    side = adaattn.attention(*arrays, return_lse=True)
    calls = [
        engine_call(*arrays, **options, return_lse=True),
        engine_call(*arrays, window=(1, 2), sinks=[1, 2, 3, 4], kv_lengths=[3, 4]),
        functools.partial(adaattn.merge, *side, *side),
        backward_call(arrays, side, **options),
        backward_call(arrays, side, **options, tolerance=1e-2, return_report=True),
        _adaattn.cpu_info,  # adaattn.cpu_info reads a file besides, where CPython itself fails
        engine_call(*arrays, softcap=-1.0),
        engine_call(*arrays, causal="left"),
        engine_call(*arrays, seed="seed"),
        engine_call(*arrays, tolerance=1e-2, return_lse=True, return_report=True),
        engine_call(*arrays, plan=adaattn.plan(*arrays, tolerance=1e-2).choices(), tolerance=1e-2),
        engine_call(*other, plan=adaattn.plan(*arrays, tolerance=1e-2).choices(), tolerance=1e-2),
    ]
    raised, others, calm, n = 0, set(), 0, 0
    while calm < 200:  # the call makes fewer allocations than have been let pass
        n, calm = n + 1, calm + 1
        _testcapi.set_nomemory(n, n + 1)
        try:
            calls[which]()
            what = "result"
        except MemoryError:
            _testcapi.remove_mem_hooks()
            raised, calm, what = raised + 1, 0, ""
        except Exception as error:
            _testcapi.remove_mem_hooks()
            what = type(error).__name__
        _testcapi.remove_mem_hooks()
        others.add(what)
    return raised, others - {""}


OUTCOMES = ["result"] * 6 + ["ArgumentError"] * 2 + ["DTypeError"] + ["result"] * 2 + ["ArgumentError"]


@pytest.mark.parametrize(("which", "outcome"), list(enumerate(OUTCOMES)))
def test_python_allocations_that_fail(which: int, outcome: str) -> None:
    pytest.importorskip("_testcapi")
    raised, others = in_new_process(_python_allocations_that_fail, which)
    assert raised > 0 and others == {outcome}
