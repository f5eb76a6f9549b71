"""The stacked bars: a pass by operator beside its floor, and each layer by operator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipfast.bench.harness import Row
from clipfast.files import write_picture
from clipfast.profiling.measure import Profile


def draw(found: Profile, rows: Sequence[Row], stem: Path) -> list[Path]:
    """<stem>.png and .svg. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "clipfast"
    from matplotlib.figure import Figure

    names = [row["part"] for row in rows]
    colours = {name: matplotlib.colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    figure = Figure(figsize=(10, 3.0 + 0.22 * len(found.by_layer)), layout="constrained")
    whole, layers = figure.subplots(2, 1, height_ratios=[2, 1 + len(found.by_layer)])
    for bar, column in (("measured", "seconds"), ("floor", "floor_s")):
        left = 0.0
        for row in rows:
            width = 1e3 * row.get(column, 0.0)
            whole.barh(
                bar, width, left=left, color=colours[row["part"]], label=row["part"] if column == "seconds" else None
            )
            left += width
    whole.set(xlabel="ms a pass")
    whole.invert_yaxis()
    for layer, inside in sorted(found.by_layer.items()):
        left = 0.0
        for name in names:
            width = 1e3 * inside.get(name, 0.0)
            layers.barh(layer, width, left=left, color=colours[name])
            left += width
    layers.set(xlabel="ms in the layer, forward")
    layers.tick_params(axis="y", labelsize=7)
    layers.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    write_picture(figure, paths[0], dpi=110)
    write_picture(figure, paths[1], metadata={"Date": None})
    return paths
