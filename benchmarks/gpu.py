"""The CUDA backend on this machine's GPU: every kernel against float64, the tests, then times beside torch's.

    python benchmarks/gpu.py FOLDER [--quick] [--no-tests] [--sanitize]

Times are of events on one stream, contenders taking turns, medians; inputs are normal: zeros run faster.
The backend is built where it is missing. FOLDER gets gpu.json and the tests' log; a short table comes last.
Needs torch with CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import adaattn
from adaattn.bench.heads import many, topics, walk

ROOT = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PREFILL = ("ours", "flash", "cudnn", "efficient", "fp16", "bf16", "int8", "int8/fp8", "fp8")
Run = Callable[[], Any]


# ---- errors


def exact(query: Any, key: Any, value: Any, causal: bool) -> Any:
    """In float64 on the GPU, 512 rows at a time."""
    q, k, v = (x.double() for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    T, S = q.shape[2], k.shape[2]
    parts = []
    for i in range(0, T, 512):
        scores = q[:, :, i : i + 512] @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if causal:
            rows = torch.arange(i, min(i + 512, T), device="cuda")[:, None] + S - T
            scores.masked_fill_(torch.arange(S, device="cuda") > rows, -torch.inf)
        parts.append(scores.softmax(-1) @ v)
    return torch.cat(parts, 2)


def relative(out: Any, right: Any) -> float:
    return float(((out.double() - right).norm(dim=(2, 3)) / right.norm(dim=(2, 3))).max())


RUNGS: dict[str, str | tuple[str, str]] = {
    "auto": "auto",
    "fp64": "fp64",
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8/bf16": ("int8", "bf16"),
    "int8/fp16": ("int8", "fp16"),
    "int8/fp8": ("int8", "fp8"),
    "fp8": "fp8",
}


def errors(quick: bool) -> list[dict[str, Any]]:
    """Relative error of every rung on every dtype and some shapes, beside torch's own in that dtype."""
    shapes = [(2048, 2048, 64), (1024, 2048, 128), (1, 16384, 128), (300, 333, 80), (130, 500, 256)]
    rows = []
    for T, S, D in shapes[:2] if quick else shapes:
        for name, dtype in DTYPES.items():
            torch.manual_seed(0)
            arrays = [torch.randn(2, h, n, D, device="cuda").to(dtype) for h, n in ((4, T), (2, S), (2, S))]
            for causal in (False, True):
                right = exact(*arrays, causal)
                row: dict[str, Any] = {"dtype": name, "T": T, "S": S, "D": D, "causal": causal}
                for rung, precision in RUNGS.items():
                    try:
                        out = adaattn.attention(*arrays, causal=causal, precision=precision)
                        row[rung] = relative(out, right)
                    except adaattn.ArgumentError:
                        continue  # no kernel for this dtype
                    except adaattn.Error as error:
                        row[rung] = str(error)
                bias = torch.ones(T, S, dtype=torch.bool, device="cuda").tril(S - T) if causal else None
                row["torch"] = relative(scaled_dot_product_attention(*arrays, bias, enable_gqa=True), right)
                rows.append(row)
    return rows


# ---- times


def race(contenders: dict[str, Run], seconds: float = 0.25) -> dict[str, float]:
    """Median milliseconds of each, in turns, for about so long each; those that do not run are left out."""
    found: dict[str, Run] = {}
    for name, run in contenders.items():
        try:
            for _ in range(2):
                run()
            torch.cuda.synchronize()
            found[name] = run
        except (RuntimeError, adaattn.Error) as error:
            print(f"  {name}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in found}
    start = time.perf_counter()
    while found and (time.perf_counter() - start < seconds * len(found) or len(times[next(iter(found))]) < 3):
        for name, run in found.items():
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            for _ in range(4):
                run()
            after.record()
            torch.cuda.synchronize()
            times[name].append(before.elapsed_time(after) / 4)
    return {name: statistics.median(samples) for name, samples in times.items()}


def torch_run(backend: SDPBackend, arrays: list[Any], **options: Any) -> Run:
    def run() -> Any:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*arrays, **options)

    return run


