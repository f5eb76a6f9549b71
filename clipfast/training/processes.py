"""The processes of one run, as torchrun starts them: who we are, and what we tell each other."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from clipfast.commands import CommandError, pick_device

__all__ = ["Processes", "processes"]

# the others wait this long while the first evaluates or writes
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """rank: ours, of `world`.   device: where this process computes.   launcher: id of the torchrun that started it."""

    device: torch.device
    rank: int = 0
    world: int = 1
    launcher: int | None = None

    @property
    def first(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """True once the launcher has ended and left this process behind, as it does when it is killed."""
        return self.launcher is not None and os.getppid() != self.launcher

    def mean(self, values: Tensor) -> Tensor:
        """Of every process's tensor."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values / self.world

    def everyones(self, value: Any) -> list[Any]:
        """value of each process, by rank; it must be picklable."""
        values = [value] * self.world
        if self.world > 1:
            distributed.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """value of process 0."""
        values = [value]
        if self.world > 1:
            distributed.broadcast_object_list(values, device=self.device)
        return values[0]


@contextlib.contextmanager
def processes(device: str | None) -> Iterator[Processes]:
    """The group that torchrun's environment describes, or this process alone.

    What computes with the group must be out of scope when the block ends.
    device: default: GPU LOCAL_RANK if there are GPUs, else the CPU.
    Raises: CommandError if the device is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = os.getppid() if distributed.is_torchelastic_launched() else None
    if world == 1:
        yield Processes(pick_device(device), launcher=launcher)
        return
    if device is not None and ":" in device:
        raise CommandError(f"device {device!r} is one, but torchrun started {world} processes: give cpu or cuda")
    local = os.environ["LOCAL_RANK"]
    on = pick_device(f"cuda:{local}" if device != "cpu" and torch.cuda.is_available() else device)
    if on.type == "cuda":
        torch.cuda.set_device(on)
    # its functions take the group there is when they are defined as a default: defined later, as by the wrapper, they
    # keep its threads past its end, and an interpreter that leaves under them aborts now and then (torch 2.13)
    importlib.import_module("torch.distributed.nn")
    distributed.init_process_group("nccl" if on.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(on, distributed.get_rank(), world, launcher)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # DistributedDataParallel must be gone before the group: the last of the two to go joins the group's threads,
        # with the interpreter's lock in hand if it is the wrapper, while they wait for it (seen with torch 2.13, gloo)
        gc.collect()
        distributed.destroy_process_group()
