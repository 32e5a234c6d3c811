"""Own what a caller gets: load() and Model, the lazy, layered mapping from names to tensors.

Each file of a checkpoint is a shard: served from a stored entry (a hit) or from a build that is under way (a miss).
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from quantcache import trace
from quantcache.cache.settings import resolve
from quantcache.cache.store import Cache
from quantcache.errors import CacheError, QuantcacheWarning, UsageError
from quantcache.loader.ahead import Check, Pool
from quantcache.loader.build import Build
from quantcache.loader.changes import Change, key_entry
from quantcache.loader.changes import resolve as resolve_changes
from quantcache.loader.digests import known_digest
from quantcache.loader.lora import Alpha, open_adapter, paired
from quantcache.loader.pipeline import Pipeline, Progress, default_threads
from quantcache.loader.plan import Request, layer_key
from quantcache.loader.recipe import Recipe
from quantcache.loader.shards import DamagedError, Options, Shard
from quantcache.loader.source import Source, check_checkpoint, check_names, find_checkpoint
from quantcache.loader.tiles import Quantizer
from quantcache.quant.blocks import dequantize
from quantcache.quant.codec import codec, codec_ids
from quantcache.tensor import Decoder, PartSize, QuantTensor, TensorInfo, unit
from quantcache.trace import Profile, span, working_for

if TYPE_CHECKING:
    from quantcache.loader.gpu.upload import GpuModel

__all__ = ["Model", "TensorReport", "load"]

Array = NDArray[Any]
Tensor = QuantTensor | Array

#: Bytes that `layers` has read ahead, if they are not of one layer: what keeps a disk busy while a small layer is worked with.
_AHEAD = 32 << 20


@dataclass(frozen=True, slots=True)
class TensorReport:
    """Say what became of one tensor: codec id, "keep" or "native", and why if it is not quantized."""

    name: str
    codec: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source_nbytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Outlines:
    """Say what is known of a tensor without touching it.

    Args:
        parts: as they are handed out, and what only a GPU needs: see Codec.for_shader.
        rows: the length of the first axis, 1 of a vector.
        kept: what the load's quantizer kept of it, None if it did not quantize all of it.
        plan: what builds it, and where it goes; None if nothing does.
    """

    parts: list[PartSize]
    rows: int
    kept: Any
    plan: tuple[Any, Any] | None = None


class Model(Mapping[str, Tensor]):
    """Map tensor names to tensors, in layer order. Close it, or use it in a `with`.

    Attributes:
        hit: True if nothing had to be quantized.
        path: as given to `load`.
    """

    def __init__(self, path: Path, shards: list[Shard], cache: Cache | None, options: Options, *, own: bool) -> None:
        self.path = path
        self._shards, self._cache, self._options, self._own_cache = shards, cache, options, own
        self._pipelines: list[Pipeline] = []
        builds = [shard.build for shard in shards if shard.build]
        self.hit = not builds
        if builds:
            pipeline = self._pipeline(builds)
            for shard in shards:
                shard.pipeline = pipeline if shard.build else None
        self._home = {name: shard for shard in shards for name in shard.names()}
        self._names = sorted(self._home, key=layer_key)
        self._given: dict[str, Tensor] = {}
        self._closed = False
        _open_models.add(self)

    # a model is itself, whatever it holds: comparing all tensors would read the whole file
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    # ---- the mapping ----

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        """Iterate over names, by layer."""
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a tensor; touches nothing."""
        return name in self._home

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor: read-only views, checked the first time; on a miss, as soon as it is quantized.

        Raises:
            KeyError: there is no such tensor.
            SourceError: the checkpoint failed while it was read.
        """
        shard = self._home[name]
        if name not in self._given:
            self._given[name] = self._make(shard, name)
        return self._given[name]

    def _make(self, shard: Shard, name: str) -> Tensor:
        if name in shard.native:
            return _native(shard.source, shard.native[name])
        with working_for(self._options.profile):
            with shard.lock:
                first = True
                while shard.stored is not None:
                    try:
                        found = shard.arrays(name)
                    except DamagedError as error:
                        self._rebuild(shard, str(error), store=first)
                        first = False
                    else:
                        assert found is not None
                        return _tensor(*found)
            return _tensor(*shard.built(name))

    def _rebuild(self, shard: Shard, why: str, *, store: bool) -> None:
        """Quarantine a shard's entry and build it again; what was handed out before stays as it is, and was right.

        An entry that cannot be moved away, or a second one that is damaged, is built again in memory.
        """
        assert self._cache is not None
        shard.replace(self._cache, why, self._pipeline, store=store)
        self.hit = self.hit and shard.stored is not None

    def _pipeline(self, builds: list[Build]) -> Pipeline:
        options = self._options
        made = Pipeline(
            builds, threads=options.threads, progress=options.progress, profile=options.profile, quantizer=options.quantizer
        )
        self._pipelines.append(made)
        return made

    def layers(self) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of one layer after the other: embeddings, numbered layers, the rest.

        The first is usable before later ones are ready. While a layer is worked with, the next one is read and checked; of small
        ones, several.
        """
        layers = self.in_layers()
        sizes, ahead, coming = [0] * len(layers), 1, 0
        for number, names in enumerate(layers):
            coming -= sizes[number]
            wanted: list[str] = []
            while ahead < len(layers) and (ahead <= number + 1 or 0 < coming < _AHEAD):
                wanted += layers[ahead]
                sizes[ahead] = sum(self._home[name].stored_nbytes(name) for name in layers[ahead])
                coming += sizes[ahead]
                ahead += 1
            self.prefetch(wanted)
            yield {name: self[name] for name in names}

    def in_layers(self) -> list[list[str]]:
        """Return the names by layer; touches nothing."""
        grouped: dict[tuple[int, str, int], list[str]] = {}
        for name in self._names:
            grouped.setdefault(layer_key(name), []).append(name)
        return list(grouped.values())

    def upload(
        self,
        device: Any = None,
        *,
        lazy: bool = False,
        budget: int | None = None,
        reuse: bool = False,
        order: str = "layers",
        threads: int = 0,
    ) -> GpuModel:
        """Bring the model onto a GPU, streamed from the mapped entry, every digest checked on the way.

        Args:
            device: a wgpu.GPUDevice, a qc.gpu.Device, or None: the fastest there is.
            lazy: a layer comes when it is first used, and the next one meanwhile; else all before this returns.
            budget: with `lazy`, bytes on the device: the least recently used layers leave.
            reuse: with a budget, layers are written over those that left: 1.5 times as fast. Submit what uses a layer before you ask for
                another; tensors of a layer that left raise DeviceError, what was bound of it is another layer's.
            order: "layers", or "size": the largest tensors first.
            threads: 0 chooses.

        Returns:
            Name -> GpuTensor; this model stays open meanwhile, and may be closed once all layers have come.

        Raises:
            DeviceUnavailable: there is no GPU.
            DeviceOutOfMemory: it does not fit; everything is given back.
            DeviceError: the device failed.
            SourceError: the checkpoint failed while it was read.
        """
        from quantcache.loader.gpu.upload import upload

        return upload(self, device, lazy=lazy, budget=budget, reuse=reuse, order=order, threads=threads)

    def outlines(self, name: str, *, wait: bool = True) -> Outlines:
        """Return what is known of a tensor without touching it.

        Args:
            name: of the tensor.
            wait: until it is quantized; else all is as planned, and `holds` says later whether it came so.
        """
        shard = self._home[name]
        if name in shard.native:
            info = shard.native[name]
            part = PartSize("blocks" if info.is_block else "values", "U8" if info.is_block else info.dtype, info.nbytes, info.offset)
            return Outlines([part], _rows(info.view_shape), None)
        record, slots, offsets, plan = shard.described(name, wait=wait)
        parts = [
            PartSize(part, slots[key].dtype, slots[key].nbytes, offsets.get(key, 0), slots[key].chunk)
            for part, key in record["parts"].items()
        ]
        behind = max((part.position for part in parts), default=0)
        more = codec(record["codec"]).shader_parts if record["codec"] in codec_ids() else {}
        parts += [PartSize(part, dtype, nbytes, behind) for part, (dtype, nbytes) in more.items()]
        kept = plan[0].kept if plan is not None and not self._closed else None
        there = kept and plan is not None and (not wait or kept.done == plan[0].size)
        return Outlines(parts, _rows(_view_shape(record)), kept if there else None, plan)

    def holds(self, name: str, planned: Outlines) -> bool:
        """Return whether what `outlines` said of a tensor before it was quantized is true now that it is."""
        task = self._home[name].task(name)
        if task is None or planned.plan is None:
            return task is None and planned.plan is None
        (job, target), kept = planned.plan, planned.kept
        whole = kept is None or (kept is job.kept and kept.done == job.size)
        return task.job is job and task.target is target and whole and not self._closed

    def kept(self) -> dict[str, Any]:
        """Return what the load's quantizer keeps of tensors, by name, as it was planned."""
        return {job.info.name: job.kept for pipeline in self._pipelines for build in pipeline.builds for job in build.jobs if job.kept}

    def wait(self) -> None:
        """Wait until everything is quantized, and not until it is stored.

        Raises:
            SourceError, Cancelled: it cannot be.
        """
        for pipeline in self._pipelines:
            pipeline.wait_for_all()

    def outline(self, name: str, *, wait: bool = True) -> Tensor:
        """Return a tensor that the load's quantizer keeps as it would be handed out: of the bytes of what is kept nothing is said.

        Args:
            name: of the tensor.
            wait: until it is quantized; else no byte of it means anything before that.
        """
        return _tensor(*self._home[name].built(name, bring=False, wait=wait))

    def unchecked(self, name: str) -> tuple[Tensor, dict[str, Check]]:
        """Return a tensor for somebody who reads all of it, and by part the checks that are left to them.

        Before anybody else sees the bytes, every check is to be fed and to have passed; else they are `self[name]`'s.
        """
        shard = self._home[name]
        if name not in self._given and name not in shard.native:
            with shard.lock:
                found = shard.unchecked(name)
            if found is not None:
                return _tensor(found[0], found[1]), found[2]
        return self[name], {}

    def is_warm(self, name: str) -> bool:
        """Return whether nothing of a tensor has to come from disk, as far as a few pages tell."""
        stored, records = self._home[name].stored, self._home[name].records
        return stored is None or name not in records or stored.is_warm(records[name]["parts"].values())

    def in_memory(self, name: str) -> Tensor:
        """Return a tensor whose bytes are in memory: touching them later does not fail for want of a disk."""
        shard = self._home[name]
        if name in shard.native:
            info = shard.native[name]
            shard.source.file.populate(info.offset, info.nbytes)
        with shard.lock:
            if shard.stored is not None and name in shard.records and not shard.readable(name):
                self._given.pop(name, None)
                self._rebuild(shard, f"tensor {name!r} cannot be read", store=True)
        return self[name]

    @property
    def threads(self) -> int:
        """How many threads read, quantize and check."""
        return self._options.threads or default_threads()

    @property
    def profile(self) -> Profile:
        """What adds up the seconds of `phases`."""
        return self._options.profile

    def prefetch(self, names: Iterable[str] | None = None) -> None:
        """Begin to read tensors, and to check their digests, on all cores; return at once.

        On a hit nothing is read before it is asked for: this asks for it. On a miss everything is under way already.

        Args:
            names: which; all if None. What is wanted of one call comes in the order of the file: by layer.

        Raises:
            KeyError: there is no such tensor.
        """
        wanted: dict[int, list[str]] = {}
        for name in self._names if names is None else names:
            wanted.setdefault(id(self._home[name]), []).append(name)
        for shard in self._shards:
            if found := wanted.get(id(shard)):
                shard.read_ahead(found)

    # ---- what it is ----

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are handed out; waits for a build."""
        return sum(report.nbytes for report in self.report())

    def report(self) -> list[TensorReport]:
        """Return what became of every tensor; waits for a build."""
        reports = []
        for name in self._names:
            shard = self._home[name]
            if name in shard.native:
                info = shard.native[name]
                reason = shard.request.decide(info).reason
                reports.append(TensorReport(name, "native", info.dtype, info.view_shape, info.nbytes, info.nbytes, reason))
                continue
            record, slots, _, _ = shard.described(name)
            nbytes = sum(slots[key].nbytes for key in record["parts"].values())
            weights, unit_nbytes = unit(record["dtype"])
            source_nbytes = math.prod(record["shape"]) // weights * unit_nbytes
            shape = _view_shape(record)
            reports.append(
                TensorReport(name, record["codec"], record["dtype"], shape, nbytes, source_nbytes, record.get("reason", ""))
            )
        return reports

    @property
    def keys_in_store(self) -> list[str]:
        """Keys of the entries that serve this model; complete once it is closed."""
        served = [shard.entry or (shard.build.row if shard.build else None) for shard in self._shards if not shard.early or shard.early.stored]
        return [found.key for found in served if found is not None]

    @property
    def unsaved(self) -> list[CacheError]:
        """Why parts of the model are not stored; complete once it is closed."""
        unsaved = [shard.build.unsaved for shard in self._shards if shard.build and shard.build.unsaved]
        lost = [shard.source.path.name for shard in self._shards if shard.early and shard.early.stored is False]
        return unsaved + [CacheError(f"{name}: who built it did not store it", hint="the next load builds it") for name in lost]

    @property
    def phases(self) -> dict[str, float]:
        """Seconds that the load has taken so far, by phase, of all threads together: see quantcache.trace.PHASES."""
        return self._options.profile.seconds

    # ---- the end ----

    def finish(self) -> None:
        """Wait until everything is quantized and stored.

        Raises:
            SourceError: the checkpoint failed while it was read.
        """
        for pipeline in self._pipelines:
            pipeline.finish()
        for shard in self._shards:
            if shard.early is not None:
                shard.early.settle()

    def close(self) -> None:
        """Wait until what was quantized is stored; tensors handed out stay valid.

        Raises:
            SourceError: the checkpoint failed while it was read.
        """
        if self._closed:
            return
        self._closed = True
        _open_models.discard(self)
        try:
            self.finish()
            if self._cache is not None and self.keys_in_store:
                self._cache.record_model(self.path.resolve(), self._options.request.label, self.keys_in_store)
        finally:
            self._end()

    def cancel(self) -> None:
        """Stop quantizing; nothing unfinished stays in the store."""
        self._closed = True
        _open_models.discard(self)
        for pipeline in self._pipelines:
            pipeline.cancel()
        self._end()

    def _end(self) -> None:
        self._options.pool.close()
        if self._options.quantizer is not None:
            self._options.quantizer.close()
            for task in (task for shard in self._shards if shard.build for task in shard.build.tasks.values()):
                task.job.kept = None
        for shard in self._shards:
            if shard.stored is not None:
                shard.stored.close()
        trace.flush()
        if self._cache is not None and self._own_cache:
            self._cache.close()

    def __enter__(self) -> Model:
        """Return the model itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; after Ctrl-C, cancel; after another error, close without hiding it."""
        if kind is not None and not issubclass(kind, Exception):
            self.cancel()
        elif kind is not None:
            with contextlib.suppress(Exception):
                self.close()
        else:
            self.close()


_open_models: weakref.WeakSet[Model] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Save what a program did not close; after Ctrl-C, just clean up."""
    interrupted = isinstance(getattr(sys, "last_value", None), KeyboardInterrupt)
    for model in list(_open_models):
        with contextlib.suppress(Exception):
            if interrupted:
                model.cancel()
            else:
                model.close()


