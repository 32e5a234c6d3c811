"""Own the calls to the operating system that a store needs and Python does not name. Knows no entry."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quantcache.errors import CacheError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "PRIVATE",
    "SHARED",
    "Access",
    "allocate",
    "files_in",
    "filesystem_type",
    "freed_nbytes",
    "is_network",
    "locks_work",
    "make_folders",
    "prepare_root",
    "sync_folder",
    "tree_nbytes",
]

_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs")


@dataclass(frozen=True, slots=True)
class Access:
    """Say who may use what a store makes: modes of its files and folders."""

    file_mode: int
    folder_mode: int
    shared: bool = False


#: For one user.
PRIVATE = Access(0o600, 0o700)
#: For a group: what one member makes, the others may change; setgid hands the group on, whatever the umask.
SHARED = Access(0o660, 0o2770, shared=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; a file system that cannot is left as it is."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def allocate(descriptor: int, nbytes: int) -> None:
    """Reserve space, so that a full disk is found out before anything is written.

    Raises:
        OSError: there is not that much space.
    """
    if nbytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        else:
            return
    os.ftruncate(descriptor, nbytes)


def prepare_root(root: Path, folder: Path, *, shared: bool) -> Access:
    """Make the folder of a store, for one user unless it is to be shared, and refuse one of somebody else.

    A store that was made shared has a folder with setgid that its group may write: it stays shared without being asked.

    Args:
        root: of the store.
        folder: the version's, `<root>/v1`; not made here.
        shared: by the folder's group.

    Returns:
        Modes for what the store makes.

    Raises:
        CacheError: owned by another user, or writable by everybody.
        OSError: it cannot be created.
    """
    if not root.is_dir():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # somebody else made it in this very moment
            root.chmod((SHARED if shared else PRIVATE).folder_mode)
        sync_folder(root.parent)
    found = root.stat()
    if not hasattr(os, "getuid"):
        return PRIVATE
    group = stat.S_ISGID | stat.S_IWGRP
    if shared and found.st_uid == os.getuid() and found.st_mode & group != group:
        root.chmod(stat.S_IMODE(found.st_mode) | SHARED.folder_mode)
    elif found.st_mode & group == group and found.st_gid in (os.getegid(), *os.getgroups()):
        shared = True
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise CacheError(f"everybody may write to the store {root}", hint=f"chmod 700 {root}, or choose another folder with --cache-dir")
    for path in (root, folder):
        with contextlib.suppress(FileNotFoundError):
            owner = path.stat().st_uid
            if not shared and owner not in (os.getuid(), 0):
                raise CacheError(
                    f"the store {path} belongs to user {owner}, not to you",
                    hint="choose another folder with --cache-dir or QUANTCACHE_DIR, or use --shared if you trust its owner",
                )
    return SHARED if shared else PRIVATE


def make_folders(folder: Path, names: Iterable[str], access: Access) -> None:
    """Make folders that are not there, durably: what is put into one of them is lost with it otherwise.

    Args:
        folder: holds them.
        names: of them; "" is the folder itself.
        access: their mode, whatever the umask.

    Raises:
        OSError: one cannot be made.
    """
    made = False
    for name in names:
        path = folder / name
        try:
            path.mkdir(mode=access.folder_mode)
        except FileExistsError:
            continue
        made = True
        if access.shared:
            path.chmod(access.folder_mode)
    if made:
        sync_folder(folder)
        sync_folder(folder.parent)


def files_in(folder: Path, suffix: str = "") -> list[Path]:
    """Return what is directly in a folder, sorted; nothing if it cannot be read."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if name.endswith(suffix))
    except OSError:
        return []


def tree_nbytes(folder: Path) -> int:
    """Return the bytes of all files directly in a folder; 0 if it cannot be read."""
    total = 0
    try:
        with os.scandir(folder) as found:
            for item in found:
                try:
                    total += item.stat(follow_symlinks=False).st_size if item.is_file(follow_symlinks=False) else 0
                except OSError:
                    continue
    except OSError:
        return total
    return total


def freed_nbytes(paths: Iterable[str | Path]) -> int:
    """Return the bytes of the disk that come free if files are deleted.

    Holes are none; a file with a name elsewhere (a hard link) frees nothing, nor do blocks that another file shares (a
    reflink); several names of one file count once.
    """
    names: dict[tuple[int, int], int] = {}
    found: dict[tuple[int, int], tuple[str | Path, os.stat_result]] = {}
    for path in paths:
        try:
            stats = os.lstat(path)
        except OSError:
            continue
        inode = stats.st_dev, stats.st_ino
        names[inode] = names.get(inode, 0) + 1
        found[inode] = path, stats
    total = 0
    reflinks: dict[int, bool] = {}  # by device: a map of extents costs an open, and most file systems share no blocks
    for inode, (path, stats) in found.items():
        if names[inode] < stats.st_nlink:
            continue
        if stats.st_dev not in reflinks:
            reflinks[stats.st_dev] = filesystem_type(Path(path)) in _REFLINKS
        shared = _reflinked_nbytes(path) if reflinks[stats.st_dev] else 0
        total += max(0, getattr(stats, "st_blocks", -(-stats.st_size // 512)) * 512 - shared)
    return total


_REFLINKS = ("btrfs", "xfs", "bcachefs", "ocfs2", "f2fs", "nfs4", "cifs", "smb3", "")
_FIEMAP, _EXTENT_SHARED, _EXTENT_LAST, _EXTENTS = 0xC020660B, 0x2000, 0x1, 256


def _reflinked_nbytes(path: str | Path) -> int:
    """Return the bytes whose blocks another file shares, as the file system's map of extents tells; 0 if it has none."""
    head = struct.Struct("=QQLLLL")  # start, length, flags, extents mapped, room for extents, reserved
    extent = struct.Struct("=QQQQQLLLL")  # logical, physical, length, 2 reserved, flags, 3 reserved
    total = start = 0
    if fcntl is None:
        return 0
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        while True:
            request = array.array("B", head.pack(start, (1 << 64) - 1 - start, 0, 0, _EXTENTS, 0) + bytes(extent.size * _EXTENTS))
            fcntl.ioctl(descriptor, _FIEMAP, request)
            count = head.unpack_from(request)[3]
            for number in range(count):
                fields = extent.unpack_from(request, head.size + number * extent.size)
                total += fields[2] if fields[5] & _EXTENT_SHARED else 0
                start = fields[0] + fields[2]
                if fields[5] & _EXTENT_LAST:
                    return total
            if not count:
                return total
    except OSError:
        return 0
    finally:
        os.close(descriptor)


def filesystem_type(path: Path) -> str:
    """Return the type of the file system that a path lies on ("ext4"), or "" where that cannot be told."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        device = os.stat(path).st_dev
    except OSError:
        return ""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    kind = ""
    for line in mounts:
        fields = line.split()
        if len(fields) > 6 and fields[2] == wanted:
            kind = fields[fields.index("-") + 1]
    return kind


def is_network(path: Path) -> bool:
    """Return whether a path lies on a network file system, where shared memory and locks are not to be trusted."""
    kind = filesystem_type(path)
    return kind in _NETWORK or kind.startswith("fuse.")


def locks_work(folder: Path) -> bool | None:
    """Return whether the file system has the locks that SQLite and builds take; None if it could not be tried.

    A lock that is granted twice is not found out: nobody here counts on locks to be right, only on their absence to
    be told at once (SQLite would take the refusal for a busy neighbour and wait).
    """
    if fcntl is None:
        return True
    path = folder / f".lock-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()
    return True
