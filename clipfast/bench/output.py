"""What a benchmark shows and keeps: a CSV that is never half written, a table, a line of progress."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from clipfast.bench.harness import Row
from clipfast.files import write_bytes


def write_csv(path: Path | None, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Replace the file by these rows; columns that a row lacks stay empty. Nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="raise", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def print_table(
    title: str, header: Sequence[str], lines: Iterable[Sequence[str]], notes: Iterable[str] = (), names: int = 1
) -> None:
    """Title, columns (the first `names` of them to the left, numbers to the right), notes below."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    print(f"\n{title}")
    for line in cells:
        pairs = enumerate(zip(line, widths, strict=True))
        print("  ".join(text.ljust(width) if i < names else text.rjust(width) for i, (text, width) in pairs).rstrip())
    for note in notes:
        print(f"  {note}")
    sys.stdout.flush()


def cell(row: Row, column: str, form: str, scale: float = 1) -> str:
    """A number of a row for the table; a dash where there is none."""
    value = row.get(column, "")
    return "-" if value == "" else format(value * scale, form)


class Progress:
    """One line on stderr: what runs now, and about how long the rest takes."""

    def __init__(self, rounds: int):
        self._rounds, self._done, self._start = rounds, 0, time.monotonic()
        self._label = ""
        self._terminal = sys.stderr.isatty()

    def say(self, label: str) -> None:
        self._label = label
        left = ""
        if self._done:
            rest = (time.monotonic() - self._start) / self._done * (self._rounds - self._done)
            left = f", about {rest / 60:.0f} min left" if rest >= 90 else f", about {rest:.0f} s left"
        text = f"[{self._done}/{self._rounds} rounds] {label}{left}"
        print(f"\r\033[K{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def tick(self, rounds: int) -> None:
        self._done += rounds
        self.say(self._label)

    def skip_to(self, rounds: int) -> None:
        """This many rounds are behind us, timed or not."""
        self._done = rounds

    def clear(self) -> None:
        """Take the line away, before a table is printed."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class Bar:
    """One line on stderr: how far a run with a plan is, what it does now, and about how long the rest takes."""

    WIDTH = 20
    # seconds between two lines where there is no terminal whose line could be written over
    PAUSE = 15.0

    def __init__(self, rest: float = 0.0):
        """rest: predicted seconds."""
        self._start, self._terminal, self._said = time.monotonic(), sys.stderr.isatty(), 0.0
        self.plan(rest)

    def plan(self, rest: float) -> None:
        """The prediction, made anew."""
        self._end = time.monotonic() + rest

    def say(self, label: str) -> None:
        now = time.monotonic()
        if not self._terminal and now - self._said < self.PAUSE:
            return
        self._said = now
        rest = max(0.0, self._end - now)
        share = (now - self._start) / max(now - self._start + rest, 1e-9)
        filled = round(self.WIDTH * share)
        left = f"{rest / 60:.0f} min" if rest >= 90 else f"{rest:.0f} s"
        text = f"[{'#' * filled}{'.' * (self.WIDTH - filled)}] about {left} left: {label}"
        print(f"\r\033[K{text[:150]}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the line away, before a table is printed."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
