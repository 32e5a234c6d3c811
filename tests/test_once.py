"""An attribute that is computed once an object, and holds no other object up."""

from __future__ import annotations

import threading
from typing import Any

from quantcache.once import once


class Asked:
    """Count how often an attribute is computed."""

    def __init__(self, wait: threading.Event | None = None) -> None:
        self.wait, self.asked, self.begun = wait, 0, threading.Event()

    @once
    def answer(self) -> Any:
        """Wait, if there is something to wait for."""
        self.asked += 1
        self.begun.set()
        return object() if self.wait is None else self.wait.wait(30)


def test_computed_once() -> None:
    """It is computed when it is first asked for, and may be set."""
    one, other = Asked(), Asked()
    assert one.asked == 0
    assert one.answer is one.answer
    assert one.answer is not other.answer
    assert one.asked == 1
    other.answer = 7
    assert other.answer == 7
    assert Asked.answer.__doc__


def test_no_lock_is_shared() -> None:
    """While one object's is computed, another's can be: a lock for all of a class may be held for ever in a child of fork."""
    done = threading.Event()
    slow = Asked(done)
    thread = threading.Thread(target=lambda: slow.answer)
    thread.start()
    assert slow.begun.wait(30)
    quick = Asked()
    other = threading.Thread(target=lambda: quick.answer, daemon=True)
    other.start()
    other.join(10)
    held = other.is_alive()
    done.set()
    thread.join()
    assert not held
    assert slow.answer is True
