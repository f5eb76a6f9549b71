"""What the tests of habits share.

A habit is something that programs do to openai/CLIP from outside. Each test does it to both libraries with the same
weights and to an exact float64 model, compares by the tolerance rule, and asks that it change openai-clip's own numbers
where it should: a habit without an effect could not tell whether clipfast heeds it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor, nn

import clipfast.model

from .. import peers
from ..clips import RESNET, VIT, assert_same, make_images, make_pair, make_texts

TEXTS = make_texts(VIT, 6)
IMAGES = {VIT: make_images(VIT, 6), RESNET: make_images(RESNET, 3)}
BOTH = ("image", "text")


def libraries() -> tuple[ModuleType, ModuleType]:
    """Our module of classes and openai-clip's."""
    return clipfast.model, peers.openai_clip().model


def images_of(m: nn.Module) -> Tensor:
    return IMAGES[VIT if hasattr(m.visual, "ln_pre") else RESNET]


def embed(m: nn.Module) -> dict[str, Tensor]:
    """Both embeddings, as assert_same compares them."""
    return {"image": m.encode_image(images_of(m)), "text": m.encode_text(TEXTS)}


def unchanged(config: tuple, run: Callable = embed) -> dict[str, Tensor]:
    """What openai-clip's model gives when nobody has done anything to it; to be asked before anybody does."""
    return _unchanged(config, run)


@functools.cache
def _unchanged(config: tuple, run: Callable) -> dict[str, Tensor]:
    with torch.no_grad():
        return run(make_pair(config)[0])


def assert_changed(got: dict[str, Tensor], before: dict[str, Tensor], names: Iterable[str]) -> None:
    for name in names:
        if got[name].shape == before[name].shape:
            change = (got[name] - before[name]).abs().max()
            assert change > 1e-3 * before[name].abs().max(), f"{name}: the habit changes nothing on openai-clip"


def assert_habit(trio: list[nn.Module], config: tuple = VIT, changes: Iterable[str] = BOTH, run: Callable = embed):
    """Ours gives the peer's numbers, with gradients wanted and without; and the peer's are not the usual ones."""
    with torch.no_grad():
        peer, exact = run(trio[1]), run(trio[2])
    for name, tensor in peer.items():
        # a peer that is far from an exact model which heeds no habit would excuse anything
        torch.testing.assert_close(tensor, exact[name].to(tensor.dtype), rtol=1e-3, atol=1e-3)
    if changes:
        assert_changed(peer, unchanged(config, run), changes)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert_same(trio, run)


def scaled(function: Callable, factor: float = 1.25) -> Callable:
    """A wrapper as profilers and quantisers put around PyTorch's functions; this one shows in the numbers."""

    @functools.wraps(function)
    def wrapper(*args, **options):
        out = function(*args, **options)
        return (factor * out[0], *out[1:]) if isinstance(out, tuple) else factor * out

    return wrapper
