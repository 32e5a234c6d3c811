"""Own what a codec says to a GPU: WGSL that turns stored parts into weights, and WGSL that quantizes. Runs nothing.

A weights file defines, on module-scope variables called `qc_<part>`:

    qc_init(local_index: u32)          fills workgroup memory; a workgroupBarrier() must follow
    qc_unit(row, unit, width: u32)     the 32 weights from column 32 * unit of a row on, as array<vec4<f32>, 8>; the tensor
                                       has `width` columns, a multiple of 32
    qc_weight(row, column, width)      one weight, of any width; only where the codec takes widths that are no multiple of 32

A quantize file defines the compute entry point `quantize`; see QuantizeShader. Neither knows a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

__all__ = ["UNIT", "QuantizeShader", "WeightShader", "read", "with_floats"]

#: Weights that qc_unit() returns.
UNIT = 32
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class WeightShader:
    """Describe how a shader gets at weights.

    Args:
        parts: name of a stored part -> WGSL type of the storage array that it is bound as, in binding order.
        source: defines qc_init, qc_unit and perhaps qc_weight.
        any_width: whether there is a qc_weight.
    """

    parts: Mapping[str, str]
    source: str
    any_width: bool = False

    def declarations(self, group: int, first: int) -> str:
        """Return the variables' declarations, for a shader of your own.

        Args:
            group: bind group.
            first: binding of the first part; the others follow.
        """
        return "".join(
            f"@group({group}) @binding({first + number}) var<storage, read> qc_{name}: {kind};\n"
            for number, (name, kind) in enumerate(self.parts.items())
        )


@dataclass(frozen=True)
class QuantizeShader:
    """Describe how a shader quantizes tiles.

    Bound in group 0: 0 the weights as array<vec4<u32>>, 1 the parts' outputs in order (one binding each), then the status
    (atomic u32), then a uniform vec4<u32>: weights / 8, width, 0, 0. Each workgroup of 256 takes `weights` weights, or a row.

    The status takes the numbers of Status, and HARD: a value is so large or small that a GPU may round or flush it
    otherwise than the norm; the tile is the CPU's then.

    Args:
        outputs: part name -> bits a weight, as the shader writes them; 0: one 32-bit word a row.
        source: the shader.
        by_row: a workgroup takes a whole row.
    """

    outputs: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    by_row: bool = False


HARD = 16


@cache
def read(path: str) -> str:
    """Return the text of a .wgsl file.

    Args:
        path: from the folder of this module, "codecs/nf4/weights.wgsl".
    """
    return (_FOLDER / path).read_text()


def with_floats(path: str) -> str:
    """Return a quantizing shader's text with what all of them share: loading, rounding, exact reciprocals."""
    return read("floats.wgsl") + read(path)
