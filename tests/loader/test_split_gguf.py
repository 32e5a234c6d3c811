"""Hold split GGUF files to the whole file, and to what their names and keys say about each other."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.errors import SourceError, SourceNotFoundError
from quantcache.loader.source import open_checkpoint

Write = Callable[..., Path]
RNG = np.random.default_rng(0)
WIDE = {f"blocks.{n}.w.weight": RNG.standard_normal((64, 128)).astype(np.float32) for n in range(5)}
Q8 = RNG.standard_normal((64, 128)).astype(np.float32)
TENSORS: dict[str, Any] = {
    "emb.weight": RNG.standard_normal((50, 64)).astype(np.float32),
    **WIDE,
    "blocks.4.q.weight": (8, (64, 128), quants.quantize(Q8, GGMLQuantizationType.Q8_0).tobytes()),
    "ids": np.arange(7, dtype=np.int32),
}
NAMES = list(TENSORS)


def _part(folder: Path, number: int, count: int, stem: str = "m") -> Path:
    return folder / f"{stem}-{number:05}-of-{count:05}.gguf"


def _split(
    folder: Path,
    write: Write,
    parts: Sequence[Sequence[str]],
    *,
    stem: str = "m",
    architecture: str = "llama",
    tensors: Mapping[str, Any] = TENSORS,
    keys: Callable[[int], Mapping[str, Any]] = lambda _: {},
) -> list[Path]:
    """Write the parts of a model; keys(number) changes what one of them says."""
    total = sum(map(len, parts))
    paths = []
    for place, names in enumerate(parts):
        said: dict[str, Any] = {"general.architecture": architecture} if place == 0 else {}
        said |= {"split.no": (2, place), "split.count": (2, len(parts)), "split.tensors.count": (5, total)}
        said |= keys(place)
        path = _part(folder, place + 1, len(parts), stem)
        paths.append(write(path, {name: tensors[name] for name in names}, {k: v for k, v in said.items() if v is not None}))
    return paths


@pytest.fixture
def three(tmp_path: Path, write_gguf: Write) -> list[Path]:
    """Write a model in three parts, the tensors of one layer in two of them."""
    return _split(tmp_path, write_gguf, [NAMES[:3], NAMES[3:6], NAMES[6:]])


def _content(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: part.tobytes() for key, part in tensor.parts.items()} if isinstance(tensor, qc.QuantTensor) else tensor.tobytes()
        for name, tensor in model.items()
    }  # fmt: skip


def _refused(path: Path, match: str, named: Path) -> SourceError:
    with pytest.raises(SourceError, match=match) as caught:
        open_checkpoint(path)
    assert caught.value.path == named
    assert str(named) in str(caught.value)
    return caught.value


# ---- what opens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["first", "second", "last", "folder", "text"])
def test_any_part_or_the_folder(three: list[Path], given: str) -> None:
    """Any of the parts, or the folder that holds them, opens all of them, in order."""
    path: Any = {"first": three[0], "second": three[1], "last": three[2], "folder": three[0].parent, "text": str(three[1])}[given]
    sources = open_checkpoint(path)
    assert [source.path for source in sources] == three
    assert [name for source in sources for name in source.tensors] == NAMES
    np.testing.assert_array_equal(sources[1].view(NAMES[3]), TENSORS[NAMES[3]])


@pytest.mark.parametrize("small_first", [False, True])
def test_the_package_splits(tmp_path: Path, small_first: bool) -> None:
    """What the gguf package writes in parts opens, with a first part that has keys and no tensor, too."""
    plain = {name: tensor for name, tensor in TENSORS.items() if not isinstance(tensor, tuple)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=3, small_first_shard=small_first)
    writer.add_string("k.word", "größe")
    for name, tensor in plain.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 + small_first
    for given in (tmp_path, *files):
        sources = open_checkpoint(given)
        assert [source.path for source in sources] == files
        assert [len(source.tensors) for source in sources] == ([0] if small_first else []) + [3, 3, 1]
        assert sources[0].metadata["k.word"] == "größe"
        for name, tensor in plain.items():
            (owner,) = [source for source in sources if name in source.tensors]
            np.testing.assert_array_equal(owner.view(name), tensor)


@pytest.mark.parametrize("quant", ["nf4", "int8", "f16", "native"])
@pytest.mark.parametrize("parts", [[NAMES[:3], NAMES[3:6], NAMES[6:]], [[], NAMES[:1], NAMES[1:]], [NAMES]], ids=len)
def test_loads_as_the_whole_file(tmp_path: Path, write_gguf: Write, parts: list[list[str]], quant: str) -> None:
    """A split model gives what the whole one gives; its second load hits, with a key for every part that has tensors."""
    whole = tmp_path / "whole"
    whole.mkdir()
    with qc.load(write_gguf(whole / "m.gguf", TENSORS, {"general.architecture": "llama"}), quant, mode="off") as model:
        expected = _content(model)
    (tmp_path / "s").mkdir()
    paths = _split(tmp_path / "s", write_gguf, parts)
    keys = []
    for hit in (False, True):
        with qc.load(paths[-1] if hit else tmp_path / "s", quant, cache=tmp_path / "c") as model:
            assert model.hit is (hit or quant == "native")
            assert _content(model) == expected
        keys.append(model.keys_in_store)
    assert keys[0] == keys[1]
    stored = 0 if quant == "native" else sum(bool(part) for part in parts)
    assert len(set(keys[0])) == len(keys[0]) == stored


def test_one_part_changes(three: list[Path], tmp_path: Path, write_gguf: Write) -> None:
    """A part with other weights is quantized again, the parts beside it are not."""
    with qc.load(three[0], "int8", cache=tmp_path / "c") as model:
        list(model)
    before = model.keys_in_store
    changed = TENSORS | {NAMES[3]: TENSORS[NAMES[3]] * 2}
    _split(tmp_path, write_gguf, [NAMES[:3], NAMES[3:6], NAMES[6:]], tensors=changed)
    with qc.load(three[0], "int8", cache=tmp_path / "c") as model:
        assert not model.hit
        np.testing.assert_allclose(model[NAMES[3]].dequantize(np.float32), TENSORS[NAMES[3]] * 2, atol=0.05)
    assert [one == other for one, other in zip(before, model.keys_in_store, strict=True)] == [True, False, True]


@pytest.mark.parametrize("names", ["auto", "file"])
def test_later_parts_have_no_architecture(tmp_path: Path, write_gguf: Write, names: str) -> None:
    """The tensors of every part of an RWKV model are renamed: only the first part says that it is one."""
    theirs = [f"blk.{n}.time_mix_key.weight" for n in range(3)]
    tensors = {name: WIDE[f"blocks.{n}.w.weight"] for n, name in enumerate(theirs)}
    paths = _split(tmp_path, write_gguf, [theirs[:1], theirs[1:]], architecture="rwkv7", tensors=tensors)
    expected = theirs if names == "file" else [f"blocks.{n}.att.key.weight" for n in range(3)]
    sources = open_checkpoint(paths[1], names)
    assert [name for source in sources for name in source.tensors] == expected
    for hit in (False, True):
        with qc.load(tmp_path, "nf4", names=names, cache=tmp_path / "c") as model:
            assert model.hit is hit
            assert list(model) == expected


def test_head_size_stands_in_the_first_part(tmp_path: Path, write_gguf: Write) -> None:
    """A vector is cut into heads by what the first part says."""
    tensors = {f"blk.{n}.time_mix_r_k.weight": np.arange(64, dtype=np.float32) for n in range(2)}
    _split(
        tmp_path, write_gguf, [list(tensors)[:1], list(tensors)[1:]], architecture="rwkv7", tensors=tensors,
        keys=lambda place: {} if place else {"rwkv7.wkv.head_size": 16},
    )  # fmt: skip
    sources = open_checkpoint(tmp_path)
    assert [source.view(f"blocks.{n}.att.r_k").shape for n, source in enumerate(sources)] == [(4, 16), (4, 16)]


def test_a_folder_with_other_files(three: list[Path], tmp_path: Path) -> None:
    """Files that are no models do not stand in the way."""
    for name in ("config.json", "m-00001-of-00003.gguf.part", "README.md"):
        (tmp_path / name).write_text("{}")
    assert [source.path for source in open_checkpoint(tmp_path)] == three


def test_parts_as_links(three: list[Path], tmp_path: Path) -> None:
    """Parts that are links to blobs, as a hub's cache has them, are found by the names of the links."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for place, path in enumerate(three):
        path.rename(blobs / str(place))
        (snapshot / path.name).symlink_to(blobs / str(place))
    for given in (snapshot, snapshot / three[1].name):
        assert [name for source in open_checkpoint(given) for name in source.tensors] == NAMES


