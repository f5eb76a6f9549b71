"""Matrix products on a CPU: F.linear, oneDNN's fused product, and clipfast's, packed ahead and not.

    python -m benchmarks.linear [--dtypes float32,bfloat16] [--rows 1,50,1600] [--shapes 1600x768x3072] [--rounds 15]
        [--threads N] [--csv PATH] [--quick] [--instructions avx2] [--old CHECKOUT]

What is timed is a block: the four products of a layer of ViT-B/32 and of ViT-L/14, one after the other. --shapes, rows
x inputs x outputs, times single products. A call meets a block that the calls before it did not, as in a model: its
weights come from memory, not from a cache. In the same run, what the machine gives at best: multiply-adds in registers,
in the instructions of clipfast's product. In the same rounds, in turn with the products, what reading the same weights
takes, and nothing else: how fast memory is read changes with what else reads it. --old: another checkout's product too.

What an older CPU would find: clipfast's product in that form, and the others held to the same instructions, as in

    export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
    python -m benchmarks.linear --instructions avx2
    export ONEDNN_MAX_CPU_ISA=AVX512_CORE
    python -m benchmarks.linear --dtypes bfloat16 --instructions avx512

`python -m benchmarks.on_this_cpu` runs all of it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.linear_tables import show
from benchmarks.other_checkout import OtherProduct
from clipfast import ops
from clipfast.bench import ceilings, environment, harness, output
from clipfast.bench.accuracy import relative_rms
from clipfast.bench.ceilings import PLAIN, READ
from clipfast.bench.peers import OURS, PREPACKED
from clipfast.bench.product_report import FEW
from clipfast.kernels import cpu_library, cpu_linear, kept

COLUMNS = (
    *(*environment.ENVIRONMENT, "instructions", "dtype", "block", "rows", "inputs", "outputs", "contestant", "status"),
    *(*harness.TIMES, *harness.TAIL, "gflops", "peak_gflops", "of_peak", "gb_per_s", "read_gb_per_s", "of_read"),
    *("vs_f_linear", "rel_rms", "rms_vs_f_linear", "note", "seconds"),
)
# the model whose block it is -> its width
WIDTHS = {"ViT-B/32": 768, "ViT-L/14": 1024}
# a caption's last row, captions, images of ViT-B/32, a whole caption, images of ViT-B/16 and ViT-L/14, and several
ROWS = (1, 8, 16, 50, 77, 200, 257, 800, 1600)
QUICK_ROWS = (1, 50)
# Calls of FEW rows are short: so many times as many are made, and so many in a row in each turn. The first of them pays
# for what the contestant before left in the caches, to be written back: MKL and oneDNN lay the whole weight out anew.
MANY = 4
# bytes of equal weights that are met in turn: more than a cache has
WEIGHTS, QUICK_WEIGHTS = 128 << 20, 1
# of a line, after which no round more than LEAST begins
SECONDS, LEAST = 10.0, 3
# of the loop of multiply-adds
LOOP, QUICK_LOOP = 0.05, 0.002


class Work(NamedTuple):
    """Products of so many rows, one after the other.

    block: the model whose block they are, "" for a single one.   sizes: (inputs, outputs) of each.
    """

    block: str
    rows: int
    sizes: tuple[tuple[int, int], ...]

    @staticmethod
    def of_block(block: str, rows: int) -> Work:
        width = WIDTHS[block]
        return Work(block, rows, ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)))

    @staticmethod
    def parse(text: str) -> Work:
        """From "1600x768x3072". Raises ValueError for anything else."""
        sizes = [int(size) for size in text.split("x")]
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"shapes: expected rows x inputs x outputs, got {text!r}")
        return Work("", sizes[0], ((sizes[1], sizes[2]),))

    def __str__(self) -> str:
        return f"{self.block}, {self.rows} rows" if self.block else "x".join(map(str, (self.rows, *self.sizes[0])))

    @property
    def weights(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.sizes)

    @property
    def facts(self) -> harness.Row:
        """Columns; of a block `inputs` is its width."""
        outputs = "" if self.block else self.sizes[0][1]
        return {"block": self.block, "rows": self.rows, "inputs": self.sizes[0][0], "outputs": outputs}


class Layer(NamedTuple):
    """packed: the same weight, kept packed; None where nothing is."""

    weight: Tensor
    bias: Tensor
    packed: Tensor | None


class Bench(NamedTuple):
    """What all lines share.

    form:    of clipfast's product.
    peaks:   the most that was seen in the run, FLOP/s by dtype; 0 where the library is missing.
    reading: how memory is read fastest; None where the library is missing.
    in_turn: bytes of weights.
    """

    form: str
    other: OtherProduct | None
    rounds: int
    facts: harness.Row
    peaks: dict[str, float]
    reading: ceilings.Reading | None
    in_turn: int
    quick: bool


def layers(sizes: Sequence[tuple[int, int]], dtype: torch.dtype, bench: Bench) -> list[list[Layer]]:
    """Blocks of equal weights that do not fit into a cache together, each packed as well."""
    first = [ceilings.operands(0, *size, dtype, seed)[1:] for seed, size in enumerate(sizes)]
    copies = [first]
    while sum(weight.nbytes for weight, _ in first) * (len(copies) - 1) < bench.in_turn:
        copies.append([(weight.clone(), bias) for weight, bias in first])
    return [[Layer(weight, bias, _packed(weight, bench.form)) for weight, bias in copy] for copy in copies]


def _ours_serves(dtype: torch.dtype) -> bool:
    return not cpu_library.missing() and dtype in cpu_library.DTYPES


def _packed(weight: Tensor, form: str) -> Tensor | None:
    if not _ours_serves(weight.dtype):
        return None
    # what is kept is kept of a tensor, so that the same memory under another one stays as it is
    same = weight.detach()
    kept.keep([same])
    kept.layout(same, cpu_linear.pack, form)
    return same


def contestants(x: Tensor, layer: Layer, bench: Bench) -> dict[str, Callable[[], Tensor]]:
    """The ways to one product; and READ, its weight alone, where it can be timed."""
    weight, bias, packed = layer
    ways = ceilings.products(x, weight, bias)
    if bench.reading:
        ways[READ] = functools.partial(bench.reading, weight)
    del ways[ceilings.OURS]
    if packed is None:
        return ways | {OURS: lambda: ops.linear(x, weight, bias)}
    ways[OURS] = functools.partial(cpu_linear.linear, x, weight, bias, None, None, bench.form)
    ways[PREPACKED] = functools.partial(cpu_linear.linear, x, packed, bias, None, None, bench.form)
    if bench.other:
        ways[bench.other.name] = functools.partial(bench.other, x, weight, bias, bench.form)
    return ways


def _blocks(work: Work, copies: Sequence[Sequence[Layer]], xs: Sequence[Tensor], bench: Bench) -> dict[str, Any]:
    """Contestant -> the next block's products, whoever had the last: it is the one that was met longest ago."""
    ways = [[contestants(x, layer, bench) for x, layer in zip(xs, copy, strict=True)] for copy in copies]
    turn = itertools.cycle(ways)

    def block(name: str) -> list[Tensor]:
        return [products[name]() for products in next(turn)]

    return {name: functools.partial(block, name) for name in ways[0][0]}


