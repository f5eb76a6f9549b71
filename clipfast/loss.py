"""The symmetric contrastive loss of CLIP without its N x N matrix of logits, for one process or many.

    loss = ClipLoss(rank=rank, world_size=world_size, local_loss=True, gather_with_grad=True)
    loss(image_features, text_features, model.logit_scale.exp()).backward()

`ClipLoss` takes open_clip's arguments and gives its numbers. The logits exist one tile at a time, in the forward pass
and again in the backward: memory grows with N, not with its square.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipfast.dispatch import run
from clipfast.kernels.loss_autograd import Processes

__all__ = ["ClipLoss", "contrastive_loss"]


class ClipLoss(nn.Module):
    """`contrastive_loss` as a module, with the signature of open_clip's ClipLoss.

    local_loss, gather_with_grad, rank, world_size: as in `contrastive_loss`.
    cache_labels: accepted for its name; there are no labels to cache.
    use_horovod:  not supported.
    Raises:       NotImplementedError for Horovod, ValueError for a rank outside the world.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise NotImplementedError("use_horovod=True: only torch.distributed is supported; pass use_horovod=False")
        _check_rank(rank, world_size)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, as {"contrastive_loss": loss} if output_dict; arguments as in `contrastive_loss`."""
        loss = contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
            rank=self.rank,
            world_size=self.world_size,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        names = ("local_loss", "gather_with_grad", "rank", "world_size")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    local_loss: bool = False,
    gather_with_grad: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """Mean cross-entropy of image i with text i among all texts, and of text i with image i among all images, halved.

    image_features, text_features: [N, E] floating, normalised by the caller; one dtype, or any two under autocast.
    logit_scale: multiplies the cosines (the exponential of the model's parameter); a number or a tensor of one element.
    logit_bias:  added to all logits, so that it drops out: its gradient is zero. The same kinds, or None.
    local_loss, gather_with_grad: with several processes as in open_clip. local_loss: the loss is that of this process's
                 images and texts among everyone's, else everyone's mean. gather_with_grad: the features' gradients are
                 those of the sum of all processes' losses, as after open_clip's all_gather, else those of this
                 process's loss with everyone else's features held constant.
    rank, world_size: of the default process group. All processes take part in the forward and in the backward, with N
                 and logit_scale alike.
    Returns:     [], dtype of the features; under autocast float32. Features of float16 and bfloat16 (under autocast,
                 rounded to its dtype) are multiplied as they are; all sums and exponentials are float32.
    Gradients:   exact. Twice differentiable in one process, the second time with the logits in memory.
    Raises:      ValueError for shapes that disagree, here or between processes, and for an empty batch; TypeError for
                 dtypes; RuntimeError for devices and for a process group that is not there.
    Source:      Radford et al. 2021, arXiv:2103.00020, figure 3.
    """
    _check_rank(rank, world_size)
    scale = _one_number("logit_scale", logit_scale, image_features)
    bias = None if logit_bias is None else _one_number("logit_bias", logit_bias, image_features)
    device = image_features.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast:
        image_features, text_features = (_autocast(x, device) for x in (image_features, text_features))
    _check_features(image_features, text_features)
    processes = None
    if world_size > 1:
        processes = Processes(rank, world_size, local_loss, gather_with_grad)
        _check_processes(image_features, processes)
    # the casts are made, and the products of both passes are chosen
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        tensors = (image_features, text_features, scale, bias)
        loss = run("contrastive_loss", image_features, tensors, *tensors, processes)
    return loss if autocast else loss.to(image_features.dtype)


def _autocast(x: Tensor, device: str) -> Tensor:
    """What autocast makes of the operand of a product."""
    return x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() and x.dtype != torch.float64 else x


def _one_number(name: str, value: Tensor | float, features: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.promote_types(features.dtype, torch.float32), device=features.device)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name} must be one floating number, got {list(value.shape)} of {value.dtype}")
    # as in PyTorch, a scalar may stay on the CPU
    if value.device != features.device and not (value.ndim == 0 and value.device.type == "cpu"):
        raise RuntimeError(f"image_features is on {features.device} but {name} is on {value.device}; move one of them")
    return value


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            "image_features and text_features must both be [N, E], "
            f"got {list(image_features.shape)} and {list(text_features.shape)}"
        )
    if 0 in image_features.shape:
        raise ValueError(f"image_features is empty, {list(image_features.shape)}: the mean over no pairs has no value")
    if not image_features.is_floating_point() or image_features.dtype != text_features.dtype:
        raise TypeError(
            "image_features and text_features must have one floating dtype, "
            f"got {image_features.dtype} and {text_features.dtype}"
        )
    if image_features.device != text_features.device:
        raise RuntimeError(
            f"image_features is on {image_features.device} but text_features is on {text_features.device}; "
            "move one of them"
        )


def _check_rank(rank: int, world_size: int) -> None:
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1, got rank {rank} of world_size {world_size}")


def _check_processes(features: Tensor, processes: Processes) -> None:
    """The process group is the one that is meant, and every process has as many pairs."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"world_size is {processes.world_size}: call torch.distributed.init_process_group first")
    found = dist.get_rank(), dist.get_world_size()
    if found != (processes.rank, processes.world_size):
        raise ValueError(
            f"rank {processes.rank} of world_size {processes.world_size} expected, "
            f"but this process is rank {found[0]} of {found[1]}"
        )
    # where shapes differ, gathering the features would hang, or mix their rows
    mine = torch.tensor(features.shape, device=features.device)
    everyone = [torch.empty_like(mine) for _ in range(processes.world_size)]
    dist.all_gather(everyone, mine)
    shapes = [each.tolist() for each in everyone]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"image_features must have one shape on every process, got {shapes} by rank")
