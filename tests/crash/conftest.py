"""Own the fixtures of the crash tests: the compiled shim, and a way to run a process behind it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile shim.c; skip where that cannot be done."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("the shim needs Linux and a C compiler")
    built = tmp_path_factory.mktemp("shim") / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(HERE / "shim.c"), "-o", str(built), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture
def behind_shim(shim: Path) -> Run:
    """Return a function that runs Python behind the shim."""

    def run(*arguments: object, timeout_s: float = 600, **environment: Any) -> subprocess.CompletedProcess[str]:
        found = os.environ | {"LD_PRELOAD": str(shim), "OPENBLAS_NUM_THREADS": "1"} | {k: str(v) for k, v in environment.items()}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=found, capture_output=True, text=True, timeout=timeout_s, check=False)

    return run
