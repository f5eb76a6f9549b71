"""The one tolerance rule of every test: at most twice the error PyTorch makes in the same dtype, and one ulp.

    RMS(ours) <= max(2, r) RMS(peer) + 1 ulp
    max(ours) <= max(2 max(peer), w ln(n / RISK)) + 1 ulp

Errors are differences from a float64 reference on the already rounded inputs; n is how many there are. The ulp is
the spacing of the compared dtype at the size of the exact result: at RMS(exact) for the root mean square, at
max |exact| for the greatest error. The peer's error is one draw and may be small by luck, so each line leaves room for
as much luck as chance has: a kernel that rounds as PyTorch does fails it once in 1 / RISK = a million draws.

The root mean square. For n independent normal errors of one size, Chernoff's bound on
E exp(t (sum of ours^2 - r^2 sum of peer^2)) gives

    P(RMS(ours) > r RMS(peer)) <= (2 r / (1 + r^2))^n.

(If sizes differ from element to element, the sum of their squares over the greatest square stands for n.) At r = 2
that is 0.8^n, so that 2 is enough from 62 elements on. For fewer r is the ratio whose bound is RISK, and
r RMS(peer) no more than arithmetic explains: numbers added one after the other round to 0.15 sqrt(terms) ulps of
their sum, and CLIP's longest sums have 4,096 terms; a 16-bit result is rounded a few times.

The greatest error. Beyond half an ulp of each element, its last rounding, an error is a random rounding of a term of
random size: a product of two normal numbers. P(|error| > t RMS) is then 2 / pi times the integral of K_0 from t on,
below exp(-t), and so is a normal number's from t = 1 on; of n errors the greatest is beyond ln(n / RISK) RMS with a
probability below RISK. w is that RMS in the peer, of its worst row (along the last axis), since rows differ in size.
Of few elements the greatest error is at most sqrt(n) RMS(ours), and the first line decides.

Where the peer may sum in another order, its error says nothing of what a sum one after the other makes: cuBLAS cuts a
sum into parts where there are few tiles, and rounds it less the more parts there are. `terms` is then how many numbers
are added, in float32, and the bound no lower than arithmetic explains. Rounding a number of any size errs by 0.212 eps
of it (RMS, its mantissa log-uniform), and the k-th partial sum has sqrt(k / terms) of the last one's size: in all
c = 0.15 sqrt(terms) eps RMS(exact). Given its partial sums such an error is normal, and they are a random walk, whose
mean square is beyond v times its mean with a probability of exp(-pi^2 v / 16): both together are beyond t c of their
row with one below exp(-t), and of n the greatest is beyond ln(n / RISK) c with one below RISK.

A result that is exact up to its last rounding passes whatever the peer does: that rounding is at most half an ulp of
its element, hence of the greatest one, and at most eps / 2 of its element, so that its RMS is at most
eps / 2 * RMS(exact), which is less than the spacing there.

Both errors are of the whole tensor. Parts of very different size, such as the gradients of two parameters, must be
compared one by one, or the small ones are not compared at all. Errors that go together count as one: a large score's
moves all columns of a head. A test of such errors needs many rows, or several draws stacked, and so does a single
number whose terms cancel: no multiple of its own size bounds its error.

python -m tests.seeds counts how many draws of each operator break the rule.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipfast.bench.accuracy import COSINE_GAPS, cosine_gap, relative_rms, rms

__all__ = ["assert_accurate", "assert_embeddings", "bounds", "cosine_gap", "relative_rms", "ulp"]

# the probability that a kernel as exact as the peer fails
RISK = 1e-6
# what the longest chain of float32 sums rounds to, in ulps of the sum; and four roundings to 16 bits
PER_TERM = 0.15
CHAIN = PER_TERM * 4096**0.5
HALF_CHAIN = (4 / 12) ** 0.5


def assert_accurate(ours: Tensor, peer: Tensor, exact: Tensor, *, what: str = "", terms: int = 0) -> None:
    """Assert the rule of this file, both for the greatest error and for the root mean square.

    ours, peer: of one floating dtype.
    exact:      float64, of the same shape. Where it is not finite after rounding to that dtype, ours and peer
                must be the same NaN or infinity; elsewhere they must be finite, the peer too, since one that
                is not would excuse anything.
    what:       names the tensor in the message.
    terms:      0; or how many numbers a float32 result is the sum of, where the peer may have another order.
    Raises:     AssertionError with the figures and the bound; TypeError if exact is not float64.
    """
    name = what or "result"
    if exact.dtype != torch.float64:
        raise TypeError(f"exact: expected torch.float64, got {exact.dtype}")
    for who, tensor in (("peer", peer), ("ours", ours)):
        assert tensor.shape == exact.shape, f"{name}: {who} has shape {list(tensor.shape)}, exact {list(exact.shape)}"
    assert ours.dtype == peer.dtype, f"{name}: ours is {ours.dtype}, peer {peer.dtype}"

    dtype = ours.dtype
    ours, peer, exact = (tensor.detach().cpu() for tensor in (ours, peer, exact))
    rounded = exact.to(dtype)
    finite = rounded.isfinite()
    for who, tensor in (("peer", peer), ("ours", ours)):
        # NaN never equals anything: compare its places and, elsewhere, the values that must be the same
        wrong = (tensor.isnan() != rounded.isnan()) | (tensor.isfinite() != finite)
        wrong |= ~finite & ~rounded.isnan() & (tensor != rounded)
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {who} is {tensor[place].item()} at {place}, exact {exact[place].item():.6g}; NaN "
                f"or infinity makes {int(wrong.sum())} of {wrong.numel()} places wrong ({dtype})"
            )
    if not finite.all():  # rows are lost
        ours, peer, exact = (tensor[finite] for tensor in (ours, peer, exact))
    ours_error, peer_error = (tensor.double() - exact for tensor in (ours, peer))
    allowed = bounds(peer_error, exact, dtype, terms)
    for measure, size, bound in zip(("max", "RMS"), (_max, rms), allowed, strict=True):
        error = size(ours_error)
        assert error <= bound, (
            f"{name}: {measure} error {error:.4g} > {bound:.4g}, where the peer's is {size(peer_error):.4g} and 1 ulp "
            f"{ulp(size(exact), dtype):.4g} ({dtype}, {measure} of {exact.numel()} exact {size(exact):.4g})"
        )


def bounds(peer_error: Tensor, exact: Tensor, dtype: torch.dtype, terms: int = 0) -> tuple[float, float]:
    """The greatest error and the root mean square that the rule allows.

    peer_error, exact: float64, of one shape.   terms: as in `assert_accurate`.
    """
    n = exact.numel()
    if n == 0:
        return 0.0, 0.0
    peer, one_ulp = rms(peer_error), ulp(rms(exact), dtype)
    ratio, chain = _ratio(n), (CHAIN if dtype.itemsize > 2 else HALF_CHAIN) * one_ulp
    bound = max(2 * peer, min(ratio * peer, chain)) + one_ulp
    if ratio > 2:
        others = n**0.5 * (bound - one_ulp)
    else:
        excess = (peer_error.abs() - _ulps(exact, dtype) / 2).clamp_min(0)
        others = excess.square().mean(-1).max().sqrt().item() * math.log(n / RISK)
    greatest = max(2 * _max(peer_error), others)
    if terms and dtype.itemsize > 2:
        share = PER_TERM * terms**0.5 * torch.finfo(dtype).eps
        bound = max(bound, share * rms(exact) + one_ulp)
        row = exact.square().mean(-1).max().sqrt().item()
        greatest = max(greatest, share * row * math.log(n / RISK))
    return greatest + ulp(_max(exact), dtype), bound


def _ulps(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`ulp` of each element."""
    info = torch.finfo(dtype)
    return info.eps * torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1).clamp_min(info.tiny)


