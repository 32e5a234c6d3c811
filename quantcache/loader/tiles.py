"""Own the work on tiles: read, decode, merge, quantize, digest; what comes out are pieces of stored tensors.

Knows no threads and no store: a pipeline runs it, and so does whoever compares an entry with its source. What follows each
other in C, over several tiles, is one foreign call: docs/decisions/0009-pipeline.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantcache.cache.key import digest
from quantcache.errors import CodecError
from quantcache.loader import weights
from quantcache.loader.digests import Claim
from quantcache.loader.pattern import Pattern, pattern
from quantcache.loader.plan import Job
from quantcache.loader.ranges import joined
from quantcache.loader.source import Source
from quantcache.quant import native
from quantcache.quant.codec import Arena, Scratch, Status
from quantcache.quant.digest import NBYTES, add_digest, each
from quantcache.quant.native import Calls
from quantcache.tensor import ITEMSIZE
from quantcache.trace import span

__all__ = ["Piece", "Quantizer", "Stretch", "Tile", "encode", "encode_all", "encode_elsewhere", "encode_tile", "whole_pieces"]

Array = NDArray[Any]


@dataclass(slots=True)
class Piece:
    """Hold contiguous bytes of one stored tensor.

    Args:
        key: its name in the entry.
        position: first byte in the tensor.
        home: what the bytes lie in, uint8: a thread's buffers, or the mapped source.
        start, nbytes: where in it.
        address: of the bytes.
        digest: of them, if it was asked for.
    """

    key: str
    position: int
    home: Array
    start: int
    nbytes: int
    address: int
    digest: bytes = b""

    @classmethod
    def of(cls, key: str, position: int, array: Array) -> Piece:
        """Return an array's bytes as a piece."""
        return cls(key, position, array.reshape(-1).view(np.uint8), 0, array.nbytes, native.address(array))

    @property
    def buffer(self) -> Any:
        """The bytes, uint8."""
        return self.home[self.start : self.start + self.nbytes]


@dataclass(slots=True)
class Tile:
    """Name a part of a tensor that is quantized at a time, and hold what became of it.

    Args:
        job: what becomes of the tensor.
        start, stop: first weight, and the one behind the last.
        status: OK, or why the job's codec refuses the values.
        pieces: what is to be stored, if it is OK.
        away: it is OK, and what became of it is only where it was quantized.
        claim: what is to be digested of the source up to its end, with that of other tiles; None if nothing is.
    """

    job: Job
    start: int
    stop: int
    status: Status = Status.OK
    pieces: list[Piece] = field(default_factory=list)
    away: bool = False
    claim: Claim | None = None


def encode_tile(source: Source, job: Job, start: int, work: Scratch, outputs: Scratch) -> tuple[Status, list[Piece]]:
    """Read and quantize one tile.

    Args:
        source: of the tensor.
        job: what becomes of it.
        start: first weight of the tile.
        work: the calling thread's buffers.
        outputs: buffers that the pieces may lie in.

    Returns:
        OK and the pieces, or why the job's codec refuses the values.

    Raises:
        SourceError: the source cannot be read.
    """
    tile = Tile(job, start, min(start + job.tile, job.size))
    encode(source, [tile], work, outputs)
    return tile.status, tile.pieces


def encode_all(source: Source, job: Job, scratch: Scratch, take: Callable[[Piece], Any]) -> Status:
    """Encode all tiles of a tensor, one after the other, or up to the first that the codec refuses; return why, or OK.

    Args:
        source, job: see encode_tile.
        scratch: the calling thread's buffers; a piece lies in them until the next tile.
        take: called with each piece.

    Raises:
        SourceError: the source cannot be read.
    """
    for start in job.tiles:
        status, pieces = encode_tile(source, job, start, scratch, scratch)
        if status != Status.OK:
            return status
        for piece in pieces:
            take(piece)
    return Status.OK


def encode(source: Source, tiles: Sequence[Tile], work: Scratch, outputs: Scratch, *, digested: bool = False) -> None:
    """Read and quantize tiles of one file, in one foreign call where Python has nothing to do in between.

    Args:
        source: the file.
        tiles: what to do; status and pieces are written.
        work: the calling thread's buffers.
        outputs: buffers that the pieces may lie in; for more than one tile an Arena.
        digested: whether the pieces are to have their digests.

    Raises:
        SourceError: the source cannot be read.
    """
    tiles = [tile for tile in tiles if tile.stop > tile.start]  # of an empty tensor there is nothing
    if not tiles:
        return
    calls = Calls()
    steps = _reading(source, tiles, calls)
    here = source.big_endian or native.level() == "reference"
    digests = _Digests(tiles if digested else ())
    for tile in tiles:
        step = None if here else _repeated(source, tile, calls, work, outputs, digests)
        if step is None:
            _make(calls, steps)
            _encode_here(tile, _bytes(source, tile), work, outputs)
            steps = []
            step = _Encoding(tile, calls, digests, None)
            if tile.claim is not None:
                step.add_sums(tile.claim, source.extent(tile.job.info, tile.start, tile.stop)[1])
            if digested:
                step.add_digests()
        steps.append(step)
    _make(calls, steps)


