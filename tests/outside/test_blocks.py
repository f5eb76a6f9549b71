"""Edits of blocks and towers by programs around openai/CLIP, beyond those of tests/test_changed_modules.py."""

from __future__ import annotations

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ..clips import VIT, make_trio
from .edits import Wrapped, each_block, each_tower, last_blocks, mixed, resblocks, set_to
from .habits import BOTH, assert_habit, scaled

# ---- attention ----


def _more_heads_alone(block, _):
    block.attn.num_heads = 4  # head_dim stays as it was: PyTorch's attention does not read it


class _OwnAttention(nn.Module):
    """Attention with projections of its own, as LoRA and relevance maps build from what was there."""

    def __init__(self, attn, values_alone=False):
        super().__init__()
        self.num_heads, self.values_alone = attn.num_heads, values_alone
        self.in_proj_weight, self.in_proj_bias, self.out_proj = attn.in_proj_weight, attn.in_proj_bias, attn.out_proj

    def forward(self, q, k, v, need_weights=False, attn_mask=None):
        q, k, v = F.linear(q, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.values_alone:
            q = k = v
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
        scores = q @ k.transpose(-2, -1) * 0.1
        out = (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v
        return self.out_proj(out.permute(2, 0, 1, 3).flatten(2)), None


def _values_alone(block, _):
    """MaskCLIP: each place gives its own value, projected."""
    attn = block.attn
    width = attn.embed_dim

    def forward(self, q, k, v, **_):
        v = F.linear(v, self.in_proj_weight[-width:], self.in_proj_bias[-width:])
        return F.linear(v, self.out_proj.weight, self.out_proj.bias), None

    attn.forward = types.MethodType(forward, attn)


class _MergedWeight(nn.Module):
    """LoRA in out_proj, of which attention reads the weight and calls nothing."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.up = linear, nn.Parameter(0.1 * torch.randn(len(linear.weight), 1))

    weight = property(lambda self: self.linear.weight + self.up)
    bias = property(lambda self: self.linear.bias)


def _replaced_block(block, library):
    """A block made around the parts of another, without the constructor of its class."""

    class Block(library.ResidualAttentionBlock):
        def __init__(self, old):
            nn.Module.__init__(self)
            self.attn, self.ln_1, self.mlp, self.ln_2 = old.attn, old.ln_1, old.mlp, old.ln_2
            self.attn_mask = old.attn_mask

        def forward(self, x):
            return x + 0.5 * self.mlp(self.ln_2(x + self.attention(self.ln_1(x))))

    return Block(block)


def _replaced_blocks(m, library):
    for tower in (m, m.visual):
        tower.transformer.resblocks[-1] = _replaced_block(tower.transformer.resblocks[-1], library)


def _all_dropped(block, _):
    block.attn.dropout = 1.0
    block.attn.train()


def _mask_for_each_sample(m, _):
    masks = torch.randn(12, 17, 17).bfloat16().to(m.dtype)
    m.visual.transformer.resblocks[1].attn_mask = masks


def _mask_that_learns(m, _):
    for block in m.transformer.resblocks:
        block.attn_mask = nn.Parameter(torch.randn(12, 12).bfloat16().to(m.dtype))


def _causal_mask_of_some_places(m, _):
    """Not causal where the length is the image's, though its corner is."""
    m.visual.transformer.resblocks[0].attn_mask = torch.full((17, 17), float("-inf")).triu_(16)


ATTENTION = {
    "num_heads without head_dim": (each_block(_more_heads_alone), BOTH),
    "attention of one's own": (each_block(lambda b, _: setattr(b, "attn", _OwnAttention(b.attn))), BOTH),
    "value-value attention": (last_blocks(lambda b, _: setattr(b, "attn", _OwnAttention(b.attn, True))), BOTH),
    "values alone": (last_blocks(_values_alone), BOTH),
    "out_proj without bias": (each_block(lambda b, _: setattr(b.attn.out_proj, "bias", None)), BOTH),
    "out_proj whose weight is computed": (
        each_block(lambda b, _: setattr(b.attn, "out_proj", _MergedWeight(b.attn.out_proj))),
        BOTH,
    ),
    "in_proj without bias": (each_block(lambda b, _: setattr(b.attn, "in_proj_bias", None)), BOTH),
    "all attention dropped in training": (each_block(_all_dropped), BOTH),
    "a mask for each sample and head": (_mask_for_each_sample, ("image",)),
    "a mask that learns": (_mask_that_learns, ("text",)),
    "a mask of one corner": (_causal_mask_of_some_places, ("image",)),
    "a hook on out_proj, which is never called": (
        each_block(lambda b, _: b.attn.out_proj.register_forward_hook(lambda _, args, out: 100 * out)),
        (),
    ),
}


# ---- norms, activations, MLPs ----


def _without(name, *norms):
    def change(block, _):
        for norm in norms:
            setattr(getattr(block, norm), name, None)

    return change


def _ends_without_bias(m, _):
    m.ln_final.bias = m.visual.ln_pre.bias = m.visual.ln_post.bias = None


def _class_swapped(block, _):
    class Norm(type(block.ln_1)):
        def forward(self, x):
            return mixed(super().forward(x))

    block.ln_1.__class__ = Norm


def _accelerated(m, _):
    """As accelerate's offloading wraps each module: forward is a partial of a function, the old one kept beside."""
    for module in m.modules():
        if isinstance(module, nn.Linear):
            module._old_forward = module.forward
            module.forward = functools.update_wrapper(
                functools.partial(lambda module, x: 1.25 * module._old_forward(x), module), module.forward
            )


MLP = {
    "ln_1 without bias": (each_block(_without("bias", "ln_1")), BOTH),
    "ln_2 without bias": (each_block(_without("bias", "ln_2")), BOTH),
    "norms without weight": (each_block(_without("weight", "ln_1", "ln_2")), BOTH),
    "ends without bias": (_ends_without_bias, BOTH),
    "another class for ln_1": (each_block(_class_swapped), BOTH),
    "forward of an ln_2": (each_block(lambda b, _: setattr(b.ln_2, "forward", lambda x: 0.5 * x)), BOTH),
    "forward of a QuickGELU": (each_block(lambda b, _: setattr(b.mlp.gelu, "forward", torch.relu)), BOTH),
    "forward of an MLP": (each_block(lambda b, _: setattr(b.mlp, "forward", lambda x: 0.5 * x)), BOTH),
    "a layer after the MLP": (each_block(lambda b, _: b.mlp.add_module("scale", nn.Tanh())), BOTH),
    "everything dropped in training": (
        each_block(lambda b, _: b.mlp.add_module("drop", nn.Dropout(1.0).train())),
        BOTH,
    ),
    "no MLP": (each_block(lambda b, _: setattr(b, "mlp", nn.Identity())), BOTH),
    "one norm for both": (each_block(lambda b, _: setattr(b, "ln_2", b.ln_1)), BOTH),
    "offloading hooks": (_accelerated, BOTH),
    "weight norm of old": (each_block(lambda b, _: _weight_norm(b.mlp.c_fc)), BOTH),
}


def _weight_norm(linear):
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(linear)
    linear.weight_g.data *= 1.25


# ---- blocks and towers ----


def _iterated(tower, _):
    """A list of blocks, which the tower's own forward walks."""
    transformer = tower.transformer
    transformer.resblocks = nn.ModuleList(transformer.resblocks)

    def forward(x):
        for block in transformer.resblocks:
            x = 0.5 * x + block(x)
        return x

    transformer.forward = forward


def _shifted(x):
    """A part of the channels comes from the frame before: the batch is a video."""
    return torch.cat([x[..., :32].roll(1, 1), x[..., 32:]], dim=-1)


def _with_prompts(m, _):
    prompts = nn.Parameter(torch.randn(4, 1, 128).bfloat16().to(m.dtype))
    m.visual.transformer.register_forward_pre_hook(
        lambda _, args: (torch.cat([args[0][:1], prompts.expand(-1, args[0].shape[1], -1), args[0][1:]]),)
    )


def _deep_prompts(m, _):
    for block in m.visual.transformer.resblocks:
        prompt = torch.randn(3, 1, 128).bfloat16().to(m.dtype)
        block.register_forward_pre_hook(
            lambda _, args, prompt=prompt: (torch.cat([args[0][:-3], prompt.expand(-1, args[0].shape[1], -1)]),)
        )


def _class_of_the_tower(m, library):
    class Tower(library.VisionTransformer):
        def forward(self, x):
            return 0.5 * super().forward(x)

    m.visual.__class__ = Tower


class _OtherTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 8, stride=8)

    def forward(self, x):
        return self.conv1(x).mean((2, 3))


BLOCKS = {
    "a block made around another's parts": (_replaced_blocks, BOTH),
    "wrapped blocks": (resblocks(lambda old: nn.Sequential(*[Wrapped(block, after=mixed) for block in old])), BOTH),
    "blocks wrapped for checkpointing": (resblocks(lambda old: nn.Sequential(*map(checkpoint_wrapper, old))), ()),
    "the same block again": (resblocks(lambda old: nn.Sequential(old[0], old[0], old[0])), BOTH),
    "a block left out": (each_tower(lambda t, _: setattr(t.transformer.resblocks, "1", nn.Identity())), BOTH),
    "a block deleted": (each_tower(lambda t, _: t.transformer.resblocks.__delitem__(0)), BOTH),
    "a block twice": (each_tower(lambda t, _: t.transformer.resblocks.append(t.transformer.resblocks[0])), BOTH),
    "a list of blocks": (each_tower(_iterated), BOTH),
    "wrapped transformers": (
        each_tower(lambda t, _: setattr(t, "transformer", Wrapped(t.transformer, after=mixed))),
        BOTH,
    ),
    "forward of a transformer": (
        each_tower(lambda t, _: setattr(t.transformer, "forward", lambda x: mixed(t.transformer.resblocks(x)))),
        BOTH,
    ),
    "forward of the blocks": (
        each_tower(
            lambda t, _: setattr(t.transformer.resblocks, "forward", scaled(t.transformer.resblocks.forward)),
        ),
        (),
    ),
    "temporal shift": (resblocks(lambda old: nn.Sequential(*[Wrapped(b, before=_shifted) for b in old])), BOTH),
    "prompts": (_with_prompts, ("image",)),
    "deep prompts": (_deep_prompts, ("image",)),
    "dropped patches": (
        lambda m, _: m.visual.transformer.register_forward_pre_hook(lambda _, args: (args[0][::2],)),
        ("image",),
    ),
    "merged tokens": (
        lambda m, _: m.visual.transformer.resblocks[1].register_forward_hook(
            lambda _, args, out: torch.cat([out[:1], (out[1::2] + out[2::2]) / 2])
        ),
        ("image",),
    ),
    "another class for the tower": (_class_of_the_tower, ("image",)),
    "another tower": (set_to("visual", lambda _: _OtherTower()), ("image",)),
}


@pytest.mark.parametrize("name", [*ATTENTION, *MLP, *BLOCKS])
def test_edited_blocks(name):
    edit, changes = (ATTENTION | MLP | BLOCKS)[name]
    assert_habit(make_trio(VIT, edit), VIT, changes)
