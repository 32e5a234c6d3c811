"""Own the profile of a load: how long each phase took, and the trace file of QUANTCACHE_TRACE. Imports nothing of ours.

A phase is measured where it happens, with `span`, by whichever part of the package does it; the seconds go to the Profile
that the thread works for. What a span inside another takes is not the outer one's, so that all phases add up.

QUANTCACHE_TRACE=file.json writes every span as an event of the Trace Event Format, which Perfetto (ui.perfetto.dev) and
chrome://tracing open; "%p" in the name becomes the process number. Source: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

from quantcache.errors import QuantcacheWarning

try:
    import fcntl
except ImportError:  # Windows: two processes must be given two names
    fcntl = None  # type: ignore[assignment]

__all__ = ["PHASES", "Profile", "flush", "span", "spent", "working_for"]

#: What a load spends its time with, in the order of the data's way.
PHASES = ("open", "read", "decode", "merge", "quantize", "digest", "write", "sync", "verify", "upload")

#: Events that are held back before they are written: 100 bytes each.
_BATCH = 4096
_END = b"\n]\n"
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)


class Profile:
    """Add up the seconds and bytes of each phase, over all threads of one load."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ns: dict[str, int] = defaultdict(int)
        self._nbytes: dict[str, int] = defaultdict(int)

    def add(self, phase: str, ns: int, nbytes: int = 0) -> None:
        """Add one span."""
        with self._lock:
            self._ns[phase] += ns
            self._nbytes[phase] += nbytes

    def add_run(self, spans: Iterable[tuple[str, int, str]], ends_ns: Iterable[int]) -> None:
        """Add spans that followed each other: phase, bytes and name of each, and when it ended, since the first began."""
        begin = 0
        with self._lock:
            for (phase, nbytes, _), end in zip(spans, ends_ns, strict=False):
                if phase:
                    self._ns[phase] += end - begin
                    self._nbytes[phase] += nbytes
                begin = end

    @property
    def seconds(self) -> dict[str, float]:
        """Phase -> seconds of all threads together, in the order of PHASES; only phases that happened."""
        with self._lock:
            return {phase: self._ns[phase] * 1e-9 for phase in PHASES if phase in self._ns}

    @property
    def nbytes(self) -> dict[str, int]:
        """Phase -> bytes that it went over."""
        with self._lock:
            return {phase: self._nbytes[phase] for phase in PHASES if phase in self._nbytes}


class _Here(threading.local):
    profile: Profile | None = None
    thread = 0
    inner_ns = 0  # of spans that ended within the one under way


_here = _Here()


class working_for:  # noqa: N801 - used like a function
    """Give the spans of this thread to a load's profile for as long as a `with` block lasts.

    Args:
        profile: of the load; None gives them to nobody.
    """

    __slots__ = ("_before", "_profile")

    def __init__(self, profile: Profile | None) -> None:
        self._profile = profile

    def __enter__(self) -> None:
        self._before, _here.profile = _here.profile, self._profile

    def __exit__(self, *_: object) -> None:
        _here.profile = self._before


class span:  # noqa: N801 - used like a function
    """Measure what a `with` block does. Costs about a microsecond.

    Args:
        phase: one of PHASES.
        nbytes: that it goes over.
        name: of the tensor or file, for the trace.
    """

    __slots__ = ("_before", "_name", "_nbytes", "_phase", "_start")

    def __init__(self, phase: str, nbytes: int = 0, name: str = "") -> None:
        self._phase, self._nbytes, self._name = phase, nbytes, name

    def __enter__(self) -> None:
        self._before, _here.inner_ns = _here.inner_ns, 0
        self._start = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        end = time.perf_counter_ns()
        if (profile := _here.profile) is not None:
            profile.add(self._phase, end - self._start - _here.inner_ns, self._nbytes)
        _here.inner_ns = self._before + end - self._start
        if (recorder := _recorder) is not None:
            recorder.add(self._phase, self._start, end, self._nbytes, self._name)


