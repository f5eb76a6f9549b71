"""The MLP's hidden layer where gradients are wanted: its pre-activation is kept, everything else computed again.

Forward, fc1's epilogue writes the pre-activation beside the activation. Backward, one product's epilogue turns the
gradient of the hidden layer into that of the pre-activation, and rebuilds the hidden layer for fc2's own gradient.

Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import library
from clipfast.kernels.linear import _tile_of, linear_fwd


@triton.jit
def _activate_with_slope(h, ACTIVATION: tl.constexpr):
    """activation(h) and its derivative."""
    if ACTIVATION == "quick_gelu":
        gate = 1.0 / (1.0 + tl.exp2(-2.4554669595930156 * h))  # 1.702 log2(e)
        return h * gate, gate * (1.0 + 1.702 * h * (1.0 - gate))
    below = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
    return h * below, below + h * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * h * h)  # log2(e) / 2


@triton.jit
def _hidden_bwd_kernel(
    grad_ptr,
    weight_ptr,
    pre_ptr,
    dpre_ptr,
    hidden_ptr,
    n_rows,
    n_cols,
    n_terms,
    stride_grad_row,
    stride_weight_row,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """dpre = (grad @ weight) * activation'(pre), with weight [n_terms, n_cols] read along its rows."""
    n_tiles_m, n_tiles_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    tile_m, tile_n = _tile_of(tl.program_id(0), n_tiles_m, n_tiles_n, GROUP_M)
    rows, cols = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    terms = tl.arange(0, BLOCK_K)
    # rows and columns past the end wrap around instead of being masked; they are dropped at the store
    grad_ptrs = grad_ptr + (rows % n_rows).to(tl.int64)[:, None] * stride_grad_row + terms[None, :]
    weight_ptrs = weight_ptr + terms.to(tl.int64)[:, None] * stride_weight_row + (cols % n_cols)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(n_terms, BLOCK_K)):
        k = step * BLOCK_K
        along = k * stride_weight_row
        if EVEN_K:
            grad, weight = tl.load(grad_ptrs + k), tl.load(weight_ptrs + along)
        else:
            grad = tl.load(grad_ptrs + k, mask=terms[None, :] < n_terms - k, other=0.0)
            weight = tl.load(weight_ptrs + along, mask=terms[:, None] < n_terms - k, other=0.0)
        acc = tl.dot(grad, weight, acc, input_precision=PRECISION)
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    at = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
    hidden, slope = _activate_with_slope(tl.load(pre_ptr + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
    tl.store(dpre_ptr + at, (acc * slope).to(dpre_ptr.dtype.element_ty), mask=inside)


def expand_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, tf32: bool) -> tuple[Tensor, Tensor]:
    """x: [M, W], last stride 1.   weight: [F, W], last stride 1.   bias: [F].   activation: "quick_gelu" or "gelu".

    Returns: the pre-activation and the hidden layer, [M, F] contiguous, dtype of x.
    """
    pre = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    return pre, linear_fwd(x, weight, bias, None, activation, tf32, pre=pre)


def hidden_bwd(grad: Tensor, weight: Tensor, pre: Tensor, activation: str, tf32: bool) -> tuple[Tensor, Tensor]:
    """grad: [M, W], last stride 1.   weight: [W, F], last stride 1.   pre: [M, F] contiguous.

    Returns: the gradient of the pre-activation and the hidden layer, [M, F] contiguous, dtype of pre.
    """
    (n_rows, n_terms), n_cols = grad.shape, weight.shape[1]
    dpre, hidden = torch.empty_like(pre), torch.empty_like(pre)
    if pre.numel():
        config = tuning.hidden_bwd(n_rows, pre.dtype, tuning.architecture(pre.device))
        n_tiles = triton.cdiv(n_rows, config.block_m) * triton.cdiv(n_cols, config.block_n)
        _hidden_bwd_kernel[(n_tiles,)](
            grad,
            weight,
            pre,
            dpre,
            hidden,
            n_rows,
            n_cols,
            n_terms,
            grad.stride(0),
            weight.stride(0),
            ACTIVATION=activation,
            PRECISION="tf32" if tf32 else "ieee",
            EVEN_K=n_terms % config.block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=8,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return dpre, hidden


def _expand_fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, tf32: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty((len(x), len(weight))), x.new_empty((len(x), len(weight)))


def _hidden_bwd_fake(grad: Tensor, weight: Tensor, pre: Tensor, activation: str, tf32: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pre), torch.empty_like(pre)


mlp_expand = library.define(
    "mlp_expand(Tensor x, Tensor weight, Tensor? bias, str activation, bool tf32) -> (Tensor, Tensor)",
    expand_fwd,
    _expand_fake,
)
mlp_hidden_bwd = library.define(
    "mlp_hidden_bwd(Tensor grad, Tensor weight, Tensor pre, str activation, bool tf32) -> (Tensor, Tensor)",
    hidden_bwd,
    _hidden_bwd_fake,
)
