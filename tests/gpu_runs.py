"""A stage of `make gpu` in the test's own process, and what it finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.machine import facts
from benchmarks.gpu.run import Run, State
from clipfast.bench.budget import Budget

CPU = torch.device("cpu")


class TestedRun(Run):
    __test__ = False  # for pytest: no class of tests
    evidence: Evidence
    budget: Budget


def new_run(
    folder: Path | None = None,
    *,
    stage: str = "towers",
    dry: bool = True,
    seconds: float = 500,
    clock: Callable[[], float] | None = None,
) -> TestedRun:
    """folder: of the files; None: none are written."""
    evidence = Evidence(State(dry=dry), folder)
    evidence.record(stage, "facts", facts(CPU))

    def emit(kind: str, value: Any) -> None:
        if kind != "doing":  # that is for whoever watches the process
            evidence.record(stage, kind, value)

    made = TestedRun(stage, evidence.state, CPU, emit)
    made.evidence, made.budget = evidence, Budget(seconds, clock) if clock else Budget(seconds)
    return made
