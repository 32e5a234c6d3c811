"""Throw mutated and invented files at both readers: they open, or are refused with a SourceError; nothing else happens.

`mutations` turns a valid file into a damaged one; `gguf_files` and `safetensors_files` are grammars: they make headers of which
most numbers are right and some are not. What opens has to keep every promise of a Source, in bounded memory.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import numpy as library

import quantcache as qc
from quantcache.errors import CodecError, SourceError
from quantcache.loader.formats.gguf import TYPES, ArrayValue
from quantcache.loader.source import Source, open_checkpoint
from quantcache.tensor import BLOCKS, ITEMSIZE

MIB = 1 << 20
U64 = (1 << 64) - 1
SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
#: numbers at which sizes wrap, signs change, blocks end
EDGES = [
    0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255, 256, 1 << 16, 1 << 20, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, U64 - 7, U64,
]  # fmt: skip


# ---- what has to hold --------------------------------------------------------------------------------------------


def _check(source: Source) -> None:
    """Check that every tensor of a source can be had as the header describes it, or fails with its own error."""
    for name, info in source.tensors.items():
        assert info.name == name
        assert info.offset + info.nbytes <= source.file.nbytes
        assert all(axis >= 0 for axis in info.shape)
        try:
            view = source.view(name)
            piece = source.piece(info, 0, info.size) if info.is_known else view
        except SourceError as error:
            assert not info.is_known
            assert (error.path, error.tensor) == (source.path, name)
            continue
        except CodecError:
            assert info.is_block  # big-endian blocks of a type that nothing decodes
            continue
        assert info.is_known
        assert view.nbytes == piece.nbytes == info.nbytes
        assert not view.flags.writeable
        if not info.is_block:
            turned = info.transposed
            assert view.shape == ((*info.shape[:-2], info.shape[-1], info.shape[-2]) if turned else info.shape)
            assert view.dtype.itemsize == ITEMSIZE[info.dtype]
    for value in source.metadata.values():
        if isinstance(value, ArrayValue):
            assert len(value.read()) == len(value)


def read_all(path: Path, *, load: bool = False) -> bool:
    """Open a file and read all of it; return whether it opened.

    Args:
        path: the file.
        load: quantize it too.
    """
    try:
        for source in open_checkpoint(path):
            _check(source)
        if load:
            _load(path)
    except SourceError as error:
        assert error.path == path
        assert str(error).removeprefix(str(path)).isprintable()
        return False
    return True


def survives(path: Path, *, load: bool = False) -> bool:
    """Read all of a file in bounded memory; return whether it opened."""
    tracemalloc.start()
    try:
        return read_all(path, load=load)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < path.stat().st_size + 64 * MIB


def _load(path: Path) -> None:
    """Make nf4 of everything, and take every tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qc.QuantcacheWarning)  # weights of any bytes are often NaN
        with qc.load(path, "nf4", include=["*"], native="convert", mode="off", threads=1) as model:
            for name in model:
                try:
                    tensor = model[name]
                    if isinstance(tensor, qc.QuantTensor):
                        assert tensor.dequantize(np.float32).shape == tensor.shape
                except (SourceError, CodecError):
                    assert model._home[name].source.tensors[name].is_block


# ---- mutations ---------------------------------------------------------------------------------------------------

_PLACES = st.integers(0, 1 << 14)
_STEPS = st.one_of(
    st.tuples(st.just("flip"), _PLACES, st.integers(1, 255)),
    st.tuples(st.just("length"), _PLACES, st.sampled_from(EDGES)),
    st.tuples(st.just("insert"), _PLACES, st.sampled_from(EDGES)),
    st.tuples(st.just("count"), _PLACES, st.sampled_from(EDGES)),
    st.tuples(st.just("cut"), _PLACES, st.just(0)),
    st.tuples(st.just("remove"), _PLACES, st.integers(1, 16)),
    st.tuples(st.just("repeat"), _PLACES, st.integers(1, 64)),
)


