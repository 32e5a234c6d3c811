"""Own tensors on a GPU: which parts a tensor has there, and where they stand in buffers that many tensors share. Moves no bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from quantcache.errors import CodecError, DeviceError
from quantcache.loader.gpu.device import Binding, Device
from quantcache.quant.blocks import block_type, block_types
from quantcache.quant.codec import codec, codec_ids
from quantcache.quant.wgsl import WeightShader
from quantcache.tensor import PartSize

__all__ = ["GpuTensor", "Home", "Span", "padded_nbytes", "place", "row_chunks"]

#: Bytes of a buffer that several tensors share: wgpu takes memory by blocks of 256 MB, of which smaller buffers waste little,
#: and larger ones have memory of their own.
_SHARED = 64 << 20


class _Place:
    """Hold where a tensor's parts stand, until its home is closed: who holds the tensor then holds no memory by it."""

    __slots__ = ("nbytes", "pieces")

    def __init__(self, pieces: Mapping[str, tuple[Binding, ...]]) -> None:
        self.pieces: Mapping[str, tuple[Binding, ...]] | None = pieces
        self.nbytes = sum(size for found in pieces.values() for _, _, size in found)


class Home:
    """Hold the buffers of a group of tensors, and whether they may still be used."""

    def __init__(self) -> None:
        self.buffers: list[Any] = []
        self.own: list[Any] = []  # those that nobody else made
        self.places: list[_Place] = []  # of each tensor, which somebody may still hold
        self.nbytes = 0
        self.closed = False

    def share(self, places: Iterable[Binding]) -> None:
        """Take what stands in buffers that somebody else made, too."""
        known = {id(buffer) for buffer in self.buffers}
        for buffer, _, nbytes in places:
            if id(buffer) not in known:
                known.add(id(buffer))
                self.buffers.append(buffer)
            self.nbytes += nbytes

    def close(self) -> None:
        """Let go of the buffers: whoever has one still has it, and the tensors say that they are closed."""
        self.closed = True
        self.buffers, self.own = [], []
        for place in self.places:
            place.pieces = None


@dataclass(frozen=True)
class GpuTensor:
    """Hold one tensor on a GPU.

    Args:
        codec: the codec's id; of plain weights "f16"; of GGUF blocks their type, "Q4_K".
        shape: of the weights, rows first.
        dtypes: part -> element type of what is stored.
        device: where it is.
        home: its buffers.
    """

    codec: str
    shape: tuple[int, ...]
    dtypes: Mapping[str, str]
    device: Device = field(repr=False)
    home: Home = field(repr=False)
    _place: Any = field(repr=False)

    def __post_init__(self) -> None:
        """Put the place where the buffers' owner can let go of it."""
        if not isinstance(self._place, _Place):  # else it is a changed copy of another tensor
            object.__setattr__(self, "_place", _Place(self._place))
            self.home.places.append(self._place)

    @property
    def pieces(self) -> Mapping[str, tuple[Binding, ...]]:
        """Part -> (buffer, first byte, bytes), one after the other: several where one buffer does not take the part.

        Raises:
            DeviceError: the model was closed, or the layer left, and is written over.
        """
        found: Mapping[str, tuple[Binding, ...]] | None = self._place.pieces
        if found is None or self.home.closed:
            raise DeviceError("this tensor's model was closed, or its layer left")
        return found

    @property
    def parts(self) -> dict[str, Binding]:
        """Part -> (buffer, first byte, bytes).

        Raises:
            DeviceError: the model was closed, or a part is split over several buffers.
        """
        for name, found in self.pieces.items():
            if len(found) > 1:
                raise DeviceError(
                    f"{name} is split over {len(found)} buffers: this device takes {self.device.max_buffer:,} bytes in one",
                    hint="use .pieces, or qc.gpu.matvec, which does",
                )
        return {name: found[0] for name, found in self.pieces.items()}

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        found: int = self._place.nbytes
        return found

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 of a vector or a scalar."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def width(self) -> int:
        """Weights in a row."""
        return math.prod(self.shape) // max(1, self.rows)

    @property
    def shader(self) -> WeightShader:
        """How a shader gets at the weights.

        Raises:
            CodecError: no shader here does.
        """
        return _shader(self.codec, frozenset(self.dtypes.items()))


@cache
def _shader(name: str, dtypes: frozenset[tuple[str, str]]) -> WeightShader:
    """Return the shader of a codec or a block type; the same object each time: every product asks for it."""
    found = None
    if name in codec_ids():
        found = codec(name).weight_shader(dict(dtypes))
    elif name in block_types():
        found = block_type(name).weight_shader
    if found is None:
        what = next(iter(dict(dtypes).values())) if name == "f16" else name
        raise CodecError(f"no shader here decodes {what}", hint="nf4, nf4-dq, int8, int8-row, f16, Q8_0, Q4_0, Q4_K, Q5_K and Q6_K have one")
    return found


