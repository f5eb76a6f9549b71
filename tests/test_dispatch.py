"""Which backend runs an operator: forced, preferred, refused and why; and what explain() says of it.

Each test speaks of a CPU of tests/cpus.py and of a GPU with Triton, whatever it runs on.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import clipfast
from clipfast import dispatch, ops, tuning

from .backends import interpreted
from .clips import VIT, make_images, make_pair, make_texts
from .cpus import CPUS, assume
from .op_cases import SMALL

# asked before a test says otherwise
ONEDNN_MISSING = dispatch.compat.onednn_missing()
ALL = ("cuda", "triton", "cpu", "onednn", "torch", "reference")
OPERATORS = ("layer_norm", "linear", "mlp", "attention", "attention_pool", "patch_embed", "project", "logits")


@pytest.fixture(autouse=True)
def _the_machine(monkeypatch):
    """A CPU of the middle, a GPU with Triton alone; and explain() tells what ran since the test started."""
    assume(monkeypatch, CPUS["avx512"])
    monkeypatch.setattr(dispatch.library, "triton_missing", lambda: None)
    monkeypatch.setattr(dispatch.native, "missing", lambda: "not built")


@pytest.fixture
def onednn(monkeypatch):
    """There is no library of ours, so that oneDNN multiplies; it really does, in float32."""
    if missing := ONEDNN_MISSING:
        pytest.skip(missing)
    assume(monkeypatch, CPUS["avx512"]._replace(built=False))


@pytest.fixture(params=["cpu", "onednn"])
def products(request) -> str:
    """What multiplies on this CPU: our library, or oneDNN where there is none."""
    # a library that is really there, but for which no decision asks
    request.getfixturevalue("cpu_library" if request.param == "cpu" else "onednn")
    return request.param


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
    with pytest.raises(ValueError, match=f"unknown backend 'nope'; there are {', '.join(ALL)}$"):
        with clipfast.backend("nope"):
            pass
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        clipfast.backend("gpu").__enter__()


def test_the_preferred_backend_runs_where_it_can(products):
    with torch.no_grad():
        _linear()
    assert _ran() == {"linear": products}
    assert {_reason("torch"), _reason("reference")} == {f"{products} comes first", "runs only when forced"}


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (lambda: torch.enable_grad(), "gradient is wanted"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast is on"),
        (lambda: FlopCounterMode(display=False), "not traceable"),
        (lambda: torch.autograd.forward_ad.dual_level(), "not traceable"),
    ],
    ids=["grad", "autocast", "dispatch mode", "forward mode"],
)
def test_a_decision_follows_the_context(context, reason, products):
    """Into it and out of it; forced inside it, the backend raises and says the same."""
    weight_wants_grad = {"grad": True}
    with torch.no_grad():
        _linear(**weight_wants_grad)
        with context():
            dispatch._decisions.clear()
            _linear(**weight_wants_grad)
            assert _ran() == {"linear": "torch"}
            assert reason in _reason(products)
            with (
                clipfast.backend(products),
                pytest.raises(RuntimeError, match=f"'{products}' cannot run linear: .*{reason}"),
            ):
                _linear(**weight_wants_grad)
        dispatch._decisions.clear()
        _linear(**weight_wants_grad)
        assert _ran() == {"linear": products}


@pytest.mark.parametrize(
    ("cpu", "float32", "bfloat16", "reason"),
    [
        ("baseline", "onednn", "torch", "rule of thumb, not measured"),
        ("avx2", "cpu", "cpu", None),
        ("avx512", "cpu", "cpu", None),
        ("avx512_bf16", "cpu", "cpu", None),
        ("amx", "cpu", "onednn", f"beyond {tuning.PRODUCTS['amx'].bfloat16} rows"),
    ],
)
def test_what_multiplies_on_each_cpu(cpu, float32, bfloat16, reason, monkeypatch):
    """Many rows; with our library and without."""
    has_bfloat16 = CPUS[cpu].bfloat16
    for built, wanted in ((True, (float32, bfloat16)), (False, ("onednn", "onednn" if has_bfloat16 else "torch"))):
        assume(monkeypatch, CPUS[cpu]._replace(built=built))
        made = [dispatch.decide("linear", None, dispatch.Call("cpu", d)) for d in (torch.float32, torch.bfloat16)]
        assert tuple(decision.backend for decision in made) == wanted
        others = dict(made[1].others)
        if not built:
            assert others["cpu"] == "not built"
        elif reason:
            assert reason in others["cpu"]
        if not has_bfloat16:
            assert others["onednn"] == "this CPU has no bfloat16 products (AVX-512 needed)"
        assert clipfast.explain("cpu", torch.bfloat16)[1][3].backend == wanted[1]


def test_autocast_to_a_dtype_that_the_cpu_lacks(onednn, monkeypatch):
    assume(monkeypatch, CPUS["avx2"]._replace(built=False))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _linear()
    assert _ran() == {"linear": "torch"} and _reason("onednn").startswith("this CPU has no bfloat16 products")


def test_onednn_can_be_switched_off(onednn):
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        _linear()
        assert _ran() == {"linear": "torch"} and "mkldnn.enabled is False" in _reason("onednn")
        with clipfast.backend("onednn"), pytest.raises(RuntimeError, match=r"mkldnn\.enabled is False"):
            _linear()


def test_any_argument_may_want_the_gradient(products):
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
    dispatch._decisions.clear()
    ops.linear(x, weight, bias)  # gradients on, and nobody wants one
    assert _ran() == {"linear": products}


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


def test_an_operator_that_the_forced_backend_has_not_runs_on_torch_and_explain_says_so(onednn):
    with torch.no_grad(), clipfast.backend("onednn"):
        ops.layer_norm(torch.randn(3, 8), torch.ones(8), torch.zeros(8))
        _linear()
    assert _ran() == {"layer_norm": "torch", "linear": "onednn"}
    assert _reason("onednn", "layer_norm") == "does not have this operator"


def test_forced_under_gradients_a_model_says_why_not(onednn):
    _, ours = make_pair(VIT)
    with clipfast.backend("onednn"), pytest.raises(RuntimeError, match=r"cannot run .*no_grad\(\) allows it"):
        ours.encode_image(make_images(VIT, 2))


def test_blocks_nest_and_end_with_an_error():
    def forced():
        return dispatch._forced.get()

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


def test_explain_names_every_other_backend_and_a_reason(onednn):
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


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", torch.device("cuda", 0)])
def test_explain_of_a_device_that_is_not_here(name):
    rows, kind = clipfast.explain(name, torch.float16), torch.device(name).type
    assert [row[0] for row in rows] == [*OPERATORS, "contrastive_loss"]
    for name, call, _, decision in rows:
        assert call.device == kind
        assert decision.backend in (("cuda", "triton") if call.device == "cuda" else ("torch",))
        if name in dispatch._ONEDNN:
            assert f"runs on a CPU, not on {call.device}" in dict(decision.others)["onednn"]
    assert "float16" in str(rows)
    assert dispatch._decisions == {}, "a question is no decision"


def _decide(operator="linear", forced=None, **facts):
    call = dispatch.Call(**{"device": "cuda", "dtype": torch.bfloat16, "architecture": 90} | facts)
    decision = dispatch.decide(operator, forced, call)
    return decision.backend, dict(decision.others).get("triton")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"traced": True}, "not traceable"),
        ({"autocast": True}, "autocast is on"),
        ({"dtype": torch.float64}, "no float64 kernels"),
        ({"architecture": 75}, "needs sm_80 or later, and this GPU is sm_75"),
        ({"device": "mps"}, "runs on a GPU, not on mps"),
        ({"operator": "attention", "shape": (72,)}, "heads are 72 wide"),
        ({"operator": "attention", "shape": (144,)}, "heads are 144 wide"),
        ({"shape": (False, 768, 768, None, True)}, "operands differ in dtype"),
        ({"operator": "mlp", "shape": (False, 3072, 768)}, "operands differ in dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_triton_kernels_refuse(facts, reason):
    """By a rule that explain() shows; forced, it raises with the reason."""
    backend, why = _decide(**facts)
    assert backend == "torch" and reason in why
    with pytest.raises(RuntimeError, match=f"'triton' cannot run .*{reason}"):
        _decide(forced="triton", **facts)


@pytest.mark.parametrize("operator", ["linear", "mlp", "attention_pool", "project", "logits"])
def test_the_triton_kernels_see_operands_that_differ(operator, device):
    """Each floating matrix of a call in another dtype than its rows; norms, scales and biases are no operands."""
    case = SMALL[operator].map(lambda x: x.bfloat16()).on(device)
    for place, wide in enumerate(case.arguments):
        if isinstance(wide, torch.Tensor) and wide.ndim == 2:
            mixed = [*case.arguments]
            mixed[place] = wide.float()
            options = {k: v for k, v in case.options.items() if k != "residual"}
            with torch.no_grad(), clipfast.backend("triton"), pytest.raises(RuntimeError, match="differ in dtype"):
                getattr(ops, operator)(*mixed, **options)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_triton_kernels_with_gradients(name):
    """All but those of one row a sample, which PyTorch runs, forced or not."""
    missing = name in ("attention_pool", "logits")
    for forced in (None, "triton"):
        backend, why = _decide(name, forced, grad=True, autocast=True)
        assert backend == ("torch" if missing else "triton")
        assert why == ("does not have this operator with gradients" if missing else None)


def test_a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(dispatch.library, "triton_missing", lambda: "triton is not installed")
    assert _decide() == ("torch", "triton is not installed")
    with pytest.raises(RuntimeError, match="'triton' cannot run linear: triton is not installed"):
        _decide(forced="triton")


@pytest.mark.parametrize("name", [*OPERATORS, "contrastive_loss"])
@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 100, 103, 120])
def test_on_a_gpu_the_kernels_run(name, architecture):
    assert _decide(name, architecture=architecture) == ("triton", None)


def test_the_cuda_library_comes_first_where_it_is_built(monkeypatch):
    monkeypatch.setattr(dispatch.native, "missing", lambda: None)
    assert _decide("patch_embed") == ("cuda", "cuda comes first")
    assert _decide("linear") == ("triton", None)
    assert _decide("linear", forced="cuda")[0] == "torch", "which has what it has not"
    assert _decide("patch_embed", grad=True)[0] == "triton", "which has gradients"
    for facts in ({"architecture": 75}, {"dtype": torch.float64}):
        assert _decide("patch_embed", **facts)[0] == "torch"


def test_a_library_that_is_missing_names_itself_and_the_fix(monkeypatch):
    monkeypatch.setattr(dispatch.native, "missing", lambda: "libclipfast.so is not built: pip install ...")
    assert _decide("patch_embed")[0] == "triton"
    with pytest.raises(RuntimeError, match="'cuda' cannot run patch_embed: libclipfast.so is not built: pip install"):
        _decide("patch_embed", forced="cuda")


def test_cublas_where_there_is_nothing_to_fuse():
    def ran(activation, residual, rows, **facts):
        return _decide(shape=(True, 768, 768, activation, residual), rows=rows, **facts)[0]

    assert ran(None, False, 4096) == "torch"
    assert ran(None, False, 64) == "triton", "few rows: bound by reading the weight, and one launch"
    assert ran(None, True, 4096) == ran("quick_gelu", False, 4096) == "triton"
    assert ran("quick_gelu", True, 4096, dtype=torch.float32) == "torch"
    assert ran(None, False, 4096, forced="triton") == "triton", "a preference, not a refusal"


def test_a_measured_winner_overrides_the_rule(monkeypatch):
    facts = {"shape": (True, 768, 768, None, False), "rows": 4096}
    key = ("linear", 90, torch.bfloat16, 4096, 768, 768, None, False)
    monkeypatch.setitem(tuning.MEASURED_CUBLAS, key, False)
    assert _decide(**facts)[0] == "triton"
    monkeypatch.setitem(tuning.MEASURED_CUBLAS, key, True)
    assert _decide(**facts) == ("torch", "cuBLAS measured faster at this shape")


@interpreted
def test_the_interpreter_runs_only_when_forced(onednn):
    x, weight = torch.randn(3, 16), torch.randn(5, 16)
    with torch.no_grad():
        ops.linear(x, weight)
        assert "triton" not in _ran().values() and _reason("triton") == "its interpreter runs only when forced"
        with clipfast.backend("triton"):
            forced = ops.linear(x, weight)
    assert [row[3].backend for row in clipfast.explain() if row[2]] == ["triton"]
    torch.testing.assert_close(forced, ops.linear(x, weight))


def test_a_compiled_graph_holds_the_kernels(device, monkeypatch):
    """As registered operators, in one graph; with gradients it holds PyTorch's."""
    if device == "cpu":  # the interpreter in the place of a GPU
        monkeypatch.setattr(dispatch, "_compiled_on", _compiled_as_on_a_gpu)
        monkeypatch.setattr(dispatch, "_gpu_refuses", lambda call: None)
        monkeypatch.setattr(dispatch, "_triton_yields", lambda operator, call: None)
    x, weight, bias = torch.randn(6, 64), torch.rand(64), torch.randn(64)
    x, weight, bias = (t.to(device) for t in (x, weight, bias))
    seen = []

    def keep(graph, inputs):
        seen.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.layer_norm(x, weight, bias) + 1, fullgraph=True, backend=keep)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ops.layer_norm(x, weight, bias) + 1)
    assert any("clipfast.layer_norm" in name for name in seen[0]), seen
    compiled(x.requires_grad_()).sum().backward()
    assert not any("clipfast" in name for name in seen[1]), seen
    torch._dynamo.reset()


