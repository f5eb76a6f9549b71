"""CPU inference through oneDNN's fused matrix products, which PyTorch ships but `F.linear` does not use in float32.

On an AVX-512 CPU that is not Intel's, MKL's float32 product runs at AVX2 speed: 190 against 430 GFLOP/s here (AMD EPYC,
Zen 5, two cores, torch 2.13, 2026-11; `python -m benchmarks.linear`). The weights stay the parameters themselves:
nothing is folded or packed ahead, so an edit of any kind, even through `.data`, is seen by the next call. `kept.keep`
gives that up for the weights it is called with, whose layout stays from call to call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import compat
from clipfast.kernels import eager, kept

# A float32 product sums at most this many terms in one chain; longer ones are cut, and the parts added. A single chain
# over K = 2,048 rounds twice as much as MKL's product, and a text tower 1.5 times as much as openai/CLIP's. Cut at 256
# the text tower still rounds 1.04 times as much, at 192 0.93 times (ViT-B/32, against float64). The cut copies the
# weight: with few rows (one image, a few texts) that is most of the time, so fewer parts there.
# torch.set_float32_matmul_precision("high") leaves the chains whole, 1.2 to 1.7 times faster.
CHAIN = 192
CHAIN_OF_FEW_ROWS = 384
FEW_ROWS = 64
# rows that go through a cut product together: the partial sums then stay in the cache
BLOCK = 512
QUICK = 1.702

Operator = Callable[..., Tensor]


class Layout(NamedTuple):
    """A weight as products read it: [N, K] in parts of `step` terms."""

    step: int
    parts: list[Tensor]


def _layout(weight: Tensor, rows: int | None) -> Layout:
    """weight: [N, K], float32 or bfloat16.   rows: of the one product it is for; None: it is kept for any."""
    # a strided weight would take oneDNN's reference reorder, a thousand times slower than a copy
    weight = weight.contiguous()
    terms = weight.shape[1]
    cut = weight.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    n_parts = -(-terms // (CHAIN_OF_FEW_ROWS if rows is not None and rows <= FEW_ROWS else CHAIN)) if cut else 1
    step = terms if n_parts == 1 else -(-terms // (64 * n_parts)) * 64
    parts = [part.contiguous() for part in weight.split(step, dim=1)]
    if rows is None or (rows > BLOCK and n_parts > 1):
        parts = [compat.reorder_linear_weight(part, BLOCK) for part in parts]
    return Layout(step, parts)


def _kept_layout(weight: Tensor, precision: str) -> Layout:
    """precision: what torch.get_float32_matmul_precision says, on which the layout depends."""
    return _layout(weight.float() if weight.dtype == torch.float16 else weight, None)


class Product:
    """x @ weight.T + bias, the weight cut into chains (and laid out for oneDNN) for one call, or kept so."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int):
        # a strided bias is read as if it were not
        self.bias = None if bias is None else bias.contiguous()
        precision = torch.get_float32_matmul_precision()
        layout: Layout = kept.layout(weight, _kept_layout, precision) or _layout(weight, rows)
        self.step, self.weights = layout

    def __call__(self, x: Tensor, post: str = "none", form: str = "", add: Tensor | None = None) -> Tensor:
        """x: [M, K].   post, form: oneDNN's name of the activation, fused.   add: [M, N], added instead of one."""
        if len(self.weights) == 1:
            if add is None:
                return compat.linear_pointwise(x, self.weights[0], self.bias, post, [], form)
            return compat.linear_pointwise_binary(x, add, self.weights[0], self.bias, "add")
        y, bias = add, self.bias
        for part, weight in zip(x.split(self.step, dim=1), self.weights, strict=True):
            if y is None:
                y = compat.linear_pointwise(part.contiguous(), weight, bias, "none", [], "")
            else:
                y = compat.linear_pointwise_binary(part.contiguous(), y, weight, bias, "add")
            bias = None
        return _ACTIVATE[post](y)


_ACTIVATE = {"none": lambda y: y, "swish": lambda y: F.silu(y, inplace=True), "gelu": F.gelu}


def _widened(position: int) -> Callable[[Operator], Operator]:
    """float16 through float32: few CPUs multiply float16, and elsewhere PyTorch falls to some 10 GFLOP/s.

    position: of the argument whose dtype the result takes.
    """

    def decorate(operator: Operator) -> Operator:
        @functools.wraps(operator)
        def run(*arguments: Any) -> Tensor:
            if arguments[position].dtype != torch.float16:
                return operator(*arguments)
            halves = (
                isinstance(value, Tensor) and value.dtype == torch.float16 and not kept.is_kept(value)
                for value in arguments
            )
            wide = (value.float() if half else value for value, half in zip(arguments, halves, strict=True))
            return operator(*wide).half()

        return run

    return decorate


def _blocks(x: Tensor, product: Product) -> tuple[Tensor, ...]:
    return x.split(BLOCK) if len(product.weights) > 1 and len(x) > BLOCK else (x,)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@_widened(1)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    product = Product(weight, bias, len(rows))
    blocks = _blocks(rows, product)
    if residual is not None and activation is None:
        adds = _blocks(residual.reshape(-1, len(weight)), product)
        y = _joined([product(block, add=add) for block, add in zip(blocks, adds, strict=True)])
        return y.view(*x.shape[:-1], len(weight))
    post, form = ("gelu", "none") if activation == "gelu" else ("none", "")
    y = _joined([product(block, post, form) for block in blocks]).view(*x.shape[:-1], len(weight))
    if activation == "quick_gelu":
        y.mul_(torch.sigmoid(QUICK * y))
    return y if residual is None else y.add_(residual)


@_widened(0)
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
) -> Tensor:
    # QuickGELU(h) = SiLU(1.702 h) / 1.702, and oneDNN fuses SiLU. The factor goes through the LayerNorm's weight and
    # the biases, vectors of W numbers scaled on each call, so that no weight matrix is rounded again or kept twice.
    post, form, factor = ("swish", "", QUICK) if activation == "quick_gelu" else ("gelu", "none", 1.0)
    wide = eager.statistics_dtype(x.dtype)
    y = eager.layer_norm(x, norm_weight.to(wide) * factor, norm_bias.to(wide) * factor, eps).view(-1, x.shape[-1])
    fc1, fc2 = Product(fc1_weight, fc1_bias * factor, len(y)), Product(fc2_weight, fc2_bias * factor, len(y))
    out = _joined([fc2(fc1(block, post, form)) for block in _blocks(y, fc2)]).view(x.shape)
    return torch.add(x, out, alpha=1 / factor, out=out)


@_widened(1)
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
    pixels = eager.to_weight_dtype(images, weight, mean, std)
    y = linear(eager.patches(pixels, weight.shape[-1]), weight.flatten(1), None, None, None)
    # no copy of the tokens
    tokens = y.new_empty(len(images), len(positional_embedding), len(weight))
    positional_embedding = positional_embedding.to(y.dtype)
    tokens[:, 0] = class_embedding.to(y.dtype) + positional_embedding[0]
    torch.add(y, positional_embedding[1:], out=tokens[:, 1:])
    return tokens if norm_weight is None else eager.layer_norm(tokens, norm_weight, norm_bias, eps)


def project(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, eps: float) -> Tensor:
    # one row per sample: one precision up costs under 0.1 % of a tower, and pays for what the fused products round more
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    norm = F.layer_norm(x.to(wide), (x.shape[-1],), norm_weight.to(wide), norm_bias.to(wide), eps)
    return (norm @ projection.to(wide)).to(x.dtype)
