"""The only place that decides which backend runs an operator.

    with clipfast.backend("torch"):      # force one; raises if it cannot run
        model.encode_image(images)
    print(clipfast.explain())            # what ran, and why the others did not

A decision depends on the facts in `Call` alone and is made once for each set of them, so that a call costs one look-up.
What a backend cannot do is a refusal, and forcing it raises. What it can do but another does faster is a preference.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipfast import compat, reference, tuning
from clipfast.blocks import Block, Projection, Stack
from clipfast.kernels import (
    cpu_attention,
    cpu_attention_pool,
    cpu_blocks,
    cpu_library,
    cpu_linear,
    cpu_patch_embed,
    eager,
    eager_gradients,
    kept,
    library,
    native,
    onednn,
)
from clipfast.kernels.loss_autograd import contrastive_loss

OPERATORS = ("layer_norm", "linear", "mlp", "attention", "attention_pool", "patch_embed", "project", "logits")
LOSSES = ("contrastive_loss",)
HALVES = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """All that a backend's fitness may depend on."""

    device: str
    dtype: torch.dtype
    grad: bool = False  # a gradient will be asked for
    traced: bool = False  # torch.compile, torch.jit.trace, torch.func or a mode looks at each operator
    autocast: bool = False
    onednn: bool = True  # torch.backends.mkldnn.enabled
    architecture: int = 0  # of a GPU, as in clipfast.tuning
    rows: int = 0  # the power of two at or above them; 0 where not known
    shape: tuple[Any, ...] = ()  # what `_facts` says of the arguments; () where not known


class Backend(NamedTuple):
    name: str
    refuses: Callable[[str, Call], str | None]  # the reason it cannot run this operator, None if it can
    yields: Callable[[str, Call], str | None]  # the reason why the next backend is the better one, None if it is not
    # by name, for such a call; a function, so that Triton is imported when it is needed
    operators: Callable[[Call], Mapping[str, Callable[..., Any]]]
    has: tuple[str, ...] = (*OPERATORS, *LOSSES)
    without_gradients: tuple[str, ...] = ()  # operators that it has not where a gradient is wanted


class Decision(NamedTuple):
    backend: str
    run: Callable[..., Any]
    others: tuple[tuple[str, str], ...]  # (backend, why it does not run)


def _never(operator: str, call: Call) -> str | None:
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What each backend can do


def _not_eager(call: Call, *, grad: bool = False) -> str | None:
    """Why a backend that is no plain composition of PyTorch's operators cannot run.

    grad: it has gradients, and minds autocast where they are wanted.
    """
    if call.grad and not grad:
        return "inference only, and a gradient is wanted (torch.no_grad() allows it)"
    if call.traced:
        return "not traceable (torch.jit, torch.func or a mode of PyTorch's is on)"
    return "autocast is on" if call.autocast and not (grad and call.grad) else None


def _lacks_dtype(call: Call, what: str) -> str | None:
    return None if call.dtype in (torch.float32, *HALVES) else f"has no {_short(call.dtype)} {what}"


def _not_on_this_cpu(call: Call, what: str) -> str | None:
    return f"runs on a CPU, not on {call.device}" if call.device != "cpu" else _lacks_dtype(call, what)


def _onednn_refuses(operator: str, call: Call) -> str | None:
    # first whether it is there: only then can it be asked what this CPU has
    if reason := _not_on_this_cpu(call, "products") or compat.onednn_missing():
        return reason
    if call.dtype == torch.bfloat16 and not _has_bfloat16_products():
        return "this CPU has no bfloat16 products (AVX-512 needed)"
    return _not_eager(call) or (None if call.onednn else "torch.backends.mkldnn.enabled is False")


def _cpu_refuses(operator: str, call: Call) -> str | None:
    reason = _not_on_this_cpu(call, "kernel") or _not_eager(call) or cpu_library.missing()
    if reason is None and operator in _CPU_PRODUCTS:
        if call.dtype == torch.float16:
            return "has no float16 products"
        return _mixed(call)
    return reason


