"""The stages, their order and their shares of the time; and the small ones themselves.

`headline` asks first what matters most, within 5.5 minutes: ceilings, the headline's launches against float64, both
towers of ViT-B/32 and the images of ViT-L/14 against every peer, then against torch.compile. `rest`, within 4:
training, every other configuration, memory errors, single operators, tuning.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.gpu.__main__ import MINUTES, PLANS, START
from benchmarks.gpu.run import ROOT, Run, facts, on_path
from clipfast import tuning
from clipfast.bench import ceilings as measured
from clipfast.bench.budget import Budget
from clipfast.bench.harness import significant
from clipfast.kernels import library, native

Function = Callable[[Run, Budget], None]
# processes that share a stage of checks: most of their time is compiling, and the GPU waits for them
CHECKERS = max(2, min(8, (os.cpu_count() or 2) // 2))


class Stage(NamedTuple):
    name: str
    seconds: float  # at most
    module: str  # of benchmarks.gpu, imported where the stage runs
    function: str = "stage"
    processes: int = 1
    restarts: bool = False  # goes on without the check that ended its process
    least: float = 2.0  # seconds that are worth a start


FIRST = "environment"
_ALL = (
    Stage(FIRST, 15, "stages", "environment"),
    Stage("build", 60, "stages", "build"),
    Stage("ceilings", 15, "stages", "ceilings"),
    Stage("gate", 40, "correctness", "gate", processes=CHECKERS, restarts=True),
    Stage("towers", 105, "towers"),
    Stage("compiled-image", 110, "towers", "compiled_image", least=50),
    Stage("compiled-text", 110, "towers", "compiled_text", least=50),
    Stage("correctness", 75, "correctness", processes=CHECKERS, restarts=True),
    Stage("memcheck", 35, "sanitizer"),
    Stage("operators", 35, "operators", least=10),
    Stage("train", 60, "towers", "train", least=20),
    Stage("tune", 45, "tune", least=15),
    Stage("compiled-l14", 150, "towers", "compiled_l14", least=75),
    Stage("tests", 240, "suite"),
)
STAGES = {stage.name: stage for stage in _ALL}
# these time something, and a floor comes from the ceilings
_TIMED = ("towers", "compiled-image", "compiled-text", "compiled-l14", "train", "operators", "tune")


def plan(options: argparse.Namespace) -> list[Stage]:
    """The stages that the options ask for. A single one has all of the time, and what it cannot do without."""
    if options.only is not None:
        names = [FIRST, "build", *(["ceilings"] if options.only in _TIMED else []), options.only]
        return [_with(name, float("inf") if name == options.only else 1.0) for name in dict.fromkeys(names)]
    names = list(PLANS[options.plan])
    if options.start is not None:
        after = names[names.index(options.start) :]
        names = list(dict.fromkeys([*START, *after]))
    # more time than planned is more for each
    longer = max(1.0, options.minutes / MINUTES[options.plan])
    return [_with(name, 1.0 if name in START else longer) for name in names]


def _with(name: str, factor: float) -> Stage:
    stage = STAGES[name]
    return stage._replace(seconds=stage.seconds * factor)


def function(name: str) -> Function:
    stage = STAGES[name]
    return getattr(importlib.import_module(f"benchmarks.gpu.{stage.module}"), stage.function)


# ---------------------------------------------------------------------------------------------------------------------
# What the time should be enough for


def forecast(stage: Stage) -> list[tuple[str, float]]:
    """(what, seconds) of a stage's parts in order, on an H100; what the first run took, and arithmetic from there."""
    if stage.module == "towers":
        return importlib.import_module("benchmarks.gpu.groups").forecast(stage.name)
    return list(_PARTS.get(stage.name, ()))


# From the logs of the first run (benchmarks/results/h100-80gb-hbm3-2026-11-28_*.txt): the ceilings took 1 s beside
# their process's start, and a check of bfloat16 2.1 s in each of four processes, most of it compiling.
_CHECK = 2.1
_PROCESS = 4.0
_PARTS: dict[str, tuple[tuple[str, float], ...]] = {
    FIRST: (("CUDA starts", _PROCESS),),
    "build": (("csrc: 45 s with nvcc where the kit has no library for it", 1.0),),
    "ceilings": (("CUDA starts", _PROCESS), ("copy and three products", 3.0)),
    "gate": (
        ("CUDA starts", _PROCESS),
        ("graphs, and the headline's launches; without the kit's cache", 80 * _CHECK / 8),
    ),
    "correctness": (
        ("CUDA starts", _PROCESS),
        ("those that dispatch chooses", 26.0),
        ("as many of the others as fit", 40.0),
    ),
    "memcheck": (("bfloat16, then the rest", 30.0),),
    "operators": (("CUDA starts", _PROCESS), ("about 25 problems", 28.0)),
    "tune": (("CUDA starts", _PROCESS), ("one or two products", 26.0)),
    "tests": (("pytest -m gpu", 200.0),),
}


# ---------------------------------------------------------------------------------------------------------------------
# The small stages


def environment(run: Run, budget: Budget) -> None:
    """The machine, for the CSV's name and every row."""
    if run.device.type == "cuda":
        if torch.version.cuda is None or (not torch.cuda.is_available() and not _card()):
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
            run.emit(
                "no gpu",
                f"torch {torch.__version__} ({built}) finds no GPU. Run this on a machine with one, or with --dry-run "
                "to see that every stage is wired up.",
            )
            return
        torch.cuda.init()
    found = facts(run.device)
    run.emit("facts", found)
    for name, value in found.items():
        run.say(f"{name}: {value}")
    if library.triton_missing():
        run.note(f"no Triton kernels: {library.triton_missing()}")


def _card() -> bool:
    """Whether the system knows of a GPU, though PyTorch does not: then CUDA did not start, and says why."""
    return os.path.exists("/dev/nvidia0")


def build(run: Run, budget: Budget) -> None:
    """csrc with CMake, where nvcc is; without it the package runs on Triton alone."""
    if run.state.built and not native.missing():
        run.note("csrc was built before")
        return
    missing = [tool for tool in ("cmake", "nvcc") if on_path(tool) is None]
    if run.dry or missing or not (ROOT / "CMakeLists.txt").exists():
        why = "a dry run builds nothing" if run.dry else f"not here: {', '.join(missing) or 'CMakeLists.txt'}"
        run.note(f"CUDA library not built ({why}); it is {native.missing() or 'there already'}"[:150])
        return
    # for this GPU alone: code for every architecture takes several times as long
    architecture = tuning.known(tuning.architecture(run.device))
    folder = ROOT / "build" / f"cmake-sm_{architecture}"
    options = [f"-DCLIPFAST_ARCHITECTURES={architecture}", "-DCLIPFAST_CPU=OFF"]
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
    environment = {**os.environ, "CUDACXX": on_path("nvcc") or ""}
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


def ceilings(run: Run, budget: Budget) -> None:
    """What this machine gives at best, measured now: every floor below comes from these."""
    torch.set_float32_matmul_precision("highest")
    for name, value in measured.measure(run.device, ("bfloat16", "float16", "float32"), quick=run.dry).rates.items():
        run.ceiling(name, value)
        key, scale = ("gb_per_s", 1e9) if name == "copy" else ("tflops", 1e12)
        run.add({"operator": f"ceiling {name}", "status": "ok", key: significant(value / scale)})
        run.say("ran" if run.dry else f"{name}: {value / scale:.4g} {'GB/s' if name == 'copy' else 'TFLOP/s'}")
