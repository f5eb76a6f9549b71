"""Attention of one query per sequence, without keys or values: q.(Wk y) = (Wk^T q).y and sum p (Wv y) = Wv (sum p y).

cuBLAS turns each query into one direction a head, in the space of the tokens; two kernels then read the tokens twice,
once for the scores and once for their weighted sum; cuBLAS takes that sum through the value projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import eager, library, linear
from clipfast.kernels.attention import LOG2_E
from clipfast.packing import Rows, derive_for_good


@triton.jit
def _pool_scores_kernel(
    directions_ptr,
    tokens_ptr,
    offsets_ptr,
    scores_ptr,
    n_blocks,
    n_heads,
    n_cols,
    stride_directions_batch,
    stride_directions_head,
    stride_tokens_row,
    scale_log2,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """scores[t, h] = scale_log2 directions[sequence of t, h].tokens[t]; a program has a block of a sequence's rows."""
    sequence, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    start, end = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
    rows = start + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    heads, cols = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_COLS)
    # int64 before the multiplication: rows x stride passes 2^31
    wide_rows = rows.to(tl.int64)[:, None]
    directions_ptr += sequence.to(tl.int64) * stride_directions_batch
    directions_ptrs = directions_ptr + heads[None, :] * stride_directions_head + cols[:, None]
    tokens_ptrs = tokens_ptr + wide_rows * stride_tokens_row + cols[None, :]
    acc = tl.zeros((BLOCK_ROWS, BLOCK_HEADS), dtype=tl.float32)
    # a block past the end of its sequence has nothing to multiply
    n_steps = tl.where(start + block * BLOCK_ROWS < end, tl.cdiv(n_cols, BLOCK_COLS), 0)
    for step in range(n_steps):
        left = n_cols - step * BLOCK_COLS
        at = step * BLOCK_COLS
        y = tl.load(tokens_ptrs + at, mask=(rows[:, None] < end) & (cols[None, :] < left), other=0.0)
        sought = (heads[None, :] < n_heads) & (cols[:, None] < left)
        acc = tl.dot(y, tl.load(directions_ptrs + at, mask=sought, other=0.0), acc, input_precision=PRECISION)
    inside = (rows[:, None] < end) & (heads[None, :] < n_heads)
    tl.store(scores_ptr + wide_rows * n_heads + heads[None, :], acc * scale_log2, mask=inside)


