"""A residual attention block on a CPU in one call (csrc/cpu_block.cpp).

Called one by one, its five operators cost 40 us each besides their work: for one image a twentieth of the time, for one
caption a sixth.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from clipfast.blocks import BlockWeights
from clipfast.kernels import kept
from clipfast.kernels.cpu_library import ACTIVATIONS, DTYPES, LAYOUTS, BlockArgs, form, pointer, run, threads
from clipfast.kernels.cpu_linear import laid_out, pack
from clipfast.packing import Rows

SIZE = ctypes.sizeof(BlockArgs)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A vector as the library reads it; most are so already."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def block(
    x: Tensor,
    rows: Rows,
    weights: BlockWeights,
    heads: int,
    causal: bool,
    activation: str,
    eps: tuple[float, float],
    instructions: str = "best",
) -> Tensor:
    """`clipfast.ops.block` without gradients; x and the matrices all float32 or all bfloat16.

    What `kept.keep` keeps of the matrices is packed once.
    instructions: "best", or "baseline", "avx2", "avx512", "avx512_bf16" to force one.
    Raises: RuntimeError if the library is missing or this CPU has not the instructions, TypeError if dtypes differ.
    """
    read: list[Tensor | None] = []  # which must live as long as the call
    layouts = []
    for name, tensor in zip(BlockWeights._fields, weights, strict=True):
        if tensor is None or tensor.ndim == 1:
            read.append(None if tensor is None else _as(tensor, torch.float32 if "norm" in name else x.dtype))
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"x is {x.dtype}, {name} {tensor.dtype}: they must have one dtype")
        packed = kept.layout(tensor, pack, instructions)
        matrix, layout = laid_out(tensor) if packed is None else (packed, "packed")
        read.append(matrix)
        layouts.append(LAYOUTS[layout])
    x, offsets = x.contiguous(), rows.derive("offsets", Rows.offsets, x.device)
    out = torch.empty_like(x)
    if not len(x):
        return out
    width = x.shape[1]
    args = BlockArgs(
        SIZE,
        x.data_ptr(),
        out.data_ptr(),
        offsets.data_ptr(),
        *map(pointer, read),
        len(rows.lengths),
        width,
        weights.fc1_weight.shape[0],
        *layouts,
        heads,
        DTYPES[x.dtype],
        causal,
        ACTIVATIONS[activation],
        threads(),
        form(instructions),
        (width // heads) ** -0.5,
        *eps,
    )
    run("block", args)
    return out