def measure(
    work: Work, dtype_name: str, copies: Sequence[Sequence[Layer]], bench: Bench, rows: list[harness.Row]
) -> None:
    """Append one row for each contestant, of the rounds that were finished if somebody interrupts."""
    dtype = harness.DTYPES[dtype_name]
    xs = [ceilings.operands(work.rows, *size, dtype, seed)[0] for seed, size in enumerate(work.sizes)]
    ways = _blocks(work, copies, xs, bench)
    products = zip(xs, copies[0], strict=True)
    exact = [F.linear(x.double(), layer.weight.double(), layer.bias.double()).flatten() for x, layer in products]
    wrong: dict[str, float] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    reading = {READ: ways.pop(READ)} if READ in ways else {}
    for name, way in ways.items():
        try:
            wrong[name] = relative_rms(torch.cat([each.flatten() for each in way()]), torch.cat(exact))
        except (RuntimeError, KeyError) as error:
            failed[name] = harness.reason(error)
    able = reading | {name: way for name, way in ways.items() if name in wrong}
    together = MANY if work.rows <= FEW else 1
    end = time.monotonic() + SECONDS
    try:
        failed |= harness.time_rounds(
            able, together * bench.rounds, seconds, least=LEAST, together=together, left=lambda: end - time.monotonic()
        )
    finally:
        shared = {**bench.facts, "instructions": bench.form, "dtype": dtype_name, **work.facts}
        plain, read = (harness.times(seconds.get(name, ())).get("median_s") for name in (PLAIN, READ))
        for name in ways:
            row = {**shared, "contestant": name, "status": "untimed", **harness.times(seconds.get(name, ()))}
            if name in failed:
                row |= {"status": "failed", "note": failed[name]}
            if name in wrong:
                row["rel_rms"] = harness.significant(wrong[name])
                row |= {"rms_vs_f_linear": harness.significant(wrong[name] / wrong[PLAIN])} if PLAIN in wrong else {}
            if "median_s" in row:
                row |= {"status": "ok", **_rates(work, dtype_name, row["median_s"], plain, read)}
            rows.append(row)


def _rates(work: Work, dtype: str, median: float, plain: float | None, read: float | None) -> harness.Row:
    """plain, read: medians of `F.linear` and of reading."""
    n_bytes = work.weights * harness.DTYPES[dtype].itemsize
    found = {"gflops": 2 * work.rows * work.weights / median / 1e9, "gb_per_s": n_bytes / median / 1e9}
    if plain:
        found["vs_f_linear"] = plain / median
    if read:
        found |= {"read_gb_per_s": n_bytes / read / 1e9, "of_read": read / median}
    return {name: harness.significant(value) for name, value in found.items()}


