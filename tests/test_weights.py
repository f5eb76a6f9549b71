"""Weights that change between calls, copies of a model, its dtype and its mode: the next call follows."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import clipfast
import clipfast.model

from . import peers
from .accuracy import assert_accurate
from .clips import (
    RESNET,
    VIT,
    assert_same,
    assert_same_gradients,
    convert,
    encode,
    exact_features,
    make_exact,
    make_images,
    make_pair,
    make_texts,
    make_trio,
    weighted,
)

IMAGES, TEXTS = make_images(VIT, 8), make_texts(VIT, 8)
RESNET_IMAGES = make_images(RESNET, 4)


def _in_place(m):
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.mul_(1.25)


def _one_element(path, *place, value=3.0):
    def edit(m):
        dict(m.named_parameters())[path].data[place] = value

    return edit


def _numpy(m):
    m.transformer.resblocks[2].mlp.c_proj.bias.detach().numpy()[3] = 4.0


def _load(m):
    state = {name: tensor.flip(0) if tensor.ndim else tensor for name, tensor in m.state_dict().items()}
    m.load_state_dict(state)


def _assign(m):
    state = {name: tensor.flip(0).clone() if tensor.ndim else tensor for name, tensor in m.state_dict().items()}
    m.load_state_dict(state, assign=True)


def _optimiser(kind, **options):
    def edit(m):
        optimiser = kind(m.parameters(), lr=0.01, **options)
        for parameter in m.parameters():
            parameter.grad = parameter.detach() * 2 - 0.1
        optimiser.step()
        m.zero_grad()

    return edit


def _new_data(m):
    for parameter in m.parameters():
        parameter.data = parameter.data.flip(0) if parameter.ndim else parameter.data


def _new_parameters(m):
    block = m.visual.transformer.resblocks[2]
    block.attn.in_proj_weight = nn.Parameter(block.attn.in_proj_weight.detach().flip(1))
    block.mlp.c_fc.bias = nn.Parameter(block.mlp.c_fc.bias.detach() + 1)
    m.text_projection = nn.Parameter(m.text_projection.detach().flip(1))


def _swap(m):
    for tower in (m.transformer, m.visual.transformer):
        tower.resblocks[0].mlp, tower.resblocks[2].mlp = tower.resblocks[2].mlp, tower.resblocks[0].mlp


def _strided(m):
    for block in m.transformer.resblocks:
        c_fc = block.mlp.c_fc
        c_fc.weight.data = c_fc.weight.data.t().contiguous().t()
        c_fc.bias.data = torch.stack([c_fc.bias.data, c_fc.bias.data], dim=1)[:, 0]
        block.attn.in_proj_bias.data = torch.stack([block.attn.in_proj_bias.data] * 2, dim=1)[:, 1]


EDITS = {
    "in place": _in_place,
    "one element of a weight": _one_element("visual.transformer.resblocks.2.attn.in_proj_weight", 200, 5),
    "one element of a bias": _one_element("transformer.resblocks.0.mlp.c_fc.bias", 511),
    "one element of conv1": _one_element("visual.conv1.weight", 7, 2, 7, 7),
    "one position": _one_element("positional_embedding", 0, 1),
    "one token": _one_element("token_embedding.weight", 59, 1),
    "one element of ln_final": _one_element("ln_final.weight", 1, value=-2.0),
    "logit scale": _one_element("logit_scale", value=1.5),
    "through numpy": _numpy,
    "load_state_dict": _load,
    "load_state_dict, assigned": _assign,
    "sgd": _optimiser(torch.optim.SGD, foreach=True),
    "adam": _optimiser(torch.optim.AdamW, fused=True),
    "new data": _new_data,
    "new parameters": _new_parameters,
    "swapped modules": _swap,
    "strided": _strided,
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_seen_by_the_next_call(name):
    """Whoever makes it: nothing derived from a weight may outlive it."""
    trio = make_trio(VIT)
    with torch.no_grad():
        before = trio[0](IMAGES, TEXTS)[0]
    for model in trio[:2]:
        EDITS[name](model)
    trio[2] = make_exact(trio[1])  # an optimiser rounds: the exact result is that of the weights as they now are
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS), what=name)
        assert_same(trio, lambda m: m(IMAGES, TEXTS), what=name)
        change = (trio[0](IMAGES, TEXTS)[0] - before).abs().max()
    for (path, ours), theirs in zip(trio[0].named_parameters(), trio[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=path)
    assert change > 1e-3 or name == "strided"


def test_an_edit_of_batch_norm_is_seen_by_the_next_call():
    trio = make_trio(RESNET)
    with torch.no_grad():
        for model in trio:
            model.encode_image(RESNET_IMAGES)
            model.visual.layer2[0].bn1.running_mean += 0.5
            model.visual.bn2.running_var.data[3] = 0.25
            model.visual.attnpool.positional_embedding.data[0, 0] = 2.0
        assert_same(trio, encode(RESNET_IMAGES, None))


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_copies_compute_the_same_and_stand_alone(config):
    images = make_images(config, 4)
    _, ours = make_pair(config)
    with torch.no_grad():
        wanted = ours(images, TEXTS)[0]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(ours),
        "pickle": pickle.loads(pickle.dumps(ours)),
        "torch.save": torch.load(file, weights_only=False),
        "build_model": clipfast.build_model(ours.state_dict()),
    }
    fresh = clipfast.CLIP(*config).eval()
    assert fresh.load_state_dict(ours.state_dict()) == ([], [])
    copies["load_state_dict"] = fresh
    with torch.no_grad():
        ours.visual.conv1.weight.zero_()
        ours.text_projection.zero_()
        if config is VIT:
            ours.transformer.resblocks[0].attn_mask.zero_()
        for name, other in copies.items():
            assert torch.equal(other(images, TEXTS)[0], wanted), name
        copied = copies["deepcopy"]
        copied.transformer.resblocks[1].attn_mask.fill_(0)
        assert not torch.equal(copied(images, TEXTS)[0], wanted)


def test_a_state_dict_is_openai_clips_and_the_callers_stays_as_it_was():
    peer, ours = make_pair(VIT)
    state = {
        **peer.state_dict(),
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(12),
        "vocab_size": torch.tensor(60),
    }
    keys = list(state)
    built = clipfast.build_model(state)
    assert list(state) == keys and not built.training
    assert list(built.state_dict()) == list(peer.state_dict())
    peer.load_state_dict(ours.state_dict())
    # the weights are copies, not the caller's tensors
    with torch.no_grad():
        built.text_projection.zero_()
    assert state["text_projection"].abs().max() > 0


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_whole_model_in_another_dtype_and_back(config, dtype):
    """model.half() and the like: openai-clip's LayerNorm cannot run then, so the peer keeps its float32."""
    images, texts = make_images(config, 6), TEXTS
    peer, ours = make_pair(config)
    exact = exact_features(peer.state_dict(), images, texts)
    with torch.no_grad():
        before = ours(images, texts)[0]
        cast = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
        assert getattr(ours, cast)() is ours
        assert {p.dtype for p in ours.parameters()} == {dtype} and ours.dtype == dtype
        features = [ours.encode_image(images), ours.encode_text(texts)]
        assert {x.dtype for x in features} == {dtype}
        if dtype == torch.float64:
            for got, wanted in zip(features, exact, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        else:
            convert(peer, dtype)
            theirs = [peer.encode_image(images), peer.encode_text(texts)]
            for got, other, wanted in zip(features, theirs, exact, strict=True):
                assert_accurate(got, other, wanted)
        # every weight is a number of bfloat16, and small: none has changed on its way
        same = ours.float()(images, texts)[0]
    if dtype != torch.float16:
        assert torch.equal(same, before)
    else:
        torch.testing.assert_close(same, before, rtol=1e-4, atol=1e-4)


def test_convert_weights_of_modules_that_no_published_model_has():
    dtypes = []
    for library in (clipfast.model, peers.openai_clip().model):
        attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)
        model = nn.Sequential(attention, nn.Conv1d(2, 3, 1), nn.Conv3d(2, 3, 1), nn.BatchNorm2d(3), nn.Embedding(3, 4))
        library.convert_weights(model)
        dtypes.append({name: parameter.dtype for name, parameter in model.named_parameters()})
    assert dtypes[0] == dtypes[1]


