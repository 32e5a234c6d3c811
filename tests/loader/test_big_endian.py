"""Hold big-endian GGUF files to their little-endian twins, to the gguf package and to its own converter."""

from __future__ import annotations

import argparse
import builtins
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, quants
from gguf.scripts import gguf_convert_endian

import quantcache as qc
from quantcache.errors import SourceError
from quantcache.loader.formats.gguf import TYPES, ArrayValue
from quantcache.loader.source import Source, open_checkpoint
from quantcache.quant.blocks import block_type, block_types
from quantcache.tensor import BLOCKS

Write = Callable[..., Path]
RNG = np.random.default_rng(0)

#: fields of several bytes, (offset, bytes, count), by hand from ggml-common.h; qh of Q5_0 is read as one uint32 there
FIELDS = {
    "Q4_0": [(0, 2, 1)], "Q4_1": [(0, 2, 2)], "Q5_0": [(0, 2, 1), (2, 4, 1)], "Q5_1": [(0, 2, 2), (4, 4, 1)], "Q8_0": [(0, 2, 1)],
    "Q2_K": [(80, 2, 2)], "Q3_K": [(108, 2, 1)], "Q4_K": [(0, 2, 2)], "Q5_K": [(0, 2, 2)], "Q6_K": [(208, 2, 1)],
    "Q8_K": [(0, 4, 1), (260, 2, 16)], "IQ4_NL": [(0, 2, 1)], "IQ4_XS": [(0, 2, 2)], "TQ2_0": [(64, 2, 1)], "MXFP4": [], "NVFP4": [],
}  # fmt: skip
ARRAYS: dict[str, Any] = {
    "words": ["a", "", "größe"], "numbers": [1, -2, 3], "floats": [0.5, 1.5], "flags": [True, False],
    "nested": [[1, 2], [3]],
}  # fmt: skip
SCALARS = (
    ("uint8", 200), ("int8", -100), ("uint16", 60000), ("int16", -30000), ("uint32", 4_000_000_000),
    ("int32", -2_000_000_000), ("uint64", 1 << 63), ("int64", -(1 << 62)), ("float32", 0.5), ("float64", 0.1),
    ("bool", True), ("string", "größe"),
)  # fmt: skip


def _elements() -> dict[str, Any]:
    return {
        "f32": RNG.standard_normal((3, 5)).astype(np.float32),
        "f16": RNG.standard_normal((2, 3, 4)).astype(np.float16),
        "f64": RNG.standard_normal(7),
        "i8": RNG.integers(-9, 9, (1, 3)).astype(np.int8),
        "i16": RNG.integers(-9999, 9999, 5).astype(np.int16),
        "i32": RNG.integers(-(1 << 30), 1 << 30, 5).astype(np.int32),
        "i64": RNG.integers(-(1 << 60), 1 << 60, (2, 2, 2, 2)),
        "empty": np.zeros((3, 0), np.float32),
    }


def _turned(name: str, raw: Any) -> Any:
    """Return blocks with the bytes of their fields the other way round."""
    blocks = raw.reshape(-1, BLOCKS[name][1]).copy()
    for offset, width, count in FIELDS[name]:
        for place in range(offset, offset + width * count, width):
            blocks[:, place : place + width] = blocks[:, place : place + width][:, ::-1].copy()
    return blocks.reshape(raw.shape)


