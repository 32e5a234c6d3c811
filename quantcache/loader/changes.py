"""Own which weight each tensor of an adapter changes, and by how much. Reads no weight but an adapter's alphas.

Every form comes down to three kinds of change of one weight W, in float32: W + scale * (left @ right), W + scale *
difference, and another tensor in its place. A tensor that finds no weight, or several, is an error: nothing is dropped.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantcache.cache.key import canonical, digest
from quantcache.errors import SourceError, UsageError, shorten
from quantcache.loader.lora import CONFIG, Adapter, Module, by_pattern
from quantcache.loader.names import SCHEMES, from_gguf, turned_by_gguf
from quantcache.loader.source import Source
from quantcache.once import once
from quantcache.quant.merge import VERSION
from quantcache.tensor import TensorInfo

__all__ = ["DIFFERENCE", "PRODUCT", "REPLACEMENT", "Change", "key_entry", "resolve"]

PRODUCT, DIFFERENCE, REPLACEMENT = "product", "difference", "replacement"


@dataclass(frozen=True, slots=True)
class Change:
    """Describe one change of one weight.

    Args:
        kind: "product", "difference" or "replacement".
        source: the adapter's file.
        tensors: names in it: (down, up) of a product, else one.
        scale: of what is added.
        transposed: the change is of the transpose of the weight that the name promises.
        turned: the file has the first matrix of a product the other way round, [columns, rank].
    """

    kind: str
    source: Source
    tensors: tuple[str, ...]
    scale: float = 1.0
    transposed: bool = False
    turned: bool = False


#: Layers of GPT-2 and its kin that keep their matrix the other way round (Conv1D).
_TURNED_LAYERS = frozenset(("c_attn", "q_attn", "c_proj", "c_fc"))
#: What kohya's flat names start with: which network of a pipeline they are for.
_FLAT_PREFIX = re.compile(r"lora_(?:unet|te\d?|transformer|prior|text_encoder)_|lora_")
#: Modules that wrap a whole model under another class: only these may be more, or fewer, than in the checkpoint.
_WRAPPERS = frozenset((
    "model", "transformer", "base_model", "module", "backbone", "language_model", "text_model", "diffusion_model", "unet",
    "bert", "roberta", "distilbert", "gpt_neox", "rwkv",
))  # fmt: skip


def resolve(adapters: Iterable[Adapter], sources: Sequence[Source]) -> dict[str, tuple[Change, ...]]:
    """Find the weight that every tensor of every adapter changes.

    Args:
        adapters: in the order in which they are applied.
        sources: of the checkpoint.

    Returns:
        Name of a weight -> its changes, in order.

    Raises:
        SourceError: a tensor finds no weight, or several, or one of another shape or of integers; or it takes the place of
            a weight that an adapter before it changes.
        UsageError: nobody says how large an alpha is, or a given one is for no weight.
    """
    changes: dict[str, list[Change]] = {}
    tensors = {name: info for source in sources for name, info in source.tensors.items()}
    finder = _Finder(tensors)
    for adapter in adapters:
        changed: dict[str, str] = {}
        path = adapter.source.path
        for weight, change in _changes(adapter, finder):
            name = change.tensors[-1]
            if weight in changed and not (change.kind == PRODUCT and ".base_layer." in changed[weight]):
                raise SourceError(f"changes {weight!r}, as {changed[weight]!r} does", path=path, tensor=name)
            if change.kind == REPLACEMENT and weight in changes:
                before = changes[weight][-1].source.path
                raise SourceError(f"takes the place of {weight!r}, which {before} changes before it", path=path, tensor=name, hint="give it first")
            changed[weight] = name
            info = tensors[weight]
            if not info.is_float and not (info.is_block and info.is_known):
                raise SourceError(f"changes {weight!r}, whose type is {info.dtype}", path=path, tensor=name)
            _check_shape(change, info)
            changes.setdefault(weight, []).append(change)
        if isinstance(adapter.alpha, tuple):
            for pattern, _ in adapter.alpha:
                if not fnmatch.filter(changed, pattern):
                    raise UsageError(f"no weight that {path} changes is called like {pattern!r}", hint="patterns are for weights, as '*.att.key.weight'")
    return {name: tuple(found) for name, found in changes.items()}


@dataclass(frozen=True, slots=True)
class _Found:
    """Say which weight a module means, and whether it is spelled as a GGUF has it: turned, perhaps."""

    weight: str
    turned: bool = False


def _changes(adapter: Adapter, finder: _Finder) -> Iterator[tuple[str, Change]]:
    """Yield the weight and the change for everything that an adapter says; what replaces a weight comes first."""
    source = adapter.source
    for weight, name in adapter.replaced.items():
        found = finder.find(weight, "", source, name)
        yield found.weight, Change(REPLACEMENT, source, (name,), transposed=found.turned)
    products = {}
    for module in adapter.modules.values():
        if "down" in module.roles:
            pair = module.roles["down"], module.roles["up"]
            products[module.spelled] = module, pair, finder.find(module.spelled, ".weight", source, pair[0])
    orientations = _Orientations(adapter, [(module, pair, finder.tensors[found.weight]) for module, pair, found in products.values()])
    for module, pair, found in products.values():
        turned = _is_turned(module, source, pair)
        scale = _scale(adapter, module, found.weight, source.tensors[pair[0]].shape[turned:][:1])
        transposed = orientations.transposed(module, pair, finder.tensors[found.weight]) != found.turned
        yield found.weight, Change(PRODUCT, source, pair, scale, transposed, turned)
        if "bias" in module.roles:
            bias = finder.find(module.spelled, ".bias", source, module.roles["bias"]).weight
            yield bias, Change(DIFFERENCE, source, (module.roles["bias"],), scale)
    for module in adapter.modules.values():
        for role, suffix in (("difference", ".weight"), ("difference of bias", ".bias")):
            if role in module.roles:
                found = finder.find(module.spelled, suffix, source, module.roles[role])
                yield found.weight, Change(DIFFERENCE, source, (module.roles[role],), transposed=found.turned)


def _is_turned(module: Module, source: Source, pair: tuple[str, str]) -> bool:
    """Return whether the first matrix is [columns, rank]: web-rwkv's converter turns it, and llama.cpp's that of an embedding."""
    down, up = (source.tensors[name].shape for name in pair)
    if source.format == "gguf":
        return module.embedding
    return pair[0].endswith(".lora.0") and len(down) == len(up) == 2 and down[0] != up[1] == down[1]


class _Orientations:
    """Decide whether products are of a weight or of its transpose (GPT-2's layers are the other way round).

    PEFT keeps one flag for all layers, and the last of them has set it: where the shapes say otherwise, they are right. A
    square weight's shape says nothing; it goes with the layers of its own name, then with those of all blocks.
    """

    def __init__(self, adapter: Adapter, products: list[tuple[Module, tuple[str, str], TensorInfo]]) -> None:
        self._adapter = adapter
        self._flag = bool(adapter.config.get("fan_in_fan_out"))
        self._evidence: dict[str, set[bool]] = {}
        for module, pair, info in products:
            shown = None if module.embedding else self._shown(module, pair, info)
            if shown is not None:
                for group in self._groups(module):
                    self._evidence.setdefault(group, set()).add(shown)

    def _groups(self, module: Module) -> list[str]:
        parts = module.spelled.split(".")
        return [parts[-1], *(["a block"] if any(part.isdigit() for part in parts) else [])]

    def _shown(self, module: Module, pair: tuple[str, str], info: TensorInfo) -> bool | None:
        """Return what the shapes say, or None: they fit both ways, or none that a layer of this name can have."""
        down, up = (self._adapter.source.tensors[name].shape for name in pair)
        if len(down) != 2 or len(up) != 2 or len(info.shape) != 2:
            return None
        plain = (up[0], down[1])
        fits, fits_turned = plain == info.view_shape, plain[::-1] == info.view_shape
        if fits_turned and not fits and not self._flag and module.spelled.rpartition(".")[2] not in _TURNED_LAYERS:
            return None
        return None if fits == fits_turned else fits_turned

    def transposed(self, module: Module, pair: tuple[str, str], info: TensorInfo) -> bool:
        """Return whether a product is of the transpose.

        Raises:
            SourceError: layers of the same kind say one thing and the other.
        """
        if module.embedding or not self._adapter.is_peft:
            return module.embedding
        shown = self._shown(module, pair, info)
        if shown is not None:
            return shown
        for group in self._groups(module):
            said = self._evidence.get(group, set())
            if len(said) == 1:
                return next(iter(said))
            if said:
                raise SourceError("may be meant either way round: layers like it are of both kinds", path=self._adapter.source.path, tensor=pair[0])
        return self._flag


def _scale(adapter: Adapter, module: Module, weight: str, ranks: tuple[int, ...]) -> float:
    """Return what a module's product is multiplied by: alpha over the rank, or over its root."""
    source, config = adapter.source, adapter.config
    down = source.tensors[module.roles["down"]]
    rank = ranks[0] if ranks else 0
    if rank < 1:
        raise SourceError("has no rank", path=source.path, tensor=down.name)
    if config:
        wanted = by_pattern(config.get("rank_pattern") or {}, module.spelled, config.get("r", 8))
        if wanted != rank:
            raise SourceError(f"has rank {rank}, {CONFIG} says {wanted}", path=source.path, tensor=down.name)
    alpha = _given(adapter.alpha, weight)
    if alpha is None and "alpha" in module.roles:
        name = module.roles["alpha"]
        if source.tensors[name].size != 1 or not source.tensors[name].is_float:
            raise SourceError("an alpha is one number", path=source.path, tensor=name)
        alpha = float(np.asarray(source.view(name)).reshape(-1)[0])
    if alpha is None and config:
        alpha = float(by_pattern(config.get("alpha_pattern") or {}, module.spelled, config.get("lora_alpha", 8)))
    if alpha is None and isinstance(source.metadata.get("adapter.lora.alpha"), float):
        alpha = source.metadata["adapter.lora.alpha"] or rank  # llama.cpp: 0 means a factor of 1
    if alpha is None and "lora_down" in module.roles["down"]:
        alpha = rank  # kohya: without an alpha it is the rank
    if alpha is None:
        raise UsageError(
            f"{source.path} does not say how large alpha is",
            hint=f"give it: --lora FILE:ALPHA, or lora=[(path, alpha)]; PEFT keeps it in {CONFIG} beside the file",
        )
    if not math.isfinite(alpha):
        raise SourceError(f"alpha is {alpha}", path=source.path, tensor=down.name)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _given(alpha: float | tuple[tuple[str, float], ...] | None, weight: str) -> float | None:
    if isinstance(alpha, tuple):
        return next((value for pattern, value in alpha if fnmatch.fnmatchcase(weight, pattern)), None)
    return alpha


def _check_shape(change: Change, info: TensorInfo) -> None:
    """Check that a change has the shape of its weight."""
    source, name = change.source, change.tensors[-1]
    for part in change.tensors:
        if not source.tensors[part].is_float:
            raise SourceError(f"its type is {source.tensors[part].dtype}, not one of floats", path=source.path, tensor=part)
    shapes = [source.tensors[part].shape for part in change.tensors]
    shape = info.view_shape
    if change.transposed:
        shape = (*shape[:-2], *shape[-1:], *shape[-2:-1])
    if change.kind != PRODUCT:
        # a vector may have axes of length 1 more or fewer; nothing else is reshaped
        given, wanted = ([axis for axis in s if axis != 1] for s in (shapes[0], shape))
        if given != wanted:
            raise SourceError(f"has shape {shapes[0]}, {info.name!r} has {shape}", path=source.path, tensor=name)
        return
    down, up = shapes
    if change.turned:
        down = down[::-1]
    columns = math.prod(shape[1:])
    rows = shape[0] if shape else 0
    rank, inner, outer = down[0], math.prod(down[1:]), up[0] if up else 0
    if len(shape) < 2 or not up or math.prod(up[1:]) != rank:
        raise SourceError(f"{down} and {up} are no product for {info.name!r} of {shape}", path=source.path, tensor=name)
    if (change.transposed or info.transposed) and len(shape) != 2:
        raise SourceError(f"a transposed product needs a matrix, {info.name!r} has {shape}", path=source.path, tensor=name)
    if (outer, inner) != (rows, columns):
        raise SourceError(f"the product is {outer} x {inner}, {info.name!r} is {rows} x {columns}", path=source.path, tensor=name)


class _Finder:
    """Find weights by the names that adapters use for them.

    Args:
        tensors: of the checkpoint.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    # both are made when they are first needed: a load without an adapter looks for nothing

    @once
    def _ends(self) -> dict[str, list[str]]:
        """Names by what is left of them without the modules that may wrap a model."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            for end in _unwrapped(name):
                found.setdefault(end, []).append(name)
        return found

    @once
    def _flat(self) -> dict[str, list[str]]:
        """Names of weights by their path, its dots made underscores, with and without the modules that may wrap it."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            if name.endswith(".weight"):
                path = name.removesuffix(".weight")
                for end in (path, *_unwrapped(path)):
                    found.setdefault(end.replace(".", "_"), []).append(name)
        return found

    def find(self, spelled: str, suffix: str, source: Source, tensor: str) -> _Found:
        """Return the weight that an adapter calls so.

        Args:
            spelled: the module, or the weight itself.
            suffix: ".weight" or ".bias" of a module, "" for a weight.
            source, tensor: of the adapter, for the error.

        Raises:
            SourceError: there is none, or more than one.
        """
        candidates = [f"{spelled}{suffix}", *([spelled] if suffix == ".weight" else [])]
        looks = (self._same, self._renamed, self._wrapped, *([self._flattened] if suffix == ".weight" else []))
        for look in looks:
            found = sorted({name for candidate in candidates for name in look(candidate)})
            if len(found) == 1:
                turned = look == self._renamed and any(turned_by_gguf(candidate) for candidate in candidates)
                return _Found(found[0], turned)
            if found:
                names = ", ".join(shorten(name) for name in found[:4])
                raise SourceError(f"may be for {len(found)} weights: {names}", path=source.path, tensor=tensor)
        raise SourceError(
            "finds no weight in the checkpoint",
            path=source.path,
            tensor=tensor,
            hint="the adapter was made for another model, or for other names of it",
        )

    def _same(self, candidate: str) -> list[str]:
        return [candidate] if candidate in self.tensors else []

    def _renamed(self, candidate: str) -> list[str]:
        """Look for a GGUF's name in a checkpoint that has the checkpoint's."""
        found = [from_gguf(candidate, architecture) for architecture in SCHEMES]
        return [names[0] for names in found if len(names) == 1 and names[0] != candidate and names[0] in self.tensors]

    def _wrapped(self, candidate: str) -> list[str]:
        """Look for the same path with a known wrapper more, or fewer, around it."""
        return self._ends.get(candidate, []) or [name for name in _unwrapped(candidate) if name in self.tensors]

    def _flattened(self, candidate: str) -> list[str]:
        """Look for a path whose dots became underscores."""
        return [] if "." in candidate else self._flat.get(_FLAT_PREFIX.sub("", candidate, count=1), [])


def _unwrapped(name: str) -> Iterator[str]:
    """Yield a path without one and more of the modules around it, as far as they can wrap a model."""
    while True:
        first, _, name = name.partition(".")
        if first not in _WRAPPERS or not name:
            return
        yield name


def key_entry(adapter: Adapter, found: str, changes: Mapping[str, Sequence[Change]]) -> dict[str, Any]:
    """Return what of an adapter belongs in the key: its bytes, and what they do to which weight, however that was said.

    Args:
        adapter: which.
        found: digest of its file.
        changes: of all adapters, as `resolve` found them.
    """
    own = [
        [weight, change.kind, list(change.tensors), change.scale, change.transposed, change.turned]
        for weight in sorted(changes)
        for change in changes[weight]
        if change.source is adapter.source
    ]
    return {
        "digest": found,
        "size": adapter.source.file.nbytes,
        "changes": digest(canonical(own).encode()).hex(),
        "scales": sorted({change[3] for change in own}),
        "merge": VERSION,
    }
