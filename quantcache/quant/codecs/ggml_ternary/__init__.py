"""GGML's ternary block types: TQ1_0 (five weights a byte) and TQ2_0 (four weights a byte).

Source: ggml's ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

from quantcache.quant.blocks import Reference, register_family
from quantcache.quant.codecs.ggml_ternary import reference

#: In the order of kernel.c's numbers.
_TYPES: list[tuple[str, list[Any], Reference]] = [
    ("TQ1_0", [("qs", "u1", (48,)), ("qh", "u1", (4,)), ("d", "<f2")], reference.tq1_0),
    ("TQ2_0", [("qs", "u1", (64,)), ("d", "<f2")], reference.tq2_0),
]
register_family("ggml_ternary_decode", _TYPES)
