"""Hold the digest that is taken behind the readers to the digest of the whole file."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from quantcache.errors import SourceError
from quantcache.loader import digests
from quantcache.loader.digests import Claim, DigestBehind
from quantcache.loader.mapping import MappedFile

CHUNK = 1 << 20


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MappedFile:
    """A file of five chunks, the last one short; chunks are small here."""
    monkeypatch.setattr(digests, "CHUNK", CHUNK)
    monkeypatch.setattr(digests, "_PIECE", 1000)
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


def feed(behind: DigestBehind, start: int, stop: int) -> None:
    """Claim a range and digest it."""
    behind.claim(start, stop).keep()


def finish(behind: DigestBehind) -> str:
    """Have the rest read."""
    while behind.idle:
        behind.finish_one()
    return behind.result()


@pytest.mark.parametrize("order", ["in order", "reversed", "shuffled", "nothing"])
def test_any_order(file: MappedFile, order: str) -> None:
    """Whatever was read before what, the digest is that of the file."""
    shuffler = random.Random()
    ranges = tiles(file, shuffler)
    behind = DigestBehind(file, ranges)
    given = {"in order": ranges, "reversed": ranges[::-1], "shuffled": shuffler.sample(ranges, len(ranges)), "nothing": []}[order]
    for start, stop in given:
        feed(behind, start, stop)
    assert finish(behind) == expected(file)


def test_in_order_reads_nothing_twice(file: MappedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that come in order are digested once, where they are; what is nobody's is, too."""
    read: list[int] = []
    real = digests.Stream.add_in_turn
    monkeypatch.setattr(digests.Stream, "add_in_turn", lambda *given: (read.append(given[3]), real(*given))[1])
    ranges = [(100 + n * 50_000, 100 + (n + 1) * 50_000) for n in range((file.nbytes - 100) // 50_000)]
    behind = DigestBehind(file, ranges)
    for start, stop in ranges:
        feed(behind, start, stop)
    assert sum(read) == ranges[-1][1]
    assert finish(behind) == expected(file)
    assert sum(read) == file.nbytes


def test_many_readers(file: MappedFile) -> None:
    """Readers side by side, each waiting for the one before it, come to the same digest."""
    for _ in range(20):
        ranges = tiles(file, random.Random())
        behind = DigestBehind(file, ranges)
        waiting, lock = iter(ranges), threading.Lock()

        def work(behind: DigestBehind = behind, waiting: object = waiting, lock: threading.Lock = lock) -> None:
            while True:
                with lock:
                    found = [claim for _, claim in zip(range(random.randrange(1, 4)), waiting, strict=False)]  # type: ignore[call-overload]
                    claims = [behind.claim(*one) for one in found]
                if not claims:
                    return
                whole = Claim.of_all(claims)
                assert whole is not None
                whole.keep()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert finish(behind) == expected(file)


def test_claims_wait_for_their_turn(file: MappedFile) -> None:
    """A range is digested only once the one before it is, which may take its time."""
    behind = DigestBehind(file, [(0, file.nbytes)])
    first, second = behind.claim(0, 1000), behind.claim(1000, CHUNK)
    thread = threading.Thread(target=second.keep)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    assert behind._chunks[0].state.at == 0
    first.keep()
    thread.join(60)
    assert finish(behind) == expected(file)


def test_several_claims_as_one(file: MappedFile) -> None:
    """What stands side by side is one range, chunk by chunk, and covers what each did."""
    behind = DigestBehind(file, [(0, file.nbytes)])
    claim = Claim.of_all([behind.claim(0, 1000), behind.claim(1000, CHUNK + 5), behind.claim(CHUNK + 5, CHUNK + 9)])
    assert claim is not None
    assert [part[1:] for part in claim._parts] == [(0, CHUNK), (CHUNK, CHUNK + 9)]
    assert claim.covers(500, 2000)
    assert not claim.covers(CHUNK + 5, CHUNK + 10)
    assert Claim.of_all([]) is None


def test_ranges_that_are_read_again(file: MappedFile) -> None:
    """A tensor that does not fit its plan is read once more, in other tiles: nothing is digested twice."""
    behind = DigestBehind(file, [(0, file.nbytes)])
    for start, stop in [(0, 300_000), (300_000, 400_000), (0, 250_000), (250_000, 600_000), (100, 200), (600_000, file.nbytes)]:
        feed(behind, start, stop)
    assert finish(behind) == expected(file)


def test_a_claim_that_is_never_kept(file: MappedFile) -> None:
    """Once it is stopped nobody waits for a range that will not come; the digest cannot be had then."""
    behind = DigestBehind(file, [(0, file.nbytes)])
    behind.claim(0, 1000)
    thread = threading.Thread(target=behind.claim(1000, CHUNK).keep)
    thread.start()
    behind.stop()
    thread.join(60)
    assert not thread.is_alive()
    while behind.idle:
        behind.finish_one()
    with pytest.raises(ValueError, match="not complete"):
        behind.result()


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
