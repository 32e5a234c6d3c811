"""Own ranges of bytes, or of whatever is counted: (first, the one behind the last)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

__all__ = ["add", "joined"]


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges, as (first byte, the one behind the last), with each that begins where the one before it ends as a part of that."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found


def add(ranges: list[tuple[int, int]], first: int, last: int) -> None:
    """Add a range to others, which are apart and in order, and of which it may repeat some; those that it touches become one with it."""
    begin = bisect_right(ranges, (first, 0))
    if begin and ranges[begin - 1][1] >= first:
        begin -= 1
        first = ranges[begin][0]
    end = begin
    while end < len(ranges) and ranges[end][0] <= last:
        last = max(last, ranges[end][1])
        end += 1
    ranges[begin:end] = [(first, last)]
