"""The README's tables and the pictures of whole models on GPUs, from the CSVs of `python -m benchmarks.gpu`.

A run may time a group twice, without compilers and beside them. Each such contest, in which all took turns, is a
column of its own, and no ratio crosses two.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from clipfast.bench import markdown, peers
from clipfast.bench.harness import Row

OPERATORS = {"encode_image": "image", "encode_text": "text", "train_step": "train"}
NEEDED = {"date", "commit", "gpu", "torch", "triton", "operator", "model", "batch", "captions", "dtype", "contestant"}
NEEDED |= {"status", "median_s", "of_floor", "note"}
# how a picture is called in its file's name and described
KINDS = {"throughput": "Samples per second by batch size", "floor": "Share of the floor by batch size"}
# columns beside the names: more are cut off where GitHub shows them
WIDEST = 7
NOT_RUN = "On a GPU: not yet run on a GPU."
LEGEND = (
    "On GPUs, by `python -m benchmarks.gpu` (`make gpu`): samples per second, medians of interleaved rounds in one "
    "process. In brackets: how many times as fast clipfast is, in the same rounds. The floor is the time below which "
    "the least work cannot be done at the ceilings that the same run measured; clipfast's share of it is that over its "
    "own time. *beside compilers*: rounds of their own, with compiled contestants in them. *clipfast, graphs off* and "
    "*torch backend*: without CUDA graphs, and on PyTorch's own kernels. Of what several runs of a card measured, the "
    "newest is shown."
)


class Group(NamedTuple):
    """What the contestants of one column compute.   compiled: with compilers among them."""

    gpu: str
    model: str
    tower: str
    captions: str
    dtype: str
    batch: int
    compiled: bool


class Contest(NamedTuple):
    """One measurement: contestants that took turns."""

    group: Group
    rows: list[Row]


def read(folder: Path) -> list[Contest]:
    """The contests of every file of a GPU run, in the order in which they were held."""
    rows = [row for row in markdown.read(folder, NEEDED) if row["operator"] in OPERATORS and row["gpu"] != "none"]
    return list(contests(rows))


def contests(rows: Iterable[Row]) -> Iterator[Contest]:
    names = ("file", "gpu", "model", "operator", "captions", "dtype", "batch")
    return map(_contest, markdown.turns(rows, names))


def _contest(rows: list[Row]) -> Contest:
    first = rows[0]
    compiled = any(_compiles(row["contestant"]) and markdown.has_answer(row) for row in rows)
    names = ("gpu", "model", "captions", "dtype", "batch")
    shared = {name: first[name] for name in names} | {"tower": OPERATORS[first["operator"]]}
    group = Group(**{**shared, "batch": int(first["batch"])}, compiled=compiled)
    made = [
        {
            **row,
            "tower": group.tower,
            "heading": _heading(group),
            "samples_per_s": group.batch / float(row["median_s"]) if markdown.is_timed(row) else "",
        }
        for row in rows
    ]
    return Contest(group, made)


def _compiles(name: str) -> bool:
    known = peers.known().get(name)
    return "torch.compile" in name or (known is not None and known.prepares > 0)


def _heading(group: Group) -> str:
    what = markdown.tower({"tower": group.tower, "captions": group.captions})
    return f"{what} {group.dtype}, batch {group.batch}" + (", beside compilers" if group.compiled else "")


def newest(found: Iterable[Contest]) -> list[Contest]:
    """Of each group the newest contest that says how clipfast did, wrong and failed included; else the newest."""
    best: dict[Group, Contest] = {}
    for contest in found:
        held = best.setdefault(contest.group, contest)
        if (_answers(contest), markdown.age(contest.rows[0])) >= (_answers(held), markdown.age(held.rows[0])):
            best[contest.group] = contest
    return list(best.values())


def _answers(contest: Contest) -> bool:
    return any(row["contestant"] == peers.OURS and markdown.has_answer(row) for row in contest.rows)


# ---------------------------------------------------------------------------------------------------------------------
# The section


def section(folder: Path, link: str, pictures: Collection[str] = frozenset()) -> str:
    """A sub-section for each card, the one that ran last first; within it a part for each file that is shown.

    link: the folder, as a link sees it.   pictures: names of those there are.
    """
    everything = read(folder)
    if not everything:
        return NOT_RUN
    cards: dict[str, dict[tuple[str, str], list[Contest]]] = {}
    for contest in newest(everything):
        cards.setdefault(contest.group.gpu, {}).setdefault(markdown.age(contest.rows[0]), []).append(contest)
    parts = [LEGEND]
    for card in sorted(cards, key=lambda card: max(cards[card]), reverse=True):
        parts.append(f"### {card}")
        for when in sorted(cards[card], reverse=True):
            held = [contest for contest in everything if markdown.age(contest.rows[0]) == when]
            parts += _file(cards[card][when], held, folder, link, pictures)
    return "\n\n".join(parts)


def _file(
    found: Sequence[Contest], held: Iterable[Contest], folder: Path, link: str, pictures: Collection[str]
) -> Iterator[str]:
    """What is shown of one file.   held: all that is in it."""
    rows = [row for contest in found for row in contest.rows]
    first, name = rows[0], rows[0]["file"]
    parts = [f"{first['date']}, commit {first['commit']}, torch {first['torch']}, Triton {first['triton']}"]
    parts += [*_missing(held), *_beside((folder / name).with_suffix(".json"), link)]
    yield f"From [{name}]({link}/{name}): {'. '.join(parts)}."
    for model in sorted({contest.group.model for contest in found}):
        for columns in _columns(contest.group for contest in found if contest.group.model == model):
            headings = [_heading(group) for group in columns]
            shown = [row for contest in found if contest.group in columns for row in contest.rows]
            yield f"**{model}** ([{name}]({link}/{name}))"
            yield from markdown.table(shown, headings, lambda row: row["heading"], floor=True)
    stem = name.removesuffix(".csv")
    for kind, what in KINDS.items():
        if f"{stem}-{kind}.svg" in pictures:
            yield f"![{what} on {first['gpu']}, all of {stem}]({link}/{stem}-{kind}.svg)"


def _columns(groups: Iterable[Group]) -> list[list[Group]]:
    """The columns of each table; a tower in a dtype stays together."""
    order = list(markdown.TOWERS)
    tables: list[list[Group]] = []
    ordered = sorted(groups, key=lambda group: (order.index(group.tower), *group[3:]))
    for _, kind in itertools.groupby(ordered, lambda group: group[:5]):
        together = list(kind)
        if tables and len(tables[-1]) + len(together) <= WIDEST:
            tables[-1] += together
        else:
            tables.append(together)
    return tables


def _missing(held: Iterable[Contest]) -> Iterator[str]:
    """Who was asked in a file and was never there."""
    rows = [row for contest in held for row in contest.rows]
    there = {row["contestant"] for row in rows if row["status"] != "missing"}
    why = {row["contestant"]: row["note"] for row in rows if row["contestant"] not in there}
    if why:
        yield "Missing: " + "; ".join(f"{name} ({note})" for name, note in sorted(why.items()))


def _beside(path: Path, link: str) -> Iterator[str]:
    """What went wrong in a run besides its rows, as far as its JSON says so."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    if count := len(found.get("failures", ())):
        yield f"**{count} of its checks found something wrong**, see [{path.name}]({link}/{path.name})"
    cut = [f"{each['stage']} ({each['outcome']})" for each in found.get("stages", ()) if each["outcome"] != "done"]
    if cut:
        yield "Stages that did not end as planned: " + ", ".join(cut)
    yield from (note for note in found.get("notes", ()) if "out of time" in note or markdown.ON_PYTORCH in note)


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def draw(folder: Path) -> list[Path]:
    """<stem>-throughput and -floor, each .png and .svg, of every file that has two batch sizes to compare."""
    from clipfast.bench import plots

    found = read(folder)
    files = {name: list(held) for name, held in itertools.groupby(found, lambda contest: contest.rows[0]["file"])}
    shown = {name: panels(held) for name, held in files.items()}
    names = [row["contestant"] for drawn in shown.values() for rows in drawn.values() for row in rows]
    written = []
    for name, drawn in shown.items():
        stem = (folder / name).with_suffix("")
        written += plots.draw_by_batch(drawn, names, f"{files[name][0].group.gpu}, {stem.name}", stem)
    return written


def panels(found: Iterable[Contest]) -> dict[str, list[Row]]:
    """Title -> timed rows of clipfast and its peers, of what was timed in at least two batch sizes.

    Of who was timed twice in a batch size the contest of more contestants counts, and the other adds its compilers.
    """
    points: dict[str, dict[tuple[int, str], Row]] = {}
    for group, rows in sorted(found, key=lambda contest: sum(map(markdown.is_timed, contest.rows))):
        title = f"{group.model} {markdown.tower(rows[0])}, {group.dtype}"
        for row in rows:
            # "clipfast, graphs off" and the like are in the tables
            if markdown.is_timed(row) and not row["contestant"].startswith(f"{peers.OURS},"):
                points.setdefault(title, {})[group.batch, row["contestant"]] = row
    return {title: list(rows.values()) for title, rows in sorted(points.items()) if len({b for b, _ in rows}) > 1}
