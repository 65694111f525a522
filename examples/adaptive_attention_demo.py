"""Policies side by side on real heads: what each costs, what it chooses head by head, and why.

    python examples/adaptive_attention_demo.py

The heads are those of the language model that comes with the package, reading Python. All errors are against
float64 over every row; times are medians of calls that take turns, planning and verification included.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import numpy as np

import adaattn
from adaattn import demo, nn

POLICIES = {"exact": None, "quality": 1e-5, "balanced": 1e-2, "speed": 5e-2}
ROUNDS = 5

Arrays = tuple[np.ndarray, ...]


def real_heads(length: int) -> list[Arrays]:
    """Query, key and value (1, H, T, D) of each layer of the bundled model."""
    model = nn.Transformer.load(demo.DATA / "bytelm.safetensors")
    text = np.frombuffer((demo.DATA / "sample.txt").read_bytes(), np.uint8)
    return demo.read(model, text[:length])[1]


def call(layer: Arrays, policy: str) -> tuple[np.ndarray, adaattn.Report]:
    tolerance = POLICIES[policy]
    return adaattn.attention(*layer, causal=True, tolerance=tolerance, return_report=True)


def time_policies(layers: list[Arrays]) -> dict[str, float]:
    """Seconds for all layers, by policy."""
    times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for _ in range(ROUNDS):
        for policy, seconds in times.items():
            start = time.perf_counter()
            for layer in layers:
                call(layer, policy)
            seconds.append(time.perf_counter() - start)
    return {policy: float(np.median(seconds)) for policy, seconds in times.items()}


def rungs(report: adaattn.Report) -> list[str]:
    """What each head was computed with, sparse ones with the share of the blocks that was kept."""
    heads = zip(report.rungs.flat, report.kept_fraction.flat, strict=True)
    return [name if kept == 1 else f"{name} {kept:.0%}" for name, kept in heads]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, default=2048, help="bytes that the model reads, up to 4737")
    length = parser.parse_args().length

    layers = real_heads(length)
    exact = [adaattn.reference.attention(*layer, causal=True) for layer in layers]
    heads = sum(layer[0].shape[1] for layer in layers)
    print(f"{heads} heads over {length:,} bytes of Python\n")

    seconds = time_policies(layers)
    chosen = {}
    print(f"{'policy':<10}{'promised':>9}{'worst head':>12}{'time':>9}{'x exact':>9}  rungs")
    for policy, tolerance in POLICIES.items():
        results = [call(layer, policy) for layer in layers]
        chosen[policy] = [report for _, report in results]
        errors = [
            np.linalg.norm(out - right, axis=(2, 3)) / np.linalg.norm(right, axis=(2, 3))
            for (out, _), right in zip(results, exact, strict=True)
        ]
        promised = "" if tolerance is None else f"{tolerance:.0e}"
        counts = Counter(name.split()[0] for report in chosen[policy] for name in rungs(report))
        told = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        speed = seconds["exact"] / seconds[policy]
        print(f"{policy:<10}{promised:>9}{np.max(errors):>12.1e}", end="")
        print(f"{1e3 * seconds[policy]:>6.0f} ms{speed:>9.2f}  {told}")

    print("\nHead by head under 'balanced', with the share of the blocks of keys that sparse heads kept:")
    for number, report in enumerate(chosen["balanced"]):
        print(f"  layer {number}: " + "  ".join(f"{name:<14}" for name in rungs(report)))

    deviation = np.concatenate([report.score_std[0] for report in chosen["balanced"]])
    print("\nWhy, for the head whose scores spread least and the one whose scores spread most:")
    for at in (int(deviation.argmin()), int(deviation.argmax())):
        layer, head = divmod(at, layers[0][0].shape[1])
        one = [array[:, head : head + 1] for array in layers[layer]]
        plan = adaattn.plan(*one, causal=True, policy="balanced", structure="dense")
        reason = plan.explain().splitlines()[1].partition(": ")[2]
        print(f"  layer {layer}, head {head} (standard deviation {deviation[at]:.1f}), dense: {reason}")


if __name__ == "__main__":
    main()
