"""Modules of Transformers: NumPy arrays in and out, parameters as NumPy arrays, float32 by default.

A module's array attributes are its parameters and its module attributes (or lists of them) its children; the
dotted paths to the parameters are the keys of `state_dict`. Matrix products are NumPy's BLAS, or for few rows
`adaattn.linear`, of weights that `pack` keeps in fewer bits too; attention is
`adaattn.attention`, and its gradient `adaattn.attention_backward`. In training, which is how modules start,
calls keep what `backward` needs; `eval()` ends that.
"""

from .activations import gelu, gelu_tanh, relu, relu2, silu
from .attention import AdaptivePrecisionAttention, DenseAttention, MultiHeadAttention
from .block import TransformerBlock
from .checkpoint import load_checkpoint, save_checkpoint
from .layers import Dropout, Embedding, FeedForward, LayerNorm, Linear, RMSNorm
from .module import Module
from .optim import AdamW, clip_grad_norm, cosine_schedule, cross_entropy
from .positions import alibi_slopes, rotary
from .rank import AdaAttention, AdaptiveRankAttention
from .stats import AttentionStatistics, ModelStatistics
from .transformer import Transformer

__all__ = [
    "AdaAttention",
    "AdamW",
    "AdaptivePrecisionAttention",
    "AdaptiveRankAttention",
    "AttentionStatistics",
    "DenseAttention",
    "Dropout",
    "Embedding",
    "FeedForward",
    "LayerNorm",
    "Linear",
    "ModelStatistics",
    "Module",
    "MultiHeadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerBlock",
    "alibi_slopes",
    "clip_grad_norm",
    "cosine_schedule",
    "cross_entropy",
    "gelu",
    "gelu_tanh",
    "load_checkpoint",
    "relu",
    "relu2",
    "rotary",
    "save_checkpoint",
    "silu",
]
