"""What Triton's interpreter (TRITON_INTERPRET=1: kernels as NumPy on the CPU) gets wrong about bfloat16.

It keeps the bits as uint16, multiplies them as integers in a dot, and cuts float32 off instead of rounding it to
nearest as a GPU does (Triton 3.6 to 3.9). Imported only where the interpreter is on; a GPU never sees this.
"""

from __future__ import annotations

import numpy as np
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


def install() -> None:
    """Corrects the interpreter of this process."""
    InterpreterBuilder.create_dot = _create_dot
    InterpreterBuilder.cast_impl = _cast_impl
