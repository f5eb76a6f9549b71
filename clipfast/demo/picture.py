"""The demo's picture: what the small model found, how it learned, and how fast the large towers ran."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipfast.demo import digits as digits_demo
from clipfast.demo.digits import Digits, Reading
from clipfast.demo.photographs import OURS, Comparison
from clipfast.files import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP = 4  # points between a bar and its label
INK, QUIET, FAINT, ACCENT, WRONG = "#1f2933", "#66737f", "#c3cad1", "#0b7285", "#d9480f"


def draw(
    path: Path, digits: Digits, reading: Reading, losses: list[float], comparison: Comparison | None, subtitle: str
) -> None:
    """Write the picture as a PNG file; without a comparison, the part about speed is left out."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": QUIET,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
    }
    with rc_context({**style, "axes.edgecolor": FAINT, "axes.titlecolor": INK, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(15, 10.4), facecolor="white")
        figure.text(0.035, 0.955, "A small CLIP reads handwriting", fontsize=21, weight="bold")
        figure.text(0.035, 0.927, subtitle, fontsize=11, color=QUIET)
        _retrieval(figure, digits, reading)
        _similarity(figure, digits, reading)
        _confusion(figure, reading)
        _loss(figure, losses, width=0.2 if comparison else 0.612)
        if comparison is not None:
            _speed(figure, comparison)
        write_picture(figure, path, dpi=110)


def _heading(figure: Figure, left: float, bottom: float, title: str, note: str) -> None:
    figure.text(left, bottom + 0.019, title, fontsize=13, weight="bold")
    figure.text(left, bottom, note, fontsize=9.5, color=QUIET)


def _retrieval(figure: Figure, digits: Digits, reading: Reading) -> None:
    """One row for each query: its eight nearest test images."""
    note = "the eight nearest of the test images, the nearest first; orange frame: a wrong one"
    _heading(figure, 0.035, 0.868, "Images found by text", note)
    width, height = 0.037, 0.0605
    for row, (query, places) in enumerate(reading.retrieved.items()):
        bottom = 0.788 - row * 0.0775
        figure.text(0.035, bottom + height / 2, f"“{query}”", fontsize=10.5, va="center")
        for column, place in enumerate(places):
            right = int(digits.test_classes[place]) == digits_demo.QUERIES[query]
            axes = figure.add_axes((0.183 + column * width * 1.085, bottom, width, height))
            _thumbnail(axes, digits, place, FAINT if right else WRONG, 0.8 if right else 3)


def _thumbnail(axes: Axes, digits: Digits, place: int, colour: str, width: float) -> None:
    axes.imshow(np.asarray(digits.test[place]), cmap="gray_r", interpolation="bicubic")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=width)


