"""The gradient of attention over packed rows that fit no tile, in two kernels; and what the kernel of tiles shares.

The first keeps a block of queries and passes over their keys, the second keeps a block of keys and passes over their
queries: seven products where one kernel with atomics would make five.

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
from clipfast.kernels import library
from clipfast.kernels.attention import LOG2_E, _load_rows, _store_rows


@triton.jit
def _load_statistic(ptr, rows, end, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr + rows, mask=rows < end, other=other)
    return tl.load(ptr + rows)


@triton.jit
def _delta(grad_out, out_ptr, rows, end, stride_out, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """What a row's weighted gradients sum to: sum_j P_ij dP_ij = dO_i . O_i."""
    out = _load_rows(out_ptr, rows, end, stride_out, HEAD_DIM, BLOCK_D, True)
    return tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), axis=1)


@triton.jit
def _weights(a, b, grad_a, grad_b, lse, delta, visible, scale_log2, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """P and dS = P (dP - delta), before the scale, in the dtype of a.

    a, b are q, k and grad_a, grad_b dO, V, with lse and delta [rows, 1]; or k, q and V, dO with lse and delta
    [1, rows], which gives the transposed P and dS. Where lse is infinite, P is 0.
    """
    p = tl.exp2(tl.dot(a, b.T, input_precision=PRECISION) * scale_log2 - lse)
    if MASKED:
        p = tl.where(visible, p, 0.0)
    grad_scores = p * (tl.dot(grad_a, grad_b.T, input_precision=PRECISION) - delta)
    return p.to(a.dtype), grad_scores.to(a.dtype)


@triton.jit
def _over_keys(
    grad_q,
    q,
    grad_out,
    lse,
    delta,
    rows,
    k_ptr,
    k_first,
    k_last,
    k_end,
    stride_row,
    stride_which,
    scale_log2,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dQ, before the scale, from the key blocks that start in [k_first, k_last)."""
    for start in range(k_first, k_last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, keys, k_end, stride_row, HEAD_DIM, BLOCK_D, MASKED)
        v = _load_rows(k_ptr + stride_which, keys, k_end, stride_row, HEAD_DIM, BLOCK_D, MASKED)
        visible = keys[None, :] < k_end
        if IS_CAUSAL:
            visible &= keys[None, :] <= rows[:, None]
        _, grad_scores = _weights(
            q, k, grad_out, v, lse[:, None], delta[:, None], visible, scale_log2, PRECISION, MASKED
        )  # fmt: skip
        grad_q = tl.dot(grad_scores, k, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit
def _attention_bwd_q_kernel(
    grad_out_ptr,
    qkv_ptr,
    out_ptr,
    lse_ptr,
    blocks_ptr,
    delta_ptr,
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
    BLOCK_TAIL: tl.constexpr,
):
    block, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    q_start, k_start = tl.load(blocks_ptr + 3 * block), tl.load(blocks_ptr + 3 * block + 1)
    end = tl.load(blocks_ptr + 3 * block + 2)
    rows = q_start + tl.arange(0, BLOCK)
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_head
    stride_out = n_heads * HEAD_DIM
    q = _load_rows(q_ptr, rows, end, stride_row, HEAD_DIM, BLOCK_D, True)
    grad_out = _load_rows(grad_out_ptr + head * HEAD_DIM, rows, end, stride_out, HEAD_DIM, BLOCK_D, True)
    delta = _delta(grad_out, out_ptr + head * HEAD_DIM, rows, end, stride_out, HEAD_DIM, BLOCK_D)
    statistics = head.to(tl.int64) * n_rows
    # the other kernel, which comes after, reads it for each of its key blocks
    tl.store(delta_ptr + statistics + rows, delta, mask=rows < end)
    lse = _load_statistic(lse_ptr + statistics, rows, end, float("inf"), True)
    grad_q = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    # keys that every row of the block sees need no mask
    unmasked = q_start + 1 if IS_CAUSAL else end
    k_masked = k_start + (unmasked - k_start) // BLOCK_N * BLOCK_N
    grad_q = _over_keys(
        grad_q, q, grad_out, lse, delta, rows, q_ptr + stride_which, k_start, k_masked, end, stride_row, stride_which,
        scale_log2, IS_CAUSAL, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    if BLOCK_TAIL > 0:
        k_last = min(end, q_start + BLOCK) if IS_CAUSAL else end
        grad_q = _over_keys(
            grad_q, q, grad_out, lse, delta, rows, q_ptr + stride_which, k_masked, k_last, end, stride_row,
            stride_which, scale_log2, IS_CAUSAL, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_TAIL, True,
        )  # fmt: skip
    _store_rows(grad_ptr, grad_q * scale, rows, end, head, 3 * n_heads, HEAD_DIM, BLOCK_D)


@triton.jit
def _over_queries(
    grad_k,
    grad_v,
    k,
    v,
    keys,
    q_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    q_first,
    q_end,
    stride_row,
    stride_out,
    scale_log2,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """dK, before the scale, and dV from the queries [q_first, q_end); without MASKED, a multiple of BLOCK_N."""
    for start in range(q_first, q_end, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        q = _load_rows(q_ptr, rows, q_end, stride_row, HEAD_DIM, BLOCK_D, MASKED)
        grad_out = _load_rows(grad_out_ptr, rows, q_end, stride_out, HEAD_DIM, BLOCK_D, MASKED)
        # rows past the end give no key any weight
        lse = _load_statistic(lse_ptr, rows, q_end, float("inf"), MASKED)
        delta = _load_statistic(delta_ptr, rows, q_end, 0.0, MASKED)
        p, grad_scores = _weights(
            k, q, v, grad_out, lse[None, :], delta[None, :], keys[:, None] <= rows[None, :], scale_log2, PRECISION,
            IS_CAUSAL,
        )  # fmt: skip
        grad_v = tl.dot(p, grad_out, grad_v, input_precision=PRECISION)
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def _attention_bwd_kv_kernel(
    grad_out_ptr,
    qkv_ptr,
    lse_ptr,
    delta_ptr,
    blocks_ptr,
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
    BLOCK_TAIL: tl.constexpr,
):
    block, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    k_start, q_start = tl.load(blocks_ptr + 3 * block), tl.load(blocks_ptr + 3 * block + 1)
    end = tl.load(blocks_ptr + 3 * block + 2)
    keys = k_start + tl.arange(0, BLOCK)
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_head
    statistics = head.to(tl.int64) * n_rows
    lse_ptr += statistics
    delta_ptr += statistics
    grad_out_ptr += head * HEAD_DIM
    k = _load_rows(q_ptr + stride_which, keys, end, stride_row, HEAD_DIM, BLOCK_D, True)
    v = _load_rows(q_ptr + 2 * stride_which, keys, end, stride_row, HEAD_DIM, BLOCK_D, True)
    grad_k = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    grad_v = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    q_masked = q_start + (end - q_start) // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        # no earlier row sees these keys; the mask is not worth a loop of its own
        q_masked = k_start
    else:
        grad_k, grad_v = _over_queries(
            grad_k, grad_v, k, v, keys, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, q_start, q_masked, stride_row,
            n_heads * HEAD_DIM, scale_log2, False, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    if BLOCK_TAIL > 0:
        grad_k, grad_v = _over_queries(
            grad_k, grad_v, k, v, keys, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, q_masked, end, stride_row,
            n_heads * HEAD_DIM, scale_log2, IS_CAUSAL, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_TAIL, True,
        )  # fmt: skip
    _store_rows(grad_ptr, grad_k * scale, keys, end, n_heads + head, 3 * n_heads, HEAD_DIM, BLOCK_D)
    _store_rows(grad_ptr, grad_v, keys, end, 2 * n_heads + head, 3 * n_heads, HEAD_DIM, BLOCK_D)


def attention_stream_bwd(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Tensor,
    causal: bool,
    scale: float,
    tail: int,
    tf32: bool,
) -> Tensor:
    """grad_out, qkv, out, lse, scale, tf32: as for `attention_tile_bwd`.

    blocks: [n, 3] int32, `packing.query_blocks` for the block of `tuning.attention_bwd_stream`.
    tail: rows in the blocks that need a mask; 0 if none does.
    Returns: [T, 3, H, D] contiguous, dtype of qkv; rows in no block are left unwritten.
    """
    n_rows, _, n_heads, width = qkv.shape
    grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if grad.numel() and len(blocks):
        delta = torch.empty_like(lse)
        config = tuning.attention_bwd_stream(width, qkv.dtype, tf32=tf32)
        grid = (len(blocks) * n_heads,)
        sizes = (n_rows, n_heads, *qkv.stride()[:3], scale, scale * LOG2_E)
        known = constants(causal, tf32, width, config) | {"BLOCK_TAIL": tail}
        _attention_bwd_q_kernel[grid](grad_out, qkv, out, lse, blocks, delta, grad, *sizes, **known)
        _attention_bwd_kv_kernel[grid](grad_out, qkv, lse, delta, blocks, grad, *sizes, **known)
    return grad


def constants(causal: bool, tf32: bool, width: int, config: tuning.AttentionBackwardConfig) -> dict[str, Any]:
    return {
        "IS_CAUSAL": causal,
        "PRECISION": "tf32" if tf32 else "ieee",
        "HEAD_DIM": width,
        "BLOCK_D": tuning.attention_columns(width),
        "BLOCK": config.block,
        "BLOCK_N": config.inner,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def fake(grad_out: Tensor, qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape)


attention_stream_bwd_op = library.define(
    "attention_stream_bwd(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor blocks, bool causal, "
    "float scale, int tail, bool tf32) -> Tensor",
    attention_stream_bwd,
    fake,
)
