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

#: Arguments that calls.c passes at most; those that a call has not; what is written when it is made.
_ARGUMENTS = 8
_NOTHING, _NOT_YET = (0,) * _ARGUMENTS, (0,) * 5
#: What calls.c returns if a decoder failed: kernels return less.
_UNDECODED = 1 << 16

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
    """Return what calls one of the functions that calls.c has beside kernels, without its prefix: "populate", "copy", "copy_pieces", "write".

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
    """Hold calls of which some arguments count from one of a few bases, most of them addresses: what those are is said when they are made.

    They are one call for whoever makes them: all are made, and it returns what any of them does; of a decoder that fails, that alone.

    Args:
        steps: how much further each base is the next time, where they are made several times in a row.
        many: the base that is no address, but how many there are: each time but the last has its step of them, the last what is left.
    """

    #: as calls.c has a call: function, number of arguments, phase, base and offset of each
    _WORDS = 3 + 2 * _ARGUMENTS
    PHASES = ("decode", "quantize", "digest")

    def __init__(self, steps: Sequence[int] = (), many: int = -1) -> None:
        self._words = array("Q")
        self._head = array("Q", (0, 0, 1 + many, 0, *steps, *_NOTHING[len(steps) + 1 :]))
        self._kept: list[Any] = []
        self.address = self._head.buffer_info()[0]
        #: that each phase goes over
        self.nbytes = dict.fromkeys(self.PHASES, 0)

    def add(self, function: Kernel, arguments: Sequence[int | tuple[int, int]], *, phase: str, nbytes: int) -> None:
        """Add a call.

        Args:
            function: what to call.
            arguments: integers, or (number of a base, offset from it).
            phase: of PHASES.
            nbytes: see quantcache.trace.span.
        """
        self._words.extend((function.address, len(arguments), self.PHASES.index(phase)))
        for argument in arguments:
            base, offset = (0, argument) if isinstance(argument, int) else (1 + argument[0], argument[1])
            self._words.extend((base, offset % (1 << 64)))
        self._words.extend([0] * (2 * (_ARGUMENTS - len(arguments))))
        self._head[0], self._head[1] = len(self._words) // self._WORDS, self._words.buffer_info()[0]
        self._kept.append(arguments)
        self.nbytes[phase] += nbytes


class Calls:
    """Collect calls, and make them in one go: threads that are through with one wait for nobody's GIL before the next.

    Arrays are kept as long as this is; addresses that are given as integers are the caller's to keep.
    """

    #: as calls.c has a call: function, number of arguments, status, time, times of phases, arguments
    _WORDS = 7 + _ARGUMENTS

    def __init__(self) -> None:
        self._words = array("Q")
        self._kept: list[tuple[Any, ...]] = []
        self._phases: list[tuple[str | Template, int, str]] = []
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
        self._words.extend((function.address, len(words), *_NOT_YET, *words, *_NOTHING[len(words) :]))
        self._kept.append(arguments)
        self._phases.append((phase, nbytes, self.name))

    def repeat(self, template: Template, bases: Sequence[int], *kept: NDArray[Any], times: int = 1) -> None:
        """Add the calls of a template, as one; nothing if it has none.

        Args:
            template: what.
            bases: what its arguments count from.
            times: how often in a row, each time by its steps further.
            kept: what is there, unless the caller keeps it until the calls are made.
        """
        if not any(template.nbytes.values()):
            return
        self._words.extend((0, times, *_NOT_YET, template.address, *bases, *_NOTHING[len(bases) + 1 :]))
        self._phases.append((template, times, self.name))
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
        spans, ends, begin = list[tuple[str, int, str]](), list[int](), 0
        for call in range(first, min(stopped + 1, count)):
            (what, many, name), word = self._phases[call], call * self._WORDS + 3
            if isinstance(what, Template):  # the calls of a phase count as if they had followed each other
                for number, (phase, nbytes) in enumerate(what.nbytes.items()):
                    if nbytes:
                        begin += words[word + 1 + number]
                        spans.append((phase, many * nbytes, name))
                        ends.append(begin)
            else:
                spans.append((what, many, name))
                ends.append(words[word])
            begin = words[word]
        spent(start_ns, spans, ends)
        return stopped

    def result(self, call: int) -> tuple[str, int]:
        """Return the phase of a call that was made, and what it returned; of a template, "decode" if a decoder failed."""
        status, what = self._words[call * self._WORDS + 2], self._phases[call][0]
        if isinstance(what, Template):
            return ("decode" if status >= _UNDECODED else "quantize"), status
        return what, status


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
