"""From medians to rates, ratios and shares of what the machine could do; and the tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from clipfast import roofline
from clipfast.bench import peers
from clipfast.bench.ceilings import COPY, PRODUCT, READ, Ceilings
from clipfast.bench.harness import Row, significant
from clipfast.bench.output import cell, print_table
from clipfast.bench.plan import Group

HEADER = (
    *("contestant", "median ms", "p20", "p80", "samples/s", "x openai", "x transf.", "GFLOP/s", "of ceiling"),
    *("of floor", "1-cos p99", "RMS error", "x openai's"),
)
LEGEND = """\
x openai, x transf.: times as fast as that contestant.  Errors: against float64; x openai's: its RMS error over theirs.
GFLOP/s: openai/CLIP's dense work over time, for everybody, so that who skips some of it can pass the ceiling.
of floor: the time below which the least work cannot be done at the ceilings above, over this time; on a CPU the larger
of operations at the peak and of weights, which caches do not hold, at the reading rate."""


def add_rates(
    rows: Mapping[str, Row], group: Group, flops: int, works: Sequence[roofline.Work], ceilings: Ceilings
) -> None:
    """Throughput, ratios and shares, from the medians and errors in the rows themselves.

    flops: of openai/CLIP, for the batch.   works: the least work for the batch.
    """
    first, second = rows.get(peers.OPENAI, {}), rows.get(peers.TRANSFORMERS[group.tower], {})
    ceiling = ceilings.rates.get(group.dtype)
    for row in rows.values():
        row["gflop_per_sample"] = significant(flops / group.batch / 1e9)
        if first.get("rel_rms") and "rel_rms" in row:
            row["rms_vs_openai"] = significant(row["rel_rms"] / first["rel_rms"])
        if "median_s" not in row:
            continue
        row["samples_per_s"] = significant(group.batch / row["median_s"])
        row["gflops"] = significant(flops / row["median_s"] / 1e9)
        if ceiling:
            floor = ceilings.floor(works, group.dtype)
            row |= {"ceiling_gflops": significant(ceiling / 1e9), "ceiling_by": ceilings.by[group.dtype]}
            row["share_of_ceiling"] = significant(flops / row["median_s"] / ceiling)
            row |= {"floor_s": significant(floor), "of_floor": significant(floor / row["median_s"])}
        for column, other in (("vs_openai", first), ("vs_transformers", second)):
            if "median_s" in other:
                row[column] = significant(other["median_s"] / row["median_s"])


def line(name: str, row: Row) -> tuple[str, ...]:
    """A row of the printed table."""
    return (
        name + ("" if row["status"] == "ok" else f" ({row['status']})"),
        *(cell(row, column, ".4g", 1e3) for column in ("median_s", "p20_s", "p80_s")),
        cell(row, "samples_per_s", ".4g"),
        cell(row, "vs_openai", ".2f"),
        cell(row, "vs_transformers", ".2f"),
        cell(row, "gflops", ".0f"),
        cell(row, "share_of_ceiling", ".0%"),
        cell(row, "of_floor", ".0%"),
        *(cell(row, column, ".1e") for column in ("cos_gap_p99", "rel_rms")),
        cell(row, "rms_vs_openai", ".2f"),
    )


def print_group(title: str, rows: Mapping[str, Row], missing: Mapping[str, str]) -> None:
    """A table with a line for each contestant that was asked, and below it who was not, and why."""
    shown = {name: row for name, row in rows.items() if row["status"] not in ("skipped", "out of memory")}
    by_note: dict[str, list[str]] = {}
    for name, row in rows.items():
        tail = f"p95 {row['p95_s'] * 1e3:.4g} ms" if "p95_s" in row else ""
        tail += f", p99 {row['p99_s'] * 1e3:.4g} ms" if "p99_s" in row else ""
        if tail:
            by_note.setdefault(tail, []).append(name)
        if "warning" in row:
            by_note.setdefault(row["warning"], []).append(name)
        if "note" in row:
            by_note.setdefault(f"{row['status']}: {row['note']}", []).append(name)
    for name, why in missing.items():
        by_note.setdefault(why, []).append(name)
    notes = [f"{', '.join(names)}: {note}" for note, names in by_note.items()]
    header = HEADER if shown else ("",)
    print_table(title, header, (line(name, row) for name, row in shown.items()), notes)


def ceilings(found: Ceilings) -> str:
    """One line."""
    parts = [f"{name} {found.rates[name] / 1e9:.3g} GB/s" for name in (READ, COPY) if name in found.rates]
    for name, by in found.by.items():
        more = f", of one thread {found.single[name] / 1e9:.4g}" if name in found.single else ""
        more += f", fastest product {found.products[name] / 1e9:.4g}" if by != PRODUCT else ""
        parts.append(f"{name} {found.rates[name] / 1e9:.4g} GFLOP/s ({by}{more})")
    return "ceilings: " + ", ".join(parts)


START = (
    "contestant",
    "import s",
    "build s",
    "first image ms",
    "second",
    "first text ms",
    "second",
    "peak MiB",
    "of it",
)


def print_start(rows: Iterable[Row]) -> None:
    """What a process pays once."""
    lines = [
        (
            row["contestant"] + ("" if row["status"] == "ok" else f" ({row['status']})"),
            *(cell(row, column, ".2f") for column in ("import_s", "build_s")),
            *(
                cell(row, f"{which}_{tower}_s", ".4g", 1e3)
                for tower in ("image", "text")
                for which in ("first", "second")
            ),
            *(cell(row, column, ".0f", 2**-20) for column in ("peak_bytes", "base_bytes")),
        )
        for row in rows
    ]
    notes = ["import: beyond torch's own.  peak MiB: memory in the calls; of it: before anything of theirs was loaded"]
    notes += [f"{row['contestant']}: {row['note']}" for row in rows if "note" in row]
    if lines:
        first = next(iter(rows))
        print_table(f"{first['model']} {first['dtype']}, batch 1, a process each", START, lines, notes)
