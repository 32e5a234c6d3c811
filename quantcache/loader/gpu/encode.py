"""Own quantizing on a GPU, on a miss: tiles go up once, codes stay where they will be used, and come back for the store.

What comes back is what the CPU would have made, bit for bit; where a shader cannot promise that (values that are not finite,
or that a device may flush to zero), it says so, and the CPU does those tiles. A load never fails for want of a GPU.
"""

from __future__ import annotations

import math
import queue
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.errors import DeviceError, QuantcacheWarning
from quantcache.loader.gpu.compute import decode_source
from quantcache.loader.gpu.device import Binding, Device
from quantcache.loader.plan import Job
from quantcache.quant.blocks import block_type, block_types
from quantcache.quant.codec import Part, Scratch, codec, codec_ids
from quantcache.quant.wgsl import UNIT, EncodeShader, WeightShader
from quantcache.tensor import ITEMSIZE

__all__ = ["GpuQuantizer", "Kept"]

#: Bytes that go up at a time, as the source has them or as float32, whichever is more; and how many such steps are under way.
_STEP = 32 << 20
_LANES = 4
#: Bytes behind a step that a shader may read, and does not use.
_SLACK = 256
#: Smaller tensors take a CPU less time than the way there and back.
_LEAST = 1 << 16


@dataclass
class Kept:
    """Hold what stays of a tensor on the device: the parts that are made by tiles.

    Args:
        device: where.
        parts: name -> binding.
        done: weights that are there; the others may have been quantized on the CPU.
    """

    device: Device
    parts: Mapping[str, Binding]
    done: int = 0


