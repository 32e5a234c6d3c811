"""Own the plan of a build: jobs and their tiles, the slots of the entry, the key document. Reads no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.cache.container import Slot
from quantcache.cache.key import CONTAINER_VERSION, canonical, digest
from quantcache.errors import CodecError
from quantcache.loader.changes import Change
from quantcache.loader.recipe import Decision, Recipe
from quantcache.loader.source import Source
from quantcache.once import once
from quantcache.quant.codec import Encoder, Part, Status, codec
from quantcache.quant.floats import from_f32
from quantcache.tensor import ITEMSIZE, TensorInfo

__all__ = ["TILE", "Job", "Request", "layer_key", "native_names", "plan"]

Array = NDArray[Any]

#: Weights in a tile, rounded down to whole blocks: large enough that the 50 us of Python around a tile do not
#: count, small enough that every thread's buffers stay within its share of the memory bound.
TILE = 1 << 20

_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)(?:\.|$)")


def layer_key(name: str) -> tuple[int, str, int]:
    """Return where a tensor's layer stands: embeddings first, then numbered layers, then the rest."""
    found = _LAYER.match(name)
    if found:
        return 1, found["stack"], int(found["number"])
    return (0 if "emb" in name or "wte" in name or "wpe" in name else 2), "", 0


@dataclass(frozen=True)
class Request:
    """Hold what is wanted of a checkpoint: everything but the source that an entry's bytes depend on.

    Args:
        recipe: which tensor becomes what.
        changes: name of a weight -> what adapters do to it.
        adapters: what of them belongs in the key.
        given: path and alpha of the adapters, as they were given; for the record only, as is what follows.
        checkpoint: path of the whole.
    """

    recipe: Recipe
    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    adapters: tuple[Mapping[str, Any], ...] = ()
    given: tuple[tuple[str, Any], ...] = ()
    checkpoint: str = ""

    @property
    def label(self) -> str:
        """How listings call it: the recipe, and which adapters."""
        if not self.adapters:
            return self.recipe.label
        return f"{self.recipe.label}+lora-{digest(canonical(list(self.adapters)).encode()).hex()[:8]}"

    def adapter_sources(self) -> list[Source]:
        """Return the files of the adapters."""
        found = {id(change.source): change.source for changes in self.changes.values() for change in changes}
        return list(found.values())

    def decide(self, info: TensorInfo) -> Decision:
        """Decide for one tensor."""
        return self.recipe.decide(info, merged=info.name in self.changes)

    def key_document(self, found: str, nbytes: int, reading: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return everything that an entry's bytes depend on.

        Args:
            found: the source's digest.
            nbytes: its size.
            reading: see Source.reading.
        """
        return {
            "container": CONTAINER_VERSION,
            "source": {"digest": found, "size": nbytes},
            "recipe": self.recipe.canonical(),
            "codecs": self.recipe.codecs(),
            "adapters": [dict(entry) for entry in self.adapters],
            "tile": TILE,
            **(reading or {}),
        }


class _KeepEncoder(Encoder):
    """Store changed weights in an element type, for tensors that are not quantized."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self._dtype = dtype
        self.parts = (Part("values", name, dtype, shape, 1),)

    def reference(self, tile: Array) -> tuple[Status, dict[str, Array]]:
        """Round a tile; F16_RANGE if a finite weight becomes Inf."""
        values = from_f32(tile, self._dtype)
        if self._dtype == "F16" and (np.isinf(values) & np.isfinite(tile)).any():
            return Status.F16_RANGE, {}
        return Status.OK, {"values": values}


@dataclass
class Job:
    """Plan one tensor: its encoder, its slots, and how it is cut into tiles.

    Args:
        info: the source tensor.
        decision: what becomes of it.
        layer: number of its layer in the file.
        variant: index into the codec's variants.
        changes: what adapters do to it.
    """

    info: TensorInfo
    decision: Decision
    layer: int
    variant: int = 0
    changes: tuple[Change, ...] = ()

    def __post_init__(self) -> None:
        """Make the encoder and the slots."""
        info, scaled = self.info, self.decision.exponent != 0
        #: the source's own bytes are what is stored
        self.copies = self.decision.codec == "keep" and not (self.changes or scaled or info.is_block)
        #: tiles come as the source has them; else as float32, into which everything else is widened (float64: narrowed)
        self.as_stored = self.copies or (info.dtype in ("F32", "F16", "BF16") and not (self.changes or scaled))
        self.size = info.size
        #: what a quantizer keeps of the result
        self.kept: Any = None
        self.encoder: Encoder | None = None
        if self.copies:
            itemsize = ITEMSIZE[info.dtype]
            self.tile = TILE * 4 // itemsize
            self.parts = {"values": info.name}
            self.slots: tuple[Slot, ...] = (Slot(info.name, info.dtype, info.shape, self.tile * itemsize, self.layer),)
            return
        if self.decision.codec == "keep":
            self.encoder, multiple = _KeepEncoder(info.name, info.shape, self._variants()[self.variant]), 64
        else:
            chosen = codec(self.decision.codec)
            element = info.dtype if self.as_stored else "F32"
            self.encoder = chosen.encoder(info.name, info.shape, element, self._variants()[self.variant])
            multiple = chosen.multiple(info.shape)
        multiple = math.lcm(multiple, 256 if info.is_block else 1)
        if self.changes and info.shape and info.size // max(1, info.shape[0]) <= TILE:
            # whole rows, so that a product is one rectangle of every tile
            rows = math.lcm(multiple, info.size // max(1, info.shape[0]) or 1)
            multiple = rows if rows <= TILE else multiple
        self.tile = max(1, TILE // multiple) * multiple
        self.parts = {part.name: part.key for part in self.encoder.parts}
        made = []
        for part in self.encoder.parts:  # a plan makes thousands: no generator
            chunk = self.tile // part.weights * ITEMSIZE[part.dtype] if part.weights else part.nbytes
            made.append(Slot(part.key, part.dtype, part.shape, chunk or 1, self.layer))
        self.slots = tuple(made)

    @once
    def made_nbytes(self) -> int:
        """Bytes that are made of the source's, and not the source's own."""
        return 0 if self.copies else sum(slot.nbytes for slot in self.slots)

    def _variants(self) -> tuple[str, ...]:
        """Return the layouts to try in turn; for changed weights that are kept, element types."""
        if self.decision.codec != "keep":
            return codec(self.decision.codec).variants
        return (self.info.dtype, "F32") if self.info.dtype in ("F16", "BF16") else ("F32",)

    @property
    def tiles(self) -> range:
        """First weights of the tiles; one tile for an empty tensor, so that it finishes like the others."""
        return range(0, max(1, self.size), self.tile)

    def after(self, status: Status) -> Job:
        """Return the job to try after an encoder refused the values.

        Raises:
            CodecError: nothing is left to try.
        """
        if status == Status.F32_SCALES or self.decision.codec == "keep":
            if self.variant + 1 >= len(self._variants()):
                raise CodecError(f"tensor {self.info.name!r} cannot become {self.decision.codec}: {status!r}")
            return Job(self.info, self.decision, self.layer, self.variant + 1, self.changes)
        if status & Status.NONFINITE:
            reason = "it holds NaN, Inf or values near float32's limit"
        else:
            reason = "it holds a value beyond float16's range"
        kept = Job(self.info, Decision("keep", self.decision.exponent, reason), self.layer, 0, self.changes)
        # what was changed cannot be the source's bytes: float32 holds all of it
        return kept if kept.copies else Job(kept.info, kept.decision, kept.layer, len(kept._variants()) - 1, kept.changes)

    def record(self) -> dict[str, Any]:
        """Return what the entry says about the tensor."""
        found: dict[str, Any] = {
            "name": self.info.name,
            "codec": self.decision.codec,
            "dtype": self.info.dtype,
            "shape": list(self.info.shape),
            "parts": self.parts,
        }
        if self.decision.reason:
            found["reason"] = self.decision.reason
        if self.info.transposed:
            found["transposed"] = True
        if self.changes:
            found["changes"] = len(self.changes)
        return found


def plan(source: Source, request: Request) -> list[Job]:
    """Return the jobs of a source file, by layer; tensors that pass through natively have none.

    A tensor whose stored parts would get the name of another tensor stays as it is.
    """
    decided = [(info, request.decide(info)) for info in source.tensors.values()]
    stored = [(info, decision) for info, decision in decided if decision.codec != "native"]
    places = [layer_key(info.name) for info, _ in stored]
    layers = {place: number for number, place in enumerate(sorted(set(places)))}
    jobs = [
        Job(info, decision, layers[place], changes=request.changes.get(info.name, ()))
        for (info, decision), place in zip(stored, places, strict=True)
    ]
    taken = {info.name for info, _ in decided}
    for position, job in enumerate(jobs):
        extra = {slot.key for slot in job.slots} - {job.info.name}
        if extra & taken:
            reason = f"the file has a tensor {min(extra & taken)!r} already"
            jobs[position] = Job(job.info, Decision("keep", job.decision.exponent, reason), job.layer, changes=job.changes)
        else:
            taken |= extra
    return sorted(jobs, key=lambda job: job.layer)


def native_names(tensors: Iterable[TensorInfo], request: Request) -> list[TensorInfo]:
    """Return the tensors that are views of the source."""
    passing = request.recipe.passes_elements  # else only blocks can be, and nothing else need be looked at
    return [info for info in tensors if (passing or info.is_block) and request.decide(info).codec == "native"]
