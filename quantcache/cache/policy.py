"""Own eviction policies, as data: which entries go first. Knows no file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantcache.cache.index import EntryRow

__all__ = ["POLICIES", "choose"]

#: name -> what an entry is worth; the least worthy goes first.
POLICIES: dict[str, Callable[[EntryRow], float]] = {
    "lru": lambda row: row.used_s,
    "size": lambda row: -row.nbytes,
    "cost": lambda row: row.build_s / max(1, row.nbytes),
}


def choose(rows: Iterable[EntryRow], nbytes: int, policy: str, keep: set[str]) -> list[EntryRow]:
    """Choose entries that free at least so many bytes, or all that may go if that is not enough.

    Args:
        rows: all entries.
        nbytes: to be freed.
        policy: a name in POLICIES.
        keep: keys that must stay: pinned ones, and those being written now.
    """
    chosen: list[EntryRow] = []
    for row in sorted(rows, key=POLICIES[policy]):
        if nbytes <= 0:
            break
        if row.key not in keep:
            chosen.append(row)
            nbytes -= row.nbytes
    return chosen
