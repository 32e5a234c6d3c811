"""Own the contract of a codec, its registry, and the records that a codec fills in.

A codec is one folder under `codecs/`; its `__init__.py` defines a subclass of Codec and decorates it with
`@register`. Nothing else has to be changed for a new one. A codec never imports another codec.
"""

from __future__ import annotations

import enum
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from quantcache.errors import CodecError, UsageError
from quantcache.quant import native
from quantcache.quant.wgsl import EncodeShader, WeightShader
from quantcache.tensor import ITEMSIZE, array_dtype, output_for

__all__ = ["Arena", "Call", "Codec", "Encoder", "Part", "Scratch", "Status", "codec", "codec_ids", "import_codecs", "quantize", "register"]

Array = NDArray[Any]
_LINE = 64
#: a kernel's name, as native.kernel takes it, and its arguments
Call = tuple[Any, ...]


class Status(enum.IntFlag):
    """Say what a kernel met. The same numbers as in kernel.h."""

    OK = 0
    NONFINITE = 1
    F16_RANGE = 2
    F32_SCALES = 4
    BAD_CALL = 8


@dataclass(slots=True)  # a frozen one takes twice as long to make
class Part:
    """Describe one stored array of a quantized tensor; nobody changes it.

    Args:
        name: what callers see, as "codes".
        key: the tensor's name in the entry file, as other tools expect it.
        dtype: element type of the stored array.
        shape: of the stored array.
        weights: how many weights one stored element covers, if it is written tile by tile;
            0 if the encoder's finish() writes it whole.
    """

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    weights: int

    @property
    def nbytes(self) -> int:
        """Stored size."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class Scratch:
    """Keep a thread's buffers between tiles: fresh memory costs ten times as much as memory touched before."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def array(self, slot: str, dtype: Any, size: int) -> Array:
        """Return `size` elements; what they held before is lost.

        Args:
            slot: a name for the buffer; two arrays that live at the same time need two.
            dtype: of the elements.
            size: number of elements.
        """
        nbytes = np.dtype(dtype).itemsize * size
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[slot] = np.empty(nbytes, np.uint8)
        return buffer[:nbytes].view(dtype)

    def room(self, nbytes: int) -> tuple[Array, int, int]:
        """Return bytes for all that is made of a tile: in which array they are, from where on, and their address."""
        home = self.array("room", np.uint8, nbytes)
        return home, 0, native.address(home)


