"""What a model accepts: checks of images and token ids, each error naming the argument, what was wanted, what came."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clipfast.preprocess import MEAN, STD, normalize


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def is_here(device: torch.device) -> bool:
    """Whether PyTorch sees this GPU; of other kinds of devices it is taken for granted."""
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()


def check_same_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Raises RuntimeError if the input is not where the model is."""
    if isinstance(tensor, Tensor) and tensor.device != weight.device:
        raise RuntimeError(f"{name} is on {tensor.device} but the model is on {weight.device}; move one of them")


def check_images(images: Tensor, weight: Tensor) -> None:
    """Raises TypeError, ValueError or RuntimeError naming what is wrong with images [B, C, H, W]."""
    channels = weight.shape[1]
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images must be [B, {channels}, H, W], got {list(images.shape)}")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be floating (preprocessed) or uint8 (0 to 255), got {images.dtype}")
    check_same_device("image", images, weight)


def check_places(
    images: Tensor, places: int, positions: Tensor, resolution: int | tuple[int, int], stride: int
) -> None:
    """Raises ValueError naming the size wanted, if images [B, C, H, W] give another number of places than of positions.

    places:     that images give, the class token among them.   positions: [that many, W]; they may have been
                interpolated for another size, so that they decide and not the resolution the model was made for.
    resolution: pixels.   stride: pixels from place to place.
    """
    # traced sizes are no numbers: a comparison would hold the graph to them
    if not isinstance(places, int) or positions.ndim < 2 or positions.shape[-2] in (1, places):
        return
    height, width = pair(resolution)
    wanted = f"{height} x {width} (model.visual.input_resolution; preprocess resizes)"
    if (height // stride) * (width // stride) + 1 != positions.shape[-2]:
        wanted = f"what gives {positions.shape[-2] - 1} places of {stride} x {stride} pixels, its positions' number"
    raise ValueError(f"images are {images.shape[2]} x {images.shape[3]}, but the model wants {wanted}")


def refuse_nan_pixels(images: Tensor) -> None:
    """Raises ValueError naming the first image that holds NaN."""
    bad = images.isnan().flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{len(bad)} of {len(images)} images hold NaN pixels: image[{bad[0]}] is the first")


def mean_std(images: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """CLIP's pixel mean and std [3], float64 on the images' device, for uint8 images; else (None, None)."""
    return _mean_std(images.device) if images.dtype == torch.uint8 else (None, None)


@functools.cache
def _mean_std(device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (MEAN, STD))
        return mean.to(device), std.to(device)


def normalised(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images as preprocess would give them, floating ones as they are, both in dtype."""
    return normalize(images, dtype) if images.dtype == torch.uint8 else images.to(dtype)


def check_text(text: Tensor, context_length: int) -> None:
    """Raises TypeError or ValueError naming what is wrong with token ids [B, <= context_length]."""
    if not isinstance(text, Tensor) or text.dtype not in (torch.int32, torch.int64, torch.int16, torch.uint8):
        kind = text.dtype if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"text must be a tensor of token ids (int32 or int64, from tokenize()), got {kind}")
    if text.ndim != 2 or not 0 < text.shape[1] <= context_length:
        raise ValueError(f"text must be [B, 1 to {context_length}] token ids, got {list(text.shape)}")
