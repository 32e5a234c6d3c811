"""Own patterns: the calls that quantize a tile, found once for all tiles of a kind and size, and repeated with other addresses.

A model's tensors are of a dozen kinds. To find kernels, lay buffers out and list arguments took four times as long as the kernels
themselves, for small tensors; to repeat takes a copy, and a sum for each address (docs/decisions/0009-pipeline.md).
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.loader import weights
from quantcache.loader.plan import Job
from quantcache.quant import native
from quantcache.quant.codec import Arena, Call, Scratch
from quantcache.quant.digest import BLOCK, NBYTES, SUM_NBYTES
from quantcache.quant.native import Template
from quantcache.tensor import ITEMSIZE

__all__ = ["ALIKE", "OUTPUTS", "SOURCE", "Pattern", "PiecePlace", "pattern"]

Array = NDArray[Any]

#: What arguments count from: a tile's bytes in the source, what is made of it, its digests; the blocks of the source that are added up,
#: their sums, how many there are; what its thread works with.
SOURCE, OUTPUTS, DIGESTS, BLOCKS, SUMS, COUNT, WORK = range(7)
#: What is made of a tile takes at most so many bytes a weight, and so many more; as much is between its source and that.
_ROOM, _MORE = 8, 1 << 16
#: Tiles whose addresses are so many bytes apart, or a multiple, are alike for kernels.
ALIKE = 8
#: Weights that a kernel takes at a time where anything is digested: what it has read and written is then still in the core's own cache.
_RUN = 1 << 16


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
        blocks: of the source that are added up each time but the last, if the calls are made several times in a row.
        least_blocks: of those, that there must be the last time: with fewer the calls would be wrong.
        repeats: whether the tile that follows a tile in the source can be the calls' next time.
    """

    calls: Template
    outputs_nbytes: int
    work_nbytes: int
    pieces: tuple[PiecePlace, ...]
    arrays: tuple[tuple[str, int, np.dtype[Any], int], ...]
    blocks: int
    least_blocks: int
    repeats: bool


def pattern(raw: Array, job: Job, count: int, *, digested: bool, summed: bool) -> Pattern | None:
    """Return the pattern of a tile; None if Python has to do a part of it.

    Args:
        raw: its bytes in the source, little-endian; they need not be there yet.
        job: what becomes of it.
        count: of its weights.
        digested: whether what is stored is to be digested.
        summed: whether blocks of the source are to be added up: from one on that begins at most at its first whole block.
    """
    try:
        return _pattern(raw, job, count, digested=digested, summed=summed)
    except _OutsideError:
        return None


