"""Residual attention blocks as one operator: on a CPU one call of libclipfast_cpu, elsewhere what they are made of."""

from __future__ import annotations

import copy
import ctypes
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clipfast
from clipfast import dispatch, ops, reference, tuning
from clipfast.blocks import Block, BlockWeights, Projection, Stack
from clipfast.kernels import cpu_attention, cpu_blocks, cpu_linear, kept
from clipfast.kernels import cpu_library as library
from clipfast.kernels.cpu_library import BlockArgs, BlocksArgs
from clipfast.model import convert_weights
from clipfast.packing import Rows

from . import csrc
from .accuracy import assert_accurate
from .op_cases import PEERS, norm, offsets_of, weights
from .tiny_clips import randomise

DTYPES = [torch.float32, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
EPS = (1e-3, 0.1)  # of the two LayerNorms, so that one taken for the other shows


def make_weights(width: int, hidden: int, dtype: torch.dtype = torch.float32) -> BlockWeights:
    """LayerNorms in float32, as CLIP has them."""
    attention = (*weights(3 * width, width), *weights(width, width))
    mlp = (*weights(hidden, width), *weights(width, hidden))
    matrices = [tensor.to(dtype) for tensor in (*attention, *mlp)]
    return BlockWeights(*norm(width), *matrices[:4], *norm(width), *matrices[4:])


def one_by_one(functions, x: Tensor, lengths, weights: BlockWeights, heads: int, causal: bool, activation: str):
    """The block written with somebody's layer_norm, linear, attention and mlp."""
    layer_norm, linear, attention, mlp = functions
    qkv = linear(layer_norm(x, *weights[:2], EPS[0]), *weights[2:4]).view(len(x), 3, heads, -1)
    attended = attention(qkv, offsets_of(*lengths), causal=causal)
    x = linear(attended, *weights[4:6], residual=x)
    return mlp(x, *weights[6:], activation=activation, eps=EPS[1])


PEER = [PEERS[name] for name in ("layer_norm", "linear", "attention", "mlp")]
EXACT = [getattr(reference, name) for name in ("layer_norm", "linear", "attention", "mlp")]


def exact(x: Tensor, lengths, weights: BlockWeights, *options) -> Tensor:
    return one_by_one(EXACT, x.double(), lengths, [tensor.double() for tensor in weights], *options)


def by_kernels(x: Tensor, lengths, weights: BlockWeights, heads: int, causal: bool, activation: str, form: str):
    """The same kernels of the library, called one after the other."""
    norm_1, qkv, out, norm_2, fc1, fc2 = (weights[i : i + 2] for i in range(0, 12, 2))
    y = cpu_linear.linear(x, *qkv, None, None, form, (*norm_1, EPS[0]))
    y = y.view(len(x), 3, heads, x.shape[1] // heads)
    y = cpu_linear.linear(cpu_attention.attention(y, Rows(tuple(lengths)), causal, None, form), *out, None, x, form)
    hidden = cpu_linear.linear(y, *fc1, activation, None, form, (*norm_2, EPS[1]))
    return cpu_linear.linear(hidden, *fc2, None, y, form)


def run(x, lengths, weights, heads, causal, activation="quick_gelu", form="best"):
    blocks = [Block(weights, heads, activation, EPS)]
    return cpu_blocks.blocks(x, Rows(tuple(lengths)), blocks, causal, instructions=form)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("lengths", "width", "heads", "causal", "activation"),
    [
        ([50], 768, 12, False, "quick_gelu"),
        ([9, 24, 8, 13, 17], 512, 8, True, "quick_gelu"),
        ([5, 0, 31], 93, 3, False, "gelu"),
        ([1] * 8, 64, 2, True, "gelu"),
    ],
)
@by_dtype
def test_accuracy(cpu_library, backend, lengths, width, heads, causal, activation, dtype):
    x, block = torch.randn(sum(lengths), width).to(dtype), make_weights(width, 4 * width, dtype)
    options = (heads, causal, activation)
    with torch.no_grad(), clipfast.backend(backend):
        blocks = [Block(block, heads, activation, eps=EPS)]
        got = ops.blocks(x, offsets_of(*lengths), blocks, causal=causal)
        assert (dispatch.whole_blocks(x, blocks) is cpu_blocks.blocks) == (backend == "cpu")
    peer = one_by_one(PEER, x, lengths, block, *options)
    assert_accurate(got, peer, exact(x, lengths, block, *options))


@by_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[50], [7, 1, 30], [300] * 7, [1100, 3], [3, 1100], [0, 5, 0], [77] * 14, [20] * 51 + [5]],
    ids=lambda lengths: f"{len(lengths)} of {max(lengths)}",
)
def test_one_call_is_its_kernels_one_by_one(form, lengths, causal, dtype):
    """To the bit: few rows, more than pass together, and a sequence that alone is more."""
    x, block = torch.randn(sum(lengths), 64).to(dtype), make_weights(64, 160, dtype)
    before = x.clone()
    got = run(x, lengths, block, 2, causal, "gelu", form)
    assert torch.equal(got, by_kernels(x, lengths, block, 2, causal, "gelu", form))
    assert torch.equal(x, before)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=40),
    heads=st.integers(1, 4),
    head_width=st.integers(1, 20),
    hidden=st.integers(1, 150),
    threads=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
)
def test_any_shape_and_threads(cpu_library, lengths, heads, head_width, hidden, threads, dtype, causal):
    width = heads * head_width
    x, block = torch.randn(sum(lengths), width).to(dtype), make_weights(width, hidden, dtype)
    expected = by_kernels(x, lengths, block, heads, causal, "quick_gelu", "best")
    with csrc.threads(threads):
        assert torch.equal(run(x, lengths, block, heads, causal), expected)


