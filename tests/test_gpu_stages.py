"""Each stage of `make gpu` in a process of its own: whatever happens in one is named, and the others run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import process, stages, supervisor
from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.run import State
from clipfast.bench.budget import Budget
from tests import gpu_faults

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout
    )


def results(folder: Path) -> tuple[list[dict[str, str]], dict]:
    """Rows of the CSV, and the JSON beside it."""
    (path,) = folder.glob("*.csv")
    with path.open() as file:
        return list(csv.DictReader(file)), json.loads(path.with_suffix(".json").read_text())


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.parametrize("number", range(len(gpu_faults.FAULTS)))
def test_a_fault_ends_its_stage_alone(number, tmp_path):
    done = run("tests/gpu_faults.py", str(tmp_path), str(number))
    rows, found = results(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    names = [name for name in stages.STAGES if name != stages.FIRST]
    assert [each["stage"] for each in found["stages"]] == [stages.FIRST, *names]
    # each has run, up to its fault
    assert [row["stage"] for row in rows if row["operator"] == "before"] == names
    outcomes = {each["stage"]: each["outcome"] for each in found["stages"]}
    table = done.stdout[done.stdout.index("\nstages\n") :]
    for name in names:
        fault = gpu_faults.fault_of(name, number)
        at = f"the {fault} of {name}"
        expected = {
            "none": "done",
            "wrong": "done",
            "exception": "failed: RuntimeError: no such kernel in <path>",
            "exit": f"died: exit status 7 in {at}; last: {name} speaks",
            "crash": f"died: signal 6 (SIGABRT) in {at}; last: {name} speaks",
            "hang": f"cut off: out of time in {at}",
            "sticky": f"failed: RuntimeError: {gpu_faults.STICKY}",
        }[fault]
        assert outcomes[name] == expected
        assert f"{name} " in table and expected[:100] in table
        ended = f"{name}: {name} came to its end" in found["notes"]
        assert ended == (fault in ("none", "wrong", "sticky"))
        assert (f"row 3 of {name} is wrong" in found["failures"]) == (fault == "wrong")
        assert (f"launch of {name}" in found["wrong"]) == (fault == "wrong")
        if fault == "hang":
            assert not alive(int((tmp_path / f"{name}.pid").read_text())), "what a stage has started outlives it"
    seconds = {each["stage"]: each["seconds"] for each in found["stages"]}
    hung = [seconds[name] for name in names if gpu_faults.fault_of(name, number) == "hang"]
    assert all(gpu_faults.SHARE <= each < gpu_faults.SHARE + gpu_faults.GRACE + 3 for each in hung)


# ---- checks that end their process ----

CHECKS = """
import os, sys, time
from pathlib import Path
from unittest import mock
import torch
from benchmarks.gpu import __main__ as command, correctness, launch_ids, run, stages, supervisor
from clipfast.bench.budget import Budget

def breaks(): raise AssertionError("row 3 is wrong")
def dies(): os._exit(9)
def hangs(): time.sleep(600)
def sticks():
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = mock.Mock(side_effect=RuntimeError("CUDA error: unspecified launch failure"))
    raise RuntimeError("CUDA error: unspecified launch failure")

def checks(device, dry=False):
    for i in range(12):
        bad = {2: breaks, 5: dies, 8: sticks, 9: hangs}.get(i, lambda: None)
        work = correctness.Work(bad, lambda result: None)
        yield correctness.Check(f"check {i}", "linear", torch.float16, lambda work=work, i=i: work, more=f"source {i}")

launch_ids.launches_of = lambda call, device: [launch_ids.Launch(f"launch {call.__name__}", "linear w4")]
correctness.checks = checks
supervisor.device_of = lambda state: torch.device("cuda", 0) if state.facts else torch.device("cpu")
every = [stages.STAGES["environment"], stages.STAGES["correctness"]._replace(processes=2)]
supervisor.plan = lambda options: every
supervisor.proved_before = lambda folders: {}
supervisor.PATIENCE = 3
options = command.parse(["--dry-run", "--out", sys.argv[1]])
status = supervisor.execute(options)
assert status == 1
# another run, in which nothing is right any more, knows what was right
sys.stdout.flush()
from benchmarks.gpu.evidence import proved_before
before = proved_before([Path(sys.argv[1])])
assert sorted(before.values(), key=len) and len(before) == 8, before
state = run.State(dry=True, proved=before)
events = []
made = run.Run("correctness", state, torch.device("cpu"), lambda kind, value: events.append((kind, value)))
ending = ("check 5", "check 8", "check 9")
correctness.checks = lambda device, dry: (each for each in checks(device) if each.name not in ending)
correctness.stage(made, Budget(60))
print("SECOND", [value for kind, value in events if kind == "note"], flush=True)
"""


def test_a_check_that_ends_its_process_is_named_and_the_others_go_on(tmp_path):
    done = run("-c", CHECKS, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    _, found = results(tmp_path)
    failures = sorted(found["failures"])
    assert len(failures) == 4
    assert failures[0] == "check 5: died: exit status 9 in check 5"
    assert failures[1].startswith("check 8: failed: RuntimeError: CUDA error: unspecified launch failure")
    assert failures[2:] == ["check 9: cut off: no end after 3 s in check 9", "row 3 is wrong"]
    # every other one was run, once
    names = sorted(found["proved"].values(), key=lambda name: int(name.split()[1]))
    assert names == [f"check {i}" for i in range(12) if i not in (2, 5, 8, 9)]
    assert found["wrong"].keys() == {"launch breaks", "launch dies", "launch sticks", "launch hangs"}
    assert "SECOND ['1 checks run, 1 wrong, 8 found right before']" in done.stdout


def test_cuda_that_starts_in_no_fork_starts_in_fresh_processes(tmp_path):
    script = """
