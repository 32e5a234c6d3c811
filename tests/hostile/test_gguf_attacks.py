"""Attack the GGUF reader: every lie in a header ends in a SourceError that says what, where and in which file."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantcache.errors import SourceError
from quantcache.loader.formats.gguf import ArrayValue
from quantcache.loader.source import Source, open_checkpoint

MIB = 1 << 20
U64 = (1 << 64) - 1
UINT32, STRING, ARRAY = 4, 8, 9
F32, Q4_0, Q2_0 = 0, 2, 42

#: llama.cpp's own hostile files, and what it says of each; the data repository has them
VERDICTS = Path("gguf_llamacpp_test") / "manifest.json"
#: files without a data section: only the header can be judged
HEADER_ONLY = ("TENSORS", "roundtrip_f0034")


def _text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def _key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def _tensor(name: bytes | str, sizes: list[int], kind: int = F32, offset: int = 0) -> bytes:
    """Return a tensor's description; sizes as GGUF has them, the row's length first."""
    return (
        _text(name) + struct.pack("<I", len(sizes)) + b"".join(struct.pack("<Q", size & U64) for size in sizes)
        + struct.pack("<IQ", kind, offset)
    )  # fmt: skip


def _file(
    folder: Path,
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    content: bytes = b"",
    *,
    key_count: int | None = None,
    tensor_count: int | None = None,
    version: int = 3,
) -> Path:
    keys, tensors = keys or [], tensors or []
    counts = (len(tensors) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    path = folder / "attack.gguf"
    path.write_bytes(header.ljust(-(-len(header) // 32) * 32, b"\0") + content)
    return path


def _refused(path: Path, match: str, *, tensor: str | None = None) -> SourceError:
    """Check that the file is refused, the message names it and a place, and the tensor is this one."""
    with pytest.raises(SourceError, match=match) as caught:
        open_checkpoint(path)
    error = caught.value
    assert error.path == path
    assert str(path) in str(error)
    assert error.tensor == tensor
    assert error.offset is not None
    assert 0 <= error.offset <= max(path.stat().st_size, U64)
    assert f"at byte {error.offset}" in str(error)
    return error


def _small(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("k.number", 7)
    writer.add_array("k.words", ["a", "bc", "größe"])
    writer.add_array("k.nested", [[1, 2], [3]])
    writer.add_tensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("b", np.zeros((2, 36), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


# ---- llama.cpp's own ---------------------------------------------------------------------------------------------


def _published() -> list[str]:
    """Return the names in the manifest: written out, so that a test exists where the files are missing."""
    return [
        "00_HEADER_BAD_MAGIC", "01_HEADER_BAD_VERSION_0", "02_HEADER_BAD_VERSION_1", "03_HEADER_BAD_VERSION_FUTURE",
        "04_HEADER_BAD_N_KV", "05_HEADER_BAD_N_TENSORS", "06_HEADER_EMPTY", "07_KV_BAD_KEY_SIZE", "08_KV_EMPTY_KEY",
        "09_KV_BAD_TYPE", "10_KV_DUPLICATE_KEY", "11_KV_BAD_ALIGN", "12_KV_WRONG_TYPE_ALIGN", "13_KV_RANDOM_KV",
        "14_TENSORS_BAD_NAME_SIZE", "15_TENSORS_BAD_N_DIMS", "16_TENSORS_BAD_SHAPE", "17_TENSORS_ZERO_DIM",
        "18_TENSORS_NE_TOO_BIG", "19_TENSORS_NBYTES_TOO_BIG", "20_TENSORS_NBYTES_PAD_WRAP", "21_TENSORS_BAD_TYPE",
        "22_TENSORS_BAD_OFFSET", "23_TENSORS_DUPLICATE_NAME", "24_TENSORS_BAD_ALIGN", "25_TENSORS_INCONSISTENT_ALIGN",
        "26_TENSORS_SUCCESS", "27_TENSORS_CUSTOM_ALIGN", "28_DATA_NOT_ENOUGH_DATA", "29_DATA_BAD_ALIGN",
        "30_DATA_INCONSISTENT_ALIGN", "31_DATA_MEM_SIZE_OVERFLOW", "32_DATA_SUCCESS", "33_DATA_CUSTOM_ALIGN",
        "roundtrip_f0034",
    ]  # fmt: skip


@pytest.mark.parametrize("name", _published())
def test_verdicts_of_llama_cpp(test_data: Path, name: str) -> None:
    """What llama.cpp accepts opens, what it refuses does not; a file without its data section fails in check()."""
    verdict = json.loads((test_data / VERDICTS).read_text())[f"{name}.gguf"]
    path = test_data / VERDICTS.parent / f"{name}.gguf"
    if verdict == "reject":
        with pytest.raises(SourceError) as caught:
            open_checkpoint(path)
        assert caught.value.path == path
        assert caught.value.offset is not None
        return
    source = Source(path)
    if any(mark in name for mark in HEADER_ONLY) and any(info.nbytes for info in source.tensors.values()):
        with pytest.raises(SourceError) as caught:
            source.check()
        assert caught.value.tensor in source.tensors
        return
    source.check()
    for tensor, info in source.tensors.items():
        assert source.view(tensor).nbytes == info.nbytes


def test_verdicts_are_complete(test_data: Path) -> None:
    """Every published file has its test."""
    assert {f"{name}.gguf" for name in _published()} == set(json.loads((test_data / VERDICTS).read_text()))


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.gguf"])
def test_files_that_no_reader_takes(test_data: Path, name: str) -> None:
    """Published files that the formats' own readers refuse are refused here too."""
    with pytest.raises(SourceError) as caught:
        open_checkpoint(test_data / "las7" / name)
    assert caught.value.path == test_data / "las7" / name


