"""Own the work on strips of tiles: read, decode, merge, quantize, digest; what comes out are pieces of stored tensors.

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
from quantcache.loader.pattern import ALIKE, OUTPUTS, SOURCE, Pattern, pattern
from quantcache.loader.plan import Job
from quantcache.loader.ranges import joined
from quantcache.loader.source import Source
from quantcache.quant import native
from quantcache.quant.codec import Arena, Scratch, Status
from quantcache.quant.digest import NBYTES, add_digest, each
from quantcache.quant.native import Calls
from quantcache.tensor import ITEMSIZE
from quantcache.trace import span

__all__ = ["Piece", "Quantizer", "Stretch", "Strip", "encode", "encode_all", "encode_elsewhere", "encode_tile", "whole_pieces"]

Array = NDArray[Any]


@dataclass(slots=True)
class Piece:
    """Hold bytes of one stored tensor: what one tile, or several in a row, made of it.

    Args:
        key: its name in the entry.
        position: first byte in the tensor; what the tiles made follows each other there.
        home: what the bytes lie in, uint8: a thread's buffers, or the mapped source.
        start, nbytes: where in it those of the first tile are, and how many there are of each.
        address: of the first.
        count: of the tiles.
        step: so much further in `home` are those of the next one.
        digests: of each tile's bytes, if they were asked for.
    """

    key: str
    position: int
    home: Array
    start: int
    nbytes: int
    address: int
    count: int = 1
    step: int = 0
    digests: Sequence[bytes] = ()

    @classmethod
    def of(cls, key: str, position: int, array: Array) -> Piece:
        """Return an array's bytes as a piece."""
        return cls(key, position, array.reshape(-1).view(np.uint8), 0, array.nbytes, native.address(array))

    @property
    def buffer(self) -> Any:
        """The bytes of the first tile, uint8."""
        return self.home[self.start : self.start + self.nbytes]

    def each(self) -> list[Piece]:
        """Return what every tile made as a piece of its own."""
        return [
            Piece(self.key, self.position + number * self.nbytes, self.home, self.start + number * self.step, self.nbytes,
                  self.address + number * self.step, digests=self.digests[number : number + 1])
            for number in range(self.count)
        ]  # fmt: skip


