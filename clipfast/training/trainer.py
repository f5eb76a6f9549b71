"""The loop: batch, gradients, step, clamp; everything it depends on can be saved and given back."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipfast.commands import CommandError
from clipfast.model import CLIP
from clipfast.training.arguments import PRECISIONS
from clipfast.training.checkpoint import rng_state, set_rng_state
from clipfast.training.data import BadSample, Batch, BatchOrder, PairDataset, make_loader
from clipfast.training.optimization import Recipe, clamp_logit_scale, learning_rate, make_optimizer
from clipfast.training.processes import Processes
from clipfast.training.step import Loss, Pairs, accumulate_gradients

__all__ = ["Stopped", "Trainer", "autocast_for"]

# told after each step: its metrics, and the samples that could not be read for it
AfterStep = Callable[[dict[str, Any], list[BadSample]], None]


class Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or a launcher that is gone: all processes have finished the same step and started no other."""


def autocast_for(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """A context for the towers. The weights stay float32 in all of them."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp32":
        return contextlib.nullcontext
    if precision == "amp_fp16" and device.type != "cuda":
        raise CommandError(f"precision amp_fp16 is for GPUs, and this is {device}: use amp_bf16 or fp32")
    dtype = torch.bfloat16 if precision == "amp_bf16" else torch.float16
    return functools.partial(torch.autocast, device.type, dtype)


class Trainer:
    """Contrastive training of one model; in each process of a group one of these.

    model:       float32, on its device; it stays the same object and has the new weights.
    order:       which samples each step gets. Its `rank` and `world` are those of `group`.
    loss:        of (image_features, text_features, logit_scale); default ClipLoss over the whole batch.
    precision:   "fp32", "amp_bf16" or "amp_fp16" (with a GradScaler).
    micro_batch: pairs per process that are held at once (`accumulate_gradients`).
    workers:     that decode and tokenise; 0: this process does.
    `step` counts the steps that are done.
    """

    def __init__(
        self,
        model: CLIP,
        dataset: PairDataset,
        order: BatchOrder,
        recipe: Recipe,
        *,
        loss: Loss | None = None,
        precision: str = "fp32",
        micro_batch: int | None = None,
        workers: int = 0,
        group: Processes | None = None,
    ):
        self.model = model
        self.step = 0
        self.recipe = recipe
        self.order = order
        self.group = group or Processes(model.logit_scale.device)
        self.device = self.group.device
        self.dataset = dataset
        self._workers = workers
        self._micro_batch = micro_batch
        self.autocast = autocast_for(precision, self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "amp_fp16")
        self._loss = loss or _clip_loss(self.group)
        self._optimizer = make_optimizer(model, recipe)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._pairs: nn.Module = Pairs(model)
        if self.group.world > 1:
            self._pairs = DistributedDataParallel(self._pairs, [self.device] if self.device.type == "cuda" else None)

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on to the bit. Every process of the group must call it."""
        return {
            "step": self.step,
            "model": dict(self.model.state_dict()),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "rng": self.group.everyones(rng_state(self.device)),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave. Generators are restored where this process had one."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        if self.group.rank < len(state["rng"]):
            set_rng_state(state["rng"][self.group.rank], self.device)

    def run(self, after_step: AfterStep) -> None:
        """All steps that are left.

        Raises: Stopped after a step, on Ctrl-C or SIGTERM (a second one interrupts at once), or when torchrun has left
                this process behind; CommandError if the loss is not finite or the data cannot be read.
        """
        self.model.train()
        self.order.start = self.step
        loader = make_loader(self.dataset, self.order, self._workers, pin=self.device.type == "cuda")
        with _stop_signals() as stop:
            batches = iter(loader)
            while self.step < self.recipe.steps:
                started = time.perf_counter()
                batch = _next(batches)
                waited = time.perf_counter() - started
                metrics, stopped = self._one_step(batch, stop.is_set() or self.group.orphaned)
                seconds = time.perf_counter() - started
                metrics["samples_per_second"] = round(self.order.batch / seconds, 3)
                metrics["data_wait"] = round(waited / seconds, 4)
                after_step(metrics, batch.bad)
                if stopped:
                    raise Stopped("torchrun is gone" if self.group.orphaned else "")

    def _one_step(self, batch: Batch, stop: bool) -> tuple[dict[str, Any], bool]:
        """Metrics, and whether any process is asked to stop."""
        rate = learning_rate(self.step, self.recipe)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        loss = accumulate_gradients(
            self._pairs,
            batch.images.to(self.device, non_blocking=True),
            batch.tokens.to(self.device, non_blocking=True),
            self._loss,
            micro_batch=self._micro_batch,
            autocast=self.autocast,
            scaled=self._scaler.scale,
        )
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self.recipe.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.recipe.grad_clip, norm)
        # of every process: the mean of its rows' losses, and whether it was told to stop
        loss, stops = self.group.mean(torch.stack([loss.double(), loss.new_tensor(stop, dtype=torch.float64)])).tolist()
        if loss - loss != 0:
            raise CommandError(f"the loss is {loss} at step {self.step + 1}: no weight was changed by it")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        clamp_logit_scale(self.model.logit_scale)
        self.step += 1
        norm, scale = torch.stack([norm.double(), self.model.logit_scale.detach().double().exp()]).tolist()
        metrics = {
            "step": self.step,
            "epoch": (self.step - 1) // self.order.steps_per_epoch + 1,
            "loss": loss,
            "lr": rate,
            "logit_scale": scale,
            # JSON has no infinity: of a step in float16 that the GradScaler left out
            "grad_norm": norm if norm - norm == 0 else None,
        }
        return metrics, stops > 0


def _clip_loss(group: Processes) -> Loss:
    from clipfast.loss import ClipLoss

    return ClipLoss(local_loss=True, gather_with_grad=True, rank=group.rank, world_size=group.world)


def _next(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except CommandError as error:
        # from a worker it comes with that one's traceback, and its own text in the last line
        raise CommandError(str(error).strip().splitlines()[-1].rpartition("CommandError: ")[2]) from error


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, in place of an interruption in the middle of a step."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number, frame):
        stop.set()
        signal.signal(number, before[number])

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
