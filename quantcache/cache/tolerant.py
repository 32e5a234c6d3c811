"""Own the index's life: opened late, replaced when damaged, done without when it cannot be used. Never raises.

Entries are the truth: whatever is wrong with the index, it is made anew from their headers. Knows no SQL.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from quantcache.cache.blobs import StoredEntry, quarantine
from quantcache.cache.index import EntryRow, Index, is_damage
from quantcache.errors import CacheError, QuantcacheWarning, StoreTooNewError

__all__ = ["KEY", "TolerantIndex", "entry_files", "row_of"]

_T = TypeVar("_T")
#: A key, and nothing else, becomes part of a path.
KEY = re.compile(r"[0-9a-f]{32}")


def entry_files(folder: Path) -> list[Path]:
    """Return the paths of all entry files of a store.

    Args:
        folder: `<root>/v1`.
    """
    found = (folder / "entries").glob("??/*.safetensors")
    return sorted(path for path in found if KEY.fullmatch(path.stem) and path.parent.name == path.stem[:2])


def row_of(entry: StoredEntry, used_s: float) -> EntryRow:
    """Return the row that an entry's own header gives."""
    header, built = entry.header, entry.header.built
    source = header.document.get("source") if isinstance(header.document, dict) else None
    source = source if isinstance(source, dict) else {}  # another loader's document may say anything
    return EntryRow(
        key=entry.key,
        nbytes=header.nbytes,
        fingerprint=storable(built.get("fingerprint", "")),
        source_digest=storable(source.get("digest", "")),
        source_nbytes=int(_number(source.get("size"))),
        source_path=storable(built.get("path", "")),
        recipe=storable(built.get("recipe", "")),
        tensors=len(header.records if isinstance(header.records, list) else header.slots),
        created_s=_number(built.get("created", used_s)),
        used_s=used_s,
        hits=0,
        build_s=_number(built.get("seconds")),
        checked_s=0.0,
    )


def storable(text: object) -> str:
    """Return a text that SQLite takes: a path may hold bytes that are not UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def _number(value: object) -> float:
    """Return a number that SQLite takes, or 0."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 << 62 else 0.0


class TolerantIndex:
    """Run queries on the index of a store, or answer with a default.

    Args:
        folder: `<root>/v1`.
        readonly: write nothing at all.
    """

    def __init__(self, folder: Path, *, readonly: bool) -> None:
        self._folder, self._readonly = folder, readonly
        self._path = folder / "index.sqlite3"
        self._lock = threading.RLock()
        self._index: Index | None = None
        self._warned = False

    def call(self, action: Callable[[Index], _T], default: _T) -> _T:
        """Return what the action returns; rebuild a damaged index once; else the default, with one warning."""
        with self._lock:
            for attempt in range(2):
                try:
                    if self._index is None:
                        self._index = self._open()
                    return action(self._index)
                except sqlite3.Error as error:
                    if self._readonly:
                        if attempt or not is_damage(error):
                            return default
                        self.close()
                        self._index = self._scan_into(Index(None))
                        continue
                    if not is_damage(error) or attempt:
                        self._warn(f"the index cannot be used: {error}")
                        return default
                    self.close()
                    with contextlib.suppress(sqlite3.Error):
                        self._index = self._replace(str(error))
                except (ValueError, TypeError, AttributeError, OverflowError, OSError) as error:
                    self._warn(f"the index cannot be used: {error}")
                    return default
            return default

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
            self.close()
            self._remove()
            self._index = self._scan_into(Index(self._path))
            rows = [old.get(row.key, row) for row in self._index.entries()]
            self._index.put(rows)
            self._index.count(counters)
            return len(rows)

    def close(self) -> None:
        """Close the index; the next call opens it again."""
        with self._lock:
            if self._index is not None:
                self._index.close()
                self._index = None

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, QuantcacheWarning, stacklevel=4)

    def _open(self) -> Index:
        if self._readonly:
            try:
                index = Index(self._path, readonly=True)
                index.counters()
            except (sqlite3.Error, StoreTooNewError):
                return self._scan_into(Index(None))
            return index
        try:
            if self._path.is_dir():
                return self._replace("it is a folder")
            index = Index(self._path)
        except StoreTooNewError as error:
            self._warn(f"{error.message}; reading the entries themselves")
            return self._scan_into(Index(None))
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            return self._replace(str(error))
        return self._scan_into(index) if index.created else index

    def _replace(self, why: str) -> Index:
        self._warn(f"the index was damaged ({why}) and is rebuilt from the entries")
        self._remove()
        if self._path.exists():
            return self._scan_into(Index(None))
        return self._scan_into(Index(self._path))

    def _remove(self) -> None:
        """Move the index away; its write-ahead log must go with it, or it would be replayed into the next one."""
        for suffix in ("-wal", "-shm", ""):
            path = self._path.with_name(self._path.name + suffix)
            if path.exists() and quarantine(path, self._folder / "quarantine") is None:
                return

    def _scan_into(self, index: Index) -> Index:
        rows = []
        for path in entry_files(self._folder):
            with contextlib.suppress(CacheError, OSError, ValueError, TypeError, AttributeError, OverflowError):
                rows.append(row_of(StoredEntry(path.stem, path), path.stat().st_mtime))
        if rows:
            index.put(rows)
        return index
