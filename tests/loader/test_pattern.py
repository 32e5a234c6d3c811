"""Hold tiles that repeat their kind's calls to what the kernels and the references give without."""

from __future__ import annotations

import gc
import itertools
import json
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import quantcache as qc
from quantcache.cache.key import digest
from quantcache.loader import digests as digesting
from quantcache.loader import pattern as patterns
from quantcache.loader import plan as planning
from quantcache.loader import tiles as tiling
from quantcache.loader.digests import DigestBehind, source_digest
from quantcache.loader.plan import Job, Request, plan
from quantcache.loader.recipe import Recipe
from quantcache.loader.source import Source, open_checkpoint
from quantcache.loader.tiles import Strip, encode, whole_pieces
from quantcache.quant import blocks, native
from quantcache.quant.codec import Arena, Encoder, Scratch, Status, codec, quantize
from quantcache.quant.codecs.nf4 import Nf4Encoder
from quantcache.quant.digest import BLOCK
from quantcache.tensor import BLOCKS

CODECS = ["nf4", "nf4-dq", "int8", "int8-row", "f16"]
KERNELS = [level for level in native.available() if level != "reference"]


@pytest.fixture
def rng() -> np.random.Generator:
    """New numbers every run."""
    return np.random.default_rng()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have several tiles a tensor."""
    monkeypatch.setattr(planning, "TILE", 4096)


def made(source: Source, jobs: list[Job], *, backwards: bool = False, behind: DigestBehind | None = None, most: int = 1) -> dict[str, bytes]:
    """Return what is stored of jobs, quantized all together, in strips of so many tiles; every digest is right. The source's is taken, too, if that is wanted."""
    found: dict[str, bytes] = {}
    strips = [Strip(job, start, min(start + most * job.tile, job.size)) for job in jobs for start in job.tiles[::most]]
    ordered = strips[::-1] if backwards else strips
    if behind is not None:
        extents = [source.extent(strip.job.info, strip.start, strip.stop) for strip in ordered]
        for strip, claim in zip(ordered, behind.claims(extents), strict=True):
            strip.claim = claim
    encode(source, ordered, Scratch(), Arena(1 << 20), digested=True)
    if behind is not None:
        behind.give_back(strip.claim for strip in strips if strip.claim is not None)
    pieces = [piece for strip in strips for found in strip.pieces for piece in found.each()]
    assert all(list(piece.digests) == [digest(bytes(piece.buffer))] for piece in pieces)
    wholes = [piece for job in jobs for piece in whole_pieces(job)]
    assert all(list(piece.digests) in ([], [digest(bytes(piece.buffer))]) for piece in wholes)
    for piece in [*pieces, *wholes]:
        assert piece.position == len(found.get(piece.key, b""))
        found[piece.key] = found.get(piece.key, b"") + bytes(piece.buffer)
    return found


def alone(source: Source, job: Job, weights: NDArray[Any]) -> dict[str, bytes]:
    """Return what a tensor's own encoder makes of all of its weights at once, by the reference."""
    assert job.encoder is not None
    encoder = codec(job.decision.codec).encoder(job.info.name, job.info.shape, job.info.dtype if job.kind.as_stored else "F32", job.kind.variants[0])
    _, arrays = encoder.reference(weights)
    arrays = dict(encoder.encoded(0, arrays)) | encoder.finish()
    return {part.key: np.ascontiguousarray(arrays[part.name]).tobytes() for part in encoder.parts}


