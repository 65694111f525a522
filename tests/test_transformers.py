"""Hugging Face transformers: whole models against their eager attention, masks against sdpa's, statistics.

Models are made from configurations, or of weights of an installed package; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import adaattn

torch = pytest.importorskip("torch")
os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", "5.24")

from transformers import masking_utils  # noqa: E402

from adaattn.integrations import transformers as integration  # noqa: E402

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPS = {"num_key_value_heads": 2, "head_dim": 16}
SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "eos_token_id": None,
}

#: Name of a family to what it shows, its configuration and class; every one differs from the plain case.
MODELS: dict[str, tuple[str, Any, Any]] = {
    "llama": ("groups", lambda: transformers.LlamaConfig(**SIZES, **GROUPS), "LlamaForCausalLM"),
    "gemma2": (
        "softcap and windows",
        lambda: transformers.Gemma2Config(
            **SIZES, **GROUPS, sliding_window=8, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
        ),
        "Gemma2ForCausalLM",
    ),
    "gpt-oss": (
        "sinks and windows",
        lambda: transformers.GptOssConfig(
            **SIZES, **GROUPS, sliding_window=8, num_local_experts=4, num_experts_per_tok=2
        ),
        "GptOssForCausalLM",
    ),
    "llama4": (
        "chunks, which are no pattern of ours",
        lambda: transformers.Llama4TextConfig(
            **SIZES, **GROUPS, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=96
        ),
        "Llama4ForCausalLM",
    ),
    "bert": ("no causal limit", lambda: transformers.BertConfig(**SIZES), "BertForMaskedLM"),
    "modernbert": (
        "windows to both sides",
        lambda: transformers.ModernBertConfig(**SIZES, local_attention=8, global_attn_every_n_layers=2),
        "ModernBertForMaskedLM",
    ),
    "t5": (
        "position biases and cross-attention",
        lambda: transformers.T5Config(**SEQ2SEQ, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
        "T5ForConditionalGeneration",
    ),
    "bart": (
        "cross-attention",
        lambda: transformers.BartConfig(
            **SEQ2SEQ, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, bos_token_id=1,
        ),
        "BartForConditionalGeneration",
    ),
}  # fmt: skip
DECODERS = ("llama", "gemma2", "gpt-oss")
LENGTH = 30


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    integration.register(collect_statistics=True)
    integration.register("adaattn-balanced", policy="balanced", collect_statistics=True)
    integration.register("adaattn-silent")
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models of this size have no work for more
    yield
    torch.set_num_threads(threads)


@cache
def model(name: str) -> Any:
    """A model with random weights that are large enough for attention to matter."""
    _, config, kind = MODELS[name]
    torch.manual_seed(1)
    made = getattr(transformers, kind)(config()).eval()
    for key, parameter in made.named_parameters():
        if "sinks" in key:
            torch.nn.init.normal_(parameter)
        elif parameter.dim() > 1 and name != "t5":  # its scores are large as they are
            parameter.data.mul_(4)
    return made


def tokens(count: int = 3) -> Any:
    torch.manual_seed(0)
    return torch.randint(3, 99, (count, LENGTH))


def padding(side: str) -> Any:
    """One sequence is full, two have less."""
    at = torch.arange(LENGTH).expand(3, LENGTH)
    length = torch.tensor([[21], [LENGTH], [13]])
    return (at < length if side == "right" else at >= LENGTH - length).long()


def logits(model: Any, implementation: str, **inputs: Any) -> Any:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, side: str) -> None:
    mask = None if side == "none" else padding(side)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    if name in ("t5", "bart"):
        inputs["decoder_input_ids"] = tokens()[:, :13]
    expected, found = (logits(model(name), kind, **inputs) for kind in ("eager", "adaattn"))
    if mask is not None and "decoder_input_ids" not in inputs:
        expected, found = expected[mask.bool()], found[mask.bool()]
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens(name: str, cache: str | None) -> None:
    """The same as eager's up to the first place where the two best differ by no more than 1e-3."""
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    options |= {"input_ids": tokens(), "attention_mask": padding("left"), "cache_implementation": cache}
    results = []
    for kind in ("eager", "adaattn"):
        model(name).set_attn_implementation(kind)
        results.append(model(name).generate(**options))
    expected, found = results
    best = torch.stack(expected.logits, dim=1).topk(2).values  # (sequence, step, 2)
    clear = (best[..., 0] - best[..., 1] > 1e-3).cumprod(dim=1).bool()
    new, theirs = found.sequences[:, LENGTH:], expected.sequences[:, LENGTH:]
    assert clear.sum() >= 24 and torch.equal(new[clear], theirs[clear])


