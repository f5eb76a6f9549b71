"""Patch embedding through libclipfast, the CUDA library built from csrc/.

The library knows nothing of torch: it takes pointers, sizes, a device index and a stream, through ctypes. Nothing is
loaded before the first use, and `missing()` says why it cannot be. csrc/clipfast.h documents the interface.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from clipfast.kernels import library
from clipfast.kernels.shared_library import SharedLibrary

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
# How a call is computed; csrc/clipfast.h says what each takes.
PLANS = {"auto": 0, "generic": 1, "split": 2, "fused": 3}


class _PatchEmbedArgs(Structure):
    """clipfast_patch_embed_args"""

    _fields_ = [
        ("struct_size", c_int64),
        *((name, c_void_p) for name in ("images", "weight", "class_embedding", "positional_embedding", "mean", "std")),
        *((name, c_void_p) for name in ("norm_weight", "norm_bias", "out")),
        *((name, c_int64) for name in ("batch", "channels", "height", "width", "patch", "features")),
        *((name, c_int64) for name in ("stride_batch", "stride_channel", "stride_row")),
        ("eps", c_float),
        *((name, c_int32) for name in ("image_dtype", "weight_dtype", "plan")),
    ]


LIBRARY = SharedLibrary(
    "libclipfast.so",
    "clipfast",
    1,  # CLIPFAST_ABI_VERSION
    {
        "clipfast_patch_embed": (c_int, (POINTER(_PatchEmbedArgs), c_int, c_void_p)),
        "clipfast_patch_embed_host": (c_int, (POINTER(_PatchEmbedArgs), c_int)),
    },
    switch="CLIPFAST_CUDA",
    needs="nvcc and GCC",
    kind="CUDA library",
)
missing = LIBRARY.missing


def _readable(images: Tensor, weight: Tensor) -> Tensor:
    """images in a form that the kernels read: at best themselves, else one copy.

    The tensor-core kernels take uint8, float32 or the weight's dtype, in groups of 8 pixels (2 where P = 14).
    """
    size = weight.shape[-1]
    if images.dtype not in (torch.uint8, torch.float32, weight.dtype):
        images = images.to(weight.dtype)  # rounds as eager does
    group = 8 if size % 8 == 0 else 2
    even = all(stride % group == 0 for stride in images.stride()[:3])
    whole = images.data_ptr() % min(16, group * images.element_size()) == 0
    if images.stride(3) == 1 and (weight.dtype == torch.float32 or size not in (14, 16, 32) or (even and whole)):
        return images
    height, width = images.shape[2] // size * size, images.shape[3] // size * size
    return images[:, :, :height, :width].contiguous()


def _vector(x: Tensor | None, device: torch.device) -> Tensor | None:
    """x as the kernels read it: float32, contiguous, at a multiple of 8 bytes."""
    if x is None:
        return None
    x = x.to(device, torch.float32, non_blocking=True).contiguous()
    return x.clone() if x.data_ptr() % 8 else x


def _patch_embed_fwd(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    plan: str,
    reversed_order: bool = False,
) -> Tensor:
    """On CUDA tensors the kernels, on CPU tensors their host twin."""
    built = LIBRARY.use()
    out = _fake(images, weight, class_embedding, positional_embedding)
    batch, channels, height, width = images.shape
    if images.dtype != torch.uint8:
        mean = std = None
    images, weight = _readable(images, weight), weight.contiguous()
    if weight.data_ptr() % 16:
        weight = weight.clone()
    vectors = (class_embedding, positional_embedding, mean, std, norm_weight, norm_bias)
    # the list keeps copies alive until the work is enqueued; after that their memory is reused in the stream's order
    tensors = [images, weight, *(_vector(x, out.device) for x in vectors), out]
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    sizes = (batch, channels, height, width, weight.shape[-1], len(weight), *images.stride()[:3])
    codes = (DTYPES[images.dtype], DTYPES[weight.dtype], PLANS[plan])
    args = _PatchEmbedArgs(ctypes.sizeof(_PatchEmbedArgs), *pointers, *sizes, eps, *codes)
    if out.is_cuda:
        stream = torch.cuda.current_stream(out.device).cuda_stream
        LIBRARY.check(built.clipfast_patch_embed(byref(args), out.device.index, stream))
    else:
        LIBRARY.check(built.clipfast_patch_embed_host(byref(args), reversed_order))
    return out


def _fake(images: Tensor, weight: Tensor, class_embedding: Tensor, positional_embedding: Tensor, *others) -> Tensor:
    return weight.new_empty((images.shape[0], *positional_embedding.shape))


_patch_embed = library.define(
    "native_patch_embed(Tensor images, Tensor weight, Tensor class_embedding, Tensor positional_embedding, "
    "Tensor? mean, Tensor? std, Tensor? norm_weight, Tensor? norm_bias, float eps, str plan) -> Tensor",
    _patch_embed_fwd,
    _fake,
)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    plan: str = "auto",
) -> Tensor:
    """Class token, linear embedding of each P x P patch, positions, and ln_pre if norm_weight is given, on a GPU.

    images: [B, C, H, W] uint8 (with mean and std [C]), float16, bfloat16 or float32, any strides; pixels past the last
            whole patch are not read. Copied first if the last stride is not 1, and for P = 14, 16 or 32 in half
            precision if rows do not start at multiples of a group of pixels.
    weight: [W, C, P, P] float16, bfloat16 or float32.   class_embedding: [W].   positional_embedding: [1 + G, W].
    norm_weight, norm_bias: [W], both or neither.   eps: of ln_pre.
    plan:   "auto", or "generic", "split", "fused" to force one.
    Returns: [B, 1 + G, W], dtype of weight. Products and LayerNorm statistics in float32.
    Raises: RuntimeError if the library is missing, the plan does not take the arguments, or CUDA reports an error.
    Source: Dosovitskiy et al. 2020, arXiv:2010.11929.
    """
    return _patch_embed(
        images,
        weight,
        class_embedding,
        positional_embedding,
        mean,
        std,
        norm_weight,
        norm_bias,
        eps,
        plan,
    )


def patch_embed_host(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    plan: str = "auto",
    reversed_order: bool = False,
) -> Tensor:
    """What `patch_embed` computes, on CPU tensors: the kernels' own code run lane by lane, tensor cores emulated.

    For tests: thousands of times slower than PyTorch. "auto" takes "fused" wherever it can.
    reversed_order: run warps and lanes from the last to the first, which a missing barrier would not survive.
    """
    return _patch_embed_fwd(
        images,
        weight,
        class_embedding,
        positional_embedding,
        mean,
        std,
        norm_weight,
        norm_bias,
        eps,
        plan,
        reversed_order,
    )
