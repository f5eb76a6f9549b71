"""What every benchmark shares: the check before timing, interleaved rounds, and their summary.

A result is a list of rows, one for each contestant, and a row is a dict. Numbers are rounded to six digits when they
enter a row, so that the CSV and the printed table show the same ones.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipfast.bench.accuracy import COSINE_GAPS, cosine_gap, relative_rms
from clipfast.timing import interleaved

Row = dict[str, Any]
Function = Callable[[], Any]
# a contestant's calls, one after another: how many -> seconds of each
Turn = Callable[[int], list[float]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# how far beyond the bound for whole models a contestant may be and still count as computing the same function
SLACK = 4

TIMES = ("rounds", "median_s", "p20_s", "p80_s")
TAIL = ("p95_s", "p99_s")


class Gone(Exception):
    """What a contestant in a process of its own raised, or how that process ended, in the words of a row."""


def reason(error: BaseException) -> str:
    """An exception in one line without paths: results are published. `Gone` has such a line already."""
    if isinstance(error, Gone):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {without_paths(first)}"[:160].rstrip(": ")


def without_paths(text: str) -> str:
    """The text as it may be published."""
    return re.sub(r"(?<![\w.])(/[\w.+@-]+){2,}", "<path>", text)


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


def verdict(found: Row, dtype: torch.dtype, embeddings: int = 1) -> str:
    """Empty if the errors are those of the same function in this dtype, else what is wrong.

    embeddings: whose errors meet in one number: 2 in a logit, so that the angle may be twice as large.

    The cosine does not see a wrong length, so the relative RMS has a bound too: that of rows of the right length at
    the greatest angle allowed, 1 - cos = rel_rms ** 2 / 2.
    """
    gap = embeddings**2 * SLACK * COSINE_GAPS[dtype]
    bounds = {"cos_gap_p99": gap, "rel_rms": math.sqrt(2 * gap)}
    # not <=: NaN is wrong
    broken = [f"{name} {found[name]:.2g} > {bound:.2g}" for name, bound in bounds.items() if not found[name] <= bound]
    return ", ".join(broken)


def first(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a call returns, and the seconds that it took."""
    start = time.perf_counter()
    with torch.no_grad():
        output = function()
        # a GPU is waited for: it is read
        output.isfinite().all().item()
    return output, time.perf_counter() - start


def timed(function: Function, calls: int) -> list[float]:
    """Seconds of so many calls, one after another."""
    return interleaved({"": function}, rounds=calls, warmup=0)[""]


class Failed(Exception):
    """A contestant raised while it was timed."""

    def __init__(self, name: str, why: str):
        super().__init__(name, why)
        self.name, self.why = name, why


def time_rounds(functions: Mapping[str, Function], *arguments: Any, **settings: Any) -> dict[str, str]:
    """`time_turns` of functions in this process."""
    turns = {name: functools.partial(timed, function) for name, function in functions.items()}
    return time_turns(turns, *arguments, **settings)


def time_turns(
    turns: Mapping[str, Turn],
    rounds: int,
    seconds: dict[str, list[float]],
    *,
    tick: Callable[[int], None] = lambda rounds: None,
    warmup: int = 1,
    least: int = 1,
    together: int = 1,
    left: Callable[[], float] = lambda: math.inf,
) -> dict[str, str]:
    """Time everybody in interleaved turns; the order rotates from turn to turn.

    rounds:  calls of each.   together: of them in a turn.
    seconds: filled as turns finish, behind what it has, so that an interrupted run keeps those it has.
    tick:    called with the number of calls of each just finished.
    warmup:  untimed calls of each before the first turn.
    least, left: after `least` calls of each no more start once left(), in seconds, is 0.
    Returns: name -> why, of those that raised; the others go on without them.
    """
    turns = dict(turns)
    seconds.update({name: seconds.get(name, []) for name in turns})
    failed: dict[str, str] = {}
    done = number = 0
    while done < rounds and turns and (done < least or left() > 0):
        names = list(turns)
        order = names[number % len(names) :] + names[: number % len(names)]
        calls = min(together, rounds - done)
        try:
            if warmup:
                # nobody is timed right behind the one that it was warmed up behind
                _each(turns, order[-1:] + order[:-1], warmup)
                warmup = 0
            found = _each(turns, order, calls)
        except Failed as failure:
            failed[failure.name] = failure.why
            del turns[failure.name], seconds[failure.name]
            continue
        for name, values in found.items():
            seconds[name] += values
        done, number = done + calls, number + 1
        tick(calls)
    return failed


def _each(turns: Mapping[str, Turn], order: Iterable[str], calls: int) -> dict[str, list[float]]:
    """One turn of everybody. Raises Failed."""
    found = {}
    for name in order:
        try:
            found[name] = turns[name](calls)
        except Exception as error:
            raise Failed(name, reason(error)) from error
    return found


def times(seconds: Iterable[float]) -> Row:
    """The columns TIMES of the seconds of all rounds; empty if there are none."""
    values = [significant(value) for value in seconds]
    if not values:
        return {}
    low, high = (float(each) for each in np.quantile(values, [0.2, 0.8]))
    summary = (len(values), significant(statistics.median(values)), significant(low), significant(high))
    row = dict(zip(TIMES, summary, strict=True))
    # a percentile that so few calls cannot show is left out
    for name, share, least in (("p95_s", 0.95, 20), ("p99_s", 0.99, 100)):
        if len(values) >= least:
            row[name] = significant(float(np.quantile(values, share)))
    return row | {"seconds": " ".join(f"{value:.6g}" for value in values)}
