"""activation(x @ weight.T + bias) + residual in one launch: the epilogue runs on the accumulator, in float32.

Three kernels, chosen by `tuning.linear`: tiles through plain pointers (any GPU); a persistent grid through tensor
descriptors (sm_90 and later), where the store of one tile overlaps the products of the next; and, for few rows, a split
of the sum over K whose parts are added in a fixed order, so that the result never depends on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast import compat, tuning
from clipfast.kernels import layer_norm, library

# since Triton 3.4; 3.3 has them under a name that says experimental, and of another form
HAS_DESCRIPTORS = hasattr(tl, "make_tensor_descriptor")


@triton.jit
def _activate(h, ACTIVATION: tl.constexpr, FAST_TANH: tl.constexpr):
    if ACTIVATION == "quick_gelu":
        if FAST_TANH:
            # h sigmoid(1.702 h) = h (1 + tanh(0.851 h)) / 2, and tanh.approx is one special-function operation, not two
            tanh = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [0.851 * h], dtype=tl.float32, is_pure=True, pack=1
            )
            return 0.5 * h * (1.0 + tanh)
        return h / (1.0 + tl.exp2(-2.4554669595930156 * h))  # 1.702 log2(e)
    if ACTIVATION == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    return h


@triton.jit
def _tile_of(tile, n_tiles_m, n_tiles_n, GROUP_M: tl.constexpr):
    """Tiles in columns of GROUP_M rows, so that programs running together share operands in the L2 cache."""
    per_group = GROUP_M * n_tiles_n
    first_m = tile // per_group * GROUP_M
    group_m = min(n_tiles_m - first_m, GROUP_M)
    return first_m + tile % per_group % group_m, tile % per_group // group_m


@triton.jit
def _finish(acc, bias, residual, ACTIVATION: tl.constexpr, FAST_TANH: tl.constexpr):
    return _activate(acc + bias, ACTIVATION, FAST_TANH) + residual


@triton.jit
def _linear_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    pre_ptr,
    y_ptr,
    n_rows,
    n_cols,
    n_terms,
    stride_x_row,
    stride_weight_row,
    stride_residual_row,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST_TANH: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    n_tiles_m, n_tiles_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    tile_m, tile_n = _tile_of(tl.program_id(0), n_tiles_m, n_tiles_n, GROUP_M)
    rows, cols = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    terms = tl.arange(0, BLOCK_K)
    # rows and columns past the end wrap around instead of being masked; they are dropped at the store
    x_ptrs = x_ptr + (rows % n_rows).to(tl.int64)[:, None] * stride_x_row + terms[None, :]
    weight_ptrs = weight_ptr + (cols % n_cols).to(tl.int64)[None, :] * stride_weight_row + terms[:, None]
    # each part of a split sum has the same number of steps; the last may find nothing left
    steps = tl.cdiv(tl.cdiv(n_terms, BLOCK_K), SPLIT_K)
    first = tl.program_id(1) * steps
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(first, first + steps):
        k = step * BLOCK_K
        if EVEN_K:
            x, weight = tl.load(x_ptrs + k), tl.load(weight_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=terms[None, :] < n_terms - k, other=0.0)
            weight = tl.load(weight_ptrs + k, mask=terms[:, None] < n_terms - k, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
    wide_rows = rows.to(tl.int64)[:, None]
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    y_ptrs = y_ptr + wide_rows * n_cols + cols[None, :]
    if SPLIT_K > 1:
        y_ptrs += tl.program_id(1).to(tl.int64) * n_rows * n_cols
    else:
        bias, residual = 0.0, 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            residual_ptrs = residual_ptr + wide_rows * stride_residual_row + cols[None, :]
            residual = tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
        if SAVE_PRE:
            pre_ptrs = pre_ptr + wide_rows * n_cols + cols[None, :]
            tl.store(pre_ptrs, (acc + bias).to(pre_ptr.dtype.element_ty), mask=inside)
        acc = _finish(acc, bias, residual, ACTIVATION, FAST_TANH)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _linear_reduce_kernel(
    parts_ptr,
    bias_ptr,
    residual_ptr,
    pre_ptr,
    y_ptr,
    n_elements,
    n_cols,
    stride_residual_row,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST_TANH: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_elements
    rows, cols = at // n_cols, at % n_cols
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    place = at
    for _ in tl.static_range(SPLIT_K):  # in this order, always
        acc += tl.load(parts_ptr + place, mask=inside, other=0.0)
        place += n_elements
    bias, residual = 0.0, 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * stride_residual_row + cols, mask=inside, other=0.0).to(tl.float32)
    if SAVE_PRE:
        tl.store(pre_ptr + at, (acc + bias).to(pre_ptr.dtype.element_ty), mask=inside)
    y = _finish(acc, bias, residual, ACTIVATION, FAST_TANH)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _linear_persistent_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    pre_ptr,
    y_ptr,
    n_rows,
    n_cols,
    n_terms,
    stride_x_row,
    stride_weight_row,
    stride_residual_row,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST_TANH: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    x_desc = tl.make_tensor_descriptor(x_ptr, [n_rows, n_terms], [stride_x_row, 1], [BLOCK_M, BLOCK_K])
    weight_desc = tl.make_tensor_descriptor(weight_ptr, [n_cols, n_terms], [stride_weight_row, 1], [BLOCK_N, BLOCK_K])
    y_desc = tl.make_tensor_descriptor(y_ptr, [n_rows, n_cols], [n_cols, 1], [BLOCK_M, BLOCK_N // 2])
    pre_desc = tl.make_tensor_descriptor(pre_ptr, [n_rows, n_cols], [n_cols, 1], [BLOCK_M, BLOCK_N // 2])
    n_tiles_m, n_tiles_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    # flatten: one loop over all steps of all tiles, so that loads of the next tile start before this one is stored
    for tile in tl.range(tl.program_id(0), n_tiles_m * n_tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = _tile_of(tile, n_tiles_m, n_tiles_n, GROUP_M)
        m, n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(tl.cdiv(n_terms, BLOCK_K)):
            x, weight = x_desc.load([m, step * BLOCK_K]), weight_desc.load([n, step * BLOCK_K])
            acc = tl.dot(x, weight.T, acc)
        # the epilogue in two halves: half the shared memory for the store, and the rest goes to another stage
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        rows = (m + tl.arange(0, BLOCK_M))[:, None]
        for half in tl.static_range(2):
            part = left if half == 0 else right
            cols = n + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            bias, residual = 0.0, 0.0
            if HAS_BIAS:
                bias = tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)[None, :]
            if HAS_RESIDUAL:
                residual_ptrs = residual_ptr + rows.to(tl.int64) * stride_residual_row + cols[None, :]
                inside = (rows < n_rows) & (cols[None, :] < n_cols)
                residual = tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
            if SAVE_PRE:
                pre_desc.store([m, n + half * (BLOCK_N // 2)], (part + bias).to(pre_ptr.dtype.element_ty))
            y = _finish(part, bias, residual, ACTIVATION, FAST_TANH)
            y_desc.store([m, n + half * (BLOCK_N // 2)], y.to(y_ptr.dtype.element_ty))


NO_EPILOGUE = {
    "HAS_BIAS": False,
    "HAS_RESIDUAL": False,
    "ACTIVATION": "none",
    "FAST_TANH": False,
    "SAVE_PRE": False,
}


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    tf32: bool,
    config: tuning.LinearConfig | None = None,
    pre: Tensor | None = None,
) -> Tensor:
    """x: [M, K], last stride 1.   weight: [N, K], last stride 1.   bias: [N].   residual: [M, N], last stride 1.

    activation: "none", "quick_gelu" or "gelu".   tf32: float32 operands rounded to 10 bits of mantissa.
    config: default `tuning.linear`'s.   pre: None, or [M, N] contiguous that takes what the activation is applied to.
    Returns: [M, N] contiguous, dtype of x.
    """
    (n_rows, n_terms), n_cols = x.shape, len(weight)
    y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if config is None:
        described = _describable(x) and _describable(weight) and _describable(y)
        arch, keep = tuning.architecture(x.device), pre is not None
        config = tuning.linear(n_rows, n_cols, n_terms, x.dtype, arch, described=described, pre=keep)
    epilogue = {
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": activation,
        "FAST_TANH": config.fast_tanh,
        "SAVE_PRE": pre is not None,
    }
    given = tuple(other if each is None else each for each, other in ((bias, weight), (residual, y), (pre, y)))
    n_tiles = triton.cdiv(n_rows, config.block_m) * triton.cdiv(n_cols, config.block_n)
    sizes = (n_rows, n_cols, n_terms, x.stride(0), weight.stride(0), given[1].stride(0))
    blocks = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    if config.persistent:
        n_programs = min(n_tiles, tuning.multiprocessors(x.device))
        triton.set_allocator(_scratch)
        _linear_persistent_kernel[(n_programs,)](x, weight, *given, y, *sizes, **epilogue, **blocks)
        return y
    split = config.split_k
    target = y if split == 1 else torch.empty((split, n_rows, n_cols), dtype=torch.float32, device=x.device)
    _linear_fwd_kernel[(n_tiles, split)](
        x,
        weight,
        *given,
        target,
        *sizes,
        # the parts of a split sum know nothing of the epilogue: one compilation serves them all
        **(epilogue if split == 1 else NO_EPILOGUE),
        PRECISION="tf32" if tf32 else "ieee",
        EVEN_K=n_terms % (config.block_k * split) == 0,
        SPLIT_K=split,
        **blocks,
    )
    if split > 1:
        block = 1024
        _linear_reduce_kernel[(triton.cdiv(y.numel(), block),)](
            target, *given, y, y.numel(), n_cols, given[1].stride(0), **epilogue, SPLIT_K=split, BLOCK=block
        )
    return y


def _describable(x: Tensor) -> bool:
    """A tensor descriptor wants 16-byte aligned rows."""
    return HAS_DESCRIPTORS and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel builds its tensor descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, tf32: bool
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


_linear = library.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool tf32) -> Tensor",
    linear_fwd,
    _linear_fake,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    """As `clipfast.ops.linear`."""
    y = _linear(
        library.as_rows(x),
        library.last_dim_contiguous(weight),
        None if bias is None else bias.contiguous(),
        None if residual is None else library.as_rows(residual),
        activation or "none",
        tf32_allowed(x),
    )
    return y.view(*x.shape[:-1], len(weight))


def tf32_allowed(x: Tensor) -> bool:
    """Only where the user has asked PyTorch for it: torch.set_float32_matmul_precision("high")."""
    return x.dtype == torch.float32 and compat.allows_tf32()


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
    """As `clipfast.ops.mlp`: the norm, then two launches with everything else in their epilogues."""
    y = layer_norm.layer_norm(x, norm_weight, norm_bias, eps)
    return linear(linear(y, fc1_weight, fc1_bias, activation, None), fc2_weight, fc2_bias, None, x)


def project(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, eps: float) -> Tensor:
    """As `clipfast.ops.project`; one row a sample, and cuBLAS reads the projection as it is stored."""
    return layer_norm.layer_norm(x, norm_weight, norm_bias, eps) @ projection