def spent(start_ns: int, spans: Sequence[tuple[str, int, str]], ends_ns: Sequence[int]) -> None:
    """Add spans that followed each other without Python in between.

    Args:
        start_ns: when the first began, by time.perf_counter_ns().
        spans: phase, bytes and name of each; one without a phase is waiting.
        ends_ns: when each ended, since the start; of the first ones, if the others did not happen.
    """
    if (profile := _here.profile) is not None:
        profile.add_run(spans, ends_ns)
    _here.inner_ns += ends_ns[-1]
    if (recorder := _recorder) is not None:
        for (phase, nbytes, name), begin, end in zip(spans, [0, *ends_ns], ends_ns, strict=False):
            if phase:
                recorder.add(phase, start_ns + begin, start_ns + end, nbytes, name)


class _Recorder:
    """Write events to the trace file, in batches. A file that cannot be written costs one warning, never a load."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._process = 0
        self._file: BinaryIO | None = None
        self._events: list[dict[str, Any]] = []
        self._named: set[int] = set()

    def add(self, phase: str, start_ns: int, end_ns: int, nbytes: int, name: str) -> None:
        """Note one span."""
        thread = _here.thread = _here.thread or threading.get_native_id()
        event: dict[str, Any] = {"name": phase, "cat": "load", "ph": "X", "ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3,
                                 "pid": os.getpid(), "tid": thread}  # fmt: skip
        details = ({"tensor": name} if name else {}) | ({"bytes": nbytes} if nbytes else {})
        if details:
            event["args"] = details
        with self._lock:
            if self._process != os.getpid():  # the first event, or a child of fork: a file of its own
                self._process, self._file, self._events, self._named = os.getpid(), None, [], set()
                _here.thread = event["tid"] = thread = threading.get_native_id()
            if thread not in self._named:
                self._named.add(thread)
                title = {"name": threading.current_thread().name}
                self._events.append({"name": "thread_name", "ph": "M", "pid": self._process, "tid": thread, "args": title})
            self._events.append(event)
            if len(self._events) >= _BATCH:
                self._write()

    def flush(self) -> None:
        """Write what is held back; the file is whole JSON then."""
        with self._lock:
            if self._events and self._process == os.getpid():
                self._write()

    def _write(self) -> None:
        global _recorder
        text = ",\n".join(json.dumps(event, separators=(",", ":")) for event in self._events)
        self._events = []
        try:
            if self._file is None:
                self._file = os.fdopen(self._open(), "wb")
                text = "[\n" + text
            else:
                self._file.seek(-len(_END), os.SEEK_END)
                text = ",\n" + text
            self._file.write(text.encode() + _END)
            self._file.flush()
        except OSError as error:
            _recorder = None
            warnings.warn(f"QUANTCACHE_TRACE: cannot write {self.path}: {error.strerror}", QuantcacheWarning, stacklevel=4)

    def _open(self) -> int:
        """Open the file, empty; while another process writes it, one beside it with this process's number."""
        path = self.path.replace("%p", str(os.getpid()))
        descriptor = os.open(path, _FLAGS, 0o666)
        try:
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            stem, suffix = os.path.splitext(path)
            descriptor = os.open(f"{stem}.{os.getpid()}{suffix}", _FLAGS, 0o666)
        except OSError:  # no locks here
            pass
        try:
            os.ftruncate(descriptor, 0)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def _after_fork() -> None:
    """Give a child a recorder of its own: its parent's may be in the middle of something."""
    global _recorder
    if _recorder is not None:
        _recorder = _Recorder(_recorder.path)


_recorder = _Recorder(os.path.abspath(os.environ["QUANTCACHE_TRACE"])) if os.environ.get("QUANTCACHE_TRACE") else None

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def flush() -> None:
    """Write what was traced so far; nothing without QUANTCACHE_TRACE. Called when a model is closed and at the end."""
    if (recorder := _recorder) is not None:
        recorder.flush()
