"""Row-wise Int8 as LLM.int8() stores it: one float32 a row.

Source: Dettmers et al. 2022, arXiv:2208.07339; bitsandbytes 0.50.2, transformers' names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant import native
from quantcache.quant.codec import Call, Codec, Encoder, Part, Scratch, Status, register
from quantcache.quant.codecs.int8_row import reference
from quantcache.quant.floats import from_f32, to_f32
from quantcache.quant.wgsl import EncodeShader, WeightShader, read

Array = NDArray[Any]

#: A row is the smallest tile, and a tile must fit the memory bound.
MAX_COLUMNS = 1 << 21


class Int8RowEncoder(Encoder):
    """Encode one tensor by whole rows."""

    def __init__(self, name: str, shape: tuple[int, ...], source_dtype: str) -> None:
        self._dtype, self._columns = source_dtype, shape[1]
        base = name.removesuffix(".weight")
        self.parts = (
            Part("codes", name, "I8", shape, 1),
            Part("scales", f"{base}.SCB", "F32", shape[:1], shape[1]),
            Part("weight_format", f"{base}.weight_format", "U8", (), 0),
        )

    def prepare(self, tile: Array, scratch: Scratch) -> tuple[Call, dict[str, Array]]:
        """Quantize whole rows."""
        rows = tile.size // self._columns
        codes = scratch.array("codes", np.int8, tile.size)
        scales = scratch.array("scales", np.float32, rows)
        call = ("int8_row_quantize", native.contiguous(tile), rows, self._columns, native.ELEMENT[self._dtype], codes, scales)
        return call, {"codes": codes, "scales": scales}

    def reference(self, tile: Array) -> tuple[Status, dict[str, Array]]:
        """Quantize whole rows."""
        status, codes, scales = reference.quantize(to_f32(tile, self._dtype).reshape(-1, self._columns))
        return status, {"codes": codes.reshape(-1), "scales": scales}

    def finish(self) -> dict[str, Array]:
        """Return the format's number: 0, row-major."""
        return {"weight_format": np.zeros((), np.uint8)}


@register
class Int8Row(Codec):
    """8 bits and one float32 a row."""

    id = "int8-row"

    def bits_per_weight(self) -> float:
        """Return 8; the scales of a row of thousands do not count."""
        return 8.0

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Require a matrix whose rows fit a tile."""
        if len(shape) != 2 or not math.prod(shape):
            return "not a matrix"
        return None if shape[1] <= MAX_COLUMNS else f"last axis {shape[1]} is longer than {MAX_COLUMNS}"

    def multiple(self, shape: tuple[int, ...]) -> int:
        """Return the length of a row."""
        return shape[1]

    def encoder(self, name: str, shape: tuple[int, ...], source_dtype: str, variant: str) -> Encoder:
        """Return a new encoder."""
        return Int8RowEncoder(name, shape, source_dtype)

    def weight_shader(self, dtypes: Mapping[str, str]) -> WeightShader | None:
        """Return weights.wgsl."""
        parts = {"codes": "array<vec2<u32>>", "scales": "array<f32>"}
        return WeightShader(parts, read("codes.wgsl") + read("codecs/int8_row/weights.wgsl"), any_width=True)

    def encode_shader(self, shape: tuple[int, ...], variant: str) -> EncodeShader | None:
        """Return encode.wgsl, a row a workgroup; None for rows that are no whole words."""
        if shape[1] % 4:
            return None
        source = f"const QC_WIDTH = {shape[1]}u;\n" + read("codecs/int8_row/encode.wgsl")
        return EncodeShader(shape[1], {"codes": shape[1], "scales": 4}, 1, 256, source)

    def dequantize_into(self, parts: Mapping[str, Array], out: Array, dtype: str, *, fresh: bool = False) -> None:
        """Decode a whole tensor."""
        codes, scales = native.contiguous(parts["codes"]), native.contiguous(parts["scales"])
        if native.level() == "reference":
            out[...] = from_f32(reference.dequantize(codes, scales), dtype).view(out.dtype)
        else:
            native.kernel("int8_row_dequantize")(codes, scales, *out.shape, out, native.ELEMENT[dtype], int(fresh))
