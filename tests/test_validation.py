"""The check that a state dict is one whole CLIP."""

from __future__ import annotations

import inspect

import pytest
import torch

from clipfast.checkpoints import CheckpointError, check_state_dict
from clipfast.model import CLIP

from .tiny_clips import RESNET, VIT, make_upstream


@pytest.fixture(scope="module", params=[VIT, RESNET], ids=["vit", "resnet"])
def upstream(request):
    return make_upstream(request.param)


@pytest.fixture(scope="module")
def vit():
    return make_upstream(VIT)


def test_check_returns_the_architecture(upstream):
    architecture = check_state_dict(upstream.state_dict())
    resnet = hasattr(upstream.visual, "layer1")
    given = RESNET if resnet else VIT
    assert tuple(architecture[name] for name in inspect.signature(CLIP).parameters if name in architecture) == given


def test_check_names_what_is_wrong(upstream):
    weights = upstream.state_dict()
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    broken = {k: v for k, v in weights.items() if not k.endswith("ln_1.bias")}
    broken["visual.surprise"] = torch.ones(1)
    broken[name] = broken[name][:-1]
    broken["logit_scale"] = torch.tensor(4)
    missing = len(weights) - (len(broken) - 1)
    with pytest.raises(CheckpointError) as caught:
        check_state_dict(broken, source="here.pt")
    for part in (
        "here.pt",
        f"{missing} missing weights",
        "transformer.resblocks.0.ln_1.bias",
        "1 unexpected weights: visual.surprise",
        f"{name} (expected (256, 64), got (255, 64))",
        "not floating point (quantised?): logit_scale (torch.int64)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["text_projection", "positional_embedding", "visual.conv1.weight"])
def test_check_without_what_tells_the_architecture(name, vit):
    weights = vit.state_dict()
    del weights[name]
    with pytest.raises(CheckpointError, match=f"no {name}"):
        check_state_dict(weights)


def test_check_refuses_foreign_state_dicts():
    with pytest.raises(CheckpointError, match="not a CLIP state dict.*conv.weight"):
        check_state_dict({"conv.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="not a CLIP state dict"):
        check_state_dict({})


def test_check_of_a_rectangular_input(vit):
    weights = vit.state_dict()
    weights["visual.positional_embedding"] = torch.ones(7, 64)
    with pytest.raises(CheckpointError, match="6 patches are no square"):
        check_state_dict(weights)


def test_check_warns_of_nan_and_infinity(vit):
    weights = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    weights["visual.proj"][0, 0] = float("nan")
    weights["ln_final.bias"][0] = float("inf")
    with pytest.warns(UserWarning, match="NaN or infinity in 2 weights: .*ln_final.bias"):
        check_state_dict(weights)
