"""The short tables at the end of a run: towers, operators, and how far each aim is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.gpu.contestants import OPENAI, OURS
from benchmarks.gpu.run import DRY, Run
from clipfast.bench import output
from clipfast.bench.harness import Row

MOST_OPERATORS = 40
MOST_FAILURES = 12


class Aim(NamedTuple):
    """So many times as fast as somebody, or so large a share of the copy bandwidth."""

    operator: str
    model: str
    batch: int
    captions: str
    peer: str  # "eager", "compile" or "copy"
    factor: float


def _aims() -> Iterator[Aim]:
    for model, eager, compiled in (("ViT-B/32", 2.4, 1.4), ("ViT-B/16", 2.4, 1.4), ("ViT-L/14", 2.15, 1.3)):
        yield Aim("encode_image", model, 256, "", "eager", eager)
        yield Aim("encode_image", model, 256, "", "compile", compiled)
    yield Aim("encode_text", "ViT-B/32", 256, "8-24", "eager", 10)
    yield Aim("encode_text", "ViT-B/32", 256, "8-24", "compile", 5)
    yield Aim("encode_image", "ViT-B/32", 1, "", "eager", 7)
    yield Aim("encode_text", "ViT-B/32", 1, "8-24", "eager", 7)
    yield Aim("attention", "ViT-B/32", 256, "L=50", "copy", 0.85)
    yield Aim("attention", "ViT-B/32", 256, "L=77", "copy", 0.85)


AIMS = tuple(_aims())
_IS_PEER: dict[str, Callable[[str], bool]] = {
    "eager": lambda name: name == OPENAI,
    "compile": lambda name: name.endswith("torch.compile"),
}


def _groups(rows: Iterable[Row], *, towers: bool) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows by what they measured; of a contestant that was timed twice the later one, beside its own peers."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["stage"] == ("towers" if towers else "operators"):
            key = tuple(row.get(name, "") for name in ("operator", "model", "shape", "batch", "captions", "dtype"))
            found.setdefault(key, {})[row["contestant"]] = row
    return found


def best_peer(group: dict[str, Row]) -> Row | None:
    """The fastest that computes the same and is not ours."""
    others = [r for n, r in group.items() if not n.startswith(OURS) and r["status"] == "ok" and "median_s" in r]
    return min(others, key=lambda row: row["median_s"], default=None)


def ratio(group: dict[str, Row], peer: Row | None) -> str:
    ours = group.get(OURS, {})
    return f"{peer['median_s'] / ours['median_s']:.2f}" if peer is not None and "median_s" in ours else "-"


def table(
    groups: dict[tuple[Any, ...], dict[str, Row]], scale: float, most: int | None = None
) -> list[tuple[str, ...]]:
    lines = []
    for key, group in list(groups.items())[:most]:
        operator, model, shape, batch, captions, dtype = key
        ours, peer = group.get(OURS, {"status": "-"}), best_peer(group)
        what = " ".join(str(part) for part in (operator, model, shape, f"b{batch}", captions, dtype) if part)
        share = output.cell(ours, "of_floor", ".0%")
        time = output.cell(ours, "median_s", ".4g", scale) if ours["status"] == "ok" else ours["status"]
        theirs = output.cell(peer or {}, "median_s", ".4g", scale)
        lines.append((what, peer["contestant"] if peer else "-", time, theirs, ratio(group, peer), share))
    return lines


def aim_line(aim: Aim, rows: list[Row], copy: float | None) -> tuple[str, str, str, str]:
    """(what, aim, found, verdict); "not measured" where a figure is missing, never a guess."""
    about = " ".join(part for part in (aim.operator, aim.model, f"b{aim.batch}", aim.captions, "bfloat16") if part)
    if aim.peer == "copy":
        what, goal = f"{about}, share of copy bandwidth", f"{aim.factor:.0%}"
        speeds = [
            r["gb_per_s"] * 1e9 / copy
            for r in rows
            if copy and _is(aim, r) and "gb_per_s" in r and r["contestant"] == OURS
        ]
        found = speeds[-1] if speeds else None
        text = f"{found:.0%}" if speeds else "-"
    else:
        what, goal = f"{about}, against {aim.peer}", f"{aim.factor:g}x"
        group = [row for row in rows if _is(aim, row) and "median_s" in row and row["status"] == "ok"]
        ours = [row["median_s"] for row in group if row["contestant"] == OURS]
        theirs = [row["median_s"] for row in group if _IS_PEER[aim.peer](row["contestant"])]
        found = min(theirs) / ours[-1] if ours and theirs else None
        text = f"{found:.2f}x" if found is not None else "-"
    verdict = "not measured" if found is None else "reached" if found >= aim.factor else "MISSED"
    return what, goal, text, verdict


def _is(aim: Aim, row: Row) -> bool:
    if (row.get("operator"), row.get("batch"), row.get("dtype")) != (aim.operator, aim.batch, "bfloat16"):
        return False
    if aim.operator == "attention":
        return aim.captions in row["shape"].split()
    return row.get("model") == aim.model and row.get("captions", "") == aim.captions


def print_report(run: Run) -> None:
    """Last of all, and short: whoever called may see the end of the output only."""
    if run.dry:
        print(f"\n{DRY}")
    header = ("best other", "ours", "theirs", "x as fast", "of floor's speed")
    operators, towers = _groups(run.rows, towers=False), _groups(run.rows, towers=True)
    print(
        f"\n{run.facts['gpu']}, torch {run.facts['torch']}, triton {run.facts['triton']}, commit {run.facts['commit']}"
    )
    if run.ceilings and not run.dry:
        rates = (
            f"{n} {v / 1e9:.0f} GB/s" if n == "copy" else f"{n} {v / 1e12:.0f} TFLOP/s" for n, v in run.ceilings.items()
        )
        print("ceilings: " + ", ".join(rates))
    if run.paste:
        print("\nfor clipfast/tuning.py:", *run.paste, sep="\n")
    if operators and not run.dry:
        notes = [f"{len(operators) - MOST_OPERATORS} more in the file"] if len(operators) > MOST_OPERATORS else []
        output.print_table("operators, us a call", ("", *header), table(operators, 1e6, MOST_OPERATORS), notes, names=2)
    if towers and not run.dry:
        output.print_table("towers, ms a batch", ("", *header), table(towers, 1e3), names=2)
    if (towers or operators) and not run.dry:
        lines = [aim_line(aim, run.rows, run.ceilings.get("copy")) for aim in AIMS]
        output.print_table("aims", ("", "aim", "found", ""), lines)
    for note in run.notes[-12:]:
        print(f"note: {note}"[:160])
    for failure in run.failures[:MOST_FAILURES]:
        print(f"WRONG: {failure}"[:240])
    print(f"{len(run.failures)} correctness failures" if run.failures else "no correctness failure", flush=True)
