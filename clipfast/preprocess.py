"""Images to CLIP's input: the pixels of openai/CLIP's transform, bit for bit, without torchvision.

PIL image -> resize (bicubic, short side n) -> crop the centre -> RGB -> [0, 1] -> minus mean, over std

The resize is Pillow's own call and takes nine tenths of the time. Pillow's faster ways (`draft`,
`reducing_gap`, a `box` with only what the crop keeps) change pixels. So does resizing in two calls, one per
axis: which axis goes first depends on the image's shape and on Pillow's version, and pixels are rounded
in between.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

__all__ = ["MEAN", "STD", "Preprocess", "decode_image", "normalize", "open_image"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

ImageLike = Image.Image | str | os.PathLike[str]


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file completely and close it; of several frames, the first.

    The orientation in EXIF data is not applied, as in openai/CLIP; `PIL.ImageOps.exif_transpose` does that.

    Returns: PIL image in the file's own mode.
    Raises:  ValueError, with the path, for an empty file, a file that is no image Pillow knows, a truncated
             or damaged image, and one with more pixels than twice `PIL.Image.MAX_IMAGE_PIXELS`, which may be
             a decompression bomb; OSError (FileNotFoundError, PermissionError, ...) for an unreadable file.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        return decode_image(file, name)


def decode_image(file: BinaryIO, name: str) -> Image.Image:
    """`open_image` for a file that is open already, or bytes in memory; name is what errors call it."""
    if not file.read(1):
        raise ValueError(f"{name} is empty (0 bytes)")
    file.seek(0)
    try:
        image = Image.open(file)
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's text gives the number of pixels and the limit
        raise ValueError(f"{name} is refused as a possible decompression bomb: {error}") from error
    except MemoryError:
        raise
    # decoders are plugins: OSError, SyntaxError, ValueError, RuntimeError and others, by format
    except Exception as error:
        raise ValueError(f"{name} is truncated or damaged: {error}") from error
    return image


def normalize(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(images / 255 - MEAN) / STD, computed in float32.

    images:  [B, 3, H, W] or [3, H, W] uint8, on any device.
    dtype:   floating type of the result.
    Returns: shape and device of images; on the CPU the bits of openai/CLIP's transform, rounded once more for
             a dtype narrower than float32.
    Raises:  TypeError if images are not uint8 or dtype is not floating; ValueError for another shape.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(f"images must be [B, 3, H, W] or [3, H, W], got {tuple(images.shape)}")
    _check_dtype(dtype)
    return _normalize_(images.to(torch.float32)).to(dtype)


def _normalize_(values: torch.Tensor) -> torch.Tensor:
    """float32 [..., 3, H, W] in 0 .. 255, overwritten."""

    def constant(numbers: Sequence[float]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=values.device).view(-1, 1, 1)

    # 255 as a tensor: for a plain number PyTorch on CUDA multiplies by its reciprocal, which rounds otherwise
    return values.div_(constant((255.0,))).sub_(constant(MEAN)).div_(constant(STD))


def _check_dtype(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")


def _resize_and_crop(image: Image.Image, n: int) -> Image.Image:
    """Short side to n, bicubic, and the n x n centre of that."""
    width, height = image.size
    if min(width, height) == 0:
        raise ValueError(f"an image of {width} x {height} pixels cannot be resized")
    short = min(width, height)
    new_width, new_height = (n if side == short else int(n * side / short) for side in (width, height))
    left, top = round((new_width - n) / 2), round((new_height - n) / 2)
    if (new_width, new_height) != (width, height):
        image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + n, top + n))


class Preprocess:
    """Callable that turns images into CLIP's input; replaces the second value of openai/CLIP's `load`.

    n_px:   side of the square output, the model's `visual.input_resolution`.
    output: "float" gives normalised values of `dtype`; "uint8" stops before [0, 1], for `normalize` or for a
            model that folds mean and std into its weights.
    dtype:  floating type of "float" output; float32 equals openai/CLIP bit for bit.
    Raises: ValueError or TypeError for arguments outside these.

    Called with one image (PIL image, or path) it returns [3, n_px, n_px]; with a list or tuple of B images
    [B, 3, n_px, n_px]; on the CPU, contiguous. Every mode that openai/CLIP's transform takes gives its bits.
    As there, transparency is dropped (not blended), 16-bit, "I" and "F" images are clipped to 0 .. 255 (not
    rescaled), "1" and "P" images are resized to the nearest pixel, and EXIF orientation is not applied.
    Raises: TypeError for anything else than images and paths, with its position in a list; ValueError for an
    image without pixels, for a mode that Pillow cannot convert to RGB ("La"), and as in `open_image`.

    Instances can be pickled, for DataLoader workers.
    """

    def __init__(self, n_px: int, *, output: str = "float", dtype: torch.dtype = torch.float32) -> None:
        try:
            n_px = operator.index(n_px)
        except TypeError:
            raise TypeError(f"n_px must be an int, got {n_px!r}") from None
        if n_px < 1:
            raise ValueError(f"n_px must be at least 1, got {n_px}")
        if output not in ("float", "uint8"):
            raise ValueError(f'output must be "float" or "uint8", got {output!r}')
        _check_dtype(dtype)
        self.n_px = n_px
        self.output = output
        self.dtype = dtype

    def __repr__(self) -> str:
        dtype = "" if self.output == "uint8" else f", dtype={self.dtype}"
        return f"Preprocess(n_px={self.n_px}, output={self.output!r}{dtype})"

    def __call__(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> torch.Tensor:
        if not isinstance(images, (list, tuple)):
            return self._batch([images], "images")[0]
        return self._batch(images, "images[{}]")

    def _batch(self, images: Sequence[ImageLike], label: str) -> torch.Tensor:
        n = self.n_px
        stored = torch.uint8 if self.output == "uint8" else torch.float32
        # the device is named: a user may have set another default
        out = torch.empty(len(images), 3, n, n, dtype=stored, device="cpu")
        for i, image in enumerate(images):
            # rows of [3, n]: line by line the channels are cheaper to take apart than pixel by pixel
            lines = np.frombuffer(self._rgb(image, label.format(i)).tobytes("raw", "RGB;L"), np.uint8)
            np.copyto(out[i].numpy().transpose(1, 0, 2), lines.reshape(n, 3, n))
            if self.output == "float":
                # one image at a time: it is still in the cache
                _normalize_(out[i])
        return out if self.output == "uint8" else out.to(self.dtype)

    def _rgb(self, image: ImageLike, label: str) -> Image.Image:
        if isinstance(image, (str, os.PathLike)):
            image = open_image(image)
        elif not isinstance(image, Image.Image):
            raise TypeError(f"{label} must be a PIL image or a path, not {type(image).__name__}")
        image = _resize_and_crop(image, self.n_px)
        try:
            return image if image.mode == "RGB" else image.convert("RGB")
        except ValueError as error:
            raise ValueError(f"{label}: Pillow cannot convert mode {image.mode!r} to RGB: {error}") from error