def load(
    path: str | os.PathLike[str],
    quant: str | Recipe = "nf4",
    *,
    lora: Sequence[tuple[str | os.PathLike[str], Alpha] | str | os.PathLike[str]] = (),
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    rules: Sequence[tuple[str, str] | tuple[str, str, float]] = (),
    other: str = "f16",
    native: str = "keep",
    names: str = "auto",
    cache: Cache | str | os.PathLike[str] | None = None,
    mode: str | None = None,
    verify: str | None = None,
    threads: int | None = None,
    progress: Callable[[Progress], Any] | None = None,
    device: Any = None,
) -> Model:
    """Load a checkpoint, quantized: from the store if it is there, else quantized now and stored.

    Args:
        path: a .safetensors, .st or .gguf file, a sharded folder, a hub snapshot.
        quant: "int8", "nf4", "nf4-dq", "int8-row", "f16", "native", or a Recipe.
        lora: adapters in order, merged before quantizing: a path, or (path, alpha). Alpha replaces the file's own: a
            number, or (name pattern, number) pairs. A product is scaled by alpha over its rank.
        include, exclude: name patterns of the default recipe.
        rules: (pattern, codec) or (pattern, codec, factor), before the default ones.
        other: what becomes of weights that are not quantized: "f16" or "keep".
        native: GGUF blocks pass through ("keep") or become the target's ("convert").
        names: "auto" gives an RWKV GGUF's tensors the names of RWKV's own checkpoints; "file" leaves them.
        cache: a Cache, a folder, or None for the user's own.
        mode: "auto", "off" (never look, never store), "readonly" or "refresh"; the setting if None.
        verify: digests are checked when a tensor is first "touch"ed, all on "open", or never: "off".
        threads: 0 is one per core; the setting if None.
        progress: called with Progress from a worker; returning False cancels.
        device: a wgpu.GPUDevice or a qc.gpu.Device: on a miss it quantizes what it can, to the same bytes, and `upload` to it
            then moves nothing twice. It needs room for the whole result.

    Returns:
        A Model, as soon as the plan is made.

    Raises:
        SourceError: the checkpoint is missing or cannot be read.
        UsageError: an argument cannot be meant.
    """
    quantizer = _quantizer(device)
    settings = {
        name: setting.value for name, setting in resolve({"mode": mode, "verify": verify, "threads": threads}).items()
    }
    recipe = Recipe.of(quant, include=include, exclude=exclude, other=other, native=native, rules=rules)
    seen_ns = time.time_ns()
    if isinstance(lora, str | os.PathLike):
        raise UsageError(f"lora={lora!r}: it is a list of adapters")
    profile = Profile()
    with working_for(profile), span("open"):
        adapters = [open_adapter(*paired(given)) for given in lora or ()]
        where, files = find_checkpoint(path, names)
        sources = [Source(file, later=True) for file in files]
        changes: Mapping[str, tuple[Change, ...]] = {}
        if adapters:  # what they change is found by name
            check_checkpoint(where, sources, names)
            changes = resolve_changes(adapters, sources)
        store, own = _open_cache(cache, settings["mode"])
        shards: list[Shard] = []
        try:
            entries = [  # a load without a store needs no key
                key_entry(adapter, known_digest(adapter.source, store, settings["threads"] or default_threads(), seen_ns), changes)
                for adapter in adapters
                if store is not None
            ]
            given = tuple((str(adapter.source.path.resolve()), adapter.alpha) for adapter in adapters)
            request = Request(recipe, changes, tuple(entries), given, str(Path(path).resolve()))
            pool = Pool(settings["threads"] or default_threads(), profile)
            options = Options(request, settings["mode"], settings["verify"], settings["threads"], progress, profile, pool, quantizer)
            shards += [Shard(source, options) for source in sources]
            if not adapters and store is not None and all(shard.serve(store, seen_ns) for shard in shards):
                check_names(where, [(shard.source.path, shard.records) for shard in shards])
            elif not adapters:
                check_checkpoint(where, sources, names)
            for shard in shards:
                if shard.stored is None:
                    shard.start(store, seen_ns, first=shard is shards[0])
            model = Model(Path(path), shards, store, options, own=own)
        except BaseException:
            for shard in shards:
                if shard.pipeline is not None:
                    shard.pipeline.cancel()
                elif shard.build is not None:
                    shard.build.drop()
            if quantizer is not None:
                quantizer.close()
            if store is not None and own:
                store.close()
            raise
    for shard in shards:
        if shard.entry is not None and store is not None:
            store.used(shard.entry, saved_s=float(shard.entry.header.built.get("seconds", 0.0)))
    return model


