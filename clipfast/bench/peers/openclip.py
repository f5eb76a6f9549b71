"""open_clip, as create_model(..., precision="bf16") sets it up: LayerNorm and embeddings in float32, the rest cast."""

from __future__ import annotations

import torch
from torch import nn

from clipfast.bench.peers import Batch, Calls, Peer, Prepare, Spec, call, module, uninitialised

NAME = "open_clip"


def model(spec: Spec) -> nn.Module:
    """In eval mode on the spec's device."""
    library, sizes = module("open_clip", "open_clip_torch"), spec.architecture
    half = spec.dtype != torch.float32
    with spec.device, uninitialised():
        made = library.model.CLIP(
            embed_dim=sizes["embed_dim"],
            vision_cfg={
                "image_size": sizes["image_resolution"],
                "layers": sizes["vision_layers"],
                "width": sizes["vision_width"],
                "patch_size": sizes["vision_patch_size"],
            },
            text_cfg={
                "context_length": sizes["context_length"],
                "vocab_size": sizes["vocab_size"],
                "width": sizes["transformer_width"],
                "heads": sizes["transformer_heads"],
                "layers": sizes["transformer_layers"],
            },
            quick_gelu=True,
            cast_dtype=spec.dtype if half else None,
        )
    made.load_state_dict(spec.weights)
    if half:
        library.model.convert_weights_to_lp(made, dtype=spec.dtype)
    return made.eval().to(spec.device)


def build(spec: Spec) -> Prepare:
    made = model(spec)

    def prepare(tower: str, batch: Batch) -> Calls:
        images = batch.images.to(spec.dtype)
        if tower == "image":
            return {NAME: call(torch.no_grad, made.encode_image, images)}
        if tower == "text":
            return {NAME: call(torch.no_grad, made.encode_text, batch.text)}
        return {NAME: call(torch.no_grad, lambda *pair: made.get_logits(*pair)[0], images, batch.text)}

    return prepare


PEER = Peer(NAME, "open_clip_torch", build)
