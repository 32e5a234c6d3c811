"""Mapped bytes that are kept are what they were, where they were, whatever becomes of the file."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from quantcache import memory
from quantcache.memory import keep

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings are replaced on Linux only")


@pytest.mark.parametrize("nbytes", [1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 5])
def test_views_outlive_the_file(tmp_path: Path, nbytes: int) -> None:
    """Views and arrays that were made before go on showing the bytes; those of another mapping show what the file has now."""
    path = tmp_path / "f"
    raw = np.random.default_rng().integers(0, 256, nbytes, np.uint8).tobytes()
    path.write_bytes(raw)
    with path.open("r+b") as file:
        mapped, other = (mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ) for _ in range(2))
        view, array = memoryview(mapped)[nbytes // 2 :], np.frombuffer(mapped, np.uint8)
        assert keep(mapped)
        file.write(bytes(byte ^ 255 for byte in raw))
        file.flush()
    assert bytes(array) == bytes(mapped) == raw
    assert bytes(view) == raw[nbytes // 2 :]
    assert bytes(other) == bytes(byte ^ 255 for byte in raw)
    with pytest.raises((TypeError, ValueError)):
        view[0] = 0
    del view, array
    mapped.close()


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    """Bytes that cannot be read any more cannot be kept, which is told and kills nobody."""
    path = tmp_path / "f"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 3 * mmap.PAGESIZE, access=mmap.ACCESS_READ)
        file.truncate(10)
    assert not keep(mapped)
    assert bytes(mapped[:10]) == bytes(10)


def test_a_page_of_broken_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that the memory itself lost is not touched either: what madvise() says of it is understood, and it is not copied."""
    mapped, poisoned = mmap.mmap(-1, 4096), 133
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *_: ctypes.set_errno(poisoned) or -1)
    assert memory.populate(0, 1) == poisoned
    assert not keep(mapped)


def test_pages_are_a_process_s_own() -> None:
    """Memory that is asked for is zeros, of any size, and not shared with a child of fork, which would be counted and paged otherwise."""
    found = memory.pages(3 * mmap.PAGESIZE + 5)
    assert bytes(found) == bytes(3 * mmap.PAGESIZE + 5)
    assert len(memory.pages(0)) == 1
    child = os.fork()
    if not child:
        found[0] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert found[0] == 0


def test_pages_that_there_are_not() -> None:
    """What the system does not have is told as memory that is missing always is."""
    with pytest.raises(MemoryError, match="bytes"):
        memory.pages(1 << 60)
