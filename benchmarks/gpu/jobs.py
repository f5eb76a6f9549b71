"""Programs that run beside a stage, each with its output in a log, and where CUDA's are."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.plans import ROOT


def on_path(name: str) -> str | None:
    """A tool of CUDA, also where it is installed but not on the PATH."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


class Job:
    """A subprocess in a group of its own, so that what it starts ends with it."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path | None, environment: Mapping[str, str] | None = None
    ):
        self.name = name
        self.log = log or Path(tempfile.mkdtemp()) / (re.sub(r"\W+", "-", name) + ".log")
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": _python_path(), **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                # a group of its own, in the stage's session: ended with it, whatever happens
                **({"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}),
            )

    def wait(self, seconds: float) -> tuple[int | None, str]:
        """Its exit status, None if it was cut off, and its last line of weight."""
        try:
            status: int | None = self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            status = None
            self.end()
        text = self.summary()
        return status, text if status is not None else f"cut off, out of time; {text}"

    def end(self) -> None:
        """An interrupt first, on which pytest still says how far it came."""
        for how, patience in ((signal.SIGINT, 8), (signal.SIGKILL, 5)):
            if self.process.poll() is not None:
                return
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def summary(self) -> str:
        """The last line that counts something, else the last one."""
        lines = [re.sub(r"\x1b\[[\d;]*m", "", line).strip("= \n") for line in self.text().splitlines()]
        lines = [line for line in lines if line]
        counting = [
            line for line in lines if re.search(r"\d+ (passed|failed|error)|ERROR SUMMARY|RACECHECK SUMMARY", line)
        ]
        return (counting or lines or ["no output"])[-1][:160]


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
