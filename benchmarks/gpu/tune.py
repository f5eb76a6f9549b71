"""Launch configurations measured: candidates against cuBLAS, as lines to paste into clipfast/tuning.py.

Every candidate is checked before it is timed. Those for products are compiled by several processes at once into
Triton's cache, since compiling takes far longer than timing.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu import launch_ids, machine, timing
from benchmarks.gpu import problems as make
from benchmarks.gpu.operator_contestants import EAGER, of
from benchmarks.gpu.problems import Maker, Problem
from benchmarks.gpu.run import Run, rates
from clipfast import roofline, tuning
from clipfast.bench import harness
from clipfast.bench.budget import Budget
from clipfast.bench.harness import significant
from clipfast.tuning import LinearConfig

ROUNDS = 11
# ours must be this much faster to be chosen over cuBLAS: less is noise
MARGIN = 1.01


def candidates(rows: int, dtype: torch.dtype, architecture: int) -> list[LinearConfig]:
    """What could win: a few dozen, all within the shared memory."""
    if rows <= tuning.FEW_ROWS:
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        grid = itertools.product((block_m,), (32, 64, 128), (64, 128), (4,), (3, 4, 5), (8,), (1, 2, 4, 8), (False,))
    else:
        tiles = (
            (128, 256, 64, 8),
            (256, 128, 64, 8),
            (128, 128, 64, 8),
            (128, 128, 64, 4),
            (128, 64, 64, 4),
            (64, 256, 64, 8),
        )
        grid = (
            (*tile, stages, group_m, 1, persistent)
            for persistent, tile, stages, group_m in itertools.product((True, False), tiles, (3, 4), (8, 16))
        )
    found = [LinearConfig(*each[:5], group_m=each[5], split_k=each[6], persistent=each[7]) for each in grid]
    if tuning.known(architecture) not in (90, 100):
        found = [each for each in found if not each.persistent]
    limit = tuning.SHARED_MEMORY[tuning.known(architecture)]
    return [each for each in found if each.shared_memory(dtype.itemsize) <= limit]


def plan() -> Iterator[tuple[int, int, int, str | None, bool]]:
    """(rows, N, K, activation, residual): the products that take most of the most used models' time first."""
    for rows, width in (
        *((256 * 50, 768), (256 * 197, 768), (256 * 257, 1024), (256 * 16, 512), (50, 768), (257, 1024), (16, 512)),
        *(
            (32 * 50, 768),
            (256 * 77, 512),
            (32 * 257, 1024),
            (197, 768),
            (256 * 16, 768),
            (256 * 577, 1024),
            (256, 768),
        ),
    ):
        for n_cols, n_terms, activation, residual in make.products(width):
            yield rows, n_cols, n_terms, activation, residual


def compile_ahead(
    configs: list[LinearConfig], dtype: torch.dtype, epilogue: tuple[str | None, bool], seconds: float
) -> None:
    """Compiles the configurations for one epilogue into Triton's cache, in several processes."""
    workers = min(8, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(compile_one, config, dtype, epilogue) for config in configs]
        concurrent.futures.wait(jobs, timeout=seconds)
        pool.shutdown(wait=True, cancel_futures=True)


def compile_one(config: LinearConfig, dtype: torch.dtype, epilogue: tuple[str | None, bool]) -> None:
    """A launch with enough tiles for a full persistent grid, whose size is part of the compiled kernel."""
    m = Maker(torch.device("cuda"), dtype)
    tiles = 16
    shape = (tiles * config.block_m, tiles * config.block_n, 8 * config.block_k * config.split_k)
    with torch.no_grad():
        make.run_linear(make.linear("", *shape, 1, m, *epilogue).make(), config)


def best_linear(run: Run, problem: Problem, configs: list[LinearConfig], budget: Budget) -> tuple[Any, float, float]:
    """The fastest right configuration, its seconds, and cuBLAS's with PyTorch's epilogue; one row each in the CSV."""
    floor = roofline.seconds(problem.works, 1e15, 5e12)
    sets = timing.input_sets(roofline.total(problem.works).bytes, run.facts["l2_bytes"])
    repeats = timing.n_calls(sets, floor) // sets
    cases = [problem.make() for _ in range(sets)]
    eager = next(each for each in of("linear") if each.name == EAGER)
    prepared = {EAGER: timing.prepare([eager.prepare(case) for case in cases], repeats, run.device)}
    expected = eager.prepare(cases[0])()
    by_name: dict[str, LinearConfig] = {}
    for config in configs:
        if not budget.allows(2.0):
            break
        name = repr(config)
        try:
            make.check(make.run_linear(cases[0], config), cases[0], expected, what=f"{problem.title()} {name}")
            calls = [lambda case=case, config=config: make.run_linear(case, config) for case in cases]
            prepared[name] = timing.prepare(calls, repeats, run.device)
            by_name[name] = config
        except AssertionError as error:
            wrong = launch_ids.ids_of(functools.partial(make.run_linear, cases[0], config), run.device)
            run.fail(str(error)[:300], wrong)
        except Exception as error:  # too much shared memory, registers: this one is not to be had
            machine.raise_if_lost(run.device)
            run.say(f"{name}: {harness.reason(error)}")
    seconds, _ = timing.time_interleaved(prepared, ROUNDS, run.device, budget.left)
    medians = {name: statistics.median(values) for name, values in seconds.items() if values}
    shared = {name: getattr(problem, name) for name in ("operator", "model", "shape", "batch")}
    for name, median in medians.items():
        row = {**shared, "dtype": problem.dtype_name, "contestant": name, "status": "ok", "how": prepared[name].how}
        run.add({**row, **harness.times(seconds[name]), **rates(run, problem.works, problem.dtype_name, median)})
    best = min((name for name in medians if name != EAGER), key=medians.__getitem__, default=None)
    if best is None:
        raise RuntimeError("no configuration is right and fits")
    return by_name[best], medians[best], medians[EAGER]


