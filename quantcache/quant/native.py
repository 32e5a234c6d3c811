"""Load the compiled kernels and pick the CPU level, once. The only file that calls foreign code.

A kernel is found by its name, `qc_<codec>_<operation>__<level>`, so a new codec registers nothing here.
Arguments are NumPy arrays (their address is passed; the caller guarantees the sizes that the kernel's
comment states) and integers. ctypes releases the GIL during the call; `Calls` makes several without taking it in between.

Source: docs/decisions/0001-ctypes-or-extension.md; docs/decisions/0009-pipeline.md for Calls
"""

from __future__ import annotations

import ctypes
import os
import time
from array import array
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.errors import KernelError, UsageError
from quantcache.trace import span, spent

__all__ = ["ELEMENT", "LEVELS", "Calls", "Kernel", "Pinned", "Template", "address", "available", "compiled", "copy", "kernel", "level", "system"]

#: In the order of the bits that qc_cpu_levels() returns.
LEVELS = ("scalar", "avx2", "avx512", "neon")

#: Element types as kernel.h numbers them.
ELEMENT = {"F32": 0, "F16": 1, "BF16": 2}

#: the arguments that a call has not
_NOTHING = (0,) * 8

_HINT = "reinstall quantcache with a C compiler, or set QUANTCACHE_KERNEL=reference for plain NumPy (slow)"


@cache
def _library() -> ctypes.CDLL:
    folder = Path(__file__).parent
    for suffix in (".so", ".dylib", ".dll"):
        path = folder / f"_kernels{suffix}"
        if path.exists():
            break
    else:
        # an editable install keeps what it built outside the source tree and adds its place to the package's path
        import quantcache

        for entry in quantcache.__path__:
            found = sorted((Path(entry) / "quant").glob("_kernels.*"))
            if found:
                path = found[0]
                break
        else:
            raise KernelError(f"the compiled kernels are not in {folder}", hint=_HINT)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the compiled kernels cannot be loaded: {error}", hint=_HINT) from error


@cache
def available() -> tuple[str, ...]:
    """Return the levels that were compiled and that this CPU can run, slowest first, "reference" included."""
    try:
        levels_of = _library().qc_cpu_levels
    except KernelError:
        return ("reference",)
    levels_of.restype = ctypes.c_int64
    bits = levels_of()
    return ("reference", *(name for bit, name in enumerate(LEVELS) if bits >> bit & 1))


@cache
def level() -> str:
    """Return the level in use: QUANTCACHE_KERNEL, else the fastest that runs here.

    Raises:
        UsageError: QUANTCACHE_KERNEL names no level.
        KernelError: the named level, or any compiled kernel, cannot be used here.
    """
    wanted = os.environ.get("QUANTCACHE_KERNEL", "")
    if not wanted or wanted == "auto":
        if available() == ("reference",):
            _library()  # says why
        return available()[-1]
    if wanted not in ("reference", *LEVELS):
        raise UsageError(
            f"QUANTCACHE_KERNEL={wanted} is not a kernel level", hint=f"one of: auto, reference, {', '.join(LEVELS)}"
        )
    if wanted not in available():
        raise KernelError(
            f"QUANTCACHE_KERNEL={wanted} cannot run here", hint=f"this machine has: {', '.join(available())}"
        )
    return wanted


def address(array: NDArray[Any]) -> int:
    """Return where an array's first element is."""
    # __array_interface__ gives it in a third of the time of ndarray.ctypes
    found: int = array.__array_interface__["data"][0]
    return found


def _words(arguments: tuple[NDArray[Any] | int, ...]) -> list[int]:
    """Return what is passed: integers themselves, arrays' addresses."""
    return [argument if isinstance(argument, int) else address(argument) for argument in arguments]


class Pinned(int):
    """The address of an array that is there for good, to be passed instead of it: looking it up takes a microsecond."""

    array: NDArray[Any]

    def __new__(cls, array: NDArray[Any]) -> Pinned:
        """Look it up."""
        self = super().__new__(cls, address(array))
        self.array = array
        return self


def compiled() -> bool:
    """Return whether calls can be made, for what can be done without any: False where kernels are missing, and at the reference level."""
    return available()[-1] != "reference" and level() != "reference"


class Kernel:
    """Call one function of the library with arrays and integers.

    Args:
        symbol: its name.

    Raises:
        KernelError: the library has no such function.
    """

    def __init__(self, symbol: str) -> None:
        try:
            self._function = getattr(_library(), symbol)
        except AttributeError as error:
            raise KernelError(f"the compiled kernels have no {symbol}", hint=_HINT) from error
        self._function.restype = ctypes.c_int
        self.address: int = ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def __call__(self, *arguments: NDArray[Any] | int) -> int:
        """Return what the function returns: of a kernel, its status bits."""
        if self._function.argtypes is None:  # Python integers pass as C int unless told otherwise: every argument is 64 bits wide
            self._function.argtypes = (ctypes.c_uint64,) * len(arguments)
        status: int = self._function(*_words(arguments))
        return status


