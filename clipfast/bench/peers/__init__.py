"""One adapter for each contestant: the same weights and inputs, called the way its own documentation says.

An adapter builds its model once and returns, for each tower, the calls to time. What a tokenizer or image processor
hands over (padding, attention mask, dtype) is prepared here and not timed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import clipfast
from clipfast.checkpoints import to_huggingface
from tests import peers as installed

OURS = "clipfast"
OPENAI = "openai-clip"
# what the column vs_transformers compares with, by tower
TRANSFORMERS = {"image": "transformers", "text": "transformers, pad longest"}


class Task(NamedTuple):
    """weights: float32, under openai/CLIP's names.   images: [B, 3, R, R] float32.   text: [B, context] int64."""

    weights: Mapping[str, Tensor]
    architecture: Mapping[str, Any]
    dtype: torch.dtype
    images: Tensor
    text: Tensor


# tower -> contestant -> call that returns its [B, E]
Calls = dict[str, dict[str, Callable[[], Tensor]]]


class Missing(Exception):
    """The peer is not installed, or does not import; the text says which."""


def _module(load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except (pytest.skip.Exception, pytest.fail.Exception) as outcome:
        raise Missing(str(outcome).partition(" (CLIPFAST")[0]) from outcome


def _call(
    mode: Callable[[], AbstractContextManager], function: Callable[..., Tensor], *arguments: Tensor
) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with mode():
            return function(*arguments)

    return call


def _clipfast(task: Task) -> Calls:
    model = clipfast.build_model(task.weights)
    if task.dtype != torch.float32:
        clipfast.convert_weights(model, task.dtype)
    return {
        "image": {OURS: _call(torch.no_grad, model.encode_image, task.images.to(task.dtype))},
        "text": {OURS: _call(torch.no_grad, model.encode_text, task.text.int())},
    }


def _openai(task: Task) -> torch.nn.Module:
    # not its build_model: that rounds float32 weights through float16, and has no bfloat16
    model = _module(installed.openai_clip).model.CLIP(**task.architecture)
    model.load_state_dict(task.weights)
    if task.dtype != torch.float32:
        clipfast.convert_weights(model, task.dtype)
    return model.eval()


def _openai_clip(task: Task) -> Calls:
    model = _openai(task)
    return {
        "image": {OPENAI: _call(torch.no_grad, model.encode_image, task.images.to(task.dtype))},
        "text": {OPENAI: _call(torch.no_grad, model.encode_text, task.text.int())},
    }


def _openai_clip_compiled(task: Task) -> Calls:
    model, name = _openai(task), f"{OPENAI} torch.compile"
    return {
        "image": {name: _call(torch.no_grad, torch.compile(model.encode_image), task.images.to(task.dtype))},
        "text": {name: _call(torch.no_grad, torch.compile(model.encode_text), task.text.int())},
    }


def _open_clip(task: Task) -> Calls:
    """As create_model(..., precision="bf16") sets it up: LayerNorm and embeddings in float32, the rest cast."""
    library, sizes = _module(installed.open_clip), task.architecture
    half = task.dtype != torch.float32
    model = library.model.CLIP(
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
        cast_dtype=task.dtype if half else None,
    )
    model.load_state_dict(task.weights)
    if half:
        library.model.convert_weights_to_lp(model, dtype=task.dtype)
    model.eval()
    return {
        "image": {"open_clip": _call(torch.no_grad, model.encode_image, task.images.to(task.dtype))},
        "text": {"open_clip": _call(torch.no_grad, model.encode_text, task.text)},
    }


def _transformers(task: Task) -> Calls:
    """CLIPModel with SDPA attention, cast whole; ids and attention mask as its tokenizer returns them."""
    library, sizes = _module(installed.transformers_clip), task.architecture
    weights = to_huggingface(task.weights)  # refuses a ResNet
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
        attn_implementation="sdpa",
    )
    model = library.CLIPModel(config)
    model.load_state_dict(weights)
    model.to(task.dtype).eval()

    def encode_image(pixel_values: Tensor) -> Tensor:
        return _pooled(model.get_image_features(pixel_values=pixel_values))

    def encode_text(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _pooled(model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))

    context = sizes["context_length"]
    lengths = task.text.argmax(dim=-1, keepdim=True) + 1
    mask = (torch.arange(context) < lengths).long()
    longest = int(lengths.max())
    cut = [ids[:, :longest].contiguous() for ids in (task.text, mask)]
    text = {
        f"transformers, pad {context}": _call(torch.inference_mode, encode_text, task.text, mask),
        TRANSFORMERS["text"]: _call(torch.inference_mode, encode_text, *cut),
    }
    images = task.images.to(task.dtype)
    return {"image": {TRANSFORMERS["image"]: _call(torch.inference_mode, encode_image, images)}, "text": text}


def _pooled(features: Any) -> Tensor:
    # releases before 5 return the tensor itself
    return features if isinstance(features, Tensor) else features.pooler_output


# distribution -> adapter; what follows a space in a name is not part of the distribution's
ADAPTERS: dict[str, Callable[[Task], Calls]] = {
    OURS: _clipfast,
    OPENAI: _openai_clip,
    "open_clip_torch": _open_clip,
    "transformers": _transformers,
}
COMPILED: dict[str, Callable[[Task], Calls]] = {f"{OPENAI} torch.compile": _openai_clip_compiled}


def version(adapter: str) -> str:
    """The version of an adapter's distribution, empty if it is not installed."""
    distribution = adapter.partition(" ")[0]
    if distribution == OURS:
        return clipfast.__version__
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
