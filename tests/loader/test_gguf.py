"""Hold the GGUF reader to the gguf package and to published files: same names, same bytes, no copy."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from quantcache.errors import SourceError
from quantcache.loader.formats.gguf import TYPES, ArrayValue
from quantcache.loader.source import Source, open_checkpoint
from quantcache.tensor import BLOCKS, ITEMSIZE

ALLQUANT = ["IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q1_0", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "TQ1_0", "TQ2_0"]
#: what the installed gguf package can write: it has another size of Q8_1, and does not know the newest types
KNOWN = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
BLOCK_TYPES = [number for number, name in TYPES.items() if name in BLOCKS and name != "Q8_1" and number in KNOWN]


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _elements() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "f64": rng.standard_normal(7),
        "i8": rng.integers(-9, 9, (1, 3)).astype(np.int8),
        "i16": rng.integers(-9, 9, 5).astype(np.int16),
        "i32": rng.integers(-9, 9, 5).astype(np.int32),
        "i64": rng.integers(-9, 9, (2, 2, 2, 2)),
    }


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_views_equal_the_package(tmp_path: Path, alignment: int | None) -> None:
    """Element types written by the gguf package are viewed with type, shape and bytes, at any alignment."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, tensor in _elements().items():
        writer.add_tensor(name, tensor)
    _write(writer)
    (source,) = open_checkpoint(path)
    assert source.format == "gguf"
    assert list(source.tensors) == list(_elements())
    for name, expected in _elements().items():
        view = source.view(name)
        assert (view.dtype, view.shape, view.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
        assert np.shares_memory(view, source.file.bytes)
        assert not view.flags.writeable
        assert source.tensors[name].offset % (alignment or 32) == 0


def test_metadata(tmp_path: Path) -> None:
    """Values of every kind come back as they were written; arrays when they are asked for."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, value in (
        ("uint8", 200), ("int8", -100), ("uint16", 60000), ("int16", -30000), ("uint32", 4_000_000_000),
        ("int32", -2_000_000_000), ("uint64", 1 << 63), ("int64", -(1 << 62)), ("float32", 0.5), ("float64", 0.1),
        ("bool", True), ("string", "größe"),
    ):  # fmt: skip
        getattr(writer, f"add_{kind}")(f"k.{kind}", value)
    arrays: dict[str, list[Any]] = {
        "words": ["a", "", "größe"], "numbers": [1, -2, 3], "floats": [0.5, 1.5], "flags": [True, False],
        "nested": [[1, 2], [3]],
    }  # fmt: skip
    for name, value in arrays.items():
        writer.add_array(f"a.{name}", value)
    _write(writer)
    metadata = Source(path).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["k.uint64"] == 1 << 63
    assert metadata["k.bool"] is True
    assert metadata["k.string"] == "größe"
    assert metadata["k.float64"] == 0.1
    assert [metadata[f"k.{kind}"] for kind in ("uint8", "int8", "int16", "int64")] == [200, -100, -30000, -(1 << 62)]
    for name, value in arrays.items():
        stored = metadata[f"a.{name}"]
        assert isinstance(stored, ArrayValue)
        assert len(stored) == len(value)
        expected = [word.encode() for word in value] if name == "words" else value
        assert stored.read() == expected
        assert stored.read() == expected  # the second time too


def test_sizes_of_blocks() -> None:
    """The sizes of blocks are those of the gguf package; Q8_1 is ggml's 36 bytes, where the package says 40."""
    assert set(KNOWN) <= set(TYPES)
    for number in KNOWN:
        name = TYPES[number]
        assert GGMLQuantizationType(number).name == name
        found = BLOCKS[name] if name in BLOCKS else (1, ITEMSIZE[name])
        assert found == ((32, 36) if name == "Q8_1" else KNOWN[number]), name
    assert set(BLOCKS) <= set(TYPES.values()) <= {*BLOCKS, *ITEMSIZE}


@pytest.mark.parametrize("name", ["32_DATA_SUCCESS", "33_DATA_CUSTOM_ALIGN"])
def test_q2_0(test_data: Path, name: str) -> None:
    """Q2_0, type 42, has blocks of 64 weights in 18 bytes: so ggml places the next tensor where nothing is aligned."""
    source = Source(test_data / "gguf_llamacpp_test" / f"{name}.gguf")
    info = source.tensors["my_tensor_27"]
    assert (info.dtype, info.shape, info.nbytes) == ("Q2_0", (7, 320), 7 * 5 * 18)
    assert source.view("my_tensor_27").shape == (7, 90)


@pytest.mark.parametrize("number", BLOCK_TYPES)
@pytest.mark.parametrize("rows", [(), (3,), (2, 3), (2, 1, 3)])
def test_every_block_type(tmp_path: Path, number: int, rows: tuple[int, ...]) -> None:
    """Every block type is viewed as bytes, one row of blocks a row, with its shape in weights."""
    name = TYPES[number]
    weights, nbytes = BLOCKS[name]
    raw = np.random.default_rng(number).integers(0, 256, (*rows, 2 * nbytes)).astype(np.uint8)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", raw, raw_dtype=GGMLQuantizationType(number))
    writer.add_tensor("after", np.arange(4, dtype=np.float32))
    _write(writer)
    source = Source(path)
    info, view = source.tensors["w"], source.view("w")
    assert (info.dtype, info.shape, info.nbytes, info.is_block) == (name, (*rows, 2 * weights), raw.nbytes, True)
    assert (view.dtype, view.shape) == (np.uint8, (*(rows or (1,)), 2 * nbytes))
    assert view.tobytes() == raw.tobytes()
    assert source.view("after").tolist() == [0, 1, 2, 3]


def test_q8_1(tmp_path: Path) -> None:
    """Q8_1, which the gguf package would write with another size, is viewed in blocks of 36 bytes."""
    raw = np.random.default_rng(0).integers(0, 256, (3, 72)).astype(np.uint8)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, 64, 3, 9, 0)
    (tmp_path / "m.gguf").write_bytes(header.ljust(-(-len(header) // 32) * 32, b"\0") + raw.tobytes())
    source = Source(tmp_path / "m.gguf")
    source.check()
    assert (source.tensors["w"].dtype, source.tensors["w"].shape) == ("Q8_1", (3, 64))
    np.testing.assert_array_equal(source.view("w"), raw)


@pytest.mark.parametrize("name", ALLQUANT)
def test_real_block_types(test_data: Path, name: str) -> None:
    """Files that another implementation quantized are viewed as the gguf package reads them."""
    path = test_data / "allquant" / f"minilm-ffn-slice.{name}.gguf"
    source = Source(path)
    source.check()
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(source.tensors) == list(expected)
    for key, tensor in expected.items():
        info, view = source.tensors[key], source.view(key)
        assert info.dtype == tensor.tensor_type.name
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert view.tobytes() == tensor.data.tobytes()
    assert name in {info.dtype for info in source.tensors.values()}


@pytest.mark.parametrize(
    "name",
    ["smol_blk/blk-smol-1layer-Q4_K_M.gguf", "rwkv7/tiny-rwkv-7v0-834K-Q5_0.gguf", "rwkv7/tiny-rwkv-7v0-834K-Q5_1.gguf"],
)
def test_real_models(test_data: Path, name: str) -> None:
    """Published models give the names, shapes, types and bytes that the gguf package gives."""
    source = Source(test_data / name)
    source.check()
    tensors = gguf.GGUFReader(test_data / name).tensors
    assert list(source.tensors) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        info = source.tensors[tensor.name]
        assert (info.dtype, info.shape) == (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())))
        assert source.view(tensor.name).tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("name", ["aquila", "bert-bge", "gpt-2", "llama-spm"])
def test_real_vocabularies(test_data: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of large arrays open, versions 2 and 3, and their entries are those that the gguf package reads."""
    path = test_data / "ggufvocab" / f"ggml-vocab-{name}.gguf"
    (source,) = open_checkpoint(path)
    assert source.tensors == {}
    monkeypatch.setattr(np, "memmap", lambda file, mode: np.fromfile(file, np.uint8))  # its slices are ten times as fast
    reader = gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert set(source.metadata) == set(fields)
    arrays = 0
    for key, field in fields.items():
        value = source.metadata[key]
        if not isinstance(value, ArrayValue):
            assert value == field.contents(), key
            continue
        arrays += 1
        found = value.read()
        assert len(found) == len(value) == len(field.data)
        for place in {0, 1, 2, len(found) // 2, len(found) - 1}:
            part = field.parts[field.data[place]]
            expected = part.tobytes() if field.types[1] == gguf.GGUFValueType.STRING else part.tolist()[0]
            assert found[place] == expected, (key, place)
    assert arrays >= 2


def test_zero_size_tensors(tmp_path: Path) -> None:
    """A tensor without weights has an empty view, and what follows it is found."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("none", np.zeros((3, 0), np.float32))
    writer.add_tensor("w", np.arange(4, dtype=np.float32))
    _write(writer)
    source = Source(path)
    source.check()
    assert source.view("none").shape == (3, 0)
    assert source.view("w").tolist() == [0, 1, 2, 3]


def test_cut_data_section(tmp_path: Path) -> None:
    """A file cut inside its data opens as a Source, and check() and view() name the tensor and its place."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("whole", np.arange(8, dtype=np.float32))
    writer.add_tensor("cut", np.arange(64, dtype=np.float32))
    _write(writer)
    path.write_bytes(path.read_bytes()[:-40])
    source = Source(path)
    assert source.view("whole").tolist() == list(range(8))
    offset = source.tensors["cut"].offset
    for act in (source.check, lambda: source.view("cut"), lambda: open_checkpoint(path)):
        with pytest.raises(SourceError) as caught:
            act()
        assert (caught.value.path, caught.value.tensor, caught.value.offset) == (path, "cut", offset)
