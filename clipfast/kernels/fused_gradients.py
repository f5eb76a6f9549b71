"""The Triton kernels behind `clipfast.kernels.gradients`, and products without anything to fuse by cuBLAS.

Not yet run on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from clipfast.kernels import (
    attention_backward,
    eager,
    gradients,
    layer_norm,
    library,
    linear,
    mlp_gradients,
    patch_embed_gradients,
)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, *statistics = layer_norm.layer_norm_train(library.as_rows(x), weight.contiguous(), bias.contiguous(), eps)
    return y, (*statistics,)


def _layer_norm_bwd(
    grad: Tensor, x: Tensor, statistics: tuple[Tensor, ...], weight: Tensor, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    added = None if added is None else library.as_rows(added)
    rows = library.as_rows(grad), library.as_rows(x)
    return layer_norm.layer_norm_grad(*rows, *statistics, weight.contiguous(), added)


def _expand(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    weight = library.last_dim_contiguous(weight)
    return mlp_gradients.mlp_expand(library.as_rows(x), weight, bias.contiguous(), activation, linear.tf32_allowed(x))


def _contract(hidden: Tensor, weight: Tensor, bias: Tensor, activation: str, residual: Tensor) -> Tensor:
    if residual.dtype == hidden.dtype:
        return linear.linear(hidden, weight, bias, None, residual)
    return residual + linear.linear(hidden, weight, bias, None, None)


def _contract_bwd(grad: Tensor, weight: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    weight, tf32 = library.last_dim_contiguous(weight), linear.tf32_allowed(grad)
    return mlp_gradients.mlp_hidden_bwd(library.as_rows(grad), weight, pre, activation, tf32)


PRIMITIVES = gradients.Primitives(_layer_norm, _layer_norm_bwd, _expand, _contract, _contract_bwd, lambda activation: 1)


norm = functools.partial(gradients.layer_norm, PRIMITIVES)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    """As `clipfast.ops.linear`; where there is nothing to fuse, cuBLAS under autograd."""
    if activation is not None or bias is None or residual is None:
        return eager.linear(x, weight, bias, activation, residual)
    return gradients.linear(PRIMITIVES, x, weight, bias, residual)


def patch_embed(images: Tensor, *rest: Any) -> Tensor:
    """As `clipfast.ops.patch_embed`."""
    *embedding, norm_weight, norm_bias, eps = rest
    if images.requires_grad:
        return eager.patch_embed(images, *rest)
    tokens = patch_embed_gradients.patch_tokens(images, *embedding)
    return tokens if norm_weight is None else norm(tokens, norm_weight, norm_bias, eps)


def project(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, eps: float) -> Tensor:
    """As `clipfast.ops.project`."""
    return norm(x, norm_weight, norm_bias, eps) @ projection


OPERATORS: dict[str, Callable[..., Any]] = {
    "layer_norm": norm,
    "linear": product,
    "mlp": functools.partial(gradients.mlp, PRIMITIVES),
    "attention": attention_backward.attention,
    "patch_embed": patch_embed,
    "project": project,
}
