"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from clipfast.commands import CommandError
from clipfast.training.processes import Processes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["only_run_in"]

LOCK = "run.lock"


@contextlib.contextmanager
def only_run_in(out: Path, group: Processes) -> Iterator[None]:
    """Hold the folder for this run, in the first process of its group.

    It is a lock of the operating system: it ends with its process, however that ends, and the processes that decode,
    which are forked from it and may live a little longer, have no part in it.
    Raises: CommandError in every process if another run has the folder; it says which process that is.
    """
    with contextlib.ExitStack() as held:
        refused = None
        if group.first:
            try:
                held.enter_context(_locked(out / LOCK))
            except CommandError as error:
                refused = str(error)
        # nobody writes before it is known
        if refused := group.from_first(refused):
            raise CommandError(refused)
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # no flock: a forked process would share it
    with path.open("a+", encoding="utf-8") as file:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, f"{sys.platform} has no such lock")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise CommandError(f"{path.parent} is in use by {holder}: give another --out, or wait") from None
        except OSError as error:
            told = f"{path.parent} cannot be locked ({error.strerror})"
            print(f"clipfast: {told}: nothing keeps a second run away", file=sys.stderr)
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
        file.flush()
        yield
