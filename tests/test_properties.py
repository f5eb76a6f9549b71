"""What embeddings may and may not depend on: padding, neighbours in the batch, layout and size of the images."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import clipfast
from clipfast import reference

from . import peers
from .accuracy import assert_accurate
from .clips import (
    RESNET,
    VIT,
    assert_same,
    encode,
    make_exact,
    make_images,
    make_pair,
    make_texts,
    make_trio,
    randomise,
)

TOWERS = {"vit": VIT, "resnet": RESNET}
CONTEXT, VOCABULARY = VIT[5], VIT[6]
EOT = VOCABULARY - 1
IMAGES, TEXTS = make_images(VIT, 8), make_texts(VIT, 8)


@pytest.fixture(scope="module")
def trio():
    return make_trio(VIT)


@pytest.fixture(scope="module")
def double():
    return make_pair(VIT)[1].double()


# ---- text ----


@pytest.mark.parametrize("grad", [True, False])
def test_ids_after_the_end_change_nothing(trio, grad):
    ends = TEXTS.argmax(dim=1)
    after = torch.arange(CONTEXT) > ends[:, None]
    noise = torch.randint(0, EOT, TEXTS.shape)
    with torch.set_grad_enabled(grad):
        wanted = trio[0].encode_text(TEXTS)
        for ids in (noise, 0 * noise, torch.full_like(noise, EOT)):
            texts = torch.where(after, ids, TEXTS)
            assert torch.equal(trio[0].encode_text(texts), wanted)
            assert_same(trio, encode(None, texts))


def test_columns_after_the_longest_text_change_nothing(trio):
    texts = TEXTS[TEXTS.argmax(dim=1) < CONTEXT - 1]
    longest = int(texts.argmax(dim=1).max()) + 1
    with torch.no_grad():
        wanted = trio[0].encode_text(texts)
        for width in range(longest, CONTEXT + 1):
            assert torch.equal(trio[0].encode_text(texts[:, :width]), wanted)
        # and one by one, as short as each is
        for text, embedding in zip(texts, wanted, strict=True):
            end = int(text.argmax()) + 1
            torch.testing.assert_close(trio[0].encode_text(text[None, :end])[0], embedding, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_short_texts_under_a_hook_that_looks_inside(trio, dtype):
    """The other way through the tower cuts the mask and the positions."""
    texts = make_texts((*VIT[:5], 7, VOCABULARY), 8)
    with torch.no_grad():
        wanted = trio[0].encode_text(texts)
        handle = trio[0].transformer.resblocks[1].ln_1.register_forward_hook(lambda *_: None)
        got = trio[0].encode_text(texts.to(dtype))
        handle.remove()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_end_is_the_first_of_the_greatest_ids(trio):
    """openai/CLIP's argmax, whatever the ids: no EOT at all, several, in the first and the last place, all equal."""
    texts = torch.randint(1, 50, (10, CONTEXT))
    texts[0, 3] = 55
    texts[1, [2, 7]] = EOT
    texts[2, -1] = EOT
    texts[3, 0] = EOT
    texts[4] = 0
    texts[5] = EOT
    texts[6] = torch.arange(CONTEXT)
    texts[7] = torch.arange(CONTEXT).flip(0)
    texts[8:] = texts[1]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same(trio, encode(None, texts))


