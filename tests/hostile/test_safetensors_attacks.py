"""Attack the safetensors reader: every lie in a header ends in a SourceError that says what, where and in which file."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import numpy as library

import quantcache as qc
from quantcache.errors import SourceError
from quantcache.loader.source import open_checkpoint

MIB = 1 << 20


def _file(folder: Path, header: Any, content: bytes = b"", length: int | None = None) -> Path:
    """Write a file with this header (an object, or the very bytes) and this data section."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path = folder / "attack.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + text + content)
    return path


def _entry(begin: Any, end: Any, shape: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _refused(path: Path, match: str, *, tensor: str | None = None, offset: int | None = None) -> SourceError:
    """Check that the file is refused, the message names it, and tensor and offset are these."""
    with pytest.raises(SourceError, match=match) as caught:
        open_checkpoint(path)
    error = caught.value
    assert error.path == path
    assert str(path) in str(error)
    assert error.tensor == tensor
    if tensor is not None:
        assert "tensor" in str(error)
    if offset is not None:
        assert error.offset == offset
        assert f"at byte {offset}" in str(error)
    return error


def _small(path: Path) -> bytes:
    library.save_file(
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.uint8), "c": np.zeros((0, 2))},
        path,
        metadata={"format": "pt"},
    )
    return path.read_bytes()


# ---- lengths -----------------------------------------------------------------------------------------------------


