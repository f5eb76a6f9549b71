"""Every private name of PyTorch that clipfast uses, and what happens in a PyTorch that lacks it.

PyTorch promises nothing about these names. `PRIVATE` lists them, the functions below are the only ones that call them,
and `clipfast doctor` says which are missing. Where a way to notice that somebody is looking is missing, clipfast takes
it that somebody is: the numbers stay right, and only the speed is lost. tests/test_compat.py holds the package to the
list, and the list to the PyTorch that is installed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


class Private(NamedTuple):
    """A private name, below `torch`."""

    name: str
    purpose: str
    without: str  # what happens in a PyTorch that lacks it
    since: str = "2.6"  # the first release that has it; "2.6" also for older ones, since clipfast needs 2.6
    until: str | None = None  # the first release that lacks it again; None while the newest one has it
    inline: bool = False  # an attribute, read where it is needed: a call around each read would cost too much
    cuda: bool = False  # only a PyTorch that is built with CUDA has it, and only that needs it


_LONG_WAY = "every call goes the long way, at openai/CLIP's speed"
_DEVICES_COUNT = "inside `with torch.device(...)` " + _LONG_WAY
_NO_ONEDNN = "no backend 'onednn': PyTorch's plain products serve"

PRIVATE = (
    # who is looking at each operator, or at each module
    Private("_C._functorch.peek_interpreter_stack", "is a transform of torch.func on?", _LONG_WAY),
    Private("_C._len_torch_dispatch_stack", "is a TorchDispatchMode on?", _LONG_WAY),
    Private("_C._len_torch_function_stack", "is a TorchFunctionMode on?", _LONG_WAY),
    Private("_C._get_function_stack_at", "which TorchFunctionModes are on?", _DEVICES_COUNT),
    Private("utils._device.DeviceContext", "a TorchFunctionMode that looks at no operator", _DEVICES_COUNT),
    Private("autograd.forward_ad._current_level", "is forward-mode differentiation on?", _LONG_WAY),
    Private("nn.modules.module._global_forward_hooks", "hooks on every module", _LONG_WAY),
    Private("nn.modules.module._global_forward_pre_hooks", "hooks on every module", _LONG_WAY),
    Private("nn.modules.module._global_backward_hooks", "hooks on every module", _LONG_WAY),
    Private("nn.modules.module._global_backward_pre_hooks", "hooks on every module", _LONG_WAY),
    Private("nn.Module._forward_hooks", "hooks on one module", "encode_* raises", inline=True),
    Private("nn.Module._forward_pre_hooks", "hooks on one module", "encode_* raises", inline=True),
    Private("nn.Module._backward_hooks", "hooks on one module", "encode_* raises", inline=True),
    Private("nn.Module._backward_pre_hooks", "hooks on one module", "encode_* raises", inline=True),
    # has somebody put another function in their place? (`clipfast.watch`)
    Private("nn.Module._call_impl", "a call of a module", "not watched", inline=True),
    Private("nn.Module._compiled_call_impl", "a compiled call of a module", "not watched", inline=True),
    Private("nn.Conv2d._conv_forward", "a convolution", "not watched", inline=True),
    Private("nn.functional._canonical_mask", "part of attention", "not watched", inline=True),
    Private("nn.functional._in_projection_packed", "part of attention", "not watched", inline=True),
    Private("nn.functional._mha_shape_check", "part of attention", "not watched", inline=True),
    Private("nn.MultiheadAttention._qkv_same_embed_dim", "one weight or three?", "encode_* raises", inline=True),
    Private("nn.Module._modules", "children by name, without named_children's cost", "encode_* raises", inline=True),
    Private("nn.Module._parameters", "is a weight what it was, and where?", "encode_* raises", inline=True),
    Private("nn.Module._buffers", "is a buffer what it was?", "encode_* raises", inline=True),
    Private("Tensor._version", "has a weight been edited since its layout was kept?", "prepacked: raises", inline=True),
    Private("nn.modules.batchnorm._BatchNorm", "every kind of BatchNorm", "PyTorch's own four kinds alone"),
    # kernels that no public function reaches
    Private("ops.mkldnn._linear_pointwise", "a product fused with what follows", _NO_ONEDNN),
    Private("ops.mkldnn._linear_pointwise.binary", "a product fused with a sum", _NO_ONEDNN),
    Private("ops.mkldnn._reorder_linear_weight", "a weight as oneDNN reads it", _NO_ONEDNN),
    Private("ops.mkldnn._is_mkldnn_bf16_supported", "bfloat16 products", "no bfloat16 on backend 'onednn'"),
    Private("ops.aten._scaled_dot_product_flash_attention_for_cpu", "training", "PyTorch's own gradients"),
    Private("ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", "training", "PyTorch's own gradients"),
    Private("cpu._is_amx_tile_supported", "which bfloat16 product is faster?", "a CPU counts as one without AMX"),
    Private("cpu._is_avx512_bf16_supported", "is bfloat16 emulated?", "a CPU counts as one without AVX512_BF16"),
    Private("_C._cuda_clearCublasWorkspaces", "cuBLAS in a CUDA graph", "its memory may be shared", cuda=True),
    Private("cuda._sleep", "holds a GPU while what is timed is enqueued", "timings of a GPU hold the launch's way"),
)
# Names that are not looked up, but set on objects of ours for PyTorch to find.
#   _dynamo_marked_constant, of a function: torch.compile runs it while tracing (`constant_when_traced`).
#   _metadata, of a state dict: load_state_dict passes over what it does not know (`clipfast.checkpoints`).
SET = ("_dynamo_marked_constant", "_metadata")


def find(name: str) -> Any:
    """What this PyTorch has under a dotted name below `torch`, None where it has nothing."""
    found = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def missing() -> list[Private]:
    """What is not in this PyTorch. Of attributes that a module gets when it is made, a module is asked."""
    module = torch.nn.MultiheadAttention(1, 1)
    return [
        entry
        for entry in PRIVATE
        if not (entry.cuda and torch.version.cuda is None)
        and find(entry.name) is None
        and not (entry.inline and hasattr(module, entry.name.rpartition(".")[2]))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Who is looking


def _always() -> int:
    return 1


_transforms = find("_C._functorch.peek_interpreter_stack") or _always
_dispatch_modes = find("_C._len_torch_dispatch_stack") or _always
_function_modes = find("_C._len_torch_function_stack") or _always
_function_mode = (_function_modes is not _always and find("_C._get_function_stack_at")) or (lambda index: None)
with contextlib.suppress(ImportError):  # PyTorch itself imports it at the first use
    importlib.import_module("torch.utils._device")
_DEVICE = find("utils._device.DeviceContext")
_forward_ad = torch.autograd.forward_ad
_HOOKS = [find(f"nn.modules.module._global_{kind}_hooks") for kind in ("forward", "forward_pre")]
_HOOKS += [find(f"nn.modules.module._global_{kind}_hooks") for kind in ("backward", "backward_pre")]
if None in _HOOKS:
    _HOOKS = [{"hooks": "cannot be seen"}]


def each_operator_is_seen() -> bool:
    """True inside a transform of torch.func, a dispatch or function mode, or forward-mode differentiation."""
    return (
        _transforms() is not None
        or _dispatch_modes() > 0
        or getattr(_forward_ad, "_current_level", 0) >= 0
        or (_function_modes() > 0 and _a_mode_sees_functions())
    )


def _a_mode_sees_functions() -> bool:
    # torch.set_default_device and `with torch.device(...)` are modes too, but touch only what makes new tensors
    return any(type(_function_mode(index)) is not _DEVICE for index in range(_function_modes()))


def each_module_is_hooked() -> bool:
    """True while a hook is registered for all modules."""
    # `torch.nn.modules.module._has_any_global_hook` asks the same, since 2.8
    return any(_HOOKS)


def constant_when_traced(function: Function) -> Function:
    """torch.compile runs the function while it traces, and puts its result into the graph.

    As torch.compiler.assume_constant_result, which would import torch._dynamo: a second of everybody's time.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# for isinstance
