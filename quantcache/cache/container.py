"""Own the entry file's format: a standard safetensors file whose metadata says what it is and how to check it.

::

    8 bytes      length of the header, little-endian
    header       JSON, padded with spaces so that the data starts at a multiple of 4,096
    data         tensors without holes; each starts at a multiple of its element size

The header's `__metadata__` (strings, as the format demands)::

    format             "pt": what transformers asks for
    quantcache         JSON: container, document (the key document), slots, records, built
    quantcache.header  XXH3-128 of length and header, with these 32 digits as zeros

`slots` says again what the rest of the header says of the tensors, and their digests, in columns in the order of the file: `keys`,
`kind` (an index into `kinds`, each [dtype, shape, chunk]) and `digests`, 32 hex digits a tensor without anything between. A hit reads
only that: with an object a tensor, JSON took most of its time (docs/decisions/0014-columns.md). Layout 1, which is still read, has
`digests` {tensor: [chunk, hex]} instead.

A tensor's digest is the XXH3-128 over the XXH3-128 of its pieces of `chunk` bytes: the pieces are the tiles that were
quantized, so they are digested while they are hot, in any order, and checked on all cores. `records` and `built` belong
to the caller. Knows no file handle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from quantcache.cache.key import DIGEST_NBYTES, Streamed, canonical, combine, digest
from quantcache.errors import CorruptEntryError, StoreTooNewError
from quantcache.once import once

__all__ = ["EntryHeader", "Slot", "arrange", "build_header", "is_verbatim", "parse_header", "reserve_header", "slot_digest", "stated_nbytes"]

#: How headers are laid out. Of a header of a later layout, this program says that it is newer, leaves it alone, and builds for itself.
LAYOUT = 2
ALIGNMENT = 4096
MAX_HEADER = 256 << 20
_ITEMSIZE = {"U8": 1, "I8": 1, "BOOL": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
             "U64": 8, "I64": 8, "F64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
             "F8_E5M2FNUZ": 1}  # fmt: skip
#: of an array in NumPy
_MAX_AXES = 64
_ZEROS = "0" * 32
#: What stands before our JSON in a header, and between it and the header's digest: within it, a backslash is before each quote.
_OPENS, _STATED = b'{"__metadata__":{"format":"pt","quantcache":"', b'","quantcache.header":"'
#: A tensor's share of a header beside its name and shape: a digest, a kind, two offsets of 13 digits, and JSON around them.
_ENTRY = 128
#: The same of a kind.
_KIND = 64


@dataclass(slots=True)  # a frozen one takes four times as long to make
class Slot:
    """Describe tensors of an entry file that are alike, but for their names; nobody changes it.

    Args:
        dtype: element type.
        shape: of the stored array.
        chunk: bytes of a piece of the digest; at least 1.
        layer: where it stands: slots of one layer are contiguous.
        nbytes: stored size, if it is known.
    """

    dtype: str
    shape: tuple[int, ...]
    chunk: int
    layer: int = 0
    nbytes: int = field(default=-1, compare=False)

    def __post_init__(self) -> None:
        """Find the size."""
        if self.nbytes < 0:
            self.nbytes = math.prod(self.shape) * _ITEMSIZE[self.dtype]

    @property
    def chunks(self) -> int:
        """Number of pieces."""
        return -(-self.nbytes // self.chunk)


def arrange(slots: Mapping[str, Slot], start: int = 0) -> tuple[dict[str, int], int]:
    """Place slots without holes so that each starts at a multiple of 64 bytes, or at least of its element size.

    By layer: first whole pages, then what is a multiple of 64 bytes, by falling element size. Ragged ones (a bias of
    65 halves, a single byte) would misalign all that follow: they stand at the end of the file, by falling element size.

    Args:
        slots: by key, in any order; it makes no difference, since threads may have planned some of them anew.
        start: where the data section begins: 0, or the length of the header.

    Returns:
        key -> offset, in the order of the file, and where the section ends; both from `start` on.
    """
    # what is alike is placed as one: thousands of small steps take milliseconds that a caller waits for
    placed: dict[tuple[int, int, int, int], list[str]] = {}
    keys_of: dict[int, list[str]] = {}
    for key, slot in slots.items():
        keys = keys_of.get(id(slot))
        if keys is None:
            keys = keys_of[id(slot)] = placed.setdefault(_place(slot), [])
        keys.append(key)
    offsets: dict[str, int] = {}
    position = start
    for place in sorted(placed):
        for key in sorted(placed[place]):
            offsets[key] = position
            position += slots[key].nbytes
    return offsets, position


def _place(slot: Slot) -> tuple[int, int, int, int]:
    """Return what comes before what in a file; what is equal is in the order of the keys."""
    itemsize, ragged = _ITEMSIZE[slot.dtype], slot.nbytes % 64 != 0 or slot.nbytes == 0
    return (1, -itemsize, slot.layer, 0) if ragged else (0, slot.layer, int(slot.nbytes % ALIGNMENT != 0), -itemsize)


class _Slots(Mapping[str, Slot]):
    """Find the slots of a header when they are asked for: a model has thousands, of which a caller may want one."""

    def __init__(self, header: EntryHeader) -> None:
        # not the header itself, which has this: both go when nobody has them, and not when Python looks for circles
        self._numbers, self._kind = header.numbers, header.kind
        self._slots = [Slot(*kind) for kind in header.kinds]

    def __getitem__(self, key: str) -> Slot:
        return self._slots[self._kind[self._numbers[key]]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


@dataclass(frozen=True, eq=False)
class EntryHeader:
    """Hold a checked header.

    Args:
        document: the key document.
        records, built: the caller's.
        nbytes: exact length of the file.
        keys: of the tensors, in the order of the file.
        kinds: dtype, shape and chunk of tensors.
        kind: for each tensor, an index into `kinds`.
        sizes: for each tensor, its bytes.
        places: for each tensor, its first byte in the file.
        wanted: for each tensor, its digest.
    """

    document: Any
    records: Any
    built: Mapping[str, Any]
    nbytes: int
    keys: Sequence[str]
    kinds: Sequence[tuple[str, tuple[int, ...], int]]
    kind: Sequence[int]
    sizes: Sequence[int]
    places: Sequence[int]
    wanted: bytes

    @once
    def numbers(self) -> dict[str, int]:
        """Place of each tensor in the columns."""
        return dict(zip(self.keys, range(len(self.keys)), strict=True))

    @once
    def slots(self) -> Mapping[str, Slot]:
        """Slots by key."""
        return _Slots(self)

    @once
    def offsets(self) -> dict[str, int]:
        """First byte in the file by key."""
        return dict(zip(self.keys, self.places, strict=True))

    def digest_of(self, key: str) -> str:
        """Return a tensor's digest, in hex."""
        start = DIGEST_NBYTES * self.numbers[key]
        return self.wanted[start : start + DIGEST_NBYTES].hex()


