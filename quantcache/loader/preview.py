"""Own what `info` shows of a checkpoint: each tensor as it is, and what a load would make of it. Reads no weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantcache.loader.changes import resolve
from quantcache.loader.lora import Alpha, open_adapter, paired
from quantcache.loader.plan import Request, layer_key, plan
from quantcache.loader.recipe import Recipe
from quantcache.loader.source import open_checkpoint

__all__ = ["TensorPreview", "preview"]


@dataclass(frozen=True)
class TensorPreview:
    """Say what one tensor is, and would become.

    Args:
        file: that it stands in.
        name, type, shape, size: as in the file, but for RWKV's names; the size in bytes.
        becomes: a codec's id, "keep" or "native".
        stored_size: bytes then; as in the file if it stays there.
        changes: how many adapters' tensors change it.
        reason: why it is not quantized, if it is not.
    """

    file: str
    name: str
    type: str
    shape: list[int]
    size: int
    becomes: str
    stored_size: int
    changes: int
    reason: str | None


def preview(
    path: str | os.PathLike[str],
    quant: str | Recipe = "nf4",
    *,
    lora: Sequence[tuple[str | os.PathLike[str], Alpha] | str | os.PathLike[str]] = (),
    names: str = "auto",
    **recipe: Any,
) -> list[TensorPreview]:
    """Return what `load` would make of a checkpoint, from its headers: values that a codec refuses are not seen.

    Args:
        path, quant, lora, names: as for `load`.
        recipe: the other arguments of `Recipe.of`.

    Raises:
        SourceError: the checkpoint or an adapter cannot be read, or they do not fit.
        UsageError: an argument cannot be meant.
    """
    sources = open_checkpoint(path, names)
    adapters = [open_adapter(*paired(given)) for given in lora]
    request = Request(Recipe.of(quant, **recipe), resolve(adapters, sources))
    found = []
    for source in sources:
        jobs = {job.info.name: job for job in plan(source, request)}
        for info in source.tensors.values():
            decision = jobs[info.name].decision if info.name in jobs else request.decide(info)
            stored = sum(slot.nbytes for slot in jobs[info.name].slots.values()) if info.name in jobs else info.nbytes
            found.append(
                TensorPreview(
                    source.path.name, info.name, info.dtype, list(info.view_shape), info.nbytes, decision.codec, stored,
                    len(request.changes.get(info.name, ())), decision.reason or None,
                )
            )  # fmt: skip
    return sorted(found, key=lambda tensor: layer_key(tensor.name))
