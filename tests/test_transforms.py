"""PyTorch's transformations of a model: compile, trace, export, torch.func, autocast, checkpointing, threads."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import clipfast

from .accuracy import assert_accurate
from .clips import (
    RESNET,
    VIT,
    assert_same,
    assert_same_gradients,
    encode,
    exact_features,
    make_images,
    make_pair,
    make_texts,
    make_trio,
    randomise,
    weighted,
)

TOWERS = {"vit": VIT, "resnet": RESNET}
TEXTS = make_texts(VIT, 8)


@pytest.fixture(params=TOWERS.values(), ids=TOWERS)
def config(request):
    return request.param


@pytest.fixture
def trio(config):
    return make_trio(config)


@pytest.fixture
def images(config):
    return make_images(config, 8)


class _Swapped(nn.Module):
    """A model one of whose functions is another: what assert_same runs in place of ours."""

    def __init__(self, model, **functions):
        super().__init__()
        self.model, self.functions = model, functions

    def __getattr__(self, name):
        if name in ("model", "functions"):
            return super().__getattr__(name) if name == "model" else self.__dict__["functions"]
        return self.functions[name] if name in self.functions else getattr(self.model, name)


@pytest.mark.parametrize("grad", [True, False])
def test_inference_mode_and_gradients_do_not_change_the_numbers(trio, images, grad):
    """Other backends may run; each is within the rule."""
    with torch.set_grad_enabled(grad):
        assert_same(trio, encode(images, TEXTS))
        assert trio[0].encode_image(images).requires_grad == grad
        assert trio[0].encode_text(TEXTS).requires_grad == grad
    with torch.inference_mode():
        assert_same(trio, encode(images, TEXTS))
        assert trio[0].encode_text(TEXTS).is_inference()


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        trio = make_trio(VIT)
        assert_same(trio, encode(make_images(VIT, 8), TEXTS))
    with torch.no_grad():
        assert_same(trio, encode(make_images(VIT, 8), TEXTS))


def test_half_precision_hooks_and_inference_mode_in_turn():
    """The long way casts the mask; a tensor made in inference mode must not stay in the model."""
    _, ours = make_pair(VIT)
    clipfast.convert_weights(ours, torch.bfloat16)
    with torch.no_grad():
        wanted = ours.encode_text(TEXTS)
    with torch.inference_mode():
        handle = ours.transformer.resblocks[0].ln_1.register_forward_hook(lambda *_: None)
        ours.encode_text(TEXTS)
        handle.remove()
    ours.encode_text(TEXTS).float().sum().backward()
    with torch.no_grad():
        assert torch.equal(ours.encode_text(TEXTS), wanted)


def test_compile_without_graph_breaks(trio, images):
    torch._dynamo.reset()
    ours = trio[0]
    swapped = _Swapped(
        ours,
        encode_image=torch.compile(ours.visual, fullgraph=True, backend="eager"),
        encode_text=torch.compile(ours.encode_text, fullgraph=True, backend="eager"),
    )
    with torch.no_grad():
        assert_same([swapped, *trio[1:]], encode(images, TEXTS))
        assert_same([swapped, *trio[1:]], encode(images[:5], TEXTS[:5]), what="another batch size")


def test_gradients_of_a_compiled_tower(config, images):
    torch._dynamo.reset()
    depth = 1 if config is VIT else (1, 1, 1, 1)
    config = (*config[:2], depth, *config[3:9], 1)

    def run(m):
        encode_image, encode_text = m.visual, m.encode_text
        if isinstance(m, clipfast.CLIP):
            encode_image = torch.compile(encode_image, fullgraph=True, backend="aot_eager")
            encode_text = torch.compile(encode_text, fullgraph=True, backend="aot_eager")
        leaves = {n: p for n, p in m.named_parameters() if n != "logit_scale"}
        embeddings = encode_image(images.to(m.dtype)), encode_text(TEXTS)
        return dict(zip(leaves, torch.autograd.grad(weighted(*embeddings), leaves.values()), strict=True))

    assert_same_gradients(config, run)


def test_compile_the_whole_model_and_change_its_weights():
    torch._dynamo.reset()
    trio = make_trio(VIT)
    images = make_images(VIT, 8)
    compiled = torch.compile(trio[0], fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same([compiled, *trio[1:]], lambda m: m(images.to(m.dtype), TEXTS))
        for model in trio:
            model.transformer.resblocks[2].mlp.c_proj.weight.mul_(2)
            model.visual.transformer.resblocks[0].attn.in_proj_bias.data[5] = 1.0
        assert_same([compiled, *trio[1:]], lambda m: m(images.to(m.dtype), TEXTS))


def test_a_trace_is_right_for_other_batches_and_texts(trio, images):
    """The traced module may bake no batch size and no place of an EOT."""
    texts = TEXTS.roll(3, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                traced = torch.jit.trace_module(
                    trio[0], {"encode_image": images[:2], "encode_text": texts[:2]}, check_trace=False
                )
                assert_same([traced, *trio[1:]], lambda m: [m.encode_image(_as(m, images)), m.encode_text(TEXTS)])
                assert_same([traced, *trio[1:]], lambda m: m.encode_text(TEXTS[:1]))
                tower = torch.jit.trace(trio[0].visual, images[:3], check_trace=False)
                assert_same([_Swapped(trio[0], encode_image=tower), *trio[1:]], encode(images, None))


def test_export(trio, images):
    """torch.export, whose batch sizes are free."""
    sizes = {"image": {0: torch.export.Dim("images", min=2)}, "text": {0: torch.export.Dim("texts", min=2)}}
    program = torch.export.export(trio[0], (images[:3], TEXTS[:4]), dynamic_shapes=sizes, strict=False)
    with torch.no_grad():
        assert_same([program.module(), *trio[1:]], lambda m: m(_as(m, images), TEXTS))


def _as(model, images):
    return images.to(model.dtype) if isinstance(getattr(model, "dtype", None), torch.dtype) else images


def test_functional_call_and_transforms_of_functions(trio, images):
    images, texts = images[:4], TEXTS[:4]

    def parameters(m):
        return {name: p.detach() * 1.25 for name, p in m.named_parameters()}

    def call(m):
        return torch.func.functional_call(m, parameters(m), (images.to(m.dtype), texts))

    def mapped(m):
        vmap = torch.func.vmap
        pixels = images.to(m.dtype)
        return vmap(lambda x: m.encode_image(x[None])[0])(pixels), vmap(lambda x: m.encode_text(x[None])[0])(texts)

    with torch.no_grad():
        assert_same(trio, call, what="functional_call")
        assert_same(trio, mapped, what="vmap")


def test_gradients_of_functions(config, images):
    def run(m):
        def loss(p):
            return weighted(*torch.func.functional_call(m, p, (images.to(m.dtype), TEXTS)))

        return torch.func.grad(loss)({name: p.detach() * 1.25 for name, p in m.named_parameters()})

    assert_same_gradients(config, run)


def test_gradients_of_each_sample():
    """vmap over grad, as differential privacy uses it."""
    images, texts = make_images(VIT, 3), TEXTS[:3]

    def run(m):
        weights = {name: p.detach() for name, p in m.named_parameters()}

        def loss(p, image, text):
            per_image, per_text = torch.func.functional_call(m, p, (image[None], text[None]))
            return per_image.sum() + 0.5 * per_text.sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, images.to(m.dtype), texts)

    assert_same_gradients(VIT, run)


def test_forward_mode_derivatives_are_never_dropped(trio, images):
    """openai-clip raises where PyTorch's attention has none; a silent zero would be worse."""
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(images, torch.ones_like(images))
        try:
            out = trio[0].encode_image(dual)
        except NotImplementedError:
            return
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
        assert tangent is not None and tangent.abs().max() > 0


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_on_a_cpu(config, grad):
    """The matrix products in bfloat16, the rest in float32, as openai-clip's under the same autocast."""
    peer, ours = make_pair(config)
    images = make_images(config, 8)
    exact = exact_features(peer.state_dict(), images, TEXTS)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        results = [[m.encode_image(images), m.encode_text(TEXTS), m(images, TEXTS)[0]] for m in (ours, peer)]
    exact = [*exact, clipfast.reference.logits(*exact, peer.logit_scale.detach().double())[0]]
    for a, b, c in zip(*results, exact, strict=True):
        assert_accurate(a, b, c)
    if grad:
        for features, model in zip(results, (ours, peer), strict=True):
            weighted(*features).backward()
            assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            assert ours.encode_image(images).dtype == torch.float32


