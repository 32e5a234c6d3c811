"""Read GGUF headers, versions 2 and 3. Knows no pipeline and decodes no block.

Arrays are skipped, not built: a vocabulary of 150,000 strings costs one pass over their lengths and no Python object
a string. `ArrayValue` reads one when it is asked for.
Source: ggml's docs/gguf.md; llama.cpp's verdicts on its own test files.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from quantcache.errors import SourceError, shorten
from quantcache.loader.mapping import MappedFile
from quantcache.loader.source import Format, Header, register
from quantcache.tensor import TensorInfo

#: GGML type number -> name, weights in a block, bytes of a block. Element types go by their safetensors names.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}  # fmt: skip

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_NAME = 64  # ggml's own limit, the closing 0 included
MAX_KEY = (1 << 16) - 1
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_WIDTH = {kind: struct.calcsize(f"<{code}") for kind, code in _SCALAR.items()}
_MAX_NESTING = 4


class _Reader:
    """Walk a header with a bound on every step."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.memory, self.end = file, file.memory, file.nbytes
        self.position = 0

    def refuse(self, message: str, *, tensor: str | None = None) -> NoReturn:
        raise SourceError(message, path=self.file.path, tensor=tensor, offset=self.position)

    def number(self, code: str, what: str) -> Any:
        width = struct.calcsize(f"<{code}")
        if self.position + width > self.end:
            self.refuse(f"the file ends inside {what} (truncated?)")
        (value,) = struct.unpack_from(f"<{code}", self.memory, self.position)
        self.position += width
        return value

    def text(self, what: str, limit: int, errors: str = "strict") -> str:
        length = self.number("Q", f"the length of {what}")
        if length > limit:
            self.refuse(f"{what} claims {length} bytes, the limit is {limit}")
        if self.position + length > self.end:
            self.refuse(f"{what} claims {length} bytes, the file has {self.end - self.position} more (truncated?)")
        raw = bytes(self.memory[self.position : self.position + length])
        try:
            found = raw.decode("utf-8", errors)
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8")
        self.position += length
        return found

    def skip(self, kind: int, count: int, what: str, nesting: int = 0) -> None:
        """Step over `count` values of a type."""
        if kind in _WIDTH:
            if count * _WIDTH[kind] > self.end - self.position:
                self.refuse(f"{what} claims {count} values, the file ends before them (truncated?)")
            self.position += count * _WIDTH[kind]
            return
        if count * 8 > self.end - self.position:
            self.refuse(f"{what} claims {count} values, the file ends before them (truncated?)")
        if kind == _STRING:
            length_at = struct.Struct("<Q").unpack_from
            memory, position = self.memory, self.position
            try:
                for _ in range(count):
                    position += 8 + length_at(memory, position)[0]
            except (struct.error, OverflowError):
                position = self.end + 1
            if position > self.end:
                self.refuse(f"a string of {what} ends behind the file (truncated?)")
            self.position = position
        elif kind == _ARRAY and nesting < _MAX_NESTING:
            for _ in range(count):
                inner = self.number("I", f"the element type of {what}")
                self.skip(inner, self.number("Q", f"the length of {what}"), what, nesting + 1)
        else:
            self.refuse(f"{what} has the unknown value type {kind}")


@dataclass(frozen=True)
class ArrayValue:
    """Stand for an array in the header until somebody asks for it.

    Args:
        file: that it stands in.
        kind: GGUF's number of the element type.
        count: of elements.
        offset: of the first element.
    """

    file: MappedFile
    kind: int
    count: int
    offset: int

    def __len__(self) -> int:
        """Return the number of elements."""
        return self.count

    def read(self) -> list[Any]:
        """Build the elements: numbers, or bytes for strings (vocabularies are not always UTF-8)."""
        reader = _Reader(self.file)
        reader.position = self.offset
        return _values(reader, self.kind, self.count)


def _values(reader: _Reader, kind: int, count: int) -> list[Any]:
    if kind in _SCALAR:
        found = struct.unpack_from(f"<{count}{_SCALAR[kind]}", reader.memory, reader.position)
        reader.position += count * _WIDTH[kind]
        return list(found)
    built: list[Any] = []
    for _ in range(count):
        if kind == _STRING:
            length = reader.number("Q", "a string")
            built.append(bytes(reader.memory[reader.position : reader.position + length]))
            reader.position += length
        else:
            inner = reader.number("I", "an array")
            built.append(_values(reader, inner, reader.number("Q", "an array")))
    return built


