"""Hold the digest that is taken behind the readers to the digest of the whole file."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcache.errors import SourceError
from quantcache.loader import digests
from quantcache.loader.digests import Claim, DigestBehind, Sums
from quantcache.loader.mapping import MappedFile
from quantcache.quant.digest import BLOCK, SUM_NBYTES, add_sums
from quantcache.quant.native import Calls

CHUNK = 1 << 20


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MappedFile:
    """A file of five chunks, the last one short; chunks are small here."""
    monkeypatch.setattr(digests, "CHUNK", CHUNK)
    monkeypatch.setattr(digests, "_PIECE", 3000)
    path = tmp_path / "f"
    path.write_bytes(np.random.default_rng().bytes(4 * CHUNK + 12345))
    return MappedFile(path)


def expected(file: MappedFile) -> str:
    """Return the digest by its definition."""
    from quantcache.cache.key import combine, digest

    raw = bytes(file.memory)
    return combine([digest(raw[start : start + CHUNK]) for start in range(0, len(raw), CHUNK)], len(raw))


def tiles(file: MappedFile, shuffler: random.Random) -> list[tuple[int, int]]:
    """Cut a file into ranges of odd lengths, with holes that are nobody's."""
    found, position = [], shuffler.randrange(5000)
    while position < file.nbytes:
        stop = min(file.nbytes, position + shuffler.randrange(1, 200_000))
        found.append((position, stop))
        position = stop + shuffler.choice([0, 0, 0, 7, 4096, 300_000])
    return found


def feed(behind: DigestBehind, *ranges: tuple[int, int]) -> None:
    """Claim ranges and add them up, in pieces of odd lengths."""
    claims = [behind.claim(*one) for one in ranges]
    for claim, (start, _) in zip(claims, ranges, strict=True):
        read(claim, start, random.Random())
    behind.give_back(claims)


def read(claim: Claim, start: int, rng: random.Random) -> None:
    """Add a claim's blocks up as a reader does: some by a call of its own, some by the claim's."""
    calls, position = Calls(), start
    while position < claim.stop:
        position = min(claim.stop, position + rng.choice([1, 500, 1024, 5000, 100_000, 2 * CHUNK]))
        spot = claim.spot(position, rng.randrange(3)) if rng.random() < 0.5 else None
        if spot is not None:
            add_sums(calls, spot.address, spot.blocks, spot.sums)
            claim.added.append(spot.added)
        else:
            claim.added += claim.add_to(calls, position)
    assert calls.run() == len(calls)


def finish(behind: DigestBehind) -> str:
    """Have the rest read."""
    while (chunk := behind.take()) is not None:
        behind.finish(chunk)
    return behind.result()


def finish_ripe(behind: DigestBehind) -> bool:
    """Finish a chunk that is read, and return whether there was one."""
    chunk = behind.take(ripe=True)
    if chunk is not None:
        behind.finish(chunk)
    return chunk is not None