@given(data=st.data(), batch=st.integers(1, 9))
@settings(max_examples=30)
def test_any_texts_give_the_exact_embeddings(double, data, batch):
    ids = st.lists(st.integers(0, EOT), min_size=CONTEXT, max_size=CONTEXT)
    texts = torch.tensor(data.draw(st.lists(ids, min_size=batch, max_size=batch)))
    with torch.no_grad():
        got = double.encode_text(texts)
        torch.testing.assert_close(got, reference.encode_text(double.state_dict(), texts), rtol=1e-10, atol=1e-10)
        order = torch.randperm(batch)
        torch.testing.assert_close(double.encode_text(texts[order]), got[order], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_ids_of_every_integer_type(trio, dtype):
    """tokenize gives int32."""
    with torch.no_grad():
        assert torch.equal(trio[0].encode_text(TEXTS.to(dtype)), trio[0].encode_text(TEXTS))
        columns = TEXTS.to(dtype).t().contiguous().t()
        assert torch.equal(trio[0].encode_text(columns), trio[0].encode_text(TEXTS))


# ---- batches ----


@pytest.mark.parametrize("grad", [True, False])
def test_a_sample_alone_or_in_any_batch(trio, grad):
    """In batches of one, two, five and 64, in another order, beside copies of itself."""
    texts = make_texts(VIT, 64)
    images = torch.cat([IMAGES] * 8)
    order = torch.randperm(8)
    with torch.set_grad_enabled(grad):
        for size in (1, 2, 5):
            assert_same(trio, lambda m, n=size: torch.cat([m.encode_text(x) for x in TEXTS.split(n)]), what="texts")
            assert_same(trio, lambda m, n=size: torch.cat([m.encode_image(x) for x in IMAGES.split(n)]), what="images")
        assert_same(trio, encode(images, texts), what="64")
        assert_same(trio, encode(IMAGES[order], TEXTS[order]), what="in another order")
        assert_same(trio, encode(IMAGES[[3, 3, 3, 1]], TEXTS[[2, 2, 0, 2, 1]]), what="copies")


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("grad", [True, False])
def test_empty_batches(config, dtype, grad):
    ours = make_pair(config)[1].to(dtype)
    images = make_images(config, 2).to(dtype)
    with torch.set_grad_enabled(grad):
        assert ours.encode_image(images[:0]).shape == (0, 64)
        assert ours.encode_image(images[:0]).dtype == dtype
        assert ours.encode_image(torch.zeros_like(images[:0], dtype=torch.uint8)).shape == (0, 64)
        assert ours.encode_text(TEXTS[:0]).shape == (0, 64)
        assert [x.shape for x in ours(images[:0], TEXTS)] == [(0, 8), (8, 0)]
        assert [x.shape for x in ours(images, TEXTS[:0])] == [(2, 0), (0, 2)]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_resnet_pools_few_images_as_exactly_as_four(batch):
    """The sums of MKL's float32 product of one to three rows round more."""
    pool = randomise(clipfast.model.AttentionPool2d(2, 2048, 32, 1024))
    x = torch.randn(4, 2048, 2, 2)
    with torch.no_grad():
        exact = copy.deepcopy(pool).double()(x.double())
        few, four = ((pool(x[:n]) - exact[:n]).square().mean().sqrt() for n in (batch, 4))
    assert few < 1.15 * four


# ---- images ----


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
@pytest.mark.parametrize("grad", [True, False])
def test_layouts_and_types_of_images(config, grad):
    trio = make_trio(config)
    images = make_images(config, 6)
    layouts = {
        "channels last": images.contiguous(memory_format=torch.channels_last),
        "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
        "batch last": images.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "every second": torch.stack([images, -images], dim=1).flatten(0, 1)[::2],
        "a window": nn.functional.pad(images, (3, 5, 2, 1))[:, :, 2:-1, 3:-5],
        "expanded": images[:1].expand(6, -1, -1, -1),
        "float64": images.double(),
        "bfloat16": images.bfloat16(),
    }
    with torch.set_grad_enabled(grad):
        for name, view in layouts.items():
            assert_same(trio, lambda m, x=view: m.encode_image(x), what=name)


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
@pytest.mark.parametrize("grad", [True, False])
def test_uint8_images_are_normalised_on_the_way(config, grad):
    """Exact: (pixel / 255 - mean) / std in float64. The peer: the same steps in float32, then openai-clip."""
    peer, ours = make_pair(config)
    pixels = torch.randint(0, 256, (8, 3, config[1], config[1]), dtype=torch.uint8)
    mean, std = (torch.tensor(x)[:, None, None] for x in (reference.MEAN, reference.STD))
    exact = reference.encode_image(peer.state_dict(), pixels).detach()
    with torch.set_grad_enabled(grad):
        theirs = peer.encode_image((pixels.float() / 255 - mean) / std)
        for view in (pixels, pixels.contiguous(memory_format=torch.channels_last)):
            assert_accurate(ours.encode_image(view), theirs, exact)
        # the long way normalises too
        handle = ours.visual.conv1.register_forward_hook(lambda *_: None)
        assert_accurate(ours.encode_image(pixels), theirs, exact)
        handle.remove()


def test_a_rectangular_vision_transformer():
    """224 x 256 in patches of 32 are 7 x 8; the peer is given the positions, as its constructor knows squares only."""
    config = (64, 224, 2, 192, 32, CONTEXT, VOCABULARY, 128, 2, 1)
    ours = randomise(clipfast.CLIP(64, (224, 256), *config[2:]))
    assert ours.visual.positional_embedding.shape == (57, 192)
    peer = peers.openai_clip().model.CLIP(*config).eval()
    peer.visual.positional_embedding = nn.Parameter(torch.zeros(57, 192))
    peer.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 224, 256)
    again = clipfast.build_model(ours.state_dict(), image_resolution=(224, 256))
    assert again.visual.input_resolution == (224, 256)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same([ours, peer, make_exact(peer)], encode(images, None))
            assert_same([again, peer, make_exact(peer)], encode(images, None))


