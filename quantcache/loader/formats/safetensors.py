"""Read safetensors headers, and find the shards of a split checkpoint. Knows no pipeline.

Source: the format's specification (safetensors 0.8 README); stricter than the library in one point: a key that
stands twice in the header is refused, since readers disagree on which one counts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NoReturn

from quantcache.errors import SourceError, shorten
from quantcache.loader.mapping import MappedFile
from quantcache.loader.source import Format, Header, register
from quantcache.tensor import ITEMSIZE, TensorInfo

#: A header of 20,000 tensors has 3 MB. The library's limit is 100 MB, which parses into a gigabyte.
MAX_HEADER = 32 << 20
MAX_INDEX = 64 << 20
#: JSON values in a header or an index: 58,000 tensors. A value of three bytes may take a hundred as a Python object.
MAX_VALUES = 1 << 19
#: Possessive, so that nothing is kept to go back to; a text without an end is taken to the end, and not tried again.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_FIELDS = {"dtype", "shape", "data_offsets"}
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors")


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing a key that stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return found


def _count_values(text: bytes) -> int:
    """Return a bound on the number of values in a JSON text, from its commas and opening brackets."""
    count = sum(map(text.count, (b",", b"[", b"{")))
    return count if count <= MAX_VALUES else sum(map(_STRING.sub(b"", text).count, (b",", b"[", b"{")))


def _load_json(text: bytes, path: Path, what: str, start: int = 0) -> Any:
    if _count_values(text) > MAX_VALUES:
        raise SourceError(f"{what} has more than {MAX_VALUES} values", path=path, offset=start)
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if b"\\u" in text:  # an escape can smuggle in half a character, which no name can hold
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{what} is not UTF-8", path=path, offset=start + error.start) from error
    except UnicodeEncodeError as error:
        raise SourceError(f"{what} holds half a character (a lone surrogate)", path=path, offset=start) from error
    except _DuplicateKeyError as error:
        raise SourceError(f"{what} has the name {shorten(str(error))} twice", path=path) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{what} is not JSON: {str(error)[:120] or 'nested too deeply'}", path=path) from error
    return found


@register
class Safetensors(Format):
    """`.safetensors` and RWKV's `.st`."""

    id = "safetensors"
    suffixes = (".safetensors", ".st")
    plain = True

    def recognizes(self, head: bytes) -> bool:
        """Look for a length and the opening brace of a JSON object."""
        return len(head) > 8 and head[8:9] == b"{"

    def parse(self, file: MappedFile) -> Header:
        """Check that the tensors fill the data section without a hole or an overlap, as the format demands."""
        length = int.from_bytes(file.bytes[:8].tobytes(), "little")
        if length > file.nbytes - 8:
            raise SourceError(
                f"the header claims {length} bytes, the file has {file.nbytes - 8} after the length (truncated?)",
                path=file.path,
                offset=0,
            )
        if length > MAX_HEADER:
            raise SourceError(f"the header claims {length} bytes, the limit is {MAX_HEADER}", path=file.path, offset=0)
        file.bring(8, length)
        header = _load_json(file.bytes[8 : 8 + length].tobytes(), file.path, "the header", 8)
        if not isinstance(header, dict):
            raise SourceError("the header is not a JSON object", path=file.path, offset=8)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise SourceError("__metadata__ is not an object of strings", path=file.path, offset=8)
        start = 8 + length
        tensors = sorted(
            (_tensor(file.path, name, entry, start) for name, entry in header.items()),
            key=lambda info: (info.offset, info.nbytes),
        )
        position = start
        for info in tensors:
            if info.offset != position:
                what = "overlaps the one before it" if info.offset < position else "leaves a hole before it"
                raise SourceError(
                    f"{what}: starts {abs(info.offset - position)} bytes off",
                    path=file.path,
                    tensor=info.name,
                    offset=info.offset,
                )
            position += info.nbytes
        if position > file.nbytes:
            last = tensors[-1]
            raise SourceError(
                f"ends at byte {position}, the file at {file.nbytes} (truncated?)",
                path=file.path,
                tensor=last.name,
                offset=last.offset,
            )
        if position < file.nbytes:
            raise SourceError(
                f"{file.nbytes - position} bytes after the last tensor belong to none", path=file.path, offset=position
            )
        return Header(tuple(tensors), metadata)

    def shards(self, path: Path) -> list[Path] | None:
        """Follow `model.safetensors.index.json`, or a complete set of `-00001-of-0000N` files."""
        if path.is_dir() and _index_of(path) is None:
            return _split_set(sorted(path.glob("*.safetensors")))
        path = _index_of(path) or path
        if not path.name.endswith(".index.json"):
            return None
        return [path.parent / name for name in sorted(set(_weight_map(path).values()))]

    def check_names(self, path: Path, held: Mapping[Path, Container[str]]) -> None:
        """Find every tensor of the index in the shard that the index names."""
        path = _index_of(path) or path
        if not path.name.endswith(".index.json"):
            return
        files = {file.name: file for file in held}
        for name, shard in _weight_map(path).items():
            if shard not in files or name not in held[files[shard]]:  # the index may have changed since its files were opened
                raise SourceError(f"the index {path.name} puts it here, but it is not", path=path.parent / shard, tensor=name)


