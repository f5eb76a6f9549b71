"""The public operators: what each one computes, checked here once. `clipfast.dispatch` decides where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from clipfast import dispatch
from clipfast.blocks import Block, BlockWeights, Projection, Stack
from clipfast.dispatch import run
from clipfast.packing import Rows

__all__ = [
    "attention",
    "attention_pool",
    "blocks",
    "layer_norm",
    "linear",
    "logits",
    "mlp",
    "patch_embed",
    "project",
]

ACTIVATIONS = ("quick_gelu", "gelu")


def _expect(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raises ValueError unless the tensor is None or has this shape; -1 stands for any size."""
    if tensor is None or tensor.shape == shape:
        return
    if len(tensor.shape) == len(shape) and all(
        want in (-1, got) for want, got in zip(shape, tensor.shape, strict=True)
    ):
        return
    wanted = ", ".join("*" if want == -1 else str(want) for want in shape)
    raise ValueError(f"{name} must be [{wanted}], got {list(tensor.shape)}")


def _expect_activation(activation: str | None, known: tuple[str | None, ...]) -> None:
    if activation not in known:
        raise ValueError(f"activation must be one of {known}, got {activation!r}")


def _expect_rows(name: str, tensor: Tensor, rows: Rows) -> None:
    if rows.total != tensor.shape[0]:
        raise ValueError(f"offsets end at {rows.total} but {name} has {tensor.shape[0]} rows")


def _expect_no_empty_sequence(rows: Rows) -> None:
    if 0 in rows.lengths:
        raise ValueError("every sequence needs a row to attend to, and one is empty")


