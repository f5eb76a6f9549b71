"""What a run prints: a dry run the plan of its time first; at the end operators, towers, aims, how stages ended."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.operator_contestants import OPENAI, OURS
from benchmarks.gpu.run import DRY
from benchmarks.gpu.stages import Stage, forecast
from clipfast.bench import output
from clipfast.bench.harness import Row
from clipfast.bench.markdown import turns

MOST_OPERATORS = 40
MOST_FAILURES = 12
MOST_NOTES = 16


class Aim(NamedTuple):
    """What the project has set out for: so many times as fast as somebody, or such a share of the copy bandwidth."""

    operator: str
    model: str
    batch: int
    captions: str
    peer: str  # "eager", "compile" or "copy"
    factor: float


def _aims() -> Iterator[Aim]:
    for model, eager, compiled in (("ViT-B/32", 2.4, 1.4), ("ViT-L/14", 2.15, 1.3)):
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


_SHARED = ("operator", "model", "shape", "batch", "captions", "dtype")


def _groups(rows: Iterable[Row], *, towers: bool) -> list[dict[str, Row]]:
    """Contestant -> row, of each time that contestants took turns."""
    chosen = [row for row in rows if "contestant" in row and row["stage"] != "tune" and towers == _is_tower(row)]
    return [{row["contestant"]: row for row in several} for several in turns(chosen, ("stage", *_SHARED))]


def _is_tower(row: Row) -> bool:
    return row["operator"].startswith(("encode_", "train_"))


def best_peer(group: dict[str, Row]) -> Row | None:
    """The fastest that computes the same and is not ours."""
    others = [r for n, r in group.items() if not n.startswith(OURS) and r["status"] == "ok" and "median_s" in r]
    return min(others, key=lambda row: row["median_s"], default=None)


def ratio(group: dict[str, Row], peer: Row | None) -> str:
    ours = group.get(OURS, {})
    return f"{peer['median_s'] / ours['median_s']:.2f}" if peer is not None and "median_s" in ours else "-"


def table(groups: list[dict[str, Row]], scale: float, most: int | None = None) -> list[tuple[str, ...]]:
    lines = []
    for group in groups[:most]:
        ours, peer = group.get(OURS, {"status": "-"}), best_peer(group)
        what = " ".join(part for part in (*_about(group), "beside compilers" * _has_compilers(group)) if part)
        share = output.cell(ours, "of_floor", ".0%")
        time = output.cell(ours, "median_s", ".4g", scale) if ours["status"] == "ok" else ours["status"]
        theirs = output.cell(peer or {}, "median_s", ".4g", scale)
        lines.append((what, peer["contestant"] if peer else "-", time, theirs, ratio(group, peer), share))
    return lines


def _about(group: dict[str, Row]) -> list[str]:
    first = next(iter(group.values()))
    return [f"b{first[name]}" if name == "batch" else str(first.get(name, "")) for name in _SHARED]


def _has_compilers(group: dict[str, Row]) -> bool:
    return any(name.endswith("compile") for name in group)


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
        found = None
        # the last time that both took turns
        for group in _groups([row for row in rows if _is(aim, row)], towers=True):
            timed = {name: r["median_s"] for name, r in group.items() if r["status"] == "ok" and "median_s" in r}
            theirs = [seconds for name, seconds in timed.items() if _IS_PEER[aim.peer](name)]
            found = min(theirs) / timed[OURS] if OURS in timed and theirs else found
        text = f"{found:.2f}x" if found is not None else "-"
    verdict = "not measured" if found is None else "reached" if found >= aim.factor else "MISSED"
    return what, goal, text, verdict


def _is(aim: Aim, row: Row) -> bool:
    if (row.get("operator"), row.get("batch"), row.get("dtype")) != (aim.operator, aim.batch, "bfloat16"):
        return False
    if row.get("model") != aim.model:
        return False
    if aim.operator == "attention":
        return aim.captions in row["shape"].split()
    return row.get("captions", "") == aim.captions


def print_plan(stages: Iterable[Stage], seconds: float) -> None:
    """What each stage would do in its share, with an estimate of each part, on an H100.   seconds: for the stages."""
    lines, start = [], 0.0
    for stage in stages:
        parts = forecast(stage)
        estimate = sum(each for _, each in parts)
        at_most = max(0.0, min(stage.seconds, seconds - start))
        share = f"{at_most:.0f}" if at_most >= stage.least else "out of time"
        lines.append((stage.name, "", f"{estimate:.0f}", share, f"{start:.0f}"))
        lines += [("", what, f"{each:.0f}", "", "") for what, each in parts if len(parts) > 1]
        start += min(estimate, at_most) if at_most >= stage.least else 0.0
    header = ("stage", "", "estimate, s", "at most", "begins at")
    notes = [f"{seconds - start:.0f} of {seconds:.0f} s are left by this estimate (arithmetic, from earlier H100 runs)"]
    output.print_table("plan", header, lines, notes, names=2)


def print_report(found: Evidence) -> None:
    """Last of all, and short: whoever called may see the end of the output only."""
    state = found.state
    facts, dry = state.facts, state.dry
    if dry:
        print(f"\n{DRY}")
    header = ("best other", "ours", "theirs", "x as fast", "of floor's speed")
    operators, towers = _groups(found.rows, towers=False), _groups(found.rows, towers=True)
    if facts:
        print(f"\n{facts['gpu']}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit']}")
    if state.ceilings and not dry:
        rates = (
            f"{n} {v / 1e9:.0f} GB/s" if n == "copy" else f"{n} {v / 1e12:.0f} TFLOP/s"
            for n, v in state.ceilings.items()
        )
        print("ceilings: " + ", ".join(rates))
    if found.pasted:
        print("\nfor clipfast/tuning.py:", *found.pasted, sep="\n")
    if operators and not dry:
        notes = [f"{len(operators) - MOST_OPERATORS} more in the file"] if len(operators) > MOST_OPERATORS else []
        output.print_table("operators, us a call", ("", *header), table(operators, 1e6, MOST_OPERATORS), notes, names=2)
    if towers and not dry:
        output.print_table("towers, ms a batch", ("", *header), table(towers, 1e3), names=2)
    if (towers or operators) and not dry:
        lines = [aim_line(aim, found.rows, state.ceilings.get("copy")) for aim in AIMS]
        output.print_table("aims", ("", "aim", "found", ""), [line for line in lines if line[-1] != "not measured"])
    lines = [(each["stage"], each["outcome"][:110], f"{each['seconds']:.0f}") for each in found.stages]
    output.print_table("stages", ("", "", "s"), lines, names=2)
    if len(found.notes) > MOST_NOTES:
        print(f"{len(found.notes) - MOST_NOTES} notes before these, in the JSON:")
    for note in found.notes[-MOST_NOTES:]:
        print(textwrap.shorten(f"note: {note}", 200, placeholder=" ..."))
    for failure in found.failures[:MOST_FAILURES]:
        print(textwrap.shorten(f"WRONG: {failure}", 240, placeholder=" ..."))
    if len(found.failures) > MOST_FAILURES:
        print(f"{len(found.failures) - MOST_FAILURES} more in the JSON")
    if found.path is not None:
        print(f"results: {found.path}, and a .json beside it")
    counted = f"{found.proved} checks passed; " if found.proved else ""
    print(counted + (f"{len(found.failures)} correctness failures" if found.failures else "no correctness failure"))
    sys.stdout.flush()
