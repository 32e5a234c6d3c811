"""Own what the tests of the store share: entries that no model has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcache.cache.blobs import StagedEntry, StoredEntry
from quantcache.cache.container import Slot
from quantcache.cache.store import Cache


def _content(number: int, nbytes: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return {"codes": rng.integers(0, 256, nbytes, np.uint8), "scales": rng.standard_normal(33).astype(np.float16)}


@pytest.fixture
def content() -> Callable[[int, int], dict[str, Any]]:
    """Return a function that gives the arrays of a numbered entry."""
    return _content


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    """Return an empty store without limits."""
    return Cache(tmp_path / "store", max_size=1 << 40, keep_free="0")


@pytest.fixture
def put() -> Callable[..., StoredEntry]:
    """Return a function that builds a numbered entry in a given cache."""

    def build_entry(cache: Cache, number: int, *, nbytes: int = 10_000, path: str = "") -> StoredEntry:
        arrays = _content(number, nbytes)
        slots = {"codes": Slot("U8", (nbytes,), 4096), "scales": Slot("F16", (33,), 4096)}

        def build(stage: Callable[..., StagedEntry]) -> tuple[StagedEntry, Any]:
            staged = stage(slots)
            for start in range(0, nbytes, 4096):
                staged.write("codes", start, arrays["codes"][start : start + 4096])
            staged.write("scales", 0, arrays["scales"].view(np.uint8))
            return staged, ["a record"]

        document = {"number": number, "nbytes": nbytes}
        if not path:
            return cache.get_or_build(document, build)
        staged, records = build(cache.stage)
        cache.publish(staged, document=document, records=records, built={"path": path, "seconds": 1.0})
        entry = cache.find(document)
        assert entry is not None
        return entry

    return build_entry
