"""What Triton's interpreter (TRITON_INTERPRET=1: kernels as NumPy on the CPU) gets wrong, and what it lacks.

Of bfloat16 it keeps the bits as uint16, multiplies them as integers in a dot, and cuts float32 off instead of rounding
it to nearest as a GPU does (Triton 3.2 to 3.9). Up to 3.6 it makes an int of a loop's end in a way that NumPy 2.4 no
longer allows; in 3.2 a transposed block is no block; in 3.4 and 3.5 the rows of a tensor descriptor must be multiples
of 16 elements, not bytes. Inline assembly it has none of: each instruction that our kernels use is here as its
documentation has it. And it looks through all of Triton's language at each call of a device function, a good part of
its time. Imported only where the interpreter is on; a GPU never sees this.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widened(handle: TensorHandle) -> np.ndarray:
    """The values of a handle; of bfloat16 as float32, exactly."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = np.matmul(_widened(a), _widened(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _cast_impl(self, src, dst_type):
    values, target = _widened(src), dst_type.scalar
    data = _to_bfloat16(values) if target == tl.bfloat16 else values.astype(interpreter._get_np_dtype(dst_type))
    return TensorHandle(data, target)


def _tanh_approx(x: np.ndarray) -> np.ndarray:
    """PTX's tanh.approx.f32 at the worst that is promised: off by 2^-11 of the result, up for some numbers, else down.

    Source: PTX ISA 7.0, "Floating Point Instructions: tanh".
    """
    # the last bit is as good as random, and always the same for the same number
    up = np.where(x.view(np.uint32) & 1, np.float32(1), np.float32(-1))
    return np.tanh(x) * (1 + up * np.float32(2**-11) * np.isfinite(x))


# with one result and one argument, both float32
_INSTRUCTIONS = {"tanh.approx.f32 $0, $1;": _tanh_approx}


class _Results(NamedTuple):
    """What the interpreter expects of a call with several results."""

    handles: list[TensorHandle]

    def get_result(self, index: int) -> TensorHandle:
        return self.handles[index]


def _create_inline_asm(self, text, constraints, values, types, is_pure, pack):
    if text not in _INSTRUCTIONS:
        raise NotImplementedError(f"{text!r}: the interpreter knows {', '.join(_INSTRUCTIONS)}; add it in {__name__}")
    (x,) = values
    return _Results([TensorHandle(_INSTRUCTIONS[text](x.data), x.dtype.scalar)])


@functools.cache
def _builtins_of(package: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package, *rest):
    """As Triton's own, but that a package is looked through once."""
    for name in _builtins_of(package):
        member = getattr(package, name)
        # patched once, it is none any more
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, *rest)


_patch_lang_tensor = interpreter._patch_lang_tensor


def _transposed(self):
    *batch, rows, cols = self.type.shape
    handle = TensorHandle(np.swapaxes(self.handle.data, -1, -2), self.handle.dtype)
    return tl.core.tensor(handle, tl.core.block_type(self.dtype, [*batch, cols, rows]))


def _patch_lang_tensor_rightly(tensor, *scope):
    """What Triton calls before each kernel, to let its tensors hold NumPy's arrays."""
    _patch_lang_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())
    tensor.T = property(_transposed)


def _validate_descriptor(self):
    itemsize = self.base.dtype.element_ty.primitive_bitwidth // 8
    *rows, last = (stride.data.item() for stride in self.strides)
    assert self.base.data.item() % 16 == 0 and last == 1 and all(stride * itemsize % 16 == 0 for stride in rows)


def install() -> None:
    """Corrects the interpreter of this process."""
    if triton.__version__.startswith(("3.4.", "3.5.")):
        interpreter.TensorDescHandle.validate = _validate_descriptor
    interpreter._patch_lang_tensor = _patch_lang_tensor_rightly
    InterpreterBuilder.create_dot = _create_dot
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_inline_asm = _create_inline_asm
    interpreter._patch_builtin = _patch_builtin
