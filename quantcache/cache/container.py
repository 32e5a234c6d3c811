"""Own the entry file's format: a standard safetensors file whose metadata says what it is and how to check it.

::

    8 bytes      length of the header, little-endian
    header       JSON, padded with spaces so that the data starts at a multiple of 4,096
    data         tensors without holes; each starts at a multiple of its element size

The header's `__metadata__` (strings, as the format demands)::

    format             "pt": what transformers asks for
    quantcache         JSON: container, document (the key document), digests {tensor: [chunk, hex]}, records, built
    quantcache.header  XXH3-128 of length and header, with these 32 digits as zeros

A tensor's digest is the XXH3-128 over the XXH3-128 of its pieces of `chunk` bytes: the pieces are the tiles that were
quantized, so they are digested while they are hot, in any order, and checked on all cores. `records` and `built` belong
to the caller. Knows no file handle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantcache.cache.key import CONTAINER_VERSION, canonical, combine, digest
from quantcache.errors import CorruptEntryError, StoreTooNewError

__all__ = ["EntryHeader", "Slot", "arrange", "build_header", "parse_header", "reserve_header", "slot_digest"]

ALIGNMENT = 4096
MAX_HEADER = 256 << 20
_ITEMSIZE = {"U8": 1, "I8": 1, "BOOL": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
             "U64": 8, "I64": 8, "F64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
             "F8_E5M2FNUZ": 1}  # fmt: skip
_ZEROS = "0" * 32
#: What stands before a header's digest.
_STATED = b'"quantcache.header":"'
#: A tensor's share of a header beside its name, shape and chunk: a digest, two offsets of 13 digits, and JSON around them.
_ENTRY = 128


@dataclass(slots=True)  # a frozen one takes four times as long to make, and a hit makes hundreds
class Slot:
    """Describe one tensor of an entry file; nobody changes it.

    Args:
        key: its name in the file.
        dtype: element type.
        shape: of the stored array.
        chunk: bytes of a piece of the digest; at least 1.
        layer: where it stands: slots of one layer are contiguous.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunk: int
    layer: int = 0
    #: stored size; kept, since planning asks for it a dozen times a slot
    nbytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Find the size."""
        self.nbytes = math.prod(self.shape) * _ITEMSIZE[self.dtype]

    @property
    def chunks(self) -> int:
        """Number of pieces."""
        return -(-self.nbytes // self.chunk)


def arrange(slots: Iterable[Slot]) -> tuple[dict[str, int], int]:
    """Place slots without holes so that each starts at a multiple of 64 bytes, or at least of its element size.

    By layer: first whole pages, then what is a multiple of 64 bytes, by falling element size. Ragged ones (a bias of
    65 halves, a single byte) would misalign all that follow: they stand at the end of the file, by falling element size.

    Args:
        slots: in any order; it makes no difference, since threads may have planned some of them anew.

    Returns:
        key -> offset in the data section, and the section's length.
    """

    def place(slot: Slot) -> tuple[int, int, int, int, str]:
        itemsize, ragged = _ITEMSIZE[slot.dtype], slot.nbytes % 64 != 0 or slot.nbytes == 0
        if ragged:
            return 1, -itemsize, slot.layer, 0, slot.key
        return 0, slot.layer, int(slot.nbytes % ALIGNMENT != 0), -itemsize, slot.key

    offsets: dict[str, int] = {}
    position = 0
    for slot in sorted(slots, key=place):
        offsets[slot.key] = position
        position += slot.nbytes
    return offsets, position


@dataclass(frozen=True)
class EntryHeader:
    """Hold a checked header.

    Args:
        document: the key document.
        slots: key -> slot; offsets: key -> first byte in the file; digests: key -> hex.
        records, built: the caller's.
        nbytes: exact length of the file.
    """

    document: Any
    slots: Mapping[str, Slot]
    offsets: Mapping[str, int]
    digests: Mapping[str, str]
    records: Any
    built: Mapping[str, Any]
    nbytes: int


def build_header(
    slots: Iterable[Slot],
    digests: Mapping[str, str],
    *,
    document: Any,
    records: Any,
    built: Mapping[str, Any],
    length: int | None = None,
) -> bytearray:
    """Return length and header of an entry file.

    Args:
        slots: all tensors.
        digests: key -> hex.
        document: the key document.
        records: what the caller wants back with a hit.
        built: what it was built from, when and how.
        length: pad to exactly that many bytes in all; the next multiple of 4,096 if None.

    Raises:
        ValueError: it does not fit `length`.
    """
    slots = list(slots)
    offsets, _ = arrange(slots)
    own = {
        "container": CONTAINER_VERSION,
        "document": document,
        "digests": {slot.key: [slot.chunk, digests[slot.key]] for slot in slots},
        "records": records,
        "built": dict(built),
    }
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "quantcache": canonical(own), "quantcache.header": _ZEROS}
    }
    for slot in sorted(slots, key=lambda slot: (offsets[slot.key], slot.nbytes)):
        begin = offsets[slot.key]
        header[slot.key] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [begin, begin + slot.nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    header.clear()  # of 20,000 tensors, header and text take 20 MB each
    own.clear()
    if length is None:
        length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    if 8 + len(text) > length:
        raise ValueError(f"a header of {8 + len(text)} bytes does not fit {length}")
    whole = bytearray(b" ") * length
    whole[:8] = (length - 8).to_bytes(8, "little")
    whole[8 : 8 + len(text)] = text
    place = whole.index(_STATED + _ZEROS.encode()) + len(_STATED)
    whole[place : place + len(_ZEROS)] = digest(whole).hex().encode()
    return whole


def reserve_header(slots: Iterable[Slot], *, records: Any) -> int:
    """Return the length to keep free for a header whose digests, document and history are not known yet.

    Args:
        slots: as planned.
        records: as planned; what may be added to it later must fit the slack of 4 KiB and 1/16.
    """
    # from lengths alone, and of all slots at once: thousands of small steps take milliseconds that a caller waits for
    slots = list(slots)
    described = canonical(records)
    nbytes = len(described) + described.count('"') + described.count("\\")
    keys = "".join([slot.key for slot in slots])
    if keys.isascii() and keys.isprintable() and '"' not in keys and "\\" not in keys:
        nbytes += 2 * len(keys)
    else:
        nbytes += sum(len(json.dumps(slot.key)) + len(json.dumps(json.dumps(slot.key))) for slot in slots)
    nbytes += len(str([(slot.shape, slot.chunk) for slot in slots])) + _ENTRY * len(slots)
    return -(-(nbytes + nbytes // 16 + 4096 + 512) // ALIGNMENT) * ALIGNMENT


def parse_header(head: bytes, file_nbytes: int) -> EntryHeader:
    """Check an entry's header completely: its digest, version, offsets and the exact length of the file.

    Args:
        head: from the start of the file, at least the whole header.
        file_nbytes: length of the file.

    Raises:
        CorruptEntryError: anything is not as it was written.
        StoreTooNewError: a newer container version.
    """
    length = int.from_bytes(head[:8], "little")
    if not 8 + length <= len(head) or (8 + length) % ALIGNMENT:
        raise CorruptEntryError(f"the header's length {length} cannot be true")
    text = head[8 : 8 + length]
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        own = json.loads(metadata["quantcache"])
        stated = metadata["quantcache.header"]
        whole = bytearray(head[: 8 + length])
        place = whole.find(_STATED + stated.encode()) + len(_STATED)
        whole[place : place + len(_ZEROS)] = _ZEROS.encode()
        if digest(whole).hex() != stated:
            raise CorruptEntryError("the header is not the one that was written")
        if own["container"] > CONTAINER_VERSION:  # not before: a flipped bit would pass for a newer version
            raise StoreTooNewError(f"container version {own['container']}, this program reads {CONTAINER_VERSION}")
        slots, offsets, digests = {}, {}, {}
        position, described = 0, own["digests"]
        for key, entry in header.items():
            chunk, digests[key] = described[key]
            slots[key] = slot = Slot(key, entry["dtype"], tuple(entry["shape"]), chunk)
            begin, end = entry["data_offsets"]
            if begin != position or end - begin != slot.nbytes or chunk < 1:
                raise CorruptEntryError(f"tensor {key!r} is not where it must be")
            position = end
            offsets[key] = 8 + length + begin
        records, built, document = own["records"], own["built"], own["document"]
    except (CorruptEntryError, StoreTooNewError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptEntryError(f"the header cannot be read: {type(error).__name__}") from error
    if file_nbytes != 8 + length + position:
        raise CorruptEntryError(f"the file has {file_nbytes} bytes, its header describes {8 + length + position}")
    return EntryHeader(document, slots, offsets, digests, records, built, file_nbytes)


def slot_digest(memory: memoryview, slot: Slot, offset: int) -> str:
    """Return the digest of a tensor's bytes, in hex.

    Args:
        memory: the mapped entry file.
        slot: which tensor.
        offset: its first byte.
    """
    pieces = range(offset, offset + slot.nbytes, slot.chunk)
    end = offset + slot.nbytes
    return combine([digest(memory[start : min(start + slot.chunk, end)]) for start in pieces])