def build_header(
    slots: Mapping[str, Slot],
    digests: Mapping[str, str],
    *,
    document: Any,
    records: Any,
    built: Mapping[str, Any],
    length: int | None = None,
) -> bytearray:
    """Return length and header of an entry file.

    Args:
        slots: all tensors, by key.
        digests: key -> hex.
        document: the key document.
        records: what the caller wants back with a hit.
        built: what it was built from, when and how.
        length: pad to exactly that many bytes in all; the next multiple of 4,096 if None.

    Raises:
        ValueError: it does not fit `length`.
    """
    offsets, _ = arrange(slots)  # in their order
    placed = [slots[key] for key in offsets]
    kinds = {kind: number for number, kind in enumerate(dict.fromkeys(map(_kind, placed)))}
    numbers = [kinds[_kind(slot)] for slot in placed]
    own = {
        "container": LAYOUT,
        "document": document,
        "slots": {
            "keys": list(offsets),
            "kinds": list(kinds),
            "kind": numbers,
            "digests": "".join([digests[key] for key in offsets]),
        },
        "records": records,
        "built": dict(built),
    }
    metadata = {"format": "pt", "quantcache": canonical(own), "quantcache.header": _ZEROS}
    own.clear()  # of 20,000 tensors, every copy takes megabytes
    # as json.dumps would have it, which needs three objects a tensor for it
    opening = [f':{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":[' for dtype, shape, _ in kinds]
    verbatim = is_verbatim("".join(offsets))
    members = [f'"__metadata__":{json.dumps(metadata, separators=(",", ":"))}']
    for (key, begin), slot, number in zip(offsets.items(), placed, numbers, strict=True):
        quoted = f'"{key}"' if verbatim else json.dumps(key)
        members.append(f"{quoted}{opening[number]}{begin},{begin + slot.nbytes}]}}")
    text = f"{{{','.join(members)}}}".encode()
    members.clear()
    if length is None:
        length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    if 8 + len(text) > length:
        raise ValueError(f"a header of {8 + len(text)} bytes does not fit {length}")
    whole = bytearray(b" ") * length
    whole[:8] = (length - 8).to_bytes(8, "little")
    whole[8 : 8 + len(text)] = text
    place = _stated_at(whole)
    whole[place : place + len(_ZEROS)] = digest(whole).hex().encode()
    return whole


