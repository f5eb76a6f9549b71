"""Whole towers on the GPU kernels: every architecture at its real width, one full block and one pooled."""

from __future__ import annotations

import os

import pytest
import torch

import clipfast
from clipfast import reference

from .. import peers
from ..accuracy import assert_accurate, assert_embeddings
from ..clips import (
    PUBLISHED,
    VIT,
    assert_same_gradients,
    convert,
    make_images,
    make_pair,
    make_texts,
    weighted,
)

VITS = [name for name in PUBLISHED if name.startswith("ViT")]
RESNETS = [name for name in PUBLISHED if name.startswith("RN")]


def _two_blocks(name: str) -> tuple:
    """Of both towers: what repeats is cut, the rest is the published size."""
    config = list(PUBLISHED[name])
    config[2] = 2 if name in VITS else config[2]
    return (*config[:-1], 2)


def _check(peer, ours, dtype, device, images=None, texts=None):
    """Ours, run on the kernels alone, is as near to float64 as openai-clip in the same dtype."""
    given = {name: x for name, x in (("encode_image", images), ("encode_text", texts)) if x is not None}
    with torch.no_grad():
        exact = {name: getattr(reference, name)(peer.state_dict(), x) for name, x in given.items()}
    if dtype != torch.float32:
        clipfast.convert_weights(ours, dtype)
        convert(peer, dtype)
    ours.to(device), peer.to(device)
    for name, x in given.items():
        with torch.no_grad():
            with clipfast.backend("triton"):
                got = getattr(ours, name)(x.to(device))
            assert_accurate(got, getattr(peer, name)(x.to(device)), exact[name], what=name)
        assert_embeddings(got, exact[name], dtype, what=name)


@pytest.mark.parametrize("name", VITS)
def test_both_towers_of_a_vision_transformer(name, device):
    config = _two_blocks(name)
    texts = make_texts(config, 3)
    if device == "cpu" and not os.environ.get("CLIPFAST_FULL"):
        if name == "ViT-L/14@336px":
            pytest.skip("577 rows of 1024 take the interpreter minutes: CLIPFAST_FULL=1")
        if name == "ViT-B/16":  # 145 rows are more than a tile of attention holds; the text tower is ViT-B/32's
            config, texts = (config[0], 192, *config[2:]), None
        if name == "ViT-L/14":  # 50 rows; captions of one token and of two
            config, texts = (config[0], 98, *config[2:]), texts[1:]
    _check(*make_pair(config), torch.bfloat16, device, make_images(config, 1), texts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_in_other_dtypes(dtype, device):
    if dtype == torch.float16 and device == "cpu":
        # openai-clip's float16 takes minutes on a CPU
        pytest.skip("float16 through a whole openai-clip needs a GPU")
    config = _two_blocks("ViT-B/32")
    _check(*make_pair(config), dtype, device, make_images(config, 1), make_texts(config, 3)[1:])


@pytest.mark.parametrize("name", ["RN50x4", "RN50x64"])
def test_the_text_tower_of_a_resnet(name, device):
    """640 and 1024 wide; 512 and 768 are above, and 1024 is the width of an image tower there."""
    if name == "RN50x64" and device == "cpu" and not os.environ.get("CLIPFAST_FULL"):
        pytest.skip("weights of 1024 x 4096 take the interpreter half a minute: CLIPFAST_FULL=1")
    config = _two_blocks(name)
    peer, ours = make_pair((config[0], 64, (1, 1, 1, 1), 8, None, *config[5:]))
    images = make_images((0, 64), 1)
    _check(peer, ours, torch.bfloat16, device, images, make_texts(config, 3)[1:])


def test_the_attention_pool_of_a_resnet(device):
    """At the size of RN50: 50 positions of 2048 channels, 32 heads."""
    torch.manual_seed(0)
    ours = clipfast.model.AttentionPool2d(7, 2048, 32, 1024).to(device, torch.bfloat16).eval()
    theirs = peers.openai_clip().model.AttentionPool2d(7, 2048, 32, 1024).to(torch.bfloat16).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2048, 7, 7).bfloat16()
    with torch.no_grad():
        with clipfast.backend("triton"):
            got = ours(x.to(device))
        assert {row[0] for row in clipfast.explain() if row[3].backend == "triton"} >= {"attention_pool", "linear"}
        assert_accurate(got, theirs(x), theirs.double()(x.double()))


def test_gradients_of_both_towers(device):
    """Of every parameter, a ragged batch of texts and the pooled last block included."""

    def run(model):
        if not isinstance(model, clipfast.CLIP):
            logits = model(images, texts)
        else:
            model.to(device)
            with clipfast.backend("triton" if model.dtype != torch.float64 else "torch"):
                logits = model(images.to(device), texts.to(device))
        weighted(*logits).backward()
        return {name: p.grad.cpu() for name, p in model.named_parameters() if p.ndim}

    images, texts = make_images(VIT, 4), make_texts(VIT, 8)
    assert_same_gradients(VIT, run)
    ran = {row[0] for row in clipfast.explain() if row[1].grad and row[3].backend == "triton"}
    assert ran >= {"layer_norm", "linear", "mlp", "attention", "patch_embed", "project"}
