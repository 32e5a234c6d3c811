"""Own the contract of GGML's block types and their registry: blocks in, weights out, nothing is ever encoded.

A family of types is one folder under `codecs/`; its `__init__.py` calls `register_family`, and nothing else has to be
changed for a new one. Knows no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.errors import CodecError
from quantcache.once import once
from quantcache.quant import native
from quantcache.quant.codec import Call, Status, import_codecs
from quantcache.quant.floats import from_f32
from quantcache.quant.wgsl import Dots, WeightShader, read
from quantcache.tensor import BLOCKS, output_for

__all__ = [
    "VERSION",
    "BlockShader",
    "BlockType",
    "block_type",
    "block_types",
    "decode",
    "dequantize",
    "prepare",
    "register_block",
    "register_family",
    "to_little_endian",
]

Array = NDArray[Any]
#: Raised whenever a decoder gives other weights than before; it is in the key of what was made from blocks.
VERSION = 1
#: structured array [n] of a type's layout -> float32 [n, weights of a block]
Reference = Callable[[Array], NDArray[np.float32]]
_NO_TABLES = np.zeros(1, np.uint64)


@dataclass(frozen=True)
class BlockShader:
    """Say which .wgsl files give a GPU the weights of a type.

    Args:
        files: beside those that all types share, as quantcache.quant.wgsl.read takes them.
        dots: see WeightShader.
        lines: blocks are whole sixteens of bytes, and are bound as such.
    """

    files: tuple[str, ...]
    dots: Dots | None = None
    lines: bool = False


@dataclass(frozen=True)
class BlockType:
    """Describe one block type.

    Args:
        name: GGML's name, a key of BLOCKS.
        kernel: the family's decoder, without prefix and level.
        number: of the type in that kernel.
        layout: the fields of one block, little-endian, without gaps.
        reference: decodes in plain NumPy.
        tables: what the kernel looks values up in; its comment says how they are laid out.
        shader: how a GPU gets at the weights; None if it does not.
    """

    name: str
    kernel: str
    number: int
    layout: np.dtype[Any]
    reference: Reference
    tables: Array | None = None
    shader: BlockShader | None = None

    @once  # what is made of a shader is kept by it
    def weight_shader(self) -> WeightShader | None:
        """How a GPU gets at the weights; None if it does not."""
        if self.shader is None:
            return None
        kind, words = ("array<vec4<u32>>", "lines.wgsl") if self.shader.lines else ("array<u32>", "words.wgsl")
        source = "".join(map(read, ("half.wgsl", "codes.wgsl", words, "blocks.wgsl", *self.shader.files)))
        return WeightShader({"blocks": kind}, source, dots=self.shader.dots)

    @once
    def pinned_tables(self) -> native.Pinned:
        """The tables as a kernel is given them; it reads none if there are none."""
        return native.Pinned(_NO_TABLES if self.tables is None else self.tables)

    @property
    def weights(self) -> int:
        """Weights in a block."""
        return BLOCKS[self.name][0]

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return BLOCKS[self.name][1]


_registry: dict[str, BlockType] = {}


def register_block(kind: BlockType) -> None:
    """Enter a block type in the registry.

    Raises:
        CodecError: it is there already, or its layout is not of the size that files have.
    """
    if kind.layout.itemsize != kind.nbytes:
        raise CodecError(f"a block of {kind.name} has {kind.nbytes} bytes, its layout {kind.layout.itemsize}")
    if kind.name in _registry:
        raise CodecError(f"two block types are called {kind.name}")
    _registry[kind.name] = kind


def register_family(
    kernel: str,
    types: Sequence[tuple[str, list[Any], Reference]],
    tables: Callable[[str], Array | None] = lambda _: None,
    shaders: Mapping[str, BlockShader] | None = None,
) -> None:
    """Enter the types of one folder.

    Args:
        kernel: the family's decoder.
        types: name, fields of a block as for np.dtype, reference; in the order of the kernel's numbers.
        tables: gives a type's tables.
        shaders: by type, of those that a GPU can decode.

    Raises:
        CodecError: as register_block.
    """
    for number, (name, fields, reference) in enumerate(types):
        register_block(BlockType(name, kernel, number, np.dtype(fields), reference, tables(name), (shaders or {}).get(name)))


def block_types() -> tuple[str, ...]:
    """Return the names of the block types that can be decoded, sorted."""
    import_codecs()
    return tuple(sorted(_registry))


def block_type(name: str) -> BlockType:
    """Return a block type.

    Raises:
        CodecError: nothing here decodes it.
    """
    import_codecs()
    if name not in _registry:
        raise CodecError(f"nothing here decodes {name}", hint=f"can be decoded: {', '.join(block_types())}")
    return _registry[name]


def decode(name: str, blocks: Array, out: Array, dtype: str) -> None:
    """Decode whole blocks: one rounding for each operation of the type's definition, then one to the element type.

    Args:
        name: of the type.
        blocks: uint8, contiguous, whole blocks.
        out: contiguous, as many elements as the blocks hold weights, of the type below; written.
        dtype: "F32", "F16" or "BF16" (as uint16 or bfloat16).

    Raises:
        CodecError: the type is unknown, or the sizes do not agree.
    """
    kind = block_type(name)
    count, rest = divmod(blocks.size, kind.nbytes)
    if rest or out.size != count * kind.weights:
        raise CodecError(f"{blocks.size} bytes of {name} are not {out.size} weights")
    flat = out.reshape(-1)
    if native.level() == "reference":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            decoded = kind.reference(blocks.reshape(-1).view(kind.layout)).reshape(-1)
            flat.view(f"u{flat.itemsize}")[...] = from_f32(decoded, dtype).view(f"u{flat.itemsize}")
        return
    call = prepare(name, blocks, flat, dtype)
    if native.kernel(call[0])(*call[1:]) != Status.OK:
        raise CodecError(f"the kernel {kind.kernel} does not know {name}")


def prepare(name: str, blocks: Array, out: Array, dtype: str) -> Call:
    """Return the kernel's call that decodes whole blocks; see decode, which checks what it is given."""
    kind = block_type(name)
    return kind.kernel, kind.number, native.contiguous(blocks), blocks.size // kind.nbytes, kind.pinned_tables, out, native.ELEMENT[dtype]


def dequantize(
    parts: Mapping[str, Array], name: str, shape: tuple[int, ...], dtype: str, out: Array | None = None
) -> Array:
    """Decode a whole tensor, into a new array or a given one.

    Args:
        parts: "blocks" -> uint8, the tensor's bytes.
        name: of the block type.
        shape: of the weights.
        dtype: "F32", "F16" or "BF16".
        out: written and returned, if given.

    Raises:
        CodecError: the type is unknown, or the blocks are not those of this shape.
        UsageError: `out` has another shape or type, or is not contiguous and writable.
    """
    out = output_for(shape, dtype, out)
    if math.prod(shape):
        decode(name, parts["blocks"], out, dtype)
    return out


def to_little_endian(name: str, blocks: Array) -> Array:
    """Return a copy of big-endian blocks with every field of several bytes turned round.

    Args:
        name: of the type.
        blocks: uint8, whole blocks.

    Raises:
        CodecError: nothing here knows the type's fields.
    """
    layout = block_type(name).layout
    turned = np.ascontiguousarray(blocks).reshape(-1).view(layout.newbyteorder(">")).astype(layout)
    return turned.view(np.uint8).reshape(blocks.shape)
