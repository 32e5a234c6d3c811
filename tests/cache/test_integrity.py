"""Damage every byte of an entry, of the index and of the pins: `verify` finds it and says which, or it changes nothing."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcache.cache.blobs import StoredEntry
from quantcache.cache.index import Index
from quantcache.cache.key import Stamp
from quantcache.cache.maintenance import clear, prune, repair, verify
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, CorruptEntryError, UsageError

Put = Callable[..., StoredEntry]
Content = Callable[[int, int], dict[str, Any]]


@pytest.fixture
def quiet() -> Iterator[None]:
    """Let damaged entries be reported without failing the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _served(cache: Cache, number: int, nbytes: int, right: dict[str, Any]) -> bool:
    """Return whether an entry is a hit; no byte of it is wrong."""
    entry = cache.find({"number": number, "nbytes": nbytes})
    if entry is None:
        return False
    intact = {key: entry.intact(key) for key in entry.header.slots}
    assert all(bytes(entry.view(key)) == right[key].tobytes() for key, fine in intact.items() if fine)
    return all(intact.values())


# ---- entries -----------------------------------------------------------------------------------------------------


def test_every_byte_of_an_entry(store: Cache, put: Put, content: Content) -> None:
    """A flip anywhere in a small entry: full verification names the entry, and no load is served a wrong byte."""
    entry = put(store, 0, nbytes=3000)
    raw, right = entry.path.read_bytes(), content(0, 3000)
    places = range(len(raw)) if len(raw) < 12_000 else [*range(9000), *range(9000, len(raw), 7)]
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        entry.path.write_bytes(damaged)
        (finding,) = verify(store, [entry.key]).findings
        assert finding.subject == entry.key, place
        assert finding.damaged, place
    entry.path.write_bytes(raw)
    assert verify(store).findings == []
    assert _served(store, 0, 3000, right)


def test_sampled_bytes_of_a_large_entry(store: Cache, put: Put) -> None:
    """The same for flips, zeroed pages and runs of ones at random places of a larger one."""
    entry = put(store, 0, nbytes=3_000_000)
    raw = entry.path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(raw) - 4096, 60).tolist():
        for damage in (bytes([raw[place] ^ 0x10]), bytes(4096), b"\xff" * 512):
            damaged = raw[:place] + damage + raw[place + len(damage) :]
            if damaged == raw:
                continue
            entry.path.write_bytes(damaged)
            assert [f.subject for f in verify(store, [entry.key]).findings] == [entry.key], place


def test_truncations(store: Cache, put: Put, quiet: None) -> None:
    """A file cut at every boundary, or grown, is damage, and a miss."""
    entry = put(store, 0, nbytes=9000)
    raw = entry.path.read_bytes()
    header = int.from_bytes(raw[:8], "little") + 8
    ends = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(raw) - 1, *range(4096, len(raw), 4096), *entry.header.offsets.values()}
    for end in sorted(ends - {len(raw)}):
        entry.path.write_bytes(raw[:end])
        assert [f.subject for f in verify(store, [entry.key]).findings] == [entry.key], end
    entry.path.write_bytes(raw + b"\0")
    assert verify(store, [entry.key]).findings
    assert store.find({"number": 0, "nbytes": 9000}) is None


def test_entries_that_changed_places(store: Cache, put: Put, content: Content, quiet: None) -> None:
    """Entries swapped, renamed or copied over one another are found by their key, and are nobody's hit."""
    one, two = put(store, 1), put(store, 2)
    first, second = one.path.read_bytes(), two.path.read_bytes()
    one.path.write_bytes(second)
    two.path.write_bytes(first)
    assert {f.subject for f in verify(store, quick=True).findings} == {one.key, two.key}
    one.path.write_bytes(first)
    two.path.write_bytes(first)
    assert {f.subject for f in verify(store, quick=True).findings} == {two.key}
    assert not _served(store, 2, 10_000, content(2, 10_000))
    assert _served(store, 1, 10_000, content(1, 10_000))


def test_what_is_called_like_no_entry(store: Cache, put: Put) -> None:
    """Files among the entries that are none are found, counted, quarantined by `repair`, and removed by `prune --orphans`."""
    entry = put(store, 1)
    strays = [entry.path.with_name("notes.txt"), entry.path.with_name(f"{'0' * 32}.safetensors"), store.folder / "entries" / "zz"]
    before = store.usage()["total"]
    for stray in strays:
        stray.write_bytes(b"x" * 1000)
    assert {f.subject.rpartition("/")[2] for f in verify(store).findings} == {stray.name for stray in strays}
    assert store.usage()["total"] >= before + 2000
    found = prune(store, orphans=True, dry_run=True)
    assert {path for path, _ in found.files} == set(strays)
    repair(store)
    assert not any(stray.exists() for stray in strays)
    assert verify(store).findings == []
    assert len(store) == 1


