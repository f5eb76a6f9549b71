"""The Triton products: every kernel, epilogue and launch configuration beside PyTorch's product and the exact one."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import triton.language as tl

from clipfast import reference, tuning
from clipfast.kernels import library
from clipfast.kernels import linear as module

from ..accuracy import assert_accurate
from ..backends import interpreted
from ..op_cases import PEERS, weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPILOGUES = [
    {},
    {"activation": "quick_gelu"},
    {"activation": "gelu", "residual": True},
    {"residual": True},
    {"bias": False, "activation": "quick_gelu"},
]


def operands(rows, n_cols, n_terms, dtype, device, *, activation=None, residual=False, bias=True):
    weight, vector = weights(n_cols, n_terms)
    tensors = (
        torch.randn(rows, n_terms),
        weight,
        vector if bias else None,
        torch.randn(rows, n_cols) if residual else None,
    )
    return [None if x is None else x.to(device, dtype) for x in tensors], activation


def check(operands, activation, config=None, what=""):
    if config is not None and config.persistent and not module.HAS_DESCRIPTORS:
        pytest.skip("the persistent form needs Triton 3.4")
    x, weight, bias, residual = operands
    got = module.linear_fwd(x, weight, bias, residual, activation or "none", False, config)
    peer = PEERS["linear"](x, weight, bias, activation=activation, residual=residual)
    wide = [None if t is None else t.double().cpu() for t in operands]
    exact = reference.linear(*wide[:3], activation=activation, residual=wide[3])
    assert_accurate(got, peer, exact, what=what)


def configurations():
    """Every configuration that the formulas give for CLIP's products, each once."""
    found = {}
    for arch, dtype, rows, (n, k) in product(
        tuning.ARCHITECTURES,
        (torch.float32, torch.bfloat16),
        (1, 16, 17, 50, 64, 77, 400, 401, 1600, 12800, 51200),
        ((512, 512), (1536, 512), (2048, 512), (512, 2048), (2304, 768), (3072, 768), (768, 3072), (4096, 1024)),
    ):
        for described in (True, False):
            config = tuning.linear(rows, n, k, dtype, arch, described=described)
            found.setdefault((dtype, config), None)
    return [*found]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda epilogue: "+".join(epilogue) or "none")
@pytest.mark.parametrize("shape", [(1, 96, 64), (50, 101, 193), (77, 192, 512), (450, 136, 96)], ids=str)
def test_against_float64(shape, dtype, epilogue, device, poisoned_memory):
    check(*operands(*shape, dtype, device, **epilogue))


@pytest.mark.parametrize(("dtype", "config"), configurations(), ids=str)
def test_every_configuration(dtype, config, device, poisoned_memory):
    """At a shape with ragged ends: one tile and a bit in each direction, three steps along K."""
    rows, n_cols = config.block_m + 3, config.block_n + 8
    n_terms = 3 * config.block_k - 8
    check(*operands(rows, n_cols, n_terms, dtype, device, activation="quick_gelu", residual=True), config)


@pytest.mark.parametrize("split", [2, 3, 8])
@pytest.mark.parametrize("n_terms", [64, 200, 1000])
def test_a_split_sum_is_the_whole_sum(split, n_terms, device):
    """Also where parts are left without a term."""
    config = tuning.LinearConfig(16, 32, 64, warps=4, stages=2, split_k=split)
    check(*operands(5, 40, n_terms, torch.float16, device, activation="gelu", residual=True), config)


def test_a_persistent_program_takes_more_than_one_tile(device, monkeypatch):
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 2)
    config = tuning.LinearConfig(64, 64, 64, warps=4, stages=3, persistent=True, group_m=2)
    check(*operands(300, 136, 72, torch.bfloat16, device, residual=True), config)


@pytest.mark.parametrize("group_m", [1, 2, 3, 8])
def test_every_tile_is_computed_once(group_m, device, poisoned_memory):
    config = tuning.LinearConfig(16, 16, 32, warps=4, stages=2, group_m=group_m)
    check(*operands(81, 50, 32, torch.float32, device, residual=True), config)


def test_large_and_small_activations_stay_finite(device):
    x = torch.tensor([[-1e4], [-300.0], [-60.0], [0.0], [60.0], [1e4]], device=device)
    one = torch.ones(1, 1, device=device)
    for activation in ("quick_gelu", "gelu"):
        got = module.linear_fwd(x, one, None, None, activation, False)
        exact = reference.linear(x.double().cpu(), one.double().cpu(), None, activation=activation)
        torch.testing.assert_close(got.double().cpu(), exact, rtol=1e-5, atol=1e-30)


FAST_TANH = tuning.LinearConfig(32, 32, 64, warps=4, stages=2, fast_tanh=True)


def test_the_cheaper_tanh_is_accurate_enough_for_bfloat16(device):
    check(*operands(50, 101, 96, torch.bfloat16, device, activation="quick_gelu"), FAST_TANH)


