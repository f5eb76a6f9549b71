"""Edits of embeddings, projections and ResNets by programs around openai/CLIP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ..clips import RESNET, VIT, make_trio
from .edits import Wrapped, mixed, set_to
from .habits import assert_habit, scaled

IMAGE, TEXT = ("image",), ("text",)


# ---- embeddings and projections ----


def _as_tensor(*path):
    """The parameter becomes a plain tensor, as whoever freezes or computes it does."""

    def edit(m, _):
        owner = m.get_submodule(".".join(path[:-1]))
        value = 1.25 * getattr(owner, path[-1]).detach()
        delattr(owner, path[-1])
        setattr(owner, path[-1], value)

    return edit


def _hooked_embedding(m, _):
    m.token_embedding.register_forward_hook(lambda _, args, out: mixed(out))


def _more_tokens(m, _):
    old = m.token_embedding.weight.detach()
    m.token_embedding = nn.Embedding.from_pretrained(torch.cat([old.flip(0), old]))


ENDS = {
    "class_embedding with a batch": (
        set_to("visual.class_embedding", lambda p: nn.Parameter(1.25 * p[None, None])),
        IMAGE,
    ),
    "image positions with a batch": (
        set_to("visual.positional_embedding", lambda p: nn.Parameter(1.25 * p[None])),
        IMAGE,
    ),
    "text positions with a batch": (set_to("positional_embedding", lambda p: nn.Parameter(1.25 * p[None])), TEXT),
    "one position for every token": (set_to("positional_embedding", lambda p: nn.Parameter(p[:1])), TEXT),
    "one position for every patch": (set_to("visual.positional_embedding", lambda p: nn.Parameter(p[:1])), IMAGE),
    "a wider projection": (set_to("visual.proj", lambda p: nn.Parameter(torch.cat([p, p], 1))), IMAGE),
    "proj as a tensor": (_as_tensor("visual", "proj"), IMAGE),
    "text_projection as a tensor": (_as_tensor("text_projection"), TEXT),
    "positions as a tensor": (_as_tensor("positional_embedding"), TEXT),
    "class_embedding as a tensor": (_as_tensor("visual", "class_embedding"), IMAGE),
    "no ln_final": (set_to("ln_final", lambda _: nn.Identity()), TEXT),
    "embeddings of at most some length": (set_to("token_embedding.max_norm", lambda _: 1.0), TEXT),
    "a hook on the token embedding": (_hooked_embedding, TEXT),
    "more tokens": (_more_tokens, TEXT),
    "a wrapped token embedding": (set_to("token_embedding", lambda old: Wrapped(old, after=mixed)), TEXT),
}


# ---- ResNet ----


class _FrozenNorm(nn.Module):
    """BatchNorm as detectors freeze it."""

    def __init__(self, norm):
        super().__init__()
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", (norm.bias.detach() - norm.running_mean * scale)[:, None, None])

    def forward(self, x):
        return x * self.scale + self.shift


def _frozen_norms(m, _):
    for block in m.visual.layer1:
        block.bn1, block.bn2, block.bn3 = map(_FrozenNorm, (block.bn1, block.bn2, block.bn3))


def _finer_features(m, _):
    block = m.visual.layer4[0]
    block.avgpool = block.downsample[0] = nn.Identity()
    old = m.visual.attnpool.positional_embedding.detach()
    m.visual.attnpool.positional_embedding = nn.Parameter(torch.cat([old[:1], old[1:].repeat(4, 1)]))


def _dense_pool(m, library):
    class Pool(library.AttentionPool2d):
        def __init__(self, old):
            nn.Module.__init__(self)
            self.v_proj, self.c_proj = old.v_proj, old.c_proj

        def forward(self, x):
            return self.c_proj(self.v_proj(x.flatten(2).transpose(1, 2)))

    m.visual.attnpool = Pool(m.visual.attnpool)


def _hooks_in_the_pool(m, _):
    for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        getattr(m.visual.attnpool, name).register_forward_hook(lambda _, args, out: 100 * out)


RESNETS = {
    "training": (lambda m, _: m.train(), IMAGE),
    "frozen norms": (_frozen_norms, ()),
    "finer features": (_finer_features, IMAGE),
    "dense pool": (_dense_pool, IMAGE),
    "a pool of another width": (
        lambda m, _: setattr(m.visual.attnpool, "c_proj", nn.Linear(1024, 96)),
        IMAGE,
    ),
    "hooks on what the pool never calls": (_hooks_in_the_pool, ()),
    "SiLU for ReLU": (set_to("visual.relu3", lambda _: nn.SiLU()), IMAGE),
    "a convolution with bias": (set_to("visual.conv1", lambda _: nn.Conv2d(3, 16, 3, 2, 1)), IMAGE),
    "a layer left out": (lambda m, _: m.visual.layer1.__delitem__(1), IMAGE),
    "forward of a layer": (set_to("visual.layer2.forward", scaled), IMAGE),
}


@pytest.mark.parametrize("name", ENDS)
def test_edited_ends(name):
    edit, changes = ENDS[name]
    assert_habit(make_trio(VIT, edit), VIT, changes)


@pytest.mark.parametrize("name", RESNETS)
def test_an_edited_resnet(name):
    edit, changes = RESNETS[name]
    assert_habit(make_trio(RESNET, edit), RESNET, changes)
