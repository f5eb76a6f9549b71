"""The demo: its picture, and how it spends its time."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

from clipfast import demo
from clipfast.demo import photographs, picture
from clipfast.demo.photographs import OURS, PLAIN, Comparison, Contestant, Row

NAMES = (OURS, PLAIN, "openai-clip 1.0.1", "transformers 5.23.0")


def comparison(factor: float, rate: float = 1234.0) -> Comparison:
    """clipfast at `rate` a second, everybody else at so many times that."""
    rates = {name: rate * (1 if name == OURS else factor) for name in NAMES}
    rows = [Row(name, dtype, each, each, 0.0, 0.0) for dtype in ("float32", "bfloat16") for name, each in rates.items()]
    return Comparison(rows, {}, 21, 32, {"float32": 3, "bfloat16": 3}, {})


@pytest.mark.parametrize("factor", [1.0, 0.02, 0.5, 0.9, 1.1, 12.0])
def test_labels_of_bars_end_within_their_panel(factor):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 10.4), dpi=110)
    picture._speed(figure, comparison(factor))
    assert len(figure.axes) == 4
    for axes in figure.axes:
        panel = axes.get_window_extent()
        assert len(axes.texts) == len(axes.patches) == len(NAMES)
        for label, bar in zip(axes.texts, axes.patches, strict=True):
            box = label.get_window_extent()
            assert bar.get_window_extent().x1 < box.x0 and box.x1 <= panel.x1 + 0.5, label.get_text()
        # and the longest bar is no shorter than its label needs
        assert max(bar.get_window_extent().x1 for bar in axes.patches) > panel.x0 + 0.4 * panel.width


def test_what_the_cpu_emulates_is_not_timed_and_that_is_said(monkeypatch, capsys):
    cpu = torch.device("cpu")
    for reason, names in (("it lacks AVX-512", ["float32"]), (None, ["float32", "bfloat16"])):
        monkeypatch.setattr(photographs, "bfloat16_is_emulated", lambda reason=reason: reason)
        chosen, left_out = photographs.dtypes(cpu)
        assert [str(dtype) for dtype in chosen] == [f"torch.{name}" for name in names]
        assert left_out == ({"bfloat16": "not timed: it lacks AVX-512"} if reason else {})
    assert photographs.dtypes(torch.device("cuda")) == ([torch.float32, torch.float16], {})

    monkeypatch.setattr(demo, "compare", lambda device, say: comparison(1.0))
    demo._compare(cpu)
    assert "not timed" not in capsys.readouterr().out
    left_out = {"bfloat16": "not timed: it lacks AVX-512"}
    monkeypatch.setattr(demo, "compare", lambda device, say: Comparison([], {}, 1, 1, {"float32": 3}, left_out))
    demo._compare(cpu)
    assert "   bfloat16: not timed: it lacks AVX-512\n" in capsys.readouterr().out


def test_a_dtype_is_left_out_once_the_time_is_spent(monkeypatch):
    """By a clock that only a call moves, by a second."""
    now = [0.0]

    def encode(inputs):
        now[0] += 1
        return torch.ones(len(inputs), 8)

    class Reference:
        encode_image = encode_text = staticmethod(lambda weights, inputs: torch.ones(len(inputs), 8))

    found = [Contestant(name, nn.Identity(), encode, encode) for name in (OURS, PLAIN)]
    monkeypatch.setattr(photographs, "contestants", lambda device, images, text: ({}, found, {}))
    monkeypatch.setattr(photographs, "reference", Reference)
    monkeypatch.setattr(photographs, "bfloat16_is_emulated", lambda: None)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    said: list[str] = []
    result = photographs.compare(torch.device("cpu"), lambda so_far, name: said.append(name), 8)
    # three rounds are the fewest, and one is to warm up: eight calls a tower; four are for the errors
    assert said == ["float32"] and result.left_out == {"bfloat16": "not timed: 16 s went into float32"}
    assert result.rounds == {"float32": 3}
    result = photographs.compare(torch.device("cpu"), lambda so_far, name: None, 100)
    assert result.rounds == {"float32": 12, "bfloat16": 12} and result.left_out == {}


def test_there_is_a_picture_before_anything_is_timed(tmp_path, monkeypatch):
    seen = []

    def compare(device, say):
        seen.extend(sorted(path.name for path in tmp_path.iterdir()))
        assert json.loads((tmp_path / "results.json").read_text())["throughput"] is None
        return comparison(1.0)

    monkeypatch.setattr(demo, "compare", compare)
    monkeypatch.setattr(demo, "_train", lambda digits, steps, device: (demo.CLIP(**demo.d.MODEL).eval(), [1.0] * 2))
    monkeypatch.setattr(picture, "draw", lambda path, *parts: path.touch())
    written = []
    assert demo.run(tmp_path, device="cpu", written=written) == 1, "it has learned nothing"
    assert seen == ["demo.png", "digits.pt", "results.json"] == sorted(path.name for path in written)
    assert json.loads((tmp_path / "results.json").read_text())["throughput"]["n_images"] == 21
