"""Whole towers of ViT-B/32: `pytest benchmarks/test_towers.py`."""

import pytest
import torch

from benchmarks.suite import BATCHES, DTYPES
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import workload
from clipfast.bench.peers import Batch, Spec, ours

SIZES = ARCHITECTURES["ViT-B/32"]


@pytest.fixture(scope="module", params=DTYPES)
def prepare(request):
    spec = Spec(workload.random_weights(SIZES), SIZES, getattr(torch, request.param))
    return ours.build(spec)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("tower", workload.TOWERS)
def test_towers(benchmark, prepare, tower, batch):
    data = workload.inputs(SIZES, batch, workload.Captions(8, 24))
    (call,) = prepare(tower, Batch(data["image"], data["text"])).values()
    benchmark(call)
    benchmark.extra_info["samples_per_s"] = batch / benchmark.stats["median"] if benchmark.stats else None
