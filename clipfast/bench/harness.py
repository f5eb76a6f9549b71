"""What every benchmark shares: the check before timing, interleaved rounds, and their summary.

A result is a list of rows, one for each contestant, and a row is a dict. Numbers are rounded to six digits when they
enter a row, so that the CSV and the printed table show the same ones.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipfast.bench.accuracy import COSINE_GAPS, cosine_gap, relative_rms
from clipfast.timing import interleaved

Row = dict[str, Any]
Function = Callable[[], Any]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# how far beyond the bound for whole models a contestant may be and still count as computing the same function
SLACK = 4

TIMES = ("rounds", "median_s", "p20_s", "p80_s")
TAIL = ("p95_s", "p99_s")


def reason(error: BaseException) -> str:
    """An exception in one line without paths: results are published."""
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
    warmup: int = 1,
    least: int = 1,
    left: Callable[[], float] = lambda: math.inf,
) -> dict[str, str]:
    """Time every function in interleaved rounds; the order rotates from round to round.

    seconds: filled as rounds finish, behind what it has, so that an interrupted run keeps those it has.
    tick:    called with the number of rounds just finished.
    warmup:  untimed rounds before the first.
    least, left: after `least` rounds no more start once left(), in seconds, is 0.
    Returns: name -> why, of functions that raised; the others go on without them.
    """
    functions = {name: _named(name, function) for name, function in functions.items()}
    seconds.update({name: seconds.get(name, []) for name in functions})
    failed: dict[str, str] = {}
    done = 0
    while done < rounds and functions and (done < least or left() > 0):
        names = list(functions)
        first = done % len(names)
        turn = {name: functions[name] for name in names[first:] + names[:first]}
        try:
            found = interleaved(turn, rounds=1, warmup=0 if done else warmup)
        except Failed as failure:
            failed[failure.name] = failure.why
            del functions[failure.name], seconds[failure.name]
            continue
        for name, times in found.items():
            seconds[name] += times
        done += 1
        tick(1)
    return failed


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
