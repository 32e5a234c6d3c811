"""The index is disposable: whatever becomes of it, the store lists the same entries and finds the same hits."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcache.cache.blobs import StoredEntry
from quantcache.cache.index import SCHEMA_VERSION, Index
from quantcache.cache.key import RACY_NS, Stamp
from quantcache.cache.store import Cache

Put = Callable[..., StoredEntry]


def _delete(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _odd(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xa5" * 20_000)


def _garbage_inside(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4096:] = b"\xa5" * (len(raw) - 4096)
    path.write_bytes(raw)


def _newer(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    db.close()


def _other_tables(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE entries")
    db.close()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


DAMAGES = [_delete, _empty, _half, _odd, _garbage, _garbage_inside, _newer, _other_tables, _folder]


@pytest.fixture
def filled(store: Cache, put: Put) -> Path:
    """Return the root of a closed store with three entries."""
    for number in range(3):
        put(store, number)
    store.close()
    assert sorted(path.name for path in store.folder.glob("index*")) == ["index.sqlite3"]
    return store.root


def _listing(cache: Cache) -> set[tuple[Any, ...]]:
    return {(row.key, row.nbytes, row.tensors, row.recipe, row.created_s) for row in cache.entries()}


def _tree(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in [root, *root.rglob("*")])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index(filled: Path, put: Put, damage: Callable[[Path], None]) -> None:
    """The same entries after any damage, hits and additions too, and at most one warning."""
    with Cache(filled) as cache:
        before = _listing(cache)
    assert len(before) == 3
    damage(filled / "v1" / "index.sqlite3")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Cache(filled, keep_free="0") as cache:
            assert _listing(cache) == before
            assert cache.find({"number": 1, "nbytes": 10_000}) is not None
            put(cache, 3)
            assert len(cache.entries()) == 4
            cache.stats()
    assert len(caught) <= 1, [str(w.message) for w in caught]
    if damage not in (_newer, _folder):  # those are left as they are
        with Cache(filled) as cache:
            assert len(cache.entries()) == 4
        assert Index(filled / "v1" / "index.sqlite3").check() is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_of_a_readonly_store(filled: Path, damage: Callable[[Path], None]) -> None:
    """The same entries, without a word and without a write."""
    with Cache(filled) as cache:
        before = _listing(cache)
    damage(filled / "v1" / "index.sqlite3")
    tree = _tree(filled)
    with Cache(filled, readonly=True) as cache:
        assert _listing(cache) == before
        assert cache.find({"number": 1, "nbytes": 10_000}) is not None
    assert _tree(filled) == tree


def test_readonly_store_writes_nothing(filled: Path) -> None:
    """Everything that reads works on a read-only store and leaves every file and time as it was."""
    tree = _tree(filled)
    with Cache(filled, readonly=True) as cache:
        rows = cache.entries()
        assert len(rows) == 3
        entry = cache.open(rows[0].key)
        assert all(entry.intact(key) for key in entry.header.slots)
        cache.used(entry, saved_s=1.0)
        cache.checked([rows[0].key])
        cache.record_source(Stamp(1, 2, 3, 4, 5), "d", Path("x"), 1 << 62)
        cache.record_model(Path("x"), "nf4", [rows[0].key])
        cache.flush()
        assert cache.stats()["hits"] == 0
        assert cache.usage()["entries"] == sum(row.nbytes for row in rows)
    assert _tree(filled) == tree


def test_row_without_file(filled: Path) -> None:
    """A row whose file is gone is listed by nobody."""
    with Cache(filled) as cache:
        row = cache.entries()[0]
        cache.path_of(row.key).unlink()
        assert row.key not in {found.key for found in cache.entries()}


def test_rebuild_keeps_counters_and_use(filled: Path) -> None:
    """Making the index anew adopts files without rows and keeps what only the index knows."""
    with Cache(filled) as cache:
        cache.tally(hits=7)
        cache.flush()
        rows = {row.key: row for row in cache.entries()}
        lost = next(iter(rows))
        cache.index.call(lambda index: index.remove([lost]), None)
        kept = next(key for key in rows if key != lost)
        cache.index.call(lambda index: index.note({kept: 5}, {}, 4e9), None)
        hits = cache.stats()["hits"]
        assert cache.rebuild_index() == 3
        assert {row.key for row in cache.entries()} == set(rows)
        found = {row.key: row for row in cache.entries()}[kept]
        assert (found.hits, found.used_s) == (5, 4e9)
        assert cache.stats()["hits"] == hits >= 7


def test_source_digest_needs_the_same_stamp(tmp_path: Path) -> None:
    """A recorded digest counts only for the very same stamp, and only once the file had settled."""
    index = Index(tmp_path / "i.sqlite3")
    stamp = Stamp((1 << 64) - 1, 1 << 63, 3, 4, 5)
    index.put_source(stamp, "digest", "path", RACY_NS)
    assert index.source_digest(stamp) is None
    index.put_source(stamp, "digest", "path", RACY_NS + 5)
    assert index.source_digest(stamp) == "digest"
    for other in (
        Stamp(1, 1 << 63, 3, 4, 5),
        Stamp(stamp.device, 1, 3, 4, 5),
        Stamp(stamp.device, stamp.inode, 4, 4, 5),
        Stamp(stamp.device, stamp.inode, 3, 3, 5),
        Stamp(stamp.device, stamp.inode, 3, 4, 4),
    ):
        assert index.source_digest(other) is None
    index.close()


def test_two_open_at_once(filled: Path, put: Put) -> None:
    """What one open cache stores, another that was open before sees."""
    with Cache(filled, keep_free="0") as one, Cache(filled, keep_free="0") as two:
        assert len(two.entries()) == 3
        put(one, 9)
        assert len(two.entries()) == 4
