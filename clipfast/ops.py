"""The public operators, and the only place that decides which backend runs each of them.

    with clipfast.backend("torch"):      # force one; raises if it cannot run
        model.encode_image(images)
    print(clipfast.explain())            # what ran, and why the others did not

A decision depends on the facts in `Call` alone and is made once for each set of them, so that a call costs one look-up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipfast import reference
from clipfast.kernels import eager, onednn
from clipfast.packing import Rows

__all__ = [
    "attention",
    "attention_pool",
    "backend",
    "explain",
    "layer_norm",
    "linear",
    "logits",
    "mlp",
    "patch_embed",
    "project",
]

ACTIVATIONS = ("quick_gelu", "gelu")


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


class Call(NamedTuple):
    """All that a backend's fitness may depend on."""

    device: str
    dtype: torch.dtype
    grad: bool  # a gradient will be asked for
    traced: bool  # torch.compile, torch.jit.trace, torch.func or a dispatch mode looks at each operator
    autocast: bool
    onednn: bool  # torch.backends.mkldnn.enabled


class Backend(NamedTuple):
    name: str
    refuses: Callable[[Call], str | None]  # the reason it cannot run, None if it can
    operators: dict[str, Callable[..., Any]]


class Decision(NamedTuple):
    backend: str
    run: Callable[..., Any]
    others: tuple[tuple[str, str], ...]  # (backend, why it does not run)


def _onednn_refuses(call: Call) -> str | None:
    if call.device != "cpu":
        return f"runs on a CPU, not on {call.device}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no {str(call.dtype).removeprefix('torch.')} products"
    if call.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 products (AVX-512 needed)"
    if call.grad:
        return "inference only, and a gradient is wanted (torch.no_grad() allows it)"
    if call.traced:
        return "not traceable (torch.compile, torch.jit, torch.func or a dispatch mode is on)"
    if call.autocast:
        return "autocast is on"
    return onednn.missing() or (None if call.onednn else "torch.backends.mkldnn.enabled is False")


_EAGER = ("layer_norm", "linear", "mlp", "attention", "attention_pool", "patch_embed", "project", "logits")
_ONEDNN = ("linear", "mlp", "patch_embed", "project")

# In order of preference; "reference" runs only when forced.
_BACKENDS = (
    Backend("onednn", _onednn_refuses, {name: getattr(onednn, name) for name in _ONEDNN}),
    Backend("torch", lambda call: None, {name: getattr(eager, name) for name in _EAGER}),
    Backend(
        "reference",
        lambda call: None,
        {
            "layer_norm": reference.layer_norm,
            "linear": lambda x, w, b, act, res: reference.linear(x, w, b, activation=act, residual=res),
            "mlp": lambda *a: reference.mlp(*a[:7], activation=a[7], eps=a[8]),
            "attention": lambda qkv, rows, causal, scale: reference.attention(
                qkv, rows.offsets(), causal=causal, scale=scale
            ),
            "attention_pool": lambda q, t, rows, *a: reference.attention_pool(q, t, rows.offsets(), *a[:6], heads=a[6]),
            "patch_embed": lambda *a: reference.patch_embed(*a[:4], mean=a[4], std=a[5]),
            "project": reference.project,
            "logits": reference.logits,
        },
    ),
)

