"""The README's tables from the results files: nothing in them is typed by hand, and each names the file it is from.

What follows is `clipfast bench`'s. Behind it come the tables of `python -m benchmarks.linear` (product_report.py)
and of `python -m benchmarks.gpu` (gpu_report.py).

    python -m clipfast.bench.report [--results benchmarks/results] [--readme README.md] [--check] [--plots]

Of a group (model, tower, dtype, batch, captions on one machine) that several files hold the newest counts. --check
changes nothing and fails if the README is not what the files give. --plots draws the pictures beside the files anew.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from clipfast.bench import gpu_report, markdown, peers, product_report
from clipfast.bench.harness import Row
from clipfast.bench.markdown import TOWERS, three
from clipfast.files import write_bytes

BEGIN, END = "<!-- results: made by `make readme`, do not edit -->", "<!-- results: end -->"
NEEDED = {"model", "tower", "dtype", "batch", "contestant", "median_s", "samples_per_s"}
KINDS = ("ratios", "throughput", "roofline")


class Key(NamedTuple):
    """A machine with its settings, and a table on it."""

    machine: str
    model: str
    batch: int


def read(folder: Path) -> list[Row]:
    """Rows of every file of whole models, each with its "file"; other files are passed over.

    Raises: ValueError if there is none.
    """
    rows = markdown.read(folder, NEEDED)
    if not rows:
        raise ValueError(f"{folder} has no results of whole models")
    return rows


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each group the rows of its newest file that timed clipfast."""
    groups: dict[tuple[str, ...], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        key = (_machine(row), *(row[name] for name in ("model", "tower", "dtype", "batch")), row.get("captions") or "")
        groups.setdefault(key, {}).setdefault(markdown.age(row), []).append(row)
    chosen: list[Row] = []
    for files in groups.values():
        timed = {name: found for name, found in files.items() if any(_is_ours(row) for row in found)}
        chosen += (timed or files)[max(timed or files)]
    return chosen


def _is_ours(row: Row) -> bool:
    return row["contestant"] == peers.OURS and markdown.is_timed(row)


def _machine(row: Row) -> str:
    device = row.get("device") or "cpu"
    name = row["cpu"] if device == "cpu" else device
    # many kinds are called "AMD EPYC"; older files do not say which
    if device == "cpu" and row.get("cpu_kind"):
        name += f" ({row['cpu_kind']})"
    return f"{name}, {row['threads']} threads, torch {row['torch'].partition('+')[0]}"


def made(results: Path, folder: str) -> str:
    """The section of all results, with the pictures beside them.   folder: theirs, as a link sees it.

    Raises: ValueError if there are none of `clipfast bench`.
    """
    pictures = {path.name for path in results.glob("*.svg")}
    parts = (
        tables(read(results), folder, read_start(results), pictures),
        product_report.section(results, folder),
        gpu_report.section(results, folder, pictures),
    )
    return "\n\n".join(parts)


def read_start(folder: Path) -> list[Row]:
    """Rows of the newest file about import, first call and memory; none if there is none."""
    files: dict[tuple[str, str], list[Row]] = {}
    for path in folder.glob("*-start.csv"):
        with path.open(newline="") as file:
            rows = [{**row, "file": path.name} for row in csv.DictReader(file)]
        if rows:
            files[rows[0]["date"], path.name] = rows
    return files[max(files)] if files else []


def tables(rows: Sequence[Row], folder: str, start: Sequence[Row] = (), pictures: Collection[str] = frozenset()) -> str:
    """The part of `clipfast bench`.

    folder: of the files, as a link sees it.   start: rows of `read_start`.   pictures: names of those there are.
    """
    found: dict[Key, list[Row]] = {}
    chosen = newest(rows)
    for row in chosen:
        found.setdefault(Key(_machine(row), row["model"], int(row["batch"])), []).append(row)
    parts: list[str] = []
    # the largest batch first: throughput is what most come for
    keys = sorted(found, key=lambda key: (key.machine, key.model, -key.batch))
    for machine, same in itertools.groupby(keys, lambda key: key.machine):
        shown = [key for key in same if any(_is_ours(row) for row in found[key])]
        if not shown:
            continue
        parts.append(
            f"On {machine}: samples per second, medians of interleaved rounds. In brackets: how many times as fast "
            "clipfast is. In brackets behind text: how many tokens the captions have."
        )
        for key in shown:
            parts += _section(key, found[key], folder)
        of_it = [row for key in sorted(found) if key.machine == machine for row in found[key]]
        parts += [*_tails(of_it), *_errors(of_it)]
    parts += _start(start, folder)
    for stem in sorted({row["file"].removesuffix(".csv") for row in chosen}):
        parts += [
            f"![{kind} of {stem}]({folder}/{stem}-{kind}.svg)" for kind in KINDS if f"{stem}-{kind}.svg" in pictures
        ]
    return "\n\n".join(parts)


def _section(key: Key, rows: Sequence[Row], folder: str) -> Iterator[str]:
    files = ", ".join(f"[{name}]({folder}/{name})" for name in sorted({row["file"] for row in rows}))
    columns = _columns(rows)
    yield f"**{key.model}, batch {key.batch}** ({files})"
    yield from markdown.table(rows, columns, _column)


def _column(row: Row) -> str:
    return f"{markdown.tower(row)} {row['dtype']}"


def _columns(rows: Iterable[Row]) -> list[str]:
    order = list(TOWERS)
    kinds = {
        (order.index(row["tower"]), row.get("captions") or "", row["dtype"] != "float32", _column(row)) for row in rows
    }
    return [column for *_, column in sorted(kinds)]


def _tails(rows: Sequence[Row]) -> Iterator[str]:
    """Percentiles of single calls, where enough were made."""
    lines = []
    for row in rows:
        if row["batch"] == "1" and row.get("p95_s"):
            times = [three(1e3 * float(row[name])) if row.get(name) else "" for name in ("median_s", "p95_s", "p99_s")]
            lines.append(
                f"| {row['model']} {_column(row)} | {row['contestant']} | {' | '.join(times)} | {row['rounds']} |"
            )
    if lines:
        yield "Latency at batch 1, milliseconds (a percentile is left out where too few calls fitted into the time):"
        yield "\n".join(["| | | p50 | p95 | p99 | calls |", "|---|---|---|---|---|---|", *lines])


def _start(rows: Sequence[Row], folder: str) -> Iterator[str]:
    """What a process pays once."""
    timed = [row for row in rows if row["status"] == "ok"]
    if not timed:
        return
    first, name = timed[0], timed[0]["file"]
    what = f"{first['model']} {first['dtype']} on {_machine(first)} ([{name}]({folder}/{name}))"
    yield f"What a process pays once, {what}; import is beyond torch's own:"
    lines = ["| | import, s | first image, ms | second | first caption, ms | second | memory, MiB |", "|---" * 7 + "|"]
    for row in timed:
        calls = [f"{w}_{t}_s" for t in ("image", "text") for w in ("first", "second")]
        times = [three(1e3 * float(row[column])) for column in calls]
        memory = f"{float(row['peak_bytes']) / 2**20:.0f}"
        lines.append(f"| {row['contestant']} | {float(row['import_s']):.2f} | {' | '.join(times)} | {memory} |")
    yield "\n".join(lines)


def _errors(rows: Sequence[Row]) -> Iterator[str]:
    """RMS errors at the largest batch of each model: ours and openai-clip's."""
    largest = {row["model"]: max(int(r["batch"]) for r in rows if r["model"] == row["model"]) for row in rows}
    lines: list[str] = []
    for row in rows:
        if row["contestant"] == peers.OURS and row.get("rel_rms") and int(row["batch"]) == largest[row["model"]]:
            theirs = next((r for r in rows if r["contestant"] == peers.OPENAI and _same(r, row)), {})
            error = _error(theirs) if theirs.get("rel_rms") else ""
            lines.append(f"| {row['model']} {_column(row)} | {_error(row)} | {error} |")
    if lines:
        yield "RMS error against float64, relative to the answer, in the same runs:"
        yield "\n".join(["| | clipfast | openai-clip |", "|---|---|---|", *lines])


def _error(row: Row) -> str:
    return f"{float(row['rel_rms']):.1e}".replace("e-0", "e-")


def _same(a: Row, b: Row) -> bool:
    return all(a.get(name) == b.get(name) for name in ("file", "model", "tower", "dtype", "batch", "captions"))


def replaced(readme: str, section: str) -> str:
    """The README's text with its generated section replaced. Raises ValueError if the marks are not there."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"expected {BEGIN} and, after it, {END}, once each")
    head, _, rest = readme.partition(BEGIN)
    return f"{head}{BEGIN}\n{section}\n{END}{rest.partition(END)[2]}"


def draw(folder: Path) -> list[Path]:
    """The pictures of each file of `clipfast bench` that has its JSON beside it, and of each of a GPU run."""
    from clipfast.bench import plots

    written = []
    for name in sorted({row["file"] for row in read(folder)}):
        facts = (folder / name).with_suffix(".json")
        if facts.is_file():
            rows = [row for row in read(folder) if row["file"] == name]
            found = json.loads(facts.read_text())
            # older files have the fastest products, and do not say so
            by = found.get("ceilings_by", {})
            written += plots.draw(rows, found["ceilings"], by, (folder / name).with_suffix(""))
    return written + gpu_report.draw(folder)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clipfast.bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder (%(default)s)")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="file (%(default)s)")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the README differs")
    parser.add_argument("--plots", action="store_true", help="draw the pictures anew")
    options = parser.parse_args(argv)
    try:
        if options.plots:
            print("\n".join(map(str, draw(options.results))))
        folder = options.results.as_posix()
        old = options.readme.read_text()
        new = replaced(old, made(options.results, folder))
    except (OSError, ValueError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if options.check:
        print("the README is what the results give" if new == old else "the README differs: run `make readme`")
        return int(new != old)
    write_bytes(options.readme, new.encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
