"""What a load promises beyond miss and hit: failures in the middle, stores that cannot be repaired, GGUF blocks."""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache import store as store_module
from quantcache.cache.blobs import StagedEntry
from quantcache.loader import build
from quantcache.quant.codec import quantize

RNG = np.random.default_rng(0)
LARGE = RNG.standard_normal((2048, 1024)).astype(np.float32)  # two tiles
SMALL = RNG.standard_normal((64, 128)).astype(np.float32)


def _entries(cache: Path) -> list[Path]:
    return sorted((cache / "v1" / "entries").glob("*/*.safetensors"))


def _bytes(tensor: Any) -> dict[str, bytes]:
    if isinstance(tensor, qc.QuantTensor):
        return {name: part.tobytes() for name, part in tensor.parts.items()}
    return {"": tensor.tobytes()}


def _expected(codec: str, weights: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in quantize(codec, weights)[1].items()}


def _flip(cache: Path, tensor: str) -> Path:
    (entry,) = _entries(cache)
    with qc.Cache(cache, readonly=True) as store:
        offset = store.open(entry.stem).header.offsets[tensor]
    raw = bytearray(entry.read_bytes())
    raw[offset] ^= 1
    entry.write_bytes(raw)
    return entry


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Write a model of a large and a small matrix."""
    path = tmp_path / "m.safetensors"
    save_file({"blocks.0.large.weight": LARGE, "blocks.1.small.weight": SMALL}, path)
    return path


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8", "int8-row", "f16"])
def test_disk_fills_up_between_two_tiles(
    two: Path, tmp_path: Path, pwrite: Any, quant: str
) -> None:
    """A tensor that is half written when the store fails is whole in memory: no tile is lost."""
    real, calls = os.pwrite, []
    started, asked = threading.Event(), threading.Event()
    parts = sum(1 for part in _parts(quant, LARGE) if part.weights)

    def write(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) == 1:
            started.set()
            assert asked.wait(60)
        if len(calls) > parts:  # the first tile is in; what is asked for meanwhile is not
            raise OSError(errno.ENOSPC, "full")
        return real(*arguments)

    with pwrite(write), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = qc.load(two, quant, cache=tmp_path / "c", threads=1)
        assert started.wait(60)
        got: dict[str, Any] = {}
        asking = threading.Thread(target=lambda: got.update(small=model["blocks.1.small.weight"]))
        asking.start()
        urgent = model._pipelines[0]._urgent
        while not urgent:
            time.sleep(0.001)
        asked.set()
        asking.join()
        got["large"] = model["blocks.0.large.weight"]
        model.close()
    assert _bytes(got["small"]) == _expected_of(quant, SMALL)
    assert _bytes(got["large"]) == _expected_of(quant, LARGE)
    assert len(caught) == 1
    assert not _entries(tmp_path / "c")
    assert not list((tmp_path / "c" / "v1" / "tmp").iterdir())


@pytest.mark.parametrize("quant", ["nf4", "int8-row", "f16"])
def test_store_fails_while_a_tensor_is_settled(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    """A tensor whose last tile is in, but which is not done yet, keeps its bytes when the store fails meanwhile."""
    settling, failed = threading.Event(), threading.Event()
    whole, place = build.whole_pieces, StagedEntry.place

    def slow_whole(job: Any) -> Any:
        if "large" in job.info.name and not settling.is_set():
            settling.set()
            failed.wait(0.3)  # one thread writes a file: it cannot fail meanwhile, unless that changes
        return whole(job)

    def refuse(self: StagedEntry, key: str, position: int) -> tuple[int, int]:
        if "small" in key:
            settling.wait(0.3)
            failed.set()
            raise qc.CacheError("no")
        return place(self, key, position)

    monkeypatch.setattr(build, "whole_pieces", slow_whole)
    monkeypatch.setattr(StagedEntry, "place", refuse)
    with pytest.warns(qc.QuantcacheWarning, match="not saved") as caught, qc.load(
        two, quant, cache=tmp_path / "c", threads=2
    ) as model:
        assert _bytes(model["blocks.0.large.weight"]) == _expected_of(quant, LARGE)
        assert _bytes(model["blocks.1.small.weight"]) == _expected_of(quant, SMALL)
    assert len(caught) == 1


def _parts(quant: str, weights: Any) -> Any:
    from quantcache.quant.codec import codec

    return codec(quant).encoder("X.weight", weights.shape, "F32", codec(quant).variants[0]).parts


def _expected_of(quant: str, weights: Any) -> dict[str, bytes]:
    return {"": weights.astype(np.float16).tobytes()} if quant == "f16" else _expected(quant, weights)


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8", "int8-row"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_many_tiles_are_one_tensor(tmp_path: Path, quant: str, dtype: Any) -> None:
    """A tensor of several tiles gives the bytes of the whole, on miss and hit, for one thread and three."""
    weights = LARGE.astype(dtype)
    path = tmp_path / "m.safetensors"
    save_file({"blocks.0.large.weight": weights, "b.weight": weights[:700]}, path)
    for threads in (1, 3):
        for hit in (False, True):
            with qc.load(path, quant, cache=tmp_path / f"c{threads}", threads=threads) as model:
                assert model.hit is hit
                assert _bytes(model["blocks.0.large.weight"]) == _expected(quant, weights)
                assert _bytes(model["b.weight"]) == _expected(quant, weights[:700])


@pytest.mark.parametrize("verify", ["touch", "open"])
@pytest.mark.parametrize("readonly_cache", [False, True])
def test_damage_in_a_readonly_store(two: Path, tmp_path: Path, verify: str, readonly_cache: bool) -> None:
    """A damaged entry that cannot be moved away is left there, and the right bytes are built in memory."""
    cache = tmp_path / "c"
    qc.load(two, cache=cache).close()
    entry = _flip(cache, "blocks.1.small.weight")
    damaged = entry.read_bytes()
    given = qc.Cache(cache, readonly=True) if readonly_cache else cache
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mode = "auto" if readonly_cache else "readonly"
        with qc.load(two, cache=given, mode=mode, verify=verify) as model:
            assert _bytes(model["blocks.1.small.weight"]) == _expected("nf4", SMALL)
            assert _bytes(model["blocks.0.large.weight"]) == _expected("nf4", LARGE)
    assert sum("damaged" in str(w.message) for w in caught) == 1
    assert entry.read_bytes() == damaged


def test_damage_that_stays(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything checked at once, an entry that cannot be moved away is looked at once, and the right one is put in its place."""
    cache = tmp_path / "c"
    qc.load(two, cache=cache).close()
    entry = _flip(cache, "blocks.1.small.weight")
    monkeypatch.setattr(store_module, "quarantine", lambda *_: None)
    with pytest.warns(qc.QuantcacheWarning, match="damaged") as caught, qc.load(two, cache=cache, verify="open") as model:
        assert not model.hit
        assert _bytes(model["blocks.1.small.weight"]) == _expected("nf4", SMALL)
    assert len(caught) == 1
    with qc.load(two, cache=cache, verify="open") as again:
        assert again.hit
    assert entry.exists()