def _index_of(folder: Path) -> Path | None:
    """Return a folder's index; `model.safetensors.index.json` if there are several."""
    indexes = sorted(folder.glob("*.safetensors.index.json")) if folder.is_dir() else []
    preferred = [index for index in indexes if index.name == "model.safetensors.index.json"]
    return next(iter(preferred or indexes), None)


def _are_sizes(found: Any) -> bool:
    """Return whether that is a list of numbers that fit 63 bits; a model has thousands of these lists."""
    if not isinstance(found, list):
        return False
    for number in found:  # noqa: SIM110 - a generator takes three times as long
        if type(number) is not int or not 0 <= number < 1 << 63:
            return False
    return True


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """Check one header entry."""

    def refuse(message: str) -> NoReturn:
        raise SourceError(message, path=path, tensor=name, offset=8)

    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        refuse("its entry must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        refuse(f"unknown element type {shorten(str(dtype), 40)}")
    if not _are_sizes(shape) or len(shape) > 64:
        refuse("its shape is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        refuse("its data_offsets are not two positions")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    # NumPy refuses it even if one size is 0
    if (nbytes or math.prod(max(n, 1) for n in shape) * ITEMSIZE[dtype]) >= 1 << 63:
        refuse(f"its shape {shape} overflows")
    if end - begin != nbytes:
        refuse(f"{dtype} {shape} needs {nbytes} bytes, its data_offsets span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), start + begin, nbytes)


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index: tensor -> file name. A name that leads elsewhere is refused: no name becomes a path."""
    try:
        if not index.is_file():  # a FIFO would wait for a writer
            raise SourceError("not a regular file", path=index)
        if index.stat().st_size > MAX_INDEX:
            raise SourceError(f"an index of more than {MAX_INDEX} bytes", path=index)
        content = _load_json(index.read_bytes(), index, "the index")
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", path=index) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("has no weight_map", path=index)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise SourceError(f"names the file {shorten(str(shard))}, which is not beside it", path=index, tensor=name)
        if not shard.endswith(".safetensors"):
            raise SourceError(f"names the file {shorten(shard)}, which is not safetensors", path=index, tensor=name)
    return weight_map


def _split_set(files: list[Path]) -> list[Path] | None:
    """Return a complete set of split files, or None if these are not one."""
    parts = [_SPLIT.fullmatch(file.name) for file in files]
    if not files or not all(parts):
        return None
    sets = {(part["stem"], int(part["parts"])) for part in parts if part}
    if len(sets) != 1:
        return None
    stem, count = sets.pop()
    present = {int(part["part"]) for part in parts if part}
    missing = [number for number in range(1, count + 1) if number not in present] if count < 100_000 else []
    if missing:
        name = f"{stem}-{missing[0]:05d}-of-{count:05d}.safetensors"
        raise SourceError(f"{len(missing)} of {count} files are missing, the first is {name}", path=files[0].parent)
    return files
