"""Entries appear whole or not at all; temp files of the dead go, those of the living stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcache.cache.blobs import StagedEntry, StoredEntry, quarantine, remove_stale
from quantcache.cache.container import Slot
from quantcache.cache.key import digest
from quantcache.errors import CacheError, CorruptEntryError

DETAILS: dict[str, Any] = {"document": {"a": 1}, "records": ["r"], "built": {"seconds": 1}}


def _array(seed: int, nbytes: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def _write(staged: StagedEntry, key: str, array: Any) -> None:
    for start in range(0, array.size, staged.slots[key].chunk):
        staged.write(key, start, array[start : start + staged.slots[key].chunk])


def _slots() -> dict[str, Slot]:
    return {"a": Slot("U8", (9000,), 4096), "b": Slot("U8", (64,), 4096, 1), "empty": Slot("F32", (0, 3), 4096)}


def _view(staged: StagedEntry, key: str) -> memoryview:
    home, start = staged.where(key)
    return memoryview(home)[start : start + staged.slots[key].nbytes]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Return where an entry goes, in a folder that is not there yet."""
    (tmp_path / "entries").mkdir()
    return tmp_path / "entries" / "ab" / f"{'ab' * 16}.safetensors"


def test_publish(tmp_path: Path, target: Path) -> None:
    """Nothing is visible before publishing; afterwards all of it is, and views go on."""
    staged = StagedEntry(tmp_path, _slots())
    _write(staged, "a", _array(0, 9000))
    _write(staged, "b", _array(1, 64))
    view = _view(staged, "a")
    assert not target.exists()
    assert staged.publish(target, **DETAILS) == target.stat().st_size
    assert not list(tmp_path.glob("*.tmp"))
    entry = StoredEntry("ab" * 16, target)
    assert (entry.header.document, entry.header.records, entry.header.built) == tuple(DETAILS.values())
    assert bytes(view) == bytes(entry.view("a")) == _array(0, 9000).tobytes()
    assert all(entry.intact(key) for key in ("a", "b", "empty"))
    assert target.stat().st_mode & 0o777 == 0o600


def test_incomplete_is_refused(tmp_path: Path, target: Path) -> None:
    """A tensor of which a piece is missing is never published."""
    staged = StagedEntry(tmp_path, _slots())
    staged.write("a", 0, _array(0, 4096))
    staged.write("a", 8192, _array(0, 808))
    _write(staged, "b", _array(1, 64))
    with pytest.raises(CacheError, match="'a'"):
        staged.publish(target, **DETAILS)
    assert not target.exists()
    staged.discard()


@pytest.mark.parametrize("key", ["a", "b"])
def test_replaced_and_not_written(tmp_path: Path, target: Path, key: str) -> None:
    """What was written of a tensor's first plan does not count for its second."""
    staged = StagedEntry(tmp_path, _slots())
    _write(staged, "a", _array(0, 9000))
    _write(staged, "b", _array(1, 64))
    staged.replace([key], {key: staged.slots[key]})
    with pytest.raises(CacheError, match=f"'{key}'"):
        staged.publish(target, **DETAILS)
    assert not target.exists()
    staged.discard()


@pytest.mark.parametrize(("key", "position"), [("a", 12_288), ("a", 8192), ("b", 4096)])
def test_written_beyond_the_end(tmp_path: Path, target: Path, key: str, position: int) -> None:
    """Pieces that are written where a tensor has none, over another one perhaps, keep the entry from being published."""
    staged = StagedEntry(tmp_path, _slots())
    _write(staged, "a", _array(0, 9000))
    _write(staged, "b", _array(1, 64))
    staged.wrote(key, position, [bytes(range(16))] * staged.slots[key].chunks)
    with pytest.raises(CacheError, match=f"'{key}'"):
        staged.publish(target, **DETAILS)
    staged.discard()


