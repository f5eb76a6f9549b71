"""What programs do with an openai/CLIP model beyond calling it: towers called directly or taken apart, hooks.

Each test makes the same change to openai-clip's model, to ours and to an exact float64 one, and compares by the
tolerance rule.
"""

from __future__ import annotations

import inspect
import operator

import pytest
import torch
from torch import nn

import clipfast
import clipfast.model

from . import peers
from .clips import RESNET, VIT, assert_same, convert, encode, make_images, make_texts, make_trio, weighted

IMAGES, TEXTS = make_images(VIT, 8), make_texts(VIT, 8)
RESNET_IMAGES = make_images(RESNET, 4)
CLASSES = (
    "AttentionPool2d",
    "Bottleneck",
    "CLIP",
    "LayerNorm",
    "ModifiedResNet",
    "QuickGELU",
    "ResidualAttentionBlock",
    "Transformer",
    "VisionTransformer",
)


@pytest.fixture
def fast_calls(monkeypatch):
    """Counts how often a tower took its fast way: only that asks for one row a sequence, or pools without keys."""
    calls = []
    blocks, pool = clipfast.ops.blocks, clipfast.ops.attention_pool

    def counted_blocks(*a, index=None, **k):
        before = len(calls)
        out = blocks(*a, index=index, **k)
        # operator by operator it has pooled, too
        calls[before:] = [1] * (index is not None)
        return out

    monkeypatch.setattr(clipfast.ops, "blocks", counted_blocks)
    monkeypatch.setattr(clipfast.ops, "attention_pool", lambda *a, **k: calls.append(1) or pool(*a, **k))
    return calls


# ---- the surface ----


@pytest.mark.parametrize("name", CLASSES)
def test_constructors_take_the_same_arguments_in_the_same_places(name):
    theirs = inspect.signature(getattr(peers.openai_clip().model, name)).parameters.values()
    ours = [*inspect.signature(getattr(clipfast.model, name)).parameters.values()]
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    # what is new has a default and cannot take a place
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in ours[len(theirs) :])


@pytest.mark.parametrize("arguments", [(16, 4), (16, 4, 2), (8, 4), (8, 4, 2)])
def test_bottlenecks_of_any_width_and_stride(arguments):
    ours, theirs = (library.Bottleneck(*arguments).eval() for library in (clipfast.model, peers.openai_clip().model))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, arguments[0], 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_new_model_has_the_same_weights_from_the_same_seed(config):
    states = []
    for library in (clipfast.model, peers.openai_clip().model):
        torch.manual_seed(5)
        states.append(library.CLIP(*config).state_dict())
    for (ours_name, ours), (name, theirs) in zip(*(state.items() for state in states), strict=True):
        assert ours_name == name
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_methods_and_attributes():
    ours, peer, _ = make_trio(VIT)
    for path in ("transformer.width", "transformer.layers", "visual.transformer.width", "visual.output_dim"):
        assert operator.attrgetter(path)(ours) == operator.attrgetter(path)(peer), path
    assert torch.equal(ours.build_attention_mask(), peer.build_attention_mask())
    assert torch.equal(ours.transformer.resblocks[1].attn_mask, peer.transformer.resblocks[1].attn_mask)
    assert ours.visual.transformer.resblocks[0].attn_mask is None
    assert ours.visual.transformer.resblocks[0].attn.num_heads == 2


# ---- towers and blocks called directly ----