@torch.compiler.assume_constant_result
def _compiled_as_on_a_gpu(operator, device, dtype, autocast, facts):
    call = dispatch.Call("cuda", dtype, autocast=autocast, architecture=90)
    return dispatch.decide(operator, None, call).backend


def test_explain_of_this_cpu_with_and_without_gradients(products):
    def backends(**options):
        return {name: decision.backend for name, _, _, decision in clipfast.explain("cpu", **options)}

    library = {"attention", "attention_pool", "linear", "mlp", "patch_embed", "project"} if products == "cpu" else set()
    assert {name for name, backend in backends().items() if backend == "cpu"} == library
    assert {name for name, backend in backends().items() if backend == "onednn"} == {*dispatch._ONEDNN} - library
    assert set(backends(grad=True).values()) == {"torch"}
    assert set(backends(dtype=torch.float64).values()) == {"torch"}
    with torch.backends.mkldnn.flags(enabled=False):
        assert {name for name, backend in backends().items() if backend != "torch"} == library


def test_the_weight_decides_for_images_of_bytes(products):
    pixels, weight = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.randn(5, 3, 4, 4)
    with torch.no_grad():
        ops.patch_embed(pixels, weight, torch.randn(5), torch.randn(5, 5), mean=torch.zeros(3), std=torch.ones(3))
    assert _ran() == {"patch_embed": products}


@pytest.mark.parametrize("rows", [600, 50])
def test_less_precision_leaves_the_chains_of_a_product_whole(rows, onednn):
    """torch.set_float32_matmul_precision("high"): still float32, added in one chain, which rounds more."""
    x, weight = torch.randn(rows, 3072), torch.randn(64, 3072) * 3072**-0.5
    exact = x.double() @ weight.double().t()
    errors = {}
    with torch.no_grad(), clipfast.backend("onednn"):
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            try:
                errors[precision] = (ops.linear(x, weight) - exact).square().mean().sqrt().item()
            finally:
                torch.set_float32_matmul_precision("highest")
        errors["again"] = (ops.linear(x, weight) - exact).square().mean().sqrt().item()
    assert errors["again"] == errors["highest"] < errors["high"] < 1e-5
