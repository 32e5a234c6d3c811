"""Own the index's life: opened late, kept in step with the files, replaced when damaged, done without when it cannot be used.

Entries are the truth: whatever is wrong with the index, it is made anew from their headers. Never raises. Knows no SQL.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from quantcache.cache.blobs import StoredEntry, quarantine
from quantcache.cache.filesystem import PRIVATE, Access, files_in, locks_work
from quantcache.cache.index import EntryRow, Index, is_busy, is_damage
from quantcache.cache.key import RACY_NS
from quantcache.errors import CacheError, CorruptEntryError, StoreTooNewError

__all__ = ["KEY", "TolerantIndex", "entry_files", "loose_files", "row_of", "tensors_in"]

_T = TypeVar("_T")
#: A key, and nothing else, becomes part of a path.
KEY = re.compile(r"[0-9a-f]{32}")
_SHARD = re.compile(r"[0-9a-f]{2}")
_ENTRY_NAME = re.compile(rf"{KEY.pattern}\.safetensors")


def _shard_folders(folder: Path) -> list[Path]:
    """Return the folders that hold entries, sorted."""
    try:
        with os.scandir(folder / "entries") as found:
            return sorted(Path(item.path) for item in found if _SHARD.fullmatch(item.name) and item.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _listing(shard: Path) -> tuple[list[str], list[str]]:
    """Return the entry files of one folder, and what else is in it.

    Raises:
        OSError: it cannot be read.
    """
    entries: list[str] = []
    loose: list[str] = []
    with os.scandir(shard) as found:
        for item in found:
            named = _ENTRY_NAME.fullmatch(item.name) and item.name.startswith(shard.name)
            (entries if named and item.is_file(follow_symlinks=False) else loose).append(item.path)
    return sorted(entries), sorted(loose)


def _tolerant_listing(shard: Path) -> tuple[list[str], list[str]]:
    try:
        return _listing(shard)
    except OSError:
        return [], []


def entry_files(folder: Path) -> list[Path]:
    """Return the paths of all entry files of a store.

    Args:
        folder: `<root>/v1`.
    """
    return [Path(path) for shard in _shard_folders(folder) for path in _tolerant_listing(shard)[0]]


def loose_files(folder: Path) -> list[Path]:
    """Return what lies among the entries of a store and is called like none.

    Args:
        folder: `<root>/v1`.
    """
    shards = _shard_folders(folder)
    known = {shard.name for shard in shards}
    found = [Path(path) for shard in shards for path in _tolerant_listing(shard)[1]]
    found += [path for path in files_in(folder / "entries") if path.name not in known]
    return sorted(found)


def row_of(key: str, nbytes: int, document: Any, built: Mapping[str, Any], tensors: int, used_s: float) -> EntryRow:
    """Return the row of an entry: what is looked for without opening it.

    Args:
        key: of the entry.
        nbytes: of its file.
        document, built: of its header.
        tensors: how many it says that it has.
        used_s: since the epoch.
    """
    source = document.get("source") if isinstance(document, dict) else None
    source = source if isinstance(source, dict) else {}  # another loader's document may say anything
    return EntryRow(
        key=key,
        nbytes=nbytes,
        fingerprint=storable(built.get("fingerprint", "")),
        source_digest=storable(source.get("digest", "")),
        source_nbytes=int(_number(source.get("size"))),
        source_path=storable(built.get("path", "")),
        recipe=storable(built.get("recipe", "")),
        tensors=tensors,
        created_s=_number(built.get("created", used_s)),
        used_s=used_s,
        hits=0,
        build_s=_number(built.get("seconds")),
        checked_s=0.0,
    )


def tensors_in(records: Any, slots: Mapping[str, Any]) -> int:
    """Return how many tensors an entry is said to have; other loaders' records may be anything."""
    return len(records if isinstance(records, list) else slots)


def storable(text: object) -> str:
    """Return a text that SQLite takes: a path may hold bytes that are not UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def _number(value: object) -> float:
    """Return a number that SQLite takes, or 0."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 << 62 else 0.0


