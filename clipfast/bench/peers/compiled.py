"""openai/CLIP through compilers of whole graphs: torch.compile, and TensorRT by way of it.

Sizes are static, as their documentation advises for speed, so every batch size is compiled anew.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.bench.peers import LAST, OPENAI, Batch, Calls, Peer, Prepare, Spec, call, module, openai

NAME = f"{OPENAI} torch.compile"


def build(spec: Spec, name: str, **how: Any) -> Prepare:
    """how: torch.compile's arguments."""
    made = openai.shared(spec)

    def prepare(tower: str, batch: Batch) -> Calls:
        images, text = batch.images.to(spec.dtype), batch.text.int()
        if tower == "image":
            return {name: compiled(made.encode_image, images, **how)}
        if tower == "text":
            return {name: compiled(made.encode_text, text, **how)}
        return {name: compiled(functools.partial(_logits, made), images, text, **how)}

    return prepare


def compiled(function: Any, *arguments: Tensor, **how: Any) -> Any:
    """The call; the first time that it is called it compiles."""
    return call(torch.no_grad, torch.compile(function, dynamic=False, **how), *arguments)


def _logits(made: nn.Module, images: Tensor, text: Tensor) -> Tensor:
    return made(images, text)[0]


def _inductor(spec: Spec) -> Prepare:
    if spec.device.type == "cuda":
        return build(spec, NAME, mode="max-autotune")
    # freezing lays the weights out for oneDNN's products at compile time
    return build(spec, NAME, options={"freezing": True})


def _max_autotune(spec: Spec) -> Prepare:
    return build(spec, AUTOTUNED, options={"freezing": True, "max_autotune": True})


def _tensorrt(spec: Spec) -> Prepare:
    """Strongly typed: every layer in the dtype that its weights have. Not yet run on a GPU."""
    module("torch_tensorrt", "torch-tensorrt")
    return build(spec, TENSORRT, backend="tensorrt", options={"use_explicit_typing": True, "min_block_size": 1})


AUTOTUNED = f"{NAME} max-autotune, cpu"
TENSORRT = f"{OPENAI} TensorRT"
PEERS = (
    Peer(NAME, "torch", _inductor, prepares=1.5, rank=LAST),
    Peer(AUTOTUNED, "torch", _max_autotune, prepares=20.0, rank=LAST, devices=("cpu",), usual=False),
    Peer(TENSORRT, "torch-tensorrt", _tensorrt, prepares=5.0, rank=LAST, devices=("cuda",)),
)
