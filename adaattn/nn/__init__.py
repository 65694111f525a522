"""Modules of a small Transformer: NumPy arrays in and out, parameters as NumPy arrays, float32 by default.

A module's array attributes are its parameters and its module attributes (or lists of them) its children; the
dotted paths to the parameters are the keys of `state_dict`. Matrix products are NumPy's BLAS, attention is
`adaattn.attention`. Sources: Su et al. 2021 (arXiv:2104.09864) for rotary positions, Touvron et al. 2023
(arXiv:2302.13971) for pre-norm blocks with RMSNorm.
"""

from .attention import AdaptivePrecisionAttention, DenseAttention, rotary
from .layers import Embedding, FeedForward, Linear, RMSNorm, gelu
from .module import Module
from .stats import AttentionStatistics
from .transformer import Transformer, TransformerBlock

__all__ = [
    "AdaptivePrecisionAttention",
    "AttentionStatistics",
    "DenseAttention",
    "Embedding",
    "FeedForward",
    "Linear",
    "Module",
    "RMSNorm",
    "Transformer",
    "TransformerBlock",
    "gelu",
    "rotary",
]
