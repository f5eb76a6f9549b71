"""Who is timed on each operator: ours, openai/CLIP's composition of PyTorch operators, and the best that others offer.

A contestant takes a case and returns the call to time; what it prepares first, such as padding, is not timed. A `part`
does less than the operator (a product without its epilogue): it shows what the rest costs and is never called best.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import clipfast
from clipfast import ops
from clipfast.kernels import native
from clipfast.packing import Rows
from tests.op_cases import PEERS, Case

OURS, EAGER, COMPILED = "clipfast", "eager", "compile"
OPENAI = "openai-clip"  # who eager is, of whole towers
Call = Callable[[], Any]


class Contestant(NamedTuple):
    name: str
    prepare: Callable[[Case], Call]
    pick: Callable[[Case, Tensor], Tensor] | None = None  # from what the call returns to the operator's result
    part: bool = False


def of(operator: str, *, compiled: bool = False) -> list[Contestant]:
    """Ours first, eager second; with `compiled`, torch.compile instead of the other peers."""
    eager = {
        "attention": Contestant(EAGER, _eager_attention, _unpad),
        "attention_pool": Contestant(EAGER, _eager_pool),
    }.get(operator, Contestant(EAGER, _eager))
    first = [Contestant(OURS, _ours), eager]
    if compiled:
        return [*first, Contestant(COMPILED, _compiled, eager.pick)]
    return [*first, *_OTHERS.get(operator, list)()]


def _ours(case: Case) -> Call:
    function = getattr(ops, case.operator)
    # rows as the model hands them over, so that what kernels derive from them is kept from call to call
    arguments = tuple(Rows.of(x) if isinstance(x, list) else x for x in case.arguments)

    def call() -> Any:
        with torch.no_grad(), clipfast.backend("triton"):
            return function(*arguments, **case.options)

    return call


def _eager(case: Case) -> Call:
    return lambda: PEERS[case.operator](*case.arguments, **case.options)


def _compiled(case: Case) -> Call:
    # no CUDA graphs of its own: every contestant's calls are captured alike
    build = functools.partial(torch.compile, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)
    if case.operator == "attention":
        heads, causal = _padded_heads(case), case.options["causal"]
        return functools.partial(_once(build, _attend_causal if causal else _attend), heads)
    if case.operator == "attention_pool":
        return functools.partial(_once(build, _pool), *_padded_pool(case))
    return functools.partial(_once(build, PEERS[case.operator]), *case.arguments, **case.options)


_compiled_functions: dict[Callable, Callable] = {}


def _once(build: Callable[[Callable], Callable], function: Callable) -> Callable:
    """The same compiled function for every set of inputs."""
    if function not in _compiled_functions:
        _compiled_functions[function] = build(function)
    return _compiled_functions[function]


def forget_compiled() -> None:
    """Before another shape: PyTorch gives up on a function that it has compiled for many."""
    _compiled_functions.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Attention: PyTorch's wants every sequence padded to the longest


def _padded_heads(case: Case) -> Tensor:
    """[B, L, 3, H, D] with L that of the longest sequence; a view where all have the same length."""
    qkv, offsets = case.arguments
    lengths = [b - a for a, b in itertools.pairwise(offsets)]
    if len(set(lengths)) == 1:
        return qkv.view(len(lengths), lengths[0], *qkv.shape[1:])
    return torch.nn.utils.rnn.pad_sequence(qkv.split(lengths), batch_first=True)


def _unpad(case: Case, output: Tensor) -> Tensor:
    """[B, L, H * D] -> [T, H * D]."""
    offsets = case.arguments[1]
    lengths = torch.tensor(offsets, device=output.device).diff()
    return output[torch.arange(output.shape[1], device=output.device) < lengths[:, None]]


def _attend(heads: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2)


def _attend_causal(heads: Tensor) -> Tensor:
    return _attend(heads, causal=True)


def _eager_attention(case: Case) -> Call:
    """openai/CLIP's: an additive mask, and PyTorch picks the kernel; with a mask that is never the flash one."""
    heads, mask = _padded_heads(case), None
    if case.options["causal"]:
        mask = torch.full((heads.shape[1],) * 2, float("-inf"), dtype=heads.dtype, device=heads.device).triu_(1)
    return lambda: _attend(heads, mask)


