"""Pages of a KV cache on a GPU: which sequence has which, in memory that the library of its tokens made."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _adaattn
from .api import _allocate
from .errors import DeviceError
from .gpu import _devices, _ordinal_of, device_of, owner_of_stream

PAGE = 64  # tokens
_OPEN = 0  # the column of the table where open pages stand; others are the pages in their order

_Vector = NDArray[np.int64]


class Paged(tuple[Any, ...]):
    """Keys and values as the engine finds them: dtype name, address of the table, its columns, B, G, D, E,
    tokens of the longest sequence, device."""

    __slots__ = ()


class _Turns:
    """The stream on which pages were used last. What comes on another waits for it, unless a CUDA graph is
    captured, whose work is not done yet and must wait for nothing outside: then later ones do."""

    def __init__(self, device: int) -> None:
        self.device, self.stream, self.owner = device, 0, None
        self._last: dict[int, Any] = {}  # the owners of the streams to wait for: that one, and captured ones

    def take(self, like: Any) -> None:
        """The library of this array works on the pages now."""
        stream = _adaattn._store_stream(like)
        if stream == self.stream and len(self._last) == 1:
            return
        if self.order(stream):
            kept = {x: owner for x, owner in self._last.items() if self._is_captured(x)}
            self.stream, self.owner = stream, owner_of_stream(like)
            self._last = kept | {stream: self.owner}

    def order(self, later: int) -> bool:
        """Let a stream wait for the last uses; False: it may not."""
        if self._is_captured(later):
            return False
        for earlier in self._last:
            if earlier != later and not self._is_captured(earlier):
                _adaattn._gpu_order(self.device, earlier, later)
        return True

    def _is_captured(self, stream: int) -> bool:
        return _adaattn._gpu_captured(self.device, stream)


class _Memory:
    """Floats that the library of an array made on the stream of this turn. The library gives them to the next
    one there, so that stream waits for their last use in the end."""

    def __init__(self, turns: _Turns, like: Any, n: int) -> None:
        self._turns, self._stream, self._owner = turns, turns.stream, turns.owner
        self.array = _allocate(like, (n,), "float32")
        self.address = _adaattn._store_address(self.array)

    def __del__(self) -> None:
        if self._stream != self._turns.stream:
            with suppress(DeviceError):  # there is nobody to tell
                self._turns.order(self._stream)


class Pages:
    """Tables of pages. Sequences may share a page, until one of them writes to it."""

    def __init__(
        self, device: Any, dtype: str, batch: int, heads: int, widths: list[int], capacity: int
    ) -> None:
        self.device = _ordinal_of(device)
        if self.device >= len(_devices()):
            raise DeviceError(
                f"device: expected one of {len(_devices())} that the CUDA runtime finds, got {device!r}"
            )
        self._dtype, self._heads, self._widths = dtype, heads, widths
        self._bytes = dict(zip((False, True), _adaattn._store_bytes(dtype, heads, *widths), strict=True))
        self._host = np.zeros((batch, 1 + capacity // PAGE), np.uint64)
        self._table: _Memory | None = None  # the same on the device
        self._turns = _Turns(self.device)
        # What the device does not know yet: places of the table, and pages (to, from, whether open) to copy.
        self._unsent: set[int] = set()
        self._copies: list[tuple[int, int, bool]] = []
        self._pool: list[_Memory] = []
        self._count = {False: 0, True: 0}  # pages of the pool; True: open ones
        self._free: dict[bool, list[int]] = {False: [], True: []}
        self._shared: dict[int, int] = {}  # how many sequences have a page, if more than one
        self._room = np.zeros(batch, np.int64)  # tokens that there are pages for

    @property
    def capacity(self) -> int:
        """Tokens per sequence that the table has room for."""
        return (self._host.shape[1] - 1) * PAGE

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory."""
        table = 0 if self._table is None else self._host.nbytes
        return table + sum(n * self._bytes[is_open] for is_open, n in self._count.items())

    def paged(self, like: Any, tokens: int) -> Paged:
        """For a call on what is there; like: an array of the library that makes memory."""
        self._turns.take(like)
        table = self._send(like)
        B, columns = self._host.shape
        return Paged(
            (self._dtype, table.address, columns, B, self._heads, *self._widths, tokens, self.device)
        )

    def check(self, name: str, array: Any) -> None:
        """Refuse what does not lie on the cache's device."""
        if isinstance(array, np.ndarray) or device_of(array) != self.device:
            raise DeviceError(
                f"{name}: expected an array on CUDA device {self.device}, where the cache lies, got "
                f"{type(array).__name__}{_place(array)}"
            )

    def count(self, key: Any, value: Any) -> int:
        """How many tokens these arrays have, which fit."""
        self.check("key", key)
        self.check("value", value)
        paged = Paged((self._dtype, 0, 1, len(self._host), self._heads, *self._widths, 1, self.device))
        return _adaattn._store_count(paged, key, value)

    def append(self, key: Any, value: Any, lengths: _Vector, counts: _Vector) -> None:
        """Write the first counts[b] tokens behind the first lengths[b] ones."""
        self._turns.take(key)
        after = lengths + counts
        if self._shared or (after > self._room).any() or self._table is None:
            self._prepare(key, lengths, after)
        _adaattn._store_append(self.paged(key, 1), key, value, lengths, counts)

    def truncate(self, lengths: _Vector, kept: _Vector) -> None:
        """Give back what lies behind the first kept[b] tokens."""
        reopened = np.flatnonzero((kept // PAGE < lengths // PAGE) & (kept % PAGE > 0))
        if self._dtype == "int8" and reopened.size:
            like = self._pool[0].array
            self._turns.take(like)
            for b in reopened:
                self._own(like, b, _OPEN, True)
            _adaattn._store_reopen(like, self.paged(like, 1), reopened, kept[reopened] // PAGE)
        for b in np.flatnonzero(kept < lengths):
            self._drop(b, 1 - (-int(kept[b]) // PAGE))

    def reorder(self, chosen: NDArray[np.intp]) -> None:
        """Make sequence b what chosen[b] was."""
        before = {bool(c == _OPEN): np.unique(x[x > 0]) for c, x in self._columns()}
        self._host, self._room = self._host[chosen], self._room[chosen]
        found, counts = np.unique(self._host[self._host > 0], return_counts=True)
        for is_open, pages in before.items():
            self._free[is_open] += np.setdiff1d(pages, found).tolist()
        self._shared = {int(x): int(n) for x, n in zip(found, counts, strict=True) if n > 1}
        self._table = None

    def read(self, like: Any, lengths: _Vector) -> tuple[Any, Any, Any]:
        """Keys, values and the scales of int8 pages, on the CPU."""
        return _adaattn._store_read(like, self.paged(like, max(1, int(lengths.max()))), lengths)

    def _columns(self) -> Any:
        return ((_OPEN, self._host[:, _OPEN]), (1, self._host[:, 1:]))

    def _prepare(self, like: Any, lengths: _Vector, after: _Vector) -> None:
        """Pages for these tokens, that nobody else has."""
        needed = -(-int(after.max()) // PAGE)
        capacity = self._host.shape[1] - 1
        if capacity < needed:
            while capacity < needed:
                capacity *= 2
            host = np.zeros((len(self._host), 1 + capacity), np.uint64)
            host[:, : self._host.shape[1]] = self._host
            self._host, self._table = host, None
        for b in np.flatnonzero(after > lengths):
            first, last = int(lengths[b]) // PAGE, (int(after[b]) - 1) // PAGE
            if self._dtype == "int8":
                self._own(like, b, _OPEN, bool(lengths[b] % PAGE))
            for page in range(first, last + 1):
                holds = page == first and lengths[b] % PAGE > 0 and self._dtype != "int8"
                self._own(like, b, 1 + page, bool(holds))
            self._room[b] = max(self._room[b], (last + 1) * PAGE)

    def _own(self, like: Any, b: Any, column: int, holds: bool) -> None:
        """Give a sequence a page of its own there; holds: tokens that it keeps lie in the old one."""
        old, is_open = int(self._host[b, column]), column == _OPEN
        if old and old not in self._shared:
            return
        if not self._free[is_open]:
            self._enlarge(like, is_open)
        new = self._free[is_open].pop()
        if old:
            self._leave(old)
        if old and holds:
            self._copies.append((new, old, is_open))
        self._host[b, column] = new
        self._unsent.add(int(b) * self._host.shape[1] + column)

    def _leave(self, page: int) -> bool:
        """One sequence less has a page; whether it was the last."""
        if page not in self._shared:
            return True
        self._shared[page] -= 1
        if self._shared[page] == 1:
            del self._shared[page]
        return False

    def _drop(self, b: Any, first: int) -> None:
        """Take the pages from this column on from a sequence."""
        for column in np.flatnonzero(self._host[b, first:]) + first:
            page = int(self._host[b, column])
            if self._leave(page):
                self._free[False].append(page)
            self._host[b, column] = 0
        self._room[b] = min(int(self._room[b]), (first - 1) * PAGE)

    def _enlarge(self, like: Any, is_open: bool) -> None:
        """More pages: as many as the capacity asks for at first, then half as many as there are."""
        B, columns = self._host.shape
        n, nbytes = self._count[is_open], self._bytes[is_open]
        more = max(n // 2, B) if n else B * (1 if is_open else columns - 1)
        memory = _Memory(self._turns, like, more * nbytes // 4)
        first = memory.address
        self._pool.append(memory)
        self._count[is_open] += more
        self._free[is_open] += range(first + (more - 1) * nbytes, first - 1, -nbytes)

    def _send(self, like: Any) -> _Memory:
        """Tell the device what it does not know; returns the table."""
        for is_open in (False, True):
            while own := [copy for copy in self._copies if copy[2] == is_open]:
                n = _independent(own)
                to, source = (np.array(x, np.uint64) for x in list(zip(*own[:n], strict=True))[:2])
                _adaattn._store_copy(like, to, source, self._bytes[is_open])
                self._copies = own[n:] + [copy for copy in self._copies if copy[2] != is_open]
        if self._table is None:
            self._table = _Memory(self._turns, like, self._host.size * 2)
            self._unsent = set(np.flatnonzero(self._host).tolist())
        if self._unsent:
            at = np.fromiter(sorted(self._unsent), np.int64)
            _adaattn._store_set(like, self._table.address, at, self._host.reshape(-1)[at])
            self._unsent = set()
        return self._table


def _independent(copies: list[tuple[int, int, bool]]) -> int:
    """How many of the first ones may be done at once, in any order: what one writes no other one touches."""
    written: set[int] = set()
    read: set[int] = set()
    for n, (to, source, _) in enumerate(copies):
        if {to, source} & written or to in read:
            return n
        written.add(to)
        read.add(source)
    return len(copies)


def _place(array: Any) -> str:
    device = device_of(array)
    return "" if device is None else f" on device {device}"
