"""Own the memory that a step goes up and comes back through: mapped buffers that are kept, and one submission for both ways.

A write of the queue makes a staging buffer every time, and a fence behind it, which is a submission of its own, bounds them; a
step that is read back anyway needs neither, and a call of wgpu costs twice what it does where several threads make them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.loader.gpu.device import Binding, Device
from quantcache.quant.native import copy

__all__ = ["Transfer"]


class Transfer:
    """Bring bytes up and others back, again and again. For one thread at a time; after an error it is of no more use.

    Args:
        device: which.
        up: bytes at most that go up, a multiple of 8.
    """

    def __init__(self, device: Device, up: int) -> None:
        self._device, self._end = device, 0
        self._up, self._back = device.staging_buffer(up), device.landing_buffer(1 << 12)

    def put(self, pieces: Sequence[tuple[int, NDArray[np.uint8]]]) -> None:
        """Copy bytes to where they go up from.

        Args:
            pieces: first byte, a multiple of 8, and uint8[bytes]; one behind the other. What lies between becomes anything.
        """
        self._end = pieces[-1][0] + pieces[-1][1].size
        self._device.write_mapped(self._up, pieces)

    def record(self, encoder: Any, target: Any) -> None:
        """Record that what was put goes to a buffer, which has it at the same places."""
        self._device.unmap(self._up)
        self._device.copy(encoder, (self._up, 0, -(-self._end // 4) * 4), target, 0)

    def submit(self, encoder: Any, wanted: Sequence[tuple[Binding, Sequence[NDArray[np.uint8]]]]) -> Callable[[], None]:
        """Submit a step; return what waits for it, and takes what came of it.

        Args:
            encoder: what is to be done; put() and record() were called.
            wanted: pieces of buffers, from whole fours on, and uint8 arrays of as many bytes together; written then.

        Raises:
            DeviceError: the device was lost.
        """
        device, end, places = self._device, 0, list[int]()
        for (_, _, nbytes), _ in wanted:
            places.append(end)
            end += -(-nbytes // 8) * 8
        if self._back.size < end:
            self._back = device.landing_buffer(1 << (end - 1).bit_length())
        for ((buffer, offset, nbytes), _), place in zip(wanted, places, strict=True):
            device.copy(encoder, (buffer, offset, -(-nbytes // 4) * 4), self._back, place)
        device.submit(encoder)
        again, back = device.map_again(self._up), device.mapping(self._back, end)

        def take() -> None:
            pairs = []
            with back as mapped:
                for (_, outs), place in zip(wanted, places, strict=True):
                    for out in outs:
                        pairs.append((out, mapped[place : place + out.size]))
                        place += out.size
                copy(pairs, "quantize")
            again()

        return take
