"""The demo: its picture, and how it spends its time."""

from __future__ import annotations

import pytest

from clipfast.demo import picture
from clipfast.demo.photographs import OURS, PLAIN, Comparison, Row

NAMES = (OURS, PLAIN, "openai-clip 1.0.1", "transformers 5.23.0")


def comparison(factor: float, rate: float = 1234.0) -> Comparison:
    """clipfast at `rate` a second, everybody else at so many times that."""
    rates = {name: rate * (1 if name == OURS else factor) for name in NAMES}
    rows = [Row(name, dtype, each, each, 0.0, 0.0) for dtype in ("float32", "bfloat16") for name, each in rates.items()]
    return Comparison(rows, {}, 21, 32, {"float32": 3, "bfloat16": 3})


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
