"""Own `explain` for checkpoints: the key documents that a load would ask the store for. Stores nothing but sources' digests."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantcache.cache.explain import Explanation, explain
from quantcache.cache.key import RACY_NS, Stamp
from quantcache.cache.store import Cache
from quantcache.loader.changes import key_entry, resolve
from quantcache.loader.digests import known_digest
from quantcache.loader.lora import Alpha, open_adapter, paired
from quantcache.loader.pipeline import default_threads
from quantcache.loader.plan import Request, native_names
from quantcache.loader.recipe import Recipe
from quantcache.loader.source import open_checkpoint

__all__ = ["FileExplanation", "explain_load"]


@dataclass(frozen=True, slots=True)
class FileExplanation:
    """Explain one file of a checkpoint.

    Args:
        path: of the file.
        explanation: of its entry; None if all its tensors pass through, so that it needs none.
        notes: what else a user may wonder about.
    """

    path: str
    explanation: Explanation | None
    notes: tuple[str, ...] = ()


def explain_load(
    cache: Cache,
    path: str | os.PathLike[str],
    quant: str | Recipe = "nf4",
    *,
    lora: Sequence[tuple[str | os.PathLike[str], Alpha] | str | os.PathLike[str]] = (),
    names: str = "auto",
    threads: int = 0,
    **recipe: Any,
) -> list[FileExplanation]:
    """Say for every file of a checkpoint whether a load would hit, and why not.

    Args:
        cache: the store.
        path, quant, lora, names: as for `load`.
        threads: for a digest that has to be taken.
        recipe: the other arguments of `Recipe.of`.

    Raises:
        SourceError: the checkpoint or an adapter cannot be read, or they do not fit.
        UsageError: an argument cannot be meant.
    """
    seen_ns = time.time_ns()
    count = threads or default_threads()
    sources = open_checkpoint(path, names)
    adapters = [open_adapter(*paired(given)) for given in lora]
    changes = resolve(adapters, sources)
    entries = tuple(key_entry(a, known_digest(a.source, cache, count, seen_ns), changes) for a in adapters)
    request = Request(Recipe.of(quant, **recipe), changes, entries)
    found = []
    for source in sources:
        if len(native_names(source.tensors.values(), request)) == len(source.tensors):
            found.append(FileExplanation(str(source.path), None, ("all its tensors pass through as they are",)))
            continue
        stamp = Stamp.of(source.file.stat)
        notes = []
        if not stamp.settled(seen_ns):
            notes.append(f"it changed less than {RACY_NS // 10**9} s ago: its digest is not remembered yet")
        elif cache.source_digest(stamp) is None:
            notes.append("its digest was not known, and was taken now")
        digest = known_digest(source, cache, count, seen_ns)
        document = request.key_document(digest, source.file.nbytes, source.reading())
        found.append(FileExplanation(str(source.path), explain(cache, document), tuple(notes)))
    return found