def _expect_one_device(name: str, first: Tensor, **others: Tensor | None) -> None:
    for other, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(f"{name} is on {first.device} but {other} is on {tensor.device}; move one of them")


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(x, weight, bias, eps=1e-5, *, residual=None):
    """LayerNorm over the last dimension, computed in float32 (float64 for float64) and returned in x's dtype.

    x: [..., W] floating.   weight, bias: [W], any floating dtype.   residual: [..., W], dtype of x, or None.
    Returns: [..., W], dtype of x; with a residual (LayerNorm(x + residual), x + residual).
    Raises: ValueError if the shapes disagree, RuntimeError if the devices do.
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    _expect("weight", weight, x.shape[-1])
    _expect("bias", bias, x.shape[-1])
    _expect("residual", residual, *x.shape)
    _expect_one_device("x", x, weight=weight, bias=bias, residual=residual)
    return run("layer_norm", x, (x, weight, bias, residual), x, weight, bias, eps, residual)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual.

    x: [..., K].   weight: [N, K].   bias: [N] or None.   residual: [..., N] or None.   One floating dtype.
    activation: None, "quick_gelu" (x * sigmoid(1.702 x)) or "gelu" (exact).
    Returns: [..., N], dtype of x.
    Raises: ValueError if the shapes disagree or the activation is unknown, RuntimeError if the devices differ.
    """
    _expect("weight", weight, -1, x.shape[-1])
    _expect("bias", bias, weight.shape[0])
    _expect("residual", residual, *x.shape[:-1], weight.shape[0])
    _expect_activation(activation, (None, *ACTIVATIONS))
    _expect_one_device("x", x, weight=weight, bias=bias, residual=residual)
    return run("linear", x, (x, weight, bias, residual), x, weight, bias, activation, residual)


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: str = "quick_gelu",
    eps: float = 1e-5,
) -> Tensor:
    """x + fc2(activation(fc1(LayerNorm(x)))): the second half of a residual block.

    x: [..., W].   norm_weight, norm_bias: [W].   fc1: [F, W], [F].   fc2: [W, F], [W].
    activation: "quick_gelu" or "gelu".
    Returns: [..., W], dtype of x.
    Raises: ValueError if the shapes disagree or the activation is unknown, RuntimeError if the devices differ.
    """
    width, hidden = x.shape[-1], fc1_weight.shape[0]
    _expect("norm_weight", norm_weight, width)
    _expect("norm_bias", norm_bias, width)
    _expect("fc1_weight", fc1_weight, hidden, width)
    _expect("fc1_bias", fc1_bias, hidden)
    _expect("fc2_weight", fc2_weight, width, hidden)
    _expect("fc2_bias", fc2_bias, width)
    _expect_activation(activation, ACTIVATIONS)
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    fc1, fc2 = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias}, {"fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    _expect_one_device("x", x, **norm, **fc1, **fc2)
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return run("mlp", x, tensors, *tensors, activation, eps)


def attention(
    qkv: Tensor, offsets: Rows | Tensor | Sequence[int], *, causal: bool, scale: float | None = None
) -> Tensor:
    """Softmax attention of each sequence's rows over that sequence's rows; no [L, L] matrix leaves the kernel.

    qkv:     [T, 3, H, D] floating.
    offsets: Rows, or [B + 1] integers: first row of each sequence, the last entry T.
    scale:   multiplies q.k before the softmax; default D ** -0.5.
    Returns: [T, H * D], dtype of qkv.
    Raises:  ValueError if the shapes disagree.
    Source:  Vaswani et al. 2017; Dao 2023, FlashAttention-2.
    """
    rows = Rows.of(offsets)
    _expect("qkv", qkv, -1, 3, -1, -1)
    _expect_rows("qkv", qkv, rows)
    return run("attention", qkv, (qkv,), qkv, rows, causal, scale)


def blocks(
    x: Tensor,
    offsets: Rows | Tensor | Sequence[int],
    blocks: Sequence[Block],
    *,
    causal: bool,
    index: Tensor | None = None,
    projection: Projection | None = None,
) -> Tensor:
    """Residual attention blocks one after the other: y = x + out(attention(qkv(LayerNorm(x)))), then `mlp` of y.

    One operator where a backend has it so, else those they are made of, each where it runs best.
    x:       [T, W] floating.
    offsets: Rows, or [B + 1] integers: first row of each sequence, the last entry T.
    blocks:  of width W, a multiple of their heads; the matrices of x's dtype. A `clipfast.blocks.Stack` that is passed
             again is checked in less time.
    causal:  a row attends to itself and to those before it.
    index:   [B] int64, one row of each sequence, none of which is empty. The last block computes these rows alone, and
             each attends to its whole sequence even if causal, as only a sequence's last row does otherwise.
    projection: of these rows, as `project`; only with an index.
    Returns: [T, W], with an index [B, W], with a projection to E columns [B, E]; dtype of x.
    Raises:  ValueError if the shapes disagree, an activation is unknown or a projection comes without an index,
             TypeError for an index of another dtype or a projection of another type, RuntimeError if the devices
             differ, or on a CPU if an index is no row of its sequence.
    Source:  Radford et al. 2019, GPT-2; Radford et al. 2021, arXiv:2103.00020.
    """
    rows = Rows.of(offsets)
    _expect("x", x, -1, -1)
    _expect_rows("x", x, rows)
    _expect_blocks(x, blocks)
    if index is not None:
        _expect_index(index, x, rows, blocks)
    if projection is not None:
        if not isinstance(projection, Projection):
            raise TypeError(f"projection must be a clipfast.blocks.Projection, got {type(projection).__name__}")
        if index is None:
            raise ValueError("a projection is of the rows that an index names, and there is no index")
        _expect_projection(x, *projection[:3])
    whole = dispatch.whole_blocks(x, blocks, index is not None, projection)
    if whole is not None:
        return whole(x, rows, blocks, causal, index, projection)
    # libclipfast_cpu sees to it itself, and a GPU would be waited for
    if index is not None and x.device.type == "cpu" and not dispatch.traced():
        starts = rows.derive("offsets", Rows.offsets, x.device)
        if bool(((index < starts[:-1]) | (index >= starts[1:])).any()):
            raise RuntimeError("each index must be a row of its own sequence")
    for block in blocks[: None if index is None else -1]:
        x = block_by_operators(x, rows, block, causal)
    if index is None:
        return x
    x = pooled_block_by_operators(x, rows, blocks[-1], index)
    return x if projection is None else project(x, *projection)


def _expect_index(index: Tensor, x: Tensor, rows: Rows, blocks: Sequence[Block]) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor of int64, got {type(index).__name__}")
    _expect("index", index, len(rows.lengths))
    _expect_one_device("x", x, index=index)
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if not blocks:
        raise ValueError("an index is of the last block's rows, and there is no block")
    _expect_no_empty_sequence(rows)


def _expect_blocks(x: Tensor, blocks: Sequence[Block]) -> None:
    found: dict = {}
    if isinstance(blocks, Stack) and not dispatch.traced():
        blocks.look()
        found = blocks.found
    fits = ("fits", x.shape[1], x.device)
    if fits not in found:
        for block in blocks:
            _expect_block(x, block)
        found[fits] = True


def _expect_block(x: Tensor, block: Block) -> None:
    weights, width, hidden = block.weights, x.shape[1], block.weights.fc1_weight.shape[0]
    shapes: list[tuple[int, ...]] = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    shapes += [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    for name, tensor, shape in zip(BlockWeights._fields, weights, shapes, strict=True):
        if tensor is None and name not in ("qkv_bias", "out_bias"):
            raise ValueError(f"{name} must be a tensor, got None: only qkv_bias and out_bias may be None")
        if tensor is not None and (tensor.shape != shape or tensor.device != x.device):
            _expect(name, tensor, *shape)
            _expect_one_device("x", x, **{name: tensor})
    if block.heads < 1 or width % block.heads:
        raise ValueError(f"x is {width} wide, which does not divide into {block.heads} heads")
    _expect_activation(block.activation, ACTIVATIONS)


def block_by_operators(x: Tensor, rows: Rows, block: Block, causal: bool) -> Tensor:
    """A block of `blocks` by the operators that it is made of."""
    norm_1_weight, norm_1_bias, qkv_weight, qkv_bias, out_weight, out_bias, *of_mlp = block.weights
    qkv = linear(layer_norm(x, norm_1_weight, norm_1_bias, block.eps[0]), qkv_weight, qkv_bias)
    heads = qkv.view(len(qkv), 3, block.heads, x.shape[1] // block.heads)
    x = linear(attention(heads, rows, causal=causal), out_weight, out_bias, residual=x)
    return mlp(x, *of_mlp, activation=block.activation, eps=block.eps[1])


def pooled_block_by_operators(x: Tensor, rows: Rows, block: Block, index: Tensor) -> Tensor:
    """The last block of `blocks` with an index by the operators that it is made of."""
    norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, *of_mlp = block.weights
    y, width = layer_norm(x, norm_weight, norm_bias, block.eps[0]), x.shape[1]
    q_bias, k_bias, v_bias = (None,) * 3 if qkv_bias is None else qkv_bias.split(width)
    q_weight, k_weight, v_weight = qkv_weight.split(width)
    of_qkv = (q_weight, q_bias, k_weight, k_bias, v_weight, v_bias)
    pooled = attention_pool(y[index], y, rows, *of_qkv, heads=block.heads)
    pooled = linear(pooled, out_weight, out_bias, residual=x[index])
    return mlp(pooled, *of_mlp, activation=block.activation, eps=block.eps[1])


def attention_pool(
    query: Tensor,
    tokens: Tensor,
    offsets: Rows | Tensor | Sequence[int],
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    *,
    heads: int,
) -> Tensor:
    """One query per sequence attends to all of that sequence's rows, with the three projections inside.

    query: [B, W].   tokens: [T, W], rows of B sequences (none empty).   q/k/v_weight: [W', W].   biases: [W'] or None.
    Returns: [B, W'], heads side by side, before any output projection; dtype of tokens. The key bias is taken for its
             gradient only: it adds the same to every score of a head, and the softmax drops it.
    Raises:  ValueError if the shapes disagree, RuntimeError if the devices do.
    """
    rows = Rows.of(offsets)
    width, inner = tokens.shape[-1], q_weight.shape[0]
    _expect("query", query, len(rows.lengths), width)
    _expect("tokens", tokens, -1, width)
    _expect_rows("tokens", tokens, rows)
    _expect_no_empty_sequence(rows)
    if heads < 1 or inner % heads:
        raise ValueError(f"q_weight has {inner} rows, which do not divide into {heads} heads")
    for name, weight, bias in (("q", q_weight, q_bias), ("k", k_weight, k_bias), ("v", v_weight, v_bias)):
        _expect(f"{name}_weight", weight, inner, width)
        _expect(f"{name}_bias", bias, inner)
        _expect_one_device("tokens", tokens, **{"query": query, f"{name}_weight": weight, f"{name}_bias": bias})
    tensors = (query, tokens, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias)
    return run("attention_pool", tokens, tensors, query, tokens, rows, *tensors[2:], heads)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Class token and linear embedding of each P x P patch, plus positions; then, if given its weights, a LayerNorm.

    images: [B, C, H, W] floating, or uint8 with mean and std [C]: then (pixel / 255 - mean) / std comes first.
    weight: [W, C, P, P].   class_embedding: [W].   positional_embedding: [1 + G, W], G = (H // P) * (W // P); rows and
            columns of pixels beyond a multiple of P are left out, as a strided convolution does.
    norm_weight, norm_bias: [W] of the LayerNorm (CLIP's ln_pre), or both None for none.   eps: its.
    Returns: [B, 1 + G, W], dtype of weight.
    Raises:  TypeError for integer images, ValueError if the shapes disagree, RuntimeError if the devices do.
    Source:  Dosovitskiy et al. 2020, arXiv:2010.11929.
    """
    _expect("weight", weight, -1, -1, -1, -1)
    width, channels, size, _ = weight.shape
    _expect("weight", weight, width, channels, size, size)
    _expect("images", images, -1, channels, -1, -1)
    _expect("class_embedding", class_embedding, width)
    _expect("positional_embedding", positional_embedding, -1, width)
    _expect("norm_weight", norm_weight, width)
    _expect("norm_bias", norm_bias, width)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias come together or not at all")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be floating (normalised) or uint8 (0 to 255), got {images.dtype}")
    if images.dtype == torch.uint8:
        if mean is None or std is None:
            raise ValueError("uint8 images need mean and std")
        _expect("mean", mean, channels)
        _expect("std", std, channels)
    down, across = images.shape[2] // size, images.shape[3] // size
    if 1 + down * across != len(positional_embedding):
        raise ValueError(
            f"images of {images.shape[2]} x {images.shape[3]} give {down} x {across} patches of {size}, "
            f"but positional_embedding is for {len(positional_embedding) - 1}"
        )
    _expect_one_device("images", images, weight=weight, norm_weight=norm_weight, norm_bias=norm_bias)
    _expect_one_device("images", images, class_embedding=class_embedding, positional_embedding=positional_embedding)
    tensors = (images, weight, class_embedding, positional_embedding)
    norm = (norm_weight, norm_bias)
    return run("patch_embed", weight, (*tensors, *norm), *tensors, mean, std, *norm, eps)


def project(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm(x) @ projection: pooled rows into the shared embedding space.

    x: [B, W].   norm_weight, norm_bias: [W].   projection: [W, E].
    Returns: [B, E], dtype of x.
    Raises: ValueError if the shapes disagree, RuntimeError if the devices do.
    """
    _expect_projection(x, norm_weight, norm_bias, projection)
    return run("project", x, (x, norm_weight, norm_bias, projection), x, norm_weight, norm_bias, projection, eps)


def _expect_projection(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, projection: Tensor) -> None:
    _expect("norm_weight", norm_weight, x.shape[-1])
    _expect("norm_bias", norm_bias, x.shape[-1])
    _expect("projection", projection, x.shape[-1], -1)
    _expect_one_device("x", x, norm_weight=norm_weight, norm_bias=norm_bias, projection=projection)


def logits(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logit_scale) times the cosine of every image with every text.

    image_features: [I, E].   text_features: [T, E].   logit_scale: scalar tensor.
    Returns: ([I, T], [T, I]).
    Raises: ValueError if the widths differ, RuntimeError if the devices do.
    Source: Radford et al. 2021, arXiv:2103.00020, figure 3.
    """
    _expect("image_features", image_features, -1, -1)
    _expect("text_features", text_features, -1, image_features.shape[1])
    _expect_one_device("image_features", image_features, text_features=text_features, logit_scale=logit_scale)
    tensors = (image_features, text_features, logit_scale)
    return run("logits", image_features, tensors, *tensors)
