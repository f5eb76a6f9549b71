"""clipfast.reference in float64 equals openai/CLIP and torch's own functions to rounding, gradients too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipfast import reference
from tests.accuracy import assert_embeddings
from tests.peers import openai_clip

FEW = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**31)
LENGTHS = st.lists(st.integers(0, 7), min_size=0, max_size=4)
CONTEXT, VOCABULARY = 12, 50


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _assert_equal(ours: Tensor, peer: Tensor, what: str = "result", *, rtol: float = 1e-12) -> None:
    """Equal to rtol of the greatest element, or of 0.01 where all are mere rounding (a K bias's gradient)."""
    assert ours.shape == peer.shape, f"{what}: {list(ours.shape)}, peer {list(peer.shape)}"
    assert ours.dtype == peer.dtype == torch.float64, f"{what}: {ours.dtype}, peer {peer.dtype}"
    if ours.numel():
        error, size = (ours - peer).abs().max().item(), peer.abs().max().item()
        assert error <= rtol * max(size, 0.01), f"{what}: error {error:.3g} at size {size:.3g}"


def _assert_same_function(ours: Callable, peer: Callable, tensors: Sequence[Tensor | None]) -> None:
    """Equal outputs and, for a random upstream gradient, equal gradients of every tensor."""
    results = []
    for function in (ours, peer):
        inputs = [None if t is None else t.clone().requires_grad_() for t in tensors]
        output = function(*inputs)
        leaves = [t for t in inputs if t is not None]
        gradients = torch.autograd.grad(output, leaves, _random(*output.shape, seed=99))
        results.append([output.detach(), *gradients])
    for i, (got, expected) in enumerate(zip(*results, strict=True)):
        _assert_equal(got, expected, f"gradient of tensor {i - 1}" if i else "output")


@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 17), (0, 8), (5, 3)])
@pytest.mark.parametrize("mean", [0, 1000])
def test_layer_norm(shape, mean):
    width = shape[-1]
    tensors = [3 * _random(*shape) + mean, 1 + _random(width, seed=1), _random(width, seed=2)]
    _assert_same_function(
        lambda x, w, b: reference.layer_norm(x, w, b, 1e-3),
        lambda x, w, b: F.layer_norm(x, (width,), w, b, 1e-3),
        tensors,
    )
    _assert_equal(reference.layer_norm(*tensors), F.layer_norm(tensors[0], (width,), *tensors[1:], 1e-5))