_forced: ContextVar[str | None] = ContextVar("clipfast_backend", default=None)
_decisions: dict[tuple[str, str | None, Call], Decision] = {}


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside the block every operator runs on the named backend: "onednn", "torch" or "reference".

    An operator the backend does not have runs on "torch", and explain() says so. Blocks nest; other threads are
    not affected.
    Raises: ValueError for an unknown name; inside the block RuntimeError, with the reason, where it cannot run.
    """
    names = [known.name for known in _BACKENDS]
    if name not in names:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(names)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _decide(operator: str, forced: str | None, call: Call) -> Decision:
    """The forced backend if it has the operator, else the first that does not refuse; why not, for all others."""
    able = {known.name: known for known in _BACKENDS if operator in known.operators}
    reasons = {known.name: "does not have this operator" for known in _BACKENDS if operator not in known.operators}
    reasons |= {name: reason for name, known in able.items() if (reason := known.refuses(call))}
    if forced in able and forced in reasons:
        raise RuntimeError(f"backend {forced!r} cannot run {operator}: {reasons[forced]}")
    if forced is not None:
        chosen = forced if forced in able else "torch"
    else:
        chosen = next(name for name in able if name not in reasons)
    for name in able:
        passed_over = "runs only when forced" if name == "reference" else f"{chosen} comes first"
        reasons.setdefault(name, f"{forced} is forced" if forced is not None else passed_over)
    others = tuple((name, reason) for name, reason in reasons.items() if name != chosen)
    return Decision(chosen, able[chosen].operators[operator], others)


def _call(x: Tensor, tensors: tuple[Tensor | None, ...]) -> Call:
    device = x.device.type
    return Call(
        device,
        x.dtype,
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
        traced(),
        device != "meta" and torch.is_autocast_enabled(device),
        torch.backends.mkldnn.enabled,
    )


def traced() -> bool:
    """True while something other than plain eager execution looks at each operator."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


def _run(operator: str, x: Tensor, tensors: tuple[Tensor | None, ...], *arguments: Any) -> Any:
    if torch.compiler.is_compiling():  # the traced graph must not hold our book-keeping
        return getattr(eager, operator)(*arguments)
    key = (operator, _forced.get(), _call(x, tensors))
    decision = _decisions.get(key)
    if decision is None:
        decision = _decisions[key] = _decide(*key)
    return decision.run(*arguments)


class Explanation(list[tuple[str, Call, str | None, Decision]]):
    """Rows (operator, call, forced backend, decision); prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no operator has run yet"
        lines = [f"{'operator':<15} {'on':<14} {'runs on':<10} others"]
        for operator, call, forced, decision in self:
            where = f"{call.device} {str(call.dtype).removeprefix('torch.')}"
            others = "; ".join(f"{name}: {why}" for name, why in decision.others)
            lines.append(f"{operator:<15} {where:<14} {decision.backend + '!' * bool(forced):<10} {others}")
        return "\n".join(lines)


def explain(device: str | None = None, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> Explanation:
    """What ran since the process started: for each operator the backend, and why each other one did not.

    device, dtype, grad: given a device, what would run there instead, for every operator.
    Returns: a list of (operator, call, forced backend, decision) that prints as a table ("!" marks a forced one).
    """
    if device is None:
        return Explanation(
            (name, call, forced, made) for (name, forced, call), made in sorted(_decisions.items(), key=str)
        )
    call = Call(torch.device(device).type, dtype, grad, False, False, torch.backends.mkldnn.enabled)
    return Explanation((name, call, None, _decide(name, None, call)) for name in _EAGER)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def _expect(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raises ValueError unless the tensor is None or has this shape; -1 stands for any size."""
    if tensor is None or tensor.shape == shape:
        return
    if len(tensor.shape) == len(shape) and all(
        want in (-1, got) for want, got in zip(shape, tensor.shape, strict=True)
    ):
        return
    wanted = ", ".join("*" if want == -1 else str(want) for want in shape)
    raise ValueError(f"{name} must be [{wanted}], got {list(tensor.shape)}")


def _expect_activation(activation: str | None, known: tuple[str | None, ...]) -> None:
    if activation not in known:
        raise ValueError(f"activation must be one of {known}, got {activation!r}")


def _expect_rows(name: str, tensor: Tensor, rows: Rows) -> None:
    if rows.total != tensor.shape[0]:
        raise ValueError(f"offsets end at {rows.total} but {name} has {tensor.shape[0]} rows")