class _Digests:
    """Take the digests of the pieces of tiles, side by side."""

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self._found = np.empty(NBYTES * sum([len(tile.job.kind.parts) for tile in tiles]), np.uint8)
        self._address, self._taken = native.address(self._found), 0

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return self._found.size > 0

    def room(self, count: int) -> int:
        """Return the address of so many more."""
        self._taken += NBYTES * count
        return self._address + self._taken - NBYTES * count

    def at(self, address: int, count: int) -> list[bytes]:
        """Return those that stand at an address."""
        start = address - self._address
        return each(self._found[start : start + NBYTES * count])


class _Reading:
    """Add the calls that read tiles, those that stand side by side together."""

    def __init__(self, source: Source, tiles: Sequence[Tile], calls: Calls) -> None:
        self._file, self._calls, self.begin = source.file, calls, len(calls)
        calls.name = tiles[0].job.info.name
        for first, last in joined(source.extent(tile.job.info, tile.start, tile.stop) for tile in tiles):
            source.file.add_populate(calls, first, last - first)
        self.end = len(calls)

    def done(self) -> None:
        """Everything is in memory."""

    def failed(self, call: int) -> None:
        """Take that a call failed.

        Raises:
            SourceError: always.
        """
        raise self._file.unreadable(self._calls, call)


def _reading(source: Source, tiles: Sequence[Tile], calls: Calls) -> list[_Reading | _Encoding]:
    """Return the step that reads tiles; at the reference level, which has no calls, they are read now."""
    if native.level() != "reference":
        return [_Reading(source, tiles, calls)]
    for tile in tiles:
        first, last = source.extent(tile.job.info, tile.start, tile.stop)
        source.file.populate(first, last - first)
    return []


class _Encoding:
    """Stand for the calls that make pieces of a tile, and take what came of them.

    Args:
        tile: what was, or is, made.
        calls: what is called.
        digests: where they are taken, if they are.
        arrays: what the job's encoder collects once they are made; None if it has them.
        begin: number of the first call.
    """

    def __init__(self, tile: Tile, calls: Calls, digests: _Digests, arrays: dict[str, Array] | None, begin: int | None = None) -> None:
        self._tile, self._calls, self._digests, self._arrays = tile, calls, digests, arrays
        self.end = len(calls)
        self.begin = self.end if begin is None else begin
        self.digests_at = 0  # 0 if the pieces have theirs
        self.added: list[Any] = []  # of the tile's claim

    def add_sums(self, claim: Claim, stop: int) -> None:
        """Add what digests the source up to a place."""
        self._calls.name = self._tile.job.info.name
        self.added = claim.add_to(self._calls, stop)
        self.end = len(self._calls)

    def add_digests(self) -> None:
        """Add what digests the pieces, or take their digests now, at the reference level."""
        calls, pieces = self._calls, self._tile.pieces
        calls.name, address = self._tile.job.info.name, self._digests.room(len(pieces))
        for number, piece in enumerate(pieces):
            if add_digest(calls, piece.address, piece.nbytes, address + NBYTES * number):
                self.digests_at = address
            else:
                piece.digest = digest(piece.buffer)
        self.end = len(calls)

    def done(self) -> None:
        """Take what all calls have made."""
        pieces = self._tile.pieces
        if self.digests_at:
            for piece, found in zip(pieces, self._digests.at(self.digests_at, len(pieces)), strict=True):
                piece.digest = found
        if self._tile.claim is not None:
            self._tile.claim.added += self.added
        if self._arrays is not None and self._tile.job.encoder is not None:
            self._tile.job.encoder.encoded(self._tile.start, self._arrays)

    def failed(self, call: int) -> None:
        """Take that a call failed; none after it was made.

        Raises:
            CodecError: the kernels do not decode these blocks.
        """
        phase, code = self._calls.result(call)
        if phase == "decode":
            raise CodecError(f"no kernel decodes {self._tile.job.info.dtype}")
        self._tile.status, self._tile.pieces = Status(code), []


