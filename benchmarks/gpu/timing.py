"""Times of single operators on a GPU: CUDA graphs, rotating inputs, interleaved rounds, CUDA events.

An operator takes a GPU microseconds, less than a CPU needs to launch the parts of a composition. So each contestant's
calls, one for each of several sets of inputs, are captured in a CUDA graph and replayed: what is timed is the work on
the device, for everybody, and inputs come from memory and not from the cache that the call before has filled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from clipfast.bench.harness import reason
from clipfast.timing import on_device

# the sets of inputs together are this many times the L2 cache
CACHES = 3
MOST_SETS = 24
MOST_CALLS = 64
# a replay shorter than this is as much start as work
REPLAY_SECONDS = 300e-6


class Prepared(NamedTuple):
    run: Callable[[], Any]
    calls: int
    how: str  # "graph", "calls" or "cpu"


def input_sets(n_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs and outputs of this size outgrow the cache."""
    return max(1, min(MOST_SETS, math.ceil(CACHES * cache_bytes / max(1, n_bytes))))


def n_calls(sets: int, floor_seconds: float) -> int:
    """Calls in one replay: every set the same number of times, and long enough to be timed."""
    wanted = math.ceil(REPLAY_SECONDS / max(floor_seconds, 1e-6))
    return sets * max(1, min(MOST_CALLS, wanted) // sets)


def prepare(calls: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> Prepared:
    """One function that makes all calls `repeats` times over, as a CUDA graph where they can be captured.

    Raises: what a call raises when it is not captured.
    """

    def run() -> list[Any]:
        # all outputs stay alive, or each call would write where the one before did, in the cache
        return [call() for _ in range(repeats) for call in calls]

    count = len(calls) * repeats
    if device.type != "cuda":
        return Prepared(run, count, "cpu")
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = run()
        graph.replay()
        torch.cuda.synchronize(device)
    except Exception as error:  # a host synchronisation, a library that does not capture
        torch.cuda.synchronize(device)
        return Prepared(run, count, f"calls ({reason(error)})"[:80])

    def replay() -> list[Any]:
        graph.replay()
        return kept

    return Prepared(replay, count, "graph")


def time_interleaved(
    prepared: Mapping[str, Prepared], rounds: int, device: torch.device, left: Callable[[], float] = lambda: math.inf
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of one call in each round; every round runs every contestant, and the order rotates.

    left: seconds that may still be spent; at 0 no further round starts, but one always runs.
    Returns: name -> seconds, and name -> why of those that raised, which have no seconds.
    """
    running, failed = dict(prepared), {}
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(-1, rounds):  # the first one warms up
        if number > 0 and left() <= 0:
            break
        names = list(running)
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            try:
                taken = on_device(running[name].run, device) / running[name].calls
            except Exception as error:
                failed[name] = reason(error)
                del running[name], seconds[name]
                continue
            if number >= 0:
                seconds[name].append(taken)
    return seconds, failed
