"""What watches or changes PyTorch's calls while a model runs: modes, global hooks, tensor subclasses, transforms."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..clips import RESNET, VIT, assert_same, make_trio, weighted
from .habits import BOTH, TEXTS, assert_habit, embed, images_of, unchanged


class _Functions(TorchFunctionMode):
    """Scales what some of PyTorch's functions give: a quantiser's simulation."""

    def __init__(self, *functions):
        super().__init__()
        self.functions = functions

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return _scaled_first(out) if func in self.functions else out


class _Operators(TorchDispatchMode):
    """The same one level below."""

    def __init__(self, *operators):
        super().__init__()
        self.operators = operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return _scaled_first(out) if func in self.operators else out


def _scaled_first(out):
    return (1.25 * out[0], *out[1:]) if isinstance(out, tuple) else 1.25 * out


@contextlib.contextmanager
def _removed(*handles):
    yield
    for handle in handles:
        handle.remove()


def _global_hook(kind):
    return _removed(
        nn.modules.module.register_module_forward_hook(
            lambda module, args, out: 1.25 * out if isinstance(module, kind) else None
        )
    )


def _global_pre_hook(kind):
    return _removed(
        nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: (args[0].flip(-1),) if isinstance(module, kind) else None
        )
    )


@contextlib.contextmanager
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# name: (makes the context, model, whose numbers change)
CONTEXTS = {
    "function mode on F.linear": (lambda: _Functions(F.linear), VIT, BOTH),
    "function mode on F.layer_norm": (lambda: _Functions(F.layer_norm), VIT, BOTH),
    "function mode on F.multi_head_attention_forward": (lambda: _Functions(F.multi_head_attention_forward), VIT, BOTH),
    "function mode on torch.sigmoid": (lambda: _Functions(torch.sigmoid), VIT, BOTH),
    "function mode on F.embedding": (lambda: _Functions(F.embedding), VIT, ("text",)),
    "function mode on the matrix product": (lambda: _Functions(torch.Tensor.matmul), VIT, BOTH),
    "function mode on a ResNet's attention": (lambda: _Functions(F.multi_head_attention_forward), RESNET, ("image",)),
    "dispatch mode on sigmoid": (lambda: _Operators(torch.ops.aten.sigmoid.default), VIT, BOTH),
    "dispatch mode on layer norm": (lambda: _Operators(torch.ops.aten.native_layer_norm.default), VIT, BOTH),
    "global hook on LayerNorm": (lambda: _global_hook(nn.LayerNorm), VIT, BOTH),
    "global hook on Linear": (lambda: _global_hook(nn.Linear), VIT, BOTH),
    "global pre-hook on Linear": (lambda: _global_pre_hook(nn.Linear), VIT, BOTH),
    "global hook on BatchNorm2d": (lambda: _global_hook(nn.BatchNorm2d), RESNET, ("image",)),
    "attention by the mathematics": (lambda: sdpa_kernel(SDPBackend.MATH), VIT, ()),
    "a ResNet's attention by the mathematics": (lambda: sdpa_kernel(SDPBackend.MATH), RESNET, ()),
    "no oneDNN": (lambda: torch.backends.mkldnn.flags(enabled=False), VIT, ()),
    "deterministic algorithms": (_deterministic, VIT, ()),
    "anomaly detection": (lambda: torch.autograd.set_detect_anomaly(True, check_nan=False), VIT, ()),
    "saved tensors elsewhere": (lambda: torch.autograd.graph.save_on_cpu(), VIT, ()),
    "cached parametrisations": (parametrize.cached, VIT, ()),
    "the profiler": (lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), VIT, ()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context(name):
    make, config, changes = CONTEXTS[name]
    unchanged(config)
    trio = make_trio(config)
    with make():
        assert_habit(trio, config, changes)
    assert_habit(trio, config, changes=())


class _Scaled(torch.Tensor):
    """A tensor whose linear layers give more: how quantised weights come in."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 1.25 * out.as_subclass(torch.Tensor) if func is F.linear else out


