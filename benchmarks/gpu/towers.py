"""encode_image and encode_text of whole models: ours against openai/CLIP, transformers, open_clip and torch.compile."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import clipfast
from benchmarks.gpu import contestants
from benchmarks.gpu.correctness import TINY
from benchmarks.gpu.run import Run, rates, ratios
from clipfast import roofline
from clipfast.architectures import ARCHITECTURES
from clipfast.bench import harness, peers, workload
from clipfast.bench.budget import Budget
from clipfast.bench.harness import Row
from clipfast.bench.peers import huggingface, ours

OURS, EAGER = contestants.OURS, contestants.OPENAI
SHORT, WHOLE = workload.Captions(8, 24), workload.Captions(77, 77)
ROUNDS = {1: 61, 32: 31, 256: 15, 1024: 9}
# seconds that a group takes without and with torch.compile, until one of this run says better
ESTIMATES = {False: 12.0, True: 60.0}


class Group(NamedTuple):
    """What is compared: everything that its rows share."""

    model: str
    tower: str
    batch: int
    dtype: torch.dtype
    captions: workload.Captions = WHOLE
    compiled: bool = False  # with torch.compile, which takes minutes

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def about(self) -> str:
        return str(self.captions) if self.tower == "text" else ""

    def title(self) -> str:
        captions = f" of {self.captions} tokens" if self.tower == "text" else ""
        return f"{self.model} {self.tower}{captions}, batch {self.batch}, {self.dtype_name}"


def plan(*, dry: bool = False) -> list[Group]:
    """Most important first: the figures that the aims are about, without compilers and then with torch.compile."""
    if dry:
        return [Group("tiny", "image", 2, torch.float32), Group("tiny", "text", 2, torch.float32, SHORT)]
    b32, b16, l14 = "ViT-B/32", "ViT-B/16", "ViT-L/14"

    def groups(dtype: torch.dtype, *chosen: tuple[str, str, int]) -> list[Group]:
        captions = {"image": WHOLE, "text": SHORT}
        return [Group(model, tower, batch, dtype, captions[tower]) for model, tower, batch in chosen]

    half = torch.bfloat16
    first = groups(half, (b32, "image", 256), (b32, "text", 256), (b32, "image", 1), (b32, "text", 1))
    first += groups(half, (l14, "image", 256), (b32, "image", 1024), (b32, "image", 32), (b32, "text", 32))
    first += groups(torch.float16, (b32, "image", 256), (b32, "text", 256), (b32, "image", 1), (l14, "image", 256))
    first += groups(half, (l14, "image", 1), (l14, "text", 256), (l14, "image", 32))
    # a compiler takes a minute or two for each
    slow = groups(half, (b32, "image", 256), (b32, "text", 256), (l14, "image", 256), (b32, "image", 1))
    first += [group._replace(compiled=True) for group in slow]
    first += groups(half, (b16, "image", 256), (b16, "image", 1), (l14, "image", 1024))
    return [*first, Group(b32, "text", 256, half, WHOLE)]


@functools.lru_cache(maxsize=2)
def _weights(model: str, device: torch.device) -> dict[str, Tensor]:
    return {name: w.to(device) for name, w in workload.random_weights(_architecture(model)).items()}


def _architecture(model: str) -> dict:
    return TINY if model == "tiny" else ARCHITECTURES[model]


# ---------------------------------------------------------------------------------------------------------------------
# Contestants


def build_contestants(
    run: Run, group: Group, spec: peers.Spec, batch: peers.Batch
) -> tuple[peers.Calls, dict[str, str]]:
    """Name -> call, and name -> why not."""
    calls: peers.Calls = {}
    missing: dict[str, str] = {}
    variants: dict[str, Callable[[peers.Spec], peers.Prepare]] = {
        name: peer.build
        for name, peer in peers.known().items()
        if run.device.type in peer.devices and not peer.prepares
    }
    if group.batch <= 256:  # some are replayed as graphs
        variants[f"{OURS}, graphs off"] = functools.partial(_ours_variant, name=f"{OURS}, graphs off", graphs=False)
    variants[f"{OURS}, torch backend"] = functools.partial(_ours_variant, name=f"{OURS}, torch backend", forced="torch")
    if group.compiled and not run.dry and importlib.util.find_spec("clip") is None:
        # openai-clip may be missing on a bare machine, and something must be compiled
        compiled = {"mode": "max-autotune"}
        name = "transformers torch.compile"
        variants[name] = functools.partial(huggingface.build, suffix=" torch.compile", compiled=compiled)
    elif group.compiled and not run.dry:
        variants |= {
            name: peer.build for name, peer in peers.known().items() if peer.prepares and peer.devices != ("cpu",)
        }
    for name, build in variants.items():
        try:
            calls |= build(spec)(group.tower, batch)
        except Exception as error:
            missing[name] = str(error) if isinstance(error, peers.Missing) else f"not run: {harness.reason(error)}"
    return calls, missing


def _ours_variant(spec: peers.Spec, *, name: str, graphs: bool = True, forced: str | None = None) -> peers.Prepare:
    model = ours.model(spec)
    model.cuda_graphs = graphs

    def call(function: Callable[[], Tensor]) -> Tensor:
        with clipfast.backend(forced) if forced else contextlib.nullcontext():
            return function()

    def prepare(tower: str, batch: peers.Batch) -> peers.Calls:
        (function,) = ours.prepare(model, name, tower, batch).values()
        return {name: functools.partial(call, function)}

    return prepare


# ---------------------------------------------------------------------------------------------------------------------
# One group


def compare(run: Run, group: Group, budget: Budget) -> dict[str, Row]:
    """Check everybody against float64, time those that are right, and write one row for each."""
    architecture = _architecture(group.model)
    data = workload.inputs(architecture, group.batch, _fit(group.captions, architecture))
    data = {name: tensor.to(run.device) for name, tensor in data.items()}
    weights = _weights(group.model, run.device)
    spec = peers.Spec(weights, architecture, group.dtype, run.device)
    with torch.no_grad():
        chosen = data[group.tower][workload.checked_samples(group.batch).to(run.device)]
        exact = workload.exact(group.tower, weights, chosen, group.dtype)
    calls, missing = build_contestants(run, group, spec, peers.Batch(data["image"], data["text"]))
    rows: dict[str, Row] = {name: {"status": "missing", "note": why} for name, why in missing.items()}
    accepted = check(run, group, calls, exact, rows)
    # torch.compile records its CUDA graph in the second call and replays it from the third
    warm_up(accepted, rows)
    seconds: dict[str, list[float]] = {}
    rounds = 2 if run.dry else ROUNDS[group.batch]
    for name, why in harness.time_rounds(accepted, rounds, seconds).items():
        rows[name] |= {"status": "failed", "note": why}
    works = _works(group, architecture, data["text"])
    for name, values in seconds.items():
        summary = harness.times(values)
        rows[name] |= {"how": "wall", **summary, **rates(run, works, group.dtype_name, summary["median_s"])}
    ratios(rows, EAGER if EAGER in seconds else peers.TRANSFORMERS[group.tower], OURS)
    shared = {"operator": f"encode_{group.tower}", "model": group.model, "batch": group.batch, "captions": group.about}
    for name, row in rows.items():
        run.add({**shared, "dtype": group.dtype_name, "contestant": name, **row})
    return rows


def _fit(captions: workload.Captions, architecture: dict) -> workload.Captions:
    return workload.Captions(captions.shortest, min(captions.longest, architecture["context_length"]))


def _works(group: Group, architecture: dict, text: Tensor) -> list[roofline.Work]:
    if group.tower == "image":
        return roofline.image_tower(architecture, group.batch, group.dtype.itemsize)
    return roofline.text_tower(architecture, (text.argmax(dim=-1) + 1).tolist(), group.dtype.itemsize)


def check(
    run: Run, group: Group, calls: dict[str, harness.Function], exact: Tensor, rows: dict[str, Row]
) -> dict[str, harness.Function]:
    """Those that compute the right thing; rows gets everybody's errors, or why there are none."""
    chosen, accepted = workload.checked_samples(group.batch), {}
    for name, call in calls.items():
        try:
            output = call()
            if output.shape != (group.batch, exact.shape[1]) or not output.isfinite().all():
                found, wrong = {}, f"shape {list(output.shape)}, or NaN or infinity in it"
            else:
                found = harness.errors(output[chosen.to(output.device)], exact)
                wrong = harness.verdict(found, group.dtype)
        except Exception as error:
            rows[name] = {"status": "failed", "note": harness.reason(error)}
            if name.startswith(OURS):
                run.fail(f"{group.title()}: {name} failed: {harness.reason(error)}")
            continue
        found.pop("rel_max", None)
        rows[name] = {"status": "WRONG", "note": wrong, **found} if wrong else {"status": "ok", **found}
        if not wrong:
            accepted[name] = call
        elif name.startswith(OURS):
            run.fail(f"{group.title()}: {name}: {wrong}")
    return accepted


