"""A stage in a process of its own: what it finds comes as events, what it prints as lines, and how it ended in words.

The process is a fork of one that has imported PyTorch and never touched CUDA, which saves each stage the imports.
Where CUDA does not start in a fork, `fresh` processes import everything anew. Each is the leader of a session, and
whatever it has started ends with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.plans import ROOT
from benchmarks.gpu.run import State
from clipfast.bench import harness

# seconds from the end of a stage's time until it is killed
GRACE = 5.0
# seconds in which the pipes of a dead process are still read
LINGER = 1.0
# seconds after which a killed process that does not end, its driver busy, is left behind
STUCK = 4.0
# lines of output that are kept, to say what a process last said
KEPT = 20
Body = Callable[[str, State, float, Callable[[str, Any], None]], None]  # (stage, state, seconds, emit)


class Outcome(NamedTuple):
    """How a stage ended: "done", "failed" (raised), "died" (its process), "cut off" (ended by us) or "not run"."""

    kind: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}" if self.why else self.kind


# ---------------------------------------------------------------------------------------------------------------------
# Inside


def serve(body: Body, stage: str, state: State, seconds: float, channel: int) -> None:
    """Runs the stage and says how it ended; never returns."""

    def emit(kind: str, value: Any) -> None:
        line = json.dumps([kind, value]).encode() + b"\n"
        while line:
            line = line[os.write(channel, line) :]

    try:
        body(stage, state, seconds, emit)
        ending = Outcome("done")
    except BaseException as error:
        ending = Outcome("failed", harness.reason(error))
        if os.environ.get("CLIPFAST_TRACEBACK") == "1":
            traceback.print_exc()
    with contextlib.suppress(BaseException):
        emit("ended", [*ending])
        sys.stdout.flush()
        sys.stderr.flush()
    # nothing of the process that was forked is to be cleaned up here
    os._exit(0)


def serve_fresh(body: Body) -> None:
    """`serve` in a process that was started anew: what it is to do comes as JSON from `Process`."""
    given = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    serve(body, given["stage"], State(**given["state"]), given["seconds"], given["channel"])


# ---------------------------------------------------------------------------------------------------------------------
# Outside


class Process:
    """A stage that runs, seen from the process that has started it."""

    def __init__(self, body: Body, stage: str, state: State, seconds: float, *, fresh: bool = False):
        self.stage, self.part = stage, state.part
        self.doing, self.launches = "", []  # what it last said that it does
        self.since = time.monotonic()  # and when
        self.tail: deque[str] = deque(maxlen=KEPT)
        self._ending: Outcome | None = None
        self._killed, self._killed_at, self._dead = "", 0.0, 0.0
        self._rest = {"events": b"", "output": b""}
        sys.stdout.flush()
        sys.stderr.flush()
        events, channel = os.pipe()
        output, printed = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._in_child(body, stage, state, seconds, channel, printed, fresh)
            finally:
                os._exit(1)
        os.close(channel)
        os.close(printed)
        self.open = {"events": events, "output": output}
        for pipe in self.open.values():
            os.set_blocking(pipe, False)

    @staticmethod
    def _in_child(
        body: Body, stage: str, state: State, seconds: float, channel: int, printed: int, fresh: bool
    ) -> None:
        os.setsid()
        # an interrupt from the keyboard is for the process outside, which then ends this one
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.close(printed)
        if not fresh:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            serve(body, stage, state, seconds, channel)
        os.set_inheritable(channel, True)
        described = {"stage": stage, "state": dataclasses.asdict(state), "seconds": seconds, "channel": channel}
        # a file, since an argument holds 128 KiB at most, and what was proved before is more
        with tempfile.TemporaryFile("w") as file:
            json.dump(described, file)
            file.seek(0)
            os.dup2(file.fileno(), 0)
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", "--stage", stage])

    def read(self, which: str) -> list[str] | None:
        """Whole lines that have come; None at the pipe's end."""
        try:
            chunk = os.read(self.open[which], 1 << 16)
        except BlockingIOError:
            return []
        if not chunk:
            return None
        *lines, self._rest[which] = (self._rest[which] + chunk).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in lines]

    def close(self, which: str) -> list[str]:
        """Closes a pipe that has ended. Returns: its last line, if that had no end."""
        os.close(self.open.pop(which))
        rest, self._rest[which] = self._rest[which], b""
        return [rest.decode(errors="replace")] if rest else []

    def take(self, line: str) -> tuple[str, Any] | None:
        """An event that concerns others; None of the process's own."""
        try:
            kind, value = json.loads(line)
        except ValueError:  # cut off as the process died
            return None
        if kind == "ended":
            self._ending = Outcome(*value)
        elif kind == "doing":
            (self.doing, self.launches), self.since = value, time.monotonic()
        else:
            return kind, value
        return None

    def kill(self, why: str) -> None:
        """Ends it and all that it has started."""
        if self._ending is None:
            self._killed = self._killed or why
        self._killed_at = self._killed_at or time.monotonic()
        _end_session(self.pid)

    def is_over(self) -> bool:
        """Whether it has ended and nothing more will come."""
        if self.open and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            # what it has started may hold its pipes open: that ends too, unless it has a session of its own
            _end_session(self.pid)
            self._dead = self._dead or time.monotonic()
            return time.monotonic() - self._dead > LINGER
        return not self.open or self._is_stuck()

    def _is_stuck(self) -> bool:
        return bool(self._killed_at) and time.monotonic() - self._killed_at > STUCK

    def wait(self) -> Outcome:
        """How it ended."""
        ended = status = 0
        while not ended and not self._is_stuck():
            ended, status = os.waitpid(self.pid, os.WNOHANG if self._killed_at else 0)
            time.sleep(0 if ended else 0.05)
        _end_session(self.pid)
        for pipe in self.open.values():
            os.close(pipe)
        self.open.clear()
        if self._ending is not None:
            return self._ending
        if not ended:
            return Outcome("cut off", f"{self._killed}, and does not end")
        at = f" in {self.doing}" if self.doing else ""
        if self._killed:
            return Outcome("cut off", f"{self._killed}{at}")
        said = next((line.strip() for line in reversed(self.tail) if line.strip()), "")
        code = os.waitstatus_to_exitcode(status)
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
        return Outcome("died", f"{how}{at}" + (f"; last: {said[:120]}" if said else ""))