class _Lane:
    """Hold the buffers of one step, of so many bytes."""

    def __init__(self, device: Device, step: int) -> None:
        self.source = device.buffer(-(-step // 4) * 4 + _SLACK, "tiles to quantize")
        self.status = device.buffer(256, "the status of a step")
        self.wide: Any = None  # weights decoded from blocks
        self.extra: dict[str, Any] = {}  # parts that are not kept on the device


class GpuQuantizer:
    """Quantize tiles on a device, for a pipeline; see quantcache.loader.tiles.Quantizer. From any thread.

    Args:
        device: which.

    Attributes:
        steps, given_back: how many steps the device has quantized, and how many it left to the CPU.
    """

    threads = _LANES

    def __init__(self, device: Device) -> None:
        self.device = device
        self._step: int = min(_STEP, device.max_binding, device.max_buffer - _SLACK)
        self.steps, self.given_back = 0, 0
        self._lock = threading.Lock()
        self._lanes: queue.LifoQueue[_Lane | None] = queue.LifoQueue()
        for _ in range(_LANES):
            self._lanes.put(None)
        self._failed = False
        self._shaders: dict[tuple[str, tuple[int, ...], str], EncodeShader | None] = {}
        self._texts: dict[tuple[EncodeShader, str], str] = {}

    # ---- what a pipeline asks ----

    def tiles(self, job: Job) -> int:
        """Return how many tiles of a job go up at a time; 0 if the CPU is to do it."""
        if self._failed or job.kept is False or job.size < _LEAST or self._shader(job) is None:
            return 0
        return self._tiles_in(job)

    def _tiles_in(self, job: Job) -> int:
        """Return how many tiles of a job make a step."""
        return max(1, self._step // self._wide_nbytes(job, job.tile))

    def encode(self, job: Job, start: int, raw: NDArray[np.uint8], outputs: Scratch) -> dict[str, NDArray[Any]] | None:
        """Quantize whole tiles; None if the CPU is to do it."""
        if self._failed or job.kept is False:
            return None
        try:
            lanes = self._lanes
            lane = lanes.get()
            try:
                lane = lane or _Lane(self.device, self._step)
                found = self._encode(lane, job, start, raw, outputs)
            finally:
                lanes.put(lane)
        except DeviceError as error:
            self._give_up(error)
            found = None
        with self._lock:
            if found is None:
                job.kept = False  # it lacks these tiles
                self.given_back += 1
            else:
                self.steps += 1
                if job.kept:
                    job.kept.done += min(job.size - start, self._weights(job, raw.size))
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
            self._lanes = queue.LifoQueue()  # a step that is under way gives its lane back to the old one
            self._lanes.put(None)

    # ---- one step ----

    def _shader(self, job: Job) -> EncodeShader | None:
        """Return the shader that a job needs; None if there is none, or the device cannot bind what it makes."""
        info, decision = job.info, job.decision
        blocks = info.is_block and not (job.changes or decision.exponent)
        if job.encoder is None or not (job.as_stored or blocks) or decision.codec not in codec_ids():
            return None
        if blocks and _decoder(info.dtype) is None:
            return None
        variant = codec(decision.codec).variants[job.variant]
        key = decision.codec, info.shape[1:], variant
        if key not in self._shaders:
            self._shaders[key] = codec(decision.codec).encode_shader(info.shape, variant)
        shader = self._shaders[key]
        if shader is None or self._wide_nbytes(job, job.tile) > self._step:
            return None
        step = self._tiles_in(job) * job.tile // shader.unit
        made = max(step * nbytes for nbytes in shader.parts.values())
        fits = all(self._room(part) <= self.device.max_buffer for part in job.encoder.parts)
        return shader if fits and made + self.device.alignment <= self.device.max_binding else None

    def _room(self, part: Part) -> int:
        """Return the bytes of a part's place: a shader binds whole words, from an alignment on."""
        align = self.device.alignment
        return -(-part.nbytes // align) * align + align

    def _wide_nbytes(self, job: Job, weights: int) -> int:
        """Return the bytes of weights as a shader reads them."""
        return weights * (4 if job.info.is_block else ITEMSIZE[job.info.dtype])

    def _keep(self, job: Job) -> Kept | None:
        """Return where the parts of a tensor stand on the device, made at its first step."""
        with self._lock:
            if job.kept is None:
                assert job.encoder is not None
                shader = self._shader(job)
                assert shader is not None
                parts = [part for part in job.encoder.parts if part.weights]
                sizes = {part.name: self._room(part) for part in parts}
                if sum(sizes.values()) > self.device.max_buffer:
                    homes = {name: (self.device.buffer(size, f"{name} of {job.info.name}"), 0) for name, size in sizes.items()}
                else:
                    buffer, position, homes = self.device.buffer(sum(sizes.values()), job.info.name), 0, {}
                    for name, size in sizes.items():
                        homes[name] = buffer, position
                        position += size
                job.kept = Kept(self.device, {part.name: (*homes[part.name], part.nbytes) for part in parts})
            return job.kept or None

    def _encode(self, lane: _Lane, job: Job, start: int, raw: NDArray[np.uint8], outputs: Scratch) -> dict[str, NDArray[Any]] | None:
        device, shader, kept = self.device, self._shader(job), self._keep(job)
        assert shader is not None
        assert job.encoder is not None
        if kept is None:
            return None
        stop = min(job.size, start + self._weights(job, raw.size))
        count, align = stop - start, device.alignment
        units = -(-count // shader.unit)
        device.write(lane.source, 0, raw)
        encoder = device.encoder()
        source, element = (lane.source, 0, -(-raw.size // 4) * 4), job.info.dtype
        planned = {part.name: part for part in job.encoder.parts}
        bound: list[Binding] = []
        bases: list[int] = []
        wanted: list[tuple[Binding, Any]] = []
        arrays: dict[str, NDArray[Any]] = {}
        for name, each in shader.parts.items():
            first, nbytes = start // shader.unit * each, units * each
            if name in kept.parts:
                buffer, offset, size = kept.parts[name]
                exact = min(nbytes, size - first)
            else:
                buffer, offset, first, exact = self._extra(lane, name, nbytes), 0, 0, nbytes
            from_ = (offset + first) // align * align
            bases.append((offset + first - from_) // 4)
            bound.append((buffer, from_, offset + first - from_ + nbytes))
            flat = outputs.array(f"from the device: {name}", np.uint8, exact)
            wanted.append(((buffer, offset + first, exact), flat))
            arrays[name] = flat.view(np.float32) if name not in planned or not planned[name].weights else flat
        status = np.empty(4, np.uint8)
        wanted.append(((lane.status, 0, 4), status))
        device.clear(encoder, lane.status)
        with device.compute_pass(encoder) as within:
            if job.info.is_block:
                decoder = _decoder(job.info.dtype)
                assert decoder is not None
                lane.wide = lane.wide or device.buffer(-(-self._step // 256) * 256, "decoded tiles")
                wide = (lane.wide, 0, count * 4)
                pipeline = device.pipeline(decode_source(decoder, "F32", fast=True))
                device.dispatch(within, pipeline, [wide, device.uniform(count, count, 0), source], -(-count // (UNIT * 256)))
                source, element = wide, "F32"
            text = self._texts.get((shader, element)) or self._texts.setdefault((shader, element), shader.whole(element))
            pipeline = device.pipeline(text)
            settings = device.uniform(count, *bases)
            device.dispatch(within, pipeline, [source, (lane.status, 0, 4), settings, *bound], -(-units // shader.units))
        device.read_into(wanted, before=encoder)
        return None if status.any() else arrays

    def _weights(self, job: Job, nbytes: int) -> int:
        """Return how many weights bytes of the source are."""
        if job.info.is_block:
            kind = block_type(job.info.dtype)
            return nbytes // kind.nbytes * kind.weights
        return nbytes // ITEMSIZE[job.info.dtype]

    def _extra(self, lane: _Lane, name: str, nbytes: int) -> Any:
        found = lane.extra.get(name)
        if found is None or found.size < nbytes:
            found = lane.extra[name] = self.device.buffer(1 << max(8, math.ceil(math.log2(nbytes))), f"{name} of a step")
        return found


def _decoder(name: str) -> WeightShader | None:
    return block_type(name).weight_shader if name in block_types() else None
