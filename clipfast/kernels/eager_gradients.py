"""PyTorch's own kernels behind `clipfast.kernels.gradients`: any device, any floating dtype."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import compat
from clipfast.kernels import eager, gradients, library
from clipfast.packing import Rows

aten = torch.ops.aten

# QuickGELU(h) = SiLU(z) / 1.702 with z = 1.702 h: one pass each way, and both factors go into products
QUICK_GELU = 1.702


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = eager.statistics_dtype(x.dtype)
    # the CPU's kernel reads half-precision rows beside float32 weights; a GPU's does not
    rows = x if x.device.type == "cpu" else x.to(wide)
    y, mean, rstd = aten.native_layer_norm(rows, x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y.to(x.dtype), (mean, rstd)


def _layer_norm_bwd(
    grad: Tensor, x: Tensor, statistics: tuple[Tensor, ...], weight: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # in float32 throughout: the half-precision kernel rounds the weight's gradient
    wide = eager.statistics_dtype(x.dtype)
    weight = weight.to(wide)
    mean, rstd = (each.to(wide) for each in statistics)
    dx, dweight, dbias = aten.native_layer_norm_backward(
        grad.to(wide), x.to(wide), x.shape[-1:], mean, rstd, weight, weight, [True] * 3
    )
    dx = dx.to(x.dtype)
    return dx if added is None else dx.add_(added), dweight, dbias


def _expand(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation == "quick_gelu":
        pre = torch.addmm(bias, x, weight.t(), beta=QUICK_GELU, alpha=QUICK_GELU)
        return pre, F.silu(pre)
    pre = torch.addmm(bias, x, weight.t())
    return pre, F.gelu(pre)


def _hidden_scale(activation: str) -> float:
    return 1 / QUICK_GELU if activation == "quick_gelu" else 1.0


def _contract(hidden: Tensor, weight: Tensor, bias: Tensor, activation: str, residual: Tensor) -> Tensor:
    y = torch.addmm(bias, hidden, weight.t(), alpha=_hidden_scale(activation))
    return y.add_(residual) if y.dtype == residual.dtype else residual + y


def _contract_bwd(grad: Tensor, weight: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dhidden = grad @ weight
    # d SiLU(z) / 1.702 with respect to h is SiLU'(z): the factors cancel
    if activation == "quick_gelu":
        return aten.silu_backward(dhidden, pre), F.silu(pre)
    return aten.gelu_backward(dhidden, pre), F.gelu(pre)


PRIMITIVES = gradients.Primitives(_layer_norm, _layer_norm_bwd, _expand, _contract, _contract_bwd, _hidden_scale)


# ---------------------------------------------------------------------------------------------------------------------
# Attention on a CPU

# scores that are computed at a time: they stay in a core's cache
SCORES = 1 << 17


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rows: Rows, causal: bool, scale: float | None) -> Tensor:
        total, _, heads, width = qkv.shape
        # PyTorch's kernels below, unlike its F.scaled_dot_product_attention, do not ask how numbers of a row lie
        cast = library.last_dim_contiguous(*gradients.autocast_to(qkv, qkv))
        with gradients.no_autocast(qkv):
            out, sums = cast.new_empty(total, heads, width), []
            for q, k, v, part in _runs(cast, rows, out):
                y, log_sum_exp = compat.flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
                part.copy_(y)
                sums.append(log_sum_exp)
        ctx.save_for_backward(qkv, cast, out, *sums)
        ctx.rows, ctx.causal, ctx.scale = rows, causal, scale
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cast, out, *sums = ctx.saved_tensors
        causal, scale = ctx.causal, ctx.scale
        if torch.is_grad_enabled():
            return gradients.attention_differentiably(qkv, ctx.rows, causal, scale, grad), None, None, None
        dqkv = torch.empty_like(cast, memory_format=torch.contiguous_format)
        with gradients.no_autocast(qkv):
            grad = grad.to(cast.dtype).view_as(out)
            grads = _runs(dqkv, ctx.rows, grad)
            backward = _flash_bwd if cast.dtype.itemsize > 2 else _half_bwd
            for (q, k, v, y), (dq, dk, dv, dy), lse in zip(_runs(cast, ctx.rows, out), grads, sums, strict=True):
                backward((dq, dk, dv), dy, q, k, v, y, lse, causal, scale)
        return dqkv.to(qkv.dtype), None, None, None


def _runs(qkv: Tensor, rows: Rows, out: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views [count, H, L, D] of q, k, v [T, 3, H, D] and of out [T, H, D], for sequences of one length."""
    for first, _, count, length in rows.runs:
        if length:
            part, result = (x[first : first + count * length].unflatten(0, (count, length)) for x in (qkv, out))
            yield *part.permute(2, 0, 3, 1, 4), result.transpose(1, 2)


def _flash_bwd(
    into: tuple[Tensor, ...], grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float | None,
) -> None:  # fmt: skip
    found = compat.flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    for target, gradient in zip(into, found, strict=True):
        target.copy_(gradient)


def _half_bwd(
    into: tuple[Tensor, ...], grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float | None,
) -> None:  # fmt: skip
    """Dao 2023, FlashAttention-2, Algorithm 2, but for blocks of whole sequences.

    PyTorch's kernel takes 46 ms of one core at [32, 12, 50, 64] in bfloat16, this one 12; at [8, 16, 257, 64] 94 and
    70 (AMD Zen 5, torch 2.13).
    """
    batch, heads, length, width = q.shape
    scale = width**-0.5 if scale is None else scale
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1) if causal else None
    step = max(1, SCORES // (heads * length * length))
    for at in range(0, batch, step):
        some = slice(at, at + step)
        q_, k_, v_, grad_ = (x[some].reshape(-1, length, width) for x in (q, k, v, grad))
        # scores and their gradients in float32: a rounded score moves its weight by a power of e
        p = torch.bmm(q_.float(), k_.transpose(1, 2).float()).mul_(scale)
        if mask is not None:
            p.masked_fill_(mask, -torch.inf)
        p = p.sub_(lse[some].reshape(-1, length, 1)).exp_()
        wide = grad_.float()
        delta = (wide * out[some].reshape(-1, length, width)).sum(-1, keepdim=True)
        ds = torch.bmm(wide, v_.transpose(1, 2).float()).sub_(delta).mul_(p).mul_(scale).to(q.dtype)
        p = p.to(q.dtype)
        products = (torch.bmm(ds, k_), torch.bmm(ds.transpose(1, 2), q_), torch.bmm(p.transpose(1, 2), grad_))
        for target, gradient in zip(into, products, strict=True):
            target[some].copy_(gradient.view(-1, heads, length, width))


# ---------------------------------------------------------------------------------------------------------------------
# The operators


def mlp(x: Tensor, *rest: Any) -> Tensor:
    """As `clipfast.ops.mlp`."""
    few = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() < eager.ENOUGH_ROWS * x.shape[-1]
    return eager.mlp(x, *rest) if few else gradients.mlp(PRIMITIVES, x, *rest)


def attention(qkv: Tensor, rows: Rows, causal: bool, scale: float | None) -> Tensor:
    """As `clipfast.ops.attention`."""
    on_cpu = qkv.device.type == "cpu" and qkv.numel()
    return _Attention.apply(qkv, rows, causal, scale) if on_cpu else eager.attention(qkv, rows, causal, scale)


OPERATORS = {"layer_norm": functools.partial(gradients.layer_norm, PRIMITIVES), "mlp": mlp}
if compat.flash_attention_for_cpu is not None and compat.flash_attention_for_cpu_backward is not None:
    OPERATORS["attention"] = attention