def _repeated(source: Source, tile: Tile, calls: Calls, work: Scratch, outputs: Scratch, digests: _Digests) -> _Encoding | None:
    """Add the calls of a tile's pattern; None if it has none."""
    job, start = tile.job, tile.start
    first, last = source.extent(job.info, start, tile.stop)
    address = source.file.address + first
    found, spot = _pattern(source, tile, address, digested=bool(digests), summed=tile.claim is not None), None
    if found is not None and tile.claim is not None:
        spot = tile.claim.spot(last, found.least_blocks)
        if spot is None:  # where a chunk ends
            found = _pattern(source, tile, address, digested=bool(digests), summed=False)
    if found is None:
        return None
    home, at, made = outputs.room(found.outputs_nbytes)
    # a larger tile gets another bench: this one stays until its calls are made
    bench = [work.array("pattern", np.uint8, found.work_nbytes)] if found.work_nbytes else []
    homes = (source.file.bytes, first, address), (home, at, made)  # what pieces lie in: SOURCE, OUTPUTS
    begin, calls.name = len(calls), job.info.name
    pieces = tile.pieces = []
    for place in found.pieces:
        lies, base, begins = homes[place.base]
        key, position = job.slots[place.part].key, start // place.weights * place.itemsize
        pieces.append(Piece(key, position, lies, base + place.offset, place.nbytes, begins + place.offset))
    wanted = digests.room(len(pieces)) if digests else 0
    blocks = (spot.address, spot.sums, spot.blocks) if spot is not None else (0, 0, 0)
    calls.repeat(found.calls, (address, made, wanted, *blocks, *map(native.address, bench)), *bench)  # as quantcache.loader.pattern has them
    arrays = None
    if job.kind.collects:
        arrays = {name: home[at + offset : at + offset + dtype.itemsize * size].view(dtype) for name, offset, dtype, size in found.arrays}
    step = _Encoding(tile, calls, digests, arrays, begin)
    step.digests_at = wanted
    if spot is not None:
        step.added = [spot.added]
    elif tile.claim is not None:
        step.add_sums(tile.claim, last)
    return step


def _pattern(source: Source, tile: Tile, address: int, *, digested: bool, summed: bool) -> Pattern | None:
    """Return a tile's pattern, found once for its kind; whether a kernel can read it where it lies is not the kind's, but the file's."""
    alike = tile.stop - tile.start, digested, address % 8, summed
    patterns = tile.job.kind.patterns
    try:
        known: Pattern | None = patterns[alike]
    except KeyError:
        known = patterns[alike] = pattern(_bytes(source, tile), tile.job, alike[0], digested=digested, summed=summed)
    return known


def _make(calls: Calls, steps: list[_Reading | _Encoding]) -> None:
    """Make the calls of steps; a tile that its codec refuses does not keep the next ones from theirs."""
    stopped = calls.run(steps[0].begin) if steps else 0
    for step in steps:
        if stopped < step.end:
            step.failed(stopped)
            stopped = calls.run(step.end)
        else:
            step.done()


def _bytes(source: Source, tile: Tile) -> Array:
    """Return a tile's bytes as a little-endian file has them; of a big-endian one they must be in memory."""
    first, last = source.extent(tile.job.info, tile.start, tile.stop)
    return source.little_endian(tile.job.info, source.file.bytes[first:last])


def _encode_here(tile: Tile, raw: Array, work: Scratch, outputs: Scratch) -> None:
    """Quantize what is in memory, with Python between the kernels."""
    job = tile.job
    if job.encoder is None:
        tile.pieces = _pieces(tile, {"values": raw}, tile.start)
        return
    widened = weights.widened(raw, job, tile.start, work)
    with span("quantize", widened.nbytes, job.info.name):
        tile.status, arrays = job.encoder.encode(widened, tile.start, outputs)
    if tile.status != Status.OK:
        return
    for name, made in arrays.items():
        if not job.as_stored and np.may_share_memory(made, widened):  # the thread's next tile will stand there
            arrays[name] = outputs.array(f"kept {name}", made.dtype, made.size)
            arrays[name][...] = made
    tile.pieces = _pieces(tile, arrays, tile.start)


