"""onnxruntime on openai/CLIP's graph: float32, and int8 by dynamic quantisation, which is an approximation.

A tower is exported once, for a batch of any size; a session is told its size, and optimises the graph for that.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.bench.peers import FIRST, LAST, Batch, Calls, Missing, Peer, Prepare, Spec, module, openai

NAME, INT8 = "onnxruntime", "onnxruntime int8"
GRAPH, BATCH = "tower.onnx", "batch"


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
    kept = None if spec.folder else tempfile.TemporaryDirectory()

    def prepare(tower: str, batch: Batch) -> Calls:
        if tower == "both":
            return {}
        inputs = batch.images if tower == "image" else batch.text
        folder = spec.folder or Path(kept.name)
        # several peers of a run want it, in processes of their own
        path = once(folder / f"{tower}-onnx", lambda part: export(spec, tower, inputs, part))
        if int8:
            path = once(folder / f"{tower}-onnx-int8", lambda part: quantised(path, part))
        session = open_session(runtime, path, len(inputs))
        feed = {session.get_inputs()[0].name: inputs.numpy()}
        return {INT8 if int8 else NAME: lambda: torch.from_numpy(session.run(None, feed)[0])}

    return prepare


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`tower.onnx` in the folder, made there if the folder is not there yet; never half of it."""
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as parts:
            part = Path(parts) / "whole"
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder / GRAPH


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


def example(inputs: Tensor) -> Tensor:
    """Two samples like these: a batch of one would be taken for a size that never changes."""
    return inputs[:1].expand(2, *inputs.shape[1:]).contiguous()


def export(spec: Spec, tower: str, inputs: Tensor, folder: Path) -> None:
    """GRAPH in the folder, for a batch of any size, its weights in a file beside it (they may exceed 2 GB).

    inputs: of the tower, a batch of any size.
    """
    whole = Tower(openai.model(spec), tower).eval()
    sizes = ({0: torch.export.Dim(BATCH)},)
    with quiet(), torch.no_grad():
        torch.onnx.export(
            whole,
            (example(inputs),),
            str(folder / GRAPH),
            dynamo=True,
            external_data=True,
            verbose=False,
            dynamic_shapes=sizes,
        )


def quantised(path: Path, folder: Path) -> None:
    """GRAPH in the folder: weights of the products in int8, activations quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            str(path),
            str(folder / GRAPH),
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            # of tensors whose type the exporter did not write down: 1 is float32
            extra_options={"DefaultTensorType": 1},
        )


def open_session(runtime: Any, path: Path, batch: int) -> Any:
    """With its own settings but the number of threads, which is PyTorch's."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name(BATCH, batch)
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# in float32 on a CPU; an AMD EPYC's two cores, 2026-11-30: export 10 to 14 s for 12 layers, a session 0.4 s
PEERS = (
    Peer(
        NAME,
        "onnxruntime",
        functools.partial(build, int8=False),
        prepares=0.05,
        exports=1.0,
        rank=FIRST,
        devices=("cpu",),
        dtypes=("float32",),
    ),
    Peer(
        INT8,
        "onnxruntime",
        functools.partial(build, int8=True),
        approximate=True,
        prepares=0.05,
        exports=1.1,
        rank=LAST,
        devices=("cpu",),
        dtypes=("float32",),
    ),
)
