"""What every benchmark shares: environment, check before timing, interleaved rounds, CSV, table, progress.

A result is a list of rows, one for each contestant, and a row is a dict. Numbers are rounded to six digits when they
enter a row, so that the CSV and the printed table show the same ones.
"""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import clipfast
from clipfast.timing import interleaved
from tests.accuracy import COSINE_GAPS, cosine_gap, relative_rms

Row = dict[str, Any]
Function = Callable[[], Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# how far beyond the bound for whole models a contestant may be and still count as computing the same function
SLACK = 4

ENVIRONMENT = ("date", "clipfast", "commit", "python", "torch", "cpu", "capability", "threads", "load")
TIMES = ("rounds", "median_s", "p20_s", "p80_s")


def environment() -> Row:
    """Where and with what a result was measured, and how busy it was. No host name, no user, no path."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "clipfast": clipfast.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "",
    }


def warn_if_busy(facts: Row) -> None:
    """Say so on stderr if something else is running: two thread pools on one core wait for each other."""
    if facts["load"] != "" and facts["load"] > 0.5:
        print(f"warning: load average {facts['load']:g} before the start; time on a quiet machine", file=sys.stderr)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, "+" behind it if tracked files differ; empty outside a checkout."""

    def git(*arguments: str) -> str:
        # no optional locks: a benchmark must not touch the index
        command = ["git", "--no-optional-locks", *arguments]
        here = Path(__file__).resolve().parent
        return subprocess.run(command, cwd=here, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return ""


def reason(error: BaseException) -> str:
    """An exception in one line without paths: results are published."""
    first = (str(error).strip().splitlines() or [""])[0]
    first = re.sub(r"(?<![\w.])(/[\w.+@-]+){2,}", "<path>", first)
    return f"{type(error).__name__}: {first}"[:160].rstrip(": ")


def significant(value: float) -> float:
    """Rounded to six digits."""
    return float(f"{value:.6g}")


# ---------------------------------------------------------------------------------------------------------------------
# Check, then time


def errors(output: Tensor, exact: Tensor) -> Row:
    """Distances of [n, E] from the float64 answer.

    Returns: cos_gap_p99, 99th percentile over rows of 1 - cos (of fewer than 100 the worst); rel_rms, RMS of the
             difference over RMS of the answer; rel_max, the same of the greatest absolute values.
    """
    difference = (output.double() - exact).abs().max() / exact.abs().max()
    gap = torch.quantile(cosine_gap(output, exact), 0.99, interpolation="higher")
    rows = {"cos_gap_p99": gap.item(), "rel_rms": relative_rms(output, exact), "rel_max": difference.item()}
    return {name: significant(value) for name, value in rows.items()}


def verdict(found: Row, dtype: torch.dtype) -> str:
    """Empty if the errors are those of the same function in this dtype, else what is wrong.

    The cosine does not see a wrong length, so the relative RMS has a bound too: that of rows of the right length at
    the greatest angle allowed, 1 - cos = rel_rms ** 2 / 2.
    """
    gap = SLACK * COSINE_GAPS[dtype]
    bounds = {"cos_gap_p99": gap, "rel_rms": math.sqrt(2 * gap)}
    # not <=: NaN is wrong
    broken = [f"{name} {found[name]:.2g} > {bound:.2g}" for name, bound in bounds.items() if not found[name] <= bound]
    return ", ".join(broken)


class Failed(Exception):
    """A contestant raised while it was timed."""

    def __init__(self, name: str, why: str):
        super().__init__(name, why)
        self.name, self.why = name, why


def _named(name: str, function: Function) -> Function:
    def call() -> Any:
        try:
            return function()
        except Exception as error:
            raise Failed(name, reason(error)) from error

    return call


def time_rounds(
    functions: Mapping[str, Function],
    rounds: int,
    seconds: dict[str, list[float]],
    *,
    tick: Callable[[int], None] = lambda rounds: None,
) -> dict[str, str]:
    """Time every function in interleaved rounds, a full rotation of the order at a time.

    seconds: filled as rotations finish, so that an interrupted run keeps those it has.
    tick:    called with the number of rounds just finished.
    Returns: name -> why, of functions that raised; the others go on without them.
    """
    functions = {name: _named(name, function) for name, function in functions.items()}
    seconds.update({name: [] for name in functions})
    failed: dict[str, str] = {}
    done = 0
    while done < rounds and functions:
        some = min(len(functions), rounds - done)
        try:
            found = interleaved(functions, rounds=some, warmup=0 if done else 1)
        except Failed as failure:
            failed[failure.name] = failure.why
            del functions[failure.name], seconds[failure.name]
            continue
        for name, times in found.items():
            seconds[name] += times
        done += some
        tick(some)
    return failed


def times(seconds: Iterable[float]) -> Row:
    """The columns TIMES of the seconds of all rounds; empty if there are none."""
    values = [significant(value) for value in seconds]
    if not values:
        return {}
    low, high = np.quantile(values, [0.2, 0.8])
    summary = (len(values), significant(statistics.median(values)), significant(low), significant(high))
    return dict(zip(TIMES, summary, strict=True)) | {"seconds": " ".join(f"{value:.6g}" for value in values)}


# ---------------------------------------------------------------------------------------------------------------------
# Output


def write_csv(path: Path | None, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Replace the file by these rows; columns that a row lacks stay empty. Nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="raise", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def print_table(
    title: str, header: Sequence[str], lines: Iterable[Sequence[str]], notes: Iterable[str] = (), names: int = 1
) -> None:
    """Title, columns (the first `names` of them to the left, numbers to the right), notes below."""
    cells = [list(header), *map(list, lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    print(f"\n{title}")
    for line in cells:
        pairs = enumerate(zip(line, widths, strict=True))
        print("  ".join(text.ljust(width) if i < names else text.rjust(width) for i, (text, width) in pairs).rstrip())
    for note in notes:
        print(f"  {note}")
    sys.stdout.flush()


def cell(row: Row, column: str, form: str, scale: float = 1) -> str:
    """A number of a row for the table; a dash where there is none."""
    value = row.get(column, "")
    return "-" if value == "" else format(value * scale, form)


class Progress:
    """One line on stderr: what runs now, and about how long the rest takes."""

    def __init__(self, rounds: int):
        self._rounds, self._done, self._start = rounds, 0, time.monotonic()
        self._label = ""
        self._terminal = sys.stderr.isatty()

    def say(self, label: str) -> None:
        self._label = label
        left = ""
        if self._done:
            rest = (time.monotonic() - self._start) / self._done * (self._rounds - self._done)
            left = f", about {rest / 60:.0f} min left" if rest >= 90 else f", about {rest:.0f} s left"
        text = f"[{self._done}/{self._rounds} rounds] {label}{left}"
        print(f"\r\033[K{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def tick(self, rounds: int) -> None:
        self._done += rounds
        self.say(self._label)

    def skip_to(self, rounds: int) -> None:
        """This many rounds are behind us, timed or not."""
        self._done = rounds

    def clear(self) -> None:
        """Take the line away, before a table is printed."""
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
