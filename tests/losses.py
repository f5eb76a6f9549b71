"""The contrastive loss beside PyTorch's own composition and the exact one, over several batches together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import reference
from clipfast.loss import contrastive_loss

from .accuracy import assert_accurate

Pair = tuple[Tensor, Tensor]  # of features, [N, E] each


def features(n: int, width: int, *, noise: float = 1.0, dtype: torch.dtype = torch.float32) -> Pair:
    """Unit rows; the smaller the noise, the nearer the pairs."""
    image = torch.randn(n, width)
    text = image + noise * torch.randn(n, width)
    return F.normalize(image, dim=1).to(dtype), F.normalize(text, dim=1).to(dtype)


def peer_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's own composition, as in open_clip."""
    logits = scale * image @ text.T
    logits = logits if bias is None else logits + bias
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def with_gradients(
    loss: Callable[..., Tensor], image: Tensor, text: Tensor, scale: Tensor, *, of_loss: float = 1.75, **options
) -> list[Tensor]:
    """[loss, gradients of the features and of scale], of `of_loss` times the loss."""
    leaves = [copy.deepcopy(x).requires_grad_() for x in (image, text, scale)]
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, of_loss))]


def assert_results(
    found: Sequence[list[Tensor]], pairs: Sequence[Pair], scale: Tensor, *, what: str = "", terms: int = 0
) -> None:
    """`with_gradients` of several batches together: the error of one loss is luck, and those of a row go together.

    terms: as in `assert_accurate`.
    """
    batches = []
    for (image, text), ours in zip(pairs, found, strict=True):
        exact = with_gradients(reference.contrastive_loss, image.double(), text.double(), scale.double())
        batches.append(zip(ours, with_gradients(peer_loss, image, text, scale), exact, strict=True))
    for name, *several in zip(("loss", "image", "text", "scale"), *batches, strict=True):
        assert_accurate(*map(torch.stack, zip(*several, strict=True)), what=f"{name} {what}", terms=terms)


def assert_all_right(
    pairs: Sequence[Pair], scale: Tensor, what: str = "", loss: Callable[..., Tensor] = contrastive_loss
) -> None:
    assert_results([with_gradients(loss, *pair, scale) for pair in pairs], pairs, scale, what=what)
