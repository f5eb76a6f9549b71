"""A model small enough to benchmark in a test, and its place among the published ones."""

from __future__ import annotations

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import workload

TINY = {
    **ARCHITECTURES["ViT-B/32"],
    **{"embed_dim": 32, "image_resolution": 64, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 16},
    **{"context_length": 30, "vocab_size": 99, "transformer_width": 128, "transformer_heads": 2},
    "transformer_layers": 2,
}
TINY_RESNET = {**TINY, "vision_layers": (1, 2, 1, 1), "vision_width": 8, "vision_patch_size": None}
# with OpenAI's own vocabulary, for captions that are tokenised
WORDS = {**TINY, "context_length": 77, "vocab_size": workload.VOCABULARY}
