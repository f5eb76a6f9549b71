"""What the README's tables share: rows of files, which file is newer, a table of contestants, who beats clipfast.

A cell holds samples per second and, in brackets, how many times as fast clipfast is: never across columns, so a column
must hold one measurement, in which all contestants took turns.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from clipfast.bench import peers
from clipfast.bench.harness import Row

TOWERS = {"image": "image", "text": "text", "both": "both towers", "train": "train step"}
# in a note: an operator's launch was wrong on that GPU, and PyTorch ran it instead
ON_PYTORCH = "on PyTorch, since"
# shown where there is no figure
STATUS = {"skipped": "out of time", "missing": "", "untimed": ""}


def read(folder: Path, needed: Iterable[str]) -> list[Row]:
    """Rows of every CSV that has these columns, each with its "file"; other files are passed over."""
    rows: list[Row] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if set(reader.fieldnames or ()) >= set(needed):
                rows += [{**row, "file": path.name} for row in reader]
    return rows


def age(row: Row) -> tuple[str, str]:
    """(date, name of the file): the greatest is the newest. A day's second run is stem-2.csv, its tenth stem-10.csv."""
    stem = row["file"].removesuffix(".csv")
    return row["date"], re.sub(r"\d+", lambda number: number[0].zfill(9), stem)


def tower(row: Row) -> str:
    """The tower, with the lengths of the captions."""
    return TOWERS[row["tower"]] + (f" ({row['captions']})" if row.get("captions") else "")


def is_timed(row: Mapping[str, str]) -> bool:
    return row.get("median_s", "") != ""


def has_answer(row: Mapping[str, str]) -> bool:
    """Timed, or known to be wrong or to fail: no other file says more."""
    return row["status"] not in STATUS


def turns(rows: Iterable[Row], shared: Sequence[str]) -> Iterator[list[Row]]:
    """Contestants that took turns: rows that follow each other and share these columns, until somebody comes again."""
    for _, same in itertools.groupby(rows, lambda row: [row.get(name, "") for name in shared]):
        found: dict[str, Row] = {}
        for row in same:
            if row["contestant"] in found:
                yield list(found.values())
                found = {}
            found[row["contestant"]] = row
        yield list(found.values())


def three(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(
    rows: Sequence[Row], columns: Sequence[str], column: Callable[[Row], str], *, floor: bool = False
) -> Iterator[str]:
    """The table, a line for each contestant, and behind it who beats clipfast, if anybody does.

    columns: headings, in order.   column: the heading that a row is under.   floor: with clipfast's share of it.
    """
    cells = {(row["contestant"], column(row)): row for row in rows}
    ours = {heading: cells.get((peers.OURS, heading), {}) for heading in columns}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in sorted({row["contestant"] for row in rows}, key=_order):
        texts = [_cell(cells.get((name, heading)), ours[heading], name) for heading in columns]
        if any(texts):
            bold = "**" if name == peers.OURS else ""
            lines.append(f"| {bold}{name}{bold} | " + " | ".join(texts) + " |")
    shares = [f"{float(row['of_floor']):.0%}" if row.get("of_floor") else "" for row in ours.values()]
    if floor and any(shares):
        lines.append("| clipfast's share of the floor | " + " | ".join(shares) + " |")
    yield "\n".join(lines)
    lost = sorted(_losses(cells, ours))
    if lost:
        yield "**clipfast loses** " + "; ".join(lost) + "."


def _order(name: str) -> tuple[int, str]:
    first = (peers.OURS, peers.PREPACKED, peers.OPENAI, "open_clip")
    return (first.index(name) if name in first else len(first), name)


def _cell(row: Row | None, ours: Mapping[str, str], name: str) -> str:
    if row is None:
        return ""
    if not is_timed(row):
        return STATUS.get(row["status"], row["status"])
    rate = three(float(row["samples_per_s"]))
    if name == peers.OURS:
        return f"**{rate}**" + (", in part on PyTorch" if ON_PYTORCH in (row.get("note") or "") else "")
    if not is_timed(ours):
        return rate
    about = ", approximate" if row["status"] == "approximate" else ""
    return f"{rate} ({float(row['median_s']) / float(ours['median_s']):.2f}x{about})"


def _losses(cells: Mapping[tuple[str, str], Row], ours: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    for (name, heading), row in cells.items():
        if name not in (peers.OURS, peers.PREPACKED) and is_timed(row) and is_timed(ours[heading]):
            theirs = float(row["median_s"])
            ratio = float(ours[heading]["median_s"]) / theirs
            if ratio > 1:
                about = ", approximate" if row["status"] == "approximate" else ""
                packed = cells.get((peers.PREPACKED, heading), {}).get("median_s")
                if packed:
                    about += f"; prepacked {'wins' if float(packed) < theirs else 'loses too'}"
                yield f"in {heading} to {name} ({three(ratio)}x as fast{about})"
