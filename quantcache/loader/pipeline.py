"""Own the work of a miss: tiles from sources through codecs into staged entries, on a bounded pool of threads.

One pipeline serves all files of a checkpoint. The tensor that a caller waits for goes first, the rest in layer order;
between them the source's digest is taken, so that the disk is read once. A worker's buffers are reused. What the store
refuses lands in memory, with one warning. Knows no hit and no caller's types.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

import quantcache
from quantcache.cache.blobs import StagedEntry, StoredEntry
from quantcache.cache.container import Slot
from quantcache.cache.key import CHUNK, Stamp, combine, digest, fingerprint
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, QuantcacheError, QuantcacheWarning, SourceError, shorten
from quantcache.loader import weights
from quantcache.loader.plan import Job, Request
from quantcache.loader.source import Source
from quantcache.quant import native
from quantcache.quant.codec import Scratch, Status
from quantcache.tensor import ITEMSIZE

__all__ = ["Build", "Cancelled", "Pipeline", "Progress", "Target", "default_threads", "encode_tile", "known_digest", "source_digest", "write_whole"]

Array = NDArray[Any]
#: Memory of a worker is about 12 MB: at most this many stay within the bound of 256 MiB.
MAX_THREADS = 16


class Cancelled(QuantcacheError):  # noqa: N818 - not a failure
    """Say that the caller stopped the load."""

    exit_code = 130


@dataclass(frozen=True)
class Progress:
    """Say how far a build is: bytes of the source, tensors, and what is being done."""

    done_nbytes: int
    total_nbytes: int
    done_tensors: int
    total_tensors: int
    phase: str


class Target(Protocol):
    """Take the bytes of tensors, piece by piece."""

    def write(self, key: str, position: int, buffer: Any) -> None:
        """Take one piece: contiguous bytes that start at a position in the tensor."""


class _Memory:
    """Take the tensors that the store does not."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def add(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self._arrays[slot.key] = np.empty(slot.nbytes, np.uint8)

    def write(self, key: str, position: int, buffer: Any) -> None:
        view = np.frombuffer(buffer, np.uint8)
        self._arrays[key][position : position + view.size] = view

    def view(self, key: str) -> memoryview:
        return self._arrays[key].data.toreadonly()


def default_threads() -> int:
    """Return one thread per core that this process may use, at most MAX_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MAX_THREADS))


def source_digest(source: Source, threads: int) -> str:
    """Return the digest of a whole source file, on several cores."""
    from concurrent.futures import ThreadPoolExecutor

    starts = range(0, source.file.nbytes, CHUNK)
    with ThreadPoolExecutor(threads) as pool:
        return combine(list(pool.map(lambda start: _chunk_digest(source, start), starts)), source.file.nbytes)


def known_digest(source: Source, cache: Cache, threads: int, seen_ns: int) -> str:
    """Return the digest of a file: as it was recorded, if the file has not changed since.

    Args:
        source: the file.
        cache: where digests are recorded.
        threads: for a digest that has to be taken.
        seen_ns: when the file was opened, since the epoch.
    """
    stamp = Stamp.of(source.file.stat)
    found = cache.source_digest(stamp)
    if found is None:
        found = source_digest(source, threads)
        if not source.file.changed():
            cache.record_source(stamp, found, source.path.resolve(), seen_ns)
    return found


def _chunk_digest(source: Source, start: int) -> bytes:
    end = min(start + CHUNK, source.file.nbytes)
    source.file.populate(start, end - start)
    return digest(source.file.memory[start:end])


class _Task:
    """A job under way. All fields but `job` are guarded by the pipeline's lock."""

    def __init__(self, build: Build, job: Job, target: StagedEntry | _Memory) -> None:
        self.build, self.job, self.target = build, job, target
        self.waiting: deque[int] = deque(job.tiles)
        self.active = 0
        self.done = False
        self.refused: Status | CacheError | None = None
        self.error: BaseException | None = None


