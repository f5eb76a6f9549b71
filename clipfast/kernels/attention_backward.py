"""The gradient of attention over packed rows, from the row statistics alone: the weights are computed again.

Where the forward has tiles, so has the backward: a program holds all queries of a tile and passes over its keys. Longer
sequences are `attention_backward_stream`'s. Each gradient is summed by one program, in one order, without atomics: two
runs give the same bits.

Source: Dao 2023, FlashAttention-2, Algorithm 2.

Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import attention as forward
from clipfast.kernels import attention_backward_stream as stream
from clipfast.kernels import attention_plan, gradients, library, linear
from clipfast.kernels.attention import LOG2_E, _load_rows, _store_rows
from clipfast.kernels.attention_backward_stream import _delta, _load_statistic, _weights
from clipfast.packing import Rows


@triton.jit
def _attention_bwd_tile_kernel(
    grad_out_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    spans_ptr,
    grad_ptr,
    n_rows,
    n_heads,
    stride_row,
    stride_which,
    stride_head,
    scale,
    scale_log2,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    start, end = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    rows = start + tl.arange(0, BLOCK)
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_head
    stride_out = n_heads * HEAD_DIM
    q = _load_rows(q_ptr, rows, end, stride_row, HEAD_DIM, BLOCK_D, True)
    grad_out = _load_rows(grad_out_ptr + head * HEAD_DIM, rows, end, stride_out, HEAD_DIM, BLOCK_D, True)
    delta = _delta(grad_out, out_ptr + head * HEAD_DIM, rows, end, stride_out, HEAD_DIM, BLOCK_D)
    # rows past the end give no key any weight
    lse = _load_statistic(lse_ptr + head.to(tl.int64) * n_rows, rows, end, float("inf"), True)
    k_first = tl.load(spans_ptr + 2 * rows, mask=rows < end, other=0)
    k_end = rows + 1 if IS_CAUSAL else tl.load(spans_ptr + 2 * rows + 1, mask=rows < end, other=0)
    grad_q = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for k_start in range(start, end, BLOCK_N):
        keys = k_start + tl.arange(0, BLOCK_N)
        k = _load_rows(q_ptr + stride_which, keys, end, stride_row, HEAD_DIM, BLOCK_D, True)
        v = _load_rows(q_ptr + 2 * stride_which, keys, end, stride_row, HEAD_DIM, BLOCK_D, True)
        visible = (keys[None, :] >= k_first[:, None]) & (keys[None, :] < k_end[:, None])
        p, grad_scores = _weights(
            q, k, grad_out, v, lse[:, None], delta[:, None], visible, scale_log2, PRECISION, True
        )  # fmt: skip
        grad_v = tl.dot(p.T, grad_out, input_precision=PRECISION)
        _store_rows(grad_ptr, grad_v, keys, end, 2 * n_heads + head, 3 * n_heads, HEAD_DIM, BLOCK_D)
        grad_k = tl.dot(grad_scores.T, q, input_precision=PRECISION) * scale
        _store_rows(grad_ptr, grad_k, keys, end, n_heads + head, 3 * n_heads, HEAD_DIM, BLOCK_D)
        grad_q = tl.dot(grad_scores, k, grad_q, input_precision=PRECISION)
    _store_rows(grad_ptr, grad_q * scale, rows, end, head, 3 * n_heads, HEAD_DIM, BLOCK_D)


def attention_tile_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tensor,
    spans: Tensor,
    causal: bool,
    scale: float,
    block: int,
    tf32: bool,
) -> Tensor:
    """grad_out, out: [T, H * D] contiguous.   qkv: [T, 3, H, D], last stride 1.   lse: [H, T] float32 of the forward.

    tiles, spans, block, tf32: as for `attention_tile_fwd`.   scale: at least 0.
    Returns: [T, 3, H, D] contiguous, dtype of qkv; rows in no tile are left unwritten.
    """
    n_rows, _, n_heads, width = qkv.shape
    grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    config = tuning.attention_bwd_tile(block, width, qkv.dtype)
    if config is None:
        raise ValueError(f"block: expected a tile that fits a program, got {block} rows of {width} in {qkv.dtype}")
    if grad.numel() and len(tiles):
        _attention_bwd_tile_kernel[(len(tiles) * n_heads,)](
            grad_out,
            qkv,
            out,
            lse,
            tiles,
            spans,
            grad,
            n_rows,
            n_heads,
            *qkv.stride()[:3],
            scale,
            scale * LOG2_E,
            **stream.constants(causal, tf32, width, config),
        )
    return grad


_attention_tile_bwd = library.define(
    "attention_tile_bwd(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor tiles, Tensor spans, bool causal, "
    "float scale, int block, bool tf32) -> Tensor",
    attention_tile_bwd,
    stream.fake,
)


def attention_bwd(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, rows: Rows, causal: bool, scale: float, tf32: bool
) -> Tensor:
    """Gradient of softmax attention over packed rows; no [L, L] matrix in memory, and deterministic.

    grad_out, out: [T, H * D].   qkv: [T, 3, H, D].   lse: [H, T] float32; out and lse are of `attention_lse`.
    scale, tf32: as there.
    Returns: [T, 3, H, D] contiguous, dtype of qkv.
    Source:  Dao 2023, FlashAttention-2, Algorithm 2.
    """
    heads, width = qkv.shape[2:]
    architecture = tuning.architecture(qkv.device)
    plan = attention_plan.backward_on_device(rows, qkv.device, causal, heads, width, qkv.dtype, tf32, architecture)
    saved = (grad_out.contiguous(), qkv, out, lse, plan.programs)
    if plan.spans is not None:
        return _attention_tile_bwd(*saved, plan.spans, causal, scale, plan.block, tf32)
    return stream.attention_stream_bwd_op(*saved, causal, scale, plan.tail, tf32)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: Rows, causal: bool, scale: float) -> Tensor:
        # the same in the backward, or the weights would not sum to one
        ctx.tf32 = linear.tf32_allowed(qkv)
        out, lse = forward.attention_lse(qkv, rows, causal, scale, ctx.tf32)
        ctx.save_for_backward(qkv, out, lse)
        ctx.rows, ctx.causal, ctx.scale = rows, causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad = gradients.attention_differentiably(qkv, ctx.rows, ctx.causal, ctx.scale, grad_out)
        else:
            grad = attention_bwd(grad_out, qkv, out, lse, ctx.rows, ctx.causal, ctx.scale, ctx.tf32)
        return grad, None, None, None


def attention(qkv: Tensor, rows: Rows, causal: bool, scale: float | None) -> Tensor:
    """As `clipfast.ops.attention`, with a gradient where one is wanted; keeps qkv, the result and [H, T] statistics."""
    if not (torch.is_grad_enabled() and qkv.requires_grad):
        return forward.attention(qkv, rows, causal, scale)
    qkv, scale = forward.nonnegative_scale(library.last_dim_contiguous(qkv), scale)
    return _Attention.apply(qkv, rows, causal, scale)
