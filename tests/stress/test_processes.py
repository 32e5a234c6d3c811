"""Processes that want the same model at once, and processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import quantcache as qc

CODE = """
import hashlib, sys, quantcache as qc
with qc.load(sys.argv[1], cache=sys.argv[2]) as model:
    total = hashlib.sha256()
    for name, tensor in model.items():
        for part in tensor.parts.values() if isinstance(tensor, qc.QuantTensor) else (tensor,):
            total.update(part.tobytes())
    print(model.hit, total.hexdigest())
"""


def write_model(path: Path, layers: int) -> Path:
    """Write a model of 16 MB a layer."""
    rng = np.random.default_rng(0)
    weights = {f"layers.{n}.key.weight": rng.standard_normal((2048, 2048)).astype(np.float32) for n in range(layers)}
    save_file(weights, path)
    return path


def start(path: Path, cache: Path) -> subprocess.Popen[str]:
    """Load a model in another process."""
    return subprocess.Popen([sys.executable, "-c", CODE, str(path), str(cache)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("count", [2, 8])
def test_one_quantization_per_cold_key(tmp_path: Path, count: int) -> None:
    """However many processes ask at once, one quantizes; all get the same bytes."""
    path = write_model(tmp_path / "m.safetensors", 4)
    running = [start(path, tmp_path / "c") for _ in range(count)]
    said = [process.communicate(timeout=120)[0].split() for process in running]
    assert sorted(hit for hit, _ in said) == ["False", *["True"] * (count - 1)]
    assert len({digest for _, digest in said}) == 1
    with qc.Cache(tmp_path / "c") as store:
        assert store.stats()["misses"] == 1
        assert store.stats()["hits"] == count - 1


def test_killed_writer(tmp_path: Path) -> None:
    """A process that is killed while it builds leaves a file that the next run removes, and nothing else."""
    path = write_model(tmp_path / "m.safetensors", 12)
    killed = 0
    for _ in range(5):
        process = start(path, tmp_path / "c")
        folder = tmp_path / "c" / "v1" / "tmp"
        while process.poll() is None and not (folder.is_dir() and list(folder.glob("*.tmp"))):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed += not list((tmp_path / "c" / "v1" / "entries").glob("*/*"))
        if killed:
            break
    assert killed, "the build was over before it could be killed"
    with qc.load(path, cache=tmp_path / "c") as model:
        assert not model.hit
        model.report()
    assert not list(folder.iterdir())
    with qc.load(path, cache=tmp_path / "c") as model:
        assert model.hit


def test_killed_leader_is_replaced(tmp_path: Path) -> None:
    """If the process that builds dies, one that waits for it takes over."""
    path = write_model(tmp_path / "m.safetensors", 12)
    leader = start(path, tmp_path / "c")
    while leader.poll() is None and not list((tmp_path / "c").glob("v1/tmp/*.tmp")):
        time.sleep(0.001)
    waiter = start(path, tmp_path / "c")
    leader.kill()
    leader.wait()
    out, _ = waiter.communicate(timeout=120)
    assert out.split()[0] in ("True", "False")
    with qc.load(path, cache=tmp_path / "c") as model:
        assert model.hit
