"""Hold the digest kernel to the xxhash package, at every CPU level, whatever the lengths and where the bytes lie."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable

import numpy as np
import pytest
import xxhash

from quantcache.quant import native
from quantcache.quant.digest import BLOCK, NBYTES, SUM_NBYTES, Expected, add_digest_of_sums, add_sums, digests

COMPILED = [level for level in native.available() if level != "reference"] or ["scalar"]
#: all that are short, and have rules of their own; around stripes of 64 bytes, blocks of 1,024
LENGTHS = [*range(1, 242), 255, 256, 257, 320, 1023, 1024, 1025, 1087, 1088, 1089, 2048, 2049, 4096, 65536, 100_003]


@pytest.mark.parametrize("level", COMPILED)
@pytest.mark.parametrize("length", LENGTHS)
def test_one_piece(level: str, length: int) -> None:
    """A piece of any length, from any address on, has the digest that xxhash gives it."""
    raw = np.frombuffer(os.urandom(length + 3), np.uint8)
    for shift in range(4):
        data, found = np.ascontiguousarray(raw[shift : shift + length]), np.empty(16, np.uint8)
        assert native.kernel("digest_pieces", level)(raw[shift : shift + length], length, length, found) == 0
        assert found.tobytes() == xxhash.xxh3_128_digest(data.data)


@pytest.mark.parametrize("level", ["reference", *COMPILED])
@pytest.mark.parametrize("piece", [1, 64, 240, 241, 1024, 5000, 65536, 1 << 20])
@pytest.mark.parametrize("length", [0, 1, 240, 241, 65536, 65536 + 17, 200_000])
def test_pieces(kernel_level: Callable[[str], None], level: str, piece: int, length: int) -> None:
    """A run of pieces has the digests of its pieces, the last and shorter one, too."""
    kernel_level(level)
    data = memoryview(os.urandom(length))
    if piece == 1:
        data = data[:300]
    assert digests(data, piece) == [xxhash.xxh3_128_digest(data[start : start + piece]) for start in range(0, len(data), piece)]


def test_pieces_of_nothing_are_refused() -> None:
    """A piece of no bytes would never come to an end."""
    assert native.kernel("digest_pieces", COMPILED[-1])(np.zeros(1000, np.uint8), 1000, 0, np.empty(64, np.uint8)) == 8


@pytest.mark.parametrize("level", COMPILED)
def test_stored(kernel_level: Callable[[str], None], level: str) -> None:
    """Tensors of any length, in any pieces, are compared as xxhash would; of several the first that differs is named."""
    kernel_level(level)
    rng = random.Random()
    sizes = [0, 1, 15, 16, 64, 240, 241, 4096, *(rng.randrange(100_000) for _ in range(30))]
    pieces = [rng.choice([1 << 20, 4096, 241, max(1, size // 16), max(1, size // 3)]) for size in sizes]
    raw, places, wanted, place = np.frombuffer(os.urandom(sum(sizes) + 8), np.uint8).copy(), [], b"", 8
    for size, piece in zip(sizes, pieces, strict=True):
        data = raw[place : place + size].tobytes()
        wanted += xxhash.xxh3_128_digest(b"".join(xxhash.xxh3_128_digest(data[at : at + piece]) for at in range(0, size, piece)))
        places.append(place)
        place += size
    stored, base = Expected(places, sizes, pieces, wanted), native.address(raw)
    which = rng.sample(range(len(sizes)), len(sizes))
    assert stored.differs(base, which) == len(which)
    assert stored.differs(base, []) == 0
    for position in (position for position, number in enumerate(which) if sizes[number]):
        at, bit = places[which[position]] + rng.randrange(sizes[which[position]]), 1 << rng.randrange(8)
        raw[at] ^= bit
        assert stored.differs(base, which) == position
        assert stored.differs(base, which[:position]) == position
        raw[at] ^= bit


@pytest.mark.parametrize("level", COMPILED)
def test_sums(kernel_level: Callable[[str], None], level: str) -> None:
    """Bytes whose blocks were added up in any order, several or one at a time, have the digest of the whole, wherever they lie."""
    kernel_level(level)
    rng = random.Random()
    for length in [*LENGTHS, 0, 2047, 3000, *(rng.randrange(200_000) for _ in range(20))]:
        shift = rng.randrange(8)
        data = np.frombuffer(os.urandom(length + shift), np.uint8)[shift:]
        blocks = max(0, length - 1) // BLOCK
        sums, found = np.full(blocks * SUM_NBYTES, 0xA5, np.uint8), np.empty(NBYTES, np.uint8)
        edges = sorted({0, blocks, *(rng.randrange(blocks + 1) for _ in range(rng.randrange(6)))})
        runs = list(itertools.pairwise(edges))
        calls = native.Calls()
        for first, last in rng.sample(runs, len(runs)):
            add_sums(calls, native.address(data) + first * BLOCK, last - first, native.address(sums) + first * SUM_NBYTES)
        add_digest_of_sums(calls, native.address(data), length, native.address(sums), native.address(found))
        assert calls.run() == len(calls)
        assert found.tobytes() == xxhash.xxh3_128_digest(data.tobytes())


@pytest.mark.parametrize("level", COMPILED)
def test_sums_write_no_further(level: str) -> None:
    """What stands behind the sums of the blocks stays as it was, and blocks are read to their end and no further."""
    data, sums = np.frombuffer(os.urandom(3 * BLOCK), np.uint8), np.full(4 * SUM_NBYTES, 0xA5, np.uint8)
    assert native.kernel("digest_sums", level)(data, 3, sums) == 0
    assert (sums[3 * SUM_NBYTES :] == 0xA5).all()
    other = data.copy()
    other[-1] ^= 1
    again = np.zeros(4 * SUM_NBYTES, np.uint8)
    assert native.kernel("digest_sums", level)(other, 3, again) == 0
    assert (sums[: 2 * SUM_NBYTES] == again[: 2 * SUM_NBYTES]).all()
    assert (sums[2 * SUM_NBYTES : 3 * SUM_NBYTES] != again[2 * SUM_NBYTES : 3 * SUM_NBYTES]).any()
