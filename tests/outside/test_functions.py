"""Functions and methods replaced while a model runs: profilers, quantisers, relevance maps, wrappers for a whole class.

openai/CLIP looks each one up when it calls it.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipfast.watch import Functions

from ..clips import RESNET, VIT, make_trio
from .habits import BOTH, assert_habit, libraries, scaled, unchanged

# (owner, name, model, whose numbers change); the owner's function gives 1.25 times what it gave
FUNCTIONS = {
    "F.linear": (F, "linear", VIT, BOTH),
    "F.layer_norm": (F, "layer_norm", VIT, BOTH),
    "F.conv2d": (F, "conv2d", VIT, ("image",)),
    "F.embedding": (F, "embedding", VIT, ("text",)),
    "F.multi_head_attention_forward": (F, "multi_head_attention_forward", VIT, BOTH),
    "F.scaled_dot_product_attention": (F, "scaled_dot_product_attention", VIT, BOTH),
    "F._in_projection_packed": (F, "_in_projection_packed", VIT, BOTH),
    "torch.sigmoid": (torch, "sigmoid", VIT, BOTH),
    "torch.layer_norm": (torch, "layer_norm", VIT, BOTH),
    "torch.embedding": (torch, "embedding", VIT, ("text",)),
    "Tensor.__matmul__": (torch.Tensor, "__matmul__", VIT, BOTH),
    "nn.LayerNorm.forward": (nn.LayerNorm, "forward", VIT, BOTH),
    "nn.Linear.forward": (nn.Linear, "forward", VIT, BOTH),
    "nn.MultiheadAttention.forward": (nn.MultiheadAttention, "forward", VIT, BOTH),
    "nn.Conv2d.forward": (nn.Conv2d, "forward", VIT, ("image",)),
    "nn.Conv2d._conv_forward": (nn.Conv2d, "_conv_forward", VIT, ("image",)),
    "nn.Embedding.forward": (nn.Embedding, "forward", VIT, ("text",)),
    "nn.Sequential.forward": (nn.Sequential, "forward", VIT, BOTH),
    "nn.Module.__call__": (nn.Module, "__call__", VIT, ("image",)),
    "nn.Module._call_impl": (nn.Module, "_call_impl", VIT, ("image",)),
    "F.linear of a ResNet": (F, "linear", RESNET, ("image",)),
    "F.multi_head_attention_forward of a ResNet": (F, "multi_head_attention_forward", RESNET, ("image",)),
    "F.scaled_dot_product_attention of a ResNet": (F, "scaled_dot_product_attention", RESNET, ("image",)),
    "F.conv2d of a ResNet": (F, "conv2d", RESNET, ("image",)),
    "F.batch_norm of a ResNet": (F, "batch_norm", RESNET, ("image",)),
    "F.relu of a ResNet": (F, "relu", RESNET, ("image",)),
    "F.avg_pool2d of a ResNet": (F, "avg_pool2d", RESNET, ("image",)),
    "nn.BatchNorm2d.forward of a ResNet": (nn.BatchNorm2d, "forward", RESNET, ("image",)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_torch_replaced(name, monkeypatch):
    owner, attribute, config, changes = FUNCTIONS[name]
    unchanged(config)
    trio = make_trio(config)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, scaled(getattr(owner, attribute)))
        assert_habit(trio, config, changes)
    assert_habit(trio, config, changes=())


# name: (class of both libraries, method, model, whose numbers change)
METHODS = {
    "LayerNorm.forward": ("LayerNorm", "forward", VIT, BOTH),
    "QuickGELU.forward": ("QuickGELU", "forward", VIT, BOTH),
    "Transformer.forward": ("Transformer", "forward", VIT, ()),
    "VisionTransformer.forward": ("VisionTransformer", "forward", VIT, ("image",)),
    "CLIP.encode_image": ("CLIP", "encode_image", VIT, ("image",)),
    "CLIP.encode_text": ("CLIP", "encode_text", VIT, ("text",)),
    "Bottleneck.forward": ("Bottleneck", "forward", RESNET, ("image",)),
    "AttentionPool2d.forward": ("AttentionPool2d", "forward", RESNET, ("image",)),
    "ModifiedResNet.forward": ("ModifiedResNet", "forward", RESNET, ("image",)),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_a_class_replaced(name, monkeypatch):
    kind, method, config, changes = METHODS[name]
    unchanged(config)
    trio = make_trio(config)
    with monkeypatch.context() as patch:
        for library in libraries():
            patch.setattr(getattr(library, kind), method, scaled(getattr(getattr(library, kind), method)))
        for module in trio[2].modules() if kind == "LayerNorm" else ():
            if isinstance(module, nn.LayerNorm):  # the exact model's are PyTorch's own
                patch.setattr(module, "forward", scaled(module.forward), raising=False)
        assert_habit(trio, config, changes)
    assert_habit(trio, config, changes=())


def test_what_was_replaced_before_the_import_is_watched_until_it_is_back():
    """A profiler may be on when clipfast is imported."""
    owner = SimpleNamespace(linear=scaled(F.linear), gelu=F.gelu)
    functions = Functions()
    functions.add(owner, "linear", "gelu", "not_in_this_pytorch")
    assert not functions.unchanged()
    owner.linear = F.linear
    assert functions.unchanged()
    owner.gelu = scaled(F.gelu)
    assert not functions.unchanged()
