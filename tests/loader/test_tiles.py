"""Hold tiles that are quantized together to what each gives alone, whatever the others are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache.key import digest
from quantcache.errors import SourceError
from quantcache.loader import digests as digesting
from quantcache.loader import model as loading
from quantcache.loader import plan as planning
from quantcache.loader.pipeline import Pipeline
from quantcache.loader.plan import Job, Request, plan
from quantcache.loader.recipe import Recipe
from quantcache.loader.source import Source, open_checkpoint
from quantcache.loader.tiles import Piece, Stretch, Strip, encode, encode_elsewhere, encode_tile, whole_pieces
from quantcache.quant import native
from quantcache.quant.codec import Arena, Scratch, Status, quantize

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


def strips(found: list[Job], most: int = 1) -> list[Strip]:
    """Return all tiles of jobs, at most so many together."""
    return [
        Strip(job, starts[0], min(starts[-1] + job.tile, job.size))
        for job in found for starts in (job.tiles[first : first + most] for first in range(0, len(job.tiles), most))
    ]  # fmt: skip


def flat(pieces: list[Piece]) -> list[tuple[str, int, bytes]]:
    """Return what pieces hold, tile by tile."""
    return sorted((piece.key, piece.position, bytes(piece.buffer)) for found in pieces for piece in found.each())


def holds(strip: Strip, source: Source) -> None:
    """Require that what became of a strip is what becomes of its tiles alone, and that digests are right."""
    alone = [encode_tile(source, strip.job, start, Scratch(), Scratch()) for start in strip.tiles]
    assert strip.status == max((status for status, _ in alone), default=Status.OK)
    assert flat(strip.pieces) == ([] if strip.status != Status.OK else flat([piece for _, pieces in alone for piece in pieces]))
    for piece in [piece for found in strip.pieces for piece in found.each()]:
        assert list(piece.digests) == [digest(bytes(piece.buffer))]


@pytest.mark.parametrize("most", [1, 2, 64])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "int8", "int8-row", "f16"])
def test_together(source: Source, kernel_level: Callable[[str], None], quant: str, level: str, most: int) -> None:
    """Each tile gives the same bytes, status and digests together with all others as alone; what one tensor refuses is not the next one's."""
    kernel_level(level)
    together, outputs = strips(jobs(source, quant), most), Arena(5000)
    for _ in range(2):  # the second time in memory that was used before
        outputs.clear()
        for strip in together:
            strip.status, strip.pieces = Status.OK, []
        encode(source, together, Scratch(), outputs, digested=True)
        for strip in together:
            holds(strip, source)
    assert all(strip.status & Status.NONFINITE for strip in together if strip.job.info.name == "a.2.weight")
    assert any(len(piece.buffer) <= 240 for strip in together for piece in strip.pieces)
    assert max(piece.count for strip in together for piece in strip.pieces) == (1 if level == "reference" else min(most, 3))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("quant", ["nf4", "int8", "int8-row", "f16"])
@pytest.mark.parametrize("spoiled", range(5))
def test_one_of_several_is_refused(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kernel_level: Callable[[str], None], quant: str, level: str, spoiled: int
) -> None:
    """A strip of which one tile is refused gives nothing, whichever that is, and why; the strip behind it is whole."""
    kernel_level(level)
    monkeypatch.setattr(planning, "TILE", 4096)
    first, second = (rng.standard_normal((140, 128), np.float32) for _ in range(2))
    first[min(spoiled * 32, 139), 77] = np.inf if quant != "f16" else 1e30
    save_file({"a.weight": first, "b.weight": second}, tmp_path / "m.safetensors")
    source = open_checkpoint(tmp_path / "m.safetensors")[0]
    refused, whole = strips(jobs(source, quant), 64)
    encode(source, [refused, whole], Scratch(), Arena(0), digested=True)
    assert refused.status & (Status.F16_RANGE if quant == "f16" else Status.NONFINITE)
    assert refused.pieces == []
    holds(whole, source)


