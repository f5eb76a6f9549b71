"""Each operator at CLIP's shapes against everybody who offers it: checked, then timed in interleaved rounds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from benchmarks.gpu import launch_ids, machine, operator_contestants, timing
from benchmarks.gpu import problems as make
from benchmarks.gpu.groups import SHORT, WHOLE
from benchmarks.gpu.launch_ids import Condemned
from benchmarks.gpu.operator_contestants import EAGER, OURS, Contestant
from benchmarks.gpu.problems import Maker, Problem
from benchmarks.gpu.run import Run, rates, ratios
from clipfast import roofline
from clipfast.bench import harness
from clipfast.bench.budget import Budget
from clipfast.bench.harness import Row, significant
from tests.op_cases import Case

ROUNDS = 15
# what torch.compile gets of the stage's time, after everything else; each of its problems is tuned for many seconds
COMPILE_SHARE = 0.35
COMPILE_ESTIMATE = 12.0


def plan(device: torch.device, *, dry: bool = False) -> Iterator[Problem]:
    """Most important first: a run that ends early has them."""
    if dry:
        yield from _tiny(Maker(device, torch.float32))
        return
    bf16, fp16 = Maker(device, torch.bfloat16), Maker(device, torch.float16)
    models = ("ViT-B/32", "ViT-B/16", "ViT-L/14")
    for batch in (256, 1, 32):
        yield from make.of_images("ViT-B/32", batch, bf16)
        yield from make.of_texts("ViT-B/32", SHORT, batch, bf16)
        for model in models[1:]:
            yield from make.of_images(model, batch, bf16)
        yield from make.of_texts("ViT-B/32", WHOLE, batch, bf16)
        yield from make.of_texts("ViT-L/14", SHORT, batch, bf16)
        if batch == 256:
            yield from itertools.islice(make.of_images("ViT-B/32", batch, fp16), 2)
            yield from itertools.islice(make.of_images("ViT-L/14", batch, fp16), 2)
            yield make.logits("", 256, 1000, 512, bf16)
            yield make.mlp("ViT-B/32", 256 * 50, 768, batch, bf16)
            yield make.layer_norm("ViT-B/32", 256 * 50, 768, batch, bf16, residual=True)
    yield from make.of_images("ViT-L/14@336px", 256, bf16)
    yield from make.of_texts("ViT-L/14", WHOLE, 256, bf16)


def _tiny(m: Maker) -> Iterator[Problem]:
    """One of each operator, small enough for Triton's interpreter."""
    yield make.linear("tiny", 10, 32, 16, 2, m, "quick_gelu", False)
    yield make.attention("tiny", [5, 5], 1, m, causal=False)
    yield make.attention("tiny", [2, 5], 1, m, causal=True)
    yield make.layer_norm("tiny", 10, 16, 2, m)
    yield make.mlp("tiny", 4, 16, 2, m)
    yield make.attention_pool("tiny", [5, 5], 64, m)
    yield make.patch_embed("tiny", 2, (16, 16), 8, 16, m)
    yield make.project("tiny", 2, 16, 8, m)
    yield make.logits("tiny", 3, 4, 16, m)


def measure(run: Run, problem: Problem, people: list[Contestant], budget: Budget) -> dict[str, Row]:
    """Check every contestant at this very shape, time those that are right, and write one row for each."""
    rows: dict[str, Row] = {}
    with torch.no_grad():
        accepted = _accepted(run, problem, people, rows)
        prepared = _prepared(run, problem, accepted, rows)
        seconds, failed = timing.time_interleaved(prepared, 1 if run.dry else ROUNDS, run.device, budget.left)
    for name, why in failed.items():
        rows[name] |= {"status": "failed", "note": why}
        # the first only: with the GPU lost all others fail after it
        machine.raise_if_lost(run.device)
    for name, values in seconds.items():
        summary = harness.times(values)
        rows[name] |= {
            "how": prepared[name].how,
            **summary,
            **rates(run, problem.works, problem.dtype_name, summary["median_s"]),
        }
    ratios(rows, EAGER, OURS)
    shared = {name: getattr(problem, name) for name in ("operator", "model", "shape", "batch")}
    for name, row in rows.items():
        run.add({**shared, "dtype": problem.dtype_name, "contestant": name, **row})
    return rows