@by_dtype
def test_how_tensors_lie_in_memory(form, dtype):
    """Strided rows, transposed and strided matrices, no biases, LayerNorms of another dtype."""
    x, block = torch.randn(30, 64).to(dtype), make_weights(64, 96, dtype)
    expected = run(x, [30], block, 2, False, form=form)
    other = block._replace(
        qkv_weight=block.qkv_weight.t().contiguous().t(),
        fc1_weight=torch.stack([block.fc1_weight] * 2, dim=2)[..., 0],
        fc2_bias=torch.stack([block.fc2_bias] * 2, dim=1)[:, 0],
        norm_1_bias=torch.stack([block.norm_1_bias] * 2, dim=1)[:, 0],
    )
    assert not any(tensor.is_contiguous() for tensor in (other.qkv_weight, other.fc1_weight, other.fc2_bias))
    strided = torch.stack([x, x], dim=2)[..., 0]
    assert torch.equal(run(strided, [30], other, 2, False, form=form), expected)
    zeros = block._replace(qkv_bias=torch.zeros(192, dtype=dtype), out_bias=torch.zeros(64, dtype=dtype))
    without = block._replace(qkv_bias=None, out_bias=None)
    assert torch.equal(*(run(x, [30], some, 2, False, form=form) for some in (zeros, without)))
    narrow = block._replace(norm_1_weight=block.norm_1_weight.bfloat16())
    wide = narrow._replace(norm_1_weight=narrow.norm_1_weight.float())
    assert torch.equal(*(run(x, [30], some, 2, False, form=form) for some in (narrow, wide)))


@by_dtype
def test_packed_weights_give_the_same_and_edits_are_seen(form, dtype):
    x, block = torch.randn(21, 64).to(dtype), make_weights(64, 160, dtype)
    matrices = [tensor for tensor in block if tensor.ndim == 2]
    expected = run(x, [21], block, 2, True, form=form)
    kept.keep(matrices)
    try:
        assert torch.equal(run(x, [21], block, 2, True, form=form), expected)
        for matrix in matrices:
            matrix.mul_(1.5)
            changed = run(x, [21], block, 2, True, form=form)
            assert torch.equal(changed, by_kernels(x, [21], block, 2, True, "quick_gelu", form))
            assert not torch.equal(changed, expected)
            expected = changed
    finally:
        kept.forget(matrices)


@by_dtype
def test_views_whose_signs_are_to_be_changed(cpu_library, dtype):
    """As the imaginary part of a conjugate is: its memory has the other signs."""
    x, block = torch.randn(9, 64).to(dtype), make_weights(64, 96, dtype)
    expected = run(x, [9], block, 2, True)
    negative = BlockWeights(*(torch._neg_view(-tensor) for tensor in block))
    assert all(tensor.is_neg() for tensor in negative)
    assert torch.equal(run(torch._neg_view(-x), [9], negative, 2, True), expected)
    packed = cpu_linear.pack(block.fc1_weight, "best")
    assert torch.equal(cpu_linear.pack(negative.fc1_weight, "best"), packed)


