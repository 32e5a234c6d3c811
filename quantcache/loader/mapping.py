"""Own how a file is mapped and read: zero-copy views, and faults turned into errors; and memory that no file stands behind.

Weights are used where the page cache has them (docs/decisions/0003-reading.md), and faulted in first. Knows no format.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.errors import SourceError, SourceNotFoundError
from quantcache.loader.ranges import add
from quantcache.memory import PAGE, is_cached, knows_cached, pages, populate, will_need
from quantcache.quant import native
from quantcache.quant.native import Calls
from quantcache.trace import span

__all__ = ["MappedFile", "add_populate", "fresh", "whole_pages"]


def add_populate(calls: Calls, address: int, nbytes: int) -> None:
    """Have mapped pages faulted in by a call of the phase "read", which fails if they cannot be read. Not at the reference level."""
    start = address // PAGE * PAGE
    calls.add(native.system("populate"), start, address + nbytes - start, phase="read", nbytes=nbytes)


def whole_pages(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the pages that bytes are on, in order, with those that touch as one.

    Args:
        ranges: address of the first byte, and how many there are.

    Returns:
        The same of pages.
    """
    found: list[tuple[int, int]] = []
    for address, nbytes in sorted(ranges):
        add(found, address // PAGE * PAGE, -(-(address + nbytes) // PAGE) * PAGE)
    return [(start, stop - start) for start, stop in found]


def fresh(nbytes: int) -> NDArray[np.uint8]:
    """Return memory of its own, zeros, that goes back to the system with the array."""
    return np.frombuffer(pages(nbytes), np.uint8)[:nbytes]


class MappedFile:
    """Map a file read-only. Views keep the mapping alive; there is nothing to close.

    Args:
        path: the file.

    Raises:
        SourceNotFoundError: it does not exist.
        SourceError: it is no regular file, empty, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # a FIFO must not make open() wait for a writer
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError as error:
            raise SourceNotFoundError("no such file", path=path) from error
        except OSError as error:
            raise SourceError(f"cannot be opened: {error.strerror}", path=path) from error
        try:
            self.stat = os.fstat(descriptor)
            if not os.path.isfile(descriptor):
                raise SourceError("not a regular file", path=path)
            if self.stat.st_size == 0:
                raise SourceError("the file is empty", path=path, offset=0)
            # from Python 3.13 on a map need not keep a descriptor of its own
            untracked: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            self._map = mmap.mmap(descriptor, self.stat.st_size, access=mmap.ACCESS_READ, **untracked)
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot be mapped: {error}", path=path) from error
        finally:
            os.close(descriptor)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        #: of the first byte
        self.address: int = self.bytes.__array_interface__["data"][0]

    @property
    def nbytes(self) -> int:
        """Length of the file when it was opened."""
        return self.stat.st_size

    @property
    def memory(self) -> memoryview:
        """The whole file as a read-only buffer."""
        return memoryview(self._map)

    def populate(self, offset: int, nbytes: int) -> None:
        """Fault pages in from disk, so that reading the views cannot fail.

        Args:
            offset: first byte.
            nbytes: how many.

        Raises:
            SourceError: the disk failed, or the file has become shorter.
        """
        with span("read", nbytes):
            code = populate(self.address + offset, nbytes)
        if code:
            raise self._unreadable(code, offset)

    def add_populate(self, calls: Calls, offset: int, nbytes: int) -> None:
        """Have pages faulted in by a call of the phase "read"; `unreadable` says what it means if it fails."""
        calls.places[len(calls)] = offset
        add_populate(calls, self.address + offset, nbytes)

    def unreadable(self, calls: Calls, failed: int) -> SourceError:
        """Return the error of a call that should have faulted pages in."""
        return self._unreadable(calls.result(failed)[1], calls.places[failed])

    def _unreadable(self, code: int, offset: int) -> SourceError:
        what = "the file became shorter while it was read" if code == errno.EFAULT else os.strerror(code)
        return SourceError(what, path=self.path, offset=offset)

    def will_need(self, offset: int, nbytes: int) -> None:
        """Have the system read a range into the page cache, without waiting for it."""
        will_need(self.address + offset, nbytes)

    def bring(self, offset: int, nbytes: int) -> None:
        """Fault in what a header has; of a cold file no more than that.

        Raises:
            SourceError: the disk failed, or the file has become shorter.
        """
        self.will_need(offset, nbytes)
        self.populate(offset, nbytes)

    def begin_reading(self, nbytes: int) -> None:
        """Have the first bytes of a cold file read, and return at once: even to ask for that many takes milliseconds."""
        if self.is_cold:
            with contextlib.suppress(RuntimeError):  # no more threads here
                threading.Thread(target=self.will_need, args=(0, min(nbytes, self.nbytes)), name="quantcache-ahead", daemon=True).start()

    @property
    def is_cold(self) -> bool:
        """Whether some of the file has to come from disk, as far as a few pages tell."""
        return knows_cached() and not is_cached(self.address, self.nbytes)

    def changed(self) -> bool:
        """Return whether the path now leads to other content than was opened, as far as stat() tells."""
        try:
            now = os.stat(self.path)
        except OSError:
            return True
        fields = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
        return any(getattr(now, field) != getattr(self.stat, field) for field in fields)
