"""What test_ops.py does not ask of gradients: their own ones, frozen arguments, autocast, memory, repeatability."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import clipfast

from .accuracy import assert_accurate
from .backends import needs_triton
from .op_cases import CASES, SMALL, Case, case_in, mlp_case, norm, patch_case, weights

OWN = ("layer_norm", "linear", "mlp", "attention", "patch_embed", "project")
BACKENDS = ("torch", pytest.param("triton", marks=needs_triton))


def _leaves(case: Case, wanted: set[int] | None = None) -> tuple[Case, list[Tensor]]:
    """A copy of the case, and those of its floating arguments that want a gradient: all, or some by their place."""
    places = iter(range(len(case.tensors())))
    copied = case.map(lambda x: x.clone().requires_grad_(wanted is None or next(places) in wanted))
    return copied, [x for x in copied.tensors() if x.requires_grad]


def _upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator).to(x) for x in outputs]


@pytest.mark.parametrize("name", [name for name, case in SMALL.items() if case.operator in OWN])
def test_second_derivatives(name):
    case, leaves = _leaves(SMALL[name].map(lambda x: x.double()))

    def function(*tensors):
        given_tensors = iter(tensors)
        return case.map(lambda x: next(given_tensors)).ours()

    # fast: along one random direction of all arguments, not along each of them by itself
    assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=False, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_of_every_backend(backend, place):
    """A gradient penalty: the same on Triton's kernels, whose own gradients PyTorch's operators compute."""
    for name in ("layer_norm eps", "mlp (50, 2) 192 {}", "linear (50,) 768 768 ['residual']", "project 5 31"):
        results = []
        for run, wide in ((Case.ours, False), (Case.peer, False), (Case.exact, True)):
            on = place if run is Case.ours else "cpu"
            case, leaves = _leaves(CASES[name].on(on).map(lambda x, wide=wide: x.double() if wide else x))
            with clipfast.backend(backend):
                outputs = run(case)
            first = torch.autograd.grad(outputs, leaves, _upstream(outputs), create_graph=True)
            penalty = sum(x.square().mean() for x in first if x.requires_grad)
            results.append(torch.autograd.grad(penalty, leaves[0])[0])
        assert_accurate(*results, what=f"{name} on {backend}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["layer_norm", "linear", "mlp, gelu", "patch_embed, norm", "project"])
def test_frozen_arguments(name, backend, place):
    """Whoever trains one argument alone gets the gradient that it has among all."""
    case = SMALL[name].on(place)
    with clipfast.backend(backend):
        everything, leaves = _leaves(case)
        outputs = everything.ours()
        together = torch.autograd.grad(outputs, leaves, _upstream(outputs))
        for place, wanted in enumerate(together):
            alone, (leaf,) = _leaves(case, {place})
            outputs = alone.ours()
            outputs[0].backward(_upstream(outputs)[0])
            torch.testing.assert_close(leaf.grad, wanted, rtol=1e-5, atol=1e-6, msg=f"{name}, argument {place}")
            assert all(x.grad is None for x in alone.tensors() if x is not leaf)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_the_same_each_time(backend, place):
    for name in (
        "layer_norm (77, 3) 640",
        "mlp (50, 2) 192 {}",
        "patch_embed uint8",
        "attention [77, 40] {'size': 5} True",
    ):
        runs = []
        for _ in range(2):
            case, leaves = _leaves(case_in(name, torch.bfloat16).on(place))
            with clipfast.backend(backend):
                outputs = case.ours()
            runs.append(torch.autograd.grad(outputs, leaves, _upstream(outputs), allow_unused=True))
        assert all(x is y or torch.equal(x, y) for x, y in zip(*runs, strict=True)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_autocast(backend, rows_dtype, place):
    """Products in bfloat16, rows in their own dtype, float32 parameters with float32 gradients, as in openai/CLIP."""
    torch.manual_seed(0)
    cases = [mlp_case((70,), 64, 256), Case("layer_norm", (torch.randn(70, 64), *norm(64)))]
    cases.append(Case("linear", (torch.randn(70, 64), *weights(48, 64)), {"residual": torch.randn(70, 48)}))
    for case in cases:
        case = Case(case.operator, (case.arguments[0].to(rows_dtype), *case.arguments[1:]), case.options)
        results = []
        for run in (Case.ours, Case.peer):
            on = place if run is Case.ours else "cpu"
            leaf, leaves = _leaves(case.on(on))
            with torch.autocast(on, torch.bfloat16), clipfast.backend(backend):
                outputs = run(leaf)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, _upstream(outputs))])
        exact, leaves = _leaves(case.map(lambda x: x.double()))
        outputs = exact.exact()
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, _upstream(outputs))])
        for i, (got, peer, wanted) in enumerate(zip(*results, strict=True)):
            assert_accurate(got, peer, wanted.detach(), what=f"{case.operator}, output or gradient {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_what_is_kept(dtype):
    """Of the MLP its rows and its pre-activation, of a LayerNorm its rows, of attention q, k, v and the result."""
    rows, width = 400, 64
    for case, widths in [
        (mlp_case((rows,), width, 4 * width), 5),
        (Case("layer_norm", (torch.randn(rows, width), *norm(width))), 1),
        (Case("attention", (torch.randn(rows, 3, 2, width // 2), [0, 200, 400]), {"causal": True}), 4),
    ]:
        leaf, leaves = _leaves(case.map(lambda x: x.to(dtype)))
        parameters = {x.untyped_storage().data_ptr() for x in leaves[1:]}
        sizes = {}

        def keep(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            leaf.ours()
        kept = sum(size for place, size in sizes.items() if place not in parameters)
        # and a few float32 numbers for each row
        assert kept <= rows * (widths * width * dtype.itemsize + 16), (case.operator, kept)


@needs_triton
@pytest.mark.parametrize("patch", [7, 14, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_weight_of_the_patch_embedding(patch, dtype, device):
    """Images that want no gradient, cut out of larger ones, no multiple of the patch in size; Triton's kernel."""
    torch.manual_seed(0)
    case = patch_case(3, 2 * patch + 3, 3 * patch + 1, patch, 72)
    images = torch.full((5, 4, 2 * patch + 4, 3 * patch + 9), float("nan"), dtype=dtype, device=device)
    images = images[1:4, :3, 1:, 2:-6].copy_(case.arguments[0])
    results = []
    for run, wide in ((Case.ours, False), (Case.peer, False), (Case.exact, True)):
        on = device if run is Case.ours else "cpu"
        copied, leaves = _leaves(
            case.on(on).map(lambda x: x.to(dtype)).map(lambda x, w=wide: x.double() if w else x), {1, 2, 3}
        )
        if run is Case.ours:
            copied = copied._replace(arguments=(images, *copied.arguments[1:]))
        with clipfast.backend("triton"):
            outputs = run(copied)
        upstream = [x.to(dtype).to(x) for x in _upstream(outputs)]
        results.append(torch.autograd.grad(outputs, leaves, upstream))
    for name, got, peer, exact in zip(("weight", "class", "position"), *results, strict=True):
        assert_accurate(got, peer, exact, what=f"{name} of patches of {patch}")


@needs_triton
def test_the_registered_gradient_of_the_patch_embedding(device):
    from clipfast.kernels import patch_embed_gradients

    images, grad = torch.randn(2, 3, 16, 24, device=device), torch.randn(2, 7, 20, device=device)
    operator = patch_embed_gradients.patch_weight_grad
    torch.library.opcheck(operator, (grad, images, None, None, 8, False))
    pixels, moments = torch.randint(0, 256, images.shape, dtype=torch.uint8), torch.rand(2, 3) + 0.1
    torch.library.opcheck(operator, (grad, pixels.to(device), *moments.to(device).unbind(0), 8, False))
