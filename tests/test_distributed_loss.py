"""ClipLoss on two and four processes: open_clip's, in all four combinations, and the single process's."""

from __future__ import annotations

import importlib
import itertools
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import clipfast
from clipfast import reference, tuning
from clipfast.loss import ClipLoss, contrastive_loss

from . import peers

N, WIDTH, SCALE = 6, 10, 14.3
FLAGS = list(itertools.product((False, True), repeat=2))


def features(world_size):
    """[world_size * N, WIDTH] of each tower, float64."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(world_size * N, WIDTH, generator=generator, dtype=torch.float64)
    text = image + torch.randn(image.shape, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=1), F.normalize(text, dim=1)


def leaves_of(rank, world_size, dtype):
    mine = slice(rank * N, (rank + 1) * N)
    leaves = [x[mine].to(dtype) for x in features(world_size)]
    return [x.clone().requires_grad_() for x in (*leaves, torch.tensor(SCALE, dtype=leaves[0].dtype))]


def results(loss, rank, world_size, dtype, weight):
    """[loss, gradients of image, text and scale]; weight: of this process's loss."""
    leaves = leaves_of(rank, world_size, dtype)
    value = loss(*leaves)
    gradients = torch.autograd.grad(value * weight, leaves)
    return [value.detach(), *gradients]


def everything(rank, world_size):
    """{(who, local_loss, gather_with_grad, ...): results} of this process, ours and open_clip's."""
    found = {}
    theirs = peers.open_clip_loss()
    # losses that count differently on each process show whose gradient goes where
    for flags, weight in itertools.product(FLAGS, (1.0, rank + 0.5)):
        for who, kind in (("ours", ClipLoss), ("theirs", theirs)):
            loss = kind(*flags, rank=rank, world_size=world_size)
            found[(who, *flags, weight == 1)] = results(loss, rank, world_size, torch.float64, weight)
    for flags in FLAGS:
        loss = ClipLoss(*flags, rank=rank, world_size=world_size)
        with clipfast.backend("triton"):
            found[("triton", *flags, True)] = results(loss, rank, world_size, torch.float32, 1.0)
    return found


def wrong_calls(rank, world_size):
    """The messages of calls that cannot be right, by name."""
    image, text, scale = leaves_of(rank, world_size, torch.float64)
    uneven = image[: N - rank], text[: N - rank], scale
    loss = contrastive_loss(image, text, scale, rank=rank, world_size=world_size)
    calls = {
        "uneven": lambda: contrastive_loss(*uneven, rank=rank, world_size=world_size),
        "another world": lambda: contrastive_loss(image, text, scale, rank=rank, world_size=world_size + 1),
        "twice": lambda: torch.autograd.grad(loss, image, create_graph=True),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _work(rank, world_size, folder):
    torch.set_num_threads(1)
    tuning.loss_side = lambda device: 4
    # open_clip's: imported within the group, its defaults would keep the group's threads past the end
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world_size)
    torch.save((everything(rank, world_size), wrong_calls(rank, world_size)), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def world(request):
    """What every process found, by rank."""
    peers.open_clip_loss()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.multiprocessing.spawn(_work, (request.param, folder), nprocs=request.param)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("alike", [True, False], ids=["losses alike", "losses weighted"])
@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_as_open_clip(local_loss, gather_with_grad, alike, world):
    for found, _ in world:
        key = (local_loss, gather_with_grad, alike)
        for ours, theirs in zip(found[("ours", *key)], found[("theirs", *key)], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)
def test_the_triton_kernels_too(local_loss, gather_with_grad, world):
    for found, _ in world:
        key = (local_loss, gather_with_grad, True)
        for ours, theirs in zip(found[("triton", *key)], found[("theirs", *key)], strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("local_loss", [False, True])
def test_averaged_as_by_ddp_it_is_the_single_process(local_loss, world):
    """With gather_with_grad the mean over processes of what each one's parameters get is the large batch's gradient."""
    leaves = [x.requires_grad_() for x in (*features(len(world)), torch.tensor(SCALE, dtype=torch.float64))]
    loss = reference.contrastive_loss(*leaves)
    image, text, scale = torch.autograd.grad(loss, leaves)
    found = [each["ours", local_loss, True, True] for each, _ in world]
    torch.testing.assert_close(torch.stack([each[0] for each in found]).mean(), loss.detach())
    torch.testing.assert_close(torch.cat([each[1] for each in found]) / len(world), image)
    torch.testing.assert_close(torch.cat([each[2] for each in found]) / len(world), text)
    torch.testing.assert_close(torch.stack([each[3] for each in found]).mean(), scale)


def test_every_process_says_what_is_wrong(world):
    for rank, (_, messages) in enumerate(world):
        shapes = [[N - other, WIDTH] for other in range(len(world))]
        assert messages["uneven"] == (
            f"ValueError: image_features must have one shape on every process, got {shapes} by rank"
        )
        assert f"but this process is rank {rank} of {len(world)}" in messages["another world"]
        assert "no second derivatives across processes" in messages["twice"]
