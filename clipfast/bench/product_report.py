"""The README's tables of matrix products on CPUs, from the files of `python -m benchmarks.linear`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipfast.bench import markdown
from clipfast.bench.harness import Row
from clipfast.kernels import cpu_library

# files of before blocks were measured lack some of them, and are passed over
NEEDED = {"date", "cpu", "cpu_kind", "threads", "torch", "instructions", "dtype", "block", "rows", "contestant"}
NEEDED |= {"status", "capability", "of_peak", "of_read"}
# up to so many rows of x the time is that of reading the weights
FEW = 16
# kinds of CPU that ought to be measured, and what `environment.cpu_kind` says of them
WANTED = {
    "AVX2 only (AMD Zen 3 or Intel)": r"-avx2$",
    "AVX-512 with bfloat16 at full width (AMD Zen 5)": r"^amd-.*-26-\d+-avx512_bf16$",
    "AMX (Intel Sapphire Rapids)": r"-amx$",
}
LEGEND = (
    "**Matrix products on CPUs**, by `python -m benchmarks.linear` (`make on-this-cpu`): the four of a block, for so "
    "many rows, as a share of what multiply-adds in registers reach in the same run, in the instructions of clipfast's "
    "product; of few rows also as a share of how fast the same weights are read in the same rounds."
)


def section(folder: Path, link: str) -> str:
    """A table for each kind of CPU, form and dtype, of the newest file that has it, and which kinds have none.

    link: the folder, as a link sees it.
    """
    rows = [row for row in markdown.read(folder, NEEDED) if row["block"]]
    groups: dict[tuple[str, ...], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("cpu_kind", "threads", "instructions", "dtype"))
        groups.setdefault(key, {}).setdefault(markdown.age(row), []).append(row)
    parts = [LEGEND]
    for key in sorted(groups, key=_order):
        parts += _table(groups[key][max(groups[key])], link)
    measured = {row["cpu_kind"] for row in rows}
    lacking = [name for name, form in WANTED.items() if not any(re.search(form, kind) for kind in measured)]
    parts += ["\n".join(f"- not yet measured on {name}" for name in lacking)] if lacking else []
    return "\n\n".join(parts)


def _order(key: tuple[str, ...]) -> tuple[str, str, int, bool]:
    """By CPU; the newest instructions first; float32 first."""
    kind, threads, instructions, dtype = key
    return kind, threads, -cpu_library.INSTRUCTIONS.get(instructions, 0), dtype != "float32"


def _table(rows: Sequence[Row], link: str) -> Iterator[str]:
    """Of one file and dtype."""
    first, names = rows[0], list(dict.fromkeys(row["contestant"] for row in rows))
    torch = first["torch"].partition("+")[0]
    yield (
        f"{first['dtype']} on {first['cpu']} ({first['cpu_kind']}), {first['threads']} threads, torch {torch} in "
        f"{first['capability']}, clipfast in {first['instructions']} ([{first['file']}]({link}/{first['file']})):"
    )
    cells = {(row["block"], row["rows"], row["contestant"]): _cell(row) for row in rows}
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for block, n_rows in dict.fromkeys((row["block"], row["rows"]) for row in rows):
        shares = [cells.get((block, n_rows, name), "") for name in names]
        lines.append(f"| {block}, {n_rows} {'row' if n_rows == '1' else 'rows'} | {' | '.join(shares)} |")
    yield "\n".join(lines)


def _cell(row: Row) -> str:
    if not row["of_peak"]:
        return markdown.STATUS.get(row["status"], "" if row["status"] == "ok" else row["status"])
    share = f"{float(row['of_peak']):.1%}"
    return f"{share}, reads {float(row['of_read']):.0%}" if int(row["rows"]) <= FEW and row["of_read"] else share
