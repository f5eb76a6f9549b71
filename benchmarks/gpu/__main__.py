"""Everything that needs a GPU, in one command: build, check, time, and a short table last.

    python3 -m benchmarks.gpu [--out DIR] [--minutes 9] [--only STAGE] [--built] [--dry-run]

It needs no network and no virtual environment, sets no clock and no limit of the GPU, writes each row of its CSV as it
is measured, and ends in time: what does not fit is named. Exit status 1 if anything computed the wrong thing, 2 without
a GPU.
--dry-run goes through all stages on a CPU, with tiny shapes under Triton's interpreter; nothing is measured by it.
The columns are explained in benchmarks/gpu/run.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

STAGES = ("build", "correctness", "sanitizer", "ceilings", "operators", "towers", "tune")
# one process's share of a stage, started by it: what it prints is read by the stage
PARTS = ("sanitize-target", "checks")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for results and logs (default: benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=9, help="end within this time (default %(default)s)")
    parser.add_argument("--only", choices=(*STAGES, *PARTS), help="one stage, and what it cannot do without")
    parser.add_argument("--built", action="store_true", help="csrc is built already: take the library that is there")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: does every stage run?")
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error("--minutes must be above 0")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.dry_run:
        # before Triton is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(
            f"no GPU: torch {torch.__version__} ({built}) finds none. Run this on a machine with one, or with "
            "--dry-run to see that every stage is wired up.",
            file=sys.stderr,
        )
        return 2
    from benchmarks.gpu import stages

    return stages.execute(options)


if __name__ == "__main__":
    raise SystemExit(main())