def test_a_rectangular_resnet():
    ours = randomise(clipfast.CLIP(64, (64, 96), *RESNET[2:]))
    peer = peers.openai_clip().model.CLIP(*RESNET).eval()
    peer.visual.attnpool.positional_embedding = nn.Parameter(torch.zeros(7, 1024))
    peer.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert_same([ours, peer, make_exact(peer)], encode(torch.randn(4, 3, 64, 96), None))


@pytest.mark.parametrize(
    ("config", "size"),
    [(VIT, (39, 35)), (VIT, (16, 64)), (VIT, (128, 8)), (RESNET, (63, 66)), (RESNET, (70, 93)), (RESNET, (32, 128))],
)
def test_images_of_odd_sizes_give_what_they_give_on_openai_clip(config, size):
    """Whatever number of patches fits; pixels beyond the last whole patch are not read."""
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same(make_trio(config), encode(torch.randn(8, 3, *size), None))


@pytest.mark.parametrize(
    ("width", "heads", "text_heads"), [(96, 3, 4), (80, 5, 1), (96, 2, 2), (128, 1, 8), (64, 64, 2)]
)
def test_heads_that_are_not_64_wide(width, heads, text_heads):
    """openai-clip has no such argument; its attention takes the number."""
    config = (64, 32, 2, width, 8, CONTEXT, VOCABULARY, 128, 2, 2)

    def edit(m, library):
        for tower, n in ((m.visual.transformer, heads), (m.transformer, text_heads)):
            for block in tower.resblocks:
                block.attn.num_heads, block.attn.head_dim = n, block.attn.embed_dim // n

    ours, peer, exact = make_trio(config, edit)
    built = clipfast.build_model(peer.state_dict(), vision_heads=heads, transformer_heads=text_heads)
    named = clipfast.CLIP(*config[:8], text_heads, 2, vision_heads=heads).eval()
    named.load_state_dict(peer.state_dict())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for model in (ours, built, named):
                assert_same([model, peer, exact], encode(IMAGES, TEXTS))
    wanted = reference.encode_image(peer.state_dict(), IMAGES, heads=heads).detach()
    assert_accurate(named.encode_image(IMAGES), peer.encode_image(IMAGES), wanted)


def test_heads_of_a_resnet():
    def edit(m, _):
        m.visual.attnpool.num_heads = 4

    trio = make_trio(RESNET, edit)
    built = clipfast.build_model(trio[1].state_dict(), vision_heads=4)
    with torch.no_grad():
        assert_same([built, *trio[1:]], encode(make_images(RESNET, 4), None))


def test_pixels_get_gradients_from_a_frozen_model():
    """Saliency maps and adversarial examples."""
    for config in TOWERS.values():
        images = make_images(config, 4)
        trio = make_trio(config)
        if config is RESNET:
            trio = [trio[0].double(), trio[1].double(), trio[2]]  # no chance at the kinks of the ReLUs

        def run(m, images=images):
            m.requires_grad_(False)
            pixels = images.clone().to(m.dtype).requires_grad_()
            return torch.autograd.grad(m.encode_image(pixels)[:, :3].sum(), pixels)

        if config is VIT:
            assert_same(trio, run)
        else:
            torch.testing.assert_close(run(trio[0]), run(trio[2]), rtol=0, atol=1e-10)