def _similarity(figure: Figure, digits: Digits, reading: Reading) -> None:
    """Cosine of every caption with two test images of each digit."""
    note = "cosine between the embeddings; two test images of each digit across, captions down"
    _heading(figure, 0.545, 0.868, "Image × text similarity", note)
    classes = digits.test_classes
    places = [place for digit in range(10) for place in torch.nonzero(classes == digit).flatten().tolist()[:2]]
    cosines = (reading.texts @ reading.images[places].T).numpy()
    left, bottom, width, height = 0.607, 0.478, 0.335, 0.325
    axes = figure.add_axes((left, bottom, width, height))
    shown = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axes.set_yticks(range(10), digits_demo.WORDS, color=INK)
    axes.set_xticks([])
    axes.set_xticks(np.arange(0.5, 19), minor=True)
    axes.set_yticks(np.arange(0.5, 9), minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for column, place in enumerate(places):
        size = width / len(places)
        above = figure.add_axes((left + (column + 0.06) * size, bottom + height + 0.005, size * 0.88, 0.0225))
        _thumbnail(above, digits, place, "white", 0)
    bar = figure.colorbar(shown, cax=figure.add_axes((left + width + 0.008, bottom, 0.007, height)), ticks=[-1, 0, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _confusion(figure: Figure, reading: Reading) -> None:
    total, wrong = int(reading.confusion.sum()), int(reading.confusion.sum() - reading.confusion.trace())
    _heading(figure, 0.035, 0.378, "Confusion", f"digit down, answer across; {wrong} of {total} wrong")
    axes = figure.add_axes((0.055, 0.065, 0.205, 0.295))
    share = reading.confusion / reading.confusion.sum(dim=1, keepdim=True).clamp(min=1)
    axes.imshow(share.sqrt().numpy(), cmap="GnBu", vmin=0, vmax=1.15)
    for row in range(10):
        for column in range(10):
            count = int(reading.confusion[row, column])
            if count:
                colour = "white" if row == column and share[row, column] > 0.3 else WRONG
                axes.text(column, row, str(count), ha="center", va="center", fontsize=9, color=colour)
    axes.set(xticks=range(10), yticks=range(10))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _loss(figure: Figure, losses: list[float], width: float) -> None:
    _heading(figure, 0.305, 0.378, "Training loss", "above the least possible; line: mean of 20 steps")
    axes = figure.add_axes((0.33, 0.085, width, 0.27))
    axes.plot(range(1, len(losses) + 1), losses, color=FAINT, linewidth=0.8)
    window = min(20, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(np.arange(len(smooth)) + (window + 1) / 2, smooth, color=ACCENT, linewidth=1.8)
    axes.set(xlim=(0, len(losses)), ylim=(0, max(losses) * 1.04), xlabel="step")
    axes.spines[["top", "right"]].set_visible(False)


def _speed(figure: Figure, comparison: Comparison) -> None:
    inputs = f"{comparison.n_images} photographs, {comparison.n_texts} captions"
    note = f"random weights; {inputs}; ×: clipfast is so many times as fast"
    _heading(figure, 0.575, 0.378, "Throughput of ViT-B/32", note)
    left_out = "\n".join(textwrap.fill(f"{dtype}: {why}", 85) for dtype, why in comparison.left_out.items())
    figure.text(0.575, 0.06, left_out, va="top", fontsize=9.5, color=QUIET)
    names = list(dict.fromkeys(row.name for row in comparison.rows))
    kinds: tuple[tuple[str, str], ...] = (("images_per_second", "images/s"), ("texts_per_second", "texts/s"))
    dtypes = list(comparison.rounds)
    height = 0.27 / len(dtypes)
    for line, dtype in enumerate(dtypes):
        rows = {row.name: row for row in comparison.rows if row.dtype == dtype}
        for column, (field, unit) in enumerate(kinds):
            bottom = 0.085 + (len(dtypes) - 1 - line) * height
            axes = figure.add_axes((0.672 + column * 0.162, bottom, 0.138, height * 0.74))
            _bars(axes, names, [getattr(rows[name], field) for name in names])
            axes.set_title(f"{unit}, {dtype}", fontsize=10, loc="left", color=QUIET)
            if column == 0:
                axes.set_yticks(range(len(names)), names, color=INK)
            else:
                axes.set_yticks([])


def _bars(axes: Axes, names: list[str], values: list[float]) -> None:
    colours: list[Any] = [ACCENT if name == OURS else FAINT for name in names]
    axes.barh(range(len(names)), values, color=colours, height=0.72)
    ours = values[names.index(OURS)]
    width = axes.get_window_extent().width
    limit = max(values)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        label = f"{value:,.0f}" + ("" if name == OURS else f"   {ours / value:.2f} ×")
        place_of_text: dict[str, Any] = {"xytext": (GAP, 0), "textcoords": "offset points", "annotation_clip": False}
        text = axes.annotate(label, (value, place), va="center", fontsize=9.5, **place_of_text)
        # bar and label together end within the panel; a label is as long as its letters, whatever the scale
        beside = text.get_window_extent().width + GAP * axes.figure.dpi / 72
        limit = max(limit, value * width / (width - beside))
    axes.invert_yaxis()
    axes.set(xticks=[], xlim=(0, limit))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
