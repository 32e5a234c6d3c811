"""The cast to float16: for weights that stay unquantized, and as a codec of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant import native
from quantcache.quant.codec import Call, Codec, Encoder, Part, Scratch, Status, register
from quantcache.quant.codecs.f16 import reference
from quantcache.quant.floats import from_f32, to_f32
from quantcache.quant.wgsl import WeightShader, read

Array = NDArray[Any]


class F16Encoder(Encoder):
    """Cast one tensor; float16 passes through."""

    def __init__(self, name: str, shape: tuple[int, ...], source_dtype: str) -> None:
        self._dtype = source_dtype
        self.parts = (Part("values", name, "F16", shape, 1),)

    def prepare(self, tile: Array, scratch: Scratch) -> tuple[Call | None, dict[str, Array]]:
        """Cast; float16 passes through."""
        if self._dtype == "F16":
            return None, {"values": tile}
        half = scratch.array("values", np.float16, tile.size)
        return ("f16_cast", native.contiguous(tile), tile.size, native.ELEMENT[self._dtype], half), {"values": half}

    def reference(self, tile: Array) -> tuple[Status, dict[str, Array]]:
        """Cast; float16 passes through."""
        if self._dtype == "F16":
            return Status.OK, {"values": tile}
        status, half = reference.cast(to_f32(tile, self._dtype))
        return status, {"values": half}


@register
class F16(Codec):
    """16 bits a weight."""

    id = "f16"

    def bits_per_weight(self) -> float:
        """Return 16."""
        return 16.0

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Take any shape."""
        return None

    def multiple(self, shape: tuple[int, ...]) -> int:
        """Return 64, so that tiles start at whole cache lines."""
        return 64

    def encoder(self, name: str, shape: tuple[int, ...], source_dtype: str, variant: str) -> Encoder:
        """Return a new encoder."""
        return F16Encoder(name, shape, source_dtype)

    def weight_shader(self, dtypes: Mapping[str, str]) -> WeightShader | None:
        """Return the shader of float16; of bfloat16 and float32 too, for weights that stayed as they were."""
        files = {"F16": ("pair_f16", "weights"), "BF16": ("pair_bf16", "weights"), "F32": ("weights_f32",)}.get(dtypes["values"])
        if files is None:
            return None
        kind = "array<vec4<f32>>" if dtypes["values"] == "F32" else "array<vec4<u32>>"
        return WeightShader({"values": kind}, "".join(read(f"codecs/f16/{file}.wgsl") for file in files), any_width=True)

    def dequantize_into(self, parts: Mapping[str, Array], out: Array, dtype: str, *, fresh: bool = False) -> None:
        """Widen or copy."""
        decoded = from_f32(to_f32(parts["values"].reshape(-1), "F16"), dtype)
        out[...] = decoded.view(out.dtype).reshape(out.shape)
