"""Hold the merging kernel to its reference, bit for bit, at every CPU level; and the reference to what it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantcache.quant import merge, native
from quantcache.quant.floats import from_f32, to_f32

Array = NDArray[Any]
Switch = Callable[[str], None]

COMPILED = [level for level in native.available() if level != "reference"] or ["scalar"]
LEVELS = ["reference", *COMPILED]
#: rows, rank, columns: below, at and above the kernel's 64 of each
SIZES = [(1, 1, 1), (3, 1, 64), (64, 64, 64), (65, 65, 65), (5, 64, 200), (130, 3, 63), (2, 200, 129), (1, 64, 1000)]


def _matrices(rows: int, rank: int, columns: int, seed: int, scale: float = 1.0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    shapes = (rows, columns), (rows, rank), (rank, columns)
    weights, left, right = ((rng.standard_normal(shape) * scale).astype(np.float32) for shape in shapes)
    return weights, left, right


def _merged(weights: Array, left: Array, right: Array, scale: float) -> bytes:
    changed = weights.copy()
    merge.add_product(changed, left, right, scale)
    return changed.tobytes()


@pytest.mark.parametrize("level", COMPILED)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-42])
def test_kernel_equals_reference(level: str, size: tuple[int, int, int], scale: float, kernel_level: Switch) -> None:
    """The same bits at every level, sums that are denormal among them."""
    matrices = _matrices(*size, seed=sum(size), scale=scale)
    kernel_level("reference")
    expected = _merged(*matrices, 0.7)
    kernel_level(level)
    assert _merged(*matrices, 0.7) == expected


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), rows=st.integers(1, 70), rank=st.integers(1, 70), columns=st.integers(1, 140))
def test_fresh_matrices(kernel_level: Switch, seed: int, rows: int, rank: int, columns: int) -> None:
    """The same bits on new matrices of any size every run."""
    matrices = _matrices(rows, rank, columns, seed)
    kernel_level("reference")
    expected = _merged(*matrices, -3.0)
    for level in COMPILED:
        kernel_level(level)
        assert _merged(*matrices, -3.0) == expected, level


@pytest.mark.parametrize("level", LEVELS)
def test_a_part_of_a_wider_matrix(level: str, kernel_level: Switch) -> None:
    """Columns of a wider matrix are changed where they stand, and nothing beside them."""
    kernel_level(level)
    wide, left, right = _matrices(9, 5, 100, 0)
    right = np.ascontiguousarray(right[:, 20:70])
    expected = wide.copy()
    expected[:, 20:70] = np.frombuffer(_merged(np.ascontiguousarray(wide[:, 20:70]), left, right, 2.0), np.float32).reshape(9, 50)
    merge.add_product(wide[:, 20:70], left, right, 2.0)
    np.testing.assert_array_equal(wide, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_cut_as_tiles_are(level: str, kernel_level: Switch) -> None:
    """How a weight is cut into tiles does not show in the result."""
    kernel_level(level)
    weights, left, right = _matrices(100, 70, 90, 1)
    whole = _merged(weights, left, right, 0.5)
    for rows, columns in ((1, 90), (7, 13), (64, 64), (100, 1)):
        cut = weights.copy()
        for top in range(0, 100, rows):
            for first in range(0, 90, columns):
                part = np.ascontiguousarray(right[:, first : first + columns])
                merge.add_product(cut[top : top + rows, first : first + columns], left[top : top + rows], part, 0.5)
        assert cut.tobytes() == whole, (rows, columns)


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_a_product(level: str, kernel_level: Switch) -> None:
    """W + scale * (A @ B), as float64 computes it, to float32's rounding."""
    kernel_level(level)
    weights, left, right = _matrices(40, 64, 80, 2)
    exact = weights.astype(np.float64) + 0.3 * (left.astype(np.float64) @ right.astype(np.float64))
    found = np.frombuffer(_merged(weights, left, right, 0.3), np.float32).reshape(40, 80)
    np.testing.assert_allclose(found, exact, rtol=0, atol=64 * 64 * 2**-24)


@pytest.mark.parametrize("level", COMPILED)
def test_nothing_to_merge(level: str, kernel_level: Switch) -> None:
    """Matrices without rows or columns are left."""
    kernel_level(level)
    merge.add_product(np.empty((0, 4), np.float32), np.empty((0, 2), np.float32), np.ones((2, 4), np.float32), 1.0)
    merge.add_product(np.empty((4, 0), np.float32), np.ones((4, 2), np.float32), np.empty((2, 0), np.float32), 1.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1000])
def test_widen(level: str, dtype: str, n: int, kernel_level: Switch) -> None:
    """Every element type becomes float32 without a loss; float64 is rounded."""
    kernel_level(level)
    rng = np.random.default_rng(n)
    values = rng.standard_normal(n) if dtype == "F64" else from_f32(rng.standard_normal(n).astype(np.float32), dtype)
    out = np.full(n + 3, 9.0, np.float32)
    merge.widen(values, dtype, out[:n])
    expected = values.astype(np.float32) if dtype == "F64" else to_f32(values, dtype)
    assert out[:n].tobytes() == expected.tobytes()
    assert (out[n:] == 9).all()
