"""Checks that a state dict is one whole CLIP before anything is built from it, so that errors are plain."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .archive import CheckpointError
from .layouts import some


def check_state_dict(state_dict: Mapping[str, torch.Tensor], *, source: str = "state dict") -> dict[str, Any]:
    """Check that a state dict under openai/CLIP's names is one whole CLIP; warns on NaN and infinity.

    Returns: the architecture it describes, as the keyword arguments of `CLIP`.
    Raises:  CheckpointError naming missing and unexpected weights, wrong shapes, or weights that are not
             floating point.
    """
    from ..model import CLIP, architecture

    try:
        sizes = architecture(state_dict)
        # the real module tree, without memory or arithmetic
        with torch.device("meta"):
            expected = CLIP(**sizes).state_dict()
    except KeyError as error:
        raise CheckpointError(
            f"{source} is not a CLIP state dict: it has no {error.args[0]}; it has {some(list(state_dict))}"
        ) from error
    except (ValueError, IndexError, AssertionError, RuntimeError) as error:
        raise CheckpointError(f"{source} does not describe a CLIP that `load` can build: {error}") from error
    problems = []
    for what, names in (
        ("missing", [n for n in expected if n not in state_dict]),
        ("unexpected", [n for n in state_dict if n not in expected]),
    ):
        if names:
            problems.append(f"{len(names)} {what} weights: {some(names)}")
    common = {name: tensor for name, tensor in state_dict.items() if name in expected}
    shapes = [
        f"{name} (expected {tuple(expected[name].shape)}, got {tuple(tensor.shape)})"
        for name, tensor in common.items()
        if tensor.shape != expected[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} weights of the wrong shape: {some(shapes)}")
    integers = [
        f"{name} ({tensor.dtype})"
        for name, tensor in common.items()
        if expected[name].is_floating_point() and not tensor.is_floating_point()
    ]
    if integers:
        problems.append(f"{len(integers)} weights that are not floating point (quantised?): {some(integers)}")
    if problems:
        raise CheckpointError(f"{source} does not hold one whole CLIP: " + "; ".join(problems))
    # the sum is finite unless something in it is not, or it overflows; only then is it worth a closer look
    floating = {name: tensor for name, tensor in common.items() if tensor.is_floating_point()}
    suspects = [name for name, tensor in floating.items() if not tensor.sum(dtype=torch.float32).isfinite()]
    bad = [name for name in suspects if not common[name].isfinite().all()]
    if bad:
        warnings.warn(f"{source} has NaN or infinity in {len(bad)} weights: {some(bad)}", stacklevel=2)
    return sizes