@dataclass(slots=True)
class Strip:
    """Name consecutive tiles of a tensor that a thread quantizes at a time, and hold what became of them.

    Args:
        job: what becomes of the tensor.
        start, stop: first weight, and the one behind the last: where tiles begin and end.
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

    @property
    def tiles(self) -> range:
        """First weights of the tiles."""
        return range(self.start, self.stop, self.job.tile)

    def refuse(self, status: Status) -> None:
        """Take that the codec refuses a tile: nothing of the others is wanted either."""
        self.status, self.pieces = self.status or status, []


def encode_tile(source: Source, job: Job, start: int, work: Scratch, outputs: Scratch) -> tuple[Status, list[Piece]]:
    """Read and quantize one tile.

    Args:
        source: of the tensor.
        job: what becomes of it.
        start: first weight of the tile.
        work: the calling thread's buffers.
        outputs: buffers that the pieces may lie in.

    Returns:
        OK and the pieces, of one tile each, or why the job's codec refuses the values.

    Raises:
        SourceError: the source cannot be read.
    """
    strip = Strip(job, start, min(start + job.tile, job.size))
    encode(source, [strip], work, outputs)
    return strip.status, strip.pieces


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


def encode(source: Source, strips: Sequence[Strip], work: Scratch, outputs: Scratch, *, digested: bool = False) -> None:
    """Read and quantize tiles of one file, in one foreign call where Python has nothing to do in between.

    Args:
        source: the file.
        strips: what to do; status and pieces are written.
        work: the calling thread's buffers.
        outputs: buffers that the pieces may lie in; for more than one tile an Arena.
        digested: whether the pieces are to have their digests.

    Raises:
        SourceError: the source cannot be read.
    """
    strips = [strip for strip in strips if strip.stop > strip.start]  # of an empty tensor there is nothing
    if not strips:
        return
    calls = Calls()
    steps = _reading(source, strips, calls)
    here = source.big_endian or native.level() == "reference"
    digests = _Digests(strips if digested else ())
    for strip in strips:
        start = strip.start
        while start < strip.stop:
            step = None if here else _repeated(source, strip, start, calls, work, outputs, digests)
            if step is None:
                _make(calls, steps)
                steps, step = [], _encoded_here(source, strip, start, calls, work, outputs, digests)
            steps.append(step)
            start = step.stop
    _make(calls, steps)


class _Digests:
    """Take the digests of the pieces of tiles, side by side."""

    def __init__(self, strips: Sequence[Strip]) -> None:
        self._found = np.empty(NBYTES * sum([len(strip.job.kind.parts) * len(strip.tiles) for strip in strips]), np.uint8)
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

    def __init__(self, source: Source, strips: Sequence[Strip], calls: Calls) -> None:
        self._file, self._calls, self.begin = source.file, calls, len(calls)
        calls.name = strips[0].job.info.name
        for first, last in joined(source.extent(strip.job.info, strip.start, strip.stop) for strip in strips):
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


def _reading(source: Source, strips: Sequence[Strip], calls: Calls) -> list[_Reading | _Encoding]:
    """Return the step that reads tiles; at the reference level, which has no calls, they are read now."""
    if native.level() != "reference":
        return [_Reading(source, strips, calls)]
    for strip in strips:
        first, last = source.extent(strip.job.info, strip.start, strip.stop)
        source.file.populate(first, last - first)
    return []


class _Encoding:
    """Stand for the calls that make pieces of a strip, of all of it or of some tiles, and take what came of them.

    Args:
        strip: what was, or is, made.
        stop: the weight behind the last of these tiles.
        pieces: what is to be stored of them, as many tiles of each.
        calls: what is called.
        digests: where they are taken, if they are: of all pieces of a tile, then of the next one.
        begin: number of the first call.
    """

    def __init__(self, strip: Strip, stop: int, pieces: list[Piece], calls: Calls, digests: _Digests, begin: int | None = None) -> None:
        self._strip, self.stop, self._pieces, self._calls, self._digests = strip, stop, pieces, calls, digests
        self.end = len(calls)
        self.begin = self.end if begin is None else begin
        self.digests_at = 0  # 0 if the pieces have theirs
        self.added: list[Any] = []  # of the strip's claim
        self.arrays: list[tuple[int, dict[str, Array]]] = []  # what the job's encoder is to collect, with the first weight

    def add_sums(self, claim: Claim, stop: int) -> None:
        """Add what digests the source up to a place."""
        self._calls.name = self._strip.job.info.name
        self.added = claim.add_to(self._calls, stop)
        self.end = len(self._calls)

    def add_digests(self) -> None:
        """Add what digests the pieces, of one tile each, or take their digests now, at the reference level."""
        calls, pieces = self._calls, self._pieces
        calls.name, address = self._strip.job.info.name, self._digests.room(len(pieces))
        for number, piece in enumerate(pieces):
            if add_digest(calls, piece.address, piece.nbytes, address + NBYTES * number):
                self.digests_at = address
            else:
                piece.digests = [digest(piece.buffer)]
        self.end = len(calls)

    def done(self) -> None:
        """Take what all calls have made."""
        strip, pieces = self._strip, self._pieces
        if self.digests_at:
            found = self._digests.at(self.digests_at, len(pieces) * pieces[0].count) if pieces else []
            for number, piece in enumerate(pieces):
                piece.digests = found[number :: len(pieces)]
        if strip.claim is not None:
            strip.claim.added += self.added
        if strip.job.encoder is not None:
            for start, arrays in self.arrays:
                strip.job.encoder.encoded(start, arrays)
        if strip.status == Status.OK:
            strip.pieces += pieces

    def failed(self, call: int) -> None:
        """Take that a call failed; none after it was made.

        Raises:
            CodecError: the kernels do not decode these blocks.
        """
        phase, code = self._calls.result(call)
        if phase == "decode":
            raise CodecError(f"no kernel decodes {self._strip.job.info.dtype}")
        self._strip.refuse(Status(code))


def _repeated(
    source: Source, strip: Strip, start: int, calls: Calls, work: Scratch, outputs: Scratch, digests: _Digests
) -> _Encoding | None:
    """Add the calls of the pattern of a strip's next tile, and for as many as follow it in the same way; None if it has none."""
    job, claim = strip.job, strip.claim
    count = min(job.tile, strip.stop - start)
    first, last = source.extent(job.info, start, start + count)
    address, nbytes = source.file.address + first, last - first
    found, spot = _pattern(source, job, start, count, address, digested=bool(digests), summed=claim is not None), None
    times = (strip.stop - start) // count if found is not None and found.repeats else 1
    if found is not None and claim is not None:
        times = max(1, min(times, (claim.reach - first) // nbytes))
        spot = claim.spot(first + times * nbytes, (times - 1) * found.blocks + found.least_blocks)
        if spot is None:  # where a chunk ends
            found = _pattern(source, job, start, count, address, digested=bool(digests), summed=False)
    if found is None:
        return None
    home, at, made = outputs.room(times * found.outputs_nbytes)
    # a larger tile gets another bench: this one stays until its calls are made
    bench = [work.array("pattern", np.uint8, found.work_nbytes)] if found.work_nbytes else []
    begin, calls.name = len(calls), job.info.name
    # what pieces lie in, where in it, at which address, and how much further what is of the next tile
    homes = {SOURCE: (source.file.bytes, first, address, nbytes), OUTPUTS: (home, at, made, found.outputs_nbytes)}
    pieces = []
    for place in found.pieces:
        lies, base, begins, step = homes[place.base]
        key, position = job.keys[place.part], start // place.weights * place.itemsize
        pieces.append(Piece(key, position, lies, base + place.offset, place.nbytes, begins + place.offset, times, step))
    arrays = []
    for number in range(times) if job.kind.collects else ():
        here, made_of_it = at + number * found.outputs_nbytes, dict[str, Array]()
        for name, offset, dtype, size in found.arrays:
            made_of_it[name] = home[here + offset : here + offset + dtype.itemsize * size].view(dtype)
        arrays.append((start + number * count, made_of_it))
    wanted = digests.room(times * len(pieces)) if digests else 0
    blocks = (spot.address, spot.sums, spot.blocks) if spot is not None else (0, 0, 0)
    bases = address, made, wanted, *blocks, *map(native.address, bench)  # as quantcache.loader.pattern has them
    calls.repeat(found.calls, bases, *bench, times=times)
    stop = start + times * count
    encoding = _Encoding(strip, stop, pieces, calls, digests, begin)
    encoding.digests_at, encoding.arrays = wanted, arrays
    if spot is not None:
        encoding.added = [spot.added]
    elif claim is not None:
        encoding.add_sums(claim, first + times * nbytes)
    return encoding


def _pattern(source: Source, job: Job, start: int, count: int, address: int, *, digested: bool, summed: bool) -> Pattern | None:
    """Return a tile's pattern, found once for its kind; whether a kernel can read it where it lies is not the kind's, but the file's."""
    alike = count, digested, address % ALIKE, summed
    patterns = job.kind.patterns
    try:
        known: Pattern | None = patterns[alike]
    except KeyError:
        known = patterns[alike] = pattern(_bytes(source, job, start, start + count), job, count, digested=digested, summed=summed)
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


def _bytes(source: Source, job: Job, start: int, stop: int) -> Array:
    """Return the bytes of weights as a little-endian file has them; of a big-endian one they must be in memory."""
    first, last = source.extent(job.info, start, stop)
    return source.little_endian(job.info, source.file.bytes[first:last])


def _encoded_here(
    source: Source, strip: Strip, start: int, calls: Calls, work: Scratch, outputs: Scratch, digests: _Digests
) -> _Encoding:
    """Quantize a strip's next tile, which is in memory, with Python between the kernels; only digests are left to calls."""
    stop = min(start + strip.job.tile, strip.stop)
    status, pieces = _encode_here(strip.job, start, _bytes(source, strip.job, start, stop), work, outputs)
    if status != Status.OK:
        strip.refuse(status)
    step = _Encoding(strip, stop, pieces, calls, digests)
    if strip.claim is not None:
        step.add_sums(strip.claim, source.extent(strip.job.info, start, stop)[1])
    if digests:
        step.add_digests()
    return step


def _encode_here(job: Job, start: int, raw: Array, work: Scratch, outputs: Scratch) -> tuple[Status, list[Piece]]:
    if job.encoder is None:
        return Status.OK, _pieces(job, start, {"values": raw}, start)
    widened = weights.widened(raw, job, start, work)
    with span("quantize", widened.nbytes, job.info.name):
        status, arrays = job.encoder.encode(widened, start, outputs)
    if status != Status.OK:
        return status, []
    for name, made in arrays.items():
        if not job.kind.as_stored and np.may_share_memory(made, widened):  # the thread's next tile will stand there
            arrays[name] = outputs.array(f"kept {name}", made.dtype, made.size)
            arrays[name][...] = made
    return Status.OK, _pieces(job, start, arrays, start)


def _pieces(job: Job, start: int, arrays: Mapping[str, Array], first: int) -> list[Piece]:
    """Return the parts of a tile that are stored tile by tile, of arrays whose first weight is `first`."""
    pieces = []
    for part, key in zip(job.kind.parts, job.keys, strict=True):
        if part.weights:
            at, begin, end = (weight // part.weights * ITEMSIZE[part.dtype] for weight in (start, start - first, start - first + job.tile))
            pieces.append(Piece.of(key, at, arrays[part.name].view(np.uint8).reshape(-1)[begin:end]))
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
    source: Source, strips: Sequence[Strip], work: Scratch, outputs: Arena, quantizer: Quantizer, *, digested: bool
) -> None:
    """Read tiles, and have them quantized.

    What nobody digests nobody stores: of that, what the quantizer keeps stays with it.

    Args:
        source, strips, work, outputs, digested: see encode; no two strips are of a tensor.
        quantizer: does it; what it refuses, or is not for it, is done here.
    """
    strips = [strip for strip in strips if strip.stop > strip.start]
    if not strips:
        return
    calls = Calls()
    reading = _reading(source, strips, calls)
    claims = dict.fromkeys(strip.claim for strip in strips if strip.claim is not None)
    added = [claim.add_to(calls, claim.stop) for claim in claims]
    _make(calls, reading)
    for claim, blocks in zip(claims, added, strict=True):
        claim.added += blocks
    left, sent = list[Strip](), list[Strip]()
    for strip in strips:  # each is asked for once: another thread may just find that the quantizer has failed
        (sent if quantizer.cost(strip.job) else left).append(strip)
    stretches = [Stretch(strip.job, strip.start, strip.stop, _bytes(source, strip.job, strip.start, strip.stop)) for strip in sent]
    with span("quantize", sum(stretch.raw.nbytes for stretch in stretches), strips[0].job.info.name):
        found = quantizer.encode(stretches, outputs, bring=digested)
    steps: list[_Reading | _Encoding] = []
    digests = _Digests(sent if digested else ())
    for strip, made in zip(sent, found, strict=True):
        job = strip.job
        if made is None:
            left.append(strip)
            continue
        assert job.encoder is not None
        arrays = job.encoder.encoded(strip.start, made)
        strip.away = any(part.weights and part.name not in arrays for part in job.kind.parts)
        pieces = [piece for start in strip.tiles for piece in _pieces(job, start, arrays, strip.start)] if not strip.away else []
        step = _Encoding(strip, strip.stop, pieces, calls, digests)
        if digested:
            step.add_digests()
        steps.append(step)
    _make(calls, steps)
    if left:
        encode(source, left, work, outputs, digested=digested)


def whole_pieces(job: Job) -> list[Piece]:
    """Return the parts that are known only after the last tile; to be called once."""
    if job.encoder is None:
        return []
    if not job.kind.collects:
        return [Piece(job.keys[number], 0, raw, 0, raw.size, address, digests=(found,)) for number, raw, address, found in job.kind.whole]
    parts = job.parts
    return [Piece.of(parts[name], 0, np.ascontiguousarray(array)) for name, array in job.encoder.finish().items()]
