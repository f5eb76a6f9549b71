"""Wrong inputs: each error names the argument, what was wanted and what came."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import clipfast

from . import tiny_clips
from .clips import RESNET, VIT, make_images, make_pair, make_texts

TOWERS = {"vit": VIT, "resnet": RESNET}
TEXTS = make_texts(VIT, 4)


@pytest.fixture(scope="module", params=TOWERS.values(), ids=TOWERS)
def ours(request):
    return make_pair(request.param)[1]


@pytest.fixture
def images(ours):
    return make_images((0, ours.visual.input_resolution), 4)


@pytest.fixture(params=[True, False], ids=["grad", "no_grad"], autouse=True)
def _grad(request):
    with torch.set_grad_enabled(request.param):
        yield


# ---- images ----


@pytest.mark.parametrize("call", [lambda m, x: m.encode_image(x), lambda m, x: m(x, TEXTS)], ids=["encode", "forward"])
def test_wrong_images(ours, images, call):
    size = images.shape[-1]
    cases = [
        (images[:, :2], ValueError, r"images must be \[B, 3, H, W\], got \[4, 2, "),
        (images[0], ValueError, rf"images must be \[B, 3, H, W\], got \[3, {size}, {size}\]"),
        (images.permute(0, 2, 3, 1), ValueError, rf"\[B, 3, H, W\], got \[4, {size}, {size}, 3\]"),
        (images[None], ValueError, r"got \[1, 4, 3, "),
        ((images * 100).long(), TypeError, "floating .* or uint8 .* got torch.int64"),
        ((images * 100).int(), TypeError, "got torch.int32"),
        (images > 0, TypeError, "got torch.bool"),
        (images.to(torch.complex64), TypeError, "got torch.complex64"),
        ([images[0]], TypeError, "image must be a tensor .* got list"),
        (images.numpy(), TypeError, "image must be a tensor .* got ndarray"),
        (None, TypeError, "got NoneType"),
        (images.to("meta"), RuntimeError, "images? (is|are) on meta but the model is on cpu"),
        (images[:, :, :-32], ValueError, rf"{size - 32} x {size}|{size // 32 - 1} x {size // 32}"),
        (torch.cat([images] * 2, dim=3), ValueError, rf"{size} x {2 * size}|{size // 32} x {2 * size // 32}"),
        (images[:, :, :1, :1], (ValueError, RuntimeError), "1 x 1|smaller|small|size"),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            call(ours, wrong)


def test_nan_pixels_are_named(ours, images):
    images[[1, 3], 0, 5, 7] = float("nan")
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"2 of 4 images hold NaN pixels: image\[1\]"):
            ours.encode_image(images)
        with pytest.raises(ValueError, match=r"1 of 2 images hold NaN pixels: image\[1\]"):
            ours(images[2:], TEXTS)
    if torch.is_grad_enabled():
        # a training step is not interrupted; the NaN goes to its own rows and to no other
        features = ours.encode_image(images)
        assert features.isnan().any(dim=1).tolist() == [False, True, False, True]


def test_nan_and_infinite_results_of_clean_pixels_are_no_error(ours, images):
    """Weights may be broken, and pixels infinite: the user sees NaN, as with openai-clip."""
    images[2, 1] = float("inf")
    features = ours.encode_image(images)
    assert features[2].isnan().any() and features[[0, 1, 3]].isfinite().all()


# ---- texts ----


@pytest.mark.parametrize(
    "call", [lambda m, x: m.encode_text(x), lambda m, x: m(make_images((0, m.visual.input_resolution), 2), x)]
)
def test_wrong_texts(ours, call):
    def with_id(value, row=2, column=5):
        texts = TEXTS.clone()
        texts[row, column] = value
        return texts

    cases = [
        (with_id(60), ValueError, r"text\[2, 5\] is 60, outside the vocabulary of 60"),
        (with_id(49407, 0, 0), ValueError, r"text\[0, 0\] is 49407"),
        (with_id(-1, 3, 11), ValueError, r"text\[3, 11\] is -1, outside the vocabulary"),
        (TEXTS.float(), TypeError, "text must be a tensor of token ids .* got torch.float32"),
        (TEXTS > 3, TypeError, "got torch.bool"),
        (TEXTS[0], ValueError, r"text must be \[B, 1 to 12\] token ids, got \[12\]"),
        (TEXTS[None], ValueError, r"got \[1, 4, 12\]"),
        (TEXTS[:, :0], ValueError, r"got \[4, 0\]"),
        (torch.cat([TEXTS, TEXTS], dim=1), ValueError, r"text must be \[B, 1 to 12\] token ids, got \[4, 24\]"),
        (["a photo of a cat"], TypeError, "text must be a tensor of token ids .* got list"),
        ("a photo of a cat", TypeError, "got str"),
        (TEXTS.numpy(), TypeError, "got ndarray"),
        (TEXTS.to("meta"), RuntimeError, "text is on meta but the model is on cpu"),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            call(ours, wrong)


def test_wrong_texts_with_a_hook_that_looks_inside(ours):
    """The other way through the tower checks as well."""
    handle = ours.transformer.resblocks[0].register_forward_hook(lambda *_: None)
    try:
        for wrong, error in (
            (TEXTS + 60, (ValueError, IndexError)),
            (TEXTS.float(), TypeError),
            (TEXTS[0], ValueError),
        ):
            with pytest.raises(error):
                ours.encode_text(wrong)
    finally:
        handle.remove()


# ---- models ----


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="width 96 .* 5 heads"):
        clipfast.CLIP(64, 32, 1, 96, 8, 12, 60, 128, 2, 1, vision_heads=5)
    with pytest.raises(ValueError, match="width 100 .* 3 heads"):
        clipfast.CLIP(64, 32, 1, 128, 8, 12, 60, 100, 3, 1)
    with pytest.raises(ValueError, match="0 heads"):
        clipfast.CLIP(64, 32, 1, 128, 8, 12, 60, 128, 0, 1)
    with pytest.raises(ValueError, match="activation must be one of quick_gelu, gelu, got 'relu'"):
        clipfast.CLIP(*VIT, activation="relu")


def test_state_dicts_that_are_not_whole(ours):
    state = ours.state_dict()
    with pytest.raises(ValueError, match="activation must be one of .* got 'swish'"):
        clipfast.build_model(state, activation="swish")
    missing = {k: v for k, v in state.items() if k != "transformer.resblocks.1.attn.in_proj_bias"}
    with pytest.raises(RuntimeError, match=r"transformer.resblocks.1.attn.in_proj_bias"):
        clipfast.build_model(missing)
    with pytest.raises(RuntimeError, match=r"visual.surprise"):
        clipfast.build_model({**state, "visual.surprise": torch.ones(1)})
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    with pytest.raises(RuntimeError, match=r"size mismatch for transformer.resblocks.0.mlp.c_fc.weight"):
        clipfast.build_model({**state, name: state[name][:-1]})
    for name in ("visual.conv1.weight", "text_projection", "positional_embedding", "ln_final.weight"):
        without = {k: v for k, v in state.items() if k != name}
        with pytest.raises((KeyError, ValueError, RuntimeError), match=name):
            clipfast.build_model(without)
    with pytest.raises((KeyError, ValueError, RuntimeError)):
        clipfast.build_model({})


def test_a_grid_that_is_no_square_must_be_named():
    rectangular = clipfast.CLIP(64, (32, 48), *VIT[2:])
    with pytest.raises(ValueError, match=r"24 patches are no square: give image_resolution=\(height, width\)"):
        clipfast.build_model(rectangular.state_dict())
    built = clipfast.build_model(rectangular.state_dict(), image_resolution=(32, 48))
    assert built.encode_image(torch.zeros(1, 3, 32, 48)).shape == (1, 64)


def test_heads_that_do_not_fit_a_state_dict(ours):
    with pytest.raises(ValueError, match="width 128 .* 3 heads"):
        clipfast.build_model(ours.state_dict(), transformer_heads=3)


def test_a_mask_on_another_device_or_of_another_shape_is_not_silently_ignored(ours):
    """openai-clip's attention raises, or casts; it never drops a mask."""
    broken = make_pair(VIT)[1]
    for mask in (torch.zeros(5, 5), torch.full((5, 5), float("-inf")).triu_(1)):
        for block in broken.transformer.resblocks:
            block.attn_mask = mask
        with pytest.raises((RuntimeError, ValueError)):
            broken.encode_text(TEXTS)


