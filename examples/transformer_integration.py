"""A transformer of 4 layers, 8 heads and 256 dimensions: training steps, inference, statistics of its layers.

    python examples/transformer_integration.py
    python examples/transformer_integration.py --policy speed --steps 20

Everything is NumPy: the modules, their gradients and the optimizer. Attention keeps an error budget in
training too, and gradients are those of what was computed.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from adaattn import demo, nn

BATCH, LENGTH = 2, 512  # shorter sequences leave little to choose


def train(model: nn.Transformer, text: np.ndarray, steps: int) -> None:
    optimizer = nn.AdamW(model, lr=1e-3)
    rng = np.random.default_rng(0)
    for step in range(steps):
        start = time.perf_counter()
        rows = text[rng.integers(0, len(text) - LENGTH, BATCH)[:, None] + np.arange(LENGTH + 1)]
        loss, grad = nn.cross_entropy(model(rows[:, :-1]), rows[:, 1:])
        model.zero_grad()
        model.backward(grad)
        norm = nn.clip_grad_norm(model, 1.0)
        optimizer.step()
        ms = 1e3 * (time.perf_counter() - start)
        print(f"  step {step}: {loss / np.log(2):.2f} bits per byte, gradient {norm:.2f}, {ms:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--policy", choices=("quality", "balanced", "speed"), default="balanced")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()

    text = np.frombuffer((demo.DATA / "sample.txt").read_bytes(), np.uint8)
    model = nn.Transformer(
        256,
        num_layers=4,
        num_heads=8,
        embed_dim=256,
        policy=options.policy,
        collect_statistics=True,
        seed=0,
    )
    print(f"{model.num_parameters():,} parameters; attention: {options.policy}")

    print(f"\nTraining on {BATCH} x {LENGTH} bytes:")
    train(model, text, options.steps)
    print("\nWhat attention was computed with, by layer:")
    print(model.statistics().table())

    # The same weights with exact attention; options of attention are no part of a model's state.
    exact = nn.Transformer(256, num_layers=4, num_heads=8, embed_dim=256)
    exact.load_state_dict(model.state_dict())
    prompt = text[None, :1024]
    outputs = {}
    print(f"\nInference on {prompt.shape[1]} bytes:")
    for name, reader in (("exact", exact), (options.policy, model)):
        reader.eval()
        reader.reset_statistics()
        reader(prompt)  # once without the clock: memory is claimed
        start = time.perf_counter()
        outputs[name] = reader(prompt)
        seconds = time.perf_counter() - start
        loss, _ = nn.cross_entropy(outputs[name][:, :-1], prompt[:, 1:])
        print(f"  {name:<9} {loss / np.log(2):.4f} bits per byte, {1e3 * seconds:.0f} ms")
    exact_logits, logits = outputs["exact"], outputs[options.policy]
    difference = np.linalg.norm(logits - exact_logits) / np.linalg.norm(exact_logits)
    promised, measured = model.blocks[0].attn.tolerance, model.statistics().total.measured_error
    print(f"  logits differ by {difference:.1e};", end=" ")
    print(f"errors of heads: promised {promised:.0e}, measured {measured:.1e}")

    print("\nGenerating 24 bytes with a cache of keys and values:")
    written = model.generate(text[None, :64], 24, temperature=0.7, seed=0)[0, 64:]
    print(f"  {written.astype(np.uint8).tobytes()!r}")


if __name__ == "__main__":
    main()
