"""The nine architectures beside openai-clip and transformers: the same tree, and errors no greater than the peer's.

The exact results are those of clipfast.reference in float64; the rule for every tensor is that of tests/accuracy.py.
"""

from __future__ import annotations

import copy
import functools
import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import clipfast
from clipfast import dispatch, ops, reference, tuning
from clipfast.blocks import Projection
from clipfast.checkpoints import to_huggingface
from clipfast.model import Transformer
from clipfast.packing import Rows

from . import peers
from .accuracy import assert_accurate, assert_embeddings
from .clips import (
    PUBLISHED,
    RESNET,
    VIT,
    assert_same,
    convert,
    exact_features,
    make_images,
    make_pair,
    make_texts,
    make_trio,
    randomise,
    weighted,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case(NamedTuple):
    config: tuple
    peer: nn.Module
    ours: clipfast.CLIP
    images: Tensor
    texts: Tensor
    exact: tuple[Tensor, Tensor]


def _config(name: str) -> tuple:
    """Arguments of one architecture; a ResNet for 64 pixels, unless CLIPFAST_FULL=1 asks for its real size.

    Its convolutions and its pool are the same ones; a float64 convolution, and one in bfloat16 where that is emulated,
    takes a tenth to a fiftieth of the time.
    """
    config = PUBLISHED[name]
    return config if name.startswith("ViT") or os.environ.get("CLIPFAST_FULL") else (config[0], 64, *config[2:])


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request) -> Case:
    config = _config(request.param)
    peer, ours = make_pair(config)
    # one image of the two greatest ResNets, whose convolutions are slow
    images = make_images(config, 1 if config[3] in (96, 128) else 2)
    texts = make_texts(config, 6)
    return Case(config, peer, ours, images, texts, exact_features(peer.state_dict(), images, texts))


def _tree(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, type(module).__name__) for name, module in model.named_modules()]


def _tensors(model: nn.Module) -> list[tuple]:
    """In order: optimisers keep their state by the order of the parameters."""
    parameters = [(name, x.shape, x.dtype, x.requires_grad) for name, x in model.named_parameters()]
    return parameters + [(name, x.shape, x.dtype) for name, x in model.state_dict().items()]


def test_same_modules_parameters_and_attributes(published):
    _, peer, ours, *_ = published
    assert _tree(ours) == _tree(peer)
    assert _tensors(ours) == _tensors(peer)
    for name, tensor in peer.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    for path in ("visual.input_resolution", "visual.output_dim", "context_length", "vocab_size", "dtype"):
        values = []
        for value in (ours, peer):
            for name in path.split("."):
                value = getattr(value, name)
            values.append(value)
        assert values[0] == values[1], path
    assert not ours.training and all(p.requires_grad for p in ours.parameters())


def test_convert_weights_casts_what_openai_clip_casts(published):
    peer, ours = copy.deepcopy(published.peer), copy.deepcopy(published.ours)
    peers.openai_clip().model.convert_weights(peer)
    clipfast.convert_weights(ours)
    assert _tensors(ours) == _tensors(peer)
    assert ours.dtype == torch.float16
    # a half-precision checkpoint makes a model of the same mixed dtypes, and keeps every number
    again = clipfast.build_model(peer.state_dict())
    assert _tensors(again) == _tensors(peer)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in peer.state_dict().items())
    clipfast.convert_weights(ours, torch.bfloat16)
    as_bfloat16 = [torch.bfloat16 if x.dtype == torch.float16 else x.dtype for x in peer.parameters()]
    assert [x.dtype for x in ours.parameters()] == as_bfloat16


