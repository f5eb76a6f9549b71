"""Graphs that others run, exported from both towers: other batches and other ends of texts, openai/CLIP's numbers."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from .. import peers
from ..clips import RESNET, VIT, assert_same, make_images, make_texts, make_trio

IMAGES, TEXTS = {VIT: make_images(VIT, 7), RESNET: make_images(RESNET, 5)}, make_texts(VIT, 7)
TOWERS = {"vit": (VIT, "image"), "text": (VIT, "text"), "resnet": (RESNET, "image")}


class _TextTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, text):
        return self.model.encode_text(text)


def _towers(model, config):
    images = IMAGES[config].to(model.dtype)
    return {"image": (model.visual, images), "text": (_TextTower(model), TEXTS)}


class _Run(nn.Module):
    """Stands for a model in assert_same: what its exported towers gave."""

    def __init__(self, results):
        super().__init__()
        self.results = results


def _assert_exported(config, results):
    """results: name of a tower -> what its graph gave for all images or texts."""
    trio = make_trio(config)

    def run(m):
        if isinstance(m, _Run):
            return m.results
        return {name: tower(x) for name, (tower, x) in _towers(m, config).items() if name in results}

    with torch.no_grad():
        assert_same([_Run(results), *trio[1:]], run)


def _onnx(tower, example, dynamo):
    buffer = io.BytesIO()
    free = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tower, (example,), buffer, dynamo=dynamo, input_names=["x"], output_names=["y"], verbose=False, **free
        )
    return buffer.getvalue()


@pytest.mark.parametrize("grad", [False, True])
def test_a_checked_trace_of_a_transformer(grad):
    """torch.jit.trace traces twice and compares the graphs: no cache may make the second another."""
    trio = make_trio(VIT)
    x, longer = torch.randn(17, 3, 128), torch.randn(17, 5, 128)
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(trio[0].visual.transformer, x)
        text = torch.jit.trace(trio[0].transformer, x[:12])
        results = {"image": traced(longer), "text": text(longer[:12])}

    def run(m):
        if isinstance(m, _Run):
            return m.results
        return {"image": m.visual.transformer(longer.to(m.dtype)), "text": m.transformer(longer[:12].to(m.dtype))}

    assert_same([_Run(results), *trio[1:]], run)


@pytest.mark.parametrize(
    ("which", "dynamo"),
    [("vit", False), ("vit", True), ("text", False), ("text", True), ("resnet", False)],
)
def test_onnx(which, dynamo):
    config, name = TOWERS[which]
    runtime = peers.onnxruntime()
    tower, x = _towers(make_trio(config)[0], config)[name]
    session = runtime.InferenceSession(_onnx(tower, x[:2], dynamo), providers=["CPUExecutionProvider"])
    got = torch.cat([torch.from_numpy(session.run(None, {"x": part.numpy()})[0]) for part in (x[:4], x[4:])])
    _assert_exported(config, {name: got})


@pytest.mark.parametrize(("config", "grad"), [(VIT, False), (VIT, True), (RESNET, True)])
def test_torchscript_saved_and_loaded(config, grad):
    """Traced with one batch, run with others in a file that knows nothing of clipfast."""
    results = {}
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")
        for name, (tower, x) in _towers(make_trio(config)[0], config).items():
            file = io.BytesIO()
            torch.jit.save(torch.jit.trace(tower, x[:2]), file)
            file.seek(0)
            loaded = torch.jit.load(file)
            results[name] = torch.cat([loaded(x[:4].clone()), loaded(x[4:].clone())]).detach()
    _assert_exported(config, results)


def test_torch_export_saved_and_loaded():
    config, results = VIT, {}
    for name, (tower, x) in _towers(make_trio(config)[0], config).items():
        free = ({0: torch.export.Dim("n", min=2, max=1024)},)
        file = io.BytesIO()
        torch.export.save(torch.export.export(tower, (x[:3],), dynamic_shapes=free), file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        with torch.no_grad():
            results[name] = torch.cat([loaded(part) for part in x.split(len(x) - 2)])
    _assert_exported(config, results)
