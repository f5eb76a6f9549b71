"""Patch embedding as one product over pixels that are never unfolded: the loads follow the patches.

For machines without the CUDA library (`clipfast.kernels.native`), which fuses ln_pre too. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import layer_norm, library
from clipfast.kernels.linear import tf32_allowed


@triton.jit
def _patch_embed_fwd_kernel(
    images_ptr,
    weight_ptr,
    class_ptr,
    position_ptr,
    mean_ptr,
    std_ptr,
    tokens_ptr,
    n_rows,
    n_cols,
    across,
    n_tokens,
    stride_image,
    stride_channel,
    stride_pixel_row,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    IS_UINT8: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """One row per token, class tokens too: theirs takes no pixels, and costs 1 row in 50 to 577.

    The sum runs over channels and groups of BLOCK_ROWS pixel rows of a patch; BLOCK_PIXELS is PATCH rounded up to a
    power of two, so that a step never crosses from one pixel row into the next.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = rows % n_tokens
    patch = tl.maximum(token - 1, 0)
    is_patch = (token > 0) & (rows < n_rows)
    corner = (rows // n_tokens).to(tl.int64) * stride_image
    corner += (patch // across).to(tl.int64) * PATCH * stride_pixel_row + patch % across * PATCH
    term = tl.arange(0, BLOCK_ROWS * BLOCK_PIXELS)
    down, right = term // BLOCK_PIXELS, term % BLOCK_PIXELS
    weight_ptrs = weight_ptr + (cols % n_cols).to(tl.int64)[None, :] * (CHANNELS * PATCH * PATCH)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(CHANNELS * tl.cdiv(PATCH, BLOCK_ROWS)):
        channel = step // tl.cdiv(PATCH, BLOCK_ROWS)
        y = step % tl.cdiv(PATCH, BLOCK_ROWS) * BLOCK_ROWS + down
        inside = (y < PATCH) & (right < PATCH)
        offsets = channel.to(tl.int64) * stride_channel + y.to(tl.int64) * stride_pixel_row + right
        mask = is_patch[:, None] & inside[None, :]
        pixels = tl.load(images_ptr + corner[:, None] + offsets[None, :], mask=mask, other=0)
        if IS_UINT8:
            # in float32 and rounded once, as preprocessing does; a folded weight would be rounded a second time
            mean, std = tl.load(mean_ptr + channel), tl.load(std_ptr + channel)
            pixels = tl.where(mask, (pixels.to(tl.float32) / 255.0 - mean) / std, 0.0)
        at = (channel * PATCH + y) * PATCH + right
        weight = tl.load(weight_ptrs + at[:, None], mask=inside[:, None], other=0.0)
        acc = tl.dot(pixels.to(weight.dtype), weight, acc, input_precision=PRECISION)
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    first = tl.load(class_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
    position = tl.load(position_ptr + token[:, None] * n_cols + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    tokens = tl.where(token[:, None] == 0, first, acc) + position
    tokens_ptrs = tokens_ptr + rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    tl.store(tokens_ptrs, tokens.to(tokens_ptr.dtype.element_ty), mask=inside)


def patch_embed_fwd(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    tf32: bool,
) -> Tensor:
    """images: [B, C, H, W], last stride 1.

    weight: [W, C, P, P].   class_embedding: [W].   positional_embedding: [1 + G, W].   mean, std: [C] float32 for uint8
            images, else None.   All contiguous.

    Returns: [B, 1 + G, W] contiguous, dtype of weight.
    """
    (batch, channels, _, image_width), (n_cols, _, patch, _) = images.shape, weight.shape
    n_tokens = len(positional_embedding)
    tokens = torch.empty((batch, n_tokens, n_cols), dtype=weight.dtype, device=weight.device)
    if not tokens.numel():
        return tokens
    n_rows = batch * n_tokens
    config = tuning.patch_embed(n_rows, n_cols, patch, weight.dtype, tuning.architecture(weight.device))
    pixels = triton.next_power_of_2(patch)
    _patch_embed_fwd_kernel[(triton.cdiv(n_rows, config.block_m), triton.cdiv(n_cols, config.block_n))](
        images,
        weight,
        class_embedding,
        positional_embedding,
        weight if mean is None else mean,
        weight if std is None else std,
        tokens,
        n_rows,
        n_cols,
        max(1, image_width // patch),
        n_tokens,
        *images.stride()[:3],
        CHANNELS=channels,
        PATCH=patch,
        IS_UINT8=images.dtype == torch.uint8,
        PRECISION="tf32" if tf32 else "ieee",
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_ROWS=max(1, config.block_k // pixels),
        BLOCK_PIXELS=pixels,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return tokens


def _patch_embed_fake(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    tf32: bool,
) -> Tensor:
    return weight.new_empty((images.shape[0], *positional_embedding.shape))


_patch_embed = library.define(
    "patch_embed(Tensor images, Tensor weight, Tensor class_embedding, Tensor positional_embedding, Tensor? mean, "
    "Tensor? std, bool tf32) -> Tensor",
    patch_embed_fwd,
    _patch_embed_fake,
)


def pixels(
    images: Tensor, weight: Tensor, mean: Tensor | None, std: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Images, mean and std as the kernels want them: uint8 with both in float32, or the weight's dtype with neither."""
    if images.dtype == torch.uint8 and mean is not None and std is not None:
        mean, std = (x.to(images.device, torch.float32, non_blocking=True).contiguous() for x in (mean, std))
    else:
        images, mean, std = images.to(weight.dtype), None, None
    return library.last_dim_contiguous(images), mean, std


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
) -> Tensor:
    """As `clipfast.ops.patch_embed`."""
    images, mean, std = pixels(images, weight, mean, std)
    tokens = _patch_embed(
        images,
        weight.contiguous(),
        class_embedding.contiguous(),
        positional_embedding.contiguous(),
        mean,
        std,
        tf32_allowed(weight),
    )
    return tokens if norm_weight is None else layer_norm.layer_norm(tokens, norm_weight, norm_bias, eps)
