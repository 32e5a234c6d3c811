"""Own the plan of a build: jobs and their tiles, the slots of the entry, the key document. Reads no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.cache.container import Slot, is_verbatim, stated_nbytes
from quantcache.cache.key import CONTAINER_VERSION, canonical, digest
from quantcache.errors import CodecError
from quantcache.loader.changes import Change
from quantcache.loader.recipe import Decision, Recipe
from quantcache.loader.source import Source
from quantcache.once import once
from quantcache.quant import native
from quantcache.quant.codec import Encoder, Part, Status, codec
from quantcache.quant.floats import from_f32
from quantcache.tensor import ITEMSIZE, TensorInfo

__all__ = ["TILE", "Job", "Kind", "Request", "layer_key", "native_names", "plan", "records_nbytes", "slots_of"]

Array = NDArray[Any]

#: Weights in a tile, rounded down to whole blocks: what is digested at a time. Large enough that what Python does for one does not
#: count, small enough that every thread's buffers stay within its share of the memory bound.
TILE = 1 << 20

#: How names of matrices end; what stands before it is the beginning of all keys of a tensor's parts.
_WEIGHT = ".weight"
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


class Kind:
    """Plan what is alike for all tensors of a type, a shape and a decision: a model has thousands, of a dozen kinds.

    Args:
        info: one of them.
        codec_id, exponent: of the decision.
        variant: index into `variants`.
        changed: whether adapters change them.

    Attributes:
        copies: the source's own bytes are what is stored.
        as_stored: tiles come as the source has them; else as float32, into which everything else is widened (float64: narrowed).
        variants: the layouts to try in turn; of changed weights that are kept, element types.
        size: weights.
        tile: weights of a tile; the last may have fewer.
        unit: weights that tiles are made of.
        collects: each needs an encoder of its own.
        encoder: what all share, with the ends of names for keys; None if copied, or if each needs its own.
        parts: the stored arrays, with the ends of names for keys.
        part_names, endings: for each part, its name, and the end of its key.
        patterns: the calls of tiles; see quantcache.loader.pattern.
    """

    def __init__(self, info: TensorInfo, codec_id: str, exponent: int, variant: int, *, changed: bool) -> None:
        self._info, self._codec_id, scaled = info, codec_id, exponent != 0
        self._ending = _WEIGHT if info.name.endswith(_WEIGHT) else ""
        self.copies = codec_id == "keep" and not (changed or scaled or info.is_block)
        self.as_stored = self.copies or (info.dtype in ("F32", "F16", "BF16") and not (changed or scaled))
        self.variants = self._variants()
        self._variant = self.variants[variant]
        self.size, self.patterns = info.size, dict[Any, Any]()
        self.encoder: Encoder | None = None
        self.collects = False
        if self.copies:
            self.tile, self.unit = TILE * 4 // ITEMSIZE[info.dtype], 1
            self.parts: tuple[Part, ...] = (Part("values", self._ending, info.dtype, info.shape, 1),)
        else:
            encoder = self.own_encoder()
            self.parts, self.collects = encoder.parts, encoder.collects
            self.encoder = None if self.collects else encoder
            multiple = math.lcm(64 if codec_id == "keep" else codec(codec_id).multiple(info.shape), 256 if info.is_block else 1)
            if changed and info.shape and info.size // max(1, info.shape[0]) <= TILE:
                # whole rows, so that a product is one rectangle of every tile
                rows = math.lcm(multiple, info.size // max(1, info.shape[0]) or 1)
                multiple = rows if rows <= TILE else multiple
            self.tile, self.unit = max(1, TILE // multiple) * multiple, multiple
        self.endings, self.part_names = tuple(part.key for part in self.parts), tuple(part.name for part in self.parts)
        self._slots: dict[int, tuple[Slot, ...]] = {}
        #: bytes that are made of the source's, and not the source's own
        self.made_nbytes = 0 if self.copies else sum(part.nbytes for part in self.parts)

    def slots(self, layer: int) -> tuple[Slot, ...]:
        """Return the slots of the parts of all tensors of a layer."""
        found = self._slots.get(layer)
        if found is None:
            found = tuple(Slot(part.dtype, part.shape, self._chunk(part) or 1, layer, part.nbytes) for part in self.parts)
            self._slots[layer] = found
        return found

    def own_encoder(self) -> Encoder:
        """Return a new encoder."""
        info = self._info
        if self._codec_id == "keep":
            return _KeepEncoder(self._ending, info.shape, self._variant)
        return codec(self._codec_id).encoder(self._ending, info.shape, info.dtype if self.as_stored else "F32", self._variant)

    def _chunk(self, part: Part) -> int:
        return self.tile // part.weights * ITEMSIZE[part.dtype] if part.weights else part.nbytes

    def _variants(self) -> tuple[str, ...]:
        if self._codec_id != "keep":
            return codec(self._codec_id).variants
        return (self._info.dtype, "F32") if self._info.dtype in ("F16", "BF16") else ("F32",)

    @once
    def whole(self) -> list[tuple[int, Array, int, bytes]]:
        """What is stored of each tensor beside its tiles, the same for all: number of the part, bytes, their address and their digest."""
        found, numbers = [], {part.name: number for number, part in enumerate(self.parts)}
        for name, array in self.encoder.finish().items() if self.encoder is not None else ():
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            found.append((numbers[name], raw, native.address(raw), digest(raw)))
        return found


@dataclass(slots=True)  # a plan makes thousands
class Job:
    """Plan one tensor: its encoder, its slots, and how it is cut into tiles.

    Args:
        info: the source tensor.
        decision: what becomes of it.
        layer: number of its layer in the file.
        variant: index into the codec's variants.
        changes: what adapters do to it.
        shared: its kind, if others have made it.

    Attributes:
        kind: what it shares with others.
        encoder: None if the source's bytes are copied.
        keys: of its parts, in their order.
        kept: what a quantizer keeps of the result.
    """

    info: TensorInfo
    decision: Decision
    layer: int
    variant: int = 0
    changes: tuple[Change, ...] = ()
    shared: InitVar[Kind | None] = None
    kind: Kind = field(init=False)
    encoder: Encoder | None = field(init=False)
    keys: tuple[str, ...] = field(init=False)
    kept: Any = field(init=False, default=None)

    def __post_init__(self, shared: Kind | None) -> None:
        """Name the parts."""
        self.kind = kind = shared or Kind(
            self.info, self.decision.codec, self.decision.exponent, self.variant, changed=bool(self.changes)
        )
        self.encoder = kind.own_encoder() if kind.collects else kind.encoder
        stem = self.info.name.removesuffix(_WEIGHT)
        self.keys = tuple([stem + ending for ending in kind.endings])

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.kind.size

    @property
    def tile(self) -> int:
        """Weights of a tile; the last may have fewer."""
        return self.kind.tile

    @property
    def slots(self) -> dict[str, Slot]:
        """What is stored, by key."""
        return dict(zip(self.keys, self.kind.slots(self.layer), strict=True))

    @property
    def parts(self) -> dict[str, str]:
        """Keys by part."""
        return dict(zip(self.kind.part_names, self.keys, strict=True))

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
            if self.variant + 1 >= len(self.kind.variants):
                raise CodecError(f"tensor {self.info.name!r} cannot become {self.decision.codec}: {status!r}")
            return Job(self.info, self.decision, self.layer, self.variant + 1, self.changes)
        if status & Status.NONFINITE:
            reason = "it holds NaN, Inf or values near float32's limit"
        else:
            reason = "it holds a value beyond float16's range"
        kept = Job(self.info, Decision("keep", self.decision.exponent, reason), self.layer, 0, self.changes)
        # what was changed cannot be the source's bytes: float32 holds all of it
        return kept if kept.kind.copies else Job(kept.info, kept.decision, kept.layer, len(kept.kind.variants) - 1, kept.changes)

    def again(self) -> Job:
        """Return the same, of which nothing was done."""
        return replace(self, shared=self.kind)

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
    kinds: dict[tuple[Any, ...], Kind] = {}
    jobs = []
    for (info, decision), place in zip(stored, places, strict=True):
        changes = request.changes.get(info.name, ())
        alike = info.dtype, info.shape, decision.codec, decision.exponent, bool(changes), info.name.endswith(_WEIGHT)
        job = Job(info, decision, layers[place], changes=changes, shared=kinds.get(alike))
        kinds[alike] = job.kind
        jobs.append(job)
    taken = {info.name for info, _ in decided}
    for position, job in enumerate(jobs):
        extra = set(job.keys)
        extra.discard(job.info.name)
        if not extra.isdisjoint(taken):
            reason = f"the file has a tensor {min(extra & taken)!r} already"
            jobs[position] = Job(job.info, Decision("keep", job.decision.exponent, reason), job.layer, changes=job.changes)
        else:
            taken |= extra
    return sorted(jobs, key=lambda job: job.layer)


def slots_of(jobs: Iterable[Job]) -> dict[str, Slot]:
    """Return what jobs store, by key."""
    found: dict[str, Slot] = {}
    for job in jobs:
        found |= job.slots
    return found


def records_nbytes(jobs: Sequence[Job]) -> int:
    """Return what the records of jobs will take in a header; see `container.reserve_header`."""
    if not is_verbatim("".join([job.info.name for job in jobs])):
        return stated_nbytes([job.record() for job in jobs])
    nbytes, rests = 0, dict[Any, int]()
    for job in jobs:  # records of a kind differ by the names in them
        alike = id(job.kind), job.decision.reason, job.info.transposed, len(job.changes)
        named = (1 + len(job.keys)) * len(job.info.name)
        if alike not in rests:
            rests[alike] = stated_nbytes(job.record()) + 1 - named
        nbytes += rests[alike] + named
    return nbytes + (1 if jobs else 2)  # brackets, and a comma less than there are records


def native_names(tensors: Iterable[TensorInfo], request: Request) -> list[TensorInfo]:
    """Return the tensors that are views of the source."""
    passing = request.recipe.passes_elements  # else only blocks can be, and nothing else need be looked at
    return [info for info in tensors if (passing or info.is_block) and request.decide(info).codec == "native"]
