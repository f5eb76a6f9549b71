"""openai/CLIP, eager, as its README calls it."""

from __future__ import annotations

import functools

import torch
from torch import nn

from clipfast.bench.peers import OPENAI, Peer, Prepare, Spec, module, uninitialised
from clipfast.bench.peers.ours import prepare
from clipfast.model import convert_weights


def model(spec: Spec) -> nn.Module:
    """In eval mode on the spec's device.

    Not through its build_model: that rounds float32 weights through float16, and has no bfloat16.
    """
    library = module("clip", OPENAI)
    with spec.device, uninitialised():
        made = library.model.CLIP(**spec.architecture)
    made.load_state_dict(spec.weights)
    if spec.dtype != torch.float32:
        convert_weights(made, spec.dtype)
    return made.eval().to(spec.device)


def shared(spec: Spec) -> nn.Module:
    """The last model made of these weights in this dtype: several peers read the same one, and it holds gigabytes."""
    for known, made in _last:
        if known.weights is spec.weights and known[2:] == spec[2:]:
            return made
    _last.clear()
    _last.append((spec, model(spec)))
    return _last[0][1]


_last: list[tuple[Spec, nn.Module]] = []


def build(spec: Spec) -> Prepare:
    return functools.partial(prepare, shared(spec), OPENAI)


PEER = Peer(OPENAI, OPENAI, build)