def test_threads_that_call_at_once(cpu_library):
    """Each has its own memory for what is computed in between."""
    block = make_weights(64, 256)
    calls = [(torch.randn(50 * n, 64), [50] * n) for n in range(1, 9)] * 4
    expected = [run(x, lengths, block, 2, False) for x, lengths in calls]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda call: run(*call, block, 2, False), calls))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@by_dtype
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[9], [50] * 12, [400, 20, 380], [1100, 1100], [50] * 36], ids=str)
def test_several_blocks_are_one_after_the_other(form, lengths, threads, dtype):
    """To the bit, whether threads share all sequences or each has its own; blocks differ in all but their width."""
    x = torch.randn(sum(lengths), 48).to(dtype)
    options = ((96, 2), (200, 4, "gelu"), (5, 1))
    blocks = [Block(make_weights(48, hidden, dtype), *rest, eps=EPS) for hidden, *rest in options]
    rows = Rows(tuple(lengths))
    expected, before = x, x.clone()
    for block in blocks:
        expected = by_kernels(expected, lengths, block.weights, block.heads, True, block.activation, form)
    with csrc.threads(threads):
        assert torch.equal(cpu_blocks.blocks(x, rows, blocks, True, instructions=form), expected)
        two = cpu_blocks.blocks(x, rows, blocks[:2], True, instructions=form)
        assert torch.equal(cpu_blocks.blocks(two, rows, blocks[2:], True, instructions=form), expected)
    assert torch.equal(x, before)
    assert torch.equal(cpu_blocks.blocks(x, rows, [], True, instructions=form), x)


@pytest.mark.parametrize(("count", "threads"), [(39, 40), (63, 64), (62, 63)])
def test_a_thread_without_sequences(cpu_library, count, threads):
    """Of n - 1 equal sequences on n threads one gets none, and the others no more than may be."""
    x, block = torch.randn(100 * count, 8), make_weights(8, 8)
    expected = run(x, [100] * count, block, 1, False)
    with csrc.threads(threads):
        assert torch.equal(run(x, [100] * count, block, 1, False), expected)


def test_sequences_without_rows(cpu_library):
    """In the library itself: Python does not ask it."""
    offsets = (ctypes.c_int32 * 3)()
    anything = ctypes.addressof(offsets)
    block = BlockArgs(ctypes.sizeof(BlockArgs), hidden=8, heads=1)
    args = BlocksArgs(ctypes.sizeof(BlocksArgs), ctypes.addressof(block), x=anything, out=anything + 4)
    args.offsets, args.count, args.sequences, args.width, args.threads = anything, 1, 2, 8, 2
    assert cpu_library.clipfast_cpu_blocks(args) == 0


def pooled_one_by_one(functions, x: Tensor, index: Tensor, lengths, weights: BlockWeights, heads: int, activation: str):
    """The rows `index` of the block, written with somebody's layer_norm, attention_pool, linear and mlp."""
    layer_norm, attention_pool, linear, mlp = functions
    y = layer_norm(x, *weights[:2], EPS[0])
    qkv = zip(weights.qkv_weight.chunk(3), weights.qkv_bias.chunk(3), strict=True)
    attended = attention_pool(y[index], y, offsets_of(*lengths), *(t for pair in qkv for t in pair), heads=heads)
    return mlp(linear(attended, *weights[4:6], residual=x[index]), *weights[6:], activation=activation, eps=EPS[1])


POOL_PEER = [PEERS[name] for name in ("layer_norm", "attention_pool", "linear", "mlp")]
POOL_EXACT = [getattr(reference, name) for name in ("layer_norm", "attention_pool", "linear", "mlp")]


