"""Attention of packed rows on a CPU: within the house rule in every form of libclipfast_cpu that this CPU can run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clipfast
from clipfast import ops
from clipfast.kernels import cpu_attention
from clipfast.packing import Rows

from . import csrc
from .accuracy import assert_accurate
from .op_cases import Case, attention_case

pytestmark = pytest.mark.usefixtures("cpu_library")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(case: Case, form: str = "best") -> Tensor:
    qkv, offsets = case.arguments
    options = case.options
    return cpu_attention.attention(qkv, Rows.of(offsets), options["causal"], options.get("scale"), form)


def check(case: Case, form: str = "best", what: str = "") -> None:
    before = case.arguments[0].clone()
    assert_accurate(run(case, form), *case.peer(), *case.exact(), what=what)
    assert torch.equal(before, case.arguments[0])


# CLIP's own lengths; captions; primes on both sides of a block of queries and of a chain of keys; nothing between
LENGTHS = [
    ([50] * 3, 12),
    ([197], 3),
    ([257], 2),
    ([577], 1),
    ([77, 77, 40], 8),
    ([8, 9, 9, 13, 16, 17, 23, 24], 8),
    ([1, 2, 3, 1], 5),
    ([0, 5, 0, 0, 7, 0], 3),
    ([47, 48, 49, 95, 97], 2),
    ([127, 128, 129], 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "heads"), LENGTHS, ids=str)
def test_lengths(form, lengths, heads, causal, dtype):
    torch.manual_seed(0)
    check(attention_case(lengths, heads, causal=causal).map(lambda x: x.to(dtype)), form)


@pytest.mark.parametrize("width", [1, 3, 16, 24, 31, 32, 48, 80, 96, 100, 128, 160])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
def test_widths_of_heads(form, width, dtype):
    torch.manual_seed(0)
    for causal in (True, False):
        check(attention_case([19, 50, 3], 3, width, causal=causal, scale=0.3).map(lambda x: x.to(dtype)), form)


@pytest.mark.parametrize("size", [0.01, 5, 50])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
def test_flat_and_sharp_softmaxes(form, size, dtype):
    torch.manual_seed(0)
    check(attention_case([77, 50, 257], 4, causal=True, size=size).map(lambda x: x.to(dtype)), form)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    heads=st.integers(1, 4),
    width=st.integers(1, 70),
    causal=st.booleans(),
    threads=st.integers(1, 5),
)
def test_any_lengths_and_threads(lengths, heads, width, causal, threads):
    """With more threads than heads they share the queries of a head. A peer may do well by luck on a few numbers."""
    case = attention_case(lengths, heads, width, causal=causal)
    with csrc.threads(threads):
        torch.testing.assert_close(run(case).double(), *case.exact(), rtol=0, atol=1e-5)


def test_threads_change_nothing(form):
    case = attention_case([257, 50, 8], 2, causal=False)
    results = []
    for count in (1, 2, 7):
        with csrc.threads(count):
            results.append(run(case, form))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_does_not_depend_on_its_neighbours(form, causal):
    case = attention_case([9, 50, 31], 3, causal=causal)
    whole = run(case, form)
    qkv = case.arguments[0]
    for first, last in ((0, 9), (9, 59), (59, 90)):
        alone = cpu_attention.attention(qkv[first:last].clone(), Rows((last - first,)), causal, None, form)
        assert torch.equal(alone, whole[first:last])


def test_every_row_counts(form):
    """Changing one query, key or value changes exactly the rows that may see it."""
    case = attention_case([20, 30], 2, causal=True)
    before = run(case, form)
    for which, seen_by in ((0, [25]), (1, range(25, 50)), (2, range(25, 50))):
        qkv = case.arguments[0].clone()
        qkv[25, which, 1] += 1
        changed = (run(case._replace(arguments=(qkv, case.arguments[1])), form) != before).view(50, 2, 64).any(-1)
        assert not changed[:, 0].any()
        assert changed[:, 1].nonzero().flatten().tolist() == list(seen_by)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_sequence_and_head(form, bad, dtype):
    """Rows before it may have it too, as in PyTorch's: a weight of zero times infinity."""
    case = attention_case([20, 30], 2, causal=True).map(lambda x: x.to(dtype))
    case.arguments[0][25, 2, 1, 3] = bad
    out = run(case, form).view(50, 2, 64)
    assert out[:20].isfinite().all() and out[:, 0].isfinite().all()
    assert not out[25:, 1, 3].isfinite().any()
    case.arguments[0][25, 1, 0, 3] = float("nan")
    out = run(case, form).view(50, 2, 64)
    assert out[25:, 0].isnan().all() and out[:20].isfinite().all()


def test_bfloat16_is_rounded_to_the_nearest_and_to_even(form):
    """One key: the value itself, times one; two equal keys: the mean of two neighbours lies in the middle."""
    values = torch.tensor([1.0, 1.0078125, -3.5, 1e-30, 65280.0, 0.0]).bfloat16()
    qkv = torch.zeros(2, 3, 1, len(values), dtype=torch.bfloat16)
    qkv[0, 2, 0], qkv[1, 2, 0] = values, torch.nextafter(values, values * 2)
    exact = qkv[:, 2, 0].double().mean(0)
    out = cpu_attention.attention(qkv, Rows((2,)), False, None, form)
    assert torch.equal(out, exact.float().bfloat16().expand(2, -1))
    assert torch.equal(cpu_attention.attention(qkv[:1], Rows((1,)), True, None, form)[0], values)


def test_a_scale_of_zero_takes_the_mean():
    check(attention_case([5, 9], 2, causal=True, scale=0.0))


def test_rows_with_gaps_between_them():
    qkv = torch.randn(2 * 20, 4, 3, 64)[::2, 1:]
    check(Case("attention", (qkv, [0, 8, 20]), {"causal": True}))


def test_nothing_to_do():
    assert run(attention_case([], 2, causal=True)).shape == (0, 128)
    assert run(attention_case([0, 0], 2, causal=False)).shape == (0, 128)


def test_operator():
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (torch.randn(7, 3, 2, 16), Rows((3, 4)).offsets(), True, 0.25, "best")
    torch.library.opcheck(torch.ops.clipfast.cpu_attention.default, arguments, test_utils=tests)


def test_gradients_are_refused():
    qkv = torch.randn(7, 3, 2, 16, requires_grad=True)
    assert ops.attention(qkv, [0, 7], causal=True).requires_grad
    with clipfast.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' cannot run attention: inference only"):
        ops.attention(qkv, [0, 7], causal=True)
