"""Own Cache, the store's facade: find, build once, publish, evict, and never fail a load.

::

    <root>/                  QUANTCACHE_DIR, else the user's cache folder; 0700; CACHEDIR.TAG
      v1/
        index.sqlite3        disposable
        entries/<k[:2]>/<key>.safetensors
        pins/<key>
        tmp/  quarantine/  locks/

An entry becomes visible by a rename, after its bytes are durable; then its row is written. A row without a file is
nobody's hit, a file without a row is adopted. Knows bytes and key documents; no codec, no model.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcache.cache import locks
from quantcache.cache import policy as policies
from quantcache.cache.blobs import StagedEntry, StoredEntry, quarantine, remove_stale, staged_path, store_error
from quantcache.cache.container import Slot
from quantcache.cache.filesystem import (
    PRIVATE,
    files_in,
    is_network,
    make_folders,
    prepare_root,
    sync_folder,
    tree_nbytes,
)
from quantcache.cache.index import EntryRow
from quantcache.cache.key import CONTAINER_VERSION, Stamp, canonical, key_of
from quantcache.cache.settings import parse_share, parse_size, resolve
from quantcache.cache.tolerant import KEY, TolerantIndex, entry_files, row_of, storable, tensors_in
from quantcache.errors import (
    CacheError,
    CorruptEntryError,
    KeyNotFoundError,
    NoCacheError,
    QuantcacheWarning,
    StoreReadOnlyError,
    StoreTooNewError,
    UsageError,
)

if TYPE_CHECKING:
    from quantcache.cache.explain import Explanation

__all__ = ["Cache"]

_USE_INTERVAL_S = 60.0
_CLOSING_PATIENCE_S = 0.25
_FOLDERS = ("", "entries", "pins", "tmp", "quarantine", "locks")
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Written by quantcache: backups may leave this folder out.\n"


def _unread(path: Path) -> EntryRow:
    """Return what is known of an entry whose header cannot be read."""
    return EntryRow(path.stem, os.lstat(path).st_size, "", "", 0, "", "", 0, 0.0, 0.0, 0, 0.0, 0.0)


class Cache:
    """Keep built entries by key.

    Args:
        root: the folder; the setting `dir` if None.
        max_size: bytes that the store may take; the setting if None.
        keep_free: share ("5%") or bytes of the disk that stay free; the setting if None.
        policy: which entries go first: "lru", "size" or "cost".
        lock_timeout_s: how long to wait for another process that builds the same entry; None waits.
        create: make the folder if it is not there.
        readonly: write nothing at all.
        shared: accept a folder of another user.

    Raises:
        UsageError: a setting cannot be meant.
        NoCacheError: there is no store, and `create` is false.
        CacheError: the folder cannot be used.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        max_size: int | str | None = None,
        keep_free: int | str | None = None,
        policy: str | None = None,
        lock_timeout_s: float | None = None,
        create: bool = True,
        readonly: bool = False,
        shared: bool = False,
    ) -> None:
        flags = {"dir": root, "max_size": max_size, "keep_free": keep_free, "policy": policy, "lock_timeout": lock_timeout_s}
        chosen = {name: setting.value for name, setting in resolve(flags).items()}
        self.root: Path = Path(chosen["dir"])
        self.max_size: int = chosen["max_size"]
        self.keep_free: str = parse_share(chosen["keep_free"])
        self.policy: str = chosen["policy"]
        self.lock_timeout_s: float | None = chosen["lock_timeout"]
        self.readonly = readonly
        self.folder = self.root / f"v{CONTAINER_VERSION}"
        self._lock = threading.RLock()
        self._complained = False
        self._pending: dict[str, int] = {}
        self._counts: dict[str, float] = {}
        try:
            os.stat(self.folder)
        except PermissionError as error:
            raise store_error(f"the store {self.root} may not be entered", error) from error
        except OSError:
            pass  # it is told below
        if not os.path.isdir(self.folder):
            try:
                versions = [p.name for p in self.root.glob("v[0-9]*") if p.name[1:].isdigit()]
            except OSError:
                versions = []
            newer = [name for name in versions if int(name[1:]) > CONTAINER_VERSION]
            if newer and not create:
                raise StoreTooNewError(f"the store {self.root} has only {newer[0]}, this program reads v{CONTAINER_VERSION}")
            if readonly or not create:
                raise NoCacheError(f"there is no store in {self.root}", hint="quantcache warm PATH makes one")
        #: modes of what the store makes; a store that was made shared says so itself
        self.access = PRIVATE
        try:
            self.access = prepare_root(self.root, self.folder, shared=shared and not readonly)
            if not readonly:
                make_folders(self.folder, _FOLDERS, self.access)
                tag = self.root / "CACHEDIR.TAG"
                if not tag.is_file() or tag.stat().st_size != len(_TAG):
                    tag.write_text(_TAG)
        except OSError as error:
            if not os.path.isdir(self.folder):
                raise store_error(f"cannot make a store in {self.root}", error) from error
            self.readonly = True
        if not os.access(self.folder / "entries", os.W_OK):
            self.readonly = True
        self.index = TolerantIndex(self.folder, readonly=self.readonly, complain=self.complain, access=self.access)

    # ---- what goes wrong ----

    def begin(self) -> None:
        """Begin a load: what goes wrong from here on is said once."""
        self._complained = False

    def complain(self, text: str) -> None:
        """Warn, unless something was said since the load began: one failing disk fails in many places."""
        with self._lock:
            said, self._complained = self._complained, True
        if not said:
            warnings.warn(text, QuantcacheWarning, stacklevel=3)

    # ---- where things are ----

    def entry_files(self) -> list[Path]:
        """Return the paths of all entry files."""
        return entry_files(self.folder)

    def path_of(self, key: str) -> Path:
        """Return where the entry of a key is, if there is one.

        Raises:
            UsageError: that is no key; nothing else becomes part of a path.
        """
        return Path(self.file_of(key))

    def file_of(self, key: str) -> str:
        """Return the same as a text: a hundred thousand of pathlib's paths take a second."""
        if not KEY.fullmatch(key):
            raise UsageError(f"{key!r} is not a key")
        return f"{self.folder}{os.sep}entries{os.sep}{key[:2]}{os.sep}{key}.safetensors"

    # ---- hits ----

    def find(self, document: Mapping[str, Any]) -> StoredEntry | None:
        """Return the entry of a key document, its header checked, or None.

        A damaged one is quarantined with a warning and counts as none.
        """
        key = key_of(document)
        path = self.path_of(key)
        try:
            entry = StoredEntry(key, path, shared=self.access.shared)
            if canonical(entry.header.document) != canonical(document):
                raise CorruptEntryError(f"entry {key} was built for another key document")
        except FileNotFoundError:
            return None
        except CorruptEntryError as error:
            self.damaged(key, error.message)
            return None
        except CacheError as error:
            self.complain(f"{error.message}; loading without it")
            return None
        return entry

    def find_staged(self, document: Mapping[str, Any], name: str) -> StoredEntry | None:
        """Return an entry that its builder has announced: whole, but not durable, and so not an entry of the store yet.

        Its tensors must be checked before they are used. On a network file system another machine may have written it, of which
        this one sees what it likes: there is none.

        Args:
            document: the key document.
            name: as announced.
        """
        key, staged = key_of(document), staged_path(self.folder / "tmp", name)
        if staged is None or is_network(self.folder):
            return None
        try:
            entry = StoredEntry(key, self.path_of(key), shared=self.access.shared, staged=staged)
        except (FileNotFoundError, CacheError):
            return None
        return entry if canonical(entry.header.document) == canonical(document) else None

    def damaged(self, key: str, why: str) -> bool:
        """Move a damaged entry out of the way and say so; return whether it could be moved."""
        moved = None if self.readonly else quarantine(self.path_of(key), self.folder / "quarantine")
        if moved:
            self.index.call(lambda index: index.remove([key]), None)
        gone = not os.path.lexists(self.file_of(key))
        where = "moved to quarantine" if moved else "is gone already" if gone else "left where it is (read-only store)"
        warnings.warn(f"damaged entry {key[:12]} {where}: {why}", QuantcacheWarning, stacklevel=3)
        return moved is not None or gone

    def used(self, entry: StoredEntry, *, saved_s: float) -> None:
        """Note a hit; written at most once a minute an entry, the rest when the cache is closed."""
        with self._lock:
            self._pending[entry.key] = self._pending.get(entry.key, 0) + 1
            self.tally(hits=1, bytes_served=entry.header.nbytes, seconds_saved=max(0.0, saved_s))
            row = self.index.call(lambda index: index.entry(entry.key), None)
            if row is not None and time.time() - row.used_s >= _USE_INTERVAL_S:
                self.flush()

    def tally(self, **amounts: float) -> None:
        """Add to the counters that `stats` shows."""
        for name, amount in amounts.items():
            self._counts[name] = self._counts.get(name, 0.0) + amount

    def flush(self, *, patience_s: float = 0.0) -> None:
        """Write what was noted, unless another process is writing: then it is noted still. Nothing in a read-only store."""
        with self._lock:
            uses, counts = self._pending, self._counts
            if (uses or counts) and not self.readonly:
                write = lambda index: index.note(uses, counts, time.time(), patience_s=patience_s)  # noqa: E731
                if not self.index.call(write, True):
                    return
            self._pending, self._counts = {}, {}

    # ---- sources ----

    def source_digest(self, stamp: Stamp) -> str | None:
        """Return a source's digest if stat() says that it is still the file that was digested."""
        return self.index.call(lambda index: index.source_digest(stamp), None)

    def record_source(self, stamp: Stamp, digest: str, path: Path, seen_ns: int) -> None:
        """Remember a source's digest; `seen_ns` is when the stamp was taken."""
        if not self.readonly:
            self.index.call(lambda index: index.put_source(stamp, digest, storable(path), seen_ns), None)

    def knows(self, fingerprint: str) -> bool:
        """Return whether a source with this fingerprint may have an entry."""
        known = self.index.call(lambda index: index.has_fingerprint(fingerprint), True)
        return known or self.index.in_step(lambda index: index.has_fingerprint(fingerprint), True)

    def record_model(self, path: Path, recipe: str, keys: list[str]) -> None:
        """Remember which entries make up a checkpoint."""
        if not self.readonly:
            self.index.call(lambda index: index.put_model(storable(path), recipe, keys), None)

    # ---- building ----

    @contextlib.contextmanager
    def building(self, name: str) -> Iterator[None]:
        """Hold the lock of a build, see `acquire`."""
        lock = self.acquire(name)
        try:
            yield
        finally:
            lock.release()

    def acquire(self, name: str, done: Callable[[str], bool] = lambda _: False) -> locks.Lock:
        """Wait until no other process builds under this name; on file systems without locks, go on at once.

        Args:
            name: 32 hex digits.
            done: whether another has built it meanwhile; nothing is locked then. Asked with the name of what the other has
                staged, once that is whole, and with "" once the other is done.

        Returns:
            What holds the lock.

        Raises:
            LockTimeoutError: another process held it for longer than `lock_timeout_s`.
        """
        if not KEY.fullmatch(name):
            raise UsageError(f"{name!r} is not the name of a lock")
        path = f"{self.folder}{os.sep}locks{os.sep}{name}.lock"
        try:
            return locks.acquire(path, access=self.access, timeout_s=self.lock_timeout_s, done=done)
        except OSError:
            return locks.Lock()  # two writers waste work then, and never mix bytes

    def stage(self, slots: Mapping[str, Slot], records_nbytes: int = 0) -> StagedEntry:
        """Reserve room for an entry, evicting others within the limits.

        Args:
            slots: the tensors, by key; those that are alike may share one.
            records_nbytes: what records will take, if that is more than a few hundred bytes: see `container.stated_nbytes`.

        Raises:
            CacheError: there is no room, or the store cannot be written.
        """
        self._writable()
        try:
            remove_stale(self.folder / "tmp")
            self.make_room(sum([slot.nbytes for slot in slots.values()]))
            return StagedEntry(self.folder / "tmp", slots, records_nbytes, self.access)
        except OSError as error:
            raise store_error(f"cannot make room in {self.root}", error) from error

    def make_room(self, nbytes: int) -> None:
        """Evict until so many bytes fit the limits.

        Raises:
            CacheError: they cannot.
        """
        short = self.over_limits(nbytes)
        if short > 0:
            spare = tree_nbytes(self.folder / "quarantine")
            chosen = policies.choose(self.entries(), short - spare, self.policy, self.pinned())
            if sum(row.nbytes for row in chosen) + spare >= short:  # else nothing is given up in vain
                for path in files_in(self.folder / "quarantine"):
                    with contextlib.suppress(OSError):
                        path.unlink()
                for row in chosen:
                    if self.is_pinned(row.key):  # by now
                        continue
                    self.remove(row.key)
                    self.tally(evicted=1, bytes_evicted=row.nbytes)
                short = self.over_limits(nbytes)
        if short > 0:
            raise CacheError(
                f"{nbytes} bytes do not fit the store's limits (max_size {self.max_size}, keep_free {self.keep_free})",
                hint="raise --max-size, lower keep_free, or unpin an entry",
            )

    def over_limits(self, nbytes: int, *, max_size: int | None = None, keep_free: str | None = None) -> int:
        """Return how many bytes too much the store would take, or the disk would lose, with so many more.

        Args:
            nbytes: to be added.
            max_size, keep_free: other limits than the store's own.
        """
        import shutil  # a hit needs none of it, and would wait for it

        over = self.usage()["total"] + nbytes - (self.max_size if max_size is None else max_size)
        with contextlib.suppress(OSError):
            disk = shutil.disk_usage(self.folder)
            share = self.keep_free if keep_free is None else keep_free
            free = int(disk.total * float(share[:-1]) / 100) if share.endswith("%") else parse_size(share)
            over = max(over, free - (disk.free - nbytes))
        return over

    def usage(self) -> dict[str, int]:
        """Return the store's bytes: entries, temp files, quarantine, total."""
        found = {
            "entries": self.index.in_step(lambda index: index.count_and_nbytes(), (0, 0))[1],
            "tmp": tree_nbytes(self.folder / "tmp"),
            "quarantine": tree_nbytes(self.folder / "quarantine"),
        }
        return found | {"total": sum(found.values())}

    def publish(
        self,
        staged: StagedEntry,
        *,
        document: Mapping[str, Any],
        records: Any,
        built: Mapping[str, Any],
        announce: Callable[[str], None] = lambda _: None,
    ) -> EntryRow:
        """Make a staged entry visible, and write its row, which is returned; `announce` tells those that wait, see StagedEntry.

        Raises:
            CacheError: the disk refused; nothing is visible then.
        """
        key = key_of(document)
        path = self.path_of(key)
        nbytes = staged.publish(path, document=document, records=records, built=built, announce=announce)
        row = row_of(key, nbytes, document, built, tensors_in(records, staged.slots), time.time())
        self.index.call(lambda index: index.put([row]), None)
        with contextlib.suppress(OSError):  # a killed process may give up its lock on a build before the one on its file: then it stood when we staged
            remove_stale(self.folder / "tmp")
        return row

    def get_or_build(self, document: Mapping[str, Any], build: Callable[[Callable[..., StagedEntry]], Any]) -> StoredEntry:
        """Return the entry of a key document, building it once across processes; for loaders other than ours.

        Args:
            document: plain JSON; everything that the bytes depend on.
            build: called with `stage(slots, records_nbytes)`; must return (staged, records) with every slot written.

        Raises:
            CacheError: it could not be stored.
        """
        entry = self.find(document)
        if entry is not None:
            self.used(entry, saved_s=float(entry.header.built.get("seconds", 0)))
            return entry
        with self.building(key_of(document)):
            entry = self.find(document)
            if entry is not None:
                return entry
            start = time.monotonic()
            made: list[StagedEntry] = []

            def stage(slots: Mapping[str, Slot], records_nbytes: int = 0) -> StagedEntry:
                made.append(self.stage(slots, records_nbytes))
                return made[-1]

            try:
                staged, records = build(stage)
                built = {"seconds": round(time.monotonic() - start, 3), "created": time.time()}
                self.publish(staged, document=document, records=records, built=built)
            except BaseException:
                for left in made:
                    left.discard()
                raise
        entry = self.find(document)
        if entry is None:
            raise CacheError(f"entry {key_of(document)} was removed as soon as it was published")
        return entry

    # ---- looking after it ----

    def _counters(self) -> dict[str, float]:
        nothing: dict[str, float] = {}
        return self.index.call(lambda index: index.counters(), nothing)

    def entries(self, sort: str = "used", limit: int | None = None) -> list[EntryRow]:
        """Return the rows of entries, the most recently used first.

        Args:
            sort: "used", "created", "size", "hits", "name" or "key".
            limit: how many; all if None.
        """
        nothing: list[EntryRow] = []
        return self.index.in_step(lambda index: index.entries(sort, limit), nothing)

    def rows(self) -> list[EntryRow]:
        """Return the rows of the index as they are, in step with the files or not."""
        nothing: list[EntryRow] = []
        return self.index.call(lambda index: index.entries(), nothing)

    def __len__(self) -> int:
        """Return the number of entries."""
        return self.index.in_step(lambda index: index.count_and_nbytes(), (0, 0))[0]

    def __bool__(self) -> bool:
        """A cache without entries is a cache."""
        return True

    def lookup(self, key: str) -> EntryRow:
        """Return the one entry whose key starts so.

        Raises:
            KeyNotFoundError: there is none, or more than one.
        """
        nothing: list[EntryRow] = []
        prefix = key.lower()
        asked = bool(prefix) and all(digit in "0123456789abcdef" for digit in prefix)
        found = self.index.in_step(lambda index: index.entries_from(prefix), nothing) if asked else nothing
        if not found and asked:  # a file that cannot be read as an entry has no row, and may be asked for all the same
            found = [_unread(path) for path in self.entry_files() if path.stem.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if found:
            raise KeyNotFoundError(f"{len(found)} entries start with {key!r}", hint="give more digits of the key")
        raise KeyNotFoundError(f"no entry starts with {key!r}", hint="quantcache ls shows them")

    def explain(self, document: Mapping[str, Any]) -> Explanation:
        """Say whether a key document has an entry, and against the nearest one, factor by factor, why not."""
        from quantcache.cache.explain import explain  # as above

        return explain(self, document)

    def related(self, document: Mapping[str, Any], limit: int) -> list[str]:
        """Return keys of the entries that are likely to be most like a key document's: the same source, then the latest."""
        source = document.get("source")
        digest = storable(source.get("digest", "")) if isinstance(source, Mapping) else ""
        nothing: list[str] = []
        return self.index.in_step(lambda index: index.related(digest, limit), nothing)

    def keys_of_model(self, path: Path) -> list[str]:
        """Return the keys that were built for a checkpoint's path."""
        nothing: list[str] = []
        known = self.index.call(lambda index: index.model_keys(storable(path)), nothing)
        rows = self.entries()
        return [row.key for row in rows if row.key in known or row.source_path == storable(path)]

    def open(self, key: str) -> StoredEntry:
        """Open an entry by its whole key.

        Raises:
            KeyNotFoundError, CorruptEntryError, CacheError: as they say.
        """
        try:
            return StoredEntry(key, self.path_of(key), shared=self.access.shared)
        except FileNotFoundError as error:
            raise KeyNotFoundError(f"no entry has the key {key}") from error

    def _writable(self) -> None:
        if self.readonly:
            raise StoreReadOnlyError(
                f"the store {self.root} is read-only", hint="choose a folder that you may write to: --cache-dir or QUANTCACHE_DIR"
            )

    def remove(self, key: str) -> int:
        """Delete an entry, file first; whoever has it mapped goes on reading it.

        Returns:
            Bytes that it took.

        Raises:
            StoreReadOnlyError, CacheError: it could not be deleted.
        """
        self._writable()
        path = self.path_of(key)
        try:
            nbytes = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            nbytes = 0
        except OSError as error:
            raise store_error(f"cannot remove entry {key}", error) from error
        self.index.call(lambda index: index.remove([key]), None)
        return nbytes

    def pin(self, key: str) -> None:
        """Keep an entry from being evicted or pruned."""
        self._writable()
        try:
            path = self.folder / "pins" / self.lookup(key).key
            path.touch(mode=self.access.file_mode)
            sync_folder(path.parent)
        except OSError as error:
            raise store_error(f"cannot pin {key}", error) from error

    def unpin(self, key: str) -> None:
        """Let an entry be evicted again."""
        self._writable()
        try:
            (self.folder / "pins" / self.lookup(key).key).unlink(missing_ok=True)
            sync_folder(self.folder / "pins")
        except OSError as error:
            raise store_error(f"cannot unpin {key}", error) from error

    def drop_pin(self, key: str) -> None:
        """Forget the pin of an entry that is gone."""
        with contextlib.suppress(OSError):
            (self.folder / "pins" / key).unlink(missing_ok=True)

    def pinned(self) -> set[str]:
        """Return the keys of pinned entries.

        Raises:
            CacheError: they cannot be told: nothing may be evicted then.
        """
        try:
            names = os.listdir(self.folder / "pins")
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise store_error("cannot read which entries are pinned", error) from error
        return {name for name in names if KEY.fullmatch(name)}

    def is_pinned(self, key: str) -> bool:
        """Return whether an entry is pinned, or may be: what cannot be told counts as pinned."""
        try:
            os.lstat(self.folder / "pins" / key)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def checked(self, keys: Iterable[str]) -> None:
        """Record that all digests of entries were checked and right."""
        keys = list(keys)
        if keys and not self.readonly:
            self.index.call(lambda index: index.checked(keys, time.time()), None)

    def rebuild_index(self) -> int:
        """Make the index anew from the entries, keeping counters and use times where they can be read.

        Returns:
            The number of entries.
        """
        self._writable()
        return self.index.rebuild()

    def stats(self) -> dict[str, float]:
        """Return the counters: hits, misses, bytes_served, bytes_built, seconds_saved, seconds_building, evicted."""
        self.flush()
        names = ("hits", "misses", "bytes_served", "bytes_built", "seconds_saved", "seconds_building", "evicted", "bytes_evicted")
        found = self._counters()
        return {name: found.get(name, 0.0) for name in names}

    def close(self) -> None:
        """Write what was noted, for which another process's short write may be waited for, and close the index."""
        self.flush(patience_s=_CLOSING_PATIENCE_S)
        self.index.close()

    def __enter__(self) -> Cache:
        """Return the cache itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()
