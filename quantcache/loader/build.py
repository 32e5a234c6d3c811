"""Own the build of one source file: its tasks, the tiles of each that are under way, and how what comes out gets where it belongs.

That is the staged entry, or memory, for what the store does not take. Knows no threads; what they share is guarded by the
pipeline's lock.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, count, repeat
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.cache.blobs import StagedEntry
from quantcache.cache.container import Slot
from quantcache.cache.index import EntryRow
from quantcache.cache.key import Stamp, digest
from quantcache.cache.locks import Lock
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, CodecError, SourceError
from quantcache.loader.digests import DigestBehind
from quantcache.loader.plan import Job, Request
from quantcache.loader.source import Source
from quantcache.loader.tiles import Piece, Strip, encode_all, whole_pieces
from quantcache.quant import native
from quantcache.quant.codec import Arena, Scratch, Status
from quantcache.trace import span

__all__ = ["Batch", "Build", "Memory", "Task", "complete", "refusal", "wholes"]

Array = NDArray[Any]


class Memory:
    """Take the tensors that the store does not."""

    #: tensors have no place beside each other
    offsets: Mapping[str, int] = MappingProxyType({})

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def add(self, slots: Mapping[str, Slot]) -> None:
        """Make room."""
        for key, slot in slots.items():
            self._arrays[key] = np.empty(slot.nbytes, np.uint8)

    def place(self, key: str, position: int) -> tuple[Array, int]:
        """Return what a piece is in, and the address where it belongs, for those who copy it there themselves."""
        array = self._arrays[key]
        return array, native.address(array) + position

    def write(self, key: str, position: int, buffer: Array, _: bytes = b"") -> None:
        """Copy bytes of a tensor."""
        self._arrays[key][position : position + buffer.size] = buffer

    def where(self, key: str) -> tuple[memoryview, int]:
        """Return what a tensor's bytes lie in, read-only, and the first."""
        return self._arrays[key].data.toreadonly(), 0


