"""Hold the keys of a GGUF header to what was written: every type of value, arrays in arrays, alignment, large vocabularies."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantcache.errors import SourceError
from quantcache.loader.formats.gguf import ArrayValue
from quantcache.loader.source import Source, open_checkpoint

Write = Callable[..., Path]
MIB = 1 << 20
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
#: type of a value -> values at its limits
LIMITS: dict[int, list[Any]] = {
    0: [0, 255], 1: [-128, 127], 2: [0, 65535], 3: [-32768, 32767], UINT32: [0, (1 << 32) - 1], 5: [-(1 << 31), (1 << 31) - 1],
    6: [0.0, -0.5, float("inf"), 2.0**-149], BOOL: [True, False], STRING: ["", "größe", "a\0b", "x" * 70_000],
    10: [0, (1 << 64) - 1], 11: [-(1 << 63), (1 << 63) - 1], 12: [0.1, -float("inf"), 5e-324],
}  # fmt: skip
W = np.arange(6, dtype=np.float32).reshape(2, 3)


def _read(value: Any) -> Any:
    """Return an array's elements, strings as text."""
    found = value.read()
    return [element.decode() if isinstance(element, bytes) else element for element in found]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", sorted(LIMITS))
def test_every_type_of_value(tmp_path: Path, write_gguf: Write, kind: int, order: str) -> None:
    """A value of every type, alone and in an array, at its limits, is what was written, and what follows it is found."""
    values = LIMITS[kind]
    keys = {f"k{place}": (kind, value) for place, value in enumerate(values)}
    keys |= {"array": (ARRAY, (kind, values)), "none": (ARRAY, (kind, [])), "last": 7}
    source = Source(write_gguf(tmp_path / "m.gguf", {"w": W}, keys, order=order))
    for place, value in enumerate(values):
        found = source.metadata[f"k{place}"]
        assert (type(found), found) == (type(value), value)
    assert _read(source.metadata["array"]) == values
    assert len(source.metadata["array"]) == len(values)
    assert source.metadata["none"].read() == []
    assert len(source.metadata["none"]) == 0
    assert source.metadata["last"] == 7
    np.testing.assert_array_equal(source.view("w"), W)


def _nested(depth: int, leaf: Any, count: int = 2) -> Any:
    """Return (type, elements) of an array with so many arrays around its innermost one, and the same as lists."""
    kind, elements = leaf
    plain = list(elements)
    for _ in range(depth):
        kind, elements, plain = ARRAY, [(kind, elements)] * count, [plain] * count
    return (kind, elements), plain


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("leaf", [(UINT32, [1, 2]), (BOOL, [True]), (STRING, ["a", "größe", ""]), (12, [0.5]), (UINT32, [])])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_arrays_in_arrays(tmp_path: Path, write_gguf: Write, depth: int, leaf: Any, order: str) -> None:
    """Arrays with up to four arrays around them are stepped over, and read back when they are asked for."""
    value, plain = _nested(depth, leaf)
    source = Source(write_gguf(tmp_path / "m.gguf", {"w": W}, {"k": (ARRAY, value), "last": 7}, order=order))

    def text(found: Any) -> Any:
        return [text(one) for one in found] if isinstance(found, list) else found.decode() if isinstance(found, bytes) else found

    for _ in range(2):  # the second time too
        assert text(source.metadata["k"].read()) == plain
    assert source.metadata["last"] == 7
    np.testing.assert_array_equal(source.view("w"), W)


@pytest.mark.parametrize("depth", [5, 6, 40])
def test_arrays_too_deep(tmp_path: Path, write_gguf: Write, depth: int) -> None:
    """A fifth array around an array is refused, with the key's name, whatever is inside."""
    value, _ = _nested(depth, (UINT32, [1]), count=1)
    path = write_gguf(tmp_path / "m.gguf", {"w": W}, {"k": (ARRAY, value)})
    with pytest.raises(SourceError, match="'k'") as caught:
        open_checkpoint(path)
    assert caught.value.path == path
    assert caught.value.offset is not None


def test_uneven_arrays(tmp_path: Path, write_gguf: Write) -> None:
    """The inner arrays of an array may be of different types and lengths."""
    inner = [(UINT32, [1]), (STRING, ["a", "b"]), (ARRAY, [(BOOL, [True, False]), (11, [])]), (0, [])]
    source = Source(write_gguf(tmp_path / "m.gguf", {"w": W}, {"k": (ARRAY, (ARRAY, inner))}))
    assert source.metadata["k"].read() == [[1], [b"a", b"b"], [[True, False], []], []]


