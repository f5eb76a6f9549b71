"""The Triton logits: cosine times scale in one launch."""

from __future__ import annotations

import pytest
import torch

from clipfast import reference
from clipfast.kernels import contrastive as module

from ..accuracy import assert_accurate
from ..op_cases import PEERS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("images", "texts", "width"), [(1, 1, 512), (16, 65, 96), (17, 3, 1024), (130, 70, 101)])
def test_against_float64(images, texts, width, dtype, device, poisoned_memory):
    a, b = (3 * torch.randn(images, width)).to(device, dtype), (0.1 * torch.randn(texts, width)).to(device, dtype)
    for log_scale in (-2.0, 0.0, 4.6052):
        scale = torch.tensor(log_scale, device=device)
        got, transposed = module.logits(a, b, scale)
        exact, _ = reference.logits(a.double().cpu(), b.double().cpu(), scale.double().cpu())
        assert_accurate(got, PEERS["logits"](a, b, scale)[0], exact)
        assert torch.equal(got.t(), transposed)


def test_a_feature_times_itself_is_the_scale(device):
    features = 40 * torch.randn(20, 768, device=device, dtype=torch.float16)
    got, _ = module.logits(features, features, torch.tensor(4.6052, device=device))
    torch.testing.assert_close(got.diagonal().float().cpu(), torch.full((20,), 100.0), rtol=1e-3, atol=0)


def test_a_row_of_zeros_is_nan_there_alone(device):
    a, b = torch.randn(3, 64, device=device), torch.randn(4, 64, device=device)
    a[1] = 0
    got, _ = module.logits(a, b, torch.tensor(0.0, device=device))
    assert got.isnan().any(1).tolist() == [False, True, False]


def test_empty_and_strided(device):
    scale = torch.tensor(0.5, device=device)
    a, b = torch.randn(5, 3, 64, device=device)[:, 1], torch.randn(64, 4, device=device).t()
    wider = torch.randn(4, 3, 64, device=device)[:, 2]
    for texts in (b, wider):
        torch.testing.assert_close(module.logits(a, texts, scale)[0], PEERS["logits"](a, texts, scale)[0])
    assert module.logits(a[:0], b, scale)[0].shape == (0, 4)
    assert module.logits(a, b[:0], scale)[1].shape == (0, 5)


def test_registered(device):
    a, b = torch.randn(5, 64, device=device), torch.randn(7, 64, device=device)
    torch.library.opcheck(torch.ops.clipfast.logits.default, (a, b, torch.tensor(1.0, device=device), False))
