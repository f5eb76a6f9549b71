"""Reading files: OpenAI's archives without running them, and everything that is damaged or hostile."""

from __future__ import annotations

import copy
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from clipfast.checkpoints import CheckpointError, archive, read_checkpoint, save

from . import peers
from .tiny_clips import RESNET, VIT, assert_same, make_upstream, trace


@pytest.fixture(scope="module", params=[VIT, RESNET], ids=["vit", "resnet"])
def upstream(request):
    return make_upstream(request.param)


@pytest.fixture(scope="module")
def vit():
    return make_upstream(VIT)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "mixed"])
def test_torchscript_archive_gives_the_same_tensors_without_being_run(upstream, half, tmp_path, monkeypatch):
    model = copy.deepcopy(upstream)
    if half:
        peers.openai_clip().model.convert_weights(model)
    path = trace(model, tmp_path / "archive.pt")

    def forbidden(*args, **kwargs):
        raise AssertionError("the archive was handed to torch.jit")

    monkeypatch.setattr(torch.jit, "load", forbidden)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.state_dict, model.state_dict())
    assert (checkpoint.layout, checkpoint.activation, checkpoint.source) == (
        "openai",
        "quick_gelu",
        str(path),
    )


def test_traced_gelu_model_is_recognised(vit, tmp_path):
    model = copy.deepcopy(vit)
    for tower in (model.visual.transformer, model.transformer):
        for block in tower.resblocks:
            block.mlp.gelu = torch.nn.GELU()
    assert read_checkpoint(trace(model, tmp_path / "gelu.pt")).activation == "gelu"


def script_zip(path, pickled, records=None):
    """A zip that looks like a TorchScript archive, with any bytes as its pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    return path


# a pickled float tensor: storage "0" of 6 elements, an offset to fill in, size (2, 3), stride (3, 1)
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x06tQK%c(K\x02K\x03t(K\x03K\x01t\x89ccollections\nOrderedDict\n)RtR"
)


def test_archive_pickle_with_cycles_and_views(tmp_path):
    # a module with x = the tensor and self = the module
    def pickled(offset):
        tensor = TENSOR.replace(b"%c", bytes([offset]))
        return b"\x80\x02c__torch__\nM\n)\x81q\x00}(X\x01\x00\x00\x00x" + tensor + b"X\x04\x00\x00\x00selfh\x00ub."

    data = torch.arange(6.0).numpy().tobytes()
    contents = archive.read_file(script_zip(tmp_path / "a.pt", pickled(0), {"data/0": data}))
    assert torch.equal(contents.values["x"], torch.arange(6.0).view(2, 3))
    with pytest.raises(CheckpointError, match="damaged TorchScript"):  # runs out of its storage
        archive.read_file(script_zip(tmp_path / "b.pt", pickled(1), {"data/0": data}))
    with pytest.raises(CheckpointError, match="does not hold 6 elements"):
        archive.read_file(script_zip(tmp_path / "c.pt", pickled(0), {"data/0": data[:8]}))


def test_compressed_tensors_are_refused(tmp_path):
    pickled = b"\x80\x02c__torch__\nM\n)\x81}(X\x01\x00\x00\x00x" + TENSOR.replace(b"%c", b"\x00") + b"ub."
    path = script_zip(tmp_path / "bomb.pt", pickled)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(24))
    with pytest.raises(CheckpointError, match="does not hold 6 elements"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"<html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"weights", "starts with the bytes b'weights'"),
        (b"\x80\x04N.", "plain pickle"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "damaged safetensors"),
    ],
)
def test_things_that_are_not_checkpoints(content, message, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["plain", "legacy", "traced", "safetensors"])
def test_truncation_is_reported(kind, vit, tmp_path):
    path = tmp_path / "model.pt"
    if kind == "traced":
        trace(vit, path)
    elif kind == "safetensors":
        save(vit, path, format="safetensors")
    else:
        torch.save(vit.state_dict(), path, _use_new_zipfile_serialization=kind == "plain")
    whole = path.read_bytes()
    for size in (20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated|damaged") as caught:
            read_checkpoint(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["plain", "traced"])
def test_flipped_bit_is_reported(kind, vit, tmp_path):
    path = tmp_path / "model.pt"
    if kind == "traced":
        trace(vit, path)
    else:
        torch.save(vit.state_dict(), path)
    damaged = bytearray(path.read_bytes())
    needle = vit.visual.conv1.weight.detach().numpy().tobytes()[:64]
    damaged[damaged.index(needle)] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="CRC"):
        read_checkpoint(path)


def test_zip_and_contents_of_other_kinds(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a/readme.txt", "hello")
    with pytest.raises(CheckpointError, match="no data.pkl"):
        read_checkpoint(tmp_path / "other.zip")
    for value, message in [
        ([torch.ones(1)], "holds a list"),
        ({}, "without weights"),
        ({"a": "b"}, "without weights"),
    ]:
        torch.save(value, tmp_path / "value.pt")
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(tmp_path / "value.pt")
    torch.save({"logit_scale": torch.ones(1), "epoch": 3}, tmp_path / "mixed.pt")
    with pytest.raises(CheckpointError, match="epoch"):
        read_checkpoint(tmp_path / "mixed.pt")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pt")


def test_pickled_model_is_named(vit, tmp_path):
    for new_zip in (True, False):
        torch.save(vit, tmp_path / "whole.pt", _use_new_zipfile_serialization=new_zip)
        with pytest.raises(CheckpointError, match="pickled object of class .*CLIP.*never runs code"):
            read_checkpoint(tmp_path / "whole.pt")


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["pickle", "pickle4", "zip", "legacy", "torchscript", "magic"])
def test_hostile_pickle_does_not_run(kind, tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "hostile.pt"
    values = OrderedDict(weight=torch.ones(1), bad=Hostile(trap))
    pickled = pickle.dumps({"bad": Hostile(trap)}, protocol=4 if kind == "pickle4" else 2)
    if kind in ("zip", "legacy"):
        torch.save(values, path, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "torchscript":
        script_zip(path, pickled)
    elif kind == "magic":  # hostile from the first byte on, and passed off as torch.save's old format
        magic = archive._LEGACY_MAGIC
        path.write_bytes(b"\x80\x02" + magic + b"0" + pickled[2:])
    else:
        path.write_bytes(pickled)
    with pytest.raises(CheckpointError, match="never runs code"):
        read_checkpoint(path)
    assert not trap.exists()
    with open(path, "rb") as file:  # the trap works
        if kind == "pickle":
            pickle.load(file)["bad"].close()
            assert trap.exists()


def test_hostile_archive_cannot_touch_shared_objects(tmp_path):
    # sets an attribute on every object the reader hands out
    names = [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"c__torch__\nM\n"]
    for number, name in enumerate(names):
        path = script_zip(tmp_path / f"{number}.pt", b"\x80\x02" + name + b"N}X\x06\x00\x00\x00hackedK\x01s\x86b.")
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    for shared in (
        torch._utils._rebuild_tensor_v2,
        OrderedDict,
        dict,
        archive._Module,
        archive._TensorRecord,
    ):
        assert not hasattr(shared, "hacked")
