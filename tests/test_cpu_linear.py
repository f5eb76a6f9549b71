"""Linear layers on a CPU: within the house rule in every form of libclipfast_cpu that this CPU can run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clipfast
from clipfast import ops
from clipfast.kernels import cpu_linear

from . import csrc
from .accuracy import assert_accurate
from .op_cases import Case, weights

pytestmark = pytest.mark.usefixtures("cpu_library")
DTYPES = [torch.float32, torch.bfloat16]


def linear_case(rows: int, terms: int, columns: int, dtype: torch.dtype, **options) -> Case:
    case = Case("linear", (torch.randn(rows, terms), *weights(columns, terms)), options)
    return case.map(lambda x: x.to(dtype))


def run(case: Case, form: str = "best") -> Tensor:
    options = case.options
    return cpu_linear.linear(*case.arguments, options.get("activation"), options.get("residual"), form)


def check(case: Case, form: str = "best", what: str = "") -> None:
    before = [x.clone() for x in case.tensors()]
    assert_accurate(run(case, form), *case.peer(), *case.exact(), what=what)
    assert all(torch.equal(x, y) for x, y in zip(before, case.tensors(), strict=True))


# rows, terms, columns: CLIP's own; one and a few of each; both sides of a register, a chain and a group; primes
SHAPES = [
    *((rows, terms, columns) for rows in (1, 16) for terms, columns in ((512, 1536), (2048, 512), (768, 3072))),
    *((rows, 768, 768) for rows in (50, 77, 257, 400)),
    *((rows, 512, 64) for rows in (2, 3, 5, 6, 7, 12, 13, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 321)),
    *((7, terms, 40) for terms in (1, 2, 15, 16, 17, 31, 33, 63, 588, 1023, 1024, 1025, 2047, 2049, 3100)),
    *((300, terms, 40) for terms in (1, 2, 15, 16, 17, 31, 33, 127, 128, 129, 255, 256, 257, 259, 588, 1025, 2050)),
    *(
        (rows, 64, columns)
        for rows in (9, 300)
        for columns in (1, 2, 3, 4, 5, 6, 7, 15, 17, 61, 63, 65, 95, 97, 131, 389)
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(form, shape, dtype):
    torch.manual_seed(0)
    check(linear_case(*shape, dtype), form)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [1, 13, 300])
@pytest.mark.parametrize("activation", [None, "quick_gelu", "gelu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_what_becomes_of_a_sum(form, rows, activation, residual, bias, dtype):
    case = linear_case(rows, 200, 75, dtype, activation=activation)
    x, weight, some = case.arguments
    options = case.options | ({"residual": torch.randn(rows, 75).to(dtype)} if residual else {})
    check(case._replace(arguments=(x, weight, some if bias else None), options=options), form)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("terms", [1, 3, 47, 200, 768, 1025])
def test_rows_that_are_normalised_first(form, terms, dtype):
    """As LayerNorm and the product one after the other, rows far from zero and constant ones too."""
    x, *others = linear_case(13, terms, 75, dtype).arguments
    x[3:6] = 100 * x[3:6] + 1000
    x[7] = 3
    norm = (1 + 0.1 * torch.randn(terms), torch.randn(terms))
    y = F.layer_norm(x.float(), (terms,), *norm, 1e-5).to(dtype)
    exact = F.layer_norm(x.double(), (terms,), *(vector.double() for vector in norm), 1e-5)
    wide = [z.double() for z in others]
    got = cpu_linear.linear(x, *others, None, None, form, (*norm, 1e-5))
    assert_accurate(got, F.linear(y, *others), F.linear(exact, *wide))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 400),
    terms=st.integers(1, 300),
    columns=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from([None, "quick_gelu", "gelu"]),
    threads=st.integers(1, 5),
)
def test_any_shape_and_threads(rows, terms, columns, dtype, activation, threads):
    """A peer may do well by luck on a few numbers: beside the exact result alone."""
    case = linear_case(rows, terms, columns, dtype, activation=activation)
    with csrc.threads(threads):
        got = run(case)
    rtol = 0.51 * torch.finfo(torch.bfloat16).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(got.double(), *case.exact(), rtol=rtol, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 0, 5), (13, 588, 75), (7, 1025, 131), (1100, 391, 97), (2, 16, 0)])
def test_a_packed_weight_gives_the_same(form, shape, dtype):
    rows, terms, columns = shape
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((rows, terms), (columns, terms), (columns,)))
    packed = cpu_linear.pack(weight, form)
    nowhere = torch.full_like(weight, float("nan"))  # of which nothing but the shape is used
    got = torch.ops.clipfast.cpu_linear(x, nowhere, packed, bias, None, None, None, "none", form, 0.0)
    assert torch.equal(got, cpu_linear.linear(x, weight, bias, None, None, form))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("threads", [1, 3])
def test_more_rows_than_are_copied_at_once(form, threads, dtype):
    case = linear_case(2500, 70, 141, dtype)
    with csrc.threads(threads):
        check(case._replace(options={"residual": torch.randn(2500, 141).to(dtype)}), form)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rows", [3, 150, 300])
def test_threads_change_nothing(form, rows, dtype):
    case = linear_case(rows, 300, 410, dtype)
    results = []
    for count in (1, 2, 7):
        with csrc.threads(count):
            results.append(run(case, form))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_row_does_not_depend_on_its_neighbours(form, dtype):
    places = [(96, slice(3, 20)), (7, slice(6, 7)), (600, slice(100, 401)), (1100, slice(1023, 1025))]
    # a few rows have a loop of their own
    places += [(20, slice(11, 11 + few)) for few in range(1, 10)]
    for rows, some in places:
        case = linear_case(rows, 391, 70, dtype)
        x, *others = case.arguments
        alone = run(case._replace(arguments=(x[some], *others)), form)
        assert torch.equal(run(case, form)[some], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("terms", [1, 4, 8, 12])
def test_a_product_that_underflows_has_one_sign(form, terms, dtype):
    """Of zero, which torch.equal does not see: as many zeros are added to few rows' sums as to those of many."""
    x, weight = torch.zeros(20, terms, dtype=dtype), torch.zeros(21, terms, dtype=dtype)
    x[:, -1], weight[:, -1] = 1e-30, -1e-30
    got, alone = (cpu_linear.linear(rows, weight, None, None, None, form) for rows in (x, x[:3]))
    assert not got.any() and torch.equal(got[:3].signbit(), alone.signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rows", [5, 9, 300])
@pytest.mark.parametrize("columns", [53, 64])
def test_what_is_not_finite_stays_in_its_row_and_column(form, columns, rows, bad, dtype):
    """NaN in every number that is not an argument's, too: nothing beyond an operand is used."""
    terms = 47
    around = torch.full((4, rows + columns + 2, 2 * terms), float("nan"), dtype=dtype)
    x, weight = around[0].flatten()[5:][: rows * terms].view(rows, terms), around[1].flatten()[3:][: columns * terms]
    weight = weight.view(columns, terms)
    bias = around[2].flatten()[7:][:columns]
    residual = torch.full((rows * columns + 40,), float("nan"), dtype=dtype)[11:][: rows * columns].view(rows, columns)
    for tensor in (x, weight, bias, residual):
        tensor.copy_(torch.randn(tensor.shape))
    case = Case("linear", (x, weight, bias), {"residual": residual})
    check(case, form)
    # the last of its row and the first: who reads on from column 49 multiplies it
    x[4, 46] = bad
    weight[50, 0] = bad
    got = run(case, form)
    assert not got[4].isfinite().any() and not got[:, 50].isfinite().any()
    rest = torch.ones(rows, columns, dtype=torch.bool)
    rest[4], rest[:, 50] = False, False
    assert got[rest].isfinite().all()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("columns", [1, 2], ids=["one column", "two"])
def test_activations_everywhere(form, activation, columns):
    """Far from zero too, where one factor underflows; a weight of ones on one term lets every float through."""
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.logspace(-30, 30, 601), -torch.logspace(-30, 30, 601)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 87.3, -87.3, 88.8, -88.8, 104.0, -104.0])])[:, None]
    case = Case("linear", (x, torch.ones(columns, 1), None), {"activation": activation})
    (exact,) = case.exact()
    got, peer = run(case, form), *case.peer()
    assert_accurate(got, peer, exact)
    error = (got.double() - exact).abs()
    # of one element: a few units in its last place, or what PyTorch's own is away
    bound = torch.maximum(4 * torch.finfo(torch.float32).eps * exact.abs(), 2 * (peer.double() - exact).abs())
    assert (error <= bound + 1e-7 * (x.abs() < 15) * x.abs() + 1e-37).all()
    special = torch.tensor([[float("nan")], [float("inf")]])
    of_special = run(case._replace(arguments=(special, *case.arguments[1:])), form)
    assert of_special[0].isnan().all() and of_special[1, 0] == float("inf")


