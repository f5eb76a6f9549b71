"""Every public operator, on every backend, in every dtype, beside PyTorch's own and the exact result.

The rule is that of tests/accuracy.py; tests/op_cases.py has the shapes.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clipfast
from clipfast import dispatch, ops, reference
from clipfast.packing import Rows

from .accuracy import assert_accurate
from .backends import device_of, skip_unless_it_runs
from .op_cases import (
    CASES,
    SMALL,
    Case,
    attention_case,
    case_in,
    mlp_case,
    norm,
    offsets_of,
    patch_case,
    pool_case,
    weights,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# backends that have some operators, without gradients
HAVE = {"cpu": ("attention", *dispatch._CPU_PRODUCTS), "onednn": dispatch._ONEDNN}


# PyTorch's float16 products are slow on most CPUs: of the large cases none
CHOSEN = [
    (name, dtype)
    for name, case in CASES.items()
    for dtype in DTYPES
    if dtype != torch.float16 or sum(x.numel() for x in case.tensors()) < 1_000_000
]


def _size(name: str) -> int:
    return sum(x.numel() for x in CASES[name].tensors())


def _runs(name: str, dtype: torch.dtype, backend: str) -> bool:
    if backend in HAVE:
        return CASES[name].operator in HAVE[backend]
    # the interpreter is slow: tests/kernels holds each kernel to float16, and whole towers to the large shapes
    return backend == "torch" or device_of(backend) == "cuda" or (dtype != torch.float16 and _size(name) < 450_000)


FORWARD = [
    pytest.param(name, dtype, backend, id=f"{backend}-{str(dtype)[6:]}-{name}")
    for name, dtype in CHOSEN
    for backend in ("cpu", "onednn", "torch", "triton")
    if _runs(name, dtype, backend)
]


@pytest.mark.parametrize(("name", "dtype", "backend"), FORWARD)
def test_forward(name, dtype, backend, place, poisoned_memory):
    case = case_in(name, dtype).on(place)
    skip_unless_it_runs(backend, case.operator, dtype)
    before = [x.clone() for x in case.tensors()]
    with torch.no_grad(), clipfast.backend(backend):
        results = case.ours()
    for got, peer, exact in zip(results, case.peer(), case.on("cpu").exact(), strict=True):
        assert_accurate(got, peer, exact, what=name)
    assert all(torch.equal(x, y) for x, y in zip(before, case.tensors(), strict=True)), "an argument was overwritten"


def _gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor], upstreams: list[list[Tensor]]) -> list[Tensor]:
    """For the first upstream gradient; of scalars for each, stacked, since the error of one number is luck."""
    scalars = [x for x in leaves if x.numel() == 1]
    gradients = [*torch.autograd.grad(outputs, [x for x in leaves if x.numel() > 1], upstreams[0], retain_graph=True)]
    for x in scalars:
        drawn = [torch.autograd.grad(outputs, x, upstream, retain_graph=True)[0] for upstream in upstreams]
        gradients.append(torch.stack(drawn))
    return gradients


GRADIENTS = [p for p in FORWARD if p.values[2] not in HAVE]


@pytest.mark.parametrize(("name", "dtype", "backend"), GRADIENTS)
def test_gradients(name, dtype, backend, place):
    check_gradients(name, dtype, backend, place, seed=1)


def check_gradients(name, dtype, backend, place, seed):
    """Of every floating argument, for the random upstream gradients that the seed gives."""
    case = case_in(name, dtype)
    results = []
    for wide, run in ((False, Case.ours), (False, Case.peer), (True, Case.exact)):
        on = case.on(place) if run is Case.ours else case
        leaf = on.map(lambda x, wide=wide: (x.double() if wide else x).clone().requires_grad_())
        generator = torch.Generator().manual_seed(seed)
        with clipfast.backend(backend):
            outputs = run(leaf)
        leaves = [x for x in leaf.tensors() if x.requires_grad and x.numel()]
        draws = 64 if any(x.numel() == 1 for x in leaves) else 1
        upstreams = [[torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in outputs] for _ in range(draws)]
        if leaf.operator == "patch_embed":
            leaves = [x for x in leaves if x is not leaf.options.get("mean") and x is not leaf.options.get("std")]
        results.append([*outputs, *_gradients(outputs, leaves, upstreams)])
    for i, (got, peer, exact) in enumerate(zip(*results, strict=True)):
        assert_accurate(got, peer, exact.detach(), what=f"{name}, output or gradient {i}")


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["x", "weight", "bias"])
def test_the_gradient_of_one_argument_of_a_layer_norm(wanted):
    """Prompt learners and norm tuners freeze the rest; half-precision rows do not round the weight's gradient."""
    arguments = [torch.randn(200, 64).bfloat16(), *norm(64)]
    upstream = torch.randn(200, 64).bfloat16()
    gradients = []
    for run, dtype in ((Case.ours, None), (Case.peer, None), (Case.exact, torch.float64)):
        given_arguments = [x.to(dtype or x.dtype, copy=True) for x in arguments]
        leaf = given_arguments[wanted].requires_grad_()
        (y,) = run(Case("layer_norm", (*given_arguments,)))
        gradients += torch.autograd.grad(y, leaf, upstream.to(y.dtype))
    assert_accurate(*gradients)


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("operator", ["linear", "attention_pool"])
def test_fewer_rows_round_no_more_than_four(operator, rows):
    """The sums of MKL's float32 product of one to three rows do: in a single chain."""

    def error(n):
        torch.manual_seed(0)
        x, tokens, projections = torch.randn(4, 2048), torch.randn(4 * 3, 2048), [weights(1024, 2048) for _ in "qkv"]
        case = Case("linear", (x[:n], *projections[0]))
        if operator == "attention_pool":
            offsets = offsets_of(*[3] * n)
            arguments = (x[:n], tokens[: 3 * n], offsets, *[w for projection in projections for w in projection])
            case = Case("attention_pool", arguments, {"heads": 16})
        with torch.no_grad(), clipfast.backend("torch"):
            return (case.ours()[0] - case.exact()[0]).square().mean().sqrt()

    assert error(rows) < 1.15 * error(4)


