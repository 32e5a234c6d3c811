"""Own how a model comes onto a GPU: layer by layer or the largest first, on several threads, whole or lazily within a budget.

A tensor is asked of the model, which builds it if need be. It goes in steps (steps.py), across tensors: what stands side by side
in the entry does so on the device. Each step is digested shortly before it is moved; a tensor that turns out wrong is built again
and moved again, before its layer is handed out. Nothing but the staging memory of the device is needed beside.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from quantcache.errors import DeviceError, DeviceOutOfMemory, UsageError
from quantcache.loader.gpu.device import Device
from quantcache.loader.gpu.groups import Arriving, Group, bundled
from quantcache.loader.gpu.steps import Parts, runs
from quantcache.loader.gpu.tensors import GpuTensor, Home, Span, padded_nbytes, place
from quantcache.loader.mapping import add_populate, whole_pages
from quantcache.memory import populate
from quantcache.quant import native
from quantcache.quant.native import Calls
from quantcache.trace import working_for

if TYPE_CHECKING:
    from quantcache.loader.model import Model

__all__ = ["GpuModel", "upload"]

#: Steps that checks are ahead, for each thread: while a buffer is made nothing is moved, and checks go on.
_AHEAD = 8
#: Layers that a lazy model without a budget brings ahead: with one, threads would wait at the end of each for its last steps.
_LAYERS_AHEAD = 3
#: More threads than that gain nothing: docs/decisions/0012-gpu.md.
_MAX_THREADS = 8


def upload(
    model: Model,
    device: Any = None,
    *,
    lazy: bool = False,
    budget: int | None = None,
    reuse: bool = False,
    order: str = "layers",
    threads: int = 0,
) -> GpuModel:
    """Bring a model onto a GPU; see Model.upload."""
    if order not in ("layers", "size"):
        raise UsageError(f"order={order!r}: it is 'layers' or 'size'")
    if budget is not None and not lazy:
        raise UsageError("a budget is for lazy=True: else all layers stay")
    if reuse and budget is None:
        raise UsageError("reuse=True is for a budget: else no layer leaves")
    if lazy and order != "layers":
        raise UsageError("lazy=True goes by layers")
    found = GpuModel(model, Device.of(device), lazy=lazy, budget=budget, reuse=reuse, order=order, threads=threads)
    if not lazy:
        try:
            found._load_all()
        except BaseException:
            found.close()
            raise
    return found


class GpuModel(Mapping[str, GpuTensor]):
    """Map tensor names to tensors on a GPU, in layer order. Close it, or use it in a `with`; the Model stays open.

    Attributes:
        device: where it is.
        hit: whether nothing had to be quantized when it came here.
    """

    def __init__(
        self, model: Model, device: Device, *, lazy: bool, budget: int | None = None, reuse: bool = False, order: str = "layers", threads: int = 0
    ) -> None:
        self.device = device
        self._model, self._lazy, self._budget, self._reuse = model, lazy, budget, reuse
        self._spare: deque[Any] = deque()  # buffers of layers that left, to be written again; the longest there first
        self._threads = threads or min(_MAX_THREADS, max(2, model.threads))
        names, self._shared = model.in_layers(), 0
        self._late = -1  # the group that comes once all is quantized
        if order == "size" or (not lazy and model.hit):  # nothing leaves by itself, and nothing is waited for
            sizes = {report.name: report.nbytes for report in model.report()}
            if order == "size":
                names = [[name] for name in sorted(sizes, key=lambda name: (-sizes[name], name))]
            names, self._shared = bundled(names, sizes), device.max_buffer
        elif not lazy and (there := {name for name, kept in model.kept().items() if kept.device.raw is device.raw}):
            # what is quantized there leaves little to bring, which comes at the end: the threads that quantize need the interpreter
            early = [found for found in names if there.isdisjoint(found)]
            names, self._late = [*early, [name for found in names if not there.isdisjoint(found) for name in found]], len(early)
        self._groups = [Group(number, found) for number, found in enumerate(names)]
        self._of = {name: group for group in self._groups for name in group.names}
        self._changed = threading.Condition()
        self._resident: OrderedDict[int, Group] = OrderedDict()  # the least recently used first
        self._asked: Group | None = None  # for which somebody asked last
        self._closed = False
        self._homes: weakref.WeakSet[Home] = weakref.WeakSet()
        #: layers that are on their way while one is used
        self._ahead = 0 if not lazy else _LAYERS_AHEAD if budget is None else 2 if reuse else 1
        self._looked: set[int] = set()  # layers that were asked for of the disk, if need be, and have not begun
        self._loaders: list[threading.Thread] = []
        self._turn = threading.Lock()  # layers are begun one after the other
        self._pool = ThreadPoolExecutor(self._threads, "quantcache-upload")
        self._checkers = ThreadPoolExecutor(self._threads, "quantcache-check")
        self._wanted: deque[tuple[Group, Group]] = deque()  # a layer, and the one that it must fit beside

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

        What a lazy model lets go of stays valid for whoever still holds the tensor, and takes its memory so long; with `reuse` it is
        written over, and its tensors raise DeviceError.

        Raises:
            KeyError: there is no such tensor.
            DeviceOutOfMemory: the layer does not fit.
            DeviceError: the device was lost, or this was closed.
        """
        return self._have(self._of[name])[name]

    def layers(self) -> Iterator[dict[str, GpuTensor]]:
        """Yield the tensors of one layer after the other; while a layer is worked with, the next one comes.

        With `reuse`, submit what uses a layer before you ask for the next one.
        """
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

    def _load_all(self) -> None:
        """Bring everything, on several threads; return when it is there.

        Raises:
            DeviceOutOfMemory: it does not fit.
            DeviceError: the device was lost.
        """
        started = [group for group in self._groups if group.home is None]
        self._prefetch(started)
        for group in started:
            group.loading = True
        arriving: list[Arriving] = []
        try:
            for group in started:
                arriving += [self._begin(group)]
            for one in arriving:
                self._arrive(one)
            self.device.settle()
        except BaseException as error:
            self._stop(arriving)
            if self._closed and isinstance(error, Exception):
                raise DeviceError("the model was closed while it was uploaded") from error
            raise
        finally:
            with self._changed:
                for group in started:
                    group.loading = False
                self._changed.notify_all()

    def _have(self, group: Group) -> dict[str, GpuTensor]:
        """Return a group's tensors, bringing them if need be."""
        with self._changed:
            self._asked = group
            if group.loading and self._goes_on and not self._closed:  # what does not fit now will not until somebody asks for another
                self._ask_next(group)
            while True:
                if self._closed:
                    raise DeviceError("this model was closed")
                if group.home is not None:
                    self._resident[group.number] = group
                    self._resident.move_to_end(group.number)
                    self._ask_next(group)
                    return group.tensors
                if not group.loading:
                    group.loading = True
                    break
                self._changed.wait(0.5)
        found = self._bring(group)
        with self._changed:
            self._ask_next(group)
        return found

    def _bring(self, group: Group) -> dict[str, GpuTensor]:
        """Load a group that was marked as loading, and return its tensors."""
        with self._bringing(group) as arriving:
            self._start(group, None, arriving)
            if not arriving:
                raise DeviceError("this model was closed")
            if self._goes_on:
                with self._changed:
                    self._ask_next(group)
            return self._arrive(arriving[0])

    @property
    def _goes_on(self) -> bool:
        """Whether the next layers begin before the one that is asked for is there, so that threads go on without a pause.

        With a budget, whoever waits still holds the layer before it: only if that is written over is there room.
        """
        return self._budget is None or self._reuse

    def _start(self, group: Group, beside: Group | None, arriving: list[Arriving]) -> None:
        """Begin to load a group, unless it does not fit the budget beside another that has to stay."""
        if self._make_room(group, beside):
            soon = self._groups[group.number : group.number + 1 + self._ahead]
            self._prefetch([one for one in soon if beside is None or one.number not in self._looked])
            self._looked.update(one.number for one in soon)
            self._looked.discard(group.number)
            arriving.append(self._begin(group))

    @contextlib.contextmanager
    def _bringing(self, group: Group) -> Iterator[list[Arriving]]:
        """Give what is on its way up if the block fails; the group is not marked as loading after it."""
        arriving: list[Arriving] = []
        try:
            yield arriving
        except BaseException as error:
            self._stop(arriving)
            arriving.clear()
            with self._changed:
                group.home, group.tensors, group.reserved = None, {}, 0
            if self._closed and isinstance(error, Exception):
                raise DeviceError("the model was closed while it was uploaded") from error
            raise
        finally:
            with self._changed:
                group.loading = False
                self._changed.notify_all()

    def _ask_next(self, group: Group) -> None:
        """Have the next layers come; with a budget one, if it fits beside this: how large it is, its thread finds out, a miss may have to be waited for."""
        for following in self._groups[group.number + 1 : group.number + 1 + self._ahead]:
            if following.home is not None or following.loading or following.apart:
                continue
            following.loading = True
            self._loaders = [thread for thread in self._loaders if thread.is_alive()]
            if len(self._loaders) < self._ahead + self._reuse:
                thread = threading.Thread(target=self._run, name="quantcache-next-layer", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads here: whoever asks for the layer brings it
                    following.loading = bool(self._loaders)
                else:
                    self._loaders.append(thread)
            if following.loading:
                self._wanted.append((following, group))
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with contextlib.ExitStack() as stack:
                with self._turn:
                    wanted = self._next_wanted()
                    if wanted is None:
                        return
                    group, beside = wanted
                    stack.enter_context(self._quietly(group))
                    arriving = stack.enter_context(self._bringing(group))
                    self._start(group, beside, arriving)
                if arriving:
                    self._arrive(arriving[0])
                    arriving.clear()  # nothing of it is held while this waits
                    continue
            with self._changed:  # there was no room; now there may be, for somebody asked for another meanwhile
                if self._asked not in (None, beside) and not self._closed:
                    self._ask_next(self._asked)

    def _next_wanted(self) -> tuple[Group, Group] | None:
        """Return a layer to bring and the one that it must fit beside; None, and this thread ends, if none is wanted for a while."""
        end = time.monotonic() + 5
        with self._changed:
            while not self._wanted and not self._closed and time.monotonic() < end:
                self._changed.wait(1)
            if self._wanted:
                return self._wanted.popleft()
            self._loaders.remove(threading.current_thread())
            return None

    @contextlib.contextmanager
    def _quietly(self, group: Group) -> Iterator[None]:
        """Keep what fails behind the caller's back: whoever asks for the layer tries again, and is told."""
        try:
            yield
        except DeviceOutOfMemory:
            with self._changed:
                group.apart = True  # else it would be tried at every use of the layers before it
        except Exception:  # noqa: BLE001, S110 - see above
            pass

    def _size(self, group: Group) -> int:
        """Return the bytes that a group takes on the device; waits until it is quantized."""
        return sum(padded_nbytes(part.nbytes, self.device) for name in group.names for part in self._model.outlines(name).parts)

    def _make_room(self, group: Group, beside: Group | None) -> bool:
        """Let the least recently used layers go, until a group fits the budget; return whether it may come."""
        if self._budget is None:
            return True
        size = self._size(group)
        if size > self._budget:
            raise UsageError(f"a budget of {self._budget:,} bytes does not take layer {group.number}, of {size:,}")
        with self._changed:
            while True:
                if beside is not None and self._asked is not None and beside.number < self._asked.number < group.number:
                    beside = self._asked  # nobody works with the other one any more
                if beside is not None and beside.reserved + size > self._budget:
                    group.apart = beside.number == group.number - 1  # it may fit beside the one between
                    return False
                taken = sum(other.reserved for other in self._groups)
                for oldest in list(self._resident.values()):
                    if taken + size <= self._budget:
                        break
                    if beside is not None and (oldest is self._asked or beside.number <= oldest.number <= group.number):  # somebody works with it, or will
                        continue
                    del self._resident[oldest.number]
                    taken -= oldest.reserved
                    if self._reuse and oldest.home is not None:
                        self._spare += oldest.home.own
                        oldest.home.close()
                    oldest.home, oldest.tensors, oldest.reserved = None, {}, 0
                if taken + size <= self._budget:
                    group.reserved = size
                    return True
                if beside is not None or self._closed:  # the rest is on its way for others
                    return False
                self._changed.wait(0.5)

    def _buffer(self, group: Group, nbytes: int, made: int) -> Any:
        """Return a buffer for a group that has made so many bytes: one of a layer that left, or a new one, for which such may have to go."""
        assert self._budget is not None
        with self._changed:
            like = next((number for number, spare in enumerate(self._spare) if spare.size == nbytes), None)
            if like is not None:
                found = self._spare[like]
                del self._spare[like]
                return found
            held = made + nbytes + sum(other.reserved for other in self._groups if other is not group)
            while self._spare and held + sum(spare.size for spare in self._spare) > self._budget:
                self._spare.popleft()  # of which nothing may be held here while the new one is made
        return self.device.buffer(nbytes, f"a layer of {self._model.path.name}")

    def _prefetch(self, groups: list[Group]) -> None:
        """Have the model bring, and check, what has to come from disk."""
        names = [name for group in groups for name in group.names if not self._model.is_warm(name)]
        if names:
            self._model.prefetch(names)

    def _begin(self, group: Group) -> Arriving:
        """Make a group's buffers, and have the threads fill them; on a miss, once it is quantized."""
        arriving = self._laid_out(group, planned=True) if group.number == self._late else None
        arriving = arriving or self._laid_out(group)
        assert arriving is not None
        if arriving.units:  # the threads that move may still be at the layer before, or wait for a buffer
            self._check_ahead(arriving, 0)
        arriving.steps = [self._pool.submit(self._step, arriving, number) for number in range(len(arriving.units))]
        return arriving

    def _laid_out(self, group: Group, *, planned: bool = False) -> Arriving | None:
        """Give a group's tensors their places, in buffers that are made now.

        Args:
            group: which.
            planned: as it is planned, while it is quantized; else once it is.

        Returns:
            None if it did not come as it was planned: nothing is left of it then.
        """
        model, device = self._model, self.device
        found = {name: model.outlines(name, wait=not planned) for name in group.names}
        kept = {name: one.kept for name, one in found.items() if one.kept is not None and one.kept.device.raw is device.raw}
        described = {
            name: (one.rows, [part for part in one.parts if name not in kept or part.name not in kept[name].places]) for name, one in found.items()
        }
        mapped: list[Any] = []
        made: list[Any] = []

        def new(nbytes: int) -> Any:
            what = f"layer {group.number} of {model.path.name}"
            if self._reuse:
                made.append(self._buffer(group, nbytes, sum(buffer.size for buffer in made)))
                return made[-1]
            if not device.unified:
                return device.buffer(nbytes, what)
            mapped.append(device.mapped_buffer(nbytes, what))
            return mapped[-1]

        home, places, spans = place(described, device, new, self._shared)
        arriving = Arriving(group, home, places, spans, mapped, kept.keys())
        if planned:
            try:
                arriving.prepare(model)
                model.wait()  # for all at once: to be woken for every tensor would cost those that quantize it more
            except BaseException:
                self._stop([arriving])
                raise
            if not all(model.holds(name, one) for name, one in found.items()):  # some of it was left to the CPU, or is stored elsewhere
                self._stop([arriving])
                return None
        bound = {name: one.parts for name, one in kept.items()}
        for name, there in bound.items():  # quantized there: only the rest is to be brought
            places[name] = {part.name: (there[part.name],) if part.name in there else places[name][part.name] for part in found[name].parts}
        home.share(binding for there in bound.values() for binding in there.values())
        return arriving

    def _check_ahead(self, arriving: Arriving, number: int) -> Future[dict[str, Parts]]:
        """Return the check of a step; it was begun a few steps before, as those behind it are now.

        One thread that checked and moved would keep the bus waiting; one that is far ahead might find its pages gone again.
        """
        with arriving.lock:
            while len(arriving.checks) < min(len(arriving.units), number + 1 + _AHEAD * self._threads):
                arriving.checks.append(self._checkers.submit(self._check, arriving, arriving.units[len(arriving.checks)]))
            return arriving.checks[number]

    def _check(self, arriving: Arriving, unit: list[Span]) -> dict[str, Parts]:
        """Fault a few megabytes of a group in, digest them, in one foreign call, and return the tensors that they are of."""
        if self._closed:
            raise DeviceError("the model was closed while it was uploaded")
        with working_for(self._model.profile):
            names = list(dict.fromkeys(span.name for span in unit))
            found = {name: arriving.parts_of(self._model, name) for name in names}
            calls, taking, readable = Calls(), list[Callable[[], None]](), True
            compiled = native.compiled()
            for address, nbytes in whole_pages((native.address(data), data.size) for _, _, data in runs(unit, found, gather=False)):
                if compiled:
                    add_populate(calls, address, nbytes)
                else:
                    readable = readable and not populate(address, nbytes)
            for span in unit:
                if (check := found[span.name].checks.get(span.part)) is not None:
                    taking.append(check.add_to(calls, span.start, found[span.name].arrays[span.part][span.start : span.start + span.nbytes]))
            if not readable or calls.run() < len(calls):
                return {name: arriving.parts_of(self._model, name, again=True) for name in names}
            for take in taking:
                take()
            return found

    def _step(self, arriving: Arriving, number: int) -> None:
        """Write a few megabytes of a group."""
        found = self._check_ahead(arriving, number).result()
        with working_for(self._model.profile):
            for buffer, offset, data in runs(arriving.units[number], found):
                self._put(arriving, buffer, offset, data)

    def _put(self, arriving: Arriving, buffer: Any, offset: int, data: Any) -> None:
        if any(buffer is one for one in arriving.mapped):  # not what a quantizer made
            self.device.write_mapped(buffer, [(offset, data)])
        else:
            self.device.write(buffer, offset, data)

    def _arrive(self, arriving: Arriving) -> dict[str, GpuTensor]:
        """Wait until a group is written, and hand it out."""
        group, home = arriving.group, arriving.home
        step = None
        try:
            for step in arriving.steps:
                step.result()
        finally:
            del step  # else its error holds this, and this its error, with all buffers
        tensors = {}
        for name in group.names:
            parts = arriving.parts_of(self._model, name)  # of an empty one nothing was written
            if name not in arriving.renewed and not all(check.passed() for check in parts.checks.values()):
                parts = arriving.parts_of(self._model, name, again=True)
            if name in arriving.renewed:
                for part, pieces in arriving.places[name].items():
                    start = 0
                    for buffer, offset, size in pieces:
                        self._put(arriving, buffer, offset, parts.arrays[part][start : start + size])
                        start += size
            tensors[name] = GpuTensor(*parts.kind, self.device, home, arriving.places[name])
        for buffer in arriving.mapped:
            self.device.unmap(buffer)
        arriving.mapped.clear()
        arriving.let_go()
        with self._changed:
            if self._closed:
                home.close()
                raise DeviceError("the model was closed while it was uploaded")
            group.home, group.tensors = home, tensors
            self._homes.add(home)
            self._resident[group.number] = group
            self._changed.notify_all()
        return tensors

    def _stop(self, arriving: list[Arriving]) -> None:
        """Give up groups that are on their way, once no thread is at them."""
        for one in arriving:
            for step in one.steps:
                step.cancel()
            for check in one.checks:
                check.cancel()
        for one in arriving:
            for step in one.steps:
                _wait(step)
            for check in one.checks:  # no step begins another one
                _wait(check)
            one.home.close()
            one.let_go()
            for buffer in one.mapped:
                with contextlib.suppress(DeviceError):
                    self.device.unmap(buffer)

    # ---- the end ----

    def close(self) -> None:
        """Let go of the device's memory; tensors that were handed out say so when they are used."""
        with self._changed:
            self._closed = True
            for home in list(self._homes):  # those of layers that left, too
                home.close()
            for group in self._groups:
                group.home, group.tensors = None, {}
            self._resident.clear()
            self._spare.clear()
            self._changed.notify_all()
        for pool in (self._checkers, self._pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> GpuModel:
        """Return the model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


def _wait(future: Future[Any]) -> None:
    """Wait until a future has ended, however; concurrent.futures.wait() waits for ever for what a pool that is shut down dropped."""
    with contextlib.suppress(CancelledError):
        future.exception()
