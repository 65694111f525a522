"""Which blocks of keys a head needs, which cheap rule finds them, and which bound keeps every row safe.

Heads are cut into blocks of 64 keys and of some queries. A method gives each pair of blocks a number; the
pairs with the largest are computed, the others are dropped or *stand in*: a block counts as one key of its
mean value, with a weight that is a centroid's or that of its own scores, executed in 8 bits. Reported is the
share of the visible pairs that has to be computed for a relative error, and what finding them costs in
multiplications, where those of the dense products are 1. No timing: the figures hardly depend on the machine.

Sources: SpargeAttn (arXiv:2502.18137), XAttention (2503.16428), FlexPrefill (2502.20766) for the rules, Quest
(2406.10774) for the box, SnapKV (2404.14469) for queries that speak for others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from heads import Array, Heads, bundled, gaussian
from instruments import draw, save, write_json
from report import show_table

from adaattn.bench.heads import topics

BLOCK = 64  # keys
TOLERANCES = (1e-2, 5e-2)
AIM = 0.6  # of the tolerance is for structure, the rest for rounding
SHARES = np.geomspace(0.008, 1, 70)  # of the pairs, at which errors are taken
LEAST_FACTOR = 0.2  # of errors over their bounds
SAMPLED = (16, 2)  # blocks of queries, and rows of each, that calibrate
DRAWS = 10


# ---- a head, computed in full ----


def once(f: Callable[[Head], Any]) -> Callable[[Head], Any]:
    """Computed once for each head."""

    def known(head: Head) -> Any:
        if f.__name__ not in head.known:
            head.known[f.__name__] = f(head)
        return head.known[f.__name__]

    return known


class Head:
    """A causal head's weights and outputs; arrays are [blocks of queries, blocks of keys, queries]."""

    def __init__(self, name: str, q: Array, k: Array, v: Array, queries: int) -> None:
        (T, D), (S, E) = q.shape, v.shape
        if T != S or S % BLOCK or T % queries:
            raise ValueError(f"expected as many queries as keys, whole blocks of them, got {T} and {S}")
        self.name, self.queries, self.rows, self.D = name, queries, T, D
        self.known: dict[str, Any] = {}
        self.A, self.J = T // queries, S // BLOCK
        self.q = (q / np.sqrt(D)).astype(np.float32)
        self.k = (k - k.mean(axis=0)).astype(np.float32)
        self.v = (v - v.mean(axis=0)).astype(np.float32)  # errors and bounds do not change, but for the norm
        self.offset = v.mean(axis=0)
        last = np.arange(1, self.A + 1) * queries - 1
        self.visible = np.arange(self.J) * BLOCK <= last[:, None]
        self.always = self.visible & ((np.arange(self.J) + 1) * BLOCK > last[:, None] + 1 - queries)
        self.always[:, 0] = True
        self.mass = np.zeros((self.A, self.J, queries), np.float32)
        self.part = np.zeros((self.A, self.J, queries, E), np.float32)
        self.log_sum = np.zeros((self.A, queries), np.float32)
        for a in range(self.A):
            s = self.scores(a, self.q, self.k)
            m = s.max(axis=1, keepdims=True)
            p = np.exp(s - m)
            total = p.sum(axis=1, keepdims=True)
            p = (p / total).reshape(queries, self.J, BLOCK).transpose(1, 0, 2)
            self.log_sum[a] = (m + np.log(total))[:, 0]
            self.mass[a] = p.sum(axis=2)
            self.part[a] = p @ self.v.reshape(self.J, BLOCK, E)
        self.out = self.part.sum(axis=1)
        self.norm2 = float(np.sum((self.out + self.offset).astype(float) ** 2))
        values = self.v.reshape(self.J, BLOCK, E)
        self.mean_value = values.mean(axis=1)
        self.reach = np.sqrt(np.sum((values - self.mean_value[:, None]) ** 2, axis=2).max(axis=1))
        self.keys = self.k.reshape(self.J, BLOCK, D)
        self.centroid = self.keys.mean(axis=1)
        self.q_blocks = self.q.reshape(self.A, queries, D)

    def scores(self, a: int, q: Array, k: Array) -> Array:
        """Of the queries of block a, -inf where masked."""
        rows = np.arange(a * self.queries, (a + 1) * self.queries)
        s: Array = q[rows] @ k.T
        s[np.arange(len(k)) > rows[:, None]] = -np.inf
        return s

    def masses(self, q: Array, k: Array) -> Array:
        """Of exponentials of other scores, over the rows' true sums: sums, sums of squares, largest."""
        found = np.empty((3, *self.mass.shape), np.float32)
        for a in range(self.A):
            s = self.scores(a, q, k) - self.log_sum[a][:, None]
            e = np.exp(np.minimum(s, 30)).reshape(self.queries, self.J, BLOCK)
            found[:, a] = [e.sum(axis=2).T, np.sum(e * e, axis=2).T, e.max(axis=2).T]
        return found

    def shares(self, logarithms: Array) -> Array:
        """Logarithms of masses to masses that sum to one in each row."""
        x = np.where(self.visible[..., None], logarithms, -np.inf)
        x = np.exp(x - x.max(axis=1, keepdims=True))
        shares: Array = x / x.sum(axis=1, keepdims=True)
        return shares

    def errors(self, number: Array, weight: Array | None) -> tuple[Array, Array]:
        """Squared errors of all rows [rows, levels], and the shares of pairs that were computed."""
        number = np.where(self.visible, number, -np.inf)
        number[self.always] = np.inf
        rank = np.empty(number.size, np.int64)
        rank[np.argsort(-number, axis=None, kind="stable")] = np.arange(number.size)
        counts = np.maximum(np.ceil(SHARES * self.visible.sum()), self.always.sum())
        found = np.empty((self.rows, len(counts)))
        for a in range(self.A):
            kept = rank.reshape(number.shape)[a] < counts[:, None]
            found[a * self.queries : (a + 1) * self.queries] = self.squares(a, kept, weight).T
        return found, counts / self.visible.sum()

    def squares(self, a: int, kept: Array, weight: Array | None) -> Array:
        """Squared errors [levels, queries] of block a, where the pairs kept [levels, J] are computed."""
        J = self.visible[a]
        near, far = kept[:, J].astype(np.float32), (~kept[:, J]).astype(np.float32)
        sums = (near @ self.part[a, J].reshape(len(near.T), -1)).reshape(len(kept), self.queries, -1)
        total = near @ self.mass[a, J]
        if weight is not None:
            w = weight[a, J]
            total = total + far @ w
            sums += np.einsum("lj,jr,je->lre", far, w, self.mean_value[J], optimize=True)
        found: Array = np.sum((sums / np.maximum(total, 1e-30)[..., None] - self.out[a]) ** 2, axis=2)
        return found

    def needed(self, number: Array, weight: Array | None = None) -> tuple[list[float], Array]:
        """Least shares that keep both tolerances' structural part, and the error at each of SHARES."""
        squares, shares = self.errors(number, weight)
        error = np.sqrt(squares.sum(axis=0) / self.norm2)
        return [least(error <= AIM * t, shares) for t in TOLERANCES], error

    def unit(self) -> float:
        """Root mean square of the rows' outputs."""
        return float(np.sqrt(self.norm2 / self.rows))