def test_the_cheaper_tanh_is_the_same_function(device):
    """x sigmoid(1.702 x) = x (1 + tanh(0.851 x)) / 2, and `tanh.approx` is off by 2^-11 of the tanh at most."""
    x = torch.cat([torch.linspace(-20, 20, 999), torch.tensor([0.0, -0.0, 1e-30, -1e4, 1e4])]).to(device)[:, None]
    got = module.linear_fwd(x, torch.ones(1, 1, device=device), None, None, "quick_gelu", False, FAST_TANH)
    wide = x.double().cpu()
    exact = reference.linear(wide, torch.ones(1, 1).double(), None, activation="quick_gelu")
    # a product, a sum and a product more in float32
    bound = wide.abs() / 2 * (2**-11 * torch.tanh(0.851 * wide).abs() + 4 * torch.finfo(torch.float32).eps)
    assert ((got.double().cpu() - exact).abs() <= bound).all()


@interpreted
def test_an_instruction_without_a_stand_in_is_named():
    from triton.runtime.interpreter import InterpreterBuilder

    with pytest.raises(NotImplementedError, match="ex2.approx.*the interpreter knows tanh.approx"):
        InterpreterBuilder().create_inline_asm("ex2.approx.f32 $0, $1;", "=f,f", [None], [None], True, 1)


@pytest.mark.parametrize("rows", [0, 3])
def test_empty(rows, device):
    (x, weight, bias, _), _ = operands(rows, 0 if rows else 5, 16, torch.float32, device)
    assert module.linear(x, weight, bias, None, None).shape == (rows, 0 if rows else 5)


WIDER = {
    "plain": tuning.LinearConfig(16, 16, 32, warps=4, stages=2),
    "split": tuning.LinearConfig(16, 16, 32, warps=4, stages=2, split_k=2),
    "persistent": tuning.LinearConfig(16, 16, 32, warps=4, stages=2, persistent=True),
}


@pytest.mark.parametrize("n_terms", [64, 60])
@pytest.mark.parametrize("config", WIDER.values(), ids=WIDER)
def test_rows_of_wider_tensors_are_not_copied(config, n_terms, device):
    """in_proj_weight.split() and sliced activations have row strides of their own; what lies between is not read."""
    views = []
    for shape, width in (((9, 2, 64), n_terms), ((24, 3, 64), n_terms), ((9, 5, 32), 24)):
        view = torch.full(shape, float("nan"), device=device)[:, 1, :width]
        views.append(view.copy_(torch.randn(view.shape)))
    x, weight, residual = views
    assert library.as_rows(x).data_ptr() == x.data_ptr()
    check([x, weight, torch.randn(24, device=device), residual], None, config)


def test_tf32_only_when_asked_for(device):
    x = torch.randn(3, 8, device=device)
    assert not module.tf32_allowed(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert module.tf32_allowed(x)
        assert not module.tf32_allowed(x.half())
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="since PyTorch 2.9")
@pytest.mark.parametrize("switch", [torch.backends.cuda.matmul, torch.backends], ids=["of products", "of everything"])
def test_the_newer_switch_for_tf32(switch, device):
    """Once it says tf32, PyTorch raises where it is asked by the older name, in every dtype."""
    x, switches = torch.randn(3, 8, device=device), (torch.backends.cuda.matmul, torch.backends)
    before = [each.fp32_precision for each in switches]
    try:
        # what is said of products alone goes before what is said of everything
        torch.backends.cuda.matmul.fp32_precision = "none"
        for precision in ("tf32", "ieee"):
            switch.fp32_precision = precision
            assert module.tf32_allowed(x) is (precision == "tf32")
            check(*operands(5, 24, 32, torch.bfloat16, device))
    finally:
        for each, precision in zip(switches, before, strict=True):
            each.fp32_precision = precision


def test_registered(device):
    (x, weight, bias, residual), _ = operands(5, 24, 32, torch.float32, device, residual=True)
    for added in (residual, None):
        torch.library.opcheck(torch.ops.clipfast.linear.default, (x, weight, bias, added, "quick_gelu", False))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x, weight, bias, residual):
        return module.linear(x, weight, bias, "gelu", residual) + 1

    with torch.no_grad():
        torch.testing.assert_close(
            compiled(x, weight, bias, residual), module.linear(x, weight, bias, "gelu", residual) + 1
        )


def test_configurations_fit_the_shared_memory():
    for arch in tuning.ARCHITECTURES:
        for rows, (n, k), dtype in product((1, 50, 300, 12800), ((768, 3072), (3072, 768), (2304, 768)), DTYPES):
            for described in (True, False):
                config = tuning.linear(rows, n, k, dtype, arch, described=described)
                assert config.shared_memory(dtype.itemsize) <= tuning.SHARED_MEMORY[arch], (arch, rows, n, k, config)
                assert config.persistent <= described


def test_a_triton_without_descriptors_gets_the_tiles(device, monkeypatch):
    """Triton 3.2 and 3.3, where the persistent form does not compile."""
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    chosen = []
    tuned = tuning.linear

    def keep(*arguments, **options):
        chosen.append(tuned(*arguments, **options))
        return chosen[-1]

    monkeypatch.setattr(tuning, "linear", keep)
    for there in (module.HAS_DESCRIPTORS, False):
        monkeypatch.setattr(module, "HAS_DESCRIPTORS", there)
        check(*operands(450, 96, 64, torch.bfloat16, device))
    assert [config.persistent for config in chosen] == [hasattr(tl, "make_tensor_descriptor"), False]
