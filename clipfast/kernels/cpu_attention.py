"""Attention on a CPU in C++ (csrc/cpu_attention.cpp).

PyTorch's kernel takes some 7 us for a head of a sequence however short it is, and sequences of one length in a call.
Here one call takes captions of any lengths; beside PyTorch's on one machine: `python -m benchmarks.attention`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from clipfast.kernels import library
from clipfast.kernels.cpu_library import DTYPES, AttentionArgs, form, pointer, run, threads
from clipfast.packing import Rows


def _attention_fwd(qkv: Tensor, offsets: Tensor, causal: bool, scale: float, instructions: str) -> Tensor:
    if qkv.dtype == torch.float16:
        return _attention_fwd(qkv.float(), offsets, causal, scale, instructions).half()
    qkv = qkv.contiguous()
    rows, _, heads, width = qkv.shape
    out = qkv.new_empty(rows, heads * width)
    if out.numel():
        args = AttentionArgs(
            ctypes.sizeof(AttentionArgs),
            *(pointer(x) for x in (qkv, out, offsets)),
            len(offsets) - 1,
            heads,
            width,
            DTYPES[qkv.dtype],
            causal,
            threads(),
            form(instructions),
            scale,
        )
        run("attention", args)
    return out


def _fake(qkv: Tensor, offsets: Tensor, causal: bool, scale: float, instructions: str) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])


_attention = library.define(
    "cpu_attention(Tensor qkv, Tensor offsets, bool causal, float scale, str instructions) -> Tensor",
    _attention_fwd,
    _fake,
    devices=("CPU",),
)


def attention(qkv: Tensor, rows: Rows, causal: bool, scale: float | None, instructions: str = "best") -> Tensor:
    """Softmax attention of each sequence's rows over that sequence's rows, scores and sums in float32.

    qkv:          [T, 3, H, D] float32, bfloat16 or float16 (through float32), on a CPU; copied if not contiguous.
    scale:        multiplies q.k before the softmax; default D ** -0.5.
    instructions: "best", or "baseline", "avx2", "avx512", "avx512_bf16" to force one.
    Returns: [T, H * D], dtype of qkv.
    Raises:  RuntimeError if the library is missing or this CPU has not the instructions.
    Source:  Vaswani et al. 2017, arXiv:1706.03762.
    """
    offsets = rows.derive("offsets", Rows.offsets, qkv.device)
    return _attention(qkv, offsets, causal, qkv.shape[3] ** -0.5 if scale is None else scale, instructions)
