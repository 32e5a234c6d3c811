"""Hold reading ahead to what it may do: bring and check what was asked for, hand out nothing that is damaged."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache.blobs import Reader, StoredEntry
from quantcache.loader import ahead

LAYERS = 3


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    """A checkpoint whose weights make several pieces each."""
    rng = np.random.default_rng()
    path = tmp_path / "m.safetensors"
    save_file({f"blocks.{n}.a.weight": rng.standard_normal((5000, 1024), np.float32) for n in range(LAYERS)}, path)
    os.utime(path, (time.time() - 10,) * 2)
    return path


def parts(model: qc.Model) -> dict[str, list[bytes]]:
    """Return all bytes of a model."""
    return {name: [part.tobytes() for part in tensor.parts.values()] for name, tensor in model.items() if isinstance(tensor, qc.QuantTensor)}


def flip(store: Path, key: str, at: int) -> None:
    """Change one byte of a stored tensor."""
    with qc.Cache(store) as cache:
        (row,) = cache.entries()
        entry = cache.open(row.key)
        position = entry.header.offsets[key] + at % entry.header.slots[key].nbytes
    with entry.path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("way", ["prefetch", "layers", "asked", "open"])
def test_a_flipped_byte_anywhere(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, threads: int, *, cold: bool
) -> None:
    """Whoever brings the piece with a flipped byte, from memory or disk: it reaches nobody, and is built anew."""
    if cold:
        monkeypatch.setattr(ahead, "is_cached", lambda *_: False)
    with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        right = parts(model)
    at = int(np.random.default_rng().integers(0, 1 << 40))
    flip(tmp_path / "c", "blocks.1.a.weight", at)
    with pytest.warns(qc.QuantcacheWarning, match="not what was stored"), qc.load(
        model_path, "int8", cache=tmp_path / "c", threads=threads, verify="open" if way == "open" else "touch"
    ) as model:
        if way == "prefetch":
            model.prefetch()
        if way == "layers":
            assert [name for layer in model.layers() for name in layer] == list(model)
        assert parts(model) == right, f"byte {at}"
    with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        assert model.hit
        assert parts(model) == right


@pytest.mark.parametrize("verify", ["touch", "off"])
def test_prefetch_brings_what_was_asked_for(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    """Only the tensors that were named are read, and they are read without anybody asking again."""
    qc.load(model_path, "int8", cache=tmp_path / "c").close()
    monkeypatch.setattr(ahead, "is_cached", lambda *_: False)
    (path,) = tmp_path.glob("c/v*/entries/*/*.safetensors")
    header = StoredEntry(path.stem, path).header
    read: list[str] = []
    reads: list[tuple[int, int]] = []
    real = Reader.read_into

    def read_into(self: Reader, position: int, buffer: memoryview) -> bool:
        end = position + len(buffer)
        read.extend(key for key, offset in header.offsets.items() if offset < end and position < offset + header.slots[key].nbytes)
        reads.append((position, end))
        return real(self, position, buffer)

    monkeypatch.setattr(Reader, "read_into", read_into)
    with qc.load(model_path, "int8", cache=tmp_path / "c", verify=verify) as model:
        assert read == []
        model.prefetch(["blocks.1.a.weight"])
        wanted = {"blocks.1.a.weight", "blocks.1.a.scales", "blocks.1.a.biases"}
        until = time.monotonic() + 60
        while set(read) != wanted and time.monotonic() < until:
            time.sleep(0.01)
        assert set(read) == wanted
        with pytest.raises(KeyError):
            model.prefetch(["nothing"])
        model.prefetch()
        first, last = min(header.offsets.values()), header.nbytes
        while sum(end - begin for begin, end in reads) < last - first and time.monotonic() < until:
            time.sleep(0.01)
    reads.sort()  # every byte once, and what is small in one with what stands beside it
    assert [begin for begin, _ in reads] == [first, *(end for _, end in reads[:-1])]
    assert reads[-1][1] == last
    assert len(reads) <= 3 + 2 * (last - first) // ahead._PIECE


def test_the_one_that_is_wrong_is_named(model_path: Path, tmp_path: Path) -> None:
    """Of tensors that are brought together each is checked, and the damaged one is named, whichever was asked for."""
    with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        right = parts(model)
    (path,) = tmp_path.glob("c/v*/entries/*/*.safetensors")
    header = StoredEntry(path.stem, path).header
    for key, offset in header.offsets.items():
        raw = bytearray(path.read_bytes())
        raw[offset + header.slots[key].nbytes - 1] ^= 1
        path.write_bytes(raw)
        with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
            model.prefetch()
            with pytest.warns(qc.QuantcacheWarning, match=re.escape(repr(key))):
                assert parts(model) == right


def test_an_entry_that_cannot_be_read(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails under a hit makes it a miss, not an exception."""
    with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        right = parts(model)
    monkeypatch.setattr(ahead, "is_cached", lambda *_: False)

    def fail(self: Reader, position: int, buffer: memoryview) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Reader, "read_into", fail)
    with pytest.warns(qc.QuantcacheWarning, match="not what was stored"), qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        assert parts(model) == right


