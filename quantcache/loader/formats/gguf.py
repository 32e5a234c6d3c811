"""Read GGUF headers, versions 2 and 3, both byte orders, whole or split. Knows no pipeline and decodes no block.

Arrays are skipped, not built: a vocabulary of 150,000 strings costs one pass over their lengths and no Python object
a string. `ArrayValue` reads one when it is asked for.
Source: ggml's docs/gguf.md; llama.cpp's verdicts on its own test files.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from quantcache.errors import SourceError, shorten
from quantcache.loader.mapping import MappedFile
from quantcache.loader.source import Format, Header, Source, model_files, register
from quantcache.tensor import TensorInfo, unit

#: GGML type number -> name. Element types go by their safetensors names.
TYPES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip

#: How the parts of a split file are called: number of the part, from 1, and of all parts.
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SPLIT_NUMBER, _SPLIT_COUNT, _SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16  # a tensor of 28 bytes in the header takes 500 as a Python object
MAX_NAME = 64  # ggml's own limit, the closing 0 included
MAX_KEY = (1 << 16) - 1
MAX_TEXT = 1 << 20  # bytes of all texts that are decoded: as Python's text they may take eight times as much
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_WIDTH = {kind: struct.calcsize(f"<{code}") for kind, code in _SCALAR.items()}
_MAX_NESTING = 4


class _Reader:
    """Walk a header with a bound on every step.

    Args:
        file: to read.
        order: "<" or ">", the byte order of every number.
        position: of the first byte.
    """

    def __init__(self, file: MappedFile, order: str = "<", position: int = 0) -> None:
        self.file, self.memory, self.end = file, file.memory, file.nbytes
        self.order, self.position = order, position

    def refuse(self, message: str, *, tensor: str | None = None) -> NoReturn:
        raise SourceError(message, path=self.file.path, tensor=tensor, offset=self.position)

    def number(self, code: str, what: str) -> Any:
        width = struct.calcsize(f"<{code}")
        if self.position + width > self.end:
            self.refuse(f"the file ends inside {what} (truncated?)")
        (value,) = struct.unpack_from(f"{self.order}{code}", self.memory, self.position)
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
            length_at = struct.Struct(f"{self.order}Q").unpack_from
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
        order: of its bytes, "<" or ">".
    """

    file: MappedFile
    kind: int
    count: int
    offset: int
    order: str = "<"

    def __len__(self) -> int:
        """Return the number of elements."""
        return self.count

    def read(self) -> list[Any]:
        """Build the elements: numbers, bytes for strings (vocabularies are not always UTF-8), lists for arrays."""
        return _values(_Reader(self.file, self.order, self.offset), self.kind, self.count)


def _values(reader: _Reader, kind: int, count: int) -> list[Any]:
    if kind in _SCALAR:
        found = struct.unpack_from(f"{reader.order}{count}{_SCALAR[kind]}", reader.memory, reader.position)
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
        reader = _Reader(file, position=4)
        version = reader.number("I", "the version")
        if version not in (2, 3):
            # big-endian files have the same magic and turn every number round, the version first
            reader = _Reader(file, ">", 4)
            if reader.number("I", "the version") not in (2, 3):
                reader.position = 4
                reader.refuse(f"GGUF version {version}; 2 and 3 can be read")
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
        tensors = tuple(_placed(reader, described, start, alignment))
        if not metadata.get(_SPLIT_COUNT):  # other parts may have tensors that can be read
            _check_types(tensors, file.path)
        return Header(tensors, metadata, big_endian=reader.order == ">")

    def shards(self, path: Path) -> list[Path] | None:
        """Return all parts of a split file, given one of them or their folder."""
        if path.is_dir():
            parts = [_PART.fullmatch(file.name) for file in model_files(path)]
            # another model beside a split one: the user has to say which
            if not parts or len({part and (part["stem"], part["count"]) for part in parts}) > 1 or parts[0] is None:
                return None
            found, folder = parts[0], path
        else:
            match = _PART.fullmatch(path.name)
            if match is None:
                return None  # check_shards sees to parts with other names
            found, folder = match, path.parent
        count = int(found["count"])
        if not 1 <= int(found["number"]) <= count:
            raise SourceError(f"part {int(found['number'])} of {count} cannot be", path=path)
        files = []
        for number in range(1, count + 1):
            file = folder / f"{found['stem']}-{number:05}-of-{count:05}.gguf"
            if not file.exists():
                raise SourceError(f"part {number} of {count} is missing", path=file, hint="all parts stand in one folder")
            files.append(file)
        return files

    def check_shards(self, path: Path, sources: Sequence[Source]) -> None:
        """Check that every part is the one that its name says, and that no tensor is missing."""
        if any(source.format != self.id for source in sources):
            return
        for position, source in enumerate(sources):
            count, number = (_number(source.metadata.get(key, default)) for key, default in ((_SPLIT_COUNT, 1), (_SPLIT_NUMBER, 0)))
            if (count, number) != (len(sources), position) and len(sources) > 1:
                raise SourceError(
                    f"says that it is part {number} + 1 of {count}, its name says {position + 1} of {len(sources)}",
                    path=source.path,
                )
            if count not in (0, len(sources)):
                raise SourceError(
                    f"is a part of {count}, and its name does not say where the others are",
                    path=source.path,
                    hint="parts are called NAME-00001-of-00003.gguf",
                )
        wanted = _number(sources[0].metadata.get(_SPLIT_TENSORS))
        found = sum(len(source.tensors) for source in sources)
        if len(sources) > 1 and wanted is not None and wanted != found:
            raise SourceError(f"the parts should have {wanted} tensors together, they have {found}", path=sources[0].path)
        _check_types([info for source in sources for info in source.tensors.values()], sources[0].path)


