"""OpenVINO on openai/CLIP's graph, in float32 and by its bfloat16 hint.

A tower is converted once, for a batch of any size; the graph is given its size before it is compiled.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

from clipfast.bench.peers import FIRST, Batch, Calls, Missing, Peer, Prepare, Spec, module, openai
from clipfast.bench.peers.onnx import Tower, example, quiet
from clipfast.bench.workload import rounded

NAME = "OpenVINO"
HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def library() -> ModuleType:
    """openvino. Raises Missing."""
    # each conversion would tell its makers about it, over the network
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return module("openvino", "openvino")


def build(spec: Spec) -> Prepare:
    openvino = library()
    if spec.dtype not in HINTS:
        raise Missing(f"OpenVINO: no hint for {spec.dtype}")
    # the hint says what it computes in; the weights come as the float32 numbers that everybody's rounding leaves
    if spec.dtype == torch.float32:
        made = openai.shared(spec)
    else:
        made = openai.model(spec._replace(weights=rounded(spec.weights, spec.dtype), dtype=torch.float32))
    core = openvino.Core()
    graphs: dict[str, Any] = {}  # by tower, for a batch of any size

    def prepare(tower: str, batch: Batch) -> Calls:
        if tower == "both":
            return {}
        inputs = batch.images if tower == "image" else batch.text
        if tower not in graphs:
            sizes = [-1, *inputs.shape[1:]]
            with quiet(), torch.no_grad():
                whole = Tower(made, tower).eval()
                graphs[tower] = openvino.convert_model(whole, example_input=example(inputs), input=[sizes])
        graph = graphs[tower].clone()
        graph.reshape(list(inputs.shape))
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[spec.dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = core.compile_model(graph, "CPU", settings)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if used != HINTS[spec.dtype]:
            raise Missing(f"OpenVINO computes in {used} here, not in {HINTS[spec.dtype]}")
        request, data = compiled.create_infer_request(), inputs.numpy()
        return {NAME: lambda: torch.from_numpy(request.infer([data])[0])}

    return prepare


# an AMD EPYC's two cores, 2026-11-30: conversion 6.9 s for 12 layers, compiling 0.6 s
PEER = Peer(
    NAME,
    "openvino",
    build,
    prepares=0.06,
    exports=0.6,
    rank=FIRST,
    devices=("cpu",),
    dtypes=("float32", "bfloat16"),
)
