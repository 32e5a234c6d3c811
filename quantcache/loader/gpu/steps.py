"""Own how what goes onto a GPU is cut into steps of 32 MB, across tensors, and what of a step moves as one. Knows no device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantcache.loader.ahead import Check
from quantcache.loader.gpu.tensors import Span

__all__ = ["Parts", "runs", "units"]

#: Bytes that a thread brings at a time.
_STEP = 32 << 20
#: A part that is brought in several steps is cut at multiples of this, if it has no digests.
_CUT = 4096
#: What is smaller is put together on the way with what stands beside it on the device, up to so many bytes.
_SMALL = 64 << 10
_SMALLS = 4 << 20


@dataclass(frozen=True, slots=True)
class Parts:
    """Hold what is moved of a tensor: what it is on a GPU, its parts as flat bytes, and by part what is left to check."""

    kind: tuple[str, tuple[int, ...], dict[str, str]]
    arrays: dict[str, Any]
    checks: dict[str, Check]


def units(spans: list[Span]) -> list[list[Span]]:
    """Cut what is to be written into steps: spans of one buffer that follow each other, large ones in parts."""
    found: list[list[Span]] = []
    room, buffer = 0, None
    for span in spans:
        start = 0
        while start < span.nbytes:
            if room <= 0 or span.buffer is not buffer:
                found.append([])
                room, buffer = _STEP, span.buffer
            nbytes = min(room, span.nbytes - start)
            if nbytes < span.nbytes - start:
                cut = math.lcm(span.chunk or _CUT, 8)  # a part goes on at a chunk that has a digest, and where a mapped buffer does
                nbytes = min(-(-nbytes // cut) * cut, span.nbytes - start)
            whole = nbytes == span.nbytes
            found[-1].append(span if whole else replace(span, start=span.start + start, nbytes=nbytes, offset=span.offset + start))
            start += nbytes
            room -= nbytes
    return found


def runs(unit: list[Span], found: Mapping[str, Parts], *, gather: bool = True) -> Iterator[tuple[Any, int, Any]]:
    """Yield (buffer, offset, flat bytes) of a step: what is contiguous in memory and on the device as one view.

    Args:
        unit: the step.
        found: its tensors.
        gather: small pieces are copied together with what stands beside them on the device; what lies between becomes zeros.
    """
    runs: list[tuple[int, list[Any]]] = []
    end, behind = -1, -1  # on the device, in memory
    for span in unit:
        data = found[span.name].arrays[span.part][span.start : span.start + span.nbytes]
        address = data.__array_interface__["data"][0]
        if span.offset == end and address == behind:
            runs[-1][1].append(data)
        else:
            runs.append((span.offset, [data]))
        end, behind = span.offset + data.size, address + data.size
    pending: list[tuple[int, Any]] = []
    buffer = unit[0].buffer
    for offset, pieces in runs:
        nbytes = sum(piece.size for piece in pieces)
        if pending and (nbytes > _SMALL or offset + nbytes - pending[0][0] > _SMALLS):
            yield buffer, *_together(pending)
            pending = []
        view = pieces[0] if len(pieces) == 1 else np.lib.stride_tricks.as_strided(pieces[0], (nbytes,), (1,), writeable=False)
        if nbytes > _SMALL or not gather:
            yield buffer, offset, view
        else:
            pending.append((offset, view))
    if pending:
        yield buffer, *_together(pending)


def _together(pieces: list[tuple[int, Any]]) -> tuple[int, Any]:
    """Copy small pieces into one array, as far from each other as they stand on the device."""
    start, (last, view) = pieces[0][0], pieces[-1]
    found = np.zeros(last + view.size - start, np.uint8)
    for offset, data in pieces:
        found[offset - start : offset - start + data.size] = data
    return start, found
