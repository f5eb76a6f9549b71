"""The matrix product of another checkout of clipfast, for a benchmark to time beside this one's."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from types import ModuleType

from torch import Tensor

from clipfast.bench import environment
from clipfast.kernels import cpu_library

# that a version's LinearArgs may have
FIELDS = {"struct_size", "x", "weight", "bias", "residual", "out", "rows", "columns", "terms"}
FIELDS |= {"dtype", "activation", "packed", "layout", "threads", "instructions", "norm_weight", "norm_bias", "eps"}


class OtherProduct:
    """What its libclipfast_cpu makes of x @ weight.T + bias.

    Its library is called by its own cpu_library.py, since the C structures differ from version to version, and without
    its operators: PyTorch has ours under their names.
    """

    def __init__(self, checkout: Path):
        """Raises: ValueError if the checkout has no product of ours, or it is not built, or cannot be called."""
        file = checkout / "clipfast" / "kernels" / "cpu_library.py"
        if not file.is_file():
            raise ValueError(f"expected a checkout of clipfast, and {checkout} has no clipfast/kernels/{file.name}")
        self._module = _imported(file)
        self._module.LIBRARY.forget(file.parent / "libclipfast_cpu.so")
        if why := self._module.LIBRARY.missing():
            raise ValueError(f"{checkout}: {why}")
        self._fields = [name for name, _ in self._module.LinearArgs._fields_]
        if unknown := sorted(set(self._fields) - FIELDS):
            wants = ", ".join(unknown)
            raise ValueError(f"{checkout}: its product wants {wants}: add it to FIELDS and __call__ of {__name__}")
        self.name = f"clipfast {environment.commit(file) or 'of another checkout'}"

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, instructions: str = "best") -> Tensor:
        """x: [rows, terms].   weight: [columns, terms].   bias: [columns].   All contiguous.

        Raises: RuntimeError if the library refuses, KeyError if it has no such instructions or dtype.
        """
        module = self._module
        out = x.new_empty(len(x), len(weight))
        tensors = {"x": x, "weight": weight, "bias": bias, "out": out}
        values = {name: cpu_library.pointer(tensor) for name, tensor in tensors.items()}
        values |= {"rows": len(x), "columns": len(weight), "terms": weight.shape[1]}
        values |= {"struct_size": ctypes.sizeof(module.LinearArgs), "threads": cpu_library.threads()}
        values |= {"dtype": module.DTYPES[x.dtype], "instructions": module.INSTRUCTIONS[instructions]}
        values |= {"activation": module.ACTIVATIONS["none"]}
        # what is not set is 0, and none
        args = module.LinearArgs(**{name: value for name, value in values.items() if name in self._fields})
        module.LIBRARY.check(module.LIBRARY.use().clipfast_cpu_linear(ctypes.byref(args)))
        return out


def _imported(file: Path) -> ModuleType:
    """The module of this file, known to nobody else."""
    spec = importlib.util.spec_from_file_location("clipfast_of_another_checkout", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} does not import: {error}") from error
    return module
