"""Own the fixtures that every folder of tests uses: real files, the CPU level, a cache folder of the test's own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantcache.quant import native


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test away from the user's own cache; not in tmp_path, which tests hand to the loader as a folder."""
    monkeypatch.setenv("QUANTCACHE_DIR", str(tmp_path_factory.mktemp("cache") / "quantcache"))


@pytest.fixture
def kernel_level(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that switches the CPU level for the rest of the test."""

    def switch(level: str) -> None:
        monkeypatch.setenv("QUANTCACHE_KERNEL", level)
        native.level.cache_clear()
        native.kernel.cache_clear()

    yield switch
    native.level.cache_clear()
    native.kernel.cache_clear()


Writing = Callable[[Callable[..., int]], contextlib.AbstractContextManager[None]]


@pytest.fixture
def pwrite(monkeypatch: pytest.MonkeyPatch) -> Writing:
    """Return a context in which another function writes instead of os.pwrite, and instead of what stands for it among kernels."""

    @contextlib.contextmanager
    def replaced(write: Callable[..., int]) -> Iterator[None]:
        def found(descriptor: int, pieces: int, count: int) -> int:
            table = (ctypes.c_uint64 * (3 * count)).from_address(pieces)
            try:
                for place, address, nbytes in zip(table[::3], table[1::3], table[2::3], strict=True):
                    write(descriptor, ctypes.string_at(address, nbytes), place)
            except OSError as error:
                return error.errno or errno.EIO
            return 0

        real: Any = native.system
        with monkeypatch.context() as patch:
            patch.setattr(native, "system", lambda name: found if name == "write" else real(name))
            patch.setattr(os, "pwrite", write)
            yield

    return replaced


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Return the folder of real files, QUANTCACHE_TEST_DATA or ../shared/data beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("QUANTCACHE_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real files at {folder}: set QUANTCACHE_TEST_DATA")
    return folder
