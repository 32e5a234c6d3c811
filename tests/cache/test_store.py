"""The store builds once, keeps its limits, and never takes away what somebody uses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcache.cache.blobs import StagedEntry, StoredEntry
from quantcache.cache.container import Slot
from quantcache.cache.index import Index
from quantcache.cache.key import key_of
from quantcache.cache.store import Cache
from quantcache.errors import (
    CacheError,
    KeyNotFoundError,
    LockTimeoutError,
    NoCacheError,
    QuantcacheWarning,
    StoreReadOnlyError,
    StoreTooNewError,
    UsageError,
)

Put = Callable[..., StoredEntry]
Content = Callable[[int, int], dict[str, Any]]


def _use(cache: Cache, key: str, at_s: float) -> None:
    cache.index.call(lambda index: index.note({key: 1}, {}, at_s), None)


def _keys(cache: Cache) -> set[str]:
    return {row.key for row in cache.entries()}


def test_get_or_build(store: Cache, content: Content) -> None:
    """Any loader can keep its own tensors: built once, found afterwards, by content of the document alone."""
    calls = []

    def build(stage: Callable[..., StagedEntry]) -> tuple[StagedEntry, Any]:
        calls.append(1)
        staged = stage({"codes": Slot("U8", (5000,), 8192)})
        staged.write("codes", 0, content(1, 5000)["codes"])
        return staged, {"mine": True}

    first = store.get_or_build({"a": 1, "b": 2}, build)
    second = store.get_or_build({"b": 2, "a": 1}, build)
    assert len(calls) == 1
    assert first.key == second.key == key_of({"a": 1, "b": 2})
    assert second.header.records == {"mine": True}
    assert bytes(second.view("codes")) == content(1, 5000)["codes"].tobytes()
    store.get_or_build({"a": 1, "b": 3}, build)
    assert len(calls) == 2
    assert store.stats()["hits"] == 1


def test_get_or_build_once_for_all_threads(tmp_path: Path, put: Put) -> None:
    """Eight threads with caches of their own want the same entry: one builds."""
    built = []

    def build(stage: Callable[..., StagedEntry]) -> tuple[StagedEntry, Any]:
        built.append(1)
        time.sleep(0.05)
        staged = stage({"x": Slot("U8", (10,), 64)})
        staged.write("x", 0, np.arange(10, dtype=np.uint8))
        return staged, []

    found = []

    def work() -> None:
        with Cache(tmp_path / "s", keep_free="0") as cache:
            found.append(bytes(cache.get_or_build({"x": 1}, build).view("x")))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [bytes(range(10))] * 8
    assert len(built) == 1


def test_a_locked_file_of_the_dead_goes_later(store: Cache) -> None:
    """What a killed process had still locked when its build was taken over is gone when that is published."""
    fcntl = pytest.importorskip("fcntl")
    dead = store.folder / "tmp" / "4194305-dead.tmp"  # above the highest process number

    def build(stage: Callable[..., StagedEntry]) -> tuple[StagedEntry, Any]:
        with dead.open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            staged = stage({"x": Slot("U8", (10,), 64)})
            assert dead.exists()
        staged.write("x", 0, bytes(10))
        return staged, []

    store.get_or_build({"x": 1}, build)
    assert not list((store.folder / "tmp").iterdir())


def test_failing_build_leaves_nothing(store: Cache) -> None:
    """A foreign loader's exception is its own; no temp file, no lock and no entry stay behind."""

    def build(stage: Callable[..., StagedEntry]) -> tuple[StagedEntry, Any]:
        staged = stage({"x": Slot("U8", (10,), 64)})
        staged.write("x", 0, bytes(10))
        raise RuntimeError("mine")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            store.get_or_build({"x": 1}, build)
    assert not store.entries()
    assert not list((store.folder / "tmp").iterdir())


def test_pins_survive_eviction(tmp_path: Path, put: Put) -> None:
    """The least recently used entry goes first, a pinned one never."""
    cache = Cache(tmp_path / "s", max_size=1 << 40, keep_free="0")
    entries = [put(cache, n) for n in range(3)]
    for n, entry in enumerate(entries):
        _use(cache, entry.key, 4e9 + n)
    cache.pin(entries[0].key[:8])
    cache.max_size = cache.usage()["total"]
    fourth = put(cache, 3)
    assert _keys(cache) == {entries[0].key, entries[2].key, fourth.key}
    assert cache.stats()["evicted"] == 1


def test_unpinned_goes(tmp_path: Path, put: Put) -> None:
    """What is no longer pinned is evicted like the rest."""
    cache = Cache(tmp_path / "s", max_size=1 << 40, keep_free="0")
    entry = put(cache, 0)
    cache.pin(entry.key)
    assert cache.pinned() == {entry.key}
    cache.max_size = 11_000
    with pytest.raises(CacheError, match="do not fit"):
        put(cache, 1)
    assert _keys(cache) == {entry.key}
    cache.unpin(entry.key)
    cache.max_size = 12_000
    put(cache, 1)
    assert entry.key not in _keys(cache)