def prefill(quick: bool) -> list[dict[str, Any]]:
    """16k tokens and 2048 channels in all, as papers have it."""
    rows = []
    for name, dtype in DTYPES.items():
        for D in (128,) if quick else (64, 128):
            for S in (4096,) if quick else (4096, 16384):
                for causal in (False, True):
                    B, H = 16384 // S, 2048 // D // (4 if name == "fp32" else 1)
                    arrays = [torch.randn(B, H, S, D, device="cuda").to(dtype) for _ in range(3)]
                    out = torch.empty_like(arrays[0])
                    rungs: dict[str, Any] = {"ours": "auto"}
                    rungs |= {"fp16": "fp16", "bf16": "bf16"} if name == "fp32" else {}
                    rungs |= {"int8": ("int8", "fp16" if name == "fp16" else "bf16")}
                    if "fp8" in adaattn.gpu_info()["devices"][0]["rungs"]:
                        rungs |= {"int8/fp8": ("int8", "fp8"), "fp8": "fp8"}
                    contenders: dict[str, Run] = {
                        label: lambda a=arrays, o=out, c=causal, r=rung: adaattn.attention(
                            *a, causal=c, precision=r, out=o, verify=False
                        )
                        for label, rung in rungs.items()
                    }
                    contenders |= {
                        label: torch_run(backend, arrays, is_causal=causal)
                        for label, backend in BACKENDS.items()
                        if name != "fp32" or label == "efficient"
                    }
                    work = 4e-9 * B * H * S * S * D / (2 if causal else 1)
                    times = race(contenders)
                    row: dict[str, Any] = {"dtype": name, "B": B, "H": H, "S": S, "D": D, "causal": causal}
                    rows.append(row | {"tflops": {label: work / ms for label, ms in times.items()}})
    return rows


def decode(quick: bool) -> list[dict[str, Any]]:
    """One query per sequence and head; the bandwidth of its keys and values beside that of a copy."""
    rows = []
    for B, H, G, S in [(8, 32, 8, 16384), (1, 32, 8, 65536), (64, 32, 8, 2048)][: 1 if quick else 3]:
        D, dtype = 128, torch.bfloat16
        query = torch.randn(B, H, 1, D, device="cuda").to(dtype)
        key, value = (torch.randn(B, G, S, D, device="cuda").to(dtype) for _ in range(2))
        arrays, to, out = [query, key, value], torch.empty_like(key), torch.empty_like(query)
        gigabytes = 2e-9 * key.nbytes
        contenders: dict[str, Run] = {
            "ours": lambda a=arrays, o=out: adaattn.attention(*a, out=o, verify=False),
            "copy": lambda t=to, k=key: t.copy_(k),
        }
        contenders |= {
            label: torch_run(BACKENDS[label], arrays, enable_gqa=True) for label in ("flash", "cudnn")
        }
        times = race(contenders)
        row: dict[str, Any] = {"dtype": "bf16", "B": B, "H": H, "G": G, "S": S, "D": D}
        rows.append(row | {"gb_per_s": {label: 1e3 * gigabytes / ms for label, ms in times.items()}})
    return rows


