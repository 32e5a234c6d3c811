"""Own the work of a miss: tiles from sources through codecs into staged entries, on a bounded pool of threads.

One pipeline serves all files of a checkpoint. The tensor that a caller waits for goes first, the rest in layer order;
the source's digest is taken of the same tiles. One thread at a time writes a file, since file systems let no second one in
(docs/decisions/0009-pipeline.md): what the others have quantized meanwhile waits in a bounded number of buffers. What the
store refuses lands in memory, with one warning. Knows no hit and no caller's types.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

import quantcache
from quantcache.cache.blobs import StagedEntry
from quantcache.cache.container import Slot
from quantcache.cache.index import EntryRow
from quantcache.cache.key import Stamp, digest, fingerprint
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, QuantcacheError, QuantcacheWarning, SourceError, shorten
from quantcache.loader.digests import DigestBehind
from quantcache.loader.plan import Job, Request
from quantcache.loader.source import Source
from quantcache.loader.tiles import Piece, Quantizer, encode_tile, encode_tiles, whole_pieces
from quantcache.quant import native
from quantcache.quant.codec import Scratch, Status
from quantcache.trace import Profile, span, working_for

__all__ = ["Build", "Cancelled", "Pipeline", "Progress", "default_threads"]

Array = NDArray[Any]
#: Memory of a worker is about 12 MB, and 4 MB of each tile that waits: at most this many stay within 256 MiB.
MAX_THREADS = 16
#: Bytes that the disk is ahead of the workers, and of one request: docs/decisions/0009-pipeline.md.
_AHEAD = 64 << 20
_AHEAD_STEP = 4 << 20
#: How long a cancelled load waits for its threads: Ctrl-C is to be answered within a second.
_PATIENCE_S = 0.7


class Cancelled(QuantcacheError):  # noqa: N818 - not a failure
    """Say that the caller stopped the load."""

    exit_code = 130


@dataclass(frozen=True)
class Progress:
    """Say how far a build is.

    Args:
        done_nbytes, total_nbytes: of the source.
        done_tensors, total_tensors: of those that are built.
        phase: what is being done: "quantize", then "sync" until everything is durable.
        seconds: since the build began.
        phases: phase -> seconds so far, of all threads together; see quantcache.trace.PHASES.
    """

    done_nbytes: int
    total_nbytes: int
    done_tensors: int
    total_tensors: int
    phase: str
    seconds: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Bytes of the source a second."""
        return self.done_nbytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds that are left at this rate; None before there is one."""
        return max(0, self.total_nbytes - self.done_nbytes) / self.rate if self.rate > 0 else None


class _Memory:
    """Take the tensors that the store does not."""

    #: tensors have no place beside each other
    offsets: Mapping[str, int] = MappingProxyType({})

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def add(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            self._arrays[slot.key] = np.empty(slot.nbytes, np.uint8)

    def write(self, key: str, position: int, buffer: Any, found: bytes) -> None:
        view = np.frombuffer(buffer, np.uint8)
        self._arrays[key][position : position + view.size] = view

    def view(self, key: str) -> memoryview:
        return self._arrays[key].data.toreadonly()


def default_threads() -> int:
    """Return one thread per core that this process may use, at most MAX_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MAX_THREADS))


def _waiting(job: Job) -> list[int]:
    """Return the tiles of a job, the first of them last: where it is taken from."""
    return list(reversed(job.tiles))


