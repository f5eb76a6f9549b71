"""Everything that needs a GPU: check, time, and a short table last.

    python3 -m benchmarks.gpu [headline|rest|all] [--out DIR] [--minutes N] [--only STAGE] [--from STAGE] [--dry-run]

It needs no network and no virtual environment, sets no clock and no limit of the GPU, writes each row of its CSV as it
is measured, and ends in time: what does not fit is named. What a bare machine lacks is taken from the folder that
`make gpu-kit` made. Each stage is a process of its own. Exit status 1 if anything computed the wrong thing or a stage
broke, 2 without a GPU.
--dry-run goes through the stages on a CPU, with tiny shapes under Triton's interpreter, after a plan of the time;
nothing is measured by it.
The columns are explained in benchmarks/gpu/run.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu.plans import LEAST_MINUTES, MINUTES, PLANS, ROOT, STAGES

# the minutes count from here: unpacking a kit and importing PyTorch are part of them
STARTED = time.monotonic()


def parse(argv: list[str] | None) -> argparse.Namespace:
    width = max(map(len, STAGES))
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu",
        description=__doc__.partition("\n")[0],
        epilog="stages:\n" + "\n".join(f"  {name:<{width}}  {what}" for name, what in STAGES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", nargs="?", choices=PLANS, default="headline", help="default %(default)s")
    parser.add_argument("--out", type=Path, help="folder for results and logs (default: benchmarks/results)")
    parser.add_argument("--minutes", type=float, help=f"end within this time {MINUTES}".replace("'", ""))
    parser.add_argument("--only", choices=STAGES, metavar="STAGE", help="one stage, and what it cannot do without")
    parser.add_argument("--from", dest="start", choices=STAGES, metavar="STAGE", help="this stage of the plan and on")
    parser.add_argument("--built", action="store_true", help="csrc is built already: take the library that is there")
    parser.add_argument("--kit", type=Path, default=ROOT / ".gpu-kit", help="what `make gpu-kit` made (here: .gpu-kit)")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: does every stage run?")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.minutes is None:
        options.minutes = MINUTES[options.plan]
    if not options.minutes >= LEAST_MINUTES:  # NaN is not
        parser.error(f"--minutes must be at least {LEAST_MINUTES}: the machine is looked at, and its tables printed")
    if options.only and options.start:
        parser.error("--only names one stage, --from the first of several: give one of the two")
    if options.start and options.start not in PLANS[options.plan]:
        having = [name for name, stages in PLANS.items() if options.start in stages]
        where = f"it is one of {' and '.join(having)}" if having else f"--only {options.start} runs it"
        parser.error(f"{options.start} is no stage of {options.plan}; {where}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.dry_run:
        # before Triton is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if options.stage is not None:
        from benchmarks.gpu import process, supervisor

        process.serve_fresh(supervisor.body)
    if importlib.util.find_spec("torch") is None:
        print(f"{sys.executable} has no PyTorch: make gpu PYTHON=/path/to/one that has", file=sys.stderr)
        return 2
    from benchmarks.gpu import kit

    # before PyTorch and Triton are imported
    used = kit.use(options.kit, ROOT / "build" / "site")
    os.environ.update(used.environment)
    sys.path[:0] = used.sites
    options.built = options.built or kit.LIBRARIES[0] in used.built
    from benchmarks.gpu import supervisor

    options.minutes -= (time.monotonic() - STARTED) / 60
    try:
        return supervisor.execute(options, used.lines)
    except OSError as error:
        print(f"benchmarks.gpu: results cannot be written: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
