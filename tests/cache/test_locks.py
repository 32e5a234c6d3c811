"""A lock is held once, given back whatever the file system says, and not split by who removes its file."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from quantcache.cache.filesystem import PRIVATE
from quantcache.cache.locks import acquire
from quantcache.errors import LockTimeoutError


def test_held_once(tmp_path: Path) -> None:
    """A second one waits until the first is given back, or for as long as it has patience."""
    path = str(tmp_path / "a.lock")
    first = acquire(path, access=PRIVATE, timeout_s=None)
    start = time.monotonic()
    with pytest.raises(LockTimeoutError):
        acquire(path, access=PRIVATE, timeout_s=0.1)
    assert time.monotonic() - start >= 0.1
    threading.Timer(0.1, first.release).start()
    second = acquire(path, access=PRIVATE, timeout_s=10)
    first.release()  # once more does nothing
    with pytest.raises(LockTimeoutError):
        acquire(path, access=PRIVATE, timeout_s=0)
    second.release()
    acquire(path, access=PRIVATE, timeout_s=0).release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EACCES, errno.EIO])
def test_a_refusal_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A file system that refuses is not taken for somebody who holds the lock."""

    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    open_before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=os.strerror(code)):
        acquire(str(tmp_path / "a.lock"), access=PRIVATE, timeout_s=None)
    if open_before:
        assert len(os.listdir("/proc/self/fd")) == open_before


def test_given_back_without_unlocking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unlock that the file system would refuse is not needed."""
    path = str(tmp_path / "a.lock")
    lock = acquire(path, access=PRIVATE, timeout_s=None)
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    lock.release()
    monkeypatch.undo()
    acquire(path, access=PRIVATE, timeout_s=0).release()


def test_a_file_that_is_removed(tmp_path: Path) -> None:
    """Whoever waited for a lock whose file was removed takes that of the new one."""
    path = tmp_path / "a.lock"
    first = acquire(str(path), access=PRIVATE, timeout_s=None)
    got: list[Any] = []
    waiter = threading.Thread(target=lambda: got.append(acquire(str(path), access=PRIVATE, timeout_s=10)))
    waiter.start()
    time.sleep(0.1)
    path.unlink()
    third = acquire(str(path), access=PRIVATE, timeout_s=0)
    first.release()
    time.sleep(0.2)
    assert not got
    third.release()
    waiter.join()
    got[0].release()


def test_those_who_waited_look_together(tmp_path: Path) -> None:
    """Nobody has to hold the lock to find that it is not needed any more; who finds nothing done gets it, one at a time."""
    path = str(tmp_path / "a.lock")
    lock = acquire(path, access=PRIVATE, timeout_s=None)
    meeting = threading.Barrier(3)
    returned: list[Any] = []

    def found(announced: str) -> bool:
        assert not announced
        meeting.wait(10)  # breaks unless all three look at the same time
        return True

    waiters = [
        threading.Thread(target=lambda: returned.append(acquire(path, access=PRIVATE, timeout_s=10, done=found))) for _ in range(3)
    ]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.05)
    assert not returned
    lock.release()
    for waiter in waiters:
        waiter.join(10)
    assert len(returned) == 3
    held = acquire(path, access=PRIVATE, timeout_s=0)  # none of them has it
    inside: list[int] = []

    def build() -> None:
        mine = acquire(path, access=PRIVATE, timeout_s=10, done=lambda _: False)
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.01)
        inside.pop()
        mine.release()
        returned.append(None)

    builders = [threading.Thread(target=build) for _ in range(4)]
    for builder in builders:
        builder.start()
    held.release()
    for builder in builders:
        builder.join(10)
    assert len(returned) == 7


def test_what_the_holder_announces(tmp_path: Path) -> None:
    """All that wait hear it while the lock is held, once; who gets the lock later hears nothing of it."""
    path = str(tmp_path / "a.lock")
    lock = acquire(path, access=PRIVATE, timeout_s=None)
    heard: list[str] = []

    def served(announced: str) -> bool:
        heard.append(announced)
        return announced == "second"

    returned: list[Any] = []
    waiters = [
        threading.Thread(target=lambda: returned.append(acquire(path, access=PRIVATE, timeout_s=10, done=served))) for _ in range(2)
    ]
    for waiter in waiters:
        waiter.start()
    lock.announce("first")
    while len(heard) < 2:
        time.sleep(0.001)
    time.sleep(0.05)
    assert heard == ["first", "first"]
    assert not returned
    lock.announce("second")
    for waiter in waiters:
        waiter.join(10)
    assert len(returned) == 2
    assert heard == ["first", "first", "second", "second"]
    lock.release()
    lock.announce("third")  # says nothing to nobody
    second = acquire(path, access=PRIVATE, timeout_s=0)
    with pytest.raises(LockTimeoutError):
        acquire(path, access=PRIVATE, timeout_s=0.05, done=served)
    assert len(heard) == 4
    second.release()


def test_interrupted_once_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the last moment loses no lock: the next one gets it."""
    path = str(tmp_path / "a.lock")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "ftruncate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        acquire(path, access=PRIVATE, timeout_s=None)
    monkeypatch.undo()
    acquire(path, access=PRIVATE, timeout_s=0).release()


def test_children_neither_hold_nor_give_back(tmp_path: Path) -> None:
    """A child of fork has the descriptor, too: it keeps nobody from the lock once its parent gave it back, and cannot give it back itself."""
    path = str(tmp_path / "a.lock")
    lock = acquire(path, access=PRIVATE, timeout_s=None)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        lock.release()
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    time.sleep(0.05)
    with pytest.raises(LockTimeoutError):
        acquire(path, access=PRIVATE, timeout_s=0)
    other = os.fork()
    if not other:
        os.close(writing)
        time.sleep(20)
        os._exit(0)
    lock.release()
    acquire(path, access=PRIVATE, timeout_s=0).release()
    os.close(writing)
    os.kill(other, signal.SIGKILL)
    for pid in (child, other):
        os.waitpid(pid, 0)
