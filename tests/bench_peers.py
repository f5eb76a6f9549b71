"""Peers for tests of processes: each leaves its process id in a folder, and then does what its name says."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import ceilings, peers
from clipfast.bench.peers import Batch, Calls, Peer, Prepare, Spec, ours
from clipfast.cli import main

from .bench_models import TINY

RATES = {"float32": 1e11, "bfloat16": 2e11}
CEILINGS = ceilings.Ceilings({ceilings.COPY: 1e10, **RATES}, dict.fromkeys(RATES, ceilings.PEAK), RATES)


def state(pid: int) -> str:
    """Of a process, as Linux has it: R, S, T (stopped) ...; empty if there is none, or it has ended."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if found in "ZX" else found


def pids(folder: Path) -> dict[str, int]:
    """Of every peer that was built."""
    return {path.stem: int(path.read_text()) for path in folder.glob("*.pid")}


def _watches(folder: Path, name: str, right: Callable[[], Tensor]) -> Tensor:
    print("where answers go")
    os.write(1, b"and here")
    states = [state(pid) for other, pid in pids(folder).items() if other != name]
    with (folder / f"{name}.seen").open("a") as file:
        file.write(f"{os.getpid()} {torch.get_num_threads()} {''.join(states)}\n")
    return right()


def _waits(folder: Path, name: str, right: Callable[[], Tensor]) -> Tensor:
    (folder / f"{name}.began").touch()
    time.sleep(600)
    return right()


def _dies(number: int, folder: Path, name: str, right: Callable[[], Tensor]) -> Tensor:
    os.kill(os.getpid(), number)
    return right()


def _exits(folder: Path, name: str, right: Callable[[], Tensor]) -> Tensor:
    print("no more room in /some/where/private", file=sys.stderr, flush=True)
    os._exit(3)


ACTS = {
    "watches": _watches,
    "watches too": _watches,
    "waits": _waits,
    "wrong": lambda folder, name, right: right().roll(1, 0),
    "killed": functools.partial(_dies, signal.SIGKILL),
    "faults": functools.partial(_dies, signal.SIGSEGV),
    "exits": _exits,
}


def build(name: str, folder: Path, spec: Spec) -> Prepare:
    (folder / f"{name}.pid").write_text(str(os.getpid()))
    prepare = ours.build(spec)

    def made(tower: str, batch: Batch) -> Calls:
        (right,) = prepare(tower, batch).values()
        return {name: functools.partial(ACTS[name], folder, name, right)}

    return made


def _unbuilt(spec: Spec) -> Prepare:
    raise peers.Missing("unbuilt is not installed")


def those(folder: Path, *names: str) -> dict[str, Peer]:
    found = []
    for name in names:
        builds = _unbuilt if name == "unbuilt" else functools.partial(build, name, folder)
        found.append(Peer(name, "nobody", builds))
    return {peer.name: peer for peer in found}


def bench(folder: Path, *more: str) -> int:
    """`clipfast bench` of a tiny model, one tower, one size."""
    fixed = ["--models", "tiny", "--batch", "4", "--dtypes", "float32", "--rounds", "3", "--threads", "1", "--no-plots"]
    fixed += ["--towers", "image", "--no-start", "--minutes", "0", "--device", "cpu", "--out", str(folder)]
    return main(["bench", *fixed, "--name", "it", *more])


def alone(folder: str, *names: str) -> int:
    """In a process of its own: `bench` with these."""
    ARCHITECTURES["tiny"] = TINY
    ceilings.measure = lambda device, dtypes, quick: CEILINGS
    found = those(Path(folder), *names)
    peers.known = lambda: found
    return bench(Path(folder))
