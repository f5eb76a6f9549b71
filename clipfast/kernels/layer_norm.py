"""LayerNorm over the last dimension, with an optional residual added first: one read of each row, one write."""

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
    mean_ptr,
    rstd_ptr,
    n_rows,
    stride_x_row,
    stride_residual_row,
    eps,
    N_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SAVE_STATISTICS: tl.constexpr,
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
    rstd = 1.0 / tl.sqrt(variance + eps)
    if SAVE_STATISTICS:
        tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
        tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + rows * N_COLS + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_bwd_kernel(
    grad_ptr,
    x_ptr,
    added_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    n_rows,
    stride_grad_row,
    stride_x_row,
    stride_added_row,
    N_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
):
    """A program sums the gradients of weight and bias over all of its rows; who has which rows never changes."""
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    in_row = cols < N_COLS
    weight = tl.load(weight_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
        inside = (rows < n_rows) & in_row
        x = tl.load(x_ptr + rows * stride_x_row + cols, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows * stride_grad_row + cols, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        # whatever it is past the end of a row, its gradient there is zero
        normalised = (x - mean) * rstd
        dweight += grad * normalised
        dbias += grad
        grad *= weight
        along_x = tl.sum(grad * normalised, axis=1, keep_dims=True) / N_COLS
        along_one = tl.sum(grad, axis=1, keep_dims=True) / N_COLS
        dx = (grad - along_one - normalised * along_x) * rstd
        if HAS_ADDED:
            dx += tl.load(added_ptr + rows * stride_added_row + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows * N_COLS + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    parts = tl.program_id(0) * N_COLS + cols
    tl.store(dweight_ptr + parts, tl.sum(dweight, axis=0, keep_dims=True), mask=in_row)
    tl.store(dbias_ptr + parts, tl.sum(dbias, axis=0, keep_dims=True), mask=in_row)


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
    _launch(x, residual, weight, bias, y, total, None, eps)
    return y, total


def layer_norm_train_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(x) and what `layer_norm_bwd` reads.

    x: [rows, W], last stride 1.   weight, bias: [W] contiguous.
    Returns: [rows, W] contiguous, dtype of x; mean [rows] and 1 / standard deviation [rows], float32.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    _launch(x, None, weight, bias, y, y, (mean, rstd), eps)
    return y, mean, rstd


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    total: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    eps: float,
) -> None:
    n_rows, n_cols = x.shape
    config = tuning.layer_norm(n_cols, x.dtype)
    if n_rows:
        _layer_norm_fwd_kernel[(triton.cdiv(n_rows, config.block_rows),)](
            x,
            x if residual is None else residual,
            weight,
            bias,
            y,
            total,
            *(statistics or (y, y)),
            n_rows,
            x.stride(0),
            x.stride(0) if residual is None else residual.stride(0),
            eps,
            N_COLS=n_cols,
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLS=triton.next_power_of_2(n_cols),
            HAS_RESIDUAL=residual is not None,
            SAVE_STATISTICS=statistics is not None,
            num_warps=config.warps,
        )


def layer_norm_bwd(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, x, added: [rows, W], last stride 1.   mean, rstd: [rows] float32.   weight: [W] contiguous.

    Returns: the gradient of x plus `added`, [rows, W] contiguous, dtype of x; those of weight and bias, [W] float32.
    """
    n_rows, n_cols = x.shape
    dx = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if not n_rows:
        return dx, *(torch.zeros(n_cols, dtype=torch.float32, device=x.device) for _ in range(2))
    config = tuning.layer_norm_bwd(n_cols, x.dtype)
    # four programs a multiprocessor hide the memory; more would only leave more parts to add up
    n_programs = min(triton.cdiv(n_rows, config.block_rows), 4 * tuning.multiprocessors(x.device))
    dweight, dbias = (torch.empty((n_programs, n_cols), dtype=torch.float32, device=x.device) for _ in range(2))
    _layer_norm_bwd_kernel[(n_programs,)](
        grad,
        x,
        x if added is None else added,
        weight,
        mean,
        rstd,
        dx,
        dweight,
        dbias,
        n_rows,
        grad.stride(0),
        x.stride(0),
        x.stride(0) if added is None else added.stride(0),
        N_COLS=n_cols,
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLS=triton.next_power_of_2(n_cols),
        HAS_ADDED=added is not None,
        num_warps=config.warps,
    )
    return dx, dweight.sum(0), dbias.sum(0)


def _layer_norm_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else 0)


def _layer_norm_train_fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *(x.new_empty(len(x), dtype=torch.float32) for _ in range(2))


def _layer_norm_bwd_fake(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))


_layer_norm = library.define(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    layer_norm_fwd,
    _layer_norm_fake,
)
layer_norm_train = library.define(
    "layer_norm_train(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    layer_norm_train_fwd,
    _layer_norm_train_fake,
)
layer_norm_grad = library.define(
    "layer_norm_bwd(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor? added) "
    "-> (Tensor, Tensor, Tensor)",
    layer_norm_bwd,
    _layer_norm_bwd_fake,
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `clipfast.ops.layer_norm`: LayerNorm(x), or (LayerNorm(x + residual), x + residual)."""
    added = None if residual is None else library.as_rows(residual)
    y, total = _layer_norm(library.as_rows(x), added, weight.contiguous(), bias.contiguous(), eps)
    return y.view(x.shape) if residual is None else (y.view(x.shape), total.view(x.shape))
