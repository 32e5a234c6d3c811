"""Own the memory that a step goes up and comes back through: mapped buffers that are kept, and one submission for both ways.

A write of the queue makes a staging buffer every time, and a fence behind it, which is a submission of its own, bounds them; a
step that is read back anyway needs neither, and a call of wgpu costs twice what it does where several threads make them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.loader.gpu.device import Binding, Device
from quantcache.trace import span

__all__ = ["Transfer"]


class Transfer:
    """Bring bytes up and others back, again and again. For one thread at a time; after an error it is of no more use.

    Args:
        device: which.
        up: bytes at most that go up, a multiple of 8.
    """

    def __init__(self, device: Device, up: int) -> None:
        self._device = device
        self._up, self._back = device.staging_buffer(up), device.landing_buffer(1 << 12)

    def put(self, encoder: Any, pieces: Iterable[tuple[int, NDArray[np.uint8]]], target: Any) -> None:
        """Copy bytes to where they go up from, and record that they go to a buffer, which has them at the same places.

        Args:
            encoder: of the step.
            pieces: first byte, a multiple of 8, and uint8[bytes]; one behind the other. What lies between becomes anything.
            target: the buffer.
        """
        end = 0
        for offset, data in pieces:
            with span("upload", data.size):
                self._device.write_mapped(self._up, offset, data)
            end = offset + data.size
        self._device.unmap(self._up)
        self._device.copy(encoder, (self._up, 0, -(-end // 4) * 4), target, 0)

    def run(self, encoder: Any, wanted: Sequence[tuple[Binding, Sequence[NDArray[np.uint8]]]]) -> None:
        """Submit a step, wait for it, and take what came of it.

        Args:
            encoder: what is to be done; put() was called with it.
            wanted: pieces of buffers, from whole fours on, and uint8 arrays of as many bytes together; written.

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
        with back as mapped:
            for (_, outs), place in zip(wanted, places, strict=True):
                for out in outs:
                    out[...] = mapped[place : place + out.size]
                    place += out.size
        again()
