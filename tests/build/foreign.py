"""Run kernels that this process cannot load (another CPU, sanitizers) and compare them with the references."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from quantcache.quant.blocks import block_type, block_types
from quantcache.quant.codec import Status
from quantcache.quant.codecs.f16 import reference as f16
from quantcache.quant.codecs.int8 import reference as int8
from quantcache.quant.codecs.int8_row import reference as int8_row
from quantcache.quant.codecs.nf4 import MIDDLES, NESTED_MAP, NESTED_MIDDLES, TABLE
from quantcache.quant.codecs.nf4 import reference as nf4
from quantcache.quant.digest import BLOCK, SUM_NBYTES
from quantcache.quant.floats import from_f32, to_f32
from quantcache.quant.merge import reference as merging
from quantcache.quant.native import ELEMENT

ROOT = Path(__file__).resolve().parents[2]
#: New weights every run; a failure names the seed that repeats it.
SEED = int(os.environ.get("QUANTCACHE_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))


class Runner:
    """Call kernels in another process.

    Args:
        command: starts run_kernel.
        library: the compiled kernels.
        env: of the process.
    """

    def __init__(self, command: Sequence[str], library: Path, env: dict[str, str] | None = None) -> None:
        self.command, self.library, self.env = list(command), library, env

    def call(self, symbol: str, *arguments: Any) -> tuple[int, list[Any]]:
        """Call one kernel; an argument is an integer, an input array, ("out", dtype, size), or ("both", array).

        Returns:
            The status and the outputs.
        """
        request = b""
        for word in (str(self.library), symbol):
            request += struct.pack("<I", len(word)) + word.encode()
        request += struct.pack("<I", len(arguments))
        outputs = []
        for argument in arguments:
            if isinstance(argument, int):
                request += struct.pack("<BQ", 0, argument)
            elif isinstance(argument, tuple) and argument[0] == "both":
                outputs.append((argument[1].dtype, argument[1].size))
                request += struct.pack("<BQ", 3, argument[1].nbytes) + argument[1].tobytes()
            elif isinstance(argument, tuple):
                outputs.append((np.dtype(argument[1]), argument[2]))
                request += struct.pack("<BQ", 2, outputs[-1][0].itemsize * argument[2])
            else:
                request += struct.pack("<BQ", 1, argument.nbytes) + argument.tobytes()
        done = subprocess.run(self.command, input=request, capture_output=True, env=self.env, check=False)
        if done.returncode:
            raise SystemExit(f"{symbol}: exit {done.returncode}\n{done.stderr.decode(errors='replace')[-3000:]}")
        (status,) = struct.unpack_from("<i", done.stdout)
        position, found = 4, []
        for dtype, size in outputs:
            found.append(np.frombuffer(done.stdout, dtype, size, position))
            position += dtype.itemsize * size
        return status, found


def families(n: int) -> dict[str, Any]:
    """Return float32 weights of every kind that has ever been a problem."""
    rng = np.random.default_rng(SEED)
    gauss = rng.standard_normal(n).astype(np.float32)
    zeros = gauss.copy()
    zeros[: n // 2] = 0
    spoiled = gauss.copy()
    spoiled[n // 3] = np.nan
    with np.errstate(over="ignore"):
        wide = (gauss * 10.0 ** rng.integers(-8, 4, n)).astype(np.float32)
    return {"gauss": gauss, "zeros": zeros, "denormal": (gauss * 1e-40).astype(np.float32), "wide": wide,
            "huge": (gauss * 1e30).astype(np.float32), "constant": np.full(n, 0.37, np.float32), "nan": spoiled}  # fmt: skip


def check(runner: Runner, level: str) -> int:
    """Compare every kernel at one level with its reference; return how many comparisons were made."""
    count = 0

    def same(what: str, got: Any, wanted: Any) -> None:
        nonlocal count
        count += 1
        if np.asarray(got).tobytes() != np.asarray(wanted).tobytes():
            raise SystemExit(f"{level}: {what} differs from the reference (QUANTCACHE_TEST_SEED={SEED})")

    for family, values in families(4096 + 64).items():
        for element in ELEMENT:
            source = from_f32(values, element)
            x = to_f32(source, element)
            name = f"{family} {element}"
            for n in (4096, 4096 - 31, 63, 1):
                status, (codes, absmax) = runner.call(
                    f"qc_nf4_quantize__{level}", source[:n], n, ELEMENT[element], MIDDLES, ("out", "u1", (n + 1) // 2), ("out", "f4", -(-n // 64)))
                wanted = nf4.quantize(x[:n], MIDDLES)
                same(f"nf4 status {name}", np.int64(status), np.int64(wanted[0]))
                if status == Status.OK:
                    same(f"nf4 codes {name} {n}", codes, wanted[1])
                    same(f"nf4 absmax {name} {n}", absmax, wanted[2])
                    for out in ELEMENT:
                        dtype = "f4" if out == "F32" else "u2"
                        _, (decoded,) = runner.call(f"qc_nf4_dequantize__{level}", codes, absmax, n, TABLE, ("out", dtype, n), ELEMENT[out], 0)
                        same(f"nf4 decoding {name} {out}", decoded, from_f32(nf4.dequantize(codes, absmax, n, TABLE), out))
            for f16_scales in (1, 0):
                n = 4096
                scale = "f2" if f16_scales else "f4"
                status, (codes, scales, biases) = runner.call(
                    f"qc_int8_quantize__{level}", source[:n], n, ELEMENT[element], f16_scales, ("out", "u1", n), ("out", scale, n // 128), ("out", scale, n // 128))
                wanted8 = int8.quantize(x[:n], scales_f16=bool(f16_scales))
                same(f"int8 status {name}", np.int64(status), np.int64(wanted8[0]))
                if status == Status.OK:
                    for part, got, want in zip(("codes", "scales", "biases"), (codes, scales, biases), wanted8[1:], strict=True):
                        same(f"int8 {part} {name}", got, want)
                    wanted_f32 = int8.dequantize(codes, scales, biases)
                    for out in ELEMENT:
                        dtype = "f4" if out == "F32" else "u2"
                        _, (decoded,) = runner.call(f"qc_int8_dequantize__{level}", codes, scales, biases, n, f16_scales, ("out", dtype, n), ELEMENT[out], 0)
                        same(f"int8 decoding {name} {out}", decoded, from_f32(wanted_f32, out))
            rows, columns = 5, 333
            n = rows * columns
            status, (codes, scales) = runner.call(f"qc_int8_row_quantize__{level}", source[:n], rows, columns, ELEMENT[element], ("out", "i1", n), ("out", "f4", rows))
            wanted_row = int8_row.quantize(x[:n].reshape(rows, columns))
            same(f"int8-row status {name}", np.int64(status), np.int64(wanted_row[0]))
            if status == Status.OK:
                same(f"int8-row codes {name}", codes, wanted_row[1])
                same(f"int8-row scales {name}", scales, wanted_row[2])
                wanted_f32 = int8_row.dequantize(codes.reshape(rows, columns), scales)
                for out in ELEMENT:
                    dtype = "f4" if out == "F32" else "u2"
                    _, (decoded,) = runner.call(f"qc_int8_row_dequantize__{level}", codes, scales, rows, columns, ("out", dtype, n), ELEMENT[out], 0)
                    same(f"int8-row decoding {name} {out}", decoded, from_f32(wanted_f32, out))
            if element != "F16":
                for n in (source.size, source.size - 3, 1):
                    status, (half,) = runner.call(f"qc_f16_cast__{level}", source[:n], n, ELEMENT[element], ("out", "f2", n))
                    wanted_half = f16.cast(x[:n])
                    same(f"f16 status {name} {n}", np.int64(status), np.int64(wanted_half[0]))
                    same(f"f16 {name} {n}", half, wanted_half[1])
    count += check_blocks(runner, level) + check_merging(runner, level) + check_digests(runner, level)
    absmax = np.abs(np.random.default_rng(SEED).standard_normal(700)).astype(np.float32)
    values, middles = NESTED_MAP, NESTED_MIDDLES
    offset = np.array([nf4.mean(absmax)], np.float64)
    _, (codes, nested) = runner.call(f"qc_nf4_encode_absmax__{level}", absmax, 700, offset, middles, ("out", "u1", 700), ("out", "f4", 3))
    wanted_codes, wanted_nested = nf4.encode_absmax(absmax, np.float32(offset[0]), middles)
    same("absmax codes", codes, wanted_codes)
    same("absmax scales", nested, wanted_nested)
    _, (decoded,) = runner.call(f"qc_nf4_decode_absmax__{level}", codes, nested, 700, offset, values, ("out", "f4", 700))
    same("absmax decoding", decoded, nf4.decode_absmax(codes, nested, np.float32(offset[0]), values))
    return count


def check_blocks(runner: Runner, level: str) -> int:
    """Compare the decoders of GGML's blocks; blocks of any bits, so that NaN and Inf are among their scales."""
    count = 0
    for name in block_types():
        kind = block_type(name)
        blocks = np.random.default_rng(SEED).integers(0, 256, 7 * kind.nbytes, dtype=np.uint8)
        tables = np.zeros(1, np.uint64) if kind.tables is None else kind.tables
        with np.errstate(all="ignore"):
            wanted = kind.reference(blocks.view(kind.layout)).reshape(-1)
        for element in ELEMENT:
            dtype = "u4" if element == "F32" else "u2"
            given = ("out", dtype, 7 * kind.weights)
            status, (got,) = runner.call(f"qc_{kind.kernel}__{level}", kind.number, blocks, 7, tables, given, ELEMENT[element])
            expected = from_f32(wanted, element).view(dtype)
            numbers = ~np.isnan(wanted)  # which NaN an operation gives is the CPU's choice
            count += 1
            if status != Status.OK or got[numbers].tobytes() != expected[numbers].tobytes():
                raise SystemExit(f"{level}: {name} to {element} differs from the reference (QUANTCACHE_TEST_SEED={SEED})")
    return count


