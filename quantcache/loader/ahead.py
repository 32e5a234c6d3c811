"""Own how stored tensors come into memory: read and checked by the piece, on all cores, ahead of whoever will ask.

Every tensor is brought once: what somebody asks for while a thread is at it is waited for, and the asker takes pieces of
it meanwhile. What is not in the page cache comes there by positioned reads, and is checked in the buffer that they fill: of
the ways to read a cold disk the fastest here (docs/decisions/0010-hits.md). Knows bytes and digests, no codec.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.cache.blobs import Reader, StoredEntry
from quantcache.cache.key import combine
from quantcache.errors import SourceError
from quantcache.loader.mapping import MappedFile
from quantcache.memory import is_cached, populate, will_need
from quantcache.once import once
from quantcache.quant.digest import NBYTES, Expected, add_digest, digests, each
from quantcache.quant.native import Calls, address, compiled
from quantcache.tensor import array_dtype
from quantcache.trace import Profile, span, working_for

__all__ = ["Check", "Pool", "Stored", "read_ahead"]

#: Bytes of a piece, in whole chunks of the digest: large enough that a lock a piece does not count.
_PIECE = 2 << 20
#: Bytes that are compared in one call: a few milliseconds' worth.
_TOGETHER = 64 << 20
#: Pieces from which on waking other threads for one tensor is worth it: 16 MB take a core 2 ms.
_HELP = 8
#: A thread without work ends after this.
_IDLE_S = 2.0


def _done(_: int) -> bool:
    return True


class _Bringing:
    """One tensor on its way into memory. All fields but `work` are guarded by the pool's lock."""

    __slots__ = ("fine", "left", "waiting", "work")

    def __init__(self, pieces: int, work: Callable[[int], bool]) -> None:
        self.waiting = deque(range(pieces))
        self.left = pieces
        self.fine = True
        self.work = work


