"""compute-sanitizer over every kernel at small shapes: memory accesses out of bounds, and races in shared memory.

The tool runs `python3 -m benchmarks.gpu --only sanitize-target`, which launches and checks nothing itself.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import torch

import clipfast
from benchmarks.gpu import problems as make
from benchmarks.gpu.contestants import OURS, of
from benchmarks.gpu.jobs import Job
from benchmarks.gpu.problems import Maker, Problem
from benchmarks.gpu.run import Run, on_path
from clipfast import tuning
from clipfast.bench.budget import Budget
from clipfast.kernels import native

TOOL = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
# without PyTorch's pooling an access past a tensor's end is one past an allocation's
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def start(run: Run) -> None:
    """Both tools, one after the other's start; they are slow and mostly wait for each other's launches."""
    path = on_path(TOOL)
    if path is None or TOOLS[0] in run.jobs:
        return
    target = [sys.executable, "-m", "benchmarks.gpu", "--only", "sanitize-target"]
    for tool in TOOLS:
        command = [path, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *target]
        run.jobs[tool] = Job(tool, command, run.file(f"{tool}.log"), ENVIRONMENT)


def stage(run: Run, budget: Budget) -> None:
    if run.dry:
        count = target(run.device, dry=True)
        run.note(f"dry run: {TOOL} needs a GPU; its target made {count} launches")
        return
    if on_path(TOOL) is None:
        run.note(f"{TOOL} is not here")
        return
    start(run)
    for tool in TOOLS:
        job = run.jobs[tool]
        status, text = job.wait(budget.left())
        run.note(f"{tool}: {text}")
        if status not in (0, None) or found_errors(job.text()):
            run.fail(f"{tool}: {text} (exit status {status})")


def found_errors(text: str) -> bool:
    """Whether a log's last word is that there were errors."""
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", text)
    return bool(found) and int(found[-1]) > 0


def target(device: torch.device, *, dry: bool = False) -> int:
    """Launches each kernel once or a few times. Returns how many calls it made."""
    count = 0
    with torch.no_grad(), clipfast.backend("triton"):
        for problem in _small(device, dry=dry):
            contestant = next(each for each in of(problem.operator) if each.name == OURS)
            contestant.prepare(problem.make())()
            count += 1
        if not dry:
            count += _configurations(Maker(device, torch.bfloat16)) + _plans(Maker(device, torch.float16))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return count


def _small(device: torch.device, *, dry: bool) -> Iterator[Problem]:
    if dry:
        m = Maker(device, torch.float32)
        yield make.layer_norm("", 3, 16, 3, m, residual=True)
        yield make.attention("", [3, 2], 1, m, causal=True)
        return
    for dtype in (torch.bfloat16, torch.float32):
        m = Maker(device, dtype)
        for residual in (False, True):
            yield make.layer_norm("", 7, 640, 7, m, residual=residual)
        for rows in (1, 17, 70):
            yield make.linear("", rows, 136, 200, rows, m, "quick_gelu", True)
        for causal in (False, True):
            for length in (7, 16, 50, 77, 128, 197, 257):
                yield make.attention("", [length, 3], 2, m, causal=causal)
        yield make.attention_pool("", [50, 3, 17], 128, m)
        yield make.patch_embed("", 2, (56, 70), 14, 96, m, uint8=True)
        yield make.patch_embed("", 2, (64, 96), 32, 96, m)
        yield make.logits("", 13, 70, 96, m)


def _configurations(m: Maker) -> int:
    """Each configuration of the products once, at a little more than a tile."""
    configs = make.linear_configurations(m.dtype, tuning.architecture(m.device))
    for config in configs:
        shape = (config.block_m + 3, config.block_n + 8, 3 * config.block_k - 8)
        make.run_linear(make.linear("", *shape, 1, m, "quick_gelu", True).make(), config)
    return len(configs)


def _plans(m: Maker) -> int:
    if native.missing() is not None:
        return 0
    for plan in native.PLANS:
        for patch, width in ((14, 96), (16, 128), (32, 768)):
            case = make.patch_embed("", 2, (2 * patch, 3 * patch), patch, width, m, uint8=True).make()
            options = [case.options[name] for name in ("mean", "std", "norm_weight", "norm_bias")]
            native.patch_embed(*case.arguments, *options, plan=plan)
    return 3 * len(native.PLANS)
