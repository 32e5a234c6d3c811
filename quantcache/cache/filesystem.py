"""Own the calls to the operating system that a store needs and Python does not name. Knows no entry."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from quantcache.errors import CacheError

__all__ = ["allocate", "filesystem_type", "is_network", "make_private", "sync_folder", "tree_nbytes"]

_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs")


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


def make_private(root: Path, *, shared: bool) -> None:
    """Create a folder for one user (0700), and refuse one that belongs to somebody else.

    Raises:
        CacheError: owned by another user, or writable by everybody.
        OSError: it cannot be created.
    """
    if not root.is_dir():
        root.mkdir(mode=0o770 if shared else 0o700, parents=True, exist_ok=True)
    found = root.stat()
    if shared or not hasattr(os, "getuid"):
        return
    if found.st_uid not in (os.getuid(), 0):
        raise CacheError(
            f"the store {root} belongs to user {found.st_uid}, not to you",
            hint="choose another folder with --cache-dir or QUANTCACHE_DIR, or use --shared if you trust its owner",
        )
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise CacheError(f"everybody may write to the store {root}", hint=f"chmod 700 {root}, or use --shared")


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
