"""The Triton launches behind the headline of `make gpu`, found on a machine without a GPU.

The towers themselves run, on CPU tensors whose activations are never filled: what the launchers would launch on a GPU
is kept instead of made (`benchmarks.compilation.collect`). All blocks before the last launch the same, so two stand for
twelve and twenty-four.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn

from benchmarks.gpu import groups
from clipfast import dispatch, graphs, tuning
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import workload
from clipfast.kernels import library
from clipfast.model import CLIP, convert_weights

DTYPES = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def on_triton() -> Iterator[None]:
    """Inside, CPU tensors take the way that a GPU's take without gradients: Triton's kernels, stable rows, no parts."""
    with (
        # what lets the Triton backend have CPU tensors
        mock.patch.object(library, "interpreted", return_value=True),
        mock.patch.object(graphs, "suit", graphs.fits),
        mock.patch.object(tuning, "rows_at_a_time", return_value=None),
        dispatch.backend("triton"),
        torch.no_grad(),
    ):
        yield


def cases() -> Iterator[Callable[[], None]]:
    """A call of one tower each, to be made inside `on_triton`: of those that are timed, and of the check of graphs."""
    yield from timed()
    model = _model("tiny", torch.bfloat16)
    yield lambda: _encode_images(model, 3)
    for seed in range(3):
        text = workload.inputs(groups.TINY, 3, workload.Captions(3, 20), seed)["text"]
        yield lambda text=text: model.encode_text(text)


def timed() -> Iterator[Callable[[], None]]:
    for dtype in DTYPES:
        models = {name: _model(name, dtype) for name in dict.fromkeys(model for _, model, *_ in groups.towers())}
        for tower, name, batch, captions in groups.towers():
            model = models[name]
            if tower == "image":
                yield lambda model=model, batch=batch: _encode_images(model, batch)
            else:
                text = captions.ids(ARCHITECTURES[name], batch, seed=1).int()
                yield lambda model=model, text=text: model.encode_text(text)


def _model(name: str, dtype: torch.dtype) -> nn.Module:
    sizes = groups.TINY if name == "tiny" else ARCHITECTURES[name]
    model = CLIP(**sizes | {"vision_layers": 2, "transformer_layers": 2}).eval()
    convert_weights(model, dtype)
    model.cuda_graphs = False
    return model


def _encode_images(model: nn.Module, batch: int) -> None:
    side = model.visual.input_resolution
    # never filled, so the tower itself: encode_image would look for NaN on a CPU
    model.visual(torch.empty(batch, 3, side, side, dtype=model.dtype))
