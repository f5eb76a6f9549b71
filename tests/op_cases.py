"""Calls of the public operators, each beside PyTorch's own and the exact result.

Exact: clipfast.reference in float64 on the already rounded arguments. The peer: the same function written with
PyTorch's modules as openai/CLIP has it, in the dtype of the arguments.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import ops, reference


def _layer_norm(x, weight, bias, eps=1e-5, *, residual=None):
    if residual is not None:
        return _layer_norm(x + residual, weight, bias, eps), x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


def _activate(x, activation):
    return {None: lambda: x, "gelu": lambda: F.gelu(x), "quick_gelu": lambda: x * torch.sigmoid(1.702 * x)}[
        activation
    ]()


def _linear(x, weight, bias=None, *, activation=None, residual=None):
    y = _activate(F.linear(x, weight, bias), activation)
    return y if residual is None else residual + y


def _mlp(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, activation="quick_gelu", eps=1e-5):
    hidden = _linear(_layer_norm(x, norm_weight, norm_bias, eps), fc1_weight, fc1_bias, activation=activation)
    return x + F.linear(hidden, fc2_weight, fc2_bias)


def _attention(qkv, offsets, *, causal, scale=None):
    """With openai/CLIP's additive mask."""
    parts = [qkv[:0, 0].flatten(1)]
    for start, stop in pairwise(int(n) for n in offsets):
        q, k, v = qkv[start:stop].permute(1, 2, 0, 3)
        mask = qkv.new_full((stop - start,) * 2, float("-inf")).triu_(1) if causal else None
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
        parts.append(out.transpose(0, 1).flatten(1))
    return torch.cat(parts)


def _attention_pool(query, tokens, offsets, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, *, heads):
    q, k, v = F.linear(query, q_weight, q_bias), F.linear(tokens, k_weight, k_bias), F.linear(tokens, v_weight, v_bias)
    parts = [q[:0]]
    for i, (start, stop) in enumerate(pairwise(int(n) for n in offsets)):
        split = (
            x.unflatten(1, (heads, -1)).transpose(0, 1)[None] for x in (q[i : i + 1], k[start:stop], v[start:stop])
        )
        parts.append(F.scaled_dot_product_attention(*split)[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)


def _patch_embed(
    images,
    weight,
    class_embedding,
    positional_embedding,
    *,
    mean=None,
    std=None,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
):
    if images.dtype == torch.uint8:
        images = (images.float() / 255 - mean.float()[:, None, None]) / std.float()[:, None, None]
    x = F.conv2d(images.to(weight.dtype), weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
    x = x + positional_embedding.to(x.dtype)
    return x if norm_weight is None else _layer_norm(x, norm_weight, norm_bias, eps)


def _project(x, norm_weight, norm_bias, projection, eps=1e-5):
    return _layer_norm(x, norm_weight, norm_bias, eps) @ projection


def _logits(image_features, text_features, logit_scale):
    image_features = image_features / image_features.norm(dim=1, keepdim=True)
    text_features = text_features / text_features.norm(dim=1, keepdim=True)
    per_image = logit_scale.exp() * image_features @ text_features.t()
    return per_image, per_image.t()


PEERS = {name.strip("_"): f for name, f in globals().items() if name.startswith("_") and name[1:] in ops.__all__}


# ---- the cases: real shapes, primes, few and many rows, random weights and biases ----


def laid_out_on(x: Tensor, device: str) -> Tensor:
    """x on a device, strides and all: `.to` closes the gaps between rows, and a test of strides would have none."""
    target = torch.device(device)
    if x.device.type == target.type and target.index in (None, x.device.index):
        return x
    memory = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.detach().untyped_storage())
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


class Case(NamedTuple):
    operator: str
    arguments: tuple
    options: dict[str, Any] = {}

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        """Changes every floating tensor."""

        return self._each(lambda x: change(x) if x.is_floating_point() else x)

    def on(self, device: str) -> Case:
        return self._each(lambda x: laid_out_on(x, device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Case:
        def each(value):
            return change(value) if isinstance(value, Tensor) else value

        arguments = tuple(each(value) for value in self.arguments)
        return Case(self.operator, arguments, {name: each(value) for name, value in self.options.items()})

    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.arguments, *self.options.values()) if isinstance(x, Tensor)]

    def ours(self) -> tuple[Tensor, ...]:
        return self._run(getattr(ops, self.operator))

    def peer(self) -> tuple[Tensor, ...]:
        return self._run(PEERS[self.operator])

    def exact(self) -> tuple[Tensor, ...]:
        return self.map(lambda x: x.double())._run(getattr(reference, self.operator))

    def _run(self, function) -> tuple[Tensor, ...]:
        result = function(*self.arguments, **self.options)
        return result if isinstance(result, tuple) else (result,)


def weights(n: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, k) * k**-0.5, torch.randn(n) * 0.3


def norm(width: int) -> tuple[Tensor, Tensor]:
    return 1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width)