class Task:
    """Hold a job under way. All fields but `job` are guarded by the pipeline's lock.

    Args:
        build: of which it is a part.
        job: what is to be done.
        target: where it goes.
    """

    __slots__ = ("_build", "active", "awaited", "away", "counted", "done", "job", "refused", "target", "waiting")

    def __init__(self, build: Build, job: Job, target: StagedEntry | Memory) -> None:
        self._build = weakref.ref(build)  # which has the task: what a model holds is to go with it, and not when Python looks for circles
        self.job, self.target = job, target
        self.active = 0  # strips of tiles that threads are at
        self.done = False
        self.awaited = False  # a caller waits for it
        self.rewind()

    @property
    def build(self) -> Build:
        """Of which it is a part; the pipeline has it."""
        found = self._build()
        assert found is not None
        return found

    def rewind(self) -> None:
        """Have all tiles done, from the first on."""
        self.waiting = self.job.tiles  # first weights of those that nobody has taken
        self.counted = 0  # bytes of the source that progress has
        self.away = False  # some of it is only where it was quantized
        self.refused: Status | CacheError | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Hold tiles of one build that a thread quantizes together, and the buffers that what comes out lies in."""

    strips: list[tuple[Task, Strip]]
    outputs: Arena


@dataclass
class Build:
    """Hold the build of one source file.

    Args:
        source, request, jobs: what to do.
        cache, staged: where it goes; None for memory.
        digest: of the source, if it is known already.
        lock: of the build; it may hold nothing.
        stamp, seen_ns: of the source.
    """

    source: Source
    request: Request
    jobs: list[Job]
    cache: Cache | None
    staged: StagedEntry | None
    digest: str | None
    lock: Lock
    stamp: Stamp
    seen_ns: int
    tasks: dict[str, Task] = field(default_factory=dict)
    row: EntryRow | None = None
    published: bool = False
    unsaved: CacheError | None = None

    def __post_init__(self) -> None:
        """Prepare the tasks."""
        self.memory = Memory()
        self.started_s = time.monotonic()
        self.left = len(self.jobs)
        self.behind: DigestBehind | None = None
        if self.staged is not None and self.digest is None and native.level() != "reference":
            extents = [(job.info.offset, job.info.offset + job.info.nbytes) for job in self.jobs]
            self.behind = DigestBehind(self.source.file, extents)
        self.bringing = threading.Lock()
        self.outbox: list[Batch] = []
        self.writing = False
        for job in self.jobs:
            if self.staged is None:
                self.memory.add(job.slots)
            self.tasks[job.info.name] = Task(self, job, self.staged or self.memory)
        self._dropping = threading.Lock()

    def bring(self, task: Task) -> None:
        """Quantize a finished tensor again, here, if some of it is only where it was quantized: it may be gone there, or changed.

        Raises:
            SourceError: the source cannot be read, or is not what it was.
        """
        with self.bringing:
            if not task.away:
                return
            source, job = self.source, task.job.again()
            status = encode_all(source, job, Scratch(), lambda piece: task.target.write(piece.key, piece.position, piece.buffer))
            if status != Status.OK:
                raise CodecError(f"tensor {job.info.name!r} was quantized elsewhere, and cannot be here: {status!r}")
            # what was collected of the tiles then is here: it must be that of these
            same = all(bytes(task.target.where(piece.key)[0]) == bytes(piece.buffer) for piece in whole_pieces(job))
            if source.file.changed() or not same:
                raise SourceError(f"tensor {job.info.name!r} is on the device only, and its file may have changed since", path=source.path)
            task.away = False

    def hide(self) -> None:
        """Remove the temp file while a thread may still be busy with it."""
        if self.staged is not None and self.row is None:
            self.staged.unlink()

    def drop(self) -> None:
        """Let go of the temp file, unless it was published, and of the lock."""
        with self._dropping:
            if self.staged is not None and self.row is None:
                self.staged.discard()
            self.lock.release()


def complete(strips: list[tuple[Task, Strip]]) -> list[Task]:
    """Return the tasks whose last tiles these are; under the lock."""
    strips_of: dict[Task, int] = {}
    for task, _ in strips:
        strips_of[task] = strips_of.get(task, 0) + 1
    return [task for task, own in strips_of.items() if task.active == own and (not task.waiting or task.refused is not None)]


def wholes(tasks: list[Task]) -> list[tuple[Task, Piece]]:
    """Return what of tensors is known after their last tile."""
    return [(task, piece) for task in tasks if task.refused is None for piece in whole_pieces(task.job)]


def refusal(pieces: list[tuple[Task, Piece]]) -> CacheError | None:
    """Bring pieces to where they belong; return why the store refuses them."""
    try:
        _write(pieces)
    except CacheError as error:
        return error
    return None


def _write(pieces: list[tuple[Task, Piece]]) -> None:
    """Bring pieces to where they belong, those for a file in one call, and what stands side by side there in one of the system's.

    Raises:
        CacheError: the store refuses them.
    """
    here = native.level() == "reference"
    copied, wanted = list[tuple[int, int, int]](), list[tuple[int, int, int]]()  # place, address, bytes
    homes, written = list[Array](), list[tuple[StagedEntry, Piece]]()
    descriptor = -1
    for task, piece in pieces:
        target, nbytes = task.target, piece.nbytes
        if here or not nbytes:
            for own in piece.each():
                with span("write", nbytes, task.job.info.name):
                    target.write(own.key, own.position, own.buffer, *own.digests)
            continue
        if isinstance(target, Memory):
            (home, place), rows = target.place(piece.key, piece.position), copied
            homes.append(home)  # it stays until it is filled
        else:  # all into one file: a batch is of one build
            (descriptor, place), rows = target.place(piece.key, piece.position), wanted
            written.append((target, piece))
        if piece.count == 1:
            rows.append((place, piece.address, nbytes))
        else:
            rows.extend(zip(range(place, place + piece.count * nbytes, nbytes), count(piece.address, piece.step), repeat(nbytes), strict=False))
    name = pieces[0][0].job.info.name if pieces else ""
    if copied:
        _bring("copy_pieces", copied, name)
    if not wanted:
        return
    wanted.sort()
    if code := _bring("write", wanted, name, descriptor):
        raise written[0][0].refused(OSError(code, os.strerror(code)))
    for target, piece in written:
        target.wrote(piece.key, piece.position, piece.digests or [digest(own.buffer) for own in piece.each()])


def _bring(function: str, rows: list[tuple[int, int, int]], name: str, *where: int) -> int:
    """Have one of the system's functions bring bytes, as (place, address, how many), to where they belong; return what it does."""
    table = array("Q", chain.from_iterable(rows))
    with span("write", sum(table[2::3]), name):
        return native.system(function)(*where, table.buffer_info()[0], len(rows))
