"""What the files of the pytest-benchmark suite share: the problems of an operator, and one measurement.

    pytest benchmarks --benchmark-autosave      # keep this commit's times under .benchmarks/
    pytest benchmarks --benchmark-compare       # beside the last ones kept

Times of two commits say something on one quiet machine only, and no test asserts one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu import problems
from benchmarks.gpu.problems import Maker, Problem
from clipfast import roofline
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import workload

MODEL, CAPTIONS = "ViT-B/32", workload.Captions(8, 24)
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def of(operator: str) -> Iterator[Problem]:
    """The shapes that both towers give the operator, in each dtype and batch size."""
    width = ARCHITECTURES[MODEL]["vision_width"]
    for dtype in DTYPES:
        maker = Maker(DEVICE, getattr(torch, dtype))
        for batch in BATCHES:
            found = [*problems.of_images(MODEL, batch, maker), *problems.of_texts(MODEL, CAPTIONS, batch, maker)]
            found.append(problems.mlp(MODEL, 50 * batch, width, batch, maker))
            found.append(problems.logits(MODEL, batch, 1000, 512, maker))
            yield from (problem for problem in found if problem.operator == operator)


def shapes_of(operator: str) -> pytest.MarkDecorator:
    """The parameter `problem` of a test."""
    return pytest.mark.parametrize("problem", of(operator), ids=Problem.title)


def measure(benchmark, problem: Problem) -> None:
    """Compare with float64 and eager PyTorch, then time, and note the rates."""
    case = problem.make()
    with torch.no_grad():
        ours = problems.as_tuple(case.ours())[0]
        problems.check(ours, case, case.peer()[0], what=problem.title())
        benchmark(_synchronised, case)
    if benchmark.stats:
        work, median = roofline.total(problem.works), benchmark.stats["median"]
        benchmark.extra_info |= {"gb_per_s": work.bytes / median / 1e9, "gflops": work.flops / median / 1e9}


def _synchronised(case) -> None:
    case.ours()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