def test_many_callers(model_path: Path, tmp_path: Path) -> None:
    """Threads that ask for the same tensors while they are read ahead get the same bytes, and nobody hangs."""
    with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        right = parts(model)
    for _ in range(5):
        with qc.load(model_path, "int8", cache=tmp_path / "c", threads=3) as model:
            found: list[Any] = []
            threads = [threading.Thread(target=lambda model=model, found=found: found.append(parts(model))) for _ in range(4)]
            model.prefetch()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert found == [right] * 4


def test_after_close(model_path: Path, tmp_path: Path) -> None:
    """A closed model still hands out what it has, checked by whoever asks; reading ahead does nothing any more."""
    with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        right = parts(model)
    hit = qc.load(model_path, "int8", cache=tmp_path / "c")
    hit.close()
    hit.prefetch()
    assert parts(hit) == right


def test_child_of_fork(model_path: Path, tmp_path: Path, in_child: Callable[[Callable[[], None]], None]) -> None:
    """A child has none of its parent's threads, and waits for none of them."""
    qc.load(model_path, "int8", cache=tmp_path / "c").close()
    with qc.load(model_path, "int8", cache=tmp_path / "c", threads=2) as model:
        model.prefetch()

        def child() -> None:
            assert len(parts(model)) == LAYERS

        in_child(child)


