"""What a residual attention block is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Block", "BlockWeights"]


class BlockWeights(NamedTuple):
    """The tensors of a residual attention block of width W, in the order in which it uses them."""

    norm_1_weight: Tensor  # [W]
    norm_1_bias: Tensor  # [W]
    qkv_weight: Tensor  # [3 W, W]: queries, keys, values
    qkv_bias: Tensor | None  # [3 W]
    out_weight: Tensor  # [W, W]
    out_bias: Tensor | None  # [W]
    norm_2_weight: Tensor  # [W]
    norm_2_bias: Tensor  # [W]
    fc1_weight: Tensor  # [F, W]
    fc1_bias: Tensor  # [F]
    fc2_weight: Tensor  # [W, F]
    fc2_bias: Tensor  # [W]


class Block(NamedTuple):
    """A residual attention block: y = x + out(attention(qkv(norm_1(x)))), then y + fc2(activation(fc1(norm_2(y))))."""

    weights: BlockWeights
    heads: int
    activation: str = "quick_gelu"  # or "gelu"
    eps: tuple[float, float] = (1e-5, 1e-5)  # of both LayerNorms
