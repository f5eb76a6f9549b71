"""A process of its own for one peer: it waits in a pipe, and does what `seats.Worker` asks.

It ends with its parent, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from typing import BinaryIO

from clipfast.bench import harness, peers, seats

# of Linux: the signal that a process gets when its parent dies; a stopped process gets it too
PR_SET_PDEATHSIG = 1


def main(parent: int) -> None:
    """Serve until the pipe closes.   parent: its process id."""
    _stay_with(parent)
    asks, answers = _pipes()
    seat: seats.Apart | None = None
    while True:
        try:
            name, *arguments = pickle.load(asks)
        except (EOFError, OSError):
            # at once: libraries' threads and exit handlers have nothing to save
            os._exit(0)
        try:
            if name == "build":
                seat, found = seats.built(*arguments), None
            else:
                found = getattr(seat, name)(*arguments)
            answer = ("ok", found)
        except peers.Missing as error:
            answer = ("missing", str(error))
        except Exception as error:
            answer = ("failed", harness.reason(error))
        pickle.dump(answer, answers)
        answers.flush()


def _stay_with(parent: int) -> None:
    """Die with the parent, and leave Ctrl-C to it."""
    if not hasattr(os, "setpgid"):
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # with whatever processes a library starts; where a group loses its parent while stopped, POSIX hangs it up
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _pipes() -> tuple[BinaryIO, BinaryIO]:
    """What was stdin and stdout. A library that prints goes to stderr, and no child of its own holds the pipes."""
    asks, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return asks, answers
