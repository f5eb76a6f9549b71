"""Proof without a GPU that every kernel compiles for every architecture, and what it compiles to.

    python -m benchmarks.compile_report [--architectures 80,90] [--full] [--limit N] [--kernels linear]
        [--processes 2] [--cache DIR] [--csv PATH]

The launchers of `benchmarks/launches.py` run on tensors without memory, and each launch is kept instead of made. What
Triton's own ptxas makes of it is then read: registers, stack, shared and tensor memory, matrix instructions. The exit
status is 1, with the rows named, if a launch does not compile, spills registers to local memory, wants more shared or
tensor memory than a block may have, or multiplies matrices without the architecture's matrix instructions.

By default a subset is compiled that holds every tile and every value of every flag; --full compiles all launches, which
takes ten times as long. Neither says anything about speed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import triton

from benchmarks import compilation
from benchmarks.compilation import Compiled
from benchmarks.launches import CASES
from clipfast import tuning
from clipfast.bench import environment, output
from clipfast.kernels import library

COLUMNS = (
    *("date", "commit", "triton", "ptxas", "kernel", "architecture", "types", "tile", "flags", "arguments"),
    *("registers", "stack", "local", "shared", "shared_limit", "tensor_memory", "instructions", "seconds", "faults"),
)


def print_report(compiled: Sequence[Compiled], architectures: Sequence[int], title: str) -> None:
    """A line for each kernel, type and tile, and in each architecture's column the worst over flags and arguments."""
    cells: dict[tuple[str, str, str], dict[int, list[Compiled]]] = {}
    for each in compiled:
        key = (each.launch.kernel.removeprefix("_"), each.launch.types, each.launch.tile)
        cells.setdefault(key, {}).setdefault(each.launch.architecture, []).append(each)
    lines = [
        [*key, str(sum(map(len, found.values()))), *(_cell(found.get(arch, [])) for arch in architectures)]
        for key, found in sorted(cells.items())
    ]
    header = ["kernel", "types", "tile", "n", *(f"sm_{arch}" for arch in architectures)]
    notes = ["cells: registers, KB of shared memory, matrix instructions (H HMMA, HG HGMMA, UTCH UTCHMMA)"]
    output.print_table(title, header, lines, notes, names=3)


def _cell(compiled: Sequence[Compiled]) -> str:
    if not compiled:
        return ""
    if any(each.faults() for each in compiled):
        return "FAULT"
    names = sorted({name.removesuffix("MMA") for each in compiled for name in each.instructions})
    shared = -(-max(each.shared for each in compiled) // 1024)
    return " ".join([str(max(each.registers for each in compiled)), f"{shared}K", *names])


def arguments(argv: Sequence[str] | None, cases: Mapping[str, Callable[[], None]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", default=",".join(map(str, tuning.ARCHITECTURES)))
    parser.add_argument("--kernels", default=",".join(cases), help="files in clipfast/kernels, by default all")
    parser.add_argument("--full", action="store_true", help="every launch, not a subset")
    parser.add_argument("--limit", type=int, help="at most this many launches for each kernel and architecture")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--cache", type=Path, help="keep and reuse compiled kernels here; seconds are then of no use")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    options.architectures = [int(text) for text in options.architectures.split(",")]
    options.kernels = options.kernels.split(",")
    for given, known in ((options.architectures, tuning.ARCHITECTURES), (options.kernels, tuple(cases))):
        if unknown := set(given) - set(known):
            parser.error(f"expected some of {known}, got {unknown}")
    return options


def main(argv: Sequence[str] | None = None, cases: Mapping[str, Callable[[], None]] = CASES) -> int:
    """Compile, print and write. cases: name -> what launches all kernels of that name's file."""
    options = arguments(argv, cases)
    if library.interpreted():
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    launches = compilation.collect([cases[name] for name in options.kernels], options.architectures)
    chosen = launches if options.full else compilation.subset(launches, options.limit)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache or folder)
        compiled = []
        for each in compilation.compile_all(chosen, options.processes):
            compiled.append(each)
            if sys.stderr.isatty():
                print(f"\r{len(compiled)} of {len(chosen)} compiled", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - start
    title = f"{len(chosen)} of {len(launches)} launches compiled in {seconds:.0f} s by Triton {triton.__version__}"
    print_report(compiled, options.architectures, title)
    facts = {name: value for name, value in environment.environment().items() if name in COLUMNS}
    facts["triton"] = triton.__version__
    output.write_csv(options.csv, COLUMNS, (facts | each.row() for each in compiled))
    faulty = [each for each in compiled if each.faults()]
    for each in faulty:
        print(f"FAULT {each.launch}: {'; '.join(each.faults())}")
    print(f"{len(faulty)} faults" if faulty else "no faults")
    return 1 if faulty else 0


def without_interpreter() -> int:
    """Run this command again where kernels are compiled: Triton reads its switch as it meets each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", *sys.argv[1:]]
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(without_interpreter() if library.interpreted() else main())
