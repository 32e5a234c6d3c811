"""Fail the Nth call on the store, for every N and every error that a disk can give: a load never fails for it."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

HERE = Path(__file__).parent
ERRORS = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ESTALE]


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("scenario", ["first", "miss", "hit"])
@pytest.mark.parametrize("network", [False, True], ids=["local", "network"])
def test_every_call(scenario: str, code: int, network: bool, behind_shim: Callable[..., Any], tmp_path: Path) -> None:
    """The weights are right, with one warning at most, and the store is sound afterwards, whichever call failed."""
    rng = np.random.default_rng(0)
    for name in ("model", "other"):
        weights = {f"blocks.{n}.key.weight": rng.standard_normal((64, 128)).astype(np.float32) for n in range(2)}
        save_file(weights | {"blocks.0.ln.weight": np.ones(64, np.float32)}, tmp_path / f"{name}.safetensors")
    # in memory where that can be had: a thousand loads sync ten thousand times
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        done = behind_shim(HERE / "faults.py", scenario, tmp_path / "model.safetensors", work, code, QC_NETWORK=int(network))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
