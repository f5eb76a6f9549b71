"""Patches of images on a CPU: within the house rule in every form that this CPU can run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipfast.kernels import cpu_linear, cpu_patch_embed

from . import csrc
from .accuracy import assert_accurate
from .op_cases import Case, norm, patch_case

pytestmark = pytest.mark.usefixtures("cpu_library")
DTYPES = [torch.float32, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
by_pixels = pytest.mark.parametrize("of_bytes", [False, True], ids=["floats", "bytes"])
OPTIONS = {"mean": None, "std": None, "norm_weight": None, "norm_bias": None, "eps": 1e-5}


def run(case: Case, form: str = "best") -> Tensor:
    return cpu_patch_embed.patch_embed(*case.arguments, *(OPTIONS | case.options).values(), form)


def make(dtype: torch.dtype, of_bytes: bool, *shape: int, channels: int = 3, affine: bool = True) -> Case:
    """shape: images, height, width, patch, columns. All but images and weight is float32, as CLIP has it."""
    case = patch_case(*shape)
    images, weight, *embedding = case.arguments
    images, weight = (tensor[:, :1].repeat(1, channels, 1, 1) for tensor in (images, weight))
    weight = torch.randn_like(weight) * weight[0].numel() ** -0.5
    # an eps that no other is taken for
    options = dict(zip(("norm_weight", "norm_bias"), norm(shape[-1]), strict=True)) | {"eps": 0.1} if affine else {}
    if of_bytes:
        images = torch.randint(256, images.shape, dtype=torch.uint8)
        options |= {"mean": torch.rand(channels), "std": 0.2 + torch.rand(channels)}
    return Case("patch_embed", (images if of_bytes else images.to(dtype), weight.to(dtype), *embedding), options)


# CLIP's own; several parts of several images, and of one; pixels that are left out
CASES = [
    ((2, 224, 224, 32, 768), {}),
    ((1, 224, 224, 14, 1024), {}),
    ((9, 112, 128, 8, 64), {}),
    ((2, 280, 272, 8, 16), {}),
    ((3, 70, 50, 14, 93), {"affine": False}),
    ((2, 9, 8, 4, 1), {"channels": 5}),
    ((5, 8, 8, 8, 7), {"channels": 1, "affine": False}),
]


@by_dtype
@by_pixels
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_shapes(form, shape, options, of_bytes, dtype):
    torch.manual_seed(0)
    case = make(dtype, of_bytes, *shape, **options)
    before = [x.clone() for x in case.tensors()]
    assert_accurate(run(case, form), *case.peer(), *case.exact())
    assert all(torch.equal(x, y) for x, y in zip(before, case.tensors(), strict=True))


@by_dtype
@by_pixels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_image_does_not_depend_on_the_others(form, threads, of_bytes, dtype):
    """To the bit, on any threads, in whatever part of the batch it comes."""
    case = make(dtype, of_bytes, 21, 64, 80, 8, 40)
    images, *others = case.arguments
    with csrc.threads(threads):
        together = run(case, form)
    for i in range(len(images)):
        assert torch.equal(run(Case("patch_embed", (images[i : i + 1], *others), case.options), form)[0], together[i])


@by_dtype
@by_pixels
def test_how_tensors_lie_in_memory(form, of_bytes, dtype):
    """Strided, with channels last, views of other signs, of other dtypes."""
    case = make(dtype, of_bytes, 3, 24, 16, 8, 40)
    expected = run(case, form)
    images, weight, first, positions = case.arguments
    images, weight = (x.to(memory_format=torch.channels_last) for x in (images, weight))
    other = Case(
        "patch_embed", (images, weight, torch.stack([first, first], 1)[:, 0], positions.double()), case.options
    )
    assert torch.equal(run(other, form), expected)
    options = {name: x.double() if isinstance(x, Tensor) else x for name, x in case.options.items()}
    negative = [torch._neg_view(-x) if x.is_floating_point() else x for x in case.arguments]
    assert torch.equal(run(Case("patch_embed", (*negative,), options), form), expected)


@by_dtype
def test_a_byte_is_the_number_that_preprocess_gives(form, dtype):
    """All 256, in each channel: an embedding by ones shows them."""
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 1, 1)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    weight, nothing = torch.eye(3, dtype=dtype).view(3, 3, 1, 1), torch.zeros(3)
    case = Case("patch_embed", (images, weight, nothing, torch.zeros(2, 3)), {"mean": mean, "std": std})
    expected = ((images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).to(dtype)
    assert torch.equal(run(case, form)[:, 1], expected.view(256, 3))


@by_dtype
def test_products_are_those_of_the_same_form(form, dtype):
    """To the bit, with nothing added."""
    images, weight, *_ = make(dtype, False, 3, 28, 42, 14, 40).arguments
    nothing = torch.zeros(40), torch.zeros(7, 40)
    got = run(Case("patch_embed", (images, weight, *nothing), {}), form)[:, 1:]
    pixels = torch.nn.functional.unfold(images.float(), 14, stride=14).mT.reshape(18, -1).to(dtype)
    expected = cpu_linear.linear(pixels, weight.flatten(1), None, None, None, form)
    assert torch.equal(got.reshape(18, 40), expected)


@by_dtype
def test_no_images_and_images_without_a_patch(form, dtype):
    case = make(dtype, False, 0, 16, 16, 8, 40)
    assert run(case, form).shape == (0, 5, 40)
    small = make(dtype, False, 2, 7, 16, 8, 40, affine=False)
    token = small.arguments[2].to(dtype).float() + small.arguments[3][0].to(dtype).float()
    assert torch.equal(run(small, form), token.to(dtype).expand(2, 1, 40))
