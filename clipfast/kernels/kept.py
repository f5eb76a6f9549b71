"""Weights that are laid out once and kept so, for those who ask for it: `clipfast.CLIP.prepack_weights`.

Nothing derived from a parameter may outlive a change of it. A layout is made at the first product that wants it, and
again when the weight is seen to be another: by its version, which PyTorch counts up at each edit, or by its storage.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, UntypedStorage
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class _Kept:
    """The layouts of one weight, each by the function that makes it, with what it was made from."""

    def __init__(self) -> None:
        self.layouts: dict[Callable[..., Any], tuple[tuple[Hashable, ...], weakref.ref[UntypedStorage], Any]] = {}


# By the parameter's id, and gone with it. PyTorch's WeakIdKeyDictionary runs ten Python functions for each look-up, and
# a tower makes fifty: 0.24 of the 43 ms of one image (AMD EPYC, Zen 4: the weights push Python out of the cache).
_kept: dict[int, tuple[weakref.ref[Tensor], _Kept]] = {}
# how often `keep` and `forget` were called
_changes = 0


def _found(weight: Tensor) -> _Kept | None:
    found = _kept.get(id(weight))
    return found[1] if found is not None and found[0]() is weight else None


def _gone(key: int, reference: weakref.ref[Tensor]) -> None:
    """Another tensor may have the id by now."""
    if (found := _kept.get(key)) is not None and found[0] is reference:
        del _kept[key]


def _stepped(optimiser: Optimizer, *_: Any) -> None:
    """PyTorch does not count what its fused optimisers change (torch 2.13)."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if (kept := _found(parameter)) is not None:
                kept.layouts.clear()


_watch_optimisers = functools.cache(functools.partial(register_optimizer_step_post_hook, _stepped))


def _count() -> None:
    global _changes
    _changes += 1


def keep(weights: Iterable[Tensor]) -> None:
    """Keep the layouts of these weights [N, K] from now on, in memory of their own: each as much again as the weight.

    Optimisers and every edit that PyTorch counts (copy_, load_state_dict, another tensor as `.data`) are followed. One
    in place through `.data`, or through NumPy, is not, until this is called again. Nothing is kept any more of a weight
    that is converted in inference mode.
    Raises: ValueError for a weight made in inference mode, whose edits PyTorch does not count.
    """
    weights = list(weights)
    if any(weight.is_inference() for weight in weights):
        raise ValueError("weights made in inference mode cannot be kept packed: PyTorch does not count their edits")
    _watch_optimisers()
    _count()
    for weight in weights:
        key = id(weight)
        _kept[key] = weakref.ref(weight, functools.partial(_gone, key)), _Kept()


def forget(weights: Iterable[Tensor]) -> None:
    """Keep nothing of these weights."""
    _count()
    for weight in weights:
        if _found(weight) is not None:
            _kept.pop(id(weight), None)


def is_kept(weight: Tensor) -> bool:
    return _found(weight) is not None and not weight.is_inference()


def layout(weight: Tensor, make: Callable[..., Any], *arguments: Hashable) -> Any:
    """make(weight, *arguments), made now or before; None if nothing of this weight is kept."""
    kept = _found(weight)
    # a conversion in inference mode puts a tensor into a parameter whose edits are not counted
    if kept is None or weight.is_inference():
        return None
    now = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, *arguments)
    storage = weight.untyped_storage()
    last = kept.layouts.get(make)
    # another storage may lie where a freed one did: after .half().float()
    if last is None or last[0] != now or last[1]() is not storage:
        kept.layouts[make] = last = (now, weakref.ref(storage), make(weight, *arguments))
    return last[2]


class Seen:
    """Weights and their layouts as they are now, to ask in a few calls of C whether `layout` would return the same.

    weights: of which something is kept.   layouts: what `layout` returned for each. They are not kept alive.
    `still` compares version counters and storages. The caller compares addresses, shapes, strides and dtypes.
    """

    def __init__(self, weights: Sequence[Tensor], layouts: Sequence[Tensor]) -> None:
        self.changes = _changes
        self.weights = weights
        self.versions = [*map(_VERSION, weights)]
        self.storages = [weakref.ref(weight.untyped_storage()) for weight in weights]
        self.layouts = [weakref.ref(layout) for layout in layouts]

    def still(self) -> list[Tensor] | None:
        """The layouts, or None if something changed."""
        if self.changes != _changes or any(map(Tensor.is_inference, self.weights)):
            return None
        storages = map(Tensor.untyped_storage, self.weights)
        layouts = [layout for kept in self.layouts if (layout := kept()) is not None]
        same = (
            len(layouts) == len(self.layouts)
            and [*map(_VERSION, self.weights)] == self.versions
            and all(kept() is storage for kept, storage in zip(self.storages, storages, strict=True))
        )
        return layouts if same else None


_VERSION = attrgetter("_version")
