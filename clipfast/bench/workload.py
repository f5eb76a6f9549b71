"""What is computed: the published architectures, seeded weights and inputs, the exact answer, the FLOPs.

Nothing is downloaded: sizes are those of the published models, weights are random. The speed of a dense product does
not depend on the numbers in it, and every contestant is checked on the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipfast import CLIP, reference

TOWERS = ("image", "text")
# samples of a batch that are compared with the reference, spread evenly over it; float64 takes seconds for each dozen
CHECKED = 32


def _architecture(
    embed_dim: int,
    resolution: int,
    layers: int | tuple[int, ...],
    width: int,
    patch: int | None,
    text_width: int,
) -> dict[str, Any]:
    """openai/CLIP's constructor arguments; what all nine models share is filled in."""
    return {
        "embed_dim": embed_dim,
        "image_resolution": resolution,
        "vision_layers": layers,
        "vision_width": width,
        "vision_patch_size": patch,
        "context_length": 77,
        "vocab_size": 49408,
        "transformer_width": text_width,
        "transformer_heads": text_width // 64,
        "transformer_layers": 12,
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-B/32": _architecture(512, 224, 12, 768, 32, 512),
    "ViT-B/16": _architecture(512, 224, 12, 768, 16, 512),
    "ViT-L/14": _architecture(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": _architecture(768, 336, 24, 1024, 14, 768),
    "RN50": _architecture(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": _architecture(512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": _architecture(640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": _architecture(768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": _architecture(1024, 448, (3, 15, 36, 10), 128, None, 1024),
}


class Captions(NamedTuple):
    """Shortest and longest caption in tokens, start and end of text included; lengths are uniform between."""

    shortest: int
    longest: int

    @staticmethod
    def parse(text: str) -> Captions:
        """From "8-24" or "77". Raises ValueError for anything else."""
        first, _, last = text.partition("-")
        captions = Captions(int(first), int(last or first))
        if not 2 <= captions.shortest <= captions.longest:
            raise ValueError(f"captions: expected 2 <= shortest <= longest, got {text!r}")
        return captions

    def __str__(self) -> str:
        return str(self.longest) if self.shortest == self.longest else f"{self.shortest}-{self.longest}"


def random_weights(architecture: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A float32 state dict of this architecture in which every parameter and statistic has its own value.

    Matrices keep the size of what passes through them (standard deviation fan_in ** -0.5), so that depth neither
    drowns nor blows up the signal; biases and normalisations are random too, since zeros and ones hide mistakes.
    """
    with torch.device("meta"):
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in CLIP(**architecture).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (shape, dtype) in shapes.items():
        if name == "logit_scale" or not dtype.is_floating_point:
            weights[name] = torch.full(shape, 4.6 if dtype.is_floating_point else 0, dtype=dtype)
            continue
        noise = torch.randn(shape, generator=generator)
        if "embedding" in name:
            weights[name] = 0.02 * noise
        elif name.endswith("running_var"):
            weights[name] = 1 + 0.2 * noise.abs()
        elif len(shape) > 1:
            # projections are stored [in, out], everything else [out, in, ...]
            fan_in = shape[0] if name in ("text_projection", "visual.proj") else shape[1:].numel()
            weights[name] = noise * fan_in**-0.5
        elif name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        else:
            weights[name] = 0.1 * noise
    return weights


def rounded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The numbers that openai/CLIP's `convert_weights` leaves of the weights in this dtype, written as float32.

    Normalisations, embeddings and logit_scale are not rounded.
    """
    kept = ("ln_", "bn", "downsample.1", "embedding", "logit_scale")
    return {n: w if any(part in n for part in kept) else w.to(dtype).to(w.dtype) for n, w in weights.items()}


def inputs(architecture: Mapping[str, Any], batch: int, captions: Captions, seed: int = 1) -> dict[str, Tensor]:
    """Both towers' inputs.

    Returns: "image": [B, 3, R, R] float32, standard normal.   "text": [B, context] int64, captions of random ids
             between start and end of text (the two greatest ids), zero padded; their lengths are even over the range.
    Raises:  ValueError if a caption is longer than the context.
    """
    context, end = architecture["context_length"], architecture["vocab_size"] - 1
    if captions.longest > context:
        raise ValueError(f"captions: at most {context} tokens, got {captions}")
    generator = torch.Generator().manual_seed(seed)
    resolution = architecture["image_resolution"]
    images = torch.randn(batch, 3, resolution, resolution, generator=generator)
    text = torch.randint(1, end - 1, (batch, context), generator=generator)
    # spread evenly, then shuffled: drawn ones would have another mean in every small batch
    steps = (torch.arange(batch) * 2 + 1) * (captions.longest - captions.shortest + 1) // (2 * batch)
    last = (captions.shortest + steps - 1)[torch.randperm(batch, generator=generator), None]
    column = torch.arange(context)
    text[:, 0] = end - 1
    text = torch.where(column < last, text, torch.where(column == last, end, 0))
    return {"image": images, "text": text}


def checked_samples(batch: int) -> Tensor:
    """Indices of the samples that are compared with the reference, int64."""
    return torch.linspace(0, batch - 1, min(batch, CHECKED)).round().long()


def exact(tower: str, weights: Mapping[str, Tensor], data: Tensor, dtype: torch.dtype) -> Tensor:
    """What a perfect computer would return for the checked samples: float64 on weights and images rounded to dtype."""
    chosen = data[checked_samples(len(data))]
    if tower == "image":
        return reference.encode_image(rounded(weights, dtype), chosen.to(dtype))
    return reference.encode_text(rounded(weights, dtype), chosen)


def flops(architecture: Mapping[str, Any], tower: str) -> int:
    """Floating-point operations that openai/CLIP spends on one sample in matrix products and convolutions.

    A multiplication and an addition count as two. The count is dense: padding, masked scores and rows that nobody
    reads are in it, because openai/CLIP computes them. For a transformer of width W on L tokens, with N layers:
    N * (24 L W^2 + 4 L^2 W), then the projection of one row, and for images the patch embedding.
    """
    if tower == "text":
        length, width, layers = (architecture[k] for k in ("context_length", "transformer_width", "transformer_layers"))
        return layers * _block_flops(length, width) + 2 * width * architecture["embed_dim"]
    if architecture["vision_patch_size"] is None:
        return _resnet_flops(architecture)
    width, patch = architecture["vision_width"], architecture["vision_patch_size"]
    grid = (architecture["image_resolution"] // patch) ** 2
    embedding, projection = 2 * grid * 3 * patch**2 * width, 2 * width * architecture["embed_dim"]
    return embedding + architecture["vision_layers"] * _block_flops(1 + grid, width) + projection


def _block_flops(length: int, width: int) -> int:
    # queries, keys, values: 6; output: 2; MLP: 8 + 8.   scores and their product with the values: 2 + 2
    return 24 * length * width**2 + 4 * length**2 * width


def _resnet_flops(architecture: Mapping[str, Any]) -> int:
    def convolution(side: int, channels_in: int, channels_out: int, kernel: int) -> int:
        return 2 * side**2 * channels_in * channels_out * kernel**2

    width, side = architecture["vision_width"], architecture["image_resolution"] // 2
    total = convolution(side, 3, width // 2, 3) + convolution(side, width // 2, width // 2, 3)
    total += convolution(side, width // 2, width, 3)
    side, channels = side // 2, width
    for layer, blocks in enumerate(architecture["vision_layers"]):
        planes = width << layer
        for block in range(blocks):
            # an average pool before the last convolution strides the first block of layers 2 to 4
            after = side // 2 if layer and not block else side
            total += convolution(side, channels, planes, 1) + convolution(side, planes, planes, 3)
            total += convolution(after, planes, 4 * planes, 1)
            total += 0 if block else convolution(after, channels, 4 * planes, 1)
            side, channels = after, 4 * planes
    length = side**2 + 1
    # the attention pool: queries, keys and values of every position, attention, output projection
    total += 6 * length * channels**2 + 4 * length**2 * channels
    return total + 2 * length * channels * architecture["embed_dim"]
