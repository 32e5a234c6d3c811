"""Own verify, prune and repair: what looks after a store. Never touches a source, never blesses damage."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from quantcache.cache import policy as policies
from quantcache.cache.blobs import quarantine, remove_stale, remove_stale_locks
from quantcache.cache.filesystem import files_in, freed_nbytes, sync_folder
from quantcache.cache.index import EntryRow
from quantcache.cache.key import key_of
from quantcache.cache.settings import parse_share, parse_size
from quantcache.cache.store import Cache
from quantcache.cache.tolerant import KEY, loose_files
from quantcache.errors import CacheError, CorruptEntryError, KeyNotFoundError, StoreReadOnlyError, UsageError

__all__ = ["Finding", "Pruned", "Verified", "clear", "prune", "remove", "repair", "verify"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Say what is wrong.

    Args:
        subject: an entry's key, or what else it is about.
        problem: in words.
        damaged: an entry's bytes are not those that were stored; else they could not be read, or it is no entry.
    """

    subject: str
    problem: str
    damaged: bool = True


@dataclass(slots=True)
class Verified:
    """Say what was looked at, and what is wrong.

    Args:
        checked: keys of the entries that were looked at.
        left: how many were not, for lack of time or because only a part was wanted.
        findings: what is wrong.
    """

    checked: list[str] = field(default_factory=list)
    left: int = 0
    findings: list[Finding] = field(default_factory=list)


@dataclass(slots=True)
class Pruned:
    """Say what was removed, or would be.

    Args:
        entries: rows of them.
        files: others, with their bytes.
        freed: bytes of the disk that come free: holes, and what has another name or is shared, do not.
        failed: why others could not be removed.
    """

    entries: list[EntryRow] = field(default_factory=list)
    files: list[tuple[Path, int]] = field(default_factory=list)
    freed: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Sizes of the files in all: what limits count."""
        return sum(row.nbytes for row in self.entries) + sum(nbytes for _, nbytes in self.files)


# ---- verify ----


def verify(
    cache: Cache,
    keys: Iterable[str] | None = None,
    *,
    quick: bool = False,
    subset: str | None = None,
    max_duration_s: float | None = None,
    threads: int = 2,
) -> Verified:
    """Check entries, those first whose last check is the oldest: header, length, key and, unless quick, every digest.

    What was found right is recorded with the date, at the latest every few seconds: a check that is stopped is resumed
    by the next. A record says when, never that the entry is right now.

    Args:
        cache: the store.
        keys: which; all files if None, rows or not, and the index and the pins, too.
        quick: leave the digests out; recorded as nothing.
        subset: "10%" or "50GB" of the store's bytes, the longest unchecked first, or "2/7", the second of seven parts.
        max_duration_s: begin no further entry after so long.
        threads: how many digests at once.

    Raises:
        UsageError: the subset cannot be meant.
    """
    start = time.monotonic()
    damage = cache.index.check() if keys is None else None  # before a query finds it, and makes the index anew
    rows = {row.key: row for row in cache.rows()}  # as they are: a row without a file is a finding
    files = {path.stem for path in cache.entry_files()}
    wanted = sorted(files if keys is None else set(keys), key=lambda key: (rows[key].checked_s if key in rows else 0.0, key))
    chosen = wanted if subset is None else _subset(subset, wanted, rows)
    done = Verified(left=len(wanted) - len(chosen))
    right: list[str] = []
    recorded_s = start
    with ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            for position, key in enumerate(chosen):
                now = time.monotonic()
                if max_duration_s is not None and now - start >= max_duration_s:
                    done.left += len(chosen) - position
                    break
                finding = _look(cache, key, pool, quick=quick)
                if finding and keys is None and _is_gone(cache.file_of(key)):
                    continue  # evicted meanwhile
                done.checked.append(key)
                if finding:
                    done.findings.append(finding)
                elif not quick:
                    right.append(key)
                if now - recorded_s > 5:
                    cache.checked(right)
                    right, recorded_s = [], now
        finally:  # Ctrl-C, too
            cache.checked(right)
    if keys is None:
        if damage:
            done.findings.append(Finding("index", f"{damage}; it is rebuilt when it is needed", damaged=False))
        done.findings += _around(cache, rows, files)
    return done


def _subset(text: str, wanted: Sequence[str], rows: dict[str, EntryRow]) -> list[str]:
    """Return a part of the keys: nth of t by key, or up to a share or a number of bytes, at least one entry."""
    part = re.fullmatch(r"(\d+)/(\d+)", text)
    if part:
        number, count = int(part[1]), int(part[2])
        if not 1 <= number <= count:
            raise UsageError(f"--subset {text}: there is no such part", hint="as 1/7 to 7/7")
        return [key for key in wanted if int(key, 16) % count == number - 1]
    sizes = {key: rows[key].nbytes if key in rows else 0 for key in wanted}
    share = parse_share(text)
    budget = sum(sizes.values()) * float(share[:-1]) / 100 if share.endswith("%") else parse_size(share)
    chosen = []
    for key in wanted:
        if budget <= 0:
            break
        chosen.append(key)
        budget -= sizes[key]
    return chosen


def _look(cache: Cache, key: str, pool: ThreadPoolExecutor, *, quick: bool) -> Finding | None:
    try:
        entry = cache.open(key)
    except CorruptEntryError as error:
        return Finding(key, error.message)
    except KeyNotFoundError as error:
        return Finding(key, error.message, damaged=False)
    except CacheError as error:
        return Finding(key, f"cannot be read: {error.message}", damaged=False)
    if key_of(entry.header.document) != key:
        return Finding(key, "its key document has another key")
    if not quick:
        for name, intact in zip(entry.header.slots, pool.map(entry.intact, entry.header.slots), strict=True):
            if not intact:
                return Finding(key, f"tensor {name!r} is not what was stored")
    return None


def _around(cache: Cache, rows: dict[str, EntryRow], files: set[str]) -> list[Finding]:
    """Return what is wrong with rows, pins, and what lies among the entries."""
    # what another process stored, or removed, since the files were listed is no finding
    lost = [key for key in sorted(rows.keys() - files) if _is_gone(cache.file_of(key))]
    still = {row.key for row in cache.rows()} if lost else set()
    found = [Finding(key, "in the index, but there is no file", damaged=False) for key in lost if key in still]
    found += [Finding(key, "pinned, but there is no file", damaged=False) for key in sorted(cache.pinned() - files) if _is_gone(cache.file_of(key))]
    pins = [path.name for path in files_in(cache.folder / "pins")]
    found += [Finding(f"pins/{name}", "is no key", damaged=False) for name in pins if not KEY.fullmatch(name)]
    entries = cache.folder / "entries"
    found += [Finding(f"entries/{path.relative_to(entries)}", "is no entry", damaged=False) for path in loose_files(cache.folder)]
    return found


def _is_gone(path: str) -> bool:
    """Return whether there is no such file; what cannot be told is not gone."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


