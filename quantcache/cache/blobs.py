"""Own entry files on disk: stage, reserve, write, fsync, rename; open and check; quarantine; stale temp files.

A staged file holds a lock on itself for as long as its writer lives, so that anybody can tell a dead writer's file.
Knows the container's format, no index and no policy.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantcache.cache.container import (
    ALIGNMENT,
    MAX_HEADER,
    EntryHeader,
    Slot,
    arrange,
    build_header,
    parse_header,
    reserve_header,
    slot_digest,
)
from quantcache.cache.filesystem import PRIVATE, Access, allocate, files_in, make_folders, sync_folder
from quantcache.cache.key import DIGEST_NBYTES, combine, digest
from quantcache.errors import CacheError, CorruptEntryError, StoreReadOnlyError
from quantcache.memory import HEAD, keep
from quantcache.trace import span

try:
    import fcntl
except ImportError:  # Windows: stale files are told by their age alone
    fcntl = None  # type: ignore[assignment]

__all__ = ["Reader", "StagedEntry", "StoredEntry", "quarantine", "remove_stale", "remove_stale_locks", "staged_path", "store_error"]

#: What a staged file grows by at least, once a tensor needs more room than was planned; it is sparse.
_EXTENSION = 64 << 20
_STALE_S = 24 * 3600.0
#: What stands for the digest of a piece that was not written.
_UNWRITTEN = bytes(DIGEST_NBYTES)
#: A map starts at a multiple of this: 4 KiB on most machines, 16 or 64 KiB on some arm64 ones.
_MAP_ALIGNMENT = max(ALIGNMENT, mmap.ALLOCATIONGRANULARITY)


def store_error(action: str, error: OSError) -> CacheError:
    """Turn an operating-system error into the store's own, with the hint that helps."""
    text = f"{action}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CacheError(text, hint="make room (quantcache prune --max-size ...) or choose another --cache-dir")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreReadOnlyError(text, hint="choose a folder that you may write to: --cache-dir or QUANTCACHE_DIR")
    return CacheError(text)


