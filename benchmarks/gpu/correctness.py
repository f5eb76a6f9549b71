"""Every kernel in every configuration that tuning can return for this GPU, against float64; and the test suite.

What runs here runs without pytest. Compilers have been caught miscompiling single configurations, so none is left out
because another one passed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

import clipfast
from benchmarks.errors import WITH_GRADIENTS, gradients
from benchmarks.gpu import operators, sanitizer
from benchmarks.gpu import problems as make
from benchmarks.gpu.jobs import Job
from benchmarks.gpu.problems import HALVES, Maker, Problem
from benchmarks.gpu.run import ROOT, Run
from clipfast import tuning
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import harness, workload
from clipfast.bench.budget import Budget
from clipfast.kernels import native
from tests.accuracy import assert_accurate
from tests.op_cases import Case

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# around every tile's size, and CLIP's own: images 50, 197, 257, 577, text 1 to 77
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 50, 63, 64, 65, 77, 96, 127, 128, 129, 145, 192, 193, 197, 208, 257, 320, 577)
TESTS = (
    "tests/kernels",
    "tests/test_ops.py",
    "tests/test_gradients.py",
    "tests/test_native.py",
    "tests/test_graphs.py",
)


class Check(NamedTuple):
    name: str
    operator: str
    dtype: torch.dtype
    run: Callable[[], None]  # raises what is wrong


def checks(device: torch.device, *, dry: bool = False) -> Iterator[Check]:
    """Those most likely to find something first: whole operators, then single configurations."""
    if dry:
        yield from _of_problems(_tiny(device))
        yield from _of_gradients(_for_gradients(Maker(device, torch.bfloat16), (7,), (7,), (((64, 32), 32, 64),)))
        return
    makers = {dtype: Maker(device, dtype) for dtype in DTYPES}
    yield from _graphs(device)
    for m in makers.values():
        yield from _of_problems(_at_real_shapes(m))
        yield from _of_gradients(_for_gradients(m))
        yield from _linear_configurations(m)
        yield from _of_problems(_attention_lengths(m))
        yield from _native(m)
    yield from _tf32(makers[torch.float32])


def _tiny(device: torch.device) -> Iterator[Problem]:
    yield from operators.plan(device, dry=True)


def _of_problems(problems: Iterator[Problem]) -> Iterator[Check]:
    for problem in problems:
        yield Check(problem.title(), problem.operator, problem.dtype, lambda problem=problem: _check(problem))


def _check(problem: Problem) -> None:
    """On the Triton backend, through the public operator, all results of it (LayerNorm's sum too)."""
    case = problem.make()
    with torch.no_grad(), clipfast.backend("triton"), poisoned():
        results = case.ours()
    make.check(results[0], case, None if problem.operator == "attention_pool" else case.peer()[0], what=problem.title())
    if problem.operator == "layer_norm" and len(results) > 1:
        assert torch.equal(results[1], case.peer()[1]), f"{problem.title()}: the sum is another one than PyTorch's"


def _of_gradients(problems: Iterator[Problem]) -> Iterator[Check]:
    for problem in problems:
        if problem.operator in WITH_GRADIENTS:
            name = f"gradients of {problem.title()}"
            yield Check(name, problem.operator, problem.dtype, lambda problem=problem: _check_gradients(problem))


def _check_gradients(problem: Problem) -> None:
    """Of every floating argument but images, all of each, by the rule of tests/accuracy.py."""
    case = problem.make()
    with clipfast.backend("triton"), poisoned():
        ours = gradients(case, Case.ours)
    exact = gradients(case.map(lambda x: x.double()), Case.exact)
    for i, tensors in enumerate(zip(ours, gradients(case, Case.peer), exact, strict=True)):
        assert_accurate(*tensors, what=f"gradient {i} of {problem.title()}")


def _for_gradients(
    m: Maker,
    several: Sequence[int] = (1, 7, 64, 500, 1600),
    lengths: Sequence[int] = (1, 7, 16, 33, 50, 77, 128, 129, 197, 257, 577),
    images: Sequence[tuple] = (((224, 256), 32, 768), ((224, 224), 16, 768), ((70, 42), 14, 320)),
) -> Iterator[Problem]:
    """Each kernel and each size of tile, few rows and many."""
    for rows in several:
        yield make.layer_norm("", rows, 768, rows, m)
        yield make.linear("", rows, 768, 768, rows, m, None, True)
        yield make.mlp("", rows, 512, rows, m)
        yield make.project("", rows, 768, 512, m)
    for causal in (False, True):
        for length in lengths:
            yield make.attention("", [length] * 3, 3, m, causal=causal)
        yield make.attention("", [50, 1, 3, 77, 0, 16], 5, m, causal=causal)
    for size, patch, width in images:
        for uint8 in (False, True):
            yield make.patch_embed("", 3, size, patch, width, m, uint8=uint8)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty is NaN: what no program writes is seen."""
    settings = torch.utils.deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = before


def _at_real_shapes(m: Maker) -> Iterator[Problem]:
    for model in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"):
        yield from make.of_images(model, 3, m)
    for model in ("ViT-B/32", "ViT-L/14"):
        yield from make.of_texts(model, workload.Captions(1, 77), 30, m)
        yield from make.of_texts(model, workload.Captions(77, 77), 3, m)
    for width, rows in itertools.product((31, 192, *make.WIDTHS), (1, 7, 1600)):
        for residual in (False, True):
            yield make.layer_norm("", rows, width, rows, m, residual=residual)
    for rows in (1, 5, 64, 500):
        yield make.mlp("", rows, 768, rows, m)
        yield make.project("", rows, 768, 512, m)
        yield make.logits("", rows, 3 * rows, 512, m)
    yield make.patch_embed("", 5, (224, 256), 32, 768, m)
    yield make.patch_embed("", 2, (70, 42), 14, 320, m, uint8=True, norm=False)


def _attention_lengths(m: Maker) -> Iterator[Problem]:
    """Every block size: each length, by few programs and by many, causal and not, and sequences of mixed length."""
    for causal in (False, True):
        for length in LENGTHS:
            yield make.attention("", [length] * 2, 3, m, causal=causal)
        for length in (1, 7, 16, 17, 50, 77, 197):
            yield make.attention("", [length] * 80, 12, m, causal=causal)
        for lengths in ([50, 1, 3, 77, 0, 16], [577, 1, 64, 65], [129, 128, 0, 257, 300]):
            yield make.attention("", lengths, 5, m, causal=causal)


def _linear_configurations(m: Maker) -> Iterator[Check]:
    for config in make.linear_configurations(m.dtype, tuning.architecture(m.device)):
        # ragged ends in each direction; and several tiles for every program of a persistent grid
        for rows, cols, steps, activation, residual in (
            (1, 1, 3, "quick_gelu", True),
            (30, 12, 12, "quick_gelu", False),
            (24, 9, 2, None, True),
            (2, 3, 4, "gelu", True),
        ):
            shape = (rows * config.block_m + 3, cols * config.block_n + 8, steps * config.block_k - 8)
            args = (m, config, shape, activation, residual)
            yield Check(f"{config} {shape} {m.dtype}", "linear", m.dtype, lambda args=args: check_linear(*args))


def check_linear(
    m: Maker, config: tuning.LinearConfig, shape: tuple[int, int, int], activation: str | None, residual: bool
) -> None:
    """One configuration, all of its result.   shape: rows, columns, terms."""
    case = make.linear("", *shape, shape[0], m, activation, residual).make()
    with torch.no_grad(), poisoned():
        got = make.run_linear(case, config)
        make.check(got, case, case.peer()[0], what=f"linear {shape} {activation} {config}")


def _tf32(m: Maker) -> Iterator[Check]:
    """Rounded operands, where the user has asked for them: not the house rule's accuracy, but the same function."""

    def run(problem: Problem) -> None:
        case = problem.make()
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
        try:
            with torch.no_grad(), clipfast.backend("triton"), poisoned():
                got = case.ours()[0]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        exact = case.exact()[0]
        error = ((got.double() - exact).norm() / exact.norm()).item()
        assert error < 2e-3, f"{problem.title()} tf32: relative RMS error {error:.2g}"

    problems = [make.linear("", rows, 768, 512, rows, m, "quick_gelu", True) for rows in (5, 50, 300, 1600)]
    problems += [
        make.attention("", [length] * 3, 3, m, causal=c) for length in (16, 50, 77, 197, 257) for c in (False, True)
    ]
    for problem in problems:
        yield Check(f"{problem.title()} tf32", problem.operator, m.dtype, lambda problem=problem: run(problem))


def _native(m: Maker) -> Iterator[Check]:
    """The CUDA library in each plan that takes the dtype."""
    if native.missing() is not None:
        return
    plans = [plan for plan in native.PLANS if m.dtype in HALVES or plan in ("auto", "generic")]
    shapes = ((3, (224, 224), 32, 768), (2, (224, 256), 16, 768), (2, (224, 224), 14, 1024), (1, (336, 336), 14, 1024))
    for plan, shape, uint8, norm in itertools.product(plans, shapes, (False, True), (False, True)):
        problem = make.patch_embed(f"native {plan}", *shape, m, uint8=uint8, norm=norm)

        def run(problem: Problem = problem, plan: str = plan) -> None:
            case = problem.make()
            options = [case.options.get(name) for name in ("mean", "std", "norm_weight", "norm_bias")]
            with torch.no_grad(), poisoned():
                got = native.patch_embed(*case.arguments, *options, plan=plan)
            make.check(got, case, case.peer()[0], what=problem.title())

        yield Check(problem.title(), "patch_embed", m.dtype, run)


TINY = {
    **ARCHITECTURES["ViT-B/32"],
    **{"embed_dim": 64, "image_resolution": 64, "vision_layers": 2, "vision_width": 128, "vision_patch_size": 16},
    **{"vocab_size": 999, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2},
}


def _graphs(device: torch.device) -> Iterator[Check]:
    """Replayed and launched one by one, the same kernels give the same bits, also for inputs that come later."""

    def run() -> None:
        weights = {name: weight.to(device) for name, weight in _tiny_weights().items()}
        with device:
            model = clipfast.build_model(weights)
        clipfast.convert_weights(model, torch.bfloat16)
        for seed in range(3):
            for batch in (1, 3, 8):
                data = workload.inputs(TINY, batch, workload.Captions(3, 20), seed)
                images, text = data["image"].to(device, torch.bfloat16), data["text"].to(device)
                outputs = []
                for replayed in (True, True, False):
                    model.cuda_graphs = replayed
                    with torch.no_grad(), clipfast.backend("triton"):
                        outputs.append((model.encode_image(images), model.encode_text(text)))
                for image, words in outputs[:2]:
                    assert torch.equal(image, outputs[2][0]), f"graphs change encode_image at batch {batch}"
                    assert torch.equal(words, outputs[2][1]), f"graphs change encode_text at batch {batch}"

    yield Check("CUDA graphs", "graphs", torch.bfloat16, run)


def _tiny_weights() -> dict[str, Tensor]:
    return workload.random_weights(TINY)


# ---------------------------------------------------------------------------------------------------------------------
# The stage


Wrong = Callable[[str, str, str], None]  # (text, operator, dtype)


def run_checks(found: Iterator[Check], budget: Budget, device: torch.device, wrong: Wrong) -> str:
    """Runs checks until time is up. Returns: how many ran, how many failed, and what was cut off, in words."""
    count = failed = 0
    for check in found:
        if not budget.allows(0.5):
            return f"{count} run, {failed} wrong, cut off before {check.name}"
        count += 1
        try:
            check.run()
        except Exception as error:  # a kernel that does not compile is wrong too
            failed += 1
            text = str(error) if isinstance(error, AssertionError) else f"{check.name}: {harness.reason(error)}"
            wrong(" ".join(text.split())[:400], check.operator, str(check.dtype).removeprefix("torch."))
            if _context_is_lost(device):
                return f"{count} run, {failed} wrong, and after {check.name} the CUDA context is lost"
    return f"{count} run, {failed} wrong"


def _context_is_lost(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


PROCESSES = 4
# exit status of a part that ran to its end; 1 would be any crash of Python's
FOUND_WRONG = 3
_MARK = "WRONG CHECK"


def part(device: torch.device, budget: Budget, index: int, count: int) -> int:
    """One process's share of the checks, printed for `collect`. Returns the exit status."""
    failed: list[str] = []

    def wrong(text: str, operator: str, dtype: str) -> None:
        failed.append(text)
        print(_MARK, operator, dtype, text, sep="\t", flush=True)

    found = itertools.islice(checks(device), index, None, count)
    print("own checks:", run_checks(found, budget, device, wrong), flush=True)
    return FOUND_WRONG if failed else 0


def collect(run: Run, job: Job, budget: Budget) -> None:
    """What a process of `part` found; one that died is wrong too."""
    status, text = job.wait(budget.left())
    for line in job.text().splitlines():
        if line.startswith(_MARK):
            _, operator, dtype, what = line.split("\t", 3)
            run.fail(what, operator, dtype)
    run.note(f"{job.name}: {text}")
    if status not in (0, FOUND_WRONG, None):
        run.fail(f"{job.name} ended with status {status}: {text}")


def start_pytest(run: Run) -> Job | None:
    """The suite's kernel tests on the GPU, beside the own checks; none in a dry run, where `make test` has run them."""
    if run.dry or importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        run.note(
            "dry run: `make test` runs the tests" if run.dry else "pytest or hypothesis is not here: own checks only"
        )
        return None
    paths = [path for path in TESTS if (ROOT / path).exists()]
    command = [sys.executable, "-m", "pytest", *paths, "--maxfail=20", "--tb=short", "-p", "no:cacheprovider"]
    if int(metadata.version("pytest").partition(".")[0]) < 9:
        # pyproject.toml has settings that only newer ones know, and is strict about them
        command += ["-c", os.devnull, "--rootdir", str(ROOT)]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "6"]
    return Job("pytest", command, run.file("pytest.log"))


def stage(run: Run, budget: Budget) -> None:
    """Own checks, pytest and, since nothing is timed here, the sanitizer side by side: most of it is compiling."""
    if run.dry:
        run.note(f"own checks: {run_checks(checks(run.device, dry=True), budget, run.device, run.fail)}")
        start_pytest(run)
        return
    tests = start_pytest(run)
    sanitizer.start(run)
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--only",
        "checks",
        "--minutes",
        f"{(budget.left() - 5) / 60:.3f}",
    ]
    names = [f"{i}/{PROCESSES}" for i in range(PROCESSES)]
    parts = [Job(f"checks {name}", [*command, "--part", name], None) for name in names]
    # should this stage break off, whoever ends the run ends them
    run.jobs.update({job.name: job for job in (*parts, *filter(None, [tests]))})
    for job in parts:
        collect(run, job, budget)
    if tests is not None:
        status, text = tests.wait(budget.left())
        run.note(f"pytest: {text}")
        if status not in (0, None):
            run.fail(f"pytest: {text}")
