"""onnxruntime on openai/CLIP's graph: float32, and int8 by dynamic quantisation, which is an approximation."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.bench.peers import Batch, Calls, Missing, Peer, Prepare, Spec, module, openai

NAME, INT8 = "onnxruntime", "onnxruntime int8"


class Tower(nn.Module):
    """One tower of openai/CLIP as a module of its own, which exporters want."""

    def __init__(self, model: nn.Module, tower: str):
        super().__init__()
        self.model, self.tower = model, tower

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode_image(x) if self.tower == "image" else self.model.encode_text(x)


def build(spec: Spec, *, int8: bool) -> Prepare:
    runtime = module("onnxruntime", "onnxruntime")
    module("onnx", "onnx")
    module("onnxscript", "onnxscript")  # torch's exporter needs it
    if spec.dtype != torch.float32:
        raise Missing("onnxruntime: float32 weights only")
    made = openai.shared(spec)

    def prepare(tower: str, batch: Batch) -> Calls:
        if tower == "both":
            return {}
        inputs = batch.images if tower == "image" else batch.text
        with tempfile.TemporaryDirectory() as folder:
            path = export(Tower(made, tower).eval(), inputs, Path(folder))
            if int8:
                path = quantised(path)
            session = open_session(runtime, path)
        feed = {session.get_inputs()[0].name: inputs.numpy()}
        return {INT8 if int8 else NAME: lambda: torch.from_numpy(session.run(None, feed)[0])}

    return prepare


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, nobody warns, logs or reports progress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def export(tower: nn.Module, inputs: Tensor, folder: Path) -> Path:
    """tower.onnx in the folder, for inputs of this size, its weights in a file beside it (they may exceed 2 GB)."""
    path = folder / "tower.onnx"
    with quiet(), torch.no_grad():
        torch.onnx.export(tower, (inputs,), str(path), dynamo=True, external_data=True, verbose=False)
    return path


def quantised(path: Path) -> Path:
    """Weights of the products in int8, activations quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_name("int8.onnx")
    with quiet():
        quantize_dynamic(
            str(path),
            str(target),
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            # of tensors whose type the exporter did not write down: 1 is float32
            extra_options={"DefaultTensorType": 1},
        )
    return target


def open_session(runtime: Any, path: Path) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # threads that spin after their own call would take the cores from whoever is timed next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


PEERS = (
    Peer(
        NAME,
        "onnxruntime",
        functools.partial(build, int8=False),
        prepares=1.0,
        weight=8.0,
        devices=("cpu",),
        dtypes=("float32",),
    ),
    Peer(INT8, "onnxruntime", functools.partial(build, int8=True), True, 1.5, 9.0, ("cpu",), ("float32",)),
)