def test_pieces_written_together_and_again(tmp_path: Path, target: Path) -> None:
    """It is the last digest of a piece that counts, whether it was written with all others or alone."""
    staged = StagedEntry(tmp_path, _slots())
    _write(staged, "b", _array(1, 64))
    for array in (_array(2, 9000), _array(3, 9000)):
        for start in (0, 4096, 8192):
            staged.write("a", start, array[start : start + 4096])
        staged.wrote("a", 0, [digest(array[start : start + 4096]) for start in (0, 4096, 8192)])
    staged.write("a", 4096, _array(4, 4096))
    staged.publish(target, **DETAILS)
    entry = StoredEntry("ab" * 16, target)
    assert all(entry.intact(key) for key in ("a", "b", "empty"))
    assert bytes(entry.view("a"))[4096:8192] == _array(4, 4096).tobytes()


def test_discard(tmp_path: Path) -> None:
    """Discarding removes the file; what was handed out goes on, what was replaced too."""
    staged = StagedEntry(tmp_path, _slots())
    _write(staged, "a", _array(0, 9000))
    staged.replace(["b"], {"b": Slot("F32", (16,), 4096, 1)})
    staged.write("b", 0, _array(2, 64))
    view = _view(staged, "a")
    staged.discard()
    staged.discard()
    assert not list(tmp_path.glob("*.tmp"))
    assert bytes(view) == _array(0, 9000).tobytes()
    assert bytes(_view(staged, "b")) == _array(2, 64).tobytes()


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such limit")
def test_replace_without_room(tmp_path: Path) -> None:
    """A file that cannot be made longer stays as it was, and so does what is planned: the next tensor is refused, too, and then has room."""
    import resource

    staged = StagedEntry(tmp_path, _slots())
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
        for key in ("a", "b"):
            with pytest.raises(CacheError, match="extend"):
                staged.replace([key], {key: Slot("F32", (3000,), 4096)})
            assert staged.slots[key].dtype == "U8"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    staged.replace(["b"], {"b": Slot("F32", (3000,), 4096)})
    _write(staged, "b", _array(3, 12_000))
    assert bytes(_view(staged, "b")) == _array(3, 12_000).tobytes()
    staged.discard()


def test_replace_then_publish(tmp_path: Path, target: Path) -> None:
    """A tensor that is planned anew is published in its new form, the others unharmed, the file without holes."""
    staged = StagedEntry(tmp_path, _slots())
    _write(staged, "b", _array(1, 64))
    staged.write("a", 0, _array(7, 4096))
    staged.replace(["a"], {"a": Slot("F32", (3000,), 4096), "a.scales": Slot("F16", (5,), 4096)})
    _write(staged, "a", _array(3, 12_000))
    staged.write("a.scales", 0, _array(4, 10))
    staged.publish(target, **DETAILS)
    entry = StoredEntry("ab" * 16, target)
    expected = {"a": _array(3, 12_000), "a.scales": _array(4, 10), "b": _array(1, 64), "empty": _array(0, 0)}
    assert entry.header.slots.keys() == expected.keys()
    for key, array in expected.items():
        assert bytes(entry.view(key)) == array.tobytes()
        assert entry.intact(key)
        if array.size:
            assert bytes(_view(staged, key)) == array.tobytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_order_of_replacing_does_not_matter(tmp_path: Path) -> None:
    """Threads finish in any order; the data section is the same."""
    seen = []
    for order in (("a", "b"), ("b", "a")):
        target = tmp_path / "entries" / "ab" / f"{order[0]}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = StagedEntry(tmp_path, dict.fromkeys("ab", Slot("U8", (64,), 4096)))
        for key in order:
            staged.replace([key], {key: Slot("F32", (64,), 4096)})
        for key in "ab":
            staged.write(key, 0, _array(ord(key), 256))
        staged.publish(target, **DETAILS)
        entry = StoredEntry(order[0], target)
        seen.append(bytes(entry.memory[min(entry.header.offsets.values()) :]))
    assert seen[0] == seen[1]


