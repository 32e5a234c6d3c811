"""Own the plan of a build: jobs and their tiles, the slots of the entry, the key document. Reads no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantcache.cache.container import Slot
from quantcache.cache.key import CONTAINER_VERSION
from quantcache.errors import CodecError
from quantcache.loader.recipe import Decision, Recipe
from quantcache.loader.source import Source
from quantcache.quant.codec import Encoder, Status, codec
from quantcache.tensor import ITEMSIZE, TensorInfo

__all__ = ["TILE", "Job", "key_document", "layer_key", "native_names", "plan"]

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


@dataclass
class Job:
    """Plan one tensor: its encoder, its slots, and how it is cut into tiles.

    Args:
        info: the source tensor.
        decision: what becomes of it.
        layer: number of its layer in the file.
        variant: index into the codec's variants.
    """

    info: TensorInfo
    decision: Decision
    layer: int
    variant: int = 0

    def __post_init__(self) -> None:
        """Make the encoder and the slots."""
        self.encoder: Encoder | None = None
        info = self.info
        if self.decision.codec == "keep":
            itemsize = ITEMSIZE[info.dtype]
            self.tile = TILE * 4 // itemsize
            self.size = info.size
            self.parts = {"values": info.name}
            self.slots: tuple[Slot, ...] = (Slot(info.name, info.dtype, info.shape, self.tile * itemsize, self.layer),)
            return
        chosen = codec(self.decision.codec)
        # what tiles come as: blocks and float64 are widened or narrowed to float32 first, and so is what is scaled
        plain = info.dtype in ("F32", "F16", "BF16") and not self.decision.exponent
        self.element = info.dtype if plain else "F32"
        self.encoder = chosen.encoder(info.name, info.shape, self.element, chosen.variants[self.variant])
        multiple = math.lcm(chosen.multiple(info.shape), 256 if info.is_block else 1)
        self.tile = max(1, TILE // multiple) * multiple
        self.size = info.size
        self.parts = {part.name: part.key for part in self.encoder.parts}
        self.slots = tuple(
            Slot(
                part.key,
                part.dtype,
                part.shape,
                max(1, self.tile // part.weights * ITEMSIZE[part.dtype] if part.weights else part.nbytes),
                self.layer,
            )
            for part in self.encoder.parts
        )

    @property
    def tiles(self) -> range:
        """First weights of the tiles; one tile for an empty tensor, so that it finishes like the others."""
        return range(0, max(1, self.size), self.tile)

    def after(self, status: Status) -> Job:
        """Return the job to try after an encoder refused the values.

        Raises:
            CodecError: the tensor was to be scaled, and cannot be kept as it is then.
        """
        variants = codec(self.decision.codec).variants
        if status == Status.F32_SCALES and self.variant + 1 < len(variants):
            return Job(self.info, self.decision, self.layer, self.variant + 1)
        if status & Status.NONFINITE:
            reason = "it holds NaN, Inf or values near float32's limit"
        else:
            reason = "it holds a value beyond float16's range"
        if self.decision.exponent or self.info.is_block:
            raise CodecError(f"tensor {self.info.name!r} cannot become {self.decision.codec}: {reason}")
        return Job(self.info, Decision("keep", reason=reason), self.layer)

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
        return found


def plan(source: Source, recipe: Recipe) -> list[Job]:
    """Return the jobs of a source file, by layer; tensors that pass through natively have none.

    A tensor whose stored parts would get the name of another tensor stays as it is.
    """
    decided = [(info, recipe.decide(info)) for info in source.tensors.values()]
    stored = [(info, decision) for info, decision in decided if decision.codec != "native"]
    layers = {key: number for number, key in enumerate(sorted({layer_key(info.name) for info, _ in stored}))}
    jobs = [Job(info, decision, layers[layer_key(info.name)]) for info, decision in stored]
    taken = {info.name for info, _ in decided}
    for position, job in enumerate(jobs):
        extra = {slot.key for slot in job.slots} - {job.info.name}
        if extra & taken:
            name = min(extra & taken)
            jobs[position] = Job(job.info, Decision("keep", reason=f"the file has a tensor {name!r} already"), job.layer)
        else:
            taken |= extra
    return sorted(jobs, key=lambda job: job.layer)


def native_names(tensors: Iterable[TensorInfo], recipe: Recipe) -> list[TensorInfo]:
    """Return the tensors that are views of the source."""
    return [info for info in tensors if recipe.decide(info).codec == "native"]


def key_document(recipe: Recipe, digest: str, nbytes: int) -> Mapping[str, Any]:
    """Return everything that an entry's bytes depend on."""
    return {
        "container": CONTAINER_VERSION,
        "source": {"digest": digest, "size": nbytes},
        "recipe": recipe.canonical(),
        "codecs": recipe.codecs(),
        "adapters": [],
        "tile": TILE,
    }
