"""Residual attention blocks on a CPU in one call (csrc/cpu_blocks.cpp).

Between two calls Python takes some 180 us for a block, since its own memory has left the cache while the weights went
through it: for one image of ViT-B/32 4 % of the time, for one caption 10 % (AMD EPYC, Zen 4, two threads, 2026-11-30).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast.blocks import Block, BlockWeights
from clipfast.kernels import kept
from clipfast.kernels.cpu_library import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    BlockArgs,
    BlocksArgs,
    form,
    pointer,
    run,
    threads,
)
from clipfast.kernels.cpu_linear import laid_out, pack
from clipfast.packing import Rows

SIZE, SIZE_OF_ALL = ctypes.sizeof(BlockArgs), ctypes.sizeof(BlocksArgs)
IS_NORM = ["norm" in name for name in BlockWeights._fields]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A vector as the library reads it; most are so already."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def _read(
    weights: BlockWeights, dtype: torch.dtype, instructions: str, pooled: bool
) -> tuple[list[Tensor | None], list[int]]:
    """A block's tensors as the library reads them, and how the matrices lie in memory.

    pooled: it is the last one of a call with an index, which reads the joint projection as it is.
    """
    read: list[Tensor | None] = []
    layouts = []
    for name, is_norm, tensor in zip(BlockWeights._fields, IS_NORM, weights, strict=True):
        if tensor is None:
            read.append(None)
            continue
        if tensor.is_neg():  # PyTorch resolves it before an operator that it knows
            tensor = tensor.resolve_neg()
        if tensor.ndim == 1:
            read.append(_as(tensor, torch.float32 if is_norm else dtype))
        elif tensor.dtype != dtype:
            raise TypeError(f"x is {dtype}, {name} {tensor.dtype}: they must have one dtype")
        else:
            if pooled and name == "qkv_weight":
                matrix, layout = tensor.contiguous(), "rows"
            elif (packed := kept.layout(tensor, pack, instructions)) is not None:
                matrix, layout = packed, "packed"
            else:
                matrix, layout = laid_out(tensor)
            read.append(matrix)
            layouts.append(LAYOUTS[layout])
    return read, layouts


def blocks(
    x: Tensor,
    rows: Rows,
    blocks: Sequence[Block],
    causal: bool,
    index: Tensor | None = None,
    instructions: str = "best",
) -> Tensor:
    """`clipfast.ops.blocks` without gradients; x and the matrices all float32 or all bfloat16.

    What `kept.keep` keeps of the matrices is packed once.
    instructions: "best", or "baseline", "avx2", "avx512", "avx512_bf16" to force one.
    Raises: RuntimeError if the library is missing or this CPU has not the instructions, TypeError if dtypes differ.
    """
    x, offsets = x.resolve_neg().contiguous(), rows.derive("offsets", Rows.offsets, x.device)
    if not len(blocks) or not len(x):
        return x.clone()
    # each block writes where the next one reads, and the one after that again where it read
    outs = [torch.empty_like(x) for _ in range(min(2, len(blocks) - (index is not None)))]
    index = None if index is None else index.contiguous()
    width, dtype, of_threads, code = x.shape[1], DTYPES[x.dtype], threads(), form(instructions)
    alive, args, source = [], (BlockArgs * len(blocks))(), x
    for number, block in enumerate(blocks):
        pooled = index is not None and number + 1 == len(blocks)
        read, layouts = _read(block.weights, x.dtype, instructions, pooled)
        alive.append(read)  # until the call has returned
        target = x.new_empty(len(rows.lengths), width) if pooled else outs[number % 2]
        args[number] = BlockArgs(
            SIZE,
            source.data_ptr(),
            target.data_ptr(),
            offsets.data_ptr(),
            *[None if tensor is None else tensor.data_ptr() for tensor in read],
            len(rows.lengths),
            width,
            block.weights.fc1_weight.shape[0],
            *layouts,
            block.heads,
            dtype,
            causal,
            ACTIVATIONS[block.activation],
            of_threads,
            code,
            (width // block.heads) ** -0.5,
            *block.eps,
        )
        source = target
    run("blocks", BlocksArgs(SIZE_OF_ALL, ctypes.addressof(args), len(blocks), pointer(index)))
    return source
