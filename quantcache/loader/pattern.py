"""Own patterns: the calls that quantize a tile, found once for all tiles of a kind and size, and repeated with other addresses.

A model's tensors are of a dozen kinds. To find kernels, lay buffers out and list arguments took four times as long as the kernels
themselves, for small tensors; to repeat takes a copy, and a sum for each address (docs/decisions/0009-pipeline.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.loader import weights
from quantcache.loader.plan import Job
from quantcache.quant import native
from quantcache.quant.codec import Arena
from quantcache.quant.digest import NBYTES
from quantcache.quant.native import Template
from quantcache.tensor import ITEMSIZE

__all__ = ["Pattern", "PiecePlace", "pattern"]

Array = NDArray[Any]

#: What addresses count from: a tile's bytes in the source, what is made of it, its digests, what its thread works with.
SOURCE, OUTPUTS, DIGESTS, WORK = range(4)
#: What is made of a tile takes at most so many bytes a weight, and so many more; as much is between its source and that.
_ROOM, _MORE = 8, 1 << 16


@dataclass(frozen=True, slots=True)
class PiecePlace:
    """Say where a piece of a tile is.

    Args:
        part: number of its part.
        weights, itemsize: that one element covers, and its bytes.
        base, offset: where it begins.
        nbytes: of the piece.
    """

    part: int
    weights: int
    itemsize: int
    base: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Pattern:
    """Hold the calls of a tile, and say where what they make will be.

    Args:
        calls: what is called.
        outputs_nbytes, work_nbytes: what they need.
        pieces: what is stored.
        arrays: what an encoder collects: name, first byte in the outputs, element type, number of elements.
    """

    calls: Template
    outputs_nbytes: int
    work_nbytes: int
    pieces: tuple[PiecePlace, ...]
    arrays: tuple[tuple[str, int, np.dtype[Any], int], ...]


def pattern(raw: Array, job: Job, start: int, stop: int, *, digested: bool) -> Pattern | None:
    """Return the pattern of a tile; None if Python has to do a part of it.

    Args:
        raw: its bytes in the source, little-endian; they need not be there yet.
        job: what becomes of it.
        start, stop: first weight, and the one behind the last.
        digested: whether what is stored is to be digested.
    """
    try:
        return _pattern(raw, job, start, stop, digested=digested)
    except _OutsideError:
        return None


def _pattern(raw: Array, job: Job, start: int, stop: int, *, digested: bool) -> Pattern | None:
    places = _Places()
    places.add(raw, SOURCE)
    outputs, work = (Arena(_ROOM * (stop - start) + _MORE) for _ in range(2))
    places.add(outputs.room(0)[0], OUTPUTS)
    places.add(work.room(0)[0], WORK)
    calls, arrays = Template(), {"values": raw}
    if job.encoder is not None:
        widened = weights.prepare(raw, job, start, work)
        prepared = widened and job.encoder.prepare(widened[1], outputs)
        if widened is None or prepared is None:
            return None
        arrays = prepared[1]
        for call, phase in ((widened[0], "decode"), (prepared[0], "quantize")):
            if call is None:
                continue
            words = [argument if isinstance(argument, int) else places.of(argument) for argument in call[1:]]
            calls.add(native.kernel(call[0]), words, phase=phase, nbytes=widened[1].nbytes)
    pieces: list[PiecePlace] = []
    for number, part in enumerate(job.kind.parts):
        if not part.weights:
            continue
        base, offset = places.of(arrays[part.name])
        nbytes = min(job.tile // part.weights * ITEMSIZE[part.dtype], arrays[part.name].nbytes)
        if digested:
            out = DIGESTS, NBYTES * len(pieces)
            calls.add(native.kernel("digest_pieces"), [(base, offset), nbytes, nbytes, out], phase="digest", nbytes=nbytes)
        pieces.append(PiecePlace(number, part.weights, ITEMSIZE[part.dtype], base, offset, nbytes))
    if any(piece.base == WORK for piece in pieces):  # the thread's next tile will stand there
        return None
    filled = []
    for name, array in arrays.items() if job.kind.collects else ():
        base, offset = places.of(array)
        if base != OUTPUTS:
            return None
        filled.append((name, offset, array.dtype, array.size))
    return Pattern(calls, outputs.taken, work.taken, tuple(pieces), tuple(filled))


class _OutsideError(Exception):
    """Say that an array is none of a tile's: to pass its address for the next tile would be wrong."""


class _Places:
    """Find what an array's address counts from."""

    def __init__(self) -> None:
        self._known: list[tuple[int, int, int]] = []

    def add(self, whole: Array, base: int) -> None:
        """Note where bytes are that addresses count from."""
        begin = native.address(whole)
        self._known.append((begin, begin + whole.nbytes, base))

    def of(self, array: Array) -> tuple[int, int]:
        """Return the base of an array, and where it begins.

        Raises:
            _OutsideError: it counts from none.
        """
        begin = native.address(array)
        for first, last, base in self._known:
            if first <= begin and begin + array.nbytes <= last:
                return base, begin - first
        raise _OutsideError
