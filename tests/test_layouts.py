"""State dicts as others wrap and name them: trainers, Hugging Face, open_clip; compared with theirs."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from clipfast.checkpoints import (
    CheckpointError,
    check_state_dict,
    from_huggingface,
    load,
    read_checkpoint,
    save,
    to_huggingface,
)

from . import peers
from .tiny_clips import (
    OPEN_CLIP,
    RESNET,
    VIT,
    assert_same,
    inputs,
    make_huggingface,
    make_open_clip,
    make_upstream,
)


@pytest.fixture(scope="module", params=[VIT, RESNET], ids=["vit", "resnet"])
def upstream(request):
    return make_upstream(request.param)


@pytest.fixture(scope="module")
def vit():
    return make_upstream(VIT)


@pytest.mark.parametrize("new_zip", [True, False], ids=["zip", "legacy"])
def test_plain_state_dict(upstream, new_zip, tmp_path):
    weights = upstream.state_dict()
    torch.save(weights, tmp_path / "plain.pt", _use_new_zipfile_serialization=new_zip)
    checkpoint = read_checkpoint(tmp_path / "plain.pt")
    assert_same(checkpoint.state_dict, weights)
    assert (checkpoint.layout, checkpoint.activation) == ("openai", None)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_wrapped_and_prefixed_state_dict(vit, wrapper, prefix, tmp_path):
    weights = {prefix + name: torch.nn.Parameter(tensor) for name, tensor in vit.state_dict().items()}
    weights[prefix + "input_resolution"] = torch.tensor(32)
    torch.save({wrapper: weights, "step": 3}, tmp_path / "wrapped.pt")
    state_dict = read_checkpoint(tmp_path / "wrapped.pt").state_dict
    assert_same(state_dict, vit.state_dict())
    assert not any(tensor.requires_grad for tensor in state_dict.values())


def test_compiled_tower_prefix(vit, tmp_path):
    weights = {k.replace("visual.", "visual._orig_mod."): v for k, v in vit.state_dict().items()}
    torch.save(weights, tmp_path / "compiled.pt")
    assert_same(read_checkpoint(tmp_path / "compiled.pt").state_dict, vit.state_dict())


def test_safetensors_state_dict(upstream, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(upstream.state_dict(), tmp_path / "plain.safetensors")
    checkpoint = read_checkpoint(tmp_path / "plain.safetensors")
    assert_same(checkpoint.state_dict, upstream.state_dict())
    assert checkpoint.activation is None


def test_safetensors_missing_is_named(vit, tmp_path, monkeypatch):
    pytest.importorskip("safetensors.torch")
    save(vit, tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_state_dict_without_checksums_loads(vit, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(vit.state_dict(), tmp_path / "no_crc.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_checkpoint(tmp_path / "no_crc.pt").state_dict, vit.state_dict())


# ---- Hugging Face ----


def test_huggingface_features_and_round_trip():
    upstream = peers.openai_clip()
    model = make_huggingface()
    theirs = model.state_dict()
    ours = from_huggingface(theirs)
    assert_same(to_huggingface(ours), theirs)
    converted = upstream.model.build_model(dict(ours)).float()
    converted.load_state_dict(ours)  # build_model rounds float32 weights through float16
    images, texts = inputs(32)
    texts = texts.clamp(max=48)
    texts[:, -1] = 49  # transformers pools at the EOS id, openai/CLIP at the greatest: the same place
    with torch.no_grad():
        image = model.get_image_features(pixel_values=images)
        text = model.get_text_features(input_ids=texts)
        image, text = (getattr(x, "pooler_output", x) for x in (image, text))
        torch.testing.assert_close(converted.encode_image(images), image, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(converted.encode_text(texts), text, atol=1e-5, rtol=1e-5)


def test_huggingface_round_trip_from_our_names(vit):
    weights = {name: tensor.half() for name, tensor in vit.state_dict().items()}
    assert_same(from_huggingface(to_huggingface(weights)), weights)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
def test_huggingface_folder(activation, kind, tmp_path):
    model = make_huggingface(activation)
    model.save_pretrained(tmp_path, max_shard_size="100KB" if kind == "sharded" else "1GB")
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.layout, checkpoint.activation) == ("huggingface", activation)
    assert_same(checkpoint.state_dict, from_huggingface(model.state_dict()))
    check_state_dict(checkpoint.state_dict)


def test_huggingface_file_uses_the_config_beside_it(tmp_path):
    make_huggingface("gelu").save_pretrained(tmp_path)
    assert read_checkpoint(tmp_path / "model.safetensors").activation == "gelu"
    (tmp_path / "config.json").unlink()
    assert read_checkpoint(tmp_path / "model.safetensors").activation is None
    with pytest.raises(ValueError, match='activation="quick_gelu"'):
        load(tmp_path / "model.safetensors", "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "siglip"),
        ({"vision_config": {"num_attention_heads": 2}}, "heads of width 32"),
        ({"vision_config": {"hidden_act": "gelu"}}, "'quick_gelu' \\(text\\) and 'gelu'"),
        ({"text_config": {"hidden_act": "relu"}}, "relu"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps 1e-06"),
    ],
)
def test_huggingface_config_of_another_model_is_refused(change, message, tmp_path):
    make_huggingface().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_huggingface_folder_errors(tmp_path):
    with pytest.raises(CheckpointError, match="without config.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"')
    with pytest.raises(CheckpointError, match="none of the weight files"):
        read_checkpoint(tmp_path)
    index = {"weight_map": {"logit_scale": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not in its folder: ../outside"):
        read_checkpoint(tmp_path)


def test_huggingface_incomplete_and_foreign_names():
    weights = make_huggingface().state_dict()
    with pytest.raises(CheckpointError, match="1 weights .* vision_model.extra"):
        from_huggingface({**weights, "vision_model.extra": torch.ones(1)})
    del weights["text_model.encoder.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(CheckpointError, match="q_proj.weight without"):
        from_huggingface(weights)
    with pytest.raises(ValueError, match="no ResNet"):
        to_huggingface({"visual.layer1.0.conv1.weight": torch.ones(1)})


# ---- open_clip ----


@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clip_state_dict_asks_for_its_activation(custom_text, tmp_path):
    model = make_open_clip(custom_text)
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(model.state_dict(), path)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.layout, checkpoint.activation) == ("open_clip", None)
    check_state_dict(checkpoint.state_dict)
    with pytest.raises(ValueError, match='activation="quick_gelu" or'):
        load(path, "cpu")
    clip, _ = load(path, "cpu", activation="gelu")
    images, texts = inputs(32)
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_image(images), model.encode_image(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(clip.encode_text(texts), model.encode_text(texts), atol=1e-5, rtol=1e-5)


def test_open_clip_training_checkpoint_is_not_taken_for_openais(tmp_path):
    weights = {f"module.{k}": v for k, v in make_open_clip().state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": weights, "optimizer": {}}, tmp_path / "epoch_1.pt")
    checkpoint = read_checkpoint(tmp_path / "epoch_1.pt")
    assert (checkpoint.layout, checkpoint.activation) == ("open_clip", None)
    check_state_dict(checkpoint.state_dict)


@pytest.mark.parametrize("quick_gelu", [None, False, True])
def test_open_clip_config_names_the_activation(quick_gelu, tmp_path):
    model = make_open_clip(quick_gelu=bool(quick_gelu))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = OPEN_CLIP if quick_gelu is None else {**OPEN_CLIP, "quick_gelu": quick_gelu}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    expected = "quick_gelu" if quick_gelu else "gelu"
    assert read_checkpoint(tmp_path).activation == expected
    assert read_checkpoint(tmp_path / "open_clip_pytorch_model.bin").activation == expected
    with pytest.raises(ValueError, match="contradicts"):
        load(tmp_path, "cpu", activation="gelu" if quick_gelu else "quick_gelu")


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("vision_cfg", {"head_width": 80}, "heads of width 80"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type = 'avg'"),
        ("vision_cfg", {"timm_model_name": "vit_base"}, "timm_model_name"),
        ("text_cfg", {"no_causal_mask": True}, "no_causal_mask"),
        ("text_cfg", {"heads": 2}, "heads of width"),
    ],
)
def test_open_clip_config_of_another_model_is_refused(section, options, message, tmp_path):
    torch.save(make_open_clip().state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {**OPEN_CLIP, section: {**OPEN_CLIP[section], **options}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_published_widths_with_wide_heads_are_not_taken_for_heads_of_64(tmp_path):
    weights = {
        "visual.proj": torch.ones(1),
        "visual.conv1.weight": torch.ones(1280, 1),
        "logit_scale": torch.ones(1),
    }
    torch.save(weights, tmp_path / "open_clip_h.pt")
    with pytest.raises(CheckpointError, match="heads of width 80"):
        read_checkpoint(tmp_path / "open_clip_h.pt")
    torch.save(weights, tmp_path / "h.pt")
    with pytest.warns(UserWarning, match="heads of width 80"):
        read_checkpoint(tmp_path / "h.pt")
