"""Groups of inference: everybody in their seat, checked, timed, and what that says about the groups to come."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clipfast.bench import contest, harness, peers, plan
from clipfast.bench.harness import Row, significant
from clipfast.bench.peers import Batch, Peer, Spec

if TYPE_CHECKING:
    from clipfast.bench.run import Run

# how many times what timing a group may take, if the prediction was too low
LATE = 2


def compare(
    run: Run, group: plan.Group, spec: Spec, batch: Batch, names: Sequence[str], calls: plan.Calls, rows: dict[str, Row]
) -> None:
    """Check, then time; rows get what is found, also when somebody interrupts."""
    asked = {peer.name: peer for peer in run.peers if peer.name in names}
    entries, prepared = _entries(run, group, spec, batch, asked, rows)
    run.bar.say(f"{group.title()}: float64 reference")
    truth = run.exact.truth(group, spec)
    alone: dict[str, float] = {}  # contestant -> seconds of its first call
    first: dict[str, float] = {}  # peer -> the same of all its contestants

    def seen(name: str, seconds: float) -> None:
        run.bar.say(f"{group.title()}: {name} checked")
        alone[name] = seconds
        peer = asked[entries[name].peer]
        first[peer.name] = first.get(peer.name, 0.0) + seconds
        if peer.compiles:
            prepared[peer.name] += seconds
            run.costs.learn_prepare(group, peer, prepared[peer.name])

    accepted = contest.check(entries, truth, group.batch, spec.dtype, rows, seen)
    for name, seconds in first.items():
        # a first call is slower than the next: still the better prediction where it was the shorter one
        if not asked[name].compiles and seconds < run.costs.call(group, name):
            run.costs.learn(group, name, seconds)
    again = plan.calls_of(group, [asked[name] for name in first], run.costs, run.rounds)
    eager = {name: seconds for name, seconds in alone.items() if not asked[entries[name].peer].compiles}
    try:
        contest.time_accepted(
            accepted,
            rows,
            max(calls.rounds, again.rounds),
            together=again.together,
            warm_up=not run.house.apart,
            tick=lambda done: run.bar.say(f"{group.title()}: rounds"),
            least=again.least,
            # a prediction may have been far too low
            left=run.budget.part(LATE * run.rounds.share).left,
            checked=eager if again.check_counts else None,
            approximate=frozenset(name for name, entry in entries.items() if entry.approximate),
        )
    finally:
        _learn(run, group, asked, entries, rows, prepared)


def _entries(
    run: Run, group: plan.Group, spec: Spec, batch: Batch, asked: Mapping[str, Peer], rows: dict[str, Row]
) -> tuple[dict[str, contest.Entry], dict[str, float]]:
    """Contestant -> its calls, and peer -> seconds of preparing them. Who cannot be built is missing from now on."""
    entries: dict[str, contest.Entry] = {}
    seconds: dict[str, float] = {}
    run.bar.say(f"{group.title()}: preparing {', '.join(asked)}")
    for peer, seat, built, names, took, error in run.house.prepare(asked.values(), spec, group.tower, batch):
        run.bar.say(f"{group.title()}: {peer.name} prepared")
        if built:
            run.costs.started(group, peer)
        if isinstance(error, peers.Missing):
            run.missing[peer.name] = str(error)
        elif error is not None and not built and not isinstance(error, MemoryError):
            run.missing[peer.name] = f"not run: {harness.reason(error)}"
        elif error is not None:  # of this size only; there may be more memory for the next
            rows[peer.name] = contest.failure(error)
        if error is not None:
            continue
        seconds[peer.name] = took
        if not peer.compiles:
            run.costs.learn_prepare(group, peer, took)
        for name in names:
            calls = functools.partial(seat.first, name), functools.partial(seat.turn, name)
            entries[name] = contest.Entry(peer.name, *calls, peer.approximate)
    run.house.forget(keep=lambda seat: seat.alive)
    return entries, seconds


def _learn(
    run: Run,
    group: plan.Group,
    asked: Mapping[str, Peer],
    entries: Mapping[str, contest.Entry],
    rows: Mapping[str, Row],
    prepared: Mapping[str, float],
) -> None:
    taken: dict[str, float] = {}
    for name, entry in entries.items():
        rows[name]["version"] = peers.version(asked[entry.peer])
        rows[name]["prepare_s"] = significant(prepared[entry.peer])
        if "median_s" in rows[name]:
            taken[entry.peer] = taken.get(entry.peer, 0.0) + rows[name]["median_s"]
    for peer, seconds in taken.items():
        run.costs.learn(group, peer, seconds)
