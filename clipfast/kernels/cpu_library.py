"""libclipfast_cpu, the C++ library built from csrc/: how its operators are called through ctypes.

csrc/clipfast_cpu.h documents the interface.
"""

from __future__ import annotations

import functools
import os
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from clipfast.blocks import BlockWeights
from clipfast.kernels.shared_library import SharedLibrary

# clipfast_cpu_dtype
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# clipfast_cpu_instructions
INSTRUCTIONS = {"best": 0, "baseline": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4}
# CLIPFAST_CPU_READ_BLOCK
READ_BLOCK = 1024
# clipfast_cpu_layout
LAYOUTS = {"rows": 0, "transposed": 1, "packed": 2}
# clipfast_cpu_activation
ACTIVATIONS = {"none": 0, "quick_gelu": 1, "gelu": 2}


class AttentionArgs(Structure):
    """clipfast_cpu_attention_args"""

    _fields_ = [
        ("struct_size", c_int64),
        *((name, c_void_p) for name in ("qkv", "out", "offsets")),
        ("sequences", c_int64),
        *((name, c_int32) for name in ("heads", "width", "dtype", "causal", "threads", "instructions")),
        ("scale", c_float),
    ]


class AttentionPoolArgs(Structure):
    """clipfast_cpu_attention_pool_args"""

    _fields_ = [
        ("struct_size", c_int64),
        *((name, c_void_p) for name in ("query", "tokens", "index", "norm_weight", "norm_bias", "offsets")),
        *((name, c_void_p) for name in ("q_weight", "q_bias", "k_weight", "v_weight", "v_bias", "out")),
        *((name, c_int64) for name in ("sequences", "terms", "inner")),
        *((name, c_int32) for name in ("heads", "dtype", "threads", "instructions")),
        ("eps", c_float),
    ]


class LinearArgs(Structure):
    """clipfast_cpu_linear_args"""

    _fields_ = [
        ("struct_size", c_int64),
        *((name, c_void_p) for name in ("x", "weight", "bias", "residual", "norm_weight", "norm_bias", "out")),
        *((name, c_int64) for name in ("rows", "columns", "terms")),
        *((name, c_int32) for name in ("dtype", "activation", "layout", "threads", "instructions")),
        ("eps", c_float),
    ]


class BlockArgs(Structure):
    """clipfast_cpu_block_args"""

    _fields_ = [
        ("struct_size", c_int64),
        *((name, c_void_p) for name in BlockWeights._fields),
        ("hidden", c_int64),
        *((f"{name}_layout", c_int32) for name in ("qkv", "out", "fc1", "fc2")),
        *((name, c_int32) for name in ("heads", "activation")),
        *((name, c_float) for name in ("scale", "norm_1_eps", "norm_2_eps")),
    ]


class BlocksArgs(Structure):
    """clipfast_cpu_blocks_args"""

    _fields_ = [
        ("struct_size", c_int64),
        *((name, c_void_p) for name in ("blocks", "x", "between", "out", "offsets", "index")),
        *((name, c_void_p) for name in ("norm_weight", "norm_bias", "projection")),
        *((name, c_int64) for name in ("count", "sequences", "width", "columns")),
        *((name, c_int32) for name in ("projection_layout", "dtype", "causal", "threads", "instructions")),
        ("norm_eps", c_float),
    ]


class PackArgs(Structure):
    """clipfast_cpu_pack_args"""

    _fields_ = [
        ("struct_size", c_int64),
        *((name, c_void_p) for name in ("weight", "packed", "bytes")),
        *((name, c_int64) for name in ("columns", "terms")),
        *((name, c_int32) for name in ("dtype", "threads", "instructions")),
    ]


