"""Learning rates, parameter groups and the clamp, beside values worked out by hand and open_clip's rule."""

from __future__ import annotations

import math

import pytest
import torch

import clipfast
from clipfast.training.optimization import (
    Recipe,
    clamp_logit_scale,
    learning_rate,
    make_optimizer,
    parameter_groups,
)
from tests.tiny_clips import RESNET, VIT


def test_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    recipe = Recipe(steps=14, lr=2.0, warmup=4)
    rates = [learning_rate(step, recipe) for step in range(14)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    expected = [1 + math.cos(math.pi * k / 10) for k in range(10)]
    assert rates[4:] == pytest.approx(expected, rel=1e-15)
    assert rates[9] == pytest.approx(1.0)
    assert learning_rate(0, Recipe(steps=3, lr=2.0)) == 2.0
    assert learning_rate(2, Recipe(steps=3, lr=3.0, warmup=3)) == 3.0


@pytest.mark.parametrize("config", [VIT, RESNET])
def test_gains_biases_and_logit_scale_do_not_decay(config):
    model = clipfast.CLIP(*config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    still, decaying = parameter_groups(model, 0.2)
    assert (still["weight_decay"], decaying["weight_decay"]) == (0.0, 0.2)
    still, decaying = ({names[id(p)] for p in group["params"]} for group in (still, decaying))

    def excluded(name, parameter):  # open_clip 3.3.0, open_clip_train/main.py
        return parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    assert still == {name for name, parameter in model.named_parameters() if excluded(name, parameter)}
    assert not still & decaying and still | decaying == set(names.values())


def test_optimizer_has_the_recipe():
    recipe = Recipe(steps=1, lr=0.3, beta1=0.8, beta2=0.7, eps=0.1, weight_decay=0.4)
    optimizer = make_optimizer(clipfast.CLIP(*VIT), recipe)
    defaults = optimizer.defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (0.3, (0.8, 0.7), 0.1) and defaults["fused"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.4]


@pytest.mark.parametrize(("value", "clamped"), [(9.0, math.log(100)), (2.5, 2.5), (-1.0, 0.0)])
def test_logit_scale_stays_between_one_and_a_hundred(value, clamped):
    parameter = torch.nn.Parameter(torch.tensor(value))
    clamp_logit_scale(parameter)
    assert parameter.item() == pytest.approx(clamped) and parameter.exp() <= 100.001
