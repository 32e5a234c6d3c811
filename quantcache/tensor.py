"""Own the plain records that pass between the layers: element types, TensorInfo, QuantTensor.

Knows no codec, no file format and no store. Element types are called by their safetensors names
("F32", "BF16", "U8"), block types by their GGML names ("Q4_K").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from quantcache.errors import CodecError, UsageError

__all__ = ["BLOCKS", "ITEMSIZE", "Decoder", "PartSize", "QuantTensor", "TensorInfo", "array_dtype", "element_name", "float_dtype", "output_for", "unit"]

#: Bytes per element of every safetensors element type that is whole bytes.
ITEMSIZE: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

#: Weights in a block, and bytes of one, of every GGML block type. Source: ggml's ggml-common.h.
BLOCKS: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q8_1": (32, 36),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "Q8_K": (256, 292), "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18),
}  # fmt: skip

_NUMPY = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def array_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of an element type; bfloat16 and float8 come from ml_dtypes.

    Args:
        name: a key of ITEMSIZE.

    Raises:
        UsageError: the name is not an element type.
    """
    if name in _NUMPY:
        return np.dtype(_NUMPY[name])
    if name in _ML_DTYPES:
        import ml_dtypes  # here: 20 ms that a model without such tensors need not pay

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML_DTYPES[name]))
        return found
    raise UsageError(f"{name!r} is not an element type")


def element_name(dtype: DTypeLike) -> str:
    """Return the element type's name for a NumPy dtype, ml_dtypes included.

    Raises:
        UsageError: checkpoints have no such element type.
    """
    return _name_of(np.dtype(dtype))


@cache
def _name_of(wanted: np.dtype[Any]) -> str:
    for name, code in _NUMPY.items():
        if np.dtype(code) == wanted:
            return name
    for name, attribute in _ML_DTYPES.items():
        if wanted.name == attribute:
            return name
    raise UsageError(f"no element type for NumPy's {wanted}")


def float_dtype(dtype: DTypeLike) -> str:
    """Return "F32", "F16" or "BF16" for a dtype or one of the usual names.

    Args:
        dtype: np.float16, np.float32, "bfloat16", an ml_dtypes type, or the names themselves.

    Raises:
        UsageError: weights are not decoded to that type.
    """
    names = {"F32": "F32", "F16": "F16", "BF16": "BF16", "bfloat16": "BF16", "bf16": "BF16", "f16": "F16", "f32": "F32"}
    if isinstance(dtype, str) and dtype in names:
        return names[dtype]
    name = element_name(dtype)
    if name not in {"F32", "F16", "BF16"}:
        raise UsageError(f"weights are decoded to float32, float16 or bfloat16, not {np.dtype(dtype)}")
    return name


_LINE = 64
_LARGE = 64 << 10


def output_for(shape: tuple[int, ...], dtype: str, out: NDArray[Any] | None) -> NDArray[Any]:
    """Return the array to decode weights into: a new one, or the given one if they fit it.

    Args:
        shape: of the weights.
        dtype: their element type.
        out: given by the caller, or None.

    Raises:
        UsageError: `out` has another shape or type, or is not contiguous and writable.
    """
    if out is None:
        return _aligned(shape, array_dtype(dtype))
    if out.shape != shape or out.dtype != array_dtype(dtype):
        raise UsageError(f"out is {out.dtype} {out.shape}, the weights are {array_dtype(dtype)} {shape}")
    if not (out.flags.c_contiguous and out.flags.writeable):
        raise UsageError("out must be C-contiguous and writable")
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a new array that starts at a cache line: a store that straddles two takes twice as long."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return np.empty(shape, dtype)
    raw = np.empty(nbytes + _LINE, np.uint8)
    start = -raw.__array_interface__["data"][0] % _LINE
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def unit(dtype: str) -> tuple[int, int]:
    """Return how many weights of a type stand together, and in how many bytes: (1, 2) for "F16", (256, 144) for "Q4_K".

    Raises:
        KeyError: the type is unknown.
    """
    return BLOCKS.get(dtype) or (1, ITEMSIZE[dtype])


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Describe one tensor of a source file.

    Args:
        name: its name in the file.
        dtype: element type ("F16") or block type ("Q4_K").
        shape: in NumPy order, rows first; for block types too, in weights.
        offset: first byte in the file.
        nbytes: stored size.
        transposed: the file has the last two axes the other way round than the name promises; the shape is the file's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    transposed: bool = False

    @property
    def size(self) -> int:
        """Number of elements (weights)."""
        return math.prod(self.shape)

    @property
    def view_shape(self) -> tuple[int, ...]:
        """The shape that the name promises, and that views of the tensor have."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    @property
    def is_float(self) -> bool:
        """True for the element types that can be quantized."""
        return self.dtype in {"F32", "F16", "BF16", "F64"}

    @property
    def is_block(self) -> bool:
        """True for a GGML block type, which only its own decoder can read; for an unknown one, too."""
        return self.dtype not in ITEMSIZE

    @property
    def is_known(self) -> bool:
        """False for a type of which nothing is known but its number."""
        return self.dtype in ITEMSIZE or self.dtype in BLOCKS


@dataclass(frozen=True, slots=True)
class PartSize:
    """Describe one part of a tensor that somebody will get.

    Args:
        name: "codes".
        dtype: element type.
        nbytes: its size.
        position: where it stands in its file, or 0: what stands side by side can be moved as one.
        chunk: bytes that have a digest of their own, or 0.
    """

    name: str
    dtype: str
    nbytes: int
    position: int = 0
    chunk: int = 0


#: decode(parts, shape, element type, out or None) -> array of that shape
Decoder = Callable[[Mapping[str, NDArray[Any]], tuple[int, ...], str, NDArray[Any] | None], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """Hold one quantized tensor: read-only views of the stored parts.

    Args:
        codec: the codec's id, "nf4"; for a passed-through GGUF tensor its block type, "Q4_K".
        shape: of the weights, (out, in).
        parts: name -> array, as the codec's README lays them out; views, never copies.
        decode: turns the parts into weights; set by the loader.
    """

    codec: str
    shape: tuple[int, ...]
    parts: Mapping[str, NDArray[Any]]
    decode: Decoder | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def dequantize(self, dtype: DTypeLike = np.float16, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Decode all weights.

        Args:
            dtype: float16, float32 or bfloat16.
            out: an array of `shape` and `dtype` to write; a new one if None.

        Returns:
            The weights.

        Raises:
            CodecError: nothing here can decode this block type.
            UsageError: another dtype.
        """
        if self.decode is None:
            raise CodecError(f"nothing here decodes {self.codec}")
        return self.decode(self.parts, self.shape, float_dtype(dtype), out)