def _quantizer(device: Any) -> Quantizer | None:
    """Return what quantizes on a device; None if there is no device."""
    if device is None:
        return None
    from quantcache.loader.gpu.device import Device
    from quantcache.loader.gpu.encode import GpuQuantizer

    return GpuQuantizer(Device.of(device))


def _open_cache(cache: Cache | str | os.PathLike[str] | None, mode: str) -> tuple[Cache | None, bool]:
    """Return the store, or None with one warning if there is none to be had; and whether it is ours to close."""
    if mode == "off":
        return None, False
    if isinstance(cache, Cache):
        cache.begin()
        if mode != "readonly" or cache.readonly:
            return cache, False
        cache = cache.root  # opened anew, so that nothing is written, not even a use time
    try:
        return Cache(cache, readonly=mode == "readonly"), True
    except CacheError as error:
        if mode != "readonly":
            warnings.warn(f"loading without a cache: {error.message}", QuantcacheWarning, stacklevel=3)
        return None, False


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _view_shape(record: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of what is handed out."""
    return TensorInfo("", record["dtype"], tuple(record["shape"]), 0, 0, bool(record.get("transposed"))).view_shape


def _tensor(record: Mapping[str, Any], arrays: Mapping[str, Array]) -> Tensor:
    """Return what a caller gets: an array for plain weights, else a QuantTensor."""
    keys = record["parts"]
    parts = {name: arrays[keys[name]] for name in _in_order(tuple(keys))}
    if record["codec"] in ("keep", "f16"):
        values = parts["values"]
        values.flags.writeable = False
        return values.swapaxes(-1, -2) if record.get("transposed") else values
    return QuantTensor(record["codec"], tuple(record["shape"]), parts, _decoder(record["codec"]))


@cache
def _decoder(codec_id: str) -> Decoder:
    """Return what decodes tensors of a codec: one for all of them."""
    return codec(codec_id).dequantize


@cache
def _in_order(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of parts, codes first: JSON does not keep the codec's order."""
    return tuple(sorted(parts, key=lambda name: (name != "codes", name)))


def _native(source: Source, info: TensorInfo) -> Tensor:
    if not info.is_block:
        return source.view(info.name)
    blocks = source.view(info.name)  # an unknown type raises here, and names itself
    decode = partial(_decode_blocks, name=info.dtype)
    return QuantTensor(info.dtype, info.shape, {"blocks": blocks}, decode)


def _decode_blocks(
    parts: Mapping[str, Array], shape: tuple[int, ...], dtype: str, out: Array | None, *, name: str
) -> Array:
    return dequantize(parts, name, shape, dtype, out)
