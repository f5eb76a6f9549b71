"""An id for each Triton launch. What was proved right is not checked again; what is wrong is not timed.

A launch's id is a hash of all that decides its code: the kernel's source and that of what it calls, the types and
known sizes of its arguments, its tile, warps and stages, the architecture, and Triton's version. So what an earlier run
found right stays right as long as none of them changes, whatever else is committed in between; and what one
configuration gets wrong condemns this configuration alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.plans import ROOT
from benchmarks.gpu.run import Run
from clipfast import dispatch, tuning
from clipfast.bench.markdown import ON_PYTORCH
from clipfast.kernels import library

# what a check's verdict depends on besides its launches: the bound, and the peer that it is taken from
_RULES = ("tests/accuracy.py", "tests/op_cases.py")


class Launch(NamedTuple):
    id: str
    name: str  # kernel, types, tile and flags, as benchmarks/compilation.py describes them


class Condemned(RuntimeError):
    """A launch that a check has found wrong on this GPU was about to be made."""


def can_see() -> bool:
    """Whether launches can be seen before they are made: by Triton's compiler since 3.4, not by its interpreter."""
    if library.triton_missing() or library.interpreted():
        return False
    import triton

    return hasattr(triton, "knobs")


def launches_of(call: Callable[[], Any], device: torch.device) -> list[Launch]:
    """What the call would launch; nothing is compiled or launched, so that what it returns holds no results.

    Where launches cannot be seen: none.
    """
    if not can_see():
        return []
    import triton

    from benchmarks import compilation

    try:
        found = compilation.collect([call], [tuning.architecture(device)])
    finally:
        if device.type == "cuda":
            triton.runtime.driver.reset_active()
    return [
        Launch(_id(each.module, each.kernel, each.architecture, json.loads(each.specialization)), str(each))
        for each in found
    ]


def ids_of(call: Callable[[], Any], device: torch.device) -> list[str]:
    return [launch.id for launch in launches_of(call, device)]


def _id(module: str, kernel: str, architecture: int, specialization: dict[str, Any]) -> str:
    # Triton's own key repeats the rest, in another form from version to version
    known = {name: value for name, value in specialization.items() if name != "key"}
    return _hash(_source(module, kernel), architecture, known)


@functools.cache
def _source(module: str, kernel: str) -> str:
    """Hash of a kernel's source and of what it calls, by Triton, and Triton's version."""
    import triton

    return f"{getattr(importlib.import_module(module), kernel).cache_key} {triton.__version__}"


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@functools.cache
def _rules() -> str:
    return _hash(*((ROOT / path).read_text() for path in _RULES))


def key(name: str, launches: Iterable[Launch], *, more: str = "") -> str:
    """Of a check: what its verdict depends on. Empty where that is not known, and then nothing is left out.

    more: besides its launches, such as the source of a library.
    """
    ids = sorted(each.id for each in launches)
    return _hash(name, ids, more, _rules()) if ids or more else ""


# ---------------------------------------------------------------------------------------------------------------------
# Kept out of what is timed


def forbid(wrong: Mapping[str, str]) -> None:
    """From now on, in this process, a launch with one of these ids raises Condemned.

    Those that were compiled before are not seen.
    wrong: id -> what it gets wrong; what is added later counts too.
    """
    if not can_see():
        return
    from triton import knobs

    def look(*, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        jit = fn.jit_function
        architecture = tuning.architecture(torch.device("cuda"))
        found = _id(jit.module, jit.fn.__name__, architecture, json.loads(compile["specialization_data"]))
        if found in wrong:
            raise Condemned(f"{jit.fn.__name__}: {wrong[found]}")
        return False

    knobs.runtime.jit_cache_hook = look


def fall_back(run: Run) -> Callable[[], list[str]]:
    """Forbids what is wrong, and has PyTorch run the operators that would launch it.

    So a table's wrong entry costs the calls that choose it, and the rest of a model is timed as it is.
    Returns: a function that says, since it was last asked, which operators went to PyTorch, and why.
    """
    said: dict[str, None] = {}
    if run.wrong and can_see():
        from clipfast.kernels import eager, eager_gradients, fused, fused_gradients

        forbid(run.wrong)
        plain = {name: getattr(eager, name) for name in dispatch.OPERATORS}
        for table, others in (
            (fused.TRITON, plain),
            # a kernel of the backward is launched later, and fails there
            (fused_gradients.OPERATORS, plain | eager_gradients.OPERATORS),
        ):
            for operator, ours in [*table.items()]:
                if operator in others:
                    table[operator] = _instead(operator, ours, others[operator], said)

    def new() -> list[str]:
        found = list(said)
        said.clear()
        return found

    return new


def _instead(
    operator: str, ours: Callable[..., Any], theirs: Callable[..., Any], said: dict[str, None]
) -> Callable[..., Any]:
    @functools.wraps(ours)
    def run(*arguments: Any) -> Any:
        try:
            return ours(*arguments)
        except Condemned as why:
            said[f"{operator} {ON_PYTORCH} {why}"] = None
            return theirs(*arguments)

    return run
