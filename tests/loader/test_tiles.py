"""Hold tiles that are quantized together to what each gives alone, whatever the others are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache.key import digest
from quantcache.errors import SourceError
from quantcache.loader import plan as planning
from quantcache.loader.plan import Job, Request, plan
from quantcache.loader.recipe import Recipe
from quantcache.loader.source import Source, open_checkpoint
from quantcache.loader.tiles import Piece, Tile, encode, encode_elsewhere, encode_tile
from quantcache.quant import native
from quantcache.quant.codec import Arena, Scratch, Status

LEVELS = ["reference", native.available()[-1]]


@pytest.fixture
def rng() -> np.random.Generator:
    """New numbers every run."""
    return np.random.default_rng()


@pytest.fixture
def source(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Tensors of all kinds: several tiles, one, none, few bytes, values that codecs refuse."""
    monkeypatch.setattr(planning, "TILE", 4096)
    content: dict[str, Any] = {
        "a.0.weight": rng.standard_normal((100, 128), np.float32),
        "a.1.weight": rng.standard_normal((64, 128)).astype(np.float16),
        "a.2.weight": np.full((40, 128), np.nan, np.float32),
        "a.3.weight": rng.standard_normal((33, 128), np.float32),
        "a.4.bias": rng.standard_normal(3, np.float32),
        "a.5.norm": rng.standard_normal(5000).astype(np.float16),
        "a.6.weight": np.zeros((0, 128), np.float32),
        "a.7.weight": rng.standard_normal((1, 128)).astype(np.float16),
        "a.8.count": np.arange(7),
    }
    save_file(content, tmp_path / "m.safetensors")
    return open_checkpoint(tmp_path / "m.safetensors")[0]


def jobs(source: Source, quant: str) -> list[Job]:
    """Return the jobs of a source."""
    return plan(source, Request(Recipe.of(quant)))


def tiles(found: list[Job]) -> list[Tile]:
    """Return all tiles of jobs."""
    return [Tile(job, start, min(start + job.tile, job.size)) for job in found for start in job.tiles]


def flat(pieces: list[Piece]) -> list[tuple[str, int, bytes]]:
    """Return what pieces hold."""
    return [(piece.key, piece.position, bytes(piece.buffer)) for piece in pieces]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8", "int8-row", "f16"])
def test_together(source: Source, kernel_level: Callable[[str], None], quant: str, level: str) -> None:
    """Each tile gives the same bytes, status and digests together with all others as alone; what one refuses is not the next one's."""
    kernel_level(level)
    together, outputs = tiles(jobs(source, quant)), Arena(5000)
    for _ in range(2):  # the second time in memory that was used before
        outputs.clear()
        for tile in together:
            tile.status, tile.pieces = Status.OK, []
        encode(source, together, Scratch(), outputs, digested=True)
        for tile in together:
            status, pieces = encode_tile(source, tile.job, tile.start, Scratch(), Scratch())
            assert (tile.status, flat(tile.pieces)) == (status, flat(pieces))
            assert [piece.digest for piece in tile.pieces] == [digest(bytes(piece.buffer)) for piece in tile.pieces]
    assert all(tile.status & Status.NONFINITE for tile in together if tile.job.info.name == "a.2.weight")
    assert any(len(piece.buffer) <= 240 for tile in together for piece in tile.pieces)