def test_gradients_under_autocast():
    images = make_images(VIT, 8)

    def run(m):
        with torch.autocast("cpu", torch.bfloat16, enabled=m.dtype == torch.float32):
            logits = m(images, TEXTS)
        leaves = {n: p for n, p in m.named_parameters() if p.ndim > 0}
        return dict(zip(leaves, torch.autograd.grad(weighted(*logits), leaves.values()), strict=True))

    assert_same_gradients(VIT, run)


@pytest.mark.parametrize("hooked", [False, True], ids=["packed", "full rows"])
def test_grad_checkpointing(hooked):
    """open_clip's switch: the same gradients, and of each block its input alone is kept."""
    images = make_images(VIT, 8)

    def kept(m):
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = m(images, TEXTS)
        return sum(sizes.values()), {n: p.grad for n, p in backward(m, logits)}

    def backward(m, logits):
        weighted(*logits).backward()
        return m.named_parameters()

    models = [randomise(clipfast.CLIP(*VIT)) for _ in range(2)]
    for m in models if hooked else ():
        m.transformer.resblocks[0].register_forward_hook(lambda *_: None)
        m.visual.transformer.resblocks[0].register_forward_hook(lambda *_: None)
    models[1].set_grad_checkpointing()
    (most, plain), (least, again) = map(kept, models)
    assert least < 0.6 * most
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-6, atol=1e-7, msg=name)
    models[1].set_grad_checkpointing(False)
    assert kept(models[1])[0] == most


