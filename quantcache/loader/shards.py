"""Own one file of a checkpoint while it is loaded: served from a stored entry, built anew, or passed through as it is.

A stored tensor whose digest is wrong turns its shard from the first into the second, before anybody saw a byte of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.cache.blobs import StagedEntry, StoredEntry
from quantcache.cache.container import Slot
from quantcache.cache.keeping import Early
from quantcache.cache.key import Stamp, canonical, digest
from quantcache.cache.locks import Lock
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, SourceError, StoreReadOnlyError
from quantcache.loader.ahead import Check, Pool, Stored, read_ahead
from quantcache.loader.build import Build, Memory, Task
from quantcache.loader.digests import known_digest, source_digest
from quantcache.loader.pipeline import Pipeline, Progress, default_threads
from quantcache.loader.plan import Job, Request, native_names, plan, records_nbytes, slots_of
from quantcache.loader.source import Source, is_plain
from quantcache.loader.tiles import Quantizer
from quantcache.once import once
from quantcache.tensor import TensorInfo, array_dtype
from quantcache.trace import Profile

__all__ = ["DamagedError", "Options", "Shard"]

Array = NDArray[Any]

#: Bytes that a cold disk may read while the plan is made.
_BEFORE_PLAN = 32 << 20


@dataclass(frozen=True)
class Options:
    """Hold what `load` was asked for, and what serves all files of one load.

    Args:
        request, mode, verify, threads, progress: see there.
        profile: adds up where the time goes.
        pool: reads ahead.
        quantizer: quantizes what it takes, instead of the CPU.
    """

    request: Request
    mode: str
    verify: str
    threads: int
    progress: Callable[[Progress], Any] | None
    profile: Profile
    pool: Pool
    quantizer: Quantizer | None = None


class Shard:
    """Serve one file. `stored` or `build` is set, or neither if all its tensors pass through.

    Args:
        source: the file.
        options: of the load.
    """

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options, self.request = source, options, options.request
        #: what `serve` found of the source's digest, if it looked for an entry; that need not be done again
        self._looked = ""
        #: the key of an entry that is damaged, and could not be moved out of the way
        self._unfit = ""
        self.stored: Stored | None = None
        self.records: dict[str, dict[str, Any]] = {}
        self.build: Build | None = None
        #: of an entry that serves it, and is not durable yet
        self.early: Early | None = None
        self.pipeline: Pipeline | None = None
        self.lock = threading.RLock()
        self._asked: set[str] = set()  # native tensors that were read ahead

    @once
    def native(self) -> dict[str, TensorInfo]:
        """The tensors that pass through as they are."""
        return {info.name: info for info in native_names(self.source.tensors.values(), self.request)}

    @property
    def entry(self) -> StoredEntry | None:
        """The entry that serves it."""
        return self.stored.entry if self.stored else None

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        stored = list(self.records) if self.stored else [job.info.name for job in self.build.jobs] if self.build else []
        return [*stored, *self.native]

    def stored_nbytes(self, name: str) -> int:
        """Return how much there is to read of a tensor; 0 if it is being built."""
        if name in self.native:
            return self.native[name].nbytes
        stored, records = self.stored, self.records  # another thread may just find it damaged
        if stored is None:
            return 0
        return sum(stored.entry.header.slots[key].nbytes for key in records[name]["parts"].values())

    def read_ahead(self, names: Iterable[str]) -> None:
        """Begin to bring tensors into memory, and to check them; a build is at it anyway."""
        keys, infos = [], []
        stored, records = self.stored, self.records
        for name in names:
            if name in self.native and name not in self._asked:
                self._asked.add(name)
                infos.append(self.native[name])
            elif stored is not None and name in records:
                keys += records[name]["parts"].values()
        if keys and stored is not None:
            stored.read_ahead(keys)
        if infos:
            read_ahead(self.source.file, [(info.offset, info.nbytes) for info in infos], self.options.pool)

    def arrays(self, name: str) -> tuple[dict[str, Any], dict[str, Array]] | None:
        """Return a stored tensor's record and its arrays, checked as the load was asked to; None if it must be built.

        Raises:
            DamagedError: it is not what was stored.
        """
        if self.stored is None:
            return None
        record, stored = self.records[name], self.stored
        keys = list(record["parts"].values())
        if not stored.intact(keys):
            raise DamagedError(f"tensor {stored.wrong or name!r} is not what was stored")
        return record, {key: stored.array(key) for key in keys}

    def unchecked(self, name: str) -> tuple[dict[str, Any], dict[str, Array], dict[str, Check]] | None:
        """Return the same without a check, and by part the checks that are left to do; None if there is nothing to gain by it."""
        if self.stored is None or name not in self.records:
            return None
        record, stored = self.records[name], self.stored
        if record.get("transposed"):  # what is handed out is not what is digested
            return None
        checks = {part: check for part, key in record["parts"].items() if (check := stored.unchecked(key)) is not None}
        wanting = [key for part, key in record["parts"].items() if part not in checks]
        if not checks or not stored.intact(wanting):
            return None
        return record, {key: stored.array(key) for key in record["parts"].values()}, checks

    def readable(self, name: str) -> bool:
        """Bring a stored tensor into memory, if nothing else did so; return whether that could be done."""
        assert self.stored is not None
        return self.options.verify != "off" or self.stored.fault_in(self.records[name]["parts"].values())

    def task(self, name: str) -> Task | None:
        """Return what builds a tensor; None if nothing does."""
        build = self.build if self.stored is None else None
        return build.tasks.get(name) if build is not None else None

    def built(self, name: str, *, bring: bool = True, wait: bool = True) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the same of the build that is under way, as soon as it is quantized.

        Args:
            name: of the tensor.
            bring: whether the bytes are wanted, and not only what they are the bytes of: those that are on a device hold anything then.
            wait: until it is quantized; else it is as planned, and all bytes hold anything yet.

        Raises:
            SourceError, Cancelled: it cannot be.
        """
        assert self.build is not None and self.pipeline is not None
        task = self.pipeline.wait_for(self.build, name) if wait else self.build.tasks[name]
        if bring and task.away:
            self.build.bring(task)
        job, target = task.job, task.target
        return job.record(), {key: _array(key, slot, target) for key, slot in job.slots.items()}

    def described(
        self, name: str, *, wait: bool = True
    ) -> tuple[dict[str, Any], Mapping[str, Slot], Mapping[str, int], tuple[Job, StagedEntry | Memory] | None]:
        """Return a tensor's record, its slots by key, where they stand, and if it is built now its job and where it goes.

        Args:
            name: of the tensor.
            wait: until it is quantized; else it is as planned.

        Raises:
            SourceError, Cancelled: it cannot be.
        """
        with self.lock:  # a damaged entry is just being replaced, perhaps
            stored, records, build, pipeline = self.stored, self.records, self.build, self.pipeline
        if stored is not None:
            return records[name], stored.entry.header.slots, stored.entry.header.offsets, None
        assert build is not None
        assert pipeline is not None
        task = pipeline.wait_for(build, name) if wait else build.tasks[name]
        job, target = task.job, task.target
        return job.record(), job.slots, target.offsets, (job, target)

    def replace(self, cache: Cache, why: str, run: Callable[[list[Build]], Pipeline], *, store: bool) -> None:
        """Move the entry that serves it out of the way, and serve it from another that is there by now, or build it again.

        It is built in memory if the entry cannot be moved away or `store` is false. Whatever goes wrong, all is as it was before.

        Args:
            cache: where the entry is.
            why: it is replaced.
            run: starts builds.
            store: what is built is to be stored.

        Raises:
            SourceError: a file cannot be read, or is not any more what the entry was made of.
        """
        stored, records = self.stored, self.records
        assert stored is not None
        self.stored = self.early = None
        try:
            entry = stored.entry
            moved = not entry.stands() or cache.damaged(entry.key, why)
            again = cache.find(entry.header.document) if moved and store and self.options.mode != "refresh" else None
            if again is not None and self._adopt(cache, again):
                return
            self._compare_files(entry.header.document)
            self.start(cache if moved and store else None, time.time_ns())
            if self.build is not None:
                self.pipeline = run([self.build])
        except BaseException:
            if self.build is not None:
                self.build.drop()
            self.stored, self.records, self.build, self.pipeline = stored, records, None, None
            raise

    def _compare_files(self, document: Mapping[str, Any]) -> None:
        """Compare what an entry was made of with files that may have changed since they were opened, or may only have been moved or touched.

        Raises:
            SourceError: one was written to, or has become shorter.
        """
        wanted = {document["source"]["digest"], *(adapter["digest"] for adapter in document["adapters"])}
        for read in (self.source, *self.request.adapter_sources()):
            if read.file.changed() and source_digest(read, self.options.threads or default_threads()) not in wanted:
                raise SourceError("was written to since it was opened", path=read.path)

    def serve(self, cache: Cache, seen_ns: int) -> bool:
        """Serve the file without reading a byte of it, if its digest is known and the entry was made of a file of a plain format.

        Args:
            cache, seen_ns: as for `start`; the load has no adapter.

        Returns:
            Whether it is served; else `start` is to be called.
        """
        found = None if self.request.recipe.passes_elements else cache.source_digest(Stamp.of(self.source.file.stat))
        if found is None:
            return False
        entry = self._find(cache, found, {})
        if entry is not None and not is_plain(entry.header.built.get("format")):
            return False  # the entry may be right, but only the file says so
        if entry is None or not self._adopt(cache, entry):
            self._looked = found
            return False
        self.native = {}  # of a plain format none passes by its type, and by this recipe none for another reason
        return True

    def start(self, cache: Cache | None, seen_ns: int, *, first: bool = False) -> None:
        """Find the entry, or prepare the build that makes it.

        Args:
            cache: where; None for memory.
            seen_ns: when the source was opened, since the epoch.
            first: a cold disk may read its first bytes meanwhile.

        Raises:
            SourceError: it cannot be read.
        """
        source, request, options = self.source, self.request, self.options
        if all(name in self.native for name in source.tensors):
            return
        stamp = Stamp.of(source.file.stat)
        found: str | None = None
        lock = Lock()
        staged: StagedEntry | None = None
        jobs = None
        unsaved: CacheError | None = None
        if cache is not None:
            looked, self._looked = self._looked, ""
            found = looked if looked and not source.reading() else self._look(cache, stamp, seen_ns, None)
            if self.stored is not None:
                return
            if options.mode != "readonly" and not cache.readonly:
                mark = source.fingerprint  # the digest may not be known before the build has taken it
                name = digest(canonical([mark, request.key_document("", source.file.nbytes, source.reading())]).encode()).hex()

                def served(announced: str = "") -> bool:
                    nonlocal found
                    if not announced or options.verify != "off":  # what is not durable is used only if it is checked
                        found = self._look(cache, stamp, seen_ns, found, announced)
                    if announced and self.stored is not None:
                        self.early = Early(self.stored.entry, built, cache.complain)
                    return self.stored is not None

                def built() -> None:
                    cache.acquire(name, lambda announced: not announced).release()

                try:
                    lock = cache.acquire(name, served)
                    if self.stored is not None or served():
                        lock.release()
                        return
                    jobs = self._plan(first=first)
                    staged = cache.stage(slots_of(jobs), records_nbytes(jobs))
                    self.build = Build(source, request, jobs, cache, staged, found, lock, stamp, seen_ns)
                    return
                except CacheError as error:
                    unsaved = error
                    _unsaved(cache, source, error)
                except BaseException:
                    if staged is not None:
                        staged.discard()
                    lock.release()
                    raise
            else:
                unsaved = StoreReadOnlyError(f"the store {cache.root} is read-only")
                if options.mode != "readonly":
                    _unsaved(cache, source, unsaved)
        if jobs is None:
            jobs = self._plan(first=first)
        self.build = Build(source, request, jobs, None, None, found, lock, stamp, seen_ns)
        self.build.unsaved = unsaved

    def _plan(self, *, first: bool) -> list[Job]:
        if first:
            self.source.file.begin_reading(_BEFORE_PLAN)
        return plan(self.source, self.request)

    def _look(self, cache: Cache, stamp: Stamp, seen_ns: int, found: str | None, announced: str = "") -> str | None:
        """Find the entry, or what its builder has announced; return the source's digest, `found` if it is known, else if it had to be taken."""
        source, options = self.source, self.options
        found = found or cache.source_digest(stamp)
        if found is None and cache.knows(source.fingerprint):
            found = known_digest(source, cache, options.threads or default_threads(), seen_ns)
        if found is not None and (entry := self._find(cache, found, source.reading(), announced)) is not None:
            self._adopt(cache, entry, announced=bool(announced))
        return found

    def _find(self, cache: Cache, found: str, reading: Mapping[str, Any], announced: str = "") -> StoredEntry | None:
        """Return the entry of a source of that digest, or what its builder has announced, if the load may use one."""
        if self.options.mode == "refresh":
            return None
        document = self.request.key_document(found, self.source.file.nbytes, reading)
        if announced:
            return cache.find_staged(document, announced)
        entry = cache.find(document)
        return None if entry is not None and entry.key == self._unfit else entry

    def _adopt(self, cache: Cache, entry: StoredEntry, *, announced: bool = False) -> bool:
        """Serve the file from an entry, unless all of it is to be checked now and something is wrong."""
        stored = Stored(entry, self.options.pool, check=self.options.verify != "off")
        if self.options.verify == "open" and not stored.intact(entry.header.slots):
            if not announced:  # else it is not in the store yet: who built it will say what became of it
                wrong = next((key for key in entry.header.slots if not stored.intact([key])), "")
                if not cache.damaged(entry.key, f"tensor {wrong!r} is not what was stored"):
                    self._unfit = entry.key
            return False
        self.stored, self.records = stored, {record["name"]: record for record in entry.header.records}
        return True


class DamagedError(Exception):
    """Say what of an entry is not what was stored."""


def _unsaved(cache: Cache, source: Source, error: CacheError) -> None:
    cache.complain(f"{source.path.name} is loaded but not saved: {error.message}")


def _array(key: str, slot: Slot, home: StagedEntry | Memory) -> Array:
    """Return a tensor that was built, as one read-only array."""
    dtype = array_dtype(slot.dtype)
    return np.ndarray(slot.shape, dtype, *home.where(key)) if slot.nbytes else np.empty(slot.shape, dtype)