def some_rows(lengths) -> Tensor:
    """The last row of the first sequence, the last but one of the second, and so on, as far as there are."""
    ends = torch.tensor(lengths).cumsum(0)
    return ends - 1 - torch.minimum(torch.arange(len(lengths)), torch.tensor(lengths) - 1)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("lengths", "width", "heads", "activation"),
    [([50], 768, 12, "quick_gelu"), ([9, 24, 8, 13, 17], 512, 8, "gelu"), ([5, 1, 31] * 7, 93, 3, "quick_gelu")],
)
@by_dtype
def test_accuracy_of_one_row_of_each_sequence(cpu_library, backend, lengths, width, heads, activation, dtype):
    x, block = torch.randn(sum(lengths), width).to(dtype), make_weights(width, 4 * width, dtype)
    index, options = some_rows(lengths), (lengths, block, heads, activation)
    with torch.no_grad(), clipfast.backend(backend):
        blocks = [Block(block, heads, activation, EPS)]
        got = ops.blocks(x, offsets_of(*lengths), blocks, causal=False, index=index)
        assert (dispatch.whole_blocks(x, blocks, pooled=True) is cpu_blocks.blocks) == (backend == "cpu")
    double = block._make(tensor.double() for tensor in block)
    exact = pooled_one_by_one(POOL_EXACT, x.double(), index, lengths, double, heads, activation)
    assert got.shape == (len(lengths), width)
    assert_accurate(got, pooled_one_by_one(POOL_PEER, x, index, *options), exact)


@by_dtype
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_row_of_each_sequence_after_other_blocks(form, threads, dtype):
    """To the bit what the blocks before and the last one give, and what each sequence gives alone: 37 of 3 lengths."""
    lengths = [50, 7, 30] * 12 + [1]
    x, index = torch.randn(sum(lengths), 48).to(dtype), some_rows(lengths)
    blocks = [Block(make_weights(48, hidden, dtype), *rest) for hidden, *rest in ((96, 2), (200, 4, "gelu"), (5, 1))]
    with csrc.threads(threads):
        got = cpu_blocks.blocks(x, Rows(tuple(lengths)), blocks, True, index, instructions=form)
        before = cpu_blocks.blocks(x, Rows(tuple(lengths)), blocks[:2], True, instructions=form)
        assert torch.equal(
            cpu_blocks.blocks(before, Rows(tuple(lengths)), blocks[2:], True, index, instructions=form), got
        )
    first = 0
    for i, length in enumerate(lengths):
        alone = cpu_blocks.blocks(
            x[first : first + length], Rows((length,)), blocks, True, index[i : i + 1] - first, instructions=form
        )
        assert torch.equal(alone[0], got[i])
        first += length


def test_one_row_of_weights_that_are_packed_strided_or_without_bias(cpu_library):
    lengths = [9, 4]
    x, block, rows = torch.randn(13, 64), make_weights(64, 96), Rows((9, 4))
    index = some_rows(lengths)

    def pooled(weights: BlockWeights, index: Tensor = index) -> Tensor:
        return cpu_blocks.blocks(x, rows, [Block(weights, 2)], False, index)

    expected = pooled(block)
    assert torch.equal(pooled(block._replace(qkv_weight=block.qkv_weight.t().contiguous().t())), expected)
    assert torch.equal(pooled(block, torch.stack([index, index], dim=1)[:, 0]), expected)
    zeros = block._replace(qkv_bias=torch.zeros(192), out_bias=torch.zeros(64))
    assert torch.equal(pooled(zeros), pooled(block._replace(qkv_bias=None, out_bias=None)))
    matrices = [tensor for tensor in block if tensor.ndim == 2]
    kept.keep(matrices)
    try:
        assert torch.equal(pooled(block), expected)
    finally:
        kept.forget(matrices)


@by_dtype
@pytest.mark.parametrize("count", [1, 3])
def test_projected_rows(form, count, dtype):
    """To the bit what the library's linear layer makes of the rows, however the projection's tensors lie."""
    lengths = [7, 1, 30, 12]
    x, index, rows = torch.randn(50, 48).to(dtype), some_rows(lengths), Rows(tuple(lengths))
    blocks = [Block(make_weights(48, 40 + n, dtype), 2, eps=EPS) for n in range(count)]
    projection = Projection(*norm(48), weights(48, 20)[0].to(dtype), 0.3)
    pooled = cpu_blocks.blocks(x, rows, blocks, True, index, instructions=form)
    of_norm = (projection.norm_weight, projection.norm_bias, 0.3)
    expected = cpu_linear.linear(pooled, projection.weight.t(), None, None, None, form, of_norm)
    strided = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in projection[:3]]
    turned = projection._replace(weight=projection.weight.t().contiguous().t())
    for some in (projection, projection._make([*strided, 0.3]), turned):
        assert torch.equal(cpu_blocks.blocks(x, rows, blocks, True, index, some, form), expected)