class PatchEmbedArgs(Structure):
    """clipfast_cpu_patch_embed_args"""

    _fields_ = [
        ("struct_size", c_int64),
        *((name, c_void_p) for name in ("images", "weight", "class_embedding", "positional_embedding", "mean", "std")),
        *((name, c_void_p) for name in ("norm_weight", "norm_bias", "out")),
        *((name, c_int64) for name in ("batch", "channels", "height", "width", "patch", "features")),
        *((name, c_int32) for name in ("dtype", "threads", "instructions")),
        ("eps", c_float),
    ]


class PeakArgs(Structure):
    """clipfast_cpu_peak_args"""

    _fields_ = [
        *((name, c_int64) for name in ("struct_size", "steps")),
        ("flops", c_void_p),
        *((name, c_int32) for name in ("dtype", "threads", "instructions")),
    ]


class ReadArgs(Structure):
    """clipfast_cpu_read_args"""

    _fields_ = [
        ("struct_size", c_int64),
        ("data", c_void_p),
        *((name, c_int64) for name in ("bytes", "ahead")),
        *((name, c_int32) for name in ("threads", "instructions")),
    ]


LIBRARY = SharedLibrary(
    "libclipfast_cpu.so",
    "clipfast_cpu",
    10,  # CLIPFAST_CPU_ABI_VERSION
    {
        "clipfast_cpu_best": (c_int, ()),
        "clipfast_cpu_attention": (c_int, (POINTER(AttentionArgs),)),
        "clipfast_cpu_attention_pool": (c_int, (POINTER(AttentionPoolArgs),)),
        "clipfast_cpu_blocks": (c_int, (POINTER(BlocksArgs),)),
        "clipfast_cpu_linear": (c_int, (POINTER(LinearArgs),)),
        "clipfast_cpu_pack": (c_int, (POINTER(PackArgs),)),
        "clipfast_cpu_patch_embed": (c_int, (POINTER(PatchEmbedArgs),)),
        "clipfast_cpu_peak": (c_int, (POINTER(PeakArgs),)),
        "clipfast_cpu_read": (c_int, (POINTER(ReadArgs),)),
    },
    switch="CLIPFAST_CPU",
    needs="GCC 11 or later",
    kind="CPU library",
)
missing = LIBRARY.missing


# holds the library to an older CPU's instructions
SWITCH = "CLIPFAST_CPU_INSTRUCTIONS"


@functools.cache
def best() -> str:
    """What "best" stands for: what this CPU has, or what CLIPFAST_CPU_INSTRUCTIONS names; it is read once.

    Raises: RuntimeError if the library is missing, ValueError if the variable names what this CPU has not.
    """
    most = LIBRARY.use().clipfast_cpu_best()
    able = [name for name, code in INSTRUCTIONS.items() if 0 < code <= most]
    asked = os.environ.get(SWITCH) or able[-1]
    if asked not in able:
        why = "this CPU or build has not" if asked in INSTRUCTIONS else "that is unknown"
        raise ValueError(f"{SWITCH}={asked}: {why}; here it may be {', '.join(able)}")
    return asked


def form(instructions: str) -> int:
    """The code of a form by its name. Raises: as `best`, for "best"."""
    return INSTRUCTIONS[best() if instructions == "best" else instructions]


_forked = False


def stay_alone() -> None:
    """From now on one thread, in a process that was forked from one that had more: it has none of theirs."""
    global _forked
    _forked = True


def threads() -> int:
    """How many an operator may use."""
    return 1 if _forked else torch.get_num_threads()


def pointer(tensor: Tensor | None) -> int | None:
    """Of a contiguous tensor, which the caller keeps alive."""
    return None if tensor is None else tensor.data_ptr()


def readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor contiguous and in this dtype, as the library reads it: itself, or a copy."""
    # PyTorch resolves a view with other signs before an operator that it knows
    tensor = tensor.resolve_neg() if tensor.is_neg() else tensor
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def run(operator: str, args: Structure) -> None:
    """`clipfast_cpu_<operator>`. Raises: RuntimeError if the library is missing or refuses."""
    if code := getattr(LIBRARY.use(), f"clipfast_cpu_{operator}")(byref(args)):
        LIBRARY.check(code)
