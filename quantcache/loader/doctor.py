"""Own `doctor`: the store's needs, the kernels and the GPU of this machine, each with what to do about it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from quantcache.cache.doctor import Check, check_store
from quantcache.errors import DeviceError, DeviceUnavailable, QuantcacheError
from quantcache.loader.pipeline import default_threads
from quantcache.quant import native

__all__ = ["check_machine"]


def check_machine(root: Path, *, shared: bool = False) -> Iterator[Check]:
    """Try out what loading needs here.

    Args:
        root: of the store.
        shared: by a group.
    """
    yield from check_store(root, shared=shared)
    try:
        level = native.level()
    except QuantcacheError as error:
        yield Check("kernels", "fail", error.message, error.hint or "")
    else:
        slow = level in ("reference", "scalar")
        found = f"{level}, of {', '.join(native.available())}"
        yield Check("kernels", "warn" if slow else "ok", found, "unset QUANTCACHE_KERNEL for the fastest" if slow and level != native.available()[-1] else "")
    yield Check("threads", "ok", str(default_threads()))
    if importlib.util.find_spec("wgpu") is None:
        yield Check("gpu", "ok", "wgpu is not installed: everything runs on the CPU", "pip install 'quantcache[gpu]' for uploads")
    else:
        yield _check_gpu()


def _check_gpu() -> Check:
    """Look for a GPU, as `Model.upload` does."""
    from quantcache.loader.gpu.device import open_device

    try:
        device = open_device()
    except DeviceUnavailable as error:
        return Check("gpu", "ok", f"{error.message}: everything runs on the CPU", error.hint or "")
    except DeviceError as error:
        return Check("gpu", "warn", error.message, error.hint or "")
    return Check("gpu", "ok", f"{device.name}, buffers of up to {device.max_buffer:,} bytes")
