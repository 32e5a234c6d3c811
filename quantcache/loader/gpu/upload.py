"""Own how a model comes onto a GPU: layer by layer or the largest first, on several threads, whole or lazily within a budget.

A tensor is asked of the model, which checks it, or builds it, as for any other caller; what goes to the device are the bytes
that were checked. Nothing but the staging memory of the device is needed beside.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcache.errors import DeviceError, UsageError
from quantcache.loader.gpu.device import Device
from quantcache.loader.gpu.tensors import GpuTensor, Home, padded_nbytes, place
from quantcache.tensor import QuantTensor, element_name
from quantcache.trace import working_for

if TYPE_CHECKING:
    from quantcache.loader.model import Model

__all__ = ["GpuModel", "upload"]

#: Parts up to this size are put together on the way, if they stand beside each other.
_SMALL = 64 << 10
_SMALLS = 4 << 20
#: More threads than that gain nothing: docs/decisions/0012-gpu.md.
_MAX_THREADS = 8


def upload(
    model: Model,
    device: Any = None,
    *,
    lazy: bool = False,
    budget: int | None = None,
    order: str = "layers",
    threads: int = 0,
) -> GpuModel:
    """Bring a model onto a GPU; see Model.upload."""
    if order not in ("layers", "size"):
        raise UsageError(f"order={order!r}: it is 'layers' or 'size'")
    if budget is not None and not lazy:
        raise UsageError("a budget is for lazy=True: else all layers stay")
    if lazy and order != "layers":
        raise UsageError("lazy=True goes by layers")
    found = GpuModel(model, Device.of(device), lazy=lazy, budget=budget, order=order, threads=threads)
    if not lazy:
        try:
            found.load_all()
        except BaseException:
            found.close()
            raise
    return found


class _Group:
    """Hold tensors that come and go together: a layer. All fields are guarded by the model's lock."""

    def __init__(self, number: int, names: list[str]) -> None:
        self.number, self.names = number, names
        self.home: Home | None = None
        self.tensors: dict[str, GpuTensor] = {}
        self.loading = False
        self.reserved = 0  # bytes that count against the budget, from before it is loaded until it leaves
        self.error: BaseException | None = None