@pytest.mark.parametrize(("policy", "goes"), [("lru", 0), ("size", 1), ("cost", 2)])
def test_policies(tmp_path: Path, put: Put, policy: str, goes: int) -> None:
    """The policy lru takes the oldest, size the largest, cost what is cheapest to build again."""
    cache = Cache(tmp_path / "s", policy=policy, max_size=1 << 40, keep_free="0")
    sizes, seconds = [50_000, 300_000, 200_000], [10.0, 50.0, 0.1]
    keys = []
    for n in range(3):
        entry = put(cache, n, nbytes=sizes[n], path=f"/m{n}")
        keys.append(entry.key)
        row = next(row for row in cache.entries() if row.key == entry.key)
        changed = replace(row, used_s=4e9 + n, build_s=seconds[n])
        cache.index.call(partial(Index.put, rows=[changed]), None)
    cache.max_size = cache.usage()["total"]
    cache.make_room(1)
    assert _keys(cache) == set(keys) - {keys[goes]}


def test_keep_free(tmp_path: Path, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that shall stay free on the disk is kept by evicting; a share means the disk's."""
    import shutil

    cache = Cache(tmp_path / "s", max_size=1 << 40, keep_free="10%")
    entry = put(cache, 0)
    usage = type(shutil.disk_usage(tmp_path))

    def disk(_: Path) -> Any:
        free = 105_000 if entry.path.exists() else 105_000 + entry.header.nbytes
        return usage(1_000_000, 1_000_000 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", disk)
    assert cache.over_limits(0) < 0
    assert cache.over_limits(5_001) == 1
    cache.make_room(5_000)
    assert entry.key in _keys(cache)
    cache.keep_free = "105000"
    assert cache.over_limits(1) == 1
    cache.keep_free = "10%"
    cache.make_room(5_001)
    assert entry.key not in _keys(cache)


def test_no_room_is_an_error_of_the_store(tmp_path: Path, put: Put) -> None:
    """What cannot fit is refused with a hint, before a byte is written."""
    cache = Cache(tmp_path / "s", max_size=5_000, keep_free="0")
    with pytest.raises(CacheError, match="do not fit") as caught:
        put(cache, 0)
    assert caught.value.hint
    assert not list((cache.folder / "tmp").iterdir())


def test_quarantine_and_temp_files_count(store: Cache, put: Put) -> None:
    """The limit counts what lies in quarantine and tmp, and quarantine goes before any entry."""
    entry = put(store, 0)
    (store.folder / "quarantine" / "old").write_bytes(bytes(70_000))
    (store.folder / "tmp" / "x").write_bytes(bytes(1_000))
    usage = store.usage()
    assert (usage["quarantine"], usage["tmp"]) == (70_000, 1_000)
    assert usage["total"] == usage["entries"] + 71_000
    store.max_size = usage["total"]
    store.make_room(50_000)
    assert _keys(store) == {entry.key}
    assert store.usage()["quarantine"] == 0


def test_damaged_is_quarantined_and_built_again(store: Cache, put: Put) -> None:
    """An entry whose header is wrong is moved away with one warning, and found again once it is built."""
    entry = put(store, 0)
    raw = bytearray(entry.path.read_bytes())
    raw[40] ^= 1
    entry.path.write_bytes(raw)
    with pytest.warns(QuantcacheWarning, match="damaged") as caught:
        assert store.find({"number": 0, "nbytes": 10_000}) is None
    assert len(caught) == 1
    assert not entry.path.exists()
    assert not store.entries()
    assert [path.read_bytes() for path in (store.folder / "quarantine").iterdir()] == [bytes(raw)]
    assert put(store, 0).key == entry.key
    assert store.find({"number": 0, "nbytes": 10_000}) is not None


def test_entry_under_another_key(store: Cache, put: Put) -> None:
    """A whole entry in the place of another is damage: the document is compared, not only the name."""
    one, two = put(store, 0), put(store, 1)
    two.path.write_bytes(one.path.read_bytes())
    with pytest.warns(QuantcacheWarning, match="another key document"):
        assert store.find({"number": 1, "nbytes": 10_000}) is None


def test_removed_while_mapped(store: Cache, put: Put, content: Content) -> None:
    """Whoever has an entry mapped reads on after it was removed, and after it was built anew."""
    entry = put(store, 0)
    inode = entry.path.stat().st_ino
    assert store.remove(entry.key) == entry.header.nbytes
    assert store.remove(entry.key) == 0
    put(store, 0)
    assert entry.path.stat().st_ino != inode or entry.path.exists()
    assert bytes(entry.view("codes")) == content(0, 10_000)["codes"].tobytes()
    assert entry.intact("codes")


def test_lookup_by_prefix(store: Cache, put: Put) -> None:
    """A key can be cut as long as it is one entry's; upper case is fine; nothing and too little are refused."""
    keys = [put(store, n).key for n in range(17)]  # more than 16: two start alike
    for key in keys:
        assert store.lookup(key).key == store.lookup(key.upper()).key == key
    twice = next(key[0] for key in keys if sum(other[0] == key[0] for other in keys) > 1)
    with pytest.raises(KeyNotFoundError, match="start with"):
        store.lookup(twice)
    for nothing in ("", "x", "0" * 33):
        with pytest.raises(KeyNotFoundError):
            store.lookup(nothing)


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "A" * 32, "a" * 31, "a" * 33, "a" * 32 + "\n", "é" * 32])
def test_only_keys_become_paths(store: Cache, key: str) -> None:
    """Nothing but 32 hex digits becomes part of a path."""
    for refuse in (store.path_of, store.acquire, store.open):
        with pytest.raises(UsageError):
            refuse(key)


