"""What is written: looked at before the work, whole or not at all, and named with its size where the disk is full."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipfast
from clipfast import cli, files
from clipfast.training.checkpoint import checkpoint_path, save_checkpoint
from clipfast.training.metrics import MetricsFile

from .tiny_clips import VIT, randomise

resource = pytest.importorskip("resource")
# no file may be longer than this where the disk is "full"
LIMIT = 30_000


@pytest.fixture
def full_disk():
    """The system refuses what is beyond LIMIT bytes of a file, as it does beyond the last byte of a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def read_only(monkeypatch):
    """No file can be made, whatever the permissions say: so it is for root on a disk that is read-only."""

    def touch(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "touch", touch)


# ---- before the work ----


def test_what_cannot_be_a_file_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        files.check_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'none'}"):
        files.check_file(tmp_path / "none" / "x")
    with pytest.raises(OSError, match="no regular file"):
        files.check_file(Path(os.devnull))
    (tmp_path / "x").write_text("kept")
    files.check_file(tmp_path / "x")
    with pytest.raises(NotADirectoryError, match=rf"is a file, and a folder is wanted: '{tmp_path / 'x'}'"):
        files.check_folder(tmp_path / "x" / "y" / "z")
    files.check_folder(tmp_path / "new" / "folder")
    assert (tmp_path / "x").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "new", "x"]


@pytest.mark.parametrize(
    "words",
    [
        "encode image.png --model none.pt --out {out}",
        "eval --retrieval none --model none.pt --out {out}",
        "profile --model ViT-B/32 --out {out}",
        "profile --model ViT-B/32 --out . --trace {out}",
        "bench --out {out}",
        "demo --out {out}",
        "train --data none --model none.json --out {out}",
    ],
)
def test_commands_look_first(read_only, tmp_path, monkeypatch, capsys, words):
    """Before the model, the data or a single measurement: none of them is there."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert cli.main(words.format(out=out).split()) == 1
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipfast: ")]
    where = tmp_path if "trace" not in words else Path(".")
    assert told == f"clipfast: {where if 'trace' in words else out}: cannot be written: Read-only file system"


def test_save_looks_first(read_only, tmp_path):
    class Model(torch.nn.Module):
        def state_dict(self, *_, **__):
            raise AssertionError("the weights were gathered")

    with pytest.raises(OSError, match="Read-only"):
        clipfast.save(Model(), tmp_path / "m.pt")


# ---- a full disk ----


def expect_full(error: str, path: Path) -> int:
    """The bytes that the message says were wanted."""
    found = re.search(rf"{path}: File too large: ([\d,]+) bytes were wanted and [\d,]+ are free$", error)
    assert found, error
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_full_disk_keeps_the_old_checkpoint(full_disk, tmp_path, suffix):
    model, path = randomise(clipfast.CLIP(*VIT)), tmp_path / f"m.{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="File too large") as caught:
        clipfast.save(model, path)
    assert caught.value.filename == str(path)
    wanted = expect_full(f"{path}: {caught.value.strerror}", path)
    assert wanted == sum(tensor.nbytes for tensor in model.state_dict().values()) > LIMIT
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


def test_encode_on_a_full_disk(full_disk, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = clipfast.CLIP(512, 32, 1, 64, 16, 77, 50, 64, 1, 1).eval()
    monkeypatch.setattr("clipfast.commands.load", lambda *_, **__: (model, clipfast.Preprocess(32)))
    Image.new("RGB", (32, 32)).save("a.png")
    words = ["encode", *["a.png"] * 20, "--device", "cpu", "--out", "x.npz"]
    assert cli.main(words) == 1
    assert expect_full(capsys.readouterr().err.strip(), Path("x.npz")) >= 20 * 512 * 4
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_run_keeps_what_was_complete(full_disk, tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    line = {"step": 1, "text": "x" * 2000}

    def until_full():
        while True:
            metrics.write(line)

    with pytest.raises(OSError, match="File too large: 2,0.. bytes were wanted") as caught:
        until_full()
    assert caught.value.filename == str(metrics.path)
    content = metrics.path.read_bytes()
    assert content.endswith(b"\n") and metrics.read() == [line] * content.count(b"\n") and len(content) > LIMIT - 3000

    older = checkpoint_path(tmp_path / "checkpoints", 1)
    save_checkpoint(older, {"step": 1}, keep=1)
    with pytest.raises(OSError, match="File too large: 80,000 bytes"):
        save_checkpoint(checkpoint_path(older.parent, 2), {"step": 2, "x": [np.zeros(5000), torch.zeros(10000)]}, 1)
    assert [*older.parent.iterdir()] == [older]


def test_other_failures_stay_what_they_are(tmp_path):
    def fail(file):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        files.write_atomically(tmp_path / "x", fail, 0)
    assert not [*tmp_path.iterdir()]
