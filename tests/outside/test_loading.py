"""What programs replace in clip.clip and clip.model before they load a checkpoint."""

from __future__ import annotations

import importlib
import types
import warnings

import pytest
import torch
from torch import nn

import clipfast.clip
import clipfast.model

from .. import peers
from ..tiny_clips import VIT, make_upstream, trace


@pytest.fixture
def both():
    """(clip.clip, clip.model) of each library."""
    theirs = peers.openai_clip()
    return [(clipfast.clip, clipfast.model), (importlib.import_module("clip.clip"), theirs.model)]


@pytest.fixture
def path(tmp_path):
    """A checkpoint as OpenAI saved theirs."""
    return str(trace(make_upstream(VIT), tmp_path / "vit.pt"))


def _load(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module.load(name, device="cpu")


NAMES = ("_MODELS", "_Tokenizer", "_download", "_tokenizer", "_transform", "build_model", "load", "tokenize")


def test_names_that_programs_import_from_clip_clip(both):
    for module, _ in both:
        assert not [name for name in NAMES if not hasattr(module, name)], module
    first, second = (module._tokenizer.encode("a photo of a cat") for module, _ in both)
    assert [*first] == [*second]


def test_another_download(both, path, monkeypatch):
    """Where the network is closed, clip.clip._download gives a local file."""
    for module, _ in both:
        monkeypatch.setitem(module._MODELS, "ViT-B/32", "https://nowhere.invalid/0/vit.pt")
        monkeypatch.setattr(module, "_download", lambda url, root: path)
        model, _ = _load(module, "ViT-B/32")
        assert model.text_projection.shape == (64, 32)


def test_another_model_by_name(both, path, monkeypatch):
    for module, _ in both:
        monkeypatch.setitem(module._MODELS, "mine", "https://nowhere.invalid/0/mine.pt")
        assert "mine" in module.available_models()
        monkeypatch.setattr(module, "_download", lambda url, root: path)
        assert _load(module, "mine")[0].text_projection.shape == (64, 32)


def test_another_build_model(both, path, monkeypatch):
    """Prompt learners give clip.clip.build_model their own."""

    class Other(nn.Linear):
        visual = types.SimpleNamespace(input_resolution=32)

    for module, _ in both:
        monkeypatch.setattr(module, "build_model", lambda weights, **_: Other(len(weights), 1), raising=False)
        assert isinstance(_load(module, path)[0], Other)


def test_another_transform(both, path, monkeypatch):
    for module, _ in both:
        monkeypatch.setattr(module, "_transform", lambda size: ("mine", size))
        assert _load(module, path)[1] == ("mine", 32)


def test_another_tokenizer(both, monkeypatch):
    class Words:
        encoder = {"<|startoftext|>": 1, "<|endoftext|>": 9}

        def encode(self, text):
            return [2 + len(word) for word in text.split()]

    for module, _ in both:
        monkeypatch.setattr(module, "_tokenizer", Words(), raising=False)
        assert module.tokenize("a photo of it")[0, :7].tolist() == [1, 3, 7, 4, 4, 9, 0]


def test_weights_converted_by_another_function(both, monkeypatch):
    """clip.model.convert_weights = nothing, to keep a half-precision checkpoint's model in float32."""
    weights = {name: tensor.half() for name, tensor in make_upstream(VIT).state_dict().items()}
    for _, library in both:
        monkeypatch.setattr(library, "convert_weights", lambda model: None)
        assert {p.dtype for p in library.build_model(dict(weights)).parameters()} == {torch.float32}