@triton.jit
def _pool_scores_float64_kernel(
    directions_ptr,
    tokens_ptr,
    offsets_ptr,
    scores_ptr,
    n_blocks,
    n_heads,
    n_cols,
    stride_directions_batch,
    stride_directions_head,
    stride_tokens_row,
    scale_log2,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """The same in float64, a head a program: for true float32, where the reassociated sum rounds too much."""
    block, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    sequence, block = block // n_blocks, block % n_blocks
    start, end = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
    rows, cols = start + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
    wide_rows = rows.to(tl.int64)
    directions_ptr += sequence.to(tl.int64) * stride_directions_batch + head * stride_directions_head
    tokens_ptrs = tokens_ptr + wide_rows[:, None] * stride_tokens_row + cols[None, :]
    acc = tl.zeros((BLOCK_ROWS,), dtype=tl.float64)
    n_steps = tl.where(start + block * BLOCK_ROWS < end, tl.cdiv(n_cols, BLOCK_COLS), 0)
    for step in range(n_steps):
        left = n_cols - step * BLOCK_COLS
        at = step * BLOCK_COLS
        y = tl.load(tokens_ptrs + at, mask=(rows[:, None] < end) & (cols[None, :] < left), other=0.0)
        sought = tl.load(directions_ptr + at + cols, mask=cols < left, other=0.0)
        acc += tl.sum(y.to(tl.float64) * sought[None, :], axis=1)
    tl.store(scores_ptr + wide_rows * n_heads + head, acc * scale_log2, mask=rows < end)


@triton.jit
def _pool_mix_kernel(
    scores_ptr,
    tokens_ptr,
    offsets_ptr,
    mixed_ptr,
    n_blocks,
    n_heads,
    n_cols,
    stride_tokens_row,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """mixed[b, h] = sum of softmax(scores[:, h])[t] tokens[t]; a program has a block of the columns."""
    sequence, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    start, end = tl.load(offsets_ptr + sequence), tl.load(offsets_ptr + sequence + 1)
    heads, cols = tl.arange(0, BLOCK_HEADS), block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_max = tl.full((BLOCK_HEADS,), float("-inf"), dtype=scores_ptr.dtype.element_ty)
    row_sum = tl.zeros((BLOCK_HEADS,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_HEADS, BLOCK_COLS), dtype=tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        wide_rows = rows.to(tl.int64)
        scores_ptrs = scores_ptr + wide_rows[None, :] * n_heads + heads[:, None]
        scores = tl.load(scores_ptrs, mask=(rows[None, :] < end) & (heads[:, None] < n_heads), other=0.0)
        scores = tl.where(rows[None, :] < end, scores, float("-inf"))
        tokens_ptrs = tokens_ptr + wide_rows[:, None] * stride_tokens_row + cols[None, :]
        y = tl.load(tokens_ptrs, mask=(rows[:, None] < end) & (cols[None, :] < n_cols), other=0.0)
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        p = tl.exp2((scores - new_max[:, None]).to(tl.float32))
        decay = tl.exp2((row_max - new_max).to(tl.float32))
        row_sum = row_sum * decay + tl.sum(p, axis=1)
        high = p.to(y.dtype)
        acc = tl.dot(high, y, acc * decay[:, None], input_precision=PRECISION)
        if SPLIT:
            # what the weights lose in half precision, as a second product: the sum is then as good as float32's
            acc = tl.dot((p - high.to(tl.float32)).to(y.dtype), y, acc)
        row_max = new_max
    # a sequence without rows, such as the padding of a captured graph, gives zeros
    mixed = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    mixed_ptrs = mixed_ptr + (sequence.to(tl.int64) * n_heads + heads)[:, None] * n_cols + cols[None, :]
    tl.store(mixed_ptrs, mixed, mask=(heads[:, None] < n_heads) & (cols[None, :] < n_cols))


def pool_fwd(tokens: Tensor, directions: Tensor, offsets: Tensor, longest: int, scale: float, tf32: bool) -> Tensor:
    """The tokens of each sequence, weighted for each head by softmax(scale directions.tokens).

    tokens: [T, W].   directions: [B, H, W], of the tokens' dtype, or float64 for scores in it.   Last strides 1.
    offsets: [B + 1] int32.   longest: no sequence has more rows.   tf32: float32 operands rounded to 10 bits.
    Returns: [B, H, W] float32, contiguous; zero for a sequence without rows.
    """
    (n_rows, n_cols), (batch, n_heads, _) = tokens.shape, directions.shape
    mixed = torch.empty((batch, n_heads, n_cols), dtype=torch.float32, device=tokens.device)
    if not mixed.numel():
        return mixed
    in_float64 = directions.dtype == torch.float64
    wide = torch.float64 if in_float64 else torch.float32
    scores = torch.empty((n_rows, n_heads), dtype=wide, device=tokens.device)
    config = tuning.attention_pool(batch, n_heads, tokens.dtype, tuning.architecture(tokens.device), tf32=tf32)
    same = {
        "PRECISION": "tf32" if tf32 else "ieee",
        "BLOCK_HEADS": max(16, triton.next_power_of_2(n_heads)),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    n_blocks = triton.cdiv(longest, config.block_rows)
    if n_rows and n_blocks:
        arguments = (directions, tokens, offsets, scores, n_blocks, n_heads, n_cols, *directions.stride()[:2])
        arguments = (*arguments, tokens.stride(0), scale * LOG2_E)
        blocks = {"BLOCK_ROWS": config.block_rows, "BLOCK_COLS": config.block_terms}
        if in_float64:
            _pool_scores_float64_kernel[(batch * n_blocks * n_heads,)](*arguments, **blocks, num_warps=config.warps)
        else:
            _pool_scores_kernel[(batch * n_blocks,)](*arguments, **blocks, **same)
    n_blocks = triton.cdiv(n_cols, config.block_cols)
    _pool_mix_kernel[(batch * n_blocks,)](
        scores,
        tokens,
        offsets,
        mixed,
        n_blocks,
        n_heads,
        n_cols,
        tokens.stride(0),
        SPLIT=tokens.dtype != torch.float32,
        BLOCK_ROWS=config.block_keys,
        BLOCK_COLS=config.block_cols,
        **same,
    )
    return mixed


def _pool_fake(tokens: Tensor, directions: Tensor, offsets: Tensor, longest: int, scale: float, tf32: bool) -> Tensor:
    return directions.new_empty(directions.shape, dtype=torch.float32)


_pool = library.define(
    "attention_pool(Tensor tokens, Tensor directions, Tensor offsets, int longest, float scale, bool tf32) -> Tensor",
    pool_fwd,
    _pool_fake,
)


class Plan(NamedTuple):
    offsets: Tensor  # [B + 1]
    longest: int  # no sequence has more rows


def plan(rows: Rows) -> Plan:
    """The plan for these rows, on the CPU; of stable rows, `longest` is a bound that few lengths change."""
    longest = max(rows.lengths, default=0)
    if rows.stable:
        longest = min(rows.total, max(128, triton.next_power_of_2(longest)))
    return Plan(rows.offsets(), longest)


def _plan(rows: Rows, device: torch.device) -> Plan:
    if torch.compiler.is_compiling():
        return _constant_plan(rows.traced_lengths(), rows.stable, device)
    return rows.derive("attention_pool", plan, device)


@torch.compiler.assume_constant_result  # a compiled graph holds the plan, not its making
def _constant_plan(lengths: tuple[int, ...], stable: bool, device: torch.device) -> Plan:
    return derive_for_good(lengths, stable, "attention_pool", plan, device)


def attention_pool(
    query: Tensor,
    tokens: Tensor,
    rows: Rows,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    heads: int,
) -> Tensor:
    """As `clipfast.ops.attention_pool`; the key bias adds the same to every key, so the softmax drops it."""
    per_head = (heads, len(q_weight) // heads, query.shape[1])
    tf32 = linear.tf32_allowed(tokens)
    # as in eager: float32 that must be strict takes its scores and values in float64
    exact = torch.float64 if tokens.dtype == torch.float32 and not tf32 else tokens.dtype
    q = F.linear(query.to(exact), q_weight.to(exact), None if q_bias is None else q_bias.to(exact))
    q = q.unflatten(-1, per_head[:2])
    directions = torch.bmm(q.transpose(0, 1), k_weight.to(exact).reshape(per_head)).transpose(0, 1)  # [B, H, W]
    made = _plan(rows, tokens.device)
    context = _pool(
        library.last_dim_contiguous(tokens),
        library.last_dim_contiguous(directions),
        made.offsets,
        made.longest,
        per_head[1] ** -0.5,
        tf32,
    )
    # in float32 at least: the weighted sum is not rounded before the value projection
    wide = eager.statistics_dtype(exact)
    values = v_weight.to(wide).reshape(per_head).transpose(1, 2)
    out = torch.bmm(context.to(wide).transpose(0, 1), values).transpose(0, 1).flatten(1)  # [B, H * D]
    return (out if v_bias is None else out + v_bias).to(tokens.dtype)
