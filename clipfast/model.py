"""CLIP, both families, under openai/CLIP's module tree and parameter names (Radford et al. 2021, arXiv:2103.00020).

Each tower has two ways through the same weights. The short way packs rows, runs `clipfast.ops`, and in the last block
computes the one row per sample that is read. The long way calls every module on full [L, N, W] rows as openai/CLIP
does; it is taken when somebody looks inside (`clipfast.watch`): a hook, a replaced or re-parametrised module, another
attention mask, a function of PyTorch that is no longer PyTorch's.

Programs put classes of their own in place of those in this module and in torch.nn. So constructors look each up by name
when a model is built, and pass what openai/CLIP's pass; what a module is compared with is the class as it was defined
(`_MADE`, and PyTorch's from the files that define them).
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.activation import GELU, MultiheadAttention
from torch.nn.modules.container import Sequential
from torch.nn.modules.conv import Conv2d
from torch.nn.modules.linear import Linear, NonDynamicallyQuantizableLinear
from torch.nn.modules.sparse import Embedding
from torch.utils.checkpoint import checkpoint

from clipfast import dispatch, graphs, ops, tuning
from clipfast.blocks import Block, BlockWeights, Projection, Stack
from clipfast.inputs import (
    check_images,
    check_places,
    check_same_device,
    check_text,
    mean_std,
    normalised,
    pair,
    refuse_nan_pixels,
)
from clipfast.packing import PackedText, Rows, pack_text
from clipfast.resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from clipfast.watch import CALLS, FUNCTIONS, as_made, gathered, looked_at, plain, still_as_made

__all__ = [
    "CLIP",
    "AttentionPool2d",
    "Bottleneck",
    "LayerNorm",
    "ModifiedResNet",
    "QuickGELU",
    "ResidualAttentionBlock",
    "Transformer",
    "VisionTransformer",
    "architecture",
    "build_model",
    "convert_weights",
]

# ---------------------------------------------------------------------------------------------------------------------
# Transformer


def _watched() -> bool:
    """Whether somebody wants to see openai/CLIP's calls; torch.compile does not, and takes the operators."""
    return looked_at() and not torch.compiler.is_compiling()


@functools.cache
def _causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu_(1)


