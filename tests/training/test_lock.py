"""A folder has one run at a time, a dead process keeps nobody out, and what torchrun leaves behind stops."""

from __future__ import annotations

import errno
import os
import re
import signal
import time

import pytest

from clipfast import cli
from clipfast.commands import CommandError
from clipfast.training import lock
from clipfast.training.lock import LOCK, only_run_in
from clipfast.training.metrics import MetricsFile
from clipfast.training.processes import Processes

from .runs import arguments, start

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="this system has no such locks")
ALONE = Processes("cpu")


def test_a_dead_holder_keeps_nobody_out_though_its_workers_live(tmp_path):
    ready, tell = os.pipe()
    holder = os.fork()
    if holder == 0:
        with only_run_in(tmp_path, ALONE):
            worker = os.fork()
            if worker:
                os.write(tell, worker.to_bytes(4, "little"))
            time.sleep(60)
        os._exit(0)
    worker = int.from_bytes(os.read(ready, 4), "little")
    try:
        with pytest.raises(CommandError, match=rf"is in use by process {holder} on .*, since \d{{4}}-"):
            only_run_in(tmp_path, ALONE).__enter__()
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with only_run_in(tmp_path, ALONE):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    with only_run_in(tmp_path, ALONE):
        assert f"{tmp_path} cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_killed_torchrun_takes_its_processes_along(data, tmp_path, capsys):
    """And while they are there, nobody else trains in their folder."""
    words = arguments(data, tmp_path, "--steps", "1000000")
    torchrun = start(words, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    try:
        while not metrics.path.exists():
            assert torchrun.poll() is None, torchrun.communicate()
            time.sleep(0.05)
        assert cli.main(words) == 1
        (pid,) = re.findall(r"is in use by process (\d+) on", capsys.readouterr().err)
        assert int(pid) not in (torchrun.pid, os.getpid())
    finally:
        torchrun.kill()
    # they hold its pipes until they end
    _, told = torchrun.communicate(timeout=200)
    step = metrics.read()[-1]["step"]
    assert f"interrupted (torchrun is gone); written: {tmp_path}/checkpoints/step-{step:08d}.pt" in told
    assert [line["step"] for line in metrics.read()] == [*range(1, step + 1)]
    # the folder is free again: what stands against this is another setting
    assert cli.main(arguments(data, tmp_path)) == 1
    assert "--steps was 1000000, now 30" in capsys.readouterr().err
