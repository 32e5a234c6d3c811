"""Verify finds what is wrong and blesses nothing; prune and clear take what they may, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantcache.cache.blobs import StoredEntry
from quantcache.cache.maintenance import clear, prune, repair, verify
from quantcache.cache.store import Cache
from quantcache.errors import QuantcacheWarning, StoreReadOnlyError

Put = Callable[..., StoredEntry]


def _flip(entry: StoredEntry, position: int) -> bytes:
    """Flip a byte in the file without touching what is mapped elsewhere; return what the file was."""
    clean = entry.path.read_bytes()
    raw = bytearray(clean)
    raw[position] ^= 1
    entry.path.write_bytes(raw)
    return clean


def _age(cache: Cache, key: str, used_s: float) -> None:
    from dataclasses import replace

    row = next(row for row in cache.entries() if row.key == key)
    cache.index.call(lambda index: index.put([replace(row, used_s=used_s)]), None)


def _keys(cache: Cache) -> set[str]:
    return {row.key for row in cache.entries()}


def _checked(cache: Cache, key: str) -> float:
    return next(row.checked_s for row in cache.entries() if row.key == key)


@pytest.mark.parametrize("tensor", ["codes", "scales"])
@pytest.mark.parametrize("where", ["first", "last"])
def test_verify_finds_a_flipped_byte(store: Cache, put: Put, tensor: str, where: str) -> None:
    """A flip anywhere in any tensor is found, again and again, and the file is left as it is."""
    entry, fine = put(store, 0), put(store, 1)
    slot, offset = entry.header.slots[tensor], entry.header.offsets[tensor]
    clean = _flip(entry, offset if where == "first" else offset + slot.nbytes - 1)
    damaged = entry.path.read_bytes()
    for _ in range(2):
        done = verify(store)
        findings = done.findings
        assert len(done.checked) == 2
        assert [(finding.subject, tensor in finding.problem) for finding in findings] == [(entry.key, True)]
        assert entry.path.read_bytes() == damaged != clean
        assert _checked(store, entry.key) == 0
        assert _checked(store, fine.key) > 0
    assert verify(store, quick=True).findings == []
    entry.path.write_bytes(clean)
    assert verify(store).findings == []


def test_quick_verify_records_nothing(store: Cache, put: Put) -> None:
    """Looking at headers alone never counts as a check of the digests."""
    key = put(store, 0).key
    assert (len(verify(store, quick=True).checked), verify(store, quick=True).findings) == (1, [])
    assert _checked(store, key) == 0


def test_verify_looks_at_files_not_rows(store: Cache, put: Put) -> None:
    """A damaged file without a row, a row without a file and a pin without a file are all found."""
    orphan, gone, pinned = (put(store, n) for n in range(3))
    _flip(orphan, orphan.header.offsets["codes"])
    store.index.call(lambda index: index.remove([orphan.key]), None)
    store.pin(pinned.key)
    gone.path.unlink()
    pinned.path.unlink()
    findings = verify(store).findings
    assert {finding.subject for finding in findings} == {orphan.key, gone.key, pinned.key}


def test_verify_finds_a_header_and_a_swap(store: Cache, put: Put) -> None:
    """A changed header, a cut file and a whole entry under another's name are found, even by the quick check."""
    header, cut, swapped, fine = (put(store, n) for n in range(4))
    _flip(header, 40)
    cut.path.write_bytes(cut.path.read_bytes()[:-1])
    swapped.path.write_bytes(fine.path.read_bytes())
    findings = verify(store, quick=True).findings
    assert {finding.subject for finding in findings} == {header.key, cut.key, swapped.key}


def test_repair(store: Cache, put: Put) -> None:
    """Damage goes to quarantine, the temp files of the dead go, lost pins go, the index is whole again."""
    bad, lost, pinned = (put(store, n) for n in range(3))
    _flip(bad, bad.header.offsets["codes"])
    store.pin(pinned.key)
    pinned.path.unlink()
    store.index.call(lambda index: index.remove([lost.key]), None)
    dead = store.folder / "tmp" / "4194305-dead.tmp"  # above the highest process number
    dead.write_bytes(b"x")
    done, removed, left = repair(store, dry_run=True)
    assert {finding.subject for finding in done.findings} >= {bad.key, pinned.key}
    assert [path for path, _ in removed.files] == [dead]
    assert dead.exists()
    assert bad.path.exists()
    with pytest.warns(QuantcacheWarning, match="quarantine") as caught:
        done, removed, left = repair(store)
    assert len(caught) == 1
    assert not dead.exists()
    assert not bad.path.exists()
    assert list((store.folder / "quarantine").glob(f"{bad.path.name}.*"))
    assert left == 1
    assert _keys(store) == {lost.key}
    assert store.pinned() == set()
    assert (len(verify(store).checked), verify(store).findings) == (1, [])
    assert put(store, 0).key == bad.key


