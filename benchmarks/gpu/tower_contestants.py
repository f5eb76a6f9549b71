"""Who is compared on a whole tower: ours, openai/CLIP, open_clip, transformers, compilers, from the same weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import clipfast
from benchmarks.gpu import groups as grouped
from benchmarks.gpu import machine, operator_contestants
from benchmarks.gpu.groups import Group
from benchmarks.gpu.run import Run
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import harness, peers, workload
from clipfast.bench.harness import Row
from clipfast.bench.peers import huggingface, ours

OURS, OPENAI = operator_contestants.OURS, operator_contestants.OPENAI
# ours by other ways is timed in a few groups, and tried wherever ours is wrong or fails
WITH_VARIANTS = {(grouped.B32, 256, torch.bfloat16), ("tiny", 2, torch.float32)}

Build = Callable[[peers.Spec], peers.Prepare]


def _architecture(model: str) -> dict:
    return grouped.TINY if model == "tiny" else ARCHITECTURES[model]


@functools.lru_cache(maxsize=1)
def _weights(model: str, device: torch.device) -> dict[str, Tensor]:
    return {name: w.to(device) for name, w in workload.random_weights(_architecture(model)).items()}


@functools.lru_cache(maxsize=len(grouped.BATCHES))
def _images(model: str, batch: int, device: torch.device) -> Tensor:
    return workload.inputs(_architecture(model), batch, workload.Captions(2, 2))["image"].to(device)


class Field:
    """One model for each contestant, all of the same weights and dtype: made when first asked for, then kept."""

    def __init__(self, run: Run, model: str, dtype: torch.dtype, instead: Callable[[], list[str]] = lambda: []):
        """instead: says which operators of ours went to PyTorch since it was last asked (`launch_ids.fall_back`)."""
        self.instead = instead
        self.run, self.model, self.architecture = run, model, _architecture(model)
        self.spec = peers.Spec(_weights(model, run.device), self.architecture, dtype, run.device)
        self._made: dict[str, peers.Prepare] = {}
        self._out: set[str] = set()

    def batch(self, group: Group) -> peers.Batch:
        """One sample of what the tower does not read."""
        n_images, n_texts = (group.batch if group.tower in (tower, "train") else 1 for tower in workload.TOWERS)
        longest = min(group.captions.longest, self.architecture["context_length"])
        text = group.captions._replace(longest=longest).ids(self.architecture, n_texts, seed=1)
        return peers.Batch(_images(self.model, n_images, self.run.device), text.to(self.run.device))

    def calls(
        self, builders: Mapping[str, Build], group: Group, batch: peers.Batch, rows: dict[str, Row]
    ) -> peers.Calls:
        """Name -> call; rows say why somebody has none."""
        found: peers.Calls = {}
        for name, build in builders.items():
            if name in self._out:
                continue
            try:
                if name not in self._made:
                    self._made[name] = build(self.spec)
                found |= self._made[name](group.tower, batch)
            except peers.Missing as error:
                self._out.add(name)
                absent(self.run, name, str(error), rows)
            except Exception as error:
                if name not in self._made:
                    self._out.add(name)
                failed(self.run, group, name, harness.reason(error), rows)
                machine.raise_if_lost(self.run.device)
        return found


def absent(run: Run, name: str, why: str, rows: dict[str, Row]) -> None:
    """One row of a run says that somebody is not here."""
    if name not in run.state.absent:
        run.state.absent.append(name)
        rows[name] = {"status": "missing", "note": why}
        run.note(f"{name} is missing: {why}")


def failed(run: Run, group: Group, name: str, why: str, rows: dict[str, Row]) -> None:
    rows[name] = {**rows.get(name, {}), "status": "failed", "note": why}
    if name.startswith(OURS):
        run.fail(f"{group.title()}: {name} failed: {why}")


def builders(run: Run, group: Group) -> dict[str, Build]:
    """Who is asked, ours first."""
    able = {
        name: peer
        for name, peer in peers.known().items()
        if run.device.type in peer.devices and group.dtype_name in peer.dtypes
    }
    if not group.compiled:
        found = {name: peer.build for name, peer in able.items() if not peer.prepares}
        shown = (group.model, group.batch, group.dtype) in WITH_VARIANTS
        return found | (variants() if shown else {})
    compilers = {name: peer.build for name, peer in able.items() if peer.prepares}
    found = {OURS: able[OURS].build, OPENAI: able[OPENAI].build}
    try:
        peers.module("clip", OPENAI)
    except peers.Missing:
        # something must be compiled on a bare machine too
        found["transformers"] = able["transformers"].build
        compilers = {"transformers torch.compile": _transformers_compiled}
    return found if run.dry else found | compilers


def _transformers_compiled(spec: peers.Spec) -> peers.Prepare:
    suffix = " torch.compile"
    build = huggingface.build(spec, suffix=suffix, compiled={"mode": "max-autotune"})

    def prepare(tower: str, batch: peers.Batch) -> peers.Calls:
        # one way of padding: each compiles for a minute
        name = peers.TRANSFORMERS[tower] + suffix
        return {name: build(tower, batch)[name]}

    return prepare


def variants() -> dict[str, Build]:
    """Ours by other ways."""
    off, plain = f"{OURS}, graphs off", f"{OURS}, torch backend"
    return {
        off: functools.partial(_variant, name=off, graphs=False),
        plain: functools.partial(_variant, name=plain, forced="torch"),
    }


def _variant(spec: peers.Spec, *, name: str, graphs: bool = True, forced: str | None = None) -> peers.Prepare:
    model = ours.model(spec)
    model.cuda_graphs = graphs

    def call(function: Callable[[], Tensor]) -> Tensor:
        with clipfast.backend(forced) if forced else contextlib.nullcontext():
            return function()

    def prepare(tower: str, batch: peers.Batch) -> peers.Calls:
        (function,) = ours.prepare(model, name, tower, batch).values()
        return {name: functools.partial(call, function)}

    return prepare
