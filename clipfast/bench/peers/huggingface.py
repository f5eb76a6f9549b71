"""transformers' CLIPModel, cast whole; ids and attention mask as its tokenizer returns them.

Text is padded to the context (`padding="max_length"`, what CLIP's processor is documented with) and to the longest
caption (`padding=True`): two contestants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.bench.peers import (
    THIRD,
    TRANSFORMERS,
    Batch,
    Call,
    Calls,
    Missing,
    Peer,
    Prepare,
    Spec,
    call,
    module,
    uninitialised,
)
from clipfast.checkpoints import to_huggingface


def model(spec: Spec, attention: str) -> nn.Module:
    """In eval mode on the spec's device. Raises ValueError for a ResNet, which it does not have."""
    library, sizes = module("transformers", "transformers"), spec.architecture
    weights = to_huggingface(spec.weights)  # refuses a ResNet
    width, text_width = sizes["vision_width"], sizes["transformer_width"]
    config = library.CLIPConfig(
        text_config={
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_attention_heads": sizes["transformer_heads"],
            "num_hidden_layers": sizes["transformer_layers"],
            "vocab_size": sizes["vocab_size"],
            "max_position_embeddings": sizes["context_length"],
            "bos_token_id": sizes["vocab_size"] - 2,
            "eos_token_id": sizes["vocab_size"] - 1,
            "hidden_act": "quick_gelu",
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": max(1, width // 64),
            "num_hidden_layers": sizes["vision_layers"],
            "image_size": sizes["image_resolution"],
            "patch_size": sizes["vision_patch_size"],
            "hidden_act": "quick_gelu",
        },
        projection_dim=sizes["embed_dim"],
        attn_implementation=attention,
    )
    with spec.device, uninitialised():
        made = library.CLIPModel(config)
    made.load_state_dict(weights)
    return made.to(spec.dtype).eval().to(spec.device)


def build(spec: Spec, attention: str = "sdpa", suffix: str = "", compiled: Mapping[str, Any] | None = None) -> Prepare:
    """suffix: behind each contestant's name.   compiled: torch.compile's arguments, for all that is called."""
    made = model(spec, attention)
    context = spec.architecture["context_length"]
    # torch.compile refuses inference mode
    mode = torch.inference_mode if compiled is None else torch.no_grad

    def encode_image(pixel_values: Tensor) -> Tensor:
        return _pooled(made.get_image_features(pixel_values=pixel_values))

    def encode_text(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _pooled(made.get_text_features(input_ids=input_ids, attention_mask=attention_mask))

    def both(pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = made(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        return output.logits_per_image

    def timed(function: Callable[..., Tensor], *arguments: Tensor) -> Call:
        whole = function if compiled is None else torch.compile(function, dynamic=False, **compiled)
        return call(mode, whole, *arguments)

    def prepare(tower: str, batch: Batch) -> Calls:
        images = batch.images.to(spec.dtype)
        if tower == "image":
            return {TRANSFORMERS["image"] + suffix: timed(encode_image, images)}
        lengths = batch.text.argmax(dim=-1, keepdim=True) + 1
        mask = (torch.arange(context, device=lengths.device) < lengths).long()
        cut = [ids[:, : int(lengths.max())].contiguous() for ids in (batch.text, mask)]
        if tower == "both":
            return {TRANSFORMERS["both"] + suffix: timed(both, images, *cut)}
        return {
            f"transformers, pad {context}{suffix}": timed(encode_text, batch.text, mask),
            TRANSFORMERS["text"] + suffix: timed(encode_text, *cut),
        }

    return prepare


def _pooled(features: Any) -> Tensor:
    # releases before 5 return the tensor itself
    return features if isinstance(features, Tensor) else features.pooler_output


def _flash(spec: Spec) -> Prepare:
    """Not yet run on a GPU."""
    if spec.dtype == torch.float32:
        raise Missing("flash-attn has no float32")
    module("flash_attn", "flash-attn")
    return build(spec, "flash_attention_2", ", flash-attn")


PEER = Peer("transformers", "transformers", functools.partial(build), rank=THIRD)
FLASH = Peer(
    "transformers flash-attn", "flash-attn", _flash, rank=THIRD, devices=("cuda",), dtypes=("bfloat16", "float16")
)