@pytest.mark.parametrize("count", [0, 1])
def test_a_whole_file_that_says_so(tmp_path: Path, write_gguf: Write, count: int) -> None:
    """A whole file may say that it is the only part; merged ones say 0."""
    path = write_gguf(tmp_path / "m.gguf", TENSORS, {"split.count": (2, count), "split.no": (2, 0)})
    assert list(open_checkpoint(path)[0].tensors) == NAMES


@pytest.mark.parametrize("order", ["aa", "ab"])
def test_both_names_of_a_tensor_in_two_parts(tmp_path: Path, write_gguf: Write, order: str) -> None:
    """Both names of one tensor keep apart in a split model as they do in a whole one."""
    pair = ["blk.0.time_mix_key.weight", "blocks.0.att.key.weight"]
    tensors = dict(zip(pair, WIDE.values(), strict=False))
    if order == "ab":
        pair.reverse()
    whole = tmp_path / "whole"
    whole.mkdir()
    path = write_gguf(whole / "m.gguf", {name: tensors[name] for name in pair}, {"general.architecture": "rwkv7"})
    expected = list(open_checkpoint(path)[0].tensors)
    assert sorted(expected) == sorted(pair)
    _split(tmp_path, write_gguf, [pair[:1], pair[1:]], architecture="rwkv7", tensors=tensors)
    assert [name for source in open_checkpoint(tmp_path) for name in source.tensors] == expected


