"""Own the measurement of one checkpoint on this machine: the floor, a miss, a hit, and the peers that are installed.

Everything happens in a store of its own, which is deleted. Peers run in processes of their own: they are slow to import, and
this package imports none of them.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantcache.cache.store import Cache
from quantcache.loader.changes import resolve
from quantcache.loader.lora import open_adapter, paired
from quantcache.loader.model import Model, load
from quantcache.loader.pipeline import default_threads
from quantcache.loader.plan import Job, Request, plan
from quantcache.loader.recipe import Recipe
from quantcache.loader.source import Source, open_checkpoint
from quantcache.loader.tiles import encode_tile
from quantcache.quant.codec import Scratch, Status
from quantcache.tensor import QuantTensor
from quantcache.trace import Profile, working_for

__all__ = ["Figure", "Floor", "bare_mmap", "floor", "measure", "timed", "touch"]

#: Tiles that the rates are measured on, spread over the model.
_SAMPLES = 96


@dataclass(frozen=True, slots=True)
class Figure:
    """Hold one row: seconds (the median), the bytes that are gone over, and what it means; no seconds: why not."""

    name: str
    seconds: float | None
    nbytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Floor:
    """Hold what threads need for the parts of a miss, each at the rate that it has alone, with warm buffers.

    Args:
        read_s: seconds to touch every byte of the mapped source, once; of all threads together.
        quantize_s, write_s: seconds of all between reading and writing, and of writing into the page cache.
        source_nbytes, stored_nbytes: what is read and written.
    """

    read_s: float
    quantize_s: float
    write_s: float
    source_nbytes: int
    stored_nbytes: int

    def seconds(self, threads: int) -> float:
        """Return the least that a miss can take on so many cores: all parts, spread evenly, nothing lost."""
        return (self.read_s + self.quantize_s + self.write_s) / threads


def touch(tensor: Any) -> int:
    """Read every byte of a tensor; return their sum."""
    total = 0
    for part in tensor.parts.values() if isinstance(tensor, QuantTensor) else (tensor,):
        raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        total += int(raw[: raw.size // 8 * 8].view(np.uint64).sum(dtype=np.uint64)) + int(raw[raw.size // 8 * 8 :].sum())
    return total


def _recipe(wanted: dict[str, Any]) -> Recipe:
    """Return the recipe that arguments of `load` mean."""
    chosen = {name: wanted[name] for name in ("include", "exclude", "other", "native", "rules") if name in wanted}
    return Recipe.of(wanted.get("quant", "nf4"), **chosen)


def floor(path: str | os.PathLike[str], folder: Path, *, threads: int = 1, **wanted: Any) -> Floor:
    """Measure the rates of reading, quantizing and writing on tiles of the model itself.

    Args:
        path: the checkpoint.
        folder: where to write.
        threads: all do the same side by side: cores share a memory, and some of them a core.
        wanted: as for `load`.

    Raises:
        SourceError: it cannot be read.
    """
    adapters = [open_adapter(*paired(given)) for given in wanted.get("lora", ())]
    sources = open_checkpoint(path, wanted.get("names", "auto"))
    request = Request(_recipe(wanted), resolve(adapters, sources))
    jobs = [(source, job) for source in sources for job in plan(source, request)]
    tiles = [(source, job, start) for source, job in jobs for start in job.tiles]
    source_nbytes = sum(job.info.nbytes for _, job in jobs)
    stored_nbytes = sum(slot.nbytes for _, job in jobs for slot in job.slots.values())
    if not tiles:
        return Floor(0.0, 0.0, 0.0, source_nbytes, stored_nbytes)
    step = max(1, len(tiles) // (_SAMPLES * threads))
    barrier = threading.Barrier(threads)

    def rates(number: int) -> tuple[float, float, float]:
        """Return one thread's seconds for all of the model."""
        chosen = tiles[number * step % len(tiles) :: step * threads]
        try:
            quantize_s, write_s = _quantize_and_write(chosen, folder / f"rate-{number}", barrier)
        except threading.BrokenBarrierError:  # another says why
            return 0.0, 0.0, 0.0
        except BaseException:
            barrier.abort()
            raise
        begin = time.perf_counter()
        for path in paths:
            bare_mmap(path, part=(number, threads))
        return (time.perf_counter() - begin) * threads * source_nbytes / file_nbytes, quantize_s * source_nbytes, write_s * stored_nbytes

    paths = sorted({source.path for source, _ in jobs})
    file_nbytes = max(1, sum(path.stat().st_size for path in paths))
    with ThreadPoolExecutor(threads) as pool:
        try:
            found = list(pool.map(rates, range(threads)))
        except BaseException:  # a thread that could not be started: the others wait for it
            barrier.abort()
            raise
    read_s, quantize_s, write_s = (statistics.mean(part) for part in zip(*found, strict=True))
    return Floor(read_s, quantize_s, write_s, source_nbytes, stored_nbytes)


