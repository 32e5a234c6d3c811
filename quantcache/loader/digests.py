"""Own the digests of source files: of a whole file on all cores, as it was recorded, and behind the readers of a build.

The definition, chunks of 64 MiB and a digest over their digests, is in cache/key.py; here is how the bytes get there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantcache.cache.key import CHUNK, Stamp, Streamed, combine
from quantcache.cache.store import Cache
from quantcache.loader.mapping import MappedFile, fresh
from quantcache.loader.ranges import add, joined
from quantcache.loader.source import Source
from quantcache.quant import native
from quantcache.quant.digest import BLOCK, NBYTES, SUM_NBYTES, add_digest_of_sums, add_sums
from quantcache.quant.native import Calls
from quantcache.trace import span

__all__ = ["Claim", "DigestBehind", "Sums", "known_digest", "source_digest"]

#: What is faulted in at a time by whoever only digests, in whole blocks.
_PIECE = 1 << 20
#: Bytes of sums that files under way have together: a sixteenth of what was read of chunks that others are still at.
_SUMS_NBYTES = 48 << 20


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


class Sums:
    """Hand out memory for the sums of chunks, and take it back; no more of it than a limit. Threads share it.

    Args:
        nbytes: the limit.
    """

    def __init__(self, nbytes: int = _SUMS_NBYTES) -> None:
        self._lock = threading.Lock()
        self._left = max(1, nbytes * BLOCK // SUM_NBYTES // CHUNK)
        self._spare: list[NDArray[np.uint8]] = []

    def take(self) -> NDArray[np.uint8] | None:
        """Return room for a chunk's sums; None if others have all of it."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
            if not self._left:
                return None
            self._left -= 1
            return fresh(CHUNK // BLOCK * SUM_NBYTES)

    def give(self, sums: NDArray[np.uint8]) -> None:
        """Take back what somebody had."""
        with self._lock:
            self._spare.append(sums)

    def clear(self) -> None:
        """Give what nobody has back to the system."""
        with self._lock:
            self._left += len(self._spare)
            self._spare.clear()


class _Chunk:
    """One chunk: which of its blocks are added up, and who is at it. Guarded by the digest's lock.

    The last block, whole or not, is none of them: it is read when the digest is taken.
    """

    __slots__ = ("added", "begun", "blocks", "busy", "covered", "digest", "end", "ended", "start", "sums")

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.blocks = start, end, (end - start - 1) // BLOCK
        self.added: list[tuple[int, int]] = []  # ranges of blocks
        self.covered = 0  # bytes that readers come for
        self.begun: list[tuple[int, int]] = []  # ranges of the file that they have come for
        self.busy = 0  # readers
        self.sums: NDArray[np.uint8] | None = None
        self.ended = False  # its digest is taken, or about to be
        self.digest = b""

    @property
    def idle(self) -> bool:
        """Whether nobody is at it, and it has no digest."""
        return not self.ended and not self.busy

    @property
    def ripe(self) -> bool:
        """Whether its readers are through with it: the room of its sums is wanted for others."""
        return self.idle and self.sums is not None and sum(last - first for first, last in self.begun) >= self.covered

    def missing(self) -> list[tuple[int, int]]:
        """Return the ranges of blocks that are not added up."""
        edges = [0, *(edge for found in self.added for edge in found), self.blocks]
        return [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]


class Spot(NamedTuple):
    """Say where a reader's next blocks are, and where their sums go.

    Args:
        address, sums: of the first block, and of its sums.
        blocks: how many.
        added: what to tell the claim once they are added up.
    """

    address: int
    sums: int
    blocks: int
    added: tuple[_Chunk, int, int]


class Claim:
    """Hold what a reader adds up of a range while it has it in its hands: its whole blocks, from the first on."""

    def __init__(self, file: MappedFile, stop: int, parts: list[tuple[_Chunk, int, int]]) -> None:
        self._file, self.stop = file, stop
        self._parts = parts  # blocks of chunks that have room for sums, in order
        self._at = parts[0][1] if parts else 0  # the next block of the first of them
        self.chunks = [chunk for chunk, _, _ in parts]
        self.added: list[tuple[_Chunk, int, int]] = []

    @property
    def reach(self) -> int:
        """Where the chunk of the next block ends: a spot goes no further."""
        chunk, _ = self._chunk()
        return chunk.end if chunk is not None else self.stop

    def spot(self, stop: int, least: int = 0) -> Spot | None:
        """Return the blocks that come next and end by a place of the file, and leave them to the caller to add up.

        Args:
            stop: the place.
            least: how many there should be.

        Returns:
            None if there are fewer, or if they are of two chunks.
        """
        chunk, end = self._chunk()
        if chunk is None or stop > chunk.end:
            return None
        first, last = self._at, min(end, (stop - chunk.start) // BLOCK)
        if last - first < least:
            return None
        self._at = last
        assert chunk.sums is not None
        return Spot(self._file.address + chunk.start + first * BLOCK, native.address(chunk.sums) + first * SUM_NBYTES, last - first, (chunk, first, last))

    def add_to(self, calls: Calls, stop: int) -> list[tuple[_Chunk, int, int]]:
        """Have the blocks that come next and end by a place of the file added up; return what is to be `added` once that is done."""
        found: list[tuple[_Chunk, int, int]] = []
        while (chunk := self._chunk()[0]) is not None and (spot := self.spot(min(stop, chunk.end), 1)) is not None:
            add_sums(calls, spot.address, spot.blocks, spot.sums)
            found.append(spot.added)
        return found

    def _chunk(self) -> tuple[_Chunk | None, int]:
        """Return the chunk of the next block, and the block behind its last; None if there is none."""
        while self._parts and self._at >= self._parts[0][2]:
            del self._parts[0]
            self._at = self._parts[0][1] if self._parts else 0
        return (self._parts[0][0], self._parts[0][2]) if self._parts else (None, 0)


class DigestBehind:
    """Take the digest of a file from the tiles that readers have in their hands, while those are in the cache.

    XXH3 wants its bytes in order, and readers run side by side. But within a block of 1,024 bytes it only adds: so readers add blocks up
    in any order, and when a chunk is through, what depends on the order is done with the sums, a sixteenth of the bytes. Blocks
    at the edges of what a reader had, and what is nobody's, are read then.

    Args:
        file: the source.
        covered: the ranges that readers will read, apart from each other.
        room: where sums lie.
    """

    def __init__(self, file: MappedFile, covered: Iterable[tuple[int, int]], room: Sums | None = None) -> None:
        self._file, self.room = file, room or Sums()
        self._lock = threading.Lock()
        self._chunks = [_Chunk(start, min(start + CHUNK, file.nbytes)) for start in range(0, file.nbytes, CHUNK)]
        self._left, self._first = len(self._chunks), 0  # chunks without a digest, and before which all have been taken
        self._ripe: list[_Chunk] = []  # chunks that were once they were given back
        for start, stop in covered:
            for chunk, first, last in self._parts(start, stop):
                chunk.covered += last - first

    def _parts(self, start: int, stop: int) -> list[tuple[_Chunk, int, int]]:
        if stop <= start:
            return []
        numbers = range(start // CHUNK, -(-stop // CHUNK))
        return [(self._chunks[n], max(start, n * CHUNK), min(stop, self._chunks[n].end)) for n in numbers]

    def claim(self, start: int, stop: int) -> Claim:
        """Return what a reader of a range has to add up: nothing of a chunk whose sums find no room. It is to be given back."""
        mine = []
        with self._lock:
            for chunk, first, last in self._parts(start, stop):
                add(chunk.begun, first, last)
                begin, end = -(-(first - chunk.start) // BLOCK), min(chunk.blocks, (last - chunk.start) // BLOCK)
                if chunk.ended:
                    continue
                if begin >= end:
                    self._note(chunk)
                    continue
                if chunk.sums is None:
                    chunk.sums = self.room.take()
                if chunk.sums is not None:
                    chunk.busy += 1
                    mine.append((chunk, begin, end))
        return Claim(self._file, stop, mine)

    def claims(self, extents: Sequence[tuple[int, int]]) -> list[Claim]:
        """Return what the readers of several ranges have to add up, in this order: one claim for all that follow each other."""
        runs, found, behind = iter(joined(extents)), list[Claim](), -1
        for start, stop in extents:
            found.append(found[-1] if start == behind else self.claim(*next(runs)))
            behind = stop
        return found

    def give_back(self, claims: Iterable[Claim]) -> None:
        """Take what was added up; a claim may come several times."""
        with self._lock:
            for claim in dict.fromkeys(claims):
                for chunk, first, last in claim.added:
                    add(chunk.added, first, last)
                for chunk in claim.chunks:
                    chunk.busy -= 1
                    self._note(chunk)

    def _note(self, chunk: _Chunk) -> None:
        if chunk.ripe:
            self._ripe.append(chunk)

    def take(self, *, ripe: bool = False) -> _Chunk | None:
        """Return a chunk that nobody is at, for the caller to finish; one that is read before others.

        Args:
            ripe: whether it has to be read.

        Returns:
            None if there is none, or no room for its sums.
        """
        with self._lock:
            while self._ripe:  # some may be read again meanwhile
                if (chunk := self._ripe.pop()).ripe:
                    chunk.ended = True
                    return chunk
            while self._first < len(self._chunks) and self._chunks[self._first].ended:
                self._first += 1
            for number in () if ripe else range(self._first, len(self._chunks)):
                chunk = self._chunks[number]
                if not chunk.idle:
                    continue
                if chunk.blocks and chunk.sums is None:
                    chunk.sums = self.room.take()
                if chunk.sums is not None or not chunk.blocks:
                    chunk.ended = True
                    return chunk
            return None

    def finish(self, chunk: _Chunk) -> None:
        """Take the digest of a chunk that the caller took: read what is missing, and put the sums together.

        Raises:
            SourceError: it cannot be read.
        """
        sums = np.empty(0, np.uint8) if chunk.sums is None else chunk.sums
        calls, begin, found = Calls(), self._file.address + chunk.start, np.empty(NBYTES, np.uint8)
        calls.name = self._file.path.name
        step = max(1, _PIECE // BLOCK)
        for first, last in chunk.missing():
            for block in range(first, last, step):
                count = min(step, last - block)
                self._file.add_populate(calls, chunk.start + block * BLOCK, count * BLOCK)
                add_sums(calls, begin + block * BLOCK, count, native.address(sums) + block * SUM_NBYTES)
        tail = max(0, chunk.blocks - 1) * BLOCK  # of a short end the stripe before it is read, too
        self._file.add_populate(calls, chunk.start + tail, chunk.end - chunk.start - tail)
        add_digest_of_sums(calls, begin, chunk.end - chunk.start, native.address(sums), native.address(found))
        stopped = calls.run()
        if stopped < len(calls):
            raise self._file.unreadable(calls, stopped)
        with self._lock:
            if chunk.sums is not None:
                self.room.give(chunk.sums)
            chunk.sums, chunk.digest = None, found.tobytes()
            self._left -= 1

    @property
    def open(self) -> bool:
        """Whether chunks are left that have no digest yet."""
        return self._left > 0

    def result(self) -> str:
        """Return the digest of the whole file.

        Raises:
            ValueError: chunks are left.
        """
        if self.open:
            raise ValueError("the digest is not complete")
        return combine([chunk.digest for chunk in self._chunks], self._file.nbytes)
