"""Own what becomes of mapped bytes whose file cannot be trusted any more, or not yet: they stay what they were, where they are.

A sync that fails may leave pages that are clean and were never written: the system may drop them, and read something else back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from quantcache.errors import CacheError

if TYPE_CHECKING:
    from quantcache.cache.blobs import StoredEntry

__all__ = ["Early", "keep"]

_MREMAP_MAYMOVE, _MREMAP_FIXED, _MADV_POPULATE_READ = 1, 2, 22
_FAILED = ctypes.c_void_p(-1).value


def keep(mapped: mmap.mmap) -> bool:
    """Put a copy of mapped bytes where they are mapped: views of them are of this process's own memory then.

    Returns:
        Whether that could be done: on Linux, while there is memory.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc, nbytes = ctypes.CDLL(None, use_errno=True), len(mapped)
    whole = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = _address(mapped)
    copy = libc.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if copy in (None, _FAILED):
        return False
    if libc.madvise(address, nbytes, _MADV_POPULATE_READ) != 0 and ctypes.get_errno() in (errno.EIO, errno.EFAULT):  # to touch it would kill
        libc.munmap(copy, whole)
        return False
    ctypes.memmove(copy, address, nbytes)
    # at once for all threads: who reads meanwhile finds the old pages or the new ones
    if libc.mprotect(copy, whole, mmap.PROT_READ) != 0 or libc.mremap(copy, whole, whole, _MREMAP_MAYMOVE | _MREMAP_FIXED, address) != address:
        libc.munmap(copy, whole)
        return False
    return True


def _address(mapped: mmap.mmap) -> int:
    """Return where a map begins."""
    found = (ctypes.c_void_p * 16)()  # a Py_buffer, which begins with it
    get, release = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
    get.argtypes, release.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int], [ctypes.c_void_p]
    get(mapped, found, 0)
    release(found)
    address: int | None = found[0]
    assert address is not None
    return address


class Early:
    """Watch an entry that somebody has who did not wait until it was durable, for as long as its builder is at it.

    Args:
        entry: the entry.
        built: waits until its builder is done, however that ends.
        complain: called with what went wrong.
    """

    def __init__(self, entry: StoredEntry, built: Callable[[], None], complain: Callable[[str], None]) -> None:
        self._entry, self._built, self._complain = entry, built, complain
        #: whether it is in the store; None before that is settled
        self.stored: bool | None = None
        self._thread = threading.Thread(target=self._watch, name="quantcache-settle", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads here
            self._watch()

    def _watch(self) -> None:
        with contextlib.suppress(CacheError, OSError):
            self._built()
        self.stored = self._entry.stands()
        if not self.stored and (lost := self._entry.keep()):
            self._complain(f"the disk failed under an entry that was not stored yet: {lost[0]!r} is not what it was any more")

    def settle(self) -> None:
        """Wait until its builder is done with it."""
        if self._thread.ident is not None:
            self._thread.join()
