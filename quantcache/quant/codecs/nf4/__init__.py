"""NF4 as bitsandbytes stores it: block 64, first weight in the high nibble; plain and double-quantized.

The table and the map stand here and nowhere else: the kernel gets them as pointers.
Source: Dettmers et al. 2023, arXiv:2305.14314; bitsandbytes 0.50.2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantcache.quant import native
from quantcache.quant.codec import Call, Codec, Encoder, Part, Scratch, Status, register
from quantcache.quant.codecs.nf4 import reference
from quantcache.quant.floats import from_f32, to_f32
from quantcache.quant.wgsl import Dots, EncodeShader, WeightShader, read

Array = NDArray[Any]

#: The 16 values: quantiles of the normal distribution, with an exact zero.
TABLE = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
MIDDLES = (TABLE[:-1] + TABLE[1:]) / np.float32(2)
_MIDDLES = native.Pinned(MIDDLES)


#: The 256 values for absmax, and the 255 halfway between them. Made on import: later, somebody may have changed
#: the rounding mode.
NESTED_MAP = reference.nested_map()
NESTED_MIDDLES = (NESTED_MAP[:-1] + NESTED_MAP[1:]) / np.float32(2)


@lru_cache(maxsize=4096)  # the layers of a model have the same few shapes
def _quant_state(shape: tuple[int, ...], source_dtype: str, offset: float | None) -> Array:
    """Return the JSON that bitsandbytes keeps beside the codes, padded with spaces to 64 bytes' multiple."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": reference.BLOCK,
        "dtype": names[source_dtype],
        "shape": list(shape),
    }
    if offset is not None:
        state |= {"nested_blocksize": reference.NESTED, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state).encode()
    # 32 characters are left for the offset, so that the size is known before it is
    room = len(text) if offset is None else len(text) - len(json.dumps(offset)) + 32
    return np.frombuffer(text.ljust(-(-room // 64) * 64), np.uint8)


def _nested_offset(parts: Mapping[str, Array]) -> float:
    """Return what is added to every absmax.

    Raises:
        ValueError: the state is damaged.
    """
    try:
        return float(json.loads(parts["quant_state"].tobytes())["nested_offset"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no offset in the state: {error}") from error


class Nf4Encoder(Encoder):
    """Encode one tensor; nested keeps every absmax (1/16 byte a weight) until finish()."""

    def __init__(self, name: str, shape: tuple[int, ...], source_dtype: str, *, nested: bool) -> None:
        self._shape, self._dtype, self.collects = shape, source_dtype, nested
        n = math.prod(shape)
        blocks = -(-n // reference.BLOCK)
        self._absmax = np.empty(blocks, np.float32) if nested else None
        state = _quant_state(shape, source_dtype, 0.0 if nested else None)
        codes = Part("codes", name, "U8", ((n + 1) // 2, 1), 2)
        quant_map = Part("quant_map", f"{name}.quant_map", "F32", (16,), 0)
        quant_state = Part("quant_state", f"{name}.quant_state.bitsandbytes__nf4", "U8", (state.size,), 0)
        if nested:
            self.parts = (
                codes,
                Part("absmax", f"{name}.absmax", "U8", (blocks,), 0),
                Part("nested_absmax", f"{name}.nested_absmax", "F32", (-(-blocks // reference.NESTED),), 0),
                quant_map,
                Part("nested_quant_map", f"{name}.nested_quant_map", "F32", (256,), 0),
                quant_state,
            )
        else:
            absmax = Part("absmax", f"{name}.absmax", "F32", (blocks,), reference.BLOCK)
            self.parts = (codes, absmax, quant_map, quant_state)

    def prepare(self, tile: Array, scratch: Scratch) -> tuple[Call, dict[str, Array]]:
        """Quantize whole blocks."""
        codes = scratch.array("codes", np.uint8, (tile.size + 1) // 2)
        absmax = scratch.array("absmax", np.float32, -(-tile.size // reference.BLOCK))
        call = ("nf4_quantize", native.contiguous(tile), tile.size, native.ELEMENT[self._dtype], _MIDDLES, codes, absmax)
        return call, {"codes": codes, "absmax": absmax}

    def reference(self, tile: Array) -> tuple[Status, dict[str, Array]]:
        """Quantize whole blocks."""
        status, codes, absmax = reference.quantize(to_f32(tile, self._dtype), MIDDLES)
        return status, {"codes": codes, "absmax": absmax}

    def encoded(self, start: int, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Keep the absmax of a tile, if nested."""
        if self._absmax is None:
            return arrays
        first, absmax = start // reference.BLOCK, arrays["absmax"]
        self._absmax[first : first + absmax.size] = absmax
        return {name: array for name, array in arrays.items() if name != "absmax"}

    def finish(self) -> dict[str, Array]:
        """Return the table, the state and, if nested, the quantized absmax."""
        if self._absmax is None:
            return {"quant_map": TABLE, "quant_state": _quant_state(self._shape, self._dtype, None)}
        if native.level() == "reference":
            offset = reference.mean(self._absmax)
            codes, nested = reference.encode_absmax(self._absmax, offset, NESTED_MIDDLES)
        else:
            codes = np.empty(self._absmax.size, np.uint8)
            nested = np.empty(-(-codes.size // reference.NESTED), np.float32)
            mean = np.empty(1, np.float64)
            native.kernel("nf4_mean_absmax")(self._absmax, codes.size, mean)
            native.kernel("nf4_encode_absmax")(self._absmax, codes.size, mean, NESTED_MIDDLES, codes, nested)
            offset = mean[0]
        return {
            "absmax": codes,
            "nested_absmax": nested,
            "quant_map": TABLE,
            "nested_quant_map": NESTED_MAP,
            "quant_state": _quant_state(self._shape, self._dtype, float(offset)),
        }


@register
class Nf4(Codec):
    """4 bits and one float32 per 64 weights."""

    id = "nf4"
    nested = False

    def bits_per_weight(self) -> float:
        """Return 4.5."""
        return 4.5

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Require whole blocks in the last axis: bitsandbytes' AVX-512 decoding is wrong for some other widths."""
        if len(shape) != 2 or not math.prod(shape):
            return "not a matrix"
        return None if shape[-1] % reference.BLOCK == 0 else f"last axis {shape[-1]} is not a multiple of 64"

    def multiple(self, shape: tuple[int, ...]) -> int:
        """Return the block."""
        return reference.BLOCK

    def encoder(self, name: str, shape: tuple[int, ...], source_dtype: str, variant: str) -> Encoder:
        """Return a new encoder."""
        return Nf4Encoder(name, shape, source_dtype, nested=self.nested)

    def weight_shader(self, dtypes: Mapping[str, str]) -> WeightShader | None:
        """Return weights.wgsl, and how it gets at absmax."""
        parts, scale = {"codes": "array<vec2<u32>>", "absmax": "array<f32>"}, "codecs/nf4/scale.wgsl"
        if self.nested:
            numbers = ("nested_absmax", "nested_quant_map", "nested_offset")
            parts, scale = parts | {"absmax": "array<u32>"} | dict.fromkeys(numbers, "array<f32>"), "codecs/nf4/scale_nested.wgsl"
        return WeightShader(parts, read(scale) + read("codecs/nf4/weights.wgsl"), dots=Dots(run=1, apart=1, rows=8), by_rows=not self.nested)

    def encode_shader(self, shape: tuple[int, ...], variant: str) -> EncodeShader | None:
        """Return encode.wgsl; of nested ones absmax becomes codes on the CPU."""
        below = " + ".join(f"u32(value > {float(middle)!r})" for middle in MIDDLES)
        source = f"fn qc_middles_below(value: f32) -> u32 {{ return {below}; }}\n" + read("codecs/nf4/encode.wgsl")
        return EncodeShader(reference.BLOCK, {"codes": reference.BLOCK // 2, "absmax": 4}, 64, 64, source)

    def dequantize_into(self, parts: Mapping[str, Array], out: Array, dtype: str, *, fresh: bool = False) -> None:
        """Decode a whole tensor."""
        codes, absmax = native.contiguous(parts["codes"]).reshape(-1), native.contiguous(self.absmax(parts))
        if native.level() == "reference":
            decoded = from_f32(reference.dequantize(codes, absmax, out.size, TABLE), dtype)
            out[...] = decoded.view(out.dtype).reshape(out.shape)
        else:
            native.kernel("nf4_dequantize")(codes, absmax, out.size, TABLE, out, native.ELEMENT[dtype], int(fresh))

    def absmax(self, parts: Mapping[str, Array]) -> NDArray[np.float32]:
        """Return the absmax of every block, float32[n / 64]."""
        return parts["absmax"]


@register
class Nf4DoubleQuantized(Nf4):
    """4 bits, 8 bits per 64 weights, and one float32 per 16,384."""

    id = "nf4-dq"
    nested = True
    shader_parts = MappingProxyType({"nested_offset": ("F32", 4)})

    def bits_per_weight(self) -> float:
        """Return 4 + 8 / 64 + 32 / 16384."""
        return 4 + 8 / reference.BLOCK + 32 / (reference.BLOCK * reference.NESTED)

    def for_shader(self, parts: Mapping[str, Array]) -> dict[str, Array]:
        """Return the offset, which stands in a JSON text."""
        return {"nested_offset": np.array([_nested_offset(parts)], np.float32)}

    def absmax(self, parts: Mapping[str, Array]) -> NDArray[np.float32]:
        """Decode the absmax of every block, float32[n / 64]."""
        offset = _nested_offset(parts)
        codes, nested = parts["absmax"], parts["nested_absmax"]
        if native.level() == "reference":
            return reference.decode_absmax(codes, nested, np.float32(offset), NESTED_MAP)
        out = np.empty(codes.size, np.float32)
        native.kernel("nf4_decode_absmax")(
            native.contiguous(codes), native.contiguous(nested), codes.size, np.array([offset], np.float64), NESTED_MAP, out
        )
        return out
