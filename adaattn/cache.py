"""The KV cache: keys and values kept in a narrow dtype between the steps of generation."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _adaattn
from .api import _given, attention
from .codes import code_places
from .errors import ArgumentError, DTypeError, ShapeError
from .pages import Pages
from .stats import POLICIES, Plan

_Array = NDArray[Any]

PAGE = 64  # tokens that share a mean and a scale, and by which a cache's capacity grows

# The dtype that each name is kept in, and the relative error of attention that storing in it is predicted to
# cost at most (standard normal keys and values); "auto" takes the last one that the tolerance allows.
STORED: Mapping[str, tuple[Any, float]] = MappingProxyType(
    {
        "fp32": (np.float32, 0.0),
        "fp16": (np.float16, 1e-3),
        "bf16": (np.uint16, 8e-3),
        "int8": (np.uint8, 3e-2),
    }
)


# Root mean square of the rounding to a dtype, relative to what is rounded.
ROUNDING = {"fp16": 2.1e-4, "bf16": 1.65e-3}


# Calls that codes may serve, as in the engine's certify.h: the tightest tolerance, the fewest tokens, the
# most queries and queries that share a key head.
CODED_TOLERANCE, CODED_TOKENS, CODED_QUERIES, CODED_ROWS = 8e-3, 2048, 16, 32


class Stored(tuple[Any, ...]):
    """Keys or values as the engine reads them: dtype name, (B, G, capacity, width) array and, for int8,
    scales, means, open pages and the latter's numbers; then figures of the tokens (cache.h). Where pages have
    codes beside them, these follow: codes, scales, centres, norms and for each sequence how many pages have
    some."""

    __slots__ = ()


class Codes(NamedTuple):
    """Of the keys' or values' full pages: 8-bit numbers, which count in scales of their page and coordinate
    from its centre, others that refine them, and bounds of what they leave out (codes.h)."""

    code: NDArray[np.uint8]  # (B, G, pages, PAGE * width), the latter rounded up
    fine: NDArray[np.uint8]  # the same
    scale: NDArray[np.float32]  # (B, G, pages, width)
    centre: NDArray[np.float32]  # (B, G, pages, width)
    norms: NDArray[np.float32]  # (B, G, pages, 7)
    coded: NDArray[np.int64]  # (B,) pages that have some; the same array on both sides


class KVCache:
    """Keys and values of the tokens so far, for generation.

    Parameters
    ----------
    batch, kv_heads, head_size : int
        B, G and D of the keys.
    value_size : int, optional
        E of the values; default `head_size`.
    capacity : int
        Tokens per sequence that there is room for at first; it grows by doubling, in pages of 64.
    dtype : "fp32", "fp16", "bf16", "int8" or "auto"
        What tokens are kept in. "auto" goes by the tolerance: int8 from 3e-2, bf16 from 8e-3, fp16 from 1e-3
        on, else fp32. These are predictions for well-behaved data, not measurements.
    tolerance : float, optional
        Relative error that storing may cost. A dtype that is predicted to cost more is refused.
    verify_every : int, optional
        Every so many calls of `attention` within a tolerance one is verified whatever its number of queries,
        as ``verify=True`` does; default none. The others, of fewer than 64 queries, are predicted only. A
        call that says ``verify`` itself is as it says, and counts.
    device : "cuda" or "cuda:N", optional
        Keep the tokens on that GPU, where keys, values and queries then lie. Default: the CPU.

    Raises
    ------
    ArgumentError, DTypeError, DeviceError
        Naming the argument, what was expected and what came.

    Notes
    -----
    int8 keeps pages of 64 tokens, each coordinate counted from its mean over the page (in bfloat16), with one
    scale per page and head, rounded to nearest. The page that is not full yet stays in float32: its tokens
    cost no accuracy until it is full. A page that `truncate` opens again keeps the error that storing it has
    cost.

    Within a tolerance of 8e-3 and more, up to 16 new queries on an fp32 cache of 2,048 tokens and more read a
    part of it. Beside each full page lie 8-bit codes of its numbers, 8-bit codes that refine these, and
    bounds of what both leave out; they are made on the first such call, take 0.56 times the cache's own
    memory, and are kept up by `append`, `truncate` and `reorder`. Codes of all keys are read; then a page
    counts by the mean of its values, by their codes, or by fine codes of keys and values, as the tolerance
    asks. What that may have moved is bounded: a report's ``error_bound`` is certified, not estimated, its
    ``structure`` is "sparse" and its ``kept_fraction`` the bytes read, relative to all. Heads for which more
    than half would have to be read, that hold NaN, infinities or numbers above 1e15, or with dropout, a
    precision or a structure by name are computed as without codes.

    A verified call compares all of its rows (32 of them where there are more) with exact ones in float64 over
    what is stored: ``verified_rows`` and ``measured_error`` of its report say so, and a head that misses the
    tolerance is computed again in fp64. Heads that are read in part have a certified bound instead.

    Numbers that the dtype cannot hold are refused when they are appended. NaN and infinities are kept, but
    refused by int8, where they would spoil the other tokens of their page.

    On a GPU tokens lie in pages of 64 that a table finds, so that nothing is copied as the cache grows; the
    library of the first key makes their memory, by half as much again when it runs out. `reorder` copies no
    page before one of its owners writes to it, and `truncate` gives pages back. Nothing waits for the GPU,
    so no number is looked at: what the dtype cannot hold becomes infinite, and what is not finite makes NaN
    of all tokens of its int8 page. Pages are made as on the CPU, to the bit, and up to 16 queries of the
    heads that share keys are computed from them in fp32, as they are. More queries, float64 ones, a tolerance
    and a precision by name other than fp32 take arrays of the tokens, which each call makes: of query's
    dtype, or of float32 for half queries on a cache of another dtype. Nothing is read in part. Head sizes go
    up to 256. Pages are written and freed in the order of the stream that is current: use a cache on one.

    Examples
    --------
    >>> import numpy as np, adaattn
    >>> cache = adaattn.KVCache(1, 2, 64, dtype="bf16")
    >>> key, value = np.random.default_rng(0).standard_normal((2, 1, 2, 10, 64), dtype=np.float32)
    >>> cache.append(key, value)
    >>> query = np.ones((1, 8, 1, 64), np.float32)
    >>> cache.attention(query).shape
    (1, 8, 1, 64)
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_size: int,
        value_size: int | None = None,
        *,
        capacity: int = PAGE,
        dtype: str = "fp32",
        tolerance: float | None = None,
        verify_every: int | None = None,
        device: str | None = None,
    ) -> None:
        self._batch = _size("batch", batch)
        self._heads = _size("kv_heads", kv_heads)
        self._widths = [_size("head_size", head_size)]
        self._widths.append(self._widths[0] if value_size is None else _size("value_size", value_size))
        self._capacity = -(-_size("capacity", capacity) // PAGE) * PAGE
        self._dtype, self._tolerance = _choose(dtype, tolerance)
        self._verify_every = None if verify_every is None else _size("verify_every", verify_every)
        self._calls = 0  # within a tolerance
        self._lengths = np.zeros(self._batch, np.int64)
        self._pages: Pages | None = None
        if device is not None:
            for name, width in zip(("head_size", "value_size"), self._widths, strict=True):
                if width > 256:
                    raise ArgumentError(f"{name}: expected at most 256 on a GPU, got {width}")
            sizes = (self._batch, self._heads, self._widths, self._capacity)
            self._pages = Pages(device, self._dtype, *sizes)
        else:
            self._key, self._value = (self._allocate(side, self._capacity) for side in range(2))
        self._codes: list[Codes] | None = None

    def append(self, key: Any, value: Any, lengths: ArrayLike | None = None) -> None:
        """Add tokens behind those of each sequence: all of them, or none where an error is raised.

        Parameters
        ----------
        key, value : arrays of shape (B, G, N, D) and (B, G, N, E)
            float32, float16, bfloat16 or float64; NumPy arrays or anything on the CPU, or on the cache's GPU,
            that speaks DLPack.
        lengths : (B,) ints, optional
            How many of the N tokens count for each sequence (the first ones); default all.

        Raises
        ------
        ShapeError, DTypeError, ArgumentError, DeviceError
            Naming the argument, what was expected and what came.
        """
        pages = self._pages
        n = pages.count(key, value) if pages else _adaattn._cache_count(self._key, self._value, key, value)
        counts = self._per_sequence(n if lengths is None else lengths, np.full(self._batch, n))
        if pages:
            pages.append(key, value, self._lengths, counts)
            self._lengths = self._lengths + counts
            return
        needed = int((self._lengths + counts).max())
        capacity = self._capacity
        while capacity < needed:
            capacity *= 2
        if capacity > self._capacity:
            self._grow(capacity)
        _adaattn._cache_append(self._key, self._value, key, value, self._lengths, counts)
        self._set_lengths(self._lengths + counts)

    def attention(self, query: Any, **options: Any) -> Any:
        """Attention of the last T tokens of each sequence over all of its tokens; see `adaattn.attention`.

        Parameters
        ----------
        query : array of shape (B, H, T, D)
            float32, float16, bfloat16 or float64, whatever the cache is kept in; H is a multiple of G. Query
            i stands at position ``lengths - T + i``; one before the first token sees no key.
        **options
            Those of `adaattn.attention` but ``kv_lengths`` and ``query_offset``. ``causal`` is True unless
            given; masks are as wide as the longest sequence (at least 1).

        Returns
        -------
        As from `adaattn.attention`: the output is of query's dtype and kind of array. A report's
        ``measured_error`` compares with exact attention to what is stored; its ``stored_error`` is predicted
        from it, in a pass over the cache.
        """
        for name in ("key", "value", "kv_lengths", "query_offset"):
            if name in options:
                raise ArgumentError(
                    f"{name}: expected none since the cache sets it, got {type(options[name]).__name__}"
                )
        causal = options.get("causal")
        if isinstance(causal, str) and causal == "upper_left":
            raise ArgumentError(
                "causal: expected a bool or 'lower_right' since the cache sets the offset, got 'upper_left'"
            )
        sizes = getattr(query, "shape", ())
        shape = tuple(sizes) if isinstance(sizes, (tuple, list)) else ()
        fits = len(shape) == 4 and (shape[0], shape[1] % self._heads, shape[3]) == (
            self._batch,
            0,
            self._widths[0],
        )
        if len(shape) > 0 and not (fits and min(shape) > 0):
            wanted = f"({self._batch}, a multiple of {self._heads}, T, {self._widths[0]})"
            raise ShapeError(f"query: expected shape {wanted}, got {shape}")
        S = max(1, int(self._lengths.max()))
        key: Any
        value: Any
        if self._pages:
            self._pages.check("query", query)
            key = value = self._pages.paged(query, S)
        else:
            key, value = self._sides(S, shape, options)
        if self._verify_every and any(options.get(x) is not None for x in ("tolerance", "policy", "plan")):
            self._calls += 1
            if self._calls % self._verify_every == 0:
                options = {"verify": True} | options
        result = attention(
            query,
            key,
            value,
            **{"causal": True} | options,
            kv_lengths=self._lengths,
            query_offset=self._lengths - (shape[2] if shape else 0),
        )
        if not options.get("return_report"):
            return result
        stored = self._stored_error(query, options.get("scale"))
        return (*result[:-1], replace(result[-1], stored_error=stored))

    def _sides(self, S: int, shape: tuple[int, ...], options: Mapping[str, Any]) -> list[Stored]:
        """The CPU's first S tokens, with codes for a call that they may serve."""
        sides = [Stored((side[0], side[1][:, :, :S], *side[2:])) for side in (self._key, self._value)]
        if self._may_be_certified(shape, S, options):
            sides = [Stored((*side, of)) for side, of in zip(sides, self._code_pages(), strict=True)]
        return sides

    def truncate(self, lengths: ArrayLike) -> None:
        """Forget the tokens behind the first `lengths` of each sequence: an int, or (B,) ints, not above
        `lengths` now. int8: see the class's notes.

        Raises
        ------
        ShapeError, DTypeError, ArgumentError
            Naming the argument, what was expected and what came.
        """
        kept = self._per_sequence(lengths, self._lengths)
        if self._pages:
            self._pages.truncate(self._lengths, kept)
            self._lengths = kept
            return
        if self._dtype == "int8":
            for b in np.flatnonzero((kept // PAGE < self._lengths // PAGE) & (kept % PAGE > 0)):
                for side in (self._key, self._value):
                    _adaattn._cache_reopen(side, int(b), int(kept[b]) // PAGE)
        self._set_lengths(kept)
        for codes in self._codes or ():
            np.minimum(codes.coded, kept // PAGE, out=codes.coded)

    def reorder(self, indices: ArrayLike) -> None:
        """Replace sequence b by a copy of what was sequence ``indices[b]``, as beam search does.

        Parameters
        ----------
        indices : ints from 0 to B - 1, at least one
            The batch becomes as large as there are indices.

        Raises
        ------
        ShapeError, DTypeError, ArgumentError
            Naming the argument, what was expected and what came.
        """
        chosen = _integers("indices", indices)
        if chosen.ndim != 1 or chosen.size == 0:
            raise ShapeError(f"indices: expected one dimension of at least 1, got shape {chosen.shape}")
        if chosen.min() < 0 or chosen.max() >= self._batch:
            raise ArgumentError(f"indices: expected ints from 0 to {self._batch - 1}, got {chosen.tolist()}")
        if self._pages:
            self._pages.reorder(chosen.astype(np.intp))
            self._batch, self._lengths = len(chosen), self._lengths[chosen]
            return
        sides = [
            Stored((side[0], _chosen(side[1], chosen), *(x if x is None else x[chosen] for x in side[2:])))
            for side in (self._key, self._value)
        ]
        codes = self._codes
        if codes is not None:
            coded = codes[0].coded[chosen]
            codes = [Codes._make([*(x[chosen] for x in of[:-1]), coded]) for of in codes]
        self._key, self._value = sides
        self._codes = codes
        self._batch, self._lengths = len(chosen), self._lengths[chosen]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence: (B,) int64, a copy."""
        result: np.ndarray[Any, np.dtype[np.int64]] = self._lengths.copy()
        return result

    @property
    def capacity(self) -> int:
        """Tokens per sequence that there is room for now."""
        return self._pages.capacity if self._pages else self._capacity

    @property
    def dtype(self) -> str:
        """Name of what tokens are kept in; never "auto"."""
        return self._dtype

    @property
    def tolerance(self) -> float | None:
        """Relative error that storing may cost."""
        return self._tolerance

    @property
    def verify_every(self) -> int | None:
        """Calls within a tolerance of which one is verified; None: as each call says."""
        return self._verify_every

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys, values and what is known of them take, unused capacity among them."""
        if self._pages:
            return self._pages.nbytes
        arrays: list[Any] = [*self._key[1:], *self._value[1:]]
        for codes in self._codes or ():
            arrays += codes[:-1]
        return sum(x.nbytes for x in arrays if x is not None)

    def __repr__(self) -> str:
        sizes = f"{self._batch}, {self._heads}, {self._widths[0]}, {self._widths[1]}"
        device = f", device='cuda:{self._pages.device}'" if self._pages else ""
        return f"KVCache({sizes}, capacity={self.capacity}, dtype={self._dtype!r}{device})"

    def _stored_error(self, query: Any, scale: float | None) -> NDArray[np.float64]:
        """What storing is predicted to have cost a head, (B, H):
        scores count as normal, values as independent of their keys."""
        if self._dtype == "fp32":
            return np.zeros(tuple(map(int, query.shape[:2])))
        if self._pages:
            q = _adaattn._gpu_numbers(query).astype(np.float64)
            kept = self._pages.read(query, self._lengths)
        else:
            q = np.asarray(query.float() if hasattr(query, "float") else query).astype(np.float64)
        q2 = (q * (scale or self._widths[0] ** -0.5)) ** 2
        B, H, T, D = q2.shape
        error = np.zeros((B, H))
        for b, length in enumerate(self._lengths):
            if length == 0:
                continue
            if self._pages:
                both = [(kept[side][b, :, :length], kept[2][side, b]) for side in range(2)]
                (k, k_noise), (v, v_noise) = ((x, self._noise(x, steps)) for x, steps in both)
            else:
                (k, k_noise), (v, v_noise) = (self._decode(side, b) for side in (self._key, self._value))
            rows = q2[b].reshape(self._heads, -1, D)
            noise = np.einsum("gtd,gd->gt", rows, k_noise)
            spread = np.einsum("gtd,gd->gt", rows, k.var(axis=1, dtype=np.float64))
            largest = np.minimum(np.exp(np.minimum(spread, 30)) / length, 1)  # sum of the squared weights
            mean2 = np.sum(v.mean(axis=1, dtype=np.float64) ** 2, axis=1)[:, None]
            own2 = np.sum(v.var(axis=1, dtype=np.float64), axis=1)[:, None]
            moved = largest * (noise * own2 + v_noise.sum(axis=1)[:, None])
            out2 = mean2 + largest * own2
            moved, out2 = (x.reshape(H, T).sum(axis=1) for x in (moved, out2))
            error[b] = np.sqrt(np.divide(moved, out2, out=np.zeros(H), where=out2 > 0))
        return error

    def _decode(self, side: Stored, b: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Tokens of one sequence, (G, length, width), and the variance of their rounding, (G, width)."""
        length = int(self._lengths[b])
        name, data, scale, mean, open_page = side[:5]
        if self._dtype == "int8":
            closed, width = length // PAGE, mean.shape[3]
            steps, centres = scale[b, :, :closed, None], _from_bf16(mean[b, :, :closed])
            codes = data[b, :, : closed * PAGE].reshape(self._heads, closed, PAGE * data.shape[3])
            codes = codes[..., _code_places(name == "int8 values", width)].astype(np.float32)
            pages = ((codes - 128) * steps[..., None] + centres[:, :, None]).reshape(self._heads, -1, width)
            x = np.concatenate([pages, open_page[b, :, : length % PAGE]], axis=1)
            return x, self._noise(x, steps[..., 0])
        x = data[b, :, :length]
        x = _from_bf16(x) if self._dtype == "bf16" else x.astype(np.float32)
        return x, self._noise(x, None)

    def _noise(self, x: NDArray[np.float32], scales: Any) -> Any:
        """The variance of what rounding took from tokens (G, length, width): (G, width). scales: of pages of
        int8, of which the closed ones count."""
        if self._dtype == "int8":
            length = x.shape[1]
            steps = np.square(scales[:, : length // PAGE], dtype=np.float64)
            noise = PAGE / length / 12 * steps.sum(axis=1, keepdims=True)
            return np.broadcast_to(noise, (len(x), x.shape[2]))
        return ROUNDING[self._dtype] ** 2 * np.mean(np.square(x, dtype=np.float64), axis=1)

    def _may_be_certified(self, shape: tuple[int, ...], tokens: int, options: Mapping[str, Any]) -> bool:
        """Whether codes may serve a call; the engine has the last word."""
        tolerance, plan = options.get("tolerance"), options.get("plan")
        if isinstance(options.get("policy"), str):
            tolerance = POLICIES.get(options["policy"])
        elif isinstance(plan, Plan):
            tolerance = plan.tolerance
        return (
            self._dtype == "fp32"
            and not any(_given(options.get(name, "auto")) for name in ("precision", "structure"))
            and isinstance(tolerance, (int, float))
            and tolerance >= CODED_TOLERANCE
            and tokens >= CODED_TOKENS
            and len(shape) == 4
            and shape[2] <= CODED_QUERIES
            and shape[1] // self._heads * shape[2] <= CODED_ROWS
        )

    def _code_pages(self) -> list[Codes]:
        """Codes of all full pages: made where they are missing, which is the first call's or a new page's."""
        pages, old = self._capacity // PAGE, self._codes
        coded = np.zeros(self._batch, np.int64) if old is None else old[0].coded
        if old is None or old[0].scale.shape[2] < pages:
            head, codes = (self._batch, self._heads, pages), []
            for side, width in enumerate(self._widths):
                page = PAGE * _code_width(side, width)
                code, fine = (np.zeros((*head, page), np.uint8) for _ in range(2))
                scale, centre, norms = (np.zeros((*head, n), np.float32) for n in (width, width, 7))
                codes.append(Codes(code, fine, scale, centre, norms, coded))
            for before, after in zip(old or (), codes, strict=False):
                for i in range(5):
                    after[i][:, :, : before[i].shape[2]] = before[i]
            self._codes = codes
        else:
            codes = old
        until = self._lengths // PAGE
        if (until > coded).any():
            for values, (stored, of) in enumerate(zip((self._key, self._value), codes, strict=True)):
                _adaattn._cache_code(Stored((*stored, of)), bool(values), until)
            coded[:] = until
        return codes

    def _allocate(self, side: int, capacity: int) -> Stored:
        head, width = (self._batch, self._heads), self._widths[side]
        figures = np.zeros((*head, _figures(capacity // PAGE), 2 * width + 1), np.float32)
        if self._dtype != "int8":
            data = _zeros((*head, capacity, width), STORED[self._dtype][0])
            return Stored((self._dtype, data, None, None, None, None, figures))
        data = _zeros((*head, capacity, _code_width(side, width)), STORED[self._dtype][0])
        pages = capacity // PAGE
        scale, mean = np.zeros((*head, pages), np.float32), np.zeros((*head, pages, width), np.uint16)
        open_page = self._lengths // PAGE
        open_ = np.zeros((*head, PAGE, width), np.float32)
        return Stored((f"int8 {('keys', 'values')[side]}", data, scale, mean, open_, open_page, figures))

    def _grow(self, capacity: int) -> None:
        sides = []
        for side, old in enumerate((self._key, self._value)):
            new = self._allocate(side, capacity)
            for i in (1, 2, 3, 4, 6):
                if old[i] is not None:
                    new[i][:, :, : old[i].shape[2]] = old[i]
            sides.append(new)
        self._key, self._value = sides
        self._capacity = capacity

    def _set_lengths(self, lengths: NDArray[np.int64]) -> None:
        self._lengths = lengths
        if self._dtype == "int8":
            for side in (self._key, self._value):
                side[5][:] = lengths // PAGE

    def _per_sequence(self, lengths: ArrayLike, most: NDArray[np.int64]) -> NDArray[np.int64]:
        x = _integers("lengths", lengths)
        if x.ndim > 0 and x.shape != (self._batch,):
            raise ShapeError(f"lengths: expected an int or shape ({self._batch},), got {x.shape}")
        x = np.broadcast_to(x, self._batch)
        for given, limit in zip(x.tolist(), most.tolist(), strict=True):
            if not 0 <= given <= limit:
                raise ArgumentError(f"lengths: expected an int from 0 to {limit}, got {given}")
        return x.astype(np.int64)


def _zeros(shape: tuple[int, ...], dtype: Any) -> _Array:
    """As NumPy's, from the start of a cache line on: vectors that span two take longer to read."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    result: _Array = memory[start : start + size].view(dtype).reshape(shape)
    return result


def _chosen(x: _Array, rows: NDArray[np.intp]) -> _Array:
    """A copy of these rows, from the start of a cache line on."""
    result = _zeros((len(rows), *x.shape[1:]), x.dtype)
    return np.take(x, rows, axis=0, out=result, mode="clip")  # others buffer a second copy


def _figures(pages: int) -> int:
    """How many figures tokens of so many full pages have: cache.h's ada_last_figures, and the first."""
    return (6 + pages if pages < 4 else 10) if pages < 8 else 10 + pages // 8


def _code_width(side: int, width: int) -> int:
    """Codes of a token: those of keys come in fours, of values in sixteens."""
    unit = 16 if side else 4
    return -(-width // unit) * unit


def _code_places(values: bool, width: int) -> NDArray[np.intp]:
    """Where the codes of a page lie, (PAGE, width): lanes are tokens for keys and coordinates for values."""
    padded = _code_width(values, width)
    places = code_places(padded, PAGE).T if values else code_places(PAGE, padded)
    return places[:, :width]


def _from_bf16(x: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        size = None
    if size is None or isinstance(value, bool):
        raise DTypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not 1 <= size < 2**40:
        raise ArgumentError(f"{name}: expected an int of at least 1, got {size}")
    return size


def _integers(name: str, values: ArrayLike) -> _Array:
    try:
        array = np.asarray(values)
    except Exception:
        array = None
    if array is None or array.dtype.kind not in "iu":
        kind = type(values).__name__ if array is None else array.dtype
        raise DTypeError(f"{name}: expected integers, got {kind}")
    return array


def _choose(dtype: Any, tolerance: Any) -> tuple[str, float | None]:
    if tolerance is not None:
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float, np.floating, np.integer)):
            raise DTypeError(f"tolerance: expected a number or None, got {type(tolerance).__name__}")
        tolerance = float(tolerance)
        if not 0 < tolerance < np.inf:
            raise ArgumentError(f"tolerance: expected a finite number above 0, got {tolerance:g}")
    if not isinstance(dtype, str):
        raise DTypeError(f"dtype: expected a string, got {type(dtype).__name__}")
    if dtype not in (*STORED, "auto"):
        raise ArgumentError(f"dtype: expected 'auto', 'fp32', 'fp16', 'bf16' or 'int8', got {dtype!r}")
    if dtype == "auto":
        return [name for name, (_, cost) in STORED.items() if cost <= (tolerance or 0)][-1], tolerance
    if tolerance is not None and STORED[dtype][1] > tolerance:
        raise ArgumentError(
            f"dtype: expected one that is predicted to cost at most {tolerance:g}, got {dtype!r} with "
            f"{STORED[dtype][1]:g}"
        )
    return dtype, tolerance