def least(good: Array, shares: Array) -> float:
    """The share from which on all are good."""
    bad = np.flatnonzero(~good)
    return float(shares[min(bad[-1] + 1, len(shares) - 1)] if len(bad) else shares[0])


def heads_of(sets: Iterator[Heads], queries: int) -> Iterator[Head]:
    for heads in sets:
        for one in heads.apart():
            yield Head(one.name, one.query[0, 0], one.key[0, 0], one.value[0, 0], queries)


# ---- rules: a number for each pair, larger where it matters more ----


def by_error(head: Head) -> Array:
    """The oracle: what dropping the pair alone does to the output."""
    found = np.zeros((head.A, head.J))
    for a, (mass, out, part) in enumerate(zip(head.mass, head.out, head.part, strict=True)):
        change = (mass[..., None] * out - part) / np.maximum(1 - mass, 1e-6)[..., None]
        found[a] = np.sum(change * change, axis=(1, 2))
    return found


def by_mass(head: Head) -> Array:
    mean: Array = head.mass.mean(axis=2)
    return mean


@once
def linear(head: Head) -> Array:
    """Logarithm of a block's mass by its centroid."""
    s: Array = np.einsum("ard,jd->ajr", head.q_blocks, head.centroid) + np.float32(np.log(BLOCK))
    return s


@once
def variance(head: Head) -> Array:
    """Half the variance of a block's scores: what Jensen's inequality is off by, were they normal."""
    x = head.keys - head.centroid[:, None]
    second = np.einsum("jnd,jne->jde", x, x) / BLOCK
    half = [np.einsum("ard,ard->ar", head.q_blocks @ s, head.q_blocks) / 2 for s in second]
    result: Array = np.array(half).transpose(1, 0, 2)
    return result


def by_pooled(head: Head) -> Array:
    s = head.q_blocks.mean(axis=1) @ head.centroid.T
    return head.shares(s[..., None])[..., 0]


def by_centroid(head: Head) -> Array:
    mean: Array = head.shares(linear(head)).mean(axis=2)
    return mean


def by_moment(head: Head) -> Array:
    mean: Array = head.shares(linear(head) + variance(head)).mean(axis=2)
    return mean


