"""Own what becomes of an entry that somebody had before it was durable: watched until that is settled, and kept in memory if it fails."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from quantcache.errors import CacheError

if TYPE_CHECKING:
    from quantcache.cache.blobs import StoredEntry

__all__ = ["Early"]


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
