"""Registration of kernels with torch.library, and what every Triton launcher needs to know of its machine.

An operator registered here is seen whole by torch.compile, torch.export and the profiler: its schema, a fake kernel
that gives shapes without running, and one implementation for CUDA tensors and, for Triton's interpreter and the native
library's host twin, CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("clipfast", "FRAGMENT")
# What came with PyTorch 2.6. Its kernels are compiled and interpreted in the tests; none older was tried.
OLDEST_TRITON = (3, 2)


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    devices: tuple[str, ...] = ("CUDA", "CPU"),
) -> Callable[..., Any]:
    """Registers `clipfast::<schema>` and returns the operator.

    implementation: gets the arguments of the schema, the first of them a tensor whose device becomes the current one.
    fake: the same arguments on meta or fake tensors; returns tensors of the right shape, dtype and strides.
    """
    name = schema.partition("(")[0]

    @functools.wraps(implementation)
    def on_its_device(x: Tensor, *arguments: Any) -> Any:
        # Triton and the CUDA library launch on the current device, whatever the tensors say
        if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return implementation(x, *arguments)
        return implementation(x, *arguments)

    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in devices:
        LIBRARY.impl(name, on_its_device, key)
    torch.library.register_fake(f"clipfast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.clipfast, name).default


def interpreted() -> bool:
    """True if Triton runs its kernels as Python on the CPU (TRITON_INTERPRET=1, read as Triton reads it)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be used, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):  # other builds have other names
        version = metadata.version("triton")
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
            return f"triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


def last_dim_contiguous(x: Tensor) -> Tensor:
    """x itself where neighbours in the last dimension are neighbours in memory, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """[..., W] as [rows, W] with neighbours in a row adjacent in memory; a view where the strides allow one."""
    return last_dim_contiguous(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))


if triton_missing() is None and interpreted():
    from clipfast.kernels import interpreter

    interpreter.install()
