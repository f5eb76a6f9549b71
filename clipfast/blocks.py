"""What a residual attention block is made of, and a stack of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Block", "BlockWeights", "Projection", "Stack"]


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


class Projection(NamedTuple):
    """What takes pooled rows into the shared embedding space: LayerNorm(x) @ weight."""

    norm_weight: Tensor  # [W]
    norm_bias: Tensor  # [W]
    weight: Tensor  # [W, E]
    eps: float = 1e-5


class Stack(tuple[Block, ...]):
    """Blocks one after the other, and what was found out about their tensors.

    A caller who keeps a Stack and passes it again has its tensors checked in a few calls of C.
    """

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Stack:
        return blocks if isinstance(blocks, cls) else cls(blocks)

    def __reduce__(self) -> tuple[type[Stack], tuple[tuple[Block, ...]]]:
        """A copy knows nothing of its tensors yet: what was found out holds addresses of the old ones."""
        return type(self), (tuple(self),)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All that are there, block by block."""
        return [tensor for block in self for tensor in block.weights if tensor is not None]

    @cached_property
    def matrices(self) -> list[Tensor]:
        parts = ("qkv_weight", "out_weight", "fc1_weight", "fc2_weight")
        return [getattr(block.weights, part) for block in self for part in parts]

    @cached_property
    def _last(self) -> tuple[list[list[Any]], dict[Hashable, Any]]:
        return [], {}

    @property
    def found(self) -> dict[Hashable, Any]:
        """What was found out about the tensors as they were at the last `look`. Keys: all else that it depends on."""
        return self._last[1]

    def look(self) -> None:
        """Compares the tensors with those of the last `look`, and forgets what was found if one is not the same.

        Compared are address, shape, strides, dtype, device and PyTorch's negative bit, not the numbers in them.
        """
        now = [[*map(fact, self.tensors)] for fact in _FACTS]
        if now != self._last[0]:
            # A new dictionary: another thread may still write what it found out about the tensors as they were.
            self._last = now, {}


_FACTS = (Tensor.data_ptr, Tensor.size, Tensor.stride, attrgetter("dtype"), attrgetter("device"), Tensor.is_neg)