class _Task:
    """A job under way. All fields but `job` are guarded by the pipeline's lock."""

    __slots__ = ("active", "build", "counted", "done", "error", "job", "refused", "target", "waiting")

    def __init__(self, build: Build, job: Job, target: StagedEntry | _Memory) -> None:
        self.build, self.job, self.target = build, job, target
        self.waiting = _waiting(job)
        self.active = 0
        self.counted = 0  # bytes of the source that progress has
        self.done = False
        self.refused: Status | CacheError | None = None
        self.error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _Done:
    """Hold a tile that was quantized: pieces and their digests, and the buffers that they lie in."""

    task: _Task
    start: int
    stop: int
    pieces: list[tuple[Piece, bytes]]
    outputs: Scratch


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
    row: EntryRow | None = None
    published: bool = False
    unsaved: CacheError | None = None

    def __post_init__(self) -> None:
        """Prepare the tasks."""
        self.memory = _Memory()
        self.started_s = time.monotonic()
        self.left = len(self.jobs)
        self.behind: DigestBehind | None = None
        if self.staged is not None and self.digest is None:
            extents = [(job.info.offset, job.info.offset + job.info.nbytes) for job in self.jobs]
            self.behind = DigestBehind(self.source.file, extents)
        self.outbox: deque[_Done] = deque()
        self.writing = False
        for job in self.jobs:
            if self.staged is None:
                self.memory.add(job.slots)
            self.tasks[job.info.name] = _Task(self, job, self.staged or self.memory)
        self._dropping = threading.Lock()

    def hide(self) -> None:
        """Remove the temp file while a thread may still be busy with it."""
        if self.staged is not None and self.row is None:
            self.staged.unlink()

    def drop(self) -> None:
        """Let go of the temp file, unless it was published, and of the lock."""
        with self._dropping:
            if self.staged is not None and self.row is None:
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
        profile: adds up where the time goes.
        quantizer: quantizes what it takes, instead of the CPU.
    """

    def __init__(
        self,
        builds: list[Build],
        *,
        threads: int = 0,
        progress: Callable[[Progress], Any] | None = None,
        profile: Profile | None = None,
        quantizer: Quantizer | None = None,
    ) -> None:
        self.builds, self.profile, self._quantizer = builds, profile or Profile(), quantizer
        self._progress, self._told_s = progress, 0.0
        self._started_s = time.monotonic()
        # re-entrant: a collection may cancel a forgotten model under it, and Ctrl-C finds it as it was, which a plain one is not
        self._lock = threading.RLock()
        #: what workers wait for, and what callers do: a tile that is done wakes no caller
        self._todo, self._done = threading.Condition(self._lock), threading.Condition(self._lock)
        self._urgent: deque[_Task] = deque()
        self._cancelled = False
        self._queue = deque(task for build in builds for task in build.tasks.values())
        self._total = sum(task.job.info.nbytes for task in self._queue), len(self._queue)
        self._done_nbytes = self._done_tensors = 0
        self.failure: BaseException | None = None
        self._open = len(builds)
        count = min(threads or default_threads(), MAX_THREADS)
        if quantizer is not None and not threads:
            elsewhere = sum(task.job.info.nbytes for task in self._queue if quantizer.tiles(task.job))
            count = min(count, quantizer.threads) if 2 * elsewhere > self._total[0] else count
        self._spare = [Scratch() for _ in range(count + min(count, 4))]
        self._alive, self._wanted = 0, count
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()
        try:
            self._start_one()
        except RuntimeError as error:
            for build in builds:
                build.drop()
            raise QuantcacheError(f"no thread can be started: {error}") from error
        if any(build.source.file.is_cold for build in builds):
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._read_ahead, name="quantcache-ahead", daemon=True).start()

    # ---- for callers ----

    def wait_for(self, build: Build, name: str) -> _Task:
        """Return a finished task, doing it next.

        Raises:
            SourceError, Cancelled: why it cannot be finished.
        """
        task = build.tasks[name]
        self._at_home()
        with self._lock:
            if not task.done:
                self._urgent.append(task)
                self._todo.notify()
            while not task.done and task.error is None and self.failure is None and not self._cancelled:
                self._done.wait(0.2)
            if task.done:
                return task
            raise task.error or self.failure or Cancelled("the load was stopped")

    def finish(self) -> None:
        """Wait until everything is quantized and published.

        Raises:
            SourceError: a source failed.
        """
        self._at_home()
        with self._lock:
            while self._open and self.failure is None and not self._cancelled:
                self._done.wait(0.2)
        if self.failure is not None or self._cancelled:
            self.cancel()
            raise self.failure or Cancelled("the load was stopped")

    def _at_home(self) -> None:
        """Raise in a child of fork: it has none of the threads, and the files are its parent's."""
        if self._process != os.getpid():
            raise QuantcacheError("this model was still being built when the process forked: load it in the child")

    def cancel(self) -> None:
        """Stop after the tiles under way; unpublished files are removed. Waits for no disk: a sync may take long."""
        if self._process != os.getpid():
            return
        with self._lock:
            self._cancelled = True
            self._wake()
        end = time.monotonic() + _PATIENCE_S
        # one that is only being started will find that there is nothing to do
        threads = [thread for thread in self._threads if thread is not threading.current_thread() and thread.is_alive()]
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        running = any(thread.is_alive() for thread in threads)
        for build in self.builds:
            if running:  # the last thread to end closes the file
                build.hide()
            else:
                build.drop()

    # ---- workers ----

    def _read_ahead(self) -> None:
        """Keep a cold disk busy while the workers compute: have the system read a little more than they are at."""
        asked = 0
        for build in self.builds:
            for job in build.jobs:
                begin, end = job.info.offset, job.info.offset + job.info.nbytes
                for start in range(begin, end, _AHEAD_STEP):
                    while asked - self._done_nbytes > _AHEAD:
                        if self._stopped or not self._open:
                            return
                        time.sleep(0.001)
                    nbytes = min(_AHEAD_STEP, end - start)
                    build.source.file.will_need(start, nbytes)
                    asked += nbytes

    def _start_one(self) -> None:
        """Start a thread if more are wanted. The first starts the second, and so on: the caller would find no core at every start."""
        with self._lock:
            if not self._wanted or self._stopped:
                return
            self._wanted -= 1
            self._alive += 1
            thread = threading.Thread(target=self._work, name=f"quantcache-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._wanted, self._alive = 0, self._alive - 1
                self._threads.remove(thread)
            raise

    def _work(self) -> None:
        work = Scratch()
        try:
            with contextlib.suppress(RuntimeError):  # no more threads here: those that there are do the work
                self._start_one()
            with working_for(self.profile):
                while (step := self._next()) is not None:
                    step(work)
        except BaseException as error:  # noqa: BLE001 - it is handed to whoever asks
            with self._lock:
                self.failure = self.failure or error
        with self._lock:
            self._alive -= 1
            stopped = self._alive == 0 and (self.failure is not None or self._cancelled)
            self._wake()
        if stopped:  # nobody may ever close the model: another load must not wait for its lock
            for build in self.builds:
                build.drop()

    def _wake(self) -> None:
        """Have everybody look again; under the lock."""
        self._todo.notify_all()
        self._done.notify_all()

    @property
    def _stopped(self) -> bool:
        return self._cancelled or self.failure is not None

    def _next(self) -> Callable[[Scratch], None] | None:
        """Return the next piece of work: an urgent tile, a tile, the rest of a digest, a publication."""
        with self._lock:
            while True:
                if self._stopped or not self._open:
                    return None
                waiting = False
                for queue in (self._urgent, self._queue):
                    while queue and not queue[0].waiting:
                        queue.popleft()
                    if queue and self._spare:
                        task = queue[0]
                        start, stop = self._take(task)
                        outputs = self._spare.pop()
                        task.active += 1
                        return lambda work, task=task, start=start, stop=stop, outputs=outputs: self._tile(task, start, stop, work, outputs)  # type: ignore[misc]
                    waiting = waiting or bool(queue)
                for build in self.builds if not waiting else ():
                    if build.behind is not None and build.behind.idle:
                        return lambda _, behind=build.behind: behind.finish_one()  # type: ignore[misc]
                for build in self.builds:
                    if build.left == 0 and not (build.behind and build.behind.open) and not build.published:
                        build.published = True
                        return lambda _, build=build: self._publish(build)  # type: ignore[misc]
                self._todo.wait(0.5)

    def _take(self, task: _Task) -> tuple[int, int]:
        """Return the first weight of the next tile of a job, or of the next few, and the one behind them."""
        job = task.job
        start = task.waiting.pop()
        stop = min(start + job.tile, job.size)
        for _ in range(1, self._quantizer.tiles(job) if self._quantizer else 1):
            if not task.waiting:
                break
            stop = min(task.waiting.pop() + job.tile, job.size)
        return start, stop

    def _tile(self, task: _Task, start: int, stop: int, work: Scratch, outputs: Scratch) -> None:
        """Quantize a tile, and bring it to where it belongs or leave that to the thread that writes the file."""
        job, build = task.job, task.build
        pieces: list[Piece] = []
        try:
            if task.refused is None:
                if self._quantizer is not None and (stop - start > job.tile or self._quantizer.tiles(job)):
                    status, pieces = encode_tiles(build.source, job, start, stop, work, outputs, build.behind, self._quantizer)
                else:
                    status, pieces = encode_tile(build.source, job, start, work, outputs, build.behind)
                if status != Status.OK:
                    task.refused = status
        except SourceError as error:
            task.error = error
            raise
        done = _Done(task, start, stop, _digested(pieces, task), outputs)
        if not pieces or task.target is not build.staged:
            self._deliver(done)
            return
        with self._lock:
            build.outbox.append(done)
            if build.writing:
                return
            build.writing = True
        while True:
            with self._lock:
                if self._stopped or not build.outbox:
                    build.writing = False
                    return
                done = build.outbox.popleft()
            self._deliver(done)

    def _deliver(self, done: _Done) -> None:
        """Write a tile, and finish its tensor if it was the last."""
        task, job = done.task, done.task.job
        try:
            _write(done.pieces, task)
        except CacheError as error:
            task.refused = error
        with self._lock:
            self._spare.append(done.outputs)
            nbytes = (done.stop - done.start) * job.info.nbytes // max(1, job.size)
            task.counted += nbytes
            self._done_nbytes += nbytes
            task.active -= 1
            if task.refused is not None:
                task.waiting.clear()
            last = task.active == 0 and not task.waiting and not task.done
            self._todo.notify()
        if last:
            self._settle(task)
        self._tell("quantize")

    def _settle(self, task: _Task) -> None:
        """Finish a task whose tiles are all through, or start it again the way its values or the store demand."""
        job, build = task.job, task.build
        refused = task.refused
        try:
            if refused is None:
                _write(_digested(whole_pieces(job), task), task)
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
        with self._lock:
            if refused is None:
                task.done = True
                build.left -= 1
                self._done_tensors += 1
            else:
                task.refused = None
                self._done_nbytes -= task.counted
                task.counted = 0
                task.waiting = _waiting(task.job)
                self._urgent.append(task)
            self._wake()

    def _unsaved(self, build: Build, error: CacheError) -> None:
        """Go on in memory after the store failed; say so once."""
        with self._lock:
            cache, build.cache = build.cache, None
            build.unsaved = build.unsaved or error
            for task in build.tasks.values():
                # only what nobody has begun: a task with tiles in the file finishes there, or starts again by itself
                untouched = len(task.waiting) == len(task.job.tiles) and task.refused is None
                if untouched and not task.done and task.target is build.staged:
                    task.target = build.memory
                    build.memory.add(task.job.slots)
        if cache is not None and not self._cancelled:
            cache.complain(f"{build.source.path.name} is loaded but not saved: {error.message}")

    def _publish(self, build: Build) -> None:
        try:
            if build.cache is not None and build.staged is not None:
                self._tell("sync")
                self._store(build, build.cache, build.staged)
        except CacheError as error:
            self._unsaved(build, error)
        except (OSError, ValueError) as error:
            self._unsaved(build, CacheError(f"cannot publish the entry: {error}"))
        finally:
            build.drop()
            with self._lock:
                self._open -= 1
                self._wake()

    def _store(self, build: Build, cache: Cache, staged: StagedEntry) -> None:
        source = build.source
        for read in (source, *build.request.adapter_sources()):
            if read.file.changed():
                raise CacheError(f"{read.path} changed while it was read")
        found = build.digest or (build.behind.result() if build.behind else "")
        seconds = time.monotonic() - build.started_s
        built = {
            "path": str(source.path.resolve()),
            "created": time.time(),
            "seconds": round(seconds, 3),
            "phases": {phase: round(taken, 4) for phase, taken in self.profile.seconds.items()},
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
        build.row = cache.publish(staged, document=document, records=records, built=built)
        cache.record_source(build.stamp, found, source.path.resolve(), build.seen_ns)
        cache.tally(misses=1, bytes_built=build.row.nbytes, seconds_building=seconds)
        cache.flush()

    def _tell(self, phase: str) -> None:
        with self._lock:
            now = time.monotonic()
            if self._progress is None or (now - self._told_s < 0.1 and self._done_tensors < self._total[1]):
                return
            self._told_s = now
            counts = self._done_nbytes, self._total[0], self._done_tensors, self._total[1]
        report = Progress(*counts, phase, now - self._started_s, self.profile.seconds)
        wanted = self._progress(report)
        if wanted is not None and not wanted:
            with self._lock:
                self._cancelled = True
                self._wake()


def _digested(pieces: list[Piece], task: _Task) -> list[tuple[Piece, bytes]]:
    """Return pieces with their digests, taken while they are hot; those that do not go to the store have none."""
    if not pieces or not isinstance(task.target, StagedEntry):
        return [(piece, b"") for piece in pieces]
    with span("digest", sum(piece.buffer.nbytes for piece in pieces), task.job.info.name):
        return [(piece, digest(piece.buffer)) for piece in pieces]


def _write(pieces: list[tuple[Piece, bytes]], task: _Task) -> None:
    """Bring pieces to where they belong."""
    if pieces:
        with span("write", sum(piece.buffer.nbytes for piece, _ in pieces), task.job.info.name):
            for piece, found in pieces:
                task.target.write(piece.key, piece.position, piece.buffer, found)


def _warn(text: str) -> None:
    warnings.warn(text, QuantcacheWarning, stacklevel=2)
