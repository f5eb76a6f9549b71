"""The two kernels of the MLP's hidden layer, each beside PyTorch's own products and float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipfast import reference, tuning
from clipfast.kernels import linear, mlp_gradients

from ..accuracy import assert_accurate

ACTIVATIONS = ("quick_gelu", "gelu")


def _activate(h, activation):
    return F.gelu(h) if activation == "gelu" else h * torch.sigmoid(1.702 * h)


def _between_nans(x, device):
    """x with NaN after each of its rows and after its last one: what is read past an end shows."""
    wide = torch.full((x.shape[0] + 1, x.shape[1] + 16), float("nan"), dtype=x.dtype, device=device)
    wide[: x.shape[0], : x.shape[1]] = x
    return wide[: x.shape[0], : x.shape[1]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("n_rows", "width", "hidden", "dtype", "kind"),
    [
        (3, 512, 64, torch.bfloat16, "split"),
        (450, 64, 96, torch.bfloat16, "persistent"),
        (450, 63, 37, torch.float16, "tiles"),
        (70, 65, 40, torch.float32, "tiles"),
    ],
)
def test_the_pre_activation_beside_the_hidden_layer(n_rows, width, hidden, dtype, kind, activation, device):
    if kind == "persistent" and not linear.HAS_DESCRIPTORS:
        pytest.skip("the persistent form needs Triton 3.4")
    torch.manual_seed(0)
    x, bias = torch.randn(n_rows, width).to(dtype), torch.randn(hidden).to(dtype)
    weight = (torch.randn(hidden, width) * width**-0.5).to(dtype)
    if device == "cpu":
        config = tuning.linear(n_rows, hidden, width, dtype, 90, described=kind == "persistent", pre=True)
        assert kind == ("persistent" if config.persistent else "split" if config.split_k > 1 else "tiles")
    got = mlp_gradients.mlp_expand(x.to(device), weight.to(device), bias.to(device), activation, False)
    peer = F.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_accurate(got[0], peer, exact, what="pre-activation")
    assert_accurate(got[1], _activate(peer, activation), _activate(exact, activation), what="hidden layer")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("n_rows", "width", "hidden"), [(5, 72, 48), (130, 40, 70), (450, 96, 130)])
def test_the_gradient_of_the_pre_activation(n_rows, width, hidden, dtype, activation, device):
    torch.manual_seed(0)
    grad, pre = torch.randn(n_rows, width).to(dtype), (3 * torch.randn(n_rows, hidden)).to(dtype)
    weight = (torch.randn(width, hidden) * width**-0.5).to(dtype)
    views = (_between_nans(x, device) for x in (grad, weight))
    got = mlp_gradients.mlp_hidden_bwd(*views, pre.to(device), activation, False)
    results = []
    for wide in (dtype, torch.float64):
        leaf = pre.to(wide).requires_grad_()
        layer = _activate(leaf, activation)
        (dpre,) = torch.autograd.grad(layer, leaf, grad.to(wide) @ weight.to(wide))
        results.append((dpre, layer.detach()))
    for name, ours, peer, exact in zip(("gradient", "hidden layer"), got, *results, strict=True):
        assert_accurate(ours, peer, exact, what=name)


def test_the_registered_operators(device):
    x, weight, bias = (torch.randn(n, device=device) for n in ((5, 16), (24, 16), (24,)))
    arguments = (x, weight, bias, "quick_gelu", False)
    torch.library.opcheck(mlp_gradients.mlp_expand, arguments)
    pre, _ = mlp_gradients.mlp_expand(*arguments)
    torch.library.opcheck(mlp_gradients.mlp_hidden_bwd, (x, weight.t().contiguous(), pre, "gelu", False))


def test_nothing_in_nothing_out(device):
    for rows, hidden in ((0, 24), (5, 0)):
        x, weight = torch.randn(rows, 16, device=device), torch.randn(hidden, 16, device=device)
        pre, layer = mlp_gradients.mlp_expand(x, weight, None, "gelu", False)
        dpre, again = mlp_gradients.mlp_hidden_bwd(x, weight.t().contiguous(), pre, "gelu", False)
        assert {y.shape for y in (pre, layer, dpre, again)} == {(rows, hidden)}


def test_the_reference_agrees():
    """The activations of this file are the reference's."""
    x = torch.randn(40, dtype=torch.float64)
    for activation in ACTIVATIONS:
        eye = torch.eye(40, dtype=torch.float64)
        torch.testing.assert_close(_activate(x, activation), reference.linear(x, eye, activation=activation))
