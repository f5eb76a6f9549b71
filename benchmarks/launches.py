"""What the compile report launches: every kernel's launcher, over the shapes that CLIP has, on tensors without memory.

The launchers choose the configuration, as they do for a user, so nothing here names a tile. A new kernel file gets one
function here and one line in CASES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from clipfast import tuning
from clipfast.kernels import (
    attention,
    attention_backward,
    attention_backward_stream,
    attention_plan,
    attention_pool,
    clip_loss,
    contrastive,
    layer_norm,
    linear,
    mlp_gradients,
    patch_embed,
    patch_embed_gradients,
)
from clipfast.kernels.loss_tiles import Softmaxes
from clipfast.packing import Rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTHS = (512, 640, 768, 1024)
# image tokens: 7 x 7, 14 x 14, 16 x 16 and 24 x 24 patches and the class token
LENGTHS = (50, 197, 257, 577)
BATCHES = (1, 8, 32, 256)
# and whether float32 is rounded to tf32
PRECISIONS = (*((dtype, False) for dtype in DTYPES), (torch.float32, True))
# of captions up to EOT, so any number is possible
TEXT_ROWS = (9, 16, 77, 130, 303, 517, 4096, 20001)
ROWS = (*BATCHES, *LENGTHS, *(256 * length for length in LENGTHS), *TEXT_ROWS)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor with an (aligned) address of 0 and no memory behind it."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_layer_norm() -> None:
    for dtype in DTYPES:
        for width in (*WIDTHS, 192):
            weight = empty(width, dtype=dtype)
            for n_rows in ROWS:
                x = empty(n_rows, width, dtype=dtype)
                for residual in (None, x):
                    layer_norm.layer_norm_fwd(x, residual, weight, weight, 1e-5)
                _, mean, rstd = layer_norm.layer_norm_train_fwd(x, weight, weight, 1e-5)
                for added in (None, x):
                    layer_norm.layer_norm_bwd(x, x, mean, rstd, weight, added)


def launch_linear() -> None:
    # the pooling of the ResNets; terms that no block divides; rows that are not 16-byte aligned
    others = [(rows, *shape) for rows in (1, 32, 1600) for shape in ((640, 2560, 2560), (512, 600, 600))]
    others += [(rows, *shape) for rows in (1, 32, 1600) for shape in ((512, 513, 513), (512, 512, 513))]
    shapes = [(rows, n * w, k * w, k * w) for rows in ROWS for w in WIDTHS for n, k in ((3, 1), (1, 1), (4, 1), (1, 4))]
    for dtype, tf32 in PRECISIONS:
        seen = set()
        for n_rows, n_cols, n_terms, stride in (*shapes, *others):
            x = empty(n_rows, stride, dtype=dtype)[:, :n_terms]
            weight, total = empty(n_cols, n_terms, dtype=dtype), empty(n_rows, n_cols, dtype=dtype)
            described = all(map(linear._describable, (x, weight, total)))
            arch = tuning.architecture(x.device)
            config = tuning.linear(n_rows, n_cols, n_terms, dtype, arch, described=described)
            # calls that compile to the same are left out, tens of thousands: Triton sees no more of a size than this
            even = n_terms % (config.block_k * config.split_k) == 0
            facts = (config, even, n_rows == 1, *(size % 16 == 0 for size in (n_rows, n_terms, stride)))
            if facts not in seen:
                seen.add(facts)
                _launch_epilogues(x, weight, total, tf32, config)


def _launch_epilogues(x: Tensor, weight: Tensor, total: Tensor, tf32: bool, config: tuning.LinearConfig) -> None:
    """All of them, with both forms of QuickGELU."""
    bias = empty(len(weight), dtype=x.dtype)
    linear.linear_fwd(x, weight, None, None, "none", tf32)
    for residual in (None, total):
        for activation in ("none", "quick_gelu", "gelu"):
            linear.linear_fwd(x, weight, bias, residual, activation, tf32)
    fast = dataclasses.replace(config, fast_tanh=True)
    linear.linear_fwd(x, weight, bias, None, "quick_gelu", tf32, fast)


def launch_attention() -> None:
    _over_attentions(_launch_attention)


def launch_attention_backward() -> None:
    _over_attentions(_launch_attention_backward)


def _over_attentions(launch: Callable[[Rows, bool, Tensor, bool], None]) -> None:
    images = [(length,) * batch for length in (*LENGTHS, 82, 300) for batch in BATCHES]
    # captions cut at EOT: alike, and of every length
    longest = (7, 9, 16, 20, 33, 77)
    texts = [(length,) * batch for length in longest for batch in (1, 8, 80)]
    texts += [tuple(3 + i % (length - 2) for i in range(1000)) for length in longest]
    cases = [(Rows(lengths), False) for lengths in images]
    cases += [(Rows(lengths, stable), True) for lengths in texts for stable in (False, True)]
    for dtype, tf32 in PRECISIONS:
        for heads, width in ((8, 64), (16, 64), (16, 80)):
            for rows, causal in cases:
                launch(rows, causal, empty(rows.total, 3, heads, width, dtype=dtype), tf32)


def _launch_attention(rows: Rows, causal: bool, qkv: Tensor, tf32: bool) -> None:
    heads, width = qkv.shape[2:]
    plan = attention_plan.plan(rows, causal, heads, width, qkv.dtype, tf32, tuning.architecture(qkv.device))
    programs, scale = plan.programs.to("meta"), width**-0.5
    for lse in (None, empty(heads, rows.total, dtype=torch.float32)):
        if plan.spans is None:
            sizes = (plan.block, plan.peel, plan.tail)
            attention.attention_stream_fwd(qkv, programs, causal, scale, *sizes, tf32, lse)
        else:
            spans = plan.spans.to("meta")
            attention.attention_tile_fwd(qkv, programs, spans, causal, scale, plan.block, tf32, lse)


def _launch_attention_backward(rows: Rows, causal: bool, qkv: Tensor, tf32: bool) -> None:
    heads, width = qkv.shape[2:]
    plan = attention_plan.backward_plan(rows, causal, heads, width, qkv.dtype, tf32, tuning.architecture(qkv.device))
    out, lse = empty(rows.total, heads * width, dtype=qkv.dtype), empty(heads, rows.total, dtype=torch.float32)
    saved, scale = (out, qkv, out, lse, plan.programs.to("meta")), width**-0.5
    if plan.spans is None:
        attention_backward_stream.attention_stream_bwd(*saved, causal, scale, plan.tail, tf32)
    else:
        attention_backward.attention_tile_bwd(*saved, plan.spans.to("meta"), causal, scale, plan.block, tf32)


def launch_attention_pool() -> None:
    # heads, width and tokens of the transformers' last block, and of the ResNets
    towers = [(width // 64, width, length) for width in WIDTHS for length in (*LENGTHS, 77)]
    towers += [(32, 2048, 50), (40, 2560, 82), (48, 3072, 145), (64, 4096, 197)]
    for dtype, tf32 in PRECISIONS:
        for heads, width, length in towers:
            for batch in BATCHES:
                tokens, offsets = empty(batch * length, width, dtype=dtype), empty(batch + 1, dtype=torch.int32)
                strict = dtype == torch.float32 and not tf32
                directions = empty(batch, heads, width, dtype=torch.float64 if strict else dtype)
                attention_pool.pool_fwd(tokens, directions, offsets, length, 0.125, tf32)


def launch_patch_embed() -> None:
    for dtype, tf32 in PRECISIONS:
        for width, patch, side in ((768, 32, 224), (768, 16, 224), (1024, 14, 224), (1024, 14, 336), (768, 32, 225)):
            weight, mean = empty(width, 3, patch, patch, dtype=dtype), empty(3, dtype=torch.float32)
            position = empty(1 + (side // patch) ** 2, width, dtype=dtype)
            for batch in BATCHES:
                for pixels in (dtype, torch.uint8):
                    moments = (mean, mean) if pixels == torch.uint8 else (None, None)
                    images = empty(batch, 3, side, side, dtype=pixels)
                    patch_embed.patch_embed_fwd(images, weight, position[0], position, *moments, tf32)


def launch_mlp_gradients() -> None:
    for dtype, tf32 in PRECISIONS:
        for n_rows in ROWS:
            for width in (*WIDTHS, 600):
                x, fc1 = empty(n_rows, width, dtype=dtype), empty(4 * width, width, dtype=dtype)
                for activation in ("quick_gelu", "gelu"):
                    pre, _ = mlp_gradients.expand_fwd(x, fc1, empty(4 * width, dtype=dtype), activation, tf32)
                    mlp_gradients.hidden_bwd(x, fc1.t().contiguous(), pre, activation, tf32)


def launch_patch_embed_gradients() -> None:
    for dtype, tf32 in PRECISIONS:
        mean = empty(3, dtype=torch.float32)
        for width, patch, side in ((768, 32, 224), (768, 16, 224), (1024, 14, 224), (1024, 14, 336), (768, 32, 225)):
            for batch in BATCHES:
                grad = empty(batch, 1 + (side // patch) ** 2, width, dtype=dtype)
                for pixels in (dtype, torch.uint8):
                    moments = (mean, mean) if pixels == torch.uint8 else (None, None)
                    images = empty(batch, 3, side, side, dtype=pixels)
                    patch_embed_gradients.patch_weight_bwd(grad, images, *moments, patch, tf32)


def launch_contrastive() -> None:
    for dtype, tf32 in PRECISIONS:
        for width in WIDTHS:
            for n_images in (1, 7, *BATCHES):
                for n_texts in (1, 3, 80, 1000):
                    features = empty(n_images, width, dtype=dtype), empty(n_texts, width, dtype=dtype)
                    for scale in (torch.float32, dtype):
                        contrastive.logits_fwd(*features, empty(dtype=scale), tf32)


def launch_clip_loss() -> None:
    scale = empty(dtype=torch.float32)
    for dtype, tf32 in PRECISIONS:
        for width in (*WIDTHS, 129):
            # one process, and two
            for n_images, n_texts in ((1, 1), (7, 14), (16, 16), (32, 32), (256, 512), (1000, 1000), (32768, 32768)):
                features = empty(n_images, width, dtype=dtype), empty(n_texts, width, dtype=dtype)
                clip_loss.statistics_fwd(*features, scale, 0, tf32)
        for sizes in ((1, 1), (7, 14), (32, 32), (1000, 2048), (2048, 2048)):
            tile = empty(*sizes, dtype=torch.float32)
            rows, cols = (Softmaxes(x, x, x) for x in (tile[:, 0].contiguous(), tile[0]))
            for separate in (False, True):
                clip_loss.gradients_bwd(tile, scale, rows, cols, separate, dtype)


# kernel file -> what launches all of its kernels
CASES: dict[str, Callable[[], None]] = {
    "layer_norm": launch_layer_norm,
    "linear": launch_linear,
    "attention": launch_attention,
    "attention_backward": launch_attention_backward,
    "attention_pool": launch_attention_pool,
    "patch_embed": launch_patch_embed,
    "patch_embed_gradients": launch_patch_embed_gradients,
    "mlp_gradients": launch_mlp_gradients,
    "contrastive": launch_contrastive,
    "clip_loss": launch_clip_loss,
}
