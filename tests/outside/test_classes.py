"""Classes replaced in openai/CLIP's module, or in torch.nn, before a model is built.

openai/CLIP looks each class up by its name when it builds, and calls it with the published arguments.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ..clips import RESNET, VIT, make_trio
from .habits import BOTH, assert_habit, libraries, unchanged


@pytest.fixture(autouse=True)
def _exact_layer_norm(monkeypatch):
    """Subclasses of openai-clip's LayerNorm, too, compute a float64 model in float64; its float32 numbers stay."""
    kind = libraries()[1].LayerNorm

    def forward(self, x):
        return super(kind, self).forward(x if x.dtype == torch.float64 else x.float()).type(x.dtype)

    monkeypatch.setattr(kind, "forward", forward)


class _NormOfTheRootMeanSquare(nn.Module):
    """Not even a LayerNorm."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-5).rsqrt() * self.weight + self.bias


class _ScaledNorm(nn.LayerNorm):
    def forward(self, x):
        return 1.5 * super().forward(x)


def _norm_of(library):
    class Norm(library.LayerNorm):
        def forward(self, x):
            return 1.5 * super().forward(x)

    return Norm


def _quick_gelu_of(library):
    class Other(library.QuickGELU):
        def forward(self, x):
            return 0.8 * super().forward(x)

    return Other


def _block_of(library):
    class Block(library.ResidualAttentionBlock):
        def __init__(self, d_model, n_head, attn_mask=None):
            super().__init__(d_model, n_head, attn_mask)
            self.scale = 0.5

        def forward(self, x):
            x = x + self.scale * self.attention(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    return Block


def _block_with_another_attention(library):
    class Block(library.ResidualAttentionBlock):
        def __init__(self, d_model, n_head, attn_mask=None):
            super().__init__(d_model, n_head, attn_mask)

        def attention(self, x):
            return 0.5 * super().attention(x)

    return Block


def _block_of_torch(_):
    """A block that shares only the published constructor and the names of its parameters."""

    class Block(nn.Module):
        def __init__(self, d_model: int, n_head: int, attn_mask: torch.Tensor = None):
            super().__init__()
            self.attn = nn.MultiheadAttention(d_model, n_head)
            self.ln_1, self.ln_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
            layers = {
                "c_fc": nn.Linear(d_model, 4 * d_model),
                "gelu": nn.ReLU(),
                "c_proj": nn.Linear(4 * d_model, d_model),
            }
            self.mlp = nn.Sequential()
            for name, layer in layers.items():
                self.mlp.add_module(name, layer)
            self.attn_mask = attn_mask

        def forward(self, x):
            mask = None if self.attn_mask is None else self.attn_mask.to(x.dtype)
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    return Block


def _transformer_of(library):
    class Transformer(library.Transformer):
        def __init__(self, width, layers, heads, attn_mask=None):
            super().__init__(width, layers, heads, attn_mask)

        def forward(self, x):
            kept = []
            for block in self.resblocks:
                x = block(x)
                kept.append(x)
            return sum(kept) / len(kept)

    return Transformer


def _vision_transformer_of(library):
    class Tower(library.VisionTransformer):
        def __init__(self, input_resolution, patch_size, width, layers, heads, output_dim):
            super().__init__(input_resolution, patch_size, width, layers, heads, output_dim)

        def forward(self, x):
            return 0.5 * super().forward(x) + 1

    return Tower


def _clip_of(library):
    class Model(library.CLIP):
        def __init__(
            self,
            embed_dim,
            image_resolution,
            vision_layers,
            vision_width,
            vision_patch_size,
            context_length,
            vocab_size,
            transformer_width,
            transformer_heads,
            transformer_layers,
        ):
            super().__init__(
                embed_dim,
                image_resolution,
                vision_layers,
                vision_width,
                vision_patch_size,
                context_length,
                vocab_size,
                transformer_width,
                transformer_heads,
                transformer_layers,
            )

        def encode_image(self, image):
            return 0.5 * super().encode_image(image)

        def encode_text(self, text):
            return 0.5 * super().encode_text(text)

    return Model


def _bottleneck_of(library):
    class Block(library.Bottleneck):
        def __init__(self, inplanes, planes, stride=1):
            super().__init__(inplanes, planes, stride)

        def forward(self, x):
            return 0.5 * super().forward(x)

    return Block


def _pool_of(library):
    class Pool(library.AttentionPool2d):
        def __init__(self, spacial_dim, embed_dim, num_heads, output_dim=None):
            super().__init__(spacial_dim, embed_dim, num_heads, output_dim)

        def forward(self, x):
            return super().forward(0.5 * x)

    return Pool


def _resnet_of(library):
    class Tower(library.ModifiedResNet):
        def __init__(self, layers, output_dim, heads, input_resolution=224, width=64):
            super().__init__(layers, output_dim, heads, input_resolution, width)

        def forward(self, x):
            return super().forward(0.5 * x)

    return Tower


# name: (attribute of the library, function of the library that makes the class, whose numbers change)
CLASSES = {
    "PyTorch's LayerNorm": ("LayerNorm", lambda _: nn.LayerNorm, ()),
    "a subclass of PyTorch's LayerNorm": ("LayerNorm", lambda _: _ScaledNorm, BOTH),
    "a subclass of LayerNorm": ("LayerNorm", _norm_of, BOTH),
    "another norm": ("LayerNorm", lambda _: _NormOfTheRootMeanSquare, BOTH),
    "GELU for QuickGELU": ("QuickGELU", lambda _: nn.GELU, BOTH),
    "ReLU for QuickGELU": ("QuickGELU", lambda _: nn.ReLU, BOTH),
    "a subclass of QuickGELU": ("QuickGELU", _quick_gelu_of, BOTH),
    "a subclass of the block": ("ResidualAttentionBlock", _block_of, BOTH),
    "a block with another attention": ("ResidualAttentionBlock", _block_with_another_attention, BOTH),
    "a block of PyTorch's modules": ("ResidualAttentionBlock", _block_of_torch, BOTH),
    "a subclass of Transformer": ("Transformer", _transformer_of, BOTH),
    "a subclass of VisionTransformer": ("VisionTransformer", _vision_transformer_of, ("image",)),
    "a subclass of CLIP": ("CLIP", _clip_of, BOTH),
}
RESNET_CLASSES = {
    "a subclass of Bottleneck": ("Bottleneck", _bottleneck_of, ("image",)),
    "a subclass of AttentionPool2d": ("AttentionPool2d", _pool_of, ("image",)),
    "a subclass of ModifiedResNet": ("ModifiedResNet", _resnet_of, ("image",)),
}


@pytest.mark.parametrize("name", [*CLASSES, *RESNET_CLASSES])
def test_a_class_replaced_before_the_model_is_built(name, monkeypatch):
    """Also after it has been put back: a model keeps what it was built of."""
    config = RESNET if name in RESNET_CLASSES else VIT
    attribute, make, changes = (CLASSES | RESNET_CLASSES)[name]
    unchanged(config)  # asked before anything is replaced
    with monkeypatch.context() as patch:
        for library in libraries():
            patch.setattr(library, attribute, make(library))
        trio = make_trio(config)
        assert_habit(trio, config, changes)
    assert_habit(trio, config, changes)


class _ScaledLinear(nn.Linear):
    def forward(self, x):
        return 1.25 * super().forward(x)


class _ScaledConv(nn.Conv2d):
    def forward(self, x):
        return x.mean() + 1.25 * super().forward(x)


class _ScaledAttention(nn.MultiheadAttention):
    def forward(self, *args, **options):
        out, weights = super().forward(*args, **options)
        return 1.25 * out, weights


class _ScaledEmbedding(nn.Embedding):
    def forward(self, x):
        return 1.25 * super().forward(x)


class _ScaledBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 1.25 * super().forward(x)


TORCH = {
    "Linear": (_ScaledLinear, VIT, BOTH),
    "MultiheadAttention": (_ScaledAttention, VIT, BOTH),
    "Conv2d": (_ScaledConv, VIT, ("image",)),
    "Embedding": (_ScaledEmbedding, VIT, ("text",)),
    "BatchNorm2d": (_ScaledBatchNorm, RESNET, ("image",)),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_class_of_torch_replaced_before_the_model_is_built(name, monkeypatch):
    """As loralib's and quantisers' users do: torch.nn.Linear is their own while the model is made."""
    kind, config, changes = TORCH[name]
    unchanged(config)
    with monkeypatch.context() as patch:
        patch.setattr(nn, name, kind)
        trio = make_trio(config)
        assert_habit(trio, config, changes)
    assert_habit(trio, config, changes)


def test_initialisation_left_out(monkeypatch):
    """Users who load weights anyway make reset_parameters do nothing."""
    for kind in (nn.Linear, nn.LayerNorm):
        monkeypatch.setattr(kind, "reset_parameters", lambda self: None)
    assert_habit(make_trio(VIT), changes=())


def test_another_mask_from_build_attention_mask(monkeypatch):
    unchanged(VIT)
    for library in libraries():
        mask = torch.full((VIT[5], VIT[5]), float("-inf")).triu_(3)
        monkeypatch.setattr(library.CLIP, "build_attention_mask", lambda self, mask=mask: mask)
    assert_habit(make_trio(VIT), changes=("text",))


def test_another_initialisation(monkeypatch):
    def initialise(self):
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.125)

    for library in libraries():
        monkeypatch.setattr(library.CLIP, "initialize_parameters", initialise)
        assert {value for p in library.CLIP(*VIT).parameters() for value in p.unique().tolist()} == {0.125}
