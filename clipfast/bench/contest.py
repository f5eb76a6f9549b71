"""One group: everybody prepared, checked against float64, and those that are right timed in interleaved rounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import environment, harness
from clipfast.bench.accuracy import COSINE_GAPS, cosine_gap
from clipfast.bench.harness import Row, Turn
from clipfast.bench.plan import FEW, Group

# of a contestant that computes something else on purpose: beyond this it is not an approximation but wrong
ROUGHEST_GAP = 0.1
OUT_OF_MEMORY = ("memoryerror", "out of memory", "not enough memory", "can't allocate", "bad allocation", "bad_alloc")


# memory of activations, as copies of the widest tensor of a block
ACTIVATIONS = 8


class Entry(NamedTuple):
    """A contestant.

    peer:        whose it is.
    first:       its first call: what that returns, and seconds.
    turn:        more calls.
    approximate: it is one on purpose.
    """

    peer: str
    first: Callable[[], tuple[Tensor, float]]
    turn: Turn
    approximate: bool = False

    @staticmethod
    def here(peer: str, function: Callable[[], Tensor], approximate: bool = False) -> Entry:
        """Of a function in this process."""
        return Entry(
            peer, functools.partial(harness.first, function), functools.partial(harness.timed, function), approximate
        )


class Truth(NamedTuple):
    """The float64 answer for the rows `chosen` of the output.

    columns: of the logits ("both") the same samples again; None of embeddings, which are compared whole.
    """

    exact: Tensor
    chosen: Tensor
    width: int
    columns: Tensor | None = None

    @property
    def embeddings(self) -> int:
        """Whose errors meet in one number of the output."""
        return 1 if self.columns is None else 2

    def of(self, output: Tensor) -> Tensor:
        """These rows of an output on any device, on the CPU as `exact` is."""
        rows = output[self.chosen.to(output.device)].cpu()
        return rows if self.columns is None else rows[:, self.columns]


def too_large(group: Group, device: torch.device) -> str:
    """Why this batch cannot be tried, empty if it can: the kernel would end the whole run, not refuse the memory."""
    sizes = ARCHITECTURES[group.model]
    side, width = sizes["image_resolution"], sizes["vision_width"]
    patches = (side // (sizes["vision_patch_size"] or 4)) ** 2
    elements = 2 * 3 * side**2 + ACTIVATIONS * (patches + 1) * width
    needed = 4 * group.batch * elements * (3 if group.tower == "train" else 1)
    available = environment.available_bytes(device)
    if needed <= available:
        return ""
    return f"batch {group.batch} takes about {needed / 2**30:.0f} GiB; {available / 2**30:.0f} GiB are free"


def failure(error: BaseException) -> Row:
    """The row of somebody who raised: out of memory is told apart from everything else."""
    return _failed(harness.reason(error))


def _failed(why: str) -> Row:
    memory = any(part in why.lower() for part in OUT_OF_MEMORY)
    return {"status": "out of memory" if memory else "failed", "note": why}


def check(
    entries: Mapping[str, Entry],
    truth: Truth,
    batch: int,
    dtype: torch.dtype,
    rows: dict[str, Row],
    seen: Callable[[str, float], None] = lambda name, seconds: None,
) -> dict[str, Turn]:
    """Call everybody once, and compare with float64 on samples and with the first who was right on every row.

    rows: gets everybody's errors and status.   seen: called with each one's name and the seconds of this first call.
    Returns: those that may be timed.
    """
    accepted: dict[str, Turn] = {}
    first: tuple[str, Tensor] | None = None
    for name, entry in entries.items():
        try:
            output, took = entry.first()
            if output.shape != (batch, truth.width) or not output.isfinite().all():
                rows[name] = {"status": "WRONG", "note": f"shape {list(output.shape)}, or NaN or infinity in it"}
                continue
            found = harness.errors(truth.of(output), truth.exact)
        except Exception as error:
            rows[name] = failure(error)
            continue
        seen(name, took)
        wrong = harness.verdict(found, dtype, truth.embeddings)
        if entry.approximate:
            wrong = "" if found["cos_gap_p99"] <= ROUGHEST_GAP else f"cos_gap_p99 > {ROUGHEST_GAP:g}"
        elif not wrong and first is not None:
            wrong = differs(output, first, dtype, truth.embeddings)
        rows[name] = {"status": "WRONG", "note": wrong, **found} if wrong else {"status": "untimed", **found}
        if not wrong:
            accepted[name] = entry.turn
            if first is None and not entry.approximate:
                first = (name, output.float())
    return accepted


def differs(output: Tensor, first: tuple[str, Tensor], dtype: torch.dtype, embeddings: int) -> str:
    """Empty, or which row is not that of the first contestant: float64 sees a few samples only."""
    # each may be SLACK from the exact answer, on opposite sides: twice the angle
    bound = 4 * embeddings**2 * harness.SLACK * COSINE_GAPS[dtype]
    gaps = cosine_gap(output, first[1])
    if len(gaps) == 1 or output.shape[1] == 1 or bool((gaps <= bound).all()):
        return ""
    return f"row {int(gaps.argmax())} is not that of {first[0]}: 1 - cos {gaps.max().item():.2g} > {bound:.2g}"


def time_accepted(
    accepted: Mapping[str, Turn],
    rows: dict[str, Row],
    rounds: int,
    *,
    together: int = 1,
    warm_up: bool = True,
    tick: Callable[[int], None] = lambda rounds: None,
    least: int = 1,
    left: Callable[[], float] = lambda: math.inf,
    checked: Mapping[str, float] | None = None,
    approximate: frozenset[str] = frozenset(),
) -> None:
    """Interleaved rounds of those that are right; rows get times as they are found, also when somebody interrupts.

    together:    calls of each in a turn.
    warm_up:     one call of each before the first round does not count; not where each turn begins with one.
    checked:     seconds of the check, where calls take so long that it is the first round; who compiled in it is not
                 there, and is called once more. None: the check does not count.
    approximate: names whose status says so.
    """
    seconds: dict[str, list[float]] = {}

    def measure(turns: Mapping[str, Turn], rounds: int, least: int) -> None:
        warmup = int(warm_up and checked is None)
        failed = harness.time_turns(
            turns, rounds, seconds, tick=tick, least=least, together=together, left=left, warmup=warmup
        )
        for name, why in failed.items():
            rows[name] |= _failed(why)

    try:
        if checked is None:
            measure(accepted, rounds, least)
        else:
            seconds |= {name: [checked[name]] for name in accepted if name in checked}
            measure({name: turn for name, turn in accepted.items() if name not in checked}, 1, 1)
            able = {name: turn for name, turn in accepted.items() if name in seconds}
            measure(able, rounds - 1, least - 1)
    finally:
        for name, values in seconds.items():
            done = "approximate" if name in approximate else "ok"
            rows[name] |= {"status": done if values else "untimed", **harness.times(values)}
            if 0 < len(values) < FEW:
                rows[name]["warning"] = "only 1 round" if len(values) == 1 else f"only {len(values)} rounds"