def test_strings_that_are_not_utf8(tmp_path: Path, write_gguf: Write) -> None:
    """Tokens are bytes: those of no character come back as they are."""
    tokens = [b"\xff\xfe", b"", b"\xc3", "ü".encode()]
    source = Source(write_gguf(tmp_path / "m.gguf", {"w": W}, {"k": (ARRAY, (STRING, tokens))}))
    assert source.metadata["k"].read() == tokens


@pytest.mark.parametrize("alignment", [1, 2, 8, 16, 64, 4096])
@pytest.mark.parametrize("order", ["<", ">"])
def test_alignment(tmp_path: Path, write_gguf: Write, alignment: int, order: str) -> None:
    """Tensors stand where the file's own alignment puts them."""
    tensors = {"a": np.arange(3, dtype=np.int8), "b": W, "c": np.arange(5, dtype=np.int16), "d": W.astype(np.float64)}
    source = Source(write_gguf(tmp_path / "m.gguf", tensors, {"k": "x"}, order=order, alignment=alignment))
    source.check()
    for name, tensor in tensors.items():
        assert source.tensors[name].offset % alignment == 0
        np.testing.assert_array_equal(source.view(name), tensor)


def test_alignment_behind_other_keys(tmp_path: Path) -> None:
    """The gguf package, too, finds tensors at an alignment that stands behind arrays and text."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("k.words", ["a", "bb", "ccc"])
    writer.add_custom_alignment(128)
    writer.add_tensor("a", W)
    writer.add_tensor("b", W + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = Source(path)
    for tensor in gguf.GGUFReader(path).tensors:
        assert source.tensors[tensor.name].offset == tensor.data_offset
        assert source.tensors[tensor.name].offset % 128 == 0


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 150,000 tokens with their scores and types."""
    tokens = [f"token{place}".encode() for place in range(150_000)]
    path = tmp_path_factory.mktemp("vocabulary") / "m.gguf"
    strings = b"".join(struct.pack("<Q", len(token)) + token for token in tokens)
    keys = [("tokenizer.ggml.tokens", STRING, strings)]
    keys += [("tokenizer.ggml.scores", 6, bytes(600_000)), ("tokenizer.ggml.token_type", 5, bytes(600_000))]
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys))
    for name, kind, raw in keys:
        content += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<IIQ", ARRAY, kind, len(tokens)) + raw
    path.write_bytes(content)
    return path


def test_a_vocabulary_is_not_built(vocabulary: Path) -> None:
    """Opening 150,000 tokens builds no object for each: 300 KB is two bytes a token, the least list takes eight."""
    tracemalloc.start()
    (source,) = open_checkpoint(vocabulary)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300_000
    assert len(source.metadata["tokenizer.ggml.tokens"]) == 150_000


def test_a_vocabulary_is_read_when_asked_for(vocabulary: Path) -> None:
    """Every token, score and type is there when somebody asks."""
    metadata = Source(vocabulary).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, ArrayValue)
    assert tokens.read() == [f"token{place}".encode() for place in range(150_000)]
    assert metadata["tokenizer.ggml.scores"].read() == [0.0] * 150_000
    assert metadata["tokenizer.ggml.token_type"].read() == [0] * 150_000


@pytest.mark.parametrize("left", [0, 7, 8, 9])
def test_a_cut_vocabulary(vocabulary: Path, tmp_path: Path, left: int) -> None:
    """A vocabulary that ends inside a token, or its length, is refused, by its key's name."""
    start = vocabulary.read_bytes().index(b"token149998") - 8
    path = tmp_path / "m.gguf"
    path.write_bytes(vocabulary.read_bytes()[: start + left])
    with pytest.raises(SourceError, match=r"tokenizer\.ggml\.tokens"):
        open_checkpoint(path)


def test_long_texts_stay_where_they_are(tmp_path: Path, write_gguf: Write) -> None:
    """A text of megabytes is read when it is asked for; short ones behind it are there at once, as long as there are few."""
    long = "x" * (3 << 20) + "\N{GRINNING FACE}"
    path = write_gguf(tmp_path / "m.gguf", {"a": np.ones(4, np.float32)}, {"long": long, "short": "abc", **{f"k{n}": "y" * 60_000 for n in range(40)}})
    tracemalloc.start()
    (source,) = open_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20
    assert source.metadata["short"] == "abc"
    assert source.metadata["k0"] == "y" * 60_000
    assert source.metadata["long"].read() == [long.encode()]
    assert source.metadata["k39"].read() == [b"y" * 60_000]
