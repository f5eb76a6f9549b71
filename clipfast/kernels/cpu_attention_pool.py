"""One query for each sequence on a CPU in C++ (csrc/cpu_attention_pool.cpp)."""

from __future__ import annotations

import ctypes

from torch import Tensor

from clipfast.kernels import library
from clipfast.kernels.cpu_library import DTYPES, AttentionPoolArgs, form, pointer, run, threads
from clipfast.packing import Rows


def _attention_pool_fwd(
    query: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    heads: int,
    instructions: str,
) -> Tensor:
    dtype = tokens.dtype
    for name, tensor in (("query", query), ("q_weight", q_weight), ("k_weight", k_weight), ("v_weight", v_weight)):
        if tensor.dtype != dtype:
            raise TypeError(f"tokens are {dtype}, {name} {tensor.dtype}: they must have one dtype")
    q_bias, v_bias = (None if bias is None else bias.to(dtype).contiguous() for bias in (q_bias, v_bias))
    query, tokens, q_weight = query.contiguous(), tokens.contiguous(), q_weight.contiguous()
    k_weight, v_weight = k_weight.contiguous(), v_weight.contiguous()
    out = query.new_empty(len(query), len(q_weight))
    if not out.numel():
        return out
    args = AttentionPoolArgs(
        ctypes.sizeof(AttentionPoolArgs),
        # index and LayerNorm: only csrc/cpu_blocks.cpp passes them
        *map(pointer, (query, tokens, None, None, None, offsets, q_weight, q_bias, k_weight, v_weight, v_bias, out)),
        len(query),
        query.shape[1],
        len(q_weight),
        heads,
        DTYPES[dtype],
        threads(),
        form(instructions),
    )
    run("attention_pool", args)
    return out


def _fake(query: Tensor, tokens: Tensor, offsets: Tensor, q_weight: Tensor, *_: object) -> Tensor:
    return query.new_empty(len(query), len(q_weight))


_attention_pool = library.define(
    "cpu_attention_pool(Tensor query, Tensor tokens, Tensor offsets, Tensor q_weight, Tensor? q_bias, Tensor k_weight, "
    "Tensor v_weight, Tensor? v_bias, int heads, str instructions) -> Tensor",
    _attention_pool_fwd,
    _fake,
    devices=("CPU",),
)


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
    instructions: str = "best",
) -> Tensor:
    """`clipfast.ops.attention_pool` without gradients; all float32 or all bfloat16, copied if not contiguous.

    instructions: "best", or "baseline", "avx2", "avx512", "avx512_bf16" to force one.
    Raises: RuntimeError if the library is missing or this CPU has not the instructions, TypeError if dtypes differ.
    """
    offsets = rows.derive("offsets", Rows.offsets, tokens.device)
    return _attention_pool(query, tokens, offsets, q_weight, q_bias, k_weight, v_weight, v_bias, heads, instructions)
