"""The sizes of OpenAI's nine models, as arguments of `clipfast.CLIP` (Radford et al. 2021, tables 19 and 20)."""

from __future__ import annotations

from typing import Any

VOCABULARY = 49408


def _sizes(
    embed_dim: int,
    resolution: int,
    layers: int | tuple[int, ...],
    width: int,
    patch: int | None,
    text_width: int,
) -> dict[str, Any]:
    """What all nine share is filled in."""
    return {
        "embed_dim": embed_dim,
        "image_resolution": resolution,
        "vision_layers": layers,
        "vision_width": width,
        "vision_patch_size": patch,
        "context_length": 77,
        "vocab_size": VOCABULARY,
        "transformer_width": text_width,
        "transformer_heads": text_width // 64,
        "transformer_layers": 12,
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "RN50": _sizes(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": _sizes(512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": _sizes(640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": _sizes(768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": _sizes(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": _sizes(512, 224, 12, 768, 32, 512),
    "ViT-B/16": _sizes(512, 224, 12, 768, 16, 512),
    "ViT-L/14": _sizes(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": _sizes(768, 336, 24, 1024, 14, 768),
}