def test_grad_checkpointing_of_a_transformer_alone(monkeypatch):
    blocks = []
    monkeypatch.setattr(clipfast.model, "checkpoint", lambda block, *of, **_: blocks.append(block) or block(*of))
    transformer = clipfast.model.Transformer(64, 3, 2)
    transformer.grad_checkpointing = True
    x = torch.randn(5, 2, 64)
    with torch.no_grad():
        expected = transformer(x)
    assert not blocks
    torch.testing.assert_close(transformer(x), expected, rtol=1e-5, atol=1e-5)
    assert len(blocks) == 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks(use_reentrant):
    """Blocks recomputed in the backward pass: the forward of each is replaced, as trainers do."""

    def edit(m, _):
        for block in (*m.transformer.resblocks, *m.visual.transformer.resblocks):
            block.forward = lambda x, block=block: checkpoint(
                type(block).forward, block, x, use_reentrant=use_reentrant
            )

    images = make_images(VIT, 8)

    def run(m):
        weighted(*m(images, TEXTS)).backward()
        return {n: p.grad for n, p in m.named_parameters()}

    assert_same_gradients(VIT, run, edit)


def test_shapes_alone_on_the_meta_device(config):
    _, ours = make_pair(config)
    ours = ours.to("meta")
    images, texts = make_images(config, 3).to("meta"), TEXTS.to("meta")
    assert ours.encode_image(images).shape == (3, 64)
    assert ours.encode_text(texts).shape == (8, 64)
    assert [x.shape for x in ours(images, texts)] == [(3, 8), (8, 3)]


def test_operations_are_counted(config):
    from torch.utils.flop_counter import FlopCounterMode

    peer, ours = make_pair(config)
    counts = []
    for model in (ours, peer):
        with FlopCounterMode(display=False) as counter:
            model(make_images(config, 2), TEXTS)
        counts.append(counter.get_total_flops())
    assert 0.5 * counts[1] < counts[0] <= counts[1]


def test_another_default_device_or_dtype():
    """torch.set_default_device("cuda") with a model and ids on the CPU."""
    _, ours = make_pair(VIT)
    images = make_images(VIT, 2)
    unsigned = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    with torch.no_grad():
        wanted = ours(images, TEXTS)[0], ours.encode_image(unsigned)
        with torch.device("meta"):
            got = ours(images, TEXTS)[0], ours.encode_image(unsigned)
        torch.set_default_dtype(torch.float64)
        try:
            again = ours(images, TEXTS)[0], ours.encode_image(unsigned)
        finally:
            torch.set_default_dtype(torch.float32)
    for a, b, c in zip(wanted, got, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_threads_do_not_disturb_each_other():
    _, ours = make_pair(VIT)
    images = make_images(VIT, 4)
    with torch.no_grad():
        wanted = ours(images, TEXTS)[0]
    results = []

    def work(name):
        with torch.no_grad(), clipfast.backend(name):
            results.extend((name, ours(images, TEXTS)[0]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("torch", "onednn", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 15
    for _, result in results:
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_data_parallel_wrappers_see_every_gradient(dtype):
    """DistributedDataParallel waits for each parameter: none may be left without a gradient, empty batches included."""
    for config in TOWERS.values():
        _, ours = make_pair(config)
        for n in (2, 0):
            model = copy.deepcopy(ours).to(dtype)
            per_image, per_text = model(make_images(config, n), TEXTS[:n])
            (per_image.sum() + per_text.sum()).backward()
            without = [name for name, p in model.named_parameters() if p.grad is None]
            assert not without, (n, without)
