"""What `python -m benchmarks.linear` prints: everything of each row, and what its targets are about."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from clipfast.bench import output
from clipfast.bench.harness import Row
from clipfast.bench.product_report import FEW

HEADER = ("", "", "GFLOP/s", "of peak", "GB/s", "of reading", "median ms", "p20", "p80")
HEADER += ("x F.linear", "RMS error", "x F.linear's")


def line(row: Row) -> tuple[str, ...]:
    """A row of the first table: everything."""
    what = row["block"] or f"{row['inputs']}x{row['outputs']}"
    return (
        f"{row['dtype']} {what}, {row['rows']} rows",
        row["contestant"] + (f" ({row['status']})" if row["status"] != "ok" else ""),
        output.cell(row, "gflops", ".0f"),
        output.cell(row, "of_peak", ".1%"),
        output.cell(row, "gb_per_s", ".1f"),
        output.cell(row, "of_read", ".1%"),
        *(output.cell(row, column, ".4g", 1e3) for column in ("median_s", "p20_s", "p80_s")),
        output.cell(row, "vs_f_linear", ".2f"),
        output.cell(row, "rel_rms", ".2e"),
        output.cell(row, "rms_vs_f_linear", ".2f"),
    )


def shares(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """The second table, with its heading: shares of the peak, and of reading where rows are few."""
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    yield ("share of the peak", *names)
    for what, same in itertools.groupby(rows, lambda row: line(row)[0]):
        found = {row["contestant"]: row for row in same}
        yield (what, *(_share(found.get(name, {})) for name in names))


def _share(row: Row) -> str:
    share = output.cell(row, "of_peak", ".1%")
    return f"{share}, reads {output.cell(row, 'of_read', '.0%')}" if row and row["rows"] <= FEW else share


def show(rows: Sequence[Row], facts: Row, form: str, peaks: Mapping[str, float]) -> None:
    """form, peaks: of `benchmarks.linear.Bench`."""
    notes = [f"{row['contestant']}: {row['note']}" for row in rows if "note" in row]
    title = f"x @ weight.T + bias on {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
    output.print_table(title, HEADER, map(line, rows), dict.fromkeys(notes), names=2)
    found = ", ".join(f"{peak / 1e9:.0f} GFLOP/s {name}" for name, peak in peaks.items())
    title = f"Peak of multiply-adds in registers ({form}): {found}"
    if rates := [row["read_gb_per_s"] for row in rows if "read_gb_per_s" in row]:
        title += f"; the same weights were read at {min(rates):.0f} to {max(rates):.0f} GB/s"
    heading, *lines = shares(rows)
    output.print_table(title, heading, lines)