def _padded_pool(case: Case) -> tuple[Any, ...]:
    """Arguments of `_pool`."""
    query, tokens, offsets, *projections = case.arguments
    lengths = torch.tensor(offsets, device=tokens.device).diff()
    padded = torch.nn.utils.rnn.pad_sequence(tokens.split(lengths.tolist()), batch_first=True)
    mask = None
    if len(lengths.unique()) > 1:
        mask = (torch.arange(padded.shape[1], device=tokens.device) < lengths[:, None])[:, None, None]  # [B, 1, 1, L]
    return query, padded, mask, case.options["heads"], *projections


def _pool(query, tokens, mask, heads, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias):
    """As AttentionPool2d of openai/CLIP: keys and values of all rows, tokens padded [B, L, W]."""
    q = F.linear(query[:, None], q_weight, q_bias)
    parts = (q, F.linear(tokens, k_weight, k_bias), F.linear(tokens, v_weight, v_bias))
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in parts]
    return F.scaled_dot_product_attention(*split, mask).transpose(1, 2).flatten(1)


def _eager_pool(case: Case) -> Call:
    arguments = _padded_pool(case)
    return lambda: _pool(*arguments)


def _sdpa(backend: SDPBackend, case: Case) -> Call:
    heads, causal = _padded_heads(case), case.options["causal"]

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return _attend(heads, causal=causal)

    return call


def _flash_attn(case: Case) -> Call:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    qkv, offsets = case.arguments
    bounds = torch.tensor(offsets, dtype=torch.int32, device=qkv.device)
    longest = max(b - a for a, b in itertools.pairwise(offsets))
    return lambda: flash_attn_varlen_qkvpacked_func(qkv, bounds, longest, causal=case.options["causal"]).flatten(1)


def _attention() -> list[Contestant]:
    backends = {
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa math": SDPBackend.MATH,
    }
    found = [Contestant(name, functools.partial(_sdpa, backend), _unpad) for name, backend in backends.items()]
    if importlib.util.find_spec("flash_attn") is not None:
        found.append(Contestant("flash-attn", _flash_attn))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The others


def _linear() -> list[Contestant]:
    return [Contestant("product alone", lambda case: lambda: F.linear(*case.arguments), part=True)]


def _layer_norm() -> list[Contestant]:
    """Not openai/CLIP's function where its weights are rounded, but what half-precision models call."""

    def prepare(case: Case) -> Call:
        x, weight, bias = case.arguments
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if (residual := case.options.get("residual")) is not None:
            # the sum is kept too, as ours keeps it
            return lambda: ((total := x + residual), F.layer_norm(total, weight.shape, weight, bias))[::-1]
        return lambda: F.layer_norm(x, weight.shape, weight, bias)

    return [Contestant("F.layer_norm in dtype", prepare)]


def _patch_embed() -> list[Contestant]:
    """The CUDA library, in each of its plans."""

    def prepare(plan: str, case: Case) -> Call:
        images, weight, first, positions = case.arguments
        names = ("mean", "std", "norm_weight", "norm_bias")
        options = [case.options.get(name) for name in names]
        return lambda: native.patch_embed(images, weight, first, positions, *options, plan=plan)

    if native.missing() is not None:
        return []
    plans = [plan for plan in native.PLANS if plan not in ("auto", "generic")]
    return [Contestant(f"clipfast cuda {plan}", functools.partial(prepare, plan)) for plan in plans]


_OTHERS: dict[str, Callable[[], list[Contestant]]] = {
    "attention": _attention,
    "linear": _linear,
    "layer_norm": _layer_norm,
    "patch_embed": _patch_embed,
}