# ---- what does not -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_missing_part(three: list[Path], gone: int) -> None:
    """A part that is not there is named, whichever other one was given, and in a folder."""
    three[gone].unlink()
    for given in (*(path for place, path in enumerate(three) if place != gone), three[0].parent):
        error = _refused(given, rf"part {gone + 1} of 3 is missing", three[gone])
        assert error.hint
    with pytest.raises(SourceNotFoundError):
        open_checkpoint(three[gone])


def test_parts_changed_places(three: list[Path]) -> None:
    """Parts whose names were exchanged are refused: each says which one it is."""
    other = three[0].with_name("other")
    three[1].rename(other)
    three[2].rename(three[1])
    other.rename(three[2])
    _refused(three[0], "its name says 2 of 3", three[1])


def test_a_part_twice(three: list[Path]) -> None:
    """A copy of one part under the name of another is refused."""
    shutil.copyfile(three[0], three[1])
    _refused(three[0], "its name says 2 of 3", three[1])


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("said", [{"split.count": (2, 4)}, {"split.count": (2, 2)}, {"split.count": None}, {"split.no": (2, 7)}], ids=str)
def test_a_part_says_something_else(tmp_path: Path, write_gguf: Write, place: int, said: dict[str, Any]) -> None:
    """A part whose number or count is not that of its name is refused, and named."""
    parts = [NAMES[:3], NAMES[3:6], NAMES[6:]]
    paths = _split(tmp_path, write_gguf, parts, keys=lambda number: said if number == place else {})
    _refused(paths[0], rf"its name says {place + 1} of 3", paths[place])


@pytest.mark.parametrize("total", [0, len(NAMES) - 1, len(NAMES) + 1, -1])
def test_tensors_that_are_missing(tmp_path: Path, write_gguf: Write, total: int) -> None:
    """Another number of tensors than the first part promises is refused."""
    paths = _split(tmp_path, write_gguf, [NAMES[:3], NAMES[3:]], keys=lambda _: {"split.tensors.count": (5, total)})
    _refused(tmp_path, rf"should have {total} tensors together, they have {len(NAMES)}", paths[0])


@pytest.mark.parametrize("name", ["model.gguf", "m-1-of-3.gguf", "m-00001-of-3.gguf", "m-00001-of-00003 (1).gguf"])
def test_a_part_under_another_name(three: list[Path], name: str) -> None:
    """A part under a name that does not say where the others are is refused, and not taken for the whole model."""
    alone = three[0].parent / "alone"
    alone.mkdir()
    path = three[0].rename(alone / name)
    error = _refused(path, "part of 3", path)
    assert "00001-of-" in (error.hint or "")
    _refused(alone, "part of 3", path)


