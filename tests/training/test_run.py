"""`clipfast train` from end to end: killed, stopped, damaged, on two processes, and each time the same curve."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch

import clipfast
from clipfast import cli
from clipfast.training.checkpoint import checkpoint_path, latest_checkpoint, rng_state, save_checkpoint, set_rng_state
from clipfast.training.metrics import MetricsFile

from .pairs import make_model
from .runs import BATCH, STEPS, N, arguments, curve, start

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what a run leaves ----


def test_metrics_have_a_line_for_each_step(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    per_epoch = N // BATCH
    assert [line["epoch"] for line in lines] == [step // per_epoch + 1 for step in range(STEPS)]
    keys = {"step", "epoch", "loss", "lr", "logit_scale", "grad_norm", "samples_per_second", "data_wait"}
    assert all(line.keys() == keys for line in lines)
    assert lines[2]["lr"] == 2e-3 and lines[-1]["lr"] < 1e-4
    losses = [line["loss"] for line in lines]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(0 < line["data_wait"] < 1 and line["grad_norm"] > 0 for line in lines)


def test_the_model_is_an_ordinary_checkpoint(whole):
    model, _ = clipfast.load(whole / "model.pt", "cpu")
    state = latest_checkpoint(whole / "checkpoints")[1]
    assert state["step"] == STEPS
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["model"][name]), name
    assert not torch.equal(model.visual.proj, make_model().visual.proj)


def test_keep_and_curves(whole):
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["step-00000021.pt", "step-00000028.pt", "step-00000030.pt"]
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_bad_samples_are_counted_and_named(data, whole, capfd):
    (line,) = [json.loads(line) for line in (whole / "bad_samples.jsonl").read_text().splitlines()]
    name = str(data / "pairs" / "a" / "003.png")
    assert line == {"name": name, "reason": f"{name} is not an image that Pillow can read"}
    # told again when the run has nothing left to do
    assert cli.main(arguments(data, whole, "--keep", "3")) == 0
    told = capfd.readouterr()
    assert "goes on after step 30 of 30" in told.out and "Skipped: 1 sample," in told.out


# ---- interrupted ----


def test_killed_and_started_again_gives_the_same_curve(data, whole, tmp_path, capsys):
    process = start(arguments(data, tmp_path, "--workers", "2"))
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    try:
        while len(metrics.read()) < 10:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = len(metrics.read())
    assert 10 <= reached < STEPS and not (tmp_path / "model.pt").exists()
    # a line after the checkpoint, and one that the kill cut
    metrics.write({"step": 29, "epoch": 8, "loss": 0.0})
    with metrics.path.open("a") as file:
        file.write('{"step": 30, "lo')
    with (tmp_path / "bad_samples.jsonl").open("a") as file:
        file.write('{"name": "x')
    (tmp_path / "checkpoints" / ".step-00000014.pt.1.ab.tmp").write_bytes(b"half")

    assert cli.main(arguments(data, tmp_path)) == 0
    assert re.search(r"goes on after step (7|14|21|28) of 30", capsys.readouterr().out)
    assert curve(tmp_path) == curve(whole)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    weights, expected = (clipfast.load(folder / "model.pt", "cpu")[0].state_dict() for folder in (tmp_path, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (tmp_path / "bad_samples.jsonl").read_text() == (whole / "bad_samples.jsonl").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_writes_its_last_step_and_goes_on(data, whole, tmp_path, monkeypatch, capsys, number):
    write = MetricsFile.write

    def write_and_stop(self, line):
        write(self, line)
        if line.get("step") == 9:
            # a terminal and torchrun tell every process of their group
            assert [os.getpgid(worker.pid) != os.getpgrp() for worker in multiprocessing.active_children()] == [True]
            signal.raise_signal(number)

    monkeypatch.setattr(MetricsFile, "write", write_and_stop)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert cli.main(arguments(data, tmp_path, "--workers", "1")) == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    # asked during step 9, it ends the step that follows
    path = tmp_path / "checkpoints" / "step-00000010.pt"
    assert f"interrupted; written: {path}\n" in capsys.readouterr().err and path.exists()
    monkeypatch.undo()
    assert cli.main(arguments(data, tmp_path)) == 0
    assert "goes on after step 10" in capsys.readouterr().out
    assert curve(tmp_path) == curve(whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(data, whole, tmp_path, capsys):
    assert cli.main(arguments(data, tmp_path)) == 0
    newest, before = (tmp_path / "checkpoints" / f"step-{step:08d}.pt" for step in (30, 28))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    assert cli.main(arguments(data, tmp_path)) == 0
    told = capsys.readouterr()
    assert re.search(r"step-00000030.pt is corrupt: .*; going back to the checkpoint before", told.err)
    assert "goes on after step 28" in told.out
    assert curve(tmp_path) == curve(whole)
    assert newest.with_name("step-00000030.pt.damaged").exists() and newest.exists()

    for path in (newest, before):
        path.write_bytes(path.read_bytes()[:-1000])
    assert cli.main(arguments(data, tmp_path)) == 1
    assert "every checkpoint in" in capsys.readouterr().err


def test_no_flipped_bit_passes_unseen(tmp_path):
    state = {"step": 3, "x": torch.randn(50), "rng": rng_state(torch.device("cpu")), "name": "a"}
    path = checkpoint_path(tmp_path, 3)
    save_checkpoint(path, state, keep=1)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    seen = 0
    # most of the file is numbers; the last part is the container's directory
    positions = [*rng.integers(len(content), size=60), *rng.integers(len(content) - 700, len(content), size=60)]
    for position in positions:
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            _, found = latest_checkpoint(tmp_path)
        except clipfast.training.checkpoint.CommandError:
            seen += 1
            next(tmp_path.glob("*.damaged")).unlink()
        else:
            # padding of the zip container
            assert torch.equal(found["x"], state["x"]) and found["step"] == 3 and found["name"] == "a"
            assert torch.equal(found["rng"]["torch"], state["rng"]["torch"])
    assert seen > 60


def test_generators_come_back():
    device = torch.device("cpu")
    state = rng_state(device)
    drawn = random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
    set_rng_state(state, device)
    again = random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
    assert drawn[:2] == again[:2] and torch.equal(drawn[2], again[2])


# ---- settings ----


def test_another_run_is_not_continued(data, whole, tmp_path, capsys):
    for more, text in (
        (["--lr", "0.1"], "--lr was 0.002, now 0.1"),
        (["--seed", "4"], "--seed was 0, now 4"),
        (["--data", str(data / "shards")], "fingerprint of the data was"),
        (["--batch-size", "5"], "--batch-size was 6, now 5"),
    ):
        assert cli.main([*arguments(data, whole), *more]) == 1
        assert text in capsys.readouterr().err
    other = {**json.loads((data / "tiny.json").read_text()), "vision_layers": 1}
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert cli.main([*arguments(data, whole), "--model", str(tmp_path / "other.json")]) == 1
    assert "holds another run: vision_layers of the model was 2, now 1" in capsys.readouterr().err
    assert cli.main(arguments(data, whole, "--resume", "never")) == 1
    assert "has a run already" in capsys.readouterr().err
    assert len(curve(whole)) == STEPS


def test_micro_batches_and_precision_keep_the_curve(data, whole, tmp_path):
    assert cli.main(arguments(data, tmp_path / "micro", "--micro-batch", "2")) == 0
    assert cli.main(arguments(data, tmp_path / "bf16", "--precision", "amp_bf16")) == 0
    losses, micro, half = (
        [line["loss"] for line in curve(path)] for path in (whole, tmp_path / "micro", tmp_path / "bf16")
    )
    assert micro == pytest.approx(losses, rel=2e-3)
    assert micro[0] == pytest.approx(losses[0], rel=1e-6)
    # AdamW turns the sign of a gradient into a step: from the third on, what bfloat16 rounds is a curve of its own
    assert half[:2] == pytest.approx(losses[:2], rel=0.01)
    assert half[0] != losses[0]
    assert sum(half[-5:]) / 5 < 0.6 * half[0]


def test_init_evaluation_and_clipping(data, whole, tmp_path, capsys):
    more = ["--init", str(whole / "model.pt"), "--steps", "8", "--grad-clip", "1e-9", "--weight-decay", "0"]
    more += ["--zero-shot", str(data / "classes"), "--retrieval", str(data / "pairs"), "--eval-every", "1"]
    assert cli.main([*arguments(data, tmp_path / "out"), *more, "--eps", "1", "--lr", "1"]) == 0
    # AdamW's eps is far above so small a gradient: the weights stay
    start, end = (clipfast.load(path / "model.pt", "cpu")[0].visual.proj for path in (whole, tmp_path / "out"))
    torch.testing.assert_close(start, end, rtol=0, atol=1e-6)
    lines = curve(tmp_path / "out")
    assert [line["step"] for line in lines if "loss" not in line] == [4, 8]
    figures = {name for name in lines[-1] if name not in ("step", "epoch")}
    assert figures == {"zero_shot_top1", "zero_shot_top5"} | {
        f"{direction}_recall@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    assert f"zero_shot_top1 {100 * lines[-1]['zero_shot_top1']:.1f} %" in capsys.readouterr().out


def test_grad_checkpointing_is_asked_of_the_model(data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(clipfast.CLIP, "set_grad_checkpointing", lambda model, on: calls.append(on))
    assert cli.main(arguments(data, tmp_path, "--grad-checkpointing", "--steps", "1")) == 0
    assert calls == [True]


def test_logit_scale_is_clamped_after_each_step(data, whole, tmp_path):
    model, _ = clipfast.load(whole / "model.pt", "cpu")
    with torch.no_grad():
        model.logit_scale.fill_(9)
    clipfast.save(model, tmp_path / "hot.pt")
    assert cli.main([*arguments(data, tmp_path / "out"), "--init", str(tmp_path / "hot.pt"), "--steps", "2"]) == 0
    assert [line["logit_scale"] for line in curve(tmp_path / "out")] == pytest.approx([100, 100], rel=0.02)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys):
    assert cli.main(arguments(data, tmp_path, "--warmup", "0", "--lr", "1e38")) == 1
    assert re.search(r"the loss is (nan|inf) at step \d+: no weight was changed by it", capsys.readouterr().err)


# ---- several processes ----


def test_two_processes_train_like_one(data, whole, tmp_path, capsys):
    words = arguments(data, tmp_path, "--micro-batch", "2", "--keep", "9", "--zero-shot", str(data / "classes"))
    process = start(words, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    # one of them tells
    assert out.count("26 samples, 30 steps") == out.count("Model: ") == 1
    lines = [line for line in curve(tmp_path) if "loss" in line]
    expected = curve(whole)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        # Rounding alone, 1e-7, as long as the weights are equal. Then Adam takes a whole step along a gradient that is
        # nothing but rounding, either way
        bound = 2e-5 if line["step"] < 3 else 5e-3
        for name in ("loss", "grad_norm", "logit_scale"):
            assert line[name] == pytest.approx(other[name], rel=bound), line["step"]
    assert any("zero_shot_top1" in line for line in curve(tmp_path))

    # one process goes on from the fourth checkpoint, and says what differs
    for step in (28, 30):
        (tmp_path / "checkpoints" / f"step-{step:08d}.pt").unlink()
    assert cli.main(arguments(data, tmp_path, "--keep", "9")) == 0
    out = capsys.readouterr().out
    assert "number of processes was 2, now 1" in out and "goes on after step 21" in out
    for line, other in zip([line for line in curve(tmp_path) if "loss" in line], expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=5e-3)