def mutated(content: bytes, steps: list[tuple[str, int, int]], *, head: int) -> bytes:
    """Return a damaged copy.

    Args:
        content: of a valid file.
        steps: what to do, where (modulo the length), and with what.
        head: bytes of its header; three steps of four fall into it.
    """
    found = bytearray(content)
    for what, where, value in steps:
        if not found:
            break
        place = where % (min(head, len(found)) if where % 4 else len(found))
        wide = value.to_bytes(8, "little") if where % 3 else value.to_bytes(8, "big")
        if what == "flip":
            found[place] ^= value
        elif what == "length":
            found[place : place + 8] = wide
        elif what == "count":
            found[place : place + 4] = wide[:4] if where % 3 else wide[4:]
        elif what == "insert":
            found[place:place] = wide
        elif what == "cut":
            del found[place:]
        elif what == "remove":
            del found[place : place + value]
        else:
            found[place:place] = found[place : place + value]
    return bytes(found)


def small_gguf(order: str, version: int) -> tuple[bytes, int]:
    """Return a file of RWKV's names, every kind of value, elements, blocks and an unknown type; and the length of its header."""
    keys = [
        ("general.architecture", 8, "rwkv7"), ("general.alignment", 4, 32), ("rwkv7.wkv.head_size", 4, 4), ("k.f64", 12, 0.5),
        ("k.words", 9, (8, ["a", "bc", "größe"])), ("k.nested", 9, (9, [(4, [1, 2]), (9, [(8, ["x"])]), (7, [True])])),
        ("split.count", 2, 1), ("split.no", 2, 0),
    ]  # fmt: skip
    tensors = [
        ("blk.0.time_mix_lerp_fused.weight", 0, (6, 1, 1, 8), 192), ("blk.0.time_mix_w1.weight", 1, (4, 6), 48),
        ("blk.0.time_mix_r_k.weight", 30, (8,), 16), ("q8", 8, (2, 64), 136), ("q4k", 12, (1, 256), 144), ("unknown", 99, (5,), 40),
        ("i64", 27, (3,), 24), ("empty", 0, (0, 3), 0),
    ]  # fmt: skip
    return build_gguf(order, version, keys, [(*tensor, None) for tensor in tensors])


@pytest.fixture(scope="module", params=["<3", ">3", "<2"])
def gguf_file(request: pytest.FixtureRequest) -> tuple[bytes, int]:
    """Return a valid GGUF file and the length of its header."""
    return small_gguf(request.param[0], int(request.param[1]))


def small_safetensors() -> tuple[bytes, int]:
    """Return a file with text beyond ASCII, an empty tensor and metadata; and the length of its header."""
    content = library.save(
        {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "ü": np.arange(5, dtype=np.uint8), "c": np.zeros((0, 2))},
        metadata={"format": "pt", "k": '{"a":[1,{"b":"\\u0041"}]}'},
    )
    return content, 8 + int.from_bytes(content[:8], "little")


@pytest.fixture(scope="module")
def safetensors_file() -> tuple[bytes, int]:
    """Return a valid safetensors file and the length of its header."""
    return small_safetensors()


def test_valid_files_survive(tmp_path: Path, gguf_file: tuple[bytes, int], safetensors_file: tuple[bytes, int]) -> None:
    """What is mutated below opens as long as it is whole: else nothing behind the header would ever be reached."""
    for content, _ in (gguf_file, safetensors_file):
        path = tmp_path / "m"
        path.write_bytes(content)
        assert survives(path, load=True)
    (source,) = open_checkpoint(path)
    assert len(source.tensors) == 3


@settings(SETTINGS, max_examples=300)
@given(steps=st.lists(_STEPS, min_size=1, max_size=4))
def test_mutated_gguf(tmp_path: Path, gguf_file: tuple[bytes, int], steps: list[tuple[str, int, int]]) -> None:
    """A damaged GGUF opens as a Source that keeps its promises, or is refused."""
    path = tmp_path / "m.gguf"
    path.write_bytes(mutated(gguf_file[0], steps, head=gguf_file[1]))
    survives(path, load=bool(steps[0][1] % 2))


