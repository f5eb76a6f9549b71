"""The stages, their shares of the time, and what each should take.

`headline` asks first what matters most, within 5.5 minutes: ceilings, the headline's launches against float64, both
towers against every peer, ViT-B/32's against torch.compile; ViT-L/14's if time is left. `rest`, within 4: every other
configuration, memory errors, single operators, a train step, tuning.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.gpu import groups
from benchmarks.gpu.plans import MINUTES, PLANS, START
from benchmarks.gpu.run import Run
from clipfast.bench.budget import Budget

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
    Stage(FIRST, 30, "machine", "environment"),
    Stage("build", 60, "machine", "build"),
    Stage("ceilings", 15, "machine", "ceilings"),
    Stage("gate", 45, "correctness", "gate", processes=CHECKERS, restarts=True),
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
    """(what, seconds) of a stage's parts in order, on an H100: arithmetic, from what earlier runs took."""
    if stage.module == "towers":
        return groups.forecast(stage.name)
    return list(_PARTS[stage.name])


# From h100-80gb-hbm3-2026-11-28_compiled.txt and _correctness.txt in benchmarks/results: the ceilings took 1 s beside
# their process's start, and a check of bfloat16 2.1 s in each of four processes, most of it compiling.
_CHECK = 2.1
# where nothing is compiled; a guess
_CACHED = 0.5
_PROCESS = 4.0
_PARTS: dict[str, tuple[tuple[str, float], ...]] = {
    FIRST: (("CUDA starts", _PROCESS),),
    "build": (("csrc: 45 s with nvcc where the kit has no library for it", 1.0),),
    "ceilings": (("CUDA starts", _PROCESS), ("copy and three products", 3.0)),
    "gate": (
        ("CUDA starts", _PROCESS),
        ("what the headline would launch", 5.0),
        (f"121 checks; without the kit's cache {121 * _CHECK / 8:.0f} s", 121 * _CACHED / 8),
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