class Pool:
    """Bring tensors into memory on threads of its own, started when there is something to do.

    Args:
        threads: how many.
        profile: of the load.
    """

    def __init__(self, threads: int, profile: Profile | None = None) -> None:
        self._count, self._profile = threads, profile
        self._lock = threading.RLock()  # which Ctrl-C finds as it was: a plain one is let go by a caller that has not got it back
        #: what threads wait for, and what callers do: a piece that is done wakes nobody
        self._asked, self._brought = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queue: deque[_Bringing] = deque()
        self._alive = 0
        self._closed = False
        #: a child of fork has no threads, and must not wait for those of its parent
        self.process = os.getpid()

    def ask(self, tensors: Iterable[_Bringing], *, first: bool = False) -> None:
        """Queue tensors; return at once. Nothing is done any more after `close`."""
        if self.process != os.getpid():  # before any lock: a thread of the parent may have held it
            return
        tensors = list(tensors)
        pieces = sum(len(tensor.waiting) for tensor in tensors)
        with self._lock:
            if self._closed or not tensors:
                return
            (self._queue.extendleft if first else self._queue.extend)(tensors)
            while self._alive < min(self._count, pieces):
                thread = threading.Thread(target=self._work, name=f"quantcache-ahead-{self._alive + 1}", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads here: whoever asks brings it
                    break
                self._alive += 1
            self._asked.notify_all()

    def wait(self, tensors: list[_Bringing]) -> bool:
        """Bring tensors now, with the threads' help where that is worth it; return whether all are fine."""
        with self._lock:
            big = [tensor for tensor in tensors if len(tensor.waiting) >= _HELP and tensor not in self._queue]
        if big and self._count > 1:
            self.ask(big, first=True)
        for tensor in tensors:
            while True:
                while self._step(tensor):
                    pass
                with self._lock:
                    while tensor.left and not tensor.waiting:
                        self._brought.wait()
                    if not tensor.left:
                        break  # else somebody was interrupted at a piece
        return all(tensor.fine for tensor in tensors)

    def close(self) -> None:
        """Stop reading ahead."""
        if self.process != os.getpid():
            return
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._asked.notify_all()

    def _work(self) -> None:
        with working_for(self._profile):
            while True:
                with self._lock:
                    while self._queue and not self._queue[0].waiting:
                        self._queue.popleft()
                    if not self._queue and (self._closed or not self._asked.wait(_IDLE_S)):
                        self._alive -= 1
                        return
                    tensor = self._queue[0] if self._queue else None
                if tensor is not None:
                    try:
                        self._step(tensor)
                    except BaseException:  # noqa: BLE001 - no memory: whoever asks for the tensor does it, and is told
                        with self._lock:
                            self._queue.clear()

    def _step(self, tensor: _Bringing) -> bool:
        """Bring one piece of a tensor; return whether there was one.

        Whatever interrupts it (Ctrl-C, no memory) says nothing about the piece, which is then left for the next who asks.
        """
        number = -1
        fine = None
        try:
            with self._lock:
                if not tensor.waiting:
                    return False
                number = tensor.waiting.popleft()
            fine = tensor.work(number)
        finally:
            if number >= 0:
                with self._lock:
                    if fine is None:
                        tensor.waiting.appendleft(number)
                        self._brought.notify_all()
                    else:
                        tensor.left -= 1
                        tensor.fine = tensor.fine and fine
                        if not tensor.left:
                            tensor.work = _done  # which lets go of the entry
                            self._brought.notify_all()
        return True


_here = threading.local()


def _buffer(nbytes: int) -> memoryview:
    """Return this thread's buffer."""
    buffer: bytearray | None = getattr(_here, "buffer", None)
    if buffer is None or len(buffer) < nbytes:
        buffer = _here.buffer = bytearray(nbytes)
    return memoryview(buffer)[:nbytes]


class Check:
    """Compare a stored tensor with its digest by the chunk, in any order, for whoever has the bytes in hand.

    Args:
        stored, key: which tensor.
        chunk: bytes of a chunk.
        chunks: how many.
    """

    __slots__ = ("_found", "_key", "_stored", "chunk")

    def __init__(self, stored: Stored, key: str, chunk: int, chunks: int) -> None:
        self._stored, self._key, self.chunk = stored, key, chunk
        self._found: list[bytes] = [b""] * chunks

    def feed(self, start: int, data: Any) -> None:
        """Digest bytes of the tensor.

        Args:
            start: of the first, a multiple of the chunk.
            data: whole chunks, but for the last of the tensor.
        """
        with span("verify", len(data), self._key):
            self._take(start, digests(data, self.chunk))

    def add_to(self, calls: Calls, start: int, data: NDArray[np.uint8]) -> Callable[[], None]:
        """Do the same by a call among others; return what is to be called after them."""
        out = np.empty(NBYTES * -(-data.size // self.chunk), np.uint8)
        calls.name = self._key
        if not add_digest(calls, address(data), data.size, address(out), piece=self.chunk, phase="verify"):
            return partial(self.feed, start, data.data)
        return lambda: self._take(start, each(out))

    def _take(self, start: int, found: list[bytes]) -> None:
        first = start // self.chunk
        self._found[first : first + len(found)] = found

    def whole(self) -> bool:
        """Return whether all chunks were fed."""
        return all(self._found)

    def passed(self) -> bool:
        """Return whether all chunks were fed and are what was stored."""
        fine = self.whole() and combine(self._found) == self._stored.entry.header.digest_of(self._key)
        if fine:
            self._stored.passed(self._key)
        return fine


class Stored:
    """Bring the tensors of a stored entry, each once.

    Args:
        entry: the entry.
        pool: does it.
        check: digests are compared, too.
    """

    def __init__(self, entry: StoredEntry, pool: Pool, *, check: bool) -> None:
        self.entry = entry
        self._pool, self._check = pool, check
        self._address = np.frombuffer(entry.memory, np.uint8).__array_interface__["data"][0]
        self._lock = threading.Lock()
        self._tensors: dict[str, _Bringing] = {}
        self._fine: set[str] = set()  # checked by whoever asked: small ones, and what an upload moved
        #: a tensor that was found to be wrong: not always the one that somebody asked for, but one that came with it
        self.wrong = ""
        self._reader: Reader | None = None  # while pieces are to be read from disk
        self._unread = 0

    def read_ahead(self, keys: Iterable[str]) -> None:
        """Begin to bring tensors."""
        if self._pool.process != os.getpid():
            return
        with self._lock:
            wanted = sorted((key for key in keys if key not in self._tensors and self._wanting(key)), key=self.entry.header.offsets.__getitem__)
            new = [self._bringing(together) for together in self._together(wanted)]
        self._pool.ask(new)

    def _together(self, keys: list[str]) -> Iterator[list[str]]:
        """Yield keys, in the order of the file: what stands side by side and is no more than a piece comes as one."""
        slots, offsets = self.entry.header.slots, self.entry.header.offsets
        found: list[str] = []
        end = room = 0
        for key in keys:
            nbytes = slots[key].nbytes
            if found and (offsets[key] != end or nbytes > room):
                yield found
                found = []
            if not found:
                room = _PIECE
            found.append(key)
            end, room = offsets[key] + nbytes, room - nbytes
        if found:
            yield found

    def _wanting(self, key: str) -> bool:
        """Return whether reading ahead does something for a tensor: if it is to be checked, or is not in the page cache."""
        return (self._check and key not in self._fine) or not self._cached(key)

    def _cached(self, key: str) -> bool:
        return is_cached(self._address + self.entry.header.offsets[key], self.entry.header.slots[key].nbytes)

    def _compare(self, keys: list[str], nbytes: int) -> bool:
        """Return whether tensors of so many bytes are what was stored."""
        with span("verify", nbytes, min(keys, key=len)):  # of a weight's parts the codes have its name, the others more
            if self._differing(keys, self._address) is not None:
                return False
        self._fine.update(keys)
        return True

    def array(self, key: str) -> NDArray[Any]:
        """Return a tensor as one read-only array, unchecked; of 20,000 tensors every object more is felt."""
        header = self.entry.header
        number = header.numbers[key]
        shape, dtype = self._kinds[header.kind[number]]
        if not header.sizes[number]:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, self.entry.memory, header.places[number])

    @once
    def _kinds(self) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and element type of each kind of tensor."""
        return [(shape, array_dtype(dtype)) for dtype, shape, _ in self.entry.header.kinds]

    def is_warm(self, keys: Iterable[str]) -> bool:
        """Return whether tensors are in the page cache, as far as a few pages tell."""
        return all(self._cached(key) for key in keys if self.entry.header.slots[key].nbytes)

    def fault_in(self, keys: Iterable[str]) -> bool:
        """Have the system map tensors that nobody checks, so that touching them cannot fail; return whether it could."""
        start, header = self._address, self.entry.header
        return not any(populate(start + header.offsets[key], header.slots[key].nbytes) for key in keys)

    def intact(self, keys: Iterable[str]) -> bool:
        """Return whether tensors are what was stored, once they are in memory; True at once if that is not checked."""
        if not self._check:
            return True
        keys, big = list(keys), list[str]()
        if self._is_cold:
            self._ask_for(keys)
        small, nbytes, header = list[str](), 0, self.entry.header
        for key in keys:
            if key in self._fine:
                continue
            size = header.sizes[header.numbers[key]]
            if size >= _PIECE or key in self._tensors:
                big.append(key)
                continue
            small.append(key)
            nbytes += size
            if nbytes > _TOGETHER:  # all of an entry, perhaps: Ctrl-C is to be answered in between
                if not self._compare(small, nbytes):
                    return False
                small, nbytes = [], 0
        if small and not self._compare(small, nbytes):
            return False
        if not big:
            return True
        if self._pool.process != os.getpid():
            return all(self.entry.intact(key) for key in big)
        with self._lock:
            wanted = list(dict.fromkeys(self._tensors.get(key) or self._bringing([key]) for key in big))
        return not wanted or self._pool.wait(wanted)

    def _differing(self, keys: Sequence[str], base: int) -> str | None:
        """Return the first of some tensors that is not what was stored, None if all are.

        Args:
            keys: which.
            base: where the first byte of the file is, or would be if it were mapped in front of what is in a buffer. At the reference level
                what is mapped is compared.
        """
        if self._expected is None:
            return next((key for key in keys if not self.entry.matches(key)), None)
        numbers = self.entry.header.numbers
        first = self._expected.differs(base, [numbers[key] for key in keys])
        return keys[first] if first < len(keys) else None

    @once
    def _expected(self) -> Expected | None:
        """What all tensors are compared with; None at the reference level, where there is nothing to do it."""
        header = self.entry.header
        if not compiled():
            return None
        return Expected(header.places, header.sizes, [header.kinds[kind][2] for kind in header.kind], header.wanted)

    @once
    def _is_cold(self) -> bool:
        """Whether some of the entry had to come from disk when something was first asked of it."""
        return not is_cached(self._address, len(self.entry.memory))

    def _ask_for(self, keys: list[str]) -> None:
        """Have what is small of a cold tensor read at once, and no more than that: each fault would read megabytes around itself."""
        slots, offsets = self.entry.header.slots, self.entry.header.offsets
        for key in keys:
            if key not in self._fine and key not in self._tensors and slots[key].nbytes < _PIECE:
                will_need(self._address + offsets[key], slots[key].nbytes)

    def unchecked(self, key: str) -> Check | None:
        """Return a check that somebody else may do who is to read all of a tensor anyway; None if there is nothing to check.

        What was asked for by read_ahead is `intact`'s: None, too. So has to be what comes from disk, which it does faster.
        """
        slot = self.entry.header.slots[key]
        if not self._check or key in self._fine or key in self._tensors or not slot.nbytes:
            return None
        return Check(self, key, slot.chunk, slot.chunks)

    def passed(self, key: str) -> None:
        """Take somebody's word for it."""
        self._fine.add(key)

    def close(self) -> None:
        """Keep no descriptor for what was asked for and did not come."""
        with self._lock:
            self._reader = None

    def _read(self, key: str, begin: int, end: int) -> memoryview | None:
        """Return a piece that may have to come from disk, in this thread's buffer or as it is mapped; None if it cannot be read."""
        buffer = _buffer(end - begin)
        with self._lock:
            reader = self._reader = self._reader or self.entry.reader()
        found: memoryview | None = None
        with contextlib.suppress(OSError), span("read", end - begin, key):
            if reader.read_into(begin, buffer):
                found = buffer
            elif not populate(self._address + begin, end - begin):
                found = self.entry.memory[begin:end]
        with self._lock:
            self._unread -= 1
            if not self._unread:
                self._reader = None
        return found

    def _bringing(self, keys: list[str]) -> _Bringing:
        """Return what brings one tensor, by the piece, or several that stand side by side, in one."""
        header, memory = self.entry.header, self.entry.memory
        slots, start = [header.slots[key] for key in keys], header.offsets[keys[0]]
        stop = header.offsets[keys[-1]] + slots[-1].nbytes
        check = Check(self, keys[0], slots[0].chunk, slots[0].chunks) if len(keys) == 1 else None
        # what is brought at a time, as (first byte, the one behind the last): whole chunks of one tensor, or all of several
        step = stop - start if check is None else max(1, _PIECE // check.chunk) * check.chunk
        pieces = [(begin, min(begin + step, stop)) for begin in range(start, stop, step or 1)]
        cached = is_cached(self._address + start, stop - start)
        if not cached:
            self._unread += len(pieces)

        def work(number: int) -> bool:
            begin, end = pieces[number]
            found = memory[begin:end] if cached else self._read(keys[0], begin, end)
            if found is None:
                return False
            if not self._check:
                return True
            if check is None:
                with span("verify", end - begin, keys[0]):
                    wrong = self._differing(keys, address(np.frombuffer(found, np.uint8)) - begin)
            else:
                check.feed(begin - start, found)
                wrong = keys[0] if check.whole() and not check.passed() else None
            if wrong is not None:
                self.wrong = wrong
            return wrong is None

        tensor = _Bringing(len(pieces), work)
        tensor.fine = bool(pieces) or not self._check or self._differing(keys, self._address) is None
        self._tensors |= dict.fromkeys(keys, tensor)
        return tensor


def read_ahead(file: MappedFile, ranges: Iterable[tuple[int, int]], pool: Pool) -> None:
    """Begin to bring ranges of a source file, as (first byte, number of bytes), for tensors that are views of it."""

    def bringing(offset: int, nbytes: int) -> _Bringing:
        def work(number: int) -> bool:
            try:
                file.populate(offset + number * _PIECE, min(_PIECE, nbytes - number * _PIECE))
            except SourceError:
                return False  # whoever asks for the tensor is told
            return True

        return _Bringing(-(-nbytes // _PIECE), work)

    pool.ask([bringing(offset, nbytes) for offset, nbytes in ranges])