def _cpu_yields(operator: str, call: Call) -> str | None:
    if operator not in _ONEDNN:
        return None
    return tuning.onednn_is_better(call.dtype, call.rows, cpu_library.best(), _has_amx())


def _has_bfloat16_products() -> bool:
    return compat.onednn_has_bfloat16()


@functools.cache
def _has_amx() -> bool:
    return compat.cpu_has_amx()


def _gpu_refuses(call: Call) -> str | None:
    if call.device != "cuda":
        return f"runs on a GPU, not on {'a CPU' if call.device == 'cpu' else call.device}"
    if torch.version.hip is not None:
        return "never tried on ROCm"
    if call.architecture < tuning.OLDEST:
        return f"needs sm_{tuning.OLDEST} or later, and this GPU is sm_{call.architecture}"
    return None


def _cuda_refuses(operator: str, call: Call) -> str | None:
    return _gpu_refuses(call) or _lacks_dtype(call, "kernels") or _not_eager(call) or native.missing()


def _triton_refuses(operator: str, call: Call) -> str | None:
    reason = library.triton_missing()
    if reason is None and not (call.device == "cpu" and library.interpreted()):
        reason = _gpu_refuses(call)
    reason = reason or _lacks_dtype(call, "kernels")
    if reason is None and operator == "attention" and call.shape and not _head_width_fits(*call.shape):
        reason = f"heads are {call.shape[0]} wide; its kernels want a multiple of 16 up to 128"
    products = ("linear", "mlp", "attention_pool", "project", "logits")
    if reason is None and operator in products and not call.autocast:
        reason = _mixed(call)
    return reason or _not_eager(call, grad=True)


def _mixed(call: Call) -> str | None:
    """Of an operator whose first fact is whether its operands have one dtype."""
    return "the operands differ in dtype" if call.shape and not call.shape[0] else None


def _head_width_fits(width: int) -> bool:
    return width % 16 == 0 and 16 <= width <= 128


def _triton_yields(operator: str, call: Call) -> str | None:
    if call.device == "cpu":
        return "its interpreter runs only when forced"
    return tuning.cublas_is_better(operator, call.dtype, call.architecture, call.rows, call.shape)


def _triton_operators(call: Call) -> Mapping[str, Callable[..., Any]]:
    from clipfast.kernels import fused, fused_gradients

    return fused.TRITON | fused_gradients.OPERATORS if call.grad else fused.TRITON


def _torch_operators(call: Call) -> Mapping[str, Callable[..., Any]]:
    plain = {name: getattr(eager, name) for name in OPERATORS}
    plain["contrastive_loss"] = functools.partial(contrastive_loss, "torch")
    # what traces or transforms PyTorch's operators must see them, not our gradients
    return plain | eager_gradients.OPERATORS if call.grad and not call.traced else plain


def _cpu_operators(call: Call) -> Mapping[str, Callable[..., Any]]:
    return {
        "attention": cpu_attention.attention,
        "attention_pool": cpu_attention_pool.attention_pool,
        "patch_embed": cpu_patch_embed.patch_embed,
        **{name: getattr(cpu_linear, name) for name in ("linear", "mlp", "project")},
    }


def _cuda_operators(call: Call) -> Mapping[str, Callable[..., Any]]:
    return {"patch_embed": native.patch_embed}


# ---------------------------------------------------------------------------------------------------------------------
# The backends, in order of preference; "reference" runs only when forced


def _reference_loss(image, text, scale, bias, processes):
    if processes is not None:
        raise RuntimeError("backend 'reference' cannot run contrastive_loss: it knows of one process")
    return reference.contrastive_loss(image, text, scale, bias)


def _reference_patch_embed(images, weight, first, positions, mean, std, norm_weight, norm_bias, eps):
    return reference.patch_embed(
        images, weight, first, positions, mean=mean, std=std, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps
    )


