"""The operators in plain PyTorch: any device, any floating dtype, differentiable. Every other backend falls to it.

Arguments are those of the public functions in `clipfast.ops`, already checked there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.packing import Rows

# MKL sums a product of one to three rows in a single chain, forward and backward: four times the rounding of four rows
ENOUGH_ROWS = 4


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """LayerNorm statistics, softmax and short sums run in at least float32."""
    return torch.promote_types(dtype, torch.float32)


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]: ...
def layer_norm(x, weight, bias, eps, residual=None):
    if residual is not None:
        x = x + residual
        return layer_norm(x, weight, bias, eps), x
    wide = statistics_dtype(x.dtype)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    if x.device.type == "cpu" and not wants_grad:
        # one pass: the CPU kernel reads half-precision rows beside float32 weights, and computes in float32; but its
        # backward rounds the weight's gradient to half precision
        return F.layer_norm(x, (x.shape[-1],), weight.to(wide), bias.to(wide), eps)
    return F.layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), bias.to(wide), eps).to(x.dtype)


def activate(x: Tensor, activation: str | None) -> Tensor:
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x) if activation == "gelu" else x


def padded(x: Tensor) -> Tensor:
    """x [B, ...], with rows of zeros up to ENOUGH_ROWS on a CPU in float32."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not 0 < len(x) < ENOUGH_ROWS:
        return x
    return torch.cat([x, x.new_zeros(ENOUGH_ROWS - len(x), *x.shape[1:])])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    y = F.linear(padded(x), weight, bias)[: len(x)] if x.ndim == 2 else F.linear(x, weight, bias)
    y = activate(y, activation)
    return y if residual is None else residual + y


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str,
    eps: float,
    multiply: Callable[..., Tensor] = linear,
) -> Tensor:
    hidden = multiply(layer_norm(x, norm_weight, norm_bias, eps), fc1_weight, fc1_bias, activation, None)
    return multiply(hidden, fc2_weight, fc2_bias, None, x)


def attention(qkv: Tensor, rows: Rows, causal: bool, scale: float | None) -> Tensor:
    heads, width = qkv.shape[2:]
    parts = []
    for first, _, count, length in rows.runs:
        if length == 0:
            continue
        run = qkv[first : first + count * length].view(count, length, 3, heads, width)
        q, k, v = run.permute(2, 0, 3, 1, 4)  # each [count, H, L, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal and length > 1, scale=scale)
        parts.append(out.transpose(1, 2).reshape(count * length, heads * width))
    if not parts:
        return qkv[:, 0].flatten(1)  # no rows, but still in the graph
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    # With one query per sequence, matrix products reassociate: q.(Wk y) = (Wk^T q).y and sum p (Wv y) = Wv (sum p y),
    # so keys and values are never computed for the rows: 2 W^2 + 2 H L W a sequence where 2 L W^2 was needed.
    batch, width = query.shape
    head_width, wide = len(q_weight) // heads, statistics_dtype(tokens.dtype)
    per_head = (heads, head_width, width)
    # So computed, scores and values round more, and a sharp softmax shows it: up to 5 times PyTorch's error in float32.
    # In float64 they round less; with one query a sequence that is a hundredth of a tower's time.
    strict = tokens.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    exact = torch.float64 if strict and tokens.device.type != "mps" else tokens.dtype
    q = F.linear(padded(query).to(exact), q_weight.to(exact), None if q_bias is None else q_bias.to(exact))
    q = q.unflatten(-1, per_head[:2])
    directions = torch.bmm(q.transpose(0, 1), k_weight.to(exact).reshape(per_head)).transpose(0, 1)  # [B, H, W]
    exact = statistics_dtype(exact)
    directions = directions.to(exact) * head_width**-0.5
    shift = None
    if k_bias is not None and k_bias.requires_grad and torch.is_grad_enabled():
        # adds the same to every key, so the softmax drops it; kept for autograd, whose gradient is zero, not None
        shift = (q * k_bias.view(per_head[:2])).sum(-1, keepdim=True).to(exact) * head_width**-0.5
        directions = directions if batch else directions + shift
    mixed = []
    for first, sequence, count, length in rows.runs:
        y = tokens[first : first + count * length].view(count, length, width).to(wide)
        scores = torch.bmm(directions[sequence : sequence + count], y.to(exact).transpose(1, 2))  # [count, H, L]
        if shift is not None:
            scores = scores + shift[sequence : sequence + count]
        mixed.append(torch.bmm(scores.softmax(dim=-1).to(wide), y))
    context = padded(torch.cat(mixed) if mixed else directions).to(exact)  # [B, H, W]
    out = torch.bmm(context.transpose(0, 1), v_weight.to(exact).reshape(per_head).transpose(1, 2))  # [H, B, D]
    out = out.transpose(0, 1)[:batch].flatten(1)
    return (out if v_bias is None else out + v_bias).to(tokens.dtype)


def patches(images: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, G, C * size * size]: the pixels of each patch, in the order of a convolution's weight."""
    batch, channels, height, width = images.shape
    down, across = height // size, width // size
    grid = images[:, :, : down * size, : across * size].reshape(batch, channels, down, size, across, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, down * across, channels * size * size)


def to_weight_dtype(images: Tensor, weight: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    if images.dtype != torch.uint8:
        return images.to(weight.dtype)
    wide = statistics_dtype(weight.dtype)
    mean, std = mean.to(images.device, wide), std.to(images.device, wide)
    return ((images.to(wide) / 255 - mean[:, None, None]) / std[:, None, None]).to(weight.dtype)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    pixels = to_weight_dtype(images, weight, mean, std)
    embedded = F.linear(patches(pixels, weight.shape[-1]), weight.flatten(1))
    first = class_embedding.to(embedded.dtype).expand(len(images), 1, -1)
    tokens = torch.cat([first, embedded], dim=1) + positional_embedding.to(embedded.dtype)
    return tokens if norm_weight is None else layer_norm(tokens, norm_weight, norm_bias, eps)


def project(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, eps: float) -> Tensor:
    return layer_norm(x, norm_weight, norm_bias, eps) @ projection


def logits(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    image_features = image_features / image_features.norm(dim=-1, keepdim=True)
    text_features = text_features / text_features.norm(dim=-1, keepdim=True)
    per_image = logit_scale.exp() * image_features @ text_features.t()
    return per_image, per_image.t()