def test_file_without_tensors(test_data: Path) -> None:
    """A published file that has keys and no tensor opens, as it does in the gguf package."""
    (source,) = open_checkpoint(test_data / "las7" / "empty.gguf")
    assert source.tensors == {}
    assert set(source.metadata) == {"general.architecture"}


# ---- header ------------------------------------------------------------------------------------------------------


def test_truncated_anywhere(tmp_path: Path) -> None:
    """A file cut at any length is refused; inside the last padding it is still whole."""
    path = tmp_path / "m.gguf"
    content = _small(path)
    source = Source(path)
    needed = max(info.offset + info.nbytes for info in source.tensors.values())
    del source
    for length in range(needed):
        path.write_bytes(content[:length])
        with pytest.raises(SourceError) as caught:
            open_checkpoint(path)
        assert caught.value.path == path
        assert caught.value.offset is not None
    path.write_bytes(content[:needed])
    assert set(open_checkpoint(path)[0].tensors) == {"a", "b"}


@pytest.mark.parametrize("version", [0, 1, 4, 0xFFFFFFFF])
def test_other_version(tmp_path: Path, version: int) -> None:
    """A version other than 2 and 3 is refused, and named."""
    assert str(version) in str(_refused(_file(tmp_path, version=version), "version"))


@pytest.mark.parametrize("version", [2, 3])
def test_half_big_endian(tmp_path: Path, version: int) -> None:
    """A file whose version alone is big-endian is read as if all of it were: the counts are what they are then."""
    _refused(_file(tmp_path, version=version << 24, tensors=[_tensor("w", [1])]), "the limit is")
    assert open_checkpoint(_file(tmp_path, version=version << 24))[0].tensors == {}


@pytest.mark.parametrize("version", [0, 1, 4, 1 << 8, 0xFFFFFF])
def test_other_big_endian_version(tmp_path: Path, version: int) -> None:
    """A big-endian version other than 2 and 3 is refused as well."""
    turned = int.from_bytes(version.to_bytes(4, "big"), "little")
    assert _refused(_file(tmp_path, version=turned), "version").offset == 4