def look(dtypes: Sequence[str], bench: Bench) -> None:
    """What the machine gives now; less than before says only that somebody else had a core."""
    if cpu_library.missing():
        return
    loop = QUICK_LOOP if bench.quick else LOOP
    for name in dtypes:
        # no less than one thread, for the same reason
        now = (
            ceilings.multiply_adds_per_s(harness.DTYPES[name], loop, threads, bench.form)
            for threads in (1, torch.get_num_threads())
        )
        bench.peaks[name] = max(bench.peaks[name], *now)


def add_shares(rows: Sequence[harness.Row], bench: Bench) -> None:
    """Columns of what the machine multiplied at best in the whole run, and each row's share of it."""
    for row in rows:
        if peak := bench.peaks[row["dtype"]]:
            row["peak_gflops"] = harness.significant(peak / 1e9)
            if "gflops" in row:
                row["of_peak"] = harness.significant(1e9 * row["gflops"] / peak)


# ---------------------------------------------------------------------------------------------------------------------


def _works(options: argparse.Namespace) -> list[Work]:
    """Raises: ValueError for what is not a shape or a number of rows."""
    if options.shapes:
        return [Work.parse(text) for text in options.shapes.split(",")]
    rows = [int(text) for text in options.rows.split(",")] if options.rows else QUICK_ROWS if options.quick else ROWS
    if min(rows) < 1:
        raise ValueError(f"rows: expected numbers of at least 1, got {options.rows!r}")
    return [Work.of_block(block, n) for block in list(WIDTHS)[: 1 if options.quick else None] for n in rows]


def _bench(options: argparse.Namespace, dtypes: Sequence[str]) -> Bench:
    """Raises: ValueError if the form or the other checkout cannot be had."""
    missing = cpu_library.missing()
    if missing and (options.instructions or options.old):
        raise ValueError(missing)
    form = options.instructions or ("none" if missing else cpu_library.best())
    if not missing and cpu_library.form(form) > cpu_library.LIBRARY.use().clipfast_cpu_best():
        raise ValueError(f"--instructions: this CPU or build has no {form}; take {cpu_library.best()} or less")
    other = OtherProduct(options.old) if options.old else None
    facts = environment.environment()
    environment.warn_if_busy(facts)
    rounds, in_turn = (3, QUICK_WEIGHTS) if options.quick else (options.rounds, WEIGHTS)
    reading = ceilings.fastest_reading(ceilings.QUICK_BYTES if options.quick else ceilings.READ_BYTES)
    return Bench(form, other, rounds, facts, dict.fromkeys(dtypes, 0.0), reading, in_turn, options.quick)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated: %(default)s")
    parser.add_argument("--rows", help=f"of the blocks, comma-separated (default {','.join(map(str, ROWS))})")
    parser.add_argument("--shapes", help="single products instead: comma-separated rows x inputs x outputs")
    parser.add_argument("--rounds", type=int, default=15, help=f"timed calls of each (%(default)s; few rows x {MANY})")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--csv", type=Path, help="write all rows here")
    forms = [name for name in cpu_library.INSTRUCTIONS if name != "best"]
    parser.add_argument("--instructions", choices=forms, help="clipfast's product in this form, whatever is faster")
    parser.add_argument("--old", type=Path, metavar="CHECKOUT", help="time the product built there as well")
    parser.add_argument("--quick", action="store_true", help="few rows, 3 rounds, from the cache: does it run?")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    dtypes = options.dtypes.split(",")
    if not set(dtypes) <= set(harness.DTYPES):
        parser.error(f"dtypes: expected some of {', '.join(harness.DTYPES)}, got {options.dtypes}")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        works, bench = _works(options), _bench(options, dtypes)
    except ValueError as error:
        parser.error(str(error))
    rows: list[harness.Row] = []
    output.write_csv(options.csv, COLUMNS, [])
    progress = output.Progress(len(dtypes) * len(works))
    status = 0
    try:
        with torch.no_grad():
            look(dtypes, bench)
            for dtype in dtypes:
                for sizes, same in itertools.groupby(works, lambda work: work.sizes):
                    copies = layers(sizes, harness.DTYPES[dtype], bench)
                    for work in same:
                        progress.say(f"{dtype} {work}")
                        measure(work, dtype, copies, bench, rows)
                        add_shares(rows, bench)
                        output.write_csv(options.csv, COLUMNS, rows)
                        progress.tick(1)
                    del copies
                    look((dtype,), bench)
    except KeyboardInterrupt:
        status = 130
    add_shares(rows, bench)
    output.write_csv(options.csv, COLUMNS, rows)
    progress.clear()
    show(rows, facts=bench.facts, form=bench.form, peaks=bench.peaks)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