def _quantize_and_write(tiles: list[tuple[Source, Job, int]], target: Path, barrier: threading.Barrier) -> tuple[float, float]:
    """Return seconds a byte: of the source for what is between reading and writing, and of what is written for that."""
    profile, work, outputs = Profile(), Scratch(), Scratch()
    read = wrote = 0
    write_s = 0.0
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for timed in (False, True):  # first so that buffers and page cache are warm
            barrier.wait()
            for source, job, start in tiles:
                with working_for(profile if timed else None):
                    status, pieces = encode_tile(source, job, start, work, outputs)
                    while status != Status.OK:  # as a miss would
                        job = job.after(status)
                        start = start // job.tile * job.tile
                        status, pieces = encode_tile(source, job, start, work, outputs)
                if not timed:
                    continue
                first, last = source.extent(job.info, start, min(start + job.tile, job.size))
                read += last - first
                for piece in pieces:
                    begin = time.perf_counter()
                    os.pwrite(descriptor, piece.buffer, wrote)
                    write_s += time.perf_counter() - begin
                    wrote += piece.buffer.nbytes
    finally:
        os.close(descriptor)
        target.unlink()
    kernels = sum(seconds for phase, seconds in profile.seconds.items() if phase != "read")
    return kernels / max(1, read), write_s / max(1, wrote)


def measure(path: str | os.PathLike[str], folder: Path, *, rounds: int = 3, threads: int = 0, **wanted: Any) -> Iterator[Figure]:
    """Yield the figures one by one, as they are there.

    Args:
        path: the checkpoint.
        folder: an empty one, on the disk that is to be measured; what is written there is deleted again.
        rounds: each figure is the median of so many.
        threads: 0 is one per core.
        wanted: as for `load`.

    Raises:
        SourceError: it cannot be read.
    """
    cores = threads or default_threads()
    least = floor(path, folder, threads=cores, **wanted)
    came, kept = least.source_nbytes, least.stored_nbytes
    yield Figure("floor of a miss", least.seconds(cores), came, f"read, quantize and write at their rates alone, on {cores} threads")
    store = folder / "store"

    def opened(**more: Any) -> Model:
        given = {"mode": "auto", "verify": "touch"} | more  # whatever the user's settings are
        return load(path, **wanted, cache=store, threads=threads, **given)

    def miss() -> dict[str, float]:
        shutil.rmtree(store, ignore_errors=True)
        Cache(store).close()  # a store is made once
        taken: dict[str, float] = {}
        start = time.perf_counter()
        with opened() as model:
            for name in model:
                model[name]  # it is there when this returns
                taken.setdefault("first", time.perf_counter() - start)
            taken["all"] = time.perf_counter() - start
        return taken | {"stored": time.perf_counter() - start}

    misses = [miss() for _ in range(rounds)]
    for part, name, note in (("first", "miss, first tensor", ""), ("all", "miss, all tensors", "in the caller's hands"), ("stored", "miss, stored", "and durable on disk")):
        if all(part in taken for taken in misses):
            yield Figure(name, statistics.median(taken[part] for taken in misses), came, note)

    def hit(*, read: bool, first: bool = False, **more: Any) -> None:
        with opened(**more) as model:
            for name in model:
                tensor = model[name]
                if read:
                    touch(tensor)
                if first:
                    return

    yield Figure("hit, first tensor", timed(lambda: hit(read=False, first=True), rounds), 0)
    yield Figure("hit, every digest checked", timed(lambda: hit(read=False), rounds), kept, "what a load does")
    yield Figure("hit, unchecked, every byte read", timed(lambda: hit(read=True, verify="off"), rounds), kept)
    entries = sorted(store.glob("v*/entries/*/*.safetensors"))
    yield Figure("bare mmap of the entries", timed(lambda: bare_mmap(*entries), rounds), kept, "every byte read; no checks")
    files = [source.path for source in open_checkpoint(path, wanted.get("names", "auto"))]
    shutil.rmtree(store, ignore_errors=True)
    yield from _peers(files, path, rounds, wanted)


