"""Changes made after a first encode: what was found then must not be taken for granted."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from clipfast.packing import Rows, pack_text

from ..clips import VIT, make_trio
from .habits import TEXTS, assert_habit, embed, scaled, unchanged


def _blocks(m):
    return [*m.transformer.resblocks, *m.visual.transformer.resblocks]


def _last_again(block):
    gelu = block.mlp.gelu
    del block.mlp.gelu
    block.mlp.gelu = gelu  # the same modules in another order


def _other_dictionary(block):
    block.ln_1.__dict__ = {**vars(block.ln_1), "forward": scaled(block.ln_1.forward)}


def _as_long_as_before(block):
    del vars(block.ln_1)["_is_full_backward_hook"]
    block.ln_1.forward = scaled(block.ln_1.forward)


def _other_hooks(block):
    block.ln_1._forward_hooks = OrderedDict({0: lambda module, args, out: 1.25 * out})


def _compiled_call(block):
    block.ln_1._compiled_call_impl = scaled(block.ln_1._call_impl)


def _other_child(block):
    block._modules["mlp"] = nn.Sequential(block.mlp.c_fc, nn.ReLU(), block.mlp.c_proj)


def _class(block):
    block.ln_1.__class__ = type("Norm", (type(block.ln_1),), {"forward": scaled(type(block.ln_1).forward)})


def _heads(block):
    block.attn.num_heads = 4


def _eps(block):
    block.ln_1.eps, block.ln_2.eps = 0.1, 0.3


def _pruned_to_sparse(block):
    weight = block.mlp.c_fc.weight.data
    block.mlp.c_fc.weight = nn.Parameter(torch.where(weight.abs() > 0.08, weight, 0.0).to_sparse_csr())


def _one_bias_for_all(block):
    block.mlp.c_fc.bias.data = block.mlp.c_fc.bias.data[:1]


def _bias_as_a_row(block):
    for owner, name in ((block.mlp.c_fc, "bias"), (block.attn, "in_proj_bias")):
        bias = getattr(owner, name)
        bias.data = 1.25 * bias.data[None]


def _fewer_hidden_units(block):
    mlp = block.mlp
    mlp.c_fc.weight.data, mlp.c_fc.bias.data = mlp.c_fc.weight.data[:100], mlp.c_fc.bias.data[:100]
    mlp.c_proj.weight.data = mlp.c_proj.weight.data[:, :100]


CHANGES = {
    change.__name__.strip("_"): change
    for change in (
        _last_again, _other_dictionary, _as_long_as_before, _other_hooks, _compiled_call, _other_child, _class, _heads,
        _eps, _pruned_to_sparse, _one_bias_for_all, _bias_as_a_row, _fewer_hidden_units,
    )
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_the_first_encode(name):
    trio = make_trio(VIT)
    with torch.no_grad():
        for model in trio:
            embed(model), embed(model)
            for block in _blocks(model):
                CHANGES[name](block)
    assert_habit(trio, VIT)


def test_packed_texts_after_a_change():
    """Whoever packs texts on his own asks no other way whether the modules are the same."""
    model = make_trio(VIT)[0]
    packed = pack_text(TEXTS, *model.positional_embedding.shape[:1], *model.token_embedding.weight.shape[:1])
    with torch.no_grad():
        before = model.encode_text(TEXTS)
        assert torch.equal(model.encode_packed(packed), before)
        model.transformer.resblocks[0].mlp = model.transformer.resblocks[1].mlp
        after = model.encode_packed(packed)
        assert torch.equal(after, model.encode_text(TEXTS)) and not torch.equal(after, before)


def test_pooled_rows_after_a_change():
    """The same of whoever calls a transformer's `pooled` himself, also after a call that kept what it gathered."""
    model = make_trio(VIT)[0]
    transformer = model.visual.transformer
    x, rows, index = torch.randn(10, transformer.width), Rows((5, 5)), torch.tensor([0, 5])
    with torch.no_grad():
        embed(model)
        before = transformer.pooled(x, rows, index, causal=False)
        fc2 = transformer.resblocks[1].mlp.c_proj
        fc2.weight = nn.Parameter(2 * fc2.weight)
        after = transformer.pooled(x, rows, index, causal=False)
        assert torch.equal(after, copy.deepcopy(transformer).pooled(x, rows, index, causal=False))
        assert not torch.equal(after, before)


CALLS = {
    f"{kind.__name__}.{name}": (kind, name)
    for kind in (nn.Linear, nn.LayerNorm, nn.Sequential, nn.MultiheadAttention)
    for name in ("__call__", "_call_impl")
}


@pytest.mark.parametrize("name", CALLS)
def test_the_call_of_one_class_replaced(name, monkeypatch):
    """Which has none of its own, but inherits nn.Module's."""
    kind, attribute = CALLS[name]
    unchanged(VIT)
    trio = make_trio(VIT)
    with torch.no_grad():
        [embed(model) for model in trio]
    with monkeypatch.context() as patch:
        patch.setattr(kind, attribute, scaled(getattr(kind, attribute)))
        assert_habit(trio, VIT)
    assert_habit(trio, VIT, changes=())