def _pattern(raw: Array, job: Job, count: int, *, digested: bool, summed: bool) -> Pattern | None:
    places = _Places()
    places.add(raw, SOURCE)
    outputs, work = _Recorded(_ROOM * count + _MORE), Arena(_ROOM * count + _MORE)
    places.add(outputs.room(0)[0], OUTPUTS)
    places.add(work.room(0)[0], WORK)
    whole = _prepared(raw, job, count, work, outputs)
    if whole is None:
        return None
    arrays, runs, work_nbytes = whole[1], [(count, whole[0])], work.taken
    pieces = []
    for number, part in enumerate(job.kind.parts):
        if part.weights:
            nbytes = min(job.tile // part.weights * ITEMSIZE[part.dtype], arrays[part.name].nbytes)
            pieces.append(PiecePlace(number, part.weights, ITEMSIZE[part.dtype], *places.of(arrays[part.name]), nbytes))
    if any(piece.base == WORK for piece in pieces):  # the thread's next tile will stand there
        return None
    with contextlib.suppress(_OutsideError):  # what cannot be cut is one run
        if (summed or digested) and (cut := _cut(raw, job, count, work, outputs)) is not None:
            runs, work_nbytes = cut
    blocks = raw.nbytes // BLOCK
    calls = Template((raw.nbytes, outputs.taken, NBYTES * len(pieces), raw.nbytes, blocks * SUM_NBYTES, blocks, 0), COUNT)
    added = [_Added(BLOCKS, 0, raw.nbytes, SUMS, 0)] if summed else []
    if digested and len(runs) > 1:
        for piece in pieces:
            added.append(_Added(piece.base, piece.offset, piece.nbytes, WORK, work_nbytes))
            work_nbytes += added[-1].blocks * SUM_NBYTES
    done = 0
    for number, (size, made) in enumerate(runs):
        for call, phase, nbytes in made:
            words = [argument if isinstance(argument, int) else places.of(argument) for argument in call[1:]]
            calls.add(native.kernel(call[0]), words, phase=phase, nbytes=nbytes)
        done += size
        for one in added:
            one.add_to(calls, done, count, open_ended=one.base == BLOCKS and number == len(runs) - 1)
    for number, piece in enumerate(pieces if digested else ()):
        what, out = (piece.base, piece.offset), (DIGESTS, NBYTES * number)
        if len(runs) > 1:
            one = added[number - len(pieces)]
            calls.add(native.kernel("digest_of_sums"), [what, piece.nbytes, (WORK, one.sums), out], phase="digest", nbytes=piece.nbytes - one.done * BLOCK)
        else:
            calls.add(native.kernel("digest_pieces"), [what, piece.nbytes, piece.nbytes, out], phase="digest", nbytes=piece.nbytes)
    filled = []
    for name, array in arrays.items() if job.kind.collects else ():
        base, offset = places.of(array)
        if base != OUTPUTS:
            return None
        filled.append((name, offset, array.dtype, array.size))
    repeats = raw.nbytes % ALIKE == 0 and not (summed and raw.nbytes % BLOCK)
    return Pattern(calls, outputs.taken, work_nbytes, tuple(pieces), tuple(filled), blocks, added[0].done if summed else 0, repeats)


class _Added:
    """Have the blocks of some bytes added up as the bytes come, run by run.

    Args:
        base, offset, nbytes: where the first is, and how many there are.
        sums_base, sums: where the sums go.
    """

    def __init__(self, base: int, offset: int, nbytes: int, sums_base: int, sums: int) -> None:
        self.base, self._offset, self._nbytes, self._sums_base, self.sums = base, offset, nbytes, sums_base, sums
        self.blocks = max(0, nbytes - 1) // BLOCK
        self.done = 0

    def add_to(self, calls: Template, done: int, count: int, *, open_ended: bool) -> None:
        """Add the call for what is there.

        Args:
            calls: what it is added to.
            done, count: so many weights of so many.
            open_ended: up to the number of blocks that the caller says.
        """
        blocks = 0 if open_ended else min(self.blocks, self._nbytes * done // count // BLOCK) - self.done
        if blocks or open_ended:
            many = (COUNT, -self.done) if open_ended else blocks
            nbytes = blocks * BLOCK or self._nbytes - self.done * BLOCK
            at = [(self.base, self._offset + self.done * BLOCK), many, (self._sums_base, self.sums + self.done * SUM_NBYTES)]
            calls.add(native.kernel("digest_sums"), at, phase="digest", nbytes=nbytes)
        self.done += blocks


#: what is called for some weights: call, phase, bytes that it goes over
_Made = list[tuple[Call, str, int]]


def _prepared(raw: Array, job: Job, count: int, work: Scratch, outputs: Scratch) -> tuple[_Made, dict[str, Array]] | None:
    """Return what makes stored weights of bytes, and the arrays that it fills; None if Python does."""
    if job.encoder is None:
        return [], {"values": raw}
    widened = weights.prepare(raw, job, count, work)
    prepared = widened and job.encoder.prepare(widened[1], outputs)
    if widened is None or prepared is None:
        return None
    calls = (widened[0], "decode"), (prepared[0], "quantize")
    return [(call, phase, widened[1].nbytes) for call, phase in calls if call is not None], prepared[1]


def _cut(raw: Array, job: Job, count: int, work: Arena, outputs: _Recorded) -> tuple[list[tuple[int, _Made]], int] | None:
    """Cut a tile into runs that together fill what the whole would.

    Args:
        raw, job, count: see pattern.
        work: what a run works with; the next one works with the same.
        outputs: what was asked for the whole.

    Returns:
        The runs, as weights and calls, and the bytes that they work with; None if they fill something else, or there is but one.
    """
    step = max(1, _RUN // job.kind.unit) * job.kind.unit
    edges = [*range(0, count - step + 1, step), count]
    runs, slices, work_nbytes = list[tuple[int, _Made]](), outputs.again(), 0
    for start, stop in itertools.pairwise(edges):
        work.clear()
        first, last = (weight * raw.nbytes // count for weight in (start, stop))
        made = _prepared(raw[first:last], job, stop - start, work, slices)
        if made is None:
            return None
        runs.append((stop - start, made[0]))
        work_nbytes = max(work_nbytes, work.taken)
    return (runs, work_nbytes) if len(runs) > 1 and slices.used_up else None


class _Recorded(Arena):
    """Keep what was asked for a tile, to give it out again in runs."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.asked: dict[str, Array] = {}
        self._twice = False

    def array(self, slot: str, dtype: Any, size: int) -> Array:
        """Return `size` elements, and remember them."""
        self._twice = self._twice or slot in self.asked
        self.asked[slot] = super().array(slot, dtype, size)
        return self.asked[slot]

    def again(self) -> _Slices:
        """Return what gives them out again.

        Raises:
            _OutsideError: nobody could say which of two is meant.
        """
        if self._twice:
            raise _OutsideError
        return _Slices(self.asked)


class _Slices(Scratch):
    """Give arrays out run by run, from the front."""

    def __init__(self, whole: dict[str, Array]) -> None:
        super().__init__()
        self._whole, self._taken = whole, dict.fromkeys(whole, 0)

    def array(self, slot: str, dtype: Any, size: int) -> Array:
        """Return the next elements of what was asked for the whole."""
        whole, first = self._whole.get(slot), self._taken.get(slot, 0)
        if whole is None or whole.dtype != dtype or first + size > whole.size:
            raise _OutsideError
        self._taken[slot] = first + size
        return whole[first : first + size]

    @property
    def used_up(self) -> bool:
        """Whether everything was given out."""
        return all(self._taken[slot] == whole.size for slot, whole in self._whole.items())


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
