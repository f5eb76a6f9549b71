"""Gradients of the patch embedding's weight, class token and positions, from pixels that are never unfolded.

The gradient of the images themselves is left to `clipfast.kernels.eager`. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import eager, gradients, library, patch_embed
from clipfast.kernels.linear import tf32_allowed


@triton.jit
def _patch_weight_bwd_kernel(
    grad_ptr,
    images_ptr,
    mean_ptr,
    std_ptr,
    parts_ptr,
    n_patches,
    n_cols,
    across,
    per_image,
    stride_image,
    stride_channel,
    stride_pixel_row,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    IS_UINT8: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
):
    """A tile of the weight's gradient [n_cols, CHANNELS * PATCH ** 2], summed over one part of all patches."""
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    terms = tl.program_id(1) * BLOCK_TERMS + tl.arange(0, BLOCK_TERMS)
    n_terms = CHANNELS * PATCH * PATCH
    channel, y, x = terms // (PATCH * PATCH), terms // PATCH % PATCH, terms % PATCH
    pixel = channel.to(tl.int64) * stride_channel + y.to(tl.int64) * stride_pixel_row + x
    if IS_UINT8:
        mean = tl.load(mean_ptr + channel, mask=terms < n_terms, other=0.0)[None, :]
        std = tl.load(std_ptr + channel, mask=terms < n_terms, other=1.0)[None, :]
    steps = tl.cdiv(tl.cdiv(n_patches, BLOCK_PATCHES), tl.num_programs(2))
    first = tl.program_id(2) * steps
    acc = tl.zeros((BLOCK_COLS, BLOCK_TERMS), dtype=tl.float32)
    for step in range(first, first + steps):
        patches = step * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
        image, patch = patches // per_image, patches % per_image
        # a class token before the patches of each image
        rows = (patches + image + 1).to(tl.int64)
        mask = (patches[None, :] < n_patches) & (cols[:, None] < n_cols)
        grad = tl.load(grad_ptr + rows[None, :] * n_cols + cols[:, None], mask=mask, other=0.0)
        corner = image.to(tl.int64) * stride_image
        corner += (patch // across).to(tl.int64) * PATCH * stride_pixel_row + patch % across * PATCH
        mask = (patches[:, None] < n_patches) & (terms[None, :] < n_terms)
        pixels = tl.load(images_ptr + corner[:, None] + pixel[None, :], mask=mask, other=0)
        if IS_UINT8:
            # as the forward kernel does, and rounded as there
            pixels = tl.where(mask, (pixels.to(tl.float32) / 255.0 - mean) / std, 0.0)
        acc = tl.dot(grad, pixels.to(grad.dtype), acc, input_precision=PRECISION)
    at = (tl.program_id(2).to(tl.int64) * n_cols + cols[:, None]) * n_terms + terms[None, :]
    tl.store(parts_ptr + at, acc, mask=(cols[:, None] < n_cols) & (terms[None, :] < n_terms))


def patch_weight_bwd(
    grad: Tensor, images: Tensor, mean: Tensor | None, std: Tensor | None, patch: int, tf32: bool
) -> Tensor:
    """grad: [B, 1 + G, W] contiguous.   images: [B, C, H, W'], last stride 1.

    mean, std: [C] float32 for uint8 images, else None.
    Returns: [W, C, patch, patch] float32 contiguous.
    """
    (batch, n_tokens, n_cols), (_, channels, _, image_width) = grad.shape, images.shape
    n_terms, n_patches = channels * patch * patch, batch * (n_tokens - 1)
    config = tuning.patch_weight_bwd(n_cols, n_terms, n_patches, grad.dtype, tuning.architecture(grad.device))
    parts = torch.empty((config.split, n_cols, n_terms), dtype=torch.float32, device=grad.device)
    grid = (triton.cdiv(n_cols, config.block_cols), triton.cdiv(n_terms, config.block_terms), config.split)
    _patch_weight_bwd_kernel[grid](
        grad,
        images,
        grad if mean is None else mean,
        grad if std is None else std,
        parts,
        n_patches,
        n_cols,
        max(1, image_width // patch),
        max(1, n_tokens - 1),
        *images.stride()[:3],
        CHANNELS=channels,
        PATCH=patch,
        IS_UINT8=images.dtype == torch.uint8,
        PRECISION="tf32" if tf32 else "ieee",
        BLOCK_COLS=config.block_cols,
        BLOCK_TERMS=config.block_terms,
        BLOCK_PATCHES=config.block_patches,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    # in a fixed order, always
    return parts.sum(0).view(n_cols, channels, patch, patch)


def _patch_weight_bwd_fake(
    grad: Tensor, images: Tensor, mean: Tensor | None, std: Tensor | None, patch: int, tf32: bool
) -> Tensor:
    return grad.new_empty((grad.shape[2], images.shape[1], patch, patch), dtype=torch.float32)


patch_weight_grad = library.define(
    "patch_weight_bwd(Tensor grad, Tensor images, Tensor? mean, Tensor? std, int patch, bool tf32) -> Tensor",
    patch_weight_bwd,
    _patch_weight_bwd_fake,
)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, mean: Any, std: Any, weight: Tensor, first: Tensor, position: Tensor
    ) -> Tensor:
        ctx.save_for_backward(images, mean, std, weight, first, position)
        return patch_embed.patch_embed(images, weight, first, position, mean, std, None, None, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, mean, std, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(weight: Tensor, first: Tensor, position: Tensor) -> Tensor:
                return eager.patch_embed(images, weight, first, position, mean, std, None, None, 0.0)

            again = gradients.differentiably(plain, ctx.needs_input_grad[3:], grad, *parameters)
            return None, None, None, *again
        weight, first, position = parameters
        grad = grad.contiguous()
        dweight = None
        if ctx.needs_input_grad[3]:
            pixels = patch_embed.pixels(images, weight, mean, std)
            dweight = patch_weight_grad(grad, *pixels, weight.shape[-1], tf32_allowed(weight)).to(weight.dtype)
        dposition = grad.sum(0, dtype=torch.float32)
        dfirst = grad[:, 0].sum(0, dtype=torch.float32)
        return None, None, None, dweight, dfirst.to(first.dtype), dposition.to(position.dtype)


def patch_tokens(
    images: Tensor, weight: Tensor, first: Tensor, position: Tensor, mean: Tensor | None, std: Tensor | None
) -> Tensor:
    """As `clipfast.ops.patch_embed` without a norm, for images that want no gradient."""
    (weight,) = gradients.autocast_to(weight, weight)
    return _PatchEmbed.apply(images, mean, std, weight, first, position)
