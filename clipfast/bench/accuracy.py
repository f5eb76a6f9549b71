"""How far a whole model's embeddings may be from float64, and how that is measured.

The bounds are the house's (CONTRIBUTING.md): the tests hold clipfast to them, the benchmark everybody.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["COSINE_GAPS", "cosine_gap", "relative_rms", "rms"]

# 99th percentile of 1 - cos of the embeddings of a whole model
COSINE_GAPS = {torch.float32: 1e-6, torch.float16: 1e-5, torch.bfloat16: 5e-4}


def cosine_gap(a: Tensor, exact: Tensor) -> Tensor:
    """1 - cos between the rows of a and of exact, computed in float64.

    a, exact: [..., E].
    Returns:  [...], float64; NaN for a row with NaN or infinity and for a row of zeros.
    """
    a, exact = (tensor.detach().cpu().double() for tensor in (a, exact))
    # |u - v|^2 / 2 of the unit vectors: 1 - u.v itself loses every digit below 1e-16
    difference = a / a.norm(dim=-1, keepdim=True) - exact / exact.norm(dim=-1, keepdim=True)
    return (difference * difference).sum(-1) / 2


def relative_rms(a: Tensor, exact: Tensor) -> float:
    """RMS(a - exact) / RMS(exact), computed in float64.

    Returns: 0 if both are zero, infinity if only exact is, NaN if either has NaN.
    """
    a, exact = (tensor.detach().cpu().double() for tensor in (a, exact))
    if a.shape != exact.shape:
        raise ValueError(f"shapes differ: {list(a.shape)}, exact {list(exact.shape)}")
    error, size = rms(a - exact), rms(exact)
    if size:
        return error / size
    return math.inf if error > 0 else error


def rms(x: Tensor) -> float:
    """Root of the mean square; 0 of nothing."""
    return (x * x).mean().sqrt().item() if x.numel() else 0.0
