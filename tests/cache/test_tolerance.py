"""What cannot be told now is not taken for nothing: pins, folders, a busy index, what another process does meanwhile."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcache.cache import maintenance
from quantcache.cache.blobs import StoredEntry
from quantcache.cache.maintenance import prune, repair, verify
from quantcache.cache.store import Cache
from quantcache.errors import CacheError

Put = Callable[..., StoredEntry]


def _failing(monkeypatch: pytest.MonkeyPatch, function: str, part: str) -> None:
    """Let a listing of a folder fail."""
    real = getattr(os, function)

    def call(path: Any = ".") -> Any:
        if f"{os.sep}{part}" in str(path):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, function, call)


def test_pins_that_cannot_be_read(store: Cache, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is evicted as long as nobody can tell what is pinned."""
    entry = put(store, 0)
    store.pin(entry.key)
    _failing(monkeypatch, "listdir", "pins")
    with pytest.raises(CacheError, match="pinned"):
        prune(store, max_size=0)
    store.max_size = 1
    with pytest.raises(CacheError, match="pinned"):
        put(store, 1)
    assert entry.path.exists()


def test_pinned_at_the_last_moment(store: Cache, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that is pinned while a prune is planned stays."""
    entry = put(store, 0)
    monkeypatch.setattr(Cache, "pinned", lambda self: set())
    store.pin(entry.key)
    assert prune(store, max_size=0).entries == []
    assert entry.path.exists()


@pytest.mark.parametrize("what", ["scandir", "listdir"])
def test_repair_loses_no_pin(store: Cache, put: Put, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Neither a folder that cannot be read for once, nor damage of the entry, takes a pin away."""
    entry = put(store, 0)
    store.pin(entry.key)
    _failing(monkeypatch, what, f"entries{os.sep}" if what == "scandir" else "entries")
    repair(store)
    monkeypatch.undo()
    assert store.pinned() == {entry.key}
    raw = bytearray(entry.path.read_bytes())
    raw[-1] ^= 1
    entry.path.write_bytes(raw)
    with pytest.warns(match="quarantine"):
        repair(store)
    assert store.pinned() == {entry.key}
    assert put(store, 0).key == entry.key


def test_a_folder_that_cannot_be_read_for_once(store: Cache, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entries stay in the index, and are there when it can be read again."""
    entries = [put(store, number) for number in range(3)]
    for entry in entries:
        os.utime(entry.path.parent, (1, 1))
    assert len(store.entries()) == 3
    os.utime(entries[0].path.parent, (2, 2))
    _failing(monkeypatch, "scandir", entries[0].path.parent.name)
    assert len(store.entries()) == 3
    monkeypatch.undo()
    assert len(store.entries()) == 3


def test_an_entry_that_cannot_be_read_for_once(store: Cache, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no row for now, and gets one as soon as it can be read."""
    entry = put(store, 0)
    os.utime(entry.path.parent, (1, 1))
    store.close()
    (store.folder / "index.sqlite3").unlink()
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert store.entries() == []
    monkeypatch.setattr(os, "pread", real)
    assert [row.key for row in store.entries()] == [entry.key]


def test_repair_leaves_what_was_built_again(store: Cache, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that another process built again after the check is not taken away."""
    entry = put(store, 0)
    raw = entry.path.read_bytes()
    entry.path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    real = maintenance.verify

    def check(*arguments: Any, **options: Any) -> Any:
        done = real(*arguments, **options)
        entry.path.write_bytes(raw)
        return done

    monkeypatch.setattr(maintenance, "verify", check)
    repair(store)
    assert entry.path.exists()


def test_a_busy_index(store: Cache, put: Put) -> None:
    """While another process writes, listings and limits are right, from a copy; afterwards everything goes on."""
    first = put(store, 0)
    store.close()
    writer = sqlite3.connect(store.folder / "index.sqlite3", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE counters SET amount = amount")
    second = shutil.copy(first.path, first.path.with_name(f"{first.key[:-1]}{'0' if first.key[-1] != '0' else '1'}.safetensors"))
    with Cache(store.root, max_size=1 << 40, keep_free="0") as cache:
        assert {row.key for row in cache.entries()} == {first.key, Path(second).stem}
        assert cache.usage()["entries"] == 2 * first.header.nbytes
    with Cache(store.root, max_size=1 << 40, keep_free="0") as cache, pytest.warns(match="locked"):
        put(cache, 5)
        writer.execute("ROLLBACK")
        writer.close()
        assert len(cache) == 3
        assert cache.stats() is not None
    with Cache(store.root) as cache:
        assert len(cache) == 3


def test_quarantine_goes_before_entries(store: Cache, put: Put) -> None:
    """A limit is first met by what nobody can use."""
    entry = put(store, 0)
    (store.folder / "quarantine" / "old").write_bytes(bytes(200_000))
    limit = entry.header.nbytes + 50_000
    assert prune(store, max_size=limit, dry_run=True).entries == []
    found = prune(store, max_size=limit)
    assert found.entries == []
    assert found.freed >= 200_000
    assert entry.path.exists()


def test_repair_of_a_sound_store_leaves_nothing(store: Cache, put: Put) -> None:
    """A sound index that is made anew is not kept."""
    put(store, 0)
    for _ in range(3):
        repair(store)
    assert list((store.folder / "quarantine").iterdir()) == []
    assert len(store) == 1


def test_verify_beside_others(store: Cache, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others evict, store and pin during a check is no finding."""
    goes, stays = put(store, 0), put(store, 1)
    real = StoredEntry.intact
    done: list[str] = []

    def intact(self: StoredEntry, key: str) -> bool:
        if not done:
            done.append(key)
            for entry in (goes, stays):
                if entry.key != self.key:
                    entry.path.unlink()
            store.pin(put(store, 2).key)
        return real(self, key)

    monkeypatch.setattr(StoredEntry, "intact", intact)
    assert verify(store).findings == []


def test_what_is_no_file(store: Cache, put: Put) -> None:
    """A FIFO or a folder under an entry's name is none: nobody waits for it, and repair moves it away."""
    fifo, folder = put(store, 0), put(store, 1)
    for entry in (fifo, folder):
        entry.path.unlink()
    os.mkfifo(fifo.path)
    folder.path.mkdir()
    (folder.path / "inside").write_bytes(bytes(5000))
    assert store.entries() == []
    assert store.usage()["entries"] >= 5000
    found = [f.subject for f in verify(store).findings if "is no entry" in f.problem]
    assert {Path(subject).stem for subject in found} == {fifo.key, folder.key}
    with pytest.warns(match="no regular file"):
        assert store.find({"number": 0, "nbytes": 10_000}) is None
    repair(store)
    assert put(store, 0).key == fifo.key
    prune(store, orphans=True)
    assert list((store.folder / "quarantine").iterdir()) == []


def test_stale_sources_of_any_name(store: Cache, put: Put, tmp_path: Path) -> None:
    """A source whose name is no UTF-8 is there all the same; one that cannot be looked at is not gone."""
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.safetensors")
    Path(strange).write_bytes(b"x")
    put(store, 0, path=strange)
    put(store, 1, path=str(tmp_path / "gone.safetensors"))
    put(store, 2, path=str(tmp_path / ("x" * 300)))
    found = prune(store, stale_source=True)
    assert [row.source_path for row in found.entries] == [str(tmp_path / "gone.safetensors")]