class Arena(Scratch):
    """Keep buffers for several tiles at a time: no array stands where another does, until all are let go together.

    Args:
        nbytes: of all arrays, most of the time; memory that is never touched costs nothing.
        allocate: returns uint8 of so many bytes; np.empty if None.
    """

    def __init__(self, nbytes: int, allocate: Callable[[int], Array] | None = None) -> None:
        super().__init__()
        self._nbytes, self._allocate = nbytes, allocate or (lambda nbytes: np.empty(nbytes, np.uint8))
        self._taken = self._missing = self._address = 0

    def clear(self) -> None:
        """Let go of all arrays."""
        self._nbytes = max(self._nbytes, self._taken + self._missing)
        self._taken = self._missing = 0

    def array(self, slot: str, dtype: Any, size: int) -> Array:
        """Return `size` elements that nobody else has, at a multiple of 64 bytes from each other."""
        nbytes = np.dtype(dtype).itemsize * size
        home, start, _ = self.room(nbytes)
        return home[start : start + nbytes].view(dtype)

    def room(self, nbytes: int) -> tuple[Array, int, int]:
        """Return bytes that nobody else has without making an array of them: in which one they are, from where on, and their address."""
        room, whole = -(-nbytes // _LINE) * _LINE, self._buffers.get("")
        if whole is None or (not self._taken and whole.nbytes < self._nbytes):
            whole = self._buffers[""] = self._allocate(self._nbytes)
            self._address = native.address(whole)
        start = self._taken
        if start + room > whole.nbytes:
            self._missing += room  # the next time there will be room for all
            home = np.empty(nbytes, np.uint8)
            return home, 0, native.address(home)
        self._taken += room
        return whole, start, self._address + start

    @property
    def taken(self) -> int:
        """Bytes of all arrays."""
        return self._taken


class Encoder(ABC):
    """Quantize one tensor, tile by tile, from several threads at once.

    Args:
        shape: of the weights.
        source_dtype: "F32", "F16" or "BF16" (what the tiles come as; BF16 as uint16).
    """

    #: the stored arrays, in the order in which callers see them
    parts: tuple[Part, ...]
    #: whether a part is made of all tiles: each tensor has an encoder of its own then. Of others, those of one type and shape share one,
    #: their tiles of one size are quantized by the same call but for addresses, and what finish() returns is the same for all.
    collects: bool = False

    def prepare(self, tile: Array, scratch: Scratch) -> tuple[Call | None, dict[str, Array]] | None:
        """Return the kernel's call that quantizes a tile, and the arrays that it fills.

        The call is None if the arrays need no kernel, and so is everything if there is none.

        Args:
            tile: flat weights; its length is a multiple of the codec's `multiple(shape)`, but for the last.
            scratch: buffers that the arrays may lie in.
        """
        return None

    @abstractmethod
    def reference(self, tile: Array) -> tuple[Status, dict[str, Array]]:
        """Quantize a tile in plain NumPy: the status and, if it is OK, what the kernel would fill."""

    def encode(self, tile: Array, start: int, scratch: Scratch) -> tuple[Status, dict[str, Array]]:
        """Quantize one tile.

        Args:
            tile, scratch: see prepare.
            start: index of the tile's first weight in the flattened tensor.

        Returns:
            The status and, if it is OK, name -> flat array for every part with `weights > 0`.
        """
        prepared = self.prepare(tile, scratch) if native.level() != "reference" else None
        if prepared is None:
            status, arrays = self.reference(tile)
        else:
            call, arrays = prepared
            status = Status(native.kernel(call[0])(*call[1:])) if call else Status.OK
        return status, dict(self.encoded(start, arrays)) if status == Status.OK else {}

    def encoded(self, start: int, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Take what a kernel, or another processor, made of a tile.

        Args:
            start: index of the tile's first weight.
            arrays: what prepare() or the codec's encode_shader names.

        Returns:
            What encode() returns.
        """
        return arrays

    def finish(self) -> dict[str, Array]:
        """Return name -> array for the parts that are written whole; called once, after the last tile."""
        return {}


class Codec(ABC):
    """Describe one way of storing weights. Instances have no state."""

    #: in keys, in entry files, and what users type
    id: ClassVar[str]
    #: raised whenever the stored bytes of the same weights change
    version: ClassVar[int] = 1
    #: the layouts to try in turn: if one refuses with F32_SCALES, the next is taken
    variants: ClassVar[tuple[str, ...]] = ("",)
    #: what a shader needs beside the stored parts, and is made of them: name -> element type and bytes
    shader_parts: ClassVar[Mapping[str, tuple[str, int]]] = MappingProxyType({})

    def parameters(self) -> dict[str, Any]:
        """Return what else of the codec belongs in the key document."""
        return {}

    @abstractmethod
    def bits_per_weight(self) -> float:
        """Return the stored size, statistics included, for a large tensor."""

    @abstractmethod
    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Return why a tensor of this shape cannot be stored so, or None."""

    @abstractmethod
    def multiple(self, shape: tuple[int, ...]) -> int:
        """Return the number of weights that tiles are made of."""

    def for_shader(self, parts: Mapping[str, Array]) -> dict[str, Array]:
        """Return what `shader_parts` names.

        Args:
            parts: of one tensor, which may be damaged.

        Raises:
            ValueError: nothing can be made of them.
        """
        return {}

    def weight_shader(self, dtypes: Mapping[str, str]) -> WeightShader | None:
        """Return how a GPU gets at the weights; None if it does not.

        Args:
            dtypes: part -> element type, of one tensor.
        """
        return None

    def encode_shader(self, shape: tuple[int, ...], variant: str) -> EncodeShader | None:
        """Return how a GPU quantizes a tensor; None if it does not.

        Args:
            shape: of the weights.
            variant: one of the codec's.
        """
        return None

    @abstractmethod
    def encoder(self, name: str, shape: tuple[int, ...], source_dtype: str, variant: str) -> Encoder:
        """Return the encoder of one tensor; its parts' keys are the name, without .weight at its end, and something that no name changes."""

    @abstractmethod
    def dequantize_into(self, parts: Mapping[str, Array], out: Array, dtype: str, *, fresh: bool = False) -> None:
        """Decode a whole tensor.

        Args:
            parts: name -> stored array.
            out: C-contiguous, of the weights' shape and of the type below; written.
            dtype: "F32", "F16" or "BF16".
            fresh: nobody has touched its memory yet.
        """

    def dequantize(
        self, parts: Mapping[str, Array], shape: tuple[int, ...], dtype: str, out: Array | None = None
    ) -> Array:
        """Decode a whole tensor, into a new array or a given one.

        Args:
            parts: name -> stored array.
            shape: of the weights.
            dtype: "F32", "F16" or "BF16".
            out: written and returned, if given; memory that was touched before is filled ten times as fast.

        Raises:
            UsageError: `out` has another shape or type, or is not contiguous and writable.
            CodecError: the parts are not those of a tensor of this shape.
        """
        self._check_parts(parts, shape)
        found = output_for(shape, dtype, out)
        self.dequantize_into(parts, found, dtype, fresh=out is None)
        return found

    def _check_parts(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> None:
        """Compare sizes and types with the layout: a kernel believes what it is told."""
        problem = ""
        for variant in self.variants:
            try:
                layout = self.encoder("X.weight", shape, "F32", variant).parts
            except (ValueError, IndexError) as error:
                raise CodecError(f"{self.id} does not store weights of shape {shape}") from error
            wanted = [p for p in layout if p.name in parts]
            wrong = [
                p for p in wanted
                if p.name != "quant_state"  # its length depends on the source's type
                and (parts[p.name].dtype != array_dtype(p.dtype) or parts[p.name].nbytes != p.nbytes)
            ]  # fmt: skip
            if not wrong:
                return
            part = wrong[0]
            problem = f"{part.name} must be {part.dtype} {part.shape}, not {parts[part.name].dtype} {parts[part.name].shape}"
        raise CodecError(f"not the parts of a {self.id} tensor of shape {shape}: {problem}")


_registry: dict[str, Codec] = {}
_C = TypeVar("_C", bound=type[Codec])


def register(cls: _C) -> _C:
    """Enter a codec class in the registry.

    Raises:
        CodecError: another codec has that id already; a registry that replaced it would change bytes silently.
    """
    if cls.id in _registry:
        raise CodecError(f"two codecs are called {cls.id!r}: {cls.__module__} and {type(_registry[cls.id]).__module__}")
    _registry[cls.id] = cls()
    return cls


@cache
def import_codecs() -> None:
    """Import every folder under `codecs/`, so that it registers what it has."""
    from quantcache.quant import codecs

    for module in pkgutil.iter_modules(codecs.__path__, f"{codecs.__name__}."):
        importlib.import_module(module.name)


def codec_ids() -> tuple[str, ...]:
    """Return the ids of all codecs, sorted."""
    import_codecs()
    return tuple(sorted(_registry))


def codec(codec_id: str) -> Codec:
    """Return the codec with that id.

    Raises:
        UsageError: there is none.
    """
    import_codecs()
    if codec_id not in _registry:
        raise UsageError(f"{codec_id!r} is not a codec", hint=f"one of: {', '.join(codec_ids())}, native")
    return _registry[codec_id]


def quantize(codec_id: str, weights: Array, name: str = "X.weight") -> tuple[Status, dict[str, Array]]:
    """Quantize an array that is in memory as a whole, for tools, tests and benchmarks.

    Args:
        codec_id: which codec.
        weights: float32, float16 or bfloat16 of any shape that the codec takes.
        name: the tensor's name, from which the parts' keys are made.

    Returns:
        The status and name -> stored array, shaped as stored; empty if the codec refused the values.

    Raises:
        CodecError: the codec does not take that shape.
        UsageError: the weights are of another type.
    """
    from quantcache.tensor import element_name

    chosen = codec(codec_id)
    reason = chosen.refuses(weights.shape)
    if reason:
        raise CodecError(f"{codec_id} cannot store {name}: {reason}")
    source_dtype = element_name(weights.dtype)
    if source_dtype not in ("F32", "F16", "BF16"):
        raise UsageError(f"{codec_id} cannot store {name}: weights are float32, float16 or bfloat16, not {weights.dtype}")
    flat = np.ascontiguousarray(weights).reshape(-1)
    if source_dtype == "BF16":
        flat = flat.view(np.uint16)
    status = Status.OK
    for variant in chosen.variants:
        encoder = chosen.encoder(name, weights.shape, source_dtype, variant)
        status, arrays = encoder.encode(flat, 0, Scratch())
        if status == Status.OK:
            arrays.update(encoder.finish())
            return status, {
                part.name: arrays[part.name].view(array_dtype(part.dtype)).reshape(part.shape) for part in encoder.parts
            }
        if status != Status.F32_SCALES:
            break
    return status, {}