def row_chunks(tensor: GpuTensor, shader: WeightShader) -> list[tuple[range, dict[str, Binding]]]:
    """Cut a tensor into runs of rows whose parts can each be bound as one.

    Args:
        tensor: any.
        shader: says which parts are bound, and whether by rows.

    Returns:
        (rows, part -> binding), in order.

    Raises:
        DeviceError: a row is larger than the device binds.
    """
    device, rows, names = tensor.device, max(1, tensor.rows), tuple(shader.parts)
    sizes = {name: sum(size for _, _, size in tensor.pieces[name]) for name in names}
    edges = {0, rows}
    step = 1
    for name in names:
        if sizes[name] % rows or not shader.by_rows:  # no whole bytes a row: bound whole or not at all
            step = rows
            continue
        row = sizes[name] // rows
        step = max(step, 1)
        step = math.lcm(step, device.alignment // math.gcd(row, device.alignment)) if row else step
        position = 0
        for _, _, size in tensor.pieces[name]:
            position += size
            edges.add(position // row if row else rows)
    step = min(step, rows)
    largest = max(sizes.values(), default=0)
    most = rows if largest <= device.max_binding else device.max_binding * rows // largest // step * step
    found = []
    ordered = sorted(edges)
    for begin, end in itertools.pairwise(ordered):
        for start in range(begin, end, max(1, most)):
            part = range(start, min(start + max(1, most), end))
            bound = {name: _binding(tensor.pieces[name], sizes[name] * part.start // rows, sizes[name] * part.stop // rows) for name in names}
            if most < 1 or any(size > device.max_binding or offset % device.alignment for _, offset, size in bound.values()):
                raise DeviceError(f"{device.name} binds at most {device.max_binding:,} bytes at a time, and rows of this tensor do not fit that")
            found.append((part, bound))
    return found


def padded_nbytes(nbytes: int, device: Device) -> int:
    """Return the room that a part of so many bytes takes in a buffer that others share."""
    return device.aligned(max(nbytes, 4))


def _binding(pieces: Sequence[Binding], first: int, last: int) -> Binding:
    """Return where bytes of a part stand; they lie in one piece."""
    position = 0
    for buffer, offset, size in pieces:
        if position <= first and last <= position + size:
            return buffer, offset + first - position, last - first
        position += size
    raise DeviceError("rows of a tensor are split over two buffers")


@dataclass(frozen=True, slots=True)
class Span:
    """Say where bytes of a part go.

    Args:
        name, part: which.
        start, nbytes: which bytes of the part.
        buffer, offset: where they stand on the device.
        chunk: bytes that have a digest of their own, or 0.
    """

    name: str
    part: str
    start: int
    nbytes: int
    buffer: Any
    offset: int
    chunk: int = 0


def place(
    tensors: Mapping[str, tuple[int, Sequence[PartSize]]], device: Device, new: Callable[[int], Any], shared: int = 0
) -> tuple[Home, dict[str, dict[str, tuple[Binding, ...]]], list[Span]]:
    """Give the parts of a group of tensors their places, each at a multiple of the device's alignment.

    They stand in the order of their file, so that what is contiguous there mostly is on the device, and can be moved as one.

    Args:
        tensors: name -> rows and parts.
        device: says how large a buffer may be.
        new: makes a buffer of so many bytes.
        shared: bytes of a buffer that several tensors share; 0 for what wastes little.

    Returns:
        The buffers, name -> part -> bindings, and all that is to be written, in the order of the buffers.
    """
    home, align = Home(), device.alignment
    limit = min(device.max_buffer, shared or _SHARED)
    sizes: list[int] = []

    def room(nbytes: int) -> tuple[int, int]:
        padded = padded_nbytes(nbytes, device)
        if not sizes or sizes[-1] + padded > limit:
            sizes.append(0)
        start = sizes[-1]
        sizes[-1] += padded
        return len(sizes) - 1, start

    ordered = sorted(((name, rows, part) for name, (rows, parts) in tensors.items() for part in parts), key=lambda found: found[2].position)
    planned = [
        (name, part, [(*room(size), size) for size in _split(part.nbytes, rows, device.max_buffer, align)])
        for name, rows, part in ordered
    ]
    home.own = [new(size) for size in sizes]
    home.buffers = list(home.own)
    home.nbytes = sum(sizes)
    places: dict[str, dict[str, tuple[Binding, ...]]] = {name: {part.name: () for part in parts} for name, (_, parts) in tensors.items()}
    spans = []
    for name, part, pieces in planned:
        places[name][part.name] = tuple((home.buffers[buffer], offset, size) for buffer, offset, size in pieces)
        start = 0
        for buffer, offset, size in places[name][part.name]:
            spans.append(Span(name, part.name, start, size, buffer, offset, part.chunk))
            start += size
    return home, places, spans


def _split(nbytes: int, rows: int, most: int, align: int) -> list[int]:
    """Return the sizes of the pieces of a part: one, or as few as buffers demand, of whole rows."""
    if nbytes <= most:
        return [nbytes]
    row = nbytes // rows if nbytes % rows == 0 else align
    unit = math.lcm(row, align)
    if unit > most:
        unit = align
    each = most // unit * unit
    return [min(each, nbytes - start) for start in range(0, nbytes, each)]
