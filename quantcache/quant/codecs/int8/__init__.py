"""Affine Int8 in groups of 128 along the last axis: the layout of MLX, and of web-rwkv's Int8.

Source: mlx 0.32 `mx.quantize(group_size=128, bits=8)`, mlx-lm's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant import native
from quantcache.quant.codec import Call, Codec, Encoder, Part, Scratch, Status, register
from quantcache.quant.codecs.int8 import reference
from quantcache.quant.floats import from_f32, to_f32
from quantcache.quant.wgsl import EncodeShader, WeightShader, read

Array = NDArray[Any]


class Int8Encoder(Encoder):
    """Encode one tensor, with scales of one type."""

    def __init__(self, name: str, shape: tuple[int, ...], source_dtype: str, scale_dtype: str) -> None:
        rows, columns = shape
        self._dtype, self._scales_f16 = source_dtype, scale_dtype == "F16"
        base = name.removesuffix(".weight")
        groups = (rows, columns // reference.GROUP)
        self.parts = (
            Part("codes", name, "U32", (rows, columns // 4), 4),
            Part("scales", f"{base}.scales", scale_dtype, groups, reference.GROUP),
            Part("biases", f"{base}.biases", scale_dtype, groups, reference.GROUP),
        )

    def prepare(self, tile: Array, scratch: Scratch) -> tuple[Call, dict[str, Array]]:
        """Quantize whole groups."""
        stored = np.float16 if self._scales_f16 else np.float32
        codes = scratch.array("codes", np.uint8, tile.size)
        scales = scratch.array("scales", stored, tile.size // reference.GROUP)
        biases = scratch.array("biases", stored, tile.size // reference.GROUP)
        element, given = native.ELEMENT[self._dtype], native.contiguous(tile)
        call = ("int8_quantize", given, tile.size, element, int(self._scales_f16), codes, scales, biases)
        return call, {"codes": codes, "scales": scales, "biases": biases}

    def reference(self, tile: Array) -> tuple[Status, dict[str, Array]]:
        """Quantize whole groups."""
        status, codes, scales, biases = reference.quantize(to_f32(tile, self._dtype), scales_f16=self._scales_f16)
        return status, {"codes": codes, "scales": scales, "biases": biases}


@register
class Int8(Codec):
    """8 bits and a scale and a bias per 128 weights, float16 unless that would lose them."""

    id = "int8"
    variants = ("F16", "F32")

    def bits_per_weight(self) -> float:
        """Return 8.25."""
        return 8 + 32 / reference.GROUP

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Require whole groups in the last axis."""
        if len(shape) != 2 or not math.prod(shape):
            return "not a matrix"
        return None if shape[-1] % reference.GROUP == 0 else f"last axis {shape[-1]} is not a multiple of 128"

    def multiple(self, shape: tuple[int, ...]) -> int:
        """Return the group."""
        return reference.GROUP

    def encoder(self, name: str, shape: tuple[int, ...], source_dtype: str, variant: str) -> Encoder:
        """Return a new encoder."""
        return Int8Encoder(name, shape, source_dtype, variant)

    def weight_shader(self, dtypes: Mapping[str, str]) -> WeightShader | None:
        """Return weights.wgsl, with the scales as they are stored."""
        kind, file = ("array<u32>", "scales_f16") if dtypes["scales"] == "F16" else ("array<f32>", "scales_f32")
        parts = {"codes": "array<vec2<u32>>", "scales": kind, "biases": kind}
        return WeightShader(parts, "".join(map(read, ("codes.wgsl", f"codecs/int8/{file}.wgsl", "codecs/int8/weights.wgsl"))))

    def encode_shader(self, shape: tuple[int, ...], variant: str) -> EncodeShader | None:
        """Return encode.wgsl, which takes two groups at a time: two float16 are a word."""
        constants = f"const QC_HALVES = {str(variant == 'F16').lower()};\nconst QC_255TH = {float(np.float32(1 / 255))!r};\n"
        scales = 4 if variant == "F16" else 8
        parts = {"codes": 2 * reference.GROUP, "scales": scales, "biases": scales}
        return EncodeShader(2 * reference.GROUP, parts, 64, 64, constants + read("codecs/int8/encode.wgsl"))

    def dequantize_into(self, parts: Mapping[str, Array], out: Array, dtype: str, *, fresh: bool = False) -> None:
        """Decode a whole tensor."""
        codes = native.contiguous(parts["codes"]).reshape(-1).view(np.uint8)
        scales, biases = (native.contiguous(parts[name]).reshape(-1) for name in ("scales", "biases"))
        if native.level() == "reference":
            decoded = from_f32(reference.dequantize(codes, scales, biases), dtype)
            out[...] = decoded.view(out.dtype).reshape(out.shape)
        else:
            scales_f16 = int(scales.dtype == np.float16)
            native.kernel("int8_dequantize")(codes, scales, biases, out.size, scales_f16, out, native.ELEMENT[dtype], int(fresh))