def test_a_resnet_at_its_real_size():
    """Of 224 pixels: a grid of 7 x 7 for the pool."""
    peer, ours = make_pair(PUBLISHED["RN50"])
    images = make_images(PUBLISHED["RN50"], 1)
    with torch.no_grad():
        exact = reference.encode_image(peer.state_dict(), images)
        assert_accurate(ours.encode_image(images), peer.encode_image(images), exact)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_embeddings_and_logits(published, dtype):
    """Without gradients, where the fastest backends run."""
    _, peer, ours, images, texts, exact = published
    if dtype != torch.float32:
        peer, ours = convert(copy.deepcopy(peer), dtype), copy.deepcopy(ours)
        clipfast.convert_weights(ours, dtype)
    with torch.no_grad():
        results = [[m.encode_image(images), m.encode_text(texts), *m(images, texts)] for m in (ours, peer)]
    exact = [*exact, *reference.logits(*exact, peer.logit_scale.double())]
    for name, a, b, c in zip(("images", "texts", "logits per image", "logits per text"), *results, exact, strict=True):
        assert_accurate(a, b, c.detach(), what=name)
    for name, got, wanted in zip(("images", "texts"), results[0], exact, strict=False):
        assert_embeddings(got, wanted, dtype, what=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_gradients(name):
    """Of every parameter and pixel, for random gradients of both embeddings; float32 and bfloat16.

    In bfloat16 the image tower of one ResNet: the others differ in width, and what is not PyTorch's own is the pool.
    Of the smaller ResNets the errors of three batches count together, as the greatest error of 32 channels alone is
    mostly luck.
    """
    config = _config(name)
    if name.startswith("RN"):
        images = make_images(config, 6 if config[3] < 96 else 2)
        batches = [*images.split(2)]
    else:
        images = make_images(config, 1 if config[1] == 336 else 2)
        batches = [images]
    peer, ours = make_pair(config, smooth_at=images)
    texts = make_texts(config, 4)
    weights = _exact_leaves(peer)
    towers = {
        "encode_image": (batches, [n for n in weights if n.startswith("visual.")]),
        "encode_text": ([texts], [n for n in weights if not n.startswith("visual.") and n != "logit_scale"]),
    }
    exact = {
        tower: _gradients(functools.partial(getattr(reference, tower), weights), weights, *arguments)
        for tower, arguments in towers.items()
    }
    for dtype in DTYPES.values():
        if dtype != torch.float32:
            convert(peer, dtype)
            clipfast.convert_weights(ours, dtype)
            if name.startswith("RN") and name != "RN50" and not os.environ.get("CLIPFAST_FULL"):
                del towers["encode_image"]
        for tower, arguments in towers.items():
            a, b = (_gradients(getattr(m, tower), dict(m.named_parameters()), *arguments) for m in (ours, peer))
            for key, gradient in exact[tower].items():
                # a prime step meets every row and column; a million numbers more would show nothing more
                step = 31 if gradient.numel() > 2**20 else 1
                assert_accurate(*(x.flatten()[::step] for x in (a[key], b[key], gradient)), what=f"{tower}: {key}")


def _exact_leaves(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in float64, its parameters wanting gradients."""
    return {n: x.detach().double().requires_grad_(x.requires_grad) for n, x in model.state_dict(keep_vars=True).items()}


def _gradients(encode, leaves: dict[str, Tensor], batches: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    """The embedding of each batch, and the gradients of the pixels and of the named leaves, the batches stacked."""
    leaves = {n: leaves[n] for n in names if n in leaves and leaves[n].requires_grad}
    results = []
    for seed, batch in enumerate(batches):
        pixels = {}
        if batch.is_floating_point():
            batch = batch.to(next(iter(leaves.values())).dtype).requires_grad_()
            pixels = {"pixels": batch}
        embedding = encode(batch)
        generator = torch.Generator().manual_seed(seed)
        upstream = torch.randn(embedding.shape, generator=generator).bfloat16().to(embedding.dtype)
        wanted = pixels | leaves
        gradients = torch.autograd.grad(embedding, wanted.values(), upstream)
        gradients = {f"gradient of {n}": x for n, x in zip(wanted, gradients, strict=True)}
        results.append({"embedding": embedding.detach()} | gradients)
    return {key: torch.stack([result[key] for result in results]) for key in results[0]}


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_through_the_logits(config, dtype):
    """The loss of CLIP's training, on the whole model. Three models' errors count together: their tensors are small."""
    collected = []
    for seed in range(3):
        images, texts = make_images(config, 8, seed), make_texts(config, 8, seed)
        peer, ours = make_pair(config, seed, smooth_at=images)
        weights = _exact_leaves(peer)
        exact = _logit_gradients(lambda *x, weights=weights: reference.forward(weights, *x), weights, images, texts)
        if dtype != torch.float32:
            convert(peer, dtype)
            clipfast.convert_weights(ours, dtype)
        results = [_logit_gradients(m, dict(m.named_parameters()), images, texts) for m in (ours, peer)]
        collected.append([*results, exact])
    for name in collected[0][0]:
        ours, peer, exact = (torch.stack([results[i][name] for results in collected]) for i in range(3))
        assert_accurate(ours, peer, exact, what=f"gradient of {name}")


def _logit_gradients(function, leaves: dict[str, Tensor], images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    leaves = {n: x for n, x in leaves.items() if x.requires_grad}
    both = function(images, texts)
    generator = torch.Generator().manual_seed(7)
    upstream = [(torch.randn(x.shape, generator=generator) / 8).bfloat16().to(x.dtype) for x in both]
    gradients = torch.autograd.grad(both, leaves.values(), upstream, retain_graph=True)
    # the error of one number may be zero by chance: of logit_scale, the gradient through each row of the logits
    rows = [
        torch.autograd.grad(row @ gradient, leaves["logit_scale"], retain_graph=True)[0]
        for logits, wanted in zip(both, upstream, strict=True)
        for row, gradient in zip(logits, wanted, strict=True)
    ]
    return dict(zip(leaves, gradients, strict=True)) | {"logit_scale": torch.stack(rows)}


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_in_half_precision(bias):
    """`model.bfloat16()` casts its weights too, at which openai/CLIP raises: statistics stay float32 here."""
    norm = randomise(clipfast.model.LayerNorm(64, bias=bias)).bfloat16()
    x = torch.randn(200, 64).bfloat16()
    exact = reference.layer_norm(
        x.double(), norm.weight.double(), norm.bias.double() if bias else torch.zeros(64).double()
    )
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert_accurate(norm(x), nn.LayerNorm.forward(norm, x), exact.detach())


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_float64_gradients_are_exact(config, activation):
    """Where no rounding hides a wrong term: logits and every gradient to 1e-9 of the tensor's size."""
    peer, _ = make_pair(config)
    ours = clipfast.build_model(peer.state_dict(), activation=activation).double()
    weights = _exact_leaves(peer)
    images, texts = make_images(config, 3).double(), make_texts(config, 5)
    exact = reference.forward(weights, images, texts, activation=activation)
    got = ours(images, texts)
    upstream = [torch.randn_like(x) for x in exact]
    leaves = {n: x for n, x in weights.items() if x.requires_grad}
    exact += torch.autograd.grad(exact, leaves.values(), upstream)
    got += torch.autograd.grad(got, ours.parameters(), upstream)
    assert [n for n, _ in ours.named_parameters()] == list(leaves)
    for name, a, b in zip(["per image", "per text", *leaves], got, exact, strict=True):
        assert a.dtype == torch.float64
        size = b.detach().abs().max().item()
        # a key bias's gradient is zero, and both are rounding
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * max(size, 1e-3), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("rows", [1, 7, 40, 10_000])
def test_a_large_batch_goes_through_the_blocks_in_parts(monkeypatch, rows):
    """In float64 a row that meets another sample's, or comes out in another's place, is no rounding."""
    peer, ours = make_pair(VIT)
    ours.double()
    images, texts = make_images(VIT, 5).double(), make_texts(VIT, 9)
    exact = exact_features(peer.state_dict(), images, texts)
    seen = []
    monkeypatch.setattr(tuning, "rows_at_a_time", lambda *of: rows)
    whole = Transformer._pooled_at_once
    monkeypatch.setattr(Transformer, "_pooled_at_once", lambda self, x, *of: seen.append(len(x)) or whole(self, x, *of))
    with torch.no_grad():
        for name, x, wanted in (("image", images, exact[0]), ("text", texts, exact[1])):
            torch.testing.assert_close(getattr(ours, f"encode_{name}")(x), wanted, rtol=1e-10, atol=1e-10)
    of_two = torch.tensor([0, 4]), False
    total = 5 * len(ours.visual.positional_embedding) + int((texts.argmax(dim=-1) + 1).sum())
    assert sum(seen) == total and (len(seen) == 2) == (rows == 10_000)
    seen.clear()
    assert ours.encode_text(texts).requires_grad and len(seen) == 1, "gradients keep everything anyway"
    with torch.no_grad(), FlopCounterMode(display=False):
        ours.visual.transformer.pooled(torch.randn(8, ours.visual.transformer.width).double(), Rows((4, 4)), *of_two)
    assert len(seen) == 2, "and who looks at each operator sees them once"


@pytest.mark.parametrize("causal", [False, True])
def test_pooled_rows_are_those_of_all_blocks(causal):
    """The last row of each sequence, where it shows whether the blocks were causal; with a projection and without."""
    transformer = make_pair(VIT)[1].transformer
    width, rows, index = transformer.width, Rows((5, 3)), torch.tensor([4, 7])
    x = torch.randn(8, width)
    projection = Projection(torch.rand(width), torch.randn(width), torch.randn(width, 24), 0.1)
    blocks = [block.for_ops() for block in transformer.resblocks]
    with torch.no_grad():
        for some in (None, projection):
            expected = ops.blocks(x, rows, blocks, causal=causal, index=index, projection=some)
            assert torch.equal(transformer.pooled(x, rows, index, causal, some), expected)
        other = transformer.pooled(x, rows, index, not causal, projection)
    assert expected.shape == (2, 24) and not torch.equal(other, expected)


def test_how_many_rows_go_through_the_blocks_together():
    def rows(device, dtype, width=1024, laid_out=True):
        return tuning.rows_at_a_time(torch.device(device), width, dtype, laid_out)

    assert rows("cpu", torch.bfloat16) == rows("cpu", torch.float16) == 4096
    assert rows("cpu", torch.bfloat16, 512) == 8192
    assert rows("cpu", torch.float32) is None and rows("cpu", torch.float32, laid_out=False) == 2048
    for laid_out in (True, False):
        assert rows("cuda", torch.bfloat16, laid_out=laid_out) is None
        assert rows("cpu", torch.float64, laid_out=laid_out) is None


@pytest.mark.parametrize("missing", [None, "not built"])
def test_whoever_multiplies_decides_whether_float32_goes_in_parts(monkeypatch, missing, cpu_library):
    seen = []
    monkeypatch.setattr(tuning, "rows_at_a_time", lambda device, width, dtype, laid_out: seen.append(laid_out))
    monkeypatch.setattr(tuning, "onednn_is_better", lambda *of: None)
    monkeypatch.setattr(dispatch.cpu_library, "missing", lambda: missing)
    dispatch._usual_backend.cache_clear()
    with torch.no_grad():
        make_pair(VIT)[1].encode_text(make_texts(VIT, 2))
    dispatch._usual_backend.cache_clear()
    assert seen == [missing is not None]


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_float16(config):
    """Small: openai-clip's float16 convolutions are slow on a CPU."""
    peer, ours = make_pair(config)
    images, texts = make_images(config, 8), make_texts(config, 8)
    exact = exact_features(peer.state_dict(), images, texts)
    peers.openai_clip().model.convert_weights(peer)
    clipfast.convert_weights(ours)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for name, wanted, x in zip(("encode_image", "encode_text"), exact, (images, texts), strict=True):
                assert_accurate(getattr(ours, name)(x), getattr(peer, name)(x), wanted, what=name)


def test_training_mode_of_the_resnet():
    """Batch statistics in the forward pass, the same running ones after it, and the gradient through them."""
    images = make_images(RESNET, 6)
    trio = make_trio(RESNET)

    def run(m):
        tower = m.train().visual
        x = tower(images.to(m.dtype))
        return {"embeddings": x} | {n: b for n, b in tower.named_buffers() if b.is_floating_point()}

    assert_same(trio, run)
    assert trio[0].visual.bn1.num_batches_tracked == trio[1].visual.bn1.num_batches_tracked == 1
    # in float64: a ReLU near its kink would make the error of a float32 gradient a matter of chance
    ours, exact = (
        torch.autograd.grad(weighted(m.train().visual(images.double())), [*m.visual.parameters()])
        for m in (trio[0].double(), trio[2])
    )
    for name, a, b in zip((n for n, _ in trio[2].visual.named_parameters()), ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * max(b.abs().max().item(), 1e-3), msg=name)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_transformers_with_converted_weights(dtype):
    """CLIPModel at the width of ViT-B/32 and a real grid; it pools at the EOS id, which is the greatest."""
    transformers = peers.transformers_clip()
    config = (512, 224, 2, 768, 32, 77, 520, 512, 8, 2)
    ours = randomise(clipfast.CLIP(*config))
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 2}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 2}
    peer = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**text, "vocab_size": 520, "max_position_embeddings": 77, "eos_token_id": 519},
            vision_config={**vision, "image_size": 224, "patch_size": 32},
            projection_dim=512,
        )
    ).eval()
    peer.load_state_dict(to_huggingface(ours.state_dict()))
    images, texts = make_images(config, 4), make_texts(config, 6)
    exact = exact_features(ours.state_dict(), images, texts)
    ours, peer = ours.to(dtype), peer.to(dtype)
    with torch.no_grad():
        theirs = [peer.get_image_features(pixel_values=images.to(dtype)), peer.get_text_features(input_ids=texts)]
        theirs = [getattr(x, "pooler_output", x) for x in theirs]
        got = [ours.encode_image(images), ours.encode_text(texts)]
    for name, a, b, c in zip(("images", "texts"), got, theirs, exact, strict=True):
        assert_accurate(a, b, c, what=name)