# ---- repair ----


def repair(cache: Cache, *, dry_run: bool = False, threads: int = 2) -> tuple[Verified, Pruned, int]:
    """Quarantine what is damaged or no entry, remove dead writers' temp files and locks, rebuild the index.

    What only could not be read (a disk that failed once, no permission) stays where it is.

    Returns:
        What was wrong, what was removed, and the number of entries that are left.

    Raises:
        StoreReadOnlyError: the store cannot be written.
    """
    if cache.readonly and not dry_run:
        raise StoreReadOnlyError(f"the store {cache.root} is read-only")
    done = verify(cache, threads=threads)
    removed = Pruned(files=remove_stale(cache.folder / "tmp", dry_run=dry_run))
    if dry_run:
        return done, removed, len(cache)
    kept = set()  # a pin outlives the damage of its entry: whoever builds that again wants it pinned
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for finding in done.findings:
            # looked at once more: another process may have built it again since
            if finding.damaged and (again := _look(cache, finding.subject, pool, quick=False)) and again.damaged:
                cache.damaged(finding.subject, again.problem)
                kept.add(finding.subject)
    for path in loose_files(cache.folder):
        quarantine(path, cache.folder / "quarantine")
    pins = cache.folder / "pins"
    for path in files_in(pins):
        if not KEY.fullmatch(path.name) or (path.name not in kept and _is_gone(cache.file_of(path.name))):
            with contextlib.suppress(OSError):
                path.unlink()
    sync_folder(pins)
    remove_stale_locks(cache.folder / "locks")
    return done, removed, cache.rebuild_index()


# ---- prune ----


