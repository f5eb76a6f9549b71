"""Every kernel in every configuration that tuning can return for this GPU, against float64: what is checked.

Compilers have been caught miscompiling single configurations, so none is left out because another one passed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import clipfast
from benchmarks.errors import WITH_GRADIENTS, gradients
from benchmarks.gpu import groups, operators
from benchmarks.gpu import problems as make
from benchmarks.gpu.problems import HALVES, Maker, Problem
from clipfast import tuning
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import workload
from clipfast.kernels import native
from clipfast.loss import contrastive_loss
from clipfast.packing import filling
from tests import losses
from tests.accuracy import assert_accurate
from tests.op_cases import Case

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# around every tile's size, and CLIP's own: images 50, 197, 257, 577, text 1 to 77
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 50, 63, 64, 65, 77, 96, 127, 128, 129, 145, 192, 193, 197, 208, 257, 320, 577)
# of heads wider than 64: each block size
WIDE_LENGTHS = (7, 20, 50, 130, 192, 197, 300)


class Work(NamedTuple):
    """What a check does: a call on the GPU, and what is right."""

    launch: Callable[[], Any]
    judge: Callable[[Any], None]  # of what the call returns; raises what is wrong


class Check(NamedTuple):
    name: str
    operator: str
    dtype: torch.dtype
    prepare: Callable[[], Work]
    more: str = ""  # what the verdict depends on besides its Triton launches


def checks(device: torch.device, *, dry: bool = False) -> Iterator[Check]:
    """What dispatch would choose first, then the other configurations; of each the dtypes that are used most first."""
    if dry:
        yield from _of_problems(operators.plan(device, dry=True))
        yield from _of_gradients(_for_gradients(Maker(device, torch.bfloat16), (7,), (7,), (((64, 32), 32, 64),)))
        return
    makers = [Maker(device, dtype) for dtype in DTYPES]
    yield _graphs(device)
    for m in makers:
        yield from _of_problems(_at_real_shapes(m))
        yield from _of_gradients(_for_gradients(m))
        yield from _of_gradients(_for_gradients_of_other_sizes(m))
        yield from _losses(m)
    for m in makers:
        yield from _native(m)
        yield from _linear_configurations(m)
        yield from _of_problems(_attention_lengths(m))
        yield from _of_problems(_of_other_models(m))
    yield from _tf32(makers[-1])
    for m in makers:
        yield from _linear_configurations(m, cheaper=True)


def headline(device: torch.device, *, dry: bool = False) -> Iterator[Check]:
    """The operators of the towers that the headline is about, at its own batches."""
    # other launches than the headline's, so few of them
    yield _graphs(device, (3,))
    if dry:
        yield from _of_problems(operators.plan(device, dry=True))
        return
    for dtype in HALVES[::-1]:
        m = Maker(device, dtype)
        for tower, model, batch, captions in groups.towers():
            if tower == "image":
                found, rows = make.of_images(model, batch, m), batch
            else:
                lengths = make.caption_lengths(captions, batch)
                # as graphs want them: a few rows more, of a sequence that no text has
                lengths += filling(sum(lengths))
                width, rows = ARCHITECTURES[model]["transformer_width"], len(lengths)
                found = make.of_block(model, lengths, width, m, causal=True)
            yield from _of_problems(problem for problem in found if "uint8" not in problem.shape)
            yield from _of_problems(make.of_last_block(model, rows, tower, m))


def _of_problems(problems: Iterator[Problem]) -> Iterator[Check]:
    for problem in problems:
        yield Check(problem.title(), problem.operator, problem.dtype, lambda problem=problem: _work(problem))


def _work(problem: Problem) -> Work:
    """On the Triton backend, through the public operator, all results of it (LayerNorm's sum too)."""
    case = problem.make()

    def judge(results: tuple[Tensor, ...]) -> None:
        eager = None if problem.operator == "attention_pool" else case.peer()[0]
        make.check(results[0], case, eager, what=problem.title())
        if problem.operator == "layer_norm" and len(results) > 1:
            same = torch.equal(results[1], case.peer()[1])
            assert same, f"{problem.title()}: the sum is another one than PyTorch's"

    return Work(_on_triton(case.ours), judge)


def _on_triton(function: Callable[..., Any], *arguments: Any, grad: bool = False) -> Callable[[], Any]:
    def launch() -> Any:
        with torch.set_grad_enabled(grad), clipfast.backend("triton"), poisoned():
            return function(*arguments)

    return launch


def _of_gradients(problems: Iterator[Problem]) -> Iterator[Check]:
    for problem in problems:
        if problem.operator in WITH_GRADIENTS:
            name = f"gradients of {problem.title()}"
            yield Check(name, problem.operator, problem.dtype, lambda problem=problem: _work_on_gradients(problem))


def _work_on_gradients(problem: Problem) -> Work:
    """Of every floating argument but images, all of each, by the rule of tests/accuracy.py."""
    case = problem.make()

    def judge(ours: list[Tensor]) -> None:
        exact = gradients(case.map(lambda x: x.double()), Case.exact)
        for i, tensors in enumerate(zip(ours, gradients(case, Case.peer), exact, strict=True)):
            assert_accurate(*tensors, what=f"gradient {i} of {problem.title()}")

    return Work(_on_triton(gradients, case, Case.ours, grad=True), judge)


def _for_gradients(
    m: Maker,
    several: Sequence[int] = (1, 7, 64, 500, 1600),
    lengths: Sequence[int] = (1, 7, 16, 20, 33, 50, 77, 128, 129, 197, 257, 577),
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


def _for_gradients_of_other_sizes(m: Maker) -> Iterator[Problem]:
    """Other widths, tiles of 128 rows, and heads that are wider."""
    for width in (192, *make.WIDTHS):
        yield make.layer_norm("", 7, width, 7, m)
    for length in (197, 256):
        yield make.attention("", [length] * 24, 3, m, causal=False)
    for length, causal in itertools.product(WIDE_LENGTHS, (False, True)):
        yield make.attention("", [length] * 3, 3, m, causal=causal, head_width=80)


def _losses(m: Maker) -> Iterator[Check]:
    """The contrastive loss and its gradients, in blocks of 16, of 64 and of 128 rows; several batches together."""
    for n, width, scale in ((1, 5, 14.3), (16, 64, 14.3), (130, 512, 30.0), (300, 129, 30.0), (1000, 512, 14.3)):
        name = f"contrastive_loss {n}x{width} {m.dtype}"

        def prepare(n: int = n, width: int = width, scale: float = scale, name: str = name) -> Work:
            number = torch.tensor(scale, device=m.device)
            several = [losses.features(n, width, noise=3.0, dtype=m.dtype) for _ in range(16)]
            pairs = [(image.to(m.device), text.to(m.device)) for image, text in several]

            def all_of_them() -> list[list[Tensor]]:
                return [losses.with_gradients(contrastive_loss, *pair, number) for pair in pairs]

            # a logit's products, then those of all texts
            terms = width + n if m.dtype == torch.float32 else 0
            launch = _on_triton(all_of_them, grad=True)
            return Work(launch, lambda got: losses.assert_results(got, pairs, number, what=name, terms=terms))

        yield Check(name, "contrastive_loss", m.dtype, prepare)


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


def _of_other_models(m: Maker) -> Iterator[Problem]:
    """Wider heads (ViT-H), many heads (the pooling of the ResNets), and models that are whole in one dtype."""
    for length, causal in itertools.product(WIDE_LENGTHS, (False, True)):
        yield make.attention("", [length] * 3, 3, m, causal=causal, head_width=80)
    for width, batch in itertools.product((2048, 4096), (3, 40)):
        yield make.attention_pool("", [50] * batch, width, m)
    for batch, patch in ((1, 16), (12, 32)):
        yield make.patch_embed("", batch, (224, 224), patch, 768, m, uint8=True)
    if m.dtype in HALVES:
        whole = Maker(m.device, m.dtype, whole=True)
        for width in (192, *make.WIDTHS):
            yield make.layer_norm("whole", 7, width, 7, whole)
        for batch, (patch, width) in itertools.product((1, 12), ((32, 768), (16, 768), (14, 1024))):
            yield make.patch_embed("whole", batch, (224, 224), patch, width, whole)
        for rows in (1, 64):
            yield make.logits("whole", rows, 3 * rows, 512, whole)


def _linear_configurations(m: Maker, *, cheaper: bool = False) -> Iterator[Check]:
    """Those that tuning returns, or their twins with the cheaper tanh, which it does not return yet."""
    for config in make.linear_configurations(m.dtype, tuning.architecture(m.device)):
        if config.fast_tanh != cheaper:
            continue
        # ragged ends in each direction; and several tiles for every program of a persistent grid
        for rows, cols, steps, activation, residual in (
            (1, 1, 3, "quick_gelu", True),
            (30, 12, 12, "quick_gelu", False),
            (24, 9, 2, None, True),
            (2, 3, 4, "gelu", True),
        ):
            shape = (rows * config.block_m + 3, cols * config.block_n + 8, steps * config.block_k - 8)
            args = (m, config, shape, activation, residual)
            yield Check(f"{config} {shape} {m.dtype}", "linear", m.dtype, lambda args=args: work_on_linear(*args))


def work_on_linear(
    m: Maker, config: tuning.LinearConfig, shape: tuple[int, int, int], activation: str | None, residual: bool
) -> Work:
    """One configuration, all of its result.   shape: rows, columns, terms."""
    case = make.linear("", *shape, shape[0], m, activation, residual).make()
    what = f"linear {shape} {activation} {config}"
    return Work(_on_triton(make.run_linear, case, config), lambda got: make.check(got, case, case.peer()[0], what=what))


# Rounding an operand to 10 bits of mantissa errs by 2.8e-4 of it (RMS), and a product of two by 4e-4. Attention goes
# through two products, its gradients through three and more: several times that.
TF32_ERRORS = {"forward": 2e-3, "gradients": 4e-3}


def _tf32(m: Maker) -> Iterator[Check]:
    """Rounded operands, where the user has asked for them: not the house rule's accuracy, but the same function."""

    def prepare(problem: Problem, way: str) -> Work:
        case = problem.make()

        def launch() -> list[Tensor]:
            before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
            try:
                if way == "gradients":
                    return _on_triton(gradients, case, Case.ours, grad=True)()
                return [_on_triton(case.ours)()[0]]
            finally:
                torch.backends.cuda.matmul.allow_tf32 = before

        def judge(found: list[Tensor]) -> None:
            wide = case.map(lambda x: x.double())
            exacts = gradients(wide, Case.exact) if way == "gradients" else [wide.exact()[0]]
            for got, exact in zip(found, exacts, strict=True):
                error = ((got.double() - exact).norm() / exact.norm()).item()
                assert error < TF32_ERRORS[way], f"{problem.title()} tf32, {way}: relative RMS error {error:.2g}"

        return Work(launch, judge)

    attention = [
        make.attention("", [length] * 3, 3, m, causal=causal, head_width=width)
        for width, lengths in ((64, (16, 20, 50, 77, 197, 257)), (80, WIDE_LENGTHS))
        for length, causal in itertools.product(lengths, (False, True))
    ]
    problems = [make.linear("", rows, 768, 512, rows, m, "quick_gelu", True) for rows in (5, 50, 300, 1600)]
    problems += [make.attention_pool("", [50] * n, width, m) for n in (3, 40) for width in (768, 2048, 4096)]
    for way, several in (("forward", [*problems, *attention]), ("gradients", attention)):
        for problem in several:
            name = f"{problem.title()} tf32, {way}"
            yield Check(name, problem.operator, m.dtype, lambda problem=problem, way=way: prepare(problem, way))


def _native(m: Maker) -> Iterator[Check]:
    """The CUDA library in each plan that takes the dtype."""
    if native.missing() is not None:
        return
    source = hashlib.sha256(native.LIBRARY.path.read_bytes()).hexdigest()
    plans = [plan for plan in native.PLANS if m.dtype in HALVES or plan in ("auto", "generic")]
    shapes = ((3, (224, 224), 32, 768), (2, (224, 256), 16, 768), (2, (224, 224), 14, 1024), (1, (336, 336), 14, 1024))
    for plan, shape, uint8, norm in itertools.product(plans, shapes, (False, True), (False, True)):
        problem = make.patch_embed(f"native {plan}", *shape, m, uint8=uint8, norm=norm)

        def prepare(problem: Problem = problem, plan: str = plan) -> Work:
            case = problem.make()
            options = [case.options.get(name) for name in ("mean", "std", "norm_weight", "norm_bias")]

            def launch() -> Tensor:
                with torch.no_grad(), poisoned():
                    return native.patch_embed(*case.arguments, *options, plan=plan)

            return Work(launch, lambda got: make.check(got, case, case.peer()[0], what=problem.title()))

        yield Check(problem.title(), "patch_embed", m.dtype, prepare, more=source)


def _graphs(device: torch.device, batches: Sequence[int] = (1, 3, 8)) -> Check:
    """Replayed and launched one by one, the same kernels give the same bits, also for inputs that come later."""

    def prepare() -> Work:
        weights = {name: weight.to(device) for name, weight in workload.random_weights(groups.TINY).items()}
        with device:
            model = clipfast.build_model(weights)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        clipfast.convert_weights(model, dtype)

        def launch() -> list[tuple[str, list[Tensor]]]:
            found = []
            for seed, batch in itertools.product(range(3), batches):
                data = workload.inputs(groups.TINY, batch, workload.Captions(3, 20), seed)
                images, text = data["image"].to(device, dtype), data["text"].to(device)
                for tower, function in (("image", model.encode_image), ("text", model.encode_text)):
                    outputs = []
                    for replayed in (True, True, False):
                        model.cuda_graphs = replayed
                        with torch.no_grad(), clipfast.backend("triton"):
                            outputs.append(function(images if tower == "image" else text))
                    found.append((f"encode_{tower} at batch {batch}", outputs))
                if device.type != "cuda":
                    break  # nothing is recorded: once shows that it runs
            return found

        def judge(found: list[tuple[str, list[Tensor]]]) -> None:
            for what, (first, again, launched) in found:
                assert torch.equal(first, launched), f"the call that records a graph changes {what}"
                assert torch.equal(again, launched), f"a replayed graph changes {what}"

        return Work(launch, judge)

    return Check("CUDA graphs", "graphs", torch.bfloat16, prepare)
