"""Own where quantized tensors stand on a device: in buffers of several, made when the first of them comes. Moves no bytes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcache.loader.gpu.device import Binding, Device

__all__ = ["Bundle", "Kept"]

#: Bytes of a buffer: each takes wgpu so long that small ones would cost more than what is done with them.
_BUNDLE = 64 << 20


class Bundle:
    """Own the buffers in which parts of several tensors stand, one for each name of a part."""

    def __init__(self, device: Device) -> None:
        self._device, self._lock = device, threading.Lock()
        self._sizes: dict[str, int] = {}
        self._buffers: dict[str, Any] = {}

    def takes(self, rooms: Mapping[str, int]) -> bool:
        """Return whether parts of these sizes go in beside the others; anything goes into an empty one."""
        most = min(_BUNDLE, self._device.max_buffer)
        return not self._sizes or all(self._sizes.get(name, 0) + room <= most for name, room in rooms.items())

    def add(self, rooms: Mapping[str, int]) -> dict[str, int]:
        """Make room for the parts of one more tensor; return the first byte of each. To be called before make()."""
        places = {name: self._sizes.get(name, 0) for name in rooms}
        for name, room in rooms.items():
            self._sizes[name] = places[name] + room
        return places

    def make(self) -> None:
        """Make the buffers, once.

        Raises:
            DeviceError: there is no room on the device.
        """
        with self._lock:
            for name, size in self._sizes.items():
                if name not in self._buffers:
                    self._buffers[name] = self._device.buffer(size, f"{name} of quantized tensors")

    def buffer(self, name: str) -> Any:
        """Return a buffer that was made."""
        return self._buffers[name]


@dataclass
class Kept:
    """Hold what stays of a tensor on the device: the parts that are made by tiles.

    Args:
        device: where.
        bundle: where there.
        places: part -> first byte, and bytes.
        done: weights that are there; the others may have been quantized on the CPU.
    """

    device: Device
    bundle: Bundle
    places: Mapping[str, tuple[int, int]]
    done: int = 0

    @property
    def parts(self) -> dict[str, Binding]:
        """Part -> binding; once some of it is there."""
        return {name: (self.bundle.buffer(name), *place) for name, place in self.places.items()}
