"""Own the digests of source files: of a whole file on all cores, as it was recorded, and behind the readers of a build.

The definition, chunks of 64 MiB and a digest over their digests, is in cache/key.py; here is how the bytes get there.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from quantcache.cache.key import CHUNK, Stamp, Streamed, combine
from quantcache.cache.store import Cache
from quantcache.loader.mapping import MappedFile
from quantcache.loader.source import Source
from quantcache.quant.digest import Stream
from quantcache.quant.native import Calls
from quantcache.trace import span

__all__ = ["Claim", "DigestBehind", "joined", "known_digest", "source_digest"]

#: What is faulted in at a time by whoever only digests.
_PIECE = 1 << 20
#: What was read out of order is read once more if it is no more than this: it is in the page cache, and often nearer.
_CATCH_UP = 8 << 20


def source_digest(source: Source, threads: int) -> str:
    """Return the digest of a whole source file, on several cores.

    Raises:
        SourceError: it cannot be read, or has become shorter.
    """
    starts = range(0, source.file.nbytes, CHUNK)

    def chunk(start: int) -> bytes:
        state = Streamed()
        _digest_range(source.file, start, min(start + CHUNK, source.file.nbytes), state)
        return state.digest()

    if threads > 1 and len(starts) > 1:
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(threads) as pool:  # no more threads here
            return combine(list(pool.map(chunk, starts)), source.file.nbytes)
    return combine([chunk(start) for start in starts], source.file.nbytes)


def known_digest(source: Source, cache: Cache, threads: int, seen_ns: int) -> str:
    """Return the digest of a file: as it was recorded, if the file has not changed since.

    Args:
        source: the file.
        cache: where digests are recorded.
        threads: for a digest that has to be taken.
        seen_ns: when the file was opened, since the epoch.
    """
    stamp = Stamp.of(source.file.stat)
    found = cache.source_digest(stamp)
    if found is None:
        found = source_digest(source, threads)
        if not source.file.changed():
            cache.record_source(stamp, found, source.path.resolve(), seen_ns)
    return found


def _digest_range(file: MappedFile, start: int, stop: int, state: Streamed) -> None:
    """Fault a range in and add it to a digest."""
    for position in range(start, stop, _PIECE):
        nbytes = min(_PIECE, stop - position)
        file.populate(position, nbytes)
        with span("digest", nbytes, file.path.name):
            state.update(file.memory[position : position + nbytes])


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges, as (first byte, the one behind the last), with each that begins where the one before it ends as a part of that."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found


class _Chunk:
    """One chunk. Everything before `claimed` is digested or will be; `read` are ranges behind it that readers have had, or nobody's."""

    __slots__ = ("claimed", "end", "read", "state")

    def __init__(self, start: int, end: int) -> None:
        self.claimed, self.end = start, end
        self.read: list[tuple[int, int]] = []  # apart and in order
        self.state = Stream(start)

    def add(self, start: int, stop: int) -> None:
        """Note a range, which may overlap others: a tensor that turns out not to fit its plan is read twice."""
        first = bisect_right(self.read, (start, 0))
        if first and self.read[first - 1][1] >= start:
            first -= 1
            start = self.read[first][0]
        last = first
        while last < len(self.read) and self.read[last][0] <= stop:
            stop = max(stop, self.read[last][1])
            last += 1
        self.read[first:last] = [(start, stop)]

    def reaches(self, start: int) -> bool:
        """Return whether the digest can be brought up to `start` by reading a little again."""
        if self.claimed >= start:
            return True
        found = bisect_right(self.read, (self.claimed, self.end))
        return found > 0 and self.read[found - 1][1] >= start and start - self.claimed <= _CATCH_UP

    @property
    def digested(self) -> bool:
        """Whether all of it is."""
        return self.state.at == self.end


