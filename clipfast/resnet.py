"""CLIP's ResNet: three-convolution stem, anti-aliased striding, attention pooling (Radford et al. 2021, 2.4)."""

from __future__ import annotations

import sys
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast import dispatch, ops
from clipfast.inputs import check_images, check_places, normalised, pair
from clipfast.kernels.eager import padded
from clipfast.packing import Rows
from clipfast.watch import looked_at, plain


def _published(name: str) -> type[nn.Module]:
    """The class that `clip.model` has under a name now: programs put their own there before they build a model."""
    return getattr(sys.modules["clipfast.model"], name)


class Bottleneck(nn.Module):
    """Residual bottleneck whose convolutions all have stride 1; an average pool before conv3 does the striding."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        self.stride = stride
        if stride > 1 or inplanes != planes * self.expansion:
            # the keys "-1", "0", "1" are those of the published checkpoints
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(inplanes, planes * self.expansion, 1, bias=False)),
                        ("1", nn.BatchNorm2d(planes * self.expansion)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu3(out)


class AttentionPool2d(nn.Module):
    """Attention with one query, the mean token, over the mean and all HW positions: [N, C, H, W] -> [N, output_dim]."""

    def __init__(
        self,
        spacial_dim: int | tuple[int, int],
        embed_dim: int,
        num_heads: int,
        output_dim: int | None = None,
    ):
        super().__init__()
        height, width = pair(spacial_dim)
        self.positional_embedding = nn.Parameter(torch.randn(height * width + 1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, output_dim or embed_dim)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        if len(self.positional_embedding) not in (1, x.shape[2] * x.shape[3] + 1):
            raise ValueError(
                f"the last feature map is {x.shape[2]} x {x.shape[3]}, but the positional embedding is for "
                f"{len(self.positional_embedding) - 1} places: the images are not of the model's input resolution"
            )
        x = x.flatten(start_dim=2).transpose(1, 2)  # [N, HW, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        compiling = torch.compiler.is_compiling()
        if not compiling and not (plain(x) and all(map(plain, self.parameters())) and not looked_at()):
            return self._as_published(x)
        if x.is_meta or compiling or _rounds_strictly(x):
            return self._every_key_and_value(x)
        n, length, width = x.shape
        pooled = ops.attention_pool(
            x[:, 0],
            x.reshape(n * length, width),
            Rows.fixed(n, length),
            self.q_proj.weight,
            self.q_proj.bias,
            self.k_proj.weight,
            self.k_proj.bias,
            self.v_proj.weight,
            self.v_proj.bias,
            heads=self.num_heads,
        )
        return ops.linear(pooled, self.c_proj.weight, self.c_proj.bias)

    def _every_key_and_value(self, x: Tensor) -> Tensor:
        """For torch.compile, and where it rounds less."""
        steady = (lambda rows: rows) if dispatch.traced() else padded
        n = x.shape[0]
        # on the weights: openai/CLIP does not call these modules either, and a hook would see them
        q = F.linear(steady(x[:, 0]), self.q_proj.weight, self.q_proj.bias)[:n, None]
        k = F.linear(x, self.k_proj.weight, self.k_proj.bias)
        v = F.linear(x, self.v_proj.weight, self.v_proj.bias)
        q, k, v = (rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for rows in (q, k, v))  # [N, heads, L, D]
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)
        return F.linear(steady(pooled), self.c_proj.weight, self.c_proj.bias)[:n]

    def _as_published(self, x: Tensor) -> Tensor:
        """By the one function that openai/CLIP calls, for who traces or replaces it: [N, L, C] -> [N, output_dim]."""
        x = x.transpose(0, 1)
        return F.multi_head_attention_forward(
            query=x,
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.num_heads,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            training=self.training,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )[0][0]


# a program's own needs no positions
_POOL = AttentionPool2d.forward


def _rounds_strictly(x: Tensor) -> bool:
    """float32 on a CPU, with PyTorch's default "highest" precision: no short cut here that rounds more.

    Two cost more in rounding than they gain in time: channels-last convolutions (1.3 times faster, 1.8 times the error)
    and the attention pool without keys and values (7 % of the work, 1.3 times the error).
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


class ModifiedResNet(nn.Module):
    """ResNet with a three-convolution stem, anti-aliased striding and attention pooling: [N, 3, H, W] -> [N, E]."""

    def __init__(
        self,
        layers: tuple[int, int, int, int],
        output_dim: int,
        heads: int,
        input_resolution: int | tuple[int, int] = 224,
        width: int = 64,
    ):
        super().__init__()
        self.output_dim = output_dim
        self.input_resolution = input_resolution
        self.conv1 = nn.Conv2d(3, width // 2, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width // 2, width // 2, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width // 2, width, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        self._inplanes = width
        self.layer1 = self._make_layer(width, layers[0])
        self.layer2 = self._make_layer(width * 2, layers[1], stride=2)
        self.layer3 = self._make_layer(width * 4, layers[2], stride=2)
        self.layer4 = self._make_layer(width * 8, layers[3], stride=2)
        height, across = pair(input_resolution)
        grid = height // 32 if height == across else (height // 32, across // 32)
        self.attnpool = _published("AttentionPool2d")(grid, width * 32, heads, output_dim)

    def _make_layer(self, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        block = _published("Bottleneck")
        layers = [block(self._inplanes, planes, stride)]
        self._inplanes = planes * block.expansion
        layers += [block(self._inplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        images, weight = x, getattr(self.conv1, "weight", None)
        if isinstance(weight, Tensor):
            check_images(x, weight)
            x = normalised(x, weight.dtype)
        if x.device.type == "cpu" and not (dispatch.traced() or torch.is_grad_enabled() or _rounds_strictly(x)):
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.conv3(x)))
        x = self.avgpool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        pool = self.attnpool
        if type(pool) is AttentionPool2d and "forward" not in vars(pool) and AttentionPool2d.forward is _POOL:
            places = x.shape[2] * x.shape[3] + 1
            check_places(images, places, pool.positional_embedding, self.input_resolution, 32)
        return self.attnpool(x)
