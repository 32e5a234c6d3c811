"""Own `once`: an attribute that is computed when it is first asked for, without a lock.

functools.cached_property does the same from Python 3.12 on. Before, it holds one lock for all objects of a class while it computes: a
child of fork finds it taken for ever if another thread of its parent was just computing, and files on a slow disk wait for each other.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

__all__ = ["once"]

if TYPE_CHECKING or sys.version_info >= (3, 12):
    from functools import cached_property as once
else:
    from collections.abc import Callable
    from typing import Any

    class once:  # noqa: N801 - used like a function
        """Compute an attribute once an object; of threads that ask at the same time the last one's result stays."""

        def __init__(self, compute: Callable[[Any], Any]) -> None:
            self._compute, self.__doc__ = compute, compute.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            found = instance.__dict__[self._name] = self._compute(instance)  # found there from now on: this has no __set__
            return found