def test_truncated_anywhere(tmp_path: Path) -> None:
    """A file cut at any length is refused."""
    path = tmp_path / "m.safetensors"
    content = _small(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(SourceError) as caught:
            open_checkpoint(path)
        assert caught.value.path == path
        assert caught.value.offset is not None


def test_truncated_data_names_the_tensor(tmp_path: Path) -> None:
    """A file that ends inside its last tensor names it, and where it starts."""
    path = _file(tmp_path, {"a": _entry(0, 4, [4]), "b": _entry(4, 104, [100])}, bytes(50))
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    _refused(path, "truncated", tensor="b", offset=start + 4)


@pytest.mark.parametrize("length", [1000, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1, (1 << 64) - 8])
def test_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    """A length beyond the file is refused before anything of that size is made."""
    path = _file(tmp_path, {}, length=length)
    tracemalloc.start()
    _refused(path, "header claims", offset=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MIB


def test_absurd_header(tmp_path: Path) -> None:
    """A header beyond the limit is refused unread, even if the file is that long."""
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write((40 * MIB).to_bytes(8, "little") + b"{")
        file.truncate(8 + 40 * MIB)  # a hole: takes no disk
    tracemalloc.start()
    _refused(path, "the limit is", offset=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MIB


def test_header_shorter_than_its_json(tmp_path: Path) -> None:
    """A length that ends inside the JSON is refused."""
    _refused(_file(tmp_path, {"a": _entry(0, 1, [1])}, b"x", length=20), "not JSON")


def test_empty_header(tmp_path: Path) -> None:
    """A header of no bytes is no model."""
    _refused(_file(tmp_path, b"", b"{}", length=0), "not JSON|not a model")


# ---- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [b"{", b"{]", b'{"a":}', b"{}x", b"{'a':1}", b"{NaN}", b'{"a":01}', b'{"a":"\x01"}', b"{\0}", b"{} {}"],
)
def test_broken_json(tmp_path: Path, text: bytes) -> None:
    """A header that is not JSON is refused."""
    _refused(_file(tmp_path, text), "not JSON")


@pytest.mark.parametrize("depth", [100, 2_000, 100_000, 5_000_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"], ids=["lists", "objects"])
def test_deep_nesting(tmp_path: Path, depth: int, brackets: str) -> None:
    """Nesting of any depth is refused, and does not overflow the stack."""
    inner = b"[" * depth + b"]" * depth if brackets == "[]" else b'{"a":' * depth + b"1" + b"}" * depth
    _refused(_file(tmp_path, b'{"a":' + inner + b"}"), "not JSON|entry must have|more than", tensor="a" if depth == 100 else None)


@pytest.mark.parametrize("mark", ["_", ".", "a.", "0."])
def test_long_name(tmp_path: Path, mark: str) -> None:
    """A long name of nothing but separators is loaded in memory of its own size, not of its square."""
    name = mark * 16_000 + ".weight"
    path = _file(tmp_path, {name: _entry(0, 4, [1], "F32")}, bytes(4))
    tracemalloc.start()
    with qc.load(path, "f16", mode="off") as model:
        assert model[name].tolist() == [0]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MIB


@pytest.mark.parametrize("inside", [b"", b'{"b":['])
def test_many_values(tmp_path: Path, inside: bytes) -> None:
    """More values than a model has tensors are refused before Python makes an object of each."""
    path = _file(tmp_path, b'{"a":' + inside + b"[" + b"1," * 600_000 + b"1]}")
    tracemalloc.start()
    _refused(path, "more than", offset=8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB


def test_many_commas_in_a_name(tmp_path: Path) -> None:
    """Commas and brackets inside of a text are no values."""
    text = json.dumps({"__metadata__": {"k": "[,{" * 300_000 + '\\"'}, "w": _entry(0, 1, [1])}).encode()
    (source,) = open_checkpoint(_file(tmp_path, text, b"x"))
    assert list(source.tensors) == ["w"]


@pytest.mark.parametrize("tail", [b'"' + b'\\"' * 1_000_000, b'"' * 1_000_001, b'"' + b"\\" * 2_000_001, b'"a' * 1_000_000], ids=len)
def test_texts_without_an_end(tmp_path: Path, tail: bytes) -> None:
    """A header of a million quotes that close nothing is refused in one pass over it: in two, it would take days."""
    path = _file(tmp_path, b'{"a":[' + b"1," * 600_000 + tail)
    code = "import sys; from quantcache.loader.source import open_checkpoint; open_checkpoint(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=20, check=False)
    assert "SourceError" in done.stderr


@pytest.mark.parametrize("raw", [b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"])
def test_bad_utf8(tmp_path: Path, raw: bytes) -> None:
    """A header that is not UTF-8 is refused, with the place of the byte."""
    text = b'{"' + raw + b'":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    _refused(_file(tmp_path, text, b"x"), "not UTF-8", offset=10)


def test_lone_surrogate(tmp_path: Path) -> None:
    """A name that no UTF-8 text can hold, smuggled in by an escape, is refused: the library refuses it too."""
    text = rb'{"\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    with pytest.raises(SourceError) as caught:
        open_checkpoint(_file(tmp_path, text, b"x"))
    str(caught.value).encode()  # the message can be printed
    with pytest.raises(SourceError):
        open_checkpoint(_file(tmp_path, rb'{"__metadata__":{"a":"\udfff"}}'))


def test_duplicate_name(tmp_path: Path) -> None:
    """A name that stands twice is refused, and named: readers disagree on which one counts."""
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    error = _refused(_file(tmp_path, f'{{"twin":{entry},"twin":{entry}}}'.encode(), b"x"), "twice")
    assert "twin" in str(error)


def test_duplicate_name_by_escape(tmp_path: Path) -> None:
    """A name that stands twice, once with an escape, is the same name."""
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    _refused(_file(tmp_path, f'{{"a":{entry},"\\u0061":{entry}}}'.encode(), b"x"), "twice")


def test_duplicate_key_in_an_entry(tmp_path: Path) -> None:
    """A key that stands twice inside an entry is refused."""
    text = b'{"a":{"dtype":"U8","shape":[1],"shape":[2],"data_offsets":[0,1]}}'
    assert "shape" in str(_refused(_file(tmp_path, text, b"x"), "twice"))


@pytest.mark.parametrize("metadata", [[], "x", 1, {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": {"b": "c"}}, {"a": True}])
def test_metadata_not_strings(tmp_path: Path, metadata: Any) -> None:
    """Metadata that is not an object of strings is refused."""
    path = _file(tmp_path, {"__metadata__": metadata, "a": _entry(0, 1, [1])}, b"x")
    _refused(path, "__metadata__", offset=8)


# ---- entries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        None, 1, "x", [], {}, {"dtype": "U8", "shape": [1]}, {"shape": [1], "data_offsets": [0, 1]},
        {**_entry(0, 1, [1]), "extra": 1},
    ],
)  # fmt: skip
def test_entry_of_other_keys(tmp_path: Path, entry: Any) -> None:
    """An entry without one of its three keys, or with a fourth, is refused."""
    _refused(_file(tmp_path, {"a": entry}, b"x"), "entry must have", tensor="a", offset=8)


@pytest.mark.parametrize("dtype", ["F7", "", "f32", "Q4_K", None, 1, ["U8"], {"a": 1}, "U8\0", "x" * 10_000])
def test_unknown_dtype(tmp_path: Path, dtype: Any) -> None:
    """An unknown element type is refused, in a message of bearable length."""
    error = _refused(_file(tmp_path, {"a": _entry(0, 1, [1], dtype)}, b"x"), "element type", tensor="a")
    assert len(str(error)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    "shape", [None, 1, "1", {}, [None], ["1"], [1.0], [True], [[1]], [-1], [-1, -1], [1 << 63], [1 << 64], [1] * 65]
)
def test_shape_not_sizes(tmp_path: Path, shape: Any) -> None:
    """A shape that is not a list of whole, non-negative sizes is refused; True is not 1."""
    _refused(_file(tmp_path, {"a": _entry(0, 1, shape)}, b"x"), "shape", tensor="a", offset=8)


@pytest.mark.parametrize(
    "offsets",
    [None, 0, [], [0], [0, 1, 2], ["0", "1"], [0.0, 1.0], [False, True], [-1, 0], [0, -1], [0, 1 << 63], [1 << 64, 1]],
)
def test_offsets_not_positions(tmp_path: Path, offsets: Any) -> None:
    """data_offsets that are not two whole, non-negative positions are refused; False is not 0."""
    entry = {"dtype": "U8", "shape": [1], "data_offsets": offsets}
    _refused(_file(tmp_path, {"a": entry}, b"x"), "data_offsets", tensor="a", offset=8)


def test_offsets_backwards(tmp_path: Path) -> None:
    """A tensor that ends before it starts is refused."""
    _refused(_file(tmp_path, {"a": _entry(4, 0, [4])}, bytes(4)), "data_offsets span -4", tensor="a")


@pytest.mark.parametrize("shape", [[1 << 62, 4], [1 << 32, 1 << 32], [1 << 62, 1 << 62, 1 << 62], [(1 << 63) - 1] * 64])
@pytest.mark.parametrize("dtype", ["U8", "F64"])
def test_shape_overflow(tmp_path: Path, shape: list[int], dtype: str) -> None:
    """Sizes whose product wraps in 64 bits are refused, also where the wrapped product would fit."""
    _refused(_file(tmp_path, {"a": _entry(0, 0, shape, dtype)}), "overflows|needs", tensor="a")


@pytest.mark.parametrize("shape", [[0, 1 << 62, 1 << 62], [1 << 40, 1 << 40, 0]])
def test_shape_overflow_behind_a_zero(tmp_path: Path, shape: list[int]) -> None:
    """A size of 0 does not hide an impossible shape: it is refused at once, or its view is empty."""
    path = _file(tmp_path, {"a": _entry(0, 0, shape, "F32")})
    try:
        (source,) = open_checkpoint(path)
        assert source.view("a").size == 0
    except SourceError as error:
        assert error.tensor == "a"


@pytest.mark.parametrize(("end", "shape"), [(3, [4]), (5, [4]), (0, [1]), (4, []), (1, [0])])
def test_size_and_offsets_disagree(tmp_path: Path, end: int, shape: list[int]) -> None:
    """A tensor whose offsets span other bytes than its shape needs is refused."""
    _refused(_file(tmp_path, {"a": _entry(0, end, shape)}, bytes(end)), "needs", tensor="a", offset=8)


def test_overlap(tmp_path: Path) -> None:
    """Two tensors that share bytes are refused, with the second's name and place."""
    path = _file(tmp_path, {"a": _entry(0, 4, [4]), "b": _entry(2, 6, [4])}, bytes(6))
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    _refused(path, "overlaps", tensor="b", offset=start + 2)


def test_two_names_for_the_same_bytes(tmp_path: Path) -> None:
    """Two tensors of exactly the same bytes are refused."""
    _refused(_file(tmp_path, {"a": _entry(0, 4, [4]), "b": _entry(0, 4, [4])}, bytes(4)), "overlaps", tensor="b")


def test_tensor_inside_another(tmp_path: Path) -> None:
    """An empty tensor in the middle of another one is refused."""
    _refused(_file(tmp_path, {"a": _entry(0, 4, [4]), "b": _entry(2, 2, [0])}, bytes(4)), "overlaps", tensor="b")


def test_hole(tmp_path: Path) -> None:
    """Bytes between two tensors that belong to none are refused."""
    path = _file(tmp_path, {"a": _entry(0, 4, [4]), "b": _entry(6, 8, [2])}, bytes(8))
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    _refused(path, "hole", tensor="b", offset=start + 6)


def test_hole_at_the_start(tmp_path: Path) -> None:
    """Bytes before the first tensor are refused."""
    _refused(_file(tmp_path, {"a": _entry(2, 4, [2])}, bytes(4)), "hole", tensor="a")


@pytest.mark.parametrize("tensors", [{}, {"a": _entry(0, 4, [4])}])
def test_trailing_bytes(tmp_path: Path, tensors: dict[str, Any]) -> None:
    """Bytes after the last tensor are refused, with their place: another file could hide there."""
    nbytes = 4 if tensors else 0
    path = _file(tmp_path, tensors, bytes(nbytes + 3))
    _refused(path, "3 bytes after the last tensor", offset=path.stat().st_size - 3)


def test_name_that_breaks_a_terminal(tmp_path: Path) -> None:
    """Control characters of a name do not reach the message, and a long name is cut."""
    hostile = "\x1b[2J\n\r" + "x" * 100_000
    with pytest.raises(SourceError) as caught:
        open_checkpoint(_file(tmp_path, {hostile: None}))
    assert str(caught.value).removeprefix(str(tmp_path)).isprintable()
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert caught.value.tensor == hostile


def test_names_are_never_paths(tmp_path: Path) -> None:
    """A tensor called like a path is a tensor: nothing is opened or made outside."""
    name = "../../outside/../../../etc/passwd"
    (source,) = open_checkpoint(_file(tmp_path, {name: _entry(0, 1, [1])}, b"x"))
    assert source.view(name).tobytes() == b"x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attack.safetensors"]


def test_huge_number(tmp_path: Path) -> None:
    """A number of a million digits is refused and not computed."""
    text = b'{"a":{"dtype":"U8","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,1]}}'
    with pytest.raises(SourceError):
        open_checkpoint(_file(tmp_path, text, b"x"))


# ---- indexes -----------------------------------------------------------------------------------------------------


def _folder(tmp_path: Path, index: Any) -> tuple[Path, Path]:
    """Write a model with an index into a folder, and a model outside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    library.save_file({"a": np.zeros(1)}, folder / "a.safetensors")
    library.save_file({"a": np.zeros(1)}, tmp_path / "outside.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    return folder, path


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors", "/etc/passwd", "./a.safetensors", "sub/a.safetensors", "a.safetensors/", "..", ".", "",
        "..\\outside.safetensors", "C:\\a.safetensors", "a.safetensors\0.safetensors", "config.json", "a.gguf",
        None, 1, ["a.safetensors"],
    ],
)  # fmt: skip
def test_index_that_leads_elsewhere(tmp_path: Path, shard: Any) -> None:
    """An index may name safetensors files beside it, and nothing else; the tensor and the index are named."""
    folder, index = _folder(tmp_path, {"weight_map": {"w": shard}})
    for given_path in (folder, index):
        with pytest.raises(SourceError) as caught:
            open_checkpoint(given_path)
        assert (caught.value.path, caught.value.tensor) == (index, "w")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"null", b"{}", b"not json", b"\xff\xfe", b'{"weight_map":[]}', b'{"weight_map":{}}',
        b'{"weight_map":"a.safetensors"}', b'{"weight_map":{"a":"a.safetensors","a":"a.safetensors"}}',
        b'{"weight_map":' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_broken_index(tmp_path: Path, content: bytes) -> None:
    """An index that is not an object with a weight_map is refused, and named."""
    folder, index = _folder(tmp_path, content)
    for given_path in (folder, index):
        with pytest.raises(SourceError) as caught:
            open_checkpoint(given_path)
        assert caught.value.path == index


def test_bad_utf8_in_an_index(tmp_path: Path) -> None:
    """The place of a bad byte in an index is counted from the index's start."""
    _, index = _folder(tmp_path, b'{"\xff":1}')
    with pytest.raises(SourceError, match="not UTF-8") as caught:
        open_checkpoint(index)
    assert caught.value.offset == 2


def test_absurd_index(tmp_path: Path) -> None:
    """An index beyond the limit is refused unread."""
    _, index = _folder(tmp_path, b"{")
    with index.open("r+b") as file:
        file.truncate(80 * MIB)
    tracemalloc.start()
    with pytest.raises(SourceError, match="more than"):
        open_checkpoint(index)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MIB


# ---- anything ----------------------------------------------------------------------------------------------------


def _open_and_read(path: Path) -> None:
    """Open a file and view all of it; nothing but a SourceError may come out, and little memory may be taken."""
    tracemalloc.start()
    try:
        for source in open_checkpoint(path):
            for name in source.tensors:
                view = source.view(name)
                assert view.nbytes == source.tensors[name].nbytes
                view.tobytes()
    except SourceError as error:
        str(error).encode()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 * MIB + path.stat().st_size


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(1, 255)), max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 1 << 12)),
)
def test_fuzzed_bytes(tmp_path: Path, flips: list[tuple[int, int]], cut: int | None) -> None:
    """A valid file with any bytes flipped and any tail cut opens, or is refused: nothing else happens."""
    path = tmp_path / "m.safetensors"
    content = bytearray(_small(path))
    for place, mask in flips:
        content[place % len(content)] ^= mask
    path.write_bytes(content if cut is None else content[: cut % len(content)])
    _open_and_read(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 65) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(
        st.text(max_size=5) | st.just("__metadata__"),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "F8_E5M2"]) | JSON,
                "shape": st.lists(st.integers(0, 3), max_size=3) | JSON,
                "data_offsets": st.lists(st.integers(0, 12), min_size=2, max_size=2) | JSON,
            }
        )
        | JSON,
        max_size=3,
    ),
    size=st.integers(0, 40),
)
def test_fuzzed_json(tmp_path: Path, entries: dict[str, Any], size: int) -> None:
    """A header of any JSON opens, or is refused: nothing else happens."""
    _open_and_read(_file(tmp_path, entries, bytes(size)))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "refs/main"])
def test_fifo_in_a_folder(tmp_path: Path, name: str) -> None:
    """A pipe where an index or a revision should be is refused, not waited for."""
    import multiprocessing
    import os

    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    process = multiprocessing.get_context("spawn").Process(target=_expect_refusal, args=(tmp_path,))
    process.start()
    process.join(60)
    waiting = process.is_alive()
    process.kill()
    assert not waiting
    assert process.exitcode == 0


def _expect_refusal(folder: Path) -> None:
    with pytest.raises(SourceError):
        open_checkpoint(folder)
