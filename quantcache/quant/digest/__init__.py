"""XXH3-128 without Python between pieces: of a run of pieces in one call, of what threads bring in turn, and compared with what was stored.

The xxhash package takes one piece at a time, and threads that check a few hundred kilobytes a call spend their time waiting
for each other's GIL: docs/decisions/0010-hits.md. What is computed is xxhash's; the tests compare the two.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from quantcache.quant import native
from quantcache.quant.native import Calls, Pinned

__all__ = ["NBYTES", "Expected", "Stream", "add_digest", "digests", "each"]

#: of one digest
NBYTES = 16


def digests(data: Any, piece: int) -> list[bytes]:
    """Return the XXH3-128 of consecutive pieces of a contiguous buffer.

    Args:
        data: bytes-like.
        piece: bytes of a piece; the last may be shorter.

    Returns:
        16 bytes a piece.
    """
    if native.level() == "reference" or not len(data):
        return [xxhash.xxh3_128_digest(data[start : start + piece]) for start in range(0, len(data), piece)]
    found = np.empty(NBYTES * -(-len(data) // piece), np.uint8)
    native.kernel("digest_pieces")(np.frombuffer(data, np.uint8), len(data), piece, found)
    return each(found)


def each(found: NDArray[np.uint8]) -> list[bytes]:
    """Return the digests that stand one after the other in an array."""
    whole = found.tobytes()
    return [whole[start : start + NBYTES] for start in range(0, len(whole), NBYTES)]


def add_digest(calls: Calls, address: int, nbytes: int, out: int, *, piece: int = 0, phase: str = "digest") -> bool:
    """Have the digest of bytes taken, or of consecutive pieces of them.

    Args:
        calls: what it is added to.
        address: of the bytes.
        nbytes: how many.
        out: address of 16 bytes a piece; written.
        piece: bytes of a piece, the last may be shorter; 0 if all are one.
        phase: see quantcache.trace.span.

    Returns:
        Whether it was added: there are no calls at the reference level, nor for nothing.
    """
    piece = piece or nbytes
    if native.level() == "reference" or not nbytes:
        return False
    calls.add(native.kernel("digest_pieces"), address, nbytes, piece, out, phase=phase, nbytes=nbytes)
    return True


class Stream:
    """Take the digest of a range of bytes that several threads bring in pieces.

    Args:
        start: place of the first byte.
    """

    #: as kernel.c has it: place, stopped, count, eight sums, a stripe and a block of bytes
    WORDS = 3 + 8 + (64 + 1024) // 8

    def __init__(self, start: int) -> None:
        self._words = np.zeros(self.WORDS, np.uint64)
        self._words[0] = start
        self._address = native.address(self._words)

    @property
    def at(self) -> int:
        """Place of the byte that comes next."""
        return int(self._words[0])

    def add_in_turn(self, calls: Calls, address: int, nbytes: int, place: int) -> None:
        """Have bytes added, by calls that wait until everything before them is.

        Args:
            calls: what it is added to.
            address: of the bytes.
            nbytes: how many.
            place: of the first.
        """
        calls.add(native.kernel("digest_turn"), self._address, place, phase="", nbytes=0)
        calls.add(native.kernel("digest_in_turn"), self._address, address, nbytes, place, phase="digest", nbytes=nbytes)

    def stop(self) -> None:
        """Let nobody wait any more: what comes next will never come."""
        self._words[1] = 1

    def digest(self) -> bytes:
        """Return the digest of all that was added: 16 bytes."""
        out = np.empty(NBYTES, np.uint8)
        native.kernel("digest_of_stream")(self._words, out)
        return out.tobytes()


class Expected:
    """Compare stored tensors with their digests, several in one call.

    Args:
        places, sizes: first bytes, and bytes.
        pieces: bytes of a piece; of its digests a tensor's digest is the digest.
        wanted: 16 bytes a tensor.
    """

    def __init__(self, places: Sequence[int], sizes: Sequence[int], pieces: Sequence[int], wanted: bytes) -> None:
        self._table = np.empty((len(places), 5), np.uint64)  # as kernel.c has it
        for column, values in enumerate((places, sizes, pieces)):
            self._table[:, column] = values
        self._table[:, 3:] = np.frombuffer(wanted, np.uint64).reshape(-1, 2)
        self._address = Pinned(self._table)

    def differs(self, base: int, which: Sequence[int]) -> int:
        """Return the first place in `which` of a tensor that has not its digest, or how many there are if all have.

        Args:
            base: address that places count from.
            which: numbers of tensors.
        """
        numbers = array("Q", which)
        return native.kernel("digest_differs")(base, self._address, numbers.buffer_info()[0], len(numbers))
