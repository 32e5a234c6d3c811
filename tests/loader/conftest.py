"""Own what the tests of the loader share: a writer of GGUF files that follows ggml's docs/gguf.md and nothing else, and GPUs."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import quantcache as qc
from quantcache.loader import gpu

UINT32, STRING, ARRAY = 4, 8, 9
_SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NUMBERS = {
    np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int8): 24, np.dtype(np.int16): 25, np.dtype(np.int32): 26,
    np.dtype(np.int64): 27, np.dtype(np.float64): 28, np.dtype(ml_dtypes.bfloat16): 30,
}  # fmt: skip


def _text(order: str, value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(f"{order}Q", len(raw)) + raw


def _value(order: str, kind: int, value: Any) -> bytes:
    """Return a value; an array's is (type of its elements, elements)."""
    if kind in _SCALAR:
        return struct.pack(f"{order}{_SCALAR[kind]}", value)
    if kind == STRING:
        return _text(order, value)
    inner, elements = value
    head = struct.pack(f"{order}IQ", inner, len(elements))
    return head + b"".join(_value(order, inner, element) for element in elements)


def _write_gguf(
    path: Path,
    tensors: Mapping[str, Any],
    keys: Mapping[str, Any] | None = None,
    *,
    order: str = "<",
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """Write a file.

    Args:
        path: where to.
        tensors: name -> array, or (number of the type, shape in NumPy's order, bytes as they stand in the file).
        keys: name -> text, a number (written as uint32), or (number of the value's type, value).
        order: "<" or ">".
        version: of the format.
        alignment: of the tensors; in the keys if it is not 32.
    """
    keys = dict(keys or {}) | ({"general.alignment": alignment} if alignment != 32 else {})
    described, content = b"", b""
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            kind, shape, raw = tensor
        else:
            kind, shape = _NUMBERS[tensor.dtype], tensor.shape
            plain = tensor.view(np.uint16) if tensor.dtype == ml_dtypes.bfloat16 else tensor
            raw = plain.astype(plain.dtype.newbyteorder(order)).tobytes()
        described += _text(order, name) + struct.pack(f"{order}I", len(shape))
        described += struct.pack(f"{order}{len(shape)}QIQ", *reversed(shape), kind, len(content))
        content += raw.ljust(-(-len(raw) // alignment) * alignment, b"\0")
    header = b"GGUF" + struct.pack(f"{order}IQQ", version, len(tensors), len(keys))
    for name, given in keys.items():
        kind, value = given if isinstance(given, tuple) else (STRING if isinstance(given, str) else UINT32, given)
        header += _text(order, name) + struct.pack(f"{order}I", kind) + _value(order, kind, value)
    header += described
    path.write_bytes(header.ljust(-(-len(header) // alignment) * alignment, b"\0") + content)
    return path


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """Return a function that writes a GGUF file from arrays and keys."""
    return _write_gguf


@pytest.fixture
def in_child() -> Callable[[Callable[[], None]], None]:
    """Run something in a child of fork, which must end well within a minute; where there is no fork, the test is skipped."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")

    def run(call: Callable[[], None]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 1
            try:
                call()
                code = 0
            finally:
                os._exit(code)
        until = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended == (child, 0)

    return run


@pytest.fixture(scope="session")
def opened() -> Any:
    """Return a GPU; a software one will do."""
    try:
        return gpu.open_device()
    except qc.DeviceUnavailable as error:
        pytest.skip(f"no GPU here: {error}")


@pytest.fixture(params=["staged", "as it is"])
def device(opened: Any, request: pytest.FixtureRequest) -> Any:
    """Return it, once as a card of its own, which is written by way of staging, once as it is: a software one is mapped."""
    if request.param == "staged":
        staged = gpu.Device(opened.raw)
        staged.unified = False
        return staged
    return opened


@pytest.fixture
def small(device: Any) -> Callable[..., Any]:
    """Return a function that gives the same GPU smaller limits."""

    def with_limits(**limits: Any) -> Any:
        found = gpu.Device(device.raw, **limits)
        found.unified = device.unified
        return found

    return with_limits


@pytest.fixture(scope="session")
def in_threads() -> Callable[[int, Callable[[int], None]], None]:
    """Return a function that runs something in several threads, each with its number, and fails if one does, or does not end."""

    def run(count: int, work: Callable[[int], None]) -> None:
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(work, number) for number in range(count)]:
                done.result(120)

    return run


@pytest.fixture
def one_thread() -> Callable[..., contextlib.AbstractContextManager[list[threading.Thread]]]:
    """Within the block only one more thread can be started; it gives the list of those that were."""

    @contextlib.contextmanager
    def limited() -> Iterator[list[threading.Thread]]:
        start, started = threading.Thread.start, list[threading.Thread]()

        def once(self: threading.Thread) -> None:
            if started:
                raise RuntimeError("can't start new thread")
            started.append(self)
            start(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "start", once)
            yield started

    return limited
