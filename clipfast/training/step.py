"""One batch of pairs to gradients, whole or in micro-batches with the gradient of the whole (GradCache)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipfast import compat
from clipfast.model import CLIP

__all__ = ["Loss", "Pairs", "accumulate_gradients"]

# (image_features [B, E], text_features [B, E], logit_scale) -> scalar; features have length 1
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Pairs(nn.Module):
    """A CLIP whose forward gives (image_features, text_features, logit_scale), what contrastive losses take.

    Features [B, E] have length 1 and are at least float32, also under autocast; logit_scale is exp of the parameter.
    Both towers run in one forward, so that DistributedDataParallel can wrap it.
    """

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = self.clip.encode_image(images), self.clip.encode_text(tokens)
        return _direction(image), _direction(text), self.clip.logit_scale.exp()


def _direction(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def accumulate_gradients(
    pairs: Pairs | DistributedDataParallel,
    images: Tensor,
    tokens: Tensor,
    loss: Loss,
    *,
    micro_batch: int | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    scaled: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Add the gradient of loss over all B pairs to every parameter's .grad.

    images:      [B, 3, R, R].   tokens: [B, context].
    micro_batch: pairs that are held with their activations at once; default all. With fewer, every pair is encoded
                 twice: without a graph for the features, then again with one, fed with the gradient of the loss at
                 the features. What results is the whole batch's gradient; only BatchNorm sees micro-batches.
    autocast:    context for the towers; the loss is computed outside of it.
    scaled:      what is differentiated, of the loss (GradScaler.scale).
    Returns:     the loss, detached.
    Source:      Gao et al. 2021, arXiv:2101.06983.
    """
    if micro_batch is None or micro_batch >= len(images):
        with autocast():
            outputs = pairs(images, tokens)
        value = loss(*outputs)
        scaled(value).backward()
        return value.detach()

    chunks = list(zip(images.split(micro_batch), tokens.split(micro_batch), strict=True))
    encoded = _encode(pairs, chunks, autocast)
    image_features = torch.cat([image for image, _, _ in encoded]).requires_grad_()
    text_features = torch.cat([text for _, text, _ in encoded]).requires_grad_()
    logit_scale = encoded[0][2].requires_grad_()
    value = loss(image_features, text_features, logit_scale)
    scaled(value).backward()
    for i, chunk in enumerate(chunks):
        last = i == len(chunks) - 1
        # a context of its own for each: autocast remembers cast weights until it ends
        with _synchronised(pairs, last), autocast():
            image, text, scale = pairs(*chunk)
        rows = slice(i * micro_batch, i * micro_batch + len(image))
        outputs, gradients = [image, text], [image_features.grad[rows], text_features.grad[rows]]
        if last:
            # once: it is the same parameter in every micro-batch
            outputs, gradients = [*outputs, scale], [*gradients, logit_scale.grad]
        with _synchronised(pairs, last):
            torch.autograd.backward(outputs, gradients)
    return value.detach()


def _encode(
    pairs, chunks: Sequence[tuple[Tensor, ...]], autocast: Callable[[], contextlib.AbstractContextManager]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    module = pairs.module if isinstance(pairs, DistributedDataParallel) else pairs
    encoded = []
    with torch.no_grad(), _running_statistics_kept(module):
        for chunk in chunks:
            with autocast():
                encoded.append(module(*chunk))
    return encoded


@contextlib.contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leaves BatchNorm's running statistics to the second pass, or each batch would count twice."""
    norms = [m for m in module.modules() if isinstance(m, compat.BATCH_NORMS) and m.track_running_stats]
    tracking = [norm for norm in norms if norm.training]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _synchronised(pairs, last: bool) -> contextlib.AbstractContextManager:
    """Processes add up their gradients once, in the last backward."""
    waits = isinstance(pairs, DistributedDataParallel) and not last
    return pairs.no_sync() if waits else contextlib.nullcontext()