def test_records_that_grew(tmp_path: Path, target: Path) -> None:
    """Records longer than the room kept for the header move the data, and lose nothing."""
    staged = StagedEntry(tmp_path, _slots())
    _write(staged, "a", _array(0, 9000))
    _write(staged, "b", _array(1, 64))
    staged.publish(target, document={}, records=["x" * 50_000], built={})
    entry = StoredEntry("ab" * 16, target)
    assert entry.header.records == ["x" * 50_000]
    assert all(entry.intact(key) for key in entry.header.slots)
    assert bytes(entry.view("a")) == _array(0, 9000).tobytes()


def test_failing_sync_of_the_folder(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the rename cannot be made durable, publishing fails and nothing is visible, as promised."""
    staged = StagedEntry(tmp_path, {"a": Slot("U8", (64,), 4096)})
    staged.write("a", 0, _array(0, 64))
    real = os.fsync
    target.parent.mkdir()

    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CacheError):
        staged.publish(target, **DETAILS)
    assert not target.exists()
    staged.discard()
    assert not list(tmp_path.glob("*.tmp"))


HOLD = """
import sys, time
from pathlib import Path
from quantcache.cache.blobs import StagedEntry
from quantcache.cache.container import Slot
staged = StagedEntry(Path(sys.argv[1]), {"a": Slot("U8", (64,), 64)})
print("ready", flush=True)
time.sleep(600)
"""


def test_stale_files(tmp_path: Path) -> None:
    """A living writer's file stays, whoever asks; once it is killed, the file goes."""
    own = StagedEntry(tmp_path, {"a": Slot("U8", (64,), 64)})
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    assert remove_stale(tmp_path) == []
    assert len(list(tmp_path.glob("*.tmp"))) == 2
    other.kill()
    other.communicate()
    assert [path.name.partition("-")[0] for path, _ in remove_stale(tmp_path, dry_run=True)] == [str(other.pid)]
    assert len(list(tmp_path.glob("*.tmp"))) == 2
    assert len(remove_stale(tmp_path)) == 1
    (left,) = tmp_path.glob("*.tmp")
    assert left.name.startswith(f"{os.getpid()}-")
    own.discard()


def test_stale_by_age(tmp_path: Path) -> None:
    """A file whose number belongs to a living process goes after a day without a write, not before."""
    path = tmp_path / f"{os.getppid()}-feed.tmp"
    path.write_bytes(b"x")
    assert remove_stale(tmp_path) == []
    os.utime(path, (time.time() - 90_000,) * 2)
    assert remove_stale(tmp_path) == [(path, 1)]


def test_stale_under_our_own_number(tmp_path: Path) -> None:
    """A file of a dead process that had this one's number, as all have in containers, is not ours: it goes."""
    path = tmp_path / f"{os.getpid()}-feed.tmp"
    path.write_bytes(b"x")
    assert remove_stale(tmp_path) == [(path, 1)]


def test_locked_file_stays_however_old(tmp_path: Path) -> None:
    """A lock counts more than age: a build that takes two days is alive."""
    staged = StagedEntry(tmp_path, {"a": Slot("U8", (64,), 64)})
    (path,) = tmp_path.glob("*.tmp")
    os.utime(path, (1, 1))
    assert remove_stale(tmp_path) == []
    staged.discard()


def test_quarantine(tmp_path: Path) -> None:
    """Two files of one name stand beside each other in quarantine, under names that are no entry's."""
    for _ in range(2):
        path = tmp_path / f"{'ab' * 16}.safetensors"
        path.write_bytes(b"x")
        moved = quarantine(path, tmp_path / "quarantine")
        assert moved is not None
        assert moved.suffix != ".safetensors"
        assert not path.exists()
    assert len(list((tmp_path / "quarantine").iterdir())) == 2
    assert quarantine(tmp_path / "nothing", tmp_path / "quarantine") is None


@pytest.mark.parametrize("raw", [b"", b"1234567", b"\0" * 8, b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{}"])
def test_garbage_is_no_entry(tmp_path: Path, raw: bytes) -> None:
    """Whatever lies in an entry's place is reported as damage."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CorruptEntryError):
        StoredEntry("x", path)