def offsets_of(*lengths: int) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def norm_case(rows: tuple[int, ...], width: int, *eps: float, mean: float = 0, residual: bool = False) -> Case:
    options = {"residual": torch.randn(*rows, width)} if residual else {}
    return Case("layer_norm", (torch.randn(*rows, width) + mean, *norm(width), *eps), options)


def linear_case(rows: tuple[int, ...], k: int, n: int, bias: bool = True, residual: bool = False, **options) -> Case:
    weight, offset = weights(n, k)
    added = {"residual": torch.randn(*rows, n)} if residual else {}
    return Case("linear", (torch.randn(*rows, k), weight, offset if bias else None), options | added)


def mlp_case(rows: tuple[int, ...], width: int, hidden: int, **options) -> Case:
    arguments = (torch.randn(*rows, width), *norm(width), *weights(hidden, width), *weights(width, hidden))
    return Case("mlp", arguments, options)


def attention_case(lengths, heads: int, width: int = 64, *, causal: bool, size: float = 1, **options) -> Case:
    qkv = torch.randn(sum(lengths), 3, heads, width) * size
    return Case("attention", (qkv, offsets_of(*lengths)), {"causal": causal, **options})


def pool_case(lengths, width: int, heads: int, inner: int | None = None, size: float = 1, bias: bool = True) -> Case:
    projections = [x if bias or x.ndim > 1 else None for _ in range(3) for x in weights(inner or width, width)]
    arguments = torch.randn(len(lengths), width) * size, torch.randn(sum(lengths), width) * size
    return Case("attention_pool", (*arguments, offsets_of(*lengths), *projections), {"heads": heads})


