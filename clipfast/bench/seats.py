"""Where contestants live: on a GPU in this process, on a CPU each peer in a process of its own.

Two pools of threads that spin in one process disturb each other. So on a CPU a peer has a process for a whole model and
dtype, with its library's own settings, and that process is stopped (SIGSTOP) while another is asked: nothing of it can
run. Where the system has no such signal, it waits in a pipe.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from clipfast.bench import environment, harness, peers
from clipfast.bench.harness import Gone
from clipfast.bench.peers import Batch, Peer, Spec
from clipfast.bench.plan import WARM

# of memory that a model takes while it is built, as copies of its weights, and of what it imports
COPIES, IMPORTS = 2, 1 << 29


class Seat(Protocol):
    """One peer, built; whoever raises here costs its own rows only."""

    def prepare(self, tower: str, batch: Batch) -> list[str]:
        """The names of its contestants, ready to be called."""

    def first(self, name: str) -> tuple[Tensor, float]:
        """What a call returns, and the seconds that it took."""

    def turn(self, name: str, calls: int) -> list[float]:
        """Seconds of so many calls, one after another."""

    @property
    def alive(self) -> bool:
        """Whether it is built, and can be asked again."""

    def build(self) -> None:
        """Once, before anything else is asked."""

    def close(self) -> None:
        """Nothing is asked of it any more."""


class Here:
    """In this process."""

    def __init__(self, peer: Peer, spec: Spec):
        self._peer, self._spec = peer, spec
        self._prepare: peers.Prepare | None = None
        self._calls: peers.Calls = {}

    @property
    def alive(self) -> bool:
        return self._prepare is not None

    def build(self) -> None:
        """Raises: whatever building raises."""
        if self._prepare is None:
            self._prepare = self._peer.build(self._spec)

    def close(self) -> None:
        self._prepare, self._calls = None, {}

    def prepare(self, tower: str, batch: Batch) -> list[str]:
        # what was prepared for another size is of no use, and lies in cycles; looking for them takes 0.3 s
        self._calls = {}
        if self._peer.prepares:
            torch.compiler.reset()
            gc.collect()
        self._calls = self._prepare(tower, batch)
        return list(self._calls)

    def first(self, name: str) -> tuple[Tensor, float]:
        return harness.first(self._calls[name])

    def turn(self, name: str, calls: int) -> list[float]:
        return harness.timed(self._calls[name], calls)


class Apart(Here):
    """In a worker's process: tensors come and go as arrays."""

    def prepare(self, tower: str, batch: Any) -> list[str]:
        return super().prepare(tower, Batch(*map(torch.from_numpy, batch)))

    def first(self, name: str) -> Any:
        output, seconds = super().first(name)
        # exact: what is narrower than float32 has no more digits
        return output.float().numpy(), seconds

    def turn(self, name: str, calls: int, warm: bool = False) -> list[float]:
        if warm:
            self._calls[name]()
        return super().turn(name, calls)


def built(peer: Peer, weights: Path, threads: int, spec: Spec) -> Apart:
    """In a worker: the peer of `spec`, whose weights are those of the file."""
    torch.set_num_threads(threads)
    seat = Apart(peer, spec._replace(weights=torch.load(weights, mmap=True)))
    seat.build()
    return seat


# the child looks for everything where this process does
CHILD = "import sys; sys.path[:] = {path!r}; from clipfast.bench import worker; worker.main({parent})"

# so that none outlives this process, however it ends (but for SIGKILL, after which the system ends them)
_running: set[Worker] = set()


class Worker:
    """A peer in a process of its own, stopped unless it is asked."""

    def __init__(self, peer: Peer, spec: Spec, weights: Path):
        """Start it. In the main thread: the process ends with the thread that started it.

        weights: of `torch.save`; those of the spec are not used.
        """
        self._peer, self._spec, self._weights, self._built = peer, spec._replace(weights={}), weights, False
        self._why = ""
        self._last: dict[str, float] = {}  # contestant -> seconds of its last call
        self._kills = _kills_for_memory()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD.format(path=sys.path, parent=os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        _running.add(self)

    def build(self) -> None:
        """Once. Raises: Missing; Gone for whatever else goes wrong over there; MemoryError where there is no room."""
        if self._built:
            return
        needed = COPIES * self._weights.stat().st_size + IMPORTS
        if needed > (free := environment.available_bytes(self._spec.device)):
            raise MemoryError(f"out of memory: {needed / 2**30:.1f} GiB to build it, {free / 2**30:.1f} GiB are free")
        self._ask("build", self._peer, self._weights, torch.get_num_threads(), self._spec)
        self._built = True

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._built and not self._why

    def prepare(self, tower: str, batch: Batch) -> list[str]:
        self._last = {}
        return self._ask("prepare", tower, tuple(data.numpy() for data in batch))

    def first(self, name: str) -> tuple[Tensor, float]:
        output, self._last[name] = self._ask("first", name)
        return torch.from_numpy(output), self._last[name]

    def turn(self, name: str, calls: int) -> list[float]:
        found = self._ask("turn", name, calls, self._last.get(name, 0.0) < WARM)
        self._last[name] = found[-1]
        return found

    def close(self) -> None:
        """End it, and whatever it has started."""
        self._why = self._why or "its process was ended"
        _running.discard(self)
        # what it has started outlives it, in its group
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                pipe.close()

    def _ask(self, *message: Any) -> Any:
        if self._why:
            raise Gone(self._why)
        self._signal("SIGCONT")
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            status, answer = pickle.load(self._process.stdout)
        except (EOFError, OSError) as error:
            self._why = self._death()
            self.close()
            raise Gone(self._why) from error
        except BaseException:
            # half an answer may be in the pipe
            self.close()
            raise
        self._hold()
        if status == "missing":
            raise peers.Missing(answer)
        if status == "failed":
            raise Gone(answer)
        return answer

    def _hold(self) -> None:
        """Stop it, every thread, before anybody else goes on."""
        self._signal("SIGSTOP")
        if hasattr(signal, "SIGSTOP") and hasattr(os, "waitid"):
            # its end is left for who asks next
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, name: str) -> None:
        """To the process and those that it has started; nothing where there is no such signal."""
        number = getattr(signal, name, None)
        if number is None or not hasattr(os, "killpg") or self._process.poll() is not None:
            return
        # its group is its own from its first line on, before which it has nobody
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)
            else:
                self._process.send_signal(number)

    def _death(self) -> str:
        """Why it is gone: a signal's name, or the last line that it wrote."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "its process closed the pipe"
        if code < 0:
            memory = code == -signal.SIGKILL and _kills_for_memory() > self._kills
            return f"its process was ended by {signal.Signals(-code).name}{': out of memory' if memory else ''}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return harness.without_paths(": ".join([f"its process ended with status {code}", *lines[-1:]]))[:160]


def _kills_for_memory() -> int:
    """How many processes the system has killed for their memory since it started; 0 where it does not say."""
    try:
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) if found else 0


@atexit.register
def close_all() -> None:
    """End every worker that is left."""
    for worker in list(_running):
        worker.close()