def _packaged(path: Path, order: GGUFEndian, tensors: dict[str, Any]) -> Path:
    """Write a file with the gguf package: keys of every type, and these tensors."""
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    for kind, value in SCALARS:
        getattr(writer, f"add_{kind}")(f"k.{kind}", value)
    for name, value in ARRAYS.items():
        writer.add_array(f"a.{name}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_the_package_writes_and_reads_the_same(tmp_path: Path, version: int) -> None:
    """Keys of every type, arrays and tensors of every element type are those that the gguf package wrote, and reads."""
    elements = _elements()
    path = _packaged(tmp_path / "m.gguf", GGUFEndian.BIG, elements)
    raw = bytearray(path.read_bytes())
    assert raw[4:8] == b"\0\0\0\x03"
    raw[7] = version  # the two differ in nothing else
    path.write_bytes(raw)
    (source,) = open_checkpoint(path)
    assert source.big_endian
    for kind, value in SCALARS:
        assert source.metadata[f"k.{kind}"] == value, kind
    for name, value in ARRAYS.items():
        stored = source.metadata[f"a.{name}"]
        assert isinstance(stored, ArrayValue)
        assert stored.read() == ([word.encode() for word in value] if name == "words" else value)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(source.tensors) == list(read) == list(elements)
    for name, expected in elements.items():
        view = source.view(name)
        assert (view.dtype, view.shape, view.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
        assert view.dtype.isnative
        assert not view.flags.writeable
        np.testing.assert_array_equal(view, read[name].data.reshape(view.shape))
        assert source.tensors[name].offset == read[name].data_offset


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "MXFP4", "NVFP4"])
def test_the_package_converts(tmp_path: Path, test_data: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A real file that the gguf package's own converter turned round has the same keys and the same blocks."""
    little = test_data / "allquant" / f"minilm-ffn-slice.{name}.gguf"
    big = tmp_path / "big.gguf"
    shutil.copyfile(little, big)
    monkeypatch.setattr(builtins, "input", lambda *_: "YES")
    reader = gguf.GGUFReader(big, "r+")
    gguf_convert_endian.convert_byteorder(reader, argparse.Namespace(order="big", dry_run=False))
    del reader
    assert big.read_bytes()[4:8] == b"\0\0\0\x03"
    one, other = Source(little), Source(big)
    assert one.tensors == other.tensors
    for key, value in one.metadata.items():
        found = other.metadata[key]
        assert (found.read() if isinstance(found, ArrayValue) else found) == (
            value.read() if isinstance(value, ArrayValue) else value
        )
    for tensor in one.tensors:
        assert one.view(tensor).tobytes() == other.view(tensor).tobytes(), tensor


@pytest.mark.parametrize("name", sorted(FIELDS))
@pytest.mark.parametrize("version", [2, 3])
def test_blocks_turned_by_hand(tmp_path: Path, write_gguf: Write, name: str, version: int) -> None:
    """Blocks of any bytes whose fields stand the other way round are viewed as their twins."""
    weights, nbytes = BLOCKS[name]
    raw = RNG.integers(0, 256, (3, 2 * nbytes)).astype(np.uint8)
    tensor = GGMLQuantizationType[name].value, (3, 2 * weights), _turned(name, raw).tobytes()
    path = write_gguf(tmp_path / "m.gguf", {"w": tensor}, order=">", version=version)
    view = Source(path).view("w")
    np.testing.assert_array_equal(view, raw)
    assert not view.flags.writeable


@pytest.mark.parametrize("name", block_types())
def test_every_block_type_turns_its_fields(tmp_path: Path, write_gguf: Write, name: str) -> None:
    """Every type that is decoded is turned field by field: its layout says which bytes belong together."""
    number = next(key for key, value in TYPES.items() if value == name)
    weights, nbytes = BLOCKS[name]
    raw = RNG.integers(0, 256, (4, nbytes)).astype(np.uint8)
    turned = raw.copy()
    for dtype, offset, *_ in (block_type(name).layout.fields or {}).values():
        base, size = dtype.base, dtype.itemsize
        turned[:, offset : offset + size] = raw[:, offset : offset + size].reshape(4, -1, base.itemsize)[:, :, ::-1].reshape(4, size)
    path = write_gguf(tmp_path / "m.gguf", {"w": (number, (4, weights), turned.tobytes())}, order=">")
    np.testing.assert_array_equal(Source(path).view("w"), raw)


def _twins(folder: Path, write: Write, version: int) -> tuple[Path, Path]:
    """Write a model of every element type and of blocks, in both orders."""
    wide = RNG.standard_normal((64, 256)).astype(np.float32)
    elements = _elements() | {
        "blocks.0.f32.weight": wide,
        "blocks.0.f16.weight": wide.astype(np.float16),
        "blocks.0.bf16.weight": wide.astype(ml_dtypes.bfloat16),
        "blocks.1.f64.weight": wide.astype(np.float64),
        "blocks.1.ids": np.arange(9, dtype=np.int32),
        # two tiles, the second of them not full
        "blocks.2.large.weight": RNG.standard_normal((2048, 640)).astype(np.float16),
    }
    q8 = quants.quantize(wide, GGMLQuantizationType.Q8_0)
    q4k = RNG.integers(0, 256, (64, BLOCKS["Q4_K"][1])).astype(np.uint8)
    q4k[:, 1] &= 0x3B  # d and dmin: finite, and small enough for float16
    q4k[:, 3] &= 0x3B
    paths = []
    for order in "<>":
        blocks = {
            "blocks.1.q8.weight": (8, (64, 256), (q8 if order == "<" else _turned("Q8_0", q8)).tobytes()),
            "blocks.2.q4k.weight": (12, (64, 256), (q4k if order == "<" else _turned("Q4_K", q4k)).tobytes()),
        }
        paths.append(
            write(folder / f"{'little' if order == '<' else 'big'}.gguf", elements | blocks, {"general.architecture": "llama"},
                  order=order, version=version)
        )  # fmt: skip
    return paths[0], paths[1]


def _content(model: Any) -> dict[str, Any]:
    """Return what a model holds, bytes and all."""
    found: dict[str, Any] = {}
    for name, tensor in model.items():
        parts = tensor.parts if isinstance(tensor, qc.QuantTensor) else {"": tensor}
        codec = tensor.codec if isinstance(tensor, qc.QuantTensor) else None
        found[name] = codec, tensor.shape, {key: (part.dtype, part.shape, part.tobytes()) for key, part in parts.items()}
        if isinstance(tensor, qc.QuantTensor):
            found[name] += (tensor.dequantize(np.float32).tobytes(),)
    return found


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    ("quant", "options"),
    [
        ("native", {}), ("f16", {}), ("f16", {"other": "keep"}), ("int8", {}), ("int8", {"native": "convert"}),
        ("nf4", {"native": "convert", "other": "keep"}), ("int8", {"rules": [("*0.f*", "f16", 0.5), ("*q*", "int8", 2.0)]}),
    ],
    ids=str,
)  # fmt: skip
def test_loads_as_its_twin(
    tmp_path: Path, write_gguf: Write, version: int, quant: str, options: dict[str, Any]
) -> None:
    """A big-endian model gives what the little-endian one gives, bit for bit, on miss and hit."""
    little, big = _twins(tmp_path, write_gguf, version)
    with qc.load(little, quant, mode="off", **options) as model:
        expected = _content(model)
    native = quant == "native"
    for hit in (False, True):
        with qc.load(big, quant, cache=tmp_path / "c", **options) as model:
            assert model.hit is (hit or native)
            assert _content(model) == expected


