"""One query for each sequence on a CPU: within the house rule in every form that this CPU can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipfast.kernels import cpu_attention_pool
from clipfast.packing import Rows

from . import csrc
from .accuracy import assert_accurate
from .op_cases import Case, pool_case

pytestmark = pytest.mark.usefixtures("cpu_library")
DTYPES = [torch.float32, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def run(case: Case, form: str = "best") -> Tensor:
    query, tokens, offsets, *projections = case.arguments
    return cpu_attention_pool.attention_pool(query, tokens, Rows.of(offsets), *projections, case.options["heads"], form)


def check(case: Case, form: str) -> None:
    before = [x.clone() for x in case.tensors()]
    assert_accurate(run(case, form), *case.peer(), *case.exact())
    assert all(torch.equal(x, y) for x, y in zip(before, case.tensors(), strict=True))


# lengths, width, heads, width of all heads: CLIP's own; more sequences than share a weight; odd sizes; large scores
CASES = [
    ([50], 768, 12, 768, {}),
    ([257, 257], 1024, 16, 1024, {}),
    ([9, 24, 8, 13, 17] * 7, 512, 8, 512, {}),
    ([1] * 33, 64, 2, 64, {}),
    ([17, 5, 1], 93, 3, 33, {"bias": False}),
    ([30, 30, 9] * 24, 128, 2, 128, {"size": 3}),
    ([7, 31] * 9, 31, 7, 35, {}),
    ([3] * 12, 1, 5, 5, {}),
]


@by_dtype
@pytest.mark.parametrize(("lengths", "width", "heads", "inner", "options"), CASES, ids=str)
def test_shapes(form, lengths, width, heads, inner, options, dtype):
    torch.manual_seed(0)
    check(pool_case(lengths, width, heads, inner, **options).map(lambda x: x.to(dtype)), form)


@by_dtype
def test_how_tensors_lie_in_memory(form, dtype):
    """Strided rows, transposed weights, biases of another dtype; the keys' bias cancels."""
    case = pool_case([5, 9], 64, 2).map(lambda x: x.to(dtype))
    query, tokens, offsets, wq, bq, wk, bk, wv, bv = case.arguments
    expected = run(case, form)
    query, tokens, bv = (torch.stack([x, x], dim=-1)[..., 0] for x in (query, tokens, bv))
    other = (query, tokens, offsets, wq.t().contiguous().t(), bq.double(), wk, bk + 100, wv, bv)
    assert torch.equal(run(case._replace(arguments=other), form), expected)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=0, max_size=40),
    width=st.integers(1, 90),
    heads=st.integers(1, 9),
    head_width=st.integers(1, 20),
    threads=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_and_threads(lengths, width, heads, head_width, threads, dtype):
    case = pool_case(lengths, width, heads, heads * head_width).map(lambda x: x.to(dtype))
    expected = run(case)
    with csrc.threads(threads):
        assert torch.equal(run(case), expected)
    rtol = 0.51 * torch.finfo(torch.bfloat16).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(expected.double(), *case.exact(), rtol=rtol, atol=2e-5)


@by_dtype
def test_a_sequence_has_the_same_alone(form, dtype):
    """Whatever is in the batch beside it: to the bit."""
    case = pool_case([13, 50, 2] * 9, 96, 3).map(lambda x: x.to(dtype))
    query, tokens, offsets, *projections = case.arguments
    together = run(case, form)
    for i in (0, 1, 17, 26):
        start, stop = offsets[i : i + 2]
        alone = (query[i : i + 1], tokens[start:stop], [0, stop - start], *projections)
        assert torch.equal(run(case._replace(arguments=alone), form), together[i : i + 1])


def test_nan_stays_in_its_sequence(form):
    case = pool_case([4, 6, 3], 64, 2)
    case.arguments[1][5, 7] = float("nan")
    assert run(case, form).isnan().all(dim=1).tolist() == [False, True, False]


def test_dtypes_that_differ():
    query, tokens, offsets, wq, *others = pool_case([3], 8, 2).arguments
    with pytest.raises(TypeError, match=r"tokens are torch.float32, q_weight torch.bfloat16: they must have one dtype"):
        run(Case("attention_pool", (query, tokens, offsets, wq.bfloat16(), *others), {"heads": 2}))