def _pieces(tile: Tile, arrays: Mapping[str, Array], first: int) -> list[Piece]:
    """Return the parts of a tile that are stored tile by tile, of arrays whose first weight is `first`."""
    job, pieces = tile.job, []
    for part, slot in zip(job.kind.parts, job.slots, strict=True):
        if part.weights:
            at, begin, end = (weight // part.weights * ITEMSIZE[part.dtype] for weight in (tile.start, tile.start - first, tile.start - first + job.tile))
            pieces.append(Piece.of(slot.key, at, arrays[part.name].view(np.uint8).reshape(-1)[begin:end]))
    return pieces


@dataclass(frozen=True, slots=True)
class Stretch:
    """Name consecutive tiles of a tensor, and their bytes.

    Args:
        job: what becomes of the tensor.
        start, stop: first weight, and the one behind the last.
        raw: uint8, bytes of the source, little-endian.
    """

    job: Job
    start: int
    stop: int
    raw: NDArray[np.uint8]


class Quantizer(Protocol):
    """What quantizes tiles elsewhere than on the CPU, several at a time."""

    #: more threads than that do not feed it faster
    threads: int
    #: what it takes at a time, of one tensor or of several
    room: int

    def expect(self, jobs: Sequence[Job]) -> int:
        """Take note of all that will come, in order; return the bytes of the source that it will quantize."""

    def cost(self, job: Job) -> int:
        """Return what a tile of a job takes of the room; 0 if the CPU is to do it."""

    def encode(self, stretches: Sequence[Stretch], outputs: Arena, *, bring: bool = True) -> list[dict[str, NDArray[Any]] | None]:
        """Quantize whole tiles, bit for bit as their jobs' encoders do.

        Args:
            stretches: what; no two of a tensor.
            outputs: buffers that the result may lie in.
            bring: whether what the quantizer keeps is wanted here, too; what an encoder collects is in any case.

        Returns:
            For each, part -> flat array, or None if it does not know: the CPU does it then.
        """

    def close(self) -> None:
        """Let go of what it works with."""


def encode_elsewhere(
    source: Source, tiles: Sequence[Tile], work: Scratch, outputs: Arena, quantizer: Quantizer, *, digested: bool
) -> None:
    """Read tiles, those of a tensor consecutive, and have them quantized.

    What nobody digests nobody stores: of that, what the quantizer keeps stays with it.

    Args:
        source, tiles, work, outputs, digested: see encode.
        quantizer: does it; what it refuses, or is not for it, is done here.
    """
    tiles = [tile for tile in tiles if tile.stop > tile.start]
    if not tiles:
        return
    calls = Calls()
    reading = _reading(source, tiles, calls)
    claims = dict.fromkeys(tile.claim for tile in tiles if tile.claim is not None)
    added = [claim.add_to(calls, claim.stop) for claim in claims]
    _make(calls, reading)
    for claim, blocks in zip(claims, added, strict=True):
        claim.added += blocks
    together: list[list[Tile]] = []
    left: list[Tile] = []
    for tile in tiles:
        if not quantizer.cost(tile.job):
            left.append(tile)
        elif together and together[-1][0].job is tile.job:
            together[-1].append(tile)
        else:
            together.append([tile])
    stretches = [_stretch(source, own) for own in together]
    with span("quantize", sum(stretch.raw.nbytes for stretch in stretches), tiles[0].job.info.name):
        found = quantizer.encode(stretches, outputs, bring=digested)
    steps: list[_Reading | _Encoding] = []
    digests = _Digests(tiles if digested else ())
    for own, stretch, made in zip(together, stretches, found, strict=True):
        if made is None:
            left += own
            continue
        assert stretch.job.encoder is not None
        arrays = stretch.job.encoder.encoded(stretch.start, made)
        away = any(part.weights and part.name not in arrays for part in stretch.job.kind.parts)
        for tile in own:
            tile.away, tile.pieces = away, [] if away else _pieces(tile, arrays, stretch.start)
            if digested:
                step = _Encoding(tile, calls, digests, None)
                step.add_digests()
                steps.append(step)
    _make(calls, steps)
    if left:
        encode(source, left, work, outputs, digested=digested)


def _stretch(source: Source, tiles: Sequence[Tile]) -> Stretch:
    job, start, stop = tiles[0].job, tiles[0].start, tiles[-1].stop
    first, last = source.extent(job.info, start, stop)
    return Stretch(job, start, stop, source.little_endian(job.info, source.file.bytes[first:last]))


def whole_pieces(job: Job) -> list[Piece]:
    """Return the parts that are known only after the last tile; to be called once."""
    if job.encoder is None:
        return []
    if not job.kind.collects:
        return [Piece(job.parts[name], 0, raw, 0, raw.size, address, found) for name, raw, address, found in job.kind.whole]
    return [Piece.of(job.parts[name], 0, np.ascontiguousarray(array)) for name, array in job.encoder.finish().items()]
