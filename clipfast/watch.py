"""Has anybody changed what these modules do?

A tower's short way reads the weights and calls none of its modules. It gives openai/CLIP's numbers only while every
module is what its constructor made it and nobody has put another function where openai/CLIP would call PyTorch's. So
this is asked on each call, and the answer follows at once. What it costs an encode is counted by a test.

The first time a tower is looked through from top to bottom. From then on every object that was found must still be in
its place: a comparison in C, without a Python call for each module. What nobody can see so is code put into a function
that stays the same object (`forward.__code__ = ...`).
"""

from __future__ import annotations

import itertools
import os
import types
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter, is_, itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.activation import GELU, MultiheadAttention
from torch.nn.modules.container import Sequential
from torch.nn.modules.conv import Conv2d
from torch.nn.modules.linear import Linear, NonDynamicallyQuantizableLinear
from torch.nn.modules.normalization import LayerNorm
from torch.nn.modules.sparse import Embedding

from clipfast import compat, dispatch

Gathered = TypeVar("Gathered")

# ---------------------------------------------------------------------------------------------------------------------
# Functions that openai/CLIP looks up on each call


_TORCH = str(Path(torch.__file__).parent) + os.sep
_NATIVE = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


def _is_pytorchs(function: Any) -> bool:
    """Whether PyTorch itself defines it: a wrapper may have the name of what it wraps, but not its code."""
    code = getattr(function, "__code__", None)
    return isinstance(function, _NATIVE) if code is None else code.co_filename.startswith(_TORCH)


class Functions:
    """Functions by the place where they are looked up, each with what it was at first."""

    def __init__(self) -> None:
        self.owners: list[Any] = []
        self.names: list[str] = []
        self.first: list[Any] = []

    def add(self, owner: Any, *names: str) -> None:
        """PyTorch's own; what replaces one already is taken for a change."""
        for name in names:
            # what a PyTorch lacks it does not call
            function = getattr(owner, name, None)
            if hasattr(owner, name):
                self._add(owner, name, function if _is_pytorchs(function) else None)

    def add_ours(self, owner: type, *names: str) -> None:
        for name in names:
            self._add(owner, name, getattr(owner, name))

    def _add(self, owner: Any, name: str, function: Any) -> None:
        self.owners.append(owner)
        self.names.append(name)
        self.first.append(function)

    def unchanged(self) -> bool:
        return all(map(is_, map(getattr, self.owners, self.names), self.first)) or self._changed_back()

    def _changed_back(self) -> bool:
        """What had been replaced before this module was imported may be PyTorch's own again."""
        for i, (owner, name, first) in enumerate(zip(self.owners, self.names, self.first, strict=True)):
            function = getattr(owner, name)
            if first is None and _is_pytorchs(function):
                self.first[i] = function
            elif function is not first:
                return False
        return True


# what the forward pass of openai/CLIP's transformers, and PyTorch's modules in them, look up by name
FUNCTIONS = Functions()
FUNCTIONS.add(torch, "arange", "baddbmm", "bmm", "cat", "embedding", "layer_norm", "matmul", "sigmoid", "zeros")
FUNCTIONS.add(
    F, "_canonical_mask", "_in_projection_packed", "_mha_shape_check", "conv2d", "dropout", "embedding", "gelu",
    "layer_norm", "linear", "multi_head_attention_forward", "scaled_dot_product_attention", "softmax",
)  # fmt: skip
FUNCTIONS.add(
    Tensor, "__add__", "__getitem__", "__matmul__", "__mul__", "__rmul__", "__truediv__", "argmax", "contiguous", "exp",
    "expand", "flatten", "matmul", "norm", "permute", "reshape", "squeeze", "t", "to", "transpose", "type", "unflatten",
    "unsqueeze", "view",
)  # fmt: skip
CALLS = ("__call__", "_call_impl", "_compiled_call_impl", "forward")
FUNCTIONS.add(nn.Module, "__getattr__")
FUNCTIONS.add(Conv2d, "_conv_forward")
for _kind in (
    Conv2d, Embedding, GELU, LayerNorm, Linear, MultiheadAttention, NonDynamicallyQuantizableLinear, Sequential
):  # fmt: skip
    FUNCTIONS.add(_kind, *CALLS)


def looked_at() -> bool:
    """Whether somebody watches or replaces what is called: tracing, torch.func, modes, global hooks, functions."""
    return dispatch.traced() or compat.each_module_is_hooked() or not FUNCTIONS.unchanged()


