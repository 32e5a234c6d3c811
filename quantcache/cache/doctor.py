"""Own what a store needs of a machine, tried out: its folder, permissions, file system, locks, room. Changes nothing that stays."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantcache.cache import locks
from quantcache.cache.filesystem import PRIVATE, allocate, filesystem_type, is_network, locks_work, sync_folder
from quantcache.cache.settings import parse_size
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, LockTimeoutError, NoCacheError

__all__ = ["Check", "check_store"]


@dataclass(frozen=True, slots=True)
class Check:
    """Say how one thing is.

    Args:
        name: of it.
        state: "ok", "warn" (works, but something is lost) or "fail".
        found: in words.
        hint: what to do.
    """

    name: str
    state: str
    found: str
    hint: str = ""


def check_store(root: Path, *, shared: bool = False) -> Iterator[Check]:
    """Try out what a store in a folder would need.

    Args:
        root: of the store; need not be there.
        shared: by a group.
    """
    cache: Cache | None = None
    try:
        cache = Cache(root, create=False, shared=shared)
    except NoCacheError:
        yield Check("store", "ok", f"none yet in {root}", "quantcache warm PATH makes one")
    except OSError as error:
        yield Check("store", "fail", f"{root}: {error.strerror}", "choose another folder: --cache-dir or QUANTCACHE_DIR")
        return
    except CacheError as error:
        yield Check("store", "fail", error.message, error.hint or "")
        return
    if cache is not None:
        with cache:
            problem = cache.index.check()  # before a query makes a damaged one anew
            yield Check("store", "ok", f"{root}: {len(cache.entry_files())} entries")
            yield Check("index", "warn" if problem else "ok", problem or "sound", "quantcache repair" if problem else "")
    place = next(path for path in (cache.folder if cache else root, *root.parents, Path(root.anchor or ".")) if os.path.exists(path))
    yield from _check_owner(place)
    if not os.access(place, os.W_OK):
        hint = "choose another folder: --cache-dir or QUANTCACHE_DIR"
        if cache:
            yield Check("writing", "warn", f"{place} cannot be written: hits work, nothing is stored", hint)
        else:
            yield Check("writing", "fail", f"{place} cannot be written: no store can be made", hint)
    else:
        yield from _try_out(place)
    yield from _check_room(place, cache)


def _check_owner(place: Path) -> Iterator[Check]:
    found = place.stat()
    mode = stat.S_IMODE(found.st_mode)
    kind = filesystem_type(place) or "unknown"
    if is_network(place):
        yield Check("file system", "warn", f"{kind}, over a network: the index goes without write-ahead log", "a local folder is faster: --cache-dir")
    else:
        yield Check("file system", "ok", kind)
    who = "you" if hasattr(os, "getuid") and found.st_uid == os.getuid() else f"user {getattr(found, 'st_uid', '?')}"
    yield Check("permissions", "ok", f"{place} belongs to {who}, mode {mode:o}")


def _try_out(place: Path) -> Iterator[Check]:
    """Write, reserve, sync, rename and lock a small file, as a publication does."""
    working = locks_work(place)
    path = place / f".doctor-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            allocate(descriptor, 1 << 16)
            os.pwrite(descriptor, b"x" * 4096, 0)
            os.fsync(descriptor)
            renamed = path.with_name(f"{path.name}.renamed")
            os.rename(path, renamed)
            path = renamed
            sync_folder(place)
            exclusive = _is_exclusive(path) if working else None
        finally:
            os.close(descriptor)
    except OSError as error:
        yield Check("writing", "fail", f"a file in {place} could not be written, synced and renamed: {error.strerror}", "choose another folder: --cache-dir")
        return
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    yield Check("writing", "ok", "a file was reserved, written, synced and renamed")
    if working is False:
        yield Check("locks", "warn", "the file system has none: several processes may build the same entry, and the index stays in memory",
                    "a local folder has them: --cache-dir")  # fmt: skip
    elif exclusive is False:
        yield Check("locks", "warn", "the file system grants a lock twice: several processes may build the same entry", "a local folder does not: --cache-dir")
    else:
        yield Check("locks", "ok", "a lock is granted once")


def _is_exclusive(path: Path) -> bool:
    """Return whether a file that is locked through one descriptor is locked for another."""
    try:
        first = locks.acquire(str(path), access=PRIVATE, timeout_s=0)
    except (OSError, LockTimeoutError):
        return True
    try:
        locks.acquire(str(path), access=PRIVATE, timeout_s=0).release()
    except LockTimeoutError:
        return True
    finally:
        first.release()
    return False


def _check_room(place: Path, cache: Cache | None) -> Iterator[Check]:
    disk = shutil.disk_usage(place)
    share = cache.keep_free if cache else "5%"
    wanted = int(disk.total * float(share[:-1]) / 100) if share.endswith("%") else parse_size(share)
    found = f"{disk.free / 1e9:.1f} GB free, {wanted / 1e9:.1f} GB of them to be kept free ({share})"
    if disk.free <= wanted:
        yield Check("room", "warn", f"{found}: nothing new is stored", "quantcache prune, make room, or lower keep_free")
    else:
        yield Check("room", "ok", found)
