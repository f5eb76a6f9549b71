"""Batches follow from (seed, epoch, sample) alone, and a bad sample is named, replaced and never fatal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import clipfast
from clipfast.commands import CommandError
from clipfast.preprocess import Preprocess
from clipfast.training.data import BatchOrder, PairDataset, RandomResizedCrop, make_loader
from clipfast.training.samples import DataSource, FolderSamples, find_samples

from .pairs import caption_of, make_image, write_folder

N, BATCH, STEPS = 11, 4, 5


def batches(root, workers=0, seed=0, **order):
    samples = find_samples(DataSource([str(root)]))
    dataset = PairDataset(samples, RandomResizedCrop(32), 16, seed)
    return list(make_loader(dataset, BatchOrder(len(samples), BATCH, STEPS, seed, **order), workers))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.tokens, other.tokens)
        assert one.bad == other.bad


def test_batches_do_not_depend_on_workers_or_on_where_a_run_goes_on(tmp_path):
    root = write_folder(tmp_path, N)
    (root / "b" / "004.png").write_bytes(b"")
    alone = batches(root)
    assert alone[0].images.shape == (BATCH, 3, 32, 32) and alone[0].images.dtype == torch.uint8
    assert alone[0].tokens.shape == (BATCH, 16)
    assert any(batch.bad for batch in alone)
    torch.manual_seed(5)  # nothing comes from torch's generator
    assert_same(batches(root, workers=2), alone)
    assert_same(batches(root, start=3), alone[3:])
    assert not torch.equal(batches(root, seed=1)[0].images, alone[0].images)


def test_processes_share_the_batch_of_one(tmp_path):
    root = write_folder(tmp_path, N)
    halves = [batches(root, rank=rank, world=2) for rank in range(2)]
    for whole, first, second in zip(batches(root), *halves, strict=True):
        assert torch.equal(torch.cat([first.images, second.images]), whole.images)
        assert torch.equal(torch.cat([first.tokens, second.tokens]), whole.tokens)


def test_an_epoch_has_each_sample_at_most_once_and_every_epoch_another_order():
    order = BatchOrder(N, BATCH, 4, seed=3)
    assert order.steps_per_epoch == 2 and len(order) == 4
    keys = list(order)
    epochs = [keys[0] + keys[1], keys[2] + keys[3]]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert len({i for _, i in epoch}) == 2 * BATCH
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    assert set(order.order(0)) == set(range(N))


def test_each_epoch_crops_anew(tmp_path):
    samples = find_samples(DataSource([str(write_folder(tmp_path, 3))]))
    dataset = PairDataset(samples, RandomResizedCrop(32), 16, 0)
    first, second, again = (dataset.__getitems__([(epoch, 1)]).images for epoch in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_bad_samples_are_named_and_replaced(tmp_path):
    root = write_folder(tmp_path, N)
    (root / "b" / "000.png").write_bytes(b"")
    (root / "a" / "001.png").write_text("no image")
    (root / "b" / "002.png").write_bytes((root / "b" / "002.png").read_bytes()[:300])
    (root / "a" / "003.txt").write_text("  \n")
    (root / "b" / "004.txt").unlink()
    (root / "a" / "005.txt").write_bytes(b"caf\xe9")
    (root / "b" / "006.png").unlink()
    (root / "b" / "006.png").symlink_to(root / "nowhere.png")
    samples = find_samples(DataSource([str(root)]))
    batch = PairDataset(samples, RandomResizedCrop(32), 16, 0).__getitems__([(0, i) for i in range(N)])
    assert len(batch.images) == len(batch.tokens) == N
    reasons = {sample.name: sample.reason for sample in batch.bad}
    expected = {
        "b/000.png": "is empty",
        "a/001.png": "not an image",
        "b/002.png": "truncated or damaged",
        "a/003.png": "empty caption",
        "b/004.png": "b/004.png: {root}/b/004.txt: No such file",
        "a/005.png": "can't decode byte 0xe9",
        "b/006.png": "006.png: No such file",
    }
    assert reasons.keys() == {str(root / name) for name in expected}
    for name, text in expected.items():
        reason = reasons[str(root / name)]
        assert text.replace("{root}", str(root)) in reason and name in reason
    good = {tuple(clipfast.tokenize(caption_of(number), 16)[0].tolist()) for number in range(7, N)}
    assert {tuple(row) for row in batch.tokens.tolist()} <= good


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples_is_an_error(tmp_path, workers):
    from clipfast.training.trainer import _next

    for number in range(BATCH):
        (tmp_path / f"{number}.png").touch()
    dataset = PairDataset(FolderSamples(tmp_path, ["0.png"] * 4), RandomResizedCrop(32), 16, 0)
    loader = iter(make_loader(dataset, BatchOrder(4, BATCH, 1, 0), workers))
    with pytest.raises(CommandError, match=r"^100 samples in a row cannot be read; the last: .*0.txt: No such file"):
        _next(loader)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(CommandError, match="3 samples, fewer than one batch of 4"):
        BatchOrder(3, 4, 1, 0)
    with pytest.raises(CommandError, match="batch of 4 .* does not divide among 3 processes"):
        BatchOrder(9, 4, 1, 0, world=3)


def test_crop_scales_the_part_that_box_names():
    crop, image = RandomResizedCrop(32, (0.3, 0.6)), make_image(3, (61, 47))
    box = crop.box(*image.size, np.random.default_rng(1))
    pixels = crop(image, np.random.default_rng(1))
    part = image.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels.numpy(), np.asarray(part).transpose(2, 0, 1))


def test_crops_have_the_area_and_the_shape_asked_for():
    crop, rng = RandomResizedCrop(32, (0.5, 0.7)), np.random.default_rng(0)
    boxes = np.array([crop.box(400, 300, rng) for _ in range(500)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, ratio = across * down / 120_000, across / down
    assert 0.495 < share.min() < 0.51 and 0.69 < share.max() < 0.705
    assert 0.74 < ratio.min() < 0.78 and 1.27 < ratio.max() < 1.34
    assert boxes.min() == 0 and boxes[:, 2].max() == 400 and boxes[:, 3].max() == 300


@pytest.mark.parametrize("size", [(1, 1), (1000, 10), (10, 1000), (3, 2)])
def test_crops_of_any_shape_stay_inside(size):
    left, top, right, bottom = RandomResizedCrop(32).box(*size, np.random.default_rng(0))
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_grey_and_transparent_images_become_rgb():
    for mode in ("L", "RGBA", "P", "1"):
        pixels = RandomResizedCrop(32, (1.0, 1.0), (1.0, 1.0))(
            make_image(1, (32, 32)).convert(mode), np.random.default_rng(0)
        )
        expected = Preprocess(32, output="uint8")(make_image(1, (32, 32)).convert(mode))
        assert torch.equal(pixels, expected), mode