def patch_case(batch: int, height: int, across: int, patch: int, width: int, **options) -> Case:
    grid = (height // patch) * (across // patch)
    weight = torch.randn(width, 3, patch, patch) * (3 * patch * patch) ** -0.5
    images = torch.randn(batch, 3, height, across)
    return Case("patch_embed", (images, weight, torch.randn(width), torch.randn(1 + grid, width)), options)


def _patch_case(*shape: int, uint8: bool = False, affine: bool = False, **options) -> Case:
    """uint8: bytes that are normalised; affine: ln_pre with them."""
    case = patch_case(*shape, **options)
    images, *embedding = case.arguments
    if uint8:
        options |= {"mean": torch.rand(3), "std": 0.2 + torch.rand(3)}
        images = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    if affine:
        options |= zip(("norm_weight", "norm_bias"), norm(shape[-1]), strict=True)
    return Case("patch_embed", (images, *embedding), options)


def _project_case(rows: int, width: int, embedding: int, *eps: float) -> Case:
    return Case("project", (torch.randn(rows, width), *norm(width), weights(width, embedding)[0], *eps))


def _logits_case(images: int, texts: int, width: int, scale: float) -> Case:
    return Case("logits", (3 * torch.randn(images, width), 0.1 * torch.randn(texts, width), torch.tensor(scale)))


def _recipes() -> dict[str, Callable[[], Case]]:
    made: dict[str, Callable[[], Case]] = {}
    for rows, width in [((1,), 512), ((2, 50), 768), ((77, 3), 640), ((197,), 1024), ((50,), 192), ((3, 5, 7), 31)]:
        made[f"layer_norm {rows} {width}"] = partial(norm_case, rows, width)
    made["layer_norm mean 1000"] = partial(norm_case, (64,), 768, mean=1000)
    made["layer_norm residual"] = partial(norm_case, (5, 7), 192, residual=True)
    made["layer_norm eps"] = partial(norm_case, (64,), 192, 0.5)
    for rows, k, n, options in [
        ((1,), 768, 2304, {}),
        ((3,), 1024, 1024, {"activation": "quick_gelu"}),
        ((50,), 768, 768, {"residual": True}),
        ((64,), 3072, 768, {}),
        ((65,), 3072, 768, {"residual": True}),
        ((3, 77), 640, 2560, {"activation": "quick_gelu"}),
        ((197,), 1024, 512, {"activation": "gelu", "residual": True}),
        ((513,), 193, 101, {"activation": "quick_gelu", "residual": True}),
        ((600,), 512, 512, {"residual": True, "bias": False}),
        ((70,), 191, 37, {"activation": "gelu"}),
        ((5, 2, 3), 7, 1, {"bias": False}),
    ]:
        named = [option for option in options if option != "bias"]
        made[f"linear {rows} {k} {n} {named}"] = partial(linear_case, rows, k, n, **options)
    for rows, width, hidden, options in [
        ((1,), 512, 2048, {}),
        ((4,), 768, 3072, {"activation": "gelu"}),
        ((50, 2), 192, 768, {}),
        ((577,), 192, 768, {}),
        ((520,), 64, 256, {"activation": "gelu"}),
        ((7, 3), 31, 53, {"eps": 0.1}),
    ]:
        made[f"mlp {rows} {width} {options}"] = partial(mlp_case, rows, width, hidden, **options)
    for causal in (True, False):
        for lengths, heads, options in [
            ([50, 50, 50], 12, {}),
            ([1, 1, 3, 77, 77, 5], 8, {}),
            ([197], 4, {}),
            ([13, 0, 2], 3, {"width": 32, "scale": 0.3}),
            ([77, 40], 2, {"size": 5}),
        ]:
            name = f"attention {lengths} {options} {causal}"
            made[name] = partial(attention_case, lengths, heads, causal=causal, **options)
    for lengths, width, heads, options in [
        ([50, 50, 50, 50], 768, 12, {}),
        ([1, 2, 77, 77, 3], 512, 8, {}),
        ([197], 1024, 16, {}),
        ([50, 50], 192, 2, {"inner": 128}),
        ([17, 5], 96, 3, {"bias": False}),
        # large scores: the errors of a head's columns go together, so there are many sequences
        ([30, 30, 9] * 24, 128, 2, {"size": 3}),
    ]:
        made[f"attention_pool {lengths} {width} {[*options]}"] = partial(pool_case, lengths, width, heads, **options)
    for shape in [(2, 224, 224, 32, 192), (1, 224, 224, 16, 512), (3, 39, 35, 8, 64), (5, 15, 22, 7, 31)]:
        made[f"patch_embed {shape}"] = partial(_patch_case, *shape)
    for shape, eps in [((2, 56, 70, 14, 192), 1e-5), ((3, 64, 96, 32, 31), 0.3)]:
        made[f"patch_embed {shape} norm"] = partial(_patch_case, *shape, affine=True, eps=eps)
    made["patch_embed uint8"] = partial(_patch_case, 3, 64, 96, 32, 128, uint8=True)
    made["patch_embed uint8 norm"] = partial(_patch_case, 3, 64, 96, 32, 128, uint8=True, affine=True)
    for rows, width, embedding in [(1, 768, 512), (8, 1024, 768), (70, 512, 512), (5, 31, 17)]:
        made[f"project {rows} {width}"] = partial(_project_case, rows, width, embedding)
    made["project eps"] = partial(_project_case, 8, 64, 32, 0.5)
    for images, texts, width in [(1, 5, 512), (13, 7, 768), (64, 100, 64)]:
        made[f"logits {images} {texts}"] = partial(_logits_case, images, texts, width, 4.6)
    return made


def draw(name: str, recipe: Callable[[], Case], seed: int = 0) -> Case:
    """The random numbers of a case follow from its name and the seed: no other case changes them."""
    with torch.random.fork_rng(devices=[]):
        # not hash(), which differs from process to process
        torch.manual_seed(zlib.crc32(name.encode(), seed))
        return recipe()


RECIPES = _recipes()
CASES = {name: draw(name, recipe) for name, recipe in RECIPES.items()}


def case_in(name: str, dtype: torch.dtype) -> Case:
    """The case in a dtype, as openai/CLIP has it: LayerNorms, embeddings and logit_scale stay float32."""
    case = CASES[name]
    float32 = {"layer_norm": (1, 2), "mlp": (1, 2), "patch_embed": (2, 3), "project": (1, 2), "logits": (2,)}
    kept = {i: case.arguments[i] for i in float32.get(case.operator, ())}
    options = {k: v for k, v in case.options.items() if k in ("mean", "std", "norm_weight", "norm_bias")}
    cast = case.map(lambda x: x.to(dtype))
    arguments = tuple(kept.get(i, x) for i, x in enumerate(cast.arguments))
    return Case(case.operator, arguments, cast.options | options)


SMALL_RECIPES: dict[str, Callable[[], Case]] = {
    "layer_norm": partial(norm_case, (3,), 5, 0.1),
    "layer_norm, residual": partial(norm_case, (3,), 5, residual=True),
    "linear": partial(linear_case, (2, 3), 5, 4, residual=True),
    "linear, gelu": partial(linear_case, (3,), 5, 4, activation="gelu"),
    "linear, quick_gelu": partial(linear_case, (3,), 5, 4, activation="quick_gelu"),
    "mlp": partial(mlp_case, (3,), 4, 6, eps=0.1),
    "mlp, gelu": partial(mlp_case, (2,), 4, 6, activation="gelu"),
    "attention": partial(attention_case, [3, 1, 0, 2], 2, 3, causal=False),
    "attention, causal": partial(attention_case, [3, 1, 4], 2, 3, causal=True, scale=0.7),
    "attention_pool": partial(pool_case, [3, 1, 2], 6, 2, inner=4),
    "patch_embed": partial(_patch_case, 2, 5, 4, 2, 3),
    "patch_embed, norm": partial(_patch_case, 2, 5, 4, 2, 3, affine=True, eps=0.1),
    "project": partial(_project_case, 3, 4, 2, 0.1),
    "logits": partial(_logits_case, 3, 2, 4, 0.7),
}
SMALL = {name: draw(name, recipe) for name, recipe in SMALL_RECIPES.items()}
