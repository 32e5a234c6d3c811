"""Quantize sources again and compare: what is right passes, one changed byte with right digests does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache.container import build_header, slot_digest
from quantcache.cache.maintenance import verify
from quantcache.loader.against_source import compare

Write = Callable[..., Path]
RNG = np.random.default_rng(1)
WEIGHTS: dict[str, Any] = {
    "blocks.0.key.weight": RNG.standard_normal((64, 128)).astype(np.float32),
    "blocks.0.half.weight": RNG.standard_normal((64, 128)).astype(np.float16),
    "blocks.1.tiny.weight": (RNG.standard_normal((64, 128)) * 1e-7).astype(np.float32),  # scales that float16 does not hold
    "blocks.1.nan.weight": np.full((64, 128), np.nan, np.float32), "blocks.1.ln.weight": np.ones(64, np.float32),
    "blocks.1.huge.bias": np.full(64, 1e6, np.float32), "ids": np.arange(7),
}  # fmt: skip


def _stored(path: Path, root: Path, **options: Any) -> str:
    with pytest.warns(qc.QuantcacheWarning), qc.load(path, cache=root, **options) as model:
        model.finish()
    return model.keys_in_store[0]


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8", "int8-row", "f16"])
def test_every_codec(tmp_path: Path, quant: str) -> None:
    """What a build stored is what its source gives, refused values and late plans among it."""
    save_file(WEIGHTS, tmp_path / "m.safetensors")
    key = _stored(tmp_path / "m.safetensors", tmp_path / "c", quant=quant)
    with qc.Cache(tmp_path / "c") as store:
        assert compare(store, [key]) == []


def test_adapters_and_blocks(tmp_path: Path, write_gguf: Write) -> None:
    """So is what was merged, and what was converted from blocks, under names that the file does not have."""
    import gguf

    blocks = gguf.quants.quantize(WEIGHTS["blocks.0.key.weight"], gguf.GGMLQuantizationType.Q8_0)
    tensors = {"blk.0.time_mix_key.weight": (8, (64, 128), blocks.tobytes()), "blk.0.time_mix_w1.weight": np.ones((8, 64), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tensors, {"general.architecture": "rwkv7"})
    save_file({"blocks.0.att.key.lora.0": np.ones((2, 128), np.float32), "blocks.0.att.key.lora.1": np.ones((64, 2), np.float32)}, tmp_path / "l.st")
    with qc.load(path, "int8", native="convert", lora=[(tmp_path / "l.st", [("*.key.*", 4)])], cache=tmp_path / "c") as model:
        model.finish()
    with qc.Cache(tmp_path / "c") as store:
        assert compare(store, model.keys_in_store) == []


@pytest.mark.parametrize("name", ["blocks.0.key.weight", "blocks.1.nan.weight", "blocks.1.ln.weight", "ids"])
def test_a_byte_that_no_digest_betrays(tmp_path: Path, name: str) -> None:
    """An entry with one other byte and digests to match passes every check but this one."""
    save_file(WEIGHTS, tmp_path / "m.safetensors")
    key = _stored(tmp_path / "m.safetensors", tmp_path / "c", quant="nf4")
    with qc.Cache(tmp_path / "c") as store:
        entry = store.open(key)
        header = entry.header
        raw = bytearray(entry.path.read_bytes())
        raw[header.offsets[name]] ^= 1
        digests = {part: slot_digest(memoryview(raw), slot, header.offsets[part]) for part, slot in header.slots.items()}
        start = min(header.offsets.values())
        parts = sorted(header.slots, key=header.offsets.__getitem__)
        placed = {part: replace(header.slots[part], layer=position) for position, part in enumerate(parts)}  # a header does not keep the layers
        head = build_header(placed, digests, document=header.document, records=header.records, built=header.built, length=start)
        entry.path.write_bytes(head + raw[start:])
        assert verify(store).findings == []
        (finding,) = compare(store, [key])
        assert name in finding.problem
        assert finding.damaged


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    """A source that is gone or has changed, an adapter that has, another loader's entry: found, and not damage."""
    path = tmp_path / "m.safetensors"
    save_file(WEIGHTS, path)
    save_file({"blocks.0.key.diff": np.ones((64, 128), np.float32)}, tmp_path / "l.safetensors")
    key = _stored(path, tmp_path / "c", quant="nf4", lora=[tmp_path / "l.safetensors"])
    with qc.Cache(tmp_path / "c") as store:
        assert compare(store, [key]) == []
        save_file({"blocks.0.key.diff": np.zeros((64, 128), np.float32)}, tmp_path / "l.safetensors")
        assert "changed" in compare(store, [key])[0].problem
        save_file(WEIGHTS | {"ids": np.arange(1, 8)}, path)
        assert "changed" in compare(store, [key])[0].problem
        path.unlink()
        (finding,) = compare(store, [key])
        assert not finding.damaged
        assert "cannot be compared" in finding.problem
