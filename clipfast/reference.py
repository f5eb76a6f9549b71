"""CLIP in plain PyTorch, the ground truth of every test: explicit, slow and differentiable.

Each operator has the signature of its fast twin in `ops.py` and computes in the dtype of its inputs, sums and
statistics included. In float64, on inputs that were already rounded, that is the exact answer for all
practical purposes; in float16 it is a poor one, and nobody's yardstick. Nothing is fused, folded or skipped:
text keeps its padding, and every block computes every row. This file imports nothing of clipfast, so that no
error of ours can be on both sides of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

Numbers: TypeAlias = Sequence[float] | Tensor
Offsets: TypeAlias = Sequence[int] | Tensor

# of OpenAI's training images, per channel
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation over the last dimension; with a residual, of the sum, which is returned too.

    x:       [..., W], floating.   residual: [..., W] or None.
    weight, bias: [W], of any floating dtype (float32 beside float16 in openai/CLIP).
    Returns: [..., W], dtype of x.
    Source:  Ba et al. 2016, Layer Normalization.
    """
    if residual is not None:
        return layer_norm(x + residual, weight, bias, eps), x + residual
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return (centred / torch.sqrt(variance + eps) * weight + bias).to(x.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(x W^T + b) + residual.

    x:          [..., K], floating.
    weight:     [N, K];  bias: [N] or None.
    activation: None, "quick_gelu" (x sigmoid(1.702 x)) or "gelu" (exact, with erf).
    residual:   [..., N] or None; added after the activation.
    Returns:    [..., N].
    Raises:     ValueError for another activation.
    """
    y = x @ weight.t()
    if bias is not None:
        y = y + bias
    y = _activate(y, activation)
    return y if residual is None else y + residual


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: str | None = "quick_gelu",
    eps: float = 1e-5,
) -> Tensor:
    """The second half of a pre-norm block: x + fc2(act(fc1(layer_norm(x)))).

    x:          [..., W];  norm_weight, norm_bias: [W].
    fc1_weight: [F, W];  fc1_bias: [F];  fc2_weight: [W, F];  fc2_bias: [W].
    activation: as in `linear`.
    Returns:    [..., W].
    Raises:     ValueError for another activation.
    """
    hidden = linear(layer_norm(x, norm_weight, norm_bias, eps), fc1_weight, fc1_bias, activation=activation)
    return linear(hidden, fc2_weight, fc2_bias, residual=x)


def attention(qkv: Tensor, offsets: Offsets, *, causal: bool, scale: float | None = None) -> Tensor:
    """Softmax attention within each sequence of packed rows.

    qkv:     [T, 3, H, D], floating: queries, keys and values of T rows.
    offsets: [B + 1] integers, first row of each sequence; offsets[0] == 0, offsets[-1] == T. Sequences may be
             empty.
    causal:  a row sees itself and the rows of its sequence before it, and no later one.
    scale:   multiplies q.k before the softmax; default D ** -0.5.
    Returns: [T, H * D].
    Raises:  ValueError if qkv or offsets have another form.
    Source:  Vaswani et al. 2017, Attention Is All You Need, equation 1.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected [T, 3, H, D], got {list(qkv.shape)}")
    if scale is None:
        scale = qkv.shape[-1] ** -0.5
    outputs = [qkv[:0, 0].flatten(1)]  # [0, H * D]: a batch without sequences has a shape too
    for start, stop in _spans(offsets, qkv.shape[0]):
        q, k, v = qkv[start:stop].permute(1, 2, 0, 3)  # each [H, L, D]
        scores = q @ k.transpose(1, 2) * scale  # [H, L, L]
        if causal:
            position = torch.arange(stop - start, device=qkv.device)
            is_later = position[None, :] > position[:, None]  # [query, key]
            scores = scores.masked_fill(is_later, -math.inf)
        heads = _softmax(scores) @ v  # [H, L, D]
        outputs.append(heads.transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def attention_pool(
    query: Tensor,
    tokens: Tensor,
    offsets: Offsets,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    *,
    heads: int,
) -> Tensor:
    """Attention of one query per sequence over the rows of that sequence, before any output projection.

    query:    [B, C], floating;  tokens: [T, C], packed rows.
    offsets:  [B + 1] integers, as in `attention`. The attention over an empty sequence is zero, an empty sum.
    *_weight: [heads * D, C];  *_bias: [heads * D] or None.
    Returns:  [B, heads * D], the heads side by side.
    Raises:   ValueError if the numbers of queries and sequences differ, for offsets of another form, or if
              heads does not divide the width of the projections.
    """
    if q_weight.shape[0] % heads:
        raise ValueError(f"heads: expected a divisor of {q_weight.shape[0]}, got {heads}")
    spans = _spans(offsets, tokens.shape[0])
    if len(spans) != query.shape[0]:
        raise ValueError(f"query: expected {len(spans)} rows, one per sequence, got {query.shape[0]}")
    q = linear(query, q_weight, q_bias).unflatten(1, (heads, -1))  # [B, H, D]
    k = linear(tokens, k_weight, k_bias).unflatten(1, (heads, -1))  # [T, H, D]
    v = linear(tokens, v_weight, v_bias).unflatten(1, (heads, -1))
    # [0, H * D]: a batch without sequences has a shape and gradients too
    outputs = [(q[:0] * k[:0] * v[:0]).flatten(1)]
    for i, (start, stop) in enumerate(spans):
        scores = (q[i] * k[start:stop]).sum(-1) * q.shape[-1] ** -0.5  # [L, H]
        weights = _softmax(scores.t()).t()
        outputs.append((weights[:, :, None] * v[start:stop]).sum(0).reshape(1, -1))
    return torch.cat(outputs)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    *,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """A linear map of every patch, behind a class token, plus positions; then a LayerNorm, if given its weights.

    images:  [B, C, H, W], floating and normalised; or uint8, which becomes (images / 255 - mean) / std.
    weight:  [W, C, P, P], a convolution of stride P. Pixels past the last whole patch are not read.
    class_embedding: [W];  positional_embedding: [1 + G, W], G = (H // P) * (W // P).
    mean, std: [C], read for uint8 images only.   norm_weight, norm_bias: [W], CLIP's ln_pre, or None.
    Returns: [B, 1 + G, W], dtype of weight.
    Raises:  ValueError if mean or std is missing for uint8 images, or if the positions do not fit the images.
    Source:  Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, equation 1.
    """
    images = _normalised(images, weight.dtype, mean, std)
    batch, channels, height, width = images.shape
    patch = weight.shape[-1]
    rows, columns = height // patch, width // patch
    _check_positions(positional_embedding, rows, columns)
    x = images[:, :, : rows * patch, : columns * patch]
    x = x.reshape(batch, channels, rows, patch, columns, patch)
    x = x.permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, C, P, P]
    x = x.reshape(batch, rows * columns, channels * patch * patch) @ weight.flatten(1).t()  # [B, G, W]
    first = class_embedding.to(x.dtype).expand(batch, 1, -1)
    x = torch.cat([first, x], dim=1) + positional_embedding.to(x.dtype)
    return x if norm_weight is None else layer_norm(x, norm_weight, norm_bias, eps)


def project(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, eps: float = 1e-5) -> Tensor:
    """layer_norm(x) @ projection: from the pooled row of a tower to the embedding.

    x:       [..., W];  norm_weight, norm_bias: [W];  projection: [W, E].
    Returns: [..., E].
    """
    return layer_norm(x, norm_weight, norm_bias, eps) @ projection


def logits(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """exp(logit_scale) times the cosine of every image with every text.

    image_features: [I, E];  text_features: [T, E]; not yet normalised. A row of zeros gives NaN.
    logit_scale:    scalar, the logarithm of the factor.
    Returns:        [I, T] and its transpose [T, I].
    Source:         Radford et al. 2021, Learning Transferable Visual Models, figure 3.
    """
    image_features = image_features / image_features.norm(dim=-1, keepdim=True)
    text_features = text_features / text_features.norm(dim=-1, keepdim=True)
    scale = torch.as_tensor(logit_scale, dtype=image_features.dtype, device=image_features.device)
    per_image = scale.exp() * (image_features @ text_features.t())
    return per_image, per_image.t()


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
) -> Tensor:
    """Mean of the cross-entropies of every image among the texts and of every text among the images.

    image_features, text_features: [N, E], normalised by the caller; pairs have the same row.
    logit_scale, logit_bias:       scalars; logits are scale * cosine + bias.
    Returns:                       scalar.
    Source:                        Radford et al. 2021, Learning Transferable Visual Models, figure 3.
    """
    logits = logit_scale * (image_features @ text_features.t())
    if logit_bias is not None:
        logits = logits + logit_bias
    per_image = logits.logsumexp(1) - logits.diagonal()
    per_text = logits.logsumexp(0) - logits.diagonal()
    return (per_image.mean() + per_text.mean()) / 2


def encode_image(
    state_dict: Mapping[str, Tensor],
    images: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    activation: str = "quick_gelu",
    heads: int | None = None,
) -> Tensor:
    """The image tower of a state dict: a vision transformer if it has `visual.proj`, else a ModifiedResNet.

    state_dict: under openai/CLIP's names; any floating dtypes, cast to dtype here; gradients flow back to it.
    images:     [B, 3, H, W], floating and normalised, or uint8 (CLIP's mean and std are applied). H and W may
                differ if the number of patches, or of 32 x 32 cells of a ResNet, fits the positions.
    activation: of the transformer's MLPs, as in `linear`; a ResNet has none.
    heads:      default width // 64, at least 1; width is that of the transformer or of the attention pool.
    Returns:    [B, E] in dtype, not normalised.
    Raises:     KeyError for a missing weight, ValueError for images that do not fit.
    """
    weights = _part(state_dict, "visual.", dtype)
    if images.dtype == torch.uint8:
        images = _normalised(images, dtype, MEAN, STD)
    images = images.to(dtype)
    if "proj" not in weights:
        return _modified_resnet(weights, images, heads)
    embeddings = (weights[name] for name in ("conv1.weight", "class_embedding", "positional_embedding"))
    x = patch_embed(images, *embeddings)
    x = layer_norm(x, *_affine(weights, "ln_pre"))
    x = _transformer(_part(weights, "transformer.", dtype), x, heads, activation, causal=False)
    norm_weight, norm_bias = _affine(weights, "ln_post")
    return project(x[:, 0], norm_weight, norm_bias, weights["proj"])


def encode_text(
    state_dict: Mapping[str, Tensor],
    text: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    activation: str = "quick_gelu",
    heads: int | None = None,
) -> Tensor:
    """The text tower of a state dict under openai/CLIP's names. Every column is computed, padding included.

    state_dict, activation, heads: as in `encode_image`.
    text:    [B, L] integers, L at most the context length. The greatest id of a row is its EOT, the first if
             there are several.
    Returns: [B, E] in dtype, not normalised.
    Raises:  KeyError for a missing weight, ValueError for text that is too long.
    """
    positions = state_dict["positional_embedding"].to(dtype)
    length = text.shape[1]
    if length > positions.shape[0]:
        raise ValueError(f"text: expected at most {positions.shape[0]} columns, got {length}")
    x = state_dict["token_embedding.weight"][text.long()].to(dtype) + positions[:length]
    x = _transformer(_part(state_dict, "transformer.", dtype), x, heads, activation, causal=True)
    x = x[torch.arange(text.shape[0], device=text.device), text.argmax(-1)]
    norm_weight, norm_bias = (w.to(dtype) for w in _affine(state_dict, "ln_final"))
    return project(x, norm_weight, norm_bias, state_dict["text_projection"].to(dtype))


def forward(
    state_dict: Mapping[str, Tensor],
    images: Tensor,
    text: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    activation: str = "quick_gelu",
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole model. Arguments and errors as in `encode_image` and `encode_text`.

    Returns: logits per image [I, T] and per text [T, I], in dtype.
    """
    image_features = encode_image(state_dict, images, dtype=dtype, activation=activation, heads=vision_heads)
    text_features = encode_text(state_dict, text, dtype=dtype, activation=activation, heads=text_heads)
    return logits(image_features, text_features, state_dict["logit_scale"])


def _transformer(
    weights: Mapping[str, Tensor], x: Tensor, heads: int | None, activation: str, *, causal: bool
) -> Tensor:
    """The pre-norm blocks `resblocks.*` over x: [B, L, W]."""
    batch, length, width = x.shape
    heads = heads or max(1, width // 64)
    offsets = [i * length for i in range(batch + 1)]
    x = x.reshape(batch * length, width)
    for i in range(len({name.split(".")[1] for name in weights})):
        block = _part(weights, f"resblocks.{i}.", x.dtype)
        y = layer_norm(x, *_affine(block, "ln_1"))
        qkv = linear(y, block["attn.in_proj_weight"], block["attn.in_proj_bias"])
        y = attention(qkv.reshape(batch * length, 3, heads, width // heads), offsets, causal=causal)
        x = linear(y, *_affine(block, "attn.out_proj"), residual=x)
        x = mlp(x, *_affine(block, "ln_2", "mlp.c_fc", "mlp.c_proj"), activation=activation)
    return x.reshape(batch, length, width)


def _modified_resnet(weights: Mapping[str, Tensor], x: Tensor, heads: int | None) -> Tensor:
    """The ResNet of CLIP over x: [B, 3, H, W]: He et al. 2019 (ResNet-D) and Zhang 2019 (anti-aliasing)."""
    for i in (1, 2, 3):
        x = conv2d(x, weights[f"conv{i}.weight"], stride=2 if i == 1 else 1, padding=1)
        x = _batch_norm(x, weights, f"bn{i}").relu()
    x = avg_pool2d(x, 2)
    for i in (1, 2, 3, 4):
        layer = _part(weights, f"layer{i}.", x.dtype)
        for j in range(len({name.split(".")[0] for name in layer})):
            # strides are in no checkpoint: layers 2 to 4 halve the image in their first block
            x = _bottleneck(_part(layer, f"{j}.", x.dtype), x, stride=2 if i > 1 and j == 0 else 1)

    pool = _part(weights, "attnpool.", x.dtype)
    _check_positions(pool["positional_embedding"], *x.shape[2:])
    tokens = x.flatten(2).transpose(1, 2)  # [B, H * W, C]
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + pool["positional_embedding"]
    batch, length, channels = tokens.shape
    offsets = [i * length for i in range(batch + 1)]
    heads = heads or max(1, channels // 64)
    projections = _affine(pool, "q_proj", "k_proj", "v_proj")
    x = attention_pool(tokens[:, 0], tokens.flatten(0, 1), offsets, *projections, heads=heads)
    return linear(x, *_affine(pool, "c_proj"))


def _bottleneck(block: Mapping[str, Tensor], x: Tensor, *, stride: int) -> Tensor:
    """1x1, 3x3 and 1x1 convolutions around a shortcut; pooling, never a convolution, makes the stride."""
    y = _batch_norm(conv2d(x, block["conv1.weight"]), block, "bn1").relu()
    y = _batch_norm(conv2d(y, block["conv2.weight"], padding=1), block, "bn2").relu()
    y = _batch_norm(conv2d(avg_pool2d(y, stride), block["conv3.weight"]), block, "bn3")
    if "downsample.0.weight" in block:
        x = _batch_norm(conv2d(avg_pool2d(x, stride), block["downsample.0.weight"]), block, "downsample.1")
    return (x + y).relu()


def _batch_norm(x: Tensor, weights: Mapping[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    """Batch normalisation of [B, C, H, W] with the running statistics (evaluation)."""
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, weight, bias = (weights[f"{name}.{part}"][:, None, None] for part in names)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def _activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    raise ValueError(f"activation: expected None, 'quick_gelu' or 'gelu', got {activation!r}")


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, which may be empty."""
    if scores.numel() == 0:
        return scores
    # the greatest score cancels in the quotient, and so does its gradient; without it exp overflows
    weights = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def _spans(offsets: Offsets, n_rows: int) -> list[tuple[int, int]]:
    bounds = [int(offset) for offset in offsets]
    if not bounds or bounds[0] != 0 or bounds[-1] != n_rows or bounds != sorted(bounds):
        raise ValueError(f"offsets: expected to rise from 0 to {n_rows}, the number of rows, got {bounds}")
    return list(pairwise(bounds))


def _normalised(images: Tensor, dtype: torch.dtype, mean: Numbers | None, std: Numbers | None) -> Tensor:
    if images.dtype != torch.uint8:
        return images.to(dtype)
    if mean is None or std is None:
        raise ValueError("mean, std: expected with uint8 images, got None")
    mean = torch.as_tensor(mean, dtype=dtype, device=images.device)[:, None, None]
    std = torch.as_tensor(std, dtype=dtype, device=images.device)[:, None, None]
    return (images.to(dtype) / 255 - mean) / std


def _check_positions(positional_embedding: Tensor, rows: int, columns: int) -> None:
    if positional_embedding.shape[0] != 1 + rows * columns:
        raise ValueError(
            f"images: a grid of {rows} x {columns} and one token more need {1 + rows * columns} positions, "
            f"positional_embedding has {positional_embedding.shape[0]}"
        )


def _affine(weights: Mapping[str, Tensor], *modules: str) -> list[Tensor]:
    """Weight and bias of each module."""
    return [weights[f"{module}.{kind}"] for module in modules for kind in ("weight", "bias")]


def _part(weights: Mapping[str, Tensor], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under a prefix, their names without it, in dtype."""
    return {name[len(prefix) :]: w.to(dtype) for name, w in weights.items() if name.startswith(prefix)}
