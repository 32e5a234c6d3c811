"""Own a GPU: the only importer of wgpu. Opening, buffers, bounded writes, fences, pipelines, and what can go wrong.

wgpu ends the process where it meets a mistake while work is submitted: a device that is lost, a buffer that is mapped or
destroyed, a command buffer used twice. So nothing is submitted but from here, each time right after a call that raises if the
device is lost by then, and no buffer is ever destroyed: dropping it is safe. Facts: docs/decisions/0012-gpu.md.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from quantcache.errors import DeviceError, DeviceOutOfMemory, DeviceUnavailable, QuantcacheError, UsageError
from quantcache.quant.native import copy
from quantcache.trace import span

__all__ = ["Binding", "Device", "open_device"]

#: Offsets of bindings are multiples of this on every adapter.
ALIGNMENT = 256
#: Bytes of one write, and of what a fence covers: a quarter of the staging memory.
_WRITE = 8 << 20
_FENCED = 16 << 20
#: Bytes that are read back at a time.
_READ = 256 << 20
#: The largest buffer for reading back that is kept for the next time.
_KEPT = 32 << 20
#: After so many seconds without an answer it is asked whether the device is still there.
_PATIENCE_S = 1.0
#: (buffer, first byte, bytes)
Binding = tuple[Any, int, int]
_WANTED = ("subgroup", "timestamp-query", "shader-f16")
_MAPPABLE = "mappable-primary-buffers"
#: READ would make a submission of its own before it maps, which wgpu spares itself where it has just made one, as we have; if it knows it.
_READ_MODE = "READ_NOSYNC"


def _wgpu() -> Any:
    try:
        import wgpu
    except ImportError as error:
        raise DeviceUnavailable(f"wgpu is not installed: {error}", hint="pip install 'quantcache[gpu]'") from error
    return wgpu


def open_device(name: str | None = None) -> Device:
    """Open the fastest GPU, with its own limits and the features that the shaders can use.

    Args:
        name: part of the adapter's name, to choose another; the environment's QUANTCACHE_GPU if None.

    Raises:
        DeviceUnavailable: there is none, or none of that name.
    """
    wgpu = _wgpu()
    name = name if name is not None else os.environ.get("QUANTCACHE_GPU")
    hint = "install a Vulkan driver (mesa-vulkan-drivers for a software one); quantcache doctor looks for it"
    try:
        # through OpenGL a second device, or another thread, can end the process
        found = [one for one in wgpu.gpu.enumerate_adapters_sync() if one.info["backend_type"] != "OpenGL"]
        if name:
            found = [one for one in found if name.lower() in f"{one.info['device']} {one.info['description']}".lower()]
        if not found:
            raise DeviceUnavailable(f"no GPU called {name!r}" if name else "no GPU adapter was found", hint=hint)
        adapter = found[0] if name else wgpu.gpu.request_adapter_sync(power_preference="high-performance")
        features = [feature for feature in _WANTED if feature in adapter.features]
        if _MAPPABLE in adapter.features and adapter.info["adapter_type"] in ("IntegratedGPU", "CPU"):
            features.append(_MAPPABLE)
        limits = {name: adapter.limits[name] for name in ("max-buffer-size", "max-storage-buffer-binding-size")}
        return Device(adapter.request_device_sync(required_features=features, required_limits=limits))
    except QuantcacheError:
        raise
    except Exception as error:  # wgpu raises RuntimeError without a driver, and its own classes
        raise DeviceUnavailable(f"no GPU can be opened: {str(error).splitlines()[0][:200]}", hint=hint) from error


class Device:
    """Hold a wgpu device; all that quantcache does with one goes through here, from any thread.

    Args:
        device: a wgpu.GPUDevice.
        staging: bytes that may be on their way at a time.
        max_buffer, max_binding: less than the device's own limits.

    Attributes:
        raw: the wgpu.GPUDevice.
    """

    def __init__(self, device: Any, *, staging: int = 64 << 20, max_buffer: int | None = None, max_binding: int | None = None) -> None:
        if not hasattr(device, "create_buffer") or not hasattr(device, "queue"):
            raise UsageError(f"not a wgpu device: {type(device).__name__}")
        wgpu = _wgpu()
        self.raw = device
        limits = device.limits
        least = min(limits["max-buffer-size"], max_buffer or 1 << 62)
        self.max_buffer = least // ALIGNMENT * ALIGNMENT
        self.max_binding = min(self.max_buffer, limits["max-storage-buffer-binding-size"], max_binding or 1 << 62) // ALIGNMENT * ALIGNMENT
        self.alignment: int = max(ALIGNMENT, limits["min-storage-buffer-offset-alignment"])
        info = device.adapter_info if hasattr(device, "adapter_info") else device.adapter.info
        self.name: str = info["device"] or info["description"] or "GPU"
        self.features = frozenset(device.features)
        #: memory is the CPU's own, and buffers can be written where they lie
        self.unified = info["adapter_type"] in ("IntegratedGPU", "CPU") and _MAPPABLE in self.features
        usage = wgpu.BufferUsage
        self._storage = usage.STORAGE | usage.COPY_SRC | usage.COPY_DST
        self._staged, self._landed, self._uniform = usage.MAP_WRITE | usage.COPY_SRC, usage.MAP_READ | usage.COPY_DST, usage.UNIFORM | usage.COPY_DST
        self._mapped = self._storage | usage.MAP_WRITE
        self._error: type[Exception] = wgpu.GPUError
        self._held, self._changes = 0, deque[int]()
        self._read_mode = _READ_MODE
        self._lock, self._submitting = threading.Lock(), threading.Lock()
        self._pipelines: dict[str, Any] = {}
        self._uniforms: dict[bytes, Any] = {}
        self._spare: dict[int, list[Any]] = {}
        with self._guard("opening the device"):
            self._token = device.create_buffer(size=8, usage=usage.COPY_SRC | usage.COPY_DST)
        self._staging = _Staging(self, staging)

    @classmethod
    def of(cls, device: Any) -> Device:
        """Return the Device of a wgpu.GPUDevice, of a Device, or of None: the fastest there is.

        Raises:
            DeviceUnavailable: there is none.
            UsageError: it is something else.
        """
        if isinstance(device, Device):
            return device
        if device is None:
            return _default()
        with _known_lock:
            found: Device | None = getattr(device, _OURS, None)
            if found is None:
                found = cls(device)
                setattr(device, _OURS, found)  # which lives as long as the device
            return found

    @contextlib.contextmanager
    def _guard(self, what: str, asked: int = 0) -> Iterator[None]:
        """Turn wgpu's errors into ours."""
        try:
            yield
        except (RuntimeError, AttributeError) as error:  # what wgpu's own Python says where a device is lost under it
            raise DeviceError(f"{self.name} failed at {what}: {error}") from error
        except self._error as error:
            text = str(error)
            if "memory" in text.lower():
                raise DeviceOutOfMemory(
                    f"{self.name} has no memory for {what}: {asked:,} bytes were asked for, {self.held:,} are held by uploads",
                    asked=asked,
                    held=self.held,
                    hint="model.upload(lazy=True, budget=...) keeps only some layers there",
                ) from error
            lost = "is lost" in text
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            raise DeviceError(f"{self.name} was lost" if lost else f"{self.name} failed at {what}: {lines[-1][:200]}") from error

    # ---- buffers ----

    def _allowed(self, nbytes: int, what: str) -> None:
        if nbytes > self.max_buffer:
            raise DeviceError(f"{self.name} makes no buffer of {nbytes:,} bytes for {what}: {self.max_buffer:,} at most")

    def aligned(self, nbytes: int) -> int:
        """Return so many bytes, rounded up to the alignment of bindings."""
        return -(-nbytes // self.alignment) * self.alignment

    def buffer(self, nbytes: int, what: str, *, uniform: bool = False) -> Any:
        """Return a new storage buffer that can be copied from and to.

        Args:
            nbytes: a multiple of 4, at most max_buffer.
            what: it is for, in messages.
            uniform: parts of it are bound as uniforms, too.

        Raises:
            DeviceOutOfMemory: there is no room.
            DeviceError: the device was lost, or makes none so large.
        """
        self._allowed(nbytes, what)
        with self._guard(what, nbytes):
            usage = self._storage | self._uniform if uniform else self._storage
            made = self.raw.create_buffer(label=f"quantcache {what}"[:120], size=nbytes, usage=usage)
        self._count(made, nbytes)
        return made

    def mapped_buffer(self, nbytes: int, what: str) -> Any:
        """Return the same, mapped: it is written with write_mapped() and usable after unmap(). Only if `unified`."""
        self._allowed(nbytes, what)
        with self._guard(what, nbytes):
            made = self.raw.create_buffer(label=f"quantcache {what}"[:120], size=nbytes, usage=self._mapped, mapped_at_creation=True)
        self._count(made, nbytes)
        return made

    def staging_buffer(self, nbytes: int) -> Any:
        """Return a new buffer that bytes go up through, mapped: see write_mapped(), unmap() and map_again()."""
        with self._guard("staging", nbytes):
            return self.raw.create_buffer(size=nbytes, usage=self._staged, mapped_at_creation=True)

    def landing_buffer(self, nbytes: int) -> Any:
        """Return a new buffer that bytes come back through: see mapping()."""
        with self._guard("reading back", nbytes):
            return self.raw.create_buffer(size=nbytes, usage=self._landed)

    def _count(self, made: Any, nbytes: int) -> None:
        self._changes.append(nbytes)
        weakref.finalize(made, self._changes.append, -nbytes)  # which may run anywhere, even under the lock

    @property
    def held(self) -> int:
        """Bytes of the buffers that were made here and are still referenced."""
        with self._lock:
            while self._changes:
                self._held += self._changes.popleft()
            return self._held

    def write(self, buffer: Any, offset: int, data: Any) -> None:
        """Write bytes, by way of a bounded amount of staging memory; return before they are there.

        Args:
            buffer: of this device, not mapped.
            offset: first byte, a multiple of 4.
            data: contiguous uint8 array or buffer; what is left of the last four bytes is zeros.

        Raises:
            DeviceError: the device was lost, or the buffer is another one's.
        """
        view = memoryview(data).cast("B")
        whole = len(view) // 4 * 4
        with span("upload", len(view)):
            for start in range(0, whole, _WRITE):
                self._write(buffer, offset + start, view, start, min(_WRITE, whole - start))
            if whole < len(view):
                rest = bytes(view[whole:]).ljust(4, b"\0")
                self._write(buffer, offset + whole, rest, 0, 4)

    def _write(self, buffer: Any, offset: int, data: Any, start: int, nbytes: int) -> None:
        self._staging.reserve(nbytes)
        try:
            with self._guard("a write", nbytes):
                self.raw.queue.write_buffer(buffer, offset, data, start, nbytes)  # submitted by the next fence, or by anybody
        finally:
            self._staging.written(nbytes)

    def settle(self) -> None:
        """Wait until everything that was written and submitted is done.

        Raises:
            DeviceError: the device was lost.
        """
        self._staging.settle()

    def write_mapped(self, buffer: Any, pieces: Sequence[tuple[int, Any]]) -> None:
        """Write into a mapped buffer.

        Args:
            buffer: from mapped_buffer() or staging_buffer().
            pieces: first byte, a multiple of 8, and uint8[bytes], one behind the other; up to a multiple of 8, what follows a piece becomes anything.
        """
        pieces = [(offset, data) for offset, data in pieces if data.size]
        if not pieces:
            return
        first, end = pieces[0][0], pieces[-1][0] + pieces[-1][1].size
        with self._guard("a write", end - first):
            mapped = getattr(buffer, "_experimental_get_mapped_range", None)
            if mapped is not None:  # write_mapped() copies with the GIL
                room = np.frombuffer(mapped(first, -(-(end - first) // 8) * 8), np.uint8)
                copy([(room[offset - first : offset - first + data.size], data) for offset, data in pieces], "upload")
            else:
                for offset, data in pieces:
                    buffer.write_mapped(np.pad(data, (0, -data.size % 8)), offset)

    def unmap(self, buffer: Any) -> None:
        """Give a mapped buffer to the device."""
        with self._guard("a write"):
            buffer.unmap()

    def map_again(self, buffer: Any) -> Callable[[], None]:
        """Return a function that waits until a staging buffer is mapped again, once all that was submitted with it is done."""
        with self._guard("a write"):
            promise = buffer.map_async("WRITE")
        return lambda: self._await(promise)

    def mapping(self, landing: Any, nbytes: int) -> contextlib.AbstractContextManager[Any]:
        """Begin to map a landing buffer; the context that is returned waits for it, and has its first bytes as uint8[nbytes]."""
        with self._guard("reading back", nbytes):
            try:
                promise = landing.map_async(self._read_mode, 0, nbytes)
            except ValueError:  # another wgpu
                self._read_mode = "READ"
                promise = landing.map_async(self._read_mode, 0, nbytes)
        return self._mapping(promise, landing, nbytes)

    @contextlib.contextmanager
    def _mapping(self, promise: Any, landing: Any, nbytes: int) -> Iterator[Any]:
        self._await(promise)
        try:
            with self._guard("reading back", nbytes):
                mapped = np.frombuffer(landing.read_mapped(0, nbytes, copy=False), np.uint8)
            yield mapped
        finally:
            with self._guard("reading back", nbytes):
                landing.unmap()

    def _await(self, promise: Any) -> None:
        with self._guard("waiting"):
            done = getattr(promise, "_thread_event", None)
            while done is not None and not done.wait(_PATIENCE_S):
                self.raw.create_bind_group_layout(entries=[])  # of a device that is destroyed nothing ever comes true
            promise.sync_wait()

    def read(self, source: Binding, *, before: Any | None = None) -> Any:
        """Return bytes of a buffer, once all that was submitted before is done.

        Args:
            source: what.
            before: a command encoder whose work comes first, in the same submission.

        Returns:
            uint8[bytes].
        """
        buffer, offset, nbytes = source
        out = np.empty(nbytes, np.uint8)
        if before is not None and not nbytes:
            self.submit(before)
        for start in range(0, nbytes, _READ):
            piece, encoder = out[start : start + _READ], self.encoder() if start or before is None else before
            whole = -(-piece.size // 4) * 4
            landing = self._landing(whole)
            self.copy(encoder, (buffer, offset + start, whole), landing, 0)
            self.submit(encoder)
            with self.mapping(landing, whole) as mapped:
                piece[...] = mapped[: piece.size]
            self._keep(landing)
        return out

    def _keep(self, landing: Any) -> None:
        if landing.size <= _KEPT:
            with self._lock:
                self._spare.setdefault(landing.size, []).append(landing)

    def _landing(self, nbytes: int) -> Any:
        """Return a buffer to read back through; they are kept, since new ones are slow to map."""
        size = 1 << max(12, (nbytes - 1).bit_length()) if nbytes <= _KEPT else nbytes
        with self._lock:
            kept = self._spare.get(size)
            if kept:
                return kept.pop()
        return self.landing_buffer(size)

    # ---- work ----

    def encoder(self) -> Any:
        """Return a new command encoder; it is for `submit`, once."""
        with self._guard("recording"):
            return self.raw.create_command_encoder()

    def clear(self, encoder: Any, buffer: Any) -> None:
        """Record that a buffer becomes zeros."""
        with self._guard("recording"):
            encoder.clear_buffer(buffer)

    def copy(self, encoder: Any, source: Binding, target: Any, offset: int) -> None:
        """Record a copy between buffers, of whole fours."""
        with self._guard("recording"):
            encoder.copy_buffer_to_buffer(source[0], source[1], target, offset, source[2])

    def submit(self, encoder: Any) -> None:
        """Submit what an encoder recorded.

        Raises:
            DeviceError: the device was lost.
        """
        with self._guard("a submission"):
            commands = encoder.finish()
            with self._submitting:  # nobody comes between the two
                self.raw.create_bind_group_layout(entries=[])  # raises if the device is lost already; submit() would abort
                self.raw.queue.submit([commands])

    def fence(self) -> Callable[[], None]:
        """Return a function that waits until all that was submitted so far is done."""
        landing = self._landing(8)
        encoder = self.encoder()
        self.copy(encoder, (self._token, 0, 8), landing, 0)
        self.submit(encoder)
        passing = self.mapping(landing, 8)

        def wait() -> None:
            with passing:
                pass
            self._keep(landing)

        return wait

    def pipeline(self, source: str) -> Any:
        """Return the compute pipeline of a shader's `main`, made once.

        Raises:
            DeviceError: the shader does not compile.
        """
        with self._lock:
            if source in self._pipelines:
                return self._pipelines[source]
        with self._guard("a shader"):
            module = self.raw.create_shader_module(code=source)
            made = self.raw.create_compute_pipeline(layout="auto", compute={"module": module, "entry_point": "main"})
        with self._lock:
            return self._pipelines.setdefault(source, made)

    def uniform(self, *values: int) -> Binding:
        """Return a uniform buffer of up to four u32, made once for the same values."""
        data = np.array([*values, 0, 0, 0, 0][:4], np.uint32).tobytes()
        with self._lock:
            found = self._uniforms.get(data)
        if found is None:
            with self._guard("a uniform", 16):
                found = self.raw.create_buffer(size=16, usage=self._uniform)
                self.raw.queue.write_buffer(found, 0, data)
            with self._lock:
                if len(self._uniforms) > 4096:
                    self._uniforms.clear()
                found = self._uniforms.setdefault(data, found)
        return found, 0, 16

    def dispatch(self, within: Any, pipeline: Any, bindings: Sequence[Binding], groups: int) -> None:
        """Record one dispatch.

        Args:
            within: a compute pass.
            pipeline: of this device.
            bindings: of group 0, from 0 on.
            groups: workgroups in all; spread over two dimensions where one does not take them. The shader numbers them
                wid.y * num_workgroups.x + wid.x, and has to leave out those beyond the last.
        """
        for _, _, size in bindings:
            if not 0 < size <= self.max_binding:
                raise DeviceError(f"{self.name} binds no {size:,} bytes: {self.max_binding:,} at most")
        most = self.raw.limits["max-compute-workgroups-per-dimension"]
        rows = -(-groups // most)
        # whole vec4: parts are padded to more than that
        entries = [
            {"binding": n, "resource": {"buffer": b, "offset": o, "size": min(-(-s // 16) * 16, b.size - o)}} for n, (b, o, s) in enumerate(bindings)
        ]
        with self._guard("binding"):
            group = self.raw.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
            within.set_pipeline(pipeline)
            within.set_bind_group(0, group)
            within.dispatch_workgroups(-(-groups // rows), rows)

    @contextlib.contextmanager
    def compute_pass(self, encoder: Any) -> Iterator[Any]:
        """Open a compute pass in an encoder; it ends with the block."""
        with self._guard("recording"):
            made = encoder.begin_compute_pass()
        try:
            yield made
        finally:
            with self._guard("recording"):
                made.end()


class _Staging:
    """Bound the bytes that wgpu stages: what is written counts until a fence behind it has passed."""

    def __init__(self, device: Device, limit: int) -> None:
        self._device = weakref.ref(device)
        self._limit = max(limit, _WRITE)
        self._fenced = min(_FENCED, max(_WRITE, self._limit // 4))
        self._changed = threading.Condition()
        self._flying = 0  # reserved, written or not
        self._loose = 0  # written, and behind no fence
        self._busy = 0  # threads that make a fence, or wait for one
        self._fences: deque[tuple[int, Callable[[], None]]] = deque()

    def reserve(self, nbytes: int) -> None:
        """Wait until so many bytes fit."""
        while True:
            with self._changed:
                if self._flying + nbytes <= self._limit or self._flying == 0:
                    self._flying += nbytes
                    return
                if not self._fences and not self._loose:  # others are writing, or busy with a fence
                    self._changed.wait(0.1)
                    continue
            self._pass()

    def written(self, nbytes: int) -> None:
        """Count bytes as written."""
        with self._changed:
            self._loose += nbytes
        self._place(self._fenced)

    def settle(self) -> None:
        """Wait for everything that was written."""
        while True:
            with self._changed:
                while self._busy and not self._fences and not self._loose:
                    self._changed.wait(0.1)
                if not self._fences and not self._loose:
                    return
            self._pass()

    def _place(self, least: int) -> None:
        """Put a fence behind what is loose, if that is so much: outside the lock, since it takes a while."""
        with self._changed:
            if not self._loose or self._loose < least:
                return
            covered, self._loose = self._loose, 0
            self._busy += 1
        fence = None
        try:
            device = self._device()
            assert device is not None
            fence = device.fence()
        finally:
            with self._changed:
                self._busy -= 1
                if fence is None:
                    self._flying -= covered
                else:
                    self._fences.append((covered, fence))
                self._changed.notify_all()

    def _pass(self) -> None:
        """Wait for the oldest fence, which is made if there is none."""
        with self._changed:
            there = bool(self._fences)
        if not there:
            self._place(0)
        with self._changed:
            if not self._fences:
                return
            covered, fence = self._fences.popleft()
            self._busy += 1
        try:
            fence()
        finally:
            with self._changed:
                self._busy -= 1
                self._flying -= covered
                self._changed.notify_all()


_OURS = "_quantcache_device"
_known_lock = threading.Lock()
_opened: list[Device] = []


def _default() -> Device:
    """Return the fastest GPU, opened once: that takes a second."""
    with _known_lock:
        if not _opened:
            _opened.append(open_device())
        return _opened[0]
