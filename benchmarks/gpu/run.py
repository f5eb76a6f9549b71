"""What a stage needs to know, and where what it finds goes: all of it as events, to the process that started it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipfast import roofline
from clipfast.bench import harness
from clipfast.bench.harness import Row, significant

DRY = "dry run: no figure below means anything"

# stage: what it was measured in; "ceilings" rows hold what the machine gives at best.
# operator: or encode_image, encode_text, train_step.
# status: ok; part: does less than the operator; WRONG: computes something else, not timed; failed: raised;
#   missing: not installed.
# how: "graph": captured in a CUDA graph and replayed; "calls (why)": launched one by one; "wall": host clock
#   around a synchronised call, for towers.
# median_s, p20_s, p80_s, seconds: of one call, over `rounds` interleaved rounds.
# gb_per_s, tflops: the fewest bytes and operations (clipfast/roofline.py) over the median.   floor_s: their time at the
#   measured ceilings, launch by launch; of_floor: floor_s / median_s.
# vs_eager: times as fast as eager PyTorch (towers: openai/CLIP, where it is not installed transformers).
# ours_is_faster: how many times as fast as this contestant clipfast is.
# rel_rms, cos_gap_p99: errors against float64, of samples.   note: why there is no time, or what of ours PyTorch ran.
COLUMNS = (
    *("date", "commit", "gpu", "torch", "triton", "stage", "operator", "model", "shape", "batch", "captions", "dtype"),
    *("contestant", "status", "how", *harness.TIMES, *harness.TAIL, "gb_per_s", "tflops", "floor_s", "of_floor"),
    *("vs_eager", "ours_is_faster", "rel_rms", "cos_gap_p99", "note", "seconds"),
)


@dataclass
class State:
    """What the stages before have found, and how this one runs. All of it can be written as JSON."""

    dry: bool = False
    built: bool = False  # csrc is built already, from these sources
    facts: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)  # "copy" in bytes/s, dtypes in FLOP/s
    wrong: dict[str, str] = field(default_factory=dict)  # a launch's id (launch_ids.py) -> what it gets wrong
    proved: dict[str, str] = field(default_factory=dict)  # a check's key -> its name, found right now or before
    right: list[str] = field(default_factory=list)  # ids of launches in the checks that passed in this run
    tried: list[str] = field(default_factory=list)  # checks of this stage that are over: not again
    logs: str | None = None  # path and beginning of the name of files beside the CSV; none where nothing is kept
    part: int = 0  # of the stage, where several processes share it
    parts: int = 1
    absent: list[str] = field(default_factory=list)  # contestants that some row has said to be missing


Emit = Callable[[str, Any], None]  # (kind of event, value)


class Run:
    """One stage in its process."""

    def __init__(self, stage: str, state: State, device: torch.device, emit: Emit):
        self.stage, self.state, self.device = stage, state, device
        self.facts, self.ceilings, self.dry = state.facts, state.ceilings, state.dry
        self.rows: list[Row] = []  # of this stage
        self.wrong = dict(state.wrong)
        self._right = set(state.right)
        self._emit, self._lock = emit, threading.Lock()

    def emit(self, kind: str, value: Any) -> None:
        with self._lock:
            self._emit(kind, value)

    def file(self, kind: str) -> Path | None:
        """A path beside the CSV for a log; none where nothing is kept."""
        return None if self.state.logs is None else Path(f"{self.state.logs}-{kind}")

    def add(self, row: Row) -> None:
        """A row of the CSV, which has it at once: a run that is cut off keeps what it measured."""
        full = {"stage": self.stage, **row}
        unknown = set(full) - set(COLUMNS)
        if unknown:
            raise ValueError(f"no such columns: {', '.join(sorted(unknown))}")
        self.rows.append(full)
        self.emit("row", full)

    def ceiling(self, name: str, value: float) -> None:
        self.ceilings[name] = value
        self.emit("ceiling", [name, value])

    def fail(self, text: str, launches: Iterable[str] = ()) -> None:
        """Something computes the wrong thing.

        launches: ids of what it launched. Those that no passed check launched too are not made again where clipfast is
                  timed; all of them, if each has passed elsewhere.
        """
        suspects = list(launches)
        suspects = [each for each in suspects if each not in self._right] or suspects
        self.wrong.update((each, self.wrong.get(each, text)) for each in suspects)
        self.emit("wrong", [text, suspects])

    def prove(self, key: str, name: str, launches: Iterable[str]) -> None:
        """A check passed.   key: what it depends on; empty if that is not known."""
        ids = list(launches)
        self._right.update(ids)
        self.emit("proved", [key, name, ids])

    def doing(self, what: str, launches: Iterable[str] = ()) -> None:
        """What is blamed should the process die now."""
        self.emit("doing", [what, list(launches)])

    def note(self, text: str) -> None:
        """A line that the report repeats at its end."""
        self.emit("note", text)

    def paste(self, line: str) -> None:
        """A line for clipfast/tuning.py."""
        self.emit("paste", line)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(text, flush=True)


def rates(run: Run, works: list[roofline.Work], dtype: str, median: float) -> Row:
    """GB/s, TFLOP/s, and how much of the floor's speed this time has."""
    work = roofline.total(works)
    row = {"gb_per_s": significant(work.bytes / median / 1e9), "tflops": significant(work.flops / median / 1e12)}
    if {"copy", dtype} <= set(run.ceilings):
        floor = roofline.seconds(works, run.ceilings[dtype], run.ceilings["copy"])
        row |= {"floor_s": significant(floor), "of_floor": significant(floor / median)}
    return row


def ratios(rows: Mapping[str, Row], eager: str | None, ours: str) -> None:
    """vs_eager: times as fast as eager.   ours_is_faster: how many times as fast as this one ours is."""
    for row in rows.values():
        if "median_s" not in row:
            continue
        if eager and "median_s" in rows.get(eager, {}):
            row["vs_eager"] = significant(rows[eager]["median_s"] / row["median_s"])
        if "median_s" in rows.get(ours, {}):
            row["ours_is_faster"] = significant(row["median_s"] / rows[ours]["median_s"])
