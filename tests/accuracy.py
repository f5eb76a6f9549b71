"""The one tolerance rule of every test: at most twice the error PyTorch makes in the same dtype, and one ulp.

    err(ours) <= 2 err(peer) + 1 ulp        for the greatest error, and for the root mean square

Errors are differences from a float64 reference on the already rounded inputs. The ulp is the spacing of the
compared dtype at the size of the exact result: at max |exact| for the greatest error, at RMS(exact) for the
root mean square. So a result that is exact up to its last rounding passes whatever the peer does: that
rounding is at most half an ulp of its element, hence of the greatest one, and at most eps / 2 of its element,
so that its RMS is at most eps / 2 * RMS(exact), which is less than the spacing there.

Both errors are of the whole tensor. Parts of very different size, such as the gradients of two parameters,
must be compared one by one, or the small ones are not compared at all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipfast.bench.accuracy import COSINE_GAPS, cosine_gap, relative_rms, rms

__all__ = ["assert_accurate", "assert_embeddings", "cosine_gap", "relative_rms", "ulp"]


def assert_accurate(ours: Tensor, peer: Tensor, exact: Tensor, *, what: str = "") -> None:
    """Assert err(ours) <= 2 err(peer) + 1 ulp, both for the greatest error and for the root mean square.

    ours, peer: of one floating dtype.
    exact:      float64, of the same shape. Where it is not finite after rounding to that dtype, ours and peer
                must be the same NaN or infinity; elsewhere they must be finite, the peer too, since one that
                is not would excuse anything.
    what:       names the tensor in the message.
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
    exact = exact[finite]
    ours_error, peer_error = (tensor[finite].double() - exact for tensor in (ours, peer))
    for measure, size in (("max", _max), ("RMS", rms)):
        error, peers, one_ulp = size(ours_error), size(peer_error), ulp(size(exact), dtype)
        bound = 2 * peers + one_ulp
        assert error <= bound, (
            f"{name}: {measure} error {error:.4g} > {bound:.4g} = 2 x {peers:.4g} of the peer + 1 ulp of "
            f"{one_ulp:.4g} ({dtype}, {measure} of exact {size(exact):.4g})"
        )


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
