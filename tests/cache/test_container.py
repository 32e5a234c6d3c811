"""An entry file is a standard safetensors file without holes, and every byte of its header is accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from quantcache.cache import container
from quantcache.cache.blobs import StoredEntry
from quantcache.cache.container import (
    ALIGNMENT,
    LAYOUT,
    Slot,
    arrange,
    build_header,
    parse_header,
    reserve_header,
    slot_digest,
    stated_nbytes,
)
from quantcache.cache.key import canonical, combine, digest
from quantcache.cache.store import Cache
from quantcache.errors import CorruptEntryError, StoreTooNewError

ITEMSIZE = {"U8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "F32": 4, "U32": 4, "I64": 8, "F64": 8}

#: what is in names
ODD = ["", '"', "\\", "é", "\n", "😀", '","quantcache.header":"']
shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple)
slot_lists = st.lists(st.tuples(st.sampled_from(sorted(ITEMSIZE)), shapes, st.integers(0, 3)), max_size=12).map(
    lambda found: {f"t{n}{ODD[n % len(ODD)]}": Slot(dtype, shape, 4096, layer) for n, (dtype, shape, layer) in enumerate(found)}
)


@given(slot_lists)
def test_no_holes_and_aligned(slots: dict[str, Slot]) -> None:
    """Whatever the tensors, they follow each other without a hole, each at a multiple of its element size."""
    offsets, total = arrange(slots)
    assert offsets.keys() == slots.keys()
    end = 0
    for key, offset in offsets.items():  # in this order
        assert offset == end
        assert end % ITEMSIZE[slots[key].dtype] == 0
        end += slots[key].nbytes
    assert end == total == sum(slot.nbytes for slot in slots.values())


@given(slot_lists, st.randoms(use_true_random=False))
def test_order_is_nobodys(slots: dict[str, Slot], random: Random) -> None:
    """In whatever order tensors come, and whether those that are alike share a slot or not, each has its place, by layer, type and name."""
    keys = random.sample(sorted(slots), len(slots))
    kinds = {repr(slot): slot for slot in slots.values()}
    shared = {key: kinds[repr(slots[key])] for key in keys}
    assert list(arrange(shared)[0].items()) == list(arrange(slots)[0].items())
    assert arrange(slots, 4096)[0] == {key: 4096 + offset for key, offset in arrange(slots)[0].items()}
    assert list(arrange(dict.fromkeys(keys, Slot("F16", (32,), 4096)))[0]) == sorted(keys)


@given(slot_lists)
def test_whole_lines_start_at_64_bytes(slots: dict[str, Slot]) -> None:
    """A tensor of whole cache lines starts at one, however ragged the others are; those stand by layer."""
    offsets, _ = arrange(slots)
    whole = [key for key, slot in slots.items() if slot.nbytes and slot.nbytes % 64 == 0]
    assert all(offsets[key] % 64 == 0 for key in whole)
    layers = [slots[key].layer for key in sorted(whole, key=offsets.__getitem__)]
    assert layers == sorted(layers)


@given(slot_lists, st.text(max_size=40))
def test_header_reads_back(slots: dict[str, Slot], text: str) -> None:
    """What was written comes back, data starts at a page, and the reserved length is enough."""
    digests = {key: f"{n:032x}" for n, key in enumerate(slots)}
    details: dict[str, Any] = {"document": {"text": text}, "records": [text], "built": {"path": text}}
    head = build_header(slots, digests, **details)
    offsets, nbytes = arrange(slots)
    found = parse_header(head, len(head) + nbytes)
    assert len(head) % ALIGNMENT == 0
    assert found.offsets == {key: len(head) + offset for key, offset in offsets.items()}
    assert (found.document, found.records, found.built) == tuple(details.values())
    assert {key: found.digest_of(key) for key in found.slots} == digests
    assert {(key, slot.dtype, slot.shape) for key, slot in found.slots.items()} == {
        (key, slot.dtype, slot.shape) for key, slot in slots.items()
    }
    others = json.loads(head[8:])  # what every other reader goes by
    del others["__metadata__"]
    assert list(others) == list(found.keys)
    for key, entry in others.items():
        slot, begin = found.slots[key], found.offsets[key] - len(head)
        assert entry == {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [begin, begin + slot.nbytes]}
    reserved = reserve_header(slots, records_nbytes=stated_nbytes([text]))
    assert reserved <= 1.2 * len(head) + 100 * len(slots) + 2 * ALIGNMENT  # and it is no waste
    assert len(build_header(slots, digests, length=reserved, **details)) == reserved


def test_header_that_does_not_fit() -> None:
    """A header longer than its place is refused, never cut."""
    with pytest.raises(ValueError, match="does not fit"):
        build_header({}, {}, document={}, records=["x" * 5000], built={}, length=4096)


def test_every_flipped_byte_of_a_header(store: Cache, put: Callable[..., StoredEntry]) -> None:
    """No byte of length, JSON or padding can change unseen."""
    entry = put(store, 0, nbytes=100)
    head = bytearray(entry.memory[: min(entry.header.offsets.values())])
    assert parse_header(bytes(head), entry.header.nbytes).document == entry.header.document
    for position in range(len(head)):
        for mask in (0x01, 0x20):
            head[position] ^= mask
            with pytest.raises((CorruptEntryError, StoreTooNewError)):
                parse_header(bytes(head), entry.header.nbytes)
            head[position] ^= mask


@pytest.mark.parametrize("by", [-1, 1, 4096])
def test_length_of_the_file_is_exact(store: Cache, put: Callable[..., StoredEntry], by: int) -> None:
    """A file that is a byte too short or too long is no entry."""
    entry = put(store, 0)
    with pytest.raises(CorruptEntryError):
        parse_header(bytes(entry.memory), entry.header.nbytes + by)


def test_newer_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer version is said to be newer, not to be damaged; a bit that is flipped there is damage."""
    monkeypatch.setattr(container, "LAYOUT", LAYOUT + 2)
    newer = build_header({}, {}, document={}, records=[], built={})
    monkeypatch.undo()
    with pytest.raises(StoreTooNewError):
        parse_header(newer, len(newer))
    flipped = newer.replace(b'\\"container\\":%d' % (LAYOUT + 2), b'\\"container\\":%d' % (LAYOUT + 6))
    assert flipped != newer
    with pytest.raises(CorruptEntryError):
        parse_header(flipped, len(flipped))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": [0, -1]}, {"kind": [0, 1]}, {"kind": [0]}, {"kind": [0, 0, 0]}, {"kind": [0, 0.0]}, {"kind": [0, "0"]},
        {"kinds": [["U8", [8], 1 << 63]]}, {"kinds": [["U8", [8], 8.0]]}, {"kinds": [["U8", [True, 8], 8]]}, {"kinds": [["U8", [8, *[1] * 64], 8]]},
        {"kinds": [["U8", [1e308, 10**400], 8]]}, {"kinds": [["U8", [0, 1 << 62, 4], 8]]}, {"keys": "ab"}, {"keys": ["a", 7]}, {"kinds": [["U8", [-1, -8], 8]]},
        {"kinds": [["U8", [8], 0]]}, {"kinds": [["U7", [8], 8]]}, {"kinds": [["U8", ["8"], 8]]},
        {"keys": ["a", "a"]}, {"keys": ["a"]}, {"keys": ["a", ["b"]]}, {"digests": "00" * 31}, {"digests": "0" * 31}, {"digests": 7},
    ],
    ids=str,
)  # fmt: skip
def test_columns_that_cannot_be(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    """Columns that do not fit each other are damage, whatever the header's digest says; unchanged they are read."""
    slots, digests = dict.fromkeys("ab", Slot("U8", (8,), 8)), {"a": "0" * 32, "b": "1" * 32}

    def changed(document: Any) -> str:
        return canonical({**document, "slots": {**document["slots"], **change}})

    head = build_header(slots, digests, document={}, records=[], built={})
    assert parse_header(head, len(head) + 16).sizes == [8, 8]
    monkeypatch.setattr(container, "canonical", changed)
    head = build_header(slots, digests, document={}, records=[], built={})
    with pytest.raises(CorruptEntryError):
        parse_header(head, len(head) + 16)


def test_library_opens_an_entry(
    store: Cache, put: Callable[..., StoredEntry], content: Callable[[int, int], dict[str, Any]]
) -> None:
    """The safetensors library opens an entry and reads the same bytes."""
    entry = put(store, 5, nbytes=9000)
    with safe_open(entry.path, "numpy") as file:
        assert set(file.keys()) == {"codes", "scales"}
        for key, array in content(5, 9000).items():
            np.testing.assert_array_equal(file.get_tensor(key), array)
            assert bytes(entry.view(key)) == array.tobytes()


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 10_000])
def test_digest_of_a_tensor(nbytes: int) -> None:
    """A tensor's digest is that of the digests of its pieces, wherever it lies."""
    raw = np.random.default_rng(nbytes).integers(0, 256, nbytes + 7, np.uint8).tobytes()
    pieces = [digest(raw[7 + start : 7 + min(start + 4096, nbytes)]) for start in range(0, nbytes, 4096)]
    assert slot_digest(memoryview(raw), Slot("U8", (nbytes,), 4096), 7) == combine(pieces)


def test_link_is_no_entry(store: Cache, put: Callable[..., StoredEntry], tmp_path: Path) -> None:
    """A symbolic link in the place of an entry is refused."""
    entry = put(store, 0)
    elsewhere = tmp_path / "elsewhere"
    entry.path.rename(elsewhere)
    entry.path.symlink_to(elsewhere)
    with pytest.raises(CorruptEntryError, match="symbolic link"):
        StoredEntry(entry.key, entry.path)


def test_element_sizes_are_those_of_the_tensors() -> None:
    """The store may not import the tensors' table; the two say the same."""
    from quantcache.cache import container
    from quantcache.tensor import ITEMSIZE

    assert dict(ITEMSIZE) == container._ITEMSIZE