def test_prune_by_age(store: Cache, put: Put) -> None:
    """What was not used for that long goes, unless it is pinned."""
    old, pinned, new = (put(store, n) for n in range(3))
    _age(store, old.key, 1000.0)
    _age(store, pinned.key, 1000.0)
    store.pin(pinned.key)
    found = prune(store, max_age_s=86_400, dry_run=True)
    assert [row.key for row in found.entries] == [old.key]
    assert len(_keys(store)) == 3
    assert prune(store, max_age_s=86_400).nbytes == found.nbytes == old.header.nbytes
    assert _keys(store) == {pinned.key, new.key}
    assert store.stats()["evicted"] == 1


def test_prune_by_size(store: Cache, put: Put) -> None:
    """The least recently used go until the store is small enough, and no more than that."""
    entries = [put(store, n) for n in range(4)]
    for n, entry in enumerate(entries):
        _age(store, entry.key, 4e9 + n)
    total = store.usage()["total"]
    found = prune(store, max_size=total - 1, dry_run=True)
    assert [row.key for row in found.entries] == [entries[0].key]
    prune(store, max_size=total - entries[0].header.nbytes - 1)
    assert _keys(store) == {entries[2].key, entries[3].key}
    assert prune(store, max_size=total).entries == []
    store.pin(entries[2].key)
    prune(store, max_size=0)
    assert _keys(store) == {entries[2].key}


def test_prune_keeps_the_limits_of_the_store(store: Cache, put: Put) -> None:
    """Without any limit given, the store's own counts; pruning leaves that as it was."""
    put(store, 0)
    assert prune(store).entries == []
    store.max_size, store.keep_free = 1, "0"
    assert len(prune(store).entries) == 1
    assert (store.max_size, store.keep_free) == (1, "0")


def test_prune_stale_sources(store: Cache, put: Put, tmp_path: Path) -> None:
    """An entry whose source is gone goes; one whose source is there, or was never a file, stays."""
    source = tmp_path / "here"
    source.touch()
    here, gone, none = put(store, 0, path=str(source)), put(store, 1, path=str(tmp_path / "gone")), put(store, 2)
    assert [row.key for row in prune(store, stale_source=True, dry_run=True).entries] == [gone.key]
    prune(store, stale_source=True)
    assert _keys(store) == {here.key, none.key}


def test_prune_orphans(store: Cache, put: Put) -> None:
    """Quarantine is emptied when asked for, and entries stay."""
    entry = put(store, 0)
    path = store.folder / "quarantine" / "x"
    path.write_bytes(bytes(10))
    assert prune(store, orphans=True, dry_run=True).nbytes == 10
    assert path.exists()
    assert prune(store, orphans=True).nbytes == 10
    assert not path.exists()
    assert _keys(store) == {entry.key}


def test_pruned_while_mapped(store: Cache, put: Put) -> None:
    """An entry that somebody has mapped can be pruned, and is read on."""
    entry = put(store, 0)
    prune(store, max_size=0)
    assert not entry.path.exists()
    assert entry.intact("codes")


def test_clear_keeps_pinned(store: Cache, put: Put) -> None:
    """Clearing keeps what is pinned unless told otherwise; a dry run keeps all."""
    pinned, other = put(store, 0), put(store, 1)
    store.pin(pinned.key)
    assert [row.key for row in clear(store, dry_run=True).entries] == [other.key]
    assert len(_keys(store)) == 2
    clear(store)
    assert _keys(store) == {pinned.key}
    clear(store, pinned_too=True)
    assert not _keys(store)
    assert not store.pinned()


def test_clear_takes_files_without_rows(store: Cache, put: Put) -> None:
    """An entry file that the index does not know is cleared, too."""
    entry = put(store, 0)
    store.index.call(lambda index: index.remove([entry.key]), None)
    clear(store)
    assert not store.entry_files()


def test_readonly_store(store: Cache, put: Put) -> None:
    """A read-only store can be verified and asked, not changed."""
    entry = put(store, 0)
    store.close()
    with Cache(store.root, readonly=True) as cache:
        assert (len(verify(cache).checked), verify(cache).findings) == (1, [])
        assert len(prune(cache, max_size=0, dry_run=True).entries) == 1
        for change in (lambda: prune(cache, max_size=0), lambda: repair(cache), lambda: clear(cache)):
            with pytest.raises(StoreReadOnlyError):
                change()
    assert entry.path.exists()