_REFERENCE: dict[str, Callable[..., Any]] = {
    "layer_norm": reference.layer_norm,
    "linear": lambda x, w, b, act, res: reference.linear(x, w, b, activation=act, residual=res),
    "mlp": lambda *a: reference.mlp(*a[:7], activation=a[7], eps=a[8]),
    "attention": lambda qkv, rows, causal, scale: reference.attention(qkv, rows.offsets(), causal=causal, scale=scale),
    "attention_pool": lambda q, t, rows, *a: reference.attention_pool(q, t, rows.offsets(), *a[:6], heads=a[6]),
    "patch_embed": _reference_patch_embed,
    "project": reference.project,
    "logits": reference.logits,
    "contrastive_loss": _reference_loss,
}
_ONEDNN = ("linear", "mlp", "patch_embed", "project")
_CPU_PRODUCTS = (*_ONEDNN, "attention_pool")

_BACKENDS = (
    Backend("cuda", _cuda_refuses, _never, _cuda_operators, ("patch_embed",)),
    # one row a sample, and one product a step: PyTorch's own gradients serve
    Backend(
        "triton", _triton_refuses, _triton_yields, _triton_operators, without_gradients=("attention_pool", "logits")
    ),
    Backend("cpu", _cpu_refuses, _cpu_yields, _cpu_operators, ("attention", *_CPU_PRODUCTS)),
    Backend("onednn", _onednn_refuses, _never, lambda call: {name: getattr(onednn, name) for name in _ONEDNN}, _ONEDNN),
    Backend("torch", _never, _never, _torch_operators),
    Backend("reference", _never, lambda operator, call: "runs only when forced", lambda call: _REFERENCE),
)
NAMES = tuple(known.name for known in _BACKENDS)

_forced: ContextVar[str | None] = ContextVar("clipfast_backend", default=None)
_decisions: dict[tuple[str, str | None, Call], Decision] = {}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside the block every operator runs on the named backend: "cuda", "triton", "cpu", "onednn", "torch" or
    "reference".

    An operator the backend does not have runs on "torch", and explain() says so. Blocks nest; other threads are
    not affected.
    Raises: ValueError for an unknown name; inside the block RuntimeError, with the reason, where it cannot run.
    """
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(NAMES)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def prepack(weights: Iterable[Tensor], enable: bool = True) -> None:
    """Let backends keep these weights [N, K] in a layout of their own between calls, or no longer.

    Raises: ValueError for a weight made in inference mode.
    """
    (kept.keep if enable else kept.forget)(weights)


def forced() -> str | None:
    """The backend that the innermost `backend` block names."""
    return _forced.get()


@functools.cache
def _usual_backend(operator: str, forced: str | None, call: Call) -> str | None:
    try:
        return decide(operator, forced, call).backend
    except RuntimeError:  # forced, and it cannot: the operator itself will say so
        return None


def runs_on(name: str, operators: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all these operators would run on the named backend, without gradients and at usual shapes."""
    call = Call(device.type, dtype, architecture=tuning.architecture(device) if device.type == "cuda" else 0)
    return all(_usual_backend(operator, _forced.get(), call) == name for operator in operators)


def decide(operator: str, forced: str | None, call: Call) -> Decision:
    """The forced backend if it has the operator, else the first that neither refuses nor yields; why not the others."""
    able = {
        known.name: known
        for known in _BACKENDS
        if operator in known.has and not (call.grad and operator in known.without_gradients)
    }
    reasons = {
        known.name: "does not have this operator" + " with gradients" * (operator in known.has)
        for known in _BACKENDS
        if known.name not in able
    }
    reasons |= {name: reason for name, known in able.items() if (reason := known.refuses(operator, call))}
    if forced in able and forced in reasons:
        raise RuntimeError(f"backend {forced!r} cannot run {operator}: {reasons[forced]}")
    if forced is not None:
        chosen = forced if forced in able else "torch"
    else:
        reasons |= {n: why for n, known in able.items() if n not in reasons and (why := known.yields(operator, call))}
        chosen = next(name for name in able if name not in reasons)
    for name in able:
        reasons.setdefault(name, f"{forced} is forced" if forced is not None else f"{chosen} comes first")
    others = tuple((name, reasons[name]) for name in NAMES if name != chosen)
    return Decision(chosen, able[chosen].operators(call)[operator], others)


