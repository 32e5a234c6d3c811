"""Quantize a model once, load it at the speed of the machine ever after, and never hand out a wrong byte."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcache.cache.store import Cache
    from quantcache.errors import (
        CacheError,
        CodecError,
        CorruptEntryError,
        DeviceError,
        DeviceOutOfMemory,
        DeviceUnavailable,
        KernelError,
        KeyNotFoundError,
        LockTimeoutError,
        NoCacheError,
        QuantcacheError,
        QuantcacheWarning,
        SourceError,
        SourceNotFoundError,
        StoreReadOnlyError,
        StoreTooNewError,
        UsageError,
    )
    from quantcache.loader import gpu
    from quantcache.loader.model import Model, load
    from quantcache.loader.recipe import Recipe
    from quantcache.tensor import QuantTensor, TensorInfo

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "CacheError",
    "CodecError",
    "CorruptEntryError",
    "DeviceError",
    "DeviceOutOfMemory",
    "DeviceUnavailable",
    "KernelError",
    "KeyNotFoundError",
    "LockTimeoutError",
    "Model",
    "NoCacheError",
    "QuantTensor",
    "QuantcacheError",
    "QuantcacheWarning",
    "Recipe",
    "SourceError",
    "SourceNotFoundError",
    "StoreReadOnlyError",
    "StoreTooNewError",
    "TensorInfo",
    "UsageError",
    "__version__",
    "gpu",
    "load",
]

_HOMES = {
    "Cache": "quantcache.cache.store",
    "Model": "quantcache.loader.model",
    "QuantTensor": "quantcache.tensor",
    "Recipe": "quantcache.loader.recipe",
    "TensorInfo": "quantcache.tensor",
    "load": "quantcache.loader.model",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `quantcache ls` must not pay for NumPy."""
    if name not in __all__:
        raise AttributeError(f"module 'quantcache' has no attribute {name!r}")
    if name == "gpu":
        found: Any = importlib.import_module("quantcache.loader.gpu")
    else:
        found = getattr(importlib.import_module(_HOMES.get(name, "quantcache.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
