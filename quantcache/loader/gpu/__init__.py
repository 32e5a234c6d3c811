"""Bring cached models onto a GPU and compute with them there: what `quantcache.gpu` is. Imports wgpu when a device is opened."""

from __future__ import annotations

from quantcache.loader.gpu.compute import dequantize, matvec, record_matvec, weight_shader
from quantcache.loader.gpu.device import Device, open_device
from quantcache.loader.gpu.tensors import GpuTensor
from quantcache.loader.gpu.upload import GpuModel

__all__ = ["Device", "GpuModel", "GpuTensor", "dequantize", "matvec", "open_device", "record_matvec", "weight_shader"]