@pytest.mark.parametrize("count", [1 << 21, 1 << 32, 1 << 63, U64])
@pytest.mark.parametrize("which", ["key_count", "tensor_count"])
def test_absurd_count(tmp_path: Path, count: int, which: str) -> None:
    """A count beyond the limit is refused before anything of that size is made."""
    path = _file(tmp_path, **{which: count})
    tracemalloc.start()
    _refused(path, "the limit is")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MIB


@pytest.mark.parametrize("which", ["key_count", "tensor_count"])
def test_count_beyond_the_file(tmp_path: Path, which: str) -> None:
    """A count that the file cannot hold ends where the file does."""
    _refused(_file(tmp_path, **{which: 60_000}), "truncated|empty|dimensions|type")


# ---- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1 << 16, 1 << 32, 1 << 63, U64, U64 - 7])
def test_key_length_overflow(tmp_path: Path, length: int) -> None:
    """A key longer than the format allows is refused."""
    _refused(_file(tmp_path, [struct.pack("<Q", length) + b"k"]), "the limit is")


def test_key_longer_than_the_file(tmp_path: Path) -> None:
    """A key that ends behind the file is refused."""
    _refused(_file(tmp_path, [struct.pack("<Q", 5000) + b"k"]), "truncated")


def test_empty_key(tmp_path: Path) -> None:
    """A key without a name is refused."""
    _refused(_file(tmp_path, [_key("", UINT32, bytes(4))]), "empty")


def test_duplicate_key(tmp_path: Path) -> None:
    """A key that stands twice is refused, and named."""
    assert "'k'" in str(_refused(_file(tmp_path, [_key("k", UINT32, bytes(4))] * 2), "twice"))


@pytest.mark.parametrize("raw", [b"\xff", b"a\xc3", b"\xed\xa0\x80"])
def test_bad_utf8_key(tmp_path: Path, raw: bytes) -> None:
    """A key that is not UTF-8 is refused."""
    _refused(_file(tmp_path, [_key(raw, UINT32, bytes(4))]), "not UTF-8")


def test_bad_utf8_value(tmp_path: Path) -> None:
    """A text that is not UTF-8 is kept readable, as llama.cpp takes it, and can be printed."""
    value = Source(_file(tmp_path, [_key("k", STRING, _text(b"a\xffb"))])).metadata["k"]
    assert value == "a\\xffb"
    assert value.encode()


@pytest.mark.parametrize("kind", [13, 255, 1 << 31, 0xFFFFFFFF])
def test_unknown_value_type(tmp_path: Path, kind: int) -> None:
    """A value of an unknown type is refused, with the key's name, in an array too, and in an empty one."""
    assert "'k'" in str(_refused(_file(tmp_path, [_key("k", kind, bytes(8))]), "unknown"))
    for count in (0, 1):
        assert "'k'" in str(_refused(_file(tmp_path, [_key("k", ARRAY, _array(kind, count, bytes(8)))]), "unknown"))


@pytest.mark.parametrize("length", [5000, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, U64, U64 - 7, U64 - 40])
def test_string_length_overflow(tmp_path: Path, length: int) -> None:
    """A text that ends behind the file is refused, alone and in an array, first and last of it."""
    lie = struct.pack("<Q", length) + b"abc"
    _refused(_file(tmp_path, [_key("k", STRING, lie)]), "claims")
    for content in (lie + bytes(40), _text("ok") + lie, lie):
        _refused(_file(tmp_path, [_key("k", ARRAY, _array(STRING, 2, content))]), "truncated")


@pytest.mark.parametrize("kind", [0, 1, 4, 7, 8, 9, 12])
@pytest.mark.parametrize("count", [1 << 20, 1 << 61, 1 << 63, U64])
def test_array_length_overflow(tmp_path: Path, kind: int, count: int) -> None:
    """An array that ends behind the file is refused at once, whatever its elements."""
    path = _file(tmp_path, [_key("k", ARRAY, _array(kind, count, bytes(64)))])
    tracemalloc.start()
    _refused(path, "truncated")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MIB


