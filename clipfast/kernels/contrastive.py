"""exp(scale) times the cosine of every image with every text, without writing normalised features: one launch.

Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import library
from clipfast.kernels.linear import tf32_allowed


@triton.jit
def _logits_fwd_kernel(
    image_ptr,
    text_ptr,
    log_scale_ptr,
    logits_ptr,
    n_images,
    n_texts,
    width,
    stride_image_row,
    stride_text_row,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    terms = tl.arange(0, BLOCK_K)
    # past the end rows wrap around; they are dropped at the store
    image_ptrs = image_ptr + (rows % n_images).to(tl.int64)[:, None] * stride_image_row + terms[None, :]
    text_ptrs = text_ptr + (cols % n_texts).to(tl.int64)[None, :] * stride_text_row + terms[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    image_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    text_square = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        image = tl.load(image_ptrs + k, mask=terms[None, :] < width - k, other=0.0)
        text = tl.load(text_ptrs + k, mask=terms[:, None] < width - k, other=0.0)
        acc = tl.dot(image, text, acc, input_precision=PRECISION)
        # each program passes over the whole of its features anyway, so their norms cost no further read
        wide_image, wide_text = image.to(tl.float32), text.to(tl.float32)
        image_square += tl.sum(wide_image * wide_image, axis=1)
        text_square += tl.sum(wide_text * wide_text, axis=0)
    scale = tl.exp(tl.load(log_scale_ptr).to(tl.float32))
    # a row of zeros gives NaN, as the division by its norm does
    logits = acc / tl.sqrt(image_square)[:, None] / tl.sqrt(text_square)[None, :] * scale
    inside = (rows[:, None] < n_images) & (cols[None, :] < n_texts)
    logits_ptrs = logits_ptr + rows.to(tl.int64)[:, None] * n_texts + cols[None, :]
    tl.store(logits_ptrs, logits.to(logits_ptr.dtype.element_ty), mask=inside)


def logits_fwd(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, tf32: bool) -> Tensor:
    """image_features: [I, E].   text_features: [T, E].   Both with last stride 1.   logit_scale: scalar.

    Returns: [I, T], dtype of image_features.
    """
    (n_images, width), n_texts = image_features.shape, len(text_features)
    logits = torch.empty((n_images, n_texts), dtype=image_features.dtype, device=image_features.device)
    if logits.numel():
        config = tuning.logits(n_images, n_texts, image_features.dtype, tuning.architecture(image_features.device))
        grid = (triton.cdiv(n_images, config.block_m), triton.cdiv(n_texts, config.block_n))
        _logits_fwd_kernel[grid](
            image_features,
            text_features,
            logit_scale,
            logits,
            n_images,
            n_texts,
            width,
            image_features.stride(0),
            text_features.stride(0),
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return logits


def _logits_fake(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, tf32: bool) -> Tensor:
    return image_features.new_empty((image_features.shape[0], text_features.shape[0]))


_logits = library.define(
    "logits(Tensor image_features, Tensor text_features, Tensor logit_scale, bool tf32) -> Tensor",
    logits_fwd,
    _logits_fake,
)


def logits(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """As `clipfast.ops.logits`."""
    per_image = _logits(
        library.last_dim_contiguous(image_features),
        library.last_dim_contiguous(text_features),
        logit_scale,
        tf32_allowed(image_features),
    )
    return per_image, per_image.t()
