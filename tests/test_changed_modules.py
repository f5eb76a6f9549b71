"""Modules that users replace, patch or re-parametrise in an openai/CLIP model: ours then does what theirs does.

Each test makes the same change to openai-clip's model, to ours and to an exact float64 one, and compares by the
tolerance rule.
"""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import clipfast.model

from . import peers
from .clips import RESNET, VIT, assert_same, assert_same_gradients, encode, make_images, make_texts, make_trio, weighted

IMAGES, TEXTS = make_images(VIT, 8), make_texts(VIT, 8)
RESNET_IMAGES = make_images(RESNET, 4)


class _LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, x):
        return self.base(x) + x @ self.down.t() @ self.up.t()


class _ScaledLinear(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


class _Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(128, 128)

    def forward(self, x):
        return x + self.fc(x).relu()


def _hooked(module):
    module.register_forward_hook(lambda _, args, out: 1.5 * out)
    return module


class _Double(nn.Module):
    def forward(self, weight):
        return 1.5 * weight


def _blocks(m):
    return [*m.transformer.resblocks, *m.visual.transformer.resblocks]


def _each_block(change):
    def edit(m, library):
        for block in _blocks(m):
            change(block, library)

    return edit


def _set(path, make):
    """Sets block.<path> of every block to make(what was there, library)."""
    *parents, last = path.split(".")

    def change(block, library):
        parent = operator.attrgetter(".".join(parents))(block) if parents else block
        setattr(parent, last, make(getattr(parent, last), library))

    return _each_block(change)


def _fresh_attention(*, subclass=False, **options):
    kind = type("Attention", (nn.MultiheadAttention,), {}) if subclass else nn.MultiheadAttention

    def make(_, library):
        attn = kind(128, 2, **options)
        for parameter in attn.parameters():
            nn.init.normal_(parameter, std=0.1)
        return attn

    return _set("attn", make)


def _window(length: int, dtype: torch.dtype = torch.float32):
    """Causal, and no further back than three tokens."""
    allowed = torch.ones(length, length).tril_().triu_(-2).bool()
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~allowed, float("-inf"))


def _mask(make):
    def edit(m, _):
        for block in m.transformer.resblocks:
            block.attn_mask = make(block.attn_mask)

    return edit


def _patched_forward(block, _):
    block.forward = lambda x: x + block.mlp(block.ln_2(x))


def _patched_attention(block, _):
    block.attention = lambda x: 0.5 * x


def _other_heads(block, _):
    block.attn.num_heads, block.attn.head_dim = 4, 32


def _other_eps_of_the_towers(m, _):
    m.visual.ln_pre.eps, m.visual.ln_post.eps, m.ln_final.eps = 0.1, 0.2, 0.3


def _separate_projections(block, _):
    attn = block.attn
    for name, weight in zip("qkv", attn.in_proj_weight.detach().split(128), strict=True):
        setattr(attn, f"{name}_proj_weight", nn.Parameter(1.5 * weight))
    attn.in_proj_weight, attn._qkv_same_embed_dim = None, False


def _batch_first(m, _):
    for block in m.visual.transformer.resblocks:
        block.attn.batch_first = True


def _same_mask_for_the_image_tower(m, _):
    mask = torch.full((17, 17), float("-inf")).triu_(1)
    for block in m.visual.transformer.resblocks:
        block.attn_mask = mask


def _conv(positions=17, **options):
    def edit(m, _):
        m.visual.conv1 = nn.Conv2d(3, 128, **options)
        m.visual.positional_embedding = nn.Parameter(torch.randn(positions, 128))

    return edit


def _overlapping_patches(m, _):
    m.visual.conv1.stride = (6, 6)
    m.visual.positional_embedding = nn.Parameter(torch.randn(26, 128))


def _shorter(m, _):
    for tower in (m.transformer, m.visual.transformer):
        tower.resblocks = nn.Sequential(*[*tower.resblocks][:2])


def _empty(m, _):
    for tower in (m.transformer, m.visual.transformer):
        tower.resblocks = nn.Sequential()


def _reversed(m, _):
    for tower in (m.transformer, m.visual.transformer):
        tower.resblocks = nn.Sequential(*reversed([*tower.resblocks]))


def _with_adapter(m, _):
    for tower in (m.transformer, m.visual.transformer):
        tower.resblocks.insert(1, _Adapter())


def _edit_one_mask(m, _):
    m.transformer.resblocks[1].attn_mask = _window(12)


def _mask_edited_where_no_counter_sees(m, _):
    with torch.no_grad():
        m.encode_text(TEXTS.to(torch.int64))
    m.transformer.resblocks[0].attn_mask.data[5, 3] = float("-inf")


def _subclassed_embedding(m, _):
    class Scaled(nn.Embedding):
        def forward(self, x):
            return 1.5 * super().forward(x)

    scaled = Scaled(60, 128)
    scaled.weight = m.token_embedding.weight
    m.token_embedding = scaled


