"""Attention of packed rows on a CPU: clipfast's own kernel beside PyTorch's, at the lengths that CLIP has.

    python -m benchmarks.attention [--dtypes float32,bfloat16] [--rounds 40] [--threads N] [--csv PATH]

`clipfast/kernels/cpu_attention.py` is the reason that this exists. Both are checked against float64 first, and a kernel
whose RMS error is above twice PyTorch's fails the command.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from clipfast import reference
from clipfast.bench import environment, harness, output
from clipfast.bench.accuracy import relative_rms
from clipfast.dispatch import backend
from clipfast.kernels import cpu_library
from clipfast.ops import attention
from clipfast.packing import Rows

COLUMNS = (
    *(*environment.ENVIRONMENT, "shape", "dtype", "heads", "width", "sequences", "rows", "causal", "contestant"),
    *(*harness.TIMES, *harness.TAIL, "vs_torch", "rel_rms", "seconds"),
)
WIDTH = 64


class Shape(NamedTuple):
    name: str
    lengths: tuple[int, ...]
    heads: int
    causal: bool


CAPTIONS = tuple(sorted(8 + 17 * i // 32 for i in range(32)))
SHAPES = (
    Shape("32 captions of 8-24, B/32", CAPTIONS, 8, True),
    Shape("1 caption of 16, B/32", (16,), 8, True),
    Shape("32 captions of 77, B/32", (77,) * 32, 8, True),
    Shape("32 images, B/32", (50,) * 32, 12, False),
    Shape("1 image, B/32", (50,), 12, False),
    Shape("8 images, B/16", (197,) * 8, 12, False),
    Shape("8 images, L/14", (257,) * 8, 16, False),
    Shape("1 image, L/14", (257,), 16, False),
    Shape("2 images, L/14@336px", (577,) * 2, 16, False),
)


def measure(shape: Shape, dtype: torch.dtype, rounds: int) -> list[harness.Row]:
    """A row for each backend, PyTorch's first."""
    rows = Rows(shape.lengths)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows.total, 3, shape.heads, WIDTH, generator=generator).to(dtype)
    exact = reference.attention(qkv.double(), rows.offsets(), causal=shape.causal)

    def on(name: str):
        def call():
            with backend(name):
                return attention(qkv, rows, causal=shape.causal)

        return call

    functions = {name: on(name) for name in ("torch", "cpu")}
    errors = {name: relative_rms(function(), exact) for name, function in functions.items()}
    if not errors["cpu"] <= 2 * errors["torch"]:
        raise ArithmeticError(f"{shape.name}: RMS error {errors['cpu']:.3g}, PyTorch's {errors['torch']:.3g}")
    seconds: dict[str, list[float]] = {}
    if failed := harness.time_rounds(functions, rounds, seconds):
        raise RuntimeError(f"{shape.name}: {failed}")
    found = {name: harness.times(values) for name, values in seconds.items()}
    facts = {"shape": shape.name, "dtype": str(dtype)[6:], "heads": shape.heads, "width": WIDTH}
    facts |= {"sequences": len(shape.lengths), "rows": rows.total, "causal": shape.causal}
    return [
        facts
        | {"contestant": name, "rel_rms": harness.significant(errors[name])}
        | {"vs_torch": harness.significant(found["torch"]["median_s"] / times["median_s"])}
        | times
        for name, times in found.items()
    ]


def line(row: harness.Row) -> tuple[str, ...]:
    times = (output.cell(row, column, ".4g", 1e3) for column in ("median_s", "p20_s", "p80_s"))
    errors = output.cell(row, "rel_rms", ".2e")
    return f"{row['shape']} {row['dtype']}", row["contestant"], *times, output.cell(row, "vs_torch", ".2f"), errors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated: %(default)s")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each (default %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--csv", type=Path, help="write all rows here")
    options = parser.parse_args(argv)
    dtypes = options.dtypes.split(",")
    if not set(dtypes) <= set(harness.DTYPES):
        parser.error(f"dtypes: expected some of {', '.join(harness.DTYPES)}, got {options.dtypes}")
    if why := cpu_library.missing():
        parser.error(why)
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = environment.environment()
    environment.warn_if_busy(facts)
    rows: list[harness.Row] = []
    with torch.no_grad():
        for dtype in dtypes:
            for shape in SHAPES:
                rows += measure(shape, harness.DTYPES[dtype], options.rounds)
    output.write_csv(options.csv, COLUMNS, (facts | row for row in rows))
    title = f"attention, heads of {WIDTH}, on {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
    header = ("shape", "", "median ms", "p20", "p80", "x torch", "RMS error")
    output.print_table(title, header, map(line, rows), [], names=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
