"""Residual attention blocks on a CPU in one call (csrc/cpu_blocks.cpp).

Between two calls Python takes some 180 us for a block, since its own memory has left the cache while the weights went
through it: for one image of ViT-B/32 4 % of the time, for one caption 10 % (AMD EPYC, Zen 4, two threads, 2026-11-30).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast.blocks import Block, BlockWeights, Projection, Stack
from clipfast.kernels import kept
from clipfast.kernels.cpu_library import (
    ACTIVATIONS,
    DTYPES,
    LAYOUTS,
    BlockArgs,
    BlocksArgs,
    form,
    pointer,
    readable,
    run,
    threads,
)
from clipfast.kernels.cpu_linear import laid_out, pack
from clipfast.packing import Rows

SIZE, SIZE_OF_ALL = ctypes.sizeof(BlockArgs), ctypes.sizeof(BlocksArgs)
IS_NORM = ["norm" in name for name in BlockWeights._fields]


def _matrix(name: str, tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, str]:
    """A weight [N, K] as the library reads it, and its name in LAYOUTS."""
    if tensor.dtype != dtype:
        raise TypeError(f"x is {dtype}, {name} {tensor.dtype}: they must have one dtype")
    return laid_out(tensor.resolve_neg() if tensor.is_neg() else tensor)


def _read(
    stack: Stack, dtype: torch.dtype, instructions: str, pooled: bool
) -> tuple[ctypes.Array[BlockArgs], kept.Seen, list[Tensor], list[Tensor]]:
    """The stack's blocks for the library, the weights that are kept packed, their layouts, and copies of other tensors.

    Layouts and copies must live until the library has returned.
    pooled: with an index, so that the last block reads its joint projection as it lies in memory.
    """
    args = (BlockArgs * len(stack))()
    weights: list[Tensor] = []
    layouts: list[Tensor] = []
    copies: list[Tensor] = []

    def matrix(name: str, tensor: Tensor, as_rows: bool) -> tuple[Tensor, str]:
        if as_rows:
            return _matrix(name, tensor.contiguous(), dtype)
        packed = kept.layout(tensor, pack, instructions) if tensor.dtype == dtype else None
        if packed is None:
            return _matrix(name, tensor, dtype)
        weights.append(tensor)
        layouts.append(packed)
        return packed, "packed"

    for number, block in enumerate(stack):
        pointers: list[int | None] = []
        codes = []
        for name, is_norm, tensor in zip(BlockWeights._fields, IS_NORM, block.weights, strict=True):
            if tensor is None:
                pointers.append(None)
                continue
            layout = None
            if tensor.ndim == 1:
                read = readable(tensor, torch.float32 if is_norm else dtype)
            else:
                as_rows = pooled and number + 1 == len(stack) and name == "qkv_weight"
                read, layout = matrix(name, tensor, as_rows)
                codes.append(LAYOUTS[layout])
            if layout != "packed" and read.data_ptr() != tensor.data_ptr():
                copies.append(read)
            pointers.append(read.data_ptr())
        args[number] = BlockArgs(
            SIZE,
            *pointers,
            block.weights.fc1_weight.shape[0],
            *codes,
            block.heads,
            ACTIVATIONS[block.activation],
            (block.weights.norm_1_weight.shape[0] // block.heads) ** -0.5,
            *block.eps,
        )
    return args, kept.Seen(weights, layouts), layouts, copies


def _read_or_found(
    stack: Stack, dtype: torch.dtype, instructions: str, pooled: bool
) -> tuple[ctypes.Array[BlockArgs], list[Tensor]]:
    """The stack's blocks for the library, and what must live until it has returned.

    What was read is read again after a tensor or a layout became another one. Copies are of what tensors hold, and so
    made in each call.
    """
    how, found = ("cpu", dtype, instructions, pooled), stack.found
    last = found.get(how)
    if last is not None and (layouts := last[1].still()) is not None:
        return last[0], layouts
    args, seen, layouts, copies = _read(stack, dtype, instructions, pooled)
    if not copies:
        found[how] = args, seen
    return args, layouts + copies


def blocks(
    x: Tensor,
    rows: Rows,
    blocks: Sequence[Block],
    causal: bool,
    index: Tensor | None = None,
    projection: Projection | None = None,
    instructions: str = "best",
) -> Tensor:
    """`clipfast.ops.blocks` without gradients; x and the matrices all float32 or all bfloat16.

    blocks: a `Stack` has just looked at its tensors, as `ops.blocks` lets it.
    What `kept.keep` keeps of the matrices is packed once.
    instructions: "best", or "baseline", "avx2", "avx512", "avx512_bf16" to force one.
    Raises: RuntimeError if the library is missing or this CPU has not the instructions, TypeError if dtypes differ.
    """
    x, width = x.resolve_neg().contiguous(), x.shape[1]
    if not len(blocks):
        return x.clone()
    stack, sequences = Stack.of(blocks), len(rows.lengths)
    args, alive = _read_or_found(stack, x.dtype, instructions, index is not None)
    columns = width if projection is None else projection.weight.shape[1]
    out = x.new_empty(len(x) if index is None else sequences, columns)
    if not out.numel():
        return out
    between = x.new_empty(x.shape) if index is not None and len(stack) > 1 else None
    index = None if index is None else index.contiguous()
    offsets = rows.derive("offsets", Rows.offsets, x.device)
    norm_weight = norm_bias = weight = None
    layout, eps = "rows", 0.0
    if projection is not None:
        norm_weight, norm_bias = (
            readable(projection.norm_weight, torch.float32),
            readable(projection.norm_bias, torch.float32),
        )
        weight, layout = _matrix("projection", projection.weight.t(), x.dtype)
        eps = projection.eps
    run(
        "blocks",
        BlocksArgs(
            SIZE_OF_ALL,
            ctypes.addressof(args),
            *map(pointer, (x, between, out, offsets, index, norm_weight, norm_bias, weight)),
            len(stack),
            sequences,
            width,
            columns,
            LAYOUTS[layout],
            DTYPES[x.dtype],
            causal,
            threads(),
            form(instructions),
            eps,
        ),
    )
    del alive  # the library has returned
    return out
