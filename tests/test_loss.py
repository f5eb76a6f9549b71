"""The contrastive loss without the matrix: value and gradients, on every backend that this machine has."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import clipfast
from benchmarks import loss as benchmark
from clipfast import dispatch, reference, tuning
from clipfast.kernels import loss_tiles
from clipfast.loss import ClipLoss, contrastive_loss

from . import peers
from .backends import needs_triton
from .losses import assert_all_right, features, peer_loss, with_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


NOISES = {"near": 1.0, "far": 1000.0}
SIZES = [(1, 5, 14.3), (20, 64, 14.3), (49, 512, 30.0), (50, 33, 1.0)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 7 x 7, so that a batch of 20 has whole ones, ragged ones and ones off the diagonal."""
    monkeypatch.setattr(tuning, "loss_side", lambda device: 7)


def assert_right(image, text, scale, what=""):
    assert_all_right([(image, text)], scale, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize(("n", "width", "scale"), SIZES)
def test_against_float64(n, width, scale, noise, dtype, small_tiles):
    pairs = [features(n, width, noise=noise, dtype=dtype) for _ in range(64)]
    assert_all_right(pairs, torch.tensor(scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_duplicates_at_scale_100(dtype, monkeypatch):
    """All pairs alike, every pair twice, and pairs that are opposites: sums of 20, of 2, and far below the greatest.

    The gradients of the first two are zero, by differences: tiles of one shape multiply equal rows to equal bits.
    """
    monkeypatch.setattr(tuning, "loss_side", lambda device: 5)
    image, _ = features(10, 64, dtype=dtype)
    scale = torch.tensor(100.0)
    assert_right(image[:1].repeat(20, 1), image[:1].repeat(20, 1), scale, "all alike")
    assert_right(image.repeat(2, 1), image.repeat(2, 1), scale, "twice")
    assert_right(image, -image, scale, "opposites")


def test_the_running_maximum_may_rise_and_fall(small_tiles):
    """Logits from -10,000 to 10,000: no fixed shift holds them."""
    image, text = features(30, 16)
    size = torch.logspace(-2, 2, 30)[:, None]
    for rows in (size, size.flip(0)):
        assert_right(image * rows, text * rows, torch.tensor(1.0))


def test_matched_pairs_keep_their_digits():
    """Where every pair has found itself: the gradient of scale is the sum of what is left, not 1 minus nearly 1."""
    image = torch.eye(8, dtype=torch.float64)
    scale = torch.tensor(20.0, dtype=torch.float64)
    *_, of_scale = with_gradients(contrastive_loss, image, image, scale, of_loss=1.0)
    assert of_scale.item() == pytest.approx(-7 / (7 + math.exp(20)), rel=1e-12, abs=0)
    of_image = with_gradients(contrastive_loss, image, image, scale, of_loss=1.0)[1]
    assert of_image[3, 3].item() == pytest.approx(-20 / 8 * 7 / (7 + math.exp(20)), rel=1e-6, abs=0)


def test_gradcheck(small_tiles):
    image, text = (x.double().requires_grad_() for x in features(9, 4))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(contrastive_loss, (image, text, scale, bias))
    assert torch.autograd.gradcheck(contrastive_loss, (image, text, scale * 0, bias)), "a scale of 0 divides nothing"
    assert torch.autograd.gradgradcheck(contrastive_loss, (image, text, scale, bias))
    found = torch.func.grad(contrastive_loss, argnums=1)(image, text, scale)
    torch.testing.assert_close(found, with_gradients(contrastive_loss, image, text, scale, of_loss=1.0)[2])


@hypothesis.given(st.integers(1, 30), st.integers(0, 999), st.floats(0.1, 100))
@hypothesis.settings(max_examples=20)
def test_the_order_of_pairs_and_the_names_of_the_towers_do_not_matter(n, seed, scale):
    torch.manual_seed(seed)
    image, text = (x.double() for x in features(n, 8))
    loss = contrastive_loss(image, text, scale)
    order = torch.randperm(n)
    torch.testing.assert_close(contrastive_loss(image[order], text[order], scale), loss)
    torch.testing.assert_close(contrastive_loss(text, image, scale), loss)


def test_only_the_gradients_that_are_wanted(small_tiles):
    """A locked tower, a fixed scale."""
    image, text = features(20, 8)
    scale = torch.tensor(5.0)
    wanted = with_gradients(contrastive_loss, image, text, scale, of_loss=1.0)[1:]
    for i in range(3):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate((image, text, scale))]
        contrastive_loss(*leaves).backward()
        assert [x.grad is not None for x in leaves] == [i == j for j in range(3)]
        torch.testing.assert_close(leaves[i].grad, wanted[i], rtol=0, atol=0)
    assert not contrastive_loss(image, text, 5.0).requires_grad


def test_strided_features(small_tiles):
    image, text = features(20, 16)
    strided = image.t().contiguous().t(), text.repeat_interleave(2, dim=1)[:, ::2]
    assert_right(*strided, torch.tensor(5.0))


def test_a_bias_drops_out():
    image, text = features(12, 8)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0, requires_grad=True)
    loss = contrastive_loss(image.requires_grad_(), text, scale, bias)
    torch.testing.assert_close(loss, peer_loss(image, text, scale, bias))
    loss.backward()
    assert bias.grad.item() == 0
    torch.testing.assert_close(contrastive_loss(image, text, 10, logit_bias=-10.0), loss, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_against_open_clip(dtype):
    """Module, dtype and shape of everything; its parameter of one element, too."""
    theirs, ours = peers.open_clip_loss()(), ClipLoss(cache_labels=True)
    image, text = features(20, 32, dtype=dtype)
    # theirs multiplies float32 logits of one element by bfloat16 features, and fails
    for scale in (torch.tensor(14.3), *[torch.tensor([14.3])] * (dtype == torch.float32)):
        for a, b in zip(*(with_gradients(f, image, text, scale) for f in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=8 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(
        ours(image, text, 14.3, output_dict=True), theirs(image, text, 14.3, output_dict=True), rtol=0.02, atol=0
    )


def test_under_autocast_as_open_clip():
    """Products of bfloat16, the loss float32; gradients in the features' own dtype, in the block and behind it."""
    theirs = peers.open_clip_loss()()
    image, text = features(20, 32)
    scale = torch.tensor(14.3)
    leaves = [x.clone().requires_grad_() for x in (image, text, scale)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradients(contrastive_loss, image, text, scale, of_loss=1.0)
        expected = with_gradients(theirs, image, text, scale, of_loss=1.0)
        loss = contrastive_loss(*leaves)
        assert contrastive_loss(image.bfloat16(), text, scale) == loss, "autocast brings the dtypes together"
    exact = contrastive_loss(image.bfloat16().double(), text.bfloat16().double(), scale.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for a, b in zip(inside, [loss, *torch.autograd.grad(loss, leaves)], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(inside, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=0.02, atol=0.02 * b.abs().max().item())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return result


def test_no_tensor_grows_with_the_square_of_the_batch(monkeypatch):
    monkeypatch.setattr(tuning, "loss_side", lambda device: 32)
    image, text = (x.requires_grad_() for x in features(512, 16))
    scale = torch.tensor(10.0, requires_grad=True)
    with Largest() as ours:
        contrastive_loss(image, text, scale).backward()
    with Largest() as theirs:
        peer_loss(image, text, scale).backward()
    assert theirs.elements == 512 * 512
    assert ours.elements == 512 * 16, "the features' gradients, and tiles of 32 x 32"


def test_second_derivatives_hold_the_logits_and_are_right_in_half_precision_too():
    image, text = features(10, 8, dtype=torch.bfloat16)

    def penalty(loss, image, text):
        image = image.clone().requires_grad_()
        (of_image,) = torch.autograd.grad(loss(image, text, torch.tensor(5.0)), image, create_graph=True)
        return torch.autograd.grad(of_image.double().square().sum(), image)[0]

    found, exact = (
        penalty(contrastive_loss, image, text),
        penalty(reference.contrastive_loss, image.double(), text.double()),
    )
    torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


x, y = torch.eye(4), torch.eye(4)
BAD = {
    "empty": (lambda: contrastive_loss(x[:0], y[:0], 1.0), ValueError, r"image_features is empty, \[0, 4\]"),
    "sizes": (lambda: contrastive_loss(x, y[:3], 1.0), ValueError, r"both be \[N, E\], got \[4, 4\] and \[3, 4\]"),
    "ranks": (lambda: contrastive_loss(x[0], y[0], 1.0), ValueError, r"must both be \[N, E\], got \[4\]"),
    "dtypes": (lambda: contrastive_loss(x, y.half(), 1.0), TypeError, "torch.float32 and torch.float16"),
    "integers": (lambda: contrastive_loss(x.long(), y.long(), 1.0), TypeError, "one floating dtype"),
    "devices": (lambda: contrastive_loss(x, y.to("meta"), 1.0), RuntimeError, "text_features is on meta"),
    "scales": (lambda: contrastive_loss(x, y, torch.ones(2)), ValueError, r"logit_scale must be one floating .*\[2\]"),
    "biases": (lambda: contrastive_loss(x, y, 1.0, torch.ones(4)), ValueError, "logit_bias must be one"),
    "scale's device": (
        lambda: contrastive_loss(x, y, torch.ones(1, device="meta")), RuntimeError, "logit_scale is on meta",
    ),
    "rank": (lambda: ClipLoss(rank=2, world_size=2), ValueError, "got rank 2 of world_size 2"),
    "horovod": (lambda: ClipLoss(use_horovod=True), NotImplementedError, "use_horovod=True: only torch.distributed"),
    "no group": (lambda: ClipLoss(world_size=2)(x, y, 1.0), RuntimeError, "world_size is 2: call .*init_process_group"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_nan_is_seen():
    image, text = features(4, 8)
    image[2, 3] = torch.nan
    assert contrastive_loss(image, text, 10.0).isnan()


def test_the_module_says_what_it_is():
    assert str(ClipLoss(True, False, True, 1, 4)) == (
        "ClipLoss(local_loss=True, gather_with_grad=False, rank=1, world_size=4)"
    )


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_forced_backend_runs_the_loss(name, monkeypatch):
    monkeypatch.setattr(dispatch, "_decisions", {})
    image, text = (x.requires_grad_() for x in features(5, 8))
    with clipfast.backend(name):
        contrastive_loss(image, text, 10.0).backward()
    ((operator, _, forced, decision),) = clipfast.explain()
    assert (operator, forced, decision.backend) == ("contrastive_loss", name, name)
    assert dict(decision.others)["onednn"] == "does not have this operator"


@needs_triton
def test_on_a_gpu_the_triton_kernels_run_with_gradients_too():
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.float32, "triton"), (torch.float64, "torch")):
        for grad in (False, True):
            call = dispatch.Call("cuda", dtype, grad, architecture=90)
            assert dispatch.decide("contrastive_loss", None, call).backend == backend


def test_registered(small_tiles):
    image, text = features(20, 8)
    scale = torch.tensor(10.0)
    rows, cols = loss_tiles.statistics(image, text, scale, 0)
    torch.library.opcheck(torch.ops.clipfast.contrastive_statistics.default, (image, text, scale, 0))
    for weights in (None, torch.rand(20)):
        for wants in ((True, True), (True, False), (False, True)):
            softmaxes = [*rows, weights], [*cols, rows[2], weights]
            arguments = (image, text, scale, 0, scale, *softmaxes, weights is None, wants)
            torch.library.opcheck(torch.ops.clipfast.contrastive_gradients.default, arguments)


def test_compiled_in_one_graph(small_tiles):
    torch._dynamo.reset()
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend="aot_eager")
    image, text = features(20, 8)
    for a, b in zip(
        *(with_gradients(f, image, text, torch.tensor(9.0)) for f in (compiled, contrastive_loss)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch._dynamo.reset()


def test_the_memory_of_a_process():
    """The peak of forward and backward at 4,096 pairs, where one matrix of logits is 67 MB; by the benchmark."""
    command = [sys.executable, "-m", "benchmarks.loss", "--one", "clipfast", "--batches", "4096", "--width", "32"]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command += ["--rounds", "1", "--threads", "1"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    row = json.loads(done.stdout)
    if "extra_mb" not in row:
        pytest.skip("this system does not tell a process's peak memory")
    assert 8 < row["extra_mb"] < 60, "three tiles of 4 MB are 12 MB"


def test_the_benchmark_sees_a_wrong_loss(monkeypatch):
    options = benchmark.arguments(["--batches", "50", "--width", "8", "--rounds", "1"])
    right = benchmark.measure("clipfast", 50, options)
    assert right["status"] == "ok" and right["rel_rms"] < 1e-5 and right["median_s"] > 0
    monkeypatch.setitem(
        benchmark.LOSSES, "clipfast", lambda image, text, scale: contrastive_loss(image, text, 99.0 + scale * 0)
    )
    assert benchmark.measure("clipfast", 50, options)["status"] == "WRONG"
    row = benchmark.in_its_process("dense", 10**6, options)
    assert row["status"] == "skipped" and "GB" in row["note"]