class _Marked(torch.Tensor):
    """A tensor that says where it has been: PyTorch gives results the class of their arguments."""


def _scaled_weights(path):
    def edit(m, _):
        for tower in (m, m.visual):
            for block in tower.transformer.resblocks:
                module = block.get_submodule(path)
                module.weight = nn.Parameter(module.weight.detach().as_subclass(_Scaled))

    return edit


@pytest.mark.parametrize("path", ["mlp.c_fc", "mlp.c_proj"])
def test_weights_of_a_tensor_subclass(path):
    assert_habit(make_trio(VIT, _scaled_weights(path)), VIT)


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_inputs_of_a_tensor_subclass(config):
    def run(m):
        image = m.encode_image(images_of(m).as_subclass(_Marked))
        text = m.encode_text(TEXTS.as_subclass(_Marked))
        assert {type(image), type(text)} == {_Marked}
        return {name: x.as_subclass(torch.Tensor) for name, x in (("image", image), ("text", text))}

    assert_habit(make_trio(config), config, (), run)


def _jacobian(m):
    positions = m.positional_embedding.detach()[:2]

    def first(p):
        x = torch.func.functional_call(
            m,
            {"positional_embedding": torch.cat([p, m.positional_embedding.detach()[2:]])},
            (images_of(m)[:1].to(m.dtype), TEXTS[:2]),
        )
        return x[0].flatten()

    return [torch.func.jacrev(first)(positions)]


def _directional(m):
    pixels = images_of(m)[:2].to(m.dtype)
    return torch.func.jvp(m.encode_image, (pixels,), (pixels.flip(0),))


def _penalty(m):
    """The gradient of a gradient's size, as adversarial training uses it."""
    pixels = images_of(m)[:2].to(m.dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(weighted(m.encode_image(pixels)), pixels, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), [pixels, m.visual.conv1.weight])


def _ensemble(m):
    parameters = {n: torch.stack([p.detach(), 1.25 * p.detach()]) for n, p in m.named_parameters()}
    buffers = {n: torch.stack([b, b]) for n, b in m.named_buffers()}

    def call(p, b, images):
        return torch.func.functional_call(m, (p, b), (images, TEXTS))[0]

    return [torch.func.vmap(call, (0, 0, None))(parameters, buffers, images_of(m).to(m.dtype))]


def _made_by_proxies(m):
    from torch.fx.experimental.proxy_tensor import make_fx

    images = images_of(m).to(m.dtype)
    with torch.no_grad():
        graphs = [make_fx(lambda x: m.encode_image(x))(images), make_fx(lambda x: m.encode_text(x))(TEXTS)]
        return [graphs[0](images), graphs[1](TEXTS)]


TRANSFORMS = {
    "jacrev": (_jacobian, VIT),
    "jvp": (_directional, VIT),
    "jvp of a ResNet": (_directional, RESNET),
    "gradient penalty": (_penalty, VIT),
    "an ensemble": (_ensemble, VIT),
    "make_fx": (_made_by_proxies, VIT),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformation(name):
    """With the attention that PyTorch can differentiate forward and twice."""
    run, config = TRANSFORMS[name]
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(make_trio(config), run)


def test_a_transformer_traced_symbolically():
    trio = make_trio(VIT)
    x = torch.randn(17, 3, 128)
    with torch.no_grad():
        assert_same(trio, lambda m: torch.fx.symbolic_trace(m.visual.transformer)(x.to(m.dtype)))


def test_linear_layers_quantised_dynamically():
    """Each library's error to the unquantised model is the quantisation's; ours has it too."""
    trio = make_trio(VIT)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        quantised = [torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8) for m in trio[:2]]
        assert_same([*quantised, trio[2]], embed)
        for name, tensor in embed(quantised[0]).items():
            assert (tensor - unchanged(VIT)[name]).abs().max() > 1e-3