class Claim:
    """Hold what a reader has to digest: its tile, and what was read before it and not digested.

    Whoever holds one has the calls of `add_to` made, or stops the whole digest: other readers wait for their turn.
    """

    def __init__(self, file: MappedFile, parts: list[tuple[_Chunk, int, int]]) -> None:
        self._file, self._parts = file, parts

    @classmethod
    def of_all(cls, claims: Sequence[Claim]) -> Claim | None:
        """Return several of one file as one; what stands side by side becomes one range."""
        parts: list[tuple[_Chunk, int, int]] = []
        for claim in claims:
            for chunk, start, stop in claim._parts:
                if parts and parts[-1][0] is chunk and parts[-1][2] == start:
                    start = parts.pop()[1]
                parts.append((chunk, start, stop))
        return cls(claims[0]._file, parts) if claims else None

    def covers(self, start: int, stop: int) -> bool:
        """Return whether a range, of one chunk, is in it."""
        return any(first <= start and stop <= last for _, first, last in self._parts)

    def add_to(self, calls: Calls) -> None:
        """Have the bytes faulted in and digested, in turn."""
        for chunk, start, stop in self._parts:
            self._file.add_populate(calls, start, stop - start)
            chunk.state.add_in_turn(calls, self._file.address + start, stop - start, start)

    def keep(self) -> None:
        """Do it.

        Raises:
            SourceError: the file cannot be read.
        """
        calls = Calls()
        calls.name = self._file.path.name
        self.add_to(calls)
        stopped = calls.run()
        if stopped < len(calls):
            raise self._file.unreadable(calls, stopped)


class DigestBehind:
    """Take the digest of a file from the tiles that readers have in their hands, while those are in the cache.

    A digest needs its bytes in order, and readers run side by side: each claims its tile when it takes it, and digests it when
    the one before it is through. What comes out of order is read again at the end, from the page cache.

    Args:
        file: the source.
        covered: the ranges that readers will read; what lies between them is nobody's, and is read here.
    """

    def __init__(self, file: MappedFile, covered: Iterable[tuple[int, int]]) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._chunks = [_Chunk(start, min(start + CHUNK, file.nbytes)) for start in range(0, file.nbytes, CHUNK)]
        position = 0
        for start, stop in [*sorted(covered), (file.nbytes, file.nbytes)]:
            for chunk, first, last in self._parts(position, start):
                chunk.add(first, last)
            position = max(position, stop)

    def _parts(self, start: int, stop: int) -> list[tuple[_Chunk, int, int]]:
        if stop <= start:
            return []
        numbers = range(start // CHUNK, -(-stop // CHUNK))
        return [(self._chunks[n], max(start, n * CHUNK), min(stop, self._chunks[n].end)) for n in numbers]

    def claim(self, start: int, stop: int) -> Claim:
        """Return what a reader of a range has to digest: all of it, or less if it comes out of order or is read again."""
        mine = []
        with self._lock:
            for chunk, first, last in self._parts(start, stop):
                if chunk.claimed < last and chunk.reaches(first):
                    mine.append((chunk, chunk.claimed, last))
                    chunk.claimed = last
                else:
                    chunk.add(first, last)
        return Claim(self._file, mine)

    def stop(self) -> None:
        """Let nobody wait any more: a claim may never be kept, and the digest cannot be had then."""
        for chunk in self._chunks:
            chunk.state.stop()

    def finish_one(self) -> None:
        """Digest the rest of one chunk that nobody is busy with.

        Raises:
            SourceError: it cannot be read.
        """
        with self._lock:
            chunk = next(filter(self._is_idle, self._chunks), None)
            if chunk is None:
                return
            start, chunk.claimed = chunk.claimed, chunk.end
        pieces = range(start, chunk.end, _PIECE)
        Claim(self._file, [(chunk, position, min(position + _PIECE, chunk.end)) for position in pieces]).keep()

    @staticmethod
    def _is_idle(chunk: _Chunk) -> bool:
        return chunk.state.at == chunk.claimed < chunk.end

    @property
    def idle(self) -> bool:
        """Whether there is a chunk with bytes left that nobody is busy with."""
        with self._lock:
            return any(map(self._is_idle, self._chunks))

    @property
    def open(self) -> bool:
        """Whether bytes are left that nobody has digested yet."""
        return not all(chunk.digested for chunk in self._chunks)

    def result(self) -> str:
        """Return the digest of the whole file.

        Raises:
            ValueError: bytes are left.
        """
        if self.open:
            raise ValueError("the digest is not complete")
        return combine([chunk.state.digest() for chunk in self._chunks], self._file.nbytes)