@pytest.mark.parametrize("depth", [6, 100, 100_000])
def test_deep_nesting(tmp_path: Path, depth: int) -> None:
    """Arrays in arrays beyond any use are refused, and do not overflow the stack."""
    _refused(_file(tmp_path, [_key("k", ARRAY, _array(ARRAY, 1) * depth + _array(0, 0))]), "type")


def test_many_empty_arrays(tmp_path: Path) -> None:
    """An array of twenty thousand empty arrays opens without an object for each."""
    path = _file(tmp_path, [_key("k", ARRAY, _array(ARRAY, 20_000, _array(0, 0) * 20_000))])
    tracemalloc.start()
    value = Source(path).metadata["k"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(value, ArrayValue)
    assert peak < MIB
    assert value.read() == [[]] * 20_000


@pytest.mark.parametrize("alignment", [0, 3, 48, 0xFFFFFFFF])
def test_alignment_not_a_power_of_two(tmp_path: Path, alignment: int) -> None:
    """An alignment that is no power of two is refused."""
    key = _key("general.alignment", UINT32, struct.pack("<I", alignment))
    _refused(_file(tmp_path, [key]), "alignment")


@pytest.mark.parametrize(("kind", "value"), [(5, b"\x20\0\0\0"), (10, b"\x20" + bytes(7)), (6, b"\0\0\0\x42"), (7, b"\1")])
def test_alignment_of_another_type(tmp_path: Path, kind: int, value: bytes) -> None:
    """An alignment that is not a uint32 is refused."""
    _refused(_file(tmp_path, [_key("general.alignment", kind, value)]), "alignment")


def test_alignment_as_text_or_array(tmp_path: Path) -> None:
    """An alignment that is no number is refused."""
    _refused(_file(tmp_path, [_key("general.alignment", STRING, _text("32"))]), "alignment")
    _refused(_file(tmp_path, [_key("general.alignment", ARRAY, _array(UINT32, 1, bytes(4)))]), "alignment")


def test_alignment_of_gigabytes(tmp_path: Path) -> None:
    """The largest alignment is taken for what it is: the tensor lies behind the file."""
    key = _key("general.alignment", UINT32, struct.pack("<I", 1 << 31))
    _refused(_file(tmp_path, [key], [_tensor("w", [1])], bytes(4)), "truncated", tensor="w")


# ---- tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [64, 1 << 20, 1 << 63, U64])
def test_tensor_name_too_long(tmp_path: Path, length: int) -> None:
    """A name longer than ggml's limit is refused."""
    _refused(_file(tmp_path, tensors=[struct.pack("<Q", length) + b"w" * 64 + bytes(40)]), "the limit is")


def test_tensor_name_bad_utf8(tmp_path: Path) -> None:
    """A tensor's name that is not UTF-8 is refused."""
    _refused(_file(tmp_path, tensors=[_tensor(b"\xff", [1])], content=bytes(32)), "not UTF-8")


def test_duplicate_tensor(tmp_path: Path) -> None:
    """A tensor that stands twice is refused, and named."""
    tensors = [_tensor("w", [1]), _tensor("w", [1], offset=32)]
    _refused(_file(tmp_path, tensors=tensors, content=bytes(64)), "twice", tensor="w")


@pytest.mark.parametrize("dimensions", [5, 1000, 0xFFFFFFFF])
def test_too_many_dimensions(tmp_path: Path, dimensions: int) -> None:
    """More dimensions than the format allows are refused before they are read."""
    raw = _text("w") + struct.pack("<I", dimensions) + bytes(200)
    _refused(_file(tmp_path, tensors=[raw]), "dimensions", tensor="w")


@pytest.mark.parametrize("size", [-1, -(1 << 63), -(1 << 32)])
def test_negative_size(tmp_path: Path, size: int) -> None:
    """A negative size is refused."""
    _refused(_file(tmp_path, tensors=[_tensor("w", [4, size])]), "negative", tensor="w")


@pytest.mark.parametrize("sizes", [[1 << 62, 4], [1 << 32, 1 << 32], [1 << 62] * 4])
@pytest.mark.parametrize("kind", [F32, Q4_0, Q2_0])
def test_shape_overflow(tmp_path: Path, sizes: list[int], kind: int) -> None:
    """Sizes whose product wraps in 64 bits are refused, of every kind of type."""
    _refused(_file(tmp_path, tensors=[_tensor("w", sizes, kind)], content=bytes(64)), "overflow", tensor="w")


@pytest.mark.parametrize("sizes", [[0, 1 << 62, 1 << 62], [0, 1 << 40, 1 << 40]])
@pytest.mark.parametrize("kind", [F32, Q4_0])
def test_shape_overflow_behind_a_zero(tmp_path: Path, sizes: list[int], kind: int) -> None:
    """A size of 0 does not hide an impossible shape: it is refused at once, or its view is empty."""
    path = _file(tmp_path, tensors=[_tensor("w", sizes, kind)], content=bytes(32))
    try:
        (source,) = open_checkpoint(path)
        assert source.view("w").size == 0
    except SourceError as error:
        assert error.tensor == "w"


def test_sizes_that_overflow_together(tmp_path: Path) -> None:
    """Tensors that each fit 63 bits and together do not are refused."""
    half = 1 << 60
    tensors = [_tensor("a", [half], offset=0), _tensor("b", [half], offset=4 * half)]
    _refused(_file(tmp_path, tensors=tensors), "overflow", tensor="b")


@pytest.mark.parametrize("kind", [4, 5, 31, 38, 43, 1000, 0xFFFFFFFF])
def test_unknown_tensor_type(tmp_path: Path, kind: int) -> None:
    """A type that was removed, or never was, is refused by its number."""
    error = _refused(_file(tmp_path, tensors=[_tensor("w", [32], kind)], content=bytes(64)), "type", tensor="w")
    assert str(kind) in str(error)


@pytest.mark.parametrize("sizes", [[31], [33, 2], [1, 32], []])
def test_row_not_whole_blocks(tmp_path: Path, sizes: list[int]) -> None:
    """A row that ends inside a block is refused, a single number of a block type too."""
    path = _file(tmp_path, tensors=[_tensor("w", sizes, Q4_0)], content=bytes(64))
    _refused(path, "whole blocks", tensor="w")


def test_cut_tensor_of_a_rare_type(tmp_path: Path) -> None:
    """Bytes of a type that few readers know and that are too few are refused; never a ValueError."""
    path = _file(tmp_path, tensors=[_tensor("w", [64, 3], Q2_0)], content=bytes(32))
    try:
        (source,) = open_checkpoint(path)
        assert source.view("w").nbytes <= 32
    except SourceError as error:
        assert error.tensor == "w"


def test_unaligned_offset(tmp_path: Path) -> None:
    """An offset that the alignment does not divide is refused."""
    tensors = [_tensor("a", [1]), _tensor("b", [1], offset=4)]
    _refused(_file(tmp_path, tensors=tensors, content=bytes(64)), "alignment", tensor="b")


@pytest.mark.parametrize("offset", [0, 64, 1 << 40, 1 << 63, U64 - 31])
def test_overlap_and_hole(tmp_path: Path, offset: int) -> None:
    """A tensor that does not start where the one before it ends is refused: it overlaps, or leaves a hole."""
    tensors = [_tensor("a", [8]), _tensor("b", [8], offset=offset)]
    _refused(_file(tmp_path, tensors=tensors, content=bytes(256)), "tensors before it end at 32", tensor="b")


def test_hole_at_the_start(tmp_path: Path) -> None:
    """A first tensor that does not start the data section is refused."""
    _refused(_file(tmp_path, tensors=[_tensor("a", [8], offset=32)], content=bytes(64)), "end at 0", tensor="a")


def test_tensor_behind_the_file(tmp_path: Path) -> None:
    """A tensor that the file is too short for is named, with its place, when the checkpoint is opened."""
    path = _file(tmp_path, tensors=[_tensor("a", [8]), _tensor("b", [1 << 30], offset=32)], content=bytes(64))
    error = _refused(path, "truncated", tensor="b")
    assert error.offset == path.stat().st_size - 32


def test_name_that_breaks_a_terminal(tmp_path: Path) -> None:
    """Control characters of a key or a tensor's name do not reach the message."""
    hostile = "\x1b[2J\n\r"
    for path in (
        lambda: _file(tmp_path, [_key(hostile, 99, b"")]),
        lambda: _file(tmp_path, tensors=[_tensor(hostile, [1], 99)]),
    ):
        with pytest.raises(SourceError) as caught:
            open_checkpoint(path())
        assert str(caught.value).removeprefix(str(tmp_path)).isprintable()


# ---- anything ----------------------------------------------------------------------------------------------------


def _open_and_read(path: Path) -> None:
    """Open a file and read all of it; nothing but a SourceError may come out, and little memory may be taken."""
    tracemalloc.start()
    try:
        for source in open_checkpoint(path):
            for value in source.metadata.values():
                if isinstance(value, ArrayValue):
                    assert len(value.read()) == len(value)
            for name in source.tensors:
                assert source.view(name).nbytes == source.tensors[name].nbytes
    except SourceError as error:
        str(error).encode()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 * MIB + path.stat().st_size


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a small valid file."""
    return _small(tmp_path_factory.mktemp("valid") / "m.gguf")


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(1, 255)), max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 1 << 12)),
)
def test_fuzzed_bytes(tmp_path: Path, valid: bytes, flips: list[tuple[int, int]], cut: int | None) -> None:
    """A valid file with any bytes flipped and any tail cut opens, or is refused: nothing else happens."""
    content = bytearray(valid)
    for place, mask in flips:
        content[place % len(content)] ^= mask
    path = tmp_path / "m.gguf"
    path.write_bytes(content if cut is None else content[: cut % len(content)])
    _open_and_read(path)


def test_every_byte_flipped(tmp_path: Path, valid: bytes) -> None:
    """Every single byte of the header, set to all ones, zero, or flipped at the top, opens or is refused."""
    path = tmp_path / "m.gguf"
    for place in range(len(valid)):
        for value in {0xFF, 0x00, valid[place] ^ 0x80, (valid[place] + 1) % 256} - {valid[place]}:
            path.write_bytes(valid[:place] + bytes([value]) + valid[place + 1 :])
            _open_and_read(path)


NUMBERS = st.sampled_from([0, 1, 2, 31, 32, 33, 64, 1 << 20, 1 << 32, 1 << 62, 1 << 63, U64])


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.lists(NUMBERS, max_size=4),
            st.sampled_from([0, 1, 2, 9, 12, 24, 28, 30, 39, 40, 41, 42, 43]),
            st.sampled_from([0, 32, 64, 96, 1 << 63]),
        ),
        max_size=3,
    ),
    size=st.integers(0, 300),
    spread=st.booleans(),
)
def test_fuzzed_tensors(
    tmp_path: Path, tensors: list[tuple[str, list[int], int, int]], size: int, *, spread: bool
) -> None:
    """Descriptions of any numbers open, or are refused: nothing else happens."""
    described = [
        _tensor(f"{name}{place if spread else ''}", sizes, kind, offset)
        for place, (name, sizes, kind, offset) in enumerate(tensors)
    ]
    _open_and_read(_file(tmp_path, tensors=described, content=bytes(size)))