class StagedEntry:
    """Write one entry into a temp file, tile by tile, from several threads; then publish it whole.

    Args:
        folder: the store's `tmp/`.
        slots: the tensors as planned, by key; those that are alike may share one.
        records_nbytes: what is said of them will take; see reserve_header.
        access: of the file, and of the folder that it is moved to.

    Raises:
        CacheError: the file cannot be created, or the space is not there.
    """

    def __init__(self, folder: Path, slots: Mapping[str, Slot], records_nbytes: int = 0, access: Access = PRIVATE) -> None:
        self._access = access
        self.slots = dict(slots)
        self._lock = threading.Lock()
        #: of the pieces of tensors of which any was written, one behind the other: bytes if all were written at once, else zeros for those that were not
        self._digests: dict[str, bytes | bytearray] = {}
        self._header_nbytes = reserve_header(self.slots, records_nbytes=records_nbytes)
        self.offsets, self._end = arrange(self.slots, self._header_nbytes)
        self._rearrange = False
        self._path = _temp_path(folder)
        #: mappings of what lies behind the first plan's end, with where each starts
        self._maps: list[tuple[int, memoryview]] = []
        self._length = self._end
        self._gone = False
        self._second: Path | None = None
        try:
            self._descriptor = _create(self._path, access)
        except OSError as error:
            raise store_error(f"cannot create a file in {folder}", error) from error
        try:
            allocate(self._descriptor, self._end)
            self._main, self._main_nbytes = mmap.mmap(self._descriptor, self._end, access=mmap.ACCESS_READ), self._end
        except OSError as error:
            self.discard()
            raise store_error(f"cannot reserve {self._end} bytes in {folder}", error) from error
        except BaseException:
            self.discard()
            raise

    @property
    def nbytes(self) -> int:
        """Length of the file as planned."""
        return self._end

    def replace(self, old: Iterable[str], new: Mapping[str, Slot]) -> None:
        """Plan a tensor anew, once its values turned out not to fit the plan; the file is rearranged when published.

        Raises:
            CacheError: there is no room; nothing is changed then.
        """
        with self._lock:
            end, placed = self._end, dict[str, int]()
            for key, slot in new.items():
                placed[key] = -(-end // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
                end = placed[key] + slot.nbytes
            if end > self._length:
                # by more than is needed: every mapping takes a descriptor, and one should do for many tensors
                length = end + max(_EXTENSION, end - self._main_nbytes)
                try:
                    os.ftruncate(self._descriptor, length)
                except OSError as error:  # all is as it was: the next tensor is not to believe that there is room
                    raise store_error("cannot extend the staged file", error) from error
                self._length = length
            for key in old:
                del self.slots[key], self.offsets[key]
                self._digests.pop(key, None)
            self.slots |= new
            self.offsets |= placed
            self._end, self._rearrange = end, True

    def write(self, key: str, position: int, buffer: Any, found: bytes = b"") -> None:
        """Write one piece of a tensor and remember its digest.

        Args:
            key: which tensor.
            position: first byte in the tensor, a multiple of the slot's chunk.
            buffer: contiguous bytes, at most one chunk.
            found: their digest, if the caller has taken it.

        Raises:
            CacheError: the disk refused.
        """
        view = memoryview(buffer).cast("B")
        descriptor, start = self.place(key, position)
        try:
            _write_all(descriptor, view, start)
        except OSError as error:
            raise self.refused(error) from error
        if len(view):
            self.wrote(key, position, [found or digest(view)])

    def place(self, key: str, position: int) -> tuple[int, int]:
        """Return descriptor and place of a piece, for those who write it themselves; `wrote` or `refused` must follow.

        Raises:
            CacheError: the file was closed.
        """
        if self._descriptor < 0:
            raise CacheError("the staged file is closed")
        return self._descriptor, self.offsets[key] + position

    def wrote(self, key: str, position: int, found: Sequence[bytes]) -> None:
        """Remember the digests of pieces that were written, one behind the other."""
        slot, together = self.slots[key], b"".join(found)
        first = DIGEST_NBYTES * (position // slot.chunk)
        with self._lock:
            if not first and len(found) == slot.chunks:
                self._digests[key] = together
                return
            digests = self._digests.get(key, bytes(DIGEST_NBYTES * slot.chunks))
            if isinstance(digests, bytes):
                digests = self._digests[key] = bytearray(digests)
            digests[first : first + len(together)] = together  # what is beyond the end makes it longer, and is found by that

    def refused(self, error: OSError) -> CacheError:
        """Return what it means that a piece could not be written."""
        return store_error("cannot write the staged file", error)

    def where(self, key: str) -> tuple[mmap.mmap | memoryview, int]:
        """Return what a finished tensor's bytes lie in, mapped read-only, and the first; valid after publishing and discarding, too."""
        slot, start = self.slots[key], self.offsets[key]
        if start + slot.nbytes <= self._main_nbytes:
            return self._main, start
        with self._lock:
            for first, mapped in self._maps:
                if first <= start and start + slot.nbytes <= first + len(mapped):
                    return mapped, start - first
            if self._descriptor < 0:
                raise CacheError(f"tensor {key!r} of the staged file is not mapped any more")
            first = start // _MAP_ALIGNMENT * _MAP_ALIGNMENT
            try:
                made = memoryview(mmap.mmap(self._descriptor, self._length - first, access=mmap.ACCESS_READ, offset=first))
            except OSError as error:
                raise store_error("cannot map the staged file", error) from error
            self._maps.append((first, made))
            return made, start - first

    def publish(
        self, target: Path, *, document: Any, records: Any, built: Mapping[str, Any], announce: Callable[[str], None] = lambda _: None
    ) -> int:
        """Make the entry visible and durable: header, fsync, rename, fsync of the folder.

        Args:
            target: its path in `entries/`.
            document, records, built: see the container.
            announce: called with the name of the file in its folder once it is whole, and not durable yet.

        Returns:
            Length of the file.

        Raises:
            CacheError: a tensor is incomplete, or the disk refused; nothing is visible then.
        """
        self._map_replaced()
        missing, digests = list[str](), dict[str, str]()
        for key, slot in self.slots.items():
            pieces = self._pieces(key, slot)
            if pieces is None:
                missing.append(key)
            else:
                digests[key] = combine(pieces)
        if missing:
            raise CacheError(f"{len(missing)} tensors were not written completely, the first is {missing[0]!r}")
        details = {"document": document, "records": records, "built": built}
        try:
            header = None
            if not self._rearrange:
                with contextlib.suppress(ValueError):  # records grew beyond the slack
                    header = build_header(self.slots, digests, length=self._header_nbytes, **details)
            if header is None:
                header = self._rewrite(build_header(self.slots, digests, **details))
            _write_all(self._descriptor, memoryview(header), 0)
            announce(self._path.name)
            self._sync()
            nbytes = os.fstat(self._descriptor).st_size
            make_folders(target.parent.parent, [target.parent.name], self._access)
            self._still_wanted()
            os.rename(self._path, target)
            try:
                sync_folder(target.parent)
            except OSError:
                target.unlink(missing_ok=True)  # not durable is not published
                raise
        except OSError as error:
            raise store_error("cannot publish the entry", error) from error
        self._close()
        return nbytes

    def _pieces(self, key: str, slot: Slot) -> bytes | None:
        """Return the digests of a tensor's pieces, one behind the other; None if one is missing."""
        found = self._digests.get(key, b"")
        if len(found) != DIGEST_NBYTES * slot.chunks:
            return None
        if isinstance(found, bytes):
            return found
        pieces = bytes(found)
        return None if _UNWRITTEN in (pieces[at : at + DIGEST_NBYTES] for at in range(0, len(pieces), DIGEST_NBYTES)) else pieces

    def _sync(self) -> None:
        try:
            with span("sync", self._end):
                os.fsync(self._descriptor)
        except OSError:
            for mapped in (self._main, *(view.obj for _, view in self._maps)):
                if isinstance(mapped, mmap.mmap):
                    keep(mapped)
            raise

    def _rewrite(self, header: bytearray) -> bytearray:
        """Copy the tensors to where they belong, into a second file that takes this one's place."""
        offsets, data_nbytes = arrange(self.slots)
        path = self._second = _temp_path(self._path.parent)
        descriptor = _create(path, self._access)
        try:
            allocate(descriptor, len(header) + data_nbytes)
            for key, slot in self.slots.items():
                self._still_wanted()
                _copy(self._descriptor, self.offsets[key], descriptor, len(header) + offsets[key], slot.nbytes)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)
        self._descriptor, self._path = descriptor, path
        return header

    def _still_wanted(self) -> None:
        if self._gone:
            raise OSError(errno.ECANCELED, "the load was stopped")

    def _map_replaced(self) -> None:
        """Map what lies behind the first plan's end while the file that holds it is open: views outlive it."""
        if self._descriptor >= 0 and self._rearrange:
            for key in sorted((key for key, slot in self.slots.items() if slot.nbytes), key=lambda key: self.offsets[key]):
                self.where(key)

    def unlink(self) -> None:
        """Remove the file from its folder, whatever a thread is doing with it; it cannot be published any more."""
        self._gone = True
        for path in (self._path, self._second):
            with contextlib.suppress(OSError):
                if path is not None:
                    path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the file; views stay valid."""
        if hasattr(self, "_main"):
            with contextlib.suppress(CacheError, ValueError):
                self._map_replaced()
        self.unlink()
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


#: names of the files that this process stages: a number of a process does not tell them from those of a dead one
_MINE: set[str] = set()
#: what _temp_path makes
_TEMP_NAME = re.compile(r"\d+-[0-9a-f]{16}\.tmp")


def staged_path(folder: Path, name: str) -> Path | None:
    """Return the path of a staged file that somebody else has announced; None if that is no name of one."""
    return folder / name if _TEMP_NAME.fullmatch(name) else None


def _temp_path(folder: Path) -> Path:
    """Return a new name for a staged file of this process."""
    name = f"{os.getpid()}-{os.urandom(8).hex()}.tmp"
    _MINE.add(name)
    return folder / name


def _create(path: Path, access: Access) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), access.file_mode)
    if access.shared:  # whatever the umask
        os.fchmod(descriptor, access.file_mode)
    if fcntl:
        with contextlib.suppress(OSError):  # where locks do not work, age decides
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _write_all(descriptor: int, view: memoryview, start: int) -> None:
    """Write everything: a quota or a signal may cut one call short."""
    written = 0
    while written < len(view):
        written += os.pwrite(descriptor, view[written:], start + written)


def _copy(source: int, start: int, target: int, to: int, nbytes: int) -> None:
    """Copy a range between files, in the kernel where it can."""
    while nbytes > 0:
        try:
            done = os.copy_file_range(source, target, min(nbytes, 1 << 30), start, to)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            piece = os.pread(source, min(nbytes, 4 << 20), start)
            done = os.pwrite(target, piece, to)
        if done == 0:
            raise OSError(errno.EIO, "the staged file became shorter")
        start, to, nbytes = start + done, to + done, nbytes - done


class StoredEntry:
    """Map a published entry and check its header; its tensors are checked one by one.

    Args:
        key: the key.
        path: the entry file.
        shared: it may belong to another user.
        staged: where the file is, if it will only be moved to `path`.

    Raises:
        FileNotFoundError: there is none.
        CorruptEntryError: its header or length is wrong.
        StoreTooNewError: a newer version wrote it.
        CacheError: it cannot be read.
    """

    def __init__(self, key: str, path: Path, *, shared: bool = False, staged: Path | None = None) -> None:
        self.key, self.path = key, path
        try:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
            descriptor = os.open(staged or path, flags | getattr(os, "O_NONBLOCK", 0))  # a FIFO would wait for a writer
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CorruptEntryError(f"entry {key} is a symbolic link") from error
            raise store_error(f"cannot open entry {key}", error) from error
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise CorruptEntryError(f"entry {key} is no regular file")
            self._file = found.st_dev, found.st_ino
            if not shared and hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0):
                raise CacheError(f"entry {key} belongs to user {found.st_uid}", hint="remove it, or use --shared")
            head = os.pread(descriptor, HEAD, 0)
            length = int.from_bytes(head[:8], "little")
            if len(head) < 8 or length + 8 > found.st_size or length > MAX_HEADER:
                raise CorruptEntryError(f"entry {key}: the file is cut or its length is wrong")
            if length + 8 > len(head):
                head += os.pread(descriptor, 8 + length - len(head), len(head))
            self.header: EntryHeader = parse_header(head, found.st_size)
            self._map = mmap.mmap(descriptor, found.st_size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise store_error(f"cannot read entry {key}", error) from error
        finally:
            os.close(descriptor)
        self.memory = memoryview(self._map)

    def view(self, key: str) -> memoryview:
        """Return a tensor's bytes, unchecked."""
        start = self.header.offsets[key]
        return self.memory[start : start + self.header.slots[key].nbytes]

    def reader(self) -> Reader:
        """Return what reads the file by position, with a descriptor of its own."""
        return Reader(self.path, self._file)

    def replaced(self) -> bool:
        """Return whether the path leads to another file by now: somebody built the entry again."""
        return self._there() not in (None, self._file)

    def stands(self) -> bool:
        """Return whether the path leads to this file."""
        return self._there() == self._file

    def _there(self) -> tuple[int, int] | None:
        """Return what the path leads to now; None if there is nothing, or it cannot be told."""
        try:
            now = os.stat(self.path)
        except OSError:
            return None
        return now.st_dev, now.st_ino

    def keep(self) -> list[str]:
        """Make the bytes memory of this process, where they are; return the tensors that are not what was stored."""
        keep(self._map)
        return [key for key in self.header.slots if not self.intact(key)]

    def intact(self, key: str) -> bool:
        """Return whether a tensor's bytes have the digest that was recorded when they were made."""
        with span("verify", self.header.slots[key].nbytes, key):
            return self.matches(key)

    def matches(self, key: str) -> bool:
        """Return the same, for those who measure it themselves."""
        return slot_digest(self.memory, self.header.slots[key], self.header.offsets[key]) == self.header.digest_of(key)


class Reader:
    """Read a file by position. One serves all pieces, since the system reads ahead by the descriptor; it is closed when let go.

    Args:
        path: of the file.
        identity: its device and inode: where the path leads to another file by now, nothing is read.
    """

    def __init__(self, path: Path, identity: tuple[int, int]) -> None:
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0))
            found = os.fstat(self._descriptor)
            self._same = (found.st_dev, found.st_ino) == identity
        except OSError:  # removed, or no descriptor is left: whoever has mapped the file has it all the same
            self._same = False

    def read_into(self, position: int, buffer: memoryview) -> bool:
        """Fill a buffer; return False if the file cannot be had.

        Raises:
            OSError: the disk failed, or the file is shorter.
        """
        if not self._same:
            return False
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done:]], position + done)
            if count == 0:
                raise OSError(errno.EIO, "the entry became shorter")
            done += count
        return True

    def __del__(self) -> None:
        """Close the descriptor once nobody reads any more: closed under a reader, its number might be another file's."""
        if self._descriptor >= 0:
            os.close(self._descriptor)


