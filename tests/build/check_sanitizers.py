"""Build the kernels with the address and undefined-behaviour sanitizers and compare every level that runs here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from foreign import ROOT, Runner, check, run

from quantcache.quant.native import available

BUILD = ROOT / "build" / "sanitize"


def main() -> None:
    """Build and compare."""
    levels = [level for level in available() if level != "reference"]
    os.environ["QUANTCACHE_KERNEL"] = "reference"
    run(["cmake", "-S", ROOT, "-B", BUILD, "-DQC_SANITIZE=ON", "-DQC_WERROR=ON", "-DCMAKE_C_COMPILER=gcc"])
    run(["cmake", "--build", BUILD, "-j", "2"])
    program = BUILD / "run_kernel"
    run(["gcc", "-g", "-O1", "-fsanitize=address,undefined", ROOT / "tests/build/run_kernel.c", "-o", program, "-ldl"])
    runner = Runner([str(program)], BUILD / "_kernels.so", env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    for level in levels:
        print(f"sanitized {level}: {check(runner, level)} comparisons, all equal")


if __name__ == "__main__":
    main()
