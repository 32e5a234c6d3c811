"""Hold `quantcache bench` to measuring what it says, and to leaving nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantcache.cli import main
from quantcache.errors import SourceError
from quantcache.loader import measure as measuring
from quantcache.loader.measure import floor, measure, touch
from quantcache.loader.tiles import encode_tile


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    """A small checkpoint."""
    path = tmp_path / "m.safetensors"
    save_file({"a.0.weight": np.random.default_rng().standard_normal((512, 512), np.float32), "a.0.bias": np.ones(3, np.float32)}, path)
    return path


@pytest.mark.parametrize("threads", [1, 3])
def test_floor(model_path: Path, tmp_path: Path, threads: int) -> None:
    """The parts are positive, their bytes are the model's, and more cores divide them."""
    found = floor(model_path, tmp_path, threads=threads, quant="int8")
    assert min(found.read_s, found.quantize_s, found.write_s) > 0
    assert found.source_nbytes == 512 * 512 * 4 + 12
    assert found.stored_nbytes == 512 * 512 + 512 * 512 // 128 * 4 + 6
    assert found.seconds(2) == pytest.approx(found.seconds(1) / 2)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("failing", [0, 1])
def test_floor_of_a_disk_that_fails(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """What fails on one thread is what is said, and no other waits for it."""
    calls = itertools.count()

    def encode(*given: Any) -> Any:
        if next(calls) == failing:
            raise SourceError("the disk failed")
        return encode_tile(*given)

    monkeypatch.setattr(measuring, "encode_tile", encode)
    with pytest.raises(SourceError, match="disk failed"):
        floor(model_path, tmp_path, threads=2)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_floor_without_files_or_threads(model_path: Path, tmp_path: Path, one_thread: Callable[..., Any]) -> None:
    """A file that one thread cannot make, or a thread that cannot be started, is said; the others do not wait for it."""
    (tmp_path / "rate-1").mkdir()
    with pytest.raises(OSError, match="rate-1"):
        floor(model_path, tmp_path, threads=3)
    (tmp_path / "rate-1").rmdir()
    with one_thread(), pytest.raises(RuntimeError, match="new thread"):
        floor(model_path, tmp_path, threads=2)


@pytest.mark.parametrize("quant", ["nf4", "native"])
def test_figures(model_path: Path, tmp_path: Path, quant: str) -> None:
    """Every figure is there, by name, also of a model of which nothing is quantized; the folder is empty afterwards."""
    folder = tmp_path / "bench"
    folder.mkdir()
    found = {figure.name: figure for figure in measure(model_path, folder, rounds=1, quant=quant)}
    assert {"floor of a miss", "miss, first tensor", "miss, all tensors", "miss, stored", "hit, first tensor", "hit, every digest checked",
            "hit, unchecked, every byte read", "bare mmap of the entries", "safetensors load_file"} <= set(found)  # fmt: skip
    assert all(figure.seconds is None or figure.seconds >= 0 for figure in found.values())
    assert ("bitsandbytes" in found) == (quant == "nf4")
    assert list(folder.iterdir()) == []


def test_command_line(model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text and JSON; the user's own store stays as it is."""
    store = tmp_path / "store"
    assert main(["--cache-dir", str(store), "bench", str(model_path), "--rounds", "1"]) == 0
    assert "hit, every digest checked" in capsys.readouterr().out
    assert main(["--cache-dir", str(store), "--json", "bench", str(model_path), "--rounds", "1", "--quant", "int8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"][0]["name"] == "floor of a miss"
    assert not store.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors"]
    assert main(["bench", str(tmp_path / "nothing")]) == 4
    assert main(["bench", str(model_path), "--rounds", "0"]) == 2


def test_touch() -> None:
    """Every byte counts, those behind the last eight too."""
    assert touch(np.arange(19, dtype=np.uint8)) == int(np.arange(16, dtype=np.uint8).view(np.uint64).sum(dtype=np.uint64)) + 16 + 17 + 18