def test_readonly_refuses_changes(store: Cache, put: Put) -> None:
    """A read-only store refuses everything that would change it, and changes nothing."""
    key = put(store, 0).key
    store.close()
    before = sorted((path, path.stat().st_mtime_ns) for path in store.root.rglob("*"))
    cache = Cache(store.root, readonly=True)
    for change in (
        lambda: cache.stage({}),
        lambda: cache.pin(key),
        lambda: cache.unpin(key),
        lambda: cache.remove(key),
        cache.rebuild_index,
    ):
        with pytest.raises(StoreReadOnlyError):
            change()
    assert sorted((path, path.stat().st_mtime_ns) for path in store.root.rglob("*")) == before


def test_no_store(tmp_path: Path) -> None:
    """Where there is no store, a reader says so and makes none."""
    for options in ({"readonly": True}, {"create": False}):
        with pytest.raises(NoCacheError):
            Cache(tmp_path / "s", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()
    (tmp_path / "s" / "v99").mkdir(parents=True)
    with pytest.raises(StoreTooNewError):
        Cache(tmp_path / "s", create=False)
    Cache(tmp_path / "s").close()
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["CACHEDIR.TAG", "v1", "v99"]


def test_private_by_default(store: Cache) -> None:
    """Only its owner may look into a store; it is tagged for backup programs."""
    for folder in (store.root, store.folder, *(path for path in store.folder.iterdir() if path.is_dir())):
        assert folder.stat().st_mode & 0o077 == 0, folder
    tag = (store.root / "CACHEDIR.TAG").read_text()
    assert tag.startswith("Signature: 8a477f597d28d172789f06886806bc55")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_foreign_store_is_refused(tmp_path: Path) -> None:
    """A folder of another user is refused unless the store is shared."""
    Cache(tmp_path / "s").close()
    os.chown(tmp_path / "s", 12345, 12345)
    with pytest.raises(CacheError, match="user 12345"):
        Cache(tmp_path / "s")
    Cache(tmp_path / "s", shared=True).close()


def test_open_to_everybody_is_refused(tmp_path: Path) -> None:
    """A folder that everybody may write to is refused."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s").chmod(0o777)
    with pytest.raises(CacheError, match="everybody"):
        Cache(tmp_path / "s")


def test_lock_timeout(tmp_path: Path) -> None:
    """Whoever set a limit is told that another builds; given back, the lock is free."""
    name = "0" * 32
    cache = Cache(tmp_path / "s", lock_timeout_s=0.05)
    with cache.building(name):
        other = Cache(tmp_path / "s", lock_timeout_s=0.05)
        with pytest.raises(LockTimeoutError):
            other.acquire(name)
    other.acquire(name).release()


def test_use_times_survive_closing(store: Cache, put: Put) -> None:
    """Hits are counted however often the index was not written for them."""
    entry = put(store, 0)
    for _ in range(5):
        store.used(entry, saved_s=2.0)
    store.close()
    with Cache(store.root) as again:
        assert again.entries()[0].hits == 5
        stats = again.stats()
        assert (stats["hits"], stats["seconds_saved"]) == (5, 10.0)
        assert stats["bytes_served"] == 5 * entry.header.nbytes


def test_what_is_announced_is_compared(store: Cache, content: Content) -> None:
    """Between the last byte and the rename an entry is had by its name, for its own document only."""
    document, data, seen = {"number": 7}, content(7, 10_000)["codes"], []

    def announced(name: str) -> None:
        for asked, told in ((document, name), ({"number": 8}, name), (document, f"../tmp/{name}"), (document, "1-0.tmp")):
            entry = store.find_staged(asked, told)
            seen.append(entry is not None and entry.intact("codes") and bytes(entry.view("codes")) == data.tobytes())
        assert store.find(document) is None

    staged = store.stage({"codes": Slot("U8", (10_000,), 10_000)})
    staged.write("codes", 0, data)
    store.publish(staged, document=document, records=[], built={}, announce=announced)
    assert seen == [True, False, False, False]
    assert store.find(document) is not None
