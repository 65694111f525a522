"""Forward and backward of attention against torch's: ratios within one run, errors against float64.

Torch: `scaled_dot_product_attention` on its CPU flash backend and `torch.autograd.grad`, fp32; ours:
`attention` with its lse and `attention_backward`, in fp32 and both within a tolerance. Everyone takes a turn
in every round, on equally many threads.
"""

from __future__ import annotations

import argparse
import gc
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from instruments import geometric_mean, verdict, write_json

import adaattn
from adaattn import reference
from adaattn.bench.peers import Shape
from adaattn.bench.roofline import Roofline
from adaattn.bench.timing import Runner, plural, ratio, take_turns, timer

LENGTHS = (512, 1024, 2048, 4096)
WANTED = 1.3  # times torch's rate of forward and backward together
MOST_ERROR = 2.0  # times torch's


def relative_errors(gradients: Any, exact: Any) -> list[float]:
    return [
        float(np.linalg.norm(np.asarray(g, np.float64) - e) / np.linalg.norm(e))
        for g, e in zip(gradients, exact, strict=True)
    ]


def measure(
    shape: Shape, threads: int, rounds: int, tolerance: float, roofline: Roofline | None
) -> dict[str, Any]:
    """Times of forward, backward and both, of us in fp32 and within a tolerance, and of torch."""
    rng = np.random.default_rng(shape.keys)
    size = (4, shape.batch, shape.heads, shape.keys, shape.head_size)
    arrays = rng.standard_normal(size, dtype=np.float32)
    grad, q, k, v = arrays
    tensors = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    grad_tensor = torch.tensor(grad)
    torch.set_num_threads(threads)
    kept: dict[str, Any] = {}

    options: dict[str, Any] = {"causal": shape.causal, "num_threads": threads}

    def ours_forward(name: str = "ours", **budget: Any) -> Any:
        kept[name] = adaattn.attention(q, k, v, return_lse=True, **options, **budget)

    def ours_backward(name: str = "ours", **budget: Any) -> Any:
        return adaattn.attention_backward(grad, q, k, v, *kept[name], **options, **budget)

    def budget_forward() -> Any:
        ours_forward("budget", tolerance=tolerance)

    def budget_backward(**told: Any) -> Any:
        return ours_backward("budget", tolerance=tolerance, **told)

    def torch_forward() -> Any:
        kept["torch"] = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=shape.causal)

    def torch_backward() -> Any:
        return torch.autograd.grad(kept["torch"], tensors, grad_tensor, retain_graph=True)

    calls = {
        "ours forward": ours_forward, "ours backward": ours_backward,
        "budget forward": budget_forward, "budget backward": budget_backward,
        "torch forward": torch_forward, "torch backward": torch_backward,
    }  # fmt: skip
    found: dict[str, Runner] = {}
    for name, call in calls.items():
        call()  # the backward ones need what the forward ones keep
        found[name] = Runner(name, timer(call), threads)
        found[name].calibrate(0.03)
    if roofline:
        seconds = roofline.compute_seconds
        found["FMA peak"] = Runner(
            "FMA peak", lambda _: seconds("FMA peak", shape.flops, threads, 0.03), threads
        )
    take_turns(list(found.values()), rounds)

    ours, budget, theirs = (
        np.add(found[f"{name} forward"].samples, found[f"{name} backward"].samples)
        for name in ("ours", "budget", "torch")
    )
    row: dict[str, Any] = {"shape": str(shape), "causal": shape.causal, "threads": threads}
    row["gflops"] = {
        name: (2.5 if "backward" in name else 1) * shape.flops / one.seconds / 1e9
        for name, one in found.items()
        if one.name in calls
    }
    row["forward"] = ratio(found["torch forward"], found["ours forward"])[1]
    row["backward"] = ratio(found["torch backward"], found["ours backward"])[1]
    row["both"] = float(np.median(theirs / ours))
    row["budget"] = {
        "tolerance": tolerance,
        "backward": ratio(found["ours backward"], found["budget backward"])[1],  # times ours in fp32
        "both": float(np.median(theirs / budget)),
    }
    if roofline:
        row["share_of_peak"] = 2.5 * ratio(found["FMA peak"], found["ours backward"])[1]
    one = (slice(None), slice(0, 1))
    exact = reference.attention_backward(grad[one], q[one], k[one], v[one], causal=shape.causal)[:3]
    errors = [
        relative_errors(
            (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)[one] for x in gradients), exact
        )
        for gradients in (ours_backward()[:3], torch_backward())
    ]
    row["errors"] = dict(zip(("ours", "torch"), errors, strict=True))
    gradients, report = budget_backward(return_report=True)
    row["errors"]["budget"] = relative_errors((x[one] for x in gradients[:3]), exact)
    row["budget"]["rungs"] = sorted(set(report.precision_scores.flat))
    row["budget"]["retried"] = int(report.retried.sum())
    row["error_ratio"] = max(x / y for x, y in zip(*errors, strict=True))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="S")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--causal", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    try:
        roofline: Roofline | None = Roofline()
    except OSError as why:
        roofline = None
        print(f"left out: FMA peak ({why})")
    rows = []
    gc.disable()
    print(
        f"{'':26}{'GFLOP/s, forward / backward':^34}{'times torch':^32}{'of the':>8}{'error':>9}"
        f"{f'within {args.tolerance:g}':^30}"
    )
    print(
        f"{'shape':26}{'ours':^17}{'torch':^17}{'forward':>10}{'backward':>11}{'both':>11}{'peak':>8}{'ratio':>9}"
        f"{'times fp32':>12}{'both':>8}{'error':>10}"
    )
    for threads in args.threads:
        for causal in map(bool, args.causal):
            for length in args.lengths:
                shape = Shape(1, args.heads, length, length, 64, causal=causal)
                row = measure(shape, threads, args.rounds, args.tolerance, roofline)
                rows.append(row)
                rates = row["gflops"]
                share = row.get("share_of_peak", math.nan)
                print(
                    f"{f'S={length}' + ' causal' * causal + ', ' + plural(threads):26}"
                    f"{rates['ours forward']:8.0f} /{rates['ours backward']:4.0f}   "
                    f"{rates['torch forward']:8.0f} /{rates['torch backward']:4.0f}   "
                    f"{row['forward']:10.2f}{row['backward']:11.2f}{row['both']:11.2f}{share:8.0%}"
                    f"{row['error_ratio']:9.2f}{row['budget']['backward']:12.2f}{row['budget']['both']:8.2f}"
                    f"{max(row['errors']['budget']):10.1e}",
                    flush=True,
                )
                gc.collect()
    least, error = min(row["both"] for row in rows), max(row["error_ratio"] for row in rows)
    mean = geometric_mean(row["both"] for row in rows)
    budget = min(row["budget"]["both"] for row in rows)
    print(f"both within {args.tolerance:g}, at least: {budget:.2f} x torch in fp32")
    print(f"both, at least: {least:.2f} x torch (wanted {WANTED}): {verdict(least, WANTED)}; mean {mean:.2f}")
    print(f"error, at most: {error:.2f} x torch's (wanted 2): {verdict(error, MOST_ERROR, most=True)}")
    if args.json:
        write_json(args.json, rows=rows)


if __name__ == "__main__":
    main()