@register
class Gguf(Format):
    """`.gguf`."""

    id = "gguf"
    suffixes = (".gguf",)

    def recognizes(self, head: bytes) -> bool:
        """Look for the magic."""
        return head[:4] == b"GGUF"

    def parse(self, file: MappedFile) -> Header:
        """Read keys and tensor descriptions; tensors may lie behind the end of a cut file, `Source.check` says so."""
        reader = _Reader(file)
        reader.position = 4
        version = reader.number("I", "the version")
        if version not in (2, 3):
            reader.position = 4
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            big = " (a big-endian file)" if swapped in (2, 3) else ""
            reader.refuse(f"GGUF version {version}{big}; 2 and 3 can be read")
        tensor_count = reader.number("Q", "the number of tensors")
        key_count = reader.number("Q", "the number of keys")
        if tensor_count > MAX_TENSORS:
            reader.refuse(f"the header claims {tensor_count} tensors, the limit is {MAX_TENSORS}")
        if key_count > MAX_KEYS:
            reader.refuse(f"the header claims {key_count} keys, the limit is {MAX_KEYS}")
        metadata = _metadata(reader, key_count)
        alignment = metadata.get("general.alignment", 32)
        described = [_tensor(reader, alignment) for _ in range(tensor_count)]
        seen: set[str] = set()
        for name, *_ in described:
            if name in seen:
                reader.refuse("stands in the header twice", tensor=name)
            seen.add(name)
        start = -(-reader.position // alignment) * alignment
        expected = 0
        tensors = []
        for name, dtype, shape, nbytes, offset in described:
            if offset != expected:
                reader.refuse(f"its offset is {offset}, the tensors before it end at {expected}", tensor=name)
            expected += -(-nbytes // alignment) * alignment
            if expected >= 1 << 63:
                reader.refuse("the tensors' sizes overflow", tensor=name)
            tensors.append(TensorInfo(name, dtype, shape, start + offset, nbytes))
        return Header(tuple(tensors), metadata)


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    """Read the keys; arrays stay where they are."""
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = reader.text("a key", MAX_KEY)
        if not key:
            reader.refuse("a key is empty")
        if key in metadata:
            reader.refuse(f"the key {shorten(key)} stands there twice")
        kind = reader.number("I", f"the type of {shorten(key)}")
        what = f"the value of {shorten(key)}"
        if kind in _SCALAR:
            metadata[key] = reader.number(_SCALAR[kind], what)
        elif kind == _STRING:
            metadata[key] = reader.text(what, reader.end, "backslashreplace")  # llama.cpp takes any bytes here
        elif kind == _ARRAY:
            inner, length = reader.number("I", what), reader.number("Q", what)
            metadata[key] = ArrayValue(reader.file, inner, length, reader.position)
            reader.skip(inner, length, what)
        else:
            reader.refuse(f"{what} has the unknown type {kind}")
        if key == "general.alignment":
            alignment = metadata[key]
            if kind != _UINT32 or alignment == 0 or alignment & (alignment - 1):
                reader.refuse(f"general.alignment is {alignment!r}, not a power of two (uint32)")
    return metadata


def _tensor(reader: _Reader, alignment: int) -> tuple[str, str, tuple[int, ...], int, int]:
    """Read and check one tensor's description: name, type, shape, bytes, offset in the data section."""
    name = reader.text("a tensor's name", MAX_NAME - 1)
    dimensions = reader.number("I", f"tensor {shorten(name)}")
    if dimensions > 4:
        reader.refuse(f"has {dimensions} dimensions, GGUF allows 4", tensor=name)
    sizes = [reader.number("q", f"tensor {shorten(name)}") for _ in range(dimensions)]
    if any(size < 0 for size in sizes):
        reader.refuse(f"has a negative size in {sizes}", tensor=name)
    kind = reader.number("I", f"tensor {shorten(name)}")
    offset = reader.number("Q", f"tensor {shorten(name)}")
    if kind not in TYPES:
        reader.refuse(f"has the unknown GGML type {kind}", tensor=name)
    dtype, block, block_nbytes = TYPES[kind]
    row = sizes[0] if sizes else 1
    if row % block:
        reader.refuse(f"{dtype} needs rows of whole blocks of {block}, a row has {row}", tensor=name)
    if offset % alignment:
        reader.refuse(f"its offset {offset} is not a multiple of the alignment {alignment}", tensor=name)
    nbytes = math.prod(sizes) // block * block_nbytes
    # a size of 0 hides nothing: NumPy refuses a shape whose other sizes overflow
    widest = math.prod(max(size, 1) for size in sizes) * (block_nbytes if block == 1 else 1)
    if widest >= 1 << 63 or nbytes >= 1 << 63:
        reader.refuse(f"its shape {sizes} overflows", tensor=name)
    return name, dtype, tuple(reversed(sizes)), nbytes, offset
