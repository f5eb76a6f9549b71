"""Fair timing of functions against each other: rounds interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from clipfast import compat

__all__ = ["interleaved", "medians", "on_device"]

# of a GPU, about half a millisecond
HEAD_START_CYCLES = 1_000_000


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call; each round calls every function once.

    A machine that slows down or is shared slows all of them alike, and the order rotates from round to round so that
    none always runs behind the same neighbour. The GPU, if one is in use, is waited for around each call.

    functions: name -> function of no arguments.
    rounds, warmup: timed rounds, and untimed ones before them.
    Returns: name -> seconds, [rounds] each, in the order of `functions`.
    Raises: ValueError if rounds < 1 or warmup < 0; whatever a function raises.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            _wait()
            start = time.perf_counter()
            functions[name]()
            _wait()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each list of `interleaved`."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def on_device(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call keeps the device busy: CUDA events on a GPU, the clock on a CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # the GPU waits while the CPU enqueues what is timed, or the first launch's way to it would count
    compat.hold_gpu(HEAD_START_CYCLES)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def _wait() -> None:
    # Initialised only: asking must not start CUDA in a process that runs on the CPU.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
