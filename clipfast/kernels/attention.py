"""Softmax attention over packed rows: reads [T, 3, H, D] where it lies, and no [L, L] matrix leaves a program.

Two kernels, chosen by `tuning.attention_tile_block`. Where the longest sequence fits one tile, a program holds whole
sequences, several short ones side by side, and their softmax is exact. Longer ones pass key by key block through an
online softmax. Which rows a program works on is a plan, a tensor made on the host from the lengths: the operators are
functions of tensors alone, so that a CUDA graph can be replayed with another plan, and an empty entry does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import attention_plan, library, linear
from clipfast.packing import Rows

LOG2_E = 1.4426950408889634


@triton.jit
def _load_rows(base_ptr, rows, end, stride_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[rows, BLOCK_D] of one head, zero past column HEAD_DIM and, if MASKED, from row `end` on."""
    cols = tl.arange(0, BLOCK_D)[None, :]
    # int64 before the multiplication: rows x stride passes 2^31
    ptrs = base_ptr + rows.to(tl.int64)[:, None] * stride_row + cols
    if MASKED:
        return tl.load(ptrs, mask=(rows[:, None] < end) & (cols < HEAD_DIM), other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(ptrs, mask=cols < HEAD_DIM, other=0.0)
    return tl.load(ptrs)


@triton.jit
def _store_rows(out_ptr, y, rows, end, head, n_heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)[None, :]
    ptrs = out_ptr + (rows.to(tl.int64)[:, None] * n_heads + head) * HEAD_DIM + cols
    tl.store(ptrs, y.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < end) & (cols < HEAD_DIM))


