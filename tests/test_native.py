"""libclipfast: builds, loads, refuses in words, and embeds patches within the house rule.

The host twin runs the kernels' own code on the CPU, lane by lane and with the tensor cores emulated, so a wrong index,
pad or barrier shows here; races that the two orders of lanes do not meet, and speed, do not. Where there is a GPU the
kernels themselves run the same cases.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from clipfast.kernels import native

from . import csrc
from .accuracy import assert_accurate
from .backends import on_gpu
from .op_cases import Case, norm, patch_case

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """With machine code for one architecture, if it is not installed."""
    options = ["-DCLIPFAST_ARCHITECTURES=80", "-DCLIPFAST_CPU=OFF"]
    return csrc.built(native.LIBRARY, tmp_path_factory.mktemp("native"), "nvcc", options)


@pytest.fixture
def library(built) -> ctypes.CDLL:
    with csrc.loaded_from(native.LIBRARY, built) as loaded:
        yield loaded


def vit(dtype, pixels, shape, ln_pre=False) -> Case:
    """shape: batch, height, across, patch, width. Weights in dtype, images in pixels, the rest in float32."""
    batch, height, across, _, width = shape
    options = dict(zip(("norm_weight", "norm_bias"), norm(width), strict=True)) if ln_pre else {}
    if pixels == torch.uint8:
        options |= {"mean": torch.rand(3), "std": 0.2 + torch.rand(3)}
    images, weight, first, positions = patch_case(*shape).arguments
    if pixels == torch.uint8:
        images = torch.randint(0, 256, (batch, 3, height, across), dtype=torch.uint8)
    return Case("patch_embed", (images.to(pixels), weight.to(dtype), first, positions), options)


def run(case: Case, plan="auto", **options) -> torch.Tensor:
    names = ("mean", "std", "norm_weight", "norm_bias")
    arguments = (*case.arguments, *(case.options.get(name) for name in names), 1e-5, plan)
    if case.arguments[0].is_cuda:
        return native.patch_embed(*arguments)
    return native.patch_embed_host(*arguments, **options)


def check(case: Case, plan="auto") -> None:
    """Against float64, with lanes in both orders: code between two barriers must not care."""
    forward, back = run(case, plan), run(case, plan, reversed_order=True)
    assert torch.equal(forward, back)
    assert_accurate(forward, *case.peer(), *case.exact(), what=plan)


# batch, height, across, patch, width: ragged borders, one patch, many tiles, widths that do not fill a tile
SHAPES = [
    (3, 31, 47, 14, 768),
    (1, 28, 29, 14, 1024),
    (9, 60, 60, 14, 192),
    (2, 35, 66, 16, 768),
    (5, 80, 80, 16, 512),
    (3, 16, 31, 16, 1024),
    (1, 224, 256, 32, 192),
    (3, 64, 50, 32, 1024),
    (2, 40, 96, 32, 136),
]
CASES = [
    (dtype, pixels, plan, shape)
    for i, shape in enumerate(SHAPES)
    for plan in ("split", "split+ln", "fused")
    # each shape and plan in one weight dtype with every kind of pixels, the dtypes taking turns
    for dtype in [HALVES[(i + (plan == "fused")) % 2]]
    for pixels in (torch.uint8, torch.float32, dtype)
]


def name(value) -> str | None:
    return str(value)[6:] if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize(("dtype", "pixels", "plan", "shape"), CASES, ids=name)
def test_tensor_core_plans(library, poisoned_memory, dtype, pixels, plan, shape):
    check(vit(dtype, pixels, shape, ln_pre=plan != "split"), plan.removesuffix("+ln"))


GENERIC = [
    (torch.float32, torch.float32, (2, 224, 256, 32, 64)),
    (torch.float32, torch.uint8, (3, 31, 47, 14, 72)),
    (torch.float16, torch.uint8, (3, 22, 15, 7, 31)),
    (torch.bfloat16, torch.float32, (1, 22, 36, 7, 192)),
    (torch.float16, torch.float16, (2, 33, 32, 16, 31)),
    (torch.float32, torch.float16, (1, 35, 35, 5, 130)),
    (torch.bfloat16, torch.bfloat16, (130, 2, 1, 1, 8)),
]


@pytest.mark.parametrize("ln_pre", [False, True])
@pytest.mark.parametrize(("dtype", "pixels", "shape"), GENERIC, ids=name)
def test_generic_plan(library, poisoned_memory, dtype, pixels, shape, ln_pre):
    check(vit(dtype, pixels, shape, ln_pre), "generic")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=name)
@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(library, channels, dtype):
    case = patch_case(2, 32, 48, 16, 24)
    images, weight = torch.randn(2, channels, 32, 48), torch.randn(24, channels, 16, 16) / 16
    check(Case("patch_embed", (images.to(dtype), weight.to(dtype), *case.arguments[2:])))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=name)
@pytest.mark.parametrize("patch", [14, 16, 32])
def test_views_of_larger_images(library, poisoned_memory, patch, dtype):
    height, across = 2 * patch + 1, 3 * patch
    case = vit(dtype, torch.uint8, (2, height, across, patch, 64))
    large = torch.randint(0, 256, (4, 5, 2 * height, 2 * across), dtype=torch.uint8)
    views = [
        large[1:3, 1:4, 3 : 3 + height, 5 : 5 + across],
        large[::2, ::2, ::2, :across][:, :, :height],
        large[:2, :3, :height, ::2],
        large[:2, :3].transpose(2, 3)[:, :, :height, :across],
        large[:1, :3, :height, :across].expand(2, -1, -1, -1),
    ]
    for images in views:
        plan = "auto" if dtype == torch.float32 else "split"
        check(case._replace(arguments=(images, *case.arguments[1:])), plan)


def test_the_images_are_read_in_place_where_they_can_be():
    weight = torch.randn(8, 3, 14, 14, dtype=torch.float16)
    images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    assert native._readable(images, weight) is images
    crop = images[:, :, 3:31, 4:32]
    assert native._readable(crop, weight) is crop
    shifted = images[:, :, 3:31, 5:33]
    assert native._readable(shifted, weight).is_contiguous()
    assert native._readable(shifted, weight.float()) is shifted
    assert native._readable(images.bfloat16(), weight).dtype == torch.float16


@pytest.mark.parametrize("plan", ["generic", "split", "fused"])
def test_an_image_does_not_depend_on_its_batch(library, plan):
    case = vit(torch.float16, torch.uint8, (7, 60, 60, 14, 64), ln_pre=True)
    images = case.arguments[0]
    tokens = run(case, plan)
    for i in (0, 6):
        alone = case._replace(arguments=(images[i : i + 1], *case.arguments[1:]))
        assert torch.equal(run(alone, plan)[0], tokens[i])


@pytest.mark.parametrize("plan", ["generic", "split", "fused"])
def test_what_is_not_finite_stays_where_it_is(library, plan):
    case = vit(torch.bfloat16, torch.float32, (2, 28, 28, 14, 64), ln_pre=plan == "fused")
    case.arguments[0][1, 2, 20, 3] = float("inf")
    tokens = run(case, plan)
    assert not tokens[1, 3].isfinite().all()
    tokens[1, 3] = 0
    assert tokens.isfinite().all()
    case.arguments[0][1, 2, 20, 3] = 0
    case.arguments[1][5] = float("nan")
    assert run(case._replace(options={}), "generic" if plan == "fused" else plan)[:, 0].isfinite().all()


@pytest.mark.parametrize("plan", ["generic", "split"])
@pytest.mark.parametrize("part", ["class", "position", "last position", "last term", "last pixel", "norm bias"])
def test_every_argument_counts(library, plan, part):
    case = vit(torch.float16, torch.float16, (2, 28, 28, 14, 64), ln_pre=True)
    before = run(case, plan)
    images, weight, first, positions = case.arguments
    target = {
        "class": first[:1],
        "position": positions[0, :1],
        "last position": positions[-1, -1:],
        "last term": weight[-1, -1, -1, -1:],
        "last pixel": images[-1, -1, -1, -1:],
        "norm bias": case.options["norm_bias"][-1:],
    }[part]
    target += 3
    assert not torch.equal(run(case, plan), before)
    check(case, plan)


def test_no_images_and_no_patches(library):
    assert run(vit(torch.float16, torch.uint8, (0, 32, 32, 16, 64))).shape == (0, 5, 64)
    case = vit(torch.float16, torch.float16, (2, 13, 40, 14, 64), ln_pre=True)
    exact = case.exact()[0]
    assert exact.shape == (2, 1, 64)
    for plan in ("generic", "split", "fused"):
        # a convolution of larger patches than the image is an error in PyTorch: only the last roundings may differ
        assert_accurate(run(case, plan), exact.half(), exact, what=plan)


def test_operator(library):
    case = vit(torch.float16, torch.uint8, (1, 28, 28, 14, 16), ln_pre=True)
    options = [case.options[key] for key in ("mean", "std", "norm_weight", "norm_bias")]
    arguments = (*case.arguments, *options, 1e-5, "auto")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.clipfast.native_patch_embed.default, arguments, test_utils=tests)


# ---------------------------------------------------------------------------------------------------------------------
# What it says when it cannot


def test_a_missing_library_is_an_error_where_it_is_called(monkeypatch, tmp_path):
    monkeypatch.setattr(native.LIBRARY, "path", tmp_path / "libclipfast.so")
    monkeypatch.setattr(native.LIBRARY, "loaded", native.LIBRARY.load(native.LIBRARY.path), raising=False)
    assert "not built" in native.missing() and "CLIPFAST_CUDA=1 pip install" in native.missing()
    with pytest.raises(RuntimeError, match="not built"):
        run(vit(torch.float16, torch.uint8, (1, 16, 16, 16, 8)))


def test_other_versions_and_broken_files(built, tmp_path):
    csrc.assert_says_why_it_is_missing(native.LIBRARY, built, tmp_path, "clipfast_of_tomorrow")


def test_header_and_python_agree():
    header = (csrc.ROOT / "csrc" / "clipfast.h").read_text()
    csrc.assert_header_agrees(header, native.LIBRARY, native._PatchEmbedArgs)
    csrc.assert_codes_agree(header, "CLIPFAST_PLAN", native.PLANS)


def raw_arguments(**changes) -> native._PatchEmbedArgs:
    """Correct arguments for no images at all, but for the changes. No pointer is read."""
    pointers = ("images", "weight", "class_embedding", "positional_embedding", "mean", "std", "out")
    values = dict.fromkeys(pointers, 64) | {"struct_size": ctypes.sizeof(native._PatchEmbedArgs)}
    values |= {"batch": 0, "channels": 3, "height": 28, "width": 28, "patch": 14, "features": 64}
    values |= {"stride_batch": 2352, "stride_channel": 784, "stride_row": 28}
    values |= {"eps": 1e-5, "image_dtype": 3, "weight_dtype": 1, "plan": 0}
    return native._PatchEmbedArgs(**(values | changes))


REFUSED = [
    ({"weight": None}, "pointer is null"),
    ({"class_embedding": None}, "pointer is null"),
    ({"positional_embedding": None}, "pointer is null"),
    ({"mean": None}, "pointer is null"),
    ({"norm_weight": 64}, "pointer is null"),
    ({"batch": 1, "out": None}, "pointer is null"),
    ({"batch": 1, "images": None}, "pointer is null"),
    ({"struct_size": 8}, "another version"),
    ({"batch": -1}, "size"),
    ({"features": 0}, "size"),
    ({"patch": 0}, "size"),
    ({"height": 1 << 40, "width": 1 << 40}, "size"),
    ({"batch": 1 << 40, "features": 1 << 20, "plan": 1}, "size"),
    ({"image_dtype": 4}, "dtype"),
    ({"weight_dtype": 3}, "dtype"),
    ({"plan": 7}, "plan"),
    ({"batch": 1, "plan": 2, "weight_dtype": 0}, "plan"),
    ({"batch": 1, "plan": 2, "features": 65}, "plan"),
    ({"batch": 1, "plan": 2, "patch": 7}, "plan"),
    ({"batch": 1, "plan": 2, "image_dtype": 2}, "plan"),
    ({"batch": 1, "plan": 2, "weight": 8}, "plan"),
    ({"batch": 1, "plan": 2, "stride_row": 29}, "plan"),
    ({"batch": 1, "plan": 3}, "plan"),
    ({"batch": 1, "plan": 3, "norm_weight": 64, "norm_bias": 64, "features": 1032}, "plan"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED)
def test_refusals_have_a_text(library, changes, text):
    code = library.clipfast_patch_embed_host(raw_arguments(**changes), 0)
    assert code < 0
    with pytest.raises(RuntimeError, match=text):
        native.LIBRARY.check(code)


def test_codes_without_a_meaning(library):
    assert library.clipfast_patch_embed_host(None, 0) == -1
    assert library.clipfast_patch_embed_host(raw_arguments(), 0) == 0
    assert library.clipfast_error_text(0) == b"no error"
    assert b"unknown" in library.clipfast_error_text(-1000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu_is_an_error_in_words(library):
    code = library.clipfast_patch_embed(raw_arguments(batch=1), 0, None)
    assert code > 0
    with pytest.raises(RuntimeError, match="CUDA driver version is insufficient|no CUDA-capable device"):
        native.LIBRARY.check(code)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels themselves


@on_gpu
@pytest.mark.parametrize(("dtype", "pixels", "plan", "shape"), CASES, ids=name)
def test_tensor_core_plans_on_the_gpu(library, poisoned_memory, dtype, pixels, plan, shape):
    check_on_gpu(vit(dtype, pixels, shape, ln_pre=plan != "split"), plan.removesuffix("+ln"))


@on_gpu
@pytest.mark.parametrize("ln_pre", [False, True])
@pytest.mark.parametrize(("dtype", "pixels", "shape"), GENERIC, ids=name)
def test_generic_plan_on_the_gpu(library, poisoned_memory, dtype, pixels, shape, ln_pre):
    check_on_gpu(vit(dtype, pixels, shape, ln_pre), "generic")


def check_on_gpu(case: Case, plan: str) -> None:
    """Against float64 and the host twin; then strided images on another stream, twice the same."""
    got, exact, twin = run(case.on("cuda"), plan), *case.exact(), run(case, plan)
    assert_accurate(got, *case.peer(), exact, what=plan)
    # the same products in another order of terms within each of the tensor cores' steps
    assert_accurate(got.cpu(), twin, exact, what=f"{plan}, beside the host twin")
    images = case.arguments[0]
    batch, _, height, across = images.shape
    large = torch.zeros(batch, 4, height + 2, across + 64, dtype=images.dtype, device="cuda")
    view = large[:, 1:, 2:, 32 : 32 + across]
    view.copy_(images)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        there = case.on("cuda")
        again = run(there._replace(arguments=(view, *there.arguments[1:])), plan)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(again, got)


@on_gpu
def test_a_batch_past_two_billion_pixels_on_the_gpu(library):
    case = vit(torch.float16, torch.uint8, (2, 224, 224, 14, 64)).on("cuda")
    images = torch.zeros(14300, 3, 224, 224, dtype=torch.uint8, device="cuda")
    images[-2:] = case.arguments[0]
    many = case._replace(arguments=(images, *case.arguments[1:]))
    assert torch.equal(run(many, "split")[-2:], run(case, "split"))