import sys
from benchmarks.gpu import __main__ as command, stages, supervisor
def function(name): raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")
supervisor.function = function
supervisor.plan = lambda options: [stages.STAGES["environment"], stages.STAGES["ceilings"]]
raise SystemExit(supervisor.execute(command.parse(["--dry-run", "--out", sys.argv[1]])))
"""
    done = run("-c", script, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows, found = results(tmp_path)
    assert [each["outcome"] for each in found["stages"]] == ["done", "done"]
    assert {"ceiling copy", "ceiling bfloat16"} < {row["operator"] for row in rows}


def test_a_fresh_process_takes_all_that_was_proved(tmp_path):
    """An argument of a program holds 128 KiB at most."""
    script = """
import sys
from benchmarks.gpu import __main__ as command, stages, supervisor
supervisor.function = lambda name: 1 / 0
supervisor.plan = lambda options: [stages.STAGES["environment"]]
real = supervisor.State
supervisor.State = lambda **given: real(**given | {"proved": {f"key {i}": 100 * "x" for i in range(3000)}})
raise SystemExit(supervisor.execute(command.parse(["--dry-run", "--out", sys.argv[1]])))
"""
    done = run("-c", script, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_does_not_die_is_left_behind(monkeypatch):
    monkeypatch.setattr(process, "STUCK", 0.5)
    monkeypatch.setattr(process, "GRACE", 0.1)
    ended, real = [], process._end_session

    def body(stage, state, seconds, emit):
        emit("doing", ["a deaf kernel", []])
        time.sleep(600)

    deaf = process.Process(body, "gate", State(dry=True), 1)
    with monkeypatch.context() as patch:
        patch.setattr(process, "_end_session", lambda leader: None)
        process.watch([deaf], Budget(0.3).left, lambda *_: None, lambda *_: None, lambda _, how: ended.append(how))
    assert str(ended[0]) == "cut off: out of time, and does not end"
    real(deaf.pid)
    os.waitpid(deaf.pid, 0)


def test_starting_touches_no_cuda():
    """What is forked must not have started CUDA, and asking how many GPUs there are starts it."""
    script = """
import torch
def refuse(*arguments): raise SystemExit("CUDA was asked")
torch.cuda.is_available = torch.cuda.device_count = torch._C._cuda_getDeviceCount = torch.cuda.init = refuse
from benchmarks.gpu import kit, supervisor
print("clean")
"""
    done = run("-c", script)
    assert done.stdout == "clean\n", done.stdout + done.stderr


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path):
    script = """
import sys, time
from benchmarks.gpu import __main__ as command, stages, supervisor
real = stages.function
def function(name):
    def sleeps(run, budget):
        run.add({"operator": "kept", "status": "ok"})
        run.say("asleep")
        time.sleep(600)
    return real(name) if name == "environment" else sleeps
supervisor.function = function
raise SystemExit(supervisor.execute(command.parse(["--dry-run", "--out", sys.argv[1]])))
"""
    started = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in started.stdout:
        lines.append(line)
        if "asleep" in line:
            break
    started.terminate()
    rest = started.communicate(timeout=30)[0]
    assert started.returncode == 1
    rows, found = results(tmp_path)
    assert [row["operator"] for row in rows] == ["kept"] and found["notes"][-1] == "interrupted"
    assert "note: interrupted" in rest and "no correctness failure" in rest


# ---- the plan ----


def plan(*arguments: str) -> list[str]:
    return [stage.name for stage in stages.plan(command.parse([*arguments]))]


def test_plans():
    assert tuple(stages.STAGES) == tuple(command.STAGES)
    start = ["environment", "build", "ceilings"]
    assert plan()[:5] == [*start, "gate", "towers"]
    assert plan("rest")[3:5] == ["correctness", "memcheck"]
    assert set(plan("all")) == {*plan(), *plan("rest")} == set(command.STAGES) - {"tests"}
    assert plan("--only", "tests") == ["environment", "build", "tests"]
    assert plan("--only", "operators") == [*start, "operators"]
    assert plan("rest", "--from", "memcheck") == [*start, "memcheck", "operators", "train", "tune"]
    by_name = {stage.name: stage for stage in stages.plan(command.parse(["--minutes", "11"]))}
    assert by_name["towers"].seconds == 2 * stages.STAGES["towers"].seconds
    assert by_name["ceilings"].seconds == stages.STAGES["ceilings"].seconds
    assert stages.plan(command.parse(["--only", "tune"]))[-1].seconds == float("inf")


def test_a_stage_of_another_plan_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["rest", "--from", "towers"])
    assert "towers is no stage of rest" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["headline", "rest"])
def test_the_plan_fits_its_time(name):
    """By the estimates that a dry run prints. What comes last takes what is left."""
    chosen = stages.plan(command.parse([name]))
    estimates = {stage.name: sum(seconds for _, seconds in stages.forecast(stage)) for stage in chosen}
    assert all(estimates.values())
    assert all(estimates[stage.name] <= stage.seconds for stage in chosen)
    planned = sum(seconds for stage, seconds in estimates.items() if stage != "compiled-l14")
    assert planned <= 60 * command.MINUTES[name] - supervisor.RESERVE


def test_a_stage_is_not_begun_for_too_little_time(capsys):
    evidence = Evidence(State(dry=True), None)
    late = stages.STAGES["compiled-l14"]
    supervisor.Supervisor(evidence, Budget(30)).run([late])
    assert evidence.stages[0]["outcome"] == "not run: out of time: 20 s are left, and it wants 75 at least"
    assert not supervisor.broken(evidence.stages[0]["outcome"])
    assert "at most" not in capsys.readouterr().out