# ---------------------------------------------------------------------------------------------------------------------
# Facts of a call


def traced() -> bool:
    """True while something other than plain eager execution looks at each operator."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or compat.each_operator_is_seen()


def _one_dtype(*tensors: Tensor) -> bool:
    return all(tensor.dtype == tensors[0].dtype for tensor in tensors)


# What a GPU backend's fitness depends on besides device and dtype, without the number of rows, from an operator's
# arguments. For those with matrix products the first fact is whether their operands have one dtype; products on a CPU
# depend on no other.
_FACTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "layer_norm": lambda x, *_: (x.shape[-1],),
    "linear": lambda x, w, b, act, res: (
        _one_dtype(x, w, *([] if res is None else [res])),
        *w.shape,
        act,
        res is not None,
    ),
    "mlp": lambda x, nw, nb, w1, b1, w2, *_: (_one_dtype(x, w1, w2), *w1.shape),
    "attention": lambda qkv, *_: (qkv.shape[3],),
    "attention_pool": lambda query, tokens, rows, wq, bq, wk, bk, wv, *_: (_one_dtype(query, tokens, wq, wk, wv),),
    "patch_embed": lambda images, weight, *_: (True, str(images.dtype), *weight.shape),
    "project": lambda x, nw, nb, projection, eps: (_one_dtype(x, projection),),
    "logits": lambda images, texts, scale: (_one_dtype(images, texts),),
    "contrastive_loss": lambda images, *_: (images.shape[1],),
}


def _call(operator: str, x: Tensor, tensors: tuple[Tensor | None, ...], arguments: tuple[Any, ...]) -> Call:
    device, dtype = x.device.type, x.dtype
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and operator != "layer_norm" and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    architecture, rows, shape = 0, 0, ()
    if device == "cuda" or _forced.get() == "triton":
        architecture = tuning.architecture(x.device)
        rows, shape = _rows(operator, x, arguments), _FACTS[operator](*arguments)
    elif device == "cpu" and operator in _CPU_PRODUCTS:
        rows, shape = _rows(operator, x, arguments), _FACTS[operator](*arguments)[:1]
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return Call(device, dtype, grad, traced(), autocast, torch.backends.mkldnn.enabled, architecture, rows, shape)


def _rows(operator: str, x: Tensor, arguments: tuple[Any, ...]) -> int:
    """The bucket of an operator's rows: of x, or the patches of all images."""
    if operator == "patch_embed":
        images, _, _, positions, *_ = arguments
        return tuning.rows_bucket(len(images) * (len(positions) - 1))
    return tuning.rows_bucket(x.numel() // max(1, x.shape[-1]))


@compat.constant_when_traced
def _compiled_on(operator: str, device: str, dtype: torch.dtype, autocast: bool, facts: tuple) -> str:
    """The backend of an operator in a graph that torch.compile traces: our registered kernels or PyTorch's own.

    Without gradients: those PyTorch's compiler derives itself, and fuses what ours fuse by hand.

    The number of rows may differ from call to call of one graph, so it does not count here.
    """
    call = Call(device, dtype, autocast=autocast, shape=facts)
    if device == "cuda":
        call = call._replace(architecture=tuning.architecture(torch.device(device)))
    name = decide(operator, None, call).backend
    return name if name in ("cuda", "triton") else "torch"


def run(operator: str, x: Tensor, tensors: tuple[Tensor | None, ...], *arguments: Any) -> Any:
    """Runs an operator where it runs best.

    x: the tensor whose device and dtype count.   tensors: all that may want a gradient.   arguments: the backend's.
    """
    if torch.compiler.is_compiling():  # the traced graph must not hold our book-keeping
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        device = x.device.type
        facts = _FACTS[operator](*arguments) if device == "cuda" else ()
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        name = "torch" if grad else _compiled_on(operator, device, x.dtype, autocast, facts)
        if name == "cuda":
            return native.patch_embed(*arguments)
        if name == "triton":
            from clipfast.kernels import fused

            return fused.TRITON[operator](*arguments)
        if operator in LOSSES:
            return contrastive_loss("torch", *arguments)
        return getattr(eager, operator)(*arguments)
    return _decided(operator, _call(operator, x, tensors, arguments)).run(*arguments)


def _decided(operator: str, call: Call) -> Decision:
    key = (operator, _forced.get(), call)
    decision = _decisions.get(key)
    if decision is None:
        decision = _decisions[key] = decide(*key)
    return decision


def whole_blocks(
    x: Tensor, blocks: Sequence[Block], pooled: bool = False, projection: Projection | None = None
) -> Callable[..., Tensor] | None:
    """What computes residual attention blocks in one call, or None where each of their operators is on its own.

    No operator of its own: `explain` shows those that a block is made of, which must all run on libclipfast_cpu.
    pooled: the last block computes one row of each sequence, by `attention_pool`.   projection: of these rows.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not blocks:
        return None
    stack, of_projection = Stack.of(blocks), () if projection is None else projection[:3]
    # the decision is asked for as if for one linear layer, with x in the weight's place
    call = _call("linear", x, (x, *stack.tensors, *of_projection), (x, x, None, None, None))
    call = call._replace(shape=(_one_dtype(x, *stack.matrices, *of_projection[2:]),))
    # one call stands for all of them: on a CPU none depends on more than these facts
    parts = ["linear", "mlp"]
    if len(blocks) > 1 or not pooled:
        parts.append("attention")
    if pooled:
        parts.append("attention_pool")
    if projection is not None:
        parts.append("project")
    return cpu_blocks.blocks if all(_decided(part, call).backend == "cpu" for part in parts) else None


# ---------------------------------------------------------------------------------------------------------------------
# What ran, and why


class Explanation(list[tuple[str, Call, str | None, Decision]]):
    """Rows (operator, call, forced backend, decision); prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no operator has run yet"
        lines = [f"{'operator':<17} {'on':<14} {'runs on':<10} others"]
        lines += dict.fromkeys(  # calls that differ only in what the table does not show are one line
            f"{operator:<17} {call.device + ' ' + _short(call.dtype):<14} {decision.backend + '!' * bool(forced):<10} "
            + "; ".join(f"{name}: {why}" for name, why in decision.others)
            for operator, call, forced, decision in self
        )
        return "\n".join(lines)


def _in_forked_child() -> None:
    # OpenMP's threads stay behind in a fork, and it waits for them for ever, in PyTorch's operators as in ours. One
    # thread needs no other. Where nothing has run, there are none to wait for.
    if any(call.device == "cpu" for *_, call in _decisions):
        torch.set_num_threads(1)
        cpu_library.stay_alone()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


def explain(device: str | None = None, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> Explanation:
    """What ran since the process started: for each operator the backend, and why each other one did not.

    device, dtype, grad: given a device, what would run there instead, for every operator at a usual shape; of a GPU
                         that is not here, as on an sm_90.
    Returns: a list of (operator, call, forced backend, decision) that prints as a table ("!" marks a forced one).
    """
    if device is None:
        return Explanation(
            (name, call, forced, made) for (name, forced, call), made in sorted(_decisions.items(), key=str)
        )
    place = torch.device(device)
    architecture = tuning.architecture(place) if place.type == "cuda" else 0
    call = Call(place.type, dtype, grad, onednn=torch.backends.mkldnn.enabled, architecture=architecture)
    return Explanation((name, call, None, decide(name, None, call)) for name in (*OPERATORS, *LOSSES))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
