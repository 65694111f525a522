"""Who is compared: AdaAttn in four configurations; torch, onnxruntime and NumPy where they are installed."""

from __future__ import annotations

import os
from typing import Any

from .heads import Heads
from .peers import Call, Peer, build_numpy, build_onnxruntime, build_torch

#: Configurations of AdaAttn and what they mean; all but the first keep a tolerance.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "structure": {"min_precision": "fp32", "max_precision": "fp32"},
    "precision": {"structure": "dense"},
    "both": {},
}
LABELS = {
    "dense": "dense, exact",
    "structure": "adaptive structure",
    "precision": "adaptive precision",
    "both": "both",
    "torch": "torch SDPA",
    "onnxruntime": "onnxruntime",
    "numpy": "NumPy",
}
_PEERS = {
    "torch": Peer("torch", "fp32", build_torch, ("torch",)),
    "onnxruntime": Peer("onnxruntime", "fp32", build_onnxruntime, ("onnxruntime", "onnx")),
    "numpy": Peer("numpy", "fp32", build_numpy, ()),
}


def obstacles() -> dict[str, str]:
    """Peers that cannot run here, and why."""
    return {name: why for name, peer in _PEERS.items() if (why := peer.obstacle())}


def unfit(name: str, heads: Heads) -> bool:
    """Whether a peer cannot take these heads: another diagonal, or more memory than there is to spare."""
    if name in CONFIGURATIONS:
        return False
    T, S = heads.query.shape[2], heads.key.shape[2]
    if heads.causal and T != S:
        return True
    weights = 8 * heads.query.shape[0] * heads.query.shape[1] * T * S  # and their copy in work
    return name == "numpy" and weights > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4


def options_of(name: str, tolerance: float) -> dict[str, Any]:
    """What a configuration passes to `adaattn.attention`."""
    return CONFIGURATIONS[name] | ({} if name == "dense" else {"tolerance": tolerance})


def build(name: str, heads: Heads, tolerance: float, threads: int) -> Call:
    """A callable that computes the heads' attention and returns the output, in the contender's own form."""
    if name in CONFIGURATIONS:
        options = options_of(name, tolerance)
        return lambda: heads.attend(num_threads=threads, **options)
    return _PEERS[name].build([heads.query, heads.key, heads.value], heads.causal, threads)
