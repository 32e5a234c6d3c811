"""Own the SQLite index; the only file with SQL. Disposable: all of it can be rebuilt from entries and pins.

Nothing here decides whether bytes are right: a row may be stale or missing, an entry file never is. Every row carries a
seal, a digest of its values: SQLite has none of its own, and a flipped bit would be believed.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from quantcache.cache.filesystem import is_network
from quantcache.cache.key import Stamp
from quantcache.errors import StoreTooNewError, UsageError

__all__ = ["SORTS", "EntryRow", "Index", "is_busy", "is_damage"]

_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_MISMATCH)
#: How long to wait for another process's write. What cannot be written is made up for from the files; nothing is worth more.
_TIMEOUT_S = 1.0
_MAX_INTEGER = (1 << 63) - 1

_ENTRY = (
    "key, nbytes, fingerprint, source_digest, source_nbytes, source_path, recipe, tensors, created_s, used_s, hits, build_s, checked_s"
)
_SOURCE = "device, inode, size, mtime_ns, ctime_ns, recorded_ns, digest, path"
_MODEL = "path, recipe, position, key"
_COUNTER = "name, amount"
_SHARD = "name, mtime_ns, loose_nbytes"
#: Kept as floats, whatever they were given as: a seal is of what is read back.
_REAL = frozenset(("created_s", "used_s", "build_s", "checked_s", "amount"))
#: table -> its columns but the seal
_COLUMNS = {"entries": _ENTRY, "sources": _SOURCE, "models": _MODEL, "counters": _COUNTER, "shards": _SHARD}

#: One list of statements a version of the schema; a new file runs all of them, an old one those that it lacks.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE entries (key TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, fingerprint TEXT NOT NULL, source_digest TEXT NOT NULL,"
        " source_nbytes INTEGER NOT NULL, source_path TEXT NOT NULL, recipe TEXT NOT NULL, tensors INTEGER NOT NULL,"
        " created_s REAL NOT NULL, used_s REAL NOT NULL, hits INTEGER NOT NULL, build_s REAL NOT NULL, checked_s REAL NOT NULL) STRICT",
        "CREATE INDEX entries_by_fingerprint ON entries (fingerprint)",
        "CREATE TABLE sources (device INTEGER NOT NULL, inode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,"
        " ctime_ns INTEGER NOT NULL, recorded_ns INTEGER NOT NULL, digest TEXT NOT NULL, path TEXT NOT NULL,"
        " PRIMARY KEY (device, inode)) STRICT",
        "CREATE TABLE models (path TEXT NOT NULL, recipe TEXT NOT NULL, position INTEGER NOT NULL, key TEXT NOT NULL,"
        " PRIMARY KEY (path, recipe, position)) STRICT",
        "CREATE TABLE counters (name TEXT PRIMARY KEY, amount REAL NOT NULL) STRICT",
    ),
    (
        "CREATE TABLE shards (name TEXT PRIMARY KEY, mtime_ns INTEGER NOT NULL, loose_nbytes INTEGER NOT NULL) STRICT",
        "CREATE INDEX entries_by_use ON entries (used_s)",
        *(f"ALTER TABLE {table} ADD COLUMN seal INTEGER NOT NULL DEFAULT 0" for table in _COLUMNS),
        *(f"UPDATE {table} SET seal = seal({columns})" for table, columns in _COLUMNS.items()),
    ),
)
SCHEMA_VERSION = len(_MIGRATIONS)

#: How rows can be sorted: name -> SQL. The first counts, the key decides between equals.
SORTS: Mapping[str, str] = {
    "used": "used_s DESC", "created": "created_s DESC", "size": "nbytes DESC", "hits": "hits DESC", "name": "source_path", "key": "key",
}  # fmt: skip


class _DamageError(sqlite3.DatabaseError):
    """Report a row that is not what was written."""


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
    if isinstance(error, _DamageError):
        return True
    code = getattr(error, "sqlite_errorcode", None)
    text = str(error)
    return (code is not None and code & 0xFF in _DAMAGE) or any(
        sign in text for sign in ("malformed", "no such", "has no column", "already exists", "unsupported file format")
    )


def is_busy(error: sqlite3.Error) -> bool:
    """Return whether an error means that another process is writing, and nothing else."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _seal(*values: Any) -> int:
    """Return the digest of a row's values, as SQLite's signed integer."""
    found: int = xxhash.xxh3_64_intdigest(repr(values).encode())
    return found - (1 << 64) if found > _MAX_INTEGER else found


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
        self._db = sqlite3.connect(target, uri=uri, timeout=_TIMEOUT_S, check_same_thread=False, isolation_level=None)
        try:
            self._db.create_function("seal", -1, _seal, deterministic=True)
            version = self._version()
            if version > SCHEMA_VERSION:
                raise StoreTooNewError(f"the index {path} has version {version}, this program knows {SCHEMA_VERSION}")
            #: there was no schema yet: a new file, or one that was emptied
            self.created = version == 0
            if readonly:
                if version != SCHEMA_VERSION:
                    raise _DamageError(f"the index {path} has version {version}")
                return
            if path is not None:
                # write-ahead logging needs shared memory, which network file systems do not have
                self._db.execute(f"PRAGMA journal_mode={'DELETE' if is_network(path.parent) else 'WAL'}")
                self._db.execute("PRAGMA synchronous=NORMAL")
            if version < SCHEMA_VERSION:
                self._migrate()
        except BaseException:
            self._db.close()
            raise

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _migrate(self) -> None:
        """Bring the schema up to date and record it, in one transaction."""
        with self._transaction():
            for statements in _MIGRATIONS[self._version() :]:  # another process may have been faster
                for statement in statements:
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def copy(self) -> Index:
        """Return a copy in memory, which can be changed."""
        other = Index(None)
        with self._lock:
            self._db.backup(other._db)
        return other

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

    def _put(self, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        names = _COLUMNS[table].split(", ")
        marks = ", ".join("?" for _ in range(len(names) + 1))
        values = (tuple(float(v) if name in _REAL else v for name, v in zip(names, row, strict=True)) for row in rows)
        self._db.executemany(
            f"INSERT OR REPLACE INTO {table} ({_COLUMNS[table]}, seal) VALUES ({marks})", [(*row, _seal(*row)) for row in values]
        )

    def _read(self, table: str, rest: str = "", values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        """Return rows as they were written.

        Raises:
            sqlite3.DatabaseError: one is not.
        """
        with self._lock:
            found = self._db.execute(f"SELECT {_COLUMNS[table]}, seal FROM {table} {rest}", values).fetchall()
        for row in found:
            if _seal(*row[:-1]) != row[-1]:
                raise _DamageError(f"a row of {table} is not what was written")
        return [row[:-1] for row in found]

    # ---- entries ----

    def entries(self, sort: str = "used", limit: int | None = None) -> list[EntryRow]:
        """Return rows, the most recently used first.

        Args:
            sort: a name in SORTS.
            limit: how many; all if None.
        """
        if sort not in SORTS:
            raise UsageError(f"{sort!r} is not one of {', '.join(SORTS)}")
        rest = f"ORDER BY {SORTS[sort]}, key LIMIT ?"
        return [EntryRow(*row) for row in self._read("entries", rest, (-1 if limit is None else limit,))]

    def entry(self, key: str) -> EntryRow | None:
        """Return one row."""
        return next((EntryRow(*row) for row in self._read("entries", "WHERE key = ?", (key,))), None)

    def entries_from(self, prefix: str) -> list[EntryRow]:
        """Return the rows whose key starts so."""
        return [EntryRow(*row) for row in self._read("entries", "WHERE key >= ? AND key < ?", (prefix, f"{prefix}g"))]

    def related(self, source_digest: str, limit: int) -> list[str]:
        """Return keys of entries, those of a source first, then by use."""
        rest = "ORDER BY source_digest = ? DESC, used_s DESC LIMIT ?"
        return [row[0] for row in self._read("entries", rest, (source_digest, limit))]

    def count_and_nbytes(self) -> tuple[int, int]:
        """Return the number of entries, and their bytes with those of the files beside them that are none."""
        with self._lock:
            count, nbytes = self._db.execute("SELECT count(*), coalesce(sum(nbytes), 0) FROM entries").fetchone()
            loose = self._db.execute("SELECT coalesce(sum(loose_nbytes), 0) FROM shards").fetchone()[0]
        return int(count), int(nbytes) + int(loose)

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Return whether any entry was built from a source with this fingerprint."""
        with self._lock:
            return self._db.execute("SELECT 1 FROM entries WHERE fingerprint = ? LIMIT 1", (fingerprint,)).fetchone() is not None

    def put(self, rows: Iterable[EntryRow]) -> None:
        """Insert or replace rows."""
        with self._transaction():
            self._put("entries", (astuple(row) for row in rows))

    def remove(self, keys: Iterable[str]) -> None:
        """Delete rows."""
        with self._transaction():
            self._db.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key in keys])

    def note(self, uses: Mapping[str, int], amounts: Mapping[str, float], at_s: float, *, patience_s: float = 0.0) -> bool:
        """Record hits (entry -> how many) and add to counters, unless somebody else is writing for longer than one has patience.

        Returns:
            Whether it was recorded.
        """

        def write() -> None:
            self._change("used_s = max(used_s, ?), hits = hits + ?", [((at_s, hits), key) for key, hits in uses.items()])
            self._count(amounts)

        return self._unless_busy(write, patience_s)

    def _unless_busy(self, write: Callable[[], None], patience_s: float = 0.0) -> bool:
        """Write in a transaction, unless somebody else is writing: a hit waits for nobody.

        Returns:
            Whether it was written.
        """
        with self._lock:
            self._db.execute(f"PRAGMA busy_timeout={int(patience_s * 1000)}")
            try:
                with self._transaction():
                    write()
            except sqlite3.OperationalError as error:
                if is_busy(error):
                    return False
                raise
            finally:
                self._db.execute(f"PRAGMA busy_timeout={int(_TIMEOUT_S * 1000)}")
        return True

    def checked(self, keys: Iterable[str], at_s: float) -> None:
        """Record that all digests of entries were checked."""
        with self._transaction():
            self._change("checked_s = ?", [((at_s,), key) for key in keys])

    def _change(self, assignments: str, changes: list[tuple[tuple[object, ...], str]]) -> None:
        """Change rows of entries and seal them anew; a row that is not what was written is left to be found."""
        for values, key in changes:
            done = self._db.execute(f"UPDATE entries SET {assignments} WHERE key = ? AND seal = seal({_ENTRY})", (*values, key))
            if done.rowcount:
                self._db.execute(f"UPDATE entries SET seal = seal({_ENTRY}) WHERE key = ?", (key,))

    # ---- folders of entries ----

    def shards(self) -> dict[str, tuple[int, int]]:
        """Return folder of entries -> its mtime_ns when rows and files were last compared, and bytes of what is no entry."""
        return {row[0]: (row[1], row[2]) for row in self._read("shards")}

    def keys_in(self, shard: str) -> set[str]:
        """Return the keys that have rows in a folder of entries."""
        with self._lock:
            found = self._db.execute("SELECT key FROM entries WHERE key >= ? AND key < ?", (shard, f"{shard}g"))
            return {row[0] for row in found}

    def put_shards(self, shards: Mapping[str, tuple[int, int]], missing: Iterable[EntryRow], gone: Iterable[str]) -> None:
        """Record that rows and files of folders agree.

        Args:
            shards: folder -> mtime_ns, bytes of files that are no entries; (0, 0) for a folder that is gone.
            missing: rows to be added.
            gone: keys to be removed.
        """
        with self._transaction():
            self._put("entries", (astuple(row) for row in missing))
            self._db.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key in gone])
            self._put("shards", ((name, *values) for name, values in shards.items()))

    # ---- sources and models ----

    def source_digest(self, stamp: Stamp) -> str | None:
        """Return the digest recorded for a file that stat() cannot tell from the one that was digested."""
        wanted = (_signed(stamp.device), _signed(stamp.inode), stamp.size, stamp.mtime_ns, stamp.ctime_ns)
        rest = "WHERE device = ? AND inode = ? AND size = ? AND mtime_ns = ? AND ctime_ns = ?"
        row = next(iter(self._read("sources", rest, wanted)), None)
        return str(row[6]) if row and stamp.settled(row[5]) else None

    def put_source(self, stamp: Stamp, digest: str, path: str, seen_ns: int) -> None:
        """Record a file's digest, and when the file was last looked at before it was read; not if somebody else is writing."""
        values = _signed(stamp.device), _signed(stamp.inode), stamp.size, stamp.mtime_ns, stamp.ctime_ns, seen_ns, digest, path
        self._unless_busy(lambda: self._put("sources", [values]))

    def put_model(self, path: str, recipe: str, keys: list[str]) -> None:
        """Record which entries make up a checkpoint; not if that is known, or somebody else is writing."""
        rows = [(path, recipe, position, key) for position, key in enumerate(keys)]
        if self._read("models", "WHERE path = ? AND recipe = ? ORDER BY position", (path, recipe)) == rows:
            return

        def write() -> None:
            self._db.execute("DELETE FROM models WHERE path = ? AND recipe = ?", (path, recipe))
            self._put("models", rows)

        self._unless_busy(write)

    def model_keys(self, path: str) -> list[str]:
        """Return the entries of a checkpoint, whatever the recipe."""
        return list(dict.fromkeys(row[3] for row in self._read("models", "WHERE path = ? ORDER BY recipe, position", (path,))))

    # ---- counters ----

    def count(self, amounts: Mapping[str, float]) -> None:
        """Add to counters."""
        with self._transaction():
            self._count(amounts)

    def _count(self, amounts: Mapping[str, float]) -> None:
        have = dict(self._read("counters"))
        self._put("counters", [(name, have.get(name, 0.0) + float(amount)) for name, amount in amounts.items()])

    def counters(self) -> dict[str, float]:
        """Return all counters."""
        return dict(self._read("counters"))

    # ---- its own health ----

    def check(self) -> str | None:
        """Return what is wrong with the file, its schema or a row, or None."""
        with self._lock:
            try:
                found = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
                if found != "ok":
                    return str(found)
                fresh = Index(None)
                listing = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
                mine, wanted = (["".join(map(str, row)).split() for row in db.execute(listing)] for db in (self._db, fresh._db))
                fresh.close()
                # a file that was brought up to date keeps the spaces of its time
                if ["".join(words) for words in mine] != ["".join(words) for words in wanted]:
                    return "its schema is not the one that was written"
                for table in _COLUMNS:
                    self._read(table)
            except (sqlite3.Error, ValueError) as error:  # a text that is no UTF-8 any more
                return str(error)
        return None


assert tuple(_ENTRY.split(", ")) == tuple(field.name for field in fields(EntryRow))


def _signed(number: int) -> int:
    """Fit an unsigned 64-bit number of stat() into SQLite's signed one."""
    return number - (1 << 64) if number >= 1 << 63 else number
