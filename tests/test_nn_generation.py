"""Generation: with a cache as without one, ragged batches as one by one, and what is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import adaattn
from adaattn import demo, nn
from adaattn.nn.generation import Sampler

FAMILIES: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned, post-norm, tied": {
        "positions": "learned",
        "norm": "layernorm",
        "norm_position": "post",
        "tied_embeddings": True,
    },
    "alibi, grouped, swiglu": {"positions": "alibi", "num_kv_heads": 1, "activation": "swiglu"},
    "no positions": {"positions": "none"},
}


def small(**options: Any) -> nn.Transformer:
    sizes = {"num_layers": 2, "num_heads": 4, "embed_dim": 16, "max_seq_len": 40, "seed": 3}
    return nn.Transformer(50, **(sizes | options))


@pytest.fixture(scope="module")
def bundled() -> nn.Transformer:
    return nn.Transformer.load(demo.DATA / "bytelm.safetensors")


@pytest.fixture(scope="module")
def sample() -> Any:
    return np.frombuffer((demo.DATA / "sample.txt").read_bytes(), np.uint8)


def agree(cached: Any, fresh: Any) -> None:
    """Logits (T, V) within 1e-5 of their size, and the same best token where the two best differ enough."""
    assert np.abs(cached - fresh).max() <= 1e-5 * max(1.0, float(np.abs(fresh).max()))
    top = np.sort(fresh, axis=-1)
    clear = top[:, -1] - top[:, -2] > 1e-3
    assert clear.any()
    np.testing.assert_array_equal(cached[clear].argmax(-1), fresh[clear].argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_and_without_a_cache(family: str, rng: np.random.Generator) -> None:
    """Token by token, and in pieces."""
    model, tokens = small(**FAMILIES[family]).eval(), rng.integers(0, 50, (3, 30))
    fresh = model(tokens)
    for sizes in ([1] * 30, [17, 1, 1, 4, 7]):
        caches = model.caches(3, 8)
        pieces = [model(part, caches) for part in np.split(tokens, np.cumsum(sizes)[:-1], axis=1)]
        for b in range(3):
            agree(np.concatenate(pieces, axis=1)[b], fresh[b])


def test_logits_of_the_bundled_model(bundled: nn.Transformer, sample: Any) -> None:
    caches = bundled.caches(1, 512)
    logits = [bundled(sample[None, :300], caches)[0]]
    logits += [bundled(sample[None, i : i + 1], caches)[0] for i in range(300, 400)]
    agree(np.concatenate(logits), bundled(sample[None, :400])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_agrees_with_reading_again(family: str, rng: np.random.Generator) -> None:
    model, tokens = small(**FAMILIES[family]).eval(), rng.integers(0, 50, (2, 5))
    generated = model.generate(tokens, 8)
    np.testing.assert_array_equal(model.generate(tokens, 8, cache=None), generated)
    for _ in range(8):
        tokens = np.concatenate([tokens, model(tokens)[:, -1:].argmax(-1)], axis=1)
    np.testing.assert_array_equal(generated, tokens)
    np.testing.assert_array_equal(model.generate(tokens, 0), tokens)


@pytest.mark.parametrize("cache", ["fp32", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_different_lengths(family: str, cache: str | None, rng: np.random.Generator) -> None:
    """As one by one, whatever the others are."""
    model = small(**FAMILIES[family])
    prompts = [rng.integers(0, 50, n) for n in (3, 11, 1, 11)]
    together = model.generate(prompts, 7, cache=cache)
    assert isinstance(together, list)
    for prompt, tokens in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(tokens, model.generate(prompt[None], 7)[0])


def test_generation_is_evaluation_and_leaves_the_mode() -> None:
    model, tokens = small(dropout=0.5), np.ones((1, 3), int)
    generated = model.generate(tokens, 9)
    assert model.training and model.blocks[0].attn.training
    np.testing.assert_array_equal(model.eval().generate(tokens, 9), generated)
    assert not model.training


@pytest.mark.parametrize(("cache", "most"), [("fp16", 3e-3), ("bf16", 3e-2), ("int8", 6e-2), ("auto", 3e-2)])
def test_narrow_caches(cache: str, most: float, bundled: nn.Transformer, sample: Any) -> None:
    """Logits stay near those of the fp32 cache; "auto" goes by its tolerance."""
    tolerance = 8e-3 if cache == "auto" else None
    caches, exact = bundled.caches(1, 256, dtype=cache, tolerance=tolerance), bundled.caches(1, 256)
    assert caches[0].dtype == {"auto": "bf16"}.get(cache, cache)
    for tokens in (sample[None, :200], *sample[None, 200:210].T[:, :, None].transpose(0, 2, 1)):
        narrow, wide = (bundled(tokens.reshape(1, -1), kept)[:, -1] for kept in (caches, exact))
    off = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
    assert 0 < off < most
    generated = bundled.generate(sample[None, :200], 4, cache=cache, cache_tolerance=tolerance)
    assert generated.shape == (1, 204)


def test_stop_tokens_and_streaming() -> None:
    model, prompts = small(), [[1, 2], [7], [30, 31, 32]]
    whole = model.generate(prompts, 12)
    stop = int(whole[1][1 + 4])  # the second sequence's fifth new token, or an earlier one that is the same
    seen: list[Any] = []
    stopped = model.generate(prompts, 12, stop_tokens=[stop], on_tokens=seen.append)
    assert len(stopped[1]) <= 6
    for prompt, tokens, full in zip(prompts, stopped, whole, strict=True):
        new, full_new = tokens[len(prompt) :], full[len(prompt) :]
        ends = np.flatnonzero(full_new == stop)
        np.testing.assert_array_equal(new, full_new[: ends[0] + 1] if ends.size else full_new)
    for b, (prompt, tokens) in enumerate(zip(prompts, stopped, strict=True)):
        streamed = [int(step[b]) for step in seen]
        count = len(tokens) - len(prompt)
        assert streamed[:count] == tokens[len(prompt) :].tolist()
        assert set(streamed[count:]) <= {-1}
    assert isinstance(model.generate(np.array([[1, 2]]), 3, stop_tokens=[99]), list)


# ---- drawing


def test_seeds_decide_what_is_drawn() -> None:
    model, prompt = small(), np.array([[1, 2, 3], [4, 5, 6]])
    draw = [model.generate(prompt, 20, 1.0, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).any()
    alone = model.generate(prompt[:1], 20, 1.0, seed=1)
    np.testing.assert_array_equal(alone[0], draw[0][0])
    same = model.generate(np.repeat(prompt[:1], 2, axis=0), 20, 1.0, seed=1)
    assert (same[0] != same[1]).any(), "sequences draw independently"


def counts(n: int, logits: Any, *options: Any) -> Any:
    sampler = Sampler(*options, seed=5)
    rows = np.broadcast_to(np.asarray(logits, np.float32), (n, len(logits)))
    return np.bincount(sampler(rows), minlength=len(logits)) / n


def test_frequencies_are_those_of_the_softmax() -> None:
    logits = np.array([0.5, -1.0, 2.0, 0.0, 1.9])
    for temperature in (1.0, 0.5, 3.0):
        p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        assert np.abs(counts(4000, logits, temperature, None, None) - p).max() < 4 * 0.5 / 4000**0.5
    for temperature in (0.0, 1e-310, 1e-3):
        assert counts(10, logits, temperature, None, None).tolist() == [0, 0, 1, 0, 0]


def test_top_k_and_top_p() -> None:
    logits = np.log([0.1, 0.05, 0.4, 0.15, 0.3])
    assert np.flatnonzero(counts(500, logits, 1.0, 2, None)).tolist() == [2, 4]
    assert np.flatnonzero(counts(500, logits, 1.0, None, 0.65)).tolist() == [2, 4]
    assert np.flatnonzero(counts(500, logits, 1.0, None, 0.75)).tolist() == [2, 3, 4]
    assert np.flatnonzero(counts(500, logits, 1.0, None, 1e-9)).tolist() == [2]
    assert np.flatnonzero(counts(500, logits, 1.0, None, 1.0)).size == 5
    kept = counts(4000, logits, 1.0, 3, 0.7)  # 0.4 and 0.3 of the 0.85 are above 0.7 of it
    assert abs(kept[2] - 4 / 7) < 0.04 and np.flatnonzero(kept).tolist() == [2, 4]
    assert counts(50, [1.0, 1.0, 1.0], 1.0, 1, None)[0] == 1, "of equal ones the first"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1}, adaattn.ArgumentError, "temperature: expected a finite number of at least 0"),
        ({"temperature": np.nan}, adaattn.ArgumentError, "temperature: expected .*, got nan"),
        ({"top_k": 0}, adaattn.ArgumentError, "top_k: expected at least 1, got 0"),
        ({"top_p": 0}, adaattn.ArgumentError, "top_p: expected a number above 0 and up to 1, got 0"),
        ({"top_k": 1.5}, adaattn.DTypeError, "top_k: expected an int, got 1.5"),
        ({"top_p": "half"}, adaattn.DTypeError, "top_p: expected a number, got 'half'"),
        ({"temperature": None}, adaattn.DTypeError, "temperature: expected a number, got None"),
        (
            {"stop_tokens": [1.5]},
            adaattn.DTypeError,
            r"stop_tokens: expected a sequence of ints, got \[1.5\]",
        ),
        ({"stop_tokens": 3}, adaattn.DTypeError, "stop_tokens: expected a sequence of ints, got 3"),
        ({"max_new_tokens": 1.5}, adaattn.DTypeError, "max_new_tokens: expected an int, got 1.5"),
        ({"max_new_tokens": -1}, adaattn.ArgumentError, "max_new_tokens: expected at least 0, got -1"),
        ({"cache": "fp8"}, adaattn.ArgumentError, "dtype: expected 'auto', .* got 'fp8'"),
        ({"prompt": np.ones((1, 2))}, adaattn.DTypeError, "prompt: expected integers, got float64"),
        ({"prompt": [[1], []]}, adaattn.ShapeError, "prompt: expected shape .*"),
        ({"prompt": np.array([[50]])}, adaattn.ArgumentError, "tokens: expected ids from 0 to 49"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        small().generate(**({"prompt": np.array([[1, 2]]), "max_new_tokens": 2} | options))


@pytest.mark.parametrize("prompt", [[1, 2], [], np.zeros((1, 0), int), np.zeros((0, 2), int)], ids=str)
def test_prompts_that_are_refused(prompt: Any) -> None:
    with pytest.raises(adaattn.ShapeError, match=r"^prompt: expected shape \(B, T\) with B, T >= 1, or seq"):
        small().generate(prompt, 1)


def test_caches_that_are_refused() -> None:
    model, tokens = small(), np.array([[1, 2, 3]])
    with pytest.raises(adaattn.ArgumentError, match=r"^cache: expected None in training, got a KVCache$"):
        model(tokens, model.caches(1, 8))
    caches = model.eval().caches(1, 8)
    model(tokens, caches, lengths=[2])
    with pytest.raises(adaattn.ArgumentError, match=r"^lengths: expected None beside a cache that holds"):
        model(tokens, caches, lengths=[2])
    assert caches[0].lengths.tolist() == [2], "nothing was appended"


def test_models_that_cannot_generate() -> None:
    with pytest.raises(adaattn.ArgumentError, match=r"^causal: expected a causal model to generate with"):
        small(causal=False).generate(np.array([[1]]), 1)
    with pytest.raises(adaattn.ArgumentError, match=r"^tokens: expected at most 40, the learned positions"):
        small(positions="learned").generate(np.array([[1]]), 41)
    broken = small()
    broken.norm.weight[3] = np.nan
    with pytest.raises(adaattn.NumericalError, match=r"^logits: expected finite numbers"):
        broken.generate(np.array([[1]]), 1)


@pytest.mark.parametrize("cache", ["fp32", "int8", None])
def test_sequences_that_stop_take_no_further_positions(cache: str | None) -> None:
    """With learned positions, of which there are 40: a batch goes as far as each of its members alone."""
    model = small(positions="learned")
    prompts = [np.arange(38) % 7, np.arange(3), np.arange(30) % 5]
    alone = [model.generate([prompt], 9 if len(prompt) < 31 else 2, cache=cache)[0] for prompt in prompts]
    stop = int(alone[0][38])
    expected = []
    for prompt, tokens in zip(prompts, alone, strict=True):
        new = tokens[len(prompt) :]
        ends = np.flatnonzero(new == stop)
        expected.append(tokens if not ends.size else tokens[: len(prompt) + ends[0] + 1])
    assert len(expected[0]) == 39, "the longest one stops at once, when one position is left"
    together = model.generate(prompts, 9, stop_tokens=[stop], cache=cache)
    for tokens, wanted in zip(together, expected, strict=True):
        assert tokens.tolist() == wanted.tolist()