def _ratio(n: int) -> float:
    """The r for which (2 r / (1 + r^2))^n is RISK."""
    share = RISK ** (1 / n)
    return (1 + math.sqrt(1 - share * share)) / share


def assert_embeddings(ours: Tensor, exact: Tensor, dtype: torch.dtype, *, what: str = "") -> None:
    """Assert that the 99th percentile of 1 - cos between the rows is within the bound for whole models.

    The bounds are 1e-6 in float32, 1e-5 in float16, 5e-4 in bfloat16. A cosine does not see the length of a
    row: `relative_rms` does.

    ours, exact: [..., E]; exact float64. Of fewer than 100 rows the worst counts.
    dtype:       what the model computes in; ours may have another.
    what:        names the tensor in the message.
    Raises:      AssertionError with the figure and the bound; ValueError for a dtype without a bound.
    """
    name = what or "embeddings"
    if dtype not in COSINE_GAPS:
        raise ValueError(f"dtype: expected one of {[str(known) for known in COSINE_GAPS]}, got {dtype}")
    assert ours.shape == exact.shape, f"{name}: ours has shape {list(ours.shape)}, exact {list(exact.shape)}"
    gaps = cosine_gap(ours, exact).flatten()
    if gaps.numel() == 0:
        return
    undefined = int(gaps.isnan().sum())
    assert not undefined, f"{name}: NaN, infinity or a row of zeros in {undefined} of {gaps.numel()} rows"
    gap = torch.quantile(gaps, 0.99, interpolation="higher").item()
    bound = COSINE_GAPS[dtype]
    assert gap <= bound, f"{name}: 99th percentile of 1 - cos {gap:.4g} > {bound:.4g} ({dtype})"


def ulp(size: float, dtype: torch.dtype) -> float:
    """The distance from |size| to the next greater number of dtype."""
    info = torch.finfo(dtype)
    # frexp: size = m 2^e with 0.5 <= m < 1, so that 2^(e - 1) is the power of two at or below it
    power = math.ldexp(1.0, math.frexp(abs(size))[1] - 1) if size else 0.0
    return info.eps * max(power, info.tiny)


def _max(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
