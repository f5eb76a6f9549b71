"""Towers and train steps of whole models: ours against openai/CLIP, open_clip, transformers and compilers.

A stage is a process. An error ends one contestant or one group; one after which no CUDA call works ends the process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import groups as grouped
from benchmarks.gpu import launch_ids, machine, tower_contestants
from benchmarks.gpu.groups import COMPILED, TRAIN, Group
from benchmarks.gpu.run import Run, rates, ratios
from benchmarks.gpu.tower_contestants import OPENAI, OURS, Field
from clipfast import roofline
from clipfast.bench import contest, harness, peers, training, workload
from clipfast.bench.budget import Budget
from clipfast.bench.harness import Row
from clipfast.bench.peers import openclip

# kept of a stage with compilers, to time those that are compiled
TIMED_SECONDS = 10.0
TRAINED = (OURS, OPENAI, openclip.NAME)


def stage(run: Run, budget: Budget) -> None:
    """All that needs no compiler, and then what takes longer, as far as time goes."""
    _measure(run, grouped.tiny() if run.dry else grouped.plan() + grouped.more(), budget)


def compiled(run: Run, budget: Budget, groups: Sequence[Group]) -> None:
    """Ours, openai/CLIP eager and compiled, in the same rounds.   groups: one of COMPILED."""
    if run.dry:
        run.note("dry run: torch.compile is left out")
        towers = {group.tower for group in groups}
        groups = [group._replace(compiled=True) for group in grouped.tiny()[:2] if group.tower in towers]
    _measure(run, groups, budget)


compiled_image = functools.partial(compiled, groups=COMPILED["compiled-image"])
compiled_text = functools.partial(compiled, groups=COMPILED["compiled-text"])
compiled_l14 = functools.partial(compiled, groups=COMPILED["compiled-l14"])


def train(run: Run, budget: Budget) -> None:
    """Forward, contrastive loss, backward and fused AdamW under autocast."""
    _measure(run, [TRAIN._replace(model="tiny", batch=5)] if run.dry else [TRAIN], budget)


def _measure(run: Run, groups: Sequence[Group], budget: Budget) -> None:
    """One group after the other; the first is always tried, the others if they are expected to end in time."""
    planned, late = 0.0, []
    instead = launch_ids.fall_back(run)
    for (model, dtype), same in itertools.groupby(groups, key=lambda group: (group.model, group.dtype)):
        field: Field | None = None
        for group in same:
            expected = grouped.estimate(group) + (0 if field else grouped.building(model))
            # as fast or slow as this machine was so far
            pace = budget.spent() / (grouped.STARTING + planned) if planned else 0.0
            if not run.dry and not budget.allows(pace * expected):
                late.append(group.title())
                continue
            planned += expected
            run.doing(group.title())
            try:
                field = field or Field(run, model, dtype, instead)
                rows = compare(run, group, field, budget)
            except Exception as error:
                run.note(f"{group.title()} failed: {harness.reason(error)}")
                machine.raise_if_lost(run.device)
            else:
                run.say(line(group, rows, dry=run.dry))
            _free(run.device)
        field = None
        _free(run.device)
    if late:
        run.note(f"out of time before {len(late)} of {len(groups)}: {'; '.join(late)}")


def _free(device: torch.device) -> None:
    if device.type != "cuda":
        return
    gc.collect()
    try:
        torch.cuda.empty_cache()
    except Exception:
        machine.raise_if_lost(device)


# ---------------------------------------------------------------------------------------------------------------------
# One group


def compare(run: Run, group: Group, field: Field, budget: Budget) -> dict[str, Row]:
    """Check everybody against float64, time those that are right, and write one row for each, whatever happens."""
    rows: dict[str, Row] = {}
    try:
        batch = field.batch(group)
        with _ends_in(budget.left() - TIMED_SECONDS if group.compiled else None):
            accepted = (_trainers if group.tower == "train" else _encoders)(run, group, field, batch, rows)
        time_accepted(run, group, accepted, rows, budget)
        works = _works(group, field.architecture, batch.text)
        for row in rows.values():
            if works and "median_s" in row:
                row |= rates(run, works, group.dtype_name, row["median_s"])
        ratios(rows, OPENAI if OPENAI in accepted else peers.TRANSFORMERS[group.tower], OURS)
    finally:
        for what in field.instead():
            run.note(f"{group.title()}: {what}")
            for name in [name for name in rows if name.startswith(OURS)]:
                rows[name]["note"] = "; ".join(filter(None, [rows[name].get("note"), what]))
        shared = {"operator": group.operator, "model": group.model, "batch": group.batch, "captions": group.about}
        for name, row in rows.items():
            if row["status"] == "ok" and "median_s" not in row:
                row["note"] = "not timed: somebody else ended the group"
            run.add({**shared, "dtype": group.dtype_name, "contestant": name, **row})
    return rows


@contextlib.contextmanager
def _ends_in(seconds: float | None) -> Iterator[None]:
    """Inside, TimeoutError once the time is up: a compiler knows no end, and would take the others' times with it."""
    if seconds is None:
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError("out of time")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _rank(name: str) -> int:
    """Who is checked first: those that the others' rows are compared with; then ours; a compiler may find no end."""
    return 2 if name.endswith((" torch.compile", " TensorRT")) else 1 if name.startswith(OURS) else 0


