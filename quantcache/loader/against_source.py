"""Own `verify --against-source`: quantize the source of an entry again, and compare every byte. Stores nothing."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantcache.cache.blobs import StoredEntry
from quantcache.cache.container import Slot
from quantcache.cache.maintenance import Finding
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, QuantcacheError
from quantcache.loader.changes import key_entry, resolve
from quantcache.loader.digests import source_digest
from quantcache.loader.lora import open_adapter
from quantcache.loader.pipeline import default_threads
from quantcache.loader.plan import Job, Request, plan
from quantcache.loader.recipe import Recipe
from quantcache.loader.source import Source, open_checkpoint
from quantcache.loader.tiles import Piece, encode_all, whole_pieces
from quantcache.quant.codec import Scratch, Status

__all__ = ["compare"]


class _DifferenceError(Exception):
    """Say which tensor of an entry is not what its source gives."""


class _Comparison:
    """Compare what is written with what is stored, tile by tile: nothing is ever whole in memory."""

    def __init__(self, entry: StoredEntry) -> None:
        self.entry = entry

    def check(self, piece: Piece) -> None:
        """Compare one piece.

        Raises:
            _DifferenceError: it is not what is stored.
        """
        if piece.key not in self.entry.header.slots:
            raise _DifferenceError(f"tensor {piece.key!r} is not in the entry")
        made = memoryview(piece.buffer).cast("B")
        if self.entry.view(piece.key)[piece.position : piece.position + len(made)] != made:
            raise _DifferenceError(f"tensor {piece.key!r} is not what its source gives")


def compare(cache: Cache, keys: Iterable[str], *, threads: int = 0) -> list[Finding]:
    """Quantize the sources of entries again and compare every byte.

    Args:
        cache: the store; nothing is written to it.
        keys: of the entries.
        threads: 0 is one per core.

    Returns:
        A finding for every entry that is not what its source gives, and for each that cannot be compared: its source,
        or an adapter, is gone or has changed, or another loader made it.
    """
    found = []
    for key in keys:
        try:
            _compare(cache.open(key), threads or default_threads())
        except _DifferenceError as error:
            found.append(Finding(key, str(error)))
        except QuantcacheError as error:
            found.append(Finding(key, f"cannot be compared: {error}", damaged=False))
    return found


def _compare(entry: StoredEntry, threads: int) -> None:
    document, built = entry.header.document, entry.header.built
    try:
        recipe = Recipe.from_canonical(document["recipe"])
        path, wanted, names = Path(built["path"]), document["source"]["digest"], document.get("names", "")
        adapters = [(str(file), alpha) for file, alpha in built.get("adapters", [])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CacheError("another loader made it") from error
    whole = Path(built.get("checkpoint", path))  # an adapter may be for tensors of other files, too
    opened = open_checkpoint(whole if adapters and whole.exists() else path, "auto" if names else "file")
    source = next((source for source in opened if source.path.resolve() == path), None)
    if source is None:
        raise CacheError(f"{path} is not where it was")
    if source_digest(source, threads) != wanted:
        raise CacheError(f"{path} has changed since")
    merged = [open_adapter(file, alpha) for file, alpha in adapters]
    changes = resolve(merged, opened)
    request = Request(recipe, changes, tuple(key_entry(a, source_digest(a.source, threads), changes) for a in merged))
    if request.key_document(wanted, source.file.nbytes, source.reading()) != document:
        raise CacheError("an adapter has changed since, or this version of quantcache makes another entry of it")
    target = _Comparison(entry)
    records = {record["name"]: record for record in entry.header.records}
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_tensor, source, job, target, records) for job in plan(source, request)]:
            done.result()


def _tensor(source: Source, job: Job, target: _Comparison, records: dict[str, Any]) -> None:
    """Quantize one tensor again; it may be stored in a later way only if its values refuse every earlier one."""
    scratch, slots = Scratch(), target.entry.header.slots
    record = records.get(job.info.name, {})
    while record.get("codec") != job.decision.codec or not all(_same(slot, slots.get(key)) for key, slot in job.slots.items()):
        status = encode_all(source, job, scratch, id)  # nothing is compared
        if status == Status.OK:
            raise _DifferenceError(f"tensor {job.info.name!r} is not stored as its source asks for")
        job = job.after(status)
    if encode_all(source, job, scratch, target.check) != Status.OK:
        raise _DifferenceError(f"tensor {job.info.name!r} is stored as its source's values refuse")
    for piece in whole_pieces(job):
        target.check(piece)


def _same(planned: Slot, stored: Slot | None) -> bool:
    return stored is not None and (planned.dtype, planned.shape) == (stored.dtype, stored.shape)