@dataclass
class Build:
    """Hold the build of one source file.

    Args:
        source, request, jobs: what to do.
        cache, staged: where it goes; None for memory.
        digest: of the source, if it is known already.
        release: gives the lock of the build back.
        fingerprint, stamp, seen_ns: of the source.
    """

    source: Source
    request: Request
    jobs: list[Job]
    cache: Cache | None
    staged: StagedEntry | None
    digest: str | None
    release: Callable[[], None] | None
    stamp: Stamp
    seen_ns: int
    tasks: dict[str, _Task] = field(default_factory=dict)
    entry: StoredEntry | None = None
    published: bool = False
    unsaved: CacheError | None = None

    def __post_init__(self) -> None:
        """Prepare the tasks."""
        self.memory = _Memory()
        self.started_s = time.monotonic()
        self.left = len(self.jobs)
        self.read_nbytes = 0  # of tiles begun: the digest follows them through the file
        chunks = range(0, self.source.file.nbytes, CHUNK) if self.staged is not None and self.digest is None else range(0)
        self.chunk_starts: deque[int] = deque(chunks)
        self.chunk_digests: list[bytes | None] = [None] * len(chunks)
        self.chunks_left = len(chunks)
        for job in self.jobs:
            if self.staged is None:
                self.memory.add(job.slots)
            self.tasks[job.info.name] = _Task(self, job, self.staged or self.memory)
        self._dropping = threading.Lock()

    def drop(self) -> None:
        """Let go of the temp file, unless it was published, and of the lock."""
        with self._dropping:
            if self.staged is not None and self.entry is None:
                self.staged.discard()
            release, self.release = self.release, None
            if release:
                with contextlib.suppress(Exception):
                    release()