def test_another_chunk_after_a_cache() -> None:
    """Several new tokens on a dynamic cache: the diagonal does not start at the first key."""
    inputs, decoder = tokens(), model("gemma2")
    expected = logits(decoder, "eager", input_ids=inputs)
    decoder.set_attn_implementation("adaattn")
    with torch.no_grad():
        first = decoder(inputs[:, :17], use_cache=True)
        second = decoder(inputs[:, 17:], cache=first.past_key_values).logits
    assert (second - expected[:, 17:]).norm() <= 1e-5 * expected.norm()


def test_autocast() -> None:
    """Rotated queries and keys are float32 beside values in bfloat16; so are the logits' differences."""
    decoder, inputs = model("llama"), {"input_ids": tokens(), "attention_mask": padding("right")}
    seen = inputs["attention_mask"].bool()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (logits(decoder, kind, **inputs)[seen].float() for kind in ("sdpa", "adaattn"))
    assert 0 < (found - expected).norm() <= 3e-2 * expected.norm()


def test_compiled_and_exported() -> None:
    decoder, inputs = model("llama"), {"input_ids": tokens(), "attention_mask": padding("left")}
    expected = logits(decoder, "adaattn", **inputs)
    with torch.no_grad():
        compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)(**inputs).logits
        program = torch.export.export(decoder, (), inputs | {"use_cache": False}, strict=False)
        exported = program.module()(**inputs, use_cache=False).logits
    seen = inputs["attention_mask"].bool()
    for found in (compiled, exported):
        assert (found[seen] - expected[seen]).norm() <= 1e-5 * expected[seen].norm()


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "bert", "t5"])
def test_training(name: str) -> None:
    """Every parameter's gradient, sinks and position biases among them."""
    mask = padding("right")
    labels = tokens().masked_fill(mask == 0, -100)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "labels": labels}
    trained, found = model(name), []
    for kind in ("eager", "adaattn"):
        trained.set_attn_implementation(kind)
        trained.zero_grad()
        trained(**inputs).loss.backward()
        found.append({key: x.grad.clone() for key, x in trained.named_parameters() if x.grad is not None})
    expected, ours = found
    assert ours.keys() == expected.keys()
    for key, x in ours.items():
        assert (x - expected[key]).norm() <= 1e-4 * expected[key].norm() + 1e-7, key


# ---- masks

PATTERNS: dict[str, Any] = {
    "causal": lambda: masking_utils.causal_mask_function,
    "bidirectional": lambda: masking_utils.bidirectional_mask_function,
    "window": lambda: masking_utils.sliding_window_causal_mask_function(4),
    "window to both sides": lambda: masking_utils.sliding_window_bidirectional_mask_function(3),
}


@pytest.mark.parametrize("keep", ["all", "end", "start", "holes"])
@pytest.mark.parametrize("offsets", [(9, 9, 0, 0), (4, 9, 5, 0), (4, 12, 2, 0), (4, 9, 8, 3)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_options_are_the_mask(pattern: str, offsets: tuple[int, ...], keep: str) -> None:
    T, S, q_offset, kv_offset = offsets
    total = S + kv_offset
    at = torch.arange(total).expand(2, total)
    mask = {
        "all": None,
        "end": at < torch.tensor([[total], [total - 2]]),
        "start": at >= torch.tensor([[0], [kv_offset + 2]]),
        "holes": at % 3 != torch.tensor([[1], [4]]),
    }[keep]
    arguments = (2, T, S, q_offset, kv_offset, PATTERNS[pattern](), mask)
    found = integration._mask(*arguments, allow_is_bidirectional_skip=True)
    entries = masking_utils.sdpa_mask(*arguments, allow_is_causal_skip=False)
    if found is None:
        assert entries.all()
        return
    assert isinstance(found, integration.Visibility) and found.shape == (2, 1, T, S)
    assert torch.equal(found.entries(), entries) and torch.equal(found[:, :, 1:], entries[:, :, 1:])
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 1, max(T, S), 4), np.float32)
    options = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in found.options.items()}
    np.testing.assert_allclose(
        adaattn.attention(query[:, :, :T], key[:, :, :S], value[:, :, :S], **options),
        adaattn.attention(query[:, :, :T], key[:, :, :S], value[:, :, :S], attn_mask=entries.numpy()),
        atol=1e-6,
    )


