"""Hold the safetensors reader to the safetensors library: same names, same bytes, no copy; and shards to their index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from numpy.typing import NDArray
from safetensors import numpy as library

from quantcache.errors import SourceError, SourceNotFoundError
from quantcache.loader.source import Source, open_checkpoint
from quantcache.tensor import ITEMSIZE, array_dtype

Array = NDArray[Any]
REAL = (
    "silero/silero_vad_16k.safetensors", "fracast/model.safetensors", "fracast/model.int8.safetensors",
    "sdlora/lora_disney.safetensors", "candle/jfk-codes.safetensors", "candle/voices.safetensors",
    "modelaudit/safe_model.safetensors", "modelaudit/obfuscated_metadata.safetensors",
    "allquant/minilm-ffn-slice.safetensors", "rwkv7/tiny-rwkv7-834K-canonical-f16.st",
    "rwkv7/tiny-rwkv7-834K-canonical-f32.st",
)  # fmt: skip


def _tensors(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "blocks.0.weight": rng.standard_normal((4, 64)).astype(np.float32),
        "blocks.0.bias": rng.standard_normal(7).astype(np.float16),
        "scalar": np.array(3.5, np.float64),
        "empty": np.zeros((0, 5), np.float32),
        "tokens": rng.integers(-9, 9, (2, 3, 4)),
        "flags": np.array([True, False, True]),
        "größe <s1>": rng.integers(0, 255, 5).astype(np.uint8),
        "brain": rng.standard_normal((3, 3)).astype(ml_dtypes.bfloat16),
    }


def _header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], pad: int = 0) -> bytes:
    """Return length and header of tensors that stand one after another, so that the data starts anywhere."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + ITEMSIZE[dtype] * int(np.prod(shape))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text


def _index(folder: Path, weight_map: Mapping[str, str], name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / name


def _sharded(folder: Path) -> dict[str, Array]:
    """Write three shards, and return what they hold."""
    everything = {}
    for part in (1, 2, 3):
        tensors = {f"layer.{part}.{key}": value for key, value in _tensors(part).items()}
        library.save_file(tensors, folder / f"model-{part:05d}-of-00003.safetensors")
        everything.update(tensors)
    return everything


def _weight_map() -> dict[str, str]:
    return {
        f"layer.{part}.{key}": f"model-{part:05d}-of-00003.safetensors" for part in (1, 2, 3) for key in _tensors(part)
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".st", ".anything", ""])
def test_views_equal_the_library(tmp_path: Path, suffix: str) -> None:
    """Every tensor that the library wrote is viewed with its type, shape and bytes, whatever the file is called."""
    tensors = _tensors()
    path = tmp_path / f"model{suffix}"
    library.save_file(tensors, path, metadata={"format": "np", "note": "ü"})
    (source,) = open_checkpoint(path)
    assert source.format == "safetensors"
    assert source.metadata == {"format": "np", "note": "ü"}
    assert set(source.tensors) == set(tensors)
    for name, expected in tensors.items():
        view = source.view(name)
        assert (view.dtype, view.shape, view.tobytes()) == (expected.dtype, expected.shape, expected.tobytes()), name


def test_views_are_read_only_and_of_the_file(tmp_path: Path) -> None:
    """A view is memory of the mapping: it cannot be written and stays usable when the source is gone."""
    library.save_file(_tensors(), tmp_path / "m.safetensors")
    source = Source(tmp_path / "m.safetensors")
    view = source.view("blocks.0.weight")
    assert not view.flags.writeable
    assert np.shares_memory(view, source.file.bytes)
    expected = view.copy()
    del source
    np.testing.assert_array_equal(view, expected)


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_element_type(tmp_path: Path, dtype: str) -> None:
    """Every element type of whole bytes is viewed under its NumPy type."""
    raw = bytes(range(1, 1 + 6 * ITEMSIZE[dtype])) if dtype != "BOOL" else bytes([0, 1, 1, 0, 1, 0])
    (tmp_path / "m.safetensors").write_bytes(_header({"w": (dtype, (2, 3))}) + raw)
    with safetensors.safe_open(tmp_path / "m.safetensors", "np") as opened:
        assert list(opened.keys()) == ["w"]  # the library takes the file too
    view = Source(tmp_path / "m.safetensors").view("w")
    assert (view.dtype, view.shape, view.tobytes()) == (array_dtype(dtype), (2, 3), raw)


@pytest.mark.parametrize("pad", range(8))
def test_unaligned_tensors(tmp_path: Path, pad: int) -> None:
    """Tensors at any address, odd ones too, are viewed without a copy."""
    values = np.arange(6, dtype=np.float32)
    content = _header({"byte": ("U8", (1,)), "w": ("F32", (6,)), "d": ("F64", (2,))}, pad)
    content += b"\x07" + values.tobytes() + np.array([1.5, 2.5]).tobytes()
    (tmp_path / "m.st").write_bytes(content)
    source = Source(tmp_path / "m.st")
    np.testing.assert_array_equal(source.view("w"), values)
    assert source.view("d").tolist() == [1.5, 2.5]
    assert np.shares_memory(source.view("w"), source.file.bytes)


