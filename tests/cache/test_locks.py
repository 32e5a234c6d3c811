"""A lock is held once, given back whatever the file system says, and not split by who removes its file."""

from __future__ import annotations

import errno
import fcntl
import os
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
    threading.Timer(0.1, first).start()
    second = acquire(path, access=PRIVATE, timeout_s=10)
    first()  # once more does nothing
    with pytest.raises(LockTimeoutError):
        acquire(path, access=PRIVATE, timeout_s=0)
    second()
    acquire(path, access=PRIVATE, timeout_s=0)()


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
    release = acquire(path, access=PRIVATE, timeout_s=None)
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    release()
    monkeypatch.undo()
    acquire(path, access=PRIVATE, timeout_s=0)()


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
    first()
    time.sleep(0.2)
    assert not got
    third()
    waiter.join()
    got[0]()


def test_those_who_waited_look_together(tmp_path: Path) -> None:
    """Nobody has to hold the lock to find that it is not needed any more; who finds nothing done gets it, one at a time."""
    path = str(tmp_path / "a.lock")
    release = acquire(path, access=PRIVATE, timeout_s=None)
    meeting = threading.Barrier(3)
    returned: list[Any] = []

    def found() -> bool:
        meeting.wait(10)  # breaks unless all three look at the same time
        return True

    waiters = [
        threading.Thread(target=lambda: returned.append(acquire(path, access=PRIVATE, timeout_s=10, done=found))) for _ in range(3)
    ]
    for waiter in waiters:
        waiter.start()
    time.sleep(0.05)
    assert not returned
    release()
    for waiter in waiters:
        waiter.join(10)
    assert len(returned) == 3
    held = acquire(path, access=PRIVATE, timeout_s=0)  # none of them has it
    inside: list[int] = []

    def build() -> None:
        give_back = acquire(path, access=PRIVATE, timeout_s=10, done=lambda: False)
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.01)
        inside.pop()
        give_back()
        returned.append(None)

    builders = [threading.Thread(target=build) for _ in range(4)]
    for builder in builders:
        builder.start()
    held()
    for builder in builders:
        builder.join(10)
    assert len(returned) == 7