class _Elsewhere:
    """Quantize as a device does: the parts that kernels make, or nothing."""

    threads = 1

    def __init__(self, *, does: bool) -> None:
        self.does = does

    def tiles(self, _: Job) -> int:
        """Return how many."""
        return 3

    def encode(self, job: Job, start: int, raw: NDArray[np.uint8], outputs: Scratch) -> dict[str, NDArray[Any]] | None:
        """Quantize on the CPU, by the reference."""
        assert job.encoder is not None
        return job.encoder.reference(raw.view(np.float16 if job.info.dtype == "F16" else np.float32))[1] if self.does else None

    def close(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("does", [True, False])
@pytest.mark.parametrize("quant", ["nf4", "int8", "int8-row"])
def test_elsewhere(source: Source, kernel_level: Callable[[str], None], quant: str, does: bool, level: str) -> None:
    """What another processor makes of several tiles is cut into theirs, with digests; what it leaves is done here."""
    kernel_level(level)
    job = jobs(source, quant)[0]
    together = tiles([job])
    encode_elsewhere(source, together, Scratch(), Arena(0), _Elsewhere(does=does), digested=True)
    for tile in together:
        status, pieces = encode_tile(source, job, tile.start, Scratch(), Scratch())
        assert (tile.status, flat(tile.pieces)) == (status, flat(pieces))
        assert [piece.digest for piece in tile.pieces] == [digest(bytes(piece.buffer)) for piece in tile.pieces]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what cannot be read before it is touched")
def test_where_a_file_ends(source: Source) -> None:
    """What cannot be read is told with its own place, not that of what is read together with it."""
    path, whole = source.path, tiles(jobs(source, "nf4"))
    last = max(source.tensors.values(), key=lambda info: info.offset)
    cut = max(info.offset for info in source.tensors.values() if info.offset < last.offset - 8192)
    with path.open("r+b") as file:
        file.truncate(cut // 4096 * 4096)
    with pytest.raises(SourceError, match="shorter") as caught:
        encode(source, whole, Scratch(), Arena(0))
    assert caught.value.offset is not None
    assert caught.value.offset >= cut // 4096 * 4096 - 4096 * 4


def test_arena(rng: np.random.Generator) -> None:
    """Arrays do not share memory until they are let go of, then they take the same again."""
    arena = Arena(1000)
    for _ in range(3):
        arena.clear()
        made = [(arena.array("same", np.float32, size), size) for size in rng.integers(0, 300, 20)]
        for number, (array, size) in enumerate(made):
            assert array.size == size
            array[...] = number
        assert all((array == number).all() for number, (array, _) in enumerate(made))


def test_batches_are_bounded(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does a thread take thousands of small tensors at a time, nor more than is to be in memory until it is written."""
    from quantcache.loader.pipeline import Pipeline

    monkeypatch.setattr(planning, "TILE", 4096)
    monkeypatch.setattr("quantcache.loader.pipeline._ALL_MADE", 200_000)
    content = {f"a.{n}.bias": rng.standard_normal(1, np.float32) for n in range(500)}
    content |= {f"b.{n}.weight": rng.standard_normal((64, 128), np.float32) for n in range(200)}
    save_file(content, tmp_path / "m.safetensors")
    batches: list[tuple[int, int]] = []
    real: Any = Pipeline._quantize

    def quantize(self: Any, batch: Any, work: Any) -> None:
        real(self, batch, work)
        made = sum(piece.buffer.nbytes for task, tile in batch.tiles for piece in tile.pieces if not task.job.copies)
        batches.append((len(batch.tiles), made))

    monkeypatch.setattr(Pipeline, "_quantize", quantize)
    with qc.load(tmp_path / "m.safetensors", "int8", cache=tmp_path / "c", threads=2) as model:
        model.finish()
    assert 8 < max(count for count, _ in batches) <= 64
    assert max(made for _, made in batches) <= 200_000 // 4 + 4096 * 2


def test_last_tiles_side_by_side(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that bring the last two tiles to memory at the same time leave nothing out: what is whole is made once, after both."""
    from quantcache.loader.build import Memory

    monkeypatch.setattr(planning, "TILE", 4096)
    save_file({"a.0.weight": rng.standard_normal((64, 128), np.float32)}, tmp_path / "m.safetensors")
    both, real = threading.Barrier(2, timeout=60), Memory.write

    def write(self: Memory, key: str, position: int, buffer: Any, found: bytes = b"") -> None:
        if key == "a.0.weight":
            both.wait()
        real(self, key, position, buffer, found)

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "write", write)
        with qc.load(tmp_path / "m.safetensors", "nf4-dq", mode="off", threads=2) as model:
            side_by_side = model["a.0.weight"]
    with qc.load(tmp_path / "m.safetensors", "nf4-dq", mode="off", threads=1) as model:
        alone = model["a.0.weight"]
    assert isinstance(side_by_side, qc.QuantTensor)
    assert isinstance(alone, qc.QuantTensor)
    for part, expected in alone.parts.items():
        np.testing.assert_array_equal(side_by_side.parts[part], expected)