def _encoders(
    run: Run, group: Group, field: Field, batch: peers.Batch, rows: dict[str, Row]
) -> dict[str, harness.Function]:
    chosen = workload.checked_samples(group.batch).to(run.device)
    with torch.no_grad():
        data = batch.images if group.tower == "image" else batch.text
        exact = workload.exact(group.tower, field.spec.weights, data[chosen], group.dtype)
    if group.compiled:
        torch.compiler.reset()
    accepted = check(run, group, field.calls(tower_contestants.builders(run, group), group, batch, rows), exact, rows)
    if OURS not in accepted:
        others = {name: build for name, build in tower_contestants.variants().items() if name not in rows}
        accepted |= check(run, group, field.calls(others, group, batch, rows), exact, rows)
    return accepted


def check(
    run: Run, group: Group, calls: Mapping[str, harness.Function], exact: Tensor, rows: dict[str, Row]
) -> dict[str, harness.Function]:
    """Those that compute the right thing; rows gets everybody's errors, or why there are none.

    Samples are compared with float64, every row with that of the first who was right: the others' before ours.
    """
    chosen, accepted = workload.checked_samples(group.batch), set()
    first: tuple[str, Tensor] | None = None
    for name in sorted(calls, key=_rank):
        start = time.perf_counter()
        try:
            output = calls[name]()
            took = time.perf_counter() - start
            for _ in range(grouped.COMPILER_WARMUP if group.compiled else 0):
                output = calls[name]()  # what is checked is what is timed: a replay of its graph
            if output.shape != (group.batch, exact.shape[1]) or not output.isfinite().all():
                found, wrong = {}, f"shape {list(output.shape)}, or NaN or infinity in it"
            else:
                found = harness.errors(output[chosen.to(output.device)], exact)
                wrong = harness.verdict(found, group.dtype)
                if not wrong and first is not None:
                    wrong = contest.differs(output, first, group.dtype, 1)
        except Exception as error:
            tower_contestants.failed(run, group, name, harness.reason(error), rows)
            machine.raise_if_lost(run.device)
            continue
        if group.compiled and took > 5:
            run.note(f"{group.title()}: the first call of {name} took {took:.0f} s")
        found.pop("rel_max", None)
        judge(run, group, name, found, wrong, rows)
        if not wrong:
            accepted.add(name)
            first = first or (name, output.float())
    for name in calls:
        rows[name] = rows.pop(name)
    return {name: call for name, call in calls.items() if name in accepted}


def judge(run: Run, group: Group, name: str, found: Row, wrong: str, rows: dict[str, Row]) -> None:
    rows[name] = {"status": "WRONG", "note": wrong, **found} if wrong else {"status": "ok", **found}
    if wrong and name.startswith(OURS):
        run.fail(f"{group.title()}: {name}: {wrong}")


def _trainers(
    run: Run, group: Group, field: Field, batch: peers.Batch, rows: dict[str, Row]
) -> dict[str, harness.Function]:
    """Steps of those whose gradients are right on a few pairs."""
    found, missing = training.trainers(field.spec, TRAINED)
    for name, why in missing.items():
        if why.startswith("not run: "):
            tower_contestants.failed(run, group, name, why, rows)
            machine.raise_if_lost(run.device)
        else:
            tower_contestants.absent(run, name, why, rows)
    small = peers.Batch(*(data[: training.SMALL] for data in batch))
    loss, exact = training.exact_gradients(field.spec.weights, small)
    accepted: dict[str, harness.Function] = {}
    for name, trainer in found.items():
        try:
            errors, wrong = training.errors(trainer, small, loss, exact)
        except Exception as error:
            tower_contestants.failed(run, group, name, harness.reason(error), rows)
            machine.raise_if_lost(run.device)
            continue
        judge(run, group, name, errors, wrong, rows)
        if not wrong:
            accepted[name] = functools.partial(trainer.step, batch)
    return accepted


def time_accepted(
    run: Run, group: Group, accepted: Mapping[str, harness.Function], rows: dict[str, Row], budget: Budget
) -> None:
    """Interleaved rounds; what was timed before the GPU was lost is kept."""
    seconds: dict[str, list[float]] = {name: [] for name in accepted}
    rounds = budget.part(grouped.ROUNDS_SECONDS)
    try:
        out = harness.time_rounds(
            accepted,
            group.rounds,
            dict(seconds),
            warmup=group.warmup,
            least=grouped.LEAST_ROUNDS,
            left=rounds.left,
        )
        for name, why in out.items():
            del seconds[name]
            tower_contestants.failed(run, group, name, why, rows)
            # of the first only: with the GPU lost all others fail after it
            machine.raise_if_lost(run.device)
    finally:
        for name, values in seconds.items():
            rows[name] |= {"how": "wall", **harness.times(values)} if values else {}


def _works(group: Group, architecture: dict, text: Tensor) -> list[roofline.Work]:
    if group.tower == "image":
        return roofline.image_tower(architecture, group.batch, group.dtype.itemsize)
    if group.tower == "text":
        return roofline.text_tower(architecture, (text.argmax(dim=-1) + 1).tolist(), group.dtype.itemsize)
    return []  # the least work of a train step is not counted


def line(group: Group, rows: Mapping[str, Row], *, dry: bool = False) -> str:
    """A group in one line: of a long run only the end of the output may come back.   dry: without figures."""
    parts = []
    for name, row in rows.items():
        if dry:
            parts.append(f"{name} {row['status']}")
            continue
        if "median_s" not in row:
            parts += [] if row["status"] == "missing" else [f"{name} {row['status']}"]
            continue
        ratio = f" ({row['ours_is_faster']:.2f}x)" if "ours_is_faster" in row and name != OURS else ""
        floor = f" ({row['of_floor']:.0%} of the floor's speed)" if "of_floor" in row and name == OURS else ""
        parts.append(f"{name} {row['median_s'] * 1e3:.4g} ms{ratio or floor}")
    return f"{group.title()}: {'; '.join(parts)}"
