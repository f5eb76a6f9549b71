"""The tests that prove something on a GPU and no others: `pytest -m gpu`, a marker that tests/conftest.py sets.

Triton's kernels natively, CUDA graphs, streams, the CUDA library, two devices where there are two.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import pytest_outcomes
from benchmarks.gpu.jobs import Job
from benchmarks.gpu.plans import ROOT
from benchmarks.gpu.run import Run
from clipfast.bench.budget import Budget

PROCESSES = 6
# after so many failures it is one fault, and the rest of the time is better spent otherwise
MOST_FAILURES = 20
NAMED = 12
# seconds of one test, compilation included
MOST_SECONDS = 150
# a test that cannot be imported because one of these is broken tells of a fault, not of a package that is not here
_OURS = ("benchmarks", "clipfast", "tests", "torch", "triton")


class Outcomes(NamedTuple):
    """What is in the file of `benchmarks/gpu/pytest_outcomes.py`."""

    selected: int
    tests: dict[str, tuple[str, str]]  # name -> (running, passed, failed or skipped; why)
    uncollected: dict[str, str]  # file -> why

    def having(self, outcome: str) -> dict[str, str]:
        return {name: why for name, (found, why) in self.tests.items() if found == outcome}


def read(path: Path) -> Outcomes:
    selected, tests, uncollected = 0, {}, {}
    for line in path.read_text().splitlines() if path.exists() else ():
        fact = json.loads(line)
        if "selected" in fact:
            selected = max(selected, fact["selected"])
        elif "uncollected" in fact:
            uncollected[fact["uncollected"]] = fact["why"]
        # a test that failed may skip or fail once more while it is taken down
        elif tests.get(fact["test"], ("",))[0] != "failed":
            tests[fact["test"]] = fact["outcome"], fact.get("why", "")
    return Outcomes(selected, tests, uncollected)


def command(paths: Sequence[str], *, dry: bool = False) -> list[str]:
    """pytest's arguments; dry: to collect alone."""
    arguments = [sys.executable, "-m", "pytest", *paths, "-m", "gpu", "--tb=short", f"--maxfail={MOST_FAILURES}"]
    arguments += ["-p", "no:cacheprovider", "-p", pytest_outcomes.__name__, "--continue-on-collection-errors"]
    if int(metadata.version("pytest").partition(".")[0]) < 9:
        # pyproject.toml has settings that only newer ones know, and is strict about them
        arguments += ["-c", os.devnull, "--rootdir", str(ROOT)]
    if dry:
        return [*arguments, "--collect-only", "-q"]
    if importlib.util.find_spec("xdist") is not None:
        arguments += ["-n", str(PROCESSES)]
        if importlib.util.find_spec("pytest_timeout") is not None:
            # a kernel that hangs is deaf to signals; the process is ended, and another takes its place
            arguments += [f"--timeout={MOST_SECONDS}", "--timeout-method=thread"]
    return arguments


def stage(run: Run, budget: Budget, paths: Sequence[str] = ("tests",)) -> None:
    """Runs them, and says of each one that failed its name, of each reason to skip how often it was given."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        run.fail(f"no test was run: {' and '.join(missing)} not here")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes"
        environment = {pytest_outcomes.FILE: str(path)}
        if not run.dry:
            # under Triton's interpreter they would prove nothing here
            environment |= {"TRITON_INTERPRET": "0", "CLIPFAST_REQUIRE_GPU": "1"}
        job = Job("tests", command(paths, dry=run.dry), run.file("tests.log"), environment)
        status, text = job.wait(budget.left())
        found = read(path)
    _say_uncollected(run, found)
    if run.dry and status == 0:
        run.note(f"dry run: would run {found.selected} tests")
    elif run.dry or status not in (0, 1, 2, None) or (status and not found.having("failed") and not found.uncollected):
        run.fail(f"pytest ended with status {status}: {text}")
    if not run.dry:
        _say(run, found, cut_off=status is None)


def _say_uncollected(run: Run, found: Outcomes) -> None:
    for name, why in found.uncollected.items():
        absent = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", why)
        if absent and absent[1].partition(".")[0] not in _OURS:
            run.note(f"{name} was not collected: {absent[1]} is not installed")
        else:
            run.fail(f"{name} was not collected: {why[:200]}")


def _say(run: Run, found: Outcomes, *, cut_off: bool) -> None:
    failed, skipped, running = (found.having(outcome) for outcome in ("failed", "skipped", "running"))
    counts = f"{len(found.having('passed'))} passed, {len(failed)} failed, {len(skipped)} skipped"
    stopped = "cut off, out of time" if cut_off else "stopped at so many failures"
    all_ran = len(found.tests) - len(running) == found.selected
    run.note(f"{counts} of {found.selected}" + ("" if all_ran else f", {stopped}"))
    for reason, count in Counter(skipped.values()).most_common():
        run.note(f"{count} skipped: {reason[:120]}")
    for name, why in [*failed.items()][:NAMED]:
        run.fail(f"{name}: {why[:200]}")
    if len(failed) > NAMED:
        run.fail(f"{len(failed) - NAMED} more tests failed; the log names them")
    if cut_off and running:
        run.note(f"running when it was cut off: {', '.join([*running][:PROCESSES])}")
