"""Cross-compile the kernels for arm64 and compare portable C and NEON with the references, under qemu."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from foreign import ROOT, Runner, check, run

os.environ["QUANTCACHE_KERNEL"] = "reference"
BUILD = ROOT / "build" / "arm64"


def main() -> None:
    """Build and compare."""
    run(["cmake", "-S", ROOT, "-B", BUILD, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
         "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc", "-DQC_WERROR=ON"])  # fmt: skip
    run(["cmake", "--build", BUILD, "-j", "2"])
    program = BUILD / "run_kernel"
    run(["aarch64-linux-gnu-gcc", "-O1", "-Wall", "-Wextra", ROOT / "tests/build/run_kernel.c", "-o", program, "-ldl"])
    runner = Runner(["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", str(program)], BUILD / "_kernels.so")
    for level in ("scalar", "neon"):
        print(f"arm64 {level}: {check(runner, level)} comparisons, all equal")


if __name__ == "__main__":
    main()