def _number(value: Any) -> Any:
    """Return what a key says, as a message can show it."""
    return f"{value.count} values" if isinstance(value, ArrayValue) else shorten(value) if isinstance(value, str) else value


def _check_types(tensors: Sequence[TensorInfo], path: Path) -> None:
    """Refuse a model of which nothing can be read, as llama.cpp does."""
    if tensors and not any(tensor.is_known for tensor in tensors):
        first = tensors[0]
        raise SourceError(
            f"has the unknown {first.dtype}, and no tensor has a known one", path=path, tensor=first.name, offset=first.offset
        )


#: Name, type, shape, bytes (None if the type is unknown) and offset in the data section.
_Described = tuple[str, str, tuple[int, ...], int | None, int]


def _placed(reader: _Reader, described: Sequence[_Described], start: int, alignment: int) -> Iterable[TensorInfo]:
    """Check that tensors stand one behind the other; one of an unknown type reaches to the next, or to the end."""
    expected = 0
    for position, (name, dtype, shape, nbytes, offset) in enumerate(described):
        if offset != expected:
            reader.refuse(f"its offset is {offset}, the tensors before it end at {expected}", tensor=name)
        if nbytes is None:
            following = described[position + 1][4] if position + 1 < len(described) else reader.end - start
            nbytes = following - offset
            if nbytes < 0:
                reader.refuse(f"has the unknown {dtype}, and what follows does not show its size", tensor=name)
            expected = following
        else:
            expected += -(-nbytes // alignment) * alignment
        if expected >= 1 << 63:
            reader.refuse("the tensors' sizes overflow", tensor=name)
        yield TensorInfo(name, dtype, shape, start + offset, nbytes)


def _metadata(reader: _Reader, count: int) -> dict[str, Any]:
    """Read the keys; arrays stay where they are."""
    metadata: dict[str, Any] = {}
    text_left = MAX_TEXT
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
            start = reader.position
            length = reader.number("Q", f"the length of {what}")
            if text_left < length <= reader.end - reader.position:  # stands where it is until it is asked for, as an array of one
                reader.position = start
                reader.skip(_STRING, 1, what)
                metadata[key] = ArrayValue(reader.file, _STRING, 1, start, reader.order)
            else:
                reader.position, text_left = start, text_left - length
                metadata[key] = reader.text(what, reader.end, "backslashreplace")  # llama.cpp takes any bytes here
        elif kind == _ARRAY:
            inner, length = reader.number("I", what), reader.number("Q", what)
            metadata[key] = ArrayValue(reader.file, inner, length, reader.position, reader.order)
            reader.skip(inner, length, what)
        else:
            reader.refuse(f"{what} has the unknown type {kind}")
        if key == "general.alignment":
            alignment = metadata[key]
            if kind != _UINT32 or alignment == 0 or alignment & (alignment - 1):
                reader.refuse(f"general.alignment is {alignment!r}, not a power of two (uint32)")
    return metadata


def _tensor(reader: _Reader, alignment: int) -> _Described:
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
    if offset % alignment:
        reader.refuse(f"its offset {offset} is not a multiple of the alignment {alignment}", tensor=name)
    if kind not in TYPES:
        if math.prod(max(size, 1) for size in sizes) >= 1 << 63:
            reader.refuse(f"its shape {sizes} overflows", tensor=name)
        return name, f"GGML type {kind}", tuple(reversed(sizes)), None, offset
    dtype = TYPES[kind]
    block, block_nbytes = unit(dtype)
    row = sizes[0] if sizes else 1
    if row % block:
        reader.refuse(f"{dtype} needs rows of whole blocks of {block}, a row has {row}", tensor=name)
    nbytes = math.prod(sizes) // block * block_nbytes
    # a size of 0 hides nothing: NumPy refuses a shape whose other sizes overflow
    widest = math.prod(max(size, 1) for size in sizes) * (block_nbytes if block == 1 else 1)
    if widest >= 1 << 63 or nbytes >= 1 << 63:
        reader.refuse(f"its shape {sizes} overflows", tensor=name)
    return name, dtype, tuple(reversed(sizes)), nbytes, offset
