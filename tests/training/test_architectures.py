"""The nine architectures are the published ones."""

from __future__ import annotations

import pytest
import torch

import clipfast
from clipfast.architectures import ARCHITECTURES
from clipfast.model import architecture
from clipfast.training.architectures import make_model, sizes_of
from tests import peers
from tests.clips import PUBLISHED

from .pairs import TINY
from .pairs import make_model as make_tiny


def test_they_are_the_nine():
    assert list(ARCHITECTURES) == clipfast.available_models()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_are_open_clips(name):
    """open_clip's configuration of the same model, whose file is not ours."""
    config = peers.open_clip().get_model_config(name.replace("/", "-").replace("@336px", "-336"))
    sizes, vision, text = sizes_of(name), config["vision_cfg"], config["text_cfg"]
    layers = vision["layers"]
    assert sizes == {
        "embed_dim": config["embed_dim"],
        "image_resolution": vision["image_size"],
        "vision_layers": tuple(layers) if isinstance(layers, list) else layers,
        "vision_width": vision["width"],
        "vision_patch_size": vision["patch_size"],
        "context_length": text["context_length"],
        "vocab_size": text["vocab_size"],
        "transformer_width": text["width"],
        "transformer_heads": text["heads"],
        "transformer_layers": text["layers"],
    }
    # all but depth and vocabulary, which the tests cut
    cut = ("vision_layers", "vocab_size", "transformer_layers")
    for value, (key, other) in zip(PUBLISHED[name], sizes.items(), strict=True):
        assert key in cut or value == other, key


def test_a_model_is_built_as_asked(tmp_path):
    with torch.device("meta"):
        model = make_model("ViT-B/32", None)
    assert {key: sizes_of("ViT-B/32")[key] for key in TINY} == architecture(model.state_dict())
    tiny = make_tiny()
    clipfast.save(tiny, tmp_path / "tiny.pt")
    loaded = make_model(None, str(tmp_path / "tiny.pt"))
    assert all(torch.equal(tensor, tiny.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
