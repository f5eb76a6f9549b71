"""compute-sanitizer's stage of `make gpu`: which logs are clean, and that its target launches every kernel.

The tool is not here: logs are written as it writes them, and a shell script stands in for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import problems, sanitizer
from clipfast import tuning
from clipfast.bench.budget import Budget

from .test_gpu_suite import Run

START = "========= COMPUTE-SANITIZER\n"
LAUNCHES = "launched layer_norm\nlaunched linear\n"
ERROR = """========= Invalid __global__ read of size 2 bytes
=========     at _linear_kernel+0x120
=========     by thread (31,0,0) in block (4,0,0)
=========     Address 0x7f0000000200 is out of bounds
=========
"""
HAZARD = "========= Error: Race reported between Write access at a and Read access at b [32 hazards]\n"
NO_ERRORS, ERRORS = "========= ERROR SUMMARY: 0 errors\n", "========= ERROR SUMMARY: 1 error\n"


def races(errors: int, warnings: int) -> str:
    counts = f"{errors + warnings} hazards displayed ({errors} errors, {warnings} warnings)"
    return f"========= RACECHECK SUMMARY: {counts}\n"


@pytest.mark.parametrize(
    ("log", "status", "wrong", "text"),
    [
        (LAUNCHES + NO_ERRORS, 0, False, "no error in 2 launches"),
        (
            LAUNCHES + ERROR + ERRORS,
            9,
            True,
            "the first: Invalid __global__ read of size 2 bytes at _linear_kernel",
        ),
        # no summary is no proof
        (LAUNCHES, None, False, "cut short after 2 launches, no error until then"),
        (LAUNCHES + NO_ERRORS, None, False, "cut short after 2 launches, no error until then"),
        ("", None, False, "cut short after 0 launches, no error until then"),
        (LAUNCHES + ERROR, None, True, "1 errors before it was cut short in 2 launches, the first: Invalid __global__"),
        (LAUNCHES, 0, False, "ended without a summary (exit status 0) after 2 launches"),
        (LAUNCHES, -11, True, "ended without a summary (exit status -11) after 2 launches"),
        # the target itself failed
        (LAUNCHES + "RuntimeError: no\n" + NO_ERRORS, 1, True, "exit status 1 after 2 launches: RuntimeError: no"),
        (LAUNCHES + races(0, 0), 0, False, "no error in 2 launches"),
        (LAUNCHES + HAZARD + races(1, 0), 9, True, "1 errors in 2 launches, the first: Error: Race reported between"),
        (LAUNCHES + HAZARD, None, True, "1 errors before it was cut short in 2 launches"),
        (LAUNCHES + races(0, 3), 9, False, "no error in 2 launches, 3 warnings"),
    ],
)
def test_what_a_log_says(log, status, wrong, text):
    found = sanitizer.verdict(START + log, status)
    assert found.wrong is wrong and text in found.text


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A stand-in for compute-sanitizer that prints what it is told and notes what it was asked."""
    path = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(sanitizer, "on_path", lambda name: str(path))

    def write(prints: str, then: str = "exit 0") -> Path:
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat <<END\n{prints}END\n{then}\n')
        path.chmod(0o755)
        return tmp_path / "asked"

    return write


def test_both_tools_run_one_after_the_other(tool):
    asked, run = tool(START + LAUNCHES + NO_ERRORS), Run(dry=False)
    sanitizer.stage(run, Budget(60))
    assert run.notes == ["memcheck: no error in 2 launches", "racecheck: no error in 2 launches"]
    assert [line.split()[1] for line in asked.read_text().splitlines()] == ["memcheck", "racecheck"]
    assert "-m benchmarks.gpu.sanitizer" in asked.read_text()


def test_errors_are_failures(tool):
    tool(START + LAUNCHES + ERROR + ERRORS, "exit 9")
    run = Run(dry=False)
    sanitizer.stage(run, Budget(60))
    assert len(run.failures) == 2 and run.failures[0].startswith("memcheck: 1 errors in 2 launches, the first: Invalid")


def test_a_tool_that_is_cut_off_is_not_clean(tool, monkeypatch):
    monkeypatch.setattr(sanitizer, "LEAST_SECONDS", 1)
    tool(START + LAUNCHES, "sleep 60")
    run = Run(dry=False)
    sanitizer.stage(run, Budget(2))
    assert run.notes == [
        "memcheck: cut short after 2 launches, no error until then",
        "racecheck: not run: out of time",
    ]
    assert not run.failures


def test_a_machine_without_the_tool_says_so(monkeypatch):
    monkeypatch.setattr(sanitizer, "on_path", lambda name: None)
    run = Run(dry=False)
    sanitizer.stage(run, Budget(60))
    assert run.notes == ["compute-sanitizer is not here"]


def test_the_target_says_what_it_has_launched(device, monkeypatch, capsys):
    """In bfloat16 first. Of the products three configurations: the interpreter is slow."""
    several = problems.linear_configurations

    def few(dtype, architecture):
        return several(dtype, architecture)[:3]

    if device == "cpu":
        monkeypatch.setattr(problems, "linear_configurations", few)
        monkeypatch.setattr(sanitizer.native, "missing", lambda: "a library of CUDA's needs a GPU")
    count = sanitizer.target(torch.device(device))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count and all(line.startswith("launched ") for line in lines)
    dtypes = [line.rpartition(" ")[2] for line in lines if line.endswith(("bfloat16", "float32"))]
    assert dtypes == sorted(dtypes), "bfloat16 before float32"
    assert sum("gradients of attention" in line for line in lines) == 6
    assert sum("LinearConfig" in line for line in lines) == len(
        problems.linear_configurations(torch.bfloat16, tuning.architecture(torch.device(device)))
    )


def test_a_dry_run_launches_two():
    run = Run(dry=True)
    run.device = torch.device("cpu")
    sanitizer.stage(run, Budget(60))
    assert run.notes == ["dry run: compute-sanitizer needs a GPU; its target made 2 launches"]