def quarantine(path: Path, folder: Path) -> Path | None:
    """Move a file out of the way, under a name that no loader looks for.

    Returns:
        Where it is now, or None if it could not be moved (then it is still where it was).
    """
    target = folder / f"{path.name}.{int(time.time())}-{os.urandom(3).hex()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        os.rename(path, target)
    except OSError:
        return None
    return target


def remove_stale(folder: Path, *, dry_run: bool = False) -> list[tuple[Path, int]]:
    """Remove temp files whose writer is dead.

    A writer holds a lock on its file. Where locks always succeed, the process number in the name is asked too, and
    where that is taken by another process, a day without a write decides.

    Returns:
        (path, bytes) of each that was removed.
    """
    removed = []
    for path in files_in(folder, ".tmp"):
        if path.name in _MINE:  # a checkpoint of many files has many
            continue
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            continue
        try:
            found = os.fstat(descriptor)
            if not _abandoned(descriptor, path, found.st_mtime):
                continue
            if not dry_run:
                path.unlink(missing_ok=True)
            removed.append((path, found.st_size))
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return removed


def remove_stale_locks(folder: Path) -> None:
    """Remove lock files that nobody has held for a day; a waiter that had one open at that moment builds, too."""
    for path in files_in(folder, ".lock") if fcntl else []:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                if time.time() - os.fstat(descriptor).st_mtime > _STALE_S:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(descriptor)


def _abandoned(descriptor: int, path: Path, mtime_s: float) -> bool:
    if fcntl:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
    if time.time() - mtime_s > _STALE_S:
        return True
    owner = path.name.partition("-")[0]
    if not owner.isdigit():
        return False
    if int(owner) == os.getpid():
        return True  # a process of this number, but not this one: in containers all have the same
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
