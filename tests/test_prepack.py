"""Weights whose layout is kept between calls: the same function, no edit that PyTorch counts is missed."""

from __future__ import annotations

import copy
import functools
import gc
import io
import weakref

import pytest
import torch
from torch import nn

import clipfast
from clipfast import dispatch, ops
from clipfast.blocks import Block, Stack
from clipfast.kernels import cpu_blocks, cpu_linear, kept, onednn

from .accuracy import assert_accurate
from .clips import RESNET, VIT, assert_same, convert, encode, make_exact, make_images, make_texts, make_trio
from .op_cases import Case, mlp_case, weights
from .test_blocks import make_weights
from .test_weights import EDITS, IMAGES, TEXTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["cpu", "onednn"])
def products(request, monkeypatch):
    """The backend whose products read the layouts: ours, or oneDNN as where our library is missing."""
    dtype = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else torch.float32
    if request.param == "cpu":
        request.getfixturevalue("cpu_library")
        if dtype == torch.float16:
            pytest.skip("cpu: has no float16 products")
        # for any number of rows
        monkeypatch.setattr(dispatch.tuning, "onednn_is_better", lambda *facts: None)
    else:
        monkeypatch.setattr(dispatch.cpu_library, "missing", lambda: "left out of this test")
    monkeypatch.setattr(dispatch, "_decisions", {})
    # it is kept for the process: what is decided here is no other test's
    monkeypatch.setattr(dispatch, "_usual_backend", functools.cache(dispatch._usual_backend.__wrapped__))
    reason = dispatch._onednn_refuses("linear", dispatch.Call("cpu", dtype)) if request.param == "onednn" else None
    if reason is not None:
        pytest.skip(f"onednn: {reason}")
    return request.param


@pytest.fixture
def layouts(monkeypatch):
    """The layouts that have been made to be kept."""
    made = []

    def count(module, name):
        plain = getattr(module, name)

        def counted(weight, *arguments):
            made.append(weight.shape)
            return plain(weight, *arguments)

        monkeypatch.setattr(module, name, counted)

    count(onednn, "_kept_layout")
    count(cpu_linear, "pack")
    monkeypatch.setattr(cpu_blocks, "pack", cpu_linear.pack)
    return made


def _matrices(case):
    return [x for x in case.arguments if isinstance(x, torch.Tensor) and x.ndim == 2][1:]


