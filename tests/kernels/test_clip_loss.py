"""The Triton loss: statistics in one launch, the backward's tiles, and both through the public function."""

from __future__ import annotations

import pytest
import torch

import clipfast
from clipfast import reference, tuning
from clipfast.kernels import clip_loss as module
from clipfast.kernels import loss_tiles
from clipfast.kernels.loss_tiles import Softmaxes
from clipfast.loss import contrastive_loss

from ..accuracy import assert_accurate
from ..losses import assert_all_right, features, peer_loss, with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def small_launches(monkeypatch):
    """Two blocks of rows a launch and two tiles of columns a program, so that there are several of each."""
    tile = tuning.TileConfig(16, 16, 32, warps=4, stages=2)
    monkeypatch.setattr(tuning, "loss_statistics", lambda *_: tuning.LossStatisticsConfig(tile, blocks=2, tiles=2))
    monkeypatch.setattr(tuning, "loss_side", lambda device: 50)


def triton_loss(*arguments):
    with clipfast.backend("triton"):
        return contrastive_loss(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("n", "width", "scale"), [(1, 5, 14.3), (16, 64, 14.3), (83, 129, 30.0), (70, 32, 1.0)])
def test_against_float64(n, width, scale, dtype, device, poisoned_memory, small_launches):
    draws = 64 if n < 64 or device != "cpu" else 8
    pairs = [[x.to(device) for x in features(n, width, noise=3.0, dtype=dtype)] for _ in range(draws)]
    assert_all_right(pairs, torch.tensor(scale, device=device), loss=triton_loss)


def torch_loss(*arguments):
    with clipfast.backend("torch"):
        return contrastive_loss(*arguments)


@pytest.mark.parametrize("loss", [triton_loss, torch_loss], ids=["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_products_in_half_precision(dtype, loss, device, poisoned_memory, small_launches, monkeypatch):
    """As on a GPU: operands are half precision, so the logits' gradients are rounded to it; sums are float32."""
    if device == "cpu":
        monkeypatch.setattr(loss_tiles, "_half_products", lambda x: x.dtype.itemsize == 2)
        monkeypatch.setattr(loss_tiles, "_product", lambda a, b: a.float() @ b.float())
    pairs = [[x.to(device) for x in features(83, 64, noise=3.0, dtype=dtype)] for _ in range(8)]
    assert_all_right(pairs, torch.tensor(30.0, device=device), loss=loss)


@pytest.mark.parametrize("n", [16, 130, 300])
def test_the_configurations_that_tuning_returns(n, device, poisoned_memory):
    """A block of 16, of 64 and of 128 rows."""
    pairs = [[x.to(device) for x in features(n, 64, dtype=torch.float16)] for _ in range(64 if n < 64 else 3)]
    assert_all_right(pairs, torch.tensor(14.3, device=device), loss=triton_loss)


@pytest.mark.parametrize(("n", "others", "offset"), [(5, 20, 5), (33, 99, 66), (40, 80, 0)])
def test_some_of_the_rows(n, others, offset, device, poisoned_memory, small_launches):
    """As one process of several has them, with weights and with the two softmaxes apart; as the PyTorch backend."""
    images, texts = (x.to(device) for x in features(others, 40))
    images = images[offset : offset + n]
    scale = torch.tensor(10.0, device=device)
    rows, cols = module.statistics(images, texts, scale, offset)
    expected = loss_tiles.statistics(images, texts, scale, offset)
    torch.testing.assert_close(rows, expected[0])
    torch.testing.assert_close(cols, expected[1])
    products = torch.randn(others, device=device)
    products[offset : offset + n] = rows[2]
    for separate in (False, True):
        softmaxes = (
            Softmaxes(*rows, torch.rand(n, device=device)),
            Softmaxes(*cols, products, torch.rand(others, device=device)),
        )
        arguments = (images, texts, scale, offset, scale, *softmaxes, separate, (True, True))
        for ours, theirs in zip(module.gradients(*arguments), loss_tiles.gradients(*arguments), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_features_that_are_rows_of_wider_tensors(device, small_launches):
    """The embeddings of both towers in one tensor, or with more beside them; what lies between is not read."""
    scale = torch.tensor(10.0, device=device)
    views = []
    for x, width in zip(features(40, 16), (19, 32), strict=True):
        wide = torch.full((40, width), float("nan"), device=device)
        views.append(wide[:, :16].copy_(x))
    found, wanted = (
        with_gradients(triton_loss, *(change(x) for x in views), scale) for change in (lambda x: x, torch.clone)
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_logits_of_any_size(device):
    """Duplicates at scale 100, and logits from -10,000 to 10,000."""
    image, text = (x.to(device) for x in features(40, 16))
    sizes = torch.logspace(-2, 2, 40, device=device)[:, None]
    for a, b, scale in (
        (image, -image, 100.0),
        (image * sizes, text * sizes, 1.0),
        (image[:1].repeat(40, 1),) * 2 + (100.0,),
    ):
        scale = torch.tensor(scale, device=device)
        exact = reference.contrastive_loss(a.double(), b.double(), scale.double())
        assert_accurate(triton_loss(a, b, scale), peer_loss(a, b, scale), exact)


def test_twice_the_same_bits(device, small_launches):
    image, text = (x.to(device) for x in features(70, 32, dtype=torch.bfloat16))
    scale = torch.tensor(20.0, device=device)
    for a, b in zip(*(with_gradients(triton_loss, image, text, scale) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_registered(device):
    image, text = (x.to(device) for x in features(20, 16))
    scale = torch.tensor(10.0, device=device)
    rows, cols = module.statistics(image, text, scale, 0)
    torch.library.opcheck(torch.ops.clipfast.clip_loss_statistics.default, (image, text, scale, 0, False))
    arguments = (image, text, scale, 0, scale, [*rows, None], [*cols, rows[2], None], False, (True, True))
    torch.library.opcheck(torch.ops.clipfast.clip_loss_gradients.default, arguments)
