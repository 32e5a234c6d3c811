"""Own the digests of source files: of a whole file on all cores, as it was recorded, and behind the readers of a build.

The definition, chunks of 64 MiB and a digest over their digests, is in cache/key.py; here is how the bytes get there.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from quantcache.cache.key import CHUNK, Stamp, Streamed, combine
from quantcache.cache.store import Cache
from quantcache.loader.mapping import MappedFile
from quantcache.loader.source import Source
from quantcache.trace import span

__all__ = ["DigestBehind", "known_digest", "source_digest"]

#: What is faulted in at a time by whoever only digests.
_PIECE = 1 << 20
#: What was read out of order is read once more if it is no more than this: it is in the page cache, and often nearer.
_CATCH_UP = 8 << 20
#: How long a reader waits for the one before it, whose digest takes 50 us a tile, before it gives its tile up for later.
_PATIENCE_S = 0.05


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


class _Chunk:
    """One chunk: digested up to `at`. `read` are ranges behind it that were read out of order, or are nobody's."""

    __slots__ = ("at", "busy", "end", "flying", "read", "state")

    def __init__(self, start: int, end: int) -> None:
        self.at, self.end = start, end
        self.busy = False
        self.flying: dict[int, int] = {}  # first byte of tiles that are being read -> how many readers
        self.read: list[tuple[int, int]] = []  # apart and in order
        self.state = Streamed()

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

    def expects(self, start: int) -> bool:
        """Return whether bytes before `start` are on their way to the digest."""
        return self.busy or any(self.at <= first < start for first in self.flying)

    def reaches(self, start: int) -> bool:
        """Return whether the digest can be brought up to `start` by reading a little again."""
        if self.at >= start:
            return True
        found = bisect_right(self.read, (self.at, self.end))
        return found > 0 and self.read[found - 1][1] >= start and start - self.at <= _CATCH_UP


class DigestBehind:
    """Take the digest of a file from the tiles that readers have in their hands, while those are in the cache.

    A digest needs its bytes in order, and readers run side by side: one waits for the one before it, but not for long. What
    comes out of order is read again at the end, from the page cache.

    Args:
        file: the source.
        covered: the ranges that readers will read; what lies between them is nobody's, and is read here.
    """

    def __init__(self, file: MappedFile, covered: Iterable[tuple[int, int]]) -> None:
        self._file = file
        self._changed = threading.Condition()
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

    def begin(self, start: int, stop: int) -> None:
        """Say that a range is about to be read; `feed` or `give_up` must follow."""
        with self._changed:
            for chunk, first, _ in self._parts(start, stop):
                chunk.flying[first] = chunk.flying.get(first, 0) + 1

    def feed(self, start: int, buffer: memoryview) -> None:
        """Digest what was read, if everything before it in its chunk is digested or soon will be.

        Raises:
            SourceError: bytes before it cannot be read again.
        """
        for chunk, first, last in self._parts(start, start + len(buffer)):
            with self._changed:
                while chunk.at < first and chunk.expects(first):
                    if not self._changed.wait(_PATIENCE_S):
                        break
                position = chunk.at
                mine = not chunk.busy and position < last and chunk.reaches(first)
                chunk.busy = chunk.busy or mine
                if not mine:
                    self._landed(chunk, first)
                    chunk.add(first, last)
            if mine:
                try:
                    if position < first:
                        _digest_range(self._file, position, first, chunk.state)
                    with span("digest", last - max(first, position)):
                        chunk.state.update(buffer[max(first, position) - start : last - start])
                    position = last
                finally:
                    self._let_go(chunk, position, first)

    def give_up(self, start: int, stop: int) -> None:
        """Say that a range could not be read."""
        with self._changed:
            for chunk, first, _ in self._parts(start, stop):
                self._landed(chunk, first)

    def _landed(self, chunk: _Chunk, first: int) -> None:
        chunk.flying[first] -= 1
        if not chunk.flying[first]:
            del chunk.flying[first]
        self._changed.notify_all()

    def _let_go(self, chunk: _Chunk, position: int, first: int | None = None) -> None:
        with self._changed:
            chunk.busy, chunk.at = False, position
            if first is not None:
                self._landed(chunk, first)
            self._changed.notify_all()

    def finish_one(self) -> None:
        """Digest the rest of one chunk that nobody is busy with."""
        with self._changed:
            chunk = next((chunk for chunk in self._chunks if chunk.at < chunk.end and not chunk.busy), None)
            if chunk is None:
                return
            chunk.busy = True
        position = chunk.at
        try:
            _digest_range(self._file, position, chunk.end, chunk.state)
            position = chunk.end
        finally:
            self._let_go(chunk, position)

    @property
    def idle(self) -> bool:
        """Whether there is a chunk with bytes left that nobody is busy with."""
        with self._changed:
            return any(chunk.at < chunk.end and not chunk.busy for chunk in self._chunks)

    @property
    def open(self) -> bool:
        """Whether bytes are left that nobody has digested yet."""
        with self._changed:
            return any(chunk.at < chunk.end for chunk in self._chunks)

    def result(self) -> str:
        """Return the digest of the whole file.

        Raises:
            ValueError: bytes are left.
        """
        if self.open:
            raise ValueError("the digest is not complete")
        return combine([chunk.state.digest() for chunk in self._chunks], self._file.nbytes)