def by_radius(head: Head) -> Array:
    mean: Array = head.shares(radius_bound(head, BLOCK)).mean(axis=2)
    return mean


def by_box(head: Head) -> Array:
    mean: Array = head.shares(box_bound(head, BLOCK)).mean(axis=2)
    return mean


def by_queries(count: int, how: str) -> Callable[[Head], Array]:
    """The mean or the largest mass in a few rows of each block; those that are far apart, or at a stride."""

    def number(head: Head) -> Array:
        step = head.queries // count
        chosen = np.tile(np.arange(step - 1, head.queries, step), (head.A, 1))
        if how == "far":
            chosen[:, 0] = np.sum((head.q_blocks - head.q_blocks.mean(1, keepdims=True)) ** 2, 2).argmax(1)
            distance = np.full((head.A, head.queries), np.inf)
            for i in range(1, count):
                last = head.q_blocks[np.arange(head.A), chosen[:, i - 1]]
                distance = np.minimum(distance, np.sum((head.q_blocks - last[:, None]) ** 2, axis=2))
                chosen[:, i] = distance.argmax(axis=1)
        mass = np.take_along_axis(head.mass, chosen[:, None], axis=2)
        found: Array = mass.max(axis=2) if how == "max" else mass.mean(axis=2)
        return found

    return number


