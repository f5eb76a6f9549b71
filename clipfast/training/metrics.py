"""What a run says while it runs: JSON lines on the disk, a bar on a terminal, a picture of the curves."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clipfast import files
from clipfast.training.data import BadSample

__all__ = ["BadSamplesFile", "MetricsFile", "Progress", "draw_curves", "progress"]

Line = dict[str, Any]


class MetricsFile:
    """One JSON object a line: of each step, and of each evaluation (those have no "loss")."""

    def __init__(self, path: Path):
        self.path = path

    def cut_back(self, step: int | None = None) -> None:
        """Drop what later steps wrote, if a step is given, and a line that was not finished."""
        if self.path.exists():
            kept = [line for line in self.read() if step is None or line["step"] <= step]
            files.write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def read(self) -> list[Line]:
        """All whole lines."""
        lines = []
        for text in self.path.read_text("utf-8").splitlines() if self.path.exists() else []:
            # a killed process leaves part of a line
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
        return lines

    def write(self, line: Line) -> None:
        files.append(self.path, (json.dumps(line) + "\n").encode())

    def flush(self) -> None:
        """Onto the disk."""
        if self.path.exists():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())


class BadSamplesFile:
    """{"name": ..., "reason": ...} a line, each sample once; each is told on stderr too."""

    def __init__(self, path: Path):
        self._file = MetricsFile(path)
        self._file.cut_back()
        self._known = {line["name"] for line in self._file.read()}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, samples: list[BadSample], before_telling: Callable[[], None]) -> None:
        for sample in samples:
            if sample.name not in self._known:
                self._known.add(sample.name)
                self._file.write(sample._asdict())
                before_telling()
                print(f"clipfast: skipped: {sample.reason}", file=sys.stderr)


class Progress:
    """A bar on a terminal; elsewhere `lines` lines in all."""

    def __init__(self, bar: Any, steps: int, done: int, lines: int):
        self._bar = bar
        self._steps = steps
        self._done = done
        self._every = max(1, steps // lines)

    def show(self, loss: float, **others: str) -> None:
        """One step more is done."""
        self._done += 1
        self._bar.update()
        self._bar.set_postfix(loss=f"{loss:.3f}", **others, refresh=False)
        if self._bar.disable and (self._done == self._steps or self._done % self._every == 0):
            rest = "".join(f", {name} {value}" for name, value in others.items())
            print(f"   step {self._done} of {self._steps}: loss {loss:.3f}{rest}", flush=True)

    def clear(self) -> None:
        """Make room for a line of text."""
        self._bar.clear()


@contextlib.contextmanager
def progress(steps: int, done: int = 0, *, lines: int = 20, bar: bool = True) -> Iterator[Progress]:
    """Shows steps as they are done; `done` of them are already. Without bar: lines on a terminal too."""
    from tqdm import tqdm

    columns = min(100, shutil.get_terminal_size().columns)
    off = not bar or not sys.stderr.isatty()
    with tqdm(total=steps, initial=done, unit="step", disable=off, leave=False, ncols=columns) as shown:
        yield Progress(shown, steps, done, lines)


def draw_curves(lines: list[Line], path: Path) -> bool:
    """Draw loss and evaluations over the steps as a PNG; False if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    names = [name for name in (evaluations[-1] if evaluations else {}) if name not in ("step", "epoch")]
    figure = Figure(figsize=(11, 4) if names else (6, 4), layout="constrained")
    panels = figure.subplots(1, 2 if names else 1, squeeze=False)[0]
    panels[0].plot([line["step"] for line in steps], [line["loss"] for line in steps], linewidth=0.8)
    panels[0].set(xlabel="step", ylabel="loss", ylim=(0, None))
    for name in names:
        panels[1].plot([line["step"] for line in evaluations], [line[name] for line in evaluations], "o-", label=name)
    if names:
        panels[1].set(xlabel="step", ylim=(0, 1))
        panels[1].legend(fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.3)
    files.write_picture(figure, path, dpi=110)
    return True
