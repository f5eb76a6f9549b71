"""Matrix products on a CPU: F.linear, oneDNN's fused product, and clipfast's, which cuts long float32 sums in chains.

    python -m benchmarks.linear [--dtypes float32,bfloat16] [--shapes 1600x768x3072] [--rounds 15] [--threads N]
        [--csv PATH] [--quick]

Shapes are rows x inputs x outputs. The defaults are those of ViT-B/32 at batch 32 (1,600 image rows, about 512 caption
rows) and at batch 1 (50 rows). `clipfast/kernels/onednn.py` is the reason that this exists: it uses what wins here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from clipfast import ops
from tests.accuracy import relative_rms

PLAIN, FUSED, OURS = "F.linear", "oneDNN fused", "clipfast.ops.linear"
COLUMNS = (
    *(*harness.ENVIRONMENT, "dtype", "rows", "inputs", "outputs", "contestant", "status", *harness.TIMES),
    *("gflops", "vs_f_linear", "rel_rms", "rms_vs_f_linear", "note", "seconds"),
)


class Shape(NamedTuple):
    rows: int
    inputs: int
    outputs: int

    @staticmethod
    def parse(text: str) -> Shape:
        """From "1600x768x3072". Raises ValueError for anything else."""
        sizes = [int(size) for size in text.split("x")]
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"shapes: expected rows x inputs x outputs, got {text!r}")
        return Shape(*sizes)

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


_BLOCK = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
SHAPES = tuple(Shape(rows, *sizes) for rows in (1600, 50) for sizes in _BLOCK)
SHAPES += tuple(Shape(512, *sizes) for sizes in ((512, 1536), (512, 512), (512, 2048), (2048, 512)))
QUICK_SHAPES = (Shape(300, 768, 768), Shape(50, 768, 768))


def operands(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Input [rows, inputs], weight [outputs, inputs] and bias [outputs]: normal, outputs of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.rows, shape.inputs, generator=generator)
    weight = torch.randn(shape.outputs, shape.inputs, generator=generator) * shape.inputs**-0.5
    return x.to(dtype), weight.to(dtype), torch.randn(shape.outputs, generator=generator).to(dtype)


def contestants(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The ways to x @ weight.T + bias that this machine has."""
    ways: dict[str, Callable[[], Tensor]] = {PLAIN: lambda: F.linear(x, weight, bias)}
    if _fuses(x.dtype):
        ways[FUSED] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    # in float32 with its sums cut into chains, where that pays; cutting the weight is part of the call
    ways[OURS] = lambda: ops.linear(x, weight, bias)
    return ways


def _fuses(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or bfloat16


def ceiling(dtype: torch.dtype, *, quick: bool = False) -> float:
    """FLOP/s of the fastest way to one large square product: what this machine gives a matrix product at best."""
    shape = Shape(*(1024 if quick else 4096,) * 3)
    best = float("inf")
    with torch.no_grad():
        for way in contestants(*operands(shape, dtype)).values():
            way()
            for _ in range(3 if quick else 7):
                start = time.perf_counter()
                way()
                best = min(best, time.perf_counter() - start)
    return shape.flops / best


def measure(shape: Shape, dtype_name: str, rounds: int, facts: harness.Row, rows: list[harness.Row]) -> None:
    """Append one row for each contestant, of the rounds that were finished if somebody interrupts."""
    x, weight, bias = operands(shape, harness.DTYPES[dtype_name])
    exact = F.linear(x.double(), weight.double(), bias.double())
    ways = contestants(x, weight, bias)
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    wrong = {name: relative_rms(way(), exact) for name, way in ways.items()}
    try:
        failed = harness.time_rounds(ways, rounds, seconds)
    finally:
        first = harness.times(seconds.get(PLAIN, ()))
        for name in ways:
            row = {**facts, "dtype": dtype_name, **shape._asdict(), "contestant": name, "status": "untimed"}
            row |= {"rel_rms": harness.significant(wrong[name])}
            row |= {"rms_vs_f_linear": harness.significant(wrong[name] / wrong[PLAIN])}
            row |= harness.times(seconds.get(name, ()))
            if name in failed:
                row |= {"status": "failed", "note": failed[name]}
            elif "median_s" in row:
                row["status"] = "ok"
                row["gflops"] = harness.significant(shape.flops / row["median_s"] / 1e9)
                if first:
                    row["vs_f_linear"] = harness.significant(first["median_s"] / row["median_s"])
            rows.append(row)


HEADER = (
    "rows x inputs x outputs",
    "",
    "GFLOP/s",
    "median ms",
    "p20",
    "p80",
    "x F.linear",
    "RMS error",
    "x F.linear's",
)


def line(row: harness.Row) -> tuple[str, ...]:
    """A row of the printed table."""
    return (
        f"{row['rows']}x{row['inputs']}x{row['outputs']} {row['dtype']}",
        row["contestant"] + (f" ({row['status']})" if row["status"] != "ok" else ""),
        harness.cell(row, "gflops", ".0f"),
        *(harness.cell(row, column, ".4g", 1e3) for column in ("median_s", "p20_s", "p80_s")),
        harness.cell(row, "vs_f_linear", ".2f"),
        harness.cell(row, "rel_rms", ".2e"),
        harness.cell(row, "rms_vs_f_linear", ".2f"),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated: %(default)s")
    parser.add_argument("--shapes", help="comma-separated rows x inputs x outputs, as 1600x768x3072")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each (default %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--csv", type=Path, help="write all rows here")
    parser.add_argument("--quick", action="store_true", help="small shapes, 3 rounds: does it run?")
    options = parser.parse_args(argv)
    try:
        shapes = [Shape.parse(text) for text in options.shapes.split(",")] if options.shapes else None
    except ValueError as error:
        parser.error(str(error))
    dtypes = options.dtypes.split(",")
    if not set(dtypes) <= set(harness.DTYPES):
        parser.error(f"dtypes: expected some of {', '.join(harness.DTYPES)}, got {options.dtypes}")
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = shapes or (QUICK_SHAPES if options.quick else SHAPES)
    rows: list[harness.Row] = []
    facts = harness.environment()
    harness.warn_if_busy(facts)
    harness.write_csv(options.csv, COLUMNS, [])
    progress = harness.Progress(len(dtypes) * len(chosen))
    status = 0
    try:
        with torch.no_grad():
            for dtype in dtypes:
                for shape in chosen:
                    progress.say(f"{dtype} {shape}")
                    measure(shape, dtype, 3 if options.quick else options.rounds, facts, rows)
                    progress.tick(1)
    except KeyboardInterrupt:
        status = 130
    harness.write_csv(options.csv, COLUMNS, rows)
    progress.clear()
    notes = [f"{row['contestant']}: {row['note']}" for row in rows if "note" in row]
    title = f"x @ weight.T + bias on {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
    harness.print_table(title, HEADER, map(line, rows), notes, names=2)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
