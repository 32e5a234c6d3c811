"""XXH3-128 without Python between pieces: of a run of pieces in one call, of what threads bring in any order, and compared with what was stored.

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

__all__ = ["BLOCK", "NBYTES", "SUM_NBYTES", "Expected", "add_digest", "add_digest_of_sums", "add_sums", "digests", "each"]

#: of one digest
NBYTES = 16
#: Bytes of a block, which can be added up before what stands in front of it is, and of its sums.
BLOCK, SUM_NBYTES = 1024, 64


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


def add_sums(calls: Calls, address: int, blocks: int, out: int) -> None:
    """Have blocks of a long run of bytes added up.

    Args:
        calls: what it is added to.
        address: of the first block.
        blocks: how many.
        out: address of SUM_NBYTES a block; written.
    """
    calls.add(native.kernel("digest_sums"), address, blocks, out, phase="digest", nbytes=blocks * BLOCK)


def add_digest_of_sums(calls: Calls, address: int, nbytes: int, sums: int, out: int) -> None:
    """Have the digest taken of bytes whose blocks were added up, but for the last one, whole or not.

    Args:
        calls: what it is added to.
        address: of the bytes, of which the last block is read.
        nbytes: how many.
        sums: address of SUM_NBYTES for each of (nbytes - 1) // BLOCK blocks.
        out: address of 16 bytes; written.
    """
    calls.add(native.kernel("digest_of_sums"), address, nbytes, sums, out, phase="digest", nbytes=(nbytes - 1) % BLOCK + 1)


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