@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name):
    case = SMALL[name].map(lambda x: x.double().clone().requires_grad_())
    leaves = case.tensors()

    def function(*tensors):
        given_tensors = iter(tensors)
        return case.map(lambda x: next(given_tensors)).ours()

    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=False)


@pytest.mark.parametrize("name", SMALL)
def test_every_backend_knows_every_argument(name):
    """In float64 the wiring shows: an eps, a scale or a bias that a backend forgets is no rounding."""
    case = SMALL[name].map(lambda x: x.double())
    for backend in ("torch", "reference"):
        with clipfast.backend(backend):
            for got, exact in zip(case.ours(), case.exact(), strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


STRIDED = [
    p
    for p in FORWARD
    if torch.float16 not in p.values and _size(p.values[0]) < (60_000 if p.values[2] == "triton" else 160_000)
]


def _wider(x: Tensor) -> Tensor:
    """x as the rows of a wider tensor, NaN between them: what `split` and slices of activations are."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 8), float("nan"), dtype=x.dtype, device=x.device)
    return wide[..., : x.shape[-1]].copy_(x)


VIEWS = {
    "gaps": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "wider": lambda x: _wider(x) if x.ndim > 1 else x.clone(),
    "transposed": lambda x: x.t().contiguous().t() if x.ndim == 2 else x.clone(),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize(("name", "dtype", "backend"), STRIDED)
def test_strides(name, dtype, backend, place):
    """Every argument as a view with gaps, as rows of something wider, transposed in memory, and at an odd address."""
    case = case_in(name, dtype)
    skip_unless_it_runs(backend, case.operator, dtype)
    exacts = case.exact()
    with torch.no_grad(), clipfast.backend(backend):
        for what, view in VIEWS.items():
            viewed = case.on(place).map(view)
            for got, peer, exact in zip(viewed.ours(), viewed.peer(), exacts, strict=True):
                assert_accurate(got, peer, exact, what=f"{name}, {what}")


UPSTREAM = {
    **VIEWS,
    "one number for all": lambda x: x.flatten()[0].expand(x.shape),
    "one row for all": lambda x: x[(0,) * (x.ndim - 1)].expand(x.shape),
}
SMALLEST = {op: min((n for n, c in CASES.items() if c.operator == op), key=_size) for op in dispatch.OPERATORS}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", [*SMALLEST.values(), "layer_norm residual", "linear (70,) 191 37 ['activation']"])
def test_gradients_of_views(name, backend, place):
    """Arguments and upstream gradients with strides of their own, 0 among them: as of the same numbers in a row."""

    def run(arguments, upstream):
        leaf = arguments.map(lambda x: x.detach().requires_grad_())
        with clipfast.backend(backend):
            outputs = leaf.ours()
        leaves = [x for x in leaf.tensors() if x.requires_grad and x.numel()]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [upstream(torch.sin(x.detach())) for x in outputs])]

    case = CASES[name].on(place)
    for what, view in UPSTREAM.items():
        got = run(case.map(VIEWS[what]) if what in VIEWS else case, view)
        wanted = run(case.map(torch.clone), lambda x, view=view: view(x).contiguous())
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, i=i, w=what: f"{w}, {i}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_onednn_rounds_a_projection_once(dtype):
    skip_unless_it_runs("onednn", "project", dtype)
    case = Case("project", (torch.randn(8, 512).to(dtype), *norm(512), weights(512, 512)[0].to(dtype)))
    with torch.no_grad(), clipfast.backend("onednn"):
        (got,) = case.ours()
    assert (got != case.exact()[0].to(dtype)).double().mean() < 0.01


@pytest.mark.parametrize("backend", ["cpu", "onednn", "torch"])
def test_pixels_are_rounded_after_they_are_normalised(backend):
    """A patch of one pixel and a weight of one: in bfloat16 the result is the normalised pixel, rounded once."""
    skip_unless_it_runs(backend, "patch_embed", torch.bfloat16)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    weight = torch.eye(3).view(3, 3, 1, 1).bfloat16()
    mean, std = torch.tensor(reference.MEAN, dtype=torch.float64), torch.tensor(reference.STD, dtype=torch.float64)
    with torch.no_grad(), clipfast.backend(backend):
        got = ops.patch_embed(pixels, weight, torch.zeros(3), torch.zeros(257, 3), mean=mean, std=std)[0, 1:]
    exact = (torch.arange(256.0, dtype=torch.float64)[:, None] / 255 - mean) / std
    torch.testing.assert_close(got.double(), exact, rtol=0.51 * torch.finfo(torch.bfloat16).eps, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "onednn", "torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_nothing_in_nothing_out(backend, dtype):
    torch.manual_seed(0)
    cases = [
        (Case("layer_norm", (torch.randn(0, 8), *norm(8))), (0, 8)),
        (Case("linear", (torch.randn(0, 8), *weights(5, 8)), {"activation": "quick_gelu"}), (0, 5)),
        (Case("linear", (torch.randn(3, 0, 8), *weights(5, 8)), {"residual": torch.randn(3, 0, 5)}), (3, 0, 5)),
        (mlp_case((0,), 8, 16), (0, 8)),
        (mlp_case((2, 0), 8, 16), (2, 0, 8)),
        (attention_case([], 2, 4, causal=True), (0, 8)),
        (attention_case([0, 0], 2, 4, causal=False), (0, 8)),
        (pool_case([], 8, 2), (0, 8)),
        (patch_case(0, 16, 16, 8, 12), (0, 5, 12)),
        (Case("project", (torch.randn(0, 8), *norm(8), torch.randn(8, 3))), (0, 3)),
        (Case("logits", (torch.randn(0, 8), torch.randn(4, 8), torch.tensor(1.0))), (0, 4)),
    ]
    with torch.no_grad(), clipfast.backend(backend):
        for case, shape in cases:
            skip_unless_it_runs(backend, "linear", dtype)
            result = case.map(lambda x: x.to(dtype)).ours()[0]
            assert (result.shape, result.dtype) == (shape, dtype), case.operator


# ---- laws ----

LENGTHS = st.lists(st.integers(0, 9), min_size=0, max_size=6)
FEW = settings(max_examples=25)
SEEDS = st.integers(0, 2**31)


def _doubles(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(lengths=LENGTHS, seed=SEEDS, causal=st.booleans())
@FEW
def test_packed_sequences_are_the_sequences_alone(lengths, seed, causal):
    (qkv,) = _doubles(seed, (sum(lengths), 3, 2, 4))
    packed = ops.attention(qkv, offsets_of(*lengths), causal=causal)
    alone = [ops.attention(part, [0, len(part)], causal=causal) for part in qkv.split(lengths)] if lengths else []
    _near(packed, torch.cat([qkv[:0, 0].flatten(1), *alone]))
    _near(packed, ops.attention(qkv, Rows(tuple(lengths)), causal=causal))
    _near(packed, ops.attention(qkv, torch.tensor(offsets_of(*lengths), dtype=torch.int32), causal=causal))


@given(lengths=LENGTHS, seed=SEEDS, data=st.data())
@FEW
def test_a_later_token_changes_no_earlier_causal_row(lengths, seed, data):
    total = sum(lengths)
    qkv, other = _doubles(seed, (total, 3, 2, 4), (total, 3, 2, 4))
    before = ops.attention(qkv, offsets_of(*lengths), causal=True)
    cut = data.draw(st.integers(0, total))
    qkv[cut:] = 10 * other[cut:]
    _near(ops.attention(qkv, offsets_of(*lengths), causal=True)[:cut], before[:cut])
    # and the row itself does count
    if cut < total:
        assert (ops.attention(qkv, offsets_of(*lengths), causal=True)[cut] - before[cut]).abs().max() > 1e-6


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=SEEDS)
@FEW
def test_the_order_of_keys_and_values_changes_nothing(lengths, seed):
    offsets = offsets_of(*lengths)
    order = torch.cat([start + torch.randperm(n) for start, n in zip(offsets, lengths, strict=False)])
    total = sum(lengths)
    qkv, query, tokens, *w = _doubles(seed, (total, 3, 2, 4), (len(lengths), 6), (total, 6), *[(8, 6), (8,)] * 3)
    shuffled = torch.cat([qkv[:, :1], qkv[order, 1:]], dim=1)
    _near(ops.attention(shuffled, offsets, causal=False), ops.attention(qkv, offsets, causal=False))
    pooled = ops.attention_pool(query, tokens, offsets, *w, heads=2)
    _near(ops.attention_pool(query, tokens[order], offsets, *w, heads=2), pooled)
    # the softmax drops what a key bias adds
    w[3] = w[3] + 100
    _near(ops.attention_pool(query, tokens, offsets, *w, heads=2), pooled)


@given(seed=SEEDS, width=st.integers(2, 40), shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
@FEW
def test_layer_norm_ignores_shift_and_scale(seed, width, shift, scale):
    x, weight, bias = _doubles(seed, (3, width), (width,), (width,))
    x = x + torch.arange(width)
    _near(ops.layer_norm(scale * (x + shift), weight, bias, 0.0), ops.layer_norm(x, weight, bias, 0.0))


@given(n_images=st.integers(0, 5), n_texts=st.integers(0, 5), seed=SEEDS)
@FEW
def test_swapping_the_towers_transposes_the_logits(n_images, n_texts, seed):
    images, texts, scale = _doubles(seed, (n_images, 6), (n_texts, 6), ())
    per_image, per_text = ops.logits(images, texts, scale)
    assert torch.equal(per_image.t(), per_text)
    _near(ops.logits(texts, images, scale)[0], per_text)


# ---- wrong arguments ----


def test_wrong_arguments_are_named():
    x, (weight, bias) = torch.randn(4, 6), weights(5, 6)
    affine = norm(6)
    mlp = [x, *affine, *weights(7, 6), *weights(6, 7)]
    qkv = torch.randn(4, 3, 2, 3)
    pool = [torch.randn(1, 6), x, [0, 4], *weights(8, 6), *weights(8, 6), *weights(8, 6)]
    patch = [*patch_case(1, 8, 8, 4, 6).arguments]

    def swap(arguments, i, value):
        return [*arguments[:i], value, *arguments[i + 1 :]]

    wrong = [
        (lambda: ops.layer_norm(x, affine[0][1:], affine[1]), r"weight must be \[6\], got \[5\]"),
        (lambda: ops.layer_norm(x, affine[0], affine[1][1:]), r"bias must be \[6\], got \[5\]"),
        (lambda: ops.linear(x, weight.t()), r"weight must be \[\*, 6\], got \[6, 5\]"),
        (lambda: ops.linear(x, weight, bias[1:]), r"bias must be \[5\], got \[4\]"),
        (lambda: ops.linear(x, weight, residual=x), r"residual must be \[4, 5\], got \[4, 6\]"),
        (lambda: ops.linear(x, weight, activation="relu"), "activation must be one of .*'relu'"),
        *[
            (lambda i=i: ops.mlp(*swap(mlp, i, torch.ones(3, 3))), f"{name} must be")
            for i, name in enumerate(
                ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"), start=1
            )
        ],
        (lambda: ops.mlp(*mlp, activation=None), "activation must be one of"),
        (lambda: ops.attention(qkv[:, :2], [0, 4], causal=True), r"qkv must be \[\*, 3, \*, \*\], got \[4, 2, 2, 3\]"),
        (lambda: ops.attention(qkv, [0, 3], causal=True), "offsets end at 3 but qkv has 4 rows"),
        (lambda: ops.attention(qkv, [1, 4], causal=True), r"offsets must start at 0 .* got \[1, 4\]"),
        (lambda: ops.attention(qkv, [0, 3, 2, 4], causal=True), "offsets must .* never decrease"),
        (lambda: ops.attention(qkv, [], causal=True), "offsets must start at 0"),
        (lambda: ops.attention_pool(*swap(pool, 0, x), heads=2), r"query must be \[1, 6\], got \[4, 6\]"),
        (lambda: ops.attention_pool(*swap(pool, 2, [0, 5]), heads=2), "offsets end at 5 but tokens has 4 rows"),
        (lambda: ops.attention_pool(*swap(swap(pool, 2, [0, 0, 4]), 0, x[:2]), heads=2), "one is empty"),
        (lambda: ops.attention_pool(*pool, heads=3), "8 rows, which do not divide into 3 heads"),
        (lambda: ops.attention_pool(*swap(pool, 5, weight), heads=2), r"k_weight must be \[8, 6\], got \[5, 6\]"),
        (lambda: ops.attention_pool(*swap(pool, 8, bias), heads=2), r"v_bias must be \[8\], got \[5\]"),
        (lambda: ops.patch_embed(*swap(patch, 0, patch[0][:, :2])), r"images must be \[\*, 3, \*, \*\]"),
        (lambda: ops.patch_embed(*swap(patch, 0, patch[0][..., :4])), "2 x 1 patches of 4, .* is for 4"),
        (lambda: ops.patch_embed(*swap(patch, 2, patch[2][1:])), r"class_embedding must be \[6\], got \[5\]"),
        (lambda: ops.patch_embed(*swap(patch, 0, patch[0].byte())), "uint8 images need mean and std"),
        (lambda: ops.patch_embed(*swap(patch, 1, patch[1][..., :1])), r"weight must be \[6, 3, "),
        (
            lambda: ops.patch_embed(*swap(patch, 0, patch[0].byte()), mean=torch.zeros(2), std=torch.ones(3)),
            r"mean must be \[3\], got \[2\]",
        ),
        (lambda: ops.patch_embed(*patch, norm_weight=affine[0]), "norm_weight and norm_bias come together"),
        (lambda: ops.project(x, *affine, weight), r"projection must be \[6, \*\], got \[5, 6\]"),
        (lambda: ops.logits(x, weight[:, :5], torch.tensor(1.0)), r"text_features must be \[\*, 6\], got \[5, 5\]"),
        (lambda: ops.logits(x[0], x, torch.tensor(1.0)), r"image_features must be \[\*, \*\], got \[6\]"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="got torch.int64"):
        ops.patch_embed(*swap(patch, 0, patch[0].long()))
    for call in (
        lambda: ops.layer_norm(x, affine[0].to("meta"), affine[1]),
        lambda: ops.linear(x, weight, bias.to("meta")),
        lambda: ops.mlp(*swap(mlp, 3, mlp[3].to("meta"))),
        *(lambda i=i: ops.mlp(*swap(mlp, i, mlp[i].to("meta"))) for i in (2, 4, 6)),
        lambda: ops.attention_pool(*swap(pool, 0, pool[0].to("meta")), heads=2),
        *(lambda i=i: ops.attention_pool(*swap(pool, i, pool[i].to("meta")), heads=2) for i in (4, 6, 8)),
        *(lambda i=i: ops.patch_embed(*swap(patch, i, patch[i].to("meta"))) for i in range(4)),
        lambda: ops.patch_embed(*patch, norm_weight=affine[0].to("meta"), norm_bias=affine[1]),
        lambda: ops.patch_embed(*patch, norm_weight=affine[0], norm_bias=affine[1].to("meta")),
        lambda: ops.project(x, *affine, torch.ones(6, 2, device="meta")),
        lambda: ops.project(x, affine[0], affine[1].to("meta"), torch.ones(6, 2)),
        lambda: ops.logits(x, x.to("meta"), torch.tensor(1.0)),
    ):
        with pytest.raises(RuntimeError, match="is on (cpu|meta) but .* is on (meta|cpu); move one of them"):
            call()
