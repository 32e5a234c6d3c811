"""XXH3-128 of a run of pieces in one call: no Python, and no GIL, between them.

The xxhash package takes one piece at a time, and threads that check a few hundred kilobytes a call spend their time waiting
for each other's GIL: docs/decisions/0010-hits.md. What is computed is xxhash's; the tests compare the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from quantcache.quant import native

__all__ = ["digests"]

#: Shorter input has other rules, which xxhash knows.
_SHORT = 240


def digests(data: Any, piece: int) -> list[bytes]:
    """Return the XXH3-128 of consecutive pieces of a contiguous buffer.

    Args:
        data: bytes-like.
        piece: bytes of a piece; the last may be shorter.

    Returns:
        16 bytes a piece.
    """
    count, rest = -(-len(data) // piece), len(data) % piece
    if piece <= _SHORT or 0 < rest <= _SHORT or native.level() in ("reference", "scalar"):
        return [xxhash.xxh3_128_digest(data[start : start + piece]) for start in range(0, len(data), piece)]
    found = np.empty(16 * count, np.uint8)
    native.kernel("digest_pieces")(np.frombuffer(data, np.uint8), len(data), piece, found)
    whole = found.tobytes()
    return [whole[start : start + 16] for start in range(0, len(whole), 16)]