def test_damage_that_another_repaired(two: Path, tmp_path: Path) -> None:
    """If another load has rebuilt the entry meanwhile, its result is taken, and not thrown away."""
    cache = tmp_path / "c"
    qc.load(two, cache=cache).close()
    entry = _flip(cache, "blocks.1.small.weight")
    with pytest.warns(qc.QuantcacheWarning, match="damaged") as caught:
        one, other = qc.load(two, cache=cache), qc.load(two, cache=cache)
        assert _bytes(one["blocks.1.small.weight"]) == _expected("nf4", SMALL)
        one.close()
        inode = entry.stat().st_ino
        assert _bytes(other["blocks.1.small.weight"]) == _expected("nf4", SMALL)
        assert _bytes(other["blocks.0.large.weight"]) == _expected("nf4", LARGE)
        other.close()
    assert entry.stat().st_ino == inode
    assert len(caught) <= 2
    with qc.load(two, cache=cache, verify="open") as again:
        assert again.hit


def test_damage_seen_by_two_threads(two: Path, tmp_path: Path) -> None:
    """Two threads that touch damage at once both get the right bytes, and the entry is built once."""
    cache = tmp_path / "c"
    qc.load(two, cache=cache).close()
    _flip(cache, "blocks.1.small.weight")
    _flip(cache, "blocks.0.large.weight")
    names = ["blocks.0.large.weight", "blocks.1.small.weight"] * 4
    found: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with qc.load(two, cache=cache) as model:
            barrier = threading.Barrier(len(names))

            def touch(name: str) -> None:
                barrier.wait()
                try:
                    found.append((name, _bytes(model[name])))
                except BaseException as error:
                    found.append((name, error))

            threads = [threading.Thread(target=touch, args=(name,)) for name in names]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    right = {"blocks.0.large.weight": _expected("nf4", LARGE), "blocks.1.small.weight": _expected("nf4", SMALL)}
    assert len(found) == len(names)
    assert [(name, got) for name, got in found if got != right[name]] == []
    assert sum("damaged" in str(w.message) for w in caught) == 1