def _is_causal(mask: Tensor | None, length: int) -> bool | None:
    """False without a mask, True for the causal one of at least this length, None for any other."""
    if mask is None:
        return False
    if mask.ndim != 2 or mask.shape[0] < length or not mask.is_floating_point():
        return None
    # compared on each call: a mask, too, can be edited where no version counter sees it
    return True if torch.equal(mask, _causal_mask(len(mask), mask.dtype, mask.device)) else None


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 for half-precision inputs too; the result has the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if plain(x) and plain(self.weight) and plain(self.bias) and not _watched():
            return ops.layer_norm(x, self.weight, self.bias, self.eps)
        if not isinstance(x, Tensor):
            return super().forward(x.type(torch.float32)).type(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.weight is None or self.weight.dtype == wide:
            return super().forward(x.to(wide)).to(x.dtype)
        # half-precision weights, at which openai/CLIP raises
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, d_model: int, n_head: int, attn_mask: Tensor | None = None):
        super().__init__()
        self.attn = nn.MultiheadAttention(d_model, n_head)
        self.ln_1 = LayerNorm(d_model)
        self.mlp = nn.Sequential(
            OrderedDict(
                [
                    ("c_fc", nn.Linear(d_model, d_model * 4)),
                    ("gelu", QuickGELU()),
                    ("c_proj", nn.Linear(d_model * 4, d_model)),
                ]
            )
        )
        self.ln_2 = LayerNorm(d_model)
        self.attn_mask = attn_mask
        self._record = None  # what clipfast.watch found

    def attention(self, x: Tensor) -> Tensor:
        mask = self.attn_mask
        if mask is not None:
            if mask.ndim == 2 and isinstance(x, Tensor):  # torch.fx's stand-in for a tensor knows no length
                mask = mask[: x.shape[0], : x.shape[0]]
            mask = mask.to(dtype=x.dtype, device=x.device)
        return self.attn(x, x, x, need_weights=False, attn_mask=mask)[0]

    def forward(self, x: Tensor) -> Tensor:
        """[L, N, W] -> [L, N, W]."""
        short = type(self) is _MADE.block and plain(x) and not looked_at() and still_as_made(self, self.parts)
        causal = _is_causal(self.attn_mask, len(x)) if short else None
        if causal is None:
            x = x + self.attention(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))
        length, batch, width = x.shape
        rows = x.transpose(0, 1).reshape(batch * length, width)
        rows = self.packed(rows, Rows.fixed(batch, length), causal)
        return rows.view(batch, length, width).transpose(0, 1)

    def parts(self) -> list[nn.Module] | None:
        """Its modules, if attention and MLP are what __init__ built, so that their weights say all."""
        attn, mlp = self.attn, self.mlp
        if not (
            "attn_mask" in vars(self)
            and "attention" not in vars(self)
            and as_made(self.ln_1, _MADE.layer_norm, "weight", "bias")
            and as_made(self.ln_2, _MADE.layer_norm, "weight", "bias")
            and as_made(attn, MultiheadAttention, "in_proj_weight", "in_proj_bias")
            and as_made(attn.out_proj, NonDynamicallyQuantizableLinear, "weight", "bias")
            and attn._qkv_same_embed_dim
            and attn.bias_k is None
            and attn.bias_v is None
            and not (attn.add_zero_attn or attn.batch_first or (attn.training and attn.dropout))
            # what PyTorch asserts when it is called
            and attn.in_proj_weight.shape == (3 * attn.embed_dim, attn.embed_dim)
            and attn.embed_dim % attn.num_heads == 0
            and as_made(mlp, Sequential)
            and [*mlp._modules] == ["c_fc", "gelu", "c_proj"]
            and as_made(mlp.c_fc, Linear, "weight", "bias")
            and as_made(mlp.c_proj, Linear, "weight", "bias")
            and (as_made(mlp.gelu, _MADE.quick_gelu) or (as_made(mlp.gelu, GELU) and mlp.gelu.approximate == "none"))
        ):
            return None
        return [self.ln_1, attn, attn.out_proj, self.ln_2, mlp, mlp.c_fc, mlp.gelu, mlp.c_proj]

    def packed(self, x: Tensor, rows: Rows, causal: bool) -> Tensor:
        """The block on packed rows [T, W]."""
        return ops.blocks(x, rows, [self.for_ops()], causal=causal)

    def weights(self) -> BlockWeights:
        attn, norm_1, norm_2, fc1, fc2 = self.attn, self.ln_1, self.ln_2, self.mlp.c_fc, self.mlp.c_proj
        return BlockWeights(
            norm_1_weight=norm_1.weight,
            norm_1_bias=norm_1.bias,
            qkv_weight=attn.in_proj_weight,
            qkv_bias=attn.in_proj_bias,
            out_weight=attn.out_proj.weight,
            out_bias=attn.out_proj.bias,
            norm_2_weight=norm_2.weight,
            norm_2_bias=norm_2.bias,
            fc1_weight=fc1.weight,
            fc1_bias=fc1.bias,
            fc2_weight=fc2.weight,
            fc2_bias=fc2.bias,
        )

    def for_ops(self) -> Block:
        """The block as `ops.blocks` takes it."""
        activation = "quick_gelu" if type(self.mlp.gelu) is _MADE.quick_gelu else "gelu"
        return Block(self.weights(), self.attn.num_heads, activation, (self.ln_1.eps, self.ln_2.eps))

    def pooled(self, x: Tensor, rows: Rows, index: Tensor) -> Tensor:
        """The block's result for the rows index [B] alone, each the last its attention may see (or bidirectional)."""
        return ops.blocks(x, rows, [self.for_ops()], causal=False, index=index)


