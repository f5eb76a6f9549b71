"""load and save, compared with openai-clip's."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipfast import checkpoints
from clipfast.checkpoints import CheckpointError, from_huggingface, load, read_checkpoint, save
from clipfast.kernels import kept
from clipfast.model import build_model

from . import peers
from .tiny_clips import RESNET, VIT, assert_same, inputs, make_huggingface, make_upstream, trace


@pytest.fixture(scope="module", params=[VIT, RESNET], ids=["vit", "resnet"])
def upstream(request):
    return make_upstream(request.param)


@pytest.fixture(scope="module")
def vit():
    return make_upstream(VIT)


def test_names_and_addresses_are_openai_clips():
    upstream = peers.openai_clip()
    assert checkpoints.available_models() == upstream.available_models()
    assert upstream.clip._MODELS == checkpoints.MODELS


# ---- load ----


@pytest.fixture
def plain(upstream, tmp_path):
    torch.save(upstream.state_dict(), tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


def test_load_gives_upstreams_numbers_in_full_precision(upstream, plain):
    model, preprocess = load(str(plain), "cpu")
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert_same(model.state_dict(), upstream.state_dict())
    assert model.visual.input_resolution == upstream.visual.input_resolution
    assert preprocess.n_px == upstream.visual.input_resolution
    images, texts = inputs(upstream.visual.input_resolution)
    with torch.no_grad():
        for actual, expected in zip(model(images, texts), upstream(images, texts), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, "fp16", torch.bfloat16, "bf16", "torch.bfloat16"])
def test_load_in_half_precision_converts_what_upstream_converts(upstream, plain, dtype):
    model, _ = load(plain, "cpu", dtype=dtype)
    half = torch.float16 if dtype in (torch.float16, "fp16") else torch.bfloat16
    reference = copy.deepcopy(upstream)
    peers.openai_clip().model.convert_weights(reference)
    for name, tensor in reference.state_dict().items():
        expected = half if tensor.dtype == torch.float16 else tensor.dtype
        assert model.state_dict()[name].dtype == expected, name
        assert torch.equal(model.state_dict()[name], upstream.state_dict()[name].to(expected)), name
    assert model.dtype == half


def test_load_turns_half_precision_weights_into_float32_on_a_cpu(upstream, tmp_path):
    model = copy.deepcopy(upstream)
    peers.openai_clip().model.convert_weights(model)
    trace(model, tmp_path / "mixed.pt")
    for dtype in (None, "float32"):
        loaded, _ = load(tmp_path / "mixed.pt", "cpu", dtype=dtype)
        assert_same(loaded.state_dict(), model.float().state_dict())


def test_load_off_the_cpu_is_mixed_float16_by_default(upstream, plain):
    model, _ = load(plain, "meta")  # any device but the CPU
    reference = copy.deepcopy(upstream)
    peers.openai_clip().model.convert_weights(reference)
    for name, tensor in reference.state_dict().items():
        assert model.state_dict()[name].dtype == tensor.dtype and model.state_dict()[name].is_meta, name
    assert load(plain, "meta", dtype="float32")[0].dtype == torch.float32


def test_load_packs_weights_ahead_on_a_cpu(plain):
    model, _ = load(plain, "cpu", prepack=True)
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert weights and all(kept.is_kept(weight) for weight in weights)
    assert not any(kept.is_kept(parameter) for parameter in load(plain, "cpu")[0].parameters())
    with pytest.raises(ValueError, match='prepack=True is for a CPU, and device is "meta": pass device="cpu"'):
        load(plain, "meta", prepack=True)


def test_load_refuses_bad_arguments(plain):
    for dtype in (torch.float64, "int8", 16, torch.int8):
        with pytest.raises(ValueError, match="dtype must be float32"):
            load(plain, "cpu", dtype=dtype)
    with pytest.raises(ValueError, match="activation must be one of quick_gelu, gelu"):
        load(plain, "cpu", activation="relu")
    with pytest.raises(RuntimeError, match="^Model ViT-B/33 not found; available models = .*'RN50', .*336px"):
        load("ViT-B/33")
    with pytest.raises(RuntimeError, match="^Model weights/mine.pt not found: there is no such file"):
        load("weights/mine.pt")
    gpu = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(RuntimeError, match=f'there is no device "{gpu}": PyTorch .* sees (no GPU|\\d+ GPU)'):
        load(plain, gpu)


def test_load_with_jit_warns_and_gives_the_ordinary_model(plain):
    with pytest.warns(UserWarning, match="jit=True"):
        model, _ = load(str(plain), "cpu", True)
    assert isinstance(model, torch.nn.Module) and not isinstance(model, torch.jit.ScriptModule)


def test_load_activation_changes_the_model(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "plain.pt")
    images, _ = inputs(32)
    with torch.no_grad():
        default, quick, gelu = (
            load(tmp_path / "plain.pt", "cpu", activation=activation)[0].encode_image(images)
            for activation in (None, "quick_gelu", "gelu")
        )
    assert torch.equal(default, quick) and not torch.allclose(quick, gelu, rtol=1e-5)


def test_load_does_not_initialise_what_it_overwrites(plain):
    drawn = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
                drawn.append(args[0].device.type)
            return func(*args, **(kwargs or {}))

    with Recorder():
        load(plain, "cpu")
        assert set(drawn) == {"meta"}  # of the check; they cost nothing
        torch.nn.Linear(2, 2)
    assert "cpu" in drawn  # initialisers work again


def test_load_reports_a_broken_state_dict_by_file(vit, tmp_path):
    weights = vit.state_dict()
    del weights["ln_final.bias"]
    torch.save(weights, tmp_path / "broken.pt")
    with pytest.raises(CheckpointError, match="broken.pt .* 1 missing weights: ln_final.bias"):
        load(tmp_path / "broken.pt", "cpu")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_loaded_model_saves_with_its_activation(activation, vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "plain.pt")
    model, _ = load(tmp_path / "plain.pt", "cpu", activation=activation)
    save(model, tmp_path / "saved.safetensors")
    assert read_checkpoint(tmp_path / "saved.safetensors").activation == activation
    again, _ = load(tmp_path / "saved.safetensors", "cpu")
    assert_same(again.state_dict(), vit.state_dict())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_state_dict_that_torch_saves_keeps_the_activation(activation, vit, tmp_path):
    model = build_model(vit.state_dict(), activation=activation)
    torch.save(model.state_dict(), tmp_path / "own.pt")
    assert read_checkpoint(tmp_path / "own.pt").activation == activation
    assert load(tmp_path / "own.pt", "cpu")[0].activation == activation


def test_importing_checkpoints_loads_no_optional_package():
    script = (
        "import sys, torch; before = set(sys.modules); import clipfast.checkpoints\n"
        "print(*({'safetensors', 'tqdm', 'transformers'} & (set(sys.modules) - before)))"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


# ---- save ----


def test_saved_pt_loads_in_openai_clip(upstream, tmp_path):
    model = copy.deepcopy(upstream)
    peers.openai_clip().model.convert_weights(model)
    save(model, tmp_path / "saved.pt")
    weights = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert_same(weights, model.state_dict())
    rebuilt = peers.openai_clip().model.build_model(weights).float()
    images, texts = inputs(model.visual.input_resolution)
    with torch.no_grad():
        for actual, expected in zip(rebuilt(images, texts), model.float()(images, texts), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_save_round_trip_keeps_the_activation(activation, suffix, vit, tmp_path):
    path = tmp_path / f"saved{suffix}"
    save(vit.state_dict(), path, activation=activation)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.state_dict, vit.state_dict())
    assert (checkpoint.layout, checkpoint.activation) == ("openai", activation)
    save(checkpoint, tmp_path / f"again{suffix}")
    assert read_checkpoint(tmp_path / f"again{suffix}").activation == activation
    if suffix == ".pt":
        save(torch.load(path, weights_only=True), tmp_path / "third.safetensors")
        assert read_checkpoint(tmp_path / "third.safetensors").activation == activation
    other = "gelu" if activation == "quick_gelu" else "quick_gelu"
    with pytest.raises(ValueError, match="contradicts"):
        load(path, "cpu", activation=other)
    with pytest.raises(ValueError, match="contradicts"):
        save(checkpoint, path, activation=other)


def test_openai_clip_rejects_our_gelu_file_and_open_clip_reads_it(vit, tmp_path):
    save(vit.state_dict(), tmp_path / "gelu.pt", activation="gelu")
    with pytest.raises(KeyError):
        peers.openai_clip().model.build_model(torch.load(tmp_path / "gelu.pt", weights_only=True))
    theirs = peers.open_clip().factory.load_state_dict(str(tmp_path / "gelu.pt"))
    assert_same(theirs, vit.state_dict())


def test_save_converts_huggingface_names_and_asks_for_the_activation(tmp_path):
    weights = make_huggingface().state_dict()
    with pytest.raises(ValueError, match="pass activation="):
        save(weights, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []
    save(weights, tmp_path / "a.pt", activation="quick_gelu")
    assert_same(read_checkpoint(tmp_path / "a.pt").state_dict, from_huggingface(weights))


def test_save_drops_what_a_view_drags_along(vit, tmp_path):
    weights = vit.state_dict()
    huge = torch.zeros(1 << 20)
    huge[:64] = weights["ln_final.bias"]
    weights["ln_final.bias"] = huge[:64]
    for name in ("a.pt", "a.safetensors"):
        save(weights, tmp_path / name, activation="quick_gelu")
        assert (tmp_path / name).stat().st_size < 1 << 21


def test_unknown_recorded_activation_is_refused(vit, tmp_path):
    torch.save({"state_dict": vit.state_dict(), "clipfast": {"activation": "swish"}}, tmp_path / "new.pt")
    with pytest.raises(CheckpointError, match="unknown activation 'swish'"):
        read_checkpoint(tmp_path / "new.pt")


def test_save_refuses_unknown_formats(vit, tmp_path):
    with pytest.raises(ValueError, match="suffix"):
        save(vit, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="format must be"):
        save(vit, tmp_path / "model.pt", format="onnx")
    save(vit, tmp_path / "model.ckpt", format="pt")
    assert [p.name for p in tmp_path.iterdir()] == ["model.ckpt"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_failed_save_leaves_the_old_file(suffix, vit, tmp_path, monkeypatch):
    path = tmp_path / f"model{suffix}"
    save(vit, path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save(vit, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_killed_save_leaves_the_old_file(vit, tmp_path):
    path = tmp_path / "model.pt"
    save(vit, path)
    before = path.read_bytes()
    script = (
        "import os, sys; from clipfast import checkpoints as c; p = sys.argv[1]; k = c.read_checkpoint(p)\n"
        "os.replace = lambda *a: os.kill(os.getpid(), 9)\n"
        "c.save(k, p)"
    )
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, capture_output=True)
    assert killed.returncode != 0 and path.read_bytes() == before
