"""Linear layers on a CPU in C++ (csrc/cpu_linear.cpp), and the operators made of them.

oneDNN wants the weights in an order of its own and copies them in each call, which for one image or a few captions is
most of the time; MKL runs float32 at AVX2 speed unless the CPU is Intel's. Here a few columns at a time are put
in order, in the cache, or for few rows in registers, while the next are read. Beside both on one machine:
`python -m benchmarks.linear`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from clipfast.kernels import kept, library
from clipfast.kernels.cpu_library import ACTIVATIONS, DTYPES, LAYOUTS, LinearArgs, PackArgs, form, pointer, run, threads

SIZE = ctypes.sizeof(LinearArgs)


def laid_out(weight: Tensor) -> tuple[Tensor, str]:
    """The weight as it can be read, and its name in LAYOUTS; a copy if it is strided any other way."""
    if not weight.is_contiguous() and weight.t().is_contiguous():
        return weight.t(), "transposed"
    return weight.contiguous(), "rows"


def _linear_fwd(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    instructions: str,
    eps: float,
) -> Tensor:
    if not (x.dtype == weight.dtype == (x if residual is None else residual).dtype):
        raise TypeError(f"x is {x.dtype}, weight {weight.dtype}: they and the residual must have one dtype")
    columns, terms = weight.shape
    x, (read, layout) = x.contiguous(), laid_out(weight) if packed is None else (packed, "packed")
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    residual = None if residual is None else residual.contiguous()
    if norm_weight is not None:
        norm_weight, norm_bias = norm_weight.float().contiguous(), norm_bias.float().contiguous()
    out = x.new_empty(*x.shape[:-1], columns)
    args = LinearArgs(
        SIZE,
        x.data_ptr(),
        read.data_ptr(),
        pointer(bias),
        pointer(residual),
        pointer(norm_weight),
        pointer(norm_bias),
        out.data_ptr(),
        out.numel() // max(1, columns),
        columns,
        terms,
        DTYPES[x.dtype],
        ACTIVATIONS[activation],
        LAYOUTS[layout],
        threads(),
        form(instructions),
        eps,
    )
    run("linear", args)
    return out


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


_linear = library.define(
    "cpu_linear(Tensor x, Tensor weight, Tensor? packed, Tensor? bias, Tensor? residual, Tensor? norm_weight, "
    "Tensor? norm_bias, str activation, str instructions, float eps) -> Tensor",
    _linear_fwd,
    _fake,
    devices=("CPU",),
)


def pack(weight: Tensor, instructions: str) -> Tensor:
    """A weight [N, K], float32 or bfloat16, in the order in which `linear` reads it: bytes, uint8.

    Only the form of these instructions can read it. It is as large as the weight, with N filled up to a multiple of a
    panel (8 to 32 columns) and K to one of 8 words.
    Raises: as `linear`.
    """
    weight = weight.detach().resolve_neg().contiguous()
    size = ctypes.c_int64()

    def call(to: Tensor | None) -> None:
        sizes = (*weight.shape, DTYPES[weight.dtype], threads(), form(instructions))
        run("pack", PackArgs(ctypes.sizeof(PackArgs), pointer(weight), pointer(to), ctypes.addressof(size), *sizes))

    call(None)
    packed = torch.empty(size.value, dtype=torch.uint8)
    call(packed)
    return packed


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    instructions: str = "best",
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual, summed in float32 and rounded once.

    x: [..., K].   weight: [N, K].   bias: [N] or None.   residual: [..., N] or None.   All float32 or all bfloat16, on
    a CPU; copied if not contiguous, the weight unless it is or its transpose. What `kept.keep` keeps is packed once.
    activation:   None, "quick_gelu" or "gelu".
    instructions: "best", or "baseline", "avx2", "avx512", "avx512_bf16" to force one.
    norm:         weight [K], bias [K] and eps of a LayerNorm of x before all this, in float32, rounded to x's dtype.
    Returns: [..., N], dtype of x.
    Raises:  RuntimeError if the library is missing or this CPU has not the instructions, TypeError if dtypes differ.
    """
    packed = kept.layout(weight, pack, instructions)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    return _linear(x, weight, packed, bias, residual, norm_weight, norm_bias, activation or "none", instructions, eps)


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    activation: str,
    eps: float,
) -> Tensor:
    """`clipfast.ops.mlp` without gradients; dtypes as `linear`'s."""
    hidden = linear(x, fc1_weight, fc1_bias, activation, None, norm=(norm_weight, norm_bias, eps))
    return linear(hidden, fc2_weight, fc2_bias, None, x)


def project(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, eps: float) -> Tensor:
    """`clipfast.ops.project` without gradients; dtypes as `linear`'s."""
    return linear(x, projection.t(), None, None, None, norm=(norm_weight, norm_bias, eps))