class Transformer(nn.Module):
    """A stack of residual attention blocks: [L, N, W] -> [L, N, W]."""

    def __init__(self, width: int, layers: int, heads: int, attn_mask: Tensor | None = None):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a transformer of width {width} does not divide into {heads} heads")
        self.width = width
        self.layers = layers
        self.grad_checkpointing = False
        self._record = None  # what clipfast.watch found
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock(width, heads, attn_mask) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        causal = self.short_way(len(x)) if plain(x) else None
        if causal is None and not self.grad_checkpointing:
            return self.resblocks(x)
        if causal is None:
            for block in self.resblocks:
                x = self._kept_or_again(block, x)
            return x
        length, batch, width = x.shape
        rows, packed = Rows.fixed(batch, length), x.transpose(0, 1).reshape(batch * length, width)
        if self._checkpoints():
            packed = self._packed(self.resblocks, packed, rows, causal)
        else:
            packed = ops.blocks(packed, rows, self._stack(), causal=causal)
        return packed.view(batch, length, width).transpose(0, 1)

    def short_way(self, length: int) -> bool | None:
        """Whether the blocks are causal, or None if they must be called one by one on full rows."""
        if looked_at() or not still_as_made(self, self._parts):
            return None
        return _is_causal(next(iter(self.resblocks)).attn_mask, length)

    def _parts(self) -> list[nn.Module] | None:
        blocks = self.resblocks
        if not as_made(blocks, Sequential) or len(blocks) == 0:
            return None
        found: list[nn.Module] = [blocks]
        for block in blocks:
            parts = block.parts() if as_made(block, _MADE.block) else None
            if parts is None:
                return None
            found += [block, *parts]
        mask = blocks[0].attn_mask
        return found if all(block.attn_mask is mask for block in blocks) else None

    def pooled(
        self, x: Tensor, rows: Rows, index: Tensor, causal: bool, projection: Projection | None = None
    ) -> Tensor:
        """Packed rows [T, W] through every block; of the last one only the rows index [B]: -> [B, W].

        projection: of these rows: -> [B, E].
        """
        still_as_made(self, self._parts)  # what it gathered may be of other modules
        return self._pooled(x, rows, index, causal, projection)

    def _pooled(
        self, x: Tensor, rows: Rows, index: Tensor, causal: bool, projection: Projection | None = None
    ) -> Tensor:
        """As `pooled`, for a caller who has just asked `still_as_made`."""
        if torch.is_grad_enabled() or dispatch.traced():
            return self._pooled_at_once(x, rows, index, causal, projection)
        laid_out = not dispatch.runs_on("cpu", ("linear",), x.device, x.dtype)
        most = tuning.rows_at_a_time(x.device, self.width, x.dtype, laid_out)
        if most is None or rows.total <= most:
            return self._pooled_at_once(x, rows, index, causal, projection)
        parts = [
            self._pooled_at_once(x[some], part, index[sequences] - some.start, causal, projection)
            for some, sequences, part in rows.parts(most)
        ]
        return torch.cat(parts)

    def _pooled_at_once(
        self, x: Tensor, rows: Rows, index: Tensor, causal: bool, projection: Projection | None
    ) -> Tensor:
        if not self._checkpoints():
            return ops.blocks(x, rows, self._stack(), causal=causal, index=index, projection=projection)
        *before, last = self.resblocks
        x = self._kept_or_again(last.pooled, self._packed(before, x, rows, causal), rows, index)
        return x if projection is None else ops.project(x, *projection)

    def _packed(self, blocks: Iterable[ResidualAttentionBlock], x: Tensor, rows: Rows, causal: bool) -> Tensor:
        """Packed rows [T, W] through these blocks."""
        for block in blocks:
            x = self._kept_or_again(block.packed, x, rows, causal)
        return x

    def _stack(self) -> Stack:
        """All blocks as `ops.blocks` takes them."""
        return gathered(self, lambda: Stack(block.for_ops() for block in self.resblocks))

    def _checkpoints(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()

    def _kept_or_again(self, block: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """A block's result; what its gradients need is kept, or with grad_checkpointing computed again."""
        if self._checkpoints():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


class VisionTransformer(nn.Module):
    """[N, 3, H, W] -> [N, output_dim]."""

    def __init__(
        self,
        input_resolution: int | tuple[int, int],
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
    ):
        super().__init__()
        self.input_resolution = input_resolution
        self.output_dim = output_dim
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        height, across = pair(input_resolution)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(
            scale * torch.randn((height // patch_size) * (across // patch_size) + 1, width)
        )
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = LayerNorm(width)
        self.proj: nn.Parameter | None = nn.Parameter(scale * torch.randn(width, output_dim))

    def forward(self, x: Tensor) -> Tensor:
        weight = getattr(self.conv1, "weight", None)
        if isinstance(weight, Tensor):
            check_images(x, weight)
        if not (plain(x) and self._short_way()):
            return self._long_way(x)
        size = self.conv1.kernel_size[0]
        places = (x.shape[2] // size) * (x.shape[3] // size) + 1
        check_places(x, places, self.positional_embedding, self.input_resolution, size)
        mean, std = mean_std(x)
        x = ops.patch_embed(
            x,
            self.conv1.weight,
            self.class_embedding,
            self.positional_embedding,
            mean=mean,
            std=std,
            norm_weight=self.ln_pre.weight,
            norm_bias=self.ln_pre.bias,
            eps=self.ln_pre.eps,
        )  # [N, 1 + grid ** 2, width]
        batch, length, width = x.shape
        x = x.view(batch * length, width)
        index = torch.arange(0, batch * length, length, device=x.device)
        norm, rows = self.ln_post, Rows.fixed(batch, length)
        if self.proj is None:
            x = self.transformer._pooled(x, rows, index, causal=False)
            return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
        projection = Projection(norm.weight, norm.bias, self.proj, norm.eps)
        return self.transformer._pooled(x, rows, index, causal=False, projection=projection)

    def _short_way(self) -> bool:
        shapes = (self.class_embedding.ndim, self.positional_embedding.ndim, 2 if self.proj is None else self.proj.ndim)
        return (
            not dispatch.traced()
            and still_as_made(self, self._parts)
            and shapes == (1, 2, 2)
            and len(self.positional_embedding) > 1
            and not self.conv1.weight.is_meta
            and self.transformer.short_way(len(self.positional_embedding)) is False
        )

    def _parts(self) -> list[nn.Module] | None:
        conv = self.conv1
        if not (
            as_made(conv, Conv2d, "weight")
            and conv.bias is None
            and conv.stride == conv.kernel_size == (conv.kernel_size[0],) * 2
            and conv.weight.shape[2:] == conv.kernel_size
            and conv.padding == (0, 0)
            and conv.groups == 1
            and conv.dilation == (1, 1)
            and plain(self.class_embedding)
            and plain(self.positional_embedding)
            and (self.proj is None or plain(self.proj))
            and as_made(self.ln_pre, _MADE.layer_norm, "weight", "bias")
            and as_made(self.ln_post, _MADE.layer_norm, "weight", "bias")
            and as_made(self.transformer, _MADE.transformer)
        ):
            return None
        return [conv, self.ln_pre, self.ln_post, self.transformer]

    def _long_way(self, x: Tensor) -> Tensor:
        images, weight = x, getattr(self.conv1, "weight", None)
        x = self.conv1(normalised(x, weight.dtype) if isinstance(weight, Tensor) else x)  # [*, width, grid, grid]
        x = x.flatten(2).transpose(1, 2)  # [*, grid ** 2, width]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        if isinstance(weight, Tensor):
            check_places(images, x.shape[1], self.positional_embedding, self.input_resolution, weight.shape[-1])
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)  # NLD -> LND -> NLD
        x = self.ln_post(x[:, 0])
        return x if self.proj is None else x @ self.proj


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


class CLIP(nn.Module):
    """openai/CLIP's model: an image tower, a text tower, one embedding space.

    vision_layers: an int for a VisionTransformer, a tuple of four for a ModifiedResNet.
    image_resolution: pixels, an int or (height, width).
    activation: of both towers' MLPs, "quick_gelu" (OpenAI's) or "gelu".   vision_heads: default vision width // 64.
    Raises: ValueError where sizes do not divide.
    """

    # on a GPU, without gradients, batches are replayed as CUDA graphs (clipfast.graphs), unless this is False
    cuda_graphs: bool = True

    def __init__(
        self,
        embed_dim: int,
        # vision
        image_resolution: int | tuple[int, int],
        vision_layers: tuple[int, int, int, int] | int,
        vision_width: int,
        vision_patch_size: int | None,
        # text
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
        *,
        activation: str = "quick_gelu",
        vision_heads: int | None = None,
    ):
        super().__init__()
        self.context_length = context_length
        if isinstance(vision_layers, (tuple, list)):
            self.visual: ModifiedResNet | VisionTransformer = ModifiedResNet(
                layers=(*vision_layers,),
                output_dim=embed_dim,
                heads=vision_heads or max(1, vision_width * 32 // 64),
                input_resolution=image_resolution,
                width=vision_width,
            )
        else:
            vision_heads = vision_heads or max(1, vision_width // 64)
            self.visual = VisionTransformer(
                input_resolution=image_resolution,
                patch_size=vision_patch_size,
                width=vision_width,
                layers=vision_layers,
                heads=vision_heads,
                output_dim=embed_dim,
            )
        self.transformer = Transformer(
            width=transformer_width,
            layers=transformer_layers,
            heads=transformer_heads,
            attn_mask=self.build_attention_mask(),
        )
        _set_activation(self, activation)
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))
        self.activation = activation
        self.register_state_dict_post_hook(_note_activation)
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        if isinstance(self.visual, ModifiedResNet):
            pool = self.visual.attnpool
            for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
                nn.init.normal_(projection.weight, std=pool.c_proj.in_features**-0.5)
            for layer in (self.visual.layer1, self.visual.layer2, self.visual.layer3, self.visual.layer4):
                for block in layer:
                    nn.init.zeros_(block.bn3.weight)
        width, layers = self.transformer.width, self.transformer.layers
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def build_attention_mask(self) -> Tensor:
        """[context, context], added to the scores: a token sees itself and those before it."""
        return torch.full((self.context_length, self.context_length), float("-inf")).triu_(1)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        """[B, 3, H, W], floating (preprocessed) or uint8 (0 to 255) -> [B, E], not normalised.

        Raises: TypeError, ValueError or RuntimeError naming what is wrong with the images; on a CPU without gradients
                also ValueError for NaN pixels (a GPU returns NaN rows: a check would wait for it).
        """
        if not isinstance(image, Tensor):
            raise TypeError(f"image must be a tensor [B, 3, H, W] (preprocess makes one), got {type(image).__name__}")
        image = image.to(self.dtype) if image.is_floating_point() else image
        if self.cuda_graphs and graphs.suit(self, image) and self._visual_as_made():
            return graphs.encode_image(self, image)
        features = self.visual(image)
        checkable = isinstance(features, Tensor) and features.device.type == "cpu" and not features.requires_grad
        if checkable and not dispatch.traced() and features.isnan().any():
            refuse_nan_pixels(image)
        return features

    def _visual_as_made(self) -> bool:
        return as_made(self.visual, _MADE.vision_transformer) and self.visual._short_way()

    def encode_text(self, text: Tensor) -> Tensor:
        """Token ids [B, <= context_length] from tokenize -> [B, E], not normalised.

        What follows the end-of-text token (the largest id) is never computed: it cannot change the result.
        Raises: TypeError, ValueError or RuntimeError naming what is wrong with the ids.
        """
        weight = getattr(self.token_embedding, "weight", None)
        if isinstance(weight, Tensor):
            check_same_device("text", text, weight)
        if not (plain(text) and self._short_way()):
            return self._encode_text_long_way(text)
        stable = graphs.suit(self, text)
        packed = pack_text(text, len(self.positional_embedding), len(weight), stable=stable)
        if stable and self.cuda_graphs:
            return graphs.encode_text(self, packed)
        return self._encode_packed(packed.to(text.device))

    def encode_packed(self, packed: PackedText) -> Tensor:
        """Packed token ids on the model's device -> [B, E], in the order of the texts."""
        still_as_made(self.transformer, self.transformer._parts)  # what it gathered may be of other modules
        return self._encode_packed(packed)

    def _encode_packed(self, packed: PackedText) -> Tensor:
        x = F.embedding(packed.ids, self.token_embedding.weight).to(self.dtype)
        x = x + F.embedding(packed.positions, self.positional_embedding).to(self.dtype)
        norm = self.ln_final
        projection = Projection(norm.weight, norm.bias, self.text_projection, norm.eps)
        x = self.transformer._pooled(x, packed.rows, packed.last, causal=True, projection=projection)
        return x[packed.restore]

    def _short_way(self) -> bool:
        return (
            not dispatch.traced()
            and still_as_made(self, self._parts)
            and (self.positional_embedding.ndim, self.text_projection.ndim) == (2, 2)
            and len(self.positional_embedding) > 1  # PyTorch would add a single row to every token
            and not self.token_embedding.weight.is_meta
            and self.transformer.short_way(len(self.positional_embedding)) is True
        )

    def _parts(self) -> list[nn.Module] | None:
        embedding = self.token_embedding
        if not (
            as_made(embedding, Embedding, "weight")
            and embedding.max_norm is None
            and embedding.padding_idx is None
            and not (embedding.scale_grad_by_freq or embedding.sparse)
            and plain(self.positional_embedding)
            and plain(self.text_projection)
            and as_made(self.ln_final, _MADE.layer_norm, "weight", "bias")
            and as_made(self.transformer, _MADE.transformer)
        ):
            return None
        return [embedding, self.ln_final, self.transformer]

    def _encode_text_long_way(self, text: Tensor) -> Tensor:
        positions = self.positional_embedding
        if positions.ndim == 2 and len(positions) > 1:
            check_text(text, len(positions))
            positions = positions[: text.shape[1]]
        x = self.token_embedding(text if text.dtype == torch.int64 else text.int()).to(self.dtype)  # [B, n_ctx, width]
        x = x + positions.to(self.dtype)
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)  # NLD -> LND -> NLD
        x = self.ln_final(x).to(self.dtype)
        return x[torch.arange(x.shape[0], device=x.device), text.argmax(dim=-1)] @ self.text_projection

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps a transformer block's input alone and computes the block again for its gradients.

        Less memory for a quarter more work. A ModifiedResNet keeps everything: its BatchNorm would count twice.
        """
        for module in self.modules():
            if isinstance(module, _MADE.transformer):
                module.grad_checkpointing = enable

    def prepack_weights(self, enable: bool = True) -> CLIP:
        """For inference on a CPU: keeps the linear layers' weights in the order in which products read them.

        It saves most at one image or a few captions. The layouts take as much memory again as those weights; twice as
        much where both libclipfast_cpu and oneDNN multiply (`clipfast.explain()`): with AMX bfloat16, in small batches
        and in large ones. After an optimiser's step and after every edit that PyTorch counts (load_state_dict, .to(),
        another tensor as `.data`) the next call makes the layout again. It does not count one in place through `.data`
        or NumPy: call this again after that. Parameters put in later, a deep copy and an unpickled model start without.
        enable: False keeps nothing any more, and frees the memory.
        Returns: the model.
        Raises:  ValueError for weights made in inference mode.
        """
        weights = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        weights += [module.in_proj_weight for module in self.modules() if isinstance(module, nn.MultiheadAttention)]
        dispatch.prepack([weight for weight in weights if weight is not None], enable)
        return self

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """-> (logits_per_image [I, T], logits_per_text [T, I])."""
        image_features, text_features = self.encode_image(image), self.encode_text(text)
        if image_features.ndim == text_features.ndim == 2 and not _watched():
            return ops.logits(image_features, text_features, self.logit_scale)
        image_features = image_features / image_features.norm(dim=1, keepdim=True)
        text_features = text_features / text_features.norm(dim=1, keepdim=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.t()
        return logits_per_image, logits_per_image.t()


class _MADE:
    """The classes as defined here, whatever has been put in their place since."""

    layer_norm = LayerNorm
    quick_gelu = QuickGELU
    block = ResidualAttentionBlock
    transformer = Transformer
    vision_transformer = VisionTransformer


for _kind in (LayerNorm, QuickGELU, ResidualAttentionBlock, Transformer, VisionTransformer):
    FUNCTIONS.add_ours(_kind, *CALLS)
FUNCTIONS.add_ours(ResidualAttentionBlock, "attention")

_ACTIVATIONS: dict[str, type[nn.Module] | None] = {"quick_gelu": None, "gelu": nn.GELU}


def _set_activation(model: CLIP, activation: str) -> None:
    """Blocks are built with QuickGELU, as openai/CLIP's are; another activation is put in afterwards."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    kind = _ACTIVATIONS[activation]
    for tower in (model.visual, model) if kind is not None else ():
        for block in tower.transformer.resblocks if hasattr(tower, "transformer") else ():
            block.mlp.gelu = kind()


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _note_activation(model: CLIP, state_dict: Mapping[str, Tensor], prefix: str, metadata: dict) -> None:
    """A state dict says what no weight shows, so that load() need not ask; load_state_dict passes over it."""
    metadata["activation"] = model.activation


def convert_weights(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """Casts convolutions, linear layers, attention and the projections to dtype, in place, as openai/CLIP does.

    LayerNorm, BatchNorm, embeddings and logit_scale keep their precision.
    """
    for module in model.modules():
        names: tuple[str, ...] = ()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            names = ("weight", "bias")
        elif isinstance(module, nn.MultiheadAttention):
            names = (
                "in_proj_weight",
                "q_proj_weight",
                "k_proj_weight",
                "v_proj_weight",
                "in_proj_bias",
                "bias_k",
                "bias_v",
            )
        names += ("text_projection", "proj")
        for name in names:
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                tensor.data = tensor.data.to(dtype)


def build_model(
    state_dict: Mapping[str, Tensor],
    *,
    activation: str = "quick_gelu",
    image_resolution: int | tuple[int, int] | None = None,
    vision_heads: int | None = None,
    transformer_heads: int | None = None,
) -> CLIP:
    """The model a state dict in OpenAI's layout describes, with its weights, in eval mode, on the CPU.

    Every size is read off the shapes. The weights keep their precision: half-precision checkpoints (OpenAI's) give a
    model of mixed dtype as openai/CLIP's, float32 ones stay float32. The caller's dict is not changed.
    image_resolution: needed only for a rectangular input, which the shapes cannot tell.
    vision_heads, transformer_heads: needed only where heads are not 64 wide.
    Raises: RuntimeError (from load_state_dict) for missing or unexpected keys and other shapes; ValueError or KeyError
            if the sizes cannot be read.
    """
    weights = {k: v for k, v in state_dict.items() if k not in ("input_resolution", "context_length", "vocab_size")}
    sizes: dict[str, Any] = architecture(weights, image_resolution)
    sizes["transformer_heads"] = transformer_heads or sizes["transformer_heads"]
    # a program's own CLIP may have the published constructor
    options = {"vision_heads": vision_heads, "activation": None if activation == "quick_gelu" else activation}
    sizes |= {name: value for name, value in options.items() if value is not None}
    model = CLIP(**sizes)
    half = weights["visual.conv1.weight"].dtype
    if half in (torch.float16, torch.bfloat16):
        convert_weights(model, *([] if half == torch.float16 else [half]))
    model.load_state_dict(weights)
    return model.eval()


def architecture(state_dict: Mapping[str, Tensor], image_resolution: int | tuple[int, int] | None = None) -> dict:
    """CLIP's constructor arguments, read off the shapes of a state dict in OpenAI's layout."""
    vision: dict = {}
    shape = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if "visual.proj" in shape:
        vision["vision_width"] = shape["visual.conv1.weight"][0]
        vision["vision_layers"] = len(
            [k for k in shape if k.startswith("visual.") and k.endswith(".attn.in_proj_weight")]
        )
        vision["vision_patch_size"] = stride = shape["visual.conv1.weight"][-1]
        cells = shape["visual.positional_embedding"][0] - 1
    else:
        blocks = [{k.split(".")[2] for k in shape if k.startswith(f"visual.layer{n}.")} for n in (1, 2, 3, 4)]
        vision["vision_layers"] = tuple(len(found) for found in blocks)
        vision["vision_width"] = shape["visual.layer1.0.conv1.weight"][0]
        vision["vision_patch_size"], stride = None, 32
        cells = shape["visual.attnpool.positional_embedding"][0] - 1
    if image_resolution is None:
        grid = math.isqrt(cells)
        if grid * grid != cells:
            raise ValueError(f"{cells} patches are no square: give image_resolution=(height, width)")
        image_resolution = grid * stride
    text_width = shape["ln_final.weight"][0]
    return {
        **vision,
        "embed_dim": shape["text_projection"][1],
        "image_resolution": image_resolution,
        "context_length": shape["positional_embedding"][0],
        "vocab_size": shape["token_embedding.weight"][0],
        "transformer_width": text_width,
        "transformer_heads": max(1, text_width // 64),
        "transformer_layers": len({k.split(".")[2] for k in shape if k.startswith("transformer.resblocks.")}),
    }
