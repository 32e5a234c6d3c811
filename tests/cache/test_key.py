"""A key depends on everything that the bytes depend on, and on nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcache.cache.key import CHUNK, RACY_NS, Stamp, canonical, combine, digest, fingerprint, key_of
from quantcache.errors import UsageError
from quantcache.loader.digests import source_digest
from quantcache.loader.plan import Request
from quantcache.loader.recipe import Recipe
from quantcache.loader.source import Source

DIGEST = "0" * 32


def _write(path: Path, value: float = 0.0) -> Path:
    from safetensors.numpy import save_file

    weights = np.zeros((300, 1000), np.float32)
    weights[150, 503] = value
    save_file({"a.weight": weights}, path)
    return path


def _memory(path: Path) -> memoryview:
    return memoryview(path.read_bytes())


def test_digest_knows_content_only(tmp_path: Path) -> None:
    """A renamed copy of another time has the same digest; one changed byte gives another."""
    first = _write(tmp_path / "a.safetensors")
    copy = tmp_path / "b.st"
    shutil.copyfile(first, copy)
    os.utime(copy, (1, 1))
    assert source_digest(Source(first), 1) == source_digest(Source(copy), 2)
    changed = _write(tmp_path / "c.safetensors", 1.0)
    assert changed.stat().st_size == first.stat().st_size
    assert source_digest(Source(first), 1) != source_digest(Source(changed), 1)


def test_digest_is_that_of_its_definition(tmp_path: Path) -> None:
    """The digest of a source is XXH3-128 over the digests of its chunks and its size: keys outlive releases."""
    path = _write(tmp_path / "a.safetensors")
    raw = path.read_bytes()
    assert len(raw) < CHUNK
    assert source_digest(Source(path), 1) == digest(digest(raw) + len(raw).to_bytes(8, "little")).hex()


def test_combine_separates_size_and_order() -> None:
    """Pieces in another order, or another size, are another digest."""
    one, two = digest(b"1"), digest(b"2")
    assert len({combine([one, two]), combine([two, one]), combine([one, two], 2), combine([one, two], 3)}) == 4


@pytest.mark.parametrize("position", [0, 65_535, 65_536, -1, -4096])
def test_fingerprint_sees_head_and_tail(position: int) -> None:
    """A change in the head, at a sample or in the tail changes the fingerprint."""
    raw = bytearray(1 << 20)
    before = fingerprint(memoryview(bytes(raw)))
    raw[position] ^= 1
    assert fingerprint(memoryview(bytes(raw))) != before


def test_fingerprint_sees_the_size() -> None:
    """Files of zeros of different lengths are told apart."""
    assert len({fingerprint(memoryview(bytes(n))) for n in (1, 2, 4096, 4097, 1 << 20, (1 << 20) + 1)}) == 6


def test_same_fingerprint_is_no_hit(tmp_path: Path) -> None:
    """A change that the samples miss changes the digest all the same: the fingerprint alone decides nothing."""
    raw = bytearray(_write(tmp_path / "a.safetensors").read_bytes())
    before = fingerprint(memoryview(bytes(raw)))
    raw[70_000] ^= 1
    path = tmp_path / "b.safetensors"
    path.write_bytes(raw)
    assert fingerprint(_memory(path)) == before
    assert source_digest(Source(path), 1) != source_digest(Source(tmp_path / "a.safetensors"), 1)


@pytest.mark.parametrize(("mtime", "ctime"), [(10, 10), (10, 5), (5, 10)])
def test_racy_rule(mtime: int, ctime: int) -> None:
    """A file is trusted only if both its times lie two seconds before it was looked at."""
    stamp = Stamp(1, 2, 3, mtime * 10**9, ctime * 10**9)
    assert not stamp.settled(10 * 10**9)
    assert not stamp.settled(10 * 10**9 + RACY_NS - 1)
    assert stamp.settled(10 * 10**9 + RACY_NS)


def test_stamp_sees_a_restored_time(tmp_path: Path) -> None:
    """Restoring the modification time does not restore the stamp."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - 10**9))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert Stamp.of(path.stat()) != Stamp.of(before)


def _nf4(**options: Any) -> Recipe:
    return Recipe.of("nf4", **options)


@pytest.mark.parametrize(
    ("recipe", "source", "nbytes"),
    [
        (_nf4(), "1" * 32, 100),
        (_nf4(), DIGEST, 101),
        (Recipe.of("int8"), DIGEST, 100),
        (Recipe.of("nf4-dq"), DIGEST, 100),
        (_nf4(other="keep"), DIGEST, 100),
        (_nf4(native="convert"), DIGEST, 100),
        (_nf4(include=["*.bias"]), DIGEST, 100),
        (_nf4(exclude=[]), DIGEST, 100),
        (_nf4(rules=[("blocks.0.*", "int8")]), DIGEST, 100),
        (_nf4(rules=[("blocks.0.*", "nf4", 0.5)]), DIGEST, 100),
        (_nf4(rules=[("blocks.0.*", "nf4", 0.25)]), DIGEST, 100),
    ],
)
def test_every_factor_is_in_the_key(recipe: Recipe, source: str, nbytes: int) -> None:
    """Source, size, codec, rules, factor and what becomes of the rest each make another key."""
    base = key_of(Request(_nf4()).key_document(DIGEST, 100))
    assert key_of(Request(recipe).key_document(source, nbytes)) != base
    assert key_of(Request(_nf4()).key_document(DIGEST, 100)) == base


def test_order_of_rules_is_in_the_key() -> None:
    """The first rule counts, so another order is another key."""
    rules = [("a.*", "int8"), ("*.weight", "nf4")]
    keys = {key_of(Request(Recipe(ordered)).key_document(DIGEST, 1)) for ordered in (rules, rules[::-1])}
    assert len(keys) == 2


def test_label_is_not_in_the_key() -> None:
    """What listings call a recipe does not change its key."""
    rules = [("*.weight", "nf4")]
    assert Request(Recipe(rules, label="x")).key_document(DIGEST, 1) == Request(Recipe(rules, label="y")).key_document(DIGEST, 1)


def test_codec_version_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec that stores other bytes than before raises its version, and old entries are nobody's hit."""
    from quantcache.quant.codec import codec

    before = key_of(Request(_nf4()).key_document(DIGEST, 1))
    monkeypatch.setattr(type(codec("nf4")), "version", codec("nf4").version + 1)
    assert key_of(Request(_nf4()).key_document(DIGEST, 1)) != before


def test_canonical_text() -> None:
    """Order of insertion does not matter; the text is sorted, dense ASCII, and reads back."""
    one, two = {"b": [1, 2.5], "a": {"y": "ä", "x": None}}, {"a": {"x": None, "y": "ä"}, "b": [1, 2.5]}
    assert canonical(one) == canonical(two) == '{"a":{"x":null,"y":"\\u00e4"},"b":[1,2.5]}'
    assert json.loads(canonical(one)) == one
    assert key_of(one) == key_of(two)
    assert key_of({"b": [2.5, 1]}) != key_of({"b": [1, 2.5]})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1, 2}, b"bytes", object()])
def test_what_has_no_single_text_is_refused(bad: object) -> None:
    """NaN and Python's own types make no key."""
    with pytest.raises(UsageError, match="plain JSON"):
        key_of({"x": bad})
