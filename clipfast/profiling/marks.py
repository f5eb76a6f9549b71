"""Names for a profiler: while `marked` is open, every operator and every layer of a model is a range in the trace.

Outside of it nothing is wrapped, so that it costs nobody anything.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from clipfast import dispatch, ops, roofline
from clipfast.blocks import Block
from clipfast.model import ResidualAttentionBlock
from clipfast.packing import Rows
from clipfast.roofline import Work

PREFIX = "clipfast::"
OUTSIDE = "outside the blocks"


class Call(NamedTuple):
    """One call of an operator: its range in the trace, in which pass, where in the model, and the least work of it."""

    name: str
    number: int
    operator: str
    layer: str
    works: list[Work]


class Marks:
    """The calls made while `marked` was open, in order.   number: of the pass, which whoever counts passes sets."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.number = 0
        self.layer = OUTSIDE


@contextlib.contextmanager
def marked(model: nn.Module) -> Iterator[Marks]:
    """Inside, operators are ranges "clipfast::<operator> <number>" that know the block they are called in.

    Blocks that a CPU computes in one call are their operators one by one here, or none of them would be seen.
    """
    marks, run = Marks(), ops.run
    # a block is known by its first matrix
    layers = {id(block.attn.in_proj_weight): name for name, block in _blocks(model)}

    def marked_run(operator: str, x: Tensor, tensors: tuple[Tensor | None, ...], *arguments: Any) -> Any:
        name = f"{PREFIX}{operator} {len(marks.calls)}"
        marks.calls.append(Call(name, marks.number, operator, marks.layer, works_of_call(operator, *arguments)))
        with record_function(name):
            return run(operator, x, tensors, *arguments)

    def marked_block(by_operators: Callable[..., Tensor], x: Tensor, rows: Rows, block: Block, *of: Any) -> Tensor:
        marks.layer = layers.get(id(block.weights.qkv_weight), OUTSIDE)
        try:
            with record_function(f"{PREFIX}layer {marks.layer}"):
                return by_operators(x, rows, block, *of)
        finally:
            marks.layer = OUTSIDE

    def patched(name: str) -> Any:
        return mock.patch.object(ops, name, functools.partial(marked_block, getattr(ops, name)))

    with (
        mock.patch.object(ops, "run", marked_run),
        mock.patch.object(dispatch, "whole_blocks", return_value=None),
        patched("block_by_operators"),
        patched("pooled_block_by_operators"),
    ):
        yield marks


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, ResidualAttentionBlock):
            tower = "image" if name.startswith("visual.") else "text"
            yield f"{tower} block {int(name.rpartition('.')[2]):2d}", module


# ---------------------------------------------------------------------------------------------------------------------
# The least work of a call, from the arguments that `clipfast.dispatch.run` hands to a backend


def works_of_call(operator: str, *arguments: Any) -> list[Work]:
    """The launches that this call cannot do without."""
    return _WORKS[operator](*arguments)


def _rows(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Any, activation: Any, residual: Tensor | None) -> list[Work]:
    n_cols, n_terms = weight.shape
    return roofline.linear(_rows(x), n_cols, n_terms, x.element_size(), residual=residual is not None)


def _attention(qkv: Tensor, rows: Rows, causal: bool, scale: Any) -> list[Work]:
    return roofline.attention(rows.lengths, qkv.shape[2] * qkv.shape[3], qkv.element_size(), causal=causal)


def _patch_embed(images: Tensor, weight: Tensor, first: Tensor, positions: Tensor, *_: Any) -> list[Work]:
    sizes = (len(images), len(positions) - 1, weight.shape[-1], len(weight))
    return roofline.patch_embed(*sizes, images.element_size(), weight.element_size())


_WORKS: dict[str, Callable[..., list[Work]]] = {
    "layer_norm": lambda x, w, b, eps, residual: roofline.layer_norm(
        _rows(x), x.shape[-1], x.element_size(), residual=residual is not None
    ),
    "linear": _linear,
    "mlp": lambda x, nw, nb, w1, *_: roofline.mlp(_rows(x), x.shape[-1], len(w1), x.element_size()),
    "attention": _attention,
    "attention_pool": lambda query, tokens, rows, *rest: roofline.attention_pool(
        rows.lengths, tokens.shape[-1], rest[-1], tokens.element_size()
    ),
    "patch_embed": _patch_embed,
    "project": lambda x, nw, nb, projection, eps: roofline.project(
        _rows(x), x.shape[-1], projection.shape[-1], x.element_size()
    ),
    "logits": lambda images, texts, scale: roofline.logits(
        len(images), len(texts), images.shape[-1], images.element_size()
    ),
}


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