@cache
def kernel(name: str, at_level: str | None = None) -> Kernel:
    """Return what calls one kernel.

    Args:
        name: without prefix and level, as "nf4_quantize".
        at_level: another level than the one in use, for tests and benchmarks.

    Raises:
        KernelError: the library has no such kernel.
    """
    return Kernel(f"qc_{name}__{at_level or level()}")


@cache
def system(name: str) -> Kernel:
    """Return what calls one of the functions that calls.c has beside kernels, without its prefix: "populate", "copy", "write".

    Raises:
        KernelError: there is none.
    """
    return Kernel(f"qc_{name}")


@cache
def _runner() -> Any:
    function = _library().qc_calls
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_uint64), ctypes.c_int64
    return function


class Template:
    """Hold calls of which some arguments are addresses that count from one of a few bases: what they are is said when they are made."""

    def __init__(self) -> None:
        self.words = array("Q")
        #: of each call
        self.phases: list[tuple[str, int]] = []
        #: word, base, offset
        self.moved: list[tuple[int, int, int]] = []
        self.kept: list[Any] = []

    def add(self, function: Kernel, arguments: Sequence[int | tuple[int, int]], *, phase: str, nbytes: int) -> None:
        """Add a call.

        Args:
            function: what to call.
            arguments: integers, or (number of a base, offset from it).
            phase, nbytes: see quantcache.trace.span.
        """
        first = len(self.words) + 4
        words = [argument if isinstance(argument, int) else 0 for argument in arguments]
        self.words.extend((function.address, len(words), 0, 0, *words, *_NOTHING[len(words) :]))
        self.moved += [(first + place, *word) for place, word in enumerate(arguments) if not isinstance(word, int)]
        self.phases.append((phase, nbytes))
        self.kept.append(arguments)


class Calls:
    """Collect calls, and make them in one go: threads that are through with one wait for nobody's GIL before the next.

    Arrays are kept as long as this is; addresses that are given as integers are the caller's to keep.
    """

    #: as calls.c has a call: function, number of arguments, status, time, arguments
    _WORDS = 12

    def __init__(self) -> None:
        self._words = array("Q")
        self._kept: list[tuple[Any, ...]] = []
        self._phases: list[tuple[str, int, str]] = []
        #: of the tensor or file whose calls are added, for the trace
        self.name = ""
        #: what a call reads begins there in its file, for whoever has to say that it failed
        self.places: dict[int, int] = {}

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._phases)

    def add(self, function: Kernel, *arguments: NDArray[Any] | int, phase: str, nbytes: int) -> None:
        """Add a call.

        Args:
            function: what to call.
            arguments: two to eight.
            phase, nbytes: see quantcache.trace.span; the time of a call without a phase is nobody's.
        """
        words = _words(arguments)
        self._words.extend((function.address, len(words), 0, 0, *words, *_NOTHING[len(words) :]))
        self._kept.append(arguments)
        self._phases.append((phase, nbytes, self.name))

    def repeat(self, template: Template, bases: Sequence[int], *kept: NDArray[Any]) -> None:
        """Add the calls of a template.

        Args:
            template: what.
            bases: addresses that its arguments count from.
            kept: what is there, unless the caller keeps it until the calls are made.
        """
        words, start, name = self._words, len(self._words), self.name
        words.extend(template.words)
        for word, base, offset in template.moved:
            words[start + word] = bases[base] + offset
        self._phases += [(phase, nbytes, name) for phase, nbytes in template.phases]
        self._kept.append((template, *kept))

    def run(self, first: int = 0) -> int:
        """Make the calls from one on, up to the first that does not return 0.

        Args:
            first: number of the call.

        Returns:
            The number of the call that did not return 0, or how many there are.
        """
        words, count = self._words, len(self._phases)
        if first == count:
            return first
        start_ns = time.perf_counter_ns()
        stopped: int = first + _runner()(words.buffer_info()[0] + 8 * self._WORDS * first, count - first)
        done = words[first * self._WORDS + 3 : min(stopped + 1, count) * self._WORDS : self._WORDS]
        spent(start_ns, self._phases[first:] if first else self._phases, done)
        return stopped

    def result(self, call: int) -> tuple[str, int]:
        """Return the phase of a call that was made, and what it returned."""
        status: int = self._words[call * self._WORDS + 2]
        return self._phases[call][0], status


def copy(pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], phase: str) -> None:
    """Copy bytes, in one foreign call: in between nobody waits for another thread's GIL.

    Args:
        pairs: contiguous arrays of one length each: where to, and what.
        phase: see quantcache.trace.span.
    """
    calls = Calls() if compiled() else None
    for target, data in pairs:
        if target.size != data.size:
            raise ValueError(f"{data.size} bytes do not fit {target.size}")
        if calls is None:
            with span(phase, data.size):
                target[...] = data
        else:
            calls.add(system("copy"), target, data, data.size, phase=phase, nbytes=data.size)
    if calls is not None:
        calls.run()


def contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array itself if a kernel can read it in place, else a copy that one can.

    An address that is not a multiple of the element size is fine on every CPU that the kernels run on,
    but C forbids it: copy there, so that the kernels stay inside the language.
    """
    return array if array.flags.c_contiguous and array.flags.aligned else np.ascontiguousarray(array).copy()
