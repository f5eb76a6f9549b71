"""Runs `make gpu` with faults in its stages, on a CPU, for test_gpu_stages: python tests/gpu_faults.py FOLDER ROUND

Stage i of the plan has fault (i + ROUND) of FAULTS, so that in as many rounds as there are faults each stage has each.
What is CUDA's is made up: a synchronisation that raises stands for an error that stays.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import process, stages, supervisor

FAULTS = ("none", "exception", "exit", "crash", "hang", "wrong", "sticky")
STICKY = "CUDA error: an illegal memory access was encountered"
# seconds of a stage
SHARE, GRACE = 0.6, 0.2


def fault_of(stage: str, number: int) -> str:
    # the first stage finds out what machine this is; its own faults have a test of their own
    names = [name for name in stages.STAGES if name != stages.FIRST]
    return "none" if stage == stages.FIRST else FAULTS[(names.index(stage) + number) % len(FAULTS)]


def faulty(fault: str, folder: Path) -> stages.Function:
    def stage(run, budget):
        run.doing(f"the {fault} of {run.stage}")
        run.add({"operator": "before", "status": "ok"})
        run.say(f"{run.stage} speaks")
        if fault == "exception":
            raise RuntimeError("no such kernel in /some/where/private")
        if fault == "exit":
            os._exit(7)
        if fault == "crash":
            os.abort()
        if fault == "hang":
            # what it has started hangs too, in a group of its own
            child = subprocess.Popen(["sleep", "600"], preexec_fn=os.setpgrp)
            (folder / f"{run.stage}.pid").write_text(str(child.pid))
            time.sleep(600)
        if fault == "wrong":
            run.fail(f"row 3 of {run.stage} is wrong", [f"launch of {run.stage}"])
        if fault == "sticky":
            torch.cuda.is_initialized = lambda: True
            torch.cuda.synchronize = mock.Mock(side_effect=RuntimeError(STICKY))
        run.note(f"{run.stage} came to its end")

    return stage


def main(folder: Path, number: int) -> int:
    real = stages.function

    def function(name: str) -> stages.Function:
        return real(name) if name == stages.FIRST else faulty(fault_of(name, number), folder)

    every = [stage._replace(seconds=SHARE, processes=1, restarts=False, least=0.3) for stage in stages.STAGES.values()]
    every[0] = every[0]._replace(seconds=30)
    options = command.parse(["--dry-run", "--out", str(folder), "--minutes", "2"])
    with (
        mock.patch.object(supervisor, "function", function),
        mock.patch.object(supervisor, "plan", return_value=every),
        mock.patch.object(supervisor, "MARGIN", 0.1),
        mock.patch.object(supervisor, "device_of", lambda state: torch.device("cuda", 0) if state.facts else CPU),
        mock.patch.object(process, "GRACE", GRACE),
    ):
        return supervisor.execute(options)


CPU = torch.device("cpu")

if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), int(sys.argv[2])))
