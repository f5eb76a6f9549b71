"""Matrix products on a CPU: F.linear, oneDNN's fused product, and clipfast's.

    python -m benchmarks.linear [--dtypes float32,bfloat16] [--shapes 1600x768x3072] [--rounds 15] [--threads N]
        [--csv PATH] [--quick] [--instructions avx2]

Shapes are rows x inputs x outputs. The defaults are those of ViT-B/32 at batch 32 (1,600 image rows, about 512 caption
rows) and at batch 1 (50 and 16 rows). `clipfast.tuning` sends each product to what wins here. A call meets a weight
that the calls before it did not, as a layer does in a model: it comes from memory, not from a cache.

What an older CPU would find: clipfast's product in that form, and the others held to the same instructions, as in

    export ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
    python -m benchmarks.linear --dtypes float32 --instructions avx2
    export ONEDNN_MAX_CPU_ISA=AVX512_CORE
    python -m benchmarks.linear --dtypes bfloat16 --instructions avx512
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.bench import environment, harness, output
from clipfast.bench.accuracy import relative_rms
from clipfast.bench.ceilings import OURS, PLAIN, operands, products
from clipfast.kernels import cpu_library, cpu_linear

COLUMNS = (
    *(
        *environment.ENVIRONMENT,
        "dtype",
        "rows",
        "inputs",
        "outputs",
        "contestant",
        "status",
        *harness.TIMES,
        *harness.TAIL,
    ),
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
_TEXT_BLOCK = ((512, 1536), (512, 512), (512, 2048), (2048, 512))
SHAPES += tuple(Shape(rows, *sizes) for rows in (512, 16) for sizes in _TEXT_BLOCK)
QUICK_SHAPES = (Shape(300, 768, 768), Shape(50, 768, 768))


# bytes of equal weights that are met in turn: more than a cache has
WEIGHTS = 128 << 20


def _in_turn(calls: Sequence[Callable[[], Tensor]], start: int) -> Callable[[], Tensor]:
    turn = itertools.cycle([*calls[start:], *calls[:start]])
    return lambda: next(turn)()


def measure(
    shape: Shape,
    dtype_name: str,
    rounds: int,
    facts: harness.Row,
    rows: list[harness.Row],
    instructions: str | None = None,
) -> None:
    """Append one row for each contestant, of the rounds that were finished if somebody interrupts.

    instructions: which form of libclipfast_cpu is ours, whatever dispatch would choose.
    """
    x, weight, bias = operands(*shape, harness.DTYPES[dtype_name])
    exact = F.linear(x.double(), weight.double(), bias.double())
    copies = [weight, *(weight.clone() for _ in range(WEIGHTS // weight.nbytes))]
    of_each = [products(x, copy, bias) for copy in copies]
    if instructions is not None:
        for copy, ways_of_it in zip(copies, of_each, strict=True):
            ways_of_it[OURS] = functools.partial(cpu_linear.linear, x, copy, bias, None, None, instructions)
    # not the one that another contestant has just read
    starts = {name: number * len(copies) // len(of_each[0]) for number, name in enumerate(of_each[0])}
    ways = {name: _in_turn([ways[name] for ways in of_each], starts[name]) for name in of_each[0]}
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
        output.cell(row, "gflops", ".0f"),
        *(output.cell(row, column, ".4g", 1e3) for column in ("median_s", "p20_s", "p80_s")),
        output.cell(row, "vs_f_linear", ".2f"),
        output.cell(row, "rel_rms", ".2e"),
        output.cell(row, "rms_vs_f_linear", ".2f"),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated: %(default)s")
    parser.add_argument("--shapes", help="comma-separated rows x inputs x outputs, as 1600x768x3072")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each (default %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--csv", type=Path, help="write all rows here")
    forms = [name for name in cpu_library.INSTRUCTIONS if name != "best"]
    parser.add_argument("--instructions", choices=forms, help="clipfast's product in this form, whatever is faster")
    parser.add_argument("--quick", action="store_true", help="small shapes, 3 rounds: does it run?")
    options = parser.parse_args(argv)
    try:
        shapes = [Shape.parse(text) for text in options.shapes.split(",")] if options.shapes else None
    except ValueError as error:
        parser.error(str(error))
    dtypes = options.dtypes.split(",")
    if not set(dtypes) <= set(harness.DTYPES):
        parser.error(f"dtypes: expected some of {', '.join(harness.DTYPES)}, got {options.dtypes}")
    if options.instructions and (why := cpu_library.missing()):
        parser.error(why)
    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = shapes or (QUICK_SHAPES if options.quick else SHAPES)
    rows: list[harness.Row] = []
    facts = environment.environment()
    environment.warn_if_busy(facts)
    output.write_csv(options.csv, COLUMNS, [])
    progress = output.Progress(len(dtypes) * len(chosen))
    status = 0
    try:
        with torch.no_grad():
            for dtype in dtypes:
                for shape in chosen:
                    progress.say(f"{dtype} {shape}")
                    measure(shape, dtype, 3 if options.quick else options.rounds, facts, rows, options.instructions)
                    progress.tick(1)
    except KeyboardInterrupt:
        status = 130
    output.write_csv(options.csv, COLUMNS, rows)
    progress.clear()
    notes = [f"{row['contestant']}: {row['note']}" for row in rows if "note" in row]
    title = f"x @ weight.T + bias on {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
    output.print_table(title, HEADER, map(line, rows), notes, names=2)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
