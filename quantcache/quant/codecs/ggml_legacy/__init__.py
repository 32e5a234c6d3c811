"""GGML's block types with one scale, and perhaps an offset, a block: Q4_0 to Q8_1, Q1_0, Q2_0.

Source: ggml's ggml-common.h and ggml-quants.c. Q2_0 is ggml's (64 weights), not that of the fork that first used the
number 42 (128 weights): the sizes in a file tell them apart.
"""

from __future__ import annotations

from typing import Any

from quantcache.quant.blocks import BlockShader, Reference, register_family
from quantcache.quant.codecs.ggml_legacy import reference
from quantcache.quant.wgsl import Dots

_D, _M = ("d", "<f2"), ("m", "<f2")
_NIBBLES = ("qs", "u1", (16,))

#: In the order of kernel.c's numbers.
_TYPES: list[tuple[str, list[Any], Reference]] = [
    ("Q4_0", [_D, _NIBBLES], reference.q4_0),
    ("Q4_1", [_D, _M, _NIBBLES], reference.q4_1),
    # the fifth bits are one 32-bit word: big-endian files turn it round
    ("Q5_0", [_D, ("qh", "<u4"), _NIBBLES], reference.q5_0),
    ("Q5_1", [_D, _M, ("qh", "<u4"), _NIBBLES], reference.q5_1),
    ("Q8_0", [_D, ("qs", "i1", (32,))], reference.q8),
    ("Q8_1", [_D, ("s", "<f2"), ("qs", "i1", (32,))], reference.q8),
    ("Q1_0", [_D, ("qs", "u1", (16,))], reference.q1_0),
    ("Q2_0", [_D, ("qs", "u1", (16,))], reference.q2_0),
]
_SHADERS = {
    "Q4_0": BlockShader(("scaled.wgsl", "codecs/ggml_legacy/q4_0.wgsl"), Dots(run=1, apart=2, rows=6)),
    "Q8_0": BlockShader(("scaled.wgsl", "codecs/ggml_legacy/q8_0.wgsl")),
}
register_family("ggml_legacy_decode", _TYPES, shaders=_SHADERS)