@settings(SETTINGS, max_examples=300)
@given(steps=st.lists(_STEPS, min_size=1, max_size=4))
def test_mutated_safetensors(tmp_path: Path, safetensors_file: tuple[bytes, int], steps: list[tuple[str, int, int]]) -> None:
    """A damaged safetensors file opens as a Source that keeps its promises, or is refused."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(mutated(safetensors_file[0], steps, head=safetensors_file[1]))
    survives(path, load=bool(steps[0][1] % 2))


# ---- grammars ----------------------------------------------------------------------------------------------------

_SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _text(order: str, value: str | bytes) -> bytes:
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return struct.pack(f"{order}Q", len(raw)) + raw


def _value(order: str, kind: int, value: Any) -> bytes:
    if kind in _SCALAR:
        return struct.pack(f"{order}{_SCALAR[kind]}", value)
    if kind == 8:
        return _text(order, value)
    if kind == 9:
        inner, elements = value
        return struct.pack(f"{order}IQ", inner, len(elements)) + b"".join(_value(order, inner, one) for one in elements)
    return bytes(8)


def build_gguf(
    order: str, version: int, keys: list[tuple[str, int, Any]], tensors: list[tuple[str, int, tuple[int, ...], int, int | None]]
) -> tuple[bytes, int]:
    """Return a GGUF file and the length of its header.

    Args:
        order: "<" or ">".
        version: of the format.
        keys: name, type, value.
        tensors: name, type, shape, bytes that it has, offset (None: the right one).
    """
    header = b"GGUF" + struct.pack(f"{order}IQQ", version & 0xFFFFFFFF, len(tensors), len(keys))
    for name, kind, value in keys:
        header += _text(order, name) + struct.pack(f"{order}I", kind) + _value(order, kind, value)
    size = 0
    for name, kind, shape, nbytes, offset in tensors:
        header += _text(order, name) + struct.pack(f"{order}I", len(shape))
        header += struct.pack(f"{order}{len(shape)}Q", *reversed(shape))
        header += struct.pack(f"{order}IQ", kind, size if offset is None else offset)
        size += -(-nbytes // 32) * 32
    start = -(-len(header) // 32) * 32
    pattern = bytes(range(256)) * (size // 256 + 1)
    return header.ljust(start, b"\0") + pattern[:size], len(header)


_NAMES = st.one_of(
    st.sampled_from(
        ["blk.0.time_mix_lerp_fused.weight", "blk.0.time_mix_w1.weight", "blk.0.time_mix_w2.weight", "blk.0.time_mix_r_k.weight",
         "blk.0.time_mix_w0.weight", "blk.0.time_mix_first.weight", "blk.0.time_mix_key.weight", "blocks.0.att.key.weight",
         "blocks.0.att.x_rwkvag", "blocks.0.att.w1", "token_embd_norm.weight", "blocks.0.ln0.weight", "blk.{}.attn_norm.weight", "a.weight"]
    ),
    st.text(max_size=12),
)  # fmt: skip
_KEY_NAMES = st.one_of(
    st.sampled_from(
        ["general.architecture", "split.no", "split.tensors.count", "rwkv7.wkv.head_size", "rwkv6.wkv.head_size",
         "tokenizer.ggml.tokens"]
    ),
    st.text(min_size=1, max_size=8),
)  # fmt: skip
#: keys of which most values make the file wrong: one file of eight has one
_TOUCHY = st.sampled_from(["general.alignment", "split.count", "", "k" * 70_000])


def _scalars(kind: int) -> st.SearchStrategy[Any]:
    if kind == 8:
        return st.one_of(st.sampled_from(["rwkv7", "rwkv6", "rwkv", "llama"]), st.text(max_size=6), st.binary(max_size=4))
    if kind in (6, 12):
        return st.floats(width=32)
    if kind == 7:
        return st.booleans()
    width, signed = {0: (8, False), 1: (8, True), 2: (16, False), 3: (16, True), 4: (32, False), 5: (32, True), 10: (64, False), 11: (64, True)}[kind]
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
    return st.one_of(st.sampled_from([n for n in EDGES if n <= high]), st.integers(low, high))


_PLAIN = st.sampled_from([*_SCALAR, 8]).flatmap(lambda kind: st.tuples(st.just(kind), _scalars(kind)))
_LISTS = st.sampled_from([*_SCALAR, 8]).flatmap(lambda kind: st.tuples(st.just(kind), st.lists(_scalars(kind), max_size=4)))
_ARRAYS = st.recursive(_LISTS, lambda inner: st.tuples(st.just(9), st.lists(inner, max_size=3)), max_leaves=6)
_BROKEN = st.tuples(st.sampled_from([13, 255, U64 >> 32]), st.just(0))
_VALUES = st.integers(0, 19).flatmap(lambda n: _BROKEN if n == 7 else _PLAIN if n % 3 else st.tuples(st.just(9), _ARRAYS))
_KEYS = st.tuples(_KEY_NAMES, _VALUES).map(lambda pair: (pair[0], *pair[1]))


@st.composite
def _gguf_tensor(draw: st.DrawFn) -> tuple[str, int, tuple[int, ...], int, int | None]:
    """Draw a tensor; most have a size and an offset that are right."""
    kind = draw(st.sampled_from([*TYPES, 99, 4]))
    block, nbytes = BLOCKS.get(TYPES.get(kind, ""), (1, ITEMSIZE.get(TYPES.get(kind, ""), 1)))
    if draw(st.integers(0, 15)) != 7:
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 5, 6]), max_size=3)))
        shape = (*shape, block * draw(st.integers(0, 2))) if block > 1 else shape
        return draw(_NAMES), kind, shape, int(np.prod(shape, dtype=int)) // block * nbytes, None
    shape = tuple(draw(st.lists(st.sampled_from(EDGES), max_size=5)))
    return draw(_NAMES), kind, shape, draw(st.integers(0, 300)), draw(st.one_of(st.none(), st.sampled_from([0, 32, 64, *EDGES])))


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    """Draw a GGUF file."""
    keys = draw(st.lists(_KEYS, max_size=4, unique_by=lambda key: key[0]))
    if draw(st.integers(0, 7)) == 5:
        keys.append((draw(_TOUCHY), *draw(_PLAIN)))
    if draw(st.booleans()):
        architecture = draw(st.sampled_from(["rwkv7", "rwkv6", "rwkv", "llama"]))
        head = f"{architecture}.wkv.head_size"
        keys = [("general.architecture", 8, architecture), *(key for key in keys if key[0] not in ("general.architecture", head))]
        keys += [(head, 10, draw(st.sampled_from(EDGES)))] if draw(st.booleans()) else []
    tensors = draw(st.lists(_gguf_tensor(), max_size=4, unique_by=None if draw(st.integers(0, 7)) == 5 else lambda tensor: tensor[0]))
    version = draw(st.sampled_from([3] * 8 + [2] * 4 + [1, 1 << 24]))
    content, _ = build_gguf(draw(st.sampled_from("<>")), version, keys, tensors)
    return content[: len(content) - draw(st.sampled_from([0] * 8 + [1, 40]))] + bytes(draw(st.sampled_from([0, 0, 1, 32])))


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """Draw a safetensors file."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(_NAMES, max_size=4, unique=True)):
        dtype = draw(st.sampled_from([*ITEMSIZE, "F4", "f32"]))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 64]), max_size=3))
        nbytes = int(np.prod(shape, dtype=int)) * ITEMSIZE.get(dtype, 1)
        entry: dict[str, Any] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
        if not draw(st.integers(0, 5)):
            entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(
                st.one_of(_JSON, st.lists(st.sampled_from([*EDGES, -1, 1.0, True]), max_size=3))
            )
        header[name] = entry
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.one_of(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3), _JSON))
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass") + b" " * draw(st.integers(0, 9))
    length = draw(st.sampled_from([len(text)] * 6 + EDGES))
    content = bytes(range(256)) * (position // 256 + 1)
    return length.to_bytes(8, "little") + text + content[: max(0, position - draw(st.sampled_from([0, 0, 0, 1])))]


@settings(SETTINGS, max_examples=500)
@given(content=gguf_files(), load=st.booleans())
def test_invented_gguf(tmp_path: Path, content: bytes, *, load: bool) -> None:
    """An invented GGUF opens as a Source that keeps its promises, or is refused."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    survives(path, load=load)


@settings(SETTINGS, max_examples=500)
@given(content=safetensors_files(), load=st.booleans())
def test_invented_safetensors(tmp_path: Path, content: bytes, *, load: bool) -> None:
    """An invented safetensors file opens as a Source that keeps its promises, or is refused."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    survives(path, load=load)


@pytest.mark.parametrize("files", [gguf_files(), safetensors_files()], ids=["gguf", "safetensors"])
def test_the_grammars_reach_both_ends(tmp_path: Path, files: st.SearchStrategy[bytes]) -> None:
    """Of what the grammars make a good part opens and a good part does not: else they would test one path only."""
    opened: list[bool] = []

    @settings(SETTINGS, max_examples=100, database=None)
    @given(content=files)
    def draw(content: bytes) -> None:
        path = tmp_path / "m"
        path.write_bytes(content)
        try:
            opened.append(any(source.tensors for source in open_checkpoint(path)))
        except SourceError:
            opened.append(False)
        except ValueError:
            opened.append(False)  # the tests above tell

    draw()
    assert 10 <= sum(opened) <= 90
