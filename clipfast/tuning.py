"""How each kernel is launched: frozen configurations, as pure functions of shape, dtype and architecture.

Nothing is tuned in a user's first call. A configuration comes from a `MEASURED` table, filled from what `make gpu` left
in benchmarks/results/, or, for a shape or architecture that nobody measured, from the formulas below. Architectures are
compute capabilities as one number: 80 is sm_80 (A100), 90 sm_90 (H100, H200), 120 sm_120.

No table entry yet: nothing here has run on a GPU, and each formula gives the reason it was chosen by.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

# Architectures that every kernel is compiled for, with the multiprocessors of the largest common card.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
ARCHITECTURES = tuple(MULTIPROCESSORS)
OLDEST = 80

# bytes of shared memory that one block may use
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

_assumed = 90


@contextlib.contextmanager
def assume(architecture: int) -> Iterator[None]:
    """Inside the block, tensors that are not on a CUDA device are tuned for this architecture."""
    global _assumed
    before, _assumed = _assumed, architecture
    try:
        yield
    finally:
        _assumed = before


def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number; of any other, the assumed one (90)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _assumed
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def known(architecture: int) -> int:
    """The newest listed architecture that is not newer than this one: what its formulas are taken from."""
    return max((each for each in ARCHITECTURES if each <= architecture), default=OLDEST)


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; of any other, of the assumed architecture's largest common card."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return MULTIPROCESSORS[known(_assumed)]
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm


@dataclass(frozen=True)
class LayerNormConfig:
    block_rows: int
    warps: int


def layer_norm(n_cols: int, dtype: torch.dtype) -> LayerNormConfig:
    """16 to 32 elements a thread: enough loads in flight to hide the memory, few enough to stay in registers."""
    block_cols = 1 << (n_cols - 1).bit_length()
    warps = min(16, max(1, block_cols // 512))
    # short rows share a program, or each would be one load and one store
    return LayerNormConfig(block_rows=max(1, 512 // block_cols), warps=warps)


def layer_norm_bwd(n_cols: int, dtype: torch.dtype) -> LayerNormConfig:
    """As forward, but float32 in twice the warps: at 768 columns two spill on sm_86 and 89 (compile report)."""
    config = layer_norm(n_cols, dtype)
    return replace(config, warps=min(16, 2 * config.warps)) if dtype == torch.float32 else config


# ---------------------------------------------------------------------------------------------------------------------
# Linear


@dataclass(frozen=True)
class LinearConfig:
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    split_k: int = 1
    persistent: bool = False
    fast_tanh: bool = False

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of operands in flight."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.stages


FEW_ROWS = 400

# (architecture, dtype, rows bucket, N, K) -> configuration, from benchmarks/results/; empty until measured on a GPU
MEASURED_LINEAR: dict[tuple[int, torch.dtype, int, int, int], LinearConfig] = {}


def rows_bucket(n_rows: int) -> int:
    """The power of two at or above n_rows, from 16: what tables are indexed by."""
    return 1 << max(4, (n_rows - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def linear(
    n_rows: int,
    n_cols: int,
    n_terms: int,
    dtype: torch.dtype,
    architecture: int,
    *,
    described: bool,
    pre: bool = False,
) -> LinearConfig:
    """Configuration of y[n_rows, n_cols] = x[n_rows, n_terms] @ weight.T.

    described: rows are 16-byte aligned, so that tensor descriptors can be made.   pre: the pre-activation is stored.
    """
    arch = known(architecture)
    measured = MEASURED_LINEAR.get((arch, dtype, rows_bucket(n_rows), n_cols, n_terms))
    if measured is not None and (described or not measured.persistent):
        return measured
    if dtype == torch.float32:
        # no tensor cores in true float32: fused multiply-adds on a tile that fits the registers. 64 x 64 in 4 warps, or
        # 16 x 64, spill one where rows are not 16-byte aligned, and so do 64 x 64 in 8 warps with a pre-activation
        # stored, on sm_90 and, by Triton 3.6, on sm_120; on sm_100 and 120 16 x 32 with steps of 64 (compile report)
        if n_rows <= 16:
            return LinearConfig(16, 32, 32 if arch >= 100 else 64, warps=4, stages=3)
        return LinearConfig(64, 32 if pre or arch in (90, 120) else 64, 32, warps=8, stages=3)
    if n_rows <= FEW_ROWS:
        return _linear_of_few_rows(n_rows, n_cols, n_terms, arch)
    if arch in (90, 100) and described:
        # 128 x 256 has the most work per byte of operand; where it leaves over a tenth of the waves idle, halve it
        wide = _full_waves(n_rows, n_cols, 128, 256, arch) >= 0.9
        return LinearConfig(128, 256 if wide else 128, 64, warps=8, stages=3 if wide else 4, persistent=True)
    if SHARED_MEMORY[arch] < 100 << 10:
        # 99 KB: three stages of 128 x 128 x 32, two blocks a multiprocessor: one stores while the other multiplies
        return LinearConfig(128, 128, 32, warps=8, stages=3)
    return LinearConfig(128, 128, 64, warps=8, stages=3)


def _linear_of_few_rows(n_rows: int, n_cols: int, n_terms: int, arch: int) -> LinearConfig:
    """Bound by reading the weight once: enough programs to ask for it from every multiprocessor."""
    block_m = 16 if n_rows <= 16 else 32 if n_rows <= 32 else 64
    block_n = 32 if n_rows <= 64 else 64
    n_tiles = -(-n_rows // block_m) * -(-n_cols // block_n)
    split = 1
    while split < 8 and n_tiles * split * 2 <= MULTIPROCESSORS[arch] and n_terms >= 512 * split:
        split *= 2
    # of a 64 x 64 tile in 4 warps ptxas spills a register on sm_86, 89 and 120; in 8 warps none (compile report)
    warps = 8 if block_n == 64 and SHARED_MEMORY[arch] < 100 << 10 else 4
    return LinearConfig(block_m, block_n, 128 if block_m < 64 else 64, warps=warps, stages=4, split_k=split)


def _full_waves(n_rows: int, n_cols: int, block_m: int, block_n: int, arch: int) -> float:
    """Share of the multiprocessors' time that a persistent grid of such tiles has work for."""
    n_tiles = -(-n_rows // block_m) * -(-n_cols // block_n)
    waves = -(-n_tiles // MULTIPROCESSORS[arch])
    return n_tiles / (waves * MULTIPROCESSORS[arch])


# (operator, architecture, dtype, rows bucket, N, K, activation, residual) of products that cuBLAS wins, or not, from
# benchmarks/results/; empty until a GPU has been measured
MEASURED_CUBLAS: dict[tuple, bool] = {}


def cublas_is_better(operator: str, dtype: torch.dtype, architecture: int, rows: int, shape: tuple) -> str | None:
    """Why PyTorch's own product is preferred to the Triton kernel, or None if it is not.

    rows: the bucket, 0 if unknown.   shape: `clipfast.dispatch`'s facts of the call, () if unknown.
    """
    if operator not in ("linear", "mlp"):
        return None
    if dtype == torch.float32:
        return "cuBLAS multiplies float32 faster than Triton does (rule of thumb, not measured)"
    if operator == "mlp" or not shape:
        return None
    _, n_cols, n_terms, activation, residual = shape
    measured = MEASURED_CUBLAS.get((operator, known(architecture), dtype, rows, n_cols, n_terms, activation, residual))
    if measured is not None:
        return "cuBLAS measured faster at this shape" if measured else None
    if activation is None and not residual and (rows == 0 or rows > FEW_ROWS):
        return "cuBLAS comes first where there is nothing to fuse (rule of thumb, not measured)"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Logits and patch embedding: one product each per call, and never the bottleneck


@dataclass(frozen=True)
class TileConfig:
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def logits(n_images: int, n_texts: int, dtype: torch.dtype, architecture: int) -> TileConfig:
    """64 x 64 tiles: a thousand by a thousand is 256 programs."""
    block_m = 16 if n_images <= 16 else 64
    return TileConfig(block_m, 64, 32 if dtype == torch.float32 else 64, warps=4, stages=3)


def hidden_bwd(n_rows: int, dtype: torch.dtype, architecture: int) -> TileConfig:
    """128 x 64 tiles: the epilogue holds a second one and what it makes of both; 128 x 128 spills (compile report)."""
    if dtype == torch.float32:
        return TileConfig(64 if n_rows > 16 else 16, 64, 32, warps=8, stages=2)
    if n_rows <= FEW_ROWS:
        return TileConfig(16 if n_rows <= 16 else 64, 64, 64, warps=4, stages=3)
    return TileConfig(128, 64, 64 if SHARED_MEMORY[known(architecture)] > 100 << 10 else 32, warps=8, stages=3)


def patch_embed(n_rows: int, n_cols: int, patch: int, dtype: torch.dtype, architecture: int) -> TileConfig:
    """block_k counts pixels of whole (padded) pixel rows: two of 32, four of 16 or 14."""
    # 14 pixels in steps of 16 are loaded one by one, each with a pointer and a mask: 4 warps spill, and so they do with
    # bytes on sm_86 and 89 (compile report)
    warps = 8 if patch & (patch - 1) or known(architecture) in (86, 89) else 4
    if dtype == torch.float32:
        # 64 x 64 spills in 4 warps (Triton 3.6) or in 8 (3.7) somewhere (compile report)
        return TileConfig(32, 64, 32, warps=8, stages=2)
    # 128 columns spill on sm_100, in 4 warps and in 8, and on sm_120 (compile report)
    few = n_rows <= FEW_ROWS or known(architecture) >= 100
    return TileConfig(16 if n_rows <= 16 else 64, 64 if few else 128, 64, warps, stages=3)


@dataclass(frozen=True)
class PatchWeightConfig:
    block_cols: int
    block_terms: int
    block_patches: int
    split: int
    warps: int
    stages: int


def patch_weight_bwd(
    n_cols: int, n_terms: int, n_patches: int, dtype: torch.dtype, architecture: int
) -> PatchWeightConfig:
    """64 x 64 tiles of the weight's gradient, the sum over all patches split until every multiprocessor has two."""
    n_tiles = -(-n_cols // 64) * -(-n_terms // 64)
    split = 1
    while split < 8 and n_tiles * split < 2 * MULTIPROCESSORS[known(architecture)] and n_patches >= 128 * split:
        split *= 2
    patches = 32 if dtype == torch.float32 else 64
    return PatchWeightConfig(64, 64, patches, split, warps=8, stages=2)


# ---------------------------------------------------------------------------------------------------------------------
# On a CPU

ANY = sys.maxsize


class RowsOfOurs(NamedTuple):
    """Rows up to which libclipfast_cpu multiplies, and oneDNN beyond."""

    float32: int
    bfloat16: int


# By kind of CPU: the form of the library, or AMX. Times as fast as the best of `F.linear` and oneDNN's fused product,
# whose float32 sums in one chain round 1.7 to 2.4 times as much (cut, it is slower): the four products of a block of
# ViT-B/32 and of ViT-L/14, `make on-this-cpu` on an AMD EPYC (Zen 4, two cores, 2026-11-30), held to what is named.
PRODUCTS = {
    # oneDNN has kernels for these; not measured
    "baseline": RowsOfOurs(0, 0),
    # float32: 1 row 1.2 to 1.3, 8 and 16 rows 1.4 to 1.6, 50 and 77 rows 1.1 to 1.2, 200 to 1,600 rows 0.96 to 1.05.
    # bfloat16, of which oneDNN has no products: 2.8 to 4.5, but one row 0.6
    "avx2": RowsOfOurs(ANY, ANY),
    # not measured in this form: float32 is the code of the next. bfloat16 must be widened, and oneDNN widens it, too
    "avx512": RowsOfOurs(ANY, ANY),
    # float32: 1 row 1.2 to 1.3, 8 and 16 rows 1.4 to 1.5, 50 and 77 rows 1.1 to 1.2, 200 to 1,600 rows 1.0. bfloat16:
    # 1 row 1.4, 8 and 16 rows 1.5 to 1.8, 50 and 77 rows 1.1 to 1.3, 200 and 257 rows 1.04 to 1.09, 800 and 1,600 rows
    # 1.0; there whole blocks in one call decide: 16 images of ViT-B/32 349 -> 321 ms
    "avx512_bf16": RowsOfOurs(ANY, ANY),
    # bfloat16 was not measured: as many rows as a caption has, where reading the weight is all the time
    "amx": RowsOfOurs(ANY, 16),
}


def onednn_is_better(dtype: torch.dtype, rows: int, instructions: str, amx: bool) -> str | None:
    """Why oneDNN's products are preferred to libclipfast_cpu's, or None if they are not.

    rows: the bucket, 0 if unknown, which stands for many.   instructions: `cpu_library.best()`.
    amx:  does this CPU have its tiles?
    """
    ours = PRODUCTS["amx" if amx and instructions == "avx512_bf16" else instructions]
    most = ours.bfloat16 if dtype == torch.bfloat16 else ours.float32
    if most == ANY or 0 < rows <= most:
        return None
    if most == 0:
        return "oneDNN has kernels for this CPU (rule of thumb, not measured)"
    return f"oneDNN has AMX for bfloat16 beyond {most} rows (rule of thumb, not measured)"


# Larger blocks glibc takes from the system at each call and gives back at once, to be faulted in page by page.
MAPPED = 32 << 20


def rows_at_a_time(device: torch.device, width: int, dtype: torch.dtype, laid_out: bool) -> int | None:
    """How many rows go through a tower's blocks together, so that no activation is mapped; None: all of them.

    laid_out: does each product lay its weight out anew? In float32 that costs more than parts save: 19.8 and 18.7 s.
    ViT-L/14's 32 images, in parts of this size and all at once: bfloat16 7.3 and 9.8 s, float32 from the weights as
    they are 13.7 and 15.5 s (AMD EPYC, Zen 5, two cores, 2026-11).
    """
    if device.type != "cpu" or dtype.itemsize > 4 or (laid_out and dtype == torch.float32):
        return None
    return MAPPED // (4 * width * dtype.itemsize)


# ---------------------------------------------------------------------------------------------------------------------
# Contrastive loss


def loss_side(device: torch.device) -> int:
    """Rows and columns of the tiles of logits that are held at a time, three of them at most.

    4 MB each in float32 on a CPU, where they should stay in the cache between the dozen passes over them; 16 MB on a
    GPU, where a tile must be worth its launches. Neither depends on the batch.
    """
    return 1024 if device.type == "cpu" else 2048


@dataclass(frozen=True)
class LossStatisticsConfig:
    tile: TileConfig
    blocks: int  # of rows that a launch covers: each leaves two float32 for every column
    tiles: int  # of columns that a program passes over


def loss_statistics(n_images: int, n_texts: int, dtype: torch.dtype, architecture: int) -> LossStatisticsConfig:
    """16 MB of partial results of the columns at most, and two programs for every multiprocessor where there are."""
    arch = known(architecture)
    if dtype == torch.float32:
        # steps of 16 spill on sm_120 (compile report)
        tile = TileConfig(64, 64, 32 if arch == 120 else 16, warps=8, stages=3)
    elif n_images <= 256:
        tile = TileConfig(16 if n_images <= 16 else 64, 64, 64, warps=4 if n_images <= 16 else 8, stages=3)
    else:
        # a tile's columns are read once for each block of rows: few and large blocks
        tile = TileConfig(128, 64, 64, warps=8, stages=3)
    blocks = min(-(-n_images // tile.block_m), max(1, (16 << 20) // (8 * n_texts)))
    tiles = -(-n_texts // tile.block_n)
    parts = min(tiles, -(-2 * MULTIPROCESSORS[arch] // blocks))
    return LossStatisticsConfig(tile, blocks, -(-tiles // parts))


def loss_gradients(dtype: torch.dtype, architecture: int) -> TileConfig:
    """Bound by reading and writing the tile: 16 elements a thread. There is no product in it, and no block_k."""
    return TileConfig(32, 64, 0, warps=4, stages=1)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@dataclass(frozen=True)
class AttentionTileConfig:
    block: int
    warps: int
    registers: int | None = None  # a thread at most


@dataclass(frozen=True)
class AttentionStreamConfig:
    block_m: int
    block_n: int
    warps: int
    stages: int


def attention_columns(width: int) -> int:
    """Columns of a tile that holds a head: a power of two, and at least what a tensor core multiplies."""
    return max(16, 1 << (width - 1).bit_length())


def attention_tile_block(
    longest: int, n_programs: int, width: int, dtype: torch.dtype, architecture: int, *, tf32: bool
) -> int:
    """Rows of a tile for sequences of at most `longest` rows, n_programs = sequences x heads; 0: they do not fit one.

    Beyond 128 rows the unused part of the scores outweighs the online softmax. Wide heads and float32 stop at 64, since
    128 x 128 scores beside them are more than the registers hold; true float32 is too much from the start.
    """
    block = max(16, 1 << (longest - 1).bit_length())
    small = attention_columns(width) <= 64 and dtype.itemsize == 2
    if block > (128 if small else 64) or _true_float32(dtype, tf32):
        return 0
    # 64 rows of packed captions are multiplied in a seventh of the time that their bytes take: pack them, as soon as
    # every multiprocessor has several programs without
    return max(block, 64) if n_programs > 4 * MULTIPROCESSORS[known(architecture)] else block


def attention_tile(block: int, architecture: int) -> AttentionTileConfig:
    """16 rows a warp."""
    # 128 registers let two blocks of 8 warps share a multiprocessor, one loading while one multiplies. Only sm_90 keeps
    # its operands out of the registers well enough to do with so few
    few = block == 128 and known(architecture) == 90
    return AttentionTileConfig(block, warps=block // 16, registers=128 if few else None)


def attention_stream_block(
    longest: int, n_programs: int, width: int, dtype: torch.dtype, architecture: int, *, tf32: bool
) -> int:
    """Queries a program for sequences of at most `longest` rows, n_programs = sequences x heads."""
    wide = attention_columns(width) > 64
    if _true_float32(dtype, tf32):
        # wide heads: 32 rows spill 8 to 16 bytes on sm_80 and sm_120 (compile report)
        return 16 if wide else 32 if longest <= 32 else 64
    if dtype.itemsize > 2:
        # more spills in places: 64 rows of wide heads on sm_80, 128 of others on sm_80, 86 and 89 (compile report)
        return 32 if wide else 64
    if wide:
        return 64
    # 128 queries read the keys half as often as 64 do. But 257 rows would leave a third of three such blocks idle, and
    # one image alone would leave multiprocessors idle
    by_128 = -(-longest // 128)
    fills = by_128 * n_programs >= MULTIPROCESSORS[known(architecture)]
    return 128 if fills and 2 * by_128 == -(-longest // 64) else 64


def attention_stream(
    block_m: int, width: int, dtype: torch.dtype, architecture: int, *, tf32: bool
) -> AttentionStreamConfig:
    narrow, half = attention_columns(width) <= 64, dtype.itemsize == 2
    if _true_float32(dtype, tf32):
        # products by fused multiply-adds hold the operands in registers: 16 keys at a time are what fits
        return AttentionStreamConfig(block_m, 16, warps=block_m // 8 if narrow else 8, stages=2)
    # 64 keys divide the 256 and 576 patches; wide heads and float32 take half, for registers and shared memory
    block_n = 64 // (1 if narrow else 2) // (1 if half else 2)
    warps = block_m // 16 if narrow or half else block_m // 8
    # 128 rows in three stages spill on sm_100 where keys are left over, as of 197 (compile report)
    few = known(architecture) == 100 and block_m == 128
    return AttentionStreamConfig(block_m, block_n, warps, stages=3 if half and not few else 2)


@dataclass(frozen=True)
class AttentionBackwardConfig:
    block: int  # rows that a program keeps: all of a tile, or its own queries or keys
    inner: int  # rows that pass by at a time
    warps: int
    stages: int


def attention_bwd_tile(block: int, width: int, dtype: torch.dtype) -> AttentionBackwardConfig | None:
    """For the tiles of `attention_tile_block`; None if such a tile's gradient does not fit a program."""
    narrow = attention_columns(width) <= 64
    if not narrow and dtype.itemsize > 2 and block > 32:
        return None  # 152 KB of shared memory for 64 such rows, and sm_86, 89 and 120 have 99 (compile report)
    # 32 keys at a time take half the registers of 64, so that two blocks share a multiprocessor, one loading while one
    # multiplies; 64 spill on sm_120 (compile report). No stages: a tile has four steps at most
    return AttentionBackwardConfig(block, min(block, 32), warps=block // (16 if narrow else 8), stages=1)


def attention_bwd_stream(width: int, dtype: torch.dtype, *, tf32: bool) -> AttentionBackwardConfig:
    """For both kernels: one holds a block of queries, the other one of keys with two accumulators beside it.

    64 rows waste less of 197, 257 and 577 than 128 would. Otherwise each size is the largest without a spill on any
    architecture (compile report); in true float32 two stages keep the operands in shared memory, and one spills.
    """
    narrow = attention_columns(width) <= 64
    if dtype.itemsize == 2:
        return AttentionBackwardConfig(64, 32, warps=4 if narrow else 8, stages=3)
    if narrow:
        return AttentionBackwardConfig(64, 32 if _true_float32(dtype, tf32) else 16, warps=8, stages=2)
    return AttentionBackwardConfig(16 if _true_float32(dtype, tf32) else 32, 16, warps=8, stages=2)


def _true_float32(dtype: torch.dtype, tf32: bool) -> bool:
    return dtype == torch.float32 and not tf32


@dataclass(frozen=True)
class AttentionPoolConfig:
    block_rows: int  # rows whose scores a program computes, over block_terms columns at a time
    block_terms: int
    block_cols: int  # columns whose weighted sum a program computes, over block_keys rows at a time
    block_keys: int
    warps: int
    stages: int


def attention_pool(batch: int, heads: int, dtype: torch.dtype, architecture: int, *, tf32: bool) -> AttentionPoolConfig:
    """Bound by reading the tokens; few sequences get small blocks, to ask for them from more multiprocessors."""
    if _true_float32(dtype, tf32):
        return AttentionPoolConfig(16, 32, 32, 16, warps=4, stages=2)
    few = batch * 8 < MULTIPROCESSORS[known(architecture)]
    return AttentionPoolConfig(
        block_rows=16 if few else 32,
        block_terms=128,
        # many heads hold as many sums in registers: fewer columns and fewer keys at a time
        block_cols=64 if few or heads > 16 else 128,
        block_keys=64 if heads <= 32 else 32,
        warps=4,
        # three stages of 16 bits spill on sm_80, 86 and 89 (compile report)
        stages=2 if dtype.itemsize == 2 else 3,
    )
