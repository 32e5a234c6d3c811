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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import quantcache
from quantcache.cache.blobs import StagedEntry
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, QuantcacheError, QuantcacheWarning, shorten
from quantcache.loader.build import Batch, Build, Task, complete, refusal, wholes
from quantcache.loader.digests import DigestBehind, Sums, source_digest
from quantcache.loader.mapping import fresh
from quantcache.loader.plan import Job
from quantcache.loader.tiles import Quantizer, Strip, encode, encode_elsewhere
from quantcache.quant import native
from quantcache.quant.codec import Arena, Scratch, Status
from quantcache.trace import Profile, working_for

__all__ = ["Cancelled", "Pipeline", "Progress", "default_threads"]

#: Memory of a worker is about 8 MB where it merges, and there are what all have made and added up (_ALL_MADE, 48 MB of Sums): at most this many
#: stay within 256 MiB.
MAX_THREADS = 16
#: Bytes that the disk is ahead of the workers, and of one request: docs/decisions/0009-pipeline.md.
_AHEAD = 64 << 20
_AHEAD_STEP = 4 << 20
#: What a thread takes at a time at most, in bytes of the source and in tiles: what Python does between calls it does once for all
#: of them. And the bytes that may come out of what all threads take, and are in memory until they are written.
_TOGETHER, _TILES_TOGETHER, _ALL_MADE = 32 << 20, 64, 64 << 20
#: Bytes of small tensors that a thread quantizes beside what it has quantized elsewhere.
_ASIDE = 1 << 20
#: How long a cancelled load waits for its threads: Ctrl-C is to be answered within a second.
_PATIENCE_S = 0.7
#: For how long a thread leaves its core to a caller whose tensor it has just finished, and how often at most.
_HAND_OVER_S, _HAND_OVER_EVERY_S = 0.0001, 0.01


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