def holds(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """Require that a tensor is stored as it should be."""
    assert [key for key, raw in wanted.items() if found[key] != raw] == []


def digest_of(source: Source, jobs: list[Job]) -> None:
    """Require that tiles make the same and the source's digest while they are read, in either order; only edges are read again for it."""
    plain = made(source, jobs)
    extents = [(job.info.offset, job.info.offset + job.info.nbytes) for job in jobs]
    for backwards, most in ((False, 1), (True, 1), (False, 3), (True, 64)):
        behind = DigestBehind(source.file, extents)
        assert made(source, jobs, backwards=backwards, behind=behind, most=most) == plain
        missing = sum(last - first for chunk in behind._chunks for first, last in chunk.missing())
        nobodys = source.file.nbytes - sum(stop - start for start, stop in extents)
        assert missing <= 2 * (sum(len(job.tiles) for job in jobs) + len(behind._chunks)) + nobodys // BLOCK
        while (chunk := behind.take()) is not None:
            behind.finish(chunk)
        assert behind.result() == source_digest(source, 1)


@pytest.mark.parametrize("chunk", [1 << 16, 1 << 26])
@pytest.mark.parametrize("run", [64, 1000, 1 << 16])
@pytest.mark.parametrize("level", KERNELS)
@pytest.mark.parametrize("quant", [*CODECS, "f16 of F32", "keep"])
def test_digested_while_read(
    tmp_path: Path, rng: np.random.Generator, kernel_level: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, quant: str, level: str, run: int, chunk: int
) -> None:
    """Kernels that take a tile in runs, with the source's digest in between, make what they make of it at once; wherever tensors and chunks begin."""
    kernel_level(level)
    monkeypatch.setattr(patterns, "_RUN", run)
    monkeypatch.setattr(digesting, "CHUNK", chunk)
    dtype = np.float32 if quant.endswith("F32") else np.float16
    content: dict[str, Any] = {f"a.{n}.weight": rng.standard_normal((65, 128 + 64 * n)).astype(dtype) for n in range(3)}
    content |= {f"b.{n}": rng.standard_normal(int(rng.integers(1, 3000))).astype(dtype) for n in range(3)}
    save_file(content | {"z.weight": rng.standard_normal((700, 128)).astype(dtype)}, tmp_path / "m.safetensors")
    source = open_checkpoint(tmp_path / "m.safetensors")[0]
    recipe = Recipe([("none", "nf4")], other="keep") if quant == "keep" else Recipe.of(quant.split()[0])
    jobs = plan(source, Request(recipe))
    cuts: list[int] = []
    real = patterns._cut
    monkeypatch.setattr(patterns, "_cut", lambda *given: (found := real(*given), cuts.append(len(found[0]) if found else 0))[0])
    digest_of(source, jobs)
    assert max(cuts) > 1 or run > 4096


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
def test_blocks_digested_while_read(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same of blocks: a run is decoded and quantized where the one before it was."""
    monkeypatch.setattr(patterns, "_RUN", 1000)
    weights, nbytes = BLOCKS[name]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for n in range(2):
        data = rng.integers(0, 256, (33, 512 // weights, nbytes), dtype=np.uint8) & 0x3B
        writer.add_tensor(f"blk.{n}.ffn_up.weight", data.reshape(33, -1), raw_dtype=gguf.GGMLQuantizationType[name])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    source = open_checkpoint(tmp_path / "m.gguf")[0]
    jobs = [job for job in plan(source, Request(Recipe.of("nf4", native="convert"))) if job.decision.codec == "nf4"]
    digest_of(source, jobs)
    assert all(0 < pattern.work_nbytes < 3 * key[0] for key, pattern in jobs[0].kind.patterns.items() if key[0] > 2048)


@pytest.mark.parametrize("places", [{5000: np.nan}, {5000: 1e6}, {100: np.nan, 5000: 1e6}, {100: 1e6, 5000: np.nan}])
def test_what_runs_refuse(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, places: dict[int, float]) -> None:
    """A tile is refused for all that its runs refuse it for, as if it had been taken at once; its blocks count as not digested, or rightly so."""
    monkeypatch.setattr(planning, "TILE", 8192)
    monkeypatch.setattr(patterns, "_RUN", 1024)
    content = rng.standard_normal((128, 64), np.float32)
    for place, value in places.items():
        content.reshape(-1)[place] = value
    status, _ = quantize("f16", content)
    assert status != Status.OK
    save_file({"a.weight": content}, tmp_path / "m.safetensors")
    source = open_checkpoint(tmp_path / "m.safetensors")[0]
    for summed in (False, True):
        jobs = plan(source, Request(Recipe.of("f16")))
        behind = DigestBehind(source.file, [])
        tile = Strip(jobs[0], 0, 8192)
        tile.claim = behind.claim(*source.extent(jobs[0].info, 0, 8192)) if summed else None
        encode(source, [tile], Scratch(), Arena(1 << 20))
        assert tile.status == status
        assert tile.pieces == []
        behind.give_back([tile.claim] if tile.claim is not None else [])
        while (chunk := behind.take()) is not None:
            behind.finish(chunk)
        assert behind.result() == source_digest(source, 1)


@pytest.mark.parametrize("level", KERNELS)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("quant", CODECS)
def test_repeated(tmp_path: Path, rng: np.random.Generator, kernel_level: Callable[[str], None], quant: str, dtype: str, level: str) -> None:
    """Tensors of one kind, whose calls are found once, hold what the reference makes of each; all sizes, wherever they lie."""
    kernel_level(level)
    types = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    content: dict[str, Any] = {f"a.{n}.weight": rng.standard_normal((65, 128)).astype(types[dtype]) for n in range(3)}
    content |= {f"b.{n}": rng.standard_normal((5, 128)).astype(types[dtype]) for n in range(3)}
    save_file(content, tmp_path / "m.safetensors")
    source = open_checkpoint(tmp_path / "m.safetensors")[0]
    jobs = plan(source, Request(Recipe.of(quant)))
    assert len({id(job.kind) for job in jobs}) == 2
    found = made(source, jobs)
    for job in jobs:
        if job.encoder is None:  # a copy
            assert found[job.info.name] == content[job.info.name].tobytes()
            continue
        flat = content[job.info.name].reshape(-1)
        holds(found, alone(source, job, flat.view(np.uint16) if dtype == "BF16" else flat))
        assert all(made is not None for made in job.kind.patterns.values())
    assert sum(len(job.kind.patterns) for job in {id(job.kind): job for job in jobs}.values()) <= 4


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ4_NL", "MXFP4", "TQ1_0"])
def test_blocks(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    """Blocks that are decoded in between are, too: tensors of one kind have their own weights, and larger ones take no bench away."""
    weights, nbytes = BLOCKS[name]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    raws = {}
    for n in range(2):
        data = rng.integers(0, 256, (33, 512 // weights, nbytes), dtype=np.uint8)
        data &= 0x3B  # no scale is Inf or NaN, wherever it stands
        raws[f"blk.{n}.ffn_up.weight"] = data.reshape(33, -1)
        writer.add_tensor(f"blk.{n}.ffn_up.weight", data.reshape(33, -1), raw_dtype=gguf.GGMLQuantizationType[name])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    source = open_checkpoint(tmp_path / "m.gguf")[0]
    jobs = [job for job in plan(source, Request(Recipe.of("nf4", native="convert"))) if job.decision.codec == "nf4"]
    assert len(jobs) == 2
    found = made(source, jobs)
    assert made(source, jobs, backwards=True) == found  # the last tile is the smallest
    assert all(pattern is not None and pattern.work_nbytes for pattern in jobs[0].kind.patterns.values())
    for job in jobs:
        wide = np.empty(job.size, np.float32)
        blocks.decode(name, raws[job.info.name].reshape(-1), wide, "F32")
        holds(found, alone(source, job, wide))


def test_wherever_it_lies(tmp_path: Path, rng: np.random.Generator) -> None:
    """What a kernel cannot read where it lies goes another way, and does not keep its kind from repeating."""
    content: dict[str, Any] = {}
    for n, odd in enumerate((0, 1, 2, 3, 0)):
        content[f"a.{n}.weight"] = rng.standard_normal((65, 128), np.float32)
        content[f"a.{n}.x"] = np.zeros(odd, np.uint8)
    header, at = {}, 0
    for name, array in content.items():
        kind = "F32" if array.dtype == np.float32 else "U8"
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode().ljust(4096 - 8)
    data = b"".join(array.tobytes() for array in content.values())
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    source = open_checkpoint(tmp_path / "m.safetensors")[0]
    jobs = [job for job in plan(source, Request(Recipe.of("nf4"))) if job.decision.codec == "nf4"]
    found = made(source, jobs)
    ways = {(key[2] % 4 == 0): pattern is not None for key, pattern in jobs[0].kind.patterns.items()}
    assert ways == {True: True, False: False}
    for job in jobs:
        holds(found, alone(source, job, content[job.info.name].reshape(-1)))


def test_an_argument_of_its_own(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec that hands a kernel memory of its own is not repeated: the next tile would get the same."""
    real: Any = Nf4Encoder.prepare
    monkeypatch.setattr(Nf4Encoder, "prepare", lambda self, tile, scratch: real(self, tile.copy(), scratch))
    content = {f"a.{n}.weight": rng.standard_normal((65, 128), np.float32) for n in range(3)}
    save_file(content, tmp_path / "m.safetensors")
    source = open_checkpoint(tmp_path / "m.safetensors")[0]
    jobs = plan(source, Request(Recipe.of("nf4")))
    found = made(source, jobs)
    assert set(jobs[0].kind.patterns.values()) == {None}
    for job in jobs:
        holds(found, alone(source, job, content[job.info.name].reshape(-1)))


def test_found_once(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of hundreds of tensors finds the calls of a dozen kinds and sizes."""
    asked: list[Job] = []
    real = patterns.pattern

    def pattern(raw: Any, job: Job, *args: Any, **more: Any) -> Any:
        asked.append(job)
        return real(raw, job, *args, **more)

    monkeypatch.setattr(tiling, "pattern", pattern)
    content = {f"l.{n}.{m}.weight": rng.standard_normal((40 + m, 128), np.float32) for n, m in itertools.product(range(100), range(3))}
    save_file(content, tmp_path / "m.safetensors")
    with qc.load(tmp_path / "m.safetensors", "nf4", cache=tmp_path / "c") as model:
        model.finish()
    assert len(asked) <= 3 * 2 * 2 * (os.cpu_count() or 1)


def test_keys(rng: np.random.Generator) -> None:
    """A kind's parts have the ends of keys, whatever the name: the beginning is the tensor's."""
    for name in ("blocks.0.key.weight", "emb", "weight", ".weight", "a.weight.weight"):
        for quant in CODECS:
            ending = ".weight" if name.endswith(".weight") else ""
            for variant in codec(quant).variants:
                whole, end = (codec(quant).encoder(given, (4, 128), "F32", variant).parts for given in (name, ending))
                assert [part.key for part in whole] == [name.removesuffix(".weight") + part.key for part in end]


def test_encoders_that_collect_are_not_shared(tmp_path: Path, rng: np.random.Generator) -> None:
    """Where a part is made of all tiles, tensors of a kind do not meet in one encoder."""
    save_file({f"a.{n}.weight": rng.standard_normal((65, 128), np.float32) for n in range(3)}, tmp_path / "m.safetensors")
    source = open_checkpoint(tmp_path / "m.safetensors")[0]
    for quant, apart in (("nf4", 1), ("nf4-dq", 3)):
        encoders: list[Encoder | None] = [job.encoder for job in plan(source, Request(Recipe.of(quant)))]
        assert len({id(encoder) for encoder in encoders}) == apart


@pytest.mark.parametrize("mode", ["off", "auto", "hit"])
def test_models_go_with_their_last_name(tmp_path: Path, rng: np.random.Generator, mode: str) -> None:
    """What a closed model holds is free once nobody has it, and not when Python next looks for circles: that may be gigabytes later."""
    save_file({f"a.{n}.weight": rng.standard_normal((65, 128), np.float32) for n in range(3)}, tmp_path / "m.safetensors")
    for _ in range(2 if mode == "hit" else 1):
        model = qc.load(tmp_path / "m.safetensors", "nf4", cache=tmp_path / "c", mode="off" if mode == "off" else "auto")
        model.finish()
        held: list[Any] = [weakref.ref(model), *(weakref.ref(shard) for shard in model._shards)]
        held += [weakref.ref(shard.build) for shard in model._shards if shard.build is not None]
        held += [weakref.ref(shard.stored.entry) for shard in model._shards if shard.stored is not None]
        held += [weakref.ref(shard.stored.entry.header) for shard in model._shards if shard.stored is not None]
        assert len(held) == (4 if model.hit else 3)
        _ = [model[name].parts["codes"][0] for name in model]  # type: ignore[union-attr]
        while any(thread.is_alive() for pipeline in model._pipelines for thread in pipeline._threads):
            time.sleep(0.001)  # each holds what it works at until it ends, and may still start the next one
        gc.collect()
        gc.disable()
        try:
            model.close()
            del model
            assert [ref() for ref in held] == [None] * len(held)
        finally:
            gc.enable()
