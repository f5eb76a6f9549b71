"""The Triton backend: one function per operator, with the arguments of `clipfast.kernels.eager`."""

import functools
from collections.abc import Callable
from typing import Any

from clipfast.kernels.attention import attention
from clipfast.kernels.attention_pool import attention_pool
from clipfast.kernels.contrastive import logits
from clipfast.kernels.layer_norm import layer_norm
from clipfast.kernels.linear import linear, mlp, project
from clipfast.kernels.loss_autograd import contrastive_loss
from clipfast.kernels.patch_embed import patch_embed

TRITON: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm,
    "linear": linear,
    "mlp": mlp,
    "attention": attention,
    "attention_pool": attention_pool,
    "patch_embed": patch_embed,
    "project": project,
    "logits": logits,
    "contrastive_loss": functools.partial(contrastive_loss, "triton"),
}