def test_odd_tensors_asked_for_late(tmp_path: Path) -> None:
    """A tensor that was planned anew is right also when it is first asked for after the entry was stored."""
    path = tmp_path / "m.safetensors"
    bad = SMALL.copy()
    bad[1, 1] = np.inf
    save_file({"a.weight": SMALL, "b.weight": bad, "c.weight": SMALL * np.float32(1e-7)}, path)
    with pytest.warns(qc.QuantcacheWarning, match="'b.weight' is kept as F32"):
        model = qc.load(path, "int8", cache=tmp_path / "c")
        model.finish()
    np.testing.assert_array_equal(model["b.weight"], bad)
    tiny = model["c.weight"]
    assert isinstance(tiny, qc.QuantTensor)
    assert tiny.parts["scales"].dtype == np.float32
    np.testing.assert_allclose(tiny.dequantize(np.float32), SMALL * np.float32(1e-7), atol=2e-9)
    model.close()


def test_source_appended_before_close(two: Path, tmp_path: Path, pwrite: Any) -> None:
    """A source that grows while it is quantized is not stored, and said to have changed."""
    real, go = os.pwrite, threading.Event()

    def write(*arguments: Any) -> int:
        assert go.wait(60)
        return real(*arguments)

    with pwrite(write), pytest.warns(qc.QuantcacheWarning, match="changed while it was read"):
        model = qc.load(two, cache=tmp_path / "c")
        with two.open("ab") as file:
            file.write(b"more")
        go.set()
        model.close()
    assert not _entries(tmp_path / "c")
    assert not list((tmp_path / "c" / "v1" / "tmp").iterdir())


def test_nothing_is_written_to_the_source(two: Path, tmp_path: Path) -> None:
    """Bytes, times and neighbours of the source stay as they were."""
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / "m.safetensors"
    path.write_bytes(two.read_bytes())
    before = path.read_bytes(), path.stat().st_mtime_ns, sorted(folder.iterdir())
    for mode in ("auto", "refresh", "auto"):
        qc.load(path, cache=tmp_path / "c", mode=mode).close()
    assert (path.read_bytes(), path.stat().st_mtime_ns, sorted(folder.iterdir())) == before


def test_tensors_outlive_their_model(two: Path, tmp_path: Path) -> None:
    """What was handed out stays readable after the model was closed and the store cleared."""
    tensors = []
    for _ in range(2):
        with qc.load(two, cache=tmp_path / "c") as model:
            tensors.append(model["blocks.1.small.weight"])
    with qc.Cache(tmp_path / "c") as store:
        for row in store.entries():
            store.remove(row.key)
    assert [_bytes(tensor) for tensor in tensors] == [_expected("nf4", SMALL)] * 2