def test_offsets_are_from_the_start_of_the_file(tmp_path: Path) -> None:
    """A tensor's record says where its bytes are in the file, in file order."""
    tensors = _tensors()
    library.save_file(tensors, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    source = Source(tmp_path / "m.safetensors")
    offsets = [info.offset for info in source.tensors.values()]
    assert offsets == sorted(offsets)
    for name, info in source.tensors.items():
        assert content[info.offset : info.offset + info.nbytes] == tensors[name].tobytes()
        assert source.raw(info).tobytes() == tensors[name].tobytes()


def test_no_tensors(tmp_path: Path) -> None:
    """A file without tensors is a file without tensors."""
    library.save_file({}, tmp_path / "m.safetensors", metadata={"a": "b"})
    assert Source(tmp_path / "m.safetensors").tensors == {}


@pytest.mark.parametrize("name", REAL)
def test_real_files(test_data: Path, name: str) -> None:
    """Published files give the names, shapes and bytes that the library gives."""
    source = Source(test_data / name)
    source.check()
    with safetensors.safe_open(test_data / name, "np") as opened:
        assert set(opened.keys()) == set(source.tensors)
        assert dict(source.metadata) == (opened.metadata() or {})
        for key in opened.keys():  # noqa: SIM118 - not a mapping
            expected = opened.get_tensor(key)
            view = source.view(key)
            assert (view.shape, view.tobytes()) == (expected.shape, expected.tobytes()), key


# ---- shards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["folder", "index"])
def test_index(tmp_path: Path, given: str) -> None:
    """A folder with an index, or the index itself, gives all shards, in order, and every tensor once."""
    tensors = _sharded(tmp_path)
    library.save_file({"x": np.zeros(1)}, tmp_path / "zz-not-in-the-index.safetensors")
    index = _index(tmp_path, _weight_map())
    sources = open_checkpoint(tmp_path if given == "folder" else index)
    assert [source.path.name for source in sources] == [f"model-{part:05d}-of-00003.safetensors" for part in (1, 2, 3)]
    found = {name: source for source in sources for name in source.tensors}
    assert set(found) == set(tensors)
    for name, expected in tensors.items():
        assert found[name].view(name).tobytes() == expected.tobytes()


def test_preferred_index(tmp_path: Path) -> None:
    """Of several indexes in a folder, model.safetensors.index.json is taken."""
    _sharded(tmp_path)
    _index(tmp_path, {"a": "gone.safetensors"}, "a.safetensors.index.json")
    _index(tmp_path, _weight_map())
    assert len(open_checkpoint(tmp_path)) == 3


def test_complete_set_without_an_index(tmp_path: Path) -> None:
    """Shards numbered completely need no index."""
    tensors = _sharded(tmp_path)
    sources = open_checkpoint(tmp_path)
    assert [len(source.tensors) for source in sources] == [len(_tensors())] * 3
    assert {name for source in sources for name in source.tensors} == set(tensors)


def test_missing_shard_without_an_index(tmp_path: Path) -> None:
    """A gap in the numbers is an error that names the first missing file."""
    _sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match=r"1 of 3 files are missing.*model-00002-of-00003\.safetensors") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == tmp_path


def test_missing_shard_of_an_index(tmp_path: Path) -> None:
    """A shard that the index names and that is not there is named."""
    _sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    index = _index(tmp_path, _weight_map())
    for given in (tmp_path, index):
        with pytest.raises(SourceNotFoundError, match=r"model-00002-of-00003\.safetensors"):
            open_checkpoint(given)


def test_tensor_not_in_its_shard(tmp_path: Path) -> None:
    """A tensor that the index puts into a shard and that is not there is named, with both files."""
    _sharded(tmp_path)
    index = _index(tmp_path, {**_weight_map(), "ghost": "model-00002-of-00003.safetensors"})
    for given in (tmp_path, index):
        with pytest.raises(SourceError, match=r"model\.safetensors\.index\.json") as caught:
            open_checkpoint(given)
        assert caught.value.tensor == "ghost"
        assert caught.value.path == tmp_path / "model-00002-of-00003.safetensors"


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    """A tensor that stands in two shards is refused, and both are named."""
    for part in (1, 2):
        library.save_file({"same": np.zeros(2)}, tmp_path / f"model-{part:05d}-of-00002.safetensors")
    with pytest.raises(SourceError, match=r"model-00001-of-00002\.safetensors too") as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.tensor, caught.value.path) == ("same", tmp_path / "model-00002-of-00002.safetensors")