def stage(run: Run, budget: Budget) -> None:
    if run.dry:
        run.note(f"dry run: would tune {len(list(plan()))} products; {_dry_candidates()}")
        return
    dtype, architecture = torch.bfloat16, tuning.architecture(run.device)
    m, arch, compiled = Maker(run.device, dtype), tuning.known(tuning.architecture(run.device)), set()
    done: set[tuple] = set()
    launch_ids.forbid(run.wrong)
    for rows, n_cols, n_terms, activation, residual in plan():
        key = (arch, tuning.rows_bucket(rows), n_cols, n_terms)
        if key in done or not budget.allows(20):
            continue
        done.add(key)
        configs = candidates(rows, dtype, architecture)
        fresh = [each for each in configs if (each, activation, residual) not in compiled]
        problem = make.linear("", rows, n_cols, n_terms, rows, m, activation, residual)
        run.doing(f"tuning {problem.title()}")
        try:
            compile_ahead(fresh, dtype, (activation, residual), budget.left() - 10)
            compiled |= {(each, activation, residual) for each in fresh}
            with torch.no_grad():
                config, ours, theirs = best_linear(run, problem, configs, budget)
        except Exception as error:
            machine.raise_if_lost(run.device)
            run.note(f"{problem.title()}: {harness.reason(error)}")
            continue
        for line in paste(arch, rows, (n_cols, n_terms, activation, residual), config, ours, theirs):
            run.paste(line)
            run.say(line)
    _small_kernels(run, budget)


def paste(
    arch: int, rows: int, product: tuple[int, int, str | None, bool], config: LinearConfig, ours: float, theirs: float
) -> tuple[str, str]:
    """Lines for MEASURED_LINEAR and MEASURED_CUBLAS."""
    bucket = tuning.rows_bucket(rows)
    n_cols, n_terms, activation, residual = product
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [f"{n}={v}" for n, v in dataclasses.asdict(config).items() if v != defaults[n]]
    measured = f"{rows} rows: {ours * 1e6:.4g} us, cuBLAS {theirs * 1e6:.4g} us"
    key = f"{bucket}, {n_cols}, {n_terms}"
    wins = ours * MARGIN > theirs
    return (
        f"    ({arch}, torch.bfloat16, {key}): LinearConfig({', '.join(given)}),  # {measured}",
        f'    ("linear", {arch}, torch.bfloat16, {key}, {activation!r}, {residual}): {wins},',
    )


def _dry_candidates() -> str:
    few, many = (len(candidates(rows, torch.bfloat16, 90)) for rows in (50, 12800))
    return f"{few} candidates for 50 rows, {many} for 12800"


# ---------------------------------------------------------------------------------------------------------------------
# Attention and LayerNorm: warps and stages around the configuration that tuning gives


def _small_kernels(run: Run, budget: Budget) -> None:
    m = Maker(run.device, torch.bfloat16)
    problems = [
        *(make.attention(name, [length] * 256, heads, m, causal=causal) for name, length, heads, causal in _ATTENTION),
        *(make.layer_norm("", rows, width, rows, m) for rows, width in ((12800, 768), (65792, 1024), (4096, 512))),
    ]
    for problem in problems:
        if budget.allows(3):
            names = ("layer_norm",) if problem.operator == "layer_norm" else ("attention_tile", "attention_stream")
            run.say(_warps_and_stages(run, problem, names, budget))


_ATTENTION = (
    ("ViT-B/32", 50, 12, False),
    ("text", 77, 8, True),
    ("ViT-B/16", 197, 12, False),
    ("ViT-L/14", 257, 16, False),
    ("text", 16, 8, True),
)


def _warps_and_stages(run: Run, problem: Problem, names: tuple[str, ...], budget: Budget) -> str:
    """Times of the operator with each number of warps and stages in place of what the functions of tuning return."""
    sets = timing.input_sets(roofline.total(problem.works).bytes, run.facts["l2_bytes"])
    contestant, cases = of(problem.operator)[0], [problem.make() for _ in range(sets)]
    prepared: dict[str, timing.Prepared] = {}
    for change in ({}, *({"warps": w} for w in (1, 2, 4, 8)), *({"stages": s} for s in (1, 2, 3, 4))):
        try:
            with changed(names, change), torch.no_grad():
                call = contestant.prepare(cases[0])
                make.check(make.as_tuple(call())[0], cases[0], what=f"{problem.title()} {change}")
                calls = [contestant.prepare(case) for case in cases]
                prepared[str(change or "as it is")] = timing.prepare(calls, 4, run.device)
        except AssertionError as error:
            run.fail(str(error)[:300])
        except Exception as error:
            machine.raise_if_lost(run.device)
            run.say(f"{problem.title()} {change}: {harness.reason(error)}")
    seconds, _ = timing.time_interleaved(prepared, ROUNDS, run.device, budget.left)
    found = sorted((statistics.median(values), name) for name, values in seconds.items() if values)
    return f"{problem.title()}: " + ", ".join(f"{name} {significant(time * 1e6):g} us" for time, name in found)


def changed(names: tuple[str, ...], change: dict[str, int]) -> Any:
    """Inside, these functions of tuning return their configuration with some fields replaced, where it has them."""

    def instead(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            config = original(*arguments, **options)
            known = {field.name for field in dataclasses.fields(config)}
            return dataclasses.replace(config, **{n: v for n, v in change.items() if n in known})

        return function

    return mock.patch.multiple(
        tuning, **{name: instead(getattr(tuning, name)) for name in names if hasattr(tuning, name)}
    )