def check_merging(runner: Runner, level: str) -> int:
    """Compare the merging of adapters: sizes below, at and above those that the kernel works in."""
    sizes = [(1, 1, 1), (3, 64, 65), (65, 66, 64), (64, 3, 130)]
    for rows, rank, columns in sizes:
        rng = np.random.default_rng(SEED)
        weights, left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, columns), (rows, rank), (rank, columns)))
        scale = np.array([0.7], np.float32)
        # weights are changed in place, and a runner gives back what it was not given: what is added to 0xa5... shows
        filled = np.full(rows * columns * 4, 0xA5, np.uint8).view(np.float32).reshape(rows, columns)
        status, (got,) = runner.call(
            f"qc_merge_add_product__{level}", ("out", "f4", rows * columns), columns, rows, columns, left, right, rank, scale)
        wanted = merging.add_product(filled, left, right, scale[0])
        if status != Status.OK or got.tobytes() != wanted.tobytes():
            raise SystemExit(f"{level}: merging {rows} x {rank} x {columns} differs (QUANTCACHE_TEST_SEED={SEED})")
        for element in ELEMENT:
            values = from_f32(weights.reshape(-1), element)
            status, (wide,) = runner.call(f"qc_merge_widen__{level}", values, values.size, ELEMENT[element], ("out", "f4", values.size))
            if status != Status.OK or wide.tobytes() != to_f32(values, element).tobytes():
                raise SystemExit(f"{level}: widening {element} differs (QUANTCACHE_TEST_SEED={SEED})")
    return len(sizes) * (1 + len(ELEMENT))


