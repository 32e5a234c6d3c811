"""Hold a stopped load to its word: it answers at once, whatever the disk does, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc
from quantcache import memory
from quantcache.loader import mapping
from quantcache.loader.pipeline import Progress


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    """A checkpoint of some tiles."""
    path = tmp_path / "m.safetensors"
    save_file({f"blocks.{n}.a.weight": np.random.default_rng(n).standard_normal((2048, 1024), np.float32) for n in range(4)}, path)
    return path


def left(store: Path) -> list[Path]:
    """Return entries and temp files."""
    return [*store.glob("v1/entries/*/*"), *store.glob("v1/tmp/*")]


def test_cancel_within_the_lock(model_path: Path, tmp_path: Path) -> None:
    """What a collection or a signal handler does to a model under the pipeline's own lock does not wait for itself."""
    model = qc.load(model_path, cache=tmp_path / "c")
    pipeline = model._pipelines[0]

    def collected() -> None:
        with pipeline._lock:
            model.cancel()

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert left(tmp_path / "c") == []


def test_ctrl_c_while_the_lock_is_taken_back(model_path: Path, tmp_path: Path) -> None:
    """Ctrl-C that comes while a caller wakes up is Ctrl-C, and cancels: the caller lets go of no lock that it has not."""
    code = (
        "import os, signal, sys, threading, time, quantcache as qc\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whatever the tests were started with
        "from quantcache.loader import pipeline\n"
        "gone = threading.Event()\n"
        "def tile(self, *given): gone.wait(60)\n"
        "pipeline.Pipeline._quantize = tile\n"
        "def interrupt():\n"
        "    time.sleep(0.3)\n"
        "    with model._pipelines[0]._lock:\n"  # the caller wakes up every fifth of a second, and waits for it
        "        time.sleep(0.5); os.kill(os.getpid(), signal.SIGINT); time.sleep(0.5)\n"
        "    print('kept', flush=True); gone.set()\n"
        "thread = threading.Thread(target=interrupt, daemon=True)\n"
        "try:\n"
        "    with qc.load(sys.argv[1], cache=sys.argv[2]) as model: thread.start(); model['blocks.0.a.weight']\n"
        "except KeyboardInterrupt: thread.join(); print('interrupted')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, model_path, tmp_path / "c"], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["kept", "interrupted"], done.stderr
    assert left(tmp_path / "c") == []


def test_cancel_while_the_disk_hangs(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync that does not come back holds up neither the caller nor the cleaning up, and publishes nothing afterwards."""
    hanging, go = threading.Event(), threading.Event()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if threading.current_thread().name.startswith("quantcache-"):
            hanging.set()
            assert go.wait(60)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    model = qc.load(model_path, cache=tmp_path / "c")
    assert hanging.wait(60)
    threads = model._pipelines[0]._threads
    model.cancel()  # would hang for a minute
    assert not go.is_set()
    assert left(tmp_path / "c") == []
    go.set()
    for thread in threads:
        thread.join(60)
    assert left(tmp_path / "c") == []
    monkeypatch.setattr(os, "fsync", real)
    with qc.load(model_path, cache=tmp_path / "c") as again:
        assert not again.hit


def test_progress_can_cancel(model_path: Path, tmp_path: Path) -> None:
    """A callback that returns False stops the load; what it is told makes sense."""
    told: list[Progress] = []

    def callback(report: Progress) -> Any:
        told.append(report)
        return len(told) < 2

    with pytest.raises(qc.QuantcacheError, match="stopped"), qc.load(model_path, cache=tmp_path / "c", progress=callback) as model:
        while True:
            model.finish()
            time.sleep(0.01)
    assert left(tmp_path / "c") == []


def test_progress_tells_rate_time_left_and_phases(model_path: Path, tmp_path: Path) -> None:
    """At the end everything is done, nothing is left, and the phases are those of the load."""
    told: list[Progress] = []
    with qc.load(model_path, cache=tmp_path / "c", progress=told.append) as model:
        model.finish()
    last = told[-1]
    assert (last.done_nbytes, last.done_tensors, last.phase) == (last.total_nbytes, last.total_tensors, "sync")
    assert last.total_nbytes == 4 * 2048 * 1024 * 4
    assert last.rate == pytest.approx(last.done_nbytes / last.seconds)
    assert last.left_s == 0
    assert {"read", "quantize", "write"} <= set(last.phases)
    assert Progress(0, 10, 0, 1, "quantize").left_s is None
    assert Progress(5, 10, 0, 1, "quantize", 2.0).left_s == pytest.approx(2.0)


def test_progress_of_what_is_planned_anew(tmp_path: Path) -> None:
    """Tiles of a tensor that turns out not to fit its plan count once."""
    path = tmp_path / "m.safetensors"
    weights = np.random.default_rng().standard_normal((4096, 1024), np.float32)
    weights[-1, -1] = np.nan
    save_file({"a.0.weight": weights, "a.1.weight": weights[:512] * np.float32(1e-9) * 0 + 1}, path)
    told: list[Progress] = []
    with pytest.warns(qc.QuantcacheWarning, match="kept"), qc.load(path, "int8", cache=tmp_path / "c", progress=told.append) as model:
        model.finish()
    assert max(report.done_nbytes for report in told) == told[-1].done_nbytes == told[-1].total_nbytes
    assert all(report.left_s is None or report.left_s >= 0 for report in told)


def test_interrupted_between_staging_and_building(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a build is set up leaves no temp file, and no lock that the next load would wait for."""
    from quantcache.loader import build

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "DigestBehind", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qc.load(model_path, cache=tmp_path / "c")
    assert left(tmp_path / "c") == []
    with qc.Cache(tmp_path / "c", lock_timeout_s=5) as store, qc.load(model_path, cache=store) as model:
        assert not model.hit


def test_a_worker_that_cancels(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a collection in a worker cancels is closed once no worker writes any more: its descriptor may be another file's by then."""
    from quantcache.cache.blobs import StagedEntry

    there, found = threading.Event(), []
    real = StagedEntry.place

    def place(self: StagedEntry, key: str, position: int) -> tuple[int, int]:
        descriptor, start = real(self, key, position)
        if not found:
            assert there.wait(60)
            model.cancel()
            found.append(os.fstat(descriptor).st_size)
        return descriptor, start

    monkeypatch.setattr(StagedEntry, "place", place)
    model = qc.load(model_path, cache=tmp_path / "c", threads=1)
    (pipeline,) = model._pipelines
    there.set()
    for thread in list(pipeline._threads):
        thread.join(60)
    assert found
    assert left(tmp_path / "c") == []


def test_a_claim_that_is_lost(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails between taking tiles and quantizing them is told, and no thread waits for their digests for ever."""
    from quantcache.loader import pipeline as module

    real, made = module.Batch, []

    def batch(*given: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            raise MemoryError("no")
        return real(*given)

    monkeypatch.setattr(module, "Batch", batch)
    with pytest.raises(MemoryError), qc.load(model_path, cache=tmp_path / "c", threads=4) as model:
        model.finish()
    for thread in list(model._pipelines[0]._threads):
        thread.join(10)
        assert not thread.is_alive()
    assert left(tmp_path / "c") == []


def test_cancel_while_the_entry_is_rearranged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file, into which an entry is copied whose plan did not hold, goes with the first."""
    from quantcache.cache import blobs

    path = tmp_path / "m.safetensors"
    content = {f"a.{n}.weight": np.random.default_rng(n).standard_normal((512, 512), np.float32) for n in range(3)}
    content["a.1.weight"][0, 0] = np.inf
    save_file(content, path)
    copying, go = threading.Event(), threading.Event()
    real = blobs._copy

    def slow(*arguments: Any) -> None:
        copying.set()
        assert go.wait(60)
        real(*arguments)

    monkeypatch.setattr(blobs, "_copy", slow)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qc.QuantcacheWarning)
        model = qc.load(path, cache=tmp_path / "c")
        assert copying.wait(60)
        threads = model._pipelines[0]._threads
        model.cancel()
        assert left(tmp_path / "c") == []
        go.set()
        for thread in threads:
            thread.join(60)
    assert left(tmp_path / "c") == []


def test_never_closed(model_path: Path, tmp_path: Path) -> None:
    """A program that ends with a model open, its build under way, has it stored; exit handlers may still use a hit."""
    code = (
        "import atexit, sys, time, quantcache as qc\n"
        "from quantcache.loader import digests, tiles\n"
        "digests._CATCH_UP = 0; digests._PATIENCE_S = 0\n"  # much is read again at the end
        "atexit.register(lambda: [open(sys.argv[1], 'rb') for _ in range(20)])\n"
        "model = qc.load(sys.argv[1], cache=sys.argv[2], progress=lambda _: time.sleep(0.05))\n"
        "atexit.register(lambda: [model[name] for name in model])\n"
    )
    for hit in (False, True):
        done = subprocess.run([sys.executable, "-c", code, str(model_path), str(tmp_path / "c")], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        with qc.load(model_path, cache=tmp_path / "c", verify="open") as model:
            assert model.hit, hit
    assert not list((tmp_path / "c").glob("v1/quarantine/*"))


def test_child_of_fork_while_a_miss_is_under_way(
    model_path: Path, tmp_path: Path, in_child: Callable[[Callable[[], None]], None]
) -> None:
    """A child has no workers: it is told so instead of waiting, and does not touch its parent's file."""
    go = threading.Event()
    model = qc.load(model_path, cache=tmp_path / "c", threads=1, progress=lambda _: go.wait(60))

    def child() -> None:
        with pytest.raises(qc.QuantcacheError, match="forked"):
            model["blocks.3.a.weight"]
        with pytest.raises(qc.QuantcacheError, match="forked"):
            model.finish()
        model.cancel()

    in_child(child)
    go.set()
    model.close()
    with qc.load(model_path, cache=tmp_path / "c") as again:
        assert again.hit


def test_few_descriptors(tmp_path: Path) -> None:
    """Many tensors that are planned anew, and many shards, fit a limit of a few open files."""
    path = tmp_path / "m.safetensors"
    rng = np.random.default_rng()
    save_file({f"a.{n}.weight": rng.standard_normal((64, 128), np.float32) * np.float32(1e-6) for n in range(200)}, path)
    code = (
        "import sys, quantcache as qc, resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))\n"
        "with qc.load(sys.argv[1], 'int8', cache=sys.argv[2]) as model: [model[name] for name in model]\n"
        "assert not model.unsaved\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(path), str(tmp_path / "c")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with qc.load(path, "int8", cache=tmp_path / "c") as model:
        assert model.hit


@pytest.mark.parametrize("cancelled", [False, True])
def test_memory_goes_back_to_the_system(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool) -> None:
    """Once a build is done, or stopped, its buffers are given back, however long somebody keeps the model: no page of them stays."""
    given: list[Any] = []
    real = memory.pages

    def pages(nbytes: int) -> Any:
        found = real(nbytes)
        given.append(weakref.ref(found))
        return found

    monkeypatch.setattr(mapping, "pages", pages)
    with qc.load(model_path, cache=tmp_path / "c") as model:
        if cancelled:
            model["blocks.0.a.weight"].dequantize()
            model.cancel()
        else:
            model.finish()
        assert given
        end = time.monotonic() + 30
        while any(one() is not None for one in given) and time.monotonic() < end:
            time.sleep(0.01)  # threads end a little later
        assert [one for one in given if one() is not None] == []