def _expect_one_device(name: str, first: Tensor, **others: Tensor | None) -> None:
    for other, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(f"{name} is on {first.device} but {other} is on {tensor.device}; move one of them")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension, computed in float32 (float64 for float64) and returned in x's dtype.

    x: [..., W] floating.   weight, bias: [W], any floating dtype.
    Returns: [..., W], dtype of x.
    Raises: ValueError if the widths differ, RuntimeError if the devices do.
    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    _expect("weight", weight, x.shape[-1])
    _expect("bias", bias, x.shape[-1])
    _expect_one_device("x", x, weight=weight, bias=bias)
    return _run("layer_norm", x, (x, weight, bias), x, weight, bias, eps)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + residual.

    x: [..., K].   weight: [N, K].   bias: [N] or None.   residual: [..., N] or None.   One floating dtype.
    activation: None, "quick_gelu" (x * sigmoid(1.702 x)) or "gelu" (exact).
    Returns: [..., N], dtype of x.
    Raises: ValueError if the shapes disagree or the activation is unknown, RuntimeError if the devices differ.
    """
    _expect("weight", weight, -1, x.shape[-1])
    _expect("bias", bias, weight.shape[0])
    _expect("residual", residual, *x.shape[:-1], weight.shape[0])
    _expect_activation(activation, (None, *ACTIVATIONS))
    _expect_one_device("x", x, weight=weight, bias=bias, residual=residual)
    return _run("linear", x, (x, weight, bias, residual), x, weight, bias, activation, residual)


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    activation: str = "quick_gelu",
    eps: float = 1e-5,
) -> Tensor:
    """x + fc2(activation(fc1(LayerNorm(x)))): the second half of a residual block.

    x: [..., W].   norm_weight, norm_bias: [W].   fc1: [F, W], [F].   fc2: [W, F], [W].
    activation: "quick_gelu" or "gelu".
    Returns: [..., W], dtype of x.
    Raises: ValueError if the shapes disagree or the activation is unknown, RuntimeError if the devices differ.
    """
    width, hidden = x.shape[-1], fc1_weight.shape[0]
    _expect("norm_weight", norm_weight, width)
    _expect("norm_bias", norm_bias, width)
    _expect("fc1_weight", fc1_weight, hidden, width)
    _expect("fc1_bias", fc1_bias, hidden)
    _expect("fc2_weight", fc2_weight, width, hidden)
    _expect("fc2_bias", fc2_bias, width)
    _expect_activation(activation, ACTIVATIONS)
    _expect_one_device("x", x, norm_weight=norm_weight, fc1_weight=fc1_weight, fc2_weight=fc2_weight)
    tensors = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return _run("mlp", x, tensors, *tensors, activation, eps)


def attention(
    qkv: Tensor, offsets: Rows | Tensor | Sequence[int], *, causal: bool, scale: float | None = None
) -> Tensor:
    """Softmax attention of each sequence's rows over that sequence's rows; no [L, L] matrix leaves the kernel.

    qkv:     [T, 3, H, D] floating.
    offsets: Rows, or [B + 1] integers: first row of each sequence, the last entry T.
    scale:   multiplies q.k before the softmax; default D ** -0.5.
    Returns: [T, H * D], dtype of qkv.
    Raises:  ValueError if the shapes disagree.
    Source:  Vaswani et al. 2017; Dao 2023, FlashAttention-2.
    """
    rows = Rows.of(offsets)
    _expect("qkv", qkv, -1, 3, -1, -1)
    _expect_rows("qkv", qkv, rows)
    return _run("attention", qkv, (qkv,), qkv, rows, causal, scale)


def attention_pool(
    query: Tensor,
    tokens: Tensor,
    offsets: Rows | Tensor | Sequence[int],
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    *,
    heads: int,
) -> Tensor:
    """One query per sequence attends to all of that sequence's rows, with the three projections inside.

    query: [B, W].   tokens: [T, W], rows of B sequences (none empty).   q/k/v_weight: [W', W].   biases: [W'] or None.
    Returns: [B, W'], heads side by side, before any output projection; dtype of tokens. The key bias is taken for its
             gradient only: it adds the same to every score of a head, and the softmax drops it.
    Raises:  ValueError if the shapes disagree, RuntimeError if the devices do.
    """
    rows = Rows.of(offsets)
    width, inner = tokens.shape[-1], q_weight.shape[0]
    _expect("query", query, len(rows.lengths), width)
    _expect("tokens", tokens, -1, width)
    _expect_rows("tokens", tokens, rows)
    if 0 in rows.lengths:
        raise ValueError("every sequence needs a row to attend to, and one is empty")
    if inner % heads:
        raise ValueError(f"q_weight has {inner} rows, which do not divide into {heads} heads")
    for name, weight, bias in (("q", q_weight, q_bias), ("k", k_weight, k_bias), ("v", v_weight, v_bias)):
        _expect(f"{name}_weight", weight, inner, width)
        _expect(f"{name}_bias", bias, inner)
    _expect_one_device("tokens", tokens, query=query, q_weight=q_weight, k_weight=k_weight, v_weight=v_weight)
    tensors = (query, tokens, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias)
    return _run("attention_pool", tokens, tensors, query, tokens, rows, *tensors[2:], heads)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Class token and linear embedding of each P x P patch, plus positions.

    images: [B, C, H, W] floating, or uint8 with mean and std [C]: then (pixel / 255 - mean) / std comes first.
    weight: [W, C, P, P].   class_embedding: [W].   positional_embedding: [1 + G, W], G = (H // P) * (W // P); rows and
            columns of pixels beyond a multiple of P are left out, as a strided convolution does.
    Returns: [B, 1 + G, W], dtype of weight.
    Raises:  TypeError for integer images, ValueError if the shapes disagree, RuntimeError if the devices do.
    Source:  Dosovitskiy et al. 2020, arXiv:2010.11929.
    """
    width, channels, size, _ = weight.shape
    _expect("images", images, -1, channels, -1, -1)
    _expect("class_embedding", class_embedding, width)
    _expect("positional_embedding", positional_embedding, -1, width)
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be floating (normalised) or uint8 (0 to 255), got {images.dtype}")
    if images.dtype == torch.uint8 and (mean is None or std is None):
        raise ValueError("uint8 images need mean and std")
    down, across = images.shape[2] // size, images.shape[3] // size
    if 1 + down * across != len(positional_embedding):
        raise ValueError(
            f"images of {images.shape[2]} x {images.shape[3]} give {down} x {across} patches of {size}, "
            f"but positional_embedding is for {len(positional_embedding) - 1}"
        )
    _expect_one_device("images", images, weight=weight)
    tensors = (images, weight, class_embedding, positional_embedding)
    return _run("patch_embed", weight, tensors, *tensors, mean, std)


def project(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, projection: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm(x) @ projection: pooled rows into the shared embedding space.

    x: [B, W].   norm_weight, norm_bias: [W].   projection: [W, E].
    Returns: [B, E], dtype of x.
    Raises: ValueError if the shapes disagree, RuntimeError if the devices do.
    """
    _expect("norm_weight", norm_weight, x.shape[-1])
    _expect("norm_bias", norm_bias, x.shape[-1])
    _expect("projection", projection, x.shape[-1], -1)
    _expect_one_device("x", x, norm_weight=norm_weight, projection=projection)
    return _run("project", x, (x, norm_weight, norm_bias, projection), x, norm_weight, norm_bias, projection, eps)


def logits(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logit_scale) times the cosine of every image with every text.

    image_features: [I, E].   text_features: [T, E].   logit_scale: scalar tensor.
    Returns: ([I, T], [T, I]).
    Raises: ValueError if the widths differ, RuntimeError if the devices do.
    Source: Radford et al. 2021, arXiv:2103.00020, figure 3.
    """
    _expect("image_features", image_features, -1, -1)
    _expect("text_features", text_features, -1, image_features.shape[1])
    _expect_one_device("image_features", image_features, text_features=text_features, logit_scale=logit_scale)
    tensors = (image_features, text_features, logit_scale)
    return _run("logits", image_features, tensors, *tensors)