@pytest.mark.parametrize("grad", [True, False])
def test_transformers_take_length_batch_width(grad):
    """Prompt learners call them; visual prompts make other lengths than the grid's."""
    text = torch.randn(12, 6, 128)
    image = torch.randn(23, 6, 128)
    with torch.set_grad_enabled(grad):
        trio = make_trio(VIT)
        assert_same(trio, lambda m: m.transformer(text.to(m.dtype)), what="text")
        assert_same(trio, lambda m: m.visual.transformer(image.to(m.dtype)), what="image")
        for i in range(3):
            assert_same(trio, lambda m, i=i: m.transformer.resblocks[i](text.to(m.dtype)), what="text block")
            assert_same(trio, lambda m, i=i: m.visual.transformer.resblocks[i](image.to(m.dtype)), what="image block")
        assert_same(trio, lambda m: m.transformer.resblocks[1].attention(text.to(m.dtype)), what="attention")
        # strides that a permute leaves
        assert_same(trio, lambda m: m.transformer(text.to(m.dtype).permute(1, 0, 2).contiguous().permute(1, 0, 2)))
        assert_same(trio, lambda m: m.visual(IMAGES.to(m.dtype)), what="visual")


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_tower_taken_apart(config):
    """As Tip-Adapter, CLIP-ReID and dense predictors do: the steps of `visual` one by one, other tokens read."""

    def run(m):
        v, x = m.visual, make_images(config, 4).to(m.dtype)
        if config is RESNET:
            for i in (1, 2, 3):
                x = getattr(v, f"relu{i}")(getattr(v, f"bn{i}")(getattr(v, f"conv{i}")(x)))
            x = v.avgpool(x)
            x3 = v.layer3(v.layer2(v.layer1(x)))
            x4 = v.layer4(x3)
            return x3, x4, v.attnpool(x4)
        x = v.conv1(x).flatten(2).permute(0, 2, 1)
        first = v.class_embedding.to(x.dtype) + torch.zeros(len(x), 1, x.shape[-1], dtype=x.dtype)
        x = v.ln_pre(torch.cat([first, x], dim=1) + v.positional_embedding.to(x.dtype))
        x = x.permute(1, 0, 2)
        for block in v.transformer.resblocks[:-1]:
            x = block(x)
        x12 = v.transformer.resblocks[-1](x)
        return x, x12, v.ln_post(x12) @ v.proj

    assert_same(make_trio(config), run)


def test_prompt_learning():
    """CoOp: learned vectors among the token embeddings; features, and the gradient of the vectors."""
    context = torch.randn(4, 128) * 0.5

    def run(m):
        vectors = context.clone().to(m.dtype).requires_grad_()
        with torch.no_grad():
            embedded = m.token_embedding(TEXTS).type(m.dtype)
        x = torch.cat([embedded[:, :1], vectors.expand(len(TEXTS), -1, -1), embedded[:, 5:]], dim=1)
        x = x + m.positional_embedding.type(m.dtype)
        x = m.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = m.ln_final(x).type(m.dtype)
        x = x[torch.arange(x.shape[0]), TEXTS.argmax(dim=-1)] @ m.text_projection
        x = x / x.norm(dim=-1, keepdim=True)
        weighted(x).backward()
        return x, vectors.grad, m.transformer.resblocks[0].attn.in_proj_weight.grad

    def run_frozen(m):
        vectors = context.clone().to(m.dtype).requires_grad_()
        x = vectors.expand(6, -1, -1).permute(1, 0, 2) + m.visual.positional_embedding[:4, None].to(m.dtype)
        return torch.autograd.grad(weighted(m.visual.transformer(x)), vectors)

    trio = make_trio(VIT)
    assert_same(trio, run)
    for model in trio:
        model.requires_grad_(False)
    assert_same(trio, run_frozen)


# ---- hooks ----

HOOKED = (
    *(
        tower + part
        for tower in ("", "visual.")
        for part in (
            "transformer",
            "transformer.resblocks",
            "transformer.resblocks.1",
            "transformer.resblocks.2.ln_1",
            "transformer.resblocks.2.attn",
            "transformer.resblocks.0.ln_2",
            "transformer.resblocks.0.mlp",
            "transformer.resblocks.2.mlp.c_fc",
            "transformer.resblocks.1.mlp.gelu",
            "transformer.resblocks.1.mlp.c_proj",
        )
    ),
    "token_embedding",
    "ln_final",
    "visual",
    "visual.conv1",
    "visual.ln_pre",
    "visual.ln_post",
)


