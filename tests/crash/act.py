"""Do one thing to a store behind the shim: python act.py ACT ROOT LOG. What it does to the disk is recorded from here on."""

from __future__ import annotations

import ctypes
import sqlite3
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from quantcache.cache import maintenance
from quantcache.cache.blobs import StagedEntry, StoredEntry
from quantcache.cache.container import Slot
from quantcache.cache.key import key_of
from quantcache.cache.store import Cache

__all__ = ["ACTS", "BEFORE", "DAMAGED", "NEW", "content", "document", "key_of", "make", "prepare"]

#: entries that are there before anything is recorded: two, the second pinned; "damaged" has one byte flipped; "new" is made
BEFORE, NEW, DAMAGED = ("one", "pinned"), "new", "damaged"


def document(name: str) -> dict[str, Any]:
    """Return the key document of an entry."""
    return {"name": name, "source": {"digest": name, "size": 1}}


def content(name: str) -> dict[str, Any]:
    """Return the arrays of an entry."""
    rng = np.random.default_rng(sum(name.encode()))
    return {"codes": rng.integers(0, 256, 9000, np.uint8), "scales": rng.standard_normal(33).astype(np.float16)}


def make(cache: Cache, name: str, *, replaced: bool = False) -> StoredEntry:
    """Build an entry; `replaced` plans a tensor anew, so that the file is rearranged."""
    arrays = content(name)
    slots = {"codes": Slot("U8", (9000,), 4096), "scales": Slot("F16", (33,), 4096)}

    def build(stage: Any) -> tuple[StagedEntry, Any]:
        staged = stage({**slots, "scales": Slot("F32", (33,), 4096)} if replaced else slots)
        if replaced:
            staged.replace(["scales"], {"scales": slots["scales"]})
        for start in range(0, 9000, 4096):
            staged.write("codes", start, arrays["codes"][start : start + 4096])
        staged.write("scales", 0, arrays["scales"].view(np.uint8))
        return staged, ["a record"]

    return cache.get_or_build(document(name), build)


def prepare(root: Path, act: str) -> None:
    """Make the store on which something is done."""
    if act == "first":
        return
    with Cache(root, keep_free="0") as cache:
        for name in BEFORE:
            make(cache, name)
        cache.pin(cache.find(document("pinned")).key)  # type: ignore[union-attr]
        if act in ("repair", "verify"):
            path = make(cache, DAMAGED).path
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
    if act == "migrate":
        (root / "v1" / "index.sqlite3").unlink()
        old = sqlite3.connect(root / "v1" / "index.sqlite3")
        from quantcache.cache import index

        for statement in index._MIGRATIONS[0]:
            old.execute(statement)
        old.execute("PRAGMA user_version=1")
        old.commit()
        old.close()


def perform(root: Path, act: str) -> None:
    """Do it."""
    with Cache(root, keep_free="0") as cache:
        if act in ("first", "publish"):
            make(cache, NEW)
        elif act == "rearrange":
            make(cache, NEW, replaced=True)
        elif act == "prune":
            maintenance.prune(cache, max_size=0)
        elif act == "remove":
            maintenance.remove(cache, cache.entries())
        elif act == "clear":
            maintenance.clear(cache, pinned_too=False)
        elif act == "repair":
            maintenance.repair(cache)
        elif act == "verify":
            maintenance.verify(cache)
        elif act == "rebuild":
            cache.rebuild_index()
        elif act == "pin":
            cache.pin(cache.find(document("one")).key)  # type: ignore[union-attr]
        elif act == "unpin":
            cache.unpin(cache.find(document("pinned")).key)  # type: ignore[union-attr]
        elif act == "hit":
            cache.used(cache.find(document("one")), saved_s=1.0)  # type: ignore[arg-type]
        elif act == "migrate":
            cache.entries()
        else:
            raise SystemExit(f"no act {act}")


ACTS = ("first", "publish", "rearrange", "prune", "remove", "clear", "repair", "verify", "rebuild", "pin", "unpin", "hit", "migrate")


def main() -> None:
    """Prepare, switch the recorder on, do it, and say so."""
    act, root, log = sys.argv[1:]
    shim = ctypes.CDLL(None)
    warnings.simplefilter("ignore")
    shim.qc_shim(root.encode(), log.encode(), 0, 0, 0, 0)
    perform(Path(root), act)
    shim.qc_shim(None, None, 0, 0, 0, 0)


if __name__ == "__main__":
    main()
