"""Own how a tile of a tensor becomes numbers: bytes of the source, decoded, changed by adapters, scaled.

Nothing is ever whole: a tile of about a million weights, in a thread's reused buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.loader.changes import DIFFERENCE, PRODUCT, Change
from quantcache.loader.plan import Job
from quantcache.loader.source import Source
from quantcache.quant import blocks, merge
from quantcache.quant.codec import Call, Scratch
from quantcache.tensor import TensorInfo, array_dtype
from quantcache.trace import span

__all__ = ["prepare", "widened"]

Array = NDArray[Any]

#: Elements of an adapter's matrices that are widened at a time: 2 MB a buffer, whatever the rank and the width.
_PIECE = 1 << 19


def widened(raw: Array, job: Job, start: int, scratch: Scratch) -> Array:
    """Return flat weights as the job's encoder wants them: the bytes themselves, or float32 with all changes.

    Args:
        raw: bytes of the source, little-endian, from a whole block on.
        job: says what becomes of them.
        start: first weight.
        scratch: the calling thread's buffers; the result may lie in them.

    Raises:
        SourceError: an adapter cannot be read.
    """
    info = job.info
    if job.kind.as_stored:
        return _elements(raw, info)
    wide = scratch.array("weights", np.float32, min(job.tile, job.size - start))
    with span("decode", raw.nbytes, info.name):
        if info.is_block:
            blocks.decode(info.dtype, raw, wide, "F32")
        else:
            _widen(raw, info, wide)
    if job.changes:
        with span("merge", wide.nbytes, info.name):
            for change in job.changes:
                _apply(change, info, start, wide, scratch)
    if job.decision.exponent:
        with np.errstate(over="ignore", under="ignore"):
            np.ldexp(wide, job.decision.exponent, out=wide)
    return wide


def prepare(raw: Array, job: Job, count: int, scratch: Scratch) -> tuple[Call | None, Array] | None:
    """Return the kernel's call that makes the weights, and where they will be; None if only `widened` can make them.

    Args:
        raw, job, scratch: see widened; the bytes need not be there yet.
        count: of the weights.
    """
    info = job.info
    if job.kind.as_stored:
        found = _elements(raw, info)
        return (None, found) if found.flags.aligned else None
    if not info.is_block or job.changes or job.decision.exponent:
        return None
    wide = scratch.array("weights", np.float32, count)
    return blocks.prepare(info.dtype, raw, wide, "F32"), wide


def _elements(raw: Array, info: TensorInfo) -> Array:
    return raw.view(np.uint16 if info.dtype == "BF16" else array_dtype(info.dtype))


def _widen(piece: Array, info: TensorInfo, out: Array) -> None:
    merge.widen(_elements(piece, info), info.dtype, out)


def _apply(change: Change, info: TensorInfo, start: int, wide: Array, scratch: Scratch) -> None:
    """Change one tile of a weight."""
    if change.kind == PRODUCT:
        for rows, columns, weights in _rectangles(info, start, wide):
            _add_product(change, info, rows, columns, weights, scratch)
        return
    other = change.source.tensors[change.tensors[0]]
    if info.transposed != change.transposed:
        # a matrix that one file has the other way round: these are small, and are turned whole
        whole = np.empty(other.size, np.float32)
        _widen(change.source.piece(other, 0, other.size), other, whole)
        turned = whole.reshape(*info.shape[:-2], info.shape[-1], info.shape[-2]).swapaxes(-1, -2).reshape(-1)
        given = turned[start : start + wide.size]
    else:
        given = scratch.array("adapter", np.float32, wide.size)
        _widen(change.source.piece(other, start, start + wide.size), other, given)
    if change.kind == DIFFERENCE:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            wide += np.float32(change.scale) * given
    else:
        wide[...] = given


def _rectangles(info: TensorInfo, start: int, wide: Array) -> Iterator[tuple[range, range, Array]]:
    """Cut a flat tile into rectangles of its weight: the rest of a row, whole rows, the beginning of one."""
    width = info.size // info.shape[0]
    position, end = start, start + wide.size
    while position < end:
        row, column = divmod(position, width)
        if column or end - position < width:
            stop = min(end, (row + 1) * width)
            rows, columns = range(row, row + 1), range(column, column + stop - position)
        else:
            rows, columns = range(row, end // width), range(width)
            stop = rows.stop * width
        yield rows, columns, wide[position - start : stop - start].reshape(len(rows), len(columns))
        position = stop


def _add_product(
    change: Change, info: TensorInfo, rows: range, columns: range, weights: Array, scratch: Scratch
) -> None:
    """Add a part of a product to a rectangle of its weight, in pieces of bounded size."""
    (down, down_dtype), (up, up_dtype) = (_matrix(change.source, name) for name in change.tensors)
    if change.turned:
        down = down.T
    # W + B @ A; where the weight stands the other way round, W + A' @ B'
    if change.transposed == info.transposed:
        left, left_dtype, right, right_dtype = up, up_dtype, down, down_dtype
    else:
        left, left_dtype, right, right_dtype = down.T, down_dtype, up.T, up_dtype
    rank = left.shape[1]
    high = max(1, _PIECE // rank)
    broad = max(1, _PIECE // rank)
    for first in range(0, len(columns), broad):
        strip = columns[first : first + broad]
        packed_right = _packed(right[:, strip.start : strip.stop], right_dtype, "right", scratch)
        for top in range(0, len(rows), high):
            band = rows[top : top + high]
            packed_left = _packed(left[band.start : band.stop], left_dtype, "left", scratch)
            part = weights[top : top + len(band), first : first + len(strip)]
            merge.add_product(part, packed_left, packed_right, change.scale)


def _matrix(source: Source, name: str) -> tuple[Array, str]:
    """Return one of an adapter's tensors as a matrix [first axis, rest], bfloat16 as uint16, and its type."""
    info = source.tensors[name]
    flat = source.piece(info, 0, info.size).view(np.uint16 if info.dtype == "BF16" else array_dtype(info.dtype))
    return flat.reshape(info.shape[0], -1), info.dtype


def _packed(values: Array, dtype: str, slot: str, scratch: Scratch) -> Array:
    """Return a matrix as contiguous float32."""
    out = scratch.array(slot, np.float32, values.size)
    merge.widen(np.ascontiguousarray(values).reshape(-1), dtype, out)
    return out.reshape(values.shape)