def test_foreign_patterns_are_masks() -> None:
    """Named like transformers' own, uniting two, or in chunks: not what options can say."""

    def causal_mask_function(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return kv <= q + 1

    own = masking_utils.causal_mask_function
    chunks = masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64))
    assert integration._pattern(own) == (True, None, None)
    assert all(
        integration._pattern(function) is None
        for function in (causal_mask_function, masking_utils.or_masks(own, causal_mask_function), chunks)
    )
    found = integration._mask(1, 5, 9, 4, 0, chunks, local_size=3)
    expected = masking_utils.sdpa_mask(1, 5, 9, 4, 0, chunks, allow_is_causal_skip=False)
    assert type(found) is torch.Tensor and torch.equal(found, expected)


def test_no_mask_is_read_as_sdpa_does() -> None:
    """A single query sees all keys; several stand at the first ones, and windows have transformers' size."""
    layer = torch.nn.Module()
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 7, 8)
    for length, options, window in (
        (1, {}, None),
        (5, {}, None),
        (5, {"sliding_window": 3}, 3),
        (5, {"is_causal": False}, 0),
    ):
        arrays = (query[:, :, :length], key, value)
        found, _ = integration._attention(layer, *arrays, None, {}, False, **options)
        at = torch.arange(7) - torch.arange(length)[:, None]
        seen = torch.ones(1, 7, dtype=torch.bool) if length == 1 or window == 0 else at <= 0
        seen = seen & (at > -window) if window else seen
        expected = torch.nn.functional.scaled_dot_product_attention(*arrays, attn_mask=seen)
        torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-6, rtol=0)


# ---- statistics and options


def test_statistics() -> None:
    encoder, inputs = model("bert"), {"input_ids": tokens()}
    integration.reset_statistics(encoder)
    with pytest.raises(adaattn.ArgumentError, match=r"^model: expected calls"):
        integration.statistics(encoder)
    logits(encoder, "adaattn-silent", **inputs)
    with pytest.raises(adaattn.ArgumentError, match=r"^model: expected calls"):
        integration.statistics(encoder)
    logits(encoder, "adaattn", **inputs)
    logits(encoder, "adaattn-balanced", **inputs)
    found = integration.statistics(encoder)
    assert len(found.layers) == SIZES["num_hidden_layers"]
    assert "bert.encoder.layer.0.attention.self" in found.layers
    assert all((layer.call_count, layer.plan_count) == (2, 1) for layer in found.layers.values())
    assert (found.total.call_count, found.total.plan_count) == (6, 3)
    assert sum(found.total.precision_distribution.values()) == pytest.approx(1)
    for phase, seconds in found.total.seconds.items():
        assert seconds == pytest.approx(sum(layer.seconds[phase] for layer in found.layers.values()))
    assert len(found.table().splitlines()) == 2 + len(found.layers)
    assert json.loads(found.to_json())["total"]["call_count"] == 6


def test_names_of_others_are_refused() -> None:
    for name in ("sdpa", "eager", "flash_attention_2"):
        with pytest.raises(adaattn.ArgumentError, match=f"^name: .*'{name}'"):
            integration.register(name)
    integration.register("adaattn", collect_statistics=True)  # once more is no error


def test_weights_are_refused() -> None:
    with pytest.raises(adaattn.ArgumentError, match=r"^output_attentions: expected False"):
        integration._attention(
            torch.nn.Module(), *torch.randn(3, 1, 2, 7, 8), None, {}, False, output_attentions=True
        )


# ---- a real model


def paragraphs() -> list[str]:
    """Twenty pieces of english.txt, of one sentence to several."""
    words = (ROOT / "adaattn/data/english.txt").read_text(encoding="utf-8").split()
    ends = np.cumsum([8 + 37 * i % 23 for i in range(20)])
    return [" ".join(words[start:end]) for start, end in zip((0, *ends[:-1]), ends, strict=True)]


def test_minilm() -> None:
    """Embeddings of padded batches keep their direction: MiniLM's mean over tokens, normalised."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from adaattn.bench.heads import minilm_folder

        folder = minilm_folder()
    except ImportError as error:
        pytest.skip(str(error))
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(paragraphs(), padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(dim=1).unique().numel() > 8
    integration.register("adaattn-quality", policy="quality", collect_statistics=True)

    def embed(implementation: str) -> Any:
        encoder.set_attn_implementation(implementation)
        with torch.no_grad():
            hidden = encoder(**batch).last_hidden_state.double()
        seen = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * seen).sum(dim=1) / seen.sum(dim=1), dim=1)

    expected = embed("sdpa")
    for implementation, cosine in (("adaattn-quality", 0.99999), ("adaattn-balanced", 0.999)):
        integration.reset_statistics(encoder)
        assert (embed(implementation) * expected).sum(dim=1).min() >= cosine
        assert integration.statistics(encoder).total.plan_count == 6
