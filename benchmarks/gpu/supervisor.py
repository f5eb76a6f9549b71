"""Runs the stages one after the other, each in processes of its own, collects what they find, and prints the report.

Nothing here touches CUDA: a hang, a crash or a CUDA error that stays ends the stage that has it. The next one starts
clean, the table names how each ended, and the exit status says whether all is well.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu import cache, machine, report
from benchmarks.gpu.evidence import RESULTS, Evidence, proved_before
from benchmarks.gpu.process import Outcome, Process, watch
from benchmarks.gpu.run import DRY, Run, State
from benchmarks.gpu.stages import FIRST, Stage, function, plan
from clipfast.bench.budget import Budget
from clipfast.bench.harness import without_paths

# seconds kept for a stage that does not end, and for the tables
RESERVE = 10
# seconds between the end that a stage is told and its real one
MARGIN = 1.0
# seconds that one check may take, compiling included
PATIENCE = 45.0
# exit statuses
WRONG, NO_GPU = 1, 2


def body(stage: str, state: State, seconds: float, emit: Any) -> None:
    """A stage, inside its process."""
    device = device_of(state)
    budget = Budget(seconds)
    made, hits = Run(stage, state, device, emit), cache.count()
    function(stage)(made, budget)
    if hits.total:
        made.note(hits.line())
    # what a kernel did last may be known only now
    machine.raise_if_lost(device)


def device_of(state: State) -> torch.device:
    return torch.device("cpu") if state.dry else torch.device("cuda", 0)


def execute(options: argparse.Namespace, used: Sequence[str] = ()) -> int:
    """Runs what the options ask for.   used: what of the kit is used, in words.   Returns: the exit status."""
    budget = Budget(60 * options.minutes)
    keep = None if options.dry_run and options.out is None else options.out or RESULTS
    proved = {} if options.dry_run else proved_before([RESULTS, *filter(None, [options.out])])
    evidence = Evidence(State(dry=options.dry_run, built=options.built, proved=proved), keep)
    evidence.notes += map(without_paths, used)
    stages = plan(options)
    supervisor = Supervisor(evidence, budget)
    if options.dry_run:
        print(DRY)
        report.print_plan(stages, supervisor.inner.left())
    for line in used:
        supervisor.say("start", line)
    interrupted, previous = False, signal.signal(signal.SIGTERM, _interrupt)
    try:
        supervisor.run(stages)
    except KeyboardInterrupt:
        interrupted = True
        evidence.notes.append("interrupted")
        evidence.write()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if supervisor.no_gpu:
        return NO_GPU
    report.print_report(evidence)
    stopped = interrupted or not evidence.state.facts or any(broken(each["outcome"]) for each in evidence.stages)
    return WRONG if evidence.failures or stopped else 0


def broken(outcome: str) -> bool:
    """Whether a stage ended otherwise than it should. One for which there was no time is not broken."""
    return outcome.partition(":")[0] not in ("done", "not run")


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


class Supervisor:
    def __init__(self, evidence: Evidence, budget: Budget):
        self.evidence, self.budget = evidence, budget
        self.inner = budget.part(max(1.0, budget.left() - RESERVE))
        self.fresh = False  # CUDA does not start in a fork
        self.no_gpu = False

    def run(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            outcome = self.run_stage(stage)
            if stage.name == FIRST and outcome.kind not in ("done", "not run"):
                # it may be that CUDA starts in no fork of this process
                self.evidence.stages.pop()
                self.fresh = True
                self.run_stage(stage)
            if not self.evidence.state.facts:
                return

    def run_stage(self, stage: Stage) -> Outcome:
        budget = self.inner.part(stage.seconds)
        at_most, start = budget.left(), time.monotonic()
        if not budget.allows(stage.least):
            outcome = Outcome(
                "not run", f"out of time: {at_most:.0f} s are left, and it wants {stage.least:.0f} at least"
            )
        else:
            self.say(stage.name, f"at most {at_most:.0f} s")
            try:
                outcome = self._watch(stage, budget)
            except KeyboardInterrupt:
                self.evidence.ended(stage.name, "interrupted", time.monotonic() - start, at_most)
                raise
        if outcome.kind != "done":
            self.say(stage.name, str(outcome))
        self.evidence.ended(stage.name, str(outcome), time.monotonic() - start, at_most)
        return outcome

    def _watch(self, stage: Stage, budget: Budget) -> Outcome:
        outcomes: list[Outcome] = []
        state = self.evidence.state
        state.tried = []

        def start(part: int) -> Process:
            state.part, state.parts = part, stage.processes
            return Process(body, stage.name, state, max(MARGIN, budget.left() - MARGIN), fresh=self.fresh)

        def take(process: Process, kind: str, value: Any) -> None:
            if kind == "no gpu":
                self.no_gpu = True
                print(value, file=sys.stderr, flush=True)
            else:
                self.evidence.record(stage.name, kind, value)
                if kind == "wrong":
                    state.tried.append(process.doing)
                    self.say(stage.name, f"WRONG: {value[0]}")
                elif kind == "proved":
                    state.tried.append(value[1])
                elif kind == "note":
                    self.say(stage.name, value)

        def over(process: Process, outcome: Outcome) -> Process | None:
            outcomes.append(outcome)
            out_of_time = not budget.allows(2 * MARGIN)
            if outcome.kind == "done" or (outcome.kind == "cut off" and out_of_time):
                return None
            if not stage.restarts or not process.doing:
                return None
            # the check that ended it is wrong, and the others of its share go on in a clean process
            self.evidence.fail(f"{process.doing}: {outcome}", process.launches)
            self.say(stage.name, f"WRONG: {process.doing}: {outcome}")
            state.tried.append(process.doing)
            return None if out_of_time else start(process.part)

        watch(
            [start(part) for part in range(stage.processes)],
            budget.left,
            take,
            lambda process, line: self.say(stage.name, line),
            over,
            PATIENCE if stage.restarts else math.inf,
        )
        bad = [each for each in outcomes if each.kind != "done"]
        if not bad:
            return Outcome("done")
        others = f"; and {len(bad) - 1} more of its processes" if len(bad) > 1 else ""
        return bad[0]._replace(why=bad[0].why + others)

    def say(self, stage: str, text: str) -> None:
        print(f"[{self.budget.spent():5.0f} s] {stage}: {text}", flush=True)
