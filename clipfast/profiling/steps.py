"""What can be profiled: a tower, a train step, and the way from files to embeddings, stage by stage."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.profiler import record_function

from clipfast.demo.photographs import CAPTIONS, photographs
from clipfast.inputs import pair
from clipfast.preprocess import ImageLike, Preprocess
from clipfast.profiling.measure import STAGE
from clipfast.tokenizer import tokenize

Made = TypeVar("Made")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def tower(model: nn.Module, which: str, data: Tensor) -> Callable[[], Tensor]:
    """encode_image or encode_text without gradients."""
    encode = getattr(model, f"encode_{which}")

    def step() -> Tensor:
        with torch.no_grad():
            return encode(data)

    return step


def train(model: nn.Module, images: Tensor, text: Tensor, dtype: torch.dtype) -> tuple[Callable[[], Tensor], str]:
    """Forward, loss, backward and AdamW; weights in float32, half precision by autocast.

    Returns: the step, and which loss it has.
    """
    loss, name = _loss(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    half = dtype != torch.float32
    device = images.device.type

    def step() -> Tensor:
        with torch.autocast(device, dtype) if half else contextlib.nullcontext():
            with record_function("forward"):
                features = [F.normalize(x, dim=-1) for x in (model.encode_image(images), model.encode_text(text))]
            with record_function(f"{STAGE}loss"):
                value = loss(*features)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        with record_function(f"{STAGE}optimiser"):
            optimiser.step()
        return value

    return step, name


def _loss(model: nn.Module) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    try:
        from clipfast.loss import ClipLoss
    except ImportError:
        return _plain_loss(model), "a plain cross-entropy (this clipfast has no loss of its own)"
    loss = ClipLoss()
    return lambda images, texts: loss(images, texts, model.logit_scale.exp()), "clipfast.loss.ClipLoss"


def _plain_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(images: Tensor, texts: Tensor) -> Tensor:
        scores = model.logit_scale.exp() * images @ texts.t()
        pairs = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.t(), pairs)) / 2

    return loss


def image_files(folder: Path | None, count: int) -> list[Path]:
    """`count` image files of a folder, used again from the start if there are fewer; without one scikit-image's own.

    Raises: ValueError naming the folder if it has none.
    """
    if folder is None:
        found = photographs()
        if not found:
            raise ValueError("no photographs here: pip install scikit-image, or give --images DIR")
    elif not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    else:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{folder} has no image: {', '.join(sorted(SUFFIXES))} are known")
    return [found[i % len(found)] for i in range(count)]


def files(model: nn.Module, paths: Sequence[Path], device: torch.device) -> Callable[[], Tensor]:
    """From files and captions to embeddings, on one thread, each stage for the whole batch before the next.

    The stages are ranges in the trace: read the bytes, decode them, resize and crop (to uint8), tokenise as many
    captions, copy both to the device, compute.
    """
    preprocess = Preprocess(pair(model.visual.input_resolution)[0], output="uint8")
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(len(paths))]

    def stage(name: str, work: Callable[[], Made]) -> Made:
        with record_function(f"{STAGE}{name}"):
            return work()

    def step() -> Tensor:
        data = stage("read", lambda: [path.read_bytes() for path in paths])
        images: list[ImageLike] = stage("decode", lambda: [_decoded(each) for each in data])
        pixels = stage("resize", lambda: preprocess(images))
        text = stage("tokenise", lambda: tokenize(captions))
        pixels, text = stage("copy", lambda: (pixels.to(device), text.to(device)))
        with torch.no_grad():
            model.encode_text(text)
            return model.encode_image(pixels)

    return step


def _decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
