"""Patches of images embedded on a CPU in C++ (csrc/cpu_patch_embed.cpp): pixels to normalised tokens in one call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from clipfast.kernels.cpu_library import DTYPES, PatchEmbedArgs, form, pointer, readable, run, threads

SIZE = ctypes.sizeof(PatchEmbedArgs)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    instructions: str = "best",
) -> Tensor:
    """`clipfast.ops.patch_embed` without gradients; the weight float32 or bfloat16, and the result with it.

    instructions: "best", or "baseline", "avx2", "avx512", "avx512_bf16" to force one.
    Raises: RuntimeError if the library is missing or this CPU has not the instructions.
    """
    dtype, patch, features = weight.dtype, weight.shape[-1], len(weight)
    batch, channels, height, width = images.shape
    of_bytes = images.dtype == torch.uint8
    images = readable(images, torch.uint8 if of_bytes else dtype)
    tensors = [readable(tensor, dtype) for tensor in (weight, class_embedding, positional_embedding)]
    moments = [readable(tensor.to(images.device), torch.float64) if of_bytes else None for tensor in (mean, std)]
    norm = [None if tensor is None else readable(tensor, torch.float32) for tensor in (norm_weight, norm_bias)]
    out = images.new_empty(batch, len(positional_embedding), features, dtype=dtype)
    sizes = (batch, channels, height, width, patch, features)
    pointers = map(pointer, (images, *tensors, *moments, *norm, out))
    run("patch_embed", PatchEmbedArgs(SIZE, *pointers, *sizes, DTYPES[dtype], threads(), form(instructions), eps))
    return out