def test_what_cannot_be_read_is_not_damaged(store: Cache, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that a failing disk hides once is reported, and stays where it is: repair deletes no healthy entry."""
    entry = put(store, 1)
    real = os.pread

    def pread(descriptor: int, n: int, at: int) -> bytes:
        if at == 0:
            raise OSError(5, "Input/output error")
        return real(descriptor, n, at)

    monkeypatch.setattr(os, "pread", pread)
    (finding,) = [f for f in repair(store)[0].findings if f.subject == entry.key]
    assert not finding.damaged
    monkeypatch.undo()
    assert entry.path.exists()
    assert verify(store).findings == []


def test_verify_never_blesses(store: Cache, put: Put) -> None:
    """A check that was recorded says when, and not that the entry is right now."""
    entry = put(store, 1)
    assert verify(store).findings == []
    assert store.entries()[0].checked_s > 0
    raw = bytearray(entry.path.read_bytes())
    raw[-1] ^= 1
    entry.path.write_bytes(raw)
    for _ in range(3):
        assert verify(store).findings


# ---- parts, time, resuming ---------------------------------------------------------------------------------------


def test_subsets_are_the_longest_unchecked(store: Cache, put: Put) -> None:
    """A share, or a number of bytes, takes what was not checked for the longest; every check goes on where the last stopped."""
    keys = {put(store, number).key for number in range(10)}
    seen: set[str] = set()
    for _ in range(5):
        done = verify(store, subset="20%")
        assert len(done.checked) == 2
        assert done.left == 8
        assert not seen & set(done.checked)
        seen |= set(done.checked)
    assert seen == keys
    assert len(verify(store, subset="1").checked) == 1
    assert len(verify(store, subset="100%").checked) == 10


def test_parts_cover_all(store: Cache, put: Put) -> None:
    """n/t for every n is every entry once."""
    keys = sorted(put(store, number).key for number in range(12))
    assert sorted(key for part in range(1, 6) for key in verify(store, subset=f"{part}/5").checked) == keys


@pytest.mark.parametrize("subset", ["0/5", "6/5", "x", "10%%", "-1%", "1/0", ""])
def test_parts_that_cannot_be(store: Cache, put: Put, subset: str) -> None:
    """A part that is none is refused."""
    put(store, 0)
    with pytest.raises(UsageError):
        verify(store, subset=subset)


def test_a_limit_of_time(store: Cache, put: Put) -> None:
    """No entry is begun after the time is over; what is left is said."""
    for number in range(4):
        put(store, number)
    done = verify(store, max_duration_s=0)
    assert (len(done.checked), done.left) == (0, 4)
    assert len(verify(store, max_duration_s=60).checked) == 4


def test_an_interrupted_check_is_resumed(store: Cache, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C loses nothing of what was checked."""
    for number in range(6):
        put(store, number)
    real, count = StoredEntry.intact, [0]

    def intact(self: StoredEntry, key: str) -> bool:
        count[0] += 1
        if count[0] > 6:
            raise KeyboardInterrupt
        return real(self, key)

    monkeypatch.setattr(StoredEntry, "intact", intact)
    with pytest.raises(KeyboardInterrupt):
        verify(store)
    monkeypatch.undo()
    done = [row.key for row in store.entries() if row.checked_s]
    assert 2 <= len(done) <= 3
    assert not set(verify(store, subset="30%").checked) & set(done)


# ---- the index ---------------------------------------------------------------------------------------------------


def _everything(path: Path) -> list[Any]:
    """Return all that queries give, or raise."""
    index = Index(path, readonly=True)
    try:
        stamp = Stamp(1, 2, 3, 4, 5)
        return [
            index.entries(), index.counters(), index.shards(), index.source_digest(stamp), index.model_keys("/m"), index.count_and_nbytes(),
            [index.has_fingerprint(text) for text in ("", "f1")], index.entries_from("0"),
        ]  # fmt: skip
    finally:
        index.close()


def test_every_byte_of_the_index(store: Cache, put: Put, tmp_path: Path) -> None:
    """A flip anywhere in the index file is found by its own check, or no query gives another answer."""
    for number in range(3):
        put(store, number)
    store.index.call(lambda index: index.put_source(Stamp(1, 2, 3, 4, 5), "digest", "/m", 1 << 62), None)
    store.index.call(lambda index: index.put_model("/m", "nf4", ["0" * 32]), None)
    store.tally(hits=3)
    store.close()
    path = tmp_path / "index.sqlite3"
    raw = (store.folder / "index.sqlite3").read_bytes()
    path.write_bytes(raw)
    right = _everything(path)
    silent = 0
    used = [place for place in range(len(raw)) if raw[place] or place < 200 or place % 31 == 0]
    for place in used:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            index = Index(path, readonly=True)
        except Exception:
            continue
        problem = index.check()
        index.close()
        if problem is None:
            silent += 1
            assert _everything(path) == right, place
    assert silent < len(used) / 2  # what SQLite does not use: free space keeps what it held


@pytest.mark.parametrize("column", ["recipe = 'int8'", "nbytes = 1", "fingerprint = 'x'", "key = '00000000000000000000000000000000'"])
def test_a_row_that_lies(store: Cache, put: Put, column: str, quiet: None) -> None:
    """A row that was changed behind our back is found, and the index is made anew from the entries."""
    put(store, 0)
    before = store.entries()
    store.index.call(lambda index: index._db.execute(f"UPDATE entries SET {column}"), None)
    store.close()
    with Cache(store.root) as cache:
        assert any(f.subject == "index" and "not what was written" in f.problem for f in verify(cache).findings)
    with Cache(store.root) as cache:
        assert [(row.key, row.nbytes, row.recipe) for row in cache.entries()] == [(row.key, row.nbytes, row.recipe) for row in before]


def test_a_lying_source_digest(store: Cache, quiet: None) -> None:
    """A source's digest that was changed behind our back is not believed."""
    stamp = Stamp(1, 2, 3, 4, 5)
    store.index.call(lambda index: index.put_source(stamp, "right", "/m", 1 << 62), None)
    assert store.source_digest(stamp) == "right"
    store.index.call(lambda index: index._db.execute("UPDATE sources SET digest = 'wrong'"), None)
    assert store.source_digest(stamp) is None


# ---- pins --------------------------------------------------------------------------------------------------------


def test_pins(store: Cache, put: Put) -> None:
    """A pin is its name: what is in it does not matter, one without an entry or of another name is found."""
    entry = put(store, 0)
    store.pin(entry.key)
    pin = store.folder / "pins" / entry.key
    pin.write_bytes(b"\xff\x00garbage")
    assert store.pinned() == {entry.key}
    assert verify(store).findings == []
    flipped = bytearray(entry.key.encode())
    flipped[3] ^= 1
    pin.rename(pin.with_name(flipped.decode()))
    assert {f.subject for f in verify(store).findings} & {flipped.decode(), f"pins/{flipped.decode()}"}
    repair(store)
    assert list((store.folder / "pins").iterdir()) == []


# ---- space -------------------------------------------------------------------------------------------------------


def test_prune_says_what_comes_free(store: Cache, put: Put, tmp_path: Path) -> None:
    """Bytes of the disk: a hard-linked entry frees nothing, and removing all names of a file frees it once."""
    plain, linked = put(store, 0, nbytes=1_000_000), put(store, 1, nbytes=1_000_000)
    os.link(linked.path, tmp_path / "export.safetensors")
    blocks = os.stat(plain.path).st_blocks * 512
    planned = prune(store, max_size=0, dry_run=True)
    assert planned.nbytes == plain.header.nbytes + linked.header.nbytes
    assert planned.freed == blocks
    free = shutil.disk_usage(store.folder).free
    assert prune(store, max_size=0).freed == blocks
    assert shutil.disk_usage(store.folder).free - free < 4 * blocks  # others use the disk, too
    assert (tmp_path / "export.safetensors").stat().st_size == linked.header.nbytes


def test_one_that_cannot_be_removed(store: Cache, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, and the others go."""
    stuck, other = put(store, 0), put(store, 1)
    real = Cache.remove

    def remove(self: Cache, key: str) -> int:
        if key == stuck.key:
            raise CacheError("it sticks")
        return real(self, key)

    monkeypatch.setattr(Cache, "remove", remove)
    found = prune(store, max_size=0)
    assert [row.key for row in found.entries] == [other.key]
    assert found.failed == ["it sticks"]


def test_clear_takes_unreadable_entries(store: Cache, put: Put) -> None:
    """What cannot be read as an entry is removed by `clear`, too."""
    entry = put(store, 0)
    entry.path.write_bytes(b"garbage")
    clear(store)
    assert not entry.path.exists()
    with pytest.raises((CorruptEntryError, CacheError)):
        store.open(entry.key)
