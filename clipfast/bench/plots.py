"""The pictures of a run, PNG and SVG: throughput by batch size, ratios, roofline. matplotlib draws them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipfast import roofline
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import peers
from clipfast.bench.ceilings import COPY, PRODUCT, READ
from clipfast.bench.harness import Row
from clipfast.files import write_picture

# the same contestant has the same colour in every picture
_COLOURS = (
    "#c0392b",
    "#2c3e50",
    "#2980b9",
    "#27ae60",
    "#8e44ad",
    "#f39c12",
    "#16a085",
    "#7f8c8d",
    "#d35400",
    "#34495e",
)
_MARKS = "osD^vP*Xhd"
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# title and rows of each
Panels = Sequence[tuple[str, Sequence[Row]]]
# colour and mark by contestant
Style = Mapping[str, Mapping[str, Any]]


def draw(rows: Sequence[Row], ceilings: Mapping[str, float], by: Mapping[str, str], stem: Path) -> list[Path]:
    """<stem>-throughput, -ratios and -roofline, each .png and .svg; nothing where nothing was timed.

    by: what the ceilings of the dtypes were measured by; the fastest product where it does not say.
    Raises: ImportError without matplotlib.
    """
    timed = [row for row in rows if row.get("median_s", "") != ""]
    if not timed:
        return []
    pictures = {
        "throughput": throughput(list(_panels(timed)), _style([row["contestant"] for row in timed])),
        "ratios": ratios(timed),
    }
    if ceilings:
        pictures["roofline"] = points(timed, ceilings, by)
    return _write(pictures, stem)


def draw_by_batch(panels: Mapping[str, Sequence[Row]], names: Sequence[str], title: str, stem: Path) -> list[Path]:
    """<stem>-throughput and -floor, each .png and .svg; nothing without panels.

    panels: their titles and rows.   names: contestants of all pictures that should share their colours.
    Raises: ImportError without matplotlib.
    """
    if not panels:
        return []
    found, style = list(panels.items()), _style(names)
    return _write({"throughput": throughput(found, style, title), "floor": floors(found, style, title)}, stem)


def _write(figures: Mapping[str, Any], stem: Path) -> list[Path]:
    """stem-<name>, each .png and .svg."""
    import matplotlib

    matplotlib.use("Agg")
    # the same rows give the same file
    matplotlib.rcParams["svg.hashsalt"] = "clipfast"
    written = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            path = stem.with_name(f"{stem.name}-{name}.{kind}")
            write_picture(figure, path, dpi=110, metadata={"Date": None} if kind == "svg" else None)
            written.append(path)
    return written


def _style(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and mark by contestant, ours first."""
    ordered = sorted(dict.fromkeys(names), key=lambda name: (name != peers.OURS, name))
    looks = zip(ordered, itertools.cycle(_COLOURS), itertools.cycle(_MARKS), strict=False)
    return {name: {"color": colour, "marker": mark} for name, colour, mark in looks}


def _panels(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(title, rows) of each model, tower and dtype."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row['model']} {row['tower']}, {row['dtype']}", []).append(row)
    yield from found.items()