EDITS = {
    "lora": _set("mlp.c_fc", lambda old, _: _LoRA(old)),
    "subclass of linear": _set("mlp.c_proj", lambda *_: _ScaledLinear(512, 128)),
    "wider mlp": _each_block(
        lambda b, lib: (setattr(b.mlp, "c_fc", nn.Linear(128, 640)), setattr(b.mlp, "c_proj", nn.Linear(640, 128)))
    ),
    "c_fc without bias": _set("mlp.c_fc", lambda *_: nn.Linear(128, 512, bias=False)),
    "c_proj without bias": _set("mlp.c_proj", lambda *_: nn.Linear(512, 128, bias=False)),
    "mlp without names": _set(
        "mlp", lambda _, lib: nn.Sequential(nn.Linear(128, 64), lib.QuickGELU(), nn.Linear(64, 128))
    ),
    "mlp with dropout in eval": _set(
        "mlp",
        lambda _, lib: nn.Sequential(nn.Linear(128, 64), nn.Dropout(0.5), lib.QuickGELU(), nn.Linear(64, 128)).eval(),
    ),
    "gelu": _set("mlp.gelu", lambda *_: nn.GELU()),
    "tanh gelu": _set("mlp.gelu", lambda *_: nn.GELU("tanh")),
    "gelu with a hook": _set("mlp.gelu", lambda *_: _hooked(nn.GELU())),
    "silu": _set("mlp.gelu", lambda *_: nn.SiLU()),
    "gelu in one block": lambda m, _: setattr(m.transformer.resblocks[1].mlp, "gelu", nn.GELU()),
    "plain layer norm": _set("ln_1", lambda *_: nn.LayerNorm(128)),
    "other eps": _each_block(lambda b, _: (setattr(b.ln_1, "eps", 0.1), setattr(b.ln_2, "eps", 0.3))),
    "other eps and a hook": _each_block(lambda b, _: (setattr(b.ln_1, "eps", 0.1), _hooked(b.ln_2))),
    "other eps of the towers": _other_eps_of_the_towers,
    "other eps without projection": lambda m, lib: (_other_eps_of_the_towers(m, lib), setattr(m.visual, "proj", None)),
    "no affine": _set("ln_2", lambda *_: nn.LayerNorm(128, elementwise_affine=False)),
    "attention without bias": _fresh_attention(bias=False),
    "attention with bias_kv": _fresh_attention(add_bias_kv=True),
    "attention with zero_attn": _fresh_attention(add_zero_attn=True),
    "attention with the batch first": _batch_first,
    "subclass of attention": _fresh_attention(subclass=True),
    "separate projections": _each_block(_separate_projections),
    "other heads": _each_block(_other_heads),
    "patched forward": _each_block(_patched_forward),
    "patched attention": _each_block(_patched_attention),
    "patched one forward": lambda m, _: _patched_forward(m.visual.transformer.resblocks[2], None),
    "no mask": _mask(lambda _: None),
    "window": _mask(lambda _: _window(12)),
    "mask edited in place": lambda m, _: m.transformer.resblocks[0].attn_mask.fill_(0.0),
    "mask edited through data": _mask_edited_where_no_counter_sees,
    "one other mask": _edit_one_mask,
    "mask off by one": _mask(lambda _: torch.full((12, 12), float("-inf")).triu_(2)),
    "mask of bools": _mask(lambda _: torch.ones(12, 12).triu_(1).bool()),
    "mask for the image tower": lambda m, _: setattr(m.visual.transformer.resblocks[0], "attn_mask", _window(17)),
    "causal mask for the image tower": _same_mask_for_the_image_tower,
    "fewer blocks": _shorter,
    "no blocks": _empty,
    "blocks reversed": _reversed,
    "adapter": _with_adapter,
    "convolution with bias": _conv(kernel_size=8, stride=8),
    "padded convolution": _conv(kernel_size=8, stride=8, padding=1, bias=False),
    "dilated convolution": _conv(kernel_size=4, stride=4, dilation=2, positions=50, bias=False),
    "oblong patches": _conv(kernel_size=(8, 4), stride=(8, 4), positions=33, bias=False),
    "overlapping patches": _overlapping_patches,
    "no projection": lambda m, _: setattr(m.visual, "proj", None),
    "identity for ln_post": lambda m, _: setattr(m.visual, "ln_post", nn.Identity()),
    "identity for ln_pre": lambda m, _: setattr(m.visual, "ln_pre", nn.Identity()),
    "subclassed embedding": _subclassed_embedding,
    "parametrised mlp": _each_block(lambda b, _: parametrize.register_parametrization(b.mlp.c_fc, "weight", _Double())),
    "parametrised attention": _each_block(
        lambda b, _: parametrize.register_parametrization(b.attn, "in_proj_weight", _Double())
    ),
    "parametrised out_proj": _each_block(
        lambda b, _: parametrize.register_parametrization(b.attn.out_proj, "weight", _Double())
    ),
    "parametrised bias": _each_block(lambda b, _: parametrize.register_parametrization(b.ln_1, "bias", _Double())),
    "parametrised root": lambda m, _: parametrize.register_parametrization(m, "text_projection", _Double()),
    "parametrised tower": lambda m, _: parametrize.register_parametrization(m.visual, "proj", _Double()),
    "pruned": _each_block(lambda b, _: prune.l1_unstructured(b.mlp.c_proj, "weight", amount=0.5)),
    "weight norm": _each_block(lambda b, _: nn.utils.parametrizations.weight_norm(b.mlp.c_fc)),
}