def test_a_projection_of_another_dtype(cpu_library):
    projection = Projection(*norm(64), torch.zeros(64, 20).bfloat16())
    blocks, index = [Block(make_weights(64, 96), 2)], torch.tensor([1])
    with pytest.raises(TypeError, match=r"x is torch.float32, projection torch.bfloat16: they must have one dtype"):
        cpu_blocks.blocks(torch.zeros(5, 64), Rows((5,)), blocks, True, index, projection)


def test_no_rows_to_project(cpu_library):
    x, blocks = torch.zeros(0, 64), [Block(make_weights(64, 96), 2)]
    projection = Projection(*norm(64), torch.randn(64, 20))
    with torch.no_grad():
        got = ops.blocks(x, [0], blocks, causal=True, index=torch.zeros(0).long(), projection=projection)
    assert got.shape == (0, 20)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"index": None}, ValueError, "a projection is of the rows that an index names, and there is no index"),
        ({"norm_weight": torch.zeros(63)}, ValueError, r"norm_weight must be \[64\], got \[63\]"),
        ({"norm_bias": torch.zeros(1)}, ValueError, r"norm_bias must be \[64\], got \[1\]"),
        ({"weight": torch.zeros(20, 64)}, ValueError, r"projection must be \[64, \*\], got \[20, 64\]"),
        ({"weight": torch.zeros(64, 20, device="meta")}, RuntimeError, "x is on cpu but projection is on meta"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_refusals_of_a_projection(cpu_library, backend, changes, error, message):
    index = changes.get("index", torch.tensor([1, 4]))
    others = {name: change for name, change in changes.items() if name != "index"}
    projection = Projection(*norm(64), torch.randn(64, 20))._replace(**others)
    options = {"causal": False, "index": index, "projection": projection}
    with torch.no_grad(), clipfast.backend(backend), pytest.raises(error, match=message):
        ops.blocks(torch.zeros(5, 64), [0, 2, 5], [Block(make_weights(64, 96), 2)], **options)


@pytest.mark.parametrize("index", [[-1, 5], [0, 3], [4, 9], [0, 1 << 40]], ids=str)
def test_a_row_of_another_sequence_is_refused(cpu_library, index):
    blocks = [Block(make_weights(64, 96), 2)]
    for backend in ("cpu", "torch"):
        with torch.no_grad(), clipfast.backend(backend), pytest.raises(RuntimeError, match="a row of its own sequence"):
            ops.blocks(torch.randn(9, 64), [0, 4, 9], blocks, causal=False, index=torch.tensor(index))


@pytest.mark.parametrize(
    ("index", "lengths", "count", "error", "message"),
    [
        (torch.tensor([1]), [2, 3], 1, ValueError, r"index must be \[2\], got \[1\]"),
        ([1, 4], [2, 3], 1, TypeError, "index must be a tensor of int64, got list"),
        (torch.tensor([1, 4], dtype=torch.int32), [2, 3], 1, TypeError, "index must be int64, got torch.int32"),
        (torch.tensor([1, 4]), [5, 0], 1, ValueError, "every sequence needs a row to attend to, and one is empty"),
        (torch.tensor([1, 4]), [2, 3], 0, ValueError, "there is no block"),
    ],
)
def test_refusals_of_an_index(index, lengths, count, error, message):
    blocks = [Block(make_weights(64, 96), 2)] * count
    with pytest.raises(error, match=message):
        ops.blocks(torch.zeros(5, 64), offsets_of(*lengths), blocks, causal=False, index=index)


@pytest.fixture
def preferred(cpu_library, monkeypatch):
    """Our products, on a CPU for which oneDNN has kernels, too."""
    monkeypatch.setattr(tuning, "onednn_is_better", lambda *of: None)
    monkeypatch.setattr(dispatch, "_decisions", {})


def whole(x: Tensor, weights: BlockWeights) -> bool:
    return dispatch.whole_blocks(x, [Block(weights, 2)]) is cpu_blocks.blocks


@by_dtype
def test_where_they_are_what_they_are_made_of(preferred, dtype):
    """With gradients, in autocast, with operands of several dtypes; one block of several is enough."""
    x, block = torch.randn(10, 64).to(dtype), make_weights(64, 128, dtype)
    other = block._replace(out_weight=block.out_weight.double())
    assert whole(x, block) and not whole(x, other)
    assert dispatch.whole_blocks(x, [Block(block, 2), Block(other, 2)]) is None
    assert not whole(x.half(), make_weights(64, 128, torch.float16))
    with torch.autocast("cpu"):
        assert not whole(x, block)
    leaves = [x.clone().requires_grad_(), *(tensor.clone().requires_grad_() for tensor in block)]
    assert not whole(leaves[0], block) and not whole(x, BlockWeights(*leaves[1:]))
    y = ops.blocks(leaves[0], [0, 10], [Block(BlockWeights(*leaves[1:]), 2, eps=EPS)], causal=True)
    options = (x, [10], block, 2, True, "quick_gelu")
    assert_accurate(y.detach(), one_by_one(PEER, *options), exact(*options))
    y.sum().backward()
    # the keys' bias adds the same to every score, but is no number of its own here
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)


