"""Own identity: digests of sources, the stat shortcut, and the key of a key document.

A key never contains a path, a name or a time. Source of the racy rule: git's racy-git.txt.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import xxhash

from quantcache.errors import UsageError

__all__ = ["CHUNK", "CONTAINER_VERSION", "DIGEST_NBYTES", "Stamp", "Streamed", "canonical", "combine", "digest", "fingerprint", "key_of", "samples"]

#: In every key, and the name of the store's folder: raised when entries mean something else than before. How their headers are laid out has a
#: number of its own, container.LAYOUT.
CONTAINER_VERSION = 1

#: A source is digested in pieces of this size, so that all cores can work at it.
CHUNK = 64 << 20
#: Bytes of a digest.
DIGEST_NBYTES = 16

#: A file that changed less than this before it was looked at may change again within the clock's grain.
RACY_NS = 2_000_000_000

_HEAD = 64 << 10
_SAMPLE = 4 << 10
_SAMPLES = 16


#: From here on a digest is taken in a way that lets other threads run meanwhile.
_RELEASING = 64 << 10


def digest(buffer: Any) -> bytes:
    """Return the XXH3-128 of a contiguous buffer: 16 bytes."""
    if len(buffer) < _RELEASING:
        found: bytes = xxhash.xxh3_128_digest(buffer)
        return found
    state = Streamed()
    state.update(buffer)
    return state.digest()


class Streamed:
    """Take the XXH3-128 of bytes that come in pieces, in order."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, buffer: Any) -> None:
        """Add a contiguous buffer."""
        self._state.update(buffer)

    def digest(self) -> bytes:
        """Return the digest of all that was added: 16 bytes."""
        found: bytes = self._state.digest()
        return found


def combine(digests: list[bytes] | bytes, size: int | None = None) -> str:
    """Return the digest of digests, in hex.

    Args:
        digests: of the pieces, in order; or all of them, one behind the other.
        size: of the whole, in bytes; appended as 8 bytes, little-endian, if given.
    """
    tail = b"" if size is None else size.to_bytes(8, "little")
    whole = digests if isinstance(digests, bytes) else b"".join(digests)
    return digest(whole + tail).hex()


def samples(size: int) -> list[tuple[int, int]]:
    """Return what of a file `fingerprint` reads, as (first byte, the one behind the last): 132 KiB."""
    starts = [*((size * sample) // _SAMPLES for sample in range(_SAMPLES)), max(0, size - _SAMPLE)]
    return [(0, min(size, _HEAD)), *((start, min(size, start + _SAMPLE)) for start in starts)]


def fingerprint(memory: memoryview) -> str:
    """Return a digest of a file's size, head and samples, in hex: different means different content.

    Args:
        memory: the whole file, mapped.
    """
    size = len(memory)
    state = xxhash.xxh3_128(size.to_bytes(8, "little"))
    for start, stop in samples(size):
        state.update(memory[start:stop])
    found: str = state.hexdigest()
    return found


def canonical(document: Any) -> str:
    """Return the one JSON text of a document: sorted keys, no spaces, ASCII, no NaN.

    Raises:
        UsageError: it holds something that JSON has no single form for.
    """
    try:
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"a key document must be plain JSON: {error}") from error


def key_of(document: Any) -> str:
    """Return the key of a key document: the XXH3-128 of its canonical JSON, 32 hex digits."""
    return digest(canonical(document).encode()).hex()


@dataclass(frozen=True, slots=True)
class Stamp:
    """Hold what stat() tells of a file's content.

    Args:
        device, inode, size, mtime_ns, ctime_ns: as stat() names them.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        """Take the stamp from a stat result."""
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def settled(self, at_ns: int) -> bool:
        """Return whether the file had been left alone for long enough, seen at `at_ns` since the epoch."""
        return max(self.mtime_ns, self.ctime_ns) + RACY_NS <= at_ns