class GpuModel(Mapping[str, GpuTensor]):
    """Map tensor names to tensors on a GPU, in layer order. Close it, or use it in a `with`; the Model stays open.

    Attributes:
        device: where it is.
        hit: whether nothing had to be quantized when it came here.
    """

    def __init__(self, model: Model, device: Device, *, lazy: bool, budget: int | None, order: str, threads: int) -> None:
        self.device = device
        self._model, self._lazy, self._budget = model, lazy, budget
        self._threads = threads or min(_MAX_THREADS, max(2, model.threads))
        names = model.in_layers()
        if order == "size":
            sizes = {report.name: report.nbytes for report in model.report()}
            names = [[name] for name in sorted(sizes, key=lambda name: (-sizes[name], name))]
            names = _bundled(names, sizes)
        self._groups = [_Group(number, found) for number, found in enumerate(names)]
        self._of = {name: group for group in self._groups for name in group.names}
        self._changed = threading.Condition()
        self._resident: OrderedDict[int, _Group] = OrderedDict()  # the least recently used first
        self._closed = False
        self._loader: threading.Thread | None = None
        self._wanted: deque[tuple[_Group, _Group]] = deque()  # a layer, and the one that it must fit beside

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    # ---- the mapping ----

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._of)

    def __iter__(self) -> Iterator[str]:
        """Iterate over names, by layer."""
        return iter(self._model)

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a tensor; moves nothing."""
        return name in self._of

    def __getitem__(self, name: str) -> GpuTensor:
        """Return a tensor; its layer comes first, if it is not there, and the next one is begun.

        What a lazy model lets go of stays valid for whoever still holds the tensor, and takes its memory so long.

        Raises:
            KeyError: there is no such tensor.
            DeviceOutOfMemory: the layer does not fit.
            DeviceError: the device was lost, or this was closed.
        """
        return self._have(self._of[name])[name]

    def layers(self) -> Iterator[dict[str, GpuTensor]]:
        """Yield the tensors of one layer after the other; while a layer is worked with, the next one comes."""
        for names in self._model.in_layers():
            yield {name: self[name] for name in names}

    @property
    def hit(self) -> bool:
        """Whether nothing had to be quantized."""
        return self._model.hit

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that it holds now."""
        with self._changed:
            return sum(group.home.nbytes for group in self._groups if group.home)

    # ---- coming and going ----

    def load_all(self) -> None:
        """Bring everything, on several threads; return when it is there.

        Raises:
            DeviceOutOfMemory: it does not fit.
            DeviceError: the device was lost.
        """
        self._model.prefetch()
        started = [group for group in self._groups if group.home is None]
        for group in started:
            group.loading = True
        with ThreadPoolExecutor(self._threads, "quantcache-upload") as pool:
            try:
                for group in started:
                    self._load(group, pool)
            finally:
                with self._changed:
                    for group in started:
                        group.loading = False
                    self._changed.notify_all()
        self.device.settle()

    def _have(self, group: _Group) -> dict[str, GpuTensor]:
        """Return a group's tensors, bringing them if need be."""
        with self._changed:
            while True:
                if self._closed:
                    raise DeviceError("this model was closed")
                if group.error is not None:
                    error, group.error = group.error, None
                    raise error
                if group.home is not None:
                    self._resident[group.number] = group
                    self._resident.move_to_end(group.number)
                    self._ask_next(group)
                    return group.tensors
                if not group.loading:
                    group.loading = True
                    break
                self._changed.wait(0.5)
        self._bring(group)
        return self._have(group)

    def _bring(self, group: _Group, beside: _Group | None = None) -> None:
        """Load a group that was marked as loading; an error is raised for whoever asks for it.

        Args:
            group: which.
            beside: a group that has to stay: if both do not fit the budget, nothing is done.
        """
        try:
            if not self._make_room(group, beside):
                return
            with ThreadPoolExecutor(self._threads, "quantcache-upload") as pool:
                self._load(group, pool)
            self.device.settle()
        except BaseException as error:  # noqa: BLE001 - it is handed to whoever asks
            with self._changed:
                group.home, group.tensors, group.reserved, group.error = None, {}, 0, error
        finally:
            with self._changed:
                group.loading = False
                self._changed.notify_all()

    def _ask_next(self, group: _Group) -> None:
        """Have the next layer come, if it fits beside this one: how large it is, its thread finds out, a miss may have to be waited for."""
        following = self._groups[group.number + 1 : group.number + 2]
        if not self._lazy or not following or following[0].home is not None or following[0].loading or following[0].error:
            return
        following[0].loading = True
        self._wanted.append((following[0], group))
        if self._loader is None or not self._loader.is_alive():
            self._loader = threading.Thread(target=self._run, name="quantcache-next-layer", daemon=True)
            self._loader.start()
        self._changed.notify_all()

    def _run(self) -> None:
        end = time.monotonic() + 5
        while True:
            with self._changed:
                while not self._wanted and not self._closed and time.monotonic() < end:
                    self._changed.wait(1)
                if not self._wanted:
                    self._loader = None
                    return
                group, beside = self._wanted.popleft()
            self._bring(group, beside)
            end = time.monotonic() + 5

    def _size(self, group: _Group) -> int:
        """Return the bytes that a group takes on the device; waits until it is quantized."""
        return sum(padded_nbytes(part.nbytes, self.device) for name in group.names for part in self._model.part_sizes(name))

    def _make_room(self, group: _Group, beside: _Group | None) -> bool:
        """Let the least recently used layers go, until a group fits the budget; return whether it may come."""
        if self._budget is None:
            return True
        size = self._size(group)
        if size > self._budget:
            raise UsageError(f"a budget of {self._budget:,} bytes does not take layer {group.number}, of {size:,}")
        with self._changed:
            if beside is not None and beside.reserved + size > self._budget:
                return False
            taken = sum(other.reserved for other in self._groups)
            while taken + size > self._budget and self._resident:
                _, oldest = self._resident.popitem(last=False)
                taken -= oldest.reserved
                oldest.home, oldest.tensors, oldest.reserved = None, {}, 0
            group.reserved = size
        return True

    def _load(self, group: _Group, pool: ThreadPoolExecutor) -> None:
        """Make a group's buffers and fill them."""
        model, device = self._model, self.device
        described = {name: (model.rows(name), model.part_sizes(name)) for name in group.names}
        mapped: list[Any] = []

        def new(nbytes: int) -> Any:
            what = f"layer {group.number} of {model.path.name}"
            if not device.unified:
                return device.buffer(nbytes, what)
            mapped.append(device.mapped_buffer(nbytes, what))
            return mapped[-1]

        home, places = place(described, device, new)

        def one(name: str) -> GpuTensor:
            if self._closed:
                raise DeviceError("the model was closed while it was uploaded")
            with working_for(model.profile):
                tensor = model.in_memory(name)
                _write(device, places[name], _bytes(tensor), mapped=bool(mapped), what=name)
            kind, shape, dtypes = _kind(tensor)
            return GpuTensor(kind, shape, dtypes, device, home, places[name])

        try:
            tensors = dict(zip(group.names, pool.map(one, group.names), strict=True))
        finally:
            for buffer in mapped:
                buffer.unmap()
        with self._changed:
            if self._closed:
                home.close()
                raise DeviceError("the model was closed while it was uploaded")
            group.home, group.tensors = home, tensors
            self._resident[group.number] = group
            self._changed.notify_all()

    # ---- the end ----

    def close(self) -> None:
        """Let go of the device's memory; tensors that were handed out say so when they are used."""
        with self._changed:
            self._closed = True
            for group in self._groups:
                if group.home is not None:
                    group.home.close()
                group.home, group.tensors = None, {}
            self._resident.clear()
            self._changed.notify_all()

    def __enter__(self) -> GpuModel:
        """Return the model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _bundled(single: list[list[str]], sizes: Mapping[str, int]) -> list[list[str]]:
    """Put tensors that follow each other into bundles of 64 MB, for one buffer each."""
    found: list[list[str]] = []
    room = 0
    for (name,) in single:
        if room < sizes[name]:
            found.append([])
            room = 64 << 20
        found[-1].append(name)
        room -= sizes[name]
    return found


def _kind(tensor: QuantTensor | Any) -> tuple[str, tuple[int, ...], dict[str, str]]:
    """Return codec, shape and element types of a tensor as a GPU has it."""
    if isinstance(tensor, QuantTensor):
        return tensor.codec, tensor.shape, {name: element_name(part.dtype) for name, part in tensor.parts.items()}
    return "f16", tensor.shape, {"values": element_name(tensor.dtype)}


def _bytes(tensor: QuantTensor | Any) -> dict[str, Any]:
    """Return part -> flat uint8; views, unless a plain matrix stands the other way round in its file."""
    parts = tensor.parts if isinstance(tensor, QuantTensor) else {"values": tensor}
    return {name: np.ascontiguousarray(part).reshape(-1).view(np.uint8) for name, part in parts.items()}


def _write(
    device: Device, places: Mapping[str, tuple[tuple[Any, int, int], ...]], arrays: Mapping[str, Any], *, mapped: bool, what: str
) -> None:
    """Write a tensor's parts to their places; small ones that stand side by side at once."""
    pending: list[tuple[Any, int, Any]] = []

    def flush() -> None:
        if not pending:
            return
        buffer, start, _ = pending[0]
        end = pending[-1][1] + pending[-1][2].size
        together = np.zeros(end - start, np.uint8)
        for _, offset, data in pending:
            together[offset - start : offset - start + data.size] = data
        put(buffer, start, together)
        pending.clear()

    def put(buffer: Any, offset: int, data: Any) -> None:
        if mapped:
            whole = data.size // 8 * 8
            if whole:
                buffer.write_mapped(data[:whole], offset)
            if whole < data.size:
                buffer.write_mapped(np.frombuffer(bytes(data[whole:]).ljust(8, b"\0"), np.uint8), offset + whole)
        else:
            device.write(buffer, offset, data)

    for name, pieces in places.items():
        data = arrays[name]
        if data.size != sum(size for _, _, size in pieces):
            raise DeviceError(f"tensor {what!r}: {name} has {data.size} bytes, {sum(size for _, _, size in pieces)} were planned")
        start = 0
        for buffer, offset, size in pieces:
            part = data[start : start + size]
            start += size
            beside = pending and pending[-1][0] is buffer and offset + size - pending[0][1] <= _SMALLS and offset > pending[-1][1]
            if not beside:
                flush()
            if size <= _SMALL:
                if size:
                    pending.append((buffer, offset, part))
            else:
                flush()
                put(buffer, offset, part)
    flush()
