"""Streams, threads and devices of a GPU: nothing is read before it is written, nor after it is freed.

Without a GPU each test skips, and with one those of two devices. Not yet run on a GPU. What of it a CPU can show is in
tests/test_packing.py and tests/test_graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import clipfast
from clipfast import compat
from clipfast.packing import Rows

from .backends import on_gpu, on_two_gpus
from .clips import make_images, make_texts, randomise
from .op_cases import case_in

SIZES = (16, 16, 2, 32, 8, 12, 60, 32, 2, 2)
# of every operator a small one
OPERATORS = [
    "layer_norm (50,) 192",
    "linear (70,) 191 37 ['activation']",
    "mlp (50, 2) 192 {}",
    "attention [77, 40] {'size': 5} True",
    "attention_pool [17, 5] 96 ['bias']",
    "patch_embed uint8 norm",
    "project 5 31",
    "logits 13 7",
]


@pytest.fixture(params=[False, True], ids=["launched", "replayed"])
def model(request, gpu) -> Iterator[clipfast.CLIP]:
    made = randomise(clipfast.CLIP(*SIZES, vision_heads=2)).cuda().requires_grad_(False)
    made.cuda_graphs = request.param
    with torch.no_grad():
        yield made


def encoded(model: clipfast.CLIP, seed: int) -> Callable[[], Tensor]:
    """A call of both towers on a batch of its own, whose tensors are there already."""
    device = model.positional_embedding.device
    images, text = make_images(SIZES, 2, seed).to(device), make_texts(SIZES, 3).to(device)

    def run() -> Tensor:
        with torch.no_grad(), clipfast.backend("triton"):
            return torch.cat([model.encode_image(images), model.encode_text(text)])

    return run


def test_batches_by_turns_in_two_streams(model):
    calls = [encoded(model, seed) for seed in range(8)]
    wanted = [call() for call in calls]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    got = []
    for i, call in enumerate(calls):
        with torch.cuda.stream(streams[i % 2]):
            got.append(call())
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, wanted))


def test_threads_with_a_stream_each(model):
    calls = [encoded(model, seed) for seed in range(4)]
    wanted = [call() for call in calls]
    torch.cuda.synchronize()

    def work(call: Callable[[], Tensor]) -> list[Tensor]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = [call() for _ in range(20)]
        stream.synchronize()
        return found

    with ThreadPoolExecutor(len(calls)) as pool:
        for found, right in zip(pool.map(work, calls), wanted, strict=True):
            assert all(torch.equal(each, right) for each in found)


@on_gpu
def test_a_plan_that_one_stream_copies_is_not_read_by_another_before():
    """The first stream has work that holds up the copy; the second one runs at once, on rows that both share."""
    from clipfast.kernels import attention

    # of no other test, so that nothing is derived from them yet
    rows = Rows.fixed(3, 61)
    qkv = torch.randn(rows.total, 3, 2, 64, device="cuda").bfloat16()
    wanted = attention.attention(qkv, Rows(rows.lengths), False, None)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        compat.hold_gpu(10**9)
        late = attention.attention(qkv, rows, False, None)
    with torch.cuda.stream(second):
        early = attention.attention(qkv, rows, False, None)
    torch.cuda.synchronize()
    assert torch.equal(early, wanted) and torch.equal(late, wanted)


@on_gpu
def test_a_callers_own_graph():
    """Warmed up in a stream and captured in another, as PyTorch's documentation does it."""
    model = randomise(clipfast.CLIP(*SIZES, vision_heads=2)).cuda().requires_grad_(False)
    model.cuda_graphs = False
    images, others = (make_images(SIZES, 5, seed).cuda() for seed in range(2))
    with torch.no_grad(), clipfast.backend("triton"):
        wanted = model.encode_image(others)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                model.encode_image(images)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model.encode_image(images)
    images.copy_(others)
    graph.replay()
    assert torch.equal(output, wanted)


@on_two_gpus
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_on_the_second_gpu(name):
    """Though the first one is current: it runs where its tensors are, and leaves the current device as it was."""
    case = case_in(name, torch.bfloat16)
    with torch.no_grad(), clipfast.backend("triton"):
        first, second = case.on("cuda:0").ours()[0], case.on("cuda:1").ours()[0]
    assert second.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(first.cpu(), second.cpu(), rtol=0.02, atol=0.02)


@on_two_gpus
def test_towers_on_the_second_gpu(model):
    first = encoded(model, 0)()
    model.to("cuda:1")
    second = encoded(model, 0)()
    assert second.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(second.cpu(), first.cpu(), rtol=1e-4, atol=1e-4)