@pytest.mark.parametrize("quant", ["nf4", "int8", "f16"])
def test_scalars_and_nothing(tmp_path: Path, quant: str) -> None:
    """Tensors without a dimension, and without an element, come back as they are, on miss and hit."""
    content = {
        "scalar": np.array(1.5, np.float32), "number": np.array(7), "none.weight": np.empty((0, 128), np.float32),
        "no.weight": np.empty((128, 0), np.float16), "flags": np.array([True, False]), "f64": np.arange(3.0),
    }  # fmt: skip
    path = tmp_path / "m.safetensors"
    save_file(content, path)
    for hit in (False, True):
        with qc.load(path, quant, cache=tmp_path / "c") as model:
            assert model.hit is hit
            assert {name: tensor.shape for name, tensor in model.items()} == {n: a.shape for n, a in content.items()}
            for name, array in content.items():
                np.testing.assert_array_equal(model[name], array)
            number: Any = model["number"]
            assert number.dtype == np.int64


@pytest.fixture
def blocks(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Write a GGUF file with Q8_0, Q4_0 and plain tensors."""
    weights = RNG.standard_normal((128, 256)).astype(np.float32) * np.float32(0.02)
    stored: dict[str, Any] = {}
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, kind in (("blk.0.attn_q.weight", "Q8_0"), ("blk.0.attn_k.weight", "Q4_0"), ("blk.1.attn_q.weight", "Q6_K")):
        try:
            raw = quants.quantize(weights, gguf.GGMLQuantizationType[kind])
        except NotImplementedError:
            continue
        stored[name] = raw
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(256, np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, stored | {"blk.0.ffn_up.weight": weights}


def test_blocks_pass_through(blocks: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Blocks no larger than the target are views of the source; larger ones and plain weights become the target."""
    path, stored = blocks
    for hit in (False, True):
        with qc.load(path, "nf4", cache=tmp_path / "c") as model:
            assert model.hit is hit
            q4 = model["blk.0.attn_k.weight"]
            assert isinstance(q4, qc.QuantTensor)
            assert (q4.codec, q4.shape) == ("Q4_0", (128, 256))
            assert q4.parts["blocks"].tobytes() == stored["blk.0.attn_k.weight"].tobytes()
            exact = quants.dequantize(stored["blk.0.attn_k.weight"], gguf.GGMLQuantizationType.Q4_0)
            np.testing.assert_array_equal(q4.dequantize(np.float32), exact)
            q8 = quants.dequantize(stored["blk.0.attn_q.weight"], gguf.GGMLQuantizationType.Q8_0)
            assert _bytes(model["blk.0.attn_q.weight"]) == _expected("nf4", q8)
            assert _bytes(model["blk.0.ffn_up.weight"]) == _expected("nf4", stored["blk.0.ffn_up.weight"])
            norm: Any = model["blk.0.attn_norm.weight"]
            assert norm.dtype == np.float16
            codecs = {report.name: report.codec for report in model.report()}
            assert codecs["blk.0.attn_k.weight"] == "native"
    (entry,) = _entries(tmp_path / "c")
    with qc.Cache(tmp_path / "c") as store:
        assert "blk.0.attn_k.weight" not in store.open(entry.stem).header.slots


def test_blocks_converted(blocks: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """native="convert" leaves no block type, and is another entry."""
    path, stored = blocks
    with qc.load(path, "int8", cache=tmp_path / "c") as model:
        kept: Any = model["blk.0.attn_k.weight"]
        assert kept.codec == "Q4_0"
    for hit in (False, True):
        with qc.load(path, "int8", native="convert", cache=tmp_path / "c") as model:
            assert model.hit is hit
            for name, kind in (("blk.0.attn_k.weight", "Q4_0"), ("blk.0.attn_q.weight", "Q8_0")):
                decoded = quants.dequantize(stored[name], gguf.GGMLQuantizationType[kind])
                assert _bytes(model[name]) == _expected("int8", decoded)


def test_all_native_stores_nothing(blocks: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """quant="native" hands out the file's own bytes, and the store stays empty."""
    path, stored = blocks
    with qc.load(path, "native", cache=tmp_path / "c") as model:
        assert model.hit
        for name, raw in stored.items():
            assert _bytes(model[name]).popitem()[1] == raw.tobytes()
    assert not _entries(tmp_path / "c")
