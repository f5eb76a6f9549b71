"""Train-step rows: forward, open_clip's contrastive loss, backward and AdamW, the same for all.

In half precision the weights stay float32 under autocast, as open_clip trains with `--precision amp_bf16`. Before
anybody is timed, gradients of a few parameters are compared with float64 on a small batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast import reference
from clipfast.bench import contest, harness, peers, plan
from clipfast.bench.accuracy import relative_rms
from clipfast.bench.harness import Row, significant
from clipfast.bench.peers import OPENAI, OURS, Batch, Missing, Spec, openai, openclip, ours

if TYPE_CHECKING:
    from clipfast.bench.run import Run

# pairs whose gradients are compared with float64
SMALL = 4
# parameters at both ends of both towers; names that a model lacks are left out
CHECKED = (
    "visual.conv1.weight",
    "visual.proj",
    "visual.transformer.resblocks.0.attn.in_proj_weight",
    "token_embedding.weight",
    "transformer.resblocks.0.mlp.c_fc.weight",
    "text_projection",
    "logit_scale",
)
# greatest relative RMS error of a gradient: far above rounding through a whole model, far below a wrong term
# (ViT-B/32, 2 pairs, a CPU: openai-clip 4.4e-6 in float32, 4.6e-2 in bfloat16)
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.03}
# (images, text) -> (image features, text features, scale), features normalised
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Trainer(NamedTuple):
    """A contestant: its model, and what a step does with it."""

    model: nn.Module
    forward: Forward
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    optimiser: torch.optim.Optimizer
    dtype: torch.dtype

    def gradients(self, batch: Batch) -> Tensor:
        """The loss; gradients are left in the parameters."""
        device = batch.images.device.type
        half = self.dtype != torch.float32
        with torch.autocast(device, self.dtype) if half else contextlib.nullcontext():
            loss = self.loss(*self.forward(batch.images, batch.text))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def step(self, batch: Batch) -> Tensor:
        loss = self.gradients(batch)
        self.optimiser.step()
        return loss


def trainers(spec: Spec, names: Sequence[str]) -> tuple[dict[str, Trainer], dict[str, str]]:
    """Name -> trainer, and name -> why not."""
    found: dict[str, Trainer] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            if name not in _MAKERS:
                raise Missing("no train step here: clipfast, openai-clip and open_clip only")
            found[name] = _MAKERS[name](spec)
        except Missing as error:
            missing[name] = str(error)
        except Exception as error:
            missing[name] = f"not run: {harness.reason(error)}"
    return found, missing


def _trainer(model: nn.Module, forward: Forward, loss: nn.Module, spec: Spec) -> Trainer:
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    # open_clip's settings; fused is PyTorch's fastest, on CPUs too
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=True
    )
    return Trainer(model, forward, loss, optimiser, spec.dtype)


def _openai_forward(model: nn.Module) -> Forward:
    def forward(images: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = (
            F.normalize(encode(x), dim=-1) for encode, x in ((model.encode_image, images), (model.encode_text, text))
        )
        first, second = features
        return first, second, model.logit_scale.exp()

    return forward


def _ours(spec: Spec) -> Trainer:
    try:
        from clipfast.loss import ClipLoss
    except ImportError as error:
        raise Missing(f"clipfast has no loss here: {error}") from error
    model = ours.model(spec._replace(dtype=torch.float32))
    return _trainer(model, _openai_forward(model), ClipLoss(), spec)


def _openai(spec: Spec) -> Trainer:
    try:
        loss = peers.module("open_clip", "open_clip_torch").ClipLoss()
    except Missing as error:
        raise Missing(f"{error}, and its loss is open_clip's") from error
    model = openai.model(spec._replace(dtype=torch.float32))
    return _trainer(model, _openai_forward(model), loss, spec)


def _openclip(spec: Spec) -> Trainer:
    loss = peers.module("open_clip", "open_clip_torch").ClipLoss()
    model = openclip.model(spec._replace(dtype=torch.float32))
    return _trainer(model, lambda images, text: model(images, text)[:3], loss, spec)


_MAKERS: dict[str, Callable[[Spec], Trainer]] = {OURS: _ours, OPENAI: _openai, openclip.NAME: _openclip}


# ---------------------------------------------------------------------------------------------------------------------
# Check, then time


def exact_gradients(weights: Mapping[str, Tensor], batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the CHECKED parameters in float64, of the plain definition."""
    wanted = {name: weights[name].double().requires_grad_() for name in CHECKED if name in weights}
    parameters = {**weights, **wanted}
    per_image, per_text = reference.forward(parameters, batch.images, batch.text)
    pairs = torch.arange(len(per_image), device=per_image.device)
    loss = (F.cross_entropy(per_image, pairs) + F.cross_entropy(per_text, pairs)) / 2
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return loss.item(), dict(zip(wanted, gradients, strict=True))


def errors(trainer: Trainer, batch: Batch, loss: float, exact: Mapping[str, Tensor]) -> tuple[Row, str]:
    """The worst relative RMS error of a gradient, and what is wrong, empty if nothing is."""
    found = trainer.gradients(batch).item()
    parameters = dict(trainer.model.named_parameters())
    wrong = {}
    for name, gradient in exact.items():
        # a parameter that a library trains under another name would be no error of its gradient
        theirs = parameters[name].grad
        wrong[name] = float("inf") if theirs is None else relative_rms(theirs, gradient)
    worst = max(wrong, key=wrong.__getitem__)
    bound = BOUNDS[trainer.dtype]
    row = {"rel_rms": significant(wrong[worst])}
    if not wrong[worst] <= bound:
        return row, f"gradient of {worst}: relative RMS error {wrong[worst]:.2g} > {bound:g}"
    if not abs(found - loss) <= bound * max(1.0, abs(loss)):
        return row, f"loss {found:.6g}, exact {loss:.6g}"
    return row, ""


def compare(
    run: Run, group: plan.Group, spec: Spec, batch: Batch, names: Sequence[str], calls: plan.Calls, rows: dict[str, Row]
) -> None:
    """Check gradients, then time whole steps; rows get what is found."""
    found, missing = trainers(spec, names)
    rows |= {name: {"status": "missing", "note": why} for name, why in missing.items()}
    small = Batch(batch.images[:SMALL], batch.text[:SMALL])
    run.bar.say(f"{group.title()}: float64 gradients")
    loss, exact = exact_gradients(spec.weights, small)
    accepted: dict[str, harness.Turn] = {}
    for name, trainer in found.items():
        run.bar.say(f"{group.title()}: {name}")
        try:
            row, wrong = errors(trainer, small, loss, exact)
        except Exception as error:
            rows[name] = contest.failure(error)
            continue
        rows[name] = {"status": "WRONG", "note": wrong, **row} if wrong else {"status": "untimed", **row}
        rows[name]["version"] = peers.version(peers.known()[name])
        if not wrong:
            accepted[name] = functools.partial(harness.timed, functools.partial(trainer.step, batch))
    contest.time_accepted(accepted, rows, calls.rounds, least=calls.least, left=run.budget.left)
    for name in accepted:
        if "median_s" in rows[name]:
            run.costs.learn(group, name, rows[name]["median_s"])
