"""The contrastive loss with its own backward, on one process or many; what multiplies is a backend's (`LossKernels`).

Every process handles the rows of its own images. It gathers the texts of all, and shares of each column two numbers
going forward and a sum of E terms going back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clipfast.kernels import loss_tiles
from clipfast.kernels.eager import statistics_dtype
from clipfast.kernels.loss_tiles import Softmaxes


class LossKernels(NamedTuple):
    statistics: Callable[..., tuple[Tensor, Tensor]]  # as loss_tiles.statistics
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]  # as loss_tiles.gradients


class Processes(NamedTuple):
    """The default process group, and whose losses and gradients count (open_clip's flags)."""

    rank: int
    world_size: int
    local_loss: bool
    gather_with_grad: bool


def contrastive_loss(
    backend: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, processes: Processes | None
) -> Tensor:
    """backend: "torch" or "triton".   Others as in `clipfast.loss.contrastive_loss`, already checked there."""
    texts = None if processes is None else _gather(text.detach(), processes)
    return _ContrastiveLoss.apply(image, text, scale, bias, texts, backend, processes)[0]


def _kernels(backend: str) -> LossKernels:
    if backend == "triton":
        from clipfast.kernels import clip_loss

        return LossKernels(clip_loss.statistics, clip_loss.gradients)
    if torch.compiler.is_compiling():
        return LossKernels(loss_tiles._statistics, loss_tiles._gradients)
    return LossKernels(loss_tiles.statistics, loss_tiles.gradients)


class _ContrastiveLoss(torch.autograd.Function):
    """Besides the loss, the outputs are what the backward needs again: of all rows and of all columns."""

    @staticmethod
    def forward(image, text, scale, bias, texts, backend, processes):
        texts = text if texts is None else texts
        offset = 0 if processes is None else processes.rank * len(image)
        wide_scale = _wide(scale, image)
        rows, cols = _kernels(backend).statistics(image, texts, wide_scale, offset)
        if processes is None:
            cols = torch.cat([cols, rows[2:]])
        else:
            cols = torch.cat([_reduce_statistics(cols), _gather(rows[2], processes)[None]])
        of_rows, of_cols = (Softmaxes(*each).logs(wide_scale) for each in (rows, cols))
        if processes is None or processes.local_loss:
            loss = -(of_rows.sum() + of_cols[offset : offset + len(image)].sum()) / (2 * len(image))
        else:
            loss = -(_reduce(of_rows.sum()) + of_cols.sum()) / (2 * len(texts))
        return loss, rows, cols

    @staticmethod
    def setup_context(ctx, inputs, output):
        image, text, scale, bias, texts, ctx.backend, ctx.processes = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(image, text, scale, bias, texts, *output[1:])

    @staticmethod
    def backward(ctx, of_loss, *_):
        image, text, scale, bias, texts, rows, cols = ctx.saved_tensors
        # added to every logit, it drops out of both softmaxes
        of_bias = None if bias is None else torch.zeros_like(bias)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if ctx.processes is not None:
                raise RuntimeError("contrastive_loss has no second derivatives across processes (create_graph=True)")
            with torch.autocast(image.device.type, enabled=False):
                gradients = _differentiable_gradients(of_loss, image, text, scale)
            return *gradients, of_bias, None, None, None
        rows, cols = Softmaxes(*rows), Softmaxes(*cols)
        with torch.autocast(image.device.type, enabled=False):
            of_image, of_text, of_scale = _gradients(ctx, of_loss, image, text, scale, texts, rows, cols)
        return of_image, of_text, of_scale.to(scale.device, scale.dtype).reshape(scale.shape), of_bias, None, None, None


def _wide(scale: Tensor, image: Tensor) -> Tensor:
    return scale.to(image.device, statistics_dtype(image.dtype)).reshape(())


def _gradients(ctx, of_loss, image, text, scale, texts, rows, cols):
    """Of image, text and scale.   of_loss: [], wide."""
    processes = ctx.processes
    n, wide_scale = len(image), _wide(scale, image)
    local = processes is None or processes.local_loss
    # of each row's and column's loss
    of_image = of_mean = of_loss / (2 * (n if local else len(cols.sums)))
    if processes is not None and processes.gather_with_grad:
        # the features' gradients are those of the sum over processes of each one's loss times its own of_loss
        of_all = _gather(of_mean.reshape(1), processes)
        if processes.local_loss:
            rows, cols = rows._replace(weights=of_mean.expand(n)), cols._replace(weights=of_all.repeat_interleave(n))
            of_image = torch.ones_like(of_mean)
        else:
            of_image = of_all.sum()
    separate = processes is not None and processes.local_loss and not processes.gather_with_grad
    offset = 0 if processes is None else processes.rank * n
    wants = tuple(ctx.needs_input_grad[:2])
    factor = of_image * wide_scale
    others = text if texts is None else texts
    of_images, of_texts, of_rows, of_cols = _kernels(ctx.backend).gradients(
        image, others, wide_scale, offset, factor, rows, cols, separate, wants
    )
    mine = slice(offset, offset + n)
    if processes is not None:
        of_texts = _reduce_scatter(of_texts, processes) if wants[1] else of_texts
        of_cols = _reduce(of_cols)
    if local:
        of_scale = of_rows.sum() + of_cols[mine].sum()
    else:
        of_scale = _reduce(of_rows.sum()) + of_cols.sum()
    return (
        of_images if wants[0] else None,
        of_texts.mul_(factor).to(text.dtype) if wants[1] else None,
        of_scale * of_mean,
    )


def _differentiable_gradients(of_loss, image, text, scale):
    """As `_gradients` of one process, in operations that can be differentiated again; holds the logits."""
    wide = statistics_dtype(image.dtype)
    images, texts, wide_scale = image.to(wide), text.to(wide), _wide(scale, image)
    products = images @ texts.t()
    logits = products * wide_scale
    slopes = logits.softmax(1) + logits.softmax(0) - 2 * torch.eye(len(image), dtype=wide, device=image.device)
    slopes = slopes * (of_loss / (2 * len(image)))
    of_scale = (slopes * products).sum().to(scale.device, scale.dtype).reshape(scale.shape)
    slopes = slopes * wide_scale
    return (slopes @ texts).to(image.dtype), (slopes.t() @ images).to(text.dtype), of_scale


# ---------------------------------------------------------------------------------------------------------------------
# Among processes


def _gather(x: Tensor, processes: Processes) -> Tensor:
    """[n, ...] of each process -> [world_size * n, ...]."""
    everyone = x.new_empty(processes.world_size * len(x), *x.shape[1:])
    dist.all_gather(list(everyone.chunk(processes.world_size)), x.contiguous())
    return everyone


def _reduce(x: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    dist.all_reduce(x, operation)
    return x


def _reduce_statistics(cols: Tensor) -> Tensor:
    """[2, N] maxima and sums of exponentials below them, of each process's rows -> of all rows."""
    highest = _reduce(cols[0].clone(), dist.ReduceOp.MAX)
    return torch.stack([highest, _reduce(cols[1] * (cols[0] - highest).exp())])


def _reduce_scatter(x: Tensor, processes: Processes) -> Tensor:
    """[world_size * n, ...], a term of everyone's -> [n, ...], the sum of this process's part."""
    n = len(x) // processes.world_size
    if x.device.type == "cuda" and "nccl" in dist.get_backend():
        mine = x.new_empty(n, *x.shape[1:])
        dist.reduce_scatter_tensor(mine, x)
        return mine
    # gloo learned it in some releases only; a copy, or the gradient would keep everyone's alive
    return _reduce(x)[processes.rank * n : (processes.rank + 1) * n].clone()
