"""The Triton patch embedding: every configuration, patch size, pixel type and ragged border."""

from __future__ import annotations

import pytest
import torch

from clipfast import tuning
from clipfast.kernels import patch_embed as module

from ..accuracy import assert_accurate
from ..op_cases import Case, norm, patch_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(case: Case, dtype, device):
    images, weight, first, positions = case.arguments
    pixels = images if images.dtype == torch.uint8 else images.to(dtype)
    case = case._replace(arguments=(pixels, weight.to(dtype), first, positions))
    on_device = case.on(device)
    options = {"mean": None, "std": None, "norm_weight": None, "norm_bias": None, "eps": 1e-5} | on_device.options
    got = module.patch_embed(*on_device.arguments, *options.values())
    assert_accurate(got, *on_device.peer(), *case.exact(), what=str(options.keys()))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("batch", "height", "across", "patch", "width"),
    [
        (1, 28, 42, 14, 40),
        (9, 28, 28, 14, 24),
        (2, 70, 47, 14, 130),
        (2, 33, 63, 16, 48),
        (1, 64, 96, 32, 24),
        (5, 126, 126, 14, 24),  # more rows than a few, which have tiles of their own
        (0, 32, 32, 16, 8),
    ],
)
def test_against_float64(batch, height, across, patch, width, dtype, device, poisoned_memory):
    check(patch_case(batch, height, across, patch, width), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_uint8_pixels_and_the_norm(dtype, device, poisoned_memory):
    images = torch.randint(0, 256, (2, 3, 30, 43), dtype=torch.uint8)
    options = {"mean": torch.rand(3), "std": 0.2 + torch.rand(3)}
    options |= dict(zip(("norm_weight", "norm_bias"), norm(48), strict=True))
    case = patch_case(2, 30, 43, 14, 48, **options)
    check(case._replace(arguments=(images, *case.arguments[1:])), dtype, device)


def test_images_cut_out_of_larger_ones(device):
    case = patch_case(2, 32, 48, 16, 24)
    large = torch.randn(2, 5, 40, 60)
    for view in (large[:, 1:4, 5:37, 7:55], large[:, :3, :32, ::1][..., 2:50], large.transpose(2, 3)[:, :3, :32, :]):
        view = view[..., :48] if view.shape[-1] >= 48 else torch.cat([view, view], dim=-1)[..., :48]
        check(case._replace(arguments=(view, *case.arguments[1:])), torch.float32, device)


def test_every_number_of_rows_has_a_configuration():
    for rows in (1, 16, 17, 400, 401, 12800):
        for dtype in DTYPES:
            for patch in (14, 16, 32):
                config = tuning.patch_embed(rows, 768, patch, dtype, 90)
                assert config.block_k % (1 << (patch - 1).bit_length()) == 0 or config.block_k < patch


def test_registered(device):
    images, weight, first, positions = patch_case(2, 32, 32, 16, 24).on(device).arguments
    arguments = (images, weight, first, positions, None, None, False)
    torch.library.opcheck(torch.ops.clipfast.patch_embed.default, arguments)
    mean = torch.rand(3, device=device)
    pixels = torch.randint(0, 256, images.shape, dtype=torch.uint8, device=device)
    torch.library.opcheck(
        torch.ops.clipfast.patch_embed.default, (pixels, weight, first, positions, mean, mean + 0.1, False)
    )