@triton.jit
def _attention_tile_kernel(
    qkv_ptr,
    tiles_ptr,
    spans_ptr,
    out_ptr,
    lse_ptr,
    n_rows,
    n_heads,
    stride_row,
    stride_which,
    stride_head,
    scale_log2,
    IS_CAUSAL: tl.constexpr,
    WITH_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # heads run fastest: programs that run together read whole rows
    tile, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    start, end = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    rows = start + tl.arange(0, BLOCK)
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_head
    q = _load_rows(q_ptr, rows, end, stride_row, HEAD_DIM, BLOCK_D, True)
    k = _load_rows(q_ptr + stride_which, rows, end, stride_row, HEAD_DIM, BLOCK_D, True)
    v = _load_rows(q_ptr + 2 * stride_which, rows, end, stride_row, HEAD_DIM, BLOCK_D, True)
    # the keys that a row sees lie between two rows: no sequence id per key, which would cost a register per column.
    # Rows past the end see all of the tile, so that no row sees nothing, and are dropped at the store
    k_first = tl.load(spans_ptr + 2 * rows, mask=rows < end, other=0)
    k_end = rows + 1 if IS_CAUSAL else tl.load(spans_ptr + 2 * rows + 1, mask=rows < end, other=2147483647)
    visible = (rows[None, :] >= k_first[:, None]) & (rows[None, :] < k_end[:, None])
    scores = tl.where(visible, tl.dot(q, k.T, input_precision=PRECISION), float("-inf"))
    # scaled in the multiply-add of the exponent: whatever is rounded in row_max cancels in the quotient
    row_max = tl.max(scores, axis=1) * scale_log2
    p = tl.exp2(scores * scale_log2 - row_max[:, None])
    row_sum = tl.sum(p, axis=1)
    y = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / row_sum[:, None]
    _store_rows(out_ptr, y, rows, end, head, n_heads, HEAD_DIM, BLOCK_D)
    if WITH_LSE:
        tl.store(lse_ptr + head.to(tl.int64) * n_rows + rows, row_max + tl.log2(row_sum), mask=rows < end)


@triton.jit
def _attend(
    q,
    acc,
    row_max,
    row_sum,
    q_rows,
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
    """Online softmax over the key blocks that start in [k_first, k_last); row_max in units of log2.

    Source: Dao 2023, FlashAttention-2, Algorithm 1.
    """
    for start in range(k_first, k_last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, keys, k_end, stride_row, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            visible = keys[None, :] < k_end
            if IS_CAUSAL:
                visible &= keys[None, :] <= q_rows[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, axis=1)
        v = _load_rows(k_ptr + stride_which, keys, k_end, stride_row, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _attention_stream_kernel(
    qkv_ptr,
    blocks_ptr,
    out_ptr,
    lse_ptr,
    n_rows,
    n_heads,
    stride_row,
    stride_which,
    stride_head,
    scale_log2,
    IS_CAUSAL: tl.constexpr,
    WITH_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    PEEL_FIRST: tl.constexpr,
):
    block, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    q_start, k_start = tl.load(blocks_ptr + 3 * block), tl.load(blocks_ptr + 3 * block + 1)
    k_end = tl.load(blocks_ptr + 3 * block + 2)
    rows = q_start + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + head.to(tl.int64) * stride_head
    k_ptr = q_ptr + stride_which
    q = _load_rows(q_ptr, rows, k_end, stride_row, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    k_first = k_start
    if PEEL_FIRST:
        # the class token's key by a plain dot product, and the softmax starts from it; the patches fill whole blocks
        cols = tl.arange(0, BLOCK_D)
        first_ptrs = k_ptr + k_start.to(tl.int64) * stride_row + cols
        k0 = tl.load(first_ptrs, mask=cols < HEAD_DIM, other=0.0).to(tl.float32)
        v0 = tl.load(first_ptrs + stride_which, mask=cols < HEAD_DIM, other=0.0).to(tl.float32)
        row_max = tl.sum(q.to(tl.float32) * k0[None, :], axis=1) * scale_log2
        row_sum = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
        acc += v0[None, :]
        k_first += 1
    else:
        row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # keys that every row of the block sees need no mask: all of them, or those up to the block's first row
    unmasked = q_start + 1 if IS_CAUSAL else k_end
    k_masked = k_first + (unmasked - k_first) // BLOCK_N * BLOCK_N
    acc, row_max, row_sum = _attend(
        q, acc, row_max, row_sum, rows, k_ptr, k_first, k_masked, k_end, stride_row, stride_which, scale_log2,
        IS_CAUSAL, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    if BLOCK_TAIL > 0:
        k_last = min(k_end, q_start + BLOCK_M) if IS_CAUSAL else k_end
        acc, row_max, row_sum = _attend(
            q, acc, row_max, row_sum, rows, k_ptr, k_masked, k_last, k_end, stride_row, stride_which, scale_log2,
            IS_CAUSAL, PRECISION, HEAD_DIM, BLOCK_D, BLOCK_TAIL, True,
        )  # fmt: skip
    y = acc / row_sum[:, None]
    if WITH_LSE:
        tl.store(lse_ptr + head.to(tl.int64) * n_rows + rows, row_max + tl.log2(row_sum), mask=rows < k_end)
    _store_rows(out_ptr, y, rows, k_end, head, n_heads, HEAD_DIM, BLOCK_D)


def attention_tile_fwd(
    qkv: Tensor,
    tiles: Tensor,
    spans: Tensor,
    causal: bool,
    scale: float,
    block: int,
    tf32: bool,
    lse: Tensor | None = None,
) -> Tensor:
    """qkv: [T, 3, H, D], last stride 1.   scale: above 0.   tf32: float32 operands rounded to 10 bits of mantissa.

    tiles: [n, 2] int32, `packing.tiles` for this block.   spans: [T, 2] int32, `packing.spans`.
    lse: [H, T] float32, written if given: log2 of the sum of 2^(scale * log2(e) * q.k) over the keys that a row sees.
    Returns: [T, H * D] contiguous, dtype of qkv; rows in no tile are left unwritten.
    """
    n_rows, _, n_heads, width = qkv.shape
    out = torch.empty((n_rows, n_heads * width), dtype=qkv.dtype, device=qkv.device)
    if out.numel() and len(tiles):
        config = tuning.attention_tile(block, tuning.architecture(qkv.device))
        _attention_tile_kernel[(len(tiles) * n_heads,)](
            qkv,
            tiles,
            spans,
            out,
            out if lse is None else lse,
            n_rows,
            n_heads,
            *qkv.stride()[:3],
            scale * LOG2_E,
            IS_CAUSAL=causal,
            WITH_LSE=lse is not None,
            PRECISION="tf32" if tf32 else "ieee",
            HEAD_DIM=width,
            BLOCK_D=tuning.attention_columns(width),
            BLOCK=block,
            num_warps=config.warps,
            maxnreg=config.registers,
        )
    return out


def attention_stream_fwd(
    qkv: Tensor,
    blocks: Tensor,
    causal: bool,
    scale: float,
    block_m: int,
    peel: bool,
    tail: int,
    tf32: bool,
    lse: Tensor | None = None,
) -> Tensor:
    """qkv, scale, tf32, lse: as for `attention_tile_fwd`.

    blocks: [n, 3] int32, `packing.query_blocks` for this block_m.
    peel: the first key of each sequence is taken alone.   tail: keys in the blocks that need a mask; 0 if none does.
    Returns: [T, H * D] contiguous, dtype of qkv; rows in no block are left unwritten.
    """
    n_rows, _, n_heads, width = qkv.shape
    out = torch.empty((n_rows, n_heads * width), dtype=qkv.dtype, device=qkv.device)
    if out.numel() and len(blocks):
        config = tuning.attention_stream(block_m, width, qkv.dtype, tuning.architecture(qkv.device), tf32=tf32)
        _attention_stream_kernel[(len(blocks) * n_heads,)](
            qkv,
            blocks,
            out,
            out if lse is None else lse,
            n_rows,
            n_heads,
            *qkv.stride()[:3],
            scale * LOG2_E,
            IS_CAUSAL=causal,
            WITH_LSE=lse is not None,
            PRECISION="tf32" if tf32 else "ieee",
            HEAD_DIM=width,
            BLOCK_D=tuning.attention_columns(width),
            BLOCK_M=block_m,
            BLOCK_N=config.block_n,
            BLOCK_TAIL=tail,
            PEEL_FIRST=peel,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return out


def _with_lse(forward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        # [H, T], not [T, H]: a program holds one head, and its rows lie side by side
        lse = torch.empty((qkv.shape[2], qkv.shape[0]), dtype=torch.float32, device=qkv.device)
        return forward(qkv, *arguments, lse), lse

    return run


def _attention_fake(qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[2] * qkv.shape[3]))


def _with_lse_fake(qkv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _attention_fake(qkv), qkv.new_empty((qkv.shape[2], qkv.shape[0]), dtype=torch.float32)


_TILE = "(Tensor qkv, Tensor tiles, Tensor spans, bool causal, float scale, int block, bool tf32)"
_STREAM = "(Tensor qkv, Tensor blocks, bool causal, float scale, int block_m, bool peel, int tail, bool tf32)"
_attention_tile = library.define(f"attention_tile{_TILE} -> Tensor", attention_tile_fwd, _attention_fake)
_attention_stream = library.define(f"attention_stream{_STREAM} -> Tensor", attention_stream_fwd, _attention_fake)
_attention_tile_lse = library.define(
    f"attention_tile_lse{_TILE} -> (Tensor, Tensor)", _with_lse(attention_tile_fwd), _with_lse_fake
)
_attention_stream_lse = library.define(
    f"attention_stream_lse{_STREAM} -> (Tensor, Tensor)", _with_lse(attention_stream_fwd), _with_lse_fake
)


def attention(qkv: Tensor, rows: Rows, causal: bool, scale: float | None) -> Tensor:
    """As `clipfast.ops.attention`."""
    qkv, scale = nonnegative_scale(library.last_dim_contiguous(qkv), scale)
    return _planned(_attention_tile, _attention_stream, qkv, rows, causal, scale, linear.tf32_allowed(qkv))


def attention_lse(qkv: Tensor, rows: Rows, causal: bool, scale: float, tf32: bool) -> tuple[Tensor, Tensor]:
    """Attention and its row statistics, [H, T] float32 as `attention_tile_fwd` has them: what the backward needs.

    qkv: last stride 1.   scale: not negative.
    """
    return _planned(_attention_tile_lse, _attention_stream_lse, qkv, rows, causal, scale, tf32)


def nonnegative_scale(qkv: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """The same attention, with the sign of a negative scale in the queries; None is D ** -0.5."""
    if scale is None:
        return qkv, qkv.shape[-1] ** -0.5
    if scale < 0:
        # the kernels find the greatest score before they scale; nobody is in a hurry with a negative scale
        return torch.cat([-qkv[:, :1], qkv[:, 1:]], dim=1), -scale
    return qkv, scale


def _planned(tile: Any, stream: Any, qkv: Tensor, rows: Rows, causal: bool, scale: float, tf32: bool) -> Any:
    # under 0 all keys weigh the same, and under this too, but 0 x -inf would be NaN
    scale = max(scale, 1e-30)
    heads, width = qkv.shape[2:]
    architecture = tuning.architecture(qkv.device)
    plan = attention_plan.on_device(rows, qkv.device, causal, heads, width, qkv.dtype, tf32, architecture)
    if plan.spans is not None:
        return tile(qkv, plan.programs, plan.spans, causal, scale, plan.block, tf32)
    return stream(qkv, plan.programs, causal, scale, plan.block, plan.peel, plan.tail, tf32)
