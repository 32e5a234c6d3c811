"""Own the SQLite index; the only file with SQL. Disposable: all of it can be rebuilt from entries and pins.

Nothing here decides whether bytes are right: a row may be stale or missing, an entry file never is.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from quantcache.cache.filesystem import is_network
from quantcache.cache.key import Stamp
from quantcache.errors import StoreTooNewError

__all__ = ["EntryRow", "Index", "is_damage"]

SCHEMA_VERSION = 1
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_MISMATCH)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, fingerprint TEXT NOT NULL, source_digest TEXT NOT NULL,
    source_nbytes INTEGER NOT NULL, source_path TEXT NOT NULL, recipe TEXT NOT NULL, tensors INTEGER NOT NULL,
    created_s REAL NOT NULL, used_s REAL NOT NULL, hits INTEGER NOT NULL, build_s REAL NOT NULL, checked_s REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS entries_by_fingerprint ON entries (fingerprint);
CREATE TABLE IF NOT EXISTS sources (
    device INTEGER NOT NULL, inode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL, recorded_ns INTEGER NOT NULL, digest TEXT NOT NULL, path TEXT NOT NULL,
    PRIMARY KEY (device, inode)
) STRICT;
CREATE TABLE IF NOT EXISTS models (path TEXT NOT NULL, recipe TEXT NOT NULL, position INTEGER NOT NULL, key TEXT NOT NULL,
    PRIMARY KEY (path, recipe, position)) STRICT;
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, amount REAL NOT NULL) STRICT;
"""


@dataclass(frozen=True, slots=True)
class EntryRow:
    """Hold what is known of one entry. Times are seconds since the epoch, sizes bytes, build_s seconds."""

    key: str
    nbytes: int
    fingerprint: str
    source_digest: str
    source_nbytes: int
    source_path: str
    recipe: str
    tensors: int
    created_s: float
    used_s: float
    hits: int
    build_s: float
    checked_s: float


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether an error means that the file is not a sound index, rather than busy, full or read-only."""
    code = getattr(error, "sqlite_errorcode", None)
    text = str(error)
    return (code is not None and code & 0xFF in _DAMAGE) or "malformed" in text or "no such" in text or "has no column" in text


class Index:
    """Query and change the index, from any thread.

    Args:
        path: the file, or None for one in memory.
        readonly: open it without writing anything at all.

    Raises:
        sqlite3.Error: it cannot be opened; see is_damage.
        StoreTooNewError: a newer quantcache made it.
    """

    def __init__(self, path: Path | None, *, readonly: bool = False) -> None:
        self._lock = threading.RLock()
        if path is None:
            target, uri = ":memory:", False
        elif readonly:
            # immutable: no -shm and no journal beside a database in a folder that cannot be written
            target, uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1", True
        else:
            target, uri = str(path), False
        self._db = sqlite3.connect(target, uri=uri, timeout=10, check_same_thread=False, isolation_level=None)
        try:
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StoreTooNewError(f"the index {path} has version {version}, this program knows {SCHEMA_VERSION}")
            #: there was no schema yet: a new file, or one that was emptied
            self.created = version < SCHEMA_VERSION
            if readonly:
                return
            if path is not None:
                # write-ahead logging needs shared memory, which network file systems do not have
                self._db.execute(f"PRAGMA journal_mode={'DELETE' if is_network(path.parent) else 'WAL'}")
                self._db.execute("PRAGMA synchronous=NORMAL")
            if self.created:
                with self._transaction():
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a COMMIT that was refused leaves it open
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, where: str = "", values: tuple[object, ...] = ()) -> list[EntryRow]:
        names = ", ".join(field.name for field in fields(EntryRow))
        with self._lock:
            return [EntryRow(*row) for row in self._db.execute(f"SELECT {names} FROM entries {where}", values)]

    def entries(self) -> list[EntryRow]:
        """Return all rows, most recently used first."""
        return self._rows("ORDER BY used_s DESC, key")

    def entry(self, key: str) -> EntryRow | None:
        """Return one row."""
        return next(iter(self._rows("WHERE key = ?", (key,))), None)

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Return whether any entry was built from a source with this fingerprint."""
        return bool(self._rows("WHERE fingerprint = ? LIMIT 1", (fingerprint,)))

    def put(self, rows: Iterable[EntryRow]) -> None:
        """Insert or replace rows."""
        marks = ", ".join("?" for _ in fields(EntryRow))
        with self._transaction():
            self._db.executemany(f"INSERT OR REPLACE INTO entries VALUES ({marks})", [astuple(row) for row in rows])

    def remove(self, keys: Iterable[str]) -> None:
        """Delete rows."""
        with self._transaction():
            self._db.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key in keys])

    def used(self, uses: dict[str, int], at_s: float) -> None:
        """Record hits: entry -> how many."""
        with self._transaction():
            self._db.executemany(
                "UPDATE entries SET used_s = max(used_s, ?), hits = hits + ? WHERE key = ?",
                [(at_s, hits, key) for key, hits in uses.items()],
            )

    def checked(self, key: str, at_s: float) -> None:
        """Record that all digests of an entry were checked."""
        with self._transaction():
            self._db.execute("UPDATE entries SET checked_s = ? WHERE key = ?", (at_s, key))

    def source_digest(self, stamp: Stamp) -> str | None:
        """Return the digest recorded for a file that stat() cannot tell from the one that was digested."""
        with self._lock:
            row = self._db.execute(
                "SELECT recorded_ns, digest FROM sources WHERE device = ? AND inode = ? AND size = ? AND mtime_ns = ?"
                " AND ctime_ns = ?",
                (_signed(stamp.device), _signed(stamp.inode), stamp.size, stamp.mtime_ns, stamp.ctime_ns),
            ).fetchone()
        return str(row[1]) if row and stamp.settled(row[0]) else None

    def put_source(self, stamp: Stamp, digest: str, path: str, seen_ns: int) -> None:
        """Record a file's digest, and when the file was last looked at before it was read."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (_signed(stamp.device), _signed(stamp.inode), stamp.size, stamp.mtime_ns, stamp.ctime_ns, seen_ns, digest, path),
            )

    def put_model(self, path: str, recipe: str, keys: list[str]) -> None:
        """Record which entries make up a checkpoint."""
        with self._transaction():
            self._db.execute("DELETE FROM models WHERE path = ? AND recipe = ?", (path, recipe))
            self._db.executemany(
                "INSERT INTO models VALUES (?, ?, ?, ?)", [(path, recipe, i, key) for i, key in enumerate(keys)]
            )

    def model_keys(self, path: str) -> list[str]:
        """Return the entries of a checkpoint, whatever the recipe."""
        with self._lock:
            found = self._db.execute("SELECT DISTINCT key FROM models WHERE path = ? ORDER BY recipe, position", (path,))
            return [row[0] for row in found]

    def count(self, amounts: dict[str, float]) -> None:
        """Add to counters."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET amount = amount + excluded.amount",
                list(amounts.items()),
            )

    def counters(self) -> dict[str, float]:
        """Return all counters."""
        with self._lock:
            return dict(self._db.execute("SELECT name, amount FROM counters").fetchall())

    def check(self) -> str | None:
        """Return what SQLite's own check finds wrong, or None."""
        with self._lock:
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        return None if found == "ok" else str(found)


def _signed(number: int) -> int:
    """Fit an unsigned 64-bit number of stat() into SQLite's signed one."""
    return number - (1 << 64) if number >= 1 << 63 else number


def now_s() -> float:
    """Return the time of day in seconds since the epoch."""
    return time.time()