def _figure(count: int, width: float = 4.2, height: float = 3.2):
    from matplotlib.figure import Figure

    down = -(-count // 4)
    across = -(-count // down)
    figure = Figure(figsize=(width * across, height * down + 0.8), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes


def throughput(panels: Panels, style: Style, title: str = ""):
    """Samples per second by batch size."""
    figure, axes = _by_batch(panels, style, "samples_per_s", title)
    for axis in axes:
        axis.set(yscale="log", ylabel="samples/s")
    return figure


def floors(panels: Panels, style: Style, title: str = ""):
    """Share of the floor by batch size: 100 % is the least time that the ceilings allow."""
    figure, axes = _by_batch(panels, style, "of_floor", title)
    for axis in axes:
        axis.set(ylabel="share of the floor")
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter("{x:.0%}")
    return figure


def _by_batch(panels: Panels, style: Style, column: str, title: str):
    """A line for each contestant."""
    figure, axes = _figure(len(panels))
    if title:
        figure.suptitle(title)
    for axis, (panel, group) in zip(axes, panels, strict=False):
        for name, look in style.items():
            points = sorted(
                (int(row["batch"]), float(row[column]))
                for row in group
                if row["contestant"] == name and row[column] != ""
            )
            if points:
                # a single point would be lost behind the lines
                order = 2 if len(points) > 1 else 3
                width = 2 if name == peers.OURS else 1
                axis.plot(*zip(*points, strict=True), label=name, linewidth=width, zorder=order, **look)
        batches = sorted({int(row["batch"]) for row in group})
        axis.set(xscale="log", title=panel, xlabel="batch size")
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    _legend(figure, axes)
    return figure, axes


def ratios(rows: Sequence[Row]):
    """How many times as fast as each contestant clipfast is, at the largest batch where both were timed."""
    panels = list(_panels(rows))
    figure, axes = _figure(len(panels))
    for axis, (title, group) in zip(axes, panels, strict=False):
        ours = {int(row["batch"]): float(row["median_s"]) for row in group if row["contestant"] == peers.OURS}
        theirs = {}
        for row in sorted(group, key=lambda row: int(row["batch"])):
            if row["contestant"] != peers.OURS and int(row["batch"]) in ours:
                label = row["contestant"] + (" (approximate)" if row["status"] == "approximate" else "")
                theirs[f"{label}, b{row['batch']}"] = (
                    row["contestant"],
                    float(row["median_s"]) / ours[int(row["batch"])],
                )
        last = {name: (label, ratio) for label, (name, ratio) in theirs.items()}
        labels, values = [label for label, _ in last.values()], [ratio for _, ratio in last.values()]
        bars = axis.barh(labels, values, color=["#27ae60" if value >= 1 else "#c0392b" for value in values])
        axis.bar_label(bars, [f"{value:.2f}x" for value in values], padding=2, fontsize=8)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=title, xlabel="clipfast is so many times as fast", xlim=(0, 1.25 * max([1, *values])))
        axis.tick_params(axis="y", labelsize=7)
        axis.invert_yaxis()
    return figure


def points(rows: Sequence[Row], ceilings: Mapping[str, float], by: Mapping[str, str]):
    """Achieved rate of the least work over its operations per byte, under the two ceilings of each dtype.

    Bytes are of weights where the ceiling of reading was measured: the rest need not leave a CPU's caches. Else all.
    """
    memory = READ if READ in ceilings else COPY
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows if row["dtype"] in ceilings))
    style = _style([row["contestant"] for row in rows])
    figure, axes = _figure(max(1, len(dtypes)), 6.5, 4.5)
    for axis, dtype in zip(axes, dtypes, strict=False):
        intensities = []
        for row in (row for row in rows if row["dtype"] == dtype):
            lengths = [round(float(row.get("mean_length") or 1))] * int(row["batch"])
            sizes = ARCHITECTURES.get(row["model"])
            if sizes is None:
                continue
            work = roofline.total(roofline.works_of(sizes, row["tower"], lengths, ITEMSIZES[dtype]))
            intensities.append(work.flops / (work.weights if memory == READ else work.bytes))
            rate = work.flops / float(row["median_s"])
            axis.plot(
                intensities[-1], rate / 1e9, linestyle="none", **style[row["contestant"]], label=row["contestant"]
            )
        if not intensities:
            continue
        low, high = min(intensities) / 3, max(intensities) * 3
        knee = ceilings[dtype] / ceilings[memory]
        xs = sorted({low, min(max(knee, low), high), high})
        roof = [min(ceilings[dtype], x * ceilings[memory]) / 1e9 for x in xs]
        what = f"ceilings: {memory} of memory (caches are faster), {by.get(dtype, PRODUCT)}"
        axis.plot(xs, roof, color="black", label=what)
        title = f"{dtype}: {ceilings[dtype] / 1e9:.0f} GFLOP/s, {ceilings[memory] / 1e9:.0f} GB/s"
        label = "least operations per byte of the weights" if memory == READ else "least operations per least byte"
        axis.set(xscale="log", yscale="log", title=title, xlabel=label, ylabel="GFLOP/s")
        axis.grid(alpha=0.3)
    _legend(figure, axes)
    return figure


def _legend(figure, axes) -> None:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
