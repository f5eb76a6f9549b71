"""One group: everybody prepared, checked against float64, and those that are right timed in interleaved rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from clipfast.architectures import ARCHITECTURES
from clipfast.bench import environment, harness
from clipfast.bench.accuracy import COSINE_GAPS, cosine_gap
from clipfast.bench.harness import Function, Row
from clipfast.bench.plan import FEW, Group

# of a contestant that computes something else on purpose: beyond this it is not an approximation but wrong
ROUGHEST_GAP = 0.1
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate", "bad allocation", "bad_alloc")


# memory of activations, as copies of the widest tensor of a block
ACTIVATIONS = 8


class Entry(NamedTuple):
    """A contestant: whose it is, and whether it is an approximation on purpose."""

    peer: str
    call: Function
    approximate: bool = False


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
    return _failed(harness.reason(error), isinstance(error, MemoryError | torch.OutOfMemoryError))


def _failed(why: str, memory: bool = False) -> Row:
    memory = memory or any(part in why.lower() for part in OUT_OF_MEMORY)
    return {"status": "out of memory" if memory else "failed", "note": why}


def check(
    entries: Mapping[str, Entry],
    truth: Truth,
    batch: int,
    dtype: torch.dtype,
    rows: dict[str, Row],
    seen: Callable[[str, float], None] = lambda name, seconds: None,
) -> dict[str, Function]:
    """Call everybody once, and compare with float64 on samples and with the first who was right on every row.

    rows: gets everybody's errors and status.   seen: called with each one's name and the seconds of this first call.
    Returns: the calls of those that may be timed.
    """
    accepted: dict[str, Function] = {}
    first: tuple[str, Tensor] | None = None
    for name, entry in entries.items():
        start = time.perf_counter()
        try:
            output = entry.call()
            if output.shape != (batch, truth.width) or not output.isfinite().all():
                rows[name] = {"status": "WRONG", "note": f"shape {list(output.shape)}, or NaN or infinity in it"}
                continue
            took = time.perf_counter() - start  # a GPU has been waited for: what is finite was read
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
            accepted[name] = entry.call
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
    accepted: Mapping[str, Function],
    rows: dict[str, Row],
    rounds: int,
    *,
    tick: Callable[[int], None] = lambda rounds: None,
    least: int = 1,
    left: Callable[[], float] = lambda: math.inf,
    checked: Mapping[str, float] | None = None,
    approximate: frozenset[str] = frozenset(),
) -> None:
    """Interleaved rounds of those that are right; rows get times as they are found, also when somebody interrupts.

    checked:     seconds of the check, where calls take so long that it is the first round; who compiled in it is not
                 there, and is called once more. None: the check does not count, and nor does a round of warm-up.
    approximate: names whose status says so.
    """
    seconds: dict[str, list[float]] = {}

    def measure(functions: Mapping[str, Function], rounds: int, least: int) -> None:
        failed = harness.time_rounds(
            functions, rounds, seconds, tick=tick, least=least, left=left, warmup=1 if checked is None else 0
        )
        for name, why in failed.items():
            rows[name] |= _failed(why)

    try:
        if checked is None:
            measure(accepted, rounds, least)
        else:
            seconds |= {name: [checked[name]] for name in accepted if name in checked}
            measure({name: call for name, call in accepted.items() if name not in checked}, 1, 1)
            able = {name: call for name, call in accepted.items() if name in seconds}
            measure(able, rounds - 1, least - 1)
    finally:
        for name, values in seconds.items():
            done = "approximate" if name in approximate else "ok"
            rows[name] |= {"status": done if values else "untimed", **harness.times(values)}
            if 0 < len(values) < FEW:
                rows[name]["warning"] = "only 1 round" if len(values) == 1 else f"only {len(values)} rounds"