@pytest.fixture
def read_again(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of the bytes that are read by whoever finishes a chunk, but for the last block of each."""
    found: list[int] = []
    real = digests.add_sums
    finish = DigestBehind.finish

    def counting(self: DigestBehind, chunk: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(digests, "add_sums", lambda *given: (found.append(given[2] * BLOCK), real(*given))[1])
            finish(self, chunk)

    monkeypatch.setattr(DigestBehind, "finish", counting)
    return found


@pytest.mark.parametrize("order", ["in order", "reversed", "shuffled", "nothing"])
def test_any_order(file: MappedFile, order: str) -> None:
    """Whatever was read before what, the digest is that of the file."""
    shuffler = random.Random()
    ranges = tiles(file, shuffler)
    behind = DigestBehind(file, ranges)
    given = {"in order": ranges, "reversed": ranges[::-1], "shuffled": shuffler.sample(ranges, len(ranges)), "nothing": []}[order]
    for one in given:
        feed(behind, one)
    assert finish(behind) == expected(file)


@pytest.mark.parametrize("backwards", [False, True])
def test_nothing_is_read_twice(file: MappedFile, read_again: list[int], backwards: bool) -> None:
    """Of tiles in whatever order only the blocks at their edges are read again, and what is nobody's."""
    ranges = [(100 + n * 50_000, 100 + (n + 1) * 50_000) for n in range((file.nbytes - 100) // 50_000)]
    behind = DigestBehind(file, ranges)
    for one in ranges[::-1] if backwards else ranges:
        feed(behind, one)
    assert finish(behind) == expected(file)
    assert sum(read_again) <= BLOCK * (len(ranges) + 2) + file.nbytes - ranges[-1][1]


def test_chunks_that_are_read_are_ripe(file: MappedFile) -> None:
    """A chunk can be finished once its readers are through, whatever is left of others; its room is there for the next one."""
    room = Sums(CHUNK // BLOCK * SUM_NBYTES)
    behind = DigestBehind(file, [(5000, CHUNK + 5000), (CHUNK + 5000, 2 * CHUNK)], room)
    assert not finish_ripe(behind)
    first, second = behind.claim(5000, CHUNK - 100), behind.claim(CHUNK - 100, CHUNK + 5000)
    for claim, start in ((first, 5000), (second, CHUNK - 100)):
        read(claim, start, random.Random())
    behind.give_back([second])
    assert not finish_ripe(behind)
    assert room.take() is None
    behind.give_back([first])
    chunk = behind.take(ripe=True)
    assert chunk is not None
    assert behind.take(ripe=True) is None  # and nothing else instead: tiles of others are still to come
    behind.finish(chunk)
    feed(behind, (CHUNK + 5000, 2 * CHUNK))
    assert finish_ripe(behind)
    assert finish(behind) == expected(file)


def test_read_again_is_not_read_whole(file: MappedFile) -> None:
    """A chunk of which a half was read twice is not through: the other half is still to come."""
    behind = DigestBehind(file, [(0, CHUNK)])
    for _ in range(2):
        feed(behind, (0, CHUNK // 2))
    assert not finish_ripe(behind)
    feed(behind, (CHUNK // 2, CHUNK // 2 + 100))  # no whole block
    feed(behind, (CHUNK // 2 + 100, CHUNK))
    busy = behind.claim(100, 5000)
    assert not finish_ripe(behind)
    behind.give_back([busy])
    assert finish_ripe(behind)
    assert not finish_ripe(behind)
    assert finish(behind) == expected(file)


def test_read_in_scraps(file: MappedFile) -> None:
    """Ranges that have no whole block make a chunk ripe as well, by the last of them."""
    behind = DigestBehind(file, [(0, 5000)])
    feed(behind, (0, 4096))
    assert not finish_ripe(behind)
    feed(behind, (4096, 5000))
    assert finish_ripe(behind)
    assert finish(behind) == expected(file)


def test_no_more_room_than_there_is(file: MappedFile, read_again: list[int]) -> None:
    """What finds no room is not added up, and read at the end; the digest is the same, and memory is bounded."""
    room = Sums(2 * CHUNK // BLOCK * SUM_NBYTES)
    behind = DigestBehind(file, [(0, file.nbytes)], room)
    for chunk in range(4):
        feed(behind, (chunk * CHUNK, chunk * CHUNK + CHUNK // 2))
    assert [chunk.sums is not None for chunk in behind._chunks] == [True, True, False, False, False]
    for chunk in range(4):
        feed(behind, (chunk * CHUNK + CHUNK // 2, chunk * CHUNK + CHUNK))
    assert finish(behind) == expected(file)
    assert 2 * CHUNK <= sum(read_again) < 2.1 * CHUNK
    assert len(room._spare) == 2
    room.clear()
    assert not room._spare
    assert [room.take() is not None for _ in range(3)] == [True, True, False]


def test_many_readers(file: MappedFile) -> None:
    """Readers side by side, with others that finish chunks meanwhile, come to the same digest."""
    for _ in range(20):
        ranges = tiles(file, random.Random())
        behind = DigestBehind(file, ranges, Sums(random.randrange(1, 6) * CHUNK // BLOCK * SUM_NBYTES))
        waiting, lock = iter(ranges), threading.Lock()

        def work(behind: DigestBehind = behind, waiting: object = waiting, lock: threading.Lock = lock) -> None:
            while True:
                with lock:
                    found = [one for _, one in zip(range(random.randrange(1, 4)), waiting, strict=False)]  # type: ignore[call-overload]
                if not found:
                    return
                feed(behind, *found)
                finish_ripe(behind)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert finish(behind) == expected(file)


def test_ranges_that_are_read_again(file: MappedFile) -> None:
    """A tensor that does not fit its plan is read once more, in other tiles, whether its chunk is finished or not."""
    behind = DigestBehind(file, [(0, file.nbytes)])
    for one in [(0, 300_000), (300_000, 400_000), (0, 250_000), (250_000, 600_000), (100, 200), (600_000, file.nbytes)]:
        feed(behind, one)
    while finish_ripe(behind):
        pass
    assert not behind.open
    feed(behind, (0, 300_000))
    assert finish(behind) == expected(file)


def test_what_was_not_added_up(file: MappedFile) -> None:
    """A reader that a kernel refuses adds nothing up: its blocks are read at the end. While one is busy nothing is finished."""
    behind = DigestBehind(file, [(0, file.nbytes)])
    refused, other = behind.claim(0, CHUNK), behind.claim(CHUNK, file.nbytes)
    read(other, CHUNK, random.Random())
    read(refused, 0, random.Random())
    sums = behind._chunks[0].sums
    assert sums is not None
    sums[:] = 0
    refused.added.clear()
    behind.give_back([other])
    while (chunk := behind.take()) is not None:
        behind.finish(chunk)
    with pytest.raises(ValueError, match="not complete"):
        behind.result()
    behind.give_back([refused])
    assert finish(behind) == expected(file)


def test_a_file_that_became_shorter(file: MappedFile) -> None:
    """What is missing is told with its place."""
    behind = DigestBehind(file, [])
    with file.path.open("r+b") as opened:
        opened.truncate(CHUNK + 5000)
    if sys.platform == "linux":
        with pytest.raises(SourceError, match="shorter") as caught:
            finish(behind)
        assert caught.value.offset is not None
        assert CHUNK <= caught.value.offset < 2 * CHUNK


@pytest.mark.parametrize("nbytes", [1, 240, 241, 1023, 1024, 1025, 2049, CHUNK, CHUNK + 1, CHUNK + 241, CHUNK + 1025])
def test_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """A file of any length, read whole or not at all, has its digest; short ends read the stripe before them."""
    monkeypatch.setattr(digests, "CHUNK", CHUNK)
    (tmp_path / "f").write_bytes(np.random.default_rng().bytes(nbytes))
    file = MappedFile(tmp_path / "f")
    for ranges in ([], [(0, nbytes)]):
        behind = DigestBehind(file, ranges)
        for one in ranges:
            feed(behind, one)
        assert finish(behind) == expected(file)
