"""Fuzz the readers by coverage for QUANTCACHE_FUZZ_S seconds (20), in a process with a limit on its memory."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).with_name("fuzz_readers.py")
ROOT = FUZZER.parents[2]
#: one file may take so long before it counts as a hang; an ordinary one takes a millisecond
HANG_S = 10

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install '.[fuzz]' (Linux on x86-64)"
)


def _fuzz(folder: Path, seconds: int, *broken: str) -> subprocess.CompletedProcess[str]:
    """Run the fuzzer; what it finds lies in the folder."""
    corpus = folder / "corpus"
    corpus.mkdir()
    options = [
        f"-max_total_time={seconds}", f"-timeout={2 if broken else HANG_S}", "-rss_limit_mb=0", "-max_len=4096", "-print_final_stats=1",
        f"-artifact_prefix={folder}/", "-verbosity=0",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "QUANTCACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(FUZZER), str(corpus), *broken, *options]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds + 120, check=False
    )


def _told(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    """Return what a person needs to repeat it."""
    found = [f"{file.name}: {file.read_bytes().hex()}" for file in folder.iterdir() if file.name.startswith(("crash-", "timeout-", "oom-"))]
    return "\n".join([f"exit code {done.returncode}", done.stdout[-3000:], done.stderr[-3000:], *found])


def test_readers(tmp_path: Path) -> None:
    """No file makes a reader raise anything but its own errors, take more than a gigabyte, or hang."""
    done = _fuzz(tmp_path, int(os.environ.get("QUANTCACHE_FUZZ_S", "20")))
    assert done.returncode == 0, _told(done, tmp_path)
    runs = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    assert runs and int(runs[0]) > 500, _told(done, tmp_path)


@pytest.mark.parametrize(("broken", "sign"), [("exception", "ValueError: broken on purpose"), ("memory", "MemoryError"), ("hang", "timeout")])
def test_what_is_broken_is_noticed(tmp_path: Path, broken: str, sign: str) -> None:
    """A reader that raises, eats memory or hangs fails the test above."""
    done = _fuzz(tmp_path, 20, broken)
    assert done.returncode != 0
    assert sign in done.stdout + done.stderr, _told(done, tmp_path)