def _row_in(path: Path, *, shared: bool) -> tuple[EntryRow | None, bool]:
    """Return the row of an entry file, or None if it is no entry; and whether that is for good, or only could not be told now."""
    try:
        header = StoredEntry(path.stem, path, shared=shared).header
        tensors = tensors_in(header.records, header.slots)
        return row_of(path.stem, header.nbytes, header.document, header.built, tensors, path.stat().st_mtime), True
    except (CorruptEntryError, StoreTooNewError, ValueError, TypeError, AttributeError, OverflowError):
        return None, True
    except (CacheError, OSError):
        return None, False


class TolerantIndex:
    """Run queries on the index of a store, or answer with a default.

    Args:
        folder: `<root>/v1`.
        readonly: write nothing at all.
        access: of the store's files.
        complain: called with what went wrong.
    """

    def __init__(self, folder: Path, *, readonly: bool, complain: Callable[[str], None], access: Access = PRIVATE) -> None:
        self._folder, self._readonly, self._access = folder, readonly, access
        self._complain = complain
        self._path = folder / "index.sqlite3"
        self._lock = threading.RLock()
        self._index: Index | None = None
        self._given_up = False

    def call(self, action: Callable[[Index], _T], default: _T) -> _T:
        """Return what the action returns, from an index that is opened, or made anew, if need be; else the default.

        A connection that failed is closed, for it may keep locks that it could not give back, and the action is tried once
        more. After that the index is done without.
        """
        with self._lock:
            problem: Exception | None = None
            for _ in range(2):
                if self._given_up:
                    return default
                try:
                    if self._index is None:
                        damaged = problem is not None and isinstance(problem, sqlite3.Error) and is_damage(problem)
                        self._index = self._replace(str(problem)) if damaged else self._open()
                    return action(self._index)
                except (sqlite3.Error, OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
                    problem = error
                    self.close()
            # a busy neighbour goes away
            self._given_up = not (isinstance(problem, sqlite3.Error) and is_busy(problem))
            if not self._readonly:
                self._complain(f"the index cannot be used: {problem}")
            return default

    def in_step(self, action: Callable[[Index], _T], default: _T) -> _T:
        """Return what the action returns after rows and files were made to agree: no row without a file, no entry without a row.

        A folder of entries whose mtime is the one that was recorded has not changed; only others are looked into. What
        changed less than two seconds ago may change again within the clock's grain: it is not recorded yet.
        """
        return self.call(lambda index: action(self._reconcile(index)), default)

    def _reconcile(self, index: Index) -> Index:
        """Make rows and files agree; return the index in which they do: a copy in memory where the file cannot be written now."""
        known = index.shards()
        now_ns = time.time_ns()
        changed: dict[str, tuple[int, int]] = {}
        missing: list[EntryRow] = []
        gone: list[str] = []
        shards = {path.name: path for path in _shard_folders(self._folder)}
        for name in known.keys() - shards.keys():
            changed[name] = (0, 0)
            gone += index.keys_in(name)
        for name, path in shards.items():
            try:
                mtime_ns = path.stat().st_mtime_ns  # before the listing: what comes later is seen the next time
            except OSError:
                continue
            if known.get(name, (0, 0))[0] == mtime_ns:
                continue
            try:
                files, loose = (list(map(Path, names)) for names in _listing(path))
            except OSError:  # nothing is known of it now: nothing is changed, and it is looked at the next time
                continue
            have = index.keys_in(name)
            settled = mtime_ns + RACY_NS <= now_ns
            for file in files:
                if file.stem in have:
                    continue
                row, damaged = _row_in(file, shared=self._access.shared)
                if row:
                    missing.append(row)
                else:
                    loose.append(file)
                    settled = settled and damaged
            gone += have - {file.stem for file in files}
            changed[name] = mtime_ns if settled else 0, sum(_size(file) for file in loose)
        if not (missing or gone or any(known.get(name, (0, 0)) != found for name, found in changed.items())):
            return index
        if self._readonly:
            writable = index.copy()
            index.close()
            self._index = index = writable
        try:
            index.put_shards(changed, missing, gone)
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            index = index.copy()
            index.put_shards(changed, missing, gone)
        return index

    def rebuild(self) -> int:
        """Make the index anew from the entries, keeping counters and use times where they can be read.

        Returns:
            The number of entries.
        """
        with self._lock:
            nothing: list[EntryRow] = []
            old = {row.key: row for row in self.call(lambda index: index.entries(), nothing)}
            none: dict[str, float] = {}
            counters = self.call(lambda index: index.counters(), none)
            sound = self.check() is None
            self.close()
            self._remove(keep=not sound)
            self._index = self._open()
            rows = [_merged(row, old[row.key]) for row in self.call(lambda index: index.entries(), nothing) if row.key in old]
            count, _ = self.call(lambda index: index.count_and_nbytes(), (0, 0))
            self.call(lambda index: index.put(rows), None)
            self.call(lambda index: index.count(counters), None)
            return count

    def check(self) -> str | None:
        """Return what is wrong with the index file itself, or None; it is left as it is."""
        with self._lock:
            self.close()
            if not os.path.exists(self._path):
                return None
            try:
                # not past the log of another process that is writing: half of what it does would look like damage
                index = Index(self._path, readonly=self._readonly)
            except StoreTooNewError as error:
                return error.message
            except (sqlite3.Error, OSError, ValueError) as error:
                return str(error)
            try:
                return index.check()
            finally:
                index.close()

    def close(self) -> None:
        """Close the index; the next call opens it again."""
        with self._lock:
            index, self._index = self._index, None
            if index is not None:
                with contextlib.suppress(sqlite3.Error):
                    index.close()

    def _open(self) -> Index:
        if self._readonly:
            try:
                index = Index(self._path, readonly=True)
                index.counters()
            except (sqlite3.Error, StoreTooNewError):
                return self._scan_into(Index(None))
            return index
        if locks_work(self._folder / "locks") is False:  # SQLite would take the refusal for a busy neighbour, and wait
            return self._scan_into(Index(None))
        try:
            if os.path.isdir(self._path):
                return self._replace("it is a folder")
            index = self._index_at()
        except StoreTooNewError as error:
            self._complain(f"{error.message}; reading the entries themselves")
            return self._scan_into(Index(None))
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            return self._replace(str(error))
        return self._scan_into(index) if index.created else index

    def _index_at(self) -> Index:
        """Open the index, or make it with the store's access."""
        if not os.path.exists(self._path):
            with contextlib.suppress(FileExistsError):  # SQLite gives its log and its shared memory the same mode
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, self._access.file_mode))
                self._path.chmod(self._access.file_mode)
        return Index(self._path)

    def _replace(self, why: str) -> Index:
        """Return an index that is made anew from the entries."""
        if self._readonly:
            return self._scan_into(Index(None))
        self._complain(f"the index was damaged ({why}) and is rebuilt from the entries")
        self._remove()
        if os.path.exists(self._path):
            return self._scan_into(Index(None))
        return self._scan_into(self._index_at())

    def _remove(self, *, keep: bool = True) -> None:
        """Take the index away; its write-ahead log must go with it, or it would be replayed into the next one.

        Args:
            keep: in quarantine; what was sound is of no use to anybody.
        """
        for suffix in ("-wal", "-shm", "-journal", ""):
            path = self._path.with_name(self._path.name + suffix)
            if not os.path.exists(path):
                continue
            if not keep:
                with contextlib.suppress(OSError):
                    path.unlink()
            elif quarantine(path, self._folder / "quarantine") is None:
                return

    def _scan_into(self, index: Index) -> Index:
        """Fill an empty index from the entries."""
        readonly, self._readonly = self._readonly, False
        try:
            self._reconcile(index)
        finally:
            self._readonly = readonly
        return index


def _merged(row: EntryRow, old: EntryRow) -> EntryRow:
    """Return what the header says, with what only the index knew."""
    return replace(row, used_s=old.used_s, hits=old.hits, checked_s=old.checked_s)


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all that is below a folder."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(_size(inner) for inner in path.iterdir())
        return os.lstat(path).st_size
    except OSError:
        return 0
