"""LayerNorm over the last dimension, with an optional residual added first: one read of each row, one write.

Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import library


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    n_rows,
    stride_x_row,
    stride_residual_row,
    eps,
    N_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    # int64 before the multiplication: rows x stride passes 2^31
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    in_row = cols < N_COLS
    inside = (rows < n_rows) & in_row
    x = tl.load(x_ptr + rows * stride_x_row + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + rows * stride_residual_row + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(sum_ptr + rows * N_COLS + cols, x.to(sum_ptr.dtype.element_ty), mask=inside)
    # two passes over the registers: E[x^2] - E[x]^2 cancels when |mean| >> std
    mean = tl.sum(x, axis=1, keep_dims=True) / N_COLS
    centred = tl.where(in_row, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / N_COLS
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    y = centred * (1.0 / tl.sqrt(variance + eps)) * weight + bias
    tl.store(y_ptr + rows * N_COLS + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm(x + residual) and the sum itself (empty without a residual).

    x, residual: [rows, W], one dtype, last stride 1.   weight, bias: [W] contiguous.
    Returns: ([rows, W], [rows, W] or [0]), contiguous, dtype of x.
    """
    n_rows, n_cols = x.shape
    y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    total = torch.empty_like(y) if residual is not None else x.new_empty(0)
    config = tuning.layer_norm(n_cols, x.dtype)
    if n_rows:
        _layer_norm_fwd_kernel[(triton.cdiv(n_rows, config.block_rows),)](
            x,
            x if residual is None else residual,
            weight,
            bias,
            y,
            total,
            n_rows,
            x.stride(0),
            x.stride(0) if residual is None else residual.stride(0),
            eps,
            N_COLS=n_cols,
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLS=triton.next_power_of_2(n_cols),
            HAS_RESIDUAL=residual is not None,
            num_warps=config.warps,
        )
    return y, total


def _layer_norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else 0)


_layer_norm = library.define(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    layer_norm_fwd,
    _layer_norm_fake,
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `clipfast.ops.layer_norm`: LayerNorm(x), or (LayerNorm(x + residual), x + residual)."""
    added = None if residual is None else library.as_rows(residual)
    y, total = _layer_norm(library.as_rows(x), added, weight.contiguous(), bias.contiguous(), eps)
    return y.view(x.shape) if residual is None else (y.view(x.shape), total.view(x.shape))
