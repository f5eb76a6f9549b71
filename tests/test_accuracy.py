"""tests/accuracy.py: what the tolerance rule lets pass and what it does not."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import accuracy
from tests.accuracy import COSINE_GAPS, assert_accurate, assert_embeddings, bounds, cosine_gap, relative_rms, ulp
from tests.op_cases import attention_case, draw, linear_case

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _near(exact: torch.Tensor, dtype: torch.dtype, ulps: float, seed: int) -> torch.Tensor:
    """exact with an error of that many ulps, uniform with random signs, rounded to dtype."""
    sign = torch.where(_random(*exact.shape, seed=seed) < 0, -1.0, 1.0).double()
    return (exact + ulps * ulp(1.0, dtype) * sign).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_error_like_the_peers_passes_and_three_times_that_fails(dtype):
    exact = 1 + 0.4 * torch.rand(
        64, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )  # one binade: one ulp everywhere
    peer = _near(exact, dtype, 8, seed=1)
    assert_accurate(_near(exact, dtype, 8, seed=2), peer, exact)
    assert_accurate(_near(exact, dtype, 15, seed=2), peer, exact)
    with pytest.raises(AssertionError, match="RMS error"):
        assert_accurate(_near(exact, dtype, 24, seed=2), peer, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_exact_result_rounded_passes_beside_a_perfect_peer(dtype):
    exact = _random(50, 40)
    assert_accurate(exact.to(dtype), exact.to(dtype), exact)
    # one ulp more is allowed, two are not
    exact = torch.full((7,), 1.5, dtype=torch.float64)
    peer = exact.to(dtype)
    assert_accurate((exact + ulp(1.5, dtype)).to(dtype), peer, exact)
    with pytest.raises(AssertionError, match="max error"):
        assert_accurate((exact + 2 * ulp(1.5, dtype)).to(dtype), peer, exact)


@given(
    power=st.integers(-30, 15),
    mantissa=st.floats(1, 1.999),
    spread=st.floats(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_the_last_rounding_is_within_one_ulp_at_any_size(power, mantissa, spread, dtype, seed):
    """What the module's docstring claims: rounding alone passes, even if the peer's error is zero."""
    exact = mantissa * 2.0**power * torch.exp(-spread * _random(30, seed=seed).abs())
    error = exact.to(dtype).double() - exact
    assert error.abs().max() <= ulp(exact.abs().max().item(), dtype)
    assert error.square().mean().sqrt() <= ulp(exact.square().mean().sqrt().item(), dtype)


def test_one_wrong_element_among_many_fails_by_its_greatest_error():
    exact = _random(1000, 10)
    peer = exact.float()
    ours = peer.clone()
    ours[500, 5] += 1e-5
    with pytest.raises(AssertionError, match="max error"):
        assert_accurate(ours, peer, exact)


def test_many_small_errors_fail_by_their_root_mean_square():
    """One bad element of the peer excuses one of ours, not all of ours."""
    exact = 1 + 0.4 * torch.rand(100, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    peer = exact.float()
    peer[3, 3] += 1e-4
    ours = (exact + 5e-5).float()
    with pytest.raises(AssertionError, match="RMS error"):
        assert_accurate(ours, peer, exact)


@pytest.mark.parametrize("n", [1, 6, 61, 62, 400])
def test_one_as_exact_as_the_peer_fails_no_more_often_than_chance_allows(n, monkeypatch):
    """At a chance that can be counted. RMS: normal errors; the greatest: products of two normal numbers."""
    monkeypatch.setattr(accuracy, "RISK", 0.05)
    monkeypatch.setattr(accuracy, "CHAIN", math.inf)
    exact, draws, failed = torch.ones(n, dtype=torch.float64), 300, [0, 0]
    for seed in range(draws):
        peer, ours = 1e-5 * _random(2, n, seed=seed)
        failed[0] += ours.square().mean().sqrt().item() > bounds(peer, exact, torch.float32)[1]
        size = _random(n, seed=seed + draws)
        failed[1] += (size * ours).abs().max().item() > bounds(size * peer, exact, torch.float32)[0]
    assert max(failed) <= 0.05 * draws


@pytest.mark.parametrize("n", [1, 6, 40])
def test_luck_of_a_few_elements_excuses_what_sums_round_to_and_no_more(n):
    exact = 1 + torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    peer, one = (exact + 0.4 * ulp(1.0, torch.float32)).float(), ulp(1.0, torch.float32)
    assert_accurate((exact + (1.5 if n > 6 else 5) * one).float(), exact.float() + 0.9 * one, exact)
    with pytest.raises(AssertionError):
        assert_accurate((exact + 13 * one).float(), peer, exact)
    # 16 bits are summed in float32
    half = torch.float16
    with pytest.raises(AssertionError):
        assert_accurate((exact + 4 * ulp(1.0, half)).to(half), exact.to(half), exact)


def _accumulated_in_bfloat16(x, weight, bias):
    total = torch.zeros(len(x), len(weight), dtype=torch.bfloat16)
    for k in range(x.shape[1]):
        total = (total + x[:, k : k + 1].float() * weight[:, k].float()).bfloat16()
    return (total + bias).to(x.dtype)


def _one_element(y):
    y = y.clone()
    y[7, 11] += 0.3
    return y


MUTANTS = {
    "no bias": lambda x, w, b, y: F.linear(x, w),
    "summed in bfloat16": lambda x, w, b, y: _accumulated_in_bfloat16(x, w, b),
    "strides of the weight": lambda x, w, b, y: F.linear(x, w.reshape(w.t().shape).t(), b),
    "1 % too large": lambda x, w, b, y: (1.01 * y.double()).to(y.dtype),
    "one element": lambda x, w, b, y: _one_element(y),
}


@pytest.mark.parametrize("terms", [96, 768, 3072])
def test_a_sum_one_after_the_other_passes_beside_a_peer_that_rounds_less(terms):
    torch.manual_seed(terms)
    x, y = torch.randn(2, 64, 48, terms)
    # each product rounded, then added to the sum of those before it
    ours = _one_after_the_other(x * y)
    exact = (x * y).double().sum(-1)
    peer = exact.float()
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(ours, peer, exact)
    assert_accurate(ours, peer, exact, terms=terms)
    # a term left out, or products rounded to tf32's 10 bits, are far beyond it
    for wrong in (ours - x[..., 0] * y[..., 0], _one_after_the_other(_tf32(x) * _tf32(y))):
        with pytest.raises(AssertionError, match="RMS error|max error"):
            assert_accurate(wrong, peer, exact, terms=terms)


def _one_after_the_other(products):
    total = torch.zeros(products.shape[:-1])
    for term in products.unbind(-1):
        total = total + term
    return total


def _tf32(x):
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_a_linear_layer_fail(mutant, dtype):
    case = draw("mutants", partial(linear_case, (20,), 192, 64)).map(lambda x: x.to(dtype))
    (peer,), (exact,) = case.peer(), case.exact()
    assert_accurate(case.ours()[0], peer, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(MUTANTS[mutant](*case.arguments, peer), peer, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mutants_of_attention_fail(dtype):
    case = draw("mutants", partial(attention_case, [33], 2, 32, causal=True)).map(lambda x: x.to(dtype))
    (peer,), (exact,) = case.peer(), case.exact()
    assert_accurate(case.ours()[0], peer, exact)
    q, k, v = case.arguments[0].permute(1, 2, 0, 3)
    mask = torch.zeros(33, 33, dtype=dtype).masked_fill(torch.ones(33, 33).triu(2).bool(), -math.inf)
    shifted = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0].transpose(0, 1).flatten(1)
    swapped = case.arguments[0][:, [1, 0, 2]]
    for wrong in (shifted, case._replace(arguments=(swapped, [0, 33])).peer()[0], peer.view(33, 2, 32).flip(1)):
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(wrong.reshape(peer.shape), peer, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.roll(1, 0),
        lambda x: x.roll(1, 1),
        lambda x: x.flip(0),
        lambda x: torch.zeros_like(x),
        lambda x: -x,
        lambda x: x * 1.05,
        lambda x: x + 0.05,
    ],
    ids=["rows shifted", "columns shifted", "flipped", "zeros", "sign", "scaled", "bias"],
)
def test_wrong_results_fail(dtype, spoil):
    exact = _random(31, 17)
    peer = _near(exact, dtype, 1, seed=3)
    assert_accurate(peer, peer, exact)
    with pytest.raises(AssertionError):
        assert_accurate(spoil(peer), peer, exact)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_fail_in_ours_and_in_the_peer(bad, dtype):
    exact = _random(5, 4)
    good = exact.to(dtype)
    spoiled = good.clone()
    spoiled[2, 3] = bad
    with pytest.raises(AssertionError, match=r"ours is .* at \(2, 3\)"):
        assert_accurate(spoiled, good, exact)
    with pytest.raises(AssertionError, match=r"peer is .* at \(2, 3\)"):
        assert_accurate(good, spoiled, exact)
    # the peer's own NaN excuses nothing
    with pytest.raises(AssertionError, match="peer is"):
        assert_accurate(spoiled, spoiled, exact)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_pass_where_exact_has_them_and_the_rest_still_counts(bad):
    exact = _random(5, 4)
    exact[2, 3] = bad
    good = exact.float()
    assert_accurate(good, good, exact)
    with pytest.raises(AssertionError, match="max error"):
        assert_accurate(torch.where(good.isfinite(), good + 0.01, good), good, exact)
    with pytest.raises(AssertionError, match="ours is"):
        assert_accurate(torch.where(good.isfinite(), good, torch.zeros_like(good)), good, exact)
    other = math.inf if math.isnan(bad) else math.nan
    with pytest.raises(AssertionError, match="ours is"):
        assert_accurate(torch.where(good.isfinite(), good, torch.full_like(good, other)), good, exact)
    if math.isinf(bad):
        with pytest.raises(AssertionError, match="ours is"):
            assert_accurate(torch.where(good.isfinite(), good, -good), good, exact)


def test_overflow_of_the_dtype_is_infinity():
    exact = torch.tensor([1.0, 1e5, -1e6], dtype=torch.float64)
    peer = exact.half()
    assert_accurate(peer, peer, exact)
    with pytest.raises(AssertionError, match="ours is"):
        assert_accurate(torch.tensor([1.0, 65504, -65504]).half(), peer, exact)


def test_a_wrong_shape_or_dtype_fails():
    exact = _random(4, 3)
    good = exact.float()
    for ours in (good[:1], good[None], good.t(), good.flatten()):
        with pytest.raises(AssertionError, match="ours has shape"):
            assert_accurate(ours, good, exact)
    with pytest.raises(AssertionError, match="peer has shape"):
        assert_accurate(good, good[:1], exact)
    with pytest.raises(AssertionError, match="float16"):
        assert_accurate(good.half(), good, exact)
    with pytest.raises(TypeError, match="float64"):
        assert_accurate(good, good, good)


def test_the_message_names_what_the_figures_and_the_bound():
    exact = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError) as caught:
        assert_accurate(torch.full((4,), 1.5), torch.ones(4), exact, what="layer_norm dx")
    text = str(caught.value)
    assert text.startswith("layer_norm dx: max error 0.5 > 1.192e-07")
    assert "float32" in text and "the peer's is 0" in text


def test_empty_scalar_and_differentiable_tensors():
    assert_accurate(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.float64))
    one = torch.tensor(1.0, requires_grad=True)
    assert_accurate(one, one * 1, one.double())
    assert_embeddings(one[None, None] * 1, one[None, None].double(), torch.float32)


def test_ulp():
    for dtype in [*DTYPES, torch.float64]:
        info = torch.finfo(dtype)
        assert ulp(1.0, dtype) == ulp(-1.5, dtype) == ulp(1.999, dtype) == info.eps
        assert ulp(0.999, dtype) == info.eps / 2
        assert ulp(2.0, dtype) == 2 * info.eps
        # zero and subnormal numbers: one step of the grid that is left
        assert ulp(0.0, dtype) == ulp(info.tiny / 3, dtype) == ulp(info.tiny, dtype) == info.eps * info.tiny
    for value in (3.7, 1e-3, 12345.6):
        x = torch.tensor(value)
        assert ulp(x.item(), torch.float32) == (torch.nextafter(x, torch.tensor(math.inf)) - x).item()


def test_relative_rms():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_rms(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_rms(exact.half(), exact) == 0
    zero = torch.zeros(2)
    assert relative_rms(zero, zero) == 0
    assert relative_rms(exact, zero) == math.inf
    assert math.isnan(relative_rms(torch.tensor([math.nan, 1]), exact))
    assert math.isnan(relative_rms(torch.tensor([math.nan, 1]), zero))
    with pytest.raises(ValueError, match="shapes differ"):
        relative_rms(zero[:1], zero)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-5, 0.1, math.pi / 2, math.pi])
def test_cosine_gap_is_exact_for_the_smallest_angles(angle):
    exact = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    turned = 7 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    gap = cosine_gap(turned, exact)
    assert gap.dtype == torch.float64 and gap.shape == (1,)
    assert gap.item() == pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_pass_below_the_bound_and_fail_above(dtype):
    exact = _random(300, 64)
    across = _random(300, 64, seed=1)
    across -= (across * exact).sum(-1, keepdim=True) / exact.square().sum(-1, keepdim=True) * exact
    across *= exact.norm(dim=-1, keepdim=True) / across.norm(dim=-1, keepdim=True)

    def turned(gap: float) -> torch.Tensor:
        return (1 - gap) * exact + math.sqrt(1 - (1 - gap) ** 2) * across

    bound = COSINE_GAPS[dtype]
    assert_embeddings(turned(0.9 * bound), exact, dtype)
    with pytest.raises(AssertionError, match=r"pooled: 99th percentile of 1 - cos .* > "):
        assert_embeddings(turned(1.1 * bound), exact, dtype, what="pooled")
    # 1 % of the rows may be worse, not 2 %; of few rows none
    ours = exact.clone()
    ours[:2] = -ours[:2]
    assert_embeddings(ours, exact, dtype)
    with pytest.raises(AssertionError):
        assert_embeddings(ours[1:51], exact[1:51], dtype)
    ours[:6] = -exact[:6]
    with pytest.raises(AssertionError):
        assert_embeddings(ours, exact, dtype)


def test_embeddings_without_a_direction_fail():
    exact = _random(200, 8)
    for bad in (math.nan, math.inf, 0.0):
        ours = exact.float()
        ours[7] = bad
        with pytest.raises(AssertionError, match="in 1 of 200 rows"):
            assert_embeddings(ours, exact, torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_embeddings(exact[:1], exact, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        assert_embeddings(exact, exact, torch.float64)
    assert_embeddings(exact[:0], exact[:0], torch.float16)
