"""Attention of a rank that follows the data: modules, and how many dimensions attention has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import linalg
from ..errors import ArgumentError
from .attention import AdaptivePrecisionAttention
from .module import Array, at_least_one, one_of

METHODS = ("entropy", "power", "random")
ROWS = 256  # of a head's attention matrix that tell its rank


class AdaAttention(AdaptivePrecisionAttention):
    """Attention by the cheapest precision, structure and rank that keep an error budget together.

    Every head of at least 2,048 tokens may be sparse, or be computed over landmarks instead of all keys,
    where that is faster within the budget; see `adaattn.attention`. Parameters, inputs and outputs are those
    of `AdaptivePrecisionAttention`, but for:

    Parameters
    ----------
    rank_ratio : float
        Most landmarks, as a share of the keys.
    min_rank : int
        Least landmarks, which go before `rank_ratio`.
    method : "entropy", "power" or "random"
        What `predict_optimal_rank` goes by.
    threshold : float
        Share of the energy that "random" keeps.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        rank_ratio: float = 0.25,
        min_rank: int = 1,
        method: str = "entropy",
        threshold: float = 0.95,
        **options: Any,
    ) -> None:
        at_least_one(min_rank=min_rank)
        one_of("method", method, METHODS)
        for name, share in (("rank_ratio", rank_ratio), ("threshold", threshold)):
            if not 0 < share <= 1:
                raise ArgumentError(f"{name}: expected a number above 0 and at most 1, got {share!r}")
        super().__init__(embed_dim, num_heads, **options)
        self.rank_ratio, self.min_rank, self.method, self.threshold = rank_ratio, min_rank, method, threshold

    def _budget(self, keys: int | None = None) -> dict[str, Any]:
        if keys is None:
            return super()._budget()
        most = max(self.min_rank, math.floor(self.rank_ratio * keys))
        return super()._budget() | {"min_rank": self.min_rank, "max_rank": most}

    def predict_optimal_rank(self, x: Array) -> NDArray[np.int64]:
        """Effective rank of each head's attention matrix, on rows spread evenly: not the number of landmarks.

        Parameters
        ----------
        x : (B, T, C) array

        Returns
        -------
        (B, H) array of int
            "entropy": exp of the entropy of the singular values' shares (Roy & Vetterli 2007, EUSIPCO);
            "power": the stable rank, squared Frobenius over squared spectral norm, by power iteration;
            "random": singular values that hold `threshold` of the energy, by a randomised decomposition
            (Halko et al., arXiv 0909.4061). O(ROWS^2 T) for each head, ROWS = 256.
        """
        saved = self.qkv._saved
        query, key, _, _ = self._heads(x)
        self.qkv._saved = saved  # `backward` is that of the last call, not of this look
        B, H, T, D = query.shape
        ranks = np.empty((B, H), np.int64)
        rows = np.unique(np.linspace(0, T - 1, min(T, ROWS)).round().astype(np.int64))
        for b, h in np.ndindex(B, H):
            scores = query[b, h, rows].astype(np.float64) @ key[b, h * key.shape[1] // H].T / math.sqrt(D)
            apart = rows[:, None] - np.arange(T)
            if "alibi_slopes" in self._options:
                scores -= self._options["alibi_slopes"][h] * np.abs(apart)
            if self.causal:
                scores[apart < 0] = -np.inf
            ranks[b, h] = self._rank_of(linalg.stable_softmax(scores))
        return ranks

    def _rank_of(self, weights: Array) -> int:
        if self.method == "entropy":
            rank = float(linalg.effective_rank(weights, "entropy"))
        elif self.method == "power":
            largest = float(linalg.power_iteration(weights, seed=0)[0])
            rank = float(np.sum(weights**2)) / largest**2
        else:
            rank = _energy_rank(weights, self.threshold)
        return int(min(max(math.ceil(rank - 1e-6), 1), *weights.shape))

    def get_rank_statistics(self) -> dict[str, Any]:
        """Ranks of the collected calls.

        Returns
        -------
        dict
            ``call_count``, ``low_rank_ratio`` (share of the heads that were computed over landmarks),
            ``sparse_ratio``, ``mean_rank`` (their landmarks; NaN without any), ``mean_entropy`` (nats), and
            ``rank_ratio`` and ``min_rank`` of the module.

        Raises
        ------
        ArgumentError
            As `get_statistics`.
        """
        told = self.get_statistics()
        names = "call_count", "low_rank_ratio", "sparse_ratio", "mean_rank", "mean_entropy"
        return {name: getattr(told, name) for name in names} | {
            "rank_ratio": self.rank_ratio,
            "min_rank": self.min_rank,
        }


class AdaptiveRankAttention(AdaAttention):
    """Attention over as few landmarks as keep an error budget, in fp32; exact where no number of them does.

    Parameters, inputs and outputs are `AdaAttention`'s, without `min_precision` and `max_precision`.
    """

    def __init__(self, embed_dim: int, num_heads: int, **options: Any) -> None:
        for name in ("min_precision", "max_precision"):
            if name in options:
                raise TypeError(f"AdaptiveRankAttention takes no {name}: it is fp32")
        super().__init__(embed_dim, num_heads, min_precision="fp32", **options)


def _energy_rank(weights: Array, threshold: float) -> int:
    """Singular values that hold so much of the energy, looked for among more and more of them."""
    most, total = min(weights.shape), float(np.sum(weights**2))
    rank = min(16, most)
    while True:
        energy = np.cumsum(linalg.randomized_svd(weights, rank, seed=0)[1] ** 2)
        found = int(np.searchsorted(energy, threshold * total)) + 1
        if found <= rank or rank == most:
            return int(min(found, most))
        rank = min(2 * rank, most)
