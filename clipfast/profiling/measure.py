"""Passes under torch.profiler, and what each operator and layer took in them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from clipfast import roofline
from clipfast.bench.ceilings import COPY, READ
from clipfast.bench.harness import Row, significant
from clipfast.profiling.marks import PREFIX, Call, Marks, marked, wait
from clipfast.roofline import Work

REST, BACKWARD = "everything else", "backward of "
STAGE, PASS = f"{PREFIX}stage ", f"{PREFIX}pass "


@dataclass
class Part:
    """An operator, a layer or a stage: seconds in each pass, calls a pass, and the least work of one pass."""

    name: str
    seconds: list[float]
    calls: int = 0
    works: list[Work] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self, whole: float, ceilings: Mapping[str, float], dtype: str) -> Row:
        """time, share, rates and distance to the floor; rates only where the work is known."""
        row: Row = {"part": self.name, "calls": self.calls, "seconds": significant(self.median)}
        row["share"] = significant(self.median / whole) if whole else 0.0
        work = roofline.total(self.works)
        if self.works and self.median:
            memory = ceilings[COPY], ceilings.get(READ)
            floor = roofline.seconds(self.works, ceilings[dtype], *memory)
            row |= {"gb_per_s": significant(work.bytes / self.median / 1e9), "floor_s": significant(floor)}
            row |= {"tflops": significant(work.flops / self.median / 1e12)}
            row["of_floor"] = significant(floor / self.median)
            computes = work.flops / ceilings[dtype] >= roofline.memory_seconds(work, *memory)
            row["bound"] = "compute" if computes else "memory"
        return row


@dataclass
class Profile:
    """What was found.   plain, profiled: median seconds of a pass without and with the profiler."""

    operators: list[Part]
    layers: list[Part]
    by_layer: dict[str, dict[str, float]]  # layer -> operator -> seconds a pass
    plain: float
    profiled: float
    trace: Any

    @property
    def overhead(self) -> float:
        return self.profiled / self.plain - 1


def passes(step: Callable[[], object], model: nn.Module, device: torch.device, count: int, warmup: int = 2) -> Profile:
    """`count` passes of `step` without the profiler, then as many under it.

    Raises: whatever the step raises.
    """
    for _ in range(warmup):
        step()
    plain = statistics.median(_timed(step, device) for _ in range(count))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as prof, marked(model) as marks:
        for marks.number in range(count):
            with record_function(f"{PASS}{marks.number}"):
                _timed(step, device)
    events = list(prof.events())
    # by the same clock as the parts: under load it and perf_counter may differ
    ranges = {
        event.name: event.cpu_time_total / 1e6 for event in events if event.name.startswith(PASS) and _on_host(event)
    }
    profiled = [ranges[f"{PASS}{number}"] for number in range(count)]
    whole = statistics.median(profiled)
    parts, layers, by_layer = _split(events, marks, device, profiled)
    return Profile(parts, layers, by_layer, plain, whole, prof)


def _timed(step: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def _seconds(event: Any, device: torch.device) -> float:
    total = event.device_time_total if device.type == "cuda" else event.cpu_time_total
    return total / 1e6


def _split(
    events: Sequence[Any], marks: Marks, device: torch.device, profiled: Sequence[float]
) -> tuple[list[Part], list[Part], dict[str, dict[str, float]]]:
    """Operators and layers, the rest of each pass as one more part."""
    count = len(profiled)
    operators: dict[str, Part] = {}
    layers: dict[str, Part] = {}
    by_layer: dict[str, dict[str, float]] = {}
    calls = {call.name: call for call in marks.calls}
    forward: dict[int, Call] = {}  # by autograd's sequence number
    for event in events:
        if not _on_host(event):
            continue
        took = _seconds(event, device)
        if event.name.startswith(STAGE):
            name = event.name.removeprefix(STAGE)
            seen = operators[name].calls if name in operators else 0  # a stage runs once a pass
            # reading a file keeps no GPU busy
            _add(operators, name, seen, count, took or event.cpu_time_total / 1e6)
        if (call := calls.get(event.name)) is None:
            continue
        _add(operators, call.operator, call.number, count, took, call.works)
        _add(layers, call.layer, call.number, count, took, call.works)
        inside = by_layer.setdefault(call.layer, {})
        inside[call.operator] = inside.get(call.operator, 0.0) + took / count
        forward |= dict.fromkeys(_sequence_numbers(event), call)
    _add_backward(events, forward, count, device, operators)
    for part in (*operators.values(), *layers.values()):
        part.calls //= count
    known = [sum(part.seconds[i] for part in operators.values()) for i in range(count)]
    # a GPU works on while the host goes ahead: there the rest is what the device idles or does for others
    rest = Part(REST, [max(0.0, whole - some) for whole, some in zip(profiled, known, strict=True)])
    ordered = sorted(operators.values(), key=lambda part: -part.median)
    return [*ordered, rest], sorted(layers.values(), key=lambda part: part.name), by_layer


def _on_host(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU


def _add(parts: dict[str, Part], name: str, number: int, count: int, took: float, works: Iterable[Work] = ()) -> None:
    part = parts.setdefault(name, Part(name, [0.0] * count))
    part.seconds[number] += took
    part.calls += 1
    if number == 0:  # every pass does the same
        part.works += works


def _sequence_numbers(event: Any) -> list[int]:
    """Of every operation inside this range that autograd will come back to."""
    found, open_ = [], list(event.cpu_children)
    while open_:
        child = open_.pop()
        if child.sequence_nr >= 0:
            found.append(child.sequence_nr)
        open_ += child.cpu_children
    return found


def _add_backward(
    events: Sequence[Any], forward: Mapping[int, Call], count: int, device: torch.device, operators: dict[str, Part]
) -> None:
    """The gradients of each operator: autograd's nodes carry the number of the operation they belong to."""
    for event in events:
        if event.name.startswith("autograd::engine::evaluate_function") and event.sequence_nr in forward:
            call = forward[event.sequence_nr]
            _add(operators, BACKWARD + call.operator, call.number, count, _seconds(event, device))
    for name, part in operators.items():
        if name.startswith(BACKWARD):
            works = operators[name.removeprefix(BACKWARD)].works
            part.works = [roofline.backward(work, inputs="patch_embed" not in name) for work in works]


# ---------------------------------------------------------------------------------------------------------------------
# In words


def bottleneck(rows: Sequence[Row], what: str) -> str:
    """One sentence: what takes most of the time, and what could make it less."""
    top = max(rows, key=lambda row: row["seconds"])
    text = f"{top['part']} takes {top['share']:.0%} of {what}"
    if "of_floor" not in top:
        return f"{text}."
    rate = f"{top['tflops'] * 1e3:.0f} GFLOP/s" if top["bound"] == "compute" else f"{top['gb_per_s']:.0f} GB/s"
    text += f", at {rate}: {top['of_floor']:.0%} of what this machine's {_CEILING[top['bound']]} allows"
    if top["of_floor"] >= 0.7:
        return f"{text}, so that little is left to gain there but by less work."
    gain = top["seconds"] - top["floor_s"]
    share = gain / top["seconds"] * top["share"]
    return f"{text}, so that up to {gain * 1e3:.3g} ms a pass ({share:.0%}) could be gained."


_CEILING = {"compute": "arithmetic", "memory": "memory"}