def check_digests(runner: Runner, level: str) -> int:
    """Compare digests with the xxhash package: by its rules for the short, around its stripes and blocks, one piece and several."""
    sizes = [*((n, n) for n in (1, 3, 4, 8, 9, 16, 17, 33, 128, 129, 159, 160, 240)), (500, 16), (241, 241), (1024, 1024), (1025, 2000), (1089, 1089), (9000, 4096), (70_000, 1024)]
    for length, step in sizes:
        data = np.random.default_rng(SEED).integers(0, 256, length, dtype=np.uint8)
        wanted = b"".join(xxhash.xxh3_128_digest(data[start : start + step].data) for start in range(0, length, step))
        status, (got,) = runner.call(f"qc_digest_pieces__{level}", data, length, step, ("out", "u1", len(wanted)))
        if status != Status.OK or got.tobytes() != wanted:
            raise SystemExit(f"{level}: digests of {length} bytes by {step} differ (QUANTCACHE_TEST_SEED={SEED})")
        blocks, sums = (length - 1) // BLOCK, np.zeros(0, np.uint8)
        if blocks:
            _, (sums,) = runner.call(f"qc_digest_sums__{level}", data[: blocks * BLOCK], blocks, ("out", "u1", blocks * SUM_NBYTES))
        status, (got,) = runner.call(f"qc_digest_of_sums__{level}", data, length, sums, ("out", "u1", 16))
        if status != Status.OK or got.tobytes() != xxhash.xxh3_128_digest(data.data):
            raise SystemExit(f"{level}: the digest of {length} bytes by sums of blocks differs (QUANTCACHE_TEST_SEED={SEED})")
        for bit in (0, 1):
            table = np.frombuffer(np.array([0, length, step], "<u8").tobytes() + xxhash.xxh3_128_digest(wanted), "<u8").copy()
            table[4] ^= np.uint64(bit << 63)
            status, _ = runner.call(f"qc_digest_differs__{level}", data, table, np.zeros(1, np.uint64), 1)
            if status != 1 - bit:
                raise SystemExit(f"{level}: {length} bytes by {step} are not compared rightly (QUANTCACHE_TEST_SEED={SEED})")
    return 4 * len(sizes)


def run(command: Sequence[str | Path]) -> None:
    """Run a build step; show what it said if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")


if __name__ == "__main__":
    sys.exit("run check_arm64.py or check_sanitizers.py")
