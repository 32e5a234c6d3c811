"""Own quantizing on a GPU, on a miss: tiles go up once, codes stay where they will be used, and come back for the store.

What comes back is what the CPU would have made, bit for bit; where a shader cannot promise that (values that are not finite,
or that a device may flush to zero), it says so, and the CPU does those tiles. A load never fails for want of a GPU.

A step goes over the ends of tensors, and what stands side by side on both sides is one dispatch: calls of wgpu are what it costs.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.errors import DeviceError, QuantcacheWarning
from quantcache.loader.gpu.compute import decode_source
from quantcache.loader.gpu.device import Binding, Device
from quantcache.loader.gpu.kept import Bundle, Kept
from quantcache.loader.gpu.transfer import Transfer
from quantcache.loader.plan import Job
from quantcache.loader.tiles import Stretch
from quantcache.quant.blocks import block_type, block_types
from quantcache.quant.codec import Arena, Part, codec, codec_ids
from quantcache.quant.wgsl import UNIT, EncodeShader, WeightShader
from quantcache.tensor import ITEMSIZE

__all__ = ["GpuQuantizer"]

#: Bytes that go up at a time, as the source has them or as float32, whichever is more; and how many such steps are under way.
_STEP = 40 << 20
_LANES = 3
#: One more where codes stay: threads have less to do in between then, and steps wait for each other.
_MORE_LANES = 1
#: Threads that feed them: while some wait for a step, others read, digest and write.
_THREADS = 8
#: Bytes behind a step that a shader may read, and does not use.
_SLACK = 256
#: Smaller tensors take a CPU less time than the way there and back.
_LEAST = 1 << 16
#: Tensors of a step at most, each with its settings and its status.
_MOST = 64


@dataclass(frozen=True, slots=True)
class _Known:
    """Say what quantizes a job, and what a tile of it costs: None and 0 if the CPU does. It has the job, so that no other gets its id."""

    job: Job
    shader: EncodeShader | None
    cost: int


class _Lane:
    """Hold the buffers of one step.

    In `source`, and in what goes up to it, stand the settings of each run, two times four u32, and then the tiles.
    """

    def __init__(self, device: Device, room: int) -> None:
        self.settings = np.zeros((_MOST, 2, device.alignment // 4), np.uint32)
        room += self.settings.nbytes
        self.transfer = Transfer(device, room)
        self.source = device.buffer(room + _SLACK, "tiles to quantize", uniform=True)
        self.status = device.buffer(_MOST * device.alignment, "the status of a step")
        self.wide: Any = None  # weights decoded from blocks
        self.extra: dict[str, Any] = {}  # parts that are not kept on the device


@dataclass
class _Made:
    """Say where a part of a run goes.

    Args:
        buffer: None for a part that is not kept, until the lane has one.
        offset: first byte.
        nbytes: of the part.
        whole: bytes that the shader writes, in whole units.
    """

    buffer: Any
    offset: int
    nbytes: int
    whole: int

    def goes_on(self, other: _Made) -> bool:
        """Return whether another place begins where this ends, and nothing beyond it is written."""
        return self.buffer is other.buffer and self.nbytes == self.whole and (self.buffer is None or self.offset + self.nbytes == other.offset)


@dataclass
class _Run:
    """Hold what one dispatch quantizes: stretches that stand side by side, as they go up and as they come back.

    Args:
        stretches: what.
        shader: quantizes them.
        element: as which the shader reads the weights.
        made: part -> where it goes.
        kept: the parts that stay there.
        at, wide_at: first byte in the lane, of the source and of the decoded weights.
    """

    stretches: list[Stretch]
    shader: EncodeShader
    element: str
    made: dict[str, _Made]
    kept: Collection[str]
    at: int = 0
    wide_at: int = 0

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(stretch.stop - stretch.start for stretch in self.stretches)

    @property
    def nbytes(self) -> int:
        """Bytes of the source."""
        return sum(stretch.raw.size for stretch in self.stretches)

    def sizes(self, name: str) -> list[int]:
        """Return the bytes that the stretches make of a part; only of the last may they end within a unit."""
        each, left, found = self.shader.parts[name], self.made[name].nbytes, []
        for stretch in self.stretches:
            found.append(min(left, -(-(stretch.stop - stretch.start) // self.shader.unit) * each))
            left -= found[-1]
        return found

    def add(self, other: _Run) -> bool:
        """Take what another run has, if that can follow in the same dispatch."""
        last, blocks = self.stretches[-1], any(run.stretches[0].job.info.is_block for run in (self, other))
        if blocks or last.raw.size % 8 or (other.shader.source, other.element) != (self.shader.source, self.element):
            return False
        if not all(made.goes_on(other.made[name]) for name, made in self.made.items()):
            return False
        for name, made in self.made.items():
            made.nbytes += other.made[name].nbytes
            made.whole += other.made[name].whole
        self.stretches += other.stretches
        return True


class GpuQuantizer:
    """Quantize tiles on a device, for a pipeline; see quantcache.loader.tiles.Quantizer. From any thread.

    Args:
        device: which.

    Attributes:
        quantized, given_back: how many times the device did tiles of a tensor, and how many times it left them to the CPU.
    """

    threads = _THREADS

    def __init__(self, device: Device) -> None:
        self.device = device
        most = min(_STEP, device.max_binding, device.max_buffer - (2 * _MOST + 1) * device.alignment)
        self.room: int = most // device.alignment * device.alignment
        self.quantized, self.given_back = 0, 0
        self._lock = threading.Lock()
        #: one thread at a time makes calls of wgpu: several would take the GIL from each other after every one
        self._recording = threading.Lock()
        self._lanes: queue.LifoQueue[_Lane | None] = queue.LifoQueue()
        for _ in range(_LANES):
            self._lanes.put(None)
        self._failed = self._widened = False
        self._shaders: dict[tuple[str, tuple[int, ...], str], EncodeShader | None] = {}
        self._texts: dict[tuple[str, str], str] = {}
        self._known: dict[int, _Known] = {}

    # ---- what a pipeline asks ----

    def expect(self, jobs: Sequence[Job]) -> int:
        """Give every tensor its place, those that will come together side by side; return the bytes that come here."""
        with self._lock:
            bundle, layer, nbytes = Bundle(self.device), -1, 0
            for job in jobs:
                job.kept, shader = False, self._look(job).shader
                if shader is None:
                    continue
                rooms = {part.name: self._room(job, part, shader) for part in _parts(job)}
                if job.layer != layer or not bundle.takes(rooms):  # layers leave one by one
                    bundle, layer = Bundle(self.device), job.layer
                places = bundle.add(rooms)
                job.kept = Kept(self.device, bundle, {part.name: (places[part.name], part.nbytes) for part in _parts(job)})
                nbytes += job.info.nbytes
        return nbytes

    def cost(self, job: Job) -> int:
        """Return what a tile of a job takes of the room; 0 if the CPU is to do it."""
        if self._failed or job.kept is False:
            return 0
        if job.kept is None:  # not known before: one that begins again, another way
            self.expect([job])
        return self._look(job).cost

    def encode(self, stretches: Sequence[Stretch], outputs: Arena, *, bring: bool = True) -> list[dict[str, NDArray[Any]] | None]:
        """Quantize whole tiles; None for those that the CPU is to do. What stays here comes back only if that is asked for."""
        found: list[dict[str, NDArray[Any]] | None] = [None] * len(stretches)
        with self._lock:
            lanes = self._lanes
            for _ in range(0 if bring or self._widened else _MORE_LANES):
                lanes.put(None)
            self._widened = self._widened or not bring
        lane, spoilt = lanes.get(), True
        # looked at once, and now: while this waited, other tiles of a tensor may have been left to the CPU, or the model closed
        places = [stretch.job.kept for stretch in stretches]
        mine = [number for number, place in enumerate(places) if place and not self._failed]
        try:
            if mine:
                lane = lane or _Lane(self.device, self.room)
                for number, made in zip(mine, self._encode(lane, [(stretches[n], places[n]) for n in mine], outputs, bring=bring), strict=True):
                    found[number] = made
            spoilt = False
        except DeviceError as error:
            self._give_up(error)
        finally:
            lanes.put(None if spoilt else lane)
        with self._lock:
            for stretch, place, made in zip(stretches, places, found, strict=True):
                if made is None:
                    stretch.job.kept = False  # it lacks these tiles
                    self.given_back += 1
                else:
                    self.quantized += 1
                    place.done += stretch.stop - stretch.start
        return found

    def _give_up(self, error: DeviceError) -> None:
        with self._lock:
            first, self._failed = not self._failed, True
        if first:
            warnings.warn(f"quantizing on the CPU: {error.message}", QuantcacheWarning, stacklevel=2)

    def close(self) -> None:
        """Let go of the buffers of the steps."""
        with self._lock:
            self._failed = True
            self._known.clear()
            self._lanes = queue.LifoQueue()  # a step that is under way gives its lane back to the old one
            self._lanes.put(None)

    # ---- what is known of a job ----

    def _look(self, job: Job) -> _Known:
        """Return what is known of a job."""
        found = self._known.get(id(job))
        if found is None:
            shader, nbytes = self._shader(job), self._wide_nbytes(job, min(job.tile, job.size))
            cost = max(self.device.aligned(nbytes), -(-self.room // _MOST))
            found = self._known[id(job)] = _Known(job, shader, cost if shader is not None else 0)
        return found

    def _shader(self, job: Job) -> EncodeShader | None:
        """Return the shader that a job needs; None if there is none, or the device cannot bind what it makes."""
        info, decision = job.info, job.decision
        blocks = info.is_block and not (job.changes or decision.exponent)
        if job.size < max(1, _LEAST) or job.encoder is None or not (job.kind.as_stored or blocks) or decision.codec not in codec_ids():
            return None
        if blocks and _decoder(info.dtype) is None:
            return None
        variant = codec(decision.codec).variants[job.variant]
        key = decision.codec, info.shape[1:], variant
        if key not in self._shaders:
            self._shaders[key] = codec(decision.codec).encode_shader(info.shape, variant)
        shader = self._shaders[key]
        if shader is None or self._wide_nbytes(job, min(job.tile, job.size)) > self.room:
            return None
        units = self.room // self._wide_nbytes(job, shader.unit) + 1
        made = max(units * nbytes for nbytes in shader.parts.values())
        fits = all(self._room(job, part, shader) <= self.device.max_buffer for part in job.encoder.parts)
        return shader if fits and made + self.device.alignment <= self.device.max_binding else None

    def _room(self, job: Job, part: Part, shader: EncodeShader) -> int:
        """Return the bytes of a part's place: a shader binds whole words from an alignment on, and writes whole units."""
        align = self.device.alignment
        exact = part.nbytes % align == 0 and job.size % shader.unit == 0
        return part.nbytes if exact else self.device.aligned(part.nbytes) + align

    def _wide_nbytes(self, job: Job, weights: int) -> int:
        """Return the bytes of weights as a shader reads them."""
        return weights * (4 if job.info.is_block else ITEMSIZE[job.info.dtype])

    # ---- one step ----

    def _encode(
        self, lane: _Lane, stretches: Sequence[tuple[Stretch, Kept]], outputs: Arena, *, bring: bool
    ) -> list[dict[str, NDArray[Any]] | None]:
        """Quantize what fits a lane, each to its place; None for what a shader does not know."""
        device, places, runs = self.device, {id(stretch): place for stretch, place in stretches}, self._runs(lane, stretches)
        settings = lane.settings
        for number, run in enumerate(runs):
            bases = [made.offset % device.alignment // 4 for made in run.made.values()]
            settings[number, :, : 1 + len(bases)] = [[run.weights, *bases], [run.weights, run.weights, *([0] * (len(bases) - 1))]]
        tiles = [(0, settings[: len(runs)].reshape(-1).view(np.uint8))]
        for run in runs:
            at = run.at
            for stretch in run.stretches:
                tiles.append((at, stretch.raw))
                at += stretch.raw.size
        lane.transfer.put(tiles)
        status = np.empty((len(runs), device.alignment), np.uint8)
        wanted: list[tuple[Binding, list[NDArray[np.uint8]]]] = [((lane.status, 0, status.size), [status.reshape(-1)])]
        taken: list[list[dict[str, NDArray[np.uint8]]]] = []
        for run in runs:
            taken.append([{} for _ in run.stretches])
            for name, made in run.made.items():
                if not bring and name in run.kept:
                    continue
                wanted.append(((made.buffer, made.offset, made.nbytes), []))
                for nbytes, arrays in zip(run.sizes(name), taken[-1], strict=True):
                    arrays[name] = outputs.array(f"from the device: {name}", np.uint8, nbytes)
                    wanted[-1][1].append(arrays[name])
        with self._recording:
            encoder = device.encoder()
            lane.transfer.record(encoder, lane.source)
            device.clear(encoder, lane.status)
            with device.compute_pass(encoder) as within:
                for number, run in enumerate(runs):
                    self._dispatch(within, lane, number, run)
            take = lane.transfer.submit(encoder, wanted)
        take()
        found: list[dict[str, NDArray[Any]] | None] = []
        for run, made_of, bad in zip(runs, taken, status[:, :4].max(axis=1).tolist(), strict=True):
            if not bad:
                found += [_typed(stretch, arrays) for stretch, arrays in zip(run.stretches, made_of, strict=True)]
            elif len(run.stretches) == 1:
                found.append(None)
            else:  # which of them it is
                found += [one for stretch in run.stretches for one in self._encode(lane, [(stretch, places[id(stretch)])], outputs, bring=bring)]
        return found

    def _runs(self, lane: _Lane, stretches: Sequence[tuple[Stretch, Kept]]) -> list[_Run]:
        """Return what is to be dispatched, with its places in the lane."""
        device, runs = self.device, list[_Run]()
        for stretch, kept in stretches:
            run = self._run(stretch, kept)
            if not runs or not runs[-1].add(run):
                runs.append(run)
        at, wide_at = lane.settings.nbytes, 0
        behind: dict[str, int] = {}
        for run in runs:
            run.at, run.wide_at = at, wide_at
            at += device.aligned(run.nbytes)
            wide_at += device.aligned(run.weights * 4) if run.stretches[0].job.info.is_block else 0
            for name, made in run.made.items():
                if made.buffer is None:
                    made.offset = behind.get(name, 0)
                    behind[name] = made.offset + device.aligned(made.whole)
        for name, nbytes in behind.items():
            if name not in lane.extra or lane.extra[name].size < nbytes:
                lane.extra[name] = device.buffer(1 << (nbytes - 1).bit_length(), f"{name} of a step")
        for run in runs:
            for name, made in run.made.items():
                made.buffer = made.buffer or lane.extra[name]
        if wide_at and lane.wide is None:
            lane.wide = device.buffer(self.room, "decoded tiles")
        return runs

    def _run(self, stretch: Stretch, kept: Kept) -> _Run:
        """Return what one stretch is dispatched as."""
        job, shader = stretch.job, self._look(stretch.job).shader
        assert shader is not None
        kept.bundle.make()
        units, made = -(-(stretch.stop - stretch.start) // shader.unit), {}
        for name, each in shader.parts.items():
            first, whole = stretch.start // shader.unit * each, units * each
            if name in kept.places:
                offset, nbytes = kept.places[name]
                made[name] = _Made(kept.bundle.buffer(name), offset + first, min(whole, nbytes - first), whole)
            else:
                made[name] = _Made(None, 0, whole, whole)
        return _Run([stretch], shader, "F32" if job.info.is_block else job.info.dtype, made, kept.places.keys())

    def _dispatch(self, within: Any, lane: _Lane, number: int, run: _Run) -> None:
        """Record what quantizes a run."""
        device, info, align = self.device, run.stretches[0].job.info, self.device.alignment
        settings = [(lane.source, (2 * number + second) * align, 16) for second in range(2)]
        source: Binding = (lane.source, run.at, -(-run.nbytes // 4) * 4)
        if info.is_block:
            decoder, wide = _decoder(info.dtype), (lane.wide, run.wide_at, run.weights * 4)
            assert decoder is not None
            pipeline = device.pipeline(decode_source(decoder, "F32", fast=True))
            device.dispatch(within, pipeline, [wide, settings[1], source], -(-run.weights // (UNIT * 256)))
            source = wide
        key = run.shader.source, run.element
        text = self._texts.get(key) or self._texts.setdefault(key, run.shader.whole(run.element))
        bound: list[Binding] = []
        for made in run.made.values():
            begin = made.offset // align * align
            bound.append((made.buffer, begin, made.offset - begin + made.whole))
        units = -(-run.weights // run.shader.unit)
        places = [source, (lane.status, number * align, 4), settings[0], *bound]
        device.dispatch(within, device.pipeline(text), places, -(-units // run.shader.units))


def _parts(job: Job) -> list[Part]:
    """Return the parts that are made by tiles, and kept on the device."""
    assert job.encoder is not None
    return [part for part in job.encoder.parts if part.weights]


def _typed(stretch: Stretch, arrays: dict[str, NDArray[np.uint8]]) -> dict[str, NDArray[Any]]:
    """Return parts as an encoder takes them: as bytes what is stored, and as float32 what it makes a part of itself."""
    kept = {part.name for part in _parts(stretch.job)}
    return {name: array if name in kept else array.view(np.float32) for name, array in arrays.items()}


def _decoder(name: str) -> WeightShader | None:
    return block_type(name).weight_shader if name in block_types() else None
