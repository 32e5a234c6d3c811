"""Own what the system is asked about mapped memory: to fault pages in, read them ahead, say whether they are cached, copy them where they are.

A touch of a page that cannot be read kills; which errors say so is known here, and in quant/calls.c for the calls made from there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import sys
from functools import cache
from typing import Any

__all__ = ["HEAD", "PAGE", "is_cached", "keep", "knows_cached", "pages", "populate", "will_need"]

PAGE = mmap.PAGESIZE
#: What of a file is read at once when it is opened, since a header stands there: a fault of a cold one reads as much around itself as
#: the disk's settings say, up to megabytes, and waits for all of it.
HEAD = 64 << 10
_MADV_POPULATE_READ = 22  # Linux 5.14; not yet a constant of the mmap module
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
#: beyond the end of the file, a bad sector, a page that the memory lost (EHWPOISON, which few versions of Python have a name for)
_UNREADABLE = (errno.EFAULT, errno.EIO, getattr(errno, "EHWPOISON", 133))
_FAILED = ctypes.c_void_p(-1).value


@cache
def _libc(name: str, last: type[Any], library: type[ctypes.CDLL] = ctypes.CDLL) -> Any:
    """Return madvise or mincore of libc, None off Linux: mmap's own madvise holds the GIL, and takes no address.

    Args:
        name: of the function, which takes an address, a length and one more.
        last: type of that one.
        library: ctypes.PyDLL for one that keeps the GIL, since it takes no longer than getting that back.
    """
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(library(None, use_errno=True), name)
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, last]
    return function


def _madvise() -> Any:
    return _libc("madvise", ctypes.c_int)


def _mincore() -> Any:
    return _libc("mincore", ctypes.c_void_p, ctypes.PyDLL)


def pages(nbytes: int) -> mmap.mmap:
    """Return memory of its own, zeros, that goes back to the system once nobody has it: what the C library frees it may keep.

    Raises:
        MemoryError: there is none.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}  # else it is shared, and has no large pages
    try:
        found = mmap.mmap(-1, max(1, nbytes), **private)
    except OSError as error:
        raise MemoryError(f"{nbytes:,} bytes: {error.strerror}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without
            found.madvise(mmap.MADV_HUGEPAGE)
    return found


def populate(address: int, nbytes: int) -> int:
    """Fault mapped pages in from disk.

    Args:
        address: of the first byte.
        nbytes: how many.

    Returns:
        0, or the errno that says why they cannot be read. Where the kernel cannot be asked (before Linux 5.14, or another
        system) 0 too: they are read without the net.
    """
    madvise = _madvise()
    if madvise is None or nbytes == 0:
        return 0
    start = address // PAGE * PAGE
    if madvise(start, address + nbytes - start, _MADV_POPULATE_READ) == 0:
        return 0
    code = ctypes.get_errno()
    return code if code in _UNREADABLE else 0


def will_need(address: int, nbytes: int) -> None:
    """Have the system read mapped pages into the page cache, those and no others, without waiting for them."""
    madvise, start = _madvise(), address // PAGE * PAGE
    if madvise is not None and nbytes:
        madvise(start, address + nbytes - start, mmap.MADV_WILLNEED)


def knows_cached() -> bool:
    """Return whether the system can be asked what is in the page cache."""
    return _mincore() is not None


def is_cached(address: int, nbytes: int) -> bool:
    """Return whether mapped pages are in the page cache, by looking at the first, the last, and some in between.

    That tells a cold file from a warm one, and promises nothing: pages that are there need no `populate`, since what is
    touched once is mapped as cheaply by touching it.
    """
    mincore = _mincore()
    if mincore is None or not nbytes:
        return False
    first, last = address // PAGE, (address + nbytes - 1) // PAGE
    samples = min(64, 2 + (nbytes >> 23))
    state = ctypes.create_string_buffer(1)
    for sample in range(samples):
        page = first + (last - first) * sample // (samples - 1)
        if mincore(page * PAGE, PAGE, state) != 0 or state.raw != b"\1":
            return False
    return True


def keep(mapped: mmap.mmap) -> bool:
    """Put a copy of mapped bytes where they are mapped: views of them are of this process's own memory then.

    A sync that fails may leave pages that are clean and were never written: the system may drop them, and read something else back.

    Returns:
        Whether that could be done: on Linux, while there is memory.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc, nbytes = ctypes.CDLL(None, use_errno=True), len(mapped)
    whole = -(-nbytes // PAGE) * PAGE
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    address = _address(mapped)
    copy = libc.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if copy in (None, _FAILED):
        return False
    if populate(address, nbytes):  # to touch it would kill
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
