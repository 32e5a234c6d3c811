"""Own verify, prune and repair: what looks after a store. Never touches a source, never blesses damage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from quantcache.cache import policy as policies
from quantcache.cache.blobs import remove_stale
from quantcache.cache.index import EntryRow
from quantcache.cache.settings import parse_share
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, CorruptEntryError, KeyNotFoundError, StoreReadOnlyError

__all__ = ["Finding", "Pruned", "clear", "prune", "repair", "verify"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Say what is wrong with an entry."""

    key: str
    problem: str


@dataclass(slots=True)
class Pruned:
    """Say what was removed, or would be: keys and temp files with their bytes."""

    entries: list[EntryRow] = field(default_factory=list)
    files: list[tuple[Path, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(row.nbytes for row in self.entries) + sum(nbytes for _, nbytes in self.files)


def verify(cache: Cache, keys: Iterable[str] | None = None, *, quick: bool = False, threads: int = 2) -> tuple[int, list[Finding]]:
    """Check entries: header, length, key and, unless quick, every digest.

    Args:
        cache: the store.
        keys: which; all files if None, rows or not.
        quick: leave the digests out.
        threads: how many digests at once.

    Returns:
        The number of entries looked at, and what is wrong.
    """
    wanted = [path.stem for path in cache.entry_files()] if keys is None else list(keys)
    findings = []
    for key in wanted:
        problem = _problem(cache, key, quick=quick, threads=threads)
        if problem:
            findings.append(Finding(key, problem))
        elif not quick:
            cache.checked(key)
    if keys is None:
        present = set(wanted)
        nothing: list[EntryRow] = []
        rows = cache.index.call(lambda index: index.entries(), nothing)
        findings += [Finding(row.key, "in the index, but there is no file") for row in rows if row.key not in present]
        findings += [Finding(key, "pinned, but there is no file") for key in sorted(cache.pinned() - present)]
    return len(wanted), findings


def _problem(cache: Cache, key: str, *, quick: bool, threads: int) -> str | None:
    from quantcache.cache.key import key_of

    try:
        entry = cache.open(key)
    except (CorruptEntryError, KeyNotFoundError) as error:
        return error.message
    except CacheError as error:
        return f"cannot be read: {error.message}"
    if key_of(entry.header.document) != key:
        return "its key document has another key"
    if quick:
        return None
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for name, intact in zip(entry.header.slots, pool.map(entry.intact, entry.header.slots), strict=True):
            if not intact:
                return f"tensor {name!r} is not what was stored"
    return None


def repair(cache: Cache, *, dry_run: bool = False, threads: int = 2) -> tuple[list[Finding], Pruned, int]:
    """Quarantine what is damaged, remove dead writers' temp files, rebuild the index.

    Returns:
        What was wrong, what was removed, and the number of entries that are left.

    Raises:
        StoreReadOnlyError: the store cannot be written.
    """
    if cache.readonly and not dry_run:
        raise StoreReadOnlyError(f"the store {cache.root} is read-only")
    _, findings = verify(cache, threads=threads)
    removed = Pruned(files=remove_stale(cache.folder / "tmp", dry_run=dry_run))
    if dry_run:
        return findings, removed, len(cache.entries())
    for finding in findings:
        if cache.path_of(finding.key).exists():
            cache.damaged(finding.key, finding.problem)
        elif finding.key in cache.pinned():
            with contextlib.suppress(OSError):
                (cache.folder / "pins" / finding.key).unlink()
    return findings, removed, cache.rebuild_index()


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
        max_size: the store shall take at most so many bytes; the cache's own limit if nothing else is given.
        max_age_s: remove what was not used for so long.
        keep_free: share or bytes of the disk that shall be free.
        stale_source: remove entries whose source file is gone.
        orphans: remove the quarantine's files.
        dry_run: only say what would go.

    Raises:
        StoreReadOnlyError: the store cannot be written.
    """
    if cache.readonly and not dry_run:
        raise StoreReadOnlyError(f"the store {cache.root} is read-only")
    pinned, found = cache.pinned(), Pruned(files=remove_stale(cache.folder / "tmp", dry_run=dry_run))
    if orphans:
        for path in sorted((cache.folder / "quarantine").glob("*")):
            with contextlib.suppress(OSError):
                found.files.append((path, path.stat().st_size))
                if not dry_run:
                    path.unlink()
    rows = {row.key: row for row in cache.entries()}
    chosen: dict[str, EntryRow] = {}
    for row in rows.values():
        old = max_age_s is not None and time.time() - row.used_s > max_age_s
        gone = stale_source and bool(row.source_path) and not Path(row.source_path).exists()
        if (old or gone) and row.key not in pinned:
            chosen[row.key] = row
    if max_size is None and max_age_s is None and keep_free is None and not stale_source and not orphans:
        max_size = cache.max_size
    if max_size is not None or keep_free is not None:
        over = cache.over_limits(
            0, max_size=1 << 62 if max_size is None else max_size, keep_free="0" if keep_free is None else parse_share(keep_free)
        )
        short = over - sum(row.nbytes for row in chosen.values())
        left = [row for row in rows.values() if row.key not in chosen]
        for row in policies.choose(left, short, cache.policy, pinned):
            chosen[row.key] = row
    found.entries = list(chosen.values())
    if not dry_run:
        for row in found.entries:
            cache.remove(row.key)
        cache.tally(evicted=len(found.entries), bytes_evicted=sum(row.nbytes for row in found.entries))
        cache.flush()
    return found


def clear(cache: Cache, *, pinned_too: bool = False, dry_run: bool = False) -> Pruned:
    """Remove all entries, quarantine and dead temp files; pinned entries only if asked.

    Raises:
        StoreReadOnlyError: the store cannot be written.
    """
    found = prune(cache, max_size=1 << 62, orphans=True, dry_run=dry_run)
    keep = set() if pinned_too else cache.pinned()
    found.entries = [row for row in cache.entries() if row.key not in keep]
    known = {row.key for row in found.entries} | keep
    found.files += [(path, path.stat().st_size) for path in cache.entry_files() if path.stem not in known]
    if not dry_run:
        for key in [path.stem for path in cache.entry_files() if path.stem not in keep]:
            cache.remove(key)
        for row in found.entries:
            with contextlib.suppress(OSError):
                (cache.folder / "pins" / row.key).unlink(missing_ok=True)
    return found
