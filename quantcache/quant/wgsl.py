"""Own what a codec says to a GPU: WGSL that turns stored parts into weights. Runs nothing, and knows no device.

A weights file defines, on module-scope variables called `qc_<part>`:

    qc_init(local_index: u32)          fills workgroup memory; a workgroupBarrier() must follow
    qc_unit(row, unit, width: u32)     the 32 weights from column 32 * unit of a row on, as array<vec4<f32>, 8>; the tensor
                                       has `width` columns, a multiple of 32
    qc_weight(row, column, width)      one weight, of any width; only where the codec takes widths that are no multiple of 32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["UNIT", "WeightShader", "read"]

#: Weights that qc_unit() returns.
UNIT = 32
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, eq=False)
class WeightShader:
    """Describe how a shader gets at weights. Each is itself, so that what is made of one can be kept by it.

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


@cache
def read(path: str) -> str:
    """Return the text of a .wgsl file.

    Args:
        path: from the folder of this module, "codecs/nf4/weights.wgsl".
    """
    return (_FOLDER / path).read_text()

