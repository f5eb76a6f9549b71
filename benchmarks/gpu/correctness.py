"""Runs the checks of checks.py: `gate` those of the headline's launches, `stage` all.

What was found right before, by the hash of its launches (launch_ids.py), is left out. Several processes share each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu import launch_ids, machine
from benchmarks.gpu import problems as make
from benchmarks.gpu.checks import Check, Work, checks, headline
from benchmarks.gpu.run import Run
from clipfast.bench import harness
from clipfast.bench.budget import Budget


def gate(run: Run, budget: Budget) -> None:
    """Each launch of the headline once."""
    run_checks(run, headline(run.device, dry=run.dry), budget, once=True)


def stage(run: Run, budget: Budget) -> None:
    """Every check."""
    run_checks(run, checks(run.device, dry=run.dry), budget)


def run_checks(run: Run, found: Iterator[Check], budget: Budget, *, once: bool = False) -> None:
    """This process's share of the checks, until time is up.

    once: a check whose launches are all in checks before it is left out.
    Raises: what every call raises after a CUDA error that stays.
    """
    count = failed = known = 0
    before = cut = ""
    for check in _share(run, found, budget, once=once):
        if not budget.allows(0.5):
            cut = f", cut off before {check.name}"
            break
        if check.name in run.state.tried:
            continue
        ids: list[str] = []
        run.doing(check.name)
        try:
            work = check.prepare()
            needed = _launches(check, work, run.device)
            ids = [each.id for each in needed]
            key = launch_ids.key(check.name, needed, more=check.more)
            if key and key in run.state.proved:
                known += 1
                run.doing("")
                continue
            run.doing(check.name, ids)
            count += 1
            work.judge(work.launch())
        except torch.OutOfMemoryError as error:  # others have the memory, which says nothing of a launch
            work = None
            torch.cuda.empty_cache()
            run.note(f"not checked: {check.name}: {harness.reason(error)}")
        except Exception as error:  # a kernel that does not compile is wrong too
            machine.raise_if_lost(run.device)
            failed += 1
            text = str(error) if isinstance(error, AssertionError) else f"{check.name}: {harness.reason(error)}"
            run.fail(" ".join(text.split())[:400], ids)
        else:
            run.prove(key, check.name, ids)
        # what ends the process from here on is not this check's fault
        run.doing("")
    if known:
        before = f", {known} found right before"
    part = f"{run.state.part + 1} of {run.state.parts}: " if run.state.parts > 1 else ""
    run.note(f"{part}{count} checks run, {failed} wrong{before}{cut}")


def _launches(check: Check, work: Work, device: torch.device) -> list[launch_ids.Launch]:
    # a graph is recorded at the first use of a shape, and cannot be of nothing
    return [] if check.operator == "graphs" else launch_ids.launches_of(work.launch, device)


def _share(run: Run, found: Iterator[Check], budget: Budget, *, once: bool) -> Iterator[Check]:
    """Process i of n takes the checks i, i + n, i + 2n, ... by their places in the same list.

    The place alone decides, so that what one process fails to see changes no other's share.
    """
    seen: set[str] = set()
    for place, check in enumerate(found):
        if once and not budget.allows(0.5):
            yield check  # which says that time is up
            return
        if once and check.operator != "graphs":
            try:
                with make.unfilled():
                    ids = {each.id for each in _launches(check, check.prepare(), run.device)}
            except Exception:  # whose turn it is will say so
                machine.raise_if_lost(run.device)
                ids = set()
            if ids and ids <= seen:
                continue
            seen |= ids
        if place % run.state.parts == run.state.part:
            yield check