def _kind(slot: Slot) -> tuple[str, tuple[int, ...], int]:
    """Return what many tensors of a model have in common."""
    return slot.dtype, slot.shape, slot.chunk


def _stated_at(head: bytes | bytearray) -> int:
    """Return where the header's digest stands in it.

    Raises:
        CorruptEntryError: nowhere.
    """
    place = head.find(_STATED, 8 + len(_OPENS)) if head.startswith(_OPENS, 8) else -1
    if place < 0:
        raise CorruptEntryError("the header is not one of ours")
    return place + len(_STATED)


def stated_nbytes(what: Any) -> int:
    """Return what plain JSON takes as a part of a header, where it stands in a string."""
    text = canonical(what)
    return len(text) + text.count('"') + text.count("\\")


def is_verbatim(text: str) -> bool:
    """Return whether JSON has a text as it is, and one character takes one byte."""
    return text.isascii() and text.isprintable() and '"' not in text and "\\" not in text


def reserve_header(slots: Mapping[str, Slot], *, records_nbytes: int) -> int:
    """Return the length to keep free for a header whose digests, document and history are not known yet.

    Args:
        slots: as planned, by key.
        records_nbytes: what records take, as planned (`stated_nbytes`); what may be added to them later must fit the slack of 4 KiB and 1/16.
    """
    # from lengths alone, and of all slots at once: thousands of small steps take milliseconds that a caller waits for
    keys, nbytes = "".join(slots), records_nbytes
    if is_verbatim(keys):
        nbytes += 2 * len(keys)
    else:
        nbytes += sum(len(json.dumps(key)) + len(json.dumps(json.dumps(key))) for key in slots)
    alike = {id(slot): slot for slot in slots.values()}
    lengths = {number: len(str(slot.shape)) for number, slot in alike.items()}
    kinds = set(map(_kind, alike.values()))
    nbytes += sum([lengths[id(slot)] for slot in slots.values()]) + _ENTRY * len(slots)
    nbytes += sum([_KIND + len(str(shape)) for _, shape, _ in kinds])
    return -(-(nbytes + nbytes // 16 + 4096 + 512) // ALIGNMENT) * ALIGNMENT


def parse_header(head: bytes, file_nbytes: int) -> EntryHeader:
    """Check an entry's header completely: its digest, version, offsets and the exact length of the file.

    Args:
        head: from the start of the file, at least the whole header.
        file_nbytes: length of the file.

    Raises:
        CorruptEntryError: anything is not as it was written.
        StoreTooNewError: a later layout.
    """
    length = int.from_bytes(head[:8], "little")
    if not 8 + length <= len(head) or (8 + length) % ALIGNMENT:
        raise CorruptEntryError(f"the header's length {length} cannot be true")
    start = 8 + length
    try:
        place = _stated_at(head)
        behind = place + len(_ZEROS)
        whole = Streamed()
        for piece in (memoryview(head)[:place], _ZEROS.encode(), memoryview(head)[behind:start]):
            whole.update(piece)
        if whole.digest().hex().encode() != head[place:behind]:
            raise CorruptEntryError("the header is not the one that was written")
        own = json.loads(json.loads(head[8 + len(_OPENS) - 1 : place - len(_STATED) + 1]))
        if own["container"] > LAYOUT:  # not before: a flipped bit would pass for a newer version
            raise StoreTooNewError(f"its header has layout {own['container']}, this program reads layouts up to {LAYOUT}")
        keys, kinds, kind, wanted = _columns(own["slots"]) if own["container"] > 1 else _columns_of_layout_1(head[8:start], own["digests"])
        size_of = [math.prod(shape) * _ITEMSIZE[dtype] for dtype, shape, _ in kinds]
        for dtype, shape, chunk in kinds:
            # NumPy refuses what would be too large even if one size is 0
            most = math.prod(max(size, 1) for size in shape) * _ITEMSIZE[dtype]
            if not all(type(size) is int and size >= 0 for size in (*shape, chunk)) or not chunk or max(most, chunk) >= 1 << 63 or len(shape) > _MAX_AXES:
                raise CorruptEntryError("a tensor cannot be of that size")
        if min(kind, default=0) < 0 or type(keys) is not list or not {type(key) for key in keys} <= {str} or type(own["built"]) is not dict:
            raise CorruptEntryError("the header says what cannot be")
        if not len(set(keys)) == len(kind) == len(keys) == len(wanted) / DIGEST_NBYTES:
            raise CorruptEntryError("the header describes more or fewer tensors than it names")
        sizes = [size_of[number] for number in kind]
        *places, end = accumulate(sizes, initial=start)
        found = EntryHeader(own["document"], own["records"], own["built"], file_nbytes, keys, kinds, kind, sizes, places, wanted)
    except (CorruptEntryError, StoreTooNewError):
        raise
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptEntryError(f"the header cannot be read: {type(error).__name__}") from error
    if file_nbytes != end:
        raise CorruptEntryError(f"the file has {file_nbytes} bytes, its header describes {end}")
    return found


_Columns = tuple[list[str], list[tuple[str, tuple[int, ...], int]], list[int], bytes]


def _columns(described: Mapping[str, Any]) -> _Columns:
    """Return keys, kinds, each tensor's kind, and digests."""
    kinds = [(dtype, tuple(shape), chunk) for dtype, shape, chunk in described["kinds"]]
    return described["keys"], kinds, described["kind"], bytes.fromhex(described["digests"])


def _columns_of_layout_1(text: bytes, described: Mapping[str, Any]) -> _Columns:
    """Return the same of a header that has an object for every tensor, each where the one before it ends."""
    header = json.loads(text)
    del header["__metadata__"]
    kinds: dict[tuple[str, tuple[int, ...], int], int] = {}
    kind, position = [], 0
    for key, entry in header.items():
        found = entry["dtype"], tuple(entry["shape"]), described[key][0]
        kind.append(kinds.setdefault(found, len(kinds)))
        begin, end = entry["data_offsets"]
        if begin != position or end - begin != math.prod(found[1]) * _ITEMSIZE[found[0]]:
            raise CorruptEntryError(f"tensor {key!r} is not where it must be")
        position = end
    return list(header), list(kinds), kind, bytes.fromhex("".join([described[key][1] for key in header]))


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