def test_native_views_are_right_numbers(tmp_path: Path, write_gguf: Write) -> None:
    """Weights of a big-endian file are numbers, not bytes in another order: twins alone would not show it."""
    _, big = _twins(tmp_path, write_gguf, 3)
    with qc.load(big, "native", mode="off") as model:
        q8 = model["blocks.1.q8.weight"].dequantize(np.float32)
        np.testing.assert_allclose(q8, model["blocks.0.f32.weight"], atol=0.02)
        np.testing.assert_array_equal(model["blocks.0.bf16.weight"], model["blocks.0.f32.weight"].astype(ml_dtypes.bfloat16))


def test_split_big_endian(tmp_path: Path, write_gguf: Write) -> None:
    """The parts of a split big-endian model are found by their numbers."""
    wide = RNG.standard_normal((64, 128)).astype(np.float32)
    for part in range(2):
        keys = {"split.no": (2, part), "split.count": (2, 2), "split.tensors.count": (5, 2)}
        write_gguf(tmp_path / f"m-{part + 1:05}-of-00002.gguf", {f"w{part}": wide + part}, keys, order=">")
    sources = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(sources[1].view("w1"), wide + 1)


def test_cut_tensor(tmp_path: Path, write_gguf: Write) -> None:
    """A big-endian tensor that the file is too short for is named, with its place."""
    path = write_gguf(tmp_path / "m.gguf", {"w": np.zeros(64, np.float32)}, order=">")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SourceError, match="truncated") as caught:
        open_checkpoint(path)
    assert (caught.value.tensor, caught.value.offset) == ("w", Source(path).tensors["w"].offset)
