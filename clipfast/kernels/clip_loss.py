"""The symmetric contrastive loss without the matrix of logits: one launch for the forward's statistics, cuBLAS and one
launch for each tile of the backward.

Deterministic: programs leave partial results in memory, which are reduced in one order; nothing is added atomically.
Not yet run on a GPU.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import library, loss_tiles
from clipfast.kernels.linear import tf32_allowed
from clipfast.kernels.loss_tiles import Softmaxes


@triton.jit
def _loss_statistics_kernel(
    image_ptr,
    text_ptr,
    scale_ptr,
    row_ptr,
    label_ptr,
    col_ptr,
    first_row,
    offset,
    n_images,
    n_texts,
    width,
    n_tiles,
    stride_image_row,
    stride_text_row,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block, part = tl.program_id(0), tl.program_id(1)
    rows = first_row + block * BLOCK_M + tl.arange(0, BLOCK_M)
    terms = tl.arange(0, BLOCK_K)
    scale = tl.load(scale_ptr)
    # past the end rows wrap around: finite, and left out of the columns' statistics
    image_ptrs = image_ptr + (rows % n_images).to(tl.int64)[:, None] * stride_image_row + terms[None, :]
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    labels = rows + offset
    start = part * n_tiles * BLOCK_N
    for first in range(start, min(start + n_tiles * BLOCK_N, n_texts), BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        text_ptrs = text_ptr + (cols % n_texts).to(tl.int64)[None, :] * stride_text_row + terms[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, width, BLOCK_K):
            image = tl.load(image_ptrs + k, mask=terms[None, :] < width - k, other=0.0)
            text = tl.load(text_ptrs + k, mask=terms[:, None] < width - k, other=0.0)
            acc = tl.dot(image, text, acc, input_precision=PRECISION)
        first_label = first_row + block * BLOCK_M + offset
        if (first_label < first + BLOCK_N) & (first < first_label + BLOCK_M):
            of_label = tl.sum(tl.where(labels[:, None] == cols[None, :], acc, 0.0), axis=1)
            here = (rows < n_images) & (labels >= first) & (labels < first + BLOCK_N)
            tl.store(label_ptr + rows, of_label, mask=here)
        logits = acc * scale

        inside = tl.where(cols[None, :] < n_texts, logits, float("-inf"))
        higher = tl.maximum(row_max, tl.max(inside, axis=1))
        row_sum = row_sum * tl.exp(row_max - higher) + tl.sum(tl.exp(inside - higher[:, None]), axis=1)
        row_max = higher

        inside = tl.where(rows[:, None] < n_images, logits, float("-inf"))
        col_max = tl.max(inside, axis=0)
        col_sum = tl.sum(tl.exp(inside - col_max[None, :]), axis=0)
        col_ptrs = col_ptr + block.to(tl.int64) * 2 * n_texts + cols
        tl.store(col_ptrs, col_max, mask=cols < n_texts)
        tl.store(col_ptrs + n_texts, col_sum, mask=cols < n_texts)
    row_ptrs = row_ptr + part.to(tl.int64) * 2 * n_images + rows
    tl.store(row_ptrs, row_max, mask=rows < n_images)
    tl.store(row_ptrs + n_images, row_sum, mask=rows < n_images)


def _merged(partial: Tensor) -> Tensor:
    """[parts, 2, n] maxima and sums of exponentials below them -> [2, n]."""
    highest = partial[:, 0].amax(0)
    return torch.stack([highest, (partial[:, 1] * (partial[:, 0] - highest).exp_()).sum(0)])


def statistics_fwd(images: Tensor, texts: Tensor, scale: Tensor, offset: int, tf32: bool) -> tuple[Tensor, Tensor]:
    """As `loss_tiles.statistics`.   images: [n, E].   texts: [N, E].   Both with last stride 1."""
    (n_images, width), n_texts = images.shape, len(texts)
    config = tuning.loss_statistics(n_images, n_texts, images.dtype, tuning.architecture(images.device))
    tile = config.tile
    n_parts = triton.cdiv(triton.cdiv(n_texts, tile.block_n), config.tiles)
    by_part = scale.new_empty(n_parts, 2, n_images)
    of_labels = scale.new_empty(n_images)
    cols = None
    for here in loss_tiles.spans(n_images, config.blocks * tile.block_m):
        n_blocks = triton.cdiv(here.stop - here.start, tile.block_m)
        by_block = scale.new_empty(n_blocks, 2, n_texts)
        _loss_statistics_kernel[(n_blocks, n_parts)](
            images,
            texts,
            scale,
            by_part,
            of_labels,
            by_block,
            here.start,
            offset,
            n_images,
            n_texts,
            width,
            config.tiles,
            images.stride(0),
            texts.stride(0),
            PRECISION="tf32" if tf32 else "ieee",
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        found = _merged(by_block)
        cols = found if cols is None else _merged(torch.stack([cols, found]))
    return torch.cat([_merged(by_part), of_labels[None]]), cols


@triton.jit
def _loss_gradients_kernel(
    product_ptr,
    scale_ptr,
    row_max_ptr,
    row_product_ptr,
    row_factor_ptr,
    col_max_ptr,
    col_product_ptr,
    col_factor_ptr,
    by_rows_ptr,
    by_cols_ptr,
    scale_row_ptr,
    scale_col_ptr,
    n_rows,
    n_cols,
    SEPARATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, part = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = part * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_cols = rows < n_rows, cols < n_cols
    inside = in_rows[:, None] & in_cols[None, :]
    # a tile of logits has far fewer than 2^31 elements
    at = rows[:, None] * n_cols + cols[None, :]
    products = tl.load(product_ptr + at, mask=inside, other=0.0)
    scale = tl.load(scale_ptr)
    logits = products * scale
    row_max = tl.load(row_max_ptr + rows, mask=in_rows, other=0.0)
    row_product = tl.load(row_product_ptr + rows, mask=in_rows, other=0.0)
    of_rows = tl.where(inside, tl.exp(logits - row_max[:, None]), 0.0)
    of_scale = tl.sum(of_rows * (products - row_product[:, None]), axis=1)
    tl.store(scale_row_ptr + part * n_rows + rows, of_scale, mask=in_rows)
    of_rows *= tl.load(row_factor_ptr + rows, mask=in_rows, other=0.0)[:, None]

    col_max = tl.load(col_max_ptr + cols, mask=in_cols, other=0.0)
    col_product = tl.load(col_product_ptr + cols, mask=in_cols, other=0.0)
    of_cols = tl.where(inside, tl.exp(logits - col_max[None, :]), 0.0)
    of_scale = tl.sum(of_cols * (products - col_product[None, :]), axis=0)
    tl.store(scale_col_ptr + block * n_cols + cols, of_scale, mask=in_cols)
    of_cols *= tl.load(col_factor_ptr + cols, mask=in_cols, other=0.0)[None, :]
    if SEPARATE:
        tl.store(by_cols_ptr + at, of_cols.to(by_cols_ptr.dtype.element_ty), mask=inside)
    else:
        of_rows += of_cols
    tl.store(by_rows_ptr + at, of_rows.to(by_rows_ptr.dtype.element_ty), mask=inside)


def gradients_bwd(
    products: Tensor, scale: Tensor, rows: Softmaxes, cols: Softmaxes, separate: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `loss_tiles._transform`.   products: [R, C] float32, contiguous; overwritten where dtype is float32."""
    n_rows, n_cols = products.shape
    config = tuning.loss_gradients(dtype, tuning.architecture(products.device))
    grid = (triton.cdiv(n_rows, config.block_m), triton.cdiv(n_cols, config.block_n))
    by_rows = products if dtype == products.dtype else torch.empty_like(products, dtype=dtype)
    by_cols = torch.empty_like(by_rows) if separate else by_rows
    of_scale_rows, of_scale_cols = scale.new_empty(grid[1], n_rows), scale.new_empty(grid[0], n_cols)
    _loss_gradients_kernel[grid](
        products,
        scale,
        *(rows.highest, rows.products, rows.factors()),
        *(cols.highest, cols.products, cols.factors()),
        by_rows,
        by_cols,
        of_scale_rows,
        of_scale_cols,
        n_rows,
        n_cols,
        SEPARATE=separate,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
    )
    return by_rows, by_cols, of_scale_rows.sum(0), of_scale_cols.sum(0)


_statistics = library.define(
    "clip_loss_statistics(Tensor images, Tensor texts, Tensor scale, int offset, bool tf32) -> (Tensor, Tensor)",
    statistics_fwd,
    lambda images, texts, scale, offset, tf32: loss_tiles.statistics_fake(images, texts, scale, offset),
)
_gradients = library.define(
    f"clip_loss_gradients{loss_tiles.GRADIENTS_SCHEMA}",
    loss_tiles.takes_lists(functools.partial(loss_tiles.gradients_by, gradients_bwd)),
    loss_tiles.gradients_fake,
)


def statistics(images: Tensor, texts: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """As `loss_tiles.statistics`."""
    images, texts = library.last_dim_contiguous(images), library.last_dim_contiguous(texts)
    return _statistics(images, texts, scale, offset, tf32_allowed(images))


gradients = _gradients
