"""The Triton LayerNorm, with and without a residual."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clipfast
from clipfast import reference
from clipfast.kernels import layer_norm as module

from ..accuracy import assert_accurate
from ..op_cases import PEERS, norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x, weight, bias, eps=1e-5, residual=None):
    got = module.layer_norm(x, weight, bias, eps, residual)
    exact = reference.layer_norm(*(t.double().cpu() for t in (x, weight, bias)), eps, _wide(residual))
    if residual is None:
        got, exact, peer = (got,), (exact,), (PEERS["layer_norm"](x, weight, bias, eps),)
    else:
        total = x + residual
        peer = PEERS["layer_norm"](total, weight, bias, eps), total
    for what, ours, theirs, truth in zip(("norm", "sum"), got, peer, exact, strict=False):
        assert_accurate(ours, theirs, truth, what=what)


def _wide(x):
    return None if x is None else x.double().cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("width", [1, 31, 192, 512, 640, 768, 1024, 4096])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_against_float64(rows, width, dtype, device, poisoned_memory):
    x, residual = (torch.randn(rows, width).to(device, dtype) for _ in range(2))
    weight, bias = (t.to(device) for t in norm(width))
    check(x, weight, bias)
    check(x, weight, bias, residual=residual)


def test_weights_of_the_models_dtype_and_of_float32(device):
    x = torch.randn(6, 96, device=device, dtype=torch.float16)
    weight, bias = (t.to(device) for t in norm(96))
    check(x, weight, bias)
    check(x, weight.half(), bias.half())


@pytest.mark.parametrize("mean", [1000, 30000])
def test_a_mean_far_above_the_deviation(mean, device):
    x = torch.randn(16, 768, device=device) + mean
    check(x, *(t.to(device) for t in norm(768)))


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5])
def test_eps(eps, device):
    x = torch.randn(5, 192, device=device) * 1e-3
    check(x, *(t.to(device) for t in norm(192)), eps)


def test_a_constant_row_gives_the_bias(device):
    weight, bias = (t.to(device) for t in norm(640))
    got = module.layer_norm(torch.full((3, 640), 7.0, device=device), weight, bias, 1e-5)
    torch.testing.assert_close(got, bias.expand(3, -1))


def test_gaps_between_rows(device):
    x, residual = torch.randn(9, 3, 192, device=device)[:, 1], torch.randn(9, 2, 192, device=device)[:, 0]
    check(x, *(t.to(device) for t in norm(192)), residual=residual)
    check(torch.randn(192, 9, device=device).t(), *(t.to(device) for t in norm(192)))


def test_empty(device):
    weight, bias = (t.to(device) for t in norm(64))
    assert module.layer_norm(torch.empty(0, 64, device=device), weight, bias, 1e-5).shape == (0, 64)
    got, total = module.layer_norm(
        torch.empty(2, 0, 64, device=device), weight, bias, 1e-5, torch.empty(2, 0, 64, device=device)
    )
    assert got.shape == total.shape == (2, 0, 64)


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(2, 70), shift=st.floats(-50, 50), scale=st.floats(0.1, 10))
@settings(max_examples=15)
def test_shift_and_scale_change_nothing(device, seed, width, shift, scale):
    torch.manual_seed(seed)
    x, ones, zeros = torch.randn(4, width) + torch.arange(width), torch.ones(width), torch.zeros(width)
    x, ones, zeros = x.to(device), ones.to(device), zeros.to(device)
    got = module.layer_norm(scale * (x + shift), ones, zeros, 0.0)
    torch.testing.assert_close(got, module.layer_norm(x, ones, zeros, 0.0), rtol=1e-3, atol=1e-3)


def test_registered(device):
    x, residual = torch.randn(5, 96, device=device), torch.randn(5, 96, device=device)
    weight, bias = (t.to(device) for t in norm(96))
    for added in (None, residual):
        torch.library.opcheck(torch.ops.clipfast.layer_norm.default, (x, added, weight, bias, 1e-5))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        return module.layer_norm(x, weight, bias, 1e-5) * 2

    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module.layer_norm(x, weight, bias, 1e-5) * 2)


def test_the_registered_gradients(device):
    x, weight, bias = (torch.randn(n, device=device) for n in ((5, 40), (40,), (40,)))
    torch.library.opcheck(module.layer_norm_train, (x, weight, bias, 1e-5))
    _, *statistics = module.layer_norm_train(x, weight, bias, 1e-5)
    for added in (None, x):
        torch.library.opcheck(module.layer_norm_grad, (x, x, *statistics, weight, added))


def test_rows_and_gradients_with_gaps(device):
    """Every operand of the backward with rows that lie apart, NaN between them."""
    torch.manual_seed(0)
    wide = torch.full((3, 70, 60), float("nan"), device=device)
    wide[:, :, :40] = torch.randn(3, 70, 40)
    x, grad, added = wide[:, :, :40]
    weight = torch.randn(40, device=device)
    _, *statistics = module.layer_norm_train(x, weight, weight, 1e-5)
    for one, other in zip(
        module.layer_norm_grad(grad, x, *statistics, weight, added),
        module.layer_norm_grad(grad.contiguous(), x.contiguous(), *statistics, weight, added.contiguous()),
        strict=True,
    ):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_gradients_of_no_rows(device):
    """Those of weight and bias are sums of nothing."""
    weight, bias = (x.to(device).requires_grad_() for x in norm(8))
    with clipfast.backend("triton"):
        clipfast.ops.layer_norm(torch.empty(0, 8, device=device), weight, bias).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and torch.equal(bias.grad, torch.zeros_like(bias))
