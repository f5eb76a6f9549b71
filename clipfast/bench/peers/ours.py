"""clipfast itself, and with its weights packed ahead."""

from __future__ import annotations

import functools

import torch
from torch import nn

from clipfast.bench.peers import OURS, PREPACKED, Batch, Calls, Peer, Prepare, Spec, call, uninitialised
from clipfast.model import build_model, convert_weights


def model(spec: Spec) -> nn.Module:
    """In eval mode on the spec's device; half precision as openai/CLIP's `convert_weights` makes it."""
    with spec.device, uninitialised():
        made = build_model(spec.weights)
    if spec.dtype != torch.float32:
        convert_weights(made, spec.dtype)
    return made.to(spec.device)


def prepare(made: nn.Module, name: str, tower: str, batch: Batch) -> Calls:
    """Calls of a model with openai/CLIP's methods."""
    images, text = batch.images.to(made.visual.conv1.weight.dtype), batch.text.int()
    if tower == "image":
        return {name: call(torch.no_grad, made.encode_image, images)}
    if tower == "text":
        return {name: call(torch.no_grad, made.encode_text, text)}
    return {name: call(torch.no_grad, lambda *pair: made(*pair)[0], images, text)}


def build(spec: Spec) -> Prepare:
    return functools.partial(prepare, model(spec), OURS)


def build_prepacked(spec: Spec) -> Prepare:
    made = model(spec).prepack_weights()
    sizes = spec.architecture
    with torch.no_grad():  # the layouts are made in the first call
        made.encode_image(torch.zeros(1, 3, *[sizes["image_resolution"]] * 2))
        made.encode_text(torch.tensor([[sizes["vocab_size"] - 1]]))
    return functools.partial(prepare, made, PREPACKED)


PEER = Peer(OURS, OURS, build)
PACKED = Peer(PREPACKED, OURS, build_prepacked, devices=("cpu",))
