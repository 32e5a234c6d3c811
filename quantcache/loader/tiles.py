"""Own the work on one tile: read, decode, merge, quantize; what comes out are pieces of stored tensors.

Knows no threads and no store: a pipeline runs it, and so does whoever compares an entry with its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantcache.loader import weights
from quantcache.loader.digests import DigestBehind
from quantcache.loader.plan import Job
from quantcache.loader.source import Source
from quantcache.quant.codec import Scratch, Status
from quantcache.tensor import ITEMSIZE
from quantcache.trace import span

__all__ = ["Piece", "Quantizer", "encode_tile", "encode_tiles", "whole_pieces"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Hold contiguous bytes of one stored tensor.

    Args:
        key: its name in the entry.
        position: first byte in the tensor.
        buffer: the bytes; they may lie in a thread's buffers, or in the mapped source.
    """

    key: str
    position: int
    buffer: Any


def encode_tile(
    source: Source, job: Job, start: int, work: Scratch, outputs: Scratch, behind: DigestBehind | None = None
) -> tuple[Status, list[Piece]]:
    """Read and quantize one tile.

    Args:
        source: of the tensor.
        job: what becomes of it.
        start: first weight of the tile.
        work: the calling thread's buffers.
        outputs: buffers that the pieces may lie in.
        behind: takes the source's digest.

    Returns:
        OK and the pieces, or why the job's codec refuses the values.

    Raises:
        SourceError: the source cannot be read.
    """
    stop = min(start + job.tile, job.size)
    if stop <= start:  # an empty tensor
        return Status.OK, []
    return _encode(job, start, _read(source, job, start, stop, behind), work, outputs)


def _encode(job: Job, start: int, raw: NDArray[np.uint8], work: Scratch, outputs: Scratch) -> tuple[Status, list[Piece]]:
    info = job.info
    if job.encoder is None:
        return Status.OK, [Piece(info.name, start * ITEMSIZE[info.dtype], raw)]
    tile = weights.widened(raw, job, start, work)
    with span("quantize", tile.nbytes, info.name):
        status, arrays = job.encoder.encode(tile, start, outputs)
    if status != Status.OK:
        return status, []
    pieces = []
    for part in job.encoder.parts:
        if part.weights:
            made = arrays[part.name].view(np.uint8)
            if not job.as_stored and np.may_share_memory(made, tile):  # the thread's next tile will stand there
                kept = outputs.array(f"kept {part.name}", np.uint8, made.size)
                kept[...] = made
                made = kept
            pieces.append(Piece(part.key, start // part.weights * ITEMSIZE[part.dtype], made))
    return status, pieces


class Quantizer(Protocol):
    """What quantizes tiles elsewhere than on the CPU, several at a time."""

    #: more threads than that do not feed it faster
    threads: int

    def tiles(self, job: Job) -> int:
        """Return how many tiles of a job it takes at a time; 0 if the CPU is to do it."""

    def encode(self, job: Job, start: int, raw: NDArray[np.uint8], outputs: Scratch) -> dict[str, NDArray[Any]] | None:
        """Quantize whole tiles, bit for bit as the job's encoder does.

        Args:
            job: what becomes of them.
            start: first weight.
            raw: bytes of the source.
            outputs: buffers that the result may lie in.

        Returns:
            Part -> flat array, or None if it does not know: the CPU does it then.
        """

    def close(self) -> None:
        """Let go of what it works with."""


def encode_tiles(
    source: Source, job: Job, start: int, stop: int, work: Scratch, outputs: Scratch, behind: DigestBehind | None, quantizer: Quantizer
) -> tuple[Status, list[Piece]]:
    """Read several tiles and have them quantized; see encode_tile.

    Args:
        source, job, start, work, outputs, behind: as there.
        stop: behind the last weight.
        quantizer: does it; what it refuses is done here.
    """
    raw = _read(source, job, start, stop, behind)
    with span("quantize", raw.nbytes, job.info.name):
        made = quantizer.encode(job, start, raw, outputs)
    pieces: list[Piece] = []
    if made is not None:
        assert job.encoder is not None
        arrays = job.encoder.encoded(start, made)
        for part in job.encoder.parts:
            if part.weights:
                flat, itemsize = arrays[part.name].view(np.uint8), ITEMSIZE[part.dtype]
                for first in range(start, stop, job.tile):
                    begin, end = ((at - start) // part.weights * itemsize for at in (first, first + job.tile))
                    pieces.append(Piece(part.key, first // part.weights * itemsize, flat[begin:end]))
        return Status.OK, pieces
    origin, _ = source.extent(job.info, start, stop)
    for first in range(start, stop, job.tile):
        begin, end = source.extent(job.info, first, min(first + job.tile, stop))
        status, found = _encode(job, first, raw[begin - origin : end - origin], work, outputs)
        if status != Status.OK:
            return status, []
        pieces += [Piece(piece.key, piece.position, piece.buffer.copy()) for piece in found]  # the next tile takes the same buffers
    return Status.OK, pieces


def _read(source: Source, job: Job, start: int, stop: int, behind: DigestBehind | None) -> NDArray[np.uint8]:
    """Return a tile's bytes as the source maps them, faulted in and digested; of a big-endian file a copy."""
    first, last = source.extent(job.info, start, stop)
    raw = source.file.bytes[first:last]
    if behind is None:
        source.file.populate(first, last - first)
    else:
        behind.begin(first, last)
        try:
            source.file.populate(first, last - first)
        except BaseException:
            behind.give_up(first, last)
            raise
        behind.feed(first, raw.data)
    return source.little_endian(job.info, raw)


def whole_pieces(job: Job) -> list[Piece]:
    """Return the parts that are known only after the last tile; to be called once."""
    if job.encoder is None:
        return []
    return [
        Piece(job.parts[name], 0, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        for name, array in job.encoder.finish().items()
    ]