def test_bfloat16_is_rounded_to_the_nearest_and_to_even(form):
    """One times one, and residuals that put the sum in the middle of two neighbours, or nearly."""
    residual = torch.tensor([2**-8, 3 * 2**-8, -(2**-9), 2**-8 + 2**-10, 1e38, float("nan")]).bfloat16()
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    for rows in (1, 200):
        got = cpu_linear.linear(
            one.expand(rows, 1), one.expand(6, 1).contiguous(), None, None, residual.expand(rows, 6), form
        )
        exact = (1 + residual.float()).bfloat16()
        assert torch.equal(got[:, :5], exact[:5].expand(rows, -1)) and got[:, 5].isnan().all()


@pytest.mark.parametrize("rows", [9, 300])
def test_bfloat16_is_summed_in_float32_and_rounded_once(form, rows):
    case = linear_case(rows, 512, 64, torch.bfloat16)
    assert (run(case, form) != case.exact()[0].bfloat16()).double().mean() < 0.01


@pytest.mark.parametrize("shape", [(0, 8, 5), (3, 8, 0), (3, 0, 5), (300, 0, 5), (0, 0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_nothing_to_sum(shape, dtype):
    rows, terms, columns = shape
    case = Case("linear", (torch.randn(rows, terms), torch.randn(columns, terms), torch.randn(columns)), {})
    case = case.map(lambda x: x.to(dtype))
    got = run(case)
    assert got.shape == (rows, columns) and torch.equal(got, F.linear(*case.arguments))


def test_leading_dimensions_and_strides():
    case = Case("linear", (torch.randn(2, 3, 5, 16), *weights(7, 16)), {"residual": torch.randn(2, 3, 5, 7)})
    check(case)
    x, weight, bias = case.arguments
    strided = (x.transpose(0, 2), weight.t().contiguous().t(), torch.stack([bias, bias], dim=1)[:, 0])
    check(Case("linear", strided, {"residual": case.options["residual"].transpose(0, 2)}))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("terms", "columns"), [(1, 2), (2, 37), (33, 64), (200, 75), (769, 33), (1025, 7)])
def test_a_transposed_weight_is_read_as_it_is(form, terms, columns, dtype):
    case = linear_case(11, terms, columns, dtype)
    x, weight, bias = case.arguments
    got = run(case._replace(arguments=(x, weight.t().contiguous().t(), bias)), form)
    assert torch.equal(got, run(case, form)), "the same products in the same order"


def test_operands_of_two_dtypes_are_named():
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    with pytest.raises(TypeError, match=r"x is torch.float32, weight torch.bfloat16.*must have one dtype"):
        cpu_linear.linear(x, weight.bfloat16(), None, None, None)
    with pytest.raises(TypeError, match="must have one dtype"):
        cpu_linear.linear(x, weight, None, None, torch.zeros(2, 3, dtype=torch.bfloat16))
    bias = torch.randn(3).bfloat16()
    assert torch.equal(
        cpu_linear.linear(x, weight, bias, None, None), cpu_linear.linear(x, weight, bias.float(), None, None)
    )


def test_gradients_are_refused():
    x, weight = torch.randn(2, 8), torch.randn(3, 8, requires_grad=True)
    assert ops.linear(x, weight).requires_grad
    with clipfast.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' cannot run linear: inference only"):
        ops.linear(x, weight)


def test_operator():
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x, weight, bias, residual = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(3), torch.randn(2, 5, 3)
    arguments = (x, weight, None, bias, residual, torch.randn(8), torch.randn(8), "gelu", "best", 1e-5)
    torch.library.opcheck(torch.ops.clipfast.cpu_linear.default, arguments, test_utils=tests)