@pytest.mark.parametrize("name", ["sha256-0123", "model.bin", "m-00001-of-00003.gguf.part"])
def test_a_part_under_a_name_that_is_no_ggufs(three: list[Path], name: str) -> None:
    """A part that is called like no GGUF at all, a hub's blob, is not taken for the whole model either."""
    path = three[0].rename(three[0].with_name(name))
    _refused(path, "part of 3", path)


@pytest.mark.parametrize("number", [0, 4, 99999])
def test_a_number_that_cannot_be(three: list[Path], number: int) -> None:
    """A part beyond the last is refused by its name alone."""
    path = three[0].rename(_part(three[0].parent, number, 3))
    _refused(path, rf"part {number} of 3 cannot be", path)


def test_two_models_in_a_folder(three: list[Path], tmp_path: Path, write_gguf: Write) -> None:
    """Two split models in a folder are not mixed: the folder is refused, each opens by a part of its own."""
    others = _split(tmp_path, write_gguf, [NAMES[:2], NAMES[2:]], stem="n")
    _refused(tmp_path, "5 model files", tmp_path)
    assert [source.path for source in open_checkpoint(three[2])] == three
    assert [source.path for source in open_checkpoint(others[0])] == others


def test_another_number_of_parts_beside_it(three: list[Path], tmp_path: Path, write_gguf: Write) -> None:
    """The same model split in another way is another model."""
    others = _split(tmp_path, write_gguf, [NAMES[:2], NAMES[2:]])
    _refused(tmp_path, "5 model files", tmp_path)
    assert [source.path for source in open_checkpoint(others[1])] == others


def test_a_whole_model_beside_it(three: list[Path], tmp_path: Path, write_gguf: Write) -> None:
    """A whole model beside a split one: the folder is refused, each opens by its name."""
    whole = write_gguf(tmp_path / "whole.gguf", TENSORS)
    _refused(tmp_path, "4 model files", tmp_path)
    assert [source.path for source in open_checkpoint(whole)] == [whole]
    assert [source.path for source in open_checkpoint(three[1])] == three


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_a_safetensors_model_beside_it(three: list[Path], tmp_path: Path, name: str) -> None:
    """Beside model.safetensors the folder means that one, as it does beside a whole GGUF; beside another it is refused."""
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / name)
    if name == "model.safetensors":
        assert [source.path.name for source in open_checkpoint(tmp_path)] == [name]
    else:
        _refused(tmp_path, "4 model files", tmp_path)


def test_a_tensor_in_two_parts(tmp_path: Path, write_gguf: Write) -> None:
    """A tensor that stands in two parts is refused, with both files."""
    paths = _split(tmp_path, write_gguf, [NAMES[:3], NAMES[2:]])
    error = _refused(tmp_path, re.escape(paths[0].name), paths[1])
    assert error.tensor == NAMES[2]


def test_a_cut_part(three: list[Path]) -> None:
    """A part that was not downloaded to its end is named, with the tensor."""
    raw = three[1].read_bytes()
    three[1].write_bytes(raw[:-100])
    error = _refused(three[0], "truncated", three[1])
    assert error.tensor == NAMES[5]


def test_a_part_of_another_format(three: list[Path]) -> None:
    """A part that is no GGUF is refused, and named."""
    three[1].write_bytes(b"<html>not found</html>")
    _refused(three[0], "not a model", three[1])


@pytest.mark.parametrize("value", [(8, "3"), (9, (4, [3])), (6, float("nan")), (11, -3)], ids=str)
def test_counts_of_other_types(tmp_path: Path, write_gguf: Write, value: Any) -> None:
    """A count that is no count is refused, alone and in parts, in a message without Python's objects."""
    path = write_gguf(tmp_path / "m.gguf", TENSORS, {"split.count": value})
    assert "object at" not in str(_refused(path, "part", path))
    paths = _split(tmp_path, write_gguf, [NAMES[:3], NAMES[3:]], stem="n", keys=lambda _: {"split.tensors.count": value})
    assert "object at" not in str(_refused(paths[0], "tensors together", paths[0]))