def test_a_projection_is_asked_for_as_its_operator(preferred):
    """With a gradient of its own, of another dtype, and shown by `explain`."""
    x, blocks, index = torch.randn(5, 64), [Block(make_weights(64, 96), 2)], torch.tensor([1, 4])
    projection = Projection(*norm(64), torch.randn(64, 20))
    assert dispatch.whole_blocks(x, blocks, True, projection) is cpu_blocks.blocks
    assert "project" in {row[0] for row in clipfast.explain()}
    double = projection._replace(weight=projection.weight.double())
    assert dispatch.whole_blocks(x, blocks, True, double) is None
    for name in ("norm_weight", "norm_bias", "weight"):
        leaf = getattr(projection, name).clone().requires_grad_()
        trained = projection._replace(**{name: leaf})
        ops.blocks(x, [0, 2, 5], blocks, causal=False, index=index, projection=trained).square().sum().backward()
        assert leaf.grad.any(), name


def _turned(weights: BlockWeights) -> None:
    weights.out_weight.data = weights.out_weight.data.t()


def _moved(weights: BlockWeights) -> None:
    weights.fc2_weight.data = weights.fc2_weight.data * 2


def _with_other_signs(weights: BlockWeights) -> None:
    weights.fc1_bias.data = torch._neg_view(weights.fc1_bias.data)


def _of_whole_numbers(weights: BlockWeights) -> None:
    weights.qkv_bias.data = weights.qkv_bias.data.view(torch.int32)


def _edited(weights: BlockWeights) -> None:
    weights.fc2_weight.mul_(2)


def _edited_where_it_is_copied(weights: BlockWeights) -> None:
    weights.fc2_bias.add_(1)


