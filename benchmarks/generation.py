"""Tokens per second of the bundled model, greedy, beside the same model in torch modules and with a cache.

Everyone takes a turn in every round; medians over the rounds, and of the ratios within a round. Reading the
prompt, up to the first token, and writing the others are timed apart. "packed": weights in 8 and 16 bits,
within the tolerance "balanced".

`python benchmarks/generation.py [--rounds N] [--prompt N] [--new N] [--threads N] [--json]`
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

THREADS = next((sys.argv[i + 1] for i, x in enumerate(sys.argv[:-1]) if x == "--threads"), "1")
for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):  # read when the libraries load
    os.environ[name] = THREADS

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch.nn import functional  # noqa: E402

import adaattn  # noqa: E402
from adaattn import nn  # noqa: E402
from adaattn.demo import DATA  # noqa: E402

MODEL = DATA / "bytelm.safetensors"


class TorchBlock(torch.nn.Module):
    """A pre-norm block with rotary positions and keys and values kept in arrays of fixed size."""

    def __init__(self, config: dict[str, Any], room: int) -> None:
        super().__init__()
        C, H = config["embed_dim"], config["num_heads"]
        self.heads, self.size = H, C // H
        self.norm1, self.norm2 = (torch.nn.RMSNorm(C, eps=config["norm_eps"]) for _ in range(2))
        self.qkv, self.out = torch.nn.Linear(C, 3 * C, bias=False), torch.nn.Linear(C, C, bias=False)
        self.up = torch.nn.Linear(C, config["ffn_dim"], bias=False)
        self.down = torch.nn.Linear(config["ffn_dim"], C, bias=False)
        self.register_buffer("key", torch.zeros(1, H, room, self.size), persistent=False)
        self.register_buffer("value", torch.zeros(1, H, room, self.size), persistent=False)

    def forward(self, x: torch.Tensor, start: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        T = x.shape[1]
        heads = self.qkv(self.norm1(x)).view(1, T, 3 * self.heads, self.size).transpose(1, 2)
        turned, value = heads[:, : 2 * self.heads], heads[:, 2 * self.heads :]
        left, right = turned.chunk(2, dim=-1)
        turned = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
        query, key = turned[:, : self.heads], turned[:, self.heads :]
        self.key[:, :, start : start + T], self.value[:, :, start : start + T] = key, value
        key, value = self.key[:, :, : start + T], self.value[:, :, : start + T]
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=T > 1)
        x = x + self.out(out.transpose(1, 2).reshape(1, T, -1))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class TorchModel(torch.nn.Module):
    """The bundled model's architecture."""

    def __init__(self, config: dict[str, Any], room: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(config["vocab_size"], config["embed_dim"])
        self.blocks = torch.nn.ModuleList(TorchBlock(config, room) for _ in range(config["num_layers"]))
        self.norm = torch.nn.RMSNorm(config["embed_dim"], eps=config["norm_eps"])
        self.head = torch.nn.Linear(config["embed_dim"], config["vocab_size"], bias=False)
        half = config["embed_dim"] // config["num_heads"] // 2
        angle = torch.outer(torch.arange(room), config["rotary_base"] ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        x, at = self.embed(tokens), slice(start, start + tokens.shape[1])
        for block in self.blocks:
            x = block(x, start, self.cos[at], self.sin[at])
        return self.head(self.norm(x[:, -1:]))

    @torch.inference_mode()
    def generate(self, prompt: NDArray[Any], new: int, on_tokens: Callable[[Any], object]) -> NDArray[Any]:
        tokens, found = torch.from_numpy(prompt.astype(np.int64)), []
        start = 0
        for _ in range(new):
            logits = self(tokens, start)
            start += tokens.shape[1]
            tokens = logits[:, -1].argmax(dim=-1, keepdim=True)
            found.append(tokens)
            on_tokens(tokens)
        return np.concatenate([prompt, torch.cat(found, dim=1).numpy()], axis=1)


def torch_model(model: nn.Transformer, room: int) -> TorchModel:
    """With the weights of ours."""
    theirs = TorchModel(model.config, room).eval()
    weights = {
        name.replace("attn.", "").replace("mlp.", ""): torch.from_numpy(x)
        for name, x in model.state_dict().items()
    }
    theirs.load_state_dict(weights)
    return theirs


def against_torch(seconds: dict[str, list[float]], name: str) -> float:
    """How many times as fast as torch, the median of the rounds."""
    return statistics.median(a / b for a, b in zip(seconds["torch"], seconds[name], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=128, help="bytes that are read first")
    parser.add_argument("--new", type=int, default=256, help="bytes that are written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    adaattn.set_num_threads(options.threads)

    model = nn.Transformer.load(MODEL)
    prompt = np.frombuffer((DATA / "sample.txt").read_bytes(), np.uint8)[None, : options.prompt]
    theirs = torch_model(model, options.prompt + options.new)
    packed = nn.Transformer.load(MODEL).pack(policy="balanced")
    new = options.new
    contestants: dict[str, Callable[[Callable[[Any], object]], Any]] = {
        "torch": lambda seen: theirs.generate(prompt, new, seen),
        "adaattn, fp32 cache": lambda seen: model.generate(prompt, new, on_tokens=seen),
        "adaattn, bf16 cache": lambda seen: model.generate(prompt, new, on_tokens=seen, cache="bf16"),
        "adaattn, int8 cache": lambda seen: model.generate(prompt, new, on_tokens=seen, cache="int8"),
        "packed, fp32 cache": lambda seen: packed.generate(prompt, new, on_tokens=seen),
        "packed, int8 cache": lambda seen: packed.generate(prompt, new, on_tokens=seen, cache="int8"),
    }
    written = {name: write(lambda tokens: None) for name, write in contestants.items()}
    same = bool((written["torch"] == written["adaattn, fp32 cache"]).all())
    reading: dict[str, list[float]] = {name: [] for name in contestants}
    writing: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(options.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times = [time.perf_counter()]
            contestants[name](lambda tokens, times=times: times.append(time.perf_counter()))
            reading[name].append(times[1] - times[0])
            writing[name].append((times[-1] - times[1]) / (new - 1))
    told = {
        name: {
            "first_token_seconds": statistics.median(reading[name]),
            "first_token_times_torch": against_torch(reading, name),
            "tokens_per_second": 1 / statistics.median(writing[name]),
            "tokens_times_torch": against_torch(writing, name),
        }
        for name in names
    }
    if options.json:
        print(json.dumps(told | {"same_tokens": same}))
    else:
        print(f"{'':<22}{'first token':>14}{'x torch':>10}{'tokens/s':>12}{'x torch':>10}")
        for name, row in told.items():
            first, *others = row.values()
            print(f"{name:<22}{1e3 * first:>11.1f} ms{others[0]:>10.2f}{others[1]:>12.0f}{others[2]:>10.2f}")
        print(f"fp32 writes the same tokens: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
