"""Load the compiled kernels and pick the CPU level, once. The only file that calls foreign code.

A kernel is found by its name, `qc_<codec>_<operation>__<level>`, so a new codec registers nothing here.
Arguments are NumPy arrays (their address is passed; the caller guarantees the sizes that the kernel's
comment states) and integers. ctypes releases the GIL during the call.

Source: docs/decisions/0001-ctypes-or-extension.md
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.errors import KernelError, UsageError

__all__ = ["ELEMENT", "LEVELS", "available", "kernel", "level"]

#: In the order of the bits that qc_cpu_levels() returns.
LEVELS = ("scalar", "avx2", "avx512", "neon")

#: Element types as kernel.h numbers them.
ELEMENT = {"F32": 0, "F16": 1, "BF16": 2}

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


@cache
def kernel(name: str, at_level: str | None = None) -> Callable[..., int]:
    """Return a function that calls one kernel.

    Args:
        name: without prefix and level, as "nf4_quantize".
        at_level: another level than the one in use, for tests and benchmarks.

    Returns:
        A function of arrays and integers that returns the kernel's status bits.

    Raises:
        KernelError: the library has no such kernel.
    """
    symbol = f"qc_{name}__{at_level or level()}"
    try:
        function = getattr(_library(), symbol)
    except AttributeError as error:
        raise KernelError(f"the compiled kernels have no {symbol}", hint=_HINT) from error
    function.restype = ctypes.c_int
    # Python integers pass as C int unless told otherwise: every argument is 64 bits wide
    wide = ctypes.c_uint64

    def call(*arguments: NDArray[Any] | int) -> int:
        # __array_interface__ gives the address in a third of the time of ndarray.ctypes
        words = [wide(a if isinstance(a, int) else a.__array_interface__["data"][0]) for a in arguments]
        status: int = function(*words)
        return status

    return call


def contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array itself if a kernel can read it in place, else a copy that one can.

    An address that is not a multiple of the element size is fine on every CPU that the kernels run on,
    but C forbids it: copy there, so that the kernels stay inside the language.
    """
    return array if array.flags.c_contiguous and array.flags.aligned else np.ascontiguousarray(array).copy()
