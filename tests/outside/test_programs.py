"""What whole programs do with a model: copies, methods on the object, parts left out, maps of attention, gradients."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import clipfast.model

from ..clips import RESNET, VIT, assert_same, make_trio, weighted
from .edits import Wrapped, each_block, mixed
from .habits import BOTH, TEXTS, assert_habit, embed, images_of, libraries

# ---- copies ----


def _saved_whole(m):
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _loaded_by_assignment(m):
    m.load_state_dict({n: 1.25 * t if t.is_floating_point() else t for n, t in m.state_dict().items()}, assign=True)
    return m


def _loaded_in_part(m):
    weights = {n: 1.25 * t for n, t in m.state_dict().items() if "resblocks.1." in n}
    m.load_state_dict(weights, strict=False)
    return m


def _averaged(m):
    average = torch.optim.swa_utils.AveragedModel(m)
    average.update_parameters(m)
    return average.module


def _one_vector(m):
    vector = nn.utils.parameters_to_vector(m.parameters())
    nn.utils.vector_to_parameters(1.1 * vector.detach(), m.parameters())
    return m


def _new_parameters(m):
    for module in m.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(1.25 * module.weight.detach())
    return m


def _cast_there_and_back(m):
    dtype = m.dtype
    return m.to(torch.bfloat16).to(dtype)


COPIES = {
    "deepcopy": (copy.deepcopy, ()),
    "pickle": (lambda m: pickle.loads(pickle.dumps(m)), ()),
    "torch.save of the whole model": (_saved_whole, ()),
    "share_memory": (lambda m: m.share_memory(), ()),
    "channels last": (lambda m: m.to(memory_format=torch.channels_last), ()),
    "cast there and back": (_cast_there_and_back, ()),
    "state dict by assignment": (_loaded_by_assignment, BOTH),
    "a part of a state dict": (_loaded_in_part, BOTH),
    "average": (_averaged, ()),
    "one vector of parameters": (_one_vector, BOTH),
    "new parameters": (_new_parameters, BOTH),
    "training mode": (lambda m: m.train(), ()),
    "no gradients wanted": (lambda m: m.requires_grad_(False), ()),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_model_copied_or_filled_anew(name):
    """After a first call, so that what is kept between calls would show."""
    change, changes = COPIES[name]
    trio = make_trio(VIT)
    with torch.no_grad():
        for m in trio:
            embed(m)
    assert_habit([change(m) for m in trio], VIT, changes)


def _wrap_blocks(m, _):
    for tower in (m, m.visual):
        tower.transformer.resblocks[1] = Wrapped(tower.transformer.resblocks[1], after=mixed)


@pytest.mark.parametrize("name", ["deepcopy", "pickle", "torch.save of the whole model"])
def test_a_copy_keeps_what_was_edited(name):
    assert_habit([COPIES[name][0](m) for m in make_trio(VIT, _wrap_blocks)], VIT)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_walks_by_name_and_class_find_the_same(config):
    """Quantisers, sharding policies and optimisers' groups go by these."""
    found = []
    for m, library in zip(make_trio(config), libraries(), strict=False):
        kinds = {getattr(library, name) for name in clipfast.model.__all__ if name[0].isupper()}
        found.append(
            {
                "modules": [(n, type(x).__name__) for n, x in m.named_modules()],
                "classes": [(n, k.__name__) for n, x in m.named_modules() for k in kinds if type(x) is k],
                "parameters": [(n, p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()],
                "buffers": [(n, b.shape, b.dtype) for n, b in m.named_buffers()],
                "children": [n for n, _ in m.visual.named_children()],
                "state": [*m.state_dict()],
            }
        )
    assert found[0] == found[1]


# ---- methods on the object, the model's own functions ----


def _logits(m):
    per_image, per_text = m(images_of(m).to(m.dtype), TEXTS)
    return {"image": per_image, "text": per_text}


def _own_encoders(m, _):
    kind = type(m)

    def encode_image(self, image):
        return mixed(kind.encode_image(self, image))

    m.encode_image = types.MethodType(encode_image, m)
    m.encode_text = functools.partial(lambda text, m: mixed(kind.encode_text(m, text)), m=m)


def _scale_as(value):
    def edit(m, _):
        scale = value(m.logit_scale.detach())
        del m.logit_scale
        m.logit_scale = scale

    return edit


def _clamped(m, _):
    m.logit_scale.data.clamp_(0, 1.5)


METHODS = {
    "encoders on the object": (_own_encoders, BOTH),
    "logit_scale as a tensor": (_scale_as(lambda s: 1.25 * s), BOTH),
    "logit_scale of one element": (_scale_as(lambda s: nn.Parameter(1.25 * s[None])), BOTH),
    "logit_scale clamped": (_clamped, BOTH),
}


@pytest.mark.parametrize("name", METHODS)
def test_logits_after_an_edit(name):
    edit, changes = METHODS[name]
    assert_habit(make_trio(VIT, edit), VIT, changes, _logits)


def test_a_tower_without_conv1(monkeypatch):
    """Its users replace the property dtype, since openai/CLIP's asks conv1."""

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 64)

        def forward(self, x):
            return self.fc(x.mean((2, 3)))

    trio = make_trio(VIT, lambda m, _: setattr(m, "visual", Tower()))
    for library in libraries():
        monkeypatch.setattr(library.CLIP, "dtype", property(lambda m: m.positional_embedding.dtype))
    images = torch.randn(4, 3, 32, 32).bfloat16()
    with torch.no_grad():
        assert_same(trio, lambda m: [m.encode_image(images.to(m.dtype)), m.encode_text(TEXTS), m(images, TEXTS)[0]])


