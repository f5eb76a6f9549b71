"""compute-sanitizer over every kernel at small shapes: memory accesses out of bounds, and races in shared memory.

The tool runs `python3 -m benchmarks.gpu.sanitizer`, which checks nothing itself, and says of each launch that it is
over: a log that was cut short tells how far the tool came.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import clipfast
from benchmarks.errors import WITH_GRADIENTS, gradients
from benchmarks.gpu import problems as make
from benchmarks.gpu.jobs import Job, on_path
from benchmarks.gpu.operator_contestants import OURS, of
from benchmarks.gpu.problems import Maker, Problem
from benchmarks.gpu.run import Run
from clipfast import tuning
from clipfast.bench.budget import Budget
from clipfast.kernels import native
from clipfast.loss import contrastive_loss
from tests.op_cases import Case

TOOL = "compute-sanitizer"
# one after the other: they are slow, and the second's findings are the rarer. What CUDA's functions return is no memory
# error: PyTorch raises where it matters
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}
# a tool that has less is not worth the start
LEAST_SECONDS = 10
# without PyTorch's pooling an access past a tensor's end is one past an allocation's
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_LAUNCHED = "launched"
FOUND_ERRORS = 9  # the tool's exit status then


def _start(run: Run, path: str, tool: str) -> Job:
    options = ["--tool", tool, *TOOLS[tool], "--error-exitcode", str(FOUND_ERRORS), "--print-limit", "20"]
    command = [path, *options, sys.executable, "-m", __spec__.name]
    return Job(tool, command, run.file(f"{tool}.log"), ENVIRONMENT)


def stage(run: Run, budget: Budget) -> None:
    if run.dry:
        count = target(run.device, dry=True)
        run.note(f"dry run: {TOOL} needs a GPU; its target made {count} launches")
        return
    path = on_path(TOOL)
    if path is None:
        run.note(f"{TOOL} is not here")
        return
    for tool in TOOLS:
        if not budget.allows(LEAST_SECONDS):
            run.note(f"{tool}: not run: out of time")
            continue
        job = _start(run, path, tool)
        status, _ = job.wait(budget.left())
        found = verdict(job.text(), status)
        (run.fail if found.wrong else run.note)(f"{tool}: {found.text}")


class Verdict(NamedTuple):
    wrong: bool
    text: str


# what follows a report's first line is indented; of that the kernel's name
_REPORT = re.compile(
    r"^========= ((?:Invalid|Misaligned|Uninitialized|Illegal|Out-of-range|Barrier|Divergent|Stack|Fatal|Error:).*)"
    r"(?:\n=========     (at .*))?",
    re.MULTILINE,
)
_MEMORY = re.compile(r"ERROR SUMMARY: (\d+) error")
_RACES = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)")


def verdict(text: str, status: int | None) -> Verdict:
    """What a tool's log says.   status: the tool's exit status, None where it was cut off.

    Clean is a log with a SUMMARY line that counts no errors, of a target that ended by itself and well.
    """
    launches = len(re.findall(rf"^{_LAUNCHED} ", text, re.MULTILINE))
    reports = [" ".join(filter(None, lines)) for lines in _REPORT.findall(text)]
    memory, races = _MEMORY.findall(text), _RACES.findall(text)
    errors = int(memory[-1]) if memory else int(races[-1][1]) if races else None
    if errors or (errors is None and reports):
        count = f"{errors} errors" if errors else f"{len(reports)} errors before it was cut short"
        first = reports[0] if reports else "not in the log"
        return Verdict(True, f"{count} in {launches} launches, the first: {first}")
    if errors is None or status is None:
        how = "cut short" if status is None else f"ended without a summary (exit status {status})"
        return Verdict(status not in (0, None), f"{how} after {launches} launches, no error until then")
    warnings = int(races[-1][2]) if races else 0
    if status not in ((0, FOUND_ERRORS) if warnings else (0,)):
        lines = [line for line in text.splitlines() if line and not line.startswith("=========")]
        last = lines[-1] if lines else ""
        return Verdict(True, f"the target ended with exit status {status} after {launches} launches: {last[:160]}")
    # barriers of the hardware's own that the tool does not know look like hazards
    return Verdict(False, f"no error in {launches} launches" + f", {warnings} warnings" * (warnings > 0))


def target(device: torch.device, *, dry: bool = False) -> int:
    """Launches each kernel once or a few times, most of what is used first. Returns how many calls it made."""
    count = 0
    for name, call in _tiny(device) if dry else _calls(device):
        count += 1
        with clipfast.backend("triton"):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not dry:
            print(_LAUNCHED, name, flush=True)
    return count


Call = tuple[str, Callable[[], object]]


def _tiny(device: torch.device) -> Iterator[Call]:
    m = Maker(device, torch.float32)
    problems = [make.layer_norm("", 3, 16, 3, m, residual=True), make.attention("", [3, 2], 1, m, causal=True)]
    yield from _forward(problems)


def _calls(device: torch.device) -> Iterator[Call]:
    m = Maker(device, torch.bfloat16)
    yield from _forward(_small(m))
    yield from _configurations(m)
    yield from _with_gradients(m)
    yield from _plans(Maker(device, torch.float16))
    yield from _forward(_small(Maker(device, torch.float32)))


def _forward(problems: Iterator[Problem] | list[Problem]) -> Iterator[Call]:
    for problem in problems:

        def call(problem: Problem = problem) -> None:
            contestant = next(each for each in of(problem.operator) if each.name == OURS)
            with torch.no_grad():
                contestant.prepare(problem.make())()

        yield problem.title(), call


def _small(m: Maker) -> Iterator[Problem]:
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


def _with_gradients(m: Maker) -> Iterator[Call]:
    """Forward and backward: the kernels that train, at small shapes."""
    problems = [
        make.layer_norm("", 7, 640, 7, m),
        make.linear("", 70, 136, 200, 70, m, "quick_gelu", True),
        make.mlp("", 70, 64, 70, m),
        *(make.attention("", [length, 3], 2, m, causal=causal) for length in (7, 77, 257) for causal in (False, True)),
        make.patch_embed("", 2, (56, 70), 14, 96, m, uint8=True),
        make.project("", 13, 96, 72, m),
    ]
    assert {problem.operator for problem in problems} == set(WITH_GRADIENTS)
    for problem in problems:
        yield f"gradients of {problem.title()}", lambda problem=problem: gradients(problem.make(), Case.ours)

    def loss() -> None:
        images, texts = (m.normal(70, 96).requires_grad_() for _ in range(2))
        contrastive_loss(images, texts, 10.0).backward()

    yield "the loss and its gradients", loss


def _configurations(m: Maker) -> Iterator[Call]:
    """Each configuration of the products once, at a little more than a tile."""
    for config in make.linear_configurations(m.dtype, tuning.architecture(m.device)):
        shape = (config.block_m + 3, config.block_n + 8, 3 * config.block_k - 8)

        def call(config: tuning.LinearConfig = config, shape: tuple[int, int, int] = shape) -> None:
            with torch.no_grad():
                make.run_linear(make.linear("", *shape, 1, m, "quick_gelu", True).make(), config)

        yield f"{config} {shape}", call


def _plans(m: Maker) -> Iterator[Call]:
    if native.missing() is not None:
        return
    for plan in native.PLANS:
        for patch, width in ((14, 96), (16, 128), (32, 768)):

            def call(plan: str = plan, patch: int = patch, width: int = width) -> None:
                case = make.patch_embed("", 2, (2 * patch, 3 * patch), patch, width, m, uint8=True).make()
                options = [case.options[name] for name in ("mean", "std", "norm_weight", "norm_bias")]
                native.patch_embed(*case.arguments, *options, plan=plan)

            yield f"native patch_embed {plan} {patch} {width}", call


if __name__ == "__main__":
    print(f"{target(torch.device('cuda', 0))} launches made")
