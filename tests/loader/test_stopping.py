"""Hold a stopped load to its word: it answers at once, whatever the disk does, and leaves nothing."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc
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