def by_antidiagonals(stride: int) -> Callable[[Head], Array]:
    """Sums of scores along antidiagonals of stride by stride squares, and a softmax of their means."""

    def number(head: Head) -> Array:
        n = head.rows // stride
        q = head.q.reshape(n, -1)
        k = head.k.reshape(n, stride, -1)[:, ::-1].reshape(n, -1)
        s = q @ k.T / stride
        s[np.triu(np.ones(s.shape, bool), 1)] = -np.inf
        p = np.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        sums: Array = p.reshape(head.A, head.queries // stride, head.J, BLOCK // stride).sum(axis=(1, 3))
        return sums

    return number


def rounded(x: Array, bits: int, axis: int | tuple[int, ...]) -> Array:
    """Integers of that many bits with a scale, as floats."""
    unit = np.abs(x).max(axis=axis, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
    result: Array = np.rint(x / np.maximum(unit, np.float32(1e-30))) * unit
    return result


@once
def executed(head: Head) -> Array:
    """Masses and squares by scores of 8-bit integers: a scale for each query, and for each block of keys."""
    return head.masses(rounded(head.q, 8, 1), rounded(head.keys, 8, (1, 2)).reshape(head.k.shape))


@once
def coarse(head: Head) -> Array:
    """The same with 5 bits of the queries, of which AVX2 sums four products in 16 bits."""
    return head.masses(rounded(head.q, 5, 1), rounded(head.keys, 8, (1, 2)).reshape(head.k.shape))


def balanced(head: Head) -> tuple[Array, Array]:
    """The same scores from coordinates in descending order of what they contribute, alike in q and k."""
    second = head.q.T.astype(float) @ head.q / head.rows
    w, u = np.linalg.eigh(second)
    w = np.sqrt(np.maximum(w, 1e-9 * w.max()))
    root, inverse = (u * w) @ u.T, (u / w) @ u.T
    y, z = np.linalg.eigh(root @ (head.k.T.astype(float) @ head.k / head.rows) @ root)
    y, z = np.maximum(y[::-1], 1e-9 * y.max()) ** 0.25, z[:, ::-1]
    return (head.q @ (inverse @ z * y)).astype(np.float32), (head.k @ (root @ z / y)).astype(np.float32)


@once
def halved(head: Head) -> tuple[Array, Array]:
    """By half of the balanced coordinates: what is expected, and masses as the others' norms bound them."""
    q, k = balanced(head)
    half = head.D // 2
    found = head.masses(q[:, :half], k[:, :half])
    spread = (q[:, half:] ** 2 @ np.mean(k[:, half:] ** 2, axis=0)).reshape(head.A, 1, -1)
    q_rest = np.linalg.norm(q[:, half:], axis=1).reshape(head.A, 1, -1)
    k_rest = np.linalg.norm(k[:, half:], axis=1).reshape(head.J, BLOCK).max(axis=1)
    bound = found[0] * np.exp(np.minimum(q_rest * k_rest[:, None], 30))
    found[0] *= np.exp(spread / 2)
    found[1] *= np.exp(2 * spread)
    return found, bound


def stand_in_error(head: Head, found: Array) -> Array:
    """Of each row and block, what the stand-in is off by: exactly so for values of random direction.

    The sum of (p - mean p) (v - mean v) over a block; nothing where its weights are equal. A needle has all
    of its own weight.
    """
    mass, squares, _ = found
    error: Array = np.sqrt(np.maximum(squares - mass * mass / BLOCK, 0)) * head.reach[:, None]
    return error


def by_stand_in(of: Callable[[Head], Array]) -> Callable[[Head], Array]:
    return lambda head: np.mean(stand_in_error(head, of(head)) ** 2, axis=2)


@dataclass(frozen=True)
class Method:
    """A rule with the weights of what it does not compute, and multiplications by which it finds both."""

    number: Callable[[Head], Array]
    cost: float  # share of the dense products'; scores are half of these, 8-bit ones cost a quarter
    weight: Callable[[Head], Array] | None = None


def centroid_weight(head: Head) -> Array:
    """At most all of the row's mass."""
    w: Array = np.exp(np.minimum(linear(head) - head.log_sum[:, None], 0))
    return w


def capped_weight(head: Head) -> Array:
    half = np.minimum(variance(head), 2)
    w: Array = np.exp(np.minimum(linear(head) + half - head.log_sum[:, None], 0))
    return w


def moment_weight(head: Head) -> Array:
    w: Array = np.exp(np.minimum(linear(head) + variance(head) - head.log_sum[:, None], 0))
    return w


PAIR, ROW, ALL, INT8 = 0.5 / BLOCK**2, 0.5 / BLOCK, 0.5, 0.125
METHODS: dict[str, Method] = {
    "oracle, by error": Method(by_error, 0),
    "oracle, by mass": Method(by_mass, 0),
    "pooled queries and keys": Method(by_pooled, PAIR),
    "centroids": Method(by_centroid, ROW),
    "centroids with variance": Method(by_moment, ROW + ALL),
    "centroid and radius": Method(by_radius, ROW),
    "box": Method(by_box, 2 * ROW),
    "4 queries, mean": Method(by_queries(4, "mean"), ALL * 4 / 64),
    "8 queries, mean": Method(by_queries(8, "mean"), ALL * 8 / 64),
    "8 queries, max": Method(by_queries(8, "max"), ALL * 8 / 64),
    "8 queries far apart": Method(by_queries(8, "far"), ALL * 8 / 64),
    "antidiagonals, 8": Method(by_antidiagonals(8), ALL / 8),
    "antidiagonals, 16": Method(by_antidiagonals(16), ALL / 16),
    "int8 scores": Method(lambda head: executed(head)[0].mean(axis=2), INT8),
    "pooled + centroids": Method(by_pooled, ROW, centroid_weight),
    "centroids + centroids": Method(by_centroid, ROW, centroid_weight),
    "centroids + variance": Method(by_centroid, ROW + ALL, moment_weight),
    "centroids + variance <= 2": Method(by_centroid, ROW + ALL, capped_weight),
    "int8 + centroids": Method(by_stand_in(executed), INT8 + ROW, centroid_weight),
    "int8 + same": Method(by_stand_in(executed), INT8 + ROW, lambda head: executed(head)[0]),
    "int8, by mass + same": Method(
        lambda head: np.mean((executed(head)[0] * head.reach[:, None]) ** 2, axis=2),
        INT8 + ROW,
        lambda head: executed(head)[0],
    ),
    "int5 x int8 + same": Method(by_stand_in(coarse), INT8 + ROW, lambda head: coarse(head)[0]),
    "int8, half of D + same": Method(
        by_stand_in(lambda head: halved(head)[0]), INT8 / 2 + ROW, lambda head: halved(head)[0][0]
    ),
}


# ---- bounds of the mass in every row and block, as logarithms ----


def radius_bound(head: Head, keys: int) -> Array:
    """By centroid and radius of each run of that many keys."""
    x = head.k.reshape(head.J, -1, keys, head.D)
    center = x.mean(axis=2)
    radius = np.sqrt(np.sum((x - center[:, :, None]) ** 2, axis=3).max(axis=2))
    s = np.einsum("ard,jgd->ajgr", head.q_blocks, center)
    s += radius[None, :, :, None] * np.linalg.norm(head.q_blocks, axis=2)[:, None, None]
    bound: Array = log_sum(s) + np.float32(np.log(keys))
    return bound


def box_bound(head: Head, keys: int) -> Array:
    """By least and largest of each coordinate."""
    x = head.k.reshape(head.J, -1, keys, head.D)
    s = np.einsum("ard,jgd->ajgr", np.maximum(head.q_blocks, 0), x.max(axis=2))
    s += np.einsum("ard,jgd->ajgr", np.minimum(head.q_blocks, 0), x.min(axis=2))
    bound: Array = log_sum(s) + np.float32(np.log(keys))
    return bound


def log_sum(s: Array) -> Array:
    m = s.max(axis=2)
    total: Array = m + np.log(np.exp(s - m[:, :, None]).sum(axis=2))
    return total


def integer_bound(head: Head) -> Array:
    """Mass by 8-bit scores times what Cauchy and Schwarz leave for the rounding."""
    q, k = rounded(head.q, 8, 1), rounded(head.keys, 8, (1, 2)).reshape(head.k.shape)
    q_norm, q_off = (np.linalg.norm(x, axis=1).reshape(head.A, 1, -1) for x in (head.q, head.q - q))
    k_norm, k_off = (
        np.linalg.norm(x, axis=1).reshape(head.J, BLOCK).max(axis=1)[:, None] for x in (k, head.k - k)
    )
    bound: Array = head.masses(q, k)[0] * np.exp(q_norm * k_off + q_off * k_norm)
    return bound


def over_sum(head: Head, logarithms: Array) -> Array:
    bound: Array = np.exp(np.minimum(logarithms - head.log_sum[:, None], 30))
    return bound


BOUNDS: dict[str, Callable[[Head], Array]] = {
    "true mass": lambda head: head.mass,
    "radius": lambda head: over_sum(head, radius_bound(head, 64)),
    "radius of 16 keys": lambda head: over_sum(head, radius_bound(head, 16)),
    "box": lambda head: over_sum(head, box_bound(head, 64)),
    "box of 16 keys": lambda head: over_sum(head, box_bound(head, 16)),
    "64 times the largest": lambda head: BLOCK * head.masses(head.q, head.k)[2],
    "int8 scores": integer_bound,
    "half of D and norms": lambda head: halved(head)[1],
}


def certified(head: Head, bound: Array) -> list[float]:
    """Least shares for which dropping is within tolerance by the bound and the largest value alone.

    A row's output moves by at most u / (1 - mass + u) of the distance between values, for a bound u of the
    mass that is dropped; a bound above the row's whole mass says nothing.
    """
    number = np.where(head.visible, bound.mean(axis=2), -np.inf)
    number[head.always] = np.inf
    rank = np.empty(number.size, np.int64)
    rank[np.argsort(-number, axis=None, kind="stable")] = np.arange(number.size)
    counts = np.maximum(np.ceil(SHARES * head.visible.sum()), head.always.sum())
    farthest = np.linalg.norm(head.v, axis=1).max()
    squares = np.zeros(len(counts))
    for a in range(head.A):
        J = head.visible[a]
        kept = rank.reshape(number.shape)[a, J] < counts[:, None]
        near, u = kept @ head.mass[a, J], (~kept) @ bound[a, J]
        distance = farthest + np.linalg.norm(head.out[a], axis=1)
        squares += np.sum((u / (near + u) * distance) ** 2, axis=1)
    error = np.sqrt(squares / head.norm2)
    return [least(error <= AIM * t, counts / head.visible.sum()) for t in TOLERANCES]


# ---- the rule at run time ----


@dataclass
class Run:
    """One head and tolerance by the rule that is proposed; over several draws, but for the first two."""

    head: str
    tolerance: float
    plain_kept: float  # with a factor of one
    plain_error: float
    kept: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)  # over the tolerance
    factor: list[float] = field(default_factory=list)
    uniform: list[float] = field(default_factory=list)  # error by 32 rows again, over the true one
    weighted: list[float] = field(default_factory=list)  # the same, rows drawn by their bounds
    alone: list[float] = field(default_factory=list)  # pairs that the sampled rows need, each for itself


def chosen(head: Head, bound: Array, budget: float) -> Array:
    """Pairs to compute: each block of queries stands in for as many blocks of keys as its budget allows.

    The budget is of the squared sum, over the rows, of the errors' sums over the blocks that stand in.
    """
    kept: Array = head.always.copy()
    for a in range(head.A):
        free = np.flatnonzero(head.visible[a] & ~head.always[a])
        order = free[np.argsort(np.sum(bound[a, free] ** 2, axis=1), kind="stable")]
        spent = np.sum(np.cumsum(bound[a, order], axis=0) ** 2, axis=1)
        kept[a, order[np.searchsorted(spent, budget, side="right") :]] = True
    return kept


def outcome(head: Head, kept: Array, mass: Array, bound: Array) -> tuple[Array, Array]:
    """Squared errors of all rows, and squared bounds: [A, queries]."""
    e2 = np.array([head.squares(a, kept[a : a + 1], mass)[0] for a in range(head.A)], np.float64)
    stands = (~kept & head.visible).astype(np.float32)
    return e2, np.einsum("aj,ajr->ar", stands, bound).astype(np.float64) ** 2


def bounds_of(head: Head) -> tuple[Array, Array]:
    """Executed masses, and what stand-ins are off by relative to the sums that the rule itself knows."""
    found = executed(head)
    visible = head.visible[..., None]
    return found[0], stand_in_error(head, found) * visible / found[0].sum(axis=1, keepdims=True)


def proposed(head: Head, t: float) -> Run:
    """Errors are the bounds times a factor that rows with exact weights tell: two of each of 16 blocks."""
    mass, bound = bounds_of(head)
    norm2 = np.sum((head.out + head.offset).astype(float) ** 2, axis=2)
    kept = chosen(head, bound, (AIM * t) ** 2 * norm2.mean() * head.queries)
    e2, u2 = outcome(head, kept, mass, bound)
    pairs = head.visible.sum()
    run = Run(head.name, t, float(kept.sum() / pairs), float(np.sqrt(e2.sum() / head.norm2)) / t)
    n, rows = SAMPLED[0] * SAMPLED[1], head.queries // SAMPLED[1]
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        blocks = ((np.arange(SAMPLED[0]) + rng.random(SAMPLED[0])) * head.A / SAMPLED[0]).astype(int)
        a = blocks.repeat(SAMPLED[1])
        r = np.tile(np.arange(SAMPLED[1]) * rows, SAMPLED[0]) + rng.integers(0, rows, n)
        spent = float(u2[a, r].sum())
        factor = max(float(np.sqrt(e2[a, r].sum() / spent)), LEAST_FACTOR) if spent > 0 else 1.0
        budget = (AIM * t / factor) ** 2 * norm2[a, r].mean() * head.queries
        kept = chosen(head, bound, budget)
        after, limits = outcome(head, kept, mass, bound)
        total = max(float(after.sum()), 1e-30)
        run.factor.append(factor)
        run.kept.append(float(kept.sum() / pairs))
        run.error.append(float(np.sqrt(total / head.norm2)) / t)
        again = ((np.arange(n) + rng.random(n)) * head.rows / n).astype(int)
        run.uniform.append(float(np.sqrt(after.ravel()[again].mean() * head.rows / total)))
        spots, chance = drawn(limits.ravel(), n, rng)
        run.weighted.append(float(np.sqrt(np.mean(after.ravel()[spots] / chance) / total)))
        run.alone.append(alone(head, bound[a, :, r], a, budget / head.queries))
    return run


def drawn(u2: Array, n: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Systematic sample of rows by squared bounds, and a little of all rows; with each one's chance."""
    chance = 0.75 * u2 / max(float(u2.sum()), 1e-30) + 0.25 / len(u2)
    spots = np.searchsorted(np.cumsum(chance), (np.arange(n) + rng.random(n)) / n * chance.sum())
    spots = np.minimum(spots, len(u2) - 1)
    return spots, chance[spots]


def alone(head: Head, bound: Array, a: Array, budget: float) -> float:
    """Mean share of its visible blocks that a sampled row needs when it alone decides."""
    free = head.visible[a] & ~head.always[a]
    spent = np.cumsum(np.sort(np.where(free, bound, 0), axis=1), axis=1) ** 2
    needs = np.sum(spent > budget, axis=1) + head.always[a].sum(axis=1)
    return float(np.mean(needs / head.visible[a].sum(axis=1)))


def needles_in_run(head: Head, found: Needles, t: float) -> tuple[int, float, float]:
    """How many are dropped where no sampled row saw one, the error, and what 32 rows drawn by bounds see."""
    run = proposed(head, t)
    mass, bound = bounds_of(found.head)
    budget = (AIM * t / float(np.median(run.factor))) ** 2 * head.norm2 / head.rows * head.queries
    kept = chosen(found.head, bound, budget)
    e2, u2 = outcome(found.head, kept, mass, bound)
    total = max(float(e2.sum()), 1e-30)
    spots, chance = drawn(u2.ravel(), SAMPLED[0] * SAMPLED[1], np.random.default_rng(0))
    sees = float(np.sqrt(np.mean(e2.ravel()[spots] / chance) / total))
    return sum(not kept[a, j] for a, j in found.pairs), float(np.sqrt(total / found.head.norm2)), sees


# ---- needles ----


@dataclass(frozen=True)
class Needles:
    head: Head
    pairs: list[tuple[int, int]]  # block of queries, block of keys


def needles(head: Head, blocks: list[int], above: float = 6) -> Needles:
    """The head with one query of each given block turned to one key of an earlier block.

    It is the block that looks least by its centroid, and the key's score is that far above the logarithm of
    the sum of all others. The query stands at no stride.
    """
    q, pairs = head.q.copy(), []
    for a in blocks:
        j = int(np.argmin(by_centroid(head)[a, 1 : a * head.queries // BLOCK - 1])) + 1
        key = head.keys[j][np.argmax(np.sum((head.keys[j] - head.centroid[j]) ** 2, axis=1))]
        others = head.k[: a * head.queries]
        s = others[np.any(others != key, axis=1)] @ key / np.linalg.norm(key)
        length = float(np.linalg.norm(key))
        size = 1.0
        while size < 1e4 and size * length < above + size * s.max() + np.log(
            np.exp(size * (s - s.max())).sum()
        ):
            size *= 1.05
        q[a * head.queries + head.queries // 2 + 2] = size * key / length
        pairs.append((a, j))
    name = f"{head.name}, {len(blocks)} needles"
    return Needles(Head(name, q * np.sqrt(head.D), head.k, head.v + head.offset, head.queries), pairs)


def lost(head: Head, found: Needles, method: Method, share: float) -> tuple[int, float]:
    """How many a rule drops that has the threshold of the head without them, and the error then."""
    number, changed = method.number(head), method.number(found.head)
    free = head.visible & ~head.always
    count = max(round(share * head.visible.sum()) - int(head.always.sum()), 0)
    ordered = np.sort(number[free])[::-1]
    threshold = np.inf if count == 0 else ordered[min(count, len(ordered)) - 1]
    kept = (changed >= threshold) & head.visible | head.always
    weight = method.weight(found.head) if method.weight else None
    squares = sum(float(found.head.squares(i, kept[i : i + 1], weight).sum()) for i in range(head.A))
    return sum(not kept[a, j] for a, j in found.pairs), float(np.sqrt(squares / found.head.norm2))


# ---- heads with and without structure ----


def diffuse(S: int) -> Heads:
    """Nearly equal weights: a needle among these rows has most of the output."""
    heads = gaussian(0.01, S, S, causal=True)
    return Heads("diffuse", heads.query, heads.key, heads.value, heads.options)


SETS: dict[str, Callable[[], Iterator[Heads]]] = {
    "bytelm 4096": lambda: bundled(4096),
    "bytelm 8192": lambda: bundled(8192),
    "bytelm 16384": lambda: bundled(16384),
    "built": lambda: iter([topics(16384)]),
    "diffuse": lambda: iter([diffuse(4096)]),
    "Gaussian": lambda: iter([gaussian(1.5, 4096, 4096, causal=True)]),
}
NEEDLE_HEADS = ("bytelm 4096, layer 1, head 3", "bytelm 4096, layer 0, head 1", "diffuse")


# ---- measurement and output ----


@dataclass
class Measured:
    """Of one set: an entry for each head."""

    set: str
    heads: list[str] = field(default_factory=list)
    shares: dict[str, list[list[float]]] = field(default_factory=dict)
    errors: dict[str, list[list[float]]] = field(default_factory=dict)
    bounds: dict[str, list[list[float]]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    needles: list[tuple[str, str, int, float, int, float]] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)  # of the error with needles, by 32 rows drawn by bounds

    def peaked(self) -> Array:
        """The six heads that need least."""
        return np.argsort([one[1] for one in self.shares["oracle, by error"]], kind="stable")[:6]


def measure(name: str, queries: int, methods: list[str], bounds: list[str]) -> Measured:
    found = Measured(name)
    for head in heads_of(SETS[name](), queries):
        print(head.name, file=sys.stderr, flush=True)
        found.heads.append(head.name)
        seeks = head.name in NEEDLE_HEADS
        some = ([3 * head.A // 4], list(range(head.A // 4, head.A))) if seeks else ()
        hidden = [needles(head, blocks) for blocks in some]
        for label in methods:
            method = METHODS[label]
            weight = method.weight(head) if method.weight else None
            share, error = head.needed(method.number(head), weight)
            found.shares.setdefault(label, []).append(share)
            found.errors.setdefault(label, []).append(error.tolist())
            for one in hidden:
                for t, level in zip(TOLERANCES, share, strict=True):
                    gone = lost(head, one, method, level)
                    found.needles.append((head.name, label, len(one.pairs), t, *gone))
        for label in bounds:
            found.bounds.setdefault(label, []).append(certified(head, BOUNDS[label](head)))
        found.runs += [proposed(head, t) for t in TOLERANCES]
        for one, t in ((one, t) for one in hidden for t in TOLERANCES):
            gone_in_run, after, sees = needles_in_run(head, one, t)
            label = "budget from executed scores"
            found.needles.append((head.name, label, len(one.pairs), t, gone_in_run, after))
            found.seen.append(sees)
    return found


def speedup(shares: Array, cost: float) -> float:
    """Of all heads together, each dense where that is cheaper."""
    return len(shares) / float(np.minimum(1, shares + cost * (shares < 1)).sum())


def show(found: Measured) -> None:
    peaked = found.peaked()
    several = len(found.heads) > 6
    header = ["rule + stand-in", *(f"{t:g}" for t in TOLERANCES)]
    header += [f"six, {t:g}" for t in TOLERANCES] if several else []
    header += ["cost", *(f"speed-up, {t:g}" for t in TOLERANCES)]
    rows = []
    for label, each in found.shares.items():
        shares = np.array(each)
        cost = METHODS[label].cost
        cells = [*shares.mean(axis=0), *(shares[peaked].mean(axis=0) if several else [])]
        speeds = [f"{speedup(shares[:, i], cost):.2f}" for i in range(len(TOLERANCES))]
        rows.append([label, *(f"{x:.3f}" for x in cells), f"{cost:.4f}", *speeds])
    show_table(f"{found.set}: share of pairs computed, {len(found.heads)} heads", header, rows)
    if found.bounds:
        rows = [[label, *(f"{x:.3f}" for x in np.mean(each, axis=0))] for label, each in found.bounds.items()]
        show_table(f"{found.set}: the same for the bound to certify it", header[: len(TOLERANCES) + 1], rows)
    rows = []
    for t in TOLERANCES:
        runs = [run for run in found.runs if run.tolerance == t]
        names = ("kept", "error", "factor", "uniform", "weighted", "alone")
        kept, error, factor, uniform, weighted, single = (
            np.array([getattr(run, name) for run in runs]) for name in names
        )
        plain = max(run.plain_error for run in runs)
        rows.append(
            [
                f"{t:g}",
                f"{np.mean([run.plain_kept for run in runs]):.3f} ({plain:.2f})",
                f"{kept.mean():.3f}",
                f"{kept[peaked].mean():.3f}" if several else "",
                f"{np.median(error):.2f} ({error.max():.2f})",
                f"{np.mean(error > 1):.1%}",
                "{:.2f}-{:.2f}".format(*np.quantile(factor, (0, 1))),
                *("{:.2f}, {:.2f}".format(*np.quantile(x, (0.01, 0.5))) for x in (uniform, weighted)),
                f"{single.mean():.3f}",
            ]
        )
    header = ["", "factor 1", "kept", "six", "error/t", "misses", "factor", "uniform", "by bound", "alone"]
    show_table(f"{found.set}: budget from executed scores, {DRAWS} draws", header, rows)
    if found.needles:
        rows = []
        for label in dict.fromkeys(one[1] for one in found.needles):
            cells = [label]
            for only in (True, False):
                of = [one for one in found.needles if one[1] == label and (one[2] == 1) == only]
                dropped, all_of = sum(one[4] for one in of), sum(one[2] for one in of)
                cells += [f"{dropped} of {all_of}", f"{max(one[5] / one[3] for one in of):.2f}"]
            rows.append(cells)
        header = ["rule", "one row: lost", "error/t, most", "one in each block: lost", "error/t, most"]
        show_table("needles", header, rows)
        print(f"of the errors with needles, 32 rows drawn by bounds see {min(found.seen):.2f} at least")


def plot(folder: Path, sets: list[Measured]) -> None:
    """Median error of the heads against the share that is computed, a panel for each set."""
    figure, axes = draw(max(8, 4.2 * len(sets)), 5, len(sets), sharey=True)
    for axis, one in zip(axes, sets, strict=True):
        for label, (color, style) in DRAWN.items():
            if label in one.errors:
                error = np.median(one.errors[label], axis=0)
                axis.plot(SHARES, np.maximum(error, 1e-5), style, color=color, label=label)
        for t in TOLERANCES:
            axis.axhline(AIM * t, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(0.03, 1.05)
        axis.set_ylim(1e-3, 1)
        axis.set_title(one.set, fontsize=11)
        axis.set_xlabel("share of pairs computed")
    axes[0].set_ylabel("relative error, median of the heads")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, folder, "sparsity")


DRAWN = {
    "oracle, by error": ("#000000", "-"),
    "pooled queries and keys": ("#0072B2", "--"),
    "8 queries, mean": ("#E69F00", "--"),
    "antidiagonals, 8": ("#CC79A7", "--"),
    "centroids + centroids": ("#0072B2", "-"),
    "centroids + variance": ("#D55E00", "-"),
    "int8 + same": ("#009E73", "-"),
    "int8, half of D + same": ("#56B4E9", "-"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), metavar="SET")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="RULE")
    parser.add_argument("--bounds", nargs="*", choices=list(BOUNDS), default=list(BOUNDS), metavar="BOUND")
    parser.add_argument("--queries", type=int, default=64, help="in a block")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, with every head")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="sparsity.png and sparsity.svg")
    args = parser.parse_args()

    methods = list(dict.fromkeys(["oracle, by error", *args.methods]))
    sets = []
    for name in args.sets:
        sets.append(measure(name, args.queries, methods, args.bounds))
        show(sets[-1])
    if args.json:
        measurements = [vars(one) | {"runs": [vars(run) for run in one.runs]} for one in sets]
        write_json(args.json, queries=args.queries, shares=SHARES, measurements=measurements)
    if args.plot:
        plot(args.plot, sets)


if __name__ == "__main__":
    main()