def test_interrupted_while_checking(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a check says nothing about the entry: the next who asks gets it, and it stays."""
    with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        right = parts(model)
    real, calls = ahead.digests, []

    def digests(data: Any, piece: int) -> list[bytes]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(data, piece)

    monkeypatch.setattr(ahead, "digests", digests)
    with qc.load(model_path, "int8", cache=tmp_path / "c", threads=1) as model:
        with pytest.raises(KeyboardInterrupt):
            model["blocks.0.a.weight"]
        assert parts(model) == right
        assert model.hit
    assert not list((tmp_path / "c").glob("v1/quarantine/*"))


def test_no_threads_to_be_had(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started, a hit is served by the caller, and a miss says so and holds nothing up."""
    with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        right = parts(model)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
            model.prefetch()
            assert parts(model) == right
        with pytest.raises(qc.QuantcacheError, match="no thread"):
            qc.load(model_path, "nf4", cache=tmp_path / "c")
    assert not list((tmp_path / "c").glob("v1/tmp/*"))
    with qc.Cache(tmp_path / "c", lock_timeout_s=5) as store, qc.load(model_path, "nf4", cache=store) as model:
        assert not model.hit


def test_closed_within_the_lock(model_path: Path, tmp_path: Path) -> None:
    """What a collection or a signal handler does to a model under the pool's own lock does not wait for itself."""
    qc.load(model_path, "int8", cache=tmp_path / "c").close()
    model = qc.load(model_path, "int8", cache=tmp_path / "c")

    def collected() -> None:
        with model._options.pool._lock:
            model.close()

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_only_some_threads_to_be_had(model_path: Path, tmp_path: Path, one_thread: Callable[..., Any]) -> None:
    """Where a second thread cannot be started, the first builds all of it."""
    with one_thread() as started:
        with qc.load(model_path, "int8", cache=tmp_path / "c", threads=4) as model:
            right = parts(model)
            model.finish()
        assert len(started) == 1
    with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        assert model.hit
        assert parts(model) == right


def test_prefetch_again_and_again(model_path: Path, tmp_path: Path) -> None:
    """What is queued, or there, is not queued again: also of tensors that are views of the source."""
    for quant in ("int8", "native"):
        with qc.load(model_path, quant, cache=tmp_path / "c", threads=1) as model:
            for _ in range(100):
                model.prefetch()
            assert len(model._options.pool._queue) <= 3 * LAYERS


def test_no_descriptor_is_left(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a cold entry takes one descriptor, which is given back when all came, or the model is closed before."""
    qc.load(model_path, "int8", cache=tmp_path / "c").close()
    gc.collect()
    monkeypatch.setattr(ahead, "is_cached", lambda *_: False)
    (path,) = tmp_path.glob("c/v*/entries/*/*.safetensors")

    def held() -> int:
        found = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(os.path.samefile(link, path) for link in found if link.exists())

    with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
        opened = held()  # Python's mapping may keep one
        model.prefetch()
        parts(model)
        assert held() == opened
    del model
    gc.collect()  # its mapping's descriptor must not go while the next one's are counted
    gone = Reader(tmp_path / "nothing", (0, 0))
    assert not gone.read_into(0, memoryview(bytearray(4)))
    monkeypatch.setattr(ahead.Pool, "ask", lambda *_, **__: None)
    model = qc.load(model_path, "int8", cache=tmp_path / "c")
    opened = held()
    model.prefetch()
    model["blocks.0.a.weight"]  # the others never come
    assert held() == opened + 1
    model.close()
    assert held() == opened


def test_layers_reads_small_ones_ahead(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a layer is worked with the next one is read, and more of them as long as they are few bytes together."""
    qc.load(model_path, "int8", cache=tmp_path / "c").close()
    for nbytes, most in ((0, 1), (1, 1), (6 << 20, 2), (1 << 30, LAYERS)):
        monkeypatch.setattr("quantcache.loader.model._AHEAD", nbytes)
        asked: list[str] = []
        monkeypatch.setattr(qc.Model, "prefetch", lambda _, names, asked=asked: asked.extend(names))
        with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
            for number, layer in enumerate(model.layers()):
                assert list(layer) == [f"blocks.{number}.a.weight"]
                assert asked == [f"blocks.{n}.a.weight" for n in range(1, min(number + most, LAYERS - 1) + 1)]


def test_what_is_small_of_a_cold_tensor_is_asked_for(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are checked where they are mapped are read first, those bytes and no others; nothing is asked of a warm entry."""
    qc.load(model_path, "int8", cache=tmp_path / "c").close()
    for cold in (True, False):
        asked: list[tuple[int, int]] = []
        monkeypatch.setattr(ahead, "is_cached", lambda *_, cold=cold: not cold)
        monkeypatch.setattr(ahead, "will_need", lambda *given, asked=asked: asked.append(given))
        with qc.load(model_path, "int8", cache=tmp_path / "c") as model:
            assert model.hit
            stored = model._shards[0].stored
            assert stored is not None
            _ = model["blocks.1.a.weight"]
            _ = model["blocks.1.a.weight"]
            header = stored.entry.header
            small = [f"blocks.1.a.{part}" for part in ("biases", "scales")]
            expected = [(stored._address + header.offsets[key], header.slots[key].nbytes) for key in small]
            assert sorted(asked) == sorted(expected if cold else [])
