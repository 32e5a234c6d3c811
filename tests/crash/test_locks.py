"""Run the tests of the store and of loading where locks always fail, and where they are always granted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
SUITES = [TESTS / "cache", TESTS / "loader" / "test_hit_and_miss.py", TESTS / "loader" / "test_model.py"]
#: tests of what locks are for: one build of a cold key, limits of time; and where they fail, of an index that outlives its process
NEED = {
    "fail": (
        "test_locks", "once_for_all_threads", "lock_timeout", "locked_file", "test_index.py", "of_the_index", "lies", "lying", "files_not_rows", "network",
        "golden", "use_times", "busy_index", "cannot_be_read_for_once", "subsets", "is_resumed", "not_utf8", "other_loaders",
        # an entry that cannot be read has no row then, so that it is built again without a word
        "every_byte_of_the_header", "truncated_entry",
    ),
    "succeed": ("test_locks", "once_for_all_threads", "lock_timeout", "locked_file"),
}  # fmt: skip


@pytest.mark.parametrize("locks", NEED)
def test_suite(locks: str, behind_shim: Callable[..., Any], tmp_path: Path) -> None:
    """Nothing but what locks are for differs: no wrong byte, no error, no wait."""
    base = tmp_path / "base"
    command = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", f"--basetemp={base}", "-k", f"not ({' or '.join(NEED[locks])})", *SUITES]
    done = behind_shim(*command, QC_SHIM_ROOT=base, QC_SHIM_LOCKS=locks, timeout_s=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
