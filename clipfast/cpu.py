"""What this CPU lacks, in words for a user."""

from __future__ import annotations

import functools
import platform
import warnings

import torch

from clipfast import compat

__all__ = ["bfloat16_is_emulated", "warn_of_emulation"]


@functools.cache
def bfloat16_is_emulated() -> str | None:
    """Why bfloat16 is slow on this CPU and what to use instead; None if the CPU multiplies bfloat16 itself.

    PyTorch, oneDNN and libclipfast_cpu compute bfloat16 on every CPU. Without instructions for it each number is
    widened to float32 and each result rounded again.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        lacks = None if compat.onednn_has_bfloat16() else "instructions for bfloat16"
    elif not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        lacks = "AVX-512"
    else:
        # oneDNN says that AVX-512 alone will do: it emulates there
        native = compat.cpu_has_avx512_bf16() or compat.cpu_has_amx()
        lacks = None if native else "AVX512_BF16 and AMX"
    if lacks is None:
        return None
    return f"bfloat16 is emulated, since this CPU lacks {lacks}: float32 is faster beyond a few images or captions"


@functools.cache
def warn_of_emulation() -> None:
    """Warn, the first time in a process, if bfloat16 is emulated on this CPU."""
    if reason := bfloat16_is_emulated():
        # where the caller of `load` is
        warnings.warn(reason, stacklevel=3)