def _end_session(leader: int) -> None:
    """Kills all processes of a session: its members may have groups of their own."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            # pid (name) state ppid pgrp session ...: the name may hold anything
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                os.kill(int(entry.name), signal.SIGKILL)


def watch(
    processes: list[Process],
    until: Callable[[], float],
    take: Callable[[Process, str, Any], None],
    echo: Callable[[Process, str], None],
    ended: Callable[[Process, Outcome], Process | None],
    patience: float = math.inf,
) -> None:
    """Follows processes to their ends.

    until: seconds left; GRACE after they are over, what still runs is ended.
    take, echo: for each event and each line.   ended: for each end; may return a process that goes on with its work.
    patience: seconds that a process may be doing one thing.
    """
    selector = selectors.DefaultSelector()

    def follow(process: Process) -> None:
        for which, pipe in process.open.items():
            selector.register(pipe, selectors.EVENT_READ, (process, which))

    running = list(processes)
    for process in running:
        follow(process)
    over: float | None = None
    try:
        while running:
            if until() <= 0 and over is None:
                over = time.monotonic()
            if over is not None and time.monotonic() - over > GRACE:
                for process in running:
                    process.kill("out of time")
            for process in running:
                if time.monotonic() - process.since > patience:
                    process.kill(f"no end after {patience:.0f} s")
            for key, _ in selector.select(timeout=0.2):
                process, which = key.data
                lines = process.read(which)
                if lines is None:
                    # before it is closed: processes forked meanwhile hold it open, and the selector would go on
                    # reporting it, as that of another pipe with its number
                    selector.unregister(key.fd)
                    lines = process.close(which)
                for line in lines:
                    if which == "output":
                        process.tail.append(line)
                        echo(process, line)
                    elif (event := process.take(line)) is not None:
                        take(process, *event)
            for process in [each for each in running if each.is_over()]:
                running.remove(process)
                for pipe in process.open.values():
                    selector.unregister(pipe)
                if (successor := ended(process, process.wait())) is not None:
                    running.append(successor)
                    follow(successor)
    finally:
        for process in running:
            process.kill("interrupted")
            process.wait()
        selector.close()