def test_images_of_four_channels():
    images = torch.randn(4, 4, 32, 32).bfloat16().float()
    trio = make_trio(VIT, lambda m, _: setattr(m.visual, "conv1", nn.Conv2d(4, 128, 8, stride=8, bias=False)))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same(trio, lambda m: m.encode_image(images))


def test_parts_left_out():
    """One tower alone, to save memory; dtype is all that the text tower asks of the other."""

    def image_alone(m):
        del m.transformer, m.token_embedding, m.ln_final, m.text_projection, m.positional_embedding
        return m.encode_image(images_of(m))

    def text_alone(m):
        m.visual = nn.ModuleDict({"conv1": m.visual.conv1})
        m.visual.conv1 = m.visual["conv1"]
        return m.encode_text(TEXTS)

    with torch.no_grad():
        assert_same(make_trio(VIT), image_alone)
        assert_same(make_trio(VIT), text_alone)


# ---- looking inside ----


def _attention_maps(m):
    """Hooks that ask for the weights of attention, and keep them."""
    maps, handles = {}, []
    for name, module in m.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, options: (args, {**options, "need_weights": True, "average_attn_weights": False}),
                    with_kwargs=True,
                )
            )
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: maps.__setitem__(name, out[1])))
    result = embed(m)
    for handle in handles:
        handle.remove()
    assert len(maps) == 6
    return result | maps


def _attention_maps_by_method(m):
    maps = {}
    for name, module in m.named_modules():
        if isinstance(module, nn.MultiheadAttention):

            def forward(self, q, k, v, need_weights=False, attn_mask=None, name=name):
                out, maps[name] = type(self).forward(self, q, k, v, need_weights=True, attn_mask=attn_mask)
                return out, None

            module.forward = types.MethodType(forward, module)
    result = embed(m)
    for module in m.modules():
        module.__dict__.pop("forward", None)
    assert len(maps) == 6
    return result | maps


def _class_activation(m):
    """Grad-CAM: features of the last blocks, and the gradients that hooks let them keep."""
    kept = {}

    def keep(name):
        def hook(_, args, out):
            out.retain_grad()
            kept[name] = out

        return hook

    paths = ["transformer.resblocks.2.ln_1", "visual.transformer.resblocks.2.ln_1", "visual.transformer.resblocks.1"]
    handles = [m.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    with torch.enable_grad():
        weighted(*m(images_of(m).to(m.dtype), TEXTS)).backward()
    for handle in handles:
        handle.remove()
    return {f"{name} {what}": x for name, out in kept.items() for what, x in (("", out.detach()), ("grad", out.grad))}


def _slices(m):
    x = images_of(m)[:, :, :17, 0].reshape(-1, 17).t()[:, :6, None].expand(-1, -1, 128).to(m.dtype)
    blocks = m.visual.transformer.resblocks
    return [blocks[:2](x), blocks[1:](x), blocks(x), checkpoint_sequential(blocks, 2, x, use_reentrant=False)]


LOOKS = {
    "attention maps by hooks": _attention_maps,
    "attention maps by methods": _attention_maps_by_method,
    "Grad-CAM": _class_activation,
    "slices of blocks": _slices,
}


@pytest.mark.parametrize("name", LOOKS)
def test_looking_inside(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(make_trio(VIT), LOOKS[name])


# ---- gradients ----


def _causal_mask_that_learns(m, _):
    for block in m.transformer.resblocks:
        block.attn_mask = nn.Parameter(m.build_attention_mask().to(m.dtype))


def _padding(m, _):
    old = m.token_embedding.weight.detach()
    m.token_embedding = nn.Embedding.from_pretrained(old, freeze=False, padding_idx=3)


def _by_frequency(m, _):
    m.token_embedding.scale_grad_by_freq = True


def _biases_alone(m, _):
    for name, parameter in m.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))


def _last_blocks_alone(m, _):
    for name, parameter in m.named_parameters():
        parameter.requires_grad_("resblocks.2." in name or "proj" in name)


def _hooked_parameters(m, _):
    for name, parameter in m.named_parameters():
        if "c_fc" in name or "embedding" in name:
            parameter.register_hook(lambda grad: 2 * grad)


GRADIENTS = {
    "a causal mask that learns": _causal_mask_that_learns,
    "an index of padding": _padding,
    "gradients by frequency": _by_frequency,
    "biases alone": _biases_alone,
    "last blocks alone": _last_blocks_alone,
    "hooks on parameters": _hooked_parameters,
    "no norm of the values": each_block(lambda b, _: b.ln_1.weight.requires_grad_(False)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_after_an_edit(name):
    """In float64, where nothing hides a wrong term."""
    ours, _, exact = make_trio(VIT, GRADIENTS[name])
    gradients = []
    for m in (ours.double(), exact):
        weighted(*m(images_of(m).double(), TEXTS)).backward()
        gradients.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for n, gradient in gradients[1].items():
        bound = 1e-9 * max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(gradients[0][n], gradient, rtol=0, atol=bound, msg=lambda m, n=n: f"{n}: {m}")