def warm_up(calls: dict[str, harness.Function], rows: dict[str, Row]) -> None:
    for name in [*calls]:
        try:
            for _ in range(2):
                calls[name]()
        except Exception as error:
            rows[name] |= {"status": "failed", "note": harness.reason(error)}
            del calls[name]


def lines(group: Group, rows: dict[str, Row]) -> Iterator[str]:
    yield group.title()
    for name, row in rows.items():
        if "median_s" not in row:
            yield f"  {name}: {row['status']}: {row.get('note', '')}"
            continue
        faster = f", ours is {row['ours_is_faster']:.2f}x as fast" if "ours_is_faster" in row and name != OURS else ""
        floor = f", {row['of_floor']:.0%} of the floor's speed" if "of_floor" in row else ""
        yield f"  {name}: {row['median_s'] * 1e3:.4g} ms, {group.batch / row['median_s']:.4g} samples/s{faster}{floor}"


def stage(run: Run, budget: Budget) -> None:
    estimates = dict(ESTIMATES)
    for group in plan(dry=run.dry):
        if group.compiled and not budget.allows(estimates[True]):
            run.note(f"too little time for torch.compile of {group.title()}")
            group = group._replace(compiled=False)
        if (
            any(row.get("operator") == f"encode_{group.tower}" and _same(row, group) for row in run.rows)
            and not group.compiled
        ):
            continue
        if not run.dry and not budget.allows(estimates[False]):
            run.note(f"out of time before {group.title()}")
            continue
        one = budget.part(budget.left())
        torch.compiler.reset()
        try:
            rows = compare(run, group, one)
        except Exception as error:
            run.note(f"{group.title()} failed: {harness.reason(error)}")
            continue
        for line in [f"{group.title()}: ran"] if run.dry else lines(group, rows):
            run.say(line)
        estimates[group.compiled] = max(estimates[group.compiled] * 0.5, one.spent())
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def _same(row: Row, group: Group) -> bool:
    known = (row.get("model"), row.get("batch"), row.get("dtype"), row.get("captions", ""))
    return known == (group.model, group.batch, group.dtype_name, group.about)