class _Elsewhere:
    """Quantize as a device does: the parts that kernels make, or nothing."""

    threads, room = 1, 3

    def __init__(self, *, does: bool, leaves: tuple[str, ...] = ()) -> None:
        self.does, self.leaves, self.asked = does, leaves, list[list[str]]()

    def expect(self, jobs: Sequence[Job]) -> int:
        """Return the bytes of those that are quantized."""
        return sum(job.info.nbytes for job in jobs if self.cost(job))

    def cost(self, job: Job) -> int:
        """Return 1 for each tile of a matrix."""
        return int(job.decision.codec not in ("keep", "f16") and job.info.name not in self.leaves)

    def encode(self, stretches: Sequence[Stretch], outputs: Arena, *, bring: bool = True) -> list[dict[str, NDArray[Any]] | None]:
        """Quantize on the CPU, by the reference."""
        self.asked.append([stretch.job.info.name for stretch in stretches])
        found: list[dict[str, NDArray[Any]] | None] = []
        for stretch in stretches:
            assert stretch.job.encoder is not None
            status, made = stretch.job.encoder.reference(stretch.raw.view(np.float16 if stretch.job.info.dtype == "F16" else np.float32))
            done = self.does and status == Status.OK
            kept = {part.name for part in stretch.job.kind.parts if part.weights} if not bring else set()
            found.append({name: array for name, array in made.items() if name not in kept} if done else None)
        return found

    def close(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("does", [True, False])
@pytest.mark.parametrize("quant", ["nf4", "int8", "int8-row"])
def test_elsewhere(source: Source, kernel_level: Callable[[str], None], quant: str, does: bool, level: str) -> None:
    """What another processor makes of several tiles is cut into theirs, with digests; what it leaves is done here."""
    kernel_level(level)
    together, quantizer = strips(jobs(source, quant), 64), _Elsewhere(does=does, leaves=("a.3.weight",))
    encode_elsewhere(source, together, Scratch(), Arena(0), quantizer, digested=True)
    assert quantizer.asked == [["a.0.weight", "a.1.weight", "a.2.weight"]]
    for strip in together:
        holds(strip, source)


@pytest.mark.parametrize("fails_at", range(1, 12))
def test_a_quantizer_that_fails_meanwhile(source: Source, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """Whenever another thread finds that the quantizer has failed, every tile is quantized by it or here."""
    together, quantizer, looks = strips(jobs(source, "nf4"), 64), _Elsewhere(does=True), iter(range(1, 1000))
    cost = quantizer.cost
    monkeypatch.setattr(quantizer, "cost", lambda job: cost(job) if next(looks) < fails_at else 0)
    encode_elsewhere(source, together, Scratch(), Arena(0), quantizer, digested=True)
    for strip in together:
        holds(strip, source)


@pytest.mark.parametrize("does", [True, False])
@pytest.mark.parametrize("quant", ["nf4", "nf4-dq"])
def test_elsewhere_and_left_there(source: Source, does: bool, quant: str) -> None:
    """What nobody stores stays where it was quantized, and is said to be away; what an encoder collects, and what is left, comes."""
    for job in jobs(source, quant):
        (strip,), quantizer = strips([job], 64), _Elsewhere(does=does)
        encode_elsewhere(source, [strip], Scratch(), Arena(0), quantizer, digested=False)
        away = does and quantizer.cost(job) and job.info.name != "a.2.weight" and job.size > 0
        assert strip.away == bool(away)
        alone = [encode_tile(source, job, start, Scratch(), Scratch()) for start in strip.tiles]
        status = max((status for status, _ in alone), default=Status.OK)
        assert strip.status == status
        assert flat(strip.pieces) == ([] if away or status != Status.OK else flat([piece for _, pieces in alone for piece in pieces]))
        if status == Status.OK:
            (same,) = [other for other in jobs(source, quant) if other.info.name == job.info.name]
            for start in same.tiles if same.size else ():
                encode_tile(source, same, start, Scratch(), Scratch())
            assert flat(whole_pieces(job)) == flat(whole_pieces(same))


def test_steps_of_several_tensors(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes elsewhere fills the room there, over the ends of tensors and over small ones between; of the source little is read again for its digest."""
    large = {f"layers.{n}.weight": (rng.standard_normal((128, 128)) * 0.02).astype(np.float16) for n in range(9)}
    save_file(large | {f"layers.{n}.norm": np.ones(128, np.float16) for n in range(9)}, tmp_path / "m.safetensors")
    again: list[list[tuple[int, int]]] = []
    monkeypatch.setattr(digesting._Chunk, "missing", lambda self, real=digesting._Chunk.missing: (again.append(real(self)), again[-1])[1])
    quantizer = _Elsewhere(does=True)
    monkeypatch.setattr(loading, "_quantizer", lambda _: quantizer)
    with qc.load(tmp_path / "m.safetensors", "nf4", cache=tmp_path / "c", threads=1) as model:
        model.finish()
        assert [len(names) for names in quantizer.asked] == [3] * 3
        wanted = {name: quantize("nf4", large[name])[1]["codes"].tobytes() for name in large}
        assert {name: model[name].parts["codes"].tobytes() for name in large} == wanted
    assert len(again) == 1
    assert all(last - first == 1 or first == 0 for first, last in again[0])  # edges, and the header
    with qc.load(tmp_path / "m.safetensors", "nf4", cache=tmp_path / "c") as model:
        assert model.hit


def test_few_are_taken_along(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many small tensors follow one that goes elsewhere, a thread takes no more than a megabyte of them along."""
    content: dict[str, Any] = {"a.0.weight": (rng.standard_normal((128, 128)) * 0.02).astype(np.float16)}
    save_file(content | {f"a.{n}.norm": np.ones(40_000, np.float32) for n in range(1, 60)}, tmp_path / "m.safetensors")
    sizes: list[int] = []
    real = Pipeline._quantize
    monkeypatch.setattr(Pipeline, "_quantize", lambda self, batch, work: (sizes.append(sum(t.job.info.nbytes for t, _ in batch.strips)), real(self, batch, work)))
    monkeypatch.setattr(loading, "_quantizer", lambda _: _Elsewhere(does=True))
    with qc.load(tmp_path / "m.safetensors", "nf4", mode="off", threads=1) as model:
        model.finish()
    assert 300_000 < sizes[0] < 1_100_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what cannot be read before it is touched")
def test_where_a_file_ends(source: Source) -> None:
    """What cannot be read is told with its own place, not that of what is read together with it."""
    path, whole = source.path, strips(jobs(source, "nf4"))
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
        made = sum(piece.count * piece.nbytes for task, strip in batch.strips for piece in strip.pieces if not task.job.kind.copies)
        batches.append((sum(max(1, len(strip.tiles)) for _, strip in batch.strips), made))

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
    both, real = threading.Barrier(2, timeout=60), Memory.place

    def place(self: Memory, key: str, position: int) -> tuple[NDArray[Any], int]:
        if key == "a.0.weight":
            both.wait()
        return real(self, key, position)

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "place", place)
        with qc.load(tmp_path / "m.safetensors", "nf4-dq", mode="off", threads=2) as model:
            side_by_side = model["a.0.weight"]
    with qc.load(tmp_path / "m.safetensors", "nf4-dq", mode="off", threads=1) as model:
        alone = model["a.0.weight"]
    assert isinstance(side_by_side, qc.QuantTensor)
    assert isinstance(alone, qc.QuantTensor)
    for part, expected in alone.parts.items():
        np.testing.assert_array_equal(side_by_side.parts[part], expected)