BATCH_NORMS = find("nn.modules.batchnorm._BatchNorm") or (
    torch.nn.BatchNorm1d,
    torch.nn.BatchNorm2d,
    torch.nn.BatchNorm3d,
    torch.nn.SyncBatchNorm,
)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels that no public function reaches

linear_pointwise: Callable[..., Tensor] = find("ops.mkldnn._linear_pointwise")
linear_pointwise_binary: Callable[..., Tensor] = find("ops.mkldnn._linear_pointwise.binary")
reorder_linear_weight: Callable[..., Tensor] = find("ops.mkldnn._reorder_linear_weight")

flash_attention_for_cpu: Callable[..., Any] = find("ops.aten._scaled_dot_product_flash_attention_for_cpu")
flash_attention_for_cpu_backward: Callable[..., Any] = find(
    "ops.aten._scaled_dot_product_flash_attention_for_cpu_backward"
)


def onednn_missing() -> str | None:
    """Why this PyTorch has no fused oneDNN products, or None if it has."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    if None in (linear_pointwise, linear_pointwise_binary, reorder_linear_weight):
        return "this PyTorch has no mkldnn::_linear_pointwise"
    return None


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU."""
    supported = find("ops.mkldnn._is_mkldnn_bf16_supported")
    return supported is not None and supported()


def cpu_has_amx() -> bool:
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def cpu_has_avx512_bf16() -> bool:
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


@constant_when_traced
def allows_tf32() -> bool:
    """Whether products of float32 may be tf32's on a GPU, by either of PyTorch's two switches."""
    matmul = torch.backends.cuda.matmul
    # the second one came with 2.9; once it was set, the first one raises, and torch.compile cannot trace it
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def clear_cublas_workspaces() -> None:
    """cuBLAS takes new memory for its next call: in a CUDA graph, of the graph's pool."""
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()


def hold_gpu(cycles: int) -> None:
    """Keeps the GPU waiting for about so many of its clock's cycles, in its current stream."""
    getattr(torch.cuda, "_sleep", lambda _: None)(cycles)
