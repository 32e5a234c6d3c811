"""Own what of a model comes onto a GPU together, and goes together: its tensors, where they go, and what of them was asked of the model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcache.errors import DeviceError
from quantcache.loader.ahead import Check
from quantcache.loader.gpu.steps import Parts, units
from quantcache.loader.gpu.tensors import GpuTensor, Home, Span
from quantcache.quant.codec import codec, codec_ids
from quantcache.tensor import QuantTensor, element_name

if TYPE_CHECKING:
    from quantcache.loader.model import Model

__all__ = ["Arriving", "Group", "bundled"]

#: Bytes of the buffers that a whole model comes in.
_BUNDLE = 1 << 30


class Group:
    """Hold tensors that come and go together: a layer. All fields are guarded by the model's lock."""

    def __init__(self, number: int, names: list[str]) -> None:
        self.number, self.names = number, names
        self.home: Home | None = None
        self.tensors: dict[str, GpuTensor] = {}
        self.loading = False
        self.apart = False  # the budget, or the device, does not take it beside the layers before it
        self.reserved = 0  # bytes that count against the budget, from before it is loaded until it leaves


class Arriving:
    """A group on its way: where it goes, which tensors are there but for small parts, and what of it was asked of the model so far."""

    def __init__(
        self, group: Group, home: Home, places: Mapping[str, Any], spans: list[Span], mapped: list[Any], kept: Collection[str]
    ) -> None:
        self.group, self.home, self.places, self.mapped, self._kept = group, home, places, mapped, kept
        self.units = units(spans)
        self.checks: list[Future[dict[str, Parts]]] = []
        self.steps: list[Future[None]] = []
        self.lock = threading.Lock()
        self._found: dict[str, Parts] = {}
        #: tensors that were asked for again: what was moved before may be wrong, and nobody checks it any more
        self.renewed: set[str] = set()

    def parts_of(self, model: Model, name: str, *, again: bool = False) -> Parts:
        """Return a tensor's parts, and the checks that are to be fed with them.

        Args:
            model: the model.
            name: of the tensor.
            again: it turned out wrong, or cannot be read: have it checked, and built again, by the model.
        """
        with self.lock:  # two threads must feed the same checks
            found = None if again else self._found.get(name)
        if found is not None:
            return found
        whole = all(len(pieces) == 1 for pieces in self.places[name].values())
        if again or not (whole or name in self._kept):
            tensor, checks = model.in_memory(name), dict[str, Check]()
        else:  # of one that is there already, what it holds there may be nowhere else
            tensor, checks = (model.outline(name), {}) if name in self._kept else model.unchecked(name)
        try:
            parts = self._parts(name, tensor, checks)
        except ValueError:  # of what nobody has checked yet nothing could be made
            if again:
                raise
            return self.parts_of(model, name, again=True)
        with self.lock:
            if again:
                self._found.pop(name, None)
                self.renewed.add(name)
            return self._found.setdefault(name, parts)

    def _parts(self, name: str, tensor: QuantTensor | Any, checks: dict[str, Check]) -> Parts:
        """Return a tensor's parts, if they are as large as they were planned."""
        arrays = flat_parts(tensor)
        for part, pieces in self.places[name].items():
            planned = sum(size for _, _, size in pieces)
            if arrays[part].size != planned:
                raise DeviceError(f"tensor {name!r}: {part} has {arrays[part].size} bytes, {planned} were planned")
        return Parts(_kind(tensor), arrays, checks)

    def prepare(self, model: Model) -> None:
        """Look at tensors that are being quantized on the device: where their small parts will stand here is known before what they hold."""
        for name in self._kept:
            with contextlib.suppress(Exception):  # it is just being begun again, another way: parts of both may be seen, and are asked for later
                tensor = model.outline(name, wait=False)
                if isinstance(tensor, QuantTensor) and not codec(tensor.codec).shader_parts:  # else something is made of what they hold
                    self._found[name] = self._parts(name, tensor, {})

    def let_go(self) -> None:
        """Keep nothing of what was moved: of a matrix that was turned that is a copy; nor of the buffers, which may have to go."""
        self._found.clear()
        self.units.clear()
        self.places = {}
        self.checks.clear()
        self.steps.clear()


def bundled(groups: list[list[str]], sizes: Mapping[str, int]) -> list[list[str]]:
    """Put groups that follow each other together, up to the size of a buffer that has memory of its own."""
    found: list[list[str]] = []
    room = 0
    for names in groups:
        nbytes = sum(sizes[name] for name in names)
        if room < nbytes:
            found.append([])
            room = _BUNDLE
        found[-1] += names
        room -= nbytes
    return found


def _kind(tensor: QuantTensor | Any) -> tuple[str, tuple[int, ...], dict[str, str]]:
    """Return codec, shape and element types of a tensor as a GPU has it."""
    if isinstance(tensor, QuantTensor):
        more = {name: dtype for name, (dtype, _) in codec(tensor.codec).shader_parts.items()} if tensor.codec in codec_ids() else {}
        return tensor.codec, tensor.shape, {name: element_name(part.dtype) for name, part in tensor.parts.items()} | more
    return "f16", tensor.shape, {"values": element_name(tensor.dtype)}


def flat_parts(tensor: QuantTensor | Any) -> dict[str, Any]:
    """Return part -> flat uint8; views, unless a plain matrix stands the other way round in its file, and what only a shader needs.

    Raises:
        ValueError: the parts are damaged.
    """
    parts = dict(tensor.parts) if isinstance(tensor, QuantTensor) else {"values": tensor}
    if isinstance(tensor, QuantTensor) and tensor.codec in codec_ids():
        parts |= codec(tensor.codec).for_shader(parts)
    return {name: np.ascontiguousarray(part).reshape(-1).view(np.uint8) for name, part in parts.items()}