ACTIVATIONS = {None: lambda x: x, "gelu": F.gelu, "quick_gelu": lambda x: F.silu(1.702 * x) / 1.702}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (0,)])
def test_linear(activation, has_bias, has_residual, rows):
    tensors = [
        _random(*rows, 13),
        _random(7, 13, seed=1),
        _random(7, seed=2) if has_bias else None,
        _random(*rows, 7, seed=3) if has_residual else None,
    ]

    def peer(x, w, b, r):
        y = ACTIVATIONS[activation](F.linear(x, w, b))
        return y if r is None else y + r

    _assert_same_function(
        lambda x, w, b, r: reference.linear(x, w, b, activation=activation, residual=r), peer, tensors
    )


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_mlp(activation):
    shapes = [(5, 16), (16,), (16,), (40, 16), (40,), (16, 40), (16,)]
    tensors = [_random(*shape, seed=i) for i, shape in enumerate(shapes)]

    def peer(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        y = F.layer_norm(x, (16,), norm_weight, norm_bias, 1e-5)
        y = ACTIVATIONS[activation](F.linear(y, fc1_weight, fc1_bias))
        return x + F.linear(y, fc2_weight, fc2_bias)

    _assert_same_function(lambda *t: reference.mlp(*t, activation=activation), peer, tensors)
    _assert_equal(reference.mlp(*tensors), reference.mlp(*tensors, activation="quick_gelu"))


@pytest.mark.parametrize("lengths", [[5], [1], [3, 7, 1], [0, 4, 0, 0, 2, 0], [0], [], [50]])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention(lengths, causal, scale):
    offsets = _offsets(lengths)

    def peer(qkv):
        rows = [
            F.scaled_dot_product_attention(*part.permute(1, 2, 0, 3), is_causal=causal, scale=scale)
            for part in qkv.split(lengths)
            if len(part)
        ]
        rows = [part.transpose(0, 1).flatten(1) for part in rows]
        return torch.cat(rows) if rows else qkv[:, 0].flatten(1)

    qkv = _random(sum(lengths), 3, 2, 8, scale=2)
    _assert_same_function(lambda x: reference.attention(x, offsets, causal=causal, scale=scale), peer, [qkv])
    as_list = reference.attention(qkv, offsets.tolist(), causal=causal, scale=scale)
    assert torch.equal(as_list, reference.attention(qkv, offsets, causal=causal, scale=scale))


def test_attention_of_large_logits_is_a_choice():
    """exp overflows above 709; the differences are what counts."""
    qkv = torch.zeros(2, 3, 1, 4, dtype=torch.float64)
    qkv[:, 0, 0, 0], qkv[1, 1, 0, 0] = 1e4, 1.0
    qkv[:, 2, 0, 0] = torch.tensor([3.0, 5.0])
    _assert_equal(reference.attention(qkv, [0, 2], causal=False)[:, 0], torch.tensor([5.0, 5.0]).double())
    _assert_equal(reference.attention(qkv, [0, 2], causal=True)[:, 0], torch.tensor([3.0, 5.0]).double())


@pytest.mark.parametrize("lengths", [[5], [3, 1, 7], [0, 4, 0], []])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_pool(lengths, has_bias, heads):
    channels, width = 10, 12
    offsets = _offsets(lengths)
    shapes = [(len(lengths), channels), (sum(lengths), channels), *[(width, channels), (width,)] * 3]
    tensors = [_random(*s, seed=i) if has_bias or len(s) > 1 else None for i, s in enumerate(shapes)]

    def peer(query, tokens, *projections):
        q, k, v = (
            F.linear(x, *projections[2 * i : 2 * i + 2]).unflatten(1, (heads, -1)).transpose(0, 1)
            for i, x in enumerate((query, tokens, tokens))
        )  # [H, B or T, D]
        rows = [q[:, :0] + k[:, :0] + v[:, :0]]
        for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
            if start < stop:
                rows.append(F.scaled_dot_product_attention(q[:, i : i + 1], k[:, start:stop], v[:, start:stop]))
            else:
                rows.append(torch.zeros_like(q[:, i : i + 1]))
        return torch.cat(rows, dim=1).transpose(0, 1).flatten(1)

    def ours(query, tokens, *projections):
        return reference.attention_pool(query, tokens, offsets, *projections, heads=heads)

    _assert_same_function(ours, peer, tensors)


def _conv_embed(images, weight, class_embedding, positional_embedding):
    x = F.conv2d(images, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([class_embedding.expand(len(x), 1, -1), x], dim=1) + positional_embedding


@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 4),
    patch=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    extra=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    seed=SEEDS,
)
@FEW
def test_patch_embed_is_the_strided_convolution(batch, channels, patch, grid, extra, seed):
    height, width = (n * patch + min(more, patch - 1) for n, more in zip(grid, extra, strict=True))
    shapes = [(batch, channels, height, width), (6, channels, patch, patch), (6,), (1 + grid[0] * grid[1], 6)]
    tensors = [_random(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    _assert_same_function(reference.patch_embed, _conv_embed, tensors)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_patch_embed_of_uint8(as_tensor):
    images = torch.randint(0, 256, (2, 3, 9, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weights = [_random(6, 3, 4, 4, seed=1), _random(6, seed=2), _random(5, 6, seed=3)]
    mean, std = [0.1, 0.5, 0.7], [0.2, 0.3, 0.9]
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (mean, std)] if as_tensor else [mean, std]
    got = reference.patch_embed(images, *weights, mean=numbers[0], std=numbers[1])
    normalised = [(images[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)]
    _assert_equal(got, _conv_embed(torch.stack(normalised, dim=1), *weights))
    # floating images are normalised already
    floating = images.double()
    got = reference.patch_embed(floating, *weights, mean=numbers[0], std=numbers[1])
    _assert_equal(got, _conv_embed(floating, *weights))


def test_float32_parameters_beside_float16_data():
    """As in openai/CLIP on a GPU: the result has the dtype of the data, or of the convolution."""
    x, norm, projection = (
        _random(3, 8).half(),
        [_random(8, seed=i).float() for i in (1, 2)],
        _random(8, 5).half(),
    )
    assert reference.layer_norm(x, *norm).dtype == torch.float16
    assert reference.project(x, *norm, projection).dtype == torch.float16
    embeddings = [_random(6, 3, 4, 4).half(), _random(6).float(), _random(5, 6).float()]
    assert reference.patch_embed(_random(2, 3, 8, 8), *embeddings).dtype == torch.float16
    features = [_random(n, 5).half() for n in (2, 3)]
    assert reference.logits(*features, torch.tensor(2.6))[0].dtype == torch.float16


def test_project_and_logits():
    tensors = [_random(5, 16), _random(16, seed=1), _random(16, seed=2), _random(16, 9, seed=3)]
    _assert_same_function(
        reference.project, lambda x, w, b, p: F.linear(F.layer_norm(x, (16,), w, b, 1e-5), p.t()), tensors
    )
    tensors = [_random(5, 9), _random(4, 9, seed=1), torch.tensor(2.6, dtype=torch.float64)]
    for side in (0, 1):

        def peer(image, text, scale, side=side):
            per_image = F.normalize(image, dim=1) @ F.normalize(text, dim=1).t() * scale.exp()
            return per_image.t() if side else per_image

        _assert_same_function(lambda *t, side=side: reference.logits(*t)[side], peer, tensors)
    _assert_equal(reference.logits(tensors[0], tensors[1], 2.6)[0], reference.logits(*tensors)[0])


@given(lengths=LENGTHS, seed=SEEDS, data=st.data())
@FEW
def test_a_later_row_changes_no_earlier_causal_row(lengths, seed, data):
    offsets = _offsets(lengths)
    n_rows = sum(lengths)
    qkv = _random(n_rows, 3, 2, 4, seed=seed)
    before = reference.attention(qkv, offsets, causal=True)
    cut = data.draw(st.integers(0, n_rows))
    qkv[cut:] = _random(n_rows - cut, 3, 2, 4, seed=seed + 1, scale=10)
    _assert_equal(reference.attention(qkv, offsets, causal=True)[:cut], before[:cut])


@given(lengths=LENGTHS, seed=SEEDS, causal=st.booleans())
@FEW
def test_packed_sequences_are_the_sequences_alone(lengths, seed, causal):
    qkv = _random(sum(lengths), 3, 2, 4, seed=seed)
    packed = reference.attention(qkv, _offsets(lengths), causal=causal)
    alone = [reference.attention(x, [0, n], causal=causal) for x, n in zip(qkv.split(lengths), lengths, strict=True)]
    _assert_equal(packed, torch.cat([qkv[:0, 0].flatten(1), *alone]))


@given(lengths=LENGTHS, seed=SEEDS)
@FEW
def test_the_order_of_keys_and_values_changes_nothing(lengths, seed):
    offsets = _offsets(lengths)
    generator = torch.Generator().manual_seed(seed)
    order = [start + torch.randperm(n, generator=generator) for start, n in zip(offsets, lengths, strict=False)]
    order = torch.cat([torch.arange(0), *order])
    qkv = _random(sum(lengths), 3, 2, 4, seed=seed)
    shuffled = torch.cat([qkv[:, :1], qkv[order, 1:]], dim=1)
    _assert_equal(reference.attention(shuffled, offsets, causal=False), reference.attention(qkv, offsets, causal=False))
    query, tokens = _random(len(lengths), 6, seed=seed), _random(sum(lengths), 6, seed=seed + 1)
    projections = [_random(8, 6, seed=seed + 2), None] * 3
    _assert_equal(
        reference.attention_pool(query, tokens[order], offsets, *projections, heads=2),
        reference.attention_pool(query, tokens, offsets, *projections, heads=2),
    )


@given(seed=SEEDS, width=st.integers(2, 40), shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
@FEW
def test_layer_norm_ignores_shift_and_scale(seed, width, shift, scale):
    x, weight, bias = (_random(*shape, seed=seed + i) for i, shape in enumerate([(3, width), (width,), (width,)]))
    x = x + torch.arange(width)  # far from a variance of zero
    expected = reference.layer_norm(x, weight, bias, 0.0)
    _assert_equal(reference.layer_norm(scale * (x + shift), weight, bias, 0.0), expected, rtol=1e-10)


@given(n_images=st.integers(0, 5), n_texts=st.integers(0, 5), seed=SEEDS)
@FEW
def test_swapping_the_towers_transposes_the_logits(n_images, n_texts, seed):
    images, texts = _random(n_images, 6, seed=seed), _random(n_texts, 6, seed=seed + 1)
    per_image, per_text = reference.logits(images, texts, 1.5)
    assert torch.equal(per_image.t(), per_text)
    swapped = reference.logits(texts, images, 1.5)
    _assert_equal(swapped[0], per_text)
    _assert_equal(swapped[1], per_image)


@pytest.fixture
def clip_model(monkeypatch):
    """openai/CLIP's `clip.model`, its LayerNorm in the dtype of its input and not in float32."""
    module = openai_clip().model
    monkeypatch.setattr(module.LayerNorm, "forward", nn.LayerNorm.forward)
    return module


def _peer(clip_model, tower: str, *, text_heads: int = 2) -> nn.Module:
    """A small float64 model, every parameter and statistic random: activations of order one, no zero bias."""
    if tower == "vit":
        vision = {"image_resolution": 32, "vision_layers": 2, "vision_width": 128, "vision_patch_size": 8}
    else:
        vision = {
            "image_resolution": 64,
            "vision_layers": (2, 1, 2, 1),
            "vision_width": 4,
            "vision_patch_size": None,
        }
    model = clip_model.CLIP(
        24,
        **vision,
        context_length=CONTEXT,
        vocab_size=VOCABULARY,
        transformer_width=128,
        transformer_heads=text_heads,
        transformer_layers=2,
    )
    model.double().eval()
    with torch.no_grad():
        for i, (name, tensor) in enumerate(model.state_dict().items()):
            if not tensor.is_floating_point() or name == "logit_scale":
                continue
            noise = _random(*tensor.shape, seed=i)
            if "running_var" in name:
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim > 1:
                is_table = "embedding" in name
                tensor.copy_(noise * (1.0 if is_table else tensor[0].numel() ** -0.5))
            else:
                tensor.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model


def _texts() -> Tensor:
    """Random ids with the EOT, the greatest id, in the first, last and other columns; ids after it too."""
    texts = torch.randint(0, VOCABULARY - 1, (5, CONTEXT), generator=torch.Generator().manual_seed(5))
    texts[range(5), [0, CONTEXT - 1, 4, 7, 1]] = VOCABULARY - 1
    return texts


def _leaves(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict whose parameters want gradients."""
    parameters = dict(model.named_parameters())
    return {
        name: tensor.detach().clone().requires_grad_(name in parameters) for name, tensor in model.state_dict().items()
    }


def _assert_same_model(model: nn.Module, images: Tensor, texts: Tensor, rtol: float = 1e-12, **options) -> None:
    """Both embeddings, both logits and, for random upstream gradients, that of every parameter and pixel."""
    state_dict = _leaves(model)
    heads = options.pop("text_heads", None)
    ours_images, peer_images = images.clone().requires_grad_(), images.clone().requires_grad_()
    ours = [
        reference.encode_image(state_dict, ours_images, **options),
        reference.encode_text(state_dict, texts, heads=heads, **options),
        *reference.forward(state_dict, ours_images, texts, text_heads=heads, **options),
    ]
    peer = [model.encode_image(peer_images), model.encode_text(texts), *model(peer_images, texts)]
    names = ["image embeddings", "text embeddings", "logits per image", "logits per text"]
    for got, expected, name in zip(ours, peer, names, strict=True):
        _assert_equal(got, expected, name, rtol=rtol)

    upstream = [_random(*output.shape, seed=i) for i, output in enumerate(peer)]
    parameters = dict(model.named_parameters())
    ours_leaves = [ours_images, *(state_dict[name] for name in parameters)]
    ours_gradients = torch.autograd.grad(ours, ours_leaves, upstream)
    peer_gradients = torch.autograd.grad(peer, [peer_images, *parameters.values()], upstream)
    for name, got, expected in zip(["images", *parameters], ours_gradients, peer_gradients, strict=True):
        _assert_equal(got, expected, f"gradient of {name}", rtol=10 * rtol)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_model_and_every_gradient_equal_openai_clip(clip_model, tower):
    model = _peer(clip_model, tower)
    size = model.visual.input_resolution
    _assert_same_model(model, _random(2, 3, size, size), _texts())


@pytest.mark.parametrize(
    ("tower", "shape"),
    [
        ("vit", (16, 64)),
        ("vit", (39, 35)),
        ("resnet", (32, 128)),
        ("resnet", (70, 93)),
        ("resnet", (139, 40)),
    ],
)
def test_images_of_other_shapes_equal_openai_clip(clip_model, tower, shape):
    model = _peer(clip_model, tower)
    images = _random(2, 3, *shape)
    with torch.no_grad():
        _assert_equal(reference.encode_image(model.state_dict(), images), model.encode_image(images))


def test_gelu_and_other_heads_equal_openai_clip(clip_model):
    model = _peer(clip_model, "vit", text_heads=4)
    for tower in (model.transformer, model.visual.transformer):
        for block in tower.resblocks:
            block.mlp.gelu = nn.GELU()
    images = _random(2, 3, 32, 32)
    _assert_same_model(model, images, _texts(), activation="gelu", text_heads=4)
    # the same function with the wrong number of heads is another one
    default = reference.encode_text(model.state_dict(), _texts(), activation="gelu")
    assert (default - model.encode_text(_texts())).abs().max() > 0.01
    state_dict = model.state_dict()
    for heads in (1, 4):
        for block in model.visual.transformer.resblocks:
            block.attn.num_heads, block.attn.head_dim = heads, 128 // heads
        got = reference.encode_image(state_dict, images, activation="gelu", heads=heads)
        _assert_equal(got, model.encode_image(images))


def test_heads_of_the_attention_pool(clip_model):
    model = _peer(clip_model, "resnet")
    images = _random(1, 3, 64, 64)
    for heads in (1, 8):
        model.visual.attnpool.num_heads = heads
        _assert_equal(reference.encode_image(model.state_dict(), images, heads=heads), model.encode_image(images))


def test_a_tower_narrower_than_a_head_has_one(clip_model):
    tower = clip_model.VisionTransformer(16, 8, 32, 1, heads=1, output_dim=5).double().eval()
    images = _random(3, 3, 16, 16)
    state_dict = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    _assert_equal(reference.encode_image(state_dict, images), tower(images))


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_uint8_images_are_normalised_with_the_numbers_of_clip(clip_model, tower):
    model = _peer(clip_model, tower)
    size = model.visual.input_resolution
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
    expected = model.encode_image((images.double() / 255 - mean) / std)
    _assert_equal(reference.encode_image(model.state_dict(), images), expected)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_mixed_half_weights_are_exact_in_float64_and_get_gradients(clip_model, tower):
    """The weights openai/CLIP serves on a GPU: some float16, some float32."""
    model = _peer(clip_model, tower).float()
    clip_model.convert_weights(model)
    state_dict = _leaves(model)
    assert {tensor.dtype for tensor in state_dict.values()} >= {torch.float16, torch.float32}
    before = {name: tensor.detach().clone() for name, tensor in state_dict.items()}
    size = model.visual.input_resolution
    images, texts = _random(2, 3, size, size), _texts()
    per_image, _ = reference.forward(state_dict, images, texts)
    # float16 images and int32 ids are what the fast path gets
    assert reference.forward(state_dict, images.half(), texts.int())[0].dtype == torch.float64
    _assert_equal(per_image, model.double()(images, texts)[0])
    per_image.sum().backward()
    for name, tensor in state_dict.items():
        assert torch.equal(tensor, before[name])
        if tensor.requires_grad:
            assert tensor.grad.dtype == tensor.dtype and tensor.grad.isfinite().all(), name


@pytest.mark.parametrize("tower", ["vit", "resnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes(clip_model, tower, dtype):
    state_dict = _peer(clip_model, tower).state_dict()
    size = 32 if tower == "vit" else 64
    images, texts = _random(2, 3, size, size), _texts()
    for name, ours, exact in (
        ("image", *(reference.encode_image(state_dict, images, dtype=d) for d in (dtype, torch.float64))),
        ("text", *(reference.encode_text(state_dict, texts, dtype=d) for d in (dtype, torch.float64))),
    ):
        assert ours.dtype == dtype
        if dtype == torch.float32:
            assert_embeddings(ours, exact, dtype, what=name)
    assert {x.dtype for x in reference.forward(state_dict, images, texts, dtype=dtype)} == {dtype}


def _text_state_dict(seed: int, width: int = 32, embedding: int = 9) -> dict[str, Tensor]:
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }
    shapes = {f"transformer.resblocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    shapes |= {"token_embedding.weight": (VOCABULARY, width), "positional_embedding": (CONTEXT, width)}
    shapes |= {"ln_final.weight": (width,), "ln_final.bias": (width,), "text_projection": (width, embedding)}
    return {name: _random(*shape, seed=seed + i, scale=0.3) for i, (name, shape) in enumerate(shapes.items())}


@given(seed=SEEDS, ends=st.lists(st.integers(0, CONTEXT - 1), min_size=1, max_size=4), data=st.data())
@FEW
def test_text_after_its_eot_changes_nothing(seed, ends, data):
    state_dict = _text_state_dict(seed)
    ids = st.integers(0, VOCABULARY - 2)
    # a second EOT is no later end: the first of equal ids counts
    after = st.integers(0, VOCABULARY - 1)
    texts = torch.zeros(2, len(ends), CONTEXT, dtype=torch.int64)
    for row, end in enumerate(ends):
        texts[:, row, :end] = torch.tensor(data.draw(st.lists(ids, min_size=end, max_size=end)))
        texts[:, row, end] = VOCABULARY - 1
        rest = CONTEXT - end - 1
        texts[1, row, end + 1 :] = torch.tensor(data.draw(st.lists(after, min_size=rest, max_size=rest)))
    expected = reference.encode_text(state_dict, texts[0])
    _assert_equal(reference.encode_text(state_dict, texts[1]), expected)
    _assert_equal(reference.encode_text(state_dict, texts[1, :, : max(ends) + 1]), expected)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_empty_batches(clip_model, tower):
    state_dict = _peer(clip_model, tower).state_dict()
    size = 32 if tower == "vit" else 64
    per_image, per_text = reference.forward(state_dict, _random(0, 3, size, size), _texts()[:0])
    assert per_image.shape == per_text.shape == (0, 0)
    assert reference.encode_image(state_dict, _random(0, 3, size, size)).shape == (0, 24)


def test_errors_name_the_argument():
    x = _random(4, 3, 1, 2)
    for offsets in ([], [1, 4], [0, 3], [0, 5], [0, 3, 2, 4], torch.tensor([0, 5])):
        with pytest.raises(ValueError, match="offsets: expected to rise from 0 to 4"):
            reference.attention(x, offsets, causal=False)
    for shape in ((4, 2, 1, 2), (4, 3, 2)):
        with pytest.raises(ValueError, match="qkv: expected"):
            reference.attention(_random(*shape), [0, 4], causal=False)
    projections = [_random(6, 5), None] * 3
    with pytest.raises(ValueError, match="query: expected 1 rows"):
        reference.attention_pool(_random(2, 5), _random(4, 5), [0, 4], *projections, heads=2)
    with pytest.raises(ValueError, match="heads: expected a divisor of 6"):
        reference.attention_pool(_random(1, 5), _random(4, 5), [0, 4], *projections, heads=4)
    with pytest.raises(ValueError, match="activation: .*'relu'"):
        reference.linear(x, _random(3, 2), activation="relu")
    embeddings = [_random(6, 3, 4, 4), _random(6), _random(5, 6)]
    with pytest.raises(ValueError, match="expected with uint8"):
        reference.patch_embed(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), *embeddings, mean=[0.5] * 3)
    with pytest.raises(ValueError, match="a grid of 1 x 3 .* need 4 positions"):
        reference.patch_embed(_random(1, 3, 4, 12), *embeddings)
    with pytest.raises(ValueError, match=f"text: expected at most {CONTEXT} columns"):
        reference.encode_text(_text_state_dict(0), torch.zeros(1, CONTEXT + 1, dtype=torch.int64))