class Pipeline:
    """Run builds on a pool of daemon threads.

    Args:
        builds: in order.
        threads: how many; 0 means one per core.
        progress: called with Progress now and then, from a worker; a false value other than None cancels.
    """

    def __init__(
        self, builds: list[Build], *, threads: int = 0, progress: Callable[[Progress], Any] | None = None
    ) -> None:
        self.builds = builds
        self._progress, self._told_s = progress, 0.0
        self._changed = threading.Condition()
        self._urgent: deque[_Task] = deque()
        self._cancelled = False
        self._queue = deque(task for build in builds for task in build.tasks.values())
        self._total = sum(task.job.info.nbytes for task in self._queue), len(self._queue)
        self._done_nbytes = self._done_tensors = 0
        self.failure: BaseException | None = None
        self._open = len(builds)
        count = min(threads or default_threads(), MAX_THREADS)
        self._alive = count
        self._threads = [threading.Thread(target=self._work, name=f"quantcache-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    # ---- for callers ----

    def wait_for(self, build: Build, name: str) -> _Task:
        """Return a finished task, doing it next.

        Raises:
            SourceError, Cancelled: why it cannot be finished.
        """
        task = build.tasks[name]
        with self._changed:
            if not task.done:
                self._urgent.append(task)
                self._changed.notify_all()
            while not task.done and task.error is None and self.failure is None and not self._cancelled:
                self._changed.wait(0.2)
            if task.done:
                return task
            raise task.error or self.failure or Cancelled("the load was stopped")

    def finish(self) -> None:
        """Wait until everything is quantized and published.

        Raises:
            SourceError: a source failed.
        """
        with self._changed:
            while self._open and self.failure is None and not self._cancelled:
                self._changed.wait(0.2)
        if self.failure is not None or self._cancelled:
            self.cancel()
            raise self.failure or Cancelled("the load was stopped")

    def cancel(self) -> None:
        """Stop after the tiles under way; unpublished files are removed."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        for build in self.builds:
            build.drop()

    # ---- workers ----

    def _work(self) -> None:
        scratch = Scratch()
        try:
            while (step := self._next()) is not None:
                step(scratch)
        except BaseException as error:  # noqa: BLE001 - it is handed to whoever asks
            with self._changed:
                self.failure = self.failure or error
        with self._changed:
            self._alive -= 1
            stopped = self._alive == 0 and (self.failure is not None or self._cancelled)
            self._changed.notify_all()
        if stopped:  # nobody may ever close the model: another load must not wait for its lock
            for build in self.builds:
                build.drop()

    def _next(self) -> Callable[[Scratch], None] | None:
        """Return the next piece of work: an urgent tile, a piece of a digest that is due, a tile, a publication."""
        with self._changed:
            while True:
                if self._cancelled or self.failure is not None or not self._open:
                    return None
                for queue in (self._urgent, self._queue):
                    if queue is self._queue and (chunk := self._next_chunk(due=True)):
                        return chunk
                    while queue and not queue[0].waiting:
                        queue.popleft()
                    if queue:
                        task = queue[0]
                        start = task.waiting.popleft()
                        task.active += 1
                        task.build.read_nbytes += task.job.tile * task.job.info.nbytes // max(1, task.job.size)
                        return lambda scratch, task=task, start=start: self._tile(task, start, scratch)  # type: ignore[misc]
                if chunk := self._next_chunk(due=False):
                    return chunk
                for build in self.builds:
                    if build.left == 0 and build.chunks_left == 0 and not build.published:
                        build.published = True
                        return lambda _, build=build: self._publish(build)  # type: ignore[misc]
                self._changed.wait(0.5)

    def _next_chunk(self, *, due: bool) -> Callable[[Scratch], None] | None:
        """Return a piece of a digest; if `due`, only one whose bytes tiles have just brought into the page cache."""
        for build in self.builds:
            if build.chunk_starts and (not due or build.read_nbytes >= build.chunk_starts[0] + CHUNK):
                first = build.chunk_starts.popleft()
                return lambda _, build=build, first=first: self._chunk(build, first)  # type: ignore[misc]
        return None

    def _tile(self, task: _Task, start: int, scratch: Scratch) -> None:
        job, build = task.job, task.build
        try:
            if task.refused is None:
                status = encode_tile(build.source, job, start, scratch, task.target)
                if status != Status.OK:
                    task.refused = status
        except CacheError as error:
            task.refused = error
        except SourceError as error:
            task.error = error
            raise
        with self._changed:
            task.active -= 1
            if task.refused is not None:
                task.waiting.clear()
            last = task.active == 0 and not task.waiting and not task.done
        if last:
            self._settle(task)
        self._tell(min(job.tile, max(0, job.size - start)) * job.info.nbytes // max(1, job.size), "quantize")

    def _settle(self, task: _Task) -> None:
        """Finish a task whose tiles are all through, or start it again the way its values or the store demand."""
        job, build = task.job, task.build
        refused = task.refused
        try:
            if refused is None:
                write_whole(job, task.target)
            elif isinstance(refused, Status):
                task.job = job.after(refused)
                if task.job.decision.codec == "keep":
                    _warn(f"{build.source.path.name}: tensor {shorten(job.info.name)} is kept as {job.info.dtype}: "
                          f"{task.job.decision.reason}")  # fmt: skip
                if isinstance(task.target, StagedEntry):
                    task.target.replace([slot.key for slot in job.slots], task.job.slots)
                else:
                    build.memory.add(task.job.slots)
        except CacheError as error:
            refused = error
        if isinstance(refused, CacheError):
            self._unsaved(build, refused)
            build.memory.add(task.job.slots)
            task.job, task.target = replace(task.job), build.memory
        with self._changed:
            if refused is None:
                task.done = True
                build.left -= 1
                self._done_tensors += 1
            else:
                task.refused = None
                task.waiting = deque(task.job.tiles)
                self._urgent.append(task)
            self._changed.notify_all()

    def _unsaved(self, build: Build, error: CacheError) -> None:
        """Go on in memory after the store failed; say so once."""
        with self._changed:
            cache, build.cache = build.cache, None
            build.unsaved = build.unsaved or error
            for task in build.tasks.values():
                # only what nobody has begun: a task with tiles in the file finishes there, or starts again by itself
                untouched = len(task.waiting) == len(task.job.tiles) and task.refused is None
                if untouched and not task.done and task.target is build.staged:
                    task.target = build.memory
                    build.memory.add(task.job.slots)
        if cache is not None:
            cache.complain(f"{build.source.path.name} is loaded but not saved: {error.message}")

    def _chunk(self, build: Build, start: int) -> None:
        found = _chunk_digest(build.source, start)
        with self._changed:
            build.chunk_digests[start // CHUNK] = found
            build.chunks_left -= 1
            self._changed.notify_all()

    def _publish(self, build: Build) -> None:
        try:
            if build.cache is not None and build.staged is not None:
                self._tell(0, "write")
                self._store(build, build.cache, build.staged)
        except CacheError as error:
            self._unsaved(build, error)
        except (OSError, ValueError) as error:
            self._unsaved(build, CacheError(f"cannot publish the entry: {error}"))
        finally:
            build.drop()
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    def _store(self, build: Build, cache: Cache, staged: StagedEntry) -> None:
        source = build.source
        for read in (source, *build.request.adapter_sources()):
            if read.file.changed():
                raise CacheError(f"{read.path} changed while it was read")
        found = build.digest or combine([d for d in build.chunk_digests if d is not None], source.file.nbytes)
        seconds = time.monotonic() - build.started_s
        built = {
            "path": str(source.path.resolve()),
            "created": time.time(),
            "seconds": round(seconds, 3),
            "fingerprint": fingerprint(source.file.memory),
            "recipe": build.request.label,
            "format": source.format,
            "kernel": native.level(),
            "version": quantcache.__version__,
        }
        if build.request.given:
            built |= {"adapters": [list(pair) for pair in build.request.given], "checkpoint": build.request.checkpoint}
        document = build.request.key_document(found, source.file.nbytes, source.reading())
        records = [build.tasks[job.info.name].job.record() for job in build.jobs]
        build.entry = cache.publish(staged, document=document, records=records, built=built)
        cache.record_source(build.stamp, found, source.path.resolve(), build.seen_ns)
        cache.tally(misses=1, bytes_built=build.entry.header.nbytes, seconds_building=seconds)
        cache.flush()

    def _tell(self, nbytes: int, phase: str) -> None:
        with self._changed:
            self._done_nbytes += nbytes
            now = time.monotonic()
            if self._progress is None or (now - self._told_s < 0.1 and self._done_tensors < self._total[1]):
                return
            self._told_s = now
            report = Progress(self._done_nbytes, self._total[0], self._done_tensors, self._total[1], phase)
        wanted = self._progress(report)
        if wanted is not None and not wanted:
            with self._changed:
                self._cancelled = True
                self._changed.notify_all()


def encode_tile(source: Source, job: Job, start: int, scratch: Scratch, target: Target) -> Status:
    """Read, quantize and write one tile.

    Args:
        source: of the tensor.
        job: what becomes of it.
        start: first weight of the tile.
        scratch: the calling thread's buffers.
        target: takes the bytes.

    Returns:
        OK, or why the job's codec refuses the values.

    Raises:
        SourceError: the source cannot be read.
        CacheError: the target refused.
    """
    info = job.info
    stop = min(start + job.tile, job.size)
    if stop <= start:  # an empty tensor
        return Status.OK
    if job.encoder is None:
        target.write(info.name, start * ITEMSIZE[info.dtype], source.piece(info, start, stop))
        return Status.OK
    status, arrays = job.encoder.encode(weights.read(source, job, start, stop, scratch), start, scratch)
    if status == Status.OK:
        for part in job.encoder.parts:
            if part.weights:
                position = start // part.weights * ITEMSIZE[part.dtype]
                target.write(part.key, position, arrays[part.name].view(np.uint8))
    return status


def write_whole(job: Job, target: Target) -> None:
    """Write the parts that are known only after the last tile."""
    if job.encoder is not None:
        for name, array in job.encoder.finish().items():
            target.write(job.parts[name], 0, np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _warn(text: str) -> None:
    warnings.warn(text, QuantcacheWarning, stacklevel=2)
