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
from quantcache.loader.digests import DigestBehind
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


def feed(behind: DigestBehind, file: MappedFile, start: int, stop: int) -> None:
    """Read a range and hand it over."""
    behind.begin(start, stop)
    behind.feed(start, file.memory[start:stop])


def finish(behind: DigestBehind) -> str:
    """Have the rest read."""
    while behind.idle:
        behind.finish_one()
    return behind.result()


@pytest.mark.parametrize("order", ["in order", "reversed", "shuffled", "nothing"])
def test_any_order(file: MappedFile, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was read before what, the digest is that of the file."""
    monkeypatch.setattr(digests, "_PATIENCE_S", 0.0)
    shuffler = random.Random()
    ranges = tiles(file, shuffler)
    behind = DigestBehind(file, ranges)
    given = {"in order": ranges, "reversed": ranges[::-1], "shuffled": shuffler.sample(ranges, len(ranges)), "nothing": []}[order]
    for start, stop in given:
        feed(behind, file, start, stop)
    assert finish(behind) == expected(file)


def test_in_order_reads_nothing_twice(file: MappedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that come in order are digested where they are: only what is nobody's is read."""
    read: list[int] = []
    real = MappedFile.populate
    monkeypatch.setattr(MappedFile, "populate", lambda self, offset, nbytes: (read.append(nbytes), real(self, offset, nbytes))[1])
    ranges = [(100 + n * 50_000, 100 + (n + 1) * 50_000) for n in range((file.nbytes - 100) // 50_000)]
    behind = DigestBehind(file, ranges)
    for start, stop in ranges:
        feed(behind, file, start, stop)
    assert finish(behind) == expected(file)
    assert sum(read) == 100 + file.nbytes - ranges[-1][1]


def test_many_readers(file: MappedFile) -> None:
    """Readers side by side, each waiting for the one before it, come to the same digest."""
    for _ in range(20):
        ranges = tiles(file, random.Random())
        behind = DigestBehind(file, ranges)
        waiting, lock = iter(ranges), threading.Lock()

        def work(behind: DigestBehind = behind, waiting: object = waiting, lock: threading.Lock = lock) -> None:
            while True:
                with lock:
                    found = next(waiting, None)  # type: ignore[call-overload]
                    if found is None:
                        return
                    behind.begin(*found)
                behind.feed(found[0], file.memory[found[0] : found[1]])

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert finish(behind) == expected(file)


def test_ranges_that_are_read_again(file: MappedFile) -> None:
    """A tensor that does not fit its plan is read once more, in other tiles: nothing is digested twice."""
    behind = DigestBehind(file, [(0, file.nbytes)])
    for start, stop in [(0, 300_000), (300_000, 400_000), (0, 250_000), (250_000, 600_000), (100, 200), (600_000, file.nbytes)]:
        feed(behind, file, start, stop)
    assert finish(behind) == expected(file)


def test_a_reader_that_fails(file: MappedFile) -> None:
    """Nobody waits for a range that could not be read; it is asked for again at the end, and fails there."""
    behind = DigestBehind(file, [(0, file.nbytes)])
    behind.begin(0, 1000)
    behind.give_up(0, 1000)
    feed(behind, file, 1000, CHUNK)
    assert behind.open
    with pytest.raises(ValueError, match="not complete"):
        behind.result()
    assert finish(behind) == expected(file)


def test_a_file_that_became_shorter(file: MappedFile) -> None:
    """What is missing is told with its place."""
    behind = DigestBehind(file, [])
    with file.path.open("r+b") as opened:
        opened.truncate(CHUNK + 5000)
    if sys.platform == "linux":
        with pytest.raises(SourceError, match="shorter"):
            finish(behind)