CASES = {
    "linear": lambda rows: Case("linear", (torch.randn(rows, 512), *weights(384, 512)), {}),
    "linear, odd": lambda rows: Case("linear", (torch.randn(rows, 77), *weights(53, 77)), {}),
    "linear, no bias": lambda rows: Case("linear", (torch.randn(rows, 512), weights(384, 512)[0], None), {}),
    "linear, quick_gelu": lambda rows: Case(
        "linear", (torch.randn(rows, 512), *weights(384, 512)), {"activation": "quick_gelu"}
    ),
    "linear, residual": lambda rows: Case(
        "linear", (torch.randn(rows, 512), *weights(384, 512)), {"residual": torch.randn(rows, 384)}
    ),
    "mlp": lambda rows: mlp_case((rows,), 256, 1024),
    "mlp, gelu": lambda rows: mlp_case((rows,), 256, 1024, activation="gelu"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [0, 1, 16, 65, 600])
@pytest.mark.parametrize("name", CASES)
def test_operators_round_as_little_as_ever(name, rows, dtype, products, layouts):
    torch.manual_seed(0)
    case = CASES[name](rows).map(lambda x: x.to(dtype))
    kept.keep(_matrices(case))
    with torch.no_grad(), clipfast.backend(products):
        for _ in range(2):
            for got, peer, exact in zip(case.ours(), case.peer(), case.exact(), strict=True):
                assert_accurate(got, peer, exact, what=name)
    assert len(layouts) == len(_matrices(case)), "made once"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_towers(config, dtype, layouts):
    if config is RESNET and dtype == torch.float16:
        pytest.skip("openai-clip's float16 convolutions are slow on a CPU")
    trio = make_trio(config)
    assert trio[0].prepack_weights() is trio[0]
    for model in trio[:2]:
        convert(model, dtype)
    with torch.no_grad():
        assert_same(trio, encode(make_images(config, 8), make_texts(config, 8)), what=str(dtype))
    assert layouts


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_is_counted_is_seen_by_the_next_call(name):
    trio = make_trio(VIT)
    trio[0].prepack_weights()
    with torch.no_grad():
        trio[0](IMAGES, TEXTS)
    for model in trio[:2]:
        EDITS[name](model)
    if name == "one element of a weight":  # in place through .data: PyTorch does not count it
        trio[0].prepack_weights()
    trio[2] = make_exact(trio[1])
    with torch.no_grad():
        assert_same(trio, encode(IMAGES, TEXTS), what=name)


def test_layouts_are_made_once_and_again_after_an_edit(products, layouts):
    model = clipfast.CLIP(*VIT).eval().prepack_weights()
    with torch.no_grad():
        model(IMAGES, TEXTS)
        # of six blocks' four matrices all but the last blocks' joint projections, which are never multiplied whole
        assert len(layouts) == 6 * 4 - 2
        model(IMAGES[:1], TEXTS[:2])
        assert len(layouts) == 22
        model.transformer.resblocks[0].mlp.c_fc.weight.add_(1)
        model(IMAGES, TEXTS)
        assert len(layouts) == 23
        torch.set_float32_matmul_precision("high")
        try:
            model(IMAGES, TEXTS)
        finally:
            torch.set_float32_matmul_precision("highest")
        # oneDNN's chains are whole there
        assert len(layouts) == 23 + (22 if products == "onednn" else 0)


def test_layouts_are_made_after_calls_without(layouts):
    """And those calls found the weights as they lie."""
    model = clipfast.CLIP(*VIT).eval()
    with torch.no_grad():
        model(IMAGES, TEXTS)
        for enable, count in ((True, 22), (False, 22), (True, 44)):
            model.prepack_weights(enable)
            model(IMAGES, TEXTS)
            assert len(layouts) == count


def test_a_stack_without_an_index_multiplies_all_its_matrices_whole(layouts):
    stack = Stack([Block(make_weights(64, 96), 2)])
    kept.keep(stack.matrices)
    with torch.no_grad():
        ops.blocks(torch.randn(5, 64), [0, 5], stack, causal=True)
    assert len(layouts) == 4


def test_training_goes_on_as_ever():
    plain = clipfast.CLIP(*VIT)
    packed = copy.deepcopy(plain).prepack_weights()
    for model in (plain, packed):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            with torch.no_grad():
                model(IMAGES, TEXTS)
            optimiser.zero_grad()
            sum(x.square().sum() for x in model(IMAGES, TEXTS)).backward()
            optimiser.step()
    for ours, theirs in zip(packed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_memory_goes_with_the_model_or_when_told():
    def count():
        gc.collect()
        return len(kept._kept)

    before = count()
    model = clipfast.CLIP(*VIT).eval().prepack_weights()
    with torch.no_grad():
        model(IMAGES, TEXTS)
    packed = weakref.ref(kept._found(model.transformer.resblocks[0].mlp.c_fc.weight))
    assert count() == before + 6 * 4
    assert model.prepack_weights(False) is model
    assert count() == before and packed() is None
    model.prepack_weights(False)
    model.prepack_weights()
    del model
    assert count() == before


def test_copies_start_without():
    model = clipfast.CLIP(*VIT).eval().prepack_weights()
    with torch.no_grad():
        expected = model(IMAGES, TEXTS)[0]
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
            assert not any(map(kept.is_kept, other.parameters()))
            torch.testing.assert_close(other(IMAGES, TEXTS)[0], expected, rtol=1e-5, atol=1e-5)


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = clipfast.CLIP(*VIT).eval()
    with pytest.raises(ValueError, match="made in inference mode"):
        model.prepack_weights()
    assert not any(id(parameter) in kept._kept for parameter in model.parameters())


def test_another_storage_at_the_same_address_is_seen(products):
    """As after .half().float(), where the memory that was freed may be given out again."""
    memory = bytearray(4 * 8 * 12)
    weight = torch.frombuffer(memory, dtype=torch.float32).view(8, 12).normal_()
    x = torch.randn(3, 12)
    dispatch.prepack([weight])
    with torch.no_grad(), clipfast.backend(products):
        first = ops.linear(x, weight)
        weight.data = torch.frombuffer(memory, dtype=torch.float32).view(8, 12).neg_()
        torch.testing.assert_close(ops.linear(x, weight), -first)
    dispatch.prepack([weight], False)


def test_another_part_of_the_same_storage_is_seen(products):
    """From elsewhere, fewer rows, or with rows and columns swapped."""
    memory, x = torch.randn(30, 12), torch.randn(3, 12)
    weight = nn.Parameter(memory[:12], requires_grad=False)
    dispatch.prepack([weight])
    with torch.no_grad(), clipfast.backend(products):
        for part in (memory[:12], memory[9:21], memory[9:17], memory[9:21], memory[9:21].t()):
            weight.data = part
            torch.testing.assert_close(ops.linear(x, weight), x @ part.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_weights_converted_in_inference_mode_are_kept_no_longer(dtype, products):
    """What the conversion puts into a parameter is a tensor whose edits PyTorch does not count."""
    linear = nn.Linear(12, 8, bias=False)
    x = torch.randn(3, 12).to(dtype)
    dispatch.prepack([linear.weight])
    with torch.inference_mode(), clipfast.backend(products):
        linear.double().to(dtype)
        first = ops.linear(x, linear.weight)
        linear.weight.neg_()
        torch.testing.assert_close(ops.linear(x, linear.weight), -first)


def test_a_module_that_is_replaced_is_called():
    model = clipfast.CLIP(*VIT).eval().prepack_weights()
    with torch.no_grad():
        before = model.encode_text(TEXTS)
        model.transformer.resblocks[0].mlp.c_fc = nn.Linear(128, 512)
        assert (model.encode_text(TEXTS) - before).abs().max() > 1e-3


def test_operators_ask_for_it_too(products):
    weight = torch.randn(8, 12)
    x = torch.randn(3, 12)
    dispatch.prepack([weight])
    with torch.no_grad(), clipfast.backend(products):
        first = ops.linear(x, weight)
        weight.neg_()
        torch.testing.assert_close(ops.linear(x, weight), -first)
    dispatch.prepack([weight], False)
    assert not kept.is_kept(weight)