def _first(value):
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("path", HOOKED)
def test_hooks_see_what_they_see_on_openai_clip(path, fast_calls):
    """Full rows, in values and shapes; then, without the hook, the fast way again."""

    def run(m):
        seen = {}

        def backward(_, grad_in, grad_out):
            seen["gradient of the output"] = grad_out[0]

        module = m.get_submodule(path)
        handles = [
            module.register_forward_pre_hook(lambda _, args: seen.update(before=args[0].detach().clone())),
            module.register_forward_hook(lambda _, args, out: seen.update(after=_first(out).detach().clone())),
            module.register_full_backward_hook(backward),
        ]
        pixels = IMAGES.to(m.dtype).requires_grad_()
        x = m.encode_image(pixels) if path.startswith("visual") else m.encode_text(TEXTS)
        weighted(x).backward()
        for handle in handles:
            handle.remove()
        assert len(seen) == 3
        if not seen["before"].is_floating_point():
            assert torch.equal(seen.pop("before"), TEXTS)
        return {**seen, "embedding": x}

    trio = make_trio(VIT)
    assert_same(trio, run, what=path)
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS))
        fast_calls.clear()
        trio[0].encode_image(IMAGES)
        trio[0].encode_text(TEXTS)
    assert len(fast_calls) == 2


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("path", ["ln_final", "transformer.resblocks.2.ln_1", "visual.transformer.resblocks.1.mlp"])
def test_a_backward_hook_alone_is_called(path, register):
    def run(m):
        seen = []
        handle = getattr(m.get_submodule(path), register)(lambda *args: seen.append(args[-1][0]))
        weighted(*m(IMAGES, TEXTS)).backward()
        handle.remove()
        return seen

    trio = make_trio(VIT)
    assert_same(trio, run, what=path)
    assert len(run(trio[0])) == 1


@pytest.mark.parametrize("path", [path for path in HOOKED if path not in ("visual", "token_embedding")])
@pytest.mark.parametrize("kind", ["before", "after"])
def test_hooks_may_change_what_they_see(path, kind):
    def edit(m, _):
        def mixed(x):
            return x + 0.5 * x.flip(-1) if x.is_floating_point() else x  # no mere factor: a LayerNorm would drop it

        def before(_, args):
            return tuple(mixed(x) for x in args)

        def after(_, args, out):
            return (mixed(out[0]), *out[1:]) if isinstance(out, tuple) else mixed(out)

        module = m.get_submodule(path)
        module.register_forward_pre_hook(before) if kind == "before" else module.register_forward_hook(after)

    trio = make_trio(VIT, edit)
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS))
        change = trio[0](IMAGES, TEXTS)[0] - make_trio(VIT)[0](IMAGES, TEXTS)[0]
    assert change.abs().max() > 0.01


def test_hooks_on_a_half_precision_model():
    ours, peer, exact = make_trio(VIT)
    convert(peer, torch.bfloat16)
    clipfast.convert_weights(ours, torch.bfloat16)
    seen = []
    for model in (ours, peer):
        for tower in (model, model.visual):
            tower.transformer.resblocks[1].ln_1.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    with torch.no_grad():
        assert_same([ours, peer, exact], encode(IMAGES, TEXTS))
    assert seen == [torch.bfloat16] * 4


def test_a_hook_on_the_tower_sees_images_in_its_dtype():
    for model in make_trio(VIT)[:2]:
        seen = []
        model.visual.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].dtype))
        for images in (IMAGES.half(), IMAGES.double()):
            model.encode_image(images)
        assert seen == [torch.float32] * 2


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_global_hooks_see_every_module(config, fast_calls):
    ours, peer, _ = make_trio(config)
    images = make_images(config, 2)
    seen = []
    for model in (ours, peer):
        calls = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, calls=calls: calls.append((type(module).__name__, _first(out).shape))
        )
        with torch.no_grad():
            model(images, TEXTS)
        handle.remove()
        seen.append(calls)
    assert seen[0] == seen[1]
    fast_calls.clear()
    with torch.no_grad():
        ours.encode_text(TEXTS)
    assert len(fast_calls) == 1


def test_a_resnet_pools_without_keys_and_values_where_less_precision_will_do(fast_calls):
    ours = make_trio(RESNET)[0]
    with torch.no_grad():
        ours.encode_image(RESNET_IMAGES)
        assert not fast_calls
        torch.set_float32_matmul_precision("high")
        try:
            ours.encode_image(RESNET_IMAGES)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert len(fast_calls) == 1


@pytest.mark.parametrize("path", ["conv1", "bn2", "layer2.0", "layer3.0.conv2", "layer4", "attnpool"])
def test_hooks_on_a_resnet(path):
    def run(m):
        seen = {}
        handle = m.visual.get_submodule(path).register_forward_hook(
            lambda _, args, out: seen.update(before=args[0].clone(), after=out.clone())
        )
        with torch.no_grad():
            seen["embedding"] = m.encode_image(RESNET_IMAGES)
        handle.remove()
        return seen

    assert_same(make_trio(RESNET), run, what=path)