@pytest.mark.parametrize("index", [None, torch.tensor([2, 8])], ids=["all rows", "an index"])
@pytest.mark.parametrize(
    "change",
    [_turned, _moved, _with_other_signs, _of_whole_numbers, _edited, _edited_where_it_is_copied],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_stack_that_is_passed_again_sees_a_change(preferred, change, index):
    """Each in one fact alone: address, strides, signs, dtype, contents, and contents of what is no row of memory."""
    x, first, second = torch.randn(9, 64), make_weights(64, 96), make_weights(64, 96)
    # numbers next to zero, and whole ones if they are taken for that
    second = second._replace(qkv_bias=torch.randint(3, (192,), dtype=torch.int32).view(torch.float32))
    if change is _edited_where_it_is_copied:
        second = second._replace(fc2_bias=torch.stack([second.fc2_bias] * 2, dim=1)[:, 0])
    stack = Stack([Block(first, 2), Block(second, 2)])

    def run(blocks) -> Tensor:
        return ops.blocks(x, [0, 3, 9], blocks, causal=True, index=index)

    with torch.no_grad():
        before = run(stack)
        assert torch.equal(run(stack), before)
        change(second)
        after = run(stack)
        assert torch.equal(after, run([*stack])) and not torch.equal(after, before)


def test_a_stack_that_is_passed_again_is_checked_again(preferred):
    """For rows of another width or on another device, and after a tensor got another shape at its place."""
    weights = make_weights(64, 96)
    stack = Stack([Block(weights, 2)])
    with torch.no_grad():
        ops.blocks(torch.zeros(5, 64), [0, 5], stack, causal=True)
        with pytest.raises(ValueError, match=r"norm_1_weight must be \[32\], got \[64\]"):
            ops.blocks(torch.zeros(5, 32), [0, 5], stack, causal=True)
        with pytest.raises(RuntimeError, match="x is on meta but norm_1_weight is on cpu"):
            ops.blocks(torch.zeros(5, 64, device="meta"), [0, 5], stack, causal=True)
        weights.fc1_bias.data = weights.fc1_bias.data[:95]
        with pytest.raises(ValueError, match=r"fc1_bias must be \[96\], got \[95\]"):
            ops.blocks(torch.zeros(5, 64), [0, 5], stack, causal=True)


def _another_storage(weight: Tensor, memory: bytearray) -> None:
    weight.data = torch.frombuffer(memory, dtype=torch.float32).view(96, 64).neg_()


def _made_in_inference_mode(weight: Tensor, memory: bytearray) -> None:
    with torch.inference_mode():
        weight.data = torch.empty(0).set_(weight.untyped_storage(), 0, (96, 64))
        assert weight.is_inference()
        weight.neg_()


@pytest.mark.parametrize("change", [_another_storage, _made_in_inference_mode])
def test_a_stack_sees_another_weight_at_the_address_of_one_that_is_kept_packed(preferred, change):
    """Which looks the same in every fact; of a weight made in inference mode PyTorch counts no edits."""
    memory = bytearray(4 * 96 * 64)
    weight = torch.frombuffer(memory, dtype=torch.float32).view(96, 64).normal_()
    stack = Stack([Block(make_weights(64, 96)._replace(fc1_weight=weight), 2)])
    x = torch.randn(9, 64)
    kept.keep(stack.matrices)
    try:
        with torch.no_grad():
            before = ops.blocks(x, [0, 9], stack, causal=True)
            change(weight, memory)
            after = ops.blocks(x, [0, 9], stack, causal=True)
            expected = ops.blocks(x, [0, 9], [*stack], causal=True)
        assert torch.equal(after, expected) and not torch.equal(after, before)
    finally:
        kept.forget(stack.matrices)


def test_a_stack_of_tensors_that_torch_func_traces():
    """They are nowhere in memory, and nothing is found out about them."""
    x, weights = torch.randn(5, 64), make_weights(64, 96)

    def run(bias: Tensor) -> Tensor:
        stack = Stack([Block(weights._replace(fc2_bias=bias), 2)])
        return ops.blocks(x, [0, 5], stack, causal=True).sum()

    assert torch.equal(torch.func.grad(run)(weights.fc2_bias), torch.full((64,), 5.0))


def test_a_stack_stays_the_one_that_knows():
    stack = Stack([Block(make_weights(64, 96), 2)])
    assert Stack.of(stack) is stack


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda stack: pickle.loads(pickle.dumps(stack))])
def test_a_copied_stack_knows_nothing(copied):
    stack, x = Stack(Block(make_weights(64, 96), 2) for _ in range(2)), torch.randn(5, 64)
    expected = ops.blocks(x, [0, 5], stack, causal=True)
    stack.found["anything"] = object()
    again = copied(stack)
    assert type(again) is Stack and len(again) == 2 and not again.found
    assert torch.equal(ops.blocks(x, [0, 5], again, causal=True), expected)


def test_a_projection_of_another_type():
    projection = (torch.ones(64), torch.zeros(64), torch.zeros(64, 8))
    with pytest.raises(TypeError, match=r"clipfast\.blocks\.Projection, got tuple"):
        ops.blocks(
            torch.zeros(5, 64), [0, 5], [Block(make_weights(64, 96), 2)], causal=False,
            index=torch.tensor([0]), projection=projection,
        )  # fmt: skip


