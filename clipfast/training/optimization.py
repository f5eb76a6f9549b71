"""AdamW, its parameter groups, the learning rate of each step: open_clip's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["MAX_LOGIT_SCALE", "Recipe", "clamp_logit_scale", "learning_rate", "make_optimizer", "parameter_groups"]

# of the parameter, a logarithm: logits are at most 100 times a cosine (Radford et al. 2021, section 2.5)
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class Recipe:
    """How the weights are changed.

    steps:     of the whole training.            warmup: steps until the learning rate is `lr`.
    eps:       of AdamW.                          weight_decay: for weights, not for gains, biases and logit_scale.
    grad_clip: greatest norm of the gradient, or None.
    """

    steps: int
    lr: float = 5e-4
    warmup: int = 0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.2
    grad_clip: float | None = None


def learning_rate(step: int, recipe: Recipe) -> float:
    """Of step 0, 1, ...: a line up to `lr` at the last step of the warm-up, then half a cosine towards zero."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return recipe.lr * (1 + math.cos(math.pi * done)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and kernels decay; what has one dimension or none does not: gains, biases, class token, logit_scale."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
    ]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW in one launch for all parameters, where PyTorch has that (CUDA, CPU)."""
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in model.parameters())
    groups = parameter_groups(model, recipe.weight_decay)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=fused)


@torch.no_grad()
def clamp_logit_scale(logit_scale: nn.Parameter) -> None:
    logit_scale.clamp_(0, MAX_LOGIT_SCALE)
