"""Micro-batches give the gradient of the whole batch, in one process and in two."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import clipfast
from clipfast.loss import ClipLoss
from clipfast.training.processes import processes
from clipfast.training.step import Pairs, accumulate_gradients
from tests.tiny_clips import RESNET, VIT


def plain_loss(image, text, scale):
    """The definition, of the whole batch."""
    logits = scale * image @ text.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def make_pairs(config=VIT, seed=0):
    torch.manual_seed(seed)
    return Pairs(clipfast.CLIP(*config).double().train())


def inputs(batch=7, config=VIT):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch, 3, config[1], config[1]), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 48, (batch, 8), generator=generator)
    tokens[torch.arange(batch), torch.arange(batch) % 8] = 49
    return images, tokens


def gradients(pairs, **options):
    pairs.zero_grad()
    value = accumulate_gradients(pairs, *inputs(), plain_loss, **options)
    assert not value.requires_grad
    return value, {name: parameter.grad.clone() for name, parameter in pairs.named_parameters()}


@pytest.mark.parametrize("micro_batch", [1, 3, 6, 7, 20])
def test_micro_batches_have_the_gradient_of_the_whole(micro_batch):
    pairs = make_pairs()
    image, text, scale = pairs(*inputs())
    expected = plain_loss(image, text, scale)
    exact = torch.autograd.grad(expected, list(pairs.parameters()))
    value, found = gradients(pairs, micro_batch=micro_batch)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)
    for (name, gradient), other in zip(found.items(), exact, strict=True):
        bound = 1e-12 * max(other.abs().max().item(), 1e-6)
        torch.testing.assert_close(gradient, other, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_added_and_scaled():
    pairs = make_pairs()
    _, once = gradients(pairs, micro_batch=3)
    _, scaled = gradients(pairs, micro_batch=3, scaled=lambda value: 1024 * value)
    accumulate_gradients(pairs, *inputs(), plain_loss, micro_batch=3)
    for name, parameter in pairs.named_parameters():
        torch.testing.assert_close(scaled[name], 1024 * once[name], rtol=1e-12, atol=1e-18)
        torch.testing.assert_close(parameter.grad, 1025 * once[name], rtol=1e-12, atol=1e-15)


def test_pairs_are_directions_and_a_positive_scale():
    pairs = make_pairs()
    images, tokens = inputs()
    image, text, scale = pairs(images, tokens)
    model = pairs.clip
    torch.testing.assert_close(image, F.normalize(model.encode_image(images), dim=-1))
    torch.testing.assert_close(text, F.normalize(model.encode_text(tokens), dim=-1))
    torch.testing.assert_close(scale, model.logit_scale.exp())


def test_features_are_float32_under_autocast_and_close_to_it():
    pairs = make_pairs().float()
    value, exact = gradients(pairs)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    for micro_batch in (None, 3):
        with autocast():
            image, text, _ = pairs(*inputs())
        assert image.dtype == text.dtype == torch.float32
        rounded, found = gradients(pairs, micro_batch=micro_batch, autocast=autocast)
        assert rounded != value
        assert abs(rounded - value) < 0.02 * value
        for name in ("clip.visual.conv1.weight", "clip.token_embedding.weight", "clip.visual.proj"):
            assert found[name].dtype == torch.float32
            assert F.cosine_similarity(found[name].flatten(), exact[name].flatten(), dim=0) > 0.98, name


def test_running_statistics_count_each_batch_once():
    pairs = make_pairs(RESNET)
    images, tokens = inputs(6, RESNET)
    accumulate_gradients(pairs, images, tokens, plain_loss, micro_batch=3)
    norms = [module for module in pairs.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.num_batches_tracked == 2 and norm.track_running_stats for norm in norms)


def _half(rank: int, port: int, path: str) -> None:
    """One of two processes: its half of eight pairs, whole and in micro-batches."""
    torch.set_num_threads(1)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()})
    with processes("cpu") as found:
        assert (found.rank, found.world, found.first) == (rank, 2, rank == 0)
        assert found.everyones(rank) == [0, 1] and found.from_first(rank) == 0
        assert found.mean(torch.tensor([float(rank)])).item() == 0.5
        torch.save([_gradients_of_half(rank, micro_batch) for micro_batch in (None, 3)], f"{path}/{rank}.pt")
    # the group is gone, threads and all: the interpreter may abort in leaving under one
    assert not [task for task in Path("/proc/self/task").glob("*/comm") if "gloo" in task.read_text()]


def _gradients_of_half(rank: int, micro_batch: int | None) -> list:
    # other weights in each, which the wrapper must even out
    pairs = DistributedDataParallel(make_pairs(seed=rank))
    images, tokens = (part[4 * rank : 4 * rank + 4] for part in inputs(8))
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=2)
    value = accumulate_gradients(pairs, images, tokens, loss, micro_batch=micro_batch)
    return [value, *(parameter.grad for parameter in pairs.parameters())]


def test_two_processes_have_the_gradient_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_half, (port, str(tmp_path)), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    pairs = make_pairs()
    expected = plain_loss(*pairs(*inputs(8)))
    exact = torch.autograd.grad(expected, list(pairs.parameters()))
    for first, second in zip(*halves, strict=True):
        torch.testing.assert_close((first[0] + second[0]) / 2, expected.detach(), rtol=1e-13, atol=0)
        for one, other, gradient in zip(first[1:], second[1:], exact, strict=True):
            assert torch.equal(one, other)
            bound = 1e-12 * max(gradient.abs().max().item(), 1e-6)
            torch.testing.assert_close(one, gradient, rtol=0, atol=bound)