def prune(
    cache: Cache,
    *,
    max_size: int | None = None,
    max_age_s: float | None = None,
    keep_free: str | None = None,
    stale_source: bool = False,
    orphans: bool = False,
    dry_run: bool = False,
) -> Pruned:
    """Remove entries by limits; never a pinned one. Whoever has one mapped goes on reading it.

    Args:
        cache: the store.
        max_size: the store shall take at most so many bytes; the cache's own limits if nothing else is given.
        max_age_s: remove what was not used for so long.
        keep_free: share or bytes of the disk that shall be free.
        stale_source: remove entries whose source file is gone.
        orphans: remove the quarantine's files, and what lies among the entries and is none.
        dry_run: only say what would go.

    Raises:
        StoreReadOnlyError: the store cannot be written.
    """
    if cache.readonly and not dry_run:
        raise StoreReadOnlyError(f"the store {cache.root} is read-only")
    pinned, found = cache.pinned(), Pruned()
    stale = remove_stale(cache.folder / "tmp", dry_run=True)
    found.freed = freed_nbytes(path for path, _ in stale)
    found.files = stale if dry_run else remove_stale(cache.folder / "tmp")
    if not dry_run:
        remove_stale_locks(cache.folder / "locks")
    if orphans:
        _remove_files(found, [*files_in(cache.folder / "quarantine"), *loose_files(cache.folder)], dry_run=dry_run)
    rows = cache.entries()
    chosen: dict[str, EntryRow] = {}
    if max_age_s is not None or stale_source:
        for row in rows:
            old = max_age_s is not None and time.time() - row.used_s > max_age_s
            gone = stale_source and bool(row.source_path) and _is_gone(_source_path(cache, row))
            if (old or gone) and row.key not in pinned:
                chosen[row.key] = row
    if max_size is None and max_age_s is None and keep_free is None and not stale_source and not orphans:
        max_size, keep_free = cache.max_size, cache.keep_free
    if max_size is not None or keep_free is not None:
        size, share = 1 << 62 if max_size is None else max_size, "0" if keep_free is None else parse_share(keep_free)
        over = cache.over_limits(0, max_size=size, keep_free=share)
        if dry_run:
            over -= sum(nbytes for _, nbytes in found.files)
        if over > 0 and not orphans:  # what nobody can use goes before what somebody may
            before = found.nbytes
            nothing: dict[str, tuple[int, int]] = {}
            strays = any(nbytes for _, nbytes in cache.index.call(lambda index: index.shards(), nothing).values())
            loose = loose_files(cache.folder) if strays else []  # a hundred thousand names take a while to read
            _remove_files(found, [*files_in(cache.folder / "quarantine"), *loose], dry_run=dry_run)
            over -= found.nbytes - before
        short = over - sum(row.nbytes for row in chosen.values())
        left = [row for row in rows if row.key not in chosen]
        for row in policies.choose(left, short, cache.policy, pinned):
            chosen[row.key] = row
    return _remove(cache, found, list(chosen.values()), dry_run=dry_run, spare_pinned=True)


def _source_path(cache: Cache, row: EntryRow) -> str:
    """Return the path of an entry's source; that of a name that is not UTF-8 stands in the entry only."""
    if "\\" in row.source_path:
        with contextlib.suppress(CacheError):
            return str(cache.open(row.key).header.built.get("path", row.source_path))
    return row.source_path


def _remove_files(found: Pruned, paths: Iterable[Path], *, dry_run: bool) -> None:
    """Remove files, and folders with all that is in them, that are no entries."""
    for path in paths:
        with contextlib.suppress(OSError):
            is_folder = path.is_dir() and not path.is_symlink()
            inner = [file for file in path.rglob("*") if file.is_file()] if is_folder else [path]
            nbytes, freed = sum(os.lstat(file).st_size for file in inner), freed_nbytes(inner)
            if not dry_run:
                shutil.rmtree(path) if is_folder else path.unlink()
            found.files.append((path, nbytes))
            found.freed += freed


def remove(cache: Cache, rows: Sequence[EntryRow], *, dry_run: bool = False) -> Pruned:
    """Remove entries that somebody named, pinned ones too.

    Raises:
        StoreReadOnlyError, CacheError: none of them could be removed.
    """
    found = _remove(cache, Pruned(), list(rows), dry_run=dry_run)
    if not dry_run:
        for row in found.entries:
            cache.drop_pin(row.key)
    return found


def _remove(cache: Cache, found: Pruned, rows: list[EntryRow], *, dry_run: bool, spare_pinned: bool = False) -> Pruned:
    """Remove entries, or say what that would free; what cannot be removed does not end it."""
    paths = [cache.file_of(row.key) for row in rows]
    if dry_run:
        found.entries = rows
        found.freed += freed_nbytes(paths)
        return found
    failed: list[CacheError] = []
    gone = []
    freed = freed_nbytes(paths)
    for row, path in zip(rows, paths, strict=True):
        if spare_pinned and cache.is_pinned(row.key):  # by now
            freed -= freed_nbytes([path])
            continue
        try:
            cache.remove(row.key)
        except CacheError as error:
            failed.append(error)
            freed -= freed_nbytes([path])
        else:
            gone.append(row)
    found.entries = gone
    found.freed += max(0, freed)
    cache.tally(evicted=len(gone), bytes_evicted=sum(row.nbytes for row in gone))
    cache.flush()
    if failed and not gone:
        raise failed[0]
    found.failed = [error.message for error in failed]
    return found


def clear(cache: Cache, *, pinned_too: bool = False, dry_run: bool = False) -> Pruned:
    """Remove all entries, quarantine and dead temp files; pinned entries only if asked.

    Raises:
        StoreReadOnlyError: the store cannot be written.
    """
    found = prune(cache, max_size=1 << 62, orphans=True, dry_run=dry_run)
    keep = set() if pinned_too else cache.pinned()
    rows = [row for row in cache.entries() if row.key not in keep]
    known = {row.key for row in rows} | keep
    for path in cache.entry_files():  # what has no row is no entry: its header cannot be read
        if path.stem not in known:
            with contextlib.suppress(OSError):
                found.files.append((path, path.stat().st_size))
                found.freed += freed_nbytes([path])
                if not dry_run:
                    path.unlink()
    found = _remove(cache, found, rows, dry_run=dry_run, spare_pinned=not pinned_too)
    if not dry_run and pinned_too:
        for row in found.entries:
            cache.drop_pin(row.key)
    return found