def training(quick: bool) -> list[dict[str, Any]]:
    """The backward pass alone, and forward and backward, 16k tokens and 2048 channels; 5 products are counted
    for the first and 7 for both, whatever is computed. within: policy="balanced", verified."""
    from adaattn.integrations.torch import scaled_dot_product_attention as ours

    rows = []
    for name, dtype in DTYPES.items():
        for D in (128,) if quick else (64, 128):
            for causal in (False, True):
                S = 4096
                B, H = 16384 // S, 2048 // D // (4 if name == "fp32" else 1)
                leaves = [torch.randn(B, H, S, D, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
                grad = torch.randn(B, H, S, D, device="cuda").to(dtype)
                functions: dict[str, Any] = {
                    "ours": lambda a=leaves, c=causal: ours(*a, is_causal=c),
                    "within": lambda a=leaves, c=causal: ours(*a, is_causal=c, policy="balanced"),
                }
                functions |= {
                    label: torch_run(backend, leaves, is_causal=causal)
                    for label, backend in BACKENDS.items()
                    if name != "fp32" or label == "efficient"
                }
                contenders: dict[str, Run] = {}
                for label, f in functions.items():
                    try:
                        out = f()
                    except (RuntimeError, adaattn.Error):
                        continue  # it will be told of below
                    contenders[f"{label} backward"] = lambda o=out, a=leaves, g=grad: torch.autograd.grad(
                        o, a, g, retain_graph=True
                    )
                    contenders[f"{label} both"] = lambda f=f, a=leaves, g=grad: torch.autograd.grad(f(), a, g)
                times = race(contenders, 0.15)
                work = 2e-9 * B * H * S * S * D / (2 if causal else 1)
                row: dict[str, Any] = {"dtype": name, "B": B, "H": H, "S": S, "D": D, "causal": causal}
                counts = {label: 5 if label.endswith("backward") else 7 for label in times}
                rows.append(row | {"tflops": {x: counts[x] * work / ms for x, ms in times.items()}})
    return rows


def generation(quick: bool) -> list[dict[str, Any]]:
    """One query per sequence on fp32 arrays, and on caches: the bandwidth of what is kept beside a copy's."""
    rows = []
    for B, H, G, S in [(8, 8, 8, 8192), (8, 32, 8, 8192)][: 1 if quick else 2]:
        D = 128
        query = torch.randn(B, H, 1, D, device="cuda")
        key, value = (torch.randn(B, G, S, D, device="cuda") for _ in range(2))
        to = torch.empty_like(key)
        contenders: dict[str, Run] = {
            "arrays": lambda q=query, k=key, v=value: adaattn.attention(q, k, v, verify=False),
            "copy": lambda t=to, k=key: t.copy_(k),
        }
        for dtype in ("fp32", "bf16", "int8"):
            cache = adaattn.KVCache(B, G, D, dtype=dtype, capacity=S, device="cuda")
            cache.append(key, value)
            contenders[dtype] = lambda c=cache, q=query: c.attention(q, verify=False)
        bytes_of = {"bf16": 2, "int8": 1}
        row: dict[str, Any] = {"B": B, "H": H, "G": G, "S": S, "D": D}
        rates = {
            label: bytes_of.get(label, 4) * 2e-6 * key.numel() / ms for label, ms in race(contenders).items()
        }
        rows.append(row | {"gb_per_s": rates})
    return rows


def budget(quick: bool) -> list[dict[str, Any]]:
    """Calls within a tolerance: the error that is promised and kept, and the time beside the plain call's."""
    rows = []
    for name, dtype in DTYPES.items():
        arrays = [
            torch.randn(1, 16, 4096 if quick else 16384, 128, device="cuda").to(dtype) for _ in range(3)
        ]
        for tolerance in (1e-5, 1e-3, 1e-2, 5e-2):
            try:
                for _ in range(3):  # the first call opens, loads and allocates
                    out, report = adaattn.attention(*arrays, tolerance=tolerance, return_report=True)
                contenders: dict[str, Run] = {
                    "plain": lambda a=arrays: adaattn.attention(*a, verify=False),
                    "within": lambda a=arrays, t=tolerance: adaattn.attention(*a, tolerance=t),
                    "planned": lambda a=arrays, p=report.plan: adaattn.attention(*a, plan=p, verify=False),
                }
                times = race(contenders, 0.1)
            except adaattn.Error as error:
                print(f"  budget {tolerance}: {error}", file=sys.stderr)
                continue
            right = exact(*(x[:, :2] for x in arrays), False)
            rows.append(
                {
                    "dtype": name,
                    "S": arrays[0].shape[2],
                    "tolerance": tolerance,
                    "rungs": sorted(
                        set(zip(report.precision_qk.flat, report.precision_pv.flat, strict=True))
                    ),
                    "error": relative(out[:, :2], right),
                    "measured": float(report.measured_error.max()),
                    "ms": times,
                    "phases_ms": {phase: 1e3 * seconds for phase, seconds in report.seconds.items()},
                }
            )
    return rows


def linear(quick: bool) -> list[dict[str, Any]]:
    """Products of a matrix with a weight, exact and within tolerances, beside torch's."""
    rows = []
    for name, dtype in list(DTYPES.items())[:: 2 if quick else 1]:
        for M in (16, 8192):
            x, weight = (torch.randn(n, 4096, device="cuda").to(dtype) for n in (M, 4096))
            contenders: dict[str, Run] = {
                "torch": lambda a=x, b=weight: torch.nn.functional.linear(a, b),
                "ours": lambda a=x, b=weight: adaattn.linear(a, b),
            }
            row: dict[str, Any] = {"dtype": name, "M": M, "error": {}}
            right = x[:256].double() @ weight.double().T
            for tolerance in (1e-3, 1e-2, 5e-2):
                y, report = adaattn.linear(x, weight, tolerance=tolerance, return_report=True)
                label = f"{tolerance:.0e} {report.precision.flat[0]}"
                row["error"][label] = float((y[:256].double() - right).norm() / right.norm())
                contenders[label] = lambda a=x, b=weight, t=tolerance: adaattn.linear(a, b, tolerance=t)
            times = race(contenders, 0.1)
            work = 2e-9 * M * 4096 * 4096
            rows.append(row | {"tflops": {label: work / ms for label, ms in times.items()}})
    return rows


def sparse(quick: bool) -> list[dict[str, Any]]:
    """Heads that are built sparse, causal: all blocks of keys against those that count."""
    rows = []
    asked = {"causal": True, "tolerance": 1e-2}
    heads = many(lambda seed: topics(4096 if quick else 16384, seed=seed), 1, 16)
    for name in ("bf16", "fp32"):
        arrays = [torch.from_numpy(x).cuda().to(DTYPES[name]) for x in (heads.query, heads.key, heads.value)]
        plans = {kind: adaattn.plan(*arrays, structure=kind, **asked) for kind in ("dense", "sparse", "auto")}
        out, report = adaattn.attention(*arrays, plan=plans["sparse"], causal=True, return_report=True)
        contenders: dict[str, Run] = {
            kind: lambda a=arrays, p=plan: adaattn.attention(*a, causal=True, plan=p, verify=False)
            for kind, plan in plans.items()
            if kind != "auto"
        }
        contenders["within"] = lambda a=arrays: adaattn.attention(*a, **asked)
        contenders["within, dense"] = lambda a=arrays: adaattn.attention(*a, structure="dense", **asked)
        rows.append(
            {
                "dtype": name,
                "S": arrays[0].shape[2],
                "kept": float(report.kept_fraction.mean()),
                "dense": int((report.structure == "dense").sum()),
                "chosen": int((plans["auto"].structure == "sparse").sum()),
                "error": relative(out[:, :2], exact(*(x[:, :2] for x in arrays), True)),
                "ms": race(contenders, 0.1),
            }
        )
    return rows


def low_rank(quick: bool) -> list[dict[str, Any]]:
    """Heads whose keys follow a walk: all keys against landmarks."""
    rows = []
    for S in (4096,) if quick else (16384, 65536):
        heads = many(lambda seed, S=S: walk(S, 128, seed=seed), 1, 8)
        for name in ("bf16", "fp32"):
            arrays = [
                torch.from_numpy(x).cuda().to(DTYPES[name]) for x in (heads.query, heads.key, heads.value)
            ]
            plans = {
                kind: adaattn.plan(*arrays, structure=kind, tolerance=1e-2)
                for kind in ("dense", "low_rank", "auto")
            }
            out, report = adaattn.attention(*arrays, plan=plans["low_rank"], return_report=True)
            contenders: dict[str, Run] = {
                kind: lambda a=arrays, p=plan: adaattn.attention(*a, plan=p, verify=False)
                for kind, plan in plans.items()
                if kind != "auto"
            }
            contenders["within"] = lambda a=arrays: adaattn.attention(*a, tolerance=1e-2)
            contenders["within, dense"] = lambda a=arrays: adaattn.attention(
                *a, structure="dense", tolerance=1e-2
            )
            rows.append(
                {
                    "dtype": name,
                    "S": S,
                    "rank": float(report.rank.mean()),
                    "chosen": int((plans["auto"].structure == "low_rank").sum()),
                    "error": relative(out[:, :1], exact(*(x[:, :1] for x in arrays), False)),
                    "ms": race(contenders, 0.1),
                }
            )
    return rows


def overhead() -> dict[str, float]:
    """Microseconds of the host per call of a small problem, the GPU keeping up."""
    x = torch.randn(1, 1, 16, 64, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    found = {}
    for name, run in {
        "ours": lambda: adaattn.attention(x, x, x),
        "into out": lambda: adaattn.attention(x, x, x, out=out),
        "torch": lambda: scaled_dot_product_attention(x, x, x),
    }.items():
        for _ in range(20):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(300):
            run()
        torch.cuda.synchronize()
        found[name] = (time.perf_counter() - start) / 300 * 1e6
    return found


# ---- the rest


def run_tests(folder: Path, sanitize: bool) -> str:
    """The closing line of the GPU's tests; with compute-sanitizer, those of shapes alone."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "--maxfail=60", "--durations=5"]
    command += ["--tb=short", "tests/test_gpu.py"]
    name = "tests.log"
    if sanitize:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        command = [tool, "--error-exitcode", "9", *command, "-k", "test_shapes"]
        name = "sanitizer.log"
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        text = str(error.stdout or "") + "\nout of time"
    except OSError as error:
        text = str(error)
    (folder / name).write_text(text)
    return text.strip().splitlines()[-1]


def build() -> None:
    """The backend for this chip, beside the package, where there is none."""
    major, minor = torch.cuda.get_device_capability()
    chip = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
    command = [sys.executable, str(ROOT / "cuda/build.py"), str(Path(adaattn.__file__).parent)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"ADAATTN_CUDA_ARCH": chip}, check=True)


def short(x: Any) -> str:
    return f"{x:.1e}" if isinstance(x, float) else "-" if x is None else "error"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, no tests")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--sanitize", action="store_true", help="run kernels under compute-sanitizer as well")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if adaattn.gpu_info()["backend"] is None:
        build()
    result: dict[str, Any] = {"gpu": adaattn.gpu_info(), "torch": torch.__version__, "date": time.ctime()}
    if not result["gpu"]["available"]:
        raise SystemExit(f"no GPU: {result['gpu']['reason']}")

    def step(name: str, work: Callable[[], Any]) -> Any:
        print(f"{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            result[name] = work()
        except Exception as error:  # what was measured so far is kept
            result[name] = None
            print(f"  {type(error).__name__}: {error}", file=sys.stderr)
        result.setdefault("seconds", {})[name] = time.perf_counter() - start
        (folder / "gpu.json").write_text(json.dumps(result, indent=1))
        return result[name]

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    step("errors", lambda: errors(arguments.quick))
    step("prefill", lambda: prefill(arguments.quick))
    step("decode", lambda: decode(arguments.quick))
    step("linear", lambda: linear(arguments.quick))
    step("training", lambda: training(arguments.quick))
    step("generation", lambda: generation(arguments.quick))
    step("overhead", overhead)
    step("budget", lambda: budget(arguments.quick))
    step("sparse", lambda: sparse(arguments.quick))
    step("low rank", lambda: low_rank(arguments.quick))
    if not (arguments.quick or arguments.no_tests):
        step("tests", lambda: run_tests(folder, False))
    if arguments.sanitize:
        step("sanitizer", lambda: run_tests(folder, True))
    print_tables(result)


def print_tables(result: dict[str, Any]) -> None:
    device = result["gpu"]["devices"][0]
    print(f"\n{device['name']} ({device['capability']}), torch {result['torch']}")
    print(
        "\nrelative errors\ndtype     T     S    D causal " + "".join(f"{r:>10}" for r in (*RUNGS, "torch"))
    )
    for r in result["errors"] or []:
        cells = "".join(f"{short(r.get(rung)):>10}" for rung in (*RUNGS, "torch"))
        print(f"{r['dtype']:5} {r['T']:5} {r['S']:5} {r['D']:4} {r['causal']!s:6} {cells}")
    print(
        "\nTFLOP/s\ndtype     S    D causal  ours flash cudnn effic.  fp16  bf16  int8 i8/f8   fp8"
        "  ours/flash ours/cudnn"
    )
    for r in result["prefill"] or []:
        t = r["tflops"]
        cells = "".join(f"{t.get(x, 0):6.0f}" for x in PREFILL)
        ratios = [t["ours"] / t[x] if "ours" in t and x in t else float("nan") for x in ("flash", "cudnn")]
        if "flash" not in t and "efficient" in t and "ours" in t:
            ratios[0] = t["ours"] / t["efficient"]
        print(f"{r['dtype']:5} {r['S']:6} {r['D']:4} {r['causal']!s:6}{cells}  ", end="")
        print(f" {ratios[0]:8.2f} {ratios[1]:8.2f}")
    print("\ndecode, GB/s\n  B   H  G     S    ours    copy   flash   cudnn   ours/copy")
    for r in result["decode"] or []:
        g = r["gb_per_s"]
        cells = "".join(f"{g.get(x, 0):8.0f}" for x in ("ours", "copy", "flash", "cudnn"))
        print(f"{r['B']:3} {r['H']:3} {r['G']:2} {r['S']:6}{cells}   {g.get('ours', 0) / g['copy']:8.2f}")
    print("\nlinear, 4096 x 4096, TFLOP/s (error)")
    for r in result["linear"] or []:
        cells = (
            f"{label} {x:.0f}" + (f" ({r['error'][label]:.0e})" if label in r["error"] else "")
            for label, x in r["tflops"].items()
        )
        print(f"{r['dtype']:5} M = {r['M']:5}: " + ", ".join(cells))
    print(
        "\ntraining, TFLOP/s (backward / both)\n"
        "dtype     S    D causal       ours     within      flash      cudnn  efficient"
    )
    for r in result["training"] or []:
        t = r["tflops"]
        cells = "".join(
            f"{t.get(f'{x} backward', 0):6.0f}/{t.get(f'{x} both', 0):4.0f}"
            for x in ("ours", "within", "flash", "cudnn", "efficient")
        )
        print(f"{r['dtype']:5} {r['S']:6} {r['D']:4} {r['causal']!s:6}{cells}")
    print(
        "\nfp32 arrays and caches, one query, GB/s\n  B   H  G     S  arrays    fp32    bf16    int8    copy"
    )
    for r in result["generation"] or []:
        cells = "".join(f"{r['gb_per_s'].get(x, 0):8.0f}" for x in ("arrays", "fp32", "bf16", "int8", "copy"))
        print(f"{r['B']:3} {r['H']:3} {r['G']:2} {r['S']:6}{cells}")
    print("\nbudget, ms\ndtype  tolerance     error  measured   plain  within planned   probe verify   rungs")
    for r in result["budget"] or []:
        times = " ".join(f"{r['ms'].get(x, 0):7.2f}" for x in ("plain", "within", "planned"))
        times += "".join(f"{r['phases_ms'][x]:8.2f}" for x in ("probe", "verify"))
        rungs = ", ".join(sorted("/".join(pair) for pair in r["rungs"]))
        print(f"{r['dtype']:5} {r['tolerance']:10.0e} {r['error']:9.1e} {r['measured']:9.1e}", end="")
        print(f" {times}      {rungs}")
    print("\nbuilt sparse, ms\ndtype      S  kept  chosen     error    dense   sparse   within  (dense)")
    for r in result["sparse"] or []:
        times = "".join(f"{r['ms'].get(x, 0):9.2f}" for x in ("dense", "sparse", "within", "within, dense"))
        print(f"{r['dtype']:5} {r['S']:6} {r['kept']:5.2f} {r['chosen']:7} {r['error']:9.1e}{times}")
    print("\nbuilt low rank, ms\ndtype      S  rank  chosen     error    dense low rank   within  (dense)")
    for r in result["low rank"] or []:
        times = "".join(f"{r['ms'].get(x, 0):9.2f}" for x in ("dense", "low_rank", "within", "within, dense"))
        print(f"{r['dtype']:5} {r['S']:6} {r['rank']:5.0f} {r['chosen']:7} {r['error']:9.1e}{times}")
    print(f"\nhost, µs per call: {result['overhead']}")
    print(f"seconds: { {name: round(x, 1) for name, x in result['seconds'].items()} }")
    print(f"tests: {result.get('tests')}; sanitizer: {result.get('sanitizer')}")


if __name__ == "__main__":
    main()
