"""Checkpoints of a run: everything that the next step depends on, whole on the disk or not there."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfast.checkpoints import CheckpointError
from clipfast.checkpoints.archive import read_file
from clipfast.commands import CommandError
from clipfast.files import size_of, write_atomically

__all__ = ["checkpoint_path", "latest_checkpoint", "rng_state", "save_checkpoint", "set_rng_state"]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def save_checkpoint(path: Path, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, and then remove all but the newest `keep` of its folder.

    path:  from `checkpoint_path`.
    state: tensors, numbers, strings, and dicts, lists and tuples of them.
    """
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda file: torch.save(state, file), size_of(state))
    for old in _found(path.parent)[:-keep]:
        old.unlink()


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """The newest checkpoint that is whole, on the CPU, or (None, None) if there are none.

    A damaged one (torch.save writes a CRC-32 of every tensor; all are compared) is named on stderr, renamed to
    *.damaged and passed over. Nothing in the file is run.
    Raises: CommandError if there are checkpoints and all are damaged.
    """
    # of a process that was killed while it wrote
    for temporary in folder.glob(".step-*.tmp"):
        temporary.unlink()
    found = _found(folder)
    for path in reversed(found):
        try:
            return path, read_file(path).values
        except CheckpointError as error:
            what = str(error).partition("; ")[0]
            print(f"clipfast: {what}; going back to the checkpoint before", file=sys.stderr)
            path.rename(path.with_name(path.name + ".damaged"))
    if found:
        raise CommandError(f"every checkpoint in {folder} is damaged; remove {folder.parent} to start again")
    return None, None


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def rng_state(device: torch.device) -> dict[str, Any]:
    """The generators of Python, NumPy and torch, and the GPU's."""
    # ours draw from generators of their own, but a user's transform may draw from NumPy's global one
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": {
            **numpy,
            "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))},
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """What `rng_state` gave."""
    random.setstate(state["python"])
    key = state["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