def test_a_model_with_a_part_taken_away_fails_by_name():
    broken = make_pair(VIT)[1]
    broken.visual.transformer = nn.Identity()
    assert broken.encode_image(make_images(VIT, 2)).shape == (2, 64)
    del broken.text_projection
    with pytest.raises(AttributeError, match="text_projection"):
        broken.encode_text(TEXTS)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(("config", "size", "wanted"), [(tiny_clips.VIT, 64, 32), (tiny_clips.RESNET, 96, 64)])
def test_images_of_another_size_are_told_the_right_one(config, size, wanted, hooked):
    model = tiny_clips.randomise(clipfast.CLIP(*config))
    if hooked:
        inside = model.visual.ln_post if config is tiny_clips.VIT else model.visual.attnpool
        inside.register_forward_hook(lambda *_: None)
    text = rf"images are {size} x {size}, but the model wants {wanted} x {wanted} \(model.visual.input_resolution; "
    with pytest.raises(ValueError, match=text), torch.no_grad():
        model.encode_image(torch.randn(2, 3, size, size))
    # as for larger images: positions interpolated from outside, the resolution left as it was
    owner = model.visual if config is tiny_clips.VIT else model.visual.attnpool
    count = (size // (16 if config is tiny_clips.VIT else 32)) ** 2 + 1
    owner.positional_embedding = torch.nn.Parameter(torch.randn(count, owner.positional_embedding.shape[1]))
    with torch.no_grad():
        assert model.encode_image(torch.randn(2, 3, size, size)).shape == (2, 32)
    with pytest.raises(ValueError, match=f"wants what gives {count - 1} places"), torch.no_grad():
        model.encode_image(torch.randn(2, 3, wanted, wanted))