def _accepted(run: Run, problem: Problem, people: list[Contestant], rows: dict[str, Row]) -> list[Contestant]:
    """Those that compute the right thing here; rows says of the others why they do not take part."""
    case = problem.make()
    eager, accepted = None, []
    # eager first: the whole of everybody else's result is compared with its own
    for each in sorted(people, key=lambda each: each.name != EAGER):
        try:
            result = make.as_tuple(each.prepare(case)())[0]
            if each.part:
                rows[each.name] = {"status": "part"}
            else:
                result = result if each.pick is None else each.pick(case, result)
                what = f"{problem.title()} {each.name}"
                error = make.check(result, case, eager, strict=each.name.startswith(OURS), what=what)
                rows[each.name] = {"status": "ok", "rel_rms": significant(error)}
                eager = result if each.name == EAGER else eager
        except Condemned as error:
            rows[each.name] = {"status": "WRONG", "note": f"not timed: {error}"[:160]}
        except AssertionError as error:
            rows[each.name] = {"status": "WRONG", "note": str(error)[:160]}
            if each.name.startswith(OURS):
                run.fail(str(error)[:300], _launches(each, case, run.device))
        except Exception as error:
            rows[each.name] = {"status": "failed", "note": harness.reason(error)}
            machine.raise_if_lost(run.device)
            if each.name == OURS:
                run.fail(f"{problem.title()}: {harness.reason(error)}", _launches(each, case, run.device))
        else:
            accepted.append(each)
    return accepted


def _launches(each: Contestant, case: Case, device: torch.device) -> list[str]:
    """Ids of what a contestant launches, to blame."""
    return launch_ids.ids_of(each.prepare(case), device)


def _prepared(
    run: Run, problem: Problem, accepted: list[Contestant], rows: dict[str, Row]
) -> dict[str, timing.Prepared]:
    cache = 0 if run.dry else run.facts["l2_bytes"]
    sets = timing.input_sets(roofline.total(problem.works).bytes, cache)
    floor = 1.0 if run.dry else roofline.seconds(problem.works, 1e15, 5e12)  # roughly, for the length of a replay
    repeats = timing.n_calls(sets, floor) // sets
    cases = [problem.make() for _ in range(sets)]
    prepared = {}
    for each in accepted:
        try:
            prepared[each.name] = timing.prepare([each.prepare(case) for case in cases], repeats, run.device)
        except Exception as error:
            rows[each.name] |= {"status": "failed", "note": harness.reason(error)}
            machine.raise_if_lost(run.device)
    return prepared


def line(problem: Problem, rows: dict[str, Row]) -> str:
    """One line of progress: ours, and the fastest of the others that do the same."""
    ours = rows[OURS]
    if "median_s" not in ours:
        return f"{problem.title()}: clipfast {ours['status']}: {ours.get('note', '')}"
    others = {n: r["median_s"] for n, r in rows.items() if n != OURS and r["status"] == "ok" and "median_s" in r}
    best = min(others, key=others.__getitem__, default=None)
    text = f"{problem.title()}: {ours['median_s'] * 1e6:.4g} us"
    if "of_floor" in ours:
        text += f", {ours['of_floor']:.0%} of the floor's speed, {ours['gb_per_s']:.0f} GB/s"
    return text + (f"; {best} {others[best] * 1e6:.4g} us" if best else "")


def stage(run: Run, budget: Budget) -> None:
    """Everybody at every shape; then torch.compile at the first shapes of the plan, as far as time allows."""
    launch_ids.forbid(run.wrong)
    everything = budget.part(budget.left() * (1 - COMPILE_SHARE))
    done: list[Problem] = []
    for problem in plan(run.device, dry=run.dry):
        if not everything.allows(1.0):
            run.note(f"out of time before {problem.title()}")
            break
        run.doing(problem.title())
        rows = measure(run, problem, operator_contestants.of(problem.operator), everything)
        run.say(f"operator {problem.operator}: {rows[OURS]['status']}" if run.dry else line(problem, rows))
        done.append(problem)
    if run.dry:
        run.note("dry run: torch.compile is left out")
        return
    for problem in done:
        if problem.batch == 32:
            continue
        if not budget.allows(COMPILE_ESTIMATE):
            run.note(f"out of time before torch.compile of {problem.title()}")
            break
        torch.compiler.reset()
        operator_contestants.forget_compiled()
        run.doing(f"torch.compile of {problem.title()}")
        rows = measure(run, problem, operator_contestants.of(problem.operator, compiled=True), budget)
        run.say(line(problem, rows))
