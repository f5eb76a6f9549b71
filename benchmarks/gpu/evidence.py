"""What a run leaves behind: a CSV of all rows, and a JSON of everything else, both there as soon as they are known."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.plans import ROOT
from benchmarks.gpu.run import COLUMNS, State
from clipfast.bench.environment import free_name, slug
from clipfast.bench.harness import Row, without_paths
from clipfast.files import write_bytes

RESULTS = ROOT / "benchmarks" / "results"


class Evidence:
    """Of one invocation. Events of its stages are recorded, and the state of the next one follows from them."""

    def __init__(self, state: State, folder: Path | None):
        """folder: of the files, made if it is not there; None: nothing is kept.

        Raises: OSError if nothing can be written there.
        """
        self.state, self.folder = state, folder and folder.resolve()
        self.rows: list[Row] = []
        self.failures: list[str] = []  # what computes the wrong thing, in words
        self.notes: list[str] = []
        self.pasted: list[str] = []  # lines for clipfast/tuning.py
        self.stages: list[dict[str, Any]] = []
        self.proved = 0  # checks, in this run
        self.path: Path | None = None  # of the CSV
        self._file: IO[str] | None = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass

    def record(self, stage: str, kind: str, value: Any) -> None:
        """An event of a stage (run.py says which there are)."""
        if kind in ("row", "wrong", "note"):
            value = _published(value)
        if kind == "facts":
            self.state.facts = value
            self.open()
        elif kind == "row":
            self._add(value)
        elif kind == "ceiling":
            self.state.ceilings[value[0]] = value[1]
        elif kind == "wrong":
            self.fail(*value)
        elif kind == "proved":
            key, name, launches = value
            self.proved += 1
            self.state.right = [*dict.fromkeys([*self.state.right, *launches])]
            if key:
                self.state.proved[key] = name
        elif kind == "note":
            self.notes.append(f"{stage}: {value}")
        elif kind == "paste":
            self.pasted.append(value)
        else:
            raise ValueError(f"unknown event {kind!r} of {stage}")

    def fail(self, text: str, launches: Iterable[str] = ()) -> None:
        text = without_paths(text)
        self.failures.append(text)
        for each in launches:
            self.state.wrong.setdefault(each, text)

    def open(self) -> None:
        """Starts the CSV, under a name that is free."""
        if self._file is not None:
            return
        if self.folder is None:
            self._file = io.StringIO()
        else:
            self.path = free_name(self.folder, f"{slug(self.state.facts['gpu'])}-{self.state.facts['date']}")
            self.state.logs = str(self.path.with_suffix(""))
            self._file = self.path.open("w", newline="")
        csv.DictWriter(self._file, COLUMNS, lineterminator="\n").writeheader()

    def _add(self, row: Row) -> None:
        if self._file is None:
            raise RuntimeError("a row came before the facts of the machine")
        shared = {name: self.state.facts[name] for name in ("date", "commit", "gpu", "torch", "triton")}
        full = {**shared, **row}
        self.rows.append(full)
        if row.get("status") == "missing" and row["contestant"] not in self.state.absent:
            self.state.absent.append(row["contestant"])
        csv.DictWriter(self._file, COLUMNS, restval="", extrasaction="raise", lineterminator="\n").writerow(full)
        self._file.flush()

    def ended(self, stage: str, outcome: str, seconds: float, at_most: float) -> None:
        """A stage is over: the JSON has it at once."""
        times = {"seconds": round(seconds, 1), "at_most": round(at_most, 1)}
        self.stages.append({"stage": stage, "outcome": without_paths(outcome), **times})
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        state = self.state
        found = {**state.facts, "ceilings": state.ceilings, "stages": self.stages}
        found |= {"failures": self.failures, "notes": self.notes, "tuning": self.pasted}
        found |= {"wrong": state.wrong, "proved": state.proved}
        write_bytes(self.path.with_suffix(".json"), (json.dumps(found, indent=1) + "\n").encode())


def _published(value: Any) -> Any:
    """The same without paths, which libraries name."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, dict):
        return {name: _published(each) for name, each in value.items()}
    return [*map(_published, value)] if isinstance(value, list) else value


def proved_before(folders: Iterable[Path]) -> dict[str, str]:
    """Key -> name of every check that the JSON files of these folders have found right."""
    found: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.glob("*.json")):
            try:
                found |= json.loads(path.read_text()).get("proved", {})
            except (OSError, ValueError, AttributeError, TypeError):
                continue  # another program's file
    return found