def default_threads() -> int:
    """Return one thread per core that this process may use, at most MAX_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MAX_THREADS))


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
        self._progress, self._told_s, self._handed_s = progress, 0.0, 0.0
        self._started_s = time.monotonic()
        # re-entrant: a collection may cancel a forgotten model under it, and Ctrl-C finds it as it was, which a plain one is not
        self._lock = threading.RLock()
        #: what workers wait for, and what callers do: a tile that is done wakes no caller
        self._todo, self._done = threading.Condition(self._lock), threading.Condition(self._lock)
        self._urgent: deque[Task] = deque()
        self._cancelled = False
        self._queue = deque(task for build in builds for task in build.tasks.values())
        self._total = sum(task.job.info.nbytes for task in self._queue), len(self._queue)
        self._done_nbytes = self._done_tensors = self._taken_nbytes = 0
        self.failure: BaseException | None = None
        self._open = len(builds)
        count = min(threads or default_threads(), MAX_THREADS)
        elsewhere = quantizer.expect([task.job for task in self._queue]) if quantizer is not None else 0
        if quantizer is not None and not threads and 2 * elsewhere > self._total[0]:
            count = min(count, quantizer.threads)
        spare = count + (0 if elsewhere else min(count, 4))  # steps elsewhere are large
        self._made = _ALL_MADE // spare
        self._sums = Sums()
        for build in builds:
            if build.behind is not None:
                build.behind.room = self._sums
        self._spare = [Arena(min(self._made, self._total[0]), fresh) for _ in range(spare)]
        self._alive, self._wanted, self._count = 0, count, count
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

    def wait_for(self, build: Build, name: str) -> Task:
        """Return a finished task, doing it next.

        Raises:
            SourceError, Cancelled: why it cannot be finished.
        """
        task = build.tasks[name]
        self._at_home()
        with self._lock:
            if not task.done:
                self._urgent.append(task)
                task.awaited = True
                self._todo.notify()
            while not task.done and self.failure is None and not self._cancelled:
                self._done.wait(0.2)
            if task.done:
                return task
            raise self.failure or Cancelled("the load was stopped")

    def wait_for_all(self) -> None:
        """Wait until everything is quantized.

        Raises:
            SourceError, Cancelled: why it cannot be.
        """
        self._at_home()
        with self._lock:
            while any(build.left for build in self.builds):
                if self._stopped:
                    raise self.failure or Cancelled("the load was stopped")
                self._done.wait(0.2)

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
        self._stop(None)
        end = time.monotonic() + _PATIENCE_S
        # one that is only being started will find that there is nothing to do
        threads = [thread for thread in self._threads if thread is not threading.current_thread() and thread.is_alive()]
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        running = any(thread.is_alive() for thread in threads) or threading.current_thread() in self._threads
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
                    while asked - self._taken_nbytes > _AHEAD:
                        if self._stopped or not self._open:
                            return
                        time.sleep(0.001)
                    nbytes = min(_AHEAD_STEP, end - start)
                    build.source.file.will_need(start, nbytes)
                    asked += nbytes

    def _start_one(self) -> None:
        """Start a thread if more are wanted, and there is still something to do.

        The first starts the second, and so on: the caller would find no core at every start.
        """
        with self._lock:
            if not self._wanted or self._stopped or not self._open:
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
            self._stop(error)
        with self._lock:
            self._alive -= 1
            stopped = self._alive == 0 and (self.failure is not None or self._cancelled)
            self._wake()
        if stopped:  # nobody may ever close the model: another load must not wait for its lock
            for build in self.builds:
                build.drop()
            self._let_go()

    def _stop(self, failure: BaseException | None) -> None:
        """Have all threads end, for a reason or because somebody wants it."""
        with self._lock:
            self.failure, self._cancelled = self.failure or failure, self._cancelled or failure is None
            self._wake()

    def _wake(self) -> None:
        """Have everybody look again; under the lock."""
        self._todo.notify_all()
        self._done.notify_all()

    @property
    def _stopped(self) -> bool:
        return self._cancelled or self.failure is not None

    def _next(self) -> Callable[[Scratch], None] | None:
        """Return the next piece of work: urgent tiles, the digest of what is read, tiles, the rest of a digest, a publication."""
        with self._lock:
            while True:
                if self._stopped or not self._open:
                    return None
                behinds = [build.behind for build in self.builds if build.behind is not None and not build.published]
                waiting = False
                for queue in (self._urgent, self._queue):
                    if _head(queue) is not None:
                        if self._spare:
                            batch = self._take(queue)
                            return lambda work, batch=batch: self._quantize(batch, work)  # type: ignore[misc]
                        waiting = True
                    for behind in behinds:
                        chunk = behind.take(ripe=queue is self._urgent or waiting)
                        if chunk is not None:
                            return lambda _, behind=behind, chunk=chunk: self._finish_chunk(behind, chunk)  # type: ignore[misc]
                for build in self.builds:
                    if build.left == 0 and not (build.behind and build.behind.open) and not build.published:
                        build.published = True
                        return lambda _, build=build: self._publish(build)  # type: ignore[misc]
                self._todo.wait(0.5)

    def _finish_chunk(self, behind: DigestBehind, chunk: Any) -> None:
        behind.finish(chunk)
        with self._lock:  # there is room for the sums of another
            self._todo.notify()

    def _take(self, queue: deque[Task]) -> Batch:
        """Return the next tiles, with buffers for what comes out.

        Small ones together, but alone at first and what is waited for, and few at the end. Of those that are quantized elsewhere, as many as go there at a time, with small ones that stand between.
        """
        build, taken = queue[0].build, list[tuple[Task, Strip]]()
        extents: list[tuple[int, int]] = []  # of the source, as they are taken
        tiles = nbytes = made = room = spent = aside = 0
        if queue is self._urgent:  # what is left of the tensor is shared out
            job = queue[0].job
            most = min(_TOGETHER, len(queue[0].waiting) * job.tile * job.info.nbytes // max(1, job.size) // (3 * self._count))
        else:
            most = min(_TOGETHER, self._done_nbytes // 2, (self._total[0] - self._done_nbytes) // (2 * self._count))
        while (task := _head(queue)) is not None and task.build is build:
            job, cost = task.job, self._cost(task.job)
            if not taken:
                room = self._quantizer.room if self._quantizer is not None and cost else 0
            elif (room and not cost and aside + job.info.nbytes > _ASIDE) or (cost and not room):
                break
            aside += 0 if cost else job.info.nbytes
            size = min(job.tile, job.size - task.waiting[0])  # of the next tile, and of those behind it but the tensor's last
            tile_nbytes, tile_made = (size * whole // max(1, job.size) for whole in (job.info.nbytes, job.kind.made_nbytes))
            left = min(_TILES_TOGETHER - tiles, _times(room - spent, cost)) if room else min(
                _TILES_TOGETHER - tiles, _times(most - nbytes, tile_nbytes), _times(self._made - made, tile_made)
            )  # fmt: skip
            count = min(len(task.waiting), left if taken else max(1, left))
            if count <= 0:
                break
            start, stop = task.waiting[0], min(task.waiting[count - 1] + job.tile, job.size)
            first, last = build.source.extent(job.info, start, stop)
            tiles += count
            nbytes += last - first
            made += job.kind.made_nbytes * (stop - start) // max(1, job.size)
            spent += count * cost
            task.waiting = task.waiting[count:]
            task.active += 1
            self._taken_nbytes += last - first
            extents.append((first, last))
            taken.append((task, Strip(job, start, stop)))
        if build.behind is not None:
            for (_, strip), claim in zip(taken, build.behind.claims(extents), strict=True):
                strip.claim = claim
        return Batch(taken, self._spare.pop())

    def _cost(self, job: Job) -> int:
        """Return what a tile of a job takes of the quantizer's room; 0 if the CPU is to do it."""
        return self._quantizer.cost(job) if self._quantizer is not None else 0

    def _quantize(self, batch: Batch, work: Scratch) -> None:
        """Quantize tiles, and bring them to where they belong or leave that to the thread that writes the file."""
        batch.outputs.clear()
        build, strips = batch.strips[0][0].build, [strip for _, strip in batch.strips]
        digested = any(task.target is build.staged for task, _ in batch.strips)
        if self._quantizer is not None and any(self._cost(strip.job) for strip in strips):
            encode_elsewhere(build.source, strips, work, batch.outputs, self._quantizer, digested=digested)
        else:
            encode(build.source, strips, work, batch.outputs, digested=digested)
        if build.behind is not None:
            build.behind.give_back(strip.claim for strip in strips if strip.claim is not None)
            with self._lock:  # somebody may have nothing else to do than to finish what was read
                self._todo.notify()
        for task, strip in batch.strips:
            if strip.away:
                task.away = True
            if strip.status != Status.OK:
                task.refused = task.refused or strip.status
        if not any(strip.pieces and task.target is build.staged for task, strip in batch.strips):
            self._deliver([batch])
            return
        with self._lock:
            build.outbox.append(batch)
            if build.writing:
                return
            build.writing = True
        while True:
            with self._lock:
                if self._stopped or not build.outbox:
                    build.writing = False
                    return
                ready, build.outbox = build.outbox, []
            self._deliver(ready)

    def _deliver(self, ready: list[Batch]) -> None:
        """Write tiles, and finish the tensors of which they are the last."""
        strips = [found for batch in ready for found in batch.strips]
        with self._lock:
            whole = complete(strips)  # what is known of a tensor only now is written with its last tile
        refused = refusal([(task, piece) for task, strip in strips for piece in strip.pieces] + wholes(whole))
        with self._lock:
            self._spare += [batch.outputs for batch in ready]
            for task, strip in strips:
                task.refused = task.refused or refused
                nbytes = (strip.stop - strip.start) * strip.job.info.nbytes // max(1, strip.job.size)
                task.counted += nbytes
                self._done_nbytes += nbytes
            ended = complete(strips)
            for task, _ in strips:
                task.active -= 1
                if task.refused is not None:
                    task.waiting = range(0)
            # two threads that brought the last tiles to memory side by side: neither knew that it was the last
            late = [task for task in ended if task not in whole]
            self._todo.notify(len(ready))
        for task in late:
            task.refused = task.refused or refusal(wholes([task]))
        done = [task for task in ended if task.refused is None]
        if done:
            with self._lock:
                for task in done:
                    task.done = True
                    task.build.left -= 1
                self._done_tensors += len(done)
                if any(task.build.left == 0 for task in done):
                    self._wake()
                awaited, now = any(task.awaited for task in done), time.monotonic()
                if awaited:
                    self._done.notify_all()
                awaited = awaited and now - self._handed_s > _HAND_OVER_EVERY_S
                if awaited:
                    self._handed_s = now
            if awaited:  # all cores are busy: whoever waited would get one when the system next takes it from a thread
                time.sleep(_HAND_OVER_S)
        for task in ended:
            if task.refused is not None:
                self._start_again(task, task.refused)
        self._tell("quantize")

    def _start_again(self, task: Task, refused: Status | CacheError) -> None:
        """Start a task again the way its values or the store demand."""
        job, build = task.job, task.build
        try:
            if isinstance(refused, Status):
                task.job = job.after(refused)
                if task.job.decision.codec == "keep":
                    _warn(f"{build.source.path.name}: tensor {shorten(job.info.name)} is kept as {job.info.dtype}: "
                          f"{task.job.decision.reason}")  # fmt: skip
                if isinstance(task.target, StagedEntry):
                    task.target.replace(job.keys, task.job.slots)
                else:
                    build.memory.add(task.job.slots)
        except CacheError as error:
            refused = error
        if isinstance(refused, CacheError):
            self._unsaved(build, refused)
            build.memory.add(task.job.slots)
            task.job, task.target = task.job.again(), build.memory
        job.kept = None  # nobody asks for it any more
        with self._lock:
            self._done_nbytes -= task.counted
            task.rewind()
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
                if not self._open:
                    self._let_go()
                self._wake()

    def _let_go(self) -> None:
        """Give memory back, of which no thread needs any more: whoever has the model may keep it for long."""
        self._spare.clear()
        self._sums.clear()
        for build in self.builds:
            build.behind = None
            build.outbox.clear()

    def _store(self, build: Build, cache: Cache, staged: StagedEntry) -> None:
        source = build.source
        for read in (source, *build.request.adapter_sources()):
            if read.file.changed():
                raise CacheError(f"{read.path} changed while it was read")
        found = build.digest or (build.behind.result() if build.behind else source_digest(source, 1))
        seconds = time.monotonic() - build.started_s
        built = {
            "path": str(source.path.resolve()),
            "created": time.time(),
            "seconds": round(seconds, 3),
            "phases": {phase: round(taken, 4) for phase, taken in self.profile.seconds.items()},
            "fingerprint": source.fingerprint,
            "recipe": build.request.label,
            "format": source.format,
            "kernel": native.level(),
            "version": quantcache.__version__,
        }
        if build.request.given:
            built |= {"adapters": [list(pair) for pair in build.request.given], "checkpoint": build.request.checkpoint}
        document = build.request.key_document(found, source.file.nbytes, source.reading())
        records = [build.tasks[job.info.name].job.record() for job in build.jobs]
        cache.record_source(build.stamp, found, source.path.resolve(), build.seen_ns)  # who waits needs it to know what is announced
        build.row = cache.publish(staged, document=document, records=records, built=built, announce=build.lock.announce)
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
            self._stop(None)


def _times(room: int, each: int) -> int:
    """Return how many tiles there is room for."""
    return room // each if each else _TILES_TOGETHER


def _head(queue: deque[Task]) -> Task | None:
    """Return the first task of which tiles are left, and forget those before it."""
    while queue and not queue[0].waiting:
        queue.popleft()
    return queue[0] if queue else None


def _warn(text: str) -> None:
    warnings.warn(text, QuantcacheWarning, stacklevel=2)
