"""Own the locks that builds take: one file a name, held for as long as its descriptor is open. Knows no entry.

Source: docs/decisions/0008-locks.md, for why this is not filelock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable

from quantcache.cache.filesystem import Access
from quantcache.errors import LockTimeoutError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Lock", "acquire"]

#: How often a lock is asked for: a thousand waiters would cost a core then.
_POLL_S = 0.004
#: Bytes of an announcement, at most.
_ANNOUNCED = 256


class Lock:
    """Hold a lock, or nothing.

    Args:
        descriptor: of the locked file.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._held, self._process = [] if descriptor is None else [descriptor], os.getpid()
        self._guard = threading.Lock()

    def announce(self, text: str) -> None:
        """Tell those that wait for it something, before it is given back; they may never hear of it."""
        with self._guard, contextlib.suppress(OSError):
            for descriptor in self._held:
                os.pwrite(descriptor, f"{text}\n".encode(), 0)

    def release(self) -> None:
        """Give it back, from any thread, once or often; that cannot fail."""
        with self._guard:
            while self._held:
                descriptor = self._held.pop()
                if self._process == os.getpid():  # a child of fork that still has it open would hold it; and must not give it back itself
                    with contextlib.suppress(OSError):
                        fcntl.flock(descriptor, fcntl.LOCK_UN)
                with contextlib.suppress(OSError):  # closing gives the lock back, whatever it says
                    os.close(descriptor)


def acquire(path: str, *, access: Access, timeout_s: float | None, done: Callable[[str], bool] = lambda _: False) -> Lock:
    """Wait for a lock, or until whoever had it has done what it is wanted for.

    Args:
        path: of its file, which is made and stays.
        access: of the file.
        timeout_s: None waits.
        done: asked once nobody holds the lock any more, by all that wait at the same time, rather than one after the other;
            and with what its holder announces, before that.

    Returns:
        What holds it; nothing, if `done` said so.

    Raises:
        LockTimeoutError: another process held it for too long.
        OSError: the file system has no locks, or the file cannot be opened.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no file locks on this system")
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), access.file_mode)
        try:
            if access.shared:
                with contextlib.suppress(PermissionError):  # another member made it
                    os.fchmod(descriptor, access.file_mode)
            if not _wait(descriptor, until_s, timeout_s, done):
                os.close(descriptor)
                return Lock()
            # somebody may have removed the file before it was locked: the lock of another one is nobody's
            if _same_file(descriptor, path):
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)  # what the last one announced
                return Lock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _wait(descriptor: int, until_s: float | None, timeout_s: float | None, done: Callable[[str], bool]) -> bool:
    """Return whether the lock is held; False if it is not needed.

    All that wait look at the same time, with a shared lock, once for each holder; then one of them gets it.
    """
    if _try(descriptor, fcntl.LOCK_EX):
        return True
    looked, heard = False, ""
    while until_s is None or time.monotonic() < until_s:
        time.sleep(_POLL_S * random.uniform(0.5, 1.5))  # noqa: S311 - or those that share it would keep each other from having it
        shared = not looked and _try(descriptor, fcntl.LOCK_SH)
        if shared and done(""):
            return False
        looked = looked or shared
        if looked and _try(descriptor, fcntl.LOCK_EX):
            return True
        looked = looked and _try(descriptor, fcntl.LOCK_SH)  # another holder: what it does is to be looked for again
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        if not looked and (announced := _announced(descriptor)) != heard:
            heard = announced
            if heard and done(heard):
                return False
    raise LockTimeoutError(f"another process has been building this entry for over {timeout_s} s", hint="wait for it, or raise --lock-timeout")


def _announced(descriptor: int) -> str:
    """Return what the holder of a lock has announced; "" if that is nothing, or not all of it yet."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = os.pread(descriptor, _ANNOUNCED, 0).decode()
        return text[:-1] if text.endswith("\n") else ""
    return ""


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(descriptor: int, path: str) -> bool:
    try:
        mine, there = os.fstat(descriptor), os.stat(path)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