def test_training_and_evaluation_mode():
    trio = make_trio(VIT)
    for model in trio:
        model.train()
        assert model.training and model.transformer.resblocks[0].attn.training
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS))
    for model in trio:
        for block in (*model.transformer.resblocks, *model.visual.transformer.resblocks):
            block.attn.dropout = 1.0  # drops everything: nothing is random, and everything differs
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS), what="dropout in training")
        for model in trio:
            model.eval()
        assert_same(trio, encode(IMAGES, TEXTS), what="dropout in evaluation")


def test_frozen_parts_get_no_gradient_and_the_rest_the_same():
    """Linear probes and prompt learners freeze most of a model."""

    def run(m):
        m.requires_grad_(False)
        for parameter in (m.visual.proj, m.visual.ln_post.bias, m.transformer.resblocks[2].ln_2.weight):
            parameter.requires_grad_(True)
        weighted(*m(IMAGES, TEXTS)).backward()
        gradients = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
        assert len(gradients) == 3
        return gradients

    assert_same_gradients(VIT, run)


def test_numpy_sees_the_results():
    _, ours = make_pair(VIT)
    with torch.no_grad():
        assert np.isfinite(ours.encode_image(IMAGES).numpy()).all()
    with torch.inference_mode():
        assert np.isfinite(ours.encode_text(TEXTS).numpy()).all()