@pytest.mark.parametrize("name", EDITS)
def test_changed_modules_do_what_they_do_on_openai_clip(name):
    trio = make_trio(VIT, EDITS[name])
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS), what=name)


@pytest.mark.parametrize(
    "name",
    ["lora", "patched forward", "window", "no mask", "adapter", "parametrised attention", "convolution with bias"],
)
def test_gradients_through_changed_modules(name):
    def run(m):
        weighted(*m(IMAGES, TEXTS)).backward()
        return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}

    assert_same_gradients(VIT, run, EDITS[name])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_attention(training):
    """Everything is dropped, so that which numbers are drawn does not matter; in evaluation nothing is."""

    def edit(m, _):
        for block in _blocks(m):
            block.attn.dropout = 1.0
            block.attn.train(training)

    trio = make_trio(VIT, edit)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same(trio, encode(IMAGES, TEXTS))


def test_a_class_patched_for_all_its_objects(monkeypatch):
    """As attention visualisers do, after the models are made."""
    trio = make_trio(VIT)
    for library in (clipfast.model, peers.openai_clip().model):
        monkeypatch.setattr(library.ResidualAttentionBlock, "forward", lambda self, x: x + self.mlp(self.ln_2(x)))
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS))
    monkeypatch.undo()
    for library in (clipfast.model, peers.openai_clip().model):
        monkeypatch.setattr(library.QuickGELU, "forward", lambda self, x: x.relu())
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS))
    monkeypatch.undo()
    for library in (clipfast.model, peers.openai_clip().model):
        monkeypatch.setattr(library.ResidualAttentionBlock, "attention", lambda self, x: 0.5 * x)
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS))
    monkeypatch.undo()
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS))


def test_positions_interpolated_for_larger_images():
    """openai/CLIP never compares an image with input_resolution, and users rely on that."""
    images = torch.randn(4, 3, 48, 48)

    def edit(m, _):
        grid = m.visual.positional_embedding[1:].detach().t().reshape(1, 128, 4, 4)
        grid = F.interpolate(grid.float(), size=(6, 6), mode="bilinear").flatten(2)[0].t().bfloat16()
        first = m.visual.positional_embedding[:1].detach()
        m.visual.positional_embedding = nn.Parameter(torch.cat([first, grid.to(first.dtype)]))

    trio = make_trio(VIT, edit)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same(trio, encode(images, None))


def test_a_longer_context():
    """Long-caption models stretch the positions and rebuild the masks."""
    texts = make_texts((*VIT[:5], 20, *VIT[6:]), 8)

    def edit(m, _):
        m.context_length = 20
        m.positional_embedding = nn.Parameter(torch.randn(20, 128))
        for block in m.transformer.resblocks:
            block.attn_mask = m.build_attention_mask()

    with torch.no_grad():
        assert_same(make_trio(VIT, edit), encode(None, texts))


def test_a_tower_that_returns_more_than_the_embedding():
    """Dense predictors patch visual.forward; encode_image hands on what it returns."""

    def edit(m, _):
        tower = type(m.visual)
        m.visual.forward = lambda x: (tower.forward(m.visual, x), x.mean((1, 2, 3)))

    with torch.no_grad():
        assert_same(make_trio(VIT, edit), lambda m: m.encode_image(IMAGES.to(m.dtype)))


RESNET_EDITS = {
    "dense features": lambda m, _: setattr(m.visual, "attnpool", nn.Identity()),
    "other heads": lambda m, _: setattr(m.visual.attnpool, "num_heads", 4),
    "another activation": lambda m, _: setattr(m.visual.layer2[0], "relu2", nn.Softplus()),
    "no downsample": lambda m, _: setattr(m.visual.layer1[1], "downsample", nn.Identity()),
    "patched pool": lambda m, _: setattr(m.visual.attnpool, "forward", lambda x: x.mean((2, 3))),
    "pool positions dropped": lambda m, _: m.visual.attnpool.positional_embedding.data.zero_(),
    "parametrised pool": lambda m, _: parametrize.register_parametrization(
        m.visual.attnpool.k_proj, "weight", _Double()
    ),
}


@pytest.mark.parametrize("name", RESNET_EDITS)
def test_changed_modules_of_a_resnet(name):
    trio = make_trio(RESNET, RESNET_EDITS[name])
    images = make_images((0, 96), 3) if name in ("dense features", "patched pool") else RESNET_IMAGES
    with torch.no_grad():
        assert_same(trio, encode(images, None), what=name)
