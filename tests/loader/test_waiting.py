"""Whoever waits for another's build is served as soon as its entry is whole, before it is durable, and only with what is checked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc
from quantcache import cli
from quantcache.cache import key
from quantcache.cache.blobs import StagedEntry
from quantcache.cache.store import Cache

NAMES = [f"blocks.{n}.weight" for n in range(3)]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a model that counts as settled."""
    monkeypatch.setattr(key, "RACY_NS", -(10**9))
    rng = np.random.default_rng(1)
    save_file({name: rng.standard_normal((200, 128)).astype(np.float32) for name in NAMES}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


class _Sync:
    """Hold up the sync of an entry until it may go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.error: OSError | None = None
        self._sync = os.fsync

    def __call__(self, descriptor: int) -> None:
        """Take the place of os.fsync."""
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp"):
            self.begun.set()
            assert self.go_on.wait(20)
            if self.error is not None:
                raise self.error
        self._sync(descriptor)


@pytest.fixture
def sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Sync]:
    """Take hold of the sync."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("which file is synced is known on Linux only")
    held = _Sync()
    monkeypatch.setattr(os, "fsync", held)
    yield held
    held.go_on.set()


def _bytes(model: qc.Model) -> dict[str, bytes]:
    found = {}
    for name, tensor in model.items():
        assert isinstance(tensor, qc.QuantTensor)
        found |= {f"{name} {part}": array.tobytes() for part, array in tensor.parts.items()}
    return found


def _expected(path: Path) -> dict[str, bytes]:
    with qc.load(path, mode="off") as model:
        return _bytes(model)


@pytest.fixture
def building(path: Path, tmp_path: Path, sync: _Sync) -> Iterator[qc.Model]:
    """Build in this process; everything is made and written, and not durable."""
    model = qc.load(path, cache=tmp_path / "c")
    assert sync.begun.wait(20)
    yield model
    sync.go_on.set()
    model.close()


def _wait(path: Path, **options: Any) -> tuple[threading.Thread, list[qc.Model]]:
    """Load in a thread, as another process would: locks do not know threads."""
    found: list[qc.Model] = []
    thread = threading.Thread(target=lambda: found.append(qc.load(path, **options)))
    thread.start()
    return thread, found


def test_served_while_the_sync_is_under_way(building: qc.Model, path: Path, tmp_path: Path, sync: _Sync) -> None:
    """What another has written is a hit before it is durable, checked, and the same file afterwards."""
    thread, found = _wait(path, cache=tmp_path / "c")
    thread.join(20)
    assert not sync.go_on.is_set()
    (model,) = found
    assert model.hit
    assert not list((tmp_path / "c").glob("v1/entries/*/*"))
    assert _bytes(model) == _expected(path)
    sync.go_on.set()
    building.close()
    model.prefetch()
    assert _bytes(model) == _expected(path)
    model.close()
    assert model.keys_in_store == building.keys_in_store
    with Cache(tmp_path / "c") as cache:
        assert [row.key for row in cache.entries()] == model.keys_in_store


def test_what_was_served_outlives_a_failed_sync(building: qc.Model, path: Path, tmp_path: Path, sync: _Sync) -> None:
    """A disk that fails at the end, and loses what it had, takes nothing away from whoever has the entry; the store has none."""
    thread, found = _wait(path, cache=tmp_path / "c")
    thread.join(20)
    (model,) = found
    before, arrays = _bytes(model), [tensor.parts["codes"] for tensor in [*model.values(), *building.values()] if isinstance(tensor, qc.QuantTensor)]
    kept = [array.copy() for array in arrays]
    (staged,) = (tmp_path / "c" / "v1" / "tmp").iterdir()
    sync.error = OSError(5, "no")
    with staged.open("r+b") as file:
        with pytest.warns(qc.QuantcacheWarning, match="not saved"):
            sync.go_on.set()
            building.close()
        model.finish()
        file.write(bytes(staged.stat().st_size if staged.exists() else os.fstat(file.fileno()).st_size))
    assert not list((tmp_path / "c").glob("v1/*/**/*.safetensors"))
    assert not list((tmp_path / "c" / "v1" / "tmp").iterdir())
    assert all(np.array_equal(array, right) for array, right in zip(arrays, kept, strict=True))
    assert _bytes(model) == before == _expected(path)
    model.close()
    assert model.keys_in_store == []
    assert "did not store" in str(model.unsaved[0])


def test_close_waits_until_it_is_durable(building: qc.Model, path: Path, tmp_path: Path, sync: _Sync) -> None:
    """What `close` promises of a build it promises of a hit that was had early; `cancel` waits for nobody."""
    (thread, found), (other, also) = (_wait(path, cache=tmp_path / "c") for _ in range(2))
    thread.join(20)
    other.join(20)
    closing = threading.Thread(target=found[0].close)
    closing.start()
    also[0].cancel()
    closing.join(0.2)
    assert closing.is_alive()
    sync.go_on.set()
    closing.join(20)
    assert found[0].keys_in_store == [path.stem for path in (tmp_path / "c").glob("v1/entries/*/*")] != []
    assert found[0].unsaved == []


def test_warm_tells_that_nothing_was_stored(
    building: qc.Model, path: Path, tmp_path: Path, sync: _Sync, capsys: pytest.CaptureFixture[str]
) -> None:
    """`warm` that was served by a build whose disk then fails has warmed nothing, and says so."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["warm", str(path), "--cache-dir", str(tmp_path / "c")])))
    thread.start()
    time.sleep(0.3)
    sync.error = OSError(5, "no")
    with pytest.warns(qc.QuantcacheWarning, match="not saved"):
        sync.go_on.set()
        building.close()
    thread.join(20)
    assert codes[0] != 0
    assert "not saved" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"verify": "off"}, {"quant": "int8"}])
def test_not_served(building: qc.Model, path: Path, tmp_path: Path, sync: _Sync, options: dict[str, Any]) -> None:
    """Who checks nothing waits until the entry is durable; who wants another entry waits for nobody."""
    thread, found = _wait(path, cache=tmp_path / "c", **options)
    thread.join(0.3)
    assert bool(found) == ("quant" in options)
    sync.go_on.set()
    thread.join(20)
    assert found[0].hit == ("quant" not in options)
    found[0].close()


def test_a_network_file_system_is_not_trusted(
    building: qc.Model, path: Path, tmp_path: Path, sync: _Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's bytes count once they are durable."""
    monkeypatch.setattr("quantcache.cache.store.is_network", lambda _: True)
    thread, found = _wait(path, cache=tmp_path / "c")
    thread.join(0.3)
    assert not found
    sync.go_on.set()
    thread.join(20)
    assert found[0].hit
    found[0].close()


def _flip(raw: bytearray) -> str:
    raw[200] ^= 1
    return ""


@pytest.mark.parametrize("change", [_flip, lambda _: "../entries/x", lambda _: "1-0123456789abcdef.tmp", lambda _: "\0", lambda _: "x" * 1000])
def test_what_is_announced_is_not_believed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytearray], str]
) -> None:
    """A name that leads nowhere, or a file that is not whole, is nobody's hit and no damage: the waiter goes on waiting."""
    publish, names = StagedEntry.publish, []

    def announce_other(self: StagedEntry, target: Path, *, announce: Callable[[str], None], **details: Any) -> int:
        def announced(name: str) -> None:
            file = tmp_path / "c" / "v1" / "tmp" / name
            copy = file.with_name(f"{os.getpid()}-{'0' * 16}.tmp")
            raw = bytearray(file.read_bytes())
            names.append(change(raw) or copy.name)
            copy.write_bytes(raw)
            announce(names[-1])
            time.sleep(0.1)
            copy.unlink()

        return publish(self, target, announce=announced, **details)

    monkeypatch.setattr(StagedEntry, "publish", announce_other)
    model = qc.load(path, cache=tmp_path / "c")
    thread, found = _wait(path, cache=tmp_path / "c")
    model.close()
    thread.join(20)
    assert names
    assert found[0].hit
    assert _bytes(found[0]) == _expected(path)
    found[0].close()
    assert not list((tmp_path / "c" / "v1" / "quarantine").iterdir())
