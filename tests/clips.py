"""Pairs of models with the same weights, openai-clip's and ours, and their exact results in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor, nn

import clipfast
import clipfast.model
from clipfast import reference

from . import peers
from .accuracy import assert_accurate

# Arguments of CLIP(...), openai/CLIP's nine: embed_dim; image_resolution, vision_layers, vision_width,
# vision_patch_size; context_length, vocab_size, transformer_width, transformer_heads, transformer_layers.
# Every size is the published one but depth (what repeats is cut) and vocabulary (rows that nobody reads).
VOCABULARY = 520
TEXT_B, TEXT_X4 = (77, VOCABULARY, 512, 8, 2), (77, VOCABULARY, 640, 10, 1)
TEXT_L, TEXT_X64 = (77, VOCABULARY, 768, 12, 1), (77, VOCABULARY, 1024, 16, 1)
PUBLISHED = {
    "RN50": (1024, 224, (2, 1, 1, 1), 64, None, *TEXT_B),
    "RN101": (512, 224, (1, 1, 2, 1), 64, None, *TEXT_B),
    "RN50x4": (640, 288, (1, 1, 1, 1), 80, None, *TEXT_X4),
    "RN50x16": (768, 384, (1, 1, 1, 1), 96, None, *TEXT_L),
    "RN50x64": (1024, 448, (1, 1, 1, 1), 128, None, *TEXT_X64),
    "ViT-B/32": (512, 224, 2, 768, 32, *TEXT_B),
    "ViT-B/16": (512, 224, 2, 768, 16, *TEXT_B),
    "ViT-L/14": (768, 224, 1, 1024, 14, *TEXT_L),
    "ViT-L/14@336px": (768, 336, 1, 1024, 14, *TEXT_L),
}
# Small ones: two heads and several blocks, so that a wrong layout or a skipped block shows.
VIT = (64, 32, 3, 128, 8, 12, 60, 128, 2, 3)
RESNET = (64, 64, (2, 1, 1, 1), 32, None, 12, 60, 128, 2, 2)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every weight, bias and statistic its own value, activations of order one, and evaluation mode.

    At weight 1 and bias 0 a dropped bias would not show. All values are numbers of bfloat16, so that one float64 result
    is the exact one of the float32 and of the bfloat16 model.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name == "logit_scale":
                noise = torch.tensor(2.65625)
            elif "running_var" in name:
                noise = 0.5 + noise.abs()
            elif tensor.ndim > 1:
                noise *= 0.5 if "embedding" in name else tensor[0].numel() ** -0.5
            else:
                noise = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
            tensor.copy_(noise.bfloat16())
    return model.eval()


def make_pair(config: tuple, seed: int = 0, smooth_at: Tensor | None = None) -> tuple[nn.Module, clipfast.CLIP]:
    """(openai-clip's model, ours) in float32 with the same random weights.

    smooth_at: images at which no ReLU of a ResNet shall be near its kink.
    """
    peer = randomise(peers.openai_clip().model.CLIP(*config), seed)
    if smooth_at is not None and isinstance(config[2], tuple):
        _leave_the_kinks(peer.visual, smooth_at)
    return peer, clipfast.build_model(peer.state_dict())


def _leave_the_kinks(resnet: nn.Module, images: Tensor) -> None:
    """Sets the BatchNorms so that on these images every other channel passes its ReLU, and no value is near zero.

    Of a million values some are always so near zero that one rounding decides whether their gradient passes. Then the
    error of a float32 gradient is chance, in openai-clip as in ours, and comparing the two proves nothing.
    """

    def standardise(name: str, norm: nn.BatchNorm2d):
        def hook(_, args):
            x = args[0].double()
            norm.running_mean.copy_(x.mean((0, 2, 3)).bfloat16())
            norm.running_var.copy_(x.var((0, 2, 3)).bfloat16())
            norm.bias.data.zero_()
            scaled = nn.functional.batch_norm(
                args[0], norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
            # before the sum of a residual, all open: the sum of one open and one shut could be near zero
            sign = torch.ones(len(norm.bias))
            if name == "bn3" or not name.endswith(("bn3", "downsample.1")):
                sign[::2] = -1
            norm.bias.data.copy_(((1.2 * scaled.abs().amax((0, 2, 3)) + 0.3) * sign).bfloat16())

        return hook

    def check(_, args):
        assert args[0].abs().min() > 0.1

    handles = []
    for name, module in resnet.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(standardise(name, module)))
        elif isinstance(module, nn.ReLU):
            handles.append(module.register_forward_pre_hook(check))
    with torch.no_grad():
        resnet(images)
    for handle in handles:
        handle.remove()


def convert(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """openai-clip's convert_weights, to any dtype: it casts to float16 and to nothing else."""
    names = {name for name, tensor in _halved(model).items() if tensor.dtype == torch.float16}
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.data = parameter.data.to(dtype)
    return model


def _halved(model: nn.Module) -> dict[str, nn.Parameter]:
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    peers.openai_clip().model.convert_weights(model)
    halved = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = before[name]
    return halved


def make_images(config: tuple, batch: int, seed: int = 1) -> Tensor:
    """[batch, 3, H, W] float32, each a number of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, config[1], config[1], generator=generator).bfloat16().float()


def make_texts(config: tuple, batch: int, seed: int = 2) -> Tensor:
    """[batch, context] int64: ends in the last, first, second and random places, after them random ids, no zeros."""
    context, vocabulary = config[5], config[6]
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(0, vocabulary - 1, (batch, context), generator=generator)
    ends = torch.randint(1, context, (batch,), generator=generator)
    ends[: min(3, batch)] = torch.tensor([context - 1, 0, 1])[:batch]
    texts[range(batch), ends] = vocabulary - 1
    return texts


def exact_features(weights: Mapping[str, Tensor], images: Tensor, texts: Tensor, **options) -> tuple[Tensor, Tensor]:
    """(image, text) embeddings in float64."""
    with torch.no_grad():
        return reference.encode_image(weights, images, **options), reference.encode_text(weights, texts, **options)


def make_exact(peer: nn.Module) -> nn.Module:
    """A float64 copy of openai-clip's model that computes in float64 throughout: exact, also after edits of modules."""
    exact = copy.deepcopy(peer).double()
    for module in exact.modules():
        # by its name: a test may have put another class in its place
        if (type(module).__module__, type(module).__name__) == ("clip.model", "LayerNorm"):
            module.__class__ = nn.LayerNorm  # theirs computes in float32 and then casts
    return exact


Edit: TypeAlias = Callable[[nn.Module, ModuleType], object] | None


def make_trio(config: tuple, edit: Edit = None) -> list[nn.Module]:
    """[ours, openai-clip's, the exact one], each after edit(model, the module its classes are from)."""
    peer, ours = make_pair(config)
    theirs = peers.openai_clip().model
    trio = [ours, peer, make_exact(peer)]
    for model, library in zip(trio, (clipfast.model, theirs, theirs), strict=True):
        torch.manual_seed(3)
        if edit is not None:
            edit(model, library)
    trio[2].double()
    return trio


Run: TypeAlias = Callable[[nn.Module], "Tensor | Sequence[Tensor] | Mapping[str, Tensor]"]


def assert_same(trio: Sequence[nn.Module], run: Run, *, what: str = "result") -> None:
    """Every tensor that run(model) returns is as near to the exact model's as the peer's is, by the tolerance rule."""
    results = []
    for model in trio:
        result = run(model)
        if isinstance(result, Tensor):
            result = [result]
        results.append(dict(result) if isinstance(result, Mapping) else dict(enumerate(result)))
    ours, peer, exact = results
    assert list(ours) == list(peer) == list(exact)
    for name, tensor in ours.items():
        assert_accurate(tensor, peer[name], exact[name].detach(), what=f"{what} {name}")


def weighted(*tensors: Tensor) -> Tensor:
    """A scalar whose gradient with respect to each tensor is random and the same in every dtype."""
    generator = torch.Generator().manual_seed(11)
    return sum((x * torch.randn(x.shape, generator=generator).bfloat16().to(x)).sum() for x in tensors)


def assert_same_gradients(config: tuple, run: Callable[[nn.Module], Mapping[str, Tensor]], edit: Edit = None) -> None:
    """The gradients that run(model) returns are right for ours.

    In float64 every one, to 1e-9 of its greatest element: nothing hides a wrong term. In float32 those of 4,096
    elements and more, by the tolerance rule: the greatest error of a few elements is mostly luck.
    """
    trio = make_trio(config, edit)
    ours, peer, exact = (run(model) for model in trio)
    assert ours and list(ours) == list(peer) == list(exact)
    for name, gradient in exact.items():
        if gradient.numel() >= 4096:
            assert_accurate(ours[name], peer[name], gradient, what=f"gradient of {name}")
    for name, gradient in run(make_trio(config, edit)[0].double()).items():
        # the gradient of a key bias is zero, and both are rounding
        bound = 1e-9 * max(exact[name].abs().max().item(), 1e-3)
        torch.testing.assert_close(gradient, exact[name], rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def encode(images: Tensor | None, texts: Tensor | None) -> Run:
    """A function for assert_same: both embeddings."""
    inputs = {"encode_image": images, "encode_text": texts}
    return lambda model: {name: getattr(model, name)(x) for name, x in inputs.items() if x is not None}