def timed(call: Callable[[], Any], rounds: int) -> float:
    """Return the median seconds of a call."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def bare_mmap(*files: Path, part: tuple[int, int] = (0, 1)) -> None:
    """Map files and read every byte, or every byte of one of so many parts."""
    for file in files:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            first, last = (len(mapped) * at // part[1] for at in (part[0], part[0] + 1))
            view = np.frombuffer(mapped, np.uint8)[first:last]
            touch(view)
            del view


# ---- peers ----

_TIMED = """
import json, statistics, sys, time, warnings
warnings.simplefilter("ignore")
given = json.loads(sys.argv[1])
{setup}
taken = []
for _ in range(given["rounds"]):
    start = time.perf_counter()
    for file in given["files"]:
        {body}
    taken.append(time.perf_counter() - start)
print("seconds", statistics.median(taken))
"""

#: name -> packages that it takes, what to do first, what to do with `file`, what it is
_SAFETENSORS: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    "safetensors load_file": (
        ("safetensors",), "from safetensors.numpy import load_file", "load_file(file)", "reads the weights, quantizes nothing",
    ),
    "torch load_file": (
        ("safetensors", "torch"), "from safetensors.torch import load_file", "load_file(file)", "maps the file: nothing is read yet",
    ),
    "bitsandbytes": (
        ("safetensors", "torch", "bitsandbytes"),
        "import bitsandbytes.functional as bnb\nfrom safetensors.torch import load_file\n"
        "do = {'nf4': lambda t: bnb.quantize_4bit(t, blocksize=64, quant_type='nf4'),"
        " 'nf4-dq': lambda t: bnb.quantize_4bit(t, blocksize=64, quant_type='nf4', compress_statistics=True),"
        " 'int8-row': lambda t: bnb.int8_vectorwise_quant(t.half())}",
        "[do[given['becomes'][name]](t) for name, t in load_file(file).items() if given['becomes'].get(name) in do]",
        "reads and quantizes the same tensors, at every start",
    ),
}  # fmt: skip
_GGUF: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    "gguf-py": (
        ("gguf",), "from gguf import GGUFReader\nfrom gguf.quants import dequantize",
        "[dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors]", "decodes the weights, quantizes nothing",
    ),
}  # fmt: skip


def _peers(files: list[Path], path: str | os.PathLike[str], rounds: int, wanted: dict[str, Any]) -> Iterator[Figure]:
    recipe = _recipe(wanted)
    sources = open_checkpoint(path, "file")
    becomes = {info.name: recipe.decide(info).codec for source in sources for info in source.tensors.values()}
    peers = _GGUF if sources[0].format == "gguf" else _SAFETENSORS
    nbytes = sum(file.stat().st_size for file in files)
    quantizes = set(becomes.values()) & {"nf4", "nf4-dq", "int8-row"}
    for name, (packages, setup, body, note) in peers.items():
        if name == "bitsandbytes" and not quantizes:
            continue
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            yield Figure(name, None, nbytes, f"{', '.join(missing)} not installed")
            continue
        given = json.dumps({"files": [str(file) for file in files], "rounds": rounds, "becomes": becomes})
        code = _TIMED.format(setup=setup, body=body)
        done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=False)  # noqa: S603 - our own text
        said = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
        if done.returncode == 0 and said:
            yield Figure(name, float(said[-1].split()[1]), nbytes, note)
        else:
            yield Figure(name, None, nbytes, (done.stderr.strip().splitlines() or ["it failed"])[-1][:60])
