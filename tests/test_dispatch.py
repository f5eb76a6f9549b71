"""Which backend runs an operator: forced, preferred, refused and why; and what explain() says of it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import clipfast
from clipfast import ops

from .clips import VIT, make_images, make_pair, make_texts

ALL = ("onednn", "torch", "reference")
OPERATORS = ("layer_norm", "linear", "mlp", "attention", "attention_pool", "patch_embed", "project", "logits")

needs_onednn = pytest.mark.skipif(
    ops._onednn_refuses(ops.Call("cpu", torch.float32, False, False, False, True)) is not None,
    reason="oneDNN does not run here",
)


@pytest.fixture(autouse=True)
def no_decisions(monkeypatch):
    """explain() tells what ran since the process started: for each test, since the test did."""
    monkeypatch.setattr(ops, "_decisions", {})


def _linear(dtype=torch.float32, **options):
    x, weight = torch.randn(3, 8).to(dtype), torch.randn(5, 8).to(dtype)
    return ops.linear(x, weight.requires_grad_(options.pop("grad", False)), **options)


def _ran():
    """{operator: backend}; fails if one ran on two."""
    rows = [(name, decision.backend) for name, _, _, decision in clipfast.explain()]
    assert len(dict(rows)) == len(set(rows)), rows
    return dict(rows)


def _reason(backend: str, operator: str = "linear") -> str:
    (row,) = [row for row in clipfast.explain() if row[0] == operator]
    return dict(row[3].others)[backend]


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"unknown backend 'nope'; there are onednn, torch, reference"):
        with clipfast.backend("nope"):
            pass
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        clipfast.backend("cuda").__enter__()


@needs_onednn
def test_the_preferred_backend_runs_where_it_can():
    with torch.no_grad():
        _linear()
    assert _ran() == {"linear": "onednn"}
    assert {_reason("torch"), _reason("reference")} == {"onednn comes first", "runs only when forced"}


@needs_onednn
@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (lambda: torch.enable_grad(), "gradient is wanted"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast is on"),
        (lambda: torch.backends.mkldnn.flags(enabled=False), "mkldnn.enabled is False"),
        (lambda: FlopCounterMode(display=False), "not traceable"),
        (lambda: torch.autograd.forward_ad.dual_level(), "not traceable"),
    ],
    ids=["grad", "autocast", "mkldnn off", "dispatch mode", "forward mode"],
)
def test_a_decision_follows_the_context(context, reason):
    """Into it and out of it; forced inside it, the backend raises and says the same."""
    weight_wants_grad = {"grad": True}
    with torch.no_grad():
        _linear(**weight_wants_grad)
        with context():
            ops._decisions.clear()
            _linear(**weight_wants_grad)
            assert _ran() == {"linear": "torch"}
            assert reason in _reason("onednn")
            with (
                clipfast.backend("onednn"),
                pytest.raises(RuntimeError, match=f"'onednn' cannot run linear: .*{reason}"),
            ):
                _linear(**weight_wants_grad)
        ops._decisions.clear()
        _linear(**weight_wants_grad)
        assert _ran() == {"linear": "onednn"}


@needs_onednn
def test_any_argument_may_want_the_gradient():
    x, (weight, bias) = torch.randn(3, 8), (torch.randn(8, 8), torch.randn(8))
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
        y = ops.linear(x, weight, bias, residual=torch.randn(3, 8))
        assert y.requires_grad
        torch.autograd.grad(y.sum(), leaf)
        leaf.requires_grad_(False)
    residual = torch.randn(3, 8, requires_grad=True)
    torch.autograd.grad(ops.linear(x, weight, bias, residual=residual).sum(), residual)
    assert _ran() == {"linear": "torch"}
    ops._decisions.clear()
    ops.linear(x, weight, bias)  # gradients on, and nobody wants one
    assert _ran() == {"linear": "onednn"}


def test_dtypes_that_onednn_has_not():
    with torch.no_grad():
        _linear(torch.float64)
        assert _ran() == {"linear": "torch"}
        assert "no float64 products" in _reason("onednn")
        with clipfast.backend("onednn"), pytest.raises(RuntimeError, match="cannot run linear: has no float64"):
            _linear(torch.float64)


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_forced_backend_runs_everything_it_has(name):
    _, ours = make_pair(VIT)
    with torch.no_grad(), clipfast.backend(name):
        ours(make_images(VIT, 2), make_texts(VIT, 2))
    assert set(_ran().values()) == {name}
    assert set(_ran()) == set(OPERATORS)
    assert all(forced == name for _, _, forced, _ in clipfast.explain())


@needs_onednn
def test_an_operator_that_the_forced_backend_has_not_runs_on_torch_and_explain_says_so():
    with torch.no_grad(), clipfast.backend("onednn"):
        ops.layer_norm(torch.randn(3, 8), torch.ones(8), torch.zeros(8))
        _linear()
    assert _ran() == {"layer_norm": "torch", "linear": "onednn"}
    assert _reason("onednn", "layer_norm") == "does not have this operator"


@needs_onednn
def test_forced_under_gradients_a_model_says_why_not():
    _, ours = make_pair(VIT)
    with clipfast.backend("onednn"), pytest.raises(RuntimeError, match=r"cannot run .*no_grad\(\) allows it"):
        ours.encode_image(make_images(VIT, 2))


def test_blocks_nest_and_end_with_an_error():
    def forced():
        return ops._forced.get()

    with clipfast.backend("reference"):
        with clipfast.backend("torch"):
            assert forced() == "torch"
        assert forced() == "reference"
        with pytest.raises(ZeroDivisionError), clipfast.backend("torch"):
            _ = 1 / 0
        assert forced() == "reference"
        with pytest.raises(ValueError, match="unknown"), clipfast.backend("nope"):
            pass
        _linear()
    assert forced() is None
    assert _ran() == {"linear": "reference"}


def test_explain_names_every_other_backend_and_a_reason():
    with torch.no_grad():
        _linear()
        for name in ("torch", "reference"):
            with clipfast.backend(name):
                _linear()
                ops.logits(torch.randn(2, 4), torch.randn(3, 4), torch.tensor(1.0))
    rows = clipfast.explain()
    assert len(rows) == 5
    for _, _, forced, decision in rows:
        assert {decision.backend, *dict(decision.others)} == set(ALL)
        assert all(dict(decision.others).values())
        assert forced in (None, decision.backend)
    text = str(rows)
    assert text.count("\n") == 5
    assert "torch!" in text and "torch is forced" in text and "cpu float32" in text


def test_explain_before_anything_ran():
    assert str(clipfast.explain()) == "no operator has run yet"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", torch.device("cuda", 0)])
def test_explain_of_a_device_that_is_not_here(device):
    rows = clipfast.explain(device, torch.float16)
    assert [row[0] for row in rows] == list(OPERATORS)
    for name, call, _, decision in rows:
        assert call.device == torch.device(device).type
        assert decision.backend == "torch"
        if name in ops._ONEDNN:
            assert f"runs on a CPU, not on {call.device}" in dict(decision.others)["onednn"]
    assert "float16" in str(rows)
    assert ops._decisions == {}, "a question is no decision"


@needs_onednn
def test_explain_of_this_cpu_with_and_without_gradients():
    def backends(**options):
        return {name: decision.backend for name, _, _, decision in clipfast.explain("cpu", **options)}

    assert {name for name, backend in backends().items() if backend == "onednn"} == set(ops._ONEDNN)
    assert set(backends(grad=True).values()) == {"torch"}
    assert set(backends(dtype=torch.float64).values()) == {"torch"}
    with torch.backends.mkldnn.flags(enabled=False):
        assert set(backends().values()) == {"torch"}


@needs_onednn
def test_less_precision_leaves_the_chains_of_a_product_whole():
    """torch.set_float32_matmul_precision("high"): still float32, added in one chain, which rounds more."""
    x, weight = torch.randn(600, 3072), torch.randn(64, 3072) * 3072**-0.5
    exact = x.double() @ weight.double().t()
    errors = {}
    with torch.no_grad():
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            try:
                errors[precision] = (ops.linear(x, weight) - exact).square().mean().sqrt().item()
            finally:
                torch.set_float32_matmul_precision("highest")
        errors["again"] = (ops.linear(x, weight) - exact).square().mean().sqrt().item()
    assert errors["again"] == errors["highest"] < errors["high"] < 1e-5