def plain(tensor: Any) -> bool:
    """Whether a tensor is dense and no subclass: one of those may have a say in every function that it is given to."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


_PLAIN = (Tensor, nn.Parameter)

# ---------------------------------------------------------------------------------------------------------------------
# Modules


_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = itemgetter("_parameters", "_buffers")
_SHAPE, _LAYOUT = Tensor.size, attrgetter("layout")
# put into a module itself, a method of these names goes before its class's
_METHODS = frozenset({"attention", "forward", "_call_impl", "_compiled_call_impl", "_conv_forward"})


def as_made(module: nn.Module | None, kind: type[nn.Module], *weights: str) -> bool:
    """Whether the module is exactly of this class, with these weights, and nobody hooks, patches or re-parametrises it.

    weights: names of the weight, or of the weight and its bias.
    Whether the class's own functions are what they were, `looked_at` says.
    """
    if type(module) is not kind or any(_HOOKS(vars(module))) or not _METHODS.isdisjoint(vars(module)):
        return False
    tensors = [getattr(module, name, None) for name in weights]
    # PyTorch would add a bias of one number to every column
    return all(map(plain, tensors)) and (len(tensors) < 2 or tensors[1].shape == tensors[0].shape[:1])


def still_as_made(module: nn.Module, parts: Callable[[], list[nn.Module] | None]) -> bool:
    """Whether the parts of a module are as they were made.

    parts: looks through them; all the modules that its answer depends on, or None if one is not as it was made. It is
           called again only after something changed.
    """
    record = vars(module).get("_record")
    if record is not None and record.of is vars(module) and record.unchanged():
        return True
    vars(module)["_record"] = None
    found = parts()
    if found is None:
        return False
    vars(module)["_record"] = _Record(vars(module), found)
    return True


def gathered(module: nn.Module, gather: Callable[[], Gathered]) -> Gathered:
    """What gather() returns: called now, or at an earlier call if nothing has changed since.

    gather: collects parameters of the parts that `still_as_made` found. The caller has just called `still_as_made`,
            which sees whether a parameter is another object. What was collected lives until the next change.
    """
    record = vars(module).get("_record")
    return gather() if record is None else record.gathered(gather)


def parameters_of(module: nn.Module) -> Iterator[dict[str, Tensor | None]]:
    """The parameters of a module and of those parts that `still_as_made` found, by module."""
    record = vars(module).get("_record")
    return (attributes["_parameters"] for attributes in ([vars(module)] if record is None else record.attributes))


class _Record:
    """Modules as they are now, in a form that is quickly compared with what they are later.

    Another attribute, one more or less, another child or another order of them, a hook, a parameter or buffer of a new
    class, shape or layout: each is a change. What parameters hold is none.
    """

    def __init__(self, of: dict[str, Any], modules: list[nn.Module]) -> None:
        self.of = of
        self.modules = modules
        self.classes = [type(module) for module in modules]
        self.attributes = [of, *map(vars, modules)]
        self.tensors = tensors = self._tensors()
        self.tensor_classes = [*map(type, tensors)]
        self.present = [tensor is not None for tensor in tensors]
        self.layouts = [tensor.layout for tensor in tensors if tensor is not None]
        self.shapes = [tensor.shape for tensor in tensors if tensor is not None]
        self.dictionaries: list[Any] = []
        self.keys: list[str] = []
        self.values: list[Any] = []
        for attributes in self.attributes:
            self._keep(attributes, [n for n in attributes if n in _PRIVATE or not (n.startswith("_") or n in _UNREAD)])
            self._keep(attributes["_modules"], attributes["_modules"])
        for module in modules:
            self._keep(vars(module), [name for name in _METHODS if hasattr(module, name)])
        self.last_gathered: tuple[list[Tensor | None], Any] | None = None
        self.sizes = [*map(len, self.attributes)]
        self.children = [attributes["_modules"] for attributes in self.attributes]
        self.order = [*map(tuple, self.children)]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple]:
        """A copy of the module, and what is read back from a file, is looked through anew."""
        return _nothing, ()

    def _keep(self, dictionary: Any, names: Iterable[str]) -> None:
        for name in names:
            self.dictionaries.append(dictionary)
            self.keys.append(name)
            self.values.append(dictionary.get(name, _GONE))

    def _tensors(self) -> list[Tensor | None]:
        chained = itertools.chain.from_iterable
        return [*chained(map(dict.values, chained(map(_TENSORS, self.attributes))))]

    def _same_tensors(self) -> bool:
        tensors = self._tensors()
        if [*map(type, tensors)] != self.tensor_classes:
            return False
        if not all(map(is_, tensors, self.tensors)):
            self.tensors = tensors
        there = [*itertools.compress(tensors, self.present)]
        return [*map(_SHAPE, there)] == self.shapes and [*map(_LAYOUT, there)] == self.layouts

    def gathered(self, gather: Callable[[], Gathered]) -> Gathered:
        tensors, last = self.tensors, self.last_gathered
        if last is None or last[0] is not tensors:
            self.last_gathered = last = tensors, gather()
        return last[1]

    def unchanged(self) -> bool:
        # `map` and its functions run in C: no frame of Python's for each module
        return (
            all(map(is_, map(vars, self.modules), self.attributes[1:]))
            and all(map(is_, map(dict.get, self.dictionaries, self.keys, itertools.repeat(_GONE)), self.values))
            and [*map(len, self.attributes)] == self.sizes
            and [*map(tuple, self.children)] == self.order
            and not any(itertools.chain.from_iterable(map(_HOOKS, self.attributes[1:])))
            and all(map(is_, map(type, self.modules), self.classes))
            and self._same_tensors()
        )


_GONE = object()
# what forward passes read of a module's own names
_PRIVATE = frozenset({"_modules", "_qkv_same_embed_dim"})
# and what neither they nor the short way read
_UNREAD = frozenset({"elementwise_affine", "head_dim", "in_features", "kdim", "out_features", "vdim"})


def _nothing() -> None:
    return None
