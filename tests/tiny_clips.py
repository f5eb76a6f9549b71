"""CLIPs small enough for a test, of openai-clip's and others' making, and the files they are saved in."""

from __future__ import annotations

import copy
import warnings

import torch

from . import peers

# embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size, context_length, vocab_size,
# transformer_width, transformer_heads, transformer_layers
VIT = (32, 32, 2, 64, 16, 8, 50, 64, 1, 2)
RESNET = (32, 64, (1, 2, 1, 1), 8, None, 8, 50, 64, 1, 1)


def randomise(model):
    """Give every weight and statistic its own value: zero biases and unit scales hide swapped tensors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name != "logit_scale":
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + ("running_var" in name) * 0.9)
    return model.eval()


def inputs(resolution):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, resolution, resolution, generator=generator)
    return images, torch.randint(0, 50, (3, 8), generator=generator)


def make_upstream(config):
    return randomise(peers.openai_clip().model.CLIP(*config))


def trace(model, path):
    """Save as OpenAI did: traced, with three integers beside the weights."""
    model = copy.deepcopy(model)
    resolution = model.visual.input_resolution
    for name, value in {"input_resolution": resolution, "context_length": 8, "vocab_size": 50}.items():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, inputs(resolution), check_trace=False).save(str(path))
    return path


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def make_huggingface(activation="quick_gelu"):
    transformers = peers.transformers_clip()
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "hidden_act": activation}
    text = {"num_hidden_layers": 2, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 48}
    config = transformers.CLIPConfig(
        text_config={**tower, **text, "eos_token_id": 49},
        vision_config={**tower, "num_hidden_layers": 3, "image_size": 32, "patch_size": 16},
        projection_dim=32,
    )
    return randomise(transformers.CLIPModel(config))


OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 2},
}


def make_open_clip(custom_text=False, quick_gelu=False):
    library = peers.open_clip()
    kind = library.model.CustomTextCLIP if custom_text else library.model.CLIP
    return randomise(kind(**OPEN_CLIP, quick_gelu=quick_gelu))
