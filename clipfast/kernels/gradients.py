"""Operators that bring their own gradients: written once, over the few products that a backend is good at.

Plain autograd keeps what each PyTorch call reads: for a QuickGELU three tensors as wide as the MLP, for LayerNorm in
half precision a float32 copy of the rows. Here a LayerNorm keeps its rows and their statistics, the MLP its
pre-activation, attention the rows of q, k, v and its result with one log-sum-exp a row; the rest is computed again.
Gradients are summed in a fixed order. Differentiating a gradient runs `clipfast.kernels.eager` under autograd instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipfast.kernels import eager
from clipfast.packing import Rows


class Primitives(NamedTuple):
    """What a backend brings. Rows are [M, W]; `pre` [M, F] is all that the MLP keeps of its hidden layer."""

    # (x, weight, bias, eps) -> (y, statistics)
    layer_norm: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    # (grad, x, statistics, weight, added) -> (grad of x + added, grad of weight, of bias), these at least float32
    layer_norm_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    # (x, fc1 weight, bias, activation) -> (pre, hidden)
    expand: Callable[..., tuple[Tensor, Tensor]]
    # (hidden, fc2 weight, bias, activation, residual) -> rows in the residual's dtype or a wider one
    contract: Callable[..., Tensor]
    # (grad, fc2 weight, pre, activation) -> (grad of x @ fc1.T + bias, hidden)
    contract_bwd: Callable[..., tuple[Tensor, Tensor]]
    # what `hidden` is to be multiplied with to be activation(x @ fc1.T + bias)
    hidden_scale: Callable[[str], float]


def autocast_to(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product on rows x, in autocast's dtype where it is on and has a say."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    device = x.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def differentiably(
    function: Callable[..., Tensor], needed: Sequence[bool], grad: Tensor, *arguments: Tensor
) -> list[Tensor | None]:
    """Gradients of function(*arguments) by plain autograd, differentiable again; None where none is needed."""
    wanted = [i for i, wants in enumerate(needed) if wants]
    leaves = [arguments[i] for i in wanted]
    y = function(*arguments)
    found = torch.autograd.grad(y, leaves, grad.to(y.dtype), create_graph=True)
    gradients: list[Tensor | None] = [None] * len(arguments)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def attention_differentiably(qkv: Tensor, rows: Rows, causal: bool, scale: float | None, grad: Tensor) -> Tensor:
    """The gradient of attention, differentiable again: PyTorch's fused ones have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        (again,) = differentiably(lambda x: eager.attention(x, rows, causal, scale), (True,), grad, qkv)
    assert again is not None
    return again


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Primitives, eps: float, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, statistics = backend.layer_norm(x.reshape(-1, x.shape[-1]), weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.backend, ctx.eps = backend, eps
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[2:]
            again = differentiably(lambda x, w, b: eager.layer_norm(x, w, b, ctx.eps), needed, grad, x, weight, bias)
            return None, None, *again
        width = x.shape[-1]
        dx, dweight, dbias = ctx.backend.layer_norm_bwd(
            grad.reshape(-1, width), x.reshape(-1, width), statistics, weight, None
        )
        return None, None, dx.view(x.shape), dweight.to(weight.dtype), dbias.to(bias.dtype)


def layer_norm(
    backend: Primitives, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """As `clipfast.ops.layer_norm`, keeping the rows and their statistics."""
    total = x if residual is None else x + residual
    y = _LayerNorm.apply(backend, eps, total, weight, bias)
    return y if residual is None else (y, total)


# ---------------------------------------------------------------------------------------------------------------------
# Linear with a residual


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Primitives, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        cast, fc, fc_bias = autocast_to(x, x.reshape(-1, x.shape[-1]), weight, bias)
        with no_autocast(x):
            y = backend.contract(cast, fc, fc_bias, "none", residual.reshape(-1, len(weight)))
        ctx.save_for_backward(x, weight, bias, fc)
        ctx.residual_dtype = residual.dtype
        return y.view(residual.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, fc = ctx.saved_tensors
        _, x_wanted, weight_wanted, bias_wanted, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        if torch.is_grad_enabled():
            needed = (x_wanted, weight_wanted, bias_wanted)
            again = differentiably(lambda x, w, b: eager.linear(x, w, b, None, None), needed, grad, x, weight, bias)
            return None, *again, grad.to(ctx.residual_dtype)
        with no_autocast(x):
            rows, products = x.reshape(-1, x.shape[-1]).to(fc.dtype), grad.reshape(-1, grad.shape[-1]).to(fc.dtype)
            if x_wanted:
                dx = (products @ fc).to(x.dtype).view(x.shape)
            if weight_wanted:
                dweight = (products.t() @ rows).to(weight.dtype)
            if bias_wanted:
                dbias = _column_sums(products, bias.dtype)
        return None, dx, dweight, dbias, grad.to(ctx.residual_dtype)


def linear(backend: Primitives, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """As `clipfast.ops.linear` with a residual and no activation."""
    return _Linear.apply(backend, x, weight, bias, residual)


# ---------------------------------------------------------------------------------------------------------------------
# MLP


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Primitives, activation: str, eps: float, x: Tensor, *weights: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, statistics = backend.layer_norm(rows, *weights[:2], eps)
        y, fc1_weight, fc1_bias, fc2_weight, fc2_bias = autocast_to(x, y, *weights[2:])
        with no_autocast(x):
            pre, hidden = backend.expand(y, fc1_weight, fc1_bias, activation)
            out = backend.contract(hidden, fc2_weight, fc2_bias, activation, rows)
        ctx.save_for_backward(x, *weights, pre, fc1_weight, fc2_weight, *statistics)
        ctx.backend, ctx.activation, ctx.eps = backend, activation, eps
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backend, activation = ctx.backend, ctx.activation
        x, *weights, pre, fc1, fc2, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[3:]
            again = differentiably(lambda *each: _plain_mlp(each, activation, ctx.eps), needed, grad, x, *weights)
            return None, None, None, *again
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
        _, norm_weight_wanted, norm_bias_wanted, fc1_wanted, fc1_bias_wanted, fc2_wanted, fc2_bias_wanted = (
            ctx.needs_input_grad[3:]
        )
        dfc1 = dfc1_bias = dfc2 = dfc2_bias = None
        with no_autocast(x):
            rows, grad_rows = (each.reshape(-1, x.shape[-1]) for each in (x, grad))
            products = grad_rows.to(pre.dtype)
            dpre, hidden = backend.contract_bwd(products, fc2, pre, activation)
            if fc2_wanted:
                dfc2 = _scaled(products.t() @ hidden, backend.hidden_scale(activation), fc2_weight.dtype)
            if fc2_bias_wanted:
                dfc2_bias = _column_sums(grad_rows, fc2_bias.dtype)
            del hidden
            if fc1_bias_wanted:
                dfc1_bias = _column_sums(dpre, fc1_bias.dtype)
            if fc1_wanted:
                y, _ = backend.layer_norm(rows, norm_weight, norm_bias, ctx.eps)
                dfc1 = (dpre.t() @ y.to(pre.dtype)).to(fc1_weight.dtype)
                del y
            dy = (dpre @ fc1).to(x.dtype)
            dx, dnorm_weight, dnorm_bias = backend.layer_norm_bwd(dy, rows, (mean, rstd), norm_weight, grad_rows)
            dx = dx.view(x.shape)
        return (
            *(None, None, None, dx),
            dnorm_weight.to(norm_weight.dtype) if norm_weight_wanted else None,
            dnorm_bias.to(norm_bias.dtype) if norm_bias_wanted else None,
            *(dfc1, dfc1_bias, dfc2, dfc2_bias),
        )


def _plain_mlp(tensors: Sequence[Tensor], activation: str, eps: float) -> Tensor:
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = tensors
    return eager.mlp(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, eps)


def _column_sums(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.sum(0, dtype=eager.statistics_dtype(grad.dtype)).to(dtype)


def _scaled(product: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return product.to(dtype) if scale == 1 else product.to(dtype).mul_(scale)


def mlp(backend: Primitives, x: Tensor, *rest: Any) -> Tensor:
    """As `clipfast.ops.mlp`, keeping the rows, their statistics and the pre-activation."""
    *weights, activation, eps = rest
    return _Mlp.apply(backend, activation, eps, x, *weights)