def test_one_stack_for_calls_of_every_kind(cpu_library):
    """In each form, with an index and without, packed or not: what one call found is not for another kind."""
    x, rows, index = torch.randn(9, 64), Rows((3, 6)), torch.tensor([1, 8])
    stack = Stack(Block(make_weights(64, 96), 2) for _ in range(2))
    forms = list(library.INSTRUCTIONS)[1 : library.INSTRUCTIONS[library.best()] + 1]
    for keep in (False, True):
        (kept.keep if keep else kept.forget)(stack.matrices)
        try:
            for form, some in itertools.product([*forms, *forms], (None, index)):
                got, expected = (
                    cpu_blocks.blocks(x, rows, blocks, True, some, instructions=form) for blocks in (stack, [*stack])
                )
                assert torch.equal(got, expected)
        finally:
            kept.forget(stack.matrices)
    cpu_blocks.blocks(x, rows, stack, True)
    with pytest.raises(TypeError, match="they must have one dtype"):
        cpu_blocks.blocks(x.bfloat16(), rows, stack, True)


@by_dtype
def test_an_embedding_does_not_depend_on_its_batch(preferred, dtype):
    """To the bit: alone, in a batch that passes together or is cut by rows and threads, with weights packed or not."""
    # 17 rows an image, up to 20 a caption
    model = randomise(clipfast.CLIP(32, 64, 3, 128, 16, 20, 50, 128, 2, 3)).eval()
    convert_weights(model, dtype)
    images, texts = torch.randn(70, 3, 64, 64), torch.randint(49, (70, 20))
    texts[torch.arange(70), torch.randint(20, (70,))] = 49
    for encode, batch in ((model.encode_image, images), (model.encode_text, texts)):
        with torch.no_grad(), csrc.threads(1):
            expected = encode(batch)
        for threads in (1, 2, 3):
            for prepacked in (False, True):
                model.prepack_weights(prepacked)
                with torch.no_grad(), csrc.threads(threads):
                    for some in (slice(7), slice(7, 8), slice(8, 17), slice(17, 64), slice(64, 70), slice(70)):
                        assert torch.equal(encode(batch[some]), expected[some])


def test_explain_shows_their_operators(preferred):
    with torch.no_grad():
        ops.blocks(torch.randn(4, 64), [0, 4], [Block(make_weights(64, 64), 2)], causal=False)
    assert [(row[0], row[3].backend) for row in clipfast.explain()] == [
        (operator, "cpu") for operator in ("attention", "linear", "mlp")
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(5, 63)}, r"norm_1_weight must be \[63\], got \[64\]"),
        ({"x": torch.zeros(4, 64)}, r"offsets end at 5 but x has 4 rows"),
        ({"x": torch.zeros(5, 1, 64)}, r"x must be \[\*, \*\], got \[5, 1, 64\]"),
        ({"qkv_weight": torch.zeros(64, 64)}, r"qkv_weight must be \[192, 64\], got \[64, 64\]"),
        ({"fc1_bias": torch.zeros(7)}, r"fc1_bias must be \[128\], got \[7\]"),
        ({"fc2_weight": torch.zeros(64, 64)}, r"fc2_weight must be \[64, 128\], got \[64, 64\]"),
        ({"norm_2_bias": None}, "norm_2_bias must be a tensor, got None"),
        ({"heads": 0}, "x is 64 wide, which does not divide into 0 heads"),
        ({"heads": -2}, "x is 64 wide, which does not divide into -2 heads"),
        ({"heads": 5}, "x is 64 wide, which does not divide into 5 heads"),
        ({"activation": "relu"}, "activation must be one of"),
    ],
)
def test_refusals(changes, message):
    changes = {"x": torch.zeros(5, 64), "heads": 2, "activation": "gelu"} | changes
    x, heads, activation = (changes.pop(name) for name in ("x", "heads", "activation"))
    good, bad = make_weights(64, 128), make_weights(64, 128)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        ops.blocks(x, [0, 5], [Block(good, 2), Block(bad, heads, activation)], causal=False)


def test_another_device():
    block = make_weights(64, 128)
    with pytest.raises(RuntimeError, match="x is on cpu but fc1_bias is on meta; move one of them"):
        ops.blocks(
            torch.zeros(5, 64), [0, 5], [Block(block._replace(fc1_bias=block.fc1_bias.to("meta")), 2)], causal=True
        )


def test_dtypes_that_differ(cpu_library):
    block = make_weights(64, 128)._replace(fc1_weight=torch.zeros(128, 64).bfloat16())
    with pytest.raises(TypeError, match=r"x is torch.float32, fc1_weight torch.bfloat16: they must have one dtype"):
        run(torch.zeros(5, 64), [5], block, 2, False)
