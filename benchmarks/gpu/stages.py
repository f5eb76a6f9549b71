"""The stages in order with their shares of the time, and the small ones themselves."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading

import torch

from benchmarks.gpu import correctness, operators, report, sanitizer, tune
from benchmarks.gpu import towers as whole_models
from benchmarks.gpu.run import DRY, ROOT, Run, Stage, nvcc, on_path, run_stages
from clipfast import tuning
from clipfast.bench import ceilings as measured
from clipfast.bench.budget import Budget
from clipfast.bench.harness import significant
from clipfast.kernels import library, native

# seconds kept for the tables
RESERVE = 10
# a stage that hangs in a compiler is left this long after the end, then the tables are printed without it
GRACE = 5


def build(run: Run, budget: Budget) -> None:
    """csrc with CMake, where nvcc is; without it the package runs on Triton alone."""
    if run.options.built and not native.missing():
        run.note("csrc was built before")
        return
    missing = [tool for tool in ("cmake", "nvcc") if (on_path(tool) if tool == "cmake" else nvcc()) is None]
    if run.dry or missing or not (ROOT / "CMakeLists.txt").exists():
        why = "a dry run builds nothing" if run.dry else f"not here: {', '.join(missing) or 'CMakeLists.txt'}"
        run.note(f"CUDA library not built ({why}); it is {native.missing() or 'there already'}"[:150])
        return
    # for this GPU alone: code for every architecture takes several times as long
    architecture = tuning.known(tuning.architecture(run.device))
    folder = ROOT / "build" / f"cmake-sm_{architecture}"
    options = [f"-DCLIPFAST_ARCHITECTURES={architecture}", "-DCLIPFAST_CPU=OFF"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    environment = {**os.environ, "CUDACXX": nvcc() or ""}
    for command in (configure, ["cmake", "--build", str(folder), "--parallel"]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(1, budget.left()))
        if done.returncode:
            lines = (done.stdout + done.stderr).strip().splitlines()[-8:]
            run.fail("csrc does not build: " + " | ".join(lines))
            return
    native.LIBRARY.forget()
    if native.missing():
        run.fail(f"csrc is built and does not load: {native.missing()}")
    else:
        run.note(f"csrc built in {budget.spent():.0f} s")


def environment(run: Run, budget: Budget) -> None:
    for name, value in run.facts.items():
        run.say(f"{name}: {value}")
    if library.triton_missing():
        run.note(f"no Triton kernels: {library.triton_missing()}")


def ceilings(run: Run, budget: Budget) -> None:
    """What this machine gives at best, measured now: every floor below comes from these."""
    torch.set_float32_matmul_precision("highest")
    run.ceilings |= measured.measure(run.device, ("bfloat16", "float16", "float32"), quick=run.dry).rates
    for name, value in run.ceilings.items():
        key, scale = ("gb_per_s", 1e9) if name == "copy" else ("tflops", 1e12)
        run.add({"operator": f"ceiling {name}", "status": "ok", key: significant(value / scale)})
        run.say("ran" if run.dry else f"{name}: {value / scale:.4g} {'GB/s' if name == 'copy' else 'TFLOP/s'}")


def towers(run: Run, budget: Budget) -> None:
    whole_models.stage(run, budget)


STAGES = {
    "environment": Stage("environment", 10, environment),
    "build": Stage("build", 60, build),
    "correctness": Stage("correctness", 150, correctness.stage),
    # it began beside the stage before
    "sanitizer": Stage("sanitizer", 45, sanitizer.stage),
    "ceilings": Stage("ceilings", 15, ceilings),
    "operators": Stage("operators", 100, operators.stage),
    "towers": Stage("towers", 240, towers),
    "tune": Stage("tune", 240, tune.stage),
}
# what a single stage cannot do without
_FIRST = {"operators": ("ceilings",), "towers": ("ceilings",), "tune": ("ceilings",)}


def chosen(only: str | None) -> list[Stage]:
    """All, or one with what it needs, which then has the whole time."""
    if only is None:
        return list(STAGES.values())
    needed = dict.fromkeys(("environment", "build", *_FIRST.get(only, ()), only))
    return [stage._replace(seconds=float("inf")) if stage.name == only else stage for stage in map(STAGES.get, needed)]


def execute(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 if anything was wrong."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() and not options.dry_run else torch.device("cpu")
    budget = Budget(60 * options.minutes)
    if options.only == "sanitize-target":
        print(f"{sanitizer.target(device, dry=options.dry_run)} launches made")
        return 0
    if options.only == "checks":
        index, count = (int(number) for number in options.part.split("/"))
        return correctness.part(device, budget, index, count)
    run = Run(options, budget.part(max(1.0, budget.left() - RESERVE)), device)
    if run.dry:
        print(DRY)
    run.open()
    alarm = threading.Timer(budget.left() + GRACE, _give_up, (run,))
    alarm.daemon = True
    alarm.start()
    try:
        run_stages(run, chosen(options.only))
    finally:
        alarm.cancel()
        for job in run.jobs.values():
            job.end()
        report.print_report(run)
    return 1 if run.failures else 0


def _give_up(run: Run) -> None:
    """In a thread, when the main one is stuck past the end: the tables, and out."""
    run.note(f"stuck in {run.stage} past the end of the time")
    report.print_report(run)
    sys.stdout.flush()
    for job in run.jobs.values():
        job.end()
    os._exit(1)
